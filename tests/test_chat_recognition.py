"""Which chat format a checkpoint has: known by its template's text, stored, shown, and overridden by name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import gguf_files
import pytest
import tiny_bpe
from helpers import write_safetensors_checkpoint

import npllama
from npllama.store.export import export, quantize_model
from npllama.store.opening import open_model
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.chat.formats import FORMATS
from npllama.text.chat.recognition import recognised
from npllama.text.readers.tokenizer_json import read_tokenizer_json

TURN = "{% for message in messages %}{{ PARTS }}{% endfor %}{% if add_generation_prompt %}{{ REPLY }}{% endif %}"


def turn(parts: str, reply: str = "''") -> str:
    """A template that writes some parts for every message."""
    return TURN.replace("PARTS", parts).replace("REPLY", reply)


def by_role(user: str, assistant: str, system: str = "''") -> str:
    said = {"user": user, "assistant": assistant, "system": system}
    branches = "".join(
        f"{{% if message['role'] == '{role}' %}}{{{{ {parts} }}}}{{% endif %}}" for role, parts in said.items()
    )
    return f"{{{{ bos_token }}}}{{% for message in messages %}}{branches}{{% endfor %}}"


CHATML = turn(
    r"'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'", r"'<|im_start|>assistant\n'"
)
LLAMA3 = "{{ bos_token }}" + turn(
    r"""'<|start_header_id|>' ~ message.role ~ "<|end_header_id|>\n\n" ~ message.content | trim ~ '<|eot_id|>'""",
    r"'<|start_header_id|>assistant<|end_header_id|>\n\n'",
)
MISTRAL = by_role("'[INST] ' + message['content'] + ' [/INST]'", "message['content'] + eos_token")
LLAMA2 = (
    r"{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{{ ' ' + content.strip() + ' ' + eos_token }}"
)
ZEPHYR = by_role(*(f"'<|{role}|>\n' + message['content'] + eos_token" for role in ("user", "assistant", "system")))
DATES = r"{{ 'Cutting Knowledge Date: December 2023\n' + 'Today Date: ' + date + '\n\n' }}"
SMOLLM = r"{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"


@cache
def tokenizer(*names: str) -> BpeTokenizer:
    file = tiny_bpe.byte_level()
    more = [
        tiny_bpe.added(name, tiny_bpe.size(file) + i, special=True) for i, name in enumerate(("<s>", "</s>", *names))
    ]
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    return BpeTokenizer(read_tokenizer_json(json.dumps(tiny_bpe.byte_level(more_added=more)).encode(), settings, "t"))


HEADERS = ("<|start_header_id|>", "<|end_header_id|>")
IM = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "names", "expected"),
    [
        (CHATML, IM, "chatml"),
        (CHATML.replace("'", '"').replace("+", " + ").replace("{{", "{{- "), IM, "chatml"),
        (CHATML.replace(r"\n", "\n"), IM, "chatml"),
        ("{# [INST] #}" + CHATML, IM, "chatml"),
        (SMOLLM + CHATML, IM, "smollm2"),
        (LLAMA3, HEADERS, "llama3"),
        (LLAMA3.replace("{% for", DATES + "{% for"), HEADERS, "llama3.1"),
        (LLAMA2, (), "llama2"),
        (MISTRAL, (), "mistral"),
        (MISTRAL, ("[INST]", "[/INST]"), "mistral-v3"),
        (MISTRAL.replace("[INST] ", " [INST] "), (), "mistral"),
        (ZEPHYR, (), "zephyr"),
        (
            by_role(r"'User: ' + message['content'] + '\n\n'", "'Assistant: ' + message['content'] + eos_token"),
            (),
            "deepseek",
        ),
    ],
)
def test_a_template_is_known_however_it_is_spaced_and_quoted(
    template: str, names: tuple[str, ...], expected: str
) -> None:
    assert recognised(template, tokenizer(*names)) == expected


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("", IM),
        ("{{ messages[0]['content'] }}", IM),
        (CHATML, ()),  # its control tokens are missing
        ("{{ bos_token }}" + CHATML, IM),  # our ChatML has no BOS
        (SMOLLM.replace("SmolLM", "Bob") + CHATML, IM),  # another default system message
        (CHATML.replace("message['content']", "message['content'] | trim"), IM),
        (CHATML.replace("'<|im_end|>'", "'<|im_sep|>'"), IM),
        (LLAMA3.replace("| trim", ""), HEADERS),
        (LLAMA3.replace("{% for", "{{ 'You are kind' }}{% for"), HEADERS),
        (LLAMA2.replace("bos_token +", ""), ()),
        (MISTRAL.replace("{% for", "{{ '[SYSTEM_PROMPT]' }}{% for"), ()),
        (ZEPHYR.replace(" + eos_token", " + '<|end|>'"), ()),
    ],
)
def test_what_differs_from_every_format_is_not_guessed(template: str, names: tuple[str, ...]) -> None:
    assert recognised(template, tokenizer(*names)) is None


def test_a_huge_template_takes_no_time() -> None:
    assert recognised("{%-" * 2_000_000, tokenizer()) is None
    assert recognised("{#" * 2_000_000, tokenizer()) is None
    assert recognised(CHATML * 3_000, tokenizer(*IM)) == "chatml"


def test_the_templates_of_real_checkpoints_are_known(shared_data: Path) -> None:
    known = json.loads((shared_data / "family" / "golden" / "chat_jinja.json").read_text())
    expected = {"llama3": "llama3", "llama3.1": "llama3.1", "llama3.2": "llama3.1", "smollm2": "smollm2"}
    expected |= {"llama2": "llama2", "zephyr-tinyllama": "zephyr", "deepseek-llm-chat": "deepseek"}
    expected |= {"yi-chat / chatml": "chatml", "mistral-v0.1/0.2 first template": "mistral"}
    expected |= {"mistral-v1 official (v0.2 later)": "mistral"}
    templates = {case["name"]: case["template"] for case in known}
    assert {name: recognised(text, tokenizer(*IM, *HEADERS)) for name, text in templates.items()} == expected


# ---------------------------------------------------------------- from a checkpoint to a call


def exported(folder: Path, template: object = None, jinja: str | None = None) -> tuple[Path, list[str]]:
    write_safetensors_checkpoint(folder / "checkpoint")
    if template is not None:
        (folder / "checkpoint" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    if jinja is not None:
        (folder / "checkpoint" / "chat_template.jinja").write_text(jinja)
    said: list[str] = []
    export(folder / "checkpoint", folder / "out", note=said.append)
    return folder / "out", [line for line in said if "chat" in line.rpartition("/")[2]]


@pytest.mark.parametrize(
    ("template", "jinja", "expected"),
    [
        (LLAMA2, None, "llama2"),
        ([{"name": "tool_use", "template": MISTRAL}, {"name": "default", "template": LLAMA2}], None, "llama2"),
        (MISTRAL, LLAMA2, "llama2"),
        (None, ZEPHYR, "zephyr"),
    ],
)
def test_the_format_is_stored_and_kept_and_shown(
    call, tmp_path: Path, template: object, jinja: str | None, expected: str
) -> None:
    model, said = exported(tmp_path, template, jinja)
    assert said == [f"chat format: {expected}, by the chat template"]
    quantize_model(model, tmp_path / "small", "q8")
    for folder in (model, tmp_path / "small"):
        manifest = json.loads((folder / "npllama.json").read_text())
        assert (manifest["chat_format"], manifest["version"], manifest["needs_npllama"]) == (expected, 4, "0.1.0")
        with open_model(folder) as opened:
            assert opened.chat_format == expected
        assert json.loads(call("info", folder, "--json").text)["chat_format"] == expected
    assert json.loads(call("info", tmp_path / "checkpoint", "--json").text)["chat_format"] == expected
    with npllama.load(model) as llm:
        assert llm.chat_format == expected


@pytest.mark.parametrize("template", [CHATML, "{{ 'x' }}", 7, [{"name": "tools", "template": "x"}], {"default": 1}])
def test_a_template_of_no_known_format_is_said_with_the_list(call, tmp_path: Path, template: object) -> None:
    model, said = exported(tmp_path, template)
    assert len(said) == 1
    assert said[0].startswith("the chat template is of no format that is known; name the one it is with chat_format=: ")
    assert all(name in said[0] for name in FORMATS)
    assert "chat_format" not in json.loads((model / "npllama.json").read_text())
    assert json.loads(call("info", model, "--json").text)["chat_format"] == "none"


def test_without_a_template_nothing_is_said_and_nothing_stored(tmp_path: Path) -> None:
    model, said = exported(tmp_path)
    assert said == []
    with npllama.load(model) as llm:
        assert llm.chat_format is None


def test_a_call_may_name_another_format(tmp_path: Path) -> None:
    model, _ = exported(tmp_path, LLAMA2)
    with npllama.load(model, chat_format="zephyr") as llm:
        assert llm.chat_format == "zephyr"
    with pytest.raises(npllama.UsageError, match=r"^chat_format='gpt': needs one of llama2, "):
        npllama.load(model, chat_format="gpt")
    with pytest.raises(
        npllama.UsageError, match=r"needs the control token '<\|im_end\|>', which this tokenizer does not"
    ):
        npllama.load(model, chat_format="chatml")


def test_the_template_inside_a_gguf_file_counts_and_not_the_one_beside_it(tmp_path: Path) -> None:
    file, _ = gguf_files.file_of()
    file.metadata["tokenizer.chat_template"] = ("str", ZEPHYR)
    (tmp_path / "model.gguf").write_bytes(file.bytes())
    (tmp_path / "chat_template.jinja").write_text(LLAMA2)
    export(tmp_path / "model.gguf", tmp_path / "out")
    with open_model(tmp_path / "out") as opened:
        assert opened.chat_format == "zephyr"


def test_a_stored_format_that_is_no_name_is_refused(tmp_path: Path) -> None:
    model, _ = exported(tmp_path, LLAMA2)
    manifest = json.loads((model / "npllama.json").read_text())
    (model / "npllama.json").write_text(json.dumps({**manifest, "chat_format": ["llama2"]}))
    with pytest.raises(npllama.ModelError, match=r"chat_format is .*, a name is needed; export the checkpoint again"):
        open_model(model)
