"""Masks as xgrammar allocates and fills them: torch tensors, int32 (batch, ceil(V / 32))."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import headway as hw
import headway.lm

pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")
xgr = pytest.importorskip("xgrammar", reason="xgrammar is not installed")
jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["yes", "no"]},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
    "nested": {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]},
            "c": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 6}]},
        },
        "required": ["a", "c"],
        "additionalProperties": False,
    },
}
WIDTHS = (2048, 2050, 2100)  # of the logits: the tokenizer's, one that is no multiple of 32, and another
MODEL = headway.lm.load()
END = MODEL.config.eos_token_ids[0]


def matcher(name: str, width: int) -> Any:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=MODEL.tokenizer)
    info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=width, stop_token_ids=[END])
    compiler = xgr.GrammarCompiler(info, max_threads=1)
    return xgr.GrammarMatcher(compiler.compile_json_schema(json.dumps(SCHEMAS[name]), any_whitespace=False))


def bits(mask: Any, width: int) -> Any:
    return np.unpackbits(mask.numpy().view(np.uint8), axis=-1, bitorder="little")[..., :width].astype(bool)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_text_keeps_its_schema(name: str, width: int, seed: int) -> None:
    """Alone, with a mask (1, W) and (W,), and in a batch of two: the same tokens, each one of its mask."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(200, width)) * 3).astype(np.float32)
    logits[:, 2048:] = 50  # padding, which the best logits do not help
    alone, flat, batch = (hw.Sampler(width) for _ in range(3))
    for sampler in (alone, flat):
        sampler.admit(seed=seed)
    batch.admit(seed=99)
    batch.admit(seed=seed)
    own, mask, both = matcher(name, width), xgr.allocate_token_bitmask(1, width), xgr.allocate_token_bitmask(2, width)
    tokens: list[int] = []
    for row in logits:
        own.fill_next_token_bitmask(mask)
        own.fill_next_token_bitmask(both, 1)
        assert (both[1] == mask[0]).all()
        token = int(alone.step(row[None], allowed=mask)[0])
        assert flat.step(row[None], allowed=mask[0]).tolist() == [token]
        assert batch.step(np.stack([row, row]), allowed=both)[1] == token
        assert bits(mask, width)[0, token]
        assert own.accept_token(token)
        if token == END:
            break
        tokens.append(token)
    assert own.is_terminated()
    jsonschema.validate(json.loads(MODEL.tokenizer.decode(tokens)), SCHEMAS[name])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_function_takes_a_mask_as_it_is_allocated(width: int) -> None:
    mask = xgr.allocate_token_bitmask(2, width)
    matcher("enum", width).fill_next_token_bitmask(mask, 0)
    logits = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    may = bits(mask, width)
    assert may[1].all()
    want = np.where(may, logits, np.float32(-np.inf))
    assert np.array_equal(hw.filter_logits(logits, allowed=mask), want)
    for own in (mask[:1], mask[0]):
        assert np.array_equal(hw.filter_logits(logits[0], allowed=own), want[0])
        assert np.array_equal(hw.probabilities(logits[0], allowed=own), hw.probabilities(logits[0], allowed=may[0]))
        assert hw.sample(logits[0], allowed=own, seed=2) == hw.sample(logits[0], allowed=may[0], seed=2)
        assert hw.explain(logits[0], allowed=own).head == hw.explain(logits[0], allowed=may[0]).head
        token = int(np.flatnonzero(may[0])[0])
        ranked = [hw.logprobs(logits[0], token, processed=True, allowed=one).logprobs for one in (own, may[0])]
        assert ranked[0] == ranked[1]
    strided = mask[..., None].repeat(1, 1, 2)[..., 0]
    assert not strided.is_contiguous()
    assert np.array_equal(hw.filter_logits(logits, allowed=strided), want)
    with pytest.raises(
        ValueError, match=r"^allowed: expected at least one token that is not banned in row 1, got none"
    ):
        hw.sample(logits, allowed=mask * mask.new_tensor([[1], [0]]))
    with pytest.raises(
        ValueError, match=rf"^allowed: expected a packed mask .* for {width} tokens, got .*; make it for"
    ):
        hw.sample(logits, allowed=xgr.allocate_token_bitmask(2, width - 64))


def test_a_text_of_headway_lm() -> None:
    own, seen = matcher("nested", 2048), 0
    mask = xgr.allocate_token_bitmask(1, 2048)

    def allowed(tokens: list[int]) -> Any:
        nonlocal seen
        assert all(own.accept_token(token) for token in tokens[seen:])
        seen = len(tokens)
        own.fill_next_token_bitmask(mask)
        return mask

    text = MODEL.generate("And the king said ", allowed=allowed, seed=1)
    jsonschema.validate(json.loads(text), SCHEMAS["nested"])
