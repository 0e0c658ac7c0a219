"""Saved sessions: what is written, found again, and refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from pathlib import Path
from typing import Any

import helpers
import pytest
from session_models import CONFIG, available, folder, ids_of, llm

import npllama
from npllama.cache import row_bytes
from npllama.errors import ContextError, ModelError
from npllama.generation.sessions.files import check_of
from npllama.inference import Llama

__all__ = ["folder", "llm"]  # fixtures


@pytest.fixture
def saved(llm: Llama, tmp_path: Path) -> Path:
    """A session of 201 ids: four blocks, of the last of which 8 rows are kept."""
    with llm.session(seed=5) as session:
        session.append(ids_of(20, 201))
        session.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8"])
def test_a_file_holds_the_rows_that_are_used(folder: Path, tmp_path: Path, kv_dtype: str) -> None:
    with npllama.load(folder, kv_dtype=kv_dtype) as llm, llm.session() as session:
        session.append(ids_of(20, 201))
        for _ in range(2):  # what was read already, and what was not
            session.save(tmp_path / "saved")
            sizes = {path.name: path.stat().st_size for path in (tmp_path / "saved").iterdir()}
            row = CONFIG.n_layers * CONFIG.n_kv_heads * row_bytes(CONFIG.head_dim, kv_dtype)
            headers = 128 * (len(sizes) - 1)
            assert sum(sizes.values()) - sizes["session.json"] == headers + 201 * 4 + 200 * 2 * row
            session.generate(0)


def test_what_slid_out_is_not_saved(folder: Path, tmp_path: Path) -> None:
    with npllama.load(folder, context=100) as llm, llm.session(seed=3, context_policy="slide") as session:
        session.append(ids_of(20, 640))
        session.save(tmp_path / "saved")
        n_rows = 64 + (639 - 512)  # the block of the sinks, and those from position 639 - 96 + 1 on
        row = CONFIG.n_layers * CONFIG.n_kv_heads * row_bytes(CONFIG.head_dim, "f32")
        assert (tmp_path / "saved" / "k.npy").stat().st_size == 128 + n_rows * row
        expected = session.generate(9)
    with npllama.load(folder, context=100) as llm, npllama.load_session(tmp_path / "saved", llm) as session:
        result = session.generate(9)
        assert (result.tokens, result.slid_tokens) == (expected.tokens, expected.slid_tokens)
        assert result.usage.cached_tokens == 639, "nothing is read again"
        assert llm.runtime.scheduler.pool.capacity - available(llm) <= 4


def test_a_loaded_session_is_found_by_others_and_reads_only_the_last_id(folder: Path, saved: Path) -> None:
    with npllama.load(folder) as llm:
        first, second = (npllama.load_session(saved, llm) for _ in range(2))
        assert available(llm) == llm.runtime.scheduler.pool.capacity, "until it is needed, all stays in the files"
        assert first.generate(3).usage.cached_tokens == 200
        assert llm.generate(ids_of(20, 195), 1).usage.cached_tokens == 192
        taken = available(llm)
        assert second.generate(3).tokens == first.tokens[201:]
        assert available(llm) == taken - 1, "three blocks are shared"


def test_what_was_rewound_before_it_was_needed_is_read_from_the_files_too(folder: Path, saved: Path) -> None:
    with npllama.load(folder) as llm, npllama.load_session(saved, llm) as session:
        session.rewind(150)
        session.append(ids_of(21, 10))
        result = session.generate(4, temperature=0)
        assert result.usage.cached_tokens == 150
        assert result.tokens == llm.generate([*ids_of(20, 150), *ids_of(21, 10)], 4, temperature=0).tokens


def test_a_seed_and_the_forks_to_come_are_saved(llm: Llama, tmp_path: Path) -> None:
    with llm.session(seed=2**64 - 1) as session:
        session.fork(2)
        session.save(tmp_path / "saved")
        loaded = npllama.load_session(tmp_path / "saved", llm)
        assert (loaded.seed, loaded.tokens) == (2**64 - 1, [])
        assert loaded.fork()[0].seed == session.fork()[0].seed


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "presence_penalty": 1.0}])
def test_mirostat_goes_on_where_it_ended_over_calls_rewinds_forks_and_files(
    llm: Llama, tmp_path: Path, options: dict[str, Any]
) -> None:
    mirostat = {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.6, "ignore_eos": True, **options}
    expected = llm.generate(ids_of(1, 20), 40, seed=6, **mirostat).tokens
    with llm.session(seed=6) as session:
        session.append(ids_of(1, 20))
        session.generate(7, **mirostat)
        for _, _ in zip(range(5), session.stream(30, **mirostat)):  # noqa: B905  (what is computed ahead is forgotten)
            pass
        gc.collect()
        session.generate(13, **mirostat)
        session.rewind(20 + 16)
        session.generate(4, **mirostat)
        session.save(tmp_path / "saved")
        fork = session.fork()[0]
        assert fork._mus == session._mus
        loaded = npllama.load_session(tmp_path / "saved", llm)
        for one in (session, loaded):
            one.generate(20, **mirostat)
            assert one.tokens[20:] == expected
        mus = dict(session._mus)
        session.append([5, 6])
        session.generate(2, temperature=0)
        assert session._mus == mus, "another call leaves it as it is"
        session.rewind(20)
        assert session._mus == {}
        assert session.generate(9, **mirostat).tokens == expected[:9]


def test_what_a_session_says_of_mirostat_is_checked(folder: Path, llm: Llama, tmp_path: Path) -> None:
    with llm.session(seed=6) as session:
        session.append(ids_of(1, 20))
        session.save(tmp_path / "saved")
        manifest = json.loads((tmp_path / "saved" / "session.json").read_text())
        assert "mirostat" not in manifest, "what older versions read"
    for wrong in (7, [1], [21, 1.0], [3, "x"], [True, 1.0], [3, 1.0, 2], {}):
        changed = {**manifest, "mirostat": wrong}
        changed["check"] = check_of(changed)
        (tmp_path / "saved" / "session.json").write_text(json.dumps(changed))
        assert "session.json: mirostat is " in loading(folder, tmp_path / "saved")


def test_saving_replaces_a_session_whole_or_not_at_all_and_nothing_else(
    llm: Llama, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with llm.session() as session:
        session.append([3, 4, 5])
        monkeypatch.setattr("npllama.generation.sessions.files._manifest", lambda *_: os.stat("/nowhere"))
        with pytest.raises(ModelError, match="cannot be written"):
            session.save(saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
        assert os.listdir(saved.parent) == ["saved"]
        monkeypatch.undo()
        session.save(saved)
        assert npllama.load_session(saved, llm).tokens == [3, 4, 5]
        (saved / "notes.txt").write_text("mine")
        with pytest.raises(ModelError, match=r"saved: holds 'notes.txt', and a session replaces nothing but a saved"):
            session.save(saved)
        with pytest.raises(ModelError, match=r"notes.txt: is no saved session \(Not a directory\)"):
            session.save(saved / "notes.txt")


def loading(folder: Path, saved: Path, **options: Any) -> str:
    """What loading a session into a model says."""
    with npllama.load(folder, **options) as llm, pytest.raises((ModelError, ContextError)) as error:
        npllama.load_session(saved, llm)
    return str(error.value)


def test_another_model_is_refused_with_what_differs(folder: Path, saved: Path, tmp_path: Path) -> None:
    assert "saved with kv_dtype 'f32', and this model keeps 'q8'; load the model with the same" in loading(
        folder, saved, kv_dtype="q8"
    )
    assert "saved: has 201 tokens, the context holds 200; load the model with a context of 201" in loading(
        folder, saved, context=200
    )
    helpers.write_model_directory(tmp_path / "other", CONFIG, seed=1)
    assert "saved: was saved with other weights (sha256 '" in loading(tmp_path / "other", saved)
    helpers.write_model_directory(tmp_path / "turns", dataclasses.replace(CONFIG, rope_theta=5000.0))
    assert "another model, whose rope_theta is 10000.0 and not 5000.0; open the model" in loading(
        tmp_path / "turns", saved
    )
    with npllama.load(folder, context=100) as llm, llm.session(context_policy="slide") as session:
        session.append([3])
        session.save(saved)
    assert "a window of 96 positions and 4 that stay, here they are 116 and 4; load the model with the context" in (
        loading(folder, saved, context=120)
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("session.json", "session.json: is missing, and a saved session needs it"),
        ("k.npy", "k.npy: is missing, and a saved session needs it; save the session again"),
        ("tokens.npy", "tokens.npy: is missing"),
    ],
)
def test_a_file_that_is_missing_is_named(folder: Path, saved: Path, file: str, message: str) -> None:
    (saved / file).unlink()
    assert message in loading(folder, saved)


@pytest.mark.parametrize("file", ["k.npy", "v.npy", "tokens.npy", "session.json"])
def test_a_file_that_is_cut_short_is_named(folder: Path, saved: Path, file: str) -> None:
    (saved / file).write_bytes((saved / file).read_bytes()[:-1])
    assert f"{saved / file}: " in (found := loading(folder, saved))
    assert found.endswith("save the session again.")


@pytest.mark.parametrize(("file", "at"), [("tokens.npy", 200), ("session.json", 600)])
def test_a_file_that_was_altered_is_named(folder: Path, saved: Path, file: str, at: int) -> None:
    data = bytearray((saved / file).read_bytes())
    data[at] ^= 1
    (saved / file).write_bytes(data)
    assert f"{saved / file}: " in loading(folder, saved)


@pytest.mark.parametrize("file", ["k.npy", "v.npy"])
def test_a_block_is_checked_when_it_is_needed_first(folder: Path, saved: Path, file: str) -> None:
    row = CONFIG.n_layers * CONFIG.n_kv_heads * 4 * CONFIG.head_dim
    data = bytearray((saved / file).read_bytes())
    data[128 + 70 * row] ^= 1
    (saved / file).write_bytes(data)
    with npllama.load(folder) as llm, npllama.load_session(saved, llm) as session:
        for _ in range(2):
            with pytest.raises(ModelError, match=f"{file}: positions 64 to 127 are not what was saved"):
                session.generate(1)
            assert available(llm) == llm.runtime.scheduler.pool.capacity
        session.rewind(60)
        assert session.generate(1).usage.cached_tokens == 59, "the damage lies behind"
