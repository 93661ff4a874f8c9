"""Dialects against the libraries that they are named after: which tokens are left, on thousands of random rows.

Each library runs where it is installed; none is a requirement of the tests, and where one is missing they skip and
say so. All of them but FlashInfer need no more than a CPU: transformers, `mlx[cpu] mlx-lm`, `llama-cpp-python`, and
`vllm` and `sglang`, of which the paths in plain torch are compared. What vLLM, SGLang, FlashInfer and llama.cpp do is
written down here once more, in NumPy and float32 as they compute, so that their dialects have a test everywhere.

Where a library's sort is not stable, only the number that is left of each value is compared.

Libraries compare float32 sums, headway exact ones. A difference is therefore allowed for a token whose boundary lies
within rounding, and for nothing else: for each difference the test asks whether headway would have decided the other
way with parameters and logits moved by what float32 can be off, and counts how many such rows there were.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import headway as hw
from headway._sampling.dialects import DIALECTS

Array = np.ndarray
Options = dict[str, Any]
Run = Callable[[Array, Options], Array]  # logits (rows, V) -> which tokens are left, bool (rows, V)

HALF_ULP = 2.0**-24  # what an operation in float32 can be off, relative to its result
INF = float("inf")


def installed(module: str) -> Any:
    return pytest.importorskip(module, reason=f"no {module.split('.')[0]} here to compare with", exc_type=ImportError)


# The libraries ------------------------------------------------------------------------------------------------------


def transformers() -> Run:
    torch, warpers = installed("torch"), installed("transformers.generation.logits_process")

    def run(logits: Array, options: Options) -> Array:
        """The processors that generate() would make, in its order."""
        scores, least = torch.from_numpy(logits.copy()), options.get("min_tokens_to_keep", 1)
        get = options.get
        chain: list[Any] = []
        if get("temperature", 1.0) != 1.0:
            chain.append(warpers.TemperatureLogitsWarper(float(get("temperature"))))
        if get("top_k"):
            chain.append(warpers.TopKLogitsWarper(get("top_k"), min_tokens_to_keep=least))
        if get("top_p", 1.0) < 1.0:
            chain.append(warpers.TopPLogitsWarper(get("top_p"), min_tokens_to_keep=least))
        if get("min_p") is not None:
            chain.append(warpers.MinPLogitsWarper(get("min_p"), min_tokens_to_keep=least))
        if get("typical_p", 1.0) < 1.0:
            chain.append(warpers.TypicalLogitsWarper(get("typical_p"), min_tokens_to_keep=least))
        if 0 < get("epsilon_cutoff", 0) < 1:
            chain.append(warpers.EpsilonLogitsWarper(get("epsilon_cutoff"), min_tokens_to_keep=least))
        if 0 < get("eta_cutoff", 0) < 1:
            chain.append(warpers.EtaLogitsWarper(get("eta_cutoff"), min_tokens_to_keep=least))
        for warper in chain:
            scores = warper(None, scores)
        return np.isfinite(scores.numpy())

    return run


def mlx_lm() -> Run:
    mx, utils = installed("mlx.core"), installed("mlx_lm.sample_utils")

    def one(row: Array, options: Options) -> Array:
        """What make_sampler chains, before the draw."""
        x = mx.array(row)
        x = (x - mx.logsumexp(x, axis=-1, keepdims=True))[None]
        if options.get("temperature", 1.0) == 0:
            return np.arange(row.size) == int(utils.greedy_sampler(x)[0])
        if 0 < options.get("top_p", 0) < 1:
            x = utils.apply_top_p(x, options["top_p"])
        if options.get("min_p", 0) != 0:
            x = utils.apply_min_p(x, options["min_p"], min(options.get("min_tokens_to_keep", 1), row.size))
        if options.get("xtc_probability", 0) > 0:
            spared = list(options.get("xtc_special_tokens", []))
            x = utils.apply_xtc(x, options["xtc_probability"], options["xtc_threshold"], spared)
        if 0 < options.get("top_k", 0) < row.size:
            x = utils.apply_top_k(x, options["top_k"])
        return np.isfinite(np.array(x)[0])

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def vllm() -> Run:
    torch, params = installed("torch"), installed("vllm.sampling_params")
    sampler, topk_topp = installed("vllm.v1.sample.sampler"), installed("vllm.v1.sample.ops.topk_topp_sampler")
    processors = installed("vllm.v1.sample.logits_processor")

    def run(logits: Array, options: Options) -> Array:
        """The steps of Sampler.sample before the draw. SamplingParams reads the numbers."""
        rows, V = logits.shape
        asked = params.SamplingParams(**options)
        if options.get("temperature", 1.0) < 1e-5:  # as the sampler reads it, to which SamplingParams would give 0.01
            return np.arange(V) == logits.argmax(-1)[:, None]
        z = torch.from_numpy(logits.copy())
        z = sampler.Sampler.apply_temperature(z, torch.full((rows,), asked.temperature), all_random=True)
        min_p = processors.MinPLogitsProcessor(
            SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=rows)), torch.device("cpu"), False
        )
        added = [(row, asked, None, []) for row in range(rows)]
        min_p.update_state(processors.BatchUpdate(batch_size=rows, removed=[], added=added, moved=[]))
        z = min_p.apply(z)
        top_k = torch.full((rows,), asked.top_k) if 0 < asked.top_k < V else None
        top_p = torch.full((rows,), asked.top_p) if asked.top_p < 1 else None
        return np.isfinite(topk_topp.apply_top_k_top_p(z, top_k, top_p).numpy())

    return run


def sglang() -> Run:
    torch, params = installed("torch"), installed("sglang.srt.sampling.sampling_params")
    sampler = installed("sglang.srt.layers.sampler")

    def run(logits: Array, options: Options) -> Array:
        """The path in plain torch, which can give back what it draws from. SamplingParams reads the numbers."""
        rows, asked = len(logits), params.SamplingParams(**options)
        if (asked.top_p, asked.top_k, asked.min_p) == (1.0, params.TOP_K_ALL, 0.0):
            return np.isfinite(logits)  # a draw without filters
        _, weights, ids, _ = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
            torch.softmax(torch.from_numpy(logits.copy()).div_(asked.temperature), dim=-1),
            torch.full((rows,), asked.top_k),
            torch.full((rows,), asked.top_p),
            torch.full((rows,), asked.min_p),
            asked.min_p > 0,
            sampling_seed=None,
            positions=None,
            return_filtered_probs=True,
        )
        kept = np.zeros(logits.shape, bool)
        np.put_along_axis(kept, ids.numpy().astype(np.int64), weights.numpy() > 0, -1)
        return kept

    return run


def flashinfer() -> Run:
    pytest.skip("FlashInfer's kernels run on NVIDIA's GPUs alone: its rules, written down, are compared instead")


TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


def through_chain(lib: Any, samplers: Sequence[Any], logits: Array, history: Sequence[int] = ()) -> list[Array]:
    """What llama.cpp's samplers, told of a history, make of its list of tokens (id, logit, p), for each row."""
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for sampler in samplers:
        lib.llama_sampler_chain_add(chain, sampler)
    for token in history:
        lib.llama_sampler_accept(chain, token)
    lists = []
    for row in logits:
        tokens = np.zeros(row.size, TOKEN)
        tokens["id"], tokens["logit"] = np.arange(row.size), row
        view = lib.llama_token_data_array(tokens.ctypes.data_as(lib.llama_token_data_p), row.size, -1, False)
        lib.llama_sampler_apply(chain, ctypes.byref(view))
        first = (ctypes.addressof(view.data.contents) - tokens.ctypes.data) // TOKEN.itemsize  # xtc moves it
        lists.append(tokens[first : first + view.size])
    lib.llama_sampler_free(chain)
    return lists


