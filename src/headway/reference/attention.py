"""Attention and what a layer needs besides, in plain NumPy and float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .._signatures import Unpack

Array = NDArray[np.float64]

LOWEST = -np.finfo(np.float64).max  # the most negative number that is still finite

# A score may be infinite or NaN, and so may its exponential. These are answers here, as IEEE 754 defines
# them, and no accidents to be warned of.
ieee = np.errstate(all="ignore")


class Options(TypedDict, total=False):
    """What every attention function takes: see `scores` for the first three, `allowed_keys` for the rest."""

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

    q (..., H, L, D), k (..., G, S, D), v (..., G, S, E), sinks (H,) or (..., H) -> out (..., H, L, E), and
    lse (..., H, L) on request.
    """
    score, allowed = scores(_with_batch_of(v, q), k, **options)
    values, sink = _for_every_head(v, score.shape), _for_every_row(sinks, score.shape)
    out = np.zeros(score.shape[:-1] + values.shape[-1:])
    lse = np.zeros(score.shape[:-1])
    for row in np.ndindex(lse.shape):  # row is (..., h, i): one query of one head of one batch item
        head, keys = row[:-1], allowed[row]
        # Forbidden keys are left out, not multiplied by 0: 0 * nan is nan, and they may hold anything.
        weight, lse[row] = softmax(score[row][keys], float(sink[row]))
        out[row] = average(weight, values[head][keys])
    return (out, lse) if return_lse else out


def average(weight: Array, values: Array) -> Array:
    """Sum weighted values (S, E) to their average (E,). Weights add up to 1, or less where a sink takes some.

    So it lies between the least and the greatest value, or 0. Rounding could make it leave them, and so be infinite
    where the values are as large as numbers can be.
    """
    least, greatest = np.min(values, axis=0, initial=0.0), np.max(values, axis=0, initial=0.0)
    return np.clip(weight @ values, least, greatest)


@ieee
def attention_weights(
    q: ArrayLike, k: ArrayLike, *, sinks: ArrayLike | None = None, **options: Unpack[Options]
) -> Array:
    """Give the weights under which `attention` averages: 0 at forbidden keys, 1 in total less the sink.

    q (..., H, L, D), k (..., G, S, D) -> (..., H, L, S)
    """
    score, allowed = scores(q, k, **options)
    sink = _for_every_row(sinks, score.shape)
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
    """Say how well each key answers each query, and whether it may: (score, allowed), both (..., H, L, S).

    In this order:

        score = q . k * scale                     scale: 1 / sqrt(D), which keeps the spread of scores near 1
        score = softcap * tanh(score / softcap)   optional: no score beyond +-softcap
        score = score + bias                      optional: (..., H, L, S), or what broadcasts to it

    The other options decide what is allowed: see `allowed_keys`.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    shape = (*np.broadcast_shapes(q.shape[:-3], k.shape[:-3]), *q.shape[-3:-1], k.shape[-2])
    factor = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
    # q . k * scale. What scale takes away is taken before: a product may be beyond all numbers where the score is not.
    fraction, exponent = np.frexp(factor)
    shift = min(int(exponent) - 64, 0)  # 64: a term may be, where the sum is not
    q, k = np.ldexp(q, shift // 2), np.ldexp(k, shift - shift // 2)
    score = np.matmul(q, np.swapaxes(_for_every_head(k, shape), -1, -2)) * np.ldexp(fraction, int(exponent) - shift)
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
    """Say which keys each query may attend to, (..., H, L, S): those that every rule given allows.

        mask         True or 1: it may; False or 0: it may not
        bias         -inf: it may not
        kv_lengths   one number for each batch item: only so many of its S keys are there
        causal       no key after the query's own position
        window       (left, right): from `left` keys before that position to `right` after it; None: no bound

    Query i stands at position i. With causal="bottom_right" it stands at i + n - L, where n is the number of
    keys, S or the batch item's kv_length: the last query then stands at the last key, as decoding needs it.
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


