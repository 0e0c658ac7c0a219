"""What an evaluation harness asks of a model, against the model's own calls; lm-eval's own runner on local files."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, write_model_directory

import npllama
from npllama.errors import UsageError
from npllama.inference import Llama
from npllama.integrations.harness import continuations, generation_options, log_likelihoods


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    folder = tmp_path_factory.mktemp("harness") / "model"
    write_model_directory(folder, dataclasses.replace(TINY, max_seq_len=96), seed=3)
    return npllama.load(folder)


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, TINY.vocab_size, n).tolist()


def test_options_of_one_question_read_it_once_and_are_scored_as_alone(llm: Llama) -> None:
    questions = [ids_of(seed, 30) for seed in range(3)]
    pairs = [(question, ids_of(9 + option, 1 + option)) for option in range(4) for question in questions]
    fed: list[int] = []
    forward = llm.engine.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            llm.engine, "forward", lambda cache, tokens, *rest: fed.append(len(tokens)) or forward(cache, tokens, *rest)
        )
        found = log_likelihoods(llm, pairs)
    assert sum(fed) <= sum(map(len, questions)) + sum(len(after) for _, after in pairs)
    for (before, after), (logprob, is_greedy) in zip(pairs, found, strict=True):
        alone = llm.score(before, after)
        assert logprob == pytest.approx(alone.logprob, abs=1e-5)
        assert is_greedy == alone.is_greedy
    assert llm.runtime.scheduler.pool.available == llm.runtime.scheduler.pool.capacity


def test_a_context_that_is_too_long_loses_its_beginning(llm: Llama) -> None:
    before, after = ids_of(1, 120), ids_of(2, 5)
    (found, _), (needed, _) = log_likelihoods(llm, [(before, after), (before[-92:], after)])
    assert found == pytest.approx(needed, abs=1e-5)
    with pytest.raises(UsageError, match="a continuation of 97 tokens does not fit into the context of 96"):
        log_likelihoods(llm, [(before, ids_of(3, 97))])


def test_continuations_are_those_of_generate_with_each_tasks_options(llm: Llama) -> None:
    free = llm.generate("the cat", 30, temperature=0).text
    hows: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 30},
        {"until": free[7], "max_gen_toks": 30, "do_sample": False, "temperature": 0.0},
        {"until": [free[9], free[4]], "max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "top_k": 9},
    ]
    texts = ["the cat", "a dog that ran", "the cat " * 40]
    found = continuations(llm, [(text, how) for text in texts for how in hows])
    for j, (how, sampling) in enumerate(zip(hows, ({}, {}, {"temperature": 2.0, "top_k": 9}), strict=True)):
        n = how.get("max_gen_toks") or how["max_new_tokens"]
        prompts = [llm.tokenizer.encode(text)[-(96 - n) :] for text in texts]
        needed = llm.generate(prompts, n, stop=how["until"] or None, seed=0, **{"temperature": 0.0, **sampling})
        assert found[j::3] == [result.text for result in needed]


def test_what_a_task_asks_for_is_honoured_or_refused() -> None:
    greedy = {"temperature": 0.0, "max_tokens": 95, "stop": [], "seed": 0}
    assert generation_options({}, 96) == greedy
    assert generation_options({"do_sample": False, "temperature": 0.7, "until": "a"}, 96) == {**greedy, "stop": ["a"]}
    assert generation_options({"temperature": 0.7, "max_gen_toks": 5}, 96) == {
        **greedy,
        "temperature": 0.7,
        "max_tokens": 5,
    }
    with pytest.raises(UsageError, match="generation_kwargs: num_beams is not supported; temperature, top_k"):
        generation_options({"num_beams": 4}, 96)


# ---------------------------------------------------------------- lm-eval's own runner

TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "until": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
}
"""What lm-eval can ask for, as tasks of local files."""


def write_tasks(folder: Path) -> None:
    """40 questions with four answers each, of which a random one counts as right; 8 texts to go on, 6 to measure."""
    draw = random.Random(7)

    def story() -> str:
        name, animal = draw.choice(["Tom", "Lily", "Ben", "Sue", "Mia"]), draw.choice(["cat", "dog", "bird", "frog"])
        kind = draw.choice(["girl", "boy"])
        return f"Once upon a time, there was a little {kind} named {name}. {name} had a {animal}. One day, {name} went"

    answers = [" to the park", " to the shop with a friend.", " moon rock.", " and the of", " home", " zoo seven"]
    documents: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"question": story(), "choices": draw.sample(answers, 4), "gold": draw.randrange(4)} for _ in range(40)
        ],
        "until": [{"question": story(), "answer": " to the park"} for _ in range(8)],
        "rolling": [{"page": " ".join(story() + " home." for _ in range(1 + 3 * i))} for i in range(6)],
    }
    for name, how in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents[name]))
        source = (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(f"task: npllama_{name}\n{source}{how}")


def hugging_face(checkpoint: Path, add_bos_token: bool) -> object:
    """The Hugging Face backend of lm-eval."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=8, add_bos_token=add_bos_token)


def evaluated(model: object, folder: Path, *names: str) -> dict[str, Any]:
    """What lm-eval's runner finds on some of the tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = simple_evaluate(
        model, tasks=[f"npllama_{name}" for name in names], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return dict(found)


def missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # not even the package that it is in
        return True


@pytest.mark.skipif(
    any(map(missing, ("lm_eval", "torch", "transformers", "accelerate", "google.protobuf"))),
    reason="compares with lm-eval's Hugging Face backend, which needs torch, transformers, accelerate, protobuf",
)
def test_lm_eval_finds_the_same_as_with_its_hugging_face_backend(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    from npllama.integrations.lm_eval import NpllamaLM

    write_tasks(tmp_path)
    checkpoint = shared_data / "stories260K-hf-safetensors"
    model = NpllamaLM(str(checkpoint))
    with model.llama:
        ours = evaluated(model, tmp_path, *TASKS)
    theirs = evaluated(hugging_face(checkpoint, add_bos_token=True), tmp_path, "choice", "until")
    # With a BOS of its own a text has two there, of which the second counts as a part of it.
    theirs["samples"] |= evaluated(hugging_face(checkpoint, add_bos_token=False), tmp_path, "rolling")["samples"]
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["npllama_choice"][metric] == theirs["results"]["npllama_choice"][metric]
    assert 0 < ours["results"]["npllama_choice"]["acc,none"] < 1
    for name in TASKS:
        both = zip(*(found["samples"][f"npllama_{name}"] for found in (ours, theirs)), strict=True)
        for own, other in both:
            if name == "until":
                assert own["resps"][0][0].removeprefix(" ") == other["resps"][0][0]  # theirs lose the space in front
                continue
            for mine, needed in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
                if name == "choice":
                    assert mine[1] == needed[1]
                    mine, needed = mine[0], needed[0]
                assert float(mine) == pytest.approx(float(needed), abs=1e-3)
