"""Numbers near the largest of their type (A41): what is computed on the way has room, and only results can overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from oracles import CHUNK, DTYPES, UNIT, same_bits, wide

import headway as hw
from headway import reference
from headway.reference import allowed_keys

LARGEST = {"float64": float(np.finfo("d").max), "float32": float(np.finfo("f").max), "bfloat16": 2.0**127 * 1.9921875}
LARGEST["float16"] = 65504.0
Rng = np.random.Generator


def number(x: Fraction, dtype: str) -> float:
    """A fraction rounded to the type; infinite where it lies beyond."""
    try:
        y = float(x)
    except OverflowError:
        y = math.copysign(math.inf, x)
    with np.errstate(over="ignore"):
        return float(np.float64(y).astype(DTYPES[dtype]))


def exact(q: Any, k: Any, v: Any, allowed: Any, scale: float, bias: Any, softcap: Any, sinks: Any) -> Any:
    """The formula for one head, in fractions but for exp and tanh: weights, averages and log-sum-exp, as fractions."""
    q, k, v = ([[Fraction(float(x)) for x in row] for row in wide(m)] for m in (q, k, v))
    weights, out, logs = [], [], []
    for i, query in enumerate(q):
        keys = [j for j in range(len(k)) if allowed[i, j]]
        score = {j: sum(a * b for a, b in zip(query, k[j], strict=True)) * Fraction(scale) for j in keys}
        if softcap:
            near = {j: max(min(s / Fraction(softcap), Fraction(30)), Fraction(-30)) for j, s in score.items()}
            score = {j: Fraction(softcap) * Fraction(math.tanh(x)) for j, x in near.items()}
        score = {j: s + Fraction(float(bias[i, j])) for j, s in score.items()}
        top = max(score.values())
        exponential = {j: Fraction(math.exp(max(s - top, Fraction(-1000)))) for j, s in score.items()}
        keys_alone = sum(exponential.values())
        sink = Fraction(0) if sinks is None else Fraction(sinks) - top
        factor = Fraction(1)
        if sinks is not None and sink > 0:  # measured against the sink, which is larger
            factor, sink = Fraction(math.exp(max(-sink, Fraction(-1000)))), Fraction(0)
        share = Fraction(0) if sinks is None else Fraction(math.exp(max(sink, Fraction(-1000))))
        total = keys_alone * factor + share
        weights.append([exponential.get(j, Fraction(0)) * factor / total for j in range(len(k))])
        out.append([sum(w * row[e] for w, row in zip(weights[-1], v, strict=True)) for e in range(len(v[0]))])
        logs.append(top + Fraction(math.log(keys_alone)))
    return weights, out, logs


def signs(rng: Rng, *shape: int) -> Any:
    return rng.choice([-1.0, 1.0], shape)


# Each gives q (L, D), k (S, D), v (S, E) and options, for a type whose largest number is M.
L, S, D, E = 5, 23, 6, 4
Problem = tuple[Any, Any, Any, dict[str, Any]]


def ordinary(rng: Rng, M: float) -> Problem:
    return rng.normal(size=(L, D)), rng.normal(size=(S, D)), rng.normal(size=(S, E)), {}


def values(rng: Rng, M: float) -> Problem:
    q, k, _, _ = ordinary(rng, M)
    return q, k, M * rng.uniform(0.9, 1, (S, E)), {}


def the_largest_value(rng: Rng, M: float) -> Problem:
    q, k, _, _ = ordinary(rng, M)
    return q, k, np.broadcast_to(signs(rng, E) * M, (S, E)), {}


def values_of_both_signs(rng: Rng, M: float) -> Problem:
    q, k, _, _ = ordinary(rng, M)
    v = M * rng.uniform(0.5, 1, (S, E)) * signs(rng, S, E)
    v[:, 0] = rng.normal(size=S)  # a feature beside them that is as always
    return q, k, v, {}


def products(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    root = 0.9 * M**0.5
    return q * root, k * root, v, {"scale": 4 / M}


def products_one_side(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    return q * M**0.2, k * M**0.8, v, {"scale": 4 / M}


def products_and_values(rng: Rng, M: float) -> Problem:
    q, k, _, options = products(rng, M)
    return q, k, values_of_both_signs(rng, M)[2], options


def products_that_cancel(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    root = M**0.501
    q[:, 0], q[:, 1], k[:, 0] = root, root, root * rng.choice([1.0, 2.0, 0.5], S)
    k[:, 1] = -k[:, 0]
    return q, k, v, {}


def scores_beyond(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    return q * M**0.5, k * M**0.49, v, {}


def large_bias(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    return q, k, v, {"bias": M * rng.uniform(-1, 1, (L, S))}


def capped(rng: Rng, M: float) -> Problem:
    q, k, v, options = products(rng, M)
    return q, k, v, {**options, "softcap": 3.0}


def capped_above(rng: Rng, M: float) -> Problem:
    q, k, v, options = capped(rng, M)  # products of one sign, whose infinity a softcap would hide
    return np.abs(q), np.abs(k), v, options


def capped_far_away(rng: Rng, M: float) -> Problem:
    q, k, v, _ = ordinary(rng, M)
    return q * M**0.52, k * M**0.5, v, {"softcap": 30.0}


PROBLEMS: list[Callable[[Rng, float], Problem]] = [
    *(ordinary, values, the_largest_value, values_of_both_signs, products, products_one_side, products_and_values),
    *(products_that_cancel, scores_beyond, large_bias, capped, capped_above, capped_far_away),
]
RULES: list[dict[str, Any]] = [
    {},
    {"causal": "bottom_right"},
    {"mask": "some"},
    {"kv_lengths": 17},
    {"causal": "top_left", "window": (2, 0)},
    {"sinks": 0.5},
    {"sinks": 3e4},
]


def inputs(problem: Callable[[Rng, float], Problem], rules: dict[str, Any], dtype: str) -> Any:
    rng = np.random.default_rng([PROBLEMS.index(problem), len(repr(rules))])
    q, k, v, options = problem(rng, LARGEST[dtype])
    limit = LARGEST[dtype]
    q, k, v = (np.clip(x, -limit, limit).astype(DTYPES[dtype]) for x in (q, k, v))
    compute = "float64" if dtype == "float64" else "float32"
    if "bias" in options:
        options["bias"] = np.clip(options["bias"], -LARGEST[compute], LARGEST[compute]).astype(compute)
    options = {**options, **rules}
    if "mask" in rules:
        options["mask"] = rng.random((L, S)) < 0.5
        options["mask"][:, 3] = True
    if "sinks" in rules:
        options["sinks"] = np.array([rules["sinks"]], compute)
    return q[None], k[None], v[None], options


def bound(q: Any, k: Any, options: dict[str, Any], dtype: str) -> float:
    """What rounding may make of a weight, relatively, as in oracles.tolerance: it grows with the scores."""
    unit = UNIT["float64" if dtype == "float64" else "float32"]
    top = [max((abs(Fraction(float(x))) for x in wide(m).ravel()), default=Fraction(0)) for m in (q, k)]
    scale = abs(Fraction(options.get("scale", D**-0.5)))
    size = float(min(top[0] * top[1] * scale * D, Fraction(10**18)))
    if options.get("softcap"):
        size = min(size, 4 * options["softcap"])
    return unit * (2 * size * (2 + math.sqrt(D)) + 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda f: f.__name__)
def test_a41_only_a_result_overflows(problem: Any, rules: dict[str, Any], dtype: str) -> None:
    q, k, v, options = inputs(problem, rules, dtype)
    rule = {n: options[n] for n in ("mask", "causal", "window", "kv_lengths") if n in options}
    allowed = allowed_keys((1, L, S), **rule)[0]
    bias = wide(options.get("bias", np.zeros((L, S))))
    sinks = None if "sinks" not in options else float(options["sinks"][0])
    scale = options.get("scale", D**-0.5)
    weights, out, logs = exact(q[0], k[0], v[0], allowed, scale, bias, options.get("softcap"), sinks)
    got, lse = hw.attention(q, k, v, return_lse=True, **options)
    assert same_bits(hw.attention(q, k, v, **options), got)  # whether or not the logarithm is asked for
    relative = bound(q, k, options, dtype)
    compute = "float64" if dtype == "float64" else "float32"
    shown = hw.attention_weights(q, k, **options)
    decided = relative < 0.5
    if not decided and problem is not products_that_cancel:  # where what rounding leaves decides
        decided = all(sum(row) < 1e-9 or max(row) > 1 - 1e-9 for row in weights)
        assert decided
        relative = UNIT[compute] * 8
    for i in range(L):
        want_log = number(logs[i], compute)
        assert np.isinf(lse[0, i]) == np.isinf(want_log) or abs(float(logs[i])) > 0.99 * LARGEST[compute]
        if not decided:
            continue
        if np.isfinite(want_log):
            assert abs(float(lse[0, i]) - want_log) <= relative + 4 * UNIT[compute] * abs(want_log)
        for j in range(S):
            want = float(weights[i][j])
            assert abs(float(shown[0, i, j]) - want) <= relative + UNIT[dtype]
        for e in range(E):
            largest = float(np.max(np.abs(wide(v)[0, :, e])))
            assert np.isfinite(got[0, i, e])
            error = abs(Fraction(float(got[0, i, e])) - out[i][e])
            assert error <= Fraction(largest) * Fraction(relative + UNIT[dtype] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda f: f.__name__)
def test_a41_everywhere_attention_is_computed(problem: Any, dtype: str, keep_threads: None) -> None:
    """Row by row, in a batch, from a cache, by any threads, in heads of a group, among rows that need no more range."""
    q, k, v, options = inputs(problem, {}, dtype)
    if "bias" in options:
        options["bias"] = options["bias"][:1]
    plain = [np.random.default_rng(1).normal(size=x.shape).astype(x.dtype) for x in (q, k, v)]
    want = hw.attention(q, k, v, return_lse=True, **options)
    weights = hw.attention_weights(q, k, **options)
    alone = hw.attention(*plain, return_lse=True, **options)
    for i in range(L):
        row = hw.attention(q[:, i : i + 1], k, v, return_lse=True, **options)
        assert same_bits(row, tuple(x[:, i : i + 1] for x in want))
    both = hw.attention(*(np.stack(x) for x in zip((q, k, v), plain, strict=True)), return_lse=True, **options)
    assert same_bits(tuple(x[0] for x in both), want)
    assert same_bits(tuple(x[1] for x in both), alone)
    mixed = hw.attention(np.concatenate([q, plain[0]], 1), k, v, **options)
    assert same_bits(mixed[:, :L], want[0])
    assert same_bits(mixed[:, L:], hw.attention(plain[0], k, v, **options))
    grouped = np.concatenate([q, q * 0, q])
    assert same_bits(hw.attention(grouped, k, v, **options)[[0, 2]], np.concatenate([want[0]] * 2))
    for threads in (1, 3):
        hw.set_num_threads(threads)
        assert same_bits(hw.attention(q, k, v, return_lse=True, **options), want)
        assert same_bits(hw.attention_weights(q, k, **options), weights)
    cache = hw.KVCache(1, D, value_dim=E, dtype=DTYPES[dtype])
    for j in range(S):
        cache.append(k[:, j : j + 1], v[:, j : j + 1])
    assert same_bits(cache.attend(q, causal=None, return_lse=True, **options), want)
    if dtype != "float64":
        fast = hw.attention(q, k, v, precision="fast", **options)
        assert np.array_equal(np.isfinite(wide(fast)), np.isfinite(wide(want[0])))
    if "bias" not in options:
        layer = hw.multi_head_attention(q[0], k[0], v[0], num_heads=1, **options)
        assert same_bits(layer, want[0][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a41_over_many_chunks(dtype: str, keep_threads: None) -> None:
    largest = LARGEST[dtype]
    rng = np.random.default_rng(3)
    n = 3 * CHUNK + 7
    q, k = rng.normal(size=(2, 1, 3, D)), rng.normal(size=(2, 1, n, D))
    v = (largest * rng.uniform(0.9, 1, (2, 1, n, E))).astype(DTYPES[dtype])
    q, k = (x.astype(DTYPES[dtype]) for x in (q, k))
    got = hw.attention(q, k, v)
    half = (wide(v) / 4).astype(DTYPES[dtype])
    tolerance = largest * (40 * UNIT["float64" if dtype == "float64" else "float32"] + 2 * UNIT[dtype])
    assert np.max(np.abs(wide(got) / 4 - wide(hw.attention(q, k, half)))) * 4 <= tolerance
    for threads in (1, 2):
        hw.set_num_threads(threads)
        assert same_bits(hw.attention(q, k, v), got)
    assert same_bits(hw.attention(q[1], k[1], v[1]), got[1])


def test_a20_infinite_and_nan_inputs_are_what_they_were() -> None:
    """More range gives no other answer to what has none, and touches no number beside it."""
    rng = np.random.default_rng(5)
    for dtype in DTYPES:
        q, k, v = (rng.normal(size=(1, n, 8)).astype(DTYPES[dtype]) for n in (4, 40, 40))
        want, want_lse = hw.attention(q, k, v, return_lse=True)
        v[0, 3, 2], v[0, 4, 5] = np.nan, np.inf
        got, lse = hw.attention(q, k, v, return_lse=True)
        assert same_bits(lse, want_lse)
        assert np.isnan(wide(got)[..., 2]).all()
        assert np.isposinf(wide(got)[..., 5]).all()
        others = [0, 1, 3, 4, 6, 7]
        assert same_bits(got[..., others].copy(), want[..., others].copy())
        q[0, 1, 0] = np.inf
        got = hw.attention(q, k, v, causal="bottom_right")
        assert np.isnan(wide(got)[0, 1]).all()
        rest = hw.attention(q[:, 2:], k, v, causal="bottom_right")
        assert same_bits(got[:, 2:3, others].copy(), rest[:, :1, others].copy())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a41_states_keep_the_infinity(dtype: str) -> None:
    """A part is handed on in the computing type: merging what overflowed in it gives no average."""
    v = np.full((1, 2, 3), LARGEST[dtype], dtype)
    x = np.zeros((1, 2, 3), dtype)
    assert np.isposinf(hw.merge_attention([hw.partial_attention(x, x, v)])).all()
    assert same_bits(hw.attention(x, x, v), v)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda f: f.__name__)
def test_a41_the_reference_says_the_same(problem: Any) -> None:
    q, k, v, options = inputs(problem, {}, "float64")
    want = reference.attention(q, k, v, **options)
    got = hw.attention(q, k, v, **options)
    assert np.array_equal(np.isfinite(got), np.isfinite(want))
    if bound(q, k, options, "float64") < 0.5:
        assert np.max(np.abs(got / 4 - want / 4)) <= np.max(np.abs(v)) / 4 * (bound(q, k, options, "float64") * 2)
