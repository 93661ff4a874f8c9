"""Penalties: native against the reference in bits, growth, bad input."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import laid_out, same_bits
from test_sample import draw_logits

import headway as hw
from headway import reference
from headway._sampling.histories import Histories
from headway._sampling.penalties import checked, with_windows

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
            each = [with_windows(checked(**options)) for _, options in rows.values()]
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
                one = {name: np.array([value]) for name, value in with_windows(checked(**options)).items()}
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
