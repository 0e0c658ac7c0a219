"""File systems that lack something: system calls that fail as those of network shares, overlays and FUSE do."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_model_directory, write_safetensors_checkpoint

import npllama
from npllama.commands.cli import main
from npllama.errors import ModelError
from npllama.store import export as export_module
from npllama.store import npy, staging
from npllama.store.export import export, quantize_model
from npllama.store.opening import check_hashes, check_model, is_model_file, open_model
from npllama.system import machine

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the calls of POSIX systems fail here")

UNSUPPORTED = ("EINVAL", "ENOTSUP", "ENOSYS")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Make a function fail with an error number where `when(*arguments)` holds; gives the arguments of failed calls."""

    def fail(where: Any, name: str, code: str, when: Callable[..., bool] = lambda *a: True) -> list[tuple[Any, ...]]:
        usual, failed = getattr(where, name), []

        def call(*arguments: Any, **options: Any) -> Any:
            if not when(*arguments):
                return usual(*arguments, **options)
            failed.append(arguments)
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

        monkeypatch.setattr(where, name, call)
        return failed

    return fail


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def of_directories(source: Path, target: Path) -> bool:
    return Path(source).is_dir()


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# ---------------------------------------------------------------- forcing to the disk


@pytest.mark.parametrize("code", [*UNSUPPORTED, "EIO", "EBADF", "EACCES"])
def test_a_directory_that_cannot_be_forced_to_the_disk_discards_no_export(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], code: str
) -> None:
    assert fail(os, "fsync", code, is_directory) == []
    export(checkpoint, tmp_path / "m")
    check_hashes(tmp_path / "m")
    quantize_model(tmp_path / "m", tmp_path / "q4", "q4")
    check_hashes(tmp_path / "q4")
    assert names(tmp_path) == ["checkpoint", "m", "q4"]


def test_a_directory_that_cannot_be_opened_to_be_forced_discards_no_export(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]]
) -> None:
    assert fail(os, "open", "EISDIR", lambda path, *rest: Path(path).is_dir()) == []
    export(checkpoint, tmp_path / "m")
    check_hashes(tmp_path / "m")


def test_an_error_of_the_disk_for_a_directory_is_said(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    fail(os, "fsync", "EIO", is_directory)
    export(checkpoint, tmp_path / "m")
    assert "the disk reports an error for this directory (Input/output error)" in caplog.text


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_files_that_cannot_be_forced_to_the_disk_are_written_all_the_same(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], code: str
) -> None:
    failed = fail(os, "fsync", code)
    export(checkpoint, tmp_path / "m")
    assert len(failed) > 12
    check_hashes(tmp_path / "m")


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("force", [False, True])
def test_files_whose_contents_are_lost_on_the_way_to_the_disk_discard_the_export(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], code: str, force: bool
) -> None:
    if force:
        write_model_directory(tmp_path / "m", seed=5)
    before = names(tmp_path)
    fail(os, "fsync", code, lambda descriptor: not is_directory(descriptor))
    expected = f"cannot be written ({os.strerror(getattr(errno, code))}), and nothing was left behind"
    assert expected in refusal(checkpoint, tmp_path / "m", force=force)
    assert names(tmp_path) == before


# ---------------------------------------------------------------- renames


@pytest.fixture
def no_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_swap", lambda a, b: False)


REFUSALS = [*UNSUPPORTED, "EXDEV", "EPERM", "EACCES", "EBUSY", "EMFILE", "ETXTBSY"]


@pytest.mark.usefixtures("no_swap")
@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("old", [False, True])
def test_where_directories_cannot_be_renamed_their_files_are_moved(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], code: str, old: bool
) -> None:
    if old:
        write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    failed = fail(os, "rename", code, of_directories)
    manifest = export(checkpoint, tmp_path / "m", force=old)
    assert len(failed) == 1 + old
    assert check_model(tmp_path / "m")[0] == manifest
    check_hashes(tmp_path / "m")
    assert names(tmp_path) == ["checkpoint", "m"]


@pytest.mark.usefixtures("no_swap")
@pytest.mark.parametrize("code", ["EXDEV", "ENOSYS", "EPERM"])
@pytest.mark.parametrize("old", [False, True])
def test_where_nothing_can_be_renamed_files_are_copied(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], code: str, old: bool
) -> None:
    if old:
        write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    fail(os, "rename", code)
    manifest = export(checkpoint, tmp_path / "m", force=old)
    assert check_model(tmp_path / "m")[0] == manifest
    check_hashes(tmp_path / "m")
    assert names(tmp_path) == ["checkpoint", "m"]


