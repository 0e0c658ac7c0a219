"""npllama: LLaMA 2 in NumPy; Numba compiles model.py as it stands, with a kernel in place of each op.

import npllama
llm = npllama.load()                          # the demo model; or a model directory, or a checkpoint
print(llm.generate("Once upon a time").text)

Files, in the order in which to read them:

    ops.py         what each step of the model means: equation, shapes and NumPy
    model.py       which steps happen in which order
    cache.py       how earlier tokens are remembered; the mask
    inference.py   text in, text out: load, generate, stream, logits
    config.py      the numbers that describe a model
    rope.py        how fast each pair of a head turns, plain or scaled for longer contexts
    weights.py     the kinds of weights: names, shapes
    options.py     the sampling options: defaults, ranges, command-line options
    numbers/       number formats: how a matrix is stored, and what its stored numbers mean
    execution/     how model.forward runs: in NumPy, or compiled with kernels
    text/          text to ids and back
    generation/    from logits to text: sampling, streaming, stop strings
    checkpoints/   checkpoints of others as names and arrays, without executing anything
    store/         model directories: opened, exported, quantized
    measure/       is it right, and how fast: verify, quality, bench
    integrations/  adapters for other packages
    commands/      the command line
    system/        memory, processors, and files that may hold anything
    errors.py      what can go wrong, as one family of exceptions
    version.py     versions of npllama and of model directories
    __main__.py    python -m npllama
    demo/          the demo model, a model directory
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npllama.errors import CheckpointError, ContextError, ModelError, NpllamaError, UsageError
from npllama.version import __version__

if TYPE_CHECKING:
    from npllama.generation.sessions.session import Session, load_session
    from npllama.inference import AsyncStream, Handle, Llama, Piece, Result, Stream, Usage, load

__all__ = [
    "AsyncStream",
    "CheckpointError",
    "ContextError",
    "Handle",
    "Llama",
    "ModelError",
    "NpllamaError",
    "Piece",
    "Result",
    "Session",
    "Stream",
    "Usage",
    "UsageError",
    "__version__",
    "load",
    "load_session",
]


def __getattr__(name: str) -> Any:
    """Import NumPy and the rest on first use: until then the command line can already be interrupted cleanly."""
    if name not in __all__:
        raise AttributeError(f"module 'npllama' has no attribute {name!r}")
    if name in ("Session", "load_session"):
        from npllama.generation.sessions import session

        return getattr(session, name)
    from npllama import inference

    return getattr(inference, name)
