"""Sampling's stages, one record each: all that Python knows of a filter beside its definition in `headway.reference`.

The kernel has a function of the same name in its own table. SamplingParams, the checks, the order of each dialect, the
command's flags and what `explain` says are read from these records; docs/architecture.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from typing import Any, Protocol

import numpy as np

from .checks import Check, Integers, Reals, token_ids
from .rows import Array

OR_NONE = "use None to switch it off"
NUMBER, NUMBER_OR_NONE = "ArrayLike", "ArrayLike | None"  # types, as options.py has them


@dataclass(frozen=True)
class Option:
    """One option of sampling.

    type, default: as a type checker and a reader see them.
    says: what it is, for SamplingParams.
    flag: what the help of the command says, "" where the command has no such flag. metavar: of the flag's value.
    off: the number that switches it off for a row, None where there is none.
    """

    name: str
    check: Check
    default: Any
    type: str
    says: str
    flag: str = ""
    metavar: str = "X"
    off: float | None = None


class Before(Protocol):
    """The tokens of a row that come into a stage: logits with their bias, and masses."""

    @property
    def z(self) -> Array: ...
    @property
    def mass(self) -> Array: ...
    @property
    def total(self) -> int: ...


class Seen(Protocol):
    """A stage of a row, as `explain` sees it.

    value, values: of the option that switches the stage on, and of all its options.
    found: what the kernel worked out in it, which `Row::found` says for each.
    floor: how many tokens it leaves at least. spared: how many tokens xtc never takes. temperature: that of the masses.
    """

    @property
    def before(self) -> Before: ...
    @property
    def value(self) -> float: ...
    @property
    def values(self) -> Mapping[str, float]: ...
    @property
    def found(self) -> float: ...
    @property
    def floor(self) -> int: ...
    @property
    def spared(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    def earlier(self, place: int) -> Array:
        """Tell which tokens come before this one in the stage's order, (n,) bool."""
        ...


Judgement = tuple[str, Fraction, Fraction]  # what the stage measures of a token, how much that is, and the limit


@dataclass(frozen=True)
class Stage:
    """One stage.

    name: of the option that switches it on, and in the kernel's table.
    options: its own; the first switches it on.
    numbers: the options that the kernel takes, in its order.
    judge: how a token that the stage removed fell short; None for a stage that removes none, but measures masses anew.
    note: what else there is to say of a row.
    distance: the numbers (n,) that its order goes by, lowest first; None where that is the order of logits.
    takes_best: whether it removes from the best token on, not from the last.
    equal: what `Step.equal` is in headway's own dialect.
    """

    name: str
    options: tuple[Option, ...]
    numbers: tuple[str, ...]
    judge: Callable[[Seen, int], Judgement] | None = None
    note: Callable[[Seen], str] = lambda seen: ""
    distance: Callable[[Seen], Array] | None = None
    takes_best: bool = False
    equal: bool = False


def number(x: float) -> str:
    """Write a number in few characters; what is not 1 does not look like it."""
    if float(x).is_integer() and abs(x) < 1e15:
        return str(int(x))
    text = f"{x:.4g}"
    return f"{x:.7g}" if text == "1" and x != 1 else text


# The filters ---------------------------------------------------------------------------------------------------------

_PROBABILITY = Reals("a number in [0, 1]", OR_NONE, lambda p: (p >= 0) & (p <= 1))
_PROBABILITY_ABOVE_0 = Reals("a number in (0, 1]", OR_NONE, lambda p: (p > 0) & (p <= 1))

