"""Rows of whole models of transformers, stock and with headway inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np

from .harness import Candidate, Contest, Row
from .runtimes import THREADS, from_torch, keeping

CONTEXT = 4096
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LAYER = 2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2816  # weights
HEAD = 128256 * 1024
CACHE = 4 * 2 * 8 * 64  # numbers of keys and values for a token


def rows() -> Iterator[Row]:
    """Yield prefill, decoding and generate, of float32 and bfloat16."""
    section = "a model of transformers"
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        flops = 2.0 * 512 * 4 * LAYER + 4 * 2.0 * 512**2 * 1024 + 2.0 * HEAD
        yield Row(section, f"prefill, L=512, {dtype}", partial(prefill, dtype), flops, "fma")
        read = float(size * (4 * LAYER + HEAD + CONTEXT * CACHE))
        yield Row(section, f"decode, context 4,096, {dtype}", partial(decode, dtype), read, "read")
    yield Row(section, "generate, 16 tokens, top_p 0.95, float32", generate)


def _models(dtype: str) -> dict[str, Callable[[], Any]]:
    """Return how each candidate's model is made, of weights that all share."""

    @cache
    def weights() -> Any:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()

    def own() -> Any:
        return copy.deepcopy(weights(), {id(p): p for p in weights().parameters()})

    def stock(attention: str) -> Any:
        model = own()
        model.set_attn_implementation(attention)
        return model

    def ours(**options: bool) -> Any:
        from headway.integrations.transformers import enable

        return enable(own(), **options)

    return {
        "transformers, sdpa": partial(stock, "sdpa"),
        "transformers, eager": partial(stock, "eager"),
        "headway, attention": ours,
        "headway, all": partial(ours, linear=True, norms=True),
    }


def _ids(length: int) -> Any:
    import torch

    return torch.from_numpy(np.random.default_rng(0).integers(3, 128256, (1, length)))


def prefill(dtype: str) -> Contest:
    """Score the next token of a prompt of 512."""

    def candidate(make: Callable[[], Any]) -> Candidate:
        model, ids = make(), _ids(512)
        return Candidate(lambda: model(ids, logits_to_keep=1).logits, lambda y: from_torch(y.float()))

    return Contest({name: partial(candidate, make) for name, make in _models(dtype).items()})


def decode(dtype: str) -> Contest:
    """Score the token behind a context of 4,096 from its keys and values."""

    def candidate(make: Callable[[], Any]) -> Candidate:
        import transformers

        model, ids = make(), _ids(CONTEXT + 1)
        cache = transformers.DynamicCache(config=model.config)
        kept = keeping(model, cache)
        for start in range(0, CONTEXT, 512):
            model(ids[:, start : start + 512], logits_to_keep=1, **kept)

        def forget() -> None:
            if beyond := cache.get_seq_length() - CONTEXT:
                cache.crop(-beyond)

        def step() -> Any:
            return model(ids[:, CONTEXT:], **kept).logits

        return Candidate(step, lambda y: from_torch(y.float()), forget, 1)

    return Contest({name: partial(candidate, make) for name, make in _models(dtype).items()})


def generate() -> Contest:
    """Write 16 tokens behind a prompt of 8."""

    def candidate(make: Callable[[], Any], ours: bool) -> Candidate:
        from headway.integrations.transformers import generate as draw

        model, ids = make(), _ids(8)
        options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 0.95, "max_new_tokens": 16}
        more = {"custom_generate": draw, "seed": 1} if ours else {}
        return Candidate(lambda: model.generate(ids, **options, **more))

    models = _models("float32")
    return Contest({name: partial(candidate, make, name.startswith("headway")) for name, make in models.items()})
