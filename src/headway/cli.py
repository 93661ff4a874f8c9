"""The `headway` command: generate, sample, explain, attend, info.

Exit status: 0, 2 for bad input (with one line on standard error), 130 after Ctrl-C, 141 where the reader of
the output went away. Nothing is imported before the command that needs it runs, so help is quick and `info`
works without the `lm` extra.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (None: the arguments of the process), and return its exit status."""
    try:
        try:
            arguments = _parser().parse_args(argv)
            arguments.run(arguments)
        finally:
            sys.stdout.flush()  # here, where a reader that went away is not yet an error at shutdown
    except BrokenPipeError:
        # Whatever is still in the buffer goes nowhere, so that the interpreter's last flush succeeds.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _complain(error)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------- commands


def _generate(arguments: argparse.Namespace) -> None:
    import time

    import headway.lm

    if arguments.prompt == "-" or (arguments.prompt is None and not sys.stdin.isatty()):
        prompt = _decode_prompt(sys.stdin.buffer.read())
    else:
        prompt = arguments.prompt or ""
    seed = _seed(arguments)
    model = headway.lm.load(arguments.model)
    start = time.perf_counter()
    stream = model.stream(prompt, max_tokens=arguments.max_tokens, seed=seed, **_sampling(arguments))
    print(prompt, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    seconds = time.perf_counter() - start
    print(flush=True)
    count, reason = len(stream.token_ids), stream.finish_reason
    speed = f"{count} tokens, {count / seconds:.1f} tokens/s"
    print(f"headway: {speed}, ended by {reason}, --seed {seed}", file=sys.stderr)


def _sample(arguments: argparse.Namespace) -> None:
    import numpy as np

    import headway as hw

    logits = _read(arguments.file)
    if isinstance(logits, dict):
        raise ValueError(f"{arguments.file}: expected one array of logits, got an object of {sorted(logits)}")
    seed = _seed(arguments)
    tokens = hw.sample(logits, seed=seed, position=arguments.position, **_sampling(arguments))
    for token in np.ravel(tokens):
        print(token)
    if arguments.seed is None:
        print(f"headway: --seed {seed}", file=sys.stderr)


def _explain(arguments: argparse.Namespace) -> None:
    import headway as hw

    if (arguments.file is None) == (arguments.prompt is None):
        raise ValueError("expected FILE or --prompt, one of the two")
    if arguments.file is None:
        logits, position, words = _next_token(arguments)
    else:
        if arguments.model is not None:
            raise ValueError("--model: expected none beside FILE; give it --prompt")
        logits, position, words = _read(arguments.file), 0, None
        if isinstance(logits, dict):
            raise ValueError(f"{arguments.file}: expected one array of logits, got an object of {sorted(logits)}")
    if arguments.position is not None:
        position = arguments.position
    seed = _seed(arguments)
    options = _sampling(arguments)
    found = hw.explain(logits, top=arguments.top, tokens=words, seed=seed, position=position, **options)
    sentences = [str(found.why(token)) for token in arguments.why]
    print("\n".join([str(found), *([""] if sentences else []), *sentences]))
    if arguments.seed is None and options.get("xtc_probability") is not None:
        print(f"headway: --seed {seed}", file=sys.stderr)


def _next_token(arguments: argparse.Namespace) -> tuple[Any, int, Callable[[int], str]]:
    """Score what follows the prompt: logits, the position that `generate` draws at, and the words of tokens there."""
    import headway.lm
    from headway.lm.text import detokenize

    prompt = _decode_prompt(sys.stdin.buffer.read()) if arguments.prompt == "-" else arguments.prompt
    model = headway.lm.load(arguments.model)
    ids = model.stream(prompt, max_tokens=0).prompt_ids

    def word(token: int) -> str:
        """Its text after the prompt, or the name of one that has none."""
        return "".join(detokenize(model.tokenizer, ids[-8:], [token])) or model.tokenizer.id_to_token(token) or ""

    return model.session().next_logits(ids), len(ids), word


def _attend(arguments: argparse.Namespace) -> None:
    import numpy as np

    import headway as hw

    output = arguments.output
    if output is not None:
        _check_output(output, arguments.file, arguments.force)
    arrays = _read(arguments.file)
    if not isinstance(arrays, dict):
        raise ValueError(f"{arguments.file}: expected an object or .npz with arrays q, k and v, got one array")
    for name in _INPUTS:
        if name not in arrays:
            raise ValueError(f"{arguments.file}: expected arrays q, k and v, got no {name}")
    for name in arrays:
        if name not in _INPUTS + _OPTIONAL_INPUTS:
            known = ", ".join(_INPUTS + _OPTIONAL_INPUTS)
            raise ValueError(f"{arguments.file}: array {name!r}: expected one of {known}")
    options = {name: getattr(arguments, name) for name in _ATTENTION_OPTIONS}
    q, k, v = (arrays.pop(name) for name in _INPUTS)
    out = np.asarray(hw.multi_head_attention(q, k, v, **arrays, **options))
    if output is None:
        print(_to_json(out))
        return
    with output.open("wb" if arguments.force else "xb") as file:
        if output.suffix == ".npy":
            np.save(file, out)
        elif output.suffix == ".npz":
            np.savez(file, out=out)
        else:
            file.write(_to_json(out).encode() + b"\n")


def _info(arguments: argparse.Namespace) -> None:
    import dataclasses
    import importlib.util
    import platform

    import numpy as np

    import headway as hw

    lines = dataclasses.asdict(hw.info())
    lines["isas"] = " ".join(lines["isas"])
    lines["numpy"] = np.__version__
    lines["python"] = f"{platform.python_version()} ({platform.machine()})"
    extra = all(importlib.util.find_spec(name) for name in ("safetensors", "tokenizers"))
    lines["lm"] = "installed" if extra else "not installed: pip install 'headway[lm]'"
    for name, value in lines.items():
        print(f"{name:<14}{value}")


# --------------------------------------------------------------------------------------- reading and writing

_INPUTS = ("q", "k", "v")
_OPTIONAL_INPUTS = (
    "w_q",
    "w_k",
    "w_v",
    "w_o",
    "b_q",
    "b_k",
    "b_v",
    "b_o",
    "mask",
    "bias",
    "sinks",
    "kv_lengths",
)
_ATTENTION_OPTIONS = ("num_heads", "num_kv_heads", "causal", "window", "scale", "softcap", "decimals")
_SAMPLING_NUMBERS = {  # and what they are: the help of each
    "dynamic_temperature_range": "let the temperature go so far up and down with the entropy",
    "dynamic_temperature_exponent": "how it depends on the entropy as a share of the largest",
    "top_n_sigma": "keep logits up to N standard deviations below the best",
    "typical_p": "keep the tokens whose surprise is nearest to the entropy, up to the mass P",
    "epsilon_cutoff": "keep tokens of at least this probability",
    "eta_cutoff": "the same, with a bound that falls with the entropy",
    "xtc_probability": "with this probability remove all but the last of the tokens above the threshold",
    "xtc_threshold": "the probability from which xtc counts a token",
    "min_tokens_to_keep": "leave at least N tokens",
}
_SAMPLING_DEFAULTS = {"dynamic_temperature_exponent": "1", "xtc_threshold": "0.1", "min_tokens_to_keep": "1"}
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "ties", "nucleus", "dialect", *_SAMPLING_NUMBERS)


