"""What type checkers, editors and help() say of headway.

The programs of tests/typing/ are checked, not run: a line that ends with "# mistake" must be an error, and no other.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import headway as hw
from headway import plot, reference
from headway._signatures import Unpack

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "tests" / "typing").glob("*.py"))
NEEDS = {"libraries": ("torch", "jax", "mlx"), "mistakes": ("tokenizers",)}


# Type checkers --------------------------------------------------------------------------------------------------------


def mypy(program: Path) -> Iterator[tuple[int, str]]:
    lines = output("mypy", "--output=json", "--no-error-summary", str(program)).splitlines()
    for error in map(json.loads, lines):
        if error["severity"] == "error":
            yield error["line"], error["message"]


def pyright(program: Path) -> Iterator[tuple[int, str]]:
    found = json.loads(output("pyright", "--outputjson", "--pythonpath", sys.executable, str(program)))
    for error in found["generalDiagnostics"]:
        if error["severity"] == "error":
            yield error["range"]["start"]["line"] + 1, error["message"]


def output(checker: str, *arguments: str) -> str:
    pytest.importorskip(checker, reason=f"{checker} is not installed; `make check` installs it")
    done = subprocess.run([sys.executable, "-m", checker, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: the program has errors
    return done.stdout


@pytest.mark.parametrize("checker", [mypy, pyright])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_programs(program: Path, checker: Callable[[Path], Iterator[tuple[int, str]]]) -> None:
    for library in NEEDS.get(program.stem, ()):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    errors = dict(checker(program))
    mistakes = {i for i, line in enumerate(program.read_text().splitlines(), 1) if line.endswith("# mistake")}
    assert not {line: message for line, message in errors.items() if line not in mistakes}
    assert not mistakes - errors.keys(), "these lines should be errors"


# typing.get_type_hints, inspect.signature -----------------------------------------------------------------------------


def faces(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield a module's public classes and functions, and the methods of these classes."""
    for name in module.__all__:
        face = getattr(module, name)
        if callable(face):
            yield name, face
        for own, method in vars(face).items() if inspect.isclass(face) else ():
            for part in ("fget", "func", "__func__"):
                method = getattr(method, part, method)
            if inspect.isfunction(method):
                yield f"{name}.{own}", method


def modules() -> Iterator[ModuleType]:
    yield from (hw, reference, plot)
    if importlib.util.find_spec("tokenizers"):
        from headway import lm

        yield lm


def test_every_annotation_can_be_looked_up() -> None:
    for module in modules():
        for name, face in faces(module):
            hints = typing.get_type_hints(face)
            if module is not reference and inspect.isfunction(face) and not name.split(".")[-1].startswith("_"):
                assert "return" in hints, name
                assert hints.keys() - {"return"} <= {*parameters(face), "options", "penalties"}, name


def test_every_option_is_shown() -> None:
    """By help() and by inspect.signature, with the types of the TypedDict, where a checker is told ``**options``."""
    found = []
    for module in modules():
        for name, face in faces(module) if module is not reference else ():
            for kind in unpacked(face):
                found.append(name)
                shown = parameters(face)
                options = typing.get_type_hints(kind)
                assert set(options) <= set(shown), name
                assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values()), name
                for option in options:
                    assert shown[option].annotation == kind.__annotations__[option].__forward_arg__, (name, option)
                    assert shown[option].default is not inspect.Parameter.empty, (name, option)
    assert {"attention", "KVCache.attend", "sample", "penalize", "Sampler.admit"} <= set(found)
    assert parameters(hw.attention)["causal"].default is None
    assert parameters(hw.KVCache.attend)["causal"].default == "bottom_right"
    assert parameters(hw.sample)["temperature"].default == 1.0


def unpacked(face: Any) -> list[Any]:
    hints = typing.get_type_hints(face).values()
    return [typing.get_args(hint)[0] for hint in hints if typing.get_origin(hint) is Unpack]


def parameters(face: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(face).parameters)


# Editors --------------------------------------------------------------------------------------------------------------

LIVE = {"hw": hw, "cache": hw.KVCache(1, 4), "sampler": hw.Sampler(4)}
CALLS: dict[str, Any] = {
    "hw.sample(x, ": hw.sample,
    "hw.probabilities(x, ": hw.probabilities,
    "hw.filter_logits(x, ": hw.filter_logits,
    "hw.logprobs(x, ": hw.logprobs,
    "hw.verify_draft(x, None, [1], ": hw.verify_draft,
    "hw.explain(x, ": hw.explain,
    "hw.penalize(x, [1], ": hw.penalize,
    "sampler.admit(": hw.Sampler.admit,
    "hw.attention(x, x, x, ": hw.attention,
    "hw.attention_weights(x, x, ": hw.attention_weights,
    "hw.partial_attention(x, x, x, ": hw.partial_attention,
    "hw.multi_head_attention(x, x, x, ": hw.multi_head_attention,
    "cache.attend(x, ": hw.KVCache.attend,
}


@pytest.mark.parametrize("call", CALLS)
def test_notebooks_complete_every_option(call: str) -> None:
    """As IPython and Jupyter do, which have the objects."""
    jedi = pytest.importorskip("jedi", reason="jedi is not installed; `make check` installs it")
    completed(jedi.Interpreter(call, [LIVE]), call)


@pytest.mark.parametrize("call", CALLS)
def test_editors_complete_every_option(call: str) -> None:
    """From the source alone: jedi goes from ``**options`` to the function that they are handed on to."""
    jedi = pytest.importorskip("jedi", reason="jedi is not installed; `make check` installs it")
    plain = jedi.create_environment(sys.base_prefix, safe=False)  # in which headway is installed in no special way
    source = f"import headway as hw\ncache, sampler = hw.KVCache(1, 4), hw.Sampler(4)\n{call}"
    completed(jedi.Script(source, project=jedi.Project(ROOT / "src"), environment=plain), call)


def completed(script: Any, call: str) -> None:
    names = {completion.name for completion in script.complete()}
    options = [n for n, p in parameters(CALLS[call]).items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert len(options) > 5
    assert {f"{name}=" for name in options} <= names
