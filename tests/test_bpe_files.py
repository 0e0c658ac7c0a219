"""Vocabularies of other files: tiktoken's format, GGUF metadata, a model directory; and what all tokenizers promise."""

from __future__ import annotations

import io
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny_bpe as tiny
import tiny_sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from test_bpe_tokenizer_json import TEXTS

from npllama.errors import CheckpointError, ModelError, UsageError
from npllama.text.bpe.splitting import Splitter
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.decoding import StreamDecoder
from npllama.text.derived import files_of, vocabulary_of
from npllama.text.protocol import Tokenizer
from npllama.text.readers.gguf_vocabulary import read_gguf_vocabulary
from npllama.text.readers.tiktoken import is_tiktoken, read_tiktoken
from npllama.text.readers.tokenizer_json import read_tokenizer_json
from npllama.text.sentencepiece import SentencePieceTokenizer

# --- tiktoken's format


def by_rank(tokens: list[bytes], word: bytes) -> list[int]:
    """The format's definition: of the neighbours that are a token together, those of the lowest rank are merged."""
    ranks = {token: i for i, token in enumerate(tokens)}
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(text=TEXTS)
def test_a_tiktoken_file_encodes_by_rank(text: str) -> None:
    ours, tokens = llama3(), tiny.byte_tokens()
    words = [word for pattern in ours.vocabulary.rules.stages for word in Splitter(pattern[1])(text)]
    assert ours.encode(text, bos=False) == [token for word in words for token in by_rank(tokens, word.encode())]
    assert ours.decode(ours.encode(text)) == text


MADE: dict[str, BpeTokenizer] = {}


def llama3() -> BpeTokenizer:
    if "tiktoken" not in MADE:
        MADE["tiktoken"] = BpeTokenizer(read_tiktoken(tiny.tiktoken_file()))
    return MADE["tiktoken"]


def test_the_special_tokens_of_llama_3_follow_the_ranks() -> None:
    ours, n = llama3(), len(tiny.byte_tokens())
    assert (ours.n_pieces, ours.bos_id, ours.encode("")) == (n + 256, n, [n])
    assert ours.special("<|eot_id|>") == n + 9
    assert ours.control_ids == set(range(n, n + 256))
    assert ours.control_ids.isdisjoint(ours.encode("<|eot_id|><|begin_of_text|>", bos=False))
    with pytest.raises(UsageError, match="there is no special token"):
        ours.special("<|reserved_special_token_3|>")


def test_the_format_is_known_by_its_first_line() -> None:
    assert is_tiktoken(tiny.tiktoken_file())
    assert not is_tiktoken(b"\n\x0e\n\x05<unk>")
    assert not is_tiktoken(b"{}")


FILE = tiny.tiktoken_file()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a byte that is none"),
        (FILE.replace(b" 7\n", b" 8\n"), "as line 8; lines of a token in base64 and its rank"),
        (FILE.replace(b" 7\n", b" -7\n"), "as line 8"),
        (FILE + b"!!!! 407\n", "as line 407"),
        (FILE + FILE.split(b"\n")[0].split()[0] + b" 406\n", "a token that stands twice"),
        (FILE[: FILE.index(b" 255\n") - 2], "as line 256"),
        (FILE + b"YWFh" * 300 + b" 406\n", "tokens of 900 bytes"),
        (b"\n" * (5 << 20), r"5,242,880 bytes \(up to 4,194,304 are read\)"),
    ],
)
def test_a_malformed_tiktoken_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_tiktoken(data)


def test_a_tiktoken_file_of_another_family_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npllama.text.readers.tiktoken.MAX_TOKENS", 300)
    with pytest.raises(CheckpointError, match="another family's, which cuts text by rules"):
        read_tiktoken(FILE)


# --- GGUF


