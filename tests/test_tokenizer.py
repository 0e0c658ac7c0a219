"""Text and ids: against SentencePiece itself, against golden ids of LLaMA 2, and files that are not as needed."""

from __future__ import annotations

import ast
import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece
import tiny_sentencepiece as tiny
from hypothesis import example, given
from hypothesis import strategies as st

from npllama.errors import ModelError, NpllamaError, UsageError
from npllama.text import sentencepiece as tokenizer
from npllama.text.sentencepiece import SentencePieceTokenizer

LETTERS = [(letter, tiny.NORMAL) for letter in "\u2581ab<s>/"]
ODD_FILES = {
    "as LLaMA 2's": {},
    "no space in front": {"add_dummy_prefix": False},
    "control pieces": {"control_symbols": ["<pad>"]},
    "all leading spaces removed": {"remove_extra_whitespaces": True},
    "neither": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False},
    "own text for unknown": {"unk_surface": " \u2581?", "byte_fallback": False},
    "unknown spelled with a space": {"unk_piece": "\u2581?"},
    "user-defined pieces": {"user_defined_symbols": ["[INST]", "\u2581\u2581\u2581", "  x"]},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "spaces behind words": {"treat_whitespace_as_suffix": True},
}


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tiny_tokenizer_file)


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(shared_data / "llama2-tokenizer.model")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "tokenizer.model"
        path.write_bytes(data)
        return path

    return write


def official(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def some_ids(rng: random.Random, n_pieces: int) -> list[int]:
    """Ids as no text has them: mostly control ids, bytes and spaces."""
    kinds = (lambda: rng.randrange(3), lambda: rng.randrange(3, 259), lambda: rng.randrange(n_pieces))
    return [min(rng.choice(kinds)(), n_pieces - 1) for _ in range(rng.randrange(12))]


def refuse(path: Path, message: str, vocab_size: int | None = None) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        SentencePieceTokenizer(path, vocab_size)
    assert "\n" not in str(caught.value)


# --- text to ids


def test_encode_gives_the_ids_of_meta(llama2: SentencePieceTokenizer, shared_data: Path) -> None:
    for case in json.loads((shared_data / "golden" / "llama2_tokenizer.json").read_text(encoding="utf-8")):
        assert llama2.encode(case["text"], bos=False) == case["ids"]


ORDINARY = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=tokenizer.SPACE))


@given(text=ORDINARY)
@example(text="")
@example(text="   three spaces, then\ttab\r\n")
@example(text="a\0b\0")
@example(text="\ufffd\U0010ffff\ufeff")
def test_any_text_comes_back(tok: SentencePieceTokenizer, text: str) -> None:
    assert tok.decode(tok.encode(text)) == text


@given(first=ORDINARY, second=ORDINARY)
@example(first="Hello", second=" there")
@example(first="Hello", second="fore")
@example(first="a", second="\n")
def test_a_text_that_goes_on_gets_no_space_in_front(tok: SentencePieceTokenizer, first: str, second: str) -> None:
    ids = [*tok.encode(f"{first}."), *tok.encode(second, bos=False, inside=True)]
    assert tok.decode(ids) == f"{first}.{second}"


@pytest.mark.parametrize("text", ["", " ", "a", "<s>", "<s> a", "</s>", "  a"])
def test_bos_is_put_once_in_front_of_any_text(tok: SentencePieceTokenizer, text: str) -> None:
    assert tok.encode(text) == [tok.bos_id, *tok.encode(text, bos=False)]
    assert tok.encode(text).count(tok.bos_id) == 1


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "a</s>b", " </s>", "<0x0A>", "</s></s>", "\n<s>\n"])
def test_the_names_of_control_pieces_are_ordinary_text(tok: SentencePieceTokenizer, text: str) -> None:
    ids = tok.encode(text, bos=False)
    assert not {0, tok.bos_id, tok.eos_id} & set(ids)
    assert tok.decode(ids) == text


@pytest.mark.parametrize("control", ["ab", "</s>a", "éé", "<ab>"])
def test_a_control_piece_among_the_letters_cannot_be_typed(file: Callable[[bytes], Path], control: str) -> None:
    odd = SentencePieceTokenizer(file(tiny.written([*tiny.USUAL, *tiny.BYTES, *LETTERS, (control, tiny.CONTROL)])))
    text = f"{control} a{control}</s>aé {control}"
    assert odd.control_ids == {1, 2, odd.n_pieces - 1}
    assert odd.control_ids.isdisjoint(odd.encode(text, bos=False))
    assert odd.decode(odd.encode(text)) == text


