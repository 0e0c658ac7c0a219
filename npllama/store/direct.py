"""Open whatever can be run: a model directory as it is, a checkpoint by way of the folder of exported models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from npllama.errors import CheckpointError, ModelError, UsageError, quote
from npllama.numbers import named
from npllama.store.locks import Lock
from npllama.store.model_cache import (
    FOLDER,
    Entry,
    Record,
    log,
    make_models_directory,
    make_room,
    models_directory,
    remove_outdated,
    swept,
    unwritable,
)
from npllama.store.opening import OpenModel, Progress, check_model, open_model
from npllama.store.sources import Source, is_checkpoint, source_of
from npllama.store.tokenizers import open_tokenizer
from npllama.text.protocol import Tokenizer

MAX_TRIES = 10


class TextSide(NamedTuple):
    """What turns text into ids and back, without any weights: bos, eos: what a text gets by itself."""

    tokenizer: Tokenizer
    bos: bool
    eos: bool
    chat_format: str | None


def open_text_side(path: str | os.PathLike[str]) -> TextSide:
    """The tokenizer of a model directory or a checkpoint, which is not exported for it. CheckpointError, ModelError."""
    if not is_checkpoint(Path(path)):
        manifest, config = check_model(path)
        tokenizer = open_tokenizer(Path(path), manifest, config)
        return TextSide(tokenizer, config.add_bos_token, config.add_eos_token, manifest.get("chat_format"))
    from npllama.checkpoints import open_checkpoint  # here, because a model directory needs none of it
    from npllama.store.find_tokenizer import find_tokenizer
    from npllama.store.text_rules import text_rules

    with open_checkpoint(path) as checkpoint:
        found = find_tokenizer(checkpoint, None)
        rules = text_rules(checkpoint.folder, found)
    return TextSide(found.tokenizer, rules.add_bos_token, rules.add_eos_token, rules.chat_format)


def open_source(path: object, dtype: str | None = None, progress: Progress | None = None) -> OpenModel:
    """Open a model directory, or a checkpoint, which is exported first unless it has been.

    dtype: the number format of that export, None for the checkpoint's own; progress gets (bytes done, bytes in all,
    tensor) meanwhile. Raises UsageError for what is no path, or a dtype where a model directory has its own;
    CheckpointError, ModelError.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(f"model={quote(path)}: needs the path of a model directory or checkpoint, or None (the demo).")
    if progress is not None and not callable(progress):
        raise UsageError(
            f"progress={quote(progress)}: needs a function of (bytes done, bytes in all, tensor), or None."
        )
    if dtype is not None:
        named(dtype)
    given = Path(path)
    if is_checkpoint(given):
        return _open_exported(source_of(given), given, dtype, progress)
    opened = open_model(given)
    if dtype is None:
        return opened
    opened.close()
    raise UsageError(
        f"dtype={quote(dtype)}: {given} is a model directory, which has its own number formats; leave it out, or make "
        f"another model with 'npllama quantize {given} OUT --dtype q4'."
    )


def _open_exported(source: Source, given: Path, dtype: str | None, progress: Progress | None) -> OpenModel:
    """The model that a checkpoint was exported to, held in the folder while it is open; exported now if need be."""
    entry = Entry(models_directory(), source.key(dtype))
    error: ModelError | None = None
    for _ in range(MAX_TRIES):
        if not entry.is_whole:
            make_models_directory(given)
            _export(entry, source, given, dtype, progress)
        lock = _held(entry)
        if not entry.is_whole:  # removed before it was held: by `npllama models rm`, or for another's room
            _let_go(lock)
            continue
        try:
            opened = open_model(entry.path)
        except ModelError as damage:
            _let_go(lock)
            if error is not None:
                raise
            error = damage
            _discard(entry, damage)
            continue
        entry.note_use()
        entry.remove_leftovers()
        if lock is not None:
            opened.on_close(lock.close)
        return opened
    raise ModelError(f"{entry.path}: others remove it whenever it is exported; run 'npllama export {given} OUT'.")


def _held(entry: Entry) -> Lock | None:
    """The lock of an entry, held shared; None in a folder that nobody can write, so that nothing goes there."""
    try:
        lock = entry.lock()
        lock.shared(lambda: log.warning(f"{entry.path}: another process is at it; waiting ..."))
    except OSError:
        return None
    if lock.is_current:
        return lock
    lock.close()
    return _held(entry) if entry.is_whole else None


def _let_go(lock: Lock | None) -> None:
    if lock is not None:
        lock.close()


def _discard(entry: Entry, damage: ModelError) -> None:
    """Remove a model that does not open, so that it is exported again. Raises what is wrong where it is in use."""
    try:
        with entry.lock() as lock:
            if lock.alone() and lock.is_current:
                log.warning(f"{damage} (It was exported by itself, and is exported again now.)")
                entry.remove(lock)
    except OSError:
        pass
    if entry.is_whole:
        raise ModelError(f"{damage} Remove it with 'npllama models rm {entry.name}'.") from damage


def _export(entry: Entry, source: Source, given: Path, dtype: str | None, progress: Progress | None) -> None:
    """Export a checkpoint to its place, unless another process does it meanwhile; interrupted, it leaves nothing."""
    try:
        with entry.lock() as lock:
            lock.alone(lambda: log.warning(f"{given}: another process is exporting it; waiting ..."))
            if lock.is_current and not entry.is_whole:
                _export_alone(entry, lock, source, given, dtype, progress)
    except OSError as error:
        raise unwritable(entry.folder, given, error) from error
    finally:
        swept(entry, ours=True)
    remove_outdated(entry)


def _export_alone(
    entry: Entry, lock: Lock, source: Source, given: Path, dtype: str | None, progress: Progress | None
) -> None:
    from npllama.checkpoints import open_checkpoint
    from npllama.store.export import export
    from npllama.store.find_tokenizer import find_tokenizer
    from npllama.store.plan import asked_formats, own_formats, planned_bytes, title

    with open_checkpoint(given) as checkpoint:
        find_tokenizer(checkpoint, None)  # or nothing is to be removed for it
        formats = own_formats(checkpoint) if dtype is None else asked_formats(named(dtype), checkpoint.tied)
        size = planned_bytes(checkpoint.config, formats)
    make_room(entry, lock, Record(str(source.path), dtype, title(formats), size + source.tokenizer_bytes))
    about = f"{given}: exporting it once to {entry.path} ({size / 1e6:,.1f} MB, {title(formats)}) ..."
    try:
        export(given, entry.path, dtype, None, True, _announced(about, progress), log.warning)
    except ModelError as error:
        raise ModelError(f"{error} ({FOLDER} names another place for OUT.)") from error
    if source_of(given) != source:
        entry.remove(lock)
        raise CheckpointError(f"{given}: was changed while it was exported; start again when it is complete.")


def _announced(about: str, progress: Progress | None) -> Progress:
    """Progress that begins with a line, once all is checked and the writing begins: a failure before is one line."""
    lines = [about]

    def call(done: int, total: int, what: str) -> None:
        while lines:
            log.warning(lines.pop())
        if progress:
            progress(done, total, what)

    return call
