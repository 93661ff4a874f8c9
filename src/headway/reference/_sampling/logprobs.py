"""Log-probabilities of tokens, their ranks, and the best tokens."""

from __future__ import annotations

import math
import secrets
from typing import Any, NamedTuple

import numpy as np

from .masses import AnyArray, float32, floats
from .sample import filter_logits, masses


class Logprobs(NamedTuple):
    """What `logprobs` returns."""

    logprobs: Any
    ranks: Any
    top_tokens: Any
    top_logprobs: Any


def logprobs(
    logits: Any,
    tokens: Any = None,
    params: Any = None,
    *,
    top: int | None = None,
    processed: bool = False,
    **options: Any,
) -> Logprobs:
    """Return logarithms of probabilities, of given tokens and of the best.

    ln p is z - max z - ln(total / 2^s) for the logits as given, and ln(mass / total) for what `sample` draws from.

    Args:
        logits: (..., V).
        tokens: ids, (...) or (..., n), or None.
        params: `headway.SamplingParams`, or None.
        top: how many of the best tokens are wanted; None is none of them.
        processed: whether ln p is that of what `sample` draws from.
        **options: those of `headway.SamplingParams`.

    Returns:
        The fields of `headway.Logprobs`: ln p and ranks of the tokens, in their shape; ids and ln p of the best,
        (..., top).

    >>> from headway import reference
    >>> found = reference.logprobs([1.0, 3.0, 2.0], 2, top=2)
    >>> round(found.logprobs, 4), found.ranks, found.top_tokens
    (-1.4076, 2, array([1, 2]))
    """
    array = floats(logits)
    if options.get("seed", getattr(params, "seed", None)) is None:
        options["seed"] = secrets.randbits(64)  # one coin of xtc for both of these
    z = filter_logits(float32(array), params, **options)
    return of_distribution(array.dtype, z, masses(array, params, **options), tokens, top, processed)


def of_distribution(dtype: Any, z: AnyArray, w: AnyArray, tokens: Any, top: int | None, processed: bool) -> Logprobs:
    """Of logits z (..., V), -inf where a token was removed, of this type when they were given, with masses w."""
    lead = z.shape[:-1]
    total = w.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        if processed:
            ln_p = np.log(w.astype(np.float64) / total)
        else:
            wide = z.astype(np.float64)
            ln_p = wide - wide.max(-1, keepdims=True) - np.log(total / w.max(-1, keepdims=True))
    with np.errstate(over="ignore"):
        ln_p = ln_p.astype(np.float64 if dtype == np.float64 else np.float32)
    order = np.argsort(-z, axis=-1, kind="stable")
    place = np.argsort(order, axis=-1) + 1
    of_tokens: Any = None
    ranks: Any = None
    if tokens is not None:
        ids = np.asarray(tokens, np.int64)
        flat = ids.reshape(*lead, math.prod(ids.shape[len(lead) :]))
        of_tokens = np.take_along_axis(ln_p, flat, -1).reshape(ids.shape)
        ranks = np.take_along_axis(place, flat, -1).reshape(ids.shape)
        if not ids.ndim:
            of_tokens, ranks = float(of_tokens), int(ranks)
    best = best_ln_p = None
    if top is not None:
        removed = np.take_along_axis(z, order, -1)[..., :top] == -np.inf
        best = np.where(removed, -1, order[..., :top])
        best_ln_p = np.where(removed, -np.inf, np.take_along_axis(ln_p, order, -1)[..., :top]).astype(ln_p.dtype)
    return Logprobs(of_tokens, ranks, best, best_ln_p)