@pytest.mark.parametrize("control", ["x", "é", "\u2581", "\u2581x", "\u2581<s>"])
def test_a_control_piece_that_is_spelled_like_text_is_refused(file: Callable[[bytes], Path], control: str) -> None:
    pieces = [piece for piece in LETTERS if piece[0] != control]
    path = file(tiny.written([*tiny.USUAL, *tiny.BYTES, *pieces, (control, tiny.CONTROL)]))
    refuse(path, r"the control piece '.*' \(id \d+\) is spelled like text.* are needed, as in '<s>'")


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc"])
def test_half_of_a_surrogate_pair_is_refused(tok: SentencePieceTokenizer, text: str) -> None:
    position = len(text) // 2
    with pytest.raises(UsageError, match=rf"lone surrogate '\\ud[8f][0f]{{2}}' at character {position}; .* is needed"):
        tok.encode(text)


@pytest.mark.parametrize("text", [b"bytes", 7, None, ["list"]])
def test_what_is_no_text_is_refused(tok: SentencePieceTokenizer, text: object) -> None:
    with pytest.raises(UsageError, match=f"the text is of type {type(text).__name__}; a str is needed"):
        tok.encode(text)


# --- ids to text


@pytest.mark.parametrize("options", ODD_FILES.values(), ids=ODD_FILES.keys())
def test_decode_is_that_of_sentencepiece_for_any_ids(file: Callable[[bytes], Path], options: dict[str, object]) -> None:
    path = file(tiny.trained(**options))
    ours, theirs, rng = SentencePieceTokenizer(path), official(path), random.Random(1)
    spaces = [i for i in range(ours.n_pieces) if set(theirs.id_to_piece(i)) == {tokenizer.SPACE}]
    for _ in range(2000):
        ids = rng.choices(spaces, k=rng.randrange(3)) + some_ids(rng, ours.n_pieces)
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_decode_is_that_of_sentencepiece_for_llama_2(llama2: SentencePieceTokenizer) -> None:
    theirs, rng = official(llama2.path), random.Random(2)
    for _ in range(2000):
        ids = some_ids(rng, 32000)
        assert llama2.decode(ids) == theirs.decode(ids), ids


def test_two_pieces_may_have_the_same_text(tok: SentencePieceTokenizer) -> None:
    byte, letter = 3 + ord("e"), tok.encode("xe", bos=False)[-1]
    assert byte != letter
    assert tok.decode([byte]) == tok.decode([letter]) == "e"


def test_only_the_space_in_front_of_the_text_is_taken_away(tok: SentencePieceTokenizer) -> None:
    one = tok.encode("to", bos=False)
    assert tok.decode([*one, *one]) == "to to"
    assert tok.decode([tok.bos_id, *one, tok.eos_id, *one]) == "to to"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("漢".encode(), "漢"),
        ("漢".encode()[:2], "\ufffd\ufffd"),
        (b"\xff\xe6\xbc\xa2\xe6", "\ufffd漢\ufffd"),
        (b"\xed\xa0\x80", "\ufffd" * 3),
        (b"\xf0\x80\x80\x80", "\ufffd" * 4),
        (b"a\xc3", "a\ufffd"),
    ],
)
def test_byte_pieces_are_utf8_and_each_bad_byte_is_replaced(
    tok: SentencePieceTokenizer, data: bytes, text: str
) -> None:
    assert tok.decode([3 + byte for byte in data]) == text


def test_a_control_id_gives_nothing_but_ends_a_character(tok: SentencePieceTokenizer) -> None:
    assert tok.decode([1, 2]) == ""
    assert tok.decode([3 + 0xC3, 2, 3 + 0xA9]) == "\ufffd\ufffd"


