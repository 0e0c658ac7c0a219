"""Draws of the chain against their probabilities; what may not come; the options. Steps: test_chain_steps.py."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, write_model_directory
from probabilities import Left, best_first, softmax

import npllama
from npllama.errors import ModelError, UsageError
from npllama.execution.drawing.top_k import top_k
from npllama.generation.sampling.sampler import Model, Sampler, SamplerState
from npllama.options import OFF, OPTIONS, MoreOptions, SamplingOptions

# ---------------------------------------------------------------- draws


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> npllama.Llama:
    path = tmp_path_factory.mktemp("chain") / "model"
    write_model_directory(path)
    with npllama.load(path, backend="numpy") as opened:
        yield opened


@pytest.fixture(scope="module")
def model(llm: npllama.Llama) -> Model:
    return Model(llm.config, llm.tokenizer, top_k)


def toy(values: list[float]) -> np.ndarray:
    """Logits of which only those of the ids from 60 on count, small ASCII letters among them."""
    logits = np.full(TINY.vocab_size, -1e4, np.float32)
    logits[100 : 100 + len(values)] = values
    return logits


TOY = toy([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0])
HISTORY = [100, 101, 104, 100, 101]


@pytest.mark.parametrize(
    "options",
    [
        {"typical_p": 0.7},
        {"top_n_sigma": 0.03, "temperature": 2.0},
        {"xtc_probability": 0.4, "xtc_threshold": 0.15},
        {"dry_multiplier": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repeat_last_n": 4},
        {"logit_bias": {100: -1.0, 107: 2.0, 102: -math.inf}},
        {"top_k": 3, "samplers": ("temperature", "top_k")},
        {"mirostat": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.0},
    ],
)
def test_draws_follow_the_formula(model: Model, options: dict[str, Any]) -> None:
    sampling = dataclasses.replace(OFF, **{"temperature": 0.9, **options})
    expected = expectation(sampling)
    sampler = Sampler(model, sampling, False, len(HISTORY))
    check_draws(sampler, TOY, expected)


def check_draws(sampler: Sampler, logits: np.ndarray, expected: Left) -> None:
    """What is drawn after HISTORY with many numbers is as probable as expected: chi-square."""
    n = 2500
    drawn = Counter(sampler.next_id(logits, HISTORY, 11, completion) for completion in range(n))
    assert set(drawn) <= set(expected)
    chi_square = sum((drawn[v] - n * p) ** 2 / (n * p) for v, p in expected.items())
    freedom = max(1, len(expected) - 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def expectation(options: SamplingOptions) -> Left:
    """The probabilities of TOY after HISTORY, by definition; xtc's two cases weighed."""
    left = {v: float(l) for v, l in enumerate(TOY) if l > -1e3}
    bias = dict(options.logit_bias)
    left = {v: l + bias.get(v, 0.0) for v, l in left.items() if bias.get(v) != -math.inf}
    q = softmax(left)
    match options:
        case SamplingOptions(typical_p=p) if p < 1:
            entropy = -math.fsum(x * math.log(x) for x in q.values())
            order = sorted(best_first(left), key=lambda v: abs(-math.log(q[v]) - entropy))
            sums = np.cumsum([q[v] for v in order])
            left = {v: left[v] for v in order[: int((sums <= p).sum()) + 1]}
        case SamplingOptions(top_n_sigma=n) if n > 0:
            border = max(left.values()) - n * float(np.std(TOY.astype(np.float64)))
            left = {v: l for v, l in left.items() if l >= border}
        case SamplingOptions(xtc_probability=p) if p > 0:
            best = [v for v in best_first(left) if q[v] >= options.xtc_threshold]
            rest = softmax({v: l / options.temperature for v, l in left.items() if v not in best[:-1]})
            whole = softmax({v: l / options.temperature for v, l in left.items()})
            return {v: p * rest.get(v, 0.0) + (1 - p) * whole[v] for v in left}
        case SamplingOptions(dry_multiplier=m) if m > 0:
            left[104] -= m * 1.75 ** (2 - 2)
        case SamplingOptions(presence_penalty=a, frequency_penalty=b) if a > 0:
            for v, count in {101: 2, 104: 1, 100: 1}.items():
                left[v] -= a + b * count
        case SamplingOptions(samplers=("temperature", "top_k")):
            left = {v: left[v] for v in best_first(left)[: options.top_k]}
        case SamplingOptions(mirostat=2, mirostat_tau=tau):
            heated = softmax({v: l / options.temperature for v, l in left.items()})
            left = {v: left[v] for v in left if -math.log2(heated[v]) <= 2 * tau}
    return softmax({v: l / options.temperature for v, l in left.items()})


