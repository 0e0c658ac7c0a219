"""Checkpoints whose tokenizer is not SentencePiece's: from their files to a model directory, to text and back."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_bpe as tiny
from command_line import run
from helpers import TINY, write_safetensors_checkpoint, write_tokenizer
from hypothesis import HealthCheck, given, settings
from test_bpe_files import gguf_of
from test_bpe_tokenizer_json import TEXTS, template
from tiny_sentencepiece import trained
from torch_files import write_meta

import npllama
from npllama.checkpoints import open_checkpoint
from npllama.errors import CheckpointError, ModelError, NpllamaError, UsageError
from npllama.measure.quality import quality, windows
from npllama.store.export import export, quantize_model
from npllama.store.find_tokenizer import find_tokenizer
from npllama.store.opening import check_model, is_model_file, open_model
from npllama.store.tokenizers import open_tokenizer
from npllama.text.bpe.tokenizer import BpeTokenizer
from npllama.text.derived_names import FILES
from npllama.text.readers.tiktoken import read_tiktoken
from npllama.text.readers.tokenizer_json import read_tokenizer_json

ENDOFTEXT = "<|endoftext|>"


def gpt2() -> dict[str, Any]:
    """Like GPT-2's: one control token, nothing in front of a text."""
    return tiny.byte_level(added_tokens=[tiny.added(ENDOFTEXT, 406, special=True)])


def llama2() -> dict[str, Any]:
    """Like LLaMA 2's without its tokenizer.model: BOS by a template."""
    return tiny.characters(post_processor=template("<s>", "A", ids={"<s>": [1]}))


KINDS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "Llama 3": ("tokenizer.json", lambda: tiny.written(tiny.byte_level())),
    "LLaMA 2": ("tokenizer.json", lambda: tiny.written(llama2())),
    "GPT-2": ("tokenizer.json", lambda: tiny.written(gpt2())),
    "Llama 3, Meta's file": ("tokenizer.model", tiny.tiktoken_file),
}


def direct(kind: str) -> BpeTokenizer:
    """The tokenizer of a kind, read from its file and nothing else."""
    file, content = KINDS[kind]
    return BpeTokenizer(read_tokenizer_json(content()) if file == "tokenizer.json" else read_tiktoken(content()))


def write_checkpoint(folder: Path, rows: int = 700, **files: bytes | dict[str, Any]) -> Path:
    """A Hugging Face folder with these tokenizer files (tokenizer_json for tokenizer.json) and no other."""
    write_safetensors_checkpoint(folder, replace(TINY, vocab_size=rows), tokenizer=False)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / re.sub(r"_(json|model)$", r".\1", name)).write_bytes(data)
    return folder


