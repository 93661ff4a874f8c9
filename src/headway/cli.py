"""The `headway` command: generate, sample, explain, attend, info.

Exit status: 0, 1 where the text of a grammar was cut off, 2 for bad input or what the system refuses (with one line on
standard error), 130 after Ctrl-C, 141 where the reader of the output went away. What an extra brings is imported by the
command that needs it, so `info` works without any.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import reprlib
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from headway._sampling import OPTIONS, Choice, Integers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments behind the name of the command; None are those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: with the status 0 after --help, 2 for arguments that the command does not have.

    >>> from headway.cli import main
    >>> main(["info"])  # doctest: +ELLIPSIS
    version  ...
    0
    """
    _open_closed_streams()
    try:
        arguments = _parser().parse_args(argv)
        status: int | None = arguments.run(arguments)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        _note("")
        return 130
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _complain(error)
        return 2
    return status or 0


# ------------------------------------------------------------------------------------------------- commands


def _generate(arguments: argparse.Namespace) -> int:
    import time

    schema = arguments.json_schema
    if schema == arguments.prompt == "-":
        raise ValueError("--json-schema: expected a file beside a prompt from standard input, got - for both")
    if arguments.prompt == "-" or (arguments.prompt is None and schema != "-" and not sys.stdin.isatty()):
        prompt = _read_prompt()
    else:
        prompt = arguments.prompt or ""
    seed = _seed(arguments)
    with _language_model(arguments) as model:
        start = time.perf_counter()
        options = _given(arguments, (*_SAMPLING_OPTIONS, *_TEXT_OPTIONS, "stop", "count_prompt", "logprobs"))
        grammar = None if schema is None else _grammar(schema, model)
        if grammar is not None:
            options["allowed"] = grammar
        stream = model.stream(prompt, max_tokens=arguments.max_tokens, seed=seed, **options)
        _show("" if grammar is not None else prompt, end="")
        for piece in stream:
            _show(piece, end="")
        seconds = time.perf_counter() - start
        _show("".join(["\n", *_logprob_lines(model, stream)]), end="")
    count, reason = len(stream.token_ids), stream.finish_reason
    speed = f"{count} tokens, {count / seconds:.1f} tokens/s"
    _note(f"headway: {speed}, ended by {reason}, --seed {seed}")
    # A text may be whole although it had no room for its end-of-text token; before a stop string it is not.
    if grammar is not None and (reason == "stop" or not grammar.accepts(stream.token_ids)):
        _note(f"headway: the JSON is cut off before its end{_CUT.get(reason, '')}")
        return 1
    return 0


_CUT = {
    "max_tokens": "; give it more room with --max-tokens",
    "stop": "; leave --stop out",
    "context": ": the model's context is full; give it a shorter prompt",
}


def _grammar(name: str, model: Any) -> Any:
    """Return the grammar of the JSON schema in a file."""
    from headway.integrations.llguidance import json_schema

    try:
        data = _read_bytes(name)
    except ValueError as error:
        raise ValueError(f"json_schema: {error}") from None
    try:
        return json_schema(data.decode(), model)
    except (ValueError, TypeError) as error:
        raise ValueError(f"json_schema: {_label(name)}: {error}") from None


def _logprob_lines(model: Any, stream: Any) -> Iterator[str]:
    """Yield a line of JSON for each token whose log-probabilities were asked for."""
    for i, drawn in enumerate(stream.logprobs):
        context = (*stream.prompt_ids, *stream.token_ids[:i])
        line = {"id": drawn.tokens, "text": _word(model, context, drawn.tokens), "rank": drawn.raw.ranks}
        line |= {"logprob": drawn.raw.logprobs, "processed_logprob": drawn.processed.logprobs}
        if drawn.raw.top_tokens is not None:
            best = zip(drawn.raw.top_tokens.tolist(), drawn.raw.top_logprobs.tolist(), strict=True)
            line["top"] = [{"id": token, "text": _word(model, context, token), "logprob": p} for token, p in best]
        yield json.dumps(line) + "\n"


def _word(model: Any, context: Sequence[int], token: int) -> str:
    """Return the text of a token after the context, or the name of one that has none."""
    from headway.lm.text import detokenize

    return "".join(detokenize(model.tokenizer, context[-8:], [token])) or model.tokenizer.id_to_token(token) or ""


def _sample(arguments: argparse.Namespace) -> None:
    import numpy as np

    import headway as hw

    logits = _read_logits(arguments.file)
    seed = _seed(arguments)
    with _as_typed(arguments, _label(arguments.file)):
        tokens = hw.sample(logits, seed=seed, position=arguments.position, **_given(arguments, _SAMPLING_OPTIONS))
    _show("".join(f"{token}\n" for token in np.ravel(tokens)), end="")
    if arguments.seed is None:
        _note(f"headway: --seed {seed}")


