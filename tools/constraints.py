"""Write constraints.txt: the version of everything that the doors install, the newest that each Python can have.

Run ``make constraints``, and the doors again before it is committed. The arguments are what the Makefile installs
beside what pyproject.toml names: tools for every Python here (tools/pythons.py), and after ``--peers`` what only the
Python that runs this is asked about, for not every release of every peer has a wheel for every Python. ``--alone``
names peers that are installed without what they need.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pythons import pythons

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip's own
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent
FILE = ROOT / "constraints.txt"
HEAD = """\
# Which versions the doors install. Made by `make constraints`; a line for every package, more where the newest version
# needs a newer Python. Of torch the version is chosen by hand, and a build of it that needs a GPU's libraries cannot be
# installed: where there is no other, the tests against torch skip.
cuda-toolkit<0
"""
Versions = dict[str, dict[str, str]]  # of each package on each Python


def own_requirements() -> list[str]:
    """What pyproject.toml names, for building, running and testing."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = pyproject["project"]
    named = pyproject["build-system"]["requires"] + project["dependencies"]
    # What the other extras name is among the peers.
    named += [name for extra in ("lm", "plot", "test") for name in project["optional-dependencies"][extra]]
    return [name for name in named if not name.startswith(f"{project['name']}[")]


def resolve(python: Path, requirements: list[str], *options: str) -> dict[str, str]:
    """Return the newest versions that go together."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        report = f"{folder}/report.json"
        subprocess.run([*pip, "--dry-run", "--report", report, *options, *requirements], check=True)
        found = [package["metadata"] for package in json.loads(Path(report).read_text())["install"]]
    # A local part names a build, such as +cpu: which one there is depends on the machine.
    return {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"].split("+")[0] for one in found}


def lines(versions: Versions) -> list[str]:
    """A line for each package; where Pythons differ, one for each run of Pythons that agree, the last one open."""
    made = []
    for name, of in sorted(versions.items()):
        pythons_of = sorted(of, key=lambda version: int(version.split(".")[1]))
        starts = [at for i, at in enumerate(pythons_of) if i == 0 or of[at] != of[pythons_of[i - 1]]]
        for start, after in zip(starts, [*starts[1:], None]):
            bounds = [] if start == starts[0] else [f"python_version >= '{start}'"]
            bounds += [] if after is None else [f"python_version < '{after}'"]
            made.append(f"{name}=={of[start]}" + ("; " + " and ".join(bounds) if bounds else ""))
    return made


def main() -> None:
    """Ask pip for every Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*")
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--alone", nargs="*", default=[])
    arguments = parser.parse_args()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions: Versions = {}
    for python, path in (pythons() | {here: Path(sys.executable)}).items():
        wanted = own_requirements() + arguments.tools
        found = resolve(path, wanted + arguments.peers if python == here else wanted)
        if python == here and arguments.alone:
            found |= resolve(path, arguments.alone, "--no-deps")
        print(f"Python {python}: {len(found)} packages")
        for name, version in found.items():
            versions.setdefault(name, {})[python] = version
    FILE.write_text(HEAD + "\n".join(lines(versions)) + "\n")


if __name__ == "__main__":
    main()
