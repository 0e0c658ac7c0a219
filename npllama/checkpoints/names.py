"""Which tensors a LLaMA 2 has: their names in each kind of checkpoint, their shapes, their shards.

Axes: L layers, D width, H query heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import re

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

GGUF = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}
"""Source: llama.cpp, gguf-py/gguf/constants.py."""

SPLIT_COLUMNS = {"tok_embeddings", "attention.wo", "feed_forward.w2"}
"""Model-parallel shards hold columns of these and rows of the other matrices. Source: Meta's model.py (fairscale)."""

DERIVED = re.compile(
    r"rope\.freqs|freqs_(cos|sin)|layers\.\d+\.attention\.inner_attention\.rope\.freqs"
    r"|(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    r"|blk\.\d+\.attn_rot_embd\.weight"
)
"""Tables that follow from the config; some checkpoints carry them, and they are not read."""


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


def gguf(name: str) -> str:
    """Meta's name without ".weight" -> the one in GGUF files without ".weight"."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{GGUF[rest]}"
    return GGUF[name]
