"""The definition: every operation of headway once more, in plain NumPy and float64, written to be read.

Nothing here is fast and nothing is clever. A docstring is the formula, and the body is the formula again, one
step a line. The compiled library is tested against this file: where the two disagree, one of them has a bug.
Arguments are hardly checked here; that is the public functions' task.

The alphabet of shapes, the same everywhere in headway:

    ...  batch: any number of leading axes, none included
    H    query heads                  L    queries
    G    key/value heads              S    keys, and values: each key has one
    D    head size of q and k         E    head size of v
    M    model width, often H * D

If attention is new to you, begin with `attention` and think of one head and no options. L queries each put a
question to S keys. How well a key answers is a number, the score. `softmax` turns a query's scores into
weights: positive, and 1 in total. The result is the average of the keys' values under those weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

if TYPE_CHECKING:
    from typing_extensions import Unpack

Array = NDArray[np.float64]

LOWEST = -np.finfo(np.float64).max  # the most negative number that is still finite

# A score may be infinite or NaN, and so may its exponential. These are answers here, as IEEE 754 defines
# them, and no accidents to be warned of.
ieee = np.errstate(all="ignore")

# ============================================================================================================
# Attention, and what a layer needs besides
# ============================================================================================================


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
        out[row] = weight @ values[head][keys]
    return (out, lse) if return_lse else out


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
    if scale is None:
        scale = 1 / np.sqrt(q.shape[-1])
    score = np.matmul(q, np.swapaxes(_for_every_head(k, shape), -1, -2)) * scale
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
        allowed = allowed & (key >= position - left)
    if right is not None:
        allowed = allowed & (key <= position + right)
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
        """Make a state of a finished result: measured against exp(lse), its total is 1."""
        lse = np.asarray(lse, np.float64)
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
        out = np.round(out, decimals) + 0.0  # a table has no -0
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


# ============================================================================================================
# Sampling
# ============================================================================================================
#
# A row of logits becomes a row of whole numbers ("weights", the largest is 2^44); whatever follows is exact integer
# arithmetic, so that the order in which a machine adds up cannot matter. Before that there are only + - * and
# comparisons, each rounded once in float32: the native kernels make the same weights bit for bit.

AnyArray = NDArray[Any]

_FLT_MAX = float(np.finfo(np.float32).max)
_FLT_MIN = float(np.finfo(np.float32).tiny)  # the smallest normal number
_LOG2_E = np.float32(float.fromhex("0x1.715476p+0"))
_ROUND = np.float32(float.fromhex("0x1.8p+23"))  # x + _ROUND - _ROUND is the integer nearest to x
# ln 2 in two parts: n * _LN2_HIGH is exact for |n| < 2^12.
_LN2_HIGH = np.float32(float.fromhex("0x1.62ep-1"))
_LN2_LOW = np.float32(float.fromhex("0x1.0bfbe8p-15"))
# exp(r) = 1 + r + r^2 Q(r) for |r| <= ln(2)/2: a near-minimax fit made by tools/polynomials.py.
_EXP_TAIL = tuple(
    np.float32(float.fromhex(c))
    for c in ("0x1.6d10fcp-10", "0x1.120b62p-7", "0x1.55551ap-5", "0x1.5554dep-3", "0x1p-1")
)
_LOWEST_X = np.float32(-40)  # exp(-40) < 2^-57: any weight there is 0

_Settings = dict[str, Any]


def _floats(logits: Any) -> AnyArray:
    """An array of floats; lists and whole numbers count as float64."""
    array = np.asarray(logits)
    return array.astype(np.float64) if array.dtype.kind in "iu" else array


def _scale_bits(vocabulary: int) -> int:
    """s: the largest weight is 2^s. 2^44, or less where V of them could exceed 2^62."""
    return min(44, 62 - (vocabulary - 1).bit_length())


def _scores(logits: AnyArray, bias: AnyArray | None, allowed: AnyArray | None) -> AnyArray:
    """Return z (V,) float32: logits plus bias, -inf where a token is banned, no negative zero.

    Raises ValueError where an allowed token's score is NaN or +inf, or no token is left.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        z = logits.astype(np.float32)
        if bias is not None:
            z = z + bias.astype(np.float32)
    if allowed is not None:
        z = np.where(allowed, z, np.float32(-np.inf))
    if np.isnan(z).any():
        raise ValueError("logits: NaN")
    if (z == np.inf).any():
        raise ValueError("logits: +inf")
    if (z == -np.inf).all():
        raise ValueError("logits: every token is banned")
    return np.asarray(z + np.float32(0))


def _keys(z: AnyArray) -> AnyArray:
    """(V,) uint32 in the order of z: how a machine treats tiny floats is nothing to whole numbers."""
    bits = z.view(np.uint32)
    return np.asarray(bits ^ np.where(bits >> 31 == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000)))


