"""What is accepted is honoured or refused: every parameter of every call, with what it is not, beyond its range, and
with a value that must change what comes out. A parameter without a line here fails."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import TINY, write_model_directory, write_safetensors_checkpoint
from parameter_lines import (
    BASE,
    CHOICE,
    CONTEXT,
    FLAG,
    FUNCTION,
    N_PIECES,
    OWN_LINES,
    PROMPT,
    TEXT_LINES,
    THING,
    WHOLE,
    Line,
    digits,
    padding,
    three,
)

import npllama
from npllama.commands import batch
from npllama.errors import NpllamaError, UsageError
from npllama.generation.sessions.session import Session
from npllama.inference import Llama
from npllama.options import MoreOptions, SamplingOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parameters") / "model"
    write_model_directory(path, TINY, n_pieces=N_PIECES)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Llama]:
    with npllama.load(folder, backend="numpy", chat_format="zephyr") as opened:
        yield opened


# ---------------------------------------------------------------- what comes out


class Seen(NamedTuple):
    """What a caller gets of a text."""

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    slid_tokens: int
    n: int
    seed: int
    logprobs: object


def seen(result: Any) -> Seen:
    first = result[0] if isinstance(result, list) else result
    n = len(result) if isinstance(result, list) else 1
    return Seen(
        *(first.text, first.tokens, first.finish_reason, first.usage.prompt_tokens, first.slid_tokens, n, first.seed),
        [(one.token, round(one.logprob, 2), len(one.top), len(one.sampled_top)) for one in first.logprobs or ()],
    )


def streamed(stream: Any) -> Seen:
    text = "".join(piece.text for piece in stream)
    found = seen(stream.result() if callable(stream.result) else stream.result)
    assert found.text == text
    return found


def in_session(llm: Llama, prompt: Any, options: dict[str, Any]) -> Seen:
    with llm.session(seed=1) as session:
        session.append(prompt)
        return seen(session.generate(**options))


def chat(llm: Llama, messages: Any, options: dict[str, Any]) -> Seen:
    answer = llm.chat(messages, **options)
    if options.get("stream"):
        assert list(answer)
        answer = answer.result
    return seen(answer.result)


TEXT_CALLS: dict[str, tuple[Callable[[Llama, Any, dict[str, Any]], Seen], Callable[..., Any]]] = {
    "generate": (lambda llm, prompt, options: seen(llm.generate(prompt, **options)), Llama.generate),
    "stream": (lambda llm, prompt, options: streamed(llm.stream(prompt, **options)), Llama.stream),
    "submit": (lambda llm, prompt, options: streamed(llm.submit(prompt, **options)), Llama.stream),
    "session": (in_session, Llama.generate),
    "chat": (chat, Llama.generate),
}
"""The calls that write a text, and the call whose parameters they take."""
NOT_TAKEN = {
    "session": {"n", "bos", "eos", "context_policy", "n_keep"},
    "chat": {"n", "bos", "eos", "echo"},
}
"""What a call refuses by name."""


def parameters(function: Callable[..., Any]) -> set[str]:
    """The names of a call's parameters, those of MoreOptions included."""
    found = inspect.signature(function).parameters
    names = {name for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self", "llm"}
    takes_more = any(p.kind == p.VAR_KEYWORD and "MoreOptions" in str(p.annotation) for p in found.values())
    return names | (set(MoreOptions.__annotations__) if takes_more else set())


# ---------------------------------------------------------------- options of texts


def taken(call: str) -> list[str]:
    """Names of the options that a call takes."""
    names = parameters(TEXT_CALLS[call][1]) - {"prompt"} - NOT_TAKEN.get(call, set())
    return sorted(names)


def prompt_of(call: str, text: Any) -> Any:
    return [{"role": "user", "content": text}] if call == "chat" else text


def written(llm: Llama, call: str, **options: Any) -> Seen:
    return TEXT_CALLS[call][0](llm, prompt_of(call, PROMPT), {**BASE, **options})


EVERY = [(call, name) for call in TEXT_CALLS for name in taken(call)]


@pytest.mark.parametrize(("call", "name"), EVERY)
def test_an_option_of_a_text_is_refused_or_changes_it(llm: Llama, call: str, name: str) -> None:
    assert name in TEXT_LINES, f"{name} is new: say in TEXT_LINES what it is not, and what it changes"
    line = TEXT_LINES[name]
    base = dict(line.base)
    if call in ("session", "chat"):
        base = {key: value for key, value in base.items() if key not in NOT_TAKEN[call]}
    for value in (*line.wrong, *line.beyond):
        with pytest.raises(NpllamaError, match=line.names or name) as refusal:
            written(llm, call, **{**base, name: value})
        assert str(refusal.value).count("\n") == 0
    before, after = written(llm, call, **base), written(llm, call, **{**base, name: line.value})
    assert getattr(before, line.changes) != getattr(after, line.changes), (before, after)
    assert before == written(llm, call, **base), "and nothing else does"


def test_every_option_has_a_line_and_no_line_is_for_nothing() -> None:
    assert set(TEXT_LINES) == parameters(Llama.generate)
    assert parameters(Llama.stream) == parameters(Llama.generate) - {"n"}
    assert parameters(Llama.chat) | parameters(Llama.submit) == {*OWN_LINES, "max_tokens", "prompt"}
    assert parameters(Session.generate) | parameters(Session.stream) == {"max_tokens"}
    assert set(TEXT_LINES) >= {option.name for option in dataclasses.fields(SamplingOptions)}


@pytest.mark.parametrize("call", TEXT_CALLS)
def test_what_is_no_option_of_a_call_is_refused_by_name(llm: Llama, call: str) -> None:
    for name in ("temprature", "top_K", "n_predict", "self"):
        with pytest.raises(TypeError, match=name):
            written(llm, call, **{name: 1})
    for name in sorted(NOT_TAKEN.get(call, ())):
        with pytest.raises(UsageError, match=rf"\b{name}\b"):
            written(llm, call, **{name: TEXT_LINES[name].value})
    for name in ("max_new_tokens", "repetition_penalty"):
        both = {"repeat_penalty": 1.5} if name == "repetition_penalty" else {}
        with pytest.raises(UsageError, match="mean the same; give one of them"):
            written(llm, call, **both, **{name: 3})


@pytest.mark.parametrize("call", ["generate", "stream", "submit", "session"])
def test_a_prompt_is_refused_or_changes_the_text(llm: Llama, call: str) -> None:
    line, function = TEXT_LINES["prompt"], TEXT_CALLS[call][0]
    beyond = [value for value in line.beyond if not (call == "session" and value == [])]
    for value in (*line.wrong, *beyond):
        with pytest.raises(UsageError, match=r"prompt|token ids"):
            function(llm, value, BASE)
    assert function(llm, PROMPT, BASE).tokens != function(llm, line.value, BASE).tokens
    assert function(llm, llm.tokenizer.encode(PROMPT), BASE) == function(llm, PROMPT, BASE)


@pytest.mark.parametrize("name", OWN_LINES)
def test_a_parameter_of_chat_is_refused_or_changes_the_answer(llm: Llama, name: str) -> None:
    line = OWN_LINES[name]
    messages = [{"role": "user", "content": "a <|user|> b" if name == "escape" else PROMPT}]
    options = {"messages": messages, **BASE}
    for value in (*line.wrong, *line.beyond):
        with pytest.raises(UsageError, match=name):
            llm.chat(**{**options, name: value})
    if name == "messages":
        assert llm.chat(**options).message != llm.chat(**{**options, name: line.value}).message
    elif name == "stream":
        assert (
            "".join(piece.text for piece in llm.chat(**options, stream=True)) == llm.chat(**options).message["content"]
        )
    else:
        with pytest.raises(UsageError, match="holds"):
            llm.chat(**options)
        assert llm.chat(**options, escape=True).escaped


# ---------------------------------------------------------------- lines of --jsonl

BIASES = {digits: dict.fromkeys(range(52, 61), 20), three: dict.fromkeys(range(52, 55), 20)}
BIASES[padding] = dict.fromkeys(range(N_PIECES, TINY.vocab_size), 60)
"""What a line can say in the place of a function."""


def answered(llm: Llama, capsys: pytest.CaptureFixture[str], *lines: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to lines."""
    data = "".join(json.dumps({"prompt": PROMPT, **line}) + "\n" for line in lines).encode()
    capsys.readouterr()
    batch.Batch(llm, io.BytesIO(data), {}, ordered=True).run(batch.BatchProgress(0))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def in_json(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a line: biases in the place of functions."""
    function = options.get("logits_processor")
    rest = {name: value for name, value in options.items() if name != "logits_processor"}
    return rest if function is None else {"logit_bias": BIASES[function], **rest}


def is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", sorted(parameters(Llama.stream) - {"prompt"}))
def test_an_option_of_a_line_is_refused_or_changes_its_answer(
    llm: Llama, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    line = TEXT_LINES[name]
    base = in_json({**BASE, **line.base})
    if name in batch.NOT_IN_A_LINE:
        (answer,) = answered(llm, capsys, {**base, name: 1})
        assert f"'{name}' is no option of a line" in answer["error"]
        return
    values = [value for value in (*line.wrong, *line.beyond) if is_json(value) and value != {"1": 1}]
    for answer in answered(llm, capsys, *({**base, name: value} for value in values)):
        assert (line.names or name) in answer["error"]
    if name == "sampling":
        return  # the only other value that is text needs a model that suggests something: see test_flags.py
    value = {"4": 30, "52": -3} if name == "logit_bias" else line.value
    before, after = answered(llm, capsys, base, {**base, name: value})
    for answer in (before, after):
        answer["prompt_tokens"] = answer["usage"]["prompt_tokens"]
        answer.setdefault("logprobs", None)
    assert before[line.changes] != after[line.changes]


def test_a_line_has_one_answer(llm: Llama, capsys: pytest.CaptureFixture[str]) -> None:
    (answer,) = answered(llm, capsys, {"n": 1})
    assert (
        answer["error"] == "'n' is no option of a line: a line has one answer; write it once for each, with a seed "
        "of its own."
    )


# ---------------------------------------------------------------- scores


SCORE_CALLS: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, Line]]] = {
    Llama.score: (
        {"prompt": PROMPT, "continuation": " sat"},
        {
            "prompt": Line((7, None, b"x", {}, [5], True), (), "a dog"),
            "continuation": Line((7, None, b"x", {}, [5], True), ("",), " ran"),
        },
    ),
    Llama.score_many: (
        {"pairs": [(PROMPT, " sat")]},
        {"pairs": Line((7, None, "ab", ["ab"], [7], [("a",)], {"a": 1}), ([("a", "b", "c")],), [(PROMPT, " ran")])},
    ),
    Llama.rank: (
        {"prompt": PROMPT, "options": [" sat", " ran"]},
        {
            "prompt": Line((7, None, b"x", {}, [5], True), (), "a dog"),
            "options": Line(
                (7, None, "ab", [7], {"a": 1}, [[7]], True), ([], [""]), [" sat", " it"], names="option|text"
            ),
            "normalize": Line(CHOICE, ("words",), "tokens"),
        },
    ),
    Llama.choose: (
        {"prompt": PROMPT, "options": [" sat", " ran"]},
        {
            "prompt": Line((7, None, b"x", {}, [5], True), (), "a dog"),
            "options": Line((7, None, "ab", [7], {"a": 1}, [[7]], True), ([], [""]), [" run"], names="option|text"),
            "normalize": Line(CHOICE, ("words",), "bytes"),
        },
    ),
    Llama.embed: (
        {"texts": PROMPT},
        {
            "texts": Line((7, None, b"x", {}, [None], True), ([300], "a " * 90), "a dog"),
            "pooling": Line(CHOICE, ("max",), "last"),
            "normalize": Line((*FLAG, None), (), False),
        },
    ),
    Llama.perplexity: (
        {"text": "the cat sat on the mat " * 3},
        {
            "text": Line((7, None, b"x", {}, [None], True), ("", [300]), "a dog"),
            "n_ctx": Line(WHOLE, (0, 1, CONTEXT + 1), 8),
            "context_policy": Line(CHOICE, ("ring",), "slide"),
        },
    ),
    Llama.logits: ({"ids": [5, 6]}, {"ids": Line((7, None, b"x", {}, [None], True), ([300], [-1]), [5, 7])}),
}


