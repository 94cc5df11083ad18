"""The contract on another device than the tests' CPU: every mechanism that the tests check; writes results/contract_DEVICE.json.

python benchmarks/contract.py [--device cuda] [--only WORD]
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

import saccade as sc
from bars import FOLDER
from saccade.bench.machine import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def held(job: tuple[str, str]) -> dict[str, object]:
    """What the contract says of one mechanism on a device."""
    text, device = job
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sc.testing.check(text, device=device, show=False)
    failed = {o.name: o.detail for o in report.outcomes if o.held is False}
    applied = sum(o.held is not None for o in report.outcomes)
    return {"mechanism": text, "ok": report.ok, "properties": applied, "failed": failed}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="texts that hold this word; results are not written")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="stop after so long; the rest is listed"
    )
    options = parser.parse_args()
    from test_contract import PLAIN, SYSTEMS

    texts = [t for t in (*PLAIN, *SYSTEMS) if options.only in t]
    rows, console, end = [], Console(), time.monotonic() + options.seconds
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        waiting = {pool.apply_async(held, ((t, options.device),)) for t in texts}
        while waiting and time.monotonic() < end:
            for job in [x for x in waiting if x.ready()]:
                waiting.discard(job)
                rows.append(row := job.get())
                said = "held" if row["ok"] else "FAILED"
                console.print(f"{len(rows)}/{len(texts)} {said}  {row['mechanism']} {row['failed'] or ''}")
            time.sleep(0.2)
        pool.terminate()
    if not options.only:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        document = {
            "made_by": f"python benchmarks/contract.py --device {options.device}",
            "date": datetime.date.today().isoformat(),
            "commit": commit.stdout.strip(),
            "machine": describe(options.device),
            "held": sum(bool(r["ok"]) for r in rows),
            "checked": len(rows),
            "not_reached": [t for t in texts if t not in {r["mechanism"] for r in rows}],
            "mechanisms": sorted(rows, key=lambda r: texts.index(str(r["mechanism"]))),
        }
        path = FOLDER / f"contract_{options.device}.json"
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {path}")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
