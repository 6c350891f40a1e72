"""A module that computes what the code of a TorchScript archive describes, without compiling or running any of it.

The text is parsed by `ast` and its few forms of statement are followed here one by one; the operators it names are looked up
among ATen's own (`initaudit.graph.allowed`). What the format can do beyond that (calls into other libraries, files, threads) is
refused, and with it the program.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import traceback

from initaudit.errors import LimitExceeded, UnreadableModel, UnsupportedOperator
from initaudit.graph.from_exported import ReadProgram
from initaudit.graph.script_numbers import leaves
from initaudit.graph.script_operators import COMPARISONS, WORDS, call
from initaudit.graph.script_parts import SHELLS, marker, parsed, shell_of
from initaudit.load.script_code import Instance, Named, ScriptProgram
from initaudit.load.spans import show

MOST_STEPS = 500_000  # statements and expressions of one forward; a network of 100 blocks takes some 50,000
MOST_SECONDS = 30.0
MOST_CALLS = 200  # functions within functions


@dataclass(frozen=True)
class Function:
    """A function of the archive's code; `owner` is the object whose method it is."""

    node: ast.FunctionDef
    owner: Instance | None = None


@dataclass(frozen=True)
class Builtin:
    """An operator by its name: `torch.relu`, `ops.prim.NumToTensor`."""

    name: str


@dataclass(frozen=True)
class Type:
    """A class of the archive."""

    name: str


class _Return(Exception):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


@dataclass
class _Run:
    """What one call of forward has spent."""

    steps: int = 0
    began: float = field(default_factory=time.monotonic)
    depth: int = 0

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise LimitExceeded("TorchScript", f"more than {MOST_STEPS:,} steps in one call")
        if self.steps % 64 == 0 and time.monotonic() - self.began > MOST_SECONDS:
            raise LimitExceeded("TorchScript", f"more than {MOST_SECONDS:.0f} seconds in one call")


