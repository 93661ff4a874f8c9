"""A sampler for serving loops: rows come and go."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .call import mask_of, through_stages
from .logprobs import Logprobs, of_distribution
from .masses import AnyArray, float32, floats
from .penalties import penalize
from .rng import draw_from, philox
from .sample import masses
from .speculative import Verified, verify_row


class Drawn(NamedTuple):
    """Tokens (rows,), and where they stand among the logits as given, and in the distribution they were drawn from."""

    tokens: AnyArray
    raw: Logprobs
    processed: Logprobs


class Lazy(Sequence[AnyArray]):
    """What a function gives for each place, when it is asked for: errors come from what is looked at alone."""

    def __init__(self, length: int, function: Callable[[int], AnyArray]) -> None:
        self.length, self.function = length, function

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        return self.function(place)


class Sampler:
    """Rows that come and go: each is penalized and sampled on its own.

    Args:
        vocabulary: V.

    >>> from headway import reference
    >>> sampler = reference.Sampler(3)
    >>> row = sampler.admit(None, [2], seed=1, repetition=2.0)
    >>> sampler.step([[0.0, 1.0, 9.0]])
    array([2])
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.admitted = 0
        self.rows: dict[int, dict[str, Any]] = {}
        self.streams: dict[int, int] = {}  # of each seed of a row, the highest that rows with it have had

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
        """Add a row behind the others, whose next token comes behind prompt and output.

        Args:
            params: `headway.SamplingParams`, or None.
            prompt_tokens: (n,), ids.
            output_tokens: (n,), ids.
            seed: the row's; None is that of params, or fresh entropy where that is None too.
            stream: of the seed. None is the lowest that no active row with the seed of params has, and 0 beside a seed
                of the row's own.
            count_prompt: whether frequency and presence count the prompt.
            stop_tokens: ids that are banned until the output has min_tokens.
            min_tokens: how many tokens the output has before any of stop_tokens.
            banned_sequences: ids and lists of ids: the last id of each is banned where the history ends with those
                before it.
            no_repeat_ngram: n: no n tokens come twice; None allows it.
            **penalties: those of `headway.penalize`.

        Returns:
            The row's handle.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> sampler.admit(None, [2]), sampler.admit()
        (0, 1)
        """
        of_params = getattr(params, "seed", None) if seed is None else None
        if of_params is not None:
            seed = of_params
            free = self._free_stream(seed)
        else:
            free = 0
        row = {
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
        return self._added(row)

    def _added(self, row: dict[str, Any]) -> int:
        """Keep a new row, and the stream that it has; return its handle."""
        self.rows[self.admitted] = row
        self.streams[row["seed"]] = max(self.streams.get(row["seed"], 0), row["stream"])
        self.admitted += 1
        return self.admitted - 1

    def step(self, logits: Any, *, allowed: Any = None, logprobs: int | None = None) -> Any:
        """Draw one token for each row.

        Args:
            logits: (rows, V), in the order in which the rows came.
            allowed: a mask for each row, in any form of `allowed`, or None; or an array of the mask of a lone row.
            logprobs: n, for the logarithms of the tokens' probabilities too, and of the best n.

        Returns:
            int64 (rows,); with logprobs the fields of `headway.Drawn`.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> row = sampler.admit(seed=1)
        >>> sampler.step([[0.0, 1.0, 9.0]], allowed=[[0, 1]])
        array([1])
        """
        tokens, filtered, final = [], np.full(np.shape(logits), -np.inf), np.zeros(np.shape(logits), np.int64)
        masks = _of_rows(allowed, len(self.rows), 2)
        for i, (z, (handle, row)) in enumerate(zip(floats(logits), self.rows.items(), strict=True)):
            penalized = self._changed(handle, z, masks[i])
            block = self._block(row, len(row["history"]))
            (drawn,) = through_stages(penalized, row["params"], {}, [block])
            filtered[i, drawn.ids], final[i] = drawn.z, drawn.final_masses()
            tokens.append(draw_from(final[i], block[0]))
        for token, row in zip(tokens, self.rows.values()):
            row["history"].append(token)
        drawn_tokens = np.array(tokens, np.int64)
        if logprobs is None:
            return drawn_tokens
        z, top = floats(logits), logprobs or None
        raw = of_distribution(z.dtype, float32(z), masses(z), drawn_tokens, top, False)
        return Drawn(drawn_tokens, raw, of_distribution(z.dtype, filtered, final, drawn_tokens, top, True))

    def fork(self, handle: int, *, seed: Any = None, stream: int | None = None) -> int:
        """Add a row that goes on from where another is, in a stream of its own.

        Args:
            handle: that of the other row.
            seed: the new row's; None is the other's.
            stream: of the seed. None is one above all that rows with the other's seed have had while one of them was
                there, and 0 beside a seed of its own.

        Returns:
            The new row's handle.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> row = sampler.admit(seed=1)
        >>> sampler.fork(row)
        1
        """
        row = {**self.rows[handle], "history": list(self.rows[handle]["history"])}
        row["stream"] = (self.streams[row["seed"]] + 1) % 2**64 if seed is None else 0
        if seed is not None:
            row["seed"] = seed
        if stream is not None:
            row["stream"] = stream
        return self._added(row)

    def _free_stream(self, seed: Any) -> int:
        """The lowest stream that no row with this seed has."""
        taken = {row["stream"] for row in self.rows.values() if row["seed"] == seed}
        return min(set(range(len(taken) + 1)) - taken)

    def verify(
        self,
        target_logits: Any,
        draft_tokens: Any,
        draft_logits: Any = None,
        *,
        lengths: Any = None,
        draft_params: Any = None,
        allowed: Any = None,
    ) -> Verified:
        """For each row, what `verify_draft` makes of its places, each penalized and banned after the tokens before it.

        Args:
            target_logits: (rows, n + 1, V).
            draft_tokens: (rows, n), ids.
            draft_logits: (rows, n, V), or None where the draft has no choice.
            lengths: (rows,), how many of a row's drafted tokens count, the first ones; None is all.
            draft_params: those of the draft; None is each row's own, with its penalties and bans.
            allowed: for each row a mask for each place, or None; or an array of the masks of a lone row.

        Returns:
            The fields of `headway.Verified`.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> row = sampler.admit(seed=1)
        >>> sampler.verify([[[0.0, 99.0, 0.0], [99.0, 0.0, 0.0]]], [[1]])
        Verified(accepted=array([1]), next_token=array([0]), tokens=array([[1, 0]]))
        """
        target, tokens = floats(target_logits), np.asarray(draft_tokens, np.int64)
        rows, n = target.shape[0], target.shape[1] - 1
        counts = np.broadcast_to(n if lengths is None else np.asarray(lengths), (rows,))
        drafts = [None] * rows if draft_logits is None else list(floats(draft_logits))
        masks = _of_rows(allowed, rows, 3)
        found = [
            self._verify_one(handle, target[i], tokens[i, : counts[i]].tolist(), drafts[i], draft_params, masks[i])
            for i, handle in enumerate(self.rows)
        ]
        chain = np.full((rows, n + 1), -1, np.int64)
        for i, (handle, (count, token)) in enumerate(zip(self.rows, found)):
            chain[i, : count + 1] = [*tokens[i, :count], token]
            self.rows[handle]["history"] += chain[i, : count + 1].tolist()
        accepted, following = (np.array([pair[j] for pair in found], np.int64) for j in range(2))
        return Verified(accepted, following, chain)

    def _verify_one(
        self, handle: int, target: AnyArray, tokens: list[int], draft: AnyArray | None, draft_params: Any, masks: Any
    ) -> tuple[int, int]:
        """How many tokens of a row are accepted, and the next one; target (places, V), draft (places - 1, V)."""
        row = self.rows[handle]
        start = len(row["history"])
        blocks = [self._block(row, start + place) for place in range(len(tokens) + 1)]

        def masses_of_row(logits: AnyArray, place: int) -> AnyArray:
            changed = self._changed(handle, logits, None if masks is None else masks[place], tokens[:place])
            return through_stages(changed, row["params"], {}, [blocks[place]])[0].final_masses()

        def masses_of_draft(place: int) -> AnyArray:
            if draft is None:  # all is the drafted token's
                return np.asarray(np.arange(self.vocabulary) == tokens[place], np.int64)
            if draft_params is None:
                return masses_of_row(draft[place], place)
            return through_stages(draft[place], draft_params, {}, [blocks[place]])[0].final_masses()

        p = Lazy(len(tokens) + 1, lambda place: masses_of_row(target[place], place))
        return verify_row(p, Lazy(len(tokens), masses_of_draft), tokens, blocks)

    def retire(self, handle: int) -> None:
        """Remove a row.

        Args:
            handle: the row's.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> sampler.retire(sampler.admit())
        >>> len(sampler.rows)
        0
        """
        seed = self.rows.pop(handle)["seed"]
        if all(row["seed"] != seed for row in self.rows.values()):
            del self.streams[seed]

    def _changed(self, handle: int, z: AnyArray, allowed: Any, more: Sequence[int] = ()) -> AnyArray:
        """Logits (V,) with the penalties of a row's history and more tokens, -inf where a token is banned."""
        row = self.rows[handle]
        penalized = penalize(z, [*row["history"], *more], **row["penalties"])
        mask = mask_of(allowed, z.shape)
        if mask is not None:
            penalized[~mask] = -np.inf
        penalized[self._banned(handle, more)] = -np.inf
        return penalized

    def _block(self, row: dict[str, Any], length: int) -> tuple[int, ...]:
        """The random words after so many tokens: those of row number `stream` of a batch with this seed."""
        return philox(int(row["seed"]), int(row["stream"]), (row["start"] + length) % 2**64)

    def _banned(self, handle: int, more: Sequence[int] = ()) -> list[int]:
        """The tokens that a row may not draw next, after its history and more tokens."""
        row = self.rows[handle]
        stop_tokens, min_tokens, sequences, n = row["bans"]
        history = [*row["history"], *more]
        found = {token for token in stop_tokens if len(history) - row["prompt"] < min_tokens}
        # A token without a logit is equal to none.
        history = [token if 0 <= token < self.vocabulary else -1 - i for i, token in enumerate(history)]
        found |= {last for *before, last in sequences if history[len(history) - len(before) :] == before}
        if n is not None:
            runs = [history[i : i + n] for i in range(len(history) - n + 1)]
            found |= {last for *before, last in runs if history[len(history) - n + 1 :] == before}
        return sorted(token for token in found if token >= 0)

    def history(self, handle: int) -> AnyArray:
        """Return the tokens of a row.

        Args:
            handle: the row's.

        Returns:
            int64 (n,), prompt and output, the oldest first.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> sampler.history(sampler.admit(None, [2], [0]))
        array([2, 0])
        """
        return np.array(self.rows[handle]["history"], np.int64)

    def force(self, handle: int, token: int) -> None:
        """Put a token behind a row's output.

        Args:
            handle: the row's.
            token: its id.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> row = sampler.admit(None, [2])
        >>> sampler.force(row, 1)
        >>> sampler.history(row)
        array([2, 1])
        """
        self.rows[handle]["history"].append(token)

    def truncate(self, handle: int, length: int) -> None:
        """Keep the first tokens of a row.

        Args:
            handle: the row's.
            length: how many, prompt included.

        >>> from headway import reference
        >>> sampler = reference.Sampler(3)
        >>> row = sampler.admit(None, [2], [0, 1])
        >>> sampler.truncate(row, 2)
        >>> sampler.history(row)
        array([2, 0])
        """
        del self.rows[handle]["history"][length:]


def _of_rows(allowed: Any, rows: int, axes: int) -> Any:
    """Masks row by row; an array of so many axes has one for rows, which a lone row's may lack."""
    if allowed is None:
        return [None] * rows
    return [allowed] if rows == 1 and np.ndim(allowed) == axes - 1 and not isinstance(allowed, list) else allowed
