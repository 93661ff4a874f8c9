"""The sampling half of docs/semantics.md, sentence by sentence: test_s7_... says that sentence S7 holds.

Small numbers on purpose: a sentence should be checkable by eye. The other test files search widely.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway import reference
from headway._sampling.dialects import DIALECTS, OFF, rules

NAN, INF = np.nan, np.inf
LAST = 1 - 2.0**-53  # the largest number below 1
FUNCTIONS = (hw.sample, hw.probabilities, hw.filter_logits)
FOUR = np.zeros(4, np.float32)  # a quarter each, exactly
LOGS = np.log([0.4, 0.3, 0.2, 0.1])
RNG = np.random.default_rng(7)
ROWS = (RNG.standard_normal((2, 3, 70)) * 2).astype(np.float32)


def kept(logits: Any, **options: Any) -> list[int]:
    """The ids that are left: the reference leaves the same, at these boundaries too."""
    left = np.asarray(hw.filter_logits(logits, **options), np.float64)
    assert np.array_equal(left, np.asarray(reference.filter_logits(logits, **options), np.float64))
    return np.flatnonzero(left > -INF).tolist()


def masses(logits: Any, **options: Any) -> list[float]:
    return hw.probabilities(np.asarray(logits, np.float64), **options).tolist()


def test_every_sentence_has_a_test() -> None:
    document = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text()
    sentences = {int(n) for n in re.findall(r"^- \*\*S(\d+)\*\* ", document, re.MULTILINE)}
    tests = {int(m[1]) for name in globals() if (m := re.match(r"test_s(\d+)_", name))}
    assert len(sentences) >= 38
    assert sentences == set(range(1, len(sentences) + 1))
    assert tests == sentences


# A row of logits ----------------------------------------------------------------------------------------------------


def test_s1_shapes_and_types() -> None:
    assert type(hw.sample(ROWS[0, 0])) is int
    tokens = hw.sample(ROWS)
    assert tokens.shape == (2, 3)
    assert tokens.dtype == np.int64
    assert hw.probabilities(ROWS).shape == hw.filter_logits(ROWS).shape == ROWS.shape
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        logits = ROWS.astype(dtype)
        assert hw.probabilities(logits).dtype == (np.float64 if dtype is np.float64 else np.float32)
        assert hw.filter_logits(logits).dtype == dtype
        with_bias = hw.filter_logits(logits, logit_bias={0: 1.0})
        assert with_bias.dtype == (np.float64 if dtype is np.float64 else np.float32)
    assert hw.sample([4.0]) == 0
    assert hw.sample(np.zeros((0, 7))).shape == (0,)
    assert hw.probabilities(np.zeros((2, 0, 7), np.float32), top_p=0.5).shape == (2, 0, 7)
    assert hw.filter_logits(np.zeros((0, 7)), logit_bias=np.zeros(7), allowed=[1]).shape == (0, 7)


def test_s2_logits_count_as_float32() -> None:
    assert hw.sample([1.0, 1 + 2.0**-30], temperature=0) == 0  # equal in float32
    assert hw.sample([1.0, 1 + 2.0**-23], temperature=0) == 1
    for dtype in (np.float16, ml_dtypes.bfloat16):
        logits = ROWS.astype(dtype)
        assert np.array_equal(hw.probabilities(logits), hw.probabilities(logits.astype(np.float32)))
    assert hw.probabilities([1, 2]).dtype == np.float64
    assert kept([-1e300, -1e39, -3e38], top_k=1) == [2]
    assert kept([-1e300, -1e39], top_k=1) == [0]  # both are the lowest number


def test_s3_bans_and_errors() -> None:
    assert kept([1.0, -INF, 2.0]) == [0, 2]
    for bad, message in [(NAN, "NaN at token 1"), (INF, r"\+inf at token 1"), (1e39, "got one at token 1")]:
        with pytest.raises(ValueError, match=rf"{message} in row 1"):
            hw.sample([[0.0, 0.0], [0.0, bad]])
    with pytest.raises(ValueError, match=r"token 0 that overflows with its logit_bias"):
        hw.sample(np.float32([3e38, 0]), logit_bias={0: 3e38})
    with pytest.raises(ValueError, match=r"not banned in row 0, got none"):
        hw.sample([[-INF, -INF], [0.0, 1.0]])


LOW = float(np.finfo(np.float32).min)


def test_s40_what_is_too_low_is_no_ban() -> None:
    assert masses([-1e300, -1e300]) == [0.5, 0.5]
    assert masses([-1e300, -INF]) == [1, 0]
    for dtype, low in ((np.float64, -3e38), (np.float32, -3e38), (ml_dtypes.bfloat16, -3e38), (np.float16, -6e4)):
        logits = np.array([low, low, -INF], dtype)
        for bias in ([-3e38, -3.2e38, 0.0], {0: -3.3e38, 1: -3.4e38}, [-1e300, -1e301, 0.0], np.float32([LOW, LOW, 1])):
            assert kept(logits, logit_bias=bias) == [0, 1]
            assert hw.filter_logits(logits, logit_bias=bias)[:2].tolist() == [LOW, LOW] or dtype is np.float16
            assert np.isneginf(hw.filter_logits(logits, logit_bias=bias)[2])
        assert hw.probabilities(logits, logit_bias=[-1e300, -1e300, 0]).tolist() == [0.5, 0.5, 0]
        assert kept(logits, logit_bias=[-INF, -1e300, 0.0]) == [1]
    assert hw.explain([-1e300, 0.0, -INF], logit_bias=[-1e300, 0.0, 0.0]).banned == 1


def test_s4_logit_bias() -> None:
    logits = [1.0, 2.0, 3.0, 4.0]
    assert hw.filter_logits(logits, logit_bias={0: 2.5}).tolist() == [3.5, 2, 3, 4]
    assert hw.filter_logits(logits, logit_bias=[0, 0, 0, -INF]).tolist() == [1, 2, 3, -INF]
    assert kept(logits, logit_bias={3: -INF, 0: 2.5}, top_k=2) == [0, 2]
    assert hw.sample(logits, logit_bias={0: 100}, temperature=0) == 0
    assert hw.sample([logits] * 2, logit_bias=[[9, 0, 0, 0], [0, 9, 0, 0]], temperature=0).tolist() == [0, 1]
    assert masses([0.0, 0.0], logit_bias={1: np.log(3)}) == pytest.approx([0.25, 0.75])
    for bad in (NAN, INF):
        with pytest.raises(ValueError, match=r"^logit_bias\[1\]"):
            hw.sample(logits, logit_bias={1: bad})


def test_s5_what_is_not_allowed_has_no_influence() -> None:
    logits, clean = np.float32([NAN, 1.0, INF, 2.0]), np.float32([0.0, 1.0, 0.0, 2.0])
    for function in FUNCTIONS:
        got, want = (np.asarray(function(x, allowed=[1, 3], seed=1)) for x in (logits, clean))
        assert got.tobytes() == want.tobytes()
    assert hw.probabilities(clean, allowed=[0, 2]).tolist() == [0.5, 0, 0.5, 0]


ALLOWED = np.array([i in (1, 3, 33, 64) for i in range(70)])


@pytest.mark.parametrize(
    "allowed",
    [
        ALLOWED,
        ALLOWED.tolist(),
        [1, 3, 33, 64],
        (64, 33, 3, 1, 1),
        {1, 3, 33, 64},
        np.array([1, 3, 33, 64], np.int64),
        np.array([0b1010, 0b10, 1], np.uint32),
        np.array([0b1010, 0b10, 1 | -(2**31)], np.int32),  # a bit past V
        np.array([0b1010, 7, 0b10, 7, 1, 7], np.uint32)[::2],
    ],
)
def test_s6_every_form_of_allowed(allowed: Any) -> None:
    want = np.where(ALLOWED, ROWS, np.float32(-INF))
    assert hw.filter_logits(ROWS, allowed=allowed).tobytes() == want.tobytes()
    assert np.array_equal(reference.filter_logits(ROWS, allowed=allowed), want)


def test_s6_masks_per_row_and_bad_ids() -> None:
    masks = RNG.random((2, 1, 70)) < 0.5
    packed = np.packbits(np.pad(masks, ((0, 0), (0, 0), (0, 96 - 70))), axis=-1, bitorder="little").view(np.int32)
    assert np.array_equal(hw.filter_logits(ROWS, allowed=packed), np.where(masks, ROWS, np.float32(-INF)))
    for bad in (-1, 70):
        with pytest.raises(ValueError, match=rf"^allowed: expected ids from 0 to 69, got {bad}"):
            hw.sample(ROWS, allowed=[3, bad])
    for mixed in ([True, False, 1], {True, 3}):
        with pytest.raises(TypeError, match=r"^allowed: .*mixture"):
            hw.sample(ROWS, allowed=mixed)
    for words in (2, 4):  # of a tokenizer with fewer tokens, and with more
        with pytest.raises(
            ValueError, match=rf"^allowed: expected .* 3 .* for 70 tokens, got shape \(1, {words}\); make"
        ):
            hw.sample(ROWS[0, 0], allowed=np.full((1, words), -1, np.int32))
    past = np.array([0, 0, -64], np.int32)  # bits of tokens that logits do not have allow nothing
    with pytest.raises(ValueError, match=r"^allowed: expected at least one token that is not banned, got none"):
        hw.sample(ROWS[0, 0], allowed=past)
    for dtype in (np.int32, np.uint32):  # as many words as 70 tokens take: no ids
        assert np.flatnonzero(hw.probabilities(ROWS[0, 0], allowed=np.array([1, 3, 0], dtype))).tolist() == [0, 32, 33]


# Order and mass -----------------------------------------------------------------------------------------------------


def test_s7_the_order_of_tokens() -> None:
    assert kept([1.0, 2.0, 2.0, 0.0, 2.0], top_k=2) == [1, 2]
    assert kept([1.0, 2.0, 2.0, 0.0, 2.0], top_k=2, logit_bias={0: 1.0}) == [0, 1]
    assert kept([-0.0, 0.0, -0.0], top_k=2) == [0, 1]
    assert kept([-1.0, 1e-45, 0.0, -1e-45], top_k=2) == [1, 2]


def test_s8_temperature() -> None:
    assert masses([3.0, 2.0, 1.0], temperature=0.5) == pytest.approx(
        (np.exp([4, 2, 0]) / np.exp([4, 2, 0]).sum()).tolist()
    )
    for bad in (-0.1, INF, NAN):
        with pytest.raises(ValueError, match=r"^temperature: expected a finite number >= 0"):
            hw.sample(FOUR, temperature=bad)


def test_s9_temperatures_at_the_ends() -> None:
    logits = [1.0, 3.0, 3.0, 2.999]
    assert masses(logits, temperature=0) == [0, 1, 0, 0]
    for tiny in (1e-5, 1e-40, 5e-324):
        assert masses(logits, temperature=tiny) == [0, 0.5, 0.5, 0]
    for huge in (1e39, 1e300):
        assert masses([1.0, 3.0, -INF, -3e4, 2.0], temperature=huge) == [0.25, 0.25, 0, 0.25, 0.25]
    assert kept(logits, temperature=0) == [0, 1, 2, 3]
    assert kept(logits, temperature=0, top_p=0.99) == [1]


def test_s10_masses_are_whole_numbers() -> None:
    """Over 2^44, the best token's, whatever the others are."""
    logits = np.log(RNG.random(50)) - 3
    weights = [Fraction(p) / Fraction(max(masses(logits))) * 2**44 for p in masses(logits)]
    assert max(abs(w - round(w)) for w in weights) < 2**-4  # p = w / total is rounded to 53 bits
    assert masses([0.0, -1e4]) == [1, 0]
    assert masses([0.0, -44.9 * np.log(2)])[1] == pytest.approx(2.0**-44)
    assert masses([0.0, -45.1 * np.log(2)])[1] == 0
    assert masses([0.0, -41.9 * np.log(2), *[-INF] * 2**20])[1] == pytest.approx(2.0**-41, rel=1e-9)  # s = 41
    assert masses([0.0, -42.1 * np.log(2), *[-INF] * 2**20])[1] == 0


