"""Attention as a guess at which key an answer was read from: the exact likelihood, bounds on it, and their estimators.

Legend: an alignment z over n keys has a prior pi(z), from the query alone, and a posterior guess q(z), which also sees
the answer y. log_prior and log_q are (..., n), normalised, -inf where there is no key; log_like (..., n) holds
log p(y | key z), finite also where there is no key. (Deng et al., Latent Alignment and Variational Attention, 2018.)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

METHODS = ("soft", "exact", "enumerate", "reinforce", "hard", "gumbel")
GUESSED = ("enumerate", "reinforce", "gumbel")


class Readout(nn.Module):
    """log p(y | context) of one of `classes` answers, by a linear map and a softmax."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, classes)

    def forward(self, context: Tensor, answer: Tensor) -> Tensor:
        """context (B, k, dim) and answer (B,), whole numbers, to (B, k)."""
        logits = self.head(context).log_softmax(-1)
        return logits.gather(-1, answer[:, None, None].expand(*context.shape[:2], 1)).squeeze(-1)


def log_marginal(log_prior: Tensor, log_like: Tensor) -> Tensor:
    """log sum_z pi(z) p(y | z), the likelihood itself: (..., n) and (..., n) to (...)."""
    return torch.logsumexp(log_prior + log_like, dim=-1)


