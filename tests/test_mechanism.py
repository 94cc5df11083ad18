"""Mechanisms as values: they compare, hash, know what they are, and keep the laws of their parts."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import saccade as sc
from saccade import native
from saccade.mechanism import ByHead, Join, Mix, Pairwise, Recurrent
from saccade.parts.algebra import Full, Mask
from saccade.parts.base import NAMES, Part, Sizes, register
from saccade.parts.feature import Elu1
from saccade.parts.mask import Causal, Sink, Window
from saccade.parts.memory import RowRatio
from saccade.parts.score import Dot


@dataclass(frozen=True)
class Beyond(Mask):
    """Keys at least `gap` before the query: what a window of `gap` leaves out."""

    gap: int = 4

    name = "test_beyond"
    looks_back = True
    shift_invariant = True

    def exist(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i - self.gap


def test_values_compare_and_hash_by_their_parts() -> None:
    a, b = sc.mechanism("transformer"), Pairwise()
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, sc.mechanism("full"), sc.mechanism("causal")}) == 2
    assert sc.mechanism("causal") != sc.mechanism("window(3)")
    assert sc.mechanism("causal + identity") != sc.mechanism("causal")
    assert sc.mechanism("mix(full, causal)") == Mix((Pairwise(), Pairwise(pairs=Causal())))
    assert sc.mechanism("mix(full, causal)") != sc.mechanism("mix(causal, full)")
    assert sc.mechanism("mix(full, causal)") != sc.mechanism("by_head(full, causal)")
    assert sc.mechanism("dot(scale=1)") == Pairwise(score=Dot(1.0))


def test_values_are_frozen_and_hold_no_tensor() -> None:
    m = sc.mechanism("moba + rope")
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.pairs = Full()  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(3).width = 4  # type: ignore[misc]
    for part in m.parts():
        assert not any(isinstance(getattr(part, f.name), Tensor) for f in dataclasses.fields(part))


@pytest.mark.parametrize(
    "text", ["moba + rope", "causal + performer_favor(8)", "by_head(full, causal)", "nystromformer"]
)
def test_values_survive_pickling(text: str) -> None:
    m = sc.mechanism(text)
    back = pickle.loads(pickle.dumps(m))
    assert back == m
    assert str(back) == str(m)
    assert hash(back) == hash(m)


@pytest.mark.parametrize(
    ("text", "causal", "causality"),
    [
        ("full", False, "safe"),
        ("causal", True, "safe"),
        ("window(3)", True, "safe"),
        ("window(3) + sink(2)", False, "safe"),
        ("causal + window(3) + sink(2)", True, "safe"),
        ("neighborhood(3)", False, "safe"),
        ("strided(3)", True, "safe"),
        ("chunk(3)", False, "safe"),
        ("moba", True, "safe"),
        ("top_blocks(4)", False, "safe"),
        ("linear", False, "safe"),
        ("causal + linear", True, "safe"),
        ("linformer", False, "never"),
        ("efficient_attention", False, "never"),
        ("nystromformer", False, "never"),
        ("routing_transformer", True, "leak"),
        ("mix(causal, window(3))", True, "safe"),
        ("mix(causal, full)", False, "safe"),
        ("aaren", True, "safe"),
    ],
)
def test_causality(text: str, causal: bool, causality: str) -> None:
    m = sc.mechanism(text)
    assert m.causal is causal
    assert m.causality == causality


@pytest.mark.parametrize(
    "text",
    [
        "full",
        "window(3) + sink(2)",
        "neighborhood(5)",
        "linear",
        "performer_favor",
        "mix(full, neighborhood(3))",
        "by_head(full, linear)",
        "additive",
        "alibi",
    ],
)
def test_the_causal_form_is_the_same_mechanism_under_a_limit(text: str) -> None:
    m = sc.mechanism(text)
    form = sc.causal(m)
    assert not m.causal
    assert form.causal
    sizes = Sizes(4, 4, 8, 8)
    assert form.weights(sizes) == m.weights(sizes)


@pytest.mark.parametrize(
    ("text", "relative"),
    [
        ("linformer", "performer_favor or moba"),
        ("efficient_attention", "linear or performer_favor"),
        ("efficient_attention(normalizer=scaling)", "identity"),
        ("nystromformer", "performer_favor or moba"),
        ("mix(full, linformer)", "performer_favor or moba"),
        ("elu1 + channel_ratio", "ratio"),
    ],
)
def test_what_has_no_causal_form_names_a_relative(text: str, relative: str) -> None:
    with pytest.raises(sc.NotSupported, match=f"no causal form.* its causal relative: {relative}"):
        sc.causal(sc.mechanism(text))


def test_families_and_defaults() -> None:
    m = sc.mechanism("causal + elu1 + ratio")
    assert m == Recurrent(pairs=Causal(), feature=Elu1(), ratio=RowRatio())
    assert m.family == "recurrent"
    assert sc.mechanism("full").family == "pairwise"
    assert isinstance(sc.mechanism("by_head(full, causal)"), ByHead)
    assert sc.mechanism("nystromformer").family == "mixer"
    assert sc.mechanism("softmax + dot") == Pairwise()


def test_kv_heads() -> None:
    assert sc.mechanism("full").kv_heads(8) == 8
    assert sc.mechanism("gqa(2)").kv_heads(8) == 2
    assert sc.mechanism("mqa + linear").kv_heads(8) == 1
    assert sc.mechanism("by_head(gqa(2), kv_heads(2))").kv_heads(8) == 4
    assert sc.mechanism("mix(gqa(2), kv_heads(2))").kv_heads(8) == 2
    with pytest.raises(
        sc.MechanismError, match=r"3 key-value heads do not divide 8 query heads; use one of \[1, 2, 4, 8\]"
    ):
        sc.mechanism("gqa(3)").kv_heads(8)
    with pytest.raises(sc.MechanismError, match="want different key-value heads"):
        sc.mechanism("mix(gqa(2), mqa)").kv_heads(8)
    with pytest.raises(sc.MechanismError, match="need a multiple of 3 heads, got 8"):
        sc.mechanism("by_head(full, causal, window(3))").kv_heads(8)


def test_declared_tensors_by_name() -> None:
    sizes = Sizes(4, 2, 8, 6)
    shapes = {n: w.shape for n, w in sc.mechanism("additive(5)").weights(sizes).items()}
    assert shapes == {"additive_q": (4, 8, 5), "additive_k": (2, 8, 5), "additive_v": (4, 5)}
    assert set(sc.mechanism("luong_attention(local=predictive)").streams(sizes)) == {"centre"}
    buffers = sc.mechanism("mix(performer_favor(3), full)").buffers(sizes)
    assert {n: tuple(b.shape) for n, b in buffers.items()} == {"favor": (2, 3, 8)}
    assert list(sc.mechanism("routing_transformer").buffer_names()) == ["centroids"]
    assert not sc.mechanism("moba").weights(sizes)


def test_parts_in_order_of_evaluation() -> None:
    m = sc.mechanism(
        "gauss_gate + alibi + bilinear + window(3) + causal + rope + kv_heads(2) + top_blocks(4)"
    )
    found = [p.name for p in m.parts()]
    assert found == [
        "kv_heads",
        "rope",
        "causal",
        "window",
        "top_blocks",
        "bilinear",
        "alibi",
        "softmax",
        "gauss_gate",
        "mean_key",
    ]


def test_a_name_is_given_once() -> None:
    with pytest.raises(sc.MechanismError, match="the name 'window' is taken by"):

        @dataclass(frozen=True)
        class Again(Part):
            name = "window"

    with pytest.raises(sc.MechanismError, match="the name 'moba' is taken by"):
        sc.system("moba", ref="S000")(lambda: Pairwise())
    register("window", Window)
    assert NAMES["window"] is Window


def test_names_are_words_of_the_language() -> None:
    assert all(n.isidentifier() and n == n.lower() for n in NAMES)
    assert not {"true", "false", "none"} & NAMES.keys()


def test_join_is_one_softmax_over_disjoint_keys() -> None:
    near, far = Pairwise(pairs=Window(4)), Pairwise(pairs=Beyond(4))
    m = Join((near, far))
    q, k, v = torch.randn(3, 2, 4, 19, 8, dtype=torch.float64)
    want = sc.attend(q, k, v, "causal", need=("out", "lse", "weights", "mass"))
    got = sc.attend(q, k, v, m, need=("out", "lse", "weights", "mass"))
    for a, b in zip(got[:4], want[:4], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sc.reference.attend(q, k, v, m), want.out)
    assert sc.mechanism(str(m)) == m
    assert m.causal
    kernel = "native" if native.available() else "chunk"
    assert [p.kernel for p in sc.plan(m, (2, 4, 19, 8)).members] == [kernel, kernel]
    assert all(p.request.lse for p in sc.plan(m, (2, 4, 19, 8)).members)


def test_join_of_rows_without_keys() -> None:
    m = Join((Pairwise(pairs=Window(4)), Pairwise(pairs=Beyond(4))))
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    mask[:, :, 2] = False
    found = sc.attend(q, k, v, m, mask=mask, need=("out", "lse", "weights"))
    assert not found.out[:, :, 2].any()
    assert torch.isneginf(found.lse[:, :, 2]).all()
    assert not found.weights[:, :, 2].any()
    assert torch.isfinite(found.weights).all()
    for x in torch.autograd.grad(found.out.sum(), (q, k, v)):
        assert torch.isfinite(x).all()


def test_join_learns_and_decodes_as_the_whole() -> None:
    m = Join((Pairwise(pairs=Window(4)), Pairwise(pairs=Beyond(4))))
    leaves = [torch.randn(2, 2, 15, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = [torch.autograd.grad(sc.attend(*leaves, x).sin().sum(), leaves) for x in (m, "causal")]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    q, k, v = (x.detach() for x in leaves)
    state, rows = sc.init_state(m, 2, 2, 8, dtype=torch.float64), []
    for t in range(15):
        one = sc.attend(*(x[:, :, t : t + 1] for x in (q, k, v)), m, state=state, need=("out", "state"))
        rows.append(one.out)
        state = one.state
    torch.testing.assert_close(torch.cat(rows, 2), sc.attend(q, k, v, "causal"))


def test_join_refuses_what_would_count_twice() -> None:
    for a, b in ((Window(4), Beyond(3)), (Window(4), Sink(2)), (Causal(), Full())):
        with pytest.raises(sc.MechanismError, match="share pairs, which would count twice"):
            Join((Pairwise(pairs=a), Pairwise(pairs=b)))
    with pytest.raises(sc.MechanismError, match="fixed by position"):
        Join((Pairwise(), Recurrent()))


def test_mix_is_a_weighted_sum() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    a, b = (sc.attend(q, k, v, t) for t in ("causal", "causal + linear"))
    torch.testing.assert_close(sc.attend(q, k, v, "mix(causal, causal + linear)"), (a + b) / 2)
    got = sc.attend(q, k, v, "mix(causal, causal + linear, shares=(0.3, 2))")
    torch.testing.assert_close(got, 0.3 * a + 2 * b)
    torch.testing.assert_close(
        got, sc.reference.attend(q, k, v, "mix(causal, causal + linear, shares=(0.3, 2))")
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_by_head_gives_each_member_its_share_of_the_heads(groups: int) -> None:
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, 9, 8, dtype=torch.float64)
    text = "by_head(window(3), causal + linear)"
    got = sc.attend(q, k, v, text)
    half = slice(0, max(1, groups // 2)), slice(groups // 2, groups)
    want = [
        sc.attend(q[:, 2 * n : 2 * n + 2], k[:, half[n]], v[:, half[n]], t)
        for n, t in enumerate(("window(3)", "causal + linear"))
    ]
    torch.testing.assert_close(got, torch.cat(want, 1))
    torch.testing.assert_close(sc.reference.attend(q, k, v, text), got)


def test_by_head_cuts_masks_weights_and_streams() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    mask = torch.rand(2, 4, 9, 9) < 0.7
    w = torch.randn(4, 8, 8, dtype=torch.float64)
    centre = torch.rand(2, 4, 9, dtype=torch.float64) * 9
    got = sc.attend(
        q,
        k,
        v,
        "by_head(bilinear, gauss_gate(3))",
        mask=mask,
        params={"bilinear": w},
        streams={"centre": centre},
    )
    first = sc.attend(q[:, :2], k[:, :2], v[:, :2], "bilinear", mask=mask[:, :2], params={"bilinear": w[:2]})
    second = sc.attend(
        q[:, 2:], k[:, 2:], v[:, 2:], "gauss_gate(3)", mask=mask[:, 2:], streams={"centre": centre[:, 2:]}
    )
    torch.testing.assert_close(got, torch.cat((first, second), 1))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("window(1000)", "causal"),
        ("neighborhood(1001)", "full"),
        ("strided(1)", "causal"),
        ("dilated(5, step=1)", "window(5)"),
        ("chunk(1000)", "full"),
        ("global(1000)", "full"),
        ("sink(1000)", "full"),
        ("window(1000) + sink(3)", "causal + sink(3)"),
        ("moba(block=1000)", "causal"),
        ("moba(block=4, top=100)", "causal"),
        ("causal + centroid_buckets(1)", "causal"),
        ("mix(causal, causal)", "causal"),
        ("by_head(causal, causal)", "causal"),
        ("memory_efficient_attention(3, 5)", "full"),
        ("causal + luong_attention(score=dot)", "causal + dot(scale=1.0)"),
    ],
)
def test_laws_two_texts_one_result(one: str, other: str) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 21, 8, generator=g, dtype=torch.float64)
    sizes = Sizes(4, 4, 8, 8)
    buffers = {n: b.double() for n, b in sc.mechanism(one).buffers(sizes, g).items()}
    if one.startswith("window(1000) + sink"):
        other = "full"
        mask = (torch.arange(21)[:, None] >= torch.arange(21)) | (torch.arange(21) < 3)
        want = sc.attend(q, k, v, other, mask=mask.view(1, 1, 21, 21))
    else:
        want = sc.attend(q, k, v, other)
    torch.testing.assert_close(sc.attend(q, k, v, one, buffers=buffers), want)
