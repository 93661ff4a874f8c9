"""The part "Around the draw" of docs/semantics.md, sentence by sentence: test_p7_... says that sentence P7 holds.

Small numbers on purpose: a sentence should be checkable by eye. test_penalties.py and its neighbours search widely.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway import _check, reference
from headway._sampling import penalties, rows
from headway._sampling.call import prepare
from headway._sampling.checks import Integers, Reals
from headway._sampling.settings import CHECKS as OPTION_CHECKS

NAN, INF = np.nan, np.inf
FOUR = [2.0, 1.0, -1.0, 0.0]
RNG = np.random.default_rng(3)
ROWS = (RNG.standard_normal((2, 3, 70)) * 2).astype(np.float32)


def test_every_sentence_has_a_test() -> None:
    document = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text()
    sentences = {int(n) for n in re.findall(r"^- \*\*P(\d+)\*\* ", document, re.MULTILINE)}
    tests = {int(m[1]) for name in globals() if (m := re.match(r"test_p(\d+)_", name))}
    assert len(sentences) >= 36
    assert sentences == set(range(1, len(sentences) + 1))
    assert tests == sentences


# Penalties ----------------------------------------------------------------------------------------------------------


def changed(logits: Any, token_ids: Any, **penalties: Any) -> list[float]:
    return hw.penalize(logits, token_ids, **penalties).tolist()


def dry(history: list[int], **options: Any) -> dict[int, float]:
    """What DRY subtracts from whose logit, with a multiplier of 1 and a base of 2."""
    new = hw.penalize([0.0] * 10, history, **{"dry_multiplier": 1.0, "dry_base": 2.0, **options})
    return {i: -float(x) for i, x in enumerate(new) if x}


def test_p1_shapes_and_types() -> None:
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        logits = ROWS.astype(dtype)
        before = logits.tobytes()
        new = hw.penalize(logits, np.zeros((2, 3, 1), int), repetition=2)
        assert (new.shape, new.dtype) == (logits.shape, np.float64 if dtype is np.float64 else np.float32)
        assert logits.tobytes() == before
        assert np.array_equal(new[..., 1:], logits[..., 1:])
    assert hw.penalize(np.zeros((0, 7)), []).shape == (0, 7)
    assert hw.penalize([0.0, 1.0], []).tolist() == [0.0, 1.0]


def test_p2_histories() -> None:
    logits = [FOUR] * 3
    lists = hw.penalize(logits, [[0, 0, 3], [], (1,)], presence=1)
    assert lists.tolist() == [[1, 1, -1, -1], FOUR, [2, 0, -1, 0]]
    padded = np.array([[0, 0, 3], [-1, 99, 99], [1, 99, 99]])
    assert np.array_equal(hw.penalize(logits, padded, lengths=[3, 0, 1], presence=1), lists)
    assert changed([logits[:2]], [[[0], [1]]], presence=1) == [[[1, 1, -1, 0], [2, 0, -1, 0]]]


def test_p3_in_which_order() -> None:
    """Repetition, then frequency and presence, then DRY: (2 / 4 - 2 * 0.125 - 1) - 3."""
    new = changed(FOUR, [0, 1, 0, 1], repetition=4, frequency=0.125, presence=1, dry_multiplier=3)
    assert new == [2 / 4 - 0.25 - 1 - 3, 1 / 4 - 0.25 - 1, -1, 0]


def test_p4_repetition() -> None:
    assert changed(FOUR, [0, 2, 3, 0], repetition=2) == [1, 1, -2, 0]
    assert changed(FOUR, [0, 2], repetition=0.5) == [4, 1, -0.5, 0]
    for bad in (0, -1, INF, NAN):
        with pytest.raises(ValueError, match=r"^repetition: expected a finite number > 0"):
            hw.penalize(FOUR, [0], repetition=bad)


def test_p5_frequency_and_presence() -> None:
    assert changed(FOUR, [0, 2, 0, 0], frequency=0.5) == [0.5, 1, -1.5, 0]
    assert changed(FOUR, [0, 2, 0, 0], presence=0.5) == [1.5, 1, -1.5, 0]
    assert changed(FOUR, [3], presence=-1, frequency=-1) == [2, 1, -1, 2]


def test_p6_what_would_repeat() -> None:
    assert dry([1, 2, 3, 1, 2]) == {3: 1.0}  # 1 2 came before, then 3
    assert dry([1, 2, 3, 4, 1, 2, 3]) == {4: 2.0}
    assert dry([1, 2, 3, 4, 1, 2, 3], dry_allowed_length=3) == {4: 1.0}
    assert dry([1, 2, 3, 4, 1, 2, 3], dry_allowed_length=4) == {}
    assert dry([3, 4, 5, 3]) == {}  # only 3 is repeated
    assert dry([3, 4, 5, 3], dry_allowed_length=1) == {4: 1.0}
    assert dry([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]) == {3: 1.0, 4: 1.0}
    assert dry([1, 2, 3, 9, 2, 3, 9, 8, 1, 2], dry_allowed_length=1) == {3: 2.0}  # the longest counts: 1 2, not 2
    assert dry([7, 7, 7, 7]) == {7: 2.0}  # 7 7 7, which overlaps itself
    assert hw.penalize([0.0] * 5, [1, 2, 3, 4, 1, 2, 3], dry_multiplier=0.8)[4] == -0.8 * 1.75


def test_p7_breakers() -> None:
    history = [1, 2, 3, 4, 1, 2, 3]
    assert dry(history, dry_breakers=[1]) == {4: 1.0}  # 2 3
    assert dry(history, dry_breakers=[2]) == {}  # 3
    assert dry(history, dry_breakers={3}) == {}
    assert dry(history, dry_breakers=[4]) == {}  # 4 itself is never penalized
    assert dry(history, dry_breakers=[9]) == {4: 2.0}


def test_p8_window() -> None:
    assert changed(FOUR, [0, 1, 1, 0], frequency=1, window=3) == [1, -1, -1, 0]
    assert changed(FOUR, [0, 1], presence=1, window=1) == [2, 0, -1, 0]
    assert changed(FOUR, [0, 1], presence=1, window=10**30) == [1, 0, -1, 0]
    assert dry([1, 2, 3, 1, 2], window=4, dry_allowed_length=1) == {3: 1.0}  # 2, for 1 lies outside
    assert dry([1, 2, 3, 1, 2], window=3, dry_allowed_length=1) == {}


def test_p9_each_row_its_own() -> None:
    rows = {"repetition": [1, 2], "frequency": [0.5, 0], "window": [1, 9], "dry_multiplier": [0.0, 1.0]}
    histories = [[0, 1], [0, 1, 0]]
    both = hw.penalize([FOUR, FOUR], histories, dry_allowed_length=1, **rows)
    for i in range(2):
        own = {name: value[i] for name, value in rows.items()}
        assert np.array_equal(both[i], hw.penalize(FOUR, histories[i], dry_allowed_length=1, **own))


def test_p10_finite_stays_finite() -> None:
    assert changed([-INF, 0.0], [0], repetition=2, frequency=-9, presence=-9) == [-INF, 0]
    largest = float(np.finfo(np.float32).max)
    for dtype in (np.float64, np.float32):
        logits = np.array([-1, 1], dtype) * dtype(largest)
        assert hw.penalize(logits, [0], repetition=1.5).tolist() == logits.tolist()
        assert hw.penalize(logits, [1], repetition=0.5).tolist() == logits.tolist()
    assert hw.penalize([-3e38], [0], frequency=3e38).tolist() == [-largest]
    assert hw.penalize([1e300, -1e308], [0, 1], repetition=2).tolist() == [5e299, -np.finfo(float).max]  # beyond before
    assert hw.penalize(np.float16([6e4, 0]), [0], repetition=0.5).tolist() == [120000, 0]
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        endless = hw.penalize(np.zeros(2, dtype), [0] * 5000, dry_multiplier=1)
        assert endless.tolist() == [-largest, 0]
        assert hw.sample(hw.penalize(np.zeros(2, dtype), [1] * 162, dry_multiplier=0.8), allowed=[1]) == 1
        sampler = hw.Sampler(2)
        sampler.admit(hw.SamplingParams(allowed=[1]), [1] * 162, dry_multiplier=0.8)
        assert sampler.step(np.zeros((1, 2), dtype)).tolist() == [1]


def test_p11_computed_in_float64_and_rounded_once() -> None:
    z, r, f = np.float32(1.7), np.float32(1.3), 0.1
    want = np.float32(np.float64(z) / np.float64(r) - 2 * f - 0.3)
    assert hw.penalize(np.array([z]), [0, 0], repetition=r, frequency=f, presence=0.3)[0] == want
    for dtype in (np.float16, ml_dtypes.bfloat16):  # 0.05 is less than half a step of the type there
        assert hw.penalize(np.array([20, 20], dtype), [0], presence=0.05).tolist() == [np.float32(19.95), 20]
        sampler = hw.Sampler(2)
        sampler.admit(hw.SamplingParams(temperature=0), [0], repetition=1.001)
        assert sampler.step(np.array([[20, 20]], dtype)).tolist() == [1]


# Of histories -------------------------------------------------------------------------------------------------------


def test_p38_windows_of_their_own() -> None:
    history = [0, 1, 0, 3]
    each = {"repetition": 2, "frequency": 1, "presence": 0.5}
    assert changed(FOUR, history, **each, window=1) == [2, 1, -1, -1.5]
    assert changed(FOUR, history, **each, window=1, repetition_window=2) == [1, 1, -1, -1.5]
    assert changed(FOUR, history, **each, frequency_window=1) == [1, 0.5, -1, -1.5]
    assert changed(FOUR, history, **each, repetition_window=1, frequency_window=3) == [0.5, -0.5, -1, -1.5]
    assert dry([1, 2, 3, 1, 2], dry_window=4, dry_allowed_length=1) == {3: 1.0}
    assert dry([1, 2, 3, 1, 2], dry_window=4, dry_allowed_length=1, window=1) == {3: 1.0}
    assert dry([1, 2, 3, 1, 2], dry_window=3, dry_allowed_length=1, window=5) == {}
    rows = hw.penalize([FOUR] * 2, [history] * 2, presence=1, frequency_window=[1, 2], window=3)
    assert rows.tolist() == [[2, 1, -1, -1], [1, 1, -1, -1]]


def test_p39_prompt_lengths() -> None:
    history = [0, 1, 0, 1]
    each = {"frequency": 1, "presence": 0.5}
    assert changed(FOUR, history, **each) == [-0.5, -1.5, -1, 0]
    assert changed(FOUR, history, **each, prompt_lengths=0) == [-0.5, -1.5, -1, 0]
    assert changed(FOUR, history, **each, prompt_lengths=3) == [2, -0.5, -1, 0]
    assert changed(FOUR, history, **each, prompt_lengths=4) == FOUR
    assert changed(FOUR, history, **each, prompt_lengths=1, window=2) == [0.5, -0.5, -1, 0]
    assert changed(FOUR, history, repetition=2, prompt_lengths=4) == [1, 0.5, -1, 0]
    assert dry([1, 2, 3, 1, 2], prompt_lengths=5) == {3: 1.0}
    rows = hw.penalize([FOUR] * 2, [[0, 1], [0, 1]], presence=1, prompt_lengths=[1, 2])
    assert rows.tolist() == [[2, 0, -1, 0], FOUR]
    with pytest.raises(ValueError, match=r"^prompt_lengths: expected integers from 0 to 1, the tokens .* got 2"):
        hw.penalize(FOUR, [0, 1], lengths=1, prompt_lengths=2)


UNKNOWN = [-1, 70, 2**40, -(2**63), 2**63 - 1]
SPECIAL = [0, -1, 4, 1, 2**40]
HISTORIES: list[Any] = [
    SPECIAL,
    tuple(SPECIAL),
    np.array(SPECIAL),
    np.array(SPECIAL)[::-1][::-1],
    np.array([0, -1, 4, 1, 99], np.int16),
    np.array([0, 2**64 - 1, 4, 1, 2**63], np.uint64),
    np.array([0, 4, 5, 1, 255], np.uint8),
]


@pytest.mark.parametrize("history", HISTORIES, ids=lambda h: f"{type(h).__name__} {getattr(h, 'dtype', '')}")
def test_p40_ids_without_a_logit(history: Any) -> None:
    """Where a row has no penalty they are nothing to it; else they are an error, or ignored."""
    for off in ({}, {"repetition": 1, "presence": 0}, {"dry_base": 2.0}, {"window": 3, "dry_breakers": [1]}):
        assert changed(FOUR, history, **off) == FOUR
        sampler = hw.Sampler(4)
        sampler.admit(hw.SamplingParams(temperature=0), history, **off)
        assert sampler.step([FOUR]).tolist() == [0]
    for on in ({"repetition": 2}, {"frequency": 1}, {"presence": 1}, {"dry_multiplier": 1}):
        with pytest.raises(ValueError, match=r"^token_ids: expected ids from 0 to 3, got .* at 1; .*ignore"):
            hw.penalize(FOUR, history, **on)
        with pytest.raises(ValueError, match=r"^token_ids: expected ids from 0 to 3, got .* at 1 in row 1; .*ignore"):
            hw.penalize([FOUR] * 2, [[0], history], **on)
        with pytest.raises(ValueError, match=r"^token_ids: .* in row 0;"):
            hw.penalize([FOUR] * 2, [history, history], **{name: [value, value - 1] for name, value in on.items()})
        assert changed(FOUR, history, unknown_tokens="ignore", **on) == changed(FOUR, [0, 1], **on)
        with pytest.raises(ValueError, match=r"^prompt_tokens: expected ids from 0 to 3, got .* at 1; .*ignore"):
            hw.Sampler(4).admit(None, history, **on, count_prompt=True)
    for on in ({"frequency": 1}, {"presence": 1}, {"frequency": 1, "window": 2}):
        longer = np.append(np.asarray(history), np.full(2, 2, np.asarray(history).dtype))
        assert changed(FOUR, longer, prompt_lengths=5, **on) == changed(FOUR, [2, 2], **on)
        with pytest.raises(ValueError, match=r"^token_ids: .* at 4; "):
            hw.penalize(FOUR, np.append(longer[:4], longer[1:3]), prompt_lengths=4, **on)
        sampler = hw.Sampler(4)
        sampler.admit(hw.SamplingParams(temperature=0), history, **on)
        assert [int(sampler.step([FOUR])[0]) for _ in range(2)] == [0, 0]
    with pytest.raises(ValueError, match=r"^prompt_tokens: "):
        hw.Sampler(4).admit(None, history, frequency=1, repetition=2)
    one = hw.penalize([FOUR] * 2, [history, [1]], presence=[0, 1])
    assert one.tolist() == [FOUR, [2, 0, -1, 0]]


def test_p41_ids_that_are_left_out() -> None:
    """As if they were not there: windows, repetitions and ends close over them. Their places count in lengths."""
    for unknown in UNKNOWN:
        ignore: dict[str, Any] = {"unknown_tokens": "ignore"}
        assert changed(FOUR, [0, unknown, 1, unknown], presence=1, window=2, **ignore) == [1, 0, -1, 0]
        assert dry([1, unknown, 2, 3, 1, 2, unknown], **ignore) == {3: 1.0}
        assert changed(FOUR, [unknown, 0, 1], presence=1, lengths=2, **ignore) == [1, 1, -1, 0]
        assert changed(FOUR, [unknown, 0, 1], presence=1, prompt_lengths=2, **ignore) == [2, 0, -1, 0]
        assert changed(FOUR, [unknown] * 3, presence=1, **ignore) == FOUR
        sampler, plain = hw.Sampler(70), hw.Sampler(70)
        own = {"frequency": 0.3, "dry_multiplier": 1, "dry_allowed_length": 1, "window": 5, "count_prompt": True}
        sampler.admit(None, [3, unknown, 5, unknown, 3], seed=1, **own, **ignore)
        plain.admit(hw.SamplingParams(position=2), [3, 5, 3], seed=1, **own)  # their places count in positions
        for _ in range(6):
            assert sampler.step(ROWS[0, :1]).tolist() == plain.step(ROWS[0, :1]).tolist()
    mask, ids = np.array([[0, 0, 1, 1], [1, 1, 1, 1]]), np.array([[0, 0, 1, 3], [0, 1, 1, 2]])
    padded = hw.penalize([FOUR] * 2, np.where(mask, ids, -1), frequency=1, unknown_tokens="ignore")
    assert padded.tolist() == hw.penalize([FOUR] * 2, [[1, 3], [0, 1, 1, 2]], frequency=1).tolist()


# Several draws ------------------------------------------------------------------------------------------------------


def test_p12_num_samples() -> None:
    tokens = hw.sample(ROWS, num_samples=5, seed=1)
    assert tokens.shape == (2, 3, 5)
    assert tokens.dtype == np.int64
    assert hw.sample(ROWS, num_samples=1, seed=1).shape == (2, 3, 1)
    assert hw.sample(ROWS[0, 0], num_samples=4, seed=1).shape == (4,)
    for bad in (0, 1.5, True):
        with pytest.raises((ValueError, TypeError), match=r"^num_samples: expected an integer from 1"):
            hw.sample(ROWS, num_samples=bad)


def test_p13_with_replacement_each_draw_has_its_block() -> None:
    tokens = hw.sample(ROWS, num_samples=6, seed=7, position=3, temperature=2)
    assert np.array_equal(tokens[..., 0], hw.sample(ROWS, seed=7, position=3, temperature=2))
    counter = 3 - 1  # NumPy counts up first
    for j in range(6):
        words = np.random.Philox(key=[7, 0], counter=[counter, j, 0, 0]).random_raw(1)
        uniform = (int(words[0]) >> 11) / 2**53
        assert tokens[0, 0, j] == hw.sample(ROWS[0, 0], uniform=uniform, temperature=2)
    xtc = {"xtc_probability": 0.5, "xtc_threshold": 0.01, "seed": 3, "position": np.arange(20)}
    rows = np.broadcast_to(ROWS[0, 0], (20, 70))
    drawn, p = hw.sample(rows, num_samples=200, **xtc), hw.probabilities(rows, **xtc)
    best = int(ROWS[0, 0].argmax())
    assert 0 < (p[:, best] == 0).sum() < 20
    assert np.array_equal((drawn == best).any(-1), p[:, best] > 0)


def test_p14_without_replacement() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    assert hw.sample(logits, num_samples=3, replacement=False, uniform=[0.55, 0.55, 0.0]).tolist() == [1, 0, 2]
    # After 0 is gone, 1 has 0.6 of what is left.
    assert hw.sample(logits, num_samples=2, replacement=False, uniform=[0.1, 0.59]).tolist() == [0, 1]
    assert hw.sample(logits, num_samples=2, replacement=False, uniform=[0.1, 0.61]).tolist() == [0, 2]
    one = hw.sample(ROWS, num_samples=20, replacement=False, seed=2)
    assert all(len(set(row)) == 20 for row in one.reshape(-1, 20).tolist())
    assert np.array_equal(one[..., 0], hw.sample(ROWS, seed=2))


def test_p15_too_few_are_left() -> None:
    with pytest.raises(ValueError, match=r"^num_samples: expected at most 2 without replacement in row 1, .* got 3"):
        hw.sample([[0.0, 0.0, 0.0], [0.0, -INF, 0.0]], num_samples=3, replacement=False)
    with pytest.raises(ValueError, match=r"^num_samples: expected at most 4 without replacement, .* got 5"):
        hw.sample(ROWS[0, 0], top_k=4, num_samples=5, replacement=False)
    assert hw.sample([1.0, 2.0], temperature=0, num_samples=3).tolist() == [1, 1, 1]


def test_p16_uniform_of_each_draw() -> None:
    u = RNG.random((2, 3, 4))
    tokens = hw.sample(ROWS, uniform=u, num_samples=4)
    for j in range(4):
        assert np.array_equal(tokens[..., j], hw.sample(ROWS, uniform=u[..., j]))


# Log-probabilities --------------------------------------------------------------------------------------------------


def test_p17_the_model_s_own_distribution() -> None:
    for dtype in (np.float64, np.float32, np.float16):
        logits = ROWS.astype(dtype)
        wide = logits.astype(np.float64)
        exact = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        got = hw.logprobs(logits, np.full((2, 3), 5)).logprobs
        assert got.dtype == (np.float64 if dtype is np.float64 else np.float32)
        assert np.abs(got - exact[..., 5]).max() < 1e-6
    for options in ({"temperature": 1.0}, {"params": hw.SamplingParams()}):
        with pytest.raises(ValueError, match=r"expected none for the logits as they are; processed=True"):
            hw.logprobs(ROWS, top=1, **options)
    assert hw.logprobs([0.0, -INF], [0, 1]).logprobs.tolist() == [0, -INF]


def test_p18_the_distribution_that_is_drawn_from() -> None:
    every: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
        {"typical_p": 0.5, "xtc_probability": 0.5, "xtc_threshold": 0.02, "seed": 1},
        {"temperature": 2.0, "top_p": 0.5, "xtc_probability": 1.0, "xtc_threshold": 0.02, "dialect": "mlx"},
        {"temperature": 2.0, "typical_p": 0.8, "top_p": 0.9, "min_tokens_to_keep": 3, "dialect": "hf"},
    ]
    for options in every:
        p = hw.probabilities(ROWS.astype(np.float64), **options)
        ids = np.broadcast_to(np.arange(70), ROWS.shape)
        got = hw.logprobs(ROWS.astype(np.float64), ids, processed=True, **options).logprobs
        assert np.array_equal(np.isneginf(got), p == 0)
        assert np.allclose(got[p > 0], np.log(p[p > 0]), rtol=1e-15, atol=1e-15)
    assert hw.logprobs([1.0, 2.0], [0, 1], processed=True, temperature=0).logprobs.tolist() == [-INF, 0]


def test_p19_ranks() -> None:
    logits = [1.0, 2.0, 2.0, -INF, 0.0, 2.0, -INF]
    assert hw.logprobs(logits, range(7)).ranks.tolist() == [4, 1, 2, 6, 5, 3, 7]
    assert hw.logprobs(logits, [0, 5, 2], processed=True, top_k=2).ranks.tolist() == [3, 6, 2]
    assert hw.logprobs(logits, [4, 1], processed=True, logit_bias={4: 9.0}).ranks.tolist() == [1, 2]


def test_p20_top() -> None:
    found = hw.logprobs([1.0, 2.0, 2.0, -INF, 0.0], top=4)
    assert found.top_tokens.tolist() == [1, 2, 0, 4]
    assert np.array_equal(found.top_logprobs, hw.logprobs([1.0, 2.0, 2.0, -INF, 0.0], [1, 2, 0, 4]).logprobs)
    short = hw.logprobs([1.0, 2.0, 2.0], top=3, processed=True, top_k=2)
    assert short.top_tokens.tolist() == [1, 2, -1]
    assert short.top_logprobs[2] == -INF
    with pytest.raises(ValueError, match=r"^top: expected an integer from 1 to 3, got 4"):
        hw.logprobs([1.0, 2.0, 2.0], top=4)


def test_p21_shapes_of_tokens() -> None:
    one = hw.logprobs(ROWS, np.full((2, 3), 4), top=6)
    assert one.logprobs.shape == one.ranks.shape == (2, 3)
    assert one.top_tokens.shape == one.top_logprobs.shape == (2, 3, 6)
    assert hw.logprobs(ROWS, np.full((2, 3, 5), 4)).logprobs.shape == (2, 3, 5)
    lone = hw.logprobs(ROWS[0, 0], 4)
    assert (type(lone.logprobs), type(lone.ranks)) == (float, int)
    assert hw.logprobs(ROWS, top=1).ranks is hw.logprobs(ROWS, top=1).logprobs is None
    assert hw.logprobs(ROWS, np.full((2, 3), 4)).top_tokens is None
    with pytest.raises(ValueError, match=r"^tokens: expected token ids, or top=n"):
        hw.logprobs(ROWS)


# Speculative sampling -----------------------------------------------------------------------------------------------

TARGET = RNG.standard_normal((4, 6)) * 1.5
DRAFT = RNG.standard_normal((3, 6)) * 1.5


def words(seed: int, stream: int, position: int) -> list[int]:
    return [int(w) for w in np.random.Philox(key=[seed, stream], counter=position - 1).random_raw(4)]


def test_p22_what_comes_back() -> None:
    found = hw.verify_draft(np.stack([TARGET] * 5), None, np.zeros((5, 3), int), seed=1)
    assert found.accepted.shape == found.next_token.shape == (5,)
    assert found.tokens.shape == (5, 4)
    for n, token, chain in zip(*(x.tolist() for x in found), strict=True):
        assert chain == [0] * n + [token] + [-1] * (3 - n)
    lone = hw.verify_draft(TARGET, None, [0, 0, 0], seed=1)
    assert type(lone.accepted) is type(lone.next_token) is int


def test_p23_accepted_with_the_ratio_of_probabilities() -> None:
    p, q = hw.probabilities(TARGET), hw.probabilities(DRAFT)
    for token in range(6):
        ratio = p[0, token] / q[0, token]
        for seed in range(40):
            found = hw.verify_draft(TARGET[:2], DRAFT[:1], [token], seed=seed, position=9)
            assert found.accepted == (words(seed, 0, 9)[2] / 2**64 < ratio)


def test_p24_replaced_from_what_the_draft_lacks() -> None:
    p, q = hw.probabilities(TARGET)[0], hw.probabilities(DRAFT)[0]
    left = np.maximum(0, p - q)
    ends = np.cumsum(left) / left.sum()
    replaced = 0
    for seed in range(200):
        token = hw.sample(DRAFT[0], seed=seed, position=9)
        found = hw.verify_draft(TARGET[:2], DRAFT[:1], [token], seed=seed, position=9)
        if found.accepted == 0:
            replaced += 1
            assert found.next_token == np.searchsorted(ends, words(seed, 0, 9)[3] / 2**64, side="right")
    assert replaced > 20


def test_p25_one_more_after_all() -> None:
    same = np.concatenate([TARGET[:3], TARGET[3:]])
    for seed in range(20):
        draft = [hw.sample(TARGET[i], seed=seed, position=5 + i) for i in range(3)]
        found = hw.verify_draft(same, TARGET[:3], draft, seed=seed, position=5)
        assert found.accepted == 3  # p / q is 1
        assert found.next_token == hw.sample(TARGET[3], seed=seed, position=8)
        assert hw.verify_draft(TARGET[:1], None, [], seed=seed).next_token == hw.sample(TARGET[0], seed=seed)


def test_p26_a_draft_without_choice() -> None:
    p = hw.probabilities(TARGET)[0]
    for seed in range(40):
        found = hw.verify_draft(TARGET[:2], None, [2], seed=seed, position=9)
        assert found.accepted == (words(seed, 0, 9)[2] / 2**64 < p[2])
        assert found.accepted or found.next_token != 2


def test_p27_greedy() -> None:
    best = TARGET.argmax(-1)
    draft = best[:3].copy()
    assert hw.verify_draft(TARGET, None, draft, temperature=0)[:2] == (3, best[3])
    draft[1] = (best[1] + 1) % 6
    assert hw.verify_draft(TARGET, None, draft, temperature=0)[:2] == (1, best[1])
    ours = DRAFT.argmax(-1)
    agree = int((ours == best[:3]).cumprod().sum())
    assert hw.verify_draft(TARGET, DRAFT, ours, temperature=0)[:2] == (agree, best[agree])


def test_p28_options() -> None:
    """They are of both, or draft_params of the draft; numbers are one per row, masks one per place."""
    hot = hw.SamplingParams(temperature=2.0)
    for seed in range(20):
        token = [hw.sample(DRAFT[0], hot, seed=seed)]
        both = hw.verify_draft(TARGET[:2], DRAFT[:1], token, hot, seed=seed)
        assert both.tokens.tolist() == hw.verify_draft(TARGET[:2] / 2, DRAFT[:1] / 2, token, seed=seed).tokens.tolist()
        own = hw.verify_draft(TARGET[:2], DRAFT[:1], token, draft_params=hot, seed=seed)
        assert own.tokens.tolist() == hw.verify_draft(TARGET[:2], DRAFT[:1] / 2, token, seed=seed).tokens.tolist()
    two, allowed = np.stack([TARGET, TARGET]), np.ones((2, 4, 6), bool)
    allowed[1, 1] = np.arange(6) == 4
    draft, tokens = np.stack([DRAFT, DRAFT]), np.full((2, 3), 4)
    rows = hw.verify_draft(two, draft, tokens, temperature=[0.5, 2.0], allowed=allowed, seed=[3, 4], position=[5, 6])
    for i in range(2):
        options = {"temperature": [0.5, 2.0][i], "allowed": allowed[i], "seed": 3 + i, "position": 5 + i}
        assert hw.verify_draft(TARGET, DRAFT, tokens[i], **options).tokens.tolist() == rows.tokens[i].tolist()
    with pytest.raises(ValueError, match=r"^uniform: expected seed and position"):
        hw.verify_draft(TARGET, DRAFT, [0, 0, 0], uniform=0.5)
    for name, value in {"seed": 1, "position": 0, "uniform": 0.5}.items():
        with pytest.raises(ValueError, match=rf"^draft_params: expected no {name}"):
            hw.verify_draft(TARGET, DRAFT, [0, 0, 0], draft_params=hw.SamplingParams(**{name: value}), seed=1)
    # One distribution on both sides, xtc's coin included, so that all is accepted.
    xtc = hw.SamplingParams(xtc_probability=0.5, xtc_threshold=0.1, typical_p=0.9, seed=7)
    drafted = [hw.sample(DRAFT[i], xtc, position=40 + i) for i in range(3)]
    verified = hw.verify_draft(np.concatenate([DRAFT, TARGET[3:]]), DRAFT, drafted, xtc, position=40)
    assert verified.tokens.tolist() == [*drafted, hw.sample(TARGET[3], xtc, position=43)]


def test_p29_a_token_that_the_draft_cannot_draw() -> None:
    worst = int(DRAFT[0].argmin())
    with pytest.raises(ValueError, match=rf"^draft_tokens: .* got {worst} in row \(1, 0\), .*draft_params"):
        hw.verify_draft(np.stack([TARGET[:2]] * 2), [DRAFT[:1]] * 2, [[int(DRAFT[0].argmax())], [worst]], top_k=2)


def test_p30_what_follows_is_not_looked_at() -> None:
    target = TARGET.copy()
    target[2:] = NAN
    wrong = int(target[0].argmin())
    assert hw.verify_draft(target, None, [wrong, 0, 0], temperature=0).accepted == 0
    assert reference.verify_draft(target, None, [wrong, 0, 0], temperature=0, seed=1).accepted == 0
    with pytest.raises(ValueError, match=r"^target_logits: expected numbers, got NaN at token 0 in row 2"):
        hw.verify_draft(target, None, target[:3].argmax(-1), temperature=0)


def test_p45_lengths() -> None:
    """A row is the row alone with its own n, 0 included; the bonus token is drawn at position + length."""
    best = TARGET.argmax(-1)
    for length in range(4):
        found = hw.verify_draft(TARGET, None, best[:3], temperature=0, lengths=length)
        assert found == (length, best[length], pytest.approx([*best[: length + 1], *[-1] * (3 - length)]))
        for seed in range(8):
            draft = [hw.sample(TARGET[i], seed=seed, position=5 + i) for i in range(3)]  # p / q is 1: all are accepted
            found = hw.verify_draft(TARGET, TARGET[:3], draft, seed=seed, position=5, lengths=length)
            assert found[:2] == (length, hw.sample(TARGET[length], seed=seed, position=5 + length))
    rows = hw.verify_draft(np.stack([TARGET] * 4), None, np.tile(best[:3], (4, 1)), temperature=0, lengths=range(4))
    assert rows.accepted.tolist() == [0, 1, 2, 3]
    same = [hw.verify_draft(TARGET, DRAFT, [0, 1, 2], seed=3, lengths=k).tokens.tolist() for k in (None, 3)]
    assert same[0] == same[1]
    for kind in ([2], np.array([2], np.uint8), (2,), memoryview(np.array([2])), 2):
        found = hw.verify_draft(TARGET[None], None, best[None, :3], temperature=0, lengths=kind)
        assert found.accepted.tolist() == [2]
    for bad in (4, -1):
        with pytest.raises(ValueError, match=rf"^lengths: expected integers from 0 to 3, .* got {bad}$"):
            hw.verify_draft(TARGET, None, best[:3], lengths=bad)


def test_p46_padding_is_not_looked_at() -> None:
    best, target = TARGET.argmax(-1), TARGET.copy()
    target[2:] = NAN
    draft_logits = np.where(np.arange(3)[:, None] < 1, np.eye(6)[best[:3]] * 40, NAN)
    allowed, bias = np.ones((4, 6), bool), np.zeros((4, 6), np.float32)
    allowed[2:], bias[2:] = False, -INF
    want = (1, best[1])
    for behind in (-1, 6, 2**62, -(2**62)):
        tokens = [int(best[0]), behind, behind]
        for more in ({}, {"allowed": allowed}, {"logit_bias": bias}, {"allowed": packed(allowed)}):
            for drafted in (None, draft_logits):
                call = {"temperature": 0, "lengths": 1, "seed": 1, **more}
                assert hw.verify_draft(target, drafted, tokens, **call)[:2] == want
    with pytest.raises(ValueError, match=r"^target_logits: expected numbers, got NaN at token 0 in row 2"):
        hw.verify_draft(target, None, best[:3], temperature=0, lengths=2)
    with pytest.raises(ValueError, match=r"^draft_logits: expected numbers, got NaN at token 0 in row 1"):
        hw.verify_draft(TARGET, draft_logits, best[:3], temperature=0, lengths=2, seed=1)


# A sampler for serving loops ----------------------------------------------------------------------------------------


def test_p31_a_draw_of_a_sampler() -> None:
    params = hw.SamplingParams(temperature=0.9, top_k=20, seed=5, position=3)
    penalties = {"repetition": 1.2, "presence": 0.3, "dry_multiplier": 0.5, "dry_allowed_length": 1}
    sampler, history = hw.Sampler(70), [4, 9]
    sampler.admit(params, history, **penalties)
    for j in range(12):
        logits = ROWS.reshape(6, 70)[j % 6]
        (got,) = sampler.step(logits[None])
        penalized = hw.penalize(logits, history, prompt_lengths=2, **penalties)
        assert got == hw.sample(penalized, params, position=3 + len(history))
        history.append(got)
    first = hw.Sampler(70)
    first.admit(hw.SamplingParams(seed=5, position=2**64 - 1), [4, 9])
    assert first.step(ROWS[0, :1]) == hw.sample(ROWS[0, 0], seed=5, position=1)


def test_p32_rows_in_the_order_of_admission() -> None:
    sampler, greedy = hw.Sampler(70), hw.SamplingParams(temperature=0)
    a, b, c = (sampler.admit(greedy) for _ in range(3))
    assert sampler.handles == [a, b, c]
    best = ROWS.reshape(6, 70).argmax(-1)
    assert sampler.step(ROWS.reshape(6, 70)[:3]).tolist() == best[:3].tolist()
    sampler.retire(b)
    d = sampler.admit(greedy)
    assert sampler.handles == [a, c, d]
    assert len({a, b, c, d}) == 4
    assert sampler.step(ROWS.reshape(6, 70)[3:]).tolist() == best[3:].tolist()
    with pytest.raises(ValueError, match=r"^handle: expected one of the active rows, \[0, 2, 3\], got 1"):
        sampler.retire(b)
    with pytest.raises(
        ValueError, match=r"^logits: expected shape \(3, 70\), a row for each active one, got \(2, 70\)"
    ):
        sampler.step(np.zeros((2, 70)))
    assert hw.Sampler(70).step(np.zeros((0, 70))).shape == (0,)


def test_p33_seeds() -> None:
    def drawn(*admissions: dict[str, Any]) -> list[list[int]]:
        sampler = hw.Sampler(70)
        for admission in admissions:
            sampler.admit(**admission)
        return [sampler.step(np.zeros((len(admissions), 70))).tolist() for _ in range(8)]

    params = hw.SamplingParams(seed=5)
    assert drawn({"params": params}) == drawn({"seed": 5}) == drawn({"params": params, "seed": 5})
    assert drawn({"seed": 5}, {"params": params, "seed": 5}) == [[token] * 2 for (token,) in drawn({"seed": 5})]
    assert drawn({"params": params, "seed": 6}) == drawn({"seed": 6}) != drawn({"seed": 5})
    assert drawn({}) != drawn({})  # 1 in 70^8 that eight draws are equal
    assert drawn({"params": hw.SamplingParams(seed=5, position=2)})[:6] == drawn({"seed": 5})[2:]
    for bad in ({"seed": -1}, {"seed": [1, 2]}, {"params": hw.SamplingParams(seed=[1])}):
        with pytest.raises(ValueError, match=r"^seed"):
            drawn(bad)


def test_p42_what_frequency_counts() -> None:
    """The output alone, unless the prompt is to count; repetition and DRY are about both."""
    logits = np.float32([[0.5, 0.5, -0.5, 0.2]])

    def drawn(**options: Any) -> list[int]:
        sampler = hw.Sampler(4)
        sampler.admit(hw.SamplingParams(temperature=0), [0, 0, 1, 0, 2], **options)
        return [int(sampler.step(logits)[0]) for _ in range(4)]

    assert drawn() == [0, 0, 0, 0]
    assert drawn(presence=0.5) == drawn(frequency=0.5) == [0, 1, 3, 0]
    assert drawn(frequency=0.5, count_prompt=True) == [3, 1, 3, 1]  # 0 was 3 times in the prompt, 1 once
    assert drawn(presence=1.5, count_prompt=True) == [3, 0, 0, 0]
    for about_both in ({"repetition": 5}, {"dry_multiplier": 1, "dry_base": 3, "dry_allowed_length": 1}):
        assert drawn(**about_both, count_prompt=True) == drawn(**about_both)
        assert drawn(**about_both) != drawn()


PENALTIES: dict[str, Any] = {"repetition": 1.2, "frequency": 0.4, "dry_multiplier": 0.9, "dry_allowed_length": 1}


@pytest.mark.parametrize("count_prompt", [False, True])
def test_p47_a_text_stops_and_goes_on_anywhere(count_prompt: bool) -> None:
    prompt, rows = [3, 3, 70, 5, 9], ROWS.reshape(6, 1, 70)
    options: dict[str, Any] = {"stream": 2, "count_prompt": count_prompt, "unknown_tokens": "ignore", **PENALTIES}

    def drawn(n: int, output: list[int], **other: Any) -> list[int]:
        sampler = hw.Sampler(70)
        sampler.admit(hw.SamplingParams(seed=5, temperature=2.0), prompt, output, **{**options, **other})
        return [int(sampler.step(rows[i % 6])[0]) for i in range(len(output), len(output) + n)]

    text = drawn(40, [])
    for n in (0, 1, 15, 39):
        assert drawn(40 - n, text[:n]) == text[n:]
    assert drawn(25, text[:15], count_prompt=not count_prompt) != text[15:]
    with pytest.raises(ValueError, match=r"^output_tokens: expected integers from 0 to 69, got 70 at 1"):
        drawn(1, [0, 70])
    with pytest.raises(ValueError, match=r"^output_tokens: expected a list of token ids, got shape \(1, 1\)"):
        drawn(1, [[1]])  # type: ignore[list-item]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "top_p": 1, "top_k": 40, "count_prompt": True}])
def test_p48_one_seed_one_text(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Five ways to the same tokens."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from headway import cli, lm

    model, prompt, n, seed = lm.load(), "And God said unto the people,", 25, 3
    given = {name: value for name, value in options.items() if name != "count_prompt"}
    params = dataclasses.replace(lm.DEFAULTS, **given)
    counted = {"count_prompt": options.get("count_prompt", False)}
    stream = model.stream(prompt, max_tokens=n, seed=seed, **PENALTIES, **options)
    text, tokens, ids = "".join(stream), stream.token_ids, stream.prompt_ids
    assert len(tokens) == n

    assert model.generate(prompt, max_tokens=n, seed=seed, **PENALTIES, **options) == text
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (given | PENALTIES).items()]
    flags += ["--count-prompt"] * counted["count_prompt"]
    assert cli.main(["generate", prompt, "--max-tokens", str(n), "--seed", str(seed), *flags]) == 0
    assert capsys.readouterr().out == f"{prompt}{text}\n"

    sampler, session, new, by_hand = hw.Sampler(model.config.vocab_size), model.session(), list(ids), list(ids)
    sampler.admit(params, ids, seed=seed, **PENALTIES, **counted)
    for position in range(len(ids), len(ids) + n):
        logits = session.next_logits(new)
        new = sampler.step(logits[None]).tolist()
        prompt_lengths = 0 if counted["count_prompt"] else len(ids)
        penalized = hw.penalize(logits, by_hand, prompt_lengths=prompt_lengths, **PENALTIES)
        by_hand.append(hw.sample(penalized, params, seed=seed, position=position))
        assert new == by_hand[-1:]
    assert by_hand == [*ids, *tokens]

    dots, drawn_so_far = {model.tokenizer.token_to_id("."), model.tokenizer.token_to_id(",")}, []

    def grammar(tokens: list[int]) -> Any:
        drawn_so_far.append(tokens)
        return dots if len(tokens) % 2 else None

    stream = model.stream(ids, max_tokens=4, seed=seed, params=params, allowed=grammar)
    list(stream)
    assert dots.issuperset(stream.token_ids[1::2])
    assert not dots.intersection(stream.token_ids[::2])
    assert drawn_so_far == [stream.token_ids[:i] for i in range(4)]


@pytest.mark.parametrize("n", [0, 1, 5, 70])
def test_p49_log_probabilities_of_a_step(n: int) -> None:
    """Of rows with and without xtc's coin, penalties and masks, in several groups."""
    each = [
        hw.SamplingParams(top_k=9, temperature=0.7),
        hw.SamplingParams(xtc_probability=0.5, xtc_threshold=0.01, seed=4, dialect="llama.cpp"),
        hw.SamplingParams(ties="keep", top_k=30, logit_bias={3: 2.0}),
        hw.SamplingParams(temperature=0),
    ]
    rows, masks = ROWS.reshape(6, 70)[:4].astype(np.float64), [None, None, np.arange(70) % 3 > 0, [5, 6, 7]]
    sampler, plain, histories = hw.Sampler(70), hw.Sampler(70), [[1, 2, 1] for _ in each]
    for i, params in enumerate(each):
        for one in (sampler, plain):
            one.admit(params, [1, 2, 1], seed=i, count_prompt=True, **PENALTIES)
    for _ in range(5):
        drawn = sampler.step(rows, allowed=masks, logprobs=n)
        assert drawn.tokens.tolist() == plain.step(rows, allowed=masks).tolist()
        raw = hw.logprobs(rows, drawn.tokens, top=n or None)
        assert raw.logprobs.tolist() == drawn.raw.logprobs.tolist()
        assert raw.ranks.tolist() == drawn.raw.ranks.tolist()
        for i, (params, history, token) in enumerate(zip(each, histories, drawn.tokens.tolist(), strict=True)):
            z = hw.penalize(rows[i], history, **PENALTIES)
            if masks[i] is not None:
                z = hw.filter_logits(z, allowed=masks[i])
            call = {"params": params, "seed": i, "position": len(history), "processed": True, "top": n or None}
            want, got = hw.logprobs(z, token, **call), drawn.processed
            assert (got.logprobs[i], got.ranks[i]) == (want.logprobs, want.ranks)
            assert np.exp(want.logprobs) > 0
            if n:
                assert got.top_tokens[i].tolist() == want.top_tokens.tolist()
                assert got.top_logprobs[i].tolist() == want.top_logprobs.tolist()
                assert drawn.raw.top_tokens[i].tolist() == raw.top_tokens[i].tolist()
                assert drawn.raw.top_logprobs[i].tolist() == raw.top_logprobs[i].tolist()
            history.append(token)
        assert n or drawn.raw.top_tokens is drawn.processed.top_logprobs is None


