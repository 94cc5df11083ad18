"""S287, a mixture of heads: the gate, its balance loss, and what an unchosen head may not do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import saccade as sc
from saccade.tasks import text
from systems.helpers import dense, qkv, stepwise, text_loss, train

DIM, HEADS, N = 32, 8, 11
pytestmark = pytest.mark.system("S287")
each_layout = pytest.mark.parametrize(("top", "shared"), [(1, 0), (3, 2), (5, 3), (8, 0), (2, 1)])


def streams(shared: int) -> dict[str, Tensor]:
    router = {"router": torch.randn(2, HEADS, N, dtype=torch.float64)}
    return router | ({"split": torch.randn(2, 1, N, dtype=torch.float64)} if shared else {})


def gates(given: dict[str, Tensor], top: int, shared: int) -> Tensor:
    """The gates head by head and token by token, (2, HEADS, N)."""
    found = torch.zeros(2, HEADS, N, dtype=torch.float64)
    for b in range(2):
        for i in range(N):
            score = given["router"][b, :, i].tolist()
            first = second = 1.0
            if shared:
                z = float(given["split"][b, 0, i])
                first, second = math.exp(z) / (math.exp(z) + 1), 1 / (math.exp(z) + 1)
            total = sum(math.exp(s) for s in score[:shared])
            rest = sum(math.exp(s) for s in score[shared:])
            best = sorted(range(shared, HEADS), key=lambda h: -score[h])[:top]
            for h in range(shared):
                found[b, h, i] = first * math.exp(score[h]) / total
            for h in best:
                found[b, h, i] = second * math.exp(score[h]) / rest
    return found


@each_layout
@pytest.mark.parametrize("rest", ["", "causal + rope + ", "causal + linear + "])
def test_equals_the_formula(top: int, shared: int, rest: str) -> None:
    q, k, v = qkv(2, HEADS, N, 4)
    given = streams(shared)
    heads = sc.attend(q, k, v, rest.removesuffix(" + ") or "full")
    found = sc.attend(q, k, v, f"{rest}head_gate({top}, shared={shared})", streams=given)
    torch.testing.assert_close(found, heads * gates(given, top, shared).unsqueeze(-1))
    assert ((found.abs().sum(-1) > 0).sum(1) == top + shared).all()


def test_gradients_reach_the_chosen_heads_alone() -> None:
    q, k, v = qkv(2, HEADS, N, 4)
    given = {n: x.requires_grad_() for n, x in streams(2).items()}
    weight = torch.randn(2, HEADS, N, 4, dtype=torch.float64)
    (sc.attend(q, k, v, "moh(top=3, shared=2)", streams=given) * weight).sum().backward()
    mine = given["router"].grad
    worth = (dense(q, k, v) * weight).sum(-1)
    odds = torch.softmax(given["router"].detach()[:, 2:], 1)
    best = odds.topk(3, 1).indices
    kept = torch.zeros_like(odds).scatter(1, best, 1.0)
    second = 1 - torch.sigmoid(given["split"].detach())
    inner = (odds * kept * worth[:, 2:]).sum(1, keepdim=True)
    torch.testing.assert_close(mine[:, 2:], second * odds * (kept * worth[:, 2:] - inner))


def test_all_heads_alike_are_multi_head_attention_in_its_form_as_a_sum() -> None:
    """Every gate of an even router is 1 / H; scaled back, the heads' own output projections sum to the layer's."""
    layer = sc.nn.Attention(DIM, HEADS, f"causal + moh(top={HEADS}, shared=0)")
    plain = sc.nn.Attention(DIM, HEADS, "causal")
    plain.load_state_dict({n: x for n, x in layer.state_dict().items() if "streams" not in n})
    for p in layer.streams["router"].parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, N, DIM)
    heads = sc.attend(*plain.project(x), "causal")
    summed = sum(heads[:, h] @ plain.out_proj.weight[:, 4 * h : 4 * h + 4].T for h in range(HEADS))
    torch.testing.assert_close(HEADS * layer(x), summed, atol=1e-6, rtol=0)
    torch.testing.assert_close(HEADS * layer(x), plain(x), atol=1e-6, rtol=0)


def test_heads_that_a_token_does_not_choose_cannot_disturb_it() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "causal + moh(top=3, shared=1)")
    x = torch.randn(2, N, DIM)
    kept = layer.mechanism.output[0].chosen(layer.streams["router"](x, N))[1]
    before = layer(x)
    for h in range(1, HEADS):
        moved = sc.nn.Attention(DIM, HEADS, "causal + moh(top=3, shared=1)")
        moved.load_state_dict(layer.state_dict())
        own = slice(4 * h, 4 * h + 4)
        with torch.no_grad():
            for net in (moved.query_proj, moved.key_proj, moved.value_proj):
                net.weight[own] += torch.randn(4, DIM)
            moved.out_proj.weight[:, own] += torch.randn(DIM, 4)
        after = moved(x)
        off = ~kept[:, h - 1]
        assert torch.equal(after[off], before[off])
        assert not torch.isclose(after[~off], before[~off]).all(-1).any()


def test_only_routers_are_added() -> None:
    layer, plain = (sc.nn.Attention(DIM, HEADS, m) for m in ("moh(top=3, shared=2)", "full"))
    extra = {n: p.numel() for n, p in layer.named_parameters() if n not in dict(plain.named_parameters())}
    assert sum(extra.values()) == (HEADS + 1) * (DIM + 1)
    assert all(n.startswith(("streams.router", "streams.split")) for n in extra)


def test_decoding_equals_the_whole() -> None:
    layer = sc.nn.Attention(DIM, HEADS, "causal + rope + moh(top=3, shared=2)")
    x = torch.randn(2, N, DIM)
    torch.testing.assert_close(stepwise(layer, x)[0], layer(x))


@pytest.mark.parametrize("ragged", [False, True])
def test_the_loss_weighs_load_by_probability(ragged: bool) -> None:
    q, k, v = qkv(2, HEADS, N, 4)
    given = streams(2)
    lengths = torch.tensor([N, 4]) if ragged else None
    if ragged:
        given["router"][1, :, 4:] = math.nan
    found = sc.attend(
        q, k, v, "moh(top=3, shared=2)", streams=given, key_lengths=lengths, need=("losses",)
    ).losses
    tokens = [(b, i) for b in range(2) for i in range(N if b == 0 or not ragged else 4)]
    want = 0.0
    for h in range(2, HEADS):
        chosen = probable = 0.0
        for b, i in tokens:
            score = given["router"][b, 2:, i]
            chosen += float((score > score[h - 2]).sum() < 3) / len(tokens)
            probable += float(score.softmax(0)[h - 2]) / len(tokens)
        want += chosen * probable
    assert set(found) == {"balance"}
    assert float(found["balance"]) == pytest.approx(want)


def test_a_model_hands_its_blocks_losses_on() -> None:
    model = sc.nn.Transformer(19, DIM, 3, HEADS, "moh(top=3, shared=1)", 16)
    tokens, losses = torch.randint(19, (2, 9)), {}
    logits = model(tokens, losses=losses)
    torch.testing.assert_close(logits, model(tokens))
    assert losses["balance"].item() > 3 * 3 / 7 - 0.1
    losses["balance"].backward()
    assert all(block.attention.streams["router"].net.weight.grad.any() for block in model.blocks)


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(sc.MechanismError, match="3 shared and 6 routed heads are more than 8 heads"):
        sc.nn.Attention(DIM, HEADS, "moh(top=6, shared=3)")
    layer = sc.nn.Attention(DIM, HEADS, "causal + moh")
    q, k, v = layer.project(torch.randn(1, 2, DIM))
    with pytest.raises(sc.NotSupported, match="losses are answered for a whole call"):
        sc.attend(
            q, k, v, layer.mechanism, state=layer.init_state(1), need=("losses",),
            streams={"router": torch.randn(1, HEADS, 2), "split": torch.randn(1, 1, 2)},
        )  # fmt: skip


def variation(layer: sc.nn.Attention, x: Tensor) -> float:
    """The deviation of the routed heads' loads over their mean."""
    load = layer.mechanism.output[0].chosen(layer.streams["router"](x, x.shape[1]))[1].double().mean((0, 2))
    return float(load.std(correction=0) / load.mean())