# What is removed ----------------------------------------------------------------------------------------------------


def test_s11_the_order_of_stages() -> None:
    assert kept([3.0, 2.0, 1.0], temperature=0.5, top_p=0.8) == [0]  # with the temperature last: [0, 1]
    assert kept([3.0, 2.0, 1.0], temperature=1.0, top_p=0.8) == [0, 1]
    assert kept([3.0, 2.0, 1.0], top_k=1, logit_bias={0: -INF}) == [1]  # not: nothing
    assert kept(LOGS, top_k=2, top_p=0.5) == [0]  # with top_p first: [0, 1]
    assert kept(LOGS, top_p=0.95, min_p=0.3) == [
        0,
        1,
        2,
    ]  # with min_p first the whole is 0.9: 0.855 keeps [0, 1, 2] too
    assert kept(LOGS, top_p=0.75, min_p=0.6) == [0, 1]
    assert kept(LOGS, top_k=2, epsilon_cutoff=0.43) == [0]  # 0.3 of 0.7; with epsilon first nothing reaches 0.43
    assert kept(LOGS, top_n_sigma=1.0, top_p=0.57) == [0]  # sigma 0.5 leaves the first two; of these, 0.571 comes first
    assert kept(LOGS, top_n_sigma=1.0) == [0, 1]
    assert kept(LOGS, top_p=0.57) == [0, 1]
    assert kept([*LOGS, -9.0], typical_p=0.2, epsilon_cutoff=0.9) == [1]
    assert kept(LOGS, epsilon_cutoff=0.11, xtc_probability=1, xtc_threshold=0.19) == [2]  # with xtc first: [2, 3]
    assert kept(LOGS, xtc_probability=1, xtc_threshold=0.19) == [2, 3]


def test_s12_top_k() -> None:
    logits = [1.0, 2.0, 2.0, 0.0, 2.0]
    assert kept(logits, top_k=1) == [1]
    assert kept(logits, top_k=4) == [0, 1, 2, 4]
    assert kept(logits, top_k=5) == kept(logits, top_k=10**30) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2, ties="keep") == [1, 2, 4]
    assert kept(logits, top_k=4, ties="keep") == [0, 1, 2, 4]
    assert kept([-INF, 1.0, -INF, 0.0], top_k=3, ties="keep") == [1, 3]


def test_s13_top_p() -> None:
    assert kept(FOUR, top_p=0.5) == [0, 1]
    assert kept(FOUR, top_p=np.nextafter(0.5, 1)) == [0, 1, 2]
    assert kept(FOUR, top_p=np.nextafter(0.5, 0)) == [0, 1]
    assert kept(FOUR, top_p=5e-324) == [0]
    assert kept(FOUR, top_p=LAST) == [0, 1, 2, 3]
    assert kept([0.0, -1000.0], top_p=1.0) == [0, 1]  # off
    assert kept([0.0, -1000.0], top_p=LAST) == [0]  # no mass is left for the second
    assert kept(np.zeros(10, np.float32), top_p=0.3) == [0, 1, 2]  # the float64 number 0.3 is less than 3/10
    assert kept(np.zeros(10, np.float32), top_p=np.float32(0.3)) == [0, 1, 2, 3]  # and the float32 number is more