def _read(name: str) -> Any:
    """Read an array, or an object of arrays, from .npy, .npz or JSON; the first bytes say which it is."""
    import io
    import zipfile
    import zlib

    import numpy as np

    data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        if data.startswith(b"\x93NUMPY"):
            return np.load(io.BytesIO(data), allow_pickle=False)
        if data.startswith(b"PK"):
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return dict(arrays)
        return json.loads(data)
    except (ValueError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        label = "standard input" if name == "-" else name
        raise ValueError(f"{label}: expected .npy, .npz or JSON: {error}") from None


def _check_output(output: Path, source: str, force: bool) -> None:
    """Refuse, before any work is done, what must not or cannot be written."""
    if output.suffix not in (".json", ".npy", ".npz"):
        raise ValueError(f"{output}: expected a name that ends in .json, .npy or .npz")
    if output.exists() and source != "-" and Path(source).exists() and output.samefile(source):
        raise ValueError(f"{output}: is the input; write to another file")
    if output.exists() and not force:
        raise ValueError(f"{output}: exists; --force overwrites it")


def _to_json(array: NDArray[np.floating[Any]]) -> str:
    """Write JSON, a row of the last axis to a line, each number the shortest that reads back as the same."""
    if array.ndim > 1:
        return "[" + ",\n".join(_to_json(row) for row in array) + "]"
    # By way of text, since the shortest float64 that equals a float32 0.1 is 0.10000000149011612.
    return json.dumps(array.astype(str).astype(float).tolist())


def _decode_prompt(data: bytes) -> str:
    """Decode a prompt from standard input; the newline that ends it is the shell's, not the text's."""
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None


def _seed(arguments: argparse.Namespace) -> int:
    """Take the seed that was given, or a fresh one, short enough to type again."""
    import secrets

    return secrets.randbits(32) if arguments.seed is None else int(arguments.seed)


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in _SAMPLING_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}


