"""Log-probabilities: of given tokens and of the best ones, and the places of tokens in the order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import _arrays, _check, _native
from .call import Call, prepare
from .params import SamplingOptions, SamplingParams
from .rows import Array, known_ids, with_n
from .settings import shows_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Logprobs", "logprobs"]

_SORTED_AT_ONCE = 2**18  # keys: NumPy looks for no signal while it sorts


class Logprobs(NamedTuple):
    """What `logprobs` found; None where it was not asked for.

    logprobs, ranks: of the tokens given, of their shape. A rank is a place in the order of the row, from 1.
    top_tokens, top_logprobs: (..., top), the best first.
    """

    logprobs: Any
    ranks: Any
    top_tokens: Any
    top_logprobs: Any


@_check.public
@shows_options
def logprobs(
    logits: ArrayLike,
    tokens: ArrayLike | None = None,
    params: SamplingParams | None = None,
    *,
    top: int | None = None,
    processed: bool = False,
    **options: Unpack[SamplingOptions],
) -> Logprobs:
    """Return natural logarithms of probabilities: of given tokens with their ranks, and of the best tokens.

    logits (..., V); tokens (...), one of each row, or (..., n); top=n asks for the n best. The numbers are float32,
    float64 for float64 logits; the kind of array is that of the logits, and one token of a lone row gets plain numbers.

    processed=False is about the model's own distribution, the softmax of the logits as they are given, and takes no
    params or options. processed=True is about the distribution that `sample` draws from with these: -inf for what it
    cannot draw. Tokens are ordered by logit, with logit_bias if processed, descending, and by id where equal; what
    was removed comes after all else. Where fewer than `top` are left, -1 and -inf fill up.

    Raises what `sample` raises, and ValueError for tokens that are none.

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
    run = prepare(logits, params, options)
    ids = _tokens(tokens, run) if tokens is not None else np.empty((*run.lead, 0), np.int64)
    n = 0 if top is None else _check.integer(top, "top", 1, run.vocabulary)

    given = np.ascontiguousarray(ids.reshape(run.rows, math.prod(ids.shape[len(run.lead) :])))
    ranks, of_given = np.empty(given.shape, np.int64), np.empty(given.shape, np.float64)
    best, keys, of_best = (np.empty((run.rows, n), dtype) for dtype in (np.int64, np.int64, np.float64))
    status = np.empty(run.rows, np.int64)
    found = ranks, of_given, best, keys, of_best
    if run.rows and not _native.rank(run.native(status, **run.coin()), given, processed, *found):
        run.fail(status)
    at_once = max(_SORTED_AT_ONCE // max(n, 1), 1)
    for first in range(0, run.rows, at_once):
        rows = slice(first, first + at_once)
        order = np.argsort(-keys[rows], axis=-1, kind="stable")  # the kernel leaves them in the order of ids
        for values in (best, of_best):
            values[rows] = np.take_along_axis(values[rows], order, -1)

    dtype = _arrays.compute_dtype(run.operand.dtype)

    def numbers(values: Array, shape: tuple[int, ...]) -> Any:
        out = _arrays.Operand(values, "float64", _arrays.as_bits).astype(dtype).reshape(shape)
        return run.operand.wrap(out, dtype) if shape else float(out)

    places = run.operand.wrap(ranks.reshape(ids.shape), "int64") if ids.ndim else int(ranks[0, 0])
    return Logprobs(
        None if tokens is None else numbers(of_given, ids.shape),
        None if tokens is None else places,
        None if top is None else run.operand.wrap(best.reshape(*run.lead, n), "int64"),
        None if top is None else numbers(of_best, (*run.lead, n)),
    )


def _tokens(tokens: ArrayLike, run: Call) -> Array:
    ids = _check.whole(tokens, "tokens", "token ids").copy()  # in which what is checked here cannot change
    if ids.shape[: len(run.lead)] != run.lead or ids.ndim > len(run.lead) + 1:
        raise ValueError(
            f"tokens: expected one id for each row, of shape {run.lead}, or n in {with_n(run.lead)}, got shape "
            f"{ids.shape}"
        )
    known_ids("tokens", ids, run.vocabulary, len(run.lead))
    return ids.astype(np.int64, copy=False)
