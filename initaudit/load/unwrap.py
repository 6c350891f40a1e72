"""The plain module inside wrappers: DataParallel, DistributedDataParallel, FSDP of both kinds, torch.compile, at any depth."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def unwrap(module: torch.nn.Module) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module without its wrappers, and a note for each kind of wrapper that was taken off.

    Where only the outermost modules are wrappers, what they hold is returned itself. Wrappers further in are taken off a copy
    of the tree that shares its parameters; sharded ones are gathered, which every rank has to take part in.
    """
    notes: dict[str, None] = {}
    while (inner := _inside(module)) is not None and not _is_fsdp1(module):
        notes[f"taken out of {_name(module)}"] = None
        module = inner
    if not any(_wrapped(part) for part in module.modules()):
        return module, tuple(notes)
    with _gathered(module) as passing:
        plain = _Copy(passing, notes).of(module)
    return plain, tuple(notes)


def _inside(module: Any) -> Any:
    """What a wrapper holds; None for a module that is no wrapper."""
    import torch

    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return module.module
    if isinstance(getattr(module, "_orig_mod", None), torch.nn.Module):
        return module._orig_mod  # torch.compile
    return module._modules["_fsdp_wrapped_module"] if _is_fsdp1(module) else None


def _is_fsdp1(module: Any) -> bool:
    return "_fsdp_wrapped_module" in module._modules


def _is_fsdp2(module: Any) -> bool:
    """fully_shard() puts a class of its own in front of the module's."""
    return any(cls.__name__ == "FSDPModule" and cls.__module__.startswith("torch.") for cls in type(module).__mro__)


def _name(module: Any) -> str:
    name = type(module).__name__
    return "torch.compile" if name == "OptimizedModule" else name


def _compiled_in_place(module: Any) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(
        module.__dict__.get("forward"), "_torchdynamo_orig_callable"
    )


def _wrapped(module: Any) -> bool:
    return (
        _inside(module) is not None or _is_fsdp2(module) or _compiled_in_place(module) or any(map(_sharded, _tensors(module)))
    )


def _tensors(module: Any) -> Iterator[Any]:
    yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor: FSDP2, tensor parallelism


@contextmanager
def _gathered(module: Any) -> Iterator[bool]:
    """Inside, the parameters that FSDP keeps in flat shards have their own names and shapes; yields whether there are any."""
    if not any(_is_fsdp1(part) for part in module.modules()):
        yield False
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        yield True


class _Copy:
    """Copies of modules without wrappers; a module or a tensor that is used twice is one in the copy too.

    `passing`: the tensors are views of a gathered flat parameter, which is freed when the gathering ends.
    """

    def __init__(self, passing: bool, notes: dict[str, None]) -> None:
        self.passing, self.notes = passing, notes
        self.modules: dict[int, Any] = {}
        self.tensors: dict[int, Any] = {}

    def of(self, module: Any) -> Any:
        """The copy of the tree below `module`."""
        if id(module) not in self.modules:
            inner = _inside(module)
            if inner is not None:
                self.notes[f"taken out of {_name(module)}"] = None
                self.modules[id(module)] = self.of(inner)
            else:
                self._fill(module)
        return self.modules[id(module)]

    def _fill(self, module: Any) -> None:
        clone: Any
        if _is_fsdp2(module):
            self.notes["taken out of fully_shard"] = None
            # Its class is FSDPLinear(FSDPModule, Linear): the module's own class comes third. A copy of an FSDPModule would be
            # made by calling the constructor without its arguments.
            clone = object.__new__(type(module).__mro__[2])
        else:
            clone = copy.copy(module)
        self.modules[id(module)] = clone
        clone.__dict__ = dict(module.__dict__)
        if _compiled_in_place(module):
            self.notes["taken out of torch.compile"] = None
            clone.__dict__["_compiled_call_impl"] = None
            if "forward" in clone.__dict__:
                original = inspect.unwrap(clone.__dict__["forward"])
                # A method is bound to the module that was compiled, not to the copy.
                clone.__dict__["forward"] = original.__func__.__get__(clone) if inspect.ismethod(original) else original
        for kind in _HOOKS:
            if kind in clone.__dict__:
                kept = {key: hook for key, hook in clone.__dict__[kind].items() if not _of_fsdp(hook)}
                clone.__dict__[kind] = type(clone.__dict__[kind])(kept)
        for kind in ("_parameters", "_buffers"):
            clone.__dict__[kind] = {name: self._whole(t) for name, t in getattr(module, kind).items()}
        children = module._modules.items()
        clone.__dict__["_modules"] = {name: None if child is None else self.of(child) for name, child in children}

    def _whole(self, tensor: Any) -> Any:
        """The tensor, gathered where it is sharded, and copied where it will not outlive the gathering."""
        import torch

        if tensor is None or id(tensor) in self.tensors:
            return None if tensor is None else self.tensors[id(tensor)]
        whole = tensor
        if _sharded(tensor):
            self.notes["gathered from its shards"] = None
            whole = tensor.full_tensor().detach()
        elif self.passing:
            whole = tensor.detach().clone()
        if whole is not tensor and isinstance(tensor, torch.nn.Parameter):
            whole = torch.nn.Parameter(whole, requires_grad=tensor.requires_grad)
        self.tensors[id(tensor)] = whole
        return whole


def _of_fsdp(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed")
