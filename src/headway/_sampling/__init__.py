"""Next-token sampling, penalties, log-probabilities, drafts, and the sampler of a serving loop."""

from .bans import Bans
from .call import with_options
from .checks import Choice, Integers, Reading
from .dialects import DIALECTS, NUCLEUS, OPTIONAL, Step, dialects, rules
from .explain import Candidate, Explanation, Stage, Why, explain
from .logprobs import Logprobs, logprobs
from .params import SamplingOptions, SamplingParams, shows_sampling_options
from .penalties import Penalties, penalize
from .sample import filter_logits, probabilities, sample
from .sampler import Drawn, RowError, Sampler
from .settings import CHECKS, DEFAULTS, OPTIONS
from .speculative import Verified, verify_draft
from .stages import OFF, STAGES

__all__ = [
    "CHECKS",
    "DEFAULTS",
    "DIALECTS",
    "NUCLEUS",
    "OFF",
    "OPTIONAL",
    "OPTIONS",
    "STAGES",
    "Bans",
    "Candidate",
    "Choice",
    "Drawn",
    "Explanation",
    "Integers",
    "Logprobs",
    "Penalties",
    "Reading",
    "RowError",
    "Sampler",
    "SamplingOptions",
    "SamplingParams",
    "Stage",
    "Step",
    "Verified",
    "Why",
    "dialects",
    "explain",
    "filter_logits",
    "logprobs",
    "penalize",
    "probabilities",
    "rules",
    "sample",
    "shows_sampling_options",
    "verify_draft",
    "with_options",
]
