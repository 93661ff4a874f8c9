"""Which kind of array is it? One way in and one way out for NumPy, torch, JAX, lists and anything with DLPack.

Inside headway every array is a NumPy array; ``bfloat16``, which NumPy has no name for, travels as ``uint16``
bits. No framework is imported here: a framework that made an array is in ``sys.modules`` already.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

FLOATING = ("float64", "float32", "float16", "bfloat16")
_NAMES = {np.dtype(name): name for name in FLOATING[:3]}
_OWN = _NAMES | {np.dtype(code): np.dtype(code).name for code in "?bBhHiIlL"}
_STORAGE = {name: np.dtype(np.uint16 if name == "bfloat16" else name) for name in FLOATING}
_CPU = (1, 3)  # DLPack's kDLCPU and kDLCUDAHost: memory that the processor can read
_DEEPEST = 32  # how deep lists may be nested: as many axes as every NumPy has

_BOOLEANS = {bool, np.bool_}
_SCALARS = {float, int, str, *_BOOLEANS}
TOO_LARGE = "integers beyond 64 bits"  # what NumPy keeps as objects
Wrap = Callable[[NDArray[Any], str], Any]  # of a result, a NumPy array and the name of its type


class Traced(TypeError):
    """An array that a library's transformation put in the place of another, and that has no numbers to be read."""

    def __init__(self, library: str, message: str) -> None:
        super().__init__(message)
        self.library = library


# How a library calls a public function inside its transformations: (function, args, kwargs) -> result. A module of
# headway.integrations puts it here.
TRACED: dict[str, Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]] = {}


class Operand(NamedTuple):
    """A user's array, ready for the kernels.

    ``data`` holds bfloat16 as uint16 bits; ``dtype`` says what the numbers are; ``wrap`` turns a NumPy array (with
    the dtype's name) into the kind of array that the user gave.
    """

    data: NDArray[Any]
    dtype: str
    wrap: Wrap

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

    Lists and integers become float64, as in NumPy.

    Returns:
        The operand; x itself where it is one.

    Raises:
        TypeError: bool, complex, object and text, an array on another device, and anything that is no array.
    """
    if isinstance(x, Operand):
        return x
    if type(x) is np.ndarray and (dtype := _NAMES.get(x.dtype)):  # the common case, without asking twice
        return Operand(_addressable(x), dtype, as_numpy)
    data, dtype, wrap = _taken(x, name, floating=True)
    if dtype not in FLOATING:
        if data.dtype.kind not in "iu" and not (data.size == 0 and isinstance(x, (list, tuple))):
            one_of = f"one of {', '.join(FLOATING)}" if data.dtype.kind == "f" else "floating-point numbers"
            raise TypeError(f"{name}: expected {one_of}, got {held(data, dtype)}{_cure(x, name) if data.ndim else ''}")
        data, dtype = data.astype(np.float64), "float64"
    return Operand(_addressable(data), dtype, wrap)


def plain(x: Any, name: str) -> tuple[NDArray[Any], str]:
    """Take any array in as NumPy sees it, for masks, positions, lengths and ids.

    Returns:
        The array, and the name of its type. NumPy has no bfloat16: those numbers come as float32, which has them all.
    """
    if type(x) is np.ndarray and (dtype := _OWN.get(x.dtype)):  # the common case
        return _addressable(x), dtype
    data, dtype, _ = _taken(x, name)
    if dtype == "bfloat16":
        return Operand(data, dtype, as_bits).astype("float32"), dtype
    return _addressable(data), dtype


def held(data: NDArray[Any], dtype: str) -> str:
    """Return what an array of this type holds, as an error message says it."""
    if data.dtype.kind in "US":
        return "text"
    if data.dtype.kind == "O" and any(type(item) is int and not -(2**63) <= item < 2**63 for item in data.flat):
        return TOO_LARGE
    if data.dtype.kind == "O" and not data.ndim:  # no array at all
        item = data.item()
        return "None" if item is None else "dict" if isinstance(item, Mapping) else type(item).__name__
    return dtype


def dtype_name(x: Any) -> str:
    """Return what an object calls its type of numbers, "" where it has none."""
    try:
        return str(x.dtype).rpartition(".")[2]
    except Exception:  # what an object of another library's does when it is asked is its own affair
        return ""


def indexable(x: Any, name: str) -> str:
    """Return the code for an array of what was given as x: itself, or what NumPy makes of it."""
    return name if dtype_name(x) else f"np.asarray({name})"


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


def _taken(x: Any, name: str, floating: bool = False) -> tuple[NDArray[Any], str, Wrap]:
    """Take in what a user hands over, whatever argument it is for: this is the one door.

    Returns:
        An array of one of NumPy's own types, or of bfloat16 as its bits; the name of the type; how to wrap a result.

    Raises:
        TypeError: what cannot be read as it is meant, with a cure where floating numbers are wanted.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a plain array, got a masked one, whose mask would be lost; pass it apart")
    is_bits = False
    wrap: Wrap = as_numpy
    if isinstance(x, np.ndarray):
        data = np.asarray(x)
    elif isinstance(x, (list, tuple)):
        data = _listed(x, name)
    else:
        data, is_bits, wrap = _foreign(x, name, floating)
    dtype, is_numpy = ("bfloat16", True) if is_bits else _type(data.dtype)
    if not is_numpy:
        if dtype != "bfloat16":
            cure = _cure(x, name) if floating else ""
            raise TypeError(f"{name}: expected one of NumPy's types, or bfloat16, got {dtype}{cure}")
        data = data.view(np.uint16)
    return data, dtype, wrap


