"""A Hugging Face folder's architecture out of its config.json, through transformers where that is installed.

Only classes of transformers itself are built: code that a folder brings along (`auto_map`) is never imported, nothing is
fetched, and kernels or backbones that a configuration asks for by address are not. A configuration comes from a stranger too:
how many modules it makes and how large they are is bounded before anything is allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from initaudit.auditing.architecture import as_tensor, joined, quietly, with_differences
from initaudit.errors import InitauditError
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.load.spans import reason, show

MAX_MODULES = 50_000  # the largest released models have some ten thousand
MAX_INTEGER = 1 << 31
MAX_COUNT = 10_000  # of layers, blocks, experts: configurations make lists of that length
# What makes transformers fetch code or weights, or choose a kernel that is not written in torch
_LEFT_OUT = (
    "auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "use_kernels", "custom_pipelines",
)  # fmt: skip


_COUNTS = re.compile("layer|depth|block|stage|expert")


class Unusable(Exception):
    """Why a configuration gives no architecture, as a clause."""


def from_config(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the module that its configuration describes as program; with a remark that says why not otherwise."""
    config: Mapping[str, Any] = checkpoint.metadata["config"]
    try:
        if any(array.quantized for array in checkpoint.arrays.values()) or config.get("quantization_config"):
            raise Unusable("its weights are quantised and the module that unpacks them is not built here")
        with _bounded(), quietly(), _offline(), _no_bars():
            return _attached(checkpoint, config)
    except Unusable as why:
        text = f"config.json gives no program: {why}; the audit falls back to names and shapes"
        metadata = {**checkpoint.metadata, "no_program": text}
        return dataclasses.replace(checkpoint, metadata=metadata, notes=(*checkpoint.notes, text))


def _attached(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    kind, settings = _class(config)
    _check_size(kind, settings, checkpoint.arrays)
    try:
        tensors = {name: as_tensor(array) for name, array in checkpoint.arrays.items()}
    except InitauditError as error:
        raise Unusable(str(error)) from error
    floating = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    try:
        module, info = kind.from_pretrained(
            None,
            config=settings,
            state_dict=dict(tensors),
            dtype=floating,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (Exception, SystemExit) as error:
        raise Unusable(f"{kind.__name__} raised {type(error).__name__}: {reason(error)}") from error
    if any(value.is_meta for value in module.state_dict().values()):
        raise Unusable(f"{kind.__name__} was left without values")
    held = {t.data_ptr(): checkpoint.arrays[name] for name, t in tensors.items() if t.numel()}
    arrays = {
        name: held[p.data_ptr()]
        for name, p in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        if p.numel() and p.data_ptr() in held and held[p.data_ptr()].shape == tuple(p.shape)
    }
    reshaped = {name: (tuple(theirs), tuple(own)) for name, theirs, own in info["mismatched_keys"]}
    missing = sorted(name for name in info["missing_keys"] if name not in reshaped)
    unexpected = sorted(name for name in info["unexpected_keys"] if _is_float(checkpoint.arrays.get(name)))
    label = f"transformers' {kind.__name__}"
    problems = with_differences(checkpoint.problems, label, missing, unexpected, reshaped)
    version = __import__("transformers").__version__
    return joined(checkpoint, module.eval(), arrays, problems, (f"paired through {kind.__name__} of transformers {version}",))


def _is_float(array: Array | None) -> bool:
    return array is None or array.dtype.startswith(("float", "bfloat"))


def _class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """transformers' own class and configuration for what config.json names; raises Unusable."""
    name = config.get("model_type")
    asked = (config.get("architectures") or [""])[0] if isinstance(config.get("architectures"), list) else ""
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise Unusable(f"transformers is not installed ({reason(error)}): pip install transformers") from error
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        if isinstance(config.get("auto_map"), Mapping):
            raise Unusable(f"{show(asked or name)} is code of its own (auto_map), which is never run")
        raise Unusable(
            f"transformers {transformers.__version__} knows no model_type {show(repr(name))}"
            if name
            else "it names no model_type"
        )
    if any(value > (MAX_COUNT if _COUNTS.search(key) else MAX_INTEGER) for key, value in _integers(config)):
        raise Unusable("it holds a size that no model has")
    plain = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    try:
        settings = CONFIG_MAPPING[name].from_dict(plain)
    except Exception as error:
        raise Unusable(f"its values are refused by {show(name)} ({type(error).__name__}: {reason(error)})") from error
    kind = getattr(transformers, asked, None) if isinstance(asked, str) and asked.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        if isinstance(config.get("auto_map"), Mapping):
            raise Unusable(f"{show(asked)} is code of its own (auto_map), which is never run")
        kind = _base_class(settings)
    settings._attn_implementation = "eager"
    return kind, settings


def _base_class(settings: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        found = MODEL_MAPPING[type(settings)]
    except (KeyError, ImportError) as error:
        raise Unusable("it names no class that transformers knows") from error
    return found[0] if isinstance(found, (tuple, list)) else found


def _integers(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool) or depth > 8:
        return
    if isinstance(value, int):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _integers(item, str(name), depth + 1)
    elif isinstance(value, list):
        for item in value:
            yield from _integers(item, key, depth + 1)


def _check_size(kind: Any, settings: Any, arrays: Mapping[str, Array]) -> None:
    """Raises Unusable where the architecture is of another size than the file: what is missing would be allocated and drawn."""
    try:
        with torch.device("meta"):
            hollow = kind(settings)
    except Unusable:
        raise
    except Exception as error:
        raise Unusable(f"{kind.__name__} cannot be built ({type(error).__name__}: {reason(error)})") from error
    wanted = sum(p.numel() for p in hollow.parameters())
    there = sum(array.size for array in arrays.values())
    if wanted > 2 * there + 50_000_000:
        raise Unusable(f"{kind.__name__} as configured has {wanted:,} values and the files hold {there:,}")


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """At most `MAX_MODULES` modules are registered inside the block."""
    count = 0

    def registered(module: nn.Module, name: str, child: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise Unusable(f"it describes more than {MAX_MODULES} modules")

    handle = nn.modules.module.register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """transformers draws progress bars on stderr, terminal or not."""
    try:
        logging: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Nothing is fetched: what a configuration asks for by address is refused by the hub's client."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants: Any = None
    with contextlib.suppress(ImportError):
        from huggingface_hub import constants
    flag = getattr(constants, "HF_HUB_OFFLINE", None)
    try:
        if constants is not None:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        if constants is not None:
            constants.HF_HUB_OFFLINE = flag
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before
