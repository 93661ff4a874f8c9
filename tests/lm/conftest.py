"""The models that the tests share."""

from __future__ import annotations

import pytest
from tiny_llama import (
    write_checkpoint,
)

import headway.lm


@pytest.fixture(scope="module")
def shipped() -> headway.lm.Model:
    return headway.lm.load()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> headway.lm.Model:
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return headway.lm.load(folder)
