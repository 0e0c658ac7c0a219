"""npllama generate: prompts and stop texts as people write them, and what goes around them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import TINY, random_weights, write_model_directory, write_safetensors_checkpoint

import npllama
from npllama.commands.texts import unescaped
from npllama.store.export import export

BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "model"
    write_model_directory(path, seed=3)
    return path


def echoed(call, model: Path, *arguments: object, stdin: bytes = b"") -> str:
    """The prompt as the command understood it."""
    done = call("generate", "-m", model, "-n", 0, "--echo", *arguments, stdin=stdin)
    assert done.code == 0, done.err
    return done.text.removesuffix("\n")


# ---------------------------------------------------------------- text that looks like options


@pytest.mark.parametrize(
    "prompt", ["-x", "--stop", "---", "-", "--json", "-e", "-5", "--", "-- a", "--prompt=x", "=", "=--", ""]
)
@pytest.mark.parametrize("option", ["-p", "--prompt"])
def test_a_prompt_may_begin_with_a_dash(call, model: Path, option: str, prompt: str) -> None:
    expected = "from stdin" if prompt == "-" else prompt
    assert echoed(call, model, option, prompt, stdin=b"from stdin") == expected
    assert echoed(call, model, f"--prompt={prompt}", stdin=b"from stdin") == expected
    if prompt and prompt != "=--":
        assert echoed(call, model, f"-p{prompt}", stdin=b"from stdin") == expected.removeprefix("=")


@pytest.mark.parametrize("arguments", [("--stop", "---"), ("--stop=---",), ("--stop", "-p"), ("--stop", "--stop")])
def test_a_stop_text_may_begin_with_a_dash(call, model: Path, arguments: tuple[str, ...]) -> None:
    done = call("generate", "-m", model, "-p", "the cat", "-n", 3, "--temp", 0, *arguments)
    assert done.code == 0, done.err
    with npllama.load(model) as llm:
        assert done.text == llm.generate("the cat", 3, 0).text + "\n"


def test_a_stop_text_of_dashes_stops(call, tmp_path: Path) -> None:
    """A model that goes on in dashes: every token's embedding is the output row of "-", and blocks add nothing."""
    weights = random_weights(TINY, seed=0)
    for name, w in weights.items():
        w[...] = 1.0 if name in ("tok_embeddings", "norm") else 0.0
    write_model_directory(tmp_path / "m", weights=weights)
    with npllama.load(tmp_path / "m") as llm:
        (dash,) = llm.tokenizer.encode("-", bos=False)[1:]
    weights["output"][dash] = 1.0
    write_model_directory(tmp_path / "dashes", weights=weights)
    arguments = ("generate", "-m", tmp_path / "dashes", "-p", "a", "-n", 8, "--json")
    assert json.loads(call(*arguments).text)["text"] == "--------"
    stopped = json.loads(call(*arguments, "--stop", "---").text)
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


def test_a_positional_prompt_with_a_dash_is_told_how(call, model: Path) -> None:
    done = call("generate", "-m", model, "-x")
    assert done.code == 2
    assert "unrecognized arguments: -x (text that begins with a dash is given as -p TEXT)" in done.err
    assert echoed(call, model, "--", "-x") == "-x"


@pytest.mark.parametrize("argument", ["--model=--", "-m--", "-f=--", "--ctx-size=--"])
def test_two_dashes_are_no_other_value(call, argument: str) -> None:
    done = call("generate", argument)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"{argument}: -- is no value" in done.err


def test_an_option_without_its_value_is_still_wrong_usage(call, model: Path) -> None:
    for option in ("--stop", "-p"):
        done = call("generate", "-m", model, option)
        assert done.code == 2
        assert "expected one argument" in done.err


# ---------------------------------------------------------------- escapes


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (rb"a\nb\r\t", b"a\nb\r\t"),
        (rb"\"\'\\", b"\"'\\"),
        (rb"\\n", rb"\n"),
        (rb"\x41\x7a\xC3\xa4", "Azä".encode()),
        (rb"\x4 \xg1 \x", rb"\x4 \xg1 \x"),
        (b"\\q \\0 \\", b"\\q \\0 \\"),
        (b"", b""),
    ],
)
def test_escapes_are_those_of_llama_cpp(written: bytes, meant: bytes) -> None:
    assert unescaped(written) == meant


@pytest.mark.parametrize("escape", ["-e", "--escape"])
def test_escapes_are_read_where_asked_in_prompts_from_everywhere(
    call, model: Path, tmp_path: Path, escape: str
) -> None:
    (tmp_path / "p").write_bytes(rb"a\tb\n" + b"\n")
    assert echoed(call, model, escape, "-p", r"a\tb\n") == "a\tb\n"
    assert echoed(call, model, escape, r"a\tb\n") == "a\tb\n"
    assert echoed(call, model, escape, "-f", tmp_path / "p") == "a\tb\n"
    assert echoed(call, model, escape, stdin=rb"a\tb\n") == "a\tb\n"
    assert echoed(call, model, "-p", r"a\tb\n") == r"a\tb\n"
    assert echoed(call, model, "-f", tmp_path / "p") == r"a\tb\n"


def test_escapes_are_read_in_stop_texts(call, model: Path) -> None:
    with npllama.load(model) as llm:
        text = llm.generate("the cat", 12, 0).text
    stop = "".join(f"\\x{byte:02x}" for byte in text[4:6].encode())
    arguments = ("generate", "-m", model, "-p", "the cat", "-n", 12, "--temp", 0, "--stop", stop)
    assert call(*arguments, "-e").text == text[: text.index(text[4:6])] + "\n"
    assert call(*arguments).text == text + "\n"


