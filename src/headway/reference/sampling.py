"""Sampling in plain NumPy, to the last bit: the kernels are tested for equality with this file.

A row of logits becomes a row of whole numbers ("weights", the largest is 2^44); whatever follows is exact integer
arithmetic, so that the order in which a machine adds up cannot matter. Before that there are only + - * and
comparisons, each rounded once in float32: the native kernels make the same weights bit for bit.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._sampling import OFF, Reading, Step, rules

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
# The same in float64, for the few numbers that need it.
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_LOG2_E_WIDE = float.fromhex("0x1.71547652b82fep+0")
_ROUND_WIDE = float.fromhex("0x1.8p+52")
_LN2_HIGH_WIDE = float.fromhex("0x1.62e42fefp-1")
_LN2_LOW_WIDE = float.fromhex("0x1.473de6af278edp-34")

_Settings = dict[str, Any]
_Words = Callable[[int], tuple[int, ...]]  # the random numbers of a draw
_Watch = Callable[["_Row", Step, float], None]  # sees a row, a stage and its value before the stage


def _floats(logits: Any) -> AnyArray:
    """An array of floats; lists and whole numbers count as float64."""
    array = np.asarray(logits)
    return array.astype(np.float64) if array.dtype.kind in "iu" else array


def _scale_bits(vocabulary: int) -> int:
    """s: the largest weight is 2^s. 2^44, or less where V of them could exceed 2^62."""
    return min(44, 62 - (vocabulary - 1).bit_length())


def _no_ban(z: AnyArray, finite: AnyArray) -> AnyArray:
    """The lowest float32 for -inf, where what it was made of is finite: what is too low for float32 is no ban."""
    return np.where((z == -np.inf) & finite, np.float32(-_FLT_MAX), z)


def _float32(numbers: AnyArray) -> AnyArray:
    """Numbers rounded to float32."""
    with np.errstate(over="ignore"):
        return _no_ban(numbers.astype(np.float32), numbers > -np.inf)


def _scores(logits: AnyArray, bias: AnyArray | None, allowed: AnyArray | None) -> AnyArray:
    """Return z (V,) float32: logits plus bias, -inf where a token is banned, no negative zero.

    Raises ValueError where an allowed token's score is NaN or +inf, or no token is left.
    """
    z = _float32(logits)
    if bias is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            z = _no_ban(z + bias, (z > -np.inf) & (bias > -np.inf))
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


def _exponents(z: AnyArray, temperature: float) -> AnyArray:
    """X float32: (z - max z) / temperature, from -40, where the mass is 0 already, to 0."""
    inverse = min(1.0 / temperature, _FLT_MAX) if temperature else _FLT_MAX
    inverse = 0.0 if inverse < _FLT_MIN else inverse
    with np.errstate(over="ignore", under="ignore"):
        d = np.maximum(z - z.max(), np.float32(-_FLT_MAX))
        return np.asarray(np.maximum(d * np.float32(inverse), _LOWEST_X))


def _weights(x: AnyArray, s: int) -> AnyArray:
    """int64: 2^s exp(x), rounded to a whole number."""
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
    return np.asarray((scaled.astype(np.float64) + 2.0**52).view(np.int64) - np.float64(2.0**52).view(np.int64))


def _share(p: float, total: int, equal: bool = True) -> int:
    """The smallest whole number >= p * total, exactly; > p * total where equal is False."""
    numerator, denominator = float(p).as_integer_ratio()
    return -(-numerator * total // denominator) if equal else numerator * total // denominator + 1


def _log(v: float) -> float:
    """Ln v of a normal number, in float64 by + - * / alone: v = 2^e m with m near 1, s = (m - 1) / (m + 1).

    ln m = 2 s (1 + s^2 / 3 + s^4 / 5 + ... + s^20 / 21): the next term is below 2^-60.
    """
    m, e = math.frexp(v)
    if m < _SQRT_HALF:
        m, e = 2 * m, e - 1
    s = (m - 1) / (m + 1)
    series = 1 / 21
    for k in range(19, 0, -2):
        series = series * (s * s) + 1 / k
    return 2 * s * series + e * _LN2


def _exp(y: float) -> float:
    """e^y of y <= 0, in float64 by + - * / alone: 2^n times Taylor's series of the rest; 0 below -700."""
    if y < -700:
        return 0.0
    n = (y * _LOG2_E_WIDE + _ROUND_WIDE) - _ROUND_WIDE
    r = (y - n * _LN2_HIGH_WIDE) - n * _LN2_LOW_WIDE
    series = 1.0
    for k in range(14, 0, -1):
        series = 1 + series * r / k
    return math.ldexp(series, int(n))