@pytest.mark.parametrize(("call", "name"), [(call, name) for call in SCORE_CALLS for name in sorted(parameters(call))])
def test_a_parameter_of_a_score_is_refused_or_changes_it(llm: Llama, call: Callable[..., Any], name: str) -> None:
    base, lines = SCORE_CALLS[call]
    assert name in lines, f"{name} is new: say in SCORE_CALLS what it is not, and what it changes"
    line = lines[name]
    for value in (*line.wrong, *line.beyond):
        with pytest.raises(NpllamaError) as refusal:
            call(llm, **{**base, name: value})
        assert any(word in str(refusal.value) for word in (name, "prompt", "text", "token", "continuation"))
    before, after = call(llm, **base), call(llm, **{**base, name: line.value})
    assert not np.array_equal(*map(comparable, (before, after)))


def comparable(found: Any) -> Any:
    return found if isinstance(found, np.ndarray) else np.array(repr(found))


# ---------------------------------------------------------------- sessions

OF_SESSION: dict[str, Line] = {
    "seed": Line(WHOLE, (-2, 2**64), 7),
    "context_policy": Line(CHOICE, ("ring",), "slide", "finish_reason"),
    "n_keep": Line((*WHOLE, None), (-1, 2**40, CONTEXT), 30),
}


@pytest.mark.parametrize("name", sorted(parameters(Llama.session)))
def test_a_parameter_of_a_session_is_refused_or_changes_it(llm: Llama, name: str) -> None:
    line = OF_SESSION[name]
    base: dict[str, Any] = {"seed": 5, **({"context_policy": "slide"} if name == "n_keep" else {})}
    for value in (*line.wrong, *line.beyond):
        with pytest.raises(UsageError, match=name):
            llm.session(**{**base, name: value})

    def text(**options: Any) -> Seen:
        with llm.session(**options) as session:
            session.append(PROMPT)
            return seen(session.generate(90, ignore_eos=True))

    before, after = text(**base), text(**{**base, name: line.value})
    assert before.tokens != after.tokens


