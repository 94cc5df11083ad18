"""S054, linearized LLM: chunks that are exact inside, a convolution of values, and drafts verified as a tree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.nn.linearized import Tree
from saccade.tasks.induction import Induction
from saccade.tasks.recall import SILENT, accuracy
from systems.helpers import FRESH, exponent, flops, train

pytestmark = pytest.mark.system("S054")


def layer(width: int = 3, local: str = "relu2", chunk: int = 4) -> sc.nn.LinearizedAttention:
    return sc.nn.LinearizedAttention(16, 2, chunk=chunk, width=width, local=local).double()


def written_out(net: sc.nn.LinearizedAttention, x: Tensor) -> Tensor:
    """Pair by pair: f inside a chunk, the plain product across chunks; then the norm and the convolution."""

    def heads(proj: torch.nn.Linear) -> Tensor:
        return (x @ proj.weight.T).unflatten(-1, (net.heads, -1)).transpose(1, 2)

    q, k, v = heads(net.query_proj), heads(net.key_proj), heads(net.value_proj)
    q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True)) for y in (q, k))
    b, h, n, _ = q.shape
    rows = []
    for s, head, i in itertools.product(range(b), range(h), range(n)):
        out = torch.zeros_like(v[s, head, 0])
        for j in range(i + 1):
            dot = q[s, head, i] @ k[s, head, j]
            if i // net.chunk == j // net.chunk:
                dot = torch.clamp(dot, min=0) ** 2 if net.local == "relu2" else torch.exp(dot)
            out = out + dot * v[s, head, j]
        out = out / torch.sqrt((out * out).mean() + 1e-6) * net.gain[head, 0]
        for t in range(min(net.width, i + 1)):
            out = out + net.taps[head, t] * v[s, head, i - t]
        rows.append(out)
    return torch.stack(rows).view(b, h, n, -1).transpose(1, 2).flatten(2) @ net.out_proj.weight.T


@pytest.mark.parametrize("local", ["relu2", "exp"])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_chunks_equal_the_masked_square_and_its_gradients(width: int, local: str) -> None:
    net = layer(width, local)
    x = torch.randn(2, 13, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in net.parameters() if p.numel())]
    found, expected = net(x), written_out(net, x)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=0)


@pytest.mark.parametrize("local", ["relu2", "exp"])
def test_steps_and_pieces_equal_the_whole_and_the_state_is_bounded(local: str) -> None:
    net, x = layer(3, local), torch.randn(2, 30, 16, dtype=torch.float64)
    for sizes in ([1] * 30, [7, 1, 13, 9], [4, 4, 22]):
        state, outs, held = net.init_state(2), [], []
        for piece in x.split(sizes, 1):
            out, state = net.step(piece, state)
            outs.append(out)
            held.append(state.nbytes)
        torch.testing.assert_close(torch.cat(outs, 1), net(x), atol=1e-10, rtol=0)
        assert state.length == 30
        assert max(held) <= 2 * 2 * (8 * 8 + 2 * 4 * 8 + 2 * 8) * 8


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    net, x = layer(), torch.randn(1, 20, 16, dtype=torch.float64)
    before = net(x)
    for t in (1, 8, 19):
        other = torch.cat((x[:, :t], 10 * torch.randn_like(x[:, t:])), 1)
        assert torch.equal(net(other)[:, :t], before[:, :t])


def test_padding_reaches_nothing() -> None:
    net, x = layer(), torch.randn(2, 11, 16, dtype=torch.float64)
    x[1, 6:] = math.nan
    found = net(x, key_lengths=torch.tensor([11, 6]))
    torch.testing.assert_close(found[1:, :6], net(x[1:, :6]), atol=1e-12, rtol=0)
    assert bool(torch.isfinite(found).all())


def test_bfloat16_stays_near() -> None:
    net, x = layer(), torch.randn(2, 50, 16, dtype=torch.float64)
    wanted = net(x)
    found = net.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).abs().max() < 0.05 * wanted.abs().max()


TREE: Tree = ([3, 1, 4, 1, 5, 2, 6], [-1, 0, 0, 1, 3, -1, 5])


def lines(parents: list[int]) -> list[list[int]]:
    """For each draft the path that leads to it."""
    found: list[list[int]] = []
    for n, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), n])
    return found


@pytest.mark.parametrize("seen", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("local", ["relu2", "exp"])
def test_each_branch_of_a_tree_is_what_it_would_be_alone(seen: int, local: str) -> None:
    """Branches of up to four drafts, so that some cross into a new chunk of 4."""
    model = sc.nn.LinearizedTransformer(9, 16, 2, 2, chunk=4, width=3, local=local).double()
    torch.nn.init.normal_(model.tokens.weight)
    _, states = model.step(torch.randint(9, (1, seen)), model.init_state(1))
    guesses, parents = TREE
    logits, kept = model.tree(torch.tensor([guesses]), parents, states)
    for n, path in enumerate(lines(parents)):
        alone, after = model.step(torch.tensor([[guesses[p] for p in path]]), states)
        torch.testing.assert_close(logits[:, n], alone[:, -1], atol=1e-10, rtol=0)
        for net, (k, v), state, wanted in zip(model.layers, kept, states, after, strict=True):
            absorbed = net.absorb(k[:, :, path], v[:, :, path], state)
            assert absorbed.length == wanted.length
            for name, x in wanted.tensors.items():
                torch.testing.assert_close(absorbed.tensors[name], x, atol=1e-10, rtol=0)


def greedy(model: sc.nn.LinearizedTransformer, prompt: list[int], length: int) -> list[int]:
    logits, states = model.step(torch.tensor([prompt]), model.init_state(1))
    found = [int(logits[0, -1].argmax())]
    while len(found) < length:
        logits, states = model.step(torch.tensor([found[-1:]]), states)
        found.append(int(logits[0, -1].argmax()))
    return found


def test_accepted_text_is_greedy_text_in_fewer_passes() -> None:
    model = sc.nn.LinearizedTransformer(9, 16, 2, 2, chunk=4, width=3).double()
    torch.nn.init.normal_(model.tokens.weight)
    prompt = [1, 5, 2]
    with torch.no_grad():
        wanted = greedy(model, prompt, 24)
    truth = prompt + wanted

    def knowing(text: list[int]) -> Tree:
        """A wrong guess, and beside it the next three tokens, of which the third is wrong at every other place."""
        right = (truth + [0] * 3)[len(text) : len(text) + 3]
        right[2] = (right[2] + len(text) % 2) % 9
        return [(right[0] + 1) % 9, *right], [-1, -1, 1, 2]

    def wrong(text: list[int]) -> Tree:
        return [(([*truth, 0])[len(text)] + 1) % 9], [-1]

    for draft, passes in ((knowing, 12), (wrong, 24), (lambda text: ([], []), 24)):
        found, taken = model.speculate(prompt, 24, draft)
        assert found == wanted
        assert taken <= passes
    assert model.speculate(prompt, 24, wrong)[1] == 24


def test_what_is_refused() -> None:
    net, x = layer(), torch.randn(1, 2, 16, dtype=torch.float64)
    for options, words in (
        ({"dim": 15}, "multiple of heads=2"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"width": -1}, "width at least 0"),
        ({"local": "softmax"}, "local must be relu2 or exp, got 'softmax'"),
    ):
        with pytest.raises(ValueError, match=words):
            sc.nn.LinearizedAttention(**{"dim": 16, "heads": 2} | options)
    for state in (net.init_state(2), layer(chunk=4).float().init_state(1), sc.State()):
        with pytest.raises(ValueError, match=r"the state should hold s .* start from init_state"):
            net.step(x, state)
    for parents in ([-1], [0, -1], [-1, 1], [-1, -2]):
        with pytest.raises(ValueError, match="names an earlier draft as its parent, or -1"):
            net.tree(x, parents, net.init_state(1))
    with pytest.raises(ValueError, match="a prompt of at least one token"):
        sc.nn.LinearizedTransformer(4, 8, 1, 1).speculate([], 3, lambda text: ([], []))


def test_work_grows_with_the_length() -> None:
    net = sc.nn.LinearizedAttention(32, 2)
    lengths = [1024, 2048, 4096, 8192]
    costs = [float(flops(lambda n=n: net(torch.zeros(1, n, 32)))) for n in lengths]
    assert exponent(lengths, costs) <= 1.02


def induced(width: int, seed: int, steps: int = 250) -> tuple[float, float]:
    """Loss and accuracy in the second copy of a random string, after training on such strings."""
    torch.manual_seed(seed)
    task, generator = Induction(24, symbols=16, repeated=True), torch.Generator().manual_seed(seed)
    model = sc.nn.LinearizedTransformer(task.vocab, 32, 2, 2, chunk=8, width=width)
    torch.nn.init.normal_(model.tokens.weight, std=0.2)

    def loss(step: int) -> Tensor:
        tokens, targets = task.batch(32, generator)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    last = train(model.parameters(), loss, steps, rate=1e-2)
    tokens, targets = task.batch(128, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return last, accuracy(model(tokens), targets)


def test_the_convolution_lowers_the_loss_of_induction() -> None:
    with_it, without = induced(3, FRESH, 150), induced(0, FRESH, 150)
    assert with_it[0] <= without[0] - 0.1
    assert with_it[1] > without[1]


@pytest.mark.slow
def test_the_convolution_makes_induction_possible() -> None:
    for n in range(3):
        with_it, without = induced(3, FRESH + n), induced(0, FRESH + n)
        assert with_it[0] <= without[0] - 0.5
        assert with_it[1] >= without[1] + 0.3
