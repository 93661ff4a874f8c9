"""Write docs/conformance.md: which cases of vectors/ the libraries that are installed here pass.

Run ``make conformance``. Each library runs its own code, from the numbers that its user gives to the distribution that
it draws from; an adapter below only hands the numbers over. What cannot be imported is "not installed", and nothing is
guessed about it.

transformers and mlx-lm come with ``make test``; ``make conformance`` adds llama-cpp-python and SGLang's wheel. vLLM is
taken where it can be imported: ``pip install --no-deps vllm`` and what its sampler imports is enough.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, Optional

import numpy as np

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "conformance.md"
sys.path.insert(0, str(ROOT / "vectors"))
check: Any = importlib.import_module("check")

Parameters = dict[str, Any]
Sampler = Callable[[list[float], Parameters], Iterable[int]]


def drawable(probabilities: Iterable[float]) -> list[int]:
    """The ids that a library can draw: those above 0, and NaN, which no library of these excludes from its draw."""
    return [token for token, p in enumerate(probabilities) if not p <= 0]


def only(parameters: Parameters, *names: str) -> None:
    """Say that a library has these options and no others."""
    if not parameters.keys() <= {*names}:
        raise NotImplementedError


def refusing(sampler: Sampler) -> Sampler:
    """Any error that a library raises is its way to refuse."""

    def call(logits: list[float], parameters: Parameters) -> Iterable[int]:
        try:
            return sampler(logits, parameters)
        except (NotImplementedError, Aborted):
            raise
        except Exception as error:
            raise ValueError(error) from error

    return call


class Aborted(Exception):
    """The process ends: no refusal that a caller could handle."""


# The libraries --------------------------------------------------------------------------------------------------------


def headway() -> Sampler:
    """Headway itself."""
    import headway as hw

    return lambda logits, parameters: drawable(hw.probabilities(logits, seed=0, **parameters))


def transformers() -> Sampler:
    """The processors that generate() makes of a GenerationConfig, softmax, and torch.multinomial."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import GenerationMixin, LogitsProcessorList

    def sampler(logits: list[float], parameters: Parameters) -> list[int]:
        given = dict(parameters)
        allowed = given.pop("allowed", None)
        if "logit_bias" in given:
            given["sequence_bias"] = {(token,): bias for token, bias in enumerate(given.pop("logit_bias"))}
        names = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "sequence_bias")
        only(given, *names)
        config = GenerationConfig(do_sample=True, num_beams=1, num_return_sequences=1, **{"top_k": 0, **given})
        chain = GenerationMixin()._get_logits_processor(
            config,
            input_ids_seq_length=1,
            prefix_allowed_tokens_fn=None if allowed is None else lambda batch, ids: allowed,
            logits_processor=LogitsProcessorList(),
            device="cpu",
        )
        scores = chain(torch.zeros((1, 1), dtype=torch.long), torch.tensor([logits]))
        probabilities = torch.softmax(scores, dim=-1)
        torch.multinomial(probabilities, 1)  # refuses NaN
        return drawable(probabilities[0].tolist())

    return sampler


def vllm() -> Sampler:
    """SamplingParams, the logits processors and v1.sample.sampler.Sampler."""
    import torch
    from vllm import SamplingParams
    from vllm.utils import torch_utils
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinPLogitsProcessor
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler as Layer

    torch_utils.PIN_MEMORY = False  # there is no accelerator to pin it for
    layer, cpu = Layer("processed_logits"), torch.device("cpu")
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))

    def sampler(logits: list[float], parameters: Parameters) -> list[int]:
        given = dict(parameters)
        if "logit_bias" in given:
            given["logit_bias"] = dict(enumerate(given["logit_bias"]))
        only(given, "temperature", "top_k", "top_p", "min_p", "logit_bias")
        params = SamplingParams(**given)
        processors = [MinPLogitsProcessor(config, cpu, False), LogitBiasLogitsProcessor(config, cpu, False)]
        for processor in processors:
            processor.update_state(BatchUpdate(1, removed=[], added=[(0, params, None, [])], moved=[]))
        greedy, V = params.temperature < 1e-5, len(logits)
        one = torch.ones(1)
        metadata = SamplingMetadata(
            temperature=one * params.temperature,
            all_greedy=greedy,
            all_random=not greedy,
            top_p=one * params.top_p if params.top_p < 1 else None,
            top_k=torch.tensor([params.top_k]) if 0 < params.top_k < V else None,  # as its input batch does
            generators={},
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=one,
            presence_penalties=one,
            repetition_penalties=one,
            output_token_ids=[[]],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(processors),
        )
        row = layer.apply_logits_processors(torch.tensor([logits]), metadata, False)
        token, left = layer.sample(row, metadata)
        return token.tolist() if left is None else drawable(torch.softmax(left, dim=-1)[0].tolist())

    return sampler


