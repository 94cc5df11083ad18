"""Choose a kernel and explain the choice, as a database explains a query."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade import reference
from saccade.cost import Cost, Request, Shape, seconds
from saccade.errors import NotSupported
from saccade.kernels.base import Kernel
from saccade.kernels.block import BlockKernel
from saccade.kernels.bucket import BucketKernel
from saccade.kernels.chunk import ChunkKernel
from saccade.kernels.codes import CodesKernel
from saccade.kernels.decode import DecodeKernel
from saccade.kernels.fetch import FetchKernel
from saccade.kernels.flex import FlexKernel
from saccade.kernels.gather import GatherKernel
from saccade.kernels.grid import GridKernel
from saccade.kernels.hash import HashKernel
from saccade.kernels.mean import MeanKernel
from saccade.kernels.mixer import MixerKernel
from saccade.kernels.native import NativeKernel
from saccade.kernels.native_linear import NativeLinearKernel
from saccade.kernels.recurrent import RecurrentKernel
from saccade.kernels.scan import ScanKernel
from saccade.kernels.sdpa import SdpaKernel, backend
from saccade.kernels.slab import SlabKernel
from saccade.kernels.sparse import SparseKernel
from saccade.kernels.state import StateKernel
from saccade.kernels.thin import ThinKernel
from saccade.mechanism import ByHead, Combine, Join, Mechanism, Mix, Mixer, Pairwise, Recurrent
from saccade.mechanism import mechanism as parse
from saccade.parts.algebra import Pairs
from saccade.parts.memory import ChannelRatio
from saccade.parts.normalizer import merge
from saccade.parts.pair import Context, take_heads

LARGEST_MATRIX = 1 << 24


class ReferenceKernel(Kernel):
    """The definition itself, whole: the last candidate, for small inputs."""

    name = "reference"

    def efficiency(self, r: Request) -> float:
        return 0.02

    def reasons(self, m: Mechanism, r: Request) -> list[str]:
        s = r.shape
        pairs = s.batch * s.heads * s.length * s.keys
        if r.lse and not _has_lse(m):
            return ["the mechanism has no log-denominator"]
        if r.masked and (
            isinstance(m, Mixer)
            or (isinstance(m, Recurrent) and isinstance(m.ratio, ChannelRatio))
            or (isinstance(m, Recurrent) and m.write is not None and m.write.overwrites)
        ):
            return ["the mechanism has no single pairs to mask; use key_lengths for padding"]
        return (
            [f"would hold {pairs:,} pairs; it takes at most {LARGEST_MATRIX:,}"]
            if pairs > LARGEST_MATRIX
            else []
        )

    def cost(self, m: Mechanism, r: Request) -> Cost:
        s = r.shape
        area = s.batch * s.heads * s.length * s.keys
        flops = 2 * area * (s.head_dim + s.value_dim) * (3 if r.grad else 1)
        return Cost(flops, 8 * area * r.wide, sum(r.tensor_bytes()) + 6 * area * r.wide, 60)

    def run(self, m: Mechanism, c: Context, r: Request) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(r.dtype, torch.float32)
        bare = (
            replace(m, tokens=()) if isinstance(m, Pairwise | Recurrent) else m
        )  # the context is mapped already
        out, lse = reference.evaluate(bare, replace(c, q=c.q.to(wide), k=c.k.to(wide), v=c.v.to(wide)))
        return out.to(r.dtype), lse


def _has_lse(m: Mechanism) -> bool:
    if isinstance(m, Recurrent):
        return m.ratio is not None and m.ratio.has_lse
    return isinstance(m, Pairwise) and m.has_lse and not any(p.reach == "bucket" for p in m.parts())


KERNELS: tuple[Kernel, ...] = (
    SdpaKernel(),
    NativeKernel(),
    ThinKernel(),
    DecodeKernel(),
    ChunkKernel(),
    BlockKernel(),
    GatherKernel(),
    FetchKernel(),
    BucketKernel(),
    HashKernel(),
    GridKernel(),
    ScanKernel(),
    NativeLinearKernel(),
    StateKernel(),
    RecurrentKernel(),
    MixerKernel(),
    MeanKernel(),
    CodesKernel(),
    SparseKernel(),
    FlexKernel(),
    SlabKernel(),
    ReferenceKernel(),
)


@dataclass(frozen=True)
class Candidate:
    """A kernel, and either its cost or why it cannot run."""

    kernel: Kernel
    reasons: tuple[str, ...]
    cost: Cost | None
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The chosen kernel for one mechanism and request, and every other with its reasons. Print it.

    A combination has no kernel of its own; `members` holds a plan for each mechanism in it. Where the pairs differ
    between heads, `heads` says which heads each member computes. Kernels run the `core`: slots and output maps, which
    any kernel's result takes, are added after it.
    """

    mechanism: Mechanism
    request: Request
    candidates: tuple[Candidate, ...] = ()
    members: tuple[Plan, ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()
    core: Mechanism | None = None

    @property
    def chosen(self) -> Candidate:
        """The candidate that runs."""
        return self.candidates[0]

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs, with its backend."""
        if self.members:
            word = "per head" if self.heads else self.mechanism.word  # type: ignore[attr-defined]
            return f"{word}({', '.join(p.kernel for p in self.members)})"
        name = self.chosen.kernel.name
        return f"{name} ({backend(self.request)})" if name == "sdpa" else name

    @property
    def cost(self) -> Cost:
        """FLOPs, bytes and peak memory."""
        if self.members:
            total = functools.reduce(lambda a, b: a + b, (p.cost for p in self.members))
            return replace(total, peak=total.peak + 2 * self.request.tensor_bytes()[3])
        assert self.chosen.cost is not None
        return self.chosen.cost

    @property
    def exact(self) -> bool:
        """True when the result is the mechanism's own definition up to rounding."""
        return all(p.exact for p in self.members) if self.members else self.chosen.kernel.exact

    @property
    def lse(self) -> bool:
        """True when the chosen kernel can answer the log-denominator."""
        if self.members:
            return all(p.lse for p in self.members) if self.heads else isinstance(self.mechanism, Join)
        if isinstance(self.mechanism, Pairwise | Recurrent) and self.mechanism.output:
            return False
        return not self.chosen.kernel.reasons(self.core or self.mechanism, replace(self.request, lse=True))

    @property
    def deterministic(self) -> bool:
        """True when the same input gives the same bits, on a CPU and in forward passes."""
        return (
            all(p.deterministic for p in self.members)
            if self.members
            else self.chosen.kernel.deterministic or self.request.device == "cpu"
        )

    def run(self, c: Context) -> tuple[Tensor, Tensor | None]:
        """`(out, lse or None)` of a context whose tokens are mapped (those of a combination's members are not)."""
        m = self.mechanism
        if self.heads:
            out, lse = self._run_heads(c)
        else:
            out, lse = self.chosen.kernel.run(self.core or m, c, _core_request(m, self.request))
        return finish(m, c, out, lse)

    def _run_heads(self, c: Context) -> tuple[Tensor, Tensor | None]:
        if c.selection is not None:
            raise NotSupported(
                f"{self.mechanism} differs between heads, so a selection cannot be replayed through it"
            )
        found = [
            p.run(take_heads(c, p.mechanism.weights, heads))
            for p, heads in zip(self.members, self.heads, strict=True)
        ]
        order = torch.tensor([h for heads in self.heads for h in heads], device=c.q.device).argsort()
        lses = [lse for _, lse in found if lse is not None]
        out = torch.cat([out for out, _ in found], 1).index_select(1, order)
        return out, torch.cat(lses, 1).index_select(1, order) if len(lses) == len(found) else None

    def __str__(self) -> str:
        m, r = self.mechanism, self.request
        cost = self.cost
        lines = [f"mechanism      {m}"]
        if str(m) != m.canonical():
            lines.append(f"  parts        {m.canonical()}")
        lines += [
            f"request        {r.shape}",
            f"               {r.device}, {str(r.dtype).removeprefix('torch.')}, {'with' if r.grad else 'no'} gradients",
            f"kernel         {self.kernel}",
            f"FLOPs          {count_text(cost.flops)}",
            f"bytes moved    {bytes_text(cost.bytes)}",
            f"peak memory    {bytes_text(cost.peak)} besides the inputs",
            f"result         {'exact' if self.exact else 'approximate'}, {'deterministic' if self.deterministic else 'not bit-reproducible on a GPU'}",
            f"gradients      {'yes' if self._gradients() else 'no'}",
            f"lse            {'yes' if self.lse else 'no'}",
            f"causal         {'yes' if m.causal else 'no'}{_causal_note(m)}",
        ]
        if self.members:
            for p in self.members:
                lines += ["", *("  " + line for line in str(p).splitlines())]
            return "\n".join(lines)
        usable = [x for x in self.candidates[1:] if not x.reasons]
        if usable:
            lines.append("slower")
            lines += [
                f"  {x.kernel.name:<12} {count_text(x.cost.flops)} FLOPs, peak {bytes_text(x.cost.peak)}"  # type: ignore[union-attr]
                for x in usable
            ]
        rejected = [x for x in self.candidates if x.reasons]
        if rejected:
            lines.append("rejected")
            lines += [f"  {x.kernel.name:<12} {'; '.join(x.reasons)}" for x in rejected]
        return "\n".join(lines)

    def _gradients(self) -> bool:
        return all(p._gradients() for p in self.members) if self.members else self.chosen.kernel.gradients


def _causal_note(m: Mechanism) -> str:
    kind = m.causality
    if isinstance(m, Mixer) and kind == "never":
        return f", and it has no causal form (relative: {m.relative})"
    if kind == "leak" and m.causal:
        return ", but the choice of pairs reads the future in training; decoding uses another form"
    if kind == "never":
        relatives = sorted({p.relative for p in m.parts() if p.causal == "never"})
        return f", and it has no causal form (relative: {', '.join(relatives)})"
    return ""


def count_text(n: float) -> str:
    """A count with a unit: 1.5 G."""
    for unit in ("", " k", " M", " G", " T"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g} P"


def bytes_text(n: float) -> str:
    """Bytes with a unit: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def finish(m: Mechanism, c: Context, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Add what any kernel's result takes: the slots of the row, then the output maps."""
    if isinstance(m, Pairwise) and m.slots is not None:
        assert lse is not None
        out, lse = merge([(out, lse), m.slots.partial(c, out)])
    for part in m.output if isinstance(m, Pairwise | Recurrent) else ():
        out = part.map(out, replace(c, looks_back=m.causal))
    return out, lse


def core(m: Mechanism) -> Mechanism:
    """What a kernel runs of a mechanism: everything but slots and output maps."""
    if isinstance(m, Pairwise) and (m.slots is not None or m.output):
        return replace(m, slots=None, output=())
    return replace(m, output=()) if isinstance(m, Recurrent) and m.output else m


def _core_request(m: Mechanism, r: Request) -> Request:
    return replace(r, lse=True) if isinstance(m, Pairwise) and m.slots is not None and not r.lse else r


def _mapping_flops(m: Mechanism, r: Request) -> int:
    """Matrix FLOPs of the token maps, which run before any kernel; with gradients, of inputs and weights too."""
    s = r.shape
    each = {
        "q": (s.heads * s.length, s.head_dim),
        "k": (s.kv_heads * s.keys, s.head_dim),
        "v": (s.kv_heads * s.keys, s.value_dim),
    }
    maps = m.tokens if isinstance(m, Pairwise | Recurrent) else ()
    flops = sum(each[on][0] * part.flops(each[on][1]) for part in maps for on in part.on)
    return s.batch * flops * (3 if r.grad else 1)


def _per_head(m: Pairwise, r: Request, kernel: str | None) -> Plan:
    """A plan for each set of heads that read the same pairs."""
    tied = [p for p in m.parts() if p.reach == "head"]
    if tied:
        raise NotSupported(
            f"{tied[0].name} mixes heads, and in {m} heads read different pairs; use masks that all heads share"
        )
    groups: dict[Pairs, list[int]] = {}
    for h in range(r.shape.heads):
        groups.setdefault(m.pairs.at(h, r.shape.heads), []).append(h)
    bare, asked, members = replace(m, slots=None, output=()), _core_request(m, r), []
    for pairs, heads in groups.items():
        owners = len({h * r.shape.kv_heads // r.shape.heads for h in heads})
        shape = replace(
            r.shape, heads=len(heads), kv_heads=owners if len(heads) % owners == 0 else len(heads)
        )
        members.append(make(replace(bare, pairs=pairs), replace(asked, shape=shape), kernel))
    return Plan(m, r, (), tuple(members), tuple(map(tuple, groups.values())))


@functools.lru_cache(maxsize=4096)
def make(m: Mechanism, r: Request, kernel: str | None = None) -> Plan:
    """The plan for a mechanism and a request; `kernel` demands one by name."""
    if isinstance(m, Combine):
        return Plan(m, r, (), tuple(make(child, member_request(m, r), kernel) for child in m.children))
    if kernel is not None and kernel not in {k.name for k in KERNELS}:
        raise ValueError(f"no kernel is called {kernel!r}; there are {', '.join(k.name for k in KERNELS)}")
    if isinstance(m, Pairwise) and m.summary is not None and (r.masked or r.decoding):
        what = "a mask of single pairs" if r.masked else "decoding step by step"
        raise NotSupported(
            f"{m}: {what} has no meaning once keys are summarised; use key_lengths for padding, or {m.summary.relative}"
        )
    if r.lse and isinstance(m, Pairwise | Recurrent) and m.output:
        raise NotSupported(
            f"{m}: {m.output[0]} changes the output after the mix, so (out, lse) would not merge; ask for the lse of "
            f"{core(m)}"
        )
    if isinstance(m, Pairwise) and m.pairs.by_head and not any(p.head_bound for p in m.parts()):
        return _per_head(m, r, kernel)
    found = []
    inner, asked, mapping = core(m), _core_request(m, r), _mapping_flops(m, r)
    for k in KERNELS:
        why = k.reasons(inner, asked)
        if kernel is not None and k.name != kernel:
            why = [*why, f"the call demands {kernel}"]
        cost = None if why else k.cost(inner, asked)
        if cost is not None and mapping:
            cost = replace(cost, flops=cost.flops + mapping)
        if cost is not None and inner is not m:
            cost = replace(cost, peak=cost.peak + 2 * r.tensor_bytes()[3])
        time = float("inf") if cost is None else seconds(cost, r.device, r.dtype, k.efficiency(r))
        found.append(Candidate(k, tuple(why), cost, time))
    found.sort(key=lambda x: (bool(x.reasons), x.kernel.name == "reference", x.seconds))
    plan = Plan(m, r, tuple(found), core=inner)
    if plan.chosen.reasons:
        listing = "\n".join(f"  {x.kernel.name}: {'; '.join(x.reasons)}" for x in found)
        raise NotSupported(f"nothing runs {m} for {r.shape} on {r.device}{_wanted(r)}:\n{listing}")
    if plan.chosen.kernel.name == "reference" and kernel is None:
        warnings.warn(
            f"{m} runs by its definition, slowly and with whole matrices: no kernel takes it here; see saccade.plan(...)",
            stacklevel=4,
        )
    return plan


def _wanted(r: Request) -> str:
    asked = [
        w
        for w, on in (("gradients", r.grad), ("lse", r.lse), ("a mask", r.masked), ("key_lengths", r.ragged))
        if on
    ]
    return f" with {', '.join(asked)}" if asked else ""


def member_request(m: Combine, r: Request) -> Request:
    """The request that a member of a combination sees."""
    if isinstance(m, ByHead):
        count = len(m.children)
        s = r.shape
        kv = s.kv_heads // count if s.kv_heads % count == 0 else s.kv_heads
        return replace(r, shape=replace(s, heads=m.share(s.heads), kv_heads=kv))
    return replace(r, lse=True) if isinstance(m, Join) else r


def combine(m: Combine, results: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The members' results as one."""
    if isinstance(m, ByHead):
        lses = [lse for _, lse in results if lse is not None]
        return torch.cat([out for out, _ in results], dim=1), torch.cat(lses, dim=1) if len(lses) == len(
            results
        ) else None
    if isinstance(m, Mix):
        wide = torch.promote_types(results[0][0].dtype, torch.float32)
        mixed = sum(share * out.to(wide) for share, (out, _) in zip(m.share(), results, strict=True))
        return torch.as_tensor(mixed).to(results[0][0].dtype), None
    return merge([(out, lse) for out, lse in results if lse is not None])


def plan(
    mechanism: str | Mechanism,
    shape: Shape | Sequence[int],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    lse: bool = False,
    masked: bool = False,
    ragged: bool = False,
    decoding: bool = False,
    kernel: str | None = None,
) -> Plan:
    """How a call would be computed, and why.

    `shape` is saccade.Shape(...) or (batch, heads, length, head_dim). `print` the result: the kernel, FLOPs (two a
    multiply-add, matrix products), bytes moved, peak bytes besides the inputs, exactness, gradients, lse, determinism, the other
    candidates and the reasons of those that cannot run. Raises NotSupported, with every reason, when none can.

    >>> plan("alibi + window(256)", (1, 8, 8192, 64)).kernel
    'chunk'
    """
    m = parse(mechanism)
    s = Shape.of(shape)
    if not shape_given_kv(shape):
        s = replace(s, kv_heads=m.kv_heads(s.heads))
    r = Request(s, torch.device(device).type, dtype, grad, lse, masked, ragged, decoding)
    return _named(make(m, r, kernel), m)


def _named(p: Plan, m: Mechanism) -> Plan:
    """A plan that prints the caller's own words: equal mechanisms share plans, whatever name they were asked by."""
    if not isinstance(m, Combine):
        return replace(p, mechanism=m)
    members = tuple(_named(x, c) for x, c in zip(p.members, m.children, strict=True))
    return replace(p, mechanism=m, members=members)


def shape_given_kv(shape: Shape | Sequence[int]) -> bool:
    """True when the caller's shape says how many key-value heads there are."""
    return isinstance(shape, Shape) and shape.kv_heads != shape.heads