def _with_batch_of(v: ArrayLike, q: ArrayLike) -> Array:
    """Repeat q along the batch axes that v has and q has not."""
    q = np.asarray(q, np.float64)
    return np.broadcast_to(q, (*np.broadcast_shapes(np.shape(v)[:-3], q.shape[:-3]), *q.shape[-3:]))


def _for_every_head(x: ArrayLike, shape: Sequence[int]) -> Array:
    """Give each of the H query heads its keys or values: (..., G, S, D) -> (..., H, S, D).

    Where query heads share keys and values (Ainslie et al., 2023), head h reads key/value head h // (H / G).
    """
    x = np.asarray(x, np.float64)
    *batch, H, _, _ = shape
    x = np.repeat(x, H // max(x.shape[-3], 1), axis=-3)
    return np.broadcast_to(x, (*batch, *x.shape[-3:]))


def _for_every_row(sinks: ArrayLike | None, shape: Sequence[int]) -> Array:
    """Give each of the L queries the sink of its head: (..., H) -> (..., H, L). No sink is one of -inf."""
    sink = np.asarray(-np.inf if sinks is None else sinks, np.float64)
    return np.broadcast_to(sink[..., None], shape[:-1])


# Attention over a part of the keys --------------------------------------------------------------------------


class AttentionState(NamedTuple):
    """What a part of the keys contributes to each query: all that is needed to join it with other parts.

        maximum         (..., H, L)       the largest score
        total           (..., H, L)       sum_j exp(score_j - maximum)
        weighted_sum    (..., H, L, E)    sum_j exp(score_j - maximum) v_j

    For a query that may attend to no key of the part: -inf, 0 and 0.
    """

    maximum: Array
    total: Array
    weighted_sum: Array

    @classmethod
    def from_lse(cls, out: ArrayLike, lse: ArrayLike) -> AttentionState:
        """Make a state of a finished result: measured against exp(lse), its total is 1. Without keys, lse is -inf."""
        lse = np.asarray(lse, np.float64)
        if np.isposinf(lse).any():
            raise ValueError("lse: expected numbers below infinity, got inf; a row without keys has the lse -inf")
        return cls(lse, np.ones(lse.shape), np.asarray(out, np.float64))


@ieee
def partial_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, *, key_offset: int = 0, **options: Unpack[Options]
) -> AttentionState:
    """Attention over the keys key_offset, key_offset + 1, ... alone, left unfinished for `merge_attention`.

    mask and bias cover the part's keys; kv_lengths and all positions count from the first key of the whole.
    """
    score, allowed = scores(_with_batch_of(v, q), k, key_offset=key_offset, **options)
    values = _for_every_head(v, score.shape)
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
    """
    top = np.max([state.maximum for state in states], axis=0)
    empty = top == -np.inf  # no key in any part
    total, weighted_sum = np.zeros(top.shape), np.zeros(states[0].weighted_sum.shape)
    for state in states:
        measure = np.where(empty, 0, np.exp(state.maximum - top))
        total = total + measure * state.total
        weighted_sum = weighted_sum + measure[..., None] * state.weighted_sum
    sink = _for_every_row(sinks, (*top.shape, 0))
    out = np.where(empty[..., None], 0, weighted_sum / (total + np.exp(sink - top))[..., None])
    lse = np.where(empty, -np.inf, top + np.log(total))
    return (out, lse) if return_lse else out


# Whole layers -----------------------------------------------------------------------------------------------


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

    q (..., L, M), k and v (..., S, M), W (in, out) -> (..., L, M). A projection that is not given is the
    identity. Head 0 has the first M / num_heads columns, head 1 the next, and so on. decimals rounds the end.
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


@ieee
def linear(x: ArrayLike, w: ArrayLike | None, b: ArrayLike | None = None) -> Array:
    """Compute x w + b. x (..., in), w (in, out), b (out,) -> (..., out)."""
    y = np.asarray(x, np.float64)
    if w is not None:
        y = y @ np.asarray(w, np.float64)
    if b is not None:
        y = y + np.asarray(b, np.float64)
    return y


@ieee
def rotary(
    x: ArrayLike,
    *,
    positions: ArrayLike | None = None,
    base: float = 10000.0,
    frequencies: ArrayLike | None = None,
) -> Array:
    """Rotary position embedding (Su et al., 2021): turn each pair (x_i, x_{i + D/2}) by an angle.

        angle_i     = position * frequency_i,     frequency_i = base^(-2 i / D)
        y_i         = x_i cos(angle_i) - x_{i + D/2} sin(angle_i)
        y_{i + D/2} = x_{i + D/2} cos(angle_i) + x_i sin(angle_i)

    Turned so, q . k depends on the distance of their positions alone. Llama's checkpoints pair the same way.

    x (..., L, D); positions (L,) or (..., L), by default 0, 1, 2, ...; frequencies (D / 2,), else as above.
    """
    x = np.asarray(x, np.float64)
    L, D = x.shape[-2:]
    if positions is None:
        positions = np.arange(L)
    if frequencies is None:
        frequencies = base ** (-2 * np.arange(D // 2) / D)
    angle = np.asarray(positions)[..., None] * np.asarray(frequencies, np.float64)
    cosine, sine = np.cos(angle), np.sin(angle)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


@ieee
def rms_norm(x: ArrayLike, weight: ArrayLike, *, eps: float = 1e-6) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight along the last axis (Zhang and Sennrich, 2019)."""
    x = np.asarray(x, np.float64)
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Array = x / np.sqrt(mean_square + eps) * np.asarray(weight, np.float64)
    return y


