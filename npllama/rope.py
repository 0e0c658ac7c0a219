"""How fast each pair of a head turns: the frequencies of rotary positions, plain or scaled for longer contexts.

    f[i] = theta^(-2 i / E)                   i = 0 .. E/2 - 1, E elements in a head
    angle[t, i] = pos[t] * f'[i]              f' = f, or what a kind of scaling makes of it
    cos, sin = A * cos(angle), A * sin(angle)             A the attention factor, 1 for most kinds

Every kind is a description (RopeScaling) and one function below, which names its paper. Two kinds depend on the length
of the text in the reference (dynamic, longrope), where a key once stored and a later one are then rotated by different
frequencies. Here the context chosen at load takes the place of that length: frequencies never change while a model
runs, and logits do not depend on how a prompt was cut.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from npllama.errors import UsageError, quote
from npllama.system.values import number, show, whole

MAX_FACTOR = 1e6
MAX_FACTORS = 512
MAX_CONTEXT = 1 << 24
LISTS = ("short_factors", "long_factors", "divisors")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """One way to scale rotary positions; which fields a kind reads is said by its function in FORMULAS.

    original_context: tokens that the model was trained on before scaling. attention_factor: None for what the kind's
    formula gives. short_factors, long_factors, divisors: one number for each pair of a head. Raises UsageError.
    """

    kind: str
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in FORMULAS:
            raise UsageError(
                f"rotary positions are scaled by {quote(self.kind)}, which is not known; {', '.join(FORMULAS)} are"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            self._number(name)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                self._number(name)
        if self.kind in ("dynamic", "yarn", "llama3", "longrope") or self.original_context is not None:
            whole("the original context of scaled rotary positions", self.original_context, 1, MAX_CONTEXT)
        if type(self.truncate) is not bool:
            raise UsageError(f"truncate is {show(self.truncate)}, but true or false is needed")
        self._check_order()
        for name in LISTS:
            self._check_list(name)

    def _number(self, name: str) -> None:
        object.__setattr__(self, name, number(name, getattr(self, name), above=0.0, largest=MAX_FACTOR))

    def _check_order(self) -> None:
        if self.factor < 1:
            raise UsageError(f"the factor of scaled rotary positions is {show(self.factor)}, but 1 or more is needed")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise UsageError(
                    f"{low} is {show(getattr(self, low))} and {high} {show(getattr(self, high))}, but {low} must be "
                    "the smaller one; the config is damaged"
                )

    def _check_list(self, name: str) -> None:
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)) or len(values) > MAX_FACTORS:
            raise UsageError(f"{name} is {show(values)}, but a list of at most {MAX_FACTORS} numbers is needed")
        checked = tuple(number(f"an element of {name}", value, above=0.0, largest=MAX_FACTOR) for value in values)
        object.__setattr__(self, name, checked)

    def check_head(self, head_dim: int) -> None:
        """UsageError unless this can scale heads of `head_dim` elements."""
        needed = {"longrope": ("short_factors", "long_factors"), "divisors": ("divisors",)}
        for name in needed.get(self.kind, ()):
            if len(getattr(self, name)) != head_dim // 2:
                raise UsageError(
                    f"{name} of scaled rotary positions has {len(getattr(self, name))} numbers, but heads of "
                    f"{head_dim} elements need {head_dim // 2}; the config is damaged"
                )
        if self.kind == "dynamic" and head_dim < 4:
            raise UsageError(f"head_dim is {head_dim}, but dynamic scaling of rotary positions needs 4 or more")

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as a JSON object; `from_json` reads it back."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = list(value) if field.name in LISTS else value
        return found

    @classmethod
    def from_json(cls, values: object) -> RopeScaling:
        """The description that `to_json` wrote; UsageError for an unknown key or a value out of range."""
        if not isinstance(values, Mapping) or "kind" not in values:
            raise UsageError(f"rope_scaling is {show(values)}, but an object with a kind is needed")
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise UsageError(f"key {quote(unknown[0])} is not known in rope_scaling; export the model again")
        return cls(**values)


def frequencies(scaling: RopeScaling | None, head_dim: int, theta: float, context: int) -> tuple[np.ndarray, float]:
    """Frequencies in radians per position, and the factor of cosine and sine.

        f[i] = theta^(-2 i / E)

    head_dim: E, even. theta > 1. context: positions that will be in use, which dynamic and longrope scaling look at.
    Returns ((E/2,) float64, A). Raises UsageError when the description does not fit the head.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; for the kinds see their functions.
    """
    plain = float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        return plain, 1.0
    scaling.check_head(head_dim)
    scaled, attention_factor = FORMULAS[scaling.kind](scaling, plain, theta, context)
    return scaled, attention_factor if scaling.attention_factor is None else scaling.attention_factor


Formula = Callable[[RopeScaling, np.ndarray, float, int], tuple[np.ndarray, float]]


def linear(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """Position interpolation: positions are divided.

        f'[i] = f[i] / factor

    Source: Chen et al. 2023, arXiv:2306.15595, section 2.3.
    """
    return plain / scaling.factor, 1.0


def _original(scaling: RopeScaling) -> int:
    """The original context: RopeScaling has checked it for every kind that needs it."""
    return cast(int, scaling.original_context)


def dynamic(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """NTK-aware interpolation whose strength follows the length: the base grows.

        L = max(context, original)    theta' = theta * (factor * L / original - (factor - 1))^(E / (E - 2))

    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.1 and 3.3, as in transformers, modeling_rope_utils.py.
    """
    E, original = 2 * len(plain), _original(scaling)
    stretch = max(context, original) / original
    base = theta * (scaling.factor * stretch - (scaling.factor - 1)) ** (E / (E - 2))
    return base ** (-np.arange(0, E, 2) / E), 1.0


def yarn(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """NTK-by-parts: slow pairs are interpolated, fast ones are not, those between are blended.

        pair(r) = E ln(original / (2 pi r)) / (2 ln theta)                the pair that turns r times in the original
        ramp[i] = clip((i - low) / (high - low), 0, 1)         low = pair(beta_fast), high = pair(beta_slow)
        f'[i] = ramp[i] f[i] / factor + (1 - ramp[i]) f[i]

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.2. low and high are widened to whole numbers (truncate), as
    in its code.
    """
    E, original = 2 * len(plain), _original(scaling)
    low, high = (
        E * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, E - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(E // 2) - low) / (high - low), 0, 1)
    return ramp * plain / scaling.factor + (1 - ramp) * plain, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    """A of YaRN: yarn_sharpening of the factor; with mscale and mscale_all_dim the ratio of theirs."""
    if scaling.mscale and scaling.mscale_all_dim:
        above, below = (yarn_sharpening(scaling.factor, m) for m in (scaling.mscale, scaling.mscale_all_dim))
        return above / below
    return yarn_sharpening(scaling.factor)


def yarn_sharpening(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies queries and keys by, the square root of one over its temperature.

        A = 0.1 mscale ln(factor) + 1                1 where factor <= 1

    Source: Peng et al. 2023, arXiv:2309.00071, section 3.4; mscale is DeepSeek-V2's, arXiv:2405.04434.
    """
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def llama3(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: pairs with a long wave are interpolated, those with a short one are not, those between are blended.

        turns[i] = original f[i] / (2 pi)                             how often pair i turns in the original context
        s[i] = clip((turns[i] - low) / (high - low), 0, 1)                    low_freq_factor, high_freq_factor
        f'[i] = (1 - s[i]) f[i] / factor + s[i] f[i]

    Source: Meta's llama-models, models/llama3/model.py, apply_scaling (the models of arXiv:2407.21783).
    """
    turns = _original(scaling) * plain / (2 * math.pi)
    s = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return (1 - s) * plain / scaling.factor + s * plain, 1.0


def longrope(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """A factor of its own for each pair, found by search; one list for the original context, one beyond it.

        f'[i] = f[i] / e[i]                   e = long_factors where context > original, else short_factors
        A = sqrt(1 + ln(factor) / ln(original))            1 where factor <= 1

    Source: Ding et al. 2024, arXiv:2402.13753, section 3; A as in the code of Phi-3 and of transformers.
    """
    original, sharpening = _original(scaling), 1.0
    factors = scaling.long_factors if context > original else scaling.short_factors
    if scaling.factor > 1 and original > 1:
        sharpening = math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return plain / np.array(factors), sharpening


def divisors(scaling: RopeScaling, plain: np.ndarray, theta: float, context: int) -> tuple[np.ndarray, float]:
    """A table that came with the weights (rope_freqs.weight of GGUF files, where llama3 scaling is worked out).

        f'[i] = f[i] / divisors[i]

    Source: llama.cpp, convert_hf_to_gguf.py (class LlamaModel) and ggml_rope_ext.
    """
    return plain / np.array(scaling.divisors), 1.0


FORMULAS: dict[str, Formula] = {
    "linear": linear,
    "dynamic": dynamic,
    "yarn": yarn,
    "llama3": llama3,
    "longrope": longrope,
    "divisors": divisors,
}
"""Kind of scaling -> what it makes of the plain frequencies."""
