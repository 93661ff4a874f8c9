"""Write options.py and params.py of src/headway/_sampling: sampling's options as type checkers and readers see them.

    python tools/make_params.py

They list what the records in stages.py and settings.py say, because tools that read code do not run it.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

from headway._sampling.settings import OPTIONS
from headway._sampling.stages import Option

FOLDER = Path(__file__).parent.parent / "src/headway/_sampling"
OPTIONS_PAGE = '''"""The options of a call, given and checked; written by tools/make_params.py from the records."""

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

{given}


class Settings:
    """The options of one call once they are checked. Nobody changes them: calls share them.

    Numbers are arrays (), or of a shape that broadcasts to the rows. An option that is off is None. `vars` has the
    options alone; `made` is what was made of them for one call, and serves the next, by key.
    """

    __slots__ = ("__dict__", "made")
    made: dict[Any, Any]

{checked}

    @staticmethod
    def of(values: dict[str, Any], made: dict[Any, Any] | None = None) -> Settings:
        """Return settings made of this dict, one value for each field; the constructor takes ten times as long."""
        settings = object.__new__(Settings)
        settings.__dict__ = values
        settings.made = {{}} if made is None else made
        return settings

    def updated(self, changes: Mapping[str, Any]) -> Settings:
        """Return settings that differ in these fields."""
        return Settings.of({{**self.__dict__, **changes}})

    def beside(self, changes: Mapping[str, Any]) -> Settings:
        """Return settings that differ in these fields, none of which matters to what was made."""
        return Settings.of({{**self.__dict__, **changes}}, self.made)

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
        return Settings.of, ({{**vars(self)}},)
'''
PARAMS_PAGE = '''"""SamplingParams, written by tools/make_params.py from the records in stages.py and settings.py."""

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


def texts() -> dict[Path, str]:
    """Return what each file should hold."""
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

    return {
        FOLDER / "options.py": OPTIONS_PAGE.format(
            given="\n".join(f"    {option.name}: {option.type}" for option in OPTIONS),
            checked="\n".join(f"    {option.name}: {checked_type(option)}" for option in OPTIONS),
        ),
        FOLDER / "params.py": PARAMS_PAGE.format(
            documented="\n".join(documented),
            fields="\n".join(f"    {option.name}: {option.type} = {value(option.default)}" for option in OPTIONS),
        ),
    }


def checked_type(option: Option) -> str:
    """Return the type of what the option's check returns."""
    if option.type.startswith("Literal"):
        return option.type
    returned: str = inspect.signature(option.check).return_annotation
    return returned if option.default is None else returned.removesuffix(" | None")


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text)
