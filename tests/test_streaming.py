"""Streamed text adds up: to the decoding of all ids, and to the text before the first stop string."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from npllama.errors import UsageError
from npllama.generation.streaming import StopStrings
from npllama.text.decoding import StreamDecoder
from npllama.text.sentencepiece import SentencePieceTokenizer

N_PIECES = 400
BYTE = 3
ANY_IDS = st.lists(
    st.one_of(
        st.integers(0, N_PIECES - 1),
        st.integers(0, 2),
        st.sampled_from([BYTE + byte for byte in b"e \xc3\xa9\xe6\xbc\xa2\xf0\x9f\x90\x98\xed\xa0\xff"]),
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def tok(tiny_tokenizer_file: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tiny_tokenizer_file)


def streamed(decoder: StreamDecoder, ids: Iterable[int]) -> str:
    return "".join([decoder.push(i) for i in ids]) + decoder.finish()


def byte_ids(data: bytes) -> list[int]:
    return [BYTE + byte for byte in data]


@given(ids=ANY_IDS)
@example(ids=[])
@example(ids=[1, BYTE + 0xE6, 2, BYTE + 0xBC, BYTE + 0xA2])
@example(ids=byte_ids(b"\xf0\x9f\x90"))
def test_the_pieces_add_up_to_the_decoding_of_all_ids(tok: SentencePieceTokenizer, ids: list[int]) -> None:
    assert streamed(StreamDecoder(tok), ids) == tok.decode(ids)


@given(ids=ANY_IDS)
def test_only_an_incomplete_character_is_held_back(tok: SentencePieceTokenizer, ids: list[int]) -> None:
    decoder, text = StreamDecoder(tok), ""
    for n, token in enumerate(ids, 1):
        text += decoder.push(token)
        so_far = tok.decode(ids[:n])
        held = so_far.removeprefix(text)
        assert so_far == text + held
        assert held == "\ufffd" * min(len(held), 3)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_a_text_streams_as_itself(tok: SentencePieceTokenizer, text: str) -> None:
    assert streamed(StreamDecoder(tok), tok.encode(text)) == text


def test_llama_2_streams_as_it_decodes(shared_data: Path) -> None:
    llama2 = SentencePieceTokenizer(shared_data / "llama2-tokenizer.model")
    ids = llama2.encode("  two spaces, línea, 漢字 🐘\n</s>\0") * 2 + [29871, 259, 2, 35, 240, 163]
    assert streamed(StreamDecoder(llama2), ids) == llama2.decode(ids)


def test_a_character_of_four_bytes_comes_with_its_last(tok: SentencePieceTokenizer) -> None:
    decoder = StreamDecoder(tok)
    assert [decoder.push(i) for i in byte_ids("🐘".encode())] == ["", "", "", "🐘"]


def test_finish_gives_the_held_bytes_and_begins_another_text(tok: SentencePieceTokenizer) -> None:
    decoder, ids = StreamDecoder(tok), tok.encode("to to")
    assert streamed(decoder, [*ids, BYTE + 0xE6, BYTE + 0xBC]) == "to to\ufffd\ufffd"
    assert streamed(decoder, ids) == "to to"


def test_padding_ids_add_nothing_to_a_stream(tiny_tokenizer_file: Path) -> None:
    padded = SentencePieceTokenizer(tiny_tokenizer_file, vocab_size=N_PIECES + 1)
    assert streamed(StreamDecoder(padded), [N_PIECES, *padded.encode("to"), N_PIECES]) == "to"


def test_an_id_outside_the_vocabulary_cannot_be_pushed(tok: SentencePieceTokenizer) -> None:
    decoder = StreamDecoder(tok)
    for token in (-1, N_PIECES):
        with pytest.raises(UsageError, match=f"the id '{token}' is not in the vocabulary"):
            decoder.push(token)


# --- stop strings


def cut(text: str, stops: Iterable[str]) -> tuple[str, bool]:
    """By definition: the text before the first occurrence of any stop string, and whether there is one."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts, default=len(text))], bool(starts)


def emitted(stops: StopStrings, pieces: Iterable[str]) -> str:
    return "".join([stops.push(piece)[0] for piece in pieces]) + stops.finish()


@given(
    pieces=st.lists(st.text("ab\n", max_size=6), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
@example(pieces=["a", "b", "c", "d"], stops=["abcd", "bc"])  # complete first is not first
@example(pieces=["abc"], stops=["abcd", "bc"])
@example(pieces=["aa", "ab"], stops=["aab"])
@example(pieces=["x"], stops=["x", "x"])
def test_the_text_is_cut_at_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    assert (emitted(finder, pieces), finder.stopped) == cut("".join(pieces), stops)


@given(pieces=st.lists(st.text("ab", max_size=4), max_size=8), stop=st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], stop: str) -> None:
    finder, text, so_far = StopStrings(stop), "", ""
    for piece in pieces:
        new, stopped = finder.push(piece)
        text, so_far = text + new, so_far + piece
        if stopped:
            break
        held = so_far.removeprefix(text)
        assert so_far == text + held
        assert stop.startswith(held)
        assert len(held) < len(stop)


def test_a_stop_string_across_pieces_is_found_and_not_returned() -> None:
    finder = StopStrings(["User:"])
    assert finder.push("Hi.\nUs") == ("Hi.\n", False)
    assert finder.push("er: what") == ("", True)
    assert finder.push("more") == ("", True)
    assert finder.finish() == ""


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    finder = StopStrings("User:")
    assert finder.push("Us") == ("", False)
    assert finder.push("ual") == ("Usual", False)
    assert finder.push(" U") == (" ", False)
    assert finder.finish() == "U"
    assert not finder.stopped


def test_one_string_is_one_stop_string() -> None:
    assert emitted(StopStrings("ab"), ["b", "a", "a", "b"]) == "ba"


def test_without_stop_strings_text_passes_through() -> None:
    assert StopStrings().push("anything") == ("anything", False)


@pytest.mark.parametrize("stops", ["", ["end", ""], [7], [b"end"], [None]])
def test_a_stop_string_must_be_text_of_at_least_one_character(stops: Iterable[str]) -> None:
    with pytest.raises(UsageError, match=r"stop='.*': needs text of at least one character"):
        StopStrings(stops)
