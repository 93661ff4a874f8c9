"""Break headway one line at a time, and see its tests notice: ``make mutants``.

A mutant is one line of src/ with a mistake in it: a bound, a tail that is dropped, a tie that goes to the other side.
It is built and tested in a copy of the tree, by the tests that should see it, and is caught where one of them fails.
One that survives is an error: a test is missing. What changes no result is no mutant; EQUIVALENT says why, for those
that look like one. ``--only TEXT`` takes the mutants with this in their file or text.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nanobind

import headway

ROOT = Path(__file__).parent.parent
CORE, PYTHON = "src/core", "src/headway"
WORKERS = 2
TIMEOUT = 300  # seconds: a mutant that never ends is caught


class Mutant(NamedTuple):
    """One line, what becomes of it, and the arguments of pytest that should fail then."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    table: str = ""  # the table of kernels that has the line; by default the best of this machine


def tests(*names: str) -> tuple[str, ...]:
    """Files of tests, wherever in tests/ they are."""
    return tuple(str(path.relative_to(ROOT)) for name in names for path in (ROOT / "tests").rglob(f"test_{name}.py"))


BITS = ("tests/test_machine.py::test_the_bits_are_those_recorded_for_this_version_of_the_contract",)
BALANCE = ("tests/test_machine.py::test_threads_end_together",)
ATTENTION = tests("attention_semantics", "attention", "attention_laws")
RANGE = tests("attention_range")
PARTS = tests("attention_laws", "attention", "attention_semantics")
CACHE = tests("cache")
LAYERS = tests("layers")
SAMPLING = tests("sampling_semantics", "sample")
STAGES = tests("sampling_semantics", "vectors", "sample")
DIALECTS = tests("dialects", "sampling_semantics", "vectors")
SERVING = tests("serving_semantics", "penalties", "logprobs", "speculative", "sampler")
INTERRUPT = tests("interrupt")
LM = tests("model", "checkpoint", "text")