def _complain(error: Exception) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        message = f"{error.filename}: {error.strerror}"
    elif isinstance(error, MemoryError):
        message = f"out of memory: {message}"
    print(f"headway: error: {' '.join(message.split())}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End as every other bad input does: one line, status 2."""
        self.exit(2, f"headway: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """As argparse's own, but looking the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import headway

        print(f"headway {headway.__version__}")
        parser.exit()


def _parser() -> _Parser:
    parser = _Parser(
        prog="headway",
        description="Attention and next-token sampling for LLM inference: the same bits on every machine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="command", required=True)

    def command(run: Callable[[argparse.Namespace], None], summary: str, text: str) -> argparse.ArgumentParser:
        description, epilog = text.split("\n\n", 1)
        added = commands.add_parser(
            run.__name__[1:],
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    generate = command(_generate, "continue a prompt with a language model", _GENERATE)
    generate.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="- for standard input, which is also read where it is no terminal",
    )
    generate.add_argument(
        "--model",
        metavar="DIR",
        help="a Hugging Face Llama checkpoint folder (default: the model that ships)",
    )
    generate.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="draw at most N tokens (default: %(default)s)",
    )
    _add_sampling(generate, temperature=0.8, top_p=0.9)

    sample = command(_sample, "draw a token id from logits", _SAMPLE)
    sample.add_argument("file", metavar="FILE", help=".npy or JSON (-Infinity bans a token); - for standard input")
    _add_sampling(sample, temperature=1.0, top_p=1.0)
    sample.add_argument(
        "--position",
        type=int,
        default=0,
        metavar="N",
        help="place in the seed's stream (default: %(default)s)",
    )

    explain = command(_explain, "say why a token can be drawn, or cannot", _EXPLAIN)
    explain.add_argument(
        "file", nargs="?", metavar="FILE", help=".npy or JSON, one row of logits; - for standard input"
    )
    explain.add_argument("--prompt", metavar="TEXT", help="explain what follows this text; - for standard input")
    explain.add_argument(
        "--model",
        metavar="DIR",
        help="a Hugging Face Llama checkpoint folder, for --prompt (default: the model that ships)",
    )
    explain.add_argument(
        "--why", type=int, action="append", default=[], metavar="ID", help="say why this token is in or out; repeatable"
    )
    explain.add_argument(
        "--top", type=int, default=10, metavar="N", help="show the N best tokens (default: %(default)s)"
    )
    _add_sampling(explain, temperature=1.0, top_p=1.0)
    explain.add_argument(
        "--position",
        type=int,
        metavar="N",
        help="place in the seed's stream, for xtc's coin (default: where `sample` and `generate` would draw)",
    )

    attend = command(_attend, "multi-head attention on arrays from a file", _ATTEND)
    attend.add_argument("file", metavar="FILE", help=".npz, or JSON with an object of arrays; - for standard input")
    attend.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help=".json, .npy or .npz (default: JSON to standard output)",
    )
    attend.add_argument("--force", action="store_true", help="overwrite OUT (default: refuse)")
    attend.add_argument("--num-heads", type=int, required=True, metavar="H", help="query heads")
    attend.add_argument(
        "--num-kv-heads",
        type=int,
        metavar="G",
        help="key/value heads, a divisor of H (default: as many as H)",
    )
    attend.add_argument(
        "--causal", choices=["top_left", "bottom_right"], help="let no query see later keys (default: off)"
    )
    attend.add_argument(
        "--window",
        nargs=2,
        type=_window_side,
        metavar=("LEFT", "RIGHT"),
        help="let a query see so many keys to either side; `none` is no limit (default: off)",
    )
    attend.add_argument(
        "--scale", type=float, metavar="X", help="factor of the scores (default: 1/sqrt of the head size)"
    )
    attend.add_argument("--softcap", type=float, metavar="X", help="bound the scores by tanh (default: off)")
    attend.add_argument("--decimals", type=int, metavar="N", help="round the result (default: off)")

    command(_info, "say what this installation is and uses", _INFO)
    return parser


def _add_sampling(parser: argparse.ArgumentParser, *, temperature: float, top_p: float) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 always takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens (default: off)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help="keep the likeliest tokens that reach the mass P; 1 is off (default: %(default)s)",
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="keep tokens of P times the highest mass (default: off)"
    )
    for name, text in _SAMPLING_NUMBERS.items():
        whole = name == "min_tokens_to_keep"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int if whole else float,
            metavar="N" if whole or name == "top_n_sigma" else "X",
            help=f"{text} (default: {_SAMPLING_DEFAULTS.get(name, 'off')})",
        )
    parser.add_argument(
        "--dialect",
        choices=["hf", "vllm", "llama.cpp", "flashinfer", "sglang", "mlx"],
        help="follow this library's order, ties and boundaries (default: headway's own)",
    )
    parser.add_argument(
        "--ties",
        choices=["lowest_id", "keep"],
        default="lowest_id",
        help="at the K-th token keep exactly K, or all its ties (default: %(default)s)",
    )
    parser.add_argument(
        "--nucleus",
        choices=["after_top_k", "joint"],
        default="after_top_k",
        help="measure P over what top-k left, or over all (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes the result repeatable (default: a fresh one)")


