"""A module that lies on an accelerator, as a copy on the host: traced and read there, so that its graph is the usual one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_HERE = ("cpu", "meta")  # a tensor on the meta device has no values anywhere


def device_of(module: torch.nn.Module) -> str | None:
    """The device that holds the module's first tensor off the host, as in "cuda:0"; None for a module on the host."""
    away = (str(t.device) for t in (*module.parameters(), *module.buffers()) if t.device.type not in _HERE)
    return next(away, None)


def on_host(module: torch.nn.Module) -> torch.nn.Module | None:
    """A copy of the module on the host, its devices by attribute included; None where it cannot be copied.

    Tensors that share memory share it in the copy too.
    """
    import torch
    from torch.utils import _pytree as pytree

    device = device_of(module)
    names = {device, (device or "").partition(":")[0]}
    storages: dict[int, Any] = {}
    memo: dict[int, Any] = {}
    originals = []  # what a memo points from must outlive it
    for part in module.modules():
        for value in pytree.tree_leaves([dict(part._parameters), dict(part._buffers), dict(part.__dict__)]):
            if isinstance(value, torch.Tensor) and value.device.type not in _HERE and id(value) not in memo:
                originals.append(value)
                memo[id(value)] = _moved(value, storages)
    try:
        moved: torch.nn.Module = copy.deepcopy(module, memo)
    except Exception:  # noqa: BLE001 - a module holds what it likes; one that cannot be copied is traced where it lies
        return None
    for part in moved.modules():
        for name, value in list(part.__dict__.items()):
            if isinstance(value, torch.device) and value.type not in _HERE:
                part.__dict__[name] = torch.device("cpu")
            elif isinstance(value, str) and value in names:
                part.__dict__[name] = "cpu"
    return moved


def _moved(tensor: torch.Tensor, storages: dict[int, Any]) -> torch.Tensor:
    import torch

    plain = tensor.detach()
    if plain.layout == torch.strided and not plain.is_quantized:
        whole: Any = plain.untyped_storage()
        if whole.data_ptr() not in storages:
            storages[whole.data_ptr()] = whole.cpu()
        host = storages[whole.data_ptr()]
        there = torch.empty(0, dtype=plain.dtype).set_(host, plain.storage_offset(), plain.size(), plain.stride())
    else:
        there = plain.cpu()
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(there, requires_grad=tensor.requires_grad)
    return there
