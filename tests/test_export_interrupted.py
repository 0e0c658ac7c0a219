"""All or nothing: OUT is absent, or as it was, or complete, whatever stops an export and wherever."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from command_line import environment
from helpers import TINY, write_model_directory, write_safetensors_checkpoint

from npllama.errors import ModelError
from npllama.store import export as module
from npllama.store import staging
from npllama.store.export import export
from npllama.store.opening import check_hashes, is_model_file, open_model

SIZE = 95_712  # bytes of the numbers of TINY in float32


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(*args: object, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        export(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- where OUT may be


def test_an_out_that_exists_is_left_alone(tmp_path: Path, checkpoint: Path):
    export(checkpoint, tmp_path / "m")
    assert f"{tmp_path / 'm'}: exists, and export replaces nothing by itself; choose another OUT, or use --force." == (
        refusal(checkpoint, tmp_path / "m")
    )
    check_hashes(tmp_path / "m")


def test_an_empty_directory_exists_too(tmp_path: Path, checkpoint: Path):
    (tmp_path / "m").mkdir()
    assert "exists, and export replaces nothing" in refusal(checkpoint, tmp_path / "m")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, checkpoint: Path, force: bool):
    (tmp_path / "m").write_text("precious")
    expected = "is not a directory, and --force replaces a model directory only" if force else "exists, and export"
    assert expected in refusal(checkpoint, tmp_path / "m", force=force)
    assert (tmp_path / "m").read_text() == "precious"


def test_force_replaces_a_model(tmp_path: Path, checkpoint: Path):
    write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    manifest = export(checkpoint, tmp_path / "m", force=True)
    with open_model(tmp_path / "m") as model:
        assert model.manifest == manifest
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


def test_force_replaces_a_model_where_directories_cannot_be_swapped(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(staging, "_swap", lambda a, b: False)
    write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    manifest = export(checkpoint, tmp_path / "m", force=True)
    with open_model(tmp_path / "m") as model:
        assert model.manifest == manifest
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


def test_force_replaces_an_empty_directory_and_makes_one_that_is_absent(tmp_path: Path, checkpoint: Path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        export(checkpoint, tmp_path / name, force=True)
        check_hashes(tmp_path / name)


def test_force_refuses_a_directory_that_holds_anything_but_a_model(tmp_path: Path, checkpoint: Path):
    write_model_directory(tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("precious")
    assert "holds 'notes.txt', and --force replaces a directory only if" in refusal(
        checkpoint, tmp_path / "m", force=True
    )
    assert (tmp_path / "m" / "notes.txt").read_text() == "precious"


def test_force_never_replaces_the_checkpoint_itself(checkpoint: Path):
    before = sorted(os.listdir(checkpoint))
    assert "holds 'config.json'" in refusal(checkpoint, checkpoint, force=True)
    assert sorted(os.listdir(checkpoint)) == before


def test_a_directory_named_like_an_array_is_foreign(tmp_path: Path, checkpoint: Path):
    (tmp_path / "m" / "wq.npy").mkdir(parents=True)
    assert "holds 'wq.npy'" in refusal(checkpoint, tmp_path / "m", force=True)


def test_a_parent_that_is_missing_is_named(tmp_path: Path, checkpoint: Path):
    assert f"as {tmp_path / 'no'} is no directory; make that first" in refusal(checkpoint, tmp_path / "no" / "m")


def test_a_trailing_slash_and_a_place_inside_the_checkpoint_are_fine(checkpoint: Path):
    export(checkpoint, f"{checkpoint}/model/")
    check_hashes(checkpoint / "model")
    export(checkpoint, f"{checkpoint}/model/", force=True)


def test_a_name_that_the_disk_refuses_is_an_error_of_the_family(tmp_path: Path, checkpoint: Path):
    message = refusal(checkpoint, tmp_path / ("m" * 256))
    assert "cannot be written (File name too long), and nothing was left behind" in message


def test_an_out_that_appears_meanwhile_is_not_touched(tmp_path: Path, checkpoint: Path):
    def appear(done: int, total: int, name: str) -> None:
        if done == total:
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "file").touch()

    assert "cannot be written (Directory not empty)" in refusal(checkpoint, tmp_path / "m", progress=appear)
    assert os.listdir(tmp_path / "m") == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("1048576 requested and 262112 written"), "1048576 requested and 262112 written"),
    ],
)
@pytest.mark.parametrize("write", [0, 1, 7, 33, 34])
def test_a_write_that_fails_is_said_and_nothing_is_left(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str, write: int
):
    write_all, count = module._write_all, iter(range(10_000))

    def full(*args: object) -> None:
        if next(count) == write:
            raise error
        write_all(*args)

    monkeypatch.setattr(module, "_write_all", full)
    expected = f"{tmp_path / 'm'}: cannot be written ({reason}), and nothing was left behind; make room"
    assert expected in refusal(checkpoint, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(SIZE))
    message = refusal(checkpoint, tmp_path / "m", progress=lambda *step: pytest.fail("written"))
    assert f"no space left on device: the model needs {SIZE + (1 << 20):,} bytes, {SIZE:,} are free in" in message
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a file's size is tried on Linux")
def test_a_disk_that_takes_no_more_bytes_leaves_the_old_model(tmp_path: Path, checkpoint: Path):
    write_model_directory(tmp_path / "m", seed=5)
    script = (
        "import resource, sys; from npllama.store.export import export\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: export(sys.argv[1], sys.argv[2], force=True)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = run(script, checkpoint, tmp_path / "m")
    assert done.startswith("ModelError ")
    assert "cannot be written (File too large)" in done
    check_hashes(tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment(OPENBLAS_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- kill and interrupt

# A child process is stopped at the n-th line that it executes in export.py, staging.py and weights.py, for n spread
# over the whole export: that says the moment exactly, where a clock would not.
STOPPING = """
import os, signal, sys
from npllama.store.export import export
from npllama.store.opening import check_hashes