def test_the_balance_loss_evens_the_load() -> None:
    found = {}
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        layer = sc.nn.Attention(DIM, HEADS, "moh(top=2, shared=2)")
        with torch.no_grad():
            layer.streams["router"].net.bias.copy_(torch.linspace(0, 2, HEADS))
        map_, generator = torch.randn(DIM, DIM) / math.sqrt(DIM), torch.Generator().manual_seed(0)

        def loss(
            step: int,
            layer: sc.nn.Attention = layer,
            map_: Tensor = map_,
            generator: torch.Generator = generator,
            weight: float = weight,
        ) -> Tensor:
            x = torch.randn(16, N, DIM, generator=generator)
            got = layer(x, need=("out", "losses"))
            return (got.out - x.cumsum(1) @ map_).square().mean() + weight * got.losses["balance"]

        train(layer.parameters(), loss, 200, 5e-3)
        found[weight] = variation(layer, torch.randn(64, N, DIM))
    assert found[0.1] < 0.3 < found[0.0], found


def text_losses(steps: int, seed: int) -> tuple[float, float, float]:
    """Held-out text losses with three of four heads active and with all, and the worst variation of a layer's loads.

    Gates sum to one, so a token hears a mean of heads: output projections start four times as large to make up for it.
    """
    corpus, found = text.load(window=64), []
    for mechanism in ("moh(top=2, shared=1)", "causal"):
        torch.manual_seed(seed)
        model = sc.nn.Transformer(text.VOCAB, 64, 2, 4, mechanism, 64)
        for table in (model.embedding.tokens, model.embedding.positions):
            nn.init.normal_(table.weight, std=0.1)
        if mechanism != "causal":
            for block in model.blocks:
                block.attention.out_proj.weight.data *= 4
        generator = torch.Generator().manual_seed(seed)

        def loss(step: int, model: nn.Module = model, generator: torch.Generator = generator) -> Tensor:
            rows, extra = corpus.batch(16, 64, generator), {}
            logits = model(rows[:, :-1], losses=extra)
            own = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            return own + 0.01 * sum(extra.values())

        train(model.parameters(), loss, steps)
        found.append((text_loss(model, corpus, 64), model))
    model = found[0][1]
    x, spread = model.embedding(corpus.windows(64)[:32, :-1]), []
    with torch.no_grad():
        for block in model.blocks:
            spread.append(variation(block.attention, block.norm1(x)))
            x = block(x)
    return found[0][0], found[1][0], max(spread)


@pytest.mark.slow
def test_three_heads_of_four_learn_text_nearly_as_well_as_all() -> None:
    """Means of three runs. The paper loses nothing; at this size one head less costs 2.7%."""
    few, all_, spread = torch.tensor([text_losses(600, seed) for seed in range(3)]).unbind(1)
    assert few.mean() <= 1.04 * all_.mean(), (few, all_)
    assert spread.max() < 0.3, spread