MUTANTS = [
    # Attention: which keys a row reaches.
    Mutant(
        f"{CORE}/attention/attention.h", "position - task.window_left;", "position - task.window_left + 1;", ATTENTION
    ),
    Mutant(
        f"{CORE}/attention/attention.h", "position + task.window_right + 1)", "position + task.window_right)", ATTENTION
    ),
    Mutant(f"{CORE}/attention/attention.h", "min(n, position + 1) : n", "min(n, position) : n", ATTENTION),
    Mutant(
        f"{CORE}/attention/attention.h",
        "task.bottom_right ? n - task.L",
        "task.bottom_right ? task.total - task.L",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/attention.h", "max(from - task.key_offset, first_key)", "max(from, first_key)", PARTS),
    Mutant(
        f"{CORE}/attention/attention.h",
        "row.high = min(max(high[r] - chunk(), 0), kChunk);",
        "row.high = kChunk;",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "if (a < b) t.from = min(t.from, a)",
        "if (a < b) t.from = max(t.from, a)",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/softmax.h", "key >= Vec<Int>(Int(row.low))", "key > Vec<Int>(Int(row.low))", ATTENTION),
    Mutant(f"{CORE}/attention/softmax.h", "key < Vec<Int>(Int(row.high))", "key <= Vec<Int>(Int(row.high))", ATTENTION),
    Mutant(
        f"{CORE}/attention/softmax.h",
        "load_integers<Int>(row.mask + j) != Vec<Int>(Int(0))",
        "load_integers<Int>(row.mask + j) == Vec<Int>(Int(0))",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/softmax.h",
        "row.high - j) != Vec<T>(-T(kInfinity))",
        "row.high - j) != Vec<T>(Constants<T>::lowest)",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/operands.h", "(rows.repeat == 1 || task.L == 1)", "true", ATTENTION),
    Mutant(
        f"{CORE}/attention/operands.h",
        "group * repeat + (first + r) % repeat",
        "group + (first + r) % repeat * repeat",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/ground/rows.h", "index % batch.shape[i] * v.batch[i]", "index % batch.shape[i] * v.batch[0]", ATTENTION
    ),
    # Attention: scores, softmax, the tree over chunks.
    Mutant(f"{CORE}/attention/softmax.h", "x = Vec<T>(softcap) * tanh(x", "x = tanh(x", ATTENTION),
    Mutant(f"{CORE}/attention/softmax.h", "softcap == 0 && scale > 0", "softcap == 0 && scale != 0", ATTENTION),
    Mutant(f"{CORE}/attention/softmax.h", "if (!any(seen)) return -T(kInfinity);", "", ATTENTION),
    Mutant(
        f"{CORE}/attention/softmax.h",
        "return m > Constants<T>::lowest ? m : Constants<T>::lowest;",
        "return m;",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/softmax.h", "poison = low * Vec<T>(T(0)) + lost;", "poison = lost;", RANGE),
    Mutant(f"{CORE}/attention/softmax.h", "low * Vec<T>(T(0)) + lost;", "low * Vec<T>(T(0));", RANGE),
    Mutant(
        f"{CORE}/attention/softmax.h", "min(select(keep, product, Vec<T>(T(0))), low)", "min(product, low)", ATTENTION
    ),
    Mutant(f"{CORE}/attention/attention.h", "results.note_lost(any(poison != poison));", "", RANGE),
    Mutant(
        f"{CORE}/attention/attention.h", "keep_a = maximum >= b_maximum", "keep_a = maximum <= b_maximum", ATTENTION
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "fma(b, weight, a) : fma(a, weight, b)",
        "b * weight + a : a * weight + b",
        BITS,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "joined(Vec<T>(total), Vec<T>(b_total)).store(lane);",
        "(Vec<T>(total) + Vec<T>(b_total)).store(lane);",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/attention.h", "m + log(total)", "log(total)", ATTENTION),
    Mutant(
        f"{CORE}/attention/attention.h",
        "total = total * scale + exp(sink - joint);",
        "total = total * scale;",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "load(s.sum + e) * Vec<T>(scale);",
        "load(s.sum + e);",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "if (!t.begun || t.from >= link) continue;",
        "if (t.from >= link) continue;",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "if (task.mask.data || task.bias.data) return",
        "if (task.mask.data) return",
        ATTENTION,
    ),
    Mutant(
        f"{CORE}/attention/attention.h",
        "operands.poisoned(t.from, t.all_from, t.bands) || operands.poisoned(t.all_to",
        "operands.poisoned(t.all_to",
        ATTENTION,
    ),
    Mutant(f"{CORE}/attention/attention.h", "if (!keep[i]) continue;", "", ATTENTION),
    Mutant(
        f"{CORE}/attention/attention.h",
        "stack.push(first_chunk + chunk() / kChunk,",
        "stack.push(chunk() / kChunk,",
        PARTS,
    ),
    Mutant(f"{CORE}/attention/attention.h", "nothing ? T(0) : canonical(s.sum", "canonical(s.sum", PARTS),
    Mutant(
        f"{CORE}/ground/tree.h",
        "meeting_level(below, top) >= meeting_level(top, next)",
        "meeting_level(below, top) < meeting_level(top, next)",
        (*PARTS, *BITS),
    ),
    Mutant(f"{CORE}/ground/tree.h", "size > 1 ? chunk[size - 2] : before;", "size > 1 ? chunk[size - 2] : -1;", PARTS),
    Mutant(f"{CORE}/ground/gemm.h", "for (; j + 16 * P <= columns;", "for (; j + 16 * P < columns;", ATTENTION),
    Mutant(f"{CORE}/ground/gemm.h", "run.template operator()<2, 2 * vecs>();", "", ATTENTION),
    Mutant(f"{CORE}/ground/gemm.h", "  if (accumulate)", "  if (false)", ATTENTION),
    Mutant(
        f"{CORE}/ground/gemm.h",
        "sum[r][p] = fma(x, row[p], sum[r][p]);",
        "sum[r][p] = x * row[p] + sum[r][p];",
        BITS,
    ),
    Mutant(
        f"{CORE}/ground/vec.h",
        "op(v.part[i], v.part[i + half])",
        "op(v.part[i], v.part[2 * i + 1])",
        ATTENTION,
        "portable",
    ),
    Mutant(
        f"{CORE}/ground/vec.h",
        "op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7))",
        "op(__builtin_shufflevector(v, v, 0, 2, 4, 6), __builtin_shufflevector(v, v, 1, 3, 5, 7))",
        BITS,
    ),
    Mutant(f"{CORE}/ground/vec.h", "& ((s & 1) == 0)", "& (s == s)", BITS, "portable"),
    Mutant(f"{CORE}/ground/exp.h", "r = fma(n, Vec<T>(-C::ln2_low), r);", "", ATTENTION),
    Mutant(f"{CORE}/ground/exp.h", "tanh_one = 10.0f", "tanh_one = 4.0f", ATTENTION),
    # Numbers of 16 bits.
    Mutant(f"{CORE}/ground/rows.h", "  u |= 1;\n", "", (*ATTENTION, *LAYERS, *tests("arrays", "cache"))),
    Mutant(f"{CORE}/ground/vec.h", "+ 0xfff + (u >> 13 & 1)", "+ 0x1000", CACHE),
    Mutant(f"{CORE}/ground/vec.h", "u + 0x7fff + (u >> 16 & 1)", "u + 0x8000", CACHE),
    # Layers.
    Mutant(f"{CORE}/layers/linear.h", "sum[j] += column[j];", "sum[j] = column[j];", LAYERS),
    Mutant(f"{CORE}/layers/linear.h", "if (task.K == 0) memset", "if (task.K < 0) memset", LAYERS),
    Mutant(f"{CORE}/layers/linear.h", "min(k + depth, task.K); ++i", "min(k + depth, task.K - 1); ++i", LAYERS),
    Mutant(f"{CORE}/layers/linear.h", "first / 16, k), task.w.dtype", "first / 16, 0), task.w.dtype", LAYERS),
    Mutant(
        f"{CORE}/layers/layers.h",
        "turned[i] = left - row[i + half] * s;",
        "turned[i] = left + row[i + half] * s;",
        LAYERS,
    ),
    Mutant(f"{CORE}/layers/layers.h", "if (position != known)", "if (known < 0)", LAYERS),
    Mutant(f"{CORE}/layers/layers.h", "double(n) + task.eps", "double(n)", LAYERS),
    Mutant(
        f"{CORE}/layers/layers.h", "sigmoid = select(g > zero, one, e)", "sigmoid = select(g > zero, e, one)", LAYERS
    ),
    Mutant(
        f"{CORE}/ground/exp.h",
        "(quadrant + Vec<int64_t>(1)) & Vec<int64_t>(2)",
        "(quadrant & Vec<int64_t>(2))",
        LAYERS,
    ),
    # How tasks are cut into units.
    Mutant(
        f"{CORE}/layers/linear.h",
        "(least + threads - 1) / threads * threads : least",
        "least : least",
        BALANCE,
    ),
    Mutant(f"{CORE}/ground/makespan.h", "late = rests > idle ? rests - idle : 0;", "late = 0;", BALANCE),
    Mutant(f"{CORE}/ground/makespan.h", "if (end >= 0 && other >= end) return false;", "", BALANCE),
    Mutant(
        f"{CORE}/attention/attention.h",
        "task.causal ? blocks - 1 - place / together : place",
        "task.causal ? place / together : place",
        BALANCE,
    ),
    # A row of logits, and the draw.
    Mutant(
        f"{CORE}/sampling/sampling.h",
        "allowed[v / 8 * stride] | allowed[(v / 8 + 1) * stride] << 8",
        "allowed[v / 8 * stride] << 8 | allowed[(v / 8 + 1) * stride]",
        SAMPLING,
    ),
    Mutant(f"{CORE}/sampling/sampling.h", "        nan = nan | (x != x);\n", "", SAMPLING),
    Mutant(f"{CORE}/sampling/sampling.h", "if (top[i] > top[0] || top[i] != top[i])", "if (top[i] > top[0])", SAMPLING),
    Mutant(f"{CORE}/sampling/sampling.h", "if (here <= target) {", "if (here < target) {", SAMPLING),
    Mutant(f"{CORE}/sampling/sampling.h", "one[i] <= target)", "one[i] < target)", SAMPLING),
    Mutant(f"{CORE}/sampling/sampling.h", "mass[i] <= target)", "mass[i] < target)", SAMPLING),
    Mutant(f"{CORE}/sampling/sampling.h", "    total -= mass[i];\n", "", (*SERVING, *tests("sample_statistics"))),
    Mutant(f"{CORE}/ground/rng.h", "round < 10;", "round < 9;", SAMPLING),
    Mutant(f"{CORE}/ground/rng.h", "x[0] = high1 ^ x[1] ^ seed;", "x[0] = high1 ^ x[1] ^ stream;", SAMPLING),
    Mutant(f"{CORE}/ground/rng.h", "block{{position, draw, 0, 0}}", "block{{draw, position, 0, 0}}", SAMPLING),
    Mutant(f"{CORE}/sampling/stages.h", "philox(task.seed[index], ", "philox(task.position[index], ", SAMPLING),
    Mutant(f"{CORE}/sampling/masses.h", "min(44, 62 - log2_up)", "min(43, 62 - log2_up)", SAMPLING),
    Mutant(
        f"{CORE}/sampling/masses.h",
        "shifted = x * F(0x1.715476p+0f) + round;",
        "shifted = fma(x, F(0x1.715476p+0f), round);",
        SAMPLING,
    ),
    Mutant(f"{CORE}/sampling/masses.h", "((product & ((Wide(1) << e) - 1)) != 0 || !equal)", "!equal", STAGES),
    Mutant(
        f"{CORE}/sampling/masses.h",
        "largest = 0x1.fffffep+127;\n  return inverse < 0x1p-126 ?",
        "largest = 0x1.fffffep+127;\n  return inverse < 0 ?",
        SAMPLING,
    ),
    # What stays.
    Mutant(f"{CORE}/sampling/selection.h", "bits<int32_t>(z + Vec<float>(0.0f))", "bits<int32_t>(z)", SAMPLING),
    Mutant(
        f"{CORE}/sampling/selection.h", "rule == Ties::highest_id ? left - ties : 0", "0", (*STAGES, *tests("dialects"))
    ),
    Mutant(f"{CORE}/sampling/selection.h", "if (rule == Ties::keep) ties = left;", "", STAGES),
    Mutant(
        f"{CORE}/sampling/selection.h",
        "while (ties < left && target > 0)",
        "while (ties < left && target >= 0)",
        STAGES,
    ),
    Mutant(f"{CORE}/sampling/selection.h", "end.skip -= skip, end.ties -= take;", "end.skip -= skip;", STAGES),
    Mutant(f"{CORE}/sampling/selection.h", "if (here >= target", "if (here > target", STAGES),
    Mutant(f"{CORE}/sampling/selection.h", "kept.total -= reduce_sum(removed);", "", STAGES),
    Mutant(
        f"{CORE}/sampling/selection.h",
        "        above = above + (convert<int64_t>(x > high)",
        "        above = above + (convert<int64_t>(x >= high)",
        STAGES,
    ),
    Mutant(f"{CORE}/sampling/stages.h", "  n = max(n, row.floor);\n", "", STAGES),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "row.space.block_max[b] < bounds.low",
        "row.space.block_max[b] < bounds.high",
        STAGES,
    ),
    Mutant(f"{CORE}/sampling/stages.h", "w[v] >= enough", "w[v] > enough", STAGES),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "if (mass > int64_t(1) << row.scale.s)",
        "if (mass >= int64_t(1) << row.scale.s)",
        STAGES,
    ),
    Mutant(f"{CORE}/sampling/stages.h", "  row.scale.top = best;\n", "", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "low = t > range ? t - range : 0", "low = t - range", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "double(z) - top >= -below", "double(z) - top > -below", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "mean * mean;", "mean;", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "if (k < double(row.tokens.n))", "if (k + 1 < double(row.tokens.n))", STAGES),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "target = least_mass(p, row.tokens.total, !step.equal);\n  // At",
        "target = least_mass(p, row.tokens.total);\n  // At",
        (*STAGES, *tests("dialects")),
    ),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "if (count < row.floor) return keep_first",
        "if (count <= 0) return keep_first",
        STAGES,
    ),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "min(least_mass(epsilon, all.total), least_mass(__builtin_sqrt",
        "max(least_mass(epsilon, all.total), least_mass(__builtin_sqrt",
        STAGES,
    ),
    Mutant(
        f"{CORE}/sampling/stages.h",
        "random_block(row.task, row.index).word[1]",
        "random_block(row.task, row.index).word[0]",
        SAMPLING,
    ),
    Mutant(f"{CORE}/sampling/stages.h", "if (top < 2) return;", "if (top < 3) return;", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "[i] <= last_z)", "[i] < last_z)", STAGES),
    Mutant(f"{CORE}/sampling/stages.h", "if (count < floor) count", "if (count < 0) count", STAGES),
    # Places, penalties, drafts.
    Mutant(f"{CORE}/sampling/logprobs.h", "found += z[i] >= bound;", "found += z[i] > bound;", SERVING),
    Mutant(f"{CORE}/sampling/logprobs.h", "(double(z) - best) - sum", "(double(z) - best)", SERVING),
    Mutant(
        f"{CORE}/sampling/logprobs.h",
        "if (z == -kInfinity || (processed && mass == 0))",
        "if (z == -kInfinity)",
        SERVING,
    ),
    Mutant(f"{CORE}/sampling/penalties.h", "z > 0 ? z / repetition : z * repetition", "z / repetition", SERVING),
    Mutant(
        f"{CORE}/sampling/penalties.h", "if (length < allowed_length ||", "if (length <= allowed_length ||", SERVING
    ),
    Mutant(f"{CORE}/sampling/penalties.h", "same[j] = min(same[j], tail);", "same[j] = same[j];", SERVING),
    Mutant(
        f"{CORE}/sampling/penalties.h",
        "if (j + m > right) left = j, right = j + m;",
        "if (j + m > right) left = j, right = m;",
        SERVING,
    ),
    Mutant(f"{CORE}/sampling/penalties.h", "(same[j] + 1) & goes_on : 0", "same[j] & goes_on : 0", SERVING),
    Mutant(f"{CORE}/sampling/speculative.h", "share_of(random.word[2], had)", "share_of(random.word[0], had)", SERVING),
    Mutant(
        f"{CORE}/sampling/speculative.h", "share_of(random.word[3], total)", "share_of(random.word[0], total)", SERVING
    ),
    Mutant(f"{CORE}/sampling/speculative.h", "visit(id, has - had)", "visit(id, has)", SERVING),
    Mutant(f"{CORE}/sampling/speculative.h", "      left -= mass;\n", "", SERVING),
    # The Python layer.
    Mutant(
        f"{PYTHON}/_attention/call.py",
        "if heads < 1 or q_heads % heads:",
        "if heads < 1:",
        tests("errors", "attention"),
    ),
    Mutant(f"{PYTHON}/_attention/call.py", "total=key_offset + keys,", "total=keys,", PARTS),
    Mutant(
        f"{PYTHON}/_attention/call.py",
        "causal=causal not in (None, False),",
        'causal=causal == "bottom_right",',
        ATTENTION,
    ),
    Mutant(f"{PYTHON}/_attention/cache.py", "        self._shared = True\n", "", CACHE),
    Mutant(f"{CORE}/bindings.cpp", "+ token % kLanes * item;", "+ (kLanes - 1 - token % kLanes) * item;", CACHE),
    Mutant(
        f"{PYTHON}/_attention/cache.py",
        "if length > room or self._shared:",
        "if length >= room + LANES or self._shared:",
        CACHE,
    ),
    Mutant(
        f"{PYTHON}/_attention/multihead.py",
        'else (groups, "num_kv_heads")',
        'else (heads, "num_kv_heads")',
        tests("multihead"),
    ),
    Mutant(
        f"{PYTHON}/_arrays.py",
        '<= set(dtypes) and widest == "float16" else',
        "<= set(dtypes) else",
        tests("arrays", "attention"),
    ),
    Mutant(f"{PYTHON}/_check.py", "or int(array.max()) > high", "or int(array.max()) >= high", (*LAYERS, *LM, *CACHE)),
    Mutant(
        f"{PYTHON}/_sampling/dialects.py",
        'Step("top_k", "keep"),\n            Step("top_p", "highest_id"),',
        'Step("top_k"),\n            Step("top_p", "highest_id"),',
        DIALECTS,
    ),
    Mutant(
        f"{PYTHON}/_sampling/dialects.py",
        '(Step("temperature"), Step("min_p"), Step("top_k", "keep"), Step("top_p", "highest_id"))',
        '(Step("temperature"), Step("top_k", "keep"), Step("top_p", "highest_id"), Step("min_p"))',
        DIALECTS,
    ),
    Mutant(f"{PYTHON}/_sampling/dialects.py", 'Step("top_n_sigma", floor=False),', 'Step("top_n_sigma"),', DIALECTS),
    Mutant(f"{PYTHON}/_sampling/dialects.py", 'Step("typical_p", equal=True),', 'Step("typical_p"),', DIALECTS),
    Mutant(
        f"{PYTHON}/_sampling/dialects.py",
        'Step("top_p", equal=True), Step("top_k"), Step("min_p")',
        'Step("top_k"), Step("top_p", equal=True), Step("min_p")',
        DIALECTS,
    ),
    Mutant(
        f"{PYTHON}/_sampling/dialects.py",
        'Step("xtc_probability", "keep", floor=False),',
        'Step("xtc_probability", floor=False),',
        DIALECTS,
    ),
    Mutant(
        f"{PYTHON}/_sampling/dialects.py", "math.nextafter(0.01, 0), 0.01", "math.nextafter(0.01, 0), 0.02", DIALECTS
    ),
    Mutant(
        f"{PYTHON}/_sampling/rows.py",
        "0 <= ids.min() <= ids.max() < vocabulary):",
        "0 <= ids.min() <= ids.max() <= vocabulary):",
        tests("sampling_errors", "sample"),
    ),
    Mutant(f"{PYTHON}/_sampling/logprobs.py", "np.argsort(-keys[part],", "np.argsort(keys[part],", SERVING),
    Mutant(
        f"{PYTHON}/_sampling/sampler.py",
        "active.position[...] += _ONE",
        "active.position[...] += np.uint64(1)",
        INTERRUPT,
    ),
    Mutant(f"{PYTHON}/_check.py", "return method(self, *args, **kwargs)", "method(self, *args, **kwargs)", CACHE),
    Mutant(f"{PYTHON}/_check.py", "                    raise RuntimeError(message)", "                    pass", CACHE),
    Mutant(f"{PYTHON}/_check.py", '                    del state["_turn"]', "                    pass", CACHE),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "        active.position[...] += _ONE\n", "", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "own & self._bools(mask)", "own | self._bools(mask)", SERVING),
    Mutant(f"{PYTHON}/lm/text.py", "_, end = min(found)", "_, end = max(found)", LM),
    Mutant(f"{PYTHON}/lm/text.py", "for n in range(len(stop)) if", "for n in range(len(stop) - 1) if", LM),
    Mutant(f"{PYTHON}/_sampling/bans.py", "drawn < self.min_tokens", "drawn <= self.min_tokens", SERVING),
    Mutant(f"{PYTHON}/_sampling/bans.py", "history.size >= self.ngram", "history.size > self.ngram", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "self._bools(mask).copy()", "self._bools(mask)", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "        active.position[this] -= back\n", "", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "np.uint64(prompt.size + output.size)", "np.uint64(output.size)", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "np.uint64(prompt.size + output.size)", "np.uint64(prompt.size)", SERVING),
    Mutant(f"{PYTHON}/_sampling/sampler.py", "np.concatenate([known, output])", "known", SERVING),
    Mutant(
        f"{PYTHON}/lm/model.py", "[grammar([*self.output_ids, *self.token_ids])]", "[grammar([*self.token_ids])]", LM
    ),
    Mutant(f"{PYTHON}/lm/model.py", "DEFAULTS if params is None else params", "params or hw.SamplingParams()", SERVING),
    Mutant(f"{PYTHON}/lm/session.py", "np.arange(start, start + self._rows)", "np.arange(self._rows)", LM),
    Mutant(f"{PYTHON}/lm/session.py", "                cache.truncate(self._length)\n", "                pass\n", LM),
    Mutant(
        f"{PYTHON}/lm/model.py",
        "if len(session) + len(new) == model.config",
        "if len(session) + len(new) > model.config",
        LM,
    ),
]

