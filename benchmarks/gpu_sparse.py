"""Block-sparse attention on one GPU beside its peers, in one process: bfloat16, 16 heads, head_dim 128.

    python benchmarks/gpu_sparse.py [--out FOLDER] [--only WORD] [--small]

Rates are of kept work: 4 head_dim FLOPs a pair forward, 14 with gradients. The bars are those of an NVIDIA H200; the card
that ran stands in the file. `--small` runs every kernel once on small inputs, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import plain_loop
import saccade as sc
from saccade.kernels import routed, sparse, sparse_run
from saccade.kernels.table import BlockTable, Place, table_of, table_of_blocks
from saccade.parts.proxy import MeanKey
from saccade.parts.selection import Blocks

HEADS, DIM, LENGTH, BLOCK = 16, 128, 32768, 128
FOLDER = Path(__file__).parent / "results"
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
MASKS = (
    "causal", "window(1024)", "window(200)", "causal + sink(4) + window(1024)", "neighborhood(513)",
    "neighborhood(65, dilation=4)", "dilated(128, step=4)", "strided(64)", "causal + chunk(1000)",
    "causal + document((3000, 500, 9000))", "prefix(3000)", "local_blocks(256, last=3)", "global(64) + window(512)",
    "causal + power_blocks(128)", "causal + stripes(64, every=16) + window(256)", "document((700, 2000))",
)  # fmt: skip
SOME = (1000, 2048, 3333, 4096, 6000, 8192, 12345, 16384)


def timed(call: Callable[[], object], count: int = 11) -> float:
    """Median milliseconds of a call by device events, after two that warm up."""
    call(), call()
    found = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def clock(call: Callable[[], object]) -> float:
    """Milliseconds of one call by the host's clock, until the device is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def inputs(length: int = LENGTH, grad: bool = False, heads: int = HEADS) -> list[Tensor]:
    """Random q, k and v."""
    g = torch.Generator("cuda").manual_seed(0)
    shape = (1, heads, length, DIM)
    return [torch.randn(shape, device="cuda", generator=g).bfloat16().requires_grad_(grad) for _ in range(3)]


def training(call: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of a call."""
    weight = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(call(*tensors), tensors, weight)


def random_blocks(length: int, share: float = 0.1) -> Blocks:
    """A different set of blocks for every head."""
    g = torch.Generator("cuda").manual_seed(1)
    n = length // BLOCK
    index = torch.rand(1, HEADS, n, n, device="cuda", generator=g).topk(max(1, round(share * n)), -1).indices
    return Blocks(index, torch.ones_like(index, dtype=torch.bool), BLOCK, BLOCK)


def here(length: int) -> Place:
    return Place(length, length, device=torch.device("cuda"))


def pairs_of(text: str) -> sc.parts.mask.Pairs:  # type: ignore[name-defined]
    return sc.mechanism(text).pairs  # type: ignore[union-attr]


def flex_mask(table: BlockTable, text: str | None, length: int):  # type: ignore[no-untyped-def]
    """The block mask of FlexAttention: from lists where a table has whole blocks only, else from the mask."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    from saccade.parts.algebra import static_exist

    if text is not None:
        rule = pairs_of(text)
        return create_block_mask(
            lambda b, h, i, j: static_exist(rule, i, j), None, None, length, length, device="cuda"
        )
    found = table.by_query
    none = torch.zeros_like(found.count)
    return BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(found.index),
        found.full,
        found.index,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(length, length),
    )


def rates(ms: float, area: int, grad: bool) -> dict[str, float]:
    return {"ms": ms, "tflops": (14 if grad else 4) * DIM * area / ms / 1e9}


