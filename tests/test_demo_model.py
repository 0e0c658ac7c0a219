"""Does the model that ships inside tell whole stories, as tools/train_demo.py proves it at length?"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import npllama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import story_grammar
import story_phrases
import train_demo

MAX_BYTES = 2_900_000


@pytest.fixture(scope="module")
def demo() -> Iterator[npllama.Llama]:
    with npllama.load(backend="numpy", threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def samples(demo: npllama.Llama) -> list[npllama.Result]:
    results = demo.generate([""] * 20, temperature=0.8, seed=train_demo.SAMPLE_SEED)
    assert isinstance(results, list)
    return results


def test_the_demo_model_is_small():
    assert sum(file.stat().st_size for file in train_demo.DEMO.iterdir()) <= MAX_BYTES


def test_the_demo_model_has_the_shape_that_the_training_script_names(demo):
    config = demo.config
    shape = (config.dim, config.n_layers, config.n_heads, config.n_kv_heads, config.vocab_size, config.hidden_dim)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim")
    assert shape == tuple(train_demo.MODEL[name] for name in names)
    assert config.n_kv_heads < config.n_heads


def test_every_story_comes_to_an_end(samples):
    assert [sample.finish_reason for sample in samples] == ["stop"] * len(samples)


def test_every_story_is_another_one(samples):
    texts = [sample.text for sample in samples]
    assert len(set(texts)) == len(texts)
    assert not story_grammar.shared_windows(texts)


def test_no_name_comes_from_nowhere(samples):
    names = set(story_phrases.GIRLS + story_phrases.BOYS)
    found = [len(names & set(re.findall(r"\w+", sample.text))) for sample in samples]
    assert all(n in (1, 2) for n in found)


def test_unseen_stories_surprise_the_model_no_more_than_those_it_learned_from(demo):
    seen = train_demo.perplexity(demo, list(story_grammar.stories(train_demo.TRAIN_SEED, 0, 60)))
    unseen = train_demo.perplexity(demo, list(story_grammar.stories(train_demo.HELD_OUT_SEED, 0, 60)))
    assert unseen < 1.1 * seen
