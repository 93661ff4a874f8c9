"""Bad input to the sampling side: every function, every kind of badness, every shape of a batch.

Each is a ValueError or TypeError whose message begins with the argument, names the row or the place that is to blame,
and says what came. Strange input that is not bad gives what plain input gives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from oracles import same_bits

import headway as hw
from headway._sampling.checks import Integers, Reals
from headway._sampling.settings import OPTIONS
from headway._sampling.stages import OFF

NAN, INF = np.nan, np.inf
V = 5
SHAPES = [(), (3,), (2, 2)]
TYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
Function = Callable[..., Any]


def verify(logits: Any, **options: Any) -> Any:
    """Speculative sampling of no tokens: the draw after them looks at every row."""
    return hw.verify_draft(
        np.expand_dims(logits, -2), None, np.zeros((*np.shape(logits)[:-1], 0), int), seed=1, **options
    )


FUNCTIONS: dict[str, Function] = {
    "sample": hw.sample,
    "probabilities": hw.probabilities,
    "filter_logits": hw.filter_logits,
    "logprobs": lambda logits, **options: hw.logprobs(logits, top=1, processed=True, **options),
    "verify_draft": verify,
    "explain": hw.explain,
}
CASES = [
    pytest.param(name, function, shape, id=f"{name}-{shape}")
    for name, function in FUNCTIONS.items()
    for shape in SHAPES
    if name != "explain" or not shape
]
each = pytest.mark.parametrize(("name", "function", "shape"), CASES)
each_batch = pytest.mark.parametrize(("name", "function", "shape"), [case for case in CASES if case.values[2]])

GOOD: dict[str, Any] = {
    option.name: 2 if isinstance(option.check, Integers) else 0.5
    for option in OPTIONS
    if isinstance(option.check, (Integers, Reals)) and option.name not in ("seed", "position", "uniform")
} | {"xtc_probability": 1.0}
DRAWS = {"seed": 3, "position": 1, "uniform": 0.5}
PENALTIES: dict[str, Any] = {
    "repetition": 1.1,
    "frequency": 0.1,
    "presence": 0.1,
    "repetition_window": 3,
    "frequency_window": 3,
    "dry_window": 3,
    "window": 3,
    "dry_multiplier": 0.5,
    "dry_base": 1.5,
    "dry_allowed_length": 2,
}
NO_NUMBERS = ["1", None, True, np.True_, 1j, b"1", {}, object(), np.datetime64(1, "s"), np.array("1"), np.array(None)]
NEVER_NONE = {"temperature", "dynamic_temperature_exponent", "xtc_threshold", "min_tokens_to_keep"}


def refused(argument: str, call: Callable[[], Any], says: str = "") -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) in (ValueError, TypeError, hw.RowError)
    assert message.startswith(f"{argument}: "), message
    assert says in message, message
    assert "\n" not in message
    assert len(message) < 500


def rows(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((*shape, V))


def last(shape: tuple[int, ...], name: str = "") -> tuple[tuple[int, ...], str]:
    """Return the last row, and how messages name it; verify_draft's have the place in the draft too."""
    at = tuple(n - 1 for n in shape)
    named = (*at, 0) if name == "verify_draft" else at
    return at, "" if not named else f" in row {named[0] if len(named) == 1 else named}"


def place(at: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, at))}]" if at else ""


# Logits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@each
def test_a_bad_logit_and_a_banned_row(name: str, function: Function, shape: tuple[int, ...], dtype: Any) -> None:
    argument, (at, where) = "target_logits" if name == "verify_draft" else "logits", last(shape, name)
    for bad, says in (
        (NAN, "got NaN at token 2"),
        (-NAN, "got NaN"),
        (INF, "got +inf at token 2"),
        (1e39, "at token 2"),
    ):
        if bad != 1e39 or dtype is np.float64:
            logits = rows(shape).astype(dtype)
            logits[(*at, 2)] = bad
            refused(argument, lambda logits=logits: function(logits), says)
            refused(argument, lambda logits=logits: function(logits), where)
    logits = rows(shape).astype(dtype)
    logits[at] = -INF
    refused(argument, lambda: function(logits), f"at least one token that is not banned{where}, got none")


