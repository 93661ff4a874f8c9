"""What options of sampling may be, kind by kind, and the form in which the kernel takes them.

A check takes the option's name, its value, and what numbers mean in the dialect; it returns None for an option that is
off, else an array or a string.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .. import _arrays
from .._check import meant, shown
from .rows import Array

_LARGEST: dict[Any, int] = {np.int64: 2**63 - 1, np.uint64: 2**64 - 1}


class Reading(NamedTuple):
    """Numbers from low to high mean `means`. The first reading that fits counts.

    "itself": the library takes them as they are, where headway does not. None: it refuses them, and `cure` says what to
    do.
    """

    low: float
    high: float
    means: float | Literal["itself"] | None
    cure: str = ""

    def of(self, number: float) -> float | None:
        """Return what a number that fits means, None where it is refused."""
        return number if self.means == "itself" else self.means


Check = Callable[[str, Any, tuple[Reading, ...]], Any]


class Sparse(NamedTuple):
    ids: Array
    values: Array


@dataclass(frozen=True)
class Reals:
    """What a real-valued option may be."""

    expected: str
    cure: str
    holds: Callable[[Any], Any]
    optional: bool = True  # None switches it off

    def __call__(self, name: str, value: Any, readings: tuple[Reading, ...] = ()) -> Array | None:
        if value is None and self.optional:
            return None
        if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
            reading = _reading(value, readings)
            means = value if reading is None else reading.of(value)
            too_large = means is not None and sys.float_info.max < abs(means) < math.inf
            if means is None or too_large or (reading is None and not self.holds(value)):
                raise self._out_of_range(name, value, readings)
            return np.array(means, np.float64)
        if value is None or isinstance(value, (str, bool, np.bool_, complex)):
            raise TypeError(f"{name}: expected {self.expected}, or an array of them, got {shown(value)}")
        if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype.kind == "O"):
            listed = value if isinstance(value, np.ndarray) else np.array(_arrays.readable(value, name), object)
            value = self._each(name, listed)
        array = _arrays.unwrap(value, name).astype("float64").copy()  # in which what is checked here cannot change
        holds, out = self.holds(array), array
        for reading in reversed(readings):
            fits = (array >= reading.low) & (array <= reading.high)
            holds = np.where(fits, reading.means is not None, holds)
            if reading.means is not None:
                out = np.where(fits, array if reading.means == "itself" else np.float64(reading.means), out)
        if not holds.all():
            index, bad = _first(array, ~holds)
            raise self._out_of_range(f"{name}{_place(index)}", bad, readings)
        return out

    def _out_of_range(self, name: str, value: Any, readings: tuple[Reading, ...]) -> ValueError:
        expected, cure = self.expected, self.cure
        refused = next((reading for reading in readings if reading.means is None), None)
        if refused is not None:  # of which the usual cure may be one
            cure = refused.cure
            if refused.low <= value <= refused.high:
                expected = "a number that the dialect takes"
        return ValueError(f"{name}: expected {expected}, got {shown(value)}; {cure}")

    def _each(self, name: str, items: Array) -> Array:
        """Return Python numbers as floats, one by one, so that an error names the place of what is none."""
        out = np.empty(items.shape)
        for index, item in np.ndenumerate(items):
            if isinstance(item, (bool, np.bool_, str)) or item is None or np.ndim(item):
                raise TypeError(f"{name}{_place(index)}: expected {self.expected}, got {shown(item)}; {self.cure}")
            if isinstance(item, int):
                out[index] = item if abs(item) <= sys.float_info.max else math.inf if item > 0 else -math.inf
            else:
                out[index] = _arrays.unwrap(item, f"{name}{_place(index)}").astype("float64")
        return out


@dataclass(frozen=True)
class Integers:
    """What a whole-numbered option may be, and the kernel's type for it."""

    expected: str
    cure: str
    least: int
    dtype: type[np.integer[Any]]
    clip: bool = False  # a larger number than the type holds means no more than its largest
    optional: bool = True  # None switches it off
    other_kind: type[Exception] = TypeError  # what is raised for what is no integer

    def __call__(self, name: str, value: Any, readings: tuple[Reading, ...] = ()) -> Array | None:
        if value is None and self.optional:
            return None
        if _whole(value):
            return np.array(self._in_range(name, value, (), readings), self.dtype)
        if value is None or isinstance(value, (str, bool)):
            raise self.other_kind(self._message(name, value, ()))
        if isinstance(value, (list, tuple)):  # as objects, so that no number above 2^63 becomes a float on the way
            array = np.array(_arrays.readable(value, name), object)
        else:
            array = _arrays.plain(value, name)[0].copy()  # in which what is checked here cannot change
        whole = array.dtype.kind in "iu" and array.size
        if whole and array.min() >= self.least and int(array.max()) <= _LARGEST[self.dtype]:
            return array.astype(self.dtype)
        out = np.empty(array.shape, self.dtype)
        for index, item in np.ndenumerate(array):
            out[index] = self.one(name, item, index, readings)
        return out

    def one(self, name: str, value: Any, index: tuple[int, ...], readings: tuple[Reading, ...] = ()) -> int:
        if not _whole(value):
            raise self.other_kind(self._message(name, value, index))
        return self._in_range(name, value, index, readings)

    def _in_range(self, name: str, value: Any, index: tuple[int, ...], readings: tuple[Reading, ...]) -> int:
        largest = _LARGEST[self.dtype]
        reading = _reading(value, readings) if readings else None
        means = None if reading is None else reading.of(value)
        if means is not None:
            return largest if means == math.inf else int(means)
        if value < self.least or (value > largest and not self.clip):
            raise ValueError(self._message(name, value, index))
        return min(int(value), largest)

    def _message(self, name: str, value: Any, index: tuple[int, ...]) -> str:
        return f"{name}{_place(index)}: expected {self.expected}, got {shown(value)}; {self.cure}"