def test_s14_nucleus() -> None:
    """Of the first two, 0.4 is 0.57."""
    assert kept(LOGS, top_k=2, top_p=0.5) == [0]
    assert kept(LOGS, top_k=2, top_p=0.5, nucleus="joint") == [0, 1]
    assert kept(LOGS, top_k=2, top_p=0.95, nucleus="joint") == [0, 1]
    assert kept(LOGS, top_k=3, top_p=0.3, nucleus="joint") == [0]
    assert kept(LOGS, top_p=0.5, nucleus="joint", allowed=[1, 2, 3]) == [1]  # 0.3 of 0.6
    spread = [3.0, 2.9, 0.0, -1.0, -1.2, -1.3, -1.4]  # the best has 0.496 of all, and 0.525 of the first two
    assert kept(spread, top_n_sigma=1.0) == [0, 1]
    assert kept(spread, top_p=0.51, nucleus="joint") == [0, 1]
    assert kept(spread, top_p=0.51, nucleus="joint", top_n_sigma=1.0) == [0]


def test_s15_min_p() -> None:
    logits = [0.0, 0.0, -1.0]
    assert kept(logits, min_p=1.0) == [0, 1]
    assert kept(logits, min_p=0) == [0, 1, 2]
    share = masses(logits)[2] / masses(logits)[0]
    assert kept(logits, min_p=share - 1e-12) == [0, 1, 2]
    assert kept(logits, min_p=share + 1e-12) == [0, 1]
    assert kept([0.0, -1000.0], min_p=5e-324) == [0]


def test_s16_filter_logits() -> None:
    assert hw.filter_logits([3.0, 2.0, 1.0], temperature=0.1, top_k=2).tolist() == [3, 2, -INF]
    assert hw.filter_logits([2.0**-40 + 1])[0] == 2.0**-40 + 1
    assert hw.filter_logits([2.0**-40 + 1], logit_bias={0: 1.0})[0] == 2
    assert hw.filter_logits([1.0], logit_bias={0: 2.0**-24 * 1.5})[0] == 1 + 2.0**-23
    assert hw.filter_logits(np.float32([1.0]), logit_bias={0: 2.0**-24 * 1.5})[0] == np.float32(1 + 2.0**-23)
    assert hw.filter_logits(np.float16([1.0]), logit_bias={0: 2.0**-11 * 1.5})[0] == np.float32(1 + 2.0**-11 * 1.5)
    assert np.signbit(hw.filter_logits([-0.0, 0.0])).tolist() == [True, False]
    assert np.signbit(hw.filter_logits([-0.0, 0.0], logit_bias=[-0.0, 0.0])).tolist() == [False, False]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.7, "top_k": 20},
        {"top_p": 0.8},
        {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.5, "typical_p": 0.3},
        {"temperature": 1.5, "xtc_probability": 1, "xtc_threshold": 0.02},
    ],
)
def test_s17_filtering_first_is_the_same_draw(options: dict[str, Any]) -> None:
    left, temperature = hw.filter_logits(ROWS, **options), options.get("temperature", 1.0)
    assert np.array_equal(hw.sample(left, temperature=temperature, seed=8), hw.sample(ROWS, seed=8, **options))
    assert np.array_equal(hw.probabilities(left, temperature=temperature), hw.probabilities(ROWS, **options))


def test_s17_with_a_bias_that_its_type_would_round_away() -> None:
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        left = hw.filter_logits(np.array([10, 10], dtype), logit_bias={1: 0.003})
        assert hw.sample(left, temperature=0) == 1
    near = [1.0, 1.0 - 2.0**-26]  # equal as float32
    left = hw.filter_logits(near, logit_bias=[2.0**-25, 2.0**-25])
    assert hw.sample(left, temperature=0) == hw.sample(near, logit_bias=[2.0**-25, 2.0**-25], temperature=0) == 0


# More filters -------------------------------------------------------------------------------------------------------


def test_s27_top_n_sigma() -> None:
    logits = [4.0, 3.0, 2.0, 1.0, 0.0, -INF]  # sigma is sqrt(2), whatever is banned
    assert kept(logits, top_n_sigma=0.5) == [0]
    assert kept(logits, top_n_sigma=1.0) == [0, 1]
    assert kept(logits, top_n_sigma=1.5) == [0, 1, 2]
    assert kept(logits, top_n_sigma=1.5, temperature=0.01) == kept(logits, top_n_sigma=1.5, temperature=50.0)
    assert kept([2.0, 0.0], top_n_sigma=2.0) == [0, 1]  # sigma is 1: exactly 2 below stays
    assert kept([2.0, 0.0], top_n_sigma=np.nextafter(2, 0)) == [0]
    assert kept([1.0, 1.0, 1.0], top_n_sigma=1e-300) == [0, 1, 2]
    assert kept(logits, top_n_sigma=INF) == [0, 1, 2, 3, 4]


def test_s28_typical_p() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])  # entropy 1.75 bits; surprise 1, 2, 3, 3
    assert kept(logits, typical_p=1e-9) == [1]
    assert kept(logits, typical_p=0.25) == [1]
    assert kept(logits, typical_p=0.26) == [0, 1]
    assert kept(logits, typical_p=0.76) == [0, 1, 2]  # equally far: the lower id
    assert kept(logits, typical_p=0.9) == [0, 1, 2, 3]
    assert kept(logits, typical_p=1.0) == [0, 1, 2, 3]
    assert kept(FOUR, typical_p=0.5) == [0, 1]
    assert kept(FOUR, typical_p=np.nextafter(0.5, 1)) == [0, 1, 2]
    assert kept([1.0, 2.0, 2.0], typical_p=0.3, temperature=0) == [1]


def test_s29_epsilon_cutoff() -> None:
    assert kept(FOUR, epsilon_cutoff=0.25) == [0, 1, 2, 3]
    assert kept(FOUR, epsilon_cutoff=np.nextafter(0.25, 1)) == [0]  # nothing reaches it: min_tokens_to_keep
    assert kept(LOGS, epsilon_cutoff=0.15) == [0, 1, 2]
    assert kept([0.0, -1000.0], epsilon_cutoff=0) == [0, 1]


def test_s30_eta_cutoff() -> None:
    flat = np.zeros(100, np.float32)  # exp(-entropy) is 0.01
    flat[99] = -1.0
    share = masses(flat)[99]
    assert kept(flat, eta_cutoff=0.2) == list(range(99))  # sqrt(0.2) 0.01 = 0.0045
    assert kept(flat, eta_cutoff=0.1) == list(range(100))  # 0.0032
    assert 0.0032 < share < 0.0045
    assert kept(LOGS, eta_cutoff=0.15) == kept(LOGS, epsilon_cutoff=math.sqrt(0.15) * math.exp(-1.2799))
    assert kept([0.0, -9.0], eta_cutoff=1e-4) == [0, 1]  # 1.2e-4 of it: epsilon is the smaller
    assert kept([0.0, -9.0], eta_cutoff=2e-4) == [0]
    assert kept([0.0, -1000.0], eta_cutoff=0) == [0, 1]


def test_s31_xtc() -> None:
    on = {"xtc_probability": 1.0}
    assert kept(np.log([0.5, 0.3, 0.15, 0.05]), **on) == [2, 3]  # the threshold is 0.1
    assert kept(LOGS, xtc_threshold=0.15, **on) == [2, 3]
    assert kept(LOGS, xtc_threshold=0.35, **on) == [0, 1, 2, 3]  # one alone stays
    assert kept(FOUR, xtc_threshold=0.25, **on) == [3]  # exactly the threshold counts; the last of the order stays
    assert kept(FOUR, xtc_threshold=np.nextafter(0.25, 1), **on) == [0, 1, 2, 3]
    assert kept([0.0, -1.0, -1000.0], xtc_threshold=0.0, **on) == [1, 2]  # no mass: does not count
    assert kept([0.0, -1.0, -1.0, -4.0], **on) == [2, 3]
    assert kept(LOGS, xtc_probability=0, xtc_threshold=0.0) == [0, 1, 2, 3]


