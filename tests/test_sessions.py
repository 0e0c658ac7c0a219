"""Sessions: a text goes on as one call would have written it, wherever it was cut, rewound, forked or saved."""

from __future__ import annotations

import gc
import random
import threading
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
from session_models import CONFIG, available, folder, ids_of, llm

import npllama
from npllama.errors import ContextError, UsageError
from npllama.generation.sessions.session import Session
from npllama.inference import Llama

__all__ = ["folder", "llm"]  # fixtures

BLOCK_BYTES = 64 * CONFIG.n_layers * CONFIG.n_kv_heads * 2 * 4 * CONFIG.head_dim
CLOSE = 1e-3  # a product of many rows may differ in the last bit from that of one, and a rounded input then by a step


@pytest.fixture(scope="module")
def q8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose numbers do not depend on how a text is cut, in NumPy too: rounded keys would magnify that."""
    folder = tmp_path_factory.mktemp("sessions-q8") / "model"
    helpers.write_any_model(folder, "q8", CONFIG)
    return folder


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
        for action in self.rng.choices(ACTIONS, k=7):
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
            n, options = self.rng.randint(0, 6), self.options()
            expected = self.plain.generate(ids, n, seed=session.seed, **options, **self.rules)
            result = session.generate(n, **options)
            assert (result.tokens, result.finish_reason) == (expected.tokens, expected.finish_reason), (ids, options)
            assert result.slid_tokens == expected.slid_tokens
            ids += result.tokens

    def stream(self, session: Session, ids: list[int]) -> None:
        if len(ids) < self.most:
            n, options = self.rng.randint(1, 6), self.options()
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


SLIDE: dict[str, Any] = {"context_policy": "slide"}


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize(
    ("kv_dtype", "rules", "count"),
    [("f32", {}, 40), ("f32", SLIDE, 40), ("q8", {}, 10), ("q8", {**SLIDE, "n_keep": 70}, 10)],
)
def test_a_session_goes_on_as_one_unbroken_call(
    folder: Path, q8_folder: Path, tmp_path: Path, kv_dtype: str, rules: dict[str, Any], count: int, part: int
) -> None:
    """Scripts, 200 in all, in a pool that is too small for what the sessions of a script hold together."""
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "context": 160 if rules else 256}
    n_bytes = BLOCK_BYTES if kv_dtype == "f32" else BLOCK_BYTES // 2
    model = folder if kv_dtype == "f32" else q8_folder
    n_bytes *= 14 if rules else 5
    with npllama.load(model, kv_memory=n_bytes, **options) as llm, npllama.load(model, **options) as plain:
        for seed in range(part * count, (part + 1) * count):
            Script(seed, llm, plain, rules, tmp_path / "session").run()


# ---------------------------------------------------------------- the text


def test_what_was_read_is_not_read_again(llm: Llama) -> None:
    with llm.session(seed=1) as session:
        session.append(ids_of(1, 70))
        assert session.generate(5, temperature=0).usage.cached_tokens == 0
        assert session.tokens[:70] == ids_of(1, 70)
        session.append(ids_of(2, 10))
        n = len(session.tokens)
        assert session.generate(5).usage.cached_tokens == n - 11, "all but the last id of the first call, and the new"
        session.rewind(72)
        assert session.generate(0).usage.cached_tokens == 71
    assert available(llm) == llm.runtime.scheduler.pool.capacity


def test_text_gets_bos_once_and_goes_on_where_it_ended(llm: Llama) -> None:
    with llm.session() as session:
        session.append("Hello")
        assert session.tokens == llm.tokenizer.encode("Hello")
        session.append(" there")
        session.append("fore")
        session.append("")
        assert session.tokens.count(llm.tokenizer.bos_id) == 1
        assert llm.tokenizer.decode(session.tokens) == "Hello therefore"
        session.append([llm.tokenizer.eos_id])
        session.append("Hello", bos=True)
        again = [llm.tokenizer.eos_id, *llm.tokenizer.encode("Hello")]
        assert session.tokens[-len(again) :] == again


def test_the_logits_are_those_of_the_next_token(llm: Llama) -> None:
    with llm.session() as session:
        for n in (1, 64, 65, 130):
            session.append(ids_of(3, 200)[len(session.tokens) : n])
            np.testing.assert_allclose(session.logits, llm.logits(session.tokens)[-1], rtol=0, atol=1e-5)
        session.logits[:] = 0
        assert session.logits.any(), "a copy"
        assert session.generate(3, temperature=0).tokens[0] == session.tokens[130]


def test_a_mark_is_where_the_text_ended(llm: Llama) -> None:
    with llm.session() as session:
        session.append(ids_of(4, 20))
        mark = session.mark()
        first = session.generate(6, temperature=0).tokens
        session.rewind(mark)
        assert session.tokens == ids_of(4, 20)
        assert session.generate(6, temperature=0).tokens == first
        for n in (-1, 27, "3", None, True):
            with pytest.raises(UsageError, match=r"rewind to .*: the session has 26 ids; it needs 0 to that many"):
                session.rewind(n)  # type: ignore[arg-type]


def test_rewinding_to_where_a_window_has_gone_past_computes_again(llm: Llama) -> None:
    with llm.session(context_policy="slide") as session:
        session.append(ids_of(5, 900))
        session.generate(0)
        session.rewind(301)
        expected = llm.generate(ids_of(5, 301), 4, temperature=0, context_policy="slide").tokens
        result = session.generate(4, temperature=0)
        assert result.tokens == expected


def test_forks_share_blocks_until_they_write_and_draw_for_themselves(llm: Llama) -> None:
    with llm.session(seed=7) as session:
        session.append(ids_of(6, 100))
        session.generate(0)
        before = available(llm)
        forks = session.fork(3)
        assert available(llm) == before
        assert len({session.seed, *(fork.seed for fork in forks)}) == 4
        for i, fork in enumerate(forks):
            result = fork.generate(3)
            assert result.usage.cached_tokens == 99
            assert result.tokens == llm.generate(ids_of(6, 100), 3, seed=fork.seed).tokens
            assert available(llm) == before - i - 1
        assert [fork.seed for fork in llm.session(seed=7).fork(3)] == [fork.seed for fork in forks]
        assert session.fork(1)[0].seed not in [fork.seed for fork in forks]
        assert session.tokens == ids_of(6, 100)
        with pytest.raises(UsageError, match=r"fork\(0\): needs how many sessions, 1 to 1024"):
            session.fork(0)


def test_a_stream_adds_what_was_read_of_it(llm: Llama) -> None:
    with llm.session(seed=2) as session:
        session.append(ids_of(7, 10))
        whole = llm.generate(ids_of(7, 10), 8, seed=2).tokens
        for i, piece in enumerate(session.stream(8)):
            assert piece.token == whole[i]
            if i == 2:
                break
        assert session.tokens == [*ids_of(7, 10), *whole[:3]]
        stream = session.stream(5)
        assert [piece.token for piece in stream if piece.token is not None] == whole[3:8]
        assert (stream.result.tokens, list(stream)) == (whole[3:8], [])
        assert session.tokens == [*ids_of(7, 10), *whole]


def test_one_call_at_a_time(llm: Llama) -> None:
    session = llm.session()
    session.append(ids_of(8, 10))
    stream = session.stream(8)
    next(stream)
    uses = [lambda: session.append([3]), lambda: session.generate(1), lambda: session.stream(1), session.fork]
    for use in [*uses, lambda: session.rewind(0), lambda: session.logits, lambda: session.save("never")]:
        with pytest.raises(UsageError, match="in use by another call or by a stream that was not read to its end"):
            use()
    assert len(session.tokens) == 11, "looking is free"
    stream.close()
    session.append([3])
    stream = session.stream(8)
    session.close()
    session.close()
    assert list(stream) == []
    for use in uses:
        with pytest.raises(UsageError, match="this session is closed"):
            use()
    assert available(llm) == llm.runtime.scheduler.pool.capacity


def test_a_call_that_fails_leaves_the_text_as_it_was(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    with llm.session() as session:
        session.append(ids_of(9, 80))
        calls: list[str] = []

        def failing(name: str, usual: Any) -> Any:
            def call(*arguments: Any) -> Any:
                calls.append(name)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return usual(*arguments)

            return call

        for name in ("forward", "run_steps"):
            monkeypatch.setattr(llm.engine, name, failing(name, getattr(llm.engine, name)))
        with pytest.raises(KeyboardInterrupt):
            session.generate(8, temperature=0)
        assert session.tokens == ids_of(9, 80)
        assert session.generate(8, temperature=0).tokens == llm.generate(ids_of(9, 80), 8, temperature=0).tokens


def test_a_session_that_is_forgotten_gives_its_blocks_back(llm: Llama) -> None:
    session = llm.session()
    session.append(ids_of(10, 70))
    session.generate(0)
    assert available(llm) == llm.runtime.scheduler.pool.capacity - 2
    del session
    gc.collect()
    assert available(llm) == llm.runtime.scheduler.pool.capacity


def test_whoever_needs_the_blocks_gets_them_and_the_text_is_read_again(folder: Path) -> None:
    with npllama.load(folder, kv_memory=5 * BLOCK_BYTES) as llm:
        sessions = [llm.session(seed=seed) for seed in range(3)]
        for seed, session in enumerate(sessions):
            session.append(ids_of(seed, 120))
            session.generate(2)
        assert available(llm) <= 1
        llm.generate(ids_of(11, 250), 2)
        for seed, session in enumerate(sessions):
            expected = llm.generate(ids_of(seed, 120), 6, seed=seed).tokens
            session.generate(4)
            assert session.tokens == [*ids_of(seed, 120), *expected]
            session.close()
        assert available(llm) == 5


def test_sessions_in_many_threads_say_what_each_says_alone(llm: Llama) -> None:
    texts: dict[int, list[int]] = {}

    def talk(seed: int) -> None:
        with llm.session(seed=seed) as session:
            for i in range(4):
                session.append(ids_of(seed + i, 9))
                session.generate(3)
            texts[seed] = session.tokens

    threads = [threading.Thread(target=talk, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(texts)
    for seed in range(6):
        talk(seed)
    assert texts == together
    assert len(texts) == 6


def test_a_session_is_forked_and_saved_between_the_steps_of_others(llm: Llama, tmp_path: Path) -> None:
    with llm.session() as session:
        session.append(ids_of(12, 70))
        session.generate(0)
        endless = llm.submit(ids_of(13, 10), max_tokens=10**6, temperature=0, context_policy="slide")
        session.fork(2)
        session.save(tmp_path / "saved")
        assert not endless.done(), "nobody waits until others have ended"
        assert npllama.load_session(tmp_path / "saved", llm).generate(2).usage.cached_tokens == 69
        endless.cancel()
        assert endless.result().finish_reason == "cancelled"


def test_what_cannot_be_is_refused(llm: Llama) -> None:
    with llm.session() as session:
        for use in (lambda: session.generate(1), lambda: session.logits, session.stream):
            with pytest.raises(UsageError, match="this session has no token yet; append text or ids first"):
                use()
        session.append([])
        assert session.fork()[0].tokens == []
        for wrong, message in (
            ([300], "token ids must be 0 to 299"),
            (b"x", "a prompt is text"),
            (3, "a prompt is text"),
        ):
            with pytest.raises(UsageError, match=message):
                session.append(wrong)  # type: ignore[arg-type]
        session.append(ids_of(12, 250))
        with pytest.raises(
            ContextError, match="the session has 250 tokens and 7 more do not fit, the context holds 256"
        ):
            session.append(ids_of(13, 7))
        session.append(ids_of(13, 6))
        with pytest.raises(ContextError, match="the prompt has 256 tokens and needs room for one more"):
            session.generate(1)
        assert session.logits.shape == (CONFIG.vocab_size,)
        session.rewind(3)
        for name, advice in (("n", "fork"), ("bos", "append"), ("n_keep", "is made"), ("context_policy", "is made")):
            with pytest.raises(UsageError, match=f"{name}= is no option of a session's call: .*{advice}"):
                session.generate(1, **{name: 1})
        with pytest.raises(TypeError, match="unexpected keyword argument 'top_q'"):
            session.generate(1, top_q=1)
    for options in (
        {"seed": -2},
        {"context_policy": "ring"},
        {"n_keep": -1},
        {"context_policy": "slide", "n_keep": 200},
    ):
        with pytest.raises(UsageError, match=next(reversed(options))):
            llm.session(**options)


def test_a_closed_model_refuses_its_sessions(folder: Path) -> None:
    llm = npllama.load(folder)
    session = llm.session()
    session.append(ids_of(14, 5))
    session.generate(1)
    llm.close()
    with pytest.raises(UsageError, match="this model is closed"):
        session.generate(1)
    session.close()


# ---------------------------------------------------------------- text without end


def test_sliding_takes_constant_memory_and_says_what_slid_out(folder: Path) -> None:
    with npllama.load(folder, context=100) as llm:
        pool = llm.runtime.scheduler.pool
        with llm.session(context_policy="slide", n_keep=10) as session:
            held = []
            session.append(ids_of(15, 50))
            for _ in range(12):
                result = session.generate(50)
                held.append(pool.capacity - available(llm))
                session.append(ids_of(16, 50 - len(result.tokens)))
                assert result.slid_tokens == max(0, len(session.tokens) - 50 + len(result.tokens) - 100)
            assert max(held[3:]) <= 4, "one block of sinks, and three that 90 positions may touch"
        assert available(llm) == pool.capacity


def test_until_something_slides_out_the_numbers_are_those_of_stop(folder: Path) -> None:
    with npllama.load(folder, context=150) as llm:
        stop, slide = llm.session(), llm.session(context_policy="slide", n_keep=7)
        for n in (3, 64, 130, 143, 144, 149, 150):
            for session in (stop, slide):
                session.append(ids_of(17, 150)[len(session.tokens) : n])
            np.testing.assert_array_equal(slide.logits, stop.logits)
        slide.append([5])
        assert slide.generate(1).slid_tokens == 2