def sglang() -> Sampler:
    """SamplingParams, softmax, and top_k_top_p_min_p_sampling_from_probs_torch.

    Its packages import a GPU's runtime when they are imported whole, so the module of the parameters is imported
    without them, and the function, which needs torch alone, is taken out of the installed file.
    """
    import torch

    spec = importlib.util.find_spec("sglang")
    if spec is None or spec.origin is None:
        raise ImportError("sglang")
    folder = Path(spec.origin).parent
    for name in ("sglang", "sglang.srt", "sglang.srt.sampling"):
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    params_of = importlib.import_module("sglang.srt.sampling.sampling_params").SamplingParams
    tree = ast.parse((folder / "srt/layers/sampler.py").read_text())
    name = "top_k_top_p_min_p_sampling_from_probs_torch"
    space: dict[str, Any] = {"torch": torch, "Optional": Optional}
    exec(ast.unparse(next(node for node in tree.body if getattr(node, "name", None) == name)), space)

    def sampler(logits: list[float], parameters: Parameters) -> list[int]:
        only(parameters, "temperature", "top_k", "top_p", "min_p")
        params = params_of(**parameters)
        params.verify(1 << 20)
        probabilities = torch.softmax(torch.tensor([logits]) / params.temperature, dim=-1)
        options = [torch.tensor([value]) for value in (params.top_k, params.top_p, params.min_p)]
        _, left, ids, _ = space[name](
            probabilities, *options, params.min_p > 0, None, torch.zeros(1), return_filtered_probs=True
        )
        return [int(token) for token, p in zip(ids[0], left[0]) if not p <= 0]

    return sampler


def llama_cpp() -> Sampler:
    """The samplers of llama.cpp through llama-cpp-python, in the default order of common/sampling.cpp.

    A case runs in a process of its own: llama.cpp's assertions end the process.
    """
    import llama_cpp.llama_cpp as L

    def sampler(logits: list[float], parameters: Parameters) -> list[int]:
        if "allowed" in parameters or "epsilon_cutoff" in parameters or "eta_cutoff" in parameters:
            raise NotImplementedError
        get, V = parameters.get, len(logits)
        least = get("min_tokens_to_keep", 0)
        chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        bias = (L.llama_logit_bias * V)(*enumerate(get("logit_bias", ())))
        for one in (
            L.llama_sampler_init_logit_bias(V, V if "logit_bias" in parameters else 0, bias),
            L.llama_sampler_init_top_n_sigma(get("top_n_sigma", -1.0)),
            L.llama_sampler_init_top_k(get("top_k", 0)),
            L.llama_sampler_init_typical(get("typical_p", 1.0), least),
            L.llama_sampler_init_top_p(get("top_p", 1.0), least),
            L.llama_sampler_init_min_p(get("min_p", 0.0), least),
            L.llama_sampler_init_xtc(get("xtc_probability", 0.0), get("xtc_threshold", 0.1), least, 0),
            L.llama_sampler_init_temp_ext(
                get("temperature", 1.0),
                get("dynamic_temperature_range", 0.0),
                get("dynamic_temperature_exponent", 1.0),
            ),
            L.llama_sampler_init_dist(0),
        ):
            L.llama_sampler_chain_add(chain, one)
        data = (L.llama_token_data * max(V, 1))(*((token, logit, 0.0) for token, logit in enumerate(logits)))
        candidates = L.llama_token_data_array(data, V, -1, False)
        L.llama_sampler_apply(chain, ctypes.byref(candidates))
        return [candidates.data[i].id for i in range(candidates.size) if not candidates.data[i].p <= 0]

    return isolated(sampler)


