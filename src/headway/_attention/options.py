"""The options of attention, each with its type; their defaults stand in the signature of `prepare`."""

from __future__ import annotations

from typing import Literal, TypeAlias, TypedDict

from .._signatures import AnyArray

Corner: TypeAlias = Literal["top_left", "bottom_right"]
Causal: TypeAlias = Corner | bool | None
Window: TypeAlias = tuple[int | None, int | None] | None
Precision: TypeAlias = Literal["exact", "fast"]


class PartOptions(TypedDict, total=False):
    """The options of `partial_attention`; `attention` explains them."""

    mask: AnyArray | None
    bias: AnyArray | None
    causal: Causal
    window: Window
    scale: float | None
    softcap: float | None
    kv_lengths: AnyArray | None


class WeightOptions(PartOptions, total=False):
    """The options of `attention_weights`."""

    sinks: AnyArray | None


class AttentionOptions(WeightOptions, total=False):
    """The options of `attention`, and of `KVCache.attend`."""

    precision: Precision


class MultiHeadOptions(AttentionOptions, total=False):
    """The options of `multi_head_attention`, which explains those of its own."""

    w_q: AnyArray | None
    w_k: AnyArray | None
    w_v: AnyArray | None
    w_o: AnyArray | None
    b_q: AnyArray | None
    b_k: AnyArray | None
    b_v: AnyArray | None
    b_o: AnyArray | None
    num_kv_heads: int | None
    decimals: int | None
