"""The attention half of headway.reference against oracles that share nothing with it: loops with math.fsum; torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headway as hw
from headway import reference as ref


def by_loops(
    q: Any, k: Any, v: Any, keep: Any, scale: float, softcap: float | None, bias: Any, sinks: Any
) -> tuple[list[Any], list[Any]]:
    """Attention of (H, L, D), (G, S, D), (G, S, E) in plain Python, each sum exact before its one rounding."""
    outs, lses = [], []
    for h in range(len(q)):
        g = h // (len(q) // len(k))
        for i in range(len(q[h])):
            terms = []
            for j in range(len(k[g])):
                if not keep[h][i][j] or bias[h][i][j] == -math.inf:
                    continue
                s = scale * math.fsum(x * y for x, y in zip(q[h][i], k[g][j], strict=True))
                if softcap:
                    s = softcap * math.tanh(s / softcap)
                terms.append((s + bias[h][i][j], v[g][j]))
            total = math.fsum(math.exp(s) for s, _ in terms)
            below = total + (math.exp(sinks[h]) if sinks is not None else 0.0)
            outs.append(
                [math.fsum(math.exp(s) * x[e] for s, x in terms) / below if terms else 0.0 for e in range(len(v[0][0]))]
            )
            lses.append(math.log(total) if terms else -math.inf)
    return outs, lses


@given(st.integers(0, 2**32 - 1), st.data())
def test_attention_is_the_formula_term_by_term(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    draw = data.draw
    L, S = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    G, D, E = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    H = G * draw(st.integers(1, 3))
    q, k, v = rng.normal(size=(H, L, D)), rng.normal(size=(G, S, D)), rng.normal(size=(G, S, E))
    mask, bias, sinks = rng.random((H, L, S)) < 0.7, rng.normal(size=(H, L, S)), rng.normal(size=H)
    bias[rng.random(bias.shape) < 0.1] = -np.inf
    causal = draw(st.sampled_from([None, "top_left", "bottom_right"]))
    window = draw(st.sampled_from([None, (None, 1), (2, None), (0, 0), (1, 2)]))
    n = draw(st.integers(0, S))
    scale, softcap = draw(st.sampled_from([0.3, 1.0, -2.0])), draw(st.sampled_from([None, 0.7, 10.0]))
    sinks = draw(st.sampled_from([None, sinks]))

    keep = np.zeros((H, L, S), bool)
    for h in range(H):
        for i in range(L):
            for j in range(S):
                at = i + n - L if causal == "bottom_right" else i
                left, right = window or (None, None)
                keep[h, i, j] = (
                    mask[h, i, j]
                    and j < n
                    and (causal is None or j <= at)
                    and (left is None or at - j <= left)
                    and (right is None or j - at <= right)
                )
    want, want_lse = by_loops(q.tolist(), k.tolist(), v.tolist(), keep, scale, softcap, bias.tolist(), sinks)
    out, lse = ref.attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        kv_lengths=n,
        return_lse=True,
    )
    assert np.allclose(out.reshape(-1, E), want, rtol=1e-13, atol=1e-13)
    assert np.allclose(lse.ravel(), want_lse, rtol=1e-13, atol=1e-13)


def test_weights_and_values_make_the_output() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 4, 5, 8)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 3))
    options: dict[str, Any] = {"causal": "bottom_right", "sinks": rng.normal(size=4), "softcap": 2.0}
    weights = ref.attention_weights(q, k, **options)
    assert np.allclose(weights @ np.repeat(v, 2, axis=1), ref.attention(q, k, v, **options), rtol=1e-14, atol=1e-14)


def test_non_finite_scores_follow_ieee_and_masked_ones_do_not_count() -> None:
    q, v = np.ones((1, 1, 1)), np.array([[[1.0], [2.0], [4.0]]])
    inf, nan = np.inf, np.nan

    def attend(scores: list[float], v: Any = v, **options: Any) -> tuple[float, float]:
        out, lse = ref.attention(q, np.reshape(scores, (1, -1, 1)), v, scale=1.0, return_lse=True, **options)
        return float(out[0, 0, 0]), float(lse[0, 0])

    assert attend([0, -inf, -inf]) == (1, 0)
    assert np.isnan(attend([0, nan, 0])).all()
    assert np.isnan(attend([0, inf, 0])).all()
    assert np.isnan(attend([-inf] * 3)[0])
    assert attend([-inf] * 3)[1] == -inf
    assert attend([0, nan, nan], mask=[1, 0, 0]) == (1, 0)
    assert attend([0, inf, nan], bias=[0, -inf, -inf]) == (1, 0)
    assert attend([nan] * 3, mask=np.zeros(3, bool)) == (0, -inf)
    assert attend([0, nan, nan], np.array([[[1.0], [nan], [inf]]]), kv_lengths=1) == (1, 0)
    assert attend([1000, 0, 0]) == (1, 1000)
    assert attend([-1000] * 3)[0] == pytest.approx(7 / 3)


def test_parts_merge_to_the_whole() -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 2, 9, 5)), rng.normal(size=(2, 2, 9, 4))
    mask, lengths, sinks = rng.random((2, 4, 3, 9)) < 0.6, np.array([9, 5]), rng.normal(size=4)
    mask[0, 0, 0] = False  # nothing at all for this one
    want = ref.attention(
        q, k, v, mask=mask, causal="bottom_right", window=(4, None), kv_lengths=lengths, sinks=sinks, return_lse=True
    )
    states = [
        ref.partial_attention(
            q,
            k[..., a:b, :],
            v[..., a:b, :],
            key_offset=a,
            mask=mask[..., a:b],
            causal="bottom_right",
            window=(4, None),
            kv_lengths=lengths,
        )
        for a, b in [(4, 9), (0, 1), (1, 4)]
    ]
    got = ref.merge_attention(states, sinks=sinks, return_lse=True)
    for x, y in zip(got, want, strict=True):
        assert np.allclose(x, y, rtol=1e-14, atol=1e-14)
    finished = [ref.AttentionState.from_lse(*ref.merge_attention([s], return_lse=True)) for s in states]
    assert np.allclose(ref.merge_attention(finished, sinks=sinks), want[0], rtol=1e-14, atol=1e-14)


def test_a_cache_gives_what_the_whole_gives() -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(4, 6, 5)), rng.normal(size=(2, 6, 5)), rng.normal(size=(2, 6, 3))
    want = ref.attention(q, k, v, causal=True)
    cache = ref.KVCache(2, 5, value_dim=3)
    for a, b in [(0, 2), (2, 3), (3, 6)]:
        cache.append(k[:, a:b], v[:, a:b])
        assert np.allclose(cache.attend(q[:, a:b]), want[:, a:b], rtol=1e-14, atol=1e-15)
    twin = cache.fork()
    twin.truncate(1)
    assert (len(cache), len(twin)) == (6, 1)
    assert np.array_equal(cache.keys, k)
    assert np.array_equal(twin.values, v[:, :1])


# The other operations, by loops ---------------------------------------------------------------------------------


def test_layers_term_by_term() -> None:
    rng = np.random.default_rng(3)
    x, w, b, up = rng.normal(size=(2, 6)), rng.normal(size=(6, 3)), rng.normal(size=3), rng.normal(size=(2, 6))
    weight, eps = rng.normal(size=6), 1e-5
    for r in range(2):
        for j in range(3):
            want = math.fsum([x[r, i] * w[i, j] for i in range(6)] + [b[j]])
            assert ref.linear(x, w, b)[r, j] == pytest.approx(want, rel=1e-14)
        root = math.sqrt(math.fsum(float(t) ** 2 for t in x[r]) / 6 + eps)
        for i in range(6):
            assert ref.rms_norm(x, weight, eps=eps)[r, i] == pytest.approx(x[r, i] / root * weight[i], rel=1e-14)
            sigmoid = 1 / (1 + math.exp(-x[r, i]))
            assert ref.swiglu(x, up)[r, i] == pytest.approx(x[r, i] * sigmoid * up[r, i], rel=1e-14)
        for i in range(3):
            angle = (5 + r) * 100.0 ** (-2 * i / 6)
            turned = complex(x[r, i], x[r, i + 3]) * complex(math.cos(angle), math.sin(angle))
            got = ref.rotary(x, positions=[5, 6], base=100.0)[r]
            assert complex(got[i], got[i + 3]) == pytest.approx(turned, rel=1e-14)


def test_rotated_scores_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(1, 8)), rng.normal(size=(1, 8))
    here = ref.rotary(q, positions=[7]) @ ref.rotary(k, positions=[3]).T
    there = ref.rotary(q, positions=[1007]) @ ref.rotary(k, positions=[1003]).T
    assert np.allclose(here, there, rtol=1e-12)
    assert not np.allclose(here, q @ k.T, rtol=1e-3)


def test_heads_are_columns_side_by_side() -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 8)), rng.normal(size=(4, 4)), rng.normal(size=(4, 6))
    out = ref.multi_head_attention(q, k, v, num_heads=4, num_kv_heads=2)
    for h in range(4):
        g = h // 2
        s = q[:, 2 * h : 2 * h + 2] @ k[:, 2 * g : 2 * g + 2].T / math.sqrt(2)
        w = np.exp(s) / np.exp(s).sum(1, keepdims=True)
        assert np.allclose(out[:, 3 * h : 3 * h + 3], w @ v[:, 3 * g : 3 * g + 3], rtol=1e-14, atol=1e-14)


# torch, where it is installed -----------------------------------------------------------------------------------


def test_torch_scaled_dot_product_attention_agrees() -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional second oracle")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(2, 6, 7, 16)), rng.normal(size=(2, 3, 11, 16)), rng.normal(size=(2, 3, 11, 5))
    mask, bias = rng.random((2, 1, 7, 11)) < 0.6, rng.normal(size=(2, 6, 7, 11))
    mask[1, 0, 3] = False

    def torches(**options: Any) -> Any:
        options = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
        return sdpa(*(torch.from_numpy(x) for x in (q, k, v)), enable_gqa=True, **options).numpy()

    for ours, theirs in [
        ({}, {}),
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"causal": "top_left"}, {"is_causal": True}),
        ({"mask": mask}, {"attn_mask": mask}),
        ({"bias": bias}, {"attn_mask": bias}),
        ({"bias": np.where(mask, bias, -np.inf)}, {"attn_mask": np.where(mask, bias, -np.inf)}),
    ]:
        assert np.allclose(ref.attention(q, k, v, **ours), torches(**theirs), rtol=1e-12, atol=1e-12), ours


def test_torch_multi_head_attention_agrees() -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional second oracle")
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    x, y = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj_bias.normal_()
        want = layer(x, y, y, need_weights=False)[0].numpy()
        w_q, w_k, w_v = (w.T.numpy() for w in layer.in_proj_weight.chunk(3))
        b_q, b_k, b_v = (b.numpy() for b in layer.in_proj_bias.chunk(3))
        w_o, b_o = layer.out_proj.weight.T.numpy(), layer.out_proj.bias.numpy()
    got = ref.multi_head_attention(
        x.numpy(),
        y.numpy(),
        y.numpy(),
        num_heads=3,
        w_q=w_q,
        w_k=w_k,
        w_v=w_v,
        w_o=w_o,
        b_q=b_q,
        b_k=b_k,
        b_v=b_v,
        b_o=b_o,
    )
    assert np.allclose(got, want, rtol=1e-12, atol=1e-12)


def test_torch_layers_agree() -> None:
    torch = pytest.importorskip("torch", reason="torch is an optional second oracle")
    rng = np.random.default_rng(7)
    x, up, weight = rng.normal(size=(3, 10)), rng.normal(size=(3, 10)), rng.normal(size=10)
    X, UP, WEIGHT = (torch.from_numpy(a) for a in (x, up, weight))
    norm = torch.nn.functional.rms_norm(X, (10,), WEIGHT, 1e-6).numpy()
    assert np.allclose(ref.rms_norm(x, weight), norm, rtol=1e-13)
    assert np.allclose(ref.swiglu(x, up), (torch.nn.functional.silu(X) * UP).numpy(), rtol=1e-13)


# No rows, no keys, one token: every function gives what the compiled one gives --------------------------------------


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def stepped(module: Any, rows: int, V: int) -> Any:
    sampler = module.Sampler(V)
    for seed in range(rows):
        sampler.admit(seed=seed)
    return sampler.step(zeros(rows, V))


SAMPLING: dict[str, Callable[[Any, tuple[int, ...], int], Any]] = {
    "sample": lambda m, lead, V: m.sample(zeros(*lead, V), seed=1),
    "several": lambda m, lead, V: m.sample(zeros(*lead, V), num_samples=2, uniform=np.zeros((*lead, 2))),
    "without replacement": lambda m, lead, V: m.sample(zeros(*lead, V), num_samples=1, replacement=False, seed=1),
    "probabilities": lambda m, lead, V: m.probabilities(zeros(*lead, V), top_p=0.5, typical_p=0.5),
    "filter_logits": lambda m, lead, V: m.filter_logits(
        zeros(*lead, V), dynamic_temperature_range=0.5, top_n_sigma=1.0, eta_cutoff=0.1, epsilon_cutoff=0.1, min_p=0.1
    ),
    "options of rows": lambda m, lead, V: m.filter_logits(
        zeros(*lead, V),
        temperature=np.ones(lead),
        allowed=np.ones((*lead, 1), np.int32),
        logit_bias=np.zeros((*lead, V)),
        seed=np.zeros(lead, int),
        xtc_probability=1.0,
        xtc_special_tokens=[0],
    ),
    "logprobs": lambda m, lead, V: m.logprobs(zeros(*lead, V), np.zeros(lead, int), top=1),
    "logprobs of n": lambda m, lead, V: m.logprobs(zeros(*lead, V), np.zeros((*lead, 3), int)),
    "logprobs of none": lambda m, lead, V: m.logprobs(zeros(*lead, V), np.zeros((*lead, 0), int), processed=True),
    "penalize": lambda m, lead, V: m.penalize(
        zeros(*lead, V), np.zeros((*lead, 4), int), repetition=np.ones(lead), dry_multiplier=1.0, dry_allowed_length=1
    ),
    "penalize, lengths": lambda m, lead, V: m.penalize(
        zeros(*lead, V), np.zeros((*lead, 4), int), lengths=np.zeros(lead, int)
    ),
    "verify_draft of none": lambda m, lead, V: m.verify_draft(
        zeros(*lead, 1, V), None, np.zeros((*lead, 0), int), seed=1
    ),
    "verify_draft": lambda m, lead, V: m.verify_draft(
        zeros(*lead, 3, V),
        zeros(*lead, 2, V),
        np.zeros((*lead, 2), int),
        seed=np.zeros(lead, int),
        allowed=np.ones((*lead, 3, V), bool),
        logit_bias=np.zeros(V),
    ),
    "verify_draft, lengths": lambda m, lead, V: m.verify_draft(
        zeros(*lead, 3, V),
        None,
        np.zeros((*lead, 2), int),
        seed=1,
        lengths=np.ones(lead, int),
        allowed=[0],
        temperature=np.ones(lead),
    ),
    "step": lambda m, lead, V: stepped(m, math.prod(lead), V),
}
EMPTY = zeros(0, 2, 3, 4)
ATTENTION: dict[str, Callable[[Any], Any]] = {
    "attention": lambda m: m.attention(EMPTY, EMPTY, EMPTY, causal=True, return_lse=True),
    "options": lambda m: m.attention(
        EMPTY, EMPTY, EMPTY, kv_lengths=np.zeros(0, int), mask=np.ones((3, 3), bool), bias=zeros(3, 3), sinks=zeros(2)
    ),
    "attention_weights": lambda m: m.attention_weights(EMPTY, EMPTY),
    "no queries": lambda m: m.attention(zeros(2, 0, 4), zeros(2, 3, 4), zeros(2, 3, 4), return_lse=True),
    "no keys": lambda m: m.attention(zeros(2, 3, 4), zeros(2, 0, 4), zeros(2, 0, 4), return_lse=True),
    "no features": lambda m: m.attention(zeros(2, 3, 4), zeros(2, 3, 4), zeros(2, 3, 0), return_lse=True),
    "parts": lambda m: m.merge_attention([m.partial_attention(EMPTY, EMPTY, EMPTY)]),
    "multi_head_attention": lambda m: m.multi_head_attention(*[zeros(0, 3, 4)] * 3, num_heads=2),
    "linear": lambda m: m.linear(zeros(0, 3), zeros(3, 5), zeros(5)),
    "linear of nothing": lambda m: m.linear(zeros(2, 0), zeros(0, 5)),
    "linear to nothing": lambda m: m.linear(zeros(2, 3), zeros(3, 0)),
    "rotary": lambda m: (m.rotary(EMPTY), m.rotary(zeros(2, 0, 4))),
    "rms_norm": lambda m: m.rms_norm(zeros(0, 4), zeros(4)),
    "swiglu": lambda m: m.swiglu(zeros(0, 4), zeros(0, 4)),
}


def assert_alike(ours: Any, theirs: Any, types: bool) -> None:
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs)), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            a, b = np.asarray(a), np.asarray(b)
            assert a.shape == b.shape
            assert a.dtype == b.dtype or not types
            np.testing.assert_allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("V", [1, 5])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (1,), (2, 1)])
@pytest.mark.parametrize("name", list(SAMPLING))
def test_sampling_of_no_rows_and_of_one_token(name: str, lead: tuple[int, ...], V: int) -> None:
    assert_alike(*(SAMPLING[name](module, lead, V) for module in (hw, ref)), types=True)


@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention_of_nothing(name: str) -> None:
    assert_alike(*(ATTENTION[name](module) for module in (hw, ref)), types=False)  # the reference is float64
