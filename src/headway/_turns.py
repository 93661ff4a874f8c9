"""One call of an object at a time, whatever threads meet and whatever signals interrupt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


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
