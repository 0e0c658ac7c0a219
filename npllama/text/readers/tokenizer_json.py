"""Read tokenizer.json, the file of the package tokenizers: vocabularies of type BPE, over bytes or over characters.

Whatever the file says about ids is obeyed or refused by its name; what changes no ids (offsets, truncation, padding) is
not looked at. Which parts of the file are known stands in components.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import add
from typing import Any

import numpy as np

from npllama.errors import CheckpointError, UsageError, quote
from npllama.system import strict_json
from npllama.text.bpe import alphabet
from npllama.text.bpe.added import MAX_LENGTH, AddedToken
from npllama.text.bpe.merging import MAX_IDS
from npllama.text.readers.components import (
    PartError,
    check_keys,
    decoder,
    flag,
    normalizer,
    pre_tokenizer,
    template,
    text_of,
)
from npllama.text.vocabulary import Rules, Vocabulary, problem

MAX_BYTES = 36 << 20
"""Largest tokenizer.json that is read (Llama 3's has 9 MB, with merges as pairs 17 MB)."""
MAX_VALUES, MAX_LISTS = 3_000_000, 1_200_000
"""Most commas and opening brackets: what bounds the memory that a file takes."""
MAX_ADDED = 1 << 16

FILE_KEYS = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor"}
FILE_KEYS |= {"decoder", "model"}
MODEL_KEYS = {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk"}
MODEL_KEYS |= {"byte_fallback", "ignore_merges", "vocab", "merges"}
ADDED_FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")
ADDED_KEYS = {"id", "content", *ADDED_FLAGS}

BEGIN_OF_TEXT = "<|begin_of_text|>"
BOS_NAMES = (BEGIN_OF_TEXT, "<s>", "<｜begin▁of▁sentence｜>", "<|startoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>", "<|endoftext|>")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>\Z")


def read_tokenizer_json(
    data: bytes, settings: Mapping[str, Any] | None = None, file: str = "tokenizer.json"
) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    settings: the object of the tokenizer_config.json beside it, which says what stands in front of a text where the
    file itself does not, and which token ends one. Raises CheckpointError for what is malformed, or not supported.
    """
    try:
        if data.count(b",") > MAX_VALUES or data.count(b"[") + data.count(b"{") > MAX_LISTS:
            raise PartError(f"has more than {MAX_VALUES:,} values or {MAX_LISTS:,} lists; no vocabulary has that many")
        return _vocabulary(strict_json.parse_object(data, MAX_BYTES), settings or {})
    except (PartError, UsageError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _vocabulary(file: dict[str, Any], settings: Mapping[str, Any]) -> Vocabulary:
    check_keys("the file", file, FILE_KEYS)
    model = file.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise PartError(f"its model is of type {quote(kind)}; BPE is supported. Use the checkpoint's tokenizer.model")
    check_keys("model", model, MODEL_KEYS)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name) not in (None, "", 0):
            raise PartError(f"model: {name} is {quote(model[name])}, which is not supported; it must be null")
    names = _names(model.get("vocab"))
    added = _added(file.get("added_tokens"), model["vocab"])
    stages, byte_level = pre_tokenizer(file.get("pre_tokenizer"))
    shape = _Shape(names, byte_level, stages, normalizer(file.get("normalizer")))
    return _assembled(file, model, settings, shape, added)


@dataclass(frozen=True)
class _Shape:
    """What the parts of a file that come before the merges say."""

    names: list[str]
    byte_level: bool
    stages: tuple[tuple[str, ...], ...]
    normalizer: tuple[tuple[str, ...], ...]


def _assembled(
    file: dict[str, Any], model: dict[str, Any], settings: Mapping[str, Any], shape: _Shape, added: list[AddedToken]
) -> Vocabulary:
    byte_fallback = flag("model", model, "byte_fallback", False)
    if byte_fallback and shape.byte_level:
        raise PartError("model: byte_fallback with the pre-tokenizer ByteLevel; one of the two is supported")
    ids = model["vocab"]
    extra = [token.content for token in added if token.id >= len(shape.names)]
    tokens, odd = _spelled(shape.names, extra, shape.byte_level)
    special = {token.id for token in added if token.special}
    if byte_fallback:  # what stands for a byte of a text is text
        special -= {i for i in special if _BYTE_TOKEN.match((shape.names + extra)[i])}
    around = _around(file, settings, added)
    unknown = _unknown(model, ids)
    if unknown in (around["bos_id"], around["eos_id"]):
        unknown = None  # text never ends a text: what is no token is left out
    control = sorted(special)
    rules = Rules(
        byte_level=shape.byte_level,
        normalizer=shape.normalizer,
        stages=shape.stages,
        whole_words=flag("model", model, "ignore_merges", False),
        byte_fallback=byte_fallback,
        unknown=unknown,
        fuse_unknown=flag("model", model, "fuse_unk", False),
        strip=decoder(file.get("decoder"), shape.byte_level, byte_fallback),
        control=tuple(control),
        unreachable=tuple(sorted({*odd, *range(len(shape.names), len(tokens))})),
        added=tuple(added),
        names={token.content: token.id for token in added},
        **around,
    )
    vocabulary = Vocabulary(rules, tokens, _merges(model.get("merges"), ids, control))
    if found := problem(vocabulary):
        raise PartError(f"found {found}; the file is damaged, get it again")
    return vocabulary


# ---------------------------------------------------------------- the vocabulary


def _names(vocab: object) -> list[str]:
    """The tokens in the order of their ids, which are 0, 1, 2 and on."""
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_IDS:
        size = f"{len(vocab):,} entries" if isinstance(vocab, dict) else quote(vocab)
        raise PartError(f"model: vocab is {size}; an object of 1 to {MAX_IDS:,} tokens is needed")
    names: list[str | None] = [None] * len(vocab)
    if set(map(type, vocab.values())) != {int}:
        raise PartError("model: vocab has an id that is no whole number; the file is damaged")
    for name, i in vocab.items():
        if not 0 <= i < len(names) or names[i] is not None:
            raise PartError(
                f"model: vocab gives {quote(name)} the id {i}, which is another token's or beyond the {len(names):,} "
                f"tokens; each id from 0 on is needed once"
            )
        names[i] = name
    return names  # type: ignore[return-value]


def _spelled(names: list[str], extra: list[str], byte_level: bool) -> tuple[list[bytes], list[int]]:
    """(The bytes of each token, the ids of those that are not spelled in the alphabet of bytes)."""
    try:
        tokens, odd = alphabet.tokens_of(names) if byte_level else ([name.encode("utf-8") for name in names], [])
        return tokens + [content.encode("utf-8") for content in extra], odd
    except UnicodeEncodeError as error:
        raise PartError("model: vocab has a token with half of a surrogate pair; the file is damaged") from error


def _merges(merges: object, ids: dict[str, int], control: Sequence[int]) -> np.ndarray:
    """(M, 4) int32: left, right, rank, result; without those that make a control token."""
    if not isinstance(merges, list) or len(merges) > MAX_IDS:
        raise PartError(f"model: merges is no list of at most {MAX_IDS:,} pairs; the file is damaged")
    left, right = _pairs(merges)
    columns = [list(map(ids.get, names)) for names in (left, right, map(add, left, right))]
    for column in columns:
        if None in column:
            i = column.index(None)
            raise PartError(
                f"model: the merge of {quote(left[i])} and {quote(right[i])} needs a token that vocab does not have; "
                f"the file is damaged, get it again"
            )
    ranks: list[Any] = list(range(len(left)))
    found = np.array([columns[0], columns[1], ranks, columns[2]], dtype=np.int32).T
    return found[~np.isin(found[:, 3], np.array(control, dtype=np.int64))] if control else found


def _pairs(merges: list[Any]) -> tuple[list[str], list[str]]:
    """The left and the right tokens of merges, spelled "a b" or ["a", "b"]."""
    kinds = set(map(type, merges))
    if kinds == {str} and set(map(str.count, merges, repeat(" "))) == {1}:
        flat = " ".join(merges).split(" ")
    elif kinds <= {list} and set(map(len, merges)) <= {2} and set(map(type, chain.from_iterable(merges))) <= {str}:
        flat = list(chain.from_iterable(merges))
    else:
        raise PartError('model: merges has one that is no pair of tokens; "a b" or ["a", "b"] is needed')
    return flat[0::2], flat[1::2]


def _unknown(model: dict[str, Any], ids: dict[str, int]) -> int | None:
    name = model.get("unk_token")
    if name is None:
        return None
    if not isinstance(name, str) or name not in ids:
        raise PartError(f"model: unk_token is {quote(name)}, which vocab does not have; the file is damaged")
    return ids[name]


# ---------------------------------------------------------------- added tokens


def _added(entries: object, ids: dict[str, int]) -> list[AddedToken]:
    """The added tokens; each has the id that vocab gives it, or the next one beyond vocab."""
    if entries is None:
        return []
    if not isinstance(entries, list) or len(entries) > MAX_ADDED:
        raise PartError(f"added_tokens is no list, or has more than {MAX_ADDED:,}; the file is damaged")
    found: dict[str, AddedToken] = {}
    beyond = len(ids)
    for entry in entries:
        if not isinstance(entry, dict):
            raise PartError(f"added_tokens has {quote(entry)}; an object is needed")
        content = text_of("added_tokens", entry, "content")
        check_keys("added_tokens", entry, ADDED_KEYS)
        if len(content) > MAX_LENGTH:
            raise PartError(f"added_tokens has one of {len(content):,} characters; at most {MAX_LENGTH} are read")
        expected = ids.get(content, beyond)
        if type(entry.get("id")) is not int or entry["id"] != expected or content in found:
            raise PartError(
                f"added_tokens gives {quote(content)} the id {quote(entry.get('id'))}, where {expected} is its id or "
                f"the next one; each token once, those beyond vocab in order, is needed"
            )
        beyond += expected == beyond
        flags = {name: flag(f"added_tokens: {quote(content)}", entry, name) for name in ADDED_FLAGS}
        found[content] = AddedToken(expected, content, **flags)
    return list(found.values())


def _around(file: dict[str, Any], settings: Mapping[str, Any], added: list[AddedToken]) -> dict[str, Any]:
    """What stands before and after a text, and which ids begin and end one.

    The template of the file says it. Without one, what transformers did when such models were made: BOS if
    add_bos_token says so for a tokenizer of Llama's class; and Llama 3 always begins with its BOS.
    """
    names = {token.content: token.id for token in added}
    bos = _named(settings.get("bos_token"), names, BOS_NAMES)
    eos = _named(settings.get("eos_token"), names, EOS_NAMES)
    found = template(file.get("post_processor"))
    if found is not None:
        prefix, suffix = found
        if len(prefix) == 1:
            bos = prefix[0]
    else:
        is_llama = str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer")
        wants = [is_llama and settings.get(f"add_{kind}_token") is True for kind in ("bos", "eos")]
        prefix = (bos,) if bos is not None and (wants[0] or BEGIN_OF_TEXT in names) else ()
        suffix = (eos,) if eos is not None and wants[1] else ()
    return {"prefix": prefix, "suffix": suffix, "bos_id": bos, "eos_id": eos}


def _named(named: object, names: dict[str, int], usual: Sequence[str]) -> int | None:
    """The id of the token that the settings name, else of the first usual one."""
    if isinstance(named, dict):
        named = named.get("content")
    wanted = [named] if isinstance(named, str) else usual
    return next((names[name] for name in wanted if name in names), None)
