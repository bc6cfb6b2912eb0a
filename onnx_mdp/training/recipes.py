"""How weights are trained: one frozen recipe, presets of the paper's table 6, and the rate of each step.

The rate at step t of T, with w steps of warm-up and base rate η, is ::

    η (t + 1) / w                                    t < w
    η · decay((t - w) / (T - w))                     cosine: (1 + cos πs) / 2 · linear: 1 - s · constant: 1
                                                     step: 1, then 1/10 from s = 2/3 and 1/100 from s = 8/9

Presets give the rate for the batch that they were made for; another ``batch`` scales it in proportion, and a
rate that is given is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from onnx_mdp.errors import UsageError

__all__ = ["RECIPES", "Recipe", "learning_rate", "recipe"]

_STEP_AT = (2 / 3, 8 / 9)
_DECAYS: Mapping[str, Callable[[float], float]] = {
    "constant": lambda s: 1.0,
    "cosine": lambda s: (1 + math.cos(math.pi * s)) / 2,
    "linear": lambda s: 1 - s,
    "step": lambda s: 0.1 ** sum(s >= at for at in _STEP_AT),
}
_OPTIMIZERS = ("adamw", "sgd")
_PRECISIONS = ("bfloat16", "float32")
_WRITTEN = ("best", "last")
_LIMITS: Mapping[str, tuple[float, float]] = {
    "alpha": (0, 1),
    "batch": (1, 1e6),
    "clip": (0, math.inf),
    "ema": (0, 1),
    "epochs": (0, 1e6),
    "features": (0, math.inf),
    "label_smoothing": (0, 1),
    "lr": (0, math.inf),
    "momentum": (0, 1),
    "patience": (0, 1e6),
    "steps": (1, 1e9),
    "temperature": (1e-3, 1e3),
    "warmup": (0, 1),
    "weight_decay": (0, math.inf),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One way to train.

    ``steps`` overrides ``epochs``. ``warmup`` is a share of all steps, ``ema`` the decay of the moving
    average of the weights (0: none) and ``clip`` the largest norm of the gradient (0: any). Norm and bias
    vectors are never decayed. ``alpha`` weighs distillation against labels where there are both,
    ``temperature`` softens class probabilities, and ``features`` weighs intermediate tensors that are
    matched. ``weights`` says which are written: those that were ``best`` in validation, or the ``last``.
    """

    optimizer: str = "adamw"
    lr: float = 5e-4
    momentum: float = 0.9
    weight_decay: float = 0.01
    decay: str = "cosine"
    warmup: float = 0.05
    epochs: float = 10.0
    steps: int | None = None
    batch: int = 64
    ema: float = 0.0
    clip: float = 1.0
    label_smoothing: float = 0.0
    precision: str = "float32"
    alpha: float = 0.9
    temperature: float = 2.0
    features: float = 1.0
    patience: int = 0
    weights: str = "best"


RECIPES: Mapping[str, Recipe] = {
    # A small budget on any model; AdamW forgives where BatchNorm was folded away.
    "default": Recipe(),
    # Table 6 of the paper gives epochs, optimizer, decay, rate and weight decay; the rest, batches among it,
    # is what the training codes that the paper builds on use.
    "resnet50": Recipe(
        "sgd", 1.024, 0.875, 3e-5, "linear", 8 / 90, 90, batch=1024, clip=0.0, label_smoothing=0.1
    ),
    "deit": Recipe("adamw", 2e-4, 0.9, 0.05, "cosine", 5 / 300, 300, batch=1024, ema=0.99996),
    "ssd512": Recipe("sgd", 8e-3, 0.9, 2e-3, "step", 0.005, 800, batch=32, clip=0.0),
    "streampetr": Recipe("adamw", 6e-4, 0.9, 0.01, "cosine", 0.01, 60, batch=16, clip=35.0),
}


def recipe(name: str, overrides: Mapping[str, Any]) -> Recipe:
    """The preset ``name`` with every override that is not None.

    Raises:
        UsageError: there is no such preset or field, or a value makes no sense.
    """
    if name not in RECIPES:
        raise UsageError(f"no recipe is called {name!r}; choose one of {', '.join(RECIPES)}")
    known = [field.name for field in fields(Recipe)]
    for field, value in overrides.items():
        if field not in known:
            raise UsageError(f"a recipe has no {field!r}; it has {', '.join(known)}")
        if field in _LIMITS and not isinstance(value, (int, float, type(None))):
            raise UsageError(f"{field} of a recipe is a number, not {value!r}")
    preset = RECIPES[name]
    given = {key: value for key, value in overrides.items() if value is not None}
    if "epochs" in given and "steps" in given:
        raise UsageError("give --epochs or --steps, not both")
    if "batch" in given and "lr" not in given:
        given["lr"] = preset.lr * given["batch"] / preset.batch
    chosen = replace(preset, **given)
    _check(chosen)
    return chosen


def _check(chosen: Recipe) -> None:
    for option, value, known in (
        ("--optimizer", chosen.optimizer, _OPTIMIZERS),
        ("--decay", chosen.decay, tuple(_DECAYS)),
        ("--precision", chosen.precision, _PRECISIONS),
        ("--weights", chosen.weights, _WRITTEN),
    ):
        if value not in known:
            raise UsageError(f"{option} {value!r} is unknown; choose one of {', '.join(known)}")
    if chosen.patience and chosen.weights == "last":
        raise UsageError("--patience ends a run after its best weights; leave it out, or --weights last")
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        if field.name in _LIMITS and value is not None:
            least, most = _LIMITS[field.name]
            if not (math.isfinite(value) and least <= value <= most):
                option = field.name.replace("_", "-")
                raise UsageError(f"--{option} {value} is not between {least:g} and {most:g}")
    if chosen.steps is None and not chosen.epochs:
        raise UsageError("--epochs must be larger than 0")


def learning_rate(chosen: Recipe, step: int, steps: int) -> float:
    """The rate of step ``step`` of ``steps``.

    >>> [round(learning_rate(Recipe(lr=1.0, warmup=0.5), step, 4), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warm = round(chosen.warmup * steps)
    if step < warm:
        return chosen.lr * (step + 1) / warm
    return chosen.lr * _DECAYS[chosen.decay]((step - warm) / max(1, steps - warm))
