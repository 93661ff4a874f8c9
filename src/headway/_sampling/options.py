"""The options of a call, given and checked; written by tools/make_params.py from the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict

from numpy.typing import ArrayLike

from .checks import Sparse
from .rows import Array

__all__ = ["SamplingOptions", "Settings"]

_MOST_MADE = 1000


class SamplingOptions(TypedDict, total=False):
    """The options of `sample`, `probabilities` and `filter_logits`; `SamplingParams` explains them."""

    temperature: ArrayLike
    dynamic_temperature_range: ArrayLike | None
    dynamic_temperature_exponent: ArrayLike
    top_n_sigma: ArrayLike | None
    top_k: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None
    typical_p: ArrayLike | None
    epsilon_cutoff: ArrayLike | None
    eta_cutoff: ArrayLike | None
    xtc_probability: ArrayLike | None
    xtc_threshold: ArrayLike
    xtc_special_tokens: Any
    min_tokens_to_keep: ArrayLike
    allowed: Any
    logit_bias: Any
    ties: Literal["lowest_id", "keep"]
    nucleus: Literal["after_top_k", "joint"]
    dialect: Literal["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"] | None
    seed: ArrayLike | None
    position: ArrayLike | None
    uniform: ArrayLike | None


class Settings:
    """The options of one call once they are checked. Nobody changes them: calls share them.

    Numbers are arrays (), or of a shape that broadcasts to the rows. An option that is off is None. `vars` has the
    options alone; `made` is what was made of them for one call, and serves the next, by key.
    """

    __slots__ = ("__dict__", "made")
    made: dict[Any, Any]

    temperature: Array
    dynamic_temperature_range: Array | None
    dynamic_temperature_exponent: Array
    top_n_sigma: Array | None
    top_k: Array | None
    top_p: Array | None
    min_p: Array | None
    typical_p: Array | None
    epsilon_cutoff: Array | None
    eta_cutoff: Array | None
    xtc_probability: Array | None
    xtc_threshold: Array
    xtc_special_tokens: tuple[int, ...] | None
    min_tokens_to_keep: Array
    allowed: Array | None
    logit_bias: Array | Sparse | None
    ties: Literal["lowest_id", "keep"]
    nucleus: Literal["after_top_k", "joint"]
    dialect: Literal["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"] | None
    seed: Array | None
    position: Array | None
    uniform: Array | None

    @staticmethod
    def of(values: dict[str, Any], made: dict[Any, Any] | None = None) -> Settings:
        """Return settings made of this dict, one value for each field; the constructor takes ten times as long."""
        settings = object.__new__(Settings)
        settings.__dict__ = values
        settings.made = {} if made is None else made
        return settings

    def updated(self, changes: Mapping[str, Any]) -> Settings:
        """Return settings that differ in these fields."""
        return Settings.of({**self.__dict__, **changes})

    def beside(self, changes: Mapping[str, Any]) -> Settings:
        """Return settings that differ in these fields, none of which matters to what was made."""
        return Settings.of({**self.__dict__, **changes}, self.made)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what was made for this key the first time."""
        made = self.made.get(key)
        if made is None:
            made = make()
            if len(self.made) >= _MOST_MADE:
                self.made.clear()
            self.made[key] = made
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the options alone."""
        return Settings.of, ({**vars(self)},)