def test_p50_tokens_that_are_pushed_and_taken_back() -> None:
    """Beside rows that stand still; with a prompt of which one id is left out, and across the places of a history."""
    rows, prompt = ROWS.reshape(6, 70)[:2], [3, 70, 3, 5]
    params = hw.SamplingParams(seed=5, temperature=2.0, position=2**64 - 20)
    options: dict[str, Any] = {"count_prompt": True, "unknown_tokens": "ignore", "dry_breakers": [8], **PENALTIES}

    def fresh(*output: int) -> hw.Sampler:
        sampler = hw.Sampler(70)
        sampler.admit(params, prompt, output, seed=1, **options)
        sampler.admit(params, [1], seed=2, **options)
        return sampler

    sampler, output = fresh(), np.random.default_rng(1).integers(0, 70, 90).tolist()
    output[3:6] = [8, 3, 5]
    for i, token in enumerate(output):
        sampler.force(0, token)
        if i % 7 == 0:
            assert pickle.loads(pickle.dumps(sampler)).step(rows)[0] == fresh(*output[: i + 1]).step(rows)[0]
    assert sampler.history(0).tolist() == [3, 3, 5, *output]
    assert sampler.history(1).tolist() == [1]
    for n in (90, 70, 69, 7, 2, 0):
        drawn = [int(sampler.step(rows)[0]) for _ in range(3)]
        assert sampler.history(0).tolist()[-3:] == drawn
        sampler.truncate(0, 4 + n)
        assert sampler.history(0).tolist() == [3, 3, 5, *output[:n]]
        other, going_on = fresh(*output[:n]), pickle.loads(pickle.dumps(sampler))
        assert [going_on.step(rows)[0] for _ in range(5)] == [other.step(rows)[0] for _ in range(5)]
    assert len(sampler.history(1)) == 19
    sampler.history(0)[:] = 9
    assert sampler.history(0).tolist() == [3, 3, 5]
    empty = hw.Sampler(4)
    empty.admit(hw.SamplingParams(temperature=0), presence=9)
    assert [int(empty.step([FOUR])[0]) for _ in range(2)] == [0, 1]
    empty.truncate(0, 0)
    assert empty.step([FOUR]) == 0
    with pytest.raises(ValueError, match=r"^length: expected an integer from 4 to 4, got 3"):
        sampler.truncate(0, 3)
    with pytest.raises(ValueError, match=r"^token: expected an integer from 0 to 69, got 70"):
        sampler.force(0, 70)
    for call in (sampler.history, lambda row: sampler.force(row, 1), lambda row: sampler.truncate(row, 4)):
        with pytest.raises(ValueError, match=r"^handle: expected one of the active rows, \[0, 1\], got 2"):
            call(2)


