"""How Hugging Face checkpoints say the numbers of a model: config.json and generation_config.json.

Every function raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from npllama.checkpoints.configs import rope_keys
from npllama.checkpoints.configs.family import refuse_architecture, refuse_changes, refuse_set
from npllama.checkpoints.configs.meta import head_dim
from npllama.config import MAX_EOS_TOKENS, MAX_SIZES, ModelConfig
from npllama.errors import UsageError
from npllama.system.values import get, need, show, whole


def from_hugging_face(config: Mapping[str, object], generation: Mapping[str, object] | None = None) -> ModelConfig:
    """The config of a Hugging Face checkpoint from config.json and generation_config.json.

    What would change the mathematics and is not built here is refused by name (UsageError). Token ids of the generation
    config come first, as in transformers. Source: its LlamaConfig and MistralConfig, whose defaults are used.
    """
    kind = _check_architecture(config)
    dim = whole("hidden_size", need(config, "hidden_size"), 1, MAX_SIZES["dim"])
    n_heads = whole("num_attention_heads", need(config, "num_attention_heads"), 1, MAX_SIZES["n_heads"])
    context = get(config, "max_position_embeddings", 2048 if kind == "llama" else 131072)
    context = whole("max_position_embeddings", context, 1, MAX_SIZES["max_seq_len"])
    theta, scaling = rope_keys.from_hugging_face(config, context)
    if scaling is not None and scaling.kind == "dynamic":
        context = min(int(context * scaling.factor), MAX_SIZES["max_seq_len"])
    tokens: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2}
    for source in (config, generation or {}):
        tokens.update({key: source[key] for key in tokens if source.get(key) is not None})
    eos = tokens["eos_token_id"]
    return ModelConfig(
        dim=dim,
        n_layers=need(config, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=get(config, "num_key_value_heads", n_heads if kind == "llama" else 8),
        head_dim=head_dim(config, dim, n_heads),
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
        if len(kept) > MAX_EOS_TOKENS:
            raise UsageError(f"{file}: {key} lists {len(kept):,} ids, but at most {MAX_EOS_TOKENS} are supported")
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


REFUSED = {
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
    refuse_set(config, REFUSED)
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
    window = whole("sliding_window", said, 1, MAX_SIZES["max_seq_len"])
    if kind == "mistral":
        return window
    if window < context:
        raise UsageError(
            f"sliding_window is {window}, smaller than max_position_embeddings {context}, but models of type 'llama' "
            "have none; correct the one that is wrong"
        )
    return None


KEYS = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
}
_KEY = re.compile(r"\b(" + "|".join(KEYS) + r")\b")


def in_own_words(message: str) -> str:
    """A message about a ModelConfig in the words of config.json."""
    return _KEY.sub(lambda found: KEYS[found[0]], message)
