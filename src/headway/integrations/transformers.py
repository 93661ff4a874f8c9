"""headway inside transformers (version 5): attention, linear maps, norms, and the draw of `generate`.

Importing this module registers the attention implementation "headway". `enable` switches a model to it.

A row of a batch is computed as it would be alone: its padding is cut off before a kernel sees it. So with `enable` a
row's result does not depend on its neighbours, and neither on whether its tokens come at once or one by one.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

import headway as hw

from .. import _check

try:
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
    from transformers.activations import ACT2CLS
    from transformers.generation import logits_process as processors
    from transformers.masking_utils import sdpa_mask
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        f"headway.integrations.transformers needs transformers 5 and torch ({error}): "
        "pip install 'headway[transformers]'"
    ) from error

__all__ = ["disable", "enable", "generate", "row_options"]

NAME = "headway"  # of the attention implementation
_CHUNK = hw.info().chunk_length


# Masks ----------------------------------------------------------------------------------------------------------------


class _Start(NamedTuple):
    """Where the sequence of a batch item begins.

    key: the first key that is no padding on the left. position: its place in the sequence, 0 unless a cache has
    dropped the keys before it.
    """

    key: int
    position: int


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return the mask of `sdpa`, which knows where the sequence of each batch item begins."""
    mask: torch.Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )
    if mask is None:
        return None
    dropped = int(kv_offset)
    padding = [0] * batch_size
    if attention_mask is not None:
        padding = attention_mask.to(torch.int64).argmax(-1).tolist()
    mask._headway_starts = [_Start(max(n - dropped, 0), max(dropped - n, 0)) for n in padding]  # type: ignore[attr-defined]
    return mask


# Attention ------------------------------------------------------------------------------------------------------------

# What models hand on to every attention, and attention has no use for.
_PASSED_ON = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "sliding_window",  # which the mask has
    "use_cache",
}


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' attention functions do: query (B, H, L, D), key (B, G, S, D) -> (B, L, H, E)."""
    unknown = {name: given for name, given in others.items() if name not in _PASSED_ON and given is not None}
    if unknown:
        name, given = next(iter(unknown.items()))
        raise TypeError(
            f"{name}: no such option of attention in headway, got {_check.shown(given)}; "
            f'use attn_implementation="eager" for this model'
        )
    if dropout:
        raise ValueError(f"dropout: expected 0, got {dropout}; headway is forward only: call `model.eval()`")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = attention_mask is None and is_causal and query.shape[2] > 1
    if causal:  # a static cache has more keys than there are tokens so far
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    options["causal"] = "top_left" if causal else None
    want_weights = bool(output_attentions)
    outs, weights = [], []
    for items, start, end in _alike(attention_mask, query.shape[0], key.shape[2]):
        call = _Call(
            query[items],
            key[items, :, start.key : end],
            value[items, :, start.key : end],
            start.position,
            {**options, **_score_options(attention_mask, position_bias, items, slice(start.key, end))},
        )
        outs.append(call.attend())
        if want_weights:
            own = torch.zeros(*outs[-1].shape[:-1], key.shape[2], dtype=query.dtype)
            own[..., start.key : end] = call.weights()
            weights.append(own)
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.transpose(1, 2).contiguous(), torch.cat(weights) if want_weights else None


def _alike(mask: torch.Tensor | None, batch: int, keys: int) -> Iterator[tuple[slice, _Start, int]]:
    """Yield runs of batch items whose sequences begin and end at the same keys: which items, the start, the end."""
    starts = getattr(mask, "_headway_starts", None) or [_Start(0, 0)] * batch
    ends = [keys] * batch
    if mask is not None and mask.dtype == torch.bool:
        some = mask.any(dim=(1, 2)).expand(batch, -1)
        last = torch.where(some, torch.arange(1, keys + 1), 0).amax(-1)
        ends = [max(end, start.key) for end, start in zip(last.tolist(), starts)]
    first = 0
    for (start, end), run in groupby(zip(starts, ends)):
        length = len(list(run))
        yield slice(first, first + length), start, end
        first += length


