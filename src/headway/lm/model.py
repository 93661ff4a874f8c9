"""A language model and the texts that it writes. Shapes: L tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import ArrayLike

import headway as hw

from .. import _check
from .._sampling import Bans, Penalties, SamplingOptions, with_options
from .._signatures import Unpack, defaults_of, shows_options
from .checkpoint import Config, Floats, Weights, read_checkpoint
from .session import Session, in_panels
from .text import detokenize, tokenizer_errors, until_stop

if TYPE_CHECKING:
    from tokenizers import Tokenizer
else:  # a name for typing.get_type_hints
    Tokenizer = Any

# How text is drawn where nothing else is said, in Python and by the command.
DEFAULTS = hw.SamplingParams(temperature=0.8, top_p=0.95)


class TextOptions(SamplingOptions, Penalties, Bans, total=False):
    """The options of text: those of `headway.sample` and `headway.penalize`, and the bans of `Sampler.admit`.

    >>> from headway.lm import TextOptions, load
    >>> options: TextOptions = {"temperature": 0.5, "repetition": 1.1, "min_tokens": 2}
    >>> text = load().generate("And God said", max_tokens=3, seed=1, **options)
    """


shows_text_options = shows_options(
    TextOptions,
    dict.fromkeys(TextOptions.__annotations__)
    | defaults_of(hw.SamplingParams)
    | {"temperature": DEFAULTS.temperature, "top_p": DEFAULTS.top_p}
    | {"dry_breakers": (), "min_tokens": 0, "banned_sequences": ()},
)


@_check.public
def load(path: str | PathLike[str] | None = None) -> Model:
    """Load a Hugging Face Llama checkpoint folder, or the small model that ships with headway.

    Args:
        path: a folder with config.json, *.safetensors (float64, float32, float16 or bfloat16) and tokenizer.json.
            None: the shipped model, which writes in the manner of the King James Bible.

    Returns:
        A `Model`. Its matrices are copied into memory once, in the type of the file (float64 as float32), in the order
        that the kernels read them in. The embeddings stay in their file, mapped, which must not change while the model
        is in use.

    Raises:
        FileNotFoundError: a folder or file that is not there.
        NotADirectoryError: a file instead of a folder.
        ValueError: a file that is broken, a tensor that is missing, has another shape or is in two files, an
            architecture that is not Llama's, or a setting of config.json that would change the numbers and is not
            computed here (a sliding window, is_causal: false, quantization_config, ...); the message says which and
            where.

    >>> import headway.lm
    >>> model = headway.lm.load()
    >>> model.config.head_dim
    32
    """
    folder = Path(__file__).with_name("model") if path is None else Path(path)
    return Model(*read_checkpoint(folder))


class Model:
    """A Llama language model: `load` makes one, `generate` and `stream` write text, `logits` scores it.

    Attributes:
        config: its shape.
        weights: its tensors, mapped from their files. Matrices are computed with as they were at the start.
        tokenizer: of the tokenizers library.

    >>> from headway.lm import load
    >>> load().generate("In the beginning God created the heaven and the", max_tokens=1, temperature=0)
    ' earth'
    """

    def __init__(self, config: Config, weights: Weights, tokenizer: Tokenizer) -> None:
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self._panels = in_panels(weights)

    def __repr__(self) -> str:
        return f"Model({self.config!r})"

    @_check.public
    def session(self) -> Session:
        """Start an empty sequence of tokens, with the key/value caches that make the next token cheap.

        Returns:
            A `Session`.

        >>> from headway.lm import load
        >>> len(load().session())
        0
        """
        return Session(self.config, self.weights, self._panels)

    @_check.public
    def logits(self, ids: ArrayLike) -> Floats:
        """Score every token of the vocabulary as the successor of each token of a sequence.

        Args:
            ids: (L,), integers from 0 to V - 1.

        Returns:
            (L, V), float32: row i scores the token that follows ids[: i + 1].

        Raises:
            TypeError: ids that are no integers.
            ValueError: ids outside the vocabulary, or more of them than the context holds.

        >>> from headway.lm import load
        >>> model = load()
        >>> ids = model.tokenizer.encode("In the beginning God created the heaven and the").ids
        >>> model.tokenizer.decode([int(model.logits(ids)[-1].argmax())])
        ' earth'
        """
        return self.session().logits(ids)

    @shows_text_options
    @_check.public
    def generate(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        params: hw.SamplingParams | None = None,
        output_tokens: ArrayLike = (),
        count_prompt: bool = False,
        **options: Unpack[TextOptions],
    ) -> str:
        """Continue a prompt, and return the new text without the prompt.

        The text ends where the model says so (an end-of-text token), at max_tokens, before a stop string, or where
        the context is full: prompt and text together have at most config.max_position_embeddings tokens. It is the text
        of a row of a `headway.Sampler`: one seed gives one text, wherever it stops and goes on with its output_tokens;
        without a seed each is another.

        Args:
            prompt: any text, or the ids of its tokens, (n,). An empty one starts from the model's beginning-of-text
                token.
            max_tokens: draw at most so many tokens.
            stop: end before this string, or before the one of these strings that is complete first.
            params: as in `headway.sample`; `headway.lm.DEFAULTS`, temperature 0.8 and top_p 0.95, unless given.
            output_tokens: (n,), ids that a call before has drawn, with which the text goes on: penalties and min_tokens
                count them as output. They are not returned again.
            count_prompt: as in `headway.Sampler.admit`: whether frequency and presence count the prompt too.
            **options: those of `headway.SamplingParams`, but for uniform, and the penalties of `headway.penalize`; they
                replace what params say. min_tokens, banned_sequences and no_repeat_ngram are those of
                `headway.Sampler.admit`, whose stop_tokens are the model's end-of-text tokens. `allowed` may also be a
                function, which is called before each draw with the list of the tokens drawn so far and returns what
                may come next in a form of `allowed`, or None: a grammar.

        Returns:
            The new text.

        Raises:
            ValueError: a prompt that leaves no room in the context or is no UTF-8, or a bad option.
            TypeError: a prompt that is no text, or an option that is of another kind or does not exist.

        >>> from headway.lm import load
        >>> load().generate("In the beginning God created the heaven and the", max_tokens=1, temperature=0)
        ' earth'
        """
        if "logprobs" in options:
            raise TypeError("logprobs: expected none, since the text is all that comes back; give it to stream")
        pieces = self.stream(
            prompt,
            max_tokens=max_tokens,
            stop=stop,
            params=params,
            output_tokens=output_tokens,
            count_prompt=count_prompt,
            **options,
        )
        return "".join(pieces)

    @shows_text_options
    @_check.public
    def stream(
        self,
        prompt: str | ArrayLike,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        params: hw.SamplingParams | None = None,
        output_tokens: ArrayLike = (),
        count_prompt: bool = False,
        logprobs: int | None = None,
        **options: Unpack[TextOptions],
    ) -> TextStream:
        """Do as `generate` does, but yield the text in pieces, each as soon as it is certain.

        A piece is never half a character, and never the beginning of a stop string; together the pieces are the text of
        `generate`. Bad arguments raise here, before the first piece is asked for.

        Args:
            prompt: as `generate` takes it.
            max_tokens: as `generate` takes it.
            stop: as `generate` takes it.
            params: as `generate` takes them.
            output_tokens: as `generate` takes them.
            count_prompt: as `generate` takes it.
            logprobs: n, from 0 to V, collects log-probabilities of each token and of the n best in
                `TextStream.logprobs`.
            **options: those of `generate`.

        Returns:
            A `TextStream`, an iterator of pieces.

        Raises:
            TypeError, ValueError: as `generate`.

        >>> from headway.lm import load
        >>> model = load()
        >>> pieces = list(model.stream("And God said", max_tokens=8, seed=1))
        >>> "".join(pieces) == model.generate("And God said", max_tokens=8, seed=1)
        True
        >>> prompt = "In the beginning God created the heaven and the"
        >>> stream = model.stream(prompt, max_tokens=1, temperature=0, logprobs=2)
        >>> "".join(stream), [model.tokenizer.decode([token]) for token in stream.logprobs[0].raw.top_tokens]
        (' earth', [' earth', ' end'])
        """
        for name, value in options.items():
            if name not in TextOptions.__annotations__:
                own = ("max_tokens", "stop", "params", "output_tokens", "count_prompt", "logprobs")
                known = (*own, *TextOptions.__annotations__)
                raise TypeError(_check.no_such(name, value, "option", known))
        max_tokens = _check.integer(max_tokens, "max_tokens", 0)
        stops = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) for text in stops):
            raise TypeError(f"stop: expected a string, or a list of strings, got {_check.shown(stop)}")
        if not all(stops):
            raise ValueError("stop: expected strings of at least one character, got an empty one")
        if logprobs is not None:
            logprobs = _check.integer(logprobs, "logprobs", 0, self.config.vocab_size)
        prompt_ids = self._encode(prompt) if isinstance(prompt, str) else self._ids(prompt, "prompt")
        output_ids = self._ids(output_tokens, "output_tokens")
        if not prompt_ids:
            if self.config.bos_token_id is None:
                raise ValueError("prompt: expected text, got none, and the model has no beginning-of-text token")
            prompt_ids = [self.config.bos_token_id]
        context = self.config.max_position_embeddings
        length = len(prompt_ids) + len(output_ids)
        if length >= context:
            raise ValueError(f"prompt: expected less than {context} tokens, the model's context, got {length}")
        grammar = options.pop("allowed") if callable(options.get("allowed")) else None
        chosen = _params(DEFAULTS if params is None else params, **options)
        sampler = hw.Sampler(self.config.vocab_size)
        _admit(sampler, chosen, prompt_ids, output_ids, self.config, count_prompt=count_prompt, **options)
        return TextStream(self, prompt_ids, output_ids, max_tokens, stops, sampler, grammar, logprobs)

    def _encode(self, prompt: str) -> list[int]:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            surrogate = f"{prompt[error.start]!r} at {error.start}"
            raise ValueError(f"prompt: expected text that UTF-8 can write, got a lone surrogate, {surrogate}") from None
        with tokenizer_errors("tokenizer.json: cannot encode the prompt"):
            ids: list[int] = self.tokenizer.encode(prompt).ids
        return ids

    def _ids(self, tokens: ArrayLike, name: str) -> list[int]:
        expected = "text or token ids" if name == "prompt" else "token ids"
        ids = _check.integers(_check.whole(tokens, name, expected), name, 0, self.config.vocab_size - 1)
        if ids.ndim != 1:
            raise ValueError(f"{name}: expected {expected} (n,), got shape {ids.shape}")
        listed: list[int] = ids.tolist()
        return listed


class TextStream(Iterator[str]):
    """The pieces of a text as a model writes it, and what is known about it so far.

    Attributes:
        prompt_ids: the tokens of the prompt.
        output_ids: the output_tokens that the text went on with.
        token_ids: the tokens drawn so far, without one that ends the text.
        logprobs: for each of these, where they were asked for, what `headway.Sampler.step` says of the one row.
        finish_reason: None while the text goes on, then "eos" (the model ended it), "stop" (a stop string),
            "max_tokens", or "context" (no room for another token).

    >>> from headway.lm import load
    >>> stream = load().stream("In the beginning", max_tokens=5, seed=1)
    >>> text = "".join(stream)
    >>> len(stream.token_ids), stream.finish_reason
    (5, 'max_tokens')
    """

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[int],
        output_ids: Sequence[int],
        max_tokens: int,
        stops: Sequence[str],
        sampler: hw.Sampler,
        grammar: Callable[[list[int]], Any] | None,
        logprobs: int | None,
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.output_ids = tuple(output_ids)
        self.token_ids: list[int] = []
        self.logprobs: list[hw.Drawn] = []
        self.finish_reason: Literal["eos", "stop", "max_tokens", "context"] | None = None
        tokens = self._draw(model, max_tokens, sampler, grammar, logprobs)
        context = (*self.prompt_ids, *self.output_ids)
        self._pieces = self._write(detokenize(model.tokenizer, context, tokens), stops)

    def __next__(self) -> str:
        return next(self._pieces)

    def _write(self, pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
        stopped = yield from until_stop(pieces, stops)
        if stopped:
            self.finish_reason = "stop"

    def _draw(
        self,
        model: Model,
        max_tokens: int,
        sampler: hw.Sampler,
        grammar: Callable[[list[int]], Any] | None,
        logprobs: int | None,
    ) -> Iterator[int]:
        """Draw the tokens of the one row of the sampler."""
        session = model.session()
        new: Sequence[int] = (*self.prompt_ids, *self.output_ids)
        while len(self.token_ids) < max_tokens:
            if len(session) + len(new) == model.config.max_position_embeddings:
                self.finish_reason = "context"
                return
            logits = session.next_logits(new)
            allowed = None if grammar is None else [grammar([*self.output_ids, *self.token_ids])]
            drawn = None
            if logprobs is None:
                token = int(sampler.step(logits[None], allowed=allowed)[0])
            else:
                drawn = sampler.step(logits[None], allowed=allowed, logprobs=logprobs)
                token = int(drawn.tokens[0])
            if token in model.config.eos_token_ids:
                self.finish_reason = "eos"
                return
            self.token_ids.append(token)
            if drawn is not None:
                self.logprobs.append(hw.Drawn(token, _of_one_row(drawn.raw), _of_one_row(drawn.processed)))
            yield token
            new = (token,)
        self.finish_reason = "max_tokens"


# Of a text's options some are sampling's, the others a row's. Either function takes all of them and leaves out those of
# the other, since editors on jedi complete what is handed on as **options.
def _params(params: hw.SamplingParams, **options: Any) -> hw.SamplingParams:
    """Return params with the options that are sampling's."""
    for name in (*Penalties.__annotations__, *Bans.__annotations__):
        options.pop(name, None)
    return with_options(params, **options)


def _admit(
    sampler: hw.Sampler,
    params: hw.SamplingParams,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    config: Config,
    **options: Any,
) -> None:
    """Add the one row of a text, with the options that are a row's."""
    for name in SamplingOptions.__annotations__:
        options.pop(name, None)
    if not config.eos_token_ids:  # of which min_tokens would wait for one
        _check.integer(options.pop("min_tokens", 0), "min_tokens", 0)
    sampler.admit(params, prompt_ids, output_ids, stop_tokens=config.eos_token_ids, **options)


def _of_one_row(found: hw.Logprobs) -> hw.Logprobs:
    """Return the log-probabilities of one token as `headway.logprobs` gives those of a lone row."""
    best = (None if values is None else values[0] for values in (found.top_tokens, found.top_logprobs))
    return hw.Logprobs(float(found.logprobs[0]), int(found.ranks[0]), *best)
