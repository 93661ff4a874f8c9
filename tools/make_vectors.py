"""Write vectors/*.json, the golden cases for samplers, from `headway.reference` and nothing compiled.

Run ``make vectors``. The same bytes come out each time: what is drawn at random is drawn by Python's generator, seeded
with the case's id, so that a case added here changes no other.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headway import SamplingParams, reference
from headway._sampling.dialects import DIALECTS, rules

Row = NDArray[np.float32]
Parameters = dict[str, Any]
Case = dict[str, Any]

VERSION = "1.1.0"
FOLDER = Path(__file__).parent.parent / "vectors"
NAN, INF = math.nan, math.inf
ANSWERS = (None, *DIALECTS, "flashinfer-joint")  # whose answers a case holds; None is native

FLAGS = {
    "ban": "Tokens are banned: by a logit of -inf, by `allowed`, or by `logit_bias`.",
    "bfloat16": "The logits are bfloat16 numbers, as models give them.",
    "boundary": "A token is exactly on the boundary of a filter: the numbers are such that any arithmetic meets it.",
    "error": "The input has no meaning: a sampler should refuse it rather than return some token.",
    "extreme": "Logits or temperatures at the ends of their range; the answer is plain, the way there overflows.",
    "large": "More than a hundred tokens.",
    "off": "A parameter has the value that switches its filter off: every token stays, the rarest included.",
    "order": "The support depends on the order in which the filters run, or on the temperature's place among them.",
    "precision": "float32 sums, or a parameter rounded to float32, give another answer than exact arithmetic.",
    "tail": "Tokens that are drawn once in a thousand million times or less often.",
    "ties": "Equal logits at the border of what stays.",
    "zero": "A number at or past the end of its range, which libraries read in different ways by tradition.",
    "hf": "By the rules of Hugging Face transformers the answer is another.",
    "vllm": "By the rules of vLLM the answer is another.",
    "llama.cpp": "By the rules of llama.cpp the answer is another.",
    "flashinfer": "By the rules of FlashInfer, top_k first, the answer is another.",
    "flashinfer-joint": "By the rules of FlashInfer, top_k and top_p jointly, the answer is another.",
    "sglang": "By the rules of SGLang the answer is another.",
    "mlx": "By the rules of mlx-lm the answer is another.",
}

# Numbers as hex bits ------------------------------------------------------------------------------------------------


def words(row: Row) -> str:
    """A row of float32: 4 hex digits where they are a bfloat16, else 8, and *n behind what comes n times."""
    digits = (bits.removesuffix("0000") for bits in map("{:08x}".format, row.view(np.uint32)))
    return repeated(digits)


def repeated(items: Iterable[str]) -> str:
    """Join by spaces, with *n for n equal items in a row."""
    runs = ((item, len(list(run))) for item, run in itertools.groupby(items))
    return " ".join(item if n == 1 else f"{item}*{n}" for item, n in runs)


def encoded(parameters: Parameters) -> Parameters:
    """Parameters for JSON: float64 as 16 hex digits, a logit_bias as a row."""
    return {
        name: words(np.array(value, np.float32))
        if name == "logit_bias"
        else f"{np.float64(value).view(np.uint64):016x}"
        if isinstance(value, float)
        else value
        for name, value in parameters.items()
    }


def in_words(row: Row, parameters: Parameters) -> str:
    """What a person wants to see of a case."""
    shown = [f"{name} {value}" for name, value in parameters.items()]
    values = [f"{value:.7g}" for value in row]
    return "; ".join([*shown, f"of {', '.join(values)}" if len(values) <= 8 else f"of {len(values)} tokens"])


# Answers ------------------------------------------------------------------------------------------------------------


def support(row: Row, parameters: Parameters, dialect: str | None = None) -> list[int] | str | None:
    """The tokens that can be drawn; "error"; None where the dialect has no such filter."""
    name, nucleus = ("flashinfer", "joint") if dialect == "flashinfer-joint" else (dialect, "after_top_k")
    if rules(name, nucleus).lacks() & parameters.keys():
        return None
    try:
        options = SamplingParams(dialect=name, nucleus=nucleus, seed=0, **parameters)  # type: ignore[arg-type]
        return np.flatnonzero(reference.masses(row, options)).tolist()
    except (ValueError, IndexError):  # an id outside of the vocabulary is no more than an index to the reference
        return "error"


def supports(row: Row, parameters: Parameters) -> dict[str, list[int] | str]:
    """Native's answer, and those of the dialects that differ from it."""
    answers = {dialect or "native": support(row, parameters, dialect) for dialect in ANSWERS}
    native = answers["native"]
    return {n: answer for n, answer in answers.items() if answer is not None and (n == "native" or answer != native)}


def described(
    identity: str, comment: str, row: Row, flags: Iterable[str], parameters: Parameters, result: str = "valid"
) -> Case:
    """A case but for its answer."""
    present = {*flags}
    if row.size and not (row.view(np.uint32) & 0xFFFF).any():
        present.add("bfloat16")
    if row.size > 100:
        present.add("large")
    if np.isneginf(row).any() or {"allowed", "logit_bias"} & parameters.keys():
        present.add("ban")
    return {
        "id": identity,
        "comment": f"{comment} [{in_words(row, parameters)}]",
        "flags": [flag for flag in FLAGS if flag in present],
        "logits": words(row),
        "parameters": encoded(parameters),
        "result": result,
    }


def case(identity: str, comment: str, logits: Any, flags: str = "", result: str = "valid", **parameters: Any) -> Case:
    """A case of levels 1 and 2."""
    row = np.array(logits, np.float32)
    expected = supports(row, parameters)
    assert (result == "invalid") == (expected == {"native": "error"}), identity
    assert result != "acceptable" or len(expected) > 1, identity
    flagged = [*flags.split(), *expected.keys() - {"native"}]
    return described(identity, comment, row, flagged, parameters, result) | {"expected": expected}


# Level 1: what no sensible arithmetic can get wrong -------------------------------------------------------------------


