"""Text in, text out: load a model, generate, stream, or ask for logits. The public interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from npllama.cache import KVCache
from npllama.config import ModelConfig
from npllama.errors import ContextError, UsageError, checked_flag, quote, whole_number
from npllama.execution.engine import Engine
from npllama.generation.chunks import Sight, chunk_tokens
from npllama.generation.completion import Completion, follow_prompts
from npllama.generation.handles import AsyncStream, ChatStream, Handle, Stream
from npllama.generation.jobs import Continued, LogitsJob
from npllama.generation.requests import Progress as ReadProgress
from npllama.generation.requests import (
    Prompt,
    Request,
    check_kind,
    checked_ids,
    either,
    is_one,
    new_request,
    session_options,
)
from npllama.generation.results import ChatResult, Piece, Result, Usage
from npllama.generation.runtime import Runtime
from npllama.generation.sampling.sampler import Model
from npllama.generation.scoring.calls import Scores
from npllama.options import BASIC, MoreOptions, SamplingOptions
from npllama.store.direct import open_source
from npllama.store.opening import OpenModel, Progress
from npllama.store.tokenizers import open_tokenizer
from npllama.system.closing import Closing
from npllama.text.protocol import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from npllama.generation.sessions.session import Session
    from npllama.generation.structured.constraint import Constraint
    from npllama.generation.structured.structures import Structures

__all__ = [
    "DEMO",
    "AsyncStream",
    "ChatResult",
    "ChatStream",
    "Handle",
    "Llama",
    "Piece",
    "Result",
    "Stream",
    "Usage",
    "load",
]

DEMO = Path(__file__).parent / "demo"
MAX_DEFAULT_CONTEXT = 4096
MAX_ENDLESS = 1 << 39  # tokens of a text that slides

log = logging.getLogger("npllama")


class Llama(Scores, Closing):
    """An open model. Made by `load`; also a context manager, which closes it.

    tokenizer: text to ids and back, as text/protocol.Tokenizer says; chat_format: how a dialog is told, if known.
    """

    def __init__(
        self,
        opened: OpenModel,
        engine: Engine,
        tokenizer: Tokenizer,
        context: int,
        kv_memory: int | None = None,
        parallel: int | None = None,
        chat_format: str | None = None,
        speculation: bool = True,
    ) -> None:
        self.config: ModelConfig = opened.config
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.context = context
        self.engine = engine
        self._opened = opened
        self.chunk = chunk_tokens(opened.config)  # tokens of a prompt that are read in one call
        self.runtime = Runtime(engine, opened, context, self.chunk, kv_memory, parallel)
        guess = bool(checked_flag("speculation", speculation))
        self._model = Model(self.config, tokenizer, engine.top_k, guess)

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
        n: int = 1,
        context_policy: str = "stop",
        n_keep: int = 0,
        max_time_s: float | None = None,
        progress: ReadProgress | None = None,
        **more: Unpack[MoreOptions],
    ) -> Result | list[Result] | list[list[Result]]:
        """Continue a prompt, or each of a list of prompts (a list of results, in order).

        prompt: text (which gets BOS and EOS as the model says, or as bos= and eos= do), or token ids (taken as they
        are). max_tokens: None or -1 until the context is full, 0 reads the prompt only. temperature 0 is greedy.
        Options of sampling (more of them: options.MoreOptions) that are left out (None) come from sampling: "default",
        "model" (what its makers suggest), or SamplingOptions. seed None: random, see Result.seed. stop: texts that end
        the generation and are not returned. padding_ids: ids beyond the tokenizer's pieces may come too. n: completions
        of each prompt, which is read once (a list of results). context_policy: "stop" where the context is full, or
        "slide": the last positions and n_keep first ones (at least 4) stay in sight. max_time_s: seconds after which
        texts end as they are ("time"). progress(tokens read, tokens of all prompts, seconds) is called while prompts
        are read; False ends all ("cancelled"). Raises UsageError, ContextError.
        """
        basic = (temperature, top_k, top_p, min_p, repeat_penalty)
        request = self._request(
            *(max_tokens, basic, more, sampling, seed, stop, echo, bos, eos, padding_ids),
            *(n, context_policy, n_keep, max_time_s, progress),
        )
        one = is_one(prompt)
        prompts: list[Prompt] = [prompt] if one else list(prompt)  # type: ignore[list-item, arg-type]
        groups = [self._completions(p, request, i * request.n) for i, p in enumerate(prompts)]
        follow_prompts(request.progress, groups)
        self.runtime.run(groups)
        results = [[job.result for job in group] for group in groups]
        found: list[Any] = [group[0] for group in results] if request.n == 1 else results
        return found[0] if one else found

    def _request(
        self, max_tokens: int | None, basic: tuple[Any, ...], more: MoreOptions, sampling: Any, *others: Any
    ) -> Request:
        """The checked options of a call: the basic ones of sampling, those beyond them, and what new_request takes."""
        given: dict[str, Any] = {**dict(zip(BASIC, basic, strict=True)), **more}
        return new_request(max_tokens, given, (sampling, self._opened.sampling), *others)

    def _completions(self, prompt: Prompt, request: Request, first: int, streamed: bool = False) -> list[Completion]:
        """The completions of one prompt that a request asks for, from index `first` on; the others follow the first."""
        ids = self._ids(prompt, request.bos, request.eos)
        sight, left = self._sight(request.context_policy, request.n_keep), self.context - len(ids)
        if request.context_policy == "slide":
            left = MAX_ENDLESS
        elif left < (n_new := 0 if request.max_tokens == 0 else 1):
            raise ContextError(self._too_long(len(ids), n_new))
        n_tokens = left if request.max_tokens is None else min(request.max_tokens, left)
        forms: Sequence[Constraint | None] = [None] * request.n
        if request.structure is not None:
            forms = self._structures.constraints(request.structure, n_tokens, request.stop, request.n)
        jobs = [
            Completion(self._model, ids, request, n_tokens, *sight, first + i, streamed, form)
            for i, form in enumerate(forms)
        ]
        jobs[0].followers.extend(jobs[1:])
        if isinstance(prompt, Continued):
            jobs[0].continues(prompt)
        for job in jobs:
            job.begin()
        return jobs

    @cached_property
    def _structures(self) -> Structures:
        from npllama.generation.structured.structures import Structures  # here, because few texts have a form
        from npllama.generation.structured.vocabulary import Vocabulary

        ends = {i for i in (*self.config.eos_token_ids, self.tokenizer.eos_id) if i is not None}
        return Structures(Vocabulary(self.tokenizer, self.config.vocab_size, ends))

    def _sight(self, context_policy: str, n_keep: int) -> Sight:
        """How far back the positions of a text see."""
        if context_policy == "slide":
            return Sight.sliding(self.context, self.config.sliding_window, n_keep)
        return Sight(self.runtime.window, 0)

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
        context_policy: str = "stop",
        n_keep: int = 0,
        max_time_s: float | None = None,
        progress: ReadProgress | None = None,
        **more: Unpack[MoreOptions],
    ) -> Stream:
        """Like `generate` for one prompt, piece by piece as they come: an iterator of Piece with a `.result`.

        The texts of the pieces, joined, are the text that `generate` returns.
        """
        basic = (temperature, top_k, top_p, min_p, repeat_penalty)
        request = self._request(
            *(max_tokens, basic, more, sampling, seed, stop, echo, bos, eos, padding_ids),
            *(1, context_policy, n_keep, max_time_s, progress),
        )
        if not is_one(prompt):
            raise UsageError("stream takes one prompt (text or a list of ids); generate takes a list of prompts.")
        jobs = self._completions(prompt, request, 0, streamed=True)
        follow_prompts(request.progress, [jobs])
        return Stream(self.runtime, jobs[0])

    def submit(self, prompt: Prompt, max_tokens: int | None = 256, **options: Any) -> Handle:
        """Begin a generation from any thread without waiting: a thread of the model's own computes it.

        Takes the options of `stream`. The handle gives the pieces, or the result; `cancel` ends it early. Raises
        UsageError when too many wait to begin.
        """
        return Handle(self.runtime, self.stream(prompt, max_tokens, **options).give_away(paused=False)).begin()

    def astream(self, prompt: Prompt, max_tokens: int | None = 256, **options: Any) -> AsyncStream:
        """Like `stream` for asyncio: `async for piece in llm.astream(prompt, ...)`. Takes the options of `stream`.

        The event loop goes on meanwhile; a thread of the model's own computes. Cancelling the task cancels the text.
        """
        return AsyncStream(self.runtime, self.stream(prompt, max_tokens, **options).give_away(paused=True))

    @overload
    def chat(self, messages: object, stream: Literal[False] = False, **options: Any) -> ChatResult: ...

    @overload
    def chat(self, messages: object, stream: Literal[True], **options: Any) -> ChatStream: ...

    def chat(
        self,
        messages: object,
        stream: bool = False,
        *,
        escape: bool = False,
        max_tokens: int | None = None,
        **options: Any,
    ) -> ChatResult | ChatStream:
        """Answer the last of a dialog's messages: [{"role": "user", "content": "Hello"}, ...], the list of OpenAI.

        The dialog becomes ids as the model's chat format has it (`chat_format`): what people wrote is encoded as text
        and never becomes a control token; marks of the format in it are refused, or escaped if `escape`. stream: piece
        by piece, an iterator with a `.result`. max_tokens None: until the context is full. options: those of
        `generate` but echo, bos, eos and n. A next turn reads only what is new.
        Raises UsageError for messages that the format does not have, and for a model without a chat format.
        """
        from npllama.text.chat.encoding import chat_prompt  # here, because not all programs talk

        streamed = checked_flag("stream", stream)
        prompt = chat_prompt(self._known_format(), self.tokenizer, messages, escape)
        if wrong := sorted({"echo", "bos", "eos", "n"} & options.keys()):
            raise UsageError(f"chat takes no {wrong[0]}: its chat format says what a dialog begins and ends with.")
        answer = ChatStream(self.stream(prompt.ids, max_tokens, **options), prompt)
        return answer if streamed else answer.run()

    def _known_format(self) -> str:
        if self.chat_format is None:
            from npllama.text.chat.formats import FORMATS

            raise UsageError(
                f"this model does not say how a dialog is told to it (it may be none that talks); load it with "
                f"chat_format=, one of {', '.join(FORMATS)}."
            )
        return self.chat_format

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of the next token after each of the ids: (T, V) float32. Nothing is added to the ids."""
        check_kind(ids)
        checked = self._fitting(self._ids(list(ids))) if len(ids) else []
        if not checked:
            return np.zeros((0, self.config.vocab_size), np.float32)
        job = LogitsJob(checked, self.runtime.window)
        self.runtime.run([[job]])
        return np.concatenate(job.rows)

    def session(self, seed: int | None = None, *, context_policy: str = "stop", n_keep: int = 0) -> Session:
        """A text that is written in several calls and not read again between them: see Session.

        seed: of all its draws, None for a random one; context_policy, n_keep: as in generate. Raises UsageError.
        """
        from npllama.generation.sessions.session import Rules, Session  # here, because not all programs have sessions

        chosen, policy, kept = session_options(seed, context_policy, n_keep)
        rules = Rules(chosen, policy, kept, *self._sight(policy, kept))
        return Session(self, rules)

    def _fitting(self, ids: list[int]) -> list[int]:
        """The same ids; ContextError for more than the context holds."""
        if len(ids) > self.context:
            raise ContextError(self._too_long(len(ids), 0))
        return ids

    def new_cache(self) -> KVCache:
        """An empty cache for one text of a full context, outside the pool that generations share."""
        return self.engine.new_cache(1, self.context, self.config.sliding_window or 0)

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
        if isinstance(prompt, Continued):
            return prompt
        return checked_ids(prompt, self.config.vocab_size, bos, eos)

    def _too_long(self, n: int, n_new: int) -> str:
        more = " and needs room for one more" if n_new and n == self.context else ""
        return (
            f"the prompt has {n} tokens{more}, the context holds {self.context}; shorten the prompt, "
            f"or load the model with a larger context."
        )

    def close(self) -> None:
        """Free the model's memory maps and caches. A later call raises UsageError. Closing twice is fine."""
        self.runtime.close()
        self.engine.close()
        self._opened.close()


