"""The contract of bits against the machine: threads, processes, instruction sets, floating-point modes, memory.

Every test runs the whole of cases.py and compares digests with those of this process.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cases
import numpy as np
import pytest

import headway as hw
from headway import _native

HERE = Path(__file__).parent
# Python 3.12 and later warn of fork in a process with threads, which a pool of threads always is.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-?threaded")  # Python, and JAX where it has been used, warn of forks


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    return cases.digests()


def test_every_case_has_a_result_of_its_own(expected: dict[str, str]) -> None:
    """Digests that agree because nothing was computed would agree here too."""
    equal_by_law = {f"{a} {dtype}": f"{b} {dtype}" for a, b in cases.EQUAL.items() for dtype in cases.DTYPES}
    values = [value for name, value in expected.items() if name not in equal_by_law]
    assert len(set(values)) == len(values)
    assert all(expected[name] == expected[other] for name, other in equal_by_law.items())


def test_the_bits_are_those_recorded_for_this_version_of_the_contract(expected: dict[str, str]) -> None:
    recorded = json.loads(cases.RECORDED.read_text())
    page = (HERE.parent / "docs" / "numerics.md").read_text()
    assert f"version {recorded['version']} of the contract" in page
    assert cases.inputs_digest() == recorded["inputs"], "the inputs are others, and so these digests say nothing"
    assert {name: expected[name] for name in recorded["digests"]} == recorded["digests"]
    assert {name.partition(" ")[0] for name in recorded["digests"]} >= {
        "attention",
        "weights",
        "parts",
        "layer",
        "fused",
    }


# Threads and processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_number_of_threads(n: int, expected: dict[str, str], keep_threads: None) -> None:
    hw.set_num_threads(n)
    assert hw.get_num_threads() == hw.info().num_threads == n
    assert cases.digests() == expected


def test_calls_from_many_python_threads_at_once(expected: dict[str, str], keep_threads: None) -> None:
    hw.set_num_threads(3)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(found == expected for found in pool.map(lambda _: cases.digests(), range(12)))


def test_the_number_of_threads_may_change_while_others_compute(expected: dict[str, str], keep_threads: None) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(cases.digests) for _ in range(4)]
        n = 0
        while not all(future.done() for future in running):
            n = n % 5 + 1
            hw.set_num_threads(n)
        assert all(future.result() == expected for future in running)


def test_workers_that_wait_fall_asleep(keep_threads: None) -> None:
    """They look out for the next call for a tenth of a millisecond, and then cost nothing."""
    hw.set_num_threads(4)
    x = np.ones((8, 200, 32), np.float32)
    for _ in range(20):
        hw.attention(x, x, x)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


@FORKS
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_use(expected: dict[str, str], keep_threads: None) -> None:
    """The pool's threads do not survive a fork. The child, and its child, must make their own."""
    hw.set_num_threads(3)
    cases.digests()

    def child(depth: int) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if cases.digests() == expected and (depth == 0 or child(depth - 1) == 0) else 2
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert child(1) == 0
    assert cases.digests() == expected  # and the parent goes on


def _in_child(expected: dict[str, str]) -> bool:
    return cases.digests() == expected


@FORKS
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(method: str, expected: dict[str, str]) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_in_child, [expected] * 2) == [True, True]


# Instruction sets ---------------------------------------------------------------------------------------------------


def run_cases(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "cases.py")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("isa", hw.info().isas)
def test_the_instruction_set(isa: str, expected: dict[str, str]) -> None:
    done = run_cases(HEADWAY_ISA=isa)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["isa"] == isa
    assert found["digests"] == expected


