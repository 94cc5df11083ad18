"""Whether a model's keys of small norm are those that it attends to."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from saccade.cache.premise import Premise, Probe
from saccade.hf.compress import compress


@torch.no_grad()
def premise(model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Premise:
    """Read texts (b, n) and say, for every layer and head, whether a small norm of a key foretells attention.

    print(saccade.hf.premise(model, tokens))
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"premise takes texts (b, n) of at least two tokens, got the shape {tuple(tokens.shape)}"
        )
    probe = Probe()
    with compress(model, probe) as held:
        word = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        model(tokens, attention_mask=attention_mask, **{word: held.new_cache()})
    return probe.report()
