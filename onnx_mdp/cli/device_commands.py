"""What the commands about devices do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from onnx_mdp.bench import bench, read_jobs
from onnx_mdp.cli.options import Options

__all__ = ["run_bench"]


def run_bench(jobs_path: Path, output: Path, options: Options) -> int:
    """Time the models of a list, and add the results to a file."""
    jobs = read_jobs(jobs_path)
    with options.screen.progress() as progress:
        results = bench(jobs, output, options.runtime(), progress)
    lines = []
    for job in jobs:
        result = results[job.identity]
        beside = "" if result.base_ms is None else f"  {result.ms / result.base_ms:6.1%} of its original"
        lines.append(f"{result.ms:10.3f} ms{beside}  noise F {result.noise:.1%}  {job.model.name}")
    document = {
        "schema_version": 1,
        "output": str(output),
        "results": [asdict(results[job.identity]) | {"model": job.model.name} for job in jobs],
    }
    options.screen.result("\n".join([*lines, f"{len(results)} results → {output}"]), document)
    return 0
