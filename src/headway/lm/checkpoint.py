"""Read a Hugging Face Llama checkpoint folder, and check all of it before anything runs.

The folder holds config.json, tokenizer.json, one or several *.safetensors (with model.safetensors.index.json
where there are several) and, where it has one, generation_config.json. Whatever does not fit is a
FileNotFoundError or a ValueError that names the file, the tensor or key, what was expected and what came; so is
whatever would change the numbers and is not computed here.
"""

from __future__ import annotations

import decimal
import math
import reprlib
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .. import _check
from .text import tokenizer_errors

try:
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer
except ImportError as error:
    raise ImportError(
        f"headway.lm reads checkpoints with safetensors and tokenizers ({error}): pip install 'headway[lm]'"
    ) from error

Floats = NDArray[np.float32]
# A matrix as its file has it, mapped: float64, float32, float16, or bfloat16 as bits in uint16.
Stored: TypeAlias = NDArray[Any]

_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Config:
    """The shape of a Llama model, under the names that its config.json uses.

    Attributes:
        vocab_size: V, the number of tokens.
        hidden_size: M, the width of the model.
        intermediate_size: I, the inner width of the feed-forward block.
        num_hidden_layers: how many layers there are.
        num_attention_heads: H, query heads.
        num_key_value_heads: G, key/value heads, a divisor of H.
        head_dim: D, the size of a head.
        max_position_embeddings: how many tokens the context holds.
        rms_norm_eps: of every RMSNorm.
        rope_frequencies: (D / 2,) angles in radians a position, one for each pair of a head's elements: what rope_theta
            and the scaling of config.json come to.
        attention_bias: whether the projections of attention have biases.
        mlp_bias: whether those of the feed-forward block have.
        tie_word_embeddings: whether the embeddings are the head too.
        bos_token_id: the token that begins a text, None where there is none.
        eos_token_ids: the tokens that end one.

    >>> import headway.lm
    >>> config = headway.lm.load().config
    >>> config.num_hidden_layers, config.head_dim
    (4, 32)
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
    """The weights of one layer, each matrix (in, out), a view of the file's (out, in)."""

    attention_norm: Floats  # (M,)
    w_q: Stored  # (M, H D)
    b_q: Floats | None
    w_k: Stored  # (M, G D)
    b_k: Floats | None
    w_v: Stored  # (M, G D)
    b_v: Floats | None
    w_o: Stored  # (H D, M)
    b_o: Floats | None
    mlp_norm: Floats  # (M,)
    w_gate: Stored  # (M, I)
    b_gate: Floats | None
    w_up: Stored  # (M, I)
    b_up: Floats | None
    w_down: Stored  # (I, M)
    b_down: Floats | None


@dataclass(frozen=True)
class Weights:
    """All weights of a model. With tied embeddings `head` is `embedding`, transposed."""

    embedding: Stored  # (V, M)
    layers: tuple[Layer, ...]
    norm: Floats  # (M,)
    head: Stored  # (M, V)


