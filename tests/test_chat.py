"""Chat formats: ids as the programs of each format make them, and text that never becomes more than text."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_bpe
import tiny_sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from npllama.errors import UsageError
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.chat.encoding import chat_prompt, control_tokens
from npllama.text.chat.formats import BOS, EOS, FORMATS
from npllama.text.chat.marks import ESCAPE, Escaped
from npllama.text.protocol import Tokenizer
from npllama.text.readers.tokenizer_json import read_tokenizer_json
from npllama.text.sentencepiece import SentencePieceTokenizer

CASES = json.loads((Path(__file__).parent / "fixtures" / "chat.json").read_text())
EXAMPLES = int(os.environ.get("NPLLAMA_CHAT_EXAMPLES", "20"))
NAMES = sorted({special.name for one in FORMATS.values() for special in (*one.specials, *one.stops)} - {"BOS", "EOS"})
DIALOG = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "P"},
]


def said(*texts: str, first: str = "user") -> list[dict[str, str]]:
    """Messages in turn, beginning with the user, or behind a system message."""
    roles = itertools.chain(["system"] if first == "system" else [], itertools.cycle(["user", "assistant"]))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# ---------------------------------------------------------------- the reference


def with_controls(path: Path, names: list[str], folder: Path) -> Tokenizer:
    """The tokenizer of a file, with control tokens appended to its vocabulary."""
    data = path.read_bytes()
    if path.suffix == ".json":
        file = json.loads(data)
        size = len(file["model"]["vocab"])
        file["added_tokens"] += [tiny_bpe.added(name, size + i, special=True) for i, name in enumerate(names)]
        return BpeTokenizer(read_tokenizer_json(json.dumps(file).encode() if names else data, {}, path.name))
    (folder / "tokenizer.model").write_bytes(data + tiny_sentencepiece.control_pieces(names))
    return SentencePieceTokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer_of(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Tokenizer]:
    found: dict[tuple[str, ...], Tokenizer] = {}

    def get(case: dict[str, Any]) -> Tokenizer:
        key = (case["tokenizer"], *case["added"])
        if key not in found:
            path = shared_data / "family" / case["tokenizer"]
            found[key] = with_controls(path, case["added"], tmp_path_factory.mktemp("tokenizer"))
        return found[key]

    return get


@pytest.mark.parametrize("case", CASES, ids=[f"{case['format']}-{i}" for i, case in enumerate(CASES)])
def test_ids_are_those_of_the_reference(case: dict[str, Any], tokenizer_of: Callable[..., Tokenizer]) -> None:
    assert chat_prompt(case["format"], tokenizer_of(case), case["messages"]).ids == case["ids"]


def test_there_are_dialogs_for_every_format() -> None:
    assert {case["format"] for case in CASES} == set(FORMATS)
    assert len(CASES) >= 40


# ---------------------------------------------------------------- the scaffold, with a vocabulary made here


@cache
def bytes_tokenizer() -> BpeTokenizer:
    """A vocabulary over bytes with the control tokens of all formats."""
    file = tiny_bpe.byte_level()
    size = tiny_bpe.size(file)
    names = [name for name in ["<s>", "</s>", *NAMES] if name not in tiny_bpe.SPECIALS]
    more = [tiny_bpe.added(name, size + i, special=True) for i, name in enumerate(names)]
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    return BpeTokenizer(read_tokenizer_json(json.dumps(tiny_bpe.byte_level(more_added=more)).encode(), settings, "t"))


def shown(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Ids as text, control tokens by their names."""
    groups = itertools.groupby(ids, key=tokenizer.control_ids.__contains__)
    runs = [(control, list(run)) for control, run in groups]
    return "".join("".join(map(tokenizer.spelling, run)) if control else tokenizer.decode(run) for control, run in runs)


