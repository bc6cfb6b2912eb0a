"""Prune ONNX vision models to a latency, with proof.

``prune`` is the whole job; ``analyze``, ``profile``, ``score``, ``solve``, ``pareto``, ``rewrite`` and
``verify`` are its stages. Nothing is imported before it is used: a command forks a child before anything is
loaded, boards have neither scipy nor pyomo, and torch is an extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnx_mdp._version import __version__

if TYPE_CHECKING:
    from onnx_mdp.analysis.structure import Structure as Structure
    from onnx_mdp.api.pruning import apply as apply
    from onnx_mdp.api.pruning import prune as prune
    from onnx_mdp.api.pruning import repair as repair
    from onnx_mdp.api.pruning import save as save
    from onnx_mdp.api.pruning import verify as verify
    from onnx_mdp.api.stages import analyze as analyze
    from onnx_mdp.api.stages import chosen_rules as width_rules
    from onnx_mdp.api.stages import pareto as pareto
    from onnx_mdp.api.stages import profile as profile
    from onnx_mdp.api.stages import rewrite as rewrite
    from onnx_mdp.api.stages import score as score
    from onnx_mdp.api.stages import solve as solve
    from onnx_mdp.api.training import finetune as finetune
    from onnx_mdp.api.training import to_torch as to_torch
    from onnx_mdp.api.training import write_back as write_back
    from onnx_mdp.importance.scoring import Importance as Importance
    from onnx_mdp.model_io import model_proto as to_proto
    from onnx_mdp.model_io import surgeon_graph as to_graph
    from onnx_mdp.pipeline import PruneResult as PruneResult
    from onnx_mdp.plan import PruningPlan as PruningPlan
    from onnx_mdp.plan import load_plan as load_plan
    from onnx_mdp.planning.formulation import Caps as Caps
    from onnx_mdp.planning.ignored_scope import IgnoredScope as IgnoredScope
    from onnx_mdp.planning.problem import SolveLimits as SolveLimits
    from onnx_mdp.planning.width_rules import WidthRules as WidthRules
    from onnx_mdp.running.runtime import Runtime as Runtime
    from onnx_mdp.running.runtime import runtime as runtime
    from onnx_mdp.surgery.verification import Evidence as Evidence
    from onnx_mdp.tables.latency import LatencyTable as LatencyTable
    from onnx_mdp.tables.table_file import load_table as load_table
    from onnx_mdp.tables.table_file import save_table as save_table
    from onnx_mdp.training.loaders import LoaderRequest as LoaderRequest

__all__ = [
    "Caps",
    "Evidence",
    "IgnoredScope",
    "Importance",
    "LatencyTable",
    "LoaderRequest",
    "PruneResult",
    "PruningPlan",
    "Runtime",
    "SolveLimits",
    "Structure",
    "WidthRules",
    "__version__",
    "analyze",
    "apply",
    "finetune",
    "load_plan",
    "load_table",
    "pareto",
    "profile",
    "prune",
    "repair",
    "rewrite",
    "runtime",
    "save",
    "save_table",
    "score",
    "solve",
    "to_graph",
    "to_proto",
    "to_torch",
    "verify",
    "width_rules",
    "write_back",
]

_HOMES = {
    "Caps": "planning.formulation:Caps",
    "Evidence": "surgery.verification:Evidence",
    "IgnoredScope": "planning.ignored_scope:IgnoredScope",
    "Importance": "importance.scoring:Importance",
    "LatencyTable": "tables.latency:LatencyTable",
    "LoaderRequest": "training.loaders:LoaderRequest",
    "PruneResult": "pipeline:PruneResult",
    "PruningPlan": "plan:PruningPlan",
    "Runtime": "running.runtime:Runtime",
    "SolveLimits": "planning.problem:SolveLimits",
    "Structure": "analysis.structure:Structure",
    "WidthRules": "planning.width_rules:WidthRules",
    "analyze": "api.stages:analyze",
    "apply": "api.pruning:apply",
    "finetune": "api.training:finetune",
    "load_plan": "plan:load_plan",
    "load_table": "tables.table_file:load_table",
    "pareto": "api.stages:pareto",
    "profile": "api.stages:profile",
    "prune": "api.pruning:prune",
    "repair": "api.pruning:repair",
    "rewrite": "api.stages:rewrite",
    "runtime": "running.runtime:runtime",
    "save": "api.pruning:save",
    "save_table": "tables.table_file:save_table",
    "score": "api.stages:score",
    "solve": "api.stages:solve",
    "to_graph": "model_io:surgeon_graph",
    "to_proto": "model_io:model_proto",
    "to_torch": "api.training:to_torch",
    "verify": "api.pruning:verify",
    "width_rules": "api.stages:chosen_rules",
    "write_back": "api.training:write_back",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnx_mdp' has no attribute {name!r}")
    module, _, known_as = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"onnx_mdp.{module}"), known_as)


def __dir__() -> list[str]:
    return sorted(__all__)
