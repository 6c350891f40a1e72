"""ONNX: every form of a constant against onnx's own reading of it, and hostile files."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hostile_onnx import LOST, OPSET, REFUSED, WEIGHT, calls, external, function, furnish, long_chain, model, relu
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from initaudit.errors import UnreadableModel
from initaudit.load import load, load_proto, spans
from initaudit.load.onnx_structure import check_expansion
from initaudit.load.onnx_tensors import DTYPES


def saved(made: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "swollen"])
def test_refused_with_one_line(name: str, tmp_path: Path) -> None:
    make, says = REFUSED[name]
    (tmp_path / "model.onnx").write_bytes(make())
    with pytest.raises(UnreadableModel, match=says) as caught:
        load(tmp_path / "model.onnx")
    assert str(caught.value).startswith(str(tmp_path))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", LOST)
def test_one_bad_tensor_does_not_end_the_audit(name: str, tmp_path: Path) -> None:
    make, says = LOST[name]
    folder = tmp_path / "model"
    folder.mkdir()
    furnish(folder)
    checkpoint = load(saved(model(tensors=[make()]), folder))
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA001", "bad")]
    assert says in checkpoint.problems[0].message
    assert "bad" not in checkpoint.arrays
    assert np.array_equal(checkpoint.arrays["w"].read(), WEIGHT)


def test_hostile_files_take_seconds_and_two_gigabytes(tmp_path: Path) -> None:
    """All refused files in one process of 2 GB: the largest of them would swell to more."""
    for name, (make, _) in REFUSED.items():
        (tmp_path / f"{name}.onnx").write_bytes(make())
    program = """
import sys, pathlib
from initaudit.load import load
from initaudit.errors import UnreadableModel
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    try:
        load(path)
    except UnreadableModel as error:
        print(path.stem, error, sep="\t")
        continue
    raise SystemExit(f"{path} was read")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )
    lines = dict(line.split("\t") for line in run.stdout.splitlines())
    assert lines.keys() == REFUSED.keys()
    assert REFUSED["swollen"][1] in lines["swollen"]


NUMPY_DTYPES = {code: np.dtype(getattr(ml_dtypes, name, name)) for code, name in DTYPES.items()}


@pytest.mark.parametrize("code", DTYPES, ids=lambda code: DTYPES[code])
@pytest.mark.parametrize("form", ["raw", "typed", "external"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 2)], ids=str)
def test_every_dtype_in_every_form_reads_as_onnx_reads_it(code: int, form: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    dtype = NUMPY_DTYPES[code]
    values = (np.arange(np.prod(shape, dtype=int)) % 2).astype(np.float32).astype(dtype).reshape(shape)
    tensor = numpy_helper.from_array(values, "t")
    expected = numpy_helper.to_array(tensor)
    if form == "typed":
        tensor = helper.make_tensor("t", code, list(shape), np.asarray(values).astype(complex).real.astype(float).flatten())
    if form == "external":
        (tmp_path / "data.bin").write_bytes(b"pad!" + tensor.raw_data)
        tensor = external("t", "data.bin", list(shape), offset="4", length=str(len(tensor.raw_data)))
        tensor.data_type = code
    checkpoint = load(saved(model(tensors=[tensor]), tmp_path))
    assert checkpoint.problems == ()
    array = checkpoint.arrays["t"]
    found = array.read()
    assert (array.dtype, array.shape) == (DTYPES[code], shape)
    assert (found.dtype, found.shape) == (dtype, shape)
    assert found.tobytes() == expected.astype(dtype).tobytes()


def test_external_data_is_mapped_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "SMALL", 0)  # what is small is read all the same
    (tmp_path / "data.bin").write_bytes(WEIGHT.tobytes())
    checkpoint = load(saved(model(tensors=[external("t", "data.bin", [3, 4])]), tmp_path))
    found = checkpoint.arrays["t"].read()
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert checkpoint.program.graph.initializer[1].data_location == TensorProto.EXTERNAL


def test_file_that_shrinks_after_loading_is_an_error_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(WEIGHT.tobytes())
    checkpoint = load(saved(model(tensors=[external("t", "data.bin", [3, 4])]), tmp_path))
    (tmp_path / "data.bin").write_bytes(b"")
    with pytest.raises(UnreadableModel, match="shorter"):
        checkpoint.arrays["t"].read()


def constant(output: str, **value: object) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], **value)


def test_constant_nodes_of_every_form() -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", TensorProto.FLOAT, [2], [5.0, 6.0]),
        helper.make_tensor("i", TensorProto.INT64, [2], [1, 5]),
        [2, 3],
    )
    pairs = helper.make_sparse_tensor(
        helper.make_tensor("v", TensorProto.FLOAT, [2], [5.0, 6.0]),
        helper.make_tensor("i", TensorProto.INT64, [2, 2], [0, 1, 1, 2]),
        [2, 3],
    )
    nodes = [
        constant("a", value=numpy_helper.from_array(WEIGHT)),
        constant("b", value_float=1.5),
        constant("c", value_floats=[1.0, 2.0]),
        constant("d", value_int=7),
        constant("e", value_ints=[1, 2, 3]),
        constant("f", sparse_value=sparse),
        constant("g", value_string="text"),
        constant("h", sparse_value=pairs),
        relu("x", "y"),
    ]
    checkpoint = load_proto(model(nodes))
    assert checkpoint.problems == ()
    read = {name: array.read().tolist() for name, array in checkpoint.arrays.items()}
    dense = [[0, 5, 0], [0, 0, 6]]
    expected = {
        "w": WEIGHT.tolist(),
        "a": WEIGHT.tolist(),
        "b": 1.5,
        "c": [1, 2],
        "d": 7,
        "e": [1, 2, 3],
        "f": dense,
        "h": dense,
    }
    assert read == expected


