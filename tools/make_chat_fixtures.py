"""Write tests/fixtures/chat.json: dialogs in every chat format, and the ids that the program of each format makes.

    python tools/make_chat_fixtures.py DATA [FILE]

DATA: the folder of real tokenizers and chat templates (its README says whence). References: Meta's rules for LLaMA 2,
Code Llama and Llama 3, spelled out below; the package mistral-common; the template of the checkpoint rendered by
transformers; for Vicuna and Alpaca, which ship none, the text of their training code. Needs mistral-common,
sentencepiece, tokenizers, transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

FILE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "chat.json"
ROLES = {"s": "system", "u": "user", "a": "assistant"}
STEP = 32000
"""The id of a control token that is appended to LLaMA 2's vocabulary, as Code Llama's has it elsewhere."""

Messages = list[dict[str, str]]


def dialog(roles: str, *texts: str) -> Messages:
    return [{"role": ROLES[role], "content": text} for role, text in zip(roles, texts, strict=True)]


DIALOGS = {
    "one": dialog("u", "Hello"),
    "four": dialog("suau", "Answer in rhymes.", "What is a fox?", "It's in the box.", "  And then?\n"),
    "odd": dialog("uau", "def f(x):\n\treturn x  # 12345", " naïve 日本語 🦊 \n\n", "\n\nπ ≈ 3.14159?  Yes  "),
    "long": dialog("uauau", "a", "b.", "It's 7 o'clock.", "Is it? ", "I'm sure; you'll see!"),
    "plain": dialog("su", " Be brief. ", " One </s> two <s> three <unk>. "),
}
ALL = ("one", "four", "odd")


def main() -> None:
    data, file = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else FILE
    cases: list[dict[str, Any]] = []

    def add(
        chat_format: str, tokenizer: str, reference: str, ids: Callable[[Messages], list[int]], names: Any, *added: str
    ) -> None:
        for name in names:
            about = {"format": chat_format, "tokenizer": tokenizer, "added": list(added), "reference": reference}
            cases.append({**about, "messages": DIALOGS[name], "ids": list(map(int, ids(DIALOGS[name])))})

    add_meta(data / "family", add)
    add_mistral(data / "family", add)
    add_templates(data / "family", add)
    add_by_hand(data / "family", add)
    lines = ",\n".join(json.dumps(case) for case in cases)
    file.write_text(f"[\n{lines}\n]\n", encoding="ascii")
    print(f"{file}: {len(cases)} dialogs, {len({case['format'] for case in cases})} formats")


# ---------------------------------------------------------------- Meta's rules


def add_meta(family: Path, add: Callable[..., None]) -> None:
    """LLaMA 2's chat_completion, Code Llama's dialog_prompt_tokens, Llama 3's ChatFormat."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(family / "llama2" / "tokenizer.model"))
    bpe = tokenizers.Tokenizer.from_file(str(family / "llama3" / "tokenizer.json"))
    bpe.encode_special_tokens = True  # what looks like a control token in a text is text

    def llama2(messages: Messages) -> list[int]:
        if messages[0]["role"] == "system":
            merged = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n{messages[1]['content']}"
            messages = [{"role": "user", "content": merged}, *messages[2:]]
        texts, ids = [message["content"].strip() for message in messages], []
        for said, answered in zip(texts[::2], texts[1::2], strict=False):
            ids += [sp.bos_id(), *sp.encode(f"[INST] {said} [/INST] {answered} "), sp.eos_id()]
        return [*ids, sp.bos_id(), *sp.encode(f"[INST] {texts[-1]} [/INST]")]

    def code_llama_70b(messages: Messages) -> list[int]:
        ids = [sp.bos_id()]
        for message in messages:
            ids += sp.encode(f" Source: {message['role']}")
            ids += sp.encode("\n\n " + message["content"].strip())
            ids.append(STEP)
        return [*ids, *sp.encode(" Source: assistant\nDestination: user"), *sp.encode("\n\n ")]

    def text(part: str) -> list[int]:
        return bpe.encode(part, add_special_tokens=False).ids

    def header(role: str) -> list[int]:
        begin, end = bpe.token_to_id("<|start_header_id|>"), bpe.token_to_id("<|end_header_id|>")
        return [begin, *text(role), end, *text("\n\n")]

    def llama3(messages: Messages) -> list[int]:
        ids = [bpe.token_to_id("<|begin_of_text|>")]
        for message in messages:
            ids += [*header(message["role"]), *text(message["content"].strip()), bpe.token_to_id("<|eot_id|>")]
        return [*ids, *header("assistant")]

    model = "llama2/tokenizer.model"
    add("llama2", model, "meta-llama/llama generation.py chat_completion", llama2, DIALOGS)
    add("code-llama", model, "meta-llama/codellama generation.py chat_completion", llama2, ("four", "plain"))
    source = "meta-llama/codellama generation.py dialog_prompt_tokens"
    add("code-llama-70b", model, source, code_llama_70b, (*ALL, "plain"), "<step>")
    add("llama3", "llama3/tokenizer.json", "meta-llama/llama3 llama/tokenizer.py ChatFormat", llama3, DIALOGS)