def _score_options(
    mask: torch.Tensor | None, position_bias: torch.Tensor | None, items: slice, keys: slice
) -> dict[str, torch.Tensor]:
    """Return mask and bias of some batch items, over some keys."""

    def part(x: torch.Tensor) -> torch.Tensor:
        return x[items if x.shape[0] > 1 else slice(None), ..., keys]

    options = {} if position_bias is None else {"bias": part(position_bias).float()}
    if mask is None:
        return options
    if mask.dtype == torch.bool:
        return {**options, "mask": part(mask)}
    given = part(mask).float()  # numbers to be added, the lowest of its type where a key is masked
    options["mask"] = given > torch.finfo(mask.dtype).min
    options["bias"] = options.get("bias", 0) + torch.where(options["mask"], given, 0)
    return options


class _Call(NamedTuple):
    """One call of attention for some batch items: arrays (b, H or G, length, size)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    position: int  # of the first key
    options: dict[str, Any]

    def attend(self) -> torch.Tensor:
        """Return (b, H, L, E)."""
        if not self.position:
            out: torch.Tensor = hw.attention(self.q, self.k, self.v, **self.options)
            return out
        # A cache has dropped keys that no query sees any more. The bits are those of the whole sequence if the other
        # keys keep their places in the chunks.
        lost = self.position % _CHUNK
        options = {name: given for name, given in self.options.items() if name not in ("sinks", "causal")}
        for name in ("mask", "bias"):
            if name in options:
                options[name] = torch.nn.functional.pad(options[name], (lost, 0))
        k, v = (torch.nn.functional.pad(x, (0, 0, lost, 0)) for x in (self.k, self.v))
        state = hw.partial_attention(self.q, k, v, key_offset=self.position - lost, **options)
        merged: torch.Tensor = hw.merge_attention([state], sinks=self.options["sinks"])
        return merged

    def weights(self) -> torch.Tensor:
        """Return (b, H, L, S)."""
        return hw.attention_weights(self.q, self.k, **self.options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# Models ---------------------------------------------------------------------------------------------------------------


def enable(model: PreTrainedModel, *, linear: bool = False, norms: bool = False) -> PreTrainedModel:
    """Let a model of transformers compute with headway.

    The law of bits is that a row does not depend on its batch, its padding, or on whether it was computed at once or
    token by token. With linear=True and norms=True a model has it. With attention alone bfloat16 models often have it
    too, since rounding hides what the rest of the model adds, but nothing promises it.

    Args:
        model: any model whose attention goes by transformers' AttentionInterface, in evaluation mode. It is changed in
            place.
        linear: also the linear maps: `torch.nn.Linear`, GPT-2's `Conv1D`, experts and their routers; and torch's
            activations and rotary angles, which are computed such that no number depends on its place.
        norms: also the RMSNorms. LayerNorm stays torch's, which computes each row on its own.

    Returns:
        The model.

    Raises:
        TypeError: something else than a model of transformers.
        ValueError: a model in training mode, or not in CPU memory; a model whose attention is its own.

    >>> import torch, transformers as hf
    >>> from headway.integrations.transformers import enable
    >>> shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    >>> config = hf.LlamaConfig(**shape, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    >>> model = enable(hf.LlamaForCausalLM(config).eval(), linear=True, norms=True)
    >>> ids = torch.arange(3, 19)[None]
    >>> with torch.no_grad():
    ...     torch.equal(model(ids).logits[:, :7], model(ids[:, :7]).logits)
    True
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a model of transformers, got {_check.shown(model)}")
    if model.training:
        raise ValueError("model: expected one in evaluation mode, got one in training; call `model.eval()`")
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError('model: expected one in CPU memory, got one elsewhere; call `model.to("cpu")`')
    linear, norms = _check.boolean(linear, "linear"), _check.boolean(norms, "norms")
    disable(model)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"model: expected one whose attention goes by transformers' AttentionInterface, got "
            f"{type(model).__name__}, whose attention is its own"
        )
    model.__dict__["_headway_before"] = before
    for module in model.modules():
        kind = type(module)
        if linear and kind is torch.nn.Linear:
            module.forward = functools.partial(_linear, module, transposed=True)
        elif linear and kind is Conv1D:
            module.forward = functools.partial(_linear, module, transposed=False)
        elif linear and kind in _ACTIVATIONS:
            module.forward = functools.partial(_by_element, module)
        elif linear and kind.__name__.endswith("RotaryEmbedding"):
            module.forward = functools.partial(_by_position, module)
        elif linear and hasattr(kind, "_apply_gate") and hasattr(module, "is_transposed"):
            module.forward = functools.partial(_experts, module)
        elif linear and kind.__name__.endswith("Router") and isinstance(getattr(module, "weight", None), torch.Tensor):
            module.forward = functools.partial(_router, module)
        elif norms and kind.__name__.endswith("RMSNorm"):
            module.forward = functools.partial(_rms_norm, module, offset=_offset_of(module))
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Take back what `enable` did.

    Args:
        model: a model of transformers; one that is not enabled stays as it is.

    Returns:
        The model.

    >>> import transformers as hf
    >>> from headway.integrations.transformers import disable, enable
    >>> shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    >>> config = hf.LlamaConfig(**shape, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    >>> disable(enable(hf.LlamaForCausalLM(config).eval())).config._attn_implementation
    'sdpa'
    """
    before = model.__dict__.pop("_headway_before", None)
    if before is not None:
        model.set_attn_implementation(before)
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, functools.partial) and forward.func in _FORWARDS:
            del module.forward
    return model


def _linear(module: Any, x: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    return hw.linear(x, module.weight.detach().T if transposed else module.weight.detach(), _held(module.bias))


def _held(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach()


# torch computes exp, tanh, cos and their like with vectors, and with other functions for the last numbers of an array
# or of a thread's part of it: the result depends on where a number lies. In arrays of whole vectors that one thread
# computes it does not.
_WHOLE = 64  # numbers: whole vectors on any machine
_ONE_THREAD = 2**15  # numbers: up to so many, torch leaves to one thread
_ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} - {functools.partial}


def _by_element(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply an activation, whose result at a number depends on nothing else."""
    return _each(functools.partial(type(module).forward, module), x)


def _each(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of each number."""
    flat = x.reshape(-1)
    whole = torch.nn.functional.pad(flat, (0, -flat.numel() % _WHOLE))
    parts = [function(part) for part in torch.split(whole, _ONE_THREAD)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: flat.numel()].reshape(x.shape)


def _by_position(module: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the cosines and sines of positions (B, L), each of which depends on its position alone."""
    flat = position_ids.reshape(1, -1)
    whole = torch.nn.functional.pad(flat, (0, -flat.shape[1] % _WHOLE))
    parts = [type(module).forward(module, x, part, *args, **kwargs) for part in torch.split(whole, _WHOLE, 1)]
    joined = (torch.cat(part, 1)[:, : flat.shape[1]] for part in zip(*parts))
    return tuple(part.reshape(*position_ids.shape, part.shape[-1]) for part in joined)


def _experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Apply to each token the experts that are chosen for it, and add up in the order in which they are chosen."""

    def projected(x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = getattr(module, name).detach()[expert]
        bias = getattr(module, f"{name}_bias").detach()[expert] if module.has_bias else None
        y: torch.Tensor = hw.linear(x, weight if module.is_transposed else weight.T, bias)
        return y

    def gated(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        return y

    first = "gate_up_proj" if module.has_gate else "up_proj"
    out = hidden_states.new_zeros(*top_k_index.shape, hidden_states.shape[-1], dtype=torch.float32)
    for expert in sorted(set(top_k_index.flatten().tolist())):
        if expert >= module.num_experts:  # which has no part in the result
            continue
        tokens, places = torch.where(top_k_index == expert)
        y = projected(_by_row(gated, projected(hidden_states[tokens], first, expert)), "down_proj", expert)
        y = module.post_expert_norm(y) if module.has_post_expert_norm else y
        out[tokens, places] = (y * top_k_weights[tokens, places, None]).float()
    total = out[:, 0]
    for place in range(1, out.shape[1]):
        total = total + out[:, place]
    return total.to(hidden_states.dtype)


def _by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function of each number of rows (n, size), whose result at a number depends on nothing else."""
    rows = _WHOLE // math.gcd(x.shape[1], 2 * _WHOLE) * 2 or 1  # so many hold whole vectors, halves of rows too
    rows *= max(_ONE_THREAD // (rows * x.shape[1]), 1)
    whole = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % rows))
    return torch.cat([function(part) for part in torch.split(whole, rows)])[: len(x)]


_OF_EACH = (torch.sigmoid, torch.Tensor.sigmoid, torch.nn.functional.sigmoid, torch.nn.functional.softplus)


class _Routing(TorchFunctionMode):
    """Puts what routers compute under the contract: linear maps, and functions of each number."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            given = bias[0] if bias else (kwargs or {}).get("bias")
            return hw.linear(x, weight.detach().T, _held(given))
        if function in _OF_EACH and len(args) == 1 and not kwargs:
            return _each(function, args[0])
        return function(*args, **(kwargs or {}))


def _router(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Choose the experts of each token."""
    with _Routing():
        return type(module).forward(module, *args, **kwargs)


def _rms_norm(module: Any, x: torch.Tensor, *, offset: float) -> torch.Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6))
    weight = module.weight.detach()
    out: torch.Tensor = hw.rms_norm(x, weight + offset if offset else weight, eps=eps)
    return out.to(x.dtype)


