"""The names of the files that derived.py reads and writes: every start needs the names, few need more."""

from __future__ import annotations

RULES, BYTES, LENGTHS, MERGES = (
    "tokenizer.rules.json",
    "tokenizer.bytes.npy",
    "tokenizer.lengths.npy",
    "tokenizer.merges.npy",
)
FILES = (RULES, BYTES, LENGTHS, MERGES)
