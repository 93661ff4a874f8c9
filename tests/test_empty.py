"""A43: a call with nothing to compute returns at once, however large the sizes that remain and their broadcasts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway as hw

HUGE = 2**40


def zeros(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """A broadcast of a single number: as large as one likes, in no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def cache(batch: tuple[int, ...], count: int, E: int = 4) -> Any:
    made = hw.KVCache(1, 4, value_dim=E, batch_shape=batch)
    made.append(zeros(*batch, 1, count, 4), zeros(*batch, 1, count, E))
    return made


# D = 3, and what is large beside what is empty. Each gives an empty result.
CALLS: dict[str, Callable[[], Any]] = {
    "no values, many queries": lambda: hw.attention(zeros(1, HUGE, 3), zeros(1, 9, 3), zeros(1, 9, 0)),
    "no values, many keys": lambda: hw.attention(zeros(1, 9, 3), zeros(1, HUGE, 3), zeros(1, HUGE, 0)),
    "no values, many of all": lambda: hw.attention(zeros(1, HUGE, 3), zeros(1, HUGE, 3), zeros(1, HUGE, 0)),
    "no queries, many keys": lambda: hw.attention(zeros(1, 0, 3), *[zeros(1, HUGE, 3)] * 2, return_lse=True)[0],
    "no queries, many heads": lambda: hw.attention(zeros(HUGE, 0, 3), zeros(1, 9, 3), zeros(1, 9, 3)),
    "no queries, many items": lambda: hw.attention(zeros(HUGE, 2, 0, 3), zeros(1, 9, 3), zeros(1, 9, 3)),
    "no items, many keys": lambda: hw.attention(zeros(0, 1, 9, 3), zeros(0, 1, HUGE, 3), zeros(0, 1, HUGE, 3)),
    "no items, many queries": lambda: hw.attention(zeros(0, 1, HUGE, 3), zeros(1, 9, 3), zeros(1, 9, 3)),
    "no heads": lambda: hw.attention(zeros(0, HUGE, 3), zeros(1, HUGE, 3), zeros(1, HUGE, 3)),
    "its mask": lambda: hw.attention(
        zeros(1, HUGE, 3), zeros(1, 9, 3), zeros(1, 9, 0), mask=zeros(HUGE, 9, dtype="i8")
    ),
    "its bias": lambda: hw.attention(zeros(1, HUGE, 3), zeros(1, 9, 3), zeros(1, 9, 0), bias=zeros(HUGE, 9, dtype="d")),
    "its sinks": lambda: hw.attention(zeros(HUGE, 0, 3), *[zeros(1, 9, 3)] * 2, sinks=zeros(HUGE)),
    "its kv_lengths": lambda: hw.attention(
        zeros(HUGE, 1, 0, 3), *[zeros(1, 9, 3)] * 2, kv_lengths=zeros(HUGE, dtype="i8"), causal="bottom_right"
    ),
    "fast": lambda: hw.attention(zeros(1, HUGE, 3), zeros(1, 9, 3), zeros(1, 9, 0), precision="fast"),
    "weights, no queries": lambda: hw.attention_weights(zeros(1, 0, 3), zeros(1, HUGE, 3)),
    "weights, no keys": lambda: hw.attention_weights(zeros(1, HUGE, 3), zeros(1, 0, 3)),
    "weights, no items": lambda: hw.attention_weights(zeros(0, 1, HUGE, 3), zeros(1, 9, 3)),
    "a part, no queries": lambda: hw.merge_attention(
        [hw.partial_attention(zeros(1, 0, 3), zeros(1, HUGE, 3), zeros(1, HUGE, 3))]
    ),
    "a part, no items": lambda: hw.merge_attention(
        [hw.partial_attention(zeros(0, 1, 9, 3), zeros(1, HUGE, 3), zeros(1, HUGE, 3), key_offset=512 * 3)]
    ),
    "penalties, no rows": lambda: hw.penalize(zeros(0, 9), zeros(0, 2**33, dtype="i8"), presence=1.0),
    "merging, no values": lambda: hw.merge_attention(
        [hw.partial_attention(zeros(1, 2**20, 3), zeros(1, 9, 3), zeros(1, 9, 0))]
    ),
    "heads, no queries": lambda: hw.multi_head_attention(zeros(0, 4), *[zeros(HUGE, 4)] * 2, num_heads=2),
    "heads, no items": lambda: hw.multi_head_attention(*[zeros(0, HUGE, 4)] * 3, num_heads=2, decimals=3),
    "heads, no width": lambda: hw.multi_head_attention(*[zeros(HUGE, 4)] * 2, zeros(HUGE, 0), num_heads=2, causal=True),
    "a cache without items": lambda: cache((0,), HUGE).attend(zeros(0, 1, 9, 4)),
    "its keys": lambda: cache((0,), 2**30).keys,
    "its values": lambda: cache((0, 3), 2**30).values,
    "its fork": lambda: cache((0,), 2**30).fork().keys,
    "a cache without values": lambda: cache((), 5, 0).attend(zeros(1, HUGE, 4), causal=None),
    "a cache, no queries": lambda: cache((), 5).attend(zeros(1, 0, 4)),
    "a cache, no tokens": lambda: cache((2,), 0).keys,
    "linear, no rows": lambda: hw.linear(zeros(0, HUGE), zeros(HUGE, HUGE // 2**20)),
    "linear, no columns": lambda: hw.linear(zeros(HUGE, 7, 2**10), zeros(2**10, 0)),
    "linear, no items": lambda: hw.linear(zeros(2**20, 0, HUGE // 2**20), zeros(HUGE // 2**20, 5), zeros(5)),
    "rms_norm, no rows": lambda: hw.rms_norm(zeros(0, HUGE), zeros(HUGE)),
    "rms_norm, no columns": lambda: hw.rms_norm(zeros(HUGE, 0), zeros(0)),
    "swiglu": lambda: hw.swiglu(zeros(HUGE, 0), zeros(HUGE, 0)),
    "rotary, no features": lambda: hw.rotary(zeros(HUGE, 0)),
    "rotary, no features, positions": lambda: hw.rotary(zeros(HUGE, 0), positions=zeros(HUGE, dtype="i8")),
    "rotary, no items": lambda: hw.rotary(zeros(0, HUGE, 2)),
    "rotary, no tokens": lambda: hw.rotary(zeros(HUGE, 0, 2), positions=zeros(HUGE, 0, dtype="i8")),
    "sample": lambda: hw.sample(zeros(0, 2**30)),
    "sample, draws": lambda: hw.sample(zeros(0, 2**30), num_samples=9, top_k=5),
    "probabilities": lambda: hw.probabilities(zeros(3, 0, 2**30)),
    "filter_logits": lambda: hw.filter_logits(zeros(0, 2**30), top_p=0.5),
    "logprobs": lambda: hw.logprobs(zeros(0, 2**30), zeros(0, 3, dtype="i8"))[0],
    "penalize": lambda: hw.penalize(zeros(0, 2**30), zeros(0, 3, dtype="i8"), frequency=1.0),
    "a Sampler's step": lambda: hw.Sampler(2**30).step(zeros(0, 2**30)),
}


def test_a43_nothing_to_compute_takes_no_time() -> None:
    """In a process of its own, for one that works for ever may hold Python's lock, and no timer would end it."""
    process = subprocess.run([sys.executable, Path(__file__)], capture_output=True, text=True, check=False, timeout=120)
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(process.stdout.splitlines()) == len(CALLS)


@pytest.mark.parametrize("E", [0, 3])
def test_a43_what_is_empty_beside_a_result_is_not_skipped(E: int) -> None:
    """Without values the log-sum-exp is still there, and so are errors."""
    x = np.ones((1, 5, 3), np.float32)
    _, lse = hw.attention(x, x, np.ones((1, 5, E), np.float32), return_lse=True, scale=1.0)
    assert np.allclose(lse, 3 + np.log(5))
    state = hw.partial_attention(x, x, np.ones((1, 5, E), np.float32), scale=1.0)
    assert np.allclose(hw.merge_attention([state], return_lse=True)[1], 3 + np.log(5))
    with pytest.raises(ValueError, match=r"^bias:"):
        hw.attention(x[:, :0], x, x, bias=np.full((0, 5), 1.0)[:, :4])
    with pytest.raises(ValueError, match=r"^kv_lengths: .* got 6"):
        hw.attention(x[:, :0], x, x, kv_lengths=np.broadcast_to(6, ()))
    with pytest.raises(ValueError, match=r"^positions: .* got -1"):
        hw.rotary(x[:, :0, :2], positions=[-1])


if __name__ == "__main__":
    for name, call in CALLS.items():
        start = time.perf_counter()
        result = call()
        assert np.asarray(result).size == 0, name
        took = time.perf_counter() - start
        assert took < 5, f"{name} took {took:.1f} s"
        print(name, flush=True)