def clear(row: Row, parameters: Parameters) -> bool:
    """Whether each answer stays when logits move by 0.002 and numbers by 0.2 %, and no token that stays is rare."""
    rng = random.Random(0)

    def moved(value: Any, trial: int) -> Any:
        if not isinstance(value, float) or value in (0.0, 1.0):
            return value
        by = 0.002 * (1, -1, 1, -1, rng.uniform(-1, 1))[min(trial, 4)]
        return 1 - (1 - value) * (1 + by) if trial in (2, 3) and value < 1 else value * (1 + by)

    for dialect in ANSWERS:
        answer = support(row, parameters, dialect)
        for trial in range(8) if answer is not None else ():
            noise = np.array([rng.uniform(-0.002, 0.002) * (trial > 0) for _ in row], np.float32)
            if support(row + noise, {name: moved(v, trial) for name, v in parameters.items()}, dialect) != answer:
                return False
        if isinstance(answer, list):
            left = row[answer].astype(np.float64)
            if (left.min() - left.max()) / parameters.get("temperature", 1.0) < -18:
                return False
    return True


def drawn_row(rng: random.Random, size: int, bfloat16: bool) -> Row:
    """Normal logits, nearly: only sums of Python's own random numbers are the same everywhere."""
    spread = rng.uniform(1.0, 4.0)
    row = np.array([(sum(rng.random() for _ in range(4)) - 2) * spread for _ in range(size)], np.float32)
    return (row.view(np.uint32) & 0xFFFF0000).view(np.float32) if bfloat16 else row


