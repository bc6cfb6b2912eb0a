"""Files that went wrong: seeded mutations of models, plans and tables, and what onnx-mdp makes of them.

``python tests/mutations.py FOLDER SEED FIRST LAST`` works through some cases in one process and writes a line
before and one after each, so that whoever started it knows which case crashed or hung it.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import external_data_helper, helper, numpy_helper
from zoo import random_plan, text_model

from onnx_mdp.analysis.structure import Structure
from onnx_mdp.errors import MdpError
from onnx_mdp.importance.scoring import score
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import load_model
from onnx_mdp.pipeline import analyze, apply_plan
from onnx_mdp.plan import check_plan, load_plan, plan_json
from onnx_mdp.planning.formulation import formulate, to_ns
from onnx_mdp.planning.solution_plan import plan_from_solution
from onnx_mdp.solvers import solve
from onnx_mdp.surgery.verification import verify
from onnx_mdp.tables.calibrating import Calibration
from onnx_mdp.tables.cost_terms import cost_terms
from onnx_mdp.tables.granularity import unit_choices
from onnx_mdp.tables.latency import LatencyTable, table_key
from onnx_mdp.tables.table_file import load_table, table_json

__all__ = ["SECONDS", "work"]

SECONDS = 60  # within which one case ends on a loaded machine
_GIGABYTES = 8  # of address space, for a case

Files = dict[str, bytes]

CONVOLUTIONS = """
(float[1,3,8,8] x) => (float[1,5] y)
<float[8,3,3,3] w0, float[8] b0, float[8,8,3,3] w1, float[8,1,3,3] w2, float[16,8,1,1] w3, float[5,16] w4>
{
  a = Conv <pads: ints = [1,1,1,1]> (x, w0, b0)
  b = Relu (a)
  c = Conv <pads: ints = [1,1,1,1]> (b, w1)
  d = Add (b, c)
  e = Conv <group: int = 8, pads: ints = [1,1,1,1]> (d, w2)
  f = Conv <strides: ints = [2,2]> (e, w3)
  g = Clip (f)
  h = GlobalAveragePool (g)
  i = Flatten (h)
  y = Gemm <transB: int = 1> (i, w4)
}
"""
ATTENTION = """
(float[N,4,12] x) => (float[N,4,12] y)
<float[12] s, float[12] t, float[12,12] wq, float[12,12] wk, float[12,12] wv, float[12,12] wo,
 float[12,20] w1, float[20] b1, float[20,12] w2,
 int64[4] heads = {0,4,3,4}, int64[3] merged = {0,4,12}, float scale = {0.5}>
{
  n = LayerNormalization (x, s, t)
  q0 = MatMul (n, wq)
  q1 = Reshape (q0, heads)
  q = Transpose <perm: ints = [0,2,1,3]> (q1)
  k0 = MatMul (n, wk)
  k1 = Reshape (k0, heads)
  k = Transpose <perm: ints = [0,2,3,1]> (k1)
  v0 = MatMul (n, wv)
  v1 = Reshape (v0, heads)
  v = Transpose <perm: ints = [0,2,1,3]> (v1)
  p0 = MatMul (q, k)
  p1 = Mul (p0, scale)
  p = Softmax <axis: int = -1> (p1)
  o0 = MatMul (p, v)
  o1 = Transpose <perm: ints = [0,2,1,3]> (o0)
  o2 = Reshape (o1, merged)
  o = MatMul (o2, wo)
  r = Add (x, o)
  m0 = MatMul (r, w1)
  m1 = Add (m0, b1)
  m2 = Relu (m1)
  m = MatMul (m2, w2)
  y = Add (r, m)
}
"""
SHAPES = """
(float[N,3,H,W] x) => (float[N,12,h,w] y)
<float[8,3,1,1] w0, float[12,8,1,1] w1, int64[1] first = {0}, int64[1] four = {4}, int64[1] minus = {-1}>
{
  one = Constant <value: tensor = int64[1] {1}> ()
  end = Constant <value: tensor = int64[1] {8}> ()
  two = Constant <value: tensor = int64[1] {2}> ()
  pads = Constant <value: tensor = int64[8] {0,0,1,1,0,0,1,1}> ()
  a = Conv (x, w0)
  l = Slice (a, first, four, one)
  r = Slice (a, four, end, one)
  b = Concat <axis: int = 1> (r, l)
  s0 = Shape (b)
  n = Gather <axis: int = 0> (s0, first)
  s = Concat <axis: int = 0> (n, two, four, minus)
  c = Reshape (b, s)
  d = Transpose <perm: ints = [0,2,1,3]> (c)
  e = Reshape (d, s0)
  f = Conv (e, w1)
  y = Pad <mode = "reflect"> (f, pads)
}
"""


def _with_subgraphs_and_functions() -> onnx.ModelProto:
    model = text_model(CONVOLUTIONS, domains={"": 17, "local": 1})

    def branch(name: str, op_type: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(name, 1, None)
        return helper.make_graph([helper.make_node(op_type, ["y0"], [name])], name, [], [output])

    model.graph.node[-1].output[0] = "y0"
    branches = {"then_branch": branch("yes", "Relu"), "else_branch": branch("no", "Neg")}
    model.graph.node.append(helper.make_node("If", ["sure"], ["z"], **branches))
    model.graph.node.append(helper.make_node("twice", ["z"], ["y"], domain="local"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "sure"))
    nodes = [helper.make_node("Add", ["a", "a"], ["m"]), helper.make_node("Relu", ["m"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "twice", ["a"], ["b"], nodes, opsets))
    return model


def _outside() -> Files:
    model, data = text_model(CONVOLUTIONS), b""
    for tensor in model.graph.initializer:
        raw = tensor.raw_data or numpy_helper.to_array(tensor).tobytes()
        external_data_helper.set_external_data(tensor, "weights.bin", offset=len(data), length=len(raw))
        for field in ("raw_data", "float_data"):
            tensor.ClearField(field)
        data += raw
    return {"model.onnx": model.SerializeToString(), "weights.bin": data}


@functools.cache
def bases() -> tuple[Files, ...]:
    """The sound files that are mutated: the model, and what lies beside it."""
    models = [
        text_model(CONVOLUTIONS),
        text_model(ATTENTION),
        text_model(SHAPES),
        _with_subgraphs_and_functions(),
    ]
    return (*({"model.onnx": model.SerializeToString()} for model in models), _outside())


SYMBOLIC = {"x": (1, 3, 8, 8)}


# -- mutations ----------------------------------------------------------------------------------------------


def mutated_bytes(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Truncate, flip bits, cut out, repeat, or splice in a part of another file."""
    kind = rng.integers(6)
    size = max(1, len(data))
    at, length = int(rng.integers(size)), int(rng.integers(1, 1 + min(size, 200)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        edited = bytearray(data)
        for place in rng.integers(size, size=rng.integers(1, 9)):
            edited[place] ^= 1 << int(rng.integers(8))
        return bytes(edited)
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * int(rng.integers(2, 20)) + data[at + length :]
    if kind == 4:
        start = int(rng.integers(len(other)))
        return data[:at] + other[start : start + length] + data[at + length * int(rng.integers(2)) :]
    return data[:at] + rng.bytes(length) + data[at + length :]


_INTEGERS = (-1, 0, 1, 2, 3, 7, -(2**31), 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))
_STRINGS = ["", "x", "y", "a", "w0", "N", "../../etc/passwd", "/dev/zero", "\x1b]0;hi\x07", "com.microsoft"]
_STRINGS += "Relu MatMul Concat Reshape Loop If Softmax Transpose Split Gather NoSuchOperator".split()


def _sites(message: Message) -> Iterator[tuple[Message, Any]]:
    for descriptor, held in message.ListFields():
        yield message, descriptor
        if descriptor.message_type is not None:
            for inner in [held] if isinstance(held, Message) else held:
                yield from _sites(inner)


def mutated_fields(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Change some fields of a model to what is legal protobuf and nonsense."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(int(rng.integers(1, 4))):
        sites = list(_sites(model))
        if not sites:
            break
        message, descriptor = sites[int(rng.integers(len(sites)))]
        with suppress(ValueError):  # the field cannot hold that
            _change(message, descriptor, rng)
    return model.SerializeToString()


def _change(message: Message, descriptor: Any, rng: np.random.Generator) -> None:
    held = getattr(message, descriptor.name)
    if hasattr(held, "append") or hasattr(held, "add"):
        _change_list(held, descriptor, rng)
    elif descriptor.message_type is not None or rng.random() < 0.2:
        message.ClearField(descriptor.name)
    else:
        setattr(message, descriptor.name, _other_value(held, rng))


def _change_list(held: Any, descriptor: Any, rng: np.random.Generator) -> None:
    at, kind = int(rng.integers(len(held))), rng.integers(4)
    if kind == 0:
        del held[at]
    elif kind == 1:
        held.extend([held[at]] * int(rng.integers(1, 4)))
    elif kind == 2 or descriptor.message_type is not None:
        last = int(rng.integers(len(held)))
        items = list(held)
        items[at], items[last] = items[last], items[at]
        copies = [type(i).FromString(i.SerializeToString()) if isinstance(i, Message) else i for i in items]
        del held[:]
        held.extend(copies)
    else:
        held[at] = _other_value(held[at], rng)


def _other_value(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, str):
        return _STRINGS[int(rng.integers(len(_STRINGS)))]
    if isinstance(value, bytes):
        return mutated_bytes(value, b"NOTSET SAME_UPPER reflect", rng)
    if isinstance(value, float):
        return float(rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf")]))
    number = _INTEGERS[int(rng.integers(len(_INTEGERS)))]
    return number if rng.random() < 0.7 else int(value) + int(rng.integers(-2, 3))


def mutated_json(text: str, rng: np.random.Generator) -> bytes:
    """Damage a JSON document: its bytes, or some of its values."""
    if rng.random() < 0.3:
        return mutated_bytes(text.encode(), b'{"a": [1e999, NaN, null, -1]}', rng)
    document = json.loads(text)
    for _ in range(int(rng.integers(1, 4))):
        holder, key = document, next(iter(document), None)
        while isinstance(holder, (dict, list)) and holder:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            key = keys[int(rng.integers(len(keys)))]
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
                break
            holder = inner
        choices = (
            None,
            -1,
            0,
            2**70,
            1e308,
            float("nan"),
            "",
            "0-3",
            "9" * 50,
            "0-16777215",
            [],
            {},
            [[]],
            True,
        )
        if rng.random() < 0.2 and holder:
            del holder[key]
        elif holder:
            holder[key] = choices[int(rng.integers(len(choices)))]
    return json.dumps(document).encode()


# -- what is done with them ---------------------------------------------------------------------------------


def made_up_table(structure: Structure) -> LatencyTable:
    """Every layer takes a time in proportion to what it reads and makes."""
    terms = cost_terms(structure)
    return LatencyTable(
        context={"device": "made up"},
        key=table_key(structure),
        granularity=2,
        terms=terms,
        coefficients={term.key: (0.01, 0.002, 0.003, 0.004, 0.0, 0.0) for term in terms},
        calibration=Calibration(1.0, 0.05, 1.0, 0.01, 0.02, 0.0),
        choices={i: unit_choices(structure.dimensions[i], 2, 8) for i in structure.prunable},
        measured=0,
        seconds=0.0,
    )


def prune_by_table(structure: Structure, table: LatencyTable, folder: Path) -> Any:
    """Solve for most of the latency; return the plan, read back from its file."""
    importance = score(structure, "magnitude")
    formulation = formulate(structure, importance, table)
    solution = solve(formulation.problem, to_ns(0.8 * table.base_ms))
    if solution.choice is None:
        return None
    plan = plan_from_solution(structure, formulation, importance, table, solution, seed=0, command="")
    (folder / "made.json").write_text(plan_json(plan))
    return load_plan(folder / "made.json")


def exercise(folder: Path, rng: np.random.Generator) -> str:
    """All that is done with a model: load, analyze, solve, apply, write, and verify what was written."""
    model = load_model(folder / "model.onnx")
    names = [str(v.name) for v in model.graph.inputs]
    shapes = {"x": (1, 4, 12) if _rank(model) == 3 else (1, 3, 8, 8)} if "x" in names and _open(model) else {}
    structure = analyze(model, shapes)
    if not structure.prunable and not structure.blocks:
        return "frozen"
    prune_by_table(structure, made_up_table(structure), folder)
    plan = random_plan(structure, rng)
    pruned, _ = apply_plan(model, structure, plan)
    save_model(pruned, folder / "slim.onnx", overwrite=True)
    assert verify(model, structure, load_model(folder / "slim.onnx"), plan).verified
    return "pruned"


def _first(model: Any) -> Any:
    return next(v for v in model.graph.inputs if v.name == "x").shape


def _rank(model: Any) -> int:
    return 0 if _first(model) is None else len(_first(model))


def _open(model: Any) -> bool:
    return _first(model) is None or any(not isinstance(d, int) for d in _first(model))


@functools.cache
def sound() -> tuple[Any, Structure, str, str]:
    """A model, its structure, and the text of a plan and a table for it."""
    model = load_model(text_model(CONVOLUTIONS))
    structure = analyze(model, {})
    plan = random_plan(structure, np.random.default_rng(5))
    return model, structure, plan_json(plan), table_json(structure, made_up_table(structure))


def model_case(folder: Path, rng: np.random.Generator) -> str:
    """Damage a model or its external data."""
    files = bases()
    chosen = dict(files[int(rng.integers(len(files)))])
    other = files[int(rng.integers(len(files)))]["model.onnx"]
    name = sorted(chosen)[int(rng.integers(len(chosen)))]
    mutate: Callable[..., bytes] = (
        mutated_bytes if rng.random() < 0.35 or name != "model.onnx" else mutated_fields
    )
    chosen[name] = mutate(chosen[name], other, rng)
    for path in folder.iterdir():
        path.unlink()
    for name, data in chosen.items():
        (folder / name).write_bytes(data)
    return exercise(folder, rng)


def plan_case(folder: Path, rng: np.random.Generator) -> str:
    """Damage a plan."""
    model, structure, text, _ = sound()
    (folder / "plan.json").write_bytes(mutated_json(text, rng))
    plan = load_plan(folder / "plan.json")
    check_plan(plan, structure)
    apply_plan(model, structure, plan)
    return "pruned"


def table_case(folder: Path, rng: np.random.Generator) -> str:
    """Damage a table."""
    _, structure, _, text = sound()
    (folder / "table.json").write_bytes(mutated_json(text, rng))
    plan = prune_by_table(structure, load_table(folder / "table.json", structure), folder)
    return "infeasible" if plan is None else "solved"


def work(folder: Path, seed: int, first: int, last: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Go through cases; each depends on its number alone."""
    for number in range(first, last):
        rng = np.random.default_rng([seed, number])
        kind = ("model", "plan", "table")[int(rng.choice(3, p=(0.8, 0.1, 0.1)))]
        report({"case": number, "kind": kind})
        signal.alarm(SECONDS)
        try:
            case = {"model": model_case, "plan": plan_case, "table": table_case}[kind]
            outcome = case(folder, rng)
        except MdpError as error:
            outcome = f"refused: {type(error).__name__}: {error}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"FAILED: {type(error).__name__} in {last.filename}:{last.lineno}: {error}"
        signal.alarm(0)
        report({"case": number, "kind": kind, "outcome": outcome[:500]})


def _main(folder: str, *numbers: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_GIGABYTES << 30,) * 2)
    seed, first, last = map(int, numbers)
    work(Path(folder), seed, first, last, lambda line: print(json.dumps(line), flush=True))


if __name__ == "__main__":
    _main(*sys.argv[1:])