def _power(share: float, exponent: float) -> float:
    """A share, from 0 to 1, to a power; one below the smallest normal number is 0."""
    if exponent == 0:
        return 1.0
    if share < sys.float_info.min:
        return 0.0 if exponent > 0 else math.inf
    y = exponent * _log(share)
    if y <= 0:
        return _exp(y)
    return 1 / _exp(-y) if _exp(-y) else math.inf


class _Given(NamedTuple):
    """A row as it came."""

    logits: AnyArray  # (V,)
    bias: AnyArray | None  # (V,) float32


class _Row:
    """One row on its way through the stages: the tokens that are still in, best first, and their masses."""

    def __init__(self, given: _Given, z: AnyArray, settings: _Settings, words: _Words) -> None:
        order = np.argsort(~_keys(z), kind="stable")  # z descending, id ascending
        self.given = given
        self.vocabulary = z.size
        self.s = _scale_bits(z.size)
        self.ids: AnyArray = order[z[order] != -np.inf]
        self.z: AnyArray = z[self.ids]
        self.settings = settings
        self.words = words
        self.floor = 1  # what the stage must leave at least
        self.measure(1.0)

    def measure(self, temperature: float) -> None:
        """Measure masses at this temperature: 2^s is that of the best token that is left."""
        self.temperature = temperature
        self.x = _exponents(self.z, temperature)
        self.mass = _weights(self.x, self.s)
        if temperature == 0:  # all for the best one
            self.mass[:] = 0
            self.mass[0] = 1 << self.s

    @property
    def total(self) -> int:
        return int(self.mass.sum())

    def keep(self, stays: AnyArray) -> None:
        """Leave these in; where the best token goes, measure anew."""
        best = self.z[0]
        self.ids, self.z, self.x, self.mass = (part[stays] for part in (self.ids, self.z, self.x, self.mass))
        if self.z[0] != best:
            self.measure(self.temperature)

    def first(self, count: int, ties: str) -> AnyArray:
        """Which tokens are the first `count` of the order, at least as many as must be kept."""
        count = min(max(count, self.floor), self.ids.size)
        key = _keys(self.z)
        if ties == "keep":
            return np.asarray(key >= key[count - 1])
        id_order = self.ids if ties == "lowest_id" else -self.ids
        order = np.lexsort((id_order, ~key))
        return np.asarray(np.isin(np.arange(self.ids.size), order[:count]))

    def sum(self, values: AnyArray) -> float:
        """The sum of float64 values, one per token: lane i of 16 adds the tokens with id mod 16 = i, in order."""
        of_id = np.zeros(-(-self.vocabulary // 16) * 16)
        of_id[self.ids] = values
        lanes = np.cumsum(of_id.reshape(-1, 16), axis=0)[-1]
        for half in (8, 4, 2, 1):
            lanes = lanes[:half] + lanes[half : 2 * half]
        return float(lanes[0])

    def mean(self) -> float:
        """The mean of x under the masses. The surprise of a token less the entropy is this less its x."""
        return self.sum(self.mass.astype(np.float64) * self.x.astype(np.float64)) / float(self.total)

    def final_weights(self) -> AnyArray:
        """(V,) int64: 0 where a token was removed."""
        final = np.zeros(self.vocabulary, np.int64)
        final[self.ids] = self.mass
        return final


# Stages: each takes the value of its option, and leaves in the row what stays.


def _greedy(row: _Row, temperature: float, step: Step) -> None:
    """Temperature 0 before all else."""
    if temperature == 0:
        row.measure(0)


def _temperature(row: _Row, temperature: float, step: Step) -> None:
    """Measure masses at the temperature; with a range, at one between t - range and t + range that rises with entropy.

    The entropy is that of the masses at temperature 1, as a share of the largest that so many tokens can have.
    """
    spread = row.settings["dynamic_temperature_range"]
    if spread:
        low, high = max(0.0, temperature - spread), min(temperature + spread, sys.float_info.max)
        row.measure(1.0)
        entropy = _log(float(row.total) * 2.0**-row.s) - row.mean()
        share = entropy / _log(float(row.ids.size)) if row.ids.size > 1 else 0.0
        power = _power(min(max(share, 0.0), 1.0), row.settings["dynamic_temperature_exponent"])
        temperature = min(sys.float_info.max, low + (high - low) * power)
    row.measure(float(temperature))


def _below(row: _Row) -> AnyArray:
    """How far each z is from the best one: 0 or less, in float64."""
    return np.asarray(row.z.astype(np.float64) - float(row.z[0]))


def _deviation(row: _Row) -> float:
    """The standard deviation of z."""
    below, count = _below(row), float(row.ids.size)
    mean, mean_square = row.sum(below) / count, row.sum(below * below) / count
    return math.sqrt(max(mean_square - mean * mean, 0.0))


def _top_n_sigma(row: _Row, n: float, step: Step) -> None:
    """Tang et al. 2024 (arXiv:2411.07641): z at most n standard deviations below the best one's."""
    if n == OFF["top_n_sigma"]:
        return
    stays = _below(row) >= -(n * _deviation(row))
    row.keep(row.first(int(stays.sum()), step.ties))


def _top_k(row: _Row, k: float, step: Step) -> None:
    """Fan et al. 2018 (arXiv:1805.04833): the k best."""
    row.keep(row.first(int(min(k, row.ids.size)), step.ties))


def _top_p(row: _Row, p: float, step: Step) -> None:
    """Holtzman et al. 2020 (arXiv:1904.09751): a token stays iff the mass strictly before it is below p."""
    if p == OFF["top_p"]:
        return
    before = np.cumsum(row.mass) - row.mass
    stays = before < _share(p, row.total, not step.equal)
    row.keep(row.first(int(stays.sum()), step.ties))


def _heavy(row: _Row, least: int, step: Step) -> None:
    """Keep masses of at least so much; where those are too few, the first of the order."""
    stays = row.mass >= least
    row.keep(stays if stays.sum() >= row.floor else row.first(0, step.ties))


def _min_p(row: _Row, p: float, step: Step) -> None:
    """Nguyen et al. 2024 (arXiv:2407.01082): at least min_p times the mass of the best one."""
    _heavy(row, _share(p, 1 << row.s), step)


def _distance(row: _Row) -> AnyArray:
    """How far each surprise is from the entropy, float32."""
    return np.asarray(np.abs(row.x - np.float32(row.mean())))


def _typical_p(row: _Row, p: float, step: Step) -> None:
    """Meister et al. 2022 (arXiv:2202.00666): as top_p, but ordered by the distance of surprise from entropy."""
    if p == OFF["typical_p"]:
        return
    distance = _distance(row)
    order = np.lexsort((row.ids, _keys(distance)))
    mass = row.mass[order]
    count = int((np.cumsum(mass) - mass < _share(p, row.total, not step.equal)).sum())
    if step.ties == "keep" and count:
        count = int((distance <= distance[order[count - 1]]).sum())
    row.keep(np.isin(np.arange(row.ids.size), order[: max(count, row.floor)]))


def _epsilon_cutoff(row: _Row, epsilon: float, step: Step) -> None:
    """Hewitt et al. 2022 (arXiv:2210.15191): at least epsilon of the whole."""
    _heavy(row, _share(epsilon, row.total), step)


def _eta(row: _Row, epsilon: float) -> int:
    middle = int(_weights(np.array([row.mean()], np.float32), row.s)[0])
    return min(_share(epsilon, row.total), _share(math.sqrt(epsilon), middle))


def _eta_cutoff(row: _Row, epsilon: float, step: Step) -> None:
    """Hewitt et al. 2022: at least min(epsilon, sqrt(epsilon) exp(-entropy)) of the whole.

    exp(-entropy) of the whole is the mass that a token at the mean of x would have.
    """
    _heavy(row, _eta(row, epsilon), step)


def _coin(row: _Row) -> float:
    return float((row.words(0)[1] >> 11) * 2.0**-53)


def _xtc(row: _Row, probability: float, step: Step) -> None:
    """Exclude top choices (llama.cpp #9742): if the coin says so, all that reach the threshold go but the last.

    Of these the special tokens stay.
    """
    if _coin(row) >= probability:
        return
    least = max(1, _share(row.settings["xtc_threshold"], row.total, step.equal))
    top = np.flatnonzero(row.mass >= least)
    if top.size < 2:
        return
    key = _keys(row.z)
    goes = top[key[top] > key[top[-1]]] if step.ties == "keep" else top[:-1]
    goes = goes[~np.isin(row.ids[goes], row.settings["xtc_special_tokens"] or ())]
    if row.ids.size - goes.size >= row.floor:
        row.keep(~np.isin(np.arange(row.ids.size), goes))


_STAGES = {
    "greedy": _greedy,
    "temperature": _temperature,
    "top_n_sigma": _top_n_sigma,
    "top_k": _top_k,
    "top_p": _top_p,
    "min_p": _min_p,
    "typical_p": _typical_p,
    "epsilon_cutoff": _epsilon_cutoff,
    "eta_cutoff": _eta_cutoff,
    "xtc_probability": _xtc,
}


def _through_stages(
    given: _Given,
    z: AnyArray,
    settings: _Settings,
    words: _Words,
    watch: _Watch = lambda row, step, value: None,
) -> _Row:
    """Take one row through the stages that its settings switch on, in its dialect's order."""
    dialect = rules(settings["dialect"], settings["nucleus"])
    settings = {name: _read(value, dialect.readings.get(name, ())) for name, value in settings.items()}
    row = _Row(given, z, settings, words)
    for step in dialect.steps:
        value = settings["temperature" if step.option == "greedy" else step.option]
        if value is not None:
            ties = "keep" if step.option == "top_k" and settings["ties"] == "keep" else step.ties
            if step.option == "top_p" and row.temperature == 0:
                ties = "lowest_id"  # no token equals the first of the order, which has all the mass
            row.floor = settings["min_tokens_to_keep"] if step.floor else 1
            step = step._replace(ties=ties)
            watch(row, step, value)
            _STAGES[step.option](row, value, step)
    return row


def _read(value: Any, readings: tuple[Reading, ...]) -> Any:
    """What a number means in the dialect."""
    return next((r.of(value) for r in readings if value is not None and r.low <= value <= r.high), value)


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


def _words(settings: _Settings, stream: int, draw: int) -> tuple[int, ...]:
    """A draw's random numbers, 64 bits each: the first draws, the second of draw 0 is xtc's coin."""
    if settings["uniform"] is not None:
        return int(settings["uniform"] * 2.0**64), 0
    return philox(int(settings["seed"]), stream, int(settings["position"] or 0), draw)


def _only(block: tuple[int, ...]) -> _Words:
    """These random numbers, given instead."""
    return lambda draw: block


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
    return _fitted(array, shape)


def _bias(logit_bias: Any, shape: tuple[int, ...]) -> AnyArray | None:
    """`logit_bias` in any of its forms as float32 (..., V)."""
    if logit_bias is None:
        return None
    if isinstance(logit_bias, Mapping):
        array = np.zeros(shape[-1])
        for token, value in logit_bias.items():
            array[token] = value
    else:
        array = np.asarray(logit_bias)
    return _fitted(_float32(array), shape)


def _fitted(array: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Broadcast to the shape of the logits; leading axes of length 1 that those do not have are dropped."""
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array[0]
    return np.broadcast_to(array, shape)


_DEFAULTS: _Settings = {
    "temperature": 1.0,
    "dynamic_temperature_range": None,
    "dynamic_temperature_exponent": 1.0,
    "top_n_sigma": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "xtc_probability": None,
    "xtc_threshold": 0.1,
    "xtc_special_tokens": None,
    "min_tokens_to_keep": 1,
    "allowed": None,
    "logit_bias": None,
    "ties": "lowest_id",
    "nucleus": "after_top_k",
    "dialect": None,
    "seed": None,
    "position": None,
    "uniform": None,
}


def _rows(
    logits: AnyArray,
    params: Any,
    options: _Settings,
    blocks: Sequence[tuple[int, ...]] | None = None,
    watch: _Watch = lambda row, step, value: None,
) -> list[_Row]:
    """Every row of logits (..., V), in C order, with its own settings, taken through the stages.

    blocks: the rows' random numbers, where they are not those of seed and position; good for one draw.
    """
    given = {} if params is None else {name: getattr(params, name) for name in _DEFAULTS}
    settings = {**_DEFAULTS, **given, **options}
    mask, bias = _mask(settings.pop("allowed"), logits.shape), _bias(settings.pop("logit_bias"), logits.shape)
    special = settings.pop("xtc_special_tokens")  # one list for all rows
    if settings["seed"] is None:
        settings["seed"] = secrets.randbits(64)
    one_seed = np.ndim(settings["seed"]) == 0
    lead = logits.shape[:-1]
    settings = {name: np.broadcast_to(np.asarray(value, object), lead) for name, value in settings.items()}
    rows = []
    for number, index in enumerate(np.ndindex(lead)):
        own: dict[str, Any] = {name: values[index] for name, values in settings.items()}
        own["xtc_special_tokens"] = None if special is None else sorted(special)
        row_bias = None if bias is None else bias[index]
        z = _scores(logits[index], row_bias, None if mask is None else mask[index])
        words = partial(_words, own, number if one_seed else 0) if blocks is None else _only(blocks[number])
        rows.append(_through_stages(_Given(logits[index], row_bias), z, own, words, watch))
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
        masses = row.final_weights()
        for j in range(n):
            word = row.words(j)[0] if uniform is None else int(uniform[i, j] * 2.0**64)
            tokens.append(_draw(masses, word))
            if not replacement:
                masses[tokens[-1]] = 0
    return tokens[0] if not shape else np.array(tokens, np.int64).reshape(shape)


def weights(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The whole numbers (..., V) that `sample` draws by: 0 where a token was removed.

    >>> weights([3.0, 2.0, 1.0], top_k=2) / 2**44
    array([1.        , 0.36787945, 0.        ])
    """
    array = _floats(logits)
    return _masses(array, _rows(array, params, options))


def _masses(logits: AnyArray, rows: list[_Row]) -> AnyArray:
    return np.array([row.final_weights() for row in rows], np.int64).reshape(logits.shape)


def probabilities(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The distribution (..., V) that `sample` draws from: float32, or float64 for float64 logits.

    >>> probabilities([3.0, 2.0, 1.0], temperature=0.5, top_k=2).round(4)
    array([0.8808, 0.1192, 0.    ])
    """
    array = _floats(logits)
    out = np.zeros(array.shape, np.float64 if array.dtype == np.float64 else np.float32)
    for row, target in zip(_rows(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        masses = row.final_weights()
        target[:] = masses.astype(np.float64) / float(masses.sum())
    return out


def filter_logits(logits: Any, params: Any = None, **options: Any) -> AnyArray:
    """The logits (..., V) as given, in their own dtype, -inf where a token was removed.

    With a bias they are z, the numbers that decide: float32, or float64 for float64 logits.

    >>> filter_logits([3.0, 2.0, 1.0], temperature=0.5, top_p=0.9)
    array([  3.,   2., -inf])
    """
    array = _floats(logits)
    biased = options.get("logit_bias", getattr(params, "logit_bias", None)) is not None
    narrow = biased and array.dtype != np.float64
    out = np.full(array.shape, -np.inf, np.float32 if narrow else array.dtype)
    for row, target in zip(_rows(array, params, options), out.reshape(-1, array.shape[-1]), strict=True):
        target[row.ids] = row.z if biased else row.given.logits[row.ids]
    return out