def default_chain(lib: Any, options: Options) -> list[Any]:
    """The samplers of common/sampling.cpp in the default order of common/common.h."""
    get, least = options.get, options.get("min_tokens_to_keep", 0)
    heat = [get("dynamic_temperature_range", 0.0), get("dynamic_temperature_exponent", 1.0)]
    return [
        lib.llama_sampler_init_top_n_sigma(get("top_n_sigma", -1.0)),
        lib.llama_sampler_init_top_k(get("top_k", 0)),
        lib.llama_sampler_init_typical(get("typical_p", 1.0), least),
        lib.llama_sampler_init_top_p(get("top_p", 1.0), least),
        lib.llama_sampler_init_min_p(get("min_p", 0.0), least),
        lib.llama_sampler_init_xtc(get("xtc_probability", 0.0), get("xtc_threshold", 0.1), least, 0),
        lib.llama_sampler_init_temp_ext(get("temperature", 1.0), *heat),
        lib.llama_sampler_init_dist(0),
    ]


def llama_cpp() -> Run:
    lib = installed("llama_cpp")

    def run(logits: Array, options: Options) -> Array:
        kept = np.zeros(logits.shape, bool)
        for row, tokens in zip(kept, through_chain(lib, default_chain(lib, options), logits)):
            row[tokens["id"]] = np.isfinite(tokens["logit"])
        return kept

    return run


