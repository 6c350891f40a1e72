"""Physically meaningful numbers of a trace, each 0 where nothing is wrong and growing with the harm.

With K the Gram matrix of per-example gradients (the tangent kernel seen along one output direction), gradient descent is stable
up to the step 2/λ_top and then moves along eigenvector j as 1 - exp(-steps·λ_j/λ_top) (Jacot et al. 2018, section 5). Only the
eigenvectors of the *centred* kernel tell examples apart; a network whose centred eigenvalues are all far below λ_top cannot
tell them apart at any step size that does not blow up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from initaudit.probe.trace import Kernel, Trace

# Steps over which a direction is to be learned: a few, and an epoch's worth.
_FEW, _MANY = 10.0, 100.0
_REFERENCE = (
    64  # examples to which the spectra are brought: each eigenvalue of K/n is smaller the more examples share the trace
)
_FLOOR = 1e-8


def features(trace: Trace) -> dict[str, float]:
    """The features by name; where no kernel could be measured, that of a network that learns nothing."""
    sgd, adam = _kernel(trace, "sgd"), _kernel(trace, "adam")
    return {
        "slow_sgd": _slowness(sgd, _FEW),
        "stuck_sgd": _slowness(sgd, _MANY),
        "rank_loss_sgd": _rank_loss(trace, sgd),
        "collapse_sgd": _collapse(sgd),
        "slow_adam": _slowness(adam, _FEW),
        "stuck_adam": _slowness(adam, _MANY),
        "rank_loss_adam": _rank_loss(trace, adam),
        "collapse_adam": _collapse(adam),
        "sharpness": _sharpness(sgd),
        "unevenness": min(_unevenness(trace), 4.0),
        "dead": _dead(trace),
        "faded_gradient": min(changes(trace)["gradient_loss"], 12.0),
    }


def _kernel(trace: Trace, which: str) -> Kernel | None:
    kernel: Kernel | None = getattr(trace.gram, which) if trace.gram is not None else None
    if kernel is None or not kernel.eigenvalues or not math.isfinite(kernel.trace) or kernel.eigenvalues[0] <= 0:
        return None
    return kernel


def _slowness(kernel: Kernel | None, steps: float) -> float:
    """-log10 of the mean share learned of a centred direction after `steps` steps of the largest stable size, at most 8."""
    if kernel is None:
        return 8.0
    n = len(kernel.centred)
    top = kernel.eigenvalues[0]
    learned = sum(-math.expm1(-steps * max(e, 0.0) / top * n / _REFERENCE) for e in kernel.centred) / n
    return -math.log10(max(learned, _FLOOR))


def _rank_loss(trace: Trace, kernel: Kernel | None) -> float:
    """The logarithm of the factor by which the effective rank falls short of the number of examples, at most 4."""
    if kernel is None or kernel.effective_rank <= 0:
        return 4.0
    return min(max(math.log((len(kernel.centred) - 1) / kernel.effective_rank), 0.0), 4.0)


def _collapse(kernel: Kernel | None) -> float:
    """-log10 of the share of the gradients' squared norm in which examples differ, at most 6."""
    return 6.0 if kernel is None else min(-math.log10(max(kernel.centred_share, 1e-6)), 6.0)


def _sharpness(kernel: Kernel | None) -> float:
    """Decades by which λ_top exceeds 30: beyond 2/0.003 the smallest customary step of SGD diverges. At most 8."""
    if kernel is None:
        return 0.0
    return min(max(math.log10(kernel.eigenvalues[0]) - 1.5, 0.0), 8.0)


def gradient_ratios(trace: Trace) -> list[float]:
    """log10 of norm(gradient)/norm(weight) of every weight at every place of use, in forward order; zeros are left out."""
    return [
        math.log10(w.gradient_norm) - math.log10(w.weight_norm)
        for w in trace.weights
        if w.gradient_norm and w.weight_norm and math.isfinite(w.gradient_norm) and math.isfinite(w.weight_norm)
    ]


def _unevenness(trace: Trace) -> float:
    """The standard deviation of log10 of the gradient-to-weight ratios (the inverse of LARS's trust ratio, You et al. 2017)."""
    ratios = gradient_ratios(trace)
    if len(ratios) < 2:
        return 0.0
    mean = sum(ratios) / len(ratios)
    return math.sqrt(sum((r - mean) ** 2 for r in ratios) / len(ratios))


def _dead(trace: Trace) -> float:
    """The share of trainable weights without a gradient, now and after two virtual steps."""
    sizes = {name: math.prod(p.shape) for name, p in trace.parameters.items()}
    total = sum(sizes.values())
    lost = sum(sizes[n] for n, p in trace.parameters.items() if p.gradient_zero and p.revived is None)
    return lost / total if total else 0.0


def duplicate_share(trace: Trace) -> float:
    """The largest share of units of a weight that are copies of another: same values, same bias, same gradient."""
    shares = [1 - u.distinct / u.count for w in trace.weights if (u := w.units) is not None and u.count > 1]
    return max(shares, default=0.0)


def gradient_powers(trace: Trace) -> list[tuple[str, float]]:
    """(node, squared norm of the gradient of its whole output) of every use of a weight, in forward order.

    Norms, not second moments: an average over positions leaves each of them a small share and takes nothing from the whole.
    """
    found = []
    for weight in trace.weights:
        signal = trace.signals.get(weight.node)
        if signal is not None and signal.gradient_moment2 and math.isfinite(signal.gradient_moment2):
            found.append((weight.node, signal.gradient_moment2 * math.prod(signal.shape)))
    return found


def signal_powers(trace: Trace) -> list[tuple[str, float]]:
    """(node, second moment of its output) of every use of a weight, in forward order."""
    return [(w.node, w.output_moment2) for w in trace.weights if w.output_moment2 and math.isfinite(w.output_moment2)]


def changes(trace: Trace) -> Mapping[str, float]:
    """Decades (>= 0) that signal and gradient lose or gain over the weights of the network.

    A loss is taken over the whole way, a gain up to its peak.
    """
    signal = [math.log10(v) for _, v in signal_powers(trace)]
    gradient = [math.log10(v) for _, v in gradient_powers(trace)][::-1]
    return {
        "signal_loss": _fall(signal),
        "signal_growth": _rise(signal),
        "gradient_loss": _fall(gradient),
        "gradient_growth": _rise(gradient),
    }


def _fall(logs: list[float]) -> float:
    return max(logs[0] - logs[-1], 0.0) if logs else 0.0


def _rise(logs: list[float]) -> float:
    return max(max(logs) - logs[0], 0.0) if logs else 0.0
