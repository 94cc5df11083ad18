"""The native linear engine against the definition in float64: decays, writes, ratios, states, every instruction set, tails, padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, answer, draw, gradients, same, truth, within_budget
from saccade import native
from saccade.kernels import native_linear as kernel
from saccade.kernels import native_step
from saccade.kernels.recurrent import Carry, chunked
from saccade.mechanism.values import Recurrent
from saccade.parts.base import Sizes
from saccade.parts.memory import RowRatio
from saccade.parts.pair import Context

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the native engine {native.reason()}")

TEXTS = [
    "causal + identity",
    "causal + linear",
    "causal + fixed_decay(first=1.0) + identity",
    "causal + fixed_decay + elu1 + ratio",
    "causal + gate_decay(temperature=2.0) + identity",
    "causal + step_decay + identity + step_write",
    "causal + step_decay + elu1 + ratio + step_write",
    "causal + channel_decay(temperature=2.0) + identity",
    "causal + channel_decay(temperature=0.2) + elu1 + ratio",
    "unit + causal + identity + delta",
    "unit + causal + identity + delta(most=2.0) + step_decay",
    "unit + causal + identity + delta + channel_decay(temperature=2.0)",
]
KINDS = [TEXTS[i] for i in (1, 6, 8, 11)]
SINGLE = 2e-5


def ratio(text: str) -> bool:
    m = sc.mechanism(text)
    return isinstance(m, Recurrent) and isinstance(m.ratio, RowRatio)


def given(
    text: str, *, rows: int = 37, dtype: torch.dtype = torch.float32, scale: float = 1.0, **options: object
) -> Call:
    """A call whose streams are normal, in the shapes that the mechanism declares."""
    bare = draw("causal + identity", rows=rows, dtype=dtype, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(9)
    (b, h, n, d), g, e = bare.q.shape, bare.k.shape[1], bare.v.shape[-1]
    m, sizes = sc.mechanism(text), Sizes(h, g, d, e)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return replace(
        bare,
        text=text,
        params={name: normal(*w.shape) * 0.4 for name, w in m.weights(sizes).items()},
        streams={name: normal(*s.shape(b, h, n)) for name, s in m.streams(sizes).items()},
    )


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    return answer(call, "native_linear", ratio(call.text))


def close(call: Call, *, grad: bool = True) -> None:
    """The engine answers, from float32 inputs, what the definition answers in float64; padding holds NaN."""
    wide = call.changed(Tensor.double)
    dirty = call.poisoned() if call.lengths is not None else call
    want, want_lse = truth(wide)
    got, got_lse = run(dirty)
    same("out", got, want, call.row_valid, SINGLE)
    if ratio(call.text):
        assert got_lse is not None
        assert want_lse is not None
        same("lse", got_lse, want_lse, call.row_valid.squeeze(-1), SINGLE)
    if not grad:
        return
    expected = gradients(wide, truth, with_lse=ratio(call.text))
    found = gradients(dirty, run, with_lse=ratio(call.text))
    for name, x in expected.items():
        token = name in call.streams or name in ("q", "k", "v")
        where = None if not token else call.row_valid if x.dim() == 4 else call.row_valid.squeeze(-1)
        if call.lengths is not None and name in ("q", "k", "v") and "unit" not in call.text:
            zero = found[name][~call.row_valid.expand_as(x)]
            assert not zero.any(), f"padding has a gradient of {name}"
        same(f"gradient of {name}", found[name], x, where, SINGLE)


@pytest.fixture(params=range(4), ids=native.ISA)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Each instruction set that this machine has, forced."""
    if request.param > native.ISA.index(native.isa()):
        pytest.skip(f"this machine has no {native.ISA[request.param]}")
    monkeypatch.setattr(kernel, "BEST", request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 37, 130])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_the_definition(text: str, rows: int) -> None:
    close(given(text, rows=rows))


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize(("dim", "value"), [(1, 1), (5, 3), (16, 33), (64, 64), (80, 100)])
def test_every_instruction_set_and_size(isa: int, text: str, dim: int, value: int) -> None:
    close(given(text, rows=101, heads=2, batch=1, dim=dim, value=value))


