"""Which one layer does the damage that is measured over the whole network, where it is one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.health import Health

# A layer is to blame alone where it does as much of the damage in decades as `probe/cause.py` asks of a single step.
_MOST = 0.7
_NOTHING = 1e-300  # what stands for zero, so that a cut has a size in decades


def culprit(evidence: Evidence, state: Health, values: Mapping[str, float], total: float) -> LayerEvidence | None:
    """The layer between whose input and output `values` (ratios of second moments by node) change most.

    None where no layer makes most of `total`, the change of the whole: then the damage is spread over many. Gradients run
    backwards, so that what a layer makes of them stands at its input.
    """
    if evidence.graph is None or not state.layers:
        return None
    inputs = {n.name: [a.name for a in n.all_input_nodes] for n in evidence.graph.fx.nodes}
    whole = abs(_log(total))
    best: tuple[float, LayerEvidence | None] = (_MOST * whole, None)
    for layer in state.layers:
        for record in layer.records:
            before = [values[n] for n in inputs.get(record.node, ()) if n in values]
            if not before or record.output not in values:
                continue
            step = abs(_log(values[record.output]) - _log(max(before)))
            if step > best[0]:
                best = step, layer
    return best[1]


def _log(value: float) -> float:
    return math.log10(min(max(value, _NOTHING), 1 / _NOTHING))
