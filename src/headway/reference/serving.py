"""Around the draw, in plain NumPy and whole numbers: penalties, log-probabilities, speculative sampling, a sampler."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .sampling import _DEFAULTS, _bias, _draw, _float32, _floats, _mask, _rows, filter_logits, philox, weights

AnyArray = NDArray[Any]

# Penalties --------------------------------------------------------------------------------------------------------

_FLT_MAX, _DBL_MAX = (float(np.finfo(dtype).max) for dtype in (np.float32, np.float64))


def penalize(
    logits: Any,
    token_ids: Any,
    *,
    lengths: Any = None,
    prompt_lengths: Any = 0,
    unknown_tokens: str = "error",
    dry_breakers: Any = (),
    **options: Any,
) -> AnyArray:
    """Lower logits (..., V) for the tokens of each row's history, and for those that would go on repeating it.

    >>> penalize([2.0, 1.0, -1.0, 0.0], [0, 2, 0], repetition=2.0)
    array([ 1.,  1., -2.,  0.])
    """
    array = _floats(logits)
    lead, V = array.shape[:-1], array.shape[-1]
    length = None if lengths is None else np.broadcast_to(np.asarray(lengths), lead)
    prompt_length = np.broadcast_to(np.asarray(prompt_lengths), lead)
    per_row: dict[str, Any] = {
        name: np.broadcast_to(np.asarray(value, object), lead) for name, value in options.items()
    }
    out = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    for index in np.ndindex(lead):
        row = token_ids
        for i in index:
            row = row[i]
        row = [int(token) for token in row][: None if length is None else int(length[index])]
        start = int(prompt_length[index])
        known = [0 <= token < V for token in row]
        history = [token for token, counts in zip(row, known, strict=True) if counts]
        own = {name: values[index] for name, values in per_row.items()}
        of_all = own.get("repetition", 1) != 1 or own.get("dry_multiplier", 0) > 0
        of_output = own.get("frequency", 0) != 0 or own.get("presence", 0) != 0
        looked_at = known if of_all else known[start:] if of_output else []
        if unknown_tokens == "error" and not all(looked_at):
            raise ValueError("token_ids: an id without a logit")
        _penalize_row(out[index], history, sum(known[:start]), {int(token) for token in dry_breakers}, **own)
    return out


def _penalize_row(
    z: AnyArray,
    history: list[int],
    prompt: int,
    breakers: set[int],
    *,
    repetition: float = 1.0,
    frequency: float = 0.0,
    presence: float = 0.0,
    dry_multiplier: float = 0.0,
    dry_base: float = 1.75,
    dry_allowed_length: int = 2,
    window: int | None = None,
    repetition_window: int | None = None,
    frequency_window: int | None = None,
    dry_window: int | None = None,
) -> None:
    """Penalize z (V,) in place; `prompt` is how many tokens of the history are its prompt."""

    def last(own: int | None, on: bool, start: int = 0) -> list[int]:
        """What of the history, from `start` on, one kind of penalty is about."""
        size = own if own is not None else window if window is not None else len(history)
        return history[max(start, len(history) - int(size)) :] if on else []

    of_repetition = last(repetition_window, repetition != 1)
    of_frequency = last(frequency_window, frequency != 0 or presence != 0, prompt)
    of_dry = last(dry_window, dry_multiplier > 0)
    repeated = _repeats(of_dry, breakers)
    with np.errstate(over="ignore", invalid="ignore"):
        for token in {*of_repetition, *of_frequency, *of_dry}:
            given = new = np.float64(z[token])
            if token in of_repetition:
                new = new / np.float64(repetition) if new > 0 else new * np.float64(repetition)
            if token in of_frequency:
                new = new - np.float64(of_frequency.count(token)) * np.float64(frequency) - np.float64(presence)
            length = repeated.get(token, 0)
            if length >= dry_allowed_length:
                penalty = np.float64(dry_multiplier)
                for _ in range(length - int(dry_allowed_length)):
                    penalty = penalty * np.float64(dry_base)
                new = new - min(penalty, _DBL_MAX)
            largest = _FLT_MAX if abs(given) <= _FLT_MAX else _DBL_MAX
            z[token] = min(max(new, -largest), largest) if np.isfinite(given) else new


def _repeats(history: list[int], breakers: set[int]) -> dict[int, int]:
    """For each token: the longest end of the history that it followed before, breakers in neither."""
    found: dict[int, int] = {}
    for at in range(1, len(history)):
        n = 0
        while n < at and history[at - 1 - n] == history[-1 - n] and history[-1 - n] not in breakers:
            n += 1
        if n and history[at] not in breakers:
            found[history[at]] = max(n, found.get(history[at], 0))
    return found


# Log-probabilities ------------------------------------------------------------------------------------------------


class Logprobs(NamedTuple):
    """Of given tokens, and of the best."""

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
    """Ln p of tokens (...) or (..., n), their places in the order, and the best tokens, for logits (..., V).

    ln p is z - max z - ln(total / 2^s) for the logits as given, and ln(weight / total) for what `sample` draws from.

    >>> found = logprobs([1.0, 3.0, 2.0], 2, top=2)
    >>> round(found.logprobs, 4), found.ranks, found.top_tokens
    (-1.4076, 2, array([1, 2]))
    """
    array = _floats(logits)
    if options.get("seed", getattr(params, "seed", None)) is None:
        options["seed"] = secrets.randbits(64)  # one coin of xtc for both of these
    z = filter_logits(_float32(array), params, **options)
    return _logprobs(array.dtype, z, weights(array, params, **options), tokens, top, processed)


def _logprobs(dtype: Any, z: AnyArray, w: AnyArray, tokens: Any, top: int | None, processed: bool) -> Logprobs:
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


# Speculative sampling ---------------------------------------------------------------------------------------------


class Verified(NamedTuple):
    """How many drafted tokens were accepted, the token that follows, and both, padded by -1."""

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
    return len(draft), _draw(p[len(draft)], words[len(draft)][0])


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

    target_logits (..., n + 1, V), draft_logits (..., n, V) or None, draft_tokens (..., n), of which the first lengths
    (...) count, all unless given; options (...), allowed and logit_bias (V,) or of each place.

    >>> verify_draft([[0.0, 2.0, 1.0], [3.0, 1.0, 0.0], [1.0, 2.0, 5.0]], None, [1, 2], seed=0, temperature=0)
    Verified(accepted=1, next_token=0, tokens=array([ 1,  0, -1]))
    """
    target, tokens = _floats(target_logits), np.asarray(draft_tokens, np.int64)
    drafted = None if draft_logits is None else _floats(draft_logits)
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
    return {} if params is None else {name: getattr(params, name) for name in _DEFAULTS}


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
        mask, bias = _mask(options.get("allowed"), logits.shape), _bias(options.get("logit_bias"), logits.shape)
        self.mask, self.bias = (None if x is None else x[index] for x in (mask, bias))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: Any) -> Any:
        options = self.of_row | {
            "allowed": None if self.mask is None else self.mask[place],
            "logit_bias": None if self.bias is None else self.bias[place],
        }
        (row,) = _rows(self.logits[place], None, options, [self.blocks[place]])
        return row.final_weights()


