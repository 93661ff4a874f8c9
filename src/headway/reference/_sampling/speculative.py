"""Speculative sampling: drafted tokens accepted or replaced."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ..._sampling import DEFAULTS
from .call import bias_of, mask_of, through_stages
from .masses import AnyArray, floats
from .rng import draw_from, philox


class Verified(NamedTuple):
    """What `verify_draft` returns."""

    accepted: Any
    next_token: Any
    tokens: Any


def acceptance(p: AnyArray, q: AnyArray, token: int) -> Fraction:
    """min(1, (p / P) / (q / Q)): the chance to accept a token drawn from masses q, where those of the target are p."""
    P, Q = int(p.sum()), int(q.sum())
    return min(Fraction(1), Fraction(int(p[token]) * Q, int(q[token]) * P))


def residual(p: AnyArray, q: AnyArray) -> list[int]:
    """max(0, p Q - q P): the masses of the token that replaces one that is not accepted."""
    P, Q = int(p.sum()), int(q.sum())
    return [max(0, int(a) * Q - int(b) * P) for a, b in zip(p, q, strict=True)]


def verify_row(
    p: Sequence[AnyArray], q: Sequence[AnyArray], draft: list[int], words: Sequence[tuple[int, ...]]
) -> tuple[int, int]:
    """How many tokens are accepted, and the next: masses p (n + 1, V) and q (n, V), and a block of words a place."""
    for i, token in enumerate(draft):
        of_target, of_draft = p[i], q[i]
        if of_draft[token] == 0:
            raise ValueError("draft_tokens: not drawn from draft_logits")
        chance = acceptance(of_target, of_draft, token)
        # As in a draw: a place among q P, of which the first p Q accept.
        whole = int(of_draft[token]) * int(of_target.sum())
        if (words[i][2] * whole >> 64) < chance * whole:
            continue
        left = residual(of_target, of_draft)
        target = words[i][3] * sum(left) >> 64
        for candidate, mass in enumerate(left):
            if target < mass:
                return i, candidate
            target -= mass
    return len(draft), draw_from(p[len(draft)], words[len(draft)][0])


def verify_draft(
    target_logits: Any,
    draft_logits: Any,
    draft_tokens: Any,
    params: Any = None,
    *,
    lengths: Any = None,
    draft_params: Any = None,
    seed: Any,
    position: Any = 0,
    **options: Any,
) -> Verified:
    """Speculative sampling of Leviathan et al. (2023, arXiv:2211.17192) and Chen et al. (2023, arXiv:2302.01318).

    Args:
        target_logits: (..., n + 1, V).
        draft_logits: (..., n, V), or None where the draft has no choice.
        draft_tokens: (..., n), ids.
        params: `headway.SamplingParams`, or None.
        lengths: (...), how many of a row's drafted tokens count, the first ones; None is all.
        draft_params: those of the draft; None is params and options.
        seed: one, or (...).
        position: one, or (...): that of the first token.
        **options: those of `headway.SamplingParams`, (...); allowed and logit_bias (V,) or of each place.

    Returns:
        The fields of `headway.Verified`: accepted (...), next_token (...), tokens (..., n + 1).

    Raises:
        ValueError: a drafted token that its distribution cannot draw.

    >>> from headway import reference
    >>> reference.verify_draft([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0], [1.0, 2.0, 5.0]], None, [1, 2], seed=0, temperature=0)
    Verified(accepted=1, next_token=0, tokens=array([ 1,  0, -1]))
    """
    target, tokens = floats(target_logits), np.asarray(draft_tokens, np.int64)
    drafted = None if draft_logits is None else floats(draft_logits)
    lead, n, V = target.shape[:-2], target.shape[-2] - 1, target.shape[-1]
    seeds, positions = (np.broadcast_to(np.asarray(x, object), lead) for x in (seed, position))
    drafts = np.broadcast_to(n if lengths is None else np.asarray(lengths), lead)
    given = _given(params) | options
    of_draft = {
        name: _of_draft(value, n) if name in ("allowed", "logit_bias") else value
        for name, value in (given if draft_params is None else _given(draft_params)).items()
    }
    accepted, following = np.zeros(lead, np.int64), np.zeros(lead, np.int64)
    chain = np.full((*lead, n + 1), -1, np.int64)
    for number, index in enumerate(np.ndindex(lead)):
        length = int(drafts[index])
        draft, stream = tokens[index][:length].tolist(), 0 if np.ndim(seed) else number
        blocks = [philox(int(seeds[index]), stream, (int(positions[index]) + i) % 2**64) for i in range(length + 1)]
        p = _Places(target, given, index, blocks)
        if drafted is None:
            q: Sequence[AnyArray] = [(np.arange(V) == token).astype(np.int64) for token in draft]
        else:
            q = _Places(drafted, of_draft, index, blocks[:-1])
        accepted[index], following[index] = count, token = verify_row(p, q, draft, blocks)
        chain[index][: count + 1] = [*draft[:count], token]
    return Verified(int(accepted), int(following), chain) if not lead else Verified(accepted, following, chain)


def _given(params: Any) -> dict[str, Any]:
    return {} if params is None else {name: getattr(params, name) for name in DEFAULTS}


def _of_draft(value: Any, n: int) -> Any:
    """What holds one for each of the target's n + 1 places serves the draft too, which has n."""
    per_place = np.ndim(value) > 1 and np.shape(value)[-2] == n + 1
    return np.asarray(value)[..., :n, :] if per_place else value


class _Places(Sequence[AnyArray]):
    """The masses (V,) of a row's places, in logits (..., places, V): each when it is asked for.

    What nobody looks at has no influence, nor do errors come from it.
    """

    def __init__(
        self,
        logits: AnyArray,
        options: dict[str, Any],
        index: tuple[int, ...],
        blocks: Sequence[tuple[int, ...]],
    ) -> None:
        self.logits, self.blocks = logits[index], blocks
        self.of_row = dict(options)
        for name, value in options.items():
            if np.ndim(value) and name not in ("allowed", "logit_bias", "xtc_special_tokens"):
                self.of_row[name] = np.broadcast_to(np.asarray(value, object), logits.shape[:-2])[index]
        mask, bias = mask_of(options.get("allowed"), logits.shape), bias_of(options.get("logit_bias"), logits.shape)
        self.mask, self.bias = (None if x is None else x[index] for x in (mask, bias))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        options = self.of_row | {
            "allowed": None if self.mask is None else self.mask[place],
            "logit_bias": None if self.bias is None else self.bias[place],
        }
        (row,) = through_stages(self.logits[place], None, options, [self.blocks[place]])
        return row.final_masses()
