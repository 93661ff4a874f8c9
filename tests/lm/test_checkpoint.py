"""Checkpoints: what is read from them, and what is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutated
from tiny_llama import (
    EOS,
    LLAMA3,
    byte_tokenizer,
    write_checkpoint,
    write_safetensors,
)

import headway.lm
from headway.lm.checkpoint import widened

Damage = Callable[[Path], object]  # done to a checkpoint folder


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_floating_type_is_read_exactly(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # bfloat16 is to be read without it
    _, weights = write_checkpoint(tmp_path, dtype=dtype)
    if dtype == "BF16":
        kept = {name: (w.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, w in weights.items()}
    else:
        kept = {name: w.astype(np.float16 if dtype == "F16" else np.float32) for name, w in weights.items()}
    model = headway.lm.load(tmp_path)
    np.testing.assert_array_equal(widened(model.weights.embedding), kept["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        widened(model.weights.layers[1].w_down), kept["model.layers.1.mlp.down_proj.weight"].T
    )


@pytest.mark.parametrize("index", [True, False])
def test_several_files_are_one_model(tmp_path: Path, index: bool) -> None:
    write_checkpoint(tmp_path / "whole")
    write_checkpoint(tmp_path / "parts", shards=3, index=index)
    whole, parts = headway.lm.load(tmp_path / "whole"), headway.lm.load(str(tmp_path / "parts"))
    np.testing.assert_array_equal(whole.logits([1, 2, 3]), parts.logits([1, 2, 3]))


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_weights_stay_in_their_file(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, dtype=dtype)
    weights = headway.lm.load(tmp_path).weights
    file = np.memmap(tmp_path / "model.safetensors", np.uint8, "r")
    assert np.shares_memory(weights.embedding, weights.head), "tied, so kept once"
    for array in (weights.embedding, *(array for layer in weights.layers for array in vars(layer).values())):
        if array is not None and array.ndim == 2:
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert isinstance(owner, np.memmap)
            assert owner.size == file.size
            assert array.dtype.itemsize == {"F64": 8, "F32": 4}.get(dtype, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16"])
def test_a_loaded_model_takes_the_memory_of_its_file(tmp_path: Path, dtype: str) -> None:
    """At the peak too: no second copy, and the file's pages are released. float64 becomes float32, tensor by tensor."""
    shape = {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 4, "vocab_size": 4000}
    write_checkpoint(tmp_path, dtype=dtype, **shape)
    program = """if True:
        import sys
        from pathlib import Path
        import headway.lm
        def memory(name):
            status = Path("/proc/self/status").read_text()
            return int(status.partition(name + ":")[2].split()[0]) * 1024
        headway.lm.load().logits(range(40))
        before = memory("VmRSS")
        model = headway.lm.load(sys.argv[1])
        model.session().next_logits(range(40))
        print(memory("VmHWM") - before)
    """
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    size = (tmp_path / "model.safetensors").stat().st_size
    if dtype == "F64":
        size = size // 2 + shape["vocab_size"] * shape["hidden_size"] * (8 + 4)  # the largest, in both types
    assert int(done.stdout) < 1.1 * size + (8 << 20), (int(done.stdout), size)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrow_weights_give_the_bits_of_the_widened_ones(tmp_path: Path, dtype: str) -> None:
    _, weights = write_checkpoint(tmp_path / "narrow", dtype=dtype)
    kept = {
        name: (w.view(np.uint32) & 0xFFFF0000).view(np.float32) if dtype == "BF16" else w.astype(np.float16)
        for name, w in weights.items()
    }
    write_checkpoint(tmp_path / "wide")
    write_safetensors(tmp_path / "wide" / "model.safetensors", kept)
    narrow, wide = (headway.lm.load(tmp_path / name) for name in ("narrow", "wide"))
    assert narrow.logits(range(40)).tobytes() == wide.logits(range(40)).tobytes()


def test_tensors_that_lie_askew_in_their_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    want = headway.lm.load(tmp_path).logits([1, 2, 3])
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    np.testing.assert_array_equal(headway.lm.load(tmp_path).logits([1, 2, 3]), want)