def isolated(sampler: Sampler) -> Sampler:
    """Run each call in a child process: one that aborts is an error of that case."""

    def call(logits: list[float], parameters: Parameters) -> list[int]:
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            try:
                answer: Any = list(sampler(logits, parameters))
            except NotImplementedError:
                answer = None
            os.write(writable, json.dumps(answer).encode())
            os._exit(0)
        os.close(writable)
        with open(readable) as pipe:
            text = pipe.read()
        if os.waitpid(child, 0)[1]:
            raise Aborted
        answer = json.loads(text)
        if answer is None:
            raise NotImplementedError
        return list(answer)

    return call


def mlx() -> Sampler:
    """make_sampler, seen where it draws."""
    import mlx.core as mx
    from mlx_lm import sample_utils

    seen: list[Any] = []

    def see(logits: Any, temp: float) -> Any:
        seen.append(mx.softmax(logits * (1.0 / temp), axis=-1))
        return mx.argmax(logits, axis=-1)

    sample_utils.categorical_sampling = see

    def sampler(logits: list[float], parameters: Parameters) -> list[int]:
        given = dict(parameters)
        if "allowed" in given or "logit_bias" in given:
            raise NotImplementedError
        names = ("temp", "top_p", "min_p", "top_k", "min_tokens_to_keep", "xtc_probability", "xtc_threshold")
        given["temp"] = given.pop("temperature", 1.0)
        only(given, *names)
        seen.clear()
        row = mx.array([logits])
        token = sample_utils.make_sampler(**given)(row - mx.logsumexp(row, axis=-1, keepdims=True))
        return drawable(np.array(seen[0])[0].tolist()) if seen else [int(token.item())]

    return sampler


class Library(NamedTuple):
    """A library: its distribution's name, its dialect, how to run it, and what its failures come from.

    reasons: patterns of ids, each with the reason that the library's source gives; the first that fits.
    """

    name: str
    distribution: str
    dialect: str
    make: Callable[[], Sampler]
    reasons: Mapping[str, str] = {}


SUMS = "sums are float32"
UNSTABLE = r"boundaries\.top_p-(48-of-64|256)"
UNSTABLE_WHY = "of more than 16 equal logits other ids stay, because the sort is not stable"
HIGHEST = "top_p: of equal logits the highest ids stay"
UNCHECKED = "logits are not checked: the library draws from what NaN, +inf and no token at all give"