def test_p52_forks() -> None:
    """A fork is the row that would be admitted; it and its parent go their own ways."""
    rows, prompt = ROWS.reshape(6, 70), [3, 70, 3, 5]
    params = hw.SamplingParams(seed=5, temperature=2.0, position=9)
    options: dict[str, Any] = {"unknown_tokens": "ignore", "no_repeat_ngram": 2, **PENALTIES}
    for own, stream in (({}, 1), ({"stream": 2**64 - 1}, 2**64 - 1), ({"seed": 8}, 0), ({"seed": 8, "stream": 4}, 4)):
        sampler, other = hw.Sampler(70), hw.Sampler(70)
        parent = sampler.admit(params, prompt, **options)
        drawn = [int(sampler.step(rows[:1])[0]) for _ in range(70)]
        assert sampler.fork(parent, **own) == 1
        assert sampler.handles == [0, 1]
        assert sampler.history(1).tolist() == [3, 3, 5, *drawn]
        for seed, k in ((5, 0), (own.get("seed", 5), stream)):
            other.admit(params, prompt, drawn, seed=seed, stream=k, **options)
        for _ in range(20):
            assert sampler.step(rows[:2]).tolist() == other.step(rows[:2]).tolist()
        sampler.retire(parent)
        other.retire(0)
        assert sampler.step(rows[:1]).tolist() == other.step(rows[:1]).tolist()
    sampler = hw.Sampler(70)
    answers = [sampler.admit(params, prompt, **options)]
    answers += [sampler.fork(answers[0]) for _ in range(2)]
    batch = [hw.Sampler(70) for _ in range(3)]
    for stream, one in enumerate(batch):
        one.admit(params, prompt, stream=stream, seed=5, **options)
    for _ in range(5):
        assert sampler.step(rows[:3]).tolist() == [one.step(rows[i : i + 1])[0] for i, one in enumerate(batch)]
    with pytest.raises(ValueError, match=r"^handle: expected one of the active rows, \[0, 1, 2\], got 9"):
        sampler.fork(9)
    with pytest.raises(ValueError, match=r"^seed: expected an integer from 0 to 18446744073709551615, got -1"):
        sampler.fork(0, seed=-1)
    tried = []
    for _ in range(3):  # one after another, from one state
        twin = sampler.fork(answers[0])
        tried.append(sampler.step(rows[:4]).tolist()[3])
        sampler.retire(twin)
        for row in answers:
            sampler.truncate(row, sampler.length(row) - 1)
    want = []
    for stream in (3, 4, 5):
        one = hw.Sampler(70)
        one.admit(params, prompt, sampler.history(answers[0])[3:], stream=stream, seed=5, **options)
        want.append(one.step(rows[3:4])[0])
    assert tried == want
    for row in answers:
        sampler.retire(row)
    assert sampler.fork(sampler.admit(params)) == 7
    again = sampler.step(rows[:2])  # streams 0 and 1 once more
    assert again.tolist() == hw.sample(rows[:2], params, position=9).tolist()


