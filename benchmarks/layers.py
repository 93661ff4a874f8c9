"""Rows of whole layers, projections included, and of linear alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import headway as hw

from .harness import Array, Candidate, Contest, Row
from .peers import CAN_BE_FAST
from .problem import numbers
from .runtimes import as_torch, from_torch, onnxruntime_candidate, openvino_candidate, openvino_type

LAYERS = ((512, 768, 12), (2048, 1024, 16), (1, 4096, 32))  # L, d_model, heads
LINEAR = ((512, 768, 768), (512, 4096, 4096), (2048, 1024, 4096), (8, 4096, 4096), (24, 4096, 4096))  # M, K, N
LINEAR_ROW = ((768, 768), (4096, 4096), (4096, 14336))  # K, N, of one row


def rows() -> Iterator[Row]:
    """Yield all rows: layers, then linear with each type of weights, and with weights that are stored transposed."""
    for length, width, heads in LAYERS:
        flops = 8.0 * length * width**2 + 4.0 * length**2 * width
        work, limit = (flops, "fma") if length > 1 else (16.0 * width**2, "read")
        yield Row("layers", f"L={length}, d={width}, h={heads}", partial(layer, length, width, heads), work, limit)
    for m, k, n in (*LINEAR, *((1, k, n) for k, n in LINEAR_ROW)):
        yield linear_row(m, k, n)
    for m, k, n in ((1, 4096, 4096), (512, 4096, 4096)):
        yield linear_row(m, k, n, "float32", transposed=True)
        for dtype in ("bfloat16", "float16"):
            yield linear_row(m, k, n, dtype)
            yield linear_row(m, k, n, dtype, transposed=True)


def linear_row(m: int, k: int, n: int, dtype: str = "float32", transposed: bool = False) -> Row:
    """Many rows are limited by arithmetic; one is by the memory that the weights are read from."""
    kind = "" if dtype == "float32" else f", {dtype}"
    name = f"({m}, {k}) @ ({k}, {n}){kind}{', w a transposed view' * transposed}"
    work, limit = (2.0 * m * k * n, "fma") if m > 8 else (float(k * n * numbers(dtype).itemsize), "read")
    return Row("linear", name, partial(linear, m, k, n, dtype, transposed), work, limit)


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    """Return float32 numbers of this standard deviation."""
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def chosen(length: int, most: int = 64) -> Array:
    """Choose the rows to be judged by."""
    return np.sort(np.random.default_rng(1).choice(length, min(length, most), replace=False))


# Linear --------------------------------------------------------------------------------------------------------------


def linear_problem(m: int, k: int, n: int, dtype: str, transposed: bool) -> tuple[Array, Array, Array, Array]:
    """Make x, of the weights' type, and w; choose the rows to be judged by, and compute them exactly."""
    rng = np.random.default_rng(0)
    x, w = normal(rng, m, k).astype(numbers(dtype)), normal(rng, k, n, scale=k**-0.5).astype(numbers(dtype))
    if transposed:
        w = np.ascontiguousarray(w.T).T
    rows_ = chosen(m)
    return x, w, rows_, x[rows_].astype(np.float64) @ w.astype(np.float64)


def linear(m: int, k: int, n: int, dtype: str, transposed: bool) -> Contest:
    """Linear alone, beside the matrix products of others."""
    x, w, rows_, exact = linear_problem(m, k, n, dtype, transposed)
    builders: dict[str, Callable[[], Candidate]] = {
        "headway": lambda: Candidate(lambda: hw.linear(x, w)),
        "torch": lambda: _torch_linear(x, w),
    }
    if dtype == "float32":
        builders["NumPy"] = lambda: Candidate(lambda: x @ w)
    if dtype == "bfloat16" and m > 24 and CAN_BE_FAST:
        builders["headway, fast"] = lambda: Candidate(lambda: hw.linear(x, w, precision="fast"))
    return Contest(builders, exact, lambda y: y[rows_])


def _torch_linear(x: Array, w: Array) -> Candidate:
    a, b = as_torch(x), as_torch(w.T).T if w.strides[0] < w.strides[1] else as_torch(w)
    return Candidate(lambda: a @ b, from_torch)


# Layers --------------------------------------------------------------------------------------------------------------


