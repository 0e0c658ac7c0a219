"""The small files of a Hugging Face folder: what is honoured, what is stored, and what is said."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
from helpers import write_safetensors_checkpoint

import npllama
from npllama.errors import CheckpointError
from npllama.options import OFF, SamplingOptions
from npllama.store.export import export
from npllama.store.opening import open_model
from npllama.store.text_rules import suggested_sampling

LLAMA_2 = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
    "clean_up_tokenization_spaces": False,
    "eos_token": {"content": "</s>"},
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
"""What LLaMA 2's own tokenizer_config.json says."""


def exported(folder: Path, **files: object) -> tuple[Path, list[str]]:
    """Export a checkpoint with these small files (name without .json, content); the model and what was said."""
    write_safetensors_checkpoint(folder / "checkpoint")
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "checkpoint" / f"{name}.json").write_text(text)
    said: list[str] = []
    export(folder / "checkpoint", folder / "out", note=said.append)
    assert all("\n" not in line for line in said)
    return folder / "out", said[1:]  # the first is the tokenizer's path


# ---------------------------------------------------------------- BOS and EOS


@pytest.mark.parametrize(
    ("said", "bos", "eos"),
    [
        (None, True, False),
        ({}, True, False),
        (LLAMA_2, True, False),
        ({"add_bos_token": None, "add_eos_token": None}, True, False),
        ({"add_bos_token": False}, False, False),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
    ],
)
def test_a_text_gets_bos_and_eos_as_the_checkpoint_says(tmp_path: Path, said: object, bos: bool, eos: bool) -> None:
    model, _ = exported(tmp_path, **({} if said is None else {"tokenizer_config": said}))
    with npllama.load(model) as llm:
        ids = llm.tokenizer.encode("the cat")
        text = llm.tokenizer.encode("the cat", bos=False, eos=False)
        assert ids == [1] * bos + text + [2] * eos
        options = {"max_tokens": 4, "temperature": 0}
        assert llm.generate("the cat", **options).tokens == llm.generate(ids, **options).tokens
        for other in (True, False):
            asked = llm.generate("the cat", **options, bos=other, eos=not other)
            assert asked.tokens == llm.generate([1] * other + text + [2] * (not other), **options).tokens
            assert asked.usage.prompt_tokens == len(text) + 1
            assert "".join(p.text for p in llm.stream("the cat", **options, bos=other, eos=not other)) == asked.text


def test_an_export_says_that_texts_get_no_bos_and_that_they_get_eos(tmp_path: Path) -> None:
    _, said = exported(tmp_path, tokenizer_config={"add_bos_token": False, "add_eos_token": True})
    bos, eos = said
    assert "add_bos_token is false: a text gets no BOS unless --bos (bos=True) asks" in bos
    assert "add_eos_token is true: a text gets EOS behind it unless --no-eos (eos=False)" in eos
    assert all(line.startswith("tokenizer_config.json: ") for line in said)


def test_the_usual_files_of_llama_2_are_exported_without_a_remark(tmp_path: Path) -> None:
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    ordinary = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_length": 4096}
    _, said = exported(tmp_path, tokenizer_config=LLAMA_2, special_tokens_map=special, generation_config=ordinary)
    assert said == []


@pytest.mark.parametrize("value", ["false", 0, [], {}])
def test_a_flag_that_is_neither_true_nor_false_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: add_bos_token is '.*', but true or false"):
        exported(tmp_path, tokenizer_config={"add_bos_token": value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config"])
def test_a_file_that_is_no_object_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{name}\.json: "):
        exported(tmp_path, **{name: "[1]"})


@pytest.mark.parametrize("seed", range(12))
def test_files_damaged_at_random_are_read_or_refused_in_the_family(tmp_path: Path, seed: int) -> None:
    """Any value of JSON in the place of any other: a line of remarks or an error of the family, nothing else."""
    rng = random.Random(seed)
    odd = [None, True, -1, 10**17, 1e308, "", "<s>", [], [1, [2]], {}, {"content": 7}, {"x": {"y": []}}]
    keys = [*LLAMA_2, "added_tokens_decoder", "additional_special_tokens", "do_sample", "temperature", "top_k", "min_p"]
    names = ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config")
    files = {name: {key: rng.choice(odd) for key in rng.sample(keys, 5)} for name in names}
    with contextlib.suppress(npllama.NpllamaError):
        exported(tmp_path, **files)


def test_the_files_beside_the_tokenizer_count_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "other").mkdir()
    (tmp_path / "checkpoint" / "tokenizer.model").rename(tmp_path / "other" / "tokenizer.model")
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    export(tmp_path / "checkpoint", tmp_path / "out", tokenizer=tmp_path / "other" / "tokenizer.model")
    with open_model(tmp_path / "out") as opened:
        assert not opened.config.add_bos_token


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            {"added_tokens": {"<pad>": 300}},
            "added_tokens.json: tokens that tokenizer.model does not have: 1, first '<pad>' (id 300)",
        ),
        (
            {"added_tokens": {"<s>": 1}},
            "added_tokens.json: not read, as it names nothing that tokenizer.model does not have",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "<s>"}, "300": {"content": "<|im_end|>"}}}},
            "tokenizer_config.json: tokens that tokenizer.model does not have: 1, first '<|im_end|>' (id 300)",
        ),
        (
            {"special_tokens_map": {"additional_special_tokens": ["<|end|>"]}},
            "special_tokens_map.json: tokens that tokenizer.model does not have: 1, first '<|end|>'",
        ),
        ({"tokenizer_config": {"bos_token": "</s>"}}, "tokenizer_config.json: bos_token is '</s>', but a text gets"),
        ({"special_tokens_map": {"bos_token": "[BOS]"}}, "special_tokens_map.json: bos_token is '[BOS]', but"),
        (
            {"tokenizer_config": {"add_prefix_space": False, "legacy": False, "clean_up_tokenization_spaces": True}},
            "tokenizer_config.json: not used here, and may change results elsewhere: add_prefix_space (False), "
            "clean_up_tokenization_spaces (True), legacy (False)",
        ),
        ({"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}}, "elsewhere: tokenizer_class (GPT2Tokenizer)"),
        ({"generation_config": {"suppress_tokens": [5]}}, "generation_config.json: not used here, and may change"),
        ({"generation_config": {"forced_eos_token_id": 2}}, "forced_eos_token_id (2)"),
        ({"generation_config": {"num_beams": 4, "no_repeat_ngram_size": 3}}, "no_repeat_ngram_size (3), num_beams (4)"),
        ({"generation_config": {"a_key_of_tomorrow": 1}}, "a_key_of_tomorrow (1)"),
    ],
)
def test_what_may_change_results_is_said(tmp_path: Path, files: dict[str, object], line: str) -> None:
    _, said = exported(tmp_path, **files)
    assert len(said) == 1
    assert line in said[0]