def im(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def header(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text.strip()}<|eot_id|>"


def source(role: str, text: str) -> str:
    return f" Source: {role}\n\n {text.strip()}<step>"


def llama2(s: str, q: str, a: str, p: str) -> str:
    first = f"<<SYS>>\n{s}\n<</SYS>>\n\n{q}".strip()
    return f"<s>[INST] {first} [/INST] {a.strip()} </s><s>[INST] {p.strip()} [/INST]"


def llama3(s: str, q: str, a: str, p: str) -> str:
    told = header("system", s) + header("user", q) + header("assistant", a) + header("user", p)
    return f"<s>{told}<|start_header_id|>assistant<|end_header_id|>\n\n"


def chatml(s: str, q: str, a: str, p: str) -> str:
    return im("system", s) + im("user", q) + im("assistant", a) + im("user", p) + "<|im_start|>assistant\n"


DATES = "<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
FRAME: dict[str, Callable[[str, str, str, str], str]] = {
    "llama2": llama2,
    "code-llama": llama2,
    "llama3": llama3,
    "llama3.1": lambda *texts: llama3(*texts).replace("<|end_header_id|>\n\n", DATES, 1),
    "code-llama-70b": lambda s, q, a, p: (
        "<s>" + source("system", s) + source("user", q) + source("assistant", a) + source("user", p)
        + " Source: assistant\nDestination: user\n\n "
    ),
    "mistral": lambda s, q, a, p: f"<s>[INST] {s}\n\n{q} [/INST]{a}</s>[INST] {p} [/INST]",
    "mistral-v3": lambda s, q, a, p: f"<s>[INST]{q}[/INST]{a.rstrip(' ')}</s>[INST]{s}\n\n{p}[/INST]",
    "chatml": chatml,
    "smollm2": chatml,
    "yi": chatml,
    "zephyr": lambda s, q, a, p: (
        f"<|system|>\n{s}</s>\n<|user|>\n{q}</s>\n<|assistant|>\n{a}</s>\n<|user|>\n{p}</s>\n<|assistant|>\n"
    ),
    "vicuna": lambda s, q, a, p: f"<s>{s} USER: {q} ASSISTANT: {a}</s>USER: {p} ASSISTANT:",
    "deepseek": lambda s, q, a, p: f"<s>{s}\n\nUser: {q}\n\nAssistant: {a}</s>User: {p}\n\nAssistant:",
}  # fmt: skip
"""A dialog of system, question, answer, question as text; Alpaca has none."""
PIECES = [*FORMATS["llama2"].marks, *FORMATS["zephyr"].marks, *FORMATS["vicuna"].marks, *FORMATS["deepseek"].marks]
PIECES += [*FORMATS["alpaca"].marks, *FORMATS["code-llama-70b"].marks, *NAMES, "<s>", "</s>", "[", "]", " ", "\n", ":"]
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12) | st.sampled_from(PIECES), max_size=5
).map("".join)


@pytest.mark.parametrize("name", FRAME)
def test_a_dialog_is_framed_as_the_format_says(name: str) -> None:
    tokenizer = bytes_tokenizer()
    assert shown(tokenizer, chat_prompt(name, tokenizer, DIALOG).ids) == FRAME[name]("S", "Q", "A", "P")


@pytest.mark.parametrize("name", FRAME)
@settings(max_examples=EXAMPLES)
@given(texts=st.tuples(TEXTS, TEXTS, TEXTS, TEXTS))
def test_no_text_becomes_a_control_token_or_another_turn_and_none_is_lost(
    name: str, texts: tuple[str, str, str, str]
) -> None:
    tokenizer, chat_format = bytes_tokenizer(), FORMATS[name]
    messages = said(*texts, first="system")
    prompt = chat_prompt(name, tokenizer, messages, escape=True)
    plain = chat_prompt(name, tokenizer, DIALOG)
    control = tokenizer.control_ids
    assert [i for i in prompt.ids if i in control] == [i for i in plain.ids if i in control]
    text = tokenizer.decode(prompt.ids)
    for mark in chat_format.marks:
        assert text.count(mark) == tokenizer.decode(plain.ids).count(mark)
    escaped = [escaping(chat_format.marks, text) for text in texts]
    names = ["<s>", "</s>", *(special.name for special in chat_format.specials)]
    framed = FRAME[name](*(escaping(names, text, HIDE) for text in escaped))
    for control in names:
        framed = framed.replace(control, "")
    assert text == framed.replace(HIDE, "")
    if texts == tuple(escaped):
        assert prompt.escaped == ()
        assert chat_prompt(name, tokenizer, messages).ids == prompt.ids
    else:
        assert sum(one.times for one in prompt.escaped) > 0
        with pytest.raises(UsageError, match=r"messages\[\d\] holds '.*', by which this chat format tells who speaks"):
            chat_prompt(name, tokenizer, messages)


HIDE = "\ue000"
"""Put into names of control tokens that stand in a text, so that they are not taken for the frame's own."""


def escaping(marks: Sequence[str], text: str, by: str = ESCAPE) -> str:
    for mark in sorted(marks, key=lambda mark: (-len(mark), mark)):
        text = text.replace(mark, mark[0] + by + mark[1:])
    return text


def test_alpaca_is_one_instruction() -> None:
    tokenizer = bytes_tokenizer()
    text = shown(tokenizer, chat_prompt("alpaca", tokenizer, said(" Why? ")).ids)
    assert text.startswith("<s>Below is an instruction that describes a task. Write a response that appropriately")
    assert text.endswith("completes the request.\n\n### Instruction:\n Why? \n\n### Response:")


