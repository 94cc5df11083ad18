"""What a model lets its queries see in one forward pass: the mask as a description, made dense only where nothing else says it.

Legend: b batch, L queries, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Samples with the same padding: `left` keys are absent before their first token, `right` after their last one."""

    rows: tuple[int, ...]
    left: int
    right: int


@dataclass(eq=False)
class Seen:
    """The keys that a call of the attention may read, by the model's own rules.

    The first query stands at position `offset`, the first key at `first`. `padding` (b, S) is True at tokens, None where all
    are. `local` is the size of the model's window or chunk. `simple` says that the rule is causality, or nothing, and that
    size; `dense` builds the rule as a mask (b, 1, L, S), padding included.
    """

    batch: int
    queries: int
    keys: int
    offset: int | Tensor
    first: int | Tensor
    padding: Tensor | None
    local: int | None
    simple: bool
    dense: Callable[[], Tensor]

    @cached_property
    def mask(self) -> Tensor:
        """The model's rule and padding, (b, 1, L, S), True where a pair may attend."""
        return self.dense()

    @cached_property
    def groups(self) -> tuple[Group, ...] | None:
        """Samples by padding, or None where tokens are absent between others."""
        if self.padding is None:
            return (Group(tuple(range(self.batch)), 0, 0),)
        found: dict[tuple[int, int], list[int]] = {}
        places = torch.arange(self.keys, device=self.padding.device)
        last = torch.where(self.padding, places, -1).amax(1)
        left = torch.where(self.padding, places, self.keys).amin(1)
        counts = self.padding.sum(1)
        for row, (a, z, n) in enumerate(zip(left.tolist(), last.tolist(), counts.tolist(), strict=True)):
            if n != max(0, z - a + 1):
                return None
            found.setdefault((a, self.keys - 1 - z) if n else (self.keys, 0), []).append(row)
        return tuple(Group(tuple(rows), *sides) for sides, rows in found.items())


@torch.compiler.disable
def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **more: Any,
) -> Seen | Tensor:
    """What `transformers` asks of a mask function, as a description.

    A cache of fixed size, whose last rows no token has filled yet, gets the mask itself, (b, 1, L, S): generation makes it
    before the model runs and hands it over as a tensor.

    The two permissions to skip the mask are given where the rule is plain; a rule that only the model knows (packed
    sequences, overlays) is built by `sdpa_mask` when an attention call needs it.
    """
    from transformers.masking_utils import sdpa_mask

    def dense() -> Tensor:
        rule = {} if mask_function is None else {"mask_function": mask_function}
        made = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            **rule,
            **more,
        )
        assert made is not None
        return made

    if isinstance(q_offset, Tensor) or kv_offset + kv_length > q_offset + q_length:
        return dense()
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        start = int(kv_offset)
        padding = attention_mask[:, start : start + kv_length].bool()
    return Seen(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        padding,
        local_size,
        allow_is_causal_skip or allow_is_bidirectional_skip,
        dense,
    )
