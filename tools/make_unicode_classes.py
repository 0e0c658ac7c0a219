"""Write npllama/text/bpe/unicode_classes.py: the character classes of pre-tokenizers, as the package tokenizers has
them.

    python tools/make_unicode_classes.py

Python's own unicodedata is another Unicode version with every Python release, and ids must not depend on that. So every
code point is put to the package that defines the ids: to its regular expressions (\\p{L}, \\p{N}), to its splitter
Digits and to its added tokens that match whole words only.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

TARGET = Path(__file__).resolve().parent.parent / "npllama" / "text" / "bpe" / "unicode_classes.py"
CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]

HEADER = '''"""Unicode classes of pre-tokenizers: code points as hexadecimal ranges.

Written by tools/make_unicode_classes.py. The classes are those of the package tokenizers {version}, whatever Unicode
version this Python has.
"""

'''


def matched(pattern: str) -> set[str]:
    """The characters that a regular expression of tokenizers matches."""
    text = "".join(CHARACTERS)
    left = pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text)
    return set(CHARACTERS).difference(*(piece for piece, _ in left))


def numeric() -> set[str]:
    """The characters that Digits cuts off."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {c for c in CHARACTERS if len(digits.pre_tokenize_str(f"a{c}")) == 2}


def word() -> set[str]:
    """The characters beside which an added token with single_word does not match."""
    tokenizer = Tokenizer(models.BPE(vocab={"?": 0}, merges=[], unk_token="?"))
    tokenizer.add_tokens([AddedToken("ZZ", single_word=True)])
    added = tokenizer.token_to_id("ZZ")
    return {c for c in CHARACTERS if added not in tokenizer.encode(f"{c}ZZ").ids}


def ranges(characters: Iterable[str]) -> str:
    """Characters as "41-5A 61-7A AA ..."."""
    found: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return " ".join(f"{a:X}" if a == b else f"{a:X}-{b:X}" for a, b in found)


def constant(name: str, characters: Iterable[str], meaning: str) -> str:
    lines = textwrap.wrap(ranges(characters), 116, break_on_hyphens=False)
    return f'{name} = """\n' + "\n".join(lines) + f'\n"""\nr"""{meaning}"""\n'


def main() -> None:
    letters, numbers = matched(r"\p{L}"), matched(r"\p{N}")
    words = word()
    assert letters <= words
    assert numbers <= numeric()
    parts = [
        constant("LETTERS", letters, r"\p{L}"),
        constant("NUMBERS", numbers, r"\p{N}"),
        constant("PUNCTUATION", matched(r"\p{P}"), r"\p{P}"),
        constant("MORE_NUMERIC", numeric() - numbers, r"What the splitter Digits cuts off beyond \p{N}."),
        constant("MORE_WORD", words - letters, r"What \w holds beyond \p{L}, next to added tokens."),
        constant("SPACES", matched(r"\s"), r"\s"),
    ]
    TARGET.write_text(HEADER.format(version=tokenizers.__version__) + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
