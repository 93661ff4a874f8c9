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
from headway import lm, plot, reference
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
    yield from (hw, reference, plot, lm)


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

# Every public function with arguments that are given by name, called in a program that begins with SETUP.
SETUP = """\
import headway as hw
from headway import lm, plot
cache, sampler, model, x = hw.KVCache(1, 4), hw.Sampler(4), lm.load(), [1.0]
"""
CALLS: dict[str, str] = {
    "hw.KVCache(": "KVCache",
    "cache.attend(x, ": "KVCache.attend",
    "hw.attention(x, x, x, ": "attention",
    "hw.attention_weights(x, x, ": "attention_weights",
    "hw.partial_attention(x, x, x, ": "partial_attention",
    "hw.merge_attention(x, ": "merge_attention",
    "hw.multi_head_attention(x, x, x, ": "multi_head_attention",
    "hw.linear(x, x, ": "linear",
    "hw.rms_norm(x, x, ": "rms_norm",
    "hw.rotary(x, ": "rotary",
    "hw.SamplingParams(": "SamplingParams",
    "hw.sample(x, ": "sample",
    "hw.probabilities(x, ": "probabilities",
    "hw.filter_logits(x, ": "filter_logits",
    "hw.explain(x, ": "explain",
    "hw.logprobs(x, ": "logprobs",
    "hw.verify_draft(x, x, x, ": "verify_draft",
    "hw.penalize(x, x, ": "penalize",
    "sampler.admit(": "Sampler.admit",
    "sampler.step(x, ": "Sampler.step",
    "sampler.verify(x, x, ": "Sampler.verify",
    "sampler.fork(x, ": "Sampler.fork",
    "model.generate(x, ": "Model.generate",
    "model.stream(x, ": "Model.stream",
    "plot.attention_map(x, ": "attention_map",
}
FACES = {name: face for module in modules() if module is not reference for name, face in faces(module)}


def test_every_function_with_options_is_asked_for() -> None:
    named = {
        name
        for name, face in FACES.items()
        if not name.split(".")[-1].startswith("_") and not typing.is_typeddict(face)  # a class stands for its __init__
        if any(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters(face).values())
    }
    assert named <= set(CALLS.values())


Editor = Callable[[str], "set[str]"]  # from the beginning of a call to what may come next


@pytest.fixture(scope="module")
def jedi_with_objects() -> Editor:
    """IPython and Jupyter, which have the objects."""
    jedi = pytest.importorskip("jedi", reason="jedi is not installed; `make check` installs it")
    namespace: dict[str, Any] = {}
    exec(SETUP, namespace)
    return lambda call: {completion.name for completion in jedi.Interpreter(call, [namespace]).complete()}


@pytest.fixture(scope="module")
def jedi_with_source() -> Editor:
    """Editors on jedi, which have the source alone: jedi goes on to the functions that ``**options`` is handed to."""
    jedi = pytest.importorskip("jedi", reason="jedi is not installed; `make check` installs it")
    plain = jedi.create_environment(sys.base_prefix, safe=False)  # in which headway is installed in no special way
    project = jedi.Project(ROOT / "src")
    return lambda call: {
        completion.name for completion in jedi.Script(SETUP + call, project=project, environment=plain).complete()
    }


@pytest.fixture(scope="module")
def pyright_server() -> Iterator[Editor]:
    """Editors on pyright's language server, such as VS Code."""
    pytest.importorskip("pyright", reason="pyright is not installed; `make check` installs it")
    command = [sys.executable, "-m", "pyright.langserver", "--stdio"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        server = LanguageServer(process)
        folder = {"uri": ROOT.as_uri(), "name": "headway"}
        server.ask("initialize", processId=None, rootUri=folder["uri"], workspaceFolders=[folder], capabilities={})
        server.say("initialized")
        yield server.complete
        server.ask("shutdown")
        server.say("exit")


class LanguageServer:
    """The other end of a language server: JSON messages, each behind a header that says how long it is."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin
        assert process.stdout
        self.to, self.back, self.count = process.stdin, process.stdout, 0

    def complete(self, call: str) -> set[str]:
        document = {"uri": (ROOT / "tests" / f"completed{self.count}.py").as_uri()}
        self.say(
            "textDocument/didOpen",
            textDocument={**document, "languageId": "python", "version": 0, "text": SETUP + call + ")"},
        )
        place = {"line": SETUP.count("\n"), "character": len(call)}
        return {
            item["label"]
            for item in self.ask("textDocument/completion", textDocument=document, position=place)["items"]
        }

    def ask(self, method: str, **parameters: Any) -> Any:
        self.count += 1
        self.say(method, self.count, **parameters)
        while True:
            said = self.hear()
            if "method" not in said and said["id"] == self.count:
                return said["result"]

    def say(self, method: str, number: int | None = None, **parameters: Any) -> None:
        message = {"jsonrpc": "2.0", "method": method, "params": parameters}
        text = json.dumps(message if number is None else {**message, "id": number}).encode()
        self.to.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        self.to.flush()

    def hear(self) -> Any:
        lines = list(iter(lambda: self.back.readline().strip(), b""))
        length = next(int(line.split()[1]) for line in lines if line.startswith(b"Content-Length"))
        return json.loads(self.back.read(length))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("editor", ["jedi_with_objects", "jedi_with_source", "pyright_server"])
def test_editors_complete_every_argument(editor: str, call: str, request: pytest.FixtureRequest) -> None:
    name = CALLS[call]
    given = call.count("x, ")
    missing = [f"{argument}=" for argument in parameters(FACES[name]) if argument != "self"][given:]
    assert set(missing) <= request.getfixturevalue(editor)(call)
