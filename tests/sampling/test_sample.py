"""Sampling: the kernels against the reference in bits, laws, random numbers, precision, bad input.

What each option means is in test_sampling_semantics.py; frequencies are in test_sample_statistics.py.
"""

from __future__ import annotations

import inspect
import pickle
import platform
import shutil
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, laid_out, same_bits
from test_sample_statistics import chi_square, power

import headway as hw
from headway import reference
from headway._sampling.dialects import DIALECTS, rules
from headway._sampling.stages import OF_STAGES
from headway.reference._sampling.call import through_stages

FUNCTIONS = ("sample", "probabilities", "filter_logits")
LAST = 1 - 2.0**-53  # the largest number below 1
INF = float("inf")


def assert_equals_reference(logits: Any, **options: Any) -> None:
    for name in FUNCTIONS:
        got, want = getattr(hw, name)(logits, **options), getattr(reference, name)(logits, **options)
        assert same_bits(np.asarray(got), np.asarray(want)), (name, options)


# Against the reference, bit for bit ---------------------------------------------------------------------------------

KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, V: rng.standard_normal(V) * 10.0 ** rng.uniform(-2, 1.5),
    "few values": lambda rng, V: np.round(rng.standard_normal(V) * 2),
    "all equal": lambda rng, V: np.full(V, rng.choice([0.0, -0.0, 1.5, -1e30, 1e30])),
    "extremes": lambda rng, V: rng.choice([-1e30, 1e30, 0.0, -0.0, 5.0, 3e38, -3e38], V),
    "subnormal": lambda rng, V: rng.standard_normal(V) * 1e-40,
    "bans": lambda rng, V: np.where(rng.random(V) < 0.3, -np.inf, rng.standard_normal(V)),
    "sorted": lambda rng, V: np.sort(rng.standard_normal(V) * 4)[:: rng.choice([1, -1])],
    "peaked": lambda rng, V: rng.standard_normal(V) + 15 * (rng.random(V) < 3 / V),
    "geometric": lambda rng, V: -np.arange(V) * rng.choice([1e-4, 1e-2, 1.0]),
    "two values": lambda rng, V: rng.choice([[1.0, 2.0], [1.0, 1 + 2.0**-23], [-1e30, 0.0]][rng.integers(3)], V),
    "zeros of both signs": lambda rng, V: rng.choice([0.0, -0.0], V),
    "near ties": lambda rng, V: 10 + rng.choice([0.0, 0.003, 1e-9, 1 / 3], V),
    "too low for float32": lambda rng, V: np.where(np.arange(V) == V // 2, 1.0, rng.choice([-1e300, -1e39, -3e38], V)),
}
BIASES: list[Callable[[np.random.Generator, int], np.ndarray]] = [
    lambda rng, V: rng.standard_normal(V),
    lambda rng, V: rng.standard_normal(V) * 1e-3,
    lambda rng, V: rng.choice([0.003, 0.001, 0.0], V),
    lambda rng, V: rng.choice([-1e300, -3e38, -1.0, 0.0], V),
    lambda rng, V: np.where(rng.random(V) < 0.1, -np.inf, rng.standard_normal(V)),
]
SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1000, 1024, 1025, 2047, 2048, 2049, 5000]
TEMPERATURES = [1.0, 0.0, 0.8, 2.0, 1e-40, 5e-324, 1e-10, 1e30, 1e39, 1.7e308]


