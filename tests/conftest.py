"""What every test may rely on."""

import torch

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):
    # transformers and timm import torchvision, which looks its compiled operators up at import; where they do not fit the
    # installed torch, declaring them is enough, because no test calls one.
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms", "roi_align", "_roi_align_backward", "deform_conv2d"):
        boxes = "(Tensor boxes, Tensor scores, float threshold) -> Tensor" if "nms" in name else "(Tensor x) -> Tensor"
        OPERATORS.define(name + boxes)
