"""What was measured, kept as JSON under build/bench, and shown: in the terminal, as tables, as a plot.

docs/performance.md has a section for each machine, its tables are a page of their own; a machine's figures take the
place of its own older ones alone.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import headway as hw

from .harness import Result, Row

ROOT = Path(__file__).parent.parent
STORE = ROOT / "build" / "bench"
PAGE = ROOT / "docs" / "performance.md"
TABLES = ROOT / "docs" / "performance"
END = "<!-- machines: end (make bench writes the sections above) -->"
PRICE = "price of the contract"  # its rows have no peer, but ourselves without it
WORTH_SAYING = 0.95  # of it
# What a reader wants to know first, and the sections whose rows say it.
SUMMARY = {
    "prefill": ("prefill",),
    "decode": ("decode",),
    "layer": ("layers",),
    "language model": ("language models",),
    "sampling": ("sampling, one row", "sampling, 32 rows"),
    PRICE: (PRICE,),
}
PEERS = ("torch", "onnxruntime", "openvino", "jax", "transformers", "llama_cpp_python", "numpy")
Stored = dict[str, Any]


def show(row: Row, result: Result, limits: dict[str, float]) -> None:
    """Print a row: each candidate's time, rate, share of the limit, ratio to the best peer, errors."""
    print(f"\n{row.section}: {row.name}")
    for name in sorted(result.times, key=result.times.__getitem__):
        seconds = result.times[name]
        line = f"  {name:<34}{_time(seconds):>10}"
        if row.limit:
            line += f"{row.work / seconds / 1e9:>9.1f} {row.unit}"
            if row.limit in limits:
                line += f"{row.work / seconds / 1e9 / limits[row.limit]:>6.0%} of the limit"
        if name in result.errors:
            rms, largest = result.errors[name]
            line += f"   error rms {rms:.1e}, max {largest:.1e}"
        if name in result.ours and (ratio := result.ratio(name)) is not None:
            line += f"   {ratio:.2f}x the best peer{' <- SLOWER' * (ratio < 1)}"
            line += " <- LESS EXACT" * result.less_exact(name)
        print(line, flush=True)
    for name, why in result.left_out.items():
        print(f"  {name:<34}left out: {why}", flush=True)


def keep(row: Row, result: Result, limits: dict[str, float]) -> None:
    """Add a row to what is stored of this machine, in place of an older measurement of it."""
    about = machine(limits)
    stored = load(about["name"])
    stored["machine"] = about
    entry = {"work": row.work, "limit": row.limit, "limits": limits, **asdict(result)}
    stored.setdefault("rows", {}).setdefault(row.section, {})[row.name] = entry
    STORE.mkdir(parents=True, exist_ok=True)
    _store(about["name"]).write_text(json.dumps(stored, indent=1))


def load(name: str) -> Stored:
    """Return what is stored of the machine of this name."""
    return dict(json.loads(_store(name).read_text())) if _store(name).exists() else {}


def _store(name: str) -> Path:
    return STORE / f"{slug(name)}.json"


