"""What stands around the draw: native against the reference in bits, laws, frequencies, speed of growth, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES, laid_out, same_bits
from test_sampling import make_logits, make_options

import headway as hw
from headway import reference

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
            if data.draw(st.booleans()) and name != "window":
                options[name] = [data.draw(values) for _ in range(rows)]
    if data.draw(st.booleans()):
        options["dry_breakers"] = rng.integers(0, V, 2).tolist()
    # Few different tokens, so that sequences repeat; and whole repetitions.
    lengths = rng.integers(0, 30, rows)
    history = [np.tile(rng.integers(0, V, int(n)), int(rng.integers(1, 4))).tolist() for n in lengths]
    want = reference.penalize(logits, history, **options)
    layout = data.draw(st.sampled_from(["contiguous", "reversed", "last axis apart"]))
    assert same_bits(hw.penalize(laid_out(logits, layout), history, **options), want)
    n = np.array([len(row) for row in history])
    padded = np.full((rows, n.max() + 2), -1, np.int32)
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


@pytest.mark.parametrize("history", [[3] * 200_000, [1, 2] * 100_000, list(range(1000)) * 200])
def test_penalties_take_time_linear_in_the_history(history: list[int]) -> None:
    """Twenty times the history takes some twenty times as long; comparing all pairs would take four hundred."""
    import time

    def seconds(tokens: np.ndarray) -> float:
        took = []
        for _ in range(5):
            start = time.perf_counter()
            hw.penalize(logits, tokens, dry_multiplier=1)
            took.append(time.perf_counter() - start)
        return min(took)

    logits, whole = np.zeros(1000, np.float32), np.array(history)
    assert seconds(whole) < 100 * seconds(whole[:10_000])


BAD_PENALTIES = [
    ({"token_ids": [0, 9]}, ValueError, r"^token_ids: expected ids from 0 to 3, got 9 at 1;"),
    ({"token_ids": [[0]], "logits": [[0.0] * 4] * 2}, ValueError, r"^token_ids: expected 2 lists.*got 1"),
    ({"token_ids": [[0], [-1]], "logits": [[0.0] * 4] * 2}, ValueError, r"got -1 at 0 in row 1;"),
    ({"token_ids": [0.5]}, TypeError, r"^token_ids: expected a list of token ids"),
    ({"token_ids": [[0]]}, TypeError, r"^token_ids: expected a list of token ids, got 2 axes"),
    ({"token_ids": [[0], 1], "logits": [[0.0] * 4] * 2}, TypeError, r"^token_ids\[1\]: expected a list of token ids"),
    ({"token_ids": np.zeros((3, 2), int)}, ValueError, r"^token_ids: expected an array of shape \(n\), got"),
    ({"lengths": 3}, ValueError, r"^lengths: expected at most the 2 tokens of token_ids, got 3"),
    ({"lengths": -1}, ValueError, r"^lengths: expected integers from 0"),
    ({"lengths": [1, 2]}, ValueError, r"^lengths: expected a shape that broadcasts"),
    ({"repetition": "a"}, TypeError, r"^repetition: expected"),
    ({"repetition": [1.0, 2.0]}, ValueError, r"^repetition: expected a shape that broadcasts to \(\)"),
    ({"frequency": np.inf}, ValueError, r"^frequency: expected a number within float32"),
    ({"presence": [[0.0, np.nan]]}, ValueError, r"^presence\[0, 1\]: expected a number within float32, got nan"),
    ({"window": 0}, ValueError, r"^window: expected an integer >= 1, got 0; use None"),
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
    from test_sampling_statistics import chi_square, power

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
