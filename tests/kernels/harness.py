"""What the kernel tests share: drawn inputs, the definition in float64, a naive twin, and how far apart is too far."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import saccade as sc
from saccade import reference
from saccade.mechanism.values import Pairwise
from saccade.parts.algebra import static_exist
from saccade.parts.base import Sizes
from saccade.parts.logits import StaticBias
from saccade.parts.pair import map_tokens
from saccade.parts.selection import Selection

CLOSE = 1e-10


@dataclass(frozen=True)
class Call:
    """The tensors of one call of a mechanism."""

    text: str
    q: Tensor
    k: Tensor
    v: Tensor
    params: dict[str, Tensor] = field(default_factory=dict)
    streams: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None
    lengths: Tensor | None = None
    selection: Selection | None = None

    @property
    def learned(self) -> dict[str, Tensor]:
        """Everything that has a gradient."""
        return {"q": self.q, "k": self.k, "v": self.v, **self.params, **self.streams}

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor that has a gradient replaced."""
        return replace(
            self,
            q=change(self.q),
            k=change(self.k),
            v=change(self.v),
            params={n: change(x) for n, x in self.params.items()},
            streams={n: change(x) for n, x in self.streams.items()},
        )

    @property
    def row_valid(self) -> Tensor:
        """Which rows are no padding, (B, 1, L or S, 1)."""
        rows = self.k.shape[2] if self.learned_query else self.q.shape[2]
        if self.lengths is None or (rows != self.k.shape[2]):
            return torch.ones(self.q.shape[0], 1, rows, 1, dtype=torch.bool)
        return (torch.arange(rows) < self.lengths[:, None])[:, None, :, None]

    @property
    def key_valid(self) -> Tensor:
        """Which keys are no padding, (B, 1, S, 1)."""
        ends = torch.full((self.k.shape[0],), self.k.shape[2]) if self.lengths is None else self.lengths
        return (torch.arange(self.k.shape[2]) < ends[:, None])[:, None, :, None]

    @property
    def learned_query(self) -> bool:
        m = sc.mechanism(self.text)
        return isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query

    def poisoned(self) -> Call:
        """Padding filled with NaN, in keys, values and the queries that share it."""
        shared = self.q.shape[2] == self.k.shape[2]
        k, v = (x.masked_fill(~self.key_valid, math.nan) for x in (self.k, self.v))
        q = self.q.masked_fill(~self.row_valid, math.nan) if shared else self.q
        return replace(self, q=q, k=k, v=v)