@pytest.mark.parametrize("rows", [2, 5, 6, 7, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 129])
@pytest.mark.parametrize("text", KINDS)
def test_lengths_that_no_chunk_divides(text: str, rows: int) -> None:
    close(given(text, rows=rows, heads=2, batch=1, dim=4))


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_grouped_heads_and_another_value_size(text: str, kv: int) -> None:
    close(given(text, kv=kv, value=5, rows=70))


@pytest.mark.parametrize("lengths", [[70, 70, 70], [70, 33, 0], [1, 64, 65]])
@pytest.mark.parametrize("text", KINDS)
def test_padding_is_never_read(text: str, lengths: list[int]) -> None:
    call = given(text, batch=3, kv=2, rows=70, lengths=lengths)
    close(call)
    out, lse = run(call.poisoned())
    assert not out[~call.row_valid.expand_as(out)].any()
    assert lse is None or torch.isneginf(lse[~call.row_valid.squeeze(-1).expand_as(lse)]).all()


@pytest.mark.parametrize("text", KINDS)
def test_strides_of_the_inputs_do_not_matter(text: str) -> None:
    call = given(text)
    close(call.changed(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x))
    close(replace(call, k=call.k[:, :1].expand_as(call.k), v=call.v[:1].expand_as(call.v)), grad=False)


def test_no_tokens_and_no_samples() -> None:
    for shape in ((2, 4, 0, 8), (0, 4, 5, 8)):
        x = torch.zeros(shape)
        assert sc.attend(x, x, x, "causal + linear", kernel="native_linear").shape == shape


def test_a_sample_without_keys_gives_zeros_and_finite_gradients() -> None:
    call = given("causal + linear", lengths=[37, 0])
    out, lse = run(call)
    assert lse is not None
    assert not out[1].any()
    assert torch.isneginf(lse[1]).all()
    assert all(torch.isfinite(x).all() for x in gradients(call, run).values())


@pytest.mark.parametrize("text", TEXTS)
def test_states_go_on_and_have_gradients(text: str) -> None:
    """A call from a state equals the PyTorch kernel in float64: out, the state after, and gradients of all three."""
    call, m = given(text, rows=70, kv=2, batch=2, value=6), sc.mechanism(text)
    assert isinstance(m, Recurrent)
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(2, 2, m.feature.size(8), 6, generator=generator)
    z = torch.rand(2, 2, m.feature.size(8), generator=generator) + 1

    def outcome(dtype: torch.dtype, native_one: bool) -> list[Tensor]:
        leaf = call.changed(lambda x: x.detach().to(dtype).requires_grad_())
        before = [x.to(dtype).requires_grad_() for x in (s, z)]
        c = Context(leaf.q, leaf.k, leaf.v, params=leaf.params, streams=leaf.streams)
        carry = Carry(before[0], before[1], torch.full((2, 2), -torch.inf))
        if native_one:
            out, _, after = kernel.advance(m, c, carry, ratio(text))
        else:
            out, _, after = chunked(m, c, carry)
        ends = [out, after.s, *([after.z] if ratio(text) else [])]
        weights = [torch.linspace(-1, 2, x.numel()).view_as(x).to(dtype) for x in ends]
        loss = torch.stack([(x * w).sum() for x, w in zip(ends, weights, strict=True)]).sum()
        inputs = [*leaf.learned.values(), *(before if ratio(text) else before[:1])]
        return [*ends, *torch.autograd.grad(loss, inputs)]

    for n, (got, want) in enumerate(
        zip(outcome(torch.float32, True), outcome(torch.float64, False), strict=True)
    ):
        same(f"result {n}", got, want, tolerance=SINGLE)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kv", [1, 4])
def test_pieces_of_any_length_and_single_tokens_equal_the_whole_call(text: str, kv: int) -> None:
    call = given(text, rows=100, kv=kv, value=16)
    whole = sc.attend(
        call.q,
        call.k,
        call.v,
        text,
        params=call.params,
        streams=call.streams,
        need=("out", "state"),
        kernel="native_linear",
    )
    for pieces in ((100,), (64, 36), (1,) * 5 + (37, 1, 57), (1,) * 100):
        state, outs, start = sc.init_state(text, 2, kv, 8, 16, heads=4), [], 0
        for count in pieces:
            at = slice(start, start + count)
            start += count
            found = sc.attend(
                call.q[:, :, at],
                call.k[:, :, at],
                call.v[:, :, at],
                text,
                state=state,
                params=call.params,
                streams={n: x[:, :, at] for n, x in call.streams.items()},
                need=("out", "state"),
                kernel="native_linear",
            )
            assert found.state is not None
            state = found.state
            outs.append(found.out)
        same("out", torch.cat(outs, 2), whole.out, tolerance=SINGLE)
        assert whole.state is not None
        for name, x in whole.state.tensors.items():
            same(f"state {name}", state.tensors[name], x, tolerance=SINGLE)


SYSTEMS = ["retention", "gla", "mamba2", "delta_net", "gated_delta_net", "unit + causal + linear"]


@pytest.mark.parametrize(("dim", "value"), [(8, 16), (5, 3), (64, 64)])
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("text", TEXTS + SYSTEMS)
def test_one_token_does_all_that_its_parts_say(text: str, kv: int, dim: int, value: int) -> None:
    """The bound step against the PyTorch step in float64, over a few tokens; streams of all sizes of numbers."""
    call = given(text, rows=6, kv=kv, dim=dim, value=value, scale=3.0)
    state = sc.init_state(text, 2, kv, dim, value, heads=4)
    wide = sc.init_state(text, 2, kv, dim, value, heads=4, dtype=torch.float64)
    for t in range(6):
        one = call.changed(lambda x, t=t: x[:, :, t : t + 1].contiguous() if x.dim() > 2 else x)
        one = replace(one, params=call.params)
        m = sc.mechanism(text)
        assert isinstance(m, Recurrent)
        c = Context(one.q, one.k, one.v, params=one.params, streams=one.streams)
        found = native_step.step(m, c, state)
        assert found is not None
        out, state = found
        named = one.changed(Tensor.double)
        want = sc.attend(
            named.q,
            named.k,
            named.v,
            text,
            params=named.params,
            streams=named.streams,
            state=wide,
            need=("out", "state"),
        )
        assert want.state is not None
        wide = want.state
        same("out", out, want.out, tolerance=SINGLE)
        same("state", state.tensors["s"], wide.tensors["s"], tolerance=SINGLE)
        if ratio(text):
            same("sums", state.tensors["z"], wide.tensors["z"], tolerance=SINGLE)
        assert state.length == wide.length == t + 1


def test_a_token_with_a_gradient_or_other_strides_goes_the_general_way() -> None:
    m = sc.mechanism("causal + linear")
    assert isinstance(m, Recurrent)
    x, state = torch.randn(2, 2, 1, 16), sc.init_state(m, 2, 2, 16)
    assert native_step.step(m, Context(x, x, x), state) is not None
    leaf = x.clone().requires_grad_()
    assert native_step.step(m, Context(leaf, x, x), state) is None
    strided = torch.randn(2, 2, 1, 32)[..., ::2]
    assert native_step.step(m, Context(strided, x, x), state) is None
    found = sc.attend(leaf, x, x, m, state=state)
    (slope,) = torch.autograd.grad(found.sum(), leaf)
    assert torch.isfinite(slope).all()
    same("out", found, sc.attend(x, x, x, m, state=state), tolerance=1e-6)


def test_a_state_is_never_changed_in_place() -> None:
    x = torch.randn(1, 2, 1, 16)
    state = sc.attend(x, x, x, "causal + linear", need=("state",)).state
    assert state is not None
    before = {n: t.clone() for n, t in state.tensors.items()}
    for _ in range(2):
        sc.attend(x, x, x, "causal + linear", state=state)
    assert all(torch.equal(t, before[n]) for n, t in state.tensors.items())


