"""Laws of files: a model from elsewhere is not trusted, and a reader never sees half a result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import external_data_helper, helper, numpy_helper
from zoo import CNNS, run, text_model, zoo_path

from onnx_mdp.errors import UnreadableModelError, UsageError
from onnx_mdp.large_models import save_model
from onnx_mdp.model_io import (
    content_hash,
    load_model,
    model_bytes,
    parameter_count,
    topology_hash,
)

IMAGE = {"x": np.random.default_rng(0).standard_normal((1, 3, 4, 4)).astype(np.float32)}


def small() -> onnx.ModelProto:
    return text_model(
        "(float[1,3,4,4] x) => (float[1,4,4,4] y) <float[4,3,1,1] w, float[4] b> { y = Conv(x, w, b) }"
    )


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(UnreadableModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# -- what is not a model ------------------------------------------------------------------------------------


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.onnx")
    assert "is a folder" in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is not a model\n",
        b"{}",
        b"\x89PNG\r\n\x1a\n" + bytes(64),
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        b"\xff" * 1000,
        onnx.ModelProto().SerializeToString(),
        onnx.ModelProto(ir_version=8).SerializeToString(),
        small().graph.SerializeToString(),
    ],
    ids=["empty", "text", "json", "png", "zip", "zeros", "ones", "empty model", "no graph", "a bare graph"],
)
def test_another_kind_of_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    refusal(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    data = small().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(share * len(data))])
    refusal(path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small().SerializeToString())
    path.chmod(0)
    assert "cannot be read" in refusal(path)


# -- external data ------------------------------------------------------------------------------------------


def with_external_data(folder: Path, location: str, **keys: Any) -> Path:
    """A model whose weight lies in ``location``; the file itself is not written."""
    proto = small()
    tensor = proto.graph.initializer[0]
    external_data_helper.set_external_data(tensor, location, **keys)
    tensor.ClearField("raw_data")
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def weight_bytes() -> bytes:
    return numpy_helper.to_array(small().graph.initializer[0]).tobytes()


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(weight_bytes())
    path = with_external_data(tmp_path, "weights.bin")
    model = load_model(path)
    assert np.array_equal(run(ir.from_proto(small()), IMAGE)[0], run(model, IMAGE)[0])
    save_model(model, tmp_path / "one.onnx")
    (tmp_path / "weights.bin").unlink()
    assert content_hash(load_model(tmp_path / "one.onnx")) == content_hash(ir.from_proto(small()))


def test_external_data_in_a_folder_below_is_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(weight_bytes())
    assert parameter_count(load_model(with_external_data(tmp_path, "sub/weights.bin"))) == 16


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "sub/../weights.bin", "", "."])
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "secret.bin", folder / "weights.bin"):
        file.write_bytes(weight_bytes())
    assert "outside its own folder" in refusal(with_external_data(folder, location))


def test_an_absolute_path_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(weight_bytes())
    assert "outside its own folder" in refusal(with_external_data(tmp_path, str(target)))


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("inside", [True, False], ids=["link to a file", "link to a folder"])
def test_a_link_is_refused(inside: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "weights.bin").write_bytes(weight_bytes())
    if inside:
        (folder / "weights.bin").symlink_to(tmp_path / "secret" / "weights.bin")
    else:
        (folder / "sub").symlink_to(tmp_path / "secret")
    path = with_external_data(folder, "weights.bin" if inside else "sub/weights.bin")
    assert "outside its own folder" in refusal(path)


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    assert "needs the external data file 'weights.bin'" in refusal(
        with_external_data(tmp_path, "weights.bin")
    )


@pytest.mark.parametrize(
    "keys", [{}, {"offset": 0, "length": 48}, {"offset": 40}, {"offset": 10**9, "length": 48}]
)
def test_external_data_that_is_too_short(keys: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(weight_bytes()[:20])
    refusal(with_external_data(tmp_path, "weights.bin", **keys))


def test_external_data_in_an_attribute_and_in_a_subgraph_is_checked(tmp_path: Path) -> None:
    secret = numpy_helper.from_array(np.zeros(1, np.float32), "inner")
    external_data_helper.set_external_data(secret, "../secret.bin")
    secret.ClearField("raw_data")
    constant = helper.make_node("Constant", [], ["k"], value=secret)
    branch = helper.make_graph([constant], "branch", [], [helper.make_tensor_value_info("k", 1, [1])])
    condition = helper.make_tensor_value_info("z", onnx.TensorProto.BOOL, [])
    output = helper.make_tensor_value_info("y", 1, [1])
    chosen = helper.make_node("If", ["z"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([chosen], "outer", [condition], [output])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert "outside its own folder" in refusal(path)


# -- what may be given --------------------------------------------------------------------------------------


def test_every_form_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    proto = small()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    forms = [load_model(source) for source in (path, str(path), proto, ir.from_proto(proto))]
    assert len({content_hash(model) for model in forms}) == 1


def test_a_surgeon_graph_is_accepted() -> None:
    surgeon = pytest.importorskip("onnx_graphsurgeon")
    graph = surgeon.import_onnx(small())
    assert np.array_equal(run(load_model(graph), IMAGE)[0], run(small(), IMAGE)[0])


@pytest.mark.parametrize("source", [3, None, b"bytes", ["model.onnx"]])
def test_anything_else_is_refused(source: Any) -> None:
    with pytest.raises(UsageError, match=type(source).__name__):
        load_model(source)


def test_loading_a_model_object_copies_it() -> None:
    model = ir.from_proto(small())
    loaded = load_model(model)
    loaded.graph.inputs[0].name = "renamed"
    next(iter(loaded.graph)).name = "renamed"
    assert model.graph.inputs[0].name == "x"
    assert next(iter(model.graph)).name != "renamed"


# -- saving -------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    model = load_model(small())
    save_model(model, tmp_path / "out.onnx")
    assert content_hash(load_model(tmp_path / "out.onnx")) == content_hash(model)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


# -- hashes -------------------------------------------------------------------------------------------------


def changed(edit: Callable[[onnx.ModelProto], None]) -> ir.Model:
    proto = small()
    edit(proto)
    return load_model(proto)


def test_hashes_ignore_the_layout_of_the_file(tmp_path: Path) -> None:
    original = load_model(small())

    def reorder(proto: onnx.ModelProto) -> None:
        first = proto.graph.initializer.pop(0)
        proto.graph.initializer.append(first)

    def store_as_floats(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            helper.make_tensor("w", onnx.TensorProto.FLOAT, values.shape, values.ravel().tolist())
        )

    (tmp_path / "weights.bin").write_bytes(weight_bytes())
    external = load_model(with_external_data(tmp_path, "weights.bin"))
    for model in (changed(reorder), changed(store_as_floats), external):
        assert content_hash(model) == content_hash(original)
        assert topology_hash(model) == topology_hash(original)


def test_one_changed_weight_changes_the_content_only() -> None:
    original = load_model(small())

    def nudge(proto: onnx.ModelProto) -> None:
        values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
        values.flat[7] = np.nextafter(values.flat[7], np.float32(9))
        proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))

    assert content_hash(changed(nudge)) != content_hash(original)
    assert topology_hash(changed(nudge)) == topology_hash(original)


def test_another_graph_changes_both() -> None:
    original = load_model(small())

    def pad(proto: onnx.ModelProto) -> None:
        proto.graph.node[0].attribute.append(helper.make_attribute("dilations", [2, 2]))

    def opset(proto: onnx.ModelProto) -> None:
        proto.opset_import[0].version = 18

    for model in (changed(pad), changed(opset)):
        assert content_hash(model) != content_hash(original)
        assert topology_hash(model) != topology_hash(original)


def test_parameters_in_constant_nodes_count() -> None:
    text = """(float[1,3,4,4] x) => (float[1,4,4,4] y) <float[4,3,1,1] w, int64[4] s = {1, 4, 1, 1}> {
        k = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>()
        b = Reshape(k, s)
        c = Conv(x, w)
        y = Add(c, b)
    }"""
    assert parameter_count(load_model(text_model(text))) == 16


@pytest.mark.zoo
@pytest.mark.parametrize("name", CNNS)
def test_every_zoo_file_loads_and_keeps_its_hash_when_saved(name: str, tmp_path: Path) -> None:
    model = load_model(zoo_path(name))
    save_model(model, tmp_path / "copy.onnx")
    assert content_hash(load_model(tmp_path / "copy.onnx")) == content_hash(model)
    assert onnx.ModelProto.FromString(model_bytes(model)).graph.node