VALUES: dict[str, Callable[[random.Random, int], Parameters]] = {
    "temperature": lambda rng, V: {"temperature": rng.choice([0.5, 0.7, 1.3, 2.0])},
    "dynamic_temperature_range": lambda rng, V: {
        "temperature": 1.0,
        "dynamic_temperature_range": rng.choice([0.5, 0.9]),
        "dynamic_temperature_exponent": rng.choice([0.5, 1.0, 2.0]),
    },
    "top_n_sigma": lambda rng, V: {"top_n_sigma": rng.randint(3, 25) / 10},
    "top_k": lambda rng, V: {"top_k": rng.randint(2, max(2, V // 2))},
    "top_p": lambda rng, V: {"top_p": rng.randint(20, 97) / 100},
    "min_p": lambda rng, V: {"min_p": rng.randint(2, 60) / 100},
    "typical_p": lambda rng, V: {"typical_p": rng.randint(20, 95) / 100},
    "epsilon_cutoff": lambda rng, V: {"epsilon_cutoff": min(0.5, rng.randint(1, 40) / (4 * V))},
    "eta_cutoff": lambda rng, V: {"eta_cutoff": min(0.5, rng.randint(1, 60) / (4 * V))},
    "xtc_probability": lambda rng, V: {"xtc_probability": 1.0, "xtc_threshold": rng.randint(2, 30) / 100},
    "min_tokens_to_keep": lambda rng, V: {"min_tokens_to_keep": rng.randint(2, 6)},
}
BY_MASS = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "xtc_probability")
FILTERS = ("top_n_sigma", "top_k", *BY_MASS)
USUAL = ("top_k", "top_p", "min_p")
SECOND = ("xtc_threshold", "dynamic_temperature_exponent")  # says nothing on its own


def all_matter(row: Row, parameters: Parameters) -> bool:
    """Whether each number of a case has a part in the answer."""
    answer = support(row, parameters)
    return len(answer or ()) < row.size and all(
        support(row, {n: v for n, v in parameters.items() if n != name}) != answer
        for name in parameters
        if name not in SECOND and not (name == "temperature" and "dynamic_temperature_range" in parameters)
    )


def several_stay(row: Row, parameters: Parameters) -> bool:
    """Whether some tokens go, more than one stays, and the temperature has its part."""
    answer = support(row, parameters)
    cold = support(row, parameters | {"temperature": 1.0})
    return (
        answer != "error" and 1 < len(answer or ()) < row.size and (cold != answer or "temperature" not in parameters)
    )


def drawn(
    identity: str,
    comment: str,
    names: Iterable[str],
    sizes: Iterable[int],
    flags: str = "",
    suits: Callable[[Row, Parameters], bool] = all_matter,
) -> Case:
    """A case with random logits and numbers for the named options."""
    rng = random.Random(identity)
    sizes = list(sizes)
    for _ in range(5000):
        size = rng.choice(sizes)
        row = drawn_row(rng, size, rng.random() < 0.3)
        parameters: Parameters = {}
        for name in names:
            parameters |= VALUES[name](rng, size)
        if suits(row, parameters) and clear(row, parameters):
            return case(identity, comment, row, flags, **parameters)
    raise AssertionError(f"{identity}: no such case was found")


def swapped(first: str) -> Callable[[Row, Parameters], bool]:
    """Whether the answer is another where the first of two options comes last."""

    def suits(row: Row, parameters: Parameters) -> bool:
        late = {name: value for name, value in parameters.items() if name != first}
        if first == "temperature":
            return support(row, late) != support(row, parameters)
        left = reference.filter_logits(row, seed=0, **late)
        return support(left, {first: parameters[first]}) != support(row, parameters)

    return suits


def sure(identity: str, comment: str, logits: Any, flags: str = "", **parameters: Any) -> Case:
    """A case by hand that is as clear as the drawn ones."""
    assert clear(np.array(logits, np.float32), parameters), identity
    return case(identity, comment, logits, flags, **parameters)


LN = np.log([0.4, 0.3, 0.2, 0.1])
NOTHING = -INF


def level_1() -> dict[str, tuple[str, list[Case]]]:
    """Support sets."""
    few, some, many = (3, 4, 5, 6, 8), (12, 16, 33, 64), (200, 256, 300)
    groups: dict[str, tuple[str, list[Case]]] = {
        "temperature": (
            "A temperature alone removes nothing.",
            [
                sure(f"temperature.{name}", "Every token stays.", [1, 3, 0, 2], temperature=t)
                for name, t in [("one", 1.0), ("half", 0.5), ("two", 2.0), ("warm", 1.3)]
            ],
        ),
        "top_k": (
            "The k largest logits stay.",
            [
                sure("top_k.three-of-five", "Ids do not matter, logits do.", [1, 5, 3, 4, 2], top_k=3),
                sure("top_k.one", "The largest alone.", [-1, -5, 2, 0.5], top_k=1),
                sure("top_k.all-but-one", "All but the smallest.", [7, -2, 3, 3.5], top_k=3),
                sure("top_k.negative", "Logits may all be negative.", [-9, -7, -8, -6], top_k=2),
                sure("top_k.temperature", "No temperature changes top_k.", [1, 5, 3, 4], top_k=2, temperature=0.5),
            ],
        ),
        "top_p": (
            "In descending order, a token stays if the mass before it is less than p of the whole.",
            [
                sure("top_p.crossing", "The token that crosses p stays: 0.4 < 0.6.", LN, top_p=0.6),
                sure("top_p.first", "The first token always stays.", LN, top_p=0.05),
                sure("top_p.three", "0.7 < 0.85 < 0.9.", LN, top_p=0.85),
                sure("top_p.last", "0.9 < 0.95: all stay.", LN, top_p=0.95),
                sure("top_p.unsorted", "Masses 0.1, 0.4, 0.2, 0.3.", LN[[3, 0, 2, 1]], top_p=0.6),
                sure("top_p.shifted", "A constant added to all logits changes nothing.", LN + 50, top_p=0.6),
            ],
        ),
        "min_p": (
            "A token stays if its mass is at least min_p times that of the best one.",
            [
                sure("min_p.two", "0.3 / 0.4 reaches 0.6, 0.2 / 0.4 does not.", LN, min_p=0.6),
                sure("min_p.of-the-best", "0.2 is 0.5 of the best one's mass, not of the whole.", LN, min_p=0.45),
                sure("min_p.all", "0.1 / 0.4 reaches 0.2.", LN, min_p=0.2),
                sure("min_p.best", "The best one always stays.", LN, min_p=0.9),
            ],
        ),
        "typical_p": (
            "As top_p, in the order of how far a token's surprise, -ln of its share, is from the entropy.",
            [
                drawn(
                    f"typical_p.without-the-best-{n}",
                    "The most probable token is not typical.",
                    ["typical_p"],
                    few,
                    suits=lambda row, parameters: int(row.argmax()) not in (support(row, parameters) or ()),
                )
                for n in (1, 2)
            ],
        ),
        "top_n_sigma": (
            "A token stays if its logit is at most n standard deviations (dividing by their number) below the best.",
            [
                sure("top_n_sigma.one", "Mean 1, deviation 1.58.", [4, 1, 0.5, 0, -0.5], top_n_sigma=1.0),
                sure(
                    "top_n_sigma.cold", "The temperature has no part.", [3, 2, 1, 0], top_n_sigma=1.2, temperature=0.25
                ),
                sure("top_n_sigma.bans", "Banned tokens have no part.", [3, NOTHING, 2, 1, 0], top_n_sigma=1.2),
            ],
        ),
        "epsilon_cutoff": (
            "A token stays if its mass is at least epsilon of the whole; the best one always does.",
            [
                sure("epsilon_cutoff.three", "0.2 is enough, 0.1 is not.", LN, epsilon_cutoff=0.15),
                sure("epsilon_cutoff.none", "Where no token has enough, the best one stays.", LN, epsilon_cutoff=0.7),
            ],
        ),
        "eta_cutoff": (
            "As epsilon_cutoff, with min(eta, sqrt(eta) exp(-entropy)) for epsilon.",
            [
                sure("eta_cutoff.eta", "The entropy is 1.28: of 0.05 and 0.062 the former.", LN, eta_cutoff=0.05),
                sure("eta_cutoff.entropy", "Of 0.25 and 0.139 the latter.", LN, eta_cutoff=0.25),
            ],
        ),
        "xtc": (
            "Where two tokens or more have at least the threshold of the whole, all of those but the last go. The coin "
            "always falls here.",
            [
                sure("xtc.three-reach", "0.4 and 0.3 go.", LN, xtc_probability=1.0, xtc_threshold=0.15),
                sure("xtc.one-reaches", "Only one reaches: all stay.", LN, xtc_probability=1.0, xtc_threshold=0.35),
                sure("xtc.none-reaches", "None reaches: all stay.", LN, xtc_probability=1.0, xtc_threshold=0.45),
                sure("xtc.all-reach", "Only the last stays.", LN, xtc_probability=1.0, xtc_threshold=0.05),
            ],
        ),
        "min_tokens_to_keep": (
            "Every filter leaves at least so many tokens; xtc removes nothing where it would leave fewer.",
            [
                sure("min_tokens_to_keep.top_k", "Three, not one.", LN, top_k=1, min_tokens_to_keep=3),
                sure("min_tokens_to_keep.enough", "Three stay anyway.", LN, top_p=0.85, min_tokens_to_keep=2),
                *(
                    drawn(f"min_tokens_to_keep.{name}", "The floor decides.", [name, "min_tokens_to_keep"], (5, 6, 8))
                    for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
                ),
                sure(
                    "min_tokens_to_keep.xtc",
                    "xtc would leave one: it leaves all.",
                    LN,
                    xtc_probability=1.0,
                    xtc_threshold=0.05,
                    min_tokens_to_keep=2,
                ),
            ],
        ),
        "bans": (
            "A token whose logit is -inf, that is not `allowed`, or whose `logit_bias` is -inf is never drawn, and "
            "what the filters measure is measured without it.",
            [
                sure("bans.alone", "The others stay.", [1, NOTHING, 3, NOTHING]),
                sure("bans.top_k", "k counts what is not banned.", [NOTHING, 2, 1, NOTHING, 3, 0], top_k=2),
                sure("bans.top_k-all", "k is more than are not banned.", [NOTHING, 2, 1, NOTHING], top_k=3),
                sure("bans.top_p", "Of the whole of what is not banned.", [*LN[1:], NOTHING], top_p=0.6),
                sure("bans.min_p", "The best that is not banned.", [NOTHING, *LN[1:]], min_p=0.5),
                sure("bans.one-left", "One token is left.", [NOTHING, NOTHING, -4, NOTHING], top_p=0.3),
                sure("bans.allowed", "Not the best two.", [5, 4, 3, 2], allowed=[2, 3], top_k=3),
                sure("bans.allowed-top_p", "Masses are those of allowed tokens.", LN, allowed=[1, 2, 3], top_p=0.6),
                sure("bans.bias", "A bias comes before all else.", [1, 2, 3, 4], logit_bias=[4, 0, 0, 0], top_k=2),
                sure("bans.bias-out", "A bias of -inf bans.", [1, 2, 3, 4], logit_bias=[0, 0, 0, -INF], top_k=2),
            ],
        ),
        "dynamic_temperature": (
            "The temperature rises from t - range to t + range with the entropy's share of its largest, to a power.",
            [
                drawn(f"dynamic_temperature.{name}", "The range matters.", ["dynamic_temperature_range", name], few)
                for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff")
            ],
        ),
        "order": (
            "In the order temperature, top_n_sigma, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, xtc. "
            "Each case has an answer of its own for the other order of the two options that its id names.",
            [
                sure(
                    "order.temperature-top_p.small", "Last, it would leave two.", [3, 2, 1], temperature=0.5, top_p=0.8
                ),
                sure("order.top_k-top_p.small", "0.4 is 0.57 of what top_k left.", LN, top_k=2, top_p=0.55),
            ],
        ),
        "combinations": ("Several filters at once.", []),
    }
    for name in FILTERS:
        group = "xtc" if name == "xtc_probability" else name
        own = groups[group][1]
        own += [drawn(f"{group}.drawn-{n}", "Random logits.", [name], some) for n in range(1, 4)]
        own += [drawn(f"{group}.many", "Random logits.", [name], many)]
        if name in BY_MASS:
            own += [
                drawn(f"{group}.tempered-{n}", "The temperature matters.", ["temperature", name], some) for n in (1, 2)
            ]
    order = groups["order"][1]
    commute = {frozenset(pair) for pair in (("top_n_sigma", "min_p"), ("top_k", "min_p"), ("top_k", "top_n_sigma"))}
    pairs = [*(("temperature", name) for name in BY_MASS), *itertools.combinations(FILTERS, 2)]
    for first, second in pairs:
        if {first, second} in commute:
            continue
        identity = f"order.{first}-{second}".replace("xtc_probability", "xtc")
        order.append(drawn(identity, "The other order.", [first, second], few + some, "order", swapped(first)))
    for n in range(1, 41):
        identity = f"combinations.{n}"
        rng = random.Random(identity + ": names")
        names = sorted(rng.sample(FILTERS if n % 4 == 0 else USUAL, rng.choice([2, 2, 3])), key=FILTERS.index)
        heat = ["temperature"] if {*names} & {*BY_MASS} and rng.random() < 0.7 else []
        sizes = many if n % 8 == 0 else some
        groups["combinations"][1].append(drawn(identity, "Random logits.", [*heat, *names], sizes, "", several_stay))
    return groups


# Level 2: ties, boundaries, and numbers that are not ordinary ---------------------------------------------------------

TIED = [1, 2, 2, 0, 2]
TAILS = [0, -5, -10, -18]
BF16_TIES = [2.5, 3, 1, 2.5, 3, 2.5, 0.5, 2.5, 1, 3, 0.5, 2.5, -1, 1, 2.5, 0]


def equal(count: int) -> list[float]:
    """Equal logits: of 2^n tokens each has exactly 2^-n of the mass, in any arithmetic."""
    return [1.5] * count


def level_2() -> dict[str, tuple[str, list[Case]]]:
    """Ties, boundaries and errors."""
    above, below = math.nextafter(0.75, 1), math.nextafter(0.75, 0)
    almost = 1 - 2.0**-53
    long_tail = [0.0, *(-17.7 - n / 1024 for n in range(256))]
    stays = "The filter is off: every token stays, the rarest too."
    ties = [
        case("ties.top_k", "Of three equal logits two stay.", TIED, top_k=2),
        case("ties.top_k-one", "top_k=1 is argmax, the lowest id.", [1, 3, 3], top_k=1),
        case("ties.top_k-all-equal", "Three of eight.", equal(8), top_k=3),
        case("ties.top_k-inside", "The tie is not at the border.", [5, 3, 5, 1], top_k=3),
        case("ties.top_k-bfloat16", "bfloat16 logits tie often.", BF16_TIES, top_k=5),
        case("ties.top_k-zeros", "-0 equals 0.", [-0.0, 0.0, -0.0, -1], top_k=2),
        case("ties.top_k-bans", "Only what is not banned ties.", [-INF, 2, -INF, 2, 2], top_k=2),
        case("ties.top_k-temperature", "A temperature keeps ties.", TIED, top_k=2, temperature=0.7),
        case("ties.top_p", "0.5 < 0.6 < 0.75.", equal(4), top_p=0.6),
        case("ties.top_p-bfloat16", "The border is among equal logits.", BF16_TIES, top_p=0.62),
        case("ties.top_p-first", "One of the best.", [0, 2, 2, 2], top_p=0.1),
        case("ties.top_k-top_p", "Four of eight, then 0.6 of those.", equal(8), top_k=4, top_p=0.6),
        case("ties.top_p-min_p", "The best ones tie.", [2, 2, 0, 1], top_p=0.9, min_p=0.5),
        case("ties.typical_p", "All are equally typical.", equal(4), typical_p=0.6),
        case("ties.typical_p-pairs", "Equal logits are equally typical.", [2, 0, 2, 0, 2, 0], typical_p=0.5),
        case("ties.epsilon_cutoff", "None has enough; the best ones tie.", [2, 2, 0], epsilon_cutoff=0.9),
        case("ties.top_n_sigma", "The deviation is 0.", equal(4), top_n_sigma=1.0),
        case("ties.xtc", "Two reach, and tie: the first goes.", [2, 2, 0, 0], xtc_probability=1.0, xtc_threshold=0.2),
        case("ties.min_tokens", "The floor is among equal logits.", equal(4), top_p=0.1, min_tokens_to_keep=2),
        case("ties.min_tokens-min_p", "Equal to the best: all.", [2, 2, 2, 0], min_p=0.9, min_tokens_to_keep=2),
    ]
    boundaries = [
        case(f"boundaries.top_p-{k}-of-{n}", f"Before token {k} there is exactly p.", equal(n), top_p=k / n)
        for n, k in [(2, 1), (4, 1), (4, 2), (4, 3), (8, 5), (16, 8), (64, 48)]
    ]
    boundaries += [
        case("boundaries.top_p-256", "Sums of 2^-8 are exact.", equal(256), top_p=0.5),
        case("boundaries.top_p-bans", "Four are left.", [-INF, 1, 1, -INF, 1, 1], top_p=0.5),
        case("boundaries.top_p-temperature", "Equal at any temperature.", equal(4), top_p=0.5, temperature=0.7),
        case("boundaries.top_p-after-top_k", "Half of the four that stay.", equal(8), top_k=4, top_p=0.5),
        case("boundaries.top_p-certain", "The first token has all the mass.", [1e4, 0, -1e4], top_p=almost),
        case("boundaries.min_p-equal", "Equal to the best is enough.", equal(4), min_p=1.0),
        case("boundaries.min_p-one", "Only the best ones reach min_p=1.", [2, 1, 2, 0], min_p=1.0),
        case("boundaries.epsilon_cutoff", "Exactly epsilon is enough.", equal(4), epsilon_cutoff=0.25),
        case("boundaries.epsilon_cutoff-above", "Just more than all have.", equal(4), epsilon_cutoff=0.2578125),
        case("boundaries.typical_p", "Before the third there is exactly p.", equal(4), typical_p=0.5),
        case("boundaries.top_n_sigma", "Mean 0, deviation 1: -1 is at 1 - 2.", [1, -1], top_n_sigma=2.0),
        case("boundaries.top_n_sigma-inside", "-1 is below 1 - 1.75.", [1, -1], top_n_sigma=1.75),
        case("boundaries.xtc", "Exactly the threshold.", equal(4), xtc_probability=1.0, xtc_threshold=0.25),
        case("boundaries.xtc-half", "Two have half each.", [0, 0], xtc_probability=1.0, xtc_threshold=0.5),
        case("boundaries.min_tokens-all", "More than there are.", LN, top_k=1, min_tokens_to_keep=9),
    ]
    precision = [
        case("precision.top_p-above", "One step of float64 above three quarters.", equal(4), top_p=above),
        case("precision.top_p-below", "One step of float64 below three quarters.", equal(4), top_p=below),
        case("precision.top_p-almost-1", "0.75 < p.", equal(4), top_p=almost),
        case(
            "precision.top_p-tail",
            "The border is in a tail of 256 tokens of 2e-8 each: a running float32 sum from the best one stands still.",
            long_tail,
            "tail",
            top_p=0.999997,
        ),
        case("precision.top_k-neighbours", "Neighbours in float32.", [1, 1 + 2.0**-23, 1 + 2.0**-22], top_k=2),
        case("precision.top_k-subnormal", "The smallest numbers are not 0.", [0, 1e-45, -1e-45, -1], top_k=1),
        case(
            "precision.temperature-0", "Neighbours in float32.", [1, 1 + 2.0**-23, 1], "", "acceptable", temperature=0.0
        ),
    ]
    off = [
        case("off.temperature", "A temperature of 1 changes nothing.", TAILS, temperature=1.0),
        case("off.top_k-V", "All stay.", TAILS, top_k=4),
        case("off.top_k-more", "More than there are: all stay.", TAILS, top_k=5),
        case("off.top_k-huge", "The largest int32.", TAILS, top_k=2**31 - 1),
        *(
            case(f"off.{name}", stays, TAILS, **{name: value})
            for name, value in [
                ("top_p", 1.0),
                ("min_p", 0.0),
                ("typical_p", 1.0),
                ("top_n_sigma", INF),
                ("epsilon_cutoff", 0.0),
                ("eta_cutoff", 0.0),
                ("xtc_probability", 0.0),
                ("min_tokens_to_keep", 1),
            ]
        ),
        case("off.top_p-flat", stays, equal(300), top_p=1.0),
        case("off.all", stays, TAILS, temperature=1.0, top_k=4, top_p=1.0, min_p=0.0),
    ]
    zero = [
        case(f"zero.{name}", comment, logits, "", "acceptable", **parameters)
        for name, comment, logits, parameters in [
            ("temperature", "Argmax, or refused.", [1, 3, 2], {"temperature": 0.0}),
            ("temperature-ties", "Argmax takes the lowest id.", TIED, {"temperature": 0.0}),
            ("temperature-bans", "Of what is not banned.", [-INF, 1, 2, 2], {"temperature": 0.0}),
            ("temperature-top_k", "The best one is among the k.", [1, 3, 2], {"temperature": 0.0, "top_k": 2}),
            ("temperature-top_p", "The best one has all the mass.", [1, 3, 2], {"temperature": 0.0, "top_p": 0.9}),
            ("temperature-negative", "Refused, or argmax.", [1, 3, 2], {"temperature": -1.0}),
            ("top_k", "Refused, or off.", LN, {"top_k": 0}),
            ("top_k-negative", "Refused, or off.", LN, {"top_k": -1}),
            ("top_p", "Refused, the best one, or off.", LN, {"top_p": 0.0}),
            ("top_p-negative", "Refused, the best one, or off.", LN, {"top_p": -0.5}),
            ("top_p-above-1", "Refused, or off.", LN, {"top_p": 1.5}),
            ("min_p-negative", "Refused, or off.", LN, {"min_p": -0.5}),
            ("min_p-above-1", "Refused, or the best one, which alone always stays.", TIED, {"min_p": 1.5}),
            ("typical_p", "Refused, or the most typical one.", LN, {"typical_p": 0.0}),
            ("typical_p-above-1", "Refused, or off.", LN, {"typical_p": 1.5}),
            ("top_n_sigma", "Refused, or off.", LN, {"top_n_sigma": 0.0}),
            ("top_n_sigma-negative", "Refused, or off.", LN, {"top_n_sigma": -1.0}),
            ("epsilon_cutoff-negative", "Refused, or off.", LN, {"epsilon_cutoff": -0.5}),
            ("epsilon_cutoff-above-1", "Refused, or off.", LN, {"epsilon_cutoff": 1.5}),
            ("eta_cutoff-above-1", "Refused, or off.", LN, {"eta_cutoff": 1.5}),
            ("xtc_probability-negative", "Refused, or off.", LN, {"xtc_probability": -0.5, "xtc_threshold": 0.15}),
            ("xtc_probability-above-1", "Refused, or 1.", LN, {"xtc_probability": 1.5, "xtc_threshold": 0.15}),
            ("xtc_threshold-negative", "Refused, or 0.", LN, {"xtc_probability": 1.0, "xtc_threshold": -0.5}),
            ("xtc_threshold-above-1", "Refused, or off.", LN, {"xtc_probability": 1.0, "xtc_threshold": 1.5}),
            (
                "dynamic_temperature_exponent",
                "Refused, or the highest temperature whatever the entropy.",
                LN,
                {"temperature": 1.0, "dynamic_temperature_range": 0.5, "dynamic_temperature_exponent": 0.0},
            ),
            ("min_tokens_to_keep", "Refused, or 1.", LN, {"top_p": 0.05, "min_tokens_to_keep": 0}),
        ]
    ]
    tiny = "A tiny temperature shares the mass among the exact maxima; some libraries raise it, or take it for 0."
    extremes = [
        case("extremes.temperature-tiny", tiny, [-20, 3, 3, 2.99], "", "acceptable", temperature=1e-7),
        case("extremes.temperature-small", tiny, [-20, 3, 3, 2.99], "", "acceptable", temperature=5e-6),
        case("extremes.temperature-subnormal", tiny, [-20, 3, 3, 2.99], "", "acceptable", temperature=5e-324),
        case("extremes.temperature-huge", "All are as good as equal.", [1, 3, -INF, -30, 2], temperature=1e30),
        case(
            "extremes.temperature-huge-top_p", "All are as good as equal.", [1, 3, -30, 2], temperature=1e30, top_p=0.6
        ),
        case("extremes.logits-large", "exp would overflow.", LN + 1e4, top_p=0.6),
        case("extremes.logits-small", "exp would be 0 for all.", LN - 1e4, top_p=0.6),
        case("extremes.logits-float32", "Their difference overflows.", [-3e38, 3e38, 0], min_p=0.5),
        case("extremes.logits-float32-all", "All as small as can be.", [-3e38, -3e38, -INF], top_k=2),
        case("extremes.logits-beside-bans", "Far below, and not banned.", [-3e38, -INF, -3e38, -INF], top_k=3),
        *(
            case(f"extremes.one-token-{name}", "There is one token.", [-2], **{name: value})
            for name, value in [("top_k", 1), ("top_p", 0.1), ("min_p", 1.0), ("typical_p", 0.1), ("top_n_sigma", 0.5)]
        ),
        case("extremes.top_p-smallest", "The first token always stays.", LN, top_p=5e-324),
        case("extremes.hidden-nan", "What is not allowed may hold anything.", [NAN, 1, INF, 2], allowed=[1, 3]),
    ]
    errors = [
        case(f"errors.{name}", comment, logits, "", "invalid", **parameters)
        for name, comment, logits, parameters in [
            ("nan", "NaN among the logits.", [1, NAN, 2], {}),
            ("nan-first", "NaN before all else.", [NAN, 1, 2], {}),
            ("nan-top_k", "A filter does not hide NaN.", [3, NAN, 2, 1], {"top_k": 2}),
            ("nan-temperature-0", "Argmax does not hide NaN.", [3, NAN, 2], {"temperature": 0.0}),
            ("nan-many", "One NaN among many.", [*equal(150), NAN, *equal(149)], {}),
            ("infinity", "+inf among the logits.", [1, INF, 2], {}),
            ("infinity-twice", "inf - inf is NaN.", [INF, INF, 0], {"top_p": 0.5}),
            ("all-banned", "No token is left.", [-INF, -INF, -INF], {}),
            ("one-banned", "No token is left.", [-INF], {}),
            ("none-allowed", "No token is left.", [1, 2, 3], {"allowed": []}),
            ("allowed-outside", "There is no such token.", [1, 2, 3], {"allowed": [0, 3]}),
            ("bias-nan", "NaN is no bias.", [1, 2], {"logit_bias": [NAN, 0]}),
            ("bias-infinity", "+inf is no bias.", [1, 2], {"logit_bias": [INF, 0]}),
            ("no-tokens", "A vocabulary of none.", [], {}),
            ("temperature-nan", "NaN is no temperature.", LN, {"temperature": NAN}),
            ("temperature-infinity", "Infinity is no temperature.", LN, {"temperature": INF}),
            ("top_p-nan", "NaN is no share.", LN, {"top_p": NAN}),
            ("min_p-nan", "NaN is no share.", LN, {"min_p": NAN}),
            ("top_n_sigma-nan", "NaN is no number of deviations.", LN, {"top_n_sigma": NAN}),
        ]
    ]
    about = {
        "ties": ("Equal logits. Tokens are ordered by logit, and equals by id: natively the lowest ids stay.", ties),
        "boundaries": (
            "A token exactly on a boundary. Before a token that top_p keeps there is less mass than p; min_p, "
            "epsilon_cutoff and top_n_sigma keep what just reaches them.",
            boundaries,
        ),
        "precision": ("What float32 arithmetic gets wrong.", precision),
        "off": ("Numbers that switch a filter off.", off),
        "zero": ("Numbers that are read in different ways: each answer here will do.", zero),
        "extremes": ("The ends of the range.", extremes),
        "errors": ("What has to be refused: a sampler that returns a token here hides a fault upstream.", errors),
    }
    own = {"boundaries": "boundary", "extremes": "extreme", "errors": "error"}
    for name, (_, cases) in about.items():
        for one in cases:
            one["flags"] = [flag for flag in FLAGS if flag in {*one["flags"], own.get(name, name)}]
    return about


# Level 3: whole-numbered masses ---------------------------------------------------------------------------------------


def masses(identity: str, comment: str, logits: Any, flags: str = "", **parameters: Any) -> Case:
    """A case of level 3: the masses in hex, 0 for what was removed."""
    row = np.array(logits, np.float32)
    weights = reference.masses(row, seed=0, **parameters)
    return described(identity, comment, row, flags.split(), parameters) | {
        "masses": repeated(f"{weight:x}" for weight in weights.tolist())
    }


def level_3() -> dict[str, tuple[str, list[Case]]]:
    """Masses."""
    rows = {
        f"masses.drawn-{n}": drawn_row(random.Random(f"masses.drawn-{n}"), size, n > 4)
        for n, size in enumerate([5, 8, 16, 40, 128, 16, 64], 1)
    }
    heats = (1.0, 0.7, 1.3, 0.05, 20.0, 1 / 3, 0.8)
    steps = [-n / 3 for n in range(36)] + [-n for n in range(13, 45)]
    return {
        "exponential": (
            "mass = round(2^s exp((z - max z) / temperature)), s = min(44, 62 - ceil(log2 V)), in the float32 steps of "
            "docs/semantics.md.",
            [
                masses("masses.thirds", "A ladder of thirds, down to where the mass is 0.", steps, "tail"),
                masses("masses.equal", "Equal logits have 2^44 each.", equal(5), "ties"),
                *(
                    masses(identity, "Random logits.", row, temperature=heat)
                    for (identity, row), heat in zip(rows.items(), heats, strict=True)
                ),
                masses(
                    "masses.half-a-unit", "About half a unit: 1 or 0.", [0, *(-31 - n / 64 for n in range(20))], "tail"
                ),
                masses("masses.bans", "Banned: 0.", [1, -INF, 0, -INF]),
                masses("masses.signs", "-0 equals 0.", [-0.0, 0.0, 1e-45, -1e-45], "extreme"),
                masses("masses.huge", "Differences that overflow.", [3e38, -3e38, 2.9e38], "extreme"),
                masses("masses.steps", "Neighbours in float32.", [1 + n * 2.0**-23 for n in range(5)], "precision"),
                masses("masses.many", "s is 42 for so many tokens.", [0, -1, *[-3] * 2**20], "tail"),
                masses("masses.bias", "The bias is added in float32.", [1, 2, 3], logit_bias=[0.1, -0.2, -INF]),
                masses(
                    "masses.bias-too-low",
                    "Sums below float32's lowest number are that number, never bans.",
                    [-3e38, -3.2e38, -3e38],
                    "extreme",
                    logit_bias=[-3e38, -3e38, -INF],
                ),
                masses(
                    "masses.bias-lowest",
                    "As the lowest number itself.",
                    [-3e38, -3.4028235e38, -3e38],
                    "extreme",
                    logit_bias=[-1e38, 0.0, 1e37],
                    temperature=1e38,
                ),
            ],
        ),
        "temperature": (
            "The temperature enters as float32(1 / T), 1 / T in float64.",
            [
                masses("masses.cold", "Only the best is left.", [1, 1.5, 1.499], "extreme", temperature=1e-5),
                masses("masses.coldest", "The exact maxima share.", [1, 2, 2], "extreme ties", temperature=5e-324),
                masses("masses.zero", "Argmax: the lowest id has all.", [1, 2, 2], "zero ties", temperature=0.0),
                masses("masses.hot", "Nearly equal.", [1, 2, -40], "extreme", temperature=1e5),
                masses("masses.hottest", "Equal.", [1, 2, -40], "extreme", temperature=1e39),
                masses("masses.dynamic", "Rises with the entropy.", [2, 1, 0, -1], dynamic_temperature_range=0.5),
            ],
        ),
        "filters": (
            "What stays keeps its mass; where the best token goes, masses are measured anew.",
            [
                masses("masses.top_k", "Two stay.", [3, 1, 2, 0], top_k=2, temperature=0.7),
                masses("masses.top_p", "Two stay.", LN, top_p=0.6),
                masses("masses.typical_p", "The best one goes.", [3, 2, 1.9, 1.8, 1.7, 1.6], typical_p=0.5),
                masses("masses.xtc", "The best ones go.", LN, xtc_probability=1.0, xtc_threshold=0.15),
            ],
        ),
    }


# Level 4: the token ---------------------------------------------------------------------------------------------------


def draw(
    identity: str, comment: str, logits: Any, flags: str = "", *, seed: int, position: int, stream: int = 0, **more: Any
) -> Case:
    """A case of level 4. Natively row i of a batch draws from stream i: this is row `stream` of one of equal rows."""
    row = np.array(logits, np.float32)
    draws = {name: more.pop(name) for name in ("num_samples", "replacement") if name in more}
    batch = np.tile(row, (stream + 1, 1))
    tokens = reference.sample(batch, **{"num_samples": 1, **draws}, **more, seed=seed, position=position)[stream]
    source = {"seed": seed, "stream": stream, "position": position}
    without_tokens = described(identity, comment, row, flags.split(), more)
    return without_tokens | {name: f"{n:x}" for name, n in source.items()} | draws | {"tokens": tokens.tolist()}


def block(seed: int, stream: int, position: int, number: int) -> Case:
    """The four random words that a draw has."""
    source = {"seed": seed, "stream": stream, "position": position}
    found = reference.philox(seed, stream, position, number)
    return {
        "id": f"words.{seed:x}-{stream:x}-{position:x}-{number:x}",
        "comment": f"Philox4x64-10: key ({seed:#x}, {stream:#x}), counter ({position:#x}, {number}, 0, 0).",
        "flags": [],
        **{name: f"{n:x}" for name, n in source.items()},
        "draw": number,
        "result": "valid",
        "words": " ".join(f"{word:016x}" for word in found),
    }


def level_4() -> dict[str, tuple[str, list[Case]]]:
    """Tokens."""
    most = 2**64 - 1
    row = [1, 3, 2, 0, 2.5, -1, 0.5, 1.5]
    rare = [*[-20.723266] * 128, 0, *[-20.723266] * 128]  # 1e-9 each
    cut: Parameters = {"temperature": 0.8, "top_k": 6, "top_p": 0.9}
    coin: Parameters = {"xtc_probability": 0.5, "xtc_threshold": 0.15}
    # Where seed 2026 reaches into the tails of `rare`, found by trying.
    places = (10710182, 15921514, 20594903, 22110062)
    blocks = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (7, 3, 5, 2)]
    blocks += [(most, most, most, 0), (2**63, 0, 2**32, 0), (0x123456789ABCDEF, 1, 2**63, 3)]
    several: Parameters = {"seed": 11, "num_samples": 6}
    drawn_many = drawn_row(random.Random("draws.many"), 300, True)
    return {
        "words": (
            "Four random words of 64 bits for each (seed, stream, position, draw): Philox4x64-10, key (seed, stream), "
            "counter (position, draw, 0, 0). The first draws a token, the second is xtc's coin.",
            [block(*place) for place in blocks],
        ),
        "positions": (
            "r = floor(word * total / 2^64), total the sum of the masses that are left; the token is the first in id "
            "order at which the running sum exceeds r.",
            [draw(f"draws.plain-{n}", "All tokens.", row, seed=42, position=n) for n in range(12)]
            + [draw(f"draws.cut-{n}", "What filters leave.", row, seed=42, position=n, **cut) for n in range(12)],
        ),
        "seeds": (
            "Seeds and positions have 64 bits.",
            [
                draw(f"draws.seed-{n:x}", "Any seed.", row, seed=n, position=0)
                for n in (0, 1, 2, 3, 2**31, 2**32, 2**53 + 1, 2**63, most)
            ]
            + [
                draw(f"draws.position-{n:x}", "Any position.", row, seed=5, position=n)
                for n in (2**31, 2**32, 2**53 + 1, 2**63, most)
            ],
        ),
        "streams": (
            "With one seed for a batch, row i draws from stream i; row 0 draws what it would draw alone.",
            [draw(f"draws.row-{n}", f"Row {n}.", row, seed=42, position=0, stream=n) for n in range(8)],
        ),
        "rows": (
            "Other rows: many tokens, bans, ties, extremes.",
            [draw(f"draws.many-{n}", "Many tokens.", drawn_many, seed=n, position=n) for n in range(6)]
            + [draw(f"draws.equal-{n}", "Equal logits.", equal(100), "ties", seed=3, position=n) for n in range(4)]
            + [draw(f"draws.bans-{n}", "Two are left.", [-INF, 0, -INF, 0, -INF], seed=1, position=n) for n in range(4)]
            + [
                draw("draws.argmax", "No randomness.", TIED, "zero ties", seed=1, position=0, temperature=0.0),
                draw("draws.cold", "The maxima share.", TIED, "extreme ties", seed=1, position=0, temperature=1e-40),
                draw("draws.bias", "After a bias.", row, seed=1, position=2, logit_bias=[5, 0, 0, 5, 0, 0, 0, 0]),
                draw("draws.allowed", "Of those allowed.", row, seed=1, position=2, allowed=[0, 3, 5]),
            ],
        ),
        "coin": (
            "xtc's coin falls if the upper 53 bits of the second word, over 2^53, are below xtc_probability.",
            [draw(f"draws.coin-{n}", "It falls, or not.", LN, seed=8, position=n, **coin) for n in range(8)],
        ),
        "several": (
            "Draw n of a position has the word of counter (position, n, 0, 0). Without replacement a token that was "
            "drawn has mass 0 from then on.",
            [
                draw("draws.with-replacement", "Six draws.", row, position=0, **several),
                draw("draws.with-replacement-cut", "Six draws.", row, position=1, **several, **cut),
                draw("draws.without-replacement", "Six draws.", row, position=0, replacement=False, **several),
                draw(
                    "draws.without-replacement-all", "A permutation.", row[:6], position=2, replacement=False, **several
                ),
            ],
        ),
        "tails": (
            "256 tokens have 1e-9 each, one has the rest. A float32 softmax, or a float32 random number, never draws "
            "the others.",
            [
                draw(f"draws.tail-{place}", "A rare token.", rare, "tail precision", seed=2026, position=place)
                for place in places
            ]
            + [draw("draws.tail-not", "The token with the rest.", rare, "tail", seed=2026, position=0)],
        ),
    }


# Files ----------------------------------------------------------------------------------------------------------------

LEVELS: dict[str, tuple[str, Callable[[], dict[str, tuple[str, list[Case]]]]]] = {
    "support": ("Which tokens can be drawn, where no sensible arithmetic can get it wrong.", level_1),
    "boundaries": ("Ties, boundaries, numbers at the ends of their range, and errors.", level_2),
    "masses": ("The whole-numbered mass of every token.", level_3),
    "draws": ("The token for (seed, stream, position).", level_4),
}


def file(level: int) -> str:
    """One level as JSON, a case on each line."""
    about, groups = list(LEVELS.values())[level - 1]
    lines = []
    used: set[str] = set()
    for name, (says, cases) in groups().items():
        used.update(flag for one in cases for flag in one["flags"])
        body = ",\n".join(json.dumps(one) for one in cases)
        lines.append(f'{{"name": {json.dumps(name)}, "about": {json.dumps(says)}, "cases": [\n{body}\n]}}')
    legend = {flag: says for flag, says in FLAGS.items() if flag in used}
    head: dict[str, Any] = {"$schema": "schema.json", "version": VERSION, "level": level, "about": about}
    if level <= 2:
        head["dialects"] = [dialect or "native" for dialect in ANSWERS]
    head["flags"] = legend
    return json.dumps(head, indent=1)[:-2] + ',\n "groups": [\n' + ",\n".join(lines) + "\n]\n}\n"


def main() -> None:
    """Write all files."""
    for number, name in enumerate(LEVELS, 1):
        (FOLDER / f"{name}.json").write_text(file(number))


if __name__ == "__main__":
    main()