class ScriptModule(ReadProgram):
    """Follows the archive's code on the tensors that it holds."""

    def __init__(self, program: ScriptProgram, tensors: Mapping[str, torch.Tensor]) -> None:
        self.program = program
        self.units = {name: parsed(name, text) for name, text in program.sources.items()}
        forward = self.method(program.root, "forward")
        super().__init__(_signature(forward, self))
        self.modules_of: dict[int, str] = {}
        self._place(program.root, "")
        for name, value in tensors.items():
            self.hold(name, value, value.is_floating_point() and name in self.learned)
        self.training = bool(program.root.attributes.get("training", False))
        self.nodes = {path: marker(path) for path in set(self.modules_of.values())}

    def run(self, *inputs: Any) -> Any:
        """Calls the root's forward."""
        with traceback.preserve_node_meta():
            result = self._invoke(self.method(self.program.root, "forward"), list(inputs), {}, _Run())
        leaves(result)
        return result

    @property
    def learned(self) -> set[str]:
        """The tensors that the classes of the archive call parameters."""
        found: set[str] = set()
        for instance, path in self._instances(self.program.root, ""):
            declared = self._listed(instance, "__parameters__")
            found |= {held.name for key, held in instance.attributes.items() if isinstance(held, Named) and key in declared}
            found |= {f"{path}.{key}".lstrip(".") for key in declared}
        return found | {value.name for value in self.program.constants if isinstance(value, Named)}

    def _instances(self, instance: Instance, path: str, seen: set[int] | None = None) -> Any:
        seen = seen if seen is not None else set()
        if id(instance) in seen:
            return
        seen.add(id(instance))
        yield instance, path
        for key, value in instance.attributes.items():
            if isinstance(value, Instance):
                yield from self._instances(value, f"{path}.{key}".lstrip("."), seen)

    def _place(self, root: Instance, path: str) -> None:
        """Every object's module path, and in its place a shell of the layer that it was, by whose sizes inputs are guessed."""
        for instance, name in self._instances(root, path):
            self.modules_of[id(instance)] = name
            kind = SHELLS.get(instance.type.rpartition(".")[2])
            if name and kind is not None and instance.type.startswith("__torch__.torch.nn."):
                *above, last = name.split(".")
                owner: nn.Module = self
                for part in above:
                    owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
                owner._modules[last] = shell_of(*kind, instance, self._class(instance.type))

    def _listed(self, instance: Instance, name: str) -> list[str]:
        for statement in self._class(instance.type).body:
            if (
                isinstance(statement, ast.Assign)
                and isinstance(statement.targets[0], ast.Name)
                and statement.targets[0].id == name
            ):
                found: list[str] = ast.literal_eval(statement.value)
                return found
        return []

    def _class(self, name: str) -> ast.ClassDef:
        found = self._defined(name)
        if not isinstance(found, ast.ClassDef):
            raise UnreadableModel(show(name), "a class that the archive does not define")
        return found

    def _defined(self, name: str) -> ast.stmt | None:
        module, _, last = name.rpartition(".")
        return self.units.get(module, {}).get(last)

    def method(self, instance: Instance, name: str) -> Function:
        """The method `name` of an object; raises UnreadableModel where its class has none."""
        for statement in self._class(instance.type).body:
            if isinstance(statement, ast.FunctionDef) and statement.name == name:
                return Function(statement, instance)
        raise UnreadableModel(show(instance.type), f"no method {show(name)} in the archive's code")

    def _invoke(self, function: Function, args: list[Any], kwargs: dict[str, Any], run: _Run) -> Any:
        run.depth += 1
        if run.depth > MOST_CALLS:
            raise LimitExceeded("TorchScript", f"more than {MOST_CALLS} functions within one another")
        scope: dict[str, Any] = {}
        parameters = function.node.args
        names = [parameter.arg for parameter in (*parameters.args, *parameters.kwonlyargs)]
        given = args if function.owner is None else [function.owner, *args]
        defaults = [self._eval(node, {}, run) for node in parameters.defaults]
        scope.update(zip(names[len(parameters.args) - len(defaults) : len(parameters.args)], defaults, strict=True))
        for parameter, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True):
            if default is not None:
                scope[parameter.arg] = self._eval(default, {}, run)
        scope.update(zip(names, given, strict=False))
        scope.update(kwargs)
        if missing := [name for name in names if name not in scope]:
            raise UnreadableModel(show(function.node.name), f"called without {show(missing[0])}")
        try:
            with self._within(function.owner):
                self._block(function.node.body, scope, run)
        except _Return as returned:
            return returned.value
        finally:
            run.depth -= 1
        return None

    def _within(self, owner: Instance | None) -> Any:
        """Whoever traces the run learns which module the calls in it are of."""
        path = self.modules_of.get(id(owner)) if owner is not None else None
        return traceback.set_current_meta(self.nodes[path]) if path is not None else contextlib.nullcontext()

    def _block(self, body: Sequence[ast.stmt], scope: dict[str, Any], run: _Run) -> None:
        for statement in body:
            run.spend()
            match statement:
                case ast.Assign(targets=[target]):
                    self._assign(target, self._eval(statement.value, scope, run), scope, run)
                case ast.AnnAssign(value=ast.expr() as value):
                    self._assign(statement.target, self._eval(value, scope, run), scope, run)
                case ast.AnnAssign() | ast.Pass():
                    continue
                case ast.Expr():
                    self._eval(statement.value, scope, run)
                case ast.Return():
                    raise _Return(None if statement.value is None else self._eval(statement.value, scope, run))
                case ast.If():
                    self._block(statement.body if self._truth(statement.test, scope, run) else statement.orelse, scope, run)
                case ast.For():
                    for item in self._eval(statement.iter, scope, run):
                        run.spend()
                        self._assign(statement.target, item, scope, run)
                        self._block(statement.body, scope, run)
                case ast.While():
                    while self._truth(statement.test, scope, run):
                        run.spend()
                        self._block(statement.body, scope, run)
                case ast.With(items=[item]) if self._only_gradients(self._eval(item.context_expr, scope, run)):
                    self._block(statement.body, scope, run)
                case _:
                    raise UnsupportedOperator("TorchScript", f"a statement of kind {type(statement).__name__}")

    def _only_gradients(self, context: Any) -> bool:
        """Whether a context does nothing but switch gradients, which are asked for here wherever they can be had."""
        kind = context.type if isinstance(context, Instance) else ""
        return kind.startswith("__torch__.torch.autograd.grad_mode.") and kind.rpartition(".")[2] in ("no_grad", "enable_grad")

    def _truth(self, test: ast.expr, scope: dict[str, Any], run: _Run) -> bool:
        return bool(self._eval(test, scope, run))

    def _assign(self, target: ast.expr, value: Any, scope: dict[str, Any], run: _Run) -> None:
        match target:
            case ast.Name():
                scope[target.id] = value
            case ast.Tuple() | ast.List():
                for part, item in zip(target.elts, value, strict=True):
                    self._assign(part, item, scope, run)
            case ast.Subscript():
                self._eval(target.value, scope, run)[self._eval(target.slice, scope, run)] = value
            case ast.Attribute():
                owner = self._eval(target.value, scope, run)
                if isinstance(owner, Instance) and id(owner) not in self.modules_of:
                    owner.attributes[target.attr] = value
                # A module's own state (a counter, a cache) does not outlive the call here
            case _:
                raise UnsupportedOperator("TorchScript", f"an assignment to {type(target).__name__}")

    def _eval(self, node: ast.expr, scope: dict[str, Any], run: _Run) -> Any:
        run.spend()
        ev: Callable[[ast.expr], Any] = lambda part: self._eval(part, scope, run)  # noqa: E731
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                return self._name(node.id, scope)
            case ast.Attribute():
                return self._attribute(ev(node.value), node.attr)
            case ast.Call():
                return self._call(node, scope, run)
            case ast.List():
                return [ev(part) for part in node.elts]
            case ast.Tuple():
                return tuple(ev(part) for part in node.elts)
            case ast.Dict():
                return {ev(key): ev(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
            case ast.Subscript():
                return self._item(ev(node.value), ev(node.slice))
            case ast.UnaryOp(op=ast.USub()):
                return -ev(node.operand)
            case ast.UnaryOp(op=ast.Not()):
                return not ev(node.operand)
            case ast.BoolOp(op=ast.And()):
                return all(ev(part) for part in node.values)
            case ast.BoolOp():
                return any(ev(part) for part in node.values)
            case ast.IfExp():
                return ev(node.body if ev(node.test) else node.orelse)
            case ast.Compare(ops=[operation], comparators=[other]):
                sides = ev(node.left), ev(other)
                leaves(sides)
                return COMPARISONS[type(operation)](*sides)
            case ast.Slice():
                return slice(*(None if part is None else ev(part) for part in (node.lower, node.upper, node.step)))
        raise UnsupportedOperator("TorchScript", f"an expression of kind {type(node).__name__}")

    def _name(self, name: str, scope: dict[str, Any]) -> Any:
        if name in scope:
            return scope[name]
        if name in ("torch", "ops", "CONSTANTS", "__torch__"):
            return Builtin(name)
        if name in ("inf", "nan"):
            return float(name)
        if name in WORDS:
            return Builtin(name)
        return Type(name)  # Tensor, List: what an annotation names

    def _attribute(self, owner: Any, name: str) -> Any:
        if isinstance(owner, Instance):
            if name not in owner.attributes:
                return self.method(owner, name)
            return self._tensor(owner.attributes[name])
        if isinstance(owner, Builtin) and owner.name == "CONSTANTS":
            index = int(name.removeprefix("c"))
            return self._tensor(self.program.constants[index])
        if isinstance(owner, Builtin):
            full = f"{owner.name}.{name}"
            found = self._defined(full) if full.startswith("__torch__.") else None
            if isinstance(found, ast.FunctionDef):
                return Function(found)
            return Type(full) if isinstance(found, ast.ClassDef) else Builtin(full)
        if isinstance(owner, Type):
            return Builtin(f"{owner.name}.{name}")
        raise UnsupportedOperator("TorchScript", f"the attribute {show(name)} of a {type(owner).__name__}")

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, Named):
            return self.held(value.name)
        if isinstance(value, (list, tuple)):
            return type(value)(self._tensor(item) for item in value)
        return {key: self._tensor(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _item(self, owner: Any, place: Any) -> Any:
        if isinstance(owner, Type | Builtin):
            return Type("annotation")  # List[Tensor]
        if isinstance(owner, torch.Tensor):
            raise UnsupportedOperator("TorchScript", "an index into a tensor, which its code writes as torch.select")
        return owner[place]

    def _call(self, node: ast.Call, scope: dict[str, Any], run: _Run) -> Any:
        function = self._eval(node.func, scope, run)
        args = [self._eval(part, scope, run) for part in node.args]
        kwargs = {part.arg: self._eval(part.value, scope, run) for part in node.keywords if part.arg is not None}
        if isinstance(function, Function):
            return self._invoke(function, args, kwargs, run)
        if isinstance(function, Type):
            return self._made(function, args, run)
        if not isinstance(function, Builtin):
            raise UnsupportedOperator("TorchScript", f"a call of a {type(function).__name__}")
        special = WORDS.get(function.name)
        if function.name == "getattr":
            return self._attribute(args[0], str(args[1]))
        if special is not None:
            leaves(args)
            return special(*args)
        if function.name.endswith(".__new__"):
            return Instance(function.name.removesuffix(".__new__"), {})
        return call(function.name, args, kwargs)

    def _made(self, kind: Type, args: list[Any], run: _Run) -> Any:
        definition = self._class(kind.name)
        if any(isinstance(base, ast.Name) and base.id == "NamedTuple" for base in definition.bases):
            fields = [s.target.id for s in definition.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
            return Instance(kind.name, dict(zip(fields, args, strict=True)))
        made = Instance(kind.name, {})
        self._invoke(self.method(made, "__init__"), args, {}, run)
        return made


def script_inputs(program: ScriptProgram) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the inputs that a traced module was recorded with, by their names; empty where they are not known."""
    module, _, last = program.root.type.rpartition(".")
    try:
        found = parsed(module, program.sources.get(module, "")).get(last)
    except UnreadableModel:
        return {}  # as whoever builds the program will say
    for statement in found.body if isinstance(found, ast.ClassDef) else ():
        if isinstance(statement, ast.FunctionDef) and statement.name == "forward":
            names = [argument.arg for argument in statement.args.args[1:]]
            if len(names) == len(program.examples):
                pairs = zip(names, program.examples, strict=True)
                return {name: (shape, getattr(torch, dtype)) for name, (shape, dtype) in pairs}
    return {}


def _signature(forward: Function, module: ScriptModule) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    arguments = forward.node.args
    names = arguments.args[1:]
    offset = len(names) - len(arguments.defaults)
    found = []
    for index, argument in enumerate(names):
        default = inspect.Parameter.empty
        if index >= offset:
            try:
                default = ast.literal_eval(arguments.defaults[index - offset])
            except ValueError:
                default = None  # type: ignore[assignment]
        note = ast.unparse(argument.annotation) if argument.annotation is not None else inspect.Parameter.empty
        found.append(inspect.Parameter(argument.arg, kind, default=default, annotation=note))
    return inspect.Signature(found)
