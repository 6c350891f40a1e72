"""Is an ONNX graph one that can be walked? Names, order, opsets and functions, checked by arithmetic before anything expands.

onnx.checker wants the whole model serialised once more and fails a model for one bad tensor; its full check and its shape
inference hang on nested functions. So the structure is checked here, and single nodes against their schema by the checker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Problem
from initaudit.load.spans import reason, show

if TYPE_CHECKING:
    import onnx

    Body = onnx.GraphProto | onnx.FunctionProto

OPSET_MARGIN = 4  # operators that a slightly newer opset adds are unknown to us, the others rarely change
MAX_EXPANDED_NODES = 1_000_000  # after every local function is put in place of its calls
MAX_CHECKED_BYTES = 1 << 16  # nodes that carry more (Constants) are not serialised again for the schema check
FunctionKey = tuple[str, str, str]


def check_structure(model: onnx.ModelProto, where: str) -> tuple[str, ...]:
    """Notes about `model`; raises `UnreadableModel` for a graph that is empty, cyclic, contradictory or endless."""
    graph = model.graph
    if not graph.node and not graph.initializer and not graph.sparse_initializer:
        raise UnreadableModel(where, "an ONNX model without a graph", "nodes or initializers", "export it again")
    notes = _check_opsets(model, where)
    _check_body(graph, (), where)
    for function in model.functions:
        _check_body(function, (), where)
    check_expansion(model, where)
    return notes


def _check_opsets(model: onnx.ModelProto, where: str) -> tuple[str, ...]:
    from onnx import IR_VERSION, defs

    newest = defs.onnx_opset_version()
    versions: dict[str, int] = {}
    for entry in model.opset_import:
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        if versions.setdefault(domain, entry.version) != entry.version:
            raise UnreadableModel(where, f"two opsets for the domain {show(repr(domain))}", "one")
    opset = versions.get("", 1 if model.ir_version < 3 else None)
    if opset is None and any(node.domain in ("", "ai.onnx") for node in model.graph.node):
        raise UnreadableModel(where, "no opset for ONNX's own operators", "an opset_import for the default domain")
    if opset is not None and not 1 <= opset <= newest + OPSET_MARGIN:
        raise UnreadableModel(
            where, f"opset {opset}", f"1 to {newest}, the newest that the installed onnx knows", "update onnx"
        )
    notes = []
    if opset is not None and opset > newest:
        notes.append(f"opset {opset} is newer than the {newest} that the installed onnx knows")
    if model.ir_version > IR_VERSION:
        notes.append(f"IR version {model.ir_version} is newer than the {IR_VERSION} that the installed onnx knows")
    return tuple(notes)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """(attribute name, graph) of every graph that `node` carries; "body.1" is the second of a list called body."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for index, graph in enumerate(attribute.graphs):
            yield f"{attribute.name}.{index}", graph


def node_label(node: onnx.NodeProto, index: int) -> str:
    """What a node is called in messages and in the names of what it holds: its name, or "Conv_3" for the fourth node."""
    return node.name or f"{node.op_type}_{index}"


def _named(names: Iterable[str], defined: set[str], what: str, where: str) -> None:
    for name in names:
        if name in defined:
            raise UnreadableModel(where, f"{what} {show(repr(name))} is defined twice", "every name once")
        if name:
            defined.add(name)


def _check_body(body: Body, outer: tuple[set[str], ...], where: str) -> None:
    """Every name defined once and before its use, in the body of a graph or of a function, subgraphs included."""
    initializers: set[str] = set()
    if hasattr(body, "initializer"):
        _named((tensor.name for tensor in body.initializer), initializers, "initializer", where)
        _named((sparse.values.name for sparse in body.sparse_initializer), initializers, "initializer", where)
    inputs: set[str] = set()
    _named((getattr(value, "name", value) for value in body.input), inputs, "input", where)
    defined = initializers | inputs
    scopes = (*outer, defined)
    for index, node in enumerate(body.node):
        for name in node.input:
            if name and not any(name in scope for scope in scopes):
                raise UnreadableModel(where, _undefined(name, node_label(node, index), body))
        for _, graph in subgraphs(node):
            _check_body(graph, scopes, where)
        _named(node.output, defined, "value", where)
    for value in body.output:
        name = getattr(value, "name", value)
        if name and not any(name in scope for scope in scopes):
            raise UnreadableModel(where, f"the output {show(repr(name))} is computed by no node")


