"""Speculative sampling: native against the reference in bits, exact distributions, frequencies, bad input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import same_bits
from test_sample import draw_logits, make_options
from test_sample_statistics import chi_square, power

import headway as hw
from headway import reference
from headway.reference._sampling import speculative


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
        return speculative.verify_row(of_target, of_draft, draft, words)

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
            whole, left = int(mass[token] * target.sum()), sum(speculative.residual(target, mass))
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
        left = speculative.residual(p, q)
        rejected = Fraction(0)
        for token in range(V):
            if q[token]:
                chance = speculative.acceptance(p, q, token)
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
