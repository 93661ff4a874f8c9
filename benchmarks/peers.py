"""How headway and each peer attend, each as well as its interface allows.

A function here takes a problem and returns a candidate, or says why it cannot. Layouts, weights, masks and caches
are made ready in advance: only the attention itself is timed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import headway as hw

from .harness import Array, Candidate, enough_memory
from .problem import Problem
from .runtimes import as_torch, from_torch, onnxruntime_candidate, openvino_candidate, openvino_type

Builder = Callable[[Problem], Candidate]
CAN_BE_FAST = "precision" in inspect.signature(hw.attention).parameters


def headway(p: Problem, **options: Any) -> Candidate:
    """Attend from plain arrays."""
    q, k, v = p.q, p.k, p.v
    window = None if p.shape.window is None else (p.shape.window, 0)
    options |= {"causal": p.shape.causal, "window": window, "mask": p.mask, "kv_lengths": p.lengths}
    options = {name: value for name, value in options.items() if value is not None and value is not False}
    return Candidate(lambda: hw.attention(q, k, v, **options))


def headway_fast(p: Problem) -> Candidate:
    """Attend with 16-bit products."""
    return headway(p, precision="fast")


def headway_cached(p: Problem) -> Candidate:
    """Attend to a KVCache that holds the keys and values."""
    cache = hw.KVCache(p.shape.groups, p.shape.size, batch_shape=(p.shape.batch,), dtype=p.shape.dtype)
    cache.append(p.k, p.v)
    q, lengths = p.q, p.lengths
    return Candidate(lambda: cache.attend(q, kv_lengths=lengths))


def by_hand(p: Problem) -> Candidate:
    """Attend as most people write it in NumPy, in place where that is easy; 16-bit types in float32."""
    enough_memory(2 * p.shape.scores)
    q, k, v, may = p.q, p.k, p.v, p.allowed()
    wide = np.float64 if q.dtype == np.float64 else np.float32
    scale = wide(p.shape.size**-0.5)

    def run() -> Array:
        s = q.astype(wide, copy=False) @ k.astype(wide, copy=False).swapaxes(-1, -2)
        s *= scale
        if may is not None:
            s = np.where(may, s, -np.inf)
        s -= s.max(-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(-1, keepdims=True)
        return (s @ v.astype(wide, copy=False)).astype(q.dtype, copy=False)

    return Candidate(run)


def torch(p: Problem) -> Candidate:
    """torch.nn.functional.scaled_dot_product_attention."""
    q, k, v = (as_torch(x) for x in (p.q, p.k, p.v))
    from torch.nn.functional import scaled_dot_product_attention as attend

    causal = p.shape.causal and p.shape.window is None
    may = None if causal else p.allowed()
    options: dict[str, Any] = {"is_causal": True} if causal else {}
    if may is not None:
        options["attn_mask"] = as_torch(may)
    if p.shape.heads != p.shape.groups:
        options["enable_gqa"] = True
    return Candidate(lambda: attend(q, k, v, **options), from_torch)


def torch_one_by_one(p: Problem) -> Candidate:
    """The same, each batch item apart with the keys it really has; groups folded where there is one query."""
    problem = p.folded() if p.shape.length == 1 else p
    q, k, v = (as_torch(x) for x in (problem.q, problem.k, problem.v))
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    parts = [(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for i, n in enumerate(p.shape.lengths)]
    return Candidate(lambda: torch.cat([attend(*part) for part in parts]), lambda y: from_torch(y).reshape(p.q.shape))


def onnxruntime(p: Problem) -> Candidate:
    """The standard operator, Attention of opset 24."""
    enough_memory(2 * p.shape.scores)
    from onnx import helper

    feeds = {"q": p.q, "k": p.k, "v": p.v}
    causal = p.shape.causal and p.shape.window is None
    names = ["q", "k", "v"]
    if p.lengths is not None:
        feeds["lengths"] = p.lengths
        names += ["", "", "", "lengths"]
    elif not causal and (may := p.allowed()) is not None:
        feeds["mask"] = may
        names += ["mask"]
    node = helper.make_node("Attention", names, ["y"], is_causal=int(causal))
    return onnxruntime_candidate([node], feeds, np.empty_like(p.q))


def onnxruntime_multi_head(p: Problem) -> Candidate:
    """Onnxruntime's own MultiHeadAttention, which does not keep all scores; (B, L, H D) in and out."""
    from onnx import helper

    feeds = {"q": _in_rows(p.q), "k": _in_rows(p.k), "v": _in_rows(p.v)}
    node = helper.make_node(
        "MultiHeadAttention", list(feeds), ["y"], domain="com.microsoft", num_heads=p.shape.heads, unidirectional=0
    )
    return onnxruntime_candidate([node], feeds, np.empty_like(feeds["q"]), layout=lambda y: _in_heads(y, p))


