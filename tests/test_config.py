"""ModelConfig and the three ways to get one: what is derived, what is a default, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from helpers import TINY, hugging_face_config

from npllama.checkpoints.configs.hugging_face import from_hugging_face
from npllama.checkpoints.configs.meta import CONTEXT, feed_forward_width, from_llama2c, from_meta
from npllama.config import ModelConfig
from npllama.errors import UsageError
from npllama.rope import RopeScaling
from npllama.system import strict_json

SEVEN = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
SEVENTY = {**SEVEN, "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_layers": 80}
SEVENTY["n_kv_heads"] = 8
HUGGING_FACE = hugging_face_config(TINY, tied=False)


def hugging_face(**changes: object) -> ModelConfig:
    """The config of TINY's config.json with changes; None takes a key out."""
    return from_hugging_face({key: v for key, v in {**HUGGING_FACE, **changes}.items() if v is not None})


# ModelConfig ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"]
)
@pytest.mark.parametrize("value", [0, -1, True, 1.0, "4", None, math.nan, 1 << 62])
def test_sizes_are_whole_numbers_from_one_to_a_limit(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*, but a whole number from 1 to"):
        dataclasses.replace(TINY, **{name: value})


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, 0.02, math.nan, math.inf, True, "1e-5", None])
def test_norm_eps_is_a_small_positive_number(value: object) -> None:
    with pytest.raises(UsageError, match=r"^norm_eps is .*, but a number above 0 and up to 0\.01 is needed"):
        dataclasses.replace(TINY, norm_eps=value)


@pytest.mark.parametrize("value", [1, 0.5, -10000.0, math.nan, math.inf, 1e13, True, "10000"])
def test_rope_theta_is_a_number_above_one(value: object) -> None:
    with pytest.raises(UsageError, match=r"^rope_theta is .*, but a number above 1 and up to 1e"):
        dataclasses.replace(TINY, rope_theta=value)


def test_key_value_heads_divide_the_query_heads() -> None:
    with pytest.raises(UsageError, match="n_heads is 6 and n_kv_heads 4, but every key/value head must serve"):
        dataclasses.replace(TINY, n_kv_heads=4)


def test_heads_have_an_even_size() -> None:
    with pytest.raises(UsageError, match="head_dim is 5, but rotary positions turn pairs"):
        dataclasses.replace(TINY, head_dim=5)


@pytest.mark.parametrize("change", [{"bos_token_id": 300}, {"eos_token_ids": (2, 300)}, {"eos_token_ids": (-1,)}])
def test_special_tokens_are_in_the_vocabulary(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="but a whole number from 0 to 299 is needed"):
        dataclasses.replace(TINY, **change)


def test_special_tokens_are_few_and_in_a_tuple() -> None:
    for ids in ([2], (2,) * 257):
        with pytest.raises(UsageError, match=r"^eos_token_ids is a .*, but a tuple of at most 256 ids is needed"):
            dataclasses.replace(TINY, eos_token_ids=ids)


def test_a_config_survives_json_and_is_frozen() -> None:
    config = dataclasses.replace(TINY, eos_token_ids=(2, 7), rope_theta=10000)
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert isinstance(again.rope_theta, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        again.dim = 1


def test_json_with_an_unknown_or_missing_key_is_refused() -> None:
    whole = TINY.to_json()
    with pytest.raises(UsageError, match="key 'zoo' is not known in the config"):
        ModelConfig.from_json({**whole, "zoo": 1})
    del whole["dim"]
    with pytest.raises(UsageError, match="key 'dim' is missing from the config"):
        ModelConfig.from_json(whole)
    with pytest.raises(UsageError, match="eos_token_ids is 2, but a list of token ids is needed"):
        ModelConfig.from_json({**TINY.to_json(), "eos_token_ids": 2})


# Meta and llama2.c ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [
        (4096, 256, None, 11008),
        (5120, 256, None, 13824),
        (8192, 4096, 1.3, 28672),
        (64, 4, None, 172),
        (288, 32, None, 768),
    ],
)
def test_the_feed_forward_width_is_that_of_the_released_models(
    dim: int, multiple_of: int, multiplier: float | None, width: int
) -> None:
    assert feed_forward_width(dim, multiple_of, multiplier) == width


