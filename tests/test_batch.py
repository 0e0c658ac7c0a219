"""`npllama generate --jsonl`: one JSON object a line in, one a line out."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import environment

import npllama
from npllama.commands import batch
from npllama.inference import DEMO, Llama
from npllama.options import MoreOptions


@pytest.fixture(scope="module")
def llm() -> Llama:
    return npllama.load(backend="numpy")


def answers(output: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(o).encode() + b"\n" for o in objects)


def test_lines_are_answered_in_order_and_what_else_they_have_comes_back(call, llm: Llama, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    texts = [
        {"prompt": f"Tom {i}", "seed": i, "max_tokens": 24 - 3 * i, "id": [i, None], "split": "é"} for i in range(8)
    ]
    file.write_bytes(lines(*texts).rstrip(b"\n"))  # the last line has no end
    done = call("generate", "-f", file, "--jsonl", "--backend", "numpy")
    assert done.code == 0
    found = answers(done.out)
    assert [a["id"] for a in found] == [t["id"] for t in texts]
    assert {a["split"] for a in found} == {"é"}
    for text, answer in zip(texts, found, strict=True):
        alone = llm.generate(text["prompt"], max_tokens=text["max_tokens"], seed=text["seed"])
        assert (answer["text"], answer["tokens"], answer["seed"]) == (alone.text, alone.tokens, alone.seed)
        assert answer["finish_reason"] == alone.finish_reason
        assert answer["usage"]["total_tokens"] == alone.usage.total_tokens
    assert "8 lines, 0 errors · generated " in done.err


def test_unordered_answers_come_as_texts_finish(call) -> None:
    data = lines({"prompt": "Tom", "max_tokens": 60, "id": "long"}, {"prompt": "Tom", "max_tokens": 1, "id": "short"})
    for unordered, expected in (([], ["long", "short"]), (["--unordered"], ["short", "long"])):
        done = call("generate", "--jsonl", "--temp", 0, "--backend", "numpy", *unordered, stdin=data)
        assert [a["id"] for a in answers(done.out)] == expected


def test_a_bad_line_is_an_error_with_its_number_and_the_others_go_on(call) -> None:
    bad = [b"{", b"[1]", b'{"id": 3}', b'{"prompt": "a", "ids": [1]}', b'{"prompt": "a", "temperature": -1, "id": 5}']
    bad += [b'{"prompt": "a", "text": 1}', b'{"prompt": ["a", "b"]}', b'{"ids": [1, 10000000]}', b'{"prompt": "\xff"}']
    data = b"\n".join([*bad, b"  ", b'{"prompt": "Tom", "max_tokens": 2}'])
    done = call("generate", "--jsonl", "--backend", "numpy", stdin=data)
    assert done.code == 1
    *errors, good = answers(done.out)
    assert [e["line"] for e in errors] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert errors[2]["id"] == 3
    assert errors[4]["id"] == 5
    for error, said in zip(
        errors, ("JSON", "object", "0 prompts", "2 prompts", "temperature", "'text' is a key"), strict=False
    ):
        assert said in error["error"]
    assert len(good["tokens"]) == 2
    assert "10 lines, 9 errors · generated " in done.err


def test_no_value_of_an_option_ends_the_others(call) -> None:
    options = {*inspect.signature(Llama.stream).parameters, *MoreOptions.__annotations__}
    options -= {"self", "prompt", "more", "progress", "logits_processor", "max_tokens"}
    values = [None, True, -7, 1.5, 1e300, "text", [], ["a", 3], {"a": 1}]
    data = lines(*({"prompt": "Tom", "max_tokens": 1, option: value} for option in sorted(options) for value in values))
    done = call("generate", "--jsonl", "--backend", "numpy", stdin=data)
    assert done.code == 1
    assert len(answers(done.out)) == len(options) * len(values)


def test_one_of_each_is_said_in_the_singular(call) -> None:
    done = call("generate", "--jsonl", "--backend", "numpy", stdin=b'{"prompt": "a", "n": 2}\n')
    assert done.err.startswith("1 line, 1 error · generated 0 tokens")
    done = call("generate", "--jsonl", "--backend", "numpy", stdin=b'{"prompt": "Tom", "max_tokens": 1}\n')
    assert done.err.startswith("1 line, 0 errors · generated 1 token, ")


def test_options_of_the_command_hold_where_a_line_has_none(call, llm: Llama) -> None:
    data = lines(
        {"prompt": "Tom"}, {"prompt": "Tom", "max_new_tokens": 3}, {"prompt": "Tom", "repetition_penalty": 2.0}
    )
    done = call("generate", "--jsonl", "-n", 5, "--temp", 0, "--repeat-penalty", 1.5, "--backend", "numpy", stdin=data)
    tokens = [a["tokens"] for a in answers(done.out)]
    assert [len(t) for t in tokens] == [5, 3, 5]
    assert tokens[0] == llm.generate("Tom", max_tokens=5, temperature=0, repeat_penalty=1.5).tokens
    assert tokens[2] == llm.generate("Tom", max_tokens=5, temperature=0, repeat_penalty=2.0).tokens


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--unordered"], "give --jsonl with it"),
        (["--jsonl", "--json"], "--json do not go together"),
        (["--jsonl", "-e"], "--escape do not go together"),
        (["--jsonl", "--session", "x"], "--session do not go together"),
        (["--jsonl", "Tom"], "from one file"),
        (["--jsonl", "-p", "Tom"], "from one file"),
        (["--jsonl", "-f", "a", "-f", "b"], "from one file"),
    ],
)
def test_what_does_not_go_together_is_refused(call, arguments: list[str], said: str) -> None:
    done = call("generate", *arguments)
    assert done.code == 2
    assert said in done.err


def test_a_file_that_is_not_there_is_one_line(call, tmp_path: Path) -> None:
    done = call("generate", "--jsonl", "--backend", "numpy", "-f", tmp_path / "none.jsonl")
    assert done.code == 1
    assert "none.jsonl" in done.err.splitlines()[-1]


def test_few_lines_are_read_ahead(llm: Llama, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """However many there are: places are as many as lines that have no answer."""
    monkeypatch.setattr(batch, "MAX_LINES", 3)
    most = 0
    begin = batch.Batch._begin

    def note(self: batch.Batch, *line: Any) -> None:
        nonlocal most
        begin(self, *line)
        most = max(most, len(self._lines))

    monkeypatch.setattr(batch.Batch, "_begin", note)
    one = batch.Batch(llm, io.BytesIO(lines(*[{"prompt": "Tom"}] * 30)), {"max_tokens": 1}, True)
    assert one.run(batch.BatchProgress(0))
    assert most <= 3
    assert one.n_answers == 30
    assert len(capsys.readouterr().out.splitlines()) == 30


def test_a_line_that_never_ends_is_refused(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_LINE_BYTES", 1000)
    one = batch.Batch(llm, io.BytesIO(b"x" * 100_000), {}, True)
    with pytest.raises(npllama.NpllamaError, match="a line has more than"):
        one.run(batch.BatchProgress(0))


def test_a_line_that_ctrl_c_kept_from_beginning_has_no_answer(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    submit, begun = llm.submit, []

    def interrupted(prompt: str, **options: Any) -> Any:
        begun.append(prompt)
        if len(begun) == 2:
            raise KeyboardInterrupt
        handle = submit(prompt, **options)
        handle.result()
        return handle

    monkeypatch.setattr(llm, "submit", interrupted)
    one = batch.Batch(llm, io.BytesIO(lines(*[{"prompt": f"Tom {i}"} for i in range(3)])), {"max_tokens": 1}, True)
    assert one.run(batch.BatchProgress(0)) is False
    assert one.n_errors == 0
    assert len(answers(capsys.readouterr().out.encode())) == 1


@pytest.mark.skipif(os.name == "nt", reason="signals: sent as on Unix")
def test_answers_come_while_the_pipe_is_open_and_ctrl_c_keeps_what_is_done() -> None:
    command = [sys.executable, "-m", "npllama", "generate", "--jsonl", "-m", str(DEMO), "--backend", "numpy"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(lines({"prompt": "Tom", "max_tokens": 3, "id": 1}))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        endless = {"prompt": "Tom", "max_tokens": 10**8, "context_policy": "slide", "id": 2}
        process.stdin.write(lines(endless, {"prompt": "Tom", "max_tokens": 2, "id": 3}, {"prompt": 1, "id": 4}))
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert {a["id"] for a in answers(out)} <= {3, 4}
    assert b"interrupted: " in err