def beside_peers(name: str, text: str | None, area: int) -> dict[str, object]:
    """One pattern at 32,768 tokens, forward and with gradients: ours, FlexAttention compiled, and a plain loop."""
    from torch.nn.attention.flex_attention import flex_attention

    chosen = random_blocks(LENGTH) if text is None else None

    def table(side: int = BLOCK) -> BlockTable:
        if chosen is not None:
            return table_of_blocks(chosen, here(LENGTH))
        return table_of(pairs_of(text), here(LENGTH), side, side)  # type: ignore[arg-type]

    wide, own = table(), table() if text is None else sparse._table(pairs_of(text), here(LENGTH))
    scale = DIM**-0.5
    q, k, v = inputs()
    leaves = inputs(grad=True)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_run.attend(q, k, v, own, scale)[0]

    found: dict[str, object] = {"name": name, "kept_pairs": area}
    found["saccade forward"] = rates(timed(lambda: ours(q, k, v)), area, False)
    found["saccade forward+backward"] = rates(timed(training(ours, leaves)), area, True)
    found["plain loop forward"] = rates(timed(lambda: plain_loop.attend(q, k, v, wide)), area, False)
    found["errors"] = errors(own, scale)
    torch._dynamo.reset()
    built: list[object] = []
    found["flex mask ms"] = clock(lambda: built.append(flex_mask(wide, text, LENGTH)))
    compiled = torch.compile(flex_attention)

    def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=built[0], scale=scale)

    found["flex first call ms"] = clock(lambda: flex(q, k, v))
    found["flex forward"] = rates(timed(lambda: flex(q, k, v)), area, False)
    found["flex forward+backward"] = rates(timed(training(flex, leaves)), area, True)
    return found


