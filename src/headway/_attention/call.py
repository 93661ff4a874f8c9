"""A checked call of attention, ready for the kernels; and the running of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import NoneType
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _check
from .._arrays import Operand, compute_dtype, indexable, items, promote, storage, unrepeated, unwrap
from .._signatures import AnyArray, defaults_of
from .options import Causal, Corner, Precision, Window, is_fast

LARGEST_HEAD = 2**16  # each thread packs a chunk of keys and one of values
_CAUSAL = (None, False, True, *get_args(Corner))
_PRECISION = get_args(Precision)
FARTHEST = 2**53  # positions, so that no sum of two leaves int64
NO_VALUES = object()  # for v, where only scores matter


class Keys(NamedTuple):
    """The key side of a call: an array (..., G, S, D), or a cache's panels (..., G, panels, D, 16)."""

    operand: Operand
    batch: tuple[int, ...]
    heads: int
    length: int
    size: int
    in_panels: bool = False


class Call(NamedTuple):
    """One checked call: arrays broadcast to the batch, ready for the kernels."""

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any] | None
    mask: NDArray[Any] | None
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None
    kv_lengths: NDArray[Any] | None
    options: _native.Options
    scale: float
    shape: tuple[int, ...]  # (..., H, L)
    keys: int
    dtype: str  # of the result
    like: Operand

    @property
    def compute(self) -> str:
        return compute_dtype(self.dtype)


def _without_heads(shape: tuple[int, ...], given: Any, name: str, expected: str) -> ValueError:
    """Return the error of an array that has no axis for the heads."""
    axes = ", ".join(["None"] * (3 - len(shape)))
    return ValueError(
        f"{name}: expected shape {expected}, got {shape}; add an axis for the heads, `{indexable(given, name)}[{axes}]`"
    )


def key_array(k: Any) -> Keys:
    """Take k (..., G, S, D) in."""
    operand = unwrap(k, "k")
    if operand.data.ndim < 3:
        raise _without_heads(operand.data.shape, k, "k", "(..., G, S, D)")
    *batch, heads, length, size = operand.data.shape
    return Keys(operand, tuple(batch), heads, length, size)


class Plan(NamedTuple):
    """What follows from the shapes, types and plain options of a call; arrays of options are looked at apart."""

    q: tuple[int, ...]  # broadcast to the batch, as k and v
    k: tuple[int, ...]
    v: tuple[int, ...]
    lead: tuple[int, ...]  # (..., H, L)
    dtype: str  # of the result
    scale: float
    options: _native.Options


