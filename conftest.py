"""Doctests of the modules that need torch are left out where there is none."""

from __future__ import annotations

from onnx_mdp.torch_backend import has_torch

collect_ignore_glob = [] if has_torch() else ["onnx_mdp/training/*"]
