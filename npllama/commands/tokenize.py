"""Show the tokens that a model reads for a text, or for a dialog (--chat): ids, pieces and bytes."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from npllama.commands.terminal import Notes, put, say, text
from npllama.commands.texts import PROMPTS, add_text, argument_bytes, decoded, prompt_of, read_file, read_stdin
from npllama.errors import UsageError

if TYPE_CHECKING:
    from npllama.text.protocol import Tokenizer

NAME = "tokenize"
TEXTS = {**PROMPTS, "--system": "--system"}
"""Options whose value is text, also where it begins with a dash, and their long names."""
SUMMARY = "show the tokens of a text or a dialog"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama tokenize`."""
    add = parser.add_argument
    add("prompt_argument", metavar="PROMPT", nargs="?", help="the text; - reads it from stdin, as does no text at all")
    add("-m", "--model", metavar="MODEL", help="a model directory or a checkpoint (default: the demo model)")
    add_text(parser)
    add("-e", "--escape", action="store_true", help="read \\n \\r \\t \\\\ \\' \\\" and \\xHH (a byte) in the text")
    add("--bos", action=argparse.BooleanOptionalAction, help="put BOS before the text (default: as the model says)")
    add("--eos", action=argparse.BooleanOptionalAction, help="put EOS behind the text (default: as the model says)")
    add("--chat", action="store_true", help="the text is what a user says: show what the model is told")
    add("--system", metavar="TEXT", type=text, help="what the system says first (with --chat)")
    add("--messages", metavar="FILE", help='a dialog instead of a text: [{"role": "user", "content": "Hello"}, ...]')
    add("--chat-format", metavar="NAME", help="how a dialog is told (default: as the checkpoint's chat template does)")
    add("--escape-marks", action="store_true", help="escape what tells who speaks where a text holds it (U+200B)")
    add("--ids", action="store_true", help="print the ids alone, on one line")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Encode, and print a line for each token."""
    from npllama.inference import DEMO
    from npllama.store.direct import open_text_side
    from npllama.text.chat.encoding import chat_prompt

    if args.ids and args.json:
        raise UsageError("--ids and --json do not go together; leave one out.")
    said = _messages(args)
    prompt = prompt_of(args) if said is None else ""
    side = open_text_side(DEMO if args.model is None else args.model)
    tokenizer, facts = side.tokenizer, {}
    if said is None:
        bos, eos = side.bos if args.bos is None else args.bos, side.eos if args.eos is None else args.eos
        ids = tokenizer.encode(prompt, bos=bos, eos=eos)
    else:
        name = side.chat_format if args.chat_format is None else args.chat_format
        found = chat_prompt(_known(name), tokenizer, said, args.escape_marks)
        ids = found.ids
        facts = {"chat_format": name, "stop_ids": sorted(found.stop_ids)}
        facts["escaped"] = [one._asdict() for one in found.escaped]
    notes.show()
    _show(args, tokenizer, ids, facts)
    return 0


def _messages(args: argparse.Namespace) -> Any:
    """The dialog that is asked for; None for a text."""
    from npllama.system import strict_json

    if args.messages is None and not args.chat:
        for name in ("system", "chat_format", "escape_marks"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} is for a dialog; add --chat, or --messages FILE.")
        return None
    if args.bos is not None or args.eos is not None:
        raise UsageError("--bos and --eos are for a text; a dialog has what its chat format says.")
    if args.messages is None:
        user = {"role": "user", "content": prompt_of(args)}
        if args.system is None:
            return [user]
        return [{"role": "system", "content": decoded(argument_bytes(args.system), "--system", args.escape)}, user]
    others = (args.system, args.prompt_argument)
    if args.chat or args.escape or any(one is not None for one in others) or args.prompt or args.file:
        raise UsageError("--messages FILE is the whole dialog; leave --chat, --system, --escape and the text out.")
    try:
        return strict_json.parse(read_stdin() if args.messages == "-" else read_file(args.messages))
    except UsageError as error:
        raise UsageError(f"{args.messages}: {error}.") from error


def _known(name: str | None) -> str:
    if name is None:
        from npllama.text.chat.formats import FORMATS

        raise UsageError(
            f"this model does not say how a dialog is told to it (it may be none that talks); name the chat format "
            f"with --chat-format, one of {', '.join(FORMATS)}."
        )
    return name


def _show(args: argparse.Namespace, tokenizer: Tokenizer, ids: list[int], facts: dict[str, Any]) -> None:
    if args.json:
        tokens = [
            {"id": i, "piece": piece_text(tokenizer, i), "bytes": list(tokenizer.piece(i)), "control": is_control}
            for i, is_control in ((i, i in tokenizer.control_ids) for i in ids)
        ]
        put(json.dumps({"tokens": tokens, **facts}, ensure_ascii=False) + "\n")
    elif args.ids:
        put(" ".join(map(str, ids)) + "\n")
    else:
        width = len(str(max(ids, default=0)))
        for i in ids:
            shown = piece_text(tokenizer, i)
            shown = shown if i in tokenizer.control_ids else json.dumps(shown, ensure_ascii=False)
            put(f"{i:>{width}}  {shown:<20} {tokenizer.piece(i).hex(' ')}".rstrip() + "\n")
    for one in facts.get("escaped", ()):
        say(f"messages[{one['message']}]: {one['mark']} was escaped, {one['times']} times")
    say(f"{len(ids)} token{'' if len(ids) == 1 else 's'}")


def piece_text(tokenizer: Tokenizer, token: int) -> str:
    """What an id adds to a text, bytes of a part of a character as U+FFFD; of a control token its name."""
    if token in tokenizer.control_ids:
        return tokenizer.spelling(token)
    return tokenizer.piece(token).decode("utf-8", "replace")
