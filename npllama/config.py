"""Which numbers describe a LLaMA 2 model, and how each kind of checkpoint says them.

Letters of the axes: D = dim, L = n_layers, H = n_heads, G = n_kv_heads, E = head_dim, F = hidden_dim, V = vocab_size.
Every function here raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from npllama.errors import UsageError, quote
from npllama.version import unknown_key

LARGEST = {
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

META_CONTEXT = 4096
"""Meta's params.json does not say the context; LLaMA 2 was trained on 4096 tokens (Touvron et al. 2023)."""

MOST_EOS_TOKENS = 256

LATER = {"add_bos_token": True, "add_eos_token": False}
"""Fields that came after format version 1, and what their absence means."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one model; complete and consistent when it exists.

    Units: tokens for max_seq_len, elements for the others; norm_eps stands inside the root; rope_theta is RoPE's base.
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

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            _whole(name, getattr(self, name), 1, largest)
        object.__setattr__(self, "norm_eps", _number("norm_eps", self.norm_eps, above=0.0, largest=1e-2))
        object.__setattr__(self, "rope_theta", _number("rope_theta", self.rope_theta, above=1.0, largest=1e12))
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
        if not isinstance(self.eos_token_ids, tuple) or len(self.eos_token_ids) > MOST_EOS_TOKENS:
            raise UsageError(
                f"eos_token_ids is {_show(self.eos_token_ids)}, but a tuple of at most {MOST_EOS_TOKENS} ids is needed"
            )
        bos = [] if self.bos_token_id is None else [self.bos_token_id]
        for name, token in [*(("bos_token_id", t) for t in bos), *(("eos_token_ids", t) for t in self.eos_token_ids)]:
            _whole(name, token, 0, self.vocab_size - 1)
        for name in LATER:
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} is {_show(getattr(self, name))}, but true or false is needed")

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object, without later ones that have their default; `from_json` reads it back."""
        values = {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids)}
        return {key: value for key, value in values.items() if key not in LATER or LATER[key] is not value}

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
            raise UsageError(
                f"eos_token_ids is {_show(ids)}, but a list of token ids is needed; export the model again"
            )
        return cls(**{**values, "eos_token_ids": tuple(ids)})  # type: ignore[arg-type]  # checked by __post_init__


def feed_forward_width(dim: int, multiple_of: object = 256, multiplier: object = None) -> int:
    """The hidden width that Meta's code derives instead of storing it.

        F = multiple_of * ceil(int(multiplier * int(2 * 4 * D / 3)) / multiple_of)

    Elements. Raises UsageError. Source: FeedForward in Meta's model.py; `multiplier` is ffn_dim_multiplier.
    """
    dim = _whole("dim", dim, 1, LARGEST["dim"])
    step = _whole("multiple_of", multiple_of, 1, LARGEST["hidden_dim"])
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(_number("ffn_dim_multiplier", multiplier, above=0.0, largest=64.0) * width)
    return step * ((width + step - 1) // step)


def from_meta(params: Mapping[str, object], *, vocab_size: int, max_seq_len: int = META_CONTEXT) -> ModelConfig:
    """The config of a Meta release from its params.json.

    `vocab_size` is the number of rows of tok_embeddings; params.json may say -1 or the same. `max_seq_len` holds where
    params.json is silent. Raises UsageError. Source: Meta's ModelArgs, whose defaults are used.
    """
    _refuse_set(params, META_REFUSED)
    said = _get(params, "vocab_size", -1)
    if (type(said) is not int or said != -1) and _whole("vocab_size", said, 1, LARGEST["vocab_size"]) != vocab_size:
        raise UsageError(
            f"vocab_size is {said}, but tok_embeddings has {vocab_size} rows; weights and config do not belong together"
        )
    return _from_model_args({**params, "vocab_size": vocab_size}, max_seq_len)


def from_llama2c(model_args: Mapping[str, object]) -> ModelConfig:
    """The config of a llama2.c training checkpoint from its model_args; UsageError. Source: llama2.c's ModelArgs."""
    _refuse_set(model_args, META_REFUSED)
    return _from_model_args(model_args, 2048)


META_REFUSED = {
    "use_scaled_rope": "scaled rotary positions (Llama 3.1)",
    "rope_scaling": "scaled rotary positions",
    "sliding_window": "a sliding attention window",
    "moe": "a mixture of experts",
    "quantization_args": "quantized weights",
    "lora_args": "a LoRA adapter",
}
META_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len", "max_batch_size", "dropout"),
    *("model_parallel_size", "use_biases"),
    *META_REFUSED,
}


