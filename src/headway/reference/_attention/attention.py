"""Attention: scores, which keys are allowed, softmax, the average of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..._signatures import Unpack

Array = NDArray[np.float64]

LOWEST = -np.finfo(np.float64).max  # the most negative number that is still finite

# A score may be infinite or NaN, and so may its exponential. These are answers here, as IEEE 754 defines
# them, and no accidents to be warned of.
ieee = np.errstate(all="ignore")


class Options(TypedDict, total=False):
    """What every attention function takes; `scores` explains it."""

    scale: float | None
    softcap: float | None
    bias: ArrayLike | None
    mask: ArrayLike | None
    causal: bool | str | None
    window: tuple[int | None, int | None] | None
    kv_lengths: ArrayLike | None


@ieee
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    sinks: ArrayLike | None = None,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> Array | tuple[Array, Array]:
    """Scaled dot-product attention (Vaswani et al., 2017): softmax(q k^T / sqrt(D)) v.

    For query i of a head, over the keys j that it may attend to and over no others:

        score_j  = q_i . k_j / sqrt(D)                                  and what `scores` adds to it
        weight_j = exp(score_j) / (sum_j exp(score_j) + exp(sink))      a sink of -inf where there is none
        out_i    = sum_j weight_j v_j
        lse_i    = log(sum_j exp(score_j))                              over the keys alone

    A query that may attend to nothing gets out 0 and lse -inf.

    Args:
        q: (..., H, L, D).
        k: (..., G, S, D).
        v: (..., G, S, E).
        sinks: (H,) or (..., H); None is -inf.
        return_lse: whether lse comes back too.
        **options: those of `scores`.

    Returns:
        out (..., H, L, E); with return_lse the pair of out and lse (..., H, L).

    >>> import numpy as np
    >>> from headway import reference
    >>> reference.attention(np.zeros((1, 1, 4)), np.zeros((1, 2, 4)), np.array([[[1.0], [3.0]]]))
    array([[[2.]]])
    """
    score, allowed = scores(with_batch_of(v, q), k, **options)
    values, sink = for_every_head(v, score.shape), for_every_row(sinks, score.shape)
    out = np.zeros(score.shape[:-1] + values.shape[-1:])
    lse = np.zeros(score.shape[:-1])
    for row in np.ndindex(lse.shape):  # row is (..., h, i): one query of one head of one batch item
        head, keys = row[:-1], allowed[row]
        # Forbidden keys are left out, not multiplied by 0: 0 * nan is nan, and they may hold anything.
        weight, lse[row] = softmax(score[row][keys], float(sink[row]))
        out[row] = average(weight, values[head][keys])
    return (out, lse) if return_lse else out


def average(weight: Array, values: Array) -> Array:
    """Return the average (E,) of weighted values (S, E). Weights add up to 1, or less where a sink takes some.

    So it lies between the least and the greatest value, or 0. Rounding could make it leave them, and so be infinite
    where the values are as large as numbers can be.
    """
    least, greatest = np.min(values, axis=0, initial=0.0), np.max(values, axis=0, initial=0.0)
    return np.clip(weight @ values, least, greatest)


@ieee
def attention_weights(
    q: ArrayLike, k: ArrayLike, *, sinks: ArrayLike | None = None, **options: Unpack[Options]
) -> Array:
    """Give the weights under which `attention` averages.

    Args:
        q: (..., H, L, D).
        k: (..., G, S, D).
        sinks: (H,) or (..., H); None is -inf.
        **options: those of `scores`.

    Returns:
        (..., H, L, S): 0 at forbidden keys, 1 in total less the sink.

    >>> import numpy as np
    >>> from headway import reference
    >>> reference.attention_weights(np.zeros((1, 2, 4)), np.zeros((1, 2, 4)), causal=True)
    array([[[1. , 0. ],
            [0.5, 0.5]]])
    """
    score, allowed = scores(q, k, **options)
    sink = for_every_row(sinks, score.shape)
    weights = np.zeros(score.shape)
    for row in np.ndindex(score.shape[:-1]):
        keys = allowed[row]
        weights[row][keys], _ = softmax(score[row][keys], float(sink[row]))
    return weights


def softmax(score: Array, sink: float) -> tuple[Array, float]:
    """Turn one row of scores into weights and their log-sum-exp.

        weight_j = exp(score_j) / (sum_j exp(score_j) + exp(sink)),   lse = log(sum_j exp(score_j))

    Taken as written, exp(1000) would be infinite. Dividing above and below by exp(top), top being the largest
    score, changes no quotient and leaves exponentials between 0 and 1 of which one is 1: none overflows, and
    their sum is never 0 because all are tiny.

    Args:
        score: (S,), of the keys that the query may attend to.
        sink: a score more, of no key; -inf is none.

    Returns:
        The weights (S,), and lse.

    >>> import numpy as np
    >>> from headway import reference
    >>> reference.softmax(np.array([1000.0, 1000.0]), -np.inf)[0]
    array([0.5, 0.5])
    """
    if score.size == 0:
        return score, -np.inf
    top = np.maximum(np.max(score), LOWEST)  # never -inf, for exp(-inf) is 0, but exp(-inf - -inf) is nan
    exponential = np.exp(score - top)
    total = np.sum(exponential)
    return exponential / (total + np.exp(sink - top)), top + np.log(total)


def scores(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    causal: bool | str | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: ArrayLike | None = None,
    key_offset: int = 0,
) -> tuple[Array, NDArray[np.bool_]]:
    """Say how well each key answers each query, and whether it may.

    In this order:

        score = q . k * scale
        score = softcap * tanh(score / softcap)
        score = score + bias

    Args:
        q: (..., H, L, D).
        k: (..., G, S, D).
        scale: None is 1 / sqrt(D), which keeps the spread of scores near 1.
        softcap: no score is beyond +-softcap; None leaves that step out.
        bias: (..., H, L, S), or what broadcasts to it; None leaves that step out.
        mask: as `allowed_keys` takes it, and so are the options that follow.
        causal: see `allowed_keys`.
        window: see `allowed_keys`.
        kv_lengths: see `allowed_keys`.
        key_offset: see `allowed_keys`.

    Returns:
        The scores, and which keys are allowed, both (..., H, L, S).

    >>> import numpy as np
    >>> from headway import reference
    >>> reference.scores(np.ones((1, 1, 4)), np.ones((1, 2, 4)), bias=[0.0, -np.inf])
    (array([[[  2., -inf]]]), array([[[ True, False]]]))
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    shape = (*np.broadcast_shapes(q.shape[:-3], k.shape[:-3]), *q.shape[-3:-1], k.shape[-2])
    factor = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    # q . k * scale. What scale takes away is taken before: a product may be beyond all numbers where the score is not.
    fraction, exponent = np.frexp(factor)
    shift = min(int(exponent) - 64, 0)  # 64: a term may be, where the sum is not
    q, k = np.ldexp(q, shift // 2), np.ldexp(k, shift - shift // 2)
    score = np.matmul(q, np.swapaxes(for_every_head(k, shape), -1, -2)) * np.ldexp(fraction, int(exponent) - shift)
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    if bias is not None:
        score = score + np.asarray(bias, np.float64)
    return score, allowed_keys(shape, mask, bias, causal, window, kv_lengths, key_offset)


def allowed_keys(
    shape: Sequence[int],
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    causal: bool | str | None = None,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: ArrayLike | None = None,
    key_offset: int = 0,
) -> NDArray[np.bool_]:
    """Say which keys each query may attend to: those that every rule given allows.

    Query i stands at position i. With causal="bottom_right" it stands at i + n - L, where n is the number of
    keys, S or the batch item's kv_length: the last query then stands at the last key, as decoding needs it.

    Args:
        shape: (..., H, L, S), that of the scores.
        mask: (..., H, L, S), or what broadcasts to it. True or 1: it may; False or 0: it may not.
        bias: the same. -inf: it may not.
        causal: true, or "bottom_right": no key after the query's own position.
        window: (left, right): from `left` keys before that position to `right` after it; None: no bound.
        kv_lengths: (...), one number for each batch item: only so many of its S keys are there.
        key_offset: the position of the first key.

    Returns:
        bool (..., H, L, S).

    >>> from headway import reference
    >>> reference.allowed_keys((1, 2, 3), causal="bottom_right")
    array([[[ True,  True, False],
            [ True,  True,  True]]])
    """
    L, S = shape[-2:]
    key = key_offset + np.arange(S)
    n = np.asarray(key_offset + S if kv_lengths is None else kv_lengths)[..., None, None, None]
    position = np.arange(L)[:, None]
    if causal == "bottom_right":
        position = position + n - L
    allowed = key < n
    if causal:
        allowed = allowed & (key <= position)
    left, right = window or (None, None)
    if left is not None:
        allowed = allowed & (position - key <= left)
    if right is not None:
        allowed = allowed & (key - position <= right)
    if mask is not None:
        allowed = allowed & (np.asarray(mask) != 0)
    if bias is not None:
        allowed = allowed & (np.asarray(bias) != -np.inf)
    return np.broadcast_to(allowed, shape)


def with_batch_of(v: ArrayLike, q: ArrayLike) -> Array:
    """Repeat q along the batch axes that v has and q has not."""
    q = np.asarray(q, np.float64)
    return np.broadcast_to(q, (*np.broadcast_shapes(np.shape(v)[:-3], q.shape[:-3]), *q.shape[-3:]))


def for_every_head(x: ArrayLike, shape: Sequence[int]) -> Array:
    """Return the keys or values of each of the H query heads: (..., G, S, D) -> (..., H, S, D).

    Where query heads share keys and values (Ainslie et al., 2023), head h reads key/value head h // (H / G).
    """
    x = np.asarray(x, np.float64)
    *batch, H, _, _ = shape
    x = np.repeat(x, H // max(x.shape[-3], 1), axis=-3)
    return np.broadcast_to(x, (*batch, *x.shape[-3:]))


def for_every_row(sinks: ArrayLike | None, shape: Sequence[int]) -> Array:
    """Give each of the L queries the sink of its head: (..., H) -> (..., H, L). No sink is one of -inf."""
    sink = np.asarray(-np.inf if sinks is None else sinks, np.float64)
    return np.broadcast_to(sink[..., None], shape[:-1])
