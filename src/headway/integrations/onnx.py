"""headway inside ONNX: Attention, RotaryEmbedding and RMSNormalization for onnx's evaluator, and an onnx backend.

The semantics are those of onnx 1.23, for opsets 23 to 25. What changed on the way there:

- Opset 24 added nonpad_kv_seqlen, opset 25 left_window_size and right_window_size.
- onnx 1.22 aligned is_causal to the past keys alone; 1.23 aligns it to nonpad_kv_seqlen too, in opset 24 as well, so
  that the last query sees the last real key.
- A query that may attend to no key is NaN by the formula of onnx 1.22; in 1.23 it is 0, in Y and in
  qk_matmul_output_mode 3. headway gives 0.
- A mask that is shorter than the keys is padded with "may not attend" in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import headway as hw

from .. import _check

try:
    import onnx
    from onnx.backend.base import Backend as OnnxBackend
    from onnx.backend.base import BackendRep
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError(f"headway.integrations.onnx needs onnx ({error}): pip install 'headway[onnx]'") from error

__all__ = ["OPERATORS", "Attention", "Backend", "Prepared", "RMSNormalization", "RotaryEmbedding", "prepare"]

Array = NDArray[Any]


# Operators ------------------------------------------------------------------------------------------------------------


class Attention(OpRun):
    """ONNX's Attention (opsets 23 to 25), by `headway.attention`."""

    op_domain = ""

    def _run(
        self,
        q: Array,
        k: Array,
        v: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        *,
        is_causal: int | None = None,
        q_num_heads: int | None = None,
        kv_num_heads: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        softmax_precision: int | None = None,  # headway computes in float32, and in float64 for float64
        qk_matmul_output_mode: int | None = None,
        left_window_size: int | None = None,
        right_window_size: int | None = None,
    ) -> tuple[Array, ...]:
        if (past_key is None) != (past_value is None):
            raise ValueError("past_key: expected past_key and past_value, got one of them")
        if past_key is not None and nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen: expected none beside past_key, got both")
        flat = q.ndim == 3
        if flat:
            if not q_num_heads or not kv_num_heads:
                raise ValueError("q_num_heads: expected q_num_heads and kv_num_heads for inputs of 3 axes, got none")
            q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
        past = 0
        if past_key is not None and past_value is not None:
            past = past_key.shape[2]
            k, v = np.concatenate([past_key, k], 2), np.concatenate([past_value, v], 2)
        length, keys = q.shape[2], k.shape[2]
        offset = past if nonpad_kv_seqlen is None else nonpad_kv_seqlen.reshape(-1, 1, 1, 1) - length
        window = tuple(None if side in (None, -1) else side for side in (left_window_size, right_window_size))
        options: dict[str, Any] = {"scale": scale, "softcap": softcap or None, "kv_lengths": nonpad_kv_seqlen}
        options |= _positions(bool(is_causal), window, offset, length, keys)
        if attn_mask is not None:
            short = keys - attn_mask.shape[-1]
            no = False if attn_mask.dtype == np.bool_ else -np.inf
            attn_mask = np.pad(attn_mask, [*[(0, 0)] * (attn_mask.ndim - 1), (0, short)], constant_values=no)
            if attn_mask.dtype == np.bool_:
                options["mask"] = attn_mask & options.get("mask", True)
            else:
                options["bias"] = attn_mask
        y = hw.attention(q, k, v, **options).astype(q.dtype)
        scores = _scores(q, k, qk_matmul_output_mode or 0, options)
        return (y.swapaxes(1, 2).reshape(*y.shape[::2], -1) if flat else y), k, v, scores


