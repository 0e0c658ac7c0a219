"""The public interface: what load, generate, stream and logits promise, on a tiny random model."""

from __future__ import annotations

import dataclasses
import inspect
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, write_model_directory

import npllama
from npllama.inference import Llama, Result

PROMPT = "the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inference") / "model"
    write_model_directory(path, seed=3)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Llama:
    return npllama.load(folder)


def greedy(llm: Llama, n: int = 20, **options: object) -> Result:
    return llm.generate(PROMPT, max_tokens=n, temperature=0, **options)


def with_ends(folder: Path, tmp_path: Path, ids: tuple[int, ...], **changes: int) -> Path:
    """The same model with other ids that end a text."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((folder / "npllama.json").read_text())
    manifest["config"] = dataclasses.replace(TINY, eos_token_ids=ids, **changes).to_json()
    (tmp_path / "npllama.json").write_text(json.dumps(manifest))
    return tmp_path


def test_the_format_of_the_cache_reaches_the_cache(folder: Path) -> None:
    with npllama.load(folder, kv_dtype="q8") as narrow:
        assert greedy(narrow).usage.completion_tokens > 0
        assert narrow.runtime.scheduler.pool.cache.k.codes.dtype == np.int8
    with pytest.raises(npllama.UsageError, match="kv_dtype"):
        npllama.load(folder, kv_dtype="int8")


# ---------------------------------------------------------------- prompts


def test_a_text_gets_bos_and_ids_are_taken_as_they_are(llm: Llama) -> None:
    ids = llm.tokenizer.encode(PROMPT, bos=True)
    assert ids[0] == TINY.bos_token_id
    assert greedy(llm).tokens == llm.generate(ids, max_tokens=20, temperature=0).tokens
    without_bos = llm.generate(ids[1:], max_tokens=20, temperature=0)
    assert without_bos.usage.prompt_tokens == len(ids) - 1


def test_a_text_that_begins_with_the_characters_of_bos_gets_bos_once_more(llm: Llama) -> None:
    r = llm.generate("<s>", max_tokens=0)
    assert r.usage.prompt_tokens == len(llm.tokenizer.encode("<s>", bos=False)) + 1 > 2


def test_an_empty_text_is_bos_alone(llm: Llama) -> None:
    assert llm.generate("", max_tokens=1).usage.prompt_tokens == 1


def test_a_list_of_prompts_gives_a_list_of_results_in_order(llm: Llama) -> None:
    prompts = ["a", [1, 70, 80], "the", np.array([1, 90])]
    results = llm.generate(prompts, max_tokens=5, temperature=0)
    alone = [llm.generate(p, max_tokens=5, temperature=0) for p in prompts]
    assert [r.tokens for r in results] == [r.tokens for r in alone]
    assert [r.usage for r in results] == [r.usage for r in alone]


def test_prompts_of_one_list_draw_independently(llm: Llama) -> None:
    first, second = llm.generate(["a", "a"], max_tokens=20, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=5)
    assert first.tokens != second.tokens
    assert (
        first.tokens == llm.generate("a", max_tokens=20, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=5).tokens
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no token"),
        ([1, 300], "token ids must be 0 to 299"),
        ([-1], "token ids must be 0 to 299"),
        ([1, True], "got bool in the list"),
        ([1, 2.0], "got float in the list"),
        ([1, "a"], "got str in the list"),
        (b"abc", "got bytes"),
        (7, "got int"),
        (None, "got NoneType"),
        ([[1, 2], 3], "got int"),
        ([b"ab"], "got bytes"),
        ([[1], "a", [[2]]], "got list in the list"),
        (np.array(5), "got ndarray"),
        (np.array([1.0, 2.0]), "got float64"),
        (np.array([True]), "got bool"),
        ({1: 2}, "got dict"),
        (iter([1, 2]), "got list_iterator"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_prompt_that_is_none_is_refused(llm: Llama, prompt: object, message: str) -> None:
    with pytest.raises(npllama.UsageError, match=message):
        llm.generate(prompt, max_tokens=1)


@pytest.mark.parametrize("ids", [None, 5, b"ab", {1, 2}, {1: 2}, iter([1]), "a", ["a"], [True], [[1]], np.array([1.0])])
def test_logits_are_of_a_list_of_ids(llm: Llama, ids: object) -> None:
    with pytest.raises(npllama.UsageError, match="a list of token ids"):
        llm.logits(ids)


def test_ids_may_be_numbers_and_arrays_of_numpy(llm: Llama) -> None:
    options = {"max_tokens": 5, "temperature": 0}
    expected = llm.generate([1, 70, 80], **options).tokens
    assert llm.generate(np.array([1, 70, 80], np.uint64), **options).tokens == expected
    two = llm.generate(np.array([[1, 70, 80], [1, 70, 80]]), **options)
    assert [r.tokens for r in two] == [expected, expected]
    assert [r.usage.prompt_tokens for r in llm.generate(np.array([[1], [70]]), **options)] == [1, 1]


def test_stream_takes_one_prompt(llm: Llama) -> None:
    with pytest.raises(npllama.UsageError, match="stream takes one prompt"):
        llm.stream(["a", "b"])


# ---------------------------------------------------------------- results


def test_the_tokens_are_the_generated_ids_and_the_text_is_theirs(llm: Llama) -> None:
    r = greedy(llm)
    ids = llm.tokenizer.encode(PROMPT)
    assert len(r.tokens) == r.usage.completion_tokens == 20
    assert r.usage.total_tokens == len(ids) + 20
    assert llm.tokenizer.decode(ids) + r.text == llm.tokenizer.decode(ids + r.tokens)
    assert r.prompt_s > 0
    assert r.generate_s > 0


def test_echo_puts_the_prompt_before_the_text(llm: Llama) -> None:
    assert greedy(llm, echo=True).text == PROMPT + greedy(llm).text
    assert greedy(llm, echo=True).tokens == greedy(llm).tokens


def test_greedy_takes_the_largest_of_the_logits_each_time(llm: Llama) -> None:
    r = greedy(llm, 6)
    ids = llm.tokenizer.encode(PROMPT)
    for token in r.tokens:
        assert token == llm.logits(ids)[-1].argmax()
        ids.append(token)


def test_the_pieces_of_a_stream_add_up_to_what_generate_returns(llm: Llama) -> None:
    stream = llm.stream(PROMPT, max_tokens=20, seed=4, stop=["zzz"], echo=True)
    pieces = list(stream)
    whole = llm.generate(PROMPT, max_tokens=20, seed=4, stop=["zzz"], echo=True)
    assert "".join(p.text for p in pieces) == stream.result.text == whole.text
    assert [p.token for p in pieces if p.token is not None] == whole.tokens
    assert stream.result.usage == whole.usage
    assert stream.result.finish_reason == whole.finish_reason


def test_a_stream_left_early_knows_what_has_come_so_far(llm: Llama) -> None:
    stream = llm.stream(PROMPT, max_tokens=20, temperature=0)
    came = [next(stream), next(stream)]
    stream.close()
    assert stream.result.tokens == [p.token for p in came]
    assert stream.result.text == came[0].text + came[1].text


# ---------------------------------------------------------------- the end of a text


def test_max_tokens_ends_a_text_with_length(llm: Llama) -> None:
    r = greedy(llm, 3)
    assert len(r.tokens) == 3
    assert r.finish_reason == "length"


def test_max_tokens_0_reads_the_prompt_only(llm: Llama) -> None:
    r = greedy(llm, 0)
    assert (r.text, r.tokens, r.finish_reason) == ("", [], "length")
    assert r.usage.prompt_tokens == len(llm.tokenizer.encode(PROMPT))


@pytest.mark.parametrize("all_of_them", [-1, None])
def test_without_a_maximum_a_text_goes_on_to_the_end_of_the_context(llm: Llama, all_of_them: int | None) -> None:
    r = greedy(llm, all_of_them)
    assert r.usage.total_tokens == llm.context == TINY.max_seq_len
    assert r.finish_reason == "length"


def test_the_context_ends_a_text_before_max_tokens(folder: Path) -> None:
    with npllama.load(folder, context=10) as short:
        r = greedy(short, 500)
    assert r.usage.total_tokens == 10
    assert r.finish_reason == "length"


def test_each_id_that_ends_a_text_ends_it_and_is_not_returned(llm: Llama, folder: Path, tmp_path: Path) -> None:
    tokens = greedy(llm).tokens
    end = tokens[3]
    with npllama.load(with_ends(folder, tmp_path, (2, end))) as other:
        r = greedy(other)
    assert r.tokens == tokens[: tokens.index(end)]
    assert r.finish_reason == "stop"
    assert r.text == llm.generate(PROMPT, max_tokens=len(r.tokens), temperature=0).text if r.tokens else r.text == ""


def test_a_sampled_bos_ends_a_text(llm: Llama, folder: Path, tmp_path: Path) -> None:
    ids, tokens = llm.tokenizer.encode(PROMPT), greedy(llm).tokens
    with npllama.load(with_ends(folder, tmp_path, (2,), bos_token_id=tokens[2])) as other:
        r = other.generate(ids, max_tokens=20, temperature=0)
    assert r.tokens == tokens[: tokens.index(tokens[2])]
    assert r.finish_reason == "stop"


def test_a_stop_string_is_found_across_tokens_and_not_returned(llm: Llama) -> None:
    text = greedy(llm, 40).text
    stop = text[5:9]
    r = greedy(llm, 40, stop=stop)
    assert r.text == text[: text.index(stop)]
    assert r.finish_reason == "stop"
    assert 0 < len(r.tokens) < 40


def test_of_several_stop_strings_the_first_in_the_text_counts(llm: Llama) -> None:
    text = greedy(llm, 40).text
    r = greedy(llm, 40, stop=(text[20:24], text[5:9], "not in the text"))
    assert r.text == text[: min(text.index(text[20:24]), text.index(text[5:9]))]


def test_a_stop_string_that_never_comes_changes_nothing(llm: Llama) -> None:
    text = greedy(llm).text
    r = greedy(llm, stop=[text[-1] + "\x00"])  # its beginning is held back to the end
    assert (r.text, r.finish_reason) == (text, "length")


@pytest.mark.parametrize("call", ["generate", "stream"])
@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [None], [7], 7, b"a"])
def test_a_stop_that_is_no_text_is_refused_at_once(llm: Llama, call: str, stop: object) -> None:
    with pytest.raises(npllama.UsageError, match=r"stop='.*': needs text of at least one character"):
        getattr(llm, call)(PROMPT, max_tokens=1, stop=stop)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(folder: Path) -> None:
    with npllama.load(folder, context=8) as short:
        with pytest.raises(npllama.ContextError, match="the prompt has 9 tokens, the context holds 8; shorten"):
            short.generate([1] * 9, max_tokens=0)
        with pytest.raises(npllama.ContextError, match="8 tokens and needs room for one more, the context holds 8"):
            short.generate([1] * 8, max_tokens=1)
        with pytest.raises(npllama.ContextError, match="the prompt has 9 tokens"):
            short.logits([1] * 9)
        assert short.generate([1] * 8, max_tokens=0).tokens == []
        assert short.logits([1] * 8).shape == (8, TINY.vocab_size)


# ---------------------------------------------------------------- seeds


def test_a_seed_makes_a_text_repeatable(llm: Llama) -> None:
    first = llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=11)
    again = llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=11)
    other = llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=12)
    assert first.tokens == again.tokens != other.tokens
    assert first.seed == 11


def test_a_random_seed_is_reported_and_repeats_its_text(llm: Llama) -> None:
    first = llm.generate(PROMPT, max_tokens=30, temperature=1.5)
    assert llm.generate(PROMPT, max_tokens=30, temperature=1.5, seed=first.seed).tokens == first.tokens
    assert llm.generate(PROMPT, max_tokens=1, seed=-1).seed != -1


def test_a_text_does_not_depend_on_what_ran_before(folder: Path, llm: Llama) -> None:
    llm.generate("something else entirely", max_tokens=30)
    with npllama.load(folder) as fresh:
        assert greedy(fresh).tokens == greedy(llm).tokens


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_tokens", -2),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("min_p", -0.5),
        ("repeat_penalty", 0.0),
        ("seed", 2**64),
        ("seed", -2),
        ("seed", "1"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_an_option_out_of_range_is_refused_by_name(llm: Llama, call: str, option: str, value: object) -> None:
    with pytest.raises(npllama.UsageError, match=f"^{option}="):
        getattr(llm, call)(PROMPT, **{option: value})


def test_whole_numbers_may_be_numpys(llm: Llama, folder: Path) -> None:
    options = {"max_tokens": np.int32(4), "seed": np.uint64(7), "top_k": np.int64(9), "temperature": np.float32(1)}
    r = llm.generate(PROMPT, **options)
    assert (len(r.tokens), r.seed) == (4, 7)
    with npllama.load(folder, backend="numpy", threads=np.int64(1), context=np.int16(9)) as short:
        assert (short.context, short.engine.threads) == (9, 1)


@pytest.mark.parametrize(
    ("option", "alias", "value"),
    [("max_tokens", "max_new_tokens", 4), ("repeat_penalty", "repetition_penalty", 1.5)],
)
def test_a_parameter_given_under_two_names_is_refused(llm: Llama, option: str, alias: str, value: float) -> None:
    with pytest.raises(npllama.UsageError, match=f"{option}='2' and {alias}='{value}' mean the same; give one"):
        llm.generate(PROMPT, **{option: 2, alias: value})
    llm.generate(PROMPT, **{option: value, alias: value})


def test_a_context_given_under_two_names_is_refused(folder: Path) -> None:
    with pytest.raises(npllama.UsageError, match="context='8' and n_ctx='9' mean the same"):
        npllama.load(folder, context=8, n_ctx=9)


@pytest.mark.parametrize("model", [5, b"model", []])
def test_a_model_that_is_no_path_is_refused(model: object) -> None:
    with pytest.raises(npllama.UsageError, match="needs the path of a model directory"):
        npllama.load(model)


def test_other_libraries_names_mean_the_same(llm: Llama, folder: Path) -> None:
    assert llm.generate(PROMPT, temperature=0, max_new_tokens=4).tokens == greedy(llm, 4).tokens
    assert greedy(llm, repetition_penalty=1.7).tokens == greedy(llm, repeat_penalty=1.7).tokens
    with npllama.load(folder, n_ctx=9) as short:
        assert short.context == 9


def test_a_repetition_penalty_changes_the_text(llm: Llama) -> None:
    assert greedy(llm, 40, repeat_penalty=1.7).tokens != greedy(llm, 40).tokens


def test_generate_and_stream_take_the_same_options() -> None:
    def options(function: object) -> list[tuple[str, object]]:
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()][2:]

    assert [option for option in options(Llama.generate) if option != ("n", 1)] == options(Llama.stream)


@pytest.mark.parametrize("context", [0, -1, 2.0, True])
def test_a_context_that_is_no_number_of_positions_is_refused(folder: Path, context: object) -> None:
    with pytest.raises(npllama.UsageError, match="context="):
        npllama.load(folder, context=context)


def test_a_model_that_claims_a_long_context_gets_4096_and_a_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with npllama.load(with_ends(folder, tmp_path, (2,), max_seq_len=100_000)) as long:
        assert long.context == 4096
    assert "claims a context of 100000 positions; using 4096" in caplog.text


def test_a_context_beyond_the_models_own_is_granted_with_a_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with npllama.load(folder, context=100) as long:
        assert long.context == 100
        assert np.isfinite(long.logits([1] * 100)).all()
    assert "a context of 100 positions is more than the 64" in caplog.text


def test_a_directory_that_is_no_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(npllama.ModelError, match=r"holds no npllama\.json"):
        npllama.load(tmp_path)


# ---------------------------------------------------------------- logits


def test_logits_are_those_of_the_next_token_after_each_id(llm: Llama) -> None:
    ids = [1, 70, 80, 90, 71]
    logits = llm.logits(ids)
    assert logits.shape == (5, TINY.vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[:3], llm.logits(ids[:3]), atol=1e-5)


def test_logits_add_nothing_to_the_ids(llm: Llama) -> None:
    assert llm.logits([70]).shape == (1, TINY.vocab_size)
    assert llm.logits([]).shape == (0, TINY.vocab_size)


# ---------------------------------------------------------------- life and death


def test_a_closed_model_refuses_to_work(folder: Path) -> None:
    with npllama.load(folder) as closed:
        pass
    with pytest.raises(npllama.UsageError, match="closed; load it again"):
        closed.generate(PROMPT)
    with pytest.raises(npllama.UsageError, match="closed; load it again"):
        closed.logits([1])
    closed.close()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's maps")
def test_a_closed_model_frees_its_maps(folder: Path, tmp_path: Path) -> None:
    def mapped() -> bool:
        return str(tmp_path / "w1.npy") in Path("/proc/self/maps").read_text()

    with npllama.load(with_ends(folder, tmp_path, (2,))) as llm:
        greedy(llm, 3)
        assert mapped()
    assert not mapped()


def test_a_generation_that_outlives_its_model_keeps_no_cache(folder: Path) -> None:
    llm = npllama.load(folder)
    stream = llm.stream(PROMPT, max_tokens=9)
    next(stream)
    pool = llm.runtime.scheduler.pool
    assert pool.available < pool.capacity
    llm.close()
    with pytest.raises(npllama.UsageError, match="closed; load it again"):
        list(stream)
    assert pool.available == pool.capacity


@pytest.mark.parametrize("value", [np.inf, 3e38])
def test_damaged_weights_are_an_error_and_no_warning(folder: Path, tmp_path: Path, value: float) -> None:
    damaged = with_ends(folder, tmp_path, (2,))
    w1 = np.load(tmp_path / "w1.npy")
    np.save(tmp_path / "w1.npy", np.full_like(w1, value))
    with npllama.load(damaged) as llm, pytest.raises(npllama.ModelError, match="the logits are not all finite"):
        llm.generate(PROMPT, max_tokens=1)


def test_two_threads_get_what_each_would_get_alone(llm: Llama) -> None:
    prompts = ["the cat", "a dog"]
    alone = [llm.generate(p, max_tokens=25, seed=9).tokens for p in prompts]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = llm.generate(prompts[i], max_tokens=25, seed=9).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == alone


def test_two_streams_of_one_model_do_not_disturb_each_other(llm: Llama) -> None:
    first, second = (llm.stream(p, max_tokens=8, temperature=0) for p in ("the cat", "a dog"))
    for _ in range(8):
        next(first), next(second)
    assert first.result.tokens == llm.generate("the cat", max_tokens=8, temperature=0).tokens
    assert second.result.tokens == llm.generate("a dog", max_tokens=8, temperature=0).tokens


def test_without_a_model_the_demo_model_is_opened() -> None:
    with npllama.load() as demo:
        r = demo.generate("", max_tokens=30, seed=1)
    assert len(r.text.split()) > 8
    assert r.text.isascii()
