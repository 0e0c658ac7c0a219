"""Which numbers describe a LLaMA 2 model, and how each kind of checkpoint says them.

Letters of the axes: D = dim, L = n_layers, H = n_heads, G = n_kv_heads, E = head_dim, F = hidden_dim, V = vocab_size.
Every function here raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from npllama import rope_keys
from npllama.errors import UsageError, quote
from npllama.family import refuse_architecture, refuse_changes
from npllama.fields import get, need, number, show, whole
from npllama.rope import RopeScaling
from npllama.version import SINCE, unknown_key

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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the constants of one model; complete and consistent when it exists.

    Units: tokens for max_seq_len and sliding_window, elements for the others; norm_eps stands inside the root;
    rope_theta is RoPE's base. sliding_window: how many positions, its own included, a query sees (None: all).
    add_bos_token, add_eos_token: whether a text gets BOS in front and EOS behind it.
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
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    add_bos_token: bool = True
    add_eos_token: bool = False
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
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
        if not isinstance(self.eos_token_ids, tuple) or len(self.eos_token_ids) > MOST_EOS_TOKENS:
            raise UsageError(
                f"eos_token_ids is {show(self.eos_token_ids)}, but a tuple of at most {MOST_EOS_TOKENS} ids is needed"
            )
        if self.rope_scaling is not None:
            self.rope_scaling.check_head(self.head_dim)
        if self.sliding_window is not None:
            whole("sliding_window", self.sliding_window, 1, LARGEST["max_seq_len"])
        for name, token in [("bos_token_id", self.bos_token_id), *(("eos_token_ids", t) for t in self.eos_token_ids)]:
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


def feed_forward_width(dim: int, multiple_of: object = 256, multiplier: object = None) -> int:
    """The hidden width that Meta's code derives instead of storing it.

        F = multiple_of * ceil(int(multiplier * int(2 * 4 * D / 3)) / multiple_of)

    Elements. Raises UsageError. Source: FeedForward in Meta's model.py; `multiplier` is ffn_dim_multiplier.
    """
    dim = whole("dim", dim, 1, LARGEST["dim"])
    step = whole("multiple_of", multiple_of, 1, LARGEST["hidden_dim"])
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(number("ffn_dim_multiplier", multiplier, above=0.0, largest=64.0) * width)
    return step * ((width + step - 1) // step)


def from_meta(params: Mapping[str, object], *, vocab_size: int, max_seq_len: int = META_CONTEXT) -> ModelConfig:
    """The config of a Meta release from its params.json.

    `vocab_size` is the number of rows of tok_embeddings; params.json may say -1 or the same. `max_seq_len` holds where
    params.json is silent. Raises UsageError. Source: Meta's ModelArgs, whose defaults are used.
    """
    _refuse_set(params, META_REFUSED)
    said = get(params, "vocab_size", -1)
    if (type(said) is not int or said != -1) and whole("vocab_size", said, 1, LARGEST["vocab_size"]) != vocab_size:
        raise UsageError(
            f"vocab_size is {said}, but tok_embeddings has {vocab_size} rows; weights and config do not belong together"
        )
    if vocab_size != LLAMA_3_VOCABULARY:
        return _from_model_args({**params, "vocab_size": vocab_size}, max_seq_len)
    context = LLAMA_3_CONTEXTS[get(params, "use_scaled_rope", False) is True]
    theta = get(params, "rope_theta", LLAMA_3_THETA)
    config = _from_model_args({**params, "vocab_size": vocab_size, "rope_theta": theta}, context)
    return dataclasses.replace(config, bos_token_id=LLAMA_3_BOS, eos_token_ids=LLAMA_3_EOS)


LLAMA_3_VOCABULARY = 128256
LLAMA_3_CONTEXTS = {False: 8192, True: 131072}
LLAMA_3_THETA = 500000.0
LLAMA_3_BOS = 128000
LLAMA_3_EOS = (128001, 128008, 128009)
"""End of text, of a message and of a turn. params.json says none of these. Source: Meta's llama-models, sku_list.py and
models/llama3/tokenizer.py."""


def from_llama2c(model_args: Mapping[str, object]) -> ModelConfig:
    """The config of a llama2.c training checkpoint from its model_args; UsageError. Source: llama2.c's ModelArgs."""
    _refuse_set(model_args, META_REFUSED)
    return _from_model_args(model_args, 2048)


META_REFUSED = {
    "rope_scaling": "scaled rotary positions",
    "sliding_window": "a sliding attention window",
    "moe": "a mixture of experts",
    "quantization_args": "quantized weights",
    "lora_args": "a LoRA adapter",
    "vision_chunk_size": "attention to pictures",
}
META_KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len", "max_batch_size", "dropout"),
    *("model_parallel_size", "use_biases", "use_scaled_rope"),
    *META_REFUSED,
}


