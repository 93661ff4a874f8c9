"""What stands around the draw: native against the reference in bits, laws, frequencies, speed of growth, bad input."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, laid_out, same_bits
from test_sampling import make_logits, make_options
from test_sampling_statistics import chi_square, power

import headway as hw
from headway import reference
from headway._sampling import bans
from headway._sampling.dialects import rules
from headway._sampling.histories import Histories
from headway._sampling.penalties import checked, with_windows

KINDS = ["normal", "few values", "extremes", "subnormal", "bans", "zeros of both signs"]


def draw_logits(data: st.DataObject, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    kind, dtype = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(list(DTYPES)))
    return make_logits(kind, dtype, shape, rng)


# Penalties ----------------------------------------------------------------------------------------------------------

PENALTIES: dict[str, st.SearchStrategy[Any]] = {
    "repetition": st.sampled_from([1.0, 1.3, 0.5, 1e300, 1e-300]),
    "frequency": st.sampled_from([0.0, 0.7, -2.0, 3e38]),
    "presence": st.sampled_from([0.0, 0.3, -0.1, -3e38]),
    "window": st.sampled_from([1, 2, 7, 30, None]),
    "repetition_window": st.sampled_from([1, 5, 40]),
    "frequency_window": st.sampled_from([1, 5, 40]),
    "dry_window": st.sampled_from([1, 5, 40]),
    "dry_multiplier": st.sampled_from([0.0, 0.8, 1e30]),
    "dry_base": st.sampled_from([1.0, 1.75, 1e200]),
    "dry_allowed_length": st.sampled_from([1, 2, 5]),
}


@given(st.data())
@settings(max_examples=300)
def test_penalties_equal_the_reference(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, V = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 3, 5, 40]))
    logits = draw_logits(data, (rows, V), rng)
    options: dict[str, Any] = {}
    for name, values in PENALTIES.items():
        if data.draw(st.booleans()):
            options[name] = data.draw(values)
            if data.draw(st.booleans()) and name != "window":  # None is for all rows
                options[name] = [data.draw(values) for _ in range(rows)]
    if data.draw(st.booleans()):
        options["dry_breakers"] = rng.integers(0, V, 2).tolist()
    # Few different tokens, so that sequences repeat; and whole repetitions.
    lengths = rng.integers(0, 30, rows)
    history = [np.tile(rng.integers(0, V, int(n)), int(rng.integers(1, 4))).tolist() for n in lengths]
    if data.draw(st.booleans()):  # what has no logit, anywhere
        options["unknown_tokens"] = "ignore"
        for row in history:
            for at in rng.integers(0, len(row) + 1, 4).tolist():
                row.insert(at, int(rng.choice([-1, V, -(2**63), 2**63 - 1])))
    if data.draw(st.booleans()):
        options["prompt_lengths"] = [int(rng.integers(0, len(row) + 1)) for row in history]
    want = reference.penalize(logits, history, **options)
    layout = data.draw(st.sampled_from(["contiguous", "reversed", "last axis apart"]))
    assert same_bits(hw.penalize(laid_out(logits, layout), history, **options), want)
    n = np.array([len(row) for row in history])
    padded = np.full((rows, n.max() + 2), -1, np.int64)
    for row, to in zip(history, padded, strict=True):
        to[: len(row)] = row
    assert same_bits(hw.penalize(logits, padded, lengths=n, **options), want)


@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sets(st.integers(0, 2), max_size=1),
)
@settings(max_examples=500)
def test_the_lengths_of_repetitions(part: list[int], times: int, allowed: int, breakers: set[int]) -> None:
    """With a base of 2 and logits of 0, float64 shows each length."""
    options: dict[str, Any] = {
        "dry_multiplier": 1,
        "dry_base": 2,
        "dry_allowed_length": allowed,
        "dry_breakers": breakers,
    }
    assert same_bits(
        hw.penalize([0.0] * 3, part * times, **options), reference.penalize([0.0] * 3, part * times, **options)
    )


@pytest.mark.parametrize("history", [[3] * 2_000_000, [1, 2] * 1_000_000, list(range(1000)) * 2_000])
def test_penalties_take_time_linear_in_the_history(history: list[int]) -> None:
    """Ten times the history takes some ten times as long; comparing all pairs would take a hundred.

    Both are long enough that each call takes its memory from the system.
    """

    def seconds(tokens: np.ndarray) -> float:
        took = []
        for _ in range(5):
            start = time.process_time()
            hw.penalize(logits, tokens, dry_multiplier=1)
            took.append(time.process_time() - start)
        return min(took)

    logits, whole = np.zeros(1000, np.float32), np.array(history)
    assert seconds(whole) < 50 * seconds(whole[:200_000])


@given(st.data())
@settings(max_examples=150)
def test_counting_on_equals_counting_anew(data: st.DataObject) -> None:
    """Tokens come one by one and leave windows, rows come, go and use slots again: all is as in `penalize`."""
    rng, V = np.random.default_rng(data.draw(st.integers(0, 2**32))), data.draw(st.sampled_from([2, 3, 6]))
    none = np.zeros(0, np.int64)
    histories = Histories(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.bool_), none, none)
    rows: dict[int, tuple[list[int], dict[str, Any]]] = {}  # by slot
    prompts: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["admit", "retire", *["append"] * 8]))
        if action == "admit":
            options = {name: data.draw(values) for name, values in PENALTIES.items() if data.draw(st.booleans())}
            options["dry_breakers"] = rng.integers(0, V, data.draw(st.integers(0, 1))).tolist()
            prompt = rng.integers(0, V, data.draw(st.sampled_from([0, 1, 3, 20, 60, 64])))
            not_counted = int(rng.integers(0, prompt.size + 1))
            slot = histories.admit(prompt, np.isin(prompt, options["dry_breakers"]), not_counted)
            assert slot not in rows
            prompts[slot] = not_counted
            rows[slot] = (prompt.tolist(), options)
        elif action == "retire" and rows:
            slot = data.draw(st.sampled_from(list(rows)))
            histories.retire(slot)
            del rows[slot]
        elif action == "append":
            tokens = rng.integers(0, V, len(rows))
            breaks = [
                token in options["dry_breakers"] for token, (_, options) in zip(tokens, rows.values(), strict=True)
            ]
            histories.write(np.array(list(rows), np.int64), tokens, np.array(breaks, np.bool_))
            histories.length[list(rows)] += 1
            for token, (history, _) in zip(tokens.tolist(), rows.values(), strict=True):
                history.append(token)
        if data.draw(st.integers(0, 3)) and rows:  # now and then several tokens come between
            logits = draw_logits(data, (len(rows), V), rng).astype(np.float64)
            each = [with_windows(checked(options)) for _, options in rows.values()]
            values = {name: np.array([own[name] for own in each]) for name in each[0]}
            histories.penalize(logits, np.array(list(rows), np.int64), values)
            for z, (slot, (history, options)) in zip(logits, rows.items(), strict=True):
                own = options | {"prompt_lengths": prompts[slot]}
                want, first = hw.penalize(z, history, **own), histories.first[slot]
                places = slice(first, first + histories.distinct[slot])
                z[histories.id[places]] = histories.logit[places]
                assert same_bits(z, want)
                anew = Histories(
                    np.array([history], np.int64).reshape(1, -1),
                    np.isin([history], options["dry_breakers"]),
                    np.array([len(history)]),
                    np.array([prompts[slot]]),
                )
                one = {name: np.array([value]) for name, value in with_windows(checked(options)).items()}
                anew.penalize(z[None], np.zeros(1, np.int64), one)  # what has left all windows has left the list
                assert set(histories.id[places].tolist()) == set(anew.id[: anew.distinct[0]].tolist())


def test_a_step_does_not_take_longer_after_a_longer_history() -> None:
    """The tokens that differ matter, how often they came does not; with DRY the history counts, but is read once."""

    def seconds(tokens: int, **penalties: Any) -> float:
        sampler = hw.Sampler(1000)
        for i in range(4):
            sampler.admit(None, np.arange(tokens) % 100, seed=i, **penalties)
        took = []
        for _ in range(30):
            start = time.process_time()
            sampler.step(logits)
            took.append(time.process_time() - start)
        return min(took)

    logits = np.random.default_rng(3).standard_normal((4, 1000)).astype(np.float32)
    for penalties in ({"repetition": 1.2}, {"frequency": 0.1, "window": 100_000}):
        assert seconds(400_000, **penalties) < 3 * seconds(1_000, **penalties)


def test_a_sampler_holds_what_its_rows_need() -> None:
    """A long row costs the others nothing, and what is retired is used again."""
    sampler = hw.Sampler(10)
    for i in range(100):
        sampler.admit(None, [1] * 30, seed=i, presence=1)
    long = sampler.admit(None, [1] * 50_000, seed=1)
    sampler.step(np.zeros((101, 10)))
    held = sampler._histories.tokens.size
    assert held < 4 * (100 * 64 + 65_536)
    for _ in range(20):
        sampler.retire(long)
        long = sampler.admit(None, [1] * 50_000, seed=1)
        sampler.step(np.zeros((101, 10)))
    assert sampler._histories.tokens.size == held


BAD_PENALTIES = [
    ({"token_ids": [0, 9], "presence": 1}, ValueError, r"^token_ids: expected ids from 0 to 3, got 9 at 1;.*ignore"),
    ({"token_ids": [[0]], "logits": [[0.0] * 4] * 2}, ValueError, r"^token_ids: expected 2 lists.*got 1"),
    (
        {"token_ids": [[0], [-1]], "logits": [[0.0] * 4] * 2, "repetition": 2},
        ValueError,
        r"^token_ids: .*got -1 at 0 in row 1;",
    ),
    ({"unknown_tokens": "drop"}, ValueError, r"^unknown_tokens: expected one of 'error', 'ignore', got 'drop'"),
    ({"prompt_lengths": 3}, ValueError, r"^prompt_lengths: expected integers from 0 to 2, the tokens .*, got 3"),
    ({"prompt_lengths": 2, "lengths": 1}, ValueError, r"^prompt_lengths: expected integers from 0 to 1, .*, got 2"),
    ({"prompt_lengths": -1}, ValueError, r"^prompt_lengths: expected integers from 0 to 2, .*, got -1"),
    ({"prompt_lengths": 1.0}, TypeError, r"^prompt_lengths: expected integers"),
    ({"prompt_lengths": [1, 1]}, ValueError, r"^prompt_lengths: expected a shape that broadcasts"),
    ({"dry_window": 0}, ValueError, r"^dry_window: expected an integer >= 1, got 0; use None"),
    ({"repetition_window": 1.5}, TypeError, r"^repetition_window: expected an integer >= 1"),
    ({"frequency_window": [1, 2]}, ValueError, r"^frequency_window: expected a shape that broadcasts"),
    ({"token_ids": [0.5]}, TypeError, r"^token_ids: expected a list of token ids"),
    ({"token_ids": [[0]]}, TypeError, r"^token_ids: expected a list of token ids, got 2 axes"),
    ({"token_ids": [[0], 1], "logits": [[0.0] * 4] * 2}, TypeError, r"^token_ids\[1\]: expected a list of token ids"),
    ({"token_ids": np.zeros((3, 2), int)}, ValueError, r"^token_ids: .* shape \(n,\), got shape \(3, 2\)"),
    ({"lengths": 3}, ValueError, r"^lengths: expected integers from 0 to 2, the tokens that token_ids has, got 3"),
    ({"lengths": -1}, ValueError, r"^lengths: expected integers from 0 to 2, .*, got -1"),
    ({"lengths": [1, 2]}, ValueError, r"^lengths: expected a shape that broadcasts"),
    ({"repetition": "a"}, TypeError, r"^repetition: expected"),
    ({"repetition": [1.0, 2.0]}, ValueError, r"^repetition: expected a shape that broadcasts to \(\)"),
    ({"frequency": np.inf}, ValueError, r"^frequency: expected a number within float32"),
    ({"presence": [[0.0, np.nan]]}, ValueError, r"^presence\[0, 1\]: expected a number within float32, got nan"),
    ({"token_ids": {0}}, TypeError, r"^token_ids: .*got set, which has no order"),
    ({"logits": [[0.0] * 4], "token_ids": [{0}]}, TypeError, r"^token_ids\[0\]: .*got set, which has no order"),
    ({"window": 0}, ValueError, r"^window: expected an integer >= 1, got 0; use None"),
    ({"window": 2.0}, TypeError, r"^window: expected an integer >= 1, got 2.0; use None"),
    ({"dry_multiplier": -1}, ValueError, r"^dry_multiplier: expected a finite number >= 0"),
    ({"dry_base": 0.9}, ValueError, r"^dry_base: expected a finite number >= 1"),
    ({"dry_allowed_length": 0}, ValueError, r"^dry_allowed_length: expected an integer >= 1"),
    ({"dry_breakers": [4]}, ValueError, r"^dry_breakers: expected integers from 0 to 3, got 4"),
    ({"frequncy": 1}, TypeError, r"^frequncy: no such penalty; expected one of repetition"),
    ({"logits": 1.0}, ValueError, r"^logits: expected an array"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_PENALTIES, ids=[b[2][:40] for b in BAD_PENALTIES])
def test_bad_penalties(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hw.penalize(**{"logits": [0.0] * 4, "token_ids": [0, 1], **call})


# Several draws ------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200)
def test_several_draws_equal_the_reference(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, V, n = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 5, 64, 65, 300])),
        data.draw(st.integers(1, 7)),
    )
    logits = draw_logits(data, (rows, V), rng)
    options = make_options(data.draw, V, rows, rng)
    replacement = data.draw(st.booleans())
    if data.draw(st.booleans()):
        del options["seed"], options["position"]
        options["uniform"] = rng.random((rows, n))
        if "xtc_probability" in options:
            options["xtc_probability"] = np.round(options["xtc_probability"])  # its coin has no number of its own
    try:
        left = (reference.weights(logits, **{**options, "uniform": None}) > 0).sum(-1)
    except ValueError:  # the bias bans what was left
        return
    if not replacement and (left < n).any():
        with pytest.raises(
            ValueError, match=rf"^num_samples: expected at most {left[left < n][0]} without replacement"
        ):
            hw.sample(logits, num_samples=n, replacement=False, **options)
        return
    got = hw.sample(logits, num_samples=n, replacement=replacement, **options)
    assert same_bits(got, reference.sample(logits, num_samples=n, replacement=replacement, **options))


def test_draws_are_independent_and_cost_no_scan_each() -> None:
    """All pairs of the first two of 200,000 draws, with and without replacement, beside their exact probabilities."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.broadcast_to(np.log(p).astype(np.float32), (200_000, 4))
    pairs = {True: np.outer(p, p), False: np.outer(p, p) / (1 - p)[:, None] * (1 - np.eye(4))}
    for replacement, exact in pairs.items():
        drawn = hw.sample(logits, num_samples=2, replacement=replacement, seed=5)
        counts = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16)
        possible = exact.ravel() > 0
        assert counts[~possible].sum() == 0
        statistic, limit = chi_square(counts[possible], exact.ravel()[possible])
        assert statistic < limit
        other = (pairs[True] * (1 - np.eye(4)) / (1 - (p**2).sum())).ravel()  # pairs that differ, of independent draws
        if not replacement:
            assert power(200_000, exact.ravel()[possible], other[possible]) > 0.999
            statistic, limit = chi_square(counts[possible], other[possible])
            assert statistic > limit


