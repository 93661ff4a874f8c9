"""The other operations of a transformer layer, under the same contract of bits."""

from __future__ import annotations

import math
import typing
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _check
from .._arrays import Operand, compute_dtype, promote, storage, unwrap
from .._signatures import AnyArray, NumPyLike, Tensor
from .options import Precision, is_fast

__all__ = ["linear", "rms_norm", "rotary", "swiglu"]

MAX_ANGLE = 2**24  # the range that sine and cosine are reduced exactly in


def product(
    x: Operand, w: Operand, b: Operand | None, dtype: str, names: tuple[str, str, str], precision: Precision
) -> NDArray[Any]:
    """Return x w + b as numbers of this type, for operands that are not yet checked."""
    x_name, w_name, b_name = names
    if w.data.ndim != 2:
        raise ValueError(f"{w_name}: expected shape (in, out), got {w.data.shape}")
    if x.data.ndim < 1 or x.data.shape[-1] != w.data.shape[0]:
        raise ValueError(
            f"{w_name}: expected shape (in, out) with in = {x.data.shape[-1] if x.data.ndim else 'the last axis'} as "
            f"{x_name} {x.data.shape} has, got {w.data.shape}; y = {x_name} @ {w_name}, so a weight stored "
            f"as (out, in) goes in transposed"
        )
    if b is not None and b.data.shape != w.data.shape[1:]:
        raise ValueError(f"{b_name}: expected shape ({w.data.shape[1]},), got {b.data.shape}")
    wide = compute_dtype(dtype) == "float64"
    fast = is_fast(precision, wide, f"{x_name} and {w_name}")
    *leading, inner = x.data.shape
    y = np.empty((*leading, w.data.shape[1]), storage(dtype))
    if y.size:
        rows = math.prod(leading)
        offset = None if b is None else b.data
        _native.linear(x.data.reshape(rows, inner), w.data, offset, wide, fast, y.reshape(rows, -1))
    return y


@typing.overload
def linear(x: NumPyLike, w: AnyArray, b: AnyArray | None = None, *, precision: Precision = "exact") -> NDArray[Any]: ...
@typing.overload
def linear(x: Tensor, w: AnyArray, b: AnyArray | None = None, *, precision: Precision = "exact") -> Tensor: ...
@_check.public
def linear(x: AnyArray, w: AnyArray, b: AnyArray | None = None, *, precision: Precision = "exact") -> Any:
    """Return y = x @ w + b.

    Args:
        x: (..., in), of float64, float32, float16 or bfloat16.
        w: (in, out), any strides: a weight stored as (out, in) goes in as its transpose view.
        b: (out,), or None.
        precision: "exact"; "fast" gives up the contract of bits for the machine's 16-bit dot products, where it has
            any: x and w are rounded to bfloat16, sums are float32. Up to 24 rows are exact: they wait for memory.

    Returns:
        (..., out) of x's kind, in the type that x, w and b promote to.

    Raises:
        TypeError: not an array of floating numbers.
        ValueError: shapes that do not fit; a precision that there is not, or "fast" for float64.

    >>> import numpy as np, headway as hw
    >>> hw.linear(np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([0.5, 0.5]))
    array([[13.5, 16.5]])
    """
    left, right = unwrap(x, "x"), unwrap(w, "w")
    offset = None if b is None else unwrap(b, "b")
    dtype = promote(left.dtype, right.dtype, *(() if offset is None else (offset.dtype,)))
    return left.wrap(product(left, right, offset, dtype, ("x", "w", "b"), precision), dtype)


_BASE = "a number >= 1"


def _as_frequencies(frequencies: Any, half: int) -> tuple[NDArray[np.float64], float]:
    """Return turns per position, one for each pair, and the largest."""
    turns = np.empty(half)
    given = unwrap(frequencies, "frequencies").astype("float64")
    turns[:] = _check.broadcast(given, turns.shape, "frequencies", "(D/2,)")
    turns += 0.0  # no -0, which equals 0 where a call is remembered
    if not np.isfinite(turns).all():
        raise ValueError("frequencies: expected finite numbers, got NaN or inf")
    return turns, float(np.abs(turns).max(initial=0))


_frequencies = lru_cache(maxsize=64)(_as_frequencies)


@lru_cache(maxsize=64)
def _frequencies_of_base(base: float, half: int) -> tuple[NDArray[np.float64], float]:
    turns = np.empty(half)
    _native.rotary_frequencies(_check.number(base, "base", _BASE, above=np.nextafter(1, 0)), turns)
    return turns, float(turns.max(initial=0))


