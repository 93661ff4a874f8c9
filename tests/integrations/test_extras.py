"""What is loaded, and what is missing: each integration is imported when it is asked for, and says what it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

NEEDS = {"torch": "torch", "transformers": "transformers", "jax": "jax", "onnx": "onnx", "llguidance": "grammar"}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("library", "extra"), NEEDS.items())
def test_a_missing_library_is_named_with_its_extra(library: str, extra: str) -> None:
    done = python(f"import sys; sys.modules[{library!r}] = None; import headway.integrations.{library}")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: headway.integrations.{library} needs ")
    assert last.endswith(f"pip install 'headway[{extra}]'")


def test_the_command_says_what_it_needs() -> None:
    code = "import sys; sys.modules['llguidance'] = None; from headway.cli import main; "
    done = python(code + "sys.exit(main(['generate', 'a', '--json-schema', '/dev/null']))")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'headway[grammar]'" in done.stderr


def test_headway_loads_itself_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import headway
headway.attention, headway.sample, headway.SamplingParams()
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted(name for name in sys.modules if name.startswith("headway.")))
"""
    done = python(code)
    roots, modules = (set(line.split()) for line in done.stdout.splitlines())
    others = {
        "torch",
        "jax",
        "transformers",
        "onnx",
        "onnxruntime",
        "matplotlib",
        "tokenizers",
        "safetensors",
        "IPython",
    }
    assert not roots & {*others, "llguidance", "xgrammar", "ml_dtypes"}
    for unloaded in ("reference", "plot", "integrations", "lm", "cli"):
        assert not {name for name in modules if name.startswith(f"headway.{unloaded}")}
