"""hw.multi_head_attention: the two literal uses, worked examples, projections, heads, and the laws of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, LAYOUTS, UNIT, laid_out, normal, same_bits, wide

import headway as hw
from headway import reference

# Worked examples. The results were computed apart from this project, at 40 digits.
Q = [[1, 0, 2, -1], [0, 1, 1, 1], [2, -1, 0, 3]]
K = [[1, 1, 0, 2], [0, 2, -1, 1], [1, -1, 1, 0]]
V = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
X = [[1, 0, -1, 2], [0, 1, 1, 0], [2, 1, 0, -1]]
W_Q = [[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
W_K = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
W_V = [[2, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 1]]
W_O = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, -1]]


def test_projected_matrices_as_nested_lists_rounded_to_six_decimals() -> None:
    out = hw.multi_head_attention(Q, K, V, num_heads=2, decimals=6)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float64
    assert out.tolist() == [
        [5.0, 6.0, 10.458379, 11.458379],
        [4.074498, 5.074498, 5.83208, 6.83208],
        [7.37965, 8.37965, 3.524094, 4.524094],
    ]


def test_the_same_under_a_causal_mask_of_zeros_and_ones() -> None:
    mask = np.tril(np.ones((3, 3)))
    out = hw.multi_head_attention(Q, K, V, num_heads=2, mask=mask, decimals=6)
    assert out.tolist() == [
        [1.0, 2.0, 3.0, 4.0],
        [3.679046, 4.679046, 3.782281, 4.782281],
        [7.37965, 8.37965, 3.524094, 4.524094],
    ]
    assert same_bits(hw.multi_head_attention(Q, K, V, num_heads=2, mask=mask.tolist(), decimals=6), out)
    assert same_bits(hw.multi_head_attention(Q, K, V, num_heads=2, causal=True, decimals=6), out)


def test_weights_heads_and_a_mask() -> None:
    """Q, K, V (L, d_model), Wq, Wk, Wv, Wo (d_model, d_model), num_heads, a 0/1 mask (L, L)."""
    x = np.array(X, float)
    out = hw.multi_head_attention(
        x, x, x, num_heads=2, w_q=W_Q, w_k=W_K, w_v=W_V, w_o=W_O, mask=np.tril(np.ones((3, 3)))
    )
    want = [
        [6.0, 0.0, -1.0, -2.0],
        [3.8044296825069569, 0.5, -0.10885936501391381, -1.8044296825069569],
        [3.4088721098948107, 0.91205126122449356, 1.3479973613964775, -0.85603383530211799],
    ]
    assert np.allclose(out, want, rtol=4e-16, atol=4e-16)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("L", "d_model", "num_heads"), [(1, 8, 1), (10, 64, 8), (50, 48, 3), (33, 512, 8)])
def test_sizes_from_a_textbook(L: int, d_model: int, num_heads: int, dtype: str) -> None:
    rng = np.random.default_rng(L)
    q, k, v = normal(rng, 3, L, d_model, dtype=dtype)
    w_q, w_k, w_v, w_o = (w / np.sqrt(d_model).astype(dtype) for w in normal(rng, 4, d_model, d_model, dtype=dtype))
    mask = np.tril(np.ones((L, L)))
    out = hw.multi_head_attention(q, k, v, num_heads=num_heads, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, mask=mask)
    weights = {"w_q": w_q, "w_k": w_k, "w_v": w_v, "w_o": w_o}
    want = reference.multi_head_attention(q, k, v, num_heads=num_heads, mask=mask, **weights)
    assert out.shape == (L, d_model)
    assert out.dtype == dtype
    assert np.max(np.abs(out - want)) < 40 * UNIT[dtype]


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[np.ndarray], dict[str, Any], str]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    flag = st.booleans()
    dtype = draw(st.sampled_from(list(DTYPES)))
    L, S = draw(st.sampled_from([0, 1, 2, 17, 33])), draw(st.sampled_from([0, 1, 3, 16, 40]))
    G = draw(st.sampled_from([1, 2]))
    H = G * draw(st.sampled_from([1, 3]))
    D, E, M = (draw(st.sampled_from([1, 3, 8, 17])) for _ in range(3))
    batch = draw(st.sampled_from([(), (2,), (2, 1)]))
    widths = {"q": H * D, "k": G * D, "v": G * E}
    options: dict[str, Any] = {"num_heads": H, "num_kv_heads": G}
    arrays = []
    for name, length in (("q", L), ("k", S), ("v", S)):
        width = widths[name]
        if draw(flag):
            options[f"w_{name}"] = normal(rng, M, width, dtype=dtype) / DTYPES[dtype](np.sqrt(M))
            if draw(flag):
                options[f"b_{name}"] = normal(rng, width, dtype=dtype)
            width = M
        x = normal(rng, *batch, length, width, dtype=dtype)
        arrays.append(laid_out(x, draw(st.sampled_from([n for n in LAYOUTS if n != "spread"]))))
    if draw(flag):
        options["w_o"] = normal(rng, H * E, 5, dtype=dtype) / DTYPES[dtype](np.sqrt(H * E))
        if draw(flag):
            options["b_o"] = normal(rng, 5, dtype=dtype)
    if draw(flag):
        options["mask"] = rng.random(draw(st.sampled_from([(L, S), (H, L, S), (*batch, 1, L, S)]))) < 0.7
    options["causal"] = draw(st.sampled_from([None, "top_left", "bottom_right"]))
    if draw(flag):
        options["sinks"] = normal(rng, H)
    if draw(flag):
        options["kv_lengths"] = rng.integers(0, S + 1, batch)
    return arrays, options, dtype


@given(calls())
@settings(max_examples=150)
def test_the_layer_is_the_definition(call: tuple[list[np.ndarray], dict[str, Any], str]) -> None:
    (q, k, v), options, dtype = call
    plain = {n: wide(x) if n.startswith(("w_", "b_")) else x for n, x in options.items()}
    want, want_lse = reference.multi_head_attention(wide(q), wide(k), wide(v), return_lse=True, **plain)
    out, lse = hw.multi_head_attention(q, k, v, return_lse=True, **options)
    assert out.dtype == DTYPES[dtype]
    assert out.shape == want.shape
    assert lse.shape == want_lse.shape
    # Between the steps 16-bit inputs stay float32, so their error is the final rounding and little else.
    unit = UNIT["float64" if dtype == "float64" else "float32"]
    size = np.max(np.abs(want), initial=1)
    assert np.max(np.abs(wide(out) - want), initial=0) <= 400 * unit * size + UNIT[dtype] * size
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    assert np.allclose(lse[finite], want_lse[finite], rtol=400 * unit, atol=400 * unit)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_layer_is_its_steps_in_bits(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, y = normal(rng, 2, 9, 24, dtype=dtype), normal(rng, 2, 11, 24, dtype=dtype)
    w_q, w_k, w_v, w_o = (normal(rng, *s, dtype=dtype) for s in ((24, 32), (24, 16), (24, 12), (24, 24)))
    b_o = normal(rng, 24, dtype=dtype)
    got = hw.multi_head_attention(
        x, y, y, num_heads=4, num_kv_heads=2, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o, b_o=b_o, causal="top_left"
    )
    q, k, v = (
        hw.linear(a, w).reshape(2, a.shape[1], h, -1).swapaxes(1, 2)
        for a, w, h in ((x, w_q, 4), (y, w_k, 2), (y, w_v, 2))
    )
    heads = hw.attention(q, k, v, causal="top_left").swapaxes(1, 2).reshape(2, 9, 24)
    assert same_bits(got, hw.linear(heads, w_o, b_o))


def test_a_row_of_the_layer_does_not_depend_on_the_other_rows_or_the_batch() -> None:
    rng = np.random.default_rng(2)
    x = normal(rng, 3, 40, 24)
    weights = dict(zip(("w_q", "w_k", "w_v", "w_o"), normal(rng, 4, 24, 24), strict=True))
    whole = hw.multi_head_attention(x, x, x, num_heads=3, causal=True, **weights)
    one = hw.multi_head_attention(x[1, 30:31], x[1, :31], x[1, :31], num_heads=3, causal="bottom_right", **weights)
    assert same_bits(one, whole[1, 30:31])


@pytest.mark.parametrize("decimals", [0, 1, 6, 12])
def test_decimals_round_to_nearest(decimals: int) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 20, 8))
    exact = hw.multi_head_attention(q, k, v, num_heads=2)
    rounded = hw.multi_head_attention(q, k, v, num_heads=2, decimals=decimals)
    assert rounded.tolist() == [[round(x, decimals) for x in row] for row in exact.tolist()]


def test_decimals_leave_no_negative_zero() -> None:
    v = [[-1e-9, 1e-9]]
    out = hw.multi_head_attention([[1.0, 1.0]], [[1.0, 1.0]], v, num_heads=1, decimals=6)
    assert out.tolist() == [[0.0, 0.0]]
    assert not np.signbit(out).any()


def test_one_head_is_attention_itself() -> None:
    rng = np.random.default_rng(4)
    q, k, v = normal(rng, 6, 16), normal(rng, 9, 16), normal(rng, 9, 5)
    assert same_bits(hw.multi_head_attention(q, k, v, num_heads=1), hw.attention(q[None], k[None], v[None])[0])


def test_a_mask_of_l_by_s_serves_all_heads_and_items() -> None:
    rng = np.random.default_rng(5)
    x, mask = normal(rng, 2, 7, 12), np.random.default_rng(6).random((7, 7)) < 0.6
    got = hw.multi_head_attention(x, x, x, num_heads=3, mask=mask)
    assert same_bits(got, hw.multi_head_attention(x, x, x, num_heads=3, mask=np.broadcast_to(mask, (2, 3, 7, 7))))


@pytest.mark.parametrize("argument", ["w_k", "w_v"])
def test_a_weight_whose_width_the_heads_do_not_divide(argument: str) -> None:
    x, w = np.ones((2, 4)), np.ones((4, 3))
    with pytest.raises(ValueError, match=rf"^{argument}: expected .* multiple of the 2 heads, got out = 3$"):
        hw.multi_head_attention(x, x, x, num_heads=2, **{argument: w})
    with pytest.raises(ValueError, match=r"^num_kv_heads: expected a divisor of the width 3"):
        hw.multi_head_attention(x, x, x, num_heads=2, num_kv_heads=2, **{argument: w})
