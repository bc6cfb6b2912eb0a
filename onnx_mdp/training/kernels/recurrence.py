"""Kernels of the recurrent layers, step by step, in ONNX's order of gates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from onnx_mdp.training.kernels.registry import Call, kernel

__all__: list[str] = []

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]

_PLAIN: dict[str, Activation] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
}
# With parameters: the name, the defaults of alpha and beta.
_SHAPED: dict[str, tuple[Callable[..., Tensor], float, float]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "elu": (lambda x, alpha, beta: F.elu(x, alpha), 1.0, 0.0),
    "hardsigmoid": (lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1), 0.2, 0.5),
    "leakyrelu": (lambda x, alpha, beta: F.leaky_relu(x, alpha), 0.01, 0.0),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "thresholdedrelu": (lambda x, alpha, beta: torch.where(x > alpha, x, 0), 1.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class _Cell:
    """The parameters of one direction; ``peep`` are an LSTM's peepholes."""

    call: Call
    acts: Sequence[Activation]
    w: Tensor
    r: Tensor
    wb: Tensor
    rb: Tensor
    peep: Sequence[Tensor]


def _activations(call: Call, names: Sequence[str], directions: int) -> list[list[Activation]]:
    """The activations of each direction, with their numbers, which only those that need some consume."""
    given = [str(name).lower() for name in call.get("activations") or list(names) * directions]
    alphas, betas = (list(call.get(f"activation_{key}") or []) for key in ("alpha", "beta"))
    made: list[Activation] = []
    for name in given:
        if name in _PLAIN:
            made.append(_limited(call, _PLAIN[name]))
        elif name in _SHAPED:
            shaped, alpha, beta = _SHAPED[name]
            a = alphas.pop(0) if alphas else alpha
            b = betas.pop(0) if betas else beta
            made.append(_limited(call, functools.partial(shaped, alpha=a, beta=b)))
        else:
            raise call.unsupported(f"the activation {name}")
    return [made[k * len(names) : (k + 1) * len(names)] for k in range(directions)]


def _limited(call: Call, activation: Activation) -> Activation:
    limit = call.get("clip")
    return activation if limit is None else lambda x: activation(torch.clamp(x, -limit, limit))


def _rnn_step(cell: _Cell, x: Tensor, state: State) -> State:
    gates = F.linear(x, cell.w, cell.wb) + F.linear(state[0], cell.r, cell.rb)
    return (cell.acts[0](gates),)


def _gru_step(cell: _Cell, x: Tensor, state: State) -> State:
    (h,) = state
    size = h.shape[-1]
    left = F.linear(x, cell.w, cell.wb)
    update, reset = (
        cell.acts[0](gate) for gate in (left + F.linear(h, cell.r, cell.rb))[..., : 2 * size].chunk(2, -1)
    )
    r, rb = cell.r[2 * size :], cell.rb[2 * size :]
    hidden = (
        reset * F.linear(h, r, rb) if cell.call.get("linear_before_reset", 0) else F.linear(reset * h, r, rb)
    )
    new = cell.acts[1](left[..., 2 * size :] + hidden)
    return ((1 - update) * new + update * h,)


def _lstm_step(cell: _Cell, x: Tensor, state: State) -> State:
    h, c = state
    gates = F.linear(x, cell.w, cell.wb) + F.linear(h, cell.r, cell.rb)
    i, o, f, new = gates.chunk(4, -1)
    pi, po, pf = cell.peep
    enter = cell.acts[0](i + pi * c)
    forget = 1 - enter if cell.call.get("input_forget", 0) else cell.acts[0](f + pf * c)
    c = forget * c + enter * cell.acts[1](new)
    return cell.acts[0](o + po * c) * cell.acts[2](c), c


Step = Callable[[_Cell, Tensor, State], State]
_LAYERS: dict[str, tuple[Step, int, tuple[str, ...], int]] = {
    "GRU": (_gru_step, 3, ("sigmoid", "tanh"), 1),
    "LSTM": (_lstm_step, 4, ("sigmoid", "tanh", "tanh"), 2),
    "RNN": (_rnn_step, 1, ("tanh",), 1),
}


@kernel("GRU", "LSTM", "RNN")
def _recurrent(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    *more: Tensor | None,
) -> tuple[Tensor, ...]:
    """``Y, Y_h`` and, of an LSTM, ``Y_c``; ``more`` are initial states and peepholes."""
    step, gates, names, states = _LAYERS[call.operator]
    batch_first = bool(call.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    directions, size = w.shape[0], r.shape[2]
    bias = x.new_zeros(directions, 2 * gates * size) if bias is None else bias
    given = [*more, None, None, None]
    first = [x.new_zeros(directions, x.shape[1], size) if s is None else s for s in given[:states]]
    if batch_first:
        first = [s if given[k] is None else s.transpose(0, 1) for k, s in enumerate(first)]
    peep = x.new_zeros(directions, 3 * size) if given[2] is None else given[2]
    acts = _activations(call, names, directions)
    outputs, finals = [], []
    for d in range(directions):
        wb, rb = bias[d].chunk(2)
        cell = _Cell(call, acts[d], w[d], r[d], wb, rb, peep[d].chunk(3))
        backward = call.get("direction", "forward") == "reverse" or d == 1
        y, final = _rolled_out(cell, step, x, tuple(s[d] for s in first), lengths, backward)
        outputs.append(y)
        finals.append(final)
    y = torch.stack(outputs, 1)
    last = [torch.stack([final[k] for final in finals]) for k in range(states)]
    if batch_first:
        return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in last)
    return y, *last


def _rolled_out(
    cell: _Cell, step: Step, x: Tensor, state: State, lengths: Tensor | None, backward: bool
) -> tuple[Tensor, State]:
    """Outputs at every step, 0 behind the end of a sequence, and the state at its end."""
    order = range(x.shape[0] - 1, -1, -1) if backward else range(x.shape[0])
    made: dict[int, Tensor] = {}
    for t in order:
        new = step(cell, x[t], state)
        if lengths is not None:
            inside = (lengths > t).unsqueeze(1)
            made[t] = torch.where(inside, new[0], 0)
            new = tuple(torch.where(inside, a, b) for a, b in zip(new, state, strict=True))
        else:
            made[t] = new[0]
        state = new
    return torch.stack([made[t] for t in range(x.shape[0])]), state
