"""Trains saccade-pocket: Llama's architecture over bytes, 7.5 million parameters, 4,096 tokens of context.

    python -m saccade.models.pocket.recipe --books FOLDER --docs FOLDER [--out FOLDER] [--minutes 8]

`--books` are public-domain books as plain text, `--docs` the sources of CPython's documentation (the folder `Doc` of
CPython, or `_sources` of its built form). The library sources are those of the running Python. Writes the model in the
format of `transformers`, its tokenizer, the log of its training and its scores.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from saccade.models.pocket import FOLDER
from saccade.models.pocket.corpus import BOS, EOS, PAD, VOCAB, Domain, Rows, domain, library, texts
from saccade.tasks import questions


@dataclass(frozen=True)
class Stage:
    """A part of the training: its share of all tokens, the length of its rows and the share of rows with questions."""

    share: float
    length: int
    asked: float


@dataclass(frozen=True)
class Recipe:
    """Sizes, data and schedule. Lengths grow, so that the rules are found on short rows, where they are seen often."""

    hidden: int = 256
    inner: int = 704
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    context: int = 4096
    tokens: int = 500_000_000
    step_tokens: int = 131_072
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(0.40, 512, 0.5),
        Stage(0.20, 1024, 0.45),
        Stage(0.15, 2048, 0.45),
        Stage(0.25, 4096, 0.45),
    )


def build(recipe: Recipe) -> Any:
    """The untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.inner,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def tokenizer() -> Any:
    """Bytes as tokens 0 to 255, and a BOS before every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
    names = ["<bos>", "<eos>", "<pad>", *(f"<extra_{n}>" for n in range(VOCAB - PAD - 1))]
    made = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def schedule(progress: float) -> float:
    """Warm-up over 1%, then level, then down to nothing over the last 35%."""
    return min(1.0, progress / 0.01, (1 - progress) / 0.35)


def optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Matrices inside the layers by Muon, the rest by AdamW."""
    inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(
            inner,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    recipe: Recipe, domains: Sequence[Domain], device: str, minutes: float, workers: int, console: Console
) -> tuple[Any, list[dict[str, float]]]:
    """The trained model and its log. Ends after `recipe.tokens`, or sooner where `minutes` are over: the schedule follows both."""
    model = build(recipe).to(device)
    optims = optimizers(model, recipe)
    began, seen, log = time.perf_counter(), 0, []
    passed, step = 0.0, 0
    for number, stage in enumerate(recipe.stages):
        until = sum(s.share for s in recipe.stages[: number + 1])
        batch = max(1, recipe.step_tokens // stage.length)
        rows = Rows(domains, stage.length, batch, stage.asked, recipe.seed + number)
        source: Iterator[tuple[Tensor, Tensor, Tensor]] = iter(
            DataLoader(rows, batch_size=None, num_workers=workers, pin_memory=device == "cuda")
        )
        while passed < until - 1e-9:
            tokens, targets, weights = (x.to(device, non_blocking=True) for x in next(source))
            rate = recipe.learning_rate * max(0.0, schedule(passed))
            with torch.autocast(device, dtype=torch.bfloat16):
                logits = model(tokens, use_cache=False).logits
            each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            weights = weights.flatten()
            loss = (each * weights).sum() / weights.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                for group in optim.param_groups:
                    group["lr"] = rate
                optim.step()
                optim.zero_grad()
            seen, step = seen + tokens.numel(), step + 1
            seconds = time.perf_counter() - began
            passed = max(seen / recipe.tokens, seconds / 60 / minutes)
            if step % 50 == 0 or passed >= 1:
                plain, answers = (each.detach()[x].mean() for x in (weights == 1, weights > 1))
                row = {
                    "step": step,
                    "tokens": seen,
                    "seconds": round(seconds, 1),
                    "length": stage.length,
                    "text_bits": round(float(plain) / math.log(2), 4),
                    "answer_bits": round(float(answers) / math.log(2), 4),
                }
                if not math.isfinite(row["text_bits"]):
                    raise ValueError(f"training diverged at step {step}")
                log.append(row)
                console.print(" ".join(f"{n} {x}" for n, x in row.items()), highlight=False)
        del source
    return model, log


@torch.no_grad()
def answered(model: Any, made: Sequence[questions.Asked], device: str) -> float:
    """The share of answers that greedy decoding gets right to the last byte: all contexts of one kind, one at a time."""
    right = total = 0
    for each in made:
        row = torch.tensor([BOS, *each.text()], device=device)[None]
        guess = model(row[:, :-1], use_cache=False).logits.argmax(-1)[0]
        for start, end in each.answers():
            right += bool((guess[start:end] == row[0, 1 + start : 1 + end]).all())
            total += 1
    return right / total


@torch.no_grad()
def bits(model: Any, data: Any, length: int, device: str, windows: int = 64) -> float:
    """Bits per byte of held-out text in windows of `length`."""
    count = max(1, min(windows, len(data) // length))
    total = 0.0
    for n in range(count):
        piece = torch.from_numpy(data[n * length : (n + 1) * length].astype("int64")).to(device)
        row = torch.cat((piece.new_tensor([BOS]), piece))[None]
        logits = model(row[:, :-1], use_cache=False).logits.float()
        total += float(F.cross_entropy(logits[0], row[0, 1:])) / math.log(2)
    return total / count


def score(
    model: Any, domains: Sequence[Domain], recipe: Recipe, device: str, count: int = 50
) -> dict[str, Any]:
    """Bits per byte by domain, and the share of right answers by kind and length."""
    model.eval()
    long = recipe.context
    text = b"".join(d.held_out.clip(max=255).astype("uint8").tobytes() for d in domains[-1:]).replace(
        b"\xff", b" "
    )
    scores: dict[str, Any] = {
        "bits_per_byte": {d.name: round(bits(model, d.held_out, long, device), 4) for d in domains},
        "right": {},
    }

    def filler(n: int) -> bytes:
        start = (n * 7919) % max(1, len(text) - long - 1)
        return text[start : start + long]

    for length in (n for n in (512, 1024, 2048, 4095) if n <= long):
        seeds = [10_000_000 + n for n in range(count)]
        depth = [n / max(1, count - 1) for n in range(count)]
        scores["right"][length] = {
            "needle": answered(
                model,
                [
                    questions.needle(filler(n), length, s, depth=d)
                    for n, (s, d) in enumerate(zip(seeds, depth))
                ],
                device,
            ),
            "needles": answered(
                model,
                [questions.needle(filler(n), length, s, needles=3, turns=2) for n, s in enumerate(seeds)],
                device,
            ),
            "recall": answered(model, [questions.recall(length, s) for s in seeds], device),
            "variables": answered(
                model, [questions.variables(filler(n), length, s) for n, s in enumerate(seeds)], device
            ),
            "copy": answered(
                model, [questions.copy(length, s, min(30, (length - 60) // 14)) for s in seeds], device
            ),
        }
    return scores


def main(
    books: Annotated[Path, typer.Option(help="Folder of public-domain books.")],
    docs: Annotated[Path, typer.Option(help="Folder of CPython's documentation sources.")],
    out: Annotated[Path, typer.Option(help="Where the model is written.")] = FOLDER,
    minutes: Annotated[float, typer.Option(help="At most so long.")] = 60.0,
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = Recipe.tokens,
    step_tokens: Annotated[int, typer.Option(help="Tokens of a step.")] = Recipe.step_tokens,
    workers: Annotated[int, typer.Option(help="Processes that make the data.")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
) -> None:
    """Train, score and write saccade-pocket."""
    console = Console()
    recipe = Recipe(tokens=tokens, step_tokens=step_tokens)
    domains = [
        domain("library", library(), 0.35),
        domain("documentation", texts(docs), 0.3),
        domain("books", texts(books), 0.35),
    ]
    for d in domains:
        console.print(f"{d.name}: {len(d.train):,} bytes, {len(d.held_out):,} held out")
    model, log = train(recipe, domains, device, minutes, workers, console)
    model = model.to(torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    scores = score(model, domains, recipe, device)
    parameters = sum(p.numel() for p in model.parameters())
    (out / "training.json").write_text(
        json.dumps(
            {
                "recipe": asdict(recipe),
                "parameters": parameters,
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "torch": torch.__version__,
                "bytes": {d.name: len(d.train) for d in domains},
                "scores": scores,
                "log": log,
            },
            indent=1,
        )
        + "\n"
    )
    console.print_json(json.dumps(scores))


if __name__ == "__main__":
    typer.run(main)