def _format_of(opened: OpenModel, chat_format: str | None, tokenizer: Tokenizer) -> str | None:
    """The chat format that a caller names, else the model's own."""
    if chat_format is None:
        return opened.chat_format
    from npllama.text.chat.encoding import checked_format

    return checked_format(chat_format, tokenizer)


def load(
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    kv_dtype: str = "f32",
    *,
    kv_memory: int | None = None,
    parallel: int | None = None,
    speculation: bool = True,
    n_ctx: int | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    chat_format: str | None = None,
) -> Llama:
    """Open a model directory or a checkpoint; without an argument, the demo model that ships inside the package.

    backend "auto", "numpy" or "numba" (see NPLLAMA_BACKEND); threads None: physical cores, affinity or the container's
    quota, whichever is least; context: positions, None: the checkpoint's own, at most 4096 (n_ctx is another name);
    kv_dtype "f32", "f16" or "q8": how the cache keeps keys and values, in kv_memory bytes (None: enough for `parallel`
    full contexts, at most half of the free memory, at least one context; taken as it is used); parallel: texts that are
    written at once, at most (None: 8). A checkpoint is exported once, to NPLLAMA_MODELS_DIR or ~/.cache/npllama/models,
    in the number format dtype (None: its own); progress is called with (bytes done, bytes in all, tensor) meanwhile.
    chat_format: a name of chat.formats.FORMATS, None: the checkpoint's. speculation: guess ids where a text repeats
    itself, which changes when they come and not which. Raises ModelError, CheckpointError, UsageError.

    What this changes in the process:
    - NumPy execution: how many threads NumPy's OpenBLAS uses, until the last model is closed. Not where
      OPENBLAS_NUM_THREADS or OMP_NUM_THREADS is set, unless threads is given.
    - both: glibc keeps up to 128 MB of freed memory; closing the last model gives it back. malloc's thresholds stay,
      because glibc does not say what they were. Not where a MALLOC_ variable or GLIBC_TUNABLES is set.
    - compiled execution: numba is imported and stays; GOMP_SPINCOUNT is set while OpenMP loads. On CPUs with AMX Linux
      is asked for the permission to use it, which cannot be given back. While other programs compete for the CPUs,
      OpenMP's threads are tied to one each; they are let go when nobody does, or when the Python thread that
      computed closes the model. numba.set_num_threads is as before after each call, gc's thresholds after compiling.
      The first model that no cache holds takes up to a second to measure how far ahead to prefetch, which is kept.
    - a fork waits for calls that are under way. After a compiled call a forked child gets an error; before it, or in
      NumPy, it computes as its parent does.
    """
    n_positions = _checked_positions(either("context", context, None, "n_ctx", n_ctx))
    opened = open_source(DEMO if model is None else model, dtype, progress)
    try:
        tokenizer = _tokenizer_of(opened)
        context = _context(opened.config.max_seq_len, n_positions)
        engine = Engine(opened, backend, threads, log.warning, kv_dtype, context)
        told = _format_of(opened, chat_format, tokenizer)
        return Llama(opened, engine, tokenizer, context, kv_memory, parallel, told, speculation)
    except BaseException:
        opened.close()
        raise


