"""Read Llama 3's own tokenizer.model: lines of a token in base64 and its rank, the format of tiktoken.

The rank is the id. Two neighbours merge when together they are a token, the lowest id first. The file says nothing of
how a text is cut into words, nor of special tokens: both are Llama 3's, whose 256 special ids follow those of the file.
"""

from __future__ import annotations

import base64
import binascii

import numpy as np

from npllama.errors import CheckpointError, quote
from npllama.text.bpe.splitting import NAMED
from npllama.text.vocabulary import Rules, Vocabulary, splits

MAX_BYTES = 4 << 20
"""Largest file that is read (Llama 3's has 2 MB)."""
MAX_TOKENS = 128_000
"""What Llama 3's has. Larger ones (Llama 4: 200,000) cut text by other rules."""
MAX_TOKEN_BYTES = 2 << 20
MAX_LENGTH = 512

N_SPECIAL = 256
SPECIAL = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|finetune_right_pad_id|>": 4,
    "<|step_id|>": 5,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}
"""Names of special tokens and where they stand after the last rank: Llama 3.1's, with which 3.0's agree as far as 3.0
uses them. The reserved ones are numbered differently in each release, and have ids only."""


def is_tiktoken(data: bytes) -> bool:
    """Whether a file begins as this format does, with one byte as token: SentencePiece's begin with a line feed."""
    return _entry(data[:64].partition(b"\n")[0]) is not None


def read_tiktoken(data: bytes, file: str = "tokenizer.model") -> Vocabulary:
    """The vocabulary of a file in tiktoken's format, with Llama 3's rules.

    Raises CheckpointError for what is malformed, has a rank out of order, lacks a byte, or is another family's.
    """
    tokens = _tokens(data, file)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens) or not all(bytes([byte]) in ids for byte in range(256)):
        raise CheckpointError(_malformed(file, "a token that stands twice, or a byte that is none"))
    pairs = np.array(splits({token: i for token, i in ids.items() if len(token) > 1}, ids), dtype=np.int32)
    left, right, result = pairs.reshape(-1, 3).T
    n = len(tokens)
    control = tuple(range(n, n + N_SPECIAL))
    rules = Rules(
        byte_level=True,
        stages=tuple(("pattern", pattern) for pattern in NAMED["llama-bpe"]),
        whole_words=True,
        prefix=(n,),
        bos_id=n,
        eos_id=n + 1,
        control=control,
        names={name: n + offset for name, offset in SPECIAL.items()},
    )
    return Vocabulary(rules, tokens + [b""] * N_SPECIAL, np.stack([left, right, result, result], axis=1))


def _tokens(data: bytes, file: str) -> list[bytes]:
    """The tokens in the order of their ranks."""
    if len(data) > MAX_BYTES:
        raise CheckpointError(_malformed(file, f"{len(data):,} bytes (up to {MAX_BYTES:,} are read)"))
    tokens: list[bytes] = []
    for number, line in enumerate(data.splitlines()):
        if number == MAX_TOKENS:
            raise CheckpointError(
                f"{file}: has more tokens than Llama 3's {MAX_TOKENS:,}: another family's, which cuts text by rules "
                f"that the file does not tell. Use the tokenizer.json of the checkpoint."
            )
        entry = _entry(line)
        if entry is None or entry[1] != number:
            raise CheckpointError(_malformed(file, f"{quote(line.decode('latin-1'))} as line {number + 1}"))
        tokens.append(entry[0])
    longest, total = max(map(len, tokens), default=0), sum(map(len, tokens))
    if longest > MAX_LENGTH or total > MAX_TOKEN_BYTES:
        raise CheckpointError(_malformed(file, f"tokens of {longest:,} bytes, {total:,} in all"))
    return tokens


def _entry(line: bytes) -> tuple[bytes, int] | None:
    """The token and the rank of a line; None for what is no such line."""
    encoded, space, rank = line.partition(b" ")
    if not (encoded and space and rank.isdigit() and len(rank) < 9):
        return None
    try:
        return base64.b64decode(encoded, validate=True), int(rank)
    except binascii.Error:
        return None


def _malformed(file: str, found: str) -> str:
    return (
        f"{file}: found {found}; lines of a token in base64 and its rank, from 0 on, are needed. "
        f"Download the file again, or use the checkpoint's tokenizer.json."
    )
