"""Which tokenizer belongs to a checkpoint, of whatever kind it is.

The first of these: the file that is asked for; the vocabulary inside the checkpoint's own file; tokenizer.model, then
tokenizer.json in its folder; the same in the folder above, where Meta's downloads have it. Where tokenizer.model and
tokenizer.json lie side by side they are two spellings of one vocabulary, and the original is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from npllama.checkpoints import Checkpoint
from npllama.checkpoints.files import read_whole
from npllama.config import ModelConfig
from npllama.errors import CheckpointError, quote
from npllama.store.opening import vocabulary_fits
from npllama.store.text_rules import TOKENIZER_CONFIG, beside, read_settings
from npllama.store.tokenizers import TOKENIZER, FoundTokenizer, stored_sentencepiece, stored_vocabulary
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.readers.gguf_vocabulary import read_gguf_vocabulary
from npllama.text.readers.tiktoken import is_tiktoken, read_tiktoken
from npllama.text.readers.tokenizer_json import MAX_BYTES, read_tokenizer_json
from npllama.text.sentencepiece import SentencePieceTokenizer
from npllama.text.vocabulary import Rules, Vocabulary

TOKENIZER_JSON = "tokenizer.json"
NAMES = (TOKENIZER, TOKENIZER_JSON)
GGUF_KEYS = "tokenizer.ggml."
TURN_ENDS = ("<|eom_id|>", "<|eot_id|>")
"""Llama 3's control tokens that end an answer, not a text; Meta's params.json names neither."""


def find_tokenizer(source: Checkpoint, asked: str | os.PathLike[str] | None) -> FoundTokenizer:
    """The tokenizer of a checkpoint. A folder that is asked for stands for the tokenizer in it.

    Raises CheckpointError when there is none, when it is of no known kind, or has more pieces than the model rows.
    """
    if asked is None and source.vocabulary is not None:
        found = _inside(source.vocabulary)
    else:
        paths = _paths(source.folder, asked)
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is None and asked is not None and os.path.exists(paths[0]):
            path = paths[0]  # a device, or a directory: its reader says so
        if path is None:
            raise _none(source.folder, paths, asked is not None)
        found = _read(path, source.folder)
    pieces, rows = found.tokenizer.n_pieces, source.config.vocab_size
    if not vocabulary_fits(pieces, rows):
        raise CheckpointError(
            f"{found.title}: has {pieces:,} pieces, but the checkpoint's vocabulary has {rows:,} rows: more pieces "
            f"than rows; name the tokenizer that belongs to it with --tokenizer FILE (of npllama export)."
        )
    return found


def _paths(folder: Path, asked: str | os.PathLike[str] | None) -> list[Path]:
    """Where a tokenizer may lie, the first choice first."""
    if asked is None:
        folders = [folder, Path(os.path.realpath(folder)).parent]
    elif os.path.isdir(asked):
        folders = [Path(asked)]
    else:
        return [Path(asked)]
    return [one / name for one in folders for name in NAMES]


def _none(folder: Path, paths: list[Path], asked: bool) -> CheckpointError:
    folders = " and ".join(dict.fromkeys(str(path.parent) for path in paths))
    looked = str(paths[0]) if len(paths) == 1 else f"{' and '.join(NAMES)} in {folders}"
    has = "there is no such tokenizer" if asked else f"{folder}: has no tokenizer"
    return CheckpointError(
        f"{has} (looked for {looked}); one is needed{_instead(paths[0].parent)}: name it with --tokenizer FILE "
        f"(of npllama export)."
    )


def _instead(folder: Path) -> str:
    """What lies where a tokenizer was looked for, and may be one by another name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # said already: nothing was found there
        return ""
    other = next((name for name in names if name.endswith(".model")), None)
    return f", which may be {quote(other)}" if other else ""


# ---------------------------------------------------------------- kinds of files


def _read(path: Path, folder: Path) -> FoundTokenizer:
    """The tokenizer of a file, whose kind its content shows."""
    settings = beside(folder, path)
    try:
        data = read_whole(path, MAX_BYTES)
    except CheckpointError:
        data = b""  # SentencePiece's own reader says what is wrong
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        said = read_settings(settings / TOKENIZER_CONFIG) or {}
        return _of_vocabulary(read_tokenizer_json(data, said, path.name), path, settings)
    if is_tiktoken(data):
        return _of_vocabulary(read_tiktoken(data, path.name), path, settings)
    tokenizer = SentencePieceTokenizer(path)
    stored = stored_sentencepiece(data, tokenizer.n_pieces)
    return FoundTokenizer(str(path), path.name, settings, tokenizer, stored, None)


def _inside(found: Mapping[str, Any]) -> FoundTokenizer:
    """The tokenizer that a checkpoint's own file holds; the small files beside it belong to others."""
    vocabulary = read_gguf_vocabulary({GGUF_KEYS + key: value for key, value in found.items()}, "the vocabulary inside")
    kind = f"{len(vocabulary.tokens):,} tokens of kind {found.get('model')}"
    title = f"the one inside the checkpoint ({kind})"
    return FoundTokenizer(title, "the checkpoint", None, *_both(vocabulary), found.get("chat_template"))


def _of_vocabulary(vocabulary: Vocabulary, path: Path, settings: Path) -> FoundTokenizer:
    return FoundTokenizer(str(path), path.name, settings, *_both(vocabulary))


def _both(vocabulary: Vocabulary) -> tuple[BpeTokenizer, Any, Rules]:
    return BpeTokenizer(vocabulary), stored_vocabulary(vocabulary), vocabulary.rules


# ---------------------------------------------------------------- begin and end of a text


def with_ids(config: ModelConfig, found: FoundTokenizer, say: Callable[[str], None]) -> ModelConfig:
    """The config with ids of BOS and EOS that text never gives, where the vocabulary says which those are.

    Checkpoints without such ids get LLaMA 2's by default, and some name wrong ones: a text would end at a word.
    """
    rules, n = found.rules, found.tokenizer.n_pieces
    if rules is None:
        return config
    apart = {*rules.control, *rules.names.values()}
    begin = rules.bos_id
    if begin is None and config.bos_token_id is not None and (config.bos_token_id in apart or config.bos_token_id >= n):
        begin = config.bos_token_id
    ends = tuple(i for i in config.eos_token_ids if i in apart or i >= n)
    if not ends and rules.eos_id is not None:
        ends = tuple(dict.fromkeys([rules.eos_id, *(rules.names[name] for name in TURN_ENDS if name in rules.names)]))
    if (begin, ends) != (config.bos_token_id, config.eos_token_ids):
        named = ", ".join(f"{i} ({quote(found.tokenizer.spelling(i))})" for i in ends) or "none"
        first = "none" if begin is None else f"{begin} ({quote(found.tokenizer.spelling(begin))})"
        say(f"BOS is id {first}, a text ends at id {named}: the tokenizer's, as the checkpoint names no control token")
    return replace(config, bos_token_id=begin, eos_token_ids=ends)
