"""npllama: LLaMA 2 in NumPy, and the same source compiled by Numba.

import npllama
llm = npllama.load()                          # the demo model; or a model directory
print(llm.generate("Once upon a time").text)
"""

from __future__ import annotations

from npllama.errors import CheckpointError, ContextError, ModelError, NpllamaError, UsageError
from npllama.inference import Llama, Piece, Result, Stream, Usage, load
from npllama.version import __version__

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
