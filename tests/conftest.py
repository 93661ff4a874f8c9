"""Settings that all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest

import headway as hw

# Shells start what runs in the background deaf to Ctrl-C, and so would be all processes that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a red test stays red, and a green one is not luck. No deadline: machines differ.
hypothesis.settings.register_profile("headway", deadline=None, derandomize=True)
hypothesis.settings.load_profile("headway")


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Let a test change the number of threads."""
    before = hw.get_num_threads()
    yield
    hw.set_num_threads(before)