def _window_side(text: str) -> int | None:
    return None if text == "none" else int(text)


_EXAMPLES = """\
examples:
  headway generate "In the beginning" --seed 7
  headway sample logits.npy --temperature 0.8 --top-k 50 --seed 1
  headway explain --prompt "In the beginning" --top-k 50 --top-p 0.9
  headway attend qkv.json --num-heads 2 --decimals 6
  headway generate --help
"""

_GENERATE = """\
Continue a prompt with a language model. The text streams to standard output, the prompt first; speed and
seed follow on standard error. The text ends at --max-tokens, at the model's end-of-text token, or where the
model's context is full.

examples:
  headway generate "And it came to pass" --seed 7
  headway generate "In the beginning" --temperature 0 --max-tokens 40
  echo "Blessed is the man" | headway generate - --top-k 40 --top-p 1
  headway generate "Once upon a time" --model path/to/checkpoint

The same seed gives the same text, on every machine.
"""

_SAMPLE = """\
Draw a token id from logits, or one from each row of logits, a line each.

examples:
  headway sample logits.npy --temperature 0.8 --top-k 50 --top-p 0.9 --seed 1
  echo "[2.0, 1.0, -Infinity, 0.5]" | headway sample - --seed 1
  headway sample logits.npy --dialect llama.cpp --top-k 40 --xtc-probability 0.5 --seed 1
"""

_EXPLAIN = """\
Show the sampler's stages for one row of logits, from a file or from a language model after a prompt: how many
tokens and how much mass each stage left, the tokens on both sides of its boundary, and the final probabilities.

examples:
  headway explain logits.npy --temperature 0.8 --top-k 50 --top-p 0.9
  echo "[2.0, 1.0, -Infinity, 0.5]" | headway explain - --top-k 2 --why 2 --why 3
  headway explain --prompt "In the beginning" --min-p 0.05 --dialect llama.cpp
"""

_ATTEND = """\
Multi-head attention on arrays from a file: q (..., L, M), k and v (..., S, M), and where the file has them
w_q, w_k, w_v, w_o (in, out), b_q, b_k, b_v, b_o, mask (true or 1: may attend), bias, sinks, kv_lengths.
Without weights q, k and v count as already projected.

examples:
  headway attend qkv.json --num-heads 2 --decimals 6
  headway attend qkv.npz --num-heads 8 --causal top_left -o out.npy
  echo '{"q": [[1, 0]], "k": [[1, 0], [0, 1]], "v": [[1, 2], [3, 4]]}' | headway attend - --num-heads 1
"""

_INFO = """\
Say what this installation is and uses: version, instruction set, threads.

examples:
  headway info
  HEADWAY_ISA=portable HEADWAY_NUM_THREADS=1 headway info
"""
