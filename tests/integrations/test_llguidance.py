"""Grammars of llguidance: what is written is what they allow, and a mask is a row's own."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway as hw
import headway.lm
from headway.cli import main

pytest.importorskip("llguidance", reason="llguidance is not installed")
import jsonschema

from headway.integrations.llguidance import Grammar, json_schema, lark, regex


@pytest.fixture(scope="module")
def model() -> headway.lm.Model:
    return headway.lm.load()


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


WORD = {"type": "string", "maxLength": 10}
SCHEMAS: dict[str, dict[str, Any]] = {
    "object": closed(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "enum": {"enum": ["yes", "no", None, 3]},
    "const": {"const": {"a": [1, 2]}},
    "array": {"type": "array", "items": {"type": "number", "minimum": -1, "maximum": 1}, "minItems": 2, "maxItems": 4},
    "nested": closed(
        king=closed(name=WORD, sons={"type": "array", "items": WORD, "maxItems": 2}), good={"type": "boolean"}
    ),
    "anyOf": {"anyOf": [closed(a={"const": 1}), {"type": "null"}, {"type": "string", "maxLength": 4}]},
    "pattern": closed(day={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}$"}),
    "unicode": {"enum": ["né", "日本", "\U0001f600"]},
    "refs": {"$defs": {"w": WORD}, **closed(a={"$ref": "#/$defs/w"}, b={"$ref": "#/$defs/w"})},
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_kept(model: headway.lm.Model, name: str, seed: int) -> None:
    schema = SCHEMAS[name]
    for given in (schema, json.dumps(schema)):
        stream = model.stream("And the king said ", allowed=json_schema(given, model), seed=seed, max_tokens=200)
        text = "".join(stream)
        assert stream.finish_reason == "eos"
        jsonschema.validate(json.loads(text), schema)
        assert "\n" not in text


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_token_is_one_of_its_mask(model: headway.lm.Model, name: str) -> None:
    grammar, masks = json_schema(SCHEMAS[name], model), []

    def watched(tokens: list[int]) -> Any:
        masks.append(grammar(tokens))
        return masks[-1]

    stream = model.stream("And the king said ", allowed=watched, seed=5, max_tokens=200)
    "".join(stream)
    assert len(masks) == len(stream.token_ids) + 1
    for mask, token in zip(masks, [*stream.token_ids, model.config.eos_token_ids[0]], strict=True):
        assert mask.view(np.uint32)[0, token // 32] >> (token % 32) & 1


def test_where_a_text_is_whole(model: headway.lm.Model) -> None:
    grammar = regex("[0-9]{2,3}", model)
    ids = model.tokenizer.encode("123").ids
    assert [grammar.accepts(ids[:n]) for n in (0, 1, 2, 3, 1)] == [False, False, True, True, False]
    with pytest.raises(ValueError, match=r"^tokens: expected what the grammar allows, got \d+ at 3"):
        grammar.accepts([*ids, ids[0]])
    assert grammar.accepts(ids)


@pytest.mark.parametrize("seed", range(3))
def test_other_grammars_are_kept(model: headway.lm.Model, seed: int) -> None:
    for grammar, pattern in (
        (regex("(ab|c){1,5}d", model), "(ab|c){1,5}d"),
        (lark('start: word (" " word)*\nword: /[a-z]{1,3}/', model), "[a-z]{1,3}( [a-z]{1,3})*"),
    ):
        stream = model.stream("And", allowed=grammar, seed=seed, max_tokens=30)
        text = "".join(stream)
        assert re.fullmatch(pattern, text) or stream.finish_reason == "max_tokens"
    assert model.generate("And", allowed=regex("x{3}", model), temperature=5.0, top_p=1) == "xxx"


def test_a_grammar_serves_any_texts_in_any_order(model: headway.lm.Model) -> None:
    """It depends on the tokens alone, not on what it was asked before."""
    grammar = json_schema(SCHEMAS["object"], model)
    stream = model.stream("And", allowed=grammar, seed=1)
    "".join(stream)
    drawn = stream.token_ids
    masks = [grammar(drawn[:n]).copy() for n in range(len(drawn) + 1)]
    for n in (3, 0, len(drawn), 5, 4, 1):
        assert np.array_equal(grammar(drawn[:n]), masks[n])
    assert masks[0].dtype == np.int32
    bits = np.unpackbits(masks[-1].view(np.uint8), bitorder="little")[: model.config.vocab_size]
    assert np.flatnonzero(bits).tolist() == list(model.config.eos_token_ids)
    with pytest.raises(ValueError, match=r"^tokens: expected what the grammar allows, got \d+ at 0"):
        grammar([drawn[0], *drawn] if drawn[0] == drawn[1] else drawn[1:])
    assert np.array_equal(grammar(drawn[:2]), masks[2])
    # A text goes on with its output.
    rest = model.generate("And", allowed=grammar, output_tokens=drawn[:4], seed=1)
    assert "".join(model.stream("And", allowed=grammar, seed=1)).endswith(rest)


def test_a_mask_is_a_row_of_its_own(model: headway.lm.Model) -> None:
    """A lone row, a row of a batch, in step and in sample: one draw."""
    V = model.config.vocab_size
    grammar, logits = json_schema(SCHEMAS["nested"], model), np.random.default_rng(0).normal(size=(3, V))
    words = grammar([])
    assert words.shape == (1, -(-V // 32))
    token = hw.sample(logits[1], allowed=words, seed=5)
    assert token == hw.sample(logits[1], allowed=words[0], seed=5)
    both = hw.sample(logits, allowed=words.repeat(3, 0), seed=[9, 5, 9])
    assert both[1] == token
    sampler = hw.Sampler(V)
    sampler.admit(seed=5)
    assert sampler.step(logits[1:2], allowed=words) == [token]


@pytest.mark.parametrize(
    ("schema", "kind", "says"),
    [
        ("{", ValueError, "expected JSON, got text that is none"),
        ("[" * 100_000, ValueError, "expected JSON, got text that is none"),
        ("[1]", TypeError, "expected a JSON schema, an object, got list"),
        (3, TypeError, "expected a JSON schema, an object, got 3"),
        (True, TypeError, "expected a JSON schema, an object, got True"),
        ({"type": "nope"}, ValueError, "expected what llguidance takes"),
        ({"not": {}}, ValueError, "expected what llguidance takes"),
        ({"$ref": "http://example.org/x"}, ValueError, "expected what llguidance takes"),
        ({"const": {1, 2}}, ValueError, "expected what JSON can say"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_a_bad_schema(model: headway.lm.Model, schema: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        json_schema(schema, model)
    message = str(caught.value)
    assert message.startswith(f"schema: {says}")
    assert "\n" not in message
    assert len(message) < 400


def test_other_bad_grammars(model: headway.lm.Model) -> None:
    with pytest.raises(ValueError, match=r"^pattern: expected what llguidance takes"):
        regex("(", model)
    with pytest.raises(ValueError, match=r"^grammar: expected what llguidance takes"):
        lark("sta", model)
    with pytest.raises(TypeError, match=r"^pattern: expected text, got 3"):
        regex(3, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^grammar: expected text, got None"):
        lark(None, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^model: expected one of headway.lm, got 3"):
        Grammar("x", 3)  # type: ignore[arg-type]


# The command ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: headway.lm.Model) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMAS["nested"]))
    status, out, err = run(capsys, "generate", "And the king", "--json-schema", file, "--seed", 4)
    assert status == 0
    jsonschema.validate(json.loads(out), SCHEMAS["nested"])
    assert out == model.generate("And the king", allowed=json_schema(SCHEMAS["nested"], model), seed=4) + "\n"
    assert "ended by eos" in err
    status, out, err = run(capsys, "generate", "And the king", "--json-schema", file, "--seed", 4, "--max-tokens", 3)
    assert status == 1
    assert "headway: the JSON is cut off before its end; give it more room with --max-tokens" in err


def test_the_command_says_what_is_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: headway.lm.Model
) -> None:
    """A text is whole where the grammar may end, though its end-of-text token had no room; before --stop it is not."""
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMAS["const"]))
    stream = model.stream("x", allowed=json_schema(SCHEMAS["const"], model), seed=1)
    text, length = "".join(stream), len(stream.token_ids)
    command = ("generate", "x", "--json-schema", file, "--seed", 1)
    status, out, err = run(capsys, *command, "--max-tokens", length)
    assert (status, out) == (0, text + "\n")
    assert "ended by max_tokens" in err
    assert "cut off" not in err
    status, out, err = run(capsys, *command, "--max-tokens", length - 1)
    assert (status, out) == (1, text[:-1] + "\n")
    assert "cut off before its end; give it more room with --max-tokens" in err
    status, out, err = run(capsys, *command, "--stop", "}")
    assert (status, out) == (1, text[:-1] + "\n")
    assert "cut off before its end; leave --stop out" in err


def test_a_schema_from_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing there for a prompt."""
    for prompt in ((), ("x",)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(SCHEMAS["const"]).encode())))
        assert run(capsys, "generate", *prompt, "--json-schema", "-", "--seed", 1)[:2] == (0, '{"a":[1,2]}\n')
    status, out, err = run(capsys, "generate", "-", "--json-schema", "-")
    assert (status, out) == (2, "")
    assert err == "headway: error: --json-schema: expected a file beside a prompt from standard input, got - for both\n"
    status, out, err = run(capsys, "generate", "x", "--json-schema", "/dev/zero")
    assert (status, out) == (2, "")
    assert err.startswith("headway: error: --json-schema: /dev/zero: expected a file, got a device")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "expected JSON, got text that is none"),
        (b"\xff{}", "codec can't decode byte 0xff"),
        (b"[]", "expected a JSON schema, an object, got list"),
        (b'{"type": "nope"}', "expected what llguidance takes"),
        (None, "No such file or directory"),
    ],
)
def test_the_command_refuses_a_bad_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, data: bytes | None, says: str
) -> None:
    file = tmp_path / "schema.json"
    if data is not None:
        file.write_bytes(data)
    status, out, err = run(capsys, "generate", "a", "--json-schema", file)
    assert (status, out) == (2, "")
    assert err.startswith(f"headway: error: {'' if data is None else '--json-schema: '}{file}: ")
    assert says in err
    assert err.count("\n") == 1