def test_params_json_of_the_releases_gives_their_configs() -> None:
    seven = from_meta(SEVEN, vocab_size=32000)
    assert (seven.n_kv_heads, seven.head_dim, seven.hidden_dim, seven.max_seq_len) == (32, 128, 11008, CONTEXT)
    assert (seven.bos_token_id, seven.eos_token_ids, seven.rope_theta) == (1, (2,), 10000.0)
    seventy = from_meta(SEVENTY, vocab_size=32000)
    assert (seventy.n_kv_heads, seventy.head_dim, seventy.hidden_dim) == (8, 128, 28672)


def test_params_json_may_say_theta_and_context() -> None:
    config = from_meta({**SEVEN, "rope_theta": 1e6, "max_seq_len": 16384}, vocab_size=32016)
    assert (config.rope_theta, config.max_seq_len, config.vocab_size) == (1e6, 16384, 32016)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": True}, "n_heads is True"),
        ({"n_heads": 33}, "4096 is no multiple of the 33 heads"),
        ({"dim": math.nan}, "dim is nan"),
        ({"dim": None}, "dim is missing"),
        ({"n_layers": 513}, "n_layers is 513"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier is -1.0"),
        ({"ffn_dim_multiplier": math.inf}, "ffn_dim_multiplier is inf"),
        ({"ffn_dim_multiplier": True}, "ffn_dim_multiplier is True"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"vocab_size": 31999}, "vocab_size is 31999, but tok_embeddings has 32000 rows"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"vocab_size": -1.0}, "vocab_size is -1.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"use_scaled_rope": 1}, "use_scaled_rope is 1, but true or false is needed"),
        ({"sliding_window": 4096}, "sliding_window is 4096: a sliding attention window"),
        ({"moe": {"num_experts": 8}}, "moe is a dict: a mixture of experts"),
        ({"lora_args": {}}, "lora_args is a dict: a LoRA adapter"),
        ({"quantization_args": {}}, "quantization_args is a dict: quantized weights"),
        ({"rope_scaling": {}}, "rope_scaling is a dict"),
    ],
)
def test_params_that_are_impossible_or_not_supported_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        from_meta({**SEVEN, **change}, vocab_size=32000)


def test_llama2c_defaults_are_those_of_its_code() -> None:
    args = {"dim": 288, "n_layers": 6, "n_heads": 6, "vocab_size": 32000, "multiple_of": 32, "dropout": 0.0}
    config = from_llama2c({**args, "n_kv_heads": None, "hidden_dim": None})
    assert (config.n_kv_heads, config.hidden_dim, config.norm_eps, config.max_seq_len) == (6, 768, 1e-5, 2048)
    assert from_llama2c({**args, "hidden_dim": 700, "max_seq_len": 256}).hidden_dim == 700


# Hugging Face ---------------------------------------------------------------------------------------------------------


def test_config_json_gives_every_number() -> None:
    assert hugging_face() == TINY


def test_defaults_of_config_json_are_those_of_transformers() -> None:
    config = hugging_face(
        num_key_value_heads=None, head_dim=None, rms_norm_eps=None, rope_theta=None, max_position_embeddings=None
    )
    assert (config.n_kv_heads, config.head_dim, config.norm_eps) == (6, 4, 1e-6)
    assert (config.rope_theta, config.max_seq_len) == (10000.0, 2048)


def test_heads_may_be_wider_than_the_model() -> None:
    assert hugging_face(head_dim=8).head_dim == 8