# Written down from the sources of vLLM 0.33.0, SGLang 0.5.23, FlashInfer 0.7.2 and the llama.cpp of llama-cpp-python
# 0.3.36, with sorts that are stable. float32 throughout, sums in the order of the tokens.


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max())
    return e / e.sum(dtype=np.float32)


def vllm_rules() -> Run:
    """SamplingParams, MinPLogitsProcessor, and apply_top_k_top_p_pytorch."""

    def one(row: Array, options: Options) -> Array:
        t = options.get("temperature", 1.0)
        if t < 1e-5:
            return np.arange(row.size) == row.argmax()
        z = row / np.float32(max(t, 0.01))
        if options.get("min_p", 0) > 0:
            p = softmax(z)
            z = np.where(p < p.max() * np.float32(options["min_p"]), -INF, z).astype(np.float32)
        order = np.argsort(z, kind="stable")
        z = z[order]
        k = options.get("top_k", 0)
        if 0 < k < z.size:
            z = np.where(z < z[-k], -INF, z).astype(np.float32)
        if options.get("top_p", 1) < 1:
            out = np.cumsum(softmax(z), dtype=np.float32) <= np.float32(1) - np.float32(options["top_p"])
            out[-1] = False
            z[out] = -INF
        kept = np.zeros(z.size, bool)
        kept[order[np.isfinite(z)]] = True
        return kept

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def sglang_rules() -> Run:
    """top_k_top_p_min_p_sampling_from_probs_torch."""

    def one(row: Array, options: Options) -> Array:
        t, k = options.get("temperature", 1.0), options.get("top_k", -1)
        if t < 1e-6:
            t, k = 1.0, 1
        if k == -1 and (options.get("top_p", 1.0), options.get("min_p", 0.0)) == (1.0, 0.0):
            return np.isfinite(row)
        p = softmax(row / np.float32(t))
        order = np.argsort(-p, kind="stable")
        p = p[order]
        out = np.cumsum(p, dtype=np.float32) - p > np.float32(options.get("top_p", 1.0))
        out |= np.arange(p.size) >= (k if k != -1 else 1 << 30)
        out |= p < p[0] * np.float32(options.get("min_p", 0.0))
        kept = np.zeros(p.size, bool)
        kept[order[~out]] = True
        return kept & np.isfinite(row)

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def flashinfer_rules() -> Run:
    """What its rejection loops accept: a token if those strictly above it are fewer than k, and hold less than p."""

    def above(p: Array) -> tuple[Array, Array]:
        """How many are strictly above each token, and how much they hold."""
        falling = -np.sort(-p)
        count = np.searchsorted(-falling, -p)
        return count, np.concatenate([[np.float32(0)], np.cumsum(falling, dtype=np.float32)])[count]

    def one(row: Array, options: Options) -> Array:
        t = options.get("temperature", 1.0)
        if t == 0:
            return np.arange(row.size) == row.argmax()
        p = softmax(row / np.float32(t))
        kept = np.isfinite(row)
        by_k = above(p)[0] < options.get("top_k", p.size)
        q = p if options.get("nucleus") == "joint" else p * by_k / (p * by_k).sum(dtype=np.float32)
        if options.get("top_p", 1.0) < 1:
            kept &= above(q)[1] < np.float32(options["top_p"])
        return kept & by_k & (p >= np.float32(options.get("min_p", 0.0)) * p.max())

    return lambda logits, options: np.stack([one(row, options) for row in logits])