# Log-probabilities --------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=200)
def test_logprobs_equal_the_reference(data: st.DataObject) -> None:
    """Ids and ranks exactly; logarithms, for which the reference has NumPy's, within four units of the last place."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, V = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 5, 64, 65, 300, 3000]))
    logits = draw_logits(data, (rows, V), rng)
    tokens = rng.integers(0, V, (rows, 4))
    top = data.draw(st.integers(1, min(V, 70)))
    processed = data.draw(st.booleans())
    options = make_options(data.draw, V, rows, rng) if processed else {}
    try:
        want = reference.logprobs(logits, tokens, top=top, processed=processed, **options)
    except ValueError:  # the bias bans what was left
        return
    layout = data.draw(st.sampled_from(["contiguous", "reversed", "last axis apart"]))
    got = hw.logprobs(laid_out(logits, layout), tokens, top=top, processed=processed, **options)
    assert same_bits(got.ranks, want.ranks)
    assert same_bits(got.top_tokens, want.top_tokens)
    for a, b in ((got.logprobs, want.logprobs), (got.top_logprobs, want.top_logprobs)):
        assert a.dtype == b.dtype
        assert np.array_equal(np.isneginf(a), np.isneginf(b))
        there = ~np.isneginf(b)
        assert (np.abs(a[there] - b[there]) <= 4 * np.spacing(np.abs(b[there]).astype(b.dtype))).all()


def test_log_softmax_is_as_exact_as_float32_logits_allow() -> None:
    for scale in (0.1, 3.0, 30.0):
        logits = (np.random.default_rng(2).standard_normal((4, 50_000)) * scale).astype(np.float32)
        wide = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        exact = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
        got = hw.logprobs(logits.astype(np.float64), np.broadcast_to(np.arange(50_000), logits.shape)).logprobs
        assert np.abs(got - exact).max() < 1.2e-7


BAD_LOGPROBS = [
    ({"tokens": 5}, ValueError, r"^tokens: expected ids from 0 to 4, got 5$"),
    ({"tokens": [-1, 0]}, ValueError, r"^tokens: expected ids from 0 to 4, got -1$"),
    ({"tokens": [0, 7], "logits": [[0.0] * 5] * 2}, ValueError, r"^tokens: expected ids from 0 to 4, got 7 in row 1$"),
    ({"tokens": [[[0]]]}, ValueError, r"^tokens: expected one id for each row, of shape \(\), or n in \(n,\), got"),
    ({"logits": [[0.0] * 4] * 2, "tokens": [0]}, ValueError, r"^tokens: .* \(2,\), or n in \(2, n\), got shape \(1,\)"),
    ({"tokens": [0.5]}, TypeError, r"^tokens: expected token ids, got float64"),
    ({"top": 0}, ValueError, r"^top: expected an integer from 1 to 5, got 0"),
    ({"top": 1, "processed": 1}, TypeError, r"^processed: expected True or False, got 1"),
    ({"top": 1, "top_k": 3}, ValueError, r"^top_k: expected none for the logits as they are"),
    ({"top": 1, "logits": [0.0, np.nan]}, ValueError, r"^logits: expected numbers, got NaN at token 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_LOGPROBS, ids=[b[2][:40] for b in BAD_LOGPROBS])
def test_bad_logprobs(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hw.logprobs(**{"logits": [0.0] * 5, **call})


# Speculative sampling -----------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=250)
def test_speculative_sampling_equals_the_reference(data: st.DataObject) -> None:
    """Drafts of one length or of several, whose padding is NaN; options of the rows, of all places, of each."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows, n, V = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4)), data.draw(st.sampled_from([2, 5, 64, 200]))
    target = draw_logits(data, (max(rows, 1), n + 1, V), rng)[:rows]
    draft = (target[:, :n].astype(np.float64).clip(-50, 50) + rng.standard_normal((rows, n, V))).astype(np.float32)
    options = {
        name: value
        for name, value in make_options(data.draw, V, rows, rng).items()
        if name not in ("logit_bias", "position", "seed")
    }
    one_seed = data.draw(st.booleans())
    source = {
        "seed": 2**63 + 5 if one_seed else rng.integers(0, 2**63, rows),
        "position": data.draw(st.sampled_from([0, 7, 2**64 - 2])),
    }
    own = data.draw(
        st.sampled_from(["none", "all places", "each place"])
    )  # a bias (V,) or (n + 1, V) that bans nothing
    bias = (lambda i: {}) if own == "none" else (lambda i: {"logit_bias": given[min(i, len(given) - 1)]})
    given = rng.standard_normal((n + 1 if own == "each place" else 1, V)).astype(np.float32)
    for_all = {} if own == "none" else {"logit_bias": given if own == "each place" else given[0]}
    tokens = np.zeros((rows, n), int)
    for i in range(n):  # xtc's coin is that of the place
        place = {"seed": source["seed"], "position": (source["position"] + i) % 2**64}
        tokens[:, i] = hw.sample(draft[:, i], **place, **bias(i), **options)
    if data.draw(st.booleans()):
        source["lengths"] = lengths = rng.integers(0, n + 1, rows)
        padding = np.arange(n) >= lengths[:, None]
        tokens[padding], draft[padding] = -1, np.nan
        target = np.array(target)
        target[np.arange(n + 1) > lengths[:, None]] = np.nan
    if data.draw(st.integers(0, 3)) == 0:
        draft = None
    want = reference.verify_draft(target, draft, tokens, **source, **for_all, **options)
    got = hw.verify_draft(target, draft, tokens, **source, **for_all, **options)
    assert same_bits(tuple(got), tuple(want))


