"""headway inside transformers, on tiny random models of many architectures: against "eager", and the laws in bits."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway as hw

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
hf = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
from headway.integrations.transformers import disable, enable, generate, row_options  # noqa: E402

V = 128
TINY = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LOCAL = {"sliding_window": 5, "head_dim": 8}
MIXED = {**LOCAL, "layer_types": ["sliding_attention", "full_attention"]}
BART = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
        (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TINY)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TINY, **LOCAL)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**TINY, **LOCAL, query_pre_attn_scalar=8)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TINY, **MIXED, query_pre_attn_scalar=8)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TINY, head_dim=8)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TINY)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**TINY, **MIXED, num_local_experts=4, num_experts_per_tok=2, rope_parameters=ROPE)
    ),
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MORE = {**TINY, "num_key_value_heads": 4, **EXPERTS}
LATENT = {f"{name}_head_dim": 8 for name in ("qk_rope", "qk_nope")} | {"v_head_dim": 8, "kv_lora_rank": 16}
LATENT |= {"q_lora_rank": 16, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DECODERS |= {
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**MORE, **LATENT)),
    "olmo3": lambda: hf.Olmo3ForCausalLM(hf.Olmo3Config(**TINY, sliding_window=5)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**TINY, sliding_window=5, head_dim=8)),
    "glm4": lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**TINY, head_dim=8)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TINY)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**TINY, **EXPERTS, head_dim=8, num_experts=4)),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OTHERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**{**TINY, "num_key_value_heads": None}, _attn_implementation="eager")),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**ENDS, **BART, d_model=32)),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **ENDS,
            **BART,
            d_model=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=64,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}
CACHE = "cache" if "cache" in inspect.signature(hf.LlamaForCausalLM.forward).parameters else "past_key_values"
DTYPES = [torch.float32, torch.bfloat16]
IDS = torch.randint(3, V, (3, 24), generator=torch.Generator().manual_seed(0))


def made(name: str, dtype: Any = torch.float32) -> Any:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = {**DECODERS, **OTHERS}[name]()
    for parameter in model.parameters():  # rows that differ in more than their last digits
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and parameter.min() == 1 else 0.0, 0.15)
    return model.to(dtype).eval()


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def padded(lengths: list[int], side: str) -> tuple[Any, Any]:
    """Rows of these lengths out of IDS, with padding on one side."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        place = slice(width - n, None) if side == "left" else slice(n)
        ids[row, place], mask[row, place] = IDS[row % 3, :n], 1
    return ids, mask


def outputs(name: str, model: Any, ids: Any, mask: Any) -> Any:
    """What the model says at each real token, one row after another."""
    if name == "whisper":
        sound = torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40).expand(len(ids), -1, -1).to(model.dtype)
        return model(input_features=sound, decoder_input_ids=ids).logits[mask.bool()]
    if name in ("t5", "bart"):
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids, decoder_attention_mask=mask).logits[
            mask.bool()
        ]
    found = model(input_ids=ids, attention_mask=mask, **positions(name, mask))
    return (found.logits if hasattr(found, "logits") else found.last_hidden_state)[mask.bool()]


