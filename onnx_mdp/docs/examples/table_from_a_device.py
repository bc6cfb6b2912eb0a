"""Prune here for a device elsewhere: its table is a file that ``onnx-mdp profile -o`` wrote there."""

import onnx_ir

import onnx_mdp


def main() -> None:
    """Write what table.json says meets 70 % of the device's latency; nothing is measured here."""
    structure = onnx_mdp.analyze("model.onnx")
    table = onnx_mdp.load_table("table.json", structure)
    importance = onnx_mdp.score(structure, "calibration.npz")
    plan = onnx_mdp.solve(structure, importance, table, target_ratio=0.7)
    if plan.status == "infeasible":
        raise SystemExit(f"the fastest plan takes {plan.fastest_ms:.3f} ms")
    print(f"the table says {table.base_ms:.3f} ms → {plan.predicted_ms:.3f} ms; gap {plan.gap:.1e}")
    slim = onnx_mdp.rewrite(structure, plan)
    evidence = onnx_mdp.verify("model.onnx", slim, plan)
    if not evidence.verified:
        raise SystemExit("not what the plan says; please report the model")
    onnx_ir.save(slim, "slim.onnx")


if __name__ == "__main__":
    main()
