"""Read a Hugging Face Llama checkpoint folder, and check all of it before anything runs.

The folder holds config.json, tokenizer.json, one or several *.safetensors (with model.safetensors.index.json
where there are several) and, where it has one, generation_config.json. Whatever does not fit is a
FileNotFoundError or a ValueError that names the file, the tensor or key, what was expected and what came.
"""

from __future__ import annotations

import decimal
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer
except ImportError as error:
    raise ImportError(
        f"headway.lm reads checkpoints with safetensors and tokenizers ({error}): pip install 'headway[lm]'"
    ) from error

Floats = NDArray[np.float32]

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Config:
    """The shape of a Llama model, under the names that its config.json uses.

    `rope_frequencies` holds one angle, in radians a position, for each pair of a head's elements: what
    rope_theta and the scaling of config.json come to. `eos_token_ids` are the tokens that end a text.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...] = field(repr=False)
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, each matrix (in, out), C-contiguous, float32.

    Projections that read the same input stand side by side in one matrix: one call, one pass over the input,
    and the same bits as apart, since a column of a product does not know its neighbours.
    """

    attention_norm: Floats  # (M,)
    w_qkv: Floats  # (M, (H + 2 G) D)
    b_qkv: Floats | None
    w_o: Floats  # (H D, M)
    b_o: Floats | None
    mlp_norm: Floats  # (M,)
    w_gate_up: Floats  # (M, 2 I)
    b_gate_up: Floats | None
    w_down: Floats  # (I, M)
    b_down: Floats | None


@dataclass(frozen=True)
class Weights:
    """All weights of a model. With tied embeddings `embedding` is a view of `head`, transposed."""

    embedding: Floats  # (V, M)
    layers: tuple[Layer, ...]
    norm: Floats  # (M,)
    head: Floats  # (M, V)


