"""What a path means to whoever wants to run a model: a checkpoint, and then which files it consists of.

By names and `stat` alone, so that a start that finds everything exported is not slower for it. Which files the readers
of checkpoints open is theirs to know; here stands what they may open, which is a little more.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from npllama.errors import CheckpointError
from npllama.store.opening import MANIFEST
from npllama.version import EXPORTER

WEIGHTS = re.compile(r".*\.(safetensors|bin|pth|pt|ckpt|gguf|h5|msgpack)")
CONFIGS = re.compile(r"params\.json|config\.json|.*\.index(\.[\w-]+)?\.json")
SMALL = re.compile(
    CONFIGS.pattern + r"|.*config\.json|.*token.*\.(json|model|bin)|vocab\.json|merges\.txt|chat_template.*"
)
"""Files beside the weights that may say how they are read, or how texts are."""
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "tokenizer.bin")
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
ABOVE = (*TOKENIZERS, *BESIDE_TOKENIZER)
"""Tokenizers may lie in the folder above, too, and with them what says how they are read."""
COMMON_NAME = re.compile(r"(model|pytorch_model|consolidated|ckpt|checkpoint|weights)\b.*")
HUB_REPOSITORY = re.compile(r"models--.*--([^/]+)/snapshots/[^/]+")
MAX_TITLE = 60
DIGITS = 12

FileState = tuple[str, str, int, int]
"""Name, what it is a link to (or ""), size in bytes (-1: not there) and time of change in ns."""


class Source(NamedTuple):
    """A checkpoint on the disk: its path, links to its folder resolved, and its files as they are now."""

    path: Path
    files: tuple[FileState, ...]

    @property
    def title(self) -> str:
        """A short name for people, safe as part of a file name: the folder's where the file's says nothing."""
        path = self.path
        if not path.is_dir() and COMMON_NAME.fullmatch(path.name):
            path = path.parent
        repository = HUB_REPOSITORY.search(path.as_posix())
        name = path.name if path.is_dir() else path.stem
        title = re.sub(r"[^A-Za-z0-9_.-]+", "-", repository[1] if repository and path.is_dir() else name)
        return title[:MAX_TITLE].strip(".-") or "model"

    @property
    def tokenizer_bytes(self) -> int:
        """About what the tokenizer will take in a model directory, where it is a file of its own."""
        return sum(max(size, 0) for name, _, size, _ in self.files if name in TOKENIZERS)

    def key(self, dtype: str | None) -> str:
        """What an export to this number format (None: the checkpoint's own) is called: other files, another name."""
        said = json.dumps([str(self.path), dtype, EXPORTER, self.files])
        digest = hashlib.sha256(said.encode()).hexdigest()[:DIGITS]
        return "-".join([self.title, *([dtype] if dtype else []), digest])


def is_checkpoint(path: Path) -> bool:
    """Whether a path is to be exported before it can be run: a file, or a folder of weights that is no model yet."""
    try:
        if not os.path.isdir(path):
            return os.path.isfile(path) and path.name != MANIFEST
        names = os.listdir(path)
    except (OSError, ValueError):  # said by whoever opens it
        return False
    return MANIFEST not in names and any(WEIGHTS.fullmatch(name) or CONFIGS.fullmatch(name) for name in names)


def source_of(path: Path) -> Source:
    """The files of a checkpoint. Raises CheckpointError for a folder that cannot be looked into.

    Of a folder, all weights and small files; of a weight file, its parts (names that differ in digits only) and the
    small files beside it; config.json or an index stands for its folder.
    """
    whole = os.path.isdir(path) or path.suffix == ".json"
    folder = Path(os.path.realpath(path if os.path.isdir(path) else path.parent))
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror}); check its permissions.") from error
    part = _without_digits(path.name)
    taken = [n for n in names if SMALL.fullmatch(n) or (WEIGHTS.fullmatch(n) if whole else _without_digits(n) == part)]
    files = [_state(folder, name) for name in taken]
    files += [_state(folder.parent, name, "../") for name in ABOVE]
    return Source(folder if os.path.isdir(path) else folder / path.name, tuple(files))


def _without_digits(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _state(folder: Path, name: str, prefix: str = "") -> FileState:
    """A link counts as what it leads to: a hub's cache changes links, and its files never."""
    path = folder / name
    try:
        found = os.stat(path)
        link = os.path.realpath(path) if os.path.islink(path) else ""
    except OSError:
        return prefix + name, "", -1, 0
    return prefix + name, link, found.st_size, found.st_mtime_ns
