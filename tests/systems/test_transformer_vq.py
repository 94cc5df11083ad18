"""S101, Transformer-VQ: keys are read as codes, old ones as a count and a mean value a code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.codes import CodedDot, nearest, usage
from saccade.tasks import text
from saccade.tasks.text import VOCAB
from systems.helpers import FRESH, below, dense, exponent, flops, qkv, stepwise, text_loss, train

pytestmark = pytest.mark.system("S101")


def drawn(groups: int, codes: int, dim: int) -> dict[str, Tensor]:
    return {
        "codes": torch.randn(groups, codes, dim, dtype=torch.float64),
        "code_mass": torch.ones(groups, codes, dtype=torch.float64),
    }


def quantised(k: Tensor, codes: Tensor) -> Tensor:
    """Each key as the code at the least distance, by comparing all of them."""
    away = (k.unsqueeze(-2) - codes[:, None]).square().sum(-1)
    return torch.stack([codes[g][away[:, g].argmin(-1)] for g in range(codes.shape[0])], 1)


def standardised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize("block", [1, 5, 16, 100])
@pytest.mark.parametrize("kernel", ["codes", "slab", "reference"])
@pytest.mark.filterwarnings("ignore:.*runs by its definition")
def test_any_block_is_dense_causal_attention_over_quantised_keys(block: int, kernel: str) -> None:
    q, k, v = qkv(2, 4, 77, 8, kv=2)
    buffers = drawn(2, 6, 8)
    found = sc.attend(q, k, v, f"transformer_vq(6, block={block}, clip=0)", buffers=buffers, kernel=kernel)
    coded = quantised(standardised(k), buffers["codes"])
    torch.testing.assert_close(found, dense(standardised(q), coded, v, below(77)), atol=1e-10, rtol=0)


def summed_up(q: Tensor, k: Tensor, v: Tensor, codes: Tensor, table: Tensor, block: int) -> Tensor:
    """The paper's sums for one head, row by row: codes weigh by count, tokens of two blocks by themselves."""
    n, clip = len(q), (len(table) - 1) // 2
    index = (k[:, None] - codes).square().sum(-1).argmin(-1)
    rows = []
    for i in range(n):
        first = max(0, i // block - 1) * block
        row = q[i] / math.sqrt(q.shape[-1])
        weights, values = [], []
        for s in range(len(codes)):
            members = [j for j in range(first) if index[j] == s]
            if members:
                weights.append(len(members) * torch.exp(row @ codes[s] + row @ table[0]))
                values.append(v[members].mean(0))
        for j in range(first, i + 1):
            weights.append(torch.exp(row @ codes[index[j]] + row @ table[max(j - i, -clip) + clip]))
            values.append(v[j])
        total = torch.stack(weights).sum()
        rows.append(sum(w * u for w, u in zip(weights, values, strict=True)) / total)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["codes", "slab"])
def test_counts_and_mean_values_with_positions_equal_the_formula(kernel: str) -> None:
    q, k, v = qkv(1, 2, 41, 6)
    buffers, table = drawn(2, 4, 6), torch.randn(15, 6, dtype=torch.float64)
    m = "transformer_vq(4, block=8, clip=7)"
    found = sc.attend(q, k, v, m, params={"rel_table": table}, buffers=buffers, kernel=kernel)
    for h in range(2):
        rows = (standardised(q)[0, h], standardised(k)[0, h], v[0, h])
        expected = summed_up(*rows, buffers["codes"][h], table, 8)
        torch.testing.assert_close(found[0, h], expected, atol=1e-10, rtol=0)


def test_token_by_token_equals_the_parallel_pass() -> None:
    m = "gqa(2) + standardize + causal + coded_dot(8, block=8) + rel_table(8)"
    layer = sc.nn.Attention(32, 4, m).double()
    x = torch.randn(2, 43, 32, dtype=torch.float64)
    whole = layer(x)
    torch.testing.assert_close(stepwise(layer, x)[0], whole, atol=1e-10, rtol=0)
    first, state = layer.step(x[:, :29], layer.init_state(2))
    last, _ = layer.step(x[:, 29:], state)
    torch.testing.assert_close(torch.cat((first, last), 1), whole, atol=1e-10, rtol=0)


def test_the_state_has_one_size_from_1k_to_16k_tokens() -> None:
    q, k, v = qkv(1, 2, 16384 + 32, 8, dtype=torch.float32)
    m, codes, block = "transformer_vq(16, block=64, clip=0)", 16, 64
    buffers = {n: x.float() for n, x in drawn(2, codes, 8).items()}
    state, at, held = sc.init_state(m, 1, 2, 8), 0, []
    for stop in (1024 + 32, 2048 + 32, 16384 + 32):
        part = (x[:, :, at:stop] for x in (q, k, v))
        state = sc.attend(*part, m, buffers=buffers, state=state, need=("out", "state")).state
        held.append(state.nbytes)
        at = stop
    latest = block + 32
    expected = 2 * (4 * codes * (1 + 8) + latest * (8 + 4 * 8))
    assert held == [expected] * 3