def read_checkpoint(folder: Path) -> tuple[Config, Weights, Tokenizer]:
    """Read and check the checkpoint in `folder`.

    Returns:
        Its config, its weights and its tokenizer.

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
        what = "is a file" if folder.exists() else "no such folder"
        error = NotADirectoryError if folder.exists() else FileNotFoundError
        raise error(f"{folder}: {what}; expected a folder with a Hugging Face Llama checkpoint (config.json, ...)")
    config = read_config(folder)
    try:
        return config, _read_weights(folder, config), _read_tokenizer(folder, config)
    except MemoryError as error:
        raise MemoryError(f"{folder}: {error}") from None


# ---------------------------------------------------------------------------------------------- config.json

# Settings of Llama's relatives that change what is computed, and leave no tensor behind that would give them away;
# with the values, besides null, that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    # what a token may look at
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "layer_types": ("full_attention",),
    "attention_chunk_size": (),
    # positions
    "alibi": (False,),
    "position_embedding_type": ("rope", "rotary"),
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rope_traditional": (False,),
    "no_rope_layers": (1,),
    "attn_temperature_tuning": (False,),
    # numbers that are scaled, bounded or normalised on their way
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "dim_model_base": (),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_soft_cap": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    # another order of the blocks
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    # weights that are not what they are called
    "quantization_config": (),
    "compression_config": (),
}
_ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
_LONGEST = 2**24  # positions that hw.rotary turns by


def read_config(folder: Path) -> Config:
    """Read config.json, and the end-of-text tokens from generation_config.json where there is one.

    Both spellings of the rotary settings are understood: rope_theta and rope_scaling at the top level
    (transformers 4) and rope_parameters (transformers 5). Rope types: default, linear, llama3. A setting that
    changes what is computed and has no place here is an error.

    Returns:
        The shape of the model.
    """
    config = _Section.read(folder / "config.json")
    if config.values.get("model_type") != "llama":
        raise config.error("model_type", "'llama'", "headway.lm runs the Llama architecture alone")
    config.refuse_what_is_not_computed()

    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    groups = config.integer("num_key_value_heads", default=heads)
    if heads % groups:
        raise config.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if config.values.get("head_dim") is None and hidden % heads:
        raise config.error("hidden_size", f"a multiple of num_attention_heads, {heads}, or a head_dim")
    # Each pair of features takes a power in decimal arithmetic.
    head_dim = config.integer("head_dim", default=hidden // heads, high=2**16)
    if head_dim % 2:
        raise config.error("head_dim", "an even number, since rotary positions turn pairs")
    context = config.integer("max_position_embeddings", default=2048, high=_LONGEST)
    vocabulary = config.integer("vocab_size")

    ends = config.token_ids("eos_token_id", vocabulary)
    generation_path = folder / "generation_config.json"
    if generation_path.exists():
        generation = _Section.read(generation_path)
        # A chat model's end of turn, added after the training, is written here and not in config.json.
        if generation.values.get("eos_token_id") is not None:
            ends = generation.token_ids("eos_token_id", vocabulary)

    return Config(
        vocab_size=vocabulary,
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
        bos_token_id=next(iter(config.token_ids("bos_token_id", vocabulary)), None),
        eos_token_ids=ends,
    )


def _rope_frequencies(config: _Section, head_dim: int, context: int) -> tuple[float, ...]:
    """Take theta ** (-2 i / D) for each pair i, in radians a position, scaled as config.json asks."""
    rope, old = config.section("rope_parameters"), config.section("rope_scaling")
    if rope and old and rope.values != old.values:
        raise config.error("rope_scaling", "what rope_parameters says, or nothing")
    rope = rope or old or _Section(config.path, {}, "rope_parameters.")
    for key in rope.values:
        if key not in _ROPE_KEYS:
            rope.neutral(key, ())
    rope.neutral("partial_rotary_factor", (1.0,))
    theta = (config if rope.values.get("rope_theta") is None else rope).number("rope_theta", default=10000.0, low=1)
    # In decimal arithmetic and not with pow, which rounds differently from one C library to the next.
    with decimal.localcontext(decimal.Context(prec=40)):
        base = decimal.Decimal(theta)
        frequencies = [float(base ** (decimal.Decimal(-2 * i) / head_dim)) for i in range(head_dim // 2)]

    # transformers before 4.45 wrote "type".
    key = "type" if "rope_type" not in rope.values and "type" in rope.values else "rope_type"
    kind = rope.values.get(key, "default")
    if kind == "default":
        return tuple(frequencies)
    if kind == "linear":
        factor = rope.number("factor", low=1)
        return tuple(frequency / factor for frequency in frequencies)
    if kind == "llama3":
        factor = rope.number("factor", low=1)
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise rope.error("high_freq_factor", f"a number above low_freq_factor, {low}")
        trained = rope.integer("original_max_position_embeddings", default=context)
        config.neutral("original_max_position_embeddings", (trained,))  # transformers 5 would take it from here
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
        _require_file(path)
        try:
            values = _check.json_loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        return cls(path, values)

    def section(self, key: str) -> _Section | None:
        """Take an object; null and one without keys count as none."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.error(key, "an object")
        return _Section(self.path, values, f"{key}.") if values else None

    def integer(self, key: str, *, default: int | None = None, high: int = 2**31 - 1) -> int:
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, "a positive integer")
        if value > high:
            raise self.error(key, f"at most {high:,}")
        return value

    def number(self, key: str, *, default: float | None = None, low: float = 1e-30) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.error(key, "a positive number")
        if not low <= value <= 1e30:  # beyond, what is made of it would overflow one day, far from here
            raise self.error(key, f"a number from {low} to 1e30")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def token_ids(self, key: str, vocabulary: int) -> tuple[int, ...]:
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            raise self.error(key, "a token id, a list of them, or null")
        if any(token >= vocabulary for token in ids):
            raise self.error(key, f"ids below vocab_size, {vocabulary}")
        return tuple(ids)

    def refuse_what_is_not_computed(self) -> None:
        for key, neutral in _NEUTRAL.items():
            self.neutral(key, neutral)
        if self.values.get("use_sliding_window") is not False:  # false: a window is written down, and not used
            self.neutral("sliding_window", ())

    def neutral(self, key: str, values: tuple[Any, ...]) -> None:
        """Raise where a value, or one of a list of them, is neither null nor one that changes nothing."""
        value = self.values.get(key)
        for one in value if isinstance(value, list) else [value]:
            # By type as well: true equals 1, and is none of the numbers.
            if one is not None and not any(one == v and isinstance(one, bool) == isinstance(v, bool) for v in values):
                expected = " or ".join(map(repr, values)) or "null"
                raise self.error(key, expected, "headway.lm would compute something else")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def error(self, key: str, expected: str, why: str = "") -> ValueError:
        came = reprlib.repr(self.values[key]) if key in self.values else "nothing"
        return ValueError(f"{self.path}: {self.name}{key}: expected {expected}, got {came}{why and '; '}{why}")


