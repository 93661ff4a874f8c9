"""docs/semantics.md, sentence by sentence: test_a7_... says that sentence A7 holds.

Small numbers and plain NumPy on purpose: a sentence should be checkable by eye. The other test files search widely.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway import _arrays, reference

BF16 = ml_dtypes.bfloat16
NAN, INF = np.nan, np.inf
CHUNK = hw.info().chunk_length


def softmax(s: Any) -> np.ndarray:
    e = np.exp(np.asarray(s, float) - np.max(s, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-14, atol=1e-14, equal_nan=True))


def of_scores(scores: Any, v: Any = None, **options: Any) -> np.ndarray:
    """Attention whose scores (L, S) are given: q is the identity of size L, k the transpose. One head, E = S."""
    s = np.asarray(scores, float)
    v = np.eye(s.shape[1]) if v is None else np.asarray(v, float)
    return hw.attention(np.eye(s.shape[0])[None], s.T[None], v[None], **{"scale": 1.0, **options})[0]


def allowed(L: int, S: int, **options: Any) -> list[str]:
    """Which keys a query attends to, as rows of x and dots."""
    out = of_scores(np.zeros((L, S)), **options)
    return ["".join("x" if w > 0 else "." for w in row) for row in out]


RNG = np.random.default_rng(0)
Q, K, V = RNG.normal(size=(4, 3, 8)), RNG.normal(size=(2, 5, 8)), RNG.normal(size=(2, 5, 6))


def test_every_sentence_has_a_test() -> None:
    document = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text()
    sentences = {int(n) for n in re.findall(r"^- \*\*A(\d+)\*\* ", document, re.MULTILINE)}
    files = [path.read_text() for path in Path(__file__).parents[1].rglob("test_*.py")]
    tests = {int(n) for text in files for n in re.findall(r"^def test_a(\d+)_", text, re.MULTILINE)}
    assert len(sentences) >= 40
    assert sentences == set(range(1, len(sentences) + 1))
    assert tests == sentences


# The operation ------------------------------------------------------------------------------------------------------


def test_a1_attention_averages_the_values() -> None:
    q, k, v = Q[:2], K, V
    w = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(8))
    assert close(hw.attention(q, k, v), w @ v)
    stacked = hw.attention(np.stack([q, -q])[:, None], np.stack([k, 2 * k, 3 * k]), v)
    assert stacked.shape == (2, 3, 2, 3, 6)
    assert np.array_equal(stacked[1, 2], hw.attention(-q, 3 * k, v))


def test_a2_scale() -> None:
    assert np.array_equal(hw.attention(Q, K, V), hw.attention(Q, K, V, scale=1 / np.sqrt(8)))
    assert close(of_scores([[1, 2, 4]], scale=-0.5), [softmax([-0.5, -1, -2])])
    assert close(of_scores([[1, 2, 4]], scale=0), [[1 / 3] * 3])


def test_a3_grouped_heads() -> None:
    out = hw.attention(Q, K, V)
    for h, g in enumerate([0, 0, 1, 1]):
        assert np.array_equal(out[h], hw.attention(Q[h : h + 1], K[g : g + 1], V[g : g + 1])[0])
    with pytest.raises(ValueError, match="k: expected a number of heads that divides"):
        hw.attention(Q[:3], K, V)


def test_a4_scale_then_softcap_then_bias_then_mask() -> None:
    s = 3 * np.tanh(np.array([2.0, 8, -4, 1]) * 0.5 / 3) + np.array([0, 1, 9, 5])
    out = of_scores([[2, 8, -4, 1]], scale=0.5, softcap=3, bias=np.array([0.0, 1, 9, 5]), mask=[1, 1, 1, 0])
    assert close(out, [[*softmax(s[:3]), 0]])


def test_a5_log_sum_exp() -> None:
    _, lse = hw.attention(Q, K, V, return_lse=True, sinks=np.ones(4))
    s = Q @ np.repeat(K, 2, 0).swapaxes(-1, -2) / np.sqrt(8)
    assert lse.shape == (4, 3)
    assert close(lse, np.log(np.exp(s).sum(-1)))


def test_a6_weights() -> None:
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    w = hw.attention_weights(Q, K, mask=mask)
    assert w.shape == (4, 3, 5)
    assert np.array_equal(w > 0, np.broadcast_to(mask == 1, (4, 3, 5)))
    assert close(w.sum(-1), np.broadcast_to([1, 0, 1], (4, 3)))
    assert close(w @ np.repeat(V, 2, 0), hw.attention(Q, K, V, mask=mask))
    assert (hw.attention_weights(Q, K, sinks=np.zeros(4)).sum(-1) < 1).all()


# Which keys ---------------------------------------------------------------------------------------------------------


def test_a7_one_and_true_mean_may_attend() -> None:
    want = [[0.5, 0, 0.5], [0, 1, 0]]
    mask = np.array([[1, 0, 1], [0, 1, 0]])
    for kind in (bool, np.int8, np.uint64, np.float16, np.float32, np.float64, BF16):
        assert of_scores(np.zeros((2, 3)), mask=mask.astype(kind)).tolist() == want
    assert of_scores(np.zeros((2, 3)), mask=mask.tolist()).tolist() == want
    per_head = np.array([True, False, True, False])[:, None, None]
    assert np.array_equal(np.any(hw.attention(Q, K, V, mask=per_head) != 0, (1, 2)), per_head[:, 0, 0])


def test_a8_an_additive_mask_is_refused() -> None:
    for mask in (np.array([0, -1e9, -1e9]), np.zeros(3), np.zeros((1, 3), np.float32), [0.0, 0.0, 0.0], [1, 0.5, 0]):
        with pytest.raises(ValueError, match=r"mask: .*bias"):
            of_scores(np.zeros((1, 3)), mask=mask)
    assert (of_scores(np.zeros((1, 3)), mask=np.zeros(3, int)) == 0).all()  # integers and bools cannot be meant so


def test_a9_bias() -> None:
    assert close(of_scores([[1, 2, 3]], bias=[0.5, 0, -1]), [softmax([1.5, 2, 2])])
    assert of_scores([[1, 7, 1]], bias=[0, -INF, 0]).tolist() == [[0.5, 0, 0.5]]
    out = of_scores(np.zeros((2, 2)), bias=np.array([[-INF], [0]]))
    assert out.tolist() == [[0, 0], [0.5, 0.5]]


def test_a10_where_queries_stand() -> None:
    near = {"window": (0, 0)}
    assert allowed(2, 2, **near) == ["x.", ".x"]
    assert allowed(2, 2, causal=False, **near) == ["x.", ".x"]
    assert allowed(2, 2, causal=True, **near) == ["x.", ".x"]
    assert allowed(2, 4, causal="top_left", **near) == ["x...", ".x.."]
    assert allowed(2, 4, causal="bottom_right", **near) == ["..x.", "...x"]
    assert allowed(2, 4, causal="bottom_right", kv_lengths=3, **near) == [".x..", "..x."]
    assert allowed(3, 2, causal="bottom_right", **near) == ["..", "x.", ".x"]


def test_a11_causal() -> None:
    assert allowed(2, 4, causal="top_left") == ["x...", "xx.."]
    assert allowed(2, 4, causal="bottom_right") == ["xxx.", "xxxx"]
    assert allowed(3, 3, causal=True) == ["x..", "xx.", "xxx"]
    assert allowed(4, 2, causal="top_left") == ["x.", "xx", "xx", "xx"]
    assert allowed(4, 2, causal="bottom_right") == ["..", "..", "x.", "xx"]
    assert allowed(2, 3, causal=None) == allowed(2, 3, causal=False) == ["xxx", "xxx"]


def test_a12_true_is_for_squares() -> None:
    with pytest.raises(ValueError, match=r"causal: .*'top_left' or 'bottom_right'"):
        allowed(2, 3, causal=True)


def test_a13_window() -> None:
    assert allowed(4, 4, window=(1, 0)) == ["x...", "xx..", ".xx.", "..xx"]
    assert allowed(4, 4, window=(0, 2)) == ["xxx.", ".xxx", "..xx", "...x"]
    assert allowed(3, 3, window=(None, 0)) == ["x..", "xx.", "xxx"]
    assert allowed(3, 3, window=(None, None)) == ["xxx"] * 3
    assert allowed(2, 5, window=(1, None), causal="bottom_right") == ["..xx.", "...xx"]
    for far in (2**53, 2**63 - 1, 2**70, np.uint64(2**64 - 1)):
        assert allowed(3, 3, window=(far, 0)) == ["x..", "xx.", "xxx"]
        assert allowed(3, 3, window=(0, far)) == ["xxx", ".xx", "..x"]
    for bad in ((-1, 0), (0, 1.5), (0,), 3):
        with pytest.raises((TypeError, ValueError), match="window: expected"):
            allowed(3, 3, window=bad)


def test_a14_a_window_needs_a_corner() -> None:
    with pytest.raises(ValueError, match=r"window: .*causal="):
        allowed(2, 3, window=(1, 1))


def test_a15_kv_lengths() -> None:
    assert allowed(2, 4, kv_lengths=3) == ["xxx."] * 2
    assert allowed(1, 2, kv_lengths=0) == [".."]
    q, k, v = np.zeros((2, 1, 1, 4)), np.zeros((2, 1, 3, 4)), np.eye(3)
    assert hw.attention(q, k, v[None], kv_lengths=[1, 2])[:, 0, 0].tolist() == [[1, 0, 0], [0.5, 0.5, 0]]
    for bad in (4, -1):
        with pytest.raises(ValueError, match="kv_lengths: expected integers from 0 to 3"):
            hw.attention(q, k, v[None], kv_lengths=bad)


def test_a16_rules_compose() -> None:
    mask, bias = np.ones((4, 4)), np.zeros((4, 4))
    mask[2, 1], bias[3, 3] = 0, -INF
    assert allowed(4, 4, mask=mask, bias=bias, causal=True, window=(2, None)) == ["x...", "xx..", "x.x.", ".xx."]
    assert allowed(4, 4, mask=mask, bias=bias, causal=True, kv_lengths=2) == ["x...", "xx..", "x...", "xx.."]


def test_a17_masked_keys_have_no_influence() -> None:
    scores, values = np.array([[1.0, 2, 3], [1, 2, 3]]), np.array([[1.0], [2], [4]])
    want = of_scores(scores[:, :2], values[:2])
    for poison in (NAN, INF, -INF, 1e308):
        s, v = scores.copy(), values.copy()
        s[:, 2], v[2] = poison, poison
        assert np.array_equal(of_scores(s, v, mask=[1, 1, 0]), want)
        assert np.array_equal(of_scores(s, v, mask=[1, 1, 0], bias=[0, 0, poison]), want)
        assert np.array_equal(of_scores(s, v, bias=[0, 0, -INF]), want)
        assert np.array_equal(of_scores(s, v, kv_lengths=2), want)


@pytest.mark.parametrize("rule", [{"causal": True}, {"window": (3, 3)}, {"window": (0, None)}, {"window": (100, 0)}])
def test_a17_of_neighbouring_rows_only_some_may_see(rule: dict[str, Any]) -> None:
    """Rows are computed together: a value that only some of them may see must not reach the others."""
    n = 200  # keys in several bands
    q, k, v = np.random.default_rng(17).normal(size=(3, 1, n, 8))
    want, seen = hw.attention(q, k, v, **rule), hw.attention_weights(q, k, **rule)[0] > 0
    for key in range(0, n, 3):
        for poison in (NAN, INF):
            poisoned = v.copy()
            poisoned[:, key] = poison
            out = hw.attention(q, k, poisoned, **rule)
            assert np.array_equal(out[0, ~seen[:, key]], want[0, ~seen[:, key]]), (key, poison)
            assert not np.isfinite(out[0, seen[:, key]]).any(), (key, poison)


def test_a18_rows_without_keys() -> None:
    for options in ({"mask": np.zeros(5, bool)}, {"kv_lengths": 0}, {"bias": np.full(5, -INF)}):
        for sinks in (None, np.ones(4)):
            out, lse = hw.attention(Q, K * NAN, V * NAN, return_lse=True, sinks=sinks, **options)
            assert (out == 0).all()
            assert (lse == -INF).all()
            assert (hw.attention_weights(Q, K * NAN, sinks=sinks, **options) == 0).all()


def test_a19_nothing_of_something() -> None:
    assert hw.attention(Q[:, :0], K, V).shape == (4, 0, 6)
    assert hw.attention(Q, K, V[..., :0]).shape == (4, 3, 0)
    out, lse = hw.attention(Q, K[:, :0], V[:, :0], return_lse=True)
    assert out.shape == (4, 3, 6)
    assert (out == 0).all()
    assert (lse == -INF).all()
    assert np.array_equal(hw.attention(Q[:, 1:2], K, V), hw.attention(Q, K, V)[:, 1:2])
    with pytest.raises(ValueError, match=r"q: .*at least 1"):
        hw.attention(Q[..., :0], K[..., :0], V)
    wide = np.ones((1, 3, 65_537), np.float16)
    for D in (65_537, 2**24, 2**50):
        wider = np.broadcast_to(wide[..., :1], (1, 3, D))
        with pytest.raises(ValueError, match=f"^q: expected a head size D of at most 65536, got {D}"):
            hw.attention(wider, wider, wide[..., :1])
        with pytest.raises(ValueError, match=f"^v: expected a head size E of at most 65536, got {D}"):
            hw.attention(wide[..., :1], wide[..., :1], wider)
        with pytest.raises(ValueError, match=f"^head_dim: expected an integer from 1 to 65536, got {D}"):
            hw.KVCache(1, D)
    wide = wide[..., :-1]
    assert (hw.attention(wide, wide, wide) == 1).all()


# Numbers that are not ordinary --------------------------------------------------------------------------------------


def test_a20_non_finite_scores() -> None:
    assert close(of_scores([[1, -INF, 2]]), [[*softmax([1, 2])[:1], 0, *softmax([1, 2])[1:]]])
    for bad in (NAN, INF):
        assert np.isnan(of_scores([[1, bad, 2]])).all()
        assert np.isnan(of_scores([[1, 1, 2]], bias=[0, bad, 0])).all()
    assert np.isnan(of_scores([[-INF, -INF]])).all()
    for dtype in ("float64", "float32", "float16"):  # in every type, whatever is done to the score
        for options in ({}, {"bias": np.ones(3, dtype)}, {"mask": np.array([1, 1, 0])}, {"scale": 1e-5}):
            q, k = np.array([[[1.0, 0]]], dtype), np.array([[[2.0, 0], [-INF, 0], [2.0, 0]]], dtype)
            weights = hw.attention_weights(q, k, **options)[0, 0].tolist()
            assert weights == ([1, 0, 0] if "mask" in options else [0.5, 0, 0.5])
            assert np.isnan(hw.attention_weights(q, -k, **options)[0, 0, :2]).all()
    many = np.full((1, 3 * CHUNK), -INF)  # whole chunks of -inf before and after the one key that counts
    many[0, CHUNK + 7] = 3
    assert of_scores(many, np.arange(3.0 * CHUNK)[:, None]).tolist() == [[CHUNK + 7]]


def test_a21_scores_of_any_size() -> None:
    for size in (1e3, 1e5, 1e300):
        assert of_scores([[size, 0, -size]]).tolist() == [[1, 0, 0]]
        assert of_scores([[-size, -size, -size]]).tolist() == [[1 / 3] * 3]
    assert close(of_scores([[1e3 + 1, 1e3]]), [softmax([1, 0])])


def test_a22_sinks() -> None:
    w = of_scores([[1, 2]], sinks=np.array([0.5]))
    assert close(w, [np.exp([1, 2]) / np.exp([1, 2, 0.5]).sum()])
    assert np.array_equal(hw.attention(Q, K, V, sinks=np.full(4, -INF)), hw.attention(Q, K, V))
    assert of_scores([[1, 2]], sinks=np.array([1e4])).tolist() == [[0, 0]]
    for bad in (NAN, INF):
        with pytest.raises(ValueError, match="sinks: expected"):
            of_scores([[1, 2]], sinks=np.array([bad]))


# Types and arrays ---------------------------------------------------------------------------------------------------


def test_a23_types_of_the_result() -> None:
    f16, f32, f64 = np.float16, np.float32, np.float64
    for kinds, want, want_lse in [
        ((f64, f64, f64), f64, f64),
        ((f32, f32, f32), f32, f32),
        ((f16, f16, f16), f16, f32),
        ((BF16, BF16, BF16), BF16, f32),
        ((f16, f32, f16), f32, f32),
        ((f16, f16, BF16), f32, f32),
        ((f32, f32, f64), f64, f64),
        ((int, f32, f32), f64, f64),
    ]:
        out, lse = hw.attention(*(x.astype(t) for x, t in zip((Q, K, V), kinds, strict=True)), return_lse=True)
        assert (out.dtype, lse.dtype) == (want, want_lse)


def test_a24_sixteen_bits_are_computed_in_float32() -> None:
    for kind in (np.float16, BF16):
        q, k, v = (x.astype(kind) for x in (Q, K, V))
        wide = hw.attention(*(x.astype(np.float32) for x in (q, k, v)))
        assert np.array_equal(hw.attention(q, k, v), wide.astype(kind))


def test_a25_lists_integers_and_what_is_refused() -> None:
    integers = (Q * 4).astype(int)
    want = hw.attention(integers.astype(float), K, V)
    assert np.array_equal(hw.attention(integers, K.tolist(), V.tolist()), want)
    assert hw.attention(integers.tolist(), K.tolist(), V.tolist()).dtype == np.float64
    for kind in (bool, complex, object, str):
        with pytest.raises(TypeError, match="k: expected floating-point numbers"):
            hw.attention(Q, K.astype(kind), V)


def test_a26_a_new_array_comes_back() -> None:
    q, k, v = (x[..., ::-1] for x in (Q.copy(), K.copy(), V.copy()))
    for x in (q, k, v):
        x.flags.writeable = False
    out = hw.attention(q, k, v)
    assert type(out) is np.ndarray
    assert out.flags.writeable
    assert np.array_equal(out, hw.attention(q.copy(), k.copy(), v.copy()))
    torch = pytest.importorskip("torch", reason="the other kind of array that is tried here is torch's")
    tensors = [torch.from_numpy(x.copy()) for x in (q, k, v)]
    assert isinstance(hw.attention(*tensors), torch.Tensor)
    assert np.array_equal(hw.attention(*tensors).numpy(), out)
    assert hw.attention(*(x.bfloat16() for x in tensors)).dtype == torch.bfloat16


def test_a27_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"^k: expected the head size D = 8 .*got 7") as caught:
        hw.attention(Q, K[..., :7], V)
    assert type(caught.value) is ValueError
    with pytest.raises(TypeError, match=r"^q: expected floating-point numbers, got complex128; convert it"):
        hw.attention(Q.astype(complex), K, V)


# Arrays of other libraries --------------------------------------------------------------------------------------


def test_a45_numbers_are_read_whatever_they_are_given_as() -> None:
    """For every argument and every kind of array: tests/test_doors.py."""
    want = hw.attention(Q, K, V, mask=np.eye(3, 5, dtype=bool), kv_lengths=4)
    mask = np.eye(3, 5)
    for given in (mask.astype(BF16), [list(row) for row in mask.astype(BF16)], memoryview(mask), list(mask)):
        assert np.array_equal(hw.attention(Q, K, V, mask=given, kv_lengths=4), want)
    for lengths in (np.ones((), BF16), 4.0, np.float32(4), np.True_, True):
        with pytest.raises(TypeError, match=r"^kv_lengths: expected integers, got (bfloat16|float64|float32|bool)"):
            hw.attention(Q, K, V, kv_lengths=lengths)
    with pytest.raises(TypeError, match=r"^positions: expected numbers, or booleans, got a mixture"):
        hw.rotary(Q, positions=[True, 1, 2])
    deep: Any = 1.0
    for _ in range(33):
        deep = [deep]
    assert hw.rms_norm(deep[0], [1.0]).ndim == 32
    with pytest.raises(ValueError, match=r"^x: expected at most 32 axes"):
        hw.rms_norm(deep, [1.0])
    assert np.array_equal(hw.attention(Q, Q, Q, causal=np.True_), hw.attention(Q, Q, Q, causal=True))


def test_a46_forward_only() -> None:
    """For every argument: tests/test_frameworks.py."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(
        TypeError, match=r"^k: .* headway is forward only; call it under torch.no_grad\(\), or pass `k.det"
    ):
        hw.attention(x.detach(), x, x)
    with torch.no_grad():
        assert torch.equal(hw.attention(x, x, x), hw.attention(*[x.detach()] * 3))


