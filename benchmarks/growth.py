"""How attention's time and memory grow with L, D and the number of heads, naive and tiled: a table.

Naive is the textbook's: all scores at once, L x S numbers per head, in NumPy. Tiled is headway. float32, L = S, no
mask; one thread, so that a neighbour's work disturbs little. Memory is what the process needs at its peak beyond inputs
and output. Run ``python benchmarks/growth.py``; a minute or two, and 7 GB of memory at the largest naive case.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time

import numpy as np
from numpy.typing import NDArray

import headway as hw

Array = NDArray[np.float32]
LENGTHS, WIDTHS, HEADS = (512, 1024, 2048, 4096, 8192), (32, 64, 128, 256), (1, 4, 16)
L, D, H = 2048, 64, 8  # what is not varied


def naive(q: Array, k: Array, v: Array) -> Array:
    """Attend with the whole L x S array of scores in memory."""
    s = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    s = np.exp(s - s.max(axis=-1, keepdims=True))
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("HEADWAY", "OPENBLAS", "MKL", "OMP", "VECLIB")}
FORMS = {"naive": naive, "tiled": hw.attention}


def measure(form: str, heads: int, length: int, width: int) -> tuple[float, float]:
    """Return seconds, the best of up to seven calls, and bytes beyond inputs and output."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, length, width), dtype=np.float32) for _ in range(3))
    FORMS[form](q[:, :1], k[:, :1], v[:, :1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    while len(seconds) < 7 and sum(seconds) < 4.0:
        start = time.perf_counter()
        out = FORMS[form](q, k, v)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return min(seconds), max(0.0, (after - before) * unit - out.nbytes)


def in_a_process_of_its_own(form: str, heads: int, length: int, width: int) -> tuple[float, float]:
    """Measure where no earlier call has left a peak."""
    arguments = [form, *(str(n) for n in (heads, length, width))]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, extra = done.stdout.split()
    return float(seconds), float(extra)


def table() -> None:
    """Print a Markdown table."""
    print("| heads | L = S | D | naive, ms | tiled, ms | naive, extra MB | tiled, extra MB |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    shapes = dict.fromkeys([(H, n, D) for n in LENGTHS] + [(H, L, d) for d in WIDTHS] + [(h, L, D) for h in HEADS])
    for heads, length, width in shapes:
        naive_time, naive_extra = in_a_process_of_its_own("naive", heads, length, width)
        tiled_time, tiled_extra = in_a_process_of_its_own("tiled", heads, length, width)
        print(
            f"| {heads} | {length:,} | {width} | {naive_time * 1e3:,.1f} | {tiled_time * 1e3:,.1f} "
            f"| {naive_extra / 1e6:,.1f} | {tiled_extra / 1e6:,.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(*measure(sys.argv[1], *(int(n) for n in sys.argv[2:])))
    else:
        table()
