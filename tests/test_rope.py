"""Frequencies of rotary positions: worked numbers of every kind, every spelling, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from npllama.checkpoints.configs import rope_keys
from npllama.errors import UsageError
from npllama.rope import RopeScaling, frequencies

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}
LONG = {"short_factor": [1.0 + 0.01 * i for i in range(64)], "long_factor": [1.0 + 0.5 * i for i in range(64)]}
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG}

# (rope_theta, max_position_embeddings, rope_scaling, head_dim, context) -> first, middle and last frequency, A.
# From transformers, which computes in float32.
WORKED = [
    ((1e4, 4096, None, 128, 4096), (1, 9.999999776e-3, 1.154781982e-4, 1)),
    ((5e5, 8192, None, 128, 8192), (1, 1.414213446e-3, 2.455140702e-6, 1)),
    ((1e4, 8192, {"type": "linear", "factor": 4.0}, 128, 8192), (0.25, 2.499999944e-3, 2.886954826e-5, 1)),
    ((1e4, 4096, {"type": "dynamic", "factor": 2.0}, 128, 4000), (1, 9.999999776e-3, 1.154781982e-4, 1)),
    ((1e4, 4096, {"type": "dynamic", "factor": 2.0}, 128, 8192), (1, 5.723381881e-3, 3.849273344e-5, 1)),
    ((1e4, 4096, {"type": "dynamic", "factor": 2.0}, 128, 5000), (1, 8.305133320e-3, 8.011495811e-5, 1)),
    ((1e4, 65536, YARN, 128, 65536), (1, 5.673076957e-3, 7.217387065e-6, 1.2772588722)),
    ((1e4, 65536, {**YARN, "truncate": False}, 128, 9), (1, 5.696213804e-3, 7.217387065e-6, 1.2772588722)),
    (
        (1e4, 163840, {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}, 128, 9),
        (1, 5.500000436e-3, 2.886954690e-6, 1.0857263993),
    ),
    ((5e5, 131072, {"rope_type": "llama3", **LLAMA_3}, 128, 9), (1, 5.248460220e-4, 3.068925878e-7, 1)),
    ((5e5, 131072, {"rope_type": "llama3", **LLAMA_3, "factor": 32.0}, 64, 9), (1, 4.295567051e-4, 9.418306490e-8, 1)),
    ((1e4, 131072, LONGROPE, 128, 4096), (1, 7.575757802e-3, 7.084551908e-5, 1.1902380714)),
    ((1e4, 131072, LONGROPE, 128, 5000), (1, 5.882352707e-4, 3.553175247e-6, 1.1902380714)),
]


def of(theta: float, trained: int, scaling: object, head_dim: int, context: int) -> tuple[np.ndarray, float]:
    base, found = rope_keys.from_hugging_face({"rope_theta": theta, "rope_scaling": scaling}, trained)
    return frequencies(found, head_dim, base, context)


@pytest.mark.parametrize(("config", "worked"), WORKED, ids=range(len(WORKED)))
def test_frequencies_of_every_kind_are_the_worked_numbers(
    config: tuple[float, int, object, int, int], worked: tuple[float, ...]
) -> None:
    found, attention = of(*config)
    E = config[3]
    assert found.shape == (E // 2,)
    assert found.dtype == np.float64
    np.testing.assert_allclose([found[0], found[E // 4], found[-1], attention], worked, rtol=1e-6)


def test_all_frequencies_of_the_golden_configs_are_those_of_transformers(shared_data: Path) -> None:
    golden = json.loads((shared_data / "family" / "golden" / "rope.json").read_text())
    assert len(golden) >= 13
    for case in golden:
        trained = case["config"]["max_position_embeddings"]
        newer = {**case["config"].get("rope_scaling", {}), **case["rope_parameters"]}  # which leave the lists out
        for config in (case["config"], {"rope_parameters": newer}):
            theta, scaling = rope_keys.from_hugging_face(config, trained)
            found, attention = frequencies(scaling, case["head_dim"], theta, case["seq"] or 1)
            np.testing.assert_allclose(found, case["inv_freq"], rtol=1e-6, err_msg=case["name"])
            assert attention == pytest.approx(case["attention_factor"], rel=1e-9), case["name"]


def test_llama_3_blends_pairs_between_the_long_and_the_short_waves() -> None:
    plain, _ = frequencies(None, 128, 5e5, 1)
    scaled, _ = of(5e5, 131072, {"rope_type": "llama3", **LLAMA_3}, 128, 1)
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_array_equal(scaled[35:], plain[35:] / 8)
    needed = [2.166570630e-3, 1.371893683e-3, 1.785077911e-4, 9.556212171e-5]
    np.testing.assert_allclose(scaled[[29, 30, 34, 35]], needed, rtol=1e-6)


def test_plain_frequencies_are_those_of_the_equation() -> None:
    found, attention = frequencies(None, 8, 10000.0, 4096)
    np.testing.assert_array_equal(found, [1.0, *(10000.0 ** (-i / 8) for i in (2, 4, 6))])
    assert attention == 1.0


def test_an_attention_factor_that_is_said_replaces_the_formula() -> None:
    assert of(1e4, 65536, {**YARN, "attention_factor": 1.5}, 128, 9)[1] == 1.5
    assert of(1e4, 131072, {**LONGROPE, "attention_factor": 0.5}, 128, 9)[1] == 0.5


def test_factors_that_are_not_said_follow_from_the_contexts() -> None:
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}
    assert rope_keys.from_hugging_face({"rope_scaling": yarn}, 65536)[1] == RopeScaling(
        kind="yarn", factor=16.0, original_context=4096
    )
    assert rope_keys.from_hugging_face({"rope_scaling": LONGROPE}, 131072)[1].factor == 32.0


def test_the_original_context_of_the_whole_config_comes_first() -> None:
    config = {"rope_scaling": YARN, "original_max_position_embeddings": 2048}
    assert rope_keys.from_hugging_face(config, 65536)[1].original_context == 2048
    assert (
        rope_keys.from_hugging_face({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 512)[1].original_context == 512
    )


def test_the_newer_name_of_the_type_comes_first_and_the_old_name_of_longrope_is_known() -> None:
    both = {"rope_type": "linear", "type": "dynamic", "factor": 2.0}
    assert rope_keys.from_hugging_face({"rope_scaling": both}, 4096)[1].kind == "linear"
    assert rope_keys.from_hugging_face({"rope_scaling": {**LONGROPE, "rope_type": "su"}}, 4096)[1].kind == "longrope"
    assert rope_keys.from_hugging_face({"rope_scaling": both, "rope_parameters": YARN}, 4096)[1].kind == "linear"


def test_scaling_that_changes_nothing_is_none() -> None:
    for scaling in (None, {}, {"type": "default"}, {"rope_type": "linear", "factor": 1.0}):
        assert rope_keys.from_hugging_face({"rope_scaling": scaling, "rope_theta": 5e5}, 4096) == (5e5, None)
    assert rope_keys.from_hugging_face({}, 4096) == (10000.0, None)


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "mrope", "mrope_section": [1]}, "of type 'mrope', which are not supported"),
        ({"rope_type": "proportional"}, "of type 'proportional'"),
        ({"rope_type": 3}, "of type 3"),
        ({"rope_type": ["linear"]}, "of type a list"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "sets 'full_attention', which is not known"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "sets 'mscale', which is not known .* type 'linear'"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0.5}, "is 0.5, but 1 or more is needed"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', but a number"),
        ({"rope_type": "linear", "factor": math.nan}, "factor is nan"),
        ({"rope_type": "linear", "factor": True}, "factor is True"),
        ({"rope_type": "llama3", **LLAMA_3, "low_freq_factor": 4.0}, "low_freq_factor must be the smaller one"),
        ({"rope_type": "llama3", **LLAMA_3, "low_freq_factor": None}, "low_freq_factor is missing"),
        ({"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings is missing"),
        ({**YARN, "beta_fast": 1, "beta_slow": 32}, "beta_slow must be the smaller one"),
        ({**YARN, "truncate": 1}, "truncate is 1, but true or false"),
        ({**YARN, "original_max_position_embeddings": 0}, "is 0, but a whole number from 1"),
        ({**LONGROPE, "long_factor": None}, "long_factor is missing"),
        ({**LONGROPE, "long_factor": 2.0}, "long_factors is 2.0, but a list"),
        ({**LONGROPE, "long_factor": [1.0, "a"]}, "an element of long_factors is 'a'"),
        ({**LONGROPE, "long_factor": [1.0] * 513}, "a list of at most 512 numbers"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, "rope_theta is said twice, 500.0 and 7.0"),
        ("linear", "rope_scaling is 'linear', but an object is needed"),
    ],
)
def test_what_is_not_known_or_out_of_range_is_refused_by_name(scaling: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        rope_keys.from_hugging_face({"rope_theta": 500.0, "rope_scaling": scaling}, 4096)


def test_lists_of_factors_have_one_number_for_each_pair() -> None:
    scaling = RopeScaling(kind="divisors", divisors=(1.0,) * 4)
    assert len(frequencies(scaling, 8, 1e4, 1)[0]) == 4
    with pytest.raises(UsageError, match=r"divisors .* has 4 numbers, but heads of 6 elements need 3"):
        frequencies(scaling, 6, 1e4, 1)
    with pytest.raises(UsageError, match="head_dim is 2, but dynamic scaling"):
        of(1e4, 4096, {"type": "dynamic", "factor": 2.0}, 2, 8192)


@pytest.mark.parametrize(("config", "worked"), WORKED, ids=range(len(WORKED)))
def test_every_description_survives_json(
    config: tuple[float, int, object, int, int], worked: tuple[float, ...]
) -> None:
    _, scaling = rope_keys.from_hugging_face({"rope_scaling": config[2]}, config[1])
    if scaling is not None:
        again = RopeScaling.from_json(json.loads(json.dumps(scaling.to_json())))
        assert again == scaling
        assert hash(again) == hash(scaling)


def test_json_of_a_description_holds_no_defaults_and_no_other_keys() -> None:
    assert RopeScaling(kind="linear", factor=2).to_json() == {"kind": "linear", "factor": 2.0}
    for values, reason in [
        ({"kind": "linear", "zoo": 1}, "key 'zoo' is not known in rope_scaling"),
        ({"factor": 2.0}, "an object with a kind is needed"),
        ([], "an object with a kind is needed"),
        ({"kind": "ntk"}, "by 'ntk', which is not known"),
        ({"kind": ["linear"]}, "which is not known"),
        ({"kind": "yarn"}, "original context .* is 'None'"),
    ]:
        with pytest.raises(UsageError, match=reason):
            RopeScaling.from_json(values)


@pytest.mark.parametrize(
    ("dim", "n_layers", "factor"), [(4096, 32, 8.0), (8192, 80, 8.0), (2048, 16, 32.0), (3072, 28, 32.0)]
)
def test_meta_says_only_that_positions_are_scaled(dim: int, n_layers: int, factor: float) -> None:
    params = {"dim": dim, "n_layers": n_layers, "use_scaled_rope": True}
    _, needed = rope_keys.from_hugging_face({"rope_scaling": {"type": "llama3", **LLAMA_3, "factor": factor}}, 131072)
    assert rope_keys.from_meta(params) == needed
    assert rope_keys.from_meta({**params, "use_scaled_rope": False}) is None
    with pytest.raises(UsageError, match="use_scaled_rope is 1, but true or false"):
        rope_keys.from_meta({**params, "use_scaled_rope": 1})


def test_the_table_of_a_gguf_file_gives_the_frequencies_that_llama_3_means() -> None:
    _, scaling = rope_keys.from_hugging_face({"rope_scaling": {"rope_type": "llama3", **LLAMA_3}}, 131072)
    needed, _ = frequencies(scaling, 128, 5e5, 1)
    plain, _ = frequencies(None, 128, 5e5, 1)
    table = tuple((plain / needed).astype(np.float32).tolist())
    found, attention = frequencies(rope_keys.from_gguf({}, 131072, table), 128, 5e5, 1)
    np.testing.assert_allclose(found, needed, rtol=1e-6)
    assert attention == 1.0


def test_keys_of_gguf_files_say_what_the_keys_of_hugging_face_say() -> None:
    yarn = {"scaling.type": "yarn", "scaling.factor": 16.0, "scaling.original_context_length": 4096}
    found, attention = frequencies(rope_keys.from_gguf(yarn, 65536), 128, 1e4, 1)
    needed, _ = of(1e4, 65536, YARN, 128, 1)
    np.testing.assert_array_equal(found, needed)
    assert attention == pytest.approx(1.2772588722, rel=1e-9)
    assert frequencies(rope_keys.from_gguf({**yarn, "scaling.attn_factor": 0.5}, 1), 128, 1e4, 1)[1] == attention / 2
    for said in ({"scaling.type": "linear", "scaling.factor": 4.0}, {"scaling.factor": 4.0}, {"scale_linear": 4.0}):
        assert rope_keys.from_gguf(said, 8192) == RopeScaling(kind="linear", factor=4.0)
    for said in ({}, {"scaling.type": "none", "scaling.factor": 4.0}, {"scaling.factor": 0.0}, {"scale_linear": 1.0}):
        assert rope_keys.from_gguf(said, 8192) is None


def test_longrope_of_a_gguf_file_takes_its_lists_from_tensors() -> None:
    said = {"scaling.type": "longrope", "scaling.original_context_length": 4096, "scaling.attn_factor": 1.1902380714}
    found = rope_keys.from_gguf(said, 131072, None, tuple(LONG["short_factor"]), tuple(LONG["long_factor"]))
    for context in (4096, 4097):
        needed, attention = of(1e4, 131072, LONGROPE, 128, context)
        again, factor = frequencies(found, 128, 1e4, context)
        np.testing.assert_array_equal(again, needed)
        assert factor == pytest.approx(attention, rel=1e-9)


@pytest.mark.parametrize(
    ("said", "table", "reason"),
    [
        ({"scaling.type": "ntk"}, None, "rope.scaling.type is 'ntk': not supported"),
        ({"scaling.type": "longrope"}, None, "without rope_factors_long.weight"),
        ({"scaling.type": "yarn", "scaling.factor": 2.0}, (1.0,), "scaled twice"),
        ({"scaling.factor": 2.0}, (1.0,), "scaled twice"),
        ({"scaling.yarn_ext_factor": 0.0}, None, "rope.scaling.yarn_ext_factor is 0.0: not supported"),
        ({"scaling.alpha": 1000.0}, None, "rope.scaling.alpha is 1000.0"),
        ({"scaling.attn_factor": math.nan}, None, "rope.scaling.attn_factor is nan"),
        ({"scaling.factor": "2"}, None, "factor is '2'"),
        ({}, (1.0, 0.0), "an element of divisors is 0.0"),
        ({}, (1.0, math.inf), "an element of divisors is inf"),
    ],
)
def test_gguf_scaling_that_is_not_known_or_twice_is_refused(
    said: dict[str, object], table: tuple[float, ...] | None, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        rope_keys.from_gguf(said, 8192, table)
