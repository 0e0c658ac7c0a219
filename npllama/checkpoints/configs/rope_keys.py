"""How each kind of checkpoint says its scaling of rotary positions: Hugging Face, Meta and GGUF.

Every function raises UsageError, naming the key; a caller who knows the file adds its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npllama.errors import UsageError, quote
from npllama.rope import MAX_CONTEXT, MAX_FACTOR, RopeScaling, yarn_sharpening
from npllama.system.values import get, need, number, show, whole

DEFAULT_THETA = 10000.0

# Hugging Face ---------------------------------------------------------------------------------------------------------

RENAMED = {"su": "longrope"}
IN_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"}
KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "short_factor", "long_factor", "attention_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"},
}
"""rope_type -> the keys that belong to it. What has no effect in transformers either may stand in any (IN_ALL)."""

SAME_NAME = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim")


def from_hugging_face(config: Mapping[str, object], context: int) -> tuple[Any, RopeScaling | None]:
    """RoPE's base and scaling from config.json, in the old spelling or the new one.

        rope_theta, rope_scaling {type, factor, ...}     or     rope_parameters {rope_type, rope_theta, factor, ...}

    `context` is max_position_embeddings, which stands in for an original context that is not said. As in transformers,
    rope_scaling replaces rope_parameters, and rope_type comes before type. Source: its modeling_rope_utils.py.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    said = get(config, key, {})
    if not isinstance(said, dict):
        raise UsageError(f"{key} is {show(said)}, but an object is needed; the config is damaged")
    thetas = [source["rope_theta"] for source in (config, said) if source.get("rope_theta") is not None]
    if any(theta != thetas[0] for theta in thetas):
        raise UsageError(f"rope_theta is said twice, {show(thetas[0])} and {show(thetas[-1])}; keep the right one")
    for source in (config, said):
        if get(source, "partial_rotary_factor", 1.0) != 1.0:
            raise UsageError(f"partial_rotary_factor is {show(source['partial_rotary_factor'])}: not supported")
    return (thetas or [DEFAULT_THETA])[0], _scaling(key, said, config, context)


SCALES_BY_FACTOR = ("default", "linear", "dynamic", "yarn", "llama3")
ONES = ("factor", "attention_factor", "partial_rotary_factor")
AS_FACTOR_WORKS = {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "mscale"}
AS_FACTOR_WORKS |= {"mscale_all_dim", *IN_ALL, *ONES}
"""Keys that only say how a factor other than 1 works."""


def _changes_nothing(said: Mapping[str, object]) -> bool:
    """Whether rotary positions are "scaled" by a factor of 1, whatever else belongs to that."""
    known = all(get(said, name, "default") in SCALES_BY_FACTOR for name in ("rope_type", "type"))
    ones = [get(said, name, 1.0) for name in ONES]
    one = said.get("factor") is not None and all(not isinstance(value, bool) and value == 1 for value in ones)
    return known and one and said.keys() <= AS_FACTOR_WORKS


def _scaling(key: str, said: Mapping[str, object], config: Mapping[str, object], context: int) -> RopeScaling | None:
    if _changes_nothing(said):
        return None
    name = get(said, "rope_type", get(said, "type", "default"))
    kind = RENAMED.get(name, name) if isinstance(name, str) else None
    if kind not in KEYS:
        raise UsageError(
            f"{key} asks for rotary positions of type {show(name)}, which are not supported; "
            f"{', '.join(KEYS)} are: use a checkpoint with one of these"
        )
    unknown = sorted(said.keys() - KEYS[kind] - IN_ALL)
    if unknown:
        raise UsageError(f"{key} sets {quote(unknown[0])}, which is not known for rotary positions of type {kind!r}")
    if kind == "default":
        return None
    original = get(config, "original_max_position_embeddings", said.get("original_max_position_embeddings"))
    if original is None and kind == "llama3":
        need(said, "original_max_position_embeddings")
    if kind == "dynamic" or original is None:
        original = context
    if kind == "linear":
        return _linear(need(said, "factor"))
    fields: dict[str, Any] = {name: said[name] for name in SAME_NAME if said.get(name) is not None}
    fields |= {name: None for name in ("mscale", "mscale_all_dim") if fields.get(name) == 0}  # as if it were not said
    fields["factor"] = need(said, "factor") if kind in ("dynamic", "llama3") else _factor(said, context, original)
    if kind == "llama3":
        need(said, "low_freq_factor")
        need(said, "high_freq_factor")
    if kind == "longrope":
        fields |= {"short_factors": need(said, "short_factor"), "long_factors": need(said, "long_factor")}
    fields |= {"original_context": original, "attention_factor": said.get("attention_factor")}
    return RopeScaling(kind=kind, **fields)