def test_p53_drafts_in_a_step() -> None:
    """By hand: the logits of each place are penalized and banned as a step would do it, then verified."""
    rng, n, prompt = np.random.default_rng(2), 3, [4, 4, 7]
    target = (rng.standard_normal((2, n + 1, 70)) * 2).astype(np.float32)
    draft = (target[:, :n] + rng.standard_normal((2, n, 70))).astype(np.float32)
    params, penalties = hw.SamplingParams(temperature=0.8, top_p=0.95), {"repetition": 1.4, "frequency": 0.3}
    seen = set()
    for seed in range(40):
        sampler = hw.Sampler(70)
        for i in range(2):
            sampler.admit(params, prompt, seed=seed + 100 * i, stop_tokens=range(20), min_tokens=2, **penalties)
        drafting = copy.deepcopy(sampler)
        tokens = np.stack([drafting.step(draft[:, i]) for i in range(n)], 1)
        got = sampler.verify(target, tokens, draft)
        for i in range(2):
            histories = [[*prompt, *tokens[i, :k].tolist()] for k in range(n + 1)]
            p, q = (hw.penalize(z[i], histories[: len(z[i])], prompt_lengths=3, **penalties) for z in (target, draft))
            for z in (p, q):
                z[:2, :20] = -np.inf  # before the output has two tokens
            want = hw.verify_draft(p, q, tokens[i], params, seed=seed + 100 * i, position=3)
            assert (got.accepted[i], got.next_token[i]) == (want.accepted, want.next_token)
            assert got.tokens[i].tolist() == want.tokens.tolist()
            assert sampler.history(i).tolist() == [*prompt, *(t for t in want.tokens.tolist() if t >= 0)]
            seen.add(want.accepted)
        after = [hw.penalize(target[i, 0], sampler.history(i), prompt_lengths=3, **penalties) for i in range(2)]
        for i, z in enumerate(after):
            if len(sampler.history(i)) < 5:
                z[:20] = -np.inf
        drawn = [
            hw.sample(z, params, seed=seed + 100 * i, position=len(sampler.history(i))) for i, z in enumerate(after)
        ]
        assert sampler.step(target[:, 0]).tolist() == drawn
    assert seen == set(range(n + 1))