@pytest.mark.parametrize("drafted", ["drafted", "no choice"])
def test_unequal_drafts_are_their_rows_alone(drafted: str) -> None:
    """Whatever stands in the padding: each row has the bits of a call with its own places alone."""
    rng, n, V = np.random.default_rng(12), 4, 40
    for trial in range(60):
        lead = [(), (5,), (2, 3)][trial % 3]
        lengths = rng.integers(0, n + 1, lead)
        target, draft = rng.standard_normal((*lead, n + 1, V)) * 2, rng.standard_normal((*lead, n, V)) * 2
        seeds = rng.integers(0, 2**63, lead) if lead else 77
        tokens = np.stack([hw.sample(draft[..., i, :], seed=seeds, position=i, top_k=9) for i in range(n)], -1)
        behind = np.arange(n) >= np.expand_dims(lengths, -1)
        tokens[behind] = rng.choice([-1, V, 2**62, 0], tokens.shape)[behind]
        draft[behind] = rng.choice([np.nan, np.inf, -np.inf, 0.0])
        target[np.arange(n + 1) > np.expand_dims(lengths, -1)] = rng.choice([np.nan, np.inf, -np.inf, 0.0])
        allowed = rng.random((*lead, n + 1, V)) < 2  # all, but nothing in the padding
        allowed[np.arange(n + 1) > np.expand_dims(lengths, -1)] = False
        call = {"top_k": 9, "allowed": allowed}
        draft_logits = draft if drafted == "drafted" else None
        got = hw.verify_draft(target, draft_logits, tokens, lengths=lengths, seed=seeds, **call)
        for index in np.ndindex(lead):
            k = int(np.asarray(lengths)[index])
            alone = hw.verify_draft(
                target[index][: k + 1],
                None if draft_logits is None else draft[index][:k],
                tokens[index][:k],
                seed=int(np.asarray(seeds)[index]),
                top_k=9,
            )
            assert (alone.accepted, alone.next_token) == (
                np.asarray(got.accepted)[index],
                np.asarray(got.next_token)[index],
            )
            assert got.tokens[index].tolist() == [*alone.tokens.tolist(), *[-1] * (n - k)]


