"""Schemes whose variance follows from the fans of the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.expect.scheme import Maker, Scheme, Site, corrected, normal, truncated_moments, uniform

# torch.nn.init.calculate_gain, as squares.
GAINS2 = {"relu": 2.0, "linear": 1.0, "tanh": 25 / 9, "selu": 9 / 16, "leaky_relu(0.2)": 2 / 1.04}


def _modes(site: Site) -> dict[str, int]:
    """Fans by the name that a scheme gives them, torch's own first."""
    fan_in, fan_out = site.convention
    modes = {"fan_in": fan_in, "fan_out": fan_out}
    if site.groups > 1 or site.packed > 1:
        # Divided by the groups (EfficientNet) or by the matrices packed together.
        modes |= {"true fan_in": site.fan_in, "true fan_out": site.fan_out}
    elif (site.fan_in, site.fan_out) != site.convention and "v" not in site.axes:
        modes |= {"true fan_in": site.fan_in}
    return modes


def kaiming(site: Site) -> Iterator[Scheme]:
    """Variance gain^2/fan. He et al. 2015, eq. 10 and 14; torch.nn.init.kaiming_normal_."""
    for mode, fan in _modes(site).items():
        for activation, gain2 in GAINS2.items():
            std, source = math.sqrt(gain2 / fan), "He et al. 2015, eq. 10 (fan_in) and 14 (fan_out)"
            yield normal(f"kaiming_normal({mode}, {activation})", std, activation, source)
            yield uniform(f"kaiming_uniform({mode}, {activation})", math.sqrt(3) * std, activation, source)
        std = math.sqrt(2 / fan)
        yield corrected(
            f"kaiming_normal({mode}, relu, truncated)", std, "relu", "jax.nn.initializers.he_normal; Keras HeNormal"
        )


def xavier(site: Site) -> Iterator[Scheme]:
    """Variance 2 gain^2/(fan_in + fan_out). Glorot & Bengio 2010, eq. 12 and 16."""
    sums = {"": sum(site.convention), "true fans": site.fan_in + site.fan_out}
    if site.packed > 1:
        # timm's ViT in MoCo's style divides the packed Q, K, V before it computes fans.
        sums["split"] = site.convention[0] + site.convention[1] // site.packed
    for fans, total in sums.items():
        for activation in GAINS2:
            std, source = math.sqrt(2 * GAINS2[activation] / total), "Glorot & Bengio 2010, eq. 12 and 16"
            words = ", ".join(w for w in (fans, "" if activation == "linear" else activation) if w)
            brackets = f"({words})" if words else ""
            yield normal(f"xavier_normal{brackets}", std, "tanh" if activation == "linear" else activation, source)
            yield uniform(f"xavier_uniform{brackets}", math.sqrt(3) * std, activation, source)
        brackets = f"({fans}, truncated)" if fans else "(truncated)"
        yield corrected(f"xavier_normal{brackets}", math.sqrt(2 / total), "tanh", "Keras GlorotNormal")


def lecun(site: Site) -> Iterator[Scheme]:
    """Variance 1/fan_in. LeCun et al. 1998, eq. 16; the match for SELU (Klambauer et al. 2017)."""
    fans = dict.fromkeys((site.fan_in, site.convention[0]))
    for fan, brackets in zip(fans, ("", "(fan_in)"), strict=False):
        std, source = 1 / math.sqrt(fan), "LeCun et al. 1998, Efficient BackProp, eq. 16"
        yield normal(f"lecun_normal{brackets}", std, "selu", source)
        yield uniform(f"lecun_uniform{brackets}", math.sqrt(3) * std, "selu", source)
        truncated_name = "lecun_normal(fan_in, truncated)" if brackets else "lecun_normal(truncated)"
        yield corrected(truncated_name, std, "selu", "jax.nn.initializers.lecun_normal; timm lecun_normal_")


def pytorch_default(site: Site) -> Iterator[Scheme]:
    """What torch's layers do when they are made: reset_parameters of each."""
    if site.operator in ("lstm", "gru", "rnn"):
        if site.hidden:  # fewer rows than gates make no unit
            yield uniform("pytorch_default", 1 / math.sqrt(site.hidden), "recurrent", "torch.nn.RNNBase.reset_parameters")
    elif "v" in site.axes:
        yield normal("pytorch_default", 1.0, "embedding", "torch.nn.Embedding.reset_parameters")
    elif site.operator == "bilinear":
        # The bound is that of the second axis of three, `o i i`.
        yield uniform("pytorch_default", 1 / math.sqrt(site.shape[1]), "linear", "torch.nn.Bilinear.reset_parameters")
    else:
        # kaiming_uniform_(a=sqrt(5)): bound sqrt(3) sqrt(2/6)/sqrt(fan_in). Biases have the same bound.
        bound = 1 / math.sqrt(site.convention[0])
        yield uniform("pytorch_default", bound, "none", "torch.nn.Linear.reset_parameters and _ConvNd.reset_parameters")
        if site.packed > 1:
            bound = math.sqrt(6 / sum(site.convention))
            yield uniform("pytorch_default(in_proj)", bound, "softmax", "torch.nn.MultiheadAttention._reset_parameters")


