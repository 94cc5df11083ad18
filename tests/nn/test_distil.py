"""Softmax models turned into linear and hybrid ones: the pieces, what is refused, and how much recall comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.nn import distil
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import FRESH, train

TINY = {"vocab": 11, "dim": 16, "depth": 3, "heads": 2, "max_length": 12}


def tiny(mechanism: str = "gqa(1) + rope + causal", **changed: int) -> sc.nn.Transformer:
    return sc.nn.Transformer(**(TINY | changed), mechanism=mechanism).double()


def draws(step: int) -> Tensor:
    return torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(step))


def test_what_comes_in_takes_over_heads_and_token_maps() -> None:
    old = sc.mechanism("gqa(2) + rope + window(8)")
    assert str(distil.adopted("hedgehog", old)) == str(
        sc.mechanism("gqa(2) + rope + causal + hedgehog").canonical()
    )
    assert distil.adopted("window(4)", old) == sc.mechanism("gqa(2) + rope + window(4)")
    both = distil.adopted("mix(hedgehog, window(4))", old)
    assert [c.heads for c in both.children] == [old.heads, old.heads]
    with pytest.raises(sc.NotSupported, match=r"has heads of its own"):
        distil.adopted("kv_heads(4) + linear", old)
    with pytest.raises(sc.NotSupported, match="a mixer is not converted"):
        distil.adopted("dynamic_conv(5)", old)
    with pytest.raises(sc.NotSupported, match="a combine is not converted"):
        distil.adopted("linear", sc.mechanism("by_head(window(4), causal)"))


@pytest.mark.parametrize("mechanism", ["gqa(2) + rope + causal", "causal + kv_shifting", "causal + alibi"])
def test_a_layer_put_in_for_itself_is_the_same(mechanism: str) -> None:
    layer = sc.nn.Attention(16, 4, mechanism, bias=True, head_dim=6, value_dim=5).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = {"gqa(2) + rope + causal": "causal", "causal + kv_shifting": "causal", "causal + alibi": "alibi"}
    again = distil.substitute(layer, plain[mechanism])
    assert again.mechanism == layer.mechanism
    torch.testing.assert_close(again(x), layer(x), atol=0, rtol=0)


def test_a_hybrid_keeps_what_it_is_told_and_the_model_stays_as_it_was() -> None:
    model = tiny()
    before = {n: x.clone() for n, x in model.state_dict().items()}
    layers = [distil.substitute(b.attention, "hedgehog") for b in model.blocks]
    tokens = draws(0)
    torch.testing.assert_close(distil.hybrid(model, layers, range(3))(tokens), model(tokens), atol=0, rtol=0)
    found = sc.nn.linearize(model, draws, keep=(1,), steps=2)
    assert [b.attention.mechanism.family for b in found.model.blocks] == [
        "recurrent",
        "pairwise",
        "recurrent",
    ]
    assert found.kept == (1,)
    assert len(found.importance) == len(found.misses) == 3
    for n, x in model.state_dict().items():
        assert torch.equal(x, before[n])
        assert model.get_parameter(n).grad is None


def test_what_each_number_means() -> None:
    model = tiny()
    layers = [distil.substitute(b.attention, "hedgehog") for b in model.blocks]
    x = model.embedding(draws(0))
    wanted = []
    for block, layer in zip(model.blocks, layers, strict=True):
        seen = block.norm1(x)
        right, wrong = block.attention(seen), layer(seen)
        wanted.append(((wrong - right).square().sum() / right.square().sum()).item())
        x = block(x)
    misses = distil.align(model, layers, draws, steps=40, rate=1e-3)
    assert [m[0] for m in misses] == pytest.approx(wanted)
    assert all(after < before for before, after in misses)

    def judge(other: sc.nn.Transformer) -> float:
        return -float((other(draws(9)) - model(draws(9))).abs().sum().detach())

    costs = distil.importance(model, layers, judge)
    for n, cost in enumerate(costs):
        lone = distil.hybrid(model, layers, {0, 1, 2} - {n})
        assert cost == pytest.approx(-judge(lone))
    p, q = (m(draws(3)).softmax(-1) for m in (model, lone))
    kl = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distil.divergence(lone, model, draws(3)), kl)


def test_without_a_judge_closeness_decides_and_fine_tuning_is_a_hook() -> None:
    model, called = tiny(), []
    found = sc.nn.linearize(
        model, draws, keep=1, feature="hedgehog", steps=3, finetune=lambda new, old: called.append((new, old))
    )
    assert called == [(found.model, model)]
    assert found.scores[0] == 0
    assert found.scores[1] == found.scores[2] < 0
    assert found.kept == (max(range(3), key=lambda n: found.importance[n]),)


def test_a_hybrid_decodes_as_it_reads_whole() -> None:
    found = sc.nn.linearize(tiny(), draws, keep=(0,), steps=1).model
    tokens, states, said = draws(5), found.init_state(2), []
    for part in (tokens[:, :4], *tokens[:, 4:].split(1, 1)):
        logits, states = found.step(part, states)
        said.append(logits)
    torch.testing.assert_close(torch.cat(said, 1), found(tokens), atol=1e-12, rtol=0)
    assert states[0].tensors["k"].shape[2] == 12  # the block that stayed keeps all keys


def test_bad_requests_are_refused() -> None:
    model = tiny()
    for keep in (4, -1, (0, 3), (1, 1)):
        with pytest.raises(ValueError, match="keep is a number of blocks from 0 to 3"):
            sc.nn.linearize(model, draws, keep=keep)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        sc.nn.linearize(model, draws, steps=0)
    with pytest.raises(sc.NotSupported, match=r"converts an sc.nn.Transformer, got Encoder"):
        sc.nn.linearize(sc.nn.Encoder(11, 16), draws)
    with pytest.raises(sc.NotSupported, match="share=2"):
        sc.nn.linearize(tiny(share=2), draws)
    with pytest.raises(ValueError, match=r"batches\(0\) must answer tokens \(batch, length\), got tuple"):
        sc.nn.linearize(model, lambda step: (draws(step), draws(step)))
    with pytest.raises(sc.NotSupported, match="no causal form"):
        sc.nn.linearize(model, draws, feature="efficient_attention")
    with pytest.raises(sc.NotSupported, match="elsewhere than its input"):
        distil.substitute(sc.nn.Attention(16, 2, "sources(q=layout) + causal"), "linear")


def taught(task: Recall, depth: int, steps: int, seed: int) -> sc.nn.Transformer:
    """A small model that learned recall with softmax, over keys that see their predecessor."""
    torch.manual_seed(seed)
    model = sc.nn.Transformer(task.vocab, 32, depth, 2, "causal + kv_shifting", task.length)
    torch.nn.init.normal_(model.embedding.tokens.weight, std=0.2)
    generator, pairs = torch.Generator().manual_seed(seed), task.pairs

    def loss(step: int) -> Tensor:
        shown = pairs if step > steps // 2 else (pairs // 4, pairs // 2, pairs)[step % 3]
        tokens, targets = task.batch(32, generator, shown)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps, rate=5e-3)
    return model.eval()


def exam(task: Recall) -> Callable[[sc.nn.Transformer], float]:
    """Recall of unseen questions."""
    tokens, targets = task.batch(64, torch.Generator().manual_seed(5))

    def judge(model: sc.nn.Transformer) -> float:
        with torch.no_grad():
            return accuracy(model(tokens), targets)

    return judge


def lessons(task: Recall, seed: int) -> distil.Batches:
    """Tokens of unseen questions, the same for a step whenever it comes."""
    return lambda step: task.batch(32, torch.Generator().manual_seed(seed + step))[0]


def test_alignment_brings_recall_back_and_tells_which_block_to_keep() -> None:
    task = Recall(24, 4, 12, 16, 16)
    judge, batches = exam(task), lessons(task, FRESH)
    model = taught(task, depth=2, steps=250, seed=FRESH)
    whole = judge(model)
    layers = [distil.substitute(b.attention, "hedgehog") for b in model.blocks]
    raw = judge(distil.hybrid(model, layers, ()))
    misses = distil.align(model, layers, batches, steps=60, rate=5e-3)
    assert all(after < before / 3 for before, after in misses)
    costs = distil.importance(model, layers, judge)
    vital = max(range(2), key=lambda n: costs[n])
    linear, with_vital, with_other = (
        judge(distil.hybrid(model, layers, keep)) for keep in ((), (vital,), (1 - vital,))
    )
    assert whole >= 0.97
    assert raw <= 0.6
    assert linear >= 0.8 * whole
    assert with_vital >= 0.98 * whole
    assert with_vital >= with_other


@pytest.mark.slow
def test_a_quarter_of_eight_blocks_keeps_the_recall_that_linear_attention_loses() -> None:
    task = Recall(64, 16, 16, 16, 16)
    judge, batches = exam(task), lessons(task, FRESH)
    model = taught(task, depth=8, steps=400, seed=FRESH)
    whole, said = judge(model), {}
    for feature in ("hedgehog", "linear"):
        layers = [distil.substitute(b.attention, feature) for b in model.blocks]
        distil.align(model, layers, batches, steps=60, rate=5e-3)
        costs = distil.importance(model, layers, judge)
        order = sorted(range(8), key=lambda n: -costs[n])
        hybrids = [distil.hybrid(model, layers, keep) for keep in (order[:2], order[2:4], ())]
        said[feature] = [judge(h) for h in hybrids]
    distil.imitate(hybrids[2], model, batches, steps=60, rate=2e-3)
    tuned = judge(hybrids[2])
    assert whole >= 0.97
    for vital, other, none in said.values():
        assert vital >= 0.97 * whole
        assert vital >= other + 0.1
        assert vital >= none + 0.1
    assert said["hedgehog"][2] >= said["linear"][2] + 0.2
    assert tuned >= said["linear"][2] + 0.1

    sizes = []
    for length in (32, 64):
        _, states = hybrids[0].step(batches(0)[:1, :length], hybrids[0].init_state(1))
        sizes.append([s.nbytes for s in states])
    for n, (short, long) in enumerate(zip(*sizes, strict=True)):
        assert long > 1.9 * short if n in order[:2] else long == short
