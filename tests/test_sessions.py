"""Sessions: a text goes on as one call would have written it, wherever it was cut, rewound, forked or saved."""

from __future__ import annotations

import dataclasses
import gc
import os
import random
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest

import npllama
from npllama.inference import Llama, Session

CONFIG = dataclasses.replace(helpers.TINY, max_seq_len=256)
BLOCK_BYTES = 64 * CONFIG.n_layers * CONFIG.n_kv_heads * 2 * 4 * CONFIG.head_dim
CLOSE = 0 if os.environ.get("NPLLAMA_BACKEND") == "numba" else 1e-3
"""NumPy's products of many rows may differ in the last bit from those of one, and a rounded input then by a step."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sessions") / "model"
    helpers.write_any_model(folder, "q8", CONFIG)  # whose numbers do not depend on how a text is cut
    return folder


@pytest.fixture
def llm(folder: Path):
    with npllama.load(folder) as llm:
        yield llm
        gc.collect()
        pool = llm.runtime.scheduler.pool
        pool.check()


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, CONFIG.vocab_size, n).tolist()


def available(llm: Llama) -> int:
    with llm.runtime.scheduler.between_steps():
        llm.runtime.scheduler.pool.check()
    return llm.runtime.scheduler.pool.available


# ---------------------------------------------------------------- scripts


class Script:
    """Random calls of a few sessions; what each generates is held against one unbroken call of another model."""

    def __init__(self, seed: int, llm: Llama, plain: Llama, rules: dict[str, Any], folder: Path) -> None:
        self.rng, self.llm, self.plain, self.rules, self.folder = random.Random(seed), llm, plain, rules, folder
        self.most = 1000 if rules else llm.context
        first = llm.session(seed=seed, **rules)
        first.append(ids_of(seed, self.rng.randint(1, 100)))
        self.texts: list[tuple[Session, list[int]]] = [(first, first.tokens)]

    def run(self) -> None:
        for action in self.rng.choices(ACTIONS, k=9):
            session, ids = self.rng.choice(self.texts)
            action(self, session, ids)
            assert [one.tokens for one, _ in self.texts] == [own for _, own in self.texts]
        for session, _ in self.texts:
            session.close()
        assert available(self.llm) == self.llm.runtime.scheduler.pool.capacity

    def append(self, session: Session, ids: list[int]) -> None:
        more = ids_of(self.rng.randrange(100), self.rng.randint(0, 60))
        if len(ids) + len(more) <= self.most:
            session.append(more)
            ids += more

    def generate(self, session: Session, ids: list[int]) -> None:
        if len(ids) < self.most:
            n, options = self.rng.randint(0, 9), self.options()
            expected = self.plain.generate(ids, n, seed=session.seed, **options, **self.rules)
            result = session.generate(n, **options)
            assert (result.tokens, result.finish_reason) == (expected.tokens, expected.finish_reason), (ids, options)
            assert result.slid_tokens == expected.slid_tokens
            ids += result.tokens

    def stream(self, session: Session, ids: list[int]) -> None:
        if len(ids) < self.most:
            n, options = self.rng.randint(1, 9), self.options()
            expected = self.plain.generate(ids, n, seed=session.seed, **options, **self.rules)
            read = [piece.token for _, piece in zip(range(self.rng.randint(1, n)), session.stream(n, **options))]  # noqa: B905
            found = [token for token in read if token is not None]
            assert found == expected.tokens[: len(found)], (ids, options)
            ids += found

    def options(self) -> dict[str, Any]:
        greedy = {"temperature": 0.0, "repeat_penalty": 1.2}
        return self.rng.choice((greedy, {"temperature": 1.0}, {"repeat_penalty": 1.3}))

    def logits(self, session: Session, ids: list[int]) -> None:
        if not self.rules:
            np.testing.assert_allclose(session.logits, self.plain.logits(ids)[-1], rtol=0, atol=CLOSE)

    def rewind(self, session: Session, ids: list[int]) -> None:
        n = self.rng.randint(1, len(ids))
        session.rewind(n)
        del ids[n:]

    def fork(self, session: Session, ids: list[int]) -> None:
        if len(self.texts) < 3:
            self.texts += [(fork, list(ids)) for fork in session.fork(self.rng.randint(1, 2))]

    def save(self, session: Session, ids: list[int]) -> None:
        session.save(self.folder)
        session.close()
        loaded = npllama.load_session(self.folder, self.llm)
        assert loaded.seed == session.seed
        self.texts[[one for one, _ in self.texts].index(session)] = (loaded, ids)


ACTIONS = [
    *(Script.append, Script.generate, Script.generate, Script.stream),
    *(Script.logits, Script.rewind, Script.fork, Script.save),
]


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(
    ("kv_dtype", "rules"),
    [("f32", {}), ("q8", {}), ("f32", {"context_policy": "slide"}), ("q8", {"context_policy": "slide", "n_keep": 70})],
)
def test_a_session_goes_on_as_one_unbroken_call(
    folder: Path, tmp_path: Path, kv_dtype: str, rules: dict[str, Any], part: int
) -> None:
    """50 scripts of each kind, in a pool that is too small for what the sessions of a script hold together."""
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "context": 160 if rules else 256}
    n_bytes = BLOCK_BYTES if kv_dtype == "f32" else BLOCK_BYTES // 2
    memory = (14 if rules else 5) * n_bytes
    with (
        npllama.load(folder, kv_memory=memory, **options) as llm,
        npllama.load(folder, parallel=1, **options) as plain,
    ):
        for seed in range(part, 50, 4):
            Script(seed, llm, plain, rules, tmp_path / "session").run()
