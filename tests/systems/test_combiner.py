"""S250, Combiner: the own block token by token, everything before it through regions, in one softmax."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.systems.combiner import Combiner
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import FRESH, below, dense, exponent, flops, qkv, stepwise, train

pytestmark = pytest.mark.system("S250")
PLANS = ("fixed", "logsparse", "axial")


def regions_of(plan: str, block: int, i: int) -> list[list[int]]:
    """The regions that token i reads, by the words of the plan."""
    first = i - i % block
    if plan == "fixed":
        return [list(range(j, j + block)) for j in range(0, first, block)]
    if plan == "axial":
        return [list(range(c, first, block)) for c in range(min(block, first))]
    found, at, blocks = [], 0, i // block
    for power in reversed(
        range(blocks.bit_length())
    ):  # the largest run first, each at a multiple of its size
        if blocks & 1 << power:
            found.append(list(range(at * block, (at + (1 << power)) * block)))
            at += 1 << power
    return found


def shares(q: Tensor, k: Tensor, plan: str, block: int) -> Tensor:
    """The materialised matrix of one head, entry by entry."""
    n, d = q.shape
    w = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        row = {j: torch.exp(q[i] @ k[j] / math.sqrt(d)) for j in range(i - i % block, i + 1)}
        for region in regions_of(plan, block, i):
            top_q, top_k = (torch.stack([x[j] for j in region]).max(0).values for x in (q, k))
            inside = torch.stack([torch.exp(top_q @ k[j] / math.sqrt(d)) for j in region])
            for j, p in zip(region, inside / inside.sum(), strict=True):
                row[j] = torch.exp(q[i] @ top_k / math.sqrt(d)) * p
        total = torch.stack(list(row.values())).sum()
        w[i, list(row)] = torch.stack(list(row.values())) / total
    return w


@pytest.mark.parametrize("kernel", ["mixer", "reference"])
@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_equals_the_formula_and_its_gradients(plan: str, block: int, kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 31, 6, kv=1))
    found = sc.attend(q, k, v, f"combiner({block}, plan={plan})", kernel=kernel)
    expected = torch.stack([shares(q[0, h], k[0, 0], plan, block) @ v[0, 0] for h in range(2)])[None]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_every_earlier_token_has_a_share_and_shares_sum_to_one(plan: str) -> None:
    n = 45
    q, k, _ = qkv(2, 2, n, 8)
    eye = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    w = sc.attend(q, k, eye, f"combiner(6, plan={plan})")
    torch.testing.assert_close(w.sum(-1), torch.ones(2, 2, n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert bool((w[..., below(n)] > 0).all())
    assert bool((w[..., ~below(n)] == 0).all())


@pytest.mark.parametrize("length", [1, 2, 40])
def test_regions_of_one_token_are_dense_causal_attention(length: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    expected = dense(q, k, v, below(length))
    torch.testing.assert_close(sc.attend(q, k, v, "combiner(1)"), expected, atol=1e-12, rtol=0)
    for plan in PLANS:
        whole = sc.attend(q, k, v, f"combiner(40, plan={plan})")
        torch.testing.assert_close(whole, expected, atol=1e-12, rtol=0)


def test_columns_of_one_token_are_dense_causal_attention() -> None:
    q, k, v = qkv(2, 2, 16, 8)
    found = sc.attend(q, k, v, "combiner(8, plan=axial)")
    torch.testing.assert_close(found, dense(q, k, v, below(16)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("plan", PLANS)
def test_regions_share_out_the_past(plan: str) -> None:
    m = Combiner(5, plan)
    for i in range(90):
        direct, regions = m.partition(i)
        assert sorted([*direct, *(j for region in regions for j in region)]) == list(range(i + 1))
        assert sorted(map(list, regions)) == sorted(regions_of(plan, 5, i))
    assert len(m.partition(31 * 5)[1]) == {"fixed": 31, "logsparse": 5, "axial": 5}[plan]


@pytest.mark.parametrize("plan", PLANS)
def test_a_changed_token_changes_no_output_before_it(plan: str) -> None:
    q, k, v = qkv(1, 2, 50, 8)
    text = f"combiner(6, plan={plan})"
    first = sc.attend(q, k, v, text)
    for t in (1, 17, 18, 36, 49):
        other = [x.clone() for x in (q, k, v)]
        for x in other:
            x[:, :, t] += 100 * torch.randn_like(x[:, :, t])
        moved = sc.attend(*other, text)
        torch.testing.assert_close(moved[:, :, :t], first[:, :, :t], atol=0, rtol=0)
        assert (moved[:, :, t:] - first[:, :, t:]).abs().amax((0, 1, 3)).min() > 0


@pytest.mark.parametrize("plan", PLANS)
def test_decoding_equals_the_whole_call(plan: str) -> None:
    layer = sc.nn.Attention(32, 4, f"combiner(5, plan={plan})").double()
    x = torch.randn(2, 67, 32, dtype=torch.float64)
    whole = layer(x)
    steps, held = stepwise(layer, x)
    torch.testing.assert_close(steps, whole, atol=1e-10, rtol=0)
    first, state = layer.step(x[:, :23], layer.init_state(2))
    last, after = layer.step(x[:, 23:], state)
    torch.testing.assert_close(torch.cat((first, last), 1), whole, atol=1e-10, rtol=0)
    assert after.nbytes == held[-1]
    if plan == "fixed":  # 13 regions, and 2 tokens of the block at hand
        assert held[-1] == 2 * 32 * 8 * (3 * 13 + 3 * 2)


def test_two_continuations_of_one_state_do_not_disturb_each_other() -> None:
    layer = sc.nn.Attention(16, 2, "combiner(4, plan=logsparse)").double()
    x = torch.randn(1, 13, 16, dtype=torch.float64)
    other = torch.cat((x[:, :9], torch.randn(1, 4, 16, dtype=torch.float64)), 1)
    with torch.no_grad():
        _, state = layer.step(x[:, :9], layer.init_state(1))
        ends = [layer.step(y[:, 9:], state)[0] for y in (x, other, x)]
        for end, y in zip(ends, (x, other, x), strict=True):
            torch.testing.assert_close(end, layer(y)[:, 9:], atol=1e-10, rtol=0)


def test_work_grows_as_the_plan_says() -> None:
    counted: dict[str, list[int]] = {}
    for n in (2048, 4096, 8192):
        q, k, v = qkv(1, 1, n, 16, dtype=torch.float32)
        root = 1 << round(math.log2(n) / 2)
        for name, text in (
            ("fixed", "combiner(64)"),
            ("root", f"combiner({root})"),
            ("logsparse", "combiner(32, plan=logsparse)"),
            ("axial", f"combiner({root}, plan=axial)"),
        ):
            counted.setdefault(name, []).append(flops(lambda q=q, k=k, v=v, t=text: sc.attend(q, k, v, t)))
    assert counted["fixed"][-1] < 12 * counted["fixed"][0]
    slopes = {name: exponent([2048, 4096, 8192], x) for name, x in counted.items()}
    assert max(slopes["root"], slopes["axial"]) < 1.6
    assert slopes["logsparse"] < 1.2


def test_padding_and_empty_samples() -> None:
    q, k, v = qkv(3, 2, 40, 8)
    lengths = torch.tensor([40, 21, 0])
    for b, n in enumerate(lengths.tolist()):
        for x in (q, k, v):
            x[b, :, n:] = math.nan
    for plan in PLANS:
        text = f"combiner(8, plan={plan})"
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found = sc.attend(*leaves, text, key_lengths=lengths)
        alone = sc.attend(*(x[1:2, :, :21] for x in (q, k, v)), text)
        torch.testing.assert_close(found[1:2, :, :21], alone, atol=1e-12, rtol=0)
        assert bool((found[2] == 0).all())
        grads = torch.autograd.grad(found[1, :, :21].sum(), leaves)
        assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_what_is_refused_says_what_to_do() -> None:
    q, k, v = qkv(1, 2, 12, 4)
    with pytest.raises(
        ValueError, match=r"every key brings one: got 3 queries and 12 keys; go on from a state"
    ):
        sc.attend(q[:, :, :3], k, v, "combiner(4)")
    with pytest.raises(sc.MechanismError, match="plan must be one of fixed, logsparse, axial, got 'rows'"):
        sc.mechanism("combiner(4, plan=rows)")
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    for need in (("out",), ("out", "state")):
        with pytest.raises(sc.NotSupported, match="no single pairs to mask"):
            sc.attend(q, k, v, "combiner(4)", mask=mask, need=need)
    with pytest.raises(sc.NotSupported, match="no log-denominator"):
        sc.attend(q, k, v, "combiner(4)", need=("out", "lse", "state"))
    state = sc.init_state("combiner(4)", 1, 2, 8)
    with pytest.raises(ValueError, match="does not belong to this call"):
        sc.attend(q, k, v, "combiner(4)", state=state)


def recalled(mechanism: str, steps: int, seed: int) -> float:
    """Accuracy of a model of two layers in recalling pairs that stand a few blocks before."""
    task = Recall(48, pairs=4, queries=8, keys=8, values=8)
    torch.manual_seed(seed)
    model = sc.nn.Transformer(task.vocab, 48, 2, heads=2, mechanism=mechanism, max_length=48)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return torch.nn.functional.cross_entropy(
            model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT
        )

    train(model.parameters(), loss, steps, 3e-3)
    with torch.no_grad():
        tokens, targets = task.batch(256, torch.Generator().manual_seed(seed + 1))
        return accuracy(model(tokens), targets)


def test_regions_carry_what_blocks_alone_do_not_see() -> None:
    """In a short training a model learns which values were shown, to answer with one of the four, if it can see them."""
    alone, combined = (recalled(m, 100, FRESH) for m in ("causal + chunk(8)", "combiner(8)"))
    assert combined > 0.19
    assert alone < 0.15