_TEMPERATURE = Option(
    "temperature",
    Reals("a finite number >= 0", "0 is argmax", lambda t: (t >= 0) & (t < inf), optional=False),
    1.0,
    NUMBER,
    "finite, >= 0. Logits are divided by it. 0 is argmax, the lowest id among equal logits.",
    "divide the logits by T; 0 always takes the likeliest token",
    "T",
    off=1.0,
)
_GREEDY = Stage("greedy", (_TEMPERATURE,), ("temperature",))
_TEMPERATURE_STAGE = Stage(
    "temperature",
    (
        _TEMPERATURE,
        Option(
            "dynamic_temperature_range",
            Reals("a finite number >= 0", OR_NONE, lambda r: (r >= 0) & (r < inf)),
            None,
            NUMBER_OR_NONE,
            "the temperature goes from temperature - range to temperature + range with the entropy.",
            "let the temperature rise with the entropy, from T - X to T + X",
            off=0.0,
        ),
        Option(
            "dynamic_temperature_exponent",
            Reals("a finite number > 0", "1 is linear", lambda e: (e > 0) & (e < inf), optional=False),
            1.0,
            NUMBER,
            "of the entropy as a share of the largest possible, by which the temperature rises; 1 unless given.",
            "the exponent of the entropy as a share of the largest, by which the temperature rises",
        ),
    ),
    ("temperature", "dynamic_temperature_range", "dynamic_temperature_exponent"),
    note=lambda seen: f"dynamic: {number(seen.found)}" if seen.values.get("dynamic_temperature_range") else "",
)


def _far_below(seen: Seen, place: int) -> Judgement:
    below = float(seen.before.z.max()) - float(seen.before.z[place])
    return "its distance from the best logit", Fraction(below), Fraction(seen.value * seen.found)


_TOP_N_SIGMA = Stage(
    "top_n_sigma",
    (
        Option(
            "top_n_sigma",
            Reals("a number > 0", "use None or infinity to switch it off", lambda n: n > 0),
            None,
            NUMBER_OR_NONE,
            "above 0. Keeps logits up to n standard deviations below the best one (Tang et al., 2024).",
            "keep logits up to N standard deviations below the best",
            "N",
            off=inf,
        ),
    ),
    ("top_n_sigma",),
    judge=_far_below,
    note=lambda seen: f"the standard deviation is {number(seen.found)}",
)


def _rank(seen: Seen, place: int) -> Judgement:
    rank = int(np.count_nonzero(seen.earlier(place))) + 1
    return "its rank", Fraction(rank), Fraction(max(int(seen.value), seen.floor))


_TOP_K = Stage(
    "top_k",
    (
        Option(
            "top_k",
            Integers("an integer >= 1", OR_NONE, 1, np.int64, clip=True),
            None,
            NUMBER_OR_NONE,
            "at least 1. Keeps the k best tokens: logit descending, id ascending (Fan et al., 2018).",
            "keep the K likeliest tokens",
            "K",
            off=inf,
        ),
    ),
    ("top_k",),
    judge=_rank,
)


def _mass_before(what: str) -> Callable[[Seen, int], Judgement]:
    def judge(seen: Seen, place: int) -> Judgement:
        before = int(seen.before.mass @ seen.earlier(place))
        return what, Fraction(before, seen.before.total), Fraction(seen.value)

    return judge


_TOP_P = Stage(
    "top_p",
    (
        Option(
            "top_p",
            _PROBABILITY_ABOVE_0,
            None,
            NUMBER_OR_NONE,
            "in (0, 1]. Keeps a token iff the mass strictly before it is below p (Holtzman et al., 2020); 1 is off.",
            "keep the likeliest tokens that reach the mass P; 1 is off",
            "P",
            off=1.0,
        ),
    ),
    ("top_p",),
    judge=_mass_before("the mass before it"),
)


def _of_best(seen: Seen, place: int) -> Judgement:
    mass = seen.before.mass
    return "its share of the best one's mass", Fraction(int(mass[place]), int(mass.max())), Fraction(seen.value)


_MIN_P = Stage(
    "min_p",
    (
        Option(
            "min_p",
            _PROBABILITY,
            None,
            NUMBER_OR_NONE,
            "in [0, 1]. Keeps a token iff it has at least min_p times the best one's mass (Nguyen et al., 2024).",
            "keep tokens of at least P times the highest mass",
            "P",
            off=0.0,
        ),
    ),
    ("min_p",),
    judge=_of_best,
)


def _distance_from_entropy(seen: Seen) -> Array:
    """Return |x - mean x| in float32, as the kernel computes it: x is (z - max z) / temperature, from -40 on."""
    info, z = np.finfo(np.float32), seen.before.z
    inverse = min(1.0 / seen.temperature, float(info.max)) if seen.temperature else float(info.max)
    with np.errstate(over="ignore", under="ignore"):
        below = np.maximum(z - z.max(), info.min)
        x = np.maximum(below * np.float32(inverse if inverse >= info.tiny else 0.0), np.float32(-40))
    distance: Array = np.abs(x - np.float32(seen.found))
    return distance