def layer(length: int, width: int, heads: int) -> Contest:
    """Self-attention over x (L, d) with four (d, d) projections."""
    rng = np.random.default_rng(0)
    x = normal(rng, length, width)
    weights = [normal(rng, width, width, scale=width**-0.5) for _ in range(4)]
    rows_ = chosen(length)
    wide = [w.astype(np.float64) for w in weights]
    exact = _by_hand(x.astype(np.float64), *wide, heads, rows_)
    makers = {
        "headway": _headway,
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "OpenVINO": _openvino,
        "JAX": _jax,
        "NumPy": _numpy,
    }
    return Contest({name: partial(make, x, weights, heads) for name, make in makers.items()}, exact, lambda y: y[rows_])


def _by_hand(x: Array, w_q: Array, w_k: Array, w_v: Array, w_o: Array, heads: int, rows_: Array | None = None) -> Array:
    def split(y: Array) -> Array:
        return y.reshape(len(y), heads, -1).swapaxes(0, 1)

    q, k, v = split((x if rows_ is None else x[rows_]) @ w_q), split(x @ w_k), split(x @ w_v)
    s = q @ k.swapaxes(-1, -2) * x.dtype.type(q.shape[-1] ** -0.5)
    s = np.exp(s - s.max(-1, keepdims=True))
    y = s @ v / s.sum(-1, keepdims=True)
    return y.swapaxes(0, 1).reshape(y.shape[1], -1) @ w_o


def _headway(x: Array, weights: list[Array], heads: int) -> Candidate:
    w_q, w_k, w_v, w_o = weights
    return Candidate(lambda: hw.multi_head_attention(x, x, x, num_heads=heads, w_q=w_q, w_k=w_k, w_v=w_v, w_o=w_o))


def _numpy(x: Array, weights: list[Array], heads: int) -> Candidate:
    return Candidate(lambda: _by_hand(x, *weights, heads))


def _torch(x: Array, weights: list[Array], heads: int) -> Candidate:
    t, (w_q, w_k, w_v, w_o) = as_torch(x), (as_torch(w) for w in weights)
    from torch.nn.functional import scaled_dot_product_attention as attend

    def split(y: Any) -> Any:
        return y.view(1, len(x), heads, -1).transpose(1, 2)

    def run() -> Any:
        y = attend(split(t @ w_q), split(t @ w_k), split(t @ w_v))
        return y.transpose(1, 2).reshape(x.shape) @ w_o

    return Candidate(run, from_torch)


def _onnxruntime(x: Array, weights: list[Array], heads: int) -> Candidate:
    from onnx import helper

    constants = dict(zip(("w_q", "w_k", "w_v", "w_o"), weights))
    nodes = [helper.make_node("MatMul", ["x", f"w_{name}"], [name]) for name in "qkv"]
    options = {"q_num_heads": heads, "kv_num_heads": heads}
    nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["attended"], **options))
    nodes.append(helper.make_node("MatMul", ["attended", "w_o"], ["y"]))
    return onnxruntime_candidate(
        nodes, {"x": x[None]}, np.empty_like(x[None]), constants=constants, layout=lambda y: y[0]
    )


def _openvino(x: Array, weights: list[Array], heads: int) -> Candidate:
    from openvino import opset13 as ops

    source = ops.parameter([1, *x.shape], openvino_type(x))
    apart = ops.constant(np.array([1, len(x), heads, x.shape[1] // heads]))
    order = ops.constant(np.array([0, 2, 1, 3]))

    def times(y: Any, w: Array) -> Any:
        return ops.matmul(y, ops.constant(w), False, False)

    q, k, v = (ops.transpose(ops.reshape(times(source, w), apart, False), order) for w in weights[:3])
    attended = ops.transpose(ops.scaled_dot_product_attention(q, k, v), order)
    together = ops.reshape(attended, ops.constant(np.array([1, *x.shape])), False)
    return openvino_candidate([times(together, weights[3])], [source], [x[None]], layout=lambda y: y[0])


def _jax(x: Array, weights: list[Array], heads: int) -> Candidate:
    import jax

    jax.config.update("jax_enable_x64", False)
    arrays = [jax.numpy.asarray(a) for a in (x, *weights)]

    def run(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any) -> Any:
        q, k, v = ((x @ w).reshape(1, len(x), heads, -1) for w in (w_q, w_k, w_v))
        return jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ w_o

    compiled = jax.jit(run)
    return Candidate(lambda: compiled(*arrays).block_until_ready())