def test_a_stored_head_counts_even_when_the_config_says_tied(tmp_path: Path) -> None:
    _, weights = write_checkpoint(tmp_path)
    head = np.random.default_rng(1).normal(size=(260, 24)).astype(np.float32)
    write_safetensors(tmp_path / "model.safetensors", {**weights, "lm_head.weight": head})
    np.testing.assert_array_equal(headway.lm.load(tmp_path).weights.head, head.T)


def test_end_tokens_come_from_generation_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    assert headway.lm.load(tmp_path).config.eos_token_ids == (EOS,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 257]}')
    assert headway.lm.load(tmp_path).config.eos_token_ids == (7, EOS)
    (tmp_path / "generation_config.json").write_text("{}")
    assert headway.lm.load(tmp_path).config.eos_token_ids == (EOS,)


def test_end_tokens_of_both_files_are_checked(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 257]}')
    edit_config(eos_token_id=2**70)(tmp_path)
    with pytest.raises(ValueError, match=r"[/\\]config.json: eos_token_id: expected ids below vocab_size"):
        headway.lm.load(tmp_path)


# What can be broken ---------------------------------------------------------------------------------------------------


def edit_config(**changes: object) -> Damage:
    def edit(folder: Path) -> None:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if value is not ...})
        )

    return edit


def edit_tensors(dtype: str = "F32", **changes: Any) -> Damage:
    def edit(folder: Path) -> None:
        _, weights = write_checkpoint(folder)
        weights = {**weights, **{name.replace("__", "."): value for name, value in changes.items()}}
        kept = {name: value for name, value in weights.items() if value is not ...}
        write_safetensors(folder / "model.safetensors", kept, dtype)

    return edit


def write_file(name: str, content: str | bytes) -> Damage:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def cut_weights(keep: int) -> Damage:
    def cut(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])

    return cut


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


