"""Files that are nearly right."""

from __future__ import annotations

import random
import re


def mutated(rng: random.Random, data: bytes, pieces: tuple[bytes, ...], reach: int) -> bytes:
    """Change, remove, insert or cut bytes of the first `reach`, or put a piece in place of a word."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(reach, len(changed))))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in changed[at : at + 1])
        elif kind == 2:
            del changed[at : at + rng.randint(1, 20)]
        elif kind == 3:
            changed[at:at] = rng.choice(pieces)
        elif kind == 4:
            del changed[max(at, 1) :]
        elif words := list(re.finditer(rb"""-?[0-9.]+|"[^"]*"|'[^']*'|true|false|null""", changed[:reach])):
            word = rng.choice(words)
            changed[word.start() : word.end()] = rng.choice(pieces)
    return bytes(changed)
