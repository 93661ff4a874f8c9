"""What signatures say to type checkers, to help() and to editors: kinds of arrays, and every option by its name."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from numpy.typing import ArrayLike, NDArray

__all__ = ["AnyArray", "ArrayObject", "NumPyLike", "Tensor", "Unpack", "defaults_of", "shows_options"]

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack
else:  # a type checker knows Python 3.10's from typing_extensions, which need not be installed

    class Unpack:
        """What ``typing.get_type_hints`` finds: ``Unpack[Options]``."""

        __class_getitem__ = classmethod(types.GenericAlias)


class ArrayObject(Protocol):
    """An array of any library's, as far as all of them say so in their types: torch's, JAX's, MLX's, NumPy's."""

    @property
    def dtype(self) -> Any:
        """The type of its numbers."""

    @property
    def shape(self) -> Any:
        """The length of each axis."""


Tensor = TypeVar("Tensor", bound=ArrayObject)  # what goes in is what comes out
NumPyLike: TypeAlias = NDArray[Any] | Sequence[Any]  # what comes out as a NumPy array
AnyArray: TypeAlias = ArrayLike | ArrayObject

F = TypeVar("F", bound=Callable[..., Any])


def shows_options(options: type, defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Return a decorator: help(), inspect and editors show every option instead of ``**options``.

    Args:
        options: the TypedDict that the function unpacks, which says what options there are, and their types.
        defaults: the default of each option. Options are shown in this order; what is none of them is left out.

    >>> from typing import TypedDict
    >>> class Options(TypedDict, total=False):
    ...     scale: float
    >>> @shows_options(Options, {"scale": 1.0, "shift": 0.0})
    ... def scaled(x: float, **options: Unpack[Options]) -> float:
    ...     return x * options.get("scale", 1.0)
    >>> list(inspect.signature(scaled).parameters)
    ['x', 'scale']
    """
    kinds = {name: getattr(kind, "__forward_arg__", kind) for name, kind in options.__annotations__.items()}
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[name])
        for name, default in defaults.items()
        if name in kinds
    ]

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the parameters that have a default, and these defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
