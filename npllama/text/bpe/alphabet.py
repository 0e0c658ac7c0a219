"""How byte-level vocabularies spell bytes as characters, so that a token is a JSON string without spaces or controls.

The 188 bytes that are visible characters of Latin-1 stand for themselves; the others, in increasing order, are U+0100
and on. A space is U+0120, a line feed U+010A. Source: GPT-2's bytes_to_unicode.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
_SIZE = 0x100 + len(_OTHERS)
_NO_BYTE = 0x100
CHARACTERS = {byte: chr(byte) for byte in _VISIBLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
"""Byte -> the character that spells it."""

_BYTES = np.full(_SIZE + 1, _NO_BYTE, np.uint16)
for _byte, _character in CHARACTERS.items():
    _BYTES[ord(_character)] = _byte


def tokens_of(names: Sequence[str]) -> tuple[list[bytes], list[int]]:
    """(The bytes that names spell, the indices of names that spell none: their bytes are UTF-8).

    Raises UnicodeEncodeError for half of a surrogate pair.
    """
    codes = np.frombuffer("".join(names).encode("utf-32-le"), dtype="<u4")
    found = _BYTES[np.minimum(codes, _SIZE)]
    data = found.astype(np.uint8).tobytes()
    cuts = list(accumulate(map(len, names), initial=0))
    tokens = [data[start:end] for start, end in pairwise(cuts)]
    odd = np.searchsorted(np.array(cuts[1:]), np.flatnonzero(found == _NO_BYTE), side="right")
    others: list[int] = np.unique(odd).tolist()
    for i in others:
        tokens[i] = names[i].encode("utf-8")
    return tokens, others
