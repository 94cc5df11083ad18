"""What a plan says: the chosen kernel, the rejected ones with reasons, and refusals that name the fix."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import torch

import saccade as sc
from saccade import native
from saccade.plan.choose import KERNELS, bytes_text, count_text, make

SHAPE = (1, 8, 1024, 64)


CHOSEN = [
    ("full", {}, "native", "sdpa (flash)"),
    ("causal", {"grad": True}, "native", "sdpa (flash)"),
    ("causal", {"lse": True}, "native", "chunk"),
    ("window(128)", {}, "native", "chunk"),
    ("window(128)", {"grad": True}, "native", "chunk"),
    ("neighborhood(65)", {"grad": True}, "native", "chunk"),
    ("dilated(32, step=4)", {}, "native", "chunk"),
    ("alibi + causal", {}, "chunk", "chunk"),
    ("memory_efficient_attention", {}, "chunk", "chunk"),
    ("moba", {}, "native", "block"),
    ("moba", {"grad": True}, "native", "block"),
    ("moba", {"masked": True}, "slab", "slab"),
    ("additive", {"grad": True}, "slab", "slab"),
    ("luong_attention(local=predictive)", {}, "slab", "slab"),
    ("causal + linear", {}, "native_linear", "recurrent"),
    ("gated_delta_net", {"grad": True}, "native_linear", "recurrent"),
    ("performer_favor", {"grad": True}, "recurrent", "recurrent"),
    ("causal + centroid_buckets", {}, "bucket", "bucket"),
    ("aaren", {}, "scan", "scan"),
    ("nystromformer", {}, "mixer", "mixer"),
    ("mix(causal, causal + linear)", {}, "mix(native, native_linear)", "mix(sdpa (flash), recurrent)"),
    ("routing_transformer", {}, "by_head(native, bucket)", "by_head(chunk, bucket)"),
]


@pytest.fixture(params=["with the engine", "without"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Plans with the native engine, where it was built, and without."""
    there = request.param == "with the engine"
    if there and not native.available():
        pytest.skip(f"the native engine {native.reason()}")
    if not there:
        monkeypatch.setattr(native, "reason", lambda: "was not built")
    make.cache_clear()
    yield there
    make.cache_clear()


@pytest.mark.parametrize(("text", "options", "kernel", "bare"), CHOSEN)
def test_the_kernel_that_is_chosen(
    engine: bool, text: str, options: dict[str, bool], kernel: str, bare: str
) -> None:
    assert sc.plan(text, SHAPE, **options).kernel == (kernel if engine else bare)


def test_one_row_after_a_cache_is_decoded() -> None:
    for text in ("causal", "window(128)", "gqa(2) + causal + alibi"):
        m = sc.mechanism(text)
        p = sc.plan(m, sc.Shape(1, 8, 1, 64, m.kv_heads(8), 4096), decoding=True)
        assert p.kernel in ("decode", "native", "sdpa (flash)")
        assert "decode" in [c.kernel.name for c in p.candidates if not c.reasons]
    alibi = sc.plan("gqa(2) + causal + alibi", sc.Shape(1, 32, 1, 64, 2, 32768), decoding=True)
    assert alibi.kernel == "decode"


def test_the_chosen_one_is_the_quickest_that_can_run() -> None:
    for text in ("causal", "window(64)", "moba", "linear", "additive"):
        p = sc.plan(text, SHAPE)
        able = [c for c in p.candidates if not c.reasons]
        assert len(p.candidates) == len(KERNELS)
        assert p.chosen is p.candidates[0]
        assert not p.chosen.reasons
        assert all(c.kernel.name == "reference" or p.chosen.seconds <= c.seconds for c in able)
        assert p.chosen.kernel.name != "reference"


def test_a_printed_plan_names_everything() -> None:
    shown = str(sc.plan("gqa(2) + rope + window(256)", (1, 8, 1024, 64), dtype=torch.bfloat16, grad=True))
    assert "mechanism      gqa + rope + window(256)" in shown
    assert "parts        kv_heads(2) + rope + window(256)" in shown
    assert "request        q (1, 8, 1024, 64), k (1, 2, 1024, 64), v (..., 64)" in shown
    assert "cpu, bfloat16, with gradients" in shown
    assert re.search(r"^kernel +(native|chunk)$", shown, re.M)
    assert re.search(r"^FLOPs +[\d.]+ G$", shown, re.M)
    assert re.search(r"^bytes moved +[\d.]+ MiB$", shown, re.M)
    assert re.search(r"^peak memory +[\d.]+ MiB besides the inputs$", shown, re.M)
    assert re.search(r"^result +exact, deterministic$", shown, re.M)
    assert re.search(r"^gradients +yes$", shown, re.M)
    assert re.search(r"^lse +yes$", shown, re.M)
    assert re.search(r"^causal +yes$", shown, re.M)
    slower = shown[shown.index("slower") : shown.index("rejected")]
    assert "slab" in slower
    for k in KERNELS:
        assert k.name in shown, f"{k.name} is not named"
    for name, why in (
        ("sdpa", r"pairs window\(256\) would need a dense length x length mask"),
        ("decode", "at most 16 query rows, here are 1024"),
        ("recurrent", "runs recurrent mechanisms, this one is pairwise"),
        ("block", "not one choice of blocks"),
        ("flex", "waits tens of seconds for a compiler"),
    ):
        assert re.search(rf"^  {name} +.*{why}", shown, re.M), name