@pytest.mark.parametrize(("indices", "dims"), [([1, 6], [2, 3]), ([-1, 2], [2, 3]), ([0, 1], [2**20, 2**20])])
def test_hostile_sparse_tensors(indices: list[int], dims: list[int]) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [2], [5.0, 6.0])
    sparse = helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [2], indices), dims)
    checkpoint = load_proto(model([constant("f", sparse_value=sparse), relu("x", "y")]))
    if "f" in checkpoint.arrays:
        with pytest.raises(UnreadableModel, match="outside"):
            checkpoint.arrays["f"].read()
    else:
        assert [problem.code for problem in checkpoint.problems] == ["IA001"]


def test_names_of_subgraphs_and_functions_do_not_clash() -> None:
    def branch(name: str, value: float) -> onnx.GraphProto:
        tensor = numpy_helper.from_array(np.full((1,), value, np.float32), "w")
        output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("Add", ["x", "w"], ["z"])], name, [], [output], [tensor])

    condition = constant("c", value=numpy_helper.from_array(np.array(True)))
    node = helper.make_node("If", ["c"], ["t"], then_branch=branch("a", 1), else_branch=branch("b", 2))
    body = function("block", [constant("k", value_float=3.0), helper.make_node("Add", ["a", "k"], ["b"])])
    call = helper.make_node("block", ["t"], ["y"], domain="f")
    made = model([condition, node, call], functions=[body], opsets=[*OPSET, helper.make_opsetid("f", 1)])
    arrays = load_proto(made).arrays
    assert list(arrays) == ["w", "c", "If_1.else_branch/w", "If_1.then_branch/w", "f::block/k"]
    assert [float(arrays[name].read().reshape(-1)[0]) for name in list(arrays)[2:]] == [2, 1, 3]


def test_a_name_that_stands_alone_in_a_subgraph_is_kept() -> None:
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "inner")
    output = helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Add", ["x", "inner"], ["z"])], "a", [], [output], [tensor])
    empty = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [output])
    condition = constant("c", value=numpy_helper.from_array(np.array(True)))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=empty)
    assert list(load_proto(model([condition, node])).arrays) == ["w", "c", "inner"]


def test_large_weights_stay_in_the_file(tmp_path: Path) -> None:
    """Judge: onnx.load, which copies them, and onnx's own reading of the external data that they become."""
    rng = np.random.default_rng(0)
    large = [numpy_helper.from_array(rng.standard_normal((200, 100 + i)).astype(np.float32), f"l{i}") for i in range(3)]
    small = numpy_helper.from_array(np.ones(3, np.float32), "small")
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [20000], np.arange(20000.0))
    path = saved(model(tensors=[large[0], small, large[1], typed, large[2]]), tmp_path)
    checkpoint = load(path)
    assert checkpoint.problems == ()
    assert [tensor.ByteSize() < 1000 for tensor in checkpoint.program.graph.initializer] == [
        True,
        True,
        True,
        True,
        False,
        True,
    ]
    assert isinstance(checkpoint.arrays["l1"].read(), np.memmap)
    onnx.load_external_data_for_model(checkpoint.program, str(tmp_path))
    for judge, filled in zip(onnx.load(path).graph.initializer, checkpoint.program.graph.initializer, strict=True):
        expected = numpy_helper.to_array(judge)
        assert np.array_equal(checkpoint.arrays[judge.name].read(), expected)
        assert np.array_equal(numpy_helper.to_array(filled), expected)


def test_large_weight_of_the_wrong_size_is_lost_alone(tmp_path: Path) -> None:
    bad = numpy_helper.from_array(np.ones((200, 100), np.float32), "bad")
    bad.dims[0] = 300
    checkpoint = load(saved(model(tensors=[bad]), tmp_path))
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA001", "bad")]


def test_node_against_its_schema_is_a_problem_of_the_node() -> None:
    checkpoint = load_proto(model([helper.make_node("MatMul", ["x"], ["y"], name="lonely")]))
    assert [(problem.code, problem.tensor) for problem in checkpoint.problems] == [("IA002", "lonely")]


def test_unknown_operators_and_domains_are_left_to_the_graph() -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["a"]), helper.make_node("Other", ["a"], ["y"], domain="com.example")]
    assert load_proto(model(nodes)).problems == ()


def test_newer_opset_within_the_margin_is_noted() -> None:
    newest = onnx.defs.onnx_opset_version()
    checkpoint = load_proto(model(opsets=[helper.make_opsetid("", newest + 1)]))
    assert "newer" in checkpoint.notes[0]


def test_external_data_of_a_model_in_memory(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(bytes(16))
    made = model(tensors=[external("t", "data.bin")])
    assert "give the path" in load_proto(made).problems[0].message
    assert load_proto(made, tmp_path).arrays["t"].read().tolist() == [0, 0, 0, 0]


def test_a_long_chain_of_functions_is_no_recursion(tmp_path: Path) -> None:
    assert check_expansion(long_chain(3000), "x") == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=7))
def test_expansion_counts_what_inlining_would_make(times: list[int]) -> None:
    functions = [function(f"f{i}", calls(f"f{i + 1}", n)) for i, n in enumerate(times)]
    functions.append(function(f"f{len(times)}", [relu("a", "b")]))
    made = model([helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions)
    assert check_expansion(made, "x") == np.prod(times)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_bytes_end_in_one_kind_of_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    content = bytearray(model(tensors=[numpy_helper.from_array(WEIGHT, "v")]).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        checkpoint = load(path)
    except UnreadableModel:
        return
    for array in checkpoint.arrays.values():
        assert array.read().shape == array.shape