def make_logits(kind: str, dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    rows = np.stack([KINDS[kind](rng, shape[-1]) for _ in range(int(np.prod(shape[:-1])))]).reshape(shape)
    one = int(rng.integers(shape[-1]))
    rows[..., one] = np.where(np.isneginf(rows).all(-1), 0, rows[..., one])  # not all are banned
    if dtype == "float16":
        rows = np.where(np.isneginf(rows), rows, np.clip(rows, -6e4, 6e4))
    with np.errstate(over="ignore"):
        return rows.astype(DTYPES[dtype])


COMMON = ["normal", "few values", "extremes", "subnormal", "bans", "zeros of both signs"]


def draw_logits(data: st.DataObject, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Logits of a common kind, of any type."""
    return make_logits(data.draw(st.sampled_from(COMMON)), data.draw(st.sampled_from(list(DTYPES))), shape, rng)


P = st.sampled_from([0.9, 0.5, 1.0, 1e-9, 5e-324, LAST, 0.1]) | st.floats(0, 1, exclude_min=True)
SHARE = P | st.just(0.0)


def stages(V: int) -> dict[str, st.SearchStrategy[Any]]:
    """Every option of a stage that may be one per row."""
    often = {
        "temperature": st.sampled_from(TEMPERATURES) | st.floats(0.01, 10),
        "dynamic_temperature_range": st.sampled_from([0.0, 0.5, 3.0, 1e-40, 1.7e308]) | st.floats(0, 5),
        "dynamic_temperature_exponent": st.sampled_from([1.0, 5e-324, 0.5, 1.7e308]) | st.floats(0.1, 5),
        "top_n_sigma": st.sampled_from([1.0, 2.5, INF, 5e-324, 1e308]) | st.floats(0.01, 6),
        "top_k": st.sampled_from([1, 2, 5, 50, max(1, V - 1), V, V + 1, 10**15]),
        "top_p": P,
        "min_p": SHARE,
        "typical_p": P,
        "epsilon_cutoff": SHARE | st.floats(1e-6, 1e-2),
        "eta_cutoff": SHARE | st.floats(1e-6, 1e-2),
        "xtc_probability": st.sampled_from([0.0, 0.5, 1.0]),
        "xtc_threshold": st.sampled_from([0.0, 0.1, 0.5, 1.0, 1e-4]) | st.floats(0, 0.5),
        "min_tokens_to_keep": st.sampled_from([1, 2, 3, 40, max(1, V - 1), V, 10**15]),
    }
    rest = [option for option in OF_STAGES if option.name not in often and option.name != "xtc_special_tokens"]
    return often | {option.name: st.sampled_from([x for x in ANY if accepts(option, x)]) for option in rest}


ANY = [1.0, 0.5, 0.0, 0.1, 1e-9, 5e-324, LAST, 2.0, 5.0, 1e30, 1.7e308, INF, 1, 2, 50, 10**15]


def accepts(option: Any, value: float) -> bool:
    try:
        option.check(option.name, value, ())
    except (ValueError, TypeError):
        return False
    return True


def make_options(draw: Any, V: int, rows: int, rng: np.random.Generator) -> dict[str, Any]:
    """Each option absent, the same for all rows, or one per row."""

    def some(values: st.SearchStrategy[Any]) -> Any:
        return draw(values) if draw(st.booleans()) else np.array([draw(values) for _ in range(rows)])

    options: dict[str, Any] = {"seed": draw(st.integers(0, 2**64 - 1)), "position": some(st.integers(0, 2**63 - 1))}
    dialect = draw(st.none() | st.sampled_from(sorted(DIALECTS)))
    options["dialect"] = dialect
    lacks = rules(dialect, "after_top_k").lacks()
    for name, values in stages(V).items():
        if draw(st.integers(0, 3)) == 0 and name not in lacks:
            options[name] = some(values)
    if "xtc_probability" in options and "xtc_special_tokens" not in lacks and draw(st.booleans()):
        options["xtc_special_tokens"] = rng.integers(0, V, int(rng.integers(1, 5))).tolist()
    if dialect == "hf" and "temperature" in options:
        options["temperature"] = options["temperature"] + (np.asarray(options["temperature"]) == 0)
    if dialect is None and draw(st.booleans()):
        options["ties"] = draw(st.sampled_from(["lowest_id", "keep"]))
    if dialect in (None, "flashinfer") and draw(st.booleans()):
        options["nucleus"] = draw(st.sampled_from(["after_top_k", "joint"]))
    if draw(st.integers(0, 3)) == 0:
        bias = draw(st.sampled_from(BIASES))(rng, V)
        bias[int(rng.integers(V))] = 0
        with np.errstate(over="ignore"):
            narrow = bias.astype(np.float32)
        options["logit_bias"] = draw(st.sampled_from([bias, narrow, dict(enumerate(bias.tolist()))]))
    return options


@given(st.data())
@settings(max_examples=600)
def test_equals_the_reference(data: st.DataObject) -> None:
    compare_with_reference(data, data.draw(st.sampled_from(SIZES) | st.integers(1, 300)), data.draw(st.integers(1, 3)))


@given(st.data(), st.integers(1, 300_000))
@settings(max_examples=15)
def test_equals_the_reference_on_any_vocabulary(data: st.DataObject, V: int) -> None:
    compare_with_reference(data, V, 1)


@given(st.data(), st.sampled_from(list(DTYPES)))
@settings(max_examples=400)
def test_filtering_first_is_the_same_draw_for_any_type(data: st.DataObject, dtype: str) -> None:
    """Whatever the type, the bias, the stages and their order: what filter_logits leaves is what decides."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    V, rows = data.draw(st.sampled_from([2, 3, 17, 65, 300])), data.draw(st.integers(1, 3))
    logits = make_logits(data.draw(st.sampled_from(list(KINDS))), dtype, (rows, V), rng)
    options = make_options(data.draw, V, rows, rng)
    options.pop("dynamic_temperature_range", None)  # what it comes to depends on what the stages remove
    again = {name: options[name] for name in ("temperature", "dialect", "seed", "position") if name in options}
    try:
        left = hw.filter_logits(logits, **options)
    except ValueError:  # a row in which the bias bans what was left, or one that overflows
        return
    if "logit_bias" in options:
        assert left.dtype == (np.float64 if dtype == "float64" else np.float32)
    else:
        assert left.dtype == logits.dtype
    assert same_bits(hw.sample(left, **again), hw.sample(logits, **options))
    assert np.array_equal(hw.probabilities(left, **again), hw.probabilities(logits, **options))


def compare_with_reference(data: st.DataObject, V: int, rows: int) -> None:
    """Any logits, any options, each the same for all rows or one per row, in any memory layout."""
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = make_logits(data.draw(st.sampled_from(list(KINDS))), dtype, (rows, V), rng)
    options = make_options(data.draw, V, rows, rng)
    if data.draw(st.booleans()):
        best = np.arange(V) == logits.astype(np.float64).argmax(-1)[:, None]  # so that no row is left empty
        allowed = (rng.random((rows, V)) < 0.5) | best
        if "logit_bias" not in options:
            options["allowed"] = allowed
    layout = data.draw(st.sampled_from(["contiguous", "transposed", "last axis apart", "reversed"]))
    try:
        reference.sample(logits, **options)
    except ValueError:  # a row in which the bias bans what was left
        with pytest.raises(ValueError, match=r"banned|overflow"):
            hw.sample(logits, **options)
        return
    for name in FUNCTIONS:
        got = getattr(hw, name)(laid_out(logits, layout), **options)
        assert same_bits(got, getattr(reference, name)(logits, **options)), name


@pytest.mark.parametrize("V", [20_001, 128_256])
@pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "all equal",
        "two values",
        "geometric",
        "few values",
        "peaked",
        "bans",
        "sorted",
        0.5,
        1.0,
        2.0,
        3.0,
        6.0,
    ],
)
def test_equals_the_reference_on_large_vocabularies(V: int, kind: str | float) -> None:
    """Long enough to be shared among threads, and for a sample to stand for them. A number is a standard deviation."""
    rng = np.random.default_rng(V)
    if isinstance(kind, float):
        logits = (rng.standard_normal(V) * kind).astype(np.float32)
    else:
        logits = make_logits(kind, "float32", (V,), rng)
    for options in (
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 50},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.5},
        {"top_p": 0.9999},
        {"top_k": V - V // 16},
        {"temperature": 0, "top_p": 0.9},
        {"typical_p": 0.9},
        {"min_p": 0.02},
        {"temperature": 0.7, "top_k": 5000, "top_p": 0.5, "min_p": 0.01, "ties": "keep"},
        {"top_p": 0.99, "top_k": V // 2, "nucleus": "joint"},
        {"top_n_sigma": 1.5, "typical_p": 0.7, "min_tokens_to_keep": 9},
        {"epsilon_cutoff": 2e-5, "xtc_probability": 1.0, "xtc_threshold": 1e-4},
        {"eta_cutoff": 0.3, "dynamic_temperature_range": 0.8},
        {"top_p": 0.9, "min_p": 0.1, "dialect": "hf"},
        {"typical_p": 0.9, "top_p": 0.8, "xtc_probability": 1.0, "temperature": 0.5, "dialect": "llama.cpp"},
        {"top_k": V // 3, "top_p": 0.9, "dialect": "flashinfer"},
    ):
        assert_equals_reference(logits, seed=V, **options)


@pytest.mark.parametrize("offset", [0.0, -3e4, 5e6])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 40.0])
@pytest.mark.parametrize("V", [64, 65, 1280, 1343])
def test_what_just_reaches_a_weight_whatever_block_it_is_in(V: int, temperature: float, offset: float) -> None:
    """Each block's maximum is one of the logits around the least that stays, a step of float32 apart, or its equal.

    So whoever passes over a block that he should look into loses a token. With an offset a step is far, and the
    boundary is a logit; without, weights are out of order with their logits by a rounding.
    """
    rng = np.random.default_rng(V)
    blocks = -(-V // 64)
    middle = np.float32(offset) + np.float32(offset and np.spacing(np.float32(offset))) - np.float32(offset == 0)
    near = [np.float32(middle)]
    for _ in range(12):
        near = [np.nextafter(near[0], np.float32(-INF)), *near, np.nextafter(near[-1], np.float32(INF))]
    for trial in range(12):
        logits = (middle - 30 * temperature - rng.random(V) * max(1.0, abs(offset))).astype(np.float32)
        for b in range(blocks):
            own = np.arange(64 * b, min(V, 64 * b + 64))
            logits[rng.choice(own, min(own.size, int(rng.integers(0, 3))), replace=False)] = rng.choice(near)
        logits[int(rng.integers(V))] = near[-1] + (offset == 0)
        weights = reference.masses(logits, temperature=temperature)
        whole, least = int(weights.sum()), int(rng.choice(weights[weights > 2**20]))
        for w in (least, least - 1, least + 1):
            share = w / int(weights.max())
            for more in ({}, {"top_k": V - 3}, {"top_k": max(1, V // 16)}, {"min_tokens_to_keep": 5}):
                for option, value in (("min_p", share), ("epsilon_cutoff", w / whole), ("eta_cutoff", w / whole)):
                    options = {"temperature": temperature, option: min(value, 1.0), **more}
                    got, want = (f(logits, **options) for f in (hw.filter_logits, reference.filter_logits))
                    assert same_bits(got, want), (options, trial)


def test_a_list_has_other_blocks_than_the_row() -> None:
    """What top_k left is a list: its first tokens come from the row's last blocks."""
    logits = np.full(64 * 20, -9, np.float32)
    logits[-130:] = np.random.default_rng(1).random(130).astype(np.float32)
    for option in ("min_p", "epsilon_cutoff"):
        options = {"top_k": 100, option: 0.75 if option == "min_p" else 0.0105}
        left = hw.filter_logits(logits, **options)
        assert same_bits(left, reference.filter_logits(logits, **options))
        assert 0 < np.isfinite(left).sum() < 100


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_equals_the_reference_at_every_temperature(temperature: float, dtype: str) -> None:
    rng = np.random.default_rng(5)
    for kind in KINDS:
        assert_equals_reference(make_logits(kind, dtype, (2, 333), rng), temperature=temperature, seed=3, top_p=0.97)


def test_the_scale_of_weights_steps_down_where_their_sum_could_overflow() -> None:
    """V of 2^44 stay below 2^62 up to V = 2^18."""
    for V in (2**18 - 1, 2**18, 2**18 + 1):
        assert_equals_reference(np.zeros(V, np.float32), uniform=LAST)
        assert hw.sample(np.zeros(V, np.float32), uniform=LAST) == V - 1


# Laws ---------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(11)
BATCH = (RNG.standard_normal((3, 4, 501)) * 3).astype(np.float32)
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 20},
    {"top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "nucleus": "joint", "ties": "keep"},
    {"temperature": 1.5, "top_n_sigma": 3.0, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-2},
    {"temperature": 1.5, "xtc_probability": 1.0, "xtc_threshold": 0.01, "min_tokens_to_keep": 4},
]


@pytest.mark.parametrize("options", FILTERS)
def test_a_row_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    seeds = np.arange(12, dtype=np.uint64).reshape(3, 4) + np.uint64(2**63)
    tokens = hw.sample(BATCH, seed=seeds, position=9, **options)
    assert tokens.shape == (3, 4)
    assert tokens.dtype == np.int64
    for index in np.ndindex(3, 4):
        assert tokens[index] == hw.sample(BATCH[index], seed=int(seeds[index]), position=9, **options)
        for name in ("probabilities", "filter_logits"):
            assert same_bits(getattr(hw, name)(BATCH, **options)[index], getattr(hw, name)(BATCH[index], **options))


def test_parameters_per_row() -> None:
    rows = {
        "temperature": np.array([[0.5], [1.0], [0.0]]),
        "top_k": [3, 20, 501, 10**30],
        "top_p": np.float32([0.5, 0.9, 0.2, 1.0]),
        "min_p": np.array([[0.1], [0.0], [0.01]]),
        "position": [[0, 1, 2, 3]],
        "logit_bias": RNG.standard_normal((3, 1, 501)),
        "allowed": RNG.random((4, 501)) < 0.7,
    }
    tokens = hw.sample(BATCH, seed=np.arange(12).reshape(3, 4), **rows)
    for number, (i, j) in enumerate(np.ndindex(3, 4)):
        own = {
            "temperature": [0.5, 1.0, 0.0][i],
            "top_k": rows["top_k"][j],
            "top_p": rows["top_p"][j],
            "min_p": [0.1, 0.0, 0.01][i],
            "position": j,
            "logit_bias": rows["logit_bias"][i, 0],
            "allowed": rows["allowed"][j],
        }
        assert tokens[i, j] == hw.sample(BATCH[i, j], seed=number, **own)


def test_threads_change_nothing(keep_threads: None) -> None:
    logits = np.random.default_rng(2).standard_normal((67, 3000)).astype(np.float32)
    results = []
    for n in (1, 2, 5):
        hw.set_num_threads(n)
        results.append(tuple(getattr(hw, name)(logits, seed=4, top_p=0.9) for name in FUNCTIONS))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


LONG = np.random.default_rng(3).standard_normal(50_001).astype(np.float32)


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 20_000}, {"top_p": 0.9}, {"typical_p": 0.9}, {"min_p": 0.01}, {"eta_cutoff": 1e-4, "top_p": 0.8}],
    ids=str,
)
def test_threads_change_nothing_in_one_long_row(spread: float, options: dict[str, Any], keep_threads: None) -> None:
    rows = np.stack([LONG, -LONG]) * np.float32(spread)
    results = []
    for n in (1, 2, 3, 7):
        hw.set_num_threads(n)
        results.append([hw.sample(row, seed=4, position=i, **options) for row in rows for i in range(40)])
        results[-1] += hw.sample(rows, seed=4, **options).tolist()
        results[-1] += [hw.probabilities(row, **options).tobytes() for row in rows]
        results[-1] += hw.logprobs(rows[0], 5, top=3, processed=True, **options).top_tokens.tolist()
        draft = rows[0] * np.float32(0.9)
        verified = hw.verify_draft(rows, draft[None], [hw.sample(draft, seed=2, **options)], seed=2, **options)
        results[-1].append((verified.accepted, verified.tokens.tolist()))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("place", [0, 8191, 30_000, 50_000])
