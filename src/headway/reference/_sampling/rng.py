"""Random words of 64 bits, and the draw of a token with one of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .masses import AnyArray


def philox(seed: int, stream: int, position: int, draw: int = 0) -> tuple[int, int, int, int]:
    """Return four random words: Philox4x64-10 (Salmon et al. 2011, "As easy as 1, 2, 3").

    `numpy.random.Philox(key=[seed, stream], counter=position - 1)` begins with those of draw 0: NumPy counts up first.

    Args:
        seed: a whole number below 2^64.
        stream: a whole number below 2^64, such as the number of a row.
        position: a whole number below 2^64, such as the number of a step.
        draw: a whole number below 2^64, which of several draws at the position.

    Returns:
        Four whole numbers below 2^64.

    >>> from headway import reference
    >>> hex(reference.philox(0, 0, 0)[0])
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


def words_of(settings: dict[str, Any], stream: int, draw: int) -> tuple[int, ...]:
    """A draw's random numbers, 64 bits each: the first draws, the second of draw 0 is xtc's coin."""
    if settings["uniform"] is not None:
        return int(settings["uniform"] * 2.0**64), 0
    return philox(int(settings["seed"]), stream, int(settings["position"] or 0), draw)


def draw_from(masses: AnyArray, word: int) -> int:
    """The token whose interval of the running sum, in id order, holds word / 2^64 of the total."""
    running = np.cumsum(masses)
    target = word * int(running[-1]) >> 64
    return int(np.searchsorted(running, target, side="right"))
