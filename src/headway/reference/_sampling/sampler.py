"""A sampler for serving loops: rows come and go."""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import numpy as np

from .call import mask_of, through_stages
from .logprobs import Logprobs, of_distribution
from .masses import AnyArray, float32, floats
from .penalties import penalize
from .rng import draw_from, philox
from .sample import masses


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
        tokens, filtered, final = [], np.full(np.shape(logits), -np.inf), np.zeros(np.shape(logits), np.int64)
        for i, (z, (handle, row)) in enumerate(zip(floats(logits), self.rows.items(), strict=True)):
            penalized = penalize(z, row["history"], **row["penalties"])
            mask = None if allowed is None else mask_of(allowed[i], z.shape)
            if mask is not None:
                penalized[~mask] = -np.inf
            penalized[self.banned(handle)] = -np.inf
            # As row number `stream` of a batch with this seed.
            position = (row["start"] + len(row["history"])) % 2**64
            block = philox(int(row["seed"]), int(row["stream"]), position)
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