def test_threads_find_the_same_fault_in_a_long_row(place: int, keep_threads: None) -> None:
    for fault, message in ((np.nan, "NaN"), (np.inf, r"\+inf")):
        row = LONG.copy()
        row[[place, 50_000]] = fault
        for n in (1, 2, 7):
            hw.set_num_threads(n)
            with pytest.raises(ValueError, match=f"{message} at token {place}"):
                hw.sample(row, top_p=0.9)


@pytest.mark.parametrize("layout", ["transposed", "reversed", "last axis apart", "offset"])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_memory_layout_changes_nothing(layout: str, dtype: str) -> None:
    logits = BATCH.astype(DTYPES[dtype])
    other = laid_out(logits, layout)
    for name in FUNCTIONS:
        want = getattr(hw, name)(logits, seed=1, top_k=30, min_p=0.01)
        assert same_bits(getattr(hw, name)(other, seed=1, top_k=30, min_p=0.01), want)


def test_broadcast_rows_and_many_axes() -> None:
    row = BATCH[0, 0]
    assert same_bits(hw.sample(np.broadcast_to(row, (5, 501)), seed=3), hw.sample(np.repeat(row[None], 5, 0), seed=3))
    deep = BATCH.reshape(1, 3, 1, 1, 2, 1, 1, 2, 1, 1, 501)
    bias, allowed = RNG.standard_normal(501), RNG.random((2, 1, 1, 501)) < 0.5
    got = hw.sample(deep, seed=3, logit_bias=bias, allowed=allowed)
    want = reference.sample(deep, seed=3, logit_bias=bias, allowed=allowed)
    assert got.shape == deep.shape[:-1]
    assert same_bits(got, want)