@typing.overload
def rotary(
    x: NumPyLike, *, positions: AnyArray | None = None, base: float = 10000.0, frequencies: AnyArray | None = None
) -> NDArray[Any]: ...
@typing.overload
def rotary(
    x: Tensor, *, positions: AnyArray | None = None, base: float = 10000.0, frequencies: AnyArray | None = None
) -> Tensor: ...
@_check.public
def rotary(
    x: AnyArray, *, positions: AnyArray | None = None, base: float = 10000.0, frequencies: AnyArray | None = None
) -> Any:
    """Turn pairs of features by angles that grow with the position (Su et al., 2021, RoFormer).

    Feature i is paired with feature i + D/2, the layout of Llama checkpoints.

    Args:
        x: (..., L, D), D even.
        positions: integers from 0 to 2^24 - 1, broadcasting to (..., L); 0 .. L - 1 by default.
        base: pair i turns by position * base^(-2 i / D); at least 1.
        frequencies: (D / 2,) turns per position in radians, instead of those that base gives.

    Returns:
        (..., L, D), of x's kind and type.

    Raises:
        TypeError: not an array of floating numbers; positions that are no integers.
        ValueError: an odd D, shapes that do not fit, an angle of 2^24 or more.

    >>> import numpy as np, headway as hw
    >>> np.round(hw.rotary(np.array([[1.0, 0.0]]), positions=[1]), 4)
    array([[0.5403, 0.8415]])
    """
    operand = unwrap(x, "x")
    if operand.data.ndim < 2 or operand.data.shape[-1] % 2:
        raise ValueError(f"x: expected shape (..., L, D) with D even, got {operand.data.shape}")
    *batch, length, size = operand.data.shape
    if len(batch) > 8:
        _check.batch_shape(x=tuple(batch))
    given: Any = frequencies
    if given is None:
        base = base if type(base) is float else _check.number(base, "base", _BASE)
        turns, fastest = _frequencies_of_base(base, size // 2)
    elif type(given) is tuple and set(map(type, given)) == {float}:
        turns, fastest = _frequencies(given, size // 2)  # as a model's settings hold them, for every token
    else:
        turns, fastest = _as_frequencies(given, size // 2)
    if positions is None and length > MAX_ANGLE and operand.data.size:
        raise ValueError(f"x: expected at most {MAX_ANGLE} rows where positions are their numbers, got {length}")
    if positions is None:
        places = np.arange(length) if operand.data.size else np.broadcast_to(np.int64(0), length)
    else:
        places = _check.integers(positions, "positions", 0, MAX_ANGLE - 1)
    places = _check.broadcast(places, (*batch, length), "positions", "(..., L)")
    if fastest * MAX_ANGLE > MAX_ANGLE and places.size and fastest * int(places.max()) >= MAX_ANGLE:
        raise ValueError(f"frequencies: expected angles below 2^24, got {fastest} at position {places.max()}")
    y = np.empty(operand.data.shape, operand.data.dtype)
    if y.size:
        _native.rotary(operand.data, places, turns, operand.dtype == "float64", y)
    return operand.wrap(y, operand.dtype)


@typing.overload
def rms_norm(x: NumPyLike, weight: AnyArray, *, eps: float = 1e-6) -> NDArray[Any]: ...
@typing.overload
def rms_norm(x: Tensor, weight: AnyArray, *, eps: float = 1e-6) -> Tensor: ...
@_check.public
def rms_norm(x: AnyArray, weight: AnyArray, *, eps: float = 1e-6) -> Any:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich, 2019).

    Args:
        x: (..., M).
        weight: (M,).
        eps: keeps a row of zeros finite; > 0.

    Returns:
        (..., M) of x's kind, in the type that x and weight promote to.

    Raises:
        TypeError: not an array of floating numbers.
        ValueError: shapes that do not fit; an eps that is not above 0.

    >>> import numpy as np, headway as hw
    >>> hw.rms_norm(np.array([3.0, -3.0]), np.array([1.0, 2.0]), eps=1e-12).round(6)
    array([ 1., -2.])
    """
    operand, factors = unwrap(x, "x"), unwrap(weight, "weight")
    if operand.data.ndim < 1 or factors.data.shape != operand.data.shape[-1:]:
        raise ValueError(
            f"weight: expected the shape of x's last axis, got {factors.data.shape} for x {operand.data.shape}"
        )
    dtype = promote(operand.dtype, factors.dtype)
    y = np.empty(operand.data.shape, storage(dtype))
    if y.size:
        compute, columns = compute_dtype(dtype), factors.data.size
        epsilon = _check.number(eps, "eps", "a number > 0", above=0.0, within=compute)
        rows, results = operand.data.reshape(-1, columns), y.reshape(-1, columns)
        _native.rms_norm(rows, factors.data, epsilon, compute == "float64", results)
    return operand.wrap(y, dtype)


@typing.overload
def swiglu(gate: NumPyLike, up: AnyArray) -> NDArray[Any]: ...
@typing.overload
def swiglu(gate: Tensor, up: AnyArray) -> Tensor: ...
@_check.public
def swiglu(gate: AnyArray, up: AnyArray) -> Any:
    """Return gate * sigmoid(gate) * up, the gated unit of Llama's feed-forward layer (Shazeer, 2020).

    Args:
        gate: (...), of any shape.
        up: of the same shape.

    Returns:
        Of that shape and gate's kind, in the type that both promote to.

    Raises:
        TypeError: not an array of floating numbers.
        ValueError: two shapes.

    >>> import numpy as np, headway as hw
    >>> hw.swiglu(np.array([0.0, 1.0]), np.array([2.0, 2.0])).round(6)
    array([0.      , 1.462117])
    """
    left, right = unwrap(gate, "gate"), unwrap(up, "up")
    if left.data.shape != right.data.shape:
        raise ValueError(f"up: expected the shape of gate {left.data.shape}, got {right.data.shape}")
    dtype = promote(left.dtype, right.dtype)
    shape = left.data.shape
    columns = shape[-1] if shape and left.data.size else 1
    y = np.empty((left.data.size // columns, columns), storage(dtype))
    if y.size:
        rows = left.data.reshape(y.shape), right.data.reshape(y.shape)
        _native.swiglu(*rows, compute_dtype(dtype) == "float64", y)
    return left.wrap(y.reshape(shape), dtype)
