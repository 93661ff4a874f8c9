"""Checks of calls, options, shapes and files. Each error names the argument, what was expected, what came, the cure."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from ._arrays import TOO_LARGE, TRACED, Traced, dtype_name, held, hide_from_dynamo, plain, unrepeated, unwrap

Shape = tuple[int, ...]
F = TypeVar("F", bound=Callable[..., Any])


def public(face: F) -> F:
    """Make a function or a class part of the library's face: arguments that it does not have get an error of ours."""
    if isinstance(face, type):
        face.__init__ = public(face.__init__)  # type: ignore[misc]
        return cast(F, face)

    @functools.wraps(face)
    def call(*args: Any, **kwargs: Any) -> Any:
        hide_from_dynamo()
        try:
            return face(*args, **kwargs)
        except TypeError as error:
            misfit = _misfit(inspect.signature(face), args, kwargs)
            traced = error if isinstance(error, Traced) else None
            if misfit is None and traced is None:
                raise
        if misfit is None and traced is not None and traced.library in TRACED:
            result = TRACED[traced.library](face, args, kwargs)
            if result is not NotImplemented:
                return result
        raise TypeError(misfit or str(traced))

    return cast(F, call)


def one_at_a_time(message: str) -> Callable[[F], F]:
    """Return a decorator of methods: while one of them runs, others of the same object are a RuntimeError.

    A lock that Python code takes would not do: a signal that comes between the taking and the code that gives it back
    would leave the object taken for ever. Here every call owns what it takes, and looks at its end whether it did.

    >>> class Counter:
    ...     @one_at_a_time("Counter: another call is under way")
    ...     def add(self, once_more: bool) -> None:
    ...         if once_more:
    ...             self.add(False)
    >>> Counter().add(False)
    >>> Counter().add(True)
    Traceback (most recent call last):
    RuntimeError: Counter: another call is under way
    """

    def decorate(method: F) -> F:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            state, own = self.__dict__, object()
            try:
                if state.setdefault("_turn", own) is not own:
                    raise RuntimeError(message)
                return method(self, *args, **kwargs)
            finally:
                # No function is called here: where one returns, the handler of a signal may run, and raise.
                if "_turn" in state and state["_turn"] is own:
                    del state["_turn"]

        return cast(F, call)

    return decorate