def _explain(arguments: argparse.Namespace) -> None:
    if (arguments.file is None) == (arguments.prompt is None):
        raise ValueError("expected FILE or --prompt, one of the two")
    seed, options = _seed(arguments), _given(arguments, _SAMPLING_OPTIONS)
    if arguments.file is not None:
        if arguments.model is not None:
            raise ValueError("--model: expected none beside FILE; give it --prompt")
        logits = _read_logits(arguments.file)
        with _as_typed(arguments, _label(arguments.file)):
            text = _explained(arguments, logits, 0, None, seed=seed, **options)
    else:
        prompt = _read_prompt() if arguments.prompt == "-" else arguments.prompt
        with _language_model(arguments) as model:
            text = _explained(arguments, *_next_token(model, prompt), seed=seed, **options)
    _show(text)
    if arguments.seed is None and options.get("xtc_probability") is not None:
        _note(f"headway: --seed {seed}")


def _explained(arguments: argparse.Namespace, logits: Any, position: int, words: Any, **options: Any) -> str:
    import headway as hw

    if arguments.position is not None:
        position = arguments.position
    found = hw.explain(logits, top=arguments.top, tokens=words, position=position, **options)
    sentences = [str(found.why(token)) for token in arguments.why]
    return "\n".join([str(found), *([""] if sentences else []), *sentences])


def _next_token(model: Any, prompt: str) -> tuple[Any, int, Callable[[int], str]]:
    """Score what follows the prompt: logits, the position that `generate` draws at, and the words of tokens there."""
    ids = model.stream(prompt, max_tokens=0).prompt_ids
    return model.session().next_logits(ids), len(ids), lambda token: _word(model, ids, token)


@contextlib.contextmanager
def _language_model(arguments: argparse.Namespace) -> Iterator[Any]:
    """Load the model, and say what is refused meanwhile in the words of the command line."""
    import headway.lm

    if arguments.model == "":
        raise ValueError("--model: expected a folder, got an empty name")
    with _without_panics(), _as_typed(arguments, arguments.model or "the model that ships"):
        yield headway.lm.load(arguments.model)


def _attend(arguments: argparse.Namespace) -> None:
    import numpy as np

    import headway as hw

    output, label = arguments.output, _label(arguments.file)
    if output is not None:
        _check_output(output, arguments.file, arguments.force)
    arrays = _read(arguments.file)
    if not isinstance(arrays, dict):
        raise ValueError(f"{label}: expected an object or .npz with arrays q, k and v, got one array")
    for name in _INPUTS:
        if name not in arrays:
            raise ValueError(f"{label}: expected arrays q, k and v, got no {name}")
    for name in arrays:
        if name not in _INPUTS + _OPTIONAL_INPUTS:
            known = ", ".join(_INPUTS + _OPTIONAL_INPUTS)
            raise ValueError(f"{label}: array {reprlib.repr(name)}: expected one of {known}")
        arrays[name] = _numbers(f"{label}: {name}", arrays[name])
    options = {name: getattr(arguments, name) for name in _ATTENTION_OPTIONS}
    q, k, v = (arrays.pop(name) for name in _INPUTS)
    with _as_typed(arguments, label):
        out = np.asarray(hw.multi_head_attention(q, k, v, **arrays, **options))
    if output is None:
        _show(_to_json(out))
        return
    with _named(str(output)), output.open("wb" if arguments.force else "xb") as file:
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
    _show("\n".join(f"{name:<14}{value}" for name, value in lines.items()))


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
_SAMPLING_OPTIONS = tuple(option.name for option in OPTIONS if option.flag)
_TEXT_OPTIONS: dict[str, tuple[type, str, str]] = {  # of what type each is, its help, and what it is unless given
    "repetition": (float, "divide positive logits of tokens that occurred by this, multiply others", "1, off"),
    "frequency": (float, "subtract this from the logit of a token for each time it was drawn", "0, off"),
    "presence": (float, "subtract this from the logit of a token that was drawn", "0, off"),
    "dry_multiplier": (float, "subtract this from the logit of a token that prolongs a repetition", "0, off"),
    "dry_base": (float, "the factor of the DRY penalty for each further token of the repetition", "1.75"),
    "dry_allowed_length": (int, "the shortest repetition that is penalized, in tokens", "2"),
    "dry_breakers": (int, "the id of a token that no repetition goes across; repeatable", "none"),
    "window": (int, "the number of tokens, counted from the last, that the penalties look at", "all"),
    "repetition_window": (int, "the window of the repetition penalty", "the window"),
    "frequency_window": (int, "the window of frequency and presence", "the window"),
    "dry_window": (int, "the window of DRY", "the window"),
    "no_repeat_ngram": (int, "let no N tokens come twice", "off"),
    "min_tokens": (int, "let the text not end before N tokens", "0"),
}


