"""What is of the architecture of LLaMA and what is not: names of others, and settings that change the mathematics.

LLaMA here means: RMSNorm before attention and before the feed-forward network, rotary positions over whole heads of
every layer, grouped queries, SwiGLU, no biases. Mistral 7B, SmolLM, TinyLlama, Yi and DeepSeek-LLM are of it.
Source: transformers, modeling_*.py of each architecture; llama.cpp, src/llama-arch.cpp for the names in GGUF files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from npllama.errors import UsageError, quote
from npllama.system.values import get, show

EXPERTS = "it is a mixture of experts"
PICTURES = "it reads pictures or sound beside text"
RECURRENT = "it has recurrent layers in place of attention"
ENCODER = "it is no decoder alone: it has an encoder"
LAYER_NORM = "LayerNorm in place of RMSNorm"
FUSED = "its matrices of q, k and v are fused"
SOME_LAYERS = "it has a sliding window in some layers only"

NOT_LLAMA = {
    "afmoe": EXPERTS,
    "apertus": "norms on q and k, and xIELU in place of SwiGLU",
    "arcee": "a squared ReLU in place of SwiGLU",
    "arctic": EXPERTS,
    "baichuan": f"{FUSED}, and its 13B has ALiBi in place of rotary positions",
    "bailingmoe": EXPERTS,
    "bert": ENCODER,
    "bitnet": "more norms, a squared ReLU, and weights of three values",
    "bloom": f"ALiBi in place of rotary positions, biases and {LAYER_NORM}",
    "chatglm": f"biases on q, k and v, rotary positions over half of a head, and {FUSED}",
    "codeshell": f"biases and {LAYER_NORM}",
    "cohere": f"{LAYER_NORM}, attention and feed-forward network side by side, and scaled logits",
    "cohere2": f"{LAYER_NORM}, attention and feed-forward network side by side, and {SOME_LAYERS}",
    "command_r": f"{LAYER_NORM}, attention and feed-forward network side by side, and scaled logits",
    "dbrx": EXPERTS,
    "deci": "layers that differ in their number of heads and widths",
    "deepseek": EXPERTS,
    "deepseek_v2": f"{EXPERTS}, with latent attention",
    "deepseek_v3": f"{EXPERTS}, with latent attention",
    "deepseek2": f"{EXPERTS}, with latent attention",
    "diffllama": "attention that is the difference of two softmaxes",
    "dots1": EXPERTS,
    "exaone4": f"norms on q and k, norms after each block, and {SOME_LAYERS}",
    "falcon": f"{FUSED}, {LAYER_NORM}, and blocks side by side",
    "falcon_h1": RECURRENT,
    "gemma": "embeddings times the root of the width, norms that multiply by 1 + w, and GELU in place of SiLU",
    "gemma2": "soft caps on scores and logits, norms after each block, and a window in every other layer",
    "gemma3": "norms on q and k, norms after each block, and two bases of rotary positions",
    "gemma3n": "norms on q and k, embeddings in each layer, and two bases of rotary positions",
    "gemma4": "norms on q and k, norms after each block, and two bases of rotary positions",
    "glm": "rotary positions over half of a head, biases, and a fused feed-forward network",
    "glm4": "rotary positions over half of a head, norms after each block, and a fused feed-forward network",
    "glm4_moe": EXPERTS,
    "gpt_bigcode": f"learned positions, biases and {LAYER_NORM}",
    "gpt_neox": f"biases, {LAYER_NORM}, and blocks side by side",
    "gpt_oss": f"{EXPERTS}, with biases and attention sinks that are weights",
    "gpt2": f"learned positions, biases and {LAYER_NORM}",
    "gptj": f"biases, {LAYER_NORM}, and blocks side by side",
    "gptneox": f"biases, {LAYER_NORM}, and blocks side by side",
    "granite": "multipliers on embeddings, scores, residuals and logits",
    "granite_hybrid": RECURRENT,
    "granite_moe": EXPERTS,
    "granitemoe": EXPERTS,
    "granitemoehybrid": RECURRENT,
    "grok": EXPERTS,
    "hunyuan_dense": "norms on q and k after rotary positions",
    "hunyuan_v1_dense": "norms on q and k after rotary positions",
    "internlm": "biases on q, k, v and o",
    "internlm2": "its matrix of q, k and v is fused and interleaved",
    "jais": f"ALiBi in place of rotary positions, biases and {LAYER_NORM}",
    "jamba": RECURRENT,
    "lfm2": RECURRENT,
    "llada": "it fills in masked tokens in place of continuing a text",
    "llama_embed": "attention that looks at later tokens",
    "llama4": f"{EXPERTS}, with layers without rotary positions",
    "llava": PICTURES,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "mimo2": EXPERTS,
    "minicpm": "scales on embeddings, residuals and logits",
    "minicpm3": "latent attention, and scales on embeddings, residuals and logits",
    "minimax": EXPERTS,
    "ministral": SOME_LAYERS,
    "mistral3": PICTURES,
    "mistral4": f"{EXPERTS}, with latent attention",
    "mixtral": EXPERTS,
    "mllama": PICTURES,
    "modernbert": ENCODER,
    "mpt": f"{FUSED}, ALiBi in place of rotary positions, and {LAYER_NORM}",
    "nemotron": f"{LAYER_NORM} that multiplies by 1 + w, and a squared ReLU without a gate",
    "nemotron_h": RECURRENT,
    "olmo": "LayerNorm without weights",
    "olmo2": "norms after each block in place of before, and norms on q and k",
    "olmo3": f"norms after each block in place of before, norms on q and k, and {SOME_LAYERS}",
    "olmoe": EXPERTS,
    "opt": f"learned positions, biases and {LAYER_NORM}",
    "orion": LAYER_NORM,
    "persimmon": f"norms on q and k, biases and {LAYER_NORM}",
    "phi": f"{LAYER_NORM}, biases, rotary positions over a part of a head, and blocks side by side",
    "phi2": f"{LAYER_NORM}, biases, rotary positions over a part of a head, and blocks side by side",
    "phi3": "its matrices of q, k and v, and of gate and up, are fused",
    "phimoe": EXPERTS,
    "plamo": "attention and feed-forward network side by side",
    "qwen": f"biases on q, k and v, and {FUSED}",
    "qwen2": "biases on q, k and v",
    "qwen2_5_vl": PICTURES,
    "qwen2_moe": EXPERTS,
    "qwen2_vl": PICTURES,
    "qwen2vl": PICTURES,
    "qwen2moe": EXPERTS,
    "qwen3": "norms on each head of q and k",
    "qwen3_moe": EXPERTS,
    "qwen3moe": EXPERTS,
    "qwen3_next": RECURRENT,
    "qwen3next": RECURRENT,
    "refact": "ALiBi in place of rotary positions",
    "rwkv": RECURRENT,
    "rwkv6": RECURRENT,
    "rwkv7": RECURRENT,
    "seed_oss": "biases on q, k and v",
    "smollm3": "layers without rotary positions",
    "stablelm": f"{LAYER_NORM} with biases, and rotary positions over a quarter of a head",
    "starcoder": f"learned positions, biases and {LAYER_NORM}",
    "starcoder2": f"biases and {LAYER_NORM}",
    "t5": ENCODER,
}
"""Architectures that resemble LLaMA or are often met beside it -> the reason why this model cannot run them.

