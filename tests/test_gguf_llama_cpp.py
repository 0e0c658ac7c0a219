"""Files that llama.cpp quantizes: with --dtype f32 they give transformers' logits on the numbers that gguf reads.

llama.cpp's own logits are no reference here: it rounds activations. This runs in the execution that NPLLAMA_BACKEND
names; all files have the same compiled code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import (
    BLOCKY,
    FTYPES,
    gguf_name,
    quantize_with_llama_cpp,
    write_for_ids,
)
from helpers import random_weights, write_tokenizer

import npllama
from npllama.checkpoints import open_checkpoint
from npllama.store.export import export

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers, which needs torch")
gguf = pytest.importorskip("gguf", reason="compares with the package gguf")
pytest.importorskip("llama_cpp", reason="quantizes with llama.cpp, which is compiled for minutes")

TOLERANCE = 2e-4  # float32 differs by the order of summation
CONFIG = dataclasses.replace(BLOCKY, hidden_dim=768, n_layers=3, max_seq_len=128)
"""Widths of whole blocks; three layers, because mixes give the first and the last others than those between."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of float32 that the package gguf has written, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    write_for_ids(folder / "F32.gguf", CONFIG, random_weights(CONFIG, 7).items())
    write_tokenizer(folder / "tokenizer.model", CONFIG.vocab_size)
    return folder / "F32.gguf"


def numbers_of(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as the package gguf dequantizes it, by the names of the file."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


def halves(w: np.ndarray) -> np.ndarray:
    """Rows of heads whose pairs are adjacent, as GGUF has them -> first halves, then second ones, as transformers."""
    return w.reshape(-1, CONFIG.head_dim // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def reference(numbers: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits of transformers' LLaMA on these tensors, (T, V)."""
    c = CONFIG
    config = transformers.LlamaConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.hidden_dim,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state: dict[str, Any] = {
        "model.embed_tokens.weight": numbers["token_embd.weight"],
        "model.norm.weight": numbers["output_norm.weight"],
        "lm_head.weight": numbers["output.weight"],
    }
    for l in range(c.n_layers):
        for name, theirs in THEIRS.items():
            w = numbers[f"blk.{l}.{name}.weight"]
            state[f"model.layers.{l}.{theirs}.weight"] = halves(w) if name in ("attn_q", "attn_k") else w
    model.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in state.items()})
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return logits


THEIRS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.mark.parametrize("name", ["F32", *FTYPES])
def test_the_logits_are_those_of_transformers_on_the_numbers_of_the_package_gguf(
    name: str, source: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.gguf"
    if name == "F32":
        path.write_bytes(source.read_bytes())
    else:
        quantize_with_llama_cpp(source, path, name)
    numbers = numbers_of(path)
    with open_checkpoint(path) as opened:
        for tensor, found in opened.tensors.items():
            needed = numbers[gguf_name(tensor)]
            np.testing.assert_array_equal(found.rows(0, len(needed)), needed, err_msg=tensor)
    export(path, tmp_path / "model", "f32", source.parent / "tokenizer.model")
    ids = np.random.default_rng(1).integers(3, CONFIG.vocab_size, 60).tolist()
    with npllama.load(tmp_path / "model") as llm:
        found = llm.logits(ids)
        cache = llm.new_cache()
        one_by_one = [llm.engine.forward(cache, [token], [i], [0], [0]) for i, token in enumerate(ids)]
    needed = reference(numbers, ids)
    assert needed.std() > 0.5
    np.testing.assert_allclose(found, needed, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(np.concatenate(one_by_one), needed, atol=TOLERANCE, rtol=0)
    print(f"{name}: {np.abs(found - needed).max():.1e}")
