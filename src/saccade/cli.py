"""The command `saccade`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saccade.bench.compare import Progress, Watch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Describe any attention, run it fast, look inside it, and measure it against the others."""
    if version:
        from importlib import metadata

        print(f"saccade {metadata.version('saccade')}")
        raise typer.Exit


@app.command()
def compare(
    mechanisms: Annotated[
        list[str] | None, typer.Argument(help='Such as "window(128)" or moba; a default set without any.')
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to train on.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths of the speed cells, as in 512,2048.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds to train.")] = None,
    device: Device = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Within 90 seconds on 2 cores.")] = False,
    long: Annotated[bool, typer.Option("--long", help="3 seeds, 20 times the tokens; for a GPU.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is already known.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("compare"),
) -> None:
    """Train and measure mechanisms side by side, and say which to use.

    Full attention and its twin (the same mathematics by another kernel) are always among them. After Ctrl-C the
    same command goes on from where it stopped.
    """
    with user_errors():
        from saccade.bench import compare as bench
        from saccade.bench import presets

        if quick and long:
            raise ValueError("--quick and --long exclude each other: give one")
        preset = presets.QUICK if quick else presets.LONG if long else presets.DEFAULT
        comparison = bench.prepare(
            mechanisms or [],
            bench.with_choices(preset, _whole_numbers(lengths), seeds),
            folder=out,
            text=text,
            device=device,
            command=shlex.join(["saccade", *(word for word in sys.argv[1:] if word != "--fresh")]),
            fresh=fresh,
        )
        with _watching() as watch:
            results = bench.compare(comparison, watch)
        _show(results)
        print(f"\n{out / 'results.json'}\n{out / bench.REPORT}")
    if results["interrupted"]:
        print(
            "Interrupted: what is finished is kept, and the same command goes on from there.", file=sys.stderr
        )
        raise typer.Exit(130)


@app.command()
def explain(
    mechanism: Annotated[str, typer.Argument(help='Such as "window(256)".')],
    length: Annotated[int, typer.Option(help="Tokens.")],
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key-value heads; as the mechanism says without.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Device = "cpu",
    grad: Annotated[bool, typer.Option("--grad", help="With gradients.")] = False,
) -> None:
    """Print how a mechanism would be computed, what it costs, and why not otherwise."""
    with user_errors():
        import saccade as sc

        for name, value in (("length", length), ("batch", batch), ("heads", heads), ("head-dim", head_dim)):
            if value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"--device is cpu or cuda, got {device!r}")
        m = sc.mechanism(mechanism)
        shape = sc.Shape(batch, heads, length, head_dim, kv_heads=kv_heads or m.kv_heads(heads))
        print(sc.plan(m, shape, device=device, dtype=_dtype(dtype), grad=grad))


@app.command()
def systems(
    words: Annotated[list[str] | None, typer.Argument(help="Words that all must occur.")] = None,
    family: Annotated[str | None, typer.Option(help="Only this family or kind.")] = None,
    state: Annotated[str | None, typer.Option(help="works or planned.")] = None,
) -> None:
    """List the systems of the reading list, or search them."""
    with user_errors():
        from rich.console import Console

        from saccade.insight import cards
        from saccade.systems import catalogue

        found = catalogue.search(" ".join(words or []), family, state)
        known = catalogue.load()
        for option, value, allowed in (
            ("--family", family, {e.family for e in known} | {e.kind for e in known}),
            ("--state", state, {"planned", "works"}),
        ):
            if value is not None and value not in allowed:
                raise ValueError(f"{option} {value!r} is unknown; there are {', '.join(sorted(allowed))}")
        console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
        console.print(cards.table(found))
        console.print(f"\n{len(found)} of {len(known)} systems")


@app.command()
def show(slug: Annotated[str, typer.Argument(help="A slug such as moba, or a ref such as S211.")]) -> None:
    """Print the card of a system: formula, composition, cost, paper, how to call it, what was found."""
    with user_errors():
        from saccade.insight import cards
        from saccade.systems import catalogue

        entry = catalogue.get(slug)
        print(cards.card(entry))
        picture = cards.picture(entry)
        if picture is not None:
            print(f"\npattern\n{picture}")


@app.command()
def combine(
    parts: Annotated[list[str] | None, typer.Argument(help='Parts, as in rope "window(8)".')] = None,
) -> None:
    """Print which parts go together, or whether the given ones do; the exit code is 1 when they do not."""
    with user_errors():
        import saccade as sc
        from saccade.mechanism import combine as rules

        if not parts:
            print("# go together   + with a third part, such as causal   . exclude each other\n")
            print("\n".join(rules.table()))
            return
        why = rules.refusal(*parts)
        if why is not None:
            print(why)
            raise typer.Exit(1)
        m = sc.mechanism(" + ".join(parts))
        print(f"{m}\n{m.family}, {'causal' if m.causal else 'not causal'}; parts: {m.canonical()}")


@app.command()
def verify(name: Annotated[str, typer.Argument(help="A mechanism, as text.")]) -> None:
    """Check a mechanism against the public contract; the exit code is 1 when a property fails."""
    with user_errors():
        import saccade as sc

        report = sc.testing.check(sc.mechanism(name), show=False)
        print(report)
    if not report.ok:
        raise typer.Exit(1)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = (
            f"{error.strerror}: {error.filename}"
            if isinstance(error, OSError) and error.filename
            else str(error)
        )
        print(f"saccade: {said}", file=sys.stderr)
        raise typer.Exit(2) from None


@contextmanager
def _watching() -> Iterator[Watch]:
    """A live table and a bar in a terminal; a line for each step elsewhere."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    from saccade.bench.table import table

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda p: print(_line(p), file=sys.stderr, flush=True)
        return
    with Live(console=console, transient=True, refresh_per_second=4) as live:

        def show(progress: Progress) -> None:
            if progress.said:
                console.print(progress.said, highlight=False)
            bar = ProgressBar(total=progress.total, completed=progress.done, width=40)
            live.update(Group(table(progress.results), Text(), bar, Text(_line(progress))))

        yield show


def _line(progress: Progress) -> str:
    if progress.said:
        return progress.said
    left = f", {_duration(progress.seconds_left)} left" if progress.seconds_left else ""
    return f"[{progress.done}/{progress.total}{left}] {progress.running}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _show(results: dict[str, Any]) -> None:
    from rich.console import Console

    from saccade.bench.table import table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table(results))
    failed = {e["name"]: e["error"] for e in results["summary"] if e["error"]}
    for name, error in failed.items():
        console.print(f"\n{name}: {error}", markup=False)
    for sentence in (*results["advice"], *results["caveats"]):
        console.print(f"\n{sentence}", markup=False)


def _whole_numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--lengths takes whole numbers with commas, as in 512,2048, got {text!r}") from None


def _dtype(name: str) -> Any:
    import torch

    allowed = ("float32", "bfloat16", "float16", "float64")
    if name not in allowed:
        raise ValueError(f"--dtype is one of {', '.join(allowed)}, got {name!r}")
    return getattr(torch, name)


def main() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    main()
