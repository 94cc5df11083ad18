"""The functional call: what it answers, and that a state goes on exactly where a whole call would be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, draw, same, truth

CAUSAL = [
    "causal",
    "window(5)",
    "window(1)",
    "window(5) + alibi",
    "rope + window(6)",
    "rope + causal",
    "standardize + causal",
    "dilated(3, step=4)",
    "strided(5)",
    "causal + chunk(6)",
    "causal + window(4) + sink(2)",
    "causal + global(3)",
    "bilinear + causal",
    "causal + additive(3)",
    "causal + gauss_gate(4)",
    "causal + centred_span(3)",
    "moba(block=4, top=2)",
    "window(16) & top_blocks(4, top=2)",
    "causal + tiles(4, 8)",
    "gqa(2) + causal",
    "causal + linear",
    "causal + identity",
    "causal + performer_favor(12)",
    "causal + fixed_decay(first=1.0) + elu1 + ratio",
    "causal + rope + identity + fixed_decay",
    "mix(causal, causal + linear)",
    "by_head(window(3), causal + performer_favor(12))",
    "aaren",
]


def cut(call: Call, a: int, b: int) -> dict[str, Tensor]:
    """The tokens from a to b, as arguments."""
    q = call.q if call.learned_query else call.q[:, :, a:b]
    return {"q": q, "k": call.k[:, :, a:b], "v": call.v[:, :, a:b]}


def given(call: Call, a: int, b: int) -> dict[str, dict[str, Tensor]]:
    streams = {n: x[:, :, a:b] for n, x in call.streams.items()}
    return {"params": call.params, "buffers": call.buffers, "streams": streams}


def go_on(
    call: Call, cuts: list[int], state: sc.State | None = None, start: int = 0
) -> tuple[Tensor, sc.State]:
    """The output of consecutive pieces, and the state after them."""
    if state is None:
        b, g, _, d = call.k.shape
        h = call.q.shape[1]
        state = sc.init_state(call.text, b, g, d, call.v.shape[-1], heads=h, dtype=call.q.dtype)
    outs, a = [], start
    for b in cuts:
        found = sc.attend(
            **cut(call, a, b), mechanism=call.text, state=state, need=("out", "state"), **given(call, a, b)
        )
        outs.append(found.out)
        assert found.state is not None
        state, a = found.state, b
        assert state.length == b
    return torch.cat(outs, 2), state


@pytest.mark.parametrize("text", CAUSAL)
def test_step_by_step_equals_the_whole(text: str) -> None:
    call = draw(text)
    want = truth(call)[0]
    same("steps", go_on(call, list(range(1, 38)))[0], want)
    same("prefill, then steps", go_on(call, [20, *range(21, 38)])[0], want)
    same("prefill in pieces", go_on(call, [7, 8, 20, 37])[0], want)


@pytest.mark.parametrize("text", CAUSAL)
def test_the_state_after_a_whole_call_goes_on(text: str) -> None:
    call = draw(text)
    first = sc.attend(**cut(call, 0, 25), mechanism=text, need=("out", "state"), **given(call, 0, 25))
    want = truth(call)[0]
    same("whole call", first.out, want[:, :, :25])
    same("steps", go_on(call, list(range(26, 38)), first.state, 25)[0], want[:, :, 25:])


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "window(5)",
        "moba(block=4, top=2)",
        "causal + performer_favor(12)",
        "mix(causal, causal + linear)",
        "aaren",
    ],
)
def test_two_futures_from_one_state_do_not_disturb_each_other(text: str) -> None:
    call, other = draw(text), draw(text, seed=1)
    other = replace(
        other,
        q=call.q if call.learned_query else torch.cat((call.q[:, :, :20], other.q[:, :, 20:]), 2),
        k=torch.cat((call.k[:, :, :20], other.k[:, :, 20:]), 2),
        v=torch.cat((call.v[:, :, :20], other.v[:, :, 20:]), 2),
        buffers=call.buffers,
    )
    _, state = go_on(call, list(range(1, 21)))
    left, _ = go_on(call, list(range(21, 30)), state, 20)
    right, _ = go_on(other, list(range(21, 38)), state, 20)
    again, _ = go_on(call, list(range(21, 38)), state, 20)
    same("first future", left, truth(call)[0][:, :, 20:29])
    same("second future", right, truth(other)[0][:, :, 20:])
    same("first future again", again, truth(call)[0][:, :, 20:])


@pytest.mark.parametrize(
    ("text", "held"), [("window(5)", 16), ("dilated(3, step=2)", 16), ("window(40)", 80)]
)
def test_the_cache_of_a_window_really_shrinks(text: str, held: int) -> None:
    call = draw(text, rows=400, heads=2, batch=1, dim=4)
    _, state = go_on(call, list(range(1, 401)))
    assert state.length == 400
    assert state.start > 300 - held
    assert state.tensors["k"].shape[2] < held
    assert state.tensors["k"].untyped_storage().nbytes() <= 2 * held * 2 * 4 * 8
    assert state.nbytes == sum(x.numel() for x in state.tensors.values()) * 8
    _, whole = go_on(replace(call, text="causal"), [400])
    assert whole.nbytes == 2 * 2 * 400 * 4 * 8
    _, linear = go_on(replace(call, text="causal + linear"), [400])
    assert linear.nbytes == (2 * 4 * 4 + 2 * 4 + 2) * 8


def test_grouped_heads_keep_a_smaller_cache() -> None:
    size = {text: go_on(draw(text), [37])[1].nbytes for text in ("causal", "gqa(2) + causal", "mqa + causal")}
    assert size["causal"] == 2 * size["gqa(2) + causal"] == 4 * size["mqa + causal"]


@pytest.mark.parametrize("text", ["window(4)", "causal", "dilated(3, step=2)"])
def test_a_mask_follows_a_shrinking_cache(text: str) -> None:
    call = draw(text, rows=60)
    mask = torch.rand(2, 4, 60, 60, generator=torch.Generator().manual_seed(1)) < 0.7
    want = truth(replace(call, mask=mask))[0]
    state, rows = sc.init_state(text, 2, 4, 8, dtype=torch.float64), []
    for t in range(60):
        one = sc.attend(
            **cut(call, t, t + 1),
            mechanism=text,
            mask=mask[:, :, t : t + 1, : t + 1],
            state=state,
            need=("out", "state"),
        )
        rows.append(one.out)
        state = one.state
    same("steps under a mask", torch.cat(rows, 2), want)


@pytest.mark.parametrize(
    "text",
    [
        "causal",
        "window(4)",
        "causal + linear",
        "causal + performer_favor(12)",
        "aaren",
        "by_head(window(3), causal)",
    ],
)
def test_lse_with_a_state(text: str) -> None:
    call = draw(text)
    want = truth(call)
    first = sc.attend(**cut(call, 0, 20), mechanism=text, need=("state",), **given(call, 0, 20))
    rest = cut(call, 20, 21)
    one = sc.attend(**rest, mechanism=text, state=first.state, need=("out", "lse"), **given(call, 20, 21))
    same("out", one.out, want[0][:, :, 20:21])
    if want[1] is not None:
        same("lse", one.lse, want[1][:, :, 20:21])
    assert one.state is None


@pytest.mark.parametrize("learned", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("text", ["causal", "window(4)", "causal + linear", "moba(block=4, top=2)"])
def test_gradients_pass_through_steps(text: str, learned: str) -> None:
    call = draw(text, rows=30)
    leaves = {n: getattr(call, n).clone().requires_grad_() for n in learned}
    names = list(leaves)
    stepped = go_on(replace(call, **leaves), list(range(1, 31)))[0]
    got = torch.autograd.grad(stepped.sin().sum(), [leaves[n] for n in names])
    whole = truth(replace(call, **leaves))[0]
    want = torch.autograd.grad(whole.sin().sum(), [leaves[n] for n in names])
    for n, a, b in zip(names, got, want, strict=True):
        same(f"gradient of {n}", a, b)


def test_what_cannot_go_on_token_by_token_names_another_call() -> None:
    for text, words in (
        ("full", r"use 'causal \+ full'"),
        ("neighborhood(3)", r"use 'causal \+ neighborhood\(3\)'"),
        ("linformer", "use performer_favor or moba"),
        ("nystromformer", "use performer_favor or moba"),
        ("linear", r"use 'causal \+ linear'"),
    ):
        with pytest.raises(sc.NotSupported, match=f"{words.split('use')[0]}.*token by token; {words}"):
            sc.init_state(text, 1, 2, 4)


def test_a_state_of_another_call_is_refused() -> None:
    q = torch.randn(2, 4, 6, 8)
    states = {
        t: sc.attend(q, q, q, t, need=("state",)).state
        for t in ("causal", "causal + linear", "mix(causal, causal)")
    }
    for text, other in (
        ("causal", "causal + linear"),
        ("causal + linear", "causal"),
        ("causal", "mix(causal, causal)"),
    ):
        with pytest.raises(
            ValueError, match=r"the state does not belong to this call .*start from init_state"
        ):
            sc.attend(q, q, q, text, state=states[other])
    for x in (q[:1], q[:, :2], q[..., :4], q.double()):
        with pytest.raises(ValueError, match=r"it should hold .*and holds"):
            sc.attend(x, x, x, "causal", state=states["causal"])
    with pytest.raises(ValueError, match="every new token brings its query: got 6 queries and 1 keys"):
        sc.attend(q, q[:, :, :1], q[:, :, :1], "causal", state=states["causal"])
    with pytest.raises(sc.NotSupported, match="ragged decoding is not kept in one state"):
        sc.attend(q, q, q, "causal", state=states["causal"], key_lengths=torch.tensor([6, 3]))
    with pytest.raises(sc.NotSupported, match="for a whole call, not for a step on a state"):
        sc.attend(q, q, q, "causal", state=states["causal"], need=("weights",))
    for text in ("causal + linear", "aaren"):
        rows = q[:, :, :1] if text == "aaren" else q
        with pytest.raises(sc.NotSupported, match="cannot follow a mask of single pairs"):
            sc.attend(rows, q, q, text, need=("state",), mask=torch.ones(1, 1, 1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    "text", ["causal", "window(4)", "causal + linear", "mix(causal, causal + linear)", "aaren", "moba"]
)
def test_no_new_token_changes_nothing(text: str) -> None:
    call = draw(text)
    _, state = go_on(call, [20])
    out, after = go_on(call, [20], state, 20)
    assert out.shape[2] == 0
    same("steps", go_on(call, [37], after, 20)[0], truth(call)[0][:, :, 20:])


def test_need_decides_what_comes_back() -> None:
    q = torch.randn(1, 2, 8, 4)
    assert isinstance(sc.attend(q, q, q, "causal"), Tensor)
    assert isinstance(sc.attend(q, q, q, "causal", need="out"), Tensor)
    found = sc.attend(q, q, q, "causal", need=("lse", "mass"))
    assert isinstance(found, sc.Attended)
    assert found.out.shape == (1, 2, 8, 4)
    assert found.lse.shape == (1, 2, 8)
    assert found.mass.shape == (1, 2, 8)
    assert found.weights is found.state is found.selection is None
    torch.testing.assert_close(sc.attend(q, q, q, "causal", need="lse").lse, found.lse)
    with pytest.raises(
        ValueError, match="need may name out, lse, weights, mass, state, selection, losses; got entropy"
    ):
        sc.attend(q, q, q, "causal", need=("out", "entropy"))


def test_lse_is_the_log_denominator() -> None:
    for text in ("full", "causal", "window(4)", "moba(block=4)", "causal + linear", "additive(3)"):
        call = draw(text)
        found = sc.attend(call.q, call.k, call.v, text, params=call.params, need=("lse",))
        want = truth(call)
        same("out", found.out, want[0])
        same("lse", found.lse, want[1])
    for text in (
        "nystromformer(taps=0)",
        "causal + identity",
        "mix(full, causal)",
        "causal + centroid_buckets(3)",
    ):
        call = draw(text)
        with pytest.raises(sc.NotSupported, match=r"lse|log-denominator"):
            sc.attend(call.q, call.k, call.v, text, buffers=call.buffers, need=("lse",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "text",
    [
        "full",
        "window(4)",
        "moba(block=4)",
        "causal + linear",
        "additive(3)",
        "nystromformer(taps=0)",
        "aaren",
        "by_head(full, linear)",
    ],
)
def test_dtypes(text: str, dtype: torch.dtype) -> None:
    call = draw(text, dtype=dtype)
    out = sc.attend(call.q, call.k, call.v, text, params=call.params, buffers=call.buffers)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    if "nystrom" not in text:
        found = sc.attend(
            call.q,
            call.k,
            call.v,
            text if "by_head" not in text else "full",
            params=call.params,
            need=("lse",),
        )
        assert found.lse.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    "text", ["causal", "window(5)", "moba(block=4)", "causal + linear", "causal + additive(3)"]
)
def test_the_same_call_gives_the_same_bits(text: str) -> None:
    call = draw(text, dtype=torch.float32)
    a, b = (sc.attend(call.q, call.k, call.v, text, params=call.params) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    "text",
    ["causal", "window(5)", "moba(block=4)", "causal + linear", "causal + additive(3)", "neighborhood(5)"],
)
def test_samples_of_a_batch_do_not_meet(text: str) -> None:
    call = draw(text, batch=3)
    whole = sc.attend(call.q, call.k, call.v, text, params=call.params)
    for b in range(3):
        one = sc.attend(call.q[b : b + 1], call.k[b : b + 1], call.v[b : b + 1], text, params=call.params)
        same("sample", whole[b : b + 1], one)


def test_learned_query_answers_every_prefix() -> None:
    call = draw("aaren")
    out = sc.attend(call.q, call.k, call.v, "aaren")
    assert out.shape == (2, 4, 37, 8)
    for n in (1, 20, 37):
        same("prefix", out[:, :, n - 1 : n], sc.attend(call.q, call.k[:, :, :n], call.v[:, :, :n], "full"))
    with pytest.raises(
        ValueError,
        match=r"takes one query row a head, \(B, H, 1, D\), and answers every prefix; q has 37 rows",
    ):
        sc.attend(call.v, call.k, call.v, "aaren")
