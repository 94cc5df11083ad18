"""Every test starts from the same seed, on one thread: models this small are quickest so, and alike on every machine."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
