r"""Pre-tokenizers: how a text is cut into the words inside which byte pair encoding merges.

A pre-tokenizer is a list of stages; each cuts every piece that the one before left, and sees that piece alone. The
regular expressions of the family are known by their text and nothing else: what is not in PATTERNS is refused, because
an approximation gives other ids without a word. They are run by Python's `re`, which knows no \p{L}: its classes are
spelled as ranges of the tables in unicode_classes.py.
"""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_right

from npllama.text.bpe import unicode_classes

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _LLAMA3_TAIL
QWEN2 = _ANY_CASE + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _LLAMA3_TAIL
DIGIT = r"\p{Digit}"
DIGITS = r"\p{Digit}+"
LINE_END = "[\r\n]"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
SPACES_AT_END = r"\s+$"
DEEPSEEK_WORD = (
    "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+"
)
DEEPSEEK_SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
LETTERS_AFTER_SPACE = r"\s?\p{L}+"
SIGNS_AFTER_SPACE = r"\s?\p{P}+"

# Patterns that leave nothing between their matches.
_COVERING = frozenset({GPT2, LLAMA3, QWEN2})
# Patterns whose pieces are about a word long, so that it pays to remember the ids of each.
_WORDS = _COVERING | {DEEPSEEK_WORD, LETTERS_AFTER_SPACE}
PATTERNS = _WORDS | {DIGIT, DIGITS, LINE_END, CJK, SPACES_AT_END, DEEPSEEK_SIGNS, SIGNS_AFTER_SPACE}

_DEEPSEEK = (LINE_END, DEEPSEEK_WORD, DEEPSEEK_SIGNS, SPACES_AT_END, CJK, DIGIT)
NAMED = {
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "smollm": (DIGIT, GPT2),
    "deepseek-llm": _DEEPSEEK,
    "deepseek-coder": (LINE_END, LETTERS_AFTER_SPACE, SIGNS_AFTER_SPACE, CJK, DIGIT),
}
"""The stages of a pre-tokenizer by the name that GGUF files give it."""

_CLASSES = {
    r"\p{L}": unicode_classes.LETTERS,
    r"\p{N}": unicode_classes.NUMBERS,
    r"\p{P}": unicode_classes.PUNCTUATION,
    r"\p{Digit}": unicode_classes.NUMBERS + unicode_classes.MORE_NUMERIC,
    r"\s": unicode_classes.SPACES,
    r"\w": unicode_classes.LETTERS + unicode_classes.MORE_WORD,
}
# A member of each class, and a character of none, below U+10000 and named in no pattern.
_STAND_INS = {r"\p{L}": "\u00aa", r"\p{N}": "\u00b2", r"\p{P}": "\u00a7", r"\p{Digit}": "\u00b2"}
_OTHER = "\ufffd"
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")


@functools.cache
def ranges(name: str) -> tuple[tuple[int, int], ...]:
    r"""The code points of a class (\p{L}, \p{N}, \p{P}, \p{Digit}, \s, \w): first and last of each run, in order."""
    pairs = (item.partition("-") for item in _CLASSES[name].split())
    return tuple(sorted((int(first, 16), int(last or first, 16)) for first, _, last in pairs))


def member(name: str, character: str) -> bool:
    """Whether a character is of a class."""
    found = ranges(name)
    i = bisect_right(found, (ord(character), 0x110000)) - 1
    return i >= 0 and ord(character) <= found[i][1]


def character_class(name: str, below: int = 0x110000) -> str:
    r"""What stands between [ and ] in a regular expression for the characters of a class below a code point."""
    runs = [(first, min(last, below - 1)) for first, last in ranges(name) if first < below]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)


def translate(pattern: str, below: int = 0x110000) -> str:
    r"""A pattern of PATTERNS for Python's `re`, for texts whose characters are all below a code point."""
    # Without regard to case, s is also U+017F, the long s. The end of a line is an end, too.
    pattern = pattern.replace(_ANY_CASE, "'(?:[sS\u017f]|[tTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])")
    pattern = pattern.replace("$", r"(?=\n|\Z)")

    def spelled(found: re.Match[str]) -> str:
        token = found[0]
        if token == r"\S":
            return f"[^{character_class(chr(92) + 's', below)}]"
        if token.startswith("["):
            return _CLASS.sub(lambda name: character_class(name[0], below), token)
        return f"[{character_class(token, below)}]"

    return _SET_OR_CLASS.sub(spelled, pattern)


_CLASS = re.compile(r"\\p\{\w+\}|\\s")
_SET_OR_CLASS = re.compile(r"\[[^\]]*\]|\\p\{\w+\}|\\s|\\S")


class Splitter:
    """Cut a text at the matches of a pattern: each match is a piece, and so is each stretch between two matches."""

    def __init__(self, pattern: str) -> None:
        self._source = pattern
        self._covering = pattern in _COVERING
        self._names = [name for name in _STAND_INS if name in pattern]
        self._stand_in = functools.lru_cache(1 << 12)(self._find_stand_in)

    def __call__(self, text: str) -> list[str]:
        """The pieces in order; together they are the text, none is empty."""
        if not self._names:
            return self._cut(text, 0x110000)
        # Ranges beyond U+FFFF make `re` slow: they are left out where a text has none, else one character stands in
        # for another of its class.
        if text.isascii():
            return self._cut(text, 0x80)
        plain, n_replaced = _BEYOND_BMP.subn(lambda found: self._stand_in(found[0]), text)
        pieces = self._cut(plain, 0x10000)
        if n_replaced == 0:
            return pieces
        cuts = itertools.accumulate(map(len, pieces), initial=0)
        return [text[start:end] for start, end in itertools.pairwise(cuts)]

    def _cut(self, text: str, below: int) -> list[str]:
        pattern = _compiled(self._source, below)
        if self._covering:
            return pattern.findall(text)
        return [piece for piece in pattern.split(text) if piece]

    def _find_stand_in(self, character: str) -> str:
        return next((_STAND_INS[name] for name in self._names if member(name, character)), _OTHER)


@functools.cache
def _compiled(pattern: str, below: int) -> re.Pattern[str]:
    translated = translate(pattern, below)
    return re.compile(translated if pattern in _COVERING else f"({translated})")


def is_about_words(pattern: str) -> bool:
    """Whether the pieces of a pattern are about a word long."""
    return pattern in _WORDS
