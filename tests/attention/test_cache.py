"""hw.KVCache: decoding token by token gives the bits of one prefill, and the cache is a value with no surprises."""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import pickle
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CHUNK, DTYPES, LAYOUTS, laid_out, normal, same_bits, wide

import headway as hw


def filled(S: int, dtype: str = "float32", batch: tuple[int, ...] = (), D: int = 16, E: int = 9) -> Any:
    rng = np.random.default_rng(S)
    q, k, v = (normal(rng, *batch, h, S, w, dtype=dtype) for h, w in ((4, D), (2, D), (2, E)))
    return q, k, v, hw.KVCache(2, D, value_dim=E, batch_shape=batch, dtype=DTYPES[dtype])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 16, 17, 100, CHUNK, CHUNK + 1, 2 * CHUNK + 70]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from([(), (2,), (2, 1)]),
    st.sampled_from([1, 5, 16, 33]),
    st.sampled_from([{}, {"window": (40, 0)}, {"window": (700, None), "softcap": 3.0}]),
)
@settings(max_examples=120)
def test_decoding_in_pieces_is_the_prefill(
    seed: int, S: int, dtype: str, batch: tuple[int, ...], D: int, options: dict[str, Any]
) -> None:
    q, k, v, cache = filled(S, dtype, batch, D)
    rng = np.random.default_rng(seed)
    sinks = normal(rng, 4, dtype=dtype)
    want = hw.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, **options)
    at = 0
    while at < S:
        end = min(S, at + int(rng.choice([1, 1, 2, 3, 15, 16, 31, CHUNK - 1, CHUNK])))
        cache.append(k[..., at:end, :], v[..., at:end, :])
        got = cache.attend(q[..., at:end, :], sinks=sinks, return_lse=True, **options)
        assert same_bits(got, (want[0][..., at:end, :], want[1][..., at:end]))
        at = end
    assert len(cache) == S
    assert same_bits(cache.attend(q, sinks=sinks, return_lse=True, **options), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_token_across_a_chunk_boundary(dtype: str) -> None:
    q, k, v, cache = filled(CHUNK + 20, dtype)
    want = hw.attention(q, k, v, causal=True)
    start = CHUNK - 20
    cache.append(k[:, :start], v[:, :start])
    for i in range(start, CHUNK + 20):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        assert same_bits(cache.attend(q[:, i : i + 1]), want[:, i : i + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_takes_the_options_of_attention(dtype: str) -> None:
    q, k, v, cache = filled(70, dtype, (2,))
    cache.append(k, v)
    rng = np.random.default_rng(1)
    for options in [
        {"causal": None},
        {"causal": "top_left"},
        {"causal": True},
        {"mask": rng.random((2, 4, 70, 70)) < 0.5, "causal": None},
        {"bias": normal(rng, 4, 70, 70), "scale": 0.3},
        {"kv_lengths": np.array([70, 33]), "window": (9, 0)},
    ]:
        want = hw.attention(q, k, v, return_lse=True, **{"causal": "bottom_right", **options})
        assert same_bits(cache.attend(q, return_lse=True, **options), want)


def test_keys_and_values_are_copies_of_what_went_in() -> None:
    for dtype in DTYPES:
        _, k, v, cache = filled(37, dtype, (2,))
        for layout in LAYOUTS:
            cache.truncate(0)
            cache.append(laid_out(k, layout), laid_out(v, layout))
            assert same_bits(cache.keys, k)
            assert same_bits(cache.values, v)
        cache.keys[...] = 0
        cache.values[...] = 0
        assert same_bits(cache.keys, k)
        assert same_bits(cache.values, v)


def test_the_cache_keeps_no_reference_to_its_input() -> None:
    _, k, v, cache = filled(5)
    kept = k.copy()
    cache.append(k, v)
    k[:] = np.nan
    assert same_bits(cache.keys, kept)


def test_what_goes_in_is_rounded_once_to_the_caches_type() -> None:
    _, k, v, _ = filled(20, "float64")
    for dtype in DTYPES:
        cache = hw.KVCache(2, 16, value_dim=9, dtype=DTYPES[dtype])
        cache.append(k, v)
        assert same_bits(cache.keys, k.astype(DTYPES[dtype]))
        assert same_bits(cache.values, v.astype(DTYPES[dtype]))
    by_name = hw.KVCache(2, 16, value_dim=9, dtype="float16")
    by_name.append(k.tolist(), v.tolist())
    assert same_bits(by_name.keys, k.astype(np.float16))


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7), ("float32", 23)])
def test_narrowing_does_not_round_twice(dtype: str, bits: int) -> None:
    """Just above the middle of two numbers; rounded to float32 first, it would be the middle, and go to even."""
    above = 1 + 2.0 ** -(bits + 1) + 2.0**-50
    x = np.array([above, -above, 2 - above, above * 2.0**-13, 1e300, -1e300, np.inf, np.nan, 1e-300, -0.0]).reshape(
        1, 1, -1
    )
    cache = hw.KVCache(1, 10, dtype=dtype)
    cache.append(x, x)
    up, down = 1 + 2.0**-bits, 1 - 2.0 ** -(bits + 1)
    want = [up, -up, down, up * 2.0**-13, np.inf, -np.inf, np.inf, np.nan, 0, 0]
    assert np.array_equal(wide(cache.keys)[0, 0], want, equal_nan=True)


