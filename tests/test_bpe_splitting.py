"""Pre-tokenizers cut as the package tokenizers does, whatever Unicode version this Python has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.text.bpe import splitting
from npllama.text.bpe.splitting import NAMED, PATTERNS, Splitter

CHARACTERS = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)
NASTY = [
    *"'sS\u017f a\r\n\t_-.,!1\u0663\u00bd\u2167\u0301\u200d\u3000\u00a0\x1c\x85\u200b\ufeff",
    *"日あ한ßǅʼÀ。、~中龥ࠀ퟿𐐀𞤀🐘👩🇩\U00040000\U00011de0\U000323af",
    *["'ll", "'RE", "don't", "  ", "\r\n", "123", "Hello"],
]
TEXTS = st.lists(st.one_of(st.sampled_from(NASTY), st.characters(exclude_categories=["Cs"])), max_size=14).map("".join)


@pytest.mark.parametrize("name", NAMED)
@given(text=TEXTS)
def test_the_pieces_are_the_text(name: str, text: str) -> None:
    pieces = [text] if text else []
    for pattern in NAMED[name]:
        pieces = [piece for whole in pieces for piece in Splitter(pattern)(whole)]
    assert "".join(pieces) == text
    assert all(pieces)


@pytest.mark.parametrize("pattern", sorted(PATTERNS - {splitting.DIGIT, splitting.DIGITS}))
@settings(max_examples=400)
@given(text=TEXTS)
def test_a_pattern_cuts_as_in_tokenizers(pattern: str, text: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    assert Splitter(pattern)(text) == [piece for piece, _ in theirs.pre_tokenize_str(text)]


@pytest.mark.parametrize(("pattern", "alone"), [(splitting.DIGIT, True), (splitting.DIGITS, False)])
@given(text=TEXTS)
def test_digits_are_cut_off_as_in_tokenizers(pattern: str, alone: bool, text: str) -> None:
    theirs = pytest.importorskip("tokenizers").pre_tokenizers.Digits(individual_digits=alone)
    assert Splitter(pattern)(text) == [piece for piece, _ in theirs.pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", [r"\p{L}", r"\p{N}", r"\p{P}", r"\s"])
def test_the_classes_are_those_of_tokenizers(pattern: str) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    others = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "removed").pre_tokenize_str(CHARACTERS)
    expected = set(CHARACTERS).difference(*(piece for piece, _ in others))
    assert {chr(c) for first, last in splitting.ranges(pattern) for c in range(first, last + 1)} == expected


def test_the_words_beside_added_tokens_are_those_of_tokenizers() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"?": 0}, merges=[], unk_token="?"))
    theirs.add_tokens([tokenizers.AddedToken("ZZ", single_word=True)])
    sample = CHARACTERS[:0x3000] + CHARACTERS[0xA000:0x20000:5]
    expected = {c for c in sample if theirs.token_to_id("ZZ") not in theirs.encode(f"{c}ZZ").ids}
    assert {c for c in sample if splitting.member(r"\w", c)} == expected


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "I'll  go", ["I", "'ll", " ", " go"]),
        ("gpt-2", "a'LL\n\n", ["a", "'", "LL", "\n\n"]),
        ("llama-bpe", "a'\u017fb", ["a", "'\u017f", "b"]),
        ("llama-bpe", "a  \n\n  b", ["a", "  \n\n", " ", " b"]),
        ("llama-bpe", "1234567", ["123", "456", "7"]),
        ("llama-bpe", "e\u0301a", ["e", "\u0301a"]),
        ("smollm", "a  5 x", ["a", "  ", "5", " x"]),
        ("deepseek-llm", "H\u00e9llo 12", ["H", "\u00e9", "llo", " ", "1", "2"]),
        ("deepseek-coder", "x = 10\n", ["x", " = ", "1", "0", "\n"]),
    ],
)
def test_named_rules_cut_as_their_patterns_say(name: str, text: str, pieces: list[str]) -> None:
    found = [text]
    for pattern in NAMED[name]:
        found = [piece for whole in found for piece in Splitter(pattern)(whole)]
    assert found == pieces


def test_real_pre_tokenizers_give_the_golden_pieces(shared_data: Path) -> None:
    cases = json.loads((shared_data / "family" / "golden" / "pieces.json").read_text())
    names = {"llama3": "llama-bpe", "gpt2": "gpt-2", "smollm2": "smollm", "deepseek-llm": "deepseek-llm"}
    for case in cases:
        for key, name in names.items():
            found = [case["text"]]
            for pattern in NAMED[name]:
                found = [piece for whole in found for piece in Splitter(pattern)(whole)]
            assert found == case[key], ascii(case["text"])
