"""What NumPy arrays, lists and arrays of another library's give. Every type here is right."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import headway as hw


class Foreign:
    """An array as torch, JAX and MLX describe theirs."""

    dtype: str
    shape: tuple[int, ...]


x: NDArray[np.float32] = np.ones((1, 2, 4), np.float32)
rows = [[[1.0, 0.0], [0.0, 1.0]]]
tensor = Foreign()
cache = hw.KVCache(1, 4)
flag = bool(x.any())


def of_attention() -> None:
    assert_type(hw.attention(x, x, x), NDArray[Any])
    assert_type(hw.attention(rows, x, tensor, causal="top_left", window=(3, None), scale=0.5), NDArray[Any])
    assert_type(hw.attention(tensor, tensor, x, mask=[[1, 0]], bias=x, kv_lengths=[2], precision="fast"), Foreign)
    assert_type(hw.attention(x, x, x, return_lse=True), tuple[NDArray[Any], NDArray[Any]])
    assert_type(hw.attention(tensor, x, x, return_lse=True, causal=True), tuple[Foreign, Foreign])
    assert_type(hw.attention(tensor, x, x, return_lse=False, sinks=[0.0]), Foreign)
    assert_type(hw.attention(tensor, x, x, return_lse=flag), Any)
    assert_type(hw.attention_weights(rows, rows, softcap=30.0), NDArray[Any])
    assert_type(hw.attention_weights(tensor, x, causal=None), Foreign)


def of_a_cache() -> None:
    cache.append(tensor, x)
    assert_type(cache.keys, NDArray[Any])
    assert_type(cache.attend(x), NDArray[Any])
    assert_type(cache.attend(tensor, causal="top_left"), Foreign)
    assert_type(cache.attend(rows, return_lse=True), tuple[NDArray[Any], NDArray[Any]])
    assert_type(cache.attend(tensor, return_lse=True, precision="exact"), tuple[Foreign, Foreign])
    assert_type(cache.attend(tensor, return_lse=flag), Any)


def of_layers() -> None:
    assert_type(hw.multi_head_attention(x, x, x, num_heads=2, w_q=tensor, decimals=3, causal=True), NDArray[Any])
    assert_type(hw.multi_head_attention(tensor, x, x, num_heads=2, num_kv_heads=1, w_o=rows), Foreign)
    assert_type(hw.multi_head_attention(tensor, x, x, num_heads=2, return_lse=True), tuple[Foreign, Foreign])
    assert_type(hw.multi_head_attention(x, x, x, num_heads=2, return_lse=flag), Any)
    assert_type(hw.linear(rows, x), NDArray[Any])
    assert_type(hw.linear(tensor, x, [1.0]), Foreign)
    assert_type(hw.rotary(x, positions=[1]), NDArray[Any])
    assert_type(hw.rotary(tensor, frequencies=x), Foreign)
    assert_type(hw.rms_norm(tensor, x), Foreign)
    assert_type(hw.swiglu([1.0], [2.0]), NDArray[Any])


def of_parts() -> None:
    states = [hw.partial_attention(tensor, x, x, key_offset=512, causal="top_left", window=(2, 0))]
    assert_type(states, list[hw.AttentionState])
    assert_type(hw.merge_attention(states, return_lse=True), tuple[Any, Any])


def of_sampling() -> None:
    params = hw.SamplingParams(top_k=[3, 4], dialect="vllm")
    assert_type(hw.sample([1.0, 2.0], params, seed=3), int)
    assert_type(hw.sample([[1.0, 2.0]], temperature=0.5), NDArray[np.int64])
    assert_type(hw.sample(x, top_p=0.9), Any)  # an int for a lone row
    assert_type(hw.sample([1.0, 2.0], num_samples=2), NDArray[np.int64])
    assert_type(hw.sample(x, num_samples=2, replacement=False), NDArray[np.int64])
    assert_type(hw.sample(tensor, num_samples=2), Foreign)
    assert_type(hw.probabilities(x, params), NDArray[Any])
    assert_type(hw.probabilities(tensor, min_p=0.1), Foreign)
    assert_type(hw.filter_logits(tensor, ties="keep"), Foreign)
    assert_type(hw.penalize([1.0, 2.0], [1], repetition=1.3), NDArray[Any])
    assert_type(hw.penalize(tensor, tensor, lengths=tensor, unknown_tokens="ignore"), Foreign)
    assert_type(hw.logprobs(tensor, top=2), hw.Logprobs)
    assert_type(hw.verify_draft(tensor, None, [1]), hw.Verified)
    assert_type(hw.explain([1.0, 2.0], top_k=1), hw.Explanation)


def of_a_sampler() -> None:
    sampler = hw.Sampler(4)
    assert_type(sampler.admit(hw.SamplingParams(), tensor, seed=3, dry_multiplier=0.8), int)
    assert_type(sampler.step(rows[0]), NDArray[np.int64])
    assert_type(sampler.step(tensor, allowed=[None]), Foreign)
