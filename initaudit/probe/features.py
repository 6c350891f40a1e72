"""Physically meaningful numbers of a trace, each 0 where nothing is wrong and growing with the harm.

Most foresee from the network as it stands; what they foresee counts as far as the virtual steps (`response.py`) have not
refuted it. A layer that is zero behind a normalization has a kernel of rank one and a gradient a million times too large, and
one step later neither is true.

With K the Gram matrix of per-example gradients (the tangent kernel seen along one output direction), gradient descent is stable
up to the step 2/λ_top and then moves along eigenvector j as 1 - exp(-steps·λ_j/λ_top) (Jacot et al. 2018, section 5). Only the
eigenvectors of the *centred* kernel tell examples apart; a network whose centred eigenvalues are all far below λ_top cannot
tell them apart at any step size that does not blow up. It is asked for no more of them than examples have numbers: of a time or
a place alone a healthy network sees one direction or two at its start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from initaudit.probe.response import LEARNT
from initaudit.probe.trace import Kernel, Response, Trace

OPTIMIZERS = ("sgd", "adam")
# Steps over which a direction is to be learned.
_FEW = 10.0
_LEAST = 1e-4  # of the loss of guessing: learning that is slower does not show in some steps
_REFERENCE = (
    64  # examples to which the spectra are brought: each eigenvalue of K/n is smaller the more examples share the trace
)
_FLOOR = 1e-8


def features(trace: Trace) -> dict[str, float]:
    """The features by name; where no kernel could be measured, that of a network that learns nothing.

    `unlearnt_sgd` and `unlearnt_adam` are left out where no virtual steps were taken.
    """
    found = {"dead": dead_share(trace), "chaos": _chaos(trace)}
    for optimizer in OPTIMIZERS:
        kernel, loss, doubt = _kernel(trace, optimizer), lowest_loss(trace, optimizer), doubted(trace, optimizer)
        foreseen = {
            "slow": _slowness(trace, kernel, _FEW),
            "rank_loss": _rank_loss(trace, kernel),
            "sharpness": _sharpness(_kernel(trace, "sgd")),
            "faded_gradient": min(changes(trace)["gradient_loss"], 12.0),
        }
        found |= {f"{name}_{optimizer}": doubt * value for name, value in foreseen.items()}
        if loss is not None:
            found[f"unlearnt_{optimizer}"] = -math.log10(max(1 - max(loss, LEARNT), _LEAST))
    return found


def doubted(trace: Trace, optimizer: str) -> float:
    """What the virtual steps leave of a foreseen harm: 0 where they learnt half of their task, 1 where they learnt nothing."""
    loss = lowest_loss(trace, optimizer)
    return 1.0 if loss is None else math.sqrt(min(max((loss - LEARNT) / (1 - LEARNT), 0.0), 1.0))


def lowest_loss(trace: Trace, optimizer: str) -> float | None:
    """The lowest loss that the virtual steps of any customary size reached, in units of guessing; None where none was taken.

    Steps that end in a loss that is not finite have reached nothing. A rehearsal is more steps of the same kind.
    """
    runs = [r.losses for r in trace.response if r.optimizer == optimizer]
    rehearsed = trace.rehearsal.left(optimizer) if trace.rehearsal is not None else None
    found = [min(losses) if math.isfinite(losses[-1]) else 1.0 for losses in runs]
    return min([*found, *([rehearsed] if rehearsed is not None else [])], default=None)


def rehearsal_decides(trace: Trace, optimizer: str) -> bool:
    """Whether the risk relies on the rehearsal: no virtual steps were taken, or they learned less."""
    rehearsed = trace.rehearsal.left(optimizer) if trace.rehearsal is not None else None
    return rehearsed is not None and rehearsed == lowest_loss(trace, optimizer)


def learnt_later(trace: Trace) -> Response | None:
    """The further virtual steps, where they learnt what the first ones did not."""
    found = trace.persisted
    return found if found is not None and math.isfinite(found.losses[-1]) and found.losses[-1] < LEARNT else None


def _chaos(trace: Trace) -> float:
    """Decades beyond a hundred (at most 6) by which a relative difference between inputs grows up to the outputs, in power.

    For a random cotangent c of norm 1, E|Jᵀc|² = |J|²/n_out (Frobenius), and a random difference of relative size ε becomes
    one of size ε·|J|·|x|/(√n_in·|y|): its square over ε² is |Jᵀc|² E[x²]/E[y²]. ReLU networks without biases, homogeneous
    of degree one, have 1 on average; beyond the edge of chaos it grows as chi1 to the power of the depth (Poole et al. 2016,
    eq. 9).
    """
    outputs = [s.moment2 for n in trace.outputs if (s := trace.signals.get(n)) is not None and s.moment2]
    starts = [s for s in trace.signals.values() if s.kind == "input" and s.gradient_moment2]
    starts = starts or [trace.signals[w.node] for w in trace.weights[:1] if w.node in trace.signals]
    grown = [
        s.gradient_moment2 * math.prod(s.shape) / trace.batch * s.moment2 / max(outputs)
        for s in starts
        if outputs and s.gradient_moment2 and s.moment2
    ]
    return min(max(math.log10(max(grown, default=1.0)) - 2.0, 0.0), 6.0)


def _kernel(trace: Trace, which: str) -> Kernel | None:
    kernel: Kernel | None = getattr(trace.gram, which) if trace.gram is not None else None
    if kernel is None or not kernel.eigenvalues or not math.isfinite(kernel.trace) or kernel.eigenvalues[0] <= 0:
        return None
    return kernel


def _slowness(trace: Trace, kernel: Kernel | None, steps: float) -> float:
    """-log10 of the mean share learned of a centred direction after `steps` steps of the largest stable size, at most 8."""
    if kernel is None:
        return 8.0
    n, top = len(kernel.centred), kernel.eigenvalues[0]
    asked = kernel.centred if _directions(trace, kernel) == n - 1 else kernel.centred[: _directions(trace, kernel)]
    learned = sum(-math.expm1(-steps * max(e, 0.0) / top * n / _REFERENCE) for e in asked) / len(asked)
    return -math.log10(max(learned, _FLOOR))


def _rank_loss(trace: Trace, kernel: Kernel | None) -> float:
    """The logarithm of the factor by which the effective rank falls short of the directions there are, at most 4."""
    if kernel is None or kernel.effective_rank <= 0:
        return 4.0
    return min(max(math.log(_directions(trace, kernel) / kernel.effective_rank), 0.0), 4.0)


def _directions(trace: Trace, kernel: Kernel) -> int:
    """In how many directions the examples of a kernel can differ: one fewer than they are, or the numbers of one of them."""
    return max(min(len(kernel.centred) - 1, trace.numbers or len(kernel.centred)), 1)


def _sharpness(kernel: Kernel | None) -> float:
    """Decades by which λ_top exceeds 30: beyond 2/0.003 the smallest customary step of SGD diverges. At most 8."""
    if kernel is None:
        return 0.0
    return min(max(math.log10(kernel.eigenvalues[0]) - 1.5, 0.0), 8.0)


def dead_share(trace: Trace) -> float:
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
