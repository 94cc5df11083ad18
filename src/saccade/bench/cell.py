"""`python -m saccade.bench.cell`: reads jobs as lines of JSON on stdin and answers each with a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it; here it is imported once for all jobs
import torch.fx.experimental.symbolic_shapes  # likewise, the first backward call

from saccade.bench import speed, train
from saccade.bench.worker import ending

RUNNERS = {"quality": train.quality, "recall": train.recall, "speed": speed.speed}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """The cells of a job, by id, or the error that it met."""
    start = time.perf_counter()
    torch.set_num_threads(job["threads"])
    try:
        cells = RUNNERS[job["kind"]](job)
    except (ValueError, NotImplementedError) as error:
        return {"error": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    seconds = round((time.perf_counter() - start) / len(cells), 3)
    return {"cells": {name: {"seconds": seconds, **cell} for name, cell in cells.items()}}


def main() -> None:
    """Answer jobs until stdin ends; on Linux a forked child runs each, and is the first to touch a GPU."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a mechanism prints is not an answer
    for line in sys.stdin:
        job = json.loads(line)
        if sys.platform != "linux":
            print(json.dumps({**run(job), "last": True}), file=answers, flush=True)
            return
        print(_forked(job), file=answers, flush=True)


def _forked(job: dict[str, Any]) -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                pipe.write(json.dumps(run(job)))
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return answer if not code and answer else json.dumps({"error": f"its process ended with {ending(code)}"})


if __name__ == "__main__":
    main()
