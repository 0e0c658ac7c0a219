"""Real vocabularies: do they give the ids that the programs they come from give?

The results are those of tiktoken, of the package tokenizers, of sentencepiece and of llama.cpp's own tests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from test_bpe_files import gguf_of
from test_bpe_tokenizer_json import COUNT, TEXTS

from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.derived import files_of, vocabulary_of
from npllama.text.readers.gguf_vocabulary import read_gguf_vocabulary
from npllama.text.readers.tiktoken import read_tiktoken
from npllama.text.readers.tokenizer_json import read_tokenizer_json
from npllama.text.vocabulary import Vocabulary


def from_json(name: str, folder: Path) -> Vocabulary:
    return read_tokenizer_json((folder / name / "tokenizer.json").read_bytes())


def from_tiktoken(folder: Path) -> Vocabulary:
    return read_tiktoken((folder / "llama3" / "tokenizer.model").read_bytes())


def from_gguf(file: str, folder: Path) -> Vocabulary:
    return read_gguf_vocabulary(gguf_of((folder / file).read_bytes()))


def gguf_from_json(name: str, pre: str, folder: Path) -> Vocabulary:
    """As a conversion writes it: tokens, types, merges as strings."""
    file = json.loads((folder / name / "tokenizer.json").read_bytes())
    vocab = file["model"]["vocab"]
    types = dict.fromkeys(vocab, 1) | {t["content"]: 3 if t["special"] else 4 for t in file["added_tokens"]}
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": list(types),
        "token_type": list(types.values()),
        "merges": [" ".join(pair) for pair in file["model"]["merges"]],
    }
    return read_gguf_vocabulary({f"tokenizer.ggml.{key}": value for key, value in metadata.items()})


READ: dict[str, tuple[Callable[[Path], Vocabulary], str, str | None]] = {
    "GPT-2": (partial(from_json, "gpt2"), "gpt2", "gpt-2"),
    "SmolLM2": (partial(from_json, "smollm2"), "smollm2", None),
    "DeepSeek": (partial(from_json, "deepseek-llm"), "deepseek-llm", "deepseek-llm"),
    "Llama 3": (partial(from_json, "llama3"), "llama3", "llama-bpe"),
    "Llama 3, Meta's file": (from_tiktoken, "llama3", "llama-bpe"),
    "Mistral": (partial(from_json, "mistral"), "mistral-v1-json", None),
    "Mistral against SentencePiece": (partial(from_json, "mistral"), "mistral-v1", None),
    "LLaMA 2 as GGUF": (partial(from_gguf, "llama2/tokenizer.model"), "llama2", "llama-spm"),
    "Mistral v1 as GGUF": (partial(from_gguf, "mistral/tokenizer.model.v1"), "mistral-v1", None),
    "Mistral v3 as GGUF": (
        partial(from_gguf, "mistral/mistral_instruct_tokenizer_240323.model.v3"),
        "mistral-v3",
        None,
    ),
    "SmolLM2 as GGUF": (partial(gguf_from_json, "smollm2", "smollm"), "smollm2", None),
    "DeepSeek as GGUF": (partial(gguf_from_json, "deepseek-llm", "deepseek-llm"), "deepseek-llm", "deepseek-llm"),
}
LOSES_BYTES = "SmolLM2"  # whose vocabulary lacks the tokens of 21 bytes


@pytest.fixture(scope="module", params=READ)
def golden(request: pytest.FixtureRequest, shared_data: Path) -> tuple[str, BpeTokenizer, Path]:
    folder = shared_data / "family"
    if not (folder / "golden").is_dir():
        pytest.skip("real vocabularies: the folder of golden results has no family of tokenizers")
    return request.param, BpeTokenizer(READ[request.param][0](folder)), folder / "golden"


def test_real_vocabularies_give_the_golden_ids(golden: tuple[str, BpeTokenizer, Path]) -> None:
    name, tokenizer, folder = golden
    cases = json.loads((folder / f"{READ[name][1]}.json").read_text())["cases"]
    assert len(cases) == 286
    for case in cases:
        ids = tokenizer.encode(case["text"], bos=False)
        assert ids == case["ids"], ascii(case["text"])
        # What a text gives is that text: marks are spaces in vocabularies of characters.
        if "\u2581" not in case["text"] and not name.startswith(LOSES_BYTES):
            assert tokenizer.decode(ids) == case["text"]


@pytest.mark.parametrize("golden", [name for name in READ if READ[name][2]], indirect=True)
def test_real_vocabularies_give_the_ids_of_llama_cpps_tests(golden: tuple[str, BpeTokenizer, Path]) -> None:
    name, tokenizer, folder = golden
    pair = READ[name][2]
    texts = (folder / f"ggml-vocab-{pair}.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (folder / f"ggml-vocab-{pair}.gguf.out").read_text().split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, bos=False) == [int(i) for i in line.split()], ascii(text)


def test_a_real_vocabulary_comes_back_from_a_model_directory(
    golden: tuple[str, BpeTokenizer, Path], tmp_path: Path
) -> None:
    _, tokenizer, _ = golden
    found = vocabulary_of(files_of(tokenizer.vocabulary), tmp_path)
    assert (found.rules, found.tokens) == (tokenizer.vocabulary.rules, tokenizer.vocabulary.tokens)
    assert (found.merges == tokenizer.vocabulary.merges).all()


def test_a_real_vocabulary_of_gguf_cuts_texts_where_sentencepiece_merges_nothing(shared_data: Path) -> None:
    """Random texts of its pieces and characters, side by side where no piece has them so."""
    path = shared_data / "llama2-tokenizer.model"
    theirs, rng = sentencepiece.SentencePieceProcessor(model_file=str(path)), random.Random(1)
    ours = BpeTokenizer(read_gguf_vocabulary(gguf_of(path.read_bytes())))
    characters = sorted({c for i in range(259, 32000) for c in theirs.id_to_piece(i)} | set("\n\t🐘\u00a0"))
    pieces = [theirs.id_to_piece(i).replace("\u2581", " ") for i in range(259, 32000)]
    for _ in range(1500):
        text = "".join(rng.choice(rng.choice((characters, pieces, " etaoin"))) for _ in range(rng.randrange(20)))
        assert ours.encode(text, bos=False) == theirs.encode(text), ascii(text)


@pytest.fixture(scope="module", params=["gpt2", "smollm2", "deepseek-llm", "llama3", "mistral"])
def both(request: pytest.FixtureRequest, shared_data: Path) -> tuple[BpeTokenizer, Any]:
    """A real tokenizer.json here and in the package tokenizers, which takes special tokens in a text for text."""
    tokenizers = pytest.importorskip("tokenizers")
    path = shared_data / "family" / request.param / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return BpeTokenizer(read_tokenizer_json(path.read_bytes())), theirs


@settings(max_examples=COUNT)
@given(text=TEXTS)
def test_random_texts_give_the_ids_of_tokenizers(both: tuple[BpeTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids
