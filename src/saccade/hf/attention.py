"""One call of a model's attention, run by the mechanism of its layer.

Legend: b batch, h query heads, g key-value heads, L queries, S keys, d head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.hf.seen import Group, Seen
from saccade.mechanism import Mechanism, Pairwise
from saccade.parts.logits import Softcap
from saccade.parts.mask import Window
from saccade.parts.slots import SinkLogit
from saccade.plan import Attended, Weights, attend

NAME = "saccade"
SLOT = "saccade_layer"


@dataclass(frozen=True)
class Layer:
    """What stands in a layer, and the number of the layer."""

    mechanism: Mechanism
    number: int


@torch.compiler.disable
def run(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that `transformers` calls: q (b, h, L, d), k and v (b, g, S, d) to (b, L, h, d) and the weights.

    Weights are computed only where `output_attentions` asks for them. Raises NotSupported for what a mechanism cannot honour:
    dropout on weights, a learned position bias.
    """
    layer: Layer | None = getattr(module, SLOT, None)
    if layer is None:
        raise NotSupported(
            f"{type(module).__name__} runs under the attention '{NAME}' but has no mechanism: call "
            "saccade.hf.attach(model, ...) on the model that holds it"
        )
    if dropout:
        raise NotSupported(
            f"the model drops {dropout} of its attention weights in training, and a mechanism has no such part; set the "
            "attention dropout of its config to 0"
        )
    if position_bias is not None:
        raise NotSupported(
            f"{type(module).__name__} adds a learned bias for every pair, which no mechanism takes; leave its layers out"
        )
    m, params = _with_rules(layer, softcap, s_aux)
    query = scaled(query, scaling)
    need = ("out", Weights()) if output_attentions else ("out",)
    if isinstance(attention_mask, Seen):
        made = _as_seen(m, params, query, key, value, attention_mask, sliding_window, need)
    elif attention_mask is None:
        made = attend(query, key, value, m, params=params, need=need)
    else:
        made = _under_mask(m, params, query, key, value, _boolean(attention_mask), need)
    if isinstance(made, Tensor):
        return made.transpose(1, 2).contiguous(), None
    return made.out.transpose(1, 2).contiguous(), made.weights


def scaled(q: Tensor, scaling: float | None) -> Tensor:
    """Queries for logits q.k / sqrt(d) that equal q.k times the model's scale."""
    usual = 1 / math.sqrt(q.shape[-1])
    return q if scaling is None or math.isclose(scaling, usual, rel_tol=1e-6) else q * (scaling / usual)


def _with_rules(
    layer: Layer, softcap: float | None, s_aux: Tensor | None
) -> tuple[Mechanism, dict[str, Tensor]]:
    """The layer's mechanism with the model's own softcap and sinks."""
    m = layer.mechanism
    if softcap is None and s_aux is None:
        return m, {}
    if not isinstance(m, Pairwise):
        raise NotSupported(
            f"the model caps its logits or has sinks of its own, and {m} has no logits; leave layer {layer.number} out"
        )
    if softcap is not None:
        m = replace(m, logits=(Softcap(softcap), *m.logits))
    if s_aux is None:
        return m, {}
    if m.slots is not None:
        raise NotSupported(f"the model has sinks of its own, so {m} cannot bring {m.slots}; leave it out")
    return replace(m, slots=SinkLogit()), {"sink_logit": s_aux.float()}


def _boolean(mask: Tensor) -> Tensor:
    """A mask of the caller's own: True, or zero, where a pair may attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _as_seen(
    m: Mechanism,
    params: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    sliding: int | None,
    need: tuple[str | Weights, ...],
) -> Any:
    """The call under the model's rule: by position where the rule is one, else under its mask."""
    length, first = q.shape[2], int(seen.first)
    end = int(seen.offset) + length - first
    plain = seen.simple or (seen.local is None and length == 1)
    if plain and seen.local is not None and seen.local < end:
        plain = sliding == seen.local
        if plain and isinstance(m, Pairwise):
            m = replace(m, pairs=m.pairs & Window(seen.local))
        else:
            plain = False
    if first and not _relative(m):
        raise NotSupported(
            f"{m} asks where a key stands, and this layer's cache holds only the tokens from {first} on; give the model a cache "
            "that keeps all of them: past_key_values=DynamicCache()"
        )
    if not plain:
        return _under_mask(m, params, q, k, v, seen.mask, need)
    groups = seen.groups
    if groups is None:
        assert seen.padding is not None
        return attend(q, k, v, m, mask=seen.padding[:, None, None], params=params, need=need)
    if len(groups) == 1 and not groups[0].left and not groups[0].right:
        return attend(q, k, v, m, params=params, need=need)
    return _by_group(m, params, q, k, v, groups, need)


def _under_mask(
    m: Mechanism,
    params: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    need: tuple[str | Weights, ...],
) -> Any:
    """The call under a mask (b, 1 or h, L, S) of the model's making; keys after the last one that any query may read are no tokens."""
    end = int(mask.flatten(0, -2).any(0).nonzero().amax()) + 1
    if not (_relative(m) or bool(mask[..., -1, 0].all())):
        raise NotSupported(
            f"{m} asks where a key stands, and a mask of the model hides the first keys, so that positions are unknown; give "
            "each text a row of its own, or a cache that grows"
        )
    made = attend(q, k[:, :, :end], v[:, :, :end], m, mask=mask[..., :end], params=params, need=need)
    if isinstance(made, Tensor) or made.weights is None:
        return made
    return made._replace(weights=torch.nn.functional.pad(made.weights, (0, k.shape[2] - end)))


def _relative(m: Mechanism) -> bool:
    """True where only distances between positions count."""
    return isinstance(m, Pairwise) and m.pairs.shift_invariant


def _by_group(
    m: Mechanism,
    params: dict[str, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[Group, ...],
    need: tuple[str | Weights, ...],
) -> Any:
    """Samples of one padding at a time, without it, so that positions count from the first token; padded rows give zeros."""
    length, keys = q.shape[2], k.shape[2]
    shared = length == keys
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    weights = q.new_zeros(*q.shape[:3], keys) if len(need) > 1 else None
    for group in groups:
        lo, hi = group.left, keys - (group.right if shared else 0)
        start = max(0, lo - (keys - length))
        stop = length - (group.right if shared else 0)
        if lo >= hi or start >= stop:
            continue
        if group.right and not shared:
            raise NotSupported(
                f"samples {group.rows} end in {group.right} padded keys while new tokens are read; pad on the left to generate"
            )
        rows = list(group.rows)
        made = attend(
            q[rows, :, start:stop], k[rows, :, lo:hi], v[rows, :, lo:hi], m, params=params, need=need
        )
        part = made if isinstance(made, Tensor) else made.out
        index = torch.tensor(rows, device=q.device)
        out = out.index_copy(0, index, torch.nn.functional.pad(part, (0, 0, start, length - stop)))
        if weights is not None:
            assert not isinstance(made, Tensor)
            assert made.weights is not None
            whole = torch.nn.functional.pad(made.weights, (lo, keys - hi, start, length - stop))
            weights = weights.index_copy(0, index, whole.to(weights.dtype))
    return out if weights is None else Attended(out, weights=weights)