def test_s32_xtc_takes_the_second_word() -> None:
    logits = [1.0, 0.5, -3.0]
    for seed in range(30):
        for position in (0, 7):
            words = np.random.Philox(key=[seed, 0], counter=(position - 1) % 2**256).random_raw(2)
            coin = (int(words[1]) >> 11) / 2**53
            for q, falls in [(coin, False), (np.nextafter(coin, 1), True)]:
                where = {"xtc_probability": q, "seed": seed, "position": position}
                assert kept(logits, **where) == ([1, 2] if falls else [0, 1, 2])
                assert masses(logits, **where)[0] == 0 or not falls
                assert hw.sample(logits, **where) > 0 or not falls
    assert hw.sample([0.0, 0.0], uniform=0, xtc_probability=1) == 1
    with pytest.raises(ValueError, match=r"^uniform: expected xtc_probability 0 or 1 beside it"):
        hw.sample(FOUR, uniform=0.5, xtc_probability=0.5)


def test_s33_min_tokens_to_keep() -> None:
    logits = [3.0, 1.0, 2.0, 0.0, -INF]
    for cruel in (
        {"top_k": 1},
        {"top_p": 1e-9},
        {"min_p": 1.0},
        {"epsilon_cutoff": 1.0},
        {"eta_cutoff": 1.0},
        {"top_n_sigma": 1e-9},
    ):
        assert kept(logits, **cruel) == [0], cruel
        assert kept(logits, min_tokens_to_keep=2, **cruel) == [0, 2], cruel
        assert kept(logits, min_tokens_to_keep=9, **cruel) == [0, 1, 2, 3], cruel
    assert kept(logits, min_tokens_to_keep=2, typical_p=1e-9) == [0, 2]
    assert kept([0.0] * 9, min_tokens_to_keep=2, typical_p=1e-9) == [0, 1]
    assert kept(LOGS, xtc_probability=1, xtc_threshold=0.19, min_tokens_to_keep=2) == [2, 3]
    assert kept(LOGS, xtc_probability=1, xtc_threshold=0.19, min_tokens_to_keep=3) == [0, 1, 2, 3]


def test_s34_dynamic_temperature() -> None:
    p = np.array([0.5, 0.25, 0.125, 0.125])  # entropy 1.75 of at most 2 bits
    for exponent in (1.0, 2.5):
        t = 0.4 + 1.2 * 0.875**exponent
        options = {"dynamic_temperature_range": 0.6, "dynamic_temperature_exponent": exponent}
        assert masses(np.log(p), **options) == pytest.approx((p ** (1 / t) / (p ** (1 / t)).sum()).tolist(), rel=1e-6)
    low = masses(np.log(p), temperature=0.2, dynamic_temperature_range=0.5)  # from 0, not from -0.3
    t = 0.7 * 0.875
    assert low == pytest.approx((p ** (1 / t) / (p ** (1 / t)).sum()).tolist(), rel=1e-6)
    assert masses([0.0, 0.0, -INF], dynamic_temperature_range=0.5) == [0.5, 0.5, 0]
    assert masses([5.0, 0.0], temperature=0.3, dynamic_temperature_range=0) == masses([5.0, 0.0], temperature=0.3)
    assert masses([800.0, 0.0, 0.0], temperature=0.5, dynamic_temperature_range=9) == [1, 0, 0]  # entropy 0: t is 0


def test_s41_tokens_that_xtc_spares() -> None:
    on = {"xtc_probability": 1.0, "xtc_threshold": 0.15}  # 0, 1 and 2 reach it: 0 and 1 go
    assert kept(LOGS, **on) == [2, 3]
    for ids in ([0], (0,), {0}, frozenset({0}), np.array([0]), np.array([0], np.uint8), [0, 3, 0], [0, 2]):
        assert kept(LOGS, xtc_special_tokens=ids, **on) == [0, 2, 3], ids
        assert kept([LOGS, LOGS], xtc_special_tokens=ids, **on) == [0, 2, 3, 4, 6, 7]
        params = hw.SamplingParams(xtc_special_tokens=ids, **on)
        assert kept(LOGS, params=params) == [0, 2, 3]
        assert hash(params) is not None
    assert kept(LOGS, xtc_special_tokens=[2], **on) == [2, 3]  # the last that reaches the threshold, special or not
    assert kept(LOGS, xtc_special_tokens=[0, 1], **on) == [0, 1, 2, 3]
    assert kept(LOGS, xtc_special_tokens=[], **on) == kept(LOGS, xtc_special_tokens=None, **on) == [2, 3]
    assert kept(LOGS, xtc_special_tokens=[0], min_tokens_to_keep=3, **on) == [0, 2, 3]  # three are left with it,
    assert kept(LOGS, min_tokens_to_keep=3, **on) == [0, 1, 2, 3]  # and two without
    assert kept(LOGS, xtc_special_tokens=[3], top_k=3, **on) == [2]  # other stages do not heed it
    assert kept(LOGS, xtc_special_tokens=[1], allowed=[0, 2, 3], **on) == [2, 3]
    assert kept(TIED, dialect="mlx", xtc_special_tokens=[0], **on) == [0, 1, 2, 3, 4]
    assert masses(LOGS, xtc_special_tokens=[0], **on) == pytest.approx([4 / 7, 0, 2 / 7, 1 / 7])
    for dialect in ("llama.cpp", "hf", "vllm", "sglang", "flashinfer"):
        with pytest.raises(ValueError, match=rf"^xtc_special_tokens: expected none in dialect '{dialect}'"):
            hw.sample(LOGS, dialect=dialect, xtc_special_tokens=[0])
    same = [hw.SamplingParams(xtc_special_tokens=ids) for ids in ([2, 1], (1, 2, 2), {1, 2}, np.array([2, 1]))]
    assert set(same) == {same[0]} == {copy.deepcopy(same[3])} == {pickle.loads(pickle.dumps(same[1]))}
    assert same[0] != hw.SamplingParams(xtc_special_tokens=[1]) != hw.SamplingParams()
    assert hw.SamplingParams(xtc_special_tokens=[]) == hw.SamplingParams()