K_PROJ = "model__layers__1__self_attn__k_proj__weight"
BROKEN = {
    "no config": (remove("config.json"), "config.json: no such file"),
    "config is no JSON": (
        write_file("config.json", '{"model_type": '),
        "config.json: not JSON: Expecting value",
    ),
    "config is not text": (write_file("config.json", b"\xff\xfe{"), "config.json: not JSON"),
    "config is nested without end": (write_file("config.json", "[" * 100_000), "config.json: not JSON"),
    "config is a list": (write_file("config.json", "[1]"), "config.json: expected a JSON object, got list"),
    "another architecture": (
        edit_config(model_type="gpt2"),
        "config.json: model_type: expected 'llama', got 'gpt2'",
    ),
    "no architecture": (
        edit_config(model_type=...),
        "config.json: model_type: expected 'llama', got nothing",
    ),
    "another activation": (
        edit_config(hidden_act="gelu"),
        "config.json: hidden_act: expected 'silu', got 'gelu'",
    ),
    "a size is missing": (
        edit_config(hidden_size=...),
        "config.json: hidden_size: expected a positive integer, got nothing",
    ),
    "a size is text": (
        edit_config(vocab_size="260"),
        "config.json: vocab_size: expected a positive integer, got '260'",
    ),
    "a size is true": (
        edit_config(num_hidden_layers=True),
        "num_hidden_layers: expected a positive integer, got True",
    ),
    "a size is 0": (
        edit_config(num_hidden_layers=0),
        "num_hidden_layers: expected a positive integer, got 0",
    ),
    "eps is 0": (edit_config(rms_norm_eps=0), "rms_norm_eps: expected a positive number, got 0"),
    "a switch is 1": (edit_config(attention_bias=1), "attention_bias: expected true or false, got 1"),
    "groups do not divide heads": (
        edit_config(num_key_value_heads=3),
        "num_key_value_heads: expected a divisor of num_attention_heads, 4, got 3",
    ),
    "heads do not divide width": (
        edit_config(hidden_size=26, head_dim=None),
        "hidden_size: expected a multiple of num_attention_heads, 4, or a head_dim, got 26",
    ),
    "odd heads": (edit_config(head_dim=9), "head_dim: expected an even number, .* got 9"),
    "two spellings of rope that differ": (
        edit_config(rope_parameters=LLAMA3, rope_scaling={"type": "linear", "factor": 2.0}),
        "config.json: rope_scaling: expected what rope_parameters says, or nothing, got",
    ),
    "a key twice": (
        write_file("config.json", '{"model_type": "llama", "vocab_size": 1, "vocab_size": 2}'),
        "config.json: not JSON: expected each key once, got 'vocab_size' twice",
    ),
    "end token is text": (
        edit_config(eos_token_id="</s>"),
        "eos_token_id: expected a token id, .* got '</s>'",
    ),
    "yarn": (
        edit_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "config.json: rope_scaling.rope_type: expected 'default', 'linear' or 'llama3', got 'yarn'",
    ),
    "yarn, as once written": (
        edit_config(rope_scaling={"type": "yarn", "factor": 4.0}),
        "config.json: rope_scaling.type: expected 'default', 'linear' or 'llama3', got 'yarn'",
    ),
    "rope without a factor": (
        edit_config(rope_parameters={"rope_type": "linear"}),
        "config.json: rope_parameters.factor: expected a positive number, got nothing",
    ),
    "rope of no size": (
        edit_config(rope_theta=10**400, rope_parameters=None),
        "config.json: rope_theta: expected a number from 1 to 1e30",
    ),
    "heads of no size": (
        edit_config(head_dim=400_000),
        "config.json: head_dim: expected at most 65,536, got 400000",
    ),
    "rope blends backwards": (
        edit_config(rope_parameters={**LLAMA3, "high_freq_factor": 1.0}),
        "rope_parameters.high_freq_factor: expected a number above low_freq_factor, 1.0, got 1.0",
    ),
    "rope is text": (edit_config(rope_scaling="linear"), "rope_scaling: expected an object, got 'linear'"),
    "generation config is no JSON": (
        write_file("generation_config.json", "{"),
        "generation_config.json: not JSON",
    ),
    "no weights": (remove("model.safetensors"), "no \\*.safetensors; a checkpoint folder has one or several"),
    "weights cut in the header": (cut_weights(100), "model.safetensors: not a whole safetensors file"),
    "weights cut in the data": (cut_weights(20_000), "model.safetensors: not a whole safetensors file"),
    "weights empty": (cut_weights(0), "model.safetensors: not a whole safetensors file"),
    "weights are something else": (
        write_file("model.safetensors", b"PK\x03\x04" * 99),
        "model.safetensors: not a whole safetensors file",
    ),
    "a tensor is missing": (
        edit_tensors(**{K_PROJ: ...}),
        r"no tensor 'model.layers.1.self_attn.k_proj.weight', of shape \(20, 24\), in model.safetensors",
    ),
    "a tensor has another shape": (
        edit_tensors(**{K_PROJ: zeros(24, 20)}),
        r"model.safetensors: tensor 'model.layers.1.self_attn.k_proj.weight': "
        r"expected shape \(20, 24\), got \(24, 20\)",
    ),
    "a tensor has another rank": (
        edit_tensors(model__norm__weight=zeros(24, 1)),
        r"tensor 'model.norm.weight': expected shape \(24,\), got \(24, 1\)",
    ),
    "tensors are integers": (
        edit_tensors(dtype="I8"),
        "tensor 'model.embed_tokens.weight': expected dtype F64, F32, F16 or BF16, got I8",
    ),
    "a tensor is too many": (
        edit_tensors(model__layers__0__self_attn__q_norm__weight=zeros(10)),
        "model.safetensors: tensor 'model.layers.0.self_attn.q_norm.weight' .* has no place",
    ),
    "an untied head is missing": (edit_config(tie_word_embeddings=False), "no tensor 'lm_head.weight'"),
    "the index names a missing file": (
        write_file("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "a.safetensors"}}'),
        "a.safetensors: no such file; model.safetensors.index.json names it",
    ),
    "the index has no map": (
        write_file("model.safetensors.index.json", "{}"),
        "index.json: weight_map: expected an object that maps tensor names to file names, got nothing",
    ),
    "the index points outside": (
        write_file("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "../model.safetensors"}}'),
        "index.json: weight_map: expected an object that maps tensor names to file names",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: no such file"),
    "tokenizer is no JSON": (write_file("tokenizer.json", "{"), "tokenizer.json: not a tokenizer"),
    "tokenizer is of another model": (
        edit_config(vocab_size=257, eos_token_id=None),
        "tokenizer.json: token id 257: expected ids below vocab_size, 257, of config.json",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_says_what_is_wrong(tmp_path: Path, damage: Damage, message: str) -> None:
    _, weights = write_checkpoint(tmp_path)
    damage(tmp_path)
    if message.startswith("tokenizer.json: token id"):
        rows = weights["model.embed_tokens.weight"][:257]
        write_safetensors(tmp_path / "model.safetensors", {**weights, "model.embed_tokens.weight": rows})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        headway.lm.load(tmp_path)
    assert str(tmp_path) in str(caught.value), "says which folder"
    assert "\n" not in str(caught.value)


# What config.json may say that the architecture has no place for: a value of each that would change the numbers, and
# where there is one, a value that changes nothing.
NOT_COMPUTED: dict[str, tuple[Any, ...]] = {
    "is_causal": (False, True),
    "is_encoder_decoder": (True, False),
    "add_cross_attention": (True, False),
    "use_bidirectional_attention": (True, False),
    "hidden_act": ("relu", "silu"),
    "hidden_activation": ("gelu_pytorch_tanh", "silu"),
    "layer_types": (["full_attention", "sliding_attention"], ["full_attention"] * 2),
    "sliding_window": (32, None),
    "attention_chunk_size": (32, None),
    "alibi": (True, False),
    "position_embedding_type": ("alibi", "rope"),
    "partial_rotary_factor": (0.5, 1.0),
    "rotary_pct": (0.25, 1),
    "rope_interleave": (True, False),
    "rope_interleaved": (True, False),
    "rope_traditional": (True, False),
    "no_rope_layers": ([1, 0], [1, 1]),
    "attn_temperature_tuning": (True, False),
    "attention_multiplier": (0.5, None),
    "query_pre_attn_scalar": (256, None),
    "embedding_multiplier": (12, 1.0),
    "residual_multiplier": (0.22, 1.0),
    "scale_emb": (12, 1),
    "scale_depth": (1.4, None),
    "dim_model_base": (256, None),
    "logit_scale": (0.0625, 1.0),
    "logits_scaling": (16.0, 1.0),
    "attn_logit_softcapping": (50.0, None),
    "final_logit_softcapping": (30.0, None),
    "logits_soft_cap": (30.0, None),
    "clip_qkv": (8, None),
    "use_qk_norm": (True, False),
    "qk_norm": (True, False),
    "qk_layernorm": (True, False),
    "parallel_attn": (True, False),
    "use_parallel_residual": (True, False),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, None),
    "compression_config": ({}, None),
}


@pytest.mark.parametrize("key", NOT_COMPUTED)
def test_what_is_not_computed_is_refused(tmp_path: Path, tiny: headway.lm.Model, key: str) -> None:
    changing, *neutral = NOT_COMPUTED[key]
    for value in (changing, "something", -1, [[changing]], {"a": 1}):
        write_checkpoint(tmp_path, **{key: value})
        with pytest.raises(ValueError, match=rf"config.json: {key}: expected .*, got .*; headway.lm would compute"):
            headway.lm.load(tmp_path)
    for value in (*neutral, None, ...):
        write_checkpoint(tmp_path, **{key: value})
        np.testing.assert_array_equal(headway.lm.load(tmp_path).logits([1, 2]), tiny.logits([1, 2]))


def test_a_window_that_is_not_used_changes_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sliding_window=32, use_sliding_window=False)
    headway.lm.load(tmp_path)
    write_checkpoint(tmp_path, sliding_window=32, use_sliding_window=True)
    with pytest.raises(ValueError, match="sliding_window: expected null, got 32"):
        headway.lm.load(tmp_path)


NO_NUMBERS = (0, -1, -1e-9, "1", [1], {}, True, float("nan"), float("inf"), -float("inf"), 10**400, 1e300, 1e-300)
NO_SIZES = (0, -1, "1", [1], {}, True, 1.5, float("nan"), float("inf"), 2**62, 2**70)
NO_TOKENS = (-1, 260, 2**70, "1", {}, True, 1.5, float("nan"), [1, 260], [1, [2]], [None])
ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rms_norm_eps", NO_NUMBERS),
        ("rope_theta", (*NO_NUMBERS, 0.5, 1e-29)),
        ("rope_scaling.factor", (*NO_NUMBERS, 0.5, None)),
        *((f"rope_parameters.{key}", NO_NUMBERS) for key in ("low_freq_factor", "high_freq_factor", "factor")),
        ("rope_parameters.rope_theta", (*NO_NUMBERS, 1e-29)),
        ("rope_parameters.original_max_position_embeddings", NO_SIZES),
        ("rope_parameters.partial_rotary_factor", (0.5, "1", True, [0.5])),
        ("rope_parameters.attention_factor", (2.0, "1")),
        ("rope_parameters.full_attention", ({"rope_theta": 5.0},)),
        ("rope_parameters.rope_type", ("yarn", "dynamic", "longrope", None, 1, [], {})),
        *((size, NO_SIZES) for size in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")),
        *((size, NO_SIZES) for size in ("num_attention_heads", "num_key_value_heads", "head_dim")),
        ("max_position_embeddings", (*NO_SIZES, 2**24 + 1)),
        *((flag, (0, 1, "true", [], {}, 0.0)) for flag in ("attention_bias", "mlp_bias", "tie_word_embeddings")),
        *((token, NO_TOKENS) for token in ("bos_token_id", "eos_token_id")),
        ("original_max_position_embeddings", (64, "32", [31])),
        ("model_type", ("gpt2", None, 1, [], {}, ["llama"])),
    ],
)
def test_every_setting_is_checked(tmp_path: Path, key: str, values: tuple[Any, ...]) -> None:
    write_checkpoint(tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())
    if key.startswith("rope_parameters") or key.startswith("original"):
        base["rope_parameters"] = LLAMA3
    elif key.startswith("rope_scaling"):
        base["rope_scaling"] = ROPE
    *section, name = key.split(".")
    for value in values:
        config = json.loads(json.dumps(base))
        (config[section[0]] if section else config)[name] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"^{tmp_path}/config.json: {key}: expected .{{1,150}}, got .{{1,150}}$"):
            headway.lm.load(tmp_path)


@pytest.mark.parametrize("value", NO_TOKENS)
def test_end_tokens_of_generation_config_are_checked(tmp_path: Path, value: Any) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id: expected"):
        headway.lm.load(tmp_path)


def test_sizes_beyond_the_weights_cost_nothing(tmp_path: Path) -> None:
    """Far larger than any memory, and refused by the first tensor that they ask for."""
    for changes in ({"num_hidden_layers": 10**9}, {"vocab_size": 2**31 - 1}, {"intermediate_size": 2**31 - 1}):
        write_checkpoint(tmp_path)
        edit_config(**changes)(tmp_path)
        with pytest.raises(ValueError, match=r"expected shape|no tensor"):
            headway.lm.load(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_a_tensor_in_two_files(tmp_path: Path, index: bool) -> None:
    _, weights = write_checkpoint(tmp_path, shards=2, index=True)
    first, second = (f"model-{i:05d}-of-00002.safetensors" for i in (1, 2))
    names = list(weights)
    name = "model.norm.weight"
    holder, other = (first, second) if name in names[0::2] else (second, first)
    part = {n: weights[n] for n in names[(other == second) :: 2]}
    write_safetensors(tmp_path / other, {**part, name: weights[name] + 1})
    if not index:
        (tmp_path / "model.safetensors.index.json").unlink()
        with pytest.raises(ValueError, match=rf"{second}: tensor '{name}': expected in one file, got it in {first} as"):
            headway.lm.load(tmp_path)
        return
    np.testing.assert_array_equal(headway.lm.load(tmp_path).weights.norm, weights[name])
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(f'"{name}": "{holder}"', f'"{name}": "{other}"'))
    np.testing.assert_array_equal(headway.lm.load(tmp_path).weights.norm, weights[name] + 1)
    write_safetensors(tmp_path / other, part)
    with pytest.raises(ValueError, match=rf"index.json: weight_map.{name}: expected the file .*, got '{other[:9]}"):
        headway.lm.load(tmp_path)


REGEX: dict[str, Any] = {"pattern": {"Regex": ""}, "content": "x"}
PANICS: dict[str, dict[str, Any]] = {  # parts that tokenizers reads, and then breaks off at, or reads with a panic
    "an empty pattern": {"normalizer": {"type": "Replace", **REGEX}},
    "a pattern of nothing": {"normalizer": {"type": "Replace", "pattern": {"Regex": "q*"}, "content": "x"}},
    "an empty prefix": {"normalizer": {"type": "Prepend", "prepend": ""}},
    "a map that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "strips more than there is": {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 5}},
}


@pytest.mark.parametrize("part", PANICS.values(), ids=PANICS)
def test_a_tokenizer_that_panics_is_an_error(tmp_path: Path, part: dict[str, Any]) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **part}))
    with pytest.raises(ValueError, match=f"^{path}: not a tokenizer: .") as caught:
        headway.lm.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_panics_later_is_an_error(tiny: headway.lm.Model) -> None:
    from tokenizers import Regex, decoders, normalizers

    for part in ({"normalizer": normalizers.Replace(Regex(""), "x")}, {"decoder": decoders.Strip("a", 0, 5)}):
        tokenizer = byte_tokenizer()
        for name, value in part.items():
            setattr(tokenizer, name, value)
        model = headway.lm.Model(tiny.config, tiny.weights, tokenizer)
        with pytest.raises(ValueError, match=r"^tokenizer.json: cannot (en|de)code"):
            model.generate("abc", max_tokens=3, seed=1)