def _label(name: str) -> str:
    return "standard input" if name == "-" else name


def _read(name: str) -> Any:
    """Read an array, or an object of arrays, from .npy, .npz or JSON; the first bytes say which it is."""
    import io
    import warnings

    import numpy as np

    from headway import _check

    data = _read_bytes(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's, about files of Python 2
            if data.startswith(b"\x93NUMPY"):
                return _bounded(np.load(io.BytesIO(data), allow_pickle=False))
            if data.startswith(b"PK"):
                with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                    return _unpack(arrays)
        return _check.json_loads(data)
    except Exception as error:  # of a dozen kinds, which the readers' authors did not expect either
        said = str(error).partition("; use ")[0][:300] or type(error).__name__  # without what only code can do
        raise ValueError(f"{_label(name)}: expected .npy, .npz or JSON: {said}") from None


def _read_bytes(name: str) -> bytes:
    """Read a file, or standard input, to its end."""
    with _named(_label(name)):
        if name == "-":
            return sys.stdin.buffer.read()
        with open(name, "rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
                raise ValueError("expected a file, got a device, which may have no end")
            return file.read()


def _unpack(arrays: Any) -> dict[str, Any]:
    """Read all arrays of an .npz: each name once, and no more than this machine has memory for."""
    import numpy as np

    if len(set(arrays.files)) < len(arrays.files):
        raise ValueError("expected each array once, got one twice")
    size = sum(member.file_size for member in arrays.zip.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:  # a few kilobytes can hold them
        raise ValueError(f"expected at most the {memory:,} bytes of this machine's memory, got {size:,}")
    return {name: _bounded(np.asarray(arrays[name])) for name in arrays.files}


def _bounded(array: Any) -> Any:
    """Refuse a shape that takes no memory, and for ever to go through."""
    if array.size == 0 and max(array.shape) > 2**24:
        raise ValueError(f"expected an array with elements, got shape {array.shape}")
    return array


def _numbers(name: str, value: Any) -> Any:
    """Make an array of what JSON has for one; null stays what it is, none."""
    import numpy as np

    try:
        array = None if value is None else np.asarray(value)
    except ValueError:
        array = np.empty(0, object)  # lists of unequal lengths
    if array is not None and array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected numbers in nested lists of equal lengths, got {reprlib.repr(value)}")
    return array


def _read_logits(name: str) -> Any:
    logits = _read(name)
    if isinstance(logits, dict):
        keys = reprlib.repr(sorted(logits))
        raise ValueError(f"{_label(name)}: expected one array of logits, got an object of {keys}")
    return logits


def _read_prompt() -> str:
    """Read a prompt from standard input; the newline that ends it is the shell's, not the text's."""
    with _named("standard input"):
        data = sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None


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


def _seed(arguments: argparse.Namespace) -> int:
    """Take the seed that was given, or a fresh one, short enough to type again."""
    import secrets

    return secrets.randbits(32) if arguments.seed is None else int(arguments.seed)


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the options that were typed: what the others are, the library says."""
    typed = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in typed.items() if value is not None}


# ------------------------------------------------------------------------- the three streams, and what goes wrong


def _open_closed_streams() -> None:
    """Open the standard streams that came closed, so that no file gets their numbers, and none of them is None.

    Input and output are opened the wrong way round: to use them is refused as for a closed one. What would be said
    on standard error is lost.
    """
    streams = ("stdin", os.O_WRONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w")
    for name, flag, mode in streams:
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, flag), mode, errors="backslashreplace"))


def _show(text: str, end: str = "\n") -> None:
    """Print to standard output at once: at the end of the process nobody could say what went wrong."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError as error:
        said = f"its encoding, {error.encoding}, has no {error.object[error.start]!a}; set PYTHONIOENCODING=utf-8"
        raise OSError(errno.EILSEQ, said, "standard output") from None
    except OSError as error:
        _abandon(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from None


def _note(text: str) -> None:
    """Print to standard error what may be lost without harm."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: IO[str]) -> None:
    """Let what is still in a buffer go nowhere, so that the interpreter's last flush succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(error: Exception) -> None:
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        message = f"{error.filename or repr('')}: {error.strerror}"
    elif isinstance(error, MemoryError):
        message = f"out of memory: {message}"
    # Names and values of files may hold anything: half characters, and what a terminal would obey.
    line = "".join(c if c.isprintable() else f"{c!a}"[1:-1] for c in " ".join(message.split()))
    _note(f"headway: error: {line}")


@contextlib.contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the name of a file or stream to what the system refuses about it, and to a name that cannot be one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), label) from None
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None


@contextlib.contextmanager
def _as_typed(arguments: argparse.Namespace, source: str) -> Iterator[None]:
    """Say what the library refuses in the words of the command line: flags, and the file that an array is from."""
    flags = {name: _flag(name) for name in vars(arguments)} | {"token": "--why"}
    if arguments.run is _generate:
        flags["prompt"] = "PROMPT"

    def typed(message: str) -> str:
        name, colon, rest = message.partition(":")
        flag = flags.get(name)
        # Nobody can type code, nor None: what it does is done by leaving the flag out.
        said, *cures = rest.replace(" or None", "").split("; ")
        cures = [f"leave {flag} out" if flag and "None" in cure else cure for cure in cures]
        rest = "; ".join([said, *(cure for cure in cures if not re.search(r"\bnp\.|\w[\[(]", cure))])
        rest = re.sub(r"\b([a-z_]+)='(\S+)'", lambda found: f"{flags.get(found[1], found[1])} {found[2]}", rest)
        rest = re.sub(r"\b[a-z]+(_[a-z]+)+\b", lambda found: flags.get(found[0], found[0]), rest)
        if flag:
            return f"{flag}:{rest}"
        return f"{name}{colon}{rest}" if name.startswith(str(Path(source))) else f"{source}: {name}{colon}{rest}"

    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(typed(str(error))) from None
    except MemoryError as error:
        raise MemoryError(typed(str(error))) from None


@contextlib.contextmanager
def _without_panics() -> Iterator[None]:
    """Keep standard error from tokenizers: where its Rust panics it prints a trace there, before we hear of it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


# -------------------------------------------------------------------------------------------------- options


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: Any = None) -> None:
        """Print as everything else is printed: argparse's own ignores a full disk."""
        _show(self.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        """End as every other bad input does: one line, status 2."""
        _complain(ValueError(f"{message} (see {self.prog} --help)"))
        self.exit(2)


class _Version(argparse.Action):
    """As argparse's own, but looking the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import headway

        _show(f"headway {headway.__version__}")
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

    def command(run: Callable[[argparse.Namespace], int | None], summary: str, text: str) -> argparse.ArgumentParser:
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
        help="the text to continue; - for standard input, also read without a PROMPT where it is no terminal",
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
    _add_sampling(generate, temperature=0.8, top_p=0.95)
    for name, (kind, text, default) in _TEXT_OPTIONS.items():
        generate.add_argument(
            _flag(name),
            type=kind,
            action="append" if name == "dry_breakers" else "store",
            metavar="ID" if name == "dry_breakers" else "N" if kind is int else "X",
            help=f"{text} (default: {default})",
        )
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the text before this one; repeatable (default: none)"
    )
    generate.add_argument(
        "--json-schema",
        metavar="FILE",
        help="write JSON that this JSON schema allows, and nothing else; - for standard input; needs llguidance",
    )
    generate.add_argument(
        "--count-prompt", action="store_true", help="let frequency and presence count the prompt too (default: off)"
    )
    generate.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="after the text, a line of JSON for each token: its log-probabilities, and the N best (default: off)",
    )

    sample = command(_sample, "draw a token id from logits", _SAMPLE)
    sample.add_argument("file", metavar="FILE", help=".npy or JSON (-Infinity bans a token); - for standard input")
    _add_sampling(sample)
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
    _add_sampling(explain)
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


def _add_sampling(parser: argparse.ArgumentParser, **defaults: float) -> None:
    """Add the options of sampling. Defaults that the command has instead of those of `sample` are for help alone."""
    for option in OPTIONS:
        if not option.flag:
            continue
        default = defaults.get(option.name, option.default)
        if isinstance(option.check, Choice):
            kind: dict[str, Any] = {"choices": [word for word in option.check.choices if word is not None]}
            shown = "headway's own" if default is None else default
        else:
            kind = {"type": int if isinstance(option.check, Integers) else float, "metavar": option.metavar}
            shown = "off" if default is None else f"{default:g}"
        parser.add_argument(_flag(option.name), help=f"{option.flag} (default: {shown})", **kind)
    parser.add_argument("--seed", type=int, metavar="N", help="makes the result repeatable (default: a fresh one)")


def _flag(name: str) -> str:
    """Return how the command spells an option."""
    return f"--{name.replace('_', '-')}"


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
  headway generate "And God said" --max-tokens 5 --logprobs 3
  headway generate "And the king was " --json-schema person.json --seed 1

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
