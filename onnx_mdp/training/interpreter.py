"""An ONNX graph as a torch module: its own nodes in order, with weights by their names in the file.

*Sorting*: stored tensors become parameters, buffers or constants (``training.trainable``). *Compiling*: each
node becomes a step, its kernel and the names that it reads and makes. *Running*: the steps fill a table of
tensors, out of which each is dropped after its last reader, so that memory without gradients is that of the
widest cut through the graph. Sizes are read from the tensors: whatever the file leaves symbolic stays so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnx_mdp.errors import UnsupportedModelError, UsageError
from onnx_mdp.training.fixed_sizes import FixedSizes, Sizes, fix_sizes, sizes_of
from onnx_mdp.training.kernels import KERNELS, Call, Kernel
from onnx_mdp.training.program import Step, compiled, stored_tensor
from onnx_mdp.training.trainable import operator_key, sort_stored

__all__ = ["OnnxModule"]

_CONTROL = frozenset({"If"})
_QUANTIZED = frozenset(
    (
        "ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QuantizeLinear QLinearConv "
        "QLinearMatMul"
    ).split()
)


class OnnxModule(nn.Module):
    """A model as a module; ``bridge.to_torch`` makes it.

    Weights are parameters and the statistics of BatchNormalization are buffers; `weights` and `statistics`
    give them by their names in the file, `state_dict` by these names with ``.`` and ``%`` escaped. In
    training mode BatchNormalization and Dropout behave as in torch. Call it with the inputs in the order of
    ``input_names``, or use `run` for inputs and outputs by name.
    """

    def __init__(self, model: ir.Model) -> None:
        """Compile a model in float32 whose local functions are inlined.

        Raises:
            UnsupportedModelError: an operator has no kernel, or the model is quantized.
        """
        super().__init__()
        _refuse_missing(model)
        graph, stored = model.graph, sort_stored(model)
        self._weights = {name: f"weight:{_escaped(name)}" for name in stored.weights}
        self._statistics = {name: f"statistic:{_escaped(name)}" for name in stored.statistics}
        for name, key in self._weights.items():
            self.register_parameter(key, nn.Parameter(stored_tensor(stored.weights[name])))
        for name, key in self._statistics.items():
            self.register_buffer(key, stored_tensor(stored.statistics[name]))
        self._tables: dict[str, str] = {}  # constants that move with the module
        self._numbers: dict[str, Tensor] = {}  # constants that stay on the CPU
        numbers = _read_as_numbers(graph)
        for name, array in stored.constants.items():
            self._add_constant(name, stored_tensor(array), moves=name not in numbers)
        self._fixed: dict[Sizes, FixedSizes] = {}
        self._placed: dict[tuple[str, torch.device], Tensor] = {}
        initial = set(graph.initializers)
        self.input_names = tuple(str(v.name) for v in graph.inputs if v.name not in initial)
        self.output_names = tuple(str(v.name) for v in graph.outputs)
        self._program = compiled(graph, model.opset_imports, frozenset(stored.statistics), main=True)
        made = (name for step in self._program.steps for name in step.outputs)
        self._made = frozenset((*self.input_names, *made)) - {""}

    def _add_constant(self, name: str, tensor: Tensor, *, moves: bool) -> None:
        if moves and tensor.is_floating_point() and tensor.numel() > 1:
            self._tables[name] = f"constant:{_escaped(name)}"
            self.register_buffer(self._tables[name], tensor, persistent=False)
        else:
            self._numbers[name] = tensor

    def weights(self) -> dict[str, nn.Parameter]:
        """The trainable tensors by their names in the file."""
        return {name: self._parameter(key) for name, key in self._weights.items()}

    def _parameter(self, key: str) -> nn.Parameter:
        parameter = self._parameters[key]
        assert parameter is not None
        return parameter

    def statistics(self) -> dict[str, Tensor]:
        """The running means and variances by their names in the file."""
        return {name: self.get_buffer(key) for name, key in self._statistics.items()}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The output of the model, or a tuple where it has several."""
        if len(inputs) != len(self.input_names):
            raise UsageError(
                f"the model takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), "
                f"not {len(inputs)}"
            )
        found = self.run(dict(zip(self.input_names, inputs, strict=True)))
        results = tuple(found[name] for name in self.output_names)
        return results[0] if len(results) == 1 else results

    def run(
        self,
        feeds: Mapping[str, Tensor],
        gates: Mapping[str, Tensor] | None = None,
        also: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """The outputs by name, and the inner tensors named in ``also``.

        Each tensor that ``gates`` names is multiplied by its gate where it is made, before anything reads it.

        Raises:
            UsageError: an input is missing, or no tensor has the name of a gate or of ``also``.
        """
        gates = gates or {}
        self._check(feeds, gates, also)
        values: dict[str, Any] = self._stored()
        for name in self.input_names:
            values[name] = feeds[name] * gates[name] if name in gates else feeds[name]
        wanted = (*self.output_names, *also)
        steps = self._program.steps
        fixed = self._fixed.get(sizes_of(feeds)) if self._fixed else None
        if fixed is not None:
            values.update(fixed.values)
            steps = fixed.steps
        self._run(steps, values, gates, frozenset(wanted))
        return {name: values[name] for name in wanted}

    def fix_sizes(self, feeds: Mapping[str, Tensor]) -> None:
        """Do what depends on the sizes of these inputs once, so that `torch.compile` can trace all the rest.

        Inputs of other sizes are run as before.

        Raises:
            UsageError: an input is missing.
        """
        self._check(feeds, {}, ())

        def run(step: Step, values: dict[str, Any]) -> None:
            self._run((step,), values, {}, frozenset())

        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                values = {**self._stored(), **feeds}
                self._fixed[sizes_of(feeds)] = fix_sizes(self._program, values, self._numbers, run)
        finally:
            self.train(training)

    def _check(self, feeds: Mapping[str, Tensor], gates: Mapping[str, Tensor], also: Sequence[str]) -> None:
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise UsageError(f"the input {missing[0]!r} of the model is not fed")
        unknown = [name for name in (*gates, *also) if name not in self._made]
        if unknown:
            raise UsageError(f"no input or node of the model makes a tensor {unknown[0]!r}")

    def _stored(self) -> dict[str, Any]:
        values: dict[str, Any] = dict(self._numbers)
        values.update((name, self._parameters[key]) for name, key in self._weights.items())
        for names in (self._statistics, self._tables):
            values.update((name, self._buffers[key]) for name, key in names.items())
        return values

    def _run(
        self,
        steps: Sequence[Step],
        values: dict[str, Any],
        gates: Mapping[str, Tensor],
        kept: frozenset[str],
    ) -> None:
        for step in steps:
            call = step.calls[self.training]
            if step.kernel is None:
                results: Any = self._branch(call, step, values)
            else:
                results = _computed(call, step.kernel, self._operands(step, step.kernel, values))
            if not isinstance(results, (tuple, list)):
                results = (results,)
            for name, result in zip(step.outputs, results, strict=False):
                if name:
                    values[name] = result * gates[name] if name in gates else result
            for name in step.last:
                if name not in kept:
                    values.pop(name, None)  # an output that its kernel need not compute

    def _branch(self, call: Call, step: Step, values: Mapping[str, Any]) -> tuple[Any, ...]:
        taken = call.get("then_branch" if bool(values[step.inputs[0]]) else "else_branch")
        inner = {**values, **taken.constants}
        self._run(taken.steps, inner, {}, frozenset(taken.outputs))
        return tuple(inner[name] for name in taken.outputs)

    def _operands(self, step: Step, kernel: Kernel, values: Mapping[str, Any]) -> list[Any]:
        """What a step reads, all on one device but for what its kernel reads as numbers."""
        operands = [values[name] if name else None for name in step.inputs]
        places = [
            operand.device
            for slot, operand in enumerate(operands)
            if isinstance(operand, Tensor) and slot not in kernel.host and operand.device.type != "cpu"
        ]
        if not places:
            return operands
        return [
            self._on(places[0], name, operand)
            if isinstance(operand, Tensor) and slot not in kernel.host and operand.device != places[0]
            else operand
            for slot, (name, operand) in enumerate(zip(step.inputs, operands, strict=True))
        ]

    def _on(self, device: torch.device, name: str, operand: Tensor) -> Tensor:
        if name not in self._numbers:
            return operand.to(device)
        if (name, device) not in self._placed:
            self._placed[name, device] = operand.to(device)
        return self._placed[name, device]


def _computed(call: Call, kernel: Kernel, operands: Sequence[Any]) -> Any:
    try:
        return kernel.compute(call, *operands)
    except NotImplementedError as error:  # of torch, for integers without sign and the like
        kinds = ", ".join(str(x.dtype).removeprefix("torch.") for x in operands if isinstance(x, Tensor))
        raise call.unsupported(f"operands of types ({kinds})") from error


def _escaped(name: str) -> str:
    """A name without dots, which torch reads as levels of a state."""
    return name.replace("%", "%25").replace(".", "%2E")


def _read_as_numbers(graph: ir.Graph) -> set[str]:
    """Names of tensors that kernels read as numbers only, such as the scales of a Resize."""
    found, elsewhere = set[str](), set[str]()
    for node in graph.all_nodes():
        kernel = KERNELS.get(operator_key(node))
        host = kernel.host if kernel else frozenset[int]()
        for slot, value in enumerate(node.inputs):
            if value is not None:
                (found if slot in host else elsewhere).add(str(value.name))
    return found - elsewhere


def _refuse_missing(model: ir.Model) -> None:
    missing: dict[str, ir.Node] = {}
    for node in model.graph.all_nodes():
        key = operator_key(node)
        if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear"):
            raise UnsupportedModelError(
                f"the model is quantized ({node.op_type} {node.name or node.outputs[0].name!r}): fine-tune "
                "the float model, and quantize it again"
            )
        if key not in KERNELS and key not in _CONTROL and key != "Constant":
            missing.setdefault(key, node)
    if missing:
        node = next(iter(missing.values()))
        others = f" (nor have {', '.join(list(missing)[1:])})" if len(missing) > 1 else ""
        raise UnsupportedModelError(
            f"{next(iter(missing))} {node.name or node.outputs[0].name!r} has no form in torch here{others}: "
            "the model can be pruned but not fine-tuned"
        )
