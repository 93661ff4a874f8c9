"""Speculative sampling: tokens that a cheap model drafted, accepted or replaced so that the distribution is exact."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import headway._native as _native

from .. import _check
from .._check import shown
from .._signatures import AnyArray, Unpack
from .call import Call, fault_in, prepare, random_source
from .options import Settings
from .params import SamplingOptions, SamplingParams, shows_sampling_options
from .rows import Array, in_row, known_ids, lengths_within

__all__ = ["Verified", "verify_draft"]


class Verified(NamedTuple):
    """What `verify_draft` decided, for each row.

    Attributes:
        accepted: (...), how many of the drafted tokens, from the first on, were accepted.
        next_token: (...), the token that comes after them.
        tokens: (..., n + 1), the accepted tokens, then the next one, then -1.

    >>> import headway as hw
    >>> hw.verify_draft([[0.0, 2.0], [3.0, 1.0]], None, [1], temperature=0).tokens
    array([1, 0])
    """

    accepted: Any
    next_token: Any
    tokens: Any


@_check.public
@shows_sampling_options
def verify_draft(
    target_logits: AnyArray,
    draft_logits: AnyArray | None,
    draft_tokens: AnyArray,
    params: SamplingParams | None = None,
    *,
    lengths: AnyArray | None = None,
    draft_params: SamplingParams | None = None,
    **options: Unpack[SamplingOptions],
) -> Verified:
    """Accept drafted tokens or replace them, so that what comes out is distributed as if the target drew each token.

    Token i is accepted with probability min(1, p / q), p and q its probabilities in the target and the draft; the first
    that is not is replaced by one drawn from max(0, p - q), and after n accepted tokens one more is drawn from the
    target (Leviathan et al., 2023, arXiv:2211.17192; Chen et al., 2023, arXiv:2302.01318). All of it in whole numbers.
    Token i is decided at position + i; the draft may be drawn with the same seed and positions. What follows a token
    that is not accepted is not looked at.

    Args:
        target_logits: (..., n + 1, V), what the target says after 0, 1, ... n of the drafted tokens.
        draft_logits: (..., n, V), what the draft tokens were drawn from; None where the draft has no choice (a lookup,
            a greedy model).
        draft_tokens: (..., n), ids.
        params: options that many calls share, of the target and of the draft.
        lengths: (...), from 0 to n: how many tokens of each row were drafted; None is all n. What stands behind them,
            tokens, logits of the draft, and logits of the target after place lengths, is padding and not looked at: -1
            and NaN will do. Each row comes out as it would alone, without the padding.
        draft_params: the draft's options, where they are not those of the target; no seed, position or uniform.
        **options: those of `SamplingParams`, but for uniform. Numbers may be one per row, (...); allowed and logit_bias
            one for each place, (..., n + 1, V).

    Returns:
        `Verified`: ints for a lone row, else arrays of the kind that target_logits are.

    Raises:
        TypeError, ValueError: as `sample`; shapes that do not fit; a drafted token that its distribution cannot draw.

    >>> import headway as hw
    >>> target = [[0.0, 2.0, 1.0], [3.0, 1.0, 0.0], [1.0, 2.0, 5.0]]
    >>> hw.verify_draft(target, None, [1, 2], temperature=0)  # 1 is what the target says, 2 is not
    Verified(accepted=1, next_token=0, tokens=array([ 1,  0, -1]))
    >>> hw.verify_draft([target, target], None, [[1, 0], [1, -1]], temperature=0, lengths=[2, 1]).tokens
    array([[ 1,  0,  2],
           [ 1,  0, -1]])
    """
    run = prepare(target_logits, params, "target_logits", **options)
    if run.data.ndim < 2 or run.lead[-1] < 1:
        raise ValueError(f"target_logits: expected an array (..., n + 1, V), got shape {run.data.shape}")
    if run.settings.uniform is not None:
        raise ValueError("uniform: expected seed and position, which give as many words as it takes; leave it out")
    lead, n = run.lead[:-1], run.lead[-1] - 1
    drafted = np.full(math.prod(lead), n)
    if lengths is not None:
        drafted = lengths_within("lengths", lengths, lead, drafted, "draft_tokens")
    tokens = draft_ids(draft_tokens, drafted, lead, n, run.vocabulary)
    rows = len(tokens)
    source = _source(run.settings, lead, n + 1)
    draft, draft_rows = None, None
    if draft_logits is None:
        if draft_params is not None:
            raise ValueError("draft_params: expected draft_logits to apply them to, got None; leave one of them out")
    else:
        if draft_params is not None:
            check_draft_params(draft_params)
            params, options = draft_params, {}
        draft = prepare(draft_logits, params, "draft_logits", **options)
        if draft.data.shape != (*lead, n, run.vocabulary):
            raise ValueError(
                f"draft_logits: expected shape {(*lead, n, run.vocabulary)} beside target_logits of {run.data.shape}, "
                f"got {draft.data.shape}"
            )
        draft = _per_place(draft, n)
    run = _per_place(run, n + 1)

    status, draft_status = np.zeros(rows * (n + 1), np.int64), np.zeros(rows * n, np.int64)
    accepted, next_token = np.empty(rows, np.int64), np.empty(rows, np.int64)
    if rows:
        target_rows = run.native(status, **source)  # first, for what is wrong with both has the target's shape
        if draft is not None and n:
            draft_rows = draft.native(draft_status, **_of_draft(source, n))
        if not _native.verify(target_rows, draft_rows, tokens, drafted, draft_status, accepted, next_token):
            if not draft_status.any():
                run.fail(status)
            fail_draft(draft, draft_status, (*lead, n))
    chain = chains(tokens, accepted, next_token)
    if not lead:
        return Verified(int(accepted[0]), int(next_token[0]), run.operand.wrap(chain[0], "int64"))
    arrays = accepted.reshape(lead), next_token.reshape(lead), chain.reshape(*lead, n + 1)
    return Verified(*(run.operand.wrap(a, "int64") for a in arrays))


def check_draft_params(params: SamplingParams) -> None:
    """Check that params of a draft say nothing of what the row's own say."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"draft_params: expected SamplingParams, got {shown(params)}")
    for name in ("seed", "position", "uniform"):
        if getattr(params, name) is not None:
            raise ValueError(f"draft_params: expected no {name}, got one; seed and position are those of the row")


