"""Next-token sampling, and what a serving loop needs beside it."""

from .bans import Bans
from .checks import CHECKS
from .dialects import DIALECTS, NUCLEUS, OFF, OPTIONAL, Reading, Step, rules
from .explain import Explanation, explain
from .logprobs import Logprobs, logprobs
from .params import Options, SamplingParams
from .penalties import Penalties, penalize
from .sample import filter_logits, probabilities, sample
from .sampler import Drawn, Sampler
from .speculative import Verified, verify_draft

__all__ = [
    "CHECKS",
    "DIALECTS",
    "NUCLEUS",
    "OFF",
    "OPTIONAL",
    "Bans",
    "Drawn",
    "Explanation",
    "Logprobs",
    "Options",
    "Penalties",
    "Reading",
    "Sampler",
    "SamplingParams",
    "Step",
    "Verified",
    "explain",
    "filter_logits",
    "logprobs",
    "penalize",
    "probabilities",
    "rules",
    "sample",
    "verify_draft",
]
