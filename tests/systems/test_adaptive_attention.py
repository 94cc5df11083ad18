"""S020, adaptive attention: a visual sentinel beside the regions, and captions that look when they must."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import saccade as sc
from saccade.parts.base import Sizes
from saccade.parts.pair import Context
from saccade.systems.sentinel import Sentinel
from saccade.systems.sentinel_captioner import SentinelCaptioner
from systems.helpers import qkv, train

HEADS, D, A = 2, 6, 3
TEXT = f"adaptive_attention({A})"
pytestmark = pytest.mark.system("S020")


def drawn() -> dict[str, Tensor]:
    """Weights of the mechanism, none of them at its starting value."""
    declared = sc.mechanism(TEXT).weights(Sizes(HEADS, HEADS, D, D))
    return {n: torch.randn(w.shape, dtype=torch.float64) for n, w in declared.items()}


def written_out(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, p: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, region weights and sentinel weight, row by row."""
    out, beta = torch.zeros_like(q), torch.zeros(*q.shape[:3], dtype=q.dtype)
    weights = torch.zeros(*q.shape[:3], k.shape[2], dtype=q.dtype)
    for h in range(HEADS):
        for i in range(q.shape[2]):
            asked = q[0, h, i] @ p["additive_q"][h]
            z = [float(p["additive_v"][h] @ torch.tanh(asked + x @ p["additive_k"][h])) for x in k[0, h]]
            z.append(float(p["additive_v"][h] @ torch.tanh(asked + s[0, h, i] @ p["sentinel_k"][h])))
            total = sum(math.exp(x) for x in z)
            a = [math.exp(x) / total for x in z]
            out[0, h, i] = sum(w * x for w, x in zip(a, [*v[0, h], s[0, h, i]], strict=True))
            weights[0, h, i], beta[0, h, i] = torch.tensor(a[:-1], dtype=q.dtype), a[-1]
    return out, weights, beta


@pytest.mark.parametrize("kernel", ["slab", "reference"])
def test_every_path_equals_the_formula(kernel: str) -> None:
    q, k, v = qkv(1, HEADS, 4, D, keys=9)
    s, params = torch.randn_like(q), drawn()
    out, weights, beta = written_out(q, k, v, s, params)
    need = ("out", "weights", "lse")
    found = sc.attend(q, k, v, TEXT, params=params, streams={"sentinel": s}, kernel=kernel, need=need)
    torch.testing.assert_close(found.out, out, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.weights, weights, atol=1e-10, rtol=0)
    torch.testing.assert_close(1 - found.weights.sum(-1), beta, atol=1e-10, rtol=0)


class Forced(Sentinel):
    """The sentinel with a logit that the test sets."""

    logit = 0.0
    name = ""

    def rows(self, c: Context) -> tuple[Tensor, Tensor | None]:
        logits, values = super().rows(c)
        return torch.full_like(logits, self.logit), values


@pytest.mark.parametrize("logit", [-math.inf, 1e30])
def test_a_sentinel_at_either_end_is_spatial_attention_or_itself(
    logit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forced, "logit", logit)
    m = sc.mechanism(TEXT)
    assert isinstance(m, sc.Pairwise)
    q, k, v = qkv(2, HEADS, 4, D, keys=9)
    s, params = torch.randn_like(q), drawn()
    found = sc.attend(
        q, k, v, sc.Pairwise(score=m.score, slots=Forced(A)), params=params, streams={"sentinel": s}
    )
    own = {n: x for n, x in params.items() if n != "sentinel_k"}
    want = s if logit > 0 else sc.attend(q, k, v, f"additive({A})", params=own)
    torch.testing.assert_close(found, want, atol=1e-12, rtol=0)


def test_gradients_reach_the_sentinel_and_what_it_shares() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, HEADS, 3, D, keys=5))
    s = torch.randn(1, HEADS, 3, D, dtype=torch.float64, requires_grad=True)
    params = {n: x.requires_grad_() for n, x in drawn().items()}

    def call(q: Tensor, k: Tensor, v: Tensor, s: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(params, weights, strict=True))
        return sc.attend(q, k, v, TEXT, params=named, streams={"sentinel": s})

    assert torch.autograd.gradcheck(call, (q, k, v, s, *params.values()))