_TYPICAL_P = Stage(
    "typical_p",
    (
        Option(
            "typical_p",
            _PROBABILITY_ABOVE_0,
            None,
            NUMBER_OR_NONE,
            "in (0, 1]. As top_p, in the order of how far surprise is from the entropy (Meister et al., 2022).",
            "keep the tokens whose surprise is nearest to the entropy, up to the mass P",
            "P",
            off=1.0,
        ),
    ),
    ("typical_p",),
    judge=_mass_before("the mass before it in order of typicality"),
    distance=_distance_from_entropy,
)


def _probability(limit: Callable[[Seen], Fraction]) -> Callable[[Seen, int], Judgement]:
    def judge(seen: Seen, place: int) -> Judgement:
        return "its probability", Fraction(int(seen.before.mass[place]), seen.before.total), limit(seen)

    return judge


_EPSILON_CUTOFF = Stage(
    "epsilon_cutoff",
    (
        Option(
            "epsilon_cutoff",
            _PROBABILITY,
            None,
            NUMBER_OR_NONE,
            "in [0, 1]. Keeps a token iff it has at least this share of the mass (Hewitt et al., 2022).",
            "keep tokens of at least this probability",
            off=0.0,
        ),
    ),
    ("epsilon_cutoff",),
    judge=_probability(lambda seen: Fraction(seen.value)),
)
_ETA_CUTOFF = Stage(
    "eta_cutoff",
    (
        Option(
            "eta_cutoff",
            _PROBABILITY,
            None,
            NUMBER_OR_NONE,
            "in [0, 1]. The same with min(eta, sqrt(eta) exp(-entropy)) as the share.",
            "keep tokens of at least this probability, or of sqrt(X) exp(-entropy) where that is lower",
            off=0.0,
        ),
    ),
    ("eta_cutoff",),
    judge=_probability(lambda seen: Fraction(int(seen.found), seen.before.total)),
    note=lambda seen: f"the least probability is {number(int(seen.found) / seen.before.total)}",
)


def _coin(seen: Seen) -> str:
    fell = "below" if seen.found < seen.value else "not below"
    threshold = number(seen.values["xtc_threshold"])
    spared = f"; spares {seen.spared} token{'' if seen.spared == 1 else 's'}" if seen.spared else ""
    return f"coin {seen.found:.4f} is {fell} {number(seen.value)}; threshold {threshold}{spared}"


_XTC = Stage(
    "xtc_probability",
    (
        Option(
            "xtc_probability",
            _PROBABILITY,
            None,
            NUMBER_OR_NONE,
            "in [0, 1]. With this probability removes all but the last of the tokens that reach the threshold.",
            "with this probability remove the tokens that reach the threshold, except the last of them",
            off=0.0,
        ),
        Option(
            "xtc_threshold",
            Reals("a number in [0, 1]", "0.1 is usual", lambda p: (p >= 0) & (p <= 1), optional=False),
            0.1,
            NUMBER,
            "in [0, 1], a share of the mass; 0.1 unless given.",
            "the probability from which xtc counts a token",
        ),
        Option(
            "xtc_special_tokens",
            token_ids,
            None,
            "Any",
            "ids that xtc never removes, such as those of the end and of a newline: one list for all rows.",
        ),
    ),
    ("xtc_probability", "xtc_threshold"),
    judge=_probability(lambda seen: Fraction(seen.values["xtc_threshold"])),
    note=_coin,
    takes_best=True,
    equal=True,
)

# In the order of headway's own dialect, which SamplingParams lists them in.
STAGES = {
    stage.name: stage
    for stage in (
        _GREEDY,
        _TEMPERATURE_STAGE,
        _TOP_N_SIGMA,
        _TOP_K,
        _TOP_P,
        _MIN_P,
        _TYPICAL_P,
        _EPSILON_CUTOFF,
        _ETA_CUTOFF,
        _XTC,
    )
}
OF_STAGES = tuple({option.name: option for stage in STAGES.values() for option in stage.options}.values())
OFF: dict[str, float] = {option.name: option.off for option in OF_STAGES if option.off is not None}
