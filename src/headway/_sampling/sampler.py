"""A sampler for serving loops: rows come and go, and none disturbs another."""

from __future__ import annotations

import copy
import functools
import threading
import typing
from collections.abc import Sequence
from itertools import count, groupby
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .. import _arrays, _check, _native
from .._check import shown
from .._signatures import AnyArray, NumPyLike, Tensor, Unpack
from .._turns import F, one_at_a_time
from . import bans
from .call import Call, prepare, ready
from .histories import Histories
from .logprobs import Logprobs, Ranked
from .options import Settings
from .params import SamplingParams
from .penalties import (
    DEFAULTS,
    Penalties,
    UnknownTokens,
    breaker_ids,
    checked,
    penalizes,
    shows_penalties,
    with_windows,
)
from .rows import Array, mask_bytes, unpacked
from .settings import CHECKS
from .stages import OFF

__all__ = ["Drawn", "Sampler"]

_WORDS = ("ties", "nucleus", "dialect", "xtc_special_tokens")  # the settings that cannot be one per row
_ROWS_PER_CALL = 4  # at least, on average: calls of fewer leave threads idle, which costs more than masks and biases do


class Drawn(NamedTuple):
    """What `Sampler.step` drew, with log-probabilities.

    tokens: (rows,).
    raw: of each token under the logits as they were given, as `logprobs` finds them.
    processed: the same under the distribution that it was drawn from.
    """

    tokens: Any
    raw: Logprobs
    processed: Logprobs


class _Row(NamedTuple):
    """What does not change while a row is active."""

    handle: int
    slot: int  # of its history
    settings: Settings  # of one row: allowed and logit_bias (V,) or None; the position is that of index 0
    stream: np.uint64
    prompt: int  # how many tokens of its sequence
    penalties: dict[str, Array]
    breakers: frozenset[int]
    bans: bans.RowBans

    def words(self) -> tuple[Any, ...]:
        """Return what rows must share to be sampled by one call."""
        return tuple(getattr(self.settings, name) for name in _WORDS)

    def kind(self) -> tuple[Any, ...]:
        """Return what rows should share to be sampled by one call: those without a mask or bias (V,) get none."""
        return *self.words(), self.settings.allowed is None, self.settings.logit_bias is None


class _Group(NamedTuple):
    """Neighbours that one call samples, and their settings and streams, one of each row."""

    handles: tuple[int, ...]
    rows: slice  # not an array of numbers, which would copy their logits
    settings: Settings
    streams: Array


class _Active(NamedTuple):
    """The active rows, and what a step takes of them: replaced as a whole, so that a signal never finds half of it."""

    rows: tuple[_Row, ...]
    groups: tuple[_Group, ...]
    # One of each row: the slot of its history, the position of its next draw, its penalties.
    slots: Array
    position: Array
    penalties: dict[str, Array]
    penalized: bool  # whether any row has penalties
    banning: tuple[int, ...]  # which rows have bans


_ONE = np.uint64(1)


def _in_turn(method: F) -> F:
    """Let calls of other threads wait for their turn; one from within a call, as of a signal's handler, is an error."""
    alone = one_at_a_time("Sampler: expected a call after the last one, got one from within it; let it end first")(
        method
    )

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return alone(self, *args, **kwargs)

    return cast(F, call)