def divergence(log_q: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q || pi) = sum_z q(z) (log q(z) - log pi(z)), (...); infinite where q allows what pi excludes."""
    none = torch.isneginf(log_q)
    gap = log_q.masked_fill(none, 0) - log_prior.masked_fill(none, 0)
    return (log_q.exp() * gap).sum(-1)


def bound(log_prior: Tensor, log_q: Tensor, log_like: Tensor) -> Tensor:
    """sum_z q(z) log p(y | z) - KL(q || pi), at most the log-marginal, and that where q is the posterior: (...)."""
    return (log_q.exp() * log_like).sum(-1) - divergence(log_q, log_prior)


def posterior(log_prior: Tensor, log_like: Tensor) -> Tensor:
    """log of the true posterior, pi(z) p(y | z) over its sum, (..., n)."""
    return torch.log_softmax(log_prior + log_like, dim=-1)


def score_gradient(log_q_z: Tensor, reward: Tensor) -> Tensor:
    """A term of value zero whose gradient is reward * d log q(z): REINFORCE (Williams, 1992)."""
    return reward.detach() * (log_q_z - log_q_z.detach())


class VariationalAttention(nn.Module):
    """The log-likelihood of answers, or what to maximise in its place, when it is latent which value was read.

    Query (B, query_dim), values (B, n, dim), answers (B, ...) and, where q is guessed, their vectors (B, answer_dim),
    to (B,). `decode(context (B, k, dim), answer)` gives log p(y | context), (B, k). The methods:

    soft         log p(y | sum_z pi(z) value z), attention as usual
    exact        the log-marginal, n likelihoods a sample
    enumerate    the bound, summed over all z
    reinforce    the bound from `samples` draws z ~ q, the score gradient against the baseline log p(y | soft context)
    hard         the same with q = pi, which needs no posterior and pays no divergence
    gumbel       the bound at a relaxed draw, softmax((log q + Gumbel noise) / temperature); biased

    (Deng et al., Latent Alignment and Variational Attention, 2018.)

    >>> model = VariationalAttention(Readout(8, 5), dim=8, query_dim=3, method="exact")
    >>> model(torch.zeros(2, 3), torch.zeros(2, 6, 8), torch.tensor([1, 4])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        decode: nn.Module,
        dim: int,
        query_dim: int,
        answer_dim: int = 0,
        method: Literal["soft", "exact", "enumerate", "reinforce", "hard", "gumbel"] = "reinforce",
        samples: int = 1,
        temperature: float = 0.5,
        baseline: bool = True,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if samples < 1 or not temperature > 0:
            raise ValueError(
                f"samples must be at least 1 and temperature above 0, got {samples} and {temperature}"
            )
        self.decode, self.method = decode, method
        self.samples, self.temperature, self.baseline = samples, temperature, baseline
        self.query_proj, self.key_proj = nn.Linear(query_dim, dim), nn.Linear(dim, dim, bias=False)
        if method in GUESSED:
            self.guess_query = nn.Linear(query_dim + answer_dim, dim)
            self.guess_key = nn.Linear(dim, dim, bias=False)

    def log_prior(self, query: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """log pi (B, n), what the query alone says; the mask (B, n) is True where there is a value."""
        return self._aligned(self.query_proj(query), self.key_proj(values), mask)

    def log_posterior(
        self, query: Tensor, vector: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """log q (B, n), what the query and the answer's vector (B, answer_dim) say."""
        both = torch.cat((query, vector), dim=-1)
        return self._aligned(self.guess_query(both), self.guess_key(values), mask)

    def forward(
        self,
        query: Tensor,
        values: Tensor,
        answer: Tensor,
        vector: Tensor | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """What to maximise for each sample, (B,). `generator` draws for reinforce, hard and gumbel."""
        values = _checked(values, mask)
        prior = self.log_prior(query, values, mask)
        soft = (prior.exp().unsqueeze(1) @ values) if self.method in ("soft", "reinforce", "hard") else None
        if self.method == "soft":
            assert soft is not None
            return self.decode(soft, answer).squeeze(1)
        if self.method == "exact":
            return log_marginal(prior, self.decode(values, answer))
        if self.method == "hard":
            q = prior
        elif vector is None:
            raise ValueError(
                f"{self.method} guesses from the answer too; give its vector (batch, answer_dim)"
            )
        else:
            q = self.log_posterior(query, vector, values, mask)
        if self.method == "enumerate":
            return bound(prior, q, self.decode(values, answer))
        apart = divergence(q, prior)
        if self.method == "gumbel":
            noise = torch.rand(q.shape, generator=generator, dtype=q.dtype, device=q.device)
            gumbel = -torch.log(
                -torch.log(noise.clamp(torch.finfo(q.dtype).tiny, 1 - torch.finfo(q.dtype).eps))
            )
            relaxed = torch.softmax((q + gumbel) / self.temperature, dim=-1)
            return self.decode(relaxed.unsqueeze(1) @ values, answer).squeeze(1) - apart
        z = torch.multinomial(q.detach().exp(), self.samples, replacement=True, generator=generator)
        read = values.gather(1, z.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        found = self.decode(read, answer)
        reward = found.detach()
        if self.baseline:
            assert soft is not None
            with torch.no_grad():
                reward = reward - self.decode(soft, answer)
        return (found + score_gradient(q.gather(1, z), reward)).mean(1) - apart

    def log_likelihood(
        self,
        query: Tensor,
        values: Tensor,
        answer: Tensor,
        mask: Tensor | None = None,
        top: int | None = None,
    ) -> Tensor:
        """For use after training, (B,): the marginal over the `top` likeliest values of pi, renormalised, or over all.

        A model trained by the method soft answers its own log p(y | soft context).
        """
        values = _checked(values, mask)
        prior = self.log_prior(query, values, mask)
        if top is not None and (top < 1 or self.method == "soft"):
            raise ValueError(f"top must be at least 1, and soft has no values to choose from; got top={top}")
        if self.method == "soft":
            return self.decode(prior.exp().unsqueeze(1) @ values, answer).squeeze(1)
        if top is not None:
            prior, z = prior.topk(min(top, prior.shape[1]), dim=-1)
            prior = prior.log_softmax(-1)
            values = values.gather(1, z.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
        return log_marginal(prior, self.decode(values, answer))

    def _aligned(self, query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        s = (keys @ query.unsqueeze(-1)).squeeze(-1) * query.shape[-1] ** -0.5
        return (s if mask is None else s.masked_fill(~mask, -torch.inf)).log_softmax(-1)


def _checked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values (B, n, dim) with zeros where there is none. Raises where a sample has nothing to align with."""
    if values.dim() != 3:
        raise ValueError(f"values must be (batch, keys, dim), got {tuple(values.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != values.shape[:2]):
        raise ValueError(
            f"mask must be boolean {tuple(values.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    counts = torch.full((len(values),), values.shape[1]) if mask is None else mask.sum(1)
    if len(values) and int(counts.min()) == 0:
        raise ValueError(
            f"sample {int(counts.argmin())} has no value to align with; leave samples without values out"
        )
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)
