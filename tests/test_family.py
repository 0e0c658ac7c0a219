"""Architectures that are not LLaMA's, and settings that change the mathematics: each is refused with its reason."""

from __future__ import annotations

import pytest
from helpers import TINY, hugging_face_config

from npllama.checkpoints.configs.family import CHANGES, NOT_LLAMA, refuse_architecture
from npllama.checkpoints.configs.hugging_face import from_hugging_face
from npllama.errors import UsageError

SIZES = hugging_face_config(TINY, tied=False)

# config.json of models that resemble LLaMA, by what tells them apart.
OTHERS = [
    ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, r"'qwen2' \(biases on q, k and v\)"),
    ({"model_type": "qwen3", "attention_bias": False}, r"'qwen3' \(norms on each head of q and k\)"),
    ({"model_type": "gemma", "hidden_act": "gelu"}, r"'gemma' \(embeddings times the root of the width, norms that"),
    ({"model_type": "gemma2"}, r"'gemma2' \(soft caps on scores and logits"),
    ({"model_type": "gemma3_text"}, r"'gemma3_text' \(norms on q and k"),
    ({"model_type": "phi3"}, r"'phi3' \(its matrices of q, k and v, and of gate and up, are fused"),
    ({"model_type": "phi"}, r"'phi' \(LayerNorm in place of RMSNorm"),
    ({"model_type": "granite", "embedding_multiplier": 12.0}, r"'granite' \(multipliers on embeddings"),
    ({"model_type": "mixtral", "num_local_experts": 8}, r"'mixtral' \(it is a mixture of experts"),
    ({"model_type": "deepseek_v3"}, r"'deepseek_v3' \(it is a mixture of experts, with latent attention"),
    ({"model_type": "olmo2"}, r"'olmo2' \(norms after each block"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0]}, r"'smollm3' \(layers without rotary positions"),
    ({"model_type": "command-r"}, r"'command-r' \(LayerNorm"),
    ({"model_type": "internlm2"}, r"'internlm2' \(its matrix of q, k and v is fused and interleaved"),
    ({"model_type": "minicpm"}, r"'minicpm' \(scales on embeddings"),
    ({"model_type": "cohere2"}, r"'cohere2' \(LayerNorm .* sliding window in some layers only"),
    ({"model_type": "somethingnew"}, "'somethingnew', but only 'llama' and 'mistral' are supported"),
    ({"model_type": ["llama"]}, "a list, but only 'llama' and 'mistral' are supported"),
]


@pytest.mark.parametrize(("change", "reason"), OTHERS, ids=[str(change["model_type"]) for change, _ in OTHERS])
def test_other_architectures_are_refused_with_the_reason(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=f"^model_type is {reason}"):
        from_hugging_face({**SIZES, **change})


@pytest.mark.parametrize("key", CHANGES)
def test_a_setting_that_changes_the_mathematics_is_refused_by_name(key: str) -> None:
    for neutral in CHANGES[key][1]:
        assert from_hugging_face({**SIZES, key: neutral}).dim == TINY.dim
    for value in (2.5, True, [0, 1]):
        with pytest.raises(UsageError, match=f"^{key} is .*: {CHANGES[key][0]}, which is not supported"):
            from_hugging_face({**SIZES, key: value})


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantized weights by 'awq'"),
        ({"quant_method": "gptq"}, "quantized weights by 'gptq'"),
        ({"load_in_4bit": True}, "quantized weights by 'bitsandbytes'"),
        ({"quant_method": 4}, "quantized weights, which"),
        ("awq", "is 'awq': quantized weights"),
        ({"bits": 8}, "quantized weights"),
    ],
)
def test_quantized_checkpoints_are_refused_with_what_to_use(quantization: object, reason: str) -> None:
    with pytest.raises(UsageError, match=f"{reason}.*use the checkpoint that it was made from, or a GGUF file"):
        from_hugging_face({**SIZES, "quantization_config": quantization})


def test_every_reason_is_one_that_a_message_can_hold() -> None:
    for name, reason in NOT_LLAMA.items():
        with pytest.raises(UsageError) as error:
            refuse_architecture("general.architecture", name, ("llama",))
        assert f"({reason}), but only 'llama' is supported" in str(error.value)
        assert name == name.lower().replace("-", "_")
        assert "\n" not in str(error.value)