def _weights(z: AnyArray, temperature: float) -> AnyArray:
    """(V,) int64: 2^s exp((z - max z) / temperature), rounded to a whole number; banned tokens 0."""
    s = _scale_bits(z.size)
    best = int(_keys(z).argmax())  # the lowest id among the largest
    if temperature == 0:
        weights = np.zeros(z.size, np.int64)
        weights[best] = 1 << s
        return weights
    inverse = min(1.0 / temperature, _FLT_MAX)
    inverse = 0.0 if inverse < _FLT_MIN else inverse
    with np.errstate(over="ignore", under="ignore"):
        d = np.maximum(z - z[best], np.float32(-_FLT_MAX))
        x = np.maximum(d * np.float32(inverse), _LOWEST_X)
    # exp(x) = 2^n exp(r), n whole and |r| <= ln(2)/2
    n = (x * _LOG2_E + _ROUND) - _ROUND
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    q = np.full_like(r, _EXP_TAIL[0])
    for coefficient in _EXP_TAIL[1:]:
        q = q * r + coefficient
    with np.errstate(under="ignore"):
        y = (r * r * q + r) + np.float32(1)
    # times 2^(n + s), by adding to the exponent's bits
    exponent = n.astype(np.int32) + np.int32(s)
    scaled = (y.view(np.int32) + (exponent << 23)).view(np.float32)
    # From 2^52 to 2^53 the doubles are the whole numbers: adding 2^52 rounds to nearest, ties to even.
    whole = (scaled.astype(np.float64) + 2.0**52).view(np.int64) - np.float64(2.0**52).view(np.int64)
    return np.asarray(np.where(z == -np.inf, np.int64(0), whole))


