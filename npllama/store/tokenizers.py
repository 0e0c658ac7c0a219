"""The tokenizer in a model directory: which kinds there are, the files of each, and how it is opened.

    kind            files                    entry in the manifest
    sentencepiece   tokenizer.model          file, size, sha256
    bpe             text/derived_names.py    kind, size, sha256 of each file

A kind that the entry does not name is SentencePiece's, which every directory had before there were others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from npllama.config import ModelConfig
from npllama.store.npy import read_small
from npllama.text import derived_names
from npllama.text.protocol import Tokenizer

if TYPE_CHECKING:  # a kind of tokenizer is imported when one is opened or made: each start needs one of them
    from npllama.text.vocabulary import Rules, Vocabulary

TOKENIZER = "tokenizer.model"
SENTENCEPIECE, BPE = "sentencepiece", "bpe"
MAX_TOKENIZER_BYTES = 32 << 20


class Kind(NamedTuple):
    """The files of a kind of tokenizer, how people call it, and what opens it: folder, config -> tokenizer."""

    files: tuple[str, ...]
    title: str
    open: Callable[[Path, ModelConfig], Tokenizer]


def _open_sentencepiece(folder: Path, c: ModelConfig) -> Tokenizer:
    from npllama.text.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(folder / TOKENIZER, c.vocab_size, c.add_bos_token, c.add_eos_token)


def _open_bpe(folder: Path, c: ModelConfig) -> Tokenizer:
    from npllama.text import derived
    from npllama.text.bpe.tokenizer import BpeTokenizer

    data = {name: read_small(folder / name, MAX_TOKENIZER_BYTES) for name in derived_names.FILES}
    vocabulary = derived.vocabulary_of(data, folder)
    return BpeTokenizer(vocabulary, c.vocab_size, c.add_bos_token, c.add_eos_token)


KINDS = {
    SENTENCEPIECE: Kind((TOKENIZER,), "SentencePiece", _open_sentencepiece),
    BPE: Kind(derived_names.FILES, "byte pair encoding", _open_bpe),
}
FILES = frozenset(name for kind in KINDS.values() for name in kind.files)
"""All names that files of a tokenizer have."""


def kind_of(entry: Mapping[str, Any]) -> str:
    """The kind of tokenizer that a checked entry of the manifest is about: a key of KINDS."""
    kind: str = entry.get("kind", SENTENCEPIECE)
    return kind


def hashes(entry: Mapping[str, Any]) -> dict[str, str]:
    """File -> sha256 of a checked entry of the manifest."""
    return dict(entry["sha256"]) if "kind" in entry else {entry["file"]: entry["sha256"]}


def open_tokenizer(folder: Path, manifest: Mapping[str, Any], config: ModelConfig) -> Tokenizer:
    """The tokenizer of a model directory that has been checked (opening.py). Raises ModelError for a damaged one."""
    return KINDS[kind_of(manifest["tokenizer"])].open(folder, config)


class FoundTokenizer(NamedTuple):
    """The tokenizer of a checkpoint.

    title says where it is from, name is that of its file; settings: the folder whose small files are about it; rules:
    of a vocabulary that says itself what stands around a text, None where tokenizer_config.json says it; chat_template:
    the one inside the checkpoint.
    """

    title: str
    name: str
    settings: Path | None
    tokenizer: Tokenizer
    stored: StoredTokenizer
    rules: Rules | None
    chat_template: object = None


class StoredTokenizer(NamedTuple):
    """A tokenizer as a model directory keeps it: its entry in the manifest, and the content of its files."""

    entry: dict[str, Any]
    files: dict[str, bytes]


def stored_sentencepiece(data: bytes, n_pieces: int) -> StoredTokenizer:
    """A SentencePiece model, as it is."""
    return StoredTokenizer({"file": TOKENIZER, "size": n_pieces, "sha256": sha256_hex(data)}, {TOKENIZER: data})


def stored_vocabulary(vocabulary: Vocabulary) -> StoredTokenizer:
    """A byte pair vocabulary, as arrays that are ready to be used."""
    from npllama.text import derived

    files = derived.files_of(vocabulary)
    digests = {name: sha256_hex(content) for name, content in files.items()}
    return StoredTokenizer({"kind": BPE, "size": len(vocabulary.tokens), "sha256": digests}, files)


def stored_in(folder: Path, manifest: Mapping[str, Any]) -> StoredTokenizer:
    """The tokenizer of a model directory that has been checked."""
    entry = manifest["tokenizer"]
    return StoredTokenizer(entry, {name: read_small(folder / name, MAX_TOKENIZER_BYTES) for name in hashes(entry)})


def sha256_hex(data: bytes) -> str:
    """The SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