# A sampler for serving loops --------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Tokens (rows,), and where they stand among the logits as given, and in the distribution they were drawn from."""

    tokens: AnyArray
    raw: Logprobs
    processed: Logprobs


class Sampler:
    """Rows that come and go: each is penalized and sampled on its own.

    >>> sampler = Sampler(3)
    >>> row = sampler.admit(None, [2], seed=1, repetition=2.0)
    >>> sampler.step([[0.0, 1.0, 9.0]])
    array([2])
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.admitted = 0
        self.rows: dict[int, dict[str, Any]] = {}

    def admit(
        self,
        params: Any = None,
        prompt_tokens: Any = (),
        output_tokens: Any = (),
        *,
        seed: Any = None,
        stream: int | None = None,
        count_prompt: bool = False,
        stop_tokens: Any = (),
        min_tokens: int = 0,
        banned_sequences: Any = (),
        no_repeat_ngram: int | None = None,
        **penalties: Any,
    ) -> int:
        """Add a row behind the others, whose next token comes behind prompt and output."""
        of_params = getattr(params, "seed", None) if seed is None else None
        if of_params is not None:
            seed = of_params
            taken = {row["stream"] for row in self.rows.values() if row["seed"] == seed}
            free = min(set(range(len(taken) + 1)) - taken)
        else:
            free = 0
        self.rows[self.admitted] = {
            "history": [int(token) for part in (prompt_tokens, output_tokens) for token in part],
            "params": params,
            "penalties": {"prompt_lengths": 0 if count_prompt else len(prompt_tokens), **penalties},
            "seed": secrets.randbits(64) if seed is None else seed,
            "stream": free if stream is None else stream,
            "prompt": len(prompt_tokens),
            "bans": (
                set(stop_tokens),
                min_tokens,
                [np.atleast_1d(x).tolist() for x in banned_sequences],
                no_repeat_ngram,
            ),
            "start": int(getattr(params, "position", None) or 0),  # the position of the history's first token
        }
        self.admitted += 1
        return self.admitted - 1

    def step(self, logits: Any, *, allowed: Any = None, logprobs: int | None = None) -> Any:
        """One token for each row of logits (rows, V); allowed holds a mask for each, or None.

        logprobs=n: also the logarithms of their probabilities, and of the best n.
        """
        tokens, filtered, masses = [], np.full(np.shape(logits), -np.inf), np.zeros(np.shape(logits), np.int64)
        for i, (z, (handle, row)) in enumerate(zip(_floats(logits), self.rows.items(), strict=True)):
            penalized = penalize(z, row["history"], **row["penalties"])
            mask = None if allowed is None else _mask(allowed[i], z.shape)
            if mask is not None:
                penalized[~mask] = -np.inf
            penalized[self.banned(handle)] = -np.inf
            # As row number `stream` of a batch with this seed.
            position = (row["start"] + len(row["history"])) % 2**64
            block = philox(int(row["seed"]), int(row["stream"]), position)
            (drawn,) = _rows(penalized, row["params"], {}, [block])
            filtered[i, drawn.ids], masses[i] = drawn.z, drawn.final_weights()
            tokens.append(_draw(masses[i], block[0]))
        for token, row in zip(tokens, self.rows.values()):
            row["history"].append(token)
        drawn_tokens = np.array(tokens, np.int64)
        if logprobs is None:
            return drawn_tokens
        z, top = _floats(logits), logprobs or None
        raw = _logprobs(z.dtype, _float32(z), weights(z), drawn_tokens, top, False)
        return Drawn(drawn_tokens, raw, _logprobs(z.dtype, filtered, masses, drawn_tokens, top, True))

    def retire(self, handle: int) -> None:
        """Remove a row."""
        del self.rows[handle]

    def banned(self, handle: int) -> list[int]:
        """The tokens that a row may not draw next."""
        row = self.rows[handle]
        stop_tokens, min_tokens, sequences, n = row["bans"]
        history = [token for token in row["history"] if 0 <= token < self.vocabulary]
        found = {token for token in stop_tokens if len(row["history"]) - row["prompt"] < min_tokens}
        found |= {last for *before, last in sequences if history[len(history) - len(before) :] == before}
        if n is not None:
            runs = [history[i : i + n] for i in range(len(history) - n + 1)]
            found |= {last for *before, last in runs if history[len(history) - n + 1 :] == before}
        return sorted(found)

    def history(self, handle: int) -> AnyArray:
        """The tokens of its prompt and its output."""
        return np.array(self.rows[handle]["history"], np.int64)

    def force(self, handle: int, token: int) -> None:
        """Put a token behind its output."""
        self.rows[handle]["history"].append(token)

    def truncate(self, handle: int, length: int) -> None:
        """Keep so many of its tokens, prompt included."""
        del self.rows[handle]["history"][length:]
