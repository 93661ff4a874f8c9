"""Scaled dot-product attention: whole, in parts, and its weights.

Shapes: ... any number of leading batch axes, H query heads, G key/value heads (G divides H), L queries, S keys,
D head size of q and k, E head size of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _check, _native
from ._arrays import Operand, as_numpy, compute_dtype, indexable, items, promote, storage, unrepeated, unwrap

__all__ = ["AttentionState", "attention", "attention_weights", "merge_attention", "partial_attention"]

CHUNK: int = _native.CHUNK
LARGEST_HEAD = 2**16  # each thread packs a chunk of keys and one of values
_CAUSAL = (None, False, True, "top_left", "bottom_right")
_PRECISION = ("exact", "fast")
_FARTHEST = 2**53  # positions, so that no sum of two leaves int64
_NO_VALUES = object()  # for v, where only scores matter


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
    _check.choice(precision, "precision", _PRECISION)
    if precision == "fast" and compute == "float64":
        raise ValueError(
            "precision: expected 'exact' for float64, got 'fast', which computes in bfloat16; convert q, k and v first"
        )
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
        fast=precision == "fast",
    )
    lead = (*shape, q_heads, length)
    return Plan((*lead, q_size), (*shape, *core), () if v is None else (*shape, *v[-3:]), lead, dtype, factor, options)


def prepare(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: Any = None,
    window: Any = None,
    scale: Any = None,
    softcap: Any = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    precision: str = "exact",
    key_offset: int = 0,
    of_a_part: bool = False,
) -> Call:
    """Check a call of any of the attention functions. k may be Keys, v _NO_VALUES."""
    query = unwrap(q, "q")
    if query.data.ndim < 3:
        raise _without_heads(query.data.shape, q, "q", "(..., H, L, D)")
    keys = k if type(k) is Keys else key_array(k)
    value = None if v is _NO_VALUES else unwrap(v, "v")
    dtypes = (query.dtype, keys.operand.dtype) if value is None else (query.dtype, keys.operand.dtype, value.dtype)
    plan = _plan(
        query.data.shape,
        keys.operand.data.shape,
        None if value is None else value.data.shape,
        *(keys.heads, keys.length, keys.size, keys.in_panels, dtypes),
        _plain(causal, "causal", _CAUSAL),
        *_window(window),
        _float(scale, "scale"),
        _float(softcap, "softcap", "a number > 0 or None"),
        _plain(precision, "precision", _PRECISION),
        key_offset,
    )
    *shape, heads, _ = plan.lead
    compute = compute_dtype(plan.dtype)
    if kv_lengths is not None:
        highest = _FARTHEST if of_a_part else key_offset + keys.length
        lengths = _check.integers(kv_lengths, "kv_lengths", 0, highest)
        kv_lengths = _check.broadcast(lengths, tuple(shape), "kv_lengths", "the batch (...)")
    if mask is not None:
        allowed = _check.mask(mask, "mask").view(np.uint8)
        scores = (*plan.lead, keys.length)
        mask = allowed if allowed.shape == scores else _broadcast_mask(allowed, scores, mask)
    if bias is not None:
        bias = _check.broadcast(_added(bias, compute), (*plan.lead, keys.length), "bias", "(..., H, L, S)")
    if sinks is not None:
        sinks = _sinks(sinks, (*shape, heads), compute)
    return Call(
        q=_repeated(query.data, plan.q),
        k=_repeated(keys.operand.data, plan.k),
        v=None if value is None else _repeated(value.data, plan.v),
        mask=mask,
        bias=bias,
        sinks=sinks,
        kv_lengths=kv_lengths,
        options=plan.options,
        scale=plan.scale,
        shape=plan.lead,
        keys=keys.length,
        dtype=plan.dtype,
        like=query,
    )


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


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window: expected (left, right), each an integer >= 0 or None, got {_check.shown(window)}")
    left, right = (  # one that reaches farther than any position reaches all of them
        None if side is None else min(_check.integer(side, "window", 0, cure="; None opens a side"), _FARTHEST)
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


def _sinks(sinks: Any, shape: tuple[int, ...], compute: str) -> NDArray[Any]:
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
    _compute(_attend, call, out, lse)
    result = call.like.wrap(out, call.dtype)
    return result if lse is None else (result, call.like.wrap(lse, call.compute))


# A kernel with its call, the rows (..., H, L) that are wanted, and where results go. Returns whether these are finite.
_Kernel = Callable[[Call, "NDArray[Any] | None", NDArray[Any], "NDArray[Any] | None"], bool]


def _attend(call: Call, rows: NDArray[Any] | None, out: NDArray[Any], lse: NDArray[Any] | None) -> bool:
    assert call.v is not None
    arrays = call.q, call.k, call.v, call.mask, call.bias, call.sinks, call.kv_lengths
    return _native.attention(*arrays, rows, call.options, out, lse)


def _weigh(call: Call, rows: NDArray[Any] | None, out: NDArray[Any], lse: NDArray[Any] | None) -> bool:
    arrays = call.q, call.k, call.mask, call.bias, call.sinks, call.kv_lengths
    return _native.attention_weights(*arrays, rows, call.options, out)


def _compute(kernel: _Kernel, call: Call, out: NDArray[Any], lse: NDArray[Any] | None = None) -> None:
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
    """Give the same call with more range, and the power of two that its result is to be multiplied by.

    float64 holds all that float32 can lead to. For float64 itself, what scale takes away is taken from q and k before,
    and then the values are made smaller.
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


