"""Write docs/api.md: every public name with its signature and its docstring, as they are in the code.

tests/test_docs.py compares the page with what `page` returns, so that it is never stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import headway as hw

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
WIDTH = 100

HEAD = """\
# Every public name

`make docs` writes this page from the signatures and docstrings of the code.
[semantics.md](semantics.md) says in numbered sentences what each function computes. The command has
help of its own: `headway --help`.

Shapes: `...` stands for any leading axes, or none; H for query heads, G for key/value heads, L for
queries, S for keys, D for the head size of q and k, E for the head size of v, M for the model width,
V for the vocabulary.

Arrays are NumPy arrays, torch and JAX tensors in CPU memory, nested lists, and all that has DLPack
or a buffer. A result is an array of the same kind as the first argument. An error begins with the
name of the argument, and says what was expected, what came and what to do.

The `**options` or `**penalties` at the end of a signature stand for arguments that are given by
name. The last entry of Args says which they are, and links to the function or class that explains
them.

| type | what it is |
|---|---|
"""
TYPES = {
    "AnyArray": "an array of any of these kinds; where there is one value for all rows, a number",
    "ArrayLike": "what NumPy makes an array of; where there is one value for all rows, a number",
    "Array, NDArray": "a NumPy array",
    "DTypeLike": "a type of NumPy's, or its name",
    "Floats": "a NumPy array of float32",
    "Causal": '`"top_left"`, `"bottom_right"`, a bool or None',
    "Window": "(left, right), each an int or None; or None",
    "Precision": '`"exact"` or `"fast"`',
    "UnknownTokens": '`"error"` or `"ignore"`',
    "Words": "a function from an id to a string",
    "Explained": "what `explain` returns",
    "Facts": "what `reference.explain` returns",
    "Figure": "a figure of matplotlib",
}
# Names of Python's own that need no line.
PLAIN = {"Any", "Callable", "Iterable", "Literal", "None", "PathLike", "Sequence", "True", "False"}

# A chapter has the public names of a module whose code is in the package named beside it.
CHAPTERS = (
    ("Attention and layers", "headway", "headway._attention", ""),
    ("Sampling", "headway", "headway._sampling", ""),
    ("Threads and machine", "headway", "headway.runtime", ""),
    ("Language models: headway.lm", "headway.lm", "headway.lm", ""),
    ("Pictures: headway.plot", "headway.plot", "headway.plot", ""),
    (
        "The definition: headway.reference",
        "headway.reference",
        "headway.reference",
        "The same operations in plain NumPy and float64, written to be read. Arguments are hardly checked.\n",
    ),
)

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r"((?:\*\*)?\w+(?:, \w+)*): ")


def page() -> str:
    """Return the whole page."""
    found = {name.rpartition(".")[2] for _, _, names in chapters() for name, _ in names}
    lost = {name for _, module, _, _ in CHAPTERS for name in public(module)} - found
    if lost:
        raise ValueError(f"CHAPTERS: expected a chapter for each public name, got none for {', '.join(sorted(lost))}")
    types = (f"| {', '.join(f'`{one}`' for one in names.split(', '))} | {said} |" for names, said in TYPES.items())
    lines = [HEAD + "\n".join(types) + "\n"]
    for title, intro, names in chapters():
        lines += [f"## {title}\n", *([intro] if intro else []), *index(names)]
        for name, face in names:
            lines += entry(name, face)
    return "\n".join(lines).rstrip() + "\n"


def public(module: str) -> list[str]:
    """Return the public names of a module."""
    names: list[str] = importlib.import_module(module).__all__
    return names


@cache
def chapters() -> list[tuple[str, str, list[tuple[str, Any]]]]:
    """Return the chapters: title, introduction and names."""
    return [(title, intro, list(named(module, code))) for title, module, code, intro in CHAPTERS]


def named(module: str, code: str) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a chapter: functions first, then classes."""
    faces = [(name, getattr(importlib.import_module(module), name)) for name in public(module)]
    prefix = module.removeprefix("headway").lstrip(".")
    for name, face in sorted(faces, key=lambda pair: (isinstance(pair[1], type), pair[0])):
        if module == code or (getattr(face, "__module__", None) or face.__name__).startswith(code):
            yield f"{prefix}.{name}".lstrip("."), face


