"""Each objective of a latent alignment against a loop over alignments; padding, one value, none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.nn.variational import METHODS, bound, divergence, log_marginal, posterior

DIM, QUERY, ANSWER, CLASSES = 4, 3, 2, 5


def model(method: str, **kwargs: object) -> sc.nn.VariationalAttention:
    torch.manual_seed(1)
    return sc.nn.VariationalAttention(
        sc.nn.Readout(DIM, CLASSES), DIM, QUERY, ANSWER, method, **kwargs
    ).double()


def batch(size: int = 3, keys: int = 6) -> list[Tensor]:
    """Query, values, answers, and the answers' vectors."""
    return [
        torch.randn(size, QUERY, dtype=torch.float64),
        torch.randn(size, keys, DIM, dtype=torch.float64),
        torch.randint(0, CLASSES, (size,)),
        torch.randn(size, ANSWER, dtype=torch.float64),
    ]


def normalised(s: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in s)
    return [math.exp(x) / total for x in s]


def written_out(m: sc.nn.VariationalAttention, method: str, sample: list[Tensor]) -> float:
    """One sample's objective, by sums over alignments."""
    query, values, answer, vector = sample

    def like(context: Tensor) -> float:
        return math.log(normalised(m.decode.head(context).tolist())[int(answer)])

    def weights(query: Tensor, keys: Tensor) -> list[float]:
        return normalised([float(key @ query) / math.sqrt(DIM) for key in keys.detach()])

    pi = weights(m.query_proj(query).detach(), m.key_proj(values))
    if method == "soft":
        return like(
            sum((p * x for p, x in zip(pi, values, strict=True)), torch.zeros(DIM, dtype=torch.float64))
        )
    if method == "exact":
        return math.log(sum(p * math.exp(like(x)) for p, x in zip(pi, values, strict=True)))
    q = weights(m.guess_query(torch.cat((query, vector))).detach(), m.guess_key(values))
    return sum(g * (like(x) - math.log(g) + math.log(p)) for g, p, x in zip(q, pi, values, strict=True))


@pytest.mark.parametrize("method", ["soft", "exact", "enumerate"])
def test_sums_over_alignments_are_written_out(method: str) -> None:
    m, data = model(method), batch()
    found = m(*data)
    for n in range(3):
        assert float(found[n].detach()) == pytest.approx(
            written_out(m, method, [x[n] for x in data]), abs=1e-12
        )


@pytest.mark.parametrize(("method", "whole"), [("reinforce", "enumerate"), ("hard", None)])
def test_draws_estimate_their_bound_without_bias(method: str, whole: str | None) -> None:
    m, data = model(method, samples=40_000), batch()
    found = m(*data, generator=torch.Generator().manual_seed(0))
    if whole is None:
        prior = m.log_prior(data[0], data[1])
        expected = bound(prior, prior, m.decode(data[1], data[2]))
    else:
        expected = model(whole)(*data)
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_a_cold_relaxed_draw_reads_one_value() -> None:
    m, data = model("gumbel", temperature=1e-4), batch(size=200)
    apart = divergence(m.log_posterior(data[0], data[3], data[1]), m.log_prior(data[0], data[1]))
    found = m(*data, generator=torch.Generator().manual_seed(0)) + apart
    gap = (m.decode(data[1], data[2]) - found[:, None]).abs().amin(1)
    assert float(gap.detach().max()) < 1e-6


@pytest.mark.parametrize("method", ["soft", "exact", "enumerate"])
def test_gradients_by_differences(method: str) -> None:
    m, (query, values, answer, vector) = model(method), batch(size=2, keys=3)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    inputs = [x.requires_grad_() for x in (query, values, vector)]
    assert torch.autograd.gradcheck(lambda q, x, v: m(q, x, answer, v, mask), inputs)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_never_read_and_gets_no_gradient(method: str) -> None:
    m, data = model(method, samples=3), batch()
    mask = torch.arange(6) < torch.tensor([[4], [6], [1]])
    dirty = data[1].masked_fill(~mask[..., None], math.nan).requires_grad_()
    found = m(data[0], dirty, *data[2:], mask, torch.Generator().manual_seed(0))
    assert found.isfinite().all()
    found.sum().backward()
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~mask].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    if method in ("soft", "exact", "enumerate"):
        torch.testing.assert_close(found[:1], m(*(x[:1] for x in (data[0], data[1][:, :4], *data[2:]))))


@pytest.mark.parametrize("method", METHODS)
def test_one_value_is_the_likelihood_of_reading_it(method: str) -> None:
    m, data = model(method), batch(keys=1)
    expected = m.decode(data[1], data[2]).squeeze(1)
    torch.testing.assert_close(m(*data), expected)
    torch.testing.assert_close(m.log_likelihood(*data[:3]), expected)


def test_the_likeliest_values_stand_for_all() -> None:
    m, data = model("reinforce"), batch()
    everything = m.log_likelihood(*data[:3])
    torch.testing.assert_close(everything, log_marginal(m.log_prior(*data[:2]), m.decode(*data[1:3])))
    torch.testing.assert_close(m.log_likelihood(*data[:3], top=6), everything)
    torch.testing.assert_close(m.log_likelihood(*data[:3], top=99), everything)
    prior, like = m.log_prior(*data[:2]), m.decode(*data[1:3])
    best, z = prior.topk(2)
    expected = log_marginal(best.log_softmax(-1), like.gather(1, z))
    torch.testing.assert_close(m.log_likelihood(*data[:3], top=2), expected)


def test_the_same_generator_gives_the_same_draws() -> None:
    for method in ("reinforce", "hard", "gumbel"):
        m, data = model(method), batch()
        first, second = (m(*data, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)


def test_a_guess_that_excludes_a_key_and_a_prior_that_does() -> None:
    prior = torch.tensor([0.5, 0.5, 0.0]).log().requires_grad_()
    q = torch.tensor([1.0, 0.0, 0.0]).log().requires_grad_()
    like = torch.tensor([-1.0, -2.0, -3.0])
    assert float(divergence(q, prior).detach()) == pytest.approx(math.log(2))
    assert float(bound(prior, q, like).detach()) == pytest.approx(-1 - math.log(2))
    assert float(divergence(prior, q).detach()) == math.inf
    assert posterior(prior, like).exp()[2] == 0
    bound(prior, q, like).backward()
    assert q.grad.isfinite().all()


def test_what_has_no_alignment_is_refused() -> None:
    m, data = model("exact"), batch()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="sample 1 has no value to align with"):
        m(*data, mask)
    with pytest.raises(ValueError, match="sample 0 has no value to align with"):
        m(data[0], data[1][:, :0], *data[2:])
    with pytest.raises(ValueError, match=r"values must be \(batch, keys, dim\), got \(6, 4\)"):
        m(data[0], data[1][0], *data[2:])
    with pytest.raises(ValueError, match=r"mask must be boolean \(3, 6\), got torch.int64 \(3, 6\)"):
        m(*data, mask.long())
    with pytest.raises(ValueError, match="reinforce guesses from the answer too; give its vector"):
        model("reinforce")(*data[:3])
    with pytest.raises(ValueError, match=r"method must be one of soft, exact, .* got 'sample'"):
        model("sample")
    with pytest.raises(
        ValueError, match=r"samples must be at least 1 and temperature above 0, got 0 and 0\.5"
    ):
        model("reinforce", samples=0)
    for method, top in (("exact", 0), ("soft", 2)):
        with pytest.raises(ValueError, match=f"top must be at least 1, .* got top={top}"):
            model(method).log_likelihood(*data[:3], top=top)