def test_a_printed_plan_says_what_is_particular(engine: bool) -> None:
    assert "lse            no" in str(sc.plan("full", SHAPE, kernel="sdpa"))
    assert "causal         no, and it has no causal form (relative: performer_favor or moba)" in str(
        sc.plan("linformer(length=1024)", SHAPE)
    )
    assert "causal         no, and it has no causal form" in str(sc.plan("nystromformer", SHAPE))
    assert "the choice of pairs reads the future in training" in str(sc.plan("routing_transformer", SHAPE))
    both = str(sc.plan("by_head(window(64), causal + linear)", SHAPE))
    assert "  mechanism      window(64)" in both
    assert f"  kernel         {'native_linear' if engine else 'recurrent'}" in both
    assert "q (1, 4, 1024, 64)" in both


def test_a_plan_prints_the_words_it_was_asked_by() -> None:
    for text in ("full", "transformer", "mix(transformer, causal)", "mix(full, causal)"):
        p = sc.plan(text, (1, 2, 32, 8))
        assert str(p.mechanism) == text
        assert f"mechanism      {text}\n" in str(p)
        assert [str(x.mechanism) for x in p.members] == ([text[4:-9], "causal"] if p.members else [])


def test_a_refusal_lists_every_kernel_with_its_reasons() -> None:
    with pytest.raises(sc.NotSupported) as refused:
        sc.plan("causal + linear", (1, 8, 65536, 64), masked=True)
    said = str(refused.value)
    assert said.startswith("nothing runs causal + linear for q (1, 8, 65536, 64)")
    assert "with a mask" in said
    for k in KERNELS:
        assert re.search(rf"^  {k.name}: .+", said, re.M), k.name
    assert "use key_lengths for padding" in said


def test_a_demanded_kernel_runs_or_is_refused() -> None:
    for name in ("sdpa", "chunk", "slab", "reference"):
        assert sc.plan("causal", SHAPE, kernel=name).chosen.kernel.name == name
    with pytest.raises(sc.NotSupported, match="the call demands sdpa") as refused:
        sc.plan("window(64)", SHAPE, kernel="sdpa")
    assert "chunk: the call demands sdpa" in str(refused.value)
    with pytest.raises(
        ValueError, match="no kernel is called 'flash'; there are sdpa, native, thin, decode, chunk"
    ):
        sc.plan("causal", SHAPE, kernel="flash")
    with pytest.raises(ValueError, match="no kernel is called 'flash'"):
        sc.plan("mix(causal, full)", SHAPE, kernel="flash")
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="no kernel is called 'flash'"):
        sc.attend(q, q, q, "causal", kernel="flash")


def test_a_demanded_kernel_is_never_switched_in_decoding() -> None:
    q = torch.randn(1, 2, 8, 4)
    for text, own in (("causal + linear", "recurrent"), ("aaren", "scan")):
        rows = q[:, :, :1] if text == "aaren" else q
        sc.attend(rows, q, q, text, need=("state",), kernel=own)
        for name in ("slab", "flash"):
            with pytest.raises(ValueError, match=name):
                sc.attend(rows, q, q, text, need=("state",), kernel=name)


def test_the_definition_is_the_last_candidate_and_warns_once() -> None:
    shape = (1, 2, 33, 8)
    with pytest.warns(UserWarning, match=r"alibi \+ aaren runs by its definition, slowly"):
        p = sc.plan("alibi + aaren", shape)
    assert p.kernel == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sc.plan("alibi + aaren", shape)
        sc.plan("alibi + aaren", (1, 2, 34, 8), kernel="reference")
    with pytest.raises(
        sc.NotSupported, match=r"would hold 34,359,738,368 pairs; it takes at most 16,777,216"
    ):
        sc.plan("alibi + aaren", (1, 8, 65536, 64))


@pytest.mark.parametrize("text", ["linformer", "mix(full, linformer)"])
def test_masks_of_pairs_have_no_meaning_among_summaries(text: str) -> None:
    with pytest.raises(
        sc.NotSupported, match="no meaning once keys are summarised; use key_lengths for padding"
    ):
        sc.plan(text, (1, 8, 256, 64), masked=True)


def test_key_value_heads_follow_the_mechanism_or_the_caller() -> None:
    assert sc.plan("gqa(2)", SHAPE).request.shape.kv_heads == 2
    assert sc.plan("full", SHAPE).request.shape.kv_heads == 8
    assert sc.plan("full", sc.Shape(1, 8, 64, 16, kv_heads=4)).request.shape.kv_heads == 4
    with pytest.raises(sc.MechanismError, match="do not divide 8 query heads"):
        sc.plan("gqa(3)", SHAPE)


def test_plans_are_made_once() -> None:
    a, b = (sc.plan("window(77)", SHAPE).candidates for _ in range(2))
    assert a is b


def test_counts_and_bytes_as_words() -> None:
    assert [count_text(n) for n in (0, 999, 1500, 2.5e9, 3e15, 4e18)] == [
        "0",
        "999",
        "1.5 k",
        "2.5 G",
        "3 P",
        "4e+03 P",
    ]
    assert [bytes_text(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B",
        "1.02e+03 B",
        "1.5 KiB",
        "3 MiB",
        "5 TiB",
    ]
