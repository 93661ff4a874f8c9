"""From tokens to text, piece by piece: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

from tokenizers import Tokenizer

# What a decoder writes for bytes that are no UTF-8, and so for a character whose last bytes are yet to come.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def detokenize(tokenizer: Tokenizer, context: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of `tokens`, which continue `context`, in pieces of whole characters.

    A token's text can depend on the tokens before it (bytes of one character, a space that opens a word), so
    each piece is a difference: a window decoded with the new tokens, less the same window without them. The
    window reaches back to the piece before, which keeps the cost of a token constant. Bytes that never become
    a character appear at the end, as the tokenizer writes them.

    >>> from headway.lm import load
    >>> tokenizer = load().tokenizer
    >>> "".join(detokenize(tokenizer, [], tokenizer.encode("In the beginning").ids))
    'In the beginning'
    """
    window, fresh = list(context), []
    shown = tokenizer.decode(window)
    text = shown
    for token in tokens:
        fresh.append(token)
        text = tokenizer.decode(window + fresh)
        # Without a new character the window stays, so that no piece starts from a token that shows nothing.
        if len(text) > len(shown) and not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            window, fresh = fresh, []
            shown = text = tokenizer.decode(window)
    if len(text) > len(shown):
        yield text[len(shown) :]


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Generator[str, None, bool]:
    """Yield the pieces up to the stop string that is complete first, and return whether there was one.

    What may be the beginning of a stop string is held back until it is clear that it is none, so how the text
    was cut into pieces changes nothing.

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
