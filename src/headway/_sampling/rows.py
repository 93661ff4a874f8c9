"""How options spread over the rows of logits, and how an error says which row it means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .._signatures import AnyArray

Array = NDArray[Any]


def broadcast(name: str, array: Array, shape: tuple[int, ...], given: tuple[int, ...] | None = None) -> Array:
    """Return an array in this shape; an error shows the shape that was given, if that is another than the array's."""
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {given or array.shape}") from None


def known_ids(
    name: str, ids: Array, vocabulary: int, axes: int = 0, counts: Array | None = None, cure: str = ""
) -> Array:
    """Return token ids that are all of the vocabulary.

    axes: how many leading axes say in which row one is that is not. counts: of the shape of ids, which are looked at.
    """
    if not ids.size or (counts is None and 0 <= ids.min() <= ids.max() < vocabulary):
        return ids
    wrong = (ids < 0) | (ids >= vocabulary)
    if counts is not None:
        wrong &= counts
    if wrong.any():
        at = int(np.flatnonzero(wrong)[0])
        where = in_row(at // math.prod(ids.shape[axes:]), ids.shape[:axes])
        raise ValueError(f"{name}: expected ids from 0 to {vocabulary - 1}, got {ids.flat[at]}{where}{cure}")
    return ids


def lengths_within(name: str, given: AnyArray, lead: tuple[int, ...], held: Array, of: str) -> Array:
    """Return how many of the tokens that `of` holds in each row count, (rows,): a copy."""
    length = broadcast(name, _check.integers(given, name, -(2**63), 2**63 - 1), lead).reshape(-1)
    wrong = (length < 0) | (length > held)
    if wrong.any():
        row = int(wrong.nonzero()[0][0])
        raise ValueError(
            f"{name}: expected integers from 0 to {held[row]}, the tokens that {of} has{in_row(row, lead)}, got "
            f"{length[row]}"
        )
    return np.ascontiguousarray(length)


def over_rows(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return an array (..., n) in this shape, without leading axes of length 1 that this does not have."""
    own = array
    while own.ndim > len(shape) and own.shape[0] == 1:
        own = own[0]
    return broadcast(name, own, shape, array.shape)


def per_token(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return an array of one number for each token, (..., V), in this shape."""
    if array.shape[-1:] != shape[-1:]:
        raise ValueError(f"{name}: expected a last axis of {shape[-1]}, one for each token, got shape {array.shape}")
    return over_rows(name, array, shape)


def mask_bytes(name: str, allowed: Array, shape: tuple[int, ...]) -> tuple[Array, bool]:
    """Return what `allowed` came to for logits of this shape as bytes, and whether each holds eight tokens."""
    *lead, vocabulary = shape
    if allowed.dtype == np.int64:
        mask = np.zeros(vocabulary, np.uint8)
        mask[known_ids(name, allowed, vocabulary)] = 1
        return per_token(name, mask, shape), False
    if allowed.dtype == np.bool_:
        return per_token(name, allowed.view(np.uint8), shape), False
    words = -(-vocabulary // 32)
    if allowed.ndim == 0 or allowed.shape[-1] != words:
        raise ValueError(
            f"{name}: expected a packed mask of {words} 32-bit words for {vocabulary} tokens, got shape "
            f"{allowed.shape}; make it for the tokens that logits have, which may be more than those of a tokenizer; "
            "int32 and uint32 arrays are always such masks: give ids as a list or an int64 array"
        )
    over_rows(name, allowed, (*lead, words))  # an error says the shape in words, as it was given
    return over_rows(name, np.ascontiguousarray(allowed).view(np.uint8), (*lead, 4 * words)), True


def unpacked(packed: Array, vocabulary: int) -> Array:
    """Return a packed mask, bytes of eight tokens, as bool (..., V)."""
    return np.unpackbits(packed, axis=-1, count=vocabulary, bitorder="little").view(np.bool_)


def with_n(lead: tuple[int, ...]) -> str:
    """Return the shape (..., n) as an error message says it."""
    return f"({', '.join([*map(str, lead), 'n'])}{'' if lead else ','})"


def flat(array: Array) -> Array:
    """Return (..., n) as (rows, n)."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


def in_row(row: int, lead: tuple[int, ...]) -> str:
    """Return where in the leading axes a row stands, as an error message says it."""
    if not lead:
        return ""
    index = tuple(map(int, np.unravel_index(row, lead)))
    return f" in row {index[0] if len(index) == 1 else index}"
