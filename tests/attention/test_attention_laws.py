"""The contract of bits for attention: what a row's result may depend on, and what not. Every == here is of bits."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CHUNK, DTYPES, LAYOUTS, UNIT, laid_out, normal, same_bits, wide

import headway as hw

SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.sampled_from([1, 2, 15, 16, 17, 33, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 5 * CHUNK + 40])
WIDTHS = st.sampled_from([1, 7, 16, 17, 64])


def arrays(
    seed: int,
    L: int,
    S: int,
    D: int,
    E: int,
    dtype: str = "float32",
    H: int = 4,
    G: int = 2,
    batch: tuple[int, ...] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(seed)
    shapes = [(H, L, D), (G, S, D), (G, S, E)]
    q, k, v = (normal(rng, *batch, *shape, dtype=dtype) for shape in shapes)
    return q, k, v, rng


# The other rows, heads and batch items ---------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 130), LENGTHS, WIDTHS, WIDTHS, st.sampled_from(list(DTYPES)), st.data())
@settings(max_examples=100)
def test_a_row_does_not_depend_on_the_other_rows(
    seed: int, L: int, S: int, D: int, E: int, dtype: str, data: st.DataObject
) -> None:
    q, k, v, rng = arrays(seed, L, S, D, E, dtype)
    mask, bias = rng.random((4, L, S)) < 0.7, normal(rng, 4, L, S)
    options = data.draw(st.sampled_from([{}, {"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}]))
    whole = hw.attention(q, k, v, return_lse=True, **options)
    rows = np.flatnonzero(rng.random(L) < 0.3) if data.draw(st.booleans()) else np.array([rng.integers(L)])
    some = hw.attention(q[:, rows], k, v, return_lse=True, **{n: x[:, rows] for n, x in options.items()})
    assert same_bits(some, tuple(x[:, rows] for x in whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [1, 5, 97])
def test_a_head_and_a_batch_item_do_not_depend_on_the_others(dtype: str, L: int) -> None:
    q, k, v, _ = arrays(1, L, CHUNK + 30, 24, 20, dtype, H=6, G=3, batch=(2, 2))
    lengths = np.array([[CHUNK + 30, 5], [CHUNK, 77]])
    options: dict[str, Any] = {"causal": "bottom_right", "window": (400, 0), "softcap": 3.0}
    whole = hw.attention(q, k, v, kv_lengths=lengths, **options)
    weights = hw.attention_weights(q, k, kv_lengths=lengths, **options)
    for b in np.ndindex(2, 2):
        for h in range(6):
            g = slice(h // 2, h // 2 + 1)
            alone = q[b][h : h + 1], k[b][g]
            assert same_bits(hw.attention(*alone, v[b][g], kv_lengths=lengths[b], **options)[0], whole[b][h])
            assert same_bits(hw.attention_weights(*alone, kv_lengths=lengths[b], **options)[0], weights[b][h])


def test_a_broadcast_batch_is_the_repeated_one() -> None:
    q, k, v, _ = arrays(2, 9, 40, 16, 16, batch=(3,))
    want = hw.attention(q, np.repeat(k[:1], 3, 0), np.repeat(v[:1], 3, 0))
    assert same_bits(hw.attention(q, k[0], v[:1]), want)
    assert same_bits(hw.attention(q, np.broadcast_to(k[0], (3, *k.shape[1:])), v[0]), want)


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 37])
def test_strides_do_not_matter(dtype: str, D: int) -> None:
    q, k, v, rng = arrays(3, 50, CHUNK + 60, D, D, dtype, batch=(2,))
    mask, bias = rng.random((2, 4, 50, CHUNK + 60)) < 0.7, normal(rng, 2, 4, 50, CHUNK + 60)
    want = hw.attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    weights = hw.attention_weights(q, k, mask=mask, bias=bias)
    for layout in LAYOUTS:
        Q, K, V, M, B = (laid_out(x, layout) for x in (q, k, v, mask, bias))
        assert same_bits(hw.attention(Q, K, V, mask=M, bias=B, return_lse=True), want), layout
        assert same_bits(hw.attention_weights(Q, K, mask=M, bias=B), weights), layout


def unaligned(x: np.ndarray) -> np.ndarray:
    """The same numbers, one byte off."""
    y = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    y[...] = x
    assert not y.flags.aligned
    return y


def inside_records(x: np.ndarray) -> np.ndarray:
    """The same numbers with strides that are no multiple of their size."""
    records = np.zeros(x.shape[:-1], dtype=[("flag", "i1"), ("x", x.dtype, x.shape[-1:])])
    records["x"] = x
    return records["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_no_kernel_can_address_is_copied(dtype: str) -> None:
    q, k, v, _ = arrays(10, 7, 40, 16, 9, dtype)
    want = hw.attention(q, k, v)
    assert same_bits(hw.attention(*map(unaligned, (q, k, v))), want)
    assert same_bits(hw.attention(*map(inside_records, (q, k, v))), want)
    if dtype != "bfloat16":
        assert same_bits(hw.attention(*(x.astype(x.dtype.newbyteorder()) for x in (q, k, v))), want)


def test_eight_leading_axes() -> None:
    q, k, v, _ = arrays(11, 3, 9, 8, 8, batch=(2, 3))
    deep = (
        q.reshape(1, 2, 1, 1, 3, 1, 1, 1, 4, 3, 8),
        k.reshape(2, 1, 1, 3, 1, 1, 1, 2, 9, 8),
        v[:, None, None, :, None, None, None],
    )
    assert same_bits(hw.attention(*deep).reshape(2, 3, 4, 3, 8), hw.attention(q, k, v))


def test_all_operands_may_be_one_array_with_stride_zero() -> None:
    row = normal(np.random.default_rng(4), 8)
    x = np.broadcast_to(row, (2, 20, 8))
    assert same_bits(hw.attention(x, x, x), hw.attention(*(x.copy() for _ in range(3))))


def test_inputs_are_not_written_to() -> None:
    q, k, v, rng = arrays(5, 10, 20, 8, 8)
    mask, bias = rng.random((10, 20)) < 0.5, normal(rng, 10, 20)
    given_arrays = (q, k, v, mask, bias)
    before = [x.copy() for x in given_arrays]
    for x in given_arrays:
        x.flags.writeable = False
    hw.attention(q, k, v, mask=mask, bias=bias)
    assert all(same_bits(x, y) for x, y in zip(given_arrays, before, strict=True))


# What a key that may not be attended to can do: nothing -----------------------------------------------------------


@given(SEEDS, st.integers(1, 40), LENGTHS, WIDTHS, st.sampled_from(list(DTYPES)), st.data())
@settings(max_examples=150)
def test_masked_keys_may_hold_anything(seed: int, L: int, S: int, D: int, dtype: str, data: st.DataObject) -> None:
    q, k, v, rng = arrays(seed, L, S, D, D, dtype)
    how = data.draw(st.sampled_from(["mask", "bias", "kv_lengths", "causal", "window", "columns"]))
    poison = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, 6e4]))
    options: dict[str, Any] = {}
    columns = rng.random(S) < 0.5  # keys that no row may attend to
    if how == "mask":
        options["mask"] = (rng.random((4, L, S)) < 0.6) & ~columns
    elif how == "columns":
        options["mask"] = np.broadcast_to(~columns, (4, L, S))
    elif how == "bias":
        options["bias"] = np.where(columns | (rng.random((L, S)) < 0.4), -np.inf, normal(rng, L, S)).astype(np.float32)
    elif how == "kv_lengths":
        n = int(rng.integers(0, S + 1))
        options["kv_lengths"], columns = n, np.arange(S) >= n
    elif how == "causal":
        options["causal"], columns = "top_left", np.arange(S) >= L
    else:
        options.update(causal="bottom_right", window=(2, 0))
        columns = np.arange(S) < S - L - 2
    other_k, other_v = k.copy(), v.copy()
    other_k[:, columns] = poison
    other_v[:, columns] = poison
    want = hw.attention(q, k, v, return_lse=True, **options)
    assert same_bits(hw.attention(q, other_k, other_v, return_lse=True, **options), want)
    assert same_bits(hw.attention_weights(q, other_k, **options), hw.attention_weights(q, k, **options))
    if "mask" in options:  # nor may the bias there
        bias = normal(rng, 4, L, S)
        other = np.where(options["mask"], bias, np.float32(poison))
        assert same_bits(hw.attention(q, k, v, bias=other, **options), hw.attention(q, k, v, bias=bias, **options))


@pytest.mark.parametrize("at", [1, 13, 28, 29, 30, 31, 58])
def test_a_poisoned_key_reaches_only_the_rows_that_may_attend_to_it(at: int) -> None:
    """Within one block of rows, and wherever the tile's border is, some see the NaN and some must not."""
    q, k, v, _ = arrays(6, 60, 60, 16, 16)
    want = hw.attention(q, k, v, causal=True)
    for poisoned in (k, v):
        x = poisoned.copy()
        x[:, at, 3] = np.nan
        out = hw.attention(q, *((x, v) if poisoned is k else (k, x)), causal=True)
        assert same_bits(out[:, :at], want[:, :at])
        assert np.isnan(out[:, at:, 3]).all()


