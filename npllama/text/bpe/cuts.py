"""Where the text of a character vocabulary may be cut before it is merged, without changing an id.

Such a vocabulary has no pre-tokenizer: its word is the whole text, and hardly repeats. But a merge of left and right
happens only between the last character of left and the first of right. Between two characters that no merge joins so,
no merge ever happens, whatever stands around them. LLaMA's vocabularies join letters of one script, signs, and a mark
(a space) with what follows it; nothing joins a letter with a sign, or anything with the mark behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain

import numpy as np

from npllama.text.vocabulary import MARK, Vocabulary

_MAX_CLASSES = 16


def cutter(vocabulary: Vocabulary) -> Callable[[str], list[str]] | None:
    """Cuts a text where no merge crosses; None where the merges prove of nowhere that none does."""
    rules = vocabulary.rules
    texts = [token.decode("utf-8") for token in vocabulary.tokens] + list(rules.letters)
    fallback = _byte_tokens(texts) if rules.byte_fallback else []
    left, right = vocabulary.merges[:, 0], vocabulary.merges[:, 1]
    # Without a token for every byte, what is no token joins its neighbours, or others like it.
    if rules.whole_words or len(fallback) < 256 or np.isin([left, right], fallback).any() or MARK not in texts:
        return None
    joined = _joined(texts, left, right)
    if any(b == MARK != a for a, b in joined):
        return None
    return re.compile(_pattern(joined), re.DOTALL).findall


def _byte_tokens(texts: list[str]) -> list[int]:
    wanted = {f"<0x{byte:02X}>" for byte in range(256)}
    return [i for i, text in enumerate(texts) if text in wanted]


def _joined(texts: list[str], left: np.ndarray, right: np.ndarray) -> set[tuple[str, str]]:
    """The pairs of characters between which a merge happens."""
    first = np.array([ord(text[0]) if text else 0 for text in texts])
    last = np.array([ord(text[-1]) if text else 0 for text in texts])
    pairs = np.unique(last[left].astype(np.int64) << 32 | first[right])
    return {(chr(pair >> 32), chr(pair & 0xFFFFFFFF)) for pair in pairs.tolist()}


def _pattern(joined: set[tuple[str, str]]) -> str:
    """A pattern whose matches cover a text: marks, and after them characters that are joined, directly or in steps."""
    parts = sorted(map(sorted, _components(joined)), key=len, reverse=True)
    runs = [part for part in parts if len(part) > 1 or (part[0], part[0]) in joined]
    alone = sorted(set(chain(*parts)).difference(*runs))  # joined with a mark in front only
    classes = [*runs[:_MAX_CLASSES], list(chain(*runs[_MAX_CLASSES:]))]
    choices = [f"[{''.join(map(re.escape, part))}]+" for part in classes if part]
    choices += [f"[{''.join(map(re.escape, alone))}]"] if alone else []
    return "|".join([*([f"{MARK}*(?:{'|'.join(choices)})"] if choices else []), f"{MARK}+", "."])


def _components(joined: set[tuple[str, str]]) -> list[set[str]]:
    """The characters of merges but for the mark, in sets: any two that are joined are in the same."""
    found: dict[str, set[str]] = {}
    for a, b in joined:
        if a == MARK:
            found.setdefault(b, {b})
            continue
        small, large = sorted((found.setdefault(a, {a}), found.setdefault(b, {b})), key=len)
        if small is not large:
            large |= small
            found.update(dict.fromkeys(small, large))
    return list({id(part): part for part in found.values()}.values())