def write_kind(folder: Path, kind: str) -> Path:
    file, content = KINDS[kind]
    return write_checkpoint(folder, **{file.replace(".", "_"): content()})


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(kind, its model directory)."""
    folder = tmp_path_factory.mktemp("kinds")
    export(write_kind(folder / "checkpoint", request.param), folder / "m")
    return request.param, folder / "m"


# --- a model directory


def test_a_checkpoint_exports_to_a_directory_that_says_kind_and_version(model: tuple[str, Path]) -> None:
    kind, folder = model
    manifest, config = check_model(folder)
    assert (manifest["version"], manifest["tokenizer"]["kind"]) == (3, "bpe")
    assert manifest["tokenizer"]["size"] == direct(kind).n_pieces
    assert set(manifest["tokenizer"]["sha256"]) == set(FILES)
    assert all(is_model_file(path.name) for path in folder.iterdir())
    assert not (folder / "tokenizer.model").exists()
    assert config.add_bos_token == bool(direct(kind).encode(""))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(text=TEXTS)
def test_ids_are_those_of_the_file_and_never_control_tokens(model: tuple[str, Path], text: str) -> None:
    kind, folder = model
    tokenizer = open_tokenizer(folder, *check_model(folder)) if folder not in OPENED else OPENED[folder]
    OPENED[folder] = tokenizer
    ids = tokenizer.encode(text)
    assert ids == direct_of(kind).encode(text)
    begin = 1 if direct_of(kind).add_bos else 0
    assert tokenizer.control_ids.isdisjoint(ids[begin:])
    assert tokenizer.vocab_size == 700


OPENED: dict[Path, Any] = {}
DIRECT: dict[str, BpeTokenizer] = {}


def direct_of(kind: str) -> BpeTokenizer:
    return DIRECT.setdefault(kind, DIRECT.get(kind) or direct(kind))


def test_a_model_generates_and_streams_the_same_text(model: tuple[str, Path]) -> None:
    kind, folder = model
    with npllama.load(folder, backend="numpy") as llm:
        prompt = "to the naïve 日本 <|eot_id|></s>"
        for padding_ids in (False, True):
            options = {"max_tokens": 30, "seed": 5, "temperature": 1.5, "padding_ids": padding_ids}
            whole = llm.generate(prompt, echo=True, **options)
            assert whole.text.startswith(prompt)
            assert whole.text == "".join(piece.text for piece in llm.stream(prompt, echo=True, **options))
            ids = direct(kind).encode(prompt)
            assert llm.generate(ids, **options).tokens == whole.tokens
            assert whole.text == llm.tokenizer.decode([*ids, *whole.tokens])


def test_quantizing_copies_the_tokenizer(model: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = model
    quantize_model(folder, tmp_path / "q", "q8")
    for name in FILES:
        assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()
    with npllama.load(tmp_path / "q", backend="numpy") as llm:
        assert llm.tokenizer.encode("to the") == direct(kind).encode("to the")


def test_info_shows_kind_and_sizes(model: tuple[str, Path]) -> None:
    kind, folder = model
    shown = json.loads(run("info", folder, "--json").out)
    assert shown["tokenizer"]["kind"] == "byte pair encoding"
    assert shown["tokenizer"]["pieces"] == direct(kind).n_pieces
    assert shown["tokenizer"]["size_bytes"] == sum((folder / name).stat().st_size for name in FILES)
    assert shown["files"] == len(list(folder.iterdir()))


@pytest.mark.parametrize("file", FILES)
def test_a_changed_or_missing_file_is_named(file: str, tmp_path: Path) -> None:
    export(write_kind(tmp_path / "checkpoint", "Llama 3"), tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ModelError, match=rf"{re.escape(file)}: is not the tokenizer that was exported .*; export the"):
        open_model(tmp_path / "m")
    path.unlink()
    with pytest.raises(ModelError, match=rf"{re.escape(file)}: .*; export the checkpoint again"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "unigram"}, "tokenizer: kind is 'unigram', needed is one of bpe"),
        ({"kind": "sentencepiece"}, "tokenizer: kind is 'sentencepiece', needed is one of bpe"),
        ({"kind": ["bpe"]}, "tokenizer: kind is '.*', needed is one of bpe"),
        ({"sha256": "0"}, "tokenizer: sha256 is '0', an object is needed"),
        ({"sha256": {}}, "tokenizer: sha256 has no 'tokenizer.bytes.npy', which is needed"),
        ({"sha256": dict.fromkeys([*FILES, "../x"], "0" * 64)}, r"tokenizer: sha256 has '\.\./x', which this version"),
        ({"sha256": dict.fromkeys(FILES, "?")}, "sha256 of tokenizer.* is '\\?', needed are 64 hexadecimal digits"),
        ({"size": 701}, "tokenizer: size is '701', but vocab_size of the config is 700"),
        ({"more": 1}, "tokenizer has 'more', which this version does not know"),
    ],
)
def test_an_entry_of_the_manifest_that_cannot_be_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    export(write_kind(tmp_path / "checkpoint", "Llama 3"), tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "npllama.json").read_text())
    manifest["tokenizer"].update(change)
    (tmp_path / "m" / "npllama.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path / "m")


def test_a_kind_is_not_known_to_earlier_versions(tmp_path: Path) -> None:
    export(write_kind(tmp_path / "checkpoint", "Llama 3"), tmp_path / "m")
    manifest = json.loads((tmp_path / "m" / "npllama.json").read_text())
    (tmp_path / "m" / "npllama.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ModelError, match="has 'kind', which needs version 3, but says version 2"):
        open_model(tmp_path / "m")


# --- which tokenizer is taken


def taken(checkpoint: Path, tokenizer: Path | None = None) -> str:
    with open_checkpoint(checkpoint) as source:
        return find_tokenizer(source, tokenizer).title


def test_the_order_in_which_a_tokenizer_is_looked_for(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "tokenizer.json").write_bytes(tiny.written(gpt2()))
    assert taken(folder) == str(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(tiny.tiktoken_file())
    assert taken(folder) == str(tmp_path / "tokenizer.model")
    (folder / "tokenizer.json").write_bytes(tiny.written(gpt2()))
    assert taken(folder) == str(folder / "tokenizer.json")
    write_tokenizer(folder / "tokenizer.model", 300)
    assert taken(folder) == str(folder / "tokenizer.model")
    assert taken(folder, tmp_path) == str(tmp_path / "tokenizer.model")
    assert taken(folder, tmp_path / "tokenizer.json") == str(tmp_path / "tokenizer.json")


def test_a_file_is_what_its_content_shows_whatever_its_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    for name, content in (("a.bin", tiny.tiktoken_file()), ("b", b"\xef\xbb\xbf" + tiny.written(gpt2()))):
        (tmp_path / name).write_bytes(content)
        with open_checkpoint(folder) as source:
            if name == "b":  # no JSON file begins with a byte order mark
                with pytest.raises(CheckpointError, match=r"^b: "):
                    find_tokenizer(source, tmp_path / name)
            else:
                assert find_tokenizer(source, tmp_path / name).tokenizer.n_pieces == 406 + 256


def test_beside_a_sentencepiece_file_tokenizer_json_changes_nothing(tmp_path: Path) -> None:
    write_safetensors_checkpoint(tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "m")
    (tmp_path / "checkpoint" / "tokenizer.json").write_bytes(tiny.written(gpt2()))
    export(tmp_path / "checkpoint", tmp_path / "n")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "mn"]
    assert contents[0] == contents[1]


def test_the_vocabulary_inside_a_checkpoint_comes_before_files_beside_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tokenizer_json=gpt2())
    inside = {key.removeprefix("tokenizer.ggml."): value for key, value in gguf_of(trained()).items()}
    with open_checkpoint(folder) as opened:
        source = replace(opened, vocabulary=inside)
        found = find_tokenizer(source, None)
        assert found.title == f"the one inside the checkpoint ({len(inside['tokens'])} tokens of kind llama)"
        assert found.tokenizer.encode("")[0] == 1
        assert find_tokenizer(source, folder).title == str(folder / "tokenizer.json")
        with pytest.raises(CheckpointError, match=r"the vocabulary inside: tokenizer\.ggml\.model is 'bert'"):
            find_tokenizer(replace(source, vocabulary={**inside, "model": "bert"}), None)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", rows=400, tokenizer_json=tiny.byte_level())
    with pytest.raises(CheckpointError, match="has 409 pieces, but the checkpoint's vocabulary has 400 rows"):
        export(folder, tmp_path / "m")


def test_a_tokenizer_json_that_is_not_known_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tokenizer_json=tiny.byte_level(normalizer={"type": "NFC"}))
    with pytest.raises(NpllamaError, match=r"tokenizer\.json: normalizer 'NFC' is not supported"):
        export(folder, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- BOS and EOS


def said(checkpoint: Path, out: Path) -> tuple[npllama.inference.ModelConfig, list[str]]:
    lines: list[str] = []
    export(checkpoint, out, note=lines.append)
    with open_model(out) as opened:
        return opened.config, [line for line in lines[1:] if not line.startswith("vocabulary: ")]


@pytest.mark.parametrize(
    ("kind", "bos", "ends"),
    [
        ("Llama 3", 406, (407, 408)),
        ("LLaMA 2", 1, (2,)),
        ("GPT-2", None, (406,)),
        ("Llama 3, Meta's file", 406, (407, 414, 415)),
    ],
)
def test_a_checkpoint_that_names_words_as_ends_gets_the_tokenizers(
    kind: str, bos: int | None, ends: tuple[int, ...], tmp_path: Path
) -> None:
    config, lines = said(write_kind(tmp_path / "checkpoint", kind), tmp_path / "m")
    assert (config.bos_token_id, config.eos_token_ids) == (bos, ends)
    assert len(lines) == (kind != "LLaMA 2")
    assert all("the tokenizer's, as the checkpoint names no control token" in line for line in lines)


def test_ends_that_the_checkpoint_names_are_kept_where_they_are_control_tokens(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "checkpoint", tokenizer_json=tiny.byte_level(), generation_config_json={"eos_token_id": [408, 5]}
    )
    config, _ = said(folder, tmp_path / "m")
    assert config.eos_token_ids == (408,)


def test_the_template_counts_and_a_flag_that_says_otherwise_is_remarked(tmp_path: Path) -> None:
    asked = {"add_bos_token": False, "add_eos_token": True, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    folder = write_checkpoint(tmp_path / "checkpoint", tokenizer_json=llama2(), tokenizer_config_json=asked)
    config, lines = said(folder, tmp_path / "m")
    assert (config.add_bos_token, config.add_eos_token) == (True, False)
    bos, eos = lines
    assert (
        "add_bos_token is false, but tokenizer.json counts, by which a text gets BOS (--no-bos asks otherwise)" in bos
    )
    assert "add_eos_token is true, but tokenizer.json counts, by which a text gets no EOS (--eos asks otherwise)" in eos


def test_the_settings_beside_tokenizer_json_name_bos_and_eos(tmp_path: Path) -> None:
    names = {"bos_token": "<|end_of_text|>", "eos_token": {"content": "<|eot_id|>"}, "tokenizer_class": "X"}
    folder = write_checkpoint(tmp_path / "checkpoint", tokenizer_json=tiny.byte_level(), tokenizer_config_json=names)
    config, _ = said(folder, tmp_path / "m")
    assert (config.bos_token_id, config.eos_token_ids) == (407, (408,))


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    export(write_kind(folder / "checkpoint", "GPT-2"), folder / "m")
    return folder / "m"


def test_a_model_without_bos_takes_texts_as_they_are(without_bos: Path) -> None:
    with npllama.load(without_bos, backend="numpy") as llm:
        assert llm.tokenizer.bos_id is None
        assert llm.generate("to", max_tokens=2).usage.prompt_tokens == len(direct("GPT-2").encode("to"))
        with pytest.raises(UsageError, match="bos=True: this tokenizer has no such token; leave it out"):
            llm.generate("to", bos=True)
        with pytest.raises(UsageError, match=r"is empty and gets no BOS here, so there is no token; give text\.$"):
            llm.generate("")
        assert llm.generate("to", eos=True, max_tokens=0).usage.prompt_tokens == 1 + len(direct("GPT-2").encode("to"))


def test_without_bos_a_window_begins_with_the_last_id_of_the_one_before(without_bos: Path) -> None:
    with npllama.load(without_bos, backend="numpy") as llm:
        text = "to the naïve 2024 don't" * 3
        ids = llm.tokenizer.encode(text)
        found = list(windows(llm, text, 8))
        assert found[0] == ids[:8]
        assert [token for i, window in enumerate(found) for token in window[i > 0 :]] == ids
        assert all(before[-1] == after[0] for before, after in pairwise(found))
        assert quality(llm, text, 8).n_tokens == len(ids) - 1
        with pytest.raises(UsageError, match="has one id and no BOS in front, so there is none to predict"):
            list(windows(llm, "t", 8))


def test_a_text_that_would_give_a_control_token_is_refused(without_bos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vocabulary that is read can; should one, no model is to see it."""
    with npllama.load(without_bos, backend="numpy") as llm:
        monkeypatch.setattr(llm.tokenizer, "_words", Controls())
        with pytest.raises(ModelError, match="has a control token that this text becomes, and text never becomes one"):
            llm.generate("to")


