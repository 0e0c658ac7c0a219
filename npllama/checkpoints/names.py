"""What people's files call the tensors of a model beside their names: prefixes, wrappers, tables, adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

DERIVED = re.compile(
    r"(.*\.)?(inv_freq|original_inv_freq|rope\.freqs|freqs_(cos|sin|cis)|(cos|sin)_cached?|cos_sin_cache"
    r"|mask|(causal|attn|attention)_mask|masked_bias|position_ids|cache_[kv]|total_(ops|params)|_extra_state"
    r"|attn_rot_embd\.weight)"
)
"""Tables that follow from the config, masks, counters of profilers: not read."""

MASK = re.compile(r"(.*\.)?(self_attn|attn|attention)\.bias")
"""A causal mask where it has several axes, as GPT-2's code called it."""

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|base_layer|_orig_mod|_forward_module|_(?:fsdp|checkpoint)_wrapped_module|_fpw_module)\."
)
"""What DistributedDataParallel, PEFT, torch.compile, Lightning and FSDP put into names, in front or in the middle."""

ADAPTER = re.compile(r"(.*\.)?(lora_\w+|ia3_l|hada_w\d\w*|lokr_w\d\w*|oft_\w+|prompt_embeddings)(\..*)?")
"""Parts of an adapter of PEFT's, which changes the weights beside it."""

QUANTIZED = re.compile(r".*[._](qweight|qzeros|g_idx|SCB|absmax|quant_map|weight_packed|weight_scale(_inv)?)")
"""Parts of quantized weights: GPTQ and AWQ, bitsandbytes, compressed-tensors and FP8."""


def meta_names(names: Collection[str]) -> tuple[dict[str, str], str]:
    """Names as they stand in Meta's checkpoints -> the model's own, and the unusual prefix that was left out."""
    prefix = _prefix(names, "layers.0.attention_norm.weight", usual="")
    return {name: name.removeprefix(prefix) for name in names}, prefix


def hugging_face_names(names: Collection[str]) -> tuple[dict[str, str], str]:
    """As `meta_names`, for Hugging Face's: "model." before all but the head.

    A prefix of all ("base_model.model.") comes off, and so does another one than "model.", or none, before the body.
    """
    prefix = _prefix(names, "layers.0.input_layernorm.weight", usual="model.")
    if prefix == "model.":
        return {name: name for name in names}, ""
    outer = prefix.removesuffix("model.") if prefix.endswith(".model.") else prefix
    heads = {f"{outer}lm_head.", f"{prefix}lm_head.", f"{prefix[:-1].rpartition('.')[0]}.lm_head.".lstrip(".")}
    found = {}
    for name in names:
        head = next((head for head in heads if name.startswith(head)), None)
        if head:
            found[name] = "lm_head." + name.removeprefix(head)
        elif name.startswith(prefix):
            found[name] = "model." + name.removeprefix(prefix)
        else:
            found[name] = name
    return found, outer


def _prefix(names: Collection[str], always: str, usual: str) -> str:
    """What stands before the name of a tensor that every model has; the usual where that is there, or several are."""
    found = [name.removesuffix(always) for name in names if f".{name}".endswith(f".{always}")]
    return found[0] if len(found) == 1 and usual + always not in names else usual


def plain(name: str) -> str:
    """A name without what wrappers put into it."""
    return WRAPPERS.sub("", name)


def resembling(missing: str, names: Iterable[str]) -> str | None:
    """Of the names that are there, the one most like a missing one: of the same end, of the same module, or any."""
    end, module = ".".join(missing.split(".")[-3:]), missing.rpartition(".")[0] + "."
    best: dict[int, str] = {}
    for name in names:
        best.setdefault(0 if name.endswith(end) else 1 if name.startswith(module) else 2, name)
    return best[min(best)] if best else None
