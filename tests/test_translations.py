"""The tables of docs/howto/coming-from.md, row by row: both sides are called, and must say the same.

Where a library is not installed its tests skip. vLLM and flash-attention are written down here in NumPy, from
vllm/v1/sample and vllm/v1/attention, and from the README of flash-attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import headway as hw

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "coming-from.md"
SECTION = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (`[^`]*`)? *\| (`[^`]*`)? *\|", re.MULTILINE)

B, H, G, D, W = 2, 4, 2, 8, 3
V = 64
Array = np.ndarray
Options = dict[str, Any]


class Attention:
    """Arrays of a call, and the names that the page uses in its tables: three queries over five keys, or L = S."""

    def __init__(self, square: bool) -> None:
        rng = np.random.default_rng(0)
        L, S = (5, 5) if square else (3, 5)
        self.q, self.k, self.v = (
            rng.normal(size=(B, heads, length, D)).astype(np.float32) for heads, length in ((H, L), (G, S), (G, S))
        )
        self.names = {
            "L": L,
            "S": S,
            "W": W,
            "mask": rng.random((1, 1, L, S)) < 0.7,
            "bias": rng.normal(size=(1, 1, L, S)).astype(np.float32),
            "blocked": np.triu(np.ones((L, S), bool), 1),
            "padding": np.array([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], bool),
            "attention_mask": np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
            "lengths": np.array([5, 4]),
            "sinks": rng.normal(size=H).astype(np.float32),
            "slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
            "queries": np.arange(S - L, S)[:, None],
            "keys": np.arange(S),
        }
        self.names["mask"][..., 0] = True  # no query without keys, which torch answers with NaN

    def ours(self, options: Options) -> Any:
        return hw.attention(self.q, self.k, self.v, **options)


def torch_attention(call: Attention, options: Options) -> Any:
    torch = installed("torch")
    grouped = options.get("enable_gqa", False)
    k, v = (x if grouped else np.repeat(x, H // G, axis=1) for x in (call.k, call.v))
    arrays = (torch.from_numpy(x) for x in (call.q, k, v))
    given = {name: torch.from_numpy(x) if isinstance(x, Array) else x for name, x in options.items()}
    return torch.nn.functional.scaled_dot_product_attention(*arrays, **given).numpy()


def jax_attention(call: Attention, options: Options) -> Any:
    jax = installed("jax")
    out = jax.nn.dot_product_attention(*(np.swapaxes(x, 1, 2) for x in (call.q, call.k, call.v)), **options)
    return tuple(np.swapaxes(x, 1, 2) for x in out) if isinstance(out, tuple) else np.swapaxes(out, 1, 2)


def transformers_attention(call: Attention, options: Options) -> Any:
    """The masks and the plain attention of its models: Gemma 2's, which has softcap, and gpt-oss's, which has sinks."""
    torch, masks = installed("torch"), installed("transformers.masking_utils")
    gemma, gpt = (installed(f"transformers.models.{m}.modeling_{m}") for m in ("gemma2", "gpt_oss"))
    known = {"attention_mask", "sliding_window", "attention_chunk_size", "attn_logit_softcapping"}
    assert options.keys() <= known | {"query_pre_attn_scalar", "sinks"}
    allow = masks.causal_mask_function
    if "sliding_window" in options:
        allow = masks.sliding_window_causal_mask_function(options["sliding_window"])
    if "attention_chunk_size" in options:
        unpadded = torch.zeros(B, dtype=torch.int64)
        allow = masks.chunked_causal_mask_function(options["attention_chunk_size"], unpadded)
    queries, keys = (torch.from_numpy(call.names[name]) for name in ("queries", "keys"))
    allowed = allow(0, 0, queries, keys).expand(B, 1, -1, -1)
    if "attention_mask" in options:
        allowed = allowed & torch.from_numpy(options["attention_mask"]).bool()[:, None, None, :]
    module = SimpleNamespace(num_key_value_groups=H // G, training=False)
    scale = options.get("query_pre_attn_scalar", D) ** -0.5
    rest: Options = {"softcap": options.get("attn_logit_softcapping")}
    if "sinks" in options:
        module.sinks, rest = torch.from_numpy(options["sinks"]), {}
    model = gpt if "sinks" in options else gemma
    arrays = (torch.from_numpy(x) for x in (call.q, call.k, call.v))
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    return model.eager_attention_forward(module, *arrays, added, scaling=scale, **rest)[0].transpose(1, 2).numpy()


class MultiHead(Attention):
    """A whole layer, of which queries, keys and values are one sequence."""

    def __init__(self, square: bool) -> None:
        super().__init__(square=True)
        rng = np.random.default_rng(1)
        self.x = rng.normal(size=(B, 5, H * D)).astype(np.float32)
        self.weights = [(rng.normal(size=(H * D, H * D)) / 4).astype(np.float32) for _ in range(4)]
        self.biases = [rng.normal(size=H * D).astype(np.float32) for _ in range(4)]

    def ours(self, options: Options) -> Any:
        projections = {f"w_{name}": w.T for name, w in zip("qkvo", self.weights)}
        projections |= {f"b_{name}": b for name, b in zip("qkvo", self.biases)}
        return hw.multi_head_attention(self.x, self.x, self.x, num_heads=H, **projections, **options)


def torch_layer(call: MultiHead, options: Options) -> Any:
    torch = installed("torch")
    layer = torch.nn.MultiheadAttention(H * D, H, batch_first=True)
    whole = {"in_proj_weight": np.concatenate(call.weights[:3]), "in_proj_bias": np.concatenate(call.biases[:3])}
    whole |= {"out_proj.weight": call.weights[3], "out_proj.bias": call.biases[3]}
    layer.load_state_dict({name: torch.from_numpy(x) for name, x in whole.items()})
    given = {name: torch.from_numpy(x) for name, x in options.items()}
    x = torch.from_numpy(call.x)
    with torch.no_grad():
        return layer(x, x, x, need_weights=False, **given)[0].numpy()


class Sampling:
    """A row of logits, and what is drawn from."""

    history = (1, 5, 5, 9)

    def __init__(self, square: bool) -> None:
        self.logits = np.random.default_rng(2).normal(size=(1, V), scale=3).astype(np.float32)
        self.names = {"inf": math.inf, "logits": self.logits, "W": W}

    def ours(self, options: Options) -> Any:
        penalties = {name: options.pop(name) for name in ("repetition", "frequency", "presence") if name in options}
        logits = hw.penalize(self.logits, [self.history], **penalties)
        if "top" in options:
            return hw.logprobs(self.logits, **options).top_logprobs
        return hw.probabilities(logits, **options)


def transformers_generate(call: Sampling, options: Options) -> Any:
    """What `generate` itself draws from, of a tiny model's logits, which headway then gets too."""
    torch, transformers = installed("torch"), installed("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **sizes)).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    told = {"max_new_tokens": 1, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    ids = torch.tensor([call.history])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **told, **options)
    call.logits = out.logits[0].numpy()
    if not options["do_sample"]:
        return np.eye(V)[out.sequences[:, -1].numpy()]
    return torch.softmax(out.scores[0], -1).numpy()


def mlx_sampler(call: Sampling, options: Options) -> Any:
    mx, utils = installed("mlx.core"), installed("mlx_lm.sample_utils")
    row = mx.array(call.logits)
    with pytest.MonkeyPatch.context() as patch:  # the distribution instead of a draw from it
        patch.setattr(utils, "categorical_sampling", lambda logprobs, temp: mx.softmax(logprobs / temp, axis=-1))
        out = np.array(utils.make_sampler(**options)(row - mx.logsumexp(row, axis=-1, keepdims=True)))
    return out if out.shape == (1, V) else np.eye(V)[out]


def flash_attention(call: Attention, options: Options) -> Any:
    """The formulas of its README: causal masks and windows count from the bottom right corner."""
    known = {"softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "return_attn_probs", "cache_seqlens"}
    assert options.keys() <= known
    L, S = call.names["L"], call.names["S"]
    lengths = options.get("cache_seqlens", np.full(B, S))[:, None, None, None]
    i, j = np.arange(L)[:, None] + lengths - L, np.arange(S)  # the query's place among the keys; the key's
    left, right = options.get("window_size", (-1, -1))
    allowed = (j < lengths) & ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
    if options.get("causal"):
        allowed = allowed & (j <= i)
    k, v = (np.repeat(x, H // G, axis=1).astype(np.float64) for x in (call.k, call.v))
    scores = call.q @ np.swapaxes(k, -1, -2) * options.get("softmax_scale", D**-0.5)
    if options.get("softcap"):
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    scores = scores - options.get("alibi_slopes", np.zeros(H))[:, None, None] * abs(i - j)
    e = np.where(allowed, np.exp(scores), 0)
    out = e / e.sum(-1, keepdims=True) @ v
    return (out, np.log(e.sum(-1))) if "return_attn_probs" in options else out


def vllm_attention(call: Attention, options: Options) -> Any:
    """FlashAttentionImpl gives these to flash-attention; a sink is one more score, without a value."""
    names = {"logits_soft_cap": "softcap", "alibi_slopes": "alibi_slopes"}
    told: Options = {names[name]: value for name, value in options.items() if name in names}
    if "sliding_window" in options:
        told["window_size"] = (options["sliding_window"] - 1, 0)
    assert options.keys() <= {*names, "sliding_window", "sinks"}
    out, lse = flash_attention(call, {"causal": True, "return_attn_probs": True, **told})
    sinks = options.get("sinks", np.full(H, -np.inf))[:, None]
    return out / (1 + np.exp(sinks - lse))[..., None]


def vllm_sampling(call: Sampling, options: Options) -> Any:
    """Its Sampler: bans and biases, penalties, temperature, min_p, top_k, top_p. All of the history is output."""
    get, z = options.get, call.logits[0].astype(np.float64)
    if "logprobs" in options:
        return np.sort(z - np.log(np.exp(z).sum()))[None, : -options["logprobs"] - 1 : -1]
    z[[i for i in range(V) if i not in get("allowed_token_ids", range(V))]] = -np.inf
    for token, bias in get("logit_bias", {}).items():
        z[token] += bias
    counts = np.bincount(call.history, minlength=V)
    z = np.where(counts > 0, np.where(z > 0, z / get("repetition_penalty", 1), z * get("repetition_penalty", 1)), z)
    z = z - get("frequency_penalty", 0) * counts - get("presence_penalty", 0) * (counts > 0)
    if get("temperature", 1) == 0:
        return np.eye(V)[[z.argmax()]]
    z = z / get("temperature", 1)
    z[z < z.max() + np.log(get("min_p", 0) or 1e-300)] = -np.inf
    order = np.argsort(-z)
    if get("top_k", 0) > 0:
        z[order[get("top_k") :]] = -np.inf
    p = np.exp(z) / np.exp(z).sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= get("top_p", 1)]] = 0
    return p[None] / p.sum()


def by_hand(call: Sampling, distribution: Any) -> Any:
    return np.asarray(distribution)


class Table(NamedTuple):
    """The kind of call that a table is about, and the library's side."""

    kind: Callable[[bool], Any]
    theirs: Callable[[Any, Any], Any]


TABLES = {
    "torch: scaled_dot_product_attention": Table(Attention, torch_attention),
    "torch: nn.MultiheadAttention": Table(MultiHead, torch_layer),
    "JAX: jax.nn.dot_product_attention": Table(Attention, jax_attention),
    "transformers: attention layers": Table(Attention, transformers_attention),
    "transformers: generate": Table(Sampling, transformers_generate),
    "JAX and torch: sampling by hand": Table(Sampling, by_hand),
    "mlx-lm: make_sampler": Table(Sampling, mlx_sampler),
    "vLLM: SamplingParams": Table(Sampling, vllm_sampling),
    "vLLM: attention layers": Table(Attention, vllm_attention),
    "flash-attention: flash_attn_func": Table(Attention, flash_attention),
}
ROWS = [
    (title, theirs.strip("`"), ours.strip("`"))
    for title, text in SECTION.findall(PAGE.read_text())
    for theirs, ours in ROW.findall(text)
    if theirs or ours
]


def installed(module: str) -> Any:
    return pytest.importorskip(module, reason=f"no {module.split('.')[0]} here to compare with", exc_type=ImportError)


@pytest.mark.parametrize(("title", "theirs", "ours"), ROWS)
def test_both_sides_say_the_same(title: str, theirs: str, ours: str) -> None:
    table = TABLES[title]
    call = table.kind("window" in ours and "causal" not in ours)
    options = eval(f"dict({ours})", dict(call.names))
    names = dict(call.names)
    if "causal_lower_right" in theirs:
        names["causal_lower_right"] = installed("torch.nn.attention.bias").causal_lower_right
    if table.theirs is by_hand:
        library = theirs.partition(".")[0]
        names[library] = installed(library)
        names["logits"] = installed(library).asarray(call.logits) if library == "torch" else call.logits
        want = by_hand(call, eval(theirs, names))
    else:
        want = table.theirs(call, eval(f"dict({theirs})", names))
    got = call.ours(options)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=2e-5)


def test_every_table_has_rows() -> None:
    titles = [title for title, _, _ in ROWS]
    assert set(titles) == set(TABLES)
    assert len(ROWS) == sum(line.startswith("| ") for line in PAGE.read_text().splitlines()) - len(TABLES)