def packed(mask: Any) -> Any:
    padded = np.pad(mask, [(0, 0)] * (np.ndim(mask) - 1) + [(0, -np.shape(mask)[-1] % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view(np.int32)


def test_s42_leading_axes_of_one() -> None:
    """Every function x every kind of mask and bias: (1, n) for a lone row is (n,), and (1, rows, n) is (rows, n)."""
    masks = np.random.default_rng(3).random((3, 70)) < 0.6
    bias = np.where(masks, 0, -INF).astype(np.float32)
    functions: dict[str, Any] = {
        "sample": lambda z, **o: hw.sample(z, seed=3, **o),
        "probabilities": hw.probabilities,
        "filter_logits": hw.filter_logits,
        "logprobs": lambda z, **o: hw.logprobs(z, top=70, processed=True, **o).top_tokens,
        "explain": lambda z, **o: hw.explain(z, **o).kept,
        "verify_draft": lambda z, **o: (
            hw.verify_draft(
                z[None] if z.ndim == 1 else z[:, None], None, np.zeros((*z.shape[:-1], 0), int), seed=3, **o
            ).tokens
        ),
        "step": lambda z, **o: step(z, **o),
        "reference.sample": lambda z, **o: reference.sample(z, seed=3, **o),
        "reference.filter_logits": reference.filter_logits,
        "reference.verify_draft": lambda z, **o: (
            reference.verify_draft(
                z[None] if z.ndim == 1 else z[:, None], None, np.zeros((*z.shape[:-1], 0), int), seed=3, **o
            ).tokens
        ),
    }

    def step(z: Any, **options: Any) -> Any:
        """By params, and for the step alone: as a mask of its rows, and as one of each row."""
        rows = z.reshape(-1, 70)
        sampler = hw.Sampler(70)
        by_params = len(rows) == 1
        for seed in range(len(rows)):
            sampler.admit(hw.SamplingParams(**options) if by_params else None, seed=seed)
        if by_params:
            return sampler.step(rows)
        return sampler.step(rows, allowed=options["allowed"])

    kinds = {"bool": masks, "int32": packed(masks), "uint32": packed(masks).view(np.uint32), "bias": bias}
    for kind, array in kinds.items():
        name = "logit_bias" if kind == "bias" else "allowed"
        for call, function in functions.items():
            want = np.asarray(function(ROWS[0, 0], **{name: array[0]}))
            for own in (array[:1], array[None, :1], array[None, None, :1]):
                got = np.asarray(function(ROWS[0, 0], **{name: own}))
                assert got.tobytes() == want.tobytes(), (call, kind, own.shape)
            if call != "explain" and "verify" not in call and (call, kind) != ("step", "bias"):
                want = np.asarray(function(ROWS[0], **{name: array}))
                got = np.asarray(function(ROWS[0], **{name: array[None]}))
                assert got.tobytes() == want.tobytes(), (call, kind)
            if "reference" not in call:
                for wrong in (array[:2], array[None, :2]):
                    shape = re.escape(str(wrong.shape))
                    if call != "verify_draft":
                        with pytest.raises(ValueError, match=rf"^{name}: expected .*got (shape )?{shape}$"):
                            function(ROWS[0, 0], **{name: wrong})
        if kind != "bias":
            sampler = hw.Sampler(70)
            for seed in range(3):
                sampler.admit(seed=seed)
            want = hw.sample(ROWS[0], seed=np.arange(3), allowed=array)
            assert sampler.step(ROWS[0], allowed=[own[None] for own in array]).tolist() == want.tolist()
    # Places of a draft: (n + 1, V) with an axis in front.
    draft = [int(mask.argmax()) for mask in masks[:2]]
    for name, array in (("allowed", masks), ("allowed", packed(masks)), ("logit_bias", bias)):
        want = hw.verify_draft(ROWS[0], ROWS[1, :2], draft, seed=4, **{name: array}).tokens
        for function in (hw.verify_draft, reference.verify_draft):
            for own in (array, array[None], array[None, None]):
                got = function(ROWS[0], ROWS[1, :2], draft, seed=4, **{name: own}).tokens
                assert got.tolist() == want.tolist()


def test_s43_jax_without_64_bits() -> None:
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    rows = jax.numpy.asarray(ROWS[0])
    whole = {
        "sample": lambda: [hw.sample(rows), hw.sample(rows, num_samples=2)],
        "logprobs": lambda: [hw.logprobs(rows, [1, 2, 3], top=2)[i] for i in (1, 2)],
        "verify_draft": lambda: list(hw.verify_draft(rows[:, None], None, np.zeros((3, 0), int))),
    }

    def step() -> Any:
        sampler = hw.Sampler(70)
        for _ in range(3):
            sampler.admit()
        return sampler.step(rows)

    whole["step"] = lambda: [step()]
    wide = np.ones((1, 2, 4))
    for on in (False, True):
        with jax.enable_x64(on):
            for name, call in whole.items():
                for out in call():
                    assert isinstance(out, jax.Array), name
                    assert out.dtype == ("int64" if on else "int32"), name
            for out in hw.attention(jax.numpy.ones((1, 2, 4)), wide, wide, return_lse=True):
                assert isinstance(out, jax.Array)
                assert out.dtype == ("float64" if on else "float32")


# Dialects -----------------------------------------------------------------------------------------------------------

TIED = [2.0, 1.0, 1.0, 1.0, 0.0]  # shares 0.53, 0.195 three times, 0.07


def test_s35_orders_and_borders() -> None:
    assert {d: kept(TIED, dialect=d, top_k=2) for d in DIALECTS} == {
        "hf": [0, 1, 2, 3],
        "vllm": [0, 1, 2, 3],
        "llama.cpp": [0, 1],
        "flashinfer": [0, 1, 2, 3],
        "sglang": [0, 1],
        "mlx": [0, 1],
    }
    assert {d: kept(TIED, dialect=d, top_p=0.6) for d in DIALECTS} == {
        "hf": [0, 3],
        "vllm": [0, 3],
        "llama.cpp": [0, 1],
        "flashinfer": [0, 1, 2, 3],
        "sglang": [0, 1],
        "mlx": [0, 1, 2, 3],
    }
    assert {d: len(kept(FOUR, dialect=d, top_p=0.5)) for d in DIALECTS} == {
        "hf": 2,
        "vllm": 2,
        "llama.cpp": 2,
        "flashinfer": 4,
        "sglang": 3,
        "mlx": 4,
    }
    assert kept(FOUR, typical_p=0.5, dialect="llama.cpp") == [0, 1, 2]
    cold = {"temperature": 0.5, "top_p": 0.8}
    assert {d: kept([3.0, 2.0, 1.0], dialect=d, **cold) for d in ("hf", "llama.cpp", "mlx")} == {
        "hf": [0],
        "llama.cpp": [0, 1],
        "mlx": [0, 1],
    }
    assert kept(LOGS, dialect="hf", top_k=2, top_p=0.5) == [0]
    assert kept(LOGS, dialect="sglang", top_k=2, top_p=0.5) == [0, 1]
    assert kept(LOGS, dialect="flashinfer", top_k=2, top_p=0.5) == [0]
    assert kept(LOGS, dialect="flashinfer", nucleus="joint", top_k=2, top_p=0.5) == [0, 1]
    assert kept(LOGS, dialect="vllm", min_p=0.5, top_p=0.42) == [0]  # min_p first: 0.44 of 0.9
    assert kept(LOGS, dialect="hf", min_p=0.5, top_p=0.42) == [0, 1]
    for dialect, option in [("vllm", "typical_p"), ("hf", "top_n_sigma"), ("sglang", "min_tokens_to_keep")]:
        with pytest.raises(ValueError, match=rf"^{option}: expected none in dialect '{dialect}', which has no such"):
            hw.sample(FOUR, dialect=dialect, **{option: 2 if option == "min_tokens_to_keep" else 0.5})
    for other in ({"ties": "keep"}, {"nucleus": "joint"}):
        with pytest.raises(ValueError, match=r"^(ties|nucleus): expected none beside dialect 'hf'"):
            hw.sample(FOUR, dialect="hf", **other)
    with pytest.raises(ValueError, match=r"^dialect: expected None or 'hf' or .*, got 'HF'"):
        hw.sample(FOUR, dialect="HF")  # type: ignore[arg-type]


def test_s36_what_else_differs() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    assert kept(logits, typical_p=0.76, dialect="hf") == [0, 1, 2, 3]
    for option in ("epsilon_cutoff", "eta_cutoff"):
        assert kept(TIED, dialect="hf", min_tokens_to_keep=2, **{option: 0.999}) == [0, 1, 2, 3]
    three = {"min_tokens_to_keep": 3}
    assert [
        kept(LOGS, dialect="llama.cpp", **three, **o) for o in ({"top_k": 1}, {"top_n_sigma": 0.1}, {"top_p": 0.1})
    ] == [
        [0],
        [0],
        [0, 1, 2],
    ]
    assert [kept(LOGS, dialect="mlx", **three, **o) for o in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 0.9})] == [
        [0],
        [0],
        [0, 1, 2],
    ]
    on = {"dialect": "mlx", "xtc_probability": 1.0}
    assert kept(FOUR, xtc_threshold=0.25, **on) == [0, 1, 2, 3]  # not more than the threshold
    assert kept(FOUR, xtc_threshold=0.2, **on) == [0, 1, 2, 3]  # all are the last
    assert kept(TIED, xtc_threshold=0.15, **on) == [1, 2, 3, 4]
    assert kept(TIED, xtc_threshold=0.15, dialect="llama.cpp", xtc_probability=1.0) == [3, 4]


def test_s37_masses_are_measured_anew() -> None:
    """xtc takes the best token away; measured against it, at so low a temperature nothing would be left."""
    logits = [5.0, 4.0, 3.0, -9.0]
    on = {"xtc_probability": 1.0, "xtc_threshold": 0.2, "dialect": "llama.cpp"}
    assert masses(logits, temperature=1e-3, **on) == [0, 1, 0, 0]
    assert masses(logits, temperature=0, **on) == [0, 1, 0, 0]
    assert masses(logits, temperature=0, **{**on, "dialect": "mlx"}) == [1, 0, 0, 0]
    assert hw.sample(logits, temperature=0, **on) == 1
    assert hw.sample(logits, temperature=0, **{**on, "dialect": "mlx"}) == 0
    q = np.exp([0, -1.0, -13.0])
    assert masses(logits, **on)[1:] == pytest.approx((q / q.sum()).tolist(), rel=1e-6)


def test_s37_temperature_0_has_one_first_token() -> None:
    for dialect in (None, "vllm", "flashinfer", "sglang", "mlx"):
        cold = {"temperature": 0, "top_p": 0.5, "dialect": dialect}
        assert kept([0.0, 1.0, 1.0], **cold) == [1], dialect
        assert masses([0.0, 1.0, 1.0], **cold) == [0, 1, 0], dialect


def test_s38_what_numbers_mean() -> None:
    everything = [0, 1, 2, 3, 4]
    for dialect, options in [
        ("hf", {"top_k": 0}),
        ("hf", {"typical_p": 1.5}),
        ("hf", {"epsilon_cutoff": 0, "eta_cutoff": 3}),
        ("vllm", {"top_k": 0}),
        ("vllm", {"top_k": -1}),
        ("llama.cpp", {"top_k": -3, "top_n_sigma": -1.0, "min_p": -0.5, "xtc_probability": -1.0}),
        ("llama.cpp", {"top_p": 1.5, "typical_p": 2.0, "min_tokens_to_keep": 0}),
        ("sglang", {"top_k": -1}),
        ("mlx", {"top_k": 0, "top_p": 0.0}),
        ("mlx", {"top_k": -1, "top_p": 1.5, "xtc_probability": -1}),
    ]:
        assert kept(TIED, dialect=dialect, **options) == everything, (dialect, options)
        rows = {name: [value, value] for name, value in options.items()}
        assert kept([TIED, TIED], dialect=dialect, **rows) == list(range(10)), (dialect, options)
    assert kept(TIED, dialect="hf", top_p=0) == [0]
    assert kept(TIED, dialect="hf", top_p=0.0, min_tokens_to_keep=2) == [0, 3]
    assert kept(TIED, dialect="llama.cpp", top_p=-1.0) == [0]
    assert kept(TIED, dialect="llama.cpp", typical_p=0) == kept(TIED, typical_p=1e-9) == [1]
    assert masses([1.0, 1.0], dialect="vllm", temperature=5e-6) == [1, 0]
    assert masses([1.0, 1.0], dialect="sglang", temperature=1e-7) == [1, 0]
    assert masses([1.0, 1.0], dialect="sglang", temperature=1e-6) == [0.5, 0.5]
    assert masses(TIED, dialect="llama.cpp", temperature=-1) == [1, 0, 0, 0, 0]
    for dialect, options, error in [
        ("hf", {"temperature": 0}, "^temperature: .*got 0"),
        ("hf", {"temperature": [1.0, 0.0]}, r"^temperature\[1\]: .*got 0.0"),
        ("hf", {"top_k": -1}, "^top_k: .*got -1"),
        ("vllm", {"top_p": 0}, "^top_p: .*got 0"),
        ("mlx", {"min_p": -0.1}, "^min_p: .*got -0.1"),
    ]:
        with pytest.raises(ValueError, match=error):
            hw.filter_logits([TIED, TIED], dialect=dialect, **options)
    params = hw.SamplingParams(dialect="hf", top_k=0)
    assert kept(TIED, params=params) == kept(TIED, params=params, top_k=0) == everything


# What numbers mean in a dialect beyond what they mean natively: all that there is, for the numbers tried.
TRIED = (-INF, -2.0, -1.0, 0.0, 1e-7, 5e-6, 1e-5, 0.005, 0.01, 0.5, 0.6, 1.0, 1.5, 40.0, INF, NAN)
BELOW, UP_TO, ABOVE = (-INF, -2.0, -1.0), (-INF, -2.0, -1.0, 0.0), (1.5, 40.0, INF)
MEANS: dict[tuple[str, str], dict[float, float | None]] = {
    ("hf", "temperature"): {0.0: None},
    ("hf", "top_k"): {0: INF},
    ("hf", "top_p"): {0.0: 1e-300, **dict.fromkeys(ABOVE, 1.0)},
    ("hf", "typical_p"): dict.fromkeys(ABOVE, 1.0),
    ("hf", "epsilon_cutoff"): dict.fromkeys((*BELOW, 1.0, *ABOVE), 0.0),
    ("hf", "eta_cutoff"): dict.fromkeys((*BELOW, 1.0, *ABOVE), 0.0),
    ("vllm", "temperature"): {1e-7: 0.0, 5e-6: 0.0, 1e-5: 0.01, 0.005: 0.01},
    ("vllm", "top_k"): {-1: INF, 0: INF},
    ("llama.cpp", "temperature"): dict.fromkeys(BELOW, 0.0),
    ("llama.cpp", "dynamic_temperature_range"): dict.fromkeys(BELOW, 0.0),
    ("llama.cpp", "dynamic_temperature_exponent"): {-2.0: -2.0, -1.0: -1.0, 0.0: 0.0},
    ("llama.cpp", "top_n_sigma"): dict.fromkeys(UP_TO, INF),
    ("llama.cpp", "top_k"): {-2: INF, -1: INF, 0: INF},
    ("llama.cpp", "top_p"): {**dict.fromkeys(UP_TO, 1e-300), **dict.fromkeys(ABOVE, 1.0)},
    ("llama.cpp", "min_p"): {**dict.fromkeys(BELOW, 0.0), **dict.fromkeys(ABOVE, 2.0)},
    ("llama.cpp", "typical_p"): {**dict.fromkeys(UP_TO, 1e-300), **dict.fromkeys(ABOVE, 1.0)},
    ("llama.cpp", "xtc_probability"): {**dict.fromkeys(BELOW, 0.0), **dict.fromkeys(ABOVE, 1.0)},
    ("llama.cpp", "xtc_threshold"): {**dict.fromkeys(BELOW, 0.0), **dict.fromkeys(ABOVE, 1.0)},
    ("llama.cpp", "min_tokens_to_keep"): {0: 1},
    ("flashinfer", "top_p"): dict.fromkeys(ABOVE, 1.0),
    ("flashinfer", "min_p"): dict.fromkeys(BELOW, 0.0),
    ("sglang", "temperature"): {1e-7: 0.0},
    ("sglang", "top_k"): {-1: INF},
    ("mlx", "top_p"): {**dict.fromkeys(UP_TO, 1.0), **dict.fromkeys(ABOVE, 1.0)},
    ("mlx", "top_k"): {-2: INF, -1: INF, 0: INF},
    ("mlx", "xtc_probability"): dict.fromkeys(BELOW, 0.0),
}
NUMBERS = (*OFF, "dynamic_temperature_exponent", "xtc_threshold", "min_tokens_to_keep")
BESIDE = {"dynamic_temperature_exponent": {"dynamic_temperature_range": 0.5}, "xtc_threshold": {"xtc_probability": 1}}


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("dialect", list(DIALECTS))
def test_s38_every_number_of_every_dialect(dialect: str, option: str) -> None:
    """Alone, in a list, in params, in the reference: what a number means, is an error, or is as natively."""
    first = BESIDE.get(option, {option: 2 if option == "min_tokens_to_keep" else 1})
    if rules(dialect, "after_top_k").lacks() & first.keys():
        with pytest.raises(ValueError, match=rf"^{next(iter(first))}: expected none in dialect"):
            hw.sample(TIED, dialect=dialect, **first)
        return
    whole = option in ("top_k", "min_tokens_to_keep")
    means = MEANS.get((dialect, option), {})
    own = {"dialect": dialect, "seed": 5, **BESIDE.get(option, {})}
    for number in (-2, -1, 0, 1, 2, 10**30) if whole else TRIED:
        meant: float | None = means.get(number, number)
        if number not in means:  # as natively: the very errors, and for what is none, no reading at all
            try:
                hw.SamplingParams(**{option: number})
            except ValueError:
                meant = None
        if meant is None:
            for value in (number, [number, 1]):
                for call in (
                    lambda v: hw.sample([TIED] * 2, **own, **{option: v}),
                    lambda v: hw.SamplingParams(**own, **{option: v}),
                ):
                    with pytest.raises(ValueError, match=rf"^{option}(\[0\])?: expected "):
                        call(value)
            continue
        want = meaning(dialect, option, meant, own)
        assert masses(TIED, **own, **{option: number}) == want, number
        assert masses([TIED, TIED], **own, **{option: [number, number]}) == [want, want], number
        assert masses(TIED, params=hw.SamplingParams(**own, **{option: number})) == want, number
        assert reference.probabilities(TIED, **own, **{option: number}).tolist() == want, number


def meaning(dialect: str, option: str, number: float, own: dict[str, Any]) -> list[float]:
    """What a number that is none of the library's traditions gives."""
    if option == "dynamic_temperature_exponent":
        p = np.exp(TIED) / np.exp(TIED).sum()
        share = -(p * np.log(p)).sum() / np.log(5)
        return approximately(masses(TIED, temperature=0.5 + share**number))
    if (option, number) == ("min_p", 2.0):
        return masses(TIED, dialect=dialect, top_k=1)
    if option in ("top_k", "min_tokens_to_keep"):
        return masses(TIED, dialect=dialect, **{option: 10**30 if number == INF else int(number)})
    if option == "temperature" and number == 0:
        return [1.0, 0.0, 0.0, 0.0, 0.0]
    return masses(TIED, **own, **{option: number})


def approximately(numbers: list[float]) -> Any:
    return pytest.approx(numbers, rel=1e-6)


def test_s38_a_temperature_of_two_first_tokens() -> None:
    """Greedy takes one of two maxima, a small temperature both."""
    two = [1.0, 3.0, 3.0, 2.0]
    for dialect, number, one in [
        ("vllm", 5e-6, True),
        ("vllm", np.nextafter(1e-5, 0), True),
        ("vllm", 1e-5, False),
        ("vllm", 0.009, False),
        ("sglang", 9.9e-7, True),
        ("sglang", 1e-6, False),
        ("llama.cpp", -1e-300, True),
        ("llama.cpp", 1e-300, False),
        ("hf", 5e-324, False),
        ("mlx", 1e-9, False),
        ("flashinfer", 1e-9, False),
    ]:
        want = [0, 1, 0, 0] if one else [0, 0.5, 0.5, 0]
        assert masses(two, dialect=dialect, temperature=number) == pytest.approx(want), (dialect, number)
        assert masses([two], dialect=dialect, temperature=[number]) == [pytest.approx(want)], (dialect, number)
        drawn = hw.sample([two] * 50, dialect=dialect, temperature=number, seed=1)
        assert set(drawn.tolist()) == ({1} if one else {1, 2})


def test_s38_a_keyword_says_what_the_numbers_of_params_mean() -> None:
    logits, cold = [1.0, 1.001, 0.5], hw.SamplingParams(temperature=0.0005)
    for params in (cold, hw.SamplingParams(temperature=0.0005, dialect="vllm")):
        for dialect in ("vllm", None):
            want = masses(logits, temperature=0.0005, dialect=dialect)
            assert masses(logits, params=params, dialect=dialect) == want
            assert reference.probabilities(logits, params, dialect=dialect).tolist() == want
            explained = hw.explain(logits, params, dialect=dialect)
            assert [one.probability for one in explained.head] == sorted(filter(None, want), reverse=True)
    for params in (hw.SamplingParams(temperature=0), hw.SamplingParams(temperature=0, dialect="vllm")):
        with pytest.raises(ValueError, match=r"^temperature: .*got 0; .*dialect='hf'"):
            hw.sample(logits, params, dialect="hf")
    with pytest.raises(ValueError, match=r"^top_k: .*got 0"):
        hw.sample(logits, hw.SamplingParams(top_k=0, dialect="hf"), dialect=None)
    with pytest.raises(ValueError, match=r"^typical_p: .*dialect 'vllm'"):
        hw.sample(logits, hw.SamplingParams(typical_p=0.5), dialect="vllm")
    assert hw.sample(logits, hw.SamplingParams(top_k=0, dialect="hf"), dialect="sglang", top_k=1) == 1


def test_s39_what_is_out_is_out() -> None:
    banned = [2.1, 2.0, 0.0, -np.inf, -np.inf]
    xtc = {"xtc_probability": 1.0, "xtc_threshold": 0.3, "dialect": "llama.cpp"}
    assert kept(banned, min_tokens_to_keep=2, **xtc) == [1, 2]
    assert kept(banned, min_tokens_to_keep=3, **xtc) == [0, 1, 2]
    assert kept([2.1, 2.0, 0.0, -9.0, -9.0], top_n_sigma=1.5, min_tokens_to_keep=3, **xtc) == [0, 1, 2]
    for options in ({"typical_p": 0.5}, {"dynamic_temperature_range": 0.5}):
        alone, among = (masses(row, dialect="llama.cpp", **options) for row in (banned[:3], banned))
        assert among == [*alone, 0, 0]


# The draw -----------------------------------------------------------------------------------------------------------


def word(seed: int, stream: int, position: int) -> int:
    """NumPy's own. It increases its counter before the first block."""
    key = np.array([seed, stream], np.uint64)
    return int(np.random.Philox(key=key, counter=(position - 1) % 2**256).random_raw())


def test_s18_the_token_is_where_the_running_sum_exceeds() -> None:
    for position in range(200):
        r = word(5, 0, position) * 4 * 2**44 >> 64
        assert hw.sample(FOUR, seed=5, position=position) == r // 2**44
    lonely = [-INF, -1e5, 0.0, -1e5, -INF]
    assert {hw.sample(lonely, uniform=u) for u in (0.0, 5e-324, 0.5, LAST)} == {2}
    assert {hw.sample(lonely, seed=seed) for seed in range(100)} == {2}


def test_s19_the_words_are_those_of_philox() -> None:
    """With 2^16 equal logits the token is the word's top 16 bits."""
    flat = np.zeros(2**16, np.float32)
    for seed, position in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**64 - 1), (123456789, 987654321)]:
        assert hw.sample(flat, seed=seed, position=position) == word(seed, 0, position) >> 48


