"""S189, SparseK: a learned score keeps a few keys for all later queries, and its projection gates their values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.sparsek import over_prefixes, sparsek_weights, threshold
from saccade.systems.sparsek import Kept
from saccade.tasks.recall import SILENT, Recall, accuracy
from systems.helpers import below, dense, qkv, train

pytestmark = pytest.mark.system("S189")


def bisected(u: Tensor, count: int) -> float:
    """tau of a list of scores by halving a bracket."""
    low, high = float(u.min()) - 1, float(u.max())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((u - middle).clamp(0, 1).sum()) > count else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("whole", [False, True])
def test_the_projection_equals_bisection_and_sums_to_k(scale: float, whole: bool) -> None:
    for n in range(1, 40):
        u = torch.randn(n, dtype=torch.float64) * scale
        u = u.round() if whole else u
        for count in {1, 2, n // 2, n - 1, n, n + 3} - {0}:
            m = sparsek_weights(u, count)
            assert float(m.sum()) == pytest.approx(min(n, count), abs=1e-9)
            if count >= n:
                assert (m == 1).all()
            else:
                wanted = (u - bisected(u, count)).clamp(0, 1)
                torch.testing.assert_close(m, wanted, atol=1e-6, rtol=0)


def test_the_projection_is_the_nearest_allowed_point() -> None:
    u = torch.randn(12, dtype=torch.float64) * 2
    m = sparsek_weights(u, 4)
    for _ in range(200):
        other = torch.rand(12, dtype=torch.float64)
        other = sparsek_weights(other * 5, 4)
        assert (m - u).norm() <= (other - u).norm() + 1e-12


def test_gradients_of_the_projection() -> None:
    u = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sparsek_weights(x, 3), u)


@pytest.mark.parametrize("count", [1, 5, 30])
def test_the_running_top_k_equals_topk_of_every_prefix(count: int) -> None:
    u = torch.randn(3, 200, dtype=torch.float64)

    def least(best: Tensor, open_: Tensor) -> Tensor:
        at = (open_.cumsum(-1) < count).sum(-1)
        return F.pad(best, (0, 1), value=-torch.inf).gather(-1, at)

    found = over_prefixes(u, 0, least)
    for i in range(200):
        wanted = u[:, : i + 1].topk(count).values[:, -1] if i + 1 >= count else torch.tensor(-torch.inf)
        assert torch.equal(found[:, i], wanted.expand(3).double())


def written_out(q: Tensor, k: Tensor, v: Tensor, w: Tensor, top: int, window: int) -> Tensor:
    """SparseK row by row, with torch.topk and bisection on each prefix."""
    rows = []
    for i in range(q.shape[2]):
        heads = []
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            u = torch.stack([w[g] @ torch.cat((k[0, g, j], v[0, g, j])) for j in range(i + 1)])
            near, far = list(range(max(0, i - window + 1), i + 1)), max(0, i - window + 1)
            kept = u[:far].topk(min(top, far)).indices.tolist()
            gate = [1.0] * far
            if far > top:
                active = u[:far].detach()
                tau = bisected(active, top)
                support = (active > tau) & (active < tau + 1)
                ones = int((active >= tau + 1).sum())
                exact = (u[:far][support].sum() + ones - top) / max(1, int(support.sum()))
                gate = [
                    (u[j] - exact).clamp(0, 1) if bool(support.any()) else (u[j] > tau) * 1.0
                    for j in range(far)
                ]
            keys = [*kept, *near]
            p = torch.softmax(k[0, g, keys] @ q[0, h, i] / q.shape[-1] ** 0.5, 0)
            heads.append(sum(p[n] * (gate[j] if j < far else 1.0) * v[0, g, j] for n, j in enumerate(keys)))
        rows.append(torch.stack(heads))
    return torch.stack(rows, 1)[None]


@pytest.mark.parametrize(("top", "window"), [(3, 4), (1, 1), (6, 2)])
def test_attention_and_its_gradients_equal_the_formula(top: int, window: int) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 4, 20, 6, kv=2))
    w = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    found = sc.attend(q, k, v, f"sparsek({top}, window={window})", params={"key_scorer": w})
    wanted = written_out(q, k, v, w, top, window)
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v, w)) for x in (found, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("length", [1, 9, 70])
def test_enough_keys_are_full_causal_attention(length: int) -> None:
    q, k, v = qkv(2, 4, length, 8, kv=2)
    w = torch.randn(2, 16, dtype=torch.float64)
    for top, window in ((length, 1), (max(1, length - 4), 4), (1, length)):
        found = sc.attend(q, k, v, f"sparsek({top}, window={window})", params={"key_scorer": w})
        torch.testing.assert_close(found, dense(q, k, v, below(length)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("ties", [False, True])
def test_a_key_that_was_let_go_never_returns(ties: bool) -> None:
    q, k, v = qkv(2, 4, 150, 8, kv=2)
    w = torch.randn(2, 16, dtype=torch.float64)
    if ties:
        k, v, w = k.sign(), v.sign(), w.sign()
    chosen = sc.attend(
        q, k, v, "sparsek(6, window=5)", params={"key_scorer": w}, need=("selection",)
    ).selection
    j = torch.arange(150)
    read = chosen.exist(slice(0, 150), j[None, None, None], j)
    assert torch.equal(read.sum(-1)[0, 0], (j - 4).clamp(0, 6))
    outside = j[:, None] >= j + 5
    returned = read[:, :, 1:] & ~read[:, :, :-1] & outside[:-1]
    assert not returned.any()


@pytest.mark.parametrize("ties", [False, True])
def test_decoding_from_a_heap_equals_the_whole_call_in_constant_memory(ties: bool) -> None:
    q, k, v = qkv(2, 4, 90, 8, kv=2)
    w = torch.randn(2, 16, dtype=torch.float64)
    if ties:
        k, v, w = k.round(), v.round(), w.round()
    whole = sc.attend(q, k, v, "sparsek(5, window=4)", params={"key_scorer": w})
    kept, outs = Kept.empty(5, 4, k, v), []
    for t in range(90):
        kept = kept.push(k[:, :, t : t + 1], v[:, :, t : t + 1], w)
        outs.append(kept.attend(q[:, :, t : t + 1]))
    torch.testing.assert_close(torch.cat(outs, 2), whole, atol=1e-10, rtol=0)
    assert kept.k.shape[2] == kept.v.shape[2] == 9
    assert kept.nbytes < k[:, :, :30].nbytes * 2


def test_padding_that_holds_nan_changes_nothing() -> None:
    q, k, v = qkv(2, 2, 40, 8)
    w = torch.randn(2, 16, dtype=torch.float64)
    alone = sc.attend(*(x[1:, :, :29] for x in (q, k, v)), "sparsek(4, window=3)", params={"key_scorer": w})
    for x in (q, k, v):
        x[1, :, 29:] = torch.nan
    lengths = torch.tensor([40, 29])
    found = sc.attend(q, k, v, "sparsek(4, window=3)", key_lengths=lengths, params={"key_scorer": w})
    torch.testing.assert_close(found[1:, :, :29], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "text", ["sparsek(0)", "sparsek(4, window=0)", "scored_keys(0)", "score_gate(4, before=-1)"]
)
def test_sizes_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(sc.MechanismError, match="must be a whole number of at least"):
        sc.mechanism(text)


def test_scores_of_nothing_but_padding() -> None:
    assert torch.isneginf(threshold(torch.full((2, 3), -torch.inf), 2)).all()


TASK = Recall(28, pairs=4, queries=16, keys=8, values=8)


def fit(model: sc.nn.Transformer, steps: int, batch: int, generator: torch.Generator, eased: bool) -> float:
    """Accuracy after training, from few pairs to many when `eased`."""

    def loss(step: int) -> Tensor:
        tokens, targets = TASK.batch(batch, generator, pairs=(1, 2, 4)[step % 3] if eased else None)
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=SILENT)

    train(model.parameters(), loss, steps)
    tokens, targets = TASK.batch(500, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return accuracy(model(tokens), targets)


def test_a_trained_model_that_is_tuned_recalls_across_a_gap_that_its_window_does_not_span() -> None:
    """As published: a dense model is trained, then its attention is replaced and tuned lightly; the gap is 5 to 27 tokens."""

    def build(mechanism: str) -> sc.nn.Transformer:
        return sc.nn.Transformer(TASK.vocab, dim=64, depth=2, heads=2, mechanism=mechanism, max_length=28)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    teacher = build("causal")
    for table in (teacher.embedding.tokens, teacher.embedding.positions):
        torch.nn.init.normal_(table.weight, std=0.2)
    assert fit(teacher, 330, 64, generator, eased=True) >= 0.98
    found = {}
    for mechanism in ("sparsek(8, window=4)", "window(4)"):
        model = build(mechanism)
        missing = model.load_state_dict(teacher.state_dict(), strict=False).missing_keys
        assert all(name.endswith("key_scorer") for name in missing)
        found[mechanism] = fit(model, 80, 32, generator, eased=False)
    assert found["sparsek(8, window=4)"] >= 0.95
    assert found["sparsek(8, window=4)"] >= found["window(4)"] + 0.3