def read_checkpoint(folder: Path) -> tuple[Config, Weights, Tokenizer]:
    """Read and check the checkpoint in `folder`.

    Raises:
        FileNotFoundError: a folder or file that is not there.
        ValueError: a file, tensor or key that does not fit.

    >>> from pathlib import Path
    >>> import headway.lm
    >>> config, weights, tokenizer = read_checkpoint(Path(headway.lm.__file__).parent / "model")
    >>> weights.head.shape == (config.hidden_size, config.vocab_size)
    True
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with a Hugging Face Llama checkpoint")
    config = read_config(folder)
    return config, _read_weights(folder, config), _read_tokenizer(folder, config)


# ---------------------------------------------------------------------------------------------- config.json


def read_config(folder: Path) -> Config:
    """Read config.json, and the end-of-text tokens from generation_config.json where there is one.

    Both spellings of the rotary settings are understood: rope_theta and rope_scaling at the top level
    (transformers 4) and rope_parameters (transformers 5). Rope types: default, linear, llama3.
    """
    config = _Section.read(folder / "config.json")
    if config.values.get("model_type") != "llama":
        raise config.error("model_type", "'llama'", "headway.lm runs the Llama architecture alone")
    if config.values.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", "'silu'")

    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    groups = config.integer("num_key_value_heads", default=heads)
    if heads % groups:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, {heads}, or a head_dim")
    head_dim = config.integer("head_dim", default=hidden // heads)
    if head_dim > 2**16:  # each pair of features takes a power in decimal arithmetic
        raise config.error("head_dim", "at most 65,536")
    if head_dim % 2:
        raise config.error("head_dim", "an even number, since rotary positions turn pairs")
    context = config.integer("max_position_embeddings", default=2048)

    ends = config
    if (folder / "generation_config.json").exists():
        generation = _Section.read(folder / "generation_config.json")
        # A chat model's end of turn, added after the training, is written here and not in config.json.
        ends = generation if generation.values.get("eos_token_id") is not None else config

    return Config(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        max_position_embeddings=context,
        rms_norm_eps=config.number("rms_norm_eps", default=1e-6),
        rope_frequencies=_rope_frequencies(config, head_dim, context),
        attention_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        bos_token_id=next(iter(config.token_ids("bos_token_id")), None),
        eos_token_ids=ends.token_ids("eos_token_id"),
    )


def _rope_frequencies(config: _Section, head_dim: int, context: int) -> tuple[float, ...]:
    """Take theta ** (-2 i / D) for each pair i, in radians a position, scaled as config.json asks."""
    rope = config.section("rope_parameters") or config.section("rope_scaling") or config
    theta = (rope if "rope_theta" in rope.values else config).number("rope_theta", default=10000.0)
    # In decimal arithmetic and not with pow, which rounds differently from one C library to the next.
    with decimal.localcontext(decimal.Context(prec=40)):
        base = decimal.Decimal(theta)
        frequencies = [float(base ** (decimal.Decimal(-2 * i) / head_dim)) for i in range(head_dim // 2)]

    # transformers before 4.45 wrote "type"; at the top level of config.json there is no type, and no scaling.
    key = "type" if "rope_type" not in rope.values and "type" in rope.values else "rope_type"
    kind = rope.values.get(key, "default")
    if kind == "default":
        return tuple(frequencies)
    if kind == "linear":
        factor = rope.number("factor")
        return tuple(frequency / factor for frequency in frequencies)
    if kind == "llama3":
        factor = rope.number("factor")
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"a number above low_freq_factor, {low}")
        trained = rope.integer("original_max_position_embeddings", default=context)
        return tuple(_llama3_frequency(frequency, factor, low, high, trained) for frequency in frequencies)
    raise rope.error(key, "'default', 'linear' or 'llama3'")


def _llama3_frequency(frequency: float, factor: float, low: float, high: float, trained: int) -> float:
    """Scale as Llama 3.1 does: slow turns slow down by `factor`, fast ones stay, those between are blended."""
    turns = trained * frequency / (2 * math.pi)  # full turns within the context of the training
    keep = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - keep) * frequency / factor + keep * frequency


@dataclass(frozen=True)
class _Section:
    """A JSON object of the checkpoint, or an object inside it, whose values are taken by type."""

    path: Path
    values: dict[str, Any]
    name: str = ""  # "rope_parameters." for the object of that name

    @classmethod
    def read(cls, path: Path) -> _Section:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has one")
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls(path, values)

    def section(self, key: str) -> _Section | None:
        values = self.values.get(key)
        if values is None:
            return None
        if not isinstance(values, dict):
            raise self.error(key, "an object")
        return _Section(self.path, values, f"{key}.")

    def integer(self, key: str, *, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, "a positive integer")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(key, "a positive number")
        if not 1e-30 <= value <= 1e30:  # beyond, what is made of it would overflow one day, far from here
            raise self.error(key, "a number from 1e-30 to 1e30")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            raise self.error(key, "a token id, a list of them, or null")
        return tuple(ids)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def error(self, key: str, expected: str, why: str = "") -> ValueError:
        came = repr(self.values[key]) if key in self.values else "nothing"
        return ValueError(f"{self.path}: {self.name}{key}: expected {expected}, got {came}{why and '; '}{why}")


# -------------------------------------------------------------------------------------------- *.safetensors


def _read_weights(folder: Path, config: Config) -> Weights:
    """Take every tensor of the architecture, its shape checked, as float32 in hw.linear's (in, out) layout."""
    stored = _Tensors(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def columns(prefix: str, width: int, **parts: int) -> Floats:
        """Join the named (out, in) matrices into one (in, sum of outs) matrix."""
        return np.ascontiguousarray(
            np.concatenate([stored.take(f"{prefix}.{name}.weight", out, width) for name, out in parts.items()]).T
        )

    def biases(prefix: str, present: bool, **parts: int) -> Floats | None:
        if not present:
            return None
        return np.concatenate([stored.take(f"{prefix}.{name}.bias", out) for name, out in parts.items()])

    def layer(index: int) -> Layer:
        at = f"model.layers.{index}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        qkv = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}
        gate_up = {"gate_proj": inner, "up_proj": inner}
        return Layer(
            attention_norm=stored.take(f"{at}.input_layernorm.weight", hidden),
            w_qkv=columns(attention, hidden, **qkv),
            b_qkv=biases(attention, config.attention_bias, **qkv),
            w_o=columns(attention, q_width, o_proj=hidden),
            b_o=biases(attention, config.attention_bias, o_proj=hidden),
            mlp_norm=stored.take(f"{at}.post_attention_layernorm.weight", hidden),
            w_gate_up=columns(mlp, hidden, **gate_up),
            b_gate_up=biases(mlp, config.mlp_bias, **gate_up),
            w_down=columns(mlp, inner, down_proj=hidden),
            b_down=biases(mlp, config.mlp_bias, down_proj=hidden),
        )

    embedding = stored.take("model.embed_tokens.weight", config.vocab_size, hidden)
    # A head that is stored counts, tied or not: transformers reads such a folder so, too.
    if config.tie_word_embeddings and "lm_head.weight" not in stored:
        head = np.ascontiguousarray(embedding.T)
        embedding = head.T
    else:
        head = np.ascontiguousarray(stored.take("lm_head.weight", config.vocab_size, hidden).T)
    weights = Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=stored.take("model.norm.weight", hidden),
        head=head,
    )
    stored.refuse_the_rest()
    return weights