# Changes that look like mistakes and change no result: (file, old, new, why).
EQUIVALENT = [
    (
        f"{PYTHON}/_sampling/speculative.py",
        "np.where(np.arange(n) < accepted[:, None]",
        "np.where(np.arange(n) <= accepted[:, None]",
        "The place after the accepted tokens is written over by the next token in the line after.",
    ),
    (
        f"{CORE}/ground/vec.h",
        "if (u >= 0x477ff000)",
        "if (u > 0x477ff000)",
        "65,520 itself is halfway between the largest number, which is odd, and 2^16, whose bits as a half are "
        "infinity: the line after makes that of it.",
    ),
    (
        f"{CORE}/sampling/sampling.h",
        "totals[t] <= target)",
        "totals[t] < target)",
        "Where the draw falls on the end of a stretch, the loop over blocks goes on into the next one.",
    ),
    (
        f"{CORE}/ground/tree.h",
        "meeting_level(below, top) >= meeting_level(top, next)",
        "meeting_level(below, top) > meeting_level(top, next)",
        "The levels are never equal: if below < top differ first in bit n, top has it set; if top < next differed "
        "first in the same bit, top would have it clear.",
    ),
    (
        f"{CORE}/ground/exp.h",
        "fma(tail, scale, scale)",
        "tail * scale + scale",
        "scale is a power of two, so that the product is exact where the result is a normal number; results below "
        "that are 0.",
    ),
    (
        f"{CORE}/layers/linear.h",
        "stack.push(k / kChain, joiner)",
        "stack.push(k, joiner)",
        "k is a multiple of kChain, a power of two: all levels of the tree rise by the same number.",
    ),
    (
        f"{CORE}/sampling/speculative.h",
        "if (has > had && !visit(id, has - had)) return;",
        "if (has >= had && !visit(id, has - had)) return;",
        "A mass of 0 adds nothing to the total, and no place of the draw lies in it.",
    ),
    (
        f"{CORE}/sampling/penalties.h",
        "z > 0 ? z / repetition : z * repetition",
        "z >= 0 ? z / repetition : z * repetition",
        "0 divided by the penalty and 0 times it are 0 of the same sign.",
    ),
    (
        f"{CORE}/sampling/stages.h",
        "if (over < n) {",
        "if (over <= n) {",
        "Where exactly n tokens lie above the bound, none of its equals is needed: the same n tokens are chosen. "
        "With Ties::keep the n-th is above the bound, so that its equals are too.",
    ),
]


