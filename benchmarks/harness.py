"""The measuring: candidates of one shape in turns, in one process, on the same arrays; medians; errors beside times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TURNS = 5
TOLERANCE = {2: 0.05, 4: 1e-3, 8: 1e-9}  # by the bytes of a number; beyond it, a result is wrong
MEMORY = 6e9  # what a candidate may need beyond its inputs, in bytes


class LeftOut(Exception):
    """Why a peer is not measured on a shape."""


@dataclass(frozen=True)
class Candidate:
    """One library's way to do the work, ready to be called: what can be prepared has been."""

    run: Callable[[], Any]
    output: Callable[[Any], Array] = np.asarray  # what run returned, in the layout of the exact result
    reset: Callable[[], None] | None = None  # for a run that changes what the next one sees
    runs_per_reset: int = 0


@dataclass(frozen=True)
class Contest:
    """The arrays of one shape have been made; the candidates are made one by one, and each may refuse."""

    builders: dict[str, Callable[[], Candidate]]
    exact: Array | None = None  # of at least float64; a sample of the result
    sample: Callable[[Array], Array] = np.asarray  # takes that sample from a result
    floors: tuple[str, ...] = ()  # candidates that do less than the work: shown, and no peers


@dataclass(frozen=True)
class Row:
    """One line of a table: what is measured, and what it is judged by."""

    section: str
    name: str
    open: Callable[[], Contest]
    work: float = 0.0  # floating-point operations or bytes, whichever the row is limited by
    limit: str = ""  # "fma", "fma, float64" or "read": the measured limit that the rate is a share of

    @property
    def unit(self) -> str:
        """What the rate counts."""
        return {"": "", "read": "GB/s"}.get(self.limit, "GFLOP/s")


@dataclass
class Result:
    """What one row gave: seconds, and (rms, max) errors against the exact result, by candidate."""

    times: dict[str, float] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    floors: tuple[str, ...] = ()

    @property
    def ours(self) -> list[str]:
        """Headway's own candidates."""
        return [name for name in self.times if name.startswith("headway") and name not in self.floors]

    @property
    def peers(self) -> list[str]:
        """All others, the fastest first."""
        others = [name for name in self.times if not name.startswith("headway") and name not in self.floors]
        return sorted(others, key=self.times.__getitem__)

    def ratio(self, name: str) -> float | None:
        """How many times as long the best peer takes; below 1, headway loses."""
        return self.times[self.peers[0]] / self.times[name] if self.peers else None

    @property
    def exact_peer(self) -> str | None:
        """The most exact peer among those within 1.5 times the fastest one's time."""
        near = [name for name in self.peers if self.times[name] <= 1.5 * self.times[self.peers[0]]]
        return min((name for name in near if name in self.errors), key=lambda name: self.errors[name][0], default=None)

    def less_exact(self, name: str) -> bool:
        """Whether headway's rms error is above 1.2 times that peer's."""
        peer = self.exact_peer
        return peer is not None and self.errors[name][0] > 1.2 * self.errors[peer][0]


def measure(row: Row, seconds: float) -> Result:
    """Build, judge and time the candidates of a row."""
    contest = row.open()
    result = Result(floors=contest.floors)
    ready: dict[str, Candidate] = {}
    for name, build in contest.builders.items():
        try:
            candidate = build()
            out = candidate.output(candidate.run())
            if contest.exact is not None and name not in contest.floors:
                result.errors[name] = _errors(contest.sample(out), contest.exact)
            ready[name] = candidate
        except ImportError as missing:
            result.left_out[name] = f"{missing.name} is not installed"
        except Exception as refusal:  # a peer says in its own way what it does not do
            if name.startswith("headway"):
                raise
            result.left_out[name] = _reason(refusal)
    result.times = times(ready, seconds)
    return result


def times(candidates: dict[str, Candidate], seconds: float = 1.0) -> dict[str, float]:
    """Return each candidate's median time of about so many seconds of calls, measured in turns.

    A turn is a wait until all is quiet, a call that does not count, and calls that do. A candidate whose calls are
    long has fewer turns, and is not warmed up again: it has run before, and a second is long beside a cold start.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(TURNS):
        for name, candidate in candidates.items():
            if (len(taken[name]) < 2 and sum(taken[name]) < 4 * seconds) or sum(taken[name]) < seconds:
                taken[name] += _turn(candidate, seconds / TURNS, warm_up=sum(taken[name][-1:]) < seconds / 4)
    return {name: median(values) for name, values in taken.items()}


def _turn(candidate: Candidate, seconds: float, warm_up: bool) -> list[float]:
    taken: list[float] = []
    wait_until_quiet()
    if candidate.reset:
        candidate.reset()
    if warm_up or candidate.reset:
        candidate.run()
    while sum(taken) < seconds:
        if candidate.reset and taken and len(taken) % candidate.runs_per_reset == 0:
            candidate.reset()
            candidate.run()
        start = time.perf_counter()
        candidate.run()
        taken.append(time.perf_counter() - start)
    return taken


def wait_until_quiet(longest: float = 1.0) -> None:
    """Wait until no thread of this process uses a processor.

    Thread pools spin for up to a quarter of a second after their last task and would take the next candidate's
    processors; telling them not to (OMP_WAIT_POLICY and the like) would slow their owners.
    """
    end = time.perf_counter() + longest
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def _errors(out: Array, exact: Array) -> tuple[float, float]:
    difference = np.abs(out.astype(exact.dtype) - exact)
    largest = float(difference.max(initial=0))
    if not largest <= TOLERANCE[out.dtype.itemsize] * float(np.abs(exact).max(initial=0)):
        raise LeftOut(f"off by {largest:.0e}, too much for {out.dtype}")
    return float(np.sqrt(np.mean(difference**2))), largest


def _reason(refusal: Exception) -> str:
    """Return the line of an error that says something, without where it was raised."""
    lines = [line.strip() for line in str(refusal).splitlines() if line.strip() and "Exception from " not in line]
    return (lines[0] if lines else type(refusal).__name__).rpartition("[ONNXRuntimeError] : ")[2][:110]


def enough_memory(needed: float) -> None:
    """Leave out a candidate that would need more than MEMORY."""
    if needed > MEMORY:
        raise LeftOut(f"would need more than {MEMORY / 1e9:.0f} GB")
