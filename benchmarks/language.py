"""Rows of headway.lm: prefill and decoding of models of known shapes, with random weights, each library from a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Array, Candidate, Contest, Row
from .runtimes import THREADS, from_torch, keeping

MODELS = Path(__file__).parent.parent / "build" / "bench" / "models"
COMMON: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "head_dim": 64,
    "rope_theta": 10000.0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "2 layers of Llama-1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
BYTES = {"float32": 4, "bfloat16": 2}


def rows() -> Iterator[Row]:
    """Yield prefill and decoding, of float32 and bfloat16 weights."""
    for shape, sizes in SHAPES.items():
        for dtype in BYTES:
            hidden, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
            keys = 64 * sizes["num_key_value_heads"]
            layer = 2 * hidden**2 + 2 * hidden * keys + 3 * hidden * sizes["intermediate_size"]
            head = sizes["vocab_size"] * hidden
            flops = 2.0 * 512 * layers * layer + 4 * layers * 512**2 * hidden / 2 + 2.0 * head
            yield Row(
                "language models", f"{shape}, prefill, L=512, {dtype}", partial(prefill, shape, dtype), flops, "fma"
            )
            for context in (16, 2048):
                name = f"{shape}, decode, context {context:,}, {dtype}"
                read = float(BYTES[dtype] * (layers * layer + head) + 4 * layers * context * 2 * keys)
                yield Row("language models", name, partial(decode, shape, dtype, context), read, "read")


def ids(length: int) -> Array:
    """Return tokens that all libraries get."""
    return np.random.default_rng(0).integers(300, 30000, length)


def prefill(shape: str, dtype: str) -> Contest:
    """Score the next token of a prompt of 512."""
    prompt = ids(512)

    def ours() -> Candidate:
        from headway import lm

        model = lm.load(checkpoint(shape, dtype))
        return Candidate(lambda: model.session().next_logits(prompt))

    def transformers() -> Candidate:
        import torch

        model, tokens = stock(shape, dtype), torch.from_numpy(prompt[None])
        return Candidate(lambda: model(tokens, logits_to_keep=1).logits, lambda y: from_torch(y)[0, -1])

    def llama_cpp() -> Candidate:
        model = llama(shape, dtype)

        def run() -> Array:
            model.reset()
            model.eval(prompt.tolist())
            return last_logits(model)

        return Candidate(run, lambda y: y.astype("float16" if dtype == "bfloat16" else "float32"))

    builders = {"headway": ours, "transformers": transformers, "llama.cpp": llama_cpp}
    return Contest(builders, exact(shape, dtype, 512))


def decode(shape: str, dtype: str, context: int) -> Contest:
    """Score the token behind a context, to which the others go back; headway's grows by a token in each call."""
    prompt = ids(context + 1)

    def ours() -> Candidate:
        from headway import lm

        session = lm.load(checkpoint(shape, dtype)).session()
        session.next_logits(prompt[:-1])
        return Candidate(lambda: session.next_logits(prompt[-1:]))

    def transformers() -> Candidate:
        import torch
        from transformers import DynamicCache

        model, tokens = stock(shape, dtype), torch.from_numpy(prompt[None])
        cache = DynamicCache(config=model.config)
        kept = keeping(model, cache)
        model(tokens[:, :-1], logits_to_keep=1, **kept)

        def forget() -> None:
            if beyond := cache.get_seq_length() - context:
                cache.crop(-beyond)

        def step() -> Any:
            return model(tokens[:, -1:], **kept).logits

        return Candidate(step, lambda y: from_torch(y)[0, -1], forget, 1)

    def llama_cpp() -> Candidate:
        model = llama(shape, dtype)
        model.reset()
        model.eval(prompt[:-1].tolist())

        def run() -> Array:
            model.n_tokens = context
            model.eval(prompt[-1:].tolist())
            return last_logits(model)

        return Candidate(run, lambda y: y.astype("float16" if dtype == "bfloat16" else "float32"))

    builders = {"headway": ours, "transformers": transformers, "llama.cpp": llama_cpp}
    return Contest(builders, exact(shape, dtype, context + 1))


@cache
def exact(shape: str, dtype: str, length: int) -> Array:
    """Return the logits behind so many tokens from float64 arithmetic, that of rotary positions included."""
    import torch

    class Rotary(torch.nn.Module):  # that of transformers rounds its angles to float32 in any model
        def forward(self, x: Any, position_ids: Any) -> tuple[Any, Any]:
            size = COMMON["head_dim"]
            frequencies = COMMON["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
            return angles.cos(), angles.sin()

    model = copy.deepcopy(stock(shape, dtype)).double()
    model.model.rotary_emb = Rotary()
    logits = model(torch.from_numpy(ids(length)[None]), logits_to_keep=1).logits
    return np.asarray(logits[0, -1].numpy())


# The same weights for all ---------------------------------------------------------------------------------------------


@cache
def stock(shape: str, dtype: str) -> Any:
    """Return transformers' model, of weights that all share."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **SHAPES[shape], bos_token_id=256, eos_token_id=257))
    model.set_attn_implementation("sdpa")
    model.to(getattr(torch, dtype)).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # in float32, as a model that is loaded has it
    return model


def folder(shape: str, dtype: str) -> Path:
    """Return where the model's files are."""
    return MODELS / f"{shape.replace(' ', '-')}-{dtype}"


@cache
def checkpoint(shape: str, dtype: str) -> Path:
    """Write the folder that Hugging Face's libraries write, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    path = folder(shape, dtype)
    stock(shape, dtype).save_pretrained(path)
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return path


@cache
def llama(shape: str, dtype: str) -> Any:
    """Write a GGUF file, and return llama.cpp's model of it."""
    import gguf
    from llama_cpp import Llama

    path, sizes = folder(shape, dtype).with_suffix(".gguf"), SHAPES[shape]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(COMMON["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_hidden_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(64)
    writer.add_value_length(64)
    writer.add_rope_dimension_count(64)
    writer.add_rope_freq_base(COMMON["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(sizes["vocab_size"])])
    writer.add_token_scores([0.0] * sizes["vocab_size"])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * sizes["vocab_size"])
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    kind = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    for name, tensor in stock(shape, dtype).state_dict().items():
        if name == "lm_head.weight":  # the embeddings
            continue
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        to = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(parts[0]) or f"blk.{parts[1]}.{names[parts[2]]}"
        if to.endswith(("attn_q", "attn_k")):  # its pairs of features for rotary positions are neighbours
            tensor = tensor.reshape(-1, 2, 32, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if tensor.ndim == 1 or dtype == "float32":
            writer.add_tensor(f"{to}.weight", tensor.float().numpy())
        else:
            bits = from_torch(tensor.contiguous())
            writer.add_tensor(f"{to}.weight", bits.view(np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Llama(str(path), n_ctx=4096, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)


def last_logits(model: Any) -> Array:
    """Return the logits of llama.cpp's last token."""
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1), (model.n_vocab(),))
