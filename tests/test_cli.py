"""The `headway` command: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mutations import mutated
from tiny_llama import EOS, write_checkpoint

import headway as hw
import headway.lm
from headway._sampling import Penalties
from headway.cli import main

Output = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in this process: arguments and standard input -> status, output, errors."""

    def run(*arguments: object, stdin: bytes = b"") -> Output:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's own way out, of --help and of bad options
            status = int(end.code or 0)
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def refused(result: Output, message: str) -> None:
    """Assert: status 2, nothing on standard output, one line on standard error that says `message`."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"headway: error: [^\n]*{message}[^\n]*\n", err), err


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint that writes for as long as anyone listens."""
    folder = tmp_path_factory.mktemp("endless")
    write_checkpoint(folder, max_position_embeddings=10**6, eos_token_id=None)
    return folder


# Buffered as a shell would have it: without a buffer nothing is left over when a pipe closes, and nothing is tested.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "headway", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=BUFFERED)


# -------------------------------------------------------------------------------------------------- generate


def test_generate_prints_prompt_and_text_and_repeats(run: Any) -> None:
    status, out, err = run("generate", "And God said", "--max-tokens", 12, "--seed", 7)
    assert status == 0
    text = headway.lm.load().generate("And God said", max_tokens=12, seed=7)
    assert out == f"And God said{text}\n"
    assert re.fullmatch(r"headway: 12 tokens, [0-9.]+ tokens/s, ended by max_tokens, --seed 7\n", err)
    assert run("generate", "And God said", "--max-tokens", 12, "--seed", 7)[1] == out


def test_generate_without_a_seed_tells_the_one_it_took(run: Any) -> None:
    _, first, err = run("generate", "And", "--max-tokens", 12)
    seed = re.search(r"--seed ([0-9]+)\n", err)
    assert seed
    assert run("generate", "And", "--max-tokens", 12, "--seed", seed[1])[1] == first
    assert run("generate", "And", "--max-tokens", 12)[2] != err, "a fresh seed each time"


def test_generate_passes_every_sampling_option_on(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    options = {
        "temperature": 1.5,
        "top_k": 9,
        "top_p": 0.7,
        "min_p": 0.01,
        "ties": "keep",
        "nucleus": "joint",
    }
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    _, out, _ = run("generate", "abc", "--model", tmp_path, "--max-tokens", 20, "--seed", 1, *flags)
    text = headway.lm.load(tmp_path).generate("abc", max_tokens=20, params=hw.SamplingParams(seed=1, **options))
    assert out == f"abc{text}\n"


def test_generate_passes_every_penalty_and_ban_on(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path)
    admit, admitted = hw.Sampler.admit, {}

    def noted(self: hw.Sampler, *arguments: Any, **options: Any) -> int:
        admitted.update(options)
        return admit(self, *arguments, **options)

    monkeypatch.setattr(hw.Sampler, "admit", noted)
    options = {name: 3 for name in (*Penalties.__annotations__, "no_repeat_ngram", "min_tokens")}
    del options["dry_breakers"]
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--dry-breakers", 5, "--dry-breakers", 7, "--count-prompt"]
    assert run("generate", "abc", "--model", tmp_path, "--max-tokens", 2, *flags)[0] == 0
    assert admitted == {**options, "dry_breakers": [5, 7], "count_prompt": True, "stop_tokens": (EOS,)}


def test_generate_shows_log_probabilities(run: Any) -> None:
    model, prompt = headway.lm.load(), "And God said"
    for n in (0, 2):
        out = run("generate", prompt, "--max-tokens", 5, "--seed", 7, "--logprobs", n)[1]
        stream = model.stream(prompt, max_tokens=5, seed=7, logprobs=n)
        text = "".join(stream)
        assert out.startswith(f"{prompt}{text}\n")
        lines = [json.loads(line) for line in out[len(prompt + text) + 1 :].splitlines()]
        assert "".join(line["text"] for line in lines) == text
        for line, token, drawn in zip(lines, stream.token_ids, stream.logprobs, strict=True):
            assert (line["id"], line["rank"], line["logprob"]) == (token, drawn.raw.ranks, drawn.raw.logprobs)
            assert line["processed_logprob"] == drawn.processed.logprobs != line["logprob"]
            assert [best["id"] for best in line.get("top", ())] == ([] if n == 0 else drawn.raw.top_tokens.tolist())


def test_the_defaults_of_text_are_those_of_the_library(run: Any) -> None:
    page = " ".join(run("generate", "--help")[1].split())
    assert f"likeliest token (default: {headway.lm.DEFAULTS.temperature})" in page
    assert f"1 is off (default: {headway.lm.DEFAULTS.top_p})" in page


@pytest.mark.parametrize("arguments", [["-"], []])
def test_generate_reads_the_prompt_from_standard_input(run: Any, arguments: list[str]) -> None:
    given = run("generate", "And God", "--max-tokens", 3, "--seed", 1)
    assert run("generate", *arguments, "--max-tokens", 3, "--seed", 1, stdin=b"And God\n")[:2] == given[:2]


def test_generate_refuses(run: Any, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")
    model = ["--model", tmp_path / "tiny"]
    refused(run("generate", "a", "--model", tmp_path / "none"), "none: no such folder")
    refused(run("generate", "a" * 64, *model), "PROMPT: expected less than 64 tokens")
    refused(run("generate", "a", *model, "--temperature", -1), "--temperature: expected")
    refused(run("generate", "a", *model, "--top-p", 0), "--top-p: expected")
    refused(run("generate", "a", *model, "--seed", -1), "--seed: expected")
    refused(run("generate", "a", *model, "--max-tokens", -1), "--max-tokens: expected")
    refused(run("generate", "a", *model, "--max-tokens", "many"), "--max-tokens: invalid int value: 'many'")
    refused(run("generate", *model, stdin=b"\xff\xfe"), "standard input: expected UTF-8 text")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"not this")
    refused(run("generate", "a", *model), "model.safetensors: not a whole safetensors file")


def test_every_piece_is_shown_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        shown: list[str] = []  # noqa: RUF012 (one terminal)

        def flush(self) -> None:
            self.shown.append(self.getvalue())

    write_checkpoint(tmp_path)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["generate", "abc", "--model", str(tmp_path), "--max-tokens", "9", "--seed", "1"]) == 0
    pieces = list(headway.lm.load(tmp_path).stream("abc", max_tokens=9, seed=1))
    for count in range(len(pieces) + 1):
        assert "abc" + "".join(pieces[:count]) in terminal.shown


