"""Turn a checkpoint into a model directory, from a clone that is not installed; needs numpy and sentencepiece only.

    python tools/export.py CHECKPOINT OUT [--dtype f32|f16|bf16] [--tokenizer FILE] [--force]

The same as `npllama export`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npllama.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
