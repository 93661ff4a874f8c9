"""The documentation's code runs: README.md and docs/*.md block by block, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import headway

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(test: doctest.DocTest) -> None:
    """Run one doctest with NumPy printing as it does by default, whatever came before."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    with np.printoptions():
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page: Path) -> None:
    """Run all blocks of one page in one namespace, with the line numbers of the page."""
    text = page.read_text()
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(1))
        code = block[1].splitlines()
        assert code[0].startswith(">>> "), f"{page.name}:{first + 1}: a block of code begins with >>>"
        lines[first : first + len(code)] = code
    run(doctest.DocTestParser().get_doctest("\n".join(lines), {}, page.name, str(page), 0))


def test_the_pages_have_code() -> None:
    found = {page.name: len(BLOCK.findall(page.read_text())) for page in PAGES}
    assert found["README.md"] >= 2
    assert found["explanation.md"] >= 20
    assert all("```py\n" not in page.read_text() for page in PAGES)  # would not be run


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
