"""A vocabulary as data: what every reader of a file makes, what a model directory keeps, what BpeTokenizer runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from npllama.text.bpe.added import AddedToken
from npllama.text.bpe.merging import MAX_IDS

MARK = "\u2581"
"""How the pieces of a SentencePiece vocabulary spell a space."""


@dataclass(frozen=True)
class Rules:
    """How text becomes symbols, and ids become text. Everything in it can be written as JSON.

    byte_level      symbols are bytes, else characters
    normalizer      what is done to a text first: ("prepend", what), ("replace", old, new)
    stages          then cut it: ("metaspace", mark, "always" | "first" | "never", "split" | ""), ("prefix", " "),
                    ("pattern", one of splitting.PATTERNS)
    whole_words     a word that is a token is its id, whatever the merges say
    byte_fallback   a character that is no token is its bytes, spelled <0x00> to <0xFF>
    unknown         the id of what is no token at all; without one it is left out
    fuse_unknown    such characters in a row are one id
    gaps            what is left out keeps its neighbours apart
    letters         characters that are no token but part of merges: their ids follow those of the tokens
    longest_first   how added tokens are looked for: LongestFirst, else LeftmostLongest
    strip           decoding takes away the space in front of a text
    prefix, suffix  the ids that encode puts around a text
    control         ids that no text gives; unreachable: ids that no character and no whole word of a text gives
    names           what special() knows
    """

    byte_level: bool
    normalizer: tuple[tuple[str, ...], ...] = ()
    stages: tuple[tuple[str, ...], ...] = ()
    whole_words: bool = False
    byte_fallback: bool = False
    unknown: int | None = None
    fuse_unknown: bool = False
    gaps: bool = False
    letters: str = ""
    longest_first: bool = False
    strip: bool = False
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_id: int | None = None
    control: tuple[int, ...] = ()
    unreachable: tuple[int, ...] = ()
    added: tuple[AddedToken, ...] = ()
    names: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Vocabulary:
    """rules; tokens: the bytes of each id, of a character vocabulary as they are spelled (b"": no token); merges (M, 4)
    int32: left, right, rank, result, without those that would make a control id."""

    rules: Rules
    tokens: list[bytes]
    merges: np.ndarray


def normalize(text: str, normalizer: tuple[tuple[str, ...], ...]) -> str:
    """A text after the steps of Rules.normalizer."""
    for kind, what, *replacement in normalizer:
        if kind == "replace":
            text = text.replace(what, replacement[0])
        elif text:
            text = what + text
    return text


def inside_rules(rules: Rules) -> Rules:
    """Rules that put nothing in front of a text, for one that goes on right behind another."""
    normalizer = tuple(step for step in rules.normalizer if step[0] != "prepend")
    stages = tuple(
        (*stage[:2], "never", *stage[3:]) if stage[0] == "metaspace" else stage
        for stage in rules.stages
        if stage[0] != "prefix"
    )
    return replace(rules, normalizer=normalizer, stages=stages)


def problem(vocabulary: Vocabulary) -> str | None:
    """What is wrong with a vocabulary, in words; None where every id in it is one of its tokens."""
    rules, n = vocabulary.rules, len(vocabulary.tokens)
    if not 0 < n + len(rules.letters) <= MAX_IDS:
        return f"{n:,} tokens (1 to {MAX_IDS:,} are read)"
    ids = [*rules.prefix, *rules.suffix, *rules.control, *rules.unreachable, *rules.names.values()]
    ids += [token.id for token in rules.added]
    ids += [token for token in (rules.bos_id, rules.eos_id, rules.unknown) if token is not None]
    if not all(0 <= token < n for token in ids):
        return f"the id {next(token for token in ids if not 0 <= token < n)} among {n:,} tokens"
    if not rules.byte_level and not all(map(_is_utf8, vocabulary.tokens)):
        return "a token that is not UTF-8"
    control = set(rules.control)
    if any(token.id in control and not token.special for token in rules.added) or (
        rules.byte_fallback and any(_BYTE_TOKEN.match(vocabulary.tokens[i]) for i in control)
    ):
        return "a control token that text gives"
    merges = vocabulary.merges
    if len(merges) and not (
        merges.min() >= 0 and merges[:, :2].max() < n + len(rules.letters) and merges[:, 3].max() < n
    ):
        return "a merge of ids that are no tokens"
    if np.isin(merges[:, 3], np.array(rules.control, dtype=np.int64)).any():
        return "a merge that makes a control token"
    return None


_BYTE_TOKEN = re.compile(rb"<0x[0-9A-F]{2}>\Z")


def _is_utf8(token: bytes) -> bool:
    try:
        token.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


Spelled = TypeVar("Spelled", str, bytes)


def splits(tokens: dict[Spelled, int], ids: dict[Spelled, int]) -> list[tuple[int, int, int]]:
    """Every way to merge one of `tokens` from two of `ids`: (left, right, result)."""
    found = []
    for token, result in tokens.items():
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                found.append((left, right, result))
    return found
