"""precision="fast": outside the contract of bits, inside the contract of meaning.

Where the machine has no 16-bit dot product, fast is exact, and these tests hold all the more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CHUNK, DTYPES, LAYOUTS, laid_out, normal, same_bits, wide

import headway as hw
from headway import reference

NARROW = ["float32", "float16", "bfloat16"]
UNIT = 2.0**-8  # half the distance between neighbouring bfloat16 numbers near 1


def close(got: Any, want: np.ndarray, v: np.ndarray) -> bool:
    """Rounding q, k, weights and v to bfloat16: a few units of the largest value, far less on average."""
    error = np.abs(wide(got) - want)
    return bool(error.max(initial=0) <= 6 * UNIT * np.abs(wide(v)).max(initial=1e-30))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 5, 16, 23, 24, 25, 70, 130]),
    st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 255, 257, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 5]),
    st.sampled_from([1, 2, 7, 16, 33, 64]),
    st.sampled_from([1, 16, 19, 64]),
    st.sampled_from(NARROW),
    st.data(),
)
@settings(max_examples=150)
def test_fast_is_the_definition_up_to_bfloat16(
    seed: int, L: int, S: int, D: int, E: int, dtype: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, *shape, dtype=dtype) for shape in ((4, L, D), (2, S, D), (2, S, E)))
    options: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {},
                {"causal": "bottom_right"},
                {"causal": "top_left", "window": (20, 3)},
                {"mask": rng.random((4, L, S)) < 0.6},
                {"mask": np.repeat(rng.random((4, L, -(-S // 64))) < 0.4, 64, -1)[..., :S]},
                {"bias": normal(rng, 4, L, S), "sinks": normal(rng, 4)},
                {"softcap": 5.0, "kv_lengths": int(rng.integers(0, S + 1))},
            ]
        )
    )
    layout = data.draw(st.sampled_from(LAYOUTS))
    q, k, v = (laid_out(x, layout) for x in (q, k, v))
    out, lse = hw.attention(q, k, v, precision="fast", return_lse=True, **options)
    want, want_lse = reference.attention(wide(q), wide(k), wide(v), return_lse=True, **options)
    assert close(out, want, v)
    nothing = np.isneginf(want_lse)
    assert (np.isneginf(lse) == nothing).all()
    assert not wide(out)[nothing].any()
    # A score is off by 2 units times |q| |k| / sqrt(D), which here is below 8 sqrt(D).
    assert np.abs(lse[~nothing] - want_lse[~nothing]).max(initial=0) <= 8 * UNIT * (1 + np.sqrt(D))


def test_how_exact(capsys: pytest.CaptureFixture[str]) -> None:
    """Two roundings to bfloat16, of the weights and of the result (q, k and v are bfloat16 already).

    One rounding is off by 2^-8 x sqrt(3 / (8 x 3 ln 2)) = 0.425 x 2^-8 of the number on average, its mantissa being
    anywhere; two that know nothing of each other by 0.60 x 2^-8.
    """
    rng = np.random.default_rng(0)
    q, k, v = (normal(rng, 4, 512, 64, dtype="bfloat16") for _ in range(3))
    want = reference.attention(wide(q), wide(k), wide(v))
    error = wide(hw.attention(q, k, v, precision="fast")) - want
    rms = np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(want**2))
    with capsys.disabled():
        print(f"\nattention, fast: rms error {rms / UNIT:.2f} x 2^-8 of the result's rms")
    assert rms <= 1.1 * 0.60 * UNIT


@given(st.integers(0, 2**32 - 1), st.sampled_from(NARROW), st.integers(1, 60), st.integers(1, 700))
@settings(max_examples=60)
def test_masked_keys_may_hold_anything(seed: int, dtype: str, L: int, S: int) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (normal(rng, 2, n, 8, dtype=dtype) for n in (L, S, S))
    hidden = rng.random(S) < 0.3
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[:, hidden], poisoned_v[:, hidden] = np.nan, np.inf
    for options in ({"mask": ~hidden}, {"bias": np.where(hidden, -np.inf, 0)}):
        want = wide(hw.attention(q, k, v, precision="fast", **options))
        got = wide(hw.attention(q, poisoned_k, poisoned_v, precision="fast", **options))
        assert np.isfinite(got).all()
        assert close(got, want, v)
    if dtype == "float32":  # finite, but not in bfloat16
        poisoned_v[:, hidden] = np.finfo(np.float32).max
        assert close(hw.attention(q, k, poisoned_v, precision="fast", mask=~hidden), want, v)
    n = int(rng.integers(0, S + 1))
    poisoned_k, poisoned_v = k.copy(), v.copy()
    poisoned_k[:, n:], poisoned_v[:, n:] = np.nan, np.nan
    for options in ({"kv_lengths": n}, {"kv_lengths": n, "causal": "top_left"}):
        got = hw.attention(q, poisoned_k, poisoned_v, precision="fast", **options)
        assert same_bits(got, hw.attention(q, k, v, precision="fast", **options))


@pytest.mark.parametrize("dtype", NARROW)
def test_threads_and_batch_do_not_matter(dtype: str, keep_threads: None) -> None:
    """Not promised, and yet so: the work is cut as in exact."""
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 3, heads, n, 64, dtype=dtype) for heads, n in ((4, 50), (1, 1400), (1, 1400)))
    hw.set_num_threads(1)
    want = hw.attention(q, k, v, precision="fast")
    hw.set_num_threads(5)
    assert same_bits(hw.attention(q, k, v, precision="fast"), want)
    assert same_bits(hw.attention(q[1], k[1], v[1], precision="fast"), want[1])


@pytest.mark.parametrize("dtype", NARROW)
def test_few_rows_are_exact(dtype: str) -> None:
    """Decoding waits for memory, not for products."""
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, heads, n, 64, dtype=dtype) for heads, n in ((4, 1), (2, 900), (2, 900)))
    assert same_bits(hw.attention(q, k, v, precision="fast"), hw.attention(q, k, v))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("D", [64, 7])
def test_from_a_cache_and_in_a_layer(dtype: str, D: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (normal(rng, 2, n, D, dtype=dtype) for n in (40, 600, 600))
    cache = hw.KVCache(2, D, dtype=DTYPES[dtype])
    cache.append(k, v)
    want = hw.attention(q, k, v, causal="bottom_right", precision="fast")
    assert same_bits(cache.attend(q, precision="fast"), want)
    x = normal(rng, 50, 32, dtype=dtype)
    exact, fast = (hw.multi_head_attention(x, x, x, num_heads=4, precision=p) for p in ("exact", "fast"))
    assert close(fast, wide(exact), x)


def test_empty_shapes() -> None:
    for L, S in ((0, 3), (3, 0), (0, 0)):
        q, k, v = (np.ones((2, n, 4), np.float32) for n in (L, S, S))
        assert same_bits(hw.attention(q, k, v, precision="fast"), np.zeros((2, L, 4), np.float32))


def test_errors() -> None:
    x = np.ones((1, 2, 4))
    with pytest.raises(ValueError, match=r"precision: expected 'exact' for float64"):
        hw.attention(x, x, x, precision="fast")
    with pytest.raises(ValueError, match=r"precision: expected one of 'exact', 'fast', got 'medium'"):
        hw.attention(x, x, x, precision="medium")


EACH = """
import json, numpy as np, headway as hw
from headway import _native, reference
q, k, v = np.random.default_rng(0).standard_normal((3, 2, 200, 30)).astype(np.float32)
v[:, 70] = np.nan
may = np.arange(200) != 70
options = {"mask": may, "causal": True}
fast, exact = hw.attention(q, k, v, precision="fast", **options), hw.attention(q, k, v, **options)
error = np.abs(fast - reference.attention(q, k, v, **options)).max()
print(json.dumps([hw.info().isa, _native.fast(), bool((fast == exact).all()), float(error)]))
"""


def run_with(**environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", EACH], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("isa", [isa for isa in hw.info().isas if isa != "avx512"])
def test_without_the_instruction_fast_is_exact(isa: str) -> None:
    assert run_with(HEADWAY_ISA=isa)[:3] == [isa, "none", True]


@pytest.mark.parametrize("name", ["amx", "avx512bf16", "none"])
def test_each_set_of_instructions_that_this_machine_has(name: str) -> None:
    try:
        _, used, same, error = run_with(HEADWAY_FAST=name)
    except subprocess.CalledProcessError as failure:
        if "HEADWAY_FAST: expected one of" not in failure.stderr:
            raise
        pytest.skip(f"this machine has no {name}")
    assert used == name
    assert same == (name == "none")
    assert error <= 0.1


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([25, 31, 32, 33, 64, 130]),
    st.sampled_from([0, 1, 2, 15, 31, 32, 33, 130, 1024, 1026]),
    st.sampled_from([1, 15, 16, 17, 63, 64, 65, 130]),
    st.sampled_from(NARROW),
    st.sampled_from(NARROW),
    st.sampled_from([None, *NARROW]),
    st.data(),
)
@settings(max_examples=150)
def test_fast_linear_is_the_definition_up_to_bfloat16(
    seed: int, M: int, K: int, N: int, x_dtype: str, w_dtype: str, b_dtype: str | None, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    layouts = st.sampled_from([layout for layout in LAYOUTS if layout != "spread"])  # which needs heads
    x = laid_out(normal(rng, M, K, dtype=x_dtype), data.draw(layouts))
    w = laid_out(normal(rng, K, N, dtype=w_dtype), data.draw(layouts))
    b = None if b_dtype is None else normal(rng, N, dtype=b_dtype)
    y = hw.linear(x, w, b, precision="fast")
    want = reference.linear(wide(x), wide(w), None if b is None else wide(b))
    # A product is off by 2 units at most; K of them, whose signs are chance, by less than 8 sqrt(K); the result by one.
    assert np.abs(wide(y) - want).max(initial=0) <= UNIT * (16 * np.sqrt(K) + 2 * np.abs(want).max(initial=1))


@pytest.mark.parametrize("place", [(0, 0), (39, 63), (7, 20)])
def test_fast_linear_is_exact_where_bfloat16_overflows(place: tuple[int, int]) -> None:
    """3.4e38 rounds to infinity in bfloat16; what is infinite in the definition stays so."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, 40, 64), normal(rng, 64, 50) * np.float32(1e-3)
    x[place] = 3.4e38
    assert same_bits(hw.linear(x, w, precision="fast"), hw.linear(x, w))
    x[place] = np.inf
    assert same_bits(hw.linear(x, w, precision="fast"), hw.linear(x, w))


def test_few_rows_of_fast_linear_are_exact() -> None:
    rng = np.random.default_rng(0)
    x, w = normal(rng, 24, 70), normal(rng, 70, 50)
    assert same_bits(hw.linear(x, w, precision="fast"), hw.linear(x, w))


def test_fast_projections() -> None:
    rng = np.random.default_rng(0)
    x = normal(rng, 40, 32)
    weights = {name: normal(rng, 32, 32) / np.float32(32**0.5) for name in ("w_q", "w_k", "w_v", "w_o")}
    got = hw.multi_head_attention(x, x, x, num_heads=4, precision="fast", **weights)
    want = hw.multi_head_attention(x, x, x, num_heads=4, **weights)
    assert 0 <= np.abs(got - want).max() < 16 * UNIT


def test_no_fast_linear_in_float64() -> None:
    with pytest.raises(ValueError, match=r"precision: expected 'exact' for float64, got 'fast'.*convert x and w first"):
        hw.linear(np.ones((30, 4)), np.ones((4, 4)), precision="fast")
    with pytest.raises(ValueError, match="precision: expected one of"):
        hw.linear([[1.0]], [[1.0]], precision="quick")  # type: ignore[call-overload]
