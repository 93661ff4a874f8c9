"""headway beside its peers, in one process, in turns, medians; the error against float64 beside each time.

Run ``make bench``, or ``python -m benchmarks [attention|sampling]``. Absolute figures differ between machines;
the ratios of one run are what counts. A peer that is not installed is left out, and said so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import headway as hw

try:
    import torch
except ImportError:
    torch = None

Candidates = dict[str, Callable[[], Any]]


def times(candidates: Candidates, seconds: float = 2.0) -> dict[str, float]:
    """Return each candidate's median time, measured in turns until the time is up.

    A turn is a pause, one call that does not count, and calls for 30 ms. The pause is for the threads of the
    candidate before, which OpenMP and OpenBLAS keep spinning for a while: they would take the next one's processors.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or len(taken[next(iter(taken))]) < 3:
        for name, run in candidates.items():
            time.sleep(0.3)
            run()
            turn = time.perf_counter() + 0.03
            while (start := time.perf_counter()) < turn:
                run()
                taken[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in taken.items()}


def report(title: str, candidates: Candidates, exact: Any = None, work: float = 0.0, unit: str = "") -> None:
    """Print one line for each candidate: time, rate, ratio to headway, largest error."""
    print(title)
    measured = times(candidates)
    for name, seconds in measured.items():
        line = f"  {name:<22}{seconds * 1e6:>12.1f} us"
        line += f"{work / seconds / 1e9:>10.1f} {unit}" if work else " " * 18
        line += f"{seconds / measured['headway']:>9.2f}x headway's time"
        if exact is not None:
            line += f"   max error {np.abs(np.asarray(candidates[name]()) - exact).max():.1e}"
        print(line)


def numpy_attention(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """Attend as most people write it by hand."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def attention() -> None:
    """Prefill and decode."""
    rng = np.random.default_rng(0)
    for heads, length, size in ((12, 128, 64), (12, 512, 64), (12, 2048, 64)):
        q, k, v = rng.normal(size=(3, heads, length, size)).astype(np.float32)
        wide = [x.astype(np.float64) for x in (q, k, v)]
        for causal in (False, True):
            candidates: Candidates = {
                "headway": lambda q=q, k=k, v=v, c=causal: hw.attention(q, k, v, causal=c),
                "NumPy by hand": lambda q=q, k=k, v=v, c=causal: numpy_attention(q, k, v, c),
            }
            if torch:
                tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
                sdpa = torch.nn.functional.scaled_dot_product_attention
                candidates["torch SDPA"] = lambda t=tensors, c=causal, f=sdpa: f(*t, is_causal=c)[0]
            work = 4.0 * heads * length * length * size / (2 if causal else 1)
            title = f"attention, {heads} heads, L = {length}, D = {size}{', causal' * causal}"
            report(title, candidates, numpy_attention(*wide, causal), work, "GFLOP/s")
    q = rng.normal(size=(32, 1, 128)).astype(np.float32)
    k, v = rng.normal(size=(2, 8, 4096, 128)).astype(np.float32)
    cache = hw.KVCache(8, 128)
    cache.append(k, v)
    candidates = {
        "headway": lambda: cache.attend(q),
        "headway, plain arrays": lambda: hw.attention(q, k, v),
    }
    if torch:
        tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        candidates["torch SDPA"] = lambda: sdpa(*tensors, enable_gqa=True)[0]
    exact = numpy_attention(*(np.repeat(x.astype(np.float64), n, 0) for x, n in ((q, 1), (k, 4), (v, 4))), False)
    report("decode, 32 query heads over 8, S = 4096, D = 128", candidates, exact, float(k.nbytes + v.nbytes), "GB/s")


def numpy_sample(logits: Any, rng: Any, temperature: float, top_k: int | None, top_p: float | None) -> int:
    """Sample as most people write it by hand."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    weights /= weights.sum()
    if top_p is not None:
        keep = np.cumsum(weights) - weights < top_p
        order, weights = order[keep], weights[keep] / weights[keep].sum()
    return int(rng.choice(order, p=weights))


def sampling() -> None:
    """One row of a large vocabulary."""
    rng = np.random.default_rng(0)
    vocabulary = 128_256
    for name, spread in (("peaked", 4.0), ("flat", 0.5)):
        logits = (rng.normal(size=vocabulary) * spread).astype(np.float32)
        for label, options in (
            ("plain", {}),
            ("top_k=50", {"top_k": 50}),
            ("top_p=0.9", {"top_p": 0.9}),
            ("top_k=50, top_p=0.9", {"top_k": 50, "top_p": 0.9}),
        ):
            candidates: Candidates = {
                "headway": lambda z=logits, o=options: hw.sample(z, temperature=0.8, seed=1, **o),
                "NumPy by hand": lambda z=logits, o=options: numpy_sample(z, rng, 0.8, o.get("top_k"), o.get("top_p")),
            }
            if torch:
                tensor = torch.from_numpy(logits)
                candidates["torch, plain softmax"] = lambda t=tensor: torch.multinomial(torch.softmax(t / 0.8, -1), 1)
                candidates["torch, reading once"] = lambda t=tensor: t.max()
            report(f"sample, V = {vocabulary}, {name}, {label}", candidates)


if __name__ == "__main__":
    print(hw.info())
    if torch:
        torch.set_num_threads(hw.get_num_threads())
    else:
        print("torch is not installed: left out")
    chosen = sys.argv[1:] or ["attention", "sampling"]
    for name in chosen:
        {"attention": attention, "sampling": sampling}[name]()