def positions(name: str, mask: Any) -> dict[str, Any]:
    """Positions without padding, as `generate` gives them."""
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_it_computes_what_eager_computes(name: str, dtype: Any) -> None:
    model = made(name, dtype)
    model.set_attn_implementation("eager")
    for side in ("left", "right"):
        ids, mask = padded([24, 24, 24] if name == "whisper" else [24, 7, 15], side)
        want = outputs(name, model, ids, mask)
        for options in ({}, {"linear": True}, {"linear": True, "norms": True}):
            got = outputs(name, enable(model, **options), ids, mask)
            limit = (1e-5 if dtype == torch.float32 else 0.05) * want.float().abs().max()
            off = (got - want).float().abs().amax(-1)
            if (
                name in ("gpt_oss", "mixtral", "qwen3_moe") and dtype == torch.bfloat16
            ):  # where a token may go to another expert
                off = off.sort().values[: len(off) * 3 // 4]
            assert off.max() <= limit, (options, side)
        assert torch.equal(outputs(name, disable(model), ids, mask), want)
        assert model.config._attn_implementation == "eager"


LAWFUL = [pytest.param(name, dtype, options, id=f"{name}-{dtype}-{'linear' if options else 'attention'}")
          for name in [*DECODERS, "bert"]
          for dtype, options in (
              (torch.float32, {"linear": True, "norms": True}), (torch.bfloat16, {"linear": True}), (torch.bfloat16, {})
          )
          if options or name == "llama"]  # fmt: skip
# With attention alone it takes bfloat16, whose rounding hides what the rest of a model adds: most often.


def needs_rows_alone(model: Any) -> None:
    """Skip where the linear maps that stay torch's depend on the number of rows."""
    for module in model.modules():
        if type(module) is torch.nn.Linear and "forward" not in module.__dict__:
            x = torch.randn(40, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
            whole = module(x)
            parts = [slice(i, i + 1) for i in range(40)] + [slice(n) for n in (7, 15, 24)]
            for part in parts:
                if not torch.equal(module(x[part]), whole[part]):
                    pytest.skip("torch's linear maps depend on the number of rows here")


@pytest.mark.parametrize(("name", "dtype", "options"), LAWFUL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_what_it_is_alone(name: str, dtype: Any, options: dict[str, bool], side: str) -> None:
    model = enable(made(name, dtype), **options)
    needs_rows_alone(model)
    lengths = [24, 7, 15, 24, 1]
    ids, mask = padded(lengths, side)
    got = outputs(name, model, ids, mask).split(lengths)
    for row, n in enumerate(lengths):
        alone = IDS[row % 3 : row % 3 + 1, :n]
        assert torch.equal(outputs(name, model, alone, torch.ones_like(alone)), got[row]), row


@pytest.mark.parametrize(("name", "dtype", "options"), [case for case in LAWFUL if "bert" not in case.id])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_token_by_token_is_at_once(name: str, dtype: Any, options: dict[str, bool], cache: str) -> None:
    model = enable(made(name, dtype), **options)
    needs_rows_alone(model)
    whole = model(input_ids=IDS).logits
    for cuts in ((1,) * 24, (9, 1, 1, 5, 8), (23, 1)):
        kept = (
            hf.DynamicCache(config=model.config)
            if cache == "dynamic"
            else hf.StaticCache(model.config, max_cache_len=40)
        )
        parts, start = [], 0
        for n in cuts:
            parts.append(model(input_ids=IDS[:, start : start + n], use_cache=True, **{CACHE: kept}).logits)
            start += n
        assert torch.equal(torch.cat(parts, 1), whole), cuts


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sequences_of_several_chunks(name: str) -> None:
    """Windows begin within chunks of 512 keys, and caches drop what is before them."""
    torch.manual_seed(2)
    long = {**TINY, "max_position_embeddings": 2048}
    made_long = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**long)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**long, sliding_window=300, head_dim=8)),
    }
    model = enable(made_long[name]().eval(), linear=True, norms=True)
    ids = torch.randint(3, V, (2, 1300))
    whole = model(input_ids=ids).logits
    mask = torch.ones(2, 1300, dtype=torch.long)
    mask[1, :77] = 0
    places = positions(name, mask)["position_ids"]
    batch = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
    assert torch.equal(batch[0], whole[0])
    assert torch.equal(batch[1, 77:], model(input_ids=ids[1:, 77:]).logits[0])
    kept, start = hf.DynamicCache(config=model.config), 0
    for end in (700, 1024, 1025, 1290, 1291, 1292, 1300):
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], CACHE: kept}
        part = model(input_ids=ids[:, start:end], use_cache=True, **given).logits
        real = mask[:, start:end].bool()
        assert torch.equal(part[real], batch[:, start:end][real]), end
        start = end


ISAS = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import torch, headway as hw
from test_transformers import DECODERS, enable, made, outputs, padded
digest = hashlib.sha256()
with torch.no_grad():
    for name in ("llama", "gemma3", "gpt_oss"):
        for dtype in (torch.float32, torch.bfloat16):
            model = enable(made(name, dtype), linear=True, norms=True)
            digest.update(outputs(name, model, *padded([24, 7, 15], "left")).float().numpy().tobytes())