def test_ids_of_a_padded_vocabulary_give_nothing(tiny_tokenizer_file: Path) -> None:
    padded = SentencePieceTokenizer(tiny_tokenizer_file, vocab_size=512)
    ids = padded.encode("to")
    assert (padded.n_pieces, padded.vocab_size) == (400, 512)
    assert padded.decode([400, *ids, 511]) == "to"
    with pytest.raises(UsageError, match="the id '512' is not in the vocabulary; whole numbers from 0 to 511"):
        padded.decode([512])


@pytest.mark.parametrize("token", [-1, 400, 2**70, 1.5, "to", None])
def test_an_id_outside_the_vocabulary_is_refused(tok: SentencePieceTokenizer, token: object) -> None:
    with pytest.raises(
        UsageError, match=r"the id '.*' is not in the vocabulary; whole numbers from 0 to 399 are needed"
    ):
        tok.decode([1, token])


# --- files


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a message cuts long paths short
    message = r"^tokenizer\.model: cannot read '.*tokenizer\.model' \(No such file or directory\); .* is needed"
    refuse(Path("tokenizer.model"), message)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, r"no regular file|cannot read '.*' \(Permission denied\); .* is needed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "no regular file")


def test_an_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as sparse:
        sparse.truncate(1 << 40)
    refuse(path, "a size of 1099511627776 bytes")


@pytest.mark.parametrize("data", [b"", b"\0", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 4000])
def test_what_is_no_sentencepiece_model_is_refused(file: Callable[[bytes], Path], data: bytes) -> None:
    refuse(file(data), "a SentencePiece tokenizer.model with <s> and </s> as control pieces is needed. Download")


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (
            [("<unk>", tiny.UNKNOWN), ("<s>", tiny.USER_DEFINED), ("</s>", tiny.CONTROL)],
            r"no control pieces .* -1 and 2",
        ),
        ([("<unk>", tiny.UNKNOWN), ("<s>", tiny.CONTROL), ("</s>", tiny.NORMAL)], r"no control pieces .* 1 and -1"),
        ([("<unk>", tiny.UNKNOWN), ("<s>", tiny.CONTROL)], r"no control pieces .* 1 and -1"),
        ([*tiny.USUAL, (b"\xff\xfe", tiny.NORMAL)], "a piece that is not UTF-8"),
        ([*tiny.USUAL, ("a", tiny.NORMAL), ("a", tiny.NORMAL)], "SentencePiece does not accept"),
        ([*tiny.USUAL, ("a" * 200_000, tiny.NORMAL)], "SentencePiece does not accept"),
    ],
)
def test_a_model_with_odd_pieces_is_refused(
    file: Callable[[bytes], Path], pieces: Sequence[tuple[str | bytes, int]], message: str
) -> None:
    refuse(file(tiny.written(pieces, byte_fallback=False)), message)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_tokenizer_file: Path) -> None:
    refuse(tiny_tokenizer_file, "has 400 pieces, but the model only 399 ids: they do not belong together", 399)


def test_more_pieces_than_any_vocabulary_are_refused(
    tiny_tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "MAX_PIECES", 399)
    refuse(tiny_tokenizer_file, r"found 400 pieces \(1 to 399 are read\)")


def test_a_tokenizer_that_rewrites_decoded_text_is_refused(file: Callable[[bytes], Path], tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("61\t62\n")  # "a" -> "b"
    refuse(file(tiny.trained(denormalization_rule_tsv=str(rules))), r"rewrites text when it decodes \(a denormalizer\)")


def test_a_damaged_file_loads_or_raises_one_family(file: Callable[[bytes], Path], tiny_tokenizer_file: Path) -> None:
    whole, loaded = tiny_tokenizer_file.read_bytes(), 0
    for seed in range(500):
        rng, data = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            i = rng.randrange(len(data))
            change = rng.choice((bytes([rng.randrange(256)]), b"", rng.randbytes(4)))
            data[i : i + rng.choice((0, 1, 1, 30))] = change
        try:
            damaged = SentencePieceTokenizer(file(bytes(data)))
        except NpllamaError:
            continue
        damaged.decode(damaged.encode("to 漢 </s>\0"))
        loaded += 1
    assert 0 < loaded < 500


def test_sentencepiece_is_imported_in_one_place() -> None:
    folder = Path(tokenizer.__file__).parent
    importing = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            importing |= {path.name for name in names if name and name.split(".")[0] == "sentencepiece"}
    assert importing == {"sentencepiece.py"}