def test_s20_streams() -> None:
    flat = np.zeros((2, 3, 2**16), np.float32)
    one = hw.sample(flat, seed=77, position=5)
    assert one.ravel().tolist() == [word(77, i, 5) >> 48 for i in range(6)]
    assert hw.sample(flat[0, 0], seed=77, position=5) == one[0, 0]
    own = hw.sample(flat, seed=np.arange(6).reshape(2, 3), position=5)
    assert own.ravel().tolist() == [word(i, 0, 5) >> 48 for i in range(6)]


def test_s21_seeds_and_positions() -> None:
    flat = np.zeros((4, 2**16), np.float32)
    assert not np.array_equal(hw.sample(flat), hw.sample(flat))  # equal by chance once in 2^64
    assert np.array_equal(hw.sample(flat, seed=3), hw.sample(flat, seed=3, position=0))
    for bad in (-1, 2**64, 1.0, "x", True):
        for name in ("seed", "position"):
            with pytest.raises(ValueError, match=rf"^{name}: expected an integer from 0 to 2\^64 - 1"):
                hw.sample(flat, **{name: bad})


def test_s22_uniform() -> None:
    assert [hw.sample(FOUR, uniform=u) for u in (0, 0.2499, 0.25, 0.5, 0.75, LAST)] == [0, 0, 1, 2, 3, 3]
    assert hw.sample([0.0, 0.0, 0.0], uniform=1 / 3) == 0  # the float64 number is less than a third
    assert hw.sample([0.0, 0.0, 0.0], uniform=np.nextafter(1 / 3, 1)) == 1
    for other in ({"seed": 1}, {"position": 0}):
        with pytest.raises(ValueError, match=r"^uniform: "):
            hw.sample(FOUR, uniform=0.5, **other)


