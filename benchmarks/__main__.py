"""headway beside its peers, in one process, in turns, medians; the error against float64 beside each time.

Run ``make bench``, or ``python -m benchmarks [attention|layers|sampling ...] [--only PATTERN] [--write]``. Absolute
figures differ between machines; the ratios of one run are what counts. A peer that is not installed is left out, and
said so.
"""

from __future__ import annotations

import argparse
import re
import time

import headway as hw

from . import attention, language, layers, models, price, report, sampling
from .harness import measure
from .limits import limits

SUBJECTS = {
    "attention": attention.rows,
    "layers": layers.rows,
    "language": language.rows,
    "sampling": sampling.rows,
    "models": models.rows,
    "price": price.rows,
}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="subject", help=f"{', '.join(SUBJECTS)}; all by default")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose 'section: name' matches")
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls per candidate (default: %(default)s)")
    parser.add_argument(
        "--write", action="store_true", help="write this machine's part of docs/performance.md from all that is stored"
    )
    parser.add_argument("--no-measuring", action="store_true", help="with --write: only render what is stored")
    options = parser.parse_args()
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"subject: expected some of {', '.join(SUBJECTS)}, got {', '.join(sorted(unknown))}")
    rows = [row for subject in options.subjects or SUBJECTS for row in SUBJECTS[subject]()]
    if not options.no_measuring:
        print(hw.info())
        threads = hw.get_num_threads()
        measured, when = limits(threads), time.perf_counter()
        for row in rows:
            if not re.search(options.only, f"{row.section}: {row.name}"):
                continue
            if time.perf_counter() - when > 60:  # other machines' neighbours come and go, and with them the limits
                measured, when = limits(threads), time.perf_counter()
            result = measure(row, options.seconds)
            report.show(row, result, measured)
            report.keep(row, result, measured)
    if options.write:
        report.write([row for subject in SUBJECTS.values() for row in subject()])


if __name__ == "__main__":
    main()