def llama_cpp_rules() -> Run:
    """The default chain of common/sampling.cpp over src/llama-sampler.cpp. What is banned leaves the list at once."""

    def one(row: Array, options: Options) -> Array:
        get, least = options.get, options.get("min_tokens_to_keep", 0)
        ids = np.flatnonzero(np.isfinite(row))
        ids = ids[np.argsort(-row[ids], kind="stable")]
        if get("top_n_sigma", -1.0) > 0 and ids.size > 1:
            z = row[ids].astype(np.float64)
            ids = ids[z >= z.max() - get("top_n_sigma") * z.std()]
        if get("top_k", 0) > 0:
            ids = ids[: get("top_k")]
        if get("typical_p", 1.0) < 1:
            p = softmax(row[ids])
            with np.errstate(divide="ignore", invalid="ignore"):
                surprise = -np.log(p)
                entropy = np.nansum(p * surprise, dtype=np.float32)
            order = np.argsort(np.abs(surprise - entropy), kind="stable")
            running = np.cumsum(p[order], dtype=np.float32)
            enough = (running > np.float32(get("typical_p"))) & (np.arange(p.size) + 1 >= least)
            last = int(enough.argmax()) if enough.any() else p.size - 1
            ids = ids[np.sort(order[: last + 1])]
        if get("top_p", 1.0) < 1:
            running = np.cumsum(softmax(row[ids]), dtype=np.float32)
            enough = (running >= np.float32(get("top_p"))) & (np.arange(ids.size) + 1 >= least)
            ids = ids[: int(enough.argmax()) + 1 if enough.any() else ids.size]
        if get("min_p", 0.0) > 1:  # no token reaches it: the first of the list stays
            ids = ids[: max(least, 1)]
        elif get("min_p", 0.0) > 0:
            reach = row[ids] >= row[ids].max() + np.log(np.float32(get("min_p")))
            ids = ids[reach] if reach.sum() >= max(least, 1) else ids[: max(least, 1)]
        if get("xtc_probability", 0.0) > 0 and get("xtc_threshold") <= 0.5 and ids.size > 1:
            top = int((softmax(row[ids]) >= np.float32(get("xtc_threshold"))).sum())
            if top > 1 and ids.size - (top - 1) >= least:
                ids = ids[top - 1 :]
        if get("temperature", 1.0) <= 0:
            ids = ids[:1]
        return np.isin(np.arange(row.size), ids)

    return lambda logits, options: np.stack([one(row, options) for row in logits])


class Library(NamedTuple):
    dialect: str
    open: Callable[[], Run]  # or skip, with the reason
    stable: bool = False  # of equal logits the very ids can be compared


LIBRARIES = {
    "transformers": Library("hf", transformers),
    "mlx-lm": Library("mlx", mlx_lm),
    "llama.cpp": Library("llama.cpp", llama_cpp),
    "vLLM": Library("vllm", vllm),
    "SGLang": Library("sglang", sglang),
    "FlashInfer": Library("flashinfer", flashinfer),
    "llama.cpp, written down": Library("llama.cpp", llama_cpp_rules, stable=True),
    "vLLM, written down": Library("vllm", vllm_rules, stable=True),
    "SGLang, written down": Library("sglang", sglang_rules, stable=True),
    "FlashInfer, written down": Library("flashinfer", flashinfer_rules, stable=True),
}