# Options ------------------------------------------------------------------------------------------------------------


def test_s23_options_per_row() -> None:
    options: dict[str, Any] = {
        "temperature": np.array([[0.5], [2.0]]),
        "top_k": [3, 20, 70],
        "top_p": np.float32([0.5, 0.9, 1.0]),
        "min_p": np.array([[0.1], [0.0]]),
        "position": [[0, 1, 2]],
    }
    seeds = np.arange(6).reshape(2, 3)
    got = hw.sample(ROWS, seed=seeds, **options)
    for i, j in np.ndindex(2, 3):
        own = {name: np.broadcast_to(value, (2, 3))[i, j] for name, value in options.items()}
        assert got[i, j] == hw.sample(ROWS[i, j], seed=int(seeds[i, j]), **own)
    u = RNG.random((2, 3))
    assert hw.sample(ROWS, uniform=u)[1, 2] == hw.sample(ROWS[1, 2], uniform=u[1, 2])
    with pytest.raises(ValueError, match=r"^top_k: .*broadcasts to \(2, 3\), got \(2,\)"):
        hw.sample(ROWS, top_k=[1, 2])
    with pytest.raises(ValueError, match=r"^seed: .*rows that share a seed"):
        hw.sample(ROWS, seed=[1, 2, 3])
    with pytest.raises(ValueError, match=r"^ties: "):
        hw.sample(ROWS, ties=["keep", "lowest_id"])  # type: ignore[arg-type]


