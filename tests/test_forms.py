"""Operators in the forms that old and new opsets give them, one small file each: the law, and what can go.

A number before a case is its opset; then the units of each prunable dimension in graph order.
"""

# ruff: noqa: E501 - ONNX text is clearer in long lines than cut in the middle of a node
from __future__ import annotations

import numpy as np
import pytest
from zoo import analyse, informative, prune_checked, random_plan, text_model

Form = tuple[int, tuple[int, ...], str]


def between(body: str, channels: int = 8, size: str = "6,6", batch: str = "1", weights: str = "") -> str:
    """``body`` makes ``u`` of ``channels`` channels out of ``t``, which has 8; convolutions stand around it."""
    return f"""(float[{batch},3,6,6] x) => (float[{batch},4,{size}] y) <
            float[8,3,1,1] a, float[8] b, float[4,{channels},1,1] c{weights and ", "}{weights}> {{
        t = Conv(x, a, b)
        {body}
        y = Conv(u, c)
    }}"""


def dense(body: str, features: int, weights: str = "") -> str:
    """``body`` makes the matrix ``u`` of ``features`` columns out of ``t``, which has 8 channels."""
    return f"""(float[1,3,7,7] x) => (float[1,4] y) <
            float[8,3,1,1] a, float[8] b, float[4,{features}] c, float[4] d{weights and ", "}{weights}> {{
        t = Conv(x, a, b)
        {body}
        y = Gemm<transB=1>(u, c, d)
    }}"""