def test_narrow_keys_under_wide_queries_compute_as_attention_does() -> None:
    q, k, v, _ = filled(40, "float64")
    for dtype in DTYPES:
        cache = hw.KVCache(2, 16, value_dim=9, dtype=DTYPES[dtype])
        cache.append(k, v)
        assert same_bits(cache.attend(q), hw.attention(q, cache.keys, cache.values, causal=True))


def test_capacity_only_makes_room() -> None:
    q, k, v, _ = filled(CHUNK + 50)
    outs = []
    for capacity in (None, 0, 1, 17, 5000):
        cache = hw.KVCache(2, 16, value_dim=9, capacity=capacity)
        assert len(cache) == 0
        cache.append(k, v)
        outs.append(cache.attend(q))
    assert all(same_bits(out, outs[0]) for out in outs)


def test_truncate_and_go_on() -> None:
    """What was forgotten leaves no trace, NaN included."""
    q, k, v, cache = filled(100)
    want = hw.attention(q, k, v, causal=True)
    cache.append(k[:, :37], v[:, :37])
    cache.append(np.full((2, 50, 16), np.nan), np.full((2, 50, 9), np.nan))
    cache.truncate(37)
    assert len(cache) == 37
    assert same_bits(cache.attend(q[:, 30:37]), want[:, 30:37])
    cache.append(k[:, 37:], v[:, 37:])
    assert same_bits(cache.attend(q), want)
    cache.truncate(100)
    assert len(cache) == 100
    cache.truncate(0)
    assert cache.keys.shape == (2, 0, 16)


def test_forks_share_the_past_and_nothing_else() -> None:
    q, k, v, cache = filled(60)
    cache.append(k[:, :40], v[:, :40])
    first, second = cache.fork(), cache.fork()
    first.append(k[:, 40:], v[:, 40:])
    second.append(k[:, 40:] * 2, v[:, 40:] * 2)
    cache.truncate(30)
    cache.append(v[..., :1, :1].repeat(16, -1), v[:, :1])
    assert (len(cache), len(first), len(second)) == (31, 60, 60)
    assert same_bits(first.attend(q), hw.attention(q, k, v, causal=True))
    doubled = [np.concatenate([x[:, :40], x[:, 40:] * 2], axis=1) for x in (k, v)]
    assert same_bits(second.attend(q), hw.attention(q, *doubled, causal=True))
    assert same_bits(cache.keys[:, :30], k[:, :30])
    grandchild = first.fork()
    grandchild.truncate(50)
    grandchild.append(k[:, :1], v[:, :1])
    assert same_bits(first.keys, k)


def test_a_fork_taken_in_the_middle_of_a_panel_may_be_written_from_both_sides() -> None:
    _, k, v, cache = filled(20)
    cache.append(k[:, :10], v[:, :10])
    twin = cache.fork()
    for i in range(10, 20):
        cache.append(k[:, i : i + 1], v[:, i : i + 1])
        twin.append(-k[:, i : i + 1], -v[:, i : i + 1])
    assert same_bits(cache.keys, k)
    assert same_bits(twin.keys[:, 10:], -k[:, 10:])


def test_an_empty_cache_gives_0() -> None:
    q, _, _, cache = filled(3)
    out, lse = cache.attend(q, return_lse=True)
    assert out.shape == (4, 3, 9)
    assert (out == 0).all()
    assert np.isneginf(lse).all()
    cache.append(np.zeros((2, 0, 16)), np.zeros((2, 0, 9)))
    assert len(cache) == 0
    assert bool(cache) in (True, False)


