"""npllama: LLaMA 2 in NumPy, and the same source compiled by Numba.

import npllama
llm = npllama.load()                          # the demo model; or a model directory, or a checkpoint
print(llm.generate("Once upon a time").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npllama.errors import CheckpointError, ContextError, ModelError, NpllamaError, UsageError
from npllama.version import __version__

if TYPE_CHECKING:
    from npllama.inference import Llama, Piece, Result, Stream, Usage, load

__all__ = [
    "CheckpointError",
    "ContextError",
    "Llama",
    "ModelError",
    "NpllamaError",
    "Piece",
    "Result",
    "Stream",
    "Usage",
    "UsageError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import NumPy and the rest on first use: until then the command line can already be interrupted cleanly."""
    if name not in __all__:
        raise AttributeError(f"module 'npllama' has no attribute {name!r}")
    from npllama import inference

    return getattr(inference, name)
