"""What headway runs on: threads, instruction set, and the numbers that the contract of bits is made of."""

from __future__ import annotations

from dataclasses import dataclass

import headway._native as _native

from . import _check

__all__ = ["Info", "get_num_threads", "info", "set_num_threads"]


@dataclass(frozen=True)
class Info:
    """What this process computes with. It differs between machines; no result does.

    Attributes:
        version: of headway.
        isa: the instruction set in use.
        isas: those that this machine can run, the best first.
        num_threads: how many threads a call may use.
        chunk_length: the number of keys that share one maximum; partial attention must be split at its multiples.
        processors: how many the process may run on.
        cpu_quota: how many processors' time its control groups (containers) allow; None where they set no limit.

    >>> import headway as hw
    >>> hw.info().isa in hw.info().isas
    True
    """

    version: str
    isa: str
    isas: tuple[str, ...]
    num_threads: int
    chunk_length: int
    processors: int
    cpu_quota: float | None


@_check.public
def info() -> Info:
    """Return what headway runs on.

    The instruction set is chosen at the first call: the best, or the one that the environment variable ``HEADWAY_ISA``
    names.

    Returns:
        An `Info`.

    Raises:
        ValueError: ``HEADWAY_ISA`` names no instruction set of this machine.

    >>> import headway as hw
    >>> hw.info().chunk_length
    512
    """
    from importlib.metadata import version  # takes longer to import than all of headway

    return Info(
        version("headway"),
        _native.isa(),
        tuple(_native.isas()),
        _native.get_num_threads(),
        _native.CHUNK,
        _native.processors(),
        _native.cpu_quota() or None,
    )


@_check.public
def get_num_threads() -> int:
    """Return how many threads a call may use.

    Returns:
        At the start ``HEADWAY_NUM_THREADS``, or the number of processors that the process may use, no more than a quota
        of its container pays for; then what `set_num_threads` said last.

    >>> import headway as hw
    >>> hw.get_num_threads() >= 1
    True
    """
    return _native.get_num_threads()


@_check.public
def set_num_threads(n: int) -> None:
    """Set how many threads a call may use. No result depends on it.

    Args:
        n: from 1 to 1024.

    Raises:
        TypeError, ValueError: an n that is no such number.

    >>> import headway as hw
    >>> before = hw.get_num_threads()
    >>> hw.set_num_threads(1)
    >>> hw.get_num_threads()
    1
    >>> hw.set_num_threads(before)
    """
    _native.set_num_threads(_check.integer(n, "n", 1, 1024))