def test_ctrl_c_leaves_a_clean_terminal(endless: Path) -> None:
    process = start("generate", "abc", "--model", str(endless), "--max-tokens", "1000000", "--seed", "1")
    assert process.stdout is not None
    assert process.stdout.read(50).startswith(b"abc")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"\n")


def test_a_reader_that_goes_away_ends_it_quietly(endless: Path) -> None:
    process = start("generate", "abc", "--model", str(endless), "--max-tokens", "1000000", "--seed", "1")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert (process.wait(timeout=20), process.stderr.read()) == (141, b"")
    process.stderr.close()


def test_a_reader_that_never_was_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "headway", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False, env=BUFFERED)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# ---------------------------------------------------------------------------------------------------- sample


def test_sample_draws_what_the_library_draws(run: Any, tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 2
    np.save(tmp_path / "logits.npy", logits)
    (tmp_path / "logits.json").write_text(json.dumps(logits.tolist()))
    options = [
        "--temperature",
        0.8,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--seed",
        3,
        "--position",
        9,
    ]
    token = hw.sample(logits, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, seed=3, position=9)
    for source in ("logits.npy", "logits.json"):
        assert run("sample", tmp_path / source, *options) == (0, f"{token}\n", "")
        data = (tmp_path / source).read_bytes()
        assert run("sample", "-", *options, stdin=data) == (0, f"{token}\n", "")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.1},
        {"top_k": 3},
        {"top_p": 0.2},
        {"min_p": 0.5},
        {"top_k": 3, "ties": "keep"},
        {"top_k": 3, "top_p": 0.2, "nucleus": "joint"},
        {"dynamic_temperature_range": 0.9},
        {"dynamic_temperature_range": 0.9, "dynamic_temperature_exponent": 5.0},
        {"top_n_sigma": 0.5},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.05},
        {"eta_cutoff": 0.9},
        {"xtc_threshold": 0.01, "xtc_probability": 0.9},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01},
        {"top_k": 1, "min_tokens_to_keep": 9},
        {"top_k": 3, "dialect": "hf"},
        {"position": 7},
    ],
)
def test_sample_passes_each_option_on(run: Any, options: dict[str, Any]) -> None:
    logits = np.round(np.random.default_rng(1).normal(size=30))  # rounded, so that there are ties
    data = json.dumps(logits.tolist()).encode()
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    drawn = [run("sample", "-", "--seed", seed, *flags, stdin=data)[1] for seed in range(40)]
    assert drawn == [f"{hw.sample(logits, seed=seed, **options)}\n" for seed in range(40)]
    without = dict(list(options.items())[:-1])
    assert drawn != [f"{hw.sample(logits, seed=seed, **without)}\n" for seed in range(40)], "no effect here"


def test_sample_prints_a_line_for_each_row(run: Any) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 3, 40))
    expected = "".join(f"{token}\n" for token in np.ravel(hw.sample(rows, seed=1)))
    assert run("sample", "-", "--seed", 1, stdin=json.dumps(rows.tolist()).encode()) == (0, expected, "")
    assert expected.count("\n") == 6


