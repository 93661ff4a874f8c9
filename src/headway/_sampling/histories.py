"""The tokens of rows so far, and what the kernel of penalties has counted of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np

import headway._native as _native

from .rows import Array


class Histories:
    """The tokens of rows, and what the kernel has counted of them. A row has a slot, and places in the long arrays.

    first, room, length (slots,): where a row's places begin, how many they are, how many hold tokens.
    prompt (slots,): how many of its tokens, the first ones, frequency and presence do not count.
    tokens, breaks (places,): the tokens, a row's oldest first, and which of them are breakers.
    counted, distinct (slots,); id, times, same, logit (places,): the kernel's own, `kernels.h` says what.
    """

    def __init__(self, tokens: Array, breaks: Array, length: Array, prompt: Array) -> None:
        """Begin with rows of tokens (rows, n), of which the first length (rows,) count."""
        rows, n = tokens.shape
        self.first, self.room, self.length, self.prompt = n * np.arange(rows), np.full(rows, n), length, prompt
        self.counted, self.distinct = np.zeros((2, rows), np.int64)
        self.tokens, self.breaks = tokens.reshape(-1), breaks.reshape(-1).view(np.uint8)
        self.id, self.same = (np.empty(tokens.size, np.int64) for _ in range(2))
        self.times = np.empty((tokens.size, _native.PENALTY_KINDS), np.int64)
        self.logit = np.empty(tokens.size, np.float64)
        self._used = tokens.size
        self._left: dict[int, list[int]] = {}  # by how many they are: the first of places that rows have left
        self._slots: list[int] = []  # that rows have left

    def admit(self, tokens: Array, breaks: Array, prompt: int = 0) -> int:
        """Give a row a slot and places."""
        if not self._slots:
            used = len(self.length)
            self._replace({name: np.pad(getattr(self, name), (0, used + 1)) for name in _OF_SLOTS})
            self._slots = list(range(2 * used, used - 1, -1))
        slot, n, room = self._slots.pop(), tokens.size, _LEAST_ROOM
        while room < n:
            room *= 2
        first = self._places(room)
        self.tokens[first : first + n], self.breaks[first : first + n] = tokens, breaks
        self.first[slot], self.room[slot], self.length[slot], self.prompt[slot] = first, room, n, prompt
        self.counted[slot] = self.distinct[slot] = 0
        return slot

    def fork(self, slot: int) -> int:
        """Give a row a slot and places, with the tokens and counts of another."""
        first, n = self.first[slot], self.length[slot]
        new = self.admit(self.tokens[first : first + n], self.breaks[first : first + n], self.prompt[slot])
        to = self.first[new]
        for name in _COUNTED:
            array = getattr(self, name)
            array[to : to + n] = array[first : first + n]
        self.distinct[new], self.counted[new] = self.distinct[slot], self.counted[slot]
        return new

    def retire(self, slot: int) -> None:
        """Take a row's slot and places back."""
        self._left.setdefault(int(self.room[slot]), []).append(int(self.first[slot]))
        self._slots.append(slot)

    def ahead(self, slots: Array) -> Histories:
        """Return histories that go on from these, for tokens that may yet be refused. The places are shared.

        What is counted of these rows is theirs from now on: if they are dropped, the rows are counted anew.
        """
        ahead = copy.copy(self)
        for name in _OF_SLOTS:
            setattr(ahead, name, getattr(self, name).copy())
        ahead._left = {room: list(places) for room, places in self._left.items()}
        ahead._slots = list(self._slots)
        self.counted[slots] = 0
        return ahead

    def beside(self) -> Histories:
        """Return the same histories, with memory of their own for the logits that penalties change."""
        beside = copy.copy(self)
        beside.logit = np.empty_like(self.logit)
        return beside

    def write(self, slots: Array, tokens: Array, breaks: Array) -> None:
        """Put one token behind those of each of these rows, where it counts once `length` says so.

        A row that is full moves to where there is twice the room.
        """
        for slot in slots[self.length[slots] == self.room[slots]].tolist():
            old, room = int(self.first[slot]), int(self.room[slot])
            new = self._places(2 * room)
            for name in _OF_PLACES:
                getattr(self, name)[new : new + room] = getattr(self, name)[old : old + room]
            self.first[slot], self.room[slot] = new, 2 * room
            self._left.setdefault(room, []).append(old)
        at = self.first[slots] + self.length[slots]
        self.tokens[at], self.breaks[at] = tokens, breaks

    def tokens_of(self, slot: int) -> Array:
        """Return a row's tokens where they lie."""
        first = self.first[slot]
        return self.tokens[first : first + self.length[slot]]

    def penalize(self, data: Array, slots: Array, settings: Mapping[str, Array]) -> None:
        """Find the logits that penalties change in data (rows, V), the settings (rows,)."""
        _native.penalize(data, self.of(slots), **settings)

    def of(self, slots: Array) -> _native.Histories:
        """Return these rows as the kernels take them."""
        return _native.Histories(
            slot=slots,
            first=self.first,
            length=self.length,
            prompt=self.prompt,
            tokens=self.tokens,
            breakers=self.breaks,
            counted=self.counted,
            distinct=self.distinct,
            id=self.id,
            times=self.times,
            same=self.same,
            logit=self.logit,
        )

    def _places(self, room: int) -> int:
        """Return the first of so many places that no row has."""
        if self._left.get(room):
            return self._left[room].pop()
        first, self._used = self._used, self._used + room
        if self._used > self.tokens.size:
            more = max(self._used, 2 * self.tokens.size) - self.tokens.size
            held = {name: getattr(self, name) for name in _OF_PLACES}
            self._replace({k: np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)]) for k, x in held.items()})
        return first

    def _replace(self, arrays: dict[str, Array]) -> None:
        """Replace arrays by longer ones, in one step: a signal finds all of them replaced, or none."""
        self.__dict__.update(arrays)


_LEAST_ROOM = 64
_OF_SLOTS = ("first", "room", "length", "prompt", "counted", "distinct")
_COUNTED = ("id", "times", "same")
_OF_PLACES = ("tokens", "breaks", *_COUNTED, "logit")
