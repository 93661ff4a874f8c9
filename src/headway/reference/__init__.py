"""The definition: every operation of headway once more, in plain NumPy and float64, written to be read.

Nothing here is fast and nothing is clever. A docstring is the formula, and the body is the formula again, one
step a line. The compiled library is tested against this file: where the two disagree, one of them has a bug.
Arguments are hardly checked here; that is the public functions' task.

The alphabet of shapes, the same everywhere in headway:

    ...  batch: any number of leading axes, none included
    H    query heads                  L    queries
    G    key/value heads              S    keys, and values: each key has one
    D    head size of q and k         E    head size of v
    M    model width, often H * D

If attention is new to you, begin with `attention` and think of one head and no options. L queries each put a
question to S keys. How well a key answers is a number, the score. `softmax` turns a query's scores into
weights: positive, and 1 in total. The result is the average of the keys' values under those weights.
"""

from .attention import (
    AttentionState,
    KVCache,
    allowed_keys,
    attention,
    attention_weights,
    linear,
    merge_attention,
    multi_head_attention,
    partial_attention,
    rms_norm,
    rotary,
    scores,
    softmax,
    swiglu,
)
from .explanation import explain
from .sampling import filter_logits, philox, probabilities, sample, weights
from .serving import Sampler, logprobs, penalize, verify_draft

__all__ = [
    "AttentionState",
    "KVCache",
    "Sampler",
    "allowed_keys",
    "attention",
    "attention_weights",
    "explain",
    "filter_logits",
    "linear",
    "logprobs",
    "merge_attention",
    "multi_head_attention",
    "partial_attention",
    "penalize",
    "philox",
    "probabilities",
    "rms_norm",
    "rotary",
    "sample",
    "scores",
    "softmax",
    "swiglu",
    "verify_draft",
    "weights",
]
