"""Guards hold under `python -O`, which drops every assert: what they refuse is refused by an exception."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command_line import environment

PROGRAMS = {
    "a control token that comes out of a text": (
        """
from npllama.inference import DEMO
from npllama.text.sentencepiece import SentencePieceTokenizer
tokenizer = SentencePieceTokenizer(DEMO / "tokenizer.model")
tokenizer.control_ids |= {tokenizer.encode("fox")[-1]}
tokenizer.encode("fox")
""",
        "UsageError SentencePiece reads a control token in this text",
    ),
    "rows of a matrix that was unpacked for products": (
        """
import numpy as np
from npllama.numbers import format_of, named, widen_rows
q4 = named("q4").quantize(np.ones((32, 64), np.float32))
widen_rows(format_of(q4).for_products(q4), np.array([3]))
""",
        "TypeError a Grouped is no weight of a registered number format",
    ),
    "rows beyond a tensor's last": (
        """
from pathlib import Path
from sys import executable
from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.tensors import Storage, Tensor, View
file = InputFile(Path(executable), Pool())
Tensor("x", (2, 3), (View(Storage(file, "f32", 4, 0, 99), 0, (2, 3), (3, 1)),)).rows(1, 3)
""",
        "IndexError rows 1 to 3 were asked of 2",
    ),
    "a checkpoint of llama2.c that is no dict": (
        """
from pathlib import Path
from sys import executable
from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.layouts import open_llama2c
pool = Pool()
open_llama2c([1], InputFile(Path(executable), pool), pool)
""",
        "CheckpointError python",
    ),
    "a tensor without a storage": (
        """
from pathlib import Path
from sys import executable
from npllama.checkpoints.files import InputFile, Pool
from npllama.checkpoints.pytorch.reader import _view
_view(InputFile(Path(executable), Pool()), {}, 0, (1,), (1,))
""",
        "CheckpointError python",
    ),
}


@pytest.mark.parametrize("guarded", PROGRAMS)
def test_guards_hold_without_asserts(guarded: str) -> None:
    program, expected = PROGRAMS[guarded]
    lines = "".join(f"    {line}\n" for line in program.strip().splitlines())
    program = f"try:\n{lines}except Exception as error:\n    print(type(error).__name__, error)\n"
    done = subprocess.run(
        [sys.executable, "-O", "-c", program], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.stderr == ""
    assert done.stdout.startswith(expected), done.stdout
    assert done.stdout.count("\n") == 1
