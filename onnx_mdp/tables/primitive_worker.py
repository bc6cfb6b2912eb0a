"""Run models so that oneDNN prints the time of each primitive, in a process of its own.

oneDNN reads ``ONEDNN_VERBOSE`` once, when it is loaded, and prints to stdout; so this is started anew each
time. ``python -m onnx_mdp.tables.primitive_worker`` reads a request as JSON on stdin: files of models, the
shapes of their inputs, a runtime, rounds, and how many runs of each model warm it up and count. Before each
run that counts it prints a mark with the number of the model, after each one with its milliseconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from onnx_mdp.running.placement import open_placed
from onnx_mdp.running.runtime import Runtime
from onnx_mdp.running.timing import random_feeds

__all__ = ["MARK", "main"]

MARK = "onnx-mdp"


def main() -> None:
    """Do what stdin asks for."""
    asked = json.load(sys.stdin)
    options = tuple((str(key), str(value)) for key, value in asked["runtime"].pop("options"))
    runtime = Runtime(**asked["runtime"], options=options)
    shapes = {name: tuple(shape) for name, shape in asked["shapes"].items()}
    sessions = [open_placed(path, runtime, shapes) for path in asked["models"]]
    pairs = [(session, random_feeds(session, shapes, asked["seed"])) for session in sessions]
    for _ in range(asked["rounds"]):
        for number, (session, feeds) in enumerate(pairs):
            for run in range(asked["warm_up"] + asked["counted"]):
                if run >= asked["warm_up"]:
                    _mark("run", number)
                started = time.perf_counter()
                session.run(None, feeds)
                _mark("end", 1e3 * (time.perf_counter() - started))


def _mark(*fields: Any) -> None:
    """Straight to the file, where the library writes as well."""
    os.write(sys.stdout.fileno(), " ".join(map(str, (MARK, *fields, "\n"))).encode())


if __name__ == "__main__":
    main()