def _require_file(path: Path, why: str = "a checkpoint folder has one") -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {why}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, got a folder or device")


# -------------------------------------------------------------------------------------------- *.safetensors


def _read_weights(folder: Path, config: Config) -> Weights:
    """Map every tensor of the architecture, its shape checked."""
    stored = _Tensors(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def layer(index: int) -> Layer:
        at = f"model.layers.{index}"

        def matrix(name: str, out: int, width: int) -> Stored:
            return stored.matrix(f"{at}.{name}.weight", out, width).T

        def bias(name: str, out: int) -> Floats | None:
            present = config.attention_bias if name.startswith("self_attn") else config.mlp_bias
            return stored.vector(f"{at}.{name}.bias", out) if present else None

        return Layer(
            attention_norm=stored.vector(f"{at}.input_layernorm.weight", hidden),
            w_q=matrix("self_attn.q_proj", q_width, hidden),
            b_q=bias("self_attn.q_proj", q_width),
            w_k=matrix("self_attn.k_proj", kv_width, hidden),
            b_k=bias("self_attn.k_proj", kv_width),
            w_v=matrix("self_attn.v_proj", kv_width, hidden),
            b_v=bias("self_attn.v_proj", kv_width),
            w_o=matrix("self_attn.o_proj", hidden, q_width),
            b_o=bias("self_attn.o_proj", hidden),
            mlp_norm=stored.vector(f"{at}.post_attention_layernorm.weight", hidden),
            w_gate=matrix("mlp.gate_proj", inner, hidden),
            b_gate=bias("mlp.gate_proj", inner),
            w_up=matrix("mlp.up_proj", inner, hidden),
            b_up=bias("mlp.up_proj", inner),
            w_down=matrix("mlp.down_proj", hidden, inner),
            b_down=bias("mlp.down_proj", hidden),
        )

    embedding = stored.matrix("model.embed_tokens.weight", config.vocab_size, hidden)
    # A head that is stored counts, tied or not: transformers reads such a folder so, too.
    tied = config.tie_word_embeddings and "lm_head.weight" not in stored
    weights = Weights(
        embedding=embedding,
        layers=tuple(layer(index) for index in range(config.num_hidden_layers)),
        norm=stored.vector("model.norm.weight", hidden),
        head=embedding.T if tied else stored.matrix("lm_head.weight", config.vocab_size, hidden).T,
    )
    stored.refuse_the_rest()
    return weights


class _Tensors:
    """The tensors of a folder, mapped from its files; each is taken once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = _read_index(folder)
        self._files = _safetensors_files(folder, index)
        self._stored: dict[str, _Stored] = {}
        for path in self._files:
            for name, stored in _map_file(path).items():
                if index and index.values.get(name, path.name) != path.name:
                    continue  # the index takes it from another file
                if name in self._stored:
                    other = self._stored[name].path.name
                    raise ValueError(f"{path}: tensor {name!r}: expected in one file, got it in {other} as well")
                self._stored[name] = stored
        if index:
            for name in index.values:
                if name not in self._stored:
                    raise index.error(name, "the file that holds this tensor")

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def matrix(self, name: str, *shape: int) -> Stored:
        return self._take(name, shape).as_stored(name)

    def vector(self, name: str, *shape: int) -> Floats:
        return np.require(widened(self._take(name, shape).as_stored(name)), requirements="A")

    def _take(self, name: str, shape: tuple[int, ...]) -> _Stored:
        if name not in self._stored:
            files = ", ".join(path.name for path in self._files)
            raise ValueError(f"{self._folder}: no tensor {name!r}, of shape {shape}, in {files}")
        stored = self._stored.pop(name)
        if stored.shape != shape:
            raise ValueError(f"{stored.path}: tensor {name!r}: expected shape {shape}, got {stored.shape}")
        return stored

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

    def as_stored(self, name: str) -> Stored:
        if self.dtype not in _NUMPY_DTYPES:
            raise ValueError(f"{self.path}: tensor {name!r}: expected dtype F64, F32, F16 or BF16, got {self.dtype}")
        numbers: Stored = self.data.view(_NUMPY_DTYPES[self.dtype]).reshape(self.shape)
        return numbers if numbers.dtype.isnative else numbers.astype(numbers.dtype.name)


def widened(numbers: Stored) -> Floats:
    """Return stored numbers as float32.

    >>> widened(np.array([0x3F80, 0xC000], np.uint16))  # bfloat16
    array([ 1., -2.], dtype=float32)
    """
    if numbers.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float32, copy=False)


def _read_index(folder: Path) -> _Section | None:
    """Take the object that says which file holds which tensor, where there is one."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    index = _Section.read(path)
    weight_map = index.section("weight_map")
    # Names alone: a checkpoint does not point outside its folder.
    if weight_map is None or not all(isinstance(n, str) and Path(n).name == n for n in weight_map.values.values()):
        raise index.error("weight_map", "an object that maps tensor names to file names")
    return weight_map


def _safetensors_files(folder: Path, index: _Section | None) -> list[Path]:
    if index:
        files = [folder / name for name in sorted(set(index.values.values()))]
        for path in files:
            _require_file(path, f"{index.path.name} names it")
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

    Returns:
        The tensors by name.
    """
    _require_file(path)
    path.open("rb").close()  # what the system refuses, in its own words
    try:
        with safe_open(path, framework="numpy"):
            pass  # opening checks the header, each tensor's size, and that they fill the file
        file = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(file[:8].tobytes(), "little")
        header = _check.json_loads(file[8:start].tobytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
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
    _require_file(path)
    with tokenizer_errors(f"{path}: not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        # Some files carry the settings of a training run, which would cut prompts without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A part that panics does so with most texts: better here than later.
        try:
            tokens = tokenizer.encode("Aa 1.\né日").ids
            tokenizer.decode(tokens)
        except Exception:
            tokens = []  # a text beyond its vocabulary, which may be all right
    # A vocabulary smaller than the model's is common: embeddings are padded to a round size.
    last = max(chain(tokenizer.get_vocab().values(), tokens), default=-1)  # a template may add ids of its own
    if last >= config.vocab_size:
        raise ValueError(
            f"{path}: token id {last}: expected ids below vocab_size, {config.vocab_size}, of config.json; "
            "tokenizer and model do not belong together"
        )
    return tokenizer
