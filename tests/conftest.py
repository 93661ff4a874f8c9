"""Settings that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

import headway as hw

# The same examples in every run: a red test stays red, and a green one is not luck. No deadline: machines differ.
hypothesis.settings.register_profile("headway", deadline=None, derandomize=True)
hypothesis.settings.load_profile("headway")


@pytest.fixture
def keep_threads() -> Iterator[None]:
    """Let a test change the number of threads."""
    before = hw.get_num_threads()
    yield
    hw.set_num_threads(before)