def test_a47_compilers_and_transformations(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every argument: tests/test_frameworks.py; inside transformations: tests/integrations/test_torch.py."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.delitem(_arrays.TRACED, "torch", raising=False)  # as before its integration was imported
    x = torch.ones(2, 3, 4)
    with pytest.raises(TypeError, match=r"^gate: expected a tensor with memory of its own, got one inside torch.vmap"):
        torch.vmap(lambda x: hw.swiglu(x, x))(x)
    with pytest.raises(TypeError, match=r"^gate: expected a dense tensor, .* pass `gate.to_dense\(\)`"):
        hw.swiglu(x.to_sparse(), x)


def test_a48_cures_are_code() -> None:
    """For every argument and many bad values: tests/test_grammar.py."""
    with pytest.raises(ValueError, match=r"^q: expected shape .*`q\[None\]`") as caught:
        hw.attention(Q[0], K, V)
    assert hw.attention(eval(str(caught.value).split("`")[1], {"q": Q[0]}), K[:1], V[:1]).shape == (1, 3, 6)
    with pytest.raises(
        TypeError, match=r"^casual: no such option; expected one of q, k, v, .*; did you mean 'causal'\?"
    ):
        hw.attention(Q, K, V, casual=True)


# In parts, and step by step -------------------------------------------------------------------------------------


def test_a28_parts_make_the_whole() -> None:
    k, v = RNG.normal(size=(2, CHUNK + 9, 8)), RNG.normal(size=(2, CHUNK + 9, 6))
    mask = RNG.random((3, CHUNK + 9)) < 0.5
    rules = {"causal": "bottom_right", "window": (300, None), "kv_lengths": CHUNK + 4}
    first = hw.partial_attention(Q, k[:, :CHUNK], v[:, :CHUNK], mask=mask[:, :CHUNK], **rules)
    second = hw.partial_attention(Q, k[:, CHUNK:], v[:, CHUNK:], key_offset=CHUNK, mask=mask[:, CHUNK:], **rules)
    want = hw.attention(Q, k, v, mask=mask, **rules)
    assert np.array_equal(hw.merge_attention([first, second]), want)
    assert np.array_equal(hw.merge_attention([pickle.loads(pickle.dumps(second)), first]), want)
    with pytest.raises(ValueError, match="key_offset: expected a multiple"):
        hw.partial_attention(Q, K, V, key_offset=CHUNK + 1)


def test_a29_what_a_part_cannot_know() -> None:
    with pytest.raises(ValueError, match="causal: "):
        hw.partial_attention(Q[:, :3], K[:, :3], V[:, :3], causal=True)
    with pytest.raises(ValueError, match="kv_lengths: "):
        hw.partial_attention(Q, K, V, causal="bottom_right")
    with pytest.raises(TypeError, match="sinks"):
        hw.partial_attention(Q, K, V, sinks=np.ones(4))
    state = hw.partial_attention(Q, K, V)
    assert np.array_equal(hw.merge_attention([state], sinks=np.ones(4)), hw.attention(Q, K, V, sinks=np.ones(4)))


def test_a30_states_of_other_results() -> None:
    parts = [hw.attention(Q, K[:, s], V[:, s], return_lse=True) for s in (slice(2), slice(2, 5))]
    out, lse = hw.merge_attention([hw.AttentionState.from_lse(*part) for part in parts], return_lse=True)
    want, want_lse = hw.attention(Q, K, V, return_lse=True)
    assert close(out, want)
    assert close(lse, want_lse)
    x = np.ones((1, 2, 3))
    for kinds in ("float64 float64", "float32 float32", "float16 float32", "float16 float64"):
        dtype, lse_dtype = kinds.split()
        odd = hw.AttentionState.from_lse(x.astype(dtype), np.array([[NAN, -INF]], lse_dtype))
        other = hw.AttentionState.from_lse(np.full((1, 2, 3), 5, dtype), np.zeros((1, 2), lse_dtype))
        for states in ([odd], [odd, other], [other, odd]):
            merged, logs = hw.merge_attention(states, return_lse=True)
            assert np.isnan(merged[0, 0]).all()
            assert np.isnan(logs[0, 0])
            assert (merged[0, 1] == (5 if len(states) > 1 else 0)).all()
        for bad in (INF, 1e39, -1e39)[: 1 if dtype == "float64" or lse_dtype == "float32" else 3]:
            expected = re.escape(f"got {bad}; a row without keys has the lse -inf")
            with pytest.raises(ValueError, match=f"^lse: expected numbers below infinity within float.., {expected}"):
                hw.AttentionState.from_lse(x.astype(dtype), np.array([[0, bad]], lse_dtype))
    with pytest.raises(ValueError, match=r"^lse: expected numbers below infinity, got inf; a row without keys"):
        reference.AttentionState.from_lse(x, [[0, INF]])
    assert np.isnan(reference.merge_attention([reference.AttentionState.from_lse(x, [[0, NAN]])])[0, 1]).all()


def test_a31_a_cache_attends_to_all_that_it_holds() -> None:
    cache = hw.KVCache(2, 8, value_dim=6, dtype=np.float32)
    cache.append(K[:, :2], V[:, :2])
    cache.append(K[:, 2:], V[:, 2:])
    q, k, v = Q, K.astype(np.float32), V.astype(np.float32)
    assert np.array_equal(cache.attend(q), hw.attention(q, k, v, causal="bottom_right"))
    mask = np.array([1, 0, 1, 1, 0])
    assert np.array_equal(cache.attend(q, causal=None, mask=mask), hw.attention(q, k, v, mask=mask))


def test_a32_a_cache_is_a_value() -> None:
    cache = hw.KVCache(2, 8, value_dim=6, dtype=np.float64)
    cache.append(K, V)
    twin = cache.fork()
    twin.truncate(3)
    twin.append(-K[:, :1], -V[:, :1])
    assert (len(cache), len(twin)) == (5, 4)
    assert np.array_equal(cache.keys, K)
    assert np.array_equal(twin.values, np.concatenate([V[:, :3], -V[:, :1]], 1))
    cache.keys[:] = 0
    assert np.array_equal(cache.keys, K)


# Layers -------------------------------------------------------------------------------------------------------------

X, Y = RNG.normal(size=(3, 6)), RNG.normal(size=(5, 6))
WEIGHTS = {name: RNG.normal(size=(6, 6)) for name in ("w_q", "w_k", "w_v", "w_o")}
BIASES = {name: RNG.normal(size=6) for name in ("b_q", "b_k", "b_v", "b_o")}


def test_a33_a_layer() -> None:
    q, k, v = (x @ WEIGHTS[f"w_{n}"] + BIASES[f"b_{n}"] for n, x in zip("qkv", (X, Y, Y), strict=True))
    heads = [softmax(q[:, c] @ k[:, c].T / np.sqrt(3)) @ v[:, c] for c in (slice(0, 3), slice(3, 6))]
    want = np.concatenate(heads, axis=1) @ WEIGHTS["w_o"] + BIASES["b_o"]
    assert close(hw.multi_head_attention(X, Y, Y, num_heads=2, **WEIGHTS, **BIASES), want)


def test_a34_projections_that_are_not_given() -> None:
    eye = np.eye(6)
    for name in WEIGHTS:
        rest = {n: w for n, w in WEIGHTS.items() if n != name}
        whole = hw.multi_head_attention(X, Y, Y, num_heads=2, **rest, **{name: eye})
        assert close(hw.multi_head_attention(X, Y, Y, num_heads=2, **rest), whole)
    shared = hw.multi_head_attention(X, Y[:, :3], Y[:, :3], num_heads=2, num_kv_heads=1)
    assert close(shared, hw.multi_head_attention(X, *[np.tile(Y[:, :3], 2)] * 2, num_heads=2))
    mask = np.tri(3, 5)
    assert np.array_equal(
        hw.multi_head_attention(X, Y, Y, num_heads=2, mask=mask),
        hw.multi_head_attention(X, Y, Y, num_heads=2, mask=np.stack([mask, mask])),
    )


def test_a35_decimals() -> None:
    out = hw.multi_head_attention(X, Y, Y, num_heads=2, decimals=3)
    assert out.tolist() == np.round(hw.multi_head_attention(X, Y, Y, num_heads=2), 3).tolist()
    tie = [[0.25, 0.75, -0.01]]
    assert str(hw.multi_head_attention(tie, tie, tie, num_heads=1, decimals=1).tolist()) == "[[0.2, 0.8, 0.0]]"
    half = X.astype(np.float16)
    assert hw.multi_head_attention(half, half, half, num_heads=2, decimals=3).dtype == np.float32
    for number, n in ((92729030.77754231, 8), (0.1, 300), (-1e300, 20)):  # without so many decimals
        for function in (hw.multi_head_attention, reference.multi_head_attention):
            assert function([[0.0]], [[0.0]], [[number]], num_heads=1, decimals=n) == [[number]]
    narrow = np.array([[714371.1]], np.float32)  # a product with 10^8 in float32 would make it 714371.06
    assert hw.multi_head_attention(0 * narrow, 0 * narrow, narrow, num_heads=1, decimals=8) == narrow


def test_a36_linear() -> None:
    w, b = WEIGHTS["w_q"][:, :4], BIASES["b_q"][:4]
    assert close(hw.linear(X, w, b), X @ w + b)
    assert close(hw.linear(X[None], w), (X @ w)[None])


def test_a37_rotary() -> None:
    angle = np.array([[7], [2], [100]]) * 10000.0 ** (-2 * np.arange(3) / 6)
    turned = (X[:, :3] + 1j * X[:, 3:]) * np.exp(1j * angle)
    want = np.concatenate([turned.real, turned.imag], axis=1)
    assert close(hw.rotary(X, positions=[7, 2, 100]), want)
    assert close(hw.rotary(X, positions=[7, 2, 100], frequencies=10000.0 ** (-2 * np.arange(3) / 6)), want)
    assert np.array_equal(hw.rotary(X), hw.rotary(X, positions=[0, 1, 2]))
    with pytest.raises(ValueError, match="positions: expected integers from 0 to 16777215"):
        hw.rotary(X, positions=[0, 1, 2**24])


def test_a38_rms_norm() -> None:
    want = X / np.sqrt(np.mean(X**2, axis=-1, keepdims=True) + 0.1) * BIASES["b_q"]
    assert close(hw.rms_norm(X, BIASES["b_q"], eps=0.1), want)


def test_a39_swiglu() -> None:
    assert close(hw.swiglu(X, X + 1), X / (1 + np.exp(-X)) * (X + 1))


def test_a40_fast_is_exact_up_to_bfloat16_and_not_for_float64() -> None:
    q, k, v = (x.astype(np.float32) for x in (Q, K, V))
    fast, exact = hw.attention(q, k, v, precision="fast"), hw.attention(q, k, v, precision="exact")
    assert np.abs(fast - exact).max() <= 0.05
    assert (exact == hw.attention(q, k, v)).all()
    mask = np.arange(5) < 3
    poisoned = np.where(mask[:, None], v, np.nan).astype(np.float32)
    assert np.isfinite(hw.attention(q, k, poisoned, mask=mask, precision="fast")).all()
    with pytest.raises(ValueError, match="precision"):
        hw.attention(Q, K, V, precision="fast")