@_check.public
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    kv_lengths: Any = None,
    precision: str = "exact",
    return_lse: bool = False,
) -> Any:
    """Attend: softmax(q k^T * scale) v, head by head (Vaswani et al., 2017, "Attention Is All You Need").

    Args:
        q: queries (..., H, L, D), of float64, float32, float16 or bfloat16; the leading axes of q, k and v broadcast.
        k: keys (..., G, S, D). Query head h uses key/value head h // (H / G).
        v: values (..., G, S, E).
        mask: booleans, or numbers that are all 0 or 1, broadcasting to (..., H, L, S); 1 = may attend. What a masked
            key holds, NaN included, has no influence. A row that may attend to nothing gives 0.
        bias: added to the scaled scores, broadcasting to (..., H, L, S); -inf masks.
        causal: None; "top_left": query i sees keys 0 .. i; "bottom_right": the last query sees all keys, as when
            queries continue a cache; True where L == S, and the two agree.
        window: (left, right): query at position p sees keys p - left .. p + right; None leaves a side open.
        scale: of the scores; 1 / sqrt(D) by default.
        softcap: c > 0 replaces each scaled score s by c tanh(s / c) (Gemma 2, 2024), before bias and mask.
        sinks: (H,) or (..., H): a score per head that joins the softmax's denominator alone (Xiao et al., 2023).
        kv_lengths: integers broadcasting to the batch (...): how many keys each batch item really has.
        precision: "exact"; "fast" gives up the contract of bits for the machine's 16-bit dot products, where it has
            them (AMX, AVX512-BF16) and they pay: q, k, the weights and v are rounded to bfloat16, sums stay float32.
            Scores are then off by up to 2^-7 |q| |k| scale. Not for float64.
        return_lse: also return the log-sum-exp of each row's scores (natural logarithm, without sinks).

    Returns:
        (..., H, L, E) of q's kind, in the type that q, k and v promote to; with return_lse a pair, the second
        (..., H, L) in float32, or float64 for float64. Unless precision is "fast", each row depends, bit for bit,
        only on its query, the keys and values that it may attend to, their positions and the options.

    Raises:
        TypeError: not an array of floating numbers, or not in CPU memory.
        ValueError: shapes that do not fit, a floating mask that is no 0/1 mask, an option out of range.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 2, 4, 8))  # H = 2, L = S = 4, D = E = 8
    >>> hw.attention(q, k, v, causal=True).shape
    (2, 4, 8)
    """
    call = prepare(
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
        kv_lengths=kv_lengths,
        precision=precision,
    )
    return run(call, _check.boolean(return_lse, "return_lse"))