def _factor(said: Mapping[str, object], context: int, original: object) -> Any:
    """The factor of yarn and longrope; where it is not said, how much longer the context is than the original."""
    original = whole("original_max_position_embeddings", original, 1, MAX_CONTEXT)
    return get(said, "factor", max(1.0, context / original))


def _linear(factor: Any) -> RopeScaling | None:
    found = RopeScaling(kind="linear", factor=factor)
    return None if found.factor == 1 else found


# Meta -----------------------------------------------------------------------------------------------------------------

LLAMA_3_ORIGINAL = 8192
LLAMA_3_2 = {(2048, 16), (3072, 28)}
"""Width and layers of Llama 3.2 1B and 3B. Their factor is 32, that of all others 8, and params.json says neither:
see github.com/meta-llama/llama-models/issues/166."""


def from_meta(params: Mapping[str, object]) -> RopeScaling | None:
    """The scaling of a Meta release from its params.json, which says only use_scaled_rope (Llama 3.1 and later)."""
    said = get(params, "use_scaled_rope", False)
    if type(said) is not bool:
        raise UsageError(f"use_scaled_rope is {show(said)}, but true or false is needed; params.json is damaged")
    if not said:
        return None
    factor = 32.0 if (params.get("dim"), params.get("n_layers")) in LLAMA_3_2 else 8.0
    return RopeScaling(kind="llama3", factor=factor, original_context=LLAMA_3_ORIGINAL)


# GGUF -----------------------------------------------------------------------------------------------------------------

NEUTRAL = {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0, "alpha": 0.0}
"""Keys of other architectures, which are accepted where they change nothing."""


def from_gguf(
    said: Mapping[str, object],
    context: int,
    table: tuple[float, ...] | None = None,
    short: tuple[float, ...] | None = None,
    long: tuple[float, ...] | None = None,
) -> RopeScaling | None:
    """The scaling of a GGUF file.

    said: keys below "llama.rope." without that; context: llama.context_length. table: rope_freqs.weight; short and
    long: rope_factors_short.weight and rope_factors_long.weight. Source: llama.cpp, llama-model.cpp and
    llama-graph.cpp, where the attention factor of yarn multiplies the one of its formula.
    """
    kind = get(said, "scaling.type", "linear")
    for name, neutral in NEUTRAL.items():
        if get(said, f"scaling.{name}", neutral) != neutral:
            raise UsageError(f"rope.scaling.{name} is {show(said[f'scaling.{name}'])}: not supported")
    factor = get(said, "scaling.factor", get(said, "scale_linear", 1.0)) or 1.0
    attention = number("rope.scaling.attn_factor", get(said, "scaling.attn_factor", 1.0), 0.0, MAX_FACTOR)
    fields: dict[str, Any] = {"original_context": get(said, "scaling.original_context_length", context)}
    if table is not None:
        if kind not in ("none", "linear") or (kind == "linear" and factor != 1.0):
            raise UsageError(f"rotary positions are scaled twice, by rope_freqs.weight and by type {show(kind)}")
        return RopeScaling(kind="divisors", divisors=table)
    if short is not None and long is not None:
        fields |= {"short_factors": short, "long_factors": long, "attention_factor": attention}
        return RopeScaling(kind="longrope", **fields)
    if kind in ("none", "linear"):
        return None if kind == "none" else _linear(factor)
    if kind == "yarn":
        checked = number("rope.scaling.factor", factor, 0.0, MAX_FACTOR)
        fields |= {"factor": checked, "attention_factor": attention * yarn_sharpening(checked)}
        betas = {name: said.get(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        fields |= {name: value for name, value in betas.items() if value is not None}
        return RopeScaling(kind="yarn", **fields)
    missing = " without rope_factors_long.weight and rope_factors_short.weight" if kind == "longrope" else ""
    raise UsageError(f"rope.scaling.type is {show(kind)}{missing}: not supported; use another file of this model")