_FORWARDS = (_linear, _by_element, _by_position, _experts, _router, _rms_norm)


def _offset_of(module: Any) -> float:
    """Return what an RMSNorm adds to its weight: 1 in Gemma's."""
    with torch.no_grad():
        found = module(torch.ones(1, *module.weight.shape, dtype=module.weight.dtype)).float() - module.weight.float()
    return float(found.mean().round())


# The draw of `generate` -----------------------------------------------------------------------------------------------

# The processors that transformers makes of a GenerationConfig, and headway does itself.
_DRAWN_BY_HEADWAY = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
)


def row_options(config: GenerationConfig) -> dict[str, Any]:
    """Return what a GenerationConfig says of a row beside `SamplingParams.from_generation_config`.

    Args:
        config: of transformers; None there is unset.

    Returns:
        Options of `Sampler.admit`: repetition, no_repeat_ngram.

    >>> from transformers import GenerationConfig
    >>> row_options(GenerationConfig(repetition_penalty=1.2))
    {'repetition': 1.2}
    """
    options: dict[str, Any] = {}
    if config.repetition_penalty not in (None, 1.0):
        options |= {"repetition": config.repetition_penalty}
    if config.no_repeat_ngram_size:
        options["no_repeat_ngram"] = config.no_repeat_ngram_size
    return options


