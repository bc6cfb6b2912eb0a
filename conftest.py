"""Doctests are those of modules: not of examples, nor of what needs torch or Olive where there is none."""

from __future__ import annotations

import importlib.util

from onnx_mdp.torch_backend import has_torch

collect_ignore_glob = ["onnx_mdp/docs/examples/*", *([] if has_torch() else ["onnx_mdp/training/*"])]
if importlib.util.find_spec("olive") is None:
    collect_ignore_glob += [
        f"onnx_mdp/integrations/olive_{name}.py" for name in ("data", "parameters", "pass")
    ]