ENDING = TOY.copy()
ENDING[[1, 2]] = 1.0, 1.8  # BOS and EOS, which end a text


def raised(ids: list[int], logits: np.ndarray) -> np.ndarray:
    """A function of a caller's own: what the ids say counts."""
    logits[ids[-1]] += 2
    logits[102] = -np.inf
    return logits


@pytest.mark.parametrize(
    ("options", "n_prompt", "left"),
    [
        ({"temperature": 0.5}, 5, lambda q: {v: p**2 for v, p in q.items()}),
        ({"top_k": 3}, 5, lambda q: {v: q[v] for v in best_first(q)[:3]}),
        ({"top_p": 0.6}, 5, lambda q: {v: q[v] for v in best_first(q)[: reaching(q, 0.6)]}),
        ({"min_p": 0.3}, 5, lambda q: {v: p for v, p in q.items() if p >= 0.3 * max(q.values())}),
        ({"repeat_penalty": 1.5}, 5, lambda q: {v: p * math.exp(PENALTY.get(v, 0.0)) for v, p in q.items()}),
        (
            {"repeat_penalty": 1.5, "repeat_last_n": 2},
            5,
            lambda q: {v: p * math.exp(PENALTY.get(v, 0.0) if v != 104 else 0.0) for v, p in q.items()},
        ),
        ({"min_tokens": 3}, 3, lambda q: {v: p for v, p in q.items() if v > 2}),
        ({"min_tokens": 3}, 2, lambda q: q),
        ({"ignore_eos": True}, 2, lambda q: {v: p for v, p in q.items() if v > 2}),
        ({"bad_words": ("c", "abd")}, 3, lambda q: {v: p for v, p in q.items() if v not in (102, 103)}),
        ({"bad_words": ("c", "abd")}, 4, lambda q: {v: p for v, p in q.items() if v != 102}),
        (
            {"logits_processor": raised},
            5,
            lambda q: {v: p * (math.e**2 if v == 101 else 1) for v, p in q.items() if v != 102},
        ),
        ({"mirostat": 2, "mirostat_tau": 1.2, "mirostat_eta": 0.0}, 5, lambda q: unsurprising_of(q, 2.4)),
    ],
)
def test_draws_of_every_other_option_follow_their_formula(
    model: Model, options: dict[str, Any], n_prompt: int, left: Callable[[Left], Left]
) -> None:
    """left: what an option makes of the probabilities, not normalised."""
    given = {**options}
    processor = given.pop("logits_processor", None)
    sampler = Sampler(model, dataclasses.replace(OFF, **{"temperature": 1.0, **given}), False, n_prompt, processor)
    weights = left(softmax({v: float(l) for v, l in enumerate(ENDING) if l > -1e3}))
    total = math.fsum(weights.values())
    check_draws(sampler, ENDING, {v: w / total for v, w in weights.items()})


PENALTY = {v: (-l / 3 if l > 0 else l / 2) for v, l in ((100, 2.0), (101, 1.5), (104, 0.5))}
"""What a repeat penalty of 1.5 adds to the logits of the ids of HISTORY."""


def reaching(q: Left, share: float) -> int:
    """How many of the best reach a share of the probability."""
    return int((np.cumsum([q[v] for v in best_first(q)]) < share).sum()) + 1


def unsurprising_of(q: Left, mu: float) -> Left:
    """Those whose surprise in bits is at most mu."""
    return {v: p for v, p in q.items() if -math.log2(p) <= mu}


