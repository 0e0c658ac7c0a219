"""npllama generate with a text that is kept, with a text without end, and with memory of a given size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import helpers
import pytest

import npllama
from npllama.commands.terminal import size

GREEDY = ("--temp", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli-sessions") / "model"
    helpers.write_model_directory(folder)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def test_a_text_goes_on_where_the_last_call_ended(call, model: Path, kept: Path) -> None:
    first = call("generate", "-m", model, "-p", "one", "--session", kept, "-n", 7, "--seed", 3)
    second = call("generate", "-m", model, "-p", "", "--session", kept, "-n", 8)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.err.startswith("seed 3 ")
    with npllama.load(model) as llm, npllama.load_session(kept, llm) as session:
        prompt = llm.tokenizer.encode("one")
        assert session.tokens == [*prompt, *llm.generate(prompt, 15, seed=3).tokens]
        n = len(prompt) + 7
    assert f"prompt {n} tokens ({n - 1} kept), " in second.err


def test_a_prompt_goes_behind_the_text_that_is_kept(call, model: Path, kept: Path) -> None:
    for prompt in ("one", " two"):
        assert call("generate", "-m", model, "-p", prompt, "--session", kept, "-n", 0).code == 0
    assert call("generate", "-m", model, "-p", "", "--session", kept, "-n", 0, "--echo").out == b"one two\n"


def test_a_session_that_is_read_only_stays_as_it_is(call, model: Path, kept: Path) -> None:
    call("generate", "-m", model, "-p", "one", "--session", kept, "-n", 3, *GREEDY)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    once = call("generate", "-m", model, "-p", "", "--session", kept, "--session-ro", "-n", 5, "--json", *GREEDY)
    twice = call("generate", "-m", model, "-p", "", "--session", kept, "--session-ro", "-n", 5, "--json", *GREEDY)
    assert json.loads(once.out)["tokens"] == json.loads(twice.out)["tokens"]
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_call_that_fails_leaves_what_is_kept(call, model: Path, kept: Path) -> None:
    call("generate", "-m", model, "-p", "one", "--session", kept, "-n", 3)
    before = (kept / "session.json").read_bytes()
    failed = call("generate", "-m", model, "-p", "x" * 200, "--session", kept)
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "do not fit, the context holds 64" in failed.err
    assert (kept / "session.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--session-ro",), 2, "--session-ro needs --session FILE"),
        (("--session", "nothing", "--session-ro"), 1, "nothing: is missing, and --session-ro makes none"),
        (("--keep", "5"), 2, "--keep is for a text that slides; give --context-policy slide with it"),
        (("--context-policy", "ring"), 2, "argument --context-policy: invalid choice"),
        (("--session", __file__), 1, "session.json: cannot be read (Not a directory), and a saved session needs"),
        (("--parallel", "0"), 2, "argument --parallel: '0' is not a whole number from 1 to 1024"),
        (("--kv-memory", "1KB"), 2, "kv_memory=1000 holds"),
        (("--kv-memory", "lots"), 2, "argument --kv-memory: 'lots' is not a size, such as 800M, 1.5G or 2GiB"),
    ],
)
def test_what_does_not_fit_together_is_one_line(
    call, model: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = call("generate", "-m", model, "-p", "one", *arguments)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert message in done.err


def test_a_text_without_end_slides(call, model: Path, kept: Path) -> None:
    stopped = call("generate", "-m", model, "-p", "one", "-n", 200, *GREEDY, "--json")
    endless = call(
        *("generate", "-m", model, "-p", "one", "-n", 200, *GREEDY, "--json", "--session", kept),
        *("--context-policy", "slide", "--keep", 6, "--kv-memory", "1M", "--parallel", 1),
    )
    short, long = (json.loads(done.out)["tokens"] for done in (stopped, endless))
    assert long[:50] == short[:50]
    assert len(long) == 200 > len(short)
    more = call("generate", "-m", model, "-p", "", "-n", 3, "--session", kept, "--session-ro")
    assert more.code == 0, "the policy is kept"
    for arguments in (("--keep", 7), ("--context-policy", "stop")):
        done = call("generate", "-m", model, "-p", "", "-n", 3, "--session", kept, *arguments)
        assert done.code == 2
        assert f"kept goes on with {'6' if arguments[0] == '--keep' else 'slide'}; leave it out" in done.err


def test_sizes() -> None:
    found = [size(text) for text in ("800000000", "800M", "1.5G", "2GiB", "64 kb", "7B", "1TB")]
    assert found == [800_000_000, 800_000_000, 1_500_000_000, 2 << 30, 64_000, 7, 10**12]
    for text in ("", "M", "1.5.2G", "-1", "1P", "0x10", "1e9", "٣"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
            size(text)
