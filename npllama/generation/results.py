"""What a generation gives: pieces as they come, and the result at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from npllama.generation.sampling.logprobs import TokenLogprobs

if TYPE_CHECKING:
    from npllama.text.chat.marks import Escaped


class Piece(NamedTuple):
    """One step of a stream: a generated id, and the text that it completes (often a word, sometimes nothing).

    token is None for a piece of text that has no id of its own: the prompt with echo, a last one that was held back.
    logprobs: of the id, where the call asks for them.
    """

    text: str
    token: int | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens read and generated; cached_tokens: of the prompt's, those that were found in the cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Result:
    """What a prompt led to.

    text: the continuation (with echo: prompt and continuation); tokens: the generated ids without BOS and EOS;
    finish_reason "stop" (end of text, or a stop string), "length" (max_tokens or the context is used up), "time"
    (max_time_s is over), "closed" (the same, or a stop string, and ids that the model did not choose complete the form
    that the text was to have) or "cancelled"; prompt_s, generate_s: seconds; slid_tokens: positions that have slid out
    of the window (context_policy "slide"); logprobs: of each of the tokens, where asked for; overruled: options that
    could not be followed, since the form of the text left no choice.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    usage: Usage
    seed: int
    prompt_s: float
    generate_s: float
    slid_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    overruled: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatResult:
    """What the assistant answered.

    message: {"role": "assistant", "content": text}, to be put behind the messages for the next turn; escaped: marks of
    the chat format that stood in the messages and were escaped, (number of the message, mark, times). The rest is that
    of a Result, which is `result`.
    """

    message: dict[str, str]
    result: Result = field(repr=False)
    escaped: tuple[Escaped, ...] = ()

    @property
    def finish_reason(self) -> str:
        return self.result.finish_reason

    @property
    def usage(self) -> Usage:
        return self.result.usage
