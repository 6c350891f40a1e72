"""Faults in healthy models: is each found, with a right code, and the right tensor named first?"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from zoo_faults import FAULTS, Behaviour, Fault, absorbs, behaviour, layers_of, matters, undo_storage
from zoo_models import Inputs, built, quiet
from zoo_peers import peers
from zoo_silence import models, summary

from initaudit import audit

# Forty small models of all families that were silent.
NAMES = tuple(
    """
    own:mlp-default own:mlp-he-20 own:mlp-selu-12 own:mlp-tanh-8 own:mlp-layernorm own:dqn own:nerf own:gcn own:pointnet
    own:highway own:tabular-resnet own:mixer own:tcn own:torch-encoder own:dcgan-generator own:dcgan-discriminator
    own:stylegan-mapping own:conv-vae own:mlp-vae-drawing own:autoencoder own:dit own:diffusion-unet
    torchvision:squeezenet1_1 timm:test_resnet timm:test_efficientnet timm:test_efficientnet_gn timm:test_convnext2
    timm:test_vit
    transformers:GPT2LMHeadModel transformers:LlamaForCausalLM transformers:OPTForCausalLM transformers:GPTNeoXForCausalLM
    transformers:BertForMaskedLM transformers:DistilBertForMaskedLM transformers:RobertaForMaskedLM
    transformers:ViTForImageClassification transformers:CLIPVisionModel transformers:ASTForAudioClassification
    transformers:PatchTSTForPrediction transformers:BartForConditionalGeneration
    """.split()  # noqa: SIM905
)
PLACES = 3
_NORMS = ("Norm",)


def tasks() -> list[str]:
    """One for each model, fault and place, and one for each model as it is."""
    known = models()
    names = [n for n in NAMES if n in known]
    kinds = [f"fault|{n}|{f.name}|{p}" for n in names for f in FAULTS for p in range(1 if f.once else PLACES)]
    # In an order of no meaning, so that an interrupted run is a fair sample.
    return sorted([*(f"healthy|{n}||0" for n in names), *kinds], key=lambda t: zlib.crc32(t.encode()))


def row(task: str) -> dict[str, Any]:
    """What the audit and its peers say of one model with one fault; `skipped` tells why a fault was no fault there."""
    _, name, fault_name, place = task.split("|")
    model = models()[name]
    module, inputs = built(model)
    module.eval()
    found: dict[str, Any] = {"family": model.family, "model": name, "fault": fault_name, "place": int(place)}
    if fault_name:
        fault = next(f for f in FAULTS if f.name == fault_name)
        with quiet():
            changed = _inject(module, inputs, fault, int(place))
        if isinstance(changed, str):
            return {**found, "skipped": changed}
        found.update(changed=changed, codes=fault.codes)
    began = time.process_time()
    with quiet():
        said = audit(module, inputs)
    # The peers take as long as the audit: they are asked about a third of the faults, and about every healthy model.
    asked = not fault_name or int(place) == (0 if fault.once else 1)
    return {**found, **summary(said, began), "peers": peers(module) if asked else {}}


def _inject(module: nn.Module, inputs: Inputs, fault: Fault, place: int) -> list[str] | str:
    """Changes the module at the place; the tensors that were changed, or why there was nothing to change."""
    layers = layers_of(module, inputs)
    _mark(module)
    if fault.once:
        if any(n in type(m).__name__ for m in module.modules() for n in _NORMS) or len(layers) < 6:
            return "a norm absorbs it, or the model is shallow"
        candidates = [0]
    else:
        candidates = list(_order(len(layers), place))
    before = behaviour(module, inputs) if fault.judged in ("cut", "scale", "follows") else None
    state = {n: t.clone() for n, t in module.state_dict().items()}
    for index in candidates:
        if layers and fault.judged == "mean" and absorbs(module, inputs, layers[index][1]):
            continue
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(index)
            changed = fault.change(layers, index) if layers else None
        if changed and (before is None or _matters(module, inputs, before, changed, fault, state)):
            module.zero_grad(set_to_none=True)
            return changed
        undo_storage(module)
        module.load_state_dict(state)
    return "nowhere in this third of the model does it apply and matter"


def _matters(
    module: nn.Module, inputs: Inputs, before: Behaviour, changed: list[str], fault: Fault, state: dict[str, torch.Tensor]
) -> bool:
    """Whether the model follows the change of the first of the changed tensors."""
    old, new = (float(values[changed[0]].std()) for values in (state, module.state_dict()))
    factor = new / old if old > 0 < new else 1.0
    return matters(before, behaviour(module, inputs), changed, fault.judged, factor)


def _order(count: int, place: int) -> Iterator[int]:
    """The layers of a third of the model, from its middle outwards."""
    third = range(count * place // PLACES, count * (place + 1) // PLACES)
    middle = (third.start + third.stop) / 2
    yield from sorted(third, key=lambda i: abs(i - middle))[:6]


def _mark(module: nn.Module) -> None:
    """Notes of layers in nn.Sequential whether a ReLU, and whether another layer, reads them directly."""
    for parent in module.modules():
        children = list(parent.children()) if isinstance(parent, nn.Sequential) else []
        for i, child in enumerate(children[:-1]):
            child.feeds_relu = isinstance(children[i + 1], nn.ReLU)
            after = children[i + 1 : i + 3]
            child.feeds_next = any(isinstance(c, (nn.Linear, nn.Conv2d)) for c in after) and all(
                isinstance(c, (nn.ReLU, nn.Tanh, nn.SELU, nn.GELU, nn.Linear, nn.Conv2d, nn.LeakyReLU)) for c in after
            )


def found_by_us(r: dict[str, Any]) -> tuple[bool, bool]:
    """(found with a right code at warning or error, and the first such finding names a changed tensor)."""
    right = [f for f in r["findings"] if f["severity"] != "info" and f["code"] in r["codes"]]
    return bool(right), bool(right) and right[0]["tensor"] in r["changed"]
