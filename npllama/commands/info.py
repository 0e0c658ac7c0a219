"""Show a model or a checkpoint: config, number formats, sizes, tokenizer; without one, installation and machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from npllama.commands.terminal import Notes, ProgressLine, add_model, model_of, put
from npllama.errors import UsageError
from npllama.measure.checkpoint_facts import checkpoint_facts
from npllama.version import __version__

NAME = "info"
SUMMARY = "show a model, a checkpoint, or this machine"
PACKAGES = ("numpy", "numba", "llvmlite", "sentencepiece")
FEATURES = (
    "avx",
    "f16c",
    "fma",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "neon",
    "asimddp",
)
"""CPU features that decide how fast products of matrices can be, as Linux names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `npllama info`."""
    add_model(parser, "a model directory or a checkpoint; without one, the installation and the machine are shown")
    parser.add_argument("--check", action="store_true", help="also compare every file with its sha256")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace, notes: Notes) -> int:
    """Collect the facts and print them."""
    model = model_of(args)
    if model is None and args.check:
        raise UsageError("--check needs a model: npllama info MODEL --check.")
    if model is not None and _is_checkpoint(model):
        if args.check:
            raise UsageError(f"--check is for model directories, and {model} is a checkpoint, which has no sha256.")
        facts = checkpoint_facts(model)
    else:
        facts = machine_facts() if model is None else model_facts(model)
    if args.check:
        from npllama.store.opening import check_hashes

        with ProgressLine("checking") as progress:
            check_hashes(str(model), progress)
        facts["check"] = "every file is as it was exported"
    put((json.dumps(facts, ensure_ascii=False) if args.json else _table(facts)) + "\n")
    return 0


def _is_checkpoint(path: str) -> bool:
    from npllama.store.sources import is_checkpoint

    return is_checkpoint(Path(path))


def model_facts(path: str) -> dict[str, Any]:
    """What a model directory says about itself, without reading its weights."""
    from npllama import cache
    from npllama.store import tokenizers
    from npllama.store.opening import MANIFEST, check_model, size_bytes, suggested_sampling

    manifest, c = check_model(path)
    sampling = suggested_sampling(Path(path) / MANIFEST, manifest)
    tensors = manifest["tensors"]
    files = [record["file"] for tensor in tensors.values() for record in tensor["arrays"].values()]
    tokenizer_files = tokenizers.hashes(manifest["tokenizer"])
    return {
        "model": path,
        "config": c.to_json(),
        "number_formats": {kind: tensor["format"] for kind, tensor in tensors.items()},
        "matrices": " and ".join(matrix_formats(manifest)),
        "tied_output": "output" not in tensors,
        "parameters": sum(math.prod(tensor["shape"]) for tensor in tensors.values()),
        "size_bytes": size_bytes(manifest),
        "files": len(files) + 1 + len(tokenizer_files),
        "full_cache_bytes": cache.size_bytes(c.n_layers, c.n_kv_heads, c.max_seq_len, c.head_dim),
        "tokenizer": {
            "kind": tokenizers.KINDS[tokenizers.kind_of(manifest["tokenizer"])].title,
            "file": ", ".join(str(Path(path) / name) for name in tokenizer_files),
            "size_bytes": sum(os.path.getsize(Path(path) / name) for name in tokenizer_files),
            "pieces": manifest["tokenizer"]["size"],
            "add_bos_token": c.add_bos_token,
            "add_eos_token": c.add_eos_token,
        },
        "suggested_sampling": "none" if sampling is None else sampling.to_json(),
        "chat_format": manifest.get("chat_format", "none"),
        "format_version": manifest["version"],
    }


def matrix_formats(manifest: dict[str, Any]) -> list[str]:
    """The number formats of a model's matrices."""
    from npllama.weights import KINDS

    return sorted({tensor["format"] for kind, tensor in manifest["tensors"].items() if not KINDS[kind].is_norm})


def machine_facts() -> dict[str, Any]:
    """Versions, CPU, threads and why, threading layer, memory, and where compiled code is kept."""
    from npllama.execution.compiled import compiled_execution
    from npllama.inference import DEMO
    from npllama.system import machine

    n_threads, why = machine.default_threads()
    cpu, features = _cpu()
    folder, reason = machine.compiled_code_directory()
    facts: dict[str, Any] = {
        "npllama": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _version(package) for package in PACKAGES},
        "cpu": cpu,
        "cpu_features": " ".join(features),
        "threads": f"{n_threads} ({why})",
        "free_memory_bytes": machine.free_memory(),
        "cache_directory": reason if folder is None else str(folder),
        "compiled_files": 0 if folder is None else len(list(folder.glob("forward-*"))),
        "NPLLAMA_BACKEND": os.environ.get("NPLLAMA_BACKEND") or "not set",
        "demo_model": str(DEMO),
    }
    if importlib.util.find_spec("numba") is not None:
        facts.update(compiled_execution())
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name, and which of FEATURES it has; other systems than Linux say the name alone."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = (found.get("flags") or found.get("Features") or "").split()
    return found.get("model name") or platform.processor() or platform.machine(), [f for f in FEATURES if f in flags]


def _table(facts: dict[str, Any]) -> str:
    """Facts as lines of name and value; nested ones indented."""
    rows: list[tuple[str, Any]] = []
    for key, value in facts.items():
        if isinstance(value, dict):
            rows.append((key, ""))
            rows += [(f"  {inner}", what) for inner, what in value.items()]
        else:
            rows.append((key, value))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {_shown(key, value)}".rstrip() for key, value in rows)


def _words(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{_words(inner)} {_shown(inner, what)}" for inner, what in value.items())
    if value is None:
        return "not known"
    if isinstance(value, list):
        return (" " if all(isinstance(one, int) for one in value) else "; ").join(map(str, value))
    if key.endswith("_bytes"):
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    return f"{value:,}" if isinstance(value, int) else str(value)