def errors(table: BlockTable, scale: float) -> dict[str, float]:
    """Relative errors of out, lse and gradients against float64 on sampled rows and keys of two heads."""
    q, k, v = inputs(grad=True)
    out, lse = sparse_run.attend(q, k, v, table, scale)
    weight = torch.randn(
        out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2)
    ).bfloat16()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), weight)
    delta = (out.double() * weight.double()).sum(-1)
    length = q.shape[2]
    picks = torch.tensor([0, 1, 127, 128, 1023, 5000, 20001, length - 1], device="cuda")
    every = torch.arange(length, device="cuda")
    worst = dict.fromkeys(("out", "lse", "dq", "dk", "dv"), 0.0)

    def exist(h: int, i: Tensor, j: Tensor) -> Tensor:
        state = table.state[0, min(h, table.state.shape[1] - 1)][i // table.rows, j // table.size]
        inside = (j >= table.lo[0][i]) & (j < table.hi[0][i])
        return (state == 2) | ((state == 1) & inside)

    for h in (0, 5):
        Q, K, V, G = (x[0, h].detach().double() for x in (q, k, v, weight))
        there = exist(h, picks[:, None], every[None])
        s = (Q[picks] @ K.T * scale).masked_fill(~there, -torch.inf)
        p = s.softmax(-1)
        ds = p * (G[picks] @ V.T - delta[0, h, picks, None])
        there = exist(h, every[:, None], picks[None])
        back = torch.exp(
            (Q @ K[picks].T * scale).masked_fill(~there, -torch.inf) - lse[0, h].double()[:, None]
        )
        dback = back * (G @ V[picks].T - delta[0, h][:, None])
        pairs = {
            "out": (out[0, h, picks], p @ V),
            "dq": (dq[0, h, picks], ds @ K * scale),
            "dk": (dk[0, h, picks], dback.T @ Q * scale),
            "dv": (dv[0, h, picks], back.T @ G),
        }
        for name, (a, b) in pairs.items():
            worst[name] = max(worst[name], float((a.double() - b).norm() / b.norm()))
        worst["lse"] = max(worst["lse"], float((lse[0, h, picks].double() - s.logsumexp(-1)).abs().max()))
    return worst


def tables() -> dict[str, object]:
    """Milliseconds until a table and its lists are ready: the first of its mask, and each new length."""
    found: dict[str, object] = {
        "first of all": clock(lambda: table_of(pairs_of("prefix(77)"), here(5000)).by_query)
    }
    for text in (
        "window(1024)",
        "causal",
        "causal + sink(4) + window(1024)",
        "causal + document((9000, 3000))",
    ):
        ms = [
            clock(lambda n=n, t=text: table_of(pairs_of(t), here(n)).by_query)
            for n in (32768, *LENGTHS, 30001)
        ]  # type: ignore[misc]
        found[text] = {
            "cold": ms[0],
            "new lengths": dict(zip(map(str, (*LENGTHS, 30001)), ms[1:], strict=True)),
        }
    chosen = [random_blocks(n) for n in LENGTHS]
    ms = [
        clock(lambda c=c, n=n: table_of_blocks(c, here(n)).by_query)
        for c, n in zip(chosen, LENGTHS, strict=True)
    ]  # type: ignore[misc]
    found["10% of blocks"] = dict(zip(map(str, LENGTHS), ms, strict=True))
    return found


def dense() -> dict[str, object]:
    """Dense causal attention through the planner beside each backend by itself."""
    q, k, v = inputs()
    area = HEADS * LENGTH * (LENGTH + 1) // 2

    def backend(one: SDPBackend) -> None:
        with sdpa_kernel([one]):
            scaled_dot_product_attention(q, k, v, is_causal=True)

    table = sparse._table(pairs_of("causal"), here(LENGTH))
    calls: dict[str, Callable[[], object]] = {
        "sparse kernel": lambda: sparse_run.forward(q, k, v, table, DIM**-0.5),
        "cudnn": lambda: backend(SDPBackend.CUDNN_ATTENTION),
        "planner": lambda: sc.attend(q, k, v, "causal"),
        "flash": lambda: backend(SDPBackend.FLASH_ATTENTION),
    }
    each: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(), call()
    order = list(calls)
    for n in range(16):
        for name in (order, order[::-1])[n % 2]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            torch.cuda.synchronize()
            each[name].append(start.elapsed_time(end))
    return {name: rates(statistics.median(ms), area, False) for name, ms in each.items()}


def moba(length: int) -> dict[str, float]:
    """MoBA(512, 8) end to end and its steps apart, beside cuDNN over all pairs and over the causal half."""
    q, k, v = inputs(length)
    text, size, top = "moba(block=512, top=8)", 512, 8
    blocks = length // size
    context = sc.parts.pair.Context(q, k, v)  # type: ignore[attr-defined]
    means = MeanKey().keys(context, size)
    own, ends = (torch.arange(length, device="cuda") // size)[None], torch.tensor([length], device="cuda")
    index = routed.choose(q, means, min(top, blocks), size, own, ends)
    way = routed.route(index, blocks, size)
    found = {
        "first call": clock(lambda: sc.attend(q, k, v, text)),
        "end to end": timed(lambda: sc.attend(q, k, v, text), 7),
        "means": timed(lambda: MeanKey().keys(context, size), 5),
        "choose": timed(lambda: routed.choose(q, means, min(top, blocks), size, own, ends), 5),
        "route": timed(lambda: routed.route(index, blocks, size), 5),
    }
    limit, allow, _ = sc.parts.mask.split(pairs_of(text))  # type: ignore[misc]
    rule = sparse._rule(limit, allow, size, here(length))
    beside = sparse._table(limit & allow, here(length))
    found["attention"] = timed(lambda: routed.attend(q, k, v, way, rule, beside, DIM**-0.5), 5)
    if length <= 2 * LENGTH:
        leaves = inputs(length, grad=True)
        found["end to end, forward+backward"] = timed(training(lambda *x: sc.attend(*x, text), leaves), 5)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        found["cudnn full"] = timed(lambda: scaled_dot_product_attention(q, k, v), 3)
        found["cudnn causal"] = timed(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), 3)
    found["times cudnn full"] = found["cudnn full"] / found["end to end"]
    found["times cudnn causal"] = found["cudnn causal"] / found["end to end"]
    return found


def growth() -> dict[str, object]:
    """How the gap to dense attention grows with length: a window, 10% of blocks, MoBA, one-token decoding."""
    found: dict[str, object] = {}
    for length in LENGTHS:
        q, k, v = inputs(length)
        table = table_of_blocks(random_blocks(length), here(length))
        step = q[:, :, -1:]
        found[str(length)] = {
            "window(1024) first call": clock(lambda q=q, k=k, v=v: sc.attend(q, k, v, "window(1024)")),  # type: ignore[misc]
            "window(1024)": timed(lambda q=q, k=k, v=v: sc.attend(q, k, v, "window(1024)"), 7),  # type: ignore[misc]
            "10% of blocks": timed(
                lambda q=q, k=k, v=v, t=table: sparse_run.forward(q, k, v, t, DIM**-0.5), 7
            ),  # type: ignore[misc]
            "decode moba(block=64, top=32)": timed(
                lambda s=step, k=k, v=v: sc.attend(s, k, v, "moba(block=64, top=32)"),  # type: ignore[misc]
                7,
            ),
            "decode all keys": timed(lambda s=step, k=k, v=v: scaled_dot_product_attention(s, k, v), 7),  # type: ignore[misc]
            "moba(512, 8)": moba(length),
        }
        del q, k, v, table, step
    return found


def compiled() -> int:
    """Kernels that Triton holds compiled."""
    from saccade.kernels import routed_triton, sparse_triton

    total = 0
    for module in (sparse_triton, routed_triton):
        for thing in vars(module).values():
            if isinstance(thing, triton.runtime.JITFunction):
                total += sum(len(caches[0]) for caches in thing.device_caches.values())
    return total


def many_masks() -> dict[str, object]:
    """Sixteen masks at eight lengths, forward and backward, twice over: kernels compiled, and memory held."""

    def once(lengths: tuple[int, ...]) -> None:
        for length in lengths:
            leaves = inputs(length, grad=True, heads=4)
            for text in MASKS:
                training(lambda *x, text=text: sc.attend(*x, text, kernel="sparse"), leaves)()
        torch.cuda.synchronize()
        gc.collect()

    start = compiled()
    once(SOME[:1])
    first = compiled()
    once(SOME)
    after, held = compiled(), torch.cuda.memory_allocated()
    once(SOME)
    return {
        "masks": len(MASKS), "lengths": len(SOME), "compiled by one length": first - start,
        "compiled by the other lengths": after - first, "compiled by a second round": compiled() - after,
        "bytes held after one round": held, "bytes held after two": torch.cuda.memory_allocated(),
    }  # fmt: skip


def small() -> None:
    """Every kernel once, on small inputs."""
    for text, rows, keys, lengths in (
        ("causal + sink(3) + window(70)", 300, 300, None), ("window(90)", 300, 300, [300, 150]),
        ("moba(block=64, top=2)", 300, 300, None), ("moba(block=64, top=2)", 1, 300, None),
        ("causal + top_blocks(50, top=2) + window(11)", 200, 333, None),
    ):  # fmt: skip
        for dim in (64, 128, 80):
            shapes = ((2, 4, rows, dim), (2, 2, keys, dim), (2, 2, keys, dim))
            q, k, v = (torch.randn(s, device="cuda").bfloat16().requires_grad_(rows > 1) for s in shapes)
            ends = None if lengths is None else torch.tensor(lengths, device="cuda")
            out = sc.attend(q, k, v, text, key_lengths=ends, kernel="sparse")
            if rows > 1:
                torch.autograd.grad(out.float().square().sum(), (q, k, v))
            table = table_of(
                pairs_of("window(70)"), Place(rows, keys, keys - rows, device=torch.device("cuda"))
            )
            lse = sparse_run.forward(q, k, v, table, 0.1)[1]
            sparse_run.statistics(q, k, lse, table, 0.1)
    torch.cuda.synchronize()
    print("every kernel ran")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument(
        "--only", default="", help="sections whose name holds this word; results are not written"
    )
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.small:
        return small()
    window = HEADS * (1024 * LENGTH - 1024 * 1023 // 2)
    share = HEADS * (LENGTH // BLOCK) * round(0.1 * LENGTH / BLOCK) * BLOCK**2
    sections: dict[str, Callable[[], object]] = {
        "tables": tables,
        "10% of blocks": lambda: beside_peers("10% of 128 x 128 blocks, a set a head", None, share),
        "window(1024)": lambda: beside_peers("window(1024)", "window(1024)", window),
        "growth": growth,
        "many masks": many_masks,
        "dense causal": dense,
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    document: dict[str, object] = {
        "made_by": "python benchmarks/gpu_sparse.py", "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(), "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16", "unit": "ms",
    }  # fmt: skip
    for name, section in sections.items():
        if options.only not in name:
            continue
        start = time.perf_counter()
        try:
            document[name] = section()
        except Exception as error:
            document[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(
            f"{name} ({time.perf_counter() - start:.0f} s)\n{json.dumps(document[name], indent=1)}",
            flush=True,
        )
        torch.cuda.empty_cache()
        if not options.only:
            (options.out / "gpu_sparse.json").write_text(
                json.dumps(document, indent=1) + "\n", encoding="utf-8"
            )


if __name__ == "__main__":
    main()
