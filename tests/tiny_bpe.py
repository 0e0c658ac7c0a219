"""Small vocabularies for tests, trained on the spot by the definition of byte pair encoding, and their files.

`byte_level` and `characters` are tokenizer.json files as dictionaries, for tests to change: the one like GPT-2's and
Llama 3's, the other like LLaMA 2's without its tokenizer.model.
"""

from __future__ import annotations

import base64
import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from npllama.text.bpe import alphabet
from npllama.text.bpe.splitting import LLAMA3

MARK = "\u2581"
CONTROLS = ["<unk>", "<s>", "</s>"]
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]

SPLIT_LLAMA3 = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
JUST_BYTES = {**BYTE_LEVEL, "use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
PREPEND = {"type": "Prepend", "prepend": MARK}
SPACES_TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
LEGACY = {"type": "Sequence", "normalizers": [PREPEND, SPACES_TO_MARKS]}
MARKS_TO_SPACES = {"type": "Replace", "pattern": {"String": MARK}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
CHARACTER_DECODER = {
    "type": "Sequence",
    "decoders": [MARKS_TO_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP],
}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@functools.cache
def text() -> str:
    """Seeded words, numbers and signs in several scripts."""
    rng = random.Random(3)
    words = ["".join(rng.choices("aeionrst", k=rng.randint(1, 6))) for _ in range(80)]
    words += [
        "don't",
        "we'll",
        "I'M",
        "naïve",
        "日本",
        "語",
        "привет",
        "12",
        "2024",
        "!!",
        "x=1;",
        "ſ",
        "🐘",
        "  ",
        "\n\n",
    ]
    return " ".join(rng.choices(words, k=900))


def train(words: Sequence[Sequence[str]], n_merges: int) -> list[tuple[str, str]]:
    """The merges of byte pair encoding, by definition: the most frequent pair of neighbours first."""
    counts = Counter(map(tuple, words))
    merges = []
    for _ in range(n_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in counts.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        counts = Counter({_merged(word, best): count for word, count in counts.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


@functools.cache
def byte_merges() -> list[tuple[str, str]]:
    """Merges over the alphabet of bytes, of words with their space in front."""
    words = text().replace(" ", "\0 ").split("\0")
    return train(["".join(alphabet.CHARACTERS[byte] for byte in word.encode()) for word in words], 150)


@functools.cache
def character_merges() -> list[tuple[str, str]]:
    """Merges over characters, of words with their mark in front."""
    return [(MARK, MARK), *train((MARK + text().replace(" ", f"\0{MARK}")).split("\0"), 120)]


def added(content: str, token: int, **flags: bool) -> dict[str, Any]:
    """An entry of added_tokens."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": token, "content": content, **usual, **flags}


def byte_level(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json over bytes, cut as Llama 3's; `changes` replace what stands in it."""
    merges = byte_merges()
    names = [alphabet.CHARACTERS[byte] for byte in range(256)] + [a + b for a, b in merges]
    special = [added(name, len(names) + i, special=True) for i, name in enumerate(SPECIALS)]
    return _file(names, merges, special, sequence(SPLIT_LLAMA3, JUST_BYTES), None, BYTE_LEVEL, {}, changes)


def characters(**changes: Any) -> dict[str, Any]:
    """A tokenizer.json over characters, like LLaMA 2's; `changes` replace what stands in it."""
    merges = character_merges()
    single = sorted({c for pair in merges for part in pair for c in part} | set("aeionrst12!,;"))
    names = list(dict.fromkeys([*CONTROLS, *BYTE_NAMES, *(a + b for a, b in merges), *single]))
    special = [added(name, i, special=True) for i, name in enumerate(CONTROLS)]
    model = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    return _file(names, merges, special, None, LEGACY, CHARACTER_DECODER, model, changes)


def _file(
    names: list[str],
    merges: list[tuple[str, str]],
    special: list[dict[str, Any]],
    pre_tokenizer: object,
    normalizer: object,
    decoder: object,
    model: dict[str, Any],
    changes: dict[str, Any],
) -> dict[str, Any]:
    usual = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    usual |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    vocab = {name: i for i, name in enumerate(names)}
    changes = dict(changes)
    pieces = {"type": "BPE", **usual, **model, "vocab": vocab, "merges": [list(pair) for pair in merges]}
    pieces.update(changes.pop("model", {}))
    special += changes.pop("more_added", [])
    file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special}
    file |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder}
    return {**file, "model": pieces, **changes}


def size(file: dict[str, Any]) -> int:
    """The id after the last of a tokenizer.json."""
    return max([*file["model"]["vocab"].values(), *(token["id"] for token in file["added_tokens"])]) + 1


def written(file: dict[str, Any]) -> bytes:
    return json.dumps(file).encode()


def tiktoken_file() -> bytes:
    """The vocabulary of byte_level in tiktoken's format."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(byte_tokens()))


def byte_tokens() -> list[bytes]:
    tokens, odd = alphabet.tokens_of([*alphabet.CHARACTERS.values(), *(a + b for a, b in byte_merges())])
    assert not odd
    return sorted(tokens[:256]) + tokens[256:]