def test_work_and_memory_double_with_the_length() -> None:
    lengths, counted, peaks = [2048, 4096, 8192], [], []
    m = "transformer_vq(32, block=32)"
    for n in lengths:
        q, k, v = qkv(1, 2, n, 16, dtype=torch.float32)
        named = {
            "params": {"rel_table": torch.zeros(33, 16)},
            "buffers": {b: x.float() for b, x in drawn(2, 32, 16).items()},
        }
        counted.append(flops(lambda q=q, k=k, v=v, named=named: sc.attend(q, k, v, m, **named)))
        plan = sc.plan(m, (1, 2, n, 16))
        assert plan.kernel == "codes"
        assert counted[-1] == plan.cost.flops
        peaks.append(plan.cost.peak)
    assert 0.99 <= exponent(lengths, counted) <= 1.01
    assert exponent(lengths, peaks) <= 1.05
    assert counted[-1] < sc.plan("causal", (1, 2, 8192, 16)).cost.flops / 8


def gradients(kernel: str) -> list[Tensor]:
    torch.manual_seed(3)
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 30, 4))
    out = sc.attend(q, k, v, "causal + coded_dot(5, block=4)", buffers=drawn(2, 5, 4), kernel=kernel)
    return list(torch.autograd.grad(out.sin().sum(), (q, k, v)))


