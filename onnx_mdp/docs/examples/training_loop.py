"""A training loop of your own: the pruned file as a module of torch, distilled, and back into the file."""

import numpy as np
import onnx_ir
import torch

import onnx_mdp


def main() -> None:
    """Train slim.onnx on the images of train.npz to say what model.onnx says."""
    images = torch.from_numpy(np.load("train.npz")["image"])
    teacher = onnx_mdp.to_torch("model.onnx")
    student = onnx_mdp.to_torch("slim.onnx").train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    for step, batch in enumerate(images.split(50)):
        with torch.no_grad():
            wanted = teacher(batch).softmax(1)
        loss = torch.nn.functional.cross_entropy(student(batch), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")
    onnx_ir.save(onnx_mdp.write_back("slim.onnx", student), "trained.onnx")  # the same graph, other weights


if __name__ == "__main__":
    main()