def test_values_that_change_nothing_are_not_said(tmp_path: Path) -> None:
    off = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None, "bad_words_ids": []}
    assert (
        exported(tmp_path, generation_config=off, tokenizer_config={"legacy": True, "add_prefix_space": True})[1] == []
    )


# ---------------------------------------------------------------- suggested sampling


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, None),
        ({"temperature": 1.0, "top_k": None}, None),
        ({"do_sample": True}, SamplingOptions(1.0, 50, 1.0, 0.0, 1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingOptions(0.6, 50, 0.9, 0.0, 1.0)),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, SamplingOptions(1.0, 0, 1.0, 0.1, 1.0)),
        ({"temperature": 0.6, "repetition_penalty": 1.1}, SamplingOptions(0.6, 50, 1.0, 0.0, 1.1)),
        ({"do_sample": False, "temperature": 0.6}, SamplingOptions(0.0, 0, 1.0, 0.0, 1.0)),
        ({"do_sample": False}, SamplingOptions(0.0, 0, 1.0, 0.0, 1.0)),
        ({"repetition_penalty": 1.2}, SamplingOptions(0.0, 0, 1.0, 0.0, 1.2)),
    ],
)
def test_sampling_is_suggested_as_transformers_understands_it(
    said: dict[str, object], expected: SamplingOptions | None
) -> None:
    remarks: list[str] = []
    assert suggested_sampling(said, remarks.append) == expected
    stored = [line for line in remarks if "suggests" in line]
    assert len(stored) == (expected is not None)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', which is not used: it needs a finite number of at least 0"),
        ({"top_p": 1.5}, "top_p is '1.5', which is not used: it needs a number from 0 to 1"),
        ({"top_k": 40.0}, "top_k is '40.0', which is not used: it needs a whole number"),
        ({"repetition_penalty": 0}, "repetition_penalty is '0', which is not used: it needs a finite number above 0"),
        ({"do_sample": "no"}, "do_sample is 'no', which is not used: it needs true or false"),
    ],
)
def test_a_suggestion_that_cannot_be_used_is_dropped_with_a_remark(said: dict[str, object], line: str) -> None:
    remarks: list[str] = []
    assert suggested_sampling(said, remarks.append) is None
    assert len(remarks) == 1
    assert line in remarks[0]


def test_what_changes_the_meaning_of_a_suggestion_is_said() -> None:
    remarks: list[str] = []
    suggested_sampling({"temperature": 0.5}, remarks.append)
    suggested_sampling({"do_sample": False, "top_k": 5}, remarks.append)
    suggested_sampling({"do_sample": True, "repetition_penalty": 1.3}, remarks.append)
    text = "\n".join(remarks)
    assert "has options of sampling without do_sample; they are taken as they stand" in text
    assert "do_sample is false, so its other options of sampling do not count" in text
    assert "repetition_penalty counts over all tokens in transformers, here over the last 64" in text


def test_the_suggested_sampling_is_used_where_it_is_asked_for_and_given_options_win(tmp_path: Path) -> None:
    said = {"do_sample": True, "temperature": 1.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.4}
    model, _ = exported(tmp_path, generation_config=said)
    suggested = {"temperature": 1.7, "top_k": 9, "top_p": 0.8, "min_p": 0.0, "repeat_penalty": 1.4}
    with npllama.load(model) as llm:
        common = {"max_tokens": 20, "seed": 3}
        assert llm.generate("a", **common, sampling="model").tokens == llm.generate("a", **common, **suggested).tokens
        assert llm.generate("a", **common, sampling="model").tokens != llm.generate("a", **common).tokens
        cold = llm.generate("a", **common, sampling="model", temperature=0)
        assert cold.tokens == llm.generate("a", **common, **{**suggested, "temperature": 0}).tokens
        off = llm.generate("a", **common, sampling=OFF, repetition_penalty=1.4)
        assert off.tokens == llm.generate("a", **common, **{**OFF.to_json(), "repeat_penalty": 1.4}).tokens


def test_sampling_of_a_model_that_suggests_none_is_refused(tmp_path: Path) -> None:
    model, _ = exported(tmp_path)
    with npllama.load(model) as llm:
        with pytest.raises(npllama.UsageError, match="sampling='model': this model suggests no sampling"):
            llm.generate("a", sampling="model")
        for wrong in ("greedy", None, {}):
            with pytest.raises(npllama.UsageError, match="needs 'default', 'model' or SamplingOptions"):
                llm.stream("a", sampling=wrong)
