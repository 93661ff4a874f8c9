"""Penalties: lower logits for tokens that occurred before, and for those that would repeat what was said.

The kernel in `src/core/sampling/penalties.h` finds the new logits of the tokens of a history, for which it counts
them once and then on; `penalize` writes the logits into a copy, `Sampler` keeps the counts and hands the logits on to
the draw.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _check
from .._check import no_such, shown
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack, shows_options
from .checks import Integers, Reals
from .histories import Histories
from .rows import Array, broadcast, in_row, lengths_within, with_n

__all__ = ["penalize"]
UnknownTokens = Literal["error", "ignore"]
_LARGEST = float(np.finfo(np.float32).max)


class Penalties(TypedDict, total=False):
    """The options of `penalize`."""

    repetition: AnyArray | None
    frequency: AnyArray | None
    presence: AnyArray | None
    dry_multiplier: AnyArray | None
    dry_base: AnyArray | None
    dry_allowed_length: AnyArray | None
    dry_breakers: AnyArray
    window: AnyArray | None
    repetition_window: AnyArray | None
    frequency_window: AnyArray | None
    dry_window: AnyArray | None


# Goes on top of `_check.public`: the error of a penalty that there is not is worded in `checked`.
shows_penalties = shows_options(Penalties, dict.fromkeys(Penalties.__annotations__) | {"dry_breakers": ()})


def _within_float32(x: Any) -> Any:
    return (x >= -_LARGEST) & (x <= _LARGEST)


_WINDOW = Integers("an integer >= 1", "use None for the whole history", 1, np.int64, clip=True)
CHECKS: dict[str, Callable[[str, Any], Array | None]] = {
    "repetition": Reals("a finite number > 0", "1 switches it off", lambda x: (x > 0) & (x < math.inf)),
    "frequency": Reals("a number within float32", "0 switches it off", _within_float32),
    "presence": Reals("a number within float32", "0 switches it off", _within_float32),
    "dry_multiplier": Reals("a finite number >= 0", "0 switches it off", lambda x: (x >= 0) & (x < math.inf)),
    "dry_base": Reals("a finite number >= 1", "1.75 is usual", lambda x: (x >= 1) & (x < math.inf)),
    "dry_allowed_length": Integers("an integer >= 1", "2 is usual", 1, np.int64, clip=True),
    "window": _WINDOW,
    "repetition_window": _WINDOW,
    "frequency_window": _WINDOW,
    "dry_window": _WINDOW,
}
# What None means.
DEFAULTS: dict[str, Array] = {
    "repetition": np.array(1.0),
    "frequency": np.array(0.0),
    "presence": np.array(0.0),
    "dry_multiplier": np.array(0.0),
    "dry_base": np.array(1.75),
    "dry_allowed_length": np.array(2),
    "window": np.array(2**63 - 1),
}


@typing.overload
def penalize(
    logits: NumPyLike,
    token_ids: Any,
    *,
    lengths: AnyArray | None = None,
    prompt_lengths: AnyArray | None = None,
    unknown_tokens: UnknownTokens = "error",
    **penalties: Unpack[Penalties],
) -> NDArray[Any]: ...
@typing.overload
def penalize(
    logits: Tensor,
    token_ids: Any,
    *,
    lengths: AnyArray | None = None,
    prompt_lengths: AnyArray | None = None,
    unknown_tokens: UnknownTokens = "error",
    **penalties: Unpack[Penalties],
) -> Tensor: ...
@shows_penalties
@_check.public
def penalize(
    logits: AnyArray,
    token_ids: Any,
    *,
    lengths: AnyArray | None = None,
    prompt_lengths: AnyArray | None = None,
    unknown_tokens: UnknownTokens = "error",
    **penalties: Unpack[Penalties],
) -> Any:
    """Lower the logits of tokens that occurred before. Give the result to `sample`.

    The penalties come in the order in which they are listed. Each but dry_breakers may be an array with one value per
    row. -inf stays -inf, and a finite logit stays finite. Work and memory are linear in the history, and in the
    vocabulary only for the copy.

    Args:
        logits: (V,) or (..., V), of any kind of array.
        token_ids: the tokens of each row so far, the oldest first: a list for logits (V,); lists of any lengths, nested
            as the leading axes are, for (..., V); or an array (..., n).
        lengths: (...), how many of the n tokens of each row count, the first ones; None is all.
        prompt_lengths: (...) or one for all rows: how many of a row's first tokens are its prompt, which frequency and
            presence do not count, as in OpenAI's interface and vLLM; repetition and DRY do. None is 0.
        unknown_tokens: what to do with ids outside 0 to V - 1, such as placeholders for images, or padding, where a
            penalty looks at them: "error", or "ignore", which is as if they were not in the history. lengths and
            prompt_lengths count their places all the same. Rows that are padded on the left are thus
            `penalize(logits, np.where(attention_mask, token_ids, -1), unknown_tokens="ignore")`.
        repetition: above 0. The logit of a token that occurred is divided by it if positive, else multiplied (Keskar et
            al., 2019, arXiv:1909.05858). 1 is off.
        frequency: times the number of occurrences, it is subtracted from the logit of a token that occurred, as in
            OpenAI's interface. 0 is off; negative numbers encourage.
        presence: it is subtracted from the logit of a token that occurred. 0 is off.
        dry_multiplier: at least 0. Where the history ends with `n` tokens that it holds earlier too, the token that
            came after them there would make the repetition longer: dry_multiplier * dry_base^(n - dry_allowed_length)
            is subtracted from its logit, for the longest n that is at least dry_allowed_length ("DRY", by p-e-w, 2024:
            github.com/oobabooga/text-generation-webui/pull/5677). 0 is off.
        dry_base: at least 1; 1.75 unless given.
        dry_allowed_length: at least 1; 2 unless given.
        dry_breakers: ids of tokens that no repetition goes across, and that DRY does not penalize.
        window: at least 1, the number of tokens, counted from the end of the history, that all penalties look at; None
            is the whole history.
        repetition_window: the same for repetition alone; None is `window`.
        frequency_window: the same for frequency and presence; None is `window`.
        dry_window: the same for DRY; None is `window`.

    Returns:
        (..., V), the kind of array that logits are: float32, or float64 for float64 logits.

    Raises:
        TypeError, ValueError: they name the argument, the row, what was expected and what came.

    >>> import headway as hw
    >>> hw.penalize([2.0, 1.0, -1.0, 0.0], [0, 2, 0], repetition=2.0)
    array([ 1.,  1., -2.,  0.])
    >>> hw.penalize([[2.0, 1.0], [2.0, 1.0]], [[0, 0, 1], [1]], frequency=0.5, presence=[0.0, 1.0])
    array([[ 1. ,  0.5],
           [ 2. , -0.5]])
    >>> hw.penalize([0.0] * 5, [1, 2, 3, 4, 1, 2, 3], dry_multiplier=0.8)  # 1 2 3 was followed by 4
    array([ 0. ,  0. ,  0. ,  0. , -1.4])
    >>> hw.penalize([0.0] * 3, [-1, -1, 2, 0], prompt_lengths=3, unknown_tokens="ignore", presence=1.0)
    array([-1.,  0.,  0.])
    """
    operand = _arrays.unwrap(logits, "logits")
    data = operand.data
    if data.ndim == 0:
        raise ValueError("logits: expected an array (V,) or (..., V), got a single number")
    lead, vocabulary = data.shape[:-1], data.shape[-1]
    settings = checked(**penalties)
    _check.choice(unknown_tokens, "unknown_tokens", ("error", "ignore"))
    tokens, length = _histories(token_ids, lengths, lead)
    prompt = np.zeros_like(length)
    if prompt_lengths is not None:
        prompt = lengths_within("prompt_lengths", prompt_lengths, lead, length, "token_ids")
    breakers = breaker_ids(penalties.get("dry_breakers", ()), vocabulary)
    rows = {
        name: np.ascontiguousarray(value if not value.ndim else broadcast(name, value, lead)).reshape(-1)
        for name, value in settings.items()
    }
    rows = with_windows(rows)
    known = (tokens >= 0) & (tokens < vocabulary)
    place = np.arange(tokens.shape[-1])
    unknown = ~known & (place < length[:, None])
    if unknown.any():
        of_all, of_output = (on[:, None] for on in penalizes(rows))
        wrong = unknown & (of_all | (of_output & (place >= prompt[:, None])))
        if unknown_tokens == "error" and wrong.any():
            row, at = map(int, np.argwhere(wrong)[0])
            raise ValueError(
                f"token_ids: expected ids from 0 to {vocabulary - 1}, got {tokens[row, at]} at {at}"
                f"{in_row(row, lead)}; say how many count with lengths where rows are padded, or leave such ids out of "
                f'the history with unknown_tokens="ignore"'
            )
        known &= place < length[:, None]
        tokens = np.take_along_axis(tokens, np.argsort(~known, axis=-1, kind="stable"), -1)
        length, prompt = known.sum(-1), (known & (place < prompt[:, None])).sum(-1)
    dtype = _arrays.compute_dtype(operand.dtype)
    out = np.array(operand.astype(dtype), order="C", copy=True)
    if out.size:
        breaks = np.isin(tokens, breakers) if breakers.size else np.zeros(tokens.shape, np.bool_)
        histories = Histories(tokens, breaks, length, prompt)
        flat = out.reshape(-1, vocabulary)
        histories.penalize(flat, np.arange(len(flat)), rows)
        changed = np.arange(tokens.shape[-1]) < histories.distinct[:, None]
        new = _arrays.Operand(histories.logit[changed.reshape(-1)], "float64", _arrays.as_bits).astype(dtype)
        flat[changed.nonzero()[0], histories.id[changed.reshape(-1)]] = new
    return operand.wrap(out, dtype)


# They are listed for editors on jedi, which know no TypedDict.
def checked(
    *,
    repetition: AnyArray | None = None,
    frequency: AnyArray | None = None,
    presence: AnyArray | None = None,
    dry_multiplier: AnyArray | None = None,
    dry_base: AnyArray | None = None,
    dry_allowed_length: AnyArray | None = None,
    dry_breakers: AnyArray = (),
    window: AnyArray | None = None,
    repetition_window: AnyArray | None = None,
    frequency_window: AnyArray | None = None,
    dry_window: AnyArray | None = None,
    **unknown: Any,
) -> dict[str, Array]:
    """Return every penalty but the breakers as a checked array, of one value or of one per row."""
    given = {name: value for name, value in locals().items() if name in CHECKS and value is not None}
    for name, value in unknown.items():
        raise TypeError(no_such(name, value, "penalty", (*CHECKS, "dry_breakers")))
    return DEFAULTS | {name: array for name, value in given.items() if (array := CHECKS[name](name, value)) is not None}


def with_windows(settings: Mapping[str, Array]) -> dict[str, Array]:
    """Return the settings with a window for each kind of penalty instead of one for all."""
    own = {name: value for name, value in settings.items() if name != "window"}
    return dict.fromkeys(("repetition_window", "frequency_window", "dry_window"), settings["window"]) | own


def penalizes(settings: Mapping[str, Array]) -> tuple[Array, Array]:
    """Whether penalties are on that look at a prompt too, and whether ones are that do not: of each row, or of all."""
    return (
        (settings["repetition"] != 1) | (settings["dry_multiplier"] > 0),
        (settings["frequency"] != 0) | (settings["presence"] != 0),
    )


def breaker_ids(breakers: AnyArray, vocabulary: int) -> Array:
    """Return dry_breakers as an array of ids."""
    if isinstance(breakers, (set, frozenset)):
        breakers = list(breakers)
    return _check.integers(breakers, "dry_breakers", 0, vocabulary - 1).reshape(-1)


def _histories(token_ids: Any, lengths: AnyArray | None, lead: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the histories as a padded array (rows, capacity), and how many of each row count: both copies."""
    if isinstance(token_ids, (list, tuple)):
        rows = [_ids(row, where) for row, where in _rows(token_ids, lead, ())]
        held = np.array([row.size for row in rows], np.int64)
        tokens = np.zeros((len(rows), held.max(initial=0)), np.int64)
        for row, to in zip(rows, tokens, strict=True):
            to[: row.size] = row
    else:
        array = _ordered(token_ids, "token_ids")
        if array.ndim != len(lead) + 1 or array.shape[:-1] != lead:
            raise ValueError(f"token_ids: expected an array of shape {with_n(lead)}, got shape {array.shape}")
        tokens = _ids(array.reshape(-1), ()).reshape(math.prod(lead), array.shape[-1]).copy()
        held = np.full(len(tokens), tokens.shape[-1], np.int64)
    if not len(tokens):  # of no rows, even the widest
        tokens = tokens[:, :0]
    return tokens, held if lengths is None else lengths_within("lengths", lengths, lead, held, "token_ids")


