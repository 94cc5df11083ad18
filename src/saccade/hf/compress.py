"""A budget for the key-value cache of a `transformers` model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from saccade.cache import Format, Oscar, Rotation, layer_cache
from saccade.cache import policy as parse
from saccade.cache.policy import Rule, choices
from saccade.errors import NotSupported
from saccade.hf.attach import attention_layers, crosses
from saccade.hf.attention import scaled
from saccade.hf.rope import rotation
from saccade.hf.seen import Seen, describe
from saccade.plan import attend

NAME = "saccade_cache"
SLOT = "saccade_cache_layer"
WORDS = ("past_key_values", "cache")


class BudgetLayer(CacheLayerMixin):
    """A cache layer of `transformers` around a `LayerCache`; the attention function reads it and lets the policy choose."""

    is_compileable = False
    is_sliding = False

    def __init__(self, owner: Compression, number: int) -> None:
        super().__init__()
        self.owner, self.number = owner, number
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember that this layer is read next; the new keys and values go to the attention function as they are."""
        self.is_initialized = True
        self.owner.read_next[self.number] = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.length + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens that were read: what positions count by."""
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` by its older name."""
        return -1

    def reset(self) -> None:
        owner = self.owner
        turns = owner.rotations.get(self.number)
        self.store = layer_cache(owner.policy, self.number, owner.layers, owner.every, turns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = self.store.batch
        self.store.select([n for n in range(count) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select(torch.arange(self.store.batch)[indices.cpu()].tolist())

    def crop(self, *_: Any) -> None:
        raise NotSupported(
            "tokens that a policy has dropped do not come back, so a cache on a budget cannot be cropped; start a new one"
        )


class BudgetCache(Cache):
    """A cache of `transformers` in which every layer keeps to the budget of a policy."""

    def __init__(self, owner: Compression) -> None:
        super().__init__(layers=[BudgetLayer(owner, n) for n in range(owner.layers)])

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(layer.store.nbytes for layer in self.layers)

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """Keys of each row of each layer."""
        return [layer.store.counts for layer in self.layers]


@dataclass
class Compression:
    """A policy in force; `remove()` or the end of a `with` block lifts it. `cache` is the cache of the latest text."""

    model: Any
    policy: Rule
    layers: int
    every: int
    before: str
    modules: list[nn.Module]
    rotations: dict[int, Rotation | None] = field(default_factory=dict)
    read_next: dict[int, BudgetLayer] = field(default_factory=dict)
    cache: BudgetCache | None = None
    hook: Any = None

    def new_cache(self) -> BudgetCache:
        """An empty cache, to go on from over several calls: `model.generate(..., past_key_values=cache)`."""
        self.cache = BudgetCache(self)
        return self.cache

    def remove(self) -> None:
        """Give the model its own attention and caches back. More than once does no harm."""
        if self.modules:
            self.hook.remove()
            for module in self.modules:
                delattr(module, SLOT)
            self.model.set_attn_implementation(self.before)
            self.modules = []

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _swap(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An empty cache that the model, or its `generate`, has made gives way to one on the budget."""
        for word in WORDS:
            given = kwargs.get(word)
            if given is None or isinstance(given, BudgetCache):
                continue
            if given.get_seq_length():
                raise NotSupported(
                    f"the call goes on from a {type(given).__name__} of {given.get_seq_length()} tokens that no policy "
                    "has seen; read the text again, or pass a cache from new_cache()"
                )
            kwargs[word] = self.new_cache()
        return args, kwargs


def compress(model: Any, policy: str | Rule | Format, *, every: int = 64) -> Compression:
    """Give the key-value cache of a model a budget: after each text that is read, and after every `every` new tokens, the
    policy says what each layer keeps.

    Positions stay those of the text. Works with `generate`, beams, left padding, texts that are read in pieces
    (`prefill_chunk_size`) and several turns over one cache. Raises TypeError for what is no model of transformers,
    MechanismError for a text that names no policy, NotSupported for layers whose own rule is a window.

        with saccade.hf.compress(model, "snapkv(keep=0.25)") as held:
            model.generate(...)
        print(held.cache.nbytes)
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"compress takes a model of transformers (PreTrainedModel), got {type(model).__name__}"
        )
    made = parse(policy)
    layers = attention_layers(model)
    if not layers or not getattr(model, "_supports_attention_backend", False):
        raise NotSupported(f"{type(model).__name__} does not call the attention interface of transformers")
    if any(len(found) != 1 or not found[0].is_causal for found in layers.values()) or any(
        crosses(m) for m in model.modules()
    ):
        raise NotSupported(
            f"{type(model).__name__} is no causal model of one attention a layer, so it has no such cache"
        )
    AttentionInterface.register(NAME, _read)
    AttentionMaskInterface.register(NAME, describe)
    before = model.config._attn_implementation
    modules = {number: found[0] for number, found in layers.items()}
    turns = (
        {n: rotation(model, m) for n, m in modules.items()} if any(p.moments for p in choices(made)) else {}
    )
    held = Compression(model, made, len(layers), every, before, [*modules.values()], turns)
    for number, (module,) in sorted(layers.items()):
        setattr(module, SLOT, (held, number))
    held.hook = model.register_forward_pre_hook(held._swap, with_kwargs=True)
    model.set_attn_implementation(NAME)
    return held


def calibrate(
    model: Any, tokens: Tensor, rule: Oscar | None = None, attention_mask: Tensor | None = None
) -> Oscar:
    """`rule` with the bases of every layer, found from texts (b, n) that a model reads: what OSCAR calls offline.

    rule = saccade.hf.calibrate(model, tokens)
    with saccade.hf.compress(model, rule):
        model.generate(...)
    """
    rule = Oscar() if rule is None else replace(rule, offline=None)
    with torch.no_grad(), compress(model, rule) as held:
        cache = held.new_cache()
        model(tokens, attention_mask=attention_mask, past_key_values=cache)
        found = [layer.store.bases for layer in cache.layers]
    bases = tuple(b for b in found if b is not None)
    if not bases:
        raise ValueError(f"{rule} turns nothing, so there is nothing to find; use rotation='spectral'")
    return replace(rule, offline=bases)


@torch.compiler.disable
def _read(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **more: Any,
) -> tuple[Tensor, None]:
    """The attention function: new tokens join the layer's cache, are read, and the policy chooses."""
    held, number = getattr(module, SLOT)
    extras = {"softcap": softcap, "sinks": s_aux, "position_bias": position_bias}
    asked = [n for n, x in extras.items() if x is not None] + (
        ["output_attentions"] if output_attentions else []
    )
    if asked or dropout:
        raise NotSupported(
            f"a cache on a budget does not know {', '.join(asked) or 'dropout'} of layer {number}"
        )
    query = scaled(query, scaling)
    layer = held.read_next.pop(number, None)
    padding = attention_mask.padding if isinstance(attention_mask, Seen) else None
    if sliding_window is not None and isinstance(attention_mask, Seen) and attention_mask.local is not None:
        raise NotSupported(
            f"layer {number} reads a window of {sliding_window} tokens, whose cache is small as it is; compress takes models "
            "without such layers"
        )
    if not isinstance(attention_mask, Seen) or not (attention_mask.simple or query.shape[2] == 1):
        raise NotSupported("a cache on a budget takes padding, but no masks of pairs and no packed sequences")
    if layer is None:  # a call without a cache
        return _whole(query, key, value, padding).transpose(1, 2).contiguous(), None
    store = layer.store
    first = store.length == 0
    if padding is not None and not first and not bool(padding[:, store.length :].all()):
        raise NotSupported(
            "new tokens after a first text may not be padding; pad a batch on the left of its first text"
        )
    store.append(key, value, padding if first else None)
    out = _whole(query, key, value, padding) if first and padding is not None else store.attend(query)
    store.observe(query)
    if query.shape[2] > 1 or store.due:
        store.compress(query)
    return out.transpose(1, 2).contiguous(), None


def _whole(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> Tensor:
    """Causal attention of a whole text, padding left out."""
    if padding is None:
        return attend(q, k, v, "causal")
    return attend(q, k, v, "causal", mask=padding[:, None, None])