@each
def test_what_is_no_array_of_logits(name: str, function: Function, shape: tuple[int, ...]) -> None:
    argument, logits = "target_logits" if name == "verify_draft" else "logits", rows(shape)
    arrays = [logits > 0, logits + 0j, logits.astype(object), logits.astype(str), logits.astype(np.longdouble)]
    if np.longdouble is np.float64:
        del arrays[-1]
    for array in arrays:
        refused(argument, lambda array=array: function(array))
    refused(argument, lambda: function(np.zeros((*shape, 0))), "at least one token")
    if name != "verify_draft":  # its helper here would see them first
        for value in ("abc", b"abc", None, {}, 1.0, np.ma.array(logits), [[1.0], [1.0, 2.0]], object()):
            refused(argument, lambda value=value: function(value))


# Options --------------------------------------------------------------------------------------------------------------


@each
def test_numbers_that_are_none(name: str, function: Function, shape: tuple[int, ...]) -> None:
    logits = rows(shape)
    for option in GOOD:
        bad = [*NO_NUMBERS, -1.5, -(2**70), NAN, -INF, [[0.5], [0.5, 0.5]], np.ma.array([0.5]), np.longdouble("nan")]
        bad += [] if OFF.get(option) == INF and isinstance(GOOD[option], float) else [INF]
        for value in bad:
            if value is not None or option in NEVER_NONE:
                refused_here_or_there(option, lambda option=option, value=value: function(logits, **{option: value}))


def refused_here_or_there(option: str, call: Callable[[], Any]) -> None:
    """An error of a single value, or of the first of a list."""
    with pytest.raises((ValueError, TypeError), match=rf"^{option}(\[0(, 0)?\])?: expected "):
        call()


@each_batch
def test_a_bad_number_of_one_row(name: str, function: Function, shape: tuple[int, ...]) -> None:
    logits, (at, _) = rows(shape), last(shape)
    options = GOOD | (DRAWS if name == "sample" else {"seed": 3, "position": 1} if name == "verify_draft" else {})
    for option, good in options.items():
        numbers = np.full(shape, good, object)
        for bad in (-1.5, NAN, "1", None, True, [1.0]):
            numbers[at] = bad
            refused(f"{option}{place(at)}", partial(call_with, function, logits, option, numbers.tolist()))
        if isinstance(good, float):
            array = np.full(shape, good)
            array[at] = -1.5
            refused(f"{option}{place(at)}", partial(call_with, function, logits, option, array), "got -1.5")


def call_with(function: Function, logits: np.ndarray, option: str, value: Any) -> Any:
    options = {option: value}
    if function is verify and option == "seed":
        return hw.verify_draft(logits[..., None, :], None, np.zeros((*logits.shape[:-1], 0), int), **options)
    return function(logits, **options)


@each
def test_numbers_for_other_rows(name: str, function: Function, shape: tuple[int, ...]) -> None:
    """Also of an option that no stage asks for, such as a threshold of xtc without its probability."""
    logits = rows(shape)
    for option, good in (GOOD | (DRAWS if name == "sample" else {})).items():
        for other in ((*shape[:-1], 7), (2, *shape, 1)):
            refused(
                option, lambda option=option, good=good, other=other: function(logits, **{option: np.full(other, good)})
            )