def onnxruntime_group_query(p: Problem) -> Candidate:
    """Onnxruntime's own GroupQueryAttention, always causal; keys and values in a cache that it appends to."""
    from onnx import helper

    shape = p.shape
    ends = np.full(shape.batch, shape.keys) if p.lengths is None else p.lengths
    new = (ends - shape.length)[:, None, None, None] + np.arange(shape.length)[:, None]
    feeds = {
        "q": _in_rows(p.q),
        "k": _in_rows(np.take_along_axis(p.k, new, 2)),
        "v": _in_rows(np.take_along_axis(p.v, new, 2)),
        "past_k": p.k.copy(),
        "past_v": p.v.copy(),
        "last": (ends - 1).astype(np.int32),
        "total": np.array(ends.max(), np.int32),
    }
    node = helper.make_node(
        "GroupQueryAttention",
        list(feeds),
        ["y", "present_k", "present_v"],
        domain="com.microsoft",
        num_heads=shape.heads,
        kv_num_heads=shape.groups,
        local_window_size=-1 if shape.window is None else shape.window + 1,
    )
    in_place = {"present_k": "past_k", "present_v": "past_v"}
    out = np.empty_like(feeds["q"])
    return onnxruntime_candidate([node], feeds, out, in_place=in_place, layout=lambda y: _in_heads(y, p))


def openvino(p: Problem) -> Candidate:
    """ScaledDotProductAttention of opset 13."""
    from openvino import opset13 as ops

    feeds = [p.q, p.k, p.v]
    causal = p.shape.causal and p.shape.window is None
    if not causal and (may := p.allowed()) is not None:
        feeds.append(may)
    inputs = [ops.parameter(x.shape, openvino_type(x)) for x in feeds]
    return openvino_candidate([ops.scaled_dot_product_attention(*inputs, causal=causal)], inputs, feeds)


def openvino_products(p: Problem) -> Candidate:
    """MatMul, Softmax, MatMul: for few queries faster than the operator."""
    from openvino import opset13 as ops

    feeds = [p.q, p.k, p.v]
    may = p.allowed()
    if may is not None:
        feeds.append(np.where(may, 0, -np.inf).astype(p.q.dtype))
    inputs = [ops.parameter(x.shape, openvino_type(x)) for x in feeds]
    scale = ops.constant(np.array(p.shape.size**-0.5, np.float32), openvino_type(p.q))
    scores = ops.matmul(ops.multiply(inputs[0], scale), inputs[1], False, True)
    if may is not None:
        scores = ops.add(scores, inputs[3])
    return openvino_candidate([ops.matmul(ops.softmax(scores, -1), inputs[2], False, False)], inputs, feeds)


