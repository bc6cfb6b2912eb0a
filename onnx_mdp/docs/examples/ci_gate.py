"""A gate for CI: the file is what its plan says, and agrees with the original on enough labelled images.

The latency belongs onto the machine that serves: ``onnx-mdp verify … --max-ms``.
"""

import sys

import numpy as np
import onnxruntime

import onnx_mdp

LEAST_SHARE = 0.5  # of the original's right answers


def right_answers(file: str, images: np.ndarray, labels: np.ndarray) -> int:
    """How many images a file puts into their class."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    return int((logits.argmax(1) == labels).sum())


def main() -> int:
    """0 if slim.onnx passes, else 1."""
    evidence = onnx_mdp.verify("model.onnx", "slim.onnx", "slim.plan.json")
    print(f"verified: {evidence.verified}, error {evidence.worst:.1e} of the scale")
    with np.load("train.npz") as archive:
        images, labels = archive["image"], archive["labels"]
    before, after = (right_answers(file, images, labels) for file in ("model.onnx", "slim.onnx"))
    print(f"right answers: {before} → {after} of {len(labels)}")
    return 0 if evidence.verified and after >= LEAST_SHARE * before else 1


if __name__ == "__main__":
    sys.exit(main())