def _per_place(run: Call, places: int) -> Call:
    """Give options of one value per row an axis for the places of the chain."""

    def spread(name: str, value: Any) -> Any:
        if not isinstance(value, np.ndarray) or not value.ndim:
            return value
        if name not in ("allowed", "logit_bias"):
            return value[..., None]
        # One for each place of the target serves the draft too, which has one place less.
        of_target = value.ndim > 1 and value.shape[-2] == places + 1
        return value[..., :places, :] if of_target else value

    given = vars(run.settings)
    return run._replace(settings=Settings.of({name: spread(name, value) for name, value in given.items()}))


def chains(tokens: Array, accepted: Array, next_token: Array) -> Array:
    """Return the accepted tokens of each row, the next one, then -1: (rows, n + 1)."""
    rows, n = tokens.shape
    chain = np.full((rows, n + 1), -1, np.int64)
    chain[:, :n] = np.where(np.arange(n) < accepted[:, None], tokens, -1)
    np.put_along_axis(chain, accepted[:, None], next_token[:, None], -1)
    return chain


def _source(settings: Settings, lead: tuple[int, ...], places: int) -> dict[str, Any]:
    """Return the seed, the stream and the position of each place."""
    source, rows = random_source(settings, lead), math.prod(lead)
    each = {name: np.broadcast_to(numbers, rows).repeat(places) for name, numbers in source.items()}
    each["position"] += np.tile(np.arange(places, dtype=np.uint64), rows)
    return each


def _of_draft(source: dict[str, Any], n: int) -> dict[str, Any]:
    """Return the source without the last place of each row."""
    return {name: numbers.reshape(-1, n + 1)[:, :n].reshape(-1) for name, numbers in source.items()}


def draft_ids(tokens: AnyArray, lengths: Array, lead: tuple[int, ...], n: int, vocabulary: int) -> Array:
    """Return the tokens (rows, n), checked where they count, in memory that nobody else writes to."""
    try:
        given = _check.whole(tokens, "draft_tokens", "token ids")
    except ValueError as error:
        if "unequal lengths" not in str(error):
            raise
        raise ValueError(
            "draft_tokens: expected as many tokens in each row, got nested lists of unequal lengths; pad them with -1 "
            "and give lengths"
        ) from None
    if given.shape != (*lead, n):
        raise ValueError(
            f"draft_tokens: expected shape {(*lead, n)}, one place less than target_logits has, got {given.shape}"
        )
    ids = np.array(given, order="C", copy=True).reshape(math.prod(lead), n)
    counts = (np.arange(n) < lengths[:, None]).reshape(given.shape)
    cure = "; say how many count with lengths where rows are padded"
    known_ids("draft_tokens", ids.reshape(given.shape), vocabulary, given.ndim, counts, cure)
    return ids.astype(np.int64, copy=False)


def fail_draft(draft: Call | None, status: Array, shape: tuple[int, ...]) -> None:
    """Raise what is wrong with the first drafted token that has a fault."""
    at = int(status.nonzero()[0][0])
    token, fault = fault_in(int(status[at]))
    if draft is not None and fault != "undrawn":
        draft.fail(status)
    raise ValueError(
        f"draft_tokens: expected tokens that the draft can draw, got {token}{in_row(at, shape)}, which has no "
        f"probability there; give the options that it was drawn with as draft_params"
    )
