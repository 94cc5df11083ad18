"""S141, attention as an adaptive filter: its formula, and the limits in which it is something known."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.systems.afa import SLOW
from systems.helpers import below, qkv, stepwise

pytestmark = pytest.mark.system("S141")
NAMES = ("mu", "speed", "sigma", "eta", "gamma", "tau", "nu")


def scalars(heads: int = 1, **values: float) -> dict[str, Tensor]:
    """Params from the quantities of the formula: mu at most 0, tau and nu positive."""
    found = {
        "mu": -0.1,
        "speed": 0.0,
        "sigma": 0.0,
        "eta": 1.0,
        "gamma": 0.0,
        "tau": 1.0,
        "nu": math.inf,
    } | values
    for name in ("tau", "nu"):
        found[name] = math.log(found[name])
    found["mu"] = math.log(-found["mu"]) + SLOW if found["mu"] else -math.inf
    return {f"afa_{n}": torch.full((heads,), found[n], dtype=torch.float64) for n in NAMES}


def formula(q: Tensor, k: Tensor, v: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Pair by pair in complex numbers; gradients flow through q, k, v and the params."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    half, wide = q.shape[-1] // 2, v.shape[-1] // 2
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mu = -torch.exp(p["afa_mu"][h] - SLOW)
            w, sigma, eta, gamma = (p[f"afa_{n}"][h] for n in ("speed", "sigma", "eta", "gamma"))
            tau, nu = p["afa_tau"][h].exp(), p["afa_nu"][h].exp()
            for i in range(q.shape[2]):
                scores, values = [], []
                x = torch.complex(q[b, h, i, :half], q[b, h, i, half:])
                for j in range(i + 1):
                    gap = i - j
                    carry = torch.exp(torch.complex(mu * gap, w * gap))
                    y = torch.complex(k[b, h, j, :half], k[b, h, j, half:])
                    z = torch.complex(v[b, h, j, :wide], v[b, h, j, wide:])
                    e2 = torch.exp(2 * mu * gap)
                    noise = sigma**2 * (1 - e2) / (-2 * mu) + eta**2 * e2 + gamma**2
                    scores.append(-tau * torch.log(noise + (x - carry * y).abs().square().sum() / nu))
                    values.append(carry * z)
                mixed = sum(a * z for a, z in zip(torch.stack(scores).softmax(0), values, strict=True))
                out[b, h, i] = torch.cat((mixed.real, mixed.imag))
    return out


def test_equals_the_formula_with_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 6, 4))
    p = {f"afa_{n}": torch.randn(2, dtype=torch.float64).requires_grad_() for n in NAMES}
    found, want = sc.attend(q, k, v, "afa", params=p), formula(q, k, v, p)
    torch.testing.assert_close(found, want)
    leaves, weight = [q, k, v, *p.values()], torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        torch.autograd.grad((want * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_without_dynamics_it_is_dot_product_attention() -> None:
    """Unit vectors, nu large and tau / (nu V) = c / 2: weights are softmax(c q.k)."""
    q, k, v = (torch.nn.functional.normalize(x, dim=-1) for x in qkv(2, 3, 11, 8))
    c, nu, eta, gamma = 3.0, 1e6, 0.6, 0.8
    p = scalars(3, mu=0.0, eta=eta, gamma=gamma, nu=nu, tau=c / 2 * nu * (eta**2 + gamma**2))
    found = sc.attend(q, k, v, "afa", params=p, need=("out", "weights"))
    want = torch.softmax((c * q @ k.mT).masked_fill(~below(11), -math.inf), -1)
    torch.testing.assert_close(found.weights, want, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.out, want @ v, atol=1e-4, rtol=0)


def oscillator(
    mu: float, speed: float, sigma: float, eta: float, runs: int, length: int
) -> tuple[Tensor, Tensor]:
    """States and noisy measurements (runs, length), complex, of x' = exp(mu + i speed) x + noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(variance: float) -> Tensor:
        return math.sqrt(variance / 2) * torch.complex(
            *torch.randn(2, runs, dtype=torch.float64, generator=generator)
        )

    x, states, seen = noise(8.0), [], []
    driven = sigma**2 * (1 - math.exp(2 * mu)) / (-2 * mu)
    for _ in range(length):
        states.append(x)
        seen.append(x + noise(eta**2))
        x = cmath.exp(complex(mu, speed)) * x + noise(driven)
    return torch.stack(states, 1), torch.stack(seen, 1)


