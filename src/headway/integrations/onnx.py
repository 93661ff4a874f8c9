"""headway inside ONNX: Attention, RotaryEmbedding and RMSNormalization for onnx's evaluator, and an onnx backend.

The semantics are those of onnx 1.23, for opsets 23 to 25. What changed on the way there:

- Opset 24 added nonpad_kv_seqlen, opset 25 left_window_size and right_window_size. Opset 25 takes no numbers of heads
  for inputs of 4 axes.
- onnx 1.22 aligned is_causal to the past keys alone; 1.23 aligns it to nonpad_kv_seqlen too, in opset 24 as well, so
  that the last query sees the last real key.
- A query that may attend to no key is NaN by the formula of onnx 1.22; in 1.23 it is 0, in Y and in
  qk_matmul_output_mode 3. headway gives 0.
- A mask that is shorter than the keys is padded with "may not attend" in both. In opset 23, whose schema pads no masks,
  a mask for one key is one for all keys.
- qk_matmul_output_mode 0 is before the softcap, as the schema says; onnx's own evaluator applies the softcap there too.

Numbers are computed in float32, or in float64 where an input is float64 or softmax_precision or stash_type says so,
and rounded once, at the end: neither attribute makes a result less precise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import headway as hw

from .. import _check

try:
    import onnx
    from onnx import TensorProto, helper
    from onnx.backend.base import Backend as OnnxBackend
    from onnx.backend.base import BackendRep
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError(f"headway.integrations.onnx needs onnx ({error}): pip install 'headway[onnx]'") from error

__all__ = ["OPERATORS", "Attention", "Backend", "Prepared", "RMSNormalization", "RotaryEmbedding", "prepare"]

Array = NDArray[Any]
_NAMES = {"float": "float32", "double": "float64"}  # of ONNX's types, in NumPy
_PRECISIONS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_DOMAIN = "ai.onnx"  # another name of "", the domain of ONNX's own operators


# Operators ------------------------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """One call of an operator."""

    inputs: Sequence[Any]  # arrays, or None, one for each of the schema
    attributes: Mapping[str, Any]
    wanted: Sequence[bool]  # which outputs, one for each of the schema
    version: int  # the opset that defined the operator

    def compute_type(self, name: str, *arrays: Array) -> type[np.floating[Any]]:
        """Return the type to compute in, for arrays and an attribute that asks for a precision."""
        given = self.attributes.get(name, TensorProto.FLOAT)
        if given not in _PRECISIONS:
            raise ValueError(f"{name}: expected one of {', '.join(map(str, _PRECISIONS))}, types of ONNX, got {given}")
        wide = given == TensorProto.DOUBLE or any(x.dtype == np.float64 for x in arrays)
        return np.float64 if wide else np.float32


def _cast(x: Array, dtype: Any) -> Array:
    """Round to a type; a number beyond its range becomes infinite, as in a kernel."""
    with np.errstate(over="ignore"):
        return x.astype(dtype, copy=False)


class _Operator(OpRun):
    """An operator for onnx's evaluator."""

    op_domain = ""
    newest = 23  # the opset that last changed it

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do as OpRun does, but for a TypeError, which it would hide behind a list of attributes."""
        try:
            return super().run(*args, **kwargs)  # type: ignore[no-untyped-call]
        except TypeError as error:
            raise (error if error.__cause__ is None else error.__cause__) from None

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        node = self.onnx_node
        opset = self.run_params["opsets"][node.domain]
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            schema = None
        if schema is None or schema.since_version > self.newest:
            raise ValueError(
                f"opset_import: expected an opset whose {node.op_type} is that of 23 to {self.newest}, got {opset}; "
                f"export the model with such an opset"
            )
        for attribute in node.attribute:
            if attribute.name not in schema.attributes:
                what = f"attribute of {node.op_type} in opset {opset}"
                raise ValueError(_check.no_such(attribute.name, attribute, what, sorted(schema.attributes)))
        given = [*inputs, *[None] * (len(schema.inputs) - len(inputs))]
        _check_types(schema, given)
        wanted = [i < len(node.output) and bool(node.output[i]) for i in range(len(schema.outputs))]
        known = {name: value for name, value in attributes.items() if value is not None}
        return self._compute(_Node(given, known, wanted, schema.since_version))

    def _compute(self, node: _Node) -> tuple[Array, ...]:
        raise NotImplementedError


def _check_types(schema: onnx.defs.OpSchema, inputs: Sequence[Array | None]) -> None:
    """Compare the types of inputs with the schema, and with one another where it gives them one type."""
    bound: dict[str, tuple[str, str]] = {}
    for formal, x in zip(schema.inputs, inputs):
        if x is None:
            if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                raise ValueError(f"{formal.name}: expected an array, got none")
            continue
        name = x.dtype.name
        allowed = sorted(_NAMES.get(kind[7:-1], kind[7:-1]) for kind in formal.types)  # of tensor(kind)
        if name not in (*allowed, "float64" if "float32" in allowed else ""):  # rotary, where ONNX has no float64
            raise TypeError(f"{formal.name}: expected numbers of type {', '.join(allowed)}, got {name}")
        first, kind = bound.setdefault(str(formal.type_str), (formal.name, name))
        if kind != name:
            raise TypeError(f"{formal.name}: expected numbers of type {kind}, as {first} has, got {name}")


class Attention(_Operator):
    """ONNX's Attention (opsets 23 to 25), by `headway.attention`."""

    newest = 25

    def _compute(self, node: _Node) -> tuple[Array, ...]:
        inputs: Sequence[Any] = [*node.inputs, None][:7]  # opset 23 has no nonpad_kv_seqlen
        q, k, v, mask, past_key, past_value, nonpad = inputs
        dtype, flat = q.dtype, q.ndim == 3
        q, k, v = _with_heads(node, q, k, v)
        if (past_key is None) != (past_value is None):
            raise ValueError("past_key: expected past_key and past_value, got one of them")
        if past_key is not None:
            if nonpad is not None:
                raise ValueError("nonpad_kv_seqlen: expected none beside past_key, got both")
            k, v = _joined(past_key, k, "past_key"), _joined(past_value, v, "past_value")
            if k.shape[2] != v.shape[2]:
                raise ValueError(
                    f"past_value: expected {past_key.shape[2]} keys as past_key, got {past_value.shape[2]}"
                )
        present = k, v
        rows = _Rows(node, q.shape[2], k.shape[2], 0 if past_key is None else past_key.shape[2], nonpad)
        rows.check(q.shape[0])
        compute = node.compute_type("softmax_precision", q, k, v)
        if compute is np.float64:
            q, k, v = (x.astype(np.float64) for x in (q, k, v))
        options: dict[str, Any] = {"scale": node.attributes.get("scale")}
        options["softcap"] = node.attributes.get("softcap") or None
        given = _mask_options(mask, (*q.shape[:3], k.shape[2]), node.version, compute)
        y = _cast(hw.attention(q, k, v, **options, **rows.options(given)), dtype)
        if flat:
            y = y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], y.shape[1] * y.shape[3])
        outputs = [y, *(x.copy() if wanted else x for x, wanted in zip(present, node.wanted[1:3]))]
        mode = node.attributes.get("qk_matmul_output_mode", 0)
        if mode not in (0, 1, 2, 3):
            raise ValueError(f"qk_matmul_output_mode: expected 0, 1, 2 or 3, got {mode}")
        if node.wanted[3]:
            outputs.append(_cast(_scores(mode, q, k, options, given, rows), dtype))
        return tuple(outputs)