print(hw.info().isa, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    found = {}
    for isa in hw.info().isas:
        env = {**os.environ, "HEADWAY_ISA": isa}
        command = [sys.executable, "-W", "ignore", "-c", ISAS, str(Path(__file__).parent)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        ran, digest = done.stdout.split()
        assert ran == isa
        found[isa] = digest
    assert len(set(found.values())) == 1, found


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads(), hw.get_num_threads()
    for name in ("llama", "gpt_oss", "gpt2"):
        model = enable(made(name), linear=True, norms=True)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hw.set_num_threads(threads)
            results.append(outputs(name, model, IDS, torch.ones_like(IDS)))
        torch.set_num_threads(before[0])
        hw.set_num_threads(before[1])
        assert torch.equal(*results), name


def test_stock_transformers_breaks_these_laws() -> None:
    """Or the tests above would say nothing."""
    broken = 0
    for name in ("llama", "gemma2"):
        model = made(name, torch.float32)
        ids, mask = padded([24, 7, 15], "left")
        got = outputs(name, model, ids, mask).split([24, 7, 15])
        broken += not torch.equal(outputs(name, model, IDS[1:2, :7], torch.ones(1, 7, dtype=torch.long)), got[1])
    assert broken


def options_of(**given: Any) -> Any:
    return hf.GenerationConfig(max_new_tokens=12, pad_token_id=0, eos_token_id=None, **given)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_oss"])
def test_greedy_text_is_that_of_eager(name: str) -> None:
    model = made(name)
    model.set_attn_implementation("eager")
    ids, mask = padded([24, 7, 15], "left")
    want = model.generate(ids, attention_mask=mask, generation_config=options_of(do_sample=False))
    model = enable(model, linear=True)
    for call in ({}, {"custom_generate": generate}):
        assert torch.equal(
            model.generate(ids, attention_mask=mask, generation_config=options_of(do_sample=False), **call), want
        )


@pytest.mark.parametrize("options", [
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.4}, {"min_p": 0.02, "typical_p": 0.9},
    {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[5], [6, 7]]},
])  # fmt: skip
def test_a_text_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    model = enable(made("llama"), linear=True, norms=True)
    lengths, seeds = [24, 7, 15, 3, 11, 24, 9], list(range(7))
    ids, mask = padded(lengths, "left")

    def text(ids: Any, mask: Any, seed: list[int]) -> Any:
        given = {"generation_config": options_of(do_sample=True, **options), "custom_generate": generate, "seed": seed}
        return model.generate(ids, attention_mask=mask, **given)

    whole = text(ids, mask, seeds)
    assert torch.equal(text(ids, mask, seeds), whole)
    for row, n in enumerate(lengths):
        alone = IDS[row % 3 : row % 3 + 1, :n]
        new = text(alone, torch.ones_like(alone), [seeds[row]])[0, n:]  # which ends at the end-of-text token
        assert torch.equal(new, whole[row, 24 : 24 + len(new)]), row
        assert not whole[row, 24 + len(new) :].any()  # padding
    assert torch.equal(text(ids[:2], mask[:2], seeds[:2]), whole[:2])
    twice = torch.cat([ids, ids, ids[:2]]), torch.cat([mask, mask, mask[:2]]), [*seeds, *seeds, *seeds[:2]]
    assert torch.equal(text(*twice)[7:14], whole)  # 16 rows


def test_the_draws_are_those_of_a_sampler() -> None:
    model = enable(made("llama"), linear=True, norms=True)
    config = options_of(do_sample=True, temperature=0.8, top_k=30, top_p=0.9, repetition_penalty=1.2)
    text = model.generate(IDS[:1], generation_config=config, custom_generate=generate, seed=[4])
    sampler = hw.Sampler(V)
    sampler.admit(hw.SamplingParams.from_generation_config(config), IDS[0], seed=4, **row_options(config))
    sequence = IDS[:1]
    for _ in range(12):
        token = sampler.step(model(input_ids=sequence).logits[:, -1].float())
        sequence = torch.cat([sequence, token[:, None]], 1)
    assert torch.equal(sequence, text)


def test_params_of_a_generation_config() -> None:
    make = hw.SamplingParams.from_generation_config
    assert make(hf.GenerationConfig()) == hw.SamplingParams(temperature=0)
    assert make(hf.GenerationConfig(do_sample=True)) == hw.SamplingParams(dialect="hf", top_k=50)
    config = hf.GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=1.0, min_p=0.1, typical_p=0.9)
    assert make(config) == hw.SamplingParams(
        dialect="hf", temperature=0.7, top_k=0, top_p=1.0, min_p=0.1, typical_p=0.9
    )
    with pytest.raises(ValueError, match=r"^top_h: expected None, got 0.5"):
        make(hf.GenerationConfig(do_sample=True, top_h=0.5))
    assert row_options(hf.GenerationConfig()) == {}