class _Tensors:
    """The tensors of a folder, mapped from its files; each is taken once, converted to float32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _safetensors_files(folder)
        self._stored = {name: stored for path in self._files for name, stored in _map_file(path).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def take(self, name: str, *shape: int) -> Floats:
        if name not in self._stored:
            files = ", ".join(path.name for path in self._files)
            raise ValueError(f"{self._folder}: no tensor {name!r}, of shape {shape}, in {files}")
        return self._stored.pop(name).read(name, shape)

    def refuse_the_rest(self) -> None:
        """Weights that would go unused mean that this is another model than config.json says."""
        # Checkpoints of 2023 carry the rotary frequencies, which config.json determines.
        rest = [name for name in self._stored if not name.endswith("rotary_emb.inv_freq")]
        if rest:
            path = self._stored[rest[0]].path
            raise ValueError(
                f"{path}: tensor {rest[0]!r} (one of {len(rest)}) has no place in the model that config.json "
                "describes (attention_bias, mlp_bias, num_hidden_layers?)"
            )


@dataclass(frozen=True)
class _Stored:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]  # little-endian, C order

    def read(self, name: str, shape: tuple[int, ...]) -> Floats:
        if self.shape != shape:
            raise ValueError(f"{self.path}: tensor {name!r}: expected shape {shape}, got {self.shape}")
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32, so no package that knows the type is needed.
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r}: expected dtype F64, F32, F16 or BF16, got {self.dtype}")
        return self.data.view(_NUMPY_DTYPES[self.dtype]).astype(np.float32).reshape(shape)


def _safetensors_files(folder: Path) -> list[Path]:
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        index = _Section.read(index_path)
        weight_map = index.section("weight_map")
        names = [] if weight_map is None else weight_map.values.values()
        # Names alone: a checkpoint does not point outside its folder.
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise index.error("weight_map", "an object that maps tensor names to file names")
        files = [folder / name for name in sorted(set(names))]
        for path in files:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; {index_path.name} names it")
        return files
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors; a checkpoint folder has one or several")
    return files


def _map_file(path: Path) -> dict[str, _Stored]:
    """Map a file's tensors without reading them: safetensors checks the layout, numpy maps the bytes.

    safetensors' own numpy reader hands out no bfloat16 unless ml_dtypes is there, and copies each tensor once
    more.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks the header, each tensor's size, and that they fill the file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    file = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    header = json.loads(file[8:start].tobytes())
    return {
        name: _Stored(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            file[start:][slice(*entry["data_offsets"])].view(np.ndarray),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


# ------------------------------------------------------------------------------------------- tokenizer.json


def _read_tokenizer(folder: Path, config: Config) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception, for broken JSON and for unknown parts alike
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    # A vocabulary smaller than the model's is common: embeddings are padded to a round size.
    last = max(tokenizer.get_vocab().values(), default=-1)
    if last >= config.vocab_size:
        raise ValueError(
            f"{path}: token id {last}: expected ids below vocab_size, {config.vocab_size}, of config.json; "
            "tokenizer and model do not belong together"
        )
    # Some files carry the settings of a training run, which would cut prompts without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
