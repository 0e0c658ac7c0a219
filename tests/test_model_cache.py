"""The folder of models that checkpoints are exported to: processes at once, kills, damage, its limit, its commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import COMMAND, environment
from helpers import write_model_directory, write_safetensors_checkpoint
from model_folder import name_of, needs_locks

import npllama
from npllama.errors import ModelError, UsageError
from npllama.store import locks, model_cache, staging
from npllama.store.model_cache import entries, listed, models_directory, remove_models
from npllama.store.opening import is_model_file

pytestmark = pytest.mark.usefixtures("models")


# ---------------------------------------------------------------- two at once, interrupts


def start(*arguments: object, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(NPLLAMA_BACKEND="numpy", **changes),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


SLOW = """
import sys, time
import npllama

def wait(done, total, name):
    print("writing", flush=True)
    sys.stdin.read() if sys.argv[2] == "stdin" else time.sleep(600)

llm = npllama.load(sys.argv[1], progress=wait)
print(llm._opened.path.name)
"""
"""A process that stops in the midst of its export: until its stdin ends, or until it is ended."""


def exporting(checkpoint: Path, until: str) -> subprocess.Popen[str]:
    """A process that is in the midst of exporting."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(checkpoint), until],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(NPLLAMA_BACKEND="numpy"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


@needs_locks
def test_of_two_processes_one_exports_and_the_other_waits(checkpoint: Path) -> None:
    first = exporting(checkpoint, "stdin")
    second = start(*COMMAND, "generate", "-m", checkpoint, "-n", 3, "-p", "the cat")
    assert second.stderr is not None
    assert "another process is exporting it; waiting ..." in second.stderr.readline()
    out, _ = first.communicate("")
    rest, err = second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert rest
    assert "exporting it once" not in err
    assert [entry.name for entry in entries()] == [out.split()[-1]]


@needs_locks
def test_many_processes_at_once_make_one_model(checkpoint: Path) -> None:
    processes = [start(*COMMAND, "generate", "-m", checkpoint, "-n", 3, "-p", "the cat") for _ in range(4)]
    ends = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sum("exporting it once" in err for err in ends) == 1
    assert len(entries()) == 1


@needs_locks
def test_threads_of_one_process_make_one_model(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(name_of, [checkpoint] * 4))) == 1
    assert sum("exporting it once" in line for line in caplog.messages) == 1


