"""Which numbers describe a LLaMA 2 model, and how a model directory says them.

Letters of the axes: D = dim, L = n_layers, H = n_heads, G = n_kv_heads, E = head_dim, F = hidden_dim, V = vocab_size.
Every function here raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from npllama.errors import UsageError, quote
from npllama.rope import RopeScaling
from npllama.system.values import number, show, whole
from npllama.version import SINCE, unknown_key

MAX_SIZES = {
    "dim": 1 << 16,
    "n_layers": 512,
    "n_heads": 1 << 10,
    "n_kv_heads": 1 << 10,
    "head_dim": 1 << 10,
    "hidden_dim": 1 << 19,
    "vocab_size": 1 << 20,
    "max_seq_len": 1 << 24,
}
"""Several times the largest model published; a number beyond these is damage, and would ask for memory without end."""

MAX_EOS_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one model; complete and consistent when it exists.

    Units: tokens for max_seq_len and sliding_window, elements for the others; norm_eps stands inside the root;
    rope_theta is RoPE's base. sliding_window: how many positions, its own included, a query sees (None: all).
    bos_token_id: None where a text has no begin. add_bos_token, add_eos_token: whether a text gets BOS in front and EOS
    behind it.
    Raises UsageError. Source: Touvron et al. 2023, arXiv:2307.09288, and Meta's ModelArgs.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    add_bos_token: bool = True
    add_eos_token: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name, largest in MAX_SIZES.items():
            whole(name, getattr(self, name), 1, largest)
        object.__setattr__(self, "norm_eps", number("norm_eps", self.norm_eps, above=0.0, largest=1e-2))
        object.__setattr__(self, "rope_theta", number("rope_theta", self.rope_theta, above=1.0, largest=1e12))
        if self.n_heads % self.n_kv_heads:
            raise UsageError(
                f"n_heads is {self.n_heads} and n_kv_heads {self.n_kv_heads}, but every key/value head must serve the "
                "same number of query heads; the config is damaged or of another architecture"
            )
        if self.head_dim % 2:
            raise UsageError(
                f"head_dim is {self.head_dim}, but rotary positions turn pairs and need an even number; "
                "the config is damaged or of another architecture"
            )
        if not isinstance(self.eos_token_ids, tuple) or len(self.eos_token_ids) > MAX_EOS_TOKENS:
            raise UsageError(
                f"eos_token_ids is {show(self.eos_token_ids)}, but a tuple of at most {MAX_EOS_TOKENS} ids is needed"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check_head(self.head_dim)
        if self.sliding_window is not None:
            whole("sliding_window", self.sliding_window, 1, MAX_SIZES["max_seq_len"])
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        for name, token in [*(("bos_token_id", t) for t in bos), *(("eos_token_ids", t) for t in self.eos_token_ids)]:
            whole(name, token, 0, self.vocab_size - 1)
        for name in ("add_bos_token", "add_eos_token"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} is {show(getattr(self, name))}, but true or false is needed")

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without later ones that have their default; `from_json` reads it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        found = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
        found["eos_token_ids"] = list(self.eos_token_ids)
        if self.rope_scaling is not None:
            found["rope_scaling"] = self.rope_scaling.to_json()
        return found

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> ModelConfig:
        """The config that `to_json` wrote, by this version or an older one: an absent key has its field's default.

        Raises UsageError for an unknown key, a missing one without a default, or a value out of range.
        """
        fields = dataclasses.fields(cls)
        if unknown := sorted(values.keys() - {field.name for field in fields}):
            raise UsageError(f"key {quote(unknown[0])} is not known in the config: {unknown_key(unknown[0])}")
        if missing := sorted({f.name for f in fields if f.default is dataclasses.MISSING} - values.keys()):
            raise UsageError(f"key {quote(missing[0])} is missing from the config; export the model again")
        ids = values.get("eos_token_ids", list(cls.eos_token_ids))
        if not isinstance(ids, list):
            raise UsageError(f"eos_token_ids is {show(ids)}, but a list of token ids is needed; export the model again")
        checked: dict[str, Any] = {**values, "eos_token_ids": tuple(ids)}
        if values.get("rope_scaling") is not None:
            checked["rope_scaling"] = RopeScaling.from_json(values["rope_scaling"])
        return cls(**checked)


LATER = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name in SINCE}
"""Fields that came after format version 1, and what their absence means."""