def _undefined(name: str, label: str, body: Body) -> str:
    if any(name in node.output for node in body.node):
        return f"{show(repr(name))} is used by {show(label)} before it is computed: the nodes are unsorted or form a cycle"
    return f"{show(repr(name))}, an input of {show(label)}, is not defined"


def function_key(node: onnx.NodeProto) -> FunctionKey:
    """What a node calls: (domain, operator, overload)."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type, getattr(node, "overload", ""))


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for _, graph in subgraphs(node):
            yield from _all_nodes(graph.node)


def check_expansion(model: onnx.ModelProto, where: str) -> int:
    """The nodes that the graph has once every local function is expanded, counted without expanding any.

    Raises `UnreadableModel` for a function that calls itself and for more than `MAX_EXPANDED_NODES`: forty functions of two
    calls each are a file of a few kilobytes and a graph of 10**12 nodes.
    """
    functions: dict[FunctionKey, onnx.FunctionProto] = {}
    for function in model.functions:
        key = ("" if function.domain == "ai.onnx" else function.domain, function.name, function.overload)
        if key in functions:
            raise UnreadableModel(where, f"the function {show(function.name)} is defined twice", "every function once")
        functions[key] = function
    calls = {key: [function_key(node) for node in _all_nodes(function.node)] for key, function in functions.items()}
    sizes: dict[FunctionKey, int] = {}
    for root in functions:
        _measure(root, calls, sizes, where)
    main = [function_key(node) for node in _all_nodes(model.graph.node)]
    total = sum(sizes.get(key, 1) for key in main)
    if total > MAX_EXPANDED_NODES:
        found = f"local functions that expand to more than {MAX_EXPANDED_NODES} nodes"
        raise UnreadableModel(where, found, advice="a graph that cannot be meant to run")
    return total


def _measure(root: FunctionKey, calls: dict[FunctionKey, list[FunctionKey]], sizes: dict[FunctionKey, int], where: str) -> None:
    """Fills `sizes` for `root` and all that it calls; a stack of our own, because the chain may be longer than Python's."""
    open_now: set[FunctionKey] = set()
    stack = [root]
    while stack:
        key = stack[-1]
        if key in sizes:
            stack.pop()
            continue
        if key not in open_now:
            open_now.add(key)
            waiting = {callee for callee in calls[key] if callee in calls and callee not in sizes}
            if waiting & open_now:
                raise UnreadableModel(where, f"the function {show(key[1])} calls itself", "functions that end")
            stack.extend(waiting)
            if waiting:
                continue
        sizes[key] = min(sum(sizes.get(callee, 1) for callee in calls[key]), MAX_EXPANDED_NODES + 1)
        open_now.discard(key)
        stack.pop()


def schema_problems(model: onnx.ModelProto) -> list[Problem]:
    """Nodes of the main graph that do not fit the definition of their operator, by the checker of onnx.

    An operator that onnx does not know is no problem here: whoever walks the graph says what it could not execute.
    """
    from onnx import checker, defs

    context = checker.C.CheckerContext()
    context.ir_version = model.ir_version
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    context.opset_imports = opsets
    newest = defs.onnx_opset_version()
    version = opsets.get("", opsets.get("ai.onnx", 1))
    problems: list[Problem] = []
    if version > newest:
        return problems
    for index, node in enumerate(model.graph.node):
        if node.domain not in ("", "ai.onnx") or any(True for _ in subgraphs(node)):
            continue
        if not defs.has(node.op_type, version, "") or node.ByteSize() > MAX_CHECKED_BYTES:
            continue
        try:
            checker.check_node(node, context)
        except (checker.ValidationError, ValueError) as error:
            label = node_label(node, index)
            problems.append(
                Problem("IA002", label, f"{show(label)} does not fit the definition of its operator: {reason(error)}")
            )
    return problems
