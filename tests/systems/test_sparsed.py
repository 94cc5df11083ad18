"""S285, SparseD: a text is denoised with blocks of pairs that were chosen once, early on."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.nn.diffusion import Choices, Generated, fill, overlap
from saccade.parts.selection import Blocks
from saccade.tasks.dyck import Dyck
from systems.helpers import qkv, train

pytestmark = pytest.mark.system("S285")


def written_out(q: Tensor, k: Tensor, block: int, keep: int, keep_prompt: int, prompt: int) -> Tensor:
    """Which blocks (h, N, U) SparseD keeps: those of the largest mean weight, in the prompt and in the rest."""
    h, n = q.shape[1:3]
    w = torch.softmax(q[0] @ k[0].repeat_interleave(h // k.shape[1], 0).mT / q.shape[-1] ** 0.5, -1)
    units = -(-n // block)
    kept = torch.zeros(h, units, units, dtype=torch.bool)
    for head in range(h):
        for row in range(units):
            rows = range(row * block, min(n, (row + 1) * block))
            mean = []
            for u in range(units):
                cols = range(u * block, min(n, (u + 1) * block))
                mean.append(sum(float(w[head, i, j]) for i in rows for j in cols) / (len(rows) * len(cols)))
            for part, count in ((range(prompt), keep_prompt), (range(prompt, units), keep)):
                for u in sorted(part, key=lambda u: -mean[u])[:count]:
                    kept[head, row, u] = True
    return kept


@pytest.mark.parametrize(("prompt", "sides"), [(0, (4, 0)), (16, (3, 2)), (13, (3, 2))])
def test_blocks_of_prompt_and_text_are_chosen_apart(prompt: int, sides: tuple[int, int]) -> None:
    q, k, v = qkv(1, 4, 50, 8, kv=2)  # 13 blocks of 4: 4 of 13, or 2 of 4 and 3 of 9
    chosen = sc.attend(q, k, v, f"sparsed(4, keep=0.3, prompt={prompt})", need=("selection",)).selection
    assert isinstance(chosen, Blocks)
    assert chosen.rows == chosen.size == 4
    found = torch.zeros(4, 13, 13, dtype=torch.uint8)
    found.scatter_reduce_(-1, chosen.index[0], chosen.valid[0].byte(), "amax")
    assert torch.equal(found.bool(), written_out(q, k, 4, *sides, -(-prompt // 4)))


def model(length: int = 24, seed: int = 0) -> sc.nn.MaskedDiffusion:
    torch.manual_seed(seed)
    made = sc.nn.MaskedDiffusion(4, 32, 2, 4, length)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.eval()


def start(m: sc.nn.MaskedDiffusion, rows: int = 3, length: int = 24, prompt: int = 8) -> Tensor:
    tokens = torch.randint(4, (rows, length), generator=torch.Generator().manual_seed(1))
    tokens[:, prompt:] = m.mask
    return tokens


@pytest.mark.parametrize("steps", [5, 16, 40])
@pytest.mark.parametrize("seed", [None, 3])
def test_everything_kept_is_dense_sampling_token_for_token(steps: int, seed: int | None) -> None:
    m = model()

    def run(sparse: str | None) -> Generated:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return m.generate(start(m), steps, sparse=sparse, generator=generator)

    dense, whole, few = run(None), run("sparsed(4, keep=1.0, prompt=8)"), run("sparsed(4, keep=0.2)")
    assert torch.equal(dense.tokens, whole.tokens)
    assert seed is None or not torch.equal(dense.tokens, few.tokens)
    assert torch.equal(dense.tokens[:, :8], start(m)[:, :8])
    assert not (dense.tokens == m.mask).any()
    assert dense.choices is None
    assert whole.choices.built == few.choices.built == 1
    assert len(few.choices.layers) == 2


@pytest.mark.parametrize(("skip", "dense_steps"), [(0.0, 0), (0.2, 2), (0.25, 2), (0.3, 3), (1.0, 8)])
def test_the_choice_is_made_at_the_switch_and_replayed(
    monkeypatch: pytest.MonkeyPatch, skip: float, dense_steps: int
) -> None:
    m, seen = model(), []
    forward = m.forward

    def watched(tokens: Tensor, mechanism: str = "full", choices: Choices | None = None) -> Tensor:
        seen.append((str(mechanism), 0 if choices is None else choices.built))
        return forward(tokens, mechanism, choices)

    monkeypatch.setattr(m, "forward", watched)
    found = m.generate(start(m), 8, sparse="sparsed(4)", skip=skip)
    sparse_steps = 8 - dense_steps
    assert seen[:dense_steps] == [("full", 0)] * dense_steps
    assert [n for n, _ in seen[dense_steps:]] == ["sparsed(block=4)"] * sparse_steps
    assert [n for _, n in seen[dense_steps:]] == [0, *[1] * (sparse_steps - 1)][:sparse_steps]
    assert (found.choices is None) == (sparse_steps == 0)


def test_replayed_blocks_are_those_of_the_first_sparse_step() -> None:
    m, other = model(), start(model())
    other[:, 8:] = 2
    choices = Choices()
    m(start(m), "sparsed(4)", choices)
    kept = list(choices.layers)
    replayed = m(other, "sparsed(4)", choices)
    assert choices.layers == kept
    assert choices.built == 1
    assert not torch.equal(replayed, m(other, "sparsed(4)", Choices()))


def test_the_surest_masks_are_filled() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (5, 9), generator=generator)
    tokens[torch.rand(5, 9, generator=generator) < 0.6] = 4
    tokens[4] = 1
    logits = torch.randn(5, 9, 4, generator=generator)
    for left in (1, 2, 3, 20):
        found = fill(tokens, logits, 4, left, None)
        for b in range(5):
            open_ = [i for i in range(9) if tokens[b, i] == 4]
            count = -(-len(open_) // left)
            sure = sorted(open_, key=lambda i: -float(logits[b, i].softmax(0).max()))[:count]
            for i in range(9):
                wanted = int(logits[b, i].argmax()) if i in sure else int(tokens[b, i])
                assert int(found[b, i]) == wanted


def test_drawn_tokens_follow_the_odds() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5]).expand(1, 20000, 4)
    drawn = fill(torch.full((1, 20000), 4), logits, 4, 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        drawn[0].bincount(minlength=4) / 20000, logits[0, 0].softmax(0), atol=0.02, rtol=0
    )


def test_the_loss_weighs_masked_tokens_by_the_share_that_was_masked() -> None:
    m, tokens = model(), torch.randint(4, (6, 24), generator=torch.Generator().manual_seed(2))
    found = m.loss(tokens, torch.Generator().manual_seed(5), prompt=8)
    generator = torch.Generator().manual_seed(5)
    first = float(torch.rand(1, generator=generator))
    draws = torch.rand(6, 24, generator=generator)
    total = 0.0
    for b in range(6):
        t = max((first + b / 6) % 1, 1 / 24)
        gone = [i for i in range(8, 24) if float(draws[b, i]) < t]
        noisy = tokens[b].clone()
        noisy[gone] = m.mask
        logits = m(noisy[None])[0]
        total += sum(float(F.cross_entropy(logits[i], tokens[b, i]).detach()) for i in gone) / t / (6 * 16)
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_what_cannot_be_replayed_is_refused() -> None:
    m = model()
    with pytest.raises(ValueError, match="must choose pairs by content"):
        m.generate(start(m), 4, sparse="window(4)")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        m.generate(start(m), 0)
    with pytest.raises(ValueError, match="skip in"):
        m.generate(start(m), 4, skip=1.5)


class Nest(Dyck):
    """Balanced brackets of one nest: every bracket closes at its mirror place."""

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        opened = torch.randint(self.kinds, (size, self.length // 2), generator=generator)
        tokens = torch.cat((opened, opened.flip(1) + self.kinds), 1)
        return tokens, tokens


LENGTH, PROMPT, WINDOW = 40, 20, 13
SPARSE = f"sparsed(2, keep=0.3, prompt={PROMPT})"


def trained(task: Dyck, depth: int, heads: int, steps: int) -> sc.nn.MaskedDiffusion:
    torch.manual_seed(0)
    m = sc.nn.MaskedDiffusion(task.vocab, 48, depth, heads, LENGTH)
    for table in (m.encoder.embedding.tokens, m.encoder.embedding.positions):
        torch.nn.init.normal_(table.weight, std=0.3)
    g = torch.Generator().manual_seed(0)
    train(m.parameters(), lambda _: m.loss(task.batch(32, g)[0], g, PROMPT), steps, rate=4e-3)
    return m


def validity(m: sc.nn.MaskedDiffusion, task: Dyck) -> tuple[float, float, float, float]:
    """Shares of balanced texts: dense, sparse, and a window of the same density; and how many choices of the end were made at 20%."""
    tokens, _ = task.batch(200, torch.Generator().manual_seed(1))
    tokens[:, PROMPT:] = m.mask
    steps = LENGTH - PROMPT
    draw = functools.partial(torch.Generator().manual_seed, 2)
    rates = [
        float(task.balanced(m.generate(tokens, steps, sparse=s, generator=draw()).tokens).float().mean())
        for s in (None, SPARSE)
    ]
    with torch.no_grad():
        generator, x = draw(), tokens
        for step in range(steps):
            text = "full" if step < 0.2 * steps else f"neighborhood({WINDOW})"
            x = fill(x, m(x, text), m.mask, steps - step, generator)
        rates.append(float(task.balanced(x).float().mean()))
        generator, x, early, late = draw(), tokens, Choices(), Choices()
        for step in range(steps):
            if step == steps // 5:
                m(x, SPARSE, early)
            x = fill(x, m(x), m.mask, steps - step, generator)
        m(x, SPARSE, late)
    pairs = list(zip(early.layers, late.layers, strict=True))
    return rates[0], rates[1], rates[2], sum(overlap(a, b) for a, b in pairs) / len(pairs)


def test_brackets_that_close_far_away_need_three_tenths_of_the_blocks_and_no_window() -> None:
    task = Nest(LENGTH, kinds=3, depth=LENGTH // 2)
    dense, sparse, window, same = validity(trained(task, 1, 2, 250), task)
    assert dense >= 0.97
    assert sparse >= dense - 0.02
    assert window <= sparse - 0.5
    assert same > 2 * 0.3


@pytest.mark.slow
def test_heads_that_count_lose_what_the_choice_leaves_out() -> None:
    task = Dyck(LENGTH, kinds=1, depth=6)
    dense, sparse, window, _ = validity(trained(task, 2, 2, 300), task)
    assert dense >= 0.8
    assert max(window, sparse) < dense - 0.3