def test_sample_defaults_to_the_plain_distribution(run: Any) -> None:
    drawn = {run("sample", "-", "--seed", seed, stdin=b"[0, 0, 0, 0, -Infinity]")[1] for seed in range(60)}
    assert drawn == {"0\n", "1\n", "2\n", "3\n"}


def test_sample_without_a_seed_tells_the_one_it_took(run: Any) -> None:
    logits = json.dumps([0.0] * 100_000).encode()
    _, token, err = run("sample", "-", stdin=logits)
    assert run("sample", "-", *err.split()[1:], stdin=logits) == (0, token, "")
    assert re.fullmatch(r"headway: --seed [0-9]+\n", err)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "standard input: expected .npy, .npz or JSON: Expecting value"),
        (b"[1, 2", "standard input: expected .npy, .npz or JSON"),
        (b"\xff\xfe\xfd", "standard input: expected .npy, .npz or JSON"),
        (b"[" * 100_000, "standard input: expected .npy, .npz or JSON"),
        (b"\x93NUMPY broken", "standard input: expected .npy, .npz or JSON"),
        (b"PK broken", "standard input: expected .npy, .npz or JSON"),
        (b'{"logits": [1]}', "expected one array of logits, got an object of .'logits'."),
        (b"[1, NaN]", "logits"),
        (b"[1, Infinity]", "logits"),
        (b"[-Infinity, -Infinity]", "logits"),
        (b"[]", "logits"),
        (b"[[1, 2], [3]]", "logits"),
        (b'["a", "b"]', "logits"),
        (b"3", "logits"),
        (b"null", "logits"),
    ],
)
def test_sample_refuses(run: Any, data: bytes, message: str) -> None:
    refused(run("sample", "-", stdin=data), message)


def test_sample_refuses_files(run: Any, tmp_path: Path) -> None:
    refused(run("sample", tmp_path / "none.npy"), "none.npy: No such file or directory")
    refused(run("sample", tmp_path / "two\nlines"), "two lines: No such file or directory")
    refused(run("sample", tmp_path), "Is a directory")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused(run("sample", tmp_path / "objects.npy"), "objects.npy: expected .npy, .npz or JSON: Object arrays")
    refused(run("sample", "-", "--position", -1, stdin=b"[1, 2]"), "--position: expected")
    refused(run("sample", "-", "--top-k", 0, stdin=b"[1, 2]"), "--top-k: expected .*; leave --top-k out")
    refused(
        run("sample", "-", "--dialect", "hf", "--temperature", 0, stdin=b"[1, 2]"),
        "--temperature: expected .*; use --top-k=1, or leave --dialect hf out",
    )
    refused(run("sample", "-", stdin=b"[1" + b"0" * 5000 + b"]"), "JSON: .* value has 5001 digits")


# ---------------------------------------------------------------------------------------------------- attend

Q = [[1.0, 0.5, -0.25, 2.0], [0.0, 1.0, 0.5, -1.0], [0.3, 0.2, 0.1, 0.0]]
K = [[0.5, -0.5, 1.0, 0.25], [1.0, 0.0, -1.0, 0.5], [-0.75, 1.5, 0.0, 1.0]]
V = [[1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 1.0, 2.0], [0.1, 0.2, 0.3, 0.4]]


@pytest.fixture
def qkv(tmp_path: Path) -> Path:
    path = tmp_path / "qkv.json"
    path.write_text(json.dumps({"q": Q, "k": K, "v": V}))
    return path


def by_hand(decimals: int | None = None) -> list[list[float]]:
    """Compute two heads of two columns in plain Python floats, as the definition says."""
    out = [[0.0] * 4 for _ in Q]
    for i, query in enumerate(Q):
        for head in (slice(0, 2), slice(2, 4)):
            scores = [sum(a * b for a, b in zip(query[head], key[head], strict=True)) / 2**0.5 for key in K]
            weights = [np.exp(score - max(scores)) for score in scores]
            for column in range(head.start, head.stop):
                total = sum(weight * value[column] for weight, value in zip(weights, V, strict=True))
                out[i][column] = float(total / sum(weights))
    return out if decimals is None else [[round(x, decimals) for x in row] for row in out]


def test_attend_rounds_to_six_decimals_in_one_line(run: Any, qkv: Path) -> None:
    status, out, err = run("attend", qkv, "--num-heads", 2, "--decimals", 6)
    assert (status, err) == (0, "")
    assert json.loads(out) == by_hand(6)
    assert out.count("\n") == 3, "a row to a line"
    assert max(len(number) for number in re.findall(r"\.([0-9]+)", out)) == 6


