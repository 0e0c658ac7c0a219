"""The options of one call, checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from npllama.errors import UsageError, checked_flag, quote, whole_number
from npllama.generation.sampling.basic import SEEDS
from npllama.generation.sampling.sampler import LogitsProcessor
from npllama.generation.streaming import stop_texts
from npllama.options import FORMS, MAX_LOGPROBS, OPTIONS, SamplingOptions, chosen_sampling

if TYPE_CHECKING:
    from npllama.generation.structured.structures import Structure

Prompt = str | Sequence[int]
Progress = Callable[[int, int, float], object]
"""Told (tokens of prompts that were read, of all, seconds); cancels by returning False."""
POLICIES = ("stop", "slide")
"""What happens where the context is full."""
MAX_COMPLETIONS = 1024


@dataclass(frozen=True)
class Request:
    """The validated options of one call."""

    max_tokens: int | None
    sampling: SamplingOptions
    seed: int
    stop: tuple[str, ...]
    echo: bool
    bos: bool | None
    eos: bool | None
    padding_ids: bool
    n: int = 1
    context_policy: str = "stop"
    n_keep: int = 0
    max_time_s: float | None = None
    progress: Progress | None = None
    logits_processor: LogitsProcessor | None = None
    logprobs: int | None = None
    post_sampling_probs: bool = False
    structure: Structure | None = None


def is_one(prompt: object) -> bool:
    """Whether a prompt is one prompt (text, or a list of ids) and not a list of prompts."""
    if isinstance(prompt, str):
        return True
    check_kind(prompt)
    return len(prompt) == 0 or isinstance(prompt[0], bool) or whole_number(prompt[0]) is not None  # type: ignore[arg-type, index]


def check_kind(prompt: object) -> None:
    """Refuse what is neither text nor a sequence: bytes would pass for ids, an iterator would be used up by a look."""
    listed = hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__") and getattr(prompt, "shape", None) != ()
    if not listed or isinstance(prompt, (bytes, bytearray, dict)):
        raise UsageError(f"a prompt is text, a list of token ids, or a list of either; got {type(prompt).__name__}.")


def checked_ids(prompt: Sequence[int], vocab_size: int, bos: bool | None = None, eos: bool | None = None) -> list[int]:
    """A prompt of ids as a list, each in the vocabulary; at least one. Raises UsageError."""
    check_kind(prompt)
    for name, asked in (("bos", bos), ("eos", eos)):
        if asked:
            raise UsageError(f"{name}=True is for a prompt of text; ids are taken as they are: put it among them.")
    ids = []
    for item in prompt:
        number = whole_number(item)
        if number is None:
            raise UsageError(f"a prompt is text or a list of token ids; got {type(item).__name__} in the list.")
        ids.append(number)
    if not ids:
        raise UsageError("the prompt has no token: give at least one id (text gets BOS by itself).")
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise UsageError(f"token ids must be 0 to {vocab_size - 1}; the prompt has {min(ids)} to {max(ids)}.")
    return ids


def either(name: str, value: Any, default: object, alias: str, other: Any) -> Any:
    """The value of a parameter that has another name; UsageError when both are given and differ."""
    if other is None:
        return value
    if value not in (default, other):
        raise UsageError(f"{name}={quote(value)} and {alias}={quote(other)} mean the same; give one of them.")
    return other


def _checked_max_tokens(max_tokens: int | None) -> int | None:
    """How many tokens to generate; None: until the context is full."""
    number = whole_number(-1 if max_tokens is None else max_tokens, -1)
    if number is None:
        raise UsageError(
            f"max_tokens={quote(max_tokens)}: needs 0 or more, or -1 (or None) for until the context is full."
        )
    return None if number == -1 else number


def _checked_seed(seed: int | None) -> int:
    """The seed of a call: one of its own where none is given."""
    number = whole_number(-1 if seed is None else seed, -1, SEEDS - 1)
    if number is None:
        raise UsageError(
            f"seed={quote(seed)}: needs a whole number from 0 to 2^64 - 1, or None (or -1) for a random one."
        )
    return secrets.randbits(32) if number == -1 else number


def _checked_number(name: str, value: int, low: int, high: int, what: str) -> int:
    number = whole_number(value, low, high)
    if number is None:
        raise UsageError(f"{name}={quote(value)}: needs {what}, {low} to {high}.")
    return number


def _checked_policy(policy: str) -> str:
    if policy not in POLICIES:
        raise UsageError(f"context_policy={quote(policy)} is not known; it needs one of {', '.join(POLICIES)}.")
    return policy


def _checked_time(max_time_s: float | None) -> float | None:
    if max_time_s is None:
        return None
    if isinstance(max_time_s, bool) or not isinstance(max_time_s, Real) or not 0 < float(max_time_s) < math.inf:
        raise UsageError(
            f"max_time_s={quote(max_time_s)}: needs seconds, more than 0; or None for as long as it takes."
        )
    return float(max_time_s)


def _checked_progress(progress: Progress | None) -> Progress | None:
    if progress is not None and not callable(progress):
        raise UsageError(f"progress={quote(progress)}: needs a function of (tokens read, in all, seconds), or None.")
    return progress


def _checked_processor(processor: LogitsProcessor | None) -> LogitsProcessor | None:
    if processor is not None and not callable(processor):
        raise UsageError(f"logits_processor={quote(processor)}: needs a function of (ids, logits) that gives logits.")
    return processor


def new_request(
    max_tokens: int | None,
    given: dict[str, Any],
    source: tuple[str | SamplingOptions, SamplingOptions | None],
    seed: int | None,
    stop: str | Sequence[str] | None,
    echo: bool,
    bos: bool | None,
    eos: bool | None,
    padding_ids: bool,
    n: int = 1,
    context_policy: str = "stop",
    n_keep: int = 0,
    max_time_s: float | None = None,
    progress: Progress | None = None,
) -> Request:
    """Check the options of a call; UsageError names what is out of range.

    given: the sampling options by their names, and what else MoreOptions has. source: where those left out (None) come
    from, and what the model suggests.
    """
    more = _checked_more(given)
    aliases = given.pop("max_new_tokens", None), given.pop("repetition_penalty", None)
    if unknown := sorted(given.keys() - {option.name for option in OPTIONS}):
        raise TypeError(f"this call got an unexpected keyword argument {unknown[0]!r}")
    penalty = either("repeat_penalty", given["repeat_penalty"], None, "repetition_penalty", aliases[1])
    sampling = chosen_sampling(*source, {**given, "repeat_penalty": penalty})
    n_tokens = _checked_max_tokens(either("max_tokens", max_tokens, 256, "max_new_tokens", aliases[0]))
    if n_tokens is not None and sampling.min_tokens > n_tokens:
        raise UsageError(f"min_tokens={sampling.min_tokens} is more than max_tokens={n_tokens}; it needs at most that.")
    return Request(
        max_tokens=n_tokens,
        sampling=sampling,
        seed=_checked_seed(seed),
        stop=stop_texts(stop),
        echo=bool(checked_flag("echo", echo)),
        bos=checked_flag("bos", bos, optional=True),
        eos=checked_flag("eos", eos, optional=True),
        padding_ids=bool(checked_flag("padding_ids", padding_ids)),
        n=_checked_number("n", n, 1, MAX_COMPLETIONS, "how many completions"),
        context_policy=_checked_policy(context_policy),
        n_keep=_checked_number("n_keep", n_keep, 0, 2**31, "how many first positions stay in sight"),
        max_time_s=_checked_time(max_time_s),
        progress=_checked_progress(progress),
        **more,
    )


def _checked_more(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that follow from options that are not of sampling, which are taken out of those given."""
    processor = _checked_processor(given.pop("logits_processor", None))
    n_top, sampled = _checked_logprobs(given.pop("logprobs", None), given.pop("post_sampling_probs", None))
    forms = {kind: value for kind in FORMS if (value := given.pop(kind, None)) is not None}
    structure = None
    if forms:
        from npllama.generation.structured.structures import checked_structure  # here, because few calls need it

        structure = checked_structure(forms)
    told = {"logprobs": n_top, "post_sampling_probs": sampled}
    return {"logits_processor": processor, "structure": structure, **told}


def _checked_logprobs(logprobs: int | None, sampled: bool | None) -> tuple[int | None, bool]:
    """How many alternatives are to be told of each id, and whether after sampling too."""
    number = whole_number(0 if logprobs is None else logprobs, 0, MAX_LOGPROBS)
    if number is None:
        raise UsageError(
            f"logprobs={quote(logprobs)}: needs how many alternatives, 0 to {MAX_LOGPROBS}, or None for no logprobs."
        )
    asked = bool(checked_flag("post_sampling_probs", sampled, optional=True))
    if asked and logprobs is None:
        raise UsageError("post_sampling_probs=True: needs logprobs= too, how many alternatives.")
    return None if logprobs is None else number, asked


def session_options(seed: int | None, context_policy: str, n_keep: int) -> tuple[int, str, int]:
    """Check what holds for all calls of a session; UsageError names what is out of range."""
    kept = _checked_number("n_keep", n_keep, 0, 2**31, "how many first positions stay in sight")
    return _checked_seed(seed), _checked_policy(context_policy), kept