Masses = Sequence[np.ndarray]  # after no token (V,), after one (V, V), ...


def grid(n: int) -> list[int]:
    """A random word for each of n places, the first that takes it there."""
    return [-(-j * 2**64 // n) for j in range(n)]


def outcomes(p: Masses, q: Masses, length: int) -> dict[tuple[int, ...], Fraction]:
    """How often each chain comes out, of every draft with every word: masses p of the target, q of the draft."""
    found: dict[tuple[int, ...], Fraction] = {}
    paths: list[tuple[Fraction, list[int], list[tuple[int, ...]]]] = [(Fraction(1), [], [])]  # accepted so far

    def verified(draft: list[int], words: list[tuple[int, ...]]) -> tuple[int, int]:
        of_target = [p[i][tuple(draft[:i])] for i in range(len(draft) + 1)]
        of_draft = [q[i][tuple(draft[:i])] for i in range(len(draft))]
        return reference.serving.verify_row(of_target, of_draft, draft, words)

    def count(chance: Fraction, chain: list[int]) -> None:
        found[tuple(chain)] = found.get(tuple(chain), Fraction(0)) + chance

    while paths:
        chance, draft, words = paths.pop()
        at = len(draft)
        target = p[at][tuple(draft)]
        if at == length:
            for word in grid(int(target.sum())):
                count(chance / int(target.sum()), [*draft, verified(draft, [*words, (word, 0, 0, 0)])[1]])
            continue
        mass = q[at][tuple(draft)]
        for token in np.flatnonzero(mass).tolist():
            whole, left = int(mass[token] * target.sum()), sum(reference.serving.residual(target, mass))
            each = chance * Fraction(int(mass[token]), int(mass.sum())) / whole
            for word in grid(whole):
                if verified([*draft, token], [*words, (0, 0, word, 0), (0, 0, 0, 0)])[0] > at:
                    paths.append((each, [*draft, token], [*words, (0, 0, word, 0)]))
                    continue
                for other in grid(left):
                    end = verified([*draft, token], [*words, (0, 0, word, other), (0, 0, 0, 0)])[1]
                    count(each / left, [*draft, end])
    return found


@pytest.mark.parametrize("length", [0, 1, 2])
def test_unequal_drafts_are_exact(length: int) -> None:
    """Rows of no drafted token, one and two, each path in whole numbers: every token that comes is the target's own."""
    rng, V = np.random.default_rng(length), 3

    def masses(*shape: int) -> np.ndarray:
        drawn = rng.integers(0, 3, (*shape, V))
        drawn[..., 0] += ~drawn.any(-1)
        return drawn

    for _ in range(12):
        p = [masses(*[V] * place) for place in range(3)]
        found = outcomes(p, [masses(*[V] * place) for place in range(2)], length)
        assert sum(found.values()) == 1
        for place in range(length + 1):
            for before in np.ndindex(*[V] * place):
                got = [
                    sum(chance for chain, chance in found.items() if chain[: place + 1] == (*before, token))
                    for token in range(V)
                ]
                whole, target = sum(got), p[place][before]
                if whole:
                    assert [share / whole for share in got] == [Fraction(int(m), int(target.sum())) for m in target]


def test_speculative_sampling_is_exact() -> None:
    """Small distributions in whole numbers: accepting and replacing give the target's own, as fractions."""
    rng = np.random.default_rng(4)
    for _ in range(300):
        V = int(rng.integers(2, 6))
        p, q = (rng.choice([0, 1, 2, 3, 1000, 2**44], V).astype(np.int64) for _ in range(2))
        if not p.any() or not q.any():
            continue
        P, Q = int(p.sum()), int(q.sum())
        out = [Fraction(0)] * V
        left = reference.serving.residual(p, q)
        rejected = Fraction(0)
        for token in range(V):
            if q[token]:
                chance = reference.serving.acceptance(p, q, token)
                out[token] += Fraction(int(q[token]), Q) * chance
                rejected += Fraction(int(q[token]), Q) * (1 - chance)
        if rejected:
            out = [x + rejected * Fraction(r, sum(left)) for x, r in zip(out, left, strict=True)]
        assert out == [Fraction(int(x), P) for x in p]


@pytest.mark.parametrize("drafted", ["drafted", "no choice"])
def test_speculative_sampling_has_the_target_s_frequencies(drafted: str) -> None:
    """Pairs of tokens of 200,000 rows, whose second distribution depends on the first token.

    The draft is drawn with the same seed and positions. Power above 0.999 against the draft's own distribution and
    against one in which a replaced token is drawn from the target (not from what the draft lacks).
    """
    rows, V = 200_000, 4
    rng = np.random.default_rng(6)
    target, draft = rng.standard_normal((2, V)), rng.standard_normal((2, V))
    after = rng.standard_normal((V, V)), rng.standard_normal((V, V))  # logits after each first token

    def softmax(z: np.ndarray) -> np.ndarray:
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    def logits(first: np.ndarray, then: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        return np.stack([np.broadcast_to(first, (rows, V)), then[tokens]], 1).astype(np.float32)

    if drafted == "drafted":
        first = hw.sample(np.broadcast_to(draft[0].astype(np.float32), (rows, V)), seed=8)
        proposals = logits(draft[0], after[1], first)[:, :1]
    else:
        first, proposals = np.full(rows, 2), None
    got = hw.verify_draft(logits(target[0], after[0], first), proposals, first[:, None], seed=8)
    one = got.tokens[:, 0]
    p, q = softmax(target[0]), softmax(draft[0]) if drafted == "drafted" else np.eye(V)[2]
    counts = np.bincount(one, minlength=V)
    statistic, limit = chi_square(counts, p)
    assert statistic < limit
    careless = np.minimum(p, q) + np.maximum(0, q - p).sum() * p
    for wrong in (q, careless) if drafted == "drafted" else (careless,):
        assert power(rows, wrong, p) > 0.999
        statistic, limit = chi_square(counts, wrong)
        assert statistic > limit
    pairs = got.tokens[got.accepted == 1]  # the second token, after all were accepted
    exact = softmax(after[0])
    for token in range(V):
        seen = np.bincount(pairs[pairs[:, 0] == token, 1], minlength=V)
        if seen.sum():
            statistic, limit = chi_square(seen, exact[token])
            assert statistic < limit


BAD_DRAFTS = [
    ({"target_logits": [0.0] * 5}, ValueError, r"^target_logits: expected an array \(\.\.\., n \+ 1, V\), got shape"),
    ({"draft_tokens": [0]}, ValueError, r"^draft_tokens: expected shape \(2,\), one place less"),
    ({"draft_tokens": [0, 5]}, ValueError, r"^draft_tokens: expected ids from 0 to 4, got 5 in row 1"),
    ({"draft_tokens": [0.0, 1.0]}, TypeError, r"^draft_tokens: expected token ids, got float64"),
    ({"draft_logits": np.zeros((2, 4))}, ValueError, r"^draft_logits: expected shape \(2, 5\) beside"),
    ({"draft_params": hw.SamplingParams()}, ValueError, r"^draft_params: expected draft_logits"),
    ({"draft_logits": np.full((2, 5), np.nan)}, ValueError, r"^draft_logits: expected numbers, got NaN at token 0"),
    ({"seed": [1, 2]}, ValueError, r"^seed: expected one integer, or one per row in an array of shape \(\)"),
    ({"draft_tokens": [-1, 0]}, ValueError, r"got -1 in row 0; say how many count with lengths where rows are padded$"),
    ({"draft_tokens": [0, -1], "lengths": 2}, ValueError, r"^draft_tokens: expected ids from 0 to 4, got -1 in row 1;"),
    (
        {"draft_tokens": [[0], [0, 1]]},
        ValueError,
        r"^draft_tokens: .*unequal lengths; pad them with -1 and give lengths",
    ),
    ({"draft_tokens": [0, 0.5], "lengths": 1}, TypeError, r"^draft_tokens: expected token ids, got float64"),
    ({"lengths": 3}, ValueError, r"^lengths: expected integers from 0 to 2, the tokens that draft_tokens has, got 3$"),
    ({"lengths": -1}, ValueError, r"^lengths: expected integers from 0 to 2, .*, got -1$"),
    ({"lengths": 2**70}, ValueError, r"^lengths: expected integers below 2"),
    ({"lengths": np.uint64(2**63)}, ValueError, r"^lengths: expected integers from"),
    ({"lengths": [1]}, ValueError, r"^lengths: expected a shape that broadcasts to \(\), got \(1,\)"),
    ({"lengths": 1.0}, TypeError, r"^lengths: expected integers, got float64"),
    ({"lengths": True}, TypeError, r"^lengths: expected integers, got bool"),
    ({"lengths": "1"}, TypeError, r"^lengths: expected integers"),
]


def test_a_mask_of_places_is_shown_as_it_was_given() -> None:
    target, draft = np.zeros((2, 3, 5)), np.zeros((2, 2, 5))
    for shape in ((7, 3, 5), (1, 7, 3, 5), (3, 2, 5)):
        for name, array in (("allowed", np.ones(shape, bool)), ("logit_bias", np.zeros(shape))):
            with pytest.raises(
                ValueError, match=rf"^{name}: .* broadcasts to \(2, 3, 5\), got {re.escape(str(shape))}$"
            ):
                hw.verify_draft(target, draft, np.zeros((2, 2), int), seed=1, **{name: array})


def test_a_bad_length_names_its_row() -> None:
    target = np.zeros((2, 2, 3, 5))
    for bad in (3, -1):
        with pytest.raises(ValueError, match=rf"^lengths: .* draft_tokens has in row \(1, 0\), got {bad}$"):
            hw.verify_draft(target, None, np.zeros((2, 2, 2), int), lengths=[[0, 1], [bad, 2]])
    with pytest.raises(ValueError, match=r"^lengths: expected a shape that broadcasts to \(2, 2\), got \(3,\)"):
        hw.verify_draft(target, None, np.zeros((2, 2, 2), int), lengths=[0, 1, 2])


@pytest.mark.parametrize(("call", "error", "message"), BAD_DRAFTS, ids=[b[2][:40] for b in BAD_DRAFTS])
def test_bad_drafts(call: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hw.verify_draft(**{"target_logits": np.zeros((3, 5)), "draft_logits": None, "draft_tokens": [0, 1], **call})


# A sampler for serving loops ----------------------------------------------------------------------------------------


FILTERS: dict[str, list[Any]] = {
    "dynamic_temperature_range": [None, 0.5],
    "top_n_sigma": [None, 1.5],
    "top_k": [None, 3],
    "top_p": [None, 0.8],
    "min_p": [None, 0.1],
    "typical_p": [None, 0.7],
    "epsilon_cutoff": [None, 0.02],
    "xtc_probability": [None, 0.5],
    "min_tokens_to_keep": [1, 2],
}


@given(st.data())
@settings(max_examples=60)
def test_a_sampler_equals_row_by_row_sampling(data: st.DataObject) -> None:
    """Rows come, go and draw in any order; each draws what it draws alone, and what the reference's sampler draws."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    V = data.draw(st.sampled_from([4, 70]))
    sampler, other = hw.Sampler(V), reference.Sampler(V)
    alone: dict[int, hw.Sampler] = {}
    prompts: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["admit", "step", "step", "retire", "force", "truncate"]))
        if action == "admit":
            dialect = data.draw(st.sampled_from([None, None, "hf", "llama.cpp", "mlx"]))
            filters = {name: data.draw(st.sampled_from(values)) for name, values in FILTERS.items()}
            if dialect is None:
                filters["ties"] = data.draw(st.sampled_from(["lowest_id", "keep"]))
                filters["nucleus"] = data.draw(st.sampled_from(["after_top_k", "joint"]))
            if "xtc_special_tokens" not in rules(dialect, "after_top_k").lacks():
                filters["xtc_special_tokens"] = data.draw(st.sampled_from([None, [3, 0]]))
            params = hw.SamplingParams(
                temperature=data.draw(st.sampled_from([0.7, 1.5] if dialect == "hf" else [0.0, 0.7, 1.5])),
                dialect=dialect,
                **{name: value for name, value in filters.items() if name not in rules(dialect, "after_top_k").lacks()},
                position=data.draw(st.sampled_from([None, 11])),
                logit_bias=data.draw(st.sampled_from([None, {1: 2.0}])),
                allowed=data.draw(
                    st.sampled_from([None, [0, 2, 3], np.arange(V) > 0, np.full(-(-V // 32), -2, np.int32)])
                ),
            )
            call: dict[str, Any] = {
                "prompt_tokens": rng.integers(0, V, int(rng.integers(0, 90))),
                "output_tokens": rng.integers(0, V, data.draw(st.sampled_from([0, 0, 5]))),
                "seed": int(rng.integers(99)),
                "count_prompt": data.draw(st.booleans()),
            }
            if data.draw(st.booleans()):
                call["stream"] = int(rng.integers(2**63))
            if data.draw(st.booleans()):
                call |= {"unknown_tokens": "ignore", "prompt_tokens": rng.integers(-2, V + 2, int(rng.integers(90)))}
            if data.draw(st.booleans()):
                call |= {"repetition": 1.3, "frequency": 0.1, "window": data.draw(st.sampled_from([None, 5]))}
                call |= {"dry_window": data.draw(st.sampled_from([None, 9])), "frequency_window": 7}
            if data.draw(st.booleans()):
                call |= {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_breakers": [0]}
            if data.draw(st.booleans()):  # which leave at least one token
                call |= {"stop_tokens": [1], "min_tokens": 4, "banned_sequences": [[1, 0], [2, 2, 2]]}
            handle = sampler.admit(params, **call)
            prompts[handle] = len(call["prompt_tokens"])
            assert other.admit(params, **call) == handle
            alone[handle] = hw.Sampler(V)
            alone[handle].admit(params, **call)
        elif action == "retire" and alone:
            handle = data.draw(st.sampled_from(list(alone)))
            sampler.retire(handle)
            other.retire(handle)
            del alone[handle]
        elif action in ("force", "truncate") and alone:
            at = data.draw(st.integers(0, len(alone) - 1))
            handle, one = list(alone.items())[at]
            length = len(other.history(handle))
            number = data.draw(st.integers(0, V - 1) if action == "force" else st.integers(prompts[handle], length))
            for each, row in ((sampler, handle), (other, handle), (one, 0)):
                getattr(each, action)(row, number)
        elif action == "step":
            logits = (rng.standard_normal((len(alone), V)) * 2).astype(DTYPES[data.draw(st.sampled_from(list(DTYPES)))])
            kinds = [None, np.arange(V) != 3, np.full(-(-V // 32), -6, np.int32), [0, 2, 3]]
            kinds += [mask[None] for mask in kinds[1:3]]
            masks = [data.draw(st.sampled_from(kinds)) for _ in alone]
            n = data.draw(st.sampled_from([None, 0, 3]))
            drawn, want = (each.step(logits, allowed=masks, logprobs=n) for each in (sampler, other))
            if n is None:
                assert same_bits(drawn, want)
            else:
                for got, expected in zip((*drawn.raw, *drawn.processed), (*want.raw, *want.processed), strict=True):
                    assert (got is None) == (expected is None)
                    if got is not None:
                        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
                drawn, want = drawn.tokens, want.tokens
                assert same_bits(drawn, want)
            for token, row, mask, one in zip(drawn, logits, masks, alone.values(), strict=True):
                assert one.step(row[None], allowed=[mask])[0] == token


@given(st.lists(st.integers(0, 3), max_size=12), st.data())
@settings(max_examples=200)
def test_bans_equal_the_reference(history: list[int], data: st.DataObject) -> None:
    drawn = data.draw(st.integers(0, len(history)))
    own: dict[str, Any] = {
        "stop_tokens": data.draw(st.lists(st.integers(0, 3), max_size=2)),
        "min_tokens": data.draw(st.integers(0, 4)),
        "banned_sequences": data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=3)),
        "no_repeat_ngram": data.draw(st.sampled_from([None, 1, 2, 3, 4])),
    }
    ours = bans.checked(**own, vocabulary=4).next(np.array(history, np.int64), drawn)
    sampler = reference.Sampler(4)
    row = sampler.admit(None, history[: len(history) - drawn], history[len(history) - drawn :], **own)
    assert sorted(set(ours.tolist())) == sampler.banned(row)


@given(st.data(), st.sampled_from(list(DTYPES)))
@settings(max_examples=150)
def test_a_draw_of_a_sampler_is_a_draw_of_what_penalize_made(data: st.DataObject, dtype: str) -> None:
    """For any type, where penalties are small beside the logits' steps, and where they leave float32."""
    rng, V = np.random.default_rng(data.draw(st.integers(0, 2**32))), 5
    kind = data.draw(st.sampled_from(["near ties", "too low for float32", *KINDS]))
    logits = make_logits(kind, dtype, (4, V), rng)
    sampler, rows = hw.Sampler(V), []
    for seed in range(4):
        own = {name: data.draw(values) for name, values in PENALTIES.items() if data.draw(st.booleans())}
        own |= {"presence": data.draw(st.sampled_from([0.05, 0.001, -0.0003]))}
        prompt, counts = rng.integers(0, V, 7).tolist(), data.draw(st.booleans())
        params = hw.SamplingParams(
            temperature=data.draw(st.sampled_from([0, 0.001, 1])),
            logit_bias=data.draw(st.sampled_from([None, {0: 0.003}, {1: -3e38}])),
            top_k=data.draw(st.sampled_from([None, 2])),
        )
        sampler.admit(params, prompt, seed=seed, count_prompt=counts, **own)
        rows.append((params, prompt, seed, own | {"prompt_lengths": 0 if counts else 7}))
    for _ in range(4):
        tokens = sampler.step(logits)
        for z, token, (params, history, seed, own) in zip(logits, tokens.tolist(), rows, strict=True):
            new = hw.penalize(z, history, **own)
            assert new.dtype == (np.float64 if dtype == "float64" else np.float32)
            assert token == hw.sample(new, params, seed=seed, position=len(history))
            history.append(token)


def test_a_sampler_knows_the_breakers_that_it_drew() -> None:
    sampler = hw.Sampler(3)
    sampler.admit(hw.SamplingParams(temperature=0), dry_multiplier=9, dry_allowed_length=1, dry_breakers=[0])
    for token in (1, 2, 0, 1, 2, 0):
        assert sampler.step([np.eye(3)[token] * 99]) == [token]
    assert sampler.step([[0.0, 1.0, 0.0]]) == [1]  # it came after 1 2 0 before, and would be penalized


def test_rows_with_different_filters_share_a_call() -> None:
    """What a row has not set is off for it: hundreds of draws would show a filter that is hardly so."""
    sampler, rng = hw.Sampler(70), np.random.default_rng(5)
    every = [hw.SamplingParams(seed=9, **{name: values[-1]}) for name, values in FILTERS.items()]
    for params in [hw.SamplingParams(seed=9), *every]:
        sampler.admit(params, stream=0)
    assert len(sampler._active.groups) == 1
    for j in range(300):
        logits = rng.standard_normal((1 + len(every), 70))
        tokens = sampler.step(logits)
        assert tokens[0] == hw.sample(logits[0], seed=9, position=j)
        assert tokens[1:].tolist() == [hw.sample(z, p, position=j) for z, p in zip(logits[1:], every, strict=True)]
    for words in ({"dialect": "hf"}, {"ties": "keep"}, {"nucleus": "joint"}):
        sampler.admit(hw.SamplingParams(**words))
    assert len(sampler._active.groups) == 4


def test_rows_without_bias_or_mask_are_not_given_one() -> None:
    """The others have none of (V,) each, unless few would be left to a call. Who goes leaves the rest as it was."""
    V, rng = 70, np.random.default_rng(5)

    def groups(special: dict[int, dict[str, Any]]) -> tuple[list[int], list[bool]]:
        sampler = hw.Sampler(V)
        each = [hw.SamplingParams(seed=i, top_k=9, **special.get(i, {})) for i in range(24)]
        for params in each:
            sampler.admit(params)
        found = sampler._active.groups
        logits = rng.standard_normal((24, V))
        assert sampler.step(logits).tolist() == [hw.sample(z, p) for z, p in zip(logits, each, strict=True)]
        sampler.retire(23)
        kept = [new.settings is old.settings for new, old in zip(sampler._active.groups, found, strict=True)]
        assert kept == [True] * (len(found) - 1) + [False]
        dense = [any(np.size(value) >= V for value in vars(group.settings).values()) for group in found]
        return [len(group.handles) for group in found], dense

    bias, mask = {"logit_bias": {5: 1.0}}, {"allowed": [1, 2, 5]}
    assert groups({}) == ([24], [False])
    assert groups({2: bias, 3: bias, 5: mask}) == ([2, 2, 1, 1, 18], [False, True, False, True, False])
    assert groups(dict.fromkeys(range(0, 24, 2), bias)) == ([24], [True])


def test_a_sampler_costs_little_more_than_the_draw() -> None:
    """32 rows of 128,256 with penalties over a history of 500. The limit leaves room for a busy machine."""
    rows, V = 32, 128_256
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((rows, V)) * 3).astype(np.float32)
    sampler = hw.Sampler(V)
    for i in range(rows):
        params = hw.SamplingParams(temperature=0.8, top_k=50)
        sampler.admit(params, rng.integers(0, V, 500), seed=i, repetition=1.1, frequency=0.1, dry_multiplier=0.8)

    def milliseconds(call: Any) -> float:
        took = []
        for _ in range(9):
            start = time.process_time()
            call()
            took.append(time.process_time() - start)
        return 1e3 * min(took)

    step = milliseconds(lambda: sampler.step(logits))
    draw = milliseconds(lambda: hw.sample(logits, temperature=0.8, top_k=50, seed=np.arange(rows)))
    print(f"a step {step:.2f} ms, the draw alone {draw:.2f} ms")
    assert step < 4 * draw + 2


BAD_ROWS = [
    ({"params": {"temperature": 1}}, TypeError, r"^params: expected SamplingParams"),
    (
        {"params": hw.SamplingParams(top_k=[1, 2])},
        ValueError,
        r"^top_k: expected one value for the row, got shape \(2,\)",
    ),
    ({"params": hw.SamplingParams(uniform=0.5)}, ValueError, r"^uniform: expected seed and position"),
    ({"params": hw.SamplingParams(allowed=[70])}, ValueError, r"^allowed: expected ids from 0 to 69, got 70"),
    ({"params": hw.SamplingParams(logit_bias=np.zeros(7))}, ValueError, r"^logit_bias: expected a last axis of 70"),
    (
        {"prompt_tokens": [3, 70], "repetition": 2},
        ValueError,
        r"^prompt_tokens: expected ids from 0 to 69, got 70 at 1; .*ignore",
    ),
    ({"unknown_tokens": None}, ValueError, r"^unknown_tokens: expected one of 'error', 'ignore', got None"),
    ({"count_prompt": 1}, TypeError, r"^count_prompt: expected True or False, got 1"),
    ({"stream": -1}, ValueError, r"^stream: expected an integer from 0 to 18446744073709551615, got -1"),
    ({"stream": 0.5}, TypeError, r"^stream: expected an integer"),
    ({"prompt_tokens": [[1]]}, ValueError, r"^prompt_tokens: expected a list of token ids, got shape \(1, 1\)"),
    ({"prompt_tokens": [0.5]}, TypeError, r"^prompt_tokens: expected integers"),
    ({"output_tokens": [0, -1]}, ValueError, r"^output_tokens: expected integers from 0 to 69, got -1 at 1"),
    ({"frequency": [1.0]}, ValueError, r"^frequency: expected one value for the row"),
    ({"repetition": 0}, ValueError, r"^repetition: expected"),
    ({"presense": 1}, TypeError, r"^presense: no such penalty; expected one of"),
    (
        {"temperature": 0.5},
        TypeError,
        r"^temperature: no such penalty; give `params=hw.SamplingParams\(t",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_ROWS, ids=[b[2][:40] for b in BAD_ROWS])
def test_bad_rows(call: dict[str, Any], error: type[Exception], message: str) -> None:
    sampler = hw.Sampler(70)
    with pytest.raises(error, match=message):
        sampler.admit(**call)
    assert sampler.handles == []


BAD_MASKS = [
    (np.ones(70, bool), ValueError, r"^allowed: expected a mask for each active row, of shape \(2, 70\) for bool or"),
    (np.ones((2, 2), np.int32), ValueError, r"or \(2, 3\) for packed int32, .*got uint32 of shape \(2, 2\)"),
    (np.ones((2, 70), np.float32), TypeError, r"^allowed: expected a bool mask"),
    (np.array([1, 2]), ValueError, r"^allowed: expected a mask for each active row, .*got int64 of shape \(2,\)"),
    ({1, 2}, ValueError, r"^allowed: expected a mask for each active row"),
    ([None], ValueError, r"^allowed: expected 2 masks, one for each active row, got 1"),
    ([None, np.ones(7, bool)], ValueError, r"^allowed\[1\]: expected a last axis of 70, one for each token"),
    ([np.ones((2, 70), bool), None], ValueError, r"^allowed\[0\]: .* broadcasts to \(70,\), got \(2, 70\)"),
    ([np.ones((1, 2, 3), np.int32), None], ValueError, r"^allowed\[0\]: .* broadcasts to \(3,\), got \(1, 2, 3\)"),
    ([None, np.ones(2, np.int32)], ValueError, r"^allowed\[1\]: expected a packed mask of 3 32-bit words"),
    ([None, [70]], ValueError, r"^allowed\[1\]: expected ids from 0 to 69, got 70"),
    ([3, 5], TypeError, r"^allowed\[0\]: expected a bool mask"),
    ([None, "abc"], TypeError, r"^allowed\[1\]: expected a bool mask"),
    ("ab", TypeError, r"^allowed: expected a bool mask"),
]


@pytest.mark.parametrize(("allowed", "error", "message"), BAD_MASKS, ids=[b[2][:40] for b in BAD_MASKS])
def test_bad_masks(allowed: Any, error: type[Exception], message: str) -> None:
    sampler, logits = hw.Sampler(70), np.zeros((2, 70))
    handles = [sampler.admit(seed=i) for i in range(2)]
    with pytest.raises(error, match=message):
        sampler.step(logits, allowed=allowed)
    assert sampler.handles == handles
    assert sampler.step(logits).tolist() == hw.sample(logits, seed=[0, 1]).tolist()