def filtered(seen: Tensor, **values: float) -> Tensor:
    """The attention's estimates of the states from measurements alone: nu is infinite, so q and k do not matter."""
    v = torch.stack((seen.real, seen.imag), -1)[:, None]
    q, k, _ = qkv(len(seen), 1, seen.shape[1], 2)
    out = sc.attend(q, k, v, "afa", params=scalars(**values))[:, 0]
    return torch.complex(out[..., 0], out[..., 1])


def kalman(seen: Tensor, mu: float, speed: float, eta: float, driven: float = 0.0) -> Tensor:
    """A Kalman filter that knows nothing before its first measurement."""
    carry = cmath.exp(complex(mu, speed))
    x, p, found = seen[:, 0], eta**2, [seen[:, 0]]
    for t in range(1, seen.shape[1]):
        x, p = carry * x, abs(carry) ** 2 * p + driven
        gain = p / (p + eta**2)
        x, p = x + gain * (seen[:, t] - x), (1 - gain) * p
        found.append(x)
    return torch.stack(found, 1)


@pytest.mark.parametrize(("mu", "speed"), [(-0.05, 0.4), (-0.2, 1.3), (-0.01, 0.0)])
def test_without_driving_noise_it_is_a_kalman_filter(mu: float, speed: float) -> None:
    _, seen = oscillator(mu, speed, 0.0, 0.5, 4, 30)
    found = filtered(seen, mu=mu, speed=speed, eta=0.5)
    torch.testing.assert_close(found, kalman(seen, mu, speed, 0.5), atol=1e-10, rtol=0)


def test_with_driving_noise_it_beats_every_moving_average() -> None:
    """With tau = 8. Errors of far keys go together, which tau = 1, the likelihood of independent ones, does not know."""
    mu, speed, sigma, eta = -0.05, 0.3, 0.4, 1.0
    states, seen = oscillator(mu, speed, sigma, eta, 200, 40)

    def error(guess: Tensor) -> float:
        return float((guess - states)[:, 20:].abs().square().mean())

    averages = []
    for width in range(1, 16):
        sums = torch.nn.functional.pad(seen.cumsum(1), (1, 0))
        averages.append(
            error(torch.nn.functional.pad((sums[:, width:] - sums[:, :-width]) / width, (width - 1, 0)))
        )
    options = {"mu": mu, "speed": speed, "sigma": sigma, "eta": eta}
    found, even = (error(filtered(seen, **options, tau=tau)) for tau in (8.0, 1.0))
    driven = sigma**2 * (1 - math.exp(2 * mu)) / (-2 * mu)
    best = error(kalman(seen, mu, speed, eta, driven))
    assert best <= found < 0.7 * min(averages), (best, found, min(averages))
    assert even > min(averages)


def test_decoding_equals_the_whole_and_trains_everything() -> None:
    layer = sc.nn.Attention(16, 2, "afa")
    x = torch.randn(2, 9, 16)
    whole = layer(x)
    torch.testing.assert_close(stepwise(layer, x)[0], whole)
    whole.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    for name in NAMES:
        if name != "sigma":
            assert layer.get_parameter(f"afa_{name}").grad.any(), name


def test_wrong_requests_are_refused() -> None:
    q, k, v = qkv(1, 1, 3, 3)
    with pytest.raises(sc.NotSupported, match="channels in pairs"):
        sc.attend(q, k, v, "afa", params=scalars())
    with pytest.raises(sc.MechanismError, match="needs bilinear"):
        sc.mechanism("afa + rope")