def _from_model_args(args: Mapping[str, object], max_seq_len: int) -> ModelConfig:
    """Meta's and llama2.c's names, with Meta's defaults; None stands for the default."""
    dim = _whole("dim", _need(args, "dim"), 1, LARGEST["dim"])
    n_heads = _whole("n_heads", _need(args, "n_heads"), 1, LARGEST["n_heads"])
    width = _get(args, "hidden_dim", None)
    if width is None:
        width = feed_forward_width(dim, _get(args, "multiple_of", 256), _get(args, "ffn_dim_multiplier", None))
    return ModelConfig(
        dim=dim,
        n_layers=_need(args, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=_get(args, "n_kv_heads", n_heads),
        head_dim=_head_dim(args, dim, n_heads),
        hidden_dim=width,
        vocab_size=_need(args, "vocab_size"),
        norm_eps=_get(args, "norm_eps", 1e-5),
        rope_theta=_get(args, "rope_theta", 10000.0),
        max_seq_len=_get(args, "max_seq_len", max_seq_len),
    )


def from_hugging_face(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """The config of a Hugging Face checkpoint from config.json and generation_config.json.

    What would change the mathematics and is not built here is refused by name (UsageError). Token ids of the generation
    config come first, as in transformers. Source: its LlamaConfig and MistralConfig, whose defaults are used.
    """
    kind = _check_architecture(config)
    dim = _whole("hidden_size", _need(config, "hidden_size"), 1, LARGEST["dim"])
    n_heads = _whole("num_attention_heads", _need(config, "num_attention_heads"), 1, LARGEST["n_heads"])
    context = _get(config, "max_position_embeddings", 2048 if kind == "llama" else 131072)
    context = _whole("max_position_embeddings", context, 1, LARGEST["max_seq_len"])
    _check_window(config, kind, context)
    tokens: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2}
    for source in (config, generation or {}):
        tokens.update({key: source[key] for key in tokens if source.get(key) is not None})
    eos = tokens["eos_token_id"]
    return ModelConfig(
        dim=dim,
        n_layers=_need(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_get(config, "num_key_value_heads", n_heads if kind == "llama" else 8),
        head_dim=_head_dim(config, dim, n_heads),
        hidden_dim=_need(config, "intermediate_size"),
        vocab_size=_need(config, "vocab_size"),
        norm_eps=_get(config, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(config),
        max_seq_len=context,
        bos_token_id=tokens["bos_token_id"],  # type: ignore[arg-type]  # checked by __post_init__
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,),  # type: ignore[arg-type]
    )


CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def usable_ids(
    source: Mapping[str, object], file: str, vocab_size: object, warn: Callable[[str], None]
) -> dict[str, object]:
    """BOS and EOS ids of config.json or generation_config.json that can be used; `warn` gets a line for others.

    An EOS id of -1 means none. In generation_config.json, whose ids no weight depends on, whatever is no id of the
    vocabulary is left out too; in config.json it is refused by `from_hugging_face`. Raises UsageError for too many.
    """
    found: dict[str, object] = {}
    for key in ("bos_token_id", "eos_token_id"):
        value = source.get(key)
        several = isinstance(value, list) and key == "eos_token_id"
        ids: Any = value if several else [] if value is None else [value]
        kept = [token for token in ids if _usable_id(token, key, file, vocab_size)]
        if len(kept) > MOST_EOS_TOKENS:
            raise UsageError(f"{file}: {key} lists {len(kept):,} ids, but at most {MOST_EOS_TOKENS} are supported")
        if len(kept) < len(ids):
            lost = [_show(token) for token in ids if not _usable_id(token, key, file, vocab_size)]
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            warn(f"{file}: {key} {', '.join(lost[:3])}{more} dropped: no id of the vocabulary of {vocab_size}")
        if kept:
            found[key] = kept if several else kept[0]
    return found


def _usable_id(token: object, key: str, file: str, vocab_size: object) -> bool:
    if file == CONFIG or type(vocab_size) is not int:
        return key != "eos_token_id" or type(token) is not int or token != -1
    return type(token) is int and 0 <= token < vocab_size


HUGGING_FACE_REFUSED = {
    "attention_bias": "biases in attention",
    "mlp_bias": "biases in the feed-forward network",
    "auto_map": "code that comes with the checkpoint",
}


def _check_architecture(config: Mapping[str, object]) -> str:
    kind = config.get("model_type")
    if kind not in ("llama", "mistral"):
        raise UsageError(
            f"model_type is {_show(kind)}, but only 'llama' (and 'mistral' without a sliding window) is supported; "
            "use a LLaMA 2 checkpoint"
        )
    names = _get(config, "architectures", [])
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name.lower() not in ("llamaforcausallm", "mistralforcausallm"):
            raise UsageError(f"architectures names {_show(name)}, but LlamaForCausalLM is needed; use a language model")
    _refuse_set(config, HUGGING_FACE_REFUSED)
    if not _quantizes_nothing(config.get("quantization_config")):
        _refuse_set(config, {"quantization_config": "quantized weights"})
    activation = _get(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UsageError(f"hidden_act is {_show(activation)}, but LLaMA 2 uses 'silu'; use a LLaMA 2 checkpoint")
    return str(kind)


QUANTIZATION_IS_IDLE = re.compile(
    r"quant_method|bnb_4bit_.*|llm_int8_.*|modules_to_not_convert|ignore|format|.*version|.*status|.*compression_ratio"
)
"""Settings of quantization_config that say how, not whether, weights are quantized."""


def _quantizes_nothing(settings: object) -> bool:
    """Whether a quantization_config switches nothing on, as one of bitsandbytes without load_in_8bit or _4bit."""
    if not isinstance(settings, dict):
        return not settings
    method = _get(settings, "quant_method", "none")
    switches = {key: value for key, value in settings.items() if not QUANTIZATION_IS_IDLE.fullmatch(key)}
    on = [key for key, value in switches.items() if value and not (key == "bits" and value in (16, 32))]
    return method in ("none", "bitsandbytes", "compressed-tensors") and not on


def _check_window(config: Mapping[str, object], kind: str, context: int) -> None:
    """Mistral's window is 4096 where config.json is silent, and absent where it says null."""
    window = config.get("sliding_window", 4096 if kind == "mistral" else None)
    if window is not None and _whole("sliding_window", window, 1, LARGEST["max_seq_len"]) < context:
        raise UsageError(
            f"sliding_window is {window}, smaller than max_position_embeddings {context}: such attention is not "
            "supported; use a checkpoint without it"
        )
    layers = _get(config, "layer_types", [])
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        raise UsageError("layer_types names a layer that is not 'full_attention'; use a LLaMA 2 checkpoint")


def _rope_theta(config: Mapping[str, object]) -> Any:
    """RoPE's base from the old keys (rope_theta, rope_scaling) or the new one (rope_parameters)."""
    found = [config["rope_theta"]] if config.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        rope = _get(config, key, {})
        if not isinstance(rope, dict):
            raise UsageError(f"{key} is {_show(rope)}, but an object is needed; the config is damaged")
        if not _changes_nothing(rope):
            _check_rope(key, rope)
        found += [rope["rope_theta"]] if rope.get("rope_theta") is not None else []
    if _get(config, "partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"partial_rotary_factor is {_show(config['partial_rotary_factor'])}: not supported")
    if any(theta != found[0] for theta in found):
        raise UsageError(f"rope_theta is said twice, {_show(found[0])} and {_show(found[-1])}; keep the right one")
    return found[0] if found else 10000.0


SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3")
SCALED_BY_FACTOR = {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
SCALED_BY_FACTOR |= {"mscale", "mscale_all_dim", "truncate", "finetuned"}
"""Numbers that only say how a factor other than 1 works. Source: transformers, modeling_rope_utils.py."""


def _changes_nothing(rope: Mapping[str, object]) -> bool:
    """Whether rotary positions are "scaled" by a factor of 1."""
    known = all(_get(rope, name, "default") in SCALINGS for name in ("rope_type", "type"))
    one = all(_is_one(_get(rope, name, 1.0)) for name in ("factor", "attention_factor", "partial_rotary_factor"))
    others = rope.keys() - SCALED_BY_FACTOR - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    return _is_one(rope.get("factor")) and one and known and others <= {"factor", "attention_factor"}


def _is_one(value: object) -> bool:
    return not isinstance(value, bool) and value == 1


def _check_rope(key: str, rope: Mapping[str, object]) -> None:
    for name in ("rope_type", "type"):
        kind = _get(rope, name, "default")
        if kind != "default":
            raise UsageError(f"{key} asks for rotary positions of type {_show(kind)}, which are not supported")
    unknown = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown or _get(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(f"{key} sets {_show(sorted(unknown or ['partial_rotary_factor'])[0])}: not supported")


def _head_dim(config: Mapping[str, object], dim: int, n_heads: int) -> Any:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if dim % n_heads:
        raise UsageError(f"the width {dim} is no multiple of the {n_heads} heads; the config is damaged")
    return dim // n_heads


def _refuse_set(config: Mapping[str, object], refused: Mapping[str, str]) -> None:
    for key, what in refused.items():
        if config.get(key) is not None and config[key] is not False:
            raise UsageError(f"{key} is {_show(config[key])}: {what}, which is not supported; use a LLaMA 2 checkpoint")


def _need(config: Mapping[str, object], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise UsageError(f"{key} is missing; the config is incomplete or of another architecture")
    return value


def _get(config: Mapping[str, object], key: str, default: object) -> Any:
    """The value of a key; its default where the key is absent or null."""
    value = config.get(key)
    return default if value is None else value


def _whole(name: str, value: object, least: int, largest: int) -> int:
    if type(value) is not int or not least <= value <= largest:
        raise UsageError(f"{name} is {_show(value)}, but a whole number from {least:,} to {largest:,} is needed")
    return value


def _number(name: str, value: object, above: float, largest: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value <= largest:  # NaN: neither
        raise UsageError(f"{name} is {_show(value)}, but a number above {above:g} and up to {largest:g} is needed")
    return float(value)


def _show(value: object) -> str:
    """A foreign value for a message; containers by their type alone, as their text may be without end."""
    if isinstance(value, (int, float, bool)) and not (isinstance(value, int) and value.bit_length() > 64):
        return repr(value)
    return quote(value) if isinstance(value, str) or value is None else f"a {type(value).__name__}"
