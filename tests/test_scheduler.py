"""Texts in company are those of single runs, whatever else happens; nothing is lost. See tools/hammer_scheduler.py."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import npllama
from npllama.inference import DEMO, Llama
from npllama.store.export import quantize_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import hammer_scheduler  # type: ignore[import-not-found]

BACKEND = "numpy" if os.environ.get("NPLLAMA_BACKEND") == "numpy" else "numba"
N_SCHEDULES, CONTEXT = 25, 768


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hammer_scheduler.Texts]:
    with hammer_scheduler.open_tiny(tmp_path_factory.mktemp("scheduler") / "model", "numpy") as llm:
        yield hammer_scheduler.Texts(llm, 0)


@pytest.mark.parametrize("seed", range(10_000, 10_000 + N_SCHEDULES))
def test_random_schedules_lose_no_block_and_change_no_text(texts: hammer_scheduler.Texts, seed: int) -> None:
    """The thousand: python tools/hammer_scheduler.py schedules"""
    hammer_scheduler.run_schedule(texts, seed)


def test_threads_that_submit_cancel_and_time_out_get_right_texts(texts: hammer_scheduler.Texts) -> None:
    """The ten minutes, in which memory is looked at too: python tools/hammer_scheduler.py threads"""
    assert hammer_scheduler.hammer_threads(texts, 5.0) in (0, 3)


@pytest.fixture(scope="module", params=["tiny"] if BACKEND == "numpy" else ["q8", "q4", "f32"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """A tiny model in NumPy; compiled, the demo model in number formats whose texts are to be equal to the bit."""
    folder = tmp_path_factory.mktemp("scheduler") / request.param
    if request.param == "tiny":
        found = hammer_scheduler.open_tiny(folder, BACKEND, CONTEXT)
    elif request.param == "f32":
        found = npllama.load(DEMO, BACKEND, context=CONTEXT)
    else:
        quantize_model(DEMO, folder, request.param)
        found = npllama.load(folder, BACKEND, context=CONTEXT)
    with found:
        yield found


def test_ragged_prompts_in_company_give_the_texts_of_single_runs(llm: Llama) -> None:
    rng = random.Random(1)
    n_ids = llm.config.vocab_size
    beginning = [rng.randrange(3, n_ids) for _ in range(700)]
    prompts, options = [], []
    for i in range(64):
        n = rng.choice((3, 9, 17, 60, 130)) if i % 8 else rng.choice((64, 300, 700))
        prompts.append([*beginning[: n // 2], *(rng.randrange(3, n_ids) for _ in range(n - n // 2))])
        options.append({"seed": i, "temperature": rng.choice((0.0, 0.7)), "max_tokens": rng.choice((2, 12, 20))})
    handles = [llm.submit(p, **o) for p, o in zip(prompts, options, strict=True)]
    together = [handle.result(300) for handle in handles]
    alone = [llm.generate(p, **o) for p, o in zip(prompts, options, strict=True)]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    hammer_scheduler.assert_whole(llm.runtime.scheduler)
