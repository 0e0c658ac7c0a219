"""Continue a text. The continuation goes to stdout as it comes; the seed and statistics go to stderr."""

from __future__ import annotations

import argparse
import json
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from npllama.commands import batch, forms
from npllama.commands.sessions import add_session, check_session, continuing, rules_of
from npllama.commands.terminal import (
    Choices,
    Notes,
    add_execution,
    execution,
    load_model,
    number_formats,
    put,
    say,
    text,
    whole,
)
from npllama.commands.texts import PROMPTS, add_text, argument_bytes, decoded, prompt_of
from npllama.options import OPTIONS, SamplingOptions

if TYPE_CHECKING:
    from npllama.generation.sessions.session import SessionStream
    from npllama.inference import Llama, Result, Stream

NAME = "generate"
OTHER_TEXTS = {name: name for name in ("--stop", "--bad-word", "--dry-sequence-breaker")}
TEXTS = {**PROMPTS, **OTHER_TEXTS, **forms.TEXTS}
"""Options whose value is text, also where it begins with a dash, and their long names."""
SUMMARY = "continue a text"
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama generate`."""
    add = parser.add_argument
    _add_prompt(parser)
    add(
        "-n", "--max-tokens", metavar="N", type=whole(-1, 2**31), default=256, help="tokens to generate (default 256; "
        "-1: until the context is full; 0: read the prompt only)"
    )  # fmt: skip
    add_sampling(parser)
    add("--stop", metavar="TEXT", type=text, action="append", default=[], help="end before this text; may be repeated")
    forms.add_forms(parser)
    forms.add_logprobs(parser)
    add(
        "-e", "--escape", action="store_true", help="read \\n \\r \\t \\\\ \\' \\\" and \\xHH (a byte) in these texts"
    )  # fmt: skip
    add("--bos", action=argparse.BooleanOptionalAction, help="put BOS before the prompt (default: as the model says)")
    add("--eos", action=argparse.BooleanOptionalAction, help="put EOS behind the prompt (default: as the model says)")
    add("--padding-ids", action="store_true", help="let ids beyond the tokenizer's pieces be drawn, too")
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=whole(1, 2**31),
        help="context in tokens (default: the model's own, at most 4096)",
    )
    add_session(parser)
    add_execution(parser)
    add("--echo", action="store_true", help="print the prompt too")
    add("--json", action="store_true", help="print one JSON object at the end")
    add(
        "--jsonl", action="store_true", help="read JSON objects, one a line, from -f FILE or stdin, and print one for "
        'each: {"prompt": TEXT} or {"ids": [...]}, with options of Llama.stream that differ from those given here'
    )  # fmt: skip
    add("--unordered", action="store_true", help="with --jsonl: print as texts finish, not in the order of the lines")


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    """The prompt, and the model that continues it."""
    add = parser.add_argument
    add(
        "prompt_argument", metavar="PROMPT", nargs="?", help="text to continue; - reads it from stdin, as does no "
        "prompt at all where stdin is not a terminal"
    )  # fmt: skip
    add(
        "-m",
        "--model",
        metavar="MODEL",
        help="a model directory, or a checkpoint, which is exported once (default: the demo model)",
    )
    add(
        "--dtype", metavar="FORMAT", choices=Choices(number_formats), help="number format that a checkpoint is "
        "exported to: %(choices)s (default: its own)"
    )  # fmt: skip
    add_text(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of sampling, and where those that are not given come from."""
    add = parser.add_argument
    for option in OPTIONS:
        how: dict[str, Any] = dict(option.metadata["argument"])
        if isinstance(option.default, bool):
            how["action"] = "store_true"
        elif isinstance(option.default, tuple) and option.name != "samplers":
            how |= {"action": "append", "type": bias if option.name == "logit_bias" else text}
        elif isinstance(option.default, (int, float)):
            how["type"] = whole(-1, 2**31) if how.pop("whole") else float
        add(*option.metadata["flags"], dest=option.name, default=None, **how)
    add(
        "--sampling", choices=("default", "model"), default="default", help="where the options above come from if they "
        "are not given: npllama's defaults, or what the model's makers suggest (see npllama info MODEL)"
    )  # fmt: skip
    add("-s", "--seed", metavar="N", type=whole(-1), default=None, help="seed of the draws (default: random)")


def sampling_of(args: argparse.Namespace, escape: bool = False) -> dict[str, Any]:
    """The options of sampling that were given, None for the others. Raises UsageError for what cannot be."""
    given: dict[str, Any] = {option.name: getattr(args, option.name) for option in OPTIONS}
    for name in ("bad_words", "dry_sequence_breakers"):
        if given[name] is not None:
            given[name] = [decoded(argument_bytes(one), name, escape) for one in given[name]]
    if given["dry_sequence_breakers"] == ["none"]:  # as llama.cpp has it
        given["dry_sequence_breakers"] = []
    SamplingOptions().changed(given)
    return given


def bias(argument: str) -> tuple[int, float]:
    """A type of argument: an id and what is added to its logit, with a sign between them, as in llama.cpp."""
    found = re.fullmatch(r"(\d{1,9})([+-](?:inf|[0-9.]+(?:e[+-]?\d+)?))", argument)
    with suppress(ValueError):
        if found:
            return int(found[1]), float(found[2])
    raise argparse.ArgumentTypeError(f"{argument!r} is no bias; ID+NUMBER or ID-NUMBER is needed, as 15043-1.5")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Load, read the prompt, generate."""
    check_session(args)  # what is wrong with the arguments is said before anything is loaded
    source = batch.source_of(args)
    prompt = prompt_of(args) if source is None else ""
    stops = [decoded(argument_bytes(stop), "--stop", args.escape) for stop in args.stop]
    given = {**sampling_of(args, args.escape), **forms.form_of(args, args.escape), **forms.logprobs_of(args)}
    options: dict[str, Any] = {"seed": args.seed, "stop": stops, "echo": args.echo, "sampling": args.sampling}
    options |= {"bos": args.bos, "eos": args.eos, "padding_ids": args.padding_ids}
    started = time.perf_counter()
    how = {**execution(args), "context": args.ctx_size}
    with load_model(notes, args.model, dtype=args.dtype, **how) as llama:
        load_s = time.perf_counter() - started
        if source is not None:
            defaults = {"max_tokens": args.max_tokens, **given, **options, **rules_of(args)}
            return batch.run(llama, source, defaults, not args.unordered, notes)
        with continuing(llama, prompt, args, {**given, **options}) as stream:
            complete = _follow(stream, notes, shown=not args.json)
        if args.json:
            put(json.dumps(_report(llama, stream.result, complete, args.model, load_s), ensure_ascii=False))
        put("\n")
        forms.say_overruled(stream.result)
        say(_statistics(stream.result))
    return 0 if complete else INTERRUPTED


def _follow(stream: Stream | SessionStream, notes: Notes, shown: bool) -> bool:
    """Print the pieces as they come; False when Ctrl-C ended it."""
    try:
        for piece in stream:
            notes.show()
            if shown:
                put(piece.text)
    except KeyboardInterrupt:
        return False
    notes.show()
    return True


def _rate(n_tokens: int, seconds: float) -> float:
    """Tokens per second."""
    return n_tokens / seconds if seconds > 0 else 0.0


def _statistics(r: Result) -> str:
    u = r.usage
    found = f" ({u.cached_tokens} kept)" if u.cached_tokens else ""
    return (
        f"seed {r.seed} · prompt {u.prompt_tokens} tokens{found}, "
        f"{_rate(u.prompt_tokens - u.cached_tokens, r.prompt_s):,.0f}/s · "
        f"generated {u.completion_tokens} tokens, {_rate(u.completion_tokens, r.generate_s):,.0f}/s"
    )


def _report(llama: Llama, r: Result, complete: bool, model: str | None, load_s: float) -> dict[str, Any]:
    """The object of --json. finish_reason is null where Ctrl-C ended the text."""
    u = r.usage
    return {
        "text": r.text,
        "tokens": r.tokens,
        "finish_reason": r.finish_reason if complete else None,
        "usage": {
            "prompt_tokens": u.prompt_tokens,
            "completion_tokens": u.completion_tokens,
            "total_tokens": u.total_tokens,
        },
        "seed": r.seed,
        "model": "demo" if model is None else model,
        "backend": llama.backend,
        "timings": {
            "load_s": load_s,
            "prompt_s": r.prompt_s,
            "generate_s": r.generate_s,
            "prompt_per_second": _rate(u.prompt_tokens - u.cached_tokens, r.prompt_s),
            "generate_per_second": _rate(u.completion_tokens, r.generate_s),
        },
        **forms.more_of(r),
    }