# Rows and options ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, V: rng.standard_normal(V) * 3,
    "flat": lambda rng, V: rng.standard_normal(V) * 0.3,
    "bfloat16": lambda rng, V: (rng.standard_normal(V) * 2).astype(ml_dtypes.bfloat16),
    "few values": lambda rng, V: np.round(rng.standard_normal(V) * 2) / 2,
    "all equal": lambda rng, V: np.full(V, rng.choice([0.0, -7.5, 3.25])),
    "bans": lambda rng, V: np.where((rng.random(V) < 0.3) & (np.arange(V) > 0), -np.inf, rng.standard_normal(V) * 2),
    "peaked": lambda rng, V: rng.standard_normal(V) + 8 * (rng.random(V) < 2 / V),
}
SIZES = (1, 2, 3, 8, 33, 64, 150, 2000)


def random_options(dialect: str, rng: np.random.Generator, logits: Array) -> Options:
    """Each filter of the dialect or not.

    With values on boundaries that a row of equal logits makes, and those at the edge of what the dialect reads anew.
    """
    V = logits.shape[-1]
    steps = {step.option for step in DIALECTS[dialect].steps}
    shares = [float(rng.random()), float(rng.integers(1, 9)) / 8, float(rng.integers(1, V + 1)) / V, 0.9, 0.05]
    values: dict[str, list[Any]] = {
        "temperature": [0.5, 0.7, 1.0, 1.5, 2.0],
        "top_n_sigma": [0.5, 1.0, 2.0, 3.0],
        "top_k": [1, 2, 5, 40, max(1, V - 1), V],
        "top_p": shares,
        "min_p": [0.0, 0.02, 0.1, 0.5, 1.0, float(rng.random())],
        "typical_p": shares,
        "epsilon_cutoff": [1e-3, 0.02, 0.2, float(rng.random())],
        "eta_cutoff": [1e-3, 0.02, 0.2, float(rng.random())],
        "xtc_probability": [1.0],
    }
    if dialect in ("hf", "llama.cpp", "mlx"):
        values["min_tokens_to_keep"] = [1, 1, 2, 5]
    for name, readings in DIALECTS[dialect].readings.items():
        for reading in readings:
            if name in values and reading.means is not None:
                values[name] = values[name] + [edge for edge in {reading.low, reading.high} if np.isfinite(edge)]
    out = {
        name: choice[int(rng.integers(len(choice)))]
        for name, choice in values.items()
        if (name in steps or name == "min_tokens_to_keep") and rng.random() < 0.4
    }
    if "xtc_probability" in out:
        out["xtc_threshold"] = float(rng.choice([0.0625, 0.1, 0.2, 0.02]))
        if dialect == "llama.cpp" and rng.random() < 0.2:
            out["xtc_threshold"] = float(rng.choice([-1.0, 0.5, 0.6, 1.5]))
        if dialect == "mlx" and rng.random() < 0.5:
            out["xtc_special_tokens"] = rng.integers(0, V, int(rng.integers(1, 4))).tolist()
    if dialect == "flashinfer" and rng.random() < 0.5:
        out["nucleus"] = "joint"
    if dialect == "llama.cpp" and ("top_n_sigma" in out or np.isinf(logits).any()):  # S39
        out.pop("typical_p", None)
        if "xtc_probability" in out:
            out.pop("min_tokens_to_keep", None)
            out["xtc_threshold"] = abs(out["xtc_threshold"])
    return out


def kept(dialect: str, logits: Array, options: Options) -> Array:
    filtered = hw.filter_logits(logits, dialect=dialect, **options) > -INF
    if options.get("temperature", 1.0) < 1e-5:  # removes nothing, but leaves the first token alone with mass
        filtered &= hw.probabilities(logits, dialect=dialect, **options) > 0
    return filtered


def left(row: Array, mask: Array, stable: bool) -> Array:
    """How many tokens are left of each value; where the library's sort is stable, of each id."""
    group = np.arange(row.size) if stable else np.unique(row, return_inverse=True)[1]
    return np.bincount(group, mask)


