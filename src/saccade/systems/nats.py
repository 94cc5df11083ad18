"""Tokens that learn how long they stay readable, and a cache that drops the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import MechanismError
from saccade.mechanism import Pairwise, system
from saccade.parts.lifetime import Lifetime, LifetimeSoftmax
from saccade.parts.mask import Causal


@system("nats", ref="S111")
def nats(window: int = 64, mode: str = "run") -> Pairwise:
    """Causal attention to global tokens, to local ones up to the next global one, and to the `window` latest sliding ones.

    `run` takes the likeliest types, and its state holds living tokens alone. `hard` answers the same and has gradients for
    the types; `soft` weighs pairs by the odds that they live. Both ask training for the loss `kept`; see `gumbel`.
    (Deng et al., Neural Attention Search, 2025.)
    """
    forms = {
        "run": Pairwise(pairs=Causal() & Lifetime(window)),
        "hard": Pairwise(pairs=Causal(), normalizer=LifetimeSoftmax(window)),
        "soft": Pairwise(pairs=Causal(), normalizer=LifetimeSoftmax(window, hard=False)),
    }
    if mode not in forms:
        raise MechanismError(f"nats: mode must be one of {', '.join(forms)}, got {mode!r}")
    return forms[mode]


@contextmanager
def gumbel(model: nn.Module, generator: torch.Generator, temperature: float = 1.0) -> Iterator[None]:
    """While open, types are drawn: every lifetime logit of the model gets Gumbel noise, and all are divided by temperature.

    (Jang et al., Categorical Reparameterization with Gumbel-Softmax, 2017.)
    """

    def noisy(net: nn.Module, given: Any, logits: Tensor) -> Tensor:
        uniform = torch.rand(logits.shape, generator=generator, device=generator.device).to(logits)
        return (logits - (-uniform.clamp(1e-9, 1 - 1e-6).log()).log()) / temperature

    nets = [net for name, net in model.named_modules() if f".{name}".endswith(".streams.lifetime")]
    if not nets:
        raise ValueError(
            "gumbel: no layer of this model has a stream `lifetime`; give it the mechanism nats(...)"
        )
    with ExitStack() as stack:
        for net in nets:
            stack.callback(net.register_forward_hook(noisy).remove)
        yield
