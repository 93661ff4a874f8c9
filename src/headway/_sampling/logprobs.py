"""Log-probabilities: of given tokens and of the best ones, and the places of tokens in the order."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import headway._native as _native

from .. import _arrays, _check
from .._signatures import AnyArray, Unpack
from .call import Call, prepare
from .params import SamplingOptions, SamplingParams, shows_sampling_options
from .rows import Array, known_ids, with_n

__all__ = ["Logprobs", "logprobs"]

_SORTED_AT_ONCE = 2**18  # keys: NumPy looks for no signal while it sorts


class Logprobs(NamedTuple):
    """What `logprobs` found; None for what was not asked for.

    Attributes:
        logprobs: of the given tokens, in their shape: natural logarithms.
        ranks: of the given tokens, in their shape: places in the order of the row, from 1.
        top_tokens: (..., top), the best tokens of each row, the best first.
        top_logprobs: (..., top), theirs.

    >>> import headway as hw
    >>> hw.logprobs([1.0, 3.0, 2.0], top=2).top_tokens
    array([1, 2])
    """

    logprobs: Any
    ranks: Any
    top_tokens: Any
    top_logprobs: Any


@_check.public
@shows_sampling_options
def logprobs(
    logits: AnyArray,
    tokens: AnyArray | None = None,
    params: SamplingParams | None = None,
    *,
    top: int | None = None,
    processed: bool = False,
    **options: Unpack[SamplingOptions],
) -> Logprobs:
    """Return natural logarithms of probabilities: of given tokens with their ranks, and of the best tokens.

    Tokens are ordered by logit, with logit_bias if processed, descending, and by id where equal; what was removed comes
    after all else.

    Args:
        logits: (V,) or (..., V), as `sample` takes them.
        tokens: ids, (...), one of each row, or (..., n); None asks for none.
        params: options that many calls share, for processed=True alone.
        top: how many of the best tokens to return, from 1 to V; None asks for none. Where fewer are left, -1 and -inf
            fill up.
        processed: False is about the model's own distribution, the softmax of the logits as they are given, and takes
            no params or options. True is about the distribution that `sample` draws from with these: -inf for what it
            cannot draw.
        **options: those of `SamplingParams`, for processed=True alone.

    Returns:
        `Logprobs`: float32, or float64 for float64 logits, in the kind of array that logits are; plain numbers for one
        token of a lone row.

    Raises:
        TypeError, ValueError: as `sample`; neither tokens nor top; tokens that are no ids; options without
            processed=True.

    >>> import headway as hw
    >>> found = hw.logprobs([1.0, 3.0, 2.0], 2, top=2)
    >>> round(found.logprobs, 4), found.ranks
    (-1.4076, 2)
    >>> found.top_tokens
    array([1, 2])
    >>> hw.logprobs([1.0, 3.0, 2.0], [0, 1], processed=True, temperature=0.5, top_k=2).logprobs.round(4)
    array([   -inf, -0.1269])
    """
    processed = _check.boolean(processed, "processed")
    if not processed and (params is not None or options):
        name = "params" if params is not None else next(iter(options))
        raise ValueError(f"{name}: expected none for the logits as they are; processed=True applies it")
    if tokens is None and top is None:
        raise ValueError("tokens: expected token ids, or top=n for the best ones, got neither")
    run = prepare(logits, params, **options)
    ids = _tokens(tokens, run) if tokens is not None else np.empty((*run.lead, 0), np.int64)
    n = 0 if top is None else _check.integer(top, "top", 1, run.vocabulary)

    given = np.ascontiguousarray(ids.reshape(run.rows, math.prod(ids.shape[len(run.lead) :])))
    status, found = np.empty(run.rows, np.int64), Ranked.empty(given, n)
    if run.rows and not found.fill(run.native(status, **run.coin()), given, processed):
        run.fail(status)
    return found.wrapped(run.operand, None if tokens is None else ids.shape, None if top is None else (*run.lead, n))


class Ranked(NamedTuple):
    """The logarithms and ranks of given tokens, (rows, n), and of the best, (rows, top): float64 and int64."""

    logprobs: Array
    ranks: Array
    top_tokens: Array
    top_logprobs: Array

    @classmethod
    def empty(cls, given: Array, top: int) -> Ranked:
        """Make room for what is to be found of these tokens, (rows, n), and of the best."""
        best = len(given), top
        return cls(np.empty(given.shape), np.empty(given.shape, np.int64), np.empty(best, np.int64), np.empty(best))

    def fill(self, rows: _native.Rows, given: Array, processed: bool) -> bool:
        """Rank the tokens of rows, and say whether no row has a fault."""
        best, of_best, keys = self.top_tokens, self.top_logprobs, np.empty_like(self.top_tokens)
        if not _native.rank(rows, given, processed, self.ranks, self.logprobs, best, keys, of_best):
            return False
        at_once = max(_SORTED_AT_ONCE // max(best.shape[1], 1), 1)
        for first in range(0, len(best), at_once):
            part = slice(first, first + at_once)
            order = np.argsort(-keys[part], axis=-1, kind="stable")  # the kernel leaves them in the order of ids
            for values in (best, of_best):
                values[part] = np.take_along_axis(values[part], order, -1)
        return True

    def of(self, rows: slice) -> Ranked:
        """Return the room of some of the rows."""
        return Ranked(*(values[rows] for values in self))

    def wrapped(
        self, operand: _arrays.Operand, of_tokens: tuple[int, ...] | None, of_top: tuple[int, ...] | None
    ) -> Logprobs:
        """Return arrays of these shapes, of the kind of the logits, and None for what has no shape."""
        dtype = _arrays.compute_dtype(operand.dtype)

        def numbers(values: Array, shape: tuple[int, ...]) -> Any:
            out = _arrays.Operand(values, "float64", _arrays.as_bits).astype(dtype).reshape(shape)
            return operand.wrap(out, dtype) if shape else float(out)

        def places(values: Array, shape: tuple[int, ...]) -> Any:
            return operand.wrap(values.reshape(shape), "int64") if shape else int(values[0, 0])

        return Logprobs(
            None if of_tokens is None else numbers(self.logprobs, of_tokens),
            None if of_tokens is None else places(self.ranks, of_tokens),
            None if of_top is None else places(self.top_tokens, of_top),
            None if of_top is None else numbers(self.top_logprobs, of_top),
        )


def _tokens(tokens: AnyArray, run: Call) -> Array:
    ids = _check.whole(tokens, "tokens", "token ids").copy()  # in which what is checked here cannot change
    if ids.shape[: len(run.lead)] != run.lead or ids.ndim > len(run.lead) + 1:
        raise ValueError(
            f"tokens: expected one id for each row, of shape {run.lead}, or n in {with_n(run.lead)}, got shape "
            f"{ids.shape}"
        )
    known_ids("tokens", ids, run.vocabulary, len(run.lead))
    return ids.astype(np.int64, copy=False)
