"""Write the files of tests/fixtures with torch itself, so that the readers are tested against what torch really writes.

    python tools/make_fixtures.py [FOLDER]

The numbers follow a formula that the tests know (tests/test_pytorch_reader.py), and every one is exact in every format.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "fixtures"


def tree() -> dict[str, object]:
    """Everything that a checkpoint of plain tensors may hold."""
    base = (torch.arange(24.0) / 4 - 3).reshape(4, 6)
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = base[:2, :3].clone()
    tagged = nn.Parameter(base[0].clone())
    tagged.note = "an attribute"  # type: ignore[attr-defined]
    marked = base[2].clone()
    marked.note = "an attribute"  # type: ignore[attr-defined]
    return {
        "f32": base,
        "f16": base.to(torch.float16),
        "bf16": base.to(torch.bfloat16),
        "f64": base.to(torch.float64),
        "nested": {
            "deeper": {"transposed": base.t(), "every_other": base[:, ::2], "tail": base[2:], "column": base[:, 4]}
        },
        "parameter": nn.Parameter(base[1].clone()),
        "tagged": tagged,
        "marked": marked,
        "expanded": torch.full((1,), 0.5).expand(7),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "state": OrderedDict(layer.state_dict()),
        "module_state": layer.state_dict(),
        "plain": [1, 2.5, None, True, False, -7, 300, 70000, 2**40, "text", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "shape": base.shape,
        "type": torch.float32,
        "device": torch.device("cpu"),
    }


def tied() -> dict[str, object]:
    """Two names for one storage."""
    weight = torch.arange(6.0).reshape(2, 3)
    return {"tok_embeddings.weight": weight, "output.weight": weight}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tree(), folder / "tree_zip.pt")
    torch.save(tree(), folder / "tree_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(tied(), folder / "tied_zip.pt")
    torch.save(nn.Linear(2, 2), folder / "module_zip.pt")
    torch.save(torch.zeros(2, dtype=torch.float8_e4m3fn), folder / "float8_zip.pt")
    torch.save(tied(), folder / "protocol4_zip.pt", pickle_protocol=4)
    torch.save(
        {"x": torch.zeros(2).conj(), "y": torch.zeros(2, dtype=torch.complex64).conj()}, folder / "conjugate_zip.pt"
    )
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2))])
    torch.save(optimizer.state_dict(), folder / "optimizer_zip.pt")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), folder / "torchscript.pt")


if __name__ == "__main__":
    main()
