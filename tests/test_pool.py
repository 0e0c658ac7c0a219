"""The pool of blocks: who has them, what is shared, what is found again, and that none is ever lost."""

from __future__ import annotations

import os
import random

import helpers
import numpy as np
import pytest

from npllama.cache import NO_WINDOW
from npllama.errors import UsageError
from npllama.execution.engine import Engine
from npllama.generation.pool import Pool, PoolFullError, Sequence
from npllama.store.opening import open_model

VOCAB = helpers.TINY.vocab_size


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("pool") / "model"
    helpers.write_model_directory(folder)
    return Engine(open_model(folder), os.environ.get("NPLLAMA_BACKEND", "auto"))


def ids_of(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def feed(engine: Engine, pool: Pool, sequence: Sequence, ids: list[int], part: int = 50) -> np.ndarray:
    """Feed what is missing of a text, part by part: the last logits."""
    while sequence.length < len(ids):
        start = sequence.length
        n = min(part, len(ids) - start)
        sequence.reserve(n)
        pos = range(start, start + n)
        logits = engine.forward(pool.cache, ids[start : start + n], pos, [sequence.row] * n, [n - 1])
        sequence.written(ids)
        pool.check()
    return logits[0]


def expected(engine: Engine, ids: list[int], window: int = 0, n_sink: int = 0) -> np.ndarray:
    cache = engine.new_cache(1, len(ids), window, n_sink)
    return engine.forward(cache, ids, range(len(ids)), [0] * len(ids), [len(ids) - 1])[0]


def test_a_text_gives_back_all_its_blocks(engine: Engine) -> None:
    pool = Pool(engine, 4, b"")
    ids = ids_of(0, 200)
    sequence = Sequence(pool)
    np.testing.assert_allclose(feed(engine, pool, sequence, ids), expected(engine, ids), atol=1e-5)
    assert pool.available == 0
    with pytest.raises(PoolFullError, match="all 4 blocks of 64 positions are in use"):
        sequence.reserve(200)
    sequence.close()
    sequence.close()
    pool.check()
    assert pool.available == 4


def test_what_a_text_began_with_is_found_again_but_for_its_last_id(engine: Engine) -> None:
    pool = Pool(engine, 8, b"")
    ids = ids_of(0, 200)
    first = Sequence(pool)
    feed(engine, pool, first, ids)
    for n, found in ((200, 192), (193, 192), (192, 128), (64, 0), (65, 64), (1, 0)):
        again = Sequence(pool)
        assert again.adopt(ids[:n]) == found
        assert pool.available == 4
        again.close()
    first.close()
    other = [*ids[:100], 1 + ids[100] % (VOCAB - 1), *ids[101:]]
    assert other != ids
    again = Sequence(pool)
    assert again.adopt(other) == 64
    np.testing.assert_allclose(feed(engine, pool, again, other), expected(engine, other), atol=1e-5)
    again.close()
    for window, n_sink in ((50, 0), (NO_WINDOW, 4)):
        assert Sequence(pool, window, n_sink).adopt(ids) == 0, "keys depend on what was seen"
    assert Sequence(Pool(engine, 8, b"other")).adopt(ids) == 0


def test_what_was_used_longest_ago_goes_first_and_beginnings_stay_longest(engine: Engine) -> None:
    pool = Pool(engine, 6, b"")
    texts = [ids_of(seed, 129) for seed in range(3)]
    for ids in texts[:2]:
        sequence = Sequence(pool)
        feed(engine, pool, sequence, ids)
        sequence.close()
    sequence = Sequence(pool)
    feed(engine, pool, sequence, texts[2])
    found = []
    for ids in texts:
        again = Sequence(pool)
        found.append(again.adopt(ids))
        again.close()
    assert found == [64, 128, 128]
    sequence.close()
    pool.check()


@pytest.mark.parametrize(("window", "n_sink"), [(100, 0), (100, 5), (70, 65), (1, 0), (64, 64)])
def test_a_window_needs_few_blocks_and_a_hit_only_those_that_are_seen(engine: Engine, window: int, n_sink: int) -> None:
    pool = Pool(engine, 16, b"")
    ids = ids_of(1, 700)
    sequence = Sequence(pool, window, n_sink)
    most = 0
    for n in range(40, 701, 60):
        found = feed(engine, pool, sequence, ids[:n], 20)
        most = max(most, sequence.n_held)
    np.testing.assert_allclose(found, expected(engine, ids, window, n_sink), atol=1e-5)
    assert most <= -(-window // 64) + -(-n_sink // 64) + 2
    sequence.close()
    again = Sequence(pool, window, n_sink)
    assert again.adopt(ids) == 640
    np.testing.assert_allclose(feed(engine, pool, again, ids), found, atol=1e-5)
    if window > 1:  # else a position sees itself alone
        with pytest.raises(UsageError, match=r"rewind to 300: .* were given back"):
            again.rewind(300)
    again.close()
    pool.check()
    assert pool.available == 16


def test_a_fork_takes_no_block_until_it_writes_and_then_one(engine: Engine) -> None:
    pool = Pool(engine, 8, b"")
    ids = ids_of(2, 100)
    first = Sequence(pool)
    feed(engine, pool, first, ids)
    forks = [first.fork() for _ in range(3)]
    assert pool.available == 6
    for i, fork in enumerate(forks):
        text = [*ids, *ids_of(10 + i, 5)]
        assert fork.needed(5) == 1
        np.testing.assert_allclose(feed(engine, pool, fork, text), expected(engine, text), atol=1e-5)
        assert pool.available == 5 - i
    text = [*ids, *ids_of(20, 5)]
    np.testing.assert_allclose(feed(engine, pool, first, text), expected(engine, text), atol=1e-5)
    assert pool.available == 3, "the last of those who shared a block writes it as it is"
    for sequence in (first, *forks):
        sequence.close()
    assert pool.available == 8


def test_rewinding_gives_blocks_back_and_what_follows_is_right(engine: Engine) -> None:
    pool = Pool(engine, 8, b"")
    ids = ids_of(3, 300)
    sequence = Sequence(pool)
    feed(engine, pool, sequence, ids)
    for n, held in ((299, 5), (193, 4), (128, 2), (100, 2), (0, 0)):
        sequence.rewind(n)
        assert (sequence.length, sequence.n_held) == (n, held)
        text = [*ids[:n], *ids_of(n, 30)]
        np.testing.assert_allclose(feed(engine, pool, sequence, text), expected(engine, text), atol=1e-5)
        sequence.rewind(n)
    for n in (-1, 1):
        with pytest.raises(UsageError, match=f"rewind to {n}: the sequence has 0 positions"):
            sequence.rewind(n)


@pytest.mark.parametrize("seed", range(12))
def test_random_use_loses_no_block_and_no_bit(engine: Engine, seed: int) -> None:
    """Texts that begin alike are fed, forked, rewound, closed and begun anew, in a pool that is often full."""
    rng = random.Random(seed)
    pool = Pool(engine, rng.randint(6, 14), b"")
    window, n_sink = rng.choice([(NO_WINDOW, 0), (90, 0), (70, 6)])
    begins = [ids_of(i, 150) for i in range(2)]
    under_way: list[tuple[Sequence, list[int]]] = []
    for _ in range(60):
        action = rng.choice(("begin", "feed", "feed", "fork", "rewind", "close"))
        if action == "begin" and len(under_way) < 4:
            sequence, ids = Sequence(pool, window, n_sink), list(rng.choice(begins)[: rng.randint(1, 150)])
            sequence.adopt(ids)
            under_way.append((sequence, ids))
        elif action != "begin" and under_way:
            sequence, ids = rng.choice(under_way)
            if action == "fork" and len(under_way) < 4:
                under_way.append((sequence.fork(), list(ids)))
            elif action == "rewind" and sequence.length:
                n = rng.randint(max(0, sequence.length - 40), sequence.length)
                try:
                    sequence.rewind(n)
                except UsageError:
                    continue
                del ids[n:]
            elif action == "close":
                sequence.close()
                under_way.remove((sequence, ids))
            elif action == "feed":
                ids.extend(ids_of(rng.randrange(10), rng.randint(1, 40)))
                del ids[250:]
                if sequence.length < len(ids):
                    try:
                        found = feed(engine, pool, sequence, ids, rng.choice((1, 17, 64)))
                    except PoolFullError:
                        sequence.close()
                        under_way.remove((sequence, ids))
                    else:
                        seen = 0 if window == NO_WINDOW else window
                        np.testing.assert_allclose(found, expected(engine, ids, seen, n_sink), atol=1e-5)
        pool.check()
    for sequence, _ in under_way:
        sequence.close()
    pool.check()
    assert pool.available == pool.capacity
