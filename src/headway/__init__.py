"""headway: attention and next-token sampling for LLM inference. The contract is docs/semantics.md."""

from typing import Any as _Any

from ._attention import (
    AttentionState,
    KVCache,
    attention,
    attention_weights,
    linear,
    merge_attention,
    multi_head_attention,
    partial_attention,
    rms_norm,
    rotary,
    swiglu,
)
from ._sampling import (
    Candidate,
    Drawn,
    Explanation,
    Logprobs,
    RowError,
    Sampler,
    SamplingParams,
    Stage,
    Verified,
    Why,
    dialects,
    explain,
    filter_logits,
    logprobs,
    penalize,
    probabilities,
    sample,
    verify_draft,
)
from .runtime import Info, get_num_threads, info, set_num_threads

__all__ = [
    "AttentionState",
    "Candidate",
    "Drawn",
    "Explanation",
    "Info",
    "KVCache",
    "Logprobs",
    "RowError",
    "Sampler",
    "SamplingParams",
    "Stage",
    "Verified",
    "Why",
    "attention",
    "attention_weights",
    "dialects",
    "explain",
    "filter_logits",
    "get_num_threads",
    "info",
    "linear",
    "logprobs",
    "merge_attention",
    "multi_head_attention",
    "partial_attention",
    "penalize",
    "probabilities",
    "rms_norm",
    "rotary",
    "sample",
    "set_num_threads",
    "swiglu",
    "verify_draft",
]


def __getattr__(name: str) -> _Any:
    """Look the version up only when it is asked for: that takes longer than importing all of headway."""
    if name == "__version__":
        return info().version
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
