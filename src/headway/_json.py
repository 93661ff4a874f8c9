"""JSON from files, in which no key may stand twice."""

from __future__ import annotations

import json
from typing import Any


def loads(data: bytes) -> Any:
    """Parse JSON; a key that an object holds twice is a ValueError, since one of its values would be lost unseen.

    >>> loads(b'{"q": [1, 0]}')
    {'q': [1, 0]}
    """
    return json.loads(data, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"expected each key once, got {twice[:40]!r} twice")
    return found
