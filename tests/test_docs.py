"""The documentation's code runs: README.md and all of docs/, block by block, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway
import headway.lm
import headway.plot

ROOT = Path(__file__).parent.parent
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(test: doctest.DocTest) -> None:
    """Run one doctest with NumPy printing as it does by default, whatever came before."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    with np.printoptions():
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str) -> None:
    """Run all blocks of one page in one namespace, with the line numbers of the page."""
    text = PAGES[name].read_text()
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        assert code[0].startswith(">>> "), f"{name}:{first + 1}: a block of code begins with >>>"
        lines[first : first + len(code)] = code
    run(doctest.DocTestParser().get_doctest("\n".join(lines), {}, name, name, 0))


def test_the_pages_have_code() -> None:
    found = {name: len(BLOCK.findall(page.read_text())) for name, page in PAGES.items()}
    assert found["README.md"] >= 2
    assert found["docs/explanation.md"] >= 20
    assert all("```py\n" not in page.read_text() for page in PAGES.values())  # would not be run


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Look up each link to a file, and each to a heading, by the name that GitHub gives it."""
    text = re.sub(r"^```.*?^```", "", PAGES[name].read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = PAGES[name].parent / path if path else PAGES[name]
        assert file.exists(), target
        if heading:
            assert heading in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    found: list[str] = []
    for title in re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        found.append(anchor + (f"-{found.count(anchor)}" if anchor in found else ""))
    return set(found)


# Attributes of what a function returns, and numbers that are set by a constructor that nobody calls, need no sections.
NO_ARGS = {"Explanation", "TextStream", "TextOptions", "dialects"}


def faces() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, and the public methods and properties of the classes."""
    for module in (headway, headway.lm, headway.plot):
        for name in module.__all__:
            face = getattr(module, name)
            if not inspect.isfunction(face) and not inspect.isclass(face):
                continue
            yield name, face
            for own, method in vars(face).items() if inspect.isclass(face) else ():
                for part in ("fget", "func", "__func__"):
                    method = getattr(method, part, method)
                if inspect.isfunction(method) and not own.startswith("_"):
                    yield f"{name}.{own}", method


@pytest.mark.parametrize(("name", "face"), list(faces()), ids=lambda value: value if isinstance(value, str) else "")
def test_docstrings_have_their_sections(name: str, face: Any) -> None:
    """Args with each parameter, Returns, Raises where arguments can be wrong, and an example."""
    text = inspect.getdoc(face) or ""
    assert ">>> " in text, "an example"
    hints = {} if inspect.isclass(face) else typing.get_type_hints(face)
    assert "Returns:" in text or hints.get("return", type(None)) is type(None)
    listed = re.findall(r"^    (\**\w+(?:, \**\w+)*):", text.partition("Args:")[2], re.MULTILINE)
    arguments = {argument for line in listed for argument in line.split(", ")}
    shown = [] if name in NO_ARGS else [p for p in inspect.signature(face).parameters if p not in ("self", "_wrap")]
    if "**options" in arguments or "**penalties" in arguments:  # which stand for those of a TypedDict
        shown = [p for p in shown if p in own_parameters(face)]
    assert set(shown) <= arguments, "Args"
    made = inspect.isclass(face) and not hasattr(face.__init__, "__wrapped__")  # by a function, not by the user
    assert "Raises:" in text or not shown or made, "Raises"


def own_parameters(face: Any) -> tuple[str, ...]:
    """Name the parameters that a function's code spells out."""
    code = inspect.unwrap(face).__code__
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def test_the_page_of_names_is_fresh() -> None:
    """Compare docs/api.md with what the code says now; `make docs` writes it."""
    page = runpy.run_path(str(ROOT / "tools" / "make_api.py"))["page"]
    assert (ROOT / "docs" / "api.md").read_text() == page(), "run `make docs`"


MODULES = [
    m.name for m in pkgutil.walk_packages(headway.__path__, "headway.") if not m.name.endswith(("__main__", "_native"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"an optional dependency is missing: {error}")
    if name == "headway.plot":
        pytest.importorskip("matplotlib", reason="drawing is optional")
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        run(test)
