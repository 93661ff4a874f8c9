"""The limits of this machine, measured: what any kernel could reach at most."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")


def limits(threads: int, seconds: float = 1.0) -> dict[str, float]:
    """Return GFLOP/s of fused multiply-adds in float32 and float64, and GB/s read; nothing where no compiler is."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        print("no C++ compiler: shares of the machine's limits are left out")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limits.so"
        try:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{compiler} does not compile {SOURCE.name} ({error}): shares of the machine's limits are left out")
            return {}
        native = ctypes.CDLL(str(library))
    measured = {}
    for name, function in (("fma", native.fma_peak), ("read", native.read_bandwidth)):
        function.restype, function.argtypes = ctypes.c_double, (ctypes.c_int, ctypes.c_double)
        measured[name] = function(threads, seconds) / 1e9
    measured["fma, float64"] = measured["fma"] / 2  # half as many lanes
    return measured