LIBRARIES = (
    Library("headway", "headway", "native", headway),
    Library(
        "transformers",
        "transformers",
        "hf",
        transformers,
        {
            UNSTABLE: UNSTABLE_WHY,
            r"(ties|boundaries)\.(top_k-)?top_p.*|precision\.top_p-below": HIGHEST,
            r"ties\.top_k.*": "top_k: all tokens that equal the k-th stay",
            r".*\.typical_p.*": "typical_p: all tokens as typical as the last stay",
            r".*\.epsilon_cutoff.*": "epsilon_cutoff: where no token has enough, all that equal the best stay",
            r"precision\.top_p-above": "p is rounded to float32",
            r"extremes\.temperature-subnormal": (
                "division by the temperature overflows, and torch.multinomial refuses NaN"
            ),
            r"extremes\.hidden-nan": "-inf is added to logits that are not allowed: NaN stays NaN",
            r"errors\.temperature-infinity": "any float above 0 is a temperature",
            r"errors\.top_p-nan": "NaN < 1 is false, so the filter is off",
        },
    ),
    Library(
        "vLLM",
        "vllm",
        "vllm",
        vllm,
        {
            r"order\.top_p-min_p|combinations\..*": "min_p comes before top_k and top_p",
            UNSTABLE: UNSTABLE_WHY,
            r"(ties|boundaries)\.(top_k-)?top_p.*|precision\.top_p-below": HIGHEST,
            r"ties\.top_k.*": "top_k: all tokens that equal the k-th stay",
            r"precision\.top_p-above": "p is rounded to float32",
            r"precision\.top_p-tail": "1 - p is computed in float32, where its error is 0.7 %",
            r"extremes\.temperature-huge.*": "temperatures above 2 are refused",
            r"extremes\.temperature-(tiny|small|subnormal)": "SamplingParams give 0.01 to the Sampler, "
            "which would take the best token",
            r"errors\..*": UNCHECKED,
        },
    ),
    Library(
        "llama.cpp",
        "llama-cpp-python",
        "llama.cpp",
        llama_cpp,
        {
            r"order\.top_n_sigma-typical_p|combinations\.28": "top_n_sigma leaves its tokens in the list with -inf: "
            "the entropy of typical_p has 0 * -inf in it and is NaN, and which tokens stay is arbitrary",
            r"order\.(top_p|min_p)-typical_p": "typical_p comes before top_p and min_p",
            r"(top_p|min_p|xtc|typical_p)\.tempered.*|order\.temperature.*|dynamic.*|combinations.*|extremes\.temp.*": (
                "the temperature comes last, and typical_p before top_p and min_p"
            ),
            r".*\.(min_tokens-all|top_k)": "top_k does not heed min_tokens_to_keep",
            r"precision\.top_p-tail": SUMS,
            r"precision\.top_p-above": "p is rounded to float32",
            r"(ties|boundaries|precision)\..*": "which of equal logits stay is arbitrary, for no sort is stable "
            "(typical_p: one more stays, before which there is exactly p)",
            r"errors\..*": "neither logits nor numbers are checked",
        },
    ),
    Library(
        "SGLang",
        "sglang",
        "sglang",
        sglang,
        {
            r"order\..*|combinations\..*|.*top_k-top_p|.*after-top_k": (
                "p is measured over all tokens, not over those that top_k left"
            ),
            UNSTABLE: UNSTABLE_WHY,
            r"boundaries\..*|precision\.top_p-below": (
                "a token before which the mass is exactly p stays; p is rounded to float32"
            ),
            r"precision\.top_p-tail": SUMS,
            r"precision\.top_k-subnormal|extremes\..*": "probabilities are sorted, not logits: here they are equal",
        },
    ),
    Library(
        "mlx-lm",
        "mlx-lm",
        "mlx",
        mlx,
        {
            r"order\.top_k-(top_p|xtc).*": "top_k comes after top_p, min_p and xtc",
            r"min_tokens_to_keep\..*|boundaries\.min_tokens.*|ties\.min_tokens": "only min_p heeds min_tokens_to_keep",
            r".*\.tempered.*|order\.temperature.*|extremes\.temperature-huge.*": "the temperature comes last",
            r"combinations\..*": "the temperature comes last, and top_k after top_p and min_p",
            r"(ties|boundaries)\.(top_k-)?top_p.*|precision\.top_p-below": "top_p: all tokens that equal the last stay",
            r"(ties|boundaries)\.xtc.*": (
                "xtc counts the tokens above the threshold; all that equal the last of these stay"
            ),
            r"precision\.top_p-tail": SUMS,
            r"precision\.top_k-subnormal": "log-probabilities are sorted, not logits: here they are equal",
            r"off\..*|extremes\.one-token-top_k": "top_k of V or more is refused",
            r"zero\.temperature-negative": "a negative temperature turns the order around",
            r"extremes\.temperature-subnormal": "1 / temperature overflows",
            r"extremes\.top_p-smallest": "p is 0 in float32, and no token goes",
            r"errors\..*": "logits are not checked, nor are numbers for NaN",
        },
    ),
)

# The page -------------------------------------------------------------------------------------------------------------

HEAD = """# Which cases installed libraries pass

`make conformance` runs these libraries on levels 1 and 2 of the [vectors](../vectors) {version} and
writes this page, unless a library that the page has is not installed. Each library is held to two
sets of rules: to the native contract, which is headway's, and to its own dialect, which is what its
source states. Levels 3 and 4 are the arithmetic of headway: headway passes them
(`tests/test_vectors.py`), and no other library is asked to.

Each library runs its own code, from the parameters that a user gives to the distribution that it
draws from; `tools/conformance.py` has the adapters. NaN counts as a token that can be drawn, and
any exception as a refusal. A parameter that a library does not have is not expressible. **A failure
is a difference, not a verdict**: at ties, for example, the native contract is one choice among
several.
"""

NOTES = """
These parts of the libraries were run. transformers: the processors that `generate` makes. vLLM:
`v1.sample.sampler.Sampler` in plain PyTorch; its Triton and FlashInfer paths need a GPU and may
differ. SGLang: the sampler in plain PyTorch. llama.cpp: the default chain of its command line
tools. mlx-lm: `make_sampler` on the CPU. FlashInfer's kernels need a GPU and were not run.

The sorts of transformers, vLLM, SGLang, llama.cpp and mlx-lm are not stable; the answer of a
dialect is that of a stable sort. torch.multinomial, with which transformers and SGLang draw,
refuses NaN on the CPU.
"""


