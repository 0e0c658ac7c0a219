"""All weights of a model: which kinds there are, their shapes, and what checkpoints call them. Written once, here.

Axes: L layers, D model width, H query heads, G key/value heads, E head size, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np

from npllama.config import ModelConfig
from npllama.numbers import Weight


class Kind(NamedTuple):
    """One kind of weight. axes: of all its layers stacked. meta, hugging_face, gguf: its name there, without the layer.

    split_columns: model-parallel shards hold columns of it, and rows of the other matrices (Meta's model.py).
    """

    axes: str
    meta: str
    hugging_face: str
    gguf: str
    split_columns: bool = False

    @property
    def in_layers(self) -> bool:
        """Whether each layer has one."""
        return self.axes.startswith("L ")

    @property
    def is_norm(self) -> bool:
        """Whether it is a vector: float32 in every model, a few thousand numbers that scale everything."""
        return len(self.axes.removeprefix("L ").split()) == 1

    def shape(self, c: ModelConfig) -> tuple[int, ...]:
        """Its shape in a model, all layers stacked."""
        values = (c.n_layers, c.dim, c.n_heads, c.n_kv_heads, c.head_dim, c.hidden_dim, c.vocab_size)
        sizes = dict(zip("LDHGEFV", values, strict=True))
        return tuple(math.prod(sizes[letter] for letter in axis.split("*")) for axis in self.axes.split())


class Weights(NamedTuple):
    """All weights of a model, layers stacked; matrices (rows, columns) = (outputs, inputs) in any number format.

    A tied output is the same object as tok_embeddings. Source of the names: Meta's model.py; transformers'
    convert_llama_weights_to_hf.py; llama.cpp's gguf-py/gguf/constants.py.
    """

    tok_embeddings: Annotated[
        Weight, Kind("V D", "tok_embeddings", "model.embed_tokens", "token_embd", split_columns=True)
    ]
    attention_norm: Annotated[np.ndarray, Kind("L D", "attention_norm", "input_layernorm", "attn_norm")]
    wq: Annotated[Weight, Kind("L H*E D", "attention.wq", "self_attn.q_proj", "attn_q")]
    wk: Annotated[Weight, Kind("L G*E D", "attention.wk", "self_attn.k_proj", "attn_k")]
    wv: Annotated[Weight, Kind("L G*E D", "attention.wv", "self_attn.v_proj", "attn_v")]
    wo: Annotated[Weight, Kind("L D H*E", "attention.wo", "self_attn.o_proj", "attn_output", split_columns=True)]
    ffn_norm: Annotated[np.ndarray, Kind("L D", "ffn_norm", "post_attention_layernorm", "ffn_norm")]
    w1: Annotated[Weight, Kind("L F D", "feed_forward.w1", "mlp.gate_proj", "ffn_gate")]
    w2: Annotated[Weight, Kind("L D F", "feed_forward.w2", "mlp.down_proj", "ffn_down", split_columns=True)]
    w3: Annotated[Weight, Kind("L F D", "feed_forward.w3", "mlp.up_proj", "ffn_up")]
    norm: Annotated[np.ndarray, Kind("D", "norm", "model.norm", "output_norm")]
    output: Annotated[Weight, Kind("V D", "output", "lm_head", "output")]


KINDS: dict[str, Kind] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Weights, include_extras=True).items()
}
"""Every kind by the name of its field, in the order of Weights."""

BY_META = {kind.meta: name for name, kind in KINDS.items()}
"""Meta's name without the layer -> kind."""


def kind_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every kind of weight, layers stacked, in the order of Weights."""
    return {name: kind.shape(config) for name, kind in KINDS.items()}


def layer_products(config: ModelConfig) -> int:
    """Products of one token with the matrices of all layers: one for each of their numbers."""
    return sum(math.prod(kind.shape(config)) for kind in KINDS.values() if kind.in_layers and not kind.is_norm)


def tensor_names(kind: str, n_layers: int) -> list[str]:
    """What a Meta checkpoint calls the tensors of a kind, without ".weight": one for each layer, or one."""
    meta = KINDS[kind].meta
    return [f"layers.{l}.{meta}" for l in range(n_layers)] if KINDS[kind].in_layers else [meta]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by Meta's name without ".weight": its shape (rows, columns) or (n,)."""
    found: dict[str, tuple[int, ...]] = {}
    for kind, shape in kind_shapes(config).items():
        one = shape[1:] if KINDS[kind].in_layers else shape
        found |= dict.fromkeys(tensor_names(kind, config.n_layers), one)
    return found


def kind_of(tensor: str) -> Kind:
    """The kind of a tensor by Meta's name: "layers.3.attention.wq" -> KINDS["wq"]."""
    return KINDS[BY_META[tensor.split(".", 2)[2] if tensor.startswith("layers.") else tensor]]


def hugging_face_name(tensor: str) -> str:
    """Meta's name without ".weight" -> Hugging Face's without ".weight"."""
    name = kind_of(tensor).hugging_face
    return f"model.layers.{tensor.split('.')[1]}.{name}" if tensor.startswith("layers.") else name


def gguf_name(tensor: str) -> str:
    """Meta's name without ".weight" -> the one in GGUF files without ".weight"."""
    name = kind_of(tensor).gguf
    return f"blk.{tensor.split('.')[1]}.{name}" if tensor.startswith("layers.") else name
