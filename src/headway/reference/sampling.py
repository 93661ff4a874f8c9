"""Sampling in plain NumPy, to the last bit: the kernels are tested for equality with this file.

A row of logits becomes a row of whole numbers ("weights", the largest is 2^44); whatever follows is exact integer
arithmetic, so that the order in which a machine adds up cannot matter. Before that there are only + - * and
comparisons, each rounded once in float32: the native kernels make the same weights bit for bit.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def philox(seed: int, stream: int, position: int, draw: int = 0) -> tuple[int, int, int, int]:
    """Four random 64-bit words of a position and a draw: Philox4x64-10 (Salmon et al. 2011, "As easy as 1, 2, 3").

    `numpy.random.Philox(key=[seed, stream], counter=position - 1)` begins with those of draw 0: NumPy counts up first.

    >>> hex(philox(0, 0, 0)[0])
    '0x16554d9eca36314c'
    """
    mask = 2**64 - 1
    a, b, c, d = position, draw, 0, 0
    key0, key1 = seed, stream
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second >> 64) ^ b ^ key0, second & mask, (first >> 64) ^ d ^ key1, first & mask
        key0, key1 = (key0 + 0x9E3779B97F4A7C15) & mask, (key1 + 0xBB67AE8584CAA73B) & mask
    return a, b, c, d


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


def sample(
    logits: Any, params: Any = None, *, num_samples: int | None = None, replacement: bool = True, **options: Any
) -> Any:
    """One token id per row of logits (..., V): an int for (V,), else int64 (...); num_samples=n draws (..., n).

    The options are those of `headway.sample`.

    >>> sample([1.0, 3.0, 2.0], temperature=0)
    1
    >>> sample([1.0, 3.0, 2.0], uniform=0.05)  # the interval of token 0 is [0, 0.09)
    0
    >>> sample([1.0, 3.0, 2.0], uniform=0.05, num_samples=3, replacement=False)
    array([0, 1, 2])
    """
    array = _floats(logits)
    n = 1 if num_samples is None else num_samples
    shape = array.shape[:-1] if num_samples is None else (*array.shape[:-1], n)
    uniform = options.get("uniform", getattr(params, "uniform", None))
    if uniform is not None:
        uniform = np.broadcast_to(np.asarray(uniform, np.float64), shape).reshape(*array.shape[:-1], n)
        options["uniform"] = uniform[..., 0]
        uniform = uniform.reshape(-1, n)
    tokens = []
    for i, row in enumerate(_rows(array, params, options)):
        weights = row.final_weights()
        for j in range(n):
            if uniform is not None:
                word = int(uniform[i, j] * 2.0**64)
            else:
                word = philox(int(row.settings["seed"]), row.stream, int(row.settings["position"] or 0), j)[0]
            tokens.append(_draw(weights, word))
            if not replacement:
                weights[tokens[-1]] = 0
    return tokens[0] if not shape else np.array(tokens, np.int64).reshape(shape)


def weights(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The whole numbers (..., V) that `sample` draws by: 0 where a token was removed.

    >>> weights([3.0, 2.0, 1.0], top_k=2) / 2**44
    array([1.        , 0.36787945, 0.        ])
    """
    array = _floats(logits)
    rows = [row.final_weights() for row in _rows(array, params, options)]
    return np.array(rows, np.int64).reshape(array.shape)


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
