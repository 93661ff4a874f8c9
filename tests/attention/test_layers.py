"""hw.linear, hw.rotary, hw.rms_norm, hw.swiglu: against the definition, and in equal bits under the same laws."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, LAYOUTS, UNIT, assert_close, laid_out, normal, same_bits, wide

import headway as hw
from headway import _native, reference

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 97, 130])
INNER = st.sampled_from([0, 1, 2, 15, 16, 17, 33, 255, 256, 257, 511, 512, 513, 1100])
TYPES = st.sampled_from(list(DTYPES))
LAYOUT = st.sampled_from(LAYOUTS)


def unit(dtype: str) -> float:
    return UNIT["float64" if dtype == "float64" else "float32"]


# linear -------------------------------------------------------------------------------------------------------------


@given(
    SEEDS, st.sampled_from([(), (1,), (5,), (97,), (2, 3), (0,)]), INNER, SIZES, TYPES, LAYOUT, LAYOUT, st.booleans()
)
@settings(max_examples=120)
def test_linear_is_the_definition(
    seed: int, leading: tuple[int, ...], K: int, N: int, dtype: str, x_layout: str, w_layout: str, with_bias: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = normal(rng, *leading, K, dtype=dtype)
    if len(leading) >= 2:
        x = laid_out(x, x_layout)
    w = laid_out(normal(rng, K, N, dtype=dtype), w_layout if w_layout != "spread" else "transposed")
    b = normal(rng, N, dtype=dtype) if with_bias else None
    want = reference.linear(wide(x), wide(w), None if b is None else wide(b))
    # One chain holds at most 256 products; the sums of the chains meet in a tree.
    size = np.abs(wide(x)) @ np.abs(wide(w)) + (0 if b is None else np.abs(wide(b)))
    assert_close(hw.linear(x, w, b), want, unit(dtype) * (2 + np.sqrt(min(K, 256))) * size, dtype)


def test_linear_is_as_exact_as_it_says() -> None:
    """A chain of 256 products and a tree above: the error does not grow with the inner axis as one chain's would."""
    rng = np.random.default_rng(0)
    for K in (256, 4096, 16384):
        x, w = normal(rng, 8, K), normal(rng, K, 32)
        error = hw.linear(x, w) - reference.linear(wide(x), wide(w))
        # One chain of n errs by about 0.3 n units; K / 256 of them, apart, by sqrt(K / 256) times that of 256.
        assert np.sqrt(np.mean(error**2)) < 0.45 * 2.0**-24 * np.sqrt(256 * K), K