def test_filtering_first_is_the_same_draw() -> None:
    for options in FILTERS:
        temperature = options.get("temperature", 1.0)
        left = hw.filter_logits(BATCH, **options)
        assert same_bits(hw.sample(left, temperature=temperature, seed=8), hw.sample(BATCH, seed=8, **options))
        assert same_bits(hw.probabilities(left, temperature=temperature), hw.probabilities(BATCH, **options))


def test_filter_logits_changes_nothing_that_stays() -> None:
    for dtype in DTYPES.values():
        logits = BATCH.astype(dtype)
        left = hw.filter_logits(logits, temperature=0.3, top_k=7)
        assert left.dtype == logits.dtype
        stays = ~np.isneginf(left)
        assert (stays.sum(-1) == 7).all()
        assert np.array_equal(left[stays], logits[stays])


def test_top_k_1_is_argmax_at_any_temperature() -> None:
    logits = np.round(BATCH)  # with ties: the lowest id
    for temperature in (0.0, 1e-9, 1.0, 50.0):
        assert np.array_equal(hw.sample(logits, temperature=temperature, top_k=1, seed=1), logits.argmax(-1))
    assert np.array_equal(hw.sample(logits, temperature=0), logits.argmax(-1))


def test_adding_a_constant_that_rounds_nothing_changes_nothing() -> None:
    logits = np.round(BATCH * 8) / 8
    assert same_bits(hw.probabilities(logits + 32), hw.probabilities(logits))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_dtypes_out(dtype: str) -> None:
    logits = BATCH[0].astype(DTYPES[dtype])
    assert hw.sample(logits).dtype == np.int64
    assert hw.probabilities(logits).dtype == (np.float64 if dtype == "float64" else np.float32)
    assert hw.filter_logits(logits).dtype == logits.dtype
    # Whatever holds the same numbers draws the same.
    assert same_bits(hw.sample(logits, seed=6), hw.sample(logits.astype(np.float32), seed=6))


def test_a_lone_row_gives_an_int() -> None:
    assert type(hw.sample(BATCH[0, 0])) is int
    assert type(hw.sample([1, 2, 3], temperature=0)) is int
    assert hw.sample(np.zeros((0, 7))).shape == (0,)
    assert hw.probabilities(np.zeros((2, 0, 7), np.float32), top_p=0.5).shape == (2, 0, 7)
    assert hw.filter_logits(np.zeros((0, 7)), logit_bias=np.zeros(7), allowed=[1]).shape == (0, 7)


def test_torch_in_torch_out() -> None:
    torch = pytest.importorskip("torch", reason="the tensors of torch are tried where torch is")
    logits = torch.from_numpy(BATCH.copy())
    tokens = hw.sample(logits, seed=2, top_k=torch.tensor(9), allowed=torch.ones(501, dtype=torch.bool))
    assert tokens.dtype == torch.int64
    assert np.array_equal(tokens.numpy(), hw.sample(BATCH, seed=2, top_k=9))
    assert hw.filter_logits(logits.bfloat16(), top_k=3).dtype == torch.bfloat16


# Random numbers -----------------------------------------------------------------------------------------------------


def numpy_words(seed: int, stream: int, position: int) -> list[int]:
    """NumPy increases its counter before the first block."""
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64), counter=(position - 1) % 2**256)
    return generator.random_raw(4).tolist()


WORDS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 5, 2**64 - 1), (123456789, 2, 987654321)]


@pytest.mark.parametrize(("seed", "stream", "position"), WORDS)
def test_the_words_are_numpys(seed: int, stream: int, position: int) -> None:
    words = numpy_words(seed, stream, position)
    assert list(reference.philox(seed, stream, position)) == words
    # With 2^16 equal logits the token is the first word's top 16 bits.
    tokens = hw.sample(np.zeros((stream + 1, 2**16), np.float32), seed=seed, position=position)
    assert tokens[stream] == words[0] >> 48


def test_the_published_vector() -> None:
    """Philox4x64-10 of counter 0 and key 0, as in the known-answer tests of Random123."""
    assert reference.philox(0, 0, 0) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )


