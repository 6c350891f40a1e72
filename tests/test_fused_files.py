"""Files that onnxruntime's optimisers wrote: the same numbers, and the weights, fans and findings of the file before.

Judges: onnxruntime running the same file; the audit of the file before.
"""

from __future__ import annotations

import collections
import functools
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from torch import nn
from zoo import EXPORTERS, UNet, cnn, quiet, without_noise

import initaudit
from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load, load_proto
from initaudit.onnx_ops.backend import Backend
from initaudit.pair.pair import pair

CPU = ["CPUExecutionProvider"]
MICROSOFT = "com.microsoft"


@pytest.fixture(scope="module", autouse=True)
def _silence():
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    yield
    onnxruntime.set_default_logger_severity(2)
    logging.disable(before)


class Bert(nn.Module):
    """The reading end of BERT with its attention written out, as the optimiser wants to find it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        config = BertConfig(**size, vocab_size=200, max_position_embeddings=32, attn_implementation="eager")
        self.inner = BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]


def sentences() -> tuple[torch.Tensor, ...]:
    return torch.randint(0, 200, (2, 12)), torch.ones(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)


NETWORKS = {
    "bert": (Bert, sentences),
    "unet": (UNet, lambda: (torch.randn(2, 3, 16, 16),)),
    "cnn": (cnn, lambda: (torch.randn(2, 3, 16, 16),)),
}


@functools.cache
def plain(name: str) -> tuple[bytes, tuple[torch.Tensor, ...], initaudit.auditing.run.Audit]:
    make, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        x = inputs()
        model = EXPORTERS["legacy"](without_noise(make()), x)
    return model.SerializeToString(), x, initaudit.audit(model)


def session_of(model: Path | bytes, level: str = "ORT_DISABLE_ALL", save: Path | None = None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    if save is not None:
        options.optimized_model_filepath = str(save)
    return onnxruntime.InferenceSession(model, options, providers=CPU)


def by_runtime(level: str):
    def optimise(source: bytes, target: Path) -> None:
        session_of(source, level, target)

    return optimise


def by_script(multi_head: bool):
    def optimise(source: bytes, target: Path) -> None:
        options = FusionOptions("bert")
        options.use_multi_head_attention = multi_head
        (target.parent / "plain.onnx").write_bytes(source)
        settings = {"model_type": "bert", "num_heads": 4, "hidden_size": 64, "opt_level": 0}
        made = optimizer.optimize_model(str(target.parent / "plain.onnx"), optimization_options=options, **settings)
        made.save_model_to_file(str(target))

    return optimise


WAYS = {
    "basic": by_runtime("ORT_ENABLE_BASIC"),
    "extended": by_runtime("ORT_ENABLE_EXTENDED"),
    "attention": by_script(False),
    "multi-head": by_script(True),
}
CASES = [
    ("bert", "basic", {"LayerNormalization"}),
    ("bert", "extended", {"FusedMatMul", "SkipLayerNormalization", "Gelu"}),
    ("bert", "attention", {"Attention", "SkipLayerNormalization", "BiasGelu"}),
    ("bert", "multi-head", {"MultiHeadAttention", "SkipLayerNormalization", "BiasGelu"}),
    ("unet", "extended", {"QuickGelu"}),
    ("cnn", "basic", set()),
    ("cnn", "extended", {"FusedConv"}),
]


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, object]:
    checkpoint = load_proto(model)
    built = from_onnx(checkpoint.program, checkpoint.arrays)
    graph = specialise(built, tuple(torch.from_numpy(feed[i.name]) for i in built.inputs))
    with torch.no_grad():
        return Executor(graph).run(*graph.examples)[0].numpy(), graph


def feed_for(session, x: tuple[torch.Tensor, ...]) -> dict[str, np.ndarray]:
    return {
        i.name: v.numpy().astype(np.int32) if "int32" in i.type else v.numpy()
        for i, v in zip(session.get_inputs(), x, strict=True)
    }


def matrices(audit) -> dict[tuple[int, int, str], int]:
    """Every projection by its fans; one that holds queries, keys and values counts as three."""
    found: dict[tuple[int, int, str], int] = collections.Counter()
    for layer in audit.layers:
        if layer.role == "embedding":
            continue
        packed = layer.operator == "attention"
        names = "" if packed else "+".join(sorted({a.name for a in layer.activations}))
        found[layer.fan_in, layer.fan_out, names if names != "linear" else ""] += 3 if packed else 1
    return found


@pytest.mark.parametrize(("name", "way", "operators"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_an_optimised_file_is_audited_like_the_one_before(name, way, operators, tmp_path):
    source, x, before = plain(name)
    path = tmp_path / "optimised.onnx"
    with quiet():
        WAYS[way](source, path)
    model = onnx.load(path)
    assert operators <= {n.op_type for n in model.graph.node}
    session = session_of(path)
    feed = feed_for(session, x)
    (expected, *_) = session.run(None, feed)
    (first, *_) = Backend.run_model(model, [feed[i.name] for i in model.graph.input])
    second, graph = run(model, feed)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5 * scale)
    assert graph.notes == ()
    after = initaudit.audit(path)
    assert (after.verdict, after.report.phase) == (before.verdict, before.report.phase)
    assert sorted((f.code, f.severity) for f in after.findings) == sorted((f.code, f.severity) for f in before.findings)
    assert matrices(after) == matrices(before)


def test_a_decoder_layer_of_fused_operators():
    """What no exporter here writes, put together by hand: shared key heads, turned positions, RMS norms with a skip."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    place = np.arange(9)[:, None] / 10.0 ** np.linspace(0, 2, 8)
    tensors = {
        "table": normal(50, 64), "g": np.ones(64, np.float32), "q.w": normal(64, 64), "k.w": normal(64, 32),
        "v.w": normal(64, 32), "o.w": normal(64, 64), "g2": np.ones(64, np.float32), "up.w": normal(64, 96),
        "gate.w": normal(64, 96), "down.w": normal(96, 64), "head.w": normal(64, 50),
        "cos": np.cos(place).astype(np.float32), "sin": np.sin(place).astype(np.float32),
        "lengths": np.array([4, 4], np.int32), "total": np.array(5, np.int32), "start": np.zeros(1, np.int64),
    }  # fmt: skip
    heads = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 0}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("SimplifiedLayerNormalization", ["x", "g"], ["n"], epsilon=1e-5),
        helper.make_node("MatMul", ["n", "q.w"], ["q"]),
        helper.make_node("MatMul", ["n", "k.w"], ["k"]),
        helper.make_node("MatMul", ["n", "v.w"], ["v"]),
        helper.make_node("RotaryEmbedding", ["q", "start", "cos", "sin"], ["qr"], domain=MICROSOFT, num_heads=4),
        helper.make_node("RotaryEmbedding", ["k", "start", "cos", "sin"], ["kr"], domain=MICROSOFT, num_heads=2),
        helper.make_node(
            "GroupQueryAttention", ["qr", "kr", "v", "", "", "lengths", "total"], ["a", "pk", "pv"], domain=MICROSOFT, **heads
        ),
        helper.make_node("MatMul", ["a", "o.w"], ["o"]),
        helper.make_node(
            "SkipSimplifiedLayerNormalization", ["o", "x", "g2"], ["m", "", "", "s"], domain=MICROSOFT, epsilon=1e-5
        ),
        helper.make_node("FusedMatMul", ["m", "gate.w"], ["gate"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("QuickGelu", ["gate"], ["act"], domain=MICROSOFT, alpha=1.0),
        helper.make_node("MatMul", ["m", "up.w"], ["up"]),
        helper.make_node("Mul", ["act", "up"], ["h"]),
        helper.make_node("MatMul", ["h", "down.w"], ["d"]),
        helper.make_node("Add", ["d", "s"], ["r"]),
        helper.make_node("FastGelu", ["r"], ["f"], domain=MICROSOFT),
        helper.make_node("MatMul", ["f", "head.w"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info("ids", 7, [2, 5])], [helper.make_tensor_value_info("y", 1, None)]
    held = [numpy_helper.from_array(v, k) for k, v in tensors.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", *ends, held), opset_imports=opsets, ir_version=8)
    ids = rng.integers(0, 50, (2, 5))
    (expected,) = session_of(model.SerializeToString()).run(None, {"ids": ids})
    found, graph = run(model, {"ids": ids})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    fans = {p.tensor: (p.fan_in, p.fan_out, p.feeds[0].activation.name) for p in pair(graph) if p.role != "embedding"}
    assert fans.pop("gate.w") == (64, 96, "silu")
    assert fans.pop("up.w")[:2] == (64, 96)
    assert fans.pop("down.w") == (96, 64, "gelu")
    assert {name: f[:2] for name, f in fans.items()} == {
        "q.w": (64, 64), "k.w": (64, 32), "v.w": (64, 32), "o.w": (64, 64), "head.w": (64, 50),
    }  # fmt: skip
    audit = initaudit.audit(model)
    assert audit.verdict == "pass"
    assert audit.risk
    assert not any(f.code == "IA002" for f in audit.findings)


def test_embeddings_with_their_norm(tmp_path):
    """The table of words, positions and segments behind one operator."""
    rng = np.random.default_rng(0)
    shapes = {"word": (50, 64), "place": (9, 64), "kind": (2, 64)}
    tensors = {k: (0.02 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
    tensors |= {"g": np.ones(64, np.float32), "b": np.zeros(64, np.float32), "w": rng.normal(size=(64, 5)).astype(np.float32)}
    nodes = [
        helper.make_node("EmbedLayerNormalization", ["ids", "kinds", *shapes, "g", "b"], ["x", ""], domain=MICROSOFT),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(n, 6, [2, 5]) for n in ("ids", "kinds")]
    held = [numpy_helper.from_array(v, k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    feed = {"ids": rng.integers(0, 50, (2, 5)).astype(np.int32), "kinds": np.zeros((2, 5), np.int32)}
    (expected,) = session_of(model.SerializeToString()).run(None, feed)
    found, made = run(model, feed)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    tables = {p.tensor: "".join(p.axes) for p in pair(made) if p.role == "embedding"}
    assert tables == dict.fromkeys(shapes, "vd")


def test_a_layout_of_one_machine_is_not_known(tmp_path):
    """The highest level re-blocks kernels for this processor: said, and the rest audited."""
    source, _, before = plain("cnn")
    path = tmp_path / "blocked.onnx"
    session_of(source, "ORT_ENABLE_ALL", path)
    model = onnx.load(path)
    if not any(n.domain == "com.microsoft.nchwc" for n in model.graph.node):
        pytest.skip("onnxruntime has no blocked layout for this processor")
    assert load(path).problems == ()
    audit = initaudit.audit(path)
    assert (audit.verdict, before.verdict) == ("pass", "pass")
    unknown = [f for f in audit.findings if f.code == "IA002"]
    assert unknown
    assert all("nchwc" in f.message and f.severity == "info" for f in unknown)
