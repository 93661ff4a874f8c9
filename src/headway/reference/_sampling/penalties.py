"""Penalties: lower logits for the tokens of a history."""

from __future__ import annotations

from typing import Any

import numpy as np

from .masses import FLT_MAX, AnyArray, floats

DBL_MAX = float(np.finfo(np.float64).max)


def penalize(
    logits: Any,
    token_ids: Any,
    *,
    lengths: Any = None,
    prompt_lengths: Any = 0,
    unknown_tokens: str = "error",
    dry_breakers: Any = (),
    **options: Any,
) -> AnyArray:
    """Lower logits for the tokens of each row's history, and for those that would go on repeating it.

    Args:
        logits: (..., V).
        token_ids: of each row, in a list or an array nested as the leading axes are, the oldest first.
        lengths: (...), how many tokens of each row count; None is all.
        prompt_lengths: (...) or one for all rows: how many are the prompt, which frequency and presence do not count.
        unknown_tokens: "error", or "ignore", which leaves ids without a logit out of the history.
        dry_breakers: ids that no repetition goes across.
        **options: the penalties of `headway.penalize`.

    Returns:
        (..., V), float32, or float64 for float64 logits.

    Raises:
        ValueError: an id without a logit where a penalty looks, unless unknown_tokens is "ignore".

    >>> from headway import reference
    >>> reference.penalize([2.0, 1.0, -1.0, 0.0], [0, 2, 0], repetition=2.0)
    array([ 1.,  1., -2.,  0.])
    """
    array = floats(logits)
    lead, V = array.shape[:-1], array.shape[-1]
    length = None if lengths is None else np.broadcast_to(np.asarray(lengths), lead)
    prompt_length = np.broadcast_to(np.asarray(prompt_lengths), lead)
    per_row: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(value, object), lead) for name, value in options.items()
    }
    out = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    for index in np.ndindex(lead):
        row = token_ids
        for i in index:
            row = row[i]
        row = [int(token) for token in row][: None if length is None else int(length[index])]
        start = int(prompt_length[index])
        known = [0 <= token < V for token in row]
        history = [token for token, counts in zip(row, known, strict=True) if counts]
        own = {name: values[index] for name, values in per_row.items()}
        of_all = own.get("repetition", 1) != 1 or own.get("dry_multiplier", 0) > 0
        of_output = own.get("frequency", 0) != 0 or own.get("presence", 0) != 0
        looked_at = known if of_all else known[start:] if of_output else []
        if unknown_tokens == "error" and not all(looked_at):
            raise ValueError("token_ids: an id without a logit")
        _penalize_row(out[index], history, sum(known[:start]), {int(token) for token in dry_breakers}, **own)
    return out


def _penalize_row(
    z: AnyArray,
    history: list[int],
    prompt: int,
    breakers: set[int],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    dry_multiplier: float = 0.0,
    dry_base: float = 1.75,
    dry_allowed_length: int = 2,
    window: int | None = None,
    repetition_window: int | None = None,
    frequency_window: int | None = None,
    dry_window: int | None = None,
) -> None:
    """Penalize z (V,) in place; `prompt` is how many tokens of the history are its prompt."""

    def last(own: int | None, on: bool, start: int = 0) -> list[int]:
        """What of the history, from `start` on, one kind of penalty is about."""
        size = own if own is not None else window if window is not None else len(history)
        return history[max(start, len(history) - int(size)) :] if on else []

    of_repetition = last(repetition_window, repetition != 1)
    of_frequency = last(frequency_window, frequency != 0 or presence != 0, prompt)
    of_dry = last(dry_window, dry_multiplier > 0)
    repeated = _repeats(of_dry, breakers)
    with np.errstate(over="ignore", invalid="ignore"):
        for token in {*of_repetition, *of_frequency, *of_dry}:
            given = new = np.float64(z[token])
            if token in of_repetition:
                new = new / np.float64(repetition) if new > 0 else new * np.float64(repetition)
            if token in of_frequency:
                new = new - np.float64(of_frequency.count(token)) * np.float64(frequency) - np.float64(presence)
            length = repeated.get(token, 0)
            if length >= dry_allowed_length:
                penalty = np.float64(dry_multiplier)
                for _ in range(length - int(dry_allowed_length)):
                    penalty = penalty * np.float64(dry_base)
                new = new - min(penalty, DBL_MAX)
            largest = FLT_MAX if abs(given) <= FLT_MAX else DBL_MAX
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
