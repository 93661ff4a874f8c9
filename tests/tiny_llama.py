"""Tiny Llama checkpoints of any shape, written by hand, and their logits in plain float64 NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = 256, 257  # after the 256 bytes
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def byte_tokenizer() -> Tokenizer:
    """One token to a byte, so that a character outside ASCII takes several."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def make_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors under Hugging Face's names, (out, in)."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocabulary = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q = config["num_attention_heads"] * head_dim
    kv = config.get("num_key_value_heads", config["num_attention_heads"]) * head_dim
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes[at + "input_layernorm.weight"] = shapes[at + "post_attention_layernorm.weight"] = (hidden,)
        parts = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        for name, shape in parts.items():
            shapes[f"{at}self_attn.{name}.weight"] = shape
            if config["attention_bias"]:
                shapes[f"{at}self_attn.{name}.bias"] = shape[:1]
        parts = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        for name, shape in parts.items():
            shapes[f"{at}mlp.{name}.weight"] = shape
            if config["mlp_bias"]:
                shapes[f"{at}mlp.{name}.bias"] = shape[:1]
    return {
        name: (rng.normal(size=shape) / math.sqrt(shape[-1])).astype(np.float32)
        if len(shape) == 2
        else rng.normal(1, 0.2, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    """Write the format by hand: length, header, bytes. bfloat16 is cut off, not rounded."""
    header, blobs, offset = {}, [], 0
    for name, tensor in tensors.items():
        if dtype == "BF16":
            blob = (tensor.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            blob = tensor.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1"}[dtype]).tobytes()
        offsets = [offset, offset + len(blob)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def write_checkpoint(
    folder: Path, *, dtype: str = "F32", shards: int = 1, index: bool = False, seed: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Write a whole checkpoint folder, and return its config and weights."""
    config = {**CONFIG, **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    weights = make_weights(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    names = list(weights)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, part in files.items():
        write_safetensors(folder / file, {name: weights[name] for name in part}, dtype)
    if index:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return config, weights


def oracle_frequencies(config: dict[str, Any]) -> np.ndarray:
    """Rotary frequencies as transformers defines them, in float64."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        wavelengths = 2 * np.pi / frequencies
        context, low, high = (
            rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        smooth = (context / wavelengths - low) / (high - low)
        blended = (1 - smooth) * frequencies / rope["factor"] + smooth * frequencies
        slow, fast = wavelengths > context / low, wavelengths < context / high
        return np.where(slow, frequencies / rope["factor"], np.where(fast, frequencies, blended))
    return frequencies


def oracle_logits(config: dict[str, Any], weights: dict[str, np.ndarray], ids: Any) -> np.ndarray:
    """Compute a Llama's logits, one head at a time, in float64: ids (L,) -> (L, V)."""
    weights = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads", heads)
    frequencies = oracle_frequencies(config)
    size = 2 * len(frequencies)
    turn = np.exp(1j * np.outer(np.arange(len(ids)), frequencies))
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{name}.weight"]

    def rotate(x: np.ndarray) -> np.ndarray:
        turned = (x[:, : size // 2] + 1j * x[:, size // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = weights["model.embed_tokens.weight"][np.asarray(ids)]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        q, k, v = (linear(h, f"{at}.self_attn.{name}_proj") for name in "qkv")
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            part = slice(group * size, (group + 1) * size)
            scores = rotate(q[:, head * size : (head + 1) * size]) @ rotate(k[:, part]).T / math.sqrt(size)
            scores = np.exp(scores + future - (scores + future).max(-1, keepdims=True))
            outputs.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(np.concatenate(outputs, axis=1), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gate = linear(h, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = "lm_head" if "lm_head.weight" in weights else "model.embed_tokens"
    return linear(norm(x, "model.norm"), head)