def _rows(token_ids: Any, lead: tuple[int, ...], where: tuple[int, ...]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    if len(where) == len(lead):
        yield token_ids, where
        return
    if not isinstance(token_ids, Sequence) or len(token_ids) != lead[len(where)]:
        found = len(token_ids) if isinstance(token_ids, Sequence) else type(token_ids).__name__
        raise ValueError(
            f"token_ids{''.join(f'[{i}]' for i in where)}: expected {lead[len(where)]} lists, one for each row of the "
            f"logits, got {found}"
        )
    for i, part in enumerate(token_ids):
        yield from _rows(part, lead, (*where, i))


def _ordered(tokens: Any, name: str) -> Array:
    if isinstance(tokens, (set, frozenset)):
        raise TypeError(f"{name}: expected a list of ids, the oldest first, got {shown(tokens)}, which has no order")
    return _check.whole(tokens, name, "a list of token ids")


def _ids(row: Any, where: tuple[int, ...]) -> Array:
    name = f"token_ids{''.join(f'[{i}]' for i in where)}"
    array = _ordered(row, name)
    if array.ndim != 1:
        raise TypeError(
            f"{name}: expected a list of token ids, got {array.ndim} axes of {array.dtype}; a row of the logits has a "
            f"list of its own"
        )
    return array.astype(np.int64, copy=False)  # what is too large becomes negative, which is no id either
