"""The version of npllama, and those of the model directories that it reads: how npllama.json grows.

A new fact is written only where it differs from what its absence means: without new facts the bytes are the old ones.
With new facts `version` is the lowest that knows them all; an unknown key or version is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Iterable

from npllama.errors import quote

__version__ = "0.1.0"

VERSION = 4
"""The highest format version that is read; every lower one is read too, for ever."""

NEEDS = "needs_npllama"
"""The manifest's key, from version 2 on, for the npllama that reads it: a message of an older one can say it."""

FIRST_READER = {1: "0.1.0", 2: "0.1.0", 3: "0.1.0", 4: "0.1.0"}
"""Format version -> the first npllama that reads it."""

EXPORTER = 4
"""Raised whenever an export of the same checkpoint gives other bytes than before: kept exports are then made anew."""

SINCE = {NEEDS: 2, "sampling": 2, "add_bos_token": 2, "add_eos_token": 2, "rope_scaling": 2, "sliding_window": 2}
SINCE |= {"kind": 3, "chat_format": 4}
"""Key of the manifest, its config or tokenizer -> the format version that brought it; version 1 has all others."""


def version_of(keys: Iterable[str]) -> int:
    """The lowest format version that has these keys."""
    return max((SINCE.get(key, 1) for key in keys), default=1)


def unknown_key(key: str) -> str:
    """Why a key is refused, and what would read it."""
    return (
        f"{quote(key)} belongs to a later format than the versions 1 to {VERSION} that npllama {__version__} reads; "
        f"a newer npllama is needed"
    )


def unknown_version(found: object, needs: object) -> str:
    """Why a format version is refused, and what would read it."""
    newer = f"npllama {quote(needs)} or newer" if isinstance(needs, str) else "the npllama that wrote it"
    return (
        f"has version {quote(found)}, this npllama reads version 1 to {VERSION} (it is {__version__}); "
        f"install {newer}, or export the checkpoint again with this one."
    )