class Place:
    """A copy of the tree with a build of one table, and a Python that imports it. A mutant builds what it changed."""

    def __init__(self, folder: Path, table: str) -> None:
        self.tree, self.table = folder / "tree", table
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
        for name in filter(None, tracked):
            if (ROOT / name).exists():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        # What is installed here, but for headway, which is found in the copy. A .pth in those folders is not read.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (site / "mutant.pth").write_text("\n".join([str(self.tree / "src"), *others]))
        self.python = folder / "venv" / "bin" / "python"
        self.build_folder = self.tree / "build" / "mutant"
        options = {
            "SKBUILD": "1",
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "nanobind_DIR": nanobind.cmake_dir(),
            "HEADWAY_OPTIMIZE": "-O1",
            "HEADWAY_TABLES": table,
        }
        given = [f"-D{name}={value}" for name, value in options.items()]
        self.run(["cmake", "-G", "Ninja", "-S", self.tree, "-B", self.build_folder, *given])
        problem = self.build()
        if problem:
            raise SystemExit(f"the tree does not build:\n{problem}")

    def run(self, command: list[str | Path], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Run with the tools of the environment that runs this, and without what a developer has set."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.run(
            command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False, timeout=timeout
        )

    def build(self) -> str:
        """Build what changed; return what went wrong."""
        done = self.run(["cmake", "--build", self.build_folder])
        for library in self.build_folder.glob("_native.*"):
            shutil.copy2(library, self.tree / PYTHON)
        return done.stdout[-3000:] if done.returncode else ""

    def test(self, arguments: tuple[str, ...]) -> str:
        """Return the first test that fails, or an empty text."""
        try:
            done = self.run([self.python, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments], TIMEOUT)
        except subprocess.TimeoutExpired:
            return "no end"
        if done.returncode == 0:
            return ""
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[0].split(" - ")[0] if failed else f"pytest ended with {done.returncode}: {done.stderr[-300:]}"

    def judge(self, mutant: Mutant) -> tuple[bool, str]:
        """Say whether the mutant is caught, and by what."""
        path = self.tree / mutant.file
        original = path.read_text()
        path.write_text(original.replace(mutant.old, mutant.new))
        try:
            if problem := self.build():
                return False, f"does not build: {problem}"
            found = self.test(mutant.tests)
            return bool(found), found
        finally:
            path.write_text(original)  # the next build sees it


