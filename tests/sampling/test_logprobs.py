"""Log-probabilities: native against the reference in bits, exactness, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import laid_out, same_bits
from test_sample import draw_logits, make_options

import headway as hw
from headway import reference


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