def test_streams() -> None:
    rows = np.zeros((2, 3, 2**16), np.float32)
    want = [numpy_words(77, i, 5)[0] >> 48 for i in range(6)]
    assert hw.sample(rows, seed=77, position=5).ravel().tolist() == want
    assert hw.sample(rows[0, 0], seed=77, position=5) == want[0]
    own = hw.sample(rows, seed=np.full((2, 3), 77), position=np.arange(6).reshape(2, 3))
    assert own.ravel().tolist() == [numpy_words(77, 0, p)[0] >> 48 for p in range(6)]


def test_no_seed_is_fresh_entropy() -> None:
    rows = np.zeros((4, 2**16), np.float32)
    assert not np.array_equal(hw.sample(rows), hw.sample(rows))  # equal by chance once in 2^64
    assert hw.sample(rows, seed=3, position=0).tolist() == hw.sample(rows, seed=3).tolist()


def exact_intervals(logits: np.ndarray, **options: Any) -> list[Fraction]:
    """The ends of the tokens' intervals, from the reference's whole numbers."""
    weights = through_stages(logits, None, {"seed": 0, **options})[0].final_masses().tolist()
    total, ends, running = sum(weights), [], 0
    for w in weights:
        running += w
        ends.append(Fraction(running, total))
    return ends


