"""Print which laws of bits a transformers model obeys: stock, and with headway inside.

    python examples/transformers_bits.py [FOLDER]

FOLDER holds a causal language model of transformers; without it, the model that ships with headway is taken.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import headway as hw
import headway.lm
from headway.integrations.transformers import disable, enable

LENGTHS = (48, 17, 33, 1)  # tokens of each row of the batch


def main(folder: str) -> None:
    """Print the table."""
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    print(f"{folder}\n")
    print(f"{'':34}{'float32':>24}{'bfloat16':>24}")
    print(f"{'':34}{'stock':>12}{'headway':>12}" + f"{'stock':>12}{'headway':>12}")
    found: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ids = torch.randint(3, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)))
        for change in (disable, lambda m: enable(m, linear=True, norms=True)):
            for law, off in laws(change(model), ids).items():
                found.setdefault(law, []).append("equal" if off == 0 else f"off {off:.0e}")
    for law, cells in found.items():
        print(f"{law:<34}" + "".join(f"{cell:>12}" for cell in cells))


@torch.no_grad()
def laws(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Return for each law by how much logits are off it."""
    alone = [model(ids[i : i + 1, :n]).logits[0] for i, n in enumerate(LENGTHS)]
    off = {}
    for side in ("left", "right"):
        mask = torch.zeros_like(ids)
        padded = torch.zeros_like(ids)
        for row, n in enumerate(LENGTHS):
            place = slice(-n, None) if side == "left" else slice(n)
            mask[row, place], padded[row, place] = 1, ids[row, :n]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        rows = logits.split(LENGTHS)
        off[f"padded on the {side} == alone"] = most(zip(rows, alone))
    whole = model(ids).logits
    off["in a batch == alone"] = most([(whole[0], alone[0])])
    start, parts, cache = 0, [], None
    for n in (16, *[1] * (ids.shape[1] - 16)):
        out = model(ids[:, start : start + n], use_cache=True, **({} if cache is None else {named(model): cache}))
        cache = out[named(model)]
        parts.append(out.logits)
        start += n
    off["token by token == at once"] = most([(torch.cat(parts, 1), whole)])
    before = torch.get_num_threads(), hw.get_num_threads()
    torch.set_num_threads(1)
    hw.set_num_threads(1)
    off["1 thread == all threads"] = most([(model(ids).logits, whole)])
    torch.set_num_threads(before[0])
    hw.set_num_threads(before[1])
    return off


def named(model: Any) -> str:
    """Return what the model's forward calls its cache: transformers 5 has changed the name."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def most(pairs: Any) -> float:
    """Return the largest difference."""
    return max(float((a.float() - b.float()).abs().max()) for a, b in pairs)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(headway.lm.__file__).with_name("model")))
