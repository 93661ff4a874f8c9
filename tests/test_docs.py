"""The documentation's code runs: README.md and all of docs/, block by block, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

import headway

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
