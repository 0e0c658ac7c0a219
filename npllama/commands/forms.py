"""What a text has to be: choices, a regular expression, a JSON Schema, a grammar. And what it was chosen from."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from npllama.commands.terminal import say, text, whole
from npllama.commands.texts import argument_bytes, decoded, of_a_file, read_file
from npllama.errors import UsageError
from npllama.options import MAX_LOGPROBS

if TYPE_CHECKING:
    from npllama.generation.sampling.logprobs import TokenLogprobs
    from npllama.inference import Result

TEXTS = {name: name for name in ("--choice", "--regex", "--json-schema", "--grammar")} | {"-j": "--json-schema"}
"""Options whose value is text, also where it begins with a dash, and their long names."""
MAX_SCHEMA_BYTES = 1 << 24


def add_forms(parser: argparse.ArgumentParser) -> None:
    """The options that say what a text has to be."""
    add = parser.add_argument
    add("--choice", metavar="TEXT", type=text, action="append", help="the text is this one; more of them: one of these")
    add("--regex", metavar="PATTERN", type=text, help="the text is what a pattern of Rust's regex describes")
    add("-j", "--json-schema", metavar="SCHEMA", type=text, help="the text is JSON by this schema ({}: any)")
    add("-jf", "--json-schema-file", metavar="FILE", help="the same, from a file")
    add("--grammar", metavar="GRAMMAR", type=text, help="the text is what a Lark grammar describes")
    add("--grammar-file", metavar="FILE", help="the same, from a file")


def add_logprobs(parser: argparse.ArgumentParser) -> None:
    """The options that ask how probable the tokens of a text were."""
    parser.add_argument(
        "--logprobs", metavar="K", type=whole(0, MAX_LOGPROBS), help="with --json or --jsonl: tell how probable each "
        "token was, and the K most probable ones"
    )  # fmt: skip
    parser.add_argument(
        "--post-sampling-probs", action="store_true", help="with --logprobs: after the steps of sampling too"
    )  # fmt: skip


def form_of(args: argparse.Namespace, escape: bool = False) -> dict[str, Any]:
    """The options of a call that the arguments ask for. Raises UsageError for two forms, or a schema that is none."""
    found: dict[str, Any] = {}
    for name in ("json_schema", "grammar"):
        given, file = getattr(args, name), getattr(args, f"{name}_file")
        if given is not None and file is not None:
            raise UsageError(f"--{name.replace('_', '-')} and a file with one were given; leave one out.")
        if given is not None:
            found[name] = decoded(argument_bytes(given), f"--{name.replace('_', '-')}", False)
        elif file is not None:
            found[name] = decoded(of_a_file(read_file(file)), file, False)
    if "json_schema" in found:
        from npllama.system.strict_json import parse_object

        found["json_schema"] = parse_object(found["json_schema"].encode(), MAX_SCHEMA_BYTES)
    if args.choice is not None:
        found["choices"] = [decoded(argument_bytes(one), "--choice", escape) for one in args.choice]
    if args.regex is not None:
        found["regex"] = decoded(argument_bytes(args.regex), "--regex", False)
    if found:
        from npllama.generation.structured.structures import checked_structure  # here, because few calls need it

        checked_structure(found)
    return found


def logprobs_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a call that ask for logprobs. Raises UsageError where nobody would see them."""
    if args.post_sampling_probs and args.logprobs is None:
        raise UsageError("--post-sampling-probs needs --logprobs K, how many tokens are to be told.")
    if args.logprobs is None:
        return {}
    if not (args.json or args.jsonl):
        raise UsageError("--logprobs is for JSON; give --json or --jsonl with it.")
    return {"logprobs": args.logprobs, "post_sampling_probs": args.post_sampling_probs}


def more_of(result: Result) -> dict[str, Any]:
    """What an answer in JSON says beyond the usual, where there is any of it."""
    found: dict[str, Any] = {}
    if result.logprobs is not None:
        found["logprobs"] = [_shown(one) for one in result.logprobs]
    if result.overruled:
        found["overruled"] = list(result.overruled)
    return found


def _shown(one: TokenLogprobs) -> dict[str, Any]:
    """Bytes as numbers, as in OpenAI's answers."""
    shown = {**asdict(one), "bytes": list(one.bytes)}
    for name in ("top", "sampled_top"):
        shown[name] = [{**item._asdict(), "bytes": list(item.bytes)} for item in getattr(one, name)]
    if one.sampled_logprob is None:
        del shown["sampled_logprob"], shown["sampled_top"]
    return shown


def say_overruled(result: Result) -> None:
    """Say which options could not be followed."""
    if result.overruled:
        say(f"overruled by the form of the text: {', '.join(result.overruled)}")