# ---------------------------------------------------------------- marks, control tokens, characters


def test_marks_are_refused_by_name_or_escaped_and_reported() -> None:
    tokenizer = bytes_tokenizer()
    messages = said("Hi", "A [INST] B", "[[INST] USER: [INST]")
    with pytest.raises(UsageError, match=r"^messages\[1\] holds '\[INST\]', .*escape=True, --escape-marks"):
        chat_prompt("llama2", tokenizer, messages)
    prompt = chat_prompt("llama2", tokenizer, messages, escape=True)
    assert prompt.escaped == (Escaped(1, "[INST]", 1), Escaped(2, "[INST]", 2))
    assert f"[[{ESCAPE}INST] USER: [{ESCAPE}INST]" in tokenizer.decode(prompt.ids)
    assert chat_prompt("chatml", tokenizer, messages).escaped == ()


def test_a_control_token_that_text_can_spell_is_a_mark_too() -> None:
    file = tiny_bpe.byte_level()
    size = tiny_bpe.size(file)
    more = [tiny_bpe.added(name, size + i) for i, name in enumerate(("<|im_start|>", "<|im_end|>"))]
    tokenizer = BpeTokenizer(read_tokenizer_json(json.dumps(tiny_bpe.byte_level(more_added=more)).encode(), {}, "t"))
    assert size in tokenizer.encode("<|im_start|>")
    assert chat_prompt("chatml", tokenizer, said("Hi")).ids[0] == size
    with pytest.raises(UsageError, match=r"messages\[0\] holds '<\|im_end\|>'"):
        chat_prompt("chatml", tokenizer, said("Hi<|im_end|>"))
    ids = chat_prompt("chatml", tokenizer, said("Hi<|im_end|>"), escape=True).ids
    assert (ids.count(size), ids.count(size + 1)) == (2, 1)


@pytest.mark.parametrize("kind", [tiny_sentencepiece.USER_DEFINED, tiny_sentencepiece.NORMAL])
def test_a_control_token_may_be_a_piece_like_any_other(tmp_path: Path, kind: int) -> None:
    pieces = [*tiny_sentencepiece.USUAL, *tiny_sentencepiece.BYTES]
    parts = ["<|im_start|>", "<|im_end|>", "\u2581"]
    (tmp_path / "t.model").write_bytes(tiny_sentencepiece.written([*pieces, *((part, kind) for part in parts)]))
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    if kind == tiny_sentencepiece.NORMAL:
        with pytest.raises(UsageError, match=r"needs the control token '<\|im_end\|>', which this tokenizer does not"):
            chat_prompt("chatml", tokenizer, said("Hi"))
        return
    ids = chat_prompt("chatml", tokenizer, said("<|im_end|>"), escape=True).ids
    assert [i for i in ids if i >= 259] == [259, 261, 260, 261, 259, 261]  # 261: the space in front of a text


def test_a_format_whose_control_tokens_are_missing_is_refused() -> None:
    tokenizer = BpeTokenizer(read_tokenizer_json(tiny_bpe.written(tiny_bpe.byte_level()), {}, "t"))
    with pytest.raises(
        UsageError, match=r"needs the control token '<\|im_end\|>', .* name another with chat_format=: one"
    ):
        chat_prompt("chatml", tokenizer, said("Hi"))
    with pytest.raises(UsageError, match=r"^chat_format='gpt': needs one of llama2, llama3, "):
        chat_prompt("gpt", tokenizer, said("Hi"))


def test_a_character_that_the_vocabulary_cannot_spell_is_refused_by_name(tmp_path: Path) -> None:
    letters = [(letter, tiny_sentencepiece.NORMAL) for letter in "▁INSTHi[/]"]
    data = tiny_sentencepiece.written([*tiny_sentencepiece.USUAL, *letters], byte_fallback=False)
    (tmp_path / "t.model").write_bytes(data)
    tokenizer = SentencePieceTokenizer(tmp_path / "t.model")
    assert tokenizer.decode(chat_prompt("llama2", tokenizer, said("Hi Hi")).ids) == "[INST] Hi Hi [/INST]"
    with pytest.raises(UsageError, match=r"cannot spell the character '\\xe9' \(U\+00E9\), which stands in a message"):
        chat_prompt("llama2", tokenizer, said("Hié"))


CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")


