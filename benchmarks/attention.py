"""Attention's rows: prefill, decode, options and number types."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from . import peers
from .harness import Contest, Row
from .peers import Builder, folded
from .problem import Problem, Shape

PREFILL: dict[str, Builder] = {
    "headway": peers.headway,
    "torch": peers.torch,
    "onnxruntime": peers.onnxruntime,
    "OpenVINO": peers.openvino,
    "JAX": peers.jax,
    "NumPy": peers.by_hand,
}
DECODE: dict[str, Builder] = {
    "headway, KVCache": peers.headway_cached,
    "headway, plain arrays": peers.headway,
    "torch": peers.torch,
    "torch, folded": folded(peers.torch),
    "onnxruntime": peers.onnxruntime,
    "onnxruntime, folded": folded(peers.onnxruntime),
    "onnxruntime, GroupQueryAttention": peers.onnxruntime_group_query,
    "OpenVINO, folded": folded(peers.openvino_products),
    "OpenVINO, stateful": peers.openvino_stateful,
    "JAX": peers.jax,
    "JAX, folded": folded(peers.jax_products),
    "NumPy": folded(peers.by_hand),
}
SAME_WITHOUT_GROUPS = ("torch, folded", "onnxruntime, folded")
RAGGED = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1)  # a batch's lengths, as shares of the longest


def rows() -> Iterator[Row]:
    """Yield all rows of attention."""
    for size in (64, 80, 128):
        for heads, length in ((12, 1), (12, 16), (12, 128), (12, 512), (12, 2048), (12, 4096), (2, 16384)):
            for causal in (False, True)[: 1 + (length > 1)]:
                name = f"{heads} heads, L={length}, D={size}{', causal' * causal}"
                yield prefill("prefill", name, Shape(heads, length, size, causal=causal))
    for keys in (1024, 4096, 32768):
        for heads in (8, 32, 64):
            yield decode("decode", decode_name(heads, 8, keys), Shape(heads, 1, 128, keys, groups=8))
    yield decode("decode", decode_name(8, 1, 32768), Shape(8, 1, 128, 32768, groups=1))
    yield from options()
    for dtype in ("float64", "bfloat16", "float16"):
        for length in (512, 2048):
            yield prefill("number types", f"{dtype}, 12 heads, L={length}, D=64", Shape(12, length, 64, dtype=dtype))
        shape = Shape(32, 1, 128, 4096, groups=8, dtype=dtype)
        yield decode("number types", f"{dtype}, decode, {decode_name(32, 8, 4096)}", shape)


def options() -> Iterator[Row]:
    """Yield masks, windows and ragged batches, beside the same without a mask."""
    for name, density in (("no mask", None), ("random mask, half of all pairs", 0.5)):
        yield prefill("options", f"{name}, 12 heads, L=2048, D=64", Shape(12, 2048, 64, density=density))
    window = Shape(12, 4096, 64, causal=True, window=256)
    yield prefill("options", "causal window of 256, 12 heads, L=4096, D=64", window)
    ragged = Shape(12, 512, 64, batch=8, lengths=tuple(int(512 * share) for share in RAGGED))
    yield prefill("options", "ragged batch of 8, 12 heads, L=512, D=64", ragged)
    ragged = Shape(32, 1, 128, 4096, groups=8, batch=8, lengths=tuple(int(4096 * share) for share in RAGGED))
    yield decode("options", f"ragged batch of 8, decode, {decode_name(32, 8, 4096)}", ragged)


def decode_name(heads: int, groups: int, keys: int) -> str:
    """Name a decoding step; D is 128 in all of them."""
    return f"{heads} over {groups} heads, S={keys}"


def prefill(section: str, name: str, shape: Shape) -> Row:
    """Many queries: limited by arithmetic."""
    builders = dict(PREFILL)
    if shape.dtype == "bfloat16" and peers.CAN_BE_FAST:
        builders["headway, fast"] = peers.headway_fast
    if shape.causal:
        builders["onnxruntime, GroupQueryAttention"] = peers.onnxruntime_group_query
    elif not shape.lengths and shape.density is None:
        builders["onnxruntime, MultiHeadAttention"] = peers.onnxruntime_multi_head
    if shape.lengths:
        builders["torch, one by one"] = peers.torch_one_by_one
    limit = "fma, float64" if shape.dtype == "float64" else "fma"
    return Row(section, name, partial(contest, shape, builders), shape.flops, limit)


def decode(section: str, name: str, shape: Shape) -> Row:
    """One query: limited by the memory that keys and values are read from."""
    builders = dict(DECODE)
    if shape.heads == shape.groups:
        for same in SAME_WITHOUT_GROUPS:
            del builders[same]
    if shape.lengths:
        del builders["OpenVINO, stateful"]
        builders["torch, one by one"] = peers.torch_one_by_one
    return Row(section, name, partial(contest, shape, builders), shape.bytes_read, "read")


def contest(shape: Shape, builders: dict[str, Builder]) -> Contest:
    """Make the arrays, and judge by a sample of the queries."""
    problem = Problem.random(shape)
    chosen = problem.sample()
    ready = {name: partial(build, problem) for name, build in builders.items()}
    return Contest(ready, problem.exact(chosen), lambda out: out[:, :, chosen])
