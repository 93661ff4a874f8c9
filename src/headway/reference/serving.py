"""Around the draw, in plain NumPy and whole numbers: penalties, log-probabilities, speculative sampling, a sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sampling import _floats

AnyArray = NDArray[Any]

# Penalties --------------------------------------------------------------------------------------------------------

_LARGEST = {name: float(np.finfo(name).max) for name in ("float64", "float32", "float16")}


def penalize(logits: Any, token_ids: Any, *, lengths: Any = None, dry_breakers: Any = (), **options: Any) -> AnyArray:
    """Lower logits (..., V) for the tokens of each row's history, and for those that would go on repeating it.

    >>> penalize([2.0, 1.0, -1.0, 0.0], [0, 2, 0], repetition=2.0)
    array([ 1.,  1., -2.,  0.])
    """
    array = _floats(logits)
    lead = array.shape[:-1]
    length = None if lengths is None else np.broadcast_to(np.asarray(lengths), lead)
    per_row: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(value, object), lead) for name, value in options.items()
    }
    out = np.array(array)
    for index in np.ndindex(lead):
        history = token_ids
        for i in index:
            history = history[i]
        history = [int(token) for token in history][: None if length is None else int(length[index])]
        own = {name: values[index] for name, values in per_row.items()}
        _penalize_row(out[index], history, {int(token) for token in dry_breakers}, **own)
    return out


def _penalize_row(
    z: AnyArray,
    history: list[int],
    breakers: set[int],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    window: int | None = None,
    dry_multiplier: float = 0.0,
    dry_base: float = 1.75,
    dry_allowed_length: int = 2,
) -> None:
    if window is not None:
        history = history[-int(window) :]
    repeated = _repeats(history, breakers)
    largest = _LARGEST.get(z.dtype.name, float.fromhex("0x1.fep+127"))  # else bfloat16's
    with np.errstate(over="ignore", invalid="ignore"):
        for token in set(history):
            given = np.float64(z[token])
            new = given / np.float64(repetition) if given > 0 else given * np.float64(repetition)
            new = new - np.float64(history.count(token)) * np.float64(frequency) - np.float64(presence)
            length = repeated.get(token, 0)
            if dry_multiplier > 0 and length >= dry_allowed_length:
                penalty = np.float64(dry_multiplier)
                for _ in range(length - int(dry_allowed_length)):
                    penalty = penalty * np.float64(dry_base)
                new = new - min(penalty, _LARGEST["float64"])
            z[token] = min(max(new, -largest), largest) if np.isfinite(given) else new


def _repeats(history: list[int], breakers: set[int]) -> dict[int, int]:
    """For each token: the longest end of the history that it followed before, breakers in neither."""
    found: dict[int, int] = {}
    for at in range(1, len(history)):
        n = 0
        while n < at and history[at - 1 - n] == history[-1 - n] and history[-1 - n] not in breakers:
            n += 1
        if n and history[at] not in breakers:
            found[history[at]] = max(n, found.get(history[at], 0))
    return found
