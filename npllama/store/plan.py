"""Which number format each kind of weight of a model directory has: by the --dtype asked for, or by the checkpoint's.

A kind is stored as one stack of layers, so its layers share a format. Norms are float32 in every model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from npllama.checkpoints import Checkpoint, Tensor
from npllama.config import ModelConfig
from npllama.numbers import FORMATS, NumberFormat
from npllama.weights import KINDS, kind_shapes, tensor_names

Formats = Mapping[str, NumberFormat]
"""The number format of every kind of weight that a model directory stores."""

OWN = {
    "f64": "f32",
    "Q2_K": "q6",
    "Q3_K": "q5_0",
    "Q4_K": "q4_1",
    "Q5_K": "q5_1",
    "Q6_K": "q6",
    "IQ4_XS": "iq4_nl",
}
"""What a matrix of this format in a file is stored in; others as what they are. The README says what that loses."""


def asked_formats(number_format: NumberFormat, tied: bool) -> Formats:
    """A model of one number format. The output, where an error reaches every token, may have a wider one.

    So has the embedding where it is the output as well (tied).
    """
    output = "tok_embeddings" if tied else "output"
    wider = {output: FORMATS[number_format.output]} if number_format.output else {}
    return {kind: FORMATS["f32"] if KINDS[kind].is_norm else wider.get(kind, number_format) for kind in _kinds(tied)}


def own_formats(source: Checkpoint, note: Callable[[str], None] = lambda remark: None) -> Formats:
    """A model that keeps the numbers of a checkpoint: each kind in the format that its matrices have there.

    Where layers differ, a format that holds all of them, or else the widest one of theirs, which `note` is told.
    """
    found = {}
    for kind in _kinds(source.tied):
        layers = [source.tensors[name] for name in tensor_names(kind, source.config.n_layers)]
        found[kind] = FORMATS["f32"] if KINDS[kind].is_norm else _own_format(kind, layers, note)
    return found


def _kinds(tied: bool) -> Iterable[str]:
    return [kind for kind in KINDS if not (tied and kind == "output")]


def _own_format(kind: str, layers: Sequence[Tensor], note: Callable[[str], None]) -> NumberFormat:
    stored = {layer.stored_as: layer for layer in layers}
    formats = {name: FORMATS[OWN.get(name, name.lower())] for name in stored}
    if len(formats) > 1 and not any(own.quantized for own in formats.values()):
        return FORMATS["f32"]
    by_size = sorted(formats.values(), key=lambda own: own.bits_per_weight())
    for found in by_size:
        if all(formats[name] is found or _is_held(layer, found) for name, layer in stored.items()):
            return found
    note(f"{kind}: its layers are {' and '.join(stored)}; all are stored in {by_size[-1].name}")
    return by_size[-1]


def _is_held(tensor: Tensor, number_format: NumberFormat) -> bool:
    return tensor.level_set is not None and number_format.holds(tensor.level_set)


def planned_bytes(config: ModelConfig, formats: Formats) -> int:
    """Bytes of the numbers of all arrays of a model directory."""
    shapes = kind_shapes(config)
    return sum(spec.size_bytes for kind, own in formats.items() for spec in own.arrays(shapes[kind]).values())


def title(formats: Formats) -> str:
    """The number formats of a model's matrices in words."""
    return " and ".join(dict.fromkeys(own.name for kind, own in formats.items() if not KINDS[kind].is_norm))