def test_p53_lengths_masks_params_and_errors() -> None:
    greedy = hw.SamplingParams(temperature=0)

    def fresh() -> hw.Sampler:
        sampler = hw.Sampler(4)
        sampler.admit(greedy, [0], presence=1.5)
        sampler.admit(greedy, [0])
        return sampler

    target = np.array([[FOUR] * 3] * 2)
    got = fresh().verify(target, [[0, 1], [-1, -1]], lengths=[2, 0])  # 0, then 0 with presence is below 1
    assert got.tokens.tolist() == [[0, 1, 0], [0, -1, -1]]
    assert got.accepted.tolist() == [2, 0]
    assert fresh().verify(target[:, :1], np.zeros((2, 0), int)).tokens.tolist() == [[0], [0]]
    some = np.array([False, True, True, True])
    packed_some = np.array([[[-2]] * 3] * 2, np.int32)
    for masks in ([None, [some] * 3], np.stack([np.ones((3, 4), bool), np.tile(some, (3, 1))]), [None, [[1, 2]] * 3]):
        assert fresh().verify(target, [[0, 1], [0, 0]], allowed=masks).tokens.tolist() == [[0, 1, 0], [1, -1, -1]]
    assert fresh().verify(target, [[1, 0], [1, 1]], allowed=packed_some).tokens.tolist() == [[1, 3, -1], [1, 1, 1]]
    uniform = np.zeros((2, 2, 4))
    got = fresh().verify(target, [[0, 1], [0, 3]], uniform, draft_params=hw.SamplingParams(allowed=[0, 1, 3]))
    assert got.tokens.tolist() == [[0, 1, 0], [0, 0, -1]]
    nan, sampler = target.copy(), fresh()
    nan[1, 1, 2] = NAN
    before = pickle.dumps(sampler)
    for call, message in (
        (
            lambda: sampler.verify(nan, [[0, 1], [0, 0]]),
            r"^target_logits: .*NaN at token 2 in row \(1, 1\).*handle is 1",
        ),
        (lambda: sampler.verify(target, [[0, 1], [0, 4]]), r"^draft_tokens: expected ids from 0 to 3, got 4"),
        (lambda: sampler.verify(target, [[0], [0]]), r"^draft_tokens: expected shape \(2, 2\)"),
        (
            lambda: sampler.verify(target[:1], [[0, 1]]),
            r"^target_logits: expected shape \(2, n \+ 1, 4\), .*\(1, 3, 4\)",
        ),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], uniform[:, :1]),
            r"^draft_logits: expected shape \(2, 2, 4\)",
        ),
        (
            lambda: sampler.verify(target, [[0, 1], [3, 0]], uniform),
            r"^draft_tokens: expected tokens that the draft can draw, got 3 in row \(1, 0\).*handle is 1",
        ),
        (lambda: sampler.verify(target, [[0, 1], [0, 0]], lengths=[3, 0]), r"^lengths: expected integers from 0 to 2"),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], draft_params=greedy),
            r"^draft_params: expected draft_logits",
        ),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], uniform, draft_params=hw.SamplingParams(seed=1)),
            r"^draft_params: expected no seed",
        ),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], uniform, draft_params=hw.SamplingParams(top_k=[1, 2])),
            r"^draft_params: expected one top_k for all rows, got shape \(2,\)",
        ),
        (lambda: sampler.verify(target, [[0, 1], [0, 0]], allowed=[None]), r"^allowed: expected 2 lists"),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], allowed=[None, [some]]),
            r"^allowed\[1\]: expected 3 masks, one for each place of the row, got 1",
        ),
        (
            lambda: sampler.verify(target, [[0, 1], [0, 0]], allowed=np.ones((2, 4), bool)),
            r"^allowed: expected a mask for",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert pickle.loads(pickle.dumps(sampler)).step(target[:, 0]).tolist() == [0, 0]
        assert sampler.history(0).tolist() == pickle.loads(before).history(0).tolist()
    assert sampler.verify(target, [[0, 1], [0, 3]]).tokens.tolist() == [[0, 1, 0], [0, 0, -1]]


def test_p51_bans() -> None:
    """Alone and together, with masks of both kinds; beside rows without bans."""

    def drawn(n: int, prompt: Any = (), output: Any = (), mask: Any = None, **bans: Any) -> list[int]:
        sampler = hw.Sampler(4)
        for options in ({}, bans):
            sampler.admit(hw.SamplingParams(temperature=0), prompt, output, **options)
        masks = None if mask is None else np.array([mask] * 2)
        both = [sampler.step([FOUR] * 2, allowed=masks).tolist() for _ in range(n)]
        assert {plain for plain, _ in both} <= ({0} if mask is None else {1})
        return [token for _, token in both]

    assert drawn(4) == [0, 0, 0, 0]
    assert drawn(4, stop_tokens=[0, 1], min_tokens=3) == [3, 3, 3, 0]
    assert drawn(4, [2, 2], [2], stop_tokens=[0, 1], min_tokens=3) == [3, 3, 0, 0]
    assert drawn(2, stop_tokens=[0]) == [0, 0]
    assert drawn(2, banned_sequences=[0, [1]]) == [3, 3]
    assert drawn(4, banned_sequences=[[0, 0, 0]]) == [0, 0, 1, 0]
    assert drawn(2, [0], [0], banned_sequences=[[0, 0, 0], [1, 0]]) == [1, 1]
    assert drawn(4, no_repeat_ngram=1) == [0, 1, 3, 2]
    assert drawn(1, [0, 2], [1], no_repeat_ngram=1) == [3]
    assert drawn(7, no_repeat_ngram=2) == [0, 0, 1, 0, 3, 0, 2]
    assert drawn(4, [1, 0, 0], no_repeat_ngram=3) == [0, 1, 0, 1]
    assert drawn(1, [0, 0], no_repeat_ngram=4) == [0]
    for mask in (np.array([False, True, True, True]), np.array([14], np.int32), np.array([14], np.uint32)):
        assert drawn(3, mask=mask, no_repeat_ngram=1, banned_sequences=[[1, 3]]) == [1, 2, 3]
        assert mask.tolist() in ([False, True, True, True], [14])  # the caller's own stays
    says = r"^logits: expected at least one token .* in row 1, got none; less of no_repeat_ngram leaves one; the row's"
    with pytest.raises(ValueError, match=says) as caught:
        drawn(5, no_repeat_ngram=1)
    assert isinstance(caught.value, hw.RowError)
    assert caught.value.handle == 1
    # An id without a logit has its place in the sequence, and is equal to no other.
    for prompt, own in (([0, 99, 1, 0], {"no_repeat_ngram": 2}), ([0, 99], {"banned_sequences": [[0, 1]]})):
        sampler = hw.Sampler(4)
        row = sampler.admit(hw.SamplingParams(temperature=0), prompt, **own)
        assert sampler.step([[0.0, 5.0, 4.0, 0.0]]) == [1]
        assert sampler.length(row) == len(prompt) + 1
    sampler = hw.Sampler(4)
    sampler.admit(hw.SamplingParams(temperature=0), [0, 99, 0, 98, 0, 1, 99, 0], no_repeat_ngram=2)
    assert sampler.step([[0.0, 5.0, 4.0, 0.0]]) == [2]  # (0, 1) has occurred
    for bad, message in {
        "stop_tokens": ([4], "stop_tokens: expected integers from 0 to 3, got 4"),
        "min_tokens": (-1, "min_tokens: expected an integer >= 0, got -1"),
        "banned_sequences": ([[1], []], r"banned_sequences\[1\]: expected a token id, or a list of at least one"),
        "no_repeat_ngram": (0, "no_repeat_ngram: expected an integer >= 1, got 0"),
    }.items():
        with pytest.raises(ValueError, match=f"^{message[1]}"):
            drawn(0, **{bad: message[0]})
    with pytest.raises(ValueError, match=r"^stop_tokens: expected the ids that min_tokens bans, got none"):
        drawn(0, min_tokens=9)
    with pytest.raises(TypeError, match=r"^banned_sequences: expected a list of lists of token ids, got 3"):
        drawn(0, banned_sequences=3)


def test_p43_streams() -> None:
    """Rows with a seed from params take streams that no active one has; what `admit` gives decides for its own row."""
    params, rows = hw.SamplingParams(seed=5, position=2), np.zeros((4, 70), np.float32)

    def drawn(*admissions: dict[str, Any], sampler: hw.Sampler | None = None) -> list[list[int]]:
        sampler = hw.Sampler(70) if sampler is None else sampler
        for admission in admissions:
            sampler.admit(**{"params": params, **admission})
        return [sampler.step(rows[: len(sampler.handles)]).tolist() for _ in range(3)]

    batch = [hw.sample(rows, params, position=2 + j).tolist() for j in range(3)]
    assert drawn({}, {}, {}, {}) == batch
    assert len({tuple(column) for column in zip(*batch, strict=True)}) == 4
    assert drawn({"stream": 3}, {"stream": 1}) == [[row[3], row[1]] for row in batch]
    assert drawn({}, {"stream": 0}, {}) == [[row[0], row[0], row[1]] for row in batch]
    other_seed = {"params": hw.SamplingParams(seed=6)}
    assert drawn({"seed": 5, "params": hw.SamplingParams(position=2)}, other_seed, {})[0][::2] == batch[0][:2]
    assert drawn({}, {"seed": 5}) == [[row[0], row[0]] for row in batch]
    assert drawn({"seed": 5, "stream": 2}) == [[row[2]] for row in batch]
    equal = {"params": hw.SamplingParams(seed=5, position=2, top_k=70)}  # the seed counts, not the params
    assert drawn({}, equal) == [row[:2] for row in batch]
    sampler = hw.Sampler(70)
    first, _ = sampler.admit(params), sampler.admit(params)
    sampler.retire(first)
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), sampler):
        assert drawn({}, sampler=other) == [[row[1], row[0]] for row in batch]  # a row that has gone leaves its stream
    last = 2**64 - 1
    word = np.random.Philox(key=np.array([5, last], np.uint64), counter=1).random_raw(1)[0]
    assert drawn({"stream": last})[0] == [hw.sample(rows[0], uniform=(int(word) >> 11) / 2**53)]


