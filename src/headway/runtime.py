"""What headway runs on: threads, instruction set, and the numbers that the contract of bits is made of."""

from __future__ import annotations

from dataclasses import dataclass

from . import _check, _native

__all__ = ["Info", "get_num_threads", "info", "set_num_threads"]


@dataclass(frozen=True)
class Info:
    """What this process computes with. Only ``isa`` and ``num_threads`` differ between machines; no result does.

    ``isa`` is the instruction set in use, one of ``isas``, which this machine can run, best first. ``chunk_length``
    is the number of keys that share one maximum: partial attention must be split at its multiples.
    """

    version: str
    isa: str
    isas: tuple[str, ...]
    num_threads: int
    chunk_length: int


@_check.public
def info() -> Info:
    """Return what headway runs on.

    The instruction set is chosen at the first call: the best, or the one that the environment variable
    ``HEADWAY_ISA`` names. Raises ValueError where that names none of this machine's.

    >>> import headway as hw
    >>> hw.info().chunk_length
    512
    """
    from importlib.metadata import version  # takes longer to import than all of headway

    return Info(version("headway"), _native.isa(), tuple(_native.isas()), _native.get_num_threads(), _native.CHUNK)


@_check.public
def get_num_threads() -> int:
    """Return how many threads a call may use.

    At the start that is ``HEADWAY_NUM_THREADS``, or the number of processors that the process may use.
    """
    return _native.get_num_threads()


@_check.public
def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, from 1 to 1024. No result depends on it.

    >>> import headway as hw
    >>> before = hw.get_num_threads()
    >>> hw.set_num_threads(1)
    >>> hw.get_num_threads()
    1
    >>> hw.set_num_threads(before)
    """
    _native.set_num_threads(_check.integer(n, "n", 1, 1024))