def test_a_tokenizer_may_lack_what_others_have(tmp_path: Path) -> None:
    """One without a token for what it does not know refuses such a prompt, and is a tokenizer all the same."""
    from tokenizers import Tokenizer, models

    write_checkpoint(tmp_path)
    Tokenizer(models.WordLevel({"a": 0}, unk_token="b")).save(str(tmp_path / "tokenizer.json"))
    model = headway.lm.load(tmp_path)
    assert model.stream("a").prompt_ids == (0,)
    with pytest.raises(ValueError, match=r"^tokenizer.json: cannot encode the prompt: "):
        model.stream("c")


def test_a_prompt_that_is_no_utf8(tiny: headway.lm.Model) -> None:
    for prompt in ("a\ud800", "\udcff", "\udfff\ud800"):
        with pytest.raises(ValueError, match=r"^prompt: expected text that UTF-8 can write, got a lone surrogate"):
            tiny.stream(prompt)


@pytest.mark.parametrize(
    "name",
    ["config", "generation_config", "tokenizer", "model.safetensors.index", "model-00001-of-00002.safetensors"],
)
def test_a_mutated_checkpoint_is_read_or_refused(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, shards=2, index=True, rope_parameters=LLAMA3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 257]}')
    path = tmp_path / (name if name.endswith(".safetensors") else f"{name}.json")
    whole, rng = path.read_bytes(), random.Random(name)
    reach = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else len(whole)
    pieces = (b'"', b"{", b"}", b"[", b"]", b",", b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b'""', b"\xff")
    pieces += (b"4294967295", b"9" * 20, b"9" * 5000, b'"\\ud800"', b'"..\\u0000"', b"[" * 2000)
    for _ in range(300):
        path.write_bytes(mutated(rng, whole, pieces, reach))
        try:
            headway.lm.load(tmp_path).generate("ab é", max_tokens=2, seed=1)
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error) or "tokenizer.json" in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
        folder = tmp_path / name
        write_checkpoint(folder)
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        with pytest.raises(ValueError, match=f"{folder / name}: expected a file, got a folder"):
            headway.lm.load(folder)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotADirectoryError, match=r"model.gguf: is a file; expected a folder with a Hugging Face Llama"):
        headway.lm.load(tmp_path / "model.gguf")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        headway.lm.load(tmp_path / "nowhere")


def test_the_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    edit_tensors(model__layers__0__self_attn__rotary_emb__inv_freq=zeros(5))(tmp_path)
    assert headway.lm.load(tmp_path).logits([1]).shape == (1, 260)


def test_a_tokenizers_own_truncation_is_off(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=30)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(headway.lm.load(tmp_path).stream("a" * 20).prompt_ids) == 20