def _tokenizer_of(opened: OpenModel) -> Tokenizer:
    """The tokenizer of a model; where the two differ about the ids that begin and end a text, a warning."""
    c = opened.config
    tokenizer = open_tokenizer(opened.path, opened.manifest, c)
    if tokenizer.eos_id is not None and tokenizer.eos_id not in c.eos_token_ids:
        log.warning(
            f"the tokenizer ends a text with id {tokenizer.eos_id}, which is not among the model's end-of-text ids "
            f"{list(c.eos_token_ids)}; texts end at the model's"
        )
    if tokenizer.bos_id is not None and tokenizer.bos_id != c.bos_token_id:
        log.warning(
            f"the tokenizer begins a text with id {tokenizer.bos_id}, the model's config says {c.bos_token_id}; "
            f"using the tokenizer's"
        )
    return tokenizer


def _checked_positions(context: int | None) -> int | None:
    n_positions = None if context is None else whole_number(context, 1)
    if context is not None and n_positions is None:
        raise UsageError(f"context={quote(context)}: needs a number of positions, 1 or more.")
    return n_positions


def _context(own: int, asked: int | None) -> int:
    if asked is None:
        if own > MAX_DEFAULT_CONTEXT:
            log.warning(
                f"the model claims a context of {own} positions; using {MAX_DEFAULT_CONTEXT}, context= asks for more"
            )
        return min(own, MAX_DEFAULT_CONTEXT)
    if asked > own:
        log.warning(f"a context of {asked} positions is more than the {own} that the model was trained on")
    return asked