def gguf_of(data: bytes, **changes: object) -> dict[str, Any]:
    """The metadata that a conversion of a SentencePiece model writes."""
    p = sentencepiece.SentencePieceProcessor()
    p.LoadFromSerializedProto(data)
    ids = range(p.get_piece_size())
    kinds = (("unknown", 2), ("control", 3), ("unused", 5), ("byte", 6))
    types = [next((n for name, n in kinds if getattr(p, f"is_{name}")(i)), 1) for i in ids]
    metadata = {
        "model": "llama",
        "tokens": [p.id_to_piece(i) for i in ids],
        "scores": [p.get_score(i) for i in ids],
        "token_type": types,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@pytest.fixture(scope="module")
def spm() -> tuple[BpeTokenizer, Any]:
    data = tiny_sentencepiece.trained()
    theirs = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(data)
    return BpeTokenizer(read_gguf_vocabulary(gguf_of(data))), theirs


@given(text=TEXTS)
@example(text="漢字 naïve Ä")
def test_a_llama_vocabulary_of_gguf_encodes_as_sentencepiece(spm: tuple[BpeTokenizer, Any], text: str) -> None:
    ours, theirs = spm
    assert ours.encode(text, bos=False) == theirs.encode(text)
    assert ours.encode(text)[0] == ours.bos_id == 1


def test_pieces_of_equal_score_merge_from_the_left_and_letters_need_no_token() -> None:
    """Two characters that are no pieces become one that is, as in SentencePiece."""
    pieces = [*tiny_sentencepiece.USUAL, *tiny_sentencepiece.BYTES]
    pieces += [(piece, tiny_sentencepiece.NORMAL) for piece in ("\u2581", "ab", "bc", "abc", "c")]
    metadata = gguf_of(tiny_sentencepiece.written(pieces))
    n = len(pieces)
    metadata["tokenizer.ggml.scores"] = [0.0] * (n - 5) + [-1.0] * 5
    ours = BpeTokenizer(read_gguf_vocabulary(metadata))
    assert ours.encode("abc", bos=False) == [n - 5, n - 2]
    assert ours.encode("bab", bos=False) == [n - 5, 3 + ord("b"), n - 4]
    assert ours.decode(ours.encode("bab")) == "bab"


def test_user_defined_tokens_of_gguf_are_found_in_text_the_longest_first_and_padding_is_not() -> None:
    metadata = gguf_of(tiny_sentencepiece.trained())
    n = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["<ab>", "b><cde>", "[PAD7]"]
    metadata["tokenizer.ggml.scores"] += [0.0] * 3
    metadata["tokenizer.ggml.token_type"] += [4, 4, 4]
    ours = BpeTokenizer(read_gguf_vocabulary(metadata))
    assert n in ours.encode("x<ab>")
    assert n not in ours.encode("<ab><cde>")
    assert n + 1 in ours.encode("<ab><cde>")
    assert n + 2 not in ours.encode("[PAD7]")
    assert ours.decode([n, n + 2, n + 1]) == "<ab>b><cde>"
    assert ours.special("<ab>") == n


def gguf_bytes(pre: object = "llama-bpe", **changes: object) -> dict[str, Any]:
    """The metadata that a conversion of tiny.byte_level writes."""
    file = tiny.byte_level()
    tokens = [*file["model"]["vocab"], *tiny.SPECIALS]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 3) + [3] * 3,
        "merges": [" ".join(pair) for pair in tiny.byte_merges()],
        "bos_token_id": len(tokens) - 3,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@given(text=TEXTS)
def test_a_gpt2_vocabulary_of_gguf_encodes_as_its_tokenizer_json(text: str) -> None:
    if "gguf" not in MADE:
        MADE["gguf"] = BpeTokenizer(read_gguf_vocabulary(gguf_bytes()))
        MADE["json"] = BpeTokenizer(read_tokenizer_json(tiny.written(tiny.byte_level(model={"ignore_merges": True}))))
    assert MADE["gguf"].encode(text) == MADE["json"].encode(text)


