"""What an evaluation harness asks of a model, by lm-eval's rules, without the package itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from npllama.errors import UsageError
from npllama.inference import Llama

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer where a task says nothing, as in lm-eval's own models."""

GENERATION = ("temperature", "top_k", "top_p", "min_p")
"""Names that lm-eval's tasks and npllama share."""

LENGTHS = ("max_gen_toks", "max_new_tokens")
OWN = ("do_sample", "until", *LENGTHS)
"""Keys of a task that are read here, not by `generate`."""


def log_likelihoods(llama: Llama, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(log probability, whether greedy) of each continuation; contexts that are too long lose their beginning."""
    fitting = [_fitting(llama.context, *pair) for pair in pairs]
    return [(score.logprob, score.is_greedy) for score in llama.score_many(fitting)]


def _fitting(context: int, before: list[int], after: list[int]) -> tuple[list[int], list[int]]:
    left = context + 1 - len(after)  # the last id is predicted, and not read
    if left < 1:
        raise UsageError(f"a continuation of {len(after)} tokens does not fit into the context of {context}.")
    return before[-left:], after


def continuations(llama: Llama, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A continuation of each text, up to where its task's generation_kwargs end it; those that are alike in company."""
    results = [""] * len(requests)
    groups: dict[str, list[int]] = {}
    for i, (_, how) in enumerate(requests):
        groups.setdefault(repr(sorted(how.items())), []).append(i)
    for members in groups.values():
        options = generation_options(requests[members[0]][1], llama.context)
        left = llama.context - options["max_tokens"]
        prompts = [llama.tokenizer.encode(requests[i][0], None, False)[-left:] for i in members]
        found: Any = llama.generate(prompts, **options)
        for i, result in zip(members, found, strict=True):
            results[i] = result.text
    return results


def generation_options(how: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The options of `generate` for a task's generation_kwargs. Raises UsageError for one that is not honoured."""
    if unknown := sorted(how.keys() - {*GENERATION, *OWN}):
        raise UsageError(f"generation_kwargs: {unknown[0]} is not supported; {', '.join((*GENERATION, *OWN))} are.")
    until = how.get("until") or []
    length = next((how[name] for name in LENGTHS if how.get(name)), DEFAULT_NEW_TOKENS)
    options = {name: how[name] for name in GENERATION if name in how}
    if not how.get("do_sample", bool(options.get("temperature"))):
        options["temperature"] = 0.0
    stops = [until] if isinstance(until, str) else list(until)
    return {**options, "max_tokens": min(int(length), context - 1), "stop": stops, "seed": 0}
