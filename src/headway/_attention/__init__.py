"""Attention, and the other operations of a transformer layer."""

from .attention import attention, attention_weights
from .cache import KVCache
from .layers import linear, rms_norm, rotary, swiglu
from .multihead import multi_head_attention
from .partial import AttentionState, merge_attention, partial_attention

__all__ = [
    "AttentionState",
    "KVCache",
    "attention",
    "attention_weights",
    "linear",
    "merge_attention",
    "multi_head_attention",
    "partial_attention",
    "rms_norm",
    "rotary",
    "swiglu",
]