def _with_heads(node: _Node, *arrays: Array) -> list[Array]:
    """Return Q, K and V as (B, heads, length, size)."""
    heads = []
    for x, name, attribute in zip(arrays, "QKV", ("q_num_heads", "kv_num_heads", "kv_num_heads")):
        count = node.attributes.get(attribute)
        if x.ndim not in (3, 4) or x.ndim != arrays[0].ndim:
            axes = f"{arrays[0].ndim} axes, as Q has" if arrays[0].ndim in (3, 4) else "3 or 4 axes"
            raise ValueError(f"{name}: expected {axes}, got shape {x.shape}")
        if x.ndim == 3:
            if not count:
                raise ValueError("q_num_heads: expected q_num_heads and kv_num_heads for inputs of 3 axes, got none")
            if count < 0 or x.shape[2] % count:
                raise ValueError(f"{attribute}: expected a divisor of the last axis of {name} {x.shape}, got {count}")
            x = x.reshape(*x.shape[:2], count, x.shape[2] // count).swapaxes(1, 2)
        elif count is not None and (node.version >= 25 or count != x.shape[1]):
            raise ValueError(
                f"{attribute}: expected none for inputs of 4 axes, got {count} for {name} {x.shape}; leave it out"
            )
        heads.append(x)
    return heads


def _joined(past: Array, new: Array, name: str) -> Array:
    if past.ndim != 4 or (*past.shape[:2], past.shape[3]) != (*new.shape[:2], new.shape[3]):
        batch, heads, _, size = new.shape
        raise ValueError(f"{name}: expected shape ({batch}, {heads}, P, {size}), got {past.shape}")
    return np.concatenate((past, new), axis=2)


def _mask_options(mask: Array | None, shape: tuple[int, ...], version: int, compute: Any) -> dict[str, Array]:
    """Return attn_mask as headway's mask or bias, (B, H, L, S)."""
    if mask is None:
        return {}
    hidden = False if mask.dtype == np.bool_ else -np.inf
    numbers = mask if mask.dtype == np.bool_ else _cast(mask, compute)
    missing = shape[-1] - mask.shape[-1] if mask.ndim else 0
    if missing > 0 and (mask.shape[-1] != 1 or version > 23):
        numbers = np.pad(numbers, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=hidden)
    try:
        whole = np.broadcast_to(numbers, shape)
    except ValueError:
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {shape}, (batch, heads, queries, keys), got {mask.shape}"
        ) from None
    return {"mask" if mask.dtype == np.bool_ else "bias": whole}