class Controls:
    def ids(self, text: str) -> list[int]:
        return [406]


def test_perplexity_says_that_no_window_has_a_bos(without_bos: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("to the naïve 2024")
    done = run("perplexity", "-m", without_bos, "-f", tmp_path / "text", "-c", "8", "--backend", "numpy")
    assert b"in windows of 8 ids, every id of the text but the first once" in done.out


# --- folders as other programs write them


def test_a_release_of_meta_with_llama_3s_tokenizer_exports_and_ends_at_its_tokens(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", rows=406 + 256)
    (tmp_path / "meta" / "tokenizer.model").write_bytes(tiny.tiktoken_file())
    export(tmp_path / "meta", tmp_path / "m")
    with npllama.load(tmp_path / "m", backend="numpy") as llm:
        assert llm.config.eos_token_ids == (407, 414, 415)
        assert llm.tokenizer.encode("to")[0] == llm.config.bos_token_id == llm.tokenizer.special("<|begin_of_text|>")
        found = llm.generate("to the", max_tokens=40, temperature=1.0, seed=3)
        assert not set(found.tokens) & {406, 407, 414, 415}


def test_a_tokenizer_json_of_the_package_tokenizers_exports_and_gives_its_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([tiny.text()], trainer)
    theirs.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    folder = write_checkpoint(tmp_path / "checkpoint")
    theirs.save(str(folder / "tokenizer.json"))
    export(folder, tmp_path / "m")
    with npllama.load(tmp_path / "m", backend="numpy") as llm:
        text = tiny.text() + "2024 🐘 naïve\n\n  x"
        assert llm.tokenizer.encode(text) == theirs.encode(text).ids
        ids = llm.generate(text[:40], max_tokens=20, seed=2, echo=True)
        assert ids.text == theirs.decode([*theirs.encode(text[:40]).ids, *ids.tokens])


# --- real vocabularies

FAMILY = {
    "smollm2": ("smollm2/tokenizer.json", "smollm2"),
    "gpt2": ("gpt2/tokenizer.json", "gpt2"),
    "llama3": ("llama3/tokenizer.json", "llama3"),
    "llama3, Meta's file": ("llama3/tokenizer.model", "llama3"),
    "mistral": ("mistral/tokenizer.json", "mistral-v1-json"),
    "deepseek": ("deepseek-llm/tokenizer.json", "deepseek-llm"),
}


SLOW = pytest.mark.slow("export and open models with large vocabularies; one of them is done in any case")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "smollm2" else SLOW) for name in FAMILY])
def test_a_folder_of_the_family_exports_opens_and_gives_the_golden_ids(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    file, golden = FAMILY[name]
    if not (shared_data / "family").is_dir():
        pytest.skip("real vocabularies: the folder of golden results has no family of tokenizers")
    folder = tmp_path / "checkpoint"
    write_safetensors_checkpoint(folder, replace(TINY, vocab_size=128_256, n_layers=1), tokenizer=False)
    shutil.copy(shared_data / "family" / file, folder / Path(file).name)
    export(folder, tmp_path / "m", "q8")
    with npllama.load(tmp_path / "m", backend="numpy") as llm:
        for case in json.loads((shared_data / "family" / "golden" / f"{golden}.json").read_text())["cases"]:
            assert llm.tokenizer.encode(case["text"], bos=False) == case["ids"], ascii(case["text"])
        options = {"max_tokens": 20, "seed": 1, "padding_ids": True}
        texts = [piece.text for piece in llm.stream("Once upon a time", **options)]
        assert "".join(texts) == llm.generate("Once upon a time", **options).text
    # On a CPU that others use, too, even its own time is twice as long: one of a hundred is quick enough, or none is.
    assert any(timed(lambda: open_tokenizer(tmp_path / "m", *check_model(tmp_path / "m"))) < 0.2 for _ in range(100))


def timed(work: Callable[[], object]) -> float:
    """Seconds of the CPU."""
    started = time.process_time()
    work()
    return time.process_time() - started