def test_every_option_of_the_chain_is_drawn_with() -> None:
    tests = (test_draws_follow_the_formula, test_draws_of_every_other_option_follow_their_formula)
    cases = [case for test in tests for case in test.pytestmark[0].args[1]]
    drawn = {name for case in cases for name in (case if isinstance(case, dict) else case[0])}
    of_steps = {"dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"}  # test_chain_steps.py
    assert drawn | of_steps == {option.name for option in OPTIONS} | {"logits_processor"}


def test_draws_repeat_with_their_seed_and_differ_without(llm: npllama.Llama) -> None:
    options = {"xtc_probability": 0.5, "typical_p": 0.9, "dry_multiplier": 0.5, "max_tokens": 30, "temperature": 1.2}
    first = llm.generate("the cat", seed=3, **options)
    assert llm.generate("the cat", seed=3, **options).tokens == first.tokens
    assert llm.generate("the cat", seed=4, **options).tokens != first.tokens
    assert "".join(piece.text for piece in llm.stream("the cat", seed=3, **options)) == first.text
    together = llm.generate(["a dog", "the cat"], seed=3, **options)
    alone = llm.generate(["the cat", "the cat"], seed=3, **options)
    assert together[1].tokens == alone[1].tokens


# ---------------------------------------------------------------- mirostat


def test_mirostat_moves_mu_as_its_algorithm_says_and_its_state_can_be_kept(model: Model) -> None:
    options = dataclasses.replace(OFF, temperature=1.0, mirostat=2, mirostat_tau=1.5, mirostat_eta=0.3)
    sampler = Sampler(model, options, False, 1)
    mu, ids = 2 * 1.5, [1]
    kept: tuple[SamplerState, list[int]] | None = None
    for position in range(60):
        assert sampler.state == SamplerState(pytest.approx(mu, abs=1e-9))
        if position == 20:
            kept = copy.deepcopy(sampler.state), list(ids)
        q = softmax({v: float(l) for v, l in enumerate(TOY) if l > -1e3})
        ids.append(sampler.next_id(TOY, ids, 5, 0))
        left = [v for v in best_first(q) if -math.log2(q[v]) <= mu] or best_first(q)[:1]
        assert ids[-1] in left
        surprise = -math.log2(q[ids[-1]] / math.fsum(q[v] for v in left))
        mu -= 0.3 * (surprise - 1.5)
    assert kept is not None
    again = Sampler(model, options, False, 1)
    again.state, restored = kept
    while len(restored) < len(ids):
        restored.append(again.next_id(TOY, restored, 5, 0))
    assert restored == ids


@pytest.mark.parametrize("tau", [0.5, 1.5, 2.5])
def test_mirostat_holds_the_surprise(model: Model, tau: float) -> None:
    options = dataclasses.replace(OFF, temperature=1.0, mirostat=2, mirostat_tau=tau, mirostat_eta=0.1)
    sampler, ids = Sampler(model, options, False, 1), [1]
    wide = toy(list(np.linspace(0, -4, 60)))
    surprises = []
    for _ in range(700):
        before = sampler.state.mu
        ids.append(sampler.next_id(wide, ids[-2:], 8, len(ids)))
        surprises.append((before - sampler.state.mu) / 0.1 + tau)
    assert np.mean(surprises[150:]) == pytest.approx(tau, abs=0.15)


def test_mirostat_leaves_the_other_cuts_out(model: Model) -> None:
    options = SamplingOptions(temperature=1.0, top_k=1, mirostat=2, mirostat_tau=5.0)
    drawn = {Sampler(model, options, False, 1).next_id(TOY, [1], 1, i) for i in range(200)}
    assert len(drawn) > 4


# ---------------------------------------------------------------- what may not come


def test_a_text_does_not_end_before_min_tokens_nor_at_all_with_ignore_eos(model: Model) -> None:
    logits = toy([0.0, -1.0])
    logits[[1, 2]] = 50.0
    for options, n_generated, expected in (
        ({}, 0, 1),
        ({"min_tokens": 3}, 2, 100),
        ({"min_tokens": 3}, 3, 1),
        ({"ignore_eos": True}, 99, 100),
    ):
        sampler = Sampler(model, dataclasses.replace(OFF, temperature=0.0, **options), False, 4)
        assert sampler.next_id(logits, [1, 5, 6, 7] + [100] * n_generated, 0, 0) == expected, options


