"""The door to Hugging Face models: put a mechanism in place of the attention of an unmodified `transformers` model."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError:
    raise ImportError("saccade.hf runs models of transformers: pip install saccade[hf]") from None

from saccade.hf.attach import Attachment, attach, attention_layers, detach
from saccade.hf.compress import BudgetCache, Compression, calibrate, compress
from saccade.hf.premise import premise

__all__ = [
    "Attachment",
    "BudgetCache",
    "Compression",
    "attach",
    "attention_layers",
    "calibrate",
    "compress",
    "detach",
    "premise",
]