def test_attend_takes_every_array_and_option(run: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "q": (5, 8),
        "k": (7, 8),
        "v": (7, 8),
        "w_q": (8, 8),
        "w_k": (8, 4),
        "w_v": (8, 4),
        "w_o": (8, 8),
    }
    shapes |= {"b_q": (8,), "b_k": (4,), "b_v": (4,), "b_o": (8,), "bias": (4, 5, 7), "sinks": (4,)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["mask"] = rng.random((5, 7)) < 0.8
    options = {"num_heads": 4, "num_kv_heads": 2, "causal": "bottom_right", "scale": 0.3, "softcap": 5.0}
    flags = [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), value)]
    np.savez(tmp_path / "in.npz", **arrays)
    status, out, _ = run("attend", tmp_path / "in.npz", *flags, "--window", "3", "none")
    expected = hw.multi_head_attention(**arrays, **options, window=(3, None))  # type: ignore[arg-type]
    assert status == 0
    np.testing.assert_array_equal(np.array(json.loads(out), np.float32), expected)


def test_attend_writes_every_format(run: Any, qkv: Path, tmp_path: Path) -> None:
    readers = {
        "out.json": lambda path: json.loads(path.read_text()),
        "out.npy": np.load,
        "out.npz": lambda path: np.load(path)["out"],
    }
    for name, read in readers.items():
        assert run("attend", qkv, "--num-heads", 2, "--decimals", 6, "-o", tmp_path / name) == (0, "", "")
        np.testing.assert_array_equal(read(tmp_path / name), by_hand(6))


def test_json_is_the_shortest_that_reads_back(run: Any, tmp_path: Path) -> None:
    q, v = np.zeros((1, 2), np.float32), np.array([[0.1, 1 / 3]], np.float32)
    np.savez(tmp_path / "in.npz", q=q, k=q, v=v)
    assert run("attend", tmp_path / "in.npz", "--num-heads", 1)[1] == "[[0.1, 0.33333334]]\n"


def test_attend_reads_standard_input(run: Any, qkv: Path) -> None:
    assert json.loads(run("attend", "-", "--num-heads", 2, "--decimals", 6, stdin=qkv.read_bytes())[1]) == by_hand(6)