@given(SEEDS, st.integers(1, 20), LENGTHS, LENGTHS, st.sampled_from(["kv_lengths", "mask", "bias", "causal"]))
@settings(max_examples=100)
def test_more_keys_that_are_masked_change_nothing(seed: int, L: int, S: int, more: int, how: str) -> None:
    q, k, v, rng = arrays(seed, L, S, 16, 16)
    K, V = (np.concatenate([x, normal(rng, 2, more, 16) * 1e6], axis=1) for x in (k, v))
    extended: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if how == "kv_lengths":
        extended["kv_lengths"] = S
    elif how == "mask":
        extended["mask"] = np.arange(S + more) < S
    elif how == "bias":
        extended["bias"] = np.where(np.arange(S + more) < S, 0.0, -np.inf)
    else:
        options["causal"] = "top_left"
        extended["kv_lengths"] = S
    want = hw.attention(q, k, v, return_lse=True, **options)
    assert same_bits(hw.attention(q, K, V, return_lse=True, **options, **extended), want)


@given(SEEDS, st.integers(1, 70), LENGTHS, st.sampled_from(list(DTYPES)), st.booleans())
@settings(max_examples=100)
def test_every_rule_is_the_mask_that_it_stands_for(seed: int, L: int, S: int, dtype: str, square: bool) -> None:
    if square:
        S = L
    q, k, v, rng = arrays(seed, L, S, 16, 9, dtype)
    i, j = np.arange(L)[:, None], np.arange(S)
    n = int(rng.integers(0, S + 1))

    def same(equivalent: Any, **options: Any) -> bool:
        want = hw.attention(q, k, v, mask=equivalent, return_lse=True)
        return same_bits(hw.attention(q, k, v, return_lse=True, **options), want)

    assert same(None, mask=np.ones((L, S)))
    assert same(None, bias=np.zeros(S))
    assert same(j <= i, causal="top_left")
    assert same(j <= i + S - L, causal="bottom_right")
    assert same(j < n, kv_lengths=n)
    assert same((j <= i + n - L) & (j < n), kv_lengths=n, causal="bottom_right")
    assert same((j <= i) & (j >= i - 5), causal="top_left", window=(5, None))
    assert same((j <= i + S - L) & (j >= i + S - L - 5), causal="bottom_right", window=(5, 3))
    holes = rng.random((L, S)) < 0.5
    assert same(holes, bias=np.where(holes, 0, -np.inf))
    assert same(holes & (j <= i), mask=holes.astype(int), causal="top_left")
    if L == S:
        assert same(None, window=(None, None))
        assert same(abs(i - j) <= 3, window=(3, 3))
        assert same((j >= i - 2) & (j <= i + 5) & (j < n), window=(2, 5), kv_lengths=n)
        assert same(j <= i, causal=True)


