"""Sampling's rows: every filter alone and the usual combinations, on peaked, flat and tied logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import byref
from functools import partial
from typing import Any

import numpy as np

import headway as hw

from .harness import Array, Candidate, Contest, LeftOut, Row
from .runtimes import as_torch

Options = dict[str, float]
TEMPERATURE = 0.8
USUAL: dict[str, Options] = {
    "plain": {},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "top_k=50, top_p=0.9": {"top_k": 50, "top_p": 0.9},
}
OTHERS: dict[str, Options] = {
    "min_p=0.05": {"min_p": 0.05},
    "top_n_sigma=1": {"top_n_sigma": 1.0},
    "typical_p=0.9": {"typical_p": 0.9},
    "epsilon_cutoff=0.0003": {"epsilon_cutoff": 3e-4},
    "eta_cutoff=0.0003": {"eta_cutoff": 3e-4},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.05},
    "dynamic temperature": {"dynamic_temperature_range": 0.5},
    "top_k=40, top_p=0.95, min_p=0.05": {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
}
KINDS = ("peaked", "flat", "bfloat16 ties")


def logits_of(kind: str, rows: int, vocabulary: int) -> Array:
    """Return float32 logits: a few tokens have most of the mass, or many have; ties are those that bfloat16 makes."""
    spread = np.float32(0.5 if kind == "flat" else 4.0)
    logits = np.random.default_rng(0).standard_normal((rows, vocabulary), np.float32) * spread
    if kind == "bfloat16 ties":
        import ml_dtypes

        logits = logits.astype(ml_dtypes.bfloat16).astype(np.float32)
    return logits


# The fastest sampler has nothing to skip in these, or everything to move.
CORNERS: dict[str, Callable[[int], Array]] = {
    "all equal": lambda V: np.zeros(V, np.float32),
    "two values": lambda V: (np.arange(V) % 2).astype(np.float32),
    "geometric": lambda V: -np.arange(V, dtype=np.float32) / 1000,
    "rising": lambda V: np.arange(V, dtype=np.float32) / np.float32(V),
}


def rows() -> Iterator[Row]:
    """Yield all rows of sampling."""
    for vocabulary in (128_256, 32_000, 151_936, 262_144):
        filters = {**USUAL, **OTHERS} if vocabulary == 128_256 else USUAL
        for count in (1, 32):
            section = "sampling, one row" if count == 1 else f"sampling, {count} rows"
            for kind in KINDS:
                for label, options in filters.items():
                    make = partial(logits_of, kind, count, vocabulary)
                    yield Row(section, f"V={vocabulary}, {kind}, {label}", partial(contest, make, options))
    for corner, at in CORNERS.items():
        for label, options in {**USUAL, **OTHERS}.items():
            lone = partial(contest, partial(at, 128_256), options, peers=False)
            yield Row("sampling, corners", f"V=128256, {corner}, {label}", lone)


def contest(make: Callable[[], Array], options: Options, peers: bool = True) -> Contest:
    """Draw a token for each row; reading the logits once is the floor."""
    logits = make().squeeze()  # one row is (V,)
    builders = {"headway": partial(_headway, logits, options)}
    if logits.ndim == 1:
        builders["headway, explain"] = partial(_headway_explain, logits, options)
    if peers and _has_ties(logits):
        builders["headway, bfloat16"] = partial(_headway, _as_bfloat16(logits), options)
    if peers:
        builders["transformers"] = partial(_transformers, logits, options)
        builders["torch by hand"] = partial(_torch, logits, options)
        if set(options) == {"top_p"}:
            builders["torch by hand, part of a sort"] = partial(_torch_partial_sort, logits, options["top_p"])
        builders["llama.cpp"] = partial(_llama_cpp, logits, options)
        builders["NumPy"] = partial(_numpy, logits, options)
    builders["reading once"] = partial(_torch_maximum, logits)
    return Contest(builders, floors=("reading once", "headway, explain"))


def _headway(logits: Array, options: Options) -> Candidate:
    params = hw.SamplingParams(temperature=TEMPERATURE, seed=1, **options)
    step = iter(range(1 << 62))
    return Candidate(lambda: hw.sample(logits, params, position=next(step)))


def _headway_explain(logits: Array, options: Options) -> Candidate:
    params = hw.SamplingParams(temperature=TEMPERATURE, seed=1, **options)
    return Candidate(lambda: hw.explain(logits, params))


def _has_ties(logits: Array) -> bool:
    return not (logits.view(np.uint32) & 0xFFFF).any()


def _as_bfloat16(logits: Array) -> Array:
    import ml_dtypes

    return logits.astype(ml_dtypes.bfloat16)


def _torch_maximum(logits: Array) -> Candidate:
    tensor = as_torch(logits)
    return Candidate(lambda: tensor.max())


def _transformers(logits: Array, options: Options) -> Candidate:
    """Run what `generate` runs for a step: its processors, softmax, multinomial."""
    scores = as_torch(np.atleast_2d(logits))
    import torch
    import transformers as hf

    made = {
        "top_k": lambda k: hf.TopKLogitsWarper(int(k)),
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
        "epsilon_cutoff": hf.EpsilonLogitsWarper,
        "eta_cutoff": hf.EtaLogitsWarper,
    }
    chain = hf.LogitsProcessorList([hf.TemperatureLogitsWarper(TEMPERATURE)])
    for option, value in options.items():
        if option not in made:
            raise LeftOut(f"has no {option}")
        chain.append(made[option](value))
    ids = torch.zeros((len(scores), 1), dtype=torch.long)
    return Candidate(lambda: torch.multinomial(torch.softmax(chain(ids, scores), -1), 1))


def _torch(logits: Array, options: Options) -> Candidate:
    """Write it by hand, as lean as torch's operations allow: no multinomial, no second softmax."""
    z = as_torch(np.atleast_2d(logits))
    import torch

    if unknown := set(options) - {"top_k", "top_p", "min_p"}:
        raise LeftOut(f"by hand without {', '.join(unknown)}")
    k, p, min_p = int(options.get("top_k", 0)), options.get("top_p"), options.get("min_p")

    def draw(w: Any) -> Any:
        running = w.cumsum(-1)
        return torch.searchsorted(running, torch.rand((len(w), 1)) * running[:, -1:]).clamp_(max=w.shape[-1] - 1)

    def run() -> Any:
        ids = None
        if k:
            values, ids = torch.topk(z, k)
        elif p is not None:
            values, ids = torch.sort(z, descending=True)
        else:
            values = z
        top = values[:, :1] if ids is not None else values.amax(-1, keepdim=True)
        w = ((values - top) / TEMPERATURE).exp_()
        if p is not None:
            before = w.cumsum(-1)
            w = torch.where(before - w < p * before[:, -1:], w, 0)
        if min_p is not None:
            w = torch.where(w >= min_p, w, 0)
        drawn = draw(w)
        return drawn if ids is None else ids.gather(-1, drawn)

    return Candidate(run)