def draw(
    text: str,
    *,
    batch: int = 2,
    heads: int = 4,
    kv: int | None = None,
    rows: int = 37,
    keys: int | None = None,
    dim: int = 8,
    value: int | None = None,
    lengths: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Call:
    """Random inputs for a mechanism; one row of queries where it learns its query."""
    g = torch.Generator().manual_seed(seed)
    m = sc.mechanism(text)
    kv = m.kv_heads(heads) if kv is None else kv
    keys, value = keys or rows, value or dim
    learned = isinstance(m, Pairwise) and m.heads is not None and m.heads.learned_query

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    sizes = Sizes(heads, kv, dim, value)
    own = {"query"}
    return Call(
        text,
        normal(batch, heads, 1 if learned else rows, dim),
        normal(batch, kv, keys, dim),
        normal(batch, kv, keys, value),
        {n: normal(*w.shape, scale=0.4) for n, w in m.weights(sizes).items() if n not in own},
        {
            n: (torch.rand(x.shape(batch, heads, rows), generator=g, dtype=torch.float64) * keys).to(dtype)
            for n, x in m.streams(sizes).items()
        },
        {n: b.to(dtype) for n, b in m.buffers(sizes, g).items()},
        None,
        None if lengths is None else torch.tensor(lengths),
    )


def truth(call: Call) -> tuple[Tensor, Tensor | None]:
    """`(out, lse or None)` by the definition."""
    c = reference.context(
        call.q,
        call.k,
        call.v,
        call.mask,
        call.lengths,
        call.params,
        call.streams,
        call.buffers,
    )
    return reference.evaluate(sc.mechanism(call.text), replace(c, selection=call.selection))


def answer(call: Call, kernel: str, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`(out, lse or None)` by one kernel, through the public call."""
    given: dict[str, Any] = {
        "mask": call.mask,
        "key_lengths": call.lengths,
        "params": call.params,
        "streams": call.streams,
        "buffers": call.buffers,
        "selection": call.selection,
        "kernel": kernel,
    }
    if not need_lse:
        return sc.attend(call.q, call.k, call.v, call.text, **given), None
    found = sc.attend(call.q, call.k, call.v, call.text, need=("out", "lse"), **given)
    return found.out, found.lse


def gradients(
    call: Call, run: Callable[[Call], tuple[Tensor, Tensor | None]], with_lse: bool = True
) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the valid rows of out and lse, by name."""
    leaf = call.changed(lambda x: x.detach().clone().requires_grad_())
    out, lse = run(leaf)
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    loss = torch.where(call.row_valid, out * weight, 0.0).sum()
    if lse is not None and with_lse:
        weight = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(lse.dtype)
        there = call.row_valid.squeeze(-1) & ~torch.isneginf(lse.detach())
        loss = loss + torch.where(there, lse * weight, 0.0).sum()
    named = leaf.learned
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(named[n]) if x is None else x for n, x in zip(named, found, strict=True)}


def same(name: str, got: Tensor, want: Tensor, where: Tensor | None = None, tolerance: float = CLOSE) -> None:
    """Equal infinities, and the rest within `tolerance` of the largest number."""
    assert got.shape == want.shape, (
        f"{name}: shape {tuple(got.shape)}, the definition has {tuple(want.shape)}"
    )
    if where is not None:
        keep = where.expand_as(want)
        got, want = got[keep], want[keep]
    assert torch.equal(torch.isinf(got), torch.isinf(want)), f"{name}: infinities differ"
    finite = ~torch.isinf(want)
    got, want = got[finite].double(), want[finite].double()
    if not want.numel():
        return
    scale = max(1.0, float(want.abs().max()))
    error = float((got - want).abs().max())
    assert error <= tolerance * scale, f"{name} is off by {error:.2e} at a scale of {scale:.2e}"


def agree(call: Call, kernel: str, *, lse: bool = True, grad: bool = True) -> None:
    """A kernel answers what the definition answers: out, lse, and every gradient; padding holds NaN.

    Padded queries hold NaN in the forward pass alone: a query's NaN belongs to the gradient of every key it read.
    """
    dirty = call.poisoned() if call.lengths is not None else call
    want, want_lse = truth(call)
    got, got_lse = answer(dirty, kernel, lse)
    same("out", got, want, call.row_valid)
    if lse:
        assert got_lse is not None
        assert want_lse is not None
        same("lse", got_lse, want_lse, call.row_valid.squeeze(-1))
    if not grad:
        return
    expected = gradients(call, truth, with_lse=lse)
    found = gradients(replace(dirty, q=call.q), lambda c: answer(c, kernel, lse), with_lse=lse)
    for name, x in expected.items():
        where = {"q": call.row_valid if not call.learned_query else None}.get(name)
        where = call.key_valid if name in ("k", "v") else where
        if name in call.streams:
            where = call.row_valid if x.dim() == 4 else call.row_valid.squeeze(-1)
        same(f"gradient of {name}", found[name], x, where)


def random_mask(call: Call, seed: int = 3, share: float = 0.6) -> Tensor:
    """A mask of single pairs with some rows that may read nothing."""
    g = torch.Generator().manual_seed(seed)
    shape = (*call.q.shape[:3], call.k.shape[2])
    mask = torch.rand(shape, generator=g) < share
    mask[:, :, 0] = False
    mask[:, 0, -1] = False
    return mask


def empty_rows(call: Call, kernel: str) -> None:
    """Rows without a key give zeros, lse -inf and finite gradients."""
    out, lse = answer(call, kernel, True)
    assert lse is not None
    assert not out[:, :, 0].any()
    assert torch.isneginf(lse[:, :, 0]).all()
    for name, x in gradients(call, lambda c: answer(c, kernel, True)).items():
        assert torch.isfinite(x).all(), f"gradient of {name} is not finite"


def naive(call: Call) -> tuple[Tensor, Tensor | None]:
    """Dot-product softmax in the call's own precision, whole: what a first version would do."""
    m = sc.mechanism(call.text)
    assert isinstance(m, Pairwise)
    c = reference.context(call.q, call.k, call.v)
    c = map_tokens(m.tokens, replace(c, q=call.q, k=call.k), call.k.shape[2])
    repeat = c.q.shape[1] // c.k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (c.k, call.v))
    s = (c.q @ k.transpose(-1, -2)) * c.q.shape[-1] ** -0.5
    i, j = c.i[:, None, :, None], c.j[:, None, None]
    for part in m.logits:
        assert isinstance(part, StaticBias)
        s = s + part.bias(i, j, s.shape[1]).to(s.dtype)
    exist = static_exist(m.pairs, i, j)
    return torch.softmax(s.masked_fill(~exist, -math.inf), dim=-1) @ v, None


def within_budget(
    call: Call,
    kernel: str,
    twin: Callable[[Call], tuple[Tensor, Tensor | None]] = naive,
    *,
    grad: bool = True,
) -> None:
    """In low precision, against float64: at most twice the error of the naive twin plus one rounding.

    Errors are root mean squares; the largest single error, which scatters more, may be four times the twin's.
    """
    eps = torch.finfo(call.q.dtype).eps
    wide = replace(call, buffers={n: b.double() for n, b in call.buffers.items()}).changed(Tensor.double)

    def run(c: Call) -> tuple[Tensor, Tensor | None]:
        return answer(c, kernel, False)

    checks = [("out", run(call)[0], twin(call)[0], truth(wide)[0])]
    if grad:
        found = [gradients(c, f, with_lse=False) for c, f in ((call, run), (call, twin), (wide, truth))]
        checks += [(f"gradient of {n}", *(x[n] for x in found)) for n in found[0]]
    for name, got, close, want in checks:
        error, budget = got.double() - want, close.double() - want
        for measure, factor in ((torch.linalg.vector_norm, 2), (lambda x: x.abs().max(), 4)):
            off, allowed = measure(error), factor * measure(budget) + eps * measure(want)
            assert off <= allowed, f"{name}: off by {off:.2e}, the twin and one rounding allow {allowed:.2e}"