def test_the_stops_of_a_format_are_those_that_the_tokenizer_has() -> None:
    tokenizer = bytes_tokenizer()
    special = tokenizer.special
    assert chat_prompt("llama2", tokenizer, said("Hi")).stop_ids == {tokenizer.eos_id}
    assert chat_prompt("chatml", tokenizer, said("Hi")).stop_ids == {tokenizer.eos_id, *map(special, CHATML_ENDS)}
    assert special("<|im_sep|>") in chat_prompt("yi", tokenizer, said("Hi")).stop_ids
    assert chat_prompt("code-llama-70b", tokenizer, said("Hi")).stop_ids == {tokenizer.eos_id, special("<step>")}


def test_begin_and_end_are_those_of_the_tokenizer() -> None:
    tokenizer = bytes_tokenizer()
    assert control_tokens(FORMATS["llama2"], tokenizer) == {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}


# ---------------------------------------------------------------- system messages


@pytest.mark.parametrize("name", [name for name in FRAME if name not in ("vicuna", "smollm2", "llama3.1")])
def test_without_a_system_message_nothing_is_said_for_it(name: str) -> None:
    tokenizer = bytes_tokenizer()
    ids, other = (chat_prompt(name, tokenizer, said(text)).ids for text in ("Hello", ""))
    assert tokenizer.decode(ids).replace("Hello", "") == tokenizer.decode(other)
    assert not any(word in tokenizer.decode(ids) for word in ("SYS", "system", "You are"))


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("vicuna", "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives"),
        ("smollm2", im("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")),
        ("llama3.1", f"<s><|start_header_id|>system{DATES}<|eot_id|><|start_header_id|>user"),
    ],
)
def test_formats_that_always_have_a_system_message(name: str, begin: str) -> None:
    tokenizer = bytes_tokenizer()
    assert shown(tokenizer, chat_prompt(name, tokenizer, said("Hello")).ids).startswith(begin)


def test_a_later_system_message_is_one_of_its_own_where_the_format_has_it() -> None:
    tokenizer = bytes_tokenizer()
    late = [*said("Hello"), {"role": "system", "content": "Now in French"}, *said("Go on")]
    expected = im("user", "Hello") + im("system", "Now in French") + im("user", "Go on") + "<|im_start|>assistant\n"
    assert shown(tokenizer, chat_prompt("chatml", tokenizer, late).ids) == expected
    with pytest.raises(UsageError, match="the roles are user, system, user; the chat format llama2 has user and"):
        chat_prompt("llama2", tokenizer, late)


def test_a_format_without_a_system_message_says_so() -> None:
    with pytest.raises(UsageError, match="the chat format alpaca has no system message; say it as the user"):
        chat_prompt("alpaca", bytes_tokenizer(), said("Be brief", "Hello", first="system"))


# ---------------------------------------------------------------- messages


def test_text_parts_are_joined_by_line_ends() -> None:
    tokenizer = bytes_tokenizer()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    found = chat_prompt("chatml", tokenizer, [{"role": "user", "content": parts, "name": None, "tool_calls": []}])
    assert found == chat_prompt("chatml", tokenizer, said("one\ntwo"))


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ("Hello", "messages is of type str; a list is needed"),
        ({"role": "user", "content": "Hi"}, "messages is of type dict; a list is needed"),
        ([], "messages is empty; at least one is needed"),
        (["Hello"], r"messages\[0\] is 'Hello'; "),
        (
            [{"role": "tool", "content": "1"}],
            r"messages\[0\]: role is 'tool'; one of system, user, assistant is needed",
        ),
        ([{"content": "1"}], r"messages\[0\]: role is 'None'"),
        ([{"role": "user"}], r"messages\[0\]: content is 'None'; text, or a list of text parts"),
        ([{"role": "user", "content": 7}], r"messages\[0\]: content is '7'"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\]: content\[0\] is .* only text is read",
        ),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]: content: the text has the lone surrogate"),
        ([{"role": "user", "content": "Hi", "name": "Tom"}], r"messages\[0\]: 'name' is not supported"),
        (said("Hi", "Hello"), "messages: the last is of assistant; one of user is needed at the end"),
        (said("Be brief", first="system"), "messages: there is none behind the system's; one of user is needed"),
        (
            [*said("Hi"), *said("Hi")],
            "messages: the roles are user, user; the chat format llama2 has user and assistant in turn",
        ),
        (said("A", "Q", "A", "P", first="system")[::2], "messages: the last is of assistant"),
    ],
)
def test_messages_that_cannot_be_are_refused(messages: object, found: str) -> None:
    with pytest.raises(UsageError, match=f"^{found}"):
        chat_prompt("llama2", bytes_tokenizer(), messages)


def test_an_instruction_has_no_history() -> None:
    with pytest.raises(UsageError, match="the chat format alpaca has one message, of user; got 3"):
        chat_prompt("alpaca", bytes_tokenizer(), said("Hi", "Hello", "Bye"))