@each
def test_masks(name: str, function: Function, shape: tuple[int, ...]) -> None:
    logits, (at, where) = rows(shape), last(shape, name)
    mask = np.ones((*shape, V), bool)
    mask[at] = False
    refused("allowed", lambda: function(logits, **for_places(name, allowed=mask)), where)
    refused("allowed", lambda: function(logits, allowed=np.zeros(1, np.int32)), "got none")
    bad = [np.ones(V + 1, bool), np.ones((7, V), bool), np.ones(2, np.int32), np.ones((7, 1), np.int32), np.ones(V)]
    bad += [np.ones(V, np.int8), np.array(True), np.array([1], np.uint64), np.zeros(0, bool), np.ones((1, 1), np.int64)]
    bad += [[V], [-1], [0.5], [[0]], "ab", ["a"], {0: True}, [2**70], {99}, {"a", 1}, 3, True, [0, None], object()]
    for allowed in bad:
        refused("allowed", lambda allowed=allowed: function(logits, allowed=allowed))
    refused("allowed", lambda: function(logits, allowed=[]), "got none")


def for_places(name: str, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {option: array[..., None, :] if name == "verify_draft" else array for option, array in arrays.items()}


@each
def test_biases(name: str, function: Function, shape: tuple[int, ...]) -> None:
    logits, (at, where) = rows(shape), last(shape, name)
    for bad in (NAN, INF, 1e39):
        bias = np.zeros((*shape, V))
        bias[(*at, 1)] = bad
        there = place((*at, 0, 1) if name == "verify_draft" else (*at, 1))
        refused(f"logit_bias{there}", lambda bias=bias: function(logits, **for_places(name, logit_bias=bias)))
        refused("logit_bias[1]", lambda bad=bad: function(logits, logit_bias={1: bad}))
    bias = np.zeros((*shape, V))
    bias[at] = -INF
    refused("logit_bias", lambda: function(logits, **for_places(name, logit_bias=bias)), where)
    bad_ones = [
        np.ones(V + 1),
        np.ones((7, V)),
        np.ones(V, bool),
        np.ones(V) * 1j,
        1.0,
        [1.0],
        [[1.0], [1.0, 2.0]],
        "ab",
        {1},
    ]
    bad_ones += [{V: 1.0}, {-1: 1.0}, {0: "x"}, {0: None}, {0: True}, {0: [1.0, 2.0]}, {0: 10**400}]
    for value in bad_ones:
        refused("logit_bias", lambda value=value: function(logits, logit_bias=value))
    for key in ("a", 0.5, True, 2**70, (1,)):
        with pytest.raises(ValueError if key == 2**70 else TypeError, match=r"^logit_bias(\[\d\])?: expected"):
            function(logits, logit_bias={key: 1.0})


@each
def test_lists_of_spared_tokens(name: str, function: Function, shape: tuple[int, ...]) -> None:
    """Bad ones are errors where xtc is off too; a list outside of the vocabulary is one where it meets the logits."""
    logits = rows(shape)
    for more in ({}, {"xtc_probability": 1.0}):
        bad = ["ab", {0: 1}, 3, True, 0.5, [0.5], [True], [None], ["a"], [[0]], np.zeros((1, 1), int), object(), b"1"]
        bad += [np.zeros(2), np.ones(2, bool), np.ma.array([1]), [[0], [0, 1]], {1, "a"}, np.array([1], "m8[s]")]
        for value in [*bad, [-1], [2**70]]:
            for call in (partial(function, logits), hw.SamplingParams):
                with pytest.raises((ValueError, TypeError), match=r"^xtc_special_tokens(\[\d(, \d)?\])?: expected "):
                    call(xtc_special_tokens=value, **more)
        for value in ([V], {0, V}, np.array([0, 2**40])):
            refused(
                "xtc_special_tokens", partial(function, logits, xtc_special_tokens=value, **more), f"from 0 to {V - 1}"
            )
    refused("xtc_special_tokens", lambda: hw.Sampler(V).admit(hw.SamplingParams(xtc_special_tokens=[V])), f"got {V}")


@each
def test_words_and_names(name: str, function: Function, shape: tuple[int, ...]) -> None:
    logits = rows(shape)
    for option in ("ties", "nucleus", "dialect"):
        for value in (1, "x", ["hf"], b"hf", {}, True, *([] if option == "dialect" else [None])):
            refused(option, lambda option=option, value=value: function(logits, **{option: value}))
    refused("params", lambda: function(logits, params={"top_k": 1}))
    refused("topk", lambda: function(logits, topk=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_draws(shape: tuple[int, ...]) -> None:
    logits, (at, where) = rows(shape), last(shape)
    for value in (0, -1, 1.5, "1", True, NAN, [1], 2**70):
        refused("num_samples", lambda value=value: hw.sample(logits, num_samples=value))
    for value in (None, 1, "x", [True]):
        refused("replacement", lambda value=value: hw.sample(logits, num_samples=2, replacement=value))
    logits[(*at, slice(1, None))] = -INF
    refused(
        "num_samples",
        lambda: hw.sample(logits, num_samples=2, replacement=False),
        f"at most 1 without replacement{where}",
    )
    for seed in (-1, 2**64, 1.5, "1", NAN, True, [[1], [2, 3]], 2**70, np.zeros(9, int)):
        with pytest.raises(ValueError, match=r"^(seed|position)(\[0\])?: expected"):
            hw.sample(logits, seed=seed)
        with pytest.raises(ValueError, match=r"^position(\[0\])?: expected"):
            hw.sample(logits, position=seed)


def test_lists_nested_too_deeply_are_no_ragged_ones() -> None:
    nested: Any = [0, 1]
    for _ in range(40):
        nested = [nested]
    with pytest.raises(ValueError, match=r"^allowed: expected at most 32 axes, got lists nested more deeply$"):
        hw.sample([1.0, 2.0], allowed=nested)


# Penalties and tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_histories(shape: tuple[int, ...]) -> None:
    logits, (at, where) = rows(shape), last(shape)
    for bad in (V, -1, 2**40):
        tokens = np.zeros((*shape, 4), int)
        tokens[(*at, 2)] = bad
        for history in (tokens, tokens.tolist()):
            refused(
                "token_ids",
                lambda history=history: hw.penalize(logits, history, presence=1),
                f"got {bad} at 2{where}; say how many count with lengths where rows are padded, or leave such ids out",
            )
        refused("tokens", lambda tokens=tokens: hw.logprobs(logits, tokens), f"got {bad}{where}")
    good = np.zeros((*shape, 4), int)
    bad_ones = [
        good * 0.5,
        good == 0,
        good.astype(object),
        np.ma.array(good),
        "abc",
        {},
        {1},
        [2**70],
        [None],
        [[[[1]]]],
    ]
    for value in [*bad_ones, 3, None, np.zeros((7, *shape, 2), int)]:
        refused_somewhere("token_ids", lambda value=value: hw.penalize(logits, value))
    for value in [*bad_ones, np.zeros((7, *shape, 2), int)]:
        refused("tokens", lambda value=value: hw.logprobs(logits, value))
    for bad in (5, -1):
        lengths = np.full(shape, 1)
        lengths[at] = bad
        refused(
            "lengths",
            lambda lengths=lengths: hw.penalize(logits, good, lengths=lengths),
            f"{where}, got {bad}",
        )
    for value in (1.5, NAN, "1", True, 2**70, np.ones(9, int), None if shape else [1]):
        if value is not None:
            refused("lengths", lambda value=value: hw.penalize(logits, good, lengths=value))
    for value in ([-1], [V], [0.5], "a", None, {}, [2**70], [True], {"a", 1}):
        refused("dry_breakers", lambda value=value: hw.penalize(logits, good, dry_multiplier=1, dry_breakers=value))


def refused_somewhere(argument: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}(\[\d\])*: expected "):
        call()


@pytest.mark.parametrize("shape", SHAPES)
def test_penalties(shape: tuple[int, ...]) -> None:
    logits, (at, _) = rows(shape), last(shape)
    tokens = np.zeros((*shape, 4), int)
    for name, good in PENALTIES.items():
        for value in [v for v in NO_NUMBERS if v is not None] + [NAN, -INF, INF, [[0.5], [0.5, 0.5]]]:
            refused_here_or_there(name, lambda name=name, value=value: hw.penalize(logits, tokens, **{name: value}))
            refused_here_or_there(name, lambda name=name, value=value: hw.Sampler(V).admit(**{name: value}))
        refused(
            name, lambda name=name, good=good: hw.penalize(logits, tokens, **{name: np.full((*shape[:-1], 7), good)})
        )
        for bad in (-1e300, NAN, "1", None, True):
            numbers = np.full(shape, good, object)
            numbers[at] = bad
            if shape:
                refused(
                    f"{name}{place(at)}", lambda name=name, n=numbers: hw.penalize(logits, tokens, **{name: n.tolist()})
                )


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_drafts(shape: tuple[int, ...]) -> None:
    target, draft, tokens = np.zeros((*shape, 3, V)), np.zeros((*shape, 2, V)), np.zeros((*shape, 2), int)
    at = (*last(shape)[0], 0)

    def verified(**changes: Any) -> Any:
        call = {"target_logits": target, "draft_logits": draft, "draft_tokens": tokens, "seed": 1, **changes}
        return hw.verify_draft(**call)

    for bad in (NAN, INF, 1e39, -INF):
        logits = draft.copy()
        logits[at] = bad
        refused("draft_logits", lambda logits=logits: verified(draft_logits=logits), f"in row {at}")
    for bad in (-1, V, 2**40):
        ids = tokens.copy()
        ids[at] = bad
        refused("draft_tokens", lambda ids=ids: verified(draft_tokens=ids), f"got {bad} in row {at}")
    for value in (tokens * 0.5, tokens == 0, tokens[..., :1], None, "ab", np.ma.array(tokens), [[0], [0, 1]], 3):
        refused("draft_tokens", lambda value=value: verified(draft_tokens=value))
    for value in (target, draft > 0, draft * 1j, draft.astype(object), "ab", np.ma.array(draft), 1.0, draft[..., :0]):
        refused("draft_logits", lambda value=value: verified(draft_logits=value))
    for value in ({}, 3, "x"):
        refused("draft_params", lambda value=value: verified(draft_params=value), "SamplingParams")
    for name in ("seed", "position", "temperature"):
        refused(name, lambda name=name: verified(**{name: np.ones(9, int)}))


# The sampler ----------------------------------------------------------------------------------------------------------


def test_steps_that_change_nothing() -> None:
    """A bad row of a step, with penalties and without, in one group and in several; the next step is that of before."""
    for penalties in ({}, {"presence": 0.1}, {"dry_multiplier": 1.0, "prompt_tokens": [1, 2, 1, 2]}):
        for words in ({}, {"ties": "keep"}):
            sampler, twin = hw.Sampler(V), hw.Sampler(V)
            for one in (sampler, twin):
                for i in range(3):
                    one.admit(hw.SamplingParams(**(words if i == 1 else {})), seed=i, **penalties)
            for bad in (NAN, INF, 1e39, -INF):
                logits = rows((3,))
                logits[2, 2 if bad != -INF else slice(None)] = bad
                refused("logits", lambda s=sampler, logits=logits: s.step(logits), " in row 2")
            for value in (
                rows((2,)),
                rows(()),
                rows((3,)) > 0,
                np.ma.array(rows((3,))),
                "a",
                None,
                [[1.0], [1.0, 2.0]],
            ):
                refused("logits", lambda s=sampler, value=value: s.step(value))
            assert sampler.step(rows((3,))).tolist() == twin.step(rows((3,))).tolist()


def test_bad_admissions_and_handles() -> None:
    for value in (0, -1, 1.5, "1", None, True, NAN, 2**70, [5]):
        refused("vocabulary", lambda value=value: hw.Sampler(value))
    sampler = hw.Sampler(V)
    handle = sampler.admit()
    for option, good in (GOOD | DRAWS).items():
        refused(option, lambda option=option, good=good: sampler.admit(hw.SamplingParams(**{option: [good, good]})))
    for value in ([0.5], [True], "ab", None, [2**70], [[1]], 3, {}, [NAN], np.ma.array([1]), [None]):
        refused("prompt_tokens", lambda value=value: sampler.admit(prompt_tokens=value))
    for value in ([-1], [V], [0, 1, V], [2**63], np.array([2**64 - 1], np.uint64)):
        refused("prompt_tokens", lambda value=value: sampler.admit(prompt_tokens=value, dry_multiplier=1), "ignore")
    for value in ("x", None, 99, -1, 0.0, False, NAN, [0], np.zeros(2), "0"):
        refused("handle", lambda value=value: sampler.retire(value))
    assert sampler.handles == [handle]
    sampler.retire(np.int64(handle))


def test_explanations() -> None:
    found = hw.explain(rows(()))
    for value in (0, -1, 1.5, "1", True, NAN, [1], None):
        refused("top", lambda value=value: hw.explain(rows(()), top=value))
    for value in (3, "abcde", ["a"], {}, list("abcdef"), True):
        refused("tokens", lambda value=value: hw.explain(rows(()), tokens=value))
    for value in (V, -1, 1.5, "1", True, NAN, None, [1]):
        refused("token", lambda value=value: found.why(value))


# Strange, but not bad -------------------------------------------------------------------------------------------------

EVERY = {**GOOD, "top_n_sigma": 5.0, "top_p": 0.95, "typical_p": 0.95, "xtc_probability": 0.5, "seed": 1}
del EVERY["dynamic_temperature_range"], EVERY["dynamic_temperature_exponent"]


def results(logits: Any, **options: Any) -> tuple[Any, ...]:
    options = EVERY | options
    drawn = hw.sample(logits, num_samples=2, **options)
    ranked = hw.logprobs(logits, top=1, processed=True, **options)
    return (drawn, hw.probabilities(logits, **options), hw.filter_logits(logits, **options), *ranked[2:])


class Labelled(np.ndarray):
    pass


def test_arrays_of_every_make() -> None:
    logits = rows((2, 3)).astype(np.float32)
    apart = np.zeros(logits.shape, [("x", "u1"), ("y", "f4")])
    apart["y"] = logits  # neither aligned nor a whole number of elements from one to the next
    frozen = logits.copy()
    frozen.flags.writeable = False
    makes = {
        "backwards": logits[..., ::-1].copy()[..., ::-1],
        "rows backwards": logits[::-1].copy()[::-1],
        "columns first": np.asfortranarray(logits),
        "read-only": frozen,
        "foreign bytes": logits.astype(logits.dtype.newbyteorder()),
        "every third": np.repeat(logits, 3, -1)[..., ::3],
        "a field": apart["y"],
        "unaligned": np.frombuffer(b"x" + logits.tobytes(), np.uint8)[1:].view(np.float32).reshape(logits.shape),
        "a subclass": logits.view(Labelled),
        "a memoryview": memoryview(logits),
    }
    want = results(logits)
    for make, array in makes.items():
        got = results(array)
        assert same_bits(got, want), make
        assert all(type(part) is np.ndarray and part.flags.writeable for part in got), make
        assert same_bits(
            hw.penalize(array, [[[0, 1]] * 3] * 2, repetition=2), hw.penalize(logits, [[[0, 1]] * 3] * 2, repetition=2)
        )
    row = rows(()).astype(np.float32)
    assert same_bits(results(np.broadcast_to(row, (4, V))), results(np.tile(row, (4, 1))))


def test_many_axes() -> None:
    """More than the kernels walk, with options of each row in as many."""
    logits, many = rows((2, 3)).astype(np.float32), (2, *[1] * 7, 3)
    options = {"allowed": rows((2, 3)) > -1.5, "logit_bias": rows((3,)), "temperature": np.array([[0.5, 1.0, 2.0]] * 2)}
    want = results(logits, **options)
    spread = {
        "allowed": options["allowed"].reshape(*many, V),
        "logit_bias": options["logit_bias"],
        "temperature": options["temperature"].reshape(many),
    }
    for got, plain in zip(results(logits.reshape(*many, V), **spread), want, strict=True):
        assert got.shape == (*many, *plain.shape[2:])
        assert same_bits(got.reshape(plain.shape), plain)
    nested: Any = [0, 1]
    for n in reversed(many):
        nested = [nested] * n
    penalized = hw.penalize(logits.reshape(*many, V), nested, frequency=1)
    assert same_bits(penalized.reshape(2, 3, V), hw.penalize(logits, [[[0, 1]] * 3] * 2, frequency=1))


def test_sizes_at_the_edge() -> None:
    for shape in ((0,), (2, 0), (0, 0)):
        drawn, shares, left, best, ln = results(np.zeros((*shape, V)))
        assert (drawn.shape, shares.shape, left.shape) == ((*shape, 2), (*shape, V), (*shape, V))
        assert best.shape == ln.shape == (*shape, 1)
        assert verify(np.zeros((*shape, V))).tokens.shape == (*shape, 1)
        assert hw.penalize(np.zeros((*shape, V)), np.zeros((*shape, 3), int), repetition=2).shape == (*shape, V)
    for shape in ((), (3,)):
        assert not np.any(results(np.full((*shape, 1), -7.0), min_tokens_to_keep=9)[0])
    wide = np.zeros((2, 2**20), np.float32)
    wide[:, -1] = 40
    assert hw.sample(wide, seed=1, top_p=0.9).tolist() == [2**20 - 1] * 2
    assert hw.explain(wide[0], top_p=0.9).kept.tolist() == [2**20 - 1]


def test_numbers_of_every_make() -> None:
    """What is a number is read as that number, alone and in a list; one too large for a k means no limit."""
    logits = rows((3,))
    for half in (0.5, np.float16(0.5), np.float32(0.5), np.array(0.5), np.array([0.5]), [0.5, np.float32(0.5), 0.5]):
        assert same_bits(hw.probabilities(logits, top_p=half), hw.probabilities(logits, top_p=0.5))
    for two in (2, np.uint8(2), np.int64(2), np.array(2), [2, np.uint8(2), 2], np.array([2, 2, 2], object)):
        assert same_bits(hw.probabilities(logits, top_k=two), hw.probabilities(logits, top_k=2))
        assert same_bits(hw.probabilities(logits, temperature=two), hw.probabilities(logits, temperature=2.0))
    assert same_bits(hw.probabilities(logits, top_k=[2**70, 2, 2**64]), hw.probabilities(logits, top_k=[5, 2, 5]))
    assert same_bits(hw.sample(logits, seed=[2**64 - 1] * 3), hw.sample(logits, seed=np.full(3, 2**64 - 1, np.uint64)))
    assert same_bits(hw.probabilities(logits, temperature=[2**70, 1, 1.0])[0], np.full(V, 0.2))
    assert re.fullmatch(r"[0-4]", str(hw.sample(logits[0], seed=2**64 - 1, position=2**64 - 1)))


@pytest.mark.parametrize("temperature", [0, -1, 0.0, math.nan, [1.0, 0.0], [1.0, -1.0]])
def test_a_cure_is_none_that_the_dialect_refuses(temperature: Any) -> None:
    logits = np.zeros((2, 4))
    with pytest.raises(ValueError, match=r"^temperature.* use top_k=1, or leave dialect='hf' out$"):
        hw.sample(logits, temperature=temperature, dialect="hf")
    with pytest.raises(ValueError, match=r"0 is argmax$"):
        hw.sample(logits, temperature=-1)
