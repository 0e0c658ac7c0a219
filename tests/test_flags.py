"""What is accepted is honoured or refused: every argument of the command line, with values that are none of its own,
and with one that must change something. An argument without a line here fails."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from helpers import TINY, write_model_directory, write_safetensors_checkpoint

import npllama.inference
from npllama.commands import cli
from npllama.options import OPTIONS

Arguments = tuple[object, ...]
CHAT = b"the cat\n"


class Flag(NamedTuple):
    """Arguments that are refused, and some that change something: output, remarks, files, the code, or what is loaded.

    base: given both times, behind what the command always gets; instead: in the place of that. Behind "!" stands all
    that is given. first: it is run once before, without what changes something. {tmp}, {model},
    {checkpoint} and {other} stand for paths.
    """

    wrong: tuple[Arguments, ...]
    value: Arguments
    changes: str = "out"
    base: Arguments = ()
    instead: Arguments | None = None
    environment: Mapping[str, str] = MappingProxyType({})
    stdin: bytes = b""
    first: bool = False


class Outcome(NamedTuple):
    """How a command ended, what it wrote, and what it loaded."""

    code: int
    out: bytes
    err: str
    files: dict[str, str]
    made: dict[str, object]


@dataclasses.dataclass
class Place:
    """Models, and a folder of the test's own."""

    paths: dict[str, Path]
    call: Callable[..., Any]
    monkeypatch: pytest.MonkeyPatch

    def filled(self, arguments: Arguments) -> list[str]:
        return [str(one).format(**self.paths) if "{" in str(one) else str(one) for one in arguments]

    def run(self, arguments: Arguments, stdin: bytes) -> Outcome:
        made: dict[str, object] = {}
        load = npllama.inference.load

        def noted(*given: Any, **options: Any) -> Any:
            llm = load(*given, **options)
            made.update(
                backend=llm.backend, threads=llm.engine.threads, kv_dtype=llm.engine.kv_dtype, context=llm.context,
                kv_memory=llm.runtime._kv_memory, parallel=llm.runtime.parallel, chat_format=llm.chat_format,
                dtype=llm.manifest["tensors"]["wq"]["format"], weights=llm.manifest["tensors"]["wq"],
            )  # fmt: skip
            return llm

        with self.monkeypatch.context() as patch:
            patch.setattr(npllama.inference, "load", noted)
            done = self.call(*self.filled(arguments), stdin=stdin)
        own = self.paths["tmp"]
        found = {str(p.relative_to(own)): p for p in sorted(own.rglob("*")) if p.is_file()}
        files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}
        return Outcome(done.code, done.out, re.sub(r"[\d,.]+/s", "/s", done.err), files, made)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flags")
    write_model_directory(folder / "model", dataclasses.replace(TINY, max_seq_len=96), n_pieces=290)
    write_model_directory(folder / "other", dataclasses.replace(TINY, max_seq_len=96), seed=1)
    write_safetensors_checkpoint(folder / "checkpoint")
    (folder / "text").write_text("a dog\nthe cat")
    (folder / "lines").write_text(
        # The first takes long enough to end after the second, whatever else the machine does.
        '{"prompt": "a", "max_tokens": 600, "temperature": 0, "context_policy": "slide", "logit_bias": {"2": -99}}\n'
        '{"prompt": "b", "max_tokens": 1}\n'
    )
    (folder / "wrong lines").write_text('{"prompt": "a", "n": 3}\n')
    (folder / "dialog").write_text('[{"role": "user", "content": "a dog"}]')
    (folder / "bytes").write_bytes(b"caf\xe9")
    (folder / "schema").write_text('{"type": "boolean"}')
    (folder / "lark").write_text('start: "x" | "y"\n')
    (folder / "suggests").mkdir()
    write_model_directory(folder / "suggests" / "model", dataclasses.replace(TINY, max_seq_len=96), n_pieces=290)
    manifest = json.loads((folder / "suggests" / "model" / "npllama.json").read_text())
    manifest["version"] = 2
    manifest["sampling"] = {"temperature": 0.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    (folder / "suggests" / "model" / "npllama.json").write_text(json.dumps(manifest))
    names = ("model", "other", "checkpoint", "text", "lines", "dialog", "bytes", "schema", "lark")
    return {name: folder / name for name in names} | {
        "suggests": folder / "suggests" / "model", "n_lines": folder / "wrong lines",
    }  # fmt: skip


@pytest.fixture
def place(sources: dict[str, Path], tmp_path: Path, models: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> Place:
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setenv("NPLLAMA_HISTORY", "")
    monkeypatch.setenv("NPLLAMA_BACKEND", "numpy")
    return Place({**sources, "tmp": own}, call, monkeypatch)


# ---------------------------------------------------------------- the tables

ONE_TO_NINE = tuple(x for i in range(52, 61) for x in ("-l", f"{i}+20"))
ONE_TWO_THREE = tuple(x for i in range(52, 55) for x in ("-l", f"{i}+20"))
PADDING = tuple(x for i in range(290, 300) for x in ("-l", f"{i}+60"))
DRAWN: Arguments = ("--temp", 1.5, "--top-k", 0, "--top-p", 1, "--min-p", 0, "-s", 4)
"""Options with which texts differ."""
WHOLE = ("x", "1.5", "", "1e3", "99999999999999999999999")
NUMBER = ("x", "", "nan", "inf", "1,5")


def wrong(flag: str, *values: object) -> tuple[Arguments, ...]:
    return tuple((flag, value) for value in values)


def switch(flag: str) -> tuple[Arguments, ...]:
    """A flag that takes no value."""
    return ((f"{flag}=1",), (f"{flag}=",))


DRY: Arguments = (*ONE_TWO_THREE, "--dry-multiplier", 3, "--dry-allowed-length", 1)
ENDS: Arguments = ("-l", "2+20")
MIROSTAT: Arguments = ("--mirostat", 2, "--mirostat-ent", 2)
SAMPLING: dict[str, Flag] = {
    "temperature": Flag(wrong("--temp", *NUMBER, -1), ("--temp", 0)),
    "top_k": Flag(wrong("--top-k", *WHOLE), ("--top-k", 1)),
    "top_p": Flag(wrong("--top-p", *NUMBER, 1.1, -1), ("--top-p", 0.01)),
    "min_p": Flag(wrong("--min-p", *NUMBER, 1.1, -1), ("--min-p", 0.99)),
    "repeat_penalty": Flag(wrong("--repeat-penalty", *NUMBER, 0, -1), ("--repeat-penalty", 3)),
    "repeat_last_n": Flag(
        wrong("--repeat-last-n", *WHOLE, -2), ("--repeat-last-n", 1), base=(*ONE_TO_NINE, "--presence-penalty", 3)
    ),
    "presence_penalty": Flag(wrong("--presence-penalty", *NUMBER), ("--presence-penalty", 3), base=ONE_TO_NINE),
    "frequency_penalty": Flag(wrong("--frequency-penalty", *NUMBER), ("--frequency-penalty", 3), base=ONE_TO_NINE),
    "typical_p": Flag(wrong("--typical", *NUMBER, 1.1, -1), ("--typical", 0.1)),
    "top_n_sigma": Flag(wrong("--top-nsigma", *NUMBER), ("--top-nsigma", 0.3)),
    "xtc_probability": Flag(wrong("--xtc-probability", *NUMBER, 1.1, -1), ("--xtc-probability", 1), base=ONE_TO_NINE),
    "xtc_threshold": Flag(
        wrong("--xtc-threshold", *NUMBER, 1.1, -1),
        ("--xtc-threshold", 0.4),
        base=(*ONE_TO_NINE, "--xtc-probability", 1),
    ),
    "dry_multiplier": Flag(
        wrong("--dry-multiplier", *NUMBER, -1),
        ("--dry-multiplier", 2),
        base=(*ONE_TWO_THREE, "--dry-allowed-length", 1),
    ),
    "dry_base": Flag(
        wrong("--dry-base", *NUMBER, 0.5), ("--dry-base", 100), base=(*DRY, "--dry-multiplier", 0.5, "-n", 24)
    ),
    "dry_allowed_length": Flag(wrong("--dry-allowed-length", *WHOLE, 0), ("--dry-allowed-length", 3), base=DRY),
    "dry_penalty_last_n": Flag(wrong("--dry-penalty-last-n", *WHOLE, -2), ("--dry-penalty-last-n", 2), base=DRY),
    "dry_sequence_breakers": Flag(wrong("--dry-sequence-breaker", ""), ("--dry-sequence-breaker", "1"), base=DRY),
    "mirostat": Flag(wrong("--mirostat", *WHOLE, 1, 3), ("--mirostat", 2), base=("--mirostat-ent", 1)),
    "mirostat_tau": Flag(wrong("--mirostat-ent", *NUMBER, -1), ("--mirostat-ent", 0.2), base=MIROSTAT),
    "mirostat_eta": Flag(wrong("--mirostat-lr", *NUMBER, 1.1, -1), ("--mirostat-lr", 1), base=MIROSTAT),
    "min_tokens": Flag(wrong("--min-tokens", *WHOLE, -1, 5000), ("--min-tokens", 5), base=ENDS),
    "ignore_eos": Flag(switch("--ignore-eos"), ("--ignore-eos",), base=ENDS),
    "logit_bias": Flag(wrong("-l", "x+1", "5", "5+nan", "-1+1", "5+1e", "300+1", ""), ("-l", "60+40")),
    "bad_words": Flag(wrong("--bad-word", ""), ("--bad-word", "1"), base=ONE_TO_NINE),
    "samplers": Flag(
        wrong("--samplers", "heat", "top_k;top_k", "", "top_k,top_p"), ("--samplers", "top_k"), base=("--top-p", 0.01)
    ),
    "sampling": Flag(
        (*wrong("--sampling", "best", ""), ("!", "a", "-m", "{model}", "--sampling", "model")),
        ("--sampling", "model"),
        instead=("-m", "{suggests}", "-n", 12, "-s", 4),
    ),
    "seed": Flag(wrong("-s", "x", "1.5", "", -2, 2**64), ("-s", 5)),
}
CONTEXT = {"ctx_size": Flag(wrong("-c", "x", "1.5", "", 0, -1), ("-c", 32), "made")}
EXECUTION: dict[str, Flag] = {
    "kv_dtype": Flag(wrong("--kv-dtype", "f64", "", 8), ("--kv-dtype", "q8"), "made"),
    "kv_memory": Flag(wrong("--kv-memory", "x", "", "-1", "10", "1X"), ("--kv-memory", "4M"), "made"),
    "parallel": Flag(wrong("--parallel", *WHOLE, 0, -1, 5000), ("--parallel", 3), "made"),
    "threads": Flag(wrong("-t", *WHOLE, 0, -1, 5000), ("-t", 3), "made", base=("-t", 1)),
    "backend": Flag(
        wrong("--backend", "gpu", ""),
        ("--backend", "numpy"),
        "code",
        environment={"NPLLAMA_BACKEND": "what auto means"},
    ),
}
MODEL = {"model": Flag(wrong("-m", "", "/nonexistent"), ("-m", "{other}"))}
DTYPE = {
    "dtype": Flag(
        (*wrong("--dtype", "f99", ""), ("-m", "{model}", "--dtype", "q8")), ("--dtype", "q8"), "made",
        base=("-m", "{checkpoint}"),
    )
}  # fmt: skip
FORMS: dict[str, Flag] = {
    "choice": Flag((("--choice", "a", "--regex", "b"),), ("--choice", "cat", "--choice", "dog")),
    "regex": Flag(wrong("--regex", "", "(a", "(?=a)"), ("--regex", "[a-c]{{3}}")),
    "json_schema": Flag(
        wrong("-j", "", "7", "[1", '{{"not": {{}}}}', '{{"type": "strig"}}'), ("-j", '{{"type": "boolean"}}')
    ),
    "json_schema_file": Flag(
        (*wrong("-jf", "/nonexistent", "{text}", "{bytes}"), ("-jf", "{schema}", "-j", "{{}}")), ("-jf", "{schema}")
    ),
    "grammar": Flag(wrong("--grammar", "", "start: missing"), ("--grammar", 'start: "x" | "y"')),
    "grammar_file": Flag(wrong("--grammar-file", "/nonexistent", "{text}", "{bytes}"), ("--grammar-file", "{lark}")),
}
GENERATE: dict[str, Flag] = {
    **MODEL, **SAMPLING, **CONTEXT, **EXECUTION, **DTYPE, **FORMS,
    "logprobs": Flag(
        (*wrong("--logprobs", *WHOLE, -1, 1001), ("!", "a", "-m", "{model}", "--logprobs", 1)), ("--logprobs", 2),
        base=("--json",),
    ),
    "post_sampling_probs": Flag(
        (*switch("--post-sampling-probs"), ("!", "a", "-m", "{model}", "--json", "--post-sampling-probs")),
        ("--post-sampling-probs",), base=("--json", "--logprobs", 1),
    ),
    "prompt_argument": Flag((("a", "-p", "b"),), ("a dog",), instead=("-m", "{model}", "-n", 9, *DRAWN)),
    "prompt": Flag((("-p", "a", "-p", "b"),), ("-p", "a dog"), instead=("-m", "{model}", "-n", 9, *DRAWN)),
    "file": Flag(
        wrong("-f", "/nonexistent", "", "{bytes}"), ("-f", "{text}"), instead=("-m", "{model}", "-n", 9, *DRAWN)
    ),
    "max_tokens": Flag(wrong("-n", *WHOLE, -2), ("-n", 3)),
    "stop": Flag(wrong("--stop", ""), ("--stop", "7"), base=ONE_TO_NINE),
    "escape": Flag(switch("--escape"), ("-e",), base=("--echo", "-n", 0), instead=("-m", "{model}", "-p", "a\\nb")),
    "bos": Flag(switch("--bos"), ("--no-bos",), "err"),
    "eos": Flag(switch("--eos"), ("--eos",), "err"),
    "padding_ids": Flag(switch("--padding-ids"), ("--padding-ids",), base=("--json", *PADDING)),
    "session": Flag(wrong("--session", "", "{text}"), ("--session", "{tmp}/kept"), "files"),
    "session_ro": Flag(
        (*switch("--session-ro"), ("--session-ro",), ("--session", "{tmp}/none", "--session-ro")),
        ("--session-ro",), "not files", base=("--session", "{tmp}/kept"),
    ),
    "context_policy": Flag(
        wrong("--context-policy", "ring", ""), ("--context-policy", "slide"), base=("-n", 120, "--ignore-eos")
    ),
    "keep": Flag(
        (*wrong("--keep", *WHOLE, -1, 90), ("--context-policy", "stop", "--keep", 4)), ("--keep", 40),
        base=("-n", 140, "--ignore-eos", "--context-policy", "slide"),
    ),
    "echo": Flag(switch("--echo"), ("--echo",)),
    "json": Flag(switch("--json"), ("--json",)),
    "jsonl": Flag(
        (*switch("--jsonl"), ("--jsonl", "-p", "x"), ("--jsonl", "--json"), ("--jsonl", "-f", "{n_lines}")),
        ("--jsonl",), instead=("-m", "{model}", "-f", "{lines}", "-s", 1),
    ),
    "unordered": Flag(
        (*switch("--unordered"),), ("--unordered",), instead=("-m", "{model}", "-f", "{lines}", "--jsonl", "-s", 1)
    ),
}  # fmt: skip
TALKS: Arguments = ("-m", "{model}", "--chat-format", "zephyr")
CHATS: dict[str, Flag] = {
    **MODEL, **SAMPLING, **CONTEXT, **EXECUTION, **DTYPE, **FORMS,
    "sampling": SAMPLING["sampling"]._replace(
        wrong=(*wrong("--sampling", "best"), ("!", *TALKS, "--sampling", "model")),
        instead=("-m", "{suggests}", "--chat-format", "zephyr", "-n", 9, "-s", 4),
    ),
    "model_argument": Flag(
        (("{model}", "-m", "{other}"), ("/nonexistent",)), ("{other}",), instead=("--chat-format", "zephyr", "-n", 9)
    ),
    "system": Flag(wrong("--system", b"\xff".decode("utf-8", "surrogateescape"), "<|user|>"), ("--system", "a dog")),
    "chat_format": Flag(wrong("--chat-format", "gpt", "", "chatml"), ("--chat-format", "llama2")),
    "escape_marks": Flag(switch("--escape-marks"), ("--escape-marks",), stdin=b"a <|user|> b\n"),
    "padding_ids": Flag(switch("--padding-ids"), ("--padding-ids",), base=PADDING),
    "max_tokens": Flag(wrong("-n", *WHOLE, -2), ("-n", 3)),
    "stop": Flag(wrong("--stop", ""), ("--stop", "7"), base=ONE_TO_NINE),
    "show_tokens": Flag(switch("--show-tokens"), ("--show-tokens",), "err"),
    "load": Flag(wrong("--load", "", "/nonexistent", "{lines}"), ("--load", "{dialog}")),
}  # fmt: skip
SCORES: dict[str, Flag] = {
    **MODEL, **CONTEXT, **EXECUTION,
    "continuations": Flag((("",),), (" it",)),
    "prompt": Flag(wrong("-p", b"\xff".decode("utf-8", "surrogateescape")), ("-p", "a dog")),
    "normalize": Flag(wrong("--normalize", "words", ""), ("--normalize", "tokens"), base=("--json",)),
    "tokens": Flag(switch("--tokens"), ("--tokens",)),
    "json": Flag(switch("--json"), ("--json",)),
}  # fmt: skip
EMBEDS: dict[str, Flag] = {
    **MODEL, **CONTEXT, **EXECUTION,
    "texts": Flag(((b"\xff".decode("utf-8", "surrogateescape"),), ("a " * 200,)), ("a dog",)),
    "file": Flag(wrong("-f", "/nonexistent", "", "{bytes}"), ("-f", "{text}")),
    "pooling": Flag(wrong("--pooling", "max", ""), ("--pooling", "last")),
    "no_normalize": Flag(switch("--no-normalize"), ("--no-normalize",)),
    "output": Flag(wrong("-o", "", "/nonexistent/a.npy"), ("-o", "{tmp}/a.npy"), "files"),
}  # fmt: skip
TOKENIZES: dict[str, Flag] = {
    "model": Flag(wrong("-m", "", "/nonexistent"), ("-m", "{other}"), instead=("-p", "I", "-m", "{model}")),
    "prompt_argument": Flag((("a", "-p", "b"),), ("a dog",), instead=("-m", "{model}")),
    "prompt": Flag((("-p", "a", "-p", "b"),), ("-p", "a dog"), instead=("-m", "{model}")),
    "file": Flag(wrong("-f", "/nonexistent", "", "{bytes}"), ("-f", "{text}"), instead=("-m", "{model}")),
    "escape": Flag(switch("--escape"), ("-e",), instead=("-m", "{model}", "-p", "a\\nb")),
    "bos": Flag((*switch("--bos"), ("--chat", "--bos")), ("--no-bos",)),
    "eos": Flag((*switch("--eos"), ("--chat", "--eos")), ("--eos",)),
    "chat": Flag((*switch("--chat"), ("--chat",)), ("--chat", "--chat-format", "zephyr")),
    "system": Flag(
        (("!", "a", "--system", "x"), ("--system", "<|user|>")), ("--system", "x"),
        base=("--chat", "--chat-format", "zephyr"),
    ),
    "messages": Flag(
        (*wrong("--messages", "", "/nonexistent", "{lines}", "{text}"), ("--messages", "{dialog}", "-p", "x")),
        ("--messages", "{dialog}"), "code", instead=("-m", "{model}", "--chat-format", "zephyr"),
    ),
    "chat_format": Flag(
        (("!", "a", "--chat-format", "zephyr"), ("--chat-format", "gpt"), ("--chat-format", "")),
        ("--chat-format", "llama2"), base=("--chat", "--chat-format", "zephyr"),
    ),
    "escape_marks": Flag(
        (*switch("--escape-marks"), ("!", "a", "--escape-marks")), ("--escape-marks",), "code",
        instead=("-m", "{model}", "-p", "a <|user|> b", "--chat", "--chat-format", "zephyr"),
    ),
    "ids": Flag(switch("--ids"), ("--ids",)),
    "json": Flag(switch("--json"), ("--json",)),
}  # fmt: skip
DETOKENIZES: dict[str, Flag] = {
    "ids": Flag((("x",), ("-5",), ("1.5",), (300,)), (60,)),
    "model": Flag(wrong("-m", "", "/nonexistent"), ("-m", "{other}"), instead=("-m", "{model}", "299")),
    "special": Flag(switch("--special"), ("--special",), base=("1",)),
}
PERPLEXITIES: dict[str, Flag] = {
    **MODEL, **EXECUTION,
    "model_argument": Flag((("{model}", "-m", "{other}"), ("/nonexistent",)), ("{other}",), instead=("-f", "{text}")),
    "file": Flag(wrong("-f", "/nonexistent", "", "{bytes}"), ("-f", "{lines}")),
    "reference": Flag(wrong("--reference", "", "/nonexistent"), ("--reference", "{other}")),
    "ctx_size": Flag(wrong("-c", "x", "1.5", "", 1, -1), ("-c", 8)),
    "json": Flag(switch("--json"), ("--json",)),
}  # fmt: skip
INFOS: dict[str, Flag] = {
    "model_argument": Flag((("{model}", "-m", "{other}"), ("/nonexistent",)), ("{other}",), instead=()),
    "model": Flag(wrong("-m", "", "/nonexistent"), ("-m", "{other}"), instead=()),
    "check": Flag(switch("--check"), ("--check",)),
    "json": Flag(switch("--json"), ("--json",)),
}
EXPORTS: dict[str, Flag] = {
    "checkpoint": Flag(
        (("/nonexistent", "{tmp}/x"), ("{text}", "{tmp}/x")), ("{checkpoint}", "{tmp}/x"), "files", instead=()
    ),
    "out": Flag((("{checkpoint}", ""),), ("{checkpoint}", "{tmp}/x"), "files", instead=()),
    "force": Flag(switch("--force"), ("--force",), "code", first=True),
    "dtype": Flag(wrong("--dtype", "f99", ""), ("--dtype", "q8", "--force"), "files"),
    "tokenizer": Flag(
        wrong("--tokenizer", "", "/nonexistent"), ("--tokenizer", "{other}/tokenizer.model", "--force"), "err"
    ),
}
QUANTIZES: dict[str, Flag] = {
    "model": Flag((("/nonexistent", "{tmp}/x"), ("{text}", "{tmp}/x")), ("{model}", "{tmp}/x"), "files", instead=()),
    "out": Flag((("{model}", ""),), ("{model}", "{tmp}/x"), "files", instead=()),
    "force": Flag(switch("--force"), ("--force",), "code", first=True),
    "dtype": Flag(wrong("--dtype", "f99", "", "f32"), ("--dtype", "q8", "--force"), "files"),
}
COMMANDS: dict[str, tuple[Arguments, dict[str, Flag]]] = {
    "generate": (("-m", "{model}", "-p", "the cat", "-n", 16, *DRAWN), GENERATE),
    "chat": ((*TALKS, "-n", 16, *DRAWN), CHATS),
    "score": (("-m", "{model}", "-p", "the cat", " sat", " ran"), SCORES),
    "embed": (("-m", "{model}", "the cat"), EMBEDS),
    "tokenize": (("-m", "{model}", "-p", "the cat"), TOKENIZES),
    "detokenize": (("-m", "{model}", "60", "61"), DETOKENIZES),
    "perplexity": (("-m", "{model}", "-f", "{text}", "-c", 16), PERPLEXITIES),
    "info": (("{model}",), INFOS),
    "export": (("{checkpoint}", "{tmp}/made"), EXPORTS),
    "quantize": (("{model}", "{tmp}/made"), QUANTIZES),
}
"""What each command always gets, and a line for each of its arguments."""
ELSEWHERE = {
    "models": "test_model_cache.py",
    "bench": "test_bench.py",
    "verify": "test_verify.py",
    "warmup": "test_cli.py",
}
"""Commands whose arguments other files test: they measure, compile, or work on the models of this machine."""


# ---------------------------------------------------------------- the tests


def destinations(command: str) -> set[str]:
    """The arguments of a command, by the names that they have in the code."""
    parser = cli.build_parser()
    commands: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {action.dest for action in commands.choices[command]._actions} - {"help"}


def test_every_argument_has_a_line_and_no_line_is_for_nothing() -> None:
    assert {command.NAME for command in cli.COMMANDS} == COMMANDS.keys() | ELSEWHERE.keys()
    for command, (_, lines) in COMMANDS.items():
        assert set(lines) == destinations(command), f"npllama {command}: an argument needs a line"
    assert {option.name for option in OPTIONS} <= SAMPLING.keys()
    assert all((Path(__file__).parent / file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize("command", sorted(ELSEWHERE))
def test_what_is_no_value_is_refused_by_every_other_command_too(place: Place, command: str) -> None:
    parser = cli.build_parser()
    commands: Any = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for action in commands.choices[command]._actions:
        flag = next((one for one in action.option_strings if one.startswith("--")), None)
        if flag is None or (action.nargs != 0 and action.type is None and action.choices is None):
            continue
        for value in ("no such value", ""):
            done = place.run((command, f"{flag}={value}"), b"")
            assert (done.code, done.out, done.err.count("\n")) == (2, b"", 1), (flag, value, done.err)


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command, (_, lines) in COMMANDS.items() for name in sorted(lines)]
)
def test_an_argument_is_refused_or_changes_something(place: Place, command: str, name: str) -> None:
    always, lines = COMMANDS[command]
    flag = lines[name]
    stdin = flag.stdin or (CHAT if command == "chat" else b"")
    base: Arguments = (command, *(always if flag.instead is None else flag.instead), *flag.base)
    for arguments in flag.wrong:
        refused = place.run((command, *arguments[1:]) if arguments[0] == "!" else (*base, *arguments), stdin)
        if command == "chat" and refused.code == 0:  # what a format does not take is said when something is asked
            assert "npllama: " in refused.err, arguments
            continue
        assert refused.code in (1, 2), arguments
        assert refused.err.startswith("npllama: ") or '"error"' in refused.out.decode(), (arguments, refused.err)
        assert refused.err.count("\n") == 1 or refused.out, (arguments, refused.err)
        assert not refused.files, arguments
    for variable, value in flag.environment.items():
        place.monkeypatch.setenv(variable, value)
    if flag.first:
        assert place.run(base, stdin).code == 0
    before = place.run(base, stdin)
    after = place.run((*base, *flag.value), stdin)
    assert after.code == 0, after.err
    if flag.changes == "not files":
        assert before.files
        assert after.files == before.files
    else:
        assert getattr(before, flag.changes) != getattr(after, flag.changes), after


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "-p", "a", "--jsonl", "--echo"),
        ("generate", "-p", "a", "-f", "{text}"),
        ("generate", "-p", "a", "--keep", 9),
        ("generate", "-p", "a", "--unordered"),
        ("chat", "--load", "{dialog}", "--system", "x"),
        ("tokenize", "--messages", "{dialog}", "-e"),
        ("tokenize", "--messages", "{dialog}", "--chat"),
        ("tokenize", "a", "--ids", "--json"),
        ("tokenize", "a", "--escape-marks"),
        ("info", "--check"),
        ("bench", "--json", "--profile"),
        ("bench", "--dtype", "q8"),
        ("models", "--json", "rm", "x"),
        ("models", "rm", "x", "--all"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(place: Place, arguments: Arguments) -> None:
    done = place.run(arguments, b"")
    assert (done.code, done.out) == (2, b"")
    assert done.err.startswith("npllama: ")
    assert done.err.count("\n") == 1


def test_bos_and_eos_are_put_behind_a_text_that_is_kept(place: Place) -> None:
    kept = ("generate", "-m", "{model}", "--session", "{tmp}/kept", "-n", 0)
    place.run((*kept, "-p", "a"), b"")
    for flag, more in ((), 0), (("--eos",), 1), (("--bos", "--eos"), 2):
        before = place.run((*kept, "-p", "", "--session-ro"), b"").err
        after = place.run((*kept, "-p", "", *flag), b"").err
        n, m = (int(re.search(r"prompt (\d+) tokens", said)[1]) for said in (before, after))
        assert m - n == more
