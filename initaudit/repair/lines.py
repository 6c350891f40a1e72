"""Runs the line that a finding proposes, and nothing else: an interpreter of the few forms in which rules write it.

A line names tensors as a stranger's file calls them, so it is never given to Python. What is understood: calls of
`torch.nn.init`, loops over ranges, tuples and generators of weights, and the views that take a weight apart.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

# What draws, and the views, sizes and places that the rules' lines use (initaudit/rules/remedy.py).
_DRAWS = (
    *("normal_", "uniform_", "trunc_normal_", "zeros_", "ones_", "constant_", "orthogonal_"),
    *("kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_"),
)
_VIEWS = ("chunk", "view", "numel", "copy_")
_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


class NotALine(Exception):
    """What a finding proposes is advice in words, or names something that is no tensor of the model."""


def drawn_by(line: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The expressions of the tensors that `line` would draw, found out on tensors without values.

    `shapes` are those of the model's tensors by their Python expressions: `model.layer3[0].conv1.weight`. Raises NotALine where
    the line is not understood, names what is no tensor, or asks for what a shape does not allow.
    """
    spelled = {_canonical(text): text for text in shapes}
    # A version counts the writes into a tensor and into every view of it.
    empty = {text: torch.empty(shapes[given], device="meta") for text, given in spelled.items()}
    before = {text: tensor._version for text, tensor in empty.items()}
    try:
        _Run(empty).all_of(_parsed(line))
    except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError) as error:
        raise NotALine(str(error)) from error
    return tuple(spelled[text] for text, tensor in empty.items() if tensor._version != before[text])


def run_line(line: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Draws `tensors`, those of `drawn_by` by the same expressions, as `line` says; raises NotALine as that does."""
    with torch.no_grad():
        _Run({_canonical(text): tensor for text, tensor in tensors.items()}).all_of(_parsed(line))


def _parsed(line: str) -> list[ast.stmt]:
    try:
        return ast.parse(line).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotALine(line) from error


def _canonical(expression: str) -> str:
    try:
        return ast.unparse(ast.parse(expression, mode="eval"))
    except (SyntaxError, ValueError):
        return expression


class _Place:
    """A step on the way to a tensor: `model.layer3`."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Run:
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        self.names: dict[str, Any] = {"model": _Place("model"), "tensors": _Place("tensors")}

    def all_of(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Expr):
                self.value(statement.value)
            elif isinstance(statement, ast.For):
                for item in self.items(statement.iter):
                    self.bind(statement.target, item)
                    self.all_of(statement.body)
            else:
                raise NotALine(ast.unparse(statement))

    def bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple) and len(value) == len(target.elts):
            for part, item in zip(target.elts, value, strict=True):
                self.bind(part, item)
        else:
            raise NotALine(ast.unparse(target))

    def items(self, node: ast.expr) -> Iterator[Any]:
        """What a loop goes over, or the parts of a tuple in which generators are unpacked."""
        if isinstance(node, ast.Tuple):
            for part in node.elts:
                if isinstance(part, ast.Starred):
                    yield from self.items(part.value)
                else:
                    yield self.value(part)
        elif isinstance(node, ast.GeneratorExp):
            yield from self.generated(node.elt, node.generators)
        else:
            found = self.value(node)
            if not isinstance(found, (range, tuple, torch.Tensor)):
                raise NotALine(ast.unparse(node))
            yield from found

    def generated(self, element: ast.expr, loops: list[ast.comprehension]) -> Iterator[Any]:
        if not loops:
            yield self.value(element)
            return
        if loops[0].ifs:
            raise NotALine(ast.unparse(element))
        for item in self.items(loops[0].iter):
            self.bind(loops[0].target, item)
            yield from self.generated(element, loops[1:])

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.Tuple):
            return tuple(self.items(node))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(left, int | float) and isinstance(right, int | float):
                return _OPERATORS[type(node.op)](left, right)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.value(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return self.item(self.value(node.value), self.value(node.slice))
        if isinstance(node, ast.Call):
            return self.call(node)
        raise NotALine(ast.unparse(node))

    def attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, _Place):
            return self.place(f"{owner.text}.{name}")
        if isinstance(owner, torch.Tensor) and name in ("T", "shape"):
            return owner.T if name == "T" else tuple(owner.shape)
        if isinstance(owner, torch.Tensor) and name == "data":
            return owner
        raise NotALine(f".{name}")

    def item(self, owner: Any, key: Any) -> Any:
        if isinstance(owner, _Place):
            return self.place(f"{owner.text}[{key!r}]")
        if isinstance(owner, torch.Tensor) and isinstance(key, int):
            return owner[key]
        raise NotALine(f"[{key!r}]")

    def place(self, text: str) -> Any:
        return self.tensors.get(text, _Place(text))

    def call(self, node: ast.Call) -> Any:
        called = ast.unparse(node.func)
        arguments = [self.value(argument) for argument in node.args]
        options = {keyword.arg or "": self.value(keyword.value) for keyword in node.keywords}
        if called == "model.get_parameter" and len(arguments) == 1:
            return self.place(f"model.get_parameter({arguments[0]!r})")
        if any(isinstance(argument, _Place) for argument in arguments):
            raise NotALine(f"{called}: no such tensor")
        if called == "range":
            return range(*arguments)
        if called == "torch.empty":
            return torch.empty(*arguments, device=self.device)
        name = called.removeprefix("torch.nn.init.")
        if name != called and name in _DRAWS and isinstance(arguments[0], torch.Tensor):
            if arguments[0].is_meta:
                arguments[0].zero_()  # orthogonal_ does not touch a tensor without values
            return getattr(torch.nn.init, name)(*arguments, **options)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _VIEWS:
            owner = self.value(node.func.value)
            if isinstance(owner, torch.Tensor):
                return getattr(owner, node.func.attr)(*arguments, **options)
        raise NotALine(called)
