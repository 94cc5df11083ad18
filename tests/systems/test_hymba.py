"""S227, Hymba: attention heads and state-space heads side by side, behind meta tokens, with shared keys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import saccade as sc
from saccade.kernels.selective import selective_scan
from saccade.nn.hymba import HymbaMixer, SelectiveHeads
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import FRESH, train

pytestmark = pytest.mark.system("S227")
WIDE = torch.float64


def scanned(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence number by number."""
    y = torch.zeros_like(x)
    rows = []
    for b in range(x.shape[0]):
        last = []
        for c in range(x.shape[2]):
            for n in range(rate.shape[1]):
                s = h[b, c, n]
                for t in range(x.shape[1]):
                    s = (
                        torch.exp(step[b, t, c] * rate[c, n]) * s
                        + step[b, t, c] * write[b, t, n] * x[b, t, c]
                    )
                    one = torch.zeros_like(y)
                    one[b, t, c] = 1
                    y = y + one * s * read[b, t, n]
                last.append(s)
        rows.append(torch.stack(last).view(x.shape[2], -1))
    return y, torch.stack(rows)


def drawn(batch: int, n: int, channels: int, numbers: int) -> list[Tensor]:
    """x, step, rate, write, read and a state."""
    return [
        torch.randn(batch, n, channels, dtype=WIDE),
        F.softplus(torch.randn(batch, n, channels, dtype=WIDE)),
        -torch.exp(torch.randn(channels, numbers, dtype=WIDE)),
        torch.randn(batch, n, numbers, dtype=WIDE),
        torch.randn(batch, n, numbers, dtype=WIDE),
        torch.randn(batch, channels, numbers, dtype=WIDE),
    ]