def test_theta_is_found_under_old_and_new_keys() -> None:
    new = {"rope_theta": 500.0, "rope_type": "default"}
    assert hugging_face(rope_theta=500.0, rope_scaling={"type": "default"}).rope_theta == 500.0
    assert hugging_face(rope_theta=None, rope_parameters=new).rope_theta == 500.0
    with pytest.raises(UsageError, match=r"rope_theta is said twice, 700\.0 and 500\.0"):
        hugging_face(rope_theta=700.0, rope_parameters=new)


def test_end_of_text_is_one_id_or_several_and_the_generation_config_comes_first() -> None:
    assert hugging_face(eos_token_id=5).eos_token_ids == (5,)
    assert hugging_face(eos_token_id=[5, 2]).eos_token_ids == (5, 2)
    assert hugging_face(eos_token_id=None, bos_token_id=None).eos_token_ids == (2,)
    both = from_hugging_face(HUGGING_FACE, {"eos_token_id": [7, 8], "bos_token_id": 3})
    assert (both.bos_token_id, both.eos_token_ids) == (3, (7, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2' .*, but only 'llama'"),
        ({"model_type": None}, "model_type is 'None'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures names 'LlamaForSequenceClassification'"),
        ({"attention_bias": True}, "attention_bias is True: biases in attention"),
        ({"mlp_bias": True}, "mlp_bias is True: biases in the feed-forward network"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is a dict: quantized weights"),
        ({"auto_map": {}}, "auto_map is a dict: code that comes with the checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but LLaMA 2 uses 'silu'"),
        ({"sliding_window": 63}, "sliding_window is 63, smaller than max_position_embeddings 64"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names a layer"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling asks for rotary positions of type 'ntk'"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "rope_parameters asks for rotary positions of type 'mrope'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling sets 'factor', which is not known"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factors of scaled rotary positions has 1 numbers, but heads of 4 elements need 2",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', but an object is needed"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5: not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: not supported"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 4}, "every key/value head must serve"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"eos_token_id": "2"}, "eos_token_ids is '2'"),
        ({"eos_token_id": [2, 300]}, "eos_token_ids is 300"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
    ],
)
def test_configs_that_are_impossible_or_not_supported_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        hugging_face(**change)


@pytest.mark.parametrize(
    "said",
    [
        {"type": "linear", "factor": 1.0},
        {"type": "dynamic", "factor": 1},
        {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.0, "beta_fast": 32.0, "mscale": 0.7},
        {
            "rope_type": "llama3",
            "factor": 1.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1,
        },
        {"factor": 1.0},
    ],
)
def test_positions_scaled_by_one_are_not_scaled(said: dict[str, object]) -> None:
    assert hugging_face(rope_scaling=said) == hugging_face()
    assert hugging_face(rope_theta=None, rope_parameters={**said, "rope_theta": 1e4}) == hugging_face()
    for change in ({"factor": True}, {"rope_type": "ntk"}, {"new": 1}):
        with pytest.raises(UsageError, match=r"^(rope_scaling (asks for|sets)|factor is True)"):
            hugging_face(rope_scaling={**said, **change})


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"load_in_8bit": False, "load_in_4bit": False},
        {"quant_method": "bitsandbytes", "load_in_4bit": False, "bnb_4bit_compute_dtype": "float16"},
        {"quant_method": "none", "bits": 16},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense", "global_compression_ratio": 1.0},
    ],
)
def test_a_quantization_config_that_switches_nothing_on_is_none(said: dict[str, object]) -> None:
    assert hugging_face(quantization_config=said) == hugging_face()
    for change in ({"load_in_8bit": True}, {"quant_method": "gptq"}, {"bits": 8}, {"config_groups": {"group_0": {}}}):
        with pytest.raises(UsageError, match="quantization_config is a dict: quantized weights"):
            hugging_face(quantization_config={**said, **change})


