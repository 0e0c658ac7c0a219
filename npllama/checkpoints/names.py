"""Which tensors a LLaMA 2 has: their names in Meta's and Hugging Face's checkpoints, their shapes, their shards.

Axes: L layers, D width, H query heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from npllama.config import ModelConfig

HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""Source: transformers, convert_llama_weights_to_hf.py."""

SPLIT_COLUMNS = {"tok_embeddings", "attention.wo", "feed_forward.w2"}
"""Model-parallel shards hold columns of these and rows of the other matrices. Source: Meta's model.py (fairscale)."""

DERIVED = re.compile(
    r"(.*\.)?(inv_freq|original_inv_freq|rope\.freqs|freqs_(cos|sin|cis)|(cos|sin)_cached?|cos_sin_cache"
    r"|mask|(causal|attn|attention)_mask|masked_bias|position_ids|cache_[kv]|total_(ops|params)|_extra_state)"
)
"""Tables that follow from the config, masks, counters of profilers: not read."""

MASK = re.compile(r"(.*\.)?(self_attn|attn|attention)\.bias")
"""A causal mask where it has several axes, as GPT-2's code called it."""

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|base_layer|_orig_mod|_forward_module|_(?:fsdp|checkpoint)_wrapped_module|_fpw_module)\."
)
"""What DistributedDataParallel, PEFT, torch.compile, Lightning and FSDP put into names, in front or in the middle."""

ADAPTER = re.compile(r"(.*\.)?(lora_\w+|ia3_l|hada_w\d\w*|lokr_w\d\w*|oft_\w+|prompt_embeddings)(\..*)?")
"""Parts of an adapter of PEFT's, which changes the weights beside it."""

QUANTIZED = re.compile(r".*[._](qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale(_inv)?)")
"""Parts of quantized weights: GPTQ and AWQ, bitsandbytes, compressed-tensors and FP8."""


def meta_names(names: Collection[str]) -> tuple[dict[str, str], str]:
    """Names as they stand in Meta's checkpoints -> the model's own, and the unusual prefix that was left out."""
    prefix = _prefix(names, "layers.0.attention_norm.weight", usual="")
    return {name: name.removeprefix(prefix) for name in names}, prefix


def hugging_face_names(names: Collection[str]) -> tuple[dict[str, str], str]:
    """As `meta_names`, for Hugging Face's: "model." before all but the head.

    A prefix of all ("base_model.model.") comes off, and so does another one than "model.", or none, before the body.
    """
    prefix = _prefix(names, "layers.0.input_layernorm.weight", usual="model.")
    if prefix == "model.":
        return {name: name for name in names}, ""
    outer = prefix.removesuffix("model.") if prefix.endswith(".model.") else prefix
    heads = {f"{outer}lm_head.", f"{prefix}lm_head.", f"{prefix[:-1].rpartition('.')[0]}.lm_head.".lstrip(".")}
    found = {}
    for name in names:
        head = next((head for head in heads if name.startswith(head)), None)
        if head:
            found[name] = "lm_head." + name.removeprefix(head)
        elif name.startswith(prefix):
            found[name] = "model." + name.removeprefix(prefix)
        else:
            found[name] = name
    return found, outer


def _prefix(names: Collection[str], always: str, usual: str) -> str:
    """What stands before the name of a tensor that every model has; the usual where that is there, or several are."""
    found = [name.removesuffix(always) for name in names if f".{name}".endswith(f".{always}")]
    return found[0] if len(found) == 1 and usual + always not in names else usual


def plain(name: str) -> str:
    """A name without what wrappers put into it."""
    return WRAPPERS.sub("", name)


def resembling(missing: str, names: Iterable[str]) -> str | None:
    """Of the names that are there, the one most like a missing one: of the same end, of the same module, or any."""
    end, module = ".".join(missing.split(".")[-3:]), missing.rpartition(".")[0] + "."
    best: dict[int, str] = {}
    for name in names:
        best.setdefault(0 if name.endswith(end) else 1 if name.startswith(module) else 2, name)
    return best[min(best)] if best else None


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the model by Meta's name without ".weight", and its shape (rows, columns) or (n,)."""
    D, F, V = config.dim, config.hidden_dim, config.vocab_size
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (D,),
        "attention.wq": (queries, D),
        "attention.wk": (keys, D),
        "attention.wv": (keys, D),
        "attention.wo": (D, queries),
        "ffn_norm": (D,),
        "feed_forward.w1": (F, D),
        "feed_forward.w2": (D, F),
        "feed_forward.w3": (F, D),
    }
    layers = {f"layers.{i}.{kind}": shape for i in range(config.n_layers) for kind, shape in layer.items()}
    return {"tok_embeddings": (V, D), **layers, "norm": (D,), "output": (V, D)}


def kind(name: str) -> str:
    """A name without its layer: "layers.3.attention.wq" -> "attention.wq"."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def hugging_face(name: str) -> str:
    """Meta's name without ".weight" -> Hugging Face's without ".weight"."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{HUGGING_FACE[rest]}"
    return HUGGING_FACE[name]


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


def in_hugging_face_words(message: str) -> str:
    """A message about a ModelConfig in the words of config.json."""
    return _KEY.sub(lambda found: KEYS[found[0]], message)
