"""Why tests are slow, where several files have the same reason."""

from __future__ import annotations

import pytest

COMPILES_AGAIN = pytest.mark.slow("compile a model again, several times or for another format of the cache")