def _from_model_args(args: Mapping[str, object], max_seq_len: int) -> ModelConfig:
    """Meta's and llama2.c's names, with Meta's defaults; None stands for the default."""
    dim = whole("dim", need(args, "dim"), 1, LARGEST["dim"])
    n_heads = whole("n_heads", need(args, "n_heads"), 1, LARGEST["n_heads"])
    width = get(args, "hidden_dim", None)
    if width is None:
        width = feed_forward_width(dim, get(args, "multiple_of", 256), get(args, "ffn_dim_multiplier", None))
    return ModelConfig(
        dim=dim,
        n_layers=need(args, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=get(args, "n_kv_heads", n_heads),
        head_dim=_head_dim(args, dim, n_heads),
        hidden_dim=width,
        vocab_size=need(args, "vocab_size"),
        norm_eps=get(args, "norm_eps", 1e-5),
        rope_theta=get(args, "rope_theta", rope_keys.DEFAULT_THETA),
        max_seq_len=get(args, "max_seq_len", max_seq_len),
        rope_scaling=rope_keys.from_meta(args),
    )


def from_hugging_face(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """The config of a Hugging Face checkpoint from config.json and generation_config.json.

    What would change the mathematics and is not built here is refused by name (UsageError). Token ids of the generation
    config come first, as in transformers. Source: its LlamaConfig and MistralConfig, whose defaults are used.
    """
    kind = _check_architecture(config)
    dim = whole("hidden_size", need(config, "hidden_size"), 1, LARGEST["dim"])
    n_heads = whole("num_attention_heads", need(config, "num_attention_heads"), 1, LARGEST["n_heads"])
    context = get(config, "max_position_embeddings", 2048 if kind == "llama" else 131072)
    context = whole("max_position_embeddings", context, 1, LARGEST["max_seq_len"])
    theta, scaling = rope_keys.from_hugging_face(config, context)
    if scaling is not None and scaling.kind == "dynamic":
        context = min(int(context * scaling.factor), LARGEST["max_seq_len"])
    tokens: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2}
    for source in (config, generation or {}):
        tokens.update({key: source[key] for key in tokens if source.get(key) is not None})
    eos = tokens["eos_token_id"]
    return ModelConfig(
        dim=dim,
        n_layers=need(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=get(config, "num_key_value_heads", n_heads if kind == "llama" else 8),
        head_dim=_head_dim(config, dim, n_heads),
        hidden_dim=need(config, "intermediate_size"),
        vocab_size=need(config, "vocab_size"),
        norm_eps=get(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        max_seq_len=context,
        rope_scaling=scaling,
        sliding_window=_window(config, kind, context),
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
            lost = [show(token) for token in ids if not _usable_id(token, key, file, vocab_size)]
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
    kind = refuse_architecture("model_type", config.get("model_type"), ("llama", "mistral"))
    names = get(config, "architectures", [])
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name.lower() not in ("llamaforcausallm", "mistralforcausallm"):
            raise UsageError(f"architectures names {show(name)}, but LlamaForCausalLM is needed; use a language model")
    _refuse_set(config, HUGGING_FACE_REFUSED)
    refuse_changes(config)
    activation = get(config, "hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UsageError(f"hidden_act is {show(activation)}, but LLaMA 2 uses 'silu'; use a LLaMA 2 checkpoint")
    return kind


def _window(config: Mapping[str, object], kind: str, context: int) -> int | None:
    """Mistral's window is 4096 where config.json is silent, and absent where it says null."""
    layers = get(config, "layer_types", [])
    if isinstance(layers, list) and any(layer != "full_attention" for layer in layers):
        raise UsageError("layer_types names a layer that is not 'full_attention'; use a LLaMA 2 checkpoint")
    said = config.get("sliding_window", 4096 if kind == "mistral" else None)
    if said is None or (kind == "llama" and config.get("use_sliding_window") is False):
        return None
    window = whole("sliding_window", said, 1, LARGEST["max_seq_len"])
    if kind == "mistral":
        return window
    if window < context:
        raise UsageError(
            f"sliding_window is {window}, smaller than max_position_embeddings {context}, but models of type 'llama' "
            "have none; correct the one that is wrong"
        )
    return None


def _head_dim(config: Mapping[str, object], dim: int, n_heads: int) -> Any:
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if dim % n_heads:
        raise UsageError(f"the width {dim} is no multiple of the {n_heads} heads; the config is damaged")
    return dim // n_heads


def _refuse_set(config: Mapping[str, object], refused: Mapping[str, str]) -> None:
    for key, what in refused.items():
        if config.get(key) is not None and config[key] is not False:
            raise UsageError(f"{key} is {show(config[key])}: {what}, which is not supported; use a LLaMA 2 checkpoint")
