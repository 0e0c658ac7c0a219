"""tokenizer.json: the ids of the package tokenizers for any text, or a refusal that names what is not supported.

NPLLAMA_TEXT_COUNT sets the number of random texts for each file.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import tiny_bpe as tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_bpe import added, byte_level, characters, sequence, size, written

from npllama.errors import CheckpointError, UsageError
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.readers.tokenizer_json import read_tokenizer_json

NASTY = [
    *["</s>", "<s>", "<unk>", "<|eot_id|>", "<|begin_of_text|>", "<0x0A>", "[INST]", "\u2581", "\u2581\u2581"],
    *[" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000", "\u200b"],
    *["\ufeff", "don't", "I'M", "we'll", "a'\u017f", "1", "12", "2024", "\u0663", "\u00bd", "\u2167", "tion", " to"],
    *["foo", " foo", "afoo", "foo_", "bar", "fo", "<|foo|>", "\u65e5\u672c", "\u8a9e", "\u043f\u0440\u0438\u0432"],
    *["e\u0301", "\u00e9", "\u00df", "\u01c5", "\U0001f418", "\U0001f469\u200d\U0001f467", "\U00040000", "\0", "\x7f"],
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(NASTY), st.text("aeionrst ", max_size=8), st.characters(exclude_categories=["Cs"])),
    max_size=12,
).map("".join)

COUNT = int(os.environ.get("NPLLAMA_TEXT_COUNT", "100"))

METASPACE = {"type": "Metaspace", "replacement": tiny.MARK, "prepend_scheme": "always", "split": False}
NO_FALLBACK = {"type": "Sequence", "decoders": [tiny.MARKS_TO_SPACES, {"type": "Fuse"}, tiny.STRIP]}
PREFIXED = {**tiny.BYTE_LEVEL, "add_prefix_space": True}


def with_foo(make: Callable[..., dict[str, Any]], **flags: bool) -> dict[str, Any]:
    n = size(make())
    more = [added("foo", n, **flags), added("bar", n + 1), added("<|foo|>", n + 2, special=True)]
    return make(more_added=more)


def metaspace(**changes: object) -> dict[str, Any]:
    return characters(normalizer=None, pre_tokenizer={**METASPACE, **changes})


def without(file: dict[str, Any], *names: str) -> dict[str, Any]:
    """The file without all tokens that hold one of some strings; ids close up."""
    kept = [name for name in file["model"]["vocab"] if not any(n in name for n in names)]
    file["model"]["vocab"] = {name: i for i, name in enumerate(kept)}
    file["model"]["merges"] = [m for m in file["model"]["merges"] if not any(n in "".join(m) for n in names)]
    beyond = len(kept)
    for token in file["added_tokens"]:
        token["id"] = file["model"]["vocab"].get(token["content"], beyond)
        beyond += token["id"] == beyond
    return file


FILES: dict[str, dict[str, Any]] = {
    "Llama 3": byte_level(),
    "Llama 3, merges ignored for whole words": byte_level(model={"ignore_merges": True}),
    "GPT-2": byte_level(pre_tokenizer=tiny.BYTE_LEVEL),
    "GPT-2 with a space in front": byte_level(pre_tokenizer=PREFIXED),
    "SmolLM": byte_level(pre_tokenizer=sequence(tiny.DIGITS, tiny.BYTE_LEVEL)),
    "runs of digits": byte_level(pre_tokenizer=sequence({**tiny.DIGITS, "individual_digits": False}, PREFIXED)),
    "a space in front of each word": byte_level(pre_tokenizer=sequence(tiny.SPLIT_LLAMA3, PREFIXED)),
    "nested sequences": byte_level(pre_tokenizer=sequence(sequence(tiny.DIGITS), tiny.BYTE_LEVEL)),
    "merges as strings": byte_level(model={"merges": [" ".join(pair) for pair in tiny.byte_merges()]}),
    "added, bytes": with_foo(byte_level),
    "added, single words": with_foo(byte_level, single_word=True),
    "added, spaces before": with_foo(byte_level, lstrip=True),
    "added, spaces after": with_foo(byte_level, rstrip=True),
    "added, all": with_foo(byte_level, single_word=True, lstrip=True, rstrip=True, normalized=True),
    "LLaMA 2": characters(),
    "LLaMA 2, whole words": characters(model={"ignore_merges": True}),
    "LLaMA 2 without a space in front": characters(normalizer=tiny.SPACES_TO_MARKS),
    "added, characters": with_foo(characters),
    "added, characters, normalized": with_foo(characters, normalized=True),
    "added, characters, all": with_foo(characters, single_word=True, lstrip=True, rstrip=True, normalized=True),
    "Metaspace always": metaspace(),
    "Metaspace first": metaspace(prepend_scheme="first"),
    "Metaspace never": metaspace(prepend_scheme="never"),
    "Metaspace that splits": metaspace(split=True),
    "Metaspace and digits": characters(normalizer=None, pre_tokenizer=sequence(METASPACE, tiny.DIGITS)),
    "no bytes, fused": characters(model={"byte_fallback": False}, decoder=NO_FALLBACK),
    "no bytes, not fused": characters(model={"byte_fallback": False, "fuse_unk": False}, decoder=NO_FALLBACK),
    "no bytes, left out": characters(model={"byte_fallback": False, "unk_token": None}, decoder=NO_FALLBACK),
    "some bytes": without(characters(), "<0xE6>", "<0xC3>", "<0x0A>"),
    "some bytes, not fused": without(characters(model={"fuse_unk": False}), "<0xE6>", "<0xC3>", "<0x0A>"),
    "a byte-level vocabulary that lacks bytes": without(byte_level(), "\u0101", "\u00c3", "e"),
}


@pytest.fixture(scope="module", params=FILES)
def both(request: pytest.FixtureRequest) -> tuple[BpeTokenizer, Any]:
    """Our tokenizer, and that of the package tokenizers, which takes special tokens in a text for text."""
    tokenizers = pytest.importorskip("tokenizers")
    data = written(FILES[request.param])
    theirs = tokenizers.Tokenizer.from_str(data.decode())
    theirs.encode_special_tokens = True
    return BpeTokenizer(read_tokenizer_json(data)), theirs


@settings(max_examples=COUNT)
@given(text=TEXTS)
def test_the_ids_are_those_of_tokenizers(both: tuple[BpeTokenizer, Any], text: str) -> None:
    ours, theirs = both
    assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False).ids


@settings(max_examples=50)
@given(data=st.data())
def test_ids_decode_as_in_tokenizers(both: tuple[BpeTokenizer, Any], data: st.DataObject) -> None:
    """Bytes that are no text apart: there a run of byte tokens is bad as a whole, which no stream can know."""
    ours, theirs = both
    ids = data.draw(st.lists(st.integers(0, ours.n_pieces - 1), max_size=8))
    text = ours.decode(ids)
    if ours.whole_replacement or "\ufffd" not in text:
        assert text == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["Llama 3", "SmolLM", "LLaMA 2", "added, bytes"])
@given(text=TEXTS)
def test_text_survives_and_never_gives_a_control_id(name: str, text: str) -> None:
    ours = tokenizer_of(name)
    ids = ours.encode(text, bos=False)
    assert not ours.control_ids & set(ids)
    if tiny.MARK not in text:
        assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["Llama 3", "SmolLM", "LLaMA 2", "Metaspace first", "added, bytes"])
@given(text=TEXTS)
@example(text=" there")
@example(text="fore")
def test_a_text_that_goes_on_gets_no_space_in_front(name: str, text: str) -> None:
    ours = tokenizer_of(name)
    if tiny.MARK not in text:
        ids = [*ours.encode("to", bos=False), *ours.encode(text, bos=False, start=False, inside=True)]
        assert ours.decode(ids) == f"to{text}"


CACHE: dict[str, BpeTokenizer] = {}


def tokenizer_of(name: str) -> BpeTokenizer:
    if name not in CACHE:
        CACHE[name] = BpeTokenizer(read_tokenizer_json(written(FILES[name])))
    return CACHE[name]


def test_a_whole_word_or_a_merge_never_gives_a_control_token() -> None:
    word = next(a + b for a, b in reversed(tiny.byte_merges()) if (a + b).isascii())
    file = byte_level(model={"ignore_merges": True})
    file["added_tokens"].insert(0, added(word, file["model"]["vocab"][word], special=True))
    ours = BpeTokenizer(read_tokenizer_json(written(file)))
    assert ours.special(word) not in ours.encode(f"{word} {word}")
    assert ours.decode(ours.encode(f"{word} {word}")) == f"{word} {word}"


# --- what stands around a text


def template(*names: str, ids: dict[str, list[int]]) -> dict[str, Any]:
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if n == "A" else {"SpecialToken": {"id": n, "type_id": 0}}
        for n in names
    ]
    tokens = {name: {"id": name, "ids": found, "tokens": [name]} for name, found in ids.items()}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": tokens}


def test_the_template_says_what_stands_around_a_text() -> None:
    file = characters(post_processor=template("<s>", "A", "</s>", ids={"<s>": [1], "</s>": [2]}))
    ours = BpeTokenizer(read_tokenizer_json(written(file)))
    plain = ours.encode("to", bos=False, eos=False)
    assert ours.encode("to") == [1, *plain, 2]
    assert ours.encode("") == [1, 2]
    assert ours.bos_id == 1


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        ({}, ()),
        ({"add_bos_token": True}, ()),
        ({"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}, (1,)),
        ({"add_bos_token": True, "tokenizer_class": "LlamaTokenizerFast", "bos_token": {"content": "</s>"}}, (2,)),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}, ()),
    ],
)
def test_without_a_template_the_settings_say_whether_bos_stands_in_front(
    settings: dict[str, Any], prefix: tuple[int, ...]
) -> None:
    assert read_tokenizer_json(written(characters()), settings).rules.prefix == prefix


def test_llama_3_begins_with_bos_whatever_its_file_says() -> None:
    vocabulary = read_tokenizer_json(written(byte_level()))
    assert vocabulary.rules.prefix == (vocabulary.rules.names["<|begin_of_text|>"],)


def test_a_part_behind_a_control_id_is_not_at_the_start() -> None:
    ours = tokenizer_of("Metaspace first")
    assert ours.decode(ours.encode("to", start=True)) == ours.decode(ours.encode("to", start=False)) == "to"
    assert ours.piece(ours.encode("to", bos=False, start=True)[0]).startswith(b" ")
    assert not ours.piece(ours.encode("to", bos=False, start=False)[0]).startswith(b" ")


def test_special_tokens_have_names() -> None:
    ours = tokenizer_of("Llama 3")
    assert ours.special("<|eot_id|>") in ours.control_ids
    with pytest.raises(UsageError, match=r"there is no special token 'to'; this tokenizer has 3, such as '<\|begin"):
        ours.special("to")


# --- what is refused


def changed(path: str, value: object, file: dict[str, Any] | None = None) -> dict[str, Any]:
    """A file in which one value was replaced, named by its keys."""
    file = copy.deepcopy(byte_level() if file is None else file)
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place: Any = file
    for key in keys:
        place = place[key]
    place[last] = value
    return file


SPLIT = "pre_tokenizer/pretokenizers/0"
REFUSED: list[tuple[str, object, str]] = [
    ("model/type", "Unigram", "its model is of type 'Unigram'; BPE is supported"),
    ("model/dropout", 0.1, "dropout is '0.1', which is not supported"),
    ("model/end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>', which is not supported"),
    ("model/mystery", 1, "model: the key 'mystery' is not known"),
    ("mystery", 1, "the file: the key 'mystery' is not known"),
    ("model/byte_fallback", True, "byte_fallback with the pre-tokenizer ByteLevel"),
    ("model/fuse_unk", "yes", "fuse_unk is 'yes'; true or false is needed"),
    ("model/unk_token", "nowhere", "unk_token is 'nowhere', which vocab does not have"),
    ("model/vocab", {}, "vocab is 0 entries; an object of 1 to"),
    ("model/vocab/e", 1.5, "an id that is no whole number"),
    ("model/vocab/e", 5, "vocab gives '.*' the id 5, which is another token's"),
    ("model/vocab/e", 1 << 40, "the id 1099511627776, which is another token's or beyond"),
    ("added_tokens", [added("\ud800", 406)], r"content is '\\ud800'; text of at least one character"),
    ("model/merges/3", ["a"], "merges has one that is no pair"),
    ("model/merges/3", "a b", "merges has one that is no pair"),
    ("model/merges/3", ["a", 4], "merges has one that is no pair"),
    ("model/merges/3", ["a", "\u00e9"], r"the merge of 'a' and '\\xe9' needs a token that vocab does not have"),
    ("model/merges", {}, "merges is no list"),
    ("added_tokens/0/id", 3, "gives '<|begin_of_text|>' the id '3', where 406 is its id".replace("|", r"\|")),
    ("added_tokens/1/content", "<|begin_of_text|>", "each token once"),
    ("added_tokens/0/content", "", "content is ''; text of at least one character is needed"),
    ("added_tokens/0/lstrip", None, "lstrip is 'None'; true or false is needed"),
    ("added_tokens/0/stripped", True, "added_tokens: the key 'stripped' is not known"),
    ("added_tokens", "none", "added_tokens is no list"),
    ("normalizer", {"type": "NFC"}, "normalizer 'NFC' is not supported, and would change ids"),
    ("normalizer", {"type": "Lowercase"}, "normalizer 'Lowercase' is not supported"),
    ("normalizer", {**tiny.SPACES_TO_MARKS, "pattern": {"Regex": " +"}}, "the pattern '.*Regex.*' is not supported"),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer 'Whitespace' is not supported"),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": 3}, "pretokenizers is '3'; a list is needed"),
    (SPLIT + "/pattern", {"Regex": r"\w+"}, r"the pattern '.*w\+' is not known; use the tokenizer.model"),
    (SPLIT + "/pattern", {"Regex": r"\p{Digit}"}, "is not known"),
    (SPLIT + "/behavior", "Removed", "behavior 'Removed', invert 'False' is not supported"),
    (SPLIT + "/invert", True, "behavior 'Isolated', invert 'True' is not supported"),
    ("pre_tokenizer/pretokenizers/1", tiny.DIGITS, "decoder .* is not supported|does not fit"),
    ("pre_tokenizer", sequence(tiny.BYTE_LEVEL, tiny.DIGITS), "'Digits' after ByteLevel is not supported"),
    ("pre_tokenizer", sequence(tiny.DIGITS, METASPACE), "pre_tokenizer 'Metaspace' is not supported"),
    ("pre_tokenizer", {**METASPACE, "replacement": "_"}, "replacement is '_'"),
    (
        "pre_tokenizer",
        {**METASPACE, "add_prefix_space": False},
        "add_prefix_space is false, but prepend_scheme 'always'",
    ),
    ("post_processor", {"type": "BertProcessing"}, "post_processor 'BertProcessing' is not supported"),
    ("post_processor", template("A", "A", ids={}), "special tokens around one text are needed"),
    ("post_processor", template("<s>", ids={"<s>": [1]}), "single has no text"),
    ("post_processor", template("<s>", "A", ids={}), "special_tokens says 'None' for '<s>'"),
    ("post_processor", template("<s>", "A", ids={"<s>": [9999]}), "the id 9999 among 409 tokens"),
    ("decoder", {"type": "WordPiece"}, "decoder .*WordPiece.* is not supported"),
    ("decoder", None, "decoder .* is not supported with the pre-tokenizer ByteLevel"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p}-{i}" for i, (p, _, _) in enumerate(REFUSED)])
def test_what_would_change_ids_is_refused_by_its_name(path: str, value: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as found:
        read_tokenizer_json(written(changed(path, value)))
    assert str(found.value).startswith("tokenizer.json: ")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"model": {"vocab": {"a": 1, "a": 2}}}'])
def test_what_is_no_such_json_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: "):
        read_tokenizer_json(data)


def test_truncation_and_padding_are_not_looked_at() -> None:
    file = changed("truncation", {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"})
    assert read_tokenizer_json(json.dumps(file).encode()).tokens == read_tokenizer_json(written(byte_level())).tokens