def test_p34_an_error_draws_nothing() -> None:
    sampler = hw.Sampler(70)
    for ties in ("lowest_id", "keep", "lowest_id"):
        sampler.admit(hw.SamplingParams(ties=ties), seed=1)
    rows = ROWS[0].copy()
    rows[1, 7] = NAN
    with pytest.raises(ValueError, match=r"^logits: expected numbers, got NaN at token 7 in row 1;.* handle is 1$"):
        sampler.step(rows)
    sampler.retire(0)
    sampler.admit(seed=1)
    with pytest.raises(ValueError, match=r"^logits: expected numbers, got NaN at token 7 in row 1;.* handle is 2$"):
        sampler.step(rows)
    nothing, dead_end = np.ones((3, 70), bool), [None, None, [7]]
    nothing[1] = False
    for masks, row in ((nothing, 1), (packed(nothing), 1), ([None, [], None], 1), (dead_end, 2)):
        with pytest.raises(ValueError, match=rf"^allowed: expected at least one token .* in row {row}, got none"):
            sampler.step(np.where(np.arange(70) == 7, -INF, ROWS[0]), allowed=masks)
    assert sampler.step(ROWS[0]).tolist() == hw.sample(ROWS[0], seed=[1, 1, 1]).tolist()


def packed(mask: np.ndarray) -> np.ndarray:
    """Return a mask as grammar libraries make it."""
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view(np.int32)


