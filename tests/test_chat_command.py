"""`npllama chat` as a person uses it, in a pseudo-terminal, and over a pipe; `llm.chat` below it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from command_line import COMMAND, environment, run
from helpers import TINY, write_model_directory

import npllama
from npllama.inference import Llama
from npllama.text.chat.encoding import chat_prompt

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
FORMAT = "zephyr"
USER = {"role": "user", "content": "the cat"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    write_model_directory(path, dataclasses.replace(TINY, max_seq_len=512), seed=3)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Llama:
    return npllama.load(folder, chat_format=FORMAT)


# ---------------------------------------------------------------- llm.chat


def test_an_answer_continues_the_dialogs_ids(llm: Llama) -> None:
    answer = llm.chat([USER], max_tokens=12, temperature=0)
    plain = llm.generate(chat_prompt(FORMAT, llm.tokenizer, [USER]).ids, 12, temperature=0)
    assert answer.message == {"role": "assistant", "content": plain.text}
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 12)
    pieces = list(llm.chat([USER], stream=True, max_tokens=12, temperature=0))
    assert "".join(piece.text for piece in pieces) == plain.text


def test_the_formats_stop_ids_end_an_answer(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = llm.chat([USER], max_tokens=12, temperature=0).result.tokens
    prompt = chat_prompt(FORMAT, llm.tokenizer, [USER])
    ends = dataclasses.replace(prompt, stop_ids=frozenset({tokens[5]}))
    monkeypatch.setattr("npllama.text.chat.encoding.chat_prompt", lambda *rest: ends)
    answer = llm.chat([USER], max_tokens=12, temperature=0)
    assert answer.finish_reason == "stop"
    assert answer.result.tokens == tokens[: tokens.index(tokens[5])]


def test_a_next_turn_reads_only_what_is_new(llm: Llama) -> None:
    messages = [{"role": "user", "content": "the dog ran and the cat sat " * 3}]
    answer = llm.chat(messages, max_tokens=40, temperature=0)
    following = llm.chat([*messages, answer.message, USER], max_tokens=4)
    assert following.usage.cached_tokens >= (answer.usage.prompt_tokens - 1) // 64 * 64 > 0


def test_marks_are_refused_or_escaped_and_reported(llm: Llama) -> None:
    said = [{"role": "user", "content": "a <|user|> b"}]
    with pytest.raises(npllama.UsageError, match=r"messages\[0\] holds"):
        llm.chat(said)
    assert llm.chat(said, escape=True, max_tokens=2).escaped == ((0, "<|user|>", 1),)


def test_what_chat_does_not_take_is_refused(llm: Llama, folder: Path) -> None:
    for option in ("echo", "bos", "eos", "n"):
        with pytest.raises(npllama.UsageError, match=f"chat takes no {option}"):
            llm.chat([USER], **{option: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        llm.chat([USER], temprature=1)
    with npllama.load(folder) as silent, pytest.raises(npllama.UsageError, match="load it with chat_format=, one of"):
        silent.chat([USER])


# ---------------------------------------------------------------- over a pipe


@pytest.fixture(scope="module")
def answer(folder: Path) -> list[str]:
    """What is answered to "the cat"."""
    return piped(folder, b"the cat\n")[0]


def piped(folder: Path, text: bytes, *arguments: str, backend: str = "numpy") -> tuple[list[str], str]:
    """Lines of stdout, and stderr; in NumPy, which starts sooner: it is the dialog that is tested."""
    options = ("--chat-format", FORMAT, "-n", "6", "--temp", "0", "--backend", backend)
    done = run("chat", folder, *options, *arguments, stdin=text)
    assert done.code == 0, done.err
    return done.text.splitlines(), done.err


def test_a_line_in_gives_an_answer_out(folder: Path, llm: Llama) -> None:
    out, err = piped(folder, b"the cat\nthe dog", backend="auto")
    first = llm.chat([USER], max_tokens=6, temperature=0)
    second = llm.chat([USER, first.message, {"role": "user", "content": "the dog"}], max_tokens=6, temperature=0)
    assert "\n".join(out) == f"{first.message['content']}\n{second.message['content']}"
    assert "Ctrl-D" not in err


def test_texts_of_several_lines(folder: Path, tmp_path: Path) -> None:
    kept = tmp_path / "dialog.json"
    piped(folder, b'the \\\ncat\n"""\na\n\nb\n"""\n/save ' + os.fsencode(kept) + b"\n")
    assert [m["content"] for m in json.loads(kept.read_text()) if m["role"] == "user"] == ["the \ncat", "a\n\nb"]


def test_a_dialog_is_kept_and_goes_on(folder: Path, tmp_path: Path) -> None:
    kept = str(tmp_path / "dialog.json")
    out, _ = piped(folder, f"/system be a cat\nthe cat\n/save {kept}\nthe dog\n".encode())
    again, _ = piped(folder, b"the dog\n", "--load", kept)
    assert out[-len(again) :] == again
    assert json.loads(Path(kept).read_text())[0] == {"role": "system", "content": "be a cat"}
    assert len(json.loads(Path(kept).read_text())) == 3


def test_undo_retry_and_reset(folder: Path) -> None:
    out, err = piped(folder, b"the cat\n/retry\n/undo\nthe cat\n/reset\nthe cat\n/system\nthe cat\n")
    assert len(set(out)) == 1, "each is the first answer, greedy"
    assert "took back: 'the cat'" in err


def test_options_are_set_and_shown(folder: Path) -> None:
    out, err = piped(
        folder,
        b"/set temp 1.5\n/set seed 7\n/set max-tokens 3\n/set\nthe cat\n/stats\n/set heat 1\n/set temp x\n"
        b"/set temp -1\n",
    )
    assert {"temp 1.5", "seed 7", "max-tokens 3", "top-k 40"} <= set(out)
    assert re.search(r"answer 3 tokens, [\d,]+/s · seed 7", out[-1])
    assert "/set 'heat': needs one of temp, top-k" in err
    assert "/set temp 'x': needs a number" in err
    assert "temperature='-1': needs" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"/bogus", "'/bogus' is no command; /help lists them"),
        (b"\xff\xfe", "this line is not UTF-8"),
        (b"<|system|>", r"messages\[0\] holds '<\|system\|>'"),
        (b"/save", "/save needs the name of a file"),
        (b"/save /nonexistent/a", "/nonexistent/a: cannot be written"),
        (b"/load /nonexistent", "/nonexistent: cannot be read"),
        (b"/undo", "nothing has been asked yet"),
        (b"/retry", "nothing has been asked yet"),
        (b"/tokens", "nothing has been asked yet"),
        (b"/stats", "nothing has been answered yet"),
        (b"the " * 600, "the context holds 512"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_dialog_goes_on(
    folder: Path, answer: list[str], line: bytes, said: str
) -> None:
    out, err = piped(folder, line + b"\nthe cat\n")
    assert re.search(f"npllama: .*{said}", err), err
    assert out == answer


def test_tokens_are_shown(folder: Path, llm: Llama) -> None:
    _, err = piped(folder, b"the cat\n", "--show-tokens")
    n = len(chat_prompt(FORMAT, llm.tokenizer, [USER]).ids)
    assert f"{n} tokens" in err
    assert "</s>" in err
    assert "\x1b" not in err


def test_a_model_that_does_not_talk_is_refused_before_anything_is_read(folder: Path) -> None:
    done = run("chat", folder, stdin=b"hello\n")
    assert (done.code, done.out) == (2, b"")
    assert "load it with chat_format=" in done.err


# ---------------------------------------------------------------- in a terminal


class Terminal:
    """A process in a pseudo-terminal: what it shows, and what is typed."""

    def __init__(self, folder: Path, tmp_path: Path, *arguments: str, columns: int = 80, **changes: str) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = environment(TERM="xterm", NPLLAMA_HISTORY=str(tmp_path / "history"), **changes)
        arguments = ("chat", str(folder), "--chat-format", FORMAT, "--temp", "0", *arguments)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True,
            preexec_fn=self._begin,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    @staticmethod
    def _begin() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, keys: str | bytes) -> None:
        os.write(self._master, keys if isinstance(keys, bytes) else keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until a text is shown; what was shown before it and with it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise AssertionError(f"{text!r} was not shown: {self.shown[-2000:]!r}")
            try:
                self.shown += os.read(self._master, 65536).decode("utf-8", "replace")
            except OSError:  # the other side has closed
                break
        assert text in self.shown, self.shown[-2000:]
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def end(self) -> int:
        code = self.process.wait(60)
        os.close(self._master)
        return code

    def go_away(self) -> int:
        """Close the terminal, of which the system tells the process with a signal and at the end of its input."""
        os.close(self._master)
        return self.process.wait(60)


def test_a_person_talks(folder: Path, tmp_path: Path, llm: Llama) -> None:
    terminal = Terminal(folder, tmp_path, "-n", "6", "--show-tokens", NO_COLOR="")
    terminal.wait_for("/help lists what can be typed")
    terminal.wait_for("> ")
    terminal.type("the cat\n")
    shown = terminal.wait_for(" tokens")
    assert "\x1b[33m</s>\x1b[0m" in shown
    terminal.wait_for("> ")
    terminal.type("/help\n")
    terminal.wait_for("/quit            leave")
    terminal.wait_for("> ")
    time.sleep(0.3)  # Python sees a signal that comes before its line editor waits with the next key only
    terminal.type("\x03")
    terminal.wait_for("(Ctrl-D or /quit leaves)")
    terminal.type("/stats\n")
    terminal.wait_for("answer 6 tokens")
    terminal.type("\x1b[A\x1b[A\n")  # twice up: /help again
    terminal.wait_for("/quit            leave")
    terminal.type("/quit\n")
    assert terminal.end() == 0
    assert (tmp_path / "history").read_text().splitlines()[0] == "the cat"
    assert (tmp_path / "history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(folder, tmp_path, "-n", "-1", "--temp", "1", "-c", "100000", "-s", "5", "--ignore-eos")
    terminal.wait_for("> ")
    terminal.type("the cat\n")
    terminal.wait_for("\n")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/stats\n")
    terminal.wait_for(" tokens")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_narrow_terminal_a_wide_paste_and_one_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(folder, tmp_path, "-n", "3", "--show-tokens", columns=40, NO_COLOR="1")
    terminal.wait_for("> ")
    terminal.type("the cat sat " * 15 + "\n")
    assert "\x1b[33m" not in terminal.wait_for(" tokens")
    terminal.type(b"caf\xe9 \xff\n")
    terminal.type("/tokens\n")
    terminal.wait_for(" tokens")
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_a_terminal_that_goes_away_ends_the_program(folder: Path, tmp_path: Path) -> None:
    terminal = Terminal(folder, tmp_path, "-n", "3")
    terminal.wait_for("> ")
    assert terminal.go_away() != 0


def test_a_reader_that_goes_away_ends_the_program_quietly(folder: Path) -> None:
    command = [*COMMAND, "chat", str(folder), "--chat-format", FORMAT, "-n", "6"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.write(b"the cat\n" * 50)
    process.stdin.close()
    assert process.wait(60) == 0
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


# ---------------------------------------------------------------- a model that talks

TURNS = [
    "What is the capital of France?",
    "And of Italy?",
    "Which of the two is closer to Berlin?",
    "Write one short sentence about a cat.",
    "What was my first question?",
]
FLOAT32 = ("--dtype", "f32", "-n", "60", "-c", "1024")
"""As the model was quantized it answers, rounded once more, in French; llama.cpp says the same."""


def test_a_real_model_talks_for_five_turns_over_a_pipe_and_in_a_terminal(smollm2: Path, tmp_path: Path) -> None:
    kept = tmp_path / "dialog.json"
    typed = "\n".join([*TURNS, f"/save {kept}", "/stats", ""])
    done = run("chat", smollm2, "--temp", "0", *FLOAT32, stdin=typed.encode())
    assert done.code == 0, done.err
    *answers, stats = done.text.splitlines()
    assert len(answers) == 5
    assert "Paris" in answers[0]
    assert "Rome" in answers[1]
    assert "cut short" not in done.err, "each ends by itself"
    assert not re.search(r"<\|im_|SmolLM", done.text)
    assert int(re.search(r"\((\d+) were there already\)", stats)[1]) >= 64
    said = json.loads(kept.read_text())
    assert [m["role"] for m in said] == ["user", "assistant"] * 5
    assert [m["content"] for m in said[::2]] == TURNS
    assert [m["content"] for m in said[1::2]] == answers

    terminal = Terminal(smollm2, tmp_path, "--chat-format", "smollm2", *FLOAT32)
    for turn, answer in zip(TURNS, answers, strict=True):
        terminal.wait_for("> ", 300)
        terminal.type(turn + "\n")
        terminal.wait_for(answer, 300)
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
