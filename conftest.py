"""Doctests are those of modules: not of the examples, nor of what needs torch where there is none."""

from __future__ import annotations

from onnx_mdp.torch_backend import has_torch

collect_ignore_glob = ["onnx_mdp/docs/examples/*", *([] if has_torch() else ["onnx_mdp/training/*"])]