def test_attend_never_overwrites_unasked(run: Any, qkv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text("precious")
    command = ("attend", qkv, "--num-heads", 2, "-o", out)
    refused(run(*command), "out.json: exists; --force overwrites it")
    assert out.read_text() == "precious"
    assert run(*command, "--force")[0] == 0
    assert len(json.loads(out.read_text())) == 3


def test_attend_never_overwrites_its_input(run: Any, qkv: Path, tmp_path: Path) -> None:
    before = qkv.read_bytes()
    (tmp_path / "link.json").symlink_to(qkv)
    for output in (qkv, tmp_path / "link.json", tmp_path / "." / "qkv.json"):
        refused(run("attend", qkv, "--num-heads", 2, "--force", "-o", output), "is the input")
    assert qkv.read_bytes() == before


def test_attend_refuses(run: Any, qkv: Path, tmp_path: Path) -> None:
    def attend(**arrays: Any) -> Output:
        return run("attend", "-", "--num-heads", 2, stdin=json.dumps(arrays).encode())

    refused(run("attend", qkv), "required: --num-heads")
    refused(run("attend", qkv, "--num-heads", 3), "--num-heads: expected")
    refused(run("attend", qkv, "--num-heads", 2, "--window", 1, "many"), "--window: invalid")
    refused(run("attend", qkv, "--num-heads", 2, "-o", tmp_path / "out.txt"), "ends in .json, .npy or .npz")
    refused(run("attend", qkv, "--num-heads", 2, "-o", tmp_path / "no" / "out.npy"), "No such file or directory")
    refused(run("attend", tmp_path / "none.json", "--num-heads", 2), "none.json: No such file")
    refused(run("attend", "-", "--num-heads", 2, stdin=b"[[1, 2]]"), "expected an object or .npz with arrays")
    refused(attend(q=Q, k=K), "standard input: expected arrays q, k and v, got no v")
    refused(attend(q=Q, k=K, v=V, wq=V), "array 'wq': expected one of q, k, v, w_q")
    refused(attend(q=Q, k=[[1, 2]], v=V), "k")
    refused(attend(q=[["a"]], k=K, v=V), "q")
    refused(attend(q=[[1, 2], [3]], k=K, v=V), "q")


# ------------------------------------------------------------------------------------------ files of any bytes


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(save: Any = np.savez, **arrays: Any) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def npy_header(shape: str = "(2,)", dtype: str = "'<f8'", data: bytes = bytes(64)) -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def zipped(compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def patched(data: bytes, local: int, central: int, value: int) -> bytes:
    """Change a byte of a zip file's first entry, where it stands and in the directory."""
    changed = bytearray(data)
    changed[data.index(b"PK\x03\x04") + local] = changed[data.index(b"PK\x01\x02") + central] = value
    return bytes(changed)


EYE = npy(np.eye(2))
WHOLE = zipped(q=EYE, k=EYE, v=EYE)
HEADERS = {
    "parentheses": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    "brackets": b"\x93NUMPY\x02\x00\x28\x23\x00\x00" + b"[" * 9000,
    "cut": EYE[:40],
    "cut in the data": EYE[:-3],
    "version 9": EYE[:6] + b"\x09" + EYE[7:],
    "a longer header than the file": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "objects": npy_header(dtype="'|O'"),
    "huge": npy_header("(1000000000000,)"),
    "too huge": npy_header("(9223372036854775807, 9)"),
    "negative": npy_header("(-1,)"),
    "fractions": npy_header("(2.5,)"),
    "text": npy_header(dtype="'<U4'"),
    "dates": npy_header(dtype="'<M8[s]'"),
    "complex": npy_header(dtype="'<c16'"),
    "records": npy_header(dtype="[('a', '<f8')]"),
    "nothing": npy_header(dtype="'|V0'"),
    "nothing, huge": npy_header("(1000000000000000,)", "'|V0'"),
    "rows of nothing": npy_header("(1000000000000, 0, 2)"),
}
BROKEN_FILES = {
    **HEADERS,
    **{f"{name}, in a zip file": zipped(q=data, k=EYE, v=EYE) for name, data in HEADERS.items()},
    "an unknown compression": patched(WHOLE, 8, 10, 99),
    "encrypted": patched(WHOLE, 6, 8, 1),
    **{
        f"broken {name}": zipped(method, q=EYE, k=EYE, v=EYE)[:60]
        + b"\xff" * 20
        + zipped(method, q=EYE, k=EYE, v=EYE)[80:]
        for name, method in {"deflate": 8, "bzip2": 12, "lzma": 14}.items()
    },
    "a cut zip file": WHOLE[:-30],
    "an empty zip file": b"PK\x05\x06" + bytes(18),
    "no zip file": b"PK",
    "an array twice": WHOLE.replace(b"v.npy", b"q.npy"),
    "empty": b"",
    "spaces": b"   ",
    "nul": bytes(9),
    "no text": b"\xff\xfe\xfd",
    "no UTF-8": b'["\xff"]',
    "deep": b"[" * 100_000,
    "deep and whole": b"[" * 500 + b"1" + b"]" * 500,
    "deep objects": b'{"q":' * 100_000,
    "digits": b"[" + b"9" * 5000 + b"]",
    "a huge number": b"[" + b"9" * 400 + b"]",
    "NaN": b"[1, NaN]",
    "infinity": b"[1e400]",
    "text in a list": b'["1"]',
    "an object in a list": b"[{}]",
    "a key twice": b'{"q": [[1]], "k": [[1]], "v": [[1]], "v": [[1]]}',
    "a surrogate": b'{"q": [[1]], "k": [[1]], "v": [[1]], "\\ud800": [[1]]}',
    "a long key": b'{"q": [[1]], "k": [[1]], "v": [[1]], "' + b"a" * 9999 + b'": 1}',
}


@pytest.mark.parametrize("data", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_one_line_that_names_it(run: Any, tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(data)
    for command in (("sample", "--seed", 1), ("explain",), ("attend", "--num-heads", 1)):
        for source, label in ((path, "broken"), ("-", "standard input")):
            status, out, err = run(*command, source, stdin=data)
            assert (status, out) == (2, ""), command
            assert re.fullmatch(rf"headway: error: [^\n]*{label}: [^\n]{{1,500}}\n", err), err


VALID_FILES: dict[str, tuple[tuple[object, ...], list[bytes]]] = {
    "sample": (
        ("sample", "--seed", 1),
        [npy(np.linspace(-3, 3, 20)), npy(np.eye(4, dtype=np.float16)), json.dumps([[0.5, 1], [2, -1e9]]).encode()],
    ),
    "explain": (("explain", "--top-p", 0.9), [npy(np.linspace(-3, 3, 20)), json.dumps([0.5, 1, -2]).encode()]),
    "attend": (
        ("attend", "--num-heads", 1),
        [
            npz(q=np.eye(2), k=np.eye(2), v=np.eye(2), mask=np.tril(np.ones((2, 2), bool))),
            npz(np.savez_compressed, q=np.eye(2), k=np.eye(2), v=np.eye(2), sinks=np.ones(1), kv_lengths=np.array(2)),
            json.dumps({"q": [[1, 2]], "k": [[1, 2]], "v": [[3, 4]], "mask": [[1]], "w_o": [[1, 0], [0, 1]]}).encode(),
        ],
    ),
}
PIECES = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"(", b"-1", b"0", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}",
    b"[[],[]]", b'"a"',
    b"9" * 400, b"9" * 5000, b"\xff", b'"\\ud800"', b"'|O'", b"'<U4'", b"'<c16'", b"'>f4'", b"'|b1'",
    b"'|V0'", b"99999999999", b"4294967296", b"True", b"PK",
)  # fmt: skip


@pytest.mark.parametrize("name", VALID_FILES)
def test_a_mutated_file_is_read_or_refused(run: Any, tmp_path: Path, name: str) -> None:
    command, files = VALID_FILES[name]
    rng, path = random.Random(name), tmp_path / "mutated"
    statuses = []
    for data in files:
        path.write_bytes(data)
        assert run(*command, path)[0] == 0
        for _ in range(150):
            path.write_bytes(mutated(rng, data, PIECES, reach=130 if data[:1] == b"\x93" else 10**6))
            status, out, err = run(*command, path)
            if status:
                refused((status, out, err), "mutated: ")
            statuses.append(status)
    assert {0, 2} == set(statuses)


@pytest.mark.parametrize("name", ["q", "w_k", "b_o", "mask", "bias", "sinks", "kv_lengths"])
def test_attend_takes_no_other_json_for_an_array(run: Any, name: str) -> None:
    for value in ({}, {"a": 1}, "text", [{}], [[None]], ["1"], [[1], [2, 3]], 10**400, [[[[1]]], 2], [[10**400]]):
        arrays = {"q": [[1, 0]], "k": [[1, 0]], "v": [[1, 0]], "w_o": [[1, 0], [0, 1]], name: value}
        refused(run("attend", "-", "--num-heads", 1, stdin=json.dumps(arrays).encode()), f"standard input: .*{name}")


def test_a_small_file_does_not_fill_the_memory(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.zeros((1, 4096))
    (tmp_path / "bomb.npz").write_bytes(npz(np.savez_compressed, q=wide, k=wide, v=wide))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 23}.__getitem__)
    refused(run("attend", tmp_path / "bomb.npz", "--num-heads", 1), "bomb.npz: .* of this machine's memory, got 98,688")


def test_names_that_the_system_refuses(run: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in (
        "",
        "nul\0nul",
        "\ud800",
        "\udcff",
        "a" * 5000,
        "folder",
        "none",
        "/proc/self/mem",
        "/dev/zero",
        "esc\x1b[31m",
    ):
        path = str(tmp_path / name) if name in ("folder", "none") else name
        for command in (("sample", path), ("explain", path), ("attend", path, "--num-heads", 1)):
            status, out, err = run(*command)
            assert (status, out) == (2, "")
            shown = "".join(c if c.isprintable() else f"{c!a}"[1:-1] for c in path) or "''"
            assert err.startswith(f"headway: error: {shown}: "), err
            assert err.count("\n") == 1
            assert err[:-1].isprintable()
        output = f"{path or 'none'}/no/out.npy"
        status, _, err = run("attend", "-", "--num-heads", 1, "-o", output, stdin=WHOLE)
        assert (status, err.count("\n")) == (2, 1)
        status, _, err = run("generate", "a", "--model", path)
        assert (status, err.count("\n")) == (2, 1)


# ------------------------------------------------------------------------------------- streams that are not there

STREAMS = {  # a shell command: status, and what is said on standard error
    "headway sample row.json --seed 1 >&-": (2, "standard output: Bad file descriptor"),
    "headway generate a --max-tokens 2 >&-": (2, "standard output: Bad file descriptor"),
    "headway --help >&-": (2, "standard output: Bad file descriptor"),
    "headway --version >&-": (2, "standard output: Bad file descriptor"),
    "headway attend qkv.json --num-heads 2 -o closed.npy >&-": (0, None),
    "headway sample - <&-": (2, "standard input: Bad file descriptor"),
    "headway generate --max-tokens 2 <&-": (2, "standard input: Bad file descriptor"),
    "headway info <&-": (0, None),
    "headway sample row.json --seed 1 >/dev/full": (2, "standard output: No space left on device"),
    "headway sample --help >/dev/full": (2, "standard output: No space left on device"),
    "headway attend qkv.json --num-heads 2 -o full.npy --force": (2, "full.npy: No space left on device"),
    "headway attend qkv.json --num-heads 2 -o full.json --force": (2, "full.json: No space left on device"),
    "headway sample row.json 2>&-": (0, None),
    "headway sample none.json 2>&-": (2, None),
    "headway sample row.json 2>/dev/full": (0, None),
    "headway sample none.json 2>/dev/full": (2, None),
    "headway sample none.json <&- >&- 2>&-": (2, None),
    "headway generate $'\\xff'": (2, r"PROMPT: expected text .* '\\udcff' at 0"),
    "headway explain --prompt $'\\xff'": (2, r"--prompt: expected text .* '\\udcff' at 0"),
    "headway sample $'\\xff'": (2, r"\\udcff: No such file or directory"),
    "PYTHONIOENCODING=ascii headway generate é --max-tokens 1": (2, "its encoding, ascii, .* set PYTHONIOENCODING"),
}


@pytest.mark.parametrize(
    ("line", "unbuffered"),
    [*((line, "") for line in STREAMS), *((line, "1") for line in STREAMS if ">&-" in line or "/dev/full" in line)],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, qkv: Path, line: str, unbuffered: str) -> None:
    (tmp_path / "row.json").write_text("[1, 2]")
    (tmp_path / "full.npy").symlink_to("/dev/full")
    (tmp_path / "full.json").symlink_to("/dev/full")
    status, said = STREAMS[line]
    environment = {**BUFFERED, "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": unbuffered}
    command = line.replace("headway", f"{sys.executable} -m headway", 1)
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    if said is not None:
        assert re.fullmatch(rf"headway: error: [^\n]*{said}[^\n]*\n", done.stderr)
        assert done.stdout == ""
    elif ">&-" not in line and "2>" not in line:
        assert done.stderr == ""
    if "closed.npy" in line:
        assert np.load(tmp_path / "closed.npy").shape == (3, 4)


def test_a_tokenizer_that_panics_is_one_line(endless: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for command in (("generate", "a"), ("explain", "--prompt", "a")):
        _, err = (process := start(*command, "--model", str(tmp_path))).communicate(timeout=60)
        assert process.returncode == 2
        assert re.fullmatch(rf"headway: error: {tmp_path}/tokenizer.json: not a tokenizer: [^\n]+\n", err.decode())


def test_a_model_that_is_a_file(run: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for command in (("generate", "a"), ("explain", "--prompt", "a")):
        refused(run(*command, "--model", tmp_path / "model.gguf"), "model.gguf: is a file; expected a folder with")


def test_a_text_ends_before_a_stop_string(run: Any) -> None:
    given = ("generate", "In the beginning", "--max-tokens", 40, "--seed", 3)
    whole = run(*given)[1]
    words = whole.split()[5:7]
    cut = run(*given, "--stop", words[1], "--stop", words[0])[1]
    assert cut.rstrip("\n") == whole[: len("In the beginning") + whole[len("In the beginning") :].index(words[0])]


BAD_VALUES = {
    "--temperature": "-1", "--top-k": "0", "--top-p": "2", "--min-p": "2", "--typical-p": "2", "--top-n-sigma": "-1",
    "--epsilon-cutoff": "2", "--eta-cutoff": "2", "--xtc-probability": "2", "--xtc-threshold": "2",
    "--dynamic-temperature-range": "-1", "--dynamic-temperature-exponent": "-1", "--min-tokens-to-keep": "0",
    "--seed": "-1", "--position": "-1", "--max-tokens": "-1", "--top": "-1", "--why": "-1", "--num-heads": "0",
    "--num-kv-heads": "0", "--scale": "nan", "--softcap": "-1", "--decimals": "-1", "--window": "-1",
    "--repetition": "0", "--frequency": "nan", "--presence": "nan", "--dry-multiplier": "-1", "--dry-base": "0",
    "--dry-allowed-length": "0", "--dry-breakers": "-1", "--repetition-window": "0", "--frequency-window": "0",
    "--dry-window": "0", "--logprobs": "-1", "--no-repeat-ngram": "0",
    "--min-tokens": "-1", "--stop": "",
}  # fmt: skip


def test_advice_can_be_typed(run: Any, qkv: Path) -> None:
    """Every flag of every command, with a value that the library refuses: named as it is typed, without Python."""
    tried = set()
    for command in (("sample", "-"), ("explain", "-"), ("generate", "a"), ("attend", qkv, "--num-heads", 2)):
        for flag in re.findall(r"^  (--[a-z-]+) [A-Z]", run(command[0], "--help")[1], re.MULTILINE):
            if flag not in BAD_VALUES:
                continue
            values = (BAD_VALUES[flag], "0") if (command[0], flag) == ("attend", "--window") else (BAD_VALUES[flag],)
            result = run(*command, flag, *values, stdin=b"[1, 2]")
            refused(result, f"{flag}: expected")
            assert not re.search(r"None|np\.|[a-z]_[a-z]", result[2]), result[2]
            tried.add(flag)
    assert tried == set(BAD_VALUES)
    refused(run("sample", "-", "--top-k", 0, stdin=b"[1, 2]"), "; leave --top-k out")
    refused(run("sample", "-", stdin=b"[true]"), r"standard input: logits: expected [^;]*")


# ------------------------------------------------------------------------------------------------- the others


def test_info_says_what_is_used(run: Any) -> None:
    status, out, err = run("info")
    assert (status, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["version"] == hw.info().version
    assert lines["isa"] == hw.info().isa
    assert lines["numpy"] == np.__version__
    assert lines["lm"] == "installed"


LOGITS = [2.0, 1.0, -1.0, 0.5, 1.5, 1.0]


def test_explain_a_file(run: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", LOGITS)
    flags = ["--temperature", 0.8, "--top-k", 3, "--top-p", 0.9, "--dialect", "hf", "--top", 2]
    status, out, err = run("explain", tmp_path / "logits.npy", *flags, "--why", 3, "--why", 0)
    found = hw.explain(LOGITS, temperature=0.8, top_k=3, top_p=0.9, dialect="hf", top=2)
    assert (status, err) == (0, "")
    assert out == f"{found}\n\n{found.why(3)}\n{found.why(0)}\n"
    assert run("explain", "-", *flags, stdin=json.dumps(LOGITS).encode()) == (0, f"{found}\n", "")


def test_explain_tells_the_seed_of_a_coin(run: Any, tmp_path: Path) -> None:
    (tmp_path / "logits.json").write_text(json.dumps(LOGITS))
    xtc = ["explain", tmp_path / "logits.json", "--xtc-probability", 0.5]
    _, out, err = run(*xtc)
    assert run(*xtc, *err.removeprefix("headway: ").split()) == (0, out, "")


def test_explain_a_prompt_as_generate_goes_on(run: Any) -> None:
    prompt = "In the beginning God created the heaven and the"
    status, out, err = run("explain", "--prompt", prompt, "--top-p", 0.9)
    assert (status, err) == (0, "")
    model = headway.lm.load()
    ids = model.tokenizer.encode(prompt).ids
    found = hw.explain(model.logits(ids)[-1], top_p=0.9)
    assert re.search(rf"^ +1 +{found.head[0].token} +{found.head[0].probability:.6f}  ' earth'$", out, re.MULTILINE)
    assert run("explain", "--prompt", "-", "--top-p", 0.9, stdin=f"{prompt}\n".encode()) == (0, out, "")
    # xtc's coin is the one that `generate` tosses for the next token
    options = {"xtc_probability": 0.5, "xtc_threshold": 0.001}
    for seed in range(6):
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        token = hw.sample(model.logits(ids)[-1], seed=seed, position=len(ids), **options)
        assert "in, with probability" in run("explain", "--prompt", prompt, "--seed", seed, *flags, "--why", token)[1]


def test_explain_refuses(run: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([LOGITS, LOGITS]))
    (tmp_path / "row.json").write_text(json.dumps(LOGITS))
    refused(run("explain"), "expected FILE or --prompt, one of the two")
    refused(run("explain", tmp_path / "row.json", "--prompt", "a"), "expected FILE or --prompt, one of the two")
    refused(run("explain", tmp_path / "row.json", "--model", tmp_path), "--model: expected none beside FILE")
    refused(run("explain", tmp_path / "rows.json"), "logits: expected one row")
    refused(run("explain", tmp_path / "row.json", "--why", 99), "--why: expected an integer from 0 to")
    refused(run("explain", tmp_path / "none.json"), "none.json: No such file")
    refused(run("explain", "--prompt", "a", "--model", tmp_path / "none"), "none: no such folder")


def test_info_and_help_need_no_extra() -> None:
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['tokenizers'] = None\n"
        "from headway.cli import main\n"
        "assert main(['info']) == 0\n"
        "assert 'headway.lm' not in sys.modules\n"
        "assert main(['generate', 'a']) == 2\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not installed: pip install 'headway[lm]'" in done.stdout
    assert re.fullmatch(r"headway: error: headway.lm reads .*pip install 'headway\[lm\]'\n", done.stderr)


@pytest.mark.parametrize("command", [[], ["generate"], ["sample"], ["explain"], ["attend"], ["info"]])
def test_help_shows_examples_that_run(run: Any, command: list[str]) -> None:
    status, out, err = run(*command, "--help")
    assert (status, err) == (0, "")
    _, examples = out.split("examples:\n")
    assert "  headway " in examples
    assert "default: None" not in out


def test_an_unknown_command_or_option_is_one_line(run: Any) -> None:
    refused(run(), "required: command")
    refused(run("compose"), "invalid choice: 'compose'")
    refused(run("info", "--colour"), "unrecognized arguments: --colour")


def test_every_example_of_the_help_pages_runs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need no shell, in a folder with the files that they name."""
    monkeypatch.chdir(tmp_path)
    np.save("logits.npy", np.zeros(99))
    (tmp_path / "qkv.json").write_text(json.dumps({"q": Q, "k": K, "v": V}))
    wide = np.zeros((3, 8))
    np.savez("qkv.npz", q=wide, k=wide, v=wide)
    write_checkpoint(tmp_path / "path" / "to" / "checkpoint")
    (tmp_path / "person.json").write_text('{"const": 1}')
    import shlex

    tried = 0
    for page in ([], ["generate"], ["sample"], ["explain"], ["attend"], ["info"]):
        for line in run(*page, "--help")[1].split("examples:\n")[1].splitlines():
            words = shlex.split(line)
            stdin = b""
            if words[:1] == ["echo"]:
                stdin = words[1].encode()
                words = words[words.index("|") + 1 :]
            if "--json-schema" in words and importlib.util.find_spec("llguidance") is None:
                continue
            if words[:1] == ["headway"]:
                limit = ["--max-tokens", "5"] if words[1] == "generate" and "--help" not in words else []
                status, out, err = run(*words[1:], *limit, stdin=stdin)
                assert (status, bool(out)) == (0, "-o" not in words), err
                tried += 1
    assert tried >= 15