def test_copies_and_pickles() -> None:
    q, k, v, cache = filled(30)
    cache.append(k, v)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        twin.append(k[:, :1], v[:, :1])
        assert (len(cache), len(twin)) == (30, 31)
        assert same_bits(twin.keys[:, :30], k)
    assert same_bits(cache.attend(q), hw.attention(q, k, v, causal=True))


def test_a_refused_append_changes_nothing() -> None:
    _, k, v, cache = filled(10)
    cache.append(k, v)
    for bad in [(k[:, :3], v[:, :2]), (k[..., :3], v), (k[:1], v[:1]), (k[0], v[0]), (k.astype(complex), v)]:
        with pytest.raises((TypeError, ValueError), match=r"^(k|v): expected"):
            cache.append(*bad)
        assert same_bits(cache.keys, k)
        assert same_bits(cache.values, v)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_kv_heads": 0}, r"num_kv_heads: expected an integer from 1 to 16777216, got 0"),
        ({"head_dim": 2.0}, r"head_dim: expected an integer from 1 to 65536, got 2.0"),
        ({"value_dim": -1}, r"value_dim: expected .*, got -1"),
        ({"batch_shape": (2, -1)}, r"batch_shape: expected .*, got -1"),
        ({"dtype": "int8"}, r"dtype: expected one of float64, float32, float16, bfloat16, got 'int8'"),
        ({"dtype": complex}, r"dtype: expected one of"),
        ({"dtype": None}, r"dtype: expected one of .*, got None"),
        ({"batch_shape": 3}, r"batch_shape: expected a tuple of integers, got 3"),
        ({"capacity": -3}, r"capacity: expected an integer .*, got -3"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        hw.KVCache(**{"num_kv_heads": 2, "head_dim": 8, **arguments})


def test_truncate_checks_its_length() -> None:
    cache = hw.KVCache(1, 4)
    cache.append(np.zeros((1, 3, 4)), np.zeros((1, 3, 4)))
    for bad in (4, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="length: expected an integer from 0 to 3"):
            cache.truncate(bad)
    assert len(cache) == 3


def test_growth_is_by_doubling() -> None:
    """Appending token by token copies each token a few times, not S times."""
    cache = hw.KVCache(1, 8)
    addresses = set()
    token = np.ones((1, 1, 8), np.float32)
    for _ in range(3000):
        cache.append(token, token)
        addresses.add(cache._values.__array_interface__["data"][0])
    assert len(addresses) <= 12
    assert np.array_equal(wide(cache.keys), np.ones((1, 3000, 8)))


def test_copying_is_forking():
    cache = hw.KVCache(1, 1)
    cache.append([[[1.0]]], [[[1.0]]])
    twin = copy.copy(cache)
    cache.append([[[7.0]]], [[[7.0]]])
    twin.append([[[-5.0]]], [[[-5.0]]])
    assert cache.values.ravel().tolist() == [1, 7]
    assert twin.keys.ravel().tolist() == [1, -5]


def test_growth_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    cache = hw.KVCache(1, 4, capacity=64)
    k, v = np.random.default_rng(0).normal(size=(2, 1, 64, 4)).astype(np.float32)
    cache.append(k, v)
    zeros, calls = np.zeros, []

    def second_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return zeros(*arguments, **options)

    monkeypatch.setattr(np, "zeros", second_fails)
    with pytest.raises(MemoryError):
        cache.append(k[:, :1], v[:, :1])
    monkeypatch.undo()
    assert len(cache) == 64
    np.testing.assert_array_equal(cache.keys, k)
    np.testing.assert_array_equal(cache.values, v)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowing_beside_every_middle(dtype: str) -> None:
    """Of all numbers that rounding to float32 on the way would move onto a tie, from either side, and of the ties."""
    kind = DTYPES[dtype]
    infinity = int(np.array(np.inf, kind).view(np.uint16))
    numbers = wide(np.arange(infinity, dtype=np.uint16).view(kind))  # 0 and all that is positive and finite
    numbers = np.append(numbers, 2 * numbers[-1] - numbers[-2])  # what would follow: it rounds to infinity
    middle = (numbers[:-1] + numbers[1:]) / 2
    below, above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    assert (below.astype(np.float32) == middle.astype(np.float32)).mean() > 0.9
    numbers[-1] = np.inf
    even = np.arange(len(middle)) % 2 == 0
    given = np.concatenate([below, middle, above])
    want = np.concatenate([numbers[:-1], np.where(even, numbers[:-1], numbers[1:]), numbers[1:]])
    given, want = np.concatenate([given, -given]), np.concatenate([want, -want])
    cache = hw.KVCache(1, 2, dtype=dtype)
    cache.append(given.reshape(1, -1, 2), given.reshape(1, -1, 2))
    assert np.array_equal(wide(cache.keys).ravel(), want)
    assert np.array_equal(wide(cache.values).ravel(), want)


@pytest.mark.parametrize("batch", [(0,), (0, 3), (2, 0)])
def test_a_batch_without_items(batch: tuple[int, ...]) -> None:
    cache = hw.KVCache(1, 5, batch_shape=batch)
    for n in (0, 3, 20):
        cache.truncate(0)
        cache.append(np.zeros((*batch, 1, n, 5)), np.zeros((*batch, 1, n, 5)))
        assert cache.keys.shape == cache.values.shape == (*batch, 1, n, 5)
        out, lse = cache.attend(np.zeros((*batch, 2, 4, 5)), return_lse=True)
        assert (out.shape, lse.shape) == ((*batch, 2, 4, 5), (*batch, 2, 4))
        assert len(cache.fork()) == n


# A44: one thread at a time -------------------------------------------------------------------------------------------


CALLS: dict[str, Any] = {
    "append": lambda cache: cache.append(np.ones((2, 1, 16)), np.ones((2, 1, 9))),
    "attend": lambda cache: cache.attend(np.ones((4, 1, 16))),
    "truncate": lambda cache: cache.truncate(1),
    "fork": lambda cache: cache.fork(),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "keys": lambda cache: cache.keys,
    "values": lambda cache: cache.values,
}


@pytest.mark.parametrize("name", CALLS)
def test_a44_where_two_calls_meet_the_second_is_an_error(name: str) -> None:
    q, k, v, cache = filled(40)
    cache.append(k, v)

    class Meets:
        """An array that is asked for while a call of the cache is under way."""

        def __array__(self, *_: Any, **__: Any) -> Any:
            with pytest.raises(RuntimeError, match=r"^KVCache: another call of this cache is under way"):
                CALLS[name](cache)
            return q

    want = hw.attention(q, k, v, causal=True)
    assert same_bits(cache.attend(Meets()), want)
    assert same_bits((cache.keys, cache.values), (k, v))
    CALLS[name](cache)  # and after it, it is none


def test_a44_a_long_call_in_another_thread() -> None:
    x = np.ones((1, 6000, 64), np.float32)
    cache = hw.KVCache(1, 64)
    cache.append(x, x)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(cache.attend, x)
        refused = 0
        while not running.done():
            try:
                cache.append(x[:, :1], x[:, :1])
            except RuntimeError:
                refused += 1
        running.result()
    assert refused
    assert not cache.keys[:, 6000:].size or len(cache) > 6000


def test_a44_no_append_is_lost_silently() -> None:
    cache = hw.KVCache(1, 4)

    def work(thread: int) -> int:
        done = 0
        for i in range(400):
            token = np.full((1, 1, 4), thread * 1000 + i, np.float32)
            with contextlib.suppress(RuntimeError):
                cache.append(token, token)
                done += 1
        return done

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            done = sum(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(cache) == done
    assert (cache.keys == cache.keys[..., :1]).all()
    assert len(np.unique(cache.keys[..., 0])) == done
    assert same_bits(cache.keys, cache.values)


def test_a44_forks_that_share_memory_may_be_used_by_threads_of_their_own() -> None:
    rng = np.random.default_rng(8)
    start = normal(rng, 1, 100, 4)
    cache = hw.KVCache(1, 4)
    cache.append(start, start)

    def work(job: tuple[Any, int]) -> bool:
        own, seed = job
        more = normal(np.random.default_rng(seed), 1, 60, 4)
        fine = True
        for i in range(60):
            own.append(more[:, i : i + 1], more[:, i : i + 1])
            branch = own.fork()
            branch.append(more[:, :1], more[:, :1])
            fine &= same_bits(branch.keys[:, -1:], more[:, :1])
            own.attend(more[:, :1])
        return fine and same_bits(own.keys, np.concatenate([start, more], axis=1))

    for _ in range(5):
        twins = [cache.fork() for _ in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, zip(twins, range(4), strict=True)))
    assert same_bits(cache.keys, start)
