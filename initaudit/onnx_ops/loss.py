"""Losses of classification."""

from __future__ import annotations

import torch
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import together
from initaudit.roles import Role


def _loss(log_prob: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None, reduction: str) -> Tensor:
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"the unknown reduction {reduction!r}")
    log_prob, target = together(log_prob, target)
    labels = target.to(torch.int64)
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    # What is ignored may be no class at all; any class does there, for its share is zero.
    labels = torch.where(kept, labels, 0)
    share = kept.to(log_prob.dtype)
    if weight is not None:
        share = share * together(weight, log_prob)[0][labels]
    loss = -share * log_prob.gather(1, labels.unsqueeze(1)).squeeze(1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / share.sum()


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
