"""The price of the contract of bits: our kernels beside themselves without it.

EDITS take the contract out of a copy of the core, wherever it might cost time: sums of any length and in any order, no
tree, no chunks that are summed apart, dot products where the order of a chain calls for a transpose, and fused
operations where the compiler likes. What remains is as well tuned as ours, since it is ours.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import headway as hw

from . import layers
from .harness import Candidate, Contest, LeftOut, Row
from .problem import Problem, Shape
from .report import PRICE
from .sampling import TEMPERATURE, logits_of

ROOT = Path(__file__).parent.parent
PLACE = ROOT / "build" / "any_order"
CORE = "src/core"


class Edit(NamedTuple):
    """A text that a file has once, and what becomes of it."""

    file: str
    old: str
    new: str


def edits(file: str, *pairs: tuple[str, str]) -> list[Edit]:
    """Edits of one file of the core."""
    return [Edit(f"{CORE}/{file}", old, new) for old, new in pairs]


# Each column of w is a dot product with x, of as many columns at once as the registers hold.
DOT_COLUMNS = """
    constexpr int together = rows == 1 ? 4 : rows == 2 ? 2 : 1;
    for (int64_t j = 0; j < 16; j += together) {
      Vec<T> sum[together][rows];
      for (auto& column : sum)
        for (Vec<T>& row : column) row = T(0);
      int64_t i = 0;
      for (; i + 16 <= count; i += 16) {
        if (j % 4 == 0) ahead.prefetch(4 * 16 * int64_t(sizeof(From)));
#pragma GCC unroll 4
        for (int c = 0; c < together; ++c) {
          const auto w = load(from + (j + c) * task.w.stride[1] + i);
#pragma GCC unroll 4
          for (int r = 0; r < rows; ++r) sum[c][r] = fma(load(x + r * x_row + i), w, sum[c][r]);
        }
      }
      for (int c = 0; c < together; ++c)
        for (int r = 0; r < rows; ++r) sums[0][16 * r + j + c] = reduce_sum(sum[c][r]);
    }
    return count;
  }
  template <int rows, size_t chains, class From>
  int64_t grow_in_order(const From* from, int64_t count, const T* x, int64_t x_row, T* const (&sums)[2]) {
"""
GROW = "int64_t grow_by_lines(const From* from, int64_t count, const T* x, int64_t x_row, T* const (&sums)[2]) {\n"

# Each score of few queries with keys that lie in rows is a dot product.
DOT_SCORES = """
    if (once && count <= 4 && stored_keys.data == panels && in_rows()) {
      Ahead to_come = keys_after(a);
      for (int64_t j = a; j < b; ++j) {
        const int64_t key = chunk.first + j;
        if (key >= task.S) break;
        to_come.prefetch(task.D * int64_t(sizeof(T)));
        const T* k = reinterpret_cast<const T*>(address(task.k, k_offset, group, key));
        const auto dots = [&]<int rows>() {
          Vec<T> sum[rows];
          for (Vec<T>& row : sum) row = T(0);
          for (int64_t d = 0; d < task.D; d += 16) {
            const Vec<T> numbers = Vec<T>::load(k + d);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r)
              sum[r] = fma(Vec<T>::load(queries + (first + r) * query_row + d), numbers, sum[r]);
          }
          for (int r = 0; r < rows; ++r) s[r * kChunk + j - a] = reduce_sum(sum[r]);
        };
        count == 1   ? dots.template operator()<1>()
        : count == 2 ? dots.template operator()<2>()
        : count == 3 ? dots.template operator()<3>()
                     : dots.template operator()<4>();
      }
      return;
    }
"""
IN_ROWS = """
  bool in_rows() const {
    return !task.k_in_panels && task.k.dtype == dtype_of<T> && task.k.stride[2] == 1 && task.D % 16 == 0;
  }
"""
TWO_TOTALS = """
  Vec<T> later = T(0);
  for (; begin + 32 <= end; begin += 32) {
    const Vec<T> p = exp(Vec<T>::load(s + begin) * Vec<T>(scale) - Vec<T>(m));
    const Vec<T> q = exp(Vec<T>::load(s + begin + 16) * Vec<T>(scale) - Vec<T>(m));
    p.store(s + begin), q.store(s + begin + 16);
    total = total + p, later = later + q;
  }
  total = total + later;
