"""The contract holds for what is registered, and catches what is broken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import saccade as sc
from broken import BROKEN

PLAIN = [
    "full",
    "causal",
    "window(16)",
    "neighborhood(9)",
    "neighborhood(5, dilation=3)",
    "dilated(4, step=5)",
    "strided(8)",
    "causal + document((40, 57))",
    "prefix(33)",
    "every(3, first=2)",
    "permuted(9, length=100)",
    "na((9,), stride=3, dilation=4)",
    "na((4, 5), stride=(4, 2), border=drop)",
    "na((3, 4, 5), causal_axes=(true, false, false))",
    "na(5, causal_axes=true, dilation=2)",
    "causal + window(12) + global(3)",
    "causal + window(8) + sink(4)",
    "uniform",
    "causal + uniform",
    "causal + alibi",
    "causal + softcap(2.0)",
    "temperature(0.5)",
    "causal + length_scale(32)",
    "causal + rope",
    "causal + top_keys(8)",
    "top_keys(mass(0.5))",
    "causal + top_blocks(8, share(0.25), rows=8) + chunk(8)",
    "causal + top_blocks(8, top=2, proxy=bound_key) + window(4)",
    "top_blocks(16, share(0.3), proxy=block_mass, rows=16)",
    "causal + top_blocks(8, top=2, proxy=landmark_key) + chunk(8) + grouped_softmax(8)",
    "causal + rope_linear(4)",
    "rope_ntk(4)",
    "causal + rope_yarn(4, length=64)",
    "axial_rope",
    "axial_rope(grid=(10, 16))",
    "causal + t5_bias",
    "t5_bias(two_sided=true)",
    "causal + window(12) + rel_table(5)",
    "entmax(1.25)",
    "causal + entmax",
    "causal + sparsemax",
    "causal + sigmoid",
    "causal + unnormalized",
    "causal + dot(1.0) + per_key + rel_bias(9) + laplace",
    "causal + sink_logit",
    "window(12) + out_norm + out_gate",
    "linear",
    "causal + linear",
    "cosformer(4096)",
    "causal + cosformer(4096) + gqa(2)",
    "causal + linear + out_norm",
    "causal + identity + fixed_decay",
    "retention",
    "gla(2)",
    "delta_net",
    "gated_delta_net",
    "mamba2",
    "hedgehog",
    "causal + rope + hedgehog",
    "unit + causal + identity + delta(2) + channel_decay(2)",
    "causal + elu1 + ratio + channel_decay(2)",
    "causal + performer_favor(12) + gate_decay(2)",
    "identity + step_write",
    "taylor + ratio",
    "causal + relu_feature(2) + ratio + gate_decay(2)",
    "causal + elu1 + signed_ratio + channel_decay(2)",
    "gqa(2) + uniform + window(1) + value_conv(3) + out_gate",
    "mix(window(8), causal + linear)",
    "by_head(window(4), causal)",
    "sources(q=place, k=place, kv=2) + causal",
    "learned_queries(4)",
    "by_head(window(4), causal + head_mix(2))",
]

SYSTEMS = [
    "transformer",
    "mqa",
    "causal + gqa(2)",
    "causal + memory_efficient_attention(32, key_chunk=48)",
    "causal + mhe",
    "mhe(mode=add)",
    "causal + moh(top=1, shared=2)",
    "causal + optimised_attention",
    "afa",
    "luong_attention(score=dot)",
    "luong_attention(score=general, local=monotonic)",
    "luong_attention(score=concat)",
    "luong_attention(score=dot, local=predictive)",
    "linformer(16)",
    "performer_favor(16)",
    "causal + performer_favor(16)",
    "based",
    "lightning_attention_tnl",
    "gqa(2) + lightning_attention_tnl(0.5)",
    "lln_attention",
    "lln_attention(16, causal=true)",
    "fastmax",
    "causal + fastmax",
    "causal + fastmax(1)",
    "nystromformer(16, taps=5)",
    "efficient_attention",
    "efficient_attention(normalizer=scaling)",
    "routing_transformer(4, window=16)",
    "routing_transformer(4, local=false)",
    "moba(block=16, top=2)",
    "hyperattention(16, samples=16)",
    "causal + hyperattention(8, samples=8, base=16)",
    "sparsek(8, window=16)",
    "causal + scored_keys(8) + score_gate(6, before=3) + rope",
    "scored_keys(8) + score_gate(8)",
    "sparsifiner(24, rank=8, length=1024)",
    "dhsa(24)",
    "dhsa(24, every=4)",
    "dhsa(24, past=true)",
    "top_chunks(24)",
    "sea_attention(24, columns=8)",
    "causal + sea_attention(24, columns=8)",
    "causal + sea_attention(24, columns=8, mix=false)",
    "seerattention(16, top=2, width=8)",
    "seerattention(16, share(0.3), width=8, rows=16, rope=false)",
    "rectified_spaattn(top_blocks(8, share(0.25), rows=8))",
    "rectified_spaattn(top_blocks(8, mass(0.6, least=2), proxy=pooled_gate(8)), text_keys=16)",
    "sparsed(8, prompt=24)",
    "aaren",
    "hepos(2)",
    "s2_attention(8, local=2, stripes=4)",
    "powerattention(8, local=2, sinks=1)",
    "moa_sparse((1, 8, 0, 3), beta=(0, 0, 1, 0.25), sinks=2)",
    "stochastic_attention(9, length=100)",
    "fna(3)",
    "gna((4, 2), stride=(2, 1), dilation=(1, 3))",
    "halonet(4, halo=2)",
    "causal + bam",
    "bam(location=true)",
    "causal + cope_complex",
    "cope_complex(phase=true)",
    "cope_contextual(6)",
    "tra",
    "combiner(16)",
    "combiner(10, plan=logsparse)",
    "combiner(16, plan=axial)",
    "transformer_vq(12, block=16, clip=8)",
    "gqa(2) + rope + causal + coded_dot(8, block=16)",
    "tra(-0.5)",
    "landmark_attention(8)",
    "landmark_attention(8, top=2)",
    "nats(8)",
    "nats(8, mode=hard)",
    "mvpa(4, grid=(20, 8))",
    "nope_head_scale",
    "shaw_rpr(8)",
    "causal + shaw_rpr(8)",
    "comateformer",
    "causal + comateformer",
    "tapa",
    "causal + tapa(0.3, alpha=1.0)",
    "mta(3, keys=5)",
    "causal + mta",
    "pointer_network(8)",
    "relaxed_attention",
    "relaxed_attention(0.2, causal=true)",
    "adaptive_attention",
    "neural_attention",
    "causal + neural_attention(3)",
    "rela",
    "causal + rela",
    "nap",
    "causal + nap",
    "kv_shifting",
    "dynamic_conv",
    "dynamic_conv(4, causal=true)",
    "dynamic_conv(5, taps=static, causal=true)",
    "by_head(causal, dynamic_conv(5, causal=true))",
    "masked_mixer(1024)",
    "gqa(2) + kv_shifting + rope",
]


@pytest.mark.parametrize("text", PLAIN + SYSTEMS)
@pytest.mark.filterwarnings("ignore:.*runs by its definition")
def test_the_contract_holds(text: str) -> None:
    report = sc.testing.check(text, show=False)
    assert report.ok, str(report)


@pytest.mark.parametrize("defect", BROKEN)
@pytest.mark.filterwarnings("ignore:.*runs by its definition")
def test_a_broken_mechanism_is_caught(defect: str) -> None:
    mechanism, caught_by = BROKEN[defect]
    report = sc.testing.check(mechanism, show=False)
    assert caught_by in report.failed, str(report)


def test_an_oracle_catches_a_wrong_formula() -> None:
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v

    assert sc.testing.check("full", oracle=formula, show=False).ok
    assert "kernels = definition" in sc.testing.check("dot(0.3)", oracle=formula, show=False).failed


def test_the_report_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = sc.testing.check("window(16)")
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    for name in ("no future", "padding", "gradients", "decoding = whole", "cost growth"):
        assert name in printed


def test_every_registered_system_is_checked() -> None:
    checked = {name for text in SYSTEMS for name in sc.systems.catalogue.by_ref().values() if name in text}
    assert checked == set(sc.systems.catalogue.by_ref().values())