@pytest.mark.usefixtures("no_swap")
def test_a_model_whose_files_are_moved_has_its_manifest_only_while_it_is_whole(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    usual, moves = os.rename, []

    def rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        usual(source, target)
        moves.append(target)
        if (tmp_path / "m" / "npllama.json").exists():
            check_hashes(tmp_path / "m")

    monkeypatch.setattr(os, "rename", rename)
    export(checkpoint, tmp_path / "m", force=True)
    assert len(moves) == 2 * 14


@pytest.mark.usefixtures("no_swap")
@pytest.mark.parametrize("nth", [0, 1, 6, 12, 13, 14, 20, 27])
@pytest.mark.parametrize("old", [False, True])
def test_moving_that_fails_half_way_leaves_what_was_there(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, nth: int, old: bool
) -> None:
    if old:
        write_model_directory(tmp_path / "m", seed=5, dtype="bf16")
    elif nth >= 14:
        nth -= 14
    usual, count = os.rename, iter(range(10_000))

    def rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        if next(count) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(source, target)

    monkeypatch.setattr(os, "rename", rename)
    expected = "cannot be written (No space left on device), and nothing was left behind"
    assert expected in refusal(checkpoint, tmp_path / "m", force=old)
    assert names(tmp_path) == (["checkpoint", "m"] if old else ["checkpoint"])
    if old:
        assert "bf16" in {tensor["format"] for tensor in check_model(tmp_path / "m")[0]["tensors"].values()}
        check_hashes(tmp_path / "m")


@pytest.mark.usefixtures("no_swap")
def test_an_old_model_that_cannot_be_put_back_is_named(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]]
) -> None:
    write_model_directory(tmp_path / "m", seed=5)
    fail(os, "rename", "EROFS", lambda source, target: Path(target).name == "m")
    message = refusal(checkpoint, tmp_path / "m", force=True)
    assert "cannot be written (Read-only file system), nor put back (Read-only file system)" in message
    (aside,) = [name for name in names(tmp_path) if ".partial-" in name]
    assert f"what was there is now {tmp_path / aside}: rename it." in message
    check_hashes(tmp_path / aside)


def test_a_directory_that_exists_meanwhile_is_not_filled(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]]
) -> None:
    fail(os, "rename", "EPERM", of_directories)

    def appear(done: int, total: int, name: str) -> None:
        if done == total:
            (tmp_path / "m").mkdir()

    assert "cannot be written (File exists)" in refusal(checkpoint, tmp_path / "m", progress=appear)
    assert names(tmp_path) == ["checkpoint", "m"]
    assert names(tmp_path / "m") == []


def test_a_mount_point_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "m")
    assert "is a mount point, which cannot be replaced; choose a new directory inside it" in refusal(
        checkpoint, tmp_path / "m", force=True
    )


def test_a_directory_that_cannot_be_removed_is_named(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture
) -> None:
    write_model_directory(tmp_path / "m", seed=5)
    fail(os, "rmdir", "ENOTEMPTY")  # as on NFS, which keeps the files that another process has open
    export(checkpoint, tmp_path / "m", force=True)
    check_hashes(tmp_path / "m")
    (left,) = [name for name in names(tmp_path) if ".partial-" in name]
    assert f"{tmp_path / left}: cannot be removed now (Directory not empty); delete it later" in caplog.text


# ---------------------------------------------------------------- locks


@pytest.mark.skipif(staging.fcntl is None, reason="no locks on this system")
@pytest.mark.parametrize("code", [*UNSUPPORTED, "ENOLCK", "EBADF"])
def test_without_locks_an_export_is_made_and_what_others_left_is_named(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture, code: str
) -> None:
    (tmp_path / "m.partial-0badcafe").mkdir()
    fail(staging.fcntl, "flock", code)
    export(checkpoint, tmp_path / "m")
    check_hashes(tmp_path / "m")
    assert names(tmp_path) == ["checkpoint", "m", "m.partial-0badcafe"]
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'm.partial-0badcafe'}: may be what an export that was stopped has left")


