"""The part "Explanations" of docs/semantics.md, sentence by sentence: test_e7_... says that sentence E7 holds.

Small numbers on purpose: a sentence should be checkable by eye. test_explain.py searches widely.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway as hw
from headway import reference

INF = np.inf
TENTHS = np.log([0.4, 0.3, 0.2, 0.1])
TIED = [3.0, 1.0, 2.0, 2.0, 2.0]


def stage_of(logits: Any, **options: Any) -> Any:
    (stage,) = hw.explain(logits, **options).stages
    return stage


def boundary(stage: Any) -> tuple[int, int]:
    return stage.last_kept.token, stage.first_removed.token


def test_every_sentence_has_a_test() -> None:
    document = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text()
    sentences = {int(n) for n in re.findall(r"^- \*\*E(\d+)\*\* ", document, re.MULTILINE)}
    tests = {int(m[1]) for name in globals() if (m := re.match(r"test_e(\d+)_", name))}
    assert len(sentences) >= 18
    assert sentences == set(range(1, len(sentences) + 1))
    assert tests == sentences


def test_e1_one_row() -> None:
    for logits in (TIED, [TIED], [[TIED]]):
        assert hw.explain(logits, top_k=[2] if np.ndim(logits) > 1 else 2).kept.tolist() == [0, 2]
    for logits in ([TIED, TIED], np.zeros((0, 5))):
        with pytest.raises(ValueError, match=r"^logits: expected one row \(V,\), got \d in shape"):
            hw.explain(logits)
    with pytest.raises(ValueError, match=r"^top_p: expected a number in \(0, 1\], got 2"):
        hw.explain(TIED, top_p=2)
    batch, xtc = np.stack([TENTHS] * 6), {"xtc_probability": 0.5, "position": 2}
    with_own = hw.probabilities(batch, seed=np.arange(6), **xtc)
    with_one = hw.probabilities(batch, seed=5, **xtc)
    for i in range(6):
        assert ((hw.explain(batch[i], seed=i, **xtc).masses > 0) == (with_own[i] > 0)).all()
    assert ((hw.explain(batch[0], seed=5, **xtc).masses > 0) == (with_one[0] > 0)).all()
    assert not (with_one > 0).all(-1).all()  # the coin fell so for a row
    assert (with_one > 0).all(-1).any()


def test_e2_stages_that_are_on() -> None:
    def listed(**options: Any) -> list[tuple[str, float]]:
        return [(stage.option, stage.value) for stage in hw.explain(TIED, **options).stages]

    off = {"temperature": 1, "top_p": 1, "min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
    assert listed(**off, top_n_sigma=INF, xtc_probability=0, dynamic_temperature_range=0) == []
    some = {"temperature": 0.5, "top_k": 4, "top_p": 0.95, "min_p": 0.01}
    assert listed(**some) == [("temperature", 0.5), ("top_k", 4), ("top_p", 0.95), ("min_p", 0.01)]
    assert [name for name, _ in listed(**some, dialect="vllm")] == ["temperature", "min_p", "top_k", "top_p"]
    assert [name for name, _ in listed(**some, dialect="mlx")] == ["top_p", "min_p", "top_k", "temperature"]
    assert listed(top_k=9) == [("top_k", 9)]
    assert listed(top_k=0, dialect="vllm") == listed(top_p=0.0, dialect="mlx") == []
    assert listed(temperature=0.001, dialect="vllm") == [("temperature", 0.01)]
    assert listed(temperature=-3.0, dialect="llama.cpp") == [("temperature", 0)]


def test_e3_counts() -> None:
    found = hw.explain([-INF, *TIED], allowed=[0, 1, 2, 3, 4], top_k=3, top_p=0.7)
    assert found.banned == 2
    assert [(stage.before, stage.after, stage.removed) for stage in found.stages] == [(4, 3, 1), (3, 2, 1)]


def test_e4_masses() -> None:
    best = 2**44
    temperature, top_k, top_p = hw.explain(TENTHS, temperature=0.5, top_k=3, top_p=0.9).stages
    w = reference.masses(TENTHS).tolist()
    cold = reference.masses(TENTHS, temperature=0.5).tolist()
    assert cold[0] == best
    assert (temperature.mass_before, temperature.mass_after, temperature.kept_mass) == (sum(w), sum(cold), 1.0)
    assert (top_k.mass_before, top_k.mass_after) == (sum(cold), sum(cold[:3]))
    assert (top_p.mass_before, top_p.mass_after) == (sum(cold[:3]), sum(cold[:3]))
    assert top_k.kept_mass == sum(cold[:3]) / sum(cold)


def test_e5_the_boundary() -> None:
    stage = stage_of(TENTHS, top_k=3)
    assert boundary(stage) == (2, 3)
    assert [round(one.probability, 6) for one in (stage.last_kept, stage.first_removed)] == [0.2, 0.1]
    after = hw.explain(TENTHS, top_k=3, top_p=0.5).stages[1]  # 4, 3 and 2 of 9
    assert boundary(after) == (1, 2)
    assert [round(one.probability * 9, 5) for one in (after.last_kept, after.first_removed)] == [3, 2]
    assert boundary(stage_of(TIED, top_p=0.6, dialect="hf")) == (4, 3)
    # The entropy is 1.28 nats; the surprises 0.92, 1.20, 1.61 and 2.30.
    assert boundary(stage_of(TENTHS, typical_p=0.2)) == (1, 2)
    assert boundary(stage_of(TENTHS, typical_p=0.4)) == (2, 0)
    kept_all = stage_of(TENTHS, top_k=4)
    assert kept_all.last_kept is None
    assert kept_all.first_removed is None


def test_e6_the_boundary_of_xtc() -> None:
    stage = stage_of(TENTHS, xtc_probability=1, xtc_threshold=0.15, seed=1)
    assert (boundary(stage), stage.removed) == ((2, 1), 2)


def test_e7_ties() -> None:
    def ties(**options: Any) -> tuple[int, int, str]:
        stage = stage_of(TIED, **options)
        return stage.ties_kept, stage.ties_removed, stage.rule

    assert ties(top_k=3) == (2, 1, "lowest_id")
    assert ties(top_p=0.6, dialect="hf") == (1, 2, "highest_id")
    assert ties(top_k=1) == (0, 0, "lowest_id")
    assert ties(top_k=2, ties="keep") == (2, 0, "keep")
    assert ties(top_k=2, dialect="vllm") == (2, 0, "keep")
    stage = stage_of([3.0, 3.0, 1.0], xtc_probability=1, seed=1)
    assert (stage.ties_kept, stage.ties_removed, boundary(stage)) == (1, 1, (1, 0))
    assert stage.notes()[1].endswith("1 in, 1 out, the lowest ids first to go")


def test_e8_what_stayed_for_min_tokens_to_keep() -> None:
    stage = stage_of(TENTHS, min_p=0.9, min_tokens_to_keep=3)
    assert (stage.after, stage.floor_kept) == (3, 2)
    assert stage_of(TENTHS, min_p=0.6, min_tokens_to_keep=2).floor_kept == 0


def test_e9_notes() -> None:
    assert stage_of(TIED, dynamic_temperature_range=0.5).note.startswith("dynamic: 1.")
    deviation = float(np.std(TENTHS))
    assert stage_of(TENTHS, top_n_sigma=1).note == f"the standard deviation is {deviation:.4g}"
    entropy = -sum(p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))
    least = math.sqrt(0.3) * math.exp(-entropy)
    assert stage_of(TENTHS, eta_cutoff=0.3).note == f"the least probability is {least:.4g}"
    for seed in range(8):
        coin = (int(np.random.Philox(key=[seed, 0], counter=3).random_raw(2)[1]) >> 11) / 2**53
        stage = stage_of(TENTHS, xtc_probability=0.5, xtc_threshold=0.15, seed=seed, position=4)
        side = "below" if coin < 0.5 else "not below"
        assert stage.note == f"coin {coin:.4f} is {side} 0.5; threshold 0.15"
        assert stage.removed == (2 if coin < 0.5 else 0)


def test_e10_masses_and_the_head() -> None:
    found = hw.explain(TIED, top_k=3, temperature=0.5, top=2)
    weights = reference.masses(TIED, top_k=3, temperature=0.5)
    assert (found.masses.tolist(), found.masses.dtype) == (weights.tolist(), np.dtype(np.int64))
    assert found.kept.tolist() == [0, 2, 3]
    assert [(one.token, one.probability) for one in found.head] == [(i, weights[i] / weights.sum()) for i in (0, 2)]


def test_e11_temperature_0_and_no_mass() -> None:
    found = hw.explain(TIED, temperature=0)
    assert [(stage.option, stage.value, stage.after, stage.kept_mass) for stage in found.stages] == [
        ("temperature", 0, 5, 1.0)
    ]
    assert (found.kept.tolist(), found.massless) == ([0], 4)
    assert "4 more stay, to which temperature 0 leaves no mass" in str(found)
    assert [stage.option for stage in hw.explain(TIED, temperature=0, top_k=2, dialect="mlx").stages] == [
        "greedy",
        "top_k",
    ]
    found = hw.explain([0.0, -50.0, -1.0])
    assert (found.kept.tolist(), found.massless) == ([0, 2], 1)
    assert "1 more stay, whose mass rounds to 0" in str(found)


def test_e12_entropy() -> None:
    assert hw.explain(np.zeros(8)).entropy == pytest.approx(math.log(8))
    assert hw.explain(TENTHS, top_k=2).entropy == pytest.approx(-(4 / 7 * math.log(4 / 7) + 3 / 7 * math.log(3 / 7)))
    assert hw.explain(TENTHS, temperature=0).entropy == 0


def test_e13_why_a_token_is_in() -> None:
    why = hw.explain(TENTHS, top_k=2).why(1)
    assert (why.kept, why.rank, why.stage, why.measured, why.limit, why.missed_by) == (True, 2, None, None, None, None)
    assert why.probability == pytest.approx(3 / 7)
    assert str(why) == "token 1: in, with probability 0.4286, rank 2 of 2"


def test_e14_why_a_token_was_banned() -> None:
    found = hw.explain([0.0, -INF, 1.0, 2.0], logit_bias={2: -INF, 1: -INF}, allowed=[2, 3])
    assert [found.why(token).stage for token in range(4)] == ["allowed", "logits", "logit_bias", None]
    why = found.why(0)
    assert (why.kept, why.measured, why.limit, why.rank, why.probability) == (False, None, None, None, 0.0)


def test_e15_why_a_token_was_removed() -> None:
    deviation, eta = float(np.std(TENTHS)), math.sqrt(0.3) * 0.4**0.4 * 0.3**0.3 * 0.2**0.2 * 0.1**0.1
    for options, token, measured, limit in (
        ({"top_k": 2}, 2, 3, 2),
        ({"top_k": 1, "min_tokens_to_keep": 2}, 3, 4, 2),
        ({"top_p": 0.6}, 3, 0.9, 0.6),
        ({"typical_p": 0.2}, 3, 0.9, 0.2),  # the order is 1, 2, 0, 3
        ({"min_p": 0.6}, 2, 0.5, 0.6),
        ({"epsilon_cutoff": 0.25}, 2, 0.2, 0.25),
        ({"eta_cutoff": 0.3}, 3, 0.1, eta),
        ({"xtc_probability": 1, "xtc_threshold": 0.25, "seed": 1}, 0, 0.4, 0.25),
        ({"top_n_sigma": 1}, 3, math.log(4), deviation),
    ):
        why = hw.explain(TENTHS, **options).why(token)
        assert why.stage == next(iter(options)), options
        assert (why.kept, why.rank, why.probability) == (False, None, 0.0)
        assert (why.measured, why.limit) == (pytest.approx(measured, rel=1e-6), pytest.approx(limit, rel=1e-6))
        assert why.missed_by == pytest.approx(abs(measured - limit), rel=1e-5)
    why = hw.explain([0.0] * 4, top_p=0.5).why(2)
    assert (why.measured, why.limit, why.missed_by) == (0.5, 0.5, 0.0)
    assert "exactly on the boundary, where it is out" in str(why)


def test_e16_why_a_token_has_no_mass() -> None:
    for logits, options in (([0.0, -50.0], {}), ([0.0, -1.0], {"temperature": 0})):
        why = hw.explain(logits, **options).why(1)
        assert (why.kept, why.stage, why.measured, why.probability, why.rank) == (False, "mass", None, 0.0, None)


def test_e17_words() -> None:
    words = ["a", "b", "c", "d", "e"]
    for tokens in (words, tuple(words), words.__getitem__):
        found = hw.explain(TIED, top_k=3, tokens=tokens)
        assert [one.word for one in found.head] == ["a", "c", "d"]
        assert (found.stages[0].last_kept.word, found.why(1).word) == ("d", "b")
        assert found.masses.tolist() == hw.explain(TIED, top_k=3).masses.tolist()
    assert hw.explain(TIED).head[0].word == ""


def test_e18_tables_and_pictures() -> None:
    found = hw.explain(TIED, temperature=0.5, top_k=3, tokens=["$a$", "b", "c", "d", "e" * 99])
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["temperature", "top_k"]
    assert lines[4] == "  " + found.stages[1].notes()[0]
    assert lines[-1].startswith("3 of 5 tokens can be drawn")
    page = found._repr_html_()
    for text in ("<td>top_k</td>", "<td>0.7", found.stages[1].notes()[0], lines[-1]):
        assert text in page
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    counts, masses, best = found.plot().axes
    assert [bar.get_width() for bar in counts.patches] == [5, 5, 3]
    assert [bar.get_width() for bar in masses.patches] == [1.0, *(stage.kept_mass for stage in found.stages)]
    assert [bar.get_width() for bar in best.patches] == [one.probability for one in found.head]
    assert [text.get_text() for text in counts.texts] == ["5", "5", "3"]
    assert [label.get_text() for label in best.get_yticklabels()] == [r"0 '\$a\$'", "2 'c'", "3 'd'"]
