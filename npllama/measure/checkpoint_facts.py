"""What a checkpoint is before any export: its layout, sizes, tokenizer, and what each number format would take here."""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npllama.errors import CheckpointError

if TYPE_CHECKING:
    from npllama.checkpoints import Checkpoint


UNKNOWN = 1 << 62
"""What machine.free_memory says where nobody can tell."""


def checkpoint_facts(path: str) -> dict[str, Any]:
    """Everything that `npllama info CHECKPOINT` shows; of the weights only the headers are read. CheckpointError."""
    from npllama import cache
    from npllama.checkpoints import open_checkpoint
    from npllama.store.sources import source_of

    files = [(name, size) for name, _, size, _ in source_of(Path(path)).files if size >= 0]
    with open_checkpoint(path) as checkpoint:
        c, tensors = checkpoint.config, checkpoint.tensors.values()
        return {
            "checkpoint": path,
            "kind": checkpoint.layout,
            "architecture": "llama",
            "config": c.to_json(),
            "tensors": len(tensors),
            "tensor_formats": dict(Counter(tensor.stored_as for tensor in tensors).most_common()),
            "tied_output": checkpoint.tied,
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "files": dict(files),
            "size_bytes": sum(size for _, size in files),
            "full_cache_bytes": cache.size_bytes(c.n_layers, c.n_kv_heads, c.max_seq_len, c.head_dim),
            **_text_facts(checkpoint),
            **_number_formats(checkpoint),
        }


def _text_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer that an export would take, what is said about texts, and remarks."""
    from npllama.store.find_tokenizer import find_tokenizer
    from npllama.store.text_rules import text_rules
    from npllama.store.tokenizers import KINDS, kind_of

    remarks = list(checkpoint.warnings)
    try:
        found = find_tokenizer(checkpoint, None)
    except CheckpointError as error:
        return {"tokenizer": "none that fits", "remarks": [*remarks, str(error)]}
    rules = text_rules(checkpoint.folder, found)
    return {
        "tokenizer": {
            "kind": KINDS[kind_of(found.stored.entry)].title,
            "file": found.title,
            "pieces": found.tokenizer.n_pieces,
            "add_bos_token": rules.add_bos_token,
            "add_eos_token": rules.add_eos_token,
        },
        "suggested_sampling": "none" if rules.sampling is None else rules.sampling.to_json(),
        "chat_format": "none" if rules.chat_format is None else rules.chat_format,
        "remarks": [*remarks, *rules.remarks],
    }


def _number_formats(checkpoint: Checkpoint) -> dict[str, Any]:
    """For each number format: bytes on the disk, bytes in memory with the cache of a context, and whether they fit."""
    from npllama import cache
    from npllama.inference import MAX_DEFAULT_CONTEXT
    from npllama.numbers import FORMATS
    from npllama.store.plan import asked_formats, own_formats, planned_bytes, title
    from npllama.system import machine

    c = checkpoint.config
    context = min(c.max_seq_len, MAX_DEFAULT_CONTEXT)
    kept = cache.size_bytes(c.n_layers, c.n_kv_heads, context, c.head_dim)
    own = own_formats(checkpoint)
    where, disk = _free_disk()
    memory = found if (found := machine.free_memory()) < UNKNOWN else None
    rows = {}
    for name, number_format in FORMATS.items():
        size = planned_bytes(c, asked_formats(number_format, checkpoint.tied))
        rows[name] = {
            "disk_bytes": size,
            "memory_bytes": size + kept,
            "fits_disk": None if disk is None else size <= disk,
            "fits_memory": None if memory is None else size + kept <= memory,
        }
    return {
        "context": context,
        "cache_bytes": kept,
        "own_number_format": title(own),
        "own_number_format_bytes": planned_bytes(c, own),
        "dtypes": rows,
        "free_memory_bytes": memory,
        "free_disk_bytes": disk,
        "exports_go_to": where,
    }


def _free_disk() -> tuple[str, int | None]:
    """Where exports are kept, and the bytes that are free there (None: nobody can tell)."""
    from npllama.store.model_cache import models_directory

    folder = models_directory()
    there = next(place for place in (folder, *folder.parents) if os.path.isdir(place))
    try:
        return str(folder), shutil.disk_usage(there).free
    except OSError:
        return str(folder), None