class _Draw:
    """A logits processor that leaves one token of each row, which a `Sampler` draws.

    Where scores are asked for, it keeps what they are without it: the log-probabilities that each token is drawn by.
    """

    def __init__(self, rows: list[dict[str, Any]], keeps_scores: bool) -> None:
        self.rows = rows  # the arguments of `Sampler.admit`
        self.sampler: hw.Sampler | None = None
        self.scores: list[torch.Tensor] | None = [] if keeps_scores else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.sampler is None:
            self.sampler = hw.Sampler(scores.shape[-1])
            for row in self.rows:
                self.sampler.admit(**row)
        left = torch.full_like(scores, -torch.inf)
        if self.scores is None:
            tokens = self.sampler.step(scores)
        else:
            tokens, _, processed = self.sampler.step(scores, logprobs=scores.shape[-1])
            found = torch.full_like(processed.top_logprobs, -torch.inf)
            some = processed.top_tokens >= 0
            rows = torch.arange(len(scores))[:, None].expand_as(some)
            found[rows[some], processed.top_tokens[some]] = processed.top_logprobs[some]
            self.scores.append(found)
        left[torch.arange(len(scores)), tokens] = 0
        return left


def generate(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    seed: int | Sequence[int] | torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Draw the tokens of `model.generate` with a `headway.Sampler`, as `custom_generate`.

    The options are those of the GenerationConfig, in the order and with the boundaries of transformers
    (`dialect="hf"`). Each draw has the position of its token in the row's own sequence, so that neither padding nor the
    other rows have a part in it. Logits processors of the caller's own, and a watermark's, come before headway's.
    output_scores gives the log-probabilities that tokens are drawn by.

    Args:
        model: as transformers hands it over, like input_ids, logits_processor, stopping_criteria, generation_config and
            the rest.
        input_ids: (B, L).
        logits_processor: the processors of transformers; those that headway does itself are left out.
        stopping_criteria: of transformers.
        generation_config: of transformers.
        seed: a whole number below 2^64, of which row i draws from stream i; or one for each row, (B,). None is fresh
            entropy.
        **kwargs: of transformers.

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: beams, drafts, or an option that has no meaning in headway.

    >>> import torch, transformers as hf
    >>> from headway.integrations.transformers import enable, generate
    >>> shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    >>> config = hf.LlamaConfig(**shape, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    >>> model = enable(hf.LlamaForCausalLM(config).eval(), linear=True, norms=True)
    >>> draw = {"custom_generate": generate, "do_sample": True, "seed": 7, "max_new_tokens": 5}
    >>> model.generate(torch.arange(3, 9)[None], **draw).shape
    torch.Size([1, 11])
    """
    if (generation_config.num_beams or 1) > 1:
        raise ValueError(f"num_beams: expected 1, got {generation_config.num_beams}; headway draws, and has no beams")
    if lookup := generation_config.prompt_lookup_num_tokens:
        raise ValueError(
            f"prompt_lookup_num_tokens: expected None, got {lookup}; headway.Sampler.verify accepts and replaces drafts"
        )
    params = hw.SamplingParams.from_generation_config(generation_config)
    batch = len(input_ids)
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    mask = kwargs.get(name)
    real = np.ones(input_ids.shape, np.bool_) if mask is None else mask[:, -input_ids.shape[1] :].bool().numpy()
    seeds = None if seed is None else _check.integers(seed, "seed", 0, 2**64 - 1)
    if seeds is not None and seeds.ndim and seeds.shape != (batch,):
        raise ValueError(f"seed: expected one integer, or {batch}, one for each row, got shape {seeds.shape}")
    rows = []
    for i, (ids, own) in enumerate(zip(input_ids.numpy(), real)):
        row: dict[str, Any] = {"params": params, "prompt_tokens": ids[own], **row_options(generation_config)}
        if seeds is not None:
            row |= {"seed": int(np.broadcast_to(seeds, (batch,))[i]), "stream": 0 if seeds.ndim else i}
        rows.append(row)
    kept = [one for one in logits_processor if not isinstance(one, _DRAWN_BY_HEADWAY)]
    greedy = copy.copy(generation_config)
    greedy.do_sample = False
    draw = _Draw(rows, bool(generation_config.output_scores and generation_config.return_dict_in_generate))
    out = model._sample(input_ids, type(logits_processor)([*kept, draw]), stopping_criteria, greedy, **kwargs)
    if draw.scores is not None:
        out["scores"] = tuple(draw.scores)
    return out
