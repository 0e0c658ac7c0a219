"""`npllama score` and `npllama embed`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from helpers import TINY, write_model_directory

import npllama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "model"
    write_model_directory(path, dataclasses.replace(TINY, max_seq_len=128), seed=3)
    return path


def test_continuations_are_ranked(folder: Path) -> None:
    options = [" sat", " ran away", " it"]
    done = run("score", "-m", folder, "-p", "the cat", "--json", "--normalize", "tokens", *options)
    found = json.loads(done.text)
    with npllama.load(folder) as llm:
        expected = llm.rank("the cat", options, "tokens")
    assert [one["text"] for one in found] == [one.option for one in expected]
    np.testing.assert_allclose([one["value"] for one in found], [one.value for one in expected], atol=1e-5)
    lines = run("score", "-m", folder, "-p", "the cat", "--tokens", *options).text.splitlines()
    assert len(lines) == 3 + sum(len(one.score.tokens) for one in expected)
    assert any(line.endswith('" ran away"') for line in lines)


def test_texts_become_vectors(folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.write_text("the dog\na mat\n")
    done = run("embed", "-m", folder, "the cat", "-f", texts, "--pooling", "last")
    found = np.array([json.loads(line) for line in done.text.splitlines()])
    with npllama.load(folder) as llm:
        expected = llm.embed(["the cat", "the dog", "a mat"], "last")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    out = tmp_path / "out.npy"
    assert run("embed", "-m", folder, "the cat", "-o", out, "--no-normalize").code == 0
    with npllama.load(folder) as llm:
        np.testing.assert_allclose(np.load(out), llm.embed(["the cat"], normalize=False), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("score", "-p", "a"), 2, "no continuation was given"),
        (("score", "b"), 2, "required: -p/--prompt"),
        (("score", "-p", "a", ""), 2, "has no id of its own"),
        (("embed",), 2, "no text was given"),
        (("embed", "a", "-o", "/nonexistent/a.npy"), 1, "/nonexistent/a.npy: cannot be written"),
        (("embed", "-f", "/nonexistent"), 1, "/nonexistent: cannot be read"),
        (("embed", "a " * 500), 1, "the context holds 128"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder: Path, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run(*arguments, "-m", folder)
    assert (done.code, done.out) == (code, b"")
    assert said in done.err
    assert done.err.count("\n") == 1