class Sampler:
    """What a serving loop keeps for each request beside its logits: parameters, seed, position and history.

    vocabulary is the number of tokens, V. A row's tokens are a function of its own logits, params, penalties, seed,
    stream and prompt, and of nothing else. Each has the bits of

        sample(penalize(logits, history, prompt_lengths=len(prompt), **penalties),
               params, seed=seed, position=len(history))

    where history is the row's prompt and its output so far; in stream k, of row k of a batch with that seed. So a text
    may stop anywhere: a row that is admitted with the output so far goes on as if it had never stopped. Calls from
    several threads take turns.

    >>> import headway as hw
    >>> sampler = hw.Sampler(4)
    >>> a = sampler.admit(hw.SamplingParams(temperature=0.8), [3, 3], seed=7, repetition=1.3)
    >>> b = sampler.admit(hw.SamplingParams(temperature=0))
    >>> sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]])  # a row for each of sampler.handles
    array([1, 1])
    >>> sampler.retire(a)
    >>> sampler.step([[0.0, 5.0, 2.0, 6.0]])
    array([3])

    Several answers to one prompt, from one seed:

    >>> params = hw.SamplingParams(seed=4)
    >>> answers = [sampler.admit(params) for _ in range(3)]
    >>> sampler.step([[0.0, 5.0, 2.0, 6.0]] + [[0.0, 0.0, 0.0, 0.0]] * 3)
    array([3, 1, 3, 0])
    """

    @_check.public
    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = _check.integer(vocabulary, "vocabulary", 1, 2**31 - 1)
        self._admitted = 0
        none = np.zeros(0, np.int64)
        self._histories = Histories(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.bool_), none, none)
        self._active = _Active((), (), none, np.zeros(0, np.uint64), {}, False, ())
        self._lock = threading.RLock()  # kernels run without the GIL, and all of the above belongs together

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # a copy, since the state goes on changing while it is pickled
            return copy.deepcopy({name: x for name, x in self.__dict__.items() if name not in ("_lock", "_turn")})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become the sampler with this state."""
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def handles(self) -> list[int]:
        """The active rows, in the order in which `step` takes their logits: the longest active first."""
        return [row.handle for row in self._active.rows]

    @shows_penalties
    @_check.public
    @_in_turn
    def admit(
        self,
        params: SamplingParams | None = None,
        prompt_tokens: AnyArray = (),
        output_tokens: AnyArray = (),
        *,
        seed: int | None = None,
        stream: int | None = None,
        count_prompt: bool = False,
        unknown_tokens: UnknownTokens = "error",
        stop_tokens: AnyArray = (),
        min_tokens: int = 0,
        banned_sequences: Sequence[int | AnyArray] = (),
        no_repeat_ngram: int | None = None,
        **penalties: Unpack[Penalties],
    ) -> int:
        """Add a row behind the others and return its handle.

        params hold as long as the row is active: single numbers, and allowed and logit_bias of one row. Their seed is
        the row's unless `seed` is given; where there is none it is fresh entropy. Their position, 0 unless given, is
        that of the first token of the prompt: it is added to the index of each draw in the row's sequence.

        prompt_tokens, output_tokens: (n,), the ids of the sequence so far: what was given, and what was drawn, if the
            row goes on with a text that another has begun. The first draw comes behind both.
        stream: which of the seed's streams the row draws from, a whole number below 2^64. Unless given, a row with the
            seed of its params takes the lowest that no active row with that seed has: rows with the same params
            differ, as the rows of a batch do. All others take stream 0, so that `admit(seed=5)` always draws the same,
            which is what requests that bring seeds of their own want.

        The penalties are those of `penalize`, over the prompt and the output.

        count_prompt: whether frequency and presence count the prompt too; repetition and DRY always do.
        unknown_tokens: what to do with ids of the prompt outside 0 to V - 1, such as placeholders for images, where
            a penalty looks at the prompt: "error", or "ignore", which leaves them out of the history. Each has its
            place in the sequence all the same.
        stop_tokens, min_tokens: the ids after which the loop ends a row, which are banned until its output has so many
            tokens. That is all they do: the loop sees itself what a row draws.
        banned_sequences: ids and lists of ids that are never drawn: the last id of each is banned where the history
            ends with those before it (`bad_words_ids` in transformers).
        no_repeat_ngram: n, at least 1: no n tokens come twice in prompt and output (Paulus et al., 2017,
            arXiv:1705.04304). Looking takes time linear in the history.

        Raises ValueError and TypeError that name the argument.
        """
        alone = prepare(np.zeros(self.vocabulary, np.float32), params, {} if seed is None else {"seed": seed})
        if alone.settings.uniform is not None:
            raise ValueError("uniform: expected seed and position, which make each step differ; leave it out of params")
        for name, value in vars(alone.settings).items():
            if isinstance(value, np.ndarray) and value.ndim and name not in ("allowed", "logit_bias"):
                raise ValueError(f"{name}: expected one value for the row, got shape {value.shape}")
        for name, value in penalties.items():
            if name in CHECKS:
                raise TypeError(f"{name}: no such penalty; give `params=hw.SamplingParams({name}={shown(value)})`")
        own = checked(penalties)
        for name, value in own.items():
            if value.ndim:
                raise ValueError(f"{name}: expected one value for the row, got shape {value.shape}")
        own_bans = bans.checked(stop_tokens, min_tokens, banned_sequences, no_repeat_ngram, self.vocabulary)
        breakers = breaker_ids(penalties.get("dry_breakers", ()), self.vocabulary)
        count_prompt = _check.boolean(count_prompt, "count_prompt")
        of_all, of_output = penalizes(own)
        prompt, before = self._prompt(prompt_tokens, unknown_tokens, bool(of_all | (of_output & count_prompt)))
        output = _check.integers(output_tokens, "output_tokens", 0, self.vocabulary - 1)
        if output.ndim != 1:
            raise ValueError(f"output_tokens: expected a list of token ids, got shape {output.shape}")
        if stream is not None:
            stream = _check.integer(stream, "stream", 0, 2**64 - 1)

        alone.spared()  # so that an id outside of the vocabulary is an error here
        source, bias = alone.source(), alone.bias()
        position = source["position"] + np.uint64(before + output.size)
        allowed, packed = alone.allowed()
        if allowed is not None:
            allowed = unpacked(allowed, self.vocabulary) if packed else allowed.view(np.bool_)
        start = source["position"][0]
        settings = alone.settings.updated(
            {"seed": source["seed"][0], "position": start, "allowed": allowed, "logit_bias": bias}
        )
        if stream is None:
            of_params = seed is None and alone.settings.seed is not None
            stream = self._free_stream(source["seed"][0]) if of_params else 0
        history = np.concatenate([prompt, output])
        slot = self._histories.admit(history, np.isin(history, breakers), 0 if count_prompt else prompt.size)
        ids = frozenset(breakers.tolist())
        row = _Row(self._admitted, slot, settings, np.uint64(stream), before, with_windows(own), ids, own_bans)
        active = self._with([*self._active.rows, row], np.append(self._active.position, position))
        # No function is called between the two, so that no signal's handler runs there.
        self._active = active
        self._admitted += 1
        return row.handle

    def _free_stream(self, seed: np.uint64) -> int:
        """Return the lowest stream that no active row with this seed draws from."""
        taken = {int(row.stream) for row in self._active.rows if row.settings.seed == seed}
        return next(stream for stream in count() if stream not in taken)

    def _prompt(self, prompt_tokens: AnyArray, unknown_tokens: UnknownTokens, looked_at: bool) -> tuple[Array, int]:
        """Return the tokens of a prompt that have a logit, and how many tokens there are.

        All must have one where penalties look at the prompt, unless told otherwise.
        """
        _check.choice(unknown_tokens, "unknown_tokens", ("error", "ignore"))
        prompt = _check.integers(prompt_tokens, "prompt_tokens", -(2**63), 2**64 - 1)
        if prompt.ndim != 1:
            raise ValueError(f"prompt_tokens: expected a list of token ids, got shape {prompt.shape}")
        known = (prompt >= 0) & (prompt < self.vocabulary)
        if looked_at and unknown_tokens == "error" and not known.all():
            at = int(np.flatnonzero(~known)[0])
            raise ValueError(
                f"prompt_tokens: expected ids from 0 to {self.vocabulary - 1}, got {prompt[at]} at {at}; leave such "
                f'ids out of what penalties count with unknown_tokens="ignore"'
            )
        return prompt[known], prompt.size

    @_check.public
    @_in_turn
    def retire(self, handle: int) -> None:
        """Remove a row: those after it move up by one."""
        at = self._place(handle)
        rows, position = self._active.rows, self._active.position
        self._active = self._with([*rows[:at], *rows[at + 1 :]], np.delete(position, at))
        self._histories.retire(rows[at].slot)

    def _place(self, handle: int) -> int:
        """Return where in `handles` a row stands."""
        whole = isinstance(handle, (int, np.integer)) and not isinstance(handle, bool)
        if not whole or handle not in self.handles:
            raise ValueError(f"handle: expected one of the active rows, {self.handles}, got {shown(handle)}")
        return self.handles.index(handle)

    @_check.public
    @_in_turn
    def history(self, handle: int) -> Array:
        """Return the tokens of a row that penalties know: those of its prompt that have a logit, and its output.

        Args:
            handle: an active row.

        Returns:
            int64 (n,), the oldest first: a copy.

        Raises:
            ValueError: a handle of no active row.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [3, 3])
        >>> sampler.step([[0.0, 1.0, 0.0, 0.0]])
        array([1])
        >>> sampler.history(row)
        array([3, 3, 1])
        """
        return self._histories.tokens_of(self._active.rows[self._place(handle)].slot).copy()

    @_check.public
    @_in_turn
    def force(self, handle: int, token: int) -> None:
        """Put a token behind those of a row, as if the row had drawn it: penalties count it, and the position goes on.

        Args:
            handle: an active row.
            token: an id from 0 to V - 1, such as one that a grammar or an agent prescribes.

        Raises:
            TypeError: a token that is no integer.
            ValueError: a handle of no active row, or a token outside the vocabulary.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(hw.SamplingParams(temperature=0), [3, 3])
        >>> sampler.force(row, 2)
        >>> sampler.history(row)
        array([3, 3, 2])
        """
        at = self._place(handle)
        token = _check.integer(token, "token", 0, self.vocabulary - 1)
        active, histories, row = self._active, self._histories, self._active.rows[at]
        this, slots = slice(at, at + 1), active.slots[at : at + 1]
        histories.write(slots, np.array([token]), np.array([token in row.breakers]))
        # No function is called between the two, so that no signal's handler runs there: both happen, or neither.
        histories.length[slots] += 1
        active.position[this] += _ONE

    @_check.public
    @_in_turn
    def truncate(self, handle: int, length: int) -> None:
        """Take the last tokens of a row's output back, so that its sequence has this length; the row forgets them.

        Args:
            handle: an active row.
            length: of the sequence, prompt included, as of a `KVCache`: from the prompt's length to the present one.

        Raises:
            TypeError: a length that is no integer.
            ValueError: a handle of no active row, or a length out of range.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> row = sampler.admit(None, [3, 3], [1, 2, 0])
        >>> sampler.truncate(row, 3)
        >>> sampler.history(row)
        array([3, 3, 1])
        """
        at = self._place(handle)
        active, histories, row = self._active, self._histories, self._active.rows[at]
        start, this, slots = row.settings.position, slice(at, at + 1), active.slots[at : at + 1]
        present = int((active.position[this] - start)[0])
        length = _check.integer(length, "length", row.prompt, present)
        less = present - length
        back = np.uint64(less)
        # No function is called from here on, so that no signal's handler runs there: all of it happens, or nothing.
        histories.length[slots] -= less
        histories.counted[slots] = 0  # what is left is counted anew
        active.position[this] -= back

    @typing.overload
    def step(self, logits: NumPyLike, *, allowed: Any = None, logprobs: None = None) -> NDArray[np.int64]: ...
    @typing.overload
    def step(self, logits: Tensor, *, allowed: Any = None, logprobs: None = None) -> Tensor: ...
    @typing.overload
    def step(self, logits: AnyArray, *, allowed: Any = None, logprobs: int) -> Drawn: ...
    @_check.public
    @_in_turn
    def step(self, logits: AnyArray, *, allowed: Any = None, logprobs: int | None = None) -> Any:
        """Draw one token for each active row.

        logits (rows, V), in the order of `handles` -> int64 (rows,), the same kind of array. Where a row has an error,
        no row draws: the message names it and its handle, and the step may be taken again with other logits or after
        a `retire`.

        allowed is for this step alone, such as a grammar's: which tokens each row may draw, of those that its params
        allow. A bool array (rows, V); an int32 or uint32 array (rows, ceil(V / 32)) with token 0 in the lowest bit of
        the first word, as grammar libraries fill it; or a list with, for each row, such a mask, (W,) or (1, W), ids, or
        None.

        logprobs=n, from 0 to V, asks for log-probabilities too: the result is then `Drawn(tokens, raw, processed)`,
        the last two `Logprobs` of the drawn tokens, (rows,), and of the n best, (rows, n), None for n = 0.

        >>> import headway as hw
        >>> sampler = hw.Sampler(4)
        >>> handles = [sampler.admit(hw.SamplingParams(temperature=0)) for _ in range(2)]
        >>> sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]], allowed=[[0, 2], None])
        array([2, 1])
        >>> drawn = sampler.step([[0.0, 1.0, 2.0, 3.0], [0.0, 5.0, 2.0, 3.0]], allowed=[[0, 2], None], logprobs=1)
        >>> drawn.tokens, drawn.raw.logprobs.round(3), drawn.processed.logprobs, drawn.raw.top_tokens.tolist()
        (array([2, 1]), array([-1.44 , -0.176]), array([0., 0.]), [[3], [1]])
        """
        n = None if logprobs is None else _check.integer(logprobs, "logprobs", 0, self.vocabulary)
        operand = _arrays.unwrap(logits, "logits")
        active = self._active
        rows = len(active.rows)
        if operand.data.shape != (rows, self.vocabulary):
            raise ValueError(
                f"logits: expected shape {(rows, self.vocabulary)}, a row for each active one, got {operand.data.shape}"
            )
        mask = self._without_banned(self._mask(allowed))
        histories = self._histories
        if active.penalized:
            histories.penalize(operand.data, active.slots, active.penalties)
        tokens = np.empty((rows, 1), np.int64)
        processed = None if n is None else Ranked.empty(tokens, n)
        for group in active.groups:
            changes: dict[str, Any] = {"position": active.position[group.rows]}
            if mask is not None:
                changes["allowed"] = self._both(group.settings.allowed, mask[group.rows])
            run = ready(operand._replace(data=operand.data[group.rows]), group.settings.updated(changes))
            own = histories.of(active.slots[group.rows]) if active.penalized else None
            status = np.zeros(rows, np.int64)
            source: dict[str, Any] = run.source() | {"stream": group.streams}
            native, drawn = run.native(status[group.rows], own, **source), tokens[group.rows]
            if not _native.sample(native, 1, True, drawn, None, None):
                self._fail(run, status)
            if processed is not None and not processed.of(group.rows).fill(native, drawn, True):
                self._fail(run, status)
        result = operand.wrap(tokens[:, 0], "int64")
        if processed is not None:
            run, status, raw = prepare(operand, None, {}), np.zeros(rows, np.int64), Ranked.empty(tokens, n or 0)
            if rows and not raw.fill(run.native(status), tokens, False):
                self._fail(run, status)
            top = (rows, n) if n else None
            result = Drawn(result, *(found.wrapped(operand, (rows,), top) for found in (raw, processed)))
        breaks = [token in row.breakers for token, row in zip(tokens[:, 0].tolist(), active.rows)]
        histories.write(active.slots, tokens[:, 0], np.array(breaks, np.bool_))
        # No function is called between the two, so that no signal's handler runs there: both happen, or neither.
        histories.length[active.slots] += 1
        active.position[...] += _ONE
        return result

    def _fail(self, run: Call, status: Array) -> None:
        row = self._active.rows[int(status.nonzero()[0][0])]
        try:
            run._replace(lead=status.shape).fail(status)
        except ValueError as error:
            raise ValueError(f"{error}; the row's handle is {row.handle}") from None

    def _mask(self, allowed: Any) -> Array | None:
        """Return a step's masks: bool (rows, V), or uint32 (rows, ceil(V / 32))."""
        if allowed is None:
            return None
        rows, vocabulary = len(self._active.rows), self.vocabulary
        if isinstance(allowed, (list, tuple)):
            if len(allowed) != rows:
                raise ValueError(f"allowed: expected {rows} masks, one for each active row, got {len(allowed)}")
            masks = np.ones((rows, vocabulary), np.bool_)
            for i, own in enumerate(_arrays.items(allowed, "allowed")):
                mask = CHECKS["allowed"](f"allowed[{i}]", own, ())
                if mask is not None:
                    as_bytes, packed = mask_bytes(f"allowed[{i}]", mask, (vocabulary,))
                    masks[i] = unpacked(as_bytes, vocabulary) if packed else as_bytes
            return masks
        array: Array = CHECKS["allowed"]("allowed", allowed, ())
        shapes = {np.dtype(np.bool_): (rows, vocabulary), np.dtype(np.uint32): (rows, -(-vocabulary // 32))}
        own = array[0] if array.ndim == 3 and len(array) == 1 else array
        if own.shape != shapes.get(array.dtype):
            bools, words = shapes.values()
            raise ValueError(
                f"allowed: expected a mask for each active row, of shape {bools} for bool or {words} for packed int32, "
                f"or a list of {rows}, got {array.dtype} of shape {array.shape}"
            )
        return own

    def _without_banned(self, mask: Array | None) -> Array | None:
        """Return a step's masks, without what rows have banned after their histories."""
        active = self._active
        banned = {}
        for at in active.banning:
            row = active.rows[at]
            length = int((active.position[at : at + 1] - row.settings.position)[0])
            ids = row.bans.next(self._histories.tokens_of(row.slot), length - row.prompt)
            if ids.size:
                banned[at] = ids
        if not banned:
            return mask
        rows = len(active.rows)
        masks = np.ones((rows, self.vocabulary), np.bool_) if mask is None else self._bools(mask).copy()
        for at, ids in banned.items():
            masks[at, ids] = False
        return masks

    def _both(self, own: Array | None, mask: Array) -> Array:
        return mask if own is None else own & self._bools(mask)

    def _bools(self, mask: Array) -> Array:
        if mask.dtype == np.uint32:
            return unpacked(np.ascontiguousarray(mask).view(np.uint8), self.vocabulary)
        return mask

    def _with(self, rows: list[_Row], position: Array) -> _Active:
        """Batch the settings of these rows, so that a step has nothing to do with them."""
        penalties = {name: np.array([row.penalties[name] for row in rows]) for name in with_windows(DEFAULTS)}
        before = {group.handles: group for group in self._active.groups}
        runs = [list(run) for _, run in groupby(rows, _Row.kind)]
        if len(rows) < _ROWS_PER_CALL * len(runs):
            runs = [list(run) for _, run in groupby(rows, _Row.words)]
        groups, end = [], 0
        for members in runs:
            handles = tuple(row.handle for row in members)
            start, end = end, end + len(members)
            if handles in before:
                groups.append(before[handles]._replace(rows=slice(start, end)))
            else:
                streams = np.array([row.stream for row in members])
                groups.append(_Group(handles, slice(start, end), self._batched(members), streams))
        slots = np.array([row.slot for row in rows], np.int64)
        penalized = any(on.any() for on in penalizes(penalties))
        banning = tuple(at for at, row in enumerate(rows) if row.bans.any())
        return _Active(tuple(rows), tuple(groups), slots, position, penalties, penalized, banning)

    def _batched(self, members: list[_Row]) -> Settings:
        off: dict[str, Any] = OFF | {
            "allowed": np.full(self.vocabulary, True),
            "logit_bias": np.zeros(self.vocabulary, np.float32),
        }
        batched: dict[str, Any] = {}
        for name, first in vars(members[0].settings).items():
            values = [getattr(row.settings, name) for row in members]
            if name in _WORDS:
                batched[name] = first
            elif all(value is None for value in values):
                batched[name] = None
            else:
                batched[name] = np.array([off[name] if value is None else value for value in values])
        return Settings.of(batched)