class Result(NamedTuple):
    """What came of a case: against the native contract, and against the library's dialect."""

    level: str
    group: str
    case: dict[str, Any]
    native: str
    own: str
    kept: Any


def results(library: Library) -> list[Result] | None:
    """Run a library on all cases; None where it is not installed."""
    try:
        sampler = refusing(library.make())
    except ImportError:
        return None
    found = []
    for level in ("support", "boundaries"):
        groups = json.loads((ROOT / "vectors" / f"{level}.json").read_text())["groups"]
        group_of = {case["id"]: group["name"] for group in groups for case in group["cases"]}
        runs = (check.run(sampler, level, dialect) for dialect in ("native", library.dialect))
        for (case, native, kept, _), (_, own, _, _) in zip(*runs, strict=True):
            found.append(Result(level, group_of[case["id"]], case, native, own, kept))
    return found


def tally(outcomes: Iterable[str]) -> str:
    """Passed, failed, not expressible."""
    count = Counter(outcomes)
    return " / ".join(str(count[outcome]) for outcome in ("passed", "failed", "not expressible"))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def what_differs(result: Result) -> str:
    """How an answer differs, where no reason is known."""
    native = result.case["expected"]["native"]
    if result.kept == "error":
        return "refused"
    if native == "error":
        return "not refused"
    if not isinstance(result.kept, list):
        return "the process aborts"
    kept, want = set(result.kept), set(native)
    return "more stay" if kept > want else "fewer stay" if kept < want else "others stay"


def failures(library: Library, found: list[Result]) -> str:
    """The failed cases by reason; bold where the library's own rules say otherwise, too."""
    by_reason: dict[str, list[str]] = {}
    for result in found:
        if "failed" in (result.native, result.own):
            fits = (reason for pattern, reason in library.reasons.items() if re.fullmatch(pattern, result.case["id"]))
            name = f"`{result.case['id']}`"
            by_reason.setdefault(next(fits, what_differs(result)), []).append(
                f"**{name}**" if result.own == "failed" else name
            )
    return "\n".join(f"- *{reason}*: {', '.join(ids)}" for reason, ids in by_reason.items())


def version() -> str:
    """The version of the vectors."""
    return str(json.loads((ROOT / "vectors" / "support.json").read_text())["version"])


def page() -> str:
    """The whole page."""
    every = [(library, results(library)) for library in LIBRARIES]
    there = [(library, found) for library, found in every if found is not None]
    overview = []
    for library, found in every:
        if found is None:
            overview.append([library.name, "not installed", f"`{library.dialect}`", *[""] * 4])
            continue
        cells = [
            tally(getattr(result, against) for result in found if result.level == level)
            for against in ("native", "own")
            for level in ("support", "boundaries")
        ]
        release = f"{library.distribution} {importlib.metadata.version(library.distribution)}"
        overview.append([library.name, release, f"`{library.dialect}`", *cells])
    groups = list(dict.fromkeys((result.level, result.group) for _, found in there for result in found))
    parts = [
        HEAD.format(version=version()),
        "Passed / failed / not expressible:\n",
        table(
            [
                "",
                "version",
                "dialect",
                "level 1, native",
                "level 2, native",
                "level 1, own rules",
                "level 2, own rules",
            ],
            overview,
        ),
        NOTES,
    ]
    for against, title in (("native", "Against the native contract"), ("own", "Against the library's own rules")):
        rows = [
            [
                f"{1 if level == 'support' else 2}: {group}",
                *(tally(getattr(result, against) for result in found if result.group == group) for _, found in there),
            ]
            for level, group in groups
        ]
        parts.append(f"## {title}\n\n" + table(["group", *(library.name for library, _ in there)], rows) + "\n")
    parts.append("## What fails, and why\n\nBold cases fail by the rules of the library itself, too.\n")
    for library, found in there:
        if text := failures(library, found):
            parts.append(f"### {library.name}\n\n{text}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    lost = [library.name for library in LIBRARIES if f"| {library.name} | not installed" in text]
    if lost:  # what was once seen is not overwritten by what cannot be seen here
        print(text)
        sys.exit(f"not installed: {', '.join(lost)}; docs/conformance.md, which has them, is left as it is")
    PAGE.write_text(text)
