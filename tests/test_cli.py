"""The command line: what goes to stdout, what to stderr, and how each command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from command_line import COMMAND, environment, run
from helpers import TINY, write_model_directory, write_safetensors_checkpoint

import npllama
from npllama.commands import cli
from npllama.commands.terminal import Notes, ProgressLine

GREEDY = ("--temp", "0", "-n", "12")

RESULT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["text", "tokens", "finish_reason", "usage", "seed", "model", "backend", "timings"],
    "properties": {
        "text": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "finish_reason": {"enum": ["stop", "length", None]},
        "usage": {
            "type": "object",
            "additionalProperties": False,
            "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
            "properties": {
                name: {"type": "integer"} for name in ("prompt_tokens", "completion_tokens", "total_tokens")
            },
        },
        "seed": {"type": "integer", "minimum": 0},
        "model": {"type": "string"},
        "backend": {"enum": ["numpy", "numba"]},
        "timings": {
            "type": "object",
            "additionalProperties": False,
            "required": ["load_s", "prompt_s", "generate_s", "prompt_per_second", "generate_per_second"],
            "patternProperties": {".*": {"type": "number", "minimum": 0}},
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    write_model_directory(path, seed=3)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "checkpoint"
    write_safetensors_checkpoint(path, seed=3)
    return path


def continuation(model: Path, prompt: str, **options: object) -> str:
    with npllama.load(model) as llm:
        return llm.generate(prompt, max_tokens=12, temperature=0, **options).text


def only_line(err: str) -> str:
    """The one line on stderr of an expected failure."""
    assert err.startswith("npllama: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# ---------------------------------------------------------------- generate: where the prompt comes from


@pytest.mark.parametrize("arguments", [("the cat",), ("-p", "the cat"), ("--prompt", "the cat")])
def test_generate_prints_the_continuation_and_a_line_end(call, model: Path, arguments: tuple[str, ...]) -> None:
    done = call("generate", "-m", model, *GREEDY, *arguments)
    assert done.code == 0
    assert done.text == continuation(model, "the cat") + "\n"


def test_echo_prints_the_prompt_too(call, model: Path) -> None:
    assert call("generate", "-m", model, *GREEDY, "the cat", "--echo").text.startswith("the cat")


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_a_file_is_a_prompt_without_its_last_line_end(call, model: Path, tmp_path: Path, ending: bytes) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"the\ncat" + ending)
    done = call("generate", "-m", model, *GREEDY, "-f", tmp_path / "prompt.txt", "--echo")
    assert done.text.startswith("the\ncat" + continuation(model, "the\ncat"))


@pytest.mark.parametrize("arguments", [("-",), ("-p", "-"), ()])
def test_stdin_is_the_prompt_for_a_dash_and_where_none_was_given(call, model: Path, arguments: tuple[str, ...]) -> None:
    done = call("generate", "-m", model, *GREEDY, *arguments, stdin=b"the cat\n")
    assert done.text == continuation(model, "the cat") + "\n"


@pytest.mark.parametrize("prompt", ["", "a dog"])
def test_stdin_is_not_read_beside_a_prompt(call, model: Path, prompt: str) -> None:
    done = call("generate", "-m", model, *GREEDY, "-p", prompt, stdin=b"the cat")
    assert done.text == continuation(model, prompt) + "\n"


@pytest.mark.parametrize("stdin", ["terminal", None])
def test_without_a_prompt_a_terminal_or_a_closed_stdin_means_an_empty_one(call, model: Path, stdin: str | None) -> None:
    assert call("generate", "-m", model, *GREEDY, stdin=stdin).text == continuation(model, "") + "\n"


def test_a_dash_with_a_closed_stdin_is_an_error(call, model: Path) -> None:
    done = call("generate", "-m", model, "-", stdin=None)
    assert done.code == 1
    assert "stdin: is closed" in only_line(done.err)


@pytest.mark.parametrize(
    "arguments", [("a", "-p", "b"), ("-p", "a", "-p", "b"), ("a", "-f", "x"), ("-f", "x", "-f", "y"), ("", "-p", "")]
)
def test_two_prompts_are_wrong_usage(call, model: Path, arguments: tuple[str, ...]) -> None:
    done = call("generate", "-m", model, *arguments)
    assert done.code == 2
    assert "two prompts were given; one is needed" in done.err
    assert done.text == ""


def test_words_without_quotation_marks_are_wrong_usage_that_names_them(call, model: Path) -> None:
    done = call("generate", "-m", model, "the", "cat", "sat")
    assert done.code == 2
    assert "unrecognized arguments: cat sat (text of several words needs quotation marks)" in done.err


# ---------------------------------------------------------------- generate: options


def test_every_option_reaches_the_model(call, model: Path) -> None:
    done = call(
        *("generate", "-m", model, "the cat", "-n", 9, "--temp", "1.5", "--top-k", 0, "--top-p", "0.9"),
        *("--min-p", "0.01", "--repeat-penalty", "1.3", "-s", 77, "-c", 40, "--stop", "zzz", "--stop", "yyy"),
    )
    with npllama.load(model, context=40) as llm:
        expected = llm.generate("the cat", 9, 1.5, 0, 0.9, 0.01, 1.3, 77, ("zzz", "yyy"))
    assert done.text == expected.text + "\n"
    assert "seed 77" in done.err


def test_a_stop_text_ends_the_output_before_it(call, model: Path) -> None:
    text = continuation(model, "the cat")
    done = call("generate", "-m", model, *GREEDY, "the cat", "--stop", text[4:7])
    assert done.text == text[: text.index(text[4:7])] + "\n"


def test_n_0_reads_the_prompt_only(call, model: Path) -> None:
    done = call("generate", "-m", model, "the cat", "-n", 0)
    assert (done.code, done.text) == (0, "\n")
    assert "generated 0 tokens" in done.err


def test_n_minus_1_fills_the_context(call, model: Path) -> None:
    done = call("generate", "-m", model, "the cat", "-n", -1, "-c", 30, "--temp", 0, "--json")
    assert json.loads(done.text)["usage"]["total_tokens"] == 30


def test_threads_and_backend_are_honoured(call, model: Path) -> None:
    done = call("generate", "-m", model, *GREEDY, "the cat", "--backend", "numpy", "-t", 1, "--json")
    assert json.loads(done.text)["backend"] == "numpy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bogus",), "unrecognized arguments: --bogus"),
        (("--tem", "1"), "unrecognized arguments: --tem"),
        (("-n", "-2"), "'-2' is not a whole number from -1"),
        (("-n", "many"), "'many' is not a whole number"),
        (("--temp", "-1"), "temperature="),
        (("--temp", "nan"), "temperature="),
        (("--top-p", "1.5"), "top_p="),
        (("--min-p", "-1"), "min_p="),
        (("--top-k", "0.5"), "not a whole number"),
        (("--repeat-penalty", "0"), "repeat_penalty="),
        (("-s", "18446744073709551616"), "not a whole number from -1 to 18446744073709551615"),
        (("-c", "0"), "not a whole number from 1"),
        (("-t", "0"), "not a whole number from 1"),
        (("--backend", "cuda"), "invalid choice"),
        (("--stop", ""), "stop"),
    ],
)
def test_values_out_of_range_are_wrong_usage(call, model: Path, arguments: tuple[str, ...], message: str) -> None:
    done = call("generate", "-m", model, "-p", "a", *arguments)
    assert done.code == 2
    assert message in only_line(done.err)
    assert done.text == ""


def test_options_out_of_range_are_refused_before_the_model_is_opened(call, tmp_path: Path) -> None:
    assert call("generate", "-m", tmp_path / "none", "-p", "a", "--temp", "-1").code == 2


# ---------------------------------------------------------------- generate: --json, stderr


def test_json_is_one_object_with_the_promised_keys_and_nothing_else(call, model: Path) -> None:
    done = call("generate", "-m", model, *GREEDY, "the cat", "-s", 5, "--json")
    result = json.loads(done.text)
    jsonschema.validate(result, RESULT)
    assert done.text.count("\n") == 1
    assert result["text"] == continuation(model, "the cat")
    assert len(result["tokens"]) == result["usage"]["completion_tokens"] == 12
    assert result["finish_reason"] == "length"
    assert result["seed"] == 5
    assert result["model"] == str(model)
    rate = result["usage"]["completion_tokens"] / result["timings"]["generate_s"]
    assert result["timings"]["generate_per_second"] == pytest.approx(rate)


def test_the_seed_and_statistics_go_to_stderr_in_one_line(call, model: Path) -> None:
    done = call("generate", "-m", model, *GREEDY, "the cat", "-s", 5, "--backend", "numpy")
    n = len(npllama.load(model).tokenizer.encode("the cat"))
    assert done.err.startswith(f"seed 5 · prompt {n} tokens, ")
    assert " · generated 12 tokens, " in done.err
    assert done.err.count("\n") == 1


def test_a_random_seed_printed_repeats_the_text(call, model: Path) -> None:
    first = call("generate", "-m", model, "the cat", "-n", 12, "--temp", "1.5")
    seed = first.err.split("seed ")[1].split()[0]
    assert call("generate", "-m", model, "the cat", "-n", 12, "--temp", "1.5", "-s", seed).text == first.text


def test_what_the_library_remarks_goes_to_stderr(call, model: Path) -> None:
    done = call("generate", "-m", model, *GREEDY, "the cat", "-c", 100)
    assert "a context of 100 positions is more than the 64" in done.err
    assert "positions" not in done.text


def test_text_is_utf8_also_in_the_c_locale(model: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("generate", "-m", model, "-n", 0, "--echo", "größe 猫", **plain)
    assert done.code == 0, done.err
    assert done.text == "größe 猫\n"


def test_a_stop_text_is_utf8_also_in_the_c_locale(model: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with npllama.load(model) as llm:
        text = llm.generate("a", seed=1, temperature=3).text
    assert "�" in text  # a byte that is no UTF-8, of which a model of random weights says many
    done = run("generate", "-m", model, "a", "-s", 1, "--temp", 3, "--stop", "�", **plain)
    assert done.text == text[: text.index("\ufffd")] + "\n"


def test_bytes_of_a_path_that_are_not_utf8_are_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"m\xff")
    done = run("info", "-m", path, "--json")
    assert done.code == 1
    assert r"m\udcff: cannot be opened" in only_line(done.err)
    try:
        write_model_directory(path)
    except OSError:
        pytest.skip("no names of arbitrary bytes on this file system")
    assert json.loads(run("info", "-m", path, "--json").text)["model"] == str(path)


def test_a_stdin_that_does_not_wait_is_one_line(model: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    command = [*COMMAND, "generate", "-m", str(model)]
    done = subprocess.run(command, stdin=reader, capture_output=True, text=True, env=environment(), check=False)
    os.close(reader), os.close(writer)
    assert done.returncode == 1
    assert "stdin: does not wait" in only_line(done.stderr)


# ---------------------------------------------------------------- expected failures


def test_a_missing_model_is_one_line_with_what_to_do(call, tmp_path: Path) -> None:
    done = call("generate", "-m", tmp_path / "none", "-p", "a")
    assert (done.code, done.text) == (1, "")
    assert "none: cannot be opened" in only_line(done.err)
    assert "npllama export" in done.err


def test_a_prompt_that_does_not_fit_is_one_line(call, model: Path) -> None:
    done = call("generate", "-m", model, "-p", "the cat " * 40)
    assert (done.code, done.text) == (1, "")
    assert "the context holds 64; shorten the prompt" in only_line(done.err)


@pytest.mark.parametrize("name", ["none.txt", "."])
def test_a_prompt_file_that_cannot_be_read_is_one_line(call, model: Path, tmp_path: Path, name: str) -> None:
    done = call("generate", "-m", model, "-f", tmp_path / name)
    assert done.code == 1
    assert "cannot be read" in only_line(done.err)


@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_prompt_that_is_not_utf8_is_one_line_with_the_byte(
    call, model: Path, tmp_path: Path, from_stdin: bool
) -> None:
    (tmp_path / "p").write_bytes(b"ab\xffc")
    done = call("generate", "-m", model, *([] if from_stdin else ["-f", tmp_path / "p"]), stdin=b"ab\xffc")
    assert done.code == 1
    assert "byte 0xff at offset 2 is not UTF-8" in only_line(done.err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PermissionError(13, "Permission denied", "x.npy"), 1, "x.npy: Permission denied; check the path"),
        (MemoryError(), 1, "the memory does not suffice; use a smaller model"),
        (npllama.CheckpointError("two\nlines"), 1, "two lines"),
        (npllama.UsageError("no such number"), 2, "no such number"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "pip install x"),
    ],
)
def test_whatever_is_expected_to_fail_fails_with_one_line(
    call, monkeypatch: pytest.MonkeyPatch, model: Path, error: Exception, code: int, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("npllama.inference.load", fail)
    done = call("generate", "-m", model, "-p", "a")
    assert done.code == code
    assert message in only_line(done.err)


def test_remarks_are_dropped_where_a_command_fails(call, model: Path) -> None:
    done = call("generate", "-m", model, "-c", 65, "-p", "the cat " * 40)  # 65: more than the model was trained on
    assert done.code == 1
    only_line(done.err)


# ---------------------------------------------------------------- interrupts and pipes


def start(*arguments: object) -> subprocess.Popen[bytes]:
    """A command under way, its streams to be read by the test; it heeds Ctrl-C even where the caller does not."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        env=environment(),
        bufsize=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored signals are inherited
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context takes longer to fill than a test takes to interrupt it."""
    import dataclasses

    path = tmp_path_factory.mktemp("cli") / "endless"
    write_model_directory(path, dataclasses.replace(TINY, max_seq_len=1 << 22, eos_token_ids=()), seed=3)
    return path


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_with_130_and_the_text_so_far(endless: Path) -> None:
    with start("generate", "-m", endless, "-n", -1, "-c", 1 << 20, "--temp", 0, "-p", "the cat") as process:
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate()
    assert process.returncode == 130
    with npllama.load(endless) as llm:
        n = int(err.decode().split("generated ")[1].split()[0].replace(",", ""))
        # The last one may have been counted and not yet handed over when the signal came.
        text = llm.generate("the cat", max_tokens=min(n - 1, 50), temperature=0).text
    assert (first + rest).decode().startswith(text.rstrip("\ufffd"))  # the bytes of half a character were held back
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_with_json_still_prints_the_object(endless: Path, monkeypatch: pytest.MonkeyPatch, call) -> None:
    from npllama import inference

    following = inference.Stream.__next__

    def interrupted(stream: inference.Stream) -> inference.Piece:
        if len(stream.result.tokens) == 3:
            raise KeyboardInterrupt
        return following(stream)

    monkeypatch.setattr(inference.Stream, "__next__", interrupted)
    done = call("generate", "-m", endless, "-n", -1, "-p", "the cat", "--json", "-c", 100, "--seed", 1)
    assert done.code == 130
    result = json.loads(done.text)
    jsonschema.validate(result, RESULT)
    assert len(result["tokens"]) == 3
    assert result["finish_reason"] is None


def test_ctrl_c_while_loading_ends_with_130_and_silence(call, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("npllama.inference.load", interrupted)
    done = call("generate", "-m", model, "-p", "a")
    assert (done.code, done.text, done.err) == (130, "", "")


@pytest.mark.skipif(os.name == "nt", reason="pipes")
def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    with start("generate", "-m", endless, "-n", -1, "-c", 1 << 20, "--temp", 0, "-p", "the cat") as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("info",), ("generate", "-n", "3", "-p", "a")])
def test_a_pipe_closed_from_the_start_is_no_error(model: Path, arguments: tuple[str, ...]) -> None:
    more = ("-m", model) if arguments[0] == "generate" else ()
    reading, writing = os.pipe()
    os.close(reading)
    command = [*COMMAND, *map(str, (*arguments, *more))]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=environment(), check=False
    )
    os.close(writing)
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_under_stdout_is_one_line(model: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "generate", "-m", str(model), "-p", "a", "-n", "3", "--backend", "numpy"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment(), check=False)
    assert done.returncode == 1
    assert "No space left on device" in only_line(done.stderr.decode())


@pytest.mark.skipif(os.name == "nt", reason="closes descriptors with a shell")
@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-"])
def test_streams_closed_by_the_caller_are_no_error(model: Path, closing: str) -> None:
    command = f'"{sys.executable}" -m npllama generate -m "{model}" -n 3 --temp 0 {closing}'
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, env=environment(), check=False
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


# ---------------------------------------------------------------- the frame


def test_version_prints_the_version(call) -> None:
    done = call("--version")
    assert (done.code, done.text) == (0, f"npllama {npllama.__version__}\n")


def test_no_command_is_wrong_usage_and_shows_the_help_on_stderr(call) -> None:
    done = call()
    assert (done.code, done.text) == (2, "")
    assert "generate" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bogus",), "unrecognized arguments: --bogus; npllama --help"),
        (("dance",), "invalid choice: 'dance'"),
        (("-m", "x"), "invalid choice: 'x'"),
        (("generate", "--bogus"), "unrecognized arguments: --bogus; npllama generate --help"),
        (("generate", "one", "two"), "unrecognized arguments: two (text of several words needs quotation marks)"),
        (("generate", "-n"), "argument -n/--max-tokens: expected one argument; npllama generate --help"),
        (("export", "a"), "required: OUT; npllama export --help"),
    ],
)
def test_what_no_command_takes_is_one_line_that_says_where_to_look(
    call, arguments: tuple[str, ...], message: str
) -> None:
    done = call(*arguments)
    assert (done.code, done.text) == (2, "")
    assert message in only_line(done.err)


@pytest.mark.parametrize("command", [c.NAME for c in cli.COMMANDS])
def test_every_command_is_listed_and_explains_itself(call, command: str) -> None:
    assert command in call("--help").text
    done = call(command, "--help")
    assert done.code == 0
    assert "usage: npllama " + command in done.text


def test_python_m_npllama_is_the_same_command() -> None:
    assert run("--version").text == f"npllama {npllama.__version__}\n"


def test_remarks_wait_for_the_first_success_and_announced_waits_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    notes = Notes()
    notes.add("a remark")
    notes.add("compiling ...")
    assert capsys.readouterr().err == "compiling ...\n"
    notes.show()
    notes.add("another")
    assert capsys.readouterr().err == "a remark\nanother\n"


# ---------------------------------------------------------------- export and info


def test_export_makes_a_model_and_says_which_tokenizer_it_took(call, checkpoint: Path, tmp_path: Path) -> None:
    done = call("export", checkpoint, tmp_path / "out")
    assert (done.code, done.text) == (0, "")
    assert f"tokenizer: {checkpoint / 'tokenizer.model'}\n" in done.err
    assert f"{tmp_path / 'out'}: " in done.err
    assert "matrices in f32\n" in done.err
    assert npllama.load(tmp_path / "out").config == TINY


def test_export_takes_dtype_tokenizer_and_force(call, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes((checkpoint / "tokenizer.model").read_bytes())
    arguments = ("export", checkpoint, tmp_path / "out", "--dtype", "bf16", "--tokenizer", other)
    assert call(*arguments).code == 0
    again = call(*arguments)
    assert again.code == 1
    assert "exists" in only_line(again.err)
    forced = call(*arguments, "--force")
    assert forced.code == 0
    assert f"tokenizer: {other}\n" in forced.err
    assert "matrices in bf16\n" in forced.err


@pytest.mark.parametrize("arguments", [("export",), ("export", "a"), ("export", "a", "b", "--dtype", "f8")])
def test_export_without_what_it_needs_is_wrong_usage(call, arguments: tuple[str, ...]) -> None:
    assert call(*arguments).code == 2


def test_export_of_what_is_not_there_is_one_line(call, tmp_path: Path) -> None:
    done = call("export", tmp_path / "none", tmp_path / "out")
    assert done.code == 1
    assert "none" in only_line(done.err)


def test_the_progress_line_tells_share_rate_and_time_left_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 2.0, 2.05, 4.0])
    monkeypatch.setattr("npllama.commands.terminal.time.monotonic", lambda: next(now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    with ProgressLine("exporting") as progress:
        progress(100_000_000, 400_000_000, "wq")
        progress(101_000_000, 400_000_000, "too soon to be drawn")
        progress(200_000_000, 400_000_000, "wk")
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines == [
        "",
        "exporting 25 % of 400 MB, 50 MB/s, 0:06 left, wq",
        "exporting 50 % of 400 MB, 50 MB/s, 0:04 left, wk",
        "",
    ]


def test_progress_is_silent_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("exporting") as progress:
        progress(1, 2, "wq")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", [(), ("-m",)])
def test_info_shows_what_a_model_is(call, model: Path, flag: tuple[str, ...]) -> None:
    facts = json.loads(call("info", *flag, model, "--json").text)
    assert facts["config"] == json.loads(json.dumps(TINY.to_json()))
    assert facts["number_formats"]["wq"] == "f32"
    weights = [np.load(file) for file in model.glob("*.npy")]
    assert facts["parameters"] == sum(w.size for w in weights)
    assert facts["size_bytes"] == sum(w.nbytes for w in weights)
    assert facts["files"] == len(list(model.iterdir()))
    assert facts["tokenizer"]["pieces"] == TINY.vocab_size
    table = call("info", *flag, model).text
    assert "max_seq_len" in table
    assert f"{facts['parameters']:,}" in table


def test_info_check_finds_a_changed_byte(call, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "m")
    assert "every file is as it was exported" in call("info", tmp_path / "m", "--check").text
    content = bytearray((tmp_path / "m" / "wq.npy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "m" / "wq.npy").write_bytes(content)
    done = call("info", tmp_path / "m", "--check")
    assert (done.code, done.text) == (1, "")
    assert "wq.npy" in only_line(done.err)


def test_info_without_a_model_shows_the_machine_and_the_installation(call) -> None:
    facts = json.loads(call("info", "--json").text)
    assert facts["npllama"] == npllama.__version__
    assert facts["numpy"] == np.__version__
    assert facts["cpu"]
    assert "(" in facts["threads"]
    assert facts["cache_directory"] == os.environ["NPLLAMA_CACHE_DIR"]


def test_two_models_are_wrong_usage(call, model: Path) -> None:
    done = call("info", model, "-m", model)
    assert done.code == 2
    assert "two models were given" in done.err


def test_check_without_a_model_is_wrong_usage(call) -> None:
    done = call("info", "--check")
    assert done.code == 2
    assert "--check needs a model" in done.err
