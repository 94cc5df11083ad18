"""How a model of transformers turns its queries by their positions."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from saccade.cache import Rotation
from saccade.errors import NotSupported

FIXED = ("default", "linear", "llama3", "yarn", "proportional")


def rotation(model: Any, module: nn.Module) -> Rotation | None:
    """The rotation of one attention layer, None where it has none.

    A constant factor or a shift of all positions does not matter to who undoes a rotation and goes on from there. Raises
    NotSupported for frequencies that change with the text and for other pairs of channels than m and m + half.
    """
    if not getattr(module, "use_rope", True):
        return None
    found = [(m, x) for m in model.modules() for n, x in m.named_buffers(recurse=False) if n == "inv_freq"]
    others = [n for n, _ in model.named_buffers() if n.endswith("_inv_freq") and "original" not in n]
    if not found and not others:
        return None
    name = type(model).__name__
    kind = getattr(found[0][0], "rope_type", "default") if found else "of each layer"
    if others or any(not torch.equal(x, found[0][1]) for _, x in found) or kind not in FIXED:
        raise NotSupported(
            f"expected_attention undoes the rotation of queries, which {name} does not fix once and for all ({kind}); choose "
            "snapkv, tova or h2o"
        )
    half = getattr(sys.modules[type(module).__module__], "rotate_half", None)
    if half is None or half(torch.arange(4.0)).tolist() != [-2.0, -3.0, 0.0, 1.0]:
        raise NotSupported(
            f"expected_attention undoes rotations of channels m and m + half, and {name} pairs others; choose snapkv, tova or h2o"
        )
    frequencies: Tensor = found[0][1]
    return Rotation(frequencies)
