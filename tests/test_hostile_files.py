"""Damaged input files load or are refused; small hostile ones cost next to nothing (see tools/fuzz_inputs.py).

NPLLAMA_FUZZ_COUNT sets the number of damaged files of each kind.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_files import File, Written
from torch_files import PARAMS, Stored, torch_legacy, torch_zip

ROOT = Path(__file__).resolve().parent.parent
COUNT = int(os.environ.get("NPLLAMA_FUZZ_COUNT", "150"))


@pytest.mark.slow("open thousands of damaged files")
def test_damaged_files_of_every_kind_load_or_are_refused() -> None:
    command = [sys.executable, str(ROOT / "tools" / "fuzz_inputs.py"), "--count", str(COUNT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" 0 failures") == len(result.stdout.splitlines()) >= 21


BOMBS = {
    "a memo of 2^31 places": b"Nr\xff\xff\xff\x7f.",
    "a text of 2 GB": b"X\xff\xff\xff\x7f.",
    "a text of 2^40 bytes": b"\x8d" + struct.pack("<Q", 1 << 40),
    "bytes of 2^40": b"\x8e" + struct.pack("<Q", 1 << 40),
    "a bytearray of 2^40": b"\x96" + struct.pack("<Q", 1 << 40),
    "a memo place as text": b"NP4611686018427387904\n.",
    "a bytearray made by a call": b"cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.",
    "a number of 2^31 digits": b"\x8b\xff\xff\xff\x7f",
    "nesting": b"(" * 900 + b".",
}

SIZES = struct.pack("<7i", 1 << 16, 1 << 19, 512, 1 << 10, 1 << 10, 1 << 20, 1 << 24)
SMALL_BOMBS = {
    "keys.gguf": File({}, n_keys=1 << 14).bytes(),
    "texts.gguf": File({"a": ("raw", struct.pack("<IIQ", 9, 8, 1 << 20))}).bytes(),
    "numbers.gguf": File({"a": ("raw", struct.pack("<IIQ", 9, 12, 1 << 21))}).bytes(),
    "arrays.gguf": File({"a": ("raw", struct.pack("<IIQ", 9, 9, 1) * 100)}).bytes(),
    "tensors.gguf": File({}, n_tensors=1 << 14).bytes(),
    "shape.gguf": File({}, {"token_embd.weight": Written(0, (1 << 30, 1 << 30), bytes(8))}).bytes(),
    "version0.bin": SIZES,
    "version1.bin": (b"24ka\1\0\0\0" + SIZES + b"\1").ljust(300, b"\0"),
    "version2.bin": (b"24ka\2\0\0\0" + SIZES + b"\1\1\0\0\0").ljust(300, b"\0"),
}

READER = """
import json, resource, sys, time
from npllama.checkpoints import open_checkpoint
from npllama.errors import CheckpointError
def opened(path):
    try:
        open_checkpoint(path).close()
    except CheckpointError:
        return
    raise SystemExit(f"{path} was opened")
opened(sys.argv[1])  # once before, so that what is measured is the file and not the imports
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for path in sys.argv[2:]:
    opened(path)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([time.process_time() - start, used >> (10 if sys.platform == "darwin" else 0)]))
"""


def test_small_hostile_files_take_little_time_and_memory(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="measures memory, which this system does not tell")
    expanded = Stored(bytes(4), "f32", (1 << 20, 1 << 20), 0, (0, 0))
    files = [torch_zip({}, extra={"data.pkl": b"\x80\x02" + code}) for code in BOMBS.values()]
    files += [b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e\x80\x02" + code for code in BOMBS.values()]
    files += [
        save({f"{name}.weight": expanded for name in ("tok_embeddings", "norm")}) for save in (torch_zip, torch_legacy)
    ]
    files += [struct.pack("<Q", 1 << 60) + b"{", struct.pack("<Q", 700) + b'{"a":' * 140]
    paths = []
    for i, data in enumerate(files):
        assert len(data) < 2000
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "params.json").write_text(json.dumps({**PARAMS, "dim": 1 << 16, "n_layers": 512}))
        paths.append(tmp_path / f"{i}" / "consolidated.00.pth")
        paths[-1].write_bytes(data)
    for name, data in SMALL_BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
        assert len(data) < 2000
    result = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    seconds, kilobytes = json.loads(result.stdout)
    assert seconds < 0.1 * len(paths)
    assert kilobytes < 32 << 10
