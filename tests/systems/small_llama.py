"""Small Llamas that cache policies are tried on: each is trained once in a process, on one thread."""

from __future__ import annotations

import functools
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

transformers = pytest.importorskip("transformers")

from saccade import hf  # noqa: E402
from saccade.tasks import text  # noqa: E402
from systems.helpers import train  # noqa: E402

READ, TOLD, PIECE = 96, 48, 12
CORPUS = text.load(window=READ + TOLD)


def llama(vocab: int, dim: int = 64, depth: int = 2, heads: int = 4, kv: int = 2, length: int = 256) -> Any:
    """A Llama of random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=length,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@functools.cache
def of_text(steps: int = 250) -> Any:
    """A model of bytes, trained on text that CPython ships."""
    model, generator = llama(text.VOCAB), torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        rows = CORPUS.batch(12, 128, generator)
        return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

    train(model.parameters(), loss, steps, rate=5e-3)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def text_loss(model: Any, policy: str | None, rows: Tensor) -> float:
    """Nats per byte of the last TOLD bytes of rows (b, READ + TOLD + 1), read in pieces after each of which the policy chooses."""

    word = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"

    def told(cache: Any) -> float:
        found = []
        for at in range(0, READ + TOLD, PIECE):
            logits = model(rows[:, at : at + PIECE], **{word: cache}).logits
            if at >= READ:
                targets = rows[:, at + 1 : at + PIECE + 1]
                found.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        return float(torch.stack(found).mean())

    if policy is None:
        return told(transformers.DynamicCache())
    with hf.compress(model, policy) as held:
        return told(held.new_cache())