class _Rows:
    """Where queries stand among the keys, and which keys they see apart from attn_mask."""

    def __init__(self, node: _Node, queries: int, keys: int, past: int, nonpad: Array | None) -> None:
        self.queries, self.keys, self.nonpad = queries, keys, nonpad
        self.causal = bool(node.attributes.get("is_causal", 0))
        self.window = [node.attributes.get(f"{side}_window_size", -1) for side in ("left", "right")]
        self.offset: Any = past if nonpad is None else nonpad - queries

    def check(self, batch: int) -> None:
        for given, side in zip(self.window, ("left", "right")):
            if given < -1:
                raise ValueError(f"{side}_window_size: expected an integer >= -1, got {given}")
        if self.nonpad is None:
            return
        if self.nonpad.shape != (batch,) or not ((self.nonpad >= 0) & (self.nonpad <= self.keys)).all():
            raise ValueError(
                f"nonpad_kv_seqlen: expected {batch} integers from 0 to {self.keys}, got {self.nonpad.tolist()}"
            )

    def options(self, given: Mapping[str, Array]) -> dict[str, Any]:
        """Return options of attention: attn_mask, as given, and the rest, without an array of L x S where that goes."""
        options: dict[str, Any] = {**given, "kv_lengths": self.nonpad}
        window = tuple(None if side < 0 else side for side in self.window)
        if not self.causal and window == (None, None):
            return options
        square = self.nonpad is None and self.offset == 0 and self.queries == self.keys
        if self.nonpad is not None or self.offset == self.keys - self.queries:
            corner = "bottom_right"
        else:
            corner = "top_left" if self.offset == 0 else ""
        if square or (corner and self.causal):
            return {**options, "causal": corner if self.causal else None, "window": window}
        return {**options, "mask": self.mask(given.get("mask"))}

    def mask(self, given: Array | None) -> Array:
        """Return which keys each query sees, of those that a mask leaves, broadcasting to (B, H, L, S)."""
        keys = np.arange(self.keys)
        position = np.reshape(self.offset, (-1, 1, 1, 1)) + np.arange(self.queries)[:, None]
        left, right = self.window
        seen: Array = np.ones(position.shape[:-1] + keys.shape, np.bool_) if given is None else given
        if self.causal:
            seen = seen & (keys <= position)
        if left >= 0:
            seen = seen & (keys >= position - left)
        if right >= 0:
            seen = seen & (keys <= position + right)
        if self.nonpad is not None:
            seen = seen & (keys < self.nonpad[:, None, None, None])
        return seen


