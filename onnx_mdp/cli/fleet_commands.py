"""What `fleet` does: a table of each model on each device of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx_mdp.cli.options import Options
from onnx_mdp.errors import UsageError
from onnx_mdp.files import check_output, write_files
from onnx_mdp.fleet import Measured, measure_fleet
from onnx_mdp.reports.report import printable
from onnx_mdp.tables.lut_store import open_store

__all__ = ["FleetOptions", "run_fleet"]


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What `fleet` takes besides the common options."""

    devices: tuple[str, ...]
    output: Path
    address: str = "auto"
    choices: int = 16
    patience_s: float = 600.0
    overwrite: bool = False


def run_fleet(models: Sequence[Path], options: Options, wanted: FleetOptions) -> int:
    """Measure each model on each device, and write a table for each pair."""
    pairs = [(model.stem, device) for model in models for device in wanted.devices]
    if wanted.output.exists() and not wanted.output.is_dir():
        raise UsageError(f"{wanted.output} is no folder; give one for the tables")
    for pair in pairs if wanted.output.is_dir() else ():
        check_output(_table(wanted.output, *pair), overwrite=wanted.overwrite)
    with open_store(options.store) as store, options.screen.progress() as progress:
        found = measure_fleet(
            models,
            wanted.devices,
            options,
            store,
            choices=wanted.choices,
            address=wanted.address,
            patience_s=wanted.patience_s,
            progress=progress,
        )
    wanted.output.mkdir(parents=True, exist_ok=True)
    tables = {_table(wanted.output, one.model, one.device): one for one in found}
    write_files({path: one.table.encode() for path, one in tables.items()})
    lines = [_line(path, one) for path, one in tables.items()]
    document = {
        "schema_version": 1,
        "tables": [
            {
                "model": one.model,
                "device": one.device,
                "host": one.session["host"],
                "base_ms": one.base_ms,
                "profiled": one.profiled,
                "started": one.started,
                "finished": one.finished,
                "output": str(path),
            }
            for path, one in tables.items()
        ],
    }
    options.screen.result("\n".join(lines), document)
    return 0


def _table(folder: Path, model: str, device: str) -> Path:
    return folder / f"{model}.{device}.json"


def _line(path: Path, one: Measured) -> str:
    source = f"{one.profiled} variants profiled" if one.profiled else "all from the device's store"
    where = printable(f"{one.device} ({one.session['host']})")
    return f"{printable(one.model)} on {where}: base {one.base_ms:.3f} ms, {source} → {path}"