def test_the_window_of_mistral_is_read_and_4096_where_it_is_not_said() -> None:
    mistral = {**HUGGING_FACE, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert from_hugging_face({**mistral, "sliding_window": 7}).sliding_window == 7
    assert from_hugging_face({**mistral, "max_position_embeddings": 32768}).sliding_window == 4096
    long = {**mistral, "max_position_embeddings": 32768, "sliding_window": None}
    assert (
        from_hugging_face({**mistral, "sliding_window": 64}).sliding_window == 64
    )  # a longer context may be asked for
    for config in (long, {**HUGGING_FACE, "sliding_window": 100}):
        assert from_hugging_face(config).sliding_window is None
    assert from_hugging_face({**HUGGING_FACE, "sliding_window": 7, "use_sliding_window": False}).sliding_window is None


def test_a_config_with_scaled_positions_and_a_window_survives_json() -> None:
    scaling = RopeScaling(kind="yarn", factor=4.0, original_context=16)
    config = dataclasses.replace(TINY, rope_scaling=scaling, sliding_window=9)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert not TINY.to_json().keys() & {"rope_scaling", "sliding_window"}
    with pytest.raises(UsageError, match="sliding_window is 0, but a whole number from 1"):
        dataclasses.replace(TINY, sliding_window=0)
    with pytest.raises(UsageError, match="divisors of scaled rotary positions has 3 numbers"):
        dataclasses.replace(TINY, rope_scaling=RopeScaling(kind="divisors", divisors=(1.0, 1.0, 1.0)))


def test_dynamic_scaling_holds_texts_as_many_times_longer_as_its_factor() -> None:
    assert hugging_face(rope_scaling={"type": "dynamic", "factor": 2.5}).max_seq_len == 160
    assert hugging_face(rope_scaling={"type": "linear", "factor": 2.5}).max_seq_len == 64


def test_params_json_of_llama_3_gives_what_it_does_not_say() -> None:
    eight = {**SEVEN, "vocab_size": 128256, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_kv_heads": 8}
    old = from_meta({**eight, "rope_theta": 500000.0}, vocab_size=128256)
    assert (old.hidden_dim, old.max_seq_len, old.rope_scaling) == (14336, 8192, None)
    assert (old.bos_token_id, old.eos_token_ids) == (128000, (128001, 128008, 128009))
    assert from_meta(eight, vocab_size=128256) == old
    new = from_meta({**eight, "use_scaled_rope": True}, vocab_size=128256)
    assert new.max_seq_len == 131072
    assert new.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_context=8192)


# Strict JSON ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":1,"b":2,"a":1}', "key 'a' stands twice in one object"),
        (b"[NaN]", "the number NaN is not JSON"),
        (b"[-Infinity]", "the number -Infinity is not JSON"),
        (b"[1e999]", "the number '1e999' is too large"),
        (b"9" * 5000, "a whole number of 5000 digits"),
        (b"[" * 100_000, "nested deeper than 32 levels"),
        (b'{"a":' * 100_000, "nested deeper than 32 levels"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{}{}", "not JSON"),
        (b'"abc\\', "not JSON"),
        (b"", "not JSON"),
        (b"\xff", "byte 0 is not UTF-8"),
        (b" " * ((1 << 20) + 1), "1,048,577 bytes of JSON, but at most 1,048,576 are read"),
    ],
)
def test_json_with_surprises_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        strict_json.parse(data)


def test_brackets_inside_strings_are_no_nesting() -> None:
    assert strict_json.parse(b'["' + b"[" * 100 + b'\\"' + b"{" * 100 + b'"]') == ["[" * 100 + '"' + "{" * 100]


def test_half_open_strings_are_scanned_once() -> None:
    with pytest.raises(UsageError, match="not JSON"):
        strict_json.parse(b'"' + b'\\"' * 500_000)


def test_another_value_than_an_object_is_refused() -> None:
    with pytest.raises(UsageError, match="holds a JSON list, but an object"):
        strict_json.parse_object(b"[]")
