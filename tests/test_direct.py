"""Checkpoints straight to text: exported once to a folder of models, found there by path, files and number format."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from command_line import environment
from gguf_files import write_quantized
from helpers import TINY, random_weights, write_model_directory, write_safetensors_checkpoint
from model_folder import later, name_of
from torch_files import write_llama2c, write_meta

import npllama
from npllama.errors import CheckpointError, ModelError, UsageError
from npllama.numbers import FORMATS
from npllama.store import model_cache
from npllama.store.direct import open_source
from npllama.store.export import export
from npllama.store.model_cache import entries, listed, models_directory
from npllama.store.sources import source_of
from npllama.version import EXPORTER

pytestmark = pytest.mark.usefixtures("models")


# ---------------------------------------------------------------- what is the same


def test_a_checkpoint_computes_what_its_model_directory_does(tmp_path: Path, checkpoint: Path) -> None:
    export(checkpoint, tmp_path / "m", "q8")
    with npllama.load(checkpoint, dtype="q8") as direct, npllama.load(tmp_path / "m") as usual:
        assert direct.manifest == usual.manifest
        assert np.array_equal(direct.logits([1, 5, 9]), usual.logits([1, 5, 9]))


def test_the_second_start_exports_nothing_and_opens_no_file_of_the_checkpoint(checkpoint: Path) -> None:
    name_of(checkpoint)
    script = (
        "import sys, npllama.inference\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, what: event == 'open' and opened.append(str(what[0])))\n"
        "llm = npllama.inference.load(sys.argv[1], progress=lambda *step: sys.exit('exported'))\n"
        "llm.close()\n"
        "print(llm._opened.path)\n"
        "assert not [path for path in opened if path.startswith(sys.argv[1])], opened\n"
        "assert 'npllama.checkpoints' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(checkpoint)]
    done = subprocess.run(command, env=environment(NPLLAMA_BACKEND="numpy"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(entries()[0].path)
    assert done.stderr == ""


@pytest.mark.parametrize("layout", ["meta", "llama2.c", "file", "config"])
def test_any_layout_opens_by_folder_or_file(tmp_path: Path, checkpoint: Path, layout: str) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(checkpoint / "tokenizer.model", folder)
    path = folder
    if layout == "meta":
        write_meta(folder)
    elif layout == "llama2.c":
        write_llama2c(folder)
        path = folder / "ckpt.pt"
    else:
        path = checkpoint / ("model.safetensors" if layout == "file" else "config.json")
    with npllama.load(path) as llm:
        assert np.isfinite(llm.logits([1, 2])).all()
    assert len(entries()) == 1


def test_a_relative_path_and_a_link_to_the_folder_are_the_same_checkpoint(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert {name_of(Path(path)) for path in ("checkpoint", "./checkpoint/", "link", str(checkpoint))} == {
        entries()[0].name
    }


# ---------------------------------------------------------------- what is another


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_file_that_changed_is_exported_anew_and_the_old_model_goes(checkpoint: Path, name: str) -> None:
    before = name_of(checkpoint)
    later(checkpoint / name)
    after = name_of(checkpoint)
    assert before != after
    assert [entry.name for entry in entries()] == [after]


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("given", [".", "model.safetensors"])
def test_a_small_file_that_appears_is_seen(checkpoint: Path, name: str, given: str) -> None:
    before = name_of(checkpoint / given)
    (checkpoint / name).write_text("{}")
    assert name_of(checkpoint / given) != before


def test_the_tokenizer_of_the_folder_above_counts(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    before = name_of(checkpoint)
    later(tmp_path / "tokenizer.model")
    assert name_of(checkpoint) != before


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_what_lies_beside_the_tokenizer_above_counts(tmp_path: Path, checkpoint: Path, name: str) -> None:
    (checkpoint / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    before = name_of(checkpoint)
    (tmp_path / name).write_text("{}")
    added = name_of(checkpoint)
    later(tmp_path / name)
    assert len({before, added, name_of(checkpoint)}) == 3


def test_files_that_nobody_reads_do_not_count(checkpoint: Path) -> None:
    before = name_of(checkpoint), name_of(checkpoint / "model.safetensors")
    (checkpoint / "out.txt").write_text("Once upon a time")
    (checkpoint / "README.md").write_text("a model")
    assert (name_of(checkpoint), name_of(checkpoint / "model.safetensors")) == before


def test_a_weight_file_is_not_another_for_the_checkpoints_beside_it(tmp_path: Path, checkpoint: Path) -> None:
    write_llama2c(checkpoint / "own")
    shutil.copy(checkpoint / "own" / "ckpt.pt", checkpoint / "other.pt")
    before = source_of(checkpoint / "model.safetensors")
    later(checkpoint / "other.pt")
    assert source_of(checkpoint / "model.safetensors") == before


def test_parts_of_a_file_belong_to_it(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "other-00001-of-00002.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    names = [name for name, *_ in source_of(tmp_path / "model-00001-of-00002.gguf").files]
    assert names[:2] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    assert "other-00001-of-00002.gguf" not in names


def test_links_of_a_hub_cache_count_as_what_they_lead_to(tmp_path: Path, checkpoint: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--Org--Small-1B" / "snapshots" / "0a1b",
        tmp_path / "models--Org--Small-1B/blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in checkpoint.iterdir():
        shutil.copy2(file, blobs / f"{file.name}-1")
        shutil.copy2(file, blobs / f"{file.name}-2")  # the same size and time
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-1")
    before = name_of(snapshot)
    assert before.startswith("Small-1B-")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/config.json-2")
    changed = name_of(snapshot)
    assert changed != before
    later(blobs / "model.safetensors-1")
    assert name_of(snapshot) not in (before, changed)


def test_number_formats_are_kept_beside_each_other(checkpoint: Path) -> None:
    assert len({name_of(checkpoint), name_of(checkpoint, "q4"), name_of(checkpoint, "f16")}) == 3
    assert {one.format for one in listed()} == {"f32", "q4 and q6", "f16"}


def test_another_exporter_exports_anew(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = name_of(checkpoint)
    monkeypatch.setattr("npllama.store.sources.EXPORTER", 1_000)
    assert name_of(checkpoint) != before
    assert len(entries()) == 1


def test_exported_bytes_are_those_that_the_exporters_version_stands_for(checkpoint: Path, tmp_path: Path) -> None:
    """A change of these bytes is a new version.EXPORTER: else models that were kept would stay as they are."""
    digest = hashlib.sha256()
    for dtype in FORMATS:
        export(checkpoint, tmp_path / dtype, dtype)
        digest.update((tmp_path / dtype / "npllama.json").read_bytes())  # it holds the sha256 of every array
    write_quantized(tmp_path / "gguf")
    manifest = export(tmp_path / "gguf", tmp_path / "own", tokenizer=checkpoint / "tokenizer.model")
    digest.update(json.dumps(manifest["tensors"]).encode())
    assert (EXPORTER, digest.hexdigest()[:16]) == (4, "056b127e66740d2d")


def test_every_file_that_an_export_opens_is_part_of_the_key(tmp_path: Path, checkpoint: Path) -> None:
    """Seen by the interpreter's audit: a reader that looks at another file must be told to sources.py."""
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (checkpoint / name).write_text("{}")
    write_meta(tmp_path / "meta")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        shutil.copy(checkpoint / name, tmp_path / name)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from npllama.store.export import export\n"
        "from npllama.store.sources import source_of\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, what: event == 'open' and opened.append(os.path.realpath(str(what[0]))))\n"
        "source, root, out = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "export(source, out)\n"
        "known = {os.path.realpath(source / name) for name, *_ in source_of(source).files}\n"
        "own = {path for path in opened if Path(path).is_file() and root in Path(path).parents and out not in path}\n"
        "assert len(own) > 2\n"
        "sys.exit(' '.join(own - known) or None)\n"
    )
    for i, source in enumerate((checkpoint, tmp_path / "meta")):
        command = [sys.executable, "-c", script, *map(str, (source, tmp_path, tmp_path / f"out{i}"))]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_checkpoint_that_changes_during_its_export_is_not_kept(checkpoint: Path) -> None:
    def change(done: int, total: int, name: str) -> None:
        if done == total:
            later(checkpoint / "config.json")

    with pytest.raises(CheckpointError, match="was changed while it was exported"):
        npllama.load(checkpoint, progress=change)
    assert entries() == []