@lru_cache(256)  # which is faster than asking
def _type(dtype: np.dtype[Any]) -> tuple[str, bool]:
    """Return a type's name, and whether it is one of NumPy's; the others are those of ml_dtypes."""
    return dtype.name, dtype.type.__module__ == "numpy"


def _listed(x: list[Any] | tuple[Any, ...], name: str) -> NDArray[Any]:
    """Return nested lists as an array. They may hold arrays of any kind; bfloat16 in lists counts as float32."""
    leaves: set[type] = set()
    rows = readable(x, name, leaves)
    if leaves & _BOOLEANS and leaves - _BOOLEANS:  # NumPy would take True for 1
        raise TypeError(f"{name}: expected numbers, or booleans, got a mixture; give one of them")
    try:
        data = np.asarray(rows)
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got nested lists of unequal lengths; pad them") from error
    return data.astype(np.float32) if data.dtype.name == "bfloat16" else data


def readable(x: Sequence[Any], name: str, leaves: set[type] | None = None, depth: int = 1) -> Sequence[Any]:
    """Return nested lists in which every array of another library's is one that NumPy reads as it is meant.

    leaves takes up the types of the numbers in them.
    """
    x = items(x, name)
    kinds = set(map(type, x))
    if leaves is not None:
        leaves |= kinds & _SCALARS
    if kinds <= _SCALARS:
        return x
    if depth == _DEEPEST and kinds & {list, tuple}:
        raise ValueError(f"{name.partition('[')[0]}: expected at most {_DEEPEST} axes, got lists nested more deeply")
    rows: list[Any] = []
    for i, item in enumerate(x):
        if isinstance(item, (list, tuple)):
            rows.append(readable(item, f"{name}[{i}]", leaves, depth + 1))
        elif type(item) in _SCALARS or isinstance(item, np.generic):
            rows.append(item)
        else:
            data, dtype, _ = _taken(item, f"{name}[{i}]")
            if dtype == "bfloat16":
                data = Operand(data, dtype, as_bits).astype("float32")
            rows.append(data if data.ndim else item if dtype == "object" else data[()])
    return rows


def items(x: Sequence[Any], name: str) -> Sequence[Any]:
    """Return a list or tuple as one of Python's own: those of other classes may do anything when they are read."""
    try:
        return x if type(x) in (list, tuple) else list(x)
    except Exception as error:
        raise TypeError(f"{name}: expected an array that can be read, got {type(x).__name__}") from error