@ieee
def swiglu(gate: ArrayLike, up: ArrayLike) -> Array:
    """Compute gate * sigmoid(gate) * up, where sigmoid(x) = 1 / (1 + exp(-x)) (Shazeer, 2020)."""
    gate, up = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    sigmoid = 1 / (1 + np.exp(-gate))
    y: Array = gate * sigmoid * up
    return y


class KVCache:
    """The keys and values of all tokens so far, so that a new token has to compute its own alone.

    `attend` gives for the newest queries what `attention` over the whole sequence gives for them.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        batch_shape: Sequence[int] = (),
        dtype: DTypeLike = np.float64,
        capacity: int | None = None,
    ) -> None:
        """Begin with no token. dtype and capacity matter to the compiled library; here all is float64."""
        self.keys = np.zeros((*batch_shape, num_kv_heads, 0, head_dim))
        self.values = np.zeros((*batch_shape, num_kv_heads, 0, head_dim if value_dim is None else value_dim))

    def append(self, k: ArrayLike, v: ArrayLike) -> None:
        """Add the keys (..., G, L, D) and the values (..., G, L, E) of L more tokens."""
        self.keys = np.concatenate([self.keys, np.asarray(k, np.float64)], axis=-2)
        self.values = np.concatenate([self.values, np.asarray(v, np.float64)], axis=-2)

    def attend(
        self,
        q: ArrayLike,
        *,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        **options: Unpack[Options],
    ) -> Array | tuple[Array, Array]:
        """Attend from q to all that was appended; by default the last query stands at the last token."""
        settings: Options = {"causal": "bottom_right", **options}
        return attention(q, self.keys, self.values, sinks=sinks, return_lse=return_lse, **settings)

    def __len__(self) -> int:
        """Count the tokens held."""
        return self.keys.shape[-2]

    def truncate(self, n: int) -> None:
        """Keep the first n tokens."""
        self.keys, self.values = self.keys[..., :n, :], self.values[..., :n, :]

    def fork(self) -> KVCache:
        """Make a second cache that holds the same and goes its own way from here."""
        twin = KVCache(0, 0)
        twin.keys, twin.values = self.keys, self.values
        return twin
