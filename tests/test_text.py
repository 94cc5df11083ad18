"""The text form: it parses, prints, parses back to the same value, and says what is wrong with the rest."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import saccade as sc
from saccade.mechanism import combine, names
from saccade.mechanism.values import Pairwise, Recurrent
from saccade.parts.base import PARTS
from saccade.parts.mask import Causal, Chunk, Sink, Strided, Window
from saccade.parts.proxy import MeanKey
from saccade.parts.select import TopBlocks
from saccade.parts.tokens import Rope

TEXTS = [
    "full",
    "causal",
    "window(256)",
    "window(width=256)",
    "gqa(2) + rope + window(256)",
    "kv_heads(4) + causal + alibi",
    "moba(block=64, top=4)",
    "moba",
    "moba(32, 2)",
    "rope + moba(block=16)",
    "rope(base=500000.0) + causal",
    "rope(1e6)",
    "rope(5e-1)",
    "dot(scale=0.125) + causal",
    "neighborhood(7, dilation=2)",
    "dilated(3, step=4) + causal",
    "causal + window(4096) + sink(4)",
    "causal & (window(4) | sink(2))",
    "(causal & window(4)) | sink(2)",
    "(window(9) & strided(2)) | (sink(2) & causal)",
    "alibi + (window(3) | sink)",
    "top_blocks(16, top=2) + causal + chunk(16)",
    "centroid_buckets(8, width=16)",
    "routing_transformer",
    "routing_transformer(clusters=4, width=none, local=false)",
    "luong_attention(score=dot, local=predictive, half=3)",
    "linear",
    "causal + linear",
    "causal + performer_favor(features=16, rows=independent)",
    "causal + elu1 + ratio + fixed_decay(first=2.5)",
    "efficient_attention(normalizer=scaling)",
    "linformer(rank=4, length=100)",
    "nystromformer(landmarks=8)",
    "aaren",
    "mqa + causal",
    "gqa(2) + causal + linear",
    "memory_efficient_attention(query_chunk=16)",
    "tiles(16, 32) + causal",
    "by_head(window(3), causal + linear)",
    "mix(causal, causal + linear, shares=(0.25, 0.75))",
    "mix(by_head(full, causal), window(3))",
    "  causal+window( 4 ) ",
    "((causal))",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str) -> None:
    m = sc.mechanism(text)
    again = sc.mechanism(str(m))
    assert again == m
    assert hash(again) == hash(m)
    assert str(again) == str(m)
    assert sc.mechanism(m.canonical()) == m
    assert sc.mechanism(sc.mechanism(m.canonical()).canonical()).canonical() == m.canonical()


@pytest.mark.parametrize("text", TEXTS)
def test_the_causal_form_round_trips_too(text: str) -> None:
    try:
        m = sc.causal(sc.mechanism(text))
    except sc.NotSupported:
        return
    assert m.causal
    assert sc.mechanism(str(m)) == m
    assert sc.causal(m) is m


def test_every_name_stands_in_some_text() -> None:
    inside = {"by_head", "mix", "join", *(name for name, c in PARTS.items() if c.kind in ("proxy", "budget"))}
    for name, maker in names().items():
        if name in inside or name.startswith("test_") or maker.__module__ == "broken":
            continue
        m = sc.mechanism(combine.legal(name) if name in PARTS else name)
        assert sc.mechanism(str(m)) == m


positive = st.integers(1, 9)
masks = st.one_of(
    st.just("full"),
    st.just("causal"),
    positive.map("window({})".format),
    st.tuples(positive, positive).map(lambda x: f"neighborhood({2 * x[0] + 1}, dilation={x[1]})"),
    st.tuples(positive, positive).map(lambda x: f"dilated({x[0]}, step={x[1]})"),
    positive.map("strided({})".format),
    positive.map("chunk({})".format),
    positive.map("sink({})".format),
    positive.map("global({})".format),
    st.tuples(positive, positive).map(lambda x: f"top_blocks({x[0]}, top={x[1]})"),
    st.tuples(positive, positive).map(lambda x: f"top_keys(mass(0.{x[0]}, least={x[1]}))"),
)
pairs = st.recursive(
    masks,
    lambda x: st.tuples(x, st.sampled_from("&|"), x).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=4,
)
scales = st.floats(1e-6, 1e6)
optional = {
    "heads": positive.map("kv_heads({})".format),
    "rope": scales.map("rope({})".format),
    "standardize": scales.map("standardize({})".format),
    "score": st.one_of(st.just("bilinear"), scales.map("dot(scale={})".format)),
    "logits": st.just("alibi"),
    "normalizer": st.just("softmax"),
    "reweight": positive.map("gauss_gate({})".format),
    "tiles": st.tuples(positive, positive).map(lambda x: f"tiles({x[0]}, {x[1]})"),
}


@st.composite
def sums(draw: st.DrawFn) -> str:
    chosen = draw(st.sets(st.sampled_from(sorted(optional))))
    terms = [draw(optional[name]) for name in sorted(chosen)] + draw(st.lists(pairs, max_size=3))
    return " + ".join(draw(st.permutations(terms))) or "full"


combines = st.one_of(
    sums(),
    st.lists(sums(), min_size=2, max_size=3).map(lambda x: f"mix({', '.join(x)})"),
    st.tuples(sums(), sums(), scales).map(lambda x: f"mix({x[0]}, {x[1]}, shares=({x[2]}, 1))"),
    st.lists(sums(), min_size=2, max_size=3).map(lambda x: f"by_head({', '.join(x)})"),
)


@settings(max_examples=150, deadline=None)
@given(combines)
def test_random_legal_sums_round_trip(text: str) -> None:
    test_round_trip(text)
    test_the_causal_form_round_trips_too(text)


def test_plus_joins_limits_by_and_and_allowances_by_or() -> None:
    def pairs_of(text: str) -> object:
        m = sc.mechanism(text)
        assert isinstance(m, Pairwise)
        return m.pairs

    assert pairs_of("causal + window(8) + sink(4)") == Causal() & (Window(8) | Sink(4))
    assert pairs_of("sink(4) + causal + window(8)") == Causal() & (Sink(4) | Window(8))
    assert pairs_of("window(8) + strided(3)") == Window(8) | Strided(3)
    assert pairs_of("causal + top_blocks(8) + chunk(8)") == Causal() & (TopBlocks(8) | Chunk(8))
    assert pairs_of("moba(8, 2)") == Causal() & (TopBlocks(8, 2, MeanKey()) | Chunk(8))
    assert pairs_of("causal & window(8) | sink(4)") == (Causal() & Window(8)) | Sink(4)
    assert pairs_of("causal + (window(8) & strided(2))") == Causal() & Window(8) & Strided(2)
    assert pairs_of("full + window(8)") == Window(8)
    assert pairs_of("causal + causal") == Causal()
    assert pairs_of("causal + moba(8, 2)") == pairs_of("moba(8, 2)")


def test_names_of_systems_are_other_words_for_their_parts() -> None:
    assert sc.mechanism("moba(64, 4)") == sc.mechanism("causal & (top_blocks(64, 4) | chunk(64))")
    assert sc.mechanism("transformer") == sc.mechanism("full")
    assert sc.mechanism("gqa(2) + causal") == sc.mechanism("causal + kv_heads(2)")
    assert sc.mechanism("causal + aaren") == sc.mechanism("aaren")
    assert str(sc.mechanism("gqa(2) + causal")) == "gqa + causal"
    assert str(sc.mechanism("moba(block=64, top=8)")) == "moba(top=8)"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("widow(4)", "window"),
        ("windw", "window"),
        ("casual", "causal"),
        ("moab(block=3)", "moba"),
        ("causal + slidding(4)", "nearest|known"),
        ("performer", "performer_favor"),
        ("xyzzy", "known names: .*causal.*window"),
    ],
)
def test_an_unknown_name_answers_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(sc.MechanismError, match=f"no mechanism or part is called .*{near}"):
        sc.mechanism(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("window(0)", "window: width must be a whole number of at least 1, got 0"),
        ("window(-3)", "window: width must be a whole number of at least 1, got -3"),
        ("window(2.5)", "window: width must be a whole number of at least 1, got 2.5"),
        ("window(true)", "window: width must be a whole number of at least 1, got true"),
        ("window(full)", "window: width must be a whole number of at least 1, got full"),
        ("rope(0)", "rope: base must be a number above 0, got 0"),
        ("rope(base=-1.5)", "rope: base must be a number above 0, got -1.5"),
        ("dot(scale=0)", "dot: scale must be a number or none above 0, got 0"),
        ("favor(8, rows=square) + ratio", "favor: rows must be one of orthogonal, independent, got 'square'"),
        ("luong_attention(score=cosine)", "score must be one of dot, general, concat, got 'cosine'"),
        ("luong_attention(local=never)", "local must be one of global, monotonic, predictive"),
        ("efficient_attention(normalizer=l2)", "normalizer must be one of softmax, scaling"),
        ("neighborhood(4)", "width must be odd"),
        ("gqa(0)", "kv must be a whole number of at least 1, got 0"),
        ("moba(block=0)", "block must be a whole number of at least 1, got 0"),
        ("linformer(rank=1.5)", "rank must be a whole number of at least 1, got 1.5"),
        (
            "nystromformer(landmarks=0)",
            "nystromformer: landmarks must be a whole number of at least 1, got 0",
        ),
        ("top_blocks(16, proxy=3)", "top_blocks: proxy must be a proxy, one of mean_key, bound_key.*, got 3"),
        (
            "top_blocks(16, proxy=full)",
            "top_blocks: proxy must be a proxy, one of mean_key, bound_key.*, got full",
        ),
        ("centroid_buckets(4, width=0)", "width must be a whole number or none of at least 1, got 0"),
        ("window()", "missing a required argument: 'width'"),
        ("window", "missing a required argument: 'width'"),
        ("window(3, 4)", "too many positional arguments"),
        ("window(size=4)", r"window\(width: int\): missing a required argument: 'width'"),
        ("moba(blocks=4)", "unexpected keyword argument 'blocks'"),
        ("mix(full)", "mix joins two or more mechanisms, got 1"),
        ("mix(full, 3)", "mix joins mechanisms, got 3"),
        ("by_head(full, true)", "by_head joins mechanisms, got true"),
        ("mix(full, causal, shares=3)", r"shares must be numbers in brackets, as in \(0.25, 0.75\), got 3"),
        ("mix(full, causal, shares=(1, 2, 3))", "one share a member, got 3 for 2"),
        ("mix(full, causal, weights=(1, 2))", "mix takes mechanisms and shares, got weights"),
        ("by_head(full, causal, shares=(1, 2))", "by_head takes mechanisms alone, got shares"),
    ],
)
def test_a_bad_argument_says_its_type_and_range(text: str, words: str) -> None:
    with pytest.raises(sc.MechanismError, match=words):
        sc.mechanism(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dot + additive", "two parts of kind score: dot and additive"),
        ("bilinear + luong_attention", r"two parts of kind score: bilinear and luong_attention"),
        ("gqa(2) + mqa", "two parts of kind heads: gqa and mqa"),
        ("kv_heads(2) + gqa(2)", "two parts of kind heads"),
        ("softmax + softmax", "two parts of kind normalizer"),
        ("linear + elu1", "two parts of kind feature"),
        ("rope + rope", "rope is given twice"),
        ("rope + rope(500.0)", "two parts would turn the same channels"),
        ("rope + rope_linear(2)", "would turn the same channels; keep one"),
        ("alibi + alibi", "alibi is given twice"),
        ("tiles + tiles(4, 4)", "two parts of kind tiles"),
    ],
)
def test_two_parts_of_a_kind(text: str, words: str) -> None:
    with pytest.raises(sc.MechanismError, match=words):
        sc.mechanism(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("linear + alibi", "a recurrent mechanism has no logits, but alibi was given"),
        ("linear + dot", "a recurrent mechanism has no score, but dot was given"),
        ("identity + additive", "a recurrent mechanism has no score"),
        ("linear + window(3)", r"keeps one state for all keys.*got window\(3\).*mix\(linear, window\(64\)\)"),
        ("linear + moba", "moba is pairwise, the rest is recurrent"),
        ("moba + linear", "linear is recurrent, the rest is pairwise"),
        ("causal + mix(full, causal)", r"mix\(...\) is whole by itself"),
        ("nystromformer + rope", "it takes no parts beside it"),
        ("mean_key + full", "mean_key is a proxy, an argument of another part"),
        ("rope + additive", "rope needs bilinear, which additive breaks"),
        ("identity + ratio", "ratio needs denominator, which no part here gives; add one of: .*elu1"),
        (
            "learned_query",
            "learned_query reads a prefix a position: it runs under `causal` alone, got pairs full",
        ),
        ("aaren + window(3)", r"under `causal` alone, got pairs causal & window\(3\)"),
        ("transformer + linear", "linear is recurrent, the rest is pairwise"),
        ("gqa(2) + linear + alibi", "a recurrent mechanism has no logits"),
        ("window(3) & rope", "joins pair sets such as window or causal, which rope is not"),
        ("(causal + window(3)) & sink(2)", r"which causal \+ window\(3\) is not"),
        ("join(window(4), sink(2))", "share pairs, which would count twice"),
        ("join(moba, full)", "key sets fixed by position"),
    ],
)
def test_parts_that_do_not_go_together(text: str, words: str) -> None:
    with pytest.raises(sc.MechanismError, match=words):
        sc.mechanism(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "an empty text names no mechanism"),
        ("   ", "an empty text names no mechanism"),
        ("causal $ window(3)", r"at character 8: '\$' is not part of the language"),
        ("window(256", "expected ',', found the end"),
        ("window(256))", r"at character 12: expected '\+', '\|', '&' or the end, found '\)'"),
        ("causal +", "expected a name, found the end"),
        ("causal + + window(3)", r"at character 10: expected a name, found '\+'"),
        ("causal window(3)", r"at character 8: expected '\+'.*found 'window'"),
        ("3", "at character 1: expected a name, found '3'"),
        ("window(width=)", r"at character 14: expected a name, found '\)'"),
        ("dilated(width=3, 4)", "an argument without a name may not follow a named one, found '4'"),
        ("mix(full, causal, shares=(1, x))", "at character 30: expected a number, found 'x'"),
        ("window(3;4)", "at character 9: ';' is not part of the language"),
        ("causal & | full", r"at character 10: expected a name, found '\|'"),
        ("()", r"at character 2: expected a name, found '\)'"),
    ],
)
def test_what_cannot_be_read_is_shown_with_its_place(text: str, words: str) -> None:
    with pytest.raises(sc.MechanismError, match=words):
        sc.mechanism(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="causlwindo()+|&=,.0123456789 -_$\n", max_size=24))
def test_any_text_parses_or_is_refused_by_the_librarys_own_errors(text: str) -> None:
    try:
        m = sc.mechanism(text)
    except (sc.MechanismError, sc.NotSupported):
        return
    assert sc.mechanism(str(m)) == m


def test_what_is_not_a_text() -> None:
    m = sc.mechanism("causal")
    assert sc.mechanism(m) is m
    assert sc.mechanism(Rope()) == sc.mechanism("rope")
    for wrong in (3, None, ["causal"], b"causal"):
        with pytest.raises(TypeError, match=f"as text or as a value, got {type(wrong).__name__}"):
            sc.mechanism(wrong)  # type: ignore[arg-type]


def test_a_changed_value_prints_its_new_parts() -> None:
    m = sc.mechanism("moba(block=64, top=8)")
    assert isinstance(m, Pairwise)
    changed = dataclasses.replace(m, tokens=(Rope(),))
    assert str(m) == "moba(top=8)"
    assert str(changed) == "rope + causal + top_blocks(top=8) + chunk(64)"
    assert sc.mechanism(str(changed)) == changed
    linear = sc.mechanism("causal + linear")
    assert isinstance(linear, Recurrent)
    assert str(dataclasses.replace(linear, ratio=None)) == "causal + elu1"


def test_errors_are_value_errors() -> None:
    assert issubclass(sc.MechanismError, ValueError)
    assert issubclass(sc.NotSupported, ValueError)