Names as in model_type of config.json and general.architecture of GGUF files, with "_" for "-".
"""


def refuse_architecture(key: str, name: object, known: tuple[str, ...]) -> str:
    """The name of the architecture that `key` says, one of `known`; UsageError with the reason for any other."""
    if isinstance(name, str) and name in known:
        return name
    short = name.lower().replace("-", "_").removesuffix("_text") if isinstance(name, str) else ""
    reason = f" ({NOT_LLAMA[short]})" if short in NOT_LLAMA else ""
    raise UsageError(
        f"{key} is {show(name)}{reason}, but only {' and '.join(repr(other) for other in known)} "
        f"{'is' if len(known) == 1 else 'are'} supported; use a checkpoint of a LLaMA"
    )


def refuse_set(config: Mapping[str, object], refused: Mapping[str, str]) -> None:
    """UsageError for a key that is set; `refused` says what each asks for."""
    for key, what in refused.items():
        if config.get(key) is not None and config[key] is not False:
            raise UsageError(f"{key} is {show(config[key])}: {what}, which is not supported; use a LLaMA 2 checkpoint")


NEUTRAL_SCALE = (None, 1, 1.0)
ABSENT = (None, False, 0)
CHANGES: dict[str, tuple[str, tuple[object, ...]]] = {
    "alibi": ("positions by ALiBi", ABSENT),
    "attention_multiplier": ("another scale of attention scores", (None,)),
    "attn_logit_softcapping": ("soft caps on attention scores", (None,)),
    "clip_qkv": ("clipped q, k and v", (None,)),
    "dim_model_base": ("scaled logits", (None,)),
    "embed_scale": ("scaled embeddings", NEUTRAL_SCALE),
    "embedding_multiplier": ("scaled embeddings", NEUTRAL_SCALE),
    "final_logit_softcapping": ("soft caps on logits", (None,)),
    "kv_lora_rank": ("latent attention", ABSENT),
    "lm_head_multiplier": ("scaled logits", NEUTRAL_SCALE),
    "logit_scale": ("scaled logits", NEUTRAL_SCALE),
    "logits_scaling": ("scaled logits", NEUTRAL_SCALE),
    "no_rope_layers": ("layers without rotary positions", (None, [])),
    "num_experts": ("a mixture of experts", ABSENT),
    "num_local_experts": ("a mixture of experts", ABSENT),
    "qk_norm": ("norms on q and k", ABSENT),
    "query_pre_attn_scalar": ("another scale of attention scores", (None,)),
    "residual_multiplier": ("scaled residuals", NEUTRAL_SCALE),
    "rope_interleaved": ("rotary positions in another order of pairs", ABSENT),
    "scale_depth": ("scaled residuals", (None,)),
    "scale_emb": ("scaled embeddings", NEUTRAL_SCALE),
    "use_qk_norm": ("norms on q and k", ABSENT),
}
"""Keys of config.json that change the mathematics -> what they ask for, and the values that ask for nothing."""

BITS_AND_BYTES = "bitsandbytes"


def refuse_changes(config: Mapping[str, object]) -> None:
    """UsageError, naming it, for a key of config.json that asks for other mathematics or for quantized weights."""
    for key, (what, neutral) in CHANGES.items():
        value = config.get(key)
        if not any(value is ok or (type(value) is type(ok) and value == ok) for ok in neutral):
            raise UsageError(f"{key} is {show(value)}: {what}, which is not supported; use a checkpoint of a LLaMA")
    quantization = config.get("quantization_config")
    if not _quantizes_nothing(quantization):
        raise UsageError(f"quantization_config is {_quantized_by(quantization)}")


QUANTIZATION_IS_IDLE = re.compile(
    r"quant_method|bnb_4bit_.*|llm_int8_.*|modules_to_not_convert|ignore|format|.*version|.*status|.*compression_ratio"
)
"""Settings of quantization_config that say how, not whether, weights are quantized."""


def _quantizes_nothing(settings: object) -> bool:
    """Whether a quantization_config switches nothing on, as one of bitsandbytes without load_in_8bit or _4bit."""
    if not isinstance(settings, dict):
        return not settings
    method = get(settings, "quant_method", "none")
    switches = {key: value for key, value in settings.items() if not QUANTIZATION_IS_IDLE.fullmatch(key)}
    on = [key for key, value in switches.items() if value and not (key == "bits" and value in (16, 32))]
    return method in ("none", BITS_AND_BYTES, "compressed-tensors") and not on


def _quantized_by(quantization: object) -> str:
    """What a quantization_config says, and what to get in place of such a checkpoint."""
    said = quantization if isinstance(quantization, dict) else {}
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = BITS_AND_BYTES
    by = f" by {quote(method)}" if isinstance(method, str) else ""
    return (
        f"{show(quantization)}: quantized weights{by}, which are not supported; use the checkpoint that it was made "
        "from, or a GGUF file of the model"
    )