@pytest.mark.parametrize("chunk", [1, 3, 8, 50])
def test_the_chunked_scan_equals_the_recurrence_and_its_gradients(chunk: int) -> None:
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in drawn(2, 11, 3, 2)]
    found, expected = selective_scan(*inputs, chunk=chunk), scanned(*inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    grads = [torch.autograd.grad(y.sin().sum() + h.cos().sum(), inputs) for y, h in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_scan_equals_its_steps() -> None:
    *inputs, h = drawn(2, 37, 5, 4)
    x, step, rate, write, read = inputs
    y, last = selective_scan(x, step, rate, write, read, h)
    for t in range(37):
        cut = slice(t, t + 1)
        one, h = selective_scan(x[:, cut], step[:, cut], rate, write[:, cut], read[:, cut], h)
        torch.testing.assert_close(one, y[:, cut], atol=1e-10, rtol=0)
    torch.testing.assert_close(h, last, atol=1e-10, rtol=0)


def test_long_steps_forget_and_do_not_overflow() -> None:
    x, step, rate, write, read, _ = (t.float() for t in drawn(1, 64, 4, 3))
    leaves = [x.requires_grad_(), (1000 * step).requires_grad_()]
    y, h = selective_scan(leaves[0], leaves[1], rate * 100, write, read)
    grads = torch.autograd.grad(y.sum() + h.sum(), leaves)
    assert all(bool(torch.isfinite(t).all()) for t in (y, h, *grads))
    torch.testing.assert_close(y, leaves[1] * x * (write * read).sum(-1, keepdim=True), rtol=1e-5, atol=1e-2)


def test_a_token_of_step_zero_leaves_the_state() -> None:
    x, step, rate, write, read, h = drawn(1, 9, 3, 2)
    step[:, 4:] = 0
    _, last = selective_scan(x, step, rate, write, read, h)
    _, short = selective_scan(x[:, :4], step[:, :4], rate, write[:, :4], read[:, :4], h)
    torch.testing.assert_close(last, short, atol=1e-12, rtol=0)
    empty, same = selective_scan(x[:, :0], step[:, :0], rate, write[:, :0], read[:, :0], h)
    assert empty.shape == (1, 0, 3)
    assert torch.equal(same, h)


def test_what_the_scan_refuses() -> None:
    x, step, rate, write, read, h = drawn(1, 5, 3, 2)
    for bad in ((x, step, -rate, write, read), (x, -step, rate, write, read)):
        with pytest.raises(ValueError, match="steps are at least 0 and rates at most 0"):
            selective_scan(*bad)
    with pytest.raises(
        ValueError, match=r"rate \(C, N\); got x, step, rate \(1, 5, 3\), \(1, 5, 3\), \(2, 3\)"
    ):
        selective_scan(x, step, rate.T, write, read)
    with pytest.raises(ValueError, match=r"write and read must be \(1, 5, 2\)"):
        selective_scan(x, step, rate, write[:, :4], read)
    with pytest.raises(ValueError, match=r"the state must be \(1, 3, 2\), got \(1, 2, 3\)"):
        selective_scan(x, step, rate, write, read, h.mT)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        selective_scan(x, step, rate, write, read, chunk=0)


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x: Tensor) -> Tensor:
    """x (B, H, n, d) turned pair by pair."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** -(torch.arange(half, dtype=WIDE) / half)
    angle = torch.arange(x.shape[2], dtype=WIDE)[:, None] * rates
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attention_branch(m: HymbaMixer, x: Tensor) -> Tensor:
    """Windowed attention with a prefix that all read, pair by pair."""
    batch, n = x.shape[:2]
    q = rotated(m.in_proj(x).chunk(3, -1)[0].view(batch, n, m.heads, -1).transpose(1, 2))
    k, v = (y.view(batch, n, m.kv, -1).transpose(1, 2) for y in m.kv_proj(x).chunk(2, -1))
    k, v = (y.repeat_interleave(m.heads // m.kv, 1) for y in (rotated(k), v))
    i, j = torch.arange(n)[:, None], torch.arange(n)
    near = (j <= i) & ((i - j < m.window) | (j < m.meta)) if m.window else j <= i
    w = torch.softmax((q @ k.mT / math.sqrt(m.head_dim)).masked_fill(~near, -math.inf), -1)
    return (w @ v).transpose(1, 2).flatten(2)


def ssm_branch(m: HymbaMixer, x: Tensor) -> Tensor:
    """The state-space heads: convolution by hand, then the recurrence token by token."""
    _, inner, gate = m.in_proj(x).chunk(3, -1)
    s, taps = m.ssm, m.ssm.filters.shape[1]
    padded = F.pad(inner, (0, 0, taps - 1, 0))
    mixed = s.filter_bias + sum(s.filters[:, t] * padded[:, t : t + x.shape[1]] for t in range(taps))
    mixed = mixed * mixed.sigmoid()
    low, write, read = s.select(mixed).split(s.sizes, -1)
    step = torch.log1p(torch.exp(s.step(low)))
    h, rows = x.new_zeros(len(x), *s.log_rate.shape), []
    for t in range(x.shape[1]):
        fade = torch.exp(-step[:, t, :, None] * s.log_rate.exp())
        h = fade * h + (step * mixed)[:, t, :, None] * write[:, t, None]
        rows.append((h * read[:, t, None]).sum(-1) + s.skip * mixed[:, t])
    return torch.stack(rows, 1) * gate * gate.sigmoid()


@pytest.mark.parametrize(("window", "meta"), [(None, 0), (5, 3), (4, 0)])
def test_the_mixer_equals_its_formula_and_each_branch_alone(window: int | None, meta: int) -> None:
    m = HymbaMixer(16, 4, kv=2, window=window, meta=meta, state=3).double()
    nn.init.normal_(m.attention_scale)
    nn.init.normal_(m.ssm_scale)
    x = torch.randn(2, 19, 16, dtype=WIDE)
    a, s = attention_branch(m, x), ssm_branch(m, x)
    b1, b2 = m.attention_scale.detach().clone(), m.ssm_scale.detach().clone()
    torch.testing.assert_close(m(x)[0], m.out_proj(b1 * normed(a) + b2 * normed(s)), atol=1e-10, rtol=0)
    m.ssm_scale.data.zero_()
    torch.testing.assert_close(m(x)[0], m.out_proj(b1 * normed(a)), atol=1e-10, rtol=0)
    m.attention_scale.data.zero_()
    m.ssm_scale.data.copy_(b2)
    torch.testing.assert_close(m(x)[0], m.out_proj(b2 * normed(s)), atol=1e-10, rtol=0)


def model(depth: int = 6, share: int = 2, window: int = 5, meta: int = 3) -> sc.nn.Hymba:
    torch.manual_seed(0)
    found = sc.nn.Hymba(11, 16, depth, heads=4, kv=2, window=window, meta=meta, state=3, share=share).double()
    nn.init.normal_(found.meta)
    nn.init.normal_(found.tokens.weight)
    return found


@pytest.mark.parametrize("share", [1, 2, 3])
def test_prefix_and_decoding_equal_the_whole_call_with_shared_keys(share: int) -> None:
    m, tokens = model(depth=9, share=share), torch.randint(11, (2, 23))
    whole = m(tokens)
    first, state = m.step(tokens[:, :9], m.init_state(2))
    outs = [first]
    for t in range(9, 23):
        out, state = m.step(tokens[:, t : t + 1], state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-10, rtol=0)
    one, state = m.step(tokens[:, :1], m.init_state(2))
    rest, _ = m.step(tokens[:, 1:], state)
    torch.testing.assert_close(torch.cat((one, rest), 1), whole, atol=1e-10, rtol=0)


def test_blocks_share_keys_in_runs_between_those_that_read_all() -> None:
    mixers = [b.mixer for b in model(depth=9, share=2).blocks]
    assert [m.window for m in mixers] == [None, 5, 5, 5, None, 5, 5, 5, None]
    assert [m.borrows for m in mixers] == [False, False, True, False, False, False, True, False, False]
    assert all((m.kv_proj is None) == m.borrows for m in mixers)


def test_a_borrower_reads_its_owners_keys() -> None:
    owner, borrower = HymbaMixer(16, 2, window=4), HymbaMixer(16, 2, window=4, borrows=True)
    x = torch.randn(1, 9, 16)
    kv = owner.keys_values(x)
    alone = HymbaMixer(16, 2, window=4)
    alone.load_state_dict(borrower.state_dict() | {"kv_proj.weight": owner.kv_proj.weight})
    torch.testing.assert_close(borrower(x, kv=kv)[0], alone(x)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [0, 1, 2, 4, 5, 40])
def test_the_state_takes_the_bytes_of_the_formula(length: int) -> None:
    m = model(depth=6, share=2)
    state = m.init_state(1)
    if length:
        state = m.step(torch.randint(11, (1, length)), state)[1]
    assert state.nbytes == m.state_bytes(length)
    whole, windows, head = (
        3,
        2,
        2 * 2 * 4 * 8,
    )  # blocks 0, 2 and 5 read all; 1 and 3 own keys, 4 borrows those of 3
    rows = whole * (3 + length) + windows * min(3 + length, 3 + 5 - 1)
    assert state.nbytes == head * rows + 6 * 16 * (3 + 3) * 8


def test_meta_tokens_are_read_from_beyond_the_window() -> None:
    mixer = HymbaMixer(16, 2, window=4, meta=2, state=2).double()
    mixer.ssm_scale.data.zero_()
    x = torch.randn(1, 30, 16, dtype=WIDE)
    moved = x.clone()
    moved[:, :2] += 1
    assert (mixer(moved)[0] - mixer(x)[0])[:, 20:].abs().amax(-1).min() > 1e-6
    moved = x.clone()
    moved[:, 2:16] += 1
    torch.testing.assert_close(mixer(moved)[0][:, 20:], mixer(x)[0][:, 20:], atol=1e-12, rtol=0)


def test_later_tokens_and_padding_do_not_matter() -> None:
    m, tokens = model(), torch.randint(11, (2, 20))
    first = m(tokens)
    other = tokens.clone()
    other[:, 13:] = (other[:, 13:] + 1) % 11
    torch.testing.assert_close(m(other)[:, :13], first[:, :13], atol=1e-12, rtol=0)
    ragged = m(tokens, torch.tensor([20, 7]))
    torch.testing.assert_close(ragged[1, :7], m(tokens[1:, :7])[0], atol=1e-10, rtol=0)
    mixer = HymbaMixer(16, 2, window=4, meta=2).double()
    x = torch.randn(2, 12, 16, dtype=WIDE)
    alone = mixer(x[1:, :5])[0]
    x[1, 5:] = math.nan
    found = mixer(x, key_lengths=torch.tensor([12, 5]))[0]
    torch.testing.assert_close(found[1:, :5], alone, atol=1e-10, rtol=0)
    grads = torch.autograd.grad(found[1, :5].sum(), list(mixer.parameters()), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)


def test_what_is_refused_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="dim=10 must be a multiple of heads=4, or give head_dim"):
        HymbaMixer(10, 4)
    with pytest.raises(ValueError, match="window must be at least 1 and meta at least 0, got 0 and 0"):
        HymbaMixer(16, 4, window=0)
    with pytest.raises(ValueError, match="kv must divide the heads and head_dim be even"):
        HymbaMixer(16, 4, kv=3)
    with pytest.raises(ValueError, match=r"kv=owner.keys_values"):
        HymbaMixer(16, 4, borrows=True)(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="depth, share and meta must be at least 1, got 3, 0 and 16"):
        sc.nn.Hymba(8, 16, 3, 2, share=0)
    with pytest.raises(ValueError, match="width, state, taps and rank must be at least 1"):
        SelectiveHeads(8, state=0)


TASK = Recall(20, pairs=2, queries=8, keys=4, values=4)
WINDOW = 4


class Scan(nn.Module):
    """A state-space layer alone."""

    def __init__(self, dim: int, width: int, state: int) -> None:
        super().__init__()
        self.inside, self.ssm = nn.Linear(dim, 2 * width, bias=False), SelectiveHeads(width, state=state)
        self.outside = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.ssm(*self.inside(x).chunk(2, -1))[0])


class Hybrid(HymbaMixer):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


class Recaller(nn.Module):
    """Two pre-norm layers of one kind, without feed-forward parts."""

    def __init__(self, dim: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TASK.vocab, dim)
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.norms[2](x) @ self.tokens.weight.T


def recalled(kind: str, steps: int, seed: int, dim: int = 32) -> tuple[float, int]:
    """Accuracy of a model in recalling pairs from beyond its window, and its number of parameters."""
    torch.manual_seed(seed)
    makers: dict[str, Callable[[], nn.Module]] = {
        "hybrid": lambda: Hybrid(dim, 2, window=WINDOW, state=8),
        "scan": lambda: Scan(dim, 55, state=8),
        "window": lambda: sc.nn.Attention(dim, 2, f"rope + window({WINDOW})", head_dim=28),
    }
    found = Recaller(dim, makers[kind])
    nn.init.normal_(found.tokens.weight, std=dim**-0.5)
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        tokens, targets = TASK.batch(32, generator)
        return F.cross_entropy(found(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(found.parameters(), loss, steps, 2e-2)
    with torch.no_grad():
        tokens, targets = TASK.batch(256, torch.Generator().manual_seed(seed + 1))
        return accuracy(found(tokens), targets), sum(p.numel() for p in found.parameters())


def test_state_space_heads_recall_what_the_window_does_not_reach() -> None:
    (hybrid, _), (window, _) = (recalled(kind, 300, FRESH) for kind in ("hybrid", "window"))
    assert TASK.beyond > 2 * (WINDOW - 1)
    assert window < 0.35
    assert hybrid > window + 0.1


@pytest.mark.slow
def test_hybrid_heads_recall_no_worse_than_either_kind_alone() -> None:
    """Three models of as many parameters, within 3.5 percent."""
    found = {kind: recalled(kind, 500, FRESH) for kind in ("hybrid", "scan", "window")}
    sizes = [size for _, size in found.values()]
    assert max(sizes) <= 1.035 * min(sizes)
    assert found["hybrid"][0] >= found["scan"][0] - 0.01
    assert found["hybrid"][0] > 0.9 > 0.35 > found["window"][0]