# ---------------------------------------------------------------- refused


def test_a_dtype_is_refused_for_a_model_directory_in_one_line(tmp_path: Path, call) -> None:
    write_model_directory(tmp_path / "m")
    with pytest.raises(UsageError, match="is a model directory, which has its own number formats"):
        npllama.load(tmp_path / "m", dtype="q4")
    done = call("generate", "-m", tmp_path / "m", "--dtype", "q4", "-p", "a")
    assert done.code == 2
    assert done.err.count("\n") == 1


def test_a_dtype_that_does_not_exist_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype 'q5' is not known"):
        npllama.load(tmp_path / "nothing", dtype="q5")


def test_a_checkpoint_that_cannot_be_read_leaves_nothing_and_is_one_line(call, checkpoint: Path, models: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"<html>")
    done = call("generate", "-m", checkpoint, "-p", "a")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "a web page" in done.err
    assert os.listdir(models) == []


def test_without_a_tokenizer_the_line_says_which_command_takes_one(call, checkpoint: Path, models: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    done = call("generate", "-m", checkpoint, "-p", "a")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "--tokenizer FILE (of npllama export)" in done.err
    assert os.listdir(models) == []


def test_where_nothing_can_be_written_the_line_says_what_to_do(
    call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NPLLAMA_MODELS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").write_text("a file where a directory is needed")
    done = call("generate", "-m", checkpoint, "-p", "a")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "cannot be written (Not a directory)" in done.err
    assert "set NPLLAMA_MODELS_DIR to a directory of your own" in done.err
    assert f"npllama export {checkpoint} OUT" in done.err


def test_a_folder_of_models_that_is_read_only_serves_what_it_holds(
    checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening for writing fails as on a disk mounted read-only: root is bound by no permissions."""
    name = name_of(checkpoint)
    usual, access = os.open, os.access

    def read_only(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT) and str(path).startswith(str(models)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return usual(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)
    assert name_of(checkpoint) == name
    with pytest.raises(ModelError, match="models: cannot be written"):
        name_of(checkpoint, "q4")


def test_without_a_home_directory_the_line_says_what_to_do(
    call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NPLLAMA_MODELS_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "none"))
    for arguments in (["generate", "-m", checkpoint, "-p", "a"], ["models"]):
        done = call(*arguments)
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert "there is no home directory" in done.err
        assert "set NPLLAMA_MODELS_DIR" in done.err
    assert not (tmp_path / "none").exists()


def test_a_disk_too_full_for_the_record_is_an_error_of_the_family(
    checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(ModelError, match=r"models: cannot be written \(No space left on device\)"):
        npllama.load(checkpoint)
    assert os.listdir(models) == []


def test_the_folder_is_in_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert models_directory() == tmp_path / "models"
    monkeypatch.delenv("NPLLAMA_MODELS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so to be ignored")
    assert models_directory() == tmp_path / ".cache" / "npllama" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models_directory() == tmp_path / "xdg" / "npllama" / "models"


def test_the_folder_of_compiled_code_stays_private_where_models_make_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("NPLLAMA_MODELS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    before = os.umask(0o002)
    try:
        name_of(checkpoint)
    finally:
        os.umask(before)
    assert (tmp_path / "xdg" / "npllama").stat().st_mode & 0o022 == 0


def test_a_full_disk_is_said_before_anything_is_written(
    call, checkpoint: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda path: usage(1000))
    done = call("generate", "-m", checkpoint, "-p", "a")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "1,000 are free in" in done.err
    assert "set NPLLAMA_MODELS_DIR to another disk" in done.err
    assert os.listdir(models) == []


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "-n", 2, "-p", "the cat", "-m"],
        ["info"],
        ["bench", "-p", 4, "-n", 2, "-r", 1, "-m"],
        ["perplexity", "-f", "text", "-c", 8],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_a_checkpoint(call, checkpoint: Path, tmp_path: Path, command: list[object]) -> None:
    (tmp_path / "text").write_text("the cat sat on the mat")
    arguments = [tmp_path / "text" if one == "text" else one for one in command]
    reference = ["--reference", checkpoint] if command[0] == "perplexity" else []
    done = call(*arguments, checkpoint, *reference)
    assert done.code == 0, done.err
    assert done.text


@pytest.mark.skipif(
    os.environ.get("NPLLAMA_BACKEND") == "numpy", reason="compiled execution: not in the run of NumPy's"
)
def test_warmup_compiles_for_a_checkpoint(call, checkpoint: Path) -> None:
    done = call("warmup", checkpoint)
    assert done.code == 0, done.err
    assert "compiled code is ready" in done.text


def test_the_first_generation_says_on_stderr_what_it_exports_where(call, checkpoint: Path, models: Path) -> None:
    first = call("generate", "-m", checkpoint, "--dtype", "q8", "-n", 2, "-s", 1, "-p", "the cat")
    assert f"{checkpoint}: exporting it once to {models}" in first.err
    assert f"tokenizer: {checkpoint / 'tokenizer.model'}" in first.err
    second = call("generate", "-m", checkpoint, "--dtype", "q8", "-n", 2, "-s", 1, "-p", "the cat")
    assert second.err.count("\n") == 1
    assert second.text == first.text


# ---------------------------------------------------------------- info


def test_info_shows_a_checkpoint_without_exporting_it(call, checkpoint: Path, models: Path, tmp_path: Path) -> None:
    facts = json.loads(call("info", checkpoint, "--json").text)
    assert not models.exists()
    assert (facts["kind"], facts["tensor_formats"], facts["own_number_format"]) == ("hugging-face", {"f32": 21}, "f32")
    assert facts["config"] == TINY.to_json()
    assert facts["parameters"] == sum(w.size for w in random_weights(TINY, 0).values())
    assert facts["tokenizer"]["pieces"] == TINY.vocab_size
    assert facts["files"]["model.safetensors"] == (checkpoint / "model.safetensors").stat().st_size
    assert f"{checkpoint}\n" in call("info", checkpoint).text


@pytest.mark.parametrize("tied", [False, True])
def test_info_says_what_each_number_format_takes(call, tmp_path: Path, tied: bool) -> None:
    write_safetensors_checkpoint(tmp_path / "c", tied=tied)
    facts = json.loads(call("info", tmp_path / "c", "--json").text)
    assert list(facts["dtypes"]) == list(FORMATS)
    for dtype, takes in facts["dtypes"].items():
        with open_source(tmp_path / "c", dtype) as opened:
            assert takes["disk_bytes"] == opened.size_bytes
        assert takes["memory_bytes"] == takes["disk_bytes"] + facts["cache_bytes"]
        assert takes["fits_disk"] is True
        assert takes["fits_memory"] is True


def test_info_says_what_does_not_fit(call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(model_cache.shutil, "disk_usage", lambda path: usage(40_000))
    monkeypatch.setattr("npllama.system.machine.free_memory", lambda: 60_000)
    takes = json.loads(call("info", checkpoint, "--json").text)["dtypes"]
    fits = {dtype: (one["fits_disk"], one["fits_memory"]) for dtype, one in takes.items()}
    narrow = {name: (True, True) for name, number_format in FORMATS.items() if number_format.quantized}
    assert fits == {"f32": (False, False), "f16": (False, True), "bf16": (False, True), **narrow}


def test_info_shows_a_checkpoint_without_a_tokenizer_and_says_so(call, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.model").unlink()
    facts = json.loads(call("info", checkpoint, "--json").text)
    assert facts["tokenizer"] == "none that fits"
    assert "has no tokenizer" in facts["remarks"][-1]


def test_info_refuses_check_for_a_checkpoint(call, checkpoint: Path) -> None:
    done = call("info", checkpoint, "--check")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--check is for model directories" in done.err