def test_a_parameter_of_append_rewind_fork_and_save_is_refused_or_changes_the_text(llm: Llama) -> None:
    assert parameters(Session.append) == {"text", "bos", "eos"}
    assert parameters(Session.rewind) == {"n"}
    assert parameters(Session.fork) == {"k"}
    assert parameters(Session.save) == {"path"} == parameters(npllama.load_session)
    with llm.session() as session:
        for name in ("bos", "eos"):
            for value in FLAG:
                with pytest.raises(UsageError, match=name):
                    session.append(PROMPT, **{name: value})
            with pytest.raises(UsageError, match=name):
                session.append([5], **{name: True})
        for wrong in (7, None, b"x", {}, THING, [300], [None], [1.5]):
            with pytest.raises(UsageError, match=r"prompt|token ids"):
                session.append(wrong)
        session.append(PROMPT, bos=False, eos=True)
        n = len(session.tokens)
        assert session.tokens == llm.tokenizer.encode(PROMPT, False, True)
        for wrong in (*WHOLE, None, -1, n + 1):
            with pytest.raises(UsageError, match="rewind to"):
                session.rewind(wrong)
        for wrong in (*WHOLE, None, 0, -1, 5000):
            with pytest.raises(UsageError, match="fork"):
                session.fork(wrong)
        session.rewind(2)
        assert len(session.tokens) == 2
        assert len(session.fork(3)) == 3
        for wrong in (7, None, b"x", THING):
            with pytest.raises(UsageError, match="path"):
                session.save(wrong)
            with pytest.raises(UsageError, match="path"):
                npllama.load_session(wrong, llm)