@given(SEEDS, st.sampled_from([1, 7, 30, 200]), LENGTHS, st.sampled_from(list(DTYPES)), st.floats(0.05, 0.9))
@settings(max_examples=60)
def test_stretches_that_a_mask_leaves_out(seed: int, L: int, S: int, dtype: str, density: float) -> None:
    """Blocks of a mask's zeros, as documents packed into one sequence have: passed over, whatever lies there."""
    q, k, v, rng = arrays(seed, L, S, 20, 16, dtype)
    blocks = rng.random((2, -(-L // 11), -(-S // 64))) < density
    mask = blocks.repeat(11, 1).repeat(64, 2)[:, :L, :S].repeat(2, 0)
    want = hw.attention(q, k, v, bias=np.where(mask, 0, -np.inf), return_lse=True)
    assert same_bits(hw.attention(q, k, v, mask=mask, return_lse=True), want)
    assert same_bits(hw.attention(q, k, v, mask=np.asfortranarray(mask), return_lse=True), want)
    nobody = ~mask.reshape(2, 2, L, S).any((1, 2))  # keys that no row of the group may attend to
    k[nobody], v[nobody] = np.nan, np.inf
    assert same_bits(hw.attention(q, k, v, mask=mask, return_lse=True), want)


# NaN and zero -------------------------------------------------------------------------------------------------------

THE_NAN = {"float64": 0x7FF8 << 48, "float32": 0x7FC0 << 16, "float16": 0x7E00, "bfloat16": 0x7FC0}
WORDS = {"float64": np.uint64, "float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


@given(
    SEEDS,
    st.sampled_from([5, 25, 100, 200]),
    st.sampled_from([60, 100, 300, CHUNK + 80]),
    st.sampled_from([9, 20, 64]),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.sampled_from([{}, {"causal": "top_left"}, {"causal": "bottom_right", "window": (30, 9)}]),
)
@settings(max_examples=60)
def test_masks_with_other_rules_hide_whatever_keys_hold(
    seed: int, L: int, S: int, E: int, dtype: str, layout: str, as_bias: bool, rules: dict[str, Any]
) -> None:
    """Rows that reach different keys, values that are copied or not, and the memory of earlier calls: all the same."""
    q, k, v, rng = arrays(seed, L, S, 16, E, dtype)
    hidden = np.arange(S) == rng.integers(S)  # a single one, which few rows come across
    may = ~hidden & (np.repeat(rng.random((L, -(-S // 64))) < 0.7, 64, -1)[:, :S])
    options = {**rules, **({"bias": np.where(may, 0, -np.inf).astype(np.float32)} if as_bias else {"mask": may})}
    poisoned = v.copy()
    poisoned[:, hidden] = np.nan
    v, poisoned = laid_out(v, layout), laid_out(poisoned, layout)
    for _ in range(2):
        want = hw.attention(q, k, v, **options)
        assert same_bits(hw.attention(q, k, poisoned, **options), want)


def nans(dtype: str, sign: int, payload: int) -> np.ndarray:
    bits = THE_NAN[dtype] | payload | sign << (8 * np.dtype(DTYPES[dtype]).itemsize - 1)
    return np.full((2, 3, 8), bits, WORDS[dtype]).view(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sign", "payload"), [(0, 0), (1, 0), (0, 5), (1, 9)])
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_there_is_one_nan(dtype: str, sign: int, payload: int) -> None:
    """Which NaN an operation passes on differs between processors, so all become one."""
    nan, x = nans(dtype, sign, payload), np.ones((2, 3, 8), DTYPES[dtype])
    results = [
        *hw.attention(nan, x, x, return_lse=True),
        hw.attention(x, nan, x),
        hw.attention(x, x, nan),
        hw.attention(x, x / DTYPES[dtype](0), x),  # made on the way: inf - inf
        hw.attention_weights(nan, x),
        hw.merge_attention([hw.partial_attention(x, x, nan)]),
        hw.linear(nan, x[0, 0][:, None] * x[0, 0]),
        hw.linear(x, nan[0].T),
        hw.rotary(nan),
        hw.rms_norm(nan, x[0, 0]),
        hw.swiglu(nan, x),
        hw.swiglu(x, nan),
    ]
    for i, result in enumerate(results):
        kind = {np.dtype(t): name for name, t in DTYPES.items()}[result.dtype]
        assert (result.view(WORDS[kind]) == THE_NAN[kind]).all(), i


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_is_no_negative_zero(dtype: str) -> None:
    """The sign of a zero sum depends on what was added before it, masked keys included."""
    x = np.zeros((1, 3, 8), dtype)
    v = x.copy()
    v[:, 0] = -np.finfo(dtype).smallest_subnormal
    for out in (hw.attention(x, x, v), hw.merge_attention([hw.partial_attention(x, x, v)])):
        assert (out == 0).all()  # a third of the smallest number there is
        assert not np.signbit(out).any()
    assert not np.signbit(hw.attention(x, x, -x)).any()
    assert not np.signbit(hw.attention(x, x, v, mask=np.zeros(3, bool))).any()


# A split of the keys ------------------------------------------------------------------------------------------------


@given(SEEDS, st.integers(1, 20), st.integers(1, 9 * CHUNK), st.sampled_from(list(DTYPES)), st.data())
@settings(max_examples=150)
def test_parts_merge_to_the_bits_of_the_whole(seed: int, L: int, S: int, dtype: str, data: st.DataObject) -> None:
    q, k, v, rng = arrays(seed, L, S, 16, 9, dtype, batch=(2,))
    causal = data.draw(st.sampled_from([None, "top_left", "bottom_right"]))
    options: dict[str, Any] = {"causal": causal, "softcap": data.draw(st.sampled_from([None, 2.0]))}
    if causal and data.draw(st.booleans()):
        options["window"] = (data.draw(st.sampled_from([0, 30, 3 * CHUNK])), None)
    if causal == "bottom_right" or data.draw(st.booleans()):
        options["kv_lengths"] = rng.integers(0, S + 1, 2)
    across: dict[str, Any] = {}  # what is cut with the keys
    if data.draw(st.booleans()):
        across["mask"] = rng.random((4, L, S)) < 0.8
    if data.draw(st.booleans()):
        across["bias"] = np.where(rng.random((L, S)) < 0.2, -np.inf, rng.normal(size=(L, S)))
    sinks = data.draw(st.sampled_from([None, normal(rng, 4)]))
    want = hw.attention(q, k, v, sinks=sinks, return_lse=True, **options, **across)

    chunks = -(-S // CHUNK)
    cuts = sorted({0, chunks, *data.draw(st.lists(st.integers(0, chunks), max_size=4))})
    states = []
    for a, b in pairwise(cuts):
        part = slice(a * CHUNK, min(b * CHUNK, S))
        cut = {n: x[..., part] for n, x in across.items()}
        states.append(hw.partial_attention(q, k[..., part, :], v[..., part, :], key_offset=a * CHUNK, **options, **cut))
    order = rng.permutation(len(states))
    got = hw.merge_attention([pickle.loads(pickle.dumps(states[i])) for i in order], sinks=sinks, return_lse=True)
    assert same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mask", "bias", "causal", "window", "kv_lengths", "all"])
def test_a_state_holds_nothing_for_rows_without_keys(how: str, dtype: str, keep_threads: None) -> None:
    """Whatever the memory that it was computed in held before; node by node."""
    hw.set_num_threads(1)
    L, S, first = 40, 3 * CHUNK + 9, CHUNK
    q, k, v, rng = arrays(12, L, S, 16, 9, dtype)
    position = np.arange(first, first + S)
    rows = rng.random((4, L)) < 0.5
    options: dict[str, Any] = {
        "mask": {"mask": np.broadcast_to(rows[..., None] & (position < first + CHUNK), (4, L, S))},
        "bias": {"bias": np.where(rows[..., None], 0, -np.inf) + np.zeros(S)},
        "causal": {"causal": "top_left"},
        "window": {"causal": "bottom_right", "kv_lengths": first + CHUNK + 20, "window": (25, 0)},
        "kv_lengths": {"kv_lengths": first + CHUNK},
        "all": {"mask": np.zeros(S, bool)},
    }[how]
    for poison in (np.nan, 7.0):  # what the memory of the next call holds
        hw.partial_attention(q, k, np.full_like(v, poison), key_offset=first)
        state = hw.partial_attention(q, k, v, key_offset=first, **options)
        nothing = np.isneginf(state.maximum)
        assert nothing.any()
        assert nothing.all() == (how in ("all", "causal"))
        assert not state.total_weight[nothing].any()
        assert not state.weighted_sum[nothing].any()
        assert state.total_weight[~nothing].all()
        again = hw.partial_attention(q, k, v, key_offset=first, **options)
        for name in ("maximum", "total_weight", "weighted_sum"):
            assert same_bits(getattr(again, name), getattr(state, name))


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17])
def test_the_nodes_of_a_part_are_the_largest_that_it_fills(first: int) -> None:
    """They begin at multiples of their sizes, which are powers of two."""
    one = np.ones((1, 1, 1), np.float32)
    for count in range(1, 20):
        keys = np.ones((1, (count - 1) * CHUNK + 1, 1), np.float32)
        state = hw.partial_attention(one, keys, keys, key_offset=first * CHUNK)
        want, at, end = [], first, first + count
        while at < end:
            size = max(2**n for n in range(6) if at % 2**n == 0 and at + 2**n <= end)
            want.append(at)
            assert (
                state.total_weight[len(want) - 1] == min(at + size, end - 1) * CHUNK + (at + size == end) - at * CHUNK
            )
            at += size
        assert list(state.chunks) == want


def test_parts_of_no_keys_and_a_generator_of_states() -> None:
    q, k, v, _ = arrays(7, 3, CHUNK + 9, 8, 8)
    bounds = [(0, 0), (0, CHUNK), (CHUNK, CHUNK), (CHUNK, CHUNK + 9)]
    states = (hw.partial_attention(q, k[:, a:b], v[:, a:b], key_offset=a) for a, b in bounds)
    assert same_bits(hw.merge_attention(states), hw.attention(q, k, v))
    nothing = hw.partial_attention(q, k[:, :0], v[:, :0])
    out, lse = hw.merge_attention([nothing], return_lse=True)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_a_state_is_small() -> None:
    """A part hands on a few nodes of the tree, however many chunks it holds."""
    q, k, v, _ = arrays(8, 1, 64 * CHUNK, 4, 4, H=1, G=1)
    part = slice(3 * CHUNK, None)
    assert len(pickle.dumps(hw.partial_attention(q, k[:, part], v[:, part], key_offset=3 * CHUNK))) < 2000


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_with_infinite_scores_merge_up_to_rounding(dtype: str) -> None:
    """The whole computes such rows again with more range, parts do not (A41): the one difference that merging makes."""
    q, k, v, _ = arrays(10, 5, CHUNK + 300, 8, 8, dtype)
    k[:, [3, CHUNK + 7], 0] = np.inf  # for some rows a score of -inf, which has weight 0, for the others +inf: NaN
    parts = [(k[:, s], v[:, s], s.start) for s in (slice(0, CHUNK), slice(CHUNK, None))]
    states = [hw.partial_attention(q, keys, values, key_offset=start) for keys, values, start in parts]
    want, got = hw.attention(q, k, v, return_lse=True), hw.merge_attention(states, return_lse=True)
    for whole, merged, type_ in zip(want, got, (dtype, "float64" if dtype == "float64" else "float32"), strict=True):
        assert np.array_equal(np.isnan(whole), np.isnan(merged))
        assert 0 < np.isnan(whole).mean() < 1
        assert np.nanmax(np.abs(wide(whole) - wide(merged))) <= 8 * UNIT[type_] * np.nanmax(np.abs(wide(whole)))


def test_partial_results_of_other_libraries_merge_up_to_rounding() -> None:
    q, k, v, _ = arrays(9, 5, CHUNK + 300, 16, 16)
    want, want_lse = hw.attention(q, k, v, return_lse=True)
    first, second = (hw.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(200), slice(200, None)))
    states = [hw.AttentionState.from_lse(*first), hw.AttentionState.from_lse(*second)]
    out, lse = hw.merge_attention(states, return_lse=True)
    assert np.max(np.abs(out - want)) < 8 * 2.0**-24 * np.max(np.abs(v))
    assert np.max(np.abs(lse - want_lse)) < 8 * 2.0**-24 * np.max(np.abs(want_lse))
    empty = hw.AttentionState.from_lse(np.zeros_like(out), np.full_like(lse, -np.inf))
    assert same_bits(hw.merge_attention([states[0], empty], return_lse=True)[1], first[1])
    own = hw.partial_attention(q, k[:, CHUNK:], v[:, CHUNK:], key_offset=CHUNK)
    rest = hw.AttentionState.from_lse(*hw.attention(q, k[:, :CHUNK], v[:, :CHUNK], return_lse=True))
    assert np.max(np.abs(hw.merge_attention([own, rest]) - want)) < 8 * 2.0**-24 * np.max(np.abs(v))
