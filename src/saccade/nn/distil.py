"""Softmax layers of a trained model replaced by linear ones that learned to follow them; those that matter most stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saccade.errors import NotSupported
from saccade.mechanism import Combine, Mechanism, Pairwise, Recurrent, causal
from saccade.mechanism import mechanism as parse
from saccade.nn.attention import Attention
from saccade.nn.transformer import Transformer
from saccade.parts.heads import INPUT

Batches = Callable[[int], Tensor]
Judge = Callable[[Transformer], float]
HELD = 4  # batches that judge a model where nothing else does


@dataclass(frozen=True)
class Linearized:
    """What `linearize` made, and what it measured on the way.

    `kept` are the numbers of the blocks whose attention stayed, `importance` is by how much the judge's score falls when that
    block alone is replaced, `misses` the mean squared error of each new layer's output over the mean square of the old one's,
    before and after it was taught. `scores` are the judge's: of the old model, of the hybrid, of the hybrid after fine-tuning.
    """

    model: Transformer
    kept: tuple[int, ...]
    importance: tuple[float, ...]
    misses: tuple[tuple[float, float], ...]
    scores: tuple[float, float, float]


def adopted(mechanism: str | Mechanism, old: Mechanism) -> Mechanism:
    """The causal form of a mechanism under the heads and, first, the token maps of another.

    Raises NotSupported where either has none to give or to take.
    """
    m = causal(parse(mechanism))
    if isinstance(m, Combine):
        return replace(m, children=tuple(adopted(c, old) for c in m.children))
    if not isinstance(m, Pairwise | Recurrent) or not isinstance(old, Pairwise | Recurrent):
        odd = old if isinstance(m, Pairwise | Recurrent) else m
        raise NotSupported(f"{odd} has no heads and token maps to take over; a {odd.family} is not converted")
    if m.heads not in (None, old.heads):
        raise NotSupported(
            f"{m} has heads of its own, and {old} has {old.heads or 'plain ones'}; leave them out"
        )
    return replace(m, heads=old.heads, tokens=(*old.tokens, *m.tokens))


def substitute(
    layer: Attention, mechanism: str | Mechanism, generator: torch.Generator | None = None
) -> Attention:
    """A layer of another mechanism with the projections of a trained one, to be taught; what it adds starts fresh."""
    if layer.borrows or set(layer.source_names.values()) != {INPUT}:
        raise NotSupported(
            f"a layer of {layer.mechanism} takes q, k or v from elsewhere than its input; convert one that projects all three"
        )
    s = layer.sizes
    made = Attention(
        layer.out_proj.out_features,
        s.heads,
        adopted(mechanism, layer.mechanism),
        head_dim=s.head_dim,
        value_dim=s.value_dim,
        bias=layer.out_proj.bias is not None,
        generator=generator,
    ).to(layer.out_proj.weight)
    made.load_state_dict(
        {n: x for n, x in layer.state_dict().items() if n in made.state_dict()}, strict=False
    )
    return made


def align(
    model: Transformer,
    layers: Sequence[Attention],
    batches: Batches,
    steps: int = 200,
    rate: float = 3e-3,
    *,
    show: bool = False,
) -> tuple[tuple[float, float], ...]:
    """Teach each layer the output of the attention that it may replace, from what that block sees in the frozen model.

    Layers learn side by side, none hears of another; answers how far each is off, before and after, on the first batch. (The
    hidden-state alignment of Chen et al., Hybrid Linear Attention Done Right, 2026.)
    """

    def misses(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            x, lessons = model.embedding(tokens), []
            for block in model.blocks:
                seen = block.norm1(x)
                lessons.append((seen, block.attention(seen)))
                x = block(x)
        each = [
            (layer(seen) - said).square().mean() / said.square().mean()
            for layer, (seen, said) in zip(layers, lessons, strict=True)
        ]
        return torch.stack(each)

    first = _tokens(batches, 0)
    with torch.no_grad():
        before = misses(first).tolist()
    owned = [p for layer in layers for p in layer.parameters()]
    descend(owned, lambda step: misses(_tokens(batches, step)).sum(), steps, rate, "align" if show else "")
    with torch.no_grad():
        after = misses(first).tolist()
    return tuple(zip(before, after, strict=True))


def hybrid(model: Transformer, layers: Sequence[Attention], keep: Iterable[int]) -> Transformer:
    """A copy of a model with every block's attention replaced by the layer of its number, but for those that it keeps."""
    made, kept = copy.deepcopy(model), set(keep)
    for n, (block, layer) in enumerate(zip(made.blocks, layers, strict=True)):
        if n not in kept:
            block.attention = copy.deepcopy(layer)
    return made