def test_a_sentinel_needs_an_additive_score_of_its_width() -> None:
    with pytest.raises(sc.MechanismError, match="sentinel needs additive"):
        sc.mechanism("sentinel(3)")
    layer = sc.nn.Attention(8, 2, "additive(4) + sentinel(3)")
    with pytest.raises(ValueError, match=r"sentinel\(3\) shares the hidden layer of additive\(4\)"):
        layer(torch.randn(1, 5, 8))


COLOURS, SHAPES, COLUMNS, ROWS = 4, 3, 4, 2
THE, IS, OF, LEFT, RIGHT, START, FIRST = range(7)
VOCAB, WIDTH = FIRST + COLOURS + SHAPES, COLOURS + SHAPES + COLUMNS + ROWS
FUNCTION, VISUAL = [0, 3, 5, 6], [1, 2, 7, 8]


def scenes(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (size, 8, width), what a decoder is fed and its answer: the red square is left of the blue circle.

    Two objects of different colours, one in each half, on a noisy grid; the colour of lower index is named first.
    """
    colour = torch.rand(size, COLOURS, generator=generator).argsort(1)[:, :2].sort(1).values
    shape = torch.randint(SHAPES, (size, 2), generator=generator)
    half = torch.randint(2, (size, 1), generator=generator)
    column = torch.randint(2, (size, 2), generator=generator) + 2 * torch.cat((half, 1 - half), 1)
    cell = torch.randint(ROWS, (size, 2), generator=generator) * COLUMNS + column
    at = torch.arange(ROWS * COLUMNS)
    place = torch.cat((F.one_hot(at % COLUMNS, COLUMNS), F.one_hot(at // COLUMNS, ROWS)), -1).float()
    objects = torch.cat((F.one_hot(colour, COLOURS), F.one_hot(shape, SHAPES)), -1).float()
    shown = torch.zeros(size, ROWS * COLUMNS, COLOURS + SHAPES)
    shown.scatter_(1, cell[:, :, None].expand(-1, -1, COLOURS + SHAPES), objects)
    cells = torch.cat((shown, place.expand(size, -1, -1)), -1)
    cells = cells + 0.3 * torch.randn(cells.shape, generator=generator)
    the, is_, of = (torch.full((size,), word) for word in (THE, IS, OF))
    side = torch.where(half[:, 0] == 0, LEFT, RIGHT)
    names = [x for n in range(2) for x in (FIRST + colour[:, n], FIRST + COLOURS + shape[:, n])]
    caption = torch.stack([the, *names[:2], is_, side, of, the, *names[2:]], 1)
    fed = torch.cat((torch.full((size, 1), START), caption[:, :-1]), 1)
    return cells, fed, caption


def trained(model: SentinelCaptioner, steps: int, generator: torch.Generator) -> None:
    def loss(step: int) -> Tensor:
        cells, fed, caption = scenes(32, generator)
        return F.cross_entropy(model(cells, fed)[0].flatten(0, 1), caption.flatten())

    train(model.parameters(), loss, steps, rate=5e-3)


def test_captions_look_away_at_function_words_and_are_as_good_as_with_forced_attention() -> None:
    """The sentinel joins after 100 steps of plain attention: from the start, it takes all weight and nothing is seen."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    forced, adaptive = (SentinelCaptioner(WIDTH, VOCAB, 48, sentinel=x) for x in (False, True))
    trained(forced, 100, generator)
    adaptive.load_state_dict(forced.state_dict(), strict=False)
    for model in (forced, adaptive):
        trained(model, 300, generator)
    cells, fed, caption = scenes(1000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        (plain, none), (logits, beta) = forced(cells, fed), adaptive(cells, fed)
    right, wanted = ((x.argmax(-1) == caption).float().mean() for x in (logits, plain))
    assert none.abs().max() < 1e-6
    assert right >= wanted - 0.01
    assert beta[:, FUNCTION].mean() >= beta[:, VISUAL].mean() + 0.15