def test_the_arrays_of_gguf_may_be_numpys() -> None:
    metadata = gguf_of(tiny_sentencepiece.trained())
    arrays = {key: np.array(metadata[f"tokenizer.ggml.{key}"]) for key in ("scores", "token_type")}
    changed = metadata | {f"tokenizer.ggml.{key}": value for key, value in arrays.items()}
    assert read_gguf_vocabulary(changed).rules == read_gguf_vocabulary(metadata).rules


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, "model is 'bert'; llama or gpt2 is needed"),
        ({"pre": "default"}, "pre is 'default': how text is cut into words is not known"),
        ({"pre": None}, "pre is 'None': how text"),
        ({"tokens": 7}, "tokens is no array of strings"),
        ({"tokens": []}, "0 tokens; 1 to 393,216 are read|not one number for each token"),
        ({"tokens": ["\ud800"] * 409}, "a string that is not UTF-8"),
        ({"token_type": [1]}, "token_type has not one number for each token"),
        ({"merges": ["ab"]}, "merges has 'ab', which is no pair of tokens that make one"),
        ({"merges": ["a \u0100"]}, "which is no pair of tokens that make one"),
        ({"bos_token_id": 409}, "bos_token_id is '409' among 409 tokens"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x' among 409 tokens"),
        ({"add_bos_token": 1}, "add_bos_token is '1'; true or false is needed"),
        ({"model": "llama"}, "scores|lacks a token for one of the 256 bytes"),
    ],
)
def test_a_gguf_vocabulary_that_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_gguf_vocabulary({**gguf_bytes(), **{f"tokenizer.ggml.{key}": value for key, value in change.items()}})


def test_scores_that_are_no_numbers_are_refused() -> None:
    metadata = gguf_of(tiny_sentencepiece.trained())
    metadata["tokenizer.ggml.scores"][300] = float("nan")
    with pytest.raises(CheckpointError, match="scores has not one number for each token"):
        read_gguf_vocabulary(metadata)


# --- a model directory

VOCABULARIES = {
    "bytes": lambda: read_tokenizer_json(tiny.written(tiny.byte_level())),
    "characters": lambda: read_tokenizer_json(tiny.written(tiny.characters())),
    "tiktoken": lambda: read_tiktoken(tiny.tiktoken_file()),
    "gguf": lambda: read_gguf_vocabulary(gguf_of(tiny_sentencepiece.trained())),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_comes_back_from_a_model_directory_as_it_was(name: str, tmp_path: Path) -> None:
    vocabulary = VOCABULARIES[name]()
    found = vocabulary_of(files_of(vocabulary), tmp_path)
    assert (found.rules, found.tokens, found.merges.tolist()) == (
        vocabulary.rules,
        vocabulary.tokens,
        vocabulary.merges.tolist(),
    )


RULES = "tokenizer.rules.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [["pattern", ".*"]]}, "has a pre-tokenizer or normalizer that this version does not know"),
        ({"stages": [["prefix", " "], ["metaspace", tiny.MARK, "first", ""]]}, "has a pre-tokenizer or normalizer"),
        ({"normalizer": [["replace", "", "x"]]}, "has a pre-tokenizer or normalizer that this version does not know"),
        ({"control": [-1]}, "control is '.*', which cannot be"),
        ({"control": [5000]}, "found the id 5000 among 409 tokens"),
        ({"byte_level": 1}, "byte_level is '1', which cannot be"),
        ({"added": [{}]}, "added is '.*', which cannot be"),
        ({"more": 1}, "those of this version are needed"),
    ],
)
def test_a_manifest_that_vouches_for_nonsense_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    files = files_of(VOCABULARIES["bytes"]())
    files[RULES] = json.dumps({**json.loads(files[RULES]), **change}).encode()
    with pytest.raises(ModelError, match=message):
        vocabulary_of(files, tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("merges", np.zeros((3, 3), "<i4"), r"an array of <i4, columns 4, is needed"),
        ("merges", np.zeros((3, 4), "<i8"), r"an array of <i4, columns 4, is needed"),
        ("merges", np.full((1, 4), 5000, "<i4"), "a merge of ids that are no tokens"),
        ("merges", np.array([[0, 1, 0, 406]], "<i4"), "a merge that makes a control token"),
        ("lengths", np.full(409, -1, "<i4"), "do not add up"),
        ("lengths", np.full(409, 2**30, "<i4"), "do not add up"),
        ("bytes", np.array([], "u1"), "do not add up"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(file: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    files, saved = files_of(VOCABULARIES["bytes"]()), io.BytesIO()
    np.save(saved, array)
    with pytest.raises(ModelError, match=message):
        vocabulary_of({**files, f"tokenizer.{file}.npy": saved.getvalue()}, tmp_path)


def test_a_token_of_characters_that_is_no_text_is_refused(tmp_path: Path) -> None:
    files = files_of(VOCABULARIES["characters"]())
    files["tokenizer.bytes.npy"] = files["tokenizer.bytes.npy"][:-1] + b"\xff"
    with pytest.raises(ModelError, match="found a token that is not UTF-8 in the tokenizer"):
        vocabulary_of(files, tmp_path)


@pytest.mark.parametrize("token", [3 + 10, 0])
def test_a_control_token_that_text_gives_is_refused(token: int, tmp_path: Path) -> None:
    """The token of a byte, and an added one that is no control token itself."""
    file = tiny.characters()
    file["added_tokens"][0]["special"] = token != 0
    files = files_of(read_tokenizer_json(tiny.written(file)))
    files[RULES] = json.dumps({**json.loads(files[RULES]), "control": [token]}).encode()
    with pytest.raises(ModelError, match="found a control token that text gives in the tokenizer"):
        vocabulary_of(files, tmp_path)


# --- what all of them promise


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(i) for i in ids]) + decoder.finish()


def test_sentencepiece_fits_behind_the_protocol(tiny_tokenizer_file: Path) -> None:
    tokenizer, rng = SentencePieceTokenizer(tiny_tokenizer_file, vocab_size=410), random.Random(1)
    for _ in range(2000):
        ids = [rng.choice((rng.randrange(410), rng.randrange(3), 3 + rng.choice(b"\xe6\xbc\xa2a"))) for _ in range(9)]
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bytes", "characters", "gguf"])
@given(data=st.data())
def test_no_more_than_the_beginning_of_a_character_is_held_back(name: str, data: st.DataObject) -> None:
    tokenizer = promised(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_pieces - 1), max_size=20))
    decoder, text = StreamDecoder(tokenizer), ""
    for n, token in enumerate(ids, 1):
        text += decoder.push(token)
        held = tokenizer.decode(ids[:n]).removeprefix(text)
        assert tokenizer.decode(ids[:n]) == text + held
        assert set(held) <= {"\ufffd"}
        assert len(held) <= 3


