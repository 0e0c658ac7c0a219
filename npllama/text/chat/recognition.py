"""Which chat format a template is, by its text. It is never run: a template is a program, and comes from strangers.

What a template writes for each message stands in it as texts joined with names: `'<|im_start|>' + message['role'] +
'\\n' + message['content'] + '<|im_end|>'`. Templates of one format differ in spaces, quotes and line ends, so these are
taken away first; then a rule looks for what only its format writes. What no rule knows is not guessed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from npllama.errors import UsageError
from npllama.text.chat.encoding import control_tokens
from npllama.text.chat.formats import FORMATS
from npllama.text.chat.messages import ROLES
from npllama.text.protocol import Tokenizer

MAX_CHARACTERS = 1 << 18


class Rule(NamedTuple):
    """A template of a format holds all of some texts and none of others, both as `squeezed` writes them."""

    name: str
    holds: tuple[str, ...]
    lacks: tuple[str, ...] = ()


_CHATML = ("'<|im_start|>'+message['role']+message['content']+'<|im_end|>'", "'<|im_start|>assistant'")
_LLAMA3 = (
    "'<|start_header_id|>'+message['role']+'<|end_header_id|>'+message['content']|trim+'<|eot_id|>'",
    "'<|start_header_id|>assistant<|end_header_id|>'",
)
_MISTRAL = ("'[INST]'+message['content']+'[/INST]'", "+eos_token")
_NOT_MISTRAL = ("<<SYS>>", "[SYSTEM_PROMPT]", "bos_token+'[INST]'")

RULES = (
    Rule(
        "smollm2", (*_CHATML, "'<|im_start|>systemYouareahelpfulAIassistantnamedSmolLM,trainedbyHuggingFace<|im_end|>")
    ),
    Rule("chatml", _CHATML, ("bos_token", "<|im_start|>system", "<|im_sep|>", "Youare", "<think>")),
    Rule("llama3.1", (*_LLAMA3, "CuttingKnowledgeDate:December2023", "TodayDate:")),
    Rule("llama3", (*_LLAMA3, "bos_token"), ("Youare", "Date:")),
    Rule("llama2", ("bos_token+'[INST]'+content.strip()+'[/INST]'", "'<<SYS>>'+", "content.strip()+eos_token")),
    Rule("mistral-v3", _MISTRAL, _NOT_MISTRAL),
    Rule("mistral", _MISTRAL, _NOT_MISTRAL),
    Rule("zephyr", tuple(f"'<|{role}|>'+message['content']+eos_token" for role in ROLES)),
    Rule("code-llama-70b", ("'Source:'+message['role']+message['content'].strip()", "'<step>'", "Destination:user")),
    Rule("deepseek", ("{{bos_token}}", "'User:'+message['content']", "'Assistant:'+message['content']+eos_token")),
)
"""Tried in order; the control tokens of a format must be there, which tells Mistral's two apart."""


def recognised(template: str, tokenizer: Tokenizer) -> str | None:
    """The name of the chat format that a template writes; None where no rule knows it."""
    text = squeezed(template[:MAX_CHARACTERS])
    for name, holds, lacks in RULES:
        if all(part in text for part in holds) and not any(part in text for part in lacks):
            try:
                control_tokens(FORMATS[name], tokenizer)
            except UsageError:
                continue
            return name
    return None


def squeezed(template: str) -> str:
    """A template without comments, spaces and line ends, with one kind of quotes and of joining.

    Texts that are joined with each other become one, empty ones go.
    """
    text = re.sub(r"\{#.*?(#\}|\Z)", "", template, flags=re.DOTALL)
    text = re.sub(r"\s+|\\n", "", text).replace('"', "'").replace("~", "+")
    text = re.sub(r"\{([{%])-|-([}%])\}", lambda found: "{" + found[1] if found[1] else found[2] + "}", text)
    text = re.sub(r"\bmessage\.(role|content)\b", r"message['\1']", text)
    return text.replace("'+'", "").replace("+''+", "+")
