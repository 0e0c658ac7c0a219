"""npllama tokenize and detokenize: what a model reads, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_bpe
from helpers import TINY, write_model_directory, write_safetensors_checkpoint

import npllama
from npllama.config import ModelConfig
from npllama.store.export import export


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "model"
    write_model_directory(path)
    return path


def ids_of(done) -> list[int]:
    return [int(line.split()[0]) for line in done.text.splitlines()]


def test_tokenize_shows_ids_pieces_and_bytes(call, model: Path) -> None:
    done = call("tokenize", "-m", model, "cat é")
    with npllama.load(model) as llm:
        assert ids_of(done) == llm.tokenizer.encode("cat é")
    assert done.code == 0
    assert done.text.splitlines()[0].split() == ["1", "<s>"]
    assert done.text.splitlines()[-1].split() == [str(3 + 0xA9), '"\ufffd"', "a9"]
    assert done.err == f"{len(ids_of(done))} tokens\n"


def test_bos_and_eos_are_put_as_asked(call, model: Path) -> None:
    whole = ids_of(call("tokenize", "-m", model, "cat"))
    assert ids_of(call("tokenize", "-m", model, "cat", "--no-bos")) == whole[1:]
    assert ids_of(call("tokenize", "-m", model, "cat", "--eos")) == [*whole, 2]


@pytest.mark.parametrize("text", ["the cat", "", "  two\n lines\t", "naïve 日本 🦊", "</s> is text", "--", "-"])
def test_ids_become_the_text_again(call, model: Path, text: str) -> None:
    done = call("tokenize", "-m", model, "--ids", "-p", text, stdin=text.encode())
    assert call("detokenize", "-m", model, stdin=done.out).text == text + "\n"
    assert call("detokenize", "-m", model, *done.text.split()).text == text + "\n"
    shown = json.loads(call("tokenize", "-m", model, "--json", "-p", text, stdin=text.encode()).text)["tokens"]
    assert [token["id"] for token in shown] == list(map(int, done.text.split()))
    assert bytes(byte for token in shown for byte in token["bytes"]).decode() in (text, " " + text)
    assert [token["piece"] for token in shown if token["control"]] == ["<s>"]


def test_ids_may_stand_in_brackets_and_control_tokens_have_names(call, model: Path) -> None:
    assert call("detokenize", "-m", model, stdin=b"[1, 4,2]\n").text == "\x01\n"
    assert call("detokenize", "-m", model, "--special", "1", "4", "2", "2").text == "<s>\x01</s></s>\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("1", "x"), b"", "'x' is no id; whole numbers from 0 on are needed"),
        (("-1",), b"", "'-1' is no id; whole numbers from 0 on are needed"),
        (("300",), b"", "the id '300' is not in the vocabulary"),
        (("9" * 30,), b"", "is no id"),
        ((), "terminal", "no ids were given; name them, or pipe them in"),
    ],
)
def test_what_is_no_id_is_refused(call, model: Path, arguments: tuple[str, ...], stdin: object, said: str) -> None:
    done = call("detokenize", "-m", model, *arguments, stdin=stdin)
    assert (done.code, done.text) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


# ---------------------------------------------------------------- dialogs


def test_chat_shows_what_the_model_is_told(call, model: Path) -> None:
    done = call("tokenize", "-m", model, "--chat", "--chat-format", "llama2", "--ids", "Hi")
    assert call("detokenize", "-m", model, "--special", stdin=done.out).text == "<s>[INST] Hi [/INST]\n"
    done = call(
        "tokenize", "-m", model, "--chat", "--chat-format", "zephyr", "--ids", "--system", "-", "-p", "-", stdin=b"Q\n"
    )
    expected = "<|system|>\n-</s>\n<|user|>\nQ</s>\n<|assistant|>\n"
    assert "".join(call("detokenize", "-m", model, "--special", stdin=done.out).text.split()) == "".join(
        expected.split()
    )


def test_a_dialog_may_be_a_file_and_its_format_the_checkpoints_own(call, tmp_path: Path) -> None:
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "A [INST]"}]))
    write_safetensors_checkpoint(tmp_path / "c")
    template = (
        "{% set content = '<<SYS>>' + s + '<</SYS>>' + message.content %}{{ bos_token + '[INST] ' + content.strip()"
    )
    template += " + ' [/INST]' }}{{ ' ' + content.strip() + ' ' + eos_token }}"
    (tmp_path / "c" / "chat_template.jinja").write_text(template)
    refused = call("tokenize", "-m", tmp_path / "c", "--messages", file)
    assert refused.code == 2
    assert "messages[0] holds '[INST]'" in refused.err
    done = call("tokenize", "-m", tmp_path / "c", "--messages", file, "--escape-marks", "--json")
    shown = json.loads(done.text)
    assert (shown["chat_format"], shown["stop_ids"]) == ("llama2", [2])
    assert shown["escaped"] == [{"message": 0, "mark": "[INST]", "times": 1}]
    assert "messages[0]: [INST] was escaped, 1 times" in done.err
    assert not (tmp_path / "c" / "npllama.json").exists()
    by_stdin = call(
        "tokenize", "-m", tmp_path / "c", "--messages", "-", "--escape-marks", "--json", stdin=file.read_bytes()
    )
    assert json.loads(by_stdin.text) == shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--chat", "Hi"), "this model does not say how a dialog is told to it"),
        (("--chat", "--chat-format", "gpt", "Hi"), "chat_format='gpt': needs one of llama2, llama3"),
        (("--system", "x", "Hi"), "--system is for a dialog; add --chat, or --messages FILE"),
        (("--chat-format", "llama2", "Hi"), "--chat-format is for a dialog"),
        (("--escape-marks", "Hi"), "--escape-marks is for a dialog"),
        (("--chat", "--no-bos", "Hi"), "--bos and --eos are for a text"),
        (("--messages", "README.md", "Hi"), "--messages FILE is the whole dialog"),
        (("--messages", "no such file"), "no such file: cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(call, model: Path, arguments: tuple[str, ...], said: str) -> None:
    done = call("tokenize", "-m", model, *arguments)
    assert done.code in (1, 2)
    assert said in done.err
    assert (done.err.count("\n"), done.text) == (1, "")


def test_a_file_that_is_no_json_is_refused_by_its_name(call, model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    done = call("tokenize", "-m", model, "--messages", tmp_path / "m.json", "--chat-format", "llama2")
    assert done.code == 2
    assert done.err.startswith(f"npllama: {tmp_path}/m.json: ")


def test_a_checkpoint_and_its_export_have_the_same_tokens(call, tmp_path: Path) -> None:
    file = tiny_bpe.byte_level()
    config = ModelConfig(**{**TINY.to_json(), "vocab_size": tiny_bpe.size(file), "eos_token_ids": (2,)})
    write_safetensors_checkpoint(tmp_path / "c", config, tokenizer=False)
    (tmp_path / "c" / "tokenizer.json").write_bytes(tiny_bpe.written(file))
    export(tmp_path / "c", tmp_path / "m")
    first, second = (call("tokenize", "-m", tmp_path / name, "we'll see 2024 🐘", "--json") for name in "cm")
    assert first.text == second.text
    assert first.code == 0