def test_gradients_pass_straight_through_the_choice_of_recent_keys() -> None:
    """By hand: near keys stand for their codes with gradient one, far ones with none."""
    torch.manual_seed(3)
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 30, 4))
    codes = drawn(2, 5, 4)["codes"]
    fixed = quantised(k.detach(), codes)
    i, j = torch.arange(30)[:, None], torch.arange(30)
    near = j // 4 >= i // 4 - 1
    straight = fixed + k - k.detach()
    s = torch.where(near, q @ straight.mT, q @ fixed.mT) / 2
    out = torch.softmax(s.masked_fill(j > i, -math.inf), -1) @ v
    expected = torch.autograd.grad(out.sin().sum(), (q, k, v))
    for kernel in ("codes", "slab", "reference"):
        for a, b in zip(gradients(kernel), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_commit_loss_draws_keys_to_their_codes() -> None:
    q, k, v = qkv(2, 2, 12, 4)
    k.requires_grad_()
    buffers = drawn(2, 5, 4)
    found = sc.attend(q, k, v, "transformer_vq(5, clip=0)", buffers=buffers, need=("out", "losses"))
    keys = standardised(k)
    away = (keys - quantised(keys.detach(), buffers["codes"])).square().sum(-1)
    torch.testing.assert_close(found.losses["commit"], away.mean(), atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(found.losses["commit"], k)
    assert grad.abs().max() > 0
    padded = k.detach().clone()
    padded[1, :, 7:] = math.nan
    options = {"buffers": buffers, "key_lengths": torch.tensor([12, 7]), "need": ("out", "losses")}
    ragged = sc.attend(q, padded, v, "transformer_vq(5, clip=0)", **options).losses["commit"]
    real = torch.cat((away[0].flatten(), away[1, :, :7].flatten()))
    torch.testing.assert_close(ragged, real.mean(), atol=1e-12, rtol=0)


def test_refresh_is_a_moving_average_of_the_keys_of_a_code() -> None:
    part = CodedDot(3, keep=0.75)
    k = torch.randn(2, 1, 9, 4, dtype=torch.float64)
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    before = drawn(1, 3, 4)
    after = part.refresh(before, k, k.masked_fill(~valid[:, None, :, None], 1e9), valid, None)
    sums, mass = [0.75 * before["codes"][0, s] for s in range(3)], [0.75] * 3
    for key in k.transpose(0, 1).flatten(1, 2)[0][valid.flatten()]:
        s = int((before["codes"][0] - key).norm(dim=-1).argmin())
        sums[s] = sums[s] + 0.25 * key
        mass[s] += 0.25
    expected = torch.stack([x / n for x, n in zip(sums, mass, strict=True)])
    torch.testing.assert_close(after["codes"][0], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(after["code_mass"][0], torch.tensor(mass, dtype=torch.float64))


def test_a_code_that_no_key_chooses_starts_anew_at_a_key() -> None:
    k = torch.randn(1, 2, 64, 4)
    buffers = {"codes": torch.randn(2, 4, 4), "code_mass": torch.ones(2, 4)}
    buffers["codes"][:, 3] = 1000.0
    part = CodedDot(4, keep=0.5)
    for _ in range(12):
        buffers = part.refresh(buffers, k, k, None, torch.Generator().manual_seed(0))
    assert buffers["codes"].abs().max() < 10
    assert usage(nearest(k, buffers["codes"]), 4).min() > 2


@pytest.mark.parametrize(("index", "wanted"), [([0, 0, 0, 0], 1.0), ([0, 1, 2, 3], 4.0), ([0, 0, 1, 1], 2.0)])
def test_usage_is_a_perplexity(index: list[int], wanted: float) -> None:
    assert float(usage(torch.tensor([[index]]), 4)) == pytest.approx(wanted)


def test_padding_and_empty_samples() -> None:
    q, k, v = qkv(3, 2, 40, 8)
    buffers, m = drawn(2, 5, 8), "transformer_vq(5, block=8, clip=0)"
    lengths = torch.tensor([40, 21, 0])
    for b, n in enumerate(lengths.tolist()):
        for x in (q, k, v):
            x[b, :, n:] = math.nan
    found = sc.attend(q, k, v, m, buffers=buffers, key_lengths=lengths)
    alone = sc.attend(*(x[1:2, :, :21] for x in (q, k, v)), m, buffers=buffers)
    torch.testing.assert_close(found[1:2, :, :21], alone, atol=1e-12, rtol=0)
    assert bool((found[2] == 0).all())


def test_what_is_refused_says_what_to_do() -> None:
    q, k, v = qkv(1, 2, 12, 4)
    with pytest.raises(sc.MechanismError, match="clip is at most block=8, got 9"):
        sc.mechanism("transformer_vq(block=8, clip=9)")
    with pytest.raises(sc.MechanismError, match="keep is a share of at most 1"):
        sc.mechanism("coded_dot(8, keep=1.5)")
    with pytest.raises(sc.NotSupported, match=r"buffer `codes` .* \(2, 5, 4\), got \(2, 6, 4\)"):
        sc.attend(q, k, v, "transformer_vq(5, clip=0)", buffers=drawn(2, 6, 4))
    m, buffers = "transformer_vq(5, clip=0)", drawn(2, 5, 4)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(sc.NotSupported, match="mask of single pairs"):
        sc.attend(q, k, v, m, buffers=buffers, mask=mask, need=("out", "state"))
    with pytest.raises(sc.NotSupported, match="is run by codes"):
        sc.attend(q, k, v, m, buffers=buffers, kernel="slab", need=("out", "state"))
    with pytest.raises(ValueError, match="every new token brings its query"):
        sc.attend(q[:, :, :1], k, v, m, buffers=buffers, need=("out", "state"))
    why = {
        x.kernel.name: x.reasons
        for x in sc.plan("causal + coded_dot(8, block=8) + rel_table", (1, 2, 64, 8)).candidates
    }
    assert why["codes"] == ("rel_table tells keys apart that are more than 8 tokens old",)


LENGTH, CODES = 96, 16
PLAIN = "standardize + causal + rel_table(16)"


def learned(mechanism: str, steps: int, seed: int, rate: float = 1e-2) -> tuple[float, list[float]]:
    """Held-out nats a byte of a model, and the usage of the codes of each of its heads."""
    torch.manual_seed(seed)
    corpus = text.load(window=LENGTH)
    model = sc.nn.Transformer(VOCAB, 48, 2, heads=2, mechanism=mechanism, max_length=LENGTH, positions="none")
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.1)
    draws, refreshed = (torch.Generator().manual_seed(seed) for _ in range(2))
    coded = mechanism != PLAIN
    for block in model.blocks:
        if coded:
            block.attention.register_forward_pre_hook(
                lambda layer, args: (
                    layer.refresh(args[0].detach(), generator=refreshed) if layer.training else None
                )
            )

    def loss(step: int) -> Tensor:
        rows, losses = corpus.batch(8, LENGTH, draws), {}
        logits = model(rows[:, :-1], losses=losses)
        nats = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return nats + 1e-3 * losses["commit"] if coded else nats

    train(model.parameters(), loss, steps, rate)
    model.eval()
    used, x = [], model.embedding(corpus.windows(LENGTH)[:32, :-1])
    for block in model.blocks if coded else ():
        k = standardised(block.attention.keys_values(block.norm1(x))[0])
        used += usage(nearest(k, block.attention.codes), CODES).tolist()
        x = block(x)
    return text_loss(model, corpus, LENGTH), used


def test_a_short_training_uses_the_codebook() -> None:
    nats, used = learned(f"transformer_vq({CODES}, block=16, keep=0.9)", 60, FRESH)
    assert min(used) > CODES / 4
    assert nats < 0.95 * text.load(window=LENGTH).baseline(LENGTH) * math.log(2)


@pytest.mark.slow
def test_a_language_model_on_codes_is_close_to_one_on_keys() -> None:
    coded, used = learned(f"transformer_vq({CODES}, block=16, keep=0.9)", 400, FRESH)
    plain, _ = learned(PLAIN, 400, FRESH)
    assert min(used) > CODES / 4
    assert coded < 1.08 * plain
