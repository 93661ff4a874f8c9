"""Checks of options and shapes. Each error names the argument, what was expected, what came, and the cure."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arrays import plain, unrepeated, unwrap

Shape = tuple[int, ...]


def integer(x: Any, name: str, low: int, high: int | None = None, cure: str = "") -> int:
    """Return x as an int in [low, high]; a bool is no integer here."""
    bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        if isinstance(x, (bool, np.bool_)):
            raise TypeError
        value = operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected {bounds}, got {x!r}{cure}") from None
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {bounds}, got {value}{cure}")
    return value


def number(
    x: Any, name: str, expected: str = "a finite number", *, above: float = -math.inf, within: str = "float64"
) -> float:
    """Return x as a float greater than ``above`` that is still so, and finite, in the type ``within``."""
    if isinstance(x, (bool, np.bool_, str, bytes, complex, np.complexfloating)):
        raise TypeError(f"{name}: expected {expected}, got {x!r}")
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {x!r}") from None
    largest, smallest = float(np.finfo(within).max), float(np.finfo(within).tiny)
    if not abs(value) <= largest or value <= above or (above == 0 and value < smallest):
        range_ = f" within {within}" if math.isfinite(value) and value > above else ""
        raise ValueError(f"{name}: expected {expected}{range_}, got {value}")
    return value


def choice(x: Any, name: str, options: tuple[Any, ...]) -> None:
    """Raise unless x is one of the options."""
    if not any(x is option or (isinstance(x, str) and x == option) for option in options):
        shown = repr(x) if x is None or isinstance(x, (str, int, float)) else type(x).__name__
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown}")


def broadcast(array: NDArray[Any], shape: Shape, name: str, meaning: str, cure: str = "") -> NDArray[Any]:
    """Return a view of the array in this shape."""
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {meaning} = {shape}, got {array.shape}{cure}"
        ) from None


def batch_shape(**shapes: Shape) -> Shape:
    """Return the common shape of the arrays' leading axes."""
    try:
        alike = len(set(shapes.values())) == 1
        shape = next(iter(shapes.values())) if alike else np.broadcast_shapes(*shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(shapes)}: expected leading axes that broadcast, got {listed}") from None
    if len(shape) > 8:
        raise ValueError(f"{next(iter(shapes))}: expected at most 8 leading axes, got {len(shape)}; flatten them")
    return shape


def mask(x: Any, name: str) -> NDArray[np.bool_]:
    """Return a 0/1 mask as bool. A floating mask that is none is taken for an additive one, and refused."""
    array = plain(x, name)
    if array.dtype == np.bool_:
        return array
    shape, array = array.shape, unrepeated(array)
    if array.dtype.kind not in "iuf" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected booleans or numbers that are 0 or 1, got {array.dtype.name}")
    if array.dtype.kind not in "iu":
        array = unrepeated(unwrap(x, name).astype("float64"))
    ones = array == 1
    other = ~ones & (array != 0)
    if other.any():
        raise ValueError(
            f"{name}: expected only 0 and 1 (1 = may attend), got {array[other].flat[0]}; "
            f"numbers that are added to the scores go into bias"
        )
    if array.dtype.kind == "f" and array.size and not ones.any():
        raise ValueError(
            f"{name}: expected at least one 1 in a floating mask, got only 0, which looks like an additive mask; "
            f"numbers that are added to the scores go into bias, and a mask that forbids everything is one of bool"
        )
    return np.broadcast_to(ones, shape)


def integers(x: Any, name: str, low: int, high: int) -> NDArray[np.int64]:
    """Return an array of integers in [low, high] as int64: a copy, in which what was checked cannot change."""
    array = plain(x, name)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name}: expected integers, got {array.dtype.name}")
    shape, array = array.shape, unrepeated(array).copy()
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        index = tuple(map(int, np.argwhere((array < low) | (array > high))[0]))
        place = f" at {index[0] if len(index) == 1 else index}" if index else ""
        raise ValueError(f"{name}: expected integers from {low} to {high}, got {array[index]}{place}")
    return np.broadcast_to(array.astype(np.int64, copy=False), shape)
