"""What `import onnx_mdp` offers: each stage as a function, and the whole of it as one."""
