"""The sampling options: the one list of them, for calls, the command line, checkpoints and model directories.

Names, defaults and the order of the steps are llama.cpp's. What each step does, generation/sampling/chain.py says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any, TypedDict

from npllama.errors import UsageError, is_unicode, quote, whole_number

SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")
"""The steps in their order, by the names that --samplers has."""
BASIC = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")
"""The options that a checkpoint may suggest, and that a model directory keeps."""


_ANY, _SHARE, _WINDOW = (-math.inf, math.inf), (0.0, 1.0), (-1, math.inf)
_OF_WINDOW = "-1: all; 0: off"


def _option(
    default: float, off: float, low: float, high: float, kind: str, note: str, flag: str, letter: str, what: str
) -> Any:
    """A field of SamplingOptions: its default, the value that turns it off, its range, and its option in a command."""
    needed, help = f"{kind} ({note})", f"{what} (default {default:g}; {note})"
    whole = isinstance(default, int)

    def checked(value: object) -> float | None:
        return whole_number(value, low, high) if whole else _number(value, low, high)

    about = {"off": off, "checked": checked, "needed": needed, "flags": (flag,)}
    return field(default=default, metadata={**about, "argument": {"metavar": letter, "whole": whole, "help": help}})


def _listed(default: Any, checked: Callable[[Any], Any], needed: str, flags: tuple[str, ...], **argument: Any) -> Any:
    """A field that is no number: what makes a checked value of one that is given (None: it cannot be), its option."""
    about = {"off": default, "checked": checked, "needed": needed, "flags": flags}
    return field(default=default, metadata={**about, "argument": argument})


def _number(value: object, low: float, high: float) -> float | None:
    """A real number of any type as a float; None for what is none, is out of range, or is not finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if low <= number <= high and math.isfinite(number) else None


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _texts(value: object) -> tuple[str, ...] | None:
    """Texts that are not empty; one alone may stand for a list of it."""
    value = (value,) if isinstance(value, str) else value
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, Mapping) else (None,)
    return found if all(isinstance(text, str) and text and is_unicode(text) for text in found) else None


def _biases(value: object) -> tuple[tuple[int, float], ...] | None:
    """(id, bias) in the order of ids, of a mapping or of such pairs; -inf forbids an id."""
    try:
        pairs = dict(value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    found = [(whole_number(i, 0), _bias(bias)) for i, bias in pairs.items()]
    if any(i is None or bias is None for i, bias in found):
        return None
    return tuple(sorted(found))  # type: ignore[arg-type]


def _bias(value: object) -> float | None:
    return -math.inf if isinstance(value, float) and value == -math.inf else _number(value, *_ANY)


def _order(value: object) -> tuple[str, ...] | None:
    """Names of steps, each at most once; text has ; between them, as on llama.cpp's command line."""
    names = value.split(";") if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name in SAMPLERS for name in names):
        return None
    return tuple(names) if len(set(names)) == len(names) else None


def _mirostat(value: object) -> int | None:
    number = whole_number(value)
    return number if number in (0, 2) else None


