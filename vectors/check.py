"""Check a sampler against levels 1 and 2; README.md says how. Usage: python check.py module:function [dialect]."""

import collections
import importlib
import json
import pathlib
import struct
import sys


def number(bits):  # 4, 8 or 16 hex digits: bfloat16, float32, float64
    return struct.unpack(">d" if len(bits) == 16 else ">f", bytes.fromhex(bits.ljust(8, "0")))[0]


def numbers(row):  # "3f80*2 c000" is 1, 1, -2
    words = (word.partition("*") for word in row.split())
    return [number(bits) for bits, _, times in words for _ in range(int(times or 1))]


def run(sampler, level, dialect="native"):  # yields each case, what came of it, what was kept, what may be
    file = json.loads((pathlib.Path(__file__).parent / (level + ".json")).read_text())
    if dialect not in file["dialects"]:
        sys.exit(f"dialect: expected one of {', '.join(file['dialects'])}, got {dialect}")
    for case in (case for group in file["groups"] for case in group["cases"]):
        read = {name: numbers if name == "logit_bias" else number for name in case["parameters"]}
        given = {name: read[name](v) if isinstance(v, str) else v for name, v in case["parameters"].items()}
        answers = case["expected"]
        may = list(answers.values()) if case["result"] == "acceptable" else [answers.get(dialect, answers["native"])]
        try:
            kept = sorted(int(token) for token in sampler(numbers(case["logits"]), given))
        except Exception as error:
            kept = "error" if isinstance(error, ValueError) else repr(error)
        missing = str(kept).startswith("NotImplementedError")
        yield case, "passed" if kept in may else "not expressible" if missing else "failed", kept, may


if __name__ == "__main__":
    sys.path.insert(0, "")
    module, _, function = sys.argv[1].partition(":")
    outcomes, flags = collections.Counter(), collections.Counter()
    for level in ("support", "boundaries"):
        for case, outcome, kept, may in run(getattr(importlib.import_module(module), function), level, *sys.argv[2:]):
            outcomes[level, outcome] += 1
            if outcome == "failed":
                flags.update(case["flags"])
                print(case["id"], "kept", kept, "not", " or ".join(map(str, may)), "-", case["comment"])
    print(*(f"{level}: {n} {outcome}" for (level, outcome), n in outcomes.items()), sep="\n")
    print("failed, by flag:", dict(flags))
    sys.exit(bool(flags))
