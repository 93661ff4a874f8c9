"""From logits to whole-numbered masses, to the last bit: the kernels are tested for equality with this file.

A row of logits becomes a row of whole numbers, the masses, of which the largest is 2^44. Whatever follows is exact
arithmetic of integers, so that the order in which a machine adds up cannot matter. Before that there are only + - * and
comparisons, each rounded once in float32.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[Any]

FLT_MAX = float(np.finfo(np.float32).max)
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
_LOWEST_X = np.float32(-40)  # exp(-40) < 2^-57: any mass there is 0
# The same in float64, for the few numbers that need it.
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_LOG2_E_WIDE = float.fromhex("0x1.71547652b82fep+0")
_ROUND_WIDE = float.fromhex("0x1.8p+52")
_LN2_HIGH_WIDE = float.fromhex("0x1.62e42fefp-1")
_LN2_LOW_WIDE = float.fromhex("0x1.473de6af278edp-34")


def floats(logits: Any) -> AnyArray:
    """An array of floats; lists and whole numbers count as float64."""
    array = np.asarray(logits)
    return array.astype(np.float64) if array.dtype.kind in "iu" else array


def scale_bits(vocabulary: int) -> int:
    """s: the largest mass is 2^s. 2^44, or less where V of them could exceed 2^62."""
    return min(44, 62 - (vocabulary - 1).bit_length())


def _no_ban(z: AnyArray, finite: AnyArray) -> AnyArray:
    """The lowest float32 for -inf, where what it was made of is finite: what is too low for float32 is no ban."""
    return np.where((z == -np.inf) & finite, np.float32(-FLT_MAX), z)


def float32(numbers: AnyArray) -> AnyArray:
    """Numbers rounded to float32."""
    with np.errstate(over="ignore"):
        return _no_ban(numbers.astype(np.float32), numbers > -np.inf)


def biased(logits: AnyArray, bias: AnyArray | None, allowed: AnyArray | None) -> AnyArray:
    """Return z (V,) float32: logits plus bias, -inf where a token is banned, no negative zero.

    Raises:
        ValueError: an allowed token's score is NaN or +inf, or no token is left.
    """
    z = float32(logits)
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


def keys(z: AnyArray) -> AnyArray:
    """(V,) uint32 in the order of z: how a machine treats tiny floats is nothing to whole numbers."""
    bits = z.view(np.uint32)
    return np.asarray(bits ^ np.where(bits >> 31 == 1, np.uint32(0xFFFFFFFF), np.uint32(0x80000000)))


def exponents(z: AnyArray, temperature: float) -> AnyArray:
    """X float32: (z - max z) / temperature, from -40, where the mass is 0 already, to 0."""
    inverse = min(1.0 / temperature, FLT_MAX) if temperature else FLT_MAX
    inverse = 0.0 if inverse < _FLT_MIN else inverse
    with np.errstate(over="ignore", under="ignore"):
        d = np.maximum(z - z.max(), np.float32(-FLT_MAX))
        return np.asarray(np.maximum(d * np.float32(inverse), _LOWEST_X))


def masses_of(x: AnyArray, s: int) -> AnyArray:
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


def least_mass(p: float, total: int, equal: bool = True) -> int:
    """The smallest whole number >= p * total, exactly; > p * total where equal is False."""
    numerator, denominator = float(p).as_integer_ratio()
    return -(-numerator * total // denominator) if equal else numerator * total // denominator + 1


def log(v: float) -> float:
    """Return ln v of a normal number, in float64 by + - * / alone: v = 2^e m with m near 1, s = (m - 1) / (m + 1).

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


def exp(y: float) -> float:
    """e^y of y <= 0, in float64 by + - * / alone: 2^n times Taylor's series of the rest; 0 below -700."""
    if y < -700:
        return 0.0
    n = (y * _LOG2_E_WIDE + _ROUND_WIDE) - _ROUND_WIDE
    r = (y - n * _LN2_HIGH_WIDE) - n * _LN2_LOW_WIDE
    series = 1.0
    for k in range(14, 0, -1):
        series = 1 + series * r / k
    return math.ldexp(series, int(n))


def power(share: float, exponent: float) -> float:
    """A share, from 0 to 1, to a power; one below the smallest normal number is 0."""
    if exponent == 0:
        return 1.0
    if share < sys.float_info.min:
        return 0.0 if exponent > 0 else math.inf
    y = exponent * log(share)
    if y <= 0:
        return exp(y)
    return 1 / exp(-y) if exp(-y) else math.inf