def efficientnet(site: Site) -> Iterator[Scheme]:
    """Linear layers of the TensorFlow models: U(1/sqrt(fan_out)). timm _efficientnet_builder, _init_weight_goog."""
    yield uniform("uniform(1/sqrt(fan_out))", 1 / math.sqrt(site.convention[1]), "linear", "timm _efficientnet_builder")


def by_width(site: Site) -> Iterator[Scheme]:
    """Normal laws of the width d of a transformer, and their forms for residual branches."""
    d = site.letter("d") if "d" in site.axes else site.fan_in
    yield normal("normal(1/sqrt(d))", 1 / math.sqrt(d), "any", "T5: transformers modeling_t5; T-Fixup embeddings")
    yield normal(
        "normal(sqrt(2/(5d)))", math.sqrt(2 / (5 * d)), "any", "gpt-neox init_functions, small_init; Nguyen & Salazar 2019"
    )
    for head in (64, 128):
        yield normal(f"normal(1/sqrt(d*{head}))", 1 / math.sqrt(d * head), "query", "T5: transformers modeling_t5")
    yield Scheme(
        # A cut at three standard deviations, as OLMo has it.
        "trunc_normal(1/sqrt(d), 3 std)",
        0.0,
        truncated_moments(3.0)[0] / d,
        "truncated",
        3 / math.sqrt(d),
        "any",
        "OLMo initialization, mitchell",
    )
    yield normal("normal(1/fan_in)", 1 / d, "output", "muP: Yang et al. 2022, table 3")
    if "v" not in site.axes:
        # The matrix that leads down to rank r has r units.
        yield normal(
            "normal(1/fan_out)", 1 / site.convention[1], "low rank", "LoRA A: peft lora/layer.py, reset_lora_parameters"
        )
    if site.depth is not None:
        wang = 2 / (site.depth * math.sqrt(d))
        yield normal(f"normal(2/({site.depth}*sqrt(d)))", wang, "residual", "gpt-neox init_functions, wang_init")
    if site.block is not None:
        n, v = site.block + 1, truncated_moments(3.0)[0]
        yield Scheme(
            f"trunc_normal(1/sqrt(2*d*{n}), 3 std)",
            *(0.0, v / (2 * d * n), "truncated", 3 / math.sqrt(2 * d * n)),
            "residual",
            "OLMo initialization, mitchell",
        )


def scaled_by_depth(site: Site) -> Iterator[Scheme]:
    """DeepNorm, T-Fixup, Fixup and Mamba: Xavier, He and torch's own law times a power of the depth."""
    if site.depth is None:
        return
    n = site.depth
    total = sum(site.convention)
    deepnorm = math.sqrt(2 / total) * (8 * n) ** -0.25
    source = "DeepNorm: Wang et al. 2022, figure 2 (decoder only)"
    yield normal(f"xavier_normal(gain (8*{n})^-1/4)", deepnorm, "residual", source)
    yield uniform(f"xavier_uniform(gain (8*{n})^-1/4)", math.sqrt(3) * deepnorm, "residual", source)
    tfixup = math.sqrt(2 / total) * 0.67 * n**-0.25
    yield normal(f"xavier_normal(gain 0.67*{n}^-1/4)", tfixup, "residual", "T-Fixup: Huang et al. 2020, section 3.2")
    yield uniform(
        f"xavier_uniform(gain 0.67*{n}^-1/4)", math.sqrt(3) * tfixup, "residual", "T-Fixup: Huang et al. 2020, section 3.2"
    )
    for mode in ("fan_in", "fan_out"):
        he = math.sqrt(2 / _modes(site)[mode])
        for layers, power in ((2, "1/2"), (3, "1/4")):
            # L^(-1/(2m - 2)) for m layers in a branch.
            std = he * n ** (-1 / (2 * layers - 2))
            yield normal(f"kaiming_normal({mode}, relu, {n}^-{power})", std, "residual", "Fixup: Zhang et al. 2019, section 4")
    for layers in (n, 2 * n):
        # One branch in a layer, or two.
        bound = 1 / math.sqrt(site.convention[0] * layers)
        source = "Mamba: transformers modeling_mamba, rescale_prenorm_residual"
        yield uniform(f"pytorch_default({layers}^-1/2)", bound, "residual", source)


def siren(site: Site) -> Iterator[Scheme]:
    """First layer U(1/n), hidden layers U(sqrt(6/n)/30). Sitzmann et al. 2020, section 3.2."""
    yield uniform("uniform(1/fan_in)", 1 / site.fan_in, "sin", "SIREN: Sitzmann et al. 2020, section 3.2")
    bound = math.sqrt(6 / site.fan_in) / 30
    yield uniform("uniform(sqrt(6/fan_in)/30)", bound, "sin", "SIREN: Sitzmann et al. 2020, section 3.2")


MAKERS: tuple[Maker, ...] = (kaiming, xavier, lecun, pytorch_default, efficientnet, by_width, scaled_by_depth, siren)
