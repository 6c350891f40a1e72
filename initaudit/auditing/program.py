"""A checkpoint with a program: its graph, its inputs, its probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from initaudit.auditing.given import arguments_of, given_inputs
from initaudit.auditing.layers import layer_evidence, norm_parameters
from initaudit.auditing.probing import Probed, believed, probed, skipped
from initaudit.auditing.recognition import in_company, with_recognition
from initaudit.config import Config
from initaudit.errors import InitauditError, LimitExceeded, UnreadableModel, UsageError
from initaudit.graph.calls import role_of
from initaudit.graph.execute import specialise
from initaudit.graph.from_exported import ReadProgram
from initaudit.graph.from_onnx import from_onnx
from initaudit.graph.from_torch import from_module
from initaudit.graph.graph import Graph, location_of, shape_of
from initaudit.graph.noise import drops_everything
from initaudit.graph.own_backward import own_backward
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.host import device_of
from initaudit.measure.moments import Moments
from initaudit.onnx_ops.budget import Budget, metered
from initaudit.pair.pair import pair
from initaudit.pair.records import Pair
from initaudit.probe.graph_inputs import for_graph
from initaudit.probe.inputs import InputSpec, for_module, load_data, match_data, parse_spec
from initaudit.probe.variation import varied
from initaudit.rules.evidence import Evidence

BATCH = 8  # examples of a probe: enough to compare them with each other, few enough to be done in a second or two
# Values beyond which a forward and backward pass on one core takes minutes.
PROBED = 500_000_000
# A stranger's graph may spend this much; an honest model's probe needs a small part of it: eight images of 512 x 512 with 64
# channels are 2^27 numbers, half a gigabyte. An endless loop is let run for as long as a patient reader waits.
LARGEST, ALL_OUTPUTS = 2**27, 2**31  # elements
LOOPS, TRIPS = 5.0, 20_000  # seconds, and trips through all loops together


@dataclass(frozen=True)
class Program:
    """A model as a graph with the inputs it is probed with; `no_probe` says why there are none.

    `synthetic` inputs were made up; `varied` names those that were given, held no variation and were varied."""

    checkpoint: Checkpoint
    config: Config
    graph: Graph
    inputs: tuple[torch.Tensor, ...] | None
    no_probe: str
    progress: Callable[[str], None]
    synthetic: bool = False
    varied: tuple[str, ...] = ()

    @property
    def budget(self) -> Budget:
        """What running the graph may cost."""
        return budget_of(self.checkpoint)

    def evidence(self, tensors: Mapping[str, Moments]) -> Evidence:
        """Pairs, probes and joins."""
        self.progress("pairing weights with activations")
        with metered(self.budget):
            pairs: tuple[Pair, ...] = pair(self.graph, say=self.progress)
        seen = self._probe()
        layers = layer_evidence(self.graph, pairs, self.checkpoint, tensors, seen.trace)
        layers = with_recognition(layers, self.checkpoint.arrays, self.graph, self.progress)
        phase, layers = in_company(layers, self.checkpoint.arrays, tensors, norm_parameters(self.graph), self.config)
        return Evidence(
            checkpoint=self.checkpoint,
            config=self.config,
            phase=phase,
            layers=layers,
            tensors=tensors,
            graph=self.graph,
            trace=seen.trace,
            risk=seen.risk,
            no_probe=seen.no_probe,
            prediction=seen.prediction,
            risk_spread=seen.spread,
            synthetic=self.synthetic,
            varied=self.varied,
        )

    def _probe(self) -> Probed:
        if not self.config.probe:
            return Probed(no_probe="--no-probe was given")
        if self.inputs is None or self.no_probe:
            return skipped(self.graph, self.no_probe, self.budget)
        if why := _too_large(self.checkpoint, self.config):
            return skipped(self.graph, why, self.budget)
        self.progress("probing")
        device = _device(self.config.device, self.checkpoint)
        seen = probed(
            self.graph, self.inputs, self.config, self.budget, device=device, synthetic=self.synthetic, say=self.progress
        )
        return believed(seen, self.graph.own)


def _too_large(checkpoint: Checkpoint, config: Config) -> str:
    """Why a model is not run unasked; "" where it is."""
    values = sum(a.size for a in {a.storage or a.name: a for a in checkpoint.arrays.values()}.values())
    asked = "probe" in config.origin
    return f"{values:,} values would take minutes to probe (ask for it with --probe)" if values > PROBED and not asked else ""


def budget_of(checkpoint: Checkpoint) -> Budget:
    """The budget for a checkpoint's graph: whoever brings large weights may make values as large, twice over."""
    largest = max((a.size for a in checkpoint.arrays.values()), default=0)
    return Budget(elements=max(LARGEST, 2 * largest), total_elements=2**38, trips=TRIPS, seconds=600.0, loop_seconds=LOOPS)


def _device(name: str, checkpoint: Checkpoint) -> str | None:
    """The device to probe on, None for the host; raises UsageError for one that this machine does not have."""
    if name == "auto":
        return None if checkpoint.resident is None else device_of(checkpoint.resident)
    if name == "cpu":
        return None if checkpoint.resident is None else name
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"--device {name}", found, "auto, cpu, or a device that this PyTorch can use") from error
    return name


