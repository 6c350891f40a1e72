"""If, Loop and Scan. A body is a callable from tensors to a tuple of tensors: whoever holds the graph supplies it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from initaudit.onnx_ops.budget import current_meter
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import normal_axis, scalar
from initaudit.roles import Role

Body = Callable[..., tuple[Tensor, ...]]
CONTROL = Role("control")


def _wanted(results: Sequence[Tensor], outputs: int) -> Tensor | tuple[Tensor, ...]:
    return results[0] if outputs == 1 else tuple(results)


@operator(CONTROL)
def If(cond: Tensor, *, then_branch: Body, else_branch: Body, outputs: int = 1) -> Tensor | tuple[Tensor, ...]:
    """What the branch yields that the condition chooses."""
    return _wanted((then_branch if bool(scalar(cond)) else else_branch)(), outputs)


@operator(CONTROL)
def Loop(
    m: Tensor | None = None, cond: Tensor | None = None, *v_initial: Tensor, body: Body, outputs: int = 1
) -> Tensor | tuple[Tensor, ...]:
    """The body while its condition holds, at most m times: the last state, then what every trip yielded, stacked.

    The body takes the trip's number, the condition and the state; it returns the condition, the state and any more values.
    """
    meter = current_meter()
    most = None if m is None else int(scalar(m))
    alive = torch.tensor(True) if cond is None else cond
    state, trip = list(v_initial), 0
    collected: list[list[Tensor]] = [[] for _ in range(max(outputs - len(state), 0))]
    with meter.loop():
        while (most is None or trip < most) and bool(scalar(alive)):
            meter.trip("Loop")
            results = body(torch.tensor(trip, dtype=torch.int64), alive, *state)
            alive, state = results[0], list(results[1 : 1 + len(state)])
            for kept, value in zip(collected, results[1 + len(state) :], strict=False):
                kept.append(value)
                meter.produced(value.numel(), "Loop")
            trip += 1
    # Of no trip at all neither the shape nor the type of a scan output is known here.
    scans = [torch.stack(kept) if kept else torch.zeros(0) for kept in collected]
    return _wanted([*state, *scans], outputs)


@operator(CONTROL)
def Scan(
    *initial_state_and_scan_inputs: Tensor | None,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    directions: Sequence[int] | None = None,
    opset: int = 28,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The body once for every slice of the scanned inputs: the last state, then the stacked slices that it yields.

    Opset 8 has a batch axis in front of everything and the sequence lengths as first input.
    """
    given = list(initial_state_and_scan_inputs)
    if opset < 9:
        return _batched_scan(given, body, num_scan_inputs, directions, outputs)
    values = [v for v in given if v is not None]
    states, scanned = values[: len(values) - num_scan_inputs], values[len(values) - num_scan_inputs :]
    backwards = scan_input_directions or [0] * num_scan_inputs
    axes = [normal_axis(a, v.ndim) for a, v in zip(scan_input_axes or [0] * num_scan_inputs, scanned, strict=True)]
    meter = current_meter()
    collected: list[list[Tensor]] = [[] for _ in range(outputs - len(states))]
    length = scanned[0].shape[axes[0]]
    with meter.loop():
        for step in range(length):
            meter.trip("Scan")
            places = [length - 1 - step if back else step for back in backwards]
            slices = [v.select(axis, at) for v, axis, at in zip(scanned, axes, places, strict=True)]
            results = body(*states, *slices)
            states = list(results[: len(states)])
            for kept, value in zip(collected, results[len(states) :], strict=False):
                kept.append(value)
                meter.produced(value.numel(), "Scan")
    turned = scan_output_directions or [0] * len(collected)
    along = scan_output_axes or [0] * len(collected)
    scans = []
    for kept, back, axis in zip(collected, turned, along, strict=False):
        scans.append(torch.stack(kept[::-1] if back else kept, axis) if kept else torch.zeros(0))
    return _wanted([*states, *scans], outputs)


def _batched_scan(
    given: list[Tensor | None], body: Body, count: int, directions: Sequence[int] | None, outputs: int
) -> Tensor | tuple[Tensor, ...]:
    """Scan as opset 8 has it: for every entry of the batch the scan of its first `lengths` slices, padded with zeros."""
    lengths, values = given[0], [v for v in given[1:] if v is not None]
    longest = values[-1].shape[1]
    rows = []
    for row in range(values[0].shape[0]):
        steps = longest if lengths is None else int(scalar(lengths[row]))
        states, scanned = values[: len(values) - count], values[len(values) - count :]
        parts = [v[row] for v in states] + [v[row, :steps] for v in scanned]
        result = Scan(*parts, body=body, num_scan_inputs=count, scan_input_directions=directions, outputs=max(outputs, 2))
        entries = list(result)
        for place in range(len(states), len(entries)):
            padding = entries[place].new_zeros(longest - steps, *entries[place].shape[1:])
            entries[place] = torch.cat([entries[place], padding])
        rows.append(entries)
    return _wanted([torch.stack(column) for column in zip(*rows, strict=True)], outputs)