@pytest.mark.parametrize("V", [8, 64, 256, 4096, 65536])  # tokens, and ends of blocks and of stretches of blocks
@pytest.mark.parametrize("draws", [None, 7])
def test_a_draw_exactly_between_two_tokens_takes_the_second(V: int, draws: int | None) -> None:
    logits, parts = np.zeros(V, np.float32), np.arange(1, 8) / 8
    if draws is None:
        assert [hw.sample(logits, uniform=u) for u in parts] == [i * V // 8 for i in range(1, 8)]
    else:
        found = hw.sample(logits, uniform=parts, num_samples=draws)
        assert found.tolist() == [i * V // 8 for i in range(1, 8)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 6, "top_p": 0.9}])
def test_uniform_finds_the_interval_that_holds_it(options: dict[str, Any]) -> None:
    logits = (np.random.default_rng(1).standard_normal(9) * 2).astype(np.float32)
    ends = exact_intervals(logits, **options)
    probes = {0.0, LAST, *(k / 4096 for k in range(4096))}
    for end in ends[:-1]:  # the two doubles about each end, and one further out
        below = float(end)
        below = below if Fraction(below) < end else np.nextafter(below, 0)
        above = np.nextafter(below, 1)
        probes |= {float(np.nextafter(below, 0)), float(below), float(above)}
    u = np.array(sorted(p for p in probes if 0 <= p < 1))
    got = hw.sample(np.broadcast_to(logits, (u.size, 9)), uniform=u, **options)
    # u picks the token whose interval holds it; a 64-bit word resolves the total (below 2^48 here) beyond a double.
    want = [next(i for i, end in enumerate(ends) if Fraction(x) < end) for x in u.tolist()]
    assert got.tolist() == want
    probability = hw.probabilities(logits.astype(np.float64), **options)
    assert np.allclose(probability, np.diff([0.0, *map(float, ends)]), rtol=1e-12, atol=1e-15)


def test_nothing_of_mass_0_is_ever_drawn() -> None:
    """At both ends of [0, 1), where a rounded running sum falls off the row, with no mass at the row's ends."""
    rng = np.random.default_rng(3)
    u = np.concatenate([[0.0, 5e-324, 2.0**-64, LAST, 1 - 2.0**-52], rng.random(500)])
    for V in (3, 64, 200, 5000):
        logits = (rng.standard_normal(V) * 5).astype(np.float32)
        logits[[0, -1]] = -np.inf
        logits[V // 3 : V // 2] = -1e4  # not banned, but with a weight of 0
        for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
            mass = hw.probabilities(logits, **options)
            tokens = hw.sample(np.broadcast_to(logits, (u.size, V)), uniform=u, **options)
            assert (mass[tokens] > 0).all()
            assert mass[tokens[0]] > 0
            assert tokens[0] == np.flatnonzero(mass)[0]
            assert tokens[3] == np.flatnonzero(mass)[-1]


# Precision ----------------------------------------------------------------------------------------------------------


def test_probabilities_are_as_exact_as_float32_differences_allow() -> None:
    rng = np.random.default_rng(8)
    logits = (rng.standard_normal(3000) * 4).astype(np.float32)
    for temperature in (1.0, 0.5, 3.0):  # 1 / T rounds, and so does the product
        z = logits.astype(np.float64) / temperature
        exact = np.exp(z - z.max())
        exact /= exact.sum()
        got = hw.probabilities(logits.astype(np.float64), temperature=temperature)
        x = z.max() - z
        bound = exact * (2e-7 + x * 2.0**-24 * 2.5) + 2.0**-44
        assert (np.abs(got - exact) <= bound).all()
        assert got.sum() == pytest.approx(1, abs=1e-12)


def test_tails_reach_2_to_minus_44_of_the_mode() -> None:
    """float32 cumulative sums lose whatever is below 2^-24."""
    logits = np.zeros(3, np.float32)
    logits[1:] = [-30 * np.log(2), -43 * np.log(2)]
    mass = hw.probabilities(logits.astype(np.float64))
    assert mass[1] == pytest.approx(2.0**-30, rel=1e-3)
    assert mass[2] == pytest.approx(2.0**-43, rel=0.3)
    assert hw.sample(logits, uniform=LAST) == 2 if mass[2] > 2.0**-53 else 1


def test_the_weight_of_the_best_token_is_the_largest() -> None:
    """exp rounds to at most 1: min_p = 1 keeps exactly the ties of the maximum."""
    z = np.float32(-np.arange(4000) * 1e-8)
    mass = hw.probabilities(z.astype(np.float64))
    left = hw.filter_logits(z, min_p=1.0)
    assert np.array_equal(left > -np.inf, mass == mass[0])
    assert mass.max() == mass[0]


# SamplingParams -----------------------------------------------------------------------------------------------------


def test_params_are_the_keywords() -> None:
    params = hw.SamplingParams(temperature=0.6, top_k=30, top_p=0.9, seed=5, logit_bias={3: 1.5}, allowed=range(400))
    keywords = {
        "temperature": 0.6,
        "top_k": 30,
        "top_p": 0.9,
        "seed": 5,
        "logit_bias": {3: 1.5},
        "allowed": list(range(400)),
    }
    for name in FUNCTIONS:
        assert same_bits(getattr(hw, name)(BATCH, params), getattr(hw, name)(BATCH, **keywords))
    assert same_bits(reference.sample(BATCH, params), hw.sample(BATCH, params))
    over = hw.sample(BATCH, params, top_k=None, temperature=1.0, seed=6)
    assert same_bits(over, hw.sample(BATCH, **{**keywords, "top_k": None, "temperature": 1.0, "seed": 6}))


def test_params_are_values() -> None:
    a, b = (hw.SamplingParams(top_k=4, logit_bias={1: 2.0}, top_p=np.array([0.5, 0.6])) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != hw.SamplingParams(top_k=4, logit_bias={1: 2.0}, top_p=np.array([0.5, 0.7]))
    assert a != "params"
    assert len({hw.SamplingParams(), hw.SamplingParams(temperature=1.0), hw.SamplingParams(temperature=2)}) == 2
    assert pickle.loads(pickle.dumps(a)) == a
    assert "top_k=4" in repr(a)
    assert "_settings" not in repr(a)
    with pytest.raises(AttributeError):
        a.top_k = 5  # type: ignore[misc]


def test_params_keep_their_own_copies() -> None:
    bias, allowed, ids = np.zeros(501), np.ones(501, bool), {1: 2.0}
    params = hw.SamplingParams(logit_bias=bias, allowed=allowed, seed=1)
    sparse = hw.SamplingParams(logit_bias=ids, seed=1)
    before = hw.probabilities(BATCH, params), hw.probabilities(BATCH, sparse)
    bias[:], allowed[::2], ids[1] = RNG.standard_normal(501), False, 9.0
    assert same_bits((hw.probabilities(BATCH, params), hw.probabilities(BATCH, sparse)), before)


def test_help_shows_every_option() -> None:
    for name in FUNCTIONS:
        shown = inspect.signature(getattr(hw, name)).parameters
        own = ["num_samples", "replacement"] if name == "sample" else []
        assert [p for p in shown if shown[p].kind is inspect.Parameter.KEYWORD_ONLY] == [
            *own,
            *inspect.signature(hw.SamplingParams).parameters,
        ]
        assert shown["temperature"].default == 1.0


# Bad input ----------------------------------------------------------------------------------------------------------

V5 = np.zeros((2, 5), np.float32)


def rows(*bad: float) -> np.ndarray:
    """Two rows of five, the second with these numbers at its end."""
    logits = V5.copy()
    logits[1, 5 - len(bad) :] = bad
    return logits


ERRORS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (3.0, {}, ValueError, r"^logits: expected an array .* single number"),
    ([], {}, ValueError, r"^logits: expected at least one token, .*\(0,\)"),
    (np.zeros((2, 0)), {}, ValueError, r"^logits: .*\(2, 0\)"),
    ([True, False], {}, TypeError, r"^logits: .*bool"),
    (np.zeros(3, complex), {}, TypeError, r"^logits: .*complex"),
    (["a"], {}, TypeError, r"^logits: "),
    (rows(np.nan), {}, ValueError, r"^logits: .*NaN at token 4 in row 1;"),
    (rows(np.inf, np.nan), {}, ValueError, r"^logits: .*\+inf at token 3 in row 1$"),
    ([0.0, np.nan], {}, ValueError, r"NaN at token 1;"),
    ("abc", {}, TypeError, r"^logits: expected floating-point numbers, got text$"),
    (["a"], {}, TypeError, r"^logits: .*got text$"),
    (None, {}, TypeError, r"^logits: .*got None$"),
    (object(), {}, TypeError, r"^logits: .*got object$"),
    (np.array([None]), {}, TypeError, r"^logits: .*got object; convert it"),
    (rows(np.nan)[:, None], {}, ValueError, r"in row \(1, 0\)"),
    ([0.0, 1e39], {}, ValueError, r"^logits: .*within float32.*token 1 that overflows; subtract"),
    (np.float32([0, 3e38]), {"logit_bias": {1: 3e38}}, ValueError, r"token 1 that overflows with its logit_bias"),
    (rows(*[-np.inf] * 5), {}, ValueError, r"^logits: .*not banned in row 1, got none"),
    ([0.0, 1.0], {"allowed": []}, ValueError, r"^allowed: .*not banned"),
    ([0.0, 1.0], {"logit_bias": [-np.inf] * 2}, ValueError, r"^logit_bias: .*not banned"),
    (V5, {"temperature": -0.1}, ValueError, r"^temperature: expected a finite number >= 0, got -0.1;"),
    (V5, {"temperature": np.inf}, ValueError, r"^temperature: .*inf"),
    (V5, {"temperature": 10**400}, ValueError, r"^temperature: "),
    (V5, {"temperature": np.nan}, ValueError, r"^temperature: .*nan"),
    (V5, {"temperature": [1.0, -2.0]}, ValueError, r"^temperature\[1\]: .*-2.0"),
    (V5, {"temperature": [1.0, 1.0, 1.0]}, ValueError, r"^temperature: .*broadcasts to \(2,\), got \(3,\)"),
    (V5, {"temperature": "hot"}, TypeError, r"^temperature: .*'hot'"),
    (V5, {"temperature": None}, TypeError, r"^temperature: .*None"),
    (V5, {"temperature": True}, TypeError, r"^temperature: .*True"),
    (V5, {"top_p": 1.5}, ValueError, r"^top_p: expected a number in \(0, 1\], got 1.5; use None to switch it off"),
    (V5, {"top_p": 0}, ValueError, r"^top_p: .*got 0;"),
    (V5, {"top_p": np.array([[0.5], [2.0]])}, ValueError, r"^top_p\[1, 0\]: .*2.0"),
    (V5, {"min_p": -1e-9}, ValueError, r"^min_p: expected a number in \[0, 1\]"),
    (V5, {"typical_p": 0.0}, ValueError, r"^typical_p: expected a number in \(0, 1\], got 0.0; use None"),
    (V5, {"typical_p": [0.5, 2.0]}, ValueError, r"^typical_p\[1\]: .*got 2.0"),
    (V5, {"typical_p": [0.5, 0.5, 0.5]}, ValueError, r"^typical_p: .*broadcasts to \(2,\), got \(3,\)"),
    (V5, {"top_n_sigma": 0}, ValueError, r"^top_n_sigma: expected a number > 0, got 0; use None or infinity"),
    (V5, {"top_n_sigma": [1.0, np.nan]}, ValueError, r"^top_n_sigma\[1\]: .*nan"),
    (V5, {"epsilon_cutoff": 1.5}, ValueError, r"^epsilon_cutoff: expected a number in \[0, 1\], got 1.5"),
    (V5, {"eta_cutoff": "small"}, TypeError, r"^eta_cutoff: .*'small'"),
    (V5, {"xtc_probability": [[0.1], [-0.1]]}, ValueError, r"^xtc_probability\[1, 0\]: .*-0.1"),
    (V5, {"xtc_threshold": None}, TypeError, r"^xtc_threshold: .*None"),
    (V5, {"xtc_threshold": 2}, ValueError, r"^xtc_threshold: .*got 2; 0.1 is usual"),
    (V5, {"min_tokens_to_keep": 0}, ValueError, r"^min_tokens_to_keep: expected an integer >= 1, got 0; 1 is"),
    (V5, {"min_tokens_to_keep": 1.5}, TypeError, r"^min_tokens_to_keep: .*1.5"),
    (V5, {"dynamic_temperature_range": -1.0}, ValueError, r"^dynamic_temperature_range: .*got -1.0"),
    (V5, {"dynamic_temperature_exponent": 0}, ValueError, r"^dynamic_temperature_exponent: .*got 0; 1 is linear"),
    (V5, {"dialect": "HF"}, ValueError, r"^dialect: expected None or 'hf' or .*got 'HF'"),
    (V5, {"dialect": "vllm", "eta_cutoff": 0.1}, ValueError, r"^eta_cutoff: .*dialect 'vllm', which has no such"),
    (V5, {"dialect": "hf", "temperature": [1.0, 0]}, ValueError, r"^temperature\[1\]: .*got 0.0; use top_k=1"),
    (V5, {"dialect": "hf", "temperature": 0}, ValueError, r"^temperature: .*the dialect takes, got 0; use top_k=1"),
    (V5, {"dialect": "hf", "temperature": -1}, ValueError, r"^temperature: .*number >= 0, got -1; use top_k=1"),
    (V5, {"dialect": "hf", "ties": "keep"}, ValueError, r"^ties: expected none beside dialect 'hf'"),
    (V5, {"uniform": 0.5, "xtc_probability": 0.5}, ValueError, r"^uniform: .*xtc_probability 0 or 1"),
    (V5, {"top_k": 0}, ValueError, r"^top_k: expected an integer >= 1, got 0; use None"),
    (V5, {"top_k": 2.0}, TypeError, r"^top_k: expected an integer >= 1, got 2.0; use None"),
    (V5, {"top_k": True}, TypeError, r"^top_k: .*True"),
    (V5, {"top_k": "2"}, TypeError, r"^top_k: .*'2'"),
    (V5, {"top_k": np.timedelta64(2, "s")}, TypeError, r"^top_k: .*timedelta64\(2,'s'\)"),
    (V5, {"top_k": np.array([2, 3], "m8[s]")}, TypeError, r"^top_k\[0\]: .*timedelta"),
    (V5, {"top_k": [3, -1]}, ValueError, r"^top_k\[1\]: .*-1"),
    (V5, {"top_k": np.array([1.0, 2.0])}, TypeError, r"^top_k\[0\]: .*1.0"),
    (V5, {"seed": -1}, ValueError, r"^seed: expected an integer from 0 to 2\^64 - 1, got -1"),
    (V5, {"seed": 2**64}, ValueError, r"^seed: "),
    (V5, {"seed": 1.0}, ValueError, r"^seed: .*1.0"),
    (V5, {"seed": "x"}, ValueError, r"^seed: .*'x'"),
    (V5, {"seed": np.timedelta64(1, "s")}, ValueError, r"^seed: .*timedelta64\(1,'s'\)"),
    (V5, {"seed": [1, 2**64]}, ValueError, r"^seed\[1\]: "),
    (V5, {"seed": [[1], [2]]}, ValueError, r"^seed: .*\(2,\), got shape \(2, 1\); rows that share"),
    (V5, {"position": -1}, ValueError, r"^position: "),
    (V5, {"uniform": 1.0}, ValueError, r"^uniform: expected a number in \[0, 1\)"),
    (V5, {"uniform": 0.5, "seed": 1}, ValueError, r"^uniform: .*seed"),
    (V5, {"uniform": 0.5, "position": 0}, ValueError, r"^uniform: .*position"),
    (V5, {"ties": "all"}, ValueError, r"^ties: expected 'lowest_id' or 'keep', got 'all'"),
    (V5, {"nucleus": None}, ValueError, r"^nucleus: .*None"),
    (V5, {"allowed": [5]}, ValueError, r"^allowed: expected ids from 0 to 4, got 5"),
    (V5, {"allowed": [-1]}, ValueError, r"^allowed: .*-1"),
    (V5, {"allowed": np.ones(4, bool)}, ValueError, r"^allowed: expected a last axis of 5"),
    (V5, {"allowed": np.ones((3, 5), bool)}, ValueError, r"^allowed: .*broadcasts"),
    (V5, {"allowed": np.ones(5, np.int32)}, ValueError, r"^allowed: expected a packed mask of 1 .*always .*int64"),
    (V5, {"allowed": np.ones(5, np.uint8)}, TypeError, r"^allowed: .*got ndarray of uint8; .*astype\(bool\)"),
    (V5, {"allowed": np.ones((2, 5), np.int64)}, TypeError, r"^allowed: .*astype\(bool\)"),
    (V5, {"allowed": [True, False, 1]}, TypeError, r"^allowed: .*got a mixture"),
    (V5, {"allowed": (2, np.True_)}, TypeError, r"^allowed: .*got a mixture"),
    (V5, {"allowed": {True, 3}}, TypeError, r"^allowed: .*got a mixture"),
    (V5, {"allowed": [0.5]}, TypeError, r"^allowed: "),
    (V5, {"allowed": "abc"}, TypeError, r"^allowed: "),
    (V5, {"allowed": np.zeros((2, 5), np.int64)}, TypeError, r"^allowed: .*flat list"),
    (V5, {"logit_bias": {5: 1.0}}, ValueError, r"^logit_bias: expected ids from 0 to 4, got 5"),
    (V5, {"logit_bias": {"1": 1.0}}, TypeError, r"^logit_bias: expected token ids as keys, got '1'"),
    (V5, {"logit_bias": {2: np.nan}}, ValueError, r"^logit_bias\[2\]: .*nan"),
    (V5, {"logit_bias": [0, np.inf, 0, 0, 0]}, ValueError, r"^logit_bias\[1\]: .*inf"),
    (V5, {"logit_bias": [0.0]}, ValueError, r"^logit_bias: expected a last axis of 5"),
    (V5, {"logit_bias": np.ones(5, bool)}, TypeError, r"^logit_bias: "),
    (V5, {"topk": 4}, TypeError, r"^topk: no such option; .*top_k"),
    (V5, {"params": 0.7}, TypeError, r"^params: expected SamplingParams, got 0.7;"),
]


@pytest.mark.parametrize(("logits", "options", "error", "message"), ERRORS)
def test_errors(logits: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hw.sample(logits, **options)


@pytest.mark.parametrize("options", [{"top_p": 2}, {"seed": -1}, {"uniform": 0.5, "seed": 1}, {"ties": "x"}])
def test_params_check_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        hw.SamplingParams(**options)


# The house ----------------------------------------------------------------------------------------------------------


def test_no_fused_operation_in_the_sampling_objects() -> None:
    """NumPy has no fused multiply-add. The other objects of the same build have them, so the search can find one."""
    fused = {"x86_64": "vfmadd", "aarch64": "fmla"}.get(platform.machine())
    objects = sorted(Path(__file__).parents[2].glob("build/*/CMakeFiles/headway_*.dir/src/core/isa*.cpp.o"))
    if fused is None or shutil.which("objdump") is None or not objects:
        pytest.skip("needs objdump and the build folder of an editable installation")
    found = {path: fused in subprocess.check_output(["objdump", "-d", path], text=True) for path in objects}
    assert any(found.values())
    assert not any(hit for path, hit in found.items() if path.name == "isa_sampling.cpp.o")


# Several draws ------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200)
def test_several_draws_equal_the_reference(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, V, n = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 5, 64, 65, 300])),
        data.draw(st.integers(1, 7)),
    )
    logits = draw_logits(data, (rows, V), rng)
    options = make_options(data.draw, V, rows, rng)
    replacement = data.draw(st.booleans())
    if data.draw(st.booleans()):
        del options["seed"], options["position"]
        options["uniform"] = rng.random((rows, n))
        if "xtc_probability" in options:
            options["xtc_probability"] = np.round(options["xtc_probability"])  # its coin has no number of its own
    try:
        left = (reference.masses(logits, **{**options, "uniform": None}) > 0).sum(-1)
    except ValueError:  # the bias bans what was left
        return
    if not replacement and (left < n).any():
        with pytest.raises(
            ValueError, match=rf"^num_samples: expected at most {left[left < n][0]} without replacement"
        ):
            hw.sample(logits, num_samples=n, replacement=False, **options)
        return
    got = hw.sample(logits, num_samples=n, replacement=replacement, **options)
    assert same_bits(got, reference.sample(logits, num_samples=n, replacement=replacement, **options))


def test_draws_are_independent_and_cost_no_scan_each() -> None:
    """All pairs of the first two of 200,000 draws, with and without replacement, beside their exact probabilities."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.broadcast_to(np.log(p).astype(np.float32), (200_000, 4))
    pairs = {True: np.outer(p, p), False: np.outer(p, p) / (1 - p)[:, None] * (1 - np.eye(4))}
    for replacement, exact in pairs.items():
        drawn = hw.sample(logits, num_samples=2, replacement=replacement, seed=5)
        counts = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
        possible = exact.ravel() > 0
        assert counts[~possible].sum() == 0
        statistic, limit = chi_square(counts[possible], exact.ravel()[possible])
        assert statistic < limit
        other = (pairs[True] * (1 - np.eye(4)) / (1 - (p**2).sum())).ravel()  # pairs that differ, of independent draws
        if not replacement:
            assert power(200_000, exact.ravel()[possible], other[possible]) > 0.999
            statistic, limit = chi_square(counts[possible], other[possible])
            assert statistic > limit


def test_what_a_call_replaces_is_not_checked_with_the_rest() -> None:
    params = hw.SamplingParams(uniform=0.5)
    assert hw.sample([0.0, 1.0, 2.0], params, uniform=None, seed=3, xtc_probability=0.5) in range(3)
    with pytest.raises(ValueError, match=r"^uniform: .*xtc_probability 0 or 1"):
        hw.sample([0.0, 1.0, 2.0], params, xtc_probability=0.5)
    with pytest.raises(ValueError, match=r"^uniform: .*xtc_probability 0 or 1"):  # the second call as the first
        hw.sample([0.0, 1.0, 2.0], params, xtc_probability=0.5)


def test_options_that_are_looked_up_are_told_apart_by_type() -> None:
    assert hw.sample([0.0, 1.0, 2.0], top_k=1, seed=3) == hw.sample([0.0, 1.0, 2.0], top_k=1, seed=3)
    with pytest.raises(TypeError, match=r"^top_k: "):
        hw.sample([0.0, 1.0, 2.0], top_k=True, seed=3)
    for value in (0.5, np.float64(0.5), np.float32(0.5)):
        assert hw.sample([0.0, 1.0, 2.0], top_p=value, seed=3) == 2
        assert hw.sample([0.0, 1.0, 2.0], top_p=0.999, seed=3, temperature=9) == hw.sample(
            [0.0, 1.0, 2.0], seed=3, temperature=9
        )


def test_what_is_made_once_is_made_again_after_many_others() -> None:
    want = [hw.sample([0.0, 1.0, 2.0], temperature=1 + i / 7, seed=i) for i in range(1200)]
    assert want == [hw.sample([0.0, 1.0, 2.0], temperature=1 + i / 7, seed=i) for i in range(1200)]


def test_params_with_rows_serve_logits_of_other_shapes() -> None:
    params = hw.SamplingParams(top_k=np.array([1, 2, 3]), seed=3)
    logits = np.tile(np.float32([0.0, 1.0, 2.0]), (4, 3, 1))
    for chosen in (logits[0], logits, logits[:2], logits[0]):
        rows = np.broadcast_to([1, 2, 3], chosen.shape[:-1])
        assert np.array_equal(hw.sample(chosen, params), hw.sample(chosen, top_k=rows, seed=3))
    with pytest.raises(ValueError, match=r"^top_k: "):
        hw.sample(logits[0, :2], params)