# ---------------------------------------------------------------- packages


def add_mistral(family: Path, add: Callable[..., None]) -> None:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    version = importlib.metadata.version("mistral-common")

    def reference(chat: MistralTokenizer) -> Callable[[Messages], list[int]]:
        def ids(messages: Messages) -> list[int]:
            request = ChatCompletionRequest(messages=[kinds[one["role"]](content=one["content"]) for one in messages])
            return chat.encode_chat_completion(request).tokens

        return ids

    v1, v3 = reference(MistralTokenizer.v1()), reference(MistralTokenizer.v3())
    add("mistral", "mistral/tokenizer.model.v1", f"mistral-common {version} v1", v1, (*ALL, "long"))
    add("mistral", "mistral/tokenizer.json", f"mistral-common {version} v1", v1, ("plain",))
    model = "mistral/mistral_instruct_tokenizer_240323.model.v3"
    add("mistral-v3", model, f"mistral-common {version} v3", v3, (*ALL, "long"))


def add_templates(family: Path, add: Callable[..., None]) -> None:
    """Templates of checkpoints, rendered by transformers with a tokenizer that is here."""
    known = json.loads((family / "golden" / "chat_jinja.json").read_text(encoding="utf-8"))
    templates = {case["name"]: case for case in known}

    def reference(name: str, tokenizer: str, *added: str) -> Callable[[Messages], list[int]]:
        case = templates[name]
        with tempfile.TemporaryDirectory() as folder:
            whole = tokenizers.Tokenizer.from_file(str(family / tokenizer))
            whole.add_special_tokens([tokenizers.AddedToken(one, special=True, normalized=False) for one in added])
            whole.save(f"{folder}/tokenizer.json")
            marks = {"bos_token": case["bos_token"], "eos_token": case["eos_token"]}
            chat = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", **marks)

        def ids(messages: Messages) -> list[int]:
            how = {"chat_template": case["template"], "add_generation_prompt": True, "tokenize": True}
            return chat.apply_chat_template(messages, return_dict=False, **how)

        return ids

    for chat_format, name, tokenizer, names, *added in (
        ("llama3.1", "llama3.1", "llama3/tokenizer.json", ALL),
        ("smollm2", "smollm2", "smollm2/tokenizer.json", ALL),
        ("deepseek", "deepseek-llm-chat", "deepseek-llm/tokenizer.json", (*ALL, "long")),
        ("chatml", "yi-chat / chatml", "smollm2/tokenizer.json", ALL),
        ("yi", "yi-chat / chatml", "mistral/tokenizer.json", ("one", "four"), "<|im_start|>", "<|im_end|>"),
        ("zephyr", "zephyr-tinyllama", "mistral/tokenizer.json", ALL),
    ):
        source = f"its chat_template in transformers {transformers.__version__}"
        add(chat_format, tokenizer, source, reference(name, tokenizer, *added), names, *added)


# ---------------------------------------------------------------- by hand


def add_by_hand(family: Path, add: Callable[..., None]) -> None:
    """Vicuna as FastChat's ADD_COLON_TWO joins it; Alpaca's prompt without input."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(family / "llama2" / "tokenizer.model"))
    usual = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def vicuna(messages: Messages) -> list[int]:
        own = messages[0]["role"] == "system"
        ids, text = [sp.bos_id()], (messages[0]["content"] if own else usual) + " "
        for message in messages[own:]:
            if message["role"] == "user":
                text += "USER: " + message["content"] + " "
            else:
                ids += [*sp.encode(text + "ASSISTANT: " + message["content"]), sp.eos_id()]
                text = ""
        return [*ids, *sp.encode(text + "ASSISTANT:")]

    def alpaca(messages: Messages) -> list[int]:
        text = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{messages[0]['content']}\n\n### Response:"
        )
        return [sp.bos_id(), *sp.encode(text)]

    model = "llama2/tokenizer.model"
    add("vicuna", model, "FastChat conversation.py vicuna_v1.1", vicuna, DIALOGS)
    add("alpaca", model, "tatsu-lab/stanford_alpaca train.py", alpaca, ("one",))


if __name__ == "__main__":
    main()
