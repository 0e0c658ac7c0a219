"""A model for the tests of sessions: fixtures, and texts of ids."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import helpers
import numpy as np
import pytest

import npllama
from npllama.inference import Llama

CONFIG = dataclasses.replace(helpers.TINY, max_seq_len=256)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sessions") / "model"
    helpers.write_model_directory(folder, CONFIG)
    return folder


@pytest.fixture
def llm(folder: Path):
    with npllama.load(folder) as llm:
        yield llm
        gc.collect()
        pool = llm.runtime.scheduler.pool
        pool.check()


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, n).tolist()


def available(llm: Llama) -> int:
    with llm.runtime.scheduler.between_steps():
        llm.runtime.scheduler.pool.check()
    return llm.runtime.scheduler.pool.available
