"""A stage is one record: whatever else lists stages or options agrees with the records."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import headway as hw
from headway import _native, cli
from headway._sampling import settings, stages
from headway._sampling.dialects import DIALECTS, NUCLEUS, rules
from headway._sampling.stages import STAGES
from headway.reference._sampling import stages as of_reference

ROOT = Path(__file__).parents[2]
NAMES = [option.name for option in settings.OPTIONS]


def test_the_kernel_and_the_reference_have_the_stages_of_the_records() -> None:
    assert set(_native.SAMPLING_STAGES) == set(STAGES) == set(of_reference.STAGES)


def test_a_stage_is_named_after_its_first_option_and_the_kernel_takes_that_first() -> None:
    for stage in STAGES.values():
        assert stage.name == "greedy" or stage.name == stage.options[0].name
        assert stage.numbers[0] == stage.options[0].name
        assert set(stage.numbers) <= {option.name for option in stage.options}


def test_the_options_that_functions_show_are_those_of_the_records() -> None:
    assert [f.name for f in fields(hw.SamplingParams)] == NAMES
    assert {f.name: f.default for f in fields(hw.SamplingParams)} == settings.DEFAULTS
    for function in (hw.sample, hw.probabilities, hw.filter_logits, hw.explain, hw.logprobs, hw.verify_draft):
        assert [name for name in inspect.signature(function).parameters if name in NAMES] == NAMES, function.__name__


def test_the_files_for_type_checkers_are_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import make_params

    sys.modules.pop("make_params")
    for path, text in make_params.texts().items():
        assert path.read_text() == text, "run make stub"


def test_the_command_has_the_flags_of_the_records() -> None:
    parser = argparse.ArgumentParser()
    cli._add_sampling(parser, temperature=1.0, top_p=1.0)
    flags = {action.dest: action for action in parser._actions}
    for option in settings.OPTIONS:
        assert (option.name in flags) == bool(option.flag or option.name == "seed"), option.name
        if option.flag:
            assert str(flags[option.name].help).startswith(option.flag), option.name


def test_every_dialect_orders_stages_that_there_are() -> None:
    for name, dialect in {**DIALECTS, **NUCLEUS}.items():
        used = [step.option for step in dialect.steps]
        assert len(set(used)) == len(used), name
        assert set(used) <= set(STAGES), name
    own = [step.option for step in NUCLEUS["after_top_k"].steps]
    assert own == [name for name in STAGES if name != "greedy"]


def test_docs_name_every_option() -> None:
    text = (ROOT / "docs/semantics.md").read_text()
    assert [name for name in stages.OFF if f"`{name}`" not in text and name not in text] == []


def test_docs_have_the_orders_and_boundaries_of_the_dialects() -> None:
    text = (ROOT / "docs/semantics.md").read_text()
    rows = re.findall(r"^\| (.*?) \| (temperature, .*?|top_.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    dialects = {
        "none: headway's own": NUCLEUS["after_top_k"],
        **DIALECTS,
        'flashinfer, nucleus="joint"': rules("flashinfer", "joint"),
    }
    ties = {"lowest_id": "lowest ids", "highest_id": "highest ids", "keep": "all"}
    assert {row[0] for row in rows} == set(dialects)
    for name, order, at_top_k, at_top_p, exactly in rows:
        steps = {step.option: step for step in dialects[name].steps if step.option != "greedy"}
        short = [re.sub("_cutoff|_probability", "", option) for option in steps]
        assert order == ", ".join(short), name
        own = ", or as `ties` says" if name.startswith("none") else ""
        assert (at_top_k, at_top_p) == (ties[steps["top_k"].ties] + own, ties[steps["top_p"].ties]), name
        typical = steps.get("typical_p", steps["top_p"])
        other = "; for typical_p it stays" if typical.equal > steps["top_p"].equal else ""
        assert exactly == ("stays" if steps["top_p"].equal else "goes") + other, name
