"""How Meta's releases and llama2.c's training checkpoints say the numbers of a model: params.json, and model_args.

Every function raises UsageError; a caller who knows the file adds its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from npllama.checkpoints.configs import rope_keys
from npllama.checkpoints.configs.family import refuse_set
from npllama.config import MAX_SIZES, ModelConfig
from npllama.errors import UsageError
from npllama.system.values import get, need, number, whole

CONTEXT = 4096
"""Meta's params.json does not say the context; LLaMA 2 was trained on 4096 tokens (Touvron et al. 2023)."""


def feed_forward_width(dim: int, multiple_of: object = 256, multiplier: object = None) -> int:
    """The hidden width that Meta's code derives instead of storing it.

        F = multiple_of * ceil(int(multiplier * int(2 * 4 * D / 3)) / multiple_of)

    Elements. Raises UsageError. Source: FeedForward in Meta's model.py; `multiplier` is ffn_dim_multiplier.
    """
    dim = whole("dim", dim, 1, MAX_SIZES["dim"])
    step = whole("multiple_of", multiple_of, 1, MAX_SIZES["hidden_dim"])
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(number("ffn_dim_multiplier", multiplier, above=0.0, largest=64.0) * width)
    return step * ((width + step - 1) // step)


def from_meta(params: Mapping[str, object], *, vocab_size: int, max_seq_len: int = CONTEXT) -> ModelConfig:
    """The config of a Meta release from its params.json.

    `vocab_size` is the number of rows of tok_embeddings; params.json may say -1 or the same. `max_seq_len` holds where
    params.json is silent. Raises UsageError. Source: Meta's ModelArgs, whose defaults are used.
    """
    refuse_set(params, REFUSED)
    said = get(params, "vocab_size", -1)
    if (type(said) is not int or said != -1) and whole("vocab_size", said, 1, MAX_SIZES["vocab_size"]) != vocab_size:
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
    refuse_set(model_args, REFUSED)
    return _from_model_args(model_args, 2048)


REFUSED = {
    "rope_scaling": "scaled rotary positions",
    "sliding_window": "a sliding attention window",
    "moe": "a mixture of experts",
    "quantization_args": "quantized weights",
    "lora_args": "a LoRA adapter",
    "vision_chunk_size": "attention to pictures",
}
KNOWN = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of"),
    *("ffn_dim_multiplier", "norm_eps", "rope_theta", "max_seq_len", "max_batch_size", "dropout"),
    *("model_parallel_size", "use_biases", "use_scaled_rope"),
    *REFUSED,
}


def _from_model_args(args: Mapping[str, object], max_seq_len: int) -> ModelConfig:
    """Meta's and llama2.c's names, with Meta's defaults; None stands for the default."""
    dim = whole("dim", need(args, "dim"), 1, MAX_SIZES["dim"])
    n_heads = whole("n_heads", need(args, "n_heads"), 1, MAX_SIZES["n_heads"])
    width = get(args, "hidden_dim", None)
    if width is None:
        width = feed_forward_width(dim, get(args, "multiple_of", 256), get(args, "ffn_dim_multiplier", None))
    return ModelConfig(
        dim=dim,
        n_layers=need(args, "n_layers"),
        n_heads=n_heads,
        n_kv_heads=get(args, "n_kv_heads", n_heads),
        head_dim=head_dim(args, dim, n_heads),
        hidden_dim=width,
        vocab_size=need(args, "vocab_size"),
        norm_eps=get(args, "norm_eps", 1e-5),
        rope_theta=get(args, "rope_theta", rope_keys.DEFAULT_THETA),
        max_seq_len=get(args, "max_seq_len", max_seq_len),
        rope_scaling=rope_keys.from_meta(args),
    )


def head_dim(config: Mapping[str, object], dim: int, n_heads: int) -> Any:
    """The width of a head; where it is not said, heads share the width of the model."""
    if config.get("head_dim") is not None:
        return config["head_dim"]
    if dim % n_heads:
        raise UsageError(f"the width {dim} is no multiple of the {n_heads} heads; the config is damaged")
    return dim // n_heads
