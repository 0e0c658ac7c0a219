"""Talk with a model. /help lists what can be typed beside what you say; Ctrl-C stops an answer, Ctrl-D leaves.

A line that ends in a backslash goes on in the next; a line of three quotation marks begins and ends a text of several
lines. Over a pipe each line in gives one answer out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from npllama.commands import forms
from npllama.commands.dialog.line_editor import LineEditor
from npllama.commands.generate import OTHER_TEXTS, add_sampling, sampling_of
from npllama.commands.terminal import (
    Choices,
    Notes,
    add_execution,
    execution,
    load_model,
    model_of,
    number_formats,
    put,
    say,
    text,
    whole,
)
from npllama.commands.texts import argument_bytes, decoded
from npllama.errors import NpllamaError, UsageError, quote
from npllama.options import OPTIONS, SamplingOptions

if TYPE_CHECKING:
    from npllama.generation.results import Result
    from npllama.inference import Llama

NAME = "chat"
TEXTS = {"--system": "--system", **OTHER_TEXTS, **forms.TEXTS}
SUMMARY = "talk with a model"

HELP = """/system [TEXT]   what the system says first; without TEXT: nothing. Begins anew
/reset           begin anew, with the same system message
/undo            take back the last question and its answer
/retry           answer the last question again
/save FILE       keep the dialog in a file, as JSON
/load FILE       go on with a dialog that was kept
/set [NAME VALUE]   change how ids are chosen (temp 0.5, top-k 40, seed 1, max-tokens 100); alone: show it
/tokens          show what the model is told, token by token
/stats           speed and tokens of the last answer
/help            this
/quit            leave, as Ctrl-D does"""

COLOURS = ("\x1b[36m", "\x1b[33m", "\x1b[0m")  # text, control tokens, neither


SETTABLE = [option for option in OPTIONS if isinstance(option.default, (int, float)) or option.name == "samplers"]
"""Options of sampling that /set changes: numbers, flags as 0 and 1, and the order of the steps."""


class LeaveError(Exception):
    """The user has had enough."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama chat`."""
    add = parser.add_argument
    add("model_argument", metavar="MODEL", nargs="?", help="a model directory or a checkpoint")
    add("-m", "--model", metavar="MODEL", help="the same")
    add(
        "--dtype", metavar="FORMAT", choices=Choices(number_formats), help="number format that a checkpoint is "
        "exported to: %(choices)s (default: its own)"
    )  # fmt: skip
    add("--system", metavar="TEXT", type=text, help="what the system says first")
    add("--chat-format", metavar="NAME", help="how a dialog is told (default: as the checkpoint's chat template does)")
    add("--escape-marks", action="store_true", help="escape what tells who speaks where you type it (U+200B)")
    add("--padding-ids", action="store_true", help="let ids beyond the tokenizer's pieces be drawn, too")
    add("-n", "--max-tokens", metavar="N", type=whole(-1, 2**31), default=-1, help="tokens of an answer, at most "
        "(default: until the context is full)")  # fmt: skip
    add_sampling(parser)
    add("--stop", metavar="TEXT", type=text, action="append", default=[], help="end an answer before this text")
    forms.add_forms(parser)
    add("-c", "--ctx-size", metavar="N", type=whole(1, 2**31), help="context in tokens")
    add_execution(parser)
    add("--show-tokens", action="store_true", help="show what the model is told for each answer, token by token")
    add("--load", metavar="FILE", help="go on with a dialog that /save has kept")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Load, then question by question until the input ends."""
    if args.load is not None and args.system is not None:
        raise UsageError("--load FILE is the whole dialog, what the system says included; leave --system out.")
    given = {**sampling_of(args), **forms.form_of(args)}
    how = {**execution(args), "context": args.ctx_size}
    with load_model(notes, model_of(args), dtype=args.dtype, chat_format=args.chat_format, **how) as llama:
        notes.show()
        options = {
            **given,
            "seed": args.seed,
            "stop": args.stop,
            "sampling": args.sampling,
            "padding_ids": args.padding_ids,
        }
        options |= {"max_tokens": args.max_tokens, "escape": args.escape_marks}
        chat = Chat(llama, options, args.show_tokens)
        if args.system is not None:
            chat.begin(decoded(argument_bytes(args.system), "--system", False))
        if args.load is not None:
            chat.load(args.load)
        chat.check_format()
        with LineEditor(sys.stdin, sys.stdout) as editor:
            if editor.interactive:
                say(f"{llama.chat_format} · /help lists what can be typed · Ctrl-D leaves")
            chat.talk(editor)
    return 0


class Chat:
    """A dialog with one model: its messages, and how answers are made."""

    def __init__(self, llama: Llama, options: dict[str, Any], show_tokens: bool) -> None:
        self._llama, self._options, self._show_tokens = llama, options, show_tokens
        self.messages: list[dict[str, str]] = []
        self._last: Result | None = None

    def check_format(self) -> None:
        """Refuse a model without a chat format, and options that cannot be followed, before anything is typed."""
        self._llama.chat([{"role": "user", "content": "a"}], stream=True, **self._options).close()

    def talk(self, editor: LineEditor) -> None:
        """Read lines, answer each, until the input ends."""
        while True:
            try:
                line = editor.read("> ")
                if line is None:
                    return
                if line.strip():
                    self._take(line)
            except LeaveError:
                return
            except KeyboardInterrupt:
                say("(Ctrl-D or /quit leaves)")
            except NpllamaError as error:
                say(f"npllama: {error}")

    def _take(self, line: str) -> None:
        name, _, rest = line.strip().partition(" ")
        if not name.startswith("/"):
            self._ask(line)
            return
        command = COMMANDS.get(name[1:])
        if command is None:
            raise UsageError(f"{quote(name)} is no command; /help lists them.")
        command(self, rest.strip())

    def _ask(self, question: str) -> None:
        """Say something, and show the answer as it comes. What cannot be said leaves the dialog as it was."""
        asked = [*self.messages, {"role": "user", "content": question}]
        stream = self._llama.chat(asked, stream=True, **self._options)
        if self._show_tokens:
            self._put_tokens(asked)
        try:
            for piece in stream:
                put(piece.text)
        except KeyboardInterrupt:
            say("\n(stopped)")
        finally:
            stream.close()
            put("\n")
        answer = stream.result
        for one in answer.escaped:
            say(f"{one.mark} was escaped, {one.times} times")
        if answer.finish_reason == "length":
            say("(cut short: -n, or the context is full; /undo or /reset make it shorter)")
        forms.say_overruled(answer.result)
        self._last = answer.result
        self.messages = [*asked, answer.message]

    def _put_tokens(self, messages: list[dict[str, str]]) -> None:
        from npllama.commands.tokenize import piece_text
        from npllama.text.chat.encoding import chat_prompt

        tokenizer = self._llama.tokenizer
        prompt = chat_prompt(str(self._llama.chat_format), tokenizer, messages, self._options["escape"])
        text_colour, control_colour, plain = COLOURS if has_colours(sys.stderr) else ("", "", "")
        shown = []
        for i in prompt.ids:
            piece, is_control = piece_text(tokenizer, i), i in tokenizer.control_ids
            shown.append(
                f"{control_colour}{piece}{plain}"
                if is_control
                else f"{text_colour}{json.dumps(piece, ensure_ascii=False)}{plain}"
            )
        say(" ".join(shown))
        say(f"{len(prompt.ids)} tokens")

    # ------------------------------------------------------------ what begins with a slash

    def begin(self, system: str) -> None:
        """/system: begin anew with another system message."""
        messages = [{"role": "system", "content": system}] if system else []
        if messages:  # a format without system messages is told now
            self._llama.chat([*messages, {"role": "user", "content": "a"}], stream=True, max_tokens=0).close()
        self.messages = messages

    def reset(self, rest: str) -> None:
        """/reset: begin anew."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def undo(self, rest: str = "") -> str:
        """/undo: take back the last question and its answer; returns the question."""
        asked = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise UsageError("nothing has been asked yet.")
        question = self.messages[asked[-1]]["content"]
        del self.messages[asked[-1] :]
        return question

    def retry(self, rest: str) -> None:
        """/retry: answer the last question again."""
        before = list(self.messages)
        question = self.undo()
        try:
            self._ask(question)
        except NpllamaError:
            self.messages = before
            raise

    def save(self, rest: str) -> None:
        """/save FILE: the messages as JSON, the list of OpenAI."""
        if not rest:
            raise UsageError("/save needs the name of a file.")
        try:
            with open(rest, "w", encoding="utf-8") as file:
                json.dump(self.messages, file, ensure_ascii=False, indent=1)
                file.write("\n")
        except OSError as error:
            raise NpllamaError(f"{rest}: cannot be written ({error.strerror}); give another path.") from error
        say(f"{len(self.messages)} messages are in {rest}")

    def load(self, rest: str) -> None:
        """/load FILE: go on with messages that /save has kept."""
        from npllama.commands.texts import read_file
        from npllama.system import strict_json
        from npllama.text.chat.messages import checked_messages

        if not rest:
            raise UsageError("/load needs the name of a file.")
        try:
            messages = checked_messages(strict_json.parse(read_file(rest)))
        except UsageError as error:
            raise UsageError(f"{rest}: {error}") from error
        self.messages = [{"role": role, "content": said} for role, said in messages]
        say(f"{len(self.messages)} messages were read")

    def set(self, rest: str) -> None:
        """/set NAME VALUE: one option of sampling, the seed, or the length of answers."""
        names = {option.metadata["flags"][-1].removeprefix("--"): option.name for option in SETTABLE}
        names |= {"seed": "seed", "max-tokens": "max_tokens"}
        if not rest:
            put("".join(f"{shown} {self._shown(name)}\n" for shown, name in names.items()))
            return
        shown, _, value = rest.partition(" ")
        name = names.get(shown)
        if name is None:
            raise UsageError(f"/set {quote(shown)}: needs one of {', '.join(names)}.")
        changed = {**self._options, name: _value(name, shown, value.strip())}
        self._llama.chat(
            [{"role": "user", "content": "a"}], stream=True, **{**changed, "max_tokens": changed["max_tokens"]}
        ).close()
        self._options = changed

    def _shown(self, name: str) -> str:
        value = self._options[name]
        if value is not None:
            return str(value)
        return str(getattr(SamplingOptions(), name, "random"))

    def tokens(self, rest: str) -> None:
        """/tokens: what the model is told."""
        asked = self.messages if self.messages and self.messages[-1]["role"] == "user" else self.messages[:-1]
        if not asked:
            raise UsageError("nothing has been asked yet.")
        self._put_tokens(asked)

    def stats(self, rest: str) -> None:
        """/stats: speed and tokens of the last answer."""
        if self._last is None:
            raise UsageError("nothing has been answered yet.")
        r, u = self._last, self._last.usage
        read, written = (
            n / s if s > 0 else 0.0
            for n, s in ((u.prompt_tokens - u.cached_tokens, r.prompt_s), (u.completion_tokens, r.generate_s))
        )
        put(
            f"prompt {u.prompt_tokens} tokens ({u.cached_tokens} were there already), {read:,.0f}/s · answer "
            f"{u.completion_tokens} tokens, {written:,.0f}/s · seed {r.seed}\n"
        )

    def help(self, rest: str) -> None:
        """/help."""
        put(HELP + "\n")

    def quit(self, rest: str) -> None:
        """/quit."""
        raise LeaveError


COMMANDS = {
    "system": Chat.begin,
    "reset": Chat.reset,
    "undo": lambda chat, rest: say(f"took back: {quote(chat.undo())}"),
    "retry": Chat.retry,
    "save": Chat.save,
    "load": Chat.load,
    "set": Chat.set,
    "tokens": Chat.tokens,
    "stats": Chat.stats,
    "help": Chat.help,
    "quit": Chat.quit,
}


def has_colours(stream: Any) -> bool:
    """Whether colours may be shown: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _value(name: str, shown: str, value: str) -> float | int | str:
    """What is meant by the text behind /set NAME."""
    if name == "samplers":
        return value
    if name == "ignore_eos" and value in ("0", "1"):
        return value == "1"
    try:
        return int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise UsageError(f"/set {shown} {quote(value)}: needs a number.") from None