@dataclass(frozen=True)
class SamplingOptions:
    """How an id is chosen.

    temperature 0 takes the most probable id; top_k <= 0, top_p 1, min_p 0 and repeat_penalty 1 are off, and of the
    others those that are not given. Raises UsageError for a value of another type or out of range.
    """

    temperature: float = _option(
        *(0.8, 1.0, 0.0, math.inf, "a finite number of at least 0", "0: the most probable id"),
        *("--temp", "T", "temperature"),
    )
    top_k: int = _option(
        *(40, 0, *_ANY, "a whole number", "0 or -1: off"), *("--top-k", "K", "most probable tokens")
    )  # fmt: skip
    top_p: float = _option(
        *(0.95, 1.0, *_SHARE, "a number from 0 to 1", "1: off"), *("--top-p", "P", "share of the probability")
    )  # fmt: skip
    min_p: float = _option(
        *(0.05, 0.0, *_SHARE, "a number from 0 to 1", "0: off"), *("--min-p", "P", "least share of the best")
    )  # fmt: skip
    repeat_penalty: float = _option(
        *(1.0, 1.0, math.ulp(0.0), math.inf, "a finite number above 0", "1: off"),
        *("--repeat-penalty", "R", "over the last --repeat-last-n tokens"),
    )
    repeat_last_n: int = _option(
        *(64, 64, *_WINDOW, "a whole number of at least -1", _OF_WINDOW),
        *("--repeat-last-n", "N", "tokens that the three penalties look at"),
    )
    presence_penalty: float = _option(
        *(0.0, 0.0, *_ANY, "a finite number", "0: off"), *("--presence-penalty", "P", "taken from tokens that occurred")
    )  # fmt: skip
    frequency_penalty: float = _option(
        *(0.0, 0.0, *_ANY, "a finite number", "0: off"),
        *("--frequency-penalty", "P", "taken from a token each time that it occurred"),
    )
    typical_p: float = _option(
        *(1.0, 1.0, *_SHARE, "a number from 0 to 1", "1: off"), *("--typical", "P", "share of the most typical tokens")
    )  # fmt: skip
    top_n_sigma: float = _option(
        *(-1.0, -1.0, *_ANY, "a finite number", "0 or less: off"),
        *("--top-nsigma", "N", "standard deviations below the best"),
    )
    xtc_probability: float = _option(
        *(0.0, 0.0, *_SHARE, "a number from 0 to 1", "0: off"),
        *("--xtc-probability", "P", "how often the best choices are left out, all but the least of them"),
    )
    xtc_threshold: float = _option(
        *(0.1, 0.1, *_SHARE, "a number from 0 to 1", "above 0.5: off"),
        *("--xtc-threshold", "P", "least probability of one of the best choices"),
    )
    dry_multiplier: float = _option(
        *(0.0, 0.0, 0.0, math.inf, "a finite number of at least 0", "0: off"),
        *("--dry-multiplier", "M", "taken from tokens that would continue a repetition"),
    )
    dry_base: float = _option(
        *(1.75, 1.75, 1.0, math.inf, "a finite number of at least 1", "per token of the repetition"),
        *("--dry-base", "B", "factor of what is taken"),
    )
    dry_allowed_length: int = _option(
        *(2, 2, 1, math.inf, "a whole number above 0", "longer ones cost"),
        *("--dry-allowed-length", "N", "tokens that may be repeated for nothing"),
    )
    dry_penalty_last_n: int = _option(
        *(64, 64, *_WINDOW, "a whole number of at least -1", _OF_WINDOW),
        *("--dry-penalty-last-n", "N", "tokens in which repetitions are looked for"),
    )
    dry_sequence_breakers: tuple[str, ...] = _listed(
        *(("\n", ":", '"', "*"), _texts, "texts of at least one character", ("--dry-sequence-breaker",)),
        metavar="TEXT",
        help='no repetition goes beyond this text; may be repeated (default: \\n : " *)',
    )
    mirostat: int = _listed(
        *(0, _mirostat, "0 (off) or 2 (version 2; version 1 is not there)", ("--mirostat",)),
        metavar="V",
        whole=True,
        help="2: hold the surprise at --mirostat-ent; of --samplers only penalties, dry and temperature count then "
        "(default 0: off)",
    )
    mirostat_tau: float = _option(
        *(5.0, 5.0, 0.0, math.inf, "a finite number of at least 0", "in bits"),
        *("--mirostat-ent", "TAU", "surprise that mirostat aims at"),
    )
    mirostat_eta: float = _option(
        *(0.1, 0.1, *_SHARE, "a number from 0 to 1", "0: never"), *("--mirostat-lr", "ETA", "how fast mirostat learns")
    )  # fmt: skip
    min_tokens: int = _option(
        *(0, 0, 0, math.inf, "a whole number of at least 0", "0: off"),
        *("--min-tokens", "N", "tokens before which no text ends by itself"),
    )
    ignore_eos: bool = _listed(
        *(False, _flag, "True or False", ("--ignore-eos",)), help="no text ends by itself"
    )  # fmt: skip
    logit_bias: tuple[tuple[int, float], ...] = _listed(
        *((), _biases, "a bias for each id: {15043: 1.5, 29871: float('-inf')}", ("-l", "--logit-bias")),
        metavar="ID+B",
        help="add a number to a token's logit: 15043+1, 15043-1, 15043-inf; may be repeated",
    )
    bad_words: tuple[str, ...] = _listed(
        *((), _texts, "texts of at least one character", ("--bad-word",)),
        metavar="TEXT",
        help="never write this text; may be repeated",
    )
    samplers: tuple[str, ...] = _listed(
        *(SAMPLERS, _order, f"some of {', '.join(SAMPLERS)}, each at most once", ("--samplers",)),
        metavar="NAMES",
        help=f"the steps and their order (default: {';'.join(SAMPLERS)})",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            found = option.metadata["checked"](value)
            if found is None:
                raise UsageError(f"{option.name}={quote(value)}: needs {option.metadata['needed']}.")
            object.__setattr__(self, option.name, found)

    def changed(self, values: Mapping[str, Any]) -> SamplingOptions:
        """The same options but for the values that are not None."""
        return replace(self, **{name: value for name, value in values.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """The basic options, and those that are not off, as JSON; SamplingOptions(**values) reads it back."""
        on = {option.name for option in OPTIONS if getattr(self, option.name) != option.metadata["off"]}
        return {name: value for name, value in asdict(self).items() if name in on.union(BASIC)}

    @property
    def is_basic(self) -> bool:
        """Whether the basic options alone decide, in their usual order."""
        return self.is_basic_but_for(())

    def is_basic_but_for(self, names: Sequence[str]) -> bool:
        """Whether nothing decides but the basic options, in their usual order, and those named."""
        others = (o for o in OPTIONS if o.name not in BASIC and o.name not in names)
        return all(getattr(self, o.name) == o.metadata["off"] for o in others)


MAX_LOGPROBS = 1000
FORMS = ("choices", "regex", "json_schema", "grammar")
"""Options that say what a text has to be."""


class MoreOptions(TypedDict, total=False):
    """The options beyond the basic ones, as keywords of a call.

    max_new_tokens and repetition_penalty are max_tokens and repeat_penalty by other names. logits_processor, called for
    every token with (ids, logits (V,)), gives other logits, -inf for what must not come. logprobs: how many of the most
    probable tokens to tell beside each that was chosen (Result.logprobs, Piece.logprobs); post_sampling_probs: their
    probabilities after all steps of sampling too.

    What the text has to be, one of these: choices (one of some texts), regex (what a pattern of Rust's regex describes
    from end to end), json_schema (a dict, a dataclass or a model of pydantic), grammar (Lark). All but choices need the
    extra `structured`. Such a text is always whole: where max_tokens, max_time_s or a stop string would cut it, it is
    closed ("closed"). Refused before anything is computed: what cannot be followed to the letter, and where no text
    that fits into max_tokens is found. A stop string is not cut off; no token is taken that would complete one.
    """

    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: Iterable[str] | None
    mirostat: int | None
    mirostat_tau: float | None
    mirostat_eta: float | None
    min_tokens: int | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    bad_words: Iterable[str] | None
    samplers: str | Sequence[str] | None
    logits_processor: Callable[[list[int], Any], Any] | None
    logprobs: int | None
    post_sampling_probs: bool | None
    choices: Iterable[str] | None
    regex: str | None
    json_schema: object
    grammar: str | None
    max_new_tokens: int | None
    repetition_penalty: float | None


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
