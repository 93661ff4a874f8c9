"""Calls of the public functions on one array, for libraries that call them inside their transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import headway as hw

# Of x (2, 4, 8): (H, L, D), (rows, L, M), or rows of logits.
CALLS: dict[str, Callable[[Any], Any]] = {
    "attention": lambda x: hw.attention(x, x, x),
    "attention, lse": lambda x: hw.attention(x, x * 2, x, causal=True, return_lse=True),
    "attention, options": lambda x: hw.attention(
        x, x[..., :1, :, :], x[..., :1, :, :4], causal="bottom_right", window=(2, None), scale=0.3, softcap=5.0
    ),
    "attention, arrays": lambda x: hw.attention(
        x, x, x, mask=x[..., :4] > 0, bias=x[..., :4], sinks=x[..., 0, 0], kv_lengths=3
    ),
    "attention, NumPy's mask": lambda x: hw.attention(x, x, x, mask=np.tri(4, dtype=bool), causal=False),
    "attention, fast": lambda x: hw.attention(x, x, x, precision="fast"),
    "attention_weights": lambda x: hw.attention_weights(x, x, causal=True),
    "multi_head_attention": lambda x: hw.multi_head_attention(
        x, x, x, num_heads=2, w_q=np.eye(8, dtype=np.float32), b_q=x[0, 0], causal=True, return_lse=True, decimals=4
    ),
    "multi_head_attention, groups": lambda x: hw.multi_head_attention(
        x, x[..., :4], x[..., :4], num_heads=4, num_kv_heads=2, w_o=np.ones((8, 3), np.float32)
    ),
    "linear": lambda x: hw.linear(x, np.ones((8, 3), np.float32)),
    "linear, an offset": lambda x: hw.linear(x, np.ones((8, 3), np.float32), x[0, 0, :3]),
    "rotary": lambda x: hw.rotary(x, positions=[3, 2, 1, 0], base=500.0),
    "rotary, frequencies": lambda x: hw.rotary(x, frequencies=[1.0, 0.5, 0.25, 0.125]),
    "rms_norm": lambda x: hw.rms_norm(x, np.ones(8, np.float32), eps=1e-5),
    "swiglu": lambda x: hw.swiglu(x, x * 2),
    "sample": lambda x: hw.sample(x, temperature=0.7, top_p=0.9, seed=2**64 - 1, position=3),
    "sample, several": lambda x: hw.sample(x, num_samples=3, replacement=False, seed=5, allowed=[0, 2, 3, 5]),
    "sample, an array": lambda x: hw.sample(x, temperature=x[..., 0] ** 2, seed=1),
    "probabilities": lambda x: hw.probabilities(x, top_k=3, min_p=0.01),
    "filter_logits": lambda x: hw.filter_logits(x, typical_p=0.5),
    "filter_logits, bias": lambda x: hw.filter_logits(x, logit_bias={1: -np.inf, 3: 0.5}),
    "penalize": lambda x: hw.penalize(x, [[[0, 1, 1]] * 4, [[3, 2, 3]] * 4], repetition=1.3, window=2),
}