def nearby(dialect: str, row: Array, options: Options) -> Iterator[Array]:
    """What headway keeps where logits and parameters are off by rounding. Equal logits stay equal."""
    rng = np.random.default_rng(0)
    values, inverse = np.unique(row, return_inverse=True)
    size = np.abs(np.where(np.isfinite(values), values, 0)) + 1
    of_sum = (row.size + 32) * HALF_ULP  # a sum of so many shares, after a softmax
    if dialect == "sglang":
        options = {"top_p": 1.0, **options}  # it compares with p = 1 too
    for round_ in range(48):
        moved = dict(options)
        for name, value in options.items():
            if isinstance(value, float) and name not in ("temperature", "xtc_probability") and value > 0:
                off = of_sum * (1 if name in ("top_p", "typical_p") else value) * rng.choice([-1, 1])
                moved[name] = value + off if name == "top_n_sigma" else min(max(value + off, 5e-324), 1.0)
        noise = rng.uniform(-8, 8, values.size) * HALF_ULP * size * (round_ > 3)
        yield kept(dialect, (values + noise)[inverse].astype(np.float32), moved)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(LIBRARIES))
def test_the_same_tokens_are_left(name: str, kind: str) -> None:
    dialect, open_library, stable = LIBRARIES[name]
    library = open_library()
    rng = np.random.default_rng([list(DIALECTS).index(dialect), list(KINDS).index(kind)])
    rows = differ = 0
    for _ in range(150):
        V = int(rng.choice(SIZES))
        logits = np.stack([KINDS[kind](rng, V) for _ in range(4)]).astype(np.float32)
        options = random_options(dialect, rng, logits)
        got, want = kept(dialect, logits, options), library(logits, options)
        rows += len(got)
        for row, ours, theirs in zip(logits, got, want):
            ours, theirs = left(row, ours, stable), left(row, theirs, stable)
            if np.array_equal(ours, theirs):
                continue
            differ += 1
            could = np.stack([left(row, mask, stable) for mask in nearby(dialect, row, options)])
            wrong = (theirs < could.min(0)) | (theirs > could.max(0))
            assert not wrong.any(), (options, row.tolist(), ours, theirs)
    assert rows == 600
    print(f"{name}, {kind}: {differ} of {rows} rows within rounding of a boundary")
    assert differ <= (60 if kind == "all equal" else 12)


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "mlx-lm"])  # it computes exp(log(share))
def test_exact_boundaries(name: str) -> None:
    """Rows of 2^n equal logits: every share is exact in float32 too, so that every boundary must be met exactly."""
    dialect, open_library, stable = LIBRARIES[name]
    library = open_library()
    steps = {step.option for step in DIALECTS[dialect].steps}
    for V in (2, 8, 64):
        logits = np.full((1, V), 1.5, np.float32)
        cases: list[Options] = [{name: k / V} for name in ("top_p", "typical_p") if name in steps for k in range(1, V)]
        cases += [{"top_k": 2**n, **p} for n in range(V.bit_length()) for p in ({}, {"top_p": 0.5})]
        if "xtc_probability" in steps:
            cases += [{"xtc_probability": 1.0, "xtc_threshold": k / V} for k in (0.5, 1, 2) if k / V <= 0.5]
        for options in cases:
            got, want = kept(dialect, logits, options)[0], library(logits, options)[0]
            assert np.array_equal(left(logits[0], got, stable), left(logits[0], want, stable)), options


def test_the_test_sees_a_wrong_dialect() -> None:
    """SGLang's rule for a mass that equals p is not vLLM's; nor are their ties."""
    logits = np.full((1, 8), 1.5, np.float32)
    assert not np.array_equal(kept("sglang", logits, {"top_p": 0.5}), vllm_rules()(logits, {"top_p": 0.5}))
    tied = np.float32([[2.0, 1.0, 1.0, 0.0]])
    assert not np.array_equal(kept("sglang", tied, {"top_k": 2}), vllm_rules()(tied, {"top_k": 2}))


