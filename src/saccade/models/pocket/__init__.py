"""saccade-pocket: a small trained language model over bytes that is part of the package, to measure caches and maps offline."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "weights"


def path() -> Path:
    """The folder of the trained model, in the format of `transformers`: `AutoModelForCausalLM.from_pretrained(path())`.

    Raises FileNotFoundError where the weights are not installed.
    """
    if not (FOLDER / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no trained model in {FOLDER}: install saccade from a wheel, or train it with "
            "`python -m saccade.models.pocket.recipe`"
        )
    return FOLDER


__all__ = ["path"]
