"""What a state keeps of parts that map values or read streams of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes, Stream
from saccade.parts.logits import Logits
from saccade.parts.mask import Causal
from saccade.parts.tokens import TokenMap


@dataclass(frozen=True)
class Numbered(TokenMap):
    """Values times their position."""

    on = ("v",)

    def map(self, x: Tensor, positions: Tensor, on: Any, c: Any) -> Tensor:
        return x * positions[:, None, :, None].to(x.dtype)


@dataclass(frozen=True)
class KeyBias(Logits):
    """A number that each key brings."""

    def streams(self, sizes: Sizes) -> dict[str, Stream]:
        return {"key_bias": Stream("k")}

    def tile(self, s: Tensor, t: Any) -> Tensor:
        return s + t.streams["key_bias"].unsqueeze(-2)


def test_mapped_values_stay_mapped_in_a_state() -> None:
    m = sc.Pairwise(pairs=Causal(), tokens=(Numbered(),))
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    whole = sc.attend(q, k, v, m)
    torch.testing.assert_close(whole, sc.attend(q, k, v * torch.arange(9)[:, None], "causal"))
    rows, state = [], None
    for piece in (slice(0, 4), *(slice(t, t + 1) for t in range(4, 9))):
        found = sc.attend(q[:, :, piece], k[:, :, piece], v[:, :, piece], m, state=state, need=("state",))
        state = found.state
        rows.append(found.out)
    torch.testing.assert_close(torch.cat(rows, 2), whole)


def test_streams_of_keys_run_whole_and_are_refused_with_a_state() -> None:
    m = sc.Pairwise(pairs=Causal(), logits=(KeyBias(),))
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    bias = torch.randn(1, 2, 9, dtype=torch.float64)
    s = q @ k.transpose(-1, -2) / 8**0.5 + bias[:, :, None]
    want = s.masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(sc.attend(q, k, v, m, streams={"key_bias": bias}), want)
    with pytest.raises(sc.NotSupported, match="does not keep streams of keys, such as key_bias"):
        sc.attend(q, k, v, m, streams={"key_bias": bias}, need=("state",))