def slug(name: str) -> str:
    """Return a machine's name as that of a file."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def machine(limits: dict[str, float]) -> Stored:
    """Say what is measured on: the processor's own name, its instruction set, as headway uses it, and the threads."""
    name, found = platform.processor() or platform.machine(), hw.info()
    if (cpu := Path("/proc/cpuinfo")).exists():
        fields = dict(line.split(":", 1) for line in cpu.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        name = fields.get("model name", name)
        if {"cpu family", "model"} <= set(fields):  # many names are those of a whole family
            name += f", family {fields['cpu family']}, model {fields['model']}"
    versions = {}
    for peer in PEERS:
        try:
            versions[peer] = version(peer)
        except PackageNotFoundError:
            versions[peer] = "not installed"
    name += f": {found.isa}, {found.num_threads} threads"
    today = date.today().isoformat()
    return {
        "name": name,
        "measured": today,
        "held back": found.isa != found.isas[0],
        "versions": versions,
        "limits": limits,
    }


def write(rows: list[Row]) -> None:
    """Write this machine's section, and the page of its tables and its plot, from what is stored."""
    stored = load(machine({})["name"])
    order = {(row.section, row.name): place for place, row in enumerate(rows)}
    sections: dict[str, list[tuple[str, Stored]]] = {}
    for section in dict.fromkeys(row.section for row in rows):
        entries = stored["rows"].get(section, {}).items()
        known = [entry for entry in entries if (section, entry[0]) in order]
        if known:
            sections[section] = sorted(known, key=lambda entry: order[section, entry[0]])
    about = stored["machine"]
    name, file = about["name"], slug(about["name"])
    limits = about["limits"]
    peers = ", ".join(f"{peer} {number}" for peer, number in about["versions"].items())
    origin = (
        f"Measured last on {about['measured']}, beside {peers}. Limits then: {limits.get('fma', 0):.0f} GFLOP/s of "
        f"fused multiply-adds in float32, {limits.get('read', 0):.0f} GB/s read; each share is of those measured "
        f"with its row."
    )
    if about["held back"]:
        origin += " `HEADWAY_ISA` keeps headway from the best instructions of this processor; the peers use them."
    page = [f"# Measured on {name}", "", "[How it is measured](../performance.md#how-it-is-measured)", "", origin, ""]
    if "prefill" in sections:
        plot(stored, TABLES / f"{file}.svg")
        page += [f"![Prefill and decoding, headway beside its peers]({file}.svg)", ""]
    for section, entries in sections.items():
        page += [f"## {section[0].upper()}{section[1:]}", "", *_table(entries), ""]
    TABLES.mkdir(parents=True, exist_ok=True)
    (TABLES / f"{file}.md").write_text("\n".join(page))
    begin, end = f"<!-- machine {file} -->", f"<!-- end of {file} -->"
    lines = [
        begin,
        "",
        f"### {name}",
        "",
        f"Measured last on {about['measured']}.",
        "",
        *_summary(sections),
        "",
        *_lost(sections),
    ]
    lines += [f"[All rows](performance/{file}.md), with versions, limits and errors.", "", end, "", ""]
    text = PAGE.read_text()
    before, old, rest = text.partition(begin)
    if old:
        rest = rest.partition(end)[2].lstrip("\n")
    else:
        before, _, rest = text.partition(END)
        rest = END + rest
    PAGE.write_text(before + "\n".join(lines) + rest)


def _results(entries: list[tuple[str, Stored]]) -> Iterator[tuple[str, Stored, Result]]:
    for name, entry in entries:
        yield name, entry, Result(**{key: entry[key] for key in ("times", "errors", "left_out", "floors")})


def _summary(sections: dict[str, list[tuple[str, Stored]]]) -> list[str]:
    """A line for each kind of work: the median of its rows, the least and the most."""

    def spread(values: list[float], form: str) -> str:
        if not values:
            return ""
        return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    lines = ["| | best peer / headway | of limit |", "|---|---|---|"]
    for title, names in SUMMARY.items():
        ratios, shares = [], []
        for _, entry, result in _results([entry for name in names for entry in sections.get(name, [])]):
            for ours in result.ours:
                ratios += [ratio] if (ratio := result.ratio(ours)) is not None else []
                if limit := entry["limits"].get(entry["limit"]):
                    shares.append(entry["work"] / result.times[ours] / 1e9 / limit)
        lines.append(f"| {title} | {spread(ratios, '.2f')} | {spread(shares, '.0%')} |".replace("|  |", "| |"))
    return lines


def _lost(sections: dict[str, list[tuple[str, Stored]]]) -> list[str]:
    """The rows on which a peer is faster."""
    lost = [
        (ratio, f"{section}: {name}{ours.removeprefix('headway')}", result.times[ours], result.peers[0])
        for section, entries in sections.items()
        for name, _, result in _results(entries)
        for ours in result.ours
        if (ratio := result.ratio(ours)) is not None and ratio < (WORTH_SAYING if section == PRICE else 1)
    ]
    if not lost:
        return ["headway is the fastest on every row.", ""]
    lines = ["Rows on which a peer is faster:", "", "| | headway | fastest | fastest / headway |", "|---|---|---|---|"]
    return [*lines, *(f"| {row} | {_time(ours)} | {peer} | {r:.2f} |" for r, row, ours, peer in sorted(lost)), ""]


def _table(entries: list[tuple[str, Stored]]) -> list[str]:
    results = {name: result for name, _, result in _results(entries)}
    peers = sorted({peer.partition(",")[0] for result in results.values() for peer in result.peers}, key=_peer_order)
    floors = sorted({floor for result in results.values() for floor in result.floors if not result.errors})
    rated = any(entry["limit"] for _, entry in entries)
    judged = any(result.errors for result in results.values())
    titles = ["", "headway", *["rate", "of limit"] * rated, *floors, *peers, *["best peer / headway"] * bool(peers)]
    titles += ["rms error: headway, best peer"] * judged
    lines = [f"| {' | '.join(titles)} |".replace("|  |", "| |"), "|---" * len(titles) + "|"]
    for name, entry in entries:
        result = results[name]
        for ours in result.ours:
            seconds = result.times[ours]
            cells = [name + ours.removeprefix("headway"), _time(seconds)]
            if rated:
                rate = entry["work"] / seconds / 1e9 if entry["limit"] else 0.0
                limit = entry["limits"].get(entry["limit"])
                unit = {"": "", "read": " GB/s"}.get(entry["limit"], " GFLOP/s")
                cells += [f"{rate:.3g}{unit}" if rate else "", f"{rate / limit:.0%}" if limit else ""]
            cells += [_time(result.times[floor]) if floor in result.times else "-" for floor in floors]
            for peer in peers:
                best = [t for n, t in result.times.items() if n.partition(",")[0] == peer and n not in result.floors]
                cells.append(_time(min(best)) if best else "-")
            if peers:
                ratio = result.ratio(ours)
                cells.append("" if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**")
            if judged:
                errors = [f"{result.errors[n][0]:.1e}" for n in (ours, result.exact_peer) if n in result.errors]
                if result.errors and result.less_exact(ours):
                    errors[0] = f"**{errors[0]}**"
                cells.append(", ".join(errors))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _peer_order(name: str) -> int:
    known = ("transformers", "llama.cpp", "torch", "torch by hand", "onnxruntime", "OpenVINO", "JAX", "NumPy")
    return known.index(name) if name in known else len(known)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def plot(stored: Stored, to: Path) -> None:
    """Draw prefill and decode, each with the machine's limit."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "headway", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False})
    plt.rcParams["axes.spines.right"] = False
    colours = {"headway": "#b3261e", "torch": "#6b6b6b", "onnxruntime": "#2a6f97", "OpenVINO": "#7b5ea7"}
    colours |= {"JAX": "#c58b1b", "NumPy": "#8aa399"}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=(4, 4, 3))
    prefill, limits = stored["rows"].get("prefill", {}), stored["machine"]["limits"]
    for axes, suffix, title in ((left, "", "prefill, D = 64"), (middle, ", causal", "prefill, causal, D = 64")):
        chosen = {
            L: prefill.get(f"{2 if L == 16384 else 12} heads, L={L}, D=64{suffix}")
            for L in (16, 128, 512, 2048, 4096, 16384)
        }
        for name, colour in colours.items():
            points = [
                (L, entry["work"] / min(times) / 1e9)
                for L, entry in chosen.items()
                if entry
                if (times := [t for n, t in entry["times"].items() if n.partition(",")[0] == name])
            ]
            if points:
                style = {"linewidth": 2.2, "zorder": 3} if name == "headway" else {"linewidth": 1.2}
                axes.plot(*zip(*points), marker="o", markersize=3, color=colour, label=name, **style)
        if "fma" in limits:
            axes.axhline(limits["fma"], color="black", linewidth=0.8, linestyle=":")
            axes.annotate("FMA peak", (16, limits["fma"]), xytext=(0, 3), textcoords="offset points")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, max(limits.get("fma", 0) * 1.12, 1))
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("sequence length L")
        axes.set_ylabel("GFLOP/s")
    decode = {name: e for name, e in stored["rows"].get("decode", {}).items() if "S=4096" in name or "S=32768" in name}
    decode = {name: e for name, e in decode.items() if name.startswith(("32 over", "8 over 8", "64 over"))}
    for place, entry in enumerate(decode.values()):
        best: dict[str, float] = {}
        for candidate, seconds in entry["times"].items():
            key = candidate if candidate.startswith("headway") else candidate.partition(",")[0]
            best[key] = min(best.get(key, 1e9), seconds)
        for candidate, seconds in best.items():
            base = candidate.partition(",")[0]
            marker = "D" if candidate == "headway, KVCache" else "d" if base == "headway" else "o"
            right.plot(entry["work"] / seconds / 1e9, -place, marker, color=colours.get(base, "black"), markersize=5)
    if "read" in limits:
        right.axvline(limits["read"], color="black", linewidth=0.8, linestyle=":")
        right.annotate("read bandwidth", (limits["read"], 0.4), ha="right", fontsize=8)
    right.set_yticks([-place for place in range(len(decode))])
    right.set_yticklabels([name.replace(" heads, ", "\n") for name in decode], fontsize=8)
    right.set_xlim(0)
    right.set_ylim(-len(decode) + 0.4, 0.9)
    right.set_xlabel("GB/s of keys and values")
    right.set_title("decode (wide: KVCache)", loc="left", fontsize=10)
    names = left.get_legend_handles_labels()
    figure.legend(*names, loc="lower center", ncol=len(colours), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Date": None})
    plt.close(figure)
