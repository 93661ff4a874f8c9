"""Which kind of array is it? One way in and one way out for NumPy, torch, JAX, lists and anything with DLPack.

Inside headway every array is a NumPy array; ``bfloat16``, which NumPy has no name for, travels as ``uint16``
bits. No framework is imported here: a framework that made an array is in ``sys.modules`` already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _native

FLOATING = ("float64", "float32", "float16", "bfloat16")
_NAMES = {np.dtype(name): name for name in FLOATING[:3]}
_STORAGE = {name: np.dtype(np.uint16 if name == "bfloat16" else name) for name in FLOATING}
_CPU = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost: memory that the processor can read


class Operand(NamedTuple):
    """A user's array, ready for the kernels.

    ``data`` holds bfloat16 as uint16 bits; ``dtype`` says what the numbers are; ``wrap`` turns a NumPy array (with
    the dtype's name) into the kind of array that the user gave.
    """

    data: NDArray[Any]
    dtype: str
    wrap: Callable[[NDArray[Any], str], Any]

    def astype(self, dtype: str) -> NDArray[Any]:
        """Return the numbers in another of the four types, rounded to nearest even where they narrow."""
        if self.dtype == dtype:
            return self.data
        data = unrepeated(self.data)
        columns = data.shape[-1] if data.ndim and data.size else 1
        out = np.empty(data.shape, storage(dtype))
        if out.size:
            _native.convert(data.reshape(-1, columns), out.reshape(-1, columns))
        return out if out.shape == self.data.shape else np.broadcast_to(out, self.data.shape)


def unwrap(x: Any, name: str) -> Operand:
    """Take an array of floating numbers in, without a copy where its memory allows.

    An Operand passes through. Lists and integers become float64, as in NumPy. Raises TypeError for bool, complex,
    object and text, for an array on another device, and for anything that is no array.
    """
    if isinstance(x, Operand):
        return x
    if type(x) is np.ndarray and (dtype := _NAMES.get(x.dtype)):  # the common case, without asking twice
        return Operand(_addressable(x), dtype, as_numpy)
    data, wrap = _to_numpy(x, name)
    kind = data.dtype.kind
    if _is_bfloat16(x):
        data, dtype = data.view(np.uint16), "bfloat16"
    elif data.dtype.name in FLOATING:
        dtype = data.dtype.name
    elif kind in "iu" or (data.size == 0 and isinstance(x, (list, tuple))):
        data, dtype = data.astype(np.float64), "float64"
    elif kind == "f":
        raise TypeError(f"{name}: expected one of {', '.join(FLOATING)}, got {data.dtype.name}; convert it first")
    else:
        got = "text" if kind in "US" else data.dtype.name
        if not data.ndim and kind == "O":  # no array at all
            got = "None" if x is None else type(x).__name__
        cure = f"; convert it with np.asarray({name}, dtype=np.float32)" if data.ndim else ""
        raise TypeError(f"{name}: expected floating-point numbers, got {got}{cure}")
    return Operand(_addressable(data), dtype, wrap)


def plain(x: Any, name: str) -> NDArray[Any]:
    """Take any array in as NumPy sees it: for masks, positions, lengths and ids."""
    return _addressable(_to_numpy(x, name)[0])


def promote(*dtypes: str) -> str:
    """Return the type that operands of these types meet in, as NumPy promotes: float16 with bfloat16 is float32."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    widest = min(dtypes, key=FLOATING.index)
    return "float32" if {"float16", "bfloat16"} <= set(dtypes) and widest == "float16" else widest


def unrepeated(data: NDArray[Any]) -> NDArray[Any]:
    """Return what np.broadcast_to repeated, once: an axis of stride 0 becomes one of length 1."""
    return data[tuple(slice(1) if stride == 0 else slice(None) for stride in data.strides)]


def compute_dtype(dtype: str) -> str:
    """Return the type that the kernels compute in: float64 for float64, float32 for all others."""
    return "float64" if dtype == "float64" else "float32"


def storage(dtype: str) -> np.dtype[Any]:
    """Return the NumPy type that numbers of this type are stored in."""
    return _STORAGE[dtype]


def _is_bfloat16(x: Any) -> bool:
    return str(getattr(x, "dtype", "")).rpartition(".")[2] == "bfloat16"


def _to_numpy(x: Any, name: str) -> tuple[NDArray[Any], Callable[[NDArray[Any], str], Any]]:
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one, whose mask would be lost; pass it apart")
    if isinstance(x, np.ndarray):
        return np.asarray(x), as_numpy
    if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__"):
        if not _in_cpu_memory(x):
            raise TypeError(f"{name}: expected an array in CPU memory, got one on another device; copy it to the CPU")
        makers = (base.__module__.partition(".")[0] for base in type(x).__mro__)
        return _from_dlpack(x, name), next((_KINDS[maker] for maker in makers if maker in _KINDS), as_numpy)
    try:
        return np.asarray(x), as_numpy
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got nested lists of unequal lengths; pad them") from error


def _in_cpu_memory(x: Any) -> bool:
    try:
        return int(x.__dlpack_device__()[0]) in _CPU
    except (BufferError, ValueError):  # a device that DLPack has no number for
        return False


def _from_dlpack(x: Any, name: str) -> NDArray[Any]:
    if getattr(x, "requires_grad", False):
        x = x.detach()  # headway computes no gradients, and torch exports no tensor that waits for one
    if getattr(x, "is_neg", bool)():
        x = x.resolve_neg()  # torch exports the imaginary part of a conjugate without its sign
    try:
        if _is_bfloat16(x):
            return _native.bfloat16_bits(x)
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name}: expected an array that DLPack can hand over, got {type(x).__name__} ({error}); "
            f"convert it to NumPy first"
        ) from error


def _addressable(data: NDArray[Any]) -> NDArray[Any]:
    """Copy only what a kernel cannot address: foreign byte order, unaligned memory, strides between elements."""
    flags = data.flags
    if flags.carray and data.dtype.isnative:  # contiguous, aligned and writeable: the common case in one question
        return data
    fits = data.dtype.isnative and flags.aligned
    if fits and (flags.c_contiguous or all(stride % data.itemsize == 0 for stride in data.strides)):
        return data
    return data.astype(data.dtype.newbyteorder("="), order="C", copy=True)


def as_bits(data: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the array as it is stored: between the steps of one call there is no user to wrap for."""
    return data


def as_numpy(data: NDArray[Any], dtype: str) -> Any:
    """Return the array itself; bfloat16 bits become ml_dtypes.bfloat16, the type NumPy users have them in."""
    if dtype != "bfloat16":
        return data
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            "bfloat16 results for NumPy need its type from another package: pip install ml_dtypes"
        ) from error
    return data.view(ml_dtypes.bfloat16)


def _as_torch(data: NDArray[Any], dtype: str) -> Any:
    torch = sys.modules["torch"]
    if dtype == "bfloat16":
        return torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(data)


def _as_jax(data: NDArray[Any], dtype: str) -> Any:
    return sys.modules["jax"].numpy.asarray(as_numpy(data, dtype))


_KINDS: dict[str, Callable[[NDArray[Any], str], Any]] = {"torch": _as_torch, "jaxlib": _as_jax, "jax": _as_jax}