def test_p35_masks_of_a_step() -> None:
    """Rows with and without a mask of their own, in one group and in several; then the mask is forgotten."""
    rows, masks = ROWS.reshape(6, 70), np.random.default_rng(5).random((6, 70)) < 0.2
    own = [None, [3, 9, 60], np.arange(70) % 2 == 0] * 2
    for ties in ("lowest_id", "keep"):
        sampler = hw.Sampler(70)
        each = [hw.SamplingParams(allowed=own[i], ties="lowest_id" if i % 2 else ties) for i in range(6)]
        for params in each:
            sampler.admit(params, seed=4, presence=0.5)
        both = [hw.filter_logits(z, params) > -INF for z, params in zip(rows, each, strict=True)] & masks
        both[:, 9] = masks[:, 9] = True
        masks[1, 9] = both[1, 9] = True  # what both leave is not nothing
        both[2::3, 9] = False
        both[2::3, 8] = masks[2::3, 8] = True
        words = packed(masks)
        words[:, -1] |= np.int32(-64)  # bits past V say nothing
        kinds = [masks, words, words.view(np.uint32), list(masks), [np.flatnonzero(mask).tolist() for mask in masks]]
        histories: list[list[int]] = [[] for _ in range(6)]
        for j, allowed in enumerate([*kinds, [masks[0], None, words[2], {8, 9}, None, None], None]):
            tokens = sampler.step(rows, allowed=allowed)
            left = both if j < len(kinds) else np.array([hw.filter_logits(rows[i], each[i]) > -INF for i in range(6)])
            if j == len(kinds):
                left[[0, 2]] = both[[0, 2]]
                left[3] = np.isin(np.arange(70), [8, 9])
            for i, (token, history) in enumerate(zip(tokens.tolist(), histories, strict=True)):
                z = hw.penalize(rows[i], history, presence=0.5)
                assert token == hw.sample(z, allowed=left[i], seed=4, position=j)
                history.append(token)


