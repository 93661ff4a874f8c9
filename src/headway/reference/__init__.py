"""The definition: every operation of headway once more, in plain NumPy and float64, written to be read.

Nothing here is fast and nothing is clever. A docstring is the formula, and the body is the formula again, one
step a line. The compiled library is tested against these files: where the two disagree, one of them has a bug.
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

from ._attention.attention import allowed_keys, attention, attention_weights, scores, softmax
from ._attention.cache import KVCache
from ._attention.layers import linear, rms_norm, rotary, swiglu
from ._attention.multihead import multi_head_attention
from ._attention.partial import AttentionState, merge_attention, partial_attention
from ._sampling.explain import explain
from ._sampling.logprobs import logprobs
from ._sampling.penalties import penalize
from ._sampling.rng import philox
from ._sampling.sample import filter_logits, masses, probabilities, sample
from ._sampling.sampler import Sampler
from ._sampling.speculative import verify_draft

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
    "masses",
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
]