def test_params_are_those_of_stock_generate() -> None:
    """What a config leaves unset is filled in by `generate`: the same tokens stay."""
    model, ids = made("llama"), torch.arange(3, 9)[None]
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 3}
    for given in ({}, {"top_k": 7}, {"top_p": 0.5, "temperature": 0.3}, {"top_k": 0}):
        config = hf.GenerationConfig(do_sample=True, **given)
        stock = model.generate(ids, generation_config=config, **options)
        params = hw.SamplingParams.from_generation_config(config)
        for scores, logits in zip(stock.scores, stock.logits, strict=True):
            kept = hw.filter_logits(logits, params)
            assert torch.equal(torch.isfinite(scores), torch.isfinite(kept)), given


def test_scores_are_what_tokens_are_drawn_by() -> None:
    model, ids = made("llama"), torch.arange(3, 15).reshape(2, 6)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 3}
    out = model.generate(ids, custom_generate=generate, do_sample=True, top_k=5, temperature=0.7, seed=1, **options)
    want = model.generate(
        ids, custom_generate=generate, do_sample=True, top_k=5, temperature=0.7, seed=1, max_new_tokens=3
    )
    assert torch.equal(out.sequences, want)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        probabilities = hw.probabilities(logits, temperature=0.7, top_k=5, dialect="hf")
        torch.testing.assert_close(scores.exp(), probabilities, rtol=1e-5, atol=1e-7)
    found = model.compute_transition_scores(out.sequences, out.scores)
    assert bool((found < 0).all())


def test_drafts_are_refused() -> None:
    model, ids = made("llama"), torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match=r"^prompt_lookup_num_tokens: expected None, got 3"):
        model.generate(ids, custom_generate=generate, do_sample=True, max_new_tokens=3, prompt_lookup_num_tokens=3)


def test_weights_come_where_they_are_asked_for() -> None:
    model = made("llama")
    model.set_attn_implementation("eager")
    ids, mask = padded([24, 7], "left")
    want = model(ids, attention_mask=mask, output_attentions=True).attentions
    got = enable(model)(ids, attention_mask=mask, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        real = mask[:, None, :, None].bool()
        assert ((a - b) * real).abs().max() < 1e-6


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a model of transformers, got 3"):
        enable(3)  # type: ignore[arg-type]
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=V, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(
        ValueError, match=r"^model: expected one whose attention goes by .* got BloomForCausalLM, whose"
    ):
        enable(bloom)
    assert not any("forward" in module.__dict__ for module in bloom.modules())
    with pytest.raises(ValueError, match=r"^model: expected one in evaluation mode.*`model.eval\(\)`"):
        enable(made("llama").train())
    model = enable(made("llama"))
    with pytest.raises(ValueError, match=r"^num_beams: expected 1, got 2"):
        model.generate(IDS, generation_config=options_of(num_beams=2), custom_generate=generate)
    with pytest.raises(ValueError, match=r"^seed: expected one integer, or 3, one for each row"):
        model.generate(IDS, generation_config=options_of(do_sample=True), custom_generate=generate, seed=[1, 2])
    layer = model.model.layers[0].self_attn
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"^block_size: no such option of attention in headway, got 3"):
        hf.AttentionInterface()["headway"](layer, q, q[:, :2], q[:, :2], None, block_size=3)
    with pytest.raises(ValueError, match=r"^dropout: expected 0, got 0.1"):
        hf.AttentionInterface()["headway"](layer, q, q[:, :2], q[:, :2], None, dropout=0.1)
    with torch.enable_grad(), pytest.raises((TypeError, ValueError), match=r"forward only|gradient"):
        model(IDS)


def test_masks_of_the_users_own() -> None:
    """Boolean and additive ones, (B, 1, L, S), which transformers hands on as they are."""
    model = made("llama")
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    causal[:, 5] = False
    causal[5, 5] = True
    additive = torch.where(causal, 0.0, torch.finfo(torch.float32).min)[None, None].expand(3, -1, -1, -1)
    model.set_attn_implementation("eager")
    want = model(IDS, attention_mask=additive).logits
    enable(model)
    assert (model(IDS, attention_mask=additive).logits - want).abs().max() < 1e-5
    assert (model(IDS, attention_mask=causal[None, None].expand(3, -1, -1, -1)).logits - want).abs().max() < 1e-5
    assert np.isfinite(want.numpy()).all()