# ---------------------------------------------------------------- a model


OF_LOAD: dict[str, tuple[Line, Callable[[Llama], object]]] = {
    "model": (Line((7, [], True, b"x", THING), ("", "/nonexistent"), "demo"), lambda llm: llm.config),
    "backend": (Line((7, None, ["numpy"], True), ("gpu",), "numba"), lambda llm: llm.backend),
    "threads": (Line(WHOLE, (0, -1, 5000), 3, base={"threads": 1}), lambda llm: llm.engine.threads),
    "context": (Line(WHOLE, (0, -1), 32), lambda llm: llm.context),
    "n_ctx": (Line(WHOLE, (0, -1), 32, names="context"), lambda llm: llm.context),
    "kv_dtype": (Line(CHOICE, ("f64",), "q8"), lambda llm: llm.score([5] * 30, [6, 9, 8]).logprob),
    "kv_memory": (Line(WHOLE, (0, -1, 10), 1 << 20), lambda llm: llm.runtime.scheduler.pool.capacity),
    "parallel": (Line(WHOLE, (0, -1, 2000), 3), lambda llm: llm.runtime.parallel),
    "speculation": (Line((*FLAG, None), (), False), lambda llm: most_rows(llm)),
    "dtype": (Line((7, [], True), ("f99",), "q8"), lambda llm: llm.manifest["tensors"]["wq"]["format"]),
    "progress": (Line(FUNCTION, (), None), lambda llm: None),
    "chat_format": (Line((7, [], True), ("gpt", "chatml"), "llama2"), lambda llm: llm.chat_format),
}


