"""Attention over a part of the keys, and the joining of such parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..._signatures import Unpack
from .attention import LOWEST, Array, Options, for_every_head, for_every_row, ieee, scores, with_batch_of


class AttentionState(NamedTuple):
    """What a part of the keys contributes to each query: all that is needed to join it with other parts.

    For a query that may attend to no key of the part: -inf, 0 and 0.

    Attributes:
        maximum: (..., H, L), the largest score.
        total: (..., H, L), sum_j exp(score_j - maximum).
        weighted_sum: (..., H, L, E), sum_j exp(score_j - maximum) v_j.

    >>> import numpy as np
    >>> from headway import reference
    >>> state = reference.partial_attention(np.zeros((1, 1, 4)), np.zeros((1, 2, 4)), [[[1.0], [3.0]]])
    >>> state.maximum, state.total, state.weighted_sum
    (array([[0.]]), array([[2.]]), array([[[4.]]]))
    """

    maximum: Array
    total: Array
    weighted_sum: Array

    @classmethod
    def from_lse(cls, out: ArrayLike, lse: ArrayLike) -> AttentionState:
        """Make a state of a finished result: measured against exp(lse), its total is 1.

        Args:
            out: (..., H, L, E).
            lse: (..., H, L); -inf without keys.

        Returns:
            The state.

        Raises:
            ValueError: an lse of +inf.

        >>> from headway import reference
        >>> reference.AttentionState.from_lse([[[2.0]]], [[0.5]]).maximum
        array([[0.5]])
        """
        lse = np.asarray(lse, np.float64)
        if np.isposinf(lse).any():
            raise ValueError("lse: expected numbers below infinity, got inf; a row without keys has the lse -inf")
        return cls(lse, np.ones(lse.shape), np.asarray(out, np.float64))


@ieee
def partial_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, key_offset: int = 0, **options: Unpack[Options]
) -> AttentionState:
    """Attention over the keys key_offset, key_offset + 1, ... alone, left unfinished for `merge_attention`.

    Args:
        q: (..., H, L, D).
        k: (..., G, S, D), the part's keys.
        v: (..., G, S, E), the part's values.
        key_offset: the position of the part's first key.
        **options: those of `scores`. mask and bias cover the part's keys; kv_lengths and all positions count from the
            first key of the whole.

    Returns:
        The part's state.

    >>> import numpy as np
    >>> from headway import reference
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 5, 4))
    >>> parts = [reference.partial_attention(q, k[:, i : i + 3], v[:, i : i + 3], key_offset=i) for i in (0, 3)]
    >>> np.allclose(reference.merge_attention(parts), reference.attention(q, k, v))
    True
    """
    score, allowed = scores(with_batch_of(v, q), k, key_offset=key_offset, **options)
    values = for_every_head(v, score.shape)
    maximum = np.full(score.shape[:-1], -np.inf)
    total = np.zeros(score.shape[:-1])
    weighted_sum = np.zeros(score.shape[:-1] + values.shape[-1:])
    for row in np.ndindex(maximum.shape):
        head, keys = row[:-1], allowed[row]
        if keys.any():
            maximum[row] = np.maximum(np.max(score[row][keys]), LOWEST)
            exponential = np.exp(score[row][keys] - maximum[row])
            total[row] = np.sum(exponential)
            weighted_sum[row] = exponential @ values[head][keys]
    return AttentionState(maximum, total, weighted_sum)


@ieee
def merge_attention(
    states: Sequence[AttentionState], *, sinks: ArrayLike | None = None, return_lse: bool = False
) -> Array | tuple[Array, Array]:
    """Join the states of all parts to what `attention` gives over all keys.

    Each part was measured against its own maximum; exp(maximum - the largest one) brings all to one measure.

    Args:
        states: those of all parts.
        sinks: as `attention` takes them.
        return_lse: as `attention` takes it.

    Returns:
        What `attention` returns.

    >>> from headway import reference
    >>> parts = [reference.AttentionState.from_lse([[[out]]], [[0.0]]) for out in (1.0, 3.0)]
    >>> reference.merge_attention(parts)
    array([[[2.]]])
    """
    top = np.max([state.maximum for state in states], axis=0)
    empty = top == -np.inf  # no key in any part
    total, weighted_sum = np.zeros(top.shape), np.zeros(states[0].weighted_sum.shape)
    for state in states:
        measure = np.where(empty, 0, np.exp(state.maximum - top))
        total = total + measure * state.total
        weighted_sum = weighted_sum + measure[..., None] * state.weighted_sum
    sink = for_every_row(sinks, (*top.shape, 0))
    out = np.where(empty[..., None], 0, weighted_sum / (total + np.exp(sink - top))[..., None])
    lse = np.where(empty, -np.inf, top + np.log(total))
    return (out, lse) if return_lse else out