@lru_cache(maxsize=1024, typed=True)  # a loop asks for the same plan again and again; typed, for True is not 1
def _plan(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...] | None,
    heads: int,  # of the keys, whose array may have panels in its shape
    keys: int,
    size: int,
    in_panels: bool,
    dtypes: tuple[str, ...],
    causal: Any,
    left: int | None,
    right: int | None,
    scale: Any,
    softcap: Any,
    precision: str,
    key_offset: int,
) -> Plan:
    *batch, q_heads, length, q_size = q
    if q_size < 1:
        raise ValueError(f"q: expected a head size D of at least 1, got shape {q}")
    if q_size > LARGEST_HEAD:
        raise ValueError(f"q: expected a head size D of at most {LARGEST_HEAD}, got {q_size}")
    if in_panels and q_size != size:
        raise ValueError(f"q: expected the head size D = {size} of the cache in its last axis, got {q_size}")
    if in_panels and q_heads % heads:
        raise ValueError(f"q: expected a multiple of the {heads} heads of the cache, got {q_heads}")
    if q_size != size:
        raise ValueError(f"k: expected the head size D = {q_size} of q in its last axis, got {size}")
    if heads < 1 or q_heads % heads:
        raise ValueError(f"k: expected a number of heads that divides the {q_heads} of q, got {heads}")
    core = k[-4:] if in_panels else k[-3:]
    batches = {"q": tuple(batch), "the cache" if in_panels else "k": k[: len(k) - len(core)]}
    if v is not None and not in_panels:
        if len(v) < 3 or v[-3:-1] != (heads, keys):
            cure = "; add an axis for the heads" if len(v) < 3 else ""
            raise ValueError(f"v: expected shape (..., {heads}, {keys}, E) to go with k, got {v}{cure}")
        if v[-1] > LARGEST_HEAD:
            raise ValueError(f"v: expected a head size E of at most {LARGEST_HEAD}, got {v[-1]}")
        batches["v"] = v[:-3]
    shape = _check.batch_shape(**batches)
    dtype = promote(*dtypes)
    compute = compute_dtype(dtype)
    fast = is_fast(precision, compute == "float64", "q, k and v")
    _check.choice(causal, "causal", _CAUSAL)
    if causal is True and length != keys:
        raise ValueError(
            f"causal: expected 'top_left' or 'bottom_right' where the numbers of queries and keys differ, got True "
            f"with {length} queries and {keys} keys: say which corner the triangle starts from"
        )
    if (left is not None or right is not None) and causal in (None, False) and length != keys:
        raise ValueError(
            f"window: expected causal='top_left' or 'bottom_right' beside it where the numbers of queries and keys "
            f"differ, got {length} queries and {keys} keys: say where the queries stand, or use a mask"
        )
    factor = 1 / math.sqrt(q_size) if scale is None else _check.number(scale, "scale", within=compute)
    cap = 0.0
    if softcap is not None:
        cap = _check.number(softcap, "softcap", "a number > 0 or None", above=0.0, within=compute)
    options = _native.Options(
        scale=None if scale is None else factor,
        softcap=cap,
        causal=causal not in (None, False),
        bottom_right=causal == "bottom_right",
        window_left=left,
        window_right=right,
        total=key_offset + keys,
        key_offset=key_offset,
        wide=compute == "float64",
        k_in_panels=in_panels,
        fast=fast,
    )
    lead = (*shape, q_heads, length)
    return Plan((*lead, q_size), (*shape, *core), () if v is None else (*shape, *v[-3:]), lead, dtype, factor, options)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    key_offset: int | None = None,
    /,
    *,
    mask: AnyArray | None = None,
    bias: AnyArray | None = None,
    causal: Causal = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: AnyArray | None = None,
    kv_lengths: AnyArray | None = None,
    precision: Precision = "exact",
) -> Call:
    """Check a call of any of the attention functions. k may be Keys, v NO_VALUES; key_offset is that of a part."""
    query = unwrap(q, "q")
    if query.data.ndim < 3:
        raise _without_heads(query.data.shape, q, "q", "(..., H, L, D)")
    keys = k if type(k) is Keys else key_array(k)
    value = None if v is NO_VALUES else unwrap(v, "v")
    dtypes = (query.dtype, keys.operand.dtype) if value is None else (query.dtype, keys.operand.dtype, value.dtype)
    plan = _plan(
        query.data.shape,
        keys.operand.data.shape,
        None if value is None else value.data.shape,
        *(keys.heads, keys.length, keys.size, keys.in_panels, dtypes),
        _plain(causal, "causal", _CAUSAL),
        *as_window(window),
        _float(scale, "scale"),
        _float(softcap, "softcap", "a number > 0 or None"),
        _plain(precision, "precision", _PRECISION),
        key_offset or 0,
    )
    *shape, heads, _ = plan.lead
    compute = compute_dtype(plan.dtype)
    if kv_lengths is not None:
        highest = keys.length if key_offset is None else FARTHEST
        lengths = _check.integers(kv_lengths, "kv_lengths", 0, highest)
        kv_lengths = _check.broadcast(lengths, tuple(shape), "kv_lengths", "the batch (...)")
    if mask is not None:
        allowed = _check.mask(mask, "mask").view(np.uint8)
        scores = (*plan.lead, keys.length)
        mask = allowed if allowed.shape == scores else _broadcast_mask(allowed, scores, mask)
    if bias is not None:
        bias = _check.broadcast(_added(bias, compute), (*plan.lead, keys.length), "bias", "(..., H, L, S)")
    if sinks is not None:
        sinks = as_sinks(sinks, (*shape, heads), compute)
    return Call(  # by place, which is faster than by name
        _repeated(query.data, plan.q),
        _repeated(keys.operand.data, plan.k),
        None if value is None else _repeated(value.data, plan.v),
        mask,
        bias,
        sinks,
        kv_lengths,
        plan.options,
        plan.scale,
        plan.lead,
        keys.length,
        plan.dtype,
        query,
    )


