"""The recipe for a new stage of sampling in docs/architecture.md, followed to the letter in a copy of the tree.

ADDITIONS is all that a stage takes: what is added, and behind which line. Everything else that knows options (the
signatures, SamplingParams, the checks, the command, `explain`, headway's own order, the tests of all options) reads
the record.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("src", "docs", "tests", "tools", "vectors", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")


class Addition(NamedTuple):
    """Lines that go into a file, right before the first place of `before`."""

    file: str
    before: str
    lines: str


ADDITIONS = [
    # One record, behind the stage that it follows; and its name in the order of the records.
    Addition(
        "src/headway/_sampling/stages.py",
        "\n_TOP_K = Stage(",
        """
def _below_best(seen: Seen, place: int) -> Judgement:
    below = float(seen.before.z.max()) - float(seen.before.z[place])
    return "its distance from the best logit", Fraction(below), Fraction(seen.value)


_TOP_GAP = Stage(
    "top_gap",
    (
        Option(
            "top_gap",
            Reals("a number >= 0", "use None or infinity to switch it off", lambda gap: gap >= 0),
            None,
            NUMBER_OR_NONE,
            "at least 0. Keeps logits up to this far below the best one.",
            "keep logits up to X below the best",
            off=inf,
        ),
    ),
    ("top_gap",),
    judge=_below_best,
)
""",
    ),
    Addition("src/headway/_sampling/stages.py", "        _TOP_K,\n", "        _TOP_GAP,\n"),
    # One kernel, and its line in the table.
    Addition(
        "src/core/sampling/stages.h",
        "inline void top_k(Row& row, const Step& step) {",
        """inline void top_gap(Row& row, const Step& step) {
  const double gap = step.value[0][row.index], top = double(best_logit(row));
  if (gap == __builtin_inf()) return;
  const float bound = bisect(float(top), [&](float z) { return double(z) - top >= -gap; });
  keep(row, row.tokens, choose_inside(row.tokens, row.space, {bound, 0, row.tokens.n}), step.ties);
}

""",
    ),
    Addition("src/core/sampling/stages.h", '    {"top_k", top_k},\n', '    {"top_gap", top_gap},\n'),
    # One definition.
    Addition(
        "src/headway/reference/_sampling/stages.py",
        "def _top_k(",
        '''def _top_gap(row: Row, gap: float, step: Step) -> None:
    """Z at most this far below the best one's."""
    if gap == OFF["top_gap"]:
        return
    stays = below_best(row) >= -gap
    row.keep(row.first(int(stays.sum()), step.ties))