@pytest.mark.skipif(staging.fcntl is None, reason="no locks on this system")
def test_a_new_directory_that_another_process_is_removing_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, taken = staging.fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(path for path in tmp_path.iterdir())
            taken[0].rmdir()
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        usual(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", flock)
    with staging.staged(tmp_path / "m", False, is_model_file) as folder:
        assert folder != taken[0]
    assert names(tmp_path) == ["m"]


# ---------------------------------------------------------------- room and names


def test_a_disk_that_does_not_tell_its_room_is_written_to(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(export_module.shutil, "disk_usage", "ENOSYS")
    export(checkpoint, tmp_path / "a")
    monkeypatch.setattr(export_module.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(0))
    export(checkpoint, tmp_path / "b")
    assert names(tmp_path) == ["a", "b", "checkpoint"]


@pytest.mark.parametrize("name", ["m" * 255, "é" * 127, "m" * 239])
def test_the_longest_names_are_names_of_models_too(tmp_path: Path, checkpoint: Path, name: str) -> None:
    try:
        (tmp_path / name).mkdir()
        (tmp_path / name).rmdir()
    except OSError:
        pytest.skip("this file system has shorter names")
    (tmp_path / staging._partial_name(Path(name))).mkdir()
    export(checkpoint, tmp_path / name)
    check_hashes(tmp_path / name)
    assert names(tmp_path) == sorted(["checkpoint", name])


@pytest.mark.parametrize(("name", "reason"), [("a/" * 3000 + "m", "File name too long"), ("a\0b", "null")])
def test_what_cannot_be_a_path_is_an_error_of_the_family(checkpoint: Path, name: str, reason: str) -> None:
    message = refusal(checkpoint, name)
    assert "cannot be made" in message
    assert reason in message


def test_a_name_that_is_not_utf8_serves(tmp_path: Path, checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    try:
        os.mkdir(out)
        os.rmdir(out)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    assert main(["export", str(checkpoint), out]) == 0
    assert main(["info", out, "--check"]) == 0
    shown = capfd.readouterr()
    assert r"m\udcff" in shown.out
    assert r"m\udcff: " in shown.err


# ---------------------------------------------------------------- maps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_directory(tmp_path / "model")
    return tmp_path / "model"


def logits(folder: Path) -> np.ndarray:
    with npllama.load(folder) as llm:
        return llm.logits([1, 5, 7])


@pytest.mark.parametrize("code", ["ENODEV", "EINVAL", "EACCES", "ENOTSUP"])
def test_where_files_cannot_be_mapped_shared_they_are_mapped_privately(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    expected, usual, private = logits(folder), mmap.mmap, []

    def private_only(*arguments: Any, **options: Any) -> mmap.mmap:
        if options.get("flags") != mmap.MAP_PRIVATE:
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        private.append(arguments)
        return usual(*arguments, **options)

    monkeypatch.setattr(mmap, "mmap", private_only)
    np.testing.assert_array_equal(logits(folder), expected)
    assert len(private) == 12
    assert not caplog.messages
    with open_model(folder) as model:
        assert not model.weights.wq.flags.writeable


@pytest.mark.parametrize("dtype", ["f32", "bf16", "q4"])
def test_where_files_cannot_be_mapped_they_are_read_and_one_line_says_so(
    tmp_path: Path, fail: Callable[..., list[Any]], caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    write_model_directory(tmp_path / "model", dtype="f32" if dtype == "q4" else dtype)
    if dtype == "q4":
        quantize_model(tmp_path / "model", tmp_path / "q4", "q4")
    folder = tmp_path / ("q4" if dtype == "q4" else "model")
    expected = logits(folder)
    fail(mmap, "mmap", "ENODEV")
    np.testing.assert_array_equal(logits(folder), expected)
    (line,) = caplog.messages
    assert line.startswith(f"{folder}: its file system maps no files into memory (No such device), so the weights were")
    with open_model(folder) as model:
        for w in model.weights:
            for array in [w] if isinstance(w, np.ndarray) else [part for part in w if isinstance(part, np.ndarray)]:
                assert not array.flags.writeable
                assert array.ctypes.data % 64 == 0
        model.prefetch()


def test_files_that_do_not_fit_into_memory_are_neither_mapped_nor_read(
    folder: Path, fail: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(mmap, "mmap", "ENODEV")
    monkeypatch.setattr(machine, "free_memory", lambda: 1000)
    with pytest.raises(ModelError, match=r"cannot be mapped .*, nor read: 28,800 bytes are needed, 1,000 are free"):
        open_model(folder)


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOMEM"])
def test_what_is_short_is_said_and_nothing_is_read_instead(
    folder: Path, fail: Callable[..., list[Any]], code: str
) -> None:
    fail(mmap, "mmap", code)
    with pytest.raises(ModelError, match=r"cannot be mapped .*; 28,928 bytes and one open file are needed"):
        open_model(folder)


def test_a_file_that_becomes_shorter_while_it_is_read_is_said(
    folder: Path, fail: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(mmap, "mmap", "ENODEV")
    usual = npy._read_aligned

    def cut(path: Path, *rest: Any) -> np.ndarray:
        os.truncate(path, 1000)
        return usual(path, *rest)

    monkeypatch.setattr(npy, "_read_aligned", cut)
    with pytest.raises(ModelError, match=r"npy: became shorter while it was read"):
        open_model(folder)


def test_advice_that_is_not_taken_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Deaf)
    with open_model(folder) as model:
        model.prefetch()


def test_export_quantize_and_info_map_nothing_that_they_have_only_to_check(
    tmp_path: Path, checkpoint: Path, fail: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Where files cannot be mapped, that would read them whole."""
    failed = fail(mmap, "mmap", "ENODEV")
    assert main(["export", str(checkpoint), str(tmp_path / "m")]) == 0
    assert main(["info", str(tmp_path / "m"), "--check"]) == 0
    assert not failed
    assert "every file is as it was exported" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["a/" * 3000 + "m", "a\0b"])
def test_a_tokenizer_that_cannot_be_a_path_is_an_error_of_the_family(
    tmp_path: Path, checkpoint: Path, name: str
) -> None:
    with pytest.raises(npllama.NpllamaError, match="no such tokenizer"):
        export(checkpoint, tmp_path / "m", tokenizer=name)