# llama.cpp beyond which tokens are left ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_llama_cpp_draws_from_the_same_distribution(kind: str) -> None:
    """After the whole chain, dynamic temperature included, equal logits share the same probability to 1e-6."""
    lib = installed("llama_cpp")
    rng = np.random.default_rng(list(KINDS).index(kind))
    for _ in range(100):
        row = KINDS[kind](rng, int(rng.choice(SIZES))).astype(np.float32)
        row = row[np.isfinite(row)]
        options = random_options("llama.cpp", rng, row)
        options.pop("top_n_sigma", None)  # S39
        if rng.random() < 0.5:
            options["dynamic_temperature_range"] = float(rng.choice([0.3, 0.5, 2.0]))
            options["dynamic_temperature_exponent"] = float(rng.choice([0.5, 1.0, 2.0]))
        (tokens,) = through_chain(lib, default_chain(lib, options), row[None])
        theirs = np.zeros(row.size)
        theirs[tokens["id"]] = tokens["p"]
        ours = hw.probabilities(row, dialect="llama.cpp", **options)
        if not np.array_equal(left(row, ours > 0, False), left(row, theirs > 0, False)):
            continue  # which tokens are left is the test above
        assert np.allclose(np.sort(ours), np.sort(theirs), rtol=1e-5, atol=1e-6), (options, row.tolist())


def test_llama_cpp_lists_what_is_banned() -> None:
    """S39: what stays in llama.cpp's list at -inf, and headway has taken out."""
    lib = installed("llama_cpp")

    def both(row: list[float], **options: Any) -> list[list[int]]:
        logits = np.float32([row])
        return [
            np.flatnonzero(each).tolist()
            for each in (llama_cpp()(logits, options)[0], kept("llama.cpp", logits, options)[0])
        ]

    close = [4, 3.05, 3.04, 3.03, 3.02, 3.01]
    assert both(close, typical_p=0.5) == [[1, 2, 3, 4]] * 2
    assert both([*close, -INF], typical_p=0.5) == [[0, 1, 2], [1, 2, 3, 4]]
    xtc = {"xtc_probability": 1.0, "xtc_threshold": 0.3, "min_tokens_to_keep": 3}
    assert both([2.1, 2, 0], **xtc) == [[0, 1, 2]] * 2
    assert both([2.1, 2, 0, -INF, -INF], **xtc) == [[1, 2], [0, 1, 2]]
    assert both([2.1, 2, 0, -9, -9], top_n_sigma=1.5, **xtc) == [[1, 2], [0, 1, 2]]
    heat = {"dynamic_temperature_range": 0.5}
    for banned, same in ([], True), ([-INF] * 5, False):
        row = np.float32([1.0, 0.5, 0.0, *banned])
        (tokens,) = through_chain(lib, default_chain(lib, heat), row[None])
        theirs = tokens["p"][np.argsort(tokens["id"])]
        assert np.allclose(hw.probabilities(row, dialect="llama.cpp", **heat), theirs, atol=1e-6) == same


@pytest.mark.parametrize("kind", list(KINDS))
def test_llama_cpp_penalties(kind: str) -> None:
    """penalize and llama.cpp's two samplers, in the order of its default chain: the same but for float32."""
    lib = installed("llama_cpp")
    rng = np.random.default_rng(list(KINDS).index(kind))
    changed = 0
    for _ in range(300):
        V = int(rng.choice([2, 3, 8, 33]))
        row = KINDS[kind](rng, V).astype(np.float32)
        history = rng.integers(0, V, int(rng.integers(0, 60))).tolist()
        window = int(rng.choice([1, 5, 64]))
        repetition, frequency, presence = (
            float(rng.choice(c)) for c in ([1.0, 1.1, 0.5, 2.0], [0.0, 0.3, -0.2], [0, 0.7])
        )
        multiplier, base, allowed = (
            float(rng.choice([0.0, 0.8])),
            float(rng.choice([1.0, 1.75])),
            int(rng.integers(1, 4)),
        )
        samplers = [
            lib.llama_sampler_init_penalties(V, window, repetition, frequency, presence),
            lib.llama_sampler_init_dry(None, multiplier, base, allowed, window, None, 0),
        ]
        (tokens,) = through_chain(lib, samplers, row[None], history)
        ours = hw.penalize(
            row,
            history,
            window=window,
            repetition=repetition,
            frequency=frequency,
            presence=presence,
            dry_multiplier=multiplier,
            dry_base=base,
            dry_allowed_length=allowed,
        )
        changed += not np.array_equal(ours, row)
        assert np.allclose(ours, tokens["logit"], rtol=1e-6, atol=4e-6), (row, history, window)
    assert changed > 100