def _whole(value: Any) -> bool:
    """Whether it is an integer; to NumPy, durations are."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.timedelta64))


def _reading(value: float, readings: tuple[Reading, ...]) -> Reading | None:
    return next((reading for reading in readings if reading.low <= value <= reading.high), None)


@dataclass(frozen=True)
class Choice:
    """Which words an option may be; None, where it is one of them, is headway's own way."""

    choices: tuple[str | None, ...]

    def __call__(self, name: str, value: Any, readings: tuple[Reading, ...] = ()) -> str | None:
        if (value is not None and not isinstance(value, str)) or value not in self.choices:
            expected = " or ".join(map(repr, self.choices))
            raise ValueError(f"{name}: expected {expected}, got {shown(value)}{meant(value, self.choices)}")
        return value


_BOOLEANS = {bool, np.bool_}


def allowed(name: str, value: Any, readings: tuple[Reading, ...] = ()) -> Array | None:
    """None, or an array whose dtype says what it is: bool a mask, uint32 a packed one, int64 ids."""
    if value is None:
        return None
    if isinstance(value, (set, frozenset)):
        value = list(value)
    cure = ""
    if isinstance(value, (list, tuple)):
        value = _arrays.items(value, name)
        kinds = set(map(type, value))
        if kinds & _BOOLEANS and kinds - _BOOLEANS:  # NumPy would take True for 1
            raise TypeError(f"{name}: expected a mask of booleans, or ids, got a mixture; give one of them")
        if kinds & {list, tuple, set, frozenset, range}:
            cure = f"; for ids of each row pass `[[token in ids for token in range(V)] for ids in {name}]`"
    array = np.array(None)
    if not isinstance(value, (str, Mapping)):
        try:
            array, _ = _arrays.plain(value, name)
        except ValueError as error:
            if error.__cause__ is None:  # lists that are nested too deeply
                raise
            raise ValueError(
                f"{name}: expected a mask, or a flat list of ids, got lists of unequal lengths{cure}"
            ) from error
    if isinstance(value, (list, tuple)) and not array.size:
        array = array.astype(np.int64)
    if array.dtype == np.int32 and array.ndim:
        return array.view(np.uint32)
    if array.dtype in (np.bool_, np.uint32) and array.ndim:
        return array
    if array.dtype == np.int64 and array.ndim == 1:
        return array.copy()  # in which what is checked later cannot change
    if not cure and array.ndim and array.dtype.kind in "iuf" and array.size and ((array == 0) | (array == 1)).all():
        code = f"np.asarray({name}, dtype=bool)"
        if _arrays.dtype_name(value):
            code = f"{name}.astype(bool)" if hasattr(value, "astype") else f"{name} != 0"
        cure = f"; make a mask of 0 and 1 one of bool, `{code}`"
    raise TypeError(
        f"{name}: expected a bool mask (..., V), a packed int32 mask (..., ceil(V / 32)), or a flat list of ids, got "
        f"{shown(value)}{cure}"
    )


def token_ids(name: str, value: Any, readings: tuple[Reading, ...] = ()) -> tuple[int, ...] | None:
    """None where there are none, or a tuple, which calls can compare: each id once, ascending."""
    if value is None:
        return None
    if isinstance(value, (set, frozenset)):
        value = list(value)
    ids = _IDS(name, value) if not isinstance(value, Mapping) else None
    if ids is None or ids.ndim != 1:
        raise TypeError(f"{name}: expected a list of token ids, got {shown(value)}; give [id] for a single one")
    return tuple(np.unique(ids).tolist()) or None


def logit_bias(name: str, value: Any, readings: tuple[Reading, ...] = ()) -> Array | Sparse | None:
    if value is None:
        return None
    ids: Array | None = None
    if isinstance(value, Mapping):
        keys = Integers("token ids as keys", "use a dict {id: bias}", 0, np.int64)
        ids = np.array([keys.one(name, token, ()) for token in value], np.int64)
        value = list(value.values())
    elif isinstance(value, (list, tuple)) and any(isinstance(row, Mapping) for row in _arrays.items(value, name)):
        raise TypeError(
            f"{name}: expected an array, or one dict for all rows, got a list of dicts; pass "
            f"`[[row.get(token, 0.0) for token in range(V)] for row in {name}]`"
        )
    operand = _arrays.unwrap(value, name)
    with np.errstate(over="ignore"):
        array = operand.astype("float32")
    if operand.dtype == "float64":  # what is too low for float32 is no ban
        array = np.where((array == -np.inf) & (operand.data > -np.inf), np.finfo(np.float32).min, array)
    if ids is not None and array.ndim != 1:
        raise ValueError(f"{name}: expected a dict {{id: bias}}, one number for each id, got shape {array.shape[1:]}")
    if array.size and not array.max() < np.inf:  # NaN too
        index, bad = _first(array, ~(array < np.inf))
        place = _place(index) if ids is None else f"[{ids[index]}]"
        raise ValueError(f"{name}{place}: expected a finite number within float32, or -inf, got {bad}")
    return array if ids is None else Sparse(ids, array)


_IDS = Integers("token ids", "an id is an integer from 0 to V - 1", 0, np.int64, optional=False)


def _first(array: Array, wrong: Array) -> tuple[tuple[int, ...], Any]:
    # Not argwhere, which finds nothing where another thread has mended the caller's array in between.
    index = tuple(map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
    return index, array[index].item()


def _place(index: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, index))}]" if index else ""
