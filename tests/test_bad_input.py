"""Bad input: a clear error that names the fix, or the right answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from kernels.harness import Call, draw

FAMILIES = [
    "full",
    "causal",
    "window(5)",
    "neighborhood(5, dilation=2)",
    "sink(2) + window(3)",
    "moba(block=4, top=2)",
    "causal + additive(3)",
    "causal + linear",
    "linear",
    "performer_favor(8)",
    "efficient_attention",
    "causal + centroid_buckets(3)",
    "by_head(window(3), causal + linear)",
    "mix(full, linear)",
    "nystromformer(landmarks=3)",
    "linformer(rank=3, length=64)",
]


def attend(call: Call, **more: object) -> Tensor:
    given = {"params": call.params, "streams": call.streams, "buffers": call.buffers} | more
    return sc.attend(call.q, call.k, call.v, call.text, **given)  # type: ignore[call-overload, no-any-return]


def qkv(
    q: tuple[int, ...] = (2, 4, 6, 8), k: tuple[int, ...] = (2, 4, 6, 8), v: tuple[int, ...] = (2, 4, 6, 8)
) -> list[Tensor]:
    return [torch.randn(x) for x in (q, k, v)]


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"k": (2, 3, 6, 8), "v": (2, 3, 6, 8)}, "the 3 key-value heads must divide the 4 query heads"),
        ({"k": (2, 8, 6, 8), "v": (2, 8, 6, 8)}, "the 8 key-value heads must divide the 4 query heads"),
        ({"k": (2, 0, 6, 8), "v": (2, 0, 6, 8)}, "the 0 key-value heads must divide the 4 query heads"),
        ({"k": (2, 2, 6, 8)}, r"k and v must share heads and length, got \(2, 6\) and \(4, 6\)"),
        ({"v": (2, 4, 7, 8)}, r"k and v must share heads and length, got \(4, 6\) and \(4, 7\)"),
        ({"k": (2, 4, 6, 5)}, "q and k must share head_dim, got 8 and 5"),
        ({"k": (3, 4, 6, 8), "v": (3, 4, 6, 8)}, "must share the batch size, got 2, 3, 3"),
        ({"q": (4, 6, 8)}, r"q must be \(batch, heads, length, head_dim\), got shape \(4, 6, 8\)"),
        (
            {"v": (2, 4, 6, 8, 1)},
            r"v must be \(batch, heads, length, head_dim\), got shape \(2, 4, 6, 8, 1\)",
        ),
    ],
)
def test_sizes_that_disagree(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sc.attend(*qkv(**shapes), "causal")


def test_key_value_heads_that_the_mechanism_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"gqa has 2 key-value heads for 4 query heads, but k has 4"):
        sc.attend(*qkv(), "gqa(2)")
    with pytest.raises(sc.MechanismError, match="need a multiple of 3 heads, got 4"):
        sc.attend(*qkv(), "by_head(full, causal, linear)")
    two = {"k": (2, 2, 6, 8), "v": (2, 2, 6, 8)}
    with pytest.raises(
        ValueError, match="by_head: 4 members need 1 key-value head or a multiple of 4, got 2"
    ):
        sc.attend(*qkv(**two), "by_head(full, causal, linear, full)")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_dtypes_that_disagree(at: int) -> None:
    x = qkv()
    x[at] = x[at].double()
    with pytest.raises(
        TypeError, match=r"q, k and v must share a dtype, got .*float64.*convert them with .to"
    ):
        sc.attend(*x, "causal")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_no_floats(dtype: torch.dtype) -> None:
    x = [torch.zeros(1, 1, 2, 2, dtype=dtype)] * 3
    with pytest.raises(TypeError, match="q must be float16, bfloat16, float32 or float64, got"):
        sc.attend(*x, "causal")


def test_what_is_no_tensor() -> None:
    q, k, _ = qkv()
    with pytest.raises(TypeError, match="v must be a tensor, got list"):
        sc.attend(q, k, [[1.0]], "causal")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="a mechanism is given as text or as a value, got NoneType"):
        sc.attend(q, k, k, None)  # type: ignore[call-overload]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_devices_that_disagree(at: int) -> None:
    x = qkv()
    x[at] = x[at].to("meta")
    with pytest.raises(ValueError, match=r"q, k and v must be on one device, got .*meta"):
        sc.attend(*x, "causal")


def test_other_tensors_on_another_device() -> None:
    x, meta = qkv(), torch.device("meta")
    with pytest.raises(ValueError, match="mask is on meta, q on cpu"):
        sc.attend(*x, "causal", mask=torch.ones(1, 1, 6, 6, dtype=torch.bool, device=meta))
    with pytest.raises(ValueError, match="key_lengths are on meta, q on cpu"):
        sc.attend(*x, "causal", key_lengths=torch.ones(2, dtype=torch.long, device=meta))
    with pytest.raises(ValueError, match=r"params\['bilinear'\] is on meta, q on cpu"):
        sc.attend(*x, "bilinear", params={"bilinear": torch.empty(4, 8, 8, device=meta)})
    with pytest.raises(ValueError, match=r"buffers\['favor'\] is on meta, q on cpu"):
        sc.attend(*x, "performer_favor(5)", buffers={"favor": torch.empty(4, 5, 8, device=meta)})


def test_masks() -> None:
    x = qkv()
    with pytest.raises(
        TypeError,
        match=r"mask must be boolean, True where a pair may attend, got torch.float32; for additive terms",
    ):
        sc.attend(*x, "causal", mask=torch.zeros(1, 1, 6, 6))
    for shape in ((6, 6), (1, 1, 6, 5), (3, 1, 6, 6), (1, 2, 6, 6), (1, 1, 5, 6)):
        with pytest.raises(ValueError, match=r"mask must be broadcastable to \(2, 4, 6, 6\), got"):
            sc.attend(*x, "causal", mask=torch.ones(shape, dtype=torch.bool))
    for text in ("elu1 + channel_ratio", "nystromformer(landmarks=2, taps=0)"):
        with pytest.raises(sc.NotSupported, match="use key_lengths for padding"):
            sc.attend(*x, text, mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


@pytest.mark.parametrize("text", ["linear", "causal + linear", "causal + identity"])
def test_a_mask_over_a_state_is_followed_by_the_definition_with_a_warning(text: str) -> None:
    call = draw(text, rows=11, batch=1)
    mask = torch.rand(1, 4, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :, 0] = False
    with pytest.warns(UserWarning, match="runs by its definition, slowly"):
        found = attend(call, mask=mask, need=("out", "weights"))
    phi_q, phi_k = (x if "identity" in text else torch.nn.functional.elu(x) + 1 for x in (call.q, call.k))
    w = (phi_q @ phi_k.transpose(-1, -2)) * mask
    w = w.tril() if "causal" in text else w
    w = w if "identity" in text else w / w.sum(-1, keepdim=True).clamp_min(1e-300)
    torch.testing.assert_close(found.weights, w)
    torch.testing.assert_close(found.out, w @ call.v)


def test_key_lengths() -> None:
    x = qkv()
    for wrong in (torch.tensor([6.0, 3.0]), torch.tensor([6]), torch.tensor([[6, 3]]), [6, 3]):
        with pytest.raises(ValueError, match=r"key_lengths must be an integer tensor of shape \(2,\)"):
            sc.attend(*x, "causal", key_lengths=wrong)
    for wrong in ([7, 3], [-1, 3]):
        with pytest.raises(ValueError, match=r"key_lengths must lie in 0..6, got"):
            sc.attend(*x, "causal", key_lengths=torch.tensor(wrong))


def test_named_tensors() -> None:
    x = qkv()
    with pytest.raises(
        ValueError,
        match=r"bilinear needs params=\{...\} with bilinear \(4, 8, 8\); saccade.nn.Attention owns them",
    ):
        sc.attend(*x, "bilinear")
    with pytest.raises(ValueError, match=r"needs buffers=\{...\} with favor"):
        sc.attend(*x, "performer_favor")
    with pytest.raises(ValueError, match=r"needs streams=\{...\} with centre"):
        sc.attend(*x, "gauss_gate")
    with pytest.raises(ValueError, match="causal has no params called bilinear; it has none"):
        sc.attend(*x, "causal", params={"bilinear": torch.eye(8).expand(4, 8, 8)})
    with pytest.raises(ValueError, match=r"params\['bilinear'\] must have shape \(4, 8, 8\), got \(8, 8\)"):
        sc.attend(*x, "bilinear", params={"bilinear": torch.eye(8)})
    with pytest.raises(ValueError, match=r"streams\['centre'\] must have shape \(2, 4, 6\), got \(2, 4, 5\)"):
        sc.attend(*x, "gauss_gate", streams={"centre": torch.zeros(2, 4, 5)})
    with pytest.raises(
        sc.NotSupported,
        match=r"needs a buffer `favor` \(key-value heads, 5, 8\), got \(3, 5, 8\) for 4 heads",
    ):
        sc.attend(*x, "performer_favor(5)", buffers={"favor": torch.zeros(3, 5, 8)})
    with pytest.raises(sc.NotSupported, match=r"needs a buffer `favor` .*got \(4, 6, 8\)"):
        sc.attend(*x, "performer_favor(5)", buffers={"favor": torch.zeros(4, 6, 8)})


@pytest.mark.parametrize("text", FAMILIES)
def test_nan_propagates_and_nothing_hangs(text: str) -> None:
    for name in ("q", "k", "v"):
        call = draw(text, rows=20, dtype=torch.float32)
        getattr(call, name)[0, :, 9] = math.nan
        out = attend(call)
        whole = name == "v" or "nystrom" in text or "linformer" in text
        assert out[0, :, 9].isnan().any() or (whole and out[0].isnan().any()), f"a NaN in {name} was lost"
        assert not out[1].isnan().any(), f"a NaN in {name} reached another sample"


@pytest.mark.parametrize(
    "text",
    ["full", "causal", "window(5)", "additive(3)", "linear", "causal + linear", "moba(block=4, top=2)"],
)
def test_the_nan_of_a_query_stays_in_its_row(text: str) -> None:
    call = draw(text, rows=20)
    clean = attend(call)
    call.q[0, 0, 9] = math.nan
    out = attend(call)
    assert out[0, 0, 9].isnan().all()
    out[0, 0, 9] = clean[0, 0, 9]
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("text", FAMILIES)
def test_infinite_inputs_do_not_hang(text: str) -> None:
    call = draw(text, rows=20, dtype=torch.float32)
    call.q[0, :, 3], call.k[0, :, 5] = math.inf, -math.inf
    assert attend(call).shape == call.q.shape


@pytest.mark.parametrize("text", FAMILIES)
@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 6, 6), (2, 0, 6), (2, 6, 0), (2, 0, 0), (0, 0, 0)])
def test_zero_lengths(text: str, batch: int, rows: int, keys: int) -> None:
    call = draw(text, batch=2, rows=6)
    q, k, v = call.q[:batch, :, :rows], call.k[:batch, :, :keys], call.v[:batch, :, :keys]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = sc.attend(*leaves, text, params=call.params, buffers=call.buffers)
    assert out.shape == (batch, 4, rows, 8)
    assert not out.any()
    for x, g in zip(leaves, torch.autograd.grad(out.sum(), leaves, allow_unused=True), strict=True):
        assert g is None or (g.shape == x.shape and not g.any())


@pytest.mark.parametrize(("batch", "rows", "keys"), [(0, 6, 6), (2, 0, 6), (2, 6, 0)])
@pytest.mark.parametrize(
    "text", ["causal", "window(3)", "additive(3)", "moba(block=4)", "causal + linear", "aaren"]
)
def test_zero_lengths_with_everything_asked_for(text: str, batch: int, rows: int, keys: int) -> None:
    call = draw(text, batch=2, rows=6)
    if text == "aaren" and batch and keys:
        pytest.skip("its rows are its keys")
    rows = keys if text == "aaren" else rows
    q = call.q[:batch] if text == "aaren" else call.q[:batch, :, :rows]
    k, v = call.k[:batch, :, :keys], call.v[:batch, :, :keys]
    found = sc.attend(q, k, v, text, params=call.params, need=("lse", "weights", "mass"))
    assert torch.isneginf(found.lse).all()
    assert found.lse.shape == (batch, 4, rows)
    assert found.weights.shape == (batch, 4, rows, keys)
    assert found.mass.shape == (batch, 4, keys)
    assert not found.mass.any()


@pytest.mark.parametrize("keys", [1, 2, 7, 15, 16, 40])
@pytest.mark.parametrize("text", ["full", "causal", "linformer(rank=3, length=64)"])
def test_nan_propagates_over_few_keys(text: str, keys: int) -> None:
    for rows in (1, keys):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            call = draw(text, rows=rows, keys=keys, dtype=dtype)
            call.q[0, 0, -1] = math.nan
            assert attend(call)[0, 0, -1].isnan().all()


def test_an_empty_sample_among_others() -> None:
    for text in (
        "full",
        "causal",
        "window(3)",
        "moba(block=4)",
        "causal + linear",
        "linear",
        "linformer(rank=3, length=64)",
        "efficient_attention",
    ):
        call = draw(text, lengths=[6, 0], rows=6)
        out = attend(call, key_lengths=call.lengths)
        assert torch.isfinite(out).all()
        assert not out[1].any()


@pytest.mark.parametrize("text", FAMILIES)
def test_strides_do_not_matter(text: str) -> None:
    call = draw(text, rows=20)
    want = attend(call)
    turned = call.changed(lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2))
    assert not turned.q.is_contiguous()
    torch.testing.assert_close(attend(turned), want)
    wide = call.changed(lambda x: torch.stack((x, -x), dim=-1)[..., 0])
    torch.testing.assert_close(attend(wide), want)
    flat = draw(text, rows=20)
    same = Call(
        text,
        *(x[:1, :1].expand_as(x) for x in (flat.q, flat.k, flat.v)),
        flat.params,
        flat.streams,
        flat.buffers,
    )
    copied = Call(
        text, *(x.contiguous() for x in (same.q, same.k, same.v)), flat.params, flat.streams, flat.buffers
    )
    torch.testing.assert_close(attend(same), attend(copied))


@pytest.mark.parametrize("text", FAMILIES)
def test_inputs_are_left_as_they_were(text: str) -> None:
    call = draw(text, rows=20, lengths=[20, 9])
    kept = {n: x.clone() for n, x in call.learned.items()}
    attend(call, key_lengths=call.lengths)
    assert all(torch.equal(kept[n], x) for n, x in call.learned.items())


@pytest.mark.parametrize("rows", [1, 2, 3, 61])
@pytest.mark.parametrize("text", FAMILIES)
def test_lengths_that_no_block_divides(text: str, rows: int) -> None:
    call = draw(text, rows=rows)
    want = sc.reference.attend(call.q, call.k, call.v, text, params=call.params, buffers=call.buffers)
    torch.testing.assert_close(attend(call), want)


def test_a_shape_that_is_none() -> None:
    for shape in ((1, 2, 3), (1, 2, 3, 4, 5)):
        with pytest.raises(
            ValueError, match=r"a shape is saccade.Shape\(...\) or \(batch, heads, length, head_dim\), got"
        ):
            sc.plan("causal", shape)