def title(mutant: Mutant) -> str:
    """Return a mutant in a line."""
    return f"{mutant.file.removeprefix('src/')}: {mutant.old.strip()!r} -> {mutant.new.strip()!r}"


def check_patterns() -> list[str]:
    """Each old text must be there once, or the mutant is of a line that is no more."""
    listed = [(mutant.file, mutant.old) for mutant in MUTANTS] + [(file, old) for file, old, *_ in EQUIVALENT]
    counts = [(file, old, (ROOT / file).read_text().count(old)) for file, old in listed]
    return [f"{file}: expected this text once, found it {n} times: {old!r}" for file, old, n in counts if n != 1]


def main() -> None:
    """Judge all mutants, two at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", nargs="+", default=[""], help="with one of these in file or text")
    parser.add_argument("--list", action="store_true", help="list them, and do nothing")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(text in title(mutant) for text in arguments.only)]
    if arguments.list:
        print(*map(title, chosen), sep="\n")
    if problems := check_patterns():
        raise SystemExit("\n".join(problems))
    if arguments.list:
        return
    best = headway.info().isa
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in sorted(chosen, key=lambda mutant: mutant.table):
        waiting.put(mutant)
    printing = threading.Lock()
    wrong: list[str] = []
    sound: dict[tuple[str, tuple[str, ...]], str] = {}  # what the tests say without a mutant

    def work(folder: Path) -> None:
        places: dict[str, Place] = {}
        while True:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            table = mutant.table or best
            if table not in places:
                places[table] = Place(folder / table, table)
            key = table, mutant.tests
            if key not in sound and not places[table].build():
                sound[key] = places[table].test(mutant.tests)
            start = time.monotonic()
            caught, by = (False, f"fails without it: {sound[key]}") if sound[key] else places[table].judge(mutant)
            with printing:
                print(f"{'caught' if caught else 'SURVIVED'}  {title(mutant)}  {by}  {time.monotonic() - start:.0f} s")
                sys.stdout.flush()
                if not caught:
                    wrong.append(title(mutant))

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, Path(temporary) / str(i)) for i in range(WORKERS)]:
            done.result()
    print(
        f"{len(chosen)} mutants, {len(wrong)} survived; {len(EQUIVALENT)} equivalent ones are argued", *wrong, sep="\n"
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
