"""What needs torch: the model as a module, gradients, fine-tuning; ``pip install 'onnx-mdp[torch]'``."""
