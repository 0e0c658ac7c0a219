"""The sampling options: the one list of them, for calls, the command line, checkpoints and model directories."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

from npllama.errors import UsageError, quote, whole_number


def _option(
    default: float, off: float, low: float, high: float, kind: str, note: str, flag: str, letter: str, what: str
) -> Any:
    """A field of SamplingOptions: its default, the value that turns it off, its range, and its option in a command."""
    needed, help = f"{kind} ({note})", f"{what} (default {default:g}; {note})"
    return field(
        default=default, metadata={"off": off, "range": (low, high), "needed": needed, "flag": (flag, letter, help)}
    )


def _number(value: object, low: float, high: float) -> float | None:
    """A real number of any type as a float; None for what is none, is out of range, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if low <= number <= high and number < math.inf else None


@dataclass(frozen=True)
class SamplingOptions:
    """How an id is chosen.

    temperature 0 takes the most probable id; top_k <= 0, top_p 1, min_p 0 and repeat_penalty 1 are off.
    Raises UsageError for a value of another type or out of range.
    """

    temperature: float = _option(
        *(0.8, 1.0, 0.0, math.inf, "a finite number of at least 0", "0: the most probable id"),
        *("--temp", "T", "temperature"),
    )
    top_k: int = _option(
        *(40, 0, -math.inf, math.inf, "a whole number", "0 or -1: off"),
        *("--top-k", "K", "most probable tokens"),
    )
    top_p: float = _option(
        *(0.95, 1.0, 0.0, 1.0, "a number from 0 to 1", "1: off"),
        *("--top-p", "P", "share of the probability"),
    )
    min_p: float = _option(
        *(0.05, 0.0, 0.0, 1.0, "a number from 0 to 1", "0: off"),
        *("--min-p", "P", "least share of the best"),
    )
    repeat_penalty: float = _option(
        *(1.0, 1.0, math.ulp(0.0), math.inf, "a finite number above 0", "1: off"),
        *("--repeat-penalty", "R", "over the last 64 tokens"),
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value, about = getattr(self, option.name), option.metadata
            low, high = about["range"]
            number = whole_number(value, low, high) if isinstance(option.default, int) else _number(value, low, high)
            if number is None:
                raise UsageError(f"{option.name}={quote(value)}: needs {about['needed']}.")
            object.__setattr__(self, option.name, number)

    def changed(self, values: Mapping[str, Any]) -> SamplingOptions:
        """The same options but for the values that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def to_json(self) -> dict[str, float]:
        """The options as a JSON object; SamplingOptions(**values) reads it back."""
        return asdict(self)


OPTIONS: tuple[Field[Any], ...] = fields(SamplingOptions)
OFF = SamplingOptions(**{option.name: option.metadata["off"] for option in OPTIONS})
"""Every option off: an id is drawn with the probabilities of the model."""


def chosen_sampling(
    sampling: str | SamplingOptions, suggested: SamplingOptions | None, given: Mapping[str, Any]
) -> SamplingOptions:
    """The options of a call: those given (not None) before those of `sampling`. Raises UsageError."""
    if isinstance(sampling, SamplingOptions):
        return sampling.changed(given)
    if not isinstance(sampling, str) or sampling not in ("default", "model"):
        raise UsageError(f"sampling={quote(sampling)}: needs 'default', 'model' or SamplingOptions.")
    if sampling == "model":
        if suggested is None:
            raise UsageError(
                "sampling='model': this model suggests no sampling (its checkpoint had no generation_config.json that "
                "does); leave it out, or give the options themselves."
            )
        return suggested.changed(given)
    return SamplingOptions().changed(given)