@given(SEEDS, st.sampled_from([1, 7, 97, 200]), INNER, SIZES, TYPES, st.data())
@settings(max_examples=120)
def test_linear_rows_and_columns_do_not_depend_on_the_others(
    seed: int, M: int, K: int, N: int, dtype: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    x, w, b = normal(rng, M, K, dtype=dtype), normal(rng, K, N, dtype=dtype), normal(rng, N, dtype=dtype)
    whole = hw.linear(x, w, b)
    rows, columns = rng.random(M) < 0.3, rng.random(N) < 0.3
    assert same_bits(hw.linear(x[rows], w, b), whole[rows])
    assert same_bits(hw.linear(x, w[:, columns], b[columns]), whole[:, columns])
    x_layout, w_layout = (data.draw(st.sampled_from([x for x in LAYOUTS if x != "spread"])) for _ in range(2))
    assert same_bits(hw.linear(laid_out(x, x_layout), laid_out(w, w_layout), b), whole)


def test_a_fused_multiply_add_rounds_once() -> None:
    want = [s * (1 + 2.0**-23) for s in (1, 1, -1, -1)]
    assert hw.linear(cases.ONCE_X, cases.ONCE_W)[:, 0].tolist() == want


def test_linear_takes_a_stored_transpose_and_any_strides() -> None:
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        x, w = normal(rng, 4, 6, 40, dtype=dtype), normal(rng, 40, 50, dtype=dtype)
        want = hw.linear(x, w)
        assert same_bits(hw.linear(x, np.ascontiguousarray(w.T).T), want)
        assert same_bits(hw.linear(x[::-1, ::-1], w), np.ascontiguousarray(want[::-1, ::-1]))
        assert same_bits(hw.linear(x.swapaxes(0, 1), w), np.ascontiguousarray(want.swapaxes(0, 1)))
        broadcast = np.broadcast_to(x[0, 0], (3, 40))
        assert same_bits(hw.linear(broadcast, w), np.repeat(want[:1, 0], 3, axis=0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_has_the_same_bits_on_every_way_through_the_weights(dtype: str) -> None:
    """Few rows and many, columns or rows of w contiguous, lines that begin anywhere, chains and lines that are cut."""
    rng = np.random.default_rng(3)
    for K in (15, 31, 64, 255, 256, 257, 300, 512, 544, 576, 800, 1100):
        for N in (1, 15, 16, 17, 40, 64, 79, 130):
            x, w = normal(rng, 66, K, dtype=dtype), normal(rng, K, N, dtype=dtype)
            want = hw.linear(x, w)
            stored = np.zeros((N, K + 3), w.dtype)
            stored[:, 1 : K + 1] = w.T
            for other in (w, np.ascontiguousarray(w.T).T, stored[:, 1 : K + 1].T):
                for M in (1, 2, 3, 4, 5, 8, 12, 13, 24, 25):
                    assert same_bits(hw.linear(x[:M], other), want[:M]), (K, N, M)
            for M in (1, 2, 3, 4, 5, 8, 24, 64, 65):
                assert same_bits(cases.in_panels(x[:M], other), want[:M]), (K, N, M)


def test_panels_that_no_kernel_takes_are_refused() -> None:
    x, y, panels = np.zeros((30, 20), np.float32), np.zeros((30, 33), np.float32), np.zeros((3, 20, 16), np.float32)
    for bad, float64, fast in ((panels, True, False), (panels, False, True), (panels[:2], False, False)):
        with pytest.raises(ValueError, match=r"^w: "):
            _native.linear(x, bad, None, float64, fast, y)
    with pytest.raises(ValueError, match=r"^w: "):
        _native.linear(x, np.zeros((3, 16, 20), np.float32).swapaxes(1, 2), None, False, False, y)
    for w, into in (
        (np.zeros((20, 33), np.uint8), np.zeros((3, 20, 16), np.uint8)),
        (np.zeros((20, 33), np.float16), panels),
    ):
        with pytest.raises(ValueError, match=r"^panels: "):
            _native.pack(w, into)


def test_linear_lets_nan_reach_its_own_row_and_column_only() -> None:
    rng = np.random.default_rng(2)
    x, w = normal(rng, 20, 70), normal(rng, 70, 40)
    want = hw.linear(x, w)
    x[3, 5], w[8, 9] = np.nan, np.inf
    out = hw.linear(x, w)
    assert np.isnan(out[3]).all()
    rest = np.ones((20, 40), bool)
    rest[3], rest[:, 9] = False, False
    assert np.array_equal(out[rest], want[rest])


# rotary -------------------------------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.sampled_from([(), (2,), (2, 3)]),
    SIZES,
    st.sampled_from([2, 4, 16, 30, 64, 66, 130]),
    TYPES,
    LAYOUT,
    st.data(),
)
@settings(max_examples=150)
def test_rotary_is_the_definition(
    seed: int, batch: tuple[int, ...], L: int, D: int, dtype: str, layout: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    x = normal(rng, *batch, L, D, dtype=dtype)
    x = laid_out(x, layout if batch or layout != "spread" else "transposed")
    options: dict[str, Any] = {}
    largest = data.draw(st.sampled_from([10, 4096, 2**24 - 1]))
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([(L,), (*batch, L)]))
        options["positions"] = rng.integers(0, largest + 1, shape)
    if data.draw(st.booleans()):
        options["base"] = data.draw(st.sampled_from([1.0, 500.0, 500_000.0]))
    elif data.draw(st.booleans()):
        options["frequencies"] = rng.random(D // 2) * 0.99
    want = reference.rotary(wide(x), **options)
    size = np.abs(wide(x))
    size = np.hypot(size[..., : D // 2], size[..., D // 2 :])
    size = np.concatenate([size, size], axis=-1)
    # An angle of 2^24 carries float64's own rounding of position * frequency: 2^24 * 2^-53, in both.
    angle = np.max(options.get("positions", L), initial=0) * 2.0**-51
    assert_close(hw.rotary(x, **options), want, (3 * unit(dtype) + angle) * size, dtype)


def test_rotary_by_hand() -> None:
    x = np.array([[1.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    c, s = np.cos([1.0, 0.01]), np.sin([1.0, 0.01])
    assert np.allclose(hw.rotary(x), [[1, 2, 0, 0], [c[0], 2 * c[1], s[0], 2 * s[1]]], rtol=1e-15)


def test_rotary_does_not_depend_on_what_stands_beside() -> None:
    rng = np.random.default_rng(3)
    for dtype in DTYPES:
        x, positions = normal(rng, 2, 3, 40, 34, dtype=dtype), rng.integers(0, 5000, 40)
        whole = hw.rotary(x, positions=positions)
        assert same_bits(hw.rotary(x[1, 2, 7:9], positions=positions[7:9]), whole[1, 2, 7:9])
        shuffled = rng.permutation(40)
        assert same_bits(hw.rotary(x[..., shuffled, :], positions=positions[shuffled]), whole[..., shuffled, :])
        per_item = np.broadcast_to(positions, (2, 3, 40))
        assert same_bits(hw.rotary(x, positions=per_item), whole)
        assert same_bits(hw.rotary(x), hw.rotary(x, positions=np.arange(40)))
        for layout in LAYOUTS:
            assert same_bits(hw.rotary(laid_out(x, layout), positions=positions), whole), layout


# rms_norm and swiglu --------------------------------------------------------------------------------------------


@given(
    SEEDS,
    st.sampled_from([(), (1,), (9,), (2, 3), (0,)]),
    SIZES.filter(bool),
    TYPES,
    st.sampled_from([1e-12, 1e-6, 0.1]),
)
@settings(max_examples=150)
def test_rms_norm_is_the_definition(seed: int, leading: tuple[int, ...], n: int, dtype: str, eps: float) -> None:
    rng = np.random.default_rng(seed)
    x, weight = normal(rng, *leading, n, dtype=dtype), normal(rng, n, dtype=dtype)
    want = reference.rms_norm(wide(x), wide(weight), eps=eps)
    assert_close(hw.rms_norm(x, weight, eps=eps), want, unit(dtype) * (6 + np.sqrt(n / 16)) * np.abs(want), dtype)


@given(SEEDS, st.sampled_from([(), (1,), (9,), (2, 3), (0,)]), SIZES, TYPES, st.sampled_from([0.01, 1.0, 30.0, 500.0]))
@settings(max_examples=150)
def test_swiglu_is_the_definition(seed: int, leading: tuple[int, ...], n: int, dtype: str, spread: float) -> None:
    rng = np.random.default_rng(seed)
    gate = (normal(rng, *leading, n) * spread).astype(DTYPES[dtype])
    up = normal(rng, *leading, n, dtype=dtype)
    want = reference.swiglu(wide(gate), wide(up))
    # exp gives 0 below the smallest normal number; a product with it may be off by that much.
    floor = (2.0**-1022 if dtype == "float64" else 2.0**-126) * 1e4
    assert_close(hw.swiglu(gate, up), want, 6 * unit(dtype) * np.abs(want) + floor, dtype)


def test_rows_do_not_depend_on_the_others_or_on_strides() -> None:
    rng = np.random.default_rng(4)
    for dtype in DTYPES:
        x, up, weight = (normal(rng, *shape, dtype=dtype) for shape in ((2, 9, 37), (2, 9, 37), (37,)))
        norm, gated = hw.rms_norm(x, weight), hw.swiglu(x, up)
        assert same_bits(hw.rms_norm(x[1, 4], weight), norm[1, 4])
        assert same_bits(hw.swiglu(x[1, 4], up[1, 4]), gated[1, 4])
        assert same_bits(hw.swiglu(x[1, 4, 3:5], up[1, 4, 3:5]), gated[1, 4, 3:5])  # element by element
        for layout in [name for name in LAYOUTS if name != "spread"]:
            assert same_bits(hw.rms_norm(laid_out(x, layout), weight), norm), layout
            assert same_bits(hw.swiglu(laid_out(x, layout), laid_out(up, "reversed")), gated), layout


def test_zeros_and_extremes() -> None:
    assert np.array_equal(hw.rms_norm(np.zeros((2, 5), np.float32), np.ones(5, np.float32)), np.zeros((2, 5)))
    gate = np.array([-1e30, -100.0, 0.0, 100.0, 1e30], np.float32)
    assert np.array_equal(hw.swiglu(gate, np.ones(5, np.float32)), np.array([0, 0, 0, 100, 1e30], np.float32))
    assert np.isnan(hw.swiglu(np.array([np.nan]), np.array([1.0])))[0]
    assert np.isnan(hw.rms_norm(np.array([np.nan, 1.0]), np.ones(2))).all()


def test_types_promote_as_numpy_does() -> None:
    bf16 = DTYPES["bfloat16"]
    x, w = np.ones((2, 4)), np.ones((4, 4))
    for a, b, want in [
        (np.float16, np.float32, np.float32),
        (np.float32, np.float64, np.float64),
        (np.float16, bf16, np.float32),
        (bf16, bf16, bf16),
        (np.int64, np.float32, np.float64),
    ]:
        assert hw.linear(x.astype(a), w.astype(b)).dtype == want
        assert hw.rms_norm(x.astype(a), w[0].astype(b)).dtype == want
        assert hw.swiglu(x.astype(a), x.astype(b)).dtype == want
    for dtype in DTYPES.values():
        assert hw.rotary(x.astype(dtype)).dtype == dtype


@pytest.mark.parametrize("call", [lambda x: hw.rotary(x), lambda x: hw.linear(x, x[0].T), lambda x: hw.swiglu(x, x)])
def test_inputs_are_not_written_to(call: Any) -> None:
    x = normal(np.random.default_rng(5), 2, 8, 8)
    before = x.copy()
    x.flags.writeable = False
    out = call(x)
    assert same_bits(x, before)
    assert not np.shares_memory(out, x)


def test_rms_norm_of_numbers_whose_squares_float32_cannot_hold():
    x = np.full(40, 1e30, np.float32)
    np.testing.assert_allclose(hw.rms_norm(x, np.ones(40, np.float32)), 1, rtol=1e-6)