def test_s24_params() -> None:
    params = hw.SamplingParams(temperature=0.6, top_k=3, seed=5)
    assert np.array_equal(hw.sample(ROWS, params), hw.sample(ROWS, temperature=0.6, top_k=3, seed=5))
    assert np.array_equal(hw.sample(ROWS, params, top_k=None), hw.sample(ROWS, temperature=0.6, seed=5))
    assert hash(params) == hash(hw.SamplingParams(temperature=0.6, top_k=3, seed=5))
    with pytest.raises(AttributeError):
        params.top_k = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"^top_k: "):
        hw.SamplingParams(top_k=0)


def test_s24_params_cannot_be_changed() -> None:
    options = {"logit_bias": {5: 1.0, 6: np.array(2.0)}, "allowed": np.ones(70, bool), "min_p": [0.1], "top_k": 3}
    params = hw.SamplingParams(**options)
    copies = pickle.loads(pickle.dumps(params)), copy.copy(params), copy.deepcopy(params), dataclasses.replace(params)
    for one in (params, *copies, hw.SamplingParams(**dataclasses.asdict(params))):
        assert one == params
        assert hash(one) == hash(params)
        assert one.logit_bias == {5: 1.0, 6: 2.0}
        with pytest.raises(TypeError):
            one.logit_bias[5] = 99.0
        for array in (one.allowed, one.logit_bias[6]):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        assert np.array_equal(hw.probabilities(ROWS[0], one), hw.probabilities(ROWS[0], **options))
    assert b"_settings" not in pickle.dumps(params)
    assert params != hw.SamplingParams(**{**options, "logit_bias": {5: 1.0, 6: np.array(3.0)}})


def test_s24_equal_ids_are_equal_params() -> None:
    same = [hw.SamplingParams(allowed=ids) for ids in ([2, 1], (1, 2), {1, 2}, [1, 2, 2], np.array([1, 2]))]
    other = [hw.SamplingParams(allowed=ids) for ids in ([1], [False, True, True], np.array([6], np.int32), None)]
    assert set(same) == {same[0]}
    assert len({*same, *other}) == 1 + len(other)


def test_params_show_what_is_not_the_default() -> None:
    assert repr(hw.SamplingParams()) == repr(hw.SamplingParams(temperature=1, top_k=None)) == "SamplingParams()"
    params = hw.SamplingParams(temperature=0.5, min_p=np.array([0.1, 0.2]), logit_bias={1: 2.0}, dialect="vllm")
    assert repr(params) == (
        "SamplingParams(temperature=0.5, min_p=array([0.1, 0.2]), logit_bias={1: 2.0}, dialect='vllm')"
    )


def test_s25_a_row_does_not_depend_on_its_batch() -> None:
    for i, j in np.ndindex(2, 3):
        for function in FUNCTIONS:
            whole, alone = (function(x, top_p=0.8, uniform=0.3) for x in (ROWS, ROWS[i, j]))
            assert np.array_equal(np.asarray(whole)[i, j], alone)
            assert np.array_equal(
                function(ROWS[:, ::-1, ::2], uniform=0.3)[i, j], function(ROWS[i, 2 - j, ::2], uniform=0.3)
            )


def test_s26_errors_name_the_argument() -> None:
    for options, error in [
        ({"top_p": 1.5}, r"^top_p: expected a number in \(0, 1\], got 1.5; use None to switch it off"),
        ({"top_p": [[0.5], [2.0]]}, r"^top_p\[1, 0\]: .*got 2.0"),
        ({"top_k": 0}, r"^top_k: expected an integer >= 1, got 0; use None to switch it off"),
        ({"ties": "all"}, r"^ties: expected 'lowest_id' or 'keep', got 'all'"),
    ]:
        with pytest.raises(ValueError, match=error):
            hw.sample(ROWS, **options)


def test_s44_options_are_read_as_numbers() -> None:
    """For every option and every kind of array: tests/test_doors.py."""
    half = np.full((2, 3), 0.5)
    want = hw.sample(ROWS, temperature=half, seed=1)
    assert np.array_equal(hw.sample(ROWS, temperature=half.astype(ml_dtypes.bfloat16), seed=1), want)
    params = hw.SamplingParams(temperature=half.astype(ml_dtypes.bfloat16))
    assert np.array_equal(hw.sample(ROWS, params, seed=1), want)
    assert params.temperature.dtype == np.float32
    with pytest.raises(TypeError, match=r"^top_k\[0, 0\]: expected an integer >= 1, got 0.5"):
        hw.sample(ROWS, top_k=half.astype(ml_dtypes.bfloat16))
    with pytest.raises(TypeError, match=r"^repetition_penalty: .*`hw.penalize\(logits, token_ids, repetition=1.2\)`"):
        hw.SamplingParams(repetition_penalty=1.2)
