"""The command: what it prints, and one clean line with exit code 2 for every error that a user can make."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import saccade as sc
from saccade.cli import app

WORKS = "moba"


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(*words: str) -> str:
    """The one line that a wrong call prints."""
    result = invoke(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("saccade: ")
    return line


def test_explain_prints_the_plan() -> None:
    result = invoke("explain", "window(256)", "--length", "8192")
    assert result.exit_code == 0
    assert result.stdout == f"{sc.plan('window(256)', (1, 8, 8192, 64))}\n"
    result = invoke(
        "explain", "gqa(2) + causal", "--length", "128", "--heads", "4", "--dtype", "bfloat16", "--grad"
    )
    shape = sc.Shape(1, 4, 128, 64, kv_heads=2)
    assert (
        result.stdout
        == f"{sc.plan('gqa(2) + causal', shape, dtype=__import__('torch').bfloat16, grad=True)}\n"
    )


def test_systems_lists_and_searches() -> None:
    everything = invoke("systems").stdout
    assert "S211" in everything
    assert "301 of 301 systems" in everything
    found = invoke("systems", "mixture", "block").stdout
    assert "moba" in found
    assert "S077" not in found
    family = invoke("systems", "--family", "linear").stdout
    assert 0 < int(family.splitlines()[-1].split()[0]) < 301


def test_show_prints_a_card() -> None:
    card = invoke("show", WORKS).stdout
    assert "MoBA: Mixture of Block Attention" in card
    assert "S211" in card


def test_a_card_of_a_working_system_shows_formula_and_call() -> None:
    card = invoke("show", WORKS).stdout
    assert f'sc.attend(q, k, v, "{WORKS}")' in card
    assert sc.mechanism(WORKS).canonical() in card
    assert "formula" in card


def test_a_card_of_a_planned_system_says_so() -> None:
    from saccade.systems import catalogue

    planned = next(e for e in catalogue.load() if e.state == "planned")
    card = invoke("show", planned.slug).stdout
    assert "Planned: it cannot be called yet." in card
    assert "sc.attend" not in card


def test_verify_prints_the_report_and_fails_when_a_property_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("verify", "window(8)")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("window(8): all held") == 1

    class Broken:
        ok = False

        def __str__(self) -> str:
            return "a leak from the future"

    monkeypatch.setattr(sc.testing, "check", lambda m, show: Broken())
    result = invoke("verify", "window(8)")
    assert (result.exit_code, result.stdout) == (1, "a leak from the future\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["explain", "windo(4)", "--length", "8"], "nearest names: window"),
        (["explain", "window(4)", "--length", "0"], "--length must be at least 1, got 0"),
        (["explain", "window(4)", "--length", "8", "--dtype", "int8"], "--dtype is one of float32"),
        (["explain", "window(4)", "--length", "8", "--device", "tpux"], "tpux"),
        (["show", "mobb"], "nearest: moba"),
        (["systems", "--state", "done"], "planned, works"),
        (["systems", "--family", "nonsense"], "there are"),
        (["verify", "windo(4)"], "nearest names: window"),
        (["compare", "windo(4)"], "nearest names: window"),
        (["compare", "--seeds", "0"], "at least one seed is needed, got 0"),
        (["compare", "--lengths", "512,0"], "lengths must be positive"),
        (["compare", "--lengths", "512,many"], "whole numbers"),
        (["compare", "--device", "gpu"], "this machine has cpu"),
        (["compare", "--quick", "--long"], "exclude each other"),
        (["compare", "--text", "no/such/file.txt"], "No such file or directory: no/such/file.txt"),
    ],
)
def test_user_errors_are_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(*words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "is empty"), (b"\0" * 999, "binary"), (b"\xff" * 999, "not UTF-8"), (b"ab", "2 bytes")],
)
def test_texts_that_cannot_be_used_are_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    assert says in refused("compare", "--text", str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "results cannot be written to" in refused(
        "compare", "--quick", "--out", str(tmp_path / "file" / "out")
    )


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"saccade {sc.__version__}\n"
    help_text = invoke("--help").stdout
    assert all(word in help_text for word in ("compare", "explain", "systems", "show", "verify"))


@pytest.mark.skipif(sys.platform == "win32", reason="sends an interrupt signal")
def test_an_interrupted_comparison_keeps_what_is_finished(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "saccade.cli", "compare", "causal", "--quick", "--lengths", "64"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    log = tmp_path / "cells.jsonl"
    end = time.monotonic() + 240
    while time.monotonic() < end and not (log.exists() and log.read_text().count("\n")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "the same command goes on from there" in err
    assert str(tmp_path / "results.json") in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["interrupted"]
    assert any(cell["status"] == "ok" for cell in results["cells"].values())
    assert (tmp_path / "report.html").exists()