def test_escapes_that_are_no_utf8_are_one_line(call, model: Path) -> None:
    for arguments in (("-p", r"\xff"), ("-p", "a", "--stop", r"\xc3")):
        done = call("generate", "-m", model, "-e", *arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "is not UTF-8, which text must be" in done.err


# ---------------------------------------------------------------- files and pipes


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (BOM + b"the cat\n", "the cat"),
        (BOM, ""),
        (BOM + BOM + b"a", "\ufeffa"),
        (b"a" + BOM, "a\ufeff"),
        (b"one\r\ntwo\r\n", "one\r\ntwo"),
        (b"one\n\n", "one\n"),
        (b"one\r", "one\r"),
    ],
)
def test_a_byte_order_mark_and_the_last_line_end_are_no_part_of_a_prompt(
    call, model: Path, tmp_path: Path, data: bytes, prompt: str
) -> None:
    (tmp_path / "p").write_bytes(data)
    assert echoed(call, model, "-f", tmp_path / "p") == prompt
    assert echoed(call, model, stdin=data) == prompt
    assert echoed(call, model, "-", stdin=data) == prompt
    assert echoed(call, model, "-f", "-", stdin=data) == prompt


@pytest.mark.parametrize("command", ["generate", "perplexity"])
@pytest.mark.parametrize("name", ["no", ".", "a\0b"])
def test_a_text_file_that_cannot_be_read_is_one_line(call, command: str, name: str) -> None:
    done = call(command, "-f", name)
    assert (done.code, done.text, done.err.count("\n")) == (1, "", 1)
    assert "cannot be read" in done.err


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\rb", "a\x1b[2Jb", "a\u2028b", "a\udcffb"])
def test_errors_are_one_printable_line_whatever_the_path_holds(tmp_path: Path, model: Path, name: str) -> None:
    path = tmp_path / name
    for attempt in (lambda: npllama.load(path), lambda: export(path, tmp_path / "out"), lambda: export(model, path)):
        with pytest.raises(npllama.NpllamaError) as caught:
            attempt()
        assert str(caught.value).isprintable()


def test_text_in_utf16_is_named_as_such(call, model: Path) -> None:
    done = call("generate", "-m", model, stdin="the cat".encode("utf-16"))
    assert done.code == 1
    assert "is not UTF-8, which text must be (it looks like UTF-16); convert it" in done.err


# ---------------------------------------------------------------- BOS, EOS, suggested sampling


@pytest.fixture(scope="module")
def suggesting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint wants no BOS, and suggests a sampling."""
    folder = tmp_path_factory.mktemp("suggesting")
    write_safetensors_checkpoint(folder / "checkpoint", seed=3)
    (folder / "checkpoint" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    said = {"do_sample": True, "temperature": 1.6, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.2}
    (folder / "checkpoint" / "generation_config.json").write_text(json.dumps(said))
    npllama_export = ["export", str(folder / "checkpoint"), str(folder / "out")]
    assert npllama.commands.cli.main(npllama_export) == 0
    return folder / "out"


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), {}),
        (("--bos",), {"bos": True}),
        (("--no-bos",), {"bos": False}),
        (("--bos", "--eos"), {"bos": True, "eos": True}),
        (("--no-eos",), {"eos": False}),
        (("--sampling", "model"), {"sampling": "model"}),
        (("--sampling", "model", "--temp", "0.3"), {"sampling": "model", "temperature": 0.3}),
        (("--sampling", "default"), {}),
        (("--padding-ids",), {"padding_ids": True}),
    ],
)
def test_flags_of_the_command_are_options_of_generate(
    call, suggesting: Path, flags: tuple[str, ...], options: dict[str, object]
) -> None:
    done = call("generate", "-m", suggesting, "-p", "the cat", "-n", 16, "-s", 5, "--json", *flags)
    with npllama.load(suggesting) as llm:
        expected = llm.generate("the cat", 16, seed=5, **options)
    found = json.loads(done.text)
    assert (found["tokens"], found["usage"]["prompt_tokens"]) == (expected.tokens, expected.usage.prompt_tokens)


def test_an_empty_prompt_without_bos_is_wrong_usage(call, suggesting: Path) -> None:
    done = call("generate", "-m", suggesting, "-p", "")
    assert done.code == 2
    assert "the prompt is empty and gets no BOS here" in done.err
    assert call("generate", "-m", suggesting, "-p", "", "--bos", "-n", 1).code == 0


def test_sampling_that_a_model_does_not_suggest_is_wrong_usage(call, model: Path) -> None:
    done = call("generate", "-m", model, "-p", "a", "--sampling", "model")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "this model suggests no sampling" in done.err


def test_info_shows_bos_and_the_suggested_sampling(call, suggesting: Path, model: Path) -> None:
    facts = json.loads(call("info", suggesting, "--json").text)
    assert facts["tokenizer"]["add_bos_token"] is False
    sampling = {"temperature": 1.6, "top_k": 7, "top_p": 0.9, "min_p": 0.0, "repeat_penalty": 1.2}
    assert facts["suggested_sampling"] == sampling
    table = call("info", suggesting).text
    assert "add_bos_token" in table
    assert "1.6" in table
    assert json.loads(call("info", model, "--json").text)["suggested_sampling"] == "none"


@pytest.mark.parametrize("bos", [1, "no", 0])
def test_bos_is_true_false_or_none(model: Path, bos: object) -> None:
    with npllama.load(model) as llm:
        with pytest.raises(npllama.UsageError, match=r"bos='.*': needs True or False"):
            llm.generate("a", bos=bos)
        with pytest.raises(npllama.UsageError, match="bos=True is for a prompt of text"):
            llm.generate([1, 70], bos=True)
        assert llm.generate([1, 70], max_tokens=1, bos=False).usage.prompt_tokens == 2
        assert llm.generate("a", max_tokens=1, stop=None).finish_reason == "length"
