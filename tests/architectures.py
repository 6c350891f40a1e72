"""Architectures of transformers and timm by name, without weights, and what their own layers say about each parameter."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from test_pair_transformers import CASES
from timm_models import import_timm
from torch import nn

TRANSFORMERS = tuple(CASES)
# The smallest of each family.
_NAMES = """
vgg11 repvgg_a0 resnet18 resnet26d resnest14d res2net50_26w_4s regnety_002 seresnet18 densenet121 hrnet_w18_small inception_v4
nf_resnet26 dla46_c vovnet39a mobilenetv3_small_050 mobilenetv4_conv_small_035 efficientnet_b0 mixnet_s ghostnet_050 lcnet_035
fbnetc_100 repvit_m0_9 edgenext_xx_small mobilevit_xxs efficientformer_l1 efficientvit_b0 fastvit_t8 convnext_atto
convnextv2_atto inception_next_atto mambaout_femto poolformer_s12 convmixer_1024_20_ks9_p14 vit_tiny_patch16_224
deit_tiny_patch16_224 cait_xxs24_224 beit_base_patch16_224 eva02_tiny_patch14_224 convit_tiny crossvit_tiny_240 davit_tiny
levit_128s maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224 mvitv2_tiny pit_ti_224 pvt_v2_b0 coat_lite_tiny
swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 tiny_vit_5m_224 twins_svt_small visformer_tiny volo_d1_224
xcit_nano_12_p16_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 sequencer2d_s rexnet_100 selecsls42b xception41 skresnet18
"""
TIMM = tuple(_NAMES.split())


def build(name: str, *, real: bool = False) -> nn.Module:
    """The architecture of that name, on the meta device unless `real`."""
    with torch.device("cpu" if real else "meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in CASES:
            import transformers

            kind = getattr(transformers, name)
            made: nn.Module = kind(kind.config_class(**CASES[name][0]))
            return made.eval()
        timm = import_timm()
        assert timm is not None
        module: nn.Module = timm.create_model(name, pretrained=False)
        return module.eval()


def layers_of(module: nn.Module) -> dict[str, tuple[str, int, int]]:
    """(role, fan_in, fan_out) of the weight of every layer whose kind is known: products, convolutions, tables."""
    found: dict[str, tuple[str, int, int]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if type(part).__name__.endswith("Experts"):
            for key, value in part.named_parameters(name):  # of transformers: experts, units out, units in
                found[key] = ("contraction", value.shape[2], value.shape[1])
        if isinstance(part, (nn.LSTM, nn.GRU, nn.RNN)):
            for key, _ in part.named_parameters(name):
                if "weight_" in key:
                    into = module.get_parameter(key).shape[1]
                    found[key] = ("recurrent", into, part.hidden_size)
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found[f"{name}.in_proj_weight"] = ("contraction", part.embed_dim, 3 * part.embed_dim)
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        key = f"{name}.weight" if name else "weight"
        if isinstance(part, nn.Embedding):
            found[key] = ("embedding", 1, part.embedding_dim)
        elif isinstance(part, nn.modules.conv._ConvNd):
            key = key if not hasattr(part, "parametrizations") else f"{name}.parametrizations.weight.original1"
            found[key] = ("contraction", *_fans(part))
        elif isinstance(part, nn.Linear):
            found[key] = ("contraction", part.in_features, part.out_features)
        elif type(part).__name__.endswith(("Router", "Gate")) and weight.dim() == 2:
            found[key] = ("contraction", weight.shape[1], weight.shape[0])
        elif type(part).__name__ == "Conv1D":  # of transformers: a Linear whose weight is turned
            found[key] = ("contraction", weight.shape[0], weight.shape[1])
    # A parameter that a table and a head share is both: the layer that has it under this name counts
    return found


def _fans(layer: Any) -> tuple[int, int]:
    taps = math.prod(layer.kernel_size)
    return layer.in_channels // layer.groups * taps, layer.out_channels // layer.groups * taps
