"""The state of decoding as a value: it grows in place, branches, saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade.parts.state import State


def numbers(n: int) -> dict[str, Tensor]:
    return {"k": torch.randn(1, 2, n, 3), "v": torch.randn(1, 2, n, 4)}


def empty() -> State:
    return State({"k": torch.empty(1, 2, 0, 3), "v": torch.empty(1, 2, 0, 4)})


def test_appending_gives_what_concatenation_gives() -> None:
    state, given = empty(), []
    for n in (5, 1, 1, 0, 30, 1, 1):
        given.append(numbers(n))
        state = state.appended(**given[-1])
        for name in ("k", "v"):
            assert torch.equal(state.tensors[name], torch.cat([x[name] for x in given], 2))
    assert state.length == 39
    assert empty().length == 0


def test_appending_to_the_newest_state_moves_nothing() -> None:
    state = empty().appended(**numbers(20)).appended(**numbers(1))
    place = state.tensors["k"].data_ptr()
    for _ in range(15):
        state = state.appended(**numbers(1))
    assert state.tensors["k"].data_ptr() == place


def test_two_states_grown_from_one_are_independent() -> None:
    root = empty().appended(**numbers(4)).appended(**numbers(1))
    kept = {n: x.clone() for n, x in root.tensors.items()}
    left, right = numbers(1), numbers(1)
    a, b = root.appended(**left), root.appended(**right)
    c = a.appended(**right)
    for name in ("k", "v"):
        assert torch.equal(root.tensors[name], kept[name])
        assert torch.equal(a.tensors[name], torch.cat((kept[name], left[name]), 2))
        assert torch.equal(b.tensors[name], torch.cat((kept[name], right[name]), 2))
        assert torch.equal(c.tensors[name], torch.cat((kept[name], left[name], right[name]), 2))


def test_what_a_gradient_needs_is_not_overwritten() -> None:
    first = {n: x.requires_grad_() for n, x in numbers(3).items()}
    state = empty().appended(**first)
    after = state.appended(**numbers(1))
    total = after.tensors["k"].square().sum()
    after.appended(**numbers(1))
    total.backward()
    torch.testing.assert_close(first["k"].grad, 2 * first["k"].detach())
    assert not after.detach().tensors["k"].requires_grad


def test_nbytes_counts_members() -> None:
    state = State(numbers(5), 5, members=(State({"s": torch.zeros(3, dtype=torch.float64)}), State()))
    assert state.nbytes == 1 * 2 * 5 * (3 + 4) * 4 + 3 * 8


def test_save_and_load(tmp_path: Path) -> None:
    inner = State({"s": torch.randn(2, 3, dtype=torch.float64), "m": torch.full((2,), -torch.inf)}, 7)
    state = State(numbers(5), 9, 4, (inner, State({}, 9, 0, (inner,))))
    path = tmp_path / "state.safetensors"
    state.save(path)
    back = State.load(path)

    def same(a: State, b: State) -> None:
        assert (a.length, a.start, len(a.members)) == (b.length, b.start, len(b.members))
        assert a.tensors.keys() == b.tensors.keys()
        for n, x in a.tensors.items():
            assert x.dtype == b.tensors[n].dtype
            assert torch.equal(x, b.tensors[n])
        for x, y in zip(a.members, b.members, strict=True):
            same(x, y)

    same(back, state)
    assert back.nbytes == state.nbytes


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "window(4)",
        "causal + linear",
        "causal + performer_favor(8)",
        "mix(causal, causal + linear)",
        "by_head(window(3), causal)",
    ],
)
def test_a_loaded_state_goes_on_as_the_saved_one(text: str, tmp_path: Path) -> None:
    layer = sc.nn.Attention(8, 2, text)
    x = torch.randn(1, 24, 8)
    with torch.no_grad():
        _, state = layer.step(x[:, :20], layer.init_state(1))
        state.save(tmp_path / "s")
        loaded = State.load(tmp_path / "s")
        for t in range(20, 24):
            y, state = layer.step(x[:, t : t + 1], state)
            z, loaded = layer.step(x[:, t : t + 1], loaded)
            assert torch.equal(y, z)
