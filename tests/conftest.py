"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real checkpoints and golden results that lies beside a development clone."""
    folder = Path(os.environ.get("NPLLAMA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "golden").is_dir():
        pytest.skip("real checkpoints: NPLLAMA_TEST_DATA names no folder with golden results")
    return folder