def promised(name: str) -> BpeTokenizer:
    if name not in MADE:
        MADE[name] = BpeTokenizer(VOCABULARIES[name]())
    return MADE[name]


def test_bytes_that_are_no_character_are_replaced_as_the_kind_of_vocabulary_has_it() -> None:
    split_character = ["æ", "¼"]  # two of three bytes, in the alphabet of bytes
    ours = promised("bytes")
    names = list(tiny.byte_level()["model"]["vocab"])
    assert ours.decode([names.index(c) for c in split_character]) == "\ufffd"
    assert promised("characters").decode([3 + 0xE6, 3 + 0xBC]) == "\ufffd\ufffd"


def test_ids_of_a_padded_vocabulary_add_nothing_and_those_beyond_are_refused() -> None:
    vocabulary = VOCABULARIES["bytes"]()
    padded = BpeTokenizer(vocabulary, vocab_size=500)
    ids = padded.encode("to")
    assert padded.decode([499, *ids, 409]) == "to"
    for token in (-1, 500, "to", None, 1.5):
        with pytest.raises(UsageError, match=r"the id '.*' is not in the vocabulary; whole numbers from 0 to 499"):
            padded.decode([token])  # type: ignore[list-item]
    with pytest.raises(ModelError, match="has 409 pieces, but the model only 408 ids"):
        BpeTokenizer(vocabulary, vocab_size=408)


@pytest.mark.parametrize("text", [b"bytes", 7, None])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(UsageError, match=f"the text is of type {type(text).__name__}; a str is needed"):
        promised("bytes").encode(text)  # type: ignore[arg-type]


def test_half_of_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(UsageError, match=r"lone surrogate '\\ud800' at character 2"):
        promised("bytes").encode("ab\ud800")
