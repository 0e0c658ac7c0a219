"""Damage input files in thousands of ways and watch what reading them does.

    python tools/fuzz_inputs.py [--count 4000] [--seed 0] [--kind NAME]...

Each damaged file must load or raise NpllamaError, within 2 seconds and 512 MB, and must never end the process. Case
number i of a kind is the same in every run of one seed. They run in another process, whose address space is limited, so
a crash or a hunger for memory is seen and named. Exit status 1 when a case failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz_damage import damage  # noqa: E402
from gguf_files import write_gguf, write_quantized, write_split  # noqa: E402
from helpers import TINY, safetensors_bytes, write_model_directory, write_tokenizer  # noqa: E402
from llama2c_files import write_llama2c_bin  # noqa: E402
from tiny_bpe import byte_level, characters, tiktoken_file, written  # noqa: E402
from torch_files import (  # noqa: E402
    hugging_face_tensors,
    stored,
    torch_legacy,
    torch_zip,
    write_hugging_face,
    write_llama2c,
    write_meta,
)

import npllama  # noqa: E402
from npllama.checkpoints import open_checkpoint  # noqa: E402
from npllama.errors import NpllamaError, UsageError  # noqa: E402
from npllama.generation.sessions.files import check_of  # noqa: E402
from npllama.rope import RopeScaling  # noqa: E402
from npllama.store.opening import open_model  # noqa: E402
from npllama.store.tokenizers import open_tokenizer, stored_vocabulary  # noqa: E402
from npllama.system import strict_json  # noqa: E402
from npllama.text.bpe.tokenizer import BpeTokenizer  # noqa: E402
from npllama.text.derived import files_of, vocabulary_of  # noqa: E402
from npllama.text.derived_names import FILES  # noqa: E402
from npllama.text.readers.tiktoken import read_tiktoken  # noqa: E402
from npllama.text.readers.tokenizer_json import read_tokenizer_json  # noqa: E402
from npllama.text.sentencepiece import SentencePieceTokenizer  # noqa: E402
from npllama.text.vocabulary import Vocabulary  # noqa: E402
from npllama.version import NEEDS  # noqa: E402

MAX_S = 2.0
MEDIAN_S = 0.05
MEMORY_BYTES = 512 << 20

# What is read ---------------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Path) -> None:
    """Open a checkpoint and read every number of it."""
    with open_checkpoint(folder) as checkpoint:
        for tensor in checkpoint.tensors.values():
            for start in range(0, tensor.shape[0], 64):
                tensor.rows(start, min(start + 64, tensor.shape[0]))


def read_model(folder: Path) -> None:
    """Open a model directory, its weights and its tokenizer."""
    with open_model(folder) as model:
        float(model.weights.norm.sum())
        open_tokenizer(model.path, model.manifest, model.config)


def read_tokenizer(folder: Path) -> None:
    """Load a tokenizer, encode and decode."""
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    tokenizer.decode(tokenizer.encode("Once upon a time, é漢\n"))


def read_session(folder: Path) -> None:
    """Go on with a saved session, which has all of it read."""
    model = npllama.load(folder / "m", backend="numpy", threads=1)
    with model as llm, npllama.load_session(folder / "s", llm) as session:
        if session.tokens:
            session.generate(1, temperature=0)


def read_sealed_session(folder: Path) -> None:
    """The same with a manifest whose checksum over itself is right, whatever it says."""
    path = folder / "s" / "session.json"
    with suppress(UsageError):
        manifest = strict_json.parse_object(path.read_bytes(), max_digits=20)
        path.write_text(json.dumps({**manifest, "check": check_of(manifest)}))
    read_session(folder)


def use(vocabulary: Vocabulary) -> None:
    """Encode and decode with a vocabulary."""
    tokenizer = BpeTokenizer(vocabulary)
    tokenizer.decode(tokenizer.encode("Once upon a time, é漢\n </s><|eot_id|> 2024"))
    tokenizer.decode(range(tokenizer.n_pieces))


def read_vocabulary(folder: Path) -> None:
    """Load a vocabulary of a model directory whose manifest vouches for every file as it is."""
    use(vocabulary_of({name: (folder / name).read_bytes() for name in FILES}, folder))


def _vocabulary(file: dict[str, Any]) -> Callable[[Path], object]:
    files = files_of(read_tokenizer_json(written(file)))
    return lambda folder: [(folder / name).write_bytes(content) for name, content in files.items()]


def _model(folder: Path) -> None:
    """A model directory with a byte pair vocabulary."""
    vocabulary = read_tokenizer_json(written(byte_level()))
    stored = stored_vocabulary(vocabulary)
    write_model_directory(folder, replace(TINY, vocab_size=len(vocabulary.tokens)))
    for name, content in stored.files.items():
        (folder / name).write_bytes(content)
    manifest = json.loads((folder / "npllama.json").read_bytes())
    manifest |= {"tokenizer": stored.entry, "version": 3, NEEDS: "0.1.0"}
    (folder / "npllama.json").write_text(json.dumps(manifest, indent=1))


def _tokenizer_json(file: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: (folder / "tokenizer.json").write_bytes(written(file))


def _session(folder: Path) -> None:
    """A model, and a session of it that slides: two blocks are kept of three."""
    write_model_directory(folder / "m", replace(TINY, max_seq_len=32))
    with npllama.load(folder / "m", backend="numpy", threads=1) as llm:
        session = llm.session(seed=1, context_policy="slide")
        session.append([3 + i % 250 for i in range(150)])
        session.save(folder / "s")


@dataclass(frozen=True)
class Kind:
    """One kind of input: how to write a sound folder, which file of it is damaged, what reads it."""

    write: Callable[[Path], object]
    file: str
    read: Callable[[Path], None]
    text: bool = False


LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 3.0],
}
SCALED = dataclasses.replace(
    TINY, rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=16), sliding_window=9
)


def _sharded(folder: Path) -> object:
    return write_hugging_face(folder, files=2)


def _odd(folder: Path) -> object:
    """Two shards in which the same tensors stand twice, among them biases of zeros, behind a prefix."""
    weights = write_hugging_face(folder, files=2)
    tensors = {f"base_model.{name}": w for name, w in hugging_face_tensors(weights).items()}
    tensors["base_model.model.norm.bias"] = np.zeros(24)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        (folder / name).write_bytes(safetensors_bytes({tensor: (w, "f32") for tensor, w in tensors.items()}))
    places = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return weights


def _header(folder: Path) -> None:
    """A tied safetensors checkpoint as save_model leaves it, its header and its numbers in files of their own."""
    write_hugging_face(folder, tied=True)
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = {"lm_head.weight": "model.embed_tokens.weight", "notes": '\\"é{}' * 9}
    (folder / "header.json").write_text(json.dumps(header))
    (folder / "numbers").write_bytes(data[8 + size :])


def read_header(folder: Path) -> None:
    """Open a checkpoint made of a header and numbers."""
    header = (folder / "header.json").read_bytes()
    data = len(header).to_bytes(8, "little") + header + (folder / "numbers").read_bytes()
    (folder / "model.safetensors").write_bytes(data)
    read_checkpoint(folder)


def _wrapped(folder: Path) -> None:
    """A checkpoint of a trainer: dicts in dicts, wrappers in names, masks and biases of zeros."""
    weights = write_hugging_face(folder, suffix="bin")
    tree = {f"model.module.{name}": stored(w) for name, w in hugging_face_tensors(weights).items()}
    tree["model.model.layers.0.self_attn.bias"] = stored(np.ones((1, 1, 8, 8)))
    tree["model.model.norm.bias"] = stored(np.zeros(24))
    (folder / "pytorch_model.bin").write_bytes(torch_zip({"epoch": 1, "state_dict": {"model": tree}}))


KINDS = {
    "zip": Kind(write_meta, "consolidated.00.pth", read_checkpoint),
    "zip-llama2c": Kind(write_llama2c, "ckpt.pt", read_checkpoint),
    "zip-shard": Kind(lambda folder: write_meta(folder, "f16", 2), "consolidated.01.pth", read_checkpoint),
    "legacy": Kind(
        lambda folder: write_meta(folder, "bf16", save=torch_legacy), "consolidated.00.pth", read_checkpoint
    ),
    "safetensors": Kind(write_hugging_face, "model.safetensors", read_checkpoint),
    "safetensors-odd": Kind(_odd, "model-00002-of-00002.safetensors", read_checkpoint),
    "header": Kind(_header, "header.json", read_header, text=True),
    "zip-wrapped": Kind(_wrapped, "pytorch_model.bin", read_checkpoint),
    "params.json": Kind(write_meta, "params.json", read_checkpoint, text=True),
    "config.json": Kind(write_hugging_face, "config.json", read_checkpoint, text=True),
    "config.json-rope": Kind(
        lambda folder: write_hugging_face(folder, rope_scaling=LONGROPE), "config.json", read_checkpoint, text=True
    ),
    "index.json": Kind(_sharded, "model.safetensors.index.json", read_checkpoint, text=True),
    "gguf": Kind(write_gguf, "model.gguf", read_checkpoint),
    "gguf-tensors": Kind(write_quantized, "model.gguf", read_checkpoint),
    "gguf-part": Kind(lambda folder: write_split(folder, 2), "model-00002-of-00002.gguf", read_checkpoint),
    "llama2c-bin": Kind(write_llama2c_bin, "model.bin", read_checkpoint),
    "llama2c-q8": Kind(lambda folder: write_llama2c_bin(folder, version=2), "model.bin", read_checkpoint),
    "tokenizer.bin": Kind(write_llama2c_bin, "tokenizer.bin", read_checkpoint),
    "npllama.json": Kind(
        lambda f: write_model_directory(f / "m", SCALED), "m/npllama.json", lambda f: read_model(f / "m"), True
    ),
    "npllama.json-2": Kind(lambda f: _model(f / "m"), "m/npllama.json", lambda f: read_model(f / "m"), text=True),
    "npy": Kind(lambda f: write_model_directory(f / "m"), "m/wq.npy", lambda f: read_model(f / "m")),
    "session.json": Kind(_session, "s/session.json", read_session, text=True),
    "session.json-2": Kind(_session, "s/session.json", read_sealed_session, text=True),
    "session-tokens": Kind(_session, "s/tokens.npy", read_session),
    "session-keys": Kind(_session, "s/k.npy", read_session),
    "tokenizer.json": Kind(
        _tokenizer_json(byte_level()),
        "tokenizer.json",
        lambda f: use(read_tokenizer_json((f / "tokenizer.json").read_bytes())),
        text=True,
    ),
    "tokenizer.json-2": Kind(
        _tokenizer_json(characters()),
        "tokenizer.json",
        lambda f: use(read_tokenizer_json((f / "tokenizer.json").read_bytes())),
        text=True,
    ),
    "tiktoken": Kind(
        lambda f: (f / "tokenizer.model").write_bytes(tiktoken_file()),
        "tokenizer.model",
        lambda f: use(read_tiktoken((f / "tokenizer.model").read_bytes())),
    ),
    "rules.json": Kind(_vocabulary(byte_level()), "tokenizer.rules.json", read_vocabulary, text=True),
    "rules.json-2": Kind(_vocabulary(characters()), "tokenizer.rules.json", read_vocabulary, text=True),
    "merges.npy": Kind(_vocabulary(byte_level()), "tokenizer.merges.npy", read_vocabulary),
    "bytes.npy": Kind(_vocabulary(characters()), "tokenizer.bytes.npy", read_vocabulary),
    "tokenizer.model": Kind(lambda f: write_tokenizer(f / "tokenizer.model", 300), "tokenizer.model", read_tokenizer),
}

# Running --------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What reading the damaged files of one kind did."""

    loaded: int = 0
    refused: int = 0
    times_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(kinds: Sequence[str], count: int, seed: int, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Damage and read `count` files of each kind in another process, restarted after a crash; yields what happened."""
    left = list(kinds)
    while left:
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, left, count, seed, folder / str(len(left)))
        process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
        process.start()
        theirs.close()
        case: object = "the start"
        try:
            while left:
                case = ours.recv()
                if isinstance(case, Outcome):
                    yield left.pop(0), case
        except EOFError:
            process.join()
            yield left[0], Outcome(failures=[f"case {case} ended the process (exit code {process.exitcode})"])
            del left[0]
        process.join()
        ours.close()


def _child(pipe: Connection, kinds: Sequence[str], count: int, seed: int, folder: Path) -> None:
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        KINDS[kind].write(folder / kind)
        KINDS[kind].read(folder / kind)  # what is sound must load, and everything is imported before memory is limited
    _limit_memory()
    for kind in kinds:
        how, outcome = KINDS[kind], Outcome()
        data = (folder / kind / how.file).read_bytes()
        for case in range(count):
            pipe.send(case)
            (folder / kind / how.file).write_bytes(damage(data, random.Random(f"{seed} {kind} {case}"), how.text))
            _one(outcome, how, folder / kind, f"case {case}")
        pipe.send(outcome)


def _one(outcome: Outcome, how: Kind, folder: Path, name: str) -> None:
    start = time.perf_counter()
    try:
        how.read(folder)
        outcome.loaded += 1
    except NpllamaError as error:
        outcome.refused += 1
        if "\n" in str(error):
            outcome.failures.append(f"{name}: a message of several lines: {error}")
    except BaseException:  # noqa: BLE001 - whatever it is, it is what was looked for
        outcome.failures.append(f"{name}: {traceback.format_exc()}")
    outcome.times_s.append(time.perf_counter() - start)
    if outcome.times_s[-1] > MAX_S:
        outcome.failures.append(f"{name}: took {outcome.times_s[-1]:.1f} s")


def _limit_memory() -> None:
    """No allocation beyond what is in use now and 512 MB; only Linux tells how much that is."""
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage input files and watch what reading them does.")
    parser.add_argument("--count", type=int, default=4000, help="damaged files of each kind (4000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=sorted(KINDS), help="only this kind; may be repeated")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for kind, outcome in run(options.kind or list(KINDS), options.count, options.seed, Path(folder)):
            times = outcome.times_s or [0.0]
            median = statistics.median(times)
            failed |= bool(outcome.failures) or median > MEDIAN_S
            print(
                f"{kind:16} {outcome.loaded:6} loaded {outcome.refused:6} refused {len(outcome.failures):4} failures   "
                f"median {1e3 * median:6.2f} ms, longest {1e3 * max(times):8.2f} ms, in all {sum(times):6.1f} s",
                flush=True,
            )
            for failure in outcome.failures[:5]:
                print(failure)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
