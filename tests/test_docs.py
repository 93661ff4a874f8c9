"""The documentation's code runs: README.md and all of docs/, block by block, and the examples in the docstrings."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import headway
import headway.cli
import headway.lm
import headway.plot
import headway.reference

ROOT = Path(__file__).parent.parent
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(test: doctest.DocTest) -> None:
    """Run one doctest with NumPy printing as it does by default, whatever came before."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    with np.printoptions():
        runner.run(test, out=report.append, clear_globs=False)  # in which torch.compile has names of its own
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("name", PAGES)
def test_page(name: str) -> None:
    """Run all blocks of one page in one namespace, with the line numbers of the page."""
    text = PAGES[name].read_text()
    if needs := re.match(r"<!-- needs: (.*) -->", text):
        for package in needs[1].split(", "):
            pytest.importorskip(package, reason=f"{package} is not installed")
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


# Docstrings -----------------------------------------------------------------------------------------------------------

SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\**\w+(?:, \w+)*): ", re.MULTILINE)
OPTIONS = re.compile(r"^ {4}\*\*\w+: (.*(?:\n {8}.*)*)", re.MULTILINE)


def faces() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, and the public methods and properties of the classes."""
    for module in (headway, headway.lm, headway.plot, headway.reference, headway.cli):
        for name in module.__all__:
            face = getattr(module, name)
            name = f"{module.__name__}.{name}".removeprefix("headway.")
            if not inspect.isfunction(face) and not inspect.isclass(face):
                continue
            yield name, face
            for own, method in vars(face).items() if inspect.isclass(face) else ():
                for part in ("fget", "func", "__func__"):
                    method = getattr(method, part, method)
                if inspect.isfunction(method) and not own.startswith("_"):
                    yield f"{name}.{own}", method


FACES = dict(faces())
FUNCTIONS = [name for name, face in FACES.items() if not inspect.isclass(face)]
CLASSES = [name for name, face in FACES.items() if inspect.isclass(face) and not typing.is_typeddict(face)]


def sections(name: str) -> dict[str, set[str]]:
    """Return the sections of a docstring, each with the names that it lists."""
    text = inspect.getdoc(FACES[name]) or ""
    return {title: {*", ".join(ENTRY.findall(body)).split(", ")} for title, body in SECTION.findall(text + "\n")}


def arguments(name: str) -> set[str]:
    """Return the arguments of a call as a docstring writes them."""
    shown = inspect.signature(FACES[name]).parameters.values()
    return {"*" * 2 * (p.kind is p.VAR_KEYWORD) + p.name for p in shown if p.name not in ("self", "cls")}


def explained(name: str) -> set[str]:
    """Return the arguments that a docstring explains, by itself or by those that its line for **options names."""
    found = sections(name).get("Args", set())
    line = OPTIONS.search(inspect.getdoc(FACES[name]) or "")
    for other in re.findall(r"`(?:headway\.)?([\w.]+)`", line[1]) if line else ():
        parts = name.split(".")
        near = [".".join([*parts[:i], other]) for i in range(len(parts))]  # such as a method of the same class
        found = found.union(*(explained(one) for one in near[::-1] if one in FACES))
    return found


@pytest.mark.parametrize("name", FACES)
def test_docstrings_have_an_example(name: str) -> None:
    examples = [e.source for e in doctest.DocTestParser().get_examples(inspect.getdoc(FACES[name]) or "")]
    assert examples
    assert name.rpartition(".")[2] in "".join(examples) or name in CLASSES  # many of which a function returns


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_have_their_sections(name: str) -> None:
    """Args with each argument, Returns, and Raises where arguments can be wrong."""
    found, own = sections(name), inspect.unwrap(FACES[name])
    spelled = {*own.__code__.co_varnames[: own.__code__.co_argcount + own.__code__.co_kwonlyargcount]}
    options = arguments(name) - spelled  # those of a TypedDict, or **options where these may be any
    listed = found.get("Args", set())
    if listed >= options:
        assert listed == arguments(name)
    else:  # one line says where they are explained
        assert {argument for argument in listed if argument[:2] != "**"} == arguments(name) - options
        assert options <= explained(name)
    assert ("Returns" in found) == (typing.get_type_hints(own)["return"] is not type(None))
    raised = {*raised_by(own)}
    assert raised <= found.get("Raises", set())
    assert "Raises" in found or not arguments(name) or name.startswith("reference.")  # which hardly checks them


def raised_by(function: Any) -> Iterator[str]:
    """Yield the exceptions that a function raises by name; most are raised further down."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise):
            error = getattr(node.exc, "func", node.exc)
            if isinstance(error, ast.Name) and error.id[0].isupper():
                yield error.id


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_classes_have_their_sections(name: str) -> None:
    """Args and Raises where users make one, else the attributes of what they get."""
    face, found = FACES[name], sections(name)
    made = re.findall(r"self\.([a-z]\w*)(?:: .+)? = ", inspect.getsource(face))
    attributes = {one for one in inspect.get_annotations(face) or made if one[0] != "_"}
    if hasattr(face.__init__, "__wrapped__"):  # it checks what users give it
        assert found["Args"] == arguments(name)
        assert "Raises" in found
    else:
        assert found.get("Args") == arguments(name) or found["Attributes"] == attributes


def test_the_page_of_names_is_fresh() -> None:
    """Compare docs/api.md with what the code says now; `make docs` writes it."""
    page = runpy.run_path(str(ROOT / "tools" / "make_api.py"))["page"]
    assert (ROOT / "docs" / "api.md").read_text() == page(), "run `make docs`"


def test_lines_that_tools_change_are_still_there() -> None:
    """`make bench` takes the contract out of a copy of the core, and `make mutants` breaks single lines."""
    assert importlib.import_module("benchmarks.price").check_edits() == []
    pytest.importorskip("nanobind", reason="the copies are built with it")
    assert runpy.run_path(str(ROOT / "tools" / "mutants.py"))["check_patterns"]() == []


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
