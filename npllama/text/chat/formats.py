"""The chat formats: how the messages of a dialog become parts, in a table for each.

A part is text, a control token, or the content of the message. Neighbouring texts are encoded as one, unless CUT stands
between them; a control token ends a text. What stands where was taken from the program that each format comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from npllama.text.chat.messages import ASSISTANT, ROLES, SYSTEM, USER


@dataclass(frozen=True)
class Special:
    """A control token by its name. BOS and EOS: those of the tokenizer."""

    name: str


@dataclass(frozen=True)
class Content:
    """The text of the message, once `passed` has been applied to it."""

    passed: Callable[[str], str]


class Cut:
    """Where a text ends that is encoded on its own."""


Part = str | Special | Content | Cut
Parts = tuple[Part, ...]

BOS, EOS, CUT = Special("BOS"), Special("EOS"), Cut()
TEXT, STRIPPED = Content(str), Content(str.strip)
WITHOUT_SPACES_BEHIND = Content(lambda text: text.rstrip(" "))


@dataclass(frozen=True)
class ChatFormat:
    """One format.

    turns            role -> parts of a message; a role that is missing cannot be said
    reply            parts after the last message: the assistant begins to speak
    stops            control tokens that end an answer, where the tokenizer has them
    begin            parts before all messages
    system           parts of a system message that comes first; None: those of turns
    default_system   what the system says where it says nothing; None: nothing
    merged_into      a system message that comes first is put before the "first" or "last" text of the user
    marks            texts that tell who speaks, and that no message may hold
    alternating      user and assistant take turns
    one_turn         the user speaks once
    """

    turns: Mapping[str, Parts]
    reply: Parts = ()
    stops: tuple[Special, ...] = (EOS,)
    begin: Parts = ()
    system: Parts | None = None
    default_system: str | None = None
    merged_into: str | None = None
    marks: tuple[str, ...] = ()
    alternating: bool = False
    one_turn: bool = False
    specials: frozenset[Special] = field(init=False)
    """The control tokens among its parts."""

    def __post_init__(self) -> None:
        tables = (*self.turns.values(), self.reply, self.begin, self.system or ())
        found = {part for parts in tables for part in parts if isinstance(part, Special)}
        object.__setattr__(self, "specials", frozenset(found))


# ---------------------------------------------------------------- LLaMA 2 and Mistral: [INST] and [/INST]

# Each finished turn is encoded on its own, with BOS and EOS. Source: meta-llama/llama, chat_completion.
LLAMA2 = ChatFormat(
    turns={USER: (BOS, "[INST] ", STRIPPED, " [/INST]"), ASSISTANT: (" ", STRIPPED, " ", EOS)},
    system=("<<SYS>>\n", TEXT, "\n<</SYS>>\n\n"),
    merged_into="first",
    marks=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    alternating=True,
)

# As LLaMA 2. Source: meta-llama/codellama, SPECIAL_TAGS.
CODE_LLAMA = replace(LLAMA2, marks=(*LLAMA2.marks, "<step>"))

# 7B-Instruct v0.1 and v0.2. Source: mistral-common, InstructTokenizerV1.
MISTRAL = ChatFormat(
    begin=(BOS,),
    turns={USER: ("[INST] ", TEXT, " [/INST]", CUT), ASSISTANT: (TEXT, EOS)},
    system=(TEXT, "\n\n"),
    merged_into="first",
    marks=("[INST]", "[/INST]"),
    alternating=True,
)

# 7B-Instruct v0.3: control tokens. Source: mistral-common, InstructTokenizerV3.
MISTRAL_V3 = ChatFormat(
    begin=(BOS,),
    turns={USER: (Special("[INST]"), TEXT, Special("[/INST]")), ASSISTANT: (WITHOUT_SPACES_BEHIND, EOS)},
    system=(TEXT, "\n\n"),
    merged_into="last",
    alternating=True,
)

# ---------------------------------------------------------------- Llama 3: the role between control tokens

EOT = Special("<|eot_id|>")
_HEADERS: dict[str, Parts] = {
    role: (Special("<|start_header_id|>"), role, Special("<|end_header_id|>"), "\n\n", CUT) for role in ROLES
}

# Source: meta-llama/llama3, ChatFormat.
LLAMA3 = ChatFormat(
    begin=(BOS,),
    turns={role: (*header, STRIPPED, EOT) for role, header in _HEADERS.items()},
    reply=_HEADERS[ASSISTANT],
    stops=(EOT, Special("<|end_of_text|>"), Special("<|eom_id|>")),
)

# 3.1 to 3.3 as their chat templates have it: dates before what the system says. The date is fixed, so that a prompt is
# repeatable; with "llama3" the system message may name another. Source: the chat_template of Llama-3.1-8B-Instruct.
LLAMA3_1 = replace(
    LLAMA3,
    system=(
        *_HEADERS[SYSTEM],
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
        STRIPPED,
        EOT,
    ),
    default_system="",
)

# ---------------------------------------------------------------- ChatML: the role behind a control token

IM_START, IM_END = Special("<|im_start|>"), Special("<|im_end|>")

# Source: the chat_template of Yi-34B-Chat and many others.
CHATML = ChatFormat(
    turns={role: (IM_START, f"{role}\n", TEXT, IM_END, "\n") for role in ROLES},
    reply=(IM_START, "assistant\n"),
    stops=(IM_END, EOS, Special("<|endoftext|>")),
)

# Source: the chat_template of SmolLM2-135M-Instruct.
SMOLLM2 = replace(CHATML, default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face")

# Source: FastChat, Yi-34b-chat.
YI = replace(CHATML, stops=(*CHATML.stops, IM_START, Special("<|im_sep|>")))

# ---------------------------------------------------------------- the role as text

# TinyLlama-Chat too. Source: the chat_template of TinyLlama-1.1B-Chat-v1.0.
ZEPHYR = ChatFormat(
    turns={role: (f"<|{role}|>\n", TEXT, EOS, "\n") for role in ROLES},
    reply=("<|assistant|>\n",),
    marks=tuple(f"<|{role}|>" for role in ROLES),
)

# v1.1 and later. Source: FastChat, vicuna_v1.1 (SeparatorStyle.ADD_COLON_TWO).
VICUNA = ChatFormat(
    begin=(BOS,),
    system=(TEXT, " "),
    turns={USER: ("USER: ", TEXT, " "), ASSISTANT: ("ASSISTANT: ", TEXT, EOS)},
    reply=("ASSISTANT:",),
    default_system="A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    marks=("USER:", "ASSISTANT:"),
    alternating=True,
)

# An instruction without input. Source: tatsu-lab/stanford_alpaca, PROMPT_DICT.
ALPACA = ChatFormat(
    begin=(BOS,),
    turns={
        USER: (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\n",
            TEXT,
            "\n\n### Response:",
        )
    },
    marks=("### Instruction:", "### Input:", "### Response:"),
    one_turn=True,
)

STEP = Special("<step>")

# Header and body of a message are encoded apart. Source: meta-llama/codellama, dialog_prompt_tokens.
CODE_LLAMA_70B = ChatFormat(
    begin=(BOS,),
    turns={role: (f" Source: {role}", CUT, "\n\n ", STRIPPED, STEP) for role in ROLES},
    reply=(" Source: assistant\nDestination: user", CUT, "\n\n "),
    stops=(STEP, EOS),
    marks=(*(f"Source: {role}" for role in ROLES), "Destination: user"),
    alternating=True,
)

# Source: the chat_template of deepseek-llm-7b-chat.
DEEPSEEK = ChatFormat(
    begin=(BOS,),
    turns={SYSTEM: (TEXT, "\n\n"), USER: ("User: ", TEXT, "\n\n"), ASSISTANT: ("Assistant: ", TEXT, EOS)},
    reply=("Assistant:",),
    marks=("User:", "Assistant:"),
)

FORMATS = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3.1": LLAMA3_1,
    "code-llama": CODE_LLAMA,
    "code-llama-70b": CODE_LLAMA_70B,
    "mistral": MISTRAL,
    "mistral-v3": MISTRAL_V3,
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "yi": YI,
    "zephyr": ZEPHYR,
    "vicuna": VICUNA,
    "alpaca": ALPACA,
    "deepseek": DEEPSEEK,
}