def test_min_tokens_and_ignore_eos_in_a_text(llm: npllama.Llama) -> None:
    ends = dict.fromkeys(llm.config.eos_token_ids, 9.0)
    options = {"max_tokens": 12, "seed": 1, "logit_bias": ends}
    assert llm.generate("the cat", **options).usage.completion_tokens < 5
    assert llm.generate("the cat", **options, min_tokens=7).usage.completion_tokens >= 7
    ignored = llm.generate("the cat", **options, ignore_eos=True)
    assert (ignored.usage.completion_tokens, ignored.finish_reason) == (12, "length")
    with pytest.raises(UsageError, match="min_tokens=13 is more than max_tokens=12; it needs at most that"):
        llm.generate("the cat", **options, min_tokens=13)


@pytest.mark.parametrize("words", [["e"], [" t", "ab", "\x01\x02"], "th", ["日本"]])
def test_bad_words_are_never_written_however_they_are_cut(llm: npllama.Llama, words: list[str] | str) -> None:
    forbidden = [words] if isinstance(words, str) else words
    bias = {3 + byte: 12.0 for byte in "".join([*forbidden, "x"]).encode()}
    options = {"max_tokens": 25, "temperature": 2.0, "logit_bias": bias}
    free = "".join(llm.generate("a", seed=seed, **options).text for seed in range(3))
    bound = [llm.generate("a", seed=seed, **options, bad_words=words).text for seed in range(3)]
    assert not any(word in text for word in forbidden for text in bound)
    assert forbidden == ["日本"] or any(word in free for word in forbidden)


def test_bad_words_across_ids_are_those_of_bytes(model: Model) -> None:
    options = dataclasses.replace(OFF, temperature=0.0, bad_words=("日本",))
    first = list("日本".encode())
    logits = np.full(TINY.vocab_size, -5.0, np.float32)
    logits[3 + first[-1]], logits[3 + ord("a")] = 9.0, 8.0
    sampler = Sampler(model, options, False, 1)
    assert sampler.next_id(logits, [1, *(3 + byte for byte in first[:-1])], 0, 0) == 3 + ord("a")
    assert sampler.next_id(logits, [1, *(3 + byte for byte in first[1:-1])], 0, 0) == 3 + first[-1]
    prompt = Sampler(model, options, False, 6)  # what the prompt says is not written
    assert prompt.next_id(logits, [1, *(3 + byte for byte in first[:-1])], 0, 0) == 3 + first[-1]


def test_a_bias_of_minus_infinity_forbids_and_where_nothing_is_left_it_is_said(model: Model) -> None:
    hot = {"temperature": 1e300, "logit_bias": dict.fromkeys(range(3, 299), -math.inf)}
    drawn = {Sampler(model, dataclasses.replace(OFF, **hot), False, 1).next_id(TOY, [1], 1, i) for i in range(80)}
    assert drawn == {0, 1, 2, 299}
    none = dataclasses.replace(OFF, logit_bias=dict.fromkeys(range(300), -math.inf))
    with pytest.raises(UsageError, match="no token is left that may come next: bad_words, logit_bias, min_tokens"):
        Sampler(model, none, False, 1).next_id(TOY, [1], 1, 0)
    with pytest.raises(UsageError, match="logit_bias has the id 300; this model has 0 to 299"):
        Sampler(model, dataclasses.replace(OFF, logit_bias={300: 1.0}), False, 1)


def test_a_repetition_ends_at_a_breaker_of_any_length(model: Model) -> None:
    text = "abc, abc"
    ids = model.tokenizer.encode(text, bos=False)
    logits = np.zeros(TINY.vocab_size, np.float32)
    logits[3 + ord(",")] = 0.5

    def chosen(*breakers: str) -> int:
        options = dataclasses.replace(OFF, temperature=0.0, dry_multiplier=1.0, dry_sequence_breakers=breakers)
        return Sampler(model, options, False, 1).next_id(logits, ids, 0, 0)

    assert chosen() == 0
    assert chosen("c") == chosen("bc") == chosen(",") == 3 + ord(",")
    assert chosen("zz") == chosen("a, ") == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_every_option(model: Model, value: float) -> None:
    logits = TOY.copy()
    logits[7] = value
    for options in ({"typical_p": 0.5}, {"mirostat": 2}, {"logit_bias": {7: 1.0}}):
        with pytest.raises(ModelError, match="logits are not all finite"):
            Sampler(model, dataclasses.replace(OFF, **options), False, 1).next_id(logits, [1], 0, 0)


