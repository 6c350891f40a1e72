"""The initializations of whole models that projects assert by hand: what each kind of tensor is drawn from.

Kinds: "weight" (matrices and kernels), "writer" (a matrix whose output returns to a residual stream), "table" (embeddings),
"bias", "scale" (scales and shifts of normalizations). `{writers}` is the number of writers, 2L for L transformer blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

Recipe = Mapping[str, tuple[str, ...]]

_NORMS = ("ones", "zeros")


def _normal(std: str) -> Recipe:
    law = (f"normal({std})",)
    return {"weight": law, "writer": law, "table": law, "bias": ("zeros",), "scale": _NORMS}


def _weights(*laws: str) -> Recipe:
    return {"weight": laws, "writer": laws, "bias": ("zeros", "pytorch_default"), "scale": _NORMS}


RECIPES: Mapping[str, Recipe] = {
    # Radford et al. 2019, section 2.3; transformers GPT2PreTrainedModel._init_weights; nanoGPT model.py.
    "gpt2": {**_normal("0.02"), "writer": ("normal(0.02/sqrt({writers}))",)},
    # Devlin et al. 2019, appendix A.2 and transformers' default initializer_range; Llama's matrices are drawn alike.
    "bert": _normal("0.02"),
    "llama": _normal("0.02"),
    # reset_parameters of torch's own layers.
    "pytorch": {
        "weight": ("pytorch_default",),
        "writer": ("pytorch_default",),
        "table": ("pytorch_default",),
        "bias": ("pytorch_default", "zeros"),
        "scale": _NORMS,
    },
    "he": _weights(*(f"kaiming_{law}({fan}, relu)" for law in ("normal", "uniform") for fan in ("fan_in", "fan_out"))),
    "xavier": _weights("xavier_uniform", "xavier_normal"),
    "lecun": _weights("lecun_normal", "lecun_uniform"),
    "orthogonal": _weights("orthogonal"),
}
