"""Losses of classification."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import together
from initaudit.roles import Role


def _loss(log_prob: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None, reduction: str) -> Tensor:
    log_prob, target = together(log_prob, target)
    weight = None if weight is None else together(weight, log_prob)[0]
    labels = target.to(torch.int64)
    ignored = -100 if ignore_index is None else ignore_index
    # One axis of classes and at most one of places is what torch takes for every number of axes.
    flat = log_prob.reshape(*log_prob.shape[:2], -1)
    result = F.nll_loss(flat, labels.reshape(labels.shape[0], -1), weight, ignore_index=ignored, reduction=reduction)
    return result.reshape(labels.shape) if reduction == "none" else result


@operator(Role("reduction", "nll_loss", data=("input",)))
def NegativeLogLikelihoodLoss(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Minus the log-probability `n c s…` of the labels `n s…`; the mean is weighted."""
    return _loss(input, target, weight, ignore_index, reduction)


@operator(Role("reduction", "cross_entropy", data=("scores",)))
def SoftmaxCrossEntropyLoss(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The same of the softmax of the scores; the second output is its logarithm."""
    log_prob = torch.log_softmax(scores, 1)
    loss = _loss(log_prob, labels, weights, ignore_index, reduction)
    return loss if outputs == 1 else (loss, log_prob)