def _scores(
    mode: int, q: Array, k: Array, options: Mapping[str, Any], given: Mapping[str, Array], rows: _Rows
) -> Array:
    """Return what qk_matmul_output shows, (B, H, L, S), in the bits that attention has on its way."""
    if mode == 3:
        return hw.attention_weights(q, k, **options, **rows.options(given))
    # The log-sum-exp of a query that sees one key is its score.
    alone = k.swapaxes(1, 2)[:, :, :, None]  # (B, S, G, 1, D)
    no_value = np.zeros((k.shape[1], 1, 1), k.dtype)
    softcap = options["softcap"] if mode else None
    found = hw.attention(q[:, None], alone, no_value, return_lse=True, scale=options["scale"], softcap=softcap)[1]
    scores: Array = np.moveaxis(found, 1, -1)
    if mode == 2:
        with np.errstate(over="ignore"):
            scores = np.where(rows.mask(given.get("mask")), scores + given.get("bias", 0), -np.inf)
    return scores


class RotaryEmbedding(_Operator):
    """ONNX's RotaryEmbedding (opset 23): pairs of features, turned by given cosines and sines."""

    def _compute(self, node: _Node) -> tuple[Array, ...]:
        x, cosine, sine, position_ids = node.inputs
        heads = node.attributes.get("num_heads", 0)
        if x.ndim == 3 and (heads <= 0 or x.shape[2] % heads):
            raise ValueError(f"num_heads: expected a divisor of the last axis of X {x.shape}, got {heads}")
        if x.ndim not in (3, 4):
            raise ValueError(f"X: expected 3 or 4 axes, got shape {x.shape}")
        whole = x.reshape(*x.shape[:2], heads, x.shape[2] // heads) if x.ndim == 3 else x.swapaxes(1, 2)  # (B, L, H, D)
        batch, length, _, size = whole.shape
        turned = node.attributes.get("rotary_embedding_dim", 0) or size
        if turned % 2 or not 0 < turned <= size:
            raise ValueError(f"rotary_embedding_dim: expected an even number up to the head size {size}, got {turned}")
        compute = np.float64 if x.dtype == np.float64 else np.float32  # one rounding of 16-bit results
        angles = []
        for cache, name in ((cosine, "cos_cache"), (sine, "sin_cache")):
            if position_ids is not None:
                if cache.ndim != 2 or cache.shape[1] != turned // 2:
                    raise ValueError(f"{name}: expected shape (positions, {turned // 2}), got {cache.shape}")
                if position_ids.shape != (batch, length):
                    raise ValueError(f"position_ids: expected shape ({batch}, {length}), got {position_ids.shape}")
                if not ((position_ids >= 0) & (position_ids < len(cache))).all():
                    raise ValueError(
                        f"position_ids: expected integers from 0 to {len(cache) - 1}, the last row of {name}"
                    )
                cache = cache[position_ids]
            elif cache.shape not in ((batch, length, turned // 2), (1, length, turned // 2)):
                expected = f"({batch}, {length}, {turned // 2}), as there are no position_ids"
                raise ValueError(f"{name}: expected shape {expected}, got {cache.shape}")
            angles.append(cache[:, :, None].astype(compute))
        interleaved = node.attributes.get("interleaved", 0)
        half = turned // 2
        first, second = (
            (slice(0, turned, 2), slice(1, turned, 2)) if interleaved else (slice(half), slice(half, turned))
        )
        a, b = whole[..., first].astype(compute), whole[..., second].astype(compute)
        c, s = angles
        y = np.empty(x.shape, x.dtype)
        out = y.reshape(whole.shape) if x.ndim == 3 else y.swapaxes(1, 2)
        out[..., turned:] = whole[..., turned:]
        with np.errstate(over="ignore", invalid="ignore"):
            out[..., first], out[..., second] = a * c - b * s, b * c + a * s
        return (y,)


class RMSNormalization(_Operator):
    """ONNX's RMSNormalization (opset 23), by `headway.rms_norm`."""

    def _compute(self, node: _Node) -> tuple[Array, ...]:
        x, scale = node.inputs
        axis = node.attributes.get("axis", -1)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"axis: expected an integer from {-x.ndim} to {x.ndim - 1} for X {x.shape}, got {axis}")
        if scale.ndim > x.ndim or any(n not in (1, m) for n, m in zip(scale.shape[::-1], x.shape[::-1])):
            raise ValueError(f"scale: expected a shape that broadcasts to that of X {x.shape}, got {scale.shape}")
        compute = node.compute_type("stash_type", x, scale)
        columns = math.prod(x.shape[axis:])
        rows = _cast(x, compute).reshape(math.prod(x.shape[: axis % x.ndim]), columns)
        # ONNX allows epsilon 0; headway a row of zeros, for which epsilon is there.
        epsilon = node.attributes.get("epsilon", 1e-5) or float(np.finfo(compute).tiny)
        unit = hw.rms_norm(rows, np.ones(columns, compute), eps=epsilon).reshape(x.shape)
        with np.errstate(over="ignore"):
            return (_cast(unit * scale.astype(compute), scale.dtype),)


OPERATORS: list[type[OpRun]] = [Attention, RotaryEmbedding, RMSNormalization]


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
        model = _with_one_domain(onnx.load(model) if isinstance(model, (str, os.PathLike)) else model)
        self.evaluator = ReferenceEvaluator(model, new_ops=OPERATORS)
        self._values = {value.name: value for value in model.graph.input}
        self._needed = self._values.keys() - {tensor.name for tensor in model.graph.initializer}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Compute the outputs.

        Args:
            inputs: a list of arrays in the order of the model's inputs, those that have an initializer left out or
                not; or a dict of them by name.
            **kwargs: of onnx; nothing here.

        Returns:
            The outputs, in the model's order.

        Raises:
            TypeError: numbers of another type than the model says.
            ValueError: another number of inputs, other names or shapes, or an input that an operator does not take.
        """
        names = list(self._values)
        if not isinstance(inputs, dict):
            inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
            if len(inputs) != len(names):
                names = [name for name in names if name in self._needed]
            if len(inputs) != len(names):
                raise ValueError(f"inputs: expected {len(names)}, {', '.join(names)}, got {len(inputs)}")
            inputs = dict(zip(names, inputs))
        for name in inputs.keys() - self._values.keys():
            raise ValueError(_check.no_such(name, inputs[name], "input of the model", names))
        for name in names:
            if inputs.get(name) is not None:
                _check_value(inputs[name], self._values[name])
            elif name in self._needed and self._values[name].type.HasField("tensor_type"):
                raise ValueError(f"{name}: expected an array, got none")
        return tuple(self.evaluator.run(None, inputs))


def _with_one_domain(model: Any) -> Any:
    """Return a model that calls ONNX's own operators by one name, which onnx's evaluator knows."""
    if not isinstance(model, onnx.ModelProto):
        raise TypeError(f"model: expected an onnx.ModelProto or a path, got {_check.shown(model)}")
    if all(part.domain != _DOMAIN for part in (*model.opset_import, *model.graph.node)):
        return model
    renamed = onnx.ModelProto()
    renamed.CopyFrom(model)
    for part in (*renamed.opset_import, *renamed.graph.node):
        if part.domain == _DOMAIN:
            part.domain = ""
    return renamed


def _check_value(x: Any, value: onnx.ValueInfoProto) -> None:
    """Compare an array with what the model says of an input."""
    kind = value.type.tensor_type
    if not isinstance(x, np.ndarray) or not kind.elem_type:
        return
    expected = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if x.dtype != expected and kind.elem_type != TensorProto.STRING:
        raise TypeError(f"{value.name}: expected numbers of type {expected}, as the model says, got {x.dtype}")
    if kind.HasField("shape"):
        shape = [axis.dim_value if axis.HasField("dim_value") else axis.dim_param or "?" for axis in kind.shape.dim]
        if len(shape) != x.ndim or any(type(n) is int and n != m for n, m in zip(shape, x.shape)):
            raise ValueError(f"{value.name}: expected shape ({', '.join(map(str, shape))}), got {x.shape}")


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
        names = [name for name in node.input if name]
        if isinstance(inputs, (list, tuple)) and len(inputs) == len(node.input):  # also for inputs without a name
            inputs = [x for x, name in zip(inputs, node.input) if name]
        if len(inputs) != len(names):
            raise ValueError(f"inputs: expected {len(names)}, {', '.join(names)}, got {len(inputs)}")
        return tuple(evaluator.run(None, dict(zip(names, inputs))))

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
        TypeError: no model.
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
