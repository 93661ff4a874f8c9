"""headway: attention and next-token sampling for LLM inference. The contract is docs/semantics.md."""

from typing import Any

from .attention import AttentionState, attention, attention_weights, merge_attention, partial_attention
from .cache import KVCache
from .explain import Explanation, explain
from .layers import linear, rms_norm, rotary, swiglu
from .logprobs import Logprobs, logprobs
from .multihead import multi_head_attention
from .penalties import penalize
from .runtime import Info, get_num_threads, info, set_num_threads
from .sampling import SamplingParams, filter_logits, probabilities, sample
from .serving import Sampler
from .speculative import Verified, verify_draft

__all__ = [
    "AttentionState",
    "Explanation",
    "Info",
    "KVCache",
    "Logprobs",
    "Sampler",
    "SamplingParams",
    "Verified",
    "attention",
    "attention_weights",
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


def __getattr__(name: str) -> Any:
    """Look the version up only when it is asked for: that takes longer than importing all of headway."""
    if name == "__version__":
        return info().version
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
