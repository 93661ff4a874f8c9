"""From tokens to text: characters, bytes, stop strings."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import (
    byte_tokenizer,
)

from headway.lm.text import detokenize, until_stop


def test_half_a_character_is_never_shown() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve €5 — 日本 🙂"
    pieces = list(detokenize(tokenizer, [], tokenizer.encode(text).ids))
    assert pieces == list(text), "each character as soon as its last byte is there"


@settings(deadline=None)
@given(context=st.text(max_size=5), data=st.binary(max_size=30))
def test_pieces_are_the_decoded_whole_for_any_bytes(context: str, data: bytes) -> None:
    tokenizer = byte_tokenizer()
    ids = [tokenizer.token_to_id(byte_character(byte)) for byte in data]
    pieces = list(detokenize(tokenizer, tokenizer.encode(context).ids, ids))
    assert "".join(pieces) == data.decode(errors="replace")
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def byte_character(byte: int) -> str:
    """Return what stands for a byte in a byte-level vocabulary: a printable one for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def test_a_space_that_opens_a_word_survives() -> None:
    """SentencePiece-like decoders drop the space of the first token that they are given."""
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordLevel({"▁In": 0, "▁the": 1, "▁beginning": 2, "</s>": 3}, unk_token="▁In"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    assert list(detokenize(tokenizer, [0], [1, 3, 2])) == [" the", " beginning"]


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x99, 0xFF)]
WORDS = ["▁", "▁the", "a", "b", "é", "▁▁", "\ufffd", "x\ufffd", " ", "'", "##ing", "s</w>", "t</w>", "", "|", "▁é", "â"]


def word_tokenizer(*steps: Any, bytes_: list[str] = BYTE_TOKENS) -> Any:
    """Words and bytes, each a token, and a decoder of these steps; 3 ids at the end that no token has."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {word: i for i, word in enumerate([*WORDS, *bytes_])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.decoder = decoders.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>", " pad"])
    return tokenizer


def decoding_tokenizers() -> dict[str, Any]:
    from tokenizers import decoders as d

    space, fallback, fuse = d.Replace("▁", " "), d.ByteFallback(), d.Fuse()
    return {
        "Llama 2": word_tokenizer(space, fallback, fuse, d.Strip(" ", 1, 0)),
        "Gemma": word_tokenizer(space, fallback, fuse),
        "strips three": word_tokenizer(space, fallback, fuse, d.Strip(" ", 3, 0)),
        "bytes alone": word_tokenizer(fallback),
        "some bytes": word_tokenizer(fallback, fuse, bytes_=BYTE_TOKENS[2:6]),
        "names of bytes": word_tokenizer(fuse),
        "Metaspace": word_tokenizer(d.Metaspace()),
        "Metaspace, never": word_tokenizer(d.Metaspace(prepend_scheme="never")),
        "WordPiece": word_tokenizer(d.WordPiece()),
        "BPE": word_tokenizer(d.BPEDecoder()),
        "CTC": word_tokenizer(d.CTC("a", "|")),
        "ByteLevel": byte_tokenizer(),
    }


@pytest.mark.parametrize("name", decoding_tokenizers())
def test_pieces_are_the_decoded_whole_for_any_tokens(name: str) -> None:
    tokenizer = decoding_tokenizers()[name]
    rng = np.random.default_rng(0)
    size = tokenizer.get_vocab_size() + 3  # ids that no token has, too
    for _ in range(1500):
        # From few tokens, so that runs and repetitions are common.
        ids = rng.choice(rng.integers(0, size, rng.integers(1, 9)), rng.integers(0, 13)).tolist()
        start = int(rng.integers(0, len(ids) + 1)) if rng.random() < 0.5 else 0
        whole = tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]
        pieces = list(detokenize(tokenizer, ids[:start], ids[start:]))
        assert "".join(pieces) == whole, ids
        assert all(pieces)


def test_a_run_of_bytes_waits_for_its_end_and_nothing_else_does() -> None:
    tokenizer = decoding_tokenizers()["Llama 2"]
    ids = [tokenizer.token_to_id(token) for token in ("a", "<0xE2>", "<0x82>", "<0xAC>", "▁the", "b", "<0x41>")]
    assert list(detokenize(tokenizer, [], ids)) == ["a", "€ the", "b", "A"]
    stray = [*ids[:4], tokenizer.token_to_id("<0xFF>"), *ids[4:]]
    assert list(detokenize(tokenizer, [], stray)) == ["a", "\ufffd" * 4 + " the", "b", "A"]


@given(
    text=st.text("ab", max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_a_text_stops_before_the_stop_string_that_is_complete_first(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    expected = text
    for end in range(len(text) + 1):
        complete = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            expected = text[: end - max(complete)]
            break
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown = list(until_stop(pieces, stops))
    assert "".join(shown) == expected
    assert all(shown)


def test_text_is_held_back_no_longer_than_needed() -> None:
    pieces = iter(["a", "b", "x"])
    stream = until_stop(pieces, ["abc"])
    assert next(stream) == "abx"
    assert next(until_stop(iter(["xa", "?"]), ["abc"])) == "x"
