"""Write src/headway/_sampling/params.py: the options of sampling as type checkers, editors and readers see them.

    python tools/make_params.py

It lists what the records in stages.py and settings.py say, because tools that read code do not run it.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from headway._sampling.settings import OPTIONS

TARGET = Path(__file__).parent.parent / "src/headway/_sampling/params.py"
HEAD = '''"""SamplingParams, written by tools/make_params.py from the records in stages.py and settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from numpy.typing import ArrayLike

from .. import _check
from .._signatures import defaults_of, shows_options
from .settings import Params

__all__ = ["SamplingOptions", "SamplingParams"]


class SamplingOptions(TypedDict, total=False):
    """The options of `sample`, `probabilities` and `filter_logits`; `SamplingParams` explains them."""

{typed}


@_check.public
@dataclass(frozen=True, eq=False, repr=False)
class SamplingParams(Params):
    """How to sample: checked once, frozen, hashable; the options that `sample` takes as keywords.

    A number may be an array too, one value per row, of a shape that broadcasts to the leading axes of the logits.

    Args:
{documented}

    Raises:
        ValueError, TypeError: they name the option, what was expected and what came.

    >>> import headway as hw
    >>> params = hw.SamplingParams(temperature=0.8, top_k=2, seed=1)
    >>> hw.sample([0.5, 3.0, 2.5], params)
    2
    """

{fields}


shows_sampling_options = shows_options(SamplingOptions, defaults_of(SamplingParams))
'''


def text() -> str:
    """Return what the file should hold."""
    documented = (
        textwrap.fill(
            f"{option.name}: {option.says}",
            width=120,
            initial_indent=" " * 8,
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for option in OPTIONS
    )

    def value(default: object) -> str:
        return f'"{default}"' if isinstance(default, str) else repr(default)

    return HEAD.format(
        typed="\n".join(f"    {option.name}: {option.type}" for option in OPTIONS),
        documented="\n".join(documented),
        fields="\n".join(f"    {option.name}: {option.type} = {value(option.default)}" for option in OPTIONS),
    )


if __name__ == "__main__":
    TARGET.write_text(text())