checkpoint, out, how, force, moments = *sys.argv[1:4], sys.argv[4] == "force", int(sys.argv[5])
SOURCES = ("export.py", "staging.py", "weights.py")

def child(stop_at):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith(SOURCES):
            return None
        if event == "line":
            count += 1
            if count == stop_at and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == stop_at and frame.f_code.co_filename.endswith("export.py"):
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try:
        export(checkpoint, out, force=force)
    except KeyboardInterrupt:
        os._exit(130)
    sys.settrace(None)
    return count

def stopped(stop_at):
    if not (process := os.fork()):
        child(stop_at)
        os._exit(0)
    return os.waitpid(process, 0)[1]

lines = child(-1)
for moment in range(moments):
    before = set(os.listdir(os.path.dirname(out)))
    if not force and moment and os.path.exists(out):
        for name in os.listdir(out):
            os.unlink(os.path.join(out, name))
        os.rmdir(out)
    status = stopped(1 + moment * (lines - 1) // (moments - 1))
    names = os.listdir(os.path.dirname(out))
    leftovers = [name for name in names if ".partial-" in name]
    complete = os.path.basename(out) in names
    if complete:
        check_hashes(out)
    print(status, complete, len(leftovers))
"""


def moments(checkpoint: Path, out: Path, how: str, force: str, n: int) -> list[tuple[int, bool, int]]:
    """(exit status, whether OUT is there, how many leftovers) after stops at n moments; a broken OUT fails."""
    lines = run(STOPPING, checkpoint, out, how, force, n).splitlines()
    return [(int(a), b == "True", int(c)) for a, b, c in map(str.split, lines)]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="child processes are forked")


@pytest.mark.slow("stop a program at each of many moments")
@needs_fork
def test_a_kill_at_any_moment_leaves_out_absent_or_complete(tmp_path: Path, checkpoint: Path):
    found = moments(checkpoint, tmp_path / "m", "kill", "new", 60)
    assert {status for status, _, _ in found} <= {signal.SIGKILL, 0}
    assert sum(status == signal.SIGKILL for status, _, _ in found) > 50
    absent = [leftovers for _, complete, leftovers in found if not complete]
    assert len(absent) > 40
    assert set(absent) <= {0, 1}  # the next export removes what the last one left


@pytest.mark.slow("stop a program at each of many moments")
@needs_fork
def test_a_kill_at_any_moment_of_a_replacement_leaves_a_complete_model(tmp_path: Path, checkpoint: Path):
    found = moments(checkpoint, tmp_path / "m", "kill", "force", 60)
    assert all(complete for _, complete, _ in found)
    assert max(leftovers for _, _, leftovers in found) == 1


@pytest.mark.slow("stop a program at each of many moments")
@needs_fork
@pytest.mark.parametrize("force", ["new", "force"])
def test_an_interrupt_at_any_moment_of_the_writing_leaves_nothing_behind(tmp_path: Path, checkpoint: Path, force: str):
    found = moments(checkpoint, tmp_path / "m", "interrupt", force, 60)
    stopped = [(complete, leftovers) for status, complete, leftovers in found if status]
    assert len(stopped) > 10  # else the moments were all before or after the writing
    assert set(stopped) <= {(force == "force", 0), (True, 0)}


# ---------------------------------------------------------------- leftovers


def leftover(tmp_path: Path, name: str = "m.partial-0badcafe") -> Path:
    write_model_directory(tmp_path / name)
    (tmp_path / name / "npllama.json").unlink()
    return tmp_path / name


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path, checkpoint: Path):
    leftover(tmp_path)
    leftover(tmp_path, "m.partial-123")
    (tmp_path / "m.partial-00000000").mkdir()
    export(checkpoint, tmp_path / "m")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


@pytest.mark.skipif(staging.fcntl is None, reason="no locks on this system")
def test_a_partial_directory_whose_process_lives_is_left_alone(tmp_path: Path, checkpoint: Path):
    path = leftover(tmp_path)
    lock = staging._lock(path)
    assert lock is not None
    export(checkpoint, tmp_path / "m")
    os.close(lock)
    assert path.is_dir()


def test_two_exports_to_the_same_place_do_not_harm_each_other(tmp_path: Path, checkpoint: Path):
    """The second starts while the first writes: the second wins, the first says so and leaves nothing."""
    started = []

    def second(done: int, total: int, name: str) -> None:
        if not started:
            started.append(export(checkpoint, tmp_path / "m", dtype="f16"))

    assert "cannot be written (Directory not empty)" in refusal(checkpoint, tmp_path / "m", progress=second)
    with open_model(tmp_path / "m") as model:
        assert model.manifest == started[0]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "m"]


def test_directories_that_only_look_like_leftovers_stay(tmp_path: Path, checkpoint: Path):
    (tmp_path / "m.partial-results").mkdir()
    leftover(tmp_path, "other.partial-0badcafe")
    (leftover(tmp_path) / "thesis.txt").write_text("precious")
    (tmp_path / "m.partial-abc").write_text("a file")
    before = set(os.listdir(tmp_path))
    export(checkpoint, tmp_path / "m")
    assert set(os.listdir(tmp_path)) == before | {"m"}
    assert (tmp_path / "m.partial-0badcafe" / "wq.npy").exists()


def test_a_locked_directory_that_was_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lock, taken = staging._lock, []

    def locked(path: Path) -> int | None:
        descriptor = lock(path)
        if not taken:
            taken.append(path)
            path.rmdir()
        return descriptor

    monkeypatch.setattr(staging, "_lock", locked)
    with staging.staged(tmp_path / "m", False, is_model_file) as folder:
        assert folder.is_dir()
        assert folder != taken[0]
    assert os.listdir(tmp_path) == ["m"]


def test_files_are_on_the_disk_before_the_rename(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    fsync, rename = os.fsync, os.rename
    inodes: list[int] = []

    def synced(descriptor: int) -> None:
        inodes.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        synced_before = set(inodes)
        assert {path.stat().st_ino for path in Path(source).iterdir()} <= synced_before
        assert Path(source).stat().st_ino in synced_before
        events.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    export(checkpoint, tmp_path / "m")
    assert events == ["m"]
    assert inodes[-1] == tmp_path.stat().st_ino


def test_the_size_of_the_test_model_is_what_the_tests_say(tmp_path: Path, checkpoint: Path):
    export(checkpoint, tmp_path / "m")
    with open_model(tmp_path / "m") as model:
        assert model.size_bytes == SIZE
        assert model.config == TINY