@_check.public
def attention_weights(
    q: Any,
    k: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    kv_lengths: Any = None,
) -> Any:
    """Return the weights (..., H, L, S) that `attention` gives to the values, for looking at.

    The arguments are those of `attention`. Rows sum to 1, less what a sink takes; a row that may attend to nothing
    is 0. This array is the L x S one that attention itself never makes.

    >>> import numpy as np, headway as hw
    >>> hw.attention_weights(np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), causal=True)
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    call = prepare(
        q,
        k,
        _NO_VALUES,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        kv_lengths=kv_lengths,
    )
    out = np.empty((*call.shape, call.keys), storage(call.dtype))
    _compute(_weigh, call, out)
    return call.like.wrap(out, call.dtype)


@dataclass(frozen=True, eq=False)
class AttentionState:
    """What a part of the keys contributes to attention: the result of `partial_attention`.

    A few nodes of the fixed tree over chunks of keys, each a maximum, a total weight (..., H, L) and an unnormalised
    weighted sum (..., H, L, E) per row. States pickle, so that parts can be computed anywhere; a state that has
    been unpickled gives NumPy arrays.
    """

    maximum: NDArray[Any]  # (nodes, ..., H, L)
    total_weight: NDArray[Any]  # (nodes, ..., H, L)
    weighted_sum: NDArray[Any]  # (nodes, ..., H, L, E)
    chunks: tuple[int, ...] | None  # the first chunk of each node; None: from another library
    end: int  # the chunk after the last
    dtype: str  # of the result
    _wrap: Any = field(default=as_numpy, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wrap": as_numpy}

    @staticmethod
    @_check.public
    def from_lse(out: Any, lse: Any) -> AttentionState:
        """Make a state of another library's partial result: out (..., H, L, E), lse (..., H, L), natural logarithm.

        A row without keys has the lse -inf. One whose lse is NaN makes the merged row NaN; +inf is an error. Merging is
        exact up to rounding; the promise of equal bits holds for states from `partial_attention` alone.
        """
        result, logs = unwrap(out, "out"), unwrap(lse, "lse")
        if result.data.ndim < 3 or logs.data.shape != result.data.shape[:-1]:
            raise ValueError(
                f"lse: expected the shape of out (..., H, L, E) without its last axis, got out {result.data.shape} "
                f"and lse {logs.data.shape}"
            )
        compute = compute_dtype(result.dtype)
        maximum = np.array(logs.astype(compute))[None]
        given = logs.astype("float64")
        lost = np.isposinf(given) | (np.isfinite(given) & ~np.isfinite(maximum[0]))
        if lost.any():
            raise ValueError(
                f"lse: expected numbers below infinity within {compute}, got {given[lost].flat[0]}; a row without keys "
                f"has the lse -inf, and larger numbers need float64 for out and lse"
            )
        total = np.where(maximum == -np.inf, 0, np.where(np.isnan(maximum), np.nan, 1)).astype(compute)
        weighted = np.array(result.astype(compute))[None]
        return AttentionState(maximum, total, weighted, None, 0, result.dtype, result.wrap)


@_check.public
def partial_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    key_offset: int = 0,
    mask: Any = None,
    bias: Any = None,
    causal: bool | str | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kv_lengths: Any = None,
) -> AttentionState:
    """Attend to a part of the keys, which stand at positions key_offset, key_offset + 1, ... of the whole.

    Args:
        q: all queries, as for `attention`.
        k: the part's keys (..., G, S, D).
        v: the part's values (..., G, S, E).
        key_offset: the position of the part's first key, a multiple of ``hw.info().chunk_length``.
        mask: over the part's keys, broadcasting to (..., H, L, S).
        bias: over the part's keys, broadcasting to (..., H, L, S).
        causal: None, "top_left", or "bottom_right", which needs kv_lengths to know where the keys end.
        window: as for `attention`.
        scale: as for `attention`.
        softcap: as for `attention`.
        kv_lengths: the lengths of the whole, not of the part.

    Returns:
        A state. `merge_attention` of the states of all parts equals `attention` over the whole, bit for bit.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1000, 8))
    >>> parts = [hw.partial_attention(q, k[:, :512], v[:, :512]),
    ...          hw.partial_attention(q, k[:, 512:], v[:, 512:], key_offset=512)]
    >>> bool((hw.merge_attention(parts) == hw.attention(q, k, v)).all())
    True
    """
    offset = _check.integer(key_offset, "key_offset", 0, _FARTHEST)
    if offset % CHUNK:
        raise ValueError(f"key_offset: expected a multiple of the chunk length {CHUNK}, got {offset}; split there")
    if isinstance(causal, (bool, np.bool_)) and causal:
        raise ValueError("causal: expected None, 'top_left' or 'bottom_right' for a part of the keys, got True")
    if isinstance(causal, str) and causal == "bottom_right" and kv_lengths is None:
        raise ValueError(
            "kv_lengths: expected the number of keys of the whole beside causal='bottom_right', got None; "
            "a part does not know where the keys end"
        )
    if _window(window) != (None, None) and (causal is None or causal is False):
        raise ValueError("window: expected causal='top_left' or 'bottom_right' beside it for a part, got None")
    call = prepare(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        kv_lengths=kv_lengths,
        key_offset=offset,
        of_a_part=True,
    )
    assert call.v is not None
    first = offset // CHUNK
    end = first + -(-call.keys // CHUNK)
    chunks = tuple(_native.node_chunks(first, end))
    maximum, total = (np.empty((len(chunks), *call.shape), call.compute) for _ in range(2))
    weighted = np.empty((len(chunks), *call.shape, call.v.shape[-1]), call.compute)
    if maximum.size:
        arrays = call.q, call.k, call.v, call.mask, call.bias, call.kv_lengths
        _native.attention_nodes(*arrays, call.options, maximum, total, weighted)
    return AttentionState(maximum, total, weighted, chunks, end, call.dtype, call.like.wrap)


@_check.public
def merge_attention(states: Iterable[AttentionState], *, sinks: Any = None, return_lse: bool = False) -> Any:
    """Merge the states of all parts of the keys into attention's result.

    Args:
        states: from `partial_attention` or `AttentionState.from_lse`, in any order; parts must not overlap.
        sinks: as for `attention`; they join once, at the end.
        return_lse: also return the log-sum-exp over all keys.

    Returns:
        (..., H, L, E), and (..., H, L) with return_lse: the bits of `attention` over the whole. Rows with an infinite
        score may differ by rounding, and what leaves the range of the computing type in a part is infinite.
    """
    if isinstance(states, AttentionState):
        raise TypeError("states: expected a list of AttentionState, got one alone; pass `[states]`")
    try:
        states = list(states)
    except Exception:  # not to be gone through
        states = []
    if not states or not all(isinstance(state, AttentionState) for state in states):
        raise TypeError("states: expected some AttentionState, from partial_attention or AttentionState.from_lse")
    return_lse = _check.boolean(return_lse, "return_lse")
    first = states[0]
    for state in states[1:]:
        if state.weighted_sum.shape[1:] != first.weighted_sum.shape[1:]:
            raise ValueError(
                f"states: expected parts of one call, of shape (..., H, L, E) = {first.weighted_sum.shape[1:]}, "
                f"got {state.weighted_sum.shape[1:]}"
            )
        if compute_dtype(state.dtype) != compute_dtype(first.dtype):
            raise ValueError(f"states: expected parts of one type, got {first.dtype} and {state.dtype}")
    ours = sorted((s for s in states if s.chunks), key=lambda s: s.chunks or ())
    reached = 0
    for state in ours:
        if state.chunks and state.chunks[0] < reached:
            raise ValueError(
                f"states: expected parts that do not overlap, got two that hold keys {state.chunks[0] * CHUNK} and on; "
                f"give each its key_offset"
            )
        reached = state.end
    foreign = [s for s in states if s.chunks is None]
    nodes = [chunk for state in ours for chunk in state.chunks or ()] + [reached + i for i in range(len(foreign))]
    parts = [*ours, *foreign] or [first]
    dtype = promote(*(state.dtype for state in states))
    compute = compute_dtype(dtype)
    *shape, size = first.weighted_sum.shape[1:]
    out = np.empty((*shape, size), storage(dtype))
    lse = np.empty(shape, compute) if return_lse else None
    sinks = None if sinks is None else _sinks(sinks, tuple(shape[:-1]), compute)
    if out.size or (lse is not None and lse.size):
        _native.attention_merge(
            nodes,
            np.concatenate([state.maximum for state in parts]),
            np.concatenate([state.total_weight for state in parts]),
            np.concatenate([state.weighted_sum for state in parts]),
            sinks,
            compute == "float64",
            out,
            lse,
        )
    result = first._wrap(out, dtype)
    return result if lse is None else (result, first._wrap(lse, compute))
