"""What simple strategies are worth on random symbols, exactly."""

from __future__ import annotations

import math

import numpy as np


def top_share(count: int, symbols: int) -> float:
    """The expected share of the most frequent among `count` draws of equally likely symbols.

    Counts of symbols are independent Poisson counts given their sum, so P(no count above m) is a coefficient of
    a power of the Poisson polynomial cut off at m.
    """
    rate = count / symbols
    poisson = np.array([math.exp(i * math.log(rate) - rate - math.lgamma(i + 1)) for i in range(count + 1)])
    whole = math.exp(count * math.log(count) - count - math.lgamma(count + 1))
    least = math.ceil(count / symbols)
    largest = float(least)  # the mean of a count is the sum over m of the odds that it is above m
    for most in range(least, count):
        power = np.ones(1)
        for _ in range(symbols):
            power = np.convolve(power, poisson[: most + 1])[: count + 1]
        above = 1 - float(power[count]) / whole
        if above < 1e-12:
            break
        largest += above
    return largest / count


def order_blind(count: int, symbols: int) -> float:
    """Accuracy, on `count` random symbols in turn, of naming the most frequent one that is still to come.

    It knows which symbols there are and which came, and nothing of their order: what is left is as random as before.
    """
    return sum(top_share(left, symbols) for left in range(1, count + 1)) / count


def binomial(count: int, share: float) -> list[float]:
    """The odds of 0 to `count` hits in `count` tries."""
    if not 0 < share < 1:
        return [float(k == (count if share else 0)) for k in range(count + 1)]
    ways = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in range(count + 1)
    ]
    hit, miss = math.log(share), math.log1p(-share)
    return [math.exp(ways[k] + k * hit + (count - k) * miss) for k in range(count + 1)]