def importance(model: Transformer, layers: Sequence[Attention], judge: Judge) -> tuple[float, ...]:
    """By how much the judge's score of a model falls when one block's attention alone is replaced, block by block."""
    numbers, whole = range(len(layers)), judge(model)
    return tuple(whole - judge(hybrid(model, layers, [m for m in numbers if m != n])) for n in numbers)


def divergence(student: Transformer, teacher: Transformer, tokens: Tensor) -> Tensor:
    """KL of the student's next-token distributions from the teacher's, mean over tokens (B, L), in nats."""
    with torch.no_grad():
        wanted = teacher(tokens).log_softmax(-1)
    got = student(tokens).log_softmax(-1)
    return nn.functional.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean()


def imitate(
    student: Transformer,
    teacher: Transformer,
    batches: Batches,
    steps: int = 200,
    rate: float = 1e-3,
    *,
    show: bool = False,
) -> None:
    """Fine-tune a whole model towards the next-token distributions of another (Hinton et al., Distilling the Knowledge, 2015)."""
    descend(
        student.parameters(),
        lambda step: divergence(student, teacher, _tokens(batches, step)),
        steps,
        rate,
        "imitate" if show else "",
    )


def linearize(
    model: Transformer,
    batches: Batches,
    *,
    keep: int | Sequence[int] = 0,
    feature: str | Mechanism = "hedgehog",
    steps: int = 200,
    rate: float = 3e-3,
    judge: Judge | None = None,
    finetune: Callable[[Transformer, Transformer], object] | None = None,
    show: bool = False,
    generator: torch.Generator | None = None,
) -> Linearized:
    """A trained decoder turned into a linear or hybrid one: substitute, align, choose what stays, fine-tune.

    `batches(step)` answers tokens (B, L). `keep` names the blocks whose attention stays, or says how many do: those whose
    replacement costs most by `judge`, a score of a model where more is better; without one, minus the divergence from the old
    model on batches that it did not learn from. `feature` is the mechanism that comes in, under the token maps and heads of the old
    layer. `finetune(new, old)` trains the hybrid in place; without it `imitate` does. The model itself is not changed. (MiniCPM Team,
    MiniCPM-SALA, 2026; Chen et al., Hybrid Linear Attention Done Right, 2026; Zhang et al., LoLCATs, 2024.)
    """
    _check(model, keep, steps)
    layers = [substitute(block.attention, feature, generator) for block in model.blocks]
    misses = align(model, layers, batches, steps, rate, show=show)

    def closeness(other: Transformer) -> float:
        held = [divergence(other, model, _tokens(batches, 2 * steps + n)) for n in range(HELD)]
        return -float(torch.stack(held).mean())

    judged = judge or closeness
    with torch.no_grad():
        costs = importance(model, layers, judged)
        if isinstance(keep, int):
            order = sorted(range(len(layers)), key=lambda n: -costs[n])
            kept = tuple(sorted(order[:keep]))
        else:
            kept = tuple(sorted(keep))
        made = hybrid(model, layers, kept)
        scores = [judged(model), judged(made)]
    if finetune is not None:
        finetune(made, model)
    else:
        imitate(made, model, lambda step: batches(steps + step), steps, rate / 3, show=show)
    with torch.no_grad():
        return Linearized(made, kept, costs, misses, (scores[0], scores[1], judged(made)))


def descend(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float,
    title: str = "",
) -> None:
    """Adam on loss(step), its rate falling to a tenth; a titled descent shows its progress."""
    from rich.progress import track

    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.98))
    for step in track(range(steps), title, disable=not title, transient=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - 0.9 * step / steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def _tokens(batches: Batches, step: int) -> Tensor:
    tokens = batches(step)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        got = f"{tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"batches({step}) must answer tokens (batch, length), got {got}")
    return tokens


def _check(model: Transformer, keep: int | Sequence[int], steps: int) -> None:
    """Raise where a model cannot be converted, or not so."""
    if not isinstance(model, Transformer):
        raise NotSupported(f"linearize converts an sc.nn.Transformer, got {type(model).__name__}")
    if model.share > 1:
        raise NotSupported(
            f"the blocks of this model share keys and values, share={model.share}; convert one whose blocks make their own"
        )
    depth = len(model.blocks)
    numbers = range(keep) if isinstance(keep, int) else keep
    wrong = keep < 0 if isinstance(keep, int) else len(set(keep)) < len(keep)
    if wrong or any(n not in range(depth) for n in numbers):
        raise ValueError(
            f"keep is a number of blocks from 0 to {depth}, or different block numbers below {depth}, got {keep}"
        )
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
