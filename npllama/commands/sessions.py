"""A text that `npllama generate` keeps in a directory from one call to the next: --session; and texts without end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from npllama.commands.terminal import whole
from npllama.errors import NpllamaError, UsageError

if TYPE_CHECKING:
    from npllama.generation.sessions.session import Session, SessionStream
    from npllama.inference import Llama, Stream


def add_session(parser: argparse.ArgumentParser) -> None:
    """Where a text is kept, and what happens where the context is full."""
    add = parser.add_argument
    add(
        "--session", metavar="FILE", help="go on with the text that is kept in FILE, a directory, and keep it there; "
        "a new one where there is none"
    )  # fmt: skip
    add("--session-ro", action="store_true", help="leave FILE as it is")
    add(
        "--context-policy", choices=("stop", "slide"), help="where the context is full, stop (the default), or let the "
        "oldest positions slide out of sight"
    )  # fmt: skip
    add(
        "--keep", metavar="N", type=whole(0, 2**31), help="first positions that stay in sight of a text that slides "
        "(at least 4)"
    )  # fmt: skip


def check_session(args: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together."""
    if args.session_ro and args.session is None:
        raise UsageError("--session-ro needs --session FILE, the text that is to be left as it is.")
    if args.session_ro and not os.path.lexists(args.session):
        raise NpllamaError(f"{args.session}: is missing, and --session-ro makes none; leave out --session-ro.")
    if args.keep is not None and args.session is None and args.context_policy != "slide":
        raise UsageError("--keep is for a text that slides; give --context-policy slide with it.")


def rules_of(args: argparse.Namespace) -> dict[str, Any]:
    """What happens where the context is full, as generate takes it."""
    return {"context_policy": args.context_policy or "stop", "n_keep": args.keep or 0}


@contextmanager
def continuing(
    llama: Llama, prompt: str, args: argparse.Namespace, options: dict[str, Any]
) -> Iterator[Stream | SessionStream]:
    """The continuation of a prompt, or of the text that is kept and then the prompt, which is kept again at the end.

    Also when the reader of the output has gone; not when it fails.
    """
    rules = rules_of(args)
    if args.session is None:
        yield llama.stream(prompt, args.max_tokens, **rules, **options)
        return
    around = {name: options.pop(name) for name in ("bos", "eos")}
    gone = None
    with _session(llama, args, rules) as session:
        if prompt or not session.tokens or True in around.values():
            session.append(prompt, **around)
        stream = session.stream(args.max_tokens, **options)
        try:
            yield stream
        except BrokenPipeError as error:
            gone = error
        stream.close()
        if not args.session_ro:
            session.save(args.session)
    if gone is not None:
        raise gone


def _session(llama: Llama, args: argparse.Namespace, rules: dict[str, Any]) -> Session:
    if not os.path.lexists(args.session):
        return llama.session(args.seed, **rules)
    from npllama.generation.sessions.session import load_session

    session = load_session(args.session, llama)
    for flag, given, own in (
        ("--context-policy", args.context_policy, session.rules.context_policy),
        ("--keep", args.keep, session.rules.n_keep),
    ):
        if given not in (None, own):
            raise UsageError(f"{flag} {given}: the text in {args.session} goes on with {own}; leave it out.")
    return session
