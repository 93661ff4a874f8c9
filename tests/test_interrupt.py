"""A42: a signal ends a long call soon, and leaves everything as it was (Ctrl-C, or whatever handler raises)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from oracles import same_bits

import headway as hw

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer that sends a signal")

rng = np.random.default_rng(0)
DELAY = 0.15  # seconds after which the signal comes
SOON = 0.2  # and in which the call must then end ...
PATIENCE = 5.0  # ... on a machine that has nothing else to do: here others may compute


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def repeated(x: np.ndarray, *shape: int) -> np.ndarray:
    return np.broadcast_to(x, shape)


LONG = normal(1, 20_000, 128)
WIDE = repeated(normal(1, 1, 65_536), 1, 4096, 65_536)
MATRIX = repeated(normal(1, 8192), 8192, 8192)
LOGITS = normal(20_000)
LONG_ROW = normal(1_000_000)
EVERY_OTHER = np.arange(20_000) % 2 == 0


def full_cache() -> Any:
    cache = hw.KVCache(1, 128)
    cache.append(LONG, LONG)
    return cache


# Each takes from half a second to many, and is called again where a fast machine ends it before the signal comes.
CALLS: dict[str, Callable[[], Any]] = {
    "attention": lambda: hw.attention(LONG, LONG, LONG),
    "attention, float64": lambda: hw.attention(*[LONG[:, :9000].astype("d")] * 3),
    "attention, masked": lambda: hw.attention(LONG, LONG, LONG, mask=repeated(EVERY_OTHER, 20_000, 20_000)),
    "attention, bias": lambda: hw.attention(LONG, LONG, LONG, bias=repeated(np.float32(1), 20_000, 20_000)),
    "attention, softcap": lambda: hw.attention(LONG, LONG, LONG, softcap=5.0),
    "attention, fast": lambda: hw.attention(*[repeated(LONG, 16, 20_000, 128)] * 3, precision="fast"),
    "attention, decoding": lambda: hw.attention(LONG[:, :1], *[repeated(LONG[:, :1], 1, 2**26, 128)] * 2),
    "attention, wide keys": lambda: hw.attention(WIDE[:, :512], WIDE, LONG[:, :4096, :8]),
    "attention, wide values": lambda: hw.attention(LONG[:, :512, :8], LONG[:, :4096, :8], WIDE),
    "attention, values that few may see": lambda: hw.attention(
        LONG, LONG, repeated(np.where(np.arange(128) == 5, np.float32(np.nan), 1), 1, 20_000, 128), causal=True
    ),
    "attention, done again": lambda: hw.attention(LONG * 0, LONG, repeated(np.float32(3e38), 1, 20_000, 128)),
    "attention_weights": lambda: hw.attention_weights(*[repeated(LONG[:, :1], 1, n, 128) for n in (500, 400_000)]),
    "partial_attention": lambda: hw.partial_attention(LONG, LONG, LONG),
    "partial_attention, one long unit": lambda: hw.partial_attention(  # for which the calling thread waits
        LONG[:, :6], *[repeated(LONG[:, :1], 2, 1, 2**25, 128)] * 2, kv_lengths=[1, 2**25]
    ),
    "multi_head_attention": lambda: hw.multi_head_attention(LONG[0], LONG[0], LONG[0], num_heads=4),
    "KVCache.attend": lambda: full_cache().attend(LONG),
    "linear": lambda: hw.linear(MATRIX, MATRIX),
    "linear, few rows": lambda: hw.linear(repeated(LONG[0, :1, :1], 20, 2**24), repeated(LONG[0, :1], 2**24, 128)),
    "sample": lambda: hw.sample(repeated(LOGITS, 100_000, 20_000), top_p=0.9),
    "sample, draws": lambda: hw.sample(LONG_ROW, temperature=9.0, num_samples=500_000, replacement=False),
    "probabilities": lambda: hw.probabilities(repeated(LOGITS, 20_000, 20_000), typical_p=0.9),
    "logprobs": lambda: hw.logprobs(repeated(LOGITS, 100_000, 20_000), top=5),
    "logprobs, tokens": lambda: hw.logprobs(LONG_ROW, np.arange(200_000)),
    "verify_draft": lambda: hw.verify_draft(
        repeated(LOGITS, 100_001, 20_000), repeated(LOGITS, 100_000, 20_000), np.full(100_000, int(LOGITS.argmax()))
    ),
}


def small() -> Any:
    x = LONG[:, :700]
    return hw.attention(x, x, x, causal=True), hw.linear(x, x[0].T), hw.sample(LOGITS, num_samples=9, seed=1)


def for_ever(call: Callable[[], Any]) -> None:
    while True:
        call()


@pytest.fixture
def alarm() -> Iterator[Callable[[], None]]:
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # Hypothesis has it call a function, out of which no exception comes
    yield lambda: signal.setitimer(signal.ITIMER_REAL, DELAY)
    signal.setitimer(signal.ITIMER_REAL, 0)
    gc.enable()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CALLS)
def test_a42_a_signal_ends_a_call(
    name: str, threads: int, alarm: Callable[[], None], keep_threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    hw.set_num_threads(threads)
    want = small()
    call = CALLS[name]
    start = time.perf_counter()
    alarm()
    with pytest.raises(KeyboardInterrupt):
        for_ever(call)
    late = time.perf_counter() - start - DELAY
    with capsys.disabled():
        print(f"\n{name}, {threads} threads: ended {1e3 * late:.0f} ms after the signal", end="")
    assert late < PATIENCE
    assert same_bits(small(), want)  # the pool and its memory serve the next call


@pytest.mark.parametrize("threads", [1, 2])
def test_a42_a_handler_that_does_not_raise_lets_the_call_go_on(
    threads: int, alarm: Callable[[], None], keep_threads: None
) -> None:
    """It may call headway itself, which leaves the memory of the call alone."""
    x = LONG[:, :4000]
    hw.set_num_threads(threads)
    want, short, seen = hw.attention(x, x, x), small(), []

    def handler(*_: Any) -> None:
        seen.append(same_bits(small(), short))
        with contextlib.suppress(RuntimeError):  # an error during a call, which holds the pool
            hw.set_num_threads(threads)
        signal.setitimer(signal.ITIMER_REAL, 0.02)  # not before, or a slow machine would never leave the handler

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    deadline = time.perf_counter() + 60
    while len(seen) < 3 and time.perf_counter() < deadline:
        assert same_bits(hw.attention(x, x, x), want)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert len(seen) >= 3
    assert all(seen)


def test_a42_other_threads_compute_on() -> None:
    """Signals come to the main thread alone."""
    x = LONG[:, :4000]
    want = hw.attention(x, x, x)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = [pool.submit(hw.attention, x, x, x) for _ in range(4)]
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                time.sleep(60)
            assert all(same_bits(future.result(), want) for future in running)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert threading.current_thread() is threading.main_thread()


def test_a42_a_cache_is_as_it_was(alarm: Callable[[], None]) -> None:
    cache = full_cache()
    want = cache.attend(LONG[:, :5])
    alarm()
    with pytest.raises(KeyboardInterrupt):
        cache.attend(LONG)
    assert len(cache) == 20_000
    assert same_bits(cache.attend(LONG[:, :5]), want)
    cache.append(LONG[:, :1], LONG[:, :1])


def test_a42_a_sampler_has_not_advanced(alarm: Callable[[], None]) -> None:
    logits = repeated(LONG_ROW, 100, len(LONG_ROW))
    samplers = [hw.Sampler(len(LONG_ROW)) for _ in range(2)]
    params = hw.SamplingParams(typical_p=0.9, top_p=0.9, seed=3)
    for sampler in samplers:
        for i in range(100):
            sampler.admit(params, prompt_tokens=[i], frequency=0.5)
    alarm()

    def step() -> None:
        for sampler in samplers:
            sampler.step(logits)

    with pytest.raises(KeyboardInterrupt):
        for_ever(step)
    steps = [sampler._active.position.tolist() for sampler in samplers]
    while samplers[1]._active.position[0] < samplers[0]._active.position[0]:
        samplers[1].step(logits)
    assert samplers[0].step(logits).tolist() == samplers[1].step(logits).tolist(), steps


def interrupted_within(call: Callable[[], Any], seconds: float) -> bool:
    """Call, with a signal that comes somewhere in so many seconds; say whether that ended the call."""
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, seconds * random.random()))
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    except BaseException:
        signal.setitimer(signal.ITIMER_REAL, 0)  # before pytest says what went wrong
        raise
    return False


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# Short calls spend their time in Python, where a signal may come between any two lines. Thousands of signals at random
# meet a gap of 1 % of a call's time with near certainty: a lock that was taken and not given back had one of 5 %.
SIGNALS = 4000


def test_a42_a_signal_never_leaves_a_cache_taken_or_half_changed(alarm: Callable[[], None]) -> None:
    rng = np.random.default_rng(1)
    k, v, q = normal(2, 900, 16), normal(2, 900, 8), normal(4, 1, 16)
    cache = hw.KVCache(2, 16, value_dim=8)

    def calls() -> None:
        n = len(cache)
        cache.append(k[:, n : n + 1], v[:, n : n + 1])
        cache.fork().append(k[:, :1], v[:, :1])
        cache.attend(q)
        if n > 100:
            cache.truncate(int(rng.integers(90, 100)))

    calls()
    usual, met = min(seconds_of(calls) for _ in range(20)), 0
    for _ in range(SIGNALS):
        met += interrupted_within(calls, usual)
        n = len(cache)
        assert same_bits((cache.keys, cache.values), (k[:, :n], v[:, :n]))
    assert met > SIGNALS // 10


def test_a42_a_signal_never_leaves_a_sampler_half_changed(alarm: Callable[[], None]) -> None:
    """Whatever ended early, each row goes on as a row alone that nothing interrupts."""
    rng = np.random.default_rng(2)
    logits, drafted = normal(12, 300), normal(12, 3, 300)
    drafted[:, 0, 0] += 4  # the first drafted token is accepted now and then
    options: Any = {"frequency": 0.5, "dry_multiplier": 0.8, "dry_breakers": [5]}
    sampler, alone = hw.Sampler(300), {}

    def admit() -> None:
        seed = int(rng.integers(2**32))
        prompt = rng.integers(0, 300, int(rng.integers(0, 130)))
        handle = sampler.admit(hw.SamplingParams(temperature=2.0), prompt, seed=seed, **options)
        alone[handle] = (seed, prompt)

    def calls() -> None:
        while len(sampler.handles) > 5:
            sampler.retire(sampler.handles[int(rng.integers(len(sampler.handles)))])
        for _ in range(3):
            sampler.step(logits[: len(sampler.handles)])
        sampler.verify(drafted[: len(sampler.handles)], np.zeros((len(sampler.handles), 2), int))
        sampler.force(sampler.handles[0], 5)
        alone[sampler.fork(sampler.handles[0], seed=7)] = (7, alone[sampler.handles[0]][1])
        sampler.truncate(sampler.handles[-1], len(alone[sampler.handles[-1]][1]))
        if len(sampler.handles) < 8:
            admit()

    for _ in range(4):
        admit()
    usual, met = min(seconds_of(calls) for _ in range(20)), 0
    for _ in range(SIGNALS):
        met += interrupted_within(calls, usual)
        active, histories = sampler._active, sampler._histories
        for handle, slot, position in zip(sampler.handles, active.slots, active.position.tolist(), strict=True):
            if handle in alone:  # admitted, and the signal came after
                assert histories.length[slot] == position >= len(alone[handle][1])
        for handle in set(sampler.handles) - set(alone):
            sampler.retire(handle)
        if len(sampler.handles) < 4:
            admit()
    assert met > SIGNALS // 10
    want = []
    for row, handle, slot in zip(logits, sampler.handles, sampler._active.slots.tolist()):
        seed, prompt = alone[handle]
        history = histories.tokens[histories.first[slot] :][: histories.length[slot]]
        assert history[: len(prompt)].tolist() == prompt.tolist()
        penalized = hw.penalize(row, history, prompt_lengths=len(prompt), **options)
        want.append(hw.sample(penalized, temperature=2.0, seed=seed, position=len(history)))
    assert sampler.step(logits[: len(want)]).tolist() == want


def test_the_best_are_sorted_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = normal(7, 50)
    want = hw.logprobs(logits, top=20)
    for keys in (1, 20, 41, 10**6):
        monkeypatch.setattr(
            sys.modules["headway._sampling.logprobs"], "_SORTED_AT_ONCE", keys
        )  # the name is the function's
        got = hw.logprobs(logits, top=20)
        assert same_bits(got.top_tokens, want.top_tokens), keys
        assert same_bits(got.top_logprobs, want.top_logprobs), keys
    assert same_bits(want.top_tokens, np.argsort(-logits, axis=-1, kind="stable")[:, :20])