# ---------------------------------------------------------------- logits_processor


def test_a_function_of_a_callers_own_has_the_last_word_before_the_steps(llm: npllama.Llama) -> None:
    seen: list[list[int]] = []

    def alternate(ids: list[int], logits: np.ndarray) -> np.ndarray:
        seen.append(ids)
        assert logits.shape == (TINY.vocab_size,)
        logits[:] = -np.inf
        logits[3 + ord("ab"[len(ids) % 2])] = 0.0
        return logits

    result = llm.generate("the cat", max_tokens=6, seed=1, logits_processor=alternate)
    assert result.text in ("ababab", "bababa")
    prompt = llm.tokenizer.encode("the cat")
    assert [ids[: len(prompt)] for ids in seen] == [prompt] * 6
    assert seen[-1] == prompt + result.tokens[:-1]


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (lambda ids, logits: None, "logits_processor gave object of shape"),
        (
            lambda ids, logits: logits[:-1],
            r"gave float32 of shape \(299,\), or NaN or infinity; real numbers of shape \(300,\)",
        ),
        (lambda ids, logits: logits * np.nan, "or NaN or infinity"),
        (lambda ids, logits: logits + np.inf, "or NaN or infinity"),
        (lambda ids, logits: 1 / 0, "logits_processor raised ZeroDivisionError: 'division by zero'; it must give"),
        (lambda ids, logits: logits - np.inf, "no token is left that may come next"),
    ],
)
def test_what_a_callers_function_must_not_give_is_refused(llm: npllama.Llama, processor: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        llm.generate("the cat", max_tokens=3, logits_processor=processor)
    assert llm.generate("the cat", max_tokens=3, seed=1).usage.completion_tokens <= 3


def test_what_is_no_function_is_refused(llm: npllama.Llama) -> None:
    with pytest.raises(UsageError, match="logits_processor='7': needs a function of"):
        llm.generate("the cat", logits_processor=7)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "values", "needed"),
    [
        ("repeat_last_n", [-2, 1.5, True, "64", None], "a whole number of at least -1"),
        ("presence_penalty", [math.nan, -math.inf, "1", True, None], "a finite number"),
        ("frequency_penalty", [math.inf, None, "x"], "a finite number"),
        ("typical_p", [-0.1, 1.1, True, None], "a number from 0 to 1"),
        ("top_n_sigma", [math.nan, None, "1"], "a finite number"),
        ("xtc_probability", [-0.1, 2, None], "a number from 0 to 1"),
        ("xtc_threshold", [-0.1, 2, None], "a number from 0 to 1"),
        ("dry_multiplier", [-1, None, math.inf], "a finite number of at least 0"),
        ("dry_base", [0.5, None], "a finite number of at least 1"),
        ("dry_allowed_length", [0, 1.0, None], "a whole number above 0"),
        ("dry_penalty_last_n", [-2, None], "a whole number of at least -1"),
        ("dry_sequence_breakers", [7, [""], [1], b"x", None], "texts of at least one character"),
        ("mirostat", [1, 3, True, "2", None], r"0 \(off\) or 2"),
        ("mirostat_tau", [-1, None], "a finite number of at least 0"),
        ("mirostat_eta", [-1, 2, None], "a number from 0 to 1"),
        ("min_tokens", [-1, 1.5, None], "a whole number of at least 0"),
        ("ignore_eos", [0, 1, "yes", None], "True or False"),
        (
            "logit_bias",
            [7, {"1": 1}, {-1: 1.0}, {1: math.inf}, {1: math.nan}, {1: "x"}, [1, 2], None],
            "a bias for each",
        ),
        ("bad_words", [[""], [1], 7, None], "texts of at least one character"),
        ("samplers", ["top_k;top_k", "heat", ["top_k", 1], {"top_k"}, 7, None], "some of penalties, dry, top_n_sigma"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(name: str, values: list[object], needed: str) -> None:
    for value in values:
        with pytest.raises(UsageError, match=f"^{name}='.*': needs {needed}"):
            SamplingOptions(**{name: value})


OTHER_KEYWORDS = {"logits_processor", "max_new_tokens", "repetition_penalty"}
OTHER_KEYWORDS |= {"logprobs", "post_sampling_probs", "choices", "regex", "json_schema", "grammar"}


def test_every_option_beyond_the_basic_ones_is_a_keyword(llm: npllama.Llama) -> None:
    names = {option.name for option in OPTIONS} - {"temperature", "top_k", "top_p", "min_p", "repeat_penalty"}
    assert set(MoreOptions.__annotations__) == names | OTHER_KEYWORDS
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'presence'"):
        llm.generate("the cat", presence=1)
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'presence'"):
        llm.stream("the cat", presence=1)


FLAGS = {
    "--typical": "0.2",
    "--top-nsigma": "0.5",
    "--presence-penalty": "3",
    "--frequency-penalty": "3",
    "--dry-multiplier": "5",
    "--mirostat": "2",
    "--xtc-probability": "1",
    "-l": "2+9",
    "--logit-bias": "60-inf",
    "--bad-word": "t",
    "--samplers": "top_k;temperature",
    "--min-tokens": "3",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_options_of_the_command_line_are_those_of_a_call(call, tmp_path: Path, flag: str) -> None:
    write_model_directory(tmp_path / "m")
    dest = {"-l": "logit_bias", "--typical": "typical_p", "--top-nsigma": "top_n_sigma", "--bad-word": "bad_words"}
    name = dest.get(flag, flag[2:].replace("-", "_"))
    meant = {"-l": {2: 9.0}, "--logit-bias": {60: -math.inf}, "--bad-word": "t", "--samplers": ("top_k", "temperature")}
    kind = int if flag in ("--mirostat", "--min-tokens") else float
    value = meant[flag] if flag in meant else kind(FLAGS[flag])
    done = call("generate", "-m", tmp_path / "m", "the cat", "-n", "20", "-s", "4", flag, FLAGS[flag])
    with npllama.load(tmp_path / "m") as llm:
        assert done.text == llm.generate("the cat", max_tokens=20, seed=4, **{name: value}).text + "\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-l", "x+1"), "'x+1' is no bias; ID+NUMBER or ID-NUMBER is needed"),
        (("-l", "5+1e"), "is no bias"),
        (("--mirostat", "1"), "mirostat='1': needs 0 (off) or 2"),
        (("--samplers", "top_k;heat"), "samplers='top_k;heat': needs some of penalties"),
        (("--typical", "2"), "typical_p='2.0': needs a number from 0 to 1"),
        (("--dry-sequence-breaker", ""), "dry_sequence_breakers"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(
    call, arguments: tuple[str, ...], said: str
) -> None:
    done = call("generate", "-m", "no such model", "x", *arguments)
    assert (done.code, done.text) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_breakers_may_be_texts_with_escapes_or_none(call, tmp_path: Path) -> None:
    write_model_directory(tmp_path / "m")
    common = ("generate", "-m", tmp_path / "m", "the cat", "-n", "30", "-s", "4", "--dry-multiplier", "5")
    common += ("--dry-allowed-length", "1", "--temp", "1.5", "--top-k", "0")
    options = {"dry_multiplier": 5.0, "dry_allowed_length": 1, "temperature": 1.5, "top_k": 0}
    with npllama.load(tmp_path / "m") as llm:
        for given, meant in (("none", ()), ("\\x05", ("\x05",)), ("--", ("--",))):
            done = call(*common, "-e", "--dry-sequence-breaker", given)
            same_text = llm.generate("the cat", max_tokens=30, seed=4, **options, dry_sequence_breakers=meant).text
            assert done.text == same_text + "\n"