def _foreign(x: Any, name: str, floating: bool) -> tuple[NDArray[Any], bool, Wrap]:
    """Take in what is neither an array of NumPy's nor a list: another library's memory, or what NumPy makes of it.

    Returns:
        The array, whether it holds bfloat16 as bits, and how to wrap a result.
    """
    tensor: Any = getattr(sys.modules.get("torch"), "Tensor", ())
    try:
        if isinstance(x, tensor):
            if (expected := _torch_expected(x, name)) is None:
                return *_from_dlpack((x.detach() if x.requires_grad else x).resolve_neg()), _as_torch
        else:
            _refuse_tracers(x, name)
            if isinstance(x, Mapping):  # no sequence of its values, nor an empty one
                return _object(x), False, as_numpy
            if not (hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")):
                return np.asarray(x), False, as_numpy
            device: Any = x.__dlpack_device__()
            if device[0] in _CPU:
                makers = (base.__module__.partition(".")[0] for base in type(x).__mro__)
                return *_from_dlpack(x), next((_KINDS[maker] for maker in makers if maker in _KINDS), as_numpy)
            expected = _ON_THE_CPU
    except (MemoryError, Traced):
        raise
    except Exception as error:
        reason, cure = " ".join(str(error).split()), _cure(x, name) if floating else ""
        raise TypeError(
            f"{name}: expected an array that can be read, got {type(x).__name__} ({reason:.100}){cure}"
        ) from error
    raise TypeError(f"{name}: expected {expected}")


_ON_THE_CPU = "an array in CPU memory, got one on another device; copy it to the CPU"


def _object(x: Any) -> NDArray[Any]:
    array = np.empty((), object)
    array[()] = x
    return array


def _from_dlpack(x: Any) -> tuple[NDArray[Any], bool]:
    if dtype_name(x) == "bfloat16":
        return _native.bfloat16_bits(x), True
    return np.from_dlpack(x), False


def _torch_expected(x: Any, name: str) -> str | None:
    """Say what was expected instead of a tensor of torch's that cannot be read, or that would lose its gradient."""
    torch = sys.modules["torch"]
    if not x.is_cpu:
        return _ON_THE_CPU
    own = type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # else it stands for others, or for none
    try:
        memory = x.data_ptr() if own else 0
    except RuntimeError:
        memory = 0
    if not memory and x.layout != torch.strided:
        return f"a dense tensor, got one of layout {x.layout}; pass `{name}.to_dense()`"
    wrapped = not memory and (not own or torch._C._functorch.is_functorch_wrapped_tensor(x) or x.numel())
    if wrapped or ("torch" in TRACED and _torch_traces(torch)):
        raise Traced(
            "torch",
            f"{name}: expected a tensor with memory of its own, got one inside torch.vmap, torch.func.grad or another "
            f"transformation, or one that only stands for another; call headway outside of it, where leading axes are "
            f"batch axes, or `import headway.integrations.torch`, with which functions work inside",
        )
    forward = torch.autograd.forward_ad
    dual = forward._current_level >= 0 and forward.unpack_dual(x).tangent is not None
    if dual or (x.requires_grad and torch.is_grad_enabled()):
        return (
            f"a tensor that waits for no gradient, got one {'with a tangent' if dual else 'that requires grad'}, and "
            f"headway is forward only; call it under torch.no_grad(), or pass `{name}.detach()`"
        )
    return None


def _torch_traces(torch: Any) -> bool:
    """Whether somebody takes down what torch computes, which our kernels would be left out of."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._is_tracing()


_hidden = False


def hide_from_dynamo() -> None:
    """Let torch.compile, where it is in use, call headway as it is: there is no tensor code to be found in here."""
    global _hidden
    if not _hidden and (rules := sys.modules.get("torch._dynamo.trace_rules")) is not None:
        _hidden = True
        rules.add("headway")


hide_from_dynamo()


def _refuse_tracers(x: Any, name: str) -> None:
    """Raise where x is one of JAX's tracers, which stand for arrays inside its transformations."""
    if any(base.__name__ == "Tracer" and base.__module__.startswith("jax") for base in type(x).__mro__):
        raise Traced(
            "jax",
            f"{name}: expected an array, got a tracer inside jax.jit, jax.vmap, jax.grad or another transformation; "
            f"call headway outside of it, where leading axes are batch axes, inside jax.jit through jax.pure_callback, "
            f"or `import headway.integrations.jax`, with which functions work inside",
        )


def _cure(x: Any, name: str) -> str:
    """Return what to pass instead of x, if there is something that works: each way is tried on x itself."""
    for way, code in _WAYS:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # that a part is lost, say
                works = np.asarray(way(x)).dtype.name in FLOATING
        except Exception:
            continue
        if works:
            return f"; convert it with `{code.format(name)}`"
    return ""


_WAYS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda x: x.float(), "{}.float()"),
    (lambda x: np.asarray(x, dtype=np.float32), "np.asarray({}, dtype=np.float32)"),
    (lambda x: x.real, "{}.real"),
    (lambda x: x.dequantize(), "{}.dequantize()"),
    (lambda x: np.asarray(x).astype(np.float32), "np.asarray({}).astype(np.float32)"),
)


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


_KINDS: dict[str, Wrap] = {"jaxlib": _as_jax, "jax": _as_jax}
