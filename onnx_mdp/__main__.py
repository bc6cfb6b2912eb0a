"""``python -m onnx_mdp`` is the command line."""

from onnx_mdp.cli import main

if __name__ == "__main__":
    main()
