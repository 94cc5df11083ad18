"""Small models of every family, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SMALL | {
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = {
    "llama": (transformers.LlamaConfig, GROUPED),
    "qwen2": (transformers.Qwen2Config, {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": (transformers.Qwen3Config, GROUPED),
    "mistral": (transformers.MistralConfig, GROUPED | {"sliding_window": None}),
    "mistral, sliding": (transformers.MistralConfig, GROUPED | {"sliding_window": 6}),
    "phi": (transformers.PhiConfig, SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "phi3": (
        transformers.Phi3Config,
        SMALL | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gemma": (transformers.GemmaConfig, GROUPED),
    "gemma2": (transformers.Gemma2Config, GROUPED | {"sliding_window": 6, "attn_logit_softcapping": 5.0}),
    "gpt_neox": (transformers.GPTNeoXConfig, SMALL),
    "gpt_oss": (
        transformers.GptOssConfig,
        GROUPED | {"sliding_window": 6, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}


def build(name: str, seed: int = 0) -> Any:
    config, options = FAMILIES[name]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config(**options), attn_implementation="eager"
    ).eval()
    for p in model.parameters():  # large enough that attention matters
        if p.dim() > 1:
            p.data.mul_(4)
    return model


def tokens(b: int = 2, n: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (b, n), generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a - b).abs() <= 2e-4 * b.abs().amax()).all())
