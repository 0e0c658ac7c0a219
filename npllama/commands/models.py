"""Show or remove what checkpoints were exported to, so that they could be run."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from npllama.commands.terminal import Notes, put
from npllama.errors import UsageError

if TYPE_CHECKING:
    from npllama.store.model_cache import Listed

NAME = "models"
SUMMARY = "show or remove what checkpoints were exported to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama models` and `npllama models rm`."""
    parser.usage = f"{parser.prog} [--json]\n       {parser.prog} rm NAME [NAME ...] | --all"
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_subparsers(metavar="rm", title="actions", dest="action")
    rm = actions.add_parser(
        "rm", prog=f"{parser.prog} rm", help="remove models, but none that is in use", allow_abbrev=False
    )
    rm.add_argument("names", metavar="NAME", nargs="*", help="a model, by its name in the list")
    rm.add_argument("--all", action="store_true", help="all of them")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """List, or remove."""
    if args.action == "rm":
        return _remove(args)
    from npllama.store.model_cache import largest_bytes, listed, models_directory

    found, limit = listed(), largest_bytes()
    facts: dict[str, Any] = {"folder": str(models_directory()), "limit_bytes": limit}
    facts |= {"size_bytes": sum(one.size_bytes for one in found), "models": [one._asdict() for one in found]}
    put(json.dumps(facts) + "\n" if args.json else _table(found, facts))
    return 0


def _remove(args: argparse.Namespace) -> int:
    from npllama.store.model_cache import remove_models

    if args.json:
        raise UsageError("--json is for the list; rm prints the names of what it has removed.")
    if bool(args.names) == args.all:
        raise UsageError("rm needs names of models ('npllama models' shows them), or --all.")
    for name in remove_models(None if args.all else args.names):
        put(f"removed {name}\n")
    return 0


def _table(found: list[Listed], facts: dict[str, Any]) -> str:
    """A line for each model, and one for all."""
    width = max((len(one.name) for one in found), default=0)
    text = f"{'name':<{width}} {'MB':>10}  {'format':<6}  {'last used':<20}  checkpoint\n" if found else ""
    for one in found:
        use = {True: " (in use)", False: "", None: " (no locks there: use unknown)"}[one.in_use]
        text += f"{one.name:<{width}} {one.size_bytes / 1e6:>10,.1f}  {one.format:<6}  {one.last_used:<20}  "
        text += f"{_shown(one.source)}{use}\n"
    limit = "no limit" if facts["limit_bytes"] is None else f"limit {facts['limit_bytes'] / 1e6:,.1f} MB"
    return text + f"{len(found)} in {facts['folder']}: {facts['size_bytes'] / 1e6:,.1f} MB, {limit}\n"


def _shown(path: str) -> str:
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(f"{home}{os.sep}") else path
