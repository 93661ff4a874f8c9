"""Grammars of llguidance for texts of `headway.lm`: JSON schemas, regular expressions, Lark grammars.

Each function makes a `Grammar`, which `Model.generate` takes as `allowed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..lm import Model

try:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
except ImportError as error:
    raise ImportError(
        f"headway.integrations.llguidance needs llguidance ({error}): pip install 'headway[grammar]'"
    ) from error

__all__ = ["Grammar", "json_schema", "lark", "regex"]


class Grammar:
    """Which tokens may come next, as `Model.generate(allowed=...)` asks for it; `json_schema` and others make one.

    A text ends where the grammar ends: there only the model's end-of-text tokens are left.

    Args:
        grammar: of llguidance, as `LLMatcher` takes it.
        model: whose tokens they are.
        name: of the argument that errors are about.

    Raises:
        ValueError: a grammar that llguidance refuses, or a model without an end-of-text token.

    >>> from headway.integrations.llguidance import regex
    >>> from headway.lm import load
    >>> model = load()
    >>> may = regex("yes|no", model)
    >>> model.tokenizer.decode([int(model.tokenizer.encode("yes").ids[0])])[0] in "yn"
    True
    >>> may([]).shape == (1, -(-model.config.vocab_size // 32))
    True
    """

    def __init__(self, grammar: str, model: Model, name: str = "grammar") -> None:
        if not isinstance(model, Model):
            raise TypeError(f"model: expected one of headway.lm, got {_check.shown(model)}")
        if not model.config.eos_token_ids:
            raise ValueError(
                "model: expected one with an end-of-text token, which ends what a grammar allows, got none"
            )
        ends = list(model.config.eos_token_ids)
        tokenizer = LLTokenizer(model.tokenizer.to_str(), n_vocab=model.config.vocab_size, eos_token=ends)
        refused = LLMatcher.validate_grammar(grammar, tokenizer)
        if refused and not refused.startswith("WARNING"):
            raise ValueError(f"{name}: expected what llguidance takes, got an error of its own: {_one_line(refused)}")
        self._start = LLMatcher(tokenizer, grammar, log_level=0)
        self._matcher = self._start.deep_copy()
        self._seen: list[int] = []
        self._vocabulary = model.config.vocab_size

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        """Return the mask of the token behind these.

        Args:
            tokens: ids, all that the text has so far.

        Returns:
            int32 (1, ceil(V / 32)), token 0 in the lowest bit of the first word.

        Raises:
            ValueError: tokens that the grammar does not allow.
        """
        self._go_to(tokens)
        mask: NDArray[np.int32] = allocate_token_bitmask(1, self._vocabulary)
        fill_next_token_bitmask(self._matcher, mask)
        return mask

    def accepts(self, tokens: Sequence[int]) -> bool:
        """Say whether these tokens are a whole text, whether or not it could go on.

        Args:
            tokens: ids, all of the text, without an end-of-text token.

        Returns:
            Whether the text may end here.

        Raises:
            ValueError: tokens that the grammar does not allow.

        >>> from headway.integrations.llguidance import regex
        >>> from headway.lm import load
        >>> model = load()
        >>> may = regex("12?", model)
        >>> [may.accepts(model.tokenizer.encode(text).ids) for text in ("", "1", "12")]
        [False, True, True]
        """
        self._go_to(tokens)
        return self._matcher.is_accepting()

    def _go_to(self, tokens: Sequence[int]) -> None:
        """Bring the matcher behind these tokens."""
        tokens = list(tokens)
        if tokens[: len(self._seen)] != self._seen:  # another text than the one before
            self._matcher, self._seen = self._start.deep_copy(), []
        for i in range(len(self._seen), len(tokens)):
            if not self._matcher.consume_token(tokens[i]):
                self._matcher, self._seen = self._start.deep_copy(), []
                raise ValueError(f"tokens: expected what the grammar allows, got {tokens[i]} at {i}")
        self._seen = tokens


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{name}: expected text, got {_check.shown(given)}")
    return given


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def json_schema(schema: str | Mapping[str, Any], model: Model) -> Grammar:
    """Return a grammar of the JSON texts that a schema allows, on one line.

    Args:
        schema: a JSON schema (json-schema.org): its text, or a dict.
        model: of `headway.lm`.

    Returns:
        A `Grammar`.

    Raises:
        TypeError: another kind of schema.
        ValueError: text that is no JSON, or a schema that llguidance refuses.

    >>> import json
    >>> from headway.integrations.llguidance import json_schema
    >>> from headway.lm import load
    >>> model = load()
    >>> schema = {"type": "object", "properties": {"day": {"enum": ["sabbath", "feast"]}}, "required": ["day"]}
    >>> schema |= {"additionalProperties": False}
    >>> text = model.generate("In the beginning", allowed=json_schema(schema, model), seed=1)
    >>> json.loads(text)["day"] in ("sabbath", "feast")
    True
    """
    if isinstance(schema, str):
        try:
            schema = _check.json_loads(schema.encode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"schema: expected JSON, got text that is none: {_one_line(str(error))}") from None
    if not isinstance(schema, Mapping):
        raise TypeError(f"schema: expected a JSON schema, an object, got {_check.shown(schema)}")
    try:
        text = json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"schema: expected what JSON can say, got something else: {error}") from None
    return Grammar(LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False}), model, "schema")


def regex(pattern: str, model: Model) -> Grammar:
    """Return a grammar of the texts that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's regex crate, as llguidance takes it.
        model: of `headway.lm`.

    Returns:
        A `Grammar`.

    Raises:
        TypeError: a pattern that is no text.
        ValueError: a pattern that llguidance refuses.

    >>> from headway.integrations.llguidance import regex
    >>> from headway.lm import load
    >>> model = load()
    >>> model.generate("And the number was ", allowed=regex("[0-9]{3}", model), seed=1).isdigit()
    True
    """
    return Grammar(LLMatcher.grammar_from_regex(_text(pattern, "pattern")), model, "pattern")


def lark(grammar: str, model: Model) -> Grammar:
    """Return a grammar in llguidance's variant of Lark's notation.

    Args:
        grammar: its text, with a rule `start`.
        model: of `headway.lm`.

    Returns:
        A `Grammar`.

    Raises:
        TypeError: a grammar that is no text.
        ValueError: a grammar that llguidance refuses.

    >>> from headway.integrations.llguidance import lark
    >>> from headway.lm import load
    >>> model = load()
    >>> model.generate("Say", allowed=lark('start: "a" | "b"', model), seed=1) in "ab"
    True
    """
    return Grammar(LLMatcher.grammar_from_lark(_text(grammar, "grammar")), model)
