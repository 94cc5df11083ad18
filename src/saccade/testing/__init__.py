"""The contract: what every mechanism must hold, checked on any, also on one that a user wrote.

    report = saccade.testing.check("causal + window(8)")

runs every property that applies, prints a table and returns it. Randomness is seeded, costs are counted and not timed,
and error budgets come from float64 and from a naive low-precision twin: at most twice the twin's error plus one rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.mechanism import Mechanism
from saccade.mechanism import mechanism as parse
from saccade.testing import costs, meaning, states
from saccade.testing.subject import Failed, Skip, Subject, on_tokens

__all__ = ["PROPERTIES", "Outcome", "Report", "check", "on_tokens"]


@dataclass(frozen=True)
class Outcome:
    """One property: whether it held (None: it does not apply), and the figures."""

    name: str
    held: bool | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What held of a mechanism. Print it; `ok` is False when anything failed."""

    mechanism: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """True when every property that applies held."""
        return all(o.held is not False for o in self.outcomes)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the properties that did not hold."""
        return tuple(o.name for o in self.outcomes if o.held is False)

    def __str__(self) -> str:
        words = {True: "held", False: "FAILED", None: "-"}
        lines = [f"{self.mechanism}: {'all held' if self.ok else ', '.join(self.failed) + ' FAILED'}"]
        lines += [f"  {o.name:<24} {words[o.held]:<7} {o.detail}" for o in self.outcomes]
        return "\n".join(lines)


PROPERTIES: dict[str, Callable[[Subject], str]] = {
    "shapes and dtypes": meaning.shapes_and_dtypes,
    "kernels = definition": meaning.matches_definition,
    "no future": meaning.no_future,
    "padding": meaning.padding,
    "batch": meaning.batch,
    "empty rows": meaning.empty_rows,
    "grouped heads": meaning.grouped_heads,
    "gradients": meaning.gradients,
    "decoding = whole": states.decoding,
    "state saves": states.state_saves,
    "merge of splits": states.merging,
    "same result": states.same_result,
    "text form": states.text_form,
    "cost growth": costs.cost_growth,
    "float32 error": functools.partial(costs.precision, dtype=torch.float32),
    "bfloat16 error": functools.partial(costs.precision, dtype=torch.bfloat16),
}


def check(
    mechanism: str | Mechanism,
    *,
    seed: int = 0,
    device: str = "cpu",
    oracle: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    show: bool = True,
) -> Report:
    """Run every property of the contract on a mechanism, print a table of what held and return it.

    `oracle(q, k, v)` is an independent formula for the output, float64 (2, 4, 160, 16), (2, G, 160, 16), (2, G, 160, 8)
    to (2, 4, 160, 8): without one, the reference is the meaning. A property that raises anything counts as failed.

    >>> check("causal", show=False).ok
    True
    """
    s = Subject(parse(mechanism), seed, device, oracle)
    outcomes = []
    for name, prop in PROPERTIES.items():
        try:
            outcomes.append(Outcome(name, True, prop(s)))
        except Skip as why:
            outcomes.append(Outcome(name, None, str(why)))
        except Failed as why:
            outcomes.append(Outcome(name, False, str(why)))
        except Exception as error:  # whatever a user's part raises is a failure of the property
            outcomes.append(
                Outcome(
                    name,
                    False,
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
                )
            )
    report = Report(str(s.mechanism), tuple(outcomes))
    if show:
        print(report)
    return report
