"""Prune from Python: a target, the result in words, the files, and the proof once more from the files."""

import onnx_mdp


def main() -> None:
    """Prune model.onnx to 70 % of its latency on this machine."""
    result = onnx_mdp.prune(
        "model.onnx",
        target_ratio=0.7,
        data="calibration.npz",  # arrays called as the inputs are: numpy.savez("calibration.npz", image=...)
        rules=onnx_mdp.WidthRules(multiple=8),
    )
    if result.status != "met":  # "missed", "infeasible" or "nothing_to_do"
        raise SystemExit(f"{result.status}: at least {result.fastest_ms} ms can be reached")
    print(f"{result.base_ms:.3f} ms → {result.measured_ms:.3f} ms, noise {result.noise:.1%}")
    print(f"parameters {result.params[0]:,} → {result.params[1]:,}")
    model, plan, _ = onnx_mdp.save(result, "slim.onnx")
    evidence = onnx_mdp.verify("model.onnx", model, plan)
    print(f"verified: {evidence.verified}, error {evidence.worst:.1e} of the scale")


if __name__ == "__main__":
    main()
