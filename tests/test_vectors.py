"""vectors/ is fresh, well-formed, passed by headway, and catches samplers that are wrong.

`plain` is a sampler in Python's own floats that knows nothing of headway: it passes levels 1 and 2. Each of DEFECTS
edits a line of it into a mistake that samplers have been seen to make, and is caught.
"""

from __future__ import annotations

import ast
import collections
import importlib.util
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import headway as hw
from headway import reference
from headway._sampling.dialects import DIALECTS, rules
from headway._sampling.settings import OPTIONS

ROOT = Path(__file__).parent.parent
VECTORS = ROOT / "vectors"
FILES = {path.stem: json.loads(path.read_text()) for path in VECTORS.glob("*.json") if path.stem != "schema"}
CASES = {name: [case for group in file["groups"] for case in group["cases"]] for name, file in FILES.items()}
LEVELS = ("support", "boundaries")

Sampler = Callable[[list[float], dict[str, Any]], Any]


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load(VECTORS / "check.py")


def failures(sampler: Sampler, dialect: str = "native") -> list[str]:
    """The ids of the cases that are not passed."""
    return [
        case["id"]
        for level in LEVELS
        for case, outcome, _, _ in check.run(sampler, level, dialect)
        if outcome == "failed"
    ]


def parameters_of(case: dict[str, Any]) -> dict[str, Any]:
    read = {name: check.numbers if name == "logit_bias" else check.number for name in case["parameters"]}
    return {name: read[name](value) if isinstance(value, str) else value for name, value in case["parameters"].items()}


# The files ----------------------------------------------------------------------------------------------------------


def test_the_files_are_fresh() -> None:
    make = load(ROOT / "tools" / "make_vectors.py")
    assert list(make.LEVELS) == ["support", "boundaries", "masses", "draws"]
    for level, name in enumerate(make.LEVELS, 1):
        assert make.file(level) == (VECTORS / f"{name}.json").read_text(), f"{name}.json is stale: make vectors"


def test_the_generator_uses_nothing_compiled() -> None:
    tree = ast.parse((ROOT / "tools" / "make_vectors.py").read_text())
    taken = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert taken & {*hw.__all__, "_native"} == {"SamplingParams"}  # which only checks options


