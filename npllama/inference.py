"""Text in, text out: load a model, generate, stream, or ask for logits. The public interface."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from npllama.cache import KVCache, clear
from npllama.config import ModelConfig
from npllama.errors import ContextError, UsageError, quote, whole_number
from npllama.execution.engine import Engine
from npllama.generation.sampling import PENALTY_WINDOW, SEEDS, Allowed, sample
from npllama.generation.streaming import StopStrings, stop_texts
from npllama.options import SamplingOptions, chosen_sampling
from npllama.store.opening import OpenModel, open_model
from npllama.store.tokenizers import open_tokenizer
from npllama.text.decoding import StreamDecoder
from npllama.text.protocol import Tokenizer

DEMO = Path(__file__).parent / "demo"
MOST_CONTEXT_UNASKED = 4096
# A prompt is read in chunks of a second or two, so that an interrupt is served. The length follows from the model's
# size alone and not from a clock, so that the same prompt is always cut the same way.
CHUNK_OPERATIONS = 1.2e12
MOST_CHUNK = 512

log = logging.getLogger("npllama")

Prompt = str | Sequence[int]


class Piece(NamedTuple):
    """One step of a stream: a generated id, and the text that it completes (often a word, sometimes nothing).

    token is None for a last piece of text that had been held back.
    """

    text: str
    token: int | None


@dataclass(frozen=True)
class Usage:
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Result:
    """What a prompt led to.

    text: the continuation (with echo: prompt and continuation); tokens: the generated ids without BOS and EOS;
    finish_reason "stop" (end of text, or a stop string) or "length" (max_tokens or the context is used up);
    prompt_s, generate_s: seconds.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    seed: int
    prompt_s: float
    generate_s: float


@dataclass(frozen=True)
class Request:
    """The validated options of one call."""

    max_tokens: int | None
    sampling: SamplingOptions
    seed: int
    stop: tuple[str, ...]
    echo: bool
    padding_ids: bool