FORMS: dict[str, Form] = {
    "Squeeze without axes, Unsqueeze by attribute": (
        9,
        (8,),
        dense("p = GlobalAveragePool(t)\nq = Squeeze(p)\nz= Unsqueeze<axes=[0]>(q)\nu=Relu(z)", 8),
    ),
    "Squeeze without axes, Unsqueeze by input": (
        13,
        (8,),
        dense(
            "p = GlobalAveragePool(t)\nq = Squeeze(p)\nz= Unsqueeze(q,o)\nu=Relu(z)",
            8,
            weights="int64[1] o={0}",
        ),
    ),
    "Slice by attributes, from the end": (
        9,
        (4, 4),
        between("u = Slice<starts=[-6], ends=[-2], axes=[1]>(t)", channels=4),
    ),
    "Slice by attributes without axes": (
        9,
        (4, 4),
        between("u = Slice<starts=[0,2], ends=[1,6]>(t)", channels=4),
    ),
    "Slice without axes": (
        13,
        (4, 4),
        between("u = Slice(t,s,e)", channels=4, weights="int64[2] s={0,2}, int64[2] e={1,6}"),
    ),
    "Upsample by attribute": (8, (8,), between("u = Upsample<scales=[1.0,1.0,2.0,2.0]>(t)", size="12,12")),
    "Upsample by input": (
        9,
        (8,),
        between("u = Upsample(t,s)", size="12,12", weights="float[4] s={1.0,1.0,2.0,2.0}"),
    ),
    "Resize of opset 10": (
        10,
        (8,),
        between("u = Resize(t,s)", size="12,12", weights="float[4] s={1.0,1.0,2.0,2.0}"),
    ),
    "Resize with an empty roi": (
        11,
        (8,),
        between("u = Resize(t,r,s)", size="12,12", weights="float[4] s={1.0,1.0,2.0,2.0}, float[0] r={}"),
    ),
    "Resize with empty scales": (
        11,
        (8,),
        between(
            "u = Resize(t,r,s,z)",
            size="12,12",
            weights="float[0] s={}, float[0] r={}, int64[4] z={1,8,12,12}",
        ),
    ),
    "Resize by sizes": (
        13,
        (8,),
        between("u = Resize(t,,,z)", size="12,12", weights="int64[4] z={1,8,12,12}"),
    ),
    "Resize by sizes of two axes": (
        18,
        (8,),
        between("u = Resize<axes=[2,3]>(t,,,z)", size="12,12", weights="int64[2] z={12,12}"),
    ),
    "Resize by sizes, channels among them": (
        18,
        (8,),
        between("u = Resize<axes=[1,2,3]>(t,,,z)", size="12,12", weights="int64[3] z={8,12,12}"),
    ),
    "Resize that keeps the aspect": (
        18,
        (8,),
        between(
            'u = Resize<axes=[2,3], keep_aspect_ratio_policy="not_larger">(t,,,z)',
            size="12,12",
            weights="int64[2] z={12,18}",
        ),
    ),
    "Resize that keeps the aspect of channels": (
        18,
        (8,),
        between(
            'u = Resize<keep_aspect_ratio_policy="not_smaller", axes=[1,2,3]>(t,,,z)',
            weights="int64[3] z={8,6,6}",
        ),
    ),
    "Resize of a crop": (
        13,
        (8,),
        between(
            'u = Resize<coordinate_transformation_mode="tf_crop_and_resize">(t,r,,z)',
            size="12,12",
            weights="int64[4] z={1,8,12,12}, float[8] r={0.0,0.0,0.1,0.1,1.0,1.0,0.9,0.9}",
        ),
    ),
    "Resize of a crop of two axes": (
        19,
        (8,),
        between(
            'u = Resize<coordinate_transformation_mode="tf_crop_and_resize", axes=[2,3]>(t,r,,z)',
            size="12,12",
            weights="int64[2] z={12,12}, float[4] r={0.1,0.1,0.9,0.9}",
        ),
    ),
    "Resize of a crop of channels": (
        13,
        (),
        between(
            'u = Resize<coordinate_transformation_mode="tf_crop_and_resize">(t,r,,z)',
            size="12,12",
            weights="int64[4] z={1,8,12,12}, float[8] r={0.0,0.2,0.1,0.1,1.0,0.8,0.9,0.9}",
        ),
    ),
    "BatchNormalization with five outputs": (
        8,
        (8,),
        between(
            "u,m1,v1,m2,v2 = BatchNormalization(t,g,h,m,var)",
            weights="float[8] g,float[8] h,float[8] m,float[8] var",
        ),
    ),
    "BatchNormalization in training": (
        14,
        (8,),
        between(
            "u,m1,v1 = BatchNormalization<training_mode=1>(t,g,h,m,var)",
            weights="float[8] g,float[8] h,float[8] m,float[8] var",
        ),
    ),
    "BatchNormalization whose mean is read": (
        14,
        (),
        between(
            "s,m1,v1 = BatchNormalization<training_mode=1>(t,g,h,m,var)\nz=Unsqueeze(m1,o)\nu=Add(s,z)",
            weights="float[8] g,float[8] h,float[8] m,float[8] var, int64[2] o={1,2}",
        ),
    ),
    "BatchNormalization, spatial": (
        8,
        (8,),
        between(
            "u = BatchNormalization<spatial=1>(t,g,h,m,var)",
            weights="float[8] g,float[8] h,float[8] m,float[8] var",
        ),
    ),
    "Dropout with a ratio": (9, (8,), between("u = Dropout<ratio=0.3>(t)")),
    "Dropout whose mask is read": (13, (8,), between("s,m = Dropout(t)\nf=Cast<to=1>(m)\nu=Mul(s,f)")),
    "Dropout in training at ratio 0": (
        13,
        (8,),
        between("u = Dropout(t,r,z)", weights="float r={0.0}, bool z={1}"),
    ),
    "Clip by attributes": (9, (8,), between("u = Clip<min=0.0,max=6.0>(t)")),
    "Clip without a minimum": (11, (8,), between("u = Clip(t,,m)", weights="float m={0.5}")),
    "Pad by attribute": (
        9,
        (8, 3),
        between(
            "p = Pad<pads=[0,1,0,0,0,2,0,0]>(t)\nv=Conv(t,e)\nu=Add(p,v)",
            channels=11,
            weights="float[11,8,1,1] e",
        ),
    ),
    "Pad of named axes": (
        18,
        (8, 3),
        between(
            "p = Pad(t,p0,,ax)\nv=Conv(t,e)\nu=Add(p,v)",
            channels=11,
            weights="float[11,8,1,1] e, int64[2] p0={1,2}, int64[1] ax={1}",
        ),
    ),
    "Pad by reflection": (
        13,
        (8,),
        between('u = Pad<mode="reflect">(t,p0)', size="8,8", weights="int64[8] p0={0,0,1,1,0,0,1,1}"),
    ),
    "Pad by wrapping named axes": (
        19,
        (8,),
        between(
            'u = Pad<mode="wrap">(t,p0,,ax)', size="8,8", weights="int64[4] p0={1,1,1,1}, int64[2] ax={-1,2}"
        ),
    ),
    "Softmax that flattens a matrix": (
        11,
        (),
        dense("p=GlobalAveragePool(t)\nf=Flatten(p)\nu=Softmax(f)", 8),
    ),
    "Softmax that flattens at axis 3": (11, (8,), between("u=Softmax<axis=3>(t)")),
    "Softmax that flattens at axis 2": (11, (8,), between("u=Softmax<axis=2>(t)")),
    "Softmax that flattens at axis -1": (11, (8,), between("u=Softmax<axis=-1>(t)")),
    "Softmax that flattens at axis 0": (11, (), between("u=Softmax<axis=0>(t)")),
    "LogSoftmax over channels, opset 9": (9, (), between("u=LogSoftmax<axis=1>(t)")),
    "LogSoftmax over channels, opset 11": (11, (), between("u=LogSoftmax<axis=1>(t)")),
    "LogSoftmax over channels, opset 13": (13, (), between("u=LogSoftmax<axis=1>(t)")),
    "ReduceSum over no axes": (13, (8,), between("u=ReduceSum<noop_with_empty_axes=1>(t)")),
    "ReduceMean over an empty list": (
        18,
        (8,),
        between("u=ReduceMean<noop_with_empty_axes=1>(t,e)", weights="int64[0] e={}"),
    ),
    "ReduceMean over all axes by an empty list": (
        18,
        (8,),
        between("m=ReduceMean(t,e)\nu=Mul(t,m)", weights="int64[0] e={}"),
    ),
    "ReduceMax over all axes": (9, (8,), between("m=ReduceMax(t)\nu=Mul(t,m)")),
    "ReduceMean over a negative axis": (11, (8,), between("m=ReduceMean<axes=[-3]>(t)\nu=Mul(t,m)")),
    "Flatten at axis 0": (13, (8,), dense("p=GlobalAveragePool(t)\nu=Flatten<axis=0>(p)", 8)),
    "Flatten at a negative axis": (13, (8,), dense("p=GlobalAveragePool(t)\nu=Flatten<axis=-3>(p)", 8)),
    "Flatten at the last axis": (
        13,
        (8,),
        dense("p=GlobalAveragePool(t)\nq=Flatten<axis=4>(p)\nu=Reshape(q,s)", 8, weights="int64[2] s={1,-1}"),
    ),
    "Gemm with a bias of one": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\ng=Gemm(f,e,k)\nu=Sigmoid(g)",
            6,
            weights="float[8,6] e, float[1] k",
        ),
    ),
    "Gemm with a scalar bias": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\ng=Gemm(f,e,k)\nu=Sigmoid(g)",
            6,
            weights="float[8,6] e, float k={0.5}",
        ),
    ),
    "Gemm with a bias row": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\ng=Gemm(f,e,k)\nu=Sigmoid(g)",
            6,
            weights="float[8,6] e, float[1,6] k",
        ),
    ),
    "Gemm with a bias column": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\ng=Gemm(f,e,k)\nu=Sigmoid(g)",
            6,
            weights="float[8,6] e, float[1,1] k",
        ),
    ),
    "Gemm of a transposed input": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\nft=Transpose(f)\ng=Gemm<transA=1>(ft,e)\nu=Sigmoid(g)",
            6,
            weights="float[8,6] e",
        ),
    ),
    "Gemm with the weight on the left": (
        13,
        (8, 6),
        dense(
            "p=GlobalAveragePool(t)\nf=Flatten(p)\ng=Gemm<transB=1>(e,f)\nh=Transpose(g)\nu=Sigmoid(h)",
            6,
            weights="float[6,8] e",
        ),
    ),
    "Gemm of one input by itself": (
        13,
        (),
        dense("p=GlobalAveragePool(t)\nf=Flatten(p)\nft=Transpose(f)\nk=Gemm<transA=1>(f,f)\nu=Gemm(f,k)", 8),
    ),
    "ConvTranspose to a shape": (
        13,
        (8, 6),
        between(
            "v=ConvTranspose<strides=[2,2],output_shape=[11,11]>(t,e)\nu=Relu(v)",
            channels=6,
            size="11,11",
            weights="float[8,6,3,3] e",
        ),
    ),
    "ConvTranspose, padded on one side": (
        13,
        (8, 6),
        between(
            "v=ConvTranspose<strides=[2,2],output_padding=[1,0],pads=[1,1,0,0]>(t,e)\nu=Relu(v)",
            channels=6,
            size="13,12",
            weights="float[8,6,3,3] e",
        ),
    ),
    "ConvTranspose, padded to the same": (
        13,
        (8, 6),
        between(
            'v=ConvTranspose<strides=[2,2],auto_pad="SAME_LOWER">(t,e)\nu=Relu(v)',
            channels=6,
            size="12,12",
            weights="float[8,6,3,3] e",
        ),
    ),
    "ConvTranspose of groups": (
        13,
        (4, 3),
        between(
            "v=ConvTranspose<strides=[2,2],group=2>(t,e)\nu=Relu(v)",
            channels=6,
            size="12,12",
            weights="float[8,3,2,2] e",
        ),
    ),
    "Conv, padded to the same": (
        13,
        (8, 6),
        between(
            'v=Conv<strides=[2,2],auto_pad="SAME_UPPER">(t,e)\nu=Relu(v)',
            channels=6,
            size="3,3",
            weights="float[6,8,3,3] e",
        ),
    ),
    "Conv, not padded": (
        13,
        (8, 6),
        between(
            'v=Conv<auto_pad="VALID">(t,e)\nu=Relu(v)', channels=6, size="4,4", weights="float[6,8,3,3] e"
        ),
    ),
    "Conv, padded on one side": (
        13,
        (8, 6),
        between(
            "v=Conv<pads=[0,1,2,1], dilations=[2,1]>(t,e)\nu=Relu(v)", channels=6, weights="float[6,8,2,3] e"
        ),
    ),
    "Split into uneven parts": (
        18,
        (3, 3, 2),
        between("p,q,r = Split<axis=1,num_outputs=3>(t)\nz=Relu(r)\nu=Concat<axis=1>(z,p,q)"),
    ),
    "Split without sizes": (11, (4,), between("p,q = Split<axis=1>(t)\nz=Relu(p)\nu=Add(z,q)", channels=4)),
    "Split at a negative axis": (
        13,
        (4,),
        between("p,q = Split<axis=-3>(t)\nz=Relu(p)\nu=Add(z,q)", channels=4),
    ),
    "Split with a part that nobody reads": (
        13,
        (5, 3),
        between("p,q = Split<axis=1>(t,s)\nu=Relu(p)", channels=5, weights="int64[2] s={5,3}"),
    ),
    "MaxPool with indices that nobody reads": (
        13,
        (8,),
        between("u,i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(t)", size="3,3"),
    ),
    "MaxPool and MaxUnpool": (
        13,
        (),
        between(
            "p,i = MaxPool<kernel_shape=[2,2],strides=[2,2]>(t)\nu=MaxUnpool<kernel_shape=[2,2],strides=[2,2]>(p,i)"
        ),
    ),
    "PRelu of slopes [8,1,1]": (9, (8,), between("u=PRelu(t,s)", weights="float[8,1,1] s")),
    "PRelu of one slope": (9, (8,), between("u=PRelu(t,s)", weights="float[1] s")),
    "PRelu of slopes [1,8,1,1]": (16, (8,), between("u=PRelu(t,s)", weights="float[1,8,1,1] s")),
    "a comparison before Where": (
        8,
        (8,),
        between("z=Greater(t,k)\nf=Cast<to=1>(z)\nu=Mul(t,f)", weights="float k={0.0}"),
    ),
    "ReduceMean before Where": (7, (8,), between("m=ReduceMean<axes=[1]>(t)\ns=Sigmoid(m)\nu=Mul(t,s)")),
    "ReduceMax before Where": (8, (8,), between("m=ReduceMax<axes=[1]>(t)\ns=Sigmoid(m)\nu=Mul(t,s)")),
    "group norm before Where": (
        8,
        (2, 8),
        dense(
            "r=Reshape(t,s)\ni=InstanceNormalization(r,g,h)\nq=Reshape(i,z)\np=GlobalAveragePool(q)\nu=Flatten(p)",
            8,
            weights="float[2] g, float[2] h, int64[3] s={0,2,-1}, int64[4] z={1,8,7,7}",
        ),
    ),
    "Reshape that copies and infers": (
        13,
        (8,),
        dense("r=Reshape(t,s)\nu=Reshape(r,z)", 392, weights="int64[3] s={0,0,-1}, int64[2] z={0,-1}"),
    ),
    "Reshape that infers channels": (
        13,
        (8,),
        between("r=Reshape(t,s)\nu=Relu(r)", weights="int64[4] s={1,-1,6,6}"),
    ),
    "Expand of fewer axes": (
        13,
        (8,),
        between("p=GlobalAveragePool(t)\nu=Expand(p,s)", weights="int64[3] s={8,6,6}"),
    ),
    "Expand by ones": (
        13,
        (8,),
        between("p=GlobalAveragePool(t)\nu=Expand(p,s)", weights="int64[4] s={1,1,6,6}"),
    ),
    "Tile of the batch": (
        13,
        (8,),
        between("q=Tile(t,r)\nu=ReduceMean<axes=[0]>(q)", weights="int64[4] r={2,1,1,1}"),
    ),
    "GRU without its first output": (
        13,
        (8,),
        dense(
            "h=Transpose<perm=[0,2,3,1]>(t)\nr=Reshape(h,s)\ng=Transpose<perm=[1,0,2]>(r)\n,k=GRU<hidden_size=5>(g,e,f)\nu=Squeeze(k,z)",
            5,
            weights="int64[3] s={1,49,8}, int64[1] z={0}, float[1,15,8] e, float[1,15,5] f",
        ),
    ),
    "a join with an empty tensor": (
        13,
        (8,),
        between("e0=Slice(t,z,z,o)\nu=Concat<axis=1>(t,e0)", weights="int64[1] z={0}, int64[1] o={1}"),
    ),
    "a sum of an empty tensor": (
        13,
        (8,),
        between(
            "e0=Slice(t,z,z,two)\nn=ReduceSum(e0,two)\nu=Add(t,n)", weights="int64[1] z={0}, int64[1] two={2}"
        ),
    ),
    "a product with a scalar": (13, (8,), between("m=ReduceMean<keepdims=0>(t)\ns=Sigmoid(m)\nu=Mul(t,s)")),
    "Where with a constant mask of positions": (
        13,
        (8,),
        between(
            "u=Where(m,t,n)",
            weights="bool[1,1,6,6] m={1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1,1,0,1}, float n={-1.0}",
        ),
    ),
    "HardSwish in four nodes": (
        13,
        (8,),
        between(
            "p=Add(t,three)\nq=Clip(p,zero,six)\nr=Mul(t,q)\nu=Div(r,six)",
            weights="float three={3.0}, float zero={0.0}, float six={6.0}",
        ),
    ),
    "HardSwish by a product": (
        13,
        (8,),
        between(
            "p=Add(t,three)\nq=Clip(p,zero,six)\nr=Mul(t,q)\nu=Mul(r,k)",
            weights="float[1] three={3.0}, float zero={0.0}, float six={6.0}, float[1] k={0.1666}",
        ),
    ),
    "NHWC with a Pad, between transposes": (
        13,
        (8, 6),
        between(
            "h0=Transpose<perm=[0,2,3,1]>(t)\np=Pad(h0,p0)\nh=Transpose<perm=[0,3,1,2]>(p)\nv=Conv(h,e)\nk=Transpose<perm=[0,2,3,1]>(v)\nl=Add(k,bias)\nm=Relu(l)\nu=Transpose<perm=[0,3,1,2]>(m)",
            channels=6,
            weights="int64[8] p0={0,1,1,0,0,1,1,0}, float[6,8,3,3] e, float[6] bias",
        ),
    ),
    "a symbolic batch, opset 13": (
        13,
        (8,),
        between(
            "s=Shape(t)\nn=Gather(s,z)\nn1=Unsqueeze(n,z1)\nc0=Concat<axis=0>(n1,rest)\nr=Reshape(t,c0)\nu=Reshape(r,back)",
            batch="N",
            weights="int64 z={0}, int64[1] z1={0}, int64[2] rest={8,36}, int64[4] back={-1,8,6,6}",
        ),
    ),
    "a symbolic batch, opset 7": (
        7,
        (8,),
        between(
            "s=Shape(t)\nn=Gather(s,z)\nn1=Unsqueeze<axes=[0]>(n)\nc0=Concat<axis=0>(n1,rest)\nr=Reshape(t,c0)\nu=Reshape(r,back)",
            batch="N",
            weights="int64 z={0}, int64[2] rest={8,36}, int64[4] back={-1,8,6,6}",
        ),
    ),
    "a symbolic batch, opset 9": (
        9,
        (8,),
        between(
            "s=Shape(t)\nn=Gather(s,z)\nn1=Unsqueeze<axes=[0]>(n)\nc0=Concat<axis=0>(n1,rest)\nr=Reshape(t,c0)\nu=Reshape(r,back)",
            batch="N",
            weights="int64 z={0}, int64[2] rest={8,36}, int64[4] back={-1,8,6,6}",
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_law_holds_in_every_form(name: str) -> None:
    opset, widths, text = FORMS[name]
    model, structure = analyse(text_model(text, opset))
    assert tuple(len(structure.dimensions[i].units) for i in structure.prunable) == widths
    rng = np.random.default_rng(0)
    for plan in [random_plan(structure, rng) for _ in range(2)]:
        pruned, evidence = prune_checked(model, structure, plan)
        assert evidence.worst <= 1e-5
    assert informative(pruned, structure)
    if "float[N," in text:  # what was symbolic stays so
        assert str(pruned.graph.inputs[0].shape) == str(model.graph.inputs[0].shape)
        assert str(pruned.graph.outputs[0].shape) == "[N,4,6,6]"