#pragma GCC unroll 2
"""

EDITS = [
    Edit(
        "CMakeLists.txt",
        "nanobind_add_module(_native NB_STATIC",
        "nanobind_add_module(_native NB_DOMAIN any_order NB_STATIC",
    ),
    Edit(
        "CMakeLists.txt",
        "-ffp-contract=off -fno-math-errno",
        "-ffp-contract=fast -fno-signed-zeros -fno-trapping-math -freciprocal-math -fno-math-errno",
    ),
    # Neighbours join as soon as there are two: a running state, or a running sum.
    *edits(
        "ground/tree.h",
        ("if (below < 0 || meeting_level(below, top) >= meeting_level(top, next)) return;", "if (below < 0) return;"),
    ),
    # Linear: one chain over the whole inner axis.
    *edits(
        "layers/linear.h",
        (
            "T* sum[] = {sums + stack.push(k / kChain, joiner) * area, nullptr};",
            "if (k == 0) stack.push(0, joiner);\n      T* sum[] = {sums, nullptr};",
        ),
        ("if (count > kChain) sum[1] =", "if (false) sum[1] ="),
        (
            "x_row, packed, 16, 16 * count, sum + i * width + j, width);",
            "x_row, packed, 16, 16 * count, sum + i * width + j, width, k > 0);",
        ),
        ("x_row, packed, 16, 16 * count, sum + j, width);", "x_row, packed, 16, 16 * count, sum + j, width, k > 0);"),
        ("row, 16, sum, width, g > 0);", "row, 16, sum, width, k + g > 0);"),
        ("row, 16, sum, width, g > 0, next);", "row, 16, sum, width, k + g > 0, next);"),
        ("sums[chain], width, i > 0);", "sums[0], width, k + begin + i > 0);"),
        (
            "const int64_t most = by_column && rows == 1 && item_size(task.w.dtype) == 2 ? 2 * kChain : kChain;",
            "const int64_t most = by_column && rows <= 4 && columns == 16 && task.K % 32 == 0 ? task.K : kChain;",
        ),
        (
            "x_block = arena.take<T>(plan.rows * 2 * kChain);",
            "x_block = arena.take<T>(plan.rows * max(2 * kChain, task.K));",
        ),
        ("count, x_block + i * 2 * kChain);", "count, x_block + i * max(2 * kChain, task.K));"),
        ("x_row = 2 * kChain;", "x_row = max(2 * kChain, task.K);"),
        (
            "parts = max(task.K * item / kPartBytes, 1);",
            "parts = block_columns == 16 && task.K % 32 == 0 ? 1 : max(task.K * item / kPartBytes, 1);",
        ),
        ("if (count > kChain) return grow_by_lines<1, 2>", "if (false) return grow_by_lines<1, 2>"),
        ("if (columns == 16) done = grow", "if (columns == 16 && task.K % 32 == 0) done = grow"),
        (GROW, GROW + DOT_COLUMNS),
    ),
    # Attention: one chain over a chunk; chunks are only as long as the caches like.
    *edits(
        "attention/attention.h",
        (
            "for (int64_t link = band.begin / kChain * kChain; link < band.end; link += kChain) {",
            "for (int64_t link = 0; link < band.end; link += kChunk) {",
        ),
        (
            "for (int64_t j = link; j < min(link + kChain, band.end); j += step)",
            "for (int64_t j = band.begin; j < band.end; j += step)",
        ),
    ),
    *edits(
        "attention/softmax.h",
        (
            "#pragma GCC unroll 2\n  for (int64_t j = begin; j < end; j += 16) {\n    const Vec<T> p = exp",
            TWO_TOTALS + "  for (int64_t j = begin; j < end; j += 16) {\n    const Vec<T> p = exp",
        ),
    ),
    *edits(
        "attention/operands.h",
        ("    pack(a);\n", "    pack(a);\n" + DOT_SCORES),
        (
            "i < to && stored_keys.data == panels; i += 16) {",
            "i < to && stored_keys.data == panels && !(once && rows_of_block <= 4 && in_rows()); i += 16) {",
        ),
        ("once = reads_once, aligns", "rows_of_block = rows.count, once = reads_once, aligns"),
        ("  Chunk chunk;\n  Stored stored_keys", "  int64_t rows_of_block;\n  Chunk chunk;\n  Stored stored_keys"),
        ("private:\n  // Whether each row of v", IN_ROWS + "\nprivate:\n  // Whether each row of v"),
    ),
]


def rows() -> Iterator[Row]:
    """Yield what each part of the contract could cost: many queries and few, from arrays and from a cache, layers."""
    for length, causal in ((16, False), (128, False), (512, False), (2048, False), (2048, True)):
        shape = Shape(12, length, 64, causal=causal)
        name = f"prefill, 12 heads, L={length}, D=64{', causal' * causal}"
        yield Row(PRICE, name, partial(attention, shape, False), shape.flops, "fma")
    for heads, cached in ((8, False), (32, False), (32, True)):
        shape = Shape(heads, 1, 128, 4096, groups=8)
        name = f"decode, {heads} over 8 heads, S=4096, {'KVCache' if cached else 'plain arrays'}"
        yield Row(PRICE, name, partial(attention, shape, cached), shape.bytes_read, "read")
    for m, k, n in ((512, 768, 768), (512, 4096, 4096), (8, 4096, 4096), (1, 4096, 4096)):
        yield linear_row(m, k, n)
    for m, dtype in ((1, "float32"), (1, "bfloat16"), (4, "float32")):
        yield linear_row(m, 4096, 4096, dtype, transposed=True)
    for options in ({}, {"top_p": 0.9}):
        name = f"sample, peaked, V=128,256{''.join(f', {name}={value}' for name, value in options.items())}"
        yield Row(PRICE, name, partial(sampling, options))


def linear_row(m: int, k: int, n: int, dtype: str = "float32", transposed: bool = False) -> Row:
    """The row of `linear` in the section of the price."""
    row = layers.linear_row(m, k, n, dtype, transposed)
    return replace(row, section=PRICE, name=f"linear, {row.name}", open=partial(linear, m, k, n, dtype, transposed))


def both(make: Callable[[ModuleType], Candidate]) -> dict[str, Callable[[], Candidate]]:
    """The same call of ours and of the copy."""
    return {"headway": lambda: make(hw), "any order": lambda: make(any_order())}


def attention(shape: Shape, cached: bool) -> Contest:
    """Attention from plain arrays, or from a cache that holds the keys and values."""
    problem = Problem.random(shape)
    rows_ = problem.sample()
    q, k, v = problem.q, problem.k, problem.v

    def make(library: Any) -> Candidate:
        if not cached:
            return Candidate(lambda: library.attention(q, k, v, causal=shape.causal))
        cache = library.KVCache(shape.groups, shape.size, batch_shape=(1,))
        cache.append(k, v)
        return Candidate(lambda: cache.attend(q))

    return Contest(both(make), problem.exact(rows_), lambda out: out[:, :, rows_])


def linear(m: int, k: int, n: int, dtype: str, transposed: bool) -> Contest:
    """Linear alone."""
    x, w, rows_, exact = layers.linear_problem(m, k, n, dtype, transposed)
    return Contest(both(lambda library: Candidate(lambda: library.linear(x, w))), exact, lambda y: y[rows_])


def sampling(options: dict[str, float]) -> Contest:
    """One token of one row. Its masses are whole numbers, so that only the compiler's fused operations differ."""
    logits = logits_of("peaked", 1, 128_256)[0]

    def make(library: Any) -> Candidate:
        params = library.SamplingParams(temperature=TEMPERATURE, seed=1, **options)
        return Candidate(lambda: library.sample(logits, params))

    return Contest(both(make))