class Llama:
    """An open model. Made by `load`; also a context manager, which closes it."""

    def __init__(self, opened: OpenModel, engine: Engine, tokenizer: Tokenizer, context: int) -> None:
        self.config: ModelConfig = opened.config
        self.tokenizer = tokenizer
        self.context = context
        self.engine = engine
        self._opened = opened
        self._spare: list[KVCache] = []
        self._closed = False
        self._chunk = chunk_tokens(opened.config)

    @property
    def manifest(self) -> dict[str, Any]:
        """What npllama.json says: number formats, files, hashes."""
        return self._opened.manifest

    @property
    def backend(self) -> str:
        """The execution in use: "numpy" or "numba"."""
        return self.engine.backend

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_tokens: int | None = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        echo: bool = False,
        *,
        sampling: str | SamplingOptions = "default",
        bos: bool | None = None,
        eos: bool | None = None,
        padding_ids: bool = False,
        max_new_tokens: int | None = None,
        repetition_penalty: float | None = None,
    ) -> Result | list[Result]:
        """Continue a prompt, or each of a list of prompts (a list of results, in order).

        prompt: text (which gets BOS and EOS as the model says, or as bos= and eos= do), or token ids (taken as they
        are). max_tokens: None or -1 until the context is full, 0 reads the prompt only. temperature 0 is greedy; the
        sampling order is repetition penalty (over the last 64 tokens), top-k, top-p, min-p, temperature; those left out
        (None) come from sampling: "default", "model" (what its makers suggest), or SamplingOptions. seed None: random,
        see Result.seed. stop: texts that end the generation and are not returned. padding_ids: ids beyond the
        tokenizer's pieces may come too. max_new_tokens and repetition_penalty are other names.
        Raises UsageError for values out of range, ContextError for a prompt that does not fit.
        """
        max_tokens = _either("max_tokens", max_tokens, 256, "max_new_tokens", max_new_tokens)
        penalty = _either("repeat_penalty", repeat_penalty, None, "repetition_penalty", repetition_penalty)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": penalty}
        options = chosen_sampling(sampling, self._opened.sampling, given)
        request = _request(max_tokens, options, seed, stop, echo, bos=bos, eos=eos, padding_ids=padding_ids)
        if _is_one(prompt):
            return Stream(self, self._ids(prompt, bos, eos), request, 0).run()  # type: ignore[arg-type]
        streams = [Stream(self, self._ids(one, bos, eos), request, i) for i, one in enumerate(prompt)]  # type: ignore[arg-type]
        return [stream.run() for stream in streams]

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int | None = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        echo: bool = False,
        *,
        sampling: str | SamplingOptions = "default",
        bos: bool | None = None,
        eos: bool | None = None,
        padding_ids: bool = False,
        max_new_tokens: int | None = None,
        repetition_penalty: float | None = None,
    ) -> Stream:
        """Like `generate` for one prompt, piece by piece as they come: an iterator of Piece with a `.result`.

        The texts of the pieces, joined, are the text that `generate` returns.
        """
        max_tokens = _either("max_tokens", max_tokens, 256, "max_new_tokens", max_new_tokens)
        penalty = _either("repeat_penalty", repeat_penalty, None, "repetition_penalty", repetition_penalty)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "repeat_penalty": penalty}
        options = chosen_sampling(sampling, self._opened.sampling, given)
        request = _request(max_tokens, options, seed, stop, echo, bos=bos, eos=eos, padding_ids=padding_ids)
        if not _is_one(prompt):
            raise UsageError("stream takes one prompt (text or a list of ids); generate takes a list of prompts.")
        return Stream(self, self._ids(prompt, bos, eos), request, 0)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of the next token after each of the ids: (T, V) float32. Nothing is added to the ids."""
        _check_kind(ids)
        checked = self._ids(list(ids)) if len(ids) else []
        if len(checked) > self.context:
            raise ContextError(self._too_long(len(checked), 0))
        cache = self.borrow_cache()
        try:
            chunks = [self.read(cache, checked, start, every=True) for start in range(0, len(checked), self._chunk)]
        finally:
            self.return_cache(cache)
        return np.concatenate(chunks) if chunks else np.zeros((0, self.config.vocab_size), np.float32)

    def read(self, cache: KVCache, ids: list[int], start: int, every: bool = False) -> np.ndarray:
        """Feed the chunk of a prompt that begins at `start`; logits of its last row, or of every row."""
        stop = min(len(ids), start + self._chunk)
        n = stop - start
        out = range(n) if every else range(n - 1, n)
        return self.engine.forward(cache, ids[start:stop], range(start, stop), [0] * n, list(out))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that are read in one call."""
        return self._chunk

    def borrow_cache(self) -> KVCache:
        """An empty KV cache of the context's length, used before or new."""
        try:
            return self._spare.pop()
        except IndexError:
            return self.engine.new_cache(1, self.context)

    def return_cache(self, cache: KVCache) -> None:
        """Hand a cache back for the next call: its memory is kept."""
        clear(cache, 0)
        if not self._spare and not self._closed:
            self._spare.append(cache)

    def _ids(self, prompt: Prompt, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """The token ids of one prompt, validated against the vocabulary."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, bos, eos)
            if not ids:
                raise UsageError(
                    "the prompt is empty and gets no BOS here, so there is no token; give text"
                    + (", or bos=True." if self.tokenizer.bos_id is not None else ".")
                )
            return ids
        _check_kind(prompt)
        for name, asked in (("bos", bos), ("eos", eos)):
            if asked:
                raise UsageError(f"{name}=True is for a prompt of text; ids are taken as they are: put it among them.")
        ids = []
        for item in prompt:
            number = whole_number(item)
            if number is None:
                raise UsageError(f"a prompt is text or a list of token ids; got {type(item).__name__} in the list.")
            ids.append(number)
        if not ids:
            raise UsageError("the prompt has no token: give at least one id (text gets BOS by itself).")
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise UsageError(
                f"token ids must be 0 to {self.config.vocab_size - 1}; the prompt has {min(ids)} to {max(ids)}."
            )
        return ids

    def _too_long(self, n: int, n_new: int) -> str:
        more = " and needs room for one more" if n_new and n == self.context else ""
        return (
            f"the prompt has {n} tokens{more}, the context holds {self.context}; shorten the prompt, "
            f"or load the model with a larger context."
        )

    def close(self) -> None:
        """Free the model's memory maps and caches. A later call raises UsageError. Closing twice is fine."""
        self._closed = True
        self._spare.clear()
        self.engine.close()
        self._opened.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream:
    """A generation under way: an iterator of Piece. `result` is what has come so far, complete after the last piece."""

    def __init__(self, llama: Llama, ids: list[int], request: Request, completion: int) -> None:
        room, n_new = llama.context - len(ids), 0 if request.max_tokens == 0 else 1
        if room < n_new:
            raise ContextError(llama._too_long(len(ids), n_new))
        self._llama, self._ids, self._request, self._completion = llama, ids, request, completion
        self._most = room if request.max_tokens is None else min(request.max_tokens, room)
        self._n_prompt = len(ids)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._finish_reason = "length"
        self._prompt_s = self._generate_s = 0.0
        self._pieces = self._run()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece = next(self._pieces)
        self._text.append(piece.text)
        return piece

    def close(self) -> None:
        """End the generation early and hand its cache back."""
        self._pieces.close()

    def run(self) -> Result:
        """Generate to the end."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> Result:
        return Result(
            text="".join(self._text),
            tokens=list(self._tokens),
            finish_reason=self._finish_reason,
            usage=Usage(self._n_prompt, len(self._tokens)),
            seed=self._request.seed,
            prompt_s=self._prompt_s,
            generate_s=self._generate_s,
        )

    def _run(self) -> Generator[Piece, None, None]:
        cache = self._llama.borrow_cache()
        try:
            yield from self._generate(cache)
        finally:
            self._llama.return_cache(cache)

    def _generate(self, cache: KVCache) -> Iterator[Piece]:
        llama, request = self._llama, self._request
        started = time.perf_counter()
        decoder, stops = StreamDecoder(llama.tokenizer), StopStrings(request.stop)
        before = "".join([decoder.push(i) for i in self._ids])  # the continuation's text depends on what it continues
        if request.echo and before:
            yield Piece(before, None)
        for start in range(0, len(self._ids), llama.chunk):
            logits = llama.read(cache, self._ids, start)
        self._prompt_s = time.perf_counter() - started
        started = time.perf_counter()
        ends = {*llama.config.eos_token_ids, llama.config.bos_token_id, llama.tokenizer.bos_id}  # each may be None
        n_ids = llama.config.vocab_size if request.padding_ids else llama.tokenizer.n_pieces
        allowed = Allowed(n_ids, llama.config.eos_token_ids)
        for i in range(self._most):
            position = self._n_prompt + i
            recent = allowed.places(self._ids[-PENALTY_WINDOW:])
            drawn = request.sampling, request.seed, self._completion, position
            token = allowed.id(sample(allowed.logits(logits[0]), recent, *drawn, llama.engine.top_k))
            if token in ends:
                self._finish_reason = "stop"
                break
            self._ids.append(token)
            self._tokens.append(token)
            text, stopped = stops.push(decoder.push(token))
            self._generate_s = time.perf_counter() - started
            if stopped:
                self._finish_reason = "stop"
                yield Piece(text, token)
                return
            yield Piece(text, token)
            if i + 1 < self._most:
                logits = llama.engine.forward(cache, [token], [position], [0], [0])
        text, stopped = stops.push(decoder.finish())
        if stopped:
            self._finish_reason = "stop"
        else:
            text += stops.finish()
            if stops.stopped:  # a stop string that an earlier, longer candidate had kept open
                self._finish_reason = "stop"
        self._generate_s = time.perf_counter() - started
        if text:
            yield Piece(text, None)


def _is_one(prompt: object) -> bool:
    """Whether a prompt is one prompt (text, or a list of ids) and not a list of prompts."""
    if isinstance(prompt, str):
        return True
    _check_kind(prompt)
    return len(prompt) == 0 or isinstance(prompt[0], bool) or whole_number(prompt[0]) is not None  # type: ignore[arg-type, index]


def _check_kind(prompt: object) -> None:
    """Refuse what is neither text nor a sequence: bytes would pass for ids, an iterator would be used up by a look."""
    listed = hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__") and getattr(prompt, "shape", None) != ()
    if not listed or isinstance(prompt, (bytes, bytearray, dict)):
        raise UsageError(f"a prompt is text, a list of token ids, or a list of either; got {type(prompt).__name__}.")


def _either(name: str, value: Any, default: object, alias: str, other: Any) -> Any:
    """The value of a parameter that has another name; UsageError when both are given and differ."""
    if other is None:
        return value
    if value not in (default, other):
        raise UsageError(f"{name}={quote(value)} and {alias}={quote(other)} mean the same; give one of them.")
    return other


def _request(
    max_tokens: int | None,
    sampling: SamplingOptions,
    seed: int | None,
    stop: str | Sequence[str] | None,
    echo: bool,
    **flags: bool | None,
) -> Request:
    """Check the options of a call; UsageError names what is out of range."""
    n_new = whole_number(-1 if max_tokens is None else max_tokens)
    if n_new is None or n_new < -1:
        raise UsageError(
            f"max_tokens={quote(max_tokens)}: needs 0 or more, or -1 (or None) for until the context is full."
        )
    key = whole_number(-1 if seed is None else seed)
    if key is None or not -1 <= key < SEEDS:
        raise UsageError(
            f"seed={quote(seed)}: needs a whole number from 0 to 2^64 - 1, or None (or -1) for a random one."
        )
    for name, value in flags.items():
        if not (isinstance(value, bool) or (value is None and name != "padding_ids")):
            raise UsageError(f"{name}={quote(value)}: needs True or False.")
    return Request(
        max_tokens=None if n_new == -1 else n_new,
        sampling=sampling,
        seed=secrets.randbits(32) if key == -1 else key,
        stop=stop_texts(stop),
        echo=bool(echo),
        padding_ids=bool(flags["padding_ids"]),
    )


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv_dtype: str = "f32",
    *,
    n_ctx: int | None = None,
) -> Llama:
    """Open a model directory; without an argument, the demo model that ships inside the package.

    backend "auto", "numpy" or "numba" (see NPLLAMA_BACKEND); threads None: physical cores, affinity or the
    container's quota, whichever is least; context: positions, None: the checkpoint's own, at most 4096 (n_ctx is
    another name); kv_dtype "f32", "f16" or "q8": how the cache keeps keys and values. Raises ModelError for a directory
    that is not a sound model, UsageError for values out of range.

    What this changes in the process:
    - NumPy execution: how many threads NumPy's OpenBLAS uses, until the last model is closed. Not where
      OPENBLAS_NUM_THREADS or OMP_NUM_THREADS is set, unless threads is given.
    - both: glibc keeps up to 128 MB of freed memory; closing the last model gives it back. malloc's thresholds stay,
      because glibc does not say what they were. Not where a MALLOC_ variable or GLIBC_TUNABLES is set.
    - compiled execution: numba is imported and stays; GOMP_SPINCOUNT is set while OpenMP loads. On CPUs with AMX Linux
      is asked for the permission to use it, which cannot be given back. While other programs compete for the CPUs,
      OpenMP's threads are tied to one each; they are let go when nobody does, or when the Python thread that
      computed closes the model. numba.set_num_threads is as before after each call.
    - a fork waits for calls that are under way. After a compiled call a forked child gets an error; before it, or in
      NumPy, it computes as its parent does.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        raise UsageError(f"model={quote(model)}: needs the path of a model directory, or None for the demo model.")
    context = _either("context", context, None, "n_ctx", n_ctx)
    n_positions = None if context is None else whole_number(context)
    if context is not None and (n_positions is None or n_positions < 1):
        raise UsageError(f"context={quote(context)}: needs a number of positions, 1 or more.")
    opened = open_model(DEMO if model is None else model)
    try:
        c = opened.config
        tokenizer = open_tokenizer(opened.path, opened.manifest, c)
        if tokenizer.eos_id is not None and tokenizer.eos_id not in opened.config.eos_token_ids:
            log.warning(
                f"the tokenizer ends a text with id {tokenizer.eos_id}, which is not among the model's end-of-text ids "
                f"{list(opened.config.eos_token_ids)}; texts end at the model's"
            )
        if tokenizer.bos_id is not None and tokenizer.bos_id != opened.config.bos_token_id:
            log.warning(
                f"the tokenizer begins a text with id {tokenizer.bos_id}, the model's config says "
                f"{opened.config.bos_token_id}; using the tokenizer's"
            )
        engine = Engine(opened, backend, threads, log.warning, kv_dtype)
        return Llama(opened, engine, tokenizer, _context(opened.config.max_seq_len, n_positions))
    except BaseException:
        opened.close()
        raise


def _context(own: int, asked: int | None) -> int:
    if asked is None:
        if own > MOST_CONTEXT_UNASKED:
            log.warning(
                f"the model claims a context of {own} positions; using {MOST_CONTEXT_UNASKED}, context= asks for more"
            )
        return min(own, MOST_CONTEXT_UNASKED)
    if asked > own:
        log.warning(f"a context of {asked} positions is more than the {own} that the model was trained on")
    return asked


def chunk_tokens(c: ModelConfig) -> int:
    """Tokens of a prompt to read in one call: a power of two from 8 to 512, fewer the larger the model."""
    block = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.hidden_dim
    affordable = int(CHUNK_OPERATIONS / (2 * c.n_layers * block))
    return max(8, min(MOST_CHUNK, 1 << (affordable.bit_length() - 1 if affordable else 0)))
