"""From tokens to text, piece by piece: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What a decoder writes for bytes that are no UTF-8, and so for a character whose last bytes are yet to come.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raise a ValueError where tokenizers fails.

    Its own are a plain Exception, and where its Rust panics a class that is no Exception and has no public name.

    >>> with tokenizer_errors("tokenizer.json"):
    ...     raise Exception("no such token")
    Traceback (most recent call last):
    ValueError: tokenizer.json: no such token
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from None


def detokenize(tokenizer: Tokenizer, context: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens`, which continue `context`, in pieces that no later token can change.

    Together the pieces are what the tokenizer decodes `context` and `tokens` to, past the text of `context` alone.
    A token's text can depend on those before it (bytes of one character, a space that opens a word), so a piece is
    a difference: a window decoded with the new tokens, less the same window without them. The window reaches back
    to the piece before, which keeps the cost of a token constant. Bytes that never become a character appear at the
    end, as the tokenizer writes them.

    >>> from headway.lm import load
    >>> tokenizer = load().tokenizer
    >>> "".join(detokenize(tokenizer, [], tokenizer.encode("In the beginning").ids))
    'In the beginning'
    """

    def decode(ids: list[int]) -> str:
        with tokenizer_errors("tokenizer.json: cannot decode"):
            return tokenizer.decode(ids)

    # A vocabulary with byte tokens has its decoder write a run of them as characters only if all of the run is UTF-8.
    bytes_ = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(0x80, 0x100))
    stray = next((token for token in bytes_ if token is not None), None)

    def certain(ids: list[int], text: str) -> bool:
        """Say whether `text`, of `ids`, stays as it is whatever comes; a stray byte would spoil a run that is open."""
        return not text.endswith(_INCOMPLETE) and (stray is None or decode([*ids, stray]).startswith(text))

    window: list[int] = list(context)
    fresh: list[int] = []
    shown = text = decode(window)
    for token in tokens:
        fresh.append(token)
        text = decode(window + fresh)
        if len(text) > len(shown) and certain(window + fresh, text):
            yield text[len(shown) :]
            # A window of a text of its own: a decoder may strip spaces from the beginning of what it is given.
            alone = decode(fresh)
            window, shown = (fresh, alone) if alone else (window + fresh, text)
            text, fresh = shown, []
    if len(text) > len(shown):
        yield text[len(shown) :]


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Generator[str, None, bool]:
    """Yield the pieces up to the stop string that is complete first.

    What may be the beginning of a stop string is held back until it is clear that it is none, so how the text
    was cut into pieces changes nothing.

    Returns:
        Whether a stop string ended the text.

    >>> list(until_stop(["one", " two", " th", "ree"], ["two t"]))
    ['one', ' ']
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, end = min(found)
            if end:
                yield held[:end]
            return True
        keep = max((n for stop in stops for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        if keep < len(held):
            yield held[: len(held) - keep]
            held = held[len(held) - keep :]
    if held:
        yield held
    return False