def check_edits() -> list[str]:
    """Each old text must be there once, or the contract stays where it was."""
    counts = [(file, old, (ROOT / file).read_text().count(old)) for file, old, _ in EDITS]
    return [f"{file}: expected this text once, found it {n} times: {old!r}" for file, old, n in counts if n != 1]


@cache
def any_order() -> ModuleType:
    """Build headway with the edits, and import it beside ours."""
    if problems := check_edits():
        raise LeftOut(problems[0])
    for path in [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "src").rglob("*") if path.is_file())]:
        name = str(path.relative_to(ROOT))
        if path.suffix in {".so", ".pyc"}:
            continue
        text = path.read_bytes()
        for file, old, new in EDITS:
            if file == name:
                text = text.replace(old.encode(), new.encode())
        copy = PLACE / name
        if not copy.exists() or copy.read_bytes() != text:  # what is the same is not built again
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(text)
    _build()
    return _import()


def _build() -> None:
    import nanobind

    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    options = {
        "SKBUILD": "1",
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind.cmake_dir(),
        "HEADWAY_TABLES": hw.info().isa,
    }
    given = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-G", "Ninja", "-S", PLACE, "-B", PLACE / "build", *given],
        ["cmake", "--build", PLACE / "build"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOut(f"does not build: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    for library in (PLACE / "build").glob("_native.*"):
        shutil.copy2(library, PLACE / "src" / "headway")


def _import() -> ModuleType:
    def loaded() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "headway"]

    ours, path, finders = {name: sys.modules.pop(name) for name in loaded()}, sys.path[:], sys.meta_path[:]
    try:
        sys.path.insert(0, str(PLACE / "src"))
        sys.meta_path[:] = [finder for finder in finders if isinstance(finder, type)]  # not that of editable installs
        return importlib.import_module("headway")
    finally:
        sys.path[:], sys.meta_path[:] = path, finders
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(ours)
