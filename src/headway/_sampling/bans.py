"""Bans: which tokens a row of a Sampler may not draw next, given its tokens so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from .. import _arrays, _check
from .._check import shown
from .._signatures import AnyArray
from .rows import Array


class Bans(TypedDict, total=False):
    """The options of `Sampler.admit` that ban tokens."""

    min_tokens: int
    banned_sequences: Sequence[int | AnyArray]
    no_repeat_ngram: int | None


class RowBans(NamedTuple):
    """The bans of one row, checked."""

    stop_tokens: Array
    min_tokens: int
    sequences: tuple[Array, ...]
    ngram: int | None

    def next(self, history: Array, drawn: int) -> Array:
        """Return the ids that are banned after these tokens, of which so many are output.

        A number below 0 is a token that has no logit, and equal to no other.
        """
        banned = [self.stop_tokens] if drawn < self.min_tokens else []
        for sequence in self.sequences:
            before = sequence.size - 1
            if np.array_equal(history[history.size - before :], sequence[:-1]):
                banned.append(sequence[-1:])
        if self.ngram is not None and history.size >= self.ngram:
            before = self.ngram - 1
            repeats, end = np.ones(history.size - before, np.bool_), history[history.size - before :]
            for i in range(before):
                repeats &= history[i : i + repeats.size] == end[i]
            found = history[before:][repeats]
            banned.append(found[found >= 0])
        return np.concatenate(banned) if banned else _NONE

    def any(self) -> bool:
        """Whether any of them can ban a token."""
        return bool(self.names())

    def names(self) -> list[str]:
        """Return which of them can ban a token."""
        on = {
            "min_tokens": self.stop_tokens.size and self.min_tokens,
            "banned_sequences": self.sequences,
            "no_repeat_ngram": self.ngram,
        }
        return [name for name, given in on.items() if given]


_NONE = np.empty(0, np.int64)


def checked(
    stop_tokens: AnyArray, min_tokens: Any, banned_sequences: Any, no_repeat_ngram: Any, vocabulary: int
) -> RowBans:
    """Return the bans of a row."""
    stops = _check.integers(stop_tokens, "stop_tokens", 0, vocabulary - 1)
    if stops.ndim != 1:
        raise ValueError(f"stop_tokens: expected a list of token ids, got shape {stops.shape}")
    if not isinstance(banned_sequences, (list, tuple)):
        raise TypeError(f"banned_sequences: expected a list of lists of token ids, got {shown(banned_sequences)}")
    sequences = []
    for i, ids in enumerate(_arrays.items(banned_sequences, "banned_sequences")):
        name = f"banned_sequences[{i}]"
        sequence = np.atleast_1d(_check.integers(ids, name, 0, vocabulary - 1))
        if sequence.ndim != 1 or not sequence.size:
            raise ValueError(f"{name}: expected a token id, or a list of at least one, got shape {sequence.shape}")
        sequences.append(sequence)
    ngram = None if no_repeat_ngram is None else _check.integer(no_repeat_ngram, "no_repeat_ngram", 1)
    least = _check.integer(min_tokens, "min_tokens", 0)
    if least and not stops.size:
        raise ValueError("stop_tokens: expected the ids that min_tokens bans, got none; leave min_tokens out")
    return RowBans(stops, least, tuple(sequences), ngram)