def most_rows(llm: Llama) -> bool:
    """Whether a text that repeats itself has guesses fed beside its ids."""
    fed: list[int] = []
    forward = llm.engine.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            llm.engine, "forward", lambda cache, tokens, *rest: fed.append(len(tokens)) or forward(cache, tokens, *rest)
        )
        llm.generate([5, 6, 7] * 5, 40, temperature=0, logit_bias={5: 30.0})
    return max(fed[1:]) > 1


@pytest.mark.parametrize("name", sorted(parameters(npllama.load)))
def test_a_parameter_of_load_is_refused_or_changes_the_model(
    folder: Path, tmp_path: Path, models: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert name in OF_LOAD, f"{name} is new: say in OF_LOAD what it is not, and what it changes"
    line, shown = OF_LOAD[name]
    source = folder
    if name in ("dtype", "progress"):
        source = tmp_path / "checkpoint"
        write_safetensors_checkpoint(source)
    base: dict[str, Any] = {"model": source, "backend": "numpy"}
    for value in (*line.wrong, *line.beyond):
        with pytest.raises(NpllamaError, match=line.names or name if name != "model" else "model|checkpoint"):
            npllama.load(**{**base, name: value})
    if name == "progress":
        told: list[object] = []
        npllama.load(**base, progress=lambda *news: told.append(news)).close()
        assert told
    elif name == "backend" and os.environ.get("NPLLAMA_BACKEND") != "numba":  # nothing is to be compiled
        monkeypatch.setenv("NPLLAMA_BACKEND", "what auto means")
        with pytest.raises(UsageError, match="what auto means"):
            npllama.load(source)
        npllama.load(**base).close()
    else:
        value = npllama.inference.DEMO if name == "model" else line.value
        assert loaded(shown, **{**base, **line.base}) != loaded(shown, **{**base, name: value})


def loaded(shown: Callable[[Llama], object], **options: Any) -> object:
    with npllama.load(**options) as llm:
        return shown(llm)
