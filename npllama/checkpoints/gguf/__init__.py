"""GGUF files of llama.cpp.

Files, in the order in which to read them:

    model.py   config, weights and vocabulary of a model, from one file or its parts
    reader.py  metadata and tensors of one file
    blocks.py  quantized blocks: their levels and scales, and the numbers that ggml defines
"""

from npllama.checkpoints.gguf.model import GGUF_PART, open_gguf

__all__ = ["GGUF_PART", "open_gguf"]
