"""Attention over parts of the keys, and the merging of them into the whole."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import headway._native as _native

from .. import _check
from .._arrays import as_numpy, compute_dtype, promote, storage, unwrap
from .._signatures import AnyArray, Unpack, shows_options
from .call import DEFAULTS, FARTHEST, as_sinks, as_window, only, prepare
from .options import PartOptions

__all__ = ["AttentionState", "merge_attention", "partial_attention"]


CHUNK: int = _native.CHUNK


@dataclass(frozen=True, eq=False)
class AttentionState:
    """What a part of the keys contributes to attention: the result of `partial_attention`.

    A few nodes of the fixed tree over chunks of keys. States pickle, so that parts can be computed anywhere; a state
    that has been unpickled gives NumPy arrays.

    Attributes:
        maximum: (nodes, ..., H, L), the largest score of each row.
        total_weight: (nodes, ..., H, L), the sum of exp(score - maximum).
        weighted_sum: (nodes, ..., H, L, E), the same sum with the values as factors.
        chunks: the first chunk of each node; None for a state of another library's result.
        end: the chunk after the last.
        dtype: of the result.

    >>> import numpy as np, headway as hw
    >>> state = hw.partial_attention(np.zeros((1, 1, 4)), np.zeros((1, 600, 4)), np.ones((1, 600, 4)))
    >>> state.chunks, state.end, state.total_weight[:, 0, 0].tolist()
    ((0,), 2, [600.0])
    """

    maximum: NDArray[Any]
    total_weight: NDArray[Any]
    weighted_sum: NDArray[Any]
    chunks: tuple[int, ...] | None
    end: int
    dtype: str
    _wrap: Any = field(default=as_numpy, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wrap": as_numpy}

    @staticmethod
    @_check.public
    def from_lse(out: AnyArray, lse: AnyArray) -> AttentionState:
        """Make a state of another library's partial result.

        Merging such states is exact up to rounding; the promise of equal bits holds for states from `partial_attention`
        alone.

        Args:
            out: (..., H, L, E), the attention over the part.
            lse: (..., H, L), the log-sum-exp of each row's scores, natural logarithm; -inf for a row without keys. A
                row whose lse is NaN makes the merged row NaN.

        Returns:
            A state for `merge_attention`.

        Raises:
            TypeError: not an array of floating numbers.
            ValueError: shapes that do not fit; an lse of +inf.

        >>> import numpy as np, headway as hw
        >>> out, lse = np.ones((1, 1, 2)), np.zeros((1, 1))
        >>> hw.merge_attention([hw.AttentionState.from_lse(out, lse), hw.AttentionState.from_lse(3 * out, lse)])
        array([[[2., 2.]]])
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
@shows_options(PartOptions, DEFAULTS)
def partial_attention(
    q: AnyArray, k: AnyArray, v: AnyArray, *, key_offset: int = 0, **options: Unpack[PartOptions]
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

    Raises:
        TypeError, ValueError: as `attention`; a key_offset that is no multiple of the chunk length; causal or window
            that say too little for a part.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1000, 8))
    >>> parts = [hw.partial_attention(q, k[:, :512], v[:, :512]),
    ...          hw.partial_attention(q, k[:, 512:], v[:, 512:], key_offset=512)]
    >>> bool((hw.merge_attention(parts) == hw.attention(q, k, v)).all())
    True
    """
    only(options, PartOptions)
    offset = _check.integer(key_offset, "key_offset", 0, FARTHEST)
    if offset % CHUNK:
        raise ValueError(f"key_offset: expected a multiple of the chunk length {CHUNK}, got {offset}; split there")
    causal = options.get("causal")
    if isinstance(causal, (bool, np.bool_)) and causal:
        raise ValueError("causal: expected None, 'top_left' or 'bottom_right' for a part of the keys, got True")
    if isinstance(causal, str) and causal == "bottom_right" and options.get("kv_lengths") is None:
        raise ValueError(
            "kv_lengths: expected the number of keys of the whole beside causal='bottom_right', got None; "
            "a part does not know where the keys end"
        )
    if as_window(options.get("window")) != (None, None) and (causal is None or causal is False):
        raise ValueError("window: expected causal='top_left' or 'bottom_right' beside it for a part, got None")
    call = prepare(q, k, v, offset, **options)
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


@typing.overload
def merge_attention(
    states: Iterable[AttentionState], *, sinks: AnyArray | None = None, return_lse: Literal[True]
) -> tuple[Any, Any]: ...
@typing.overload
def merge_attention(
    states: Iterable[AttentionState], *, sinks: AnyArray | None = None, return_lse: bool = False
) -> Any: ...
@_check.public
def merge_attention(
    states: Iterable[AttentionState], *, sinks: AnyArray | None = None, return_lse: bool = False
) -> Any:
    """Merge the states of all parts of the keys into attention's result.

    Args:
        states: from `partial_attention` or `AttentionState.from_lse`, in any order; parts must not overlap.
        sinks: as for `attention`; they join once, at the end.
        return_lse: also return the log-sum-exp over all keys.

    Returns:
        (..., H, L, E), and (..., H, L) with return_lse: the bits of `attention` over the whole. Rows with an infinite
        score may differ by rounding, and what leaves the range of the computing type in a part is infinite.

    Raises:
        TypeError: something else than states.
        ValueError: states of different shapes or types, or of parts that overlap; sinks of another shape.

    >>> import numpy as np, headway as hw
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 1000, 8))
    >>> parts = [hw.partial_attention(q, k[:, i : i + 512], v[:, i : i + 512], key_offset=i) for i in (0, 512)]
    >>> bool((hw.merge_attention(parts) == hw.attention(q, k, v)).all())
    True
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
    sinks = None if sinks is None else as_sinks(sinks, tuple(shape[:-1]), compute)
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