def _share(p: float, total: int) -> int:
    """The smallest whole number >= p * total, exactly."""
    numerator, denominator = float(p).as_integer_ratio()
    return -(-numerator * total // denominator)


# A stage takes the ids that are still in, best first, and returns those that stay.


def _top_k(kept: AnyArray, z: AnyArray, weights: AnyArray, row: _Settings) -> AnyArray:
    """Fan et al. 2018 (arXiv:1805.04833): the k best."""
    k = row["top_k"]
    if k is None or k >= kept.size:
        return kept
    if row["ties"] == "keep":
        key = _keys(z)[kept]
        kept = kept[key >= key[k - 1]]
        return kept
    return kept[:k]


def _top_p(kept: AnyArray, z: AnyArray, weights: AnyArray, row: _Settings) -> AnyArray:
    """Holtzman et al. 2020 (arXiv:1904.09751): a token stays iff the mass strictly before it is below p."""
    p = row["top_p"]
    if p is None or p == 1:
        return kept
    mass = weights[kept]
    before = np.cumsum(mass) - mass
    return kept[before < _share(p, int(mass.sum()))]


def _min_p(kept: AnyArray, z: AnyArray, weights: AnyArray, row: _Settings) -> AnyArray:
    """Nguyen et al. 2024 (arXiv:2407.01082): at least min_p times the mass of the best one."""
    p = row["min_p"]
    if p is None or p == 0:
        return kept
    mass = weights[kept]
    return kept[mass >= _share(p, int(mass.max()))]


_STAGES = {"after_top_k": (_top_k, _top_p, _min_p), "joint": (_top_p, _top_k, _min_p)}


def _survivors(z: AnyArray, weights: AnyArray, row: _Settings) -> AnyArray:
    """Ids that every stage leaves in. The order of tokens: z descending, id ascending."""
    order = np.argsort(~_keys(z), kind="stable")
    kept: AnyArray = order[z[order] != -np.inf]
    for stage in _STAGES[row["nucleus"]]:
        kept = stage(kept, z, weights, row)
    return kept


def philox(seed: int, stream: int, position: int) -> tuple[int, int, int, int]:
    """Block `position` of four random 64-bit words: Philox4x64-10 (Salmon et al. 2011, "As easy as 1, 2, 3").

    `numpy.random.Philox(key=[seed, stream], counter=position - 1)` begins with them: NumPy counts up first.

    >>> hex(philox(0, 0, 0)[0])
    '0x16554d9eca36314c'
    """
    mask = 2**64 - 1
    a, b, c, d = position, 0, 0, 0
    key0, key1 = seed, stream
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ key0, second & mask, (first >> 64) ^ d ^ key1, first & mask
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & mask, (key1 + 0xBB67AE8584CAA73B) & mask
    return a, b, c, d


def _word(row: _Settings, stream: int) -> int:
    """The row's random number, 64 bits."""
    if row["uniform"] is not None:
        return int(row["uniform"] * 2.0**64)
    return philox(int(row["seed"]), stream, int(row["position"] or 0))[0]


def _draw(weights: AnyArray, word: int) -> int:
    """The token whose interval of the running sum, in id order, holds word / 2^64 of the total."""
    running = np.cumsum(weights)
    target = word * int(running[-1]) >> 64
    return int(np.searchsorted(running, target, side="right"))


def _mask(allowed: Any, shape: tuple[int, ...]) -> AnyArray | None:
    """`allowed` in any of its forms as bool (..., V)."""
    if allowed is None:
        return None
    array = np.asarray(sorted(allowed) if isinstance(allowed, (set, frozenset)) else allowed)
    if array.dtype in (np.int32, np.uint32):  # 32 tokens in a word, the lowest bit first
        token = np.arange(shape[-1])
        array = array[..., token // 32].view(np.uint32) >> (token % 32).astype(np.uint32) & np.uint32(1) == 1
    elif array.dtype != np.bool_:
        ids, array = array.astype(np.int64), np.zeros(shape[-1], np.bool_)
        array[ids] = True
    return np.broadcast_to(array, shape)


def _bias(logit_bias: Any, shape: tuple[int, ...]) -> AnyArray | None:
    """`logit_bias` in any of its forms as float32 (..., V)."""
    if logit_bias is None:
        return None
    array = np.zeros(shape[-1], np.float32)
    if isinstance(logit_bias, Mapping):
        for token, value in logit_bias.items():
            array[token] = value
    else:
        with np.errstate(over="ignore"):
            array = np.asarray(logit_bias).astype(np.float32)
    return np.broadcast_to(array, shape)


class _Row(NamedTuple):
    """One row on its way through the stages."""

    logits: AnyArray  # (V,), as given
    bias: AnyArray | None  # (V,) float32
    z: AnyArray  # (V,) float32: logits + bias, -inf where banned
    weights: AnyArray  # (V,) int64
    kept: AnyArray  # the ids that every stage left in, best first
    settings: _Settings
    stream: int

    def final_weights(self) -> AnyArray:
        """(V,) int64: 0 where a token was removed."""
        final = np.zeros_like(self.weights)
        final[self.kept] = self.weights[self.kept]
        return final


_DEFAULTS: _Settings = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "allowed": None,
    "logit_bias": None,
    "ties": "lowest_id",
    "nucleus": "after_top_k",
    "seed": None,
    "position": None,
    "uniform": None,
}


def _rows(logits: AnyArray, params: Any, options: _Settings) -> list[_Row]:
    """Every row of logits (..., V), in C order, with its own settings, taken through the stages."""
    given = {} if params is None else {name: getattr(params, name) for name in _DEFAULTS}
    settings = {**_DEFAULTS, **given, **options}
    mask, bias = _mask(settings.pop("allowed"), logits.shape), _bias(settings.pop("logit_bias"), logits.shape)
    if settings["seed"] is None:
        settings["seed"] = secrets.randbits(64)
    one_seed = np.ndim(settings["seed"]) == 0
    lead = logits.shape[:-1]
    settings = {name: np.broadcast_to(np.asarray(value, object), lead) for name, value in settings.items()}
    rows = []
    for number, index in enumerate(np.ndindex(lead)):
        own = {name: values[index] for name, values in settings.items()}
        row_bias = None if bias is None else bias[index]
        z = _scores(logits[index], row_bias, None if mask is None else mask[index])
        weights = _weights(z, float(own["temperature"]))
        kept = _survivors(z, weights, own)
        rows.append(_Row(logits[index], row_bias, z, weights, kept, own, number if one_seed else 0))
    return rows


def sample(logits: Any, params: Any = None, **options: Any) -> Any:
    """One token id per row of logits (..., V): an int for (V,), else int64 (...).

    The options are those of `headway.sample`.

    >>> sample([1.0, 3.0, 2.0], temperature=0)
    1
    >>> sample([1.0, 3.0, 2.0], uniform=0.05)  # the interval of token 0 is [0, 0.09)
    0
    """
    array = _floats(logits)
    rows = _rows(array, params, options)
    tokens = [_draw(row.final_weights(), _word(row.settings, row.stream)) for row in rows]
    return tokens[0] if array.ndim == 1 else np.array(tokens, np.int64).reshape(array.shape[:-1])


def probabilities(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The distribution (..., V) that `sample` draws from: float32, or float64 for float64 logits.

    >>> probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    array = _floats(logits)
    out = np.zeros(array.shape, np.float64 if array.dtype == np.float64 else np.float32)
    for row, target in zip(_rows(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        weights = row.final_weights()
        target[:] = weights.astype(np.float64) / float(weights.sum())
    return out


def filter_logits(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The logits (..., V) as given, plus bias, in their own dtype; -inf where a token was removed.

    >>> filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    array = _floats(logits)
    out = np.full(array.shape, -np.inf, array.dtype)
    wide = np.float64 if array.dtype == np.float64 else np.float32
    for row, target in zip(_rows(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        given = row.logits
        if row.bias is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                given = (given.astype(wide) + row.bias.astype(wide)).astype(array.dtype)
        target[row.kept] = given[row.kept]
    return out