@pytest.mark.parametrize("name", list(FILES))
def test_the_schema(name: str) -> None:
    schema = json.loads((VECTORS / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(FILES[name])
    assert set(schema["$defs"]["case"]["properties"]["expected"]["properties"]) == {
        "native",
        *DIALECTS,
        "flashinfer-joint",
    }
    of_a_call = {"ties", "nucleus", "dialect", "seed", "position", "uniform", "xtc_special_tokens"}
    assert list(schema["$defs"]["parameters"]["properties"]) == [o.name for o in OPTIONS if o.name not in of_a_call]
    key = {"masses": "masses", "draws": "seed"}.get(name, "expected")
    for spoilt in ({"result": "perhaps"}, {"id": "Spaces and no dot"}, {"logits": "3f8"}, {"parameters": {"top_q": 1}}):
        broken = json.loads(json.dumps(FILES[name]))
        broken["groups"][0]["cases"][0].update(spoilt)
        assert not validator.is_valid(broken)
    del (broken := json.loads(json.dumps(FILES[name])))["groups"][0]["cases"][0][key]
    assert not validator.is_valid(broken)


def test_ids_flags_and_size() -> None:
    ids = collections.Counter(case["id"] for cases in CASES.values() for case in cases)
    assert max(ids.values()) == 1
    assert len(ids) > 350
    for name, file in FILES.items():
        used = {flag for case in CASES[name] for flag in case["flags"]}
        assert used == set(file["flags"]), name
        assert len({group["name"] for group in file["groups"]}) == len(file["groups"])
        assert all(text.endswith(".") for text in file["flags"].values())
    assert len({file["version"] for file in FILES.values()}) == 1
    assert sum(path.stat().st_size for path in VECTORS.glob("*.json")) < 400_000
    readme = (VECTORS / "README.md").read_text()
    for flag in {flag for file in FILES.values() for flag in file["flags"]}:
        assert f"`{flag}`" in readme, flag


def test_results_say_what_is_expected() -> None:
    for case in CASES["support"] + CASES["boundaries"]:
        answers = case["expected"]
        assert (case["result"] == "invalid") == (answers == {"native": "error"}), case["id"]
        assert case["result"] != "acceptable" or len(answers) > 1, case["id"]
        assert all(answer == "error" or answer == sorted(set(answer)) for answer in answers.values()), case["id"]
        assert {flag for flag in case["flags"] if flag in DIALECTS} == set(answers) & set(DIALECTS), case["id"]
    for level in LEVELS:
        assert FILES[level]["dialects"] == ["native", *DIALECTS, "flashinfer-joint"]
    assert {case["result"] for case in CASES["support"]} == {"valid"}
    assert {case["result"] for case in CASES["boundaries"]} == {"valid", "invalid", "acceptable"}
    options = {name for case in CASES["support"] for name in case["parameters"]}
    assert options >= rules(None, "after_top_k").lacks() | {step.option for step in DIALECTS["hf"].steps}


def test_check_is_short_and_needs_nothing() -> None:
    text = (VECTORS / "check.py").read_text()
    assert sum(bool(line.strip()) for line in text.splitlines()) <= 40
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    assert names <= sys.stdlib_module_names
    assert all(isinstance(node, ast.Import) for node in imports)
    ast.parse(text, feature_version=(3, 8))


# headway passes -----------------------------------------------------------------------------------------------------


def headway(dialect: str | None) -> Sampler:
    """What headway can draw; the filters that a dialect lacks are not expressible."""
    name, nucleus = ("flashinfer", "joint") if dialect == "flashinfer-joint" else (dialect, "after_top_k")

    def sampler(logits: list[float], parameters: dict[str, Any]) -> Any:
        if rules(name, nucleus).lacks() & parameters.keys():
            raise NotImplementedError
        return np.flatnonzero(hw.probabilities(logits, dialect=name, nucleus=nucleus, seed=0, **parameters))

    return sampler


@pytest.mark.parametrize("dialect", ["native", *DIALECTS, "flashinfer-joint"])
def test_headway_passes_levels_1_and_2(dialect: str) -> None:
    sampler = headway(None if dialect == "native" else dialect)
    found = collections.Counter(outcome for level in LEVELS for _, outcome, _, _ in check.run(sampler, level, dialect))
    assert found["failed"] == 0
    assert found["passed"] >= 60
    if dialect == "native":
        assert set(found) == {"passed"}
    else:
        assert failures(sampler)  # as native it fails


def words(text: str) -> list[int]:
    """Whole numbers in hex, *n behind one that comes n times."""
    items = (item.partition("*") for item in text.split())
    return [int(digits, 16) for digits, _, times in items for _ in range(int(times or 1))]


@pytest.mark.parametrize("case", CASES["masses"], ids=lambda case: case["id"])
def test_headway_passes_level_3(case: dict[str, Any]) -> None:
    """A float64 probability times the total is within half a unit of the mass: both are known to 53 bits."""
    logits, want = np.array(check.numbers(case["logits"])), np.array(words(case["masses"]))
    p = hw.probabilities(logits, seed=0, **parameters_of(case))
    assert p.dtype == np.float64
    assert want.max() == 1 << min(44, 62 - math.ceil(math.log2(logits.size)))
    assert np.array_equal(np.rint(p * float(want.sum())).astype(np.int64), want)


@pytest.mark.parametrize("case", CASES["draws"], ids=lambda case: case["id"])
def test_headway_passes_level_4(case: dict[str, Any]) -> None:
    seed, stream, position = (int(case[name], 16) for name in ("seed", "stream", "position"))
    if "words" in case:
        want = words(case["words"])
        assert list(reference.philox(seed, stream, position, case["draw"])) == want
        if case["draw"] == 0:
            before = (position - 1) % 2**256
            assert np.random.Philox(key=[seed, stream], counter=before).random_raw(4).tolist() == want
        return
    rows = np.tile(np.float32(check.numbers(case["logits"])), (stream + 1, 1))
    draws = {name: case[name] for name in ("num_samples", "replacement") if name in case}
    tokens = hw.sample(rows, seed=seed, position=position, **{"num_samples": 1, **draws}, **parameters_of(case))
    assert tokens[stream].tolist() == case["tokens"]


def test_the_draws_are_rich() -> None:
    """The tail is drawn, the coin falls both ways, streams and positions matter."""
    tokens = {case["id"]: case["tokens"] for case in CASES["draws"] if "tokens" in case}
    tail = {tuple(found) for name, found in tokens.items() if re.match(r"draws\.tail-\d", name)}
    assert len(tail) == 4
    assert (128,) not in tail
    assert {0, 1} & {found[0] for name, found in tokens.items() if name.startswith("draws.coin")}
    for family in ("plain", "cut", "seed", "position", "row", "many", "equal", "coin"):
        assert len({tuple(found) for name, found in tokens.items() if name.startswith(f"draws.{family}-")}) > 2, family


# Others do not --------------------------------------------------------------------------------------------------------


def plain(logits: list[float], parameters: dict[str, Any]) -> Any:
    """The native contract in Python's own floats."""
    V, inf = len(logits), math.inf
    real = {k: v for k, v in parameters.items() if isinstance(v, float)}
    if any(math.isnan(v) or v < 0 for v in real.values()) or real.get("temperature") == inf:
        raise ValueError("not a number in range")
    if any(real.get(name, 1) <= 0 for name in ("top_p", "typical_p", "top_n_sigma")):
        raise ValueError("not above 0")
    if any(v > 1 for k, v in real.items() if k.endswith(("_p", "cutoff", "probability", "threshold"))):
        raise ValueError("not a share")
    if parameters.get("top_k", 1) < 1 or parameters.get("min_tokens_to_keep", 1) < 1:
        raise ValueError("not a count")
    bias = parameters.get("logit_bias", [0.0] * V)
    allowed = parameters.get("allowed", list(range(V)))
    if any(not b < inf for b in bias) or any(not 0 <= token < V for token in allowed):
        raise ValueError("no such bias or token")
    z = [a + b for a, b in zip(logits, bias)]
    if any(not z[token] < inf for token in allowed):
        raise ValueError("NaN or +inf")
    left = [token for token in allowed if z[token] > -inf]
    if not left:
        raise ValueError("every token is banned")
    left.sort(key=lambda token: (-z[token], token))
    T, floor = parameters.get("temperature", 1.0), parameters.get("min_tokens_to_keep", 1)

    def masses(T: float) -> list[float]:
        top = z[left[0]]
        if T == 0:
            return [float(token == left[0]) for token in left]
        return [math.exp((z[token] - top) / T) for token in left]

    def entropy() -> float:
        w = masses(T)
        return -math.fsum(m / math.fsum(w) * math.log(m / math.fsum(w)) for m in w if m > 0)

    if spread := parameters.get("dynamic_temperature_range"):
        t, T = T, 1.0
        share = entropy() / math.log(len(left)) if len(left) > 1 else 0.0
        low = max(0.0, t - spread)
        T = low + (t + spread - low) * share ** parameters.get("dynamic_temperature_exponent", 1.0)
    if (n := parameters.get("top_n_sigma", inf)) < inf:
        mean = math.fsum(z[token] for token in left) / len(left)
        sigma = math.sqrt(math.fsum((z[token] - mean) ** 2 for token in left) / len(left))
        left = [token for i, token in enumerate(left) if i < floor or z[token] >= z[left[0]] - n * sigma]
    if "top_k" in parameters:
        left = left[: max(parameters["top_k"], floor)]
    if (p := parameters.get("top_p", 1.0)) < 1:
        w = masses(T)
        left = [token for i, token in enumerate(left) if i < floor or math.fsum(w[:i]) < p * math.fsum(w)]
    if p := parameters.get("min_p", 0.0):
        w = masses(T)
        left = [token for i, token in enumerate(left) if i < floor or w[i] >= p * w[0]]
    if (p := parameters.get("typical_p", 1.0)) < 1:
        w, h = masses(T), entropy()
        far = [abs(-math.log(m / math.fsum(w)) - h) if m else inf for m in w]
        order = sorted(range(len(left)), key=lambda i: (far[i], left[i]))
        count = sum(math.fsum(w[j] for j in order[:i]) < p * math.fsum(w) for i in range(len(order)))
        left = [left[i] for i in sorted(order[: max(count, floor)])]
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if e := parameters.get(name, 0.0):
            e = min(e, math.sqrt(e) * math.exp(-entropy())) if name == "eta_cutoff" else e
            w = masses(T)
            left = [token for i, token in enumerate(left) if i < floor or w[i] >= e * math.fsum(w)]
    if parameters.get("xtc_probability", 0.0) == 1:
        w = masses(T)
        goes = sum(m >= parameters.get("xtc_threshold", 0.1) * math.fsum(w) for m in w) - 1
        left = left[goes:] if 0 < goes <= len(left) - floor else left
    return [token for token, m in zip(left, masses(T)) if m > 0]


def test_the_plain_sampler_passes() -> None:
    assert failures(plain) == []


FLOAT32_SUMS = "float(np.cumsum(np.float32(w) / np.sum(np.float32(w)), dtype=np.float32)[i - 1]) < p"
DEFECTS = {
    "of equal logits the highest ids stay": ("(-z[token], token))", "(-z[token], -token))"),
    "the sort is not stable": ("(-z[token], token))", "(-z[token], token * 7 % 5))"),
    "float16 logits": ("[a + b for", "[float(np.float16(min(max(a, -6e4), 6e4))) + b for"),
    "temperature comes last": ('T, floor = parameters.get("temperature", 1.0),', "T, floor = 1.0,"),
    "temperature is squared": ("- top) / T)", "- top) / T / T)"),
    "no maximum is subtracted": ("top = z[left[0]]", "top = 0"),
    "temperature 0 divides": ("if T == 0:", "if False:"),
    "temperature 0 keeps ties": ("float(token == left[0])", "float(z[token] == z[left[0]])"),
    "a tiny temperature is raised": (
        'parameters.get("temperature", 1.0), ',
        'max(parameters.get("temperature", 1.0), 0.1), ',
    ),
    "top_k keeps ties": (
        'left = left[: max(parameters["top_k"], floor)]',
        'left = [t for t in left if z[t] >= z[left[:max(parameters["top_k"], floor)][-1]]]',
    ),
    "top_k counts banned tokens": ("left = [token for token in allowed if z[token] > -inf]", "left = allowed"),
    "top_k is one too many": ('left[: max(parameters["top_k"], floor)]', 'left[: max(parameters["top_k"] + 1, floor)]'),
    "top_k is not applied": ('if "top_k" in parameters:', "if False:"),
    "top_k above V is an error": ('parameters.get("top_k", 1) < 1', '(not 1 <= parameters.get("top_k", 1) <= V)'),
    "top_p keeps a token before which there is p": ("math.fsum(w[:i]) < p * math", "math.fsum(w[:i]) <= p * math"),
    "top_p drops the token that crosses": ("math.fsum(w[:i]) < p * math", "math.fsum(w[: i + 1]) < p * math"),
    "top_p drops what crosses but for equality": ("math.fsum(w[:i]) < p * math", "math.fsum(w[: i + 1]) <= p * math"),
    "top_p before top_k": ("p * math.fsum(w)]\n    if p := ", "p * total]\n    if p := "),
    "top_p in float32 sums": ("math.fsum(w[:i]) < p * math.fsum(w)]", f"{FLOAT32_SUMS}]"),
    "top_p rounded to float32": (
        'p := parameters.get("top_p", 1.0)',
        'p := float(np.float32(parameters.get("top_p", 1.0)))',
    ),
    "top_p of the best one's mass": ("math.fsum(w[:i]) < p * math.fsum(w)]", "math.fsum(w[:i]) < p * w[0]]"),
    "top_p may leave none": ("i < floor or math.fsum(w[:i])", "math.fsum(w[: i + 1])"),
    "min_p drops what just reaches it": ("w[i] >= p * w[0]", "w[i] > p * w[0]"),
    "min_p of the whole": ("w[i] >= p * w[0]", "w[i] >= p * math.fsum(w)"),
    "min_p on logits": ("w[i] >= p * w[0]", "z[token] >= p * z[left[0]]"),
    "min_p before top_p": (
        "    w = masses(T)\n        left = [token for i, token in enumerate(left) if i < floor or math.fsum(w[:i])",
        "    w = [m for m in masses(T) if m >= parameters.get('min_p', 0)]\n"
        "        left = [token for i, token in enumerate(left) if i < floor or math.fsum(w[:i])",
    ),
    "typical_p by surprise alone": ("m / math.fsum(w)) - h)", "m / math.fsum(w)))"),
    "typical_p always keeps the best": ("order[: max(count, floor)])]", "{0, *order[: max(count, floor)]})]"),
    "typical_p keeps one too many": ("order[: max(count, floor)]", "order[: max(count, floor) + 1]"),
    "top_n_sigma with n - 1": ("for token in left) / len(left))", "for token in left) / max(len(left) - 1, 1))"),
    "top_n_sigma below the mean": (">= z[left[0]] - n * sigma", ">= mean - n * sigma"),
    "top_n_sigma after the temperature": ("z[left[0]] - n * sigma", "z[left[0]] - n * sigma * T"),
    "top_n_sigma drops what just reaches it": (">= z[left[0]] - n", "> z[left[0]] - n"),
    "epsilon of the best one's mass": ("w[i] >= e * math.fsum(w)", "w[i] >= e * w[0]"),
    "epsilon drops what just reaches it": ("w[i] >= e * math.fsum(w)", "w[i] > e * math.fsum(w)"),
    "eta without the root": ("math.sqrt(e) * math.exp", "e * math.exp"),
    "eta is epsilon": ("math.sqrt(e) * math.exp(-entropy())", "1"),
    "xtc takes the last as well": ("math.fsum(w) for m in w) - 1", "math.fsum(w) for m in w)"),
    "xtc takes only more than the threshold": ("sum(m >= parameters", "sum(m > parameters"),
    "xtc of the best one's mass": ('"xtc_threshold", 0.1) * math.fsum(w)', '"xtc_threshold", 0.1) * w[0]'),
    "xtc ignores the floor": ("<= len(left) - floor", "<= len(left)"),
    "the floor is ignored": ('parameters.get("min_tokens_to_keep", 1)\n\n', "1\n\n"),
    "the entropy is in bits": ("return -math.fsum(", "return -1.4427 * math.fsum("),
    "the dynamic temperature is fixed": ("share ** parameters", "1 ** parameters"),
    "bans are large and finite": ("if z[token] > -inf]", "]\n    z = [max(x, -1.0) for x in z]"),
    "far logits count as bans": ("if z[token] > -inf]", "if z[token] > -1e30]"),
    "the bias comes after top_k": ("[a + b for a, b in zip", "[a + (b if b == -inf else 0) for a, b in zip"),
    "allowed is ignored": ("allowed = parameters.get", "allowed = {}.get"),
    "NaN is taken": ("if any(not z[token] < inf for", "if any(z[token] == inf for"),
    "+inf is taken": ("if any(not z[token] < inf for", "if any(z[token] != z[token] for"),
    "what is not allowed is looked at": ("not z[token] < inf for token in allowed", "not x < inf for x in z"),
    "an empty row gives token 0": ('raise ValueError("every token is banned")', "return [0]"),
    "numbers are not checked": ('raise ValueError("not a number in range")', "pass"),
    "subnormal numbers are 0": ("[a + b for a, b", "[(a + b) * (abs(a + b) > 1e-38) for a, b"),
}


@pytest.mark.parametrize("defect", list(DEFECTS))
def test_a_defect_is_caught(defect: str) -> None:
    source, (line, mistake) = inspect.getsource(plain), DEFECTS[defect]
    assert source.count(line) == 1, "the edit must be of one place"
    if defect == "top_p before top_k":
        source = source.replace('    if "top_k" in', '    total = math.fsum(masses(T))\n    if "top_k" in')
    space: dict[str, Any] = {"math": math, "np": np, "Any": Any}
    exec(source.replace(line, mistake), space)
    found = failures(space["plain"])
    print(defect, len(found), found[:5])
    assert found


# The pages ------------------------------------------------------------------------------------------------------------


def test_the_readme(tmp_path: Path) -> None:
    """Its sampler does what it says there, and its numbers are those of the files."""
    text = (VECTORS / "README.md").read_text()
    code, output = re.search(r"```python\n(.*?)```.*?check\.py mine:sampler\n(.*?)\n\n", text, re.DOTALL).groups()  # type: ignore[union-attr]
    (tmp_path / "mine.py").write_text(code + "\n\ndef everything(logits, parameters):\n    return range(len(logits))\n")
    for name, status in (("sampler", 0), ("everything", 1)):
        command = [sys.executable, str(VECTORS / "check.py"), f"mine:{name}"]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ran.returncode == status, ran.stderr
        if name == "sampler":
            assert ran.stdout.split() == output.split()
        else:
            assert "top_k.one kept [0, 1, 2, 3] not [2]" in ran.stdout
            assert re.search(r"failed, by flag: \{.*'ties': \d", ran.stdout)
    with pytest.raises(SystemExit, match=r"^dialect: expected one of native, hf, .*, got vlm$"):
        next(check.run(plain, "support", "vlm"))
    version = FILES["support"]["version"]
    assert f"version {version}, {sum(map(len, CASES.values()))} cases" in text
    assert text.count(version) == 2
    length = sum(bool(line.strip()) for line in (VECTORS / "check.py").read_text().splitlines())
    assert f"`check.py` is {length} lines" in text


def test_the_conformance_page_is_of_these_vectors() -> None:
    """It can be written only where the libraries are, but its cases are those that there are."""
    text = (ROOT / "docs" / "conformance.md").read_text()
    assert FILES["support"]["version"] in text
    ids = {case["id"] for name in LEVELS for case in CASES[name]}
    listed = set(re.findall(r"`([a-z_]+\.[\w.-]+)`", text.partition("## What fails")[2]))
    assert listed <= ids
    assert len(listed) > 100
    ours = next(line for line in text.splitlines() if line.startswith("| headway "))
    assert [tuple(map(int, cell)) for cell in re.findall(r"(\d+) / (\d+) / (\d+)", ours)] == [
        (len(CASES[name]), 0, 0) for name in LEVELS
    ] * 2
    libraries = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert libraries == ["transformers", "vLLM", "llama.cpp", "SGLang", "mlx-lm"]
