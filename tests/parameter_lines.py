"""For each parameter of a call: what it is not, what is out of its range, and a value that must change something."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from npllama.options import SamplingOptions

PROMPT = "the cat"
N_PIECES = 290
CONTEXT = 64


def digits(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """A text of nine digits and its end, so that much is repeated."""
    logits[3 + 58 :] = -np.inf
    logits[3 : 3 + 49] = logits[:2] = -np.inf
    logits[2] -= 3
    return logits


def letters(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """The same with nine letters."""
    return np.roll(digits(ids, logits), 40)


def three(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """1, 2 and 3 alone, which repeat themselves."""
    logits[:52] = logits[55:] = -np.inf
    return logits


def padding(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """Ids beyond the pieces, if they may come."""
    logits[N_PIECES:] += 50
    return logits


class Line(NamedTuple):
    """What a parameter is not, what is out of its range, and a value that changes something.

    changes: a field of Seen, or what a call gives is another. base: options with which both are called.
    """

    wrong: tuple[Any, ...]
    beyond: tuple[Any, ...]
    value: Any
    changes: str = "tokens"
    base: Mapping[str, Any] = MappingProxyType({})
    names: str = ""
    """What a refusal says, where it is not the name."""


THING = object()
WHOLE = ("7", 1.5, True, [7], b"7", {}, THING, math.nan)
NUMBER = ("0.5", True, [0.5], 1j, {}, THING)
FLAG = (0, 1, "yes", [], 1.0, THING)
CHOICE = (7, None, [], True, {}, THING)
FUNCTION = (7, "x", [], True)
NAN = (math.nan, math.inf, -math.inf)
TEXTS = (7, [7], b"x", [b"x"], {}, [None], True, THING)

DRY = {"dry_multiplier": 1.0, "dry_allowed_length": 1, "logits_processor": three}
XTC = {"xtc_probability": 1.0}
MIROSTAT = {"mirostat": 2, "mirostat_tau": 2.0}
ENDS = {"logit_bias": {2: 9.0}}
SLIDES = {"context_policy": "slide", "max_tokens": 90}
TEXT_LINES: dict[str, Line] = {
    "prompt": Line((7, None, {}, b"x", True, THING, 1.5), ([300], [-1], [], [1.5], [None]), "a dog"),
    "max_tokens": Line(WHOLE, (-2,), 7),
    "temperature": Line(NUMBER, (-0.1, *NAN), 0.0),
    "top_k": Line(WHOLE, (), 1),
    "top_p": Line(NUMBER, (-0.1, 1.1, *NAN), 0.05),
    "min_p": Line(NUMBER, (-0.1, 1.1, *NAN), 0.95),
    "repeat_penalty": Line(NUMBER, (0.0, -1.0, *NAN), 3.0),
    "seed": Line(WHOLE, (-2, 2**64), 6),
    "stop": Line(TEXTS, ("", [""]), "5", "text"),
    "echo": Line((*FLAG, None), (), True, "text"),
    "sampling": Line((7, None, [], {}, True), ("best", "model"), SamplingOptions(0.0), base={"temperature": None}),
    "bos": Line(FLAG, (), False, "prompt_tokens"),
    "eos": Line(FLAG, (), True, "prompt_tokens"),
    "padding_ids": Line((*FLAG, None), (), True, base={"logits_processor": padding}),
    "n": Line((*WHOLE, None), (0, -1, 5000), 3, "n"),
    "context_policy": Line(CHOICE, ("ring", ""), "slide", base={"max_tokens": 90, "ignore_eos": True}),
    "n_keep": Line((*WHOLE, None), (-1, 2**40, CONTEXT), 30, base={**SLIDES, "ignore_eos": True}),
    "max_time_s": Line(NUMBER, (0, -1.0, *NAN), 1e-9, "finish_reason"),
    "progress": Line(FUNCTION, (), lambda read, total, seconds: False, "finish_reason"),
    "logits_processor": Line(FUNCTION, (lambda ids, logits: logits[1:], lambda ids, logits: 1 / 0), letters),
    "max_new_tokens": Line(WHOLE, (-2,), 7, base={"max_tokens": 256}, names="max_tokens"),
    "repetition_penalty": Line(NUMBER, (0.0, *NAN), 3.0, names="repeat_penalty"),
    "repeat_last_n": Line(WHOLE, (-2,), 1, base={"presence_penalty": 3.0}),
    "presence_penalty": Line(NUMBER, NAN, 3.0),
    "frequency_penalty": Line(NUMBER, NAN, 3.0),
    "typical_p": Line(NUMBER, (-0.1, 1.1, *NAN), 0.2),
    "top_n_sigma": Line(NUMBER, NAN, 0.3),
    "xtc_probability": Line(NUMBER, (-0.1, 1.1, *NAN), 1.0),
    "xtc_threshold": Line(NUMBER, (-0.1, 1.1, *NAN), 0.4, base=XTC),
    "dry_multiplier": Line(NUMBER, (-1.0, *NAN), 5.0, base={"dry_allowed_length": 1}),
    "dry_base": Line(NUMBER, (0.5, *NAN), 30.0, base=DRY),
    "dry_allowed_length": Line(WHOLE, (0, -1), 2, base=DRY),
    "dry_penalty_last_n": Line(WHOLE, (-2,), 2, base=DRY),
    "dry_sequence_breakers": Line(TEXTS[:-1], ([""],), "1", base=DRY),
    "mirostat": Line(WHOLE, (1, 3, -1), 2, base={"mirostat_tau": 1.0}),
    "mirostat_tau": Line(NUMBER, (-1.0, *NAN), 0.2, base=MIROSTAT),
    "mirostat_eta": Line(NUMBER, (-0.1, 1.1, *NAN), 1.0, base={**MIROSTAT, "mirostat_tau": 1.0}),
    "min_tokens": Line(WHOLE, (-1, 10_000), 7, base=ENDS),
    "ignore_eos": Line(FLAG, (), True, base=ENDS),
    "logit_bias": Line((7, "x", [1, 2], True, THING), ({-1: 1.0}, {300: 1.0}, {1: math.nan}, {"1": 1}), {2: 9.0}),
    "bad_words": Line(TEXTS[:-1], ([""],), ["1", "23"]),
    "samplers": Line((7, ["top_k", 1], True, THING), ("heat", "top_k;top_k"), "top_k", base={"temperature": 0.0}),
    "logprobs": Line(WHOLE, (-1, 1001), 2, "logprobs"),
    "post_sampling_probs": Line(FLAG, (), True, "logprobs", base={"logprobs": 1}),
    "choices": Line((7, "yes", b"x", {}, [7], [None], True, THING), ([],), ["cat", "dog"]),
    "regex": Line((7, b"x", ["a"], True, {}, THING), ("", "(a", "(?=a)"), "[a-c]{4}"),
    "json_schema": Line((7, "x", [1], True, THING, int), ({"not": {}}, {"type": "strig"}), {"type": "boolean"}),
    "grammar": Line((7, b"x", ["a"], True, {}, THING), ("", "start: missing"), 'start: "x" | "y"'),
}
OWN_LINES = {
    "messages": Line(
        (7, None, "Hello", {}, b"x", True, THING, [7]),
        ([], [{"role": "tool", "content": "x"}], [{"role": "user", "content": 7}], [{"role": "assistant"}]),
        [{"role": "user", "content": "a dog"}],
    ),
    "stream": Line((*FLAG, None), (), True, "stream"),
    "escape": Line((*FLAG, None), (), True, "escaped"),
}
"""Parameters of chat alone."""
BASE = {"max_tokens": 20, "seed": 5, "temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
BASE |= {"logits_processor": digits}
COMMON = {name: line for name, line in TEXT_LINES.items() if name != "prompt"}