def test_portable_is_there_and_an_unknown_instruction_set_is_an_error() -> None:
    assert "portable" in hw.info().isas
    assert hw.info().isa in hw.info().isas
    done = run_cases(HEADWAY_ISA="abacus")
    assert done.returncode != 0
    assert "HEADWAY_ISA" in done.stderr
    assert "portable" in done.stderr  # what there is instead


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {}, 0),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 0),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000\n", "a/b/cpu.max": "50000 100000\n"}, 0.5),
        ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0),
        ("4:cpuacct,cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2),
        ("nonsense\n::\n:::\n7:cpu\n", {"cpu.max": "-3 0\n"}, 0),
        ("0::a\n", {"a/cpu.max": "abc\n", "cpu.max": "300000 100000 x\n"}, 3),
    ],
)
def test_a_quota_of_processors_is_noticed(tmp_path: Path, groups: str, files: dict[str, str], quota: float) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert _native.cpu_quota(str(tmp_path)) == quota


def test_threads_by_environment() -> None:
    code = "import headway as hw; print(hw.get_num_threads())"
    for value, want in [("3", 0), ("none", 1), ("0", 1)]:
        environment = {**os.environ, "HEADWAY_NUM_THREADS": value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        if want == 0:
            assert done.stdout.strip() == value, done.stderr
        else:
            assert done.returncode != 0
            assert "HEADWAY_NUM_THREADS" in done.stderr


# The caller's floating-point modes ----------------------------------------------------------------------------------

# Where the control word lies in glibc's fenv_t, the bits that flush subnormals (x86: FTZ and DAZ; ARM: FZ), and what
# fesetround takes.
CONTROL = {
    "x86_64": (28, 0x8040, {"down": 0x400, "up": 0x800, "to zero": 0xC00}),
    "aarch64": (0, 1 << 24, {"down": 0x800000, "up": 0x400000, "to zero": 0xC00000}),
}
MODES = ["flush", "down", "up", "to zero"]


def control_word(libm: ctypes.CDLL) -> int:
    environment = (ctypes.c_char * 64)()
    assert libm.fegetenv(environment) == 0
    offset = CONTROL[platform.machine()][0]
    return int.from_bytes(environment[offset : offset + 4], "little")


@contextmanager
def floating_mode(mode: str) -> Iterator[ctypes.CDLL]:
    if platform.machine() not in CONTROL or platform.libc_ver()[0] != "glibc":
        pytest.skip("the layout of this C library's floating-point environment is not known here")
    libm = ctypes.CDLL("libm.so.6")
    offset, flush, rounding = CONTROL[platform.machine()]
    saved = (ctypes.c_char * 64)()
    assert libm.fegetenv(saved) == 0
    try:
        if mode == "flush":
            changed = (ctypes.c_char * 64).from_buffer_copy(saved)
            word = int.from_bytes(changed[offset : offset + 4], "little") | flush
            changed[offset : offset + 4] = word.to_bytes(4, "little")
            assert libm.fesetenv(changed) == 0
        else:
            assert libm.fesetround(rounding[mode]) == 0
        yield libm
    finally:
        assert libm.fesetenv(saved) == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_floating_point_mode(mode: str, expected: dict[str, str], keep_threads: None) -> None:
    third, smallest = np.array([1.0, 2.0**-1022]) / np.array([3.0, 1.0])
    with floating_mode(mode) as libm:
        # The mode is really on, for arithmetic at run time ...
        now = np.array([1.0, -1.0]) / 3.0, np.array([smallest]) * 0.5
        before = control_word(libm)
        hw.set_num_threads(4)  # threads that begin their life in this mode
        found = cases.digests()
        after = control_word(libm)
    changed = {"up": now[0][0] > third, "down": now[0][1] < -third, "to zero": False, "flush": now[1][0] == 0}
    assert changed[mode] or mode == "to zero"
    # ... is not left behind or lost (sticky exception flags aside) ...
    flags = 0x3F if platform.machine() == "x86_64" else 0
    assert before | flags == after | flags
    # ... and has no influence.
    assert {name for name in expected if found[name] != expected[name]} == set()


def test_torch_may_flush_subnormals(expected: dict[str, str]) -> None:
    torch = pytest.importorskip("torch", reason="only torch's own switch is tried here; the mode itself is tried above")
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormals on this machine")
    try:
        assert cases.digests() == expected
    finally:
        torch.set_flush_denormal(False)


def test_importing_leaves_subnormals_alone() -> None:
    """Objects linked with fast-math switch flushing on for the whole process when they are loaded."""
    code = "import headway, sys; x = sys.float_info.min; print(x / 2 > 0, 5e-324 > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


# Memory -------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
import numpy as np, headway as hw
H, L, S, D = (int(x) for x in sys.argv[1:5])
options = eval(sys.argv[5])
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((H, n, D), dtype=np.float32) for n in (L, S, S))
hw.attention(q[:, :1], k[:, :1], v[:, :1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = hw.attention(q, k, v, **options)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
unit = 1 if sys.platform == "darwin" else 1024
print((after - before) * unit - out.nbytes)
"""


def extra_memory(H: int, L: int, S: int, D: int, options: str) -> int:
    """Bytes beyond inputs and output."""
    arguments = [str(x) for x in (H, L, S, D)] + [options]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, timeout=3000
    )
    return int(done.stdout)


@pytest.mark.parametrize(
    ("H", "L", "S", "D", "options"),
    [
        # The whole at L = 65,536 takes minutes: here in a window, and in full under the marker `slow`.
        (8, 65536, 65536, 64, "{'causal': True, 'window': (256, 0)}"),
        (1, 262_144, 262_144, 64, "{'causal': True, 'window': (256, 0)}"),
        (1, 16, 400_000, 64, "{}"),  # long rows: L x S would be 26 MB for one copy, K packed 102 MB
        (1, 6000, 6000, 16, "{}"),  # L x S would be 144 MB
        (2, 5000, 5000, 16, "{'causal': True, 'softcap': 5.0}"),
        (1, 6000, 6000, 16, "{'mask': np.tri(6000, dtype=bool)}"),  # the mask is made before the peak is read again
    ],
)
def test_memory_beyond_inputs_and_output(H: int, L: int, S: int, D: int, options: str) -> None:
    pytest.importorskip("resource", reason="memory is measured by getrusage")
    assert extra_memory(H, L, S, D, options) <= 64e6


@pytest.mark.slow
def test_memory_of_the_whole_at_65536() -> None:
    pytest.importorskip("resource", reason="memory is measured by getrusage")
    assert extra_memory(8, 65536, 65536, 64, "{}") <= 64e6


Cuts = dict[str, list[tuple[str, float, float, float]]]  # by threads: a task, the last's end, the mean, the least unit


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Cuts:
    """What tests/pool/balance.cpp counts, by the number of threads."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    program = tmp_path_factory.mktemp("pool") / "balance"
    source, core = HERE / "pool" / "balance.cpp", HERE.parent / "src" / "core"
    subprocess.run([compiler, "-std=c++20", "-O1", "-w", f"-I{core}", str(source), "-o", str(program)], check=True)
    found: Cuts = {}
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        name, threads, end, mean, least = line.split("|")
        found.setdefault(threads, []).append((name, float(end), float(mean), float(least)))
    return found


@pytest.mark.parametrize("threads", ["2", "4", "8", "16", "64"])
def test_threads_end_together(threads: str, cuts: Cuts) -> None:
    """Units are counted, not timed, so that a small machine can speak for a large one."""
    assert len(cuts[threads]) > 400
    late = [
        f"{name}: {end / mean:.2f} of the mean"
        for name, end, mean, least in cuts[threads]
        if end > mean + max(mean / 5, least)
    ]
    assert not late


def test_a_system_that_refuses_threads_gets_fewer():
    code = """
import resource
import numpy as np, headway as hw
x = np.random.default_rng(0).normal(size=(16, 200, 32)).astype(np.float32)
hw.set_num_threads(1)
alone = hw.attention(x, x, x)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
hw.set_num_threads(1000)
assert (hw.attention(x, x, x) == alone).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes_beyond_int64_do_not_overflow_into_memory():
    huge = np.broadcast_to(np.float32(0), (1, 1, 2**60))
    with pytest.raises(ValueError, match="q: expected a head size D of at most"):
        hw.attention(huge, huge, np.ones((1, 1, 1), np.float32))