DEFAULTS = defaults_of(prepare)  # of every option


def only(options: Mapping[str, Any], kind: type) -> None:
    """Raise unless the options are of this kind: `prepare` takes more; `_check.public` says which is the wrong one."""
    if not options.keys() <= kind.__annotations__.keys():
        raise TypeError


def _broadcast_mask(mask: NDArray[Any], scores: tuple[int, ...], given: Any) -> NDArray[Any]:
    """Return the mask for all scores. One (..., L, S) or (..., S) of the batch's items lacks axes in between."""
    try:
        return np.broadcast_to(mask, scores)
    except ValueError:
        batch, cure = scores[:-3], ""
    for axes in (1, 2):
        spread = (*batch, *[1] * axes, *mask.shape[len(batch) :])
        if batch and mask.shape[: len(batch)] == batch and len(spread) == len(scores):
            index = f"[{':, ' * len(batch)}{', '.join(['None'] * axes)}]"
            fits = all(n in (1, whole) for n, whole in zip(spread, scores))
            cure = f"; a mask per batch item is `{indexable(given, 'mask')}{index}`" if fits else cure
    return _check.broadcast(mask, scores, "mask", "(..., H, L, S)", cure)


# What becomes part of a plan's key is a plain value: a tensor, say, may change later and still be the same key.
def _plain(x: Any, name: str, options: tuple[Any, ...]) -> Any:
    if type(x) is np.bool_:
        return bool(x)
    if type(x) not in (str, bool, NoneType):
        _check.choice(x, name, options)
    return x


def _float(x: Any, name: str, expected: str = "a finite number") -> float | None:
    return x if type(x) in (float, NoneType) else _check.number(x, name, expected)


def _repeated(data: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return data if data.shape == shape else np.broadcast_to(data, shape)


def as_window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), each an integer >= 0 or None, got {_check.shown(window)}")
    left, right = (  # one that reaches farther than any position reaches all of them
        None if side is None else min(_check.integer(side, "window", 0, cure="; None opens a side"), FARTHEST)
        for side in items(window, "window")
    )
    return left, right


def _added(bias: Any, compute: str) -> NDArray[Any]:
    """Return the bias in the computing type. A finite number must not become -inf, which would mask."""
    operand = unwrap(bias, "bias")
    added = operand.astype(compute)
    if operand.dtype == "float64" and compute == "float32":
        given = unrepeated(operand.data)
        lost = np.isinf(unrepeated(added)) & np.isfinite(given)
        if lost.any():
            raise ValueError(
                f"bias: expected numbers within float32, which q, k and v are computed in, got {given[lost].flat[0]}; "
                f"-inf masks"
            )
    return added


def as_sinks(sinks: Any, shape: tuple[int, ...], compute: str) -> NDArray[Any]:
    array = unwrap(sinks, "sinks").astype(compute)
    given = unrepeated(array)
    if np.isnan(given).any() or (given == np.inf).any():
        raise ValueError("sinks: expected numbers below infinity, got NaN or inf")
    return _check.broadcast(array, shape, "sinks", "(..., H)")


def run(call: Call, return_lse: bool, out: NDArray[Any] | None = None) -> Any:
    """Run a checked call of attention, into ``out`` where it is given; the result is of q's kind."""
    assert call.v is not None
    if out is None:
        out = np.empty((*call.shape, call.v.shape[-1]), storage(call.dtype))
    lse = np.empty(call.shape, call.compute) if return_lse else None
    compute(_attend, call, out, lse)
    result = call.like.wrap(out, call.dtype)
    return result if lse is None else (result, call.like.wrap(lse, call.compute))


