"""Continue a text. The continuation goes to stdout as it comes; the seed and statistics go to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from npllama.commands.terminal import Notes, add_kv_dtype, put, say, whole
from npllama.errors import NpllamaError, UsageError

if TYPE_CHECKING:
    from npllama.inference import Llama, Result, Stream

NAME = "generate"
SUMMARY = "continue a text"
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama generate`."""
    add = parser.add_argument
    add(
        "prompt_argument", metavar="PROMPT", nargs="?", help="text to continue; - reads it from stdin, as does no "
        "prompt at all where stdin is not a terminal"
    )  # fmt: skip
    add("-m", "--model", metavar="MODEL", help="a model directory (default: the demo model)")
    add("-p", "--prompt", metavar="PROMPT", action="append", default=[], help='the same as PROMPT; may be empty: ""')
    add(
        "-f", "--file", metavar="FILE", action="append", default=[], help="read the prompt from a file in UTF-8 "
        "(without its last line end)"
    )  # fmt: skip
    add(
        "-n", "--max-tokens", metavar="N", type=whole(-1, 2**31), default=256, help="tokens to generate (default 256; "
        "-1: until the context is full; 0: read the prompt only)"
    )  # fmt: skip
    add("--temp", metavar="T", type=float, default=0.8, help="temperature (default 0.8; 0: the most probable token)")
    add("--top-k", metavar="K", type=whole(-1, 2**31), default=40, help="most probable tokens (default 40; 0: off)")
    add("--top-p", metavar="P", type=float, default=0.95, help="share of the probability (default 0.95; 1: off)")
    add("--min-p", metavar="P", type=float, default=0.05, help="least share of the best (default 0.05; 0: off)")
    add("--repeat-penalty", metavar="R", type=float, default=1.0, help="over the last 64 tokens (default 1: off)")
    add("-s", "--seed", metavar="N", type=whole(-1), default=None, help="seed of the draws (default: random)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times")
    add(
        "-c",
        "--ctx-size",
        metavar="N",
        type=whole(1, 2**31),
        help="context in tokens (default: the model's own, at most 4096)",
    )
    add_kv_dtype(parser)
    add("-t", "--threads", metavar="N", type=whole(1, 4096), help="threads (default: see npllama info)")
    add("--backend", choices=("auto", "numpy", "numba"), default="auto", help="NumPy or compiled (default: auto)")
    add("--echo", action="store_true", help="print the prompt too")
    add("--json", action="store_true", help="print one JSON object at the end")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Load, read the prompt, generate."""
    prompt = _prompt(args)  # what is wrong with the arguments is said before anything is loaded
    stops = [_text(_argument_bytes(stop), "--stop") for stop in args.stop]
    from npllama.inference import load
    from npllama.sampling import SamplingOptions

    sampling: dict[str, Any] = {
        "temperature": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
    }
    SamplingOptions(**sampling)
    started = time.perf_counter()
    with load(args.model, args.backend, args.threads, args.ctx_size, args.kv_dtype) as llama:
        load_s = time.perf_counter() - started
        stream = llama.stream(prompt, args.max_tokens, **sampling, seed=args.seed, stop=stops, echo=args.echo)
        complete = _follow(stream, notes, shown=not args.json)
        if args.json:
            put(json.dumps(_report(llama, stream.result, complete, args.model, load_s), ensure_ascii=False))
        put("\n")
        say(_statistics(stream.result))
    return 0 if complete else INTERRUPTED


def _follow(stream: Stream, notes: Notes, shown: bool) -> bool:
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
    return (
        f"seed {r.seed} · prompt {u.prompt_tokens} tokens, {_rate(u.prompt_tokens, r.prompt_s):,.0f}/s · "
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
            "prompt_per_second": _rate(u.prompt_tokens, r.prompt_s),
            "generate_per_second": _rate(u.completion_tokens, r.generate_s),
        },
    }


def _prompt(args: argparse.Namespace) -> str:
    """The one prompt: an argument, a file, or stdin. Raises UsageError for two."""
    texts = [text for text in (args.prompt_argument, *args.prompt) if text is not None]
    if len(texts) + len(args.file) > 1:
        raise UsageError("two prompts were given; one is needed: PROMPT, or -p PROMPT, or -f FILE.")
    if args.file:
        return _read_file(args.file[0])
    if texts and texts[0] != "-":
        return _text(_argument_bytes(texts[0]), "the prompt")
    if not texts and (sys.stdin is None or sys.stdin.isatty()):
        return ""
    if sys.stdin is None:
        raise NpllamaError("stdin: is closed, and the prompt - is read from it; open it, or give the prompt with -p.")
    data = sys.stdin.buffer.read()
    if data is None:  # a pipe in non-blocking mode, to which nothing was written yet
        raise NpllamaError(
            "stdin: does not wait for what is not there yet; open it blocking, or give the prompt with -p."
        )
    return _without_last_line_end(_text(data, "stdin"))


def _argument_bytes(argument: str) -> bytes:
    """The bytes of an argument, which Python hands over as surrogates where the locale is not UTF-8."""
    return argument.encode("utf-8", "surrogateescape")


def _read_file(name: str) -> str:
    try:
        with open(name, "rb") as file:
            data = file.read()
    except OSError as error:
        raise NpllamaError(
            f"{name}: cannot be read ({error.strerror}); -f needs a text file in UTF-8. Check the path, "
            f"or give the text itself with -p."
        ) from error
    return _without_last_line_end(_text(data, name))


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NpllamaError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8, which text must be; "
            f"convert it, for example with iconv."
        ) from error


def _without_last_line_end(text: str) -> str:
    """Editors and echo end a text with a line end that is not meant to be continued."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
