"""hw.attention and hw.attention_weights against the definition: all options, alone and together, at all sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    CHUNK,
    DTYPES,
    LAYOUTS,
    UNIT,
    assert_close,
    laid_out,
    normal,
    reference_attention,
    same_bits,
    tolerance,
    wide,
)

import headway as hw
from headway import reference

SHORT = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33]
LONG = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1]
WIDTHS = [1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 127, 130]
BATCHES: list[tuple[tuple[int, ...], ...]] = [  # leading axes of q, k, v
    ((), (), ()),
    ((2,), (2,), (2,)),
    ((3,), (), (1,)),
    ((), (2,), (2,)),
    ((2, 1), (3,), (2, 3)),
    ((0,), (0,), (0,)),
]


@st.composite
def calls(draw: st.DrawFn, with_values: bool = True) -> dict[str, Any]:
    """One call: arrays, layouts and a combination of options. The numbers come from a seed, so drawing is cheap."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    flag = st.booleans()
    dtype = draw(st.sampled_from([*DTYPES, "float32", "float32"]))
    long = draw(st.integers(0, 5)) == 0
    L = draw(st.sampled_from([0, 1, 2, 3] if long else SHORT))
    S = draw(st.sampled_from(LONG if long else SHORT))
    if not long and draw(st.integers(0, 2)) == 0:
        L = S  # where all values of causal and window are allowed
    if not long and draw(st.integers(0, 20)) == 0:
        L, S = draw(st.sampled_from([(CHUNK + 1, 3), (2 * CHUNK, 2)]))
    G = draw(st.sampled_from([1, 2, 3]))
    H = G * draw(st.sampled_from([1, 2, 4]))
    D, E = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from([0, *WIDTHS]))
    batches = draw(st.sampled_from(BATCHES))
    batch = np.broadcast_shapes(*batches[: 3 if with_values else 2])
    spread = draw(st.sampled_from([0.3, 1.0, 4.0]))
    arrays = [
        laid_out((normal(rng, *b, *shape) * spread).astype(DTYPES[dtype]), draw(st.sampled_from(LAYOUTS)))
        for b, shape in zip(batches, [(H, L, D), (G, S, D), (G, S, E)], strict=True)
    ]
    options: dict[str, Any] = {}
    options["causal"] = draw(st.sampled_from([None, "top_left", "bottom_right", *([True, False] if L == S else [])]))
    bounds = st.sampled_from([None, 0, 1, 7, 16, 600])
    if draw(flag) and (options["causal"] or L == S):
        options["window"] = (draw(bounds), draw(bounds))
    if draw(flag):
        options["scale"] = draw(st.sampled_from([0.125, 1.0, -0.5]))
    if draw(flag):
        options["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    shape = (*batch, H, L, S)
    shapes = st.sampled_from([shape, shape[-2:], (H, 1, S), (1, S), (L, 1), (), (*batch, 1, L, S)])
    if draw(flag):
        allowed = rng.random(draw(shapes)) < draw(st.sampled_from([0.05, 0.5, 0.95]))
        kind = draw(st.sampled_from(["bool", "int8", "int64", "float32", "float64"]))
        options["mask"] = allowed.astype(kind if allowed.any() else "bool")
    if draw(flag):
        bias = normal(rng, *draw(shapes), dtype=draw(st.sampled_from(["float32", "float64", dtype])))
        options["bias"] = np.where(rng.random(bias.shape) < 0.1, -np.inf, wide(bias)).astype(bias.dtype)
    if draw(flag):
        sinks = normal(rng, *draw(st.sampled_from([(H,), (*batch, H), (1,)])), dtype=dtype)
        options["sinks"] = sinks
    if draw(flag):
        options["kv_lengths"] = rng.integers(0, S + 1, draw(st.sampled_from([(), batch])))
    return {"arrays": arrays, "options": options, "dtype": dtype}


def as_seen(options: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The options as the kernel reads them: bias and sinks in the type that it computes in."""
    compute = "float64" if dtype == "float64" else "float32"
    return {n: wide(x.astype(compute)) if n in ("bias", "sinks") else x for n, x in options.items()}


@settings(max_examples=600)
@given(calls())
def test_attention_is_the_definition(call: dict[str, Any]) -> None:
    (q, k, v), options, dtype = call["arrays"], call["options"], call["dtype"]
    compute = "float64" if dtype == "float64" else "float32"
    want, want_lse = reference_attention(q, k, v, return_lse=True, **as_seen(options, dtype))
    got, got_lse = hw.attention(q, k, v, return_lse=True, **options)
    tol = tolerance(q, k, v, dtype, **options)
    assert_close(got, want, tol, dtype)
    lse_tol = tolerance(q, k, np.ones((1, 1, 1)), dtype, **options)
    assert np.array_equal(np.isneginf(got_lse), np.isneginf(want_lse))
    finite = np.isfinite(want_lse)
    assert_close(got_lse[finite], want_lse[finite], lse_tol + UNIT[compute] * np.abs(want_lse[finite]), compute)


@settings(max_examples=250)
@given(calls(with_values=False))
def test_weights_are_the_definition(call: dict[str, Any]) -> None:
    (q, k, _), options, dtype = call["arrays"], call["options"], call["dtype"]
    want = reference.attention_weights(wide(q), wide(k), **as_seen(options, dtype))
    tol = tolerance(q, k, np.ones((1, 1, 1)), dtype, **options)
    assert_close(hw.attention_weights(q, k, **options), want, tol, dtype)


# Exactness, said in a figure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "most", "rms"),
    [("float32", 4.0, 0.5), ("float64", 4.0, 0.5), ("float16", 1.01, 0.5), ("bfloat16", 1.01, 0.5)],
)
def test_how_exact(dtype: str, most: float, rms: float, capsys: pytest.CaptureFixture[str]) -> None:
    """The unit: half an ulp of the type at the largest |v|. For the 16-bit types that is the final rounding itself."""
    rng = np.random.default_rng(1)
    worst = squares = count = 0.0
    for L, S, D, causal in [
        (96, 96, 64, True),
        (33, 1500, 64, None),
        (64, 700, 128, "bottom_right"),
        (1, 5000, 64, None),
    ]:
        q, k, v = normal(rng, 2, L, D), normal(rng, 2, S, D), normal(rng, 2, S, D)
        q, k, v = (x.astype(DTYPES[dtype]) for x in (q, k, v))
        error = wide(hw.attention(q, k, v, causal=causal)) - reference_attention(q, k, v, causal=causal)
        error /= UNIT[dtype] * np.max(np.abs(wide(v)))
        worst, squares, count = max(worst, np.max(np.abs(error))), squares + np.sum(error**2), count + error.size
    figure = np.sqrt(squares / count)
    with capsys.disabled():
        print(f"\nattention {dtype}: max error {worst:.2f} x 2^{np.log2(UNIT[dtype]):.0f} max|v|, rms {figure:.3f}")
    assert worst <= most
    assert figure <= rms


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 8.0])
def test_how_the_error_grows_with_the_scores(dtype: str, spread: float, capsys: pytest.CaptureFixture[str]) -> None:
    """By docs/numerics.md: 3 + m sqrt(D) / 8 units of the largest |v|, no scale * |q| |k| being larger than m."""
    rng = np.random.default_rng(12)
    shares = []
    for D in (16, 64, 128, 256):
        worst = 0.0
        for S in (48, 600, 4096):
            q, k, v = (normal(rng, 2, n, D, dtype="float64") for n in (60, S, S))
            q, k, v = (q * spread).astype(dtype), (k * spread).astype(dtype), v.astype(dtype)
            error = np.abs(hw.attention(q, k, v) - _in_long_double(q, k, v)) / np.max(np.abs(v)) / UNIT[dtype]
            m = np.max(np.linalg.norm(wide(q), axis=-1)) * np.max(np.linalg.norm(wide(k), axis=-1)) / np.sqrt(D)
            worst = max(worst, float(np.max(error)))
            shares.append(float(np.max(error)) / (3 + m * np.sqrt(D) / 8))
        if D == 128:
            with capsys.disabled():
                print(f"\nattention {dtype}, q and k of N(0, {spread:g}), D = 128: max error {worst:.1f} units", end="")
    with capsys.disabled():
        print(f"; {max(shares):.2f} of the bound")
    assert max(shares) <= 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_error_of_products_that_cancel_is_within_the_same_bound(dtype: str) -> None:
    """Scores near 0 of large vectors: what counts is the vectors' length."""
    rng = np.random.default_rng(13)
    q, k, v = (normal(rng, 2, n, 64, dtype="float64") for n in (50, 300, 300))
    q, k = q * 5, k * 5
    k[..., 32:] = -k[..., :32] * q[:, :1, :32] / q[:, :1, 32:] * (1 + 1e-3 * k[..., 32:])  # for the first query
    q, k, v = (x.astype(dtype) for x in (q[:, :1], k, v))
    error = np.max(np.abs(hw.attention(q, k, v) - _in_long_double(q, k, v))) / np.max(np.abs(v)) / UNIT[dtype]
    m = np.max(np.linalg.norm(wide(q), axis=-1)) * np.max(np.linalg.norm(wide(k), axis=-1)) / 8
    assert error <= 3 + m * 8 / 8


def _in_long_double(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention in more digits than float64 has, where the machine has them (x86); else in float64."""
    if q.dtype == np.float64 and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("this machine's long double is no wider than float64")
    Q, K, V = (x.astype(np.longdouble if q.dtype == np.float64 else np.float64) for x in (q, k, v))
    s = np.einsum("hld,hsd->hls", Q, K) / np.sqrt(Q.dtype.type(q.shape[-1]))
    w = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("hls,hse->hle", w, V) / w.sum(-1, keepdims=True)


def test_float64_agrees_with_an_oracle_of_more_digits() -> None:
    """The definition is float64 itself; where extended precision is real (x86), compare with that."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, n, 64)) for n in (7, 1100, 1100))
    error = np.max(np.abs(hw.attention(q, k, v) - _in_long_double(q, k, v))) / np.max(np.abs(v))
    assert float(error) < 4 * 2.0**-53


# Literal uses ---------------------------------------------------------------------------------------------------


def test_a_mask_made_with_tril_of_ones_is_the_causal_one() -> None:
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, 3, 4, 40, 24)[:3]
    mask = np.tril(np.ones((40, 40)))
    assert np.array_equal(hw.attention(q, k, v, mask=mask), hw.attention(q, k, v, causal=True))


def test_one_head_by_hand() -> None:
    """softmax([ln 2, 0]) is [2/3, 1/3]."""
    q = [[[1.0]]]
    k = [[[np.log(2.0)], [0.0]]]
    v = [[[3.0, 0.0], [0.0, 6.0]]]
    out, lse = hw.attention(q, k, v, return_lse=True)
    assert np.allclose(out, [[[2.0, 2.0]]], rtol=1e-15)
    assert np.allclose(lse, np.log(3.0), rtol=1e-15)


def test_scores_of_a_thousand_neither_overflow_nor_lose_the_row() -> None:
    q, k, v = [[[1000.0]]], [[[1.0], [0.999], [-1.0]]], [[[1.0], [2.0], [3.0]]]
    for dtype in ("float32", "float64"):
        out = hw.attention(np.array(q, dtype), np.array(k, dtype), np.array(v, dtype))
        want = reference_attention(np.array(q, dtype), np.array(k, dtype), np.array(v, dtype))
        assert np.max(np.abs(out - want)) < 300 * UNIT[dtype] * 1000


def test_huge_scores_that_stay_finite() -> None:
    """Differences of scores may exceed the largest float; the weight is then 0, not NaN."""
    q = np.array([[[1.0]]], np.float32)
    k = np.array([[[3e38], [-3e38]] + [[-3e38]] * CHUNK], np.float32)
    v = np.arange(CHUNK + 2, dtype=np.float32).reshape(1, -1, 1) + 1
    for order in (slice(None), slice(None, None, -1)):
        out, lse = hw.attention(q, k[:, order], v[:, order], scale=1.0, return_lse=True)
        assert out[0, 0, 0] == 1
        assert lse[0, 0] == np.float32(3e38)


def test_tiny_weights_are_not_lost_in_a_long_row() -> None:
    """65,536 equal keys: each weight is 2^-16, and the mean of v comes back to the last place."""
    q, k = np.ones((1, 1, 16), np.float32), np.ones((1, 65536, 16), np.float32)
    v = np.tile(np.float32([[1.0], [3.0]]), (32768, 1))[None]
    assert hw.attention(q, k, v)[0, 0, 0] == 2


def test_numpy_scalars_and_zero_dimensional_arrays_as_options() -> None:
    rng = np.random.default_rng(4)
    q, k, v = normal(rng, 3, 2, 8, 16)
    plain = hw.attention(q, k, v, scale=0.5, softcap=3.0, causal=True, window=(3, 2))
    numpy = hw.attention(
        q, k, v, scale=np.float64(0.5), softcap=np.array(3.0), causal=True, window=(np.int64(3), np.int32(2))
    )
    assert np.array_equal(plain, numpy)


def test_tensors_in_every_place() -> None:
    torch = pytest.importorskip("torch", reason="the other kind of array that is tried here is torch's")
    rng = np.random.default_rng(5)
    q, k, v = (normal(rng, 2, n, 16) for n in (5, 9, 9))
    options = {"mask": np.tri(5, 9) > 0, "bias": normal(rng, 5, 9), "kv_lengths": np.array(7), "sinks": normal(rng, 2)}
    want = hw.attention(q, k, v, return_lse=True, **options)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    rest = {name: torch.from_numpy(np.asarray(x)) for name, x in options.items()}
    got = hw.attention(*tensors, return_lse=True, **rest)
    for ours, theirs in zip(want, got, strict=True):
        assert isinstance(theirs, torch.Tensor)
        assert np.array_equal(ours, theirs.numpy())
    assert hw.attention(*(x.bfloat16() for x in tensors)).dtype == torch.bfloat16
    assert isinstance(hw.multi_head_attention(*(x[0] for x in tensors), num_heads=4), torch.Tensor)
    assert isinstance(hw.attention(q, *tensors[1:]), np.ndarray)  # of q's kind
    for bad, message in [
        (tensors[0].to(torch.complex64), "floating-point"),
        (tensors[0].to("meta"), "CPU memory"),
        (tensors[0].to_sparse(), "dense"),
    ]:
        with pytest.raises(TypeError, match=f"q: expected .*{message}"):
            hw.attention(bad, *tensors[1:])


# The elementary functions, seen through attention ------------------------------------------------------------------


def in_units(got: np.ndarray, want: np.ndarray, dtype: str) -> float:
    return float(np.max(np.abs(wide(got) - want) / np.abs(want)) / UNIT[dtype])


# For float64 NumPy's own functions, the yardstick, err as well.
@pytest.mark.parametrize(("dtype", "most", "most_log"), [("float32", 2.8, 1.5), ("float64", 3.5, 2.5)])
def test_exp_log_and_tanh(dtype: str, most: float, most_log: float) -> None:
    rng = np.random.default_rng(6)
    n = 4000
    one = np.ones((n, 1, 1), dtype)

    # Scores 0 and x: the second weight is exp(x) / (1 + exp(x)), exp and two roundings more.
    x = -rng.uniform(0, 80 if dtype == "float32" else 700, n).astype(dtype)
    x[:2000] = -np.linspace(0, 1, 2000)
    keys = np.stack([np.zeros(n, dtype), x], axis=1)[..., None]
    values = np.broadcast_to(np.array([[0], [1]], dtype), (n, 2, 1))
    exp = np.exp(wide(x))
    assert in_units(hw.attention(one, keys, values, scale=1.0)[:, 0, 0], exp / (1 + exp), dtype) < most

    # One key: the log-sum-exp is its score, c tanh(x / c).
    x = np.concatenate([rng.uniform(-12, 12, n // 2), rng.uniform(-1, 1, n // 2) ** 9]).astype(dtype)
    _, lse = hw.attention(one, x[:, None, None], one, scale=1.0, softcap=1.0, return_lse=True)
    assert in_units(lse[:, 0], np.tanh(wide(x)), dtype) < most

    # n keys of score 0: the log-sum-exp is log(n).
    lengths = np.arange(2, 3000)
    zeros = np.zeros((1, 3000, 1), dtype)
    _, lse = hw.attention(np.zeros((2998, 1, 1, 1), dtype), zeros, zeros, kv_lengths=lengths, return_lse=True)
    assert in_units(lse[:, 0, 0], np.log(lengths), dtype) < most_log


def test_weights_of_masked_keys_are_zero_in_a_row_that_is_nan() -> None:
    q, k = np.ones((1, 4, 8), np.float32), np.ones((1, 4, 8), np.float32)
    k[0, 1] = np.nan
    lower = np.tril(np.ones((4, 4), bool))
    for options in ({"causal": True}, {"mask": lower}, {"bias": np.where(lower, 0, -np.inf)}):
        weights = hw.attention_weights(q, k, **options)[0]
        assert not weights[~lower].any()
        assert np.isnan(weights[1:][lower[1:]]).all()


def test_an_option_that_changes_between_calls_is_read_again() -> None:
    class Scale:
        value = 0.5

        def __float__(self) -> float:
            return self.value

    scale = Scale()
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).astype(np.float32)
    for name in ("scale", "softcap"):
        for value in (0.5, 3.0):
            scale.value = value
            assert same_bits(hw.attention(q, k, v, **{name: scale}), hw.attention(q, k, v, **{name: value}))