# A kernel with its call, the rows (..., H, L) that are wanted, and where results go. Returns whether these are finite.
_Kernel = Callable[[Call, "NDArray[Any] | None", NDArray[Any], "NDArray[Any] | None"], bool]


def _attend(call: Call, rows: NDArray[Any] | None, out: NDArray[Any], lse: NDArray[Any] | None) -> bool:
    assert call.v is not None
    arrays = call.q, call.k, call.v, call.mask, call.bias, call.sinks, call.kv_lengths
    return _native.attention(*arrays, rows, call.options, out, lse)


def weigh(call: Call, rows: NDArray[Any] | None, out: NDArray[Any], lse: NDArray[Any] | None) -> bool:
    arrays = call.q, call.k, call.mask, call.bias, call.sinks, call.kv_lengths
    return _native.attention_weights(*arrays, rows, call.options, out)


def compute(kernel: _Kernel, call: Call, out: NDArray[Any], lse: NDArray[Any] | None = None) -> None:
    """Run a kernel. Numbers that come out infinite or NaN are computed again where there is more range.

    Each number is replaced on its own account, so it depends on nothing but what its row depended on before.
    """
    if not (out.size or (lse is not None and lse.size)) or kernel(call, None, out, lse):
        return
    results = [out] if lse is None else [out, lse]
    for wider, exponent in _wider(call):
        lost = [~_finite(x) for x in results]
        rows: NDArray[Any] = np.any(lost[0], axis=-1)
        if lse is not None:
            rows |= lost[1]
        again = [np.empty(x.shape, x.dtype) for x in results]
        finite = kernel(wider, rows.view(np.uint8), again[0], None if lse is None else again[1])
        if exponent:
            again[0] = _lifted(again[0], exponent)
        for old, new, where in zip(results, again, lost):
            np.copyto(old, new, where=where)
        if finite:
            return


def _wider(call: Call) -> Iterator[tuple[Call, int]]:
    """Give the same call with more range.

    float64 holds all that float32 can lead to. For float64 itself, what scale takes away is taken from q and k before,
    and then the values are made smaller.

    Yields:
        The call, and the power of two that its result is to be multiplied by.
    """
    if call.compute == "float32":
        bias, sinks = (None if x is None else _times(x, 0) for x in (call.bias, call.sinks))
        yield call._replace(bias=bias, sinks=sinks, options=call.options.wider(call.scale)), 0
        return
    shift = min(math.frexp(call.scale)[1] - 64, 0)  # 64: the terms of a sum may be larger than the sum
    options = call.options.wider(math.ldexp(call.scale, -shift))
    q, k = _times(call.q, shift // 2), _times(call.k, shift - shift // 2)
    call = call._replace(q=q, k=k, options=options)
    yield call, 0
    if call.v is not None:
        yield call._replace(v=_times(call.v, -64)), 64


def _times(x: NDArray[Any], exponent: int) -> NDArray[Any]:
    """Return the numbers times a power of two, as float64."""
    once = unrepeated(x)
    out = np.empty(once.shape)
    if out.size:
        columns = once.shape[-1]
        _native.convert(once.reshape(-1, columns), out.reshape(-1, columns), exponent)
    return np.broadcast_to(out, x.shape)


def _lifted(out: NDArray[Any], exponent: int) -> NDArray[Any]:
    """Return averages times a power of two. None is beyond the largest number, whatever rounding made of it."""
    lifted = _times(out, exponent)
    beyond = np.isfinite(out) & np.isinf(lifted)
    return np.where(beyond, np.copysign(np.finfo(np.float64).max, out), lifted)


def _finite(x: NDArray[Any]) -> NDArray[np.bool_]:
    finite: NDArray[np.bool_] = (x & 0x7F80) != 0x7F80 if x.dtype == np.uint16 else np.isfinite(x)
    return finite