def open_program(checkpoint: Checkpoint, config: Config, inputs: Any, progress: Callable[[str], None]) -> Program:
    """The program of a checkpoint, traced or read; raises UnreadableModel where a module cannot be run on any input."""
    if isinstance(checkpoint.program, nn.Module):
        try:
            return _module(checkpoint, checkpoint.program, config, inputs, progress)
        except UnreadableModel:
            if checkpoint.resident is None:
                raise
            # Its forward may name the device that it was written for.
            return _module(checkpoint, checkpoint.resident, config, inputs, progress)
    return _onnx(checkpoint, config, inputs, progress)


def _module(checkpoint: Checkpoint, module: nn.Module, config: Config, inputs: Any, progress: Callable[[str], None]) -> Program:
    keywords: Mapping[str, Any] = {}
    batch = config.probe_batch if config.probe_batch is not None else BATCH
    inputs = given_inputs(module, config, inputs)
    synthetic = inputs is None
    if inputs is None:
        progress("finding inputs")
        shapes = {name: parse_spec(name, text) for name, text in config.inputs.items()}
        said = checkpoint.metadata.get("inputs", {})  # what the file itself says
        shapes = {**{name: InputSpec(*spec) for name, spec in said.items()}, **shapes}
        inputs, keywords = for_module(module, shapes=shapes, batch=batch, seed=config.seed, say=progress)
    else:
        inputs, keywords = arguments_of(inputs)
    progress("tracing")
    home = device_of(module) or "cpu"
    inputs, keywords = pytree.tree_map_only(torch.Tensor, lambda t: t.to(home), (tuple(inputs), dict(keywords)))
    runs = config.probe and not _too_large(checkpoint, config) and not isinstance(module, ReadProgram)
    graph = from_module(module, inputs, keywords, say=progress)
    if runs:  # a program that was read has no code but its operators
        own = own_backward(module, inputs, keywords)
        # Asked last: what forward keeps in caches of its own during such a call, no later trace can use.
        if drops_everything(module, inputs, keywords):
            graph = from_module(module, inputs, keywords, say=progress, dropping=True)
        graph = replace(graph, own=own)
    budget = budget_of(checkpoint)
    reason = _swells(graph, budget.elements, ALL_OUTPUTS) if isinstance(module, ReadProgram) else ""
    if reason and _swells(graph, budget.shape_elements):
        raise LimitExceeded(checkpoint.source, f"running it would take more than any network needs ({reason})")
    return _with_variation(Program(checkpoint, config, graph, graph.examples, reason, progress, synthetic))


def _with_variation(program: Program) -> Program:
    """With inputs that were given and hold no variation varied: what a probe says of the network is then not their doing."""
    if program.synthetic or program.inputs is None or program.no_probe:
        return program
    inputs, names = varied(program.graph, program.inputs, program.config.seed)
    return replace(program, inputs=inputs, varied=names, synthetic=bool(names))


def _onnx(checkpoint: Checkpoint, config: Config, inputs: Any, progress: Callable[[str], None]) -> Program:
    progress("building the graph")
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    with metered(budget_of(checkpoint)):
        try:
            given = _inputs(graph, config, inputs)
        except UsageError:
            raise
        except InitauditError as error:
            return Program(checkpoint, config, graph, None, str(error), progress)
        graph = specialise(graph, given)
    budget = budget_of(checkpoint)
    if (refused := graph.refused or _swells(graph, budget.shape_elements)) and config.probe:
        raise LimitExceeded(checkpoint.source, f"running it would take more than any network needs ({refused})")
    reason = _integers(graph) or _swells(graph, budget.elements, ALL_OUTPUTS)
    synthetic = inputs is None and config.data is None
    return _with_variation(Program(checkpoint, config, graph, given, reason, progress, synthetic))


def _swells(graph: Graph, most: int, together: float = math.inf) -> str:
    """Where a value has more than `most` elements, or all values have more than `together`, by their shapes; "" for nowhere."""
    total = 0
    for node in graph.fx.nodes:
        if node.op != "call_function" or node.meta.get("tainted"):
            continue
        size = math.prod(shape_of(node) or ())
        total += size
        if size > most or total > together:
            what = f"makes {size} numbers" if size > most else f"is where {total} numbers have been made"
            return f"{location_of(node).site or node.name} {what}, more than is run of a file unasked"
    return ""


def _integers(graph: Graph) -> str:
    """Why no gradient passes through products of integers, where the loader could not put them back in floating point."""
    names = ("matmul_integer", "conv_integer", "qlinear_conv", "qlinear_matmul")
    found = [n for n in graph.fx.nodes if n.op == "call_function" and role_of(n).name in names]
    if not found:
        return ""
    sites = ", ".join(dict.fromkeys(location_of(n).site or n.name for n in found[:3]))
    return f"{len(found)} operators compute with integers whose scale the graph does not tell ({sites})"


def _inputs(graph: Graph, config: Config, inputs: Any) -> tuple[torch.Tensor, ...]:
    """The inputs given, by name or in order, or made up ones."""
    names = {i.name: i.dtype for i in graph.inputs}
    if inputs is None and config.data is not None:
        inputs = load_data(config.data)
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Sequence):
        inputs = dict(zip(names, inputs, strict=False))
    batch = config.probe_batch if config.probe_batch is not None else BATCH
    shapes = {name: parse_spec(name, text) for name, text in config.inputs.items()}
    known = match_data(inputs, names) if inputs else {}
    if known and len(known) == len(names):
        return tuple(known[name] for name in names)
    made = for_graph(graph, shapes=shapes, batch=batch, seed=config.seed)
    return tuple(known.get(name, value) for name, value in zip(names, made, strict=True))
