"""Measure tokenizers: opening one, from its file and from a model directory, and encoding.

    python tools/measure_tokenizers.py FILE [--text TEXT_FILE]...

FILE is a tokenizer.json or a tokenizer.model in tiktoken's format. Times are those of this process's CPU. Encoding is
measured on each text, the first time and again, and on one letter 250,000, 500,000 and 1,000,000 times.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.derived import files_of, vocabulary_of
from npllama.text.derived_names import FILES
from npllama.text.readers.tiktoken import is_tiktoken, read_tiktoken
from npllama.text.readers.tokenizer_json import read_tokenizer_json
from npllama.text.vocabulary import Vocabulary

Found = TypeVar("Found")


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def read(path: Path) -> Vocabulary:
    data = path.read_bytes()
    return read_tiktoken(data) if is_tiktoken(data) else read_tokenizer_json(data)


def opened_again(vocabulary: Vocabulary) -> float:
    """How long a model directory takes to open, the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files_of(vocabulary).items():
            (Path(folder) / name).write_bytes(content)
        return min(timed(lambda: opened(Path(folder)))[1] for _ in range(3))


def opened(folder: Path) -> BpeTokenizer:
    """The tokenizer of a model directory's files, hashed on the way as opening a model does."""
    files = {name: (folder / name).read_bytes() for name in FILES}
    for content in files.values():
        hashlib.sha256(content).hexdigest()
    return BpeTokenizer(vocabulary_of(files, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure tokenizers.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[])
    options = parser.parse_args()
    vocabulary, read_s = timed(lambda: read(options.file))
    tokenizer, made_s = timed(lambda: BpeTokenizer(vocabulary))
    print(f"{tokenizer.n_pieces:,} tokens, {len(vocabulary.merges):,} merges")
    print(
        f"opened from its file in {read_s + made_s:.3f} s, from a model directory in {opened_again(vocabulary):.3f} s"
    )
    for path in options.text:
        text = path.read_text(encoding="utf-8", errors="replace")
        fresh, size = BpeTokenizer(vocabulary), len(text.encode("utf-8")) / 1e6
        fresh.encode("a\u00e9\U0001f418 1")  # compiles the patterns
        first_s, again_s = (timed(lambda fresh=fresh, text=text: fresh.encode(text))[1] for _ in range(2))
        print(f"{path.name}: {size:.2f} MB, {size / first_s:.2f} MB/s the first time, {size / again_s:.2f} MB/s again")
    for n in (250_000, 500_000, 1_000_000):
        print(f"one letter {n:,} times: {timed(lambda n=n: tokenizer.encode('a' * n))[1]:.2f} s")


if __name__ == "__main__":
    main()