''',
    ),
    Addition("src/headway/reference/_sampling/stages.py", '    "top_k": _top_k,\n', '    "top_gap": _top_gap,\n'),
    # One sentence, its test, and the place in the order of headway's own dialect.
    Addition("docs/semantics.md", "top_k, top_p, min_p, typical_p, epsilon, eta, xtc |", "top_gap, "),
    Addition(
        "docs/semantics.md",
        "### Dialects",
        "- **S45** `top_gap=g` keeps a token if and only if its z is at most g below the best one's. Infinity\n"
        "  is off.\n\n",
    ),
    Addition(
        "tests/sampling/test_sampling_semantics.py",
        "# Dialects ---",
        """def test_s45_top_gap() -> None:
    assert kept([3.0, 2.0, 1.0], top_gap=1.0) == [0, 1]  # exactly 1 below stays
    assert kept([3.0, 2.0, 1.0], top_gap=np.nextafter(1, 0)) == [0]
    assert kept([3.0, 2.0, 1.0], top_gap=INF) == [0, 1, 2]


""",
    ),
    # One group of vectors, its line in the plain sampler that the vectors are tried on, and its parameter.
    Addition(
        "tools/make_vectors.py",
        '        "epsilon_cutoff": (\n            "A token stays if its mass',
        """        "top_gap": (
            "A token stays if its logit is at most so far below the best.",
            [sure("top_gap.one", "1.5 is 1.5 below 3.", [3, 2, 1.5, 0], top_gap=1.25)],
        ),
""",
    ),
    Addition(
        "tests/test_vectors.py",
        '    if "top_k" in parameters:\n',
        """    if (gap := parameters.get("top_gap", inf)) < inf:
        left = [token for token in left if z[token] >= z[left[0]] - gap]
""",
    ),
    Addition(
        "vectors/schema.json", '        "top_k": {"type": "integer"}', '        "top_gap": {"$ref": "#/$defs/real"},\n'
    ),
]

# What holds then, in the copy.
CLAIMS = """
import copy, inspect, pickle
import numpy as np, headway as hw
from headway import reference

rng = np.random.default_rng(0)
logits = (rng.standard_normal((6, 1000)) * 3).astype(np.float32)
gaps = np.array([0.0, 0.5, 1.0, 2.0, 5.0, np.inf])
for options in ({"top_gap": 2.0}, {"top_gap": gaps}, {"top_gap": 4.0, "top_k": 9, "top_p": 0.9, "seed": 4},
                {"top_gap": 0.1, "min_tokens_to_keep": 7}, {"top_gap": 1.0, "temperature": 0}):
    options = {"seed": 3, **options}
    for name in ("sample", "probabilities", "filter_logits"):
        got, want = (np.asarray(getattr(module, name)(logits, **options)) for module in (hw, reference))
        assert got.tobytes() == want.tobytes(), (name, options)
params = hw.SamplingParams(top_gap=1.5, seed=1)
assert repr(params) == "SamplingParams(top_gap=1.5, seed=1)"
assert pickle.loads(pickle.dumps(params)) == copy.copy(params) == params
assert hw.SamplingParams().top_gap is None
assert "top_gap" in inspect.signature(hw.sample).parameters
row = [3.0, 2.0, 1.0, 0.0]
assert hw.logprobs(row, [0, 2], params, processed=True).logprobs[1] == -np.inf
sampler = hw.Sampler(4)
sampler.admit(hw.SamplingParams(top_gap=0.0)), sampler.admit(hw.SamplingParams(seed=2))
assert sampler.step([row, row])[0] == 0
found = hw.explain(row, top_gap=1.0)
print(found)
print(found.why(2))
try:
    hw.sample(row, top_gap=-1)
except ValueError as error:
    print(error)
print(hw.sample(logits, seed=9).tolist(), hw.sample(logits, top_k=5, seed=9).tolist())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with the additions, built, and its generated files made."""
    for module in ("scikit_build_core", "nanobind"):
        pytest.importorskip(module, reason=f"{module} builds the copy; `make test` installs it")
    tree = tmp_path_factory.mktemp("recipe")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tree / name)
    for old in (tree / "src/headway").glob("_native*.so"):
        old.unlink()
    for addition in ADDITIONS:
        path = tree / addition.file
        text = path.read_text()
        assert addition.before in text, f"{addition.file} has no {addition.before!r}"
        path.write_text(text.replace(addition.before, addition.lines + addition.before, 1))
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": scripts, "CMAKE_ARGS": "-DHEADWAY_TABLES=portable -DHEADWAY_OPTIMIZE=-O0"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    ended(subprocess.run([*pip, "--target", tree / "built", tree], env=environment, capture_output=True, text=True))
    (native,) = (tree / "built/headway").glob("_native*.so")
    native.rename(tree / "src/headway" / native.name)
    # An interpreter that finds what is installed here, but for headway, which is the copy's.
    venv.create(tree / "venv")
    (site,) = (tree / "venv").glob("lib/python*/site-packages")
    (site / "copy.pth").write_text("\n".join([str(tree / "src"), *filter(None, sys.path)]) + "\n")
    for tool in ("make_params", "make_vectors", "make_api"):
        run(tree, f"tools/{tool}.py")
    return tree


def run(tree: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HEADWAY"))}
    python = tree / "venv/bin/python"
    return ended(subprocess.run([python, *arguments], cwd=tree, env=environment, capture_output=True, text=True))


def ended(done: Any) -> str:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return str(done.stdout)


def test_the_stage_works_wherever_options_go(tree: Path) -> None:
    said = run(tree, "-c", CLAIMS)
    print(said)
    assert "top_gap=1" in said
    assert "its distance from the best logit" in said
    assert "top_gap: expected a number >= 0, got -1; use None or infinity to switch it off" in said


def test_the_command_has_the_flag(tree: Path) -> None:
    assert "keep logits up to X below the best (default: off)" in " ".join(
        run(tree, "-m", "headway", "sample", "--help").split()
    )
    (tree / "logits.json").write_text("[3, 2, 1]")
    assert run(tree, "-m", "headway", "sample", "logits.json", "--top-gap", "0", "--seed", "1") == "0\n"


def test_calls_without_it_give_what_they_gave(tree: Path) -> None:
    import numpy as np

    import headway as hw

    logits = (np.random.default_rng(0).standard_normal((6, 1000)) * 3).astype(np.float32)
    last = run(tree, "-c", CLAIMS).splitlines()[-1]
    assert last == f"{hw.sample(logits, seed=9).tolist()} {hw.sample(logits, top_k=5, seed=9).tolist()}"


def test_the_vectors_have_its_group_and_all_others(tree: Path) -> None:
    for path in sorted((ROOT / "vectors").glob("*.json")):
        before, after = (json.loads((folder / "vectors" / path.name).read_text()) for folder in (ROOT, tree))
        if path.stem == "support":
            after["groups"] = [group for group in after["groups"] if group["name"] != "top_gap"]
        assert path.stem == "schema" or before == after


def test_what_holds_stages_together_holds(tree: Path) -> None:
    """In the copy: the records, the sentences, bad values of every option, the vectors but for their page's counts."""
    names = (
        "sampling/test_stages",
        "sampling/test_sampling_semantics",
        "sampling/test_sampling_errors",
        "test_vectors",
    )
    skipped = "not readme and not conformance"
    run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}.py" for name in names), "-k", skipped)