def _heads(x: Array, heads: int) -> Array:
    """(batch, length, heads * size) -> (batch, heads, length, size)."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _positions(causal: bool, window: Sequence[int | None], offset: Any, length: int, keys: int) -> dict[str, Any]:
    """Return the options that say which keys a query sees by its position, offset + its index."""
    left, right = window
    by_lengths = np.ndim(offset) > 0  # "bottom_right" counts from the last real key, as the offset then does
    if causal and (by_lengths or offset in (0, keys - length)):
        return {"causal": "bottom_right" if by_lengths or offset else "top_left", "window": (left, right)}
    away = np.arange(keys) - np.arange(length)[:, None] - offset
    allowed = np.ones(away.shape, np.bool_)
    for far, beyond in ((left, -away), (0 if causal else right, away)):
        if far is not None:
            allowed &= beyond <= far
    return {} if allowed.all() else {"mask": allowed}


def _scores(q: Array, k: Array, mode: int, options: dict[str, Any]) -> Array:
    """Return what qk_matmul_output shows, (batch, heads, queries, keys).

    0: the scaled scores; 1: after the softcap, by NumPy's tanh; 2: with mask and bias too; 3: the weights.
    """
    if mode == 3:
        return hw.attention_weights(q, k, **options).astype(q.dtype)
    shape = (*q.shape[:3], k.shape[2])
    compute = np.float64 if q.dtype == np.float64 else np.float32
    scale = options["scale"] if options["scale"] is not None else q.shape[-1] ** -0.5
    group = q.shape[1] // k.shape[1]
    scores = np.empty(shape, compute)
    for b, h in np.ndindex(*shape[:2]):
        scores[b, h] = hw.linear(q[b, h].astype(compute), k[b, h // group].astype(compute).T) * compute(scale)
    if mode >= 1 and options["softcap"]:
        scores = compute(options["softcap"]) * np.tanh(scores / compute(options["softcap"]))
    if mode == 2:
        scores = scores + options.get("bias", 0)
        sees = hw.attention_weights(
            np.zeros((*shape[:3], 1), np.float32),
            np.zeros((*k.shape[:3], 1), np.float32),
            **{name: value for name, value in options.items() if name not in ("bias", "scale", "softcap")},
        )
        scores = np.where(sees > 0, scores, -np.inf)
    return scores.astype(q.dtype)


class RotaryEmbedding(OpRun):
    """ONNX's RotaryEmbedding (opset 23): pairs of features, turned by given cosines and sines."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        cos_cache: Array,
        sin_cache: Array,
        position_ids: Array | None = None,
        *,
        interleaved: int | None = None,
        rotary_embedding_dim: int | None = None,
        num_heads: int | None = None,
    ) -> tuple[Array]:
        if x.ndim == 3 and not num_heads:
            raise ValueError("num_heads: expected a number of heads for an input of 3 axes, got none")
        heads = x.swapaxes(1, 2) if x.ndim == 4 else x.reshape(*x.shape[:2], num_heads or 1, -1)
        size = rotary_embedding_dim or heads.shape[-1]
        if position_ids is not None:
            cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
        if cos_cache.shape[-1] != size // 2 or sin_cache.shape[-1] != size // 2:
            raise ValueError(
                f"cos_cache: expected {size // 2} cosines and sines of a position, got {cos_cache.shape[-1]} and "
                f"{sin_cache.shape[-1]}"
            )
        compute: Any = np.float64 if x.dtype == np.float64 else np.float32  # one rounding of 16-bit results
        cos, sin = (cache.astype(compute)[:, :, None] for cache in (cos_cache, sin_cache))
        first, second = (
            (slice(0, size, 2), slice(1, size, 2)) if interleaved else (slice(size // 2), slice(size // 2, size))
        )
        a, b = (heads[..., half].astype(compute) for half in (first, second))
        y = heads.copy()
        y[..., first] = cos * a - sin * b
        y[..., second] = sin * a + cos * b
        return ((y.swapaxes(1, 2) if x.ndim == 4 else y.reshape(x.shape)),)


class RMSNormalization(OpRun):
    """ONNX's RMSNormalization (opset 23), by `headway.rms_norm`."""

    op_domain = ""

    def _run(
        self,
        x: Array,
        scale: Array,
        *,
        axis: int | None = None,
        epsilon: float | None = None,
        stash_type: int | None = None,  # headway computes in float32, and in float64 for float64
    ) -> tuple[Array]:
        first = range(x.ndim)[-1 if axis is None else axis]
        size = int(np.prod(x.shape[first:]))
        for_all = scale.ndim <= x.ndim - first  # else the rows have scales of their own
        weight = np.broadcast_to(scale, x.shape[first:]).reshape(size) if for_all else np.ones(size, x.dtype)
        y = hw.rms_norm(x.reshape(-1, size), weight, eps=1e-5 if epsilon is None else epsilon).reshape(x.shape)
        return ((y if for_all else y * scale).astype(scale.dtype),)


OPERATORS = [Attention, RotaryEmbedding, RMSNormalization]


# The backend ----------------------------------------------------------------------------------------------------------


class Prepared(BackendRep):
    """A model that is ready to run; `prepare` makes it.

    Attributes:
        evaluator: of onnx, with headway's operators.

    >>> from onnx import TensorProto, helper
    >>> from headway.integrations.onnx import prepare
    >>> names = {"X": [2, 4], "scale": [4], "Y": [2, 4]}
    >>> x, scale, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items())
    >>> graph = helper.make_graph([helper.make_node("RMSNormalization", ["X", "scale"], ["Y"])], "g", [x, scale], [y])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    >>> prepare(model).run([np.ones((2, 4), np.float32), np.ones(4, np.float32)])[0].round(4).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    """

    def __init__(self, model: Any) -> None:
        self.evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Compute the outputs.

        Args:
            inputs: a list of arrays in the order of the model's inputs, or a dict of them by name.
            **kwargs: of onnx; nothing here.

        Returns:
            The outputs, in the model's order.

        Raises:
            ValueError: another number of inputs, or an input that an operator does not take.
        """
        names = list(map(str, self.evaluator.input_names))
        if not isinstance(inputs, dict):
            inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            if len(inputs) > len(names):
                raise ValueError(f"inputs: expected {len(names)}, {', '.join(names)}, got {len(inputs)}")
            inputs = dict(zip(names, inputs))
        return tuple(self.evaluator.run(None, inputs))


class Backend(OnnxBackend):
    """An onnx backend, for `onnx.backend.test` and all that takes one. Its methods are static, as onnx wants it."""

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> Prepared:
        """Do as the function `prepare` does.

        Args:
            model: an `onnx.ModelProto`, or a path.
            device: "CPU".
            **kwargs: of onnx; nothing here.

        Returns:
            A `Prepared` model.

        Raises:
            ValueError: another device.
        """
        return prepare(model, device)

    @classmethod
    def run_node(
        cls, node: Any, inputs: Any, device: str = "CPU", outputs_info: Any = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Compute the outputs of one node.

        Args:
            node: an `onnx.NodeProto`.
            inputs: arrays for those of its inputs that have a name, in their order.
            device: "CPU".
            outputs_info: of onnx; nothing here.
            **kwargs: opset_version, 25 unless given, or the newest that onnx has.

        Returns:
            The outputs.

        Raises:
            ValueError: another device, or an input that the operator does not take.
        """
        cls._on_cpu(device)
        opset = kwargs.get("opset_version", min(25, onnx.defs.onnx_opset_version()))
        evaluator = ReferenceEvaluator(node, opsets={"": opset}, new_ops=OPERATORS)
        return tuple(evaluator.run(None, dict(zip((name for name in node.input if name), inputs))))

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether this is the CPU.

        Args:
            device: as onnx writes it, "CPU" or "CUDA:1".

        Returns:
            True for the CPU.
        """
        return device.partition(":")[0] == "CPU"

    @classmethod
    def _on_cpu(cls, device: str) -> None:
        if not cls.supports_device(device):
            raise ValueError(f"device: expected 'CPU', got {_check.shown(device)}")


def prepare(model: Any, device: str = "CPU") -> Prepared:
    """Make a model ready to run: Attention, RotaryEmbedding and RMSNormalization by headway, all else by onnx.

    onnx's evaluator of the other operators is written to be right, not to be fast.

    Args:
        model: an `onnx.ModelProto`, or a path.
        device: "CPU".

    Returns:
        A `Prepared` model.

    Raises:
        ValueError: another device.

    >>> from onnx import TensorProto, helper
    >>> from headway.integrations.onnx import prepare
    >>> names = {"Q": [1, 2, 3, 4], "K": [1, 2, 3, 4], "V": [1, 2, 3, 4], "Y": [1, 2, 3, 4]}
    >>> q, k, v, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items())
    >>> node = helper.make_node("Attention", ["Q", "K", "V"], ["Y"], is_causal=1)
    >>> graph = helper.make_graph([node], "g", [q, k, v], [y])
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> prepare(model).run([x, x, x])[0].shape
    (1, 2, 3, 4)
    """
    Backend._on_cpu(device)
    return Prepared(model)