def test_strong_decays_forget_and_weak_ones_keep() -> None:
    """A gate that closes for one token cuts all before it off, exactly; what comes after is not harmed."""
    for text in (
        "causal + gate_decay(temperature=1.0) + identity",
        "causal + channel_decay(temperature=1.0) + identity",
    ):
        call = given(text, rows=130, scale=0.1)
        closed = call.streams["forget"].clone()
        closed[:, :, 70] = -1e4
        call = replace(call, streams={"forget": closed})
        close(call)
        cut = replace(call.changed(lambda x: x[:, :, 70:]), lengths=None)
        same("after", run(call)[0][:, :, 70:], run(cut)[0], tolerance=SINGLE)


@pytest.mark.parametrize("text", KINDS)
def test_threads_and_shared_heads_do_not_change_the_result(text: str) -> None:
    call = given(text, rows=70, batch=1, heads=6, kv=1)
    alone = run(call)[0]
    torch.set_num_threads(3)
    try:
        same("out", run(call)[0], alone, tolerance=0)
        close(call)
    finally:
        torch.set_num_threads(1)


def twin(call: Call) -> tuple[Tensor, None]:
    """The parallel form with elu(x) + 1, whole and in the call's own precision."""
    phi_q, phi_k = torch.nn.functional.elu(call.q) + 1, torch.nn.functional.elu(call.k) + 1
    w = (phi_q @ phi_k.transpose(-1, -2)).tril()
    return (w @ call.v) / w.sum(-1, keepdim=True), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_stays_within_the_twins_budget(isa: int, dtype: torch.dtype) -> None:
    within_budget(draw("causal + linear", rows=300, heads=2, dim=16, dtype=dtype), "native_linear", twin)


def test_bfloat16_keeps_a_float32_state() -> None:
    x = torch.randn(1, 2, 40, 16).bfloat16()
    found = sc.attend(x, x, x, "causal + linear", need=("out", "state", "lse"))
    assert found.state is not None
    assert found.lse is not None
    assert {t.dtype for t in (*found.state.tensors.values(), found.lse)} == {torch.float32}
    assert found.out.dtype == torch.bfloat16


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "with gradients"])
def test_planned_products_are_those_done(text: str, grad: bool) -> None:
    for rows in (1, 130, 200):
        call = given(text, rows=rows, kv=2, batch=1, dim=24, value=20)
        shape = sc.Shape(1, 4, rows, 24, 2, rows, 20)
        planned = sc.plan(text, shape, grad=grad, kernel="native_linear").cost.flops
        with native.counting() as counter:
            if grad:
                gradients(call, run)
            else:
                run(call)
        assert planned == counter.flops


def test_what_it_refuses_it_explains() -> None:
    for text, shape, more, words in (
        ("causal", (1, 4, 64, 16), {}, "this one is pairwise"),
        ("linear", (1, 4, 64, 16), {}, "runs causal states"),
        ("causal + linear", (1, 4, 64, 16), {"masked": True}, "use key_lengths for padding"),
        ("causal + linear", (1, 4, 64, 16), {"dtype": torch.float64}, "here is float64"),
        ("causal + linear", (1, 4, 64, 1024), {}, "at most 512 numbers"),
        ("causal + identity", (1, 4, 64, 16), {"lse": True}, "no row denominator"),
        ("causal + performer_favor(12)", (1, 4, 64, 16), {}, "keeps their scale apart"),
        ("causal + linear", sc.Shape(1, 4, 3, 16, keys=64), {}, "as many queries as keys"),
    ):
        with pytest.raises(sc.NotSupported, match=words):
            sc.plan(text, shape, kernel="native_linear", **more)  # type: ignore[arg-type]
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    with pytest.raises(sc.NotSupported, match="here is float64"):
        sc.attend(x, x, x, "causal + linear", need=("state",), kernel="native_linear")
