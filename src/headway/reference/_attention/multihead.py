"""Multi-head attention: projections before and after the heads."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..._signatures import Unpack
from .attention import Array, Options, attention, ieee
from .layers import linear


@ieee
def multi_head_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    num_heads: int,
    w_q: ArrayLike | None = None,
    w_k: ArrayLike | None = None,
    w_v: ArrayLike | None = None,
    w_o: ArrayLike | None = None,
    b_q: ArrayLike | None = None,
    b_k: ArrayLike | None = None,
    b_v: ArrayLike | None = None,
    b_o: ArrayLike | None = None,
    num_kv_heads: int | None = None,
    decimals: int | None = None,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Multi-head attention: project, attend in every head on its own, join the heads, project.

        head_h = attention(the columns of head h of q W_q + b_q, of k W_k + b_k, of v W_v + b_v)
        out    = (head_0, head_1, ... side by side) W_o + b_o

    Head 0 has the first M / num_heads columns, head 1 the next, and so on.

    Args:
        q: (..., L, M).
        k: (..., S, M).
        v: (..., S, M).
        num_heads: H.
        w_q: (in, out), as every W; None is the identity.
        w_k: (in, out) or None.
        w_v: (in, out) or None.
        w_o: (in, out) or None.
        b_q: (out,), as every b; None is 0.
        b_k: (out,) or None.
        b_v: (out,) or None.
        b_o: (out,) or None.
        num_kv_heads: G; None is H.
        decimals: to how many the end is rounded; None leaves it as it is.
        sinks: as `attention` takes them.
        return_lse: as `attention` takes it.
        **options: those of `scores`.

    Returns:
        (..., L, M); with return_lse the pair of it and lse (..., H, L).

    >>> from headway import reference
    >>> x = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]
    >>> reference.multi_head_attention(x, x, x, num_heads=2, decimals=6)
    array([[0.669762, 0.330238, 0.330238, 0.669762],
           [0.330238, 0.669762, 0.669762, 0.330238]])
    """
    q = _split(linear(q, w_q, b_q), num_heads)
    k = _split(linear(k, w_k, b_k), num_kv_heads or num_heads)
    v = _split(linear(v, w_v, b_v), num_kv_heads or num_heads)
    heads, lse = attention(q, k, v, sinks=sinks, return_lse=True, **options)
    out = linear(_join(heads), w_o, b_o)
    if decimals is not None:
        scaled = out * 10.0**decimals
        # From 2^52 on every number is whole: there is nothing to round. A table has no -0.
        out = np.where(np.abs(scaled) < 2.0**52, np.rint(scaled) / 10.0**decimals, out) + 0.0
    return (out, lse) if return_lse else out


def _split(x: Array, heads: int) -> Array:
    """(..., L, heads * D) -> (..., heads, L, D)."""
    *rest, width = x.shape
    return np.swapaxes(x.reshape(*rest, heads, width // heads), -3, -2)


def _join(x: Array) -> Array:
    """(..., heads, L, E) -> (..., L, heads * E)."""
    *rest, heads, L, E = x.shape
    return np.swapaxes(x, -3, -2).reshape(*rest, L, heads * E)
