"""Virtual steps: does a parameter without a gradient get one once the others have moved?

A zero gradient is healthy where another zero explains it (the branch behind a zero gate, LoRA's A beside B = 0): that other
parameter moves in the first step, and the gradient is there in the second. Two zeros in series, or a dead ReLU, never move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from initaudit.graph.graph import Graph
from initaudit.probe.backward import backward
from initaudit.probe.lending import order_of, shaped
from initaudit.probe.passes import Pass, batch_of, cotangents
from initaudit.probe.slopes import Group, Recall, Sums

# A step as large as a hundredth of a parameter's own size, or of 0.01 where it is zero: enough to leave zero, too little to
# change what the network is. Adam's first step moves every element by 1e-3 however small it is, and so does this one.
_STEP, _SMALL = 0.01, 0.1
_STEPS = 2
_BLOCK = 1 << 18  # elements that are moved together: 1 MiB stays in a core's cache


def revived(
    graph: Graph,
    constant: frozenset[fx.Node],
    inputs: Sequence[Tensor],
    gradients: Mapping[str, Tensor] | None,
    silent: Sequence[str],
    seed: int,
    device: torch.device | None,
) -> dict[str, int | None]:
    """For every silent parameter the step (1 or 2) after which its gradient is not zero, or None.

    The steps descend the same cotangent loss for which `gradients` were taken; without them they are taken once more, and
    neither they nor the moved weights are held: each is made anew where it is asked for, which takes about three passes more.
    The caller's weights are not touched.
    """
    ask = _Ask(graph, constant, inputs, seed, device)
    after: dict[str, int | None] = dict.fromkeys(silent)
    with contextlib.closing(_anew(ask) if gradients is None else _held(ask, gradients)) as steps:
        for step, moving in enumerate(steps, 1):
            for key in silent:
                if after[key] is None and key in moving:
                    after[key] = step
            if step == _STEPS or all(s is not None for s in after.values()):
                break
    return after


def _held(ask: _Ask, gradients: Mapping[str, Tensor]) -> Generator[set[str]]:
    """The parameters with a gradient after each step, where there is room for all gradients and moves."""
    shift: dict[str, Tensor] = {}
    while True:
        for key, gradient in gradients.items():
            if _moves(rms := _rms(gradient)):
                move = _move(ask.graph, key, gradient, rms)
                shift[key] = shift[key] + move if key in shift else move
        gradients = ask.gradients(shift)
        yield {key for key, gradient in gradients.items() if bool(gradient.any())}


def _anew(ask: _Ask) -> Generator[set[str]]:
    """The same where there is none."""
    passes: list[_Passed] = []
    try:
        while True:
            passes.append(_Passed(ask, _Moves(ask.graph, tuple(passes))))
            if len(passes) > 1:
                yield passes[-1].moving
    finally:
        for kept in passes:
            kept.close()


class _Ask:
    """The gradients of one cotangent loss at weights that have been moved."""

    def __init__(
        self,
        graph: Graph,
        constant: frozenset[fx.Node],
        inputs: Sequence[Tensor],
        seed: int,
        device: torch.device | None,
    ) -> None:
        self.graph, self.constant, self.inputs, self.seed, self.device = graph, constant, inputs, seed, device

    def run(self, shift: Mapping[str, Tensor], recall: Recall | None = None) -> tuple[Pass, list[Tensor], list[Tensor]]:
        """The pass forward, where the gradient starts, and the cotangents there."""
        seen = () if recall is None else (recall,)
        run = Pass(self.graph, self.constant, device=self.device, shift=shift, observers=seen, lend=recall is not None)
        run.run(*self.inputs)
        ends = run.ends()
        return run, ends, cotangents(ends, batch_of(self.inputs), torch.Generator().manual_seed(self.seed))

    def gradients(self, shift: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of them."""
        run, ends, drawn = self.run(shift)
        return run.parameter_gradients(backward(run, ends, drawn, keep=False))


class _Passed:
    """A pass that is kept, so that the gradient of each parameter can be asked for; `rms` has its root mean square."""

    def __init__(self, ask: _Ask, shift: Mapping[str, Tensor]) -> None:
        self.recall = Recall(everything=True)
        self.rms: dict[str, Tensor] = {}
        self.moving: set[str] = set()
        self._held: dict[str, Tensor] = {}
        self._groups: dict[str, Group] = {}
        self._run, ends, drawn = ask.run(shift, self.recall)
        sums = Sums(self._run, self.recall, self._note)
        backward(self._run, ends, drawn, keep=True, take=sums)
        sums.close()

    def _note(self, key: str, gradient: Tensor, group: Group) -> None:
        self.rms[key] = _rms(gradient)
        if bool(gradient.any()):
            self.moving.add(key)
        whole = all(site[1].op == "get_attr" and self.recall.knows(self._run, site) for site in group.sites)
        if whole:
            self._groups[key] = group
        else:
            self._held[key] = gradient

    def close(self) -> None:
        """Lets go of the pass."""
        self.recall.close()
        self._run.release()

    def gradient(self, key: str) -> Tensor:
        """That of one parameter."""
        if key in self._held:
            return self._held[key]
        each = ((site, self.recall(self._run, site)) for site in self._groups[key].sites)
        return self._run.summed(each, (key,))[key]


class _Moves(Mapping[str, Tensor]):
    """How far each parameter has moved after some passes, worked out whenever it is asked for."""

    def __init__(self, graph: Graph, passes: Sequence[_Passed]) -> None:
        self.graph, self.passes = graph, passes

    def __contains__(self, key: object) -> bool:
        return any(_moves(p.rms.get(str(key))) for p in self.passes)

    def __getitem__(self, key: str) -> Tensor:
        moved: Tensor | None = None
        for p in self.passes:
            if (rms := p.rms.get(key)) is not None and _moves(rms):
                move = _move(self.graph, key, p.gradient(key), rms)
                moved = move if moved is None else moved.add_(move)
        if moved is None:
            raise KeyError(key)
        return moved

    def __iter__(self) -> Iterator[str]:
        return iter({key: None for p in self.passes for key in p.rms if key in self})

    def __len__(self) -> int:
        return len(list(iter(self)))


def _moves(rms: Tensor | None) -> bool:
    return rms is not None and bool(torch.isfinite(rms)) and bool(rms != 0)


def _move(graph: Graph, key: str, gradient: Tensor, rms: Tensor) -> Tensor:
    """Half of the step along the gradient, half along its sign: SGD and Adam each move what the other might leave in place."""
    size = float(_rms(graph.constants[key].value().to(gradient.device)))
    scale = _STEP * (max(size, _SMALL) if size > 0 else 1.0)
    flat = gradient.permute(order_of(gradient)).reshape(-1)
    move = torch.empty_like(flat)
    for to, g in zip(torch.split(move, _BLOCK), torch.split(flat, _BLOCK), strict=True):
        to.copy_(-scale * 0.5 * ((g / rms).float() + g.sign()))
    return shaped(move, gradient)


def _rms(x: Tensor) -> Tensor:
    """The root mean square, a float64 number."""
    blocks = torch.split(x.detach().permute(order_of(x)).reshape(-1), _BLOCK)
    # Into the same memory each time: small numbers between large temporaries would keep an allocator from reusing them.
    room, total = torch.empty(len(blocks[0]), dtype=torch.float64, device=x.device), 0.0
    for block in blocks:
        total += float(room[: len(block)].copy_(block).square_().sum())
    return torch.tensor(total, dtype=torch.float64, device=x.device).div(x.numel()).sqrt()