@needs_locks
def test_who_waits_exports_when_the_other_is_killed(checkpoint: Path) -> None:
    first = exporting(checkpoint, "killed")
    second = start(*COMMAND, "generate", "-m", checkpoint, "-n", 3, "-p", "the cat")
    assert second.stderr is not None
    assert "waiting ..." in second.stderr.readline()
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0
    assert "exporting it once" in err
    assert sorted(os.listdir(models_directory())) == [entries()[0].name, f"{entries()[0].name}.npllama.json"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_leaves_nothing(checkpoint: Path, models: Path) -> None:
    process = exporting(checkpoint, "killed")
    assert len(os.listdir(models)) == 2  # the record and a partial directory
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert os.listdir(models) == []


# A child process is stopped at the n-th line that it executes in these files, for n spread over the whole way.
STOPPING = """
import os, signal, sys
import npllama.checkpoints, npllama.store.export
from npllama.store.direct import open_source
from npllama.store.opening import check_hashes

checkpoint, models, how, moments = *sys.argv[1:4], int(sys.argv[4])
SOURCES = ("direct.py", "model_cache.py", "locks.py", "export.py", "staging.py")
INTERRUPTED = ("direct.py", "model_cache.py", "locks.py", "export.py")

def child(stop_at):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(SOURCES) or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            count += 1
            if count == stop_at and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == stop_at and frame.f_code.co_filename.endswith(INTERRUPTED):
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        open_source(checkpoint).close()
    except KeyboardInterrupt:
        os._exit(130)
    sys.settrace(None)
    return count

lines = child(-1)
for moment in range(moments):
    if how == "interrupt":
        for name in os.listdir(models):
            path = os.path.join(models, name)
            for file in os.listdir(path) if os.path.isdir(path) else ():
                os.unlink(os.path.join(path, file))
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    if not (process := os.fork()):
        child(1 + moment * (lines - 1) // (moments - 1))
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    names = sorted(os.listdir(models))
    whole = [name for name in names if os.path.exists(os.path.join(models, name, "npllama.json"))]
    for name in whole:
        check_hashes(os.path.join(models, name)) if ".partial-" not in name else None
    print(status, len(names), len(whole))
    if how == "kill":
        open_source(checkpoint).close()  # whatever the kill has left
        (name,) = [name for name in os.listdir(models) if not name.endswith(".json")]
        check_hashes(os.path.join(models, name))
        for file in os.listdir(os.path.join(models, name)):
            os.unlink(os.path.join(models, name, file))
"""


def moments(checkpoint: Path, models: Path, how: str) -> list[list[int]]:
    """(exit status, names in the folder, whole models among them) after stops at 40 moments."""
    command = [sys.executable, "-c", STOPPING, *map(str, (checkpoint, models, how, 40))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="child processes are forked")


@pytest.mark.slow("stop a program at each of many moments")
@needs_fork
def test_an_interrupt_at_any_moment_leaves_nothing_or_a_whole_model(checkpoint: Path, models: Path) -> None:
    found = [(names, whole) for status, names, whole in moments(checkpoint, models, "interrupt") if status]
    assert len(found) > 20
    assert set(found) <= {(0, 0), (2, 1)}
    assert found.count((0, 0)) > 15


@pytest.mark.slow("stop a program at each of many moments")
@needs_fork
@needs_locks
def test_after_a_kill_at_any_moment_the_next_start_makes_the_model(checkpoint: Path, models: Path) -> None:
    found = moments(checkpoint, models, "kill")
    assert sum(status == signal.SIGKILL for status, *_ in found) > 35


@needs_locks
def test_what_a_kill_leaves_is_removed_by_the_next_command_that_looks(
    checkpoint: Path, models: Path, tmp_path: Path, call
) -> None:
    process = exporting(checkpoint, "killed")
    process.kill()
    process.communicate()
    assert len(os.listdir(models)) == 2
    write_safetensors_checkpoint(tmp_path / "other", seed=4)
    other = name_of(tmp_path / "other")
    assert sorted(os.listdir(models)) == [other, f"{other}.npllama.json"]


@needs_locks
def test_an_export_under_way_is_neither_listed_nor_removed(checkpoint: Path, models: Path, call) -> None:
    process = exporting(checkpoint, "stdin")
    assert json.loads(call("models", "--json").text)["models"] == []
    assert call("models", "rm", "--all").code == 0
    process.communicate("")
    assert process.returncode == 0
    assert len(listed()) == 1


def test_where_there_are_no_locks_a_checkpoint_runs_all_the_same(
    checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    name = name_of(checkpoint)
    assert name_of(checkpoint) == name
    assert [one.in_use for one in listed()] == [None]
    assert remove_models([name]) == [name]
    assert os.listdir(models) == []


# ---------------------------------------------------------------- damage


def test_a_kept_model_that_is_damaged_is_exported_again(
    checkpoint: Path, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = name_of(checkpoint)
    with open(models / name / "wq.npy", "r+b") as file:
        file.truncate(100)
    assert name_of(checkpoint) == name
    assert any("wq.npy" in line and "exported again" in line for line in caplog.messages)


def test_a_record_that_is_damaged_costs_nothing_but_the_line_in_the_list(checkpoint: Path, models: Path) -> None:
    name = name_of(checkpoint)
    for text in ("", "[]", '{"source": 3}', "\udcff"):
        (models / f"{name}.npllama.json").write_text(text, errors="surrogateescape")
        assert [(one.name, one.source) for one in listed()] == [(name, "unknown")]
        assert name_of(checkpoint) == name


def test_foreign_files_in_the_folder_are_left_alone(checkpoint: Path, models: Path, tmp_path: Path) -> None:
    models.mkdir()
    (models / "notes.txt").write_text("precious")
    (models / "run-446655440000.json").write_text("{}")
    write_model_directory(models / "own-0123456789ab")
    (models / "own-0123456789ab.partial-0badcafe").mkdir()
    before = set(os.listdir(models))
    name_of(checkpoint)
    remove_models(None)
    assert set(os.listdir(models)) == before


# ---------------------------------------------------------------- the limit


def used(path: Path, seconds_ago: float) -> None:
    record = models_directory() / f"{name_of(path)}.npllama.json"
    os.utime(record, (time.time() - seconds_ago,) * 2)


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three checkpoints, the first two exported, the first used longest ago; there is room for two."""
    paths = [tmp_path / f"c{i}" for i in range(3)]
    for i, path in enumerate(paths):
        write_safetensors_checkpoint(path, seed=i)
    for i, path in enumerate(paths[:2]):
        used(path, 1000 - i)
    size = max(one.size_bytes for one in listed())
    monkeypatch.setattr(model_cache, "SLACK_BYTES", size // 10)
    monkeypatch.setenv("NPLLAMA_MODELS_MAX_GB", str(2.5 * size / 1e9))
    return paths


def titles() -> list[str]:
    return sorted(one.name.split("-")[0] for one in listed())


@needs_locks
def test_the_model_used_longest_ago_goes_for_the_limit(three: list[Path]) -> None:
    name_of(three[2])
    assert titles() == ["c1", "c2"]


@needs_locks
def test_using_a_model_keeps_it(three: list[Path]) -> None:
    name_of(three[0])
    name_of(three[2])
    assert titles() == ["c0", "c2"]


@needs_locks
def test_a_model_in_use_stays_and_the_next_goes(three: list[Path]) -> None:
    with npllama.load(three[0]) as llm:
        os.utime(models_directory() / f"{llm._opened.path.name}.npllama.json", (0, 0))
        name_of(three[2])
        assert titles() == ["c0", "c2"]
        assert np.isfinite(llm.logits([1])).all()


@needs_locks
def test_where_all_are_in_use_the_export_is_refused_and_nothing_goes(three: list[Path]) -> None:
    with npllama.load(three[0]), npllama.load(three[1]), pytest.raises(ModelError, match="models in use leave"):
        npllama.load(three[2])
    assert titles() == ["c0", "c1"]
    name_of(three[2])
    assert len(titles()) == 2


@needs_locks
def test_a_model_larger_than_the_limit_is_refused_and_nothing_goes(
    three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPLLAMA_MODELS_MAX_GB", "0.00005")
    with pytest.raises(ModelError, match=r"NPLLAMA_MODELS_MAX_GB allows 0\.000 GB; raise it"):
        npllama.load(three[2])
    assert titles() == ["c0", "c1"]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "many"])
def test_a_limit_that_is_none_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NPLLAMA_MODELS_MAX_GB", value)
    with pytest.raises(UsageError, match="needs a number of gigabytes above 0"):
        npllama.load(checkpoint)


# ---------------------------------------------------------------- npllama models


def test_models_lists_names_sizes_formats_and_sources(call, checkpoint: Path, models: Path) -> None:
    name = name_of(checkpoint, "q4")
    done = call("models")
    assert done.code == 0
    assert f"{name} " in done.text
    assert str(checkpoint) in done.text
    assert f"1 in {models}: " in done.text
    (one,) = json.loads(call("models", "--json").text)["models"]
    assert one["size_bytes"] == sum(file.stat().st_size for file in (models / name).iterdir())
    assert (one["name"], one["format"], one["source"], one["in_use"]) == (name, "q4 and q6", str(checkpoint), False)


@needs_locks
def test_models_says_what_is_in_use_and_rm_refuses_that(call, checkpoint: Path) -> None:
    with npllama.load(checkpoint) as llm:
        name = llm._opened.path.name
        assert [one.in_use for one in listed()] == [True]
        done = call("models", "rm", name)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "in use by another program" in done.err
    assert [one.in_use for one in listed()] == [False]
    assert call("models", "rm", name).text == f"removed {name}\n"
    assert listed() == []


@needs_locks
def test_a_model_that_nobody_closed_is_free_once_it_is_forgotten(checkpoint: Path) -> None:
    llm = npllama.load(checkpoint)
    assert [one.in_use for one in listed()] == [True]
    del llm
    assert [one.in_use for one in listed()] == [False]


def test_rm_removes_by_name_or_all(call, checkpoint: Path, models: Path) -> None:
    names = [name_of(checkpoint, dtype) for dtype in ("q4", "q8", "f16")]
    assert call("models", "rm", *names[:1]).code == 0
    assert {one.name for one in listed()} == set(names[1:])
    assert call("models", "rm", "--all").code == 0
    assert os.listdir(models) == []
    assert call("models", "rm", "--all").code == 0


def test_rm_of_a_name_that_is_not_there_removes_nothing(call, checkpoint: Path) -> None:
    name = name_of(checkpoint)
    for wrong in ("nothing", "../checkpoint", "..", f"{name}.npllama.json"):
        done = call("models", "rm", name, wrong)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "is no model of" in done.err
    assert [one.name for one in listed()] == [name]


@pytest.mark.parametrize("arguments", [[], ["--all", "x"]])
def test_rm_needs_names_or_all(call, arguments: list[str]) -> None:
    done = call("models", "rm", *arguments)
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_a_removal_that_was_killed_leaves_no_half_model(
    checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = name_of(checkpoint)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(staging, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_models([name])
    assert (models / name / "wq.npy").exists()
    assert listed() == []
    assert name_of(checkpoint) == name
    assert all(is_model_file(file.name) for file in (models / name).iterdir())
