"""A thread writes to what another thread's call reads. The result may be anything, or an error; memory stays whole.

Kernels run without the GIL, so whatever was checked may be different when it is read. Each case runs in a process of
its own, which a memory error ends; `make sanitize` runs them all under AddressSanitizer, which misses none.
As a program it runs the cases that are named: ``python tests/test_races.py "penalize"``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import headway as hw

SECONDS = 0.3  # of each case
Inputs = dict[str, np.ndarray]


class Case(NamedTuple):
    """The arrays that a call reads, as they should be, and the call."""

    inputs: Inputs
    call: Callable[[Inputs], Any]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def ids(below: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(8).integers(0, below, shape)


# Cases --------------------------------------------------------------------------------------------------------------

H, L, S, D, V, ROWS, N = 2, 64, 700, 32, 20_000, 4, 300
QKV = {"q": normal(H, L, D), "k": normal(H, S, D), "v": normal(H, S, D)}
SCORES = {"mask": np.random.default_rng(9).random((H, L, S)) < 0.5, "bias": normal(H, L, S), "sinks": normal(H)}
BATCH = {"q": normal(3, H, L, D), "k": normal(3, H, S, D), "v": normal(3, H, S, D), "kv_lengths": ids(S, 3)}
LOGITS = {"logits": normal(ROWS, V)}
PER_ROW = {
    "temperature": np.linspace(0.5, 1.5, ROWS),
    "top_k": ids(V, ROWS) + 1,
    "top_p": np.linspace(0.1, 0.9, ROWS),
    "min_p": np.linspace(0, 0.1, ROWS),
    "typical_p": np.linspace(0.5, 0.99, ROWS),
    "seed": ids(V, ROWS).astype(np.uint64),
    "position": ids(V, ROWS).astype(np.uint64),
    "logit_bias": normal(ROWS, V),
    "allowed": np.random.default_rng(9).random((ROWS, V)) < 0.5,
}
PACKED = {"allowed": ids(2**31, ROWS, V // 32).astype(np.int32)}
WEIGHTS = {f"w_{x}": normal(H * D, H * D) for x in "qkvo"} | {f"b_{x}": normal(H * D) for x in "qkvo"}


def cached(a: Inputs) -> Any:
    cache = hw.KVCache(H, D)
    cache.append(a["k"], a["v"])
    cache.append(a["k"], a["v"])
    return cache.attend(a["q"])


def in_parts(a: Inputs) -> Any:
    halves = (slice(None, 512), slice(512, None))
    parts = [
        hw.partial_attention(a["q"], a["k"][:, half], a["v"][:, half], key_offset=half.start or 0) for half in halves
    ]
    return hw.merge_attention(parts, sinks=a["sinks"])


def steps(a: Inputs) -> Any:
    sampler = hw.Sampler(V)
    penalties = {"repetition": 1.1, "dry_multiplier": 0.8, "frequency": 0.1}
    for i in range(ROWS):
        sampler.admit(hw.SamplingParams(top_p=0.9, top_k=50), a["prompt"], seed=i, **penalties)
    return [sampler.step(a["logits"], allowed=a["allowed"]) for _ in range(2)]


def verified(a: Inputs) -> Any:
    sampler = hw.Sampler(V // 4)
    for i in range(ROWS):
        sampler.admit(hw.SamplingParams(temperature=0.9), [1, 2, 1], seed=i, frequency=0.1, dry_multiplier=0.8)
    return sampler.verify(**a)


def penalized(a: Inputs) -> Any:
    return hw.penalize(
        a["logits"],
        a["token_ids"],
        lengths=a["lengths"],
        repetition=a["repetition"],
        window=a["window"],
        dry_multiplier=0.8,
        dry_breakers=a["dry_breakers"],
    )


CASES = {
    "attention": Case(QKV | SCORES, lambda a: hw.attention(**a)),
    "attention of lengths": Case(BATCH, lambda a: hw.attention(**a, causal="bottom_right", return_lse=True)),
    "attention of few rows": Case(
        QKV | {"q": normal(H, 2, D), "mask": SCORES["mask"][:, :2]}, lambda a: hw.attention(**a)
    ),
    "attention, fast": Case(QKV | SCORES, lambda a: hw.attention(**a, precision="fast")),
    "attention_weights": Case(
        {name: (QKV | SCORES)[name] for name in ("q", "k", "mask", "bias", "sinks")},
        lambda a: hw.attention_weights(**a),
    ),
    "partial_attention": Case(QKV | {"sinks": SCORES["sinks"]}, in_parts),
    "merge_attention": Case(
        {"out": normal(H, L, D), "lse": normal(H, L)},
        lambda a: hw.merge_attention([hw.AttentionState.from_lse(a["out"], a["lse"])] * 2, return_lse=True),
    ),
    "multi_head_attention": Case(
        {name: normal(L, H * D) for name in "qkv"} | WEIGHTS | {"mask": SCORES["mask"][0, :, :L]},
        lambda a: hw.multi_head_attention(**a, num_heads=H),
    ),
    "KVCache": Case(QKV, cached),
    "linear": Case({"x": normal(40, 700), "w": normal(700, 300), "b": normal(300)}, lambda a: hw.linear(**a)),
    "linear of few rows": Case({"x": normal(2, 700), "w": normal(700, 300)}, lambda a: hw.linear(**a)),
    "rotary": Case(
        {"x": normal(H, 400, 64), "positions": ids(1000, 400), "frequencies": np.linspace(0.1, 1, 32)},
        lambda a: hw.rotary(**a),
    ),
    "rms_norm": Case({"x": normal(200, 500), "weight": normal(500)}, lambda a: hw.rms_norm(**a)),
    "swiglu": Case({"gate": normal(200, 500), "up": normal(200, 500)}, lambda a: hw.swiglu(**a)),
    "sample": Case(LOGITS | PER_ROW, lambda a: hw.sample(**a)),
    "sample, packed mask": Case(LOGITS | PACKED, lambda a: hw.sample(**a, top_k=40, top_p=0.9, seed=1)),
    "sample, a lone row": Case({"logits": normal(40 * V)}, lambda a: hw.sample(**a, top_p=0.9, seed=1)),
    "sample, every stage": Case(
        LOGITS,
        lambda a: hw.sample(
            **a,
            dynamic_temperature_range=0.3,
            top_n_sigma=3.0,
            top_k=5000,
            top_p=0.9,
            min_p=1e-4,
            typical_p=0.95,
            epsilon_cutoff=1e-6,
            eta_cutoff=1e-6,
            xtc_probability=1.0,
            xtc_threshold=1e-3,
        ),
    ),
    "sample, several draws": Case(
        LOGITS, lambda a: hw.sample(**a, num_samples=20, replacement=False, top_k=100, seed=1)
    ),
    "sample, ties kept": Case(LOGITS, lambda a: hw.sample(**a, top_k=100, ties="keep", seed=1)),
    "sample, float16": Case({"logits": normal(ROWS, V).astype(np.float16)}, lambda a: hw.sample(**a, top_k=9, seed=1)),
    "sample, float64": Case({"logits": normal(ROWS, V).astype(float)}, lambda a: hw.sample(**a, top_p=0.5, seed=1)),
    "probabilities": Case(LOGITS | PER_ROW, lambda a: hw.probabilities(**a)),
    "filter_logits": Case(LOGITS | PER_ROW, lambda a: hw.filter_logits(**a)),
    "logprobs": Case(LOGITS | {"tokens": ids(V, ROWS, 5)}, lambda a: hw.logprobs(**a, top=9)),
    "logprobs, most": Case(LOGITS, lambda a: hw.logprobs(**a, top=V - 3)),
    "logprobs, processed": Case(
        LOGITS | {"tokens": ids(V, ROWS)}, lambda a: hw.logprobs(**a, top=200, processed=True, top_k=2000)
    ),
    "penalize": Case(
        LOGITS
        | {
            "token_ids": ids(V, ROWS, N),
            "lengths": ids(N, ROWS),
            "repetition": np.full(ROWS, 1.1),
            "window": ids(N, ROWS) + 1,
            "dry_breakers": ids(V, 3),
        },
        penalized,
    ),
    "verify_draft": Case(
        {
            "target_logits": normal(ROWS, 5, V // 4),
            "draft_logits": normal(ROWS, 4, V // 4),
            "draft_tokens": ids(9, ROWS, 4),
            "lengths": ids(5, ROWS),
        },
        lambda a: hw.verify_draft(**a, seed=1),
    ),
    "Sampler": Case(
        LOGITS | {"prompt": ids(V, N), "allowed": np.random.default_rng(9).random((ROWS, V)) < 0.5},
        steps,
    ),
    "Sampler, drafts": Case(
        {
            "target_logits": normal(ROWS, 5, V // 4),
            "draft_logits": normal(ROWS, 4, V // 4),
            "draft_tokens": ids(9, ROWS, 4),
            "lengths": ids(5, ROWS),
            "allowed": np.ones((ROWS, 5, V // 4), np.bool_),
        },
        verified,
    ),
    "explain": Case(
        {"logits": normal(2000), "allowed": np.random.default_rng(9).random(2000) < 0.5},
        lambda a: hw.explain(**a, top_k=40, top_p=0.9, seed=1),
    ),
}


# The race -----------------------------------------------------------------------------------------------------------


def hostile(array: np.ndarray) -> Iterator[np.ndarray]:
    """What a careless check, or none, would let do harm."""
    rng = np.random.default_rng(10)
    if array.dtype == np.bool_:
        yield np.zeros_like(array)
        yield np.full(array.shape, 255, np.uint8).view(np.bool_)
    elif array.dtype.kind == "f":
        largest = np.finfo(array.dtype).max
        for value in (np.nan, np.inf, -np.inf, largest, -largest, 0.0):
            yield np.full_like(array, value)
        yield rng.choice(np.array([np.nan, np.inf, -np.inf, largest, 1e-7, 0, 1], array.dtype), array.shape)
        yield (rng.standard_normal(array.shape) * 50).astype(array.dtype)
        yield np.round(rng.standard_normal(array.shape)).astype(array.dtype)  # ties everywhere
        yield np.sort(array, axis=-1)
    else:
        info = np.iinfo(array.dtype)
        for value in (-1, 2**40, -(2**40), info.max, info.min, 0):
            if info.min <= value <= info.max:
                yield np.full_like(array, value)
        yield rng.integers(info.min, info.max, array.shape, array.dtype)


def race(case: Case, seconds: float) -> tuple[int, int]:
    """Call while another thread writes; return the numbers of calls, and of those without an error."""
    inputs = {name: array.copy() for name, array in case.inputs.items()}
    end = time.monotonic() + seconds

    def write() -> None:
        rng = np.random.default_rng(11)
        bad = {name: list(hostile(array)) for name, array in case.inputs.items()}
        names = list(inputs)
        while time.monotonic() < end:
            name = names[rng.integers(len(names))]
            other = bad[name][rng.integers(len(bad[name]))]
            for _ in range(20):
                np.copyto(inputs[name], other)
                np.copyto(inputs[name], case.inputs[name])
            half = max(1, len(inputs[name]) // 2)
            inputs[name][:half] = other[:half]
            time.sleep(0.001)  # a call may begin and end with what is there
            np.copyto(inputs[name], case.inputs[name])

    calls = fine = 0
    writer = threading.Thread(target=write)
    writer.start()
    while time.monotonic() < end:
        calls += 1
        with contextlib.suppress(ValueError):
            case.call(inputs)
            fine += 1
    writer.join()
    return calls, fine


def main(names: list[str]) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")  # NumPy's, of invalid values
    sys.setswitchinterval(1e-5)
    hw.set_num_threads(2)
    for name in names:
        faulthandler.dump_traceback_later(100 * SECONDS, exit=True)  # a call that never ends is no result
        calls, fine = race(CASES[name], SECONDS)
        print(f"{name}: {calls} calls, {fine} without an error")
        assert fine, name


@pytest.mark.parametrize("name", CASES)
def test_a_call_survives_writes_to_its_inputs(name: str) -> None:
    done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"


def test_every_public_function_races() -> None:
    """All that takes arrays: the others are classes of results, and settings."""
    functions = {name for name in hw.__all__ if callable(getattr(hw, name)) and name[0].islower()}
    functions -= {"info", "get_num_threads", "set_num_threads"}
    assert {name.split(",")[0].split(" of ")[0] for name in CASES} >= {*functions, "KVCache", "Sampler"}


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