def openvino_stateful(p: Problem) -> Candidate:
    """A cache kept by OpenVINO, as its language models have it: each run appends a token.

    The graph is the one that OpenVINO recognises as attention with a cache, groups included. The cache is set back
    before it has grown by 1 %.
    """
    import openvino as ov
    from openvino import opset13 as ops

    shape = p.shape
    kind = openvino_type(p.q)
    query = ops.parameter([-1, shape.heads, -1, shape.size], kind)
    beam = ops.parameter([-1], np.int32)
    inputs, present, assigns = [query], [], []
    for name in "kv":
        new = ops.parameter([-1, shape.groups, -1, shape.size], kind)
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = new.get_partial_shape(), kind, name
        variable = ov.op.util.Variable(info)
        empty = ops.concat([ops.shape_of(beam), ops.constant(np.array([shape.groups, 0, shape.size], np.int64))], 0)
        zeros = ops.broadcast(ops.constant(np.zeros(1, np.float32), kind), empty)
        past = ops.gather(ov.op.read_value(zeros, variable), beam, ops.constant(0))
        whole = ops.concat([past, new], 2)
        assigns.append(ov.op.assign(whole, variable))
        if (repeats := shape.heads // shape.groups) > 1:
            ones = ops.constant(np.ones((1, 1, repeats, 1, 1), np.float32), kind)
            repeated = ops.multiply(ops.unsqueeze(whole, ops.constant(2)), ones)
            whole = ops.reshape(repeated, ops.constant(np.array([0, shape.heads, -1, shape.size])), True)
        inputs.append(new)
        present.append(whole)
    return openvino_candidate(
        [ops.scaled_dot_product_attention(query, *present)],
        [*inputs, beam],
        [p.q, p.k[:, :, -1:].copy(), p.v[:, :, -1:].copy(), np.zeros(shape.batch, np.int32)],
        assigns=assigns,
        state=lambda: {"k": p.k[:, :, :-1].copy(), "v": p.v[:, :, :-1].copy()},
        runs_per_reset=max(1, shape.keys // 100),
    )


def jax(p: Problem) -> Candidate:
    """jax.nn.dot_product_attention, compiled; (B, L, H, D) in and out."""
    enough_memory(4 * p.shape.scores)
    import jax

    shape = p.shape
    jax.config.update("jax_enable_x64", p.q.dtype == np.float64)
    options: dict[str, Any] = {"is_causal": shape.causal}
    if shape.window is not None:
        options["local_window_size"] = (shape.window, 0)
    arrays = {"query": p.q, "key": p.k, "value": p.v}
    arrays = {name: jax.numpy.asarray(x.swapaxes(1, 2).copy()) for name, x in arrays.items()}
    if p.mask is not None:
        arrays["mask"] = jax.numpy.asarray(p.mask[None, None])
    if p.lengths is not None:
        arrays["key_value_seq_lengths"] = jax.numpy.asarray(p.lengths.astype(np.int32))
    attend = jax.jit(lambda arrays: jax.nn.dot_product_attention(**arrays, **options))
    return Candidate(lambda: attend(arrays).block_until_ready(), lambda y: np.asarray(y).swapaxes(1, 2))


def jax_products(p: Problem) -> Candidate:
    """Matmul, softmax, matmul, compiled: for few queries faster than the function."""
    import jax

    jax.config.update("jax_enable_x64", p.q.dtype == np.float64)
    may = p.allowed()
    arrays = [jax.numpy.asarray(x) for x in (p.q, p.k, p.v)]
    scale = p.shape.size**-0.5

    def attend(q: Any, k: Any, v: Any) -> Any:
        s = jax.numpy.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jax.numpy.promote_types(q.dtype, "float32"))
        s = s * scale if may is None else jax.numpy.where(may, s * scale, -np.inf)
        return jax.numpy.matmul(jax.nn.softmax(s, -1).astype(v.dtype), v)

    compiled = jax.jit(attend)
    return Candidate(lambda: compiled(*arrays).block_until_ready())


def folded(build: Builder) -> Builder:
    """Let a peer see each group's queries as rows of one head, so that it repeats no key."""

    def build_folded(p: Problem) -> Candidate:
        candidate = build(p.folded())
        return replace(candidate, output=lambda result: candidate.output(result).reshape(p.q.shape))

    return build_folded


def _in_rows(x: Array) -> Array:
    """(B, H, L, D) -> (B, L, H D)."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def _in_heads(x: Array, p: Problem) -> Array:
    """(B, L, H D) -> (B, H, L, D)."""
    return x.reshape(*x.shape[:2], p.shape.heads, -1).swapaxes(1, 2)
