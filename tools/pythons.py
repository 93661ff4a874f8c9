"""Find the Pythons of this machine that headway can be built and tested with: one of each minor version, from 3.10 on.

Run ``python tools/pythons.py``: a line each, "3.12 /usr/bin/python3.12", the oldest first. With ``--newest-but 3.11``
the path alone of the newest that is not 3.11.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MINORS = range(10, 30)
# Its version, where it is a released one that can make an environment and has the headers of C.
PROBE = """
import sys, sysconfig, ensurepip, os, venv
assert sys.version_info.releaselevel == "final"
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
print("%d.%d" % sys.version_info[:2])
"""


def candidates(minor: int) -> Iterator[Path]:
    """What may be Python 3.minor: on the PATH, or where pyenv keeps its versions."""
    name = f"python3.{minor}"
    for folder in os.get_exec_path():
        yield Path(folder) / name
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    yield from sorted((path / "bin" / name for path in versions.glob(f"3.{minor}.*")), reverse=True)


def runs(path: Path, version: str) -> bool:
    """Whether it is there and is what its name says: a version manager's stand-in may refuse to run."""
    if not os.access(path, os.X_OK):
        return False
    done = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
    return done.stdout.strip() == version


def pythons() -> dict[str, Path]:
    """Return the first that runs of each version, the oldest first."""
    found = {}
    for minor in MINORS:
        version = f"3.{minor}"
        first = next((path for path in candidates(minor) if runs(path, version)), None)
        if first is not None:
            found[version] = first
    return found


def main() -> None:
    """Print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newest-but", metavar="VERSION", help="print only the path of the newest but this one")
    arguments = parser.parse_args()
    found = pythons()
    if arguments.newest_but:
        found.pop(arguments.newest_but, None)
        print(*list(found.values())[-1:])
    else:
        for version, path in found.items():
            print(version, path)


if __name__ == "__main__":
    main()
