"""Schemes whose variance is a number that somebody chose, and what residual branches make of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.expect.scheme import Maker, Scheme, Site, normal, truncated, uniform

# initializer_range of the configurations of transformers, and the stds of older networks.
STDS = (1e-10, 1e-6, 1e-3, 5e-3, 6e-3, 0.01, 0.02, 0.04, 0.05, 0.1, 1.0)
# Numbers of residual blocks for which 0.02/sqrt(2L) is tried when the depth is not known.
DEPTHS = (6, 12, 16, 24, 32, 36, 48)


def fixed_normal(site: Site) -> Iterator[Scheme]:
    """N(0, std^2), bias 0. transformers modeling_utils, _init_weights.

    trunc_normal_ of torch cuts at an absolute +-2, so that below a std of about 0.4 it is a normal law.
    """
    for std in STDS:
        yield normal(f"normal({std:g})", std, "any", "transformers modeling_utils, _init_weights; torch.nn.init.trunc_normal_")


def fixed_truncated(site: Site) -> Iterator[Scheme]:
    """The same cut at two (JAX, timm's trunc_normal_tf_) or three standard deviations (torchtitan, OLMo)."""
    for std in (0.01, 0.02, 0.05, 0.1, 1.0):
        yield truncated(
            f"trunc_normal({std:g}, 2 std)", std, 2.0, "any", "jax.nn.initializers.truncated_normal; timm trunc_normal_tf_"
        )
        yield truncated(f"trunc_normal({std:g}, 3 std)", std, 3.0, "any", "OLMo and torchtitan initialization")
    # Positions and classes of torchvision's and timm's transformers, where torch's absolute cut is felt.
    yield truncated("trunc_normal(1, -2, 2)", 1.0, 2.0, "any", "torch.nn.init.trunc_normal_")


def residual(site: Site) -> Iterator[Scheme]:
    """The last matrix of a branch: std/sqrt(2L). GPT-2 (Radford et al. 2019, section 2.3); nanoGPT model.py; Megatron."""
    # A stack of one branch a layer has half as many layers as its branches seem to say.
    for n in DEPTHS if site.depth is None else dict.fromkeys((site.depth, 2 * site.depth, *DEPTHS)):
        std = 0.02 / math.sqrt(2 * n)
        yield normal(f"normal(0.02/sqrt(2*{n}))", std, "residual", "Radford et al. 2019, section 2.3; nanoGPT model.py")
        if site.depth is not None:
            yield truncated(f"trunc_normal(0.02/sqrt(2*{n}), 3 std)", std, 3.0, "residual", "torchtitan llama3")
            yield normal(
                f"normal(0.006/sqrt(2*{n}))", 0.006 / math.sqrt(2 * n), "residual", "Megatron, scaled_init_method_normal"
            )
    if site.block is not None:
        n = site.block + 1
        yield normal(f"normal(0.02/sqrt(2*{n}))", 0.02 / math.sqrt(2 * n), "residual", "torchtitan llama3, depth_init")


def fixed_uniform(site: Site) -> Iterator[Scheme]:
    """U(-b, b): language models of the LSTM years, Keras RandomUniform."""
    for bound in (0.01, 0.05, 0.08, 0.1, 1.0):
        yield uniform(f"uniform({bound:g})", bound, "any", "Sutskever et al. 2014, section 3.4; Keras RandomUniform")


def constants(site: Site) -> Iterator[Scheme]:
    """All values the same: 0 for what must not speak at the start, 1 for scales."""
    yield Scheme("zeros", 0.0, 0.0, "constant", 0.0, "residual", "Goyal et al. 2017, section 5.1; LoRA B, ReZero, SkipInit")
    yield Scheme("ones", 1.0, 0.0, "constant", 1.0, "scale", "torch.nn.init.ones_")
    for value in (1e-4, 1e-5, 1e-6):
        yield Scheme(
            f"constant({value:g})", value, 0.0, "constant", value, "scale", "LayerScale: Touvron et al. 2021, section 2"
        )


MAKERS: tuple[Maker, ...] = (fixed_normal, fixed_truncated, residual, fixed_uniform, constants)
