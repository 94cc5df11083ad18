"""Mechanisms in the layers of a `transformers` model, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from saccade.errors import MechanismError, NotSupported
from saccade.hf.attention import NAME, SLOT, Layer, run
from saccade.hf.seen import describe
from saccade.mechanism import Mechanism
from saccade.mechanism import causal as limited
from saccade.mechanism import mechanism as parse
from saccade.parts.base import Sizes

Choice = str | Mechanism | Mapping[int | str, str | Mechanism]


def attention_layers(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules of a model that call the attention of `transformers` on their own tokens, by the number of their layer."""
    found: dict[int, list[nn.Module]] = {}
    for module in _callers(model):
        if not crosses(module):
            number = getattr(module, "layer_idx", None)
            found.setdefault(len(found) if number is None else int(number), []).append(module)
    return found


def _callers(model: nn.Module) -> list[nn.Module]:
    """Modules that hand queries, keys and values to the attention interface: they hold a scale and say if they are causal."""
    return [
        m
        for m in model.modules()
        if hasattr(m, "scaling") and hasattr(m, "is_causal") and hasattr(m, "config")
    ]


def crosses(module: nn.Module) -> bool:
    """True for attention to an encoder."""
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__


@dataclass
class Attachment:
    """Mechanisms in a model's layers; `detach()` or the end of a `with` block takes them out again."""

    model: Any
    before: str
    modules: list[nn.Module]

    def detach(self) -> None:
        """Give the model its own attention back. More than once does no harm."""
        for module in self.modules:
            if hasattr(module, SLOT):
                delattr(module, SLOT)
        if self.modules:
            self.model.set_attn_implementation(self.before)
            self.modules = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def attach(model: Any, mechanisms: Choice, *, cross: str | Mechanism = "full") -> Attachment:
    """Put a mechanism in place of the attention of a `transformers` model; weights, caches and generation stay as they are.

    `mechanisms` is one for all layers, or a mapping from layers (`0`, `"8-15"`) to mechanisms, where the other layers keep
    full attention under the model's rule. The model's own rules hold beside it: causality, padding on either side, packed
    sequences, sliding layers, logit caps and sinks. `cross` is for attention to an encoder.

    Raises TypeError for what is no such model, MechanismError for layers that it has not and mechanisms whose choice depends
    on later tokens in a causal model, NotSupported for models that do not call the attention interface and mechanisms with weights.

        with saccade.hf.attach(model, "window(4096) + sink(4)"):
            model.generate(...)
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"attach takes a model of transformers (PreTrainedModel), got {type(model).__name__}; for your own modules use "
            "saccade.nn.Attention"
        )
    callers = _callers(model)
    if not callers or not getattr(model, "_supports_attention_backend", False):
        raise NotSupported(
            f"{type(model).__name__} does not call the attention interface of transformers, so no mechanism can stand in "
            "for it; families that do: Llama, Qwen, Mistral, Phi, Gemma, GPT-NeoX, BERT"
        )
    if any(hasattr(m, SLOT) for m in callers):
        raise NotSupported("the model has mechanisms already: saccade.hf.detach(model) first")
    layers = attention_layers(model)
    chosen = _by_layer(mechanisms, sorted(layers))
    AttentionInterface.register(NAME, run)
    AttentionMaskInterface.register(NAME, describe)
    set_modules = []
    for number, modules in layers.items():
        for module in modules:
            causal = bool(module.is_causal)
            m = chosen.get(number) or parse("full")
            m = limited(m) if causal else m
            _check(m, module, number, causal)
            setattr(module, SLOT, Layer(m, number))
            set_modules.append(module)
    for module in callers:
        if crosses(module):
            m = parse(cross)
            _check(m, module, -1, False)
            setattr(module, SLOT, Layer(m, -1))
            set_modules.append(module)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    return Attachment(model, before, set_modules)


def detach(model: Any, implementation: str = "sdpa") -> None:
    """Take all mechanisms out of a model and give it an attention of `transformers` (`sdpa` unless named)."""
    Attachment(model, implementation, [m for m in model.modules() if hasattr(m, SLOT)]).detach()


def _by_layer(choice: Choice, numbers: list[int]) -> dict[int, Mechanism]:
    """Mechanisms by layer number."""
    if isinstance(choice, str | Mechanism):
        made = parse(choice)
        return dict.fromkeys(numbers, made)
    found: dict[int, Mechanism] = {}
    for key, text in choice.items():
        for n in _numbers(key):
            if n not in numbers:
                raise MechanismError(
                    f"layer {n} of {key!r}: the model has layers {numbers[0]} to {numbers[-1]}"
                )
            if n in found:
                raise MechanismError(f"layer {n} is named twice, by {key!r} the second time")
            found[n] = parse(text)
    return found


def _numbers(key: int | str) -> range:
    if isinstance(key, int):
        return range(key, key + 1)
    ends = key.split("-")
    if len(ends) <= 2 and all(e.strip().isdigit() for e in ends):
        lo, hi = int(ends[0]), int(ends[-1])
        if lo <= hi:
            return range(lo, hi + 1)
    raise MechanismError(f"layers are a number or a range such as '8-15', got {key!r}")


def _check(m: Mechanism, module: Any, number: int, causal: bool) -> None:
    """Refuse what would read later tokens in a causal layer, or needs weights that the model has not."""
    where = "cross attention" if number < 0 else f"layer {number}"
    if causal and m.causality == "leak":
        raise MechanismError(
            f"{where}: {m} lets its choice depend on later tokens, so generation would differ from reading the same text"
        )
    config = module.config
    heads = int(config.num_attention_heads)
    dim = int(getattr(module, "head_dim", None) or config.hidden_size // heads)
    groups = int(getattr(module, "num_key_value_groups", 1))
    sizes = Sizes(heads, heads // groups, dim, dim)
    wants = [*m.weights(sizes), *m.streams(sizes), *m.buffers(sizes)]
    if wants:
        raise NotSupported(
            f"{where}: {m} needs {', '.join(sorted(wants))}, which the model does not bring; a mechanism here has no weights "
            "of its own"
        )
