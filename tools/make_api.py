"""Write docs/api.md: every public name with its signature and its docstring, as they are in the code.

tests/test_docs.py compares the page with what `page` returns, so that it is never stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
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
name of the argument, and says what was expected, what came and what to do. The `**options` at the
end of a signature are the options of [`SamplingParams`](#samplingparams), `**penalties` those of
[`penalize`](#penalize).
"""
# A chapter has the public names of a module whose code is in the package named beside it.
CHAPTERS = (
    ("Attention and layers", "headway", "headway._attention"),
    ("Sampling", "headway", "headway._sampling"),
    ("Threads and machine", "headway", "headway.runtime"),
    ("Language models: headway.lm", "headway.lm", "headway.lm"),
    ("Pictures: headway.plot", "headway.plot", "headway.plot"),
)
REFERENCE = """\
## The definition: headway.reference

The same operations in plain NumPy and float64, written to be read:
{names}.
"""

OPTIONS = [field.name for field in fields(hw.SamplingParams)]
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ENTRY = re.compile(r"((?:\*\*)?\w+(?:, \w+)*): ")


def page() -> str:
    """Return the whole page."""
    chapters = [(title, list(named(module, code))) for title, module, code in CHAPTERS]
    known = {name for _, names in chapters for name, _ in names}
    lost = {name for _, module, _ in CHAPTERS for name in public(module)} - {name.rpartition(".")[2] for name in known}
    if lost:
        raise ValueError(f"CHAPTERS: expected a chapter for each public name, got none for {', '.join(sorted(lost))}")
    lines = [HEAD]
    for title, names in chapters:
        lines += [f"## {title}\n", *index(names)]
        for name, face in names:
            lines += entry(name, face)
    defined = ", ".join(f"`{name}`" for name in public("headway.reference"))
    lines.append(REFERENCE.format(names=wrapped(defined)))
    return "\n".join(lines).rstrip() + "\n"


def public(module: str) -> list[str]:
    """Return the public names of a module."""
    names: list[str] = importlib.import_module(module).__all__
    return names


def named(module: str, code: str) -> Iterator[tuple[str, Any]]:
    """Yield the public names of a chapter: functions first, then classes."""
    faces = [(name, getattr(importlib.import_module(module), name)) for name in public(module)]
    prefix = module.removeprefix("headway").lstrip(".")
    for name, face in sorted(faces, key=lambda pair: (isinstance(pair[1], type), pair[0])):
        if module == code or (getattr(face, "__module__", None) or face.__name__).startswith(code):
            yield f"{prefix}.{name}".lstrip("."), face


def index(names: list[tuple[str, Any]]) -> Iterator[str]:
    """Yield a table of names with the first sentences of their docstrings."""
    yield "| name | |\n|---|---|"
    seen: list[str] = []
    for name, face in names:
        anchor = re.sub(r"\W", "", name.lower())
        link = f"{anchor}-1" if anchor in seen else anchor  # GitHub numbers headings that differ in case alone
        seen.append(anchor)
        first = repr(face) if isinstance(face, hw.SamplingParams) else inspect.getdoc(face) or ""
        first = first.partition("\n\n")[0].replace("\n", " ")
        summary = escaped(first).replace("|", r"\|")
        yield f"| [`{name}`](#{link}) | {summary} |"
    yield ""


def entry(name: str, face: Any, level: str = "###") -> Iterator[str]:
    """Yield a heading, a signature and the docstring; for a class its fields and its methods too."""
    yield f"{level} `{name}`\n"
    if isinstance(face, hw.SamplingParams):  # a value
        yield f"```text\n{face!r}\n```\n"
        return
    if not isinstance(face, type):
        if callable(face):
            yield f"```text\n{signature(name, face)}\n```\n"
        yield from rendered(inspect.getdoc(face) or "")
        return
    own = {key: inspect.getattr_static(face, key) for key in vars(face) if not key.startswith("_")}
    if hasattr(face.__init__, "__wrapped__"):  # a class that users call, and not only get back from a function
        yield f"```text\n{signature(name, face)}\n```\n"
    elif types := [f"{key}: {written(kind)}" for key, kind in inspect.get_annotations(face).items() if key[0] != "_"]:
        yield "```text\n" + "\n".join(types) + "\n```\n"
    yield from rendered(inspect.getdoc(face) or "")
    for key, value in own.items():
        if isinstance(value, property):
            yield f"{level}# `{name}.{key}`\n"
            yield from rendered(inspect.getdoc(value) or "")
        elif isinstance(value, staticmethod) or inspect.isfunction(value):
            yield from entry(f"{name}.{key}", getattr(face, key), level + "#")


def signature(name: str, face: Any) -> str:
    """Return a call with each parameter, its type and its default: on one line if it fits, else a line for each."""
    found = inspect.signature(face)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    if face is not hw.SamplingParams and [p.name for p in parameters[-len(OPTIONS) :]] == OPTIONS:
        parameters[-len(OPTIONS) :] = [inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)]
    parts = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        part = "**" * (p.kind is p.VAR_KEYWORD) + p.name
        if p.annotation is not p.empty and p.kind is not p.VAR_KEYWORD:
            part += f": {written(p.annotation)}"
        if p.default is not p.empty:
            part += f" = {written(p.default) if isinstance(p.default, type) else repr(p.default)}"
        parts.append(part)
    gives = found.return_annotation
    end = "" if isinstance(face, type) or gives is found.empty else f" -> {written(gives)}"
    line = f"{name}({', '.join(parts)}){end}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){end}"])


def written(kind: Any) -> str:
    """Return a type as it is written in code."""
    return kind if isinstance(kind, str) else getattr(kind, "__forward_arg__", None) or inspect.formatannotation(kind)


def rendered(text: str) -> Iterator[str]:
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
                name, _, said = " ".join(line.strip() for line in lines[start:end]).partition(": ")
                names = ", ".join(f"`{one}`" for one in name.split(", "))
                yield wrapped(f"- {names}: {escaped(said)}", "  ")
            yield ""
        else:
            yield wrapped(escaped(" ".join(line.strip() for line in lines))) + "\n"


def escaped(text: str) -> str:
    """Return prose whose stars and angles are themselves in Markdown; what is in backticks stays."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else part.replace("*", r"\*").replace("<", "&lt;") for part in parts)


def wrapped(text: str, indent: str = "") -> str:
    """Return prose in lines of at most WIDTH columns."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(page())