def members(name: str, face: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class."""
    for key, value in vars(face).items() if isinstance(face, type) else ():
        if not key.startswith("_"):
            if isinstance(value, (property, cached_property)):
                yield f"{name}.{key}", value
            elif isinstance(value, (staticmethod, classmethod)) or inspect.isfunction(value):
                yield f"{name}.{key}", getattr(face, key)


@cache
def anchors() -> dict[str, str]:
    """Return the anchor of each name, as GitHub makes it: headings that differ in case alone are numbered."""
    found: dict[str, str] = {}
    seen: list[str] = []
    for title, _, names in chapters():
        seen.append(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
        for name in (one for key, face in names for one in (key, *dict(members(key, face)))):
            anchor = re.sub(r"\W", "", name.lower())
            found[name] = f"{anchor}-{seen.count(anchor)}" if anchor in seen else anchor
            seen.append(anchor)
    return found


def index(names: list[tuple[str, Any]]) -> Iterator[str]:
    """Yield a table of names with the first sentences of their docstrings, and the methods of classes."""
    yield "| name | what it is |\n|---|---|"
    for name, face in names:
        first = f"`{face!r}`" if isinstance(face, hw.SamplingParams) else inspect.getdoc(face) or ""
        said = prose(first.partition("\n\n")[0].replace("\n", " "), name)
        own = ", ".join(link(key, key.rpartition(".")[2]) for key, _ in members(name, face))
        said += f" Members: {own}." if own else ""
        yield f"| {link(name, name)} | {said.replace('|', chr(92) + '|')} |"
    yield ""


def entry(name: str, face: Any, level: str = "###") -> Iterator[str]:
    """Yield a heading, a signature and the docstring; for a class its attributes and its methods too."""
    yield f"{level} `{name}`\n"
    if isinstance(face, hw.SamplingParams):  # a value
        yield f"```text\n{face!r}\n```\n"
        return
    text = inspect.getdoc(face) or ""
    if callable(face) and (not isinstance(face, type) or "\nArgs:\n" in text):
        yield f"```text\n{signature(name, face, text)}\n```\n"
    elif isinstance(face, type) and "\nAttributes:\n" in text:
        types = [f"{key}: {written(kind)}" for key, kind in inspect.get_annotations(face).items() if key[0] != "_"]
        yield from ["```text\n" + "\n".join(types) + "\n```\n"] if types else []
    yield from rendered(text, name)
    for key, value in members(name, face):
        yield from entry(key, value, level + "#")


def signature(name: str, face: Any, text: str) -> str:
    """Return a call with each parameter, its type and its default: on one line if it fits, else a line for each.

    Options that one line of the docstring stands for are written as that line is, `**options`.
    """
    found = inspect.signature(face)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    options = re.search(r"^    \*\*(\w+): ", text, re.MULTILINE)
    if options:
        code = inspect.unwrap(face).__code__
        own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        rest = inspect.Parameter(options[1], inspect.Parameter.VAR_KEYWORD)
        parameters = [*(p for p in parameters if p.name in own), rest]
    parts = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        part = "**" * (p.kind is p.VAR_KEYWORD) + p.name
        if p.annotation is not p.empty and p.kind is not p.VAR_KEYWORD:
            part += f": {written(p.annotation)}"
        if p.default is not p.empty:
            part += f" = {p.default.__name__ if isinstance(p.default, type) else quoted(repr(p.default))}"
        parts.append(part)
    gives = found.return_annotation
    end = "" if isinstance(face, type) or gives is found.empty else f" -> {written(gives)}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def written(kind: Any) -> str:
    """Return a type as it is written in code; the page says what it is, or Python does."""
    text = kind if isinstance(kind, str) else getattr(kind, "__forward_arg__", None) or inspect.formatannotation(kind)
    known = {*PLAIN, *", ".join(TYPES).split(", "), *(name.rpartition(".")[2] for name in anchors())}
    for word in re.findall(r"\b[A-Z]\w+", text):
        if word not in known:
            raise ValueError(f"TYPES: expected a line for each type in a signature, got none for {word}")
    return quoted(text)


def quoted(code: str) -> str:
    """Return code with the quotation marks that all code here has."""
    return code.replace("'", '"')


def rendered(text: str, name: str) -> Iterator[str]:
    """Yield a docstring as Markdown: paragraphs, lists of arguments, code, and what is indented."""
    for number, block in enumerate(re.split(r"\n\s*\n", text)):
        lines = block.splitlines()
        if SECTION.match(lines[0]):
            yield f"**{lines[0][:-1]}**\n"
            lines = textwrap.dedent("\n".join(lines[1:])).splitlines()
        if lines[0].startswith(">>> "):
            yield "\n".join(["```python", *lines, "", "```\n"])
        elif lines[0].startswith("    "):
            yield "\n".join(["```text", *textwrap.dedent(block).splitlines(), "```\n"])
        elif number and ENTRY.match(lines[0]):
            starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
            for start, end in zip(starts, [*starts[1:], len(lines)]):
                listed, _, said = " ".join(line.strip() for line in lines[start:end]).partition(": ")
                names = ", ".join(f"`{one}`" for one in listed.split(", "))
                yield wrapped(f"- {names}: {prose(said, name)}", "  ")
            yield ""
        else:
            yield wrapped(prose(" ".join(line.strip() for line in lines), name)) + "\n"


def prose(text: str, name: str) -> str:
    """Return the prose of a name in Markdown: stars and angles are themselves, public names in backticks are links."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(
        linked(part, name) if part.startswith("`") else part.replace("*", r"\*").replace("<", "&lt;") for part in parts
    )


def linked(code: str, name: str) -> str:
    """Return code in backticks, as a link if it names something else: of the same class or module, or of headway."""
    parts, other = name.split("."), code.strip("`").removeprefix("headway.")
    near = [".".join([*parts[:i], other]) for i in range(len(parts), -1, -1)]
    return next((link(one, code.strip("`")) for one in near if one in anchors() and one != name), code)


def link(name: str, text: str) -> str:
    """Return a link to the entry of a name."""
    return f"[`{text}`](#{anchors()[name]})"


def wrapped(text: str, indent: str = "") -> str:
    """Return prose in lines of at most WIDTH columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page())
