"""A sweep over latencies: what each costs in importance and leaves of the parameters, as a CSV."""

import csv

import numpy as np

import onnx_mdp
from onnx_mdp.model_io import parameter_count


def main() -> None:
    """Solve thirteen latencies from 90 to 30 % of the unpruned one, and write sweep.csv."""
    structure = onnx_mdp.analyze("model.onnx")
    table = onnx_mdp.profile(structure)
    importance = onnx_mdp.score(structure, "calibration.npz")
    targets = [float(ratio) * table.base_ms for ratio in np.linspace(0.9, 0.3, 13)]
    with open("sweep.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["target_ms", "predicted_ms", "importance_kept", "parameters"])
        for target, plan in zip(targets, onnx_mdp.pareto(structure, importance, table, targets), strict=True):
            if plan.status == "infeasible":
                rows.writerow([f"{target:.3f}", "", "", ""])
                continue
            slim = onnx_mdp.rewrite(structure, plan)
            rows.writerow(
                [
                    f"{target:.3f}",
                    f"{plan.predicted_ms:.3f}",
                    f"{plan.importance_share:.4f}",
                    parameter_count(slim),
                ]
            )


if __name__ == "__main__":
    main()
