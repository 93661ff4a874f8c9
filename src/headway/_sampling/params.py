"""SamplingParams, written by tools/make_params.py from the records in stages.py and settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import ArrayLike

from .. import _check
from .._signatures import defaults_of, shows_options
from .options import SamplingOptions
from .settings import Params

__all__ = ["SamplingOptions", "SamplingParams"]


@_check.public
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SamplingParams(Params):
    """How to sample: checked once, frozen, hashable; the options that `sample` takes as keywords.

    A number may be an array too, one value per row, of a shape that broadcasts to the leading axes of the logits.

    Args:
        temperature: finite, >= 0. Logits are divided by it. 0 is argmax, the lowest id among equal logits.
        dynamic_temperature_range: the temperature goes from temperature - range to temperature + range with the
            entropy.
        dynamic_temperature_exponent: of the entropy as a share of the largest possible, by which the temperature rises;
            1 unless given.
        top_n_sigma: above 0. Keeps logits up to n standard deviations below the best one (Tang et al., 2024).
        top_k: at least 1. Keeps the k best tokens: logit descending, id ascending (Fan et al., 2018).
        top_p: in (0, 1]. Keeps a token iff the mass strictly before it is below p (Holtzman et al., 2020); 1 is off.
        min_p: in [0, 1]. Keeps a token iff it has at least min_p times the best one's mass (Nguyen et al., 2024).
        typical_p: in (0, 1]. As top_p, in the order of how far surprise is from the entropy (Meister et al., 2022).
        epsilon_cutoff: in [0, 1]. Keeps a token iff it has at least this share of the mass (Hewitt et al., 2022).
        eta_cutoff: in [0, 1]. The same with min(eta, sqrt(eta) exp(-entropy)) as the share.
        xtc_probability: in [0, 1]. With this probability removes all but the last of the tokens that reach the
            threshold.
        xtc_threshold: in [0, 1], a share of the mass; 0.1 unless given.
        xtc_special_tokens: ids that xtc never removes, such as those of the end and of a newline: one list for all
            rows.
        min_tokens_to_keep: at least 1. Every stage leaves so many tokens, where there are so many.
        allowed: which tokens may be drawn: a bool array (..., V), an int32 or uint32 array (..., ceil(V / 32)) with
            token 0 in the lowest bit of the first word, or a list, tuple, set or int64 array of ids. An int32 or uint32
            array is always a packed mask, never ids. (1, ceil(V / 32)), as grammar libraries allocate it, will do for a
            lone row.
        logit_bias: added to the logits before all else: an array (V,) or (..., V), or a dict {id: bias}; -inf bans.
        ties: "lowest_id", exactly k tokens; "keep", also all tokens equal to the k-th.
        nucleus: "after_top_k" measures top_p over what top_k left, "joint" over all tokens that are not banned.
        dialect: None, or the library whose order, ties, boundaries and zeros to follow: "hf" (transformers), "vllm",
            "llama.cpp", "flashinfer", "sglang" or "mlx" (mlx-lm). docs/semantics.md has the table.
        seed: a whole number below 2^64, or one per row, of exactly the leading shape; None takes fresh entropy.
        position: a whole number below 2^64, 0 unless given: which draw of the seed's this is, such as the step.
        uniform: numbers in [0, 1) of the caller's own generator, instead of seed and position.

    Raises:
        ValueError, TypeError: they name the option, what was expected and what came.

    >>> import headway as hw
    >>> params = hw.SamplingParams(temperature=0.8, top_k=2, seed=1)
    >>> hw.sample([0.5, 3.0, 2.5], params)
    2
    """

    temperature: ArrayLike = 1.0
    dynamic_temperature_range: ArrayLike | None = None
    dynamic_temperature_exponent: ArrayLike = 1.0
    top_n_sigma: ArrayLike | None = None
    top_k: ArrayLike | None = None
    top_p: ArrayLike | None = None
    min_p: ArrayLike | None = None
    typical_p: ArrayLike | None = None
    epsilon_cutoff: ArrayLike | None = None
    eta_cutoff: ArrayLike | None = None
    xtc_probability: ArrayLike | None = None
    xtc_threshold: ArrayLike = 0.1
    xtc_special_tokens: Any = None
    min_tokens_to_keep: ArrayLike = 1
    allowed: Any = None
    logit_bias: Any = None
    ties: Literal["lowest_id", "keep"] = "lowest_id"
    nucleus: Literal["after_top_k", "joint"] = "after_top_k"
    dialect: Literal["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"] | None = None
    seed: ArrayLike | None = None
    position: ArrayLike | None = None
    uniform: ArrayLike | None = None


shows_sampling_options = shows_options(SamplingOptions, defaults_of(SamplingParams))
