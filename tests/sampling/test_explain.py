"""hw.explain against the sampler itself, stage by stage and token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import DTYPES
from test_sample import KINDS, make_logits, make_options

import headway as hw
from headway import _native, reference
from headway._sampling.dialects import DIALECTS, rules
from headway._sampling.stages import number


@given(st.data())
@settings(max_examples=400)
def test_it_says_what_the_sampler_does(data: st.DataObject) -> None:
    """Any logits, options and dialect: the same tokens and masses, and every number in the stages follows from them."""
    V, dtype = data.draw(st.integers(1, 60) | st.just(1000)), data.draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = make_logits(data.draw(st.sampled_from(list(KINDS))), dtype, (1, V), rng)
    options = make_options(data.draw, V, 1, rng)
    if "logit_bias" not in options and data.draw(st.booleans()):
        allowed = rng.random(V) < 0.7
        allowed[int(logits.astype(np.float64).argmax())] = True
        options["allowed"] = data.draw(st.sampled_from([allowed, np.flatnonzero(allowed), packed(allowed)]))
    try:
        want = hw.probabilities(logits, **options)[0]
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20].replace("[", r"\[")):
            hw.explain(logits, **options)
        return
    found = hw.explain(logits, **options)
    masses = reference.masses(logits, **options)[0]
    np.testing.assert_array_equal(found.masses, masses)
    np.testing.assert_array_equal(np.sort(found.kept), np.flatnonzero(masses))
    shares = (found.masses / found.masses.sum()).astype(want.dtype)
    np.testing.assert_array_equal(shares, want)
    assert [one.probability for one in found.head] == [float(masses[i] / masses.sum()) for i in found.kept[:10]]
    stayed = int(np.isfinite(np.asarray(hw.filter_logits(logits, **options)).astype(np.float64)).sum())
    assert found.kept.size + found.massless == stayed

    left = V - found.banned
    for stage in found.stages:
        assert stage.before == left
        left = stage.after
        assert 1 <= left <= stage.before
        assert (stage.last_kept is None) == (stage.first_removed is None) == (stage.removed == 0)
        assert 0 <= stage.kept_mass <= 1
    assert left == stayed
    check_every_token(found, masses)
    assert str(found)
    assert found._repr_html_().startswith("<table>")


@given(st.data())
@settings(max_examples=400)
def test_it_equals_the_definition(data: st.DataObject) -> None:
    """Any logits, options and dialect: every number is that of headway.reference, which sorts everything."""
    V, dtype = data.draw(st.integers(1, 80) | st.just(3000)), data.draw(st.sampled_from(list(DTYPES)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = make_logits(data.draw(st.sampled_from(list(KINDS))), dtype, (1, V), rng)
    if data.draw(st.booleans()):  # few values, so that much is equal
        logits = np.round(np.clip(logits.astype(np.float64), -4, 4)).astype(logits.dtype)
    options = make_options(data.draw, V, 1, rng)
    try:
        hw.probabilities(logits, **options)
    except ValueError:  # a row that has nothing to explain
        return
    check_definition(logits, options, rng)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("kind", ["normal", "all equal", "two values", "few values", "peaked", "bans"])
@pytest.mark.parametrize("dialect", [None, *sorted(DIALECTS)])
def test_it_equals_the_definition_on_many_tokens(dialect: str | None, kind: str, dtype: str) -> None:
    """So many that the kernel keeps a row with gaps, skips blocks and guesses."""
    rng = np.random.default_rng(len(kind))
    logits = make_logits(kind, dtype, (1, 20_001), rng)
    every = {
        "temperature": 0.9,
        "dynamic_temperature_range": 0.2,
        "top_n_sigma": 3.0,
        "top_k": 15_000,
        "top_p": 0.999,
        "min_p": 1e-4,
        "typical_p": 0.99,
        "epsilon_cutoff": 1e-6,
        "eta_cutoff": 1e-5,
        "xtc_probability": 1.0,
        "xtc_threshold": 1e-4,
        "min_tokens_to_keep": 7,
    }
    lacks = rules(dialect, "after_top_k").lacks()
    options = {name: value for name, value in every.items() if name not in lacks}
    if "xtc_probability" in lacks:
        del options["xtc_threshold"]
    check_definition(logits, {**options, "dialect": dialect, "seed": 1}, rng)


@pytest.mark.parametrize("dialect", ["vllm", "flashinfer", "sglang", "mlx"])
def test_at_temperature_0_no_token_equals_the_first(dialect: str) -> None:
    logits = np.array([[2.0, 2.0, 1.0, 2.0]])
    options = {"temperature": 0, "top_p": 0.5, "dialect": dialect}
    assert hw.explain(logits, **options).stages[1].rule == "lowest_id"
    check_definition(logits, options, np.random.default_rng(0))


def check_definition(logits: np.ndarray, options: dict[str, Any], rng: np.random.Generator) -> None:
    found, facts = hw.explain(logits, **options), reference.explain(logits, **options)
    np.testing.assert_array_equal(found.kept, facts.kept)
    assert [one.token for one in found.head] == facts.kept[:10].tolist()
    assert [stage.option for stage in found.stages] == [one.option for one in facts.stages]
    for stage, one in zip(found.stages, facts.stages):
        for name in one._fields:
            if name in ("last_kept", "first_removed"):
                candidate = getattr(stage, name)
                assert (candidate and (candidate.token, candidate.probability)) == getattr(one, name), (stage, one)
            elif name == "found":
                shown = "" if one.found is None else f"{one.found:.4f}" if "coin" in stage.note else number(one.found)
                assert shown in stage.note, (stage, one)
                assert bool(shown) == bool(stage.note)
            else:
                assert getattr(stage, name) == getattr(one, name), (name, stage, one)
    for token in rng.choice(found.vocabulary, min(found.vocabulary, 60), replace=False):
        why = found.why(token)
        if (removed := facts.removed(int(token))) is None:
            assert why.stage in (None, "mass", "logits", "logit_bias")
            assert why.rank is None or facts.kept[why.rank - 1] == token
        else:
            assert (why.stage, why.measured, why.limit) == removed


@pytest.mark.parametrize("options", [{}, {"top_k": 2000}, {"typical_p": 0.5}, {"temperature": 0.5, "top_p": 0.9}])
def test_it_asks_the_kernel_once_and_sorts_only_what_it_shows(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.random.default_rng(0).standard_normal(5000, np.float32)
    calls, sorted_sizes = [], []

    def counted(function: Any, note: Any) -> Any:
        return lambda *args, **kwargs: (note(args), function(*args, **kwargs))[1]

    monkeypatch.setattr(_native, "trace", counted(_native.trace, calls.append))
    for name in ("sort", "argsort", "lexsort", "unique"):
        monkeypatch.setattr(np, name, counted(getattr(np, name), lambda args: sorted_sizes.append(np.size(args[0]))))
    found = hw.explain(logits, top=10, **options)
    assert str(found)
    assert found.why(int(logits.argmin()))
    assert len(calls) == 1
    assert max(sorted_sizes) == 10
    assert found.kept.size > 10  # which is in order, once it is asked for
    assert max(sorted_sizes) == found.kept.size


def packed(mask: np.ndarray) -> np.ndarray:
    bits = np.zeros(-(-mask.size // 32) * 32, bool)
    bits[: mask.size] = mask
    return np.packbits(bits, bitorder="little").view(np.int32)


def check_every_token(found: hw.Explanation, masses: np.ndarray) -> None:
    removed = dict.fromkeys([stage.option for stage in found.stages], 0)
    counts = {"banned": 0, "mass": 0}
    for token in range(found.vocabulary):
        why = found.why(token)
        assert why.kept == (masses[token] > 0)
        if why.kept:
            assert why.rank is not None
            assert (found.kept[why.rank - 1], why.probability) == (token, masses[token] / masses.sum())
        elif why.stage in removed:
            removed[why.stage] += 1
            # A place in an order or a distance is too large, a share too small; but xtc takes the large ones.
            over = why.stage in ("top_k", "top_p", "typical_p", "top_n_sigma", "xtc_probability")
            assert why.measured is not None
            assert why.limit is not None
            assert why.measured >= why.limit if over else why.measured <= why.limit
        else:
            counts["mass" if why.stage == "mass" else "banned"] += 1
    assert removed == {stage.option: stage.removed for stage in found.stages}
    assert counts == {"banned": found.banned, "mass": found.massless}


def only(logits: Any, **options: Any) -> Any:
    (stage,) = hw.explain(logits, **options).stages
    return stage


def edge(stage: Any) -> tuple[int, int]:
    return stage.last_kept.token, stage.first_removed.token


TIED = [3.0, 1.0, 2.0, 2.0, 2.0]


def test_the_boundary_and_the_ties_that_the_rule_decided() -> None:
    stage = only(TIED, top_k=3)
    assert (edge(stage), stage.ties_kept, stage.ties_removed, stage.rule) == ((3, 4), 2, 1, "lowest_id")
    stage = only(TIED, top_k=3, ties="keep")
    assert (edge(stage), stage.ties_kept, stage.ties_removed) == ((4, 1), 1, 0)
    stage = only(TIED, top_p=0.6, dialect="hf")
    assert (edge(stage), stage.ties_kept, stage.ties_removed, stage.rule) == ((4, 3), 1, 2, "highest_id")
    stage = only(TIED, top_k=1)
    assert (edge(stage), stage.ties_kept, stage.ties_removed) == ((0, 2), 0, 0)
    assert only(TIED, top_k=5).last_kept is None
    stage = only(np.log([0.4, 0.3, 0.2, 0.1]), xtc_probability=1.0, xtc_threshold=0.15, seed=1)
    assert (edge(stage), stage.removed) == ((2, 1), 2)


def test_masses_are_those_that_the_stage_saw() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1])
    top_k, top_p = hw.explain(logits, top_k=3, top_p=0.6).stages
    assert top_k.kept_mass == pytest.approx(0.9)
    assert top_k.first_removed.probability == pytest.approx(0.1)
    assert (top_p.before, top_p.after) == (3, 2)
    assert top_p.last_kept.probability == pytest.approx(0.25 / 0.9)
    assert top_p.mass_before == top_k.mass_after


def test_what_stayed_for_min_tokens_to_keep_alone() -> None:
    stage = only(TIED, min_p=0.9, min_tokens_to_keep=3)
    assert (stage.after, stage.floor_kept) == (3, 2)
    assert "2 more kept for min_tokens_to_keep" in stage.notes()


def test_stages_come_in_the_order_of_the_dialect() -> None:
    options = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1}
    for dialect, order in {
        None: ["temperature", "top_k", "top_p", "min_p"],
        "vllm": ["temperature", "min_p", "top_k", "top_p"],
        "llama.cpp": ["top_k", "top_p", "min_p", "temperature"],
        "mlx": ["top_p", "min_p", "top_k", "temperature"],
    }.items():
        assert [stage.option for stage in hw.explain(TIED, dialect=dialect, **options).stages] == order
    assert hw.explain(TIED, temperature=1.0, top_p=1.0, min_p=0.0, top_n_sigma=math.inf).stages == ()
    assert [s.option for s in hw.explain(TIED, temperature=0, dialect="mlx").stages] == ["greedy"]
    assert hw.explain(TIED, top_k=0, dialect="llama.cpp").stages == ()


@pytest.mark.parametrize(
    ("options", "token", "stage", "measured", "limit"),
    [
        ({"top_k": 2}, 2, "top_k", 3, 2),
        ({"top_p": 0.7}, 2, "top_p", 0.75, 0.7),
        ({"min_p": 0.4}, 2, "min_p", 0.3, 0.4),
        ({"epsilon_cutoff": 0.2}, 2, "epsilon_cutoff", 0.15, 0.2),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.2, "seed": 1}, 0, "xtc_probability", 0.5, 0.2),
        ({"typical_p": 0.2}, 0, "typical_p", 0.25, 0.2),
    ],
)
def test_why_measures_as_the_stage_does(
    options: dict[str, Any], token: int, stage: str, measured: float, limit: float
) -> None:
    why = hw.explain(np.log([0.5, 0.25, 0.15, 0.1]), **options).why(token)
    assert (why.kept, why.stage, why.rank, why.probability) == (False, stage, None, 0.0)
    assert why.measured == pytest.approx(measured, abs=1e-6)
    assert why.limit == pytest.approx(limit)
    assert why.missed_by == pytest.approx(abs(measured - limit), abs=1e-6)
    assert f"removed by {stage}=" in str(why)


def test_why_tells_who_banned_a_token() -> None:
    found = hw.explain([0.0, -np.inf, 1.0, 2.0], logit_bias={2: -np.inf}, allowed=[1, 2, 3])
    assert [found.why(token).stage for token in range(4)] == ["allowed", "logits", "logit_bias", None]
    assert found.banned == 3
    assert str(found.why(3)) == "token 3: in, with probability 1, rank 1 of 1"


def test_allowed_in_every_form() -> None:
    mask = np.arange(40) % 3 == 0
    for allowed in (mask, np.flatnonzero(mask), packed(mask)):
        assert sorted(hw.explain(np.zeros(40), allowed=allowed).kept) == np.flatnonzero(mask).tolist()


def test_what_has_no_mass_is_said() -> None:
    assert "its mass rounds to 0" in str(hw.explain([0.0, -50.0]).why(1))
    assert "temperature 0 leaves all mass to the best" in str(hw.explain([0.0, -1.0], temperature=0).why(1))
    assert "1 more stay, whose mass rounds to 0" in str(hw.explain([0.0, -50.0]))


def test_seeds_toss_the_coin_that_sample_tosses() -> None:
    for seed in range(20):
        options = {"xtc_probability": 0.5, "xtc_threshold": 0.1, "seed": seed, "position": 3}
        want = hw.probabilities(TIED, **options) > 0
        np.testing.assert_array_equal(hw.explain(TIED, **options).masses > 0, want)
    assert "coin" in str(hw.explain(TIED, xtc_probability=0.5))  # fresh entropy


def test_params_and_keywords_as_in_sample() -> None:
    params = hw.SamplingParams(top_k=2, temperature=0.5)
    assert [s.value for s in hw.explain(TIED, params, top_k=3).stages] == [0.5, 3]
    assert [s.value for s in hw.explain([TIED], top_k=[2]).stages] == [2]


def test_the_table_fits_a_terminal() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(262_144).astype(np.float32) * 3
    options = {
        "temperature": 0.7,
        "top_k": 200_000,
        "top_p": 0.9,
        "xtc_probability": 1.0,
        "xtc_threshold": 1e-5,
        "seed": 1,
    }
    for words in (None, lambda token: "\u6f22\u5b57" * 9, lambda token: "line\n" * 9):
        text = str(hw.explain(logits, tokens=words, **options))
        assert max(map(len, text.splitlines())) <= 100, text
        assert text.count("\n") < 30


def test_one_stage_is_not_stages() -> None:
    for options, stages in (({}, "0 stages"), ({"top_k": 2}, "1 stage"), ({"top_k": 2, "top_p": 0.9}, "2 stages")):
        assert repr(hw.explain([1.0, 0.9, 0.8], **options)).endswith(f" of 3 tokens left after {stages}>")


def test_words_and_html_are_quoted() -> None:
    found = hw.explain(TIED, top=2, top_k=2, tokens=["<b>", "\n", "x", "y", "z"])
    assert [one.word for one in found.head] == ["<b>", "x"]
    assert "&lt;b&gt;" in found._repr_html_()
    assert r"token 1 '\n': removed" in str(found.why(1))
    assert hw.explain(TIED, tokens=str).head[0].word == "0"


def test_entropy() -> None:
    assert hw.explain(np.zeros(8)).entropy == pytest.approx(math.log(8))
    assert hw.explain(TIED, temperature=0).entropy == 0


@pytest.mark.parametrize(
    ("error", "logits", "options", "words"),
    [
        (
            ValueError,
            [TIED, TIED],
            {},
            r"logits: expected one row \(V,\), got 2 in shape \(2, 5\); explain them one by",
        ),
        (ValueError, np.zeros((0, 4)), {}, "logits: expected one row"),
        (ValueError, [0.0, math.nan], {}, "logits: expected numbers, got NaN at token 1"),
        (ValueError, [-math.inf], {}, "logits: expected at least one token that is not banned"),
        (ValueError, TIED, {"tokens": ["a"]}, "tokens: expected 5 words, or a function from an id to a word, got 1"),
        (ValueError, TIED, {"tokens": "abcde"}, "tokens: expected 5 words.*, got one string"),
        (ValueError, TIED, {"top": 0}, "top: expected an integer >= 1"),
        (ValueError, TIED, {"top_p": 2.0}, "top_p: expected a number"),
        (TypeError, TIED, {"topp": 2.0}, "topp: no such option"),
    ],
)
def test_bad_input(error: type[Exception], logits: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(error, match=words):
        hw.explain(logits, **options)
    with pytest.raises(ValueError, match="token: expected an integer from 0 to 4, got 5"):
        hw.explain(TIED).why(5)


def test_a_picture(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    found = hw.explain(TIED, temperature=0.5, top_k=2, tokens=["$a$", "b", "c", "d", "e"])
    figure = found.plot()
    assert [len(axis.patches) for axis in figure.axes] == [3, 3, 2]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [5, 5, 2]
    figure.savefig(tmp_path / "stages.png")
    hw.explain(TIED).plot().savefig(tmp_path / "none.png")


def test_xtc_that_spares_tokens() -> None:
    """What stays is no longer what comes first in the order of the stage."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    on = {"xtc_probability": 1.0, "xtc_threshold": 0.15, "seed": 1}
    found = hw.explain(logits, xtc_special_tokens=[0], **on)
    (stage,) = found.stages
    assert found.kept.tolist() == [0, 2, 3]
    assert (stage.removed, stage.last_kept.token, stage.first_removed.token) == (1, 0, 1)
    assert stage.note.endswith("; spares 1 token")
    assert (
        str(found.why(1))
        == "token 1: removed by xtc_probability=1: its probability is 0.3, the limit 0.15, missed by 0.15"
    )
    assert found.why(0).kept
    tied = hw.explain([1.0, 1.0, 1.0, -5.0], xtc_special_tokens=[0, 3], **on).stages[0]
    assert (tied.ties_kept, tied.ties_removed, tied.note[-15:]) == (2, 1, "spares 2 tokens")
    assert not hw.explain(logits, xtc_special_tokens=[0, 1], **on).stages[0].removed