def test_p54_masks_of_an_only_row() -> None:
    """Each kind of mask, with the axis of rows and without, in both samplers; with more rows it is refused."""
    masks, logits = np.random.default_rng(6).random((3, 70)) < 0.4, ROWS[0]
    draft = [[int(mask.argmax()) for mask in masks[:2]]]
    for kind in (masks, packed(masks), packed(masks).view(np.uint32), np.asfortranarray(masks)):
        tokens, verified = [], []
        for make in (hw.Sampler, reference.Sampler):
            for own in (kind, kind[None]):
                sampler = make(70)
                sampler.admit(seed=3)
                tokens.append([sampler.step(logits[i : i + 1], allowed=own[..., i, :]).tolist() for i in range(3)])
                verified.append(sampler.verify(logits[None], draft, logits[None, :2], allowed=own).tokens.tolist())
                sampler.admit(seed=4)
                if make is hw.Sampler:
                    for rows in (1, 3):
                        wrong = own[..., 0, :].reshape(-1)
                        with pytest.raises(ValueError, match=r"^allowed: expected a mask for each active row"):
                            sampler.step(logits[:2], allowed=wrong)
                        with pytest.raises(ValueError, match=r"^allowed: expected a mask for each place of each row"):
                            sampler.verify(logits[None, :rows].repeat(2, 0), [[1] * (rows - 1)] * 2, allowed=kind)
        assert tokens == tokens[:1] * 4
        assert verified == verified[:1] * 4
        assert all(masks[i][token] for i, (token,) in enumerate(tokens[0]))


def test_p36_copies() -> None:
    """Both go on alike; what one does then, the other does not see."""
    sampler = hw.Sampler(70)
    for seed in range(3):
        sampler.admit(hw.SamplingParams(top_k=9), [1, 2, 3], seed=seed, frequency=0.4, window=5, dry_multiplier=0.5)
    sampler.step(ROWS[0])
    for other in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        other.retire(1)
        other.step(ROWS[0][:2])
    again = [pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler), copy.copy(sampler)]
    for _ in range(5):
        tokens = sampler.step(ROWS[1]).tolist()
        assert [other.step(ROWS[1]).tolist() for other in again] == [tokens] * 3
    assert [other.admit() for other in again] == [3, 3, 3]


def test_p37_threads_take_turns() -> None:
    """Each step's tokens are those of one of the steps that one thread would take, and none is missing or twice."""
    rows, params = np.zeros((4, 70), np.float32), [hw.SamplingParams(seed=i) for i in range(4)]
    sampler, alone = hw.Sampler(70), hw.Sampler(70)
    for one in params:
        for each in (sampler, alone):
            each.admit(one, repetition=1.5, dry_multiplier=0.5)
    drawn: list[tuple[int, ...]] = []
    errors: list[Exception] = []

    def calls() -> None:
        try:
            for _ in range(100):
                drawn.append(tuple(sampler.step(rows).tolist()))
                pickle.loads(pickle.dumps(sampler)).step(rows)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(drawn) == sorted(tuple(alone.step(rows).tolist()) for _ in range(400))


COPIED: dict[str, Callable[[np.ndarray], Any]] = {
    "kv_lengths, positions, breakers": lambda x: _check.integers(x, "x", 0, 9),
    "ids of allowed": lambda x: OPTION_CHECKS["allowed"]("allowed", x, ()),
    "lengths": lambda x: rows.lengths_within("lengths", x, x.shape, np.full(x.size, 9), "token_ids"),
    "token_ids": lambda x: penalties._histories(x, None, ())[0],
    "tokens of logprobs": lambda x: import_module("headway._sampling.logprobs")._tokens(x, prepare(np.zeros(9), None)),
    "draft_tokens": lambda x: import_module("headway._sampling.speculative").draft_ids(x, np.array([2]), (), 2, 9),
    **{name: lambda x, name=name, check=check: check(name, x) for name, check in penalties.CHECKS.items()},
    **{
        name: lambda x, name=name, check=check: check(name, x, ())
        for name, check in OPTION_CHECKS.items()
        if isinstance(check, (Reals, Integers))
    },
}


@pytest.mark.parametrize("name", list(COPIED))
def test_p44_what_is_checked_is_a_copy(name: str) -> None:
    taken = 0
    for dtype, number in itertools.product((np.int64, np.uint64, np.float64, np.float32), (1, 0)):
        given = np.array([number, number], dtype)
        try:
            assert not np.shares_memory(COPIED[name](given), given)
            taken += 1
        except (TypeError, ValueError):  # not of this type, or out of range
            continue
    assert taken > 0


def test_p44_logits_that_change_during_a_call() -> None:
    rng, V = np.random.default_rng(8), 20_000
    rows = [rng.standard_normal(V), -np.arange(V) / 9, np.full(V, -INF), np.full(V, NAN), np.zeros(V)]
    rows[2][7] = 0
    logits = np.zeros((2, V), np.float32)
    ids = np.zeros((2, 3), np.int64)
    stop = threading.Event()

    def write() -> None:
        for i in itertools.cycle(range(len(rows))):
            if stop.is_set():
                return
            logits[i % 2] = rows[i]
            ids[:], ids[:] = 2**40, 0

    def calls() -> Iterator[Any]:
        for options in ({}, {"top_k": 9}, {"top_p": 0.9}, {"temperature": 0}, {"min_p": 0.1}, {"typical_p": 0.5}):
            yield lambda o=options: hw.sample(logits, **o)
            yield lambda o=options: hw.sample(logits, num_samples=3, replacement=False, **o)
            yield lambda o=options: hw.logprobs(logits, top=5, processed=True, **o).top_tokens
            yield lambda o=options: hw.verify_draft(logits, logits[:1], ids[0, :1], **o).tokens
        yield lambda: hw.logprobs(logits, ids, top=50).top_tokens
        yield lambda: hw.penalize(logits, ids, lengths=ids[:, 0], presence=1).argmax(-1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for call in itertools.chain.from_iterable(map(lambda _: calls(), range(12))):
            try:
                tokens = np.asarray(call())
            except ValueError:
                continue
            assert tokens.min() >= -1
            assert tokens.max() < V
    finally:
        stop.set()
        writer.join()


def test_p37_a_call_from_within_another() -> None:
    sampler = hw.Sampler(2)
    handle = sampler.admit(hw.SamplingParams(temperature=0))

    class Retiring:
        """Retires the row as it becomes an array."""

        def __init__(self, values: Any) -> None:
            self.values = np.array(values)

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            sampler.retire(handle)
            return self.values

    with pytest.raises(TypeError, match=r"^allowed: .*Sampler: expected a call after the last one, got one"):
        sampler.step([[0.0, 1.0]], allowed=Retiring([[True, True]]))
    assert sampler.handles == [handle]
    assert sampler.step([[0.0, 1.0]]).tolist() == [1]
    with pytest.raises(TypeError, match=r"^logits: .*Sampler: expected a call after the last one, got one"):
        sampler.step(Retiring([[0.0, 1.0]]))