def _torch_partial_sort(logits: Array, p: float) -> Candidate:
    """Sort only the best, four times as many as long as they do not hold the mass."""
    z = as_torch(np.atleast_2d(logits))
    import torch

    def run() -> Any:
        top = z.amax(-1, keepdim=True)
        total = ((z - top) / TEMPERATURE).exp_().sum(-1, keepdim=True)
        k = 256
        while True:
            values, ids = torch.topk(z, min(k, z.shape[-1]))
            w = ((values - top) / TEMPERATURE).exp_()
            running = w.cumsum(-1)
            if k >= z.shape[-1] or bool((running[:, -1:] >= p * total).all()):
                break
            k *= 4
        w = torch.where(running - w < p * total, w, 0)
        running = w.cumsum(-1)
        return ids.gather(-1, torch.searchsorted(running, torch.rand((len(w), 1)) * running[:, -1:]).clamp_(max=k - 1))

    return Candidate(run)


def _numpy(logits: Array, options: Options) -> Candidate:
    """Write it by hand: one stable sort, or none where nothing needs the order."""
    if unknown := set(options) - {"top_k", "top_p", "min_p"}:
        raise LeftOut(f"by hand without {', '.join(unknown)}")
    k, p, min_p = options.get("top_k"), options.get("top_p"), options.get("min_p")
    rng = np.random.default_rng(0)

    def one(z: Array) -> int:
        order = np.argsort(-z, kind="stable")[: int(k) if k else None] if k or p else None
        values = z if order is None else z[order]
        w = np.exp((values - values.max()) / np.float32(TEMPERATURE))
        if p:
            before = np.cumsum(w)
            w = w[before - w < p * before[-1]]
        if min_p:
            w = np.where(w >= min_p, w, 0)
        running = np.cumsum(w)
        drawn = min(int(np.searchsorted(running, rng.random() * running[-1], "right")), len(w) - 1)
        return drawn if order is None else int(order[drawn])

    table = np.atleast_2d(logits)
    return Candidate(lambda: [one(z) for z in table])


def _llama_cpp(logits: Array, options: Options) -> Candidate:
    """Fill the array of candidates and run a chain of samplers in the default order, as its own loop does."""
    import llama_cpp as llama

    made = {
        "top_n_sigma": lambda n: llama.llama_sampler_init_top_n_sigma(n),
        "top_k": lambda k: llama.llama_sampler_init_top_k(int(k)),
        "typical_p": lambda p: llama.llama_sampler_init_typical(p, 1),
        "top_p": lambda p: llama.llama_sampler_init_top_p(p, 1),
        "min_p": lambda p: llama.llama_sampler_init_min_p(p, 1),
        "xtc_probability": lambda q: llama.llama_sampler_init_xtc(q, options["xtc_threshold"], 1, 1),
    }
    if unknown := set(options) - {*made, "xtc_threshold", "dynamic_temperature_range"}:
        raise LeftOut(f"has no {', '.join(unknown)}")
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for option, build in made.items():
        if option in options:
            llama.llama_sampler_chain_add(chain, build(options[option]))
    spread = options.get("dynamic_temperature_range", 0.0)
    llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_temp_ext(TEMPERATURE, spread, 1.0))
    llama.llama_sampler_chain_add(chain, llama.llama_sampler_init_dist(1))

    table = np.atleast_2d(logits)
    candidates = np.zeros(table.shape[1], [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    ids, first = np.arange(len(candidates), dtype=np.int32), candidates.ctypes.data_as(llama.llama_token_data_p)

    def run() -> list[int]:
        drawn = []
        for row in table:
            candidates["id"], candidates["logit"] = ids, row  # a draw moves them about, and begins with a full array
            array = llama.llama_token_data_array(data=first, size=len(candidates), selected=-1, sorted=False)
            llama.llama_sampler_apply(chain, byref(array))
            drawn.append(array.data[array.selected].id)  # not of candidates: xtc moves data on
        return drawn

    return Candidate(run)