def _misfit(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Say which argument of a call is none of the function's, or missing."""
    parameters = {name: p for name, p in signature.parameters.items() if name != "self"}
    kinds = {p.kind for p in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        for name in kwargs:
            if name not in parameters:
                return no_such(name, kwargs[name], "option", parameters)
    places = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    count = len(args) - ("self" in signature.parameters)
    if count > len(places):
        last = places[-1] if places else "arguments"
        return f"{last}: expected as the last argument without a name, got more; give the others by name"
    given = places[:count]
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            continue
        if name in given and name in kwargs:
            return f"{name}: expected one argument, got two, one by its place and one by its name"
        if name not in given and name not in kwargs and parameter.default is parameter.empty:
            return f"{name}: expected an argument, got none"
    return None


_PENALTIES = ("repetition", "frequency", "presence", "dry_multiplier", "dry_base", "dry_allowed_length")


def no_such(name: str, value: Any, what: str, known: Iterable[str]) -> str:
    """Say that there is no such option, which one was meant, and which there are."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    stem = name.removesuffix("_penalty").replace("repeat", "repetition")
    if stem in _PENALTIES and stem not in known:
        call = f"hw.penalize(logits, token_ids, {stem}={shown(value)})"
        hint = f"; penalties are options of penalize and Sampler.admit, `{call}`"
    return f"{name}: no such {what}; expected one of {', '.join(known)}{hint}"


def shown(value: Any) -> str:
    """Return a value as an error message shows it: a number or a string itself, of all else the kind."""
    if isinstance(value, (np.timedelta64, np.datetime64)):
        return repr(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str) and len(value) > 60:
        return f"a string of {len(value)} characters"
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    if type(value) is tuple and len(value) <= 4 and all(type(item) in (int, float, NoneType) for item in value):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "dict"
    dtype = dtype_name(value)
    return f"{type(value).__name__} of {dtype}" if dtype else type(value).__name__


def integer(x: Any, name: str, low: int, high: int | None = None, cure: str = "") -> int:
    """Return x as an int in [low, high]; a bool is no integer here."""
    bounds = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        if isinstance(x, bool) or dtype_name(x).startswith("bool"):
            raise TypeError
        value = operator.index(x)
    except Exception:  # what other libraries' arrays raise is theirs to choose
        if dtype_name(x):
            plain(x, name)  # an array that cannot be read at all has an error and a cure of its own
        raise TypeError(f"{name}: expected {bounds}, got {shown(x)}{cure}") from None
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {bounds}, got {shown(value)}{cure}")
    return value


_RANGE = {kind: (float(np.finfo(kind).max), float(np.finfo(kind).tiny)) for kind in ("float64", "float32")}


def number(
    x: Any, name: str, expected: str = "a finite number", *, above: float = -math.inf, within: str = "float64"
) -> float:
    """Return x as a float greater than ``above`` that is still so, and finite, in the type ``within``."""
    given = x
    if not isinstance(x, (float, int, np.generic)) and dtype_name(x):
        array = unwrap(x, name).astype("float64")
        x = array if array.ndim else float(array)
    try:
        if isinstance(x, (bool, np.bool_, str, bytes, complex, np.ndarray)):
            raise TypeError
        value = float(x)
    except OverflowError:
        value = math.inf if given > 0 else -math.inf
    except Exception:
        raise TypeError(f"{name}: expected {expected}, got {shown(given)}") from None
    largest, smallest = _RANGE[within]
    if not abs(value) <= largest or value <= above or (above == 0 and value < smallest):
        range_ = f" within {within}" if math.isfinite(value) and value > above else ""
        raise ValueError(f"{name}: expected {expected}{range_}, got {value}")
    return value


def choice(x: Any, name: str, options: tuple[Any, ...]) -> None:
    """Raise unless x is one of the options."""
    if type(x) is str and x in options:
        return
    if not any(x is option or (isinstance(x, str) and x == option) for option in options):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {shown(x)}{meant(x, options)}")


def meant(x: Any, words: Iterable[Any]) -> str:
    """Return which of the words may be meant by another one, as the end of an error message."""
    if not isinstance(x, str):
        return ""
    near = difflib.get_close_matches(x.lower(), [word for word in words if isinstance(word, str)], 1)
    return f"; did you mean {near[0]!r}?" if near else ""


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


def boolean(x: Any, name: str) -> bool:
    """Return x, True or False, as Python's own."""
    if not isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {shown(x)}")
    return bool(x)


def mask(x: Any, name: str) -> NDArray[np.bool_]:
    """Return a 0/1 mask as bool. A floating mask that is none is taken for an additive one, and refused."""
    array, dtype = plain(x, name)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: expected booleans or numbers that are 0 or 1, got {held(array, dtype)}")
    shape, array = array.shape, unrepeated(array)
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


def whole(x: Any, name: str, expected: str = "integers") -> NDArray[np.integer[Any]]:
    """Return an array of integers as it is; a list or an array without items counts as one of integers."""
    array, dtype = plain(x, name)
    if array.dtype.kind not in "iu" and array.size:
        got = held(array, dtype)
        if got == TOO_LARGE:
            raise ValueError(f"{name}: expected {expected} below 2^63, got {got}")
        raise TypeError(f"{name}: expected {expected}, got {got}")
    return array if array.dtype.kind in "iu" else array.astype(np.int64)


def integers(x: Any, name: str, low: int, high: int) -> NDArray[np.int64]:
    """Return an array of integers in [low, high] as int64: a copy, in which what was checked cannot change."""
    array = whole(x, name)
    if array.size == 1 and low <= array.item() <= high:  # the common case of one token
        return array.astype(np.int64)
    shape, array = array.shape, unrepeated(array).copy()
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        index = tuple(map(int, np.argwhere((array < low) | (array > high))[0]))
        place = f" at {index[0] if len(index) == 1 else index}" if index else ""
        raise ValueError(f"{name}: expected integers from {low} to {high}, got {array[index]}{place}")
    return np.broadcast_to(array.astype(np.int64, copy=False), shape)


def shortened(word: str, columns: int) -> str:
    """Quote a word, and cut it where it is too wide; no word stays none."""
    if not word:
        return ""
    quoted = repr(word)
    if columns_of(quoted) <= columns:
        return quoted
    while columns_of(quoted) > columns - 1:
        quoted = quoted[:-1]
    return quoted + "\N{HORIZONTAL ELLIPSIS}"


def columns_of(text: str) -> int:
    """How wide a terminal shows it."""
    return sum((unicodedata.east_asian_width(c) in "WF") + (unicodedata.combining(c) == 0) for c in text)


def json_loads(data: bytes) -> Any:
    """Return what JSON says; a key that an object holds twice is a ValueError, since one of its values would be lost.

    >>> json_loads(b'{"q": [1, 0]}')
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
