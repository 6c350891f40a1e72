"""Attention whose keys and values are shared by several queries: the gradients are autograd's, none is counted twice."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.graph.graph import location_of
from initaudit.probe.passes import cotangents
from initaudit.probe.run import probe
from initaudit.rules.flow import flow_of

HEADS, KEYS, WIDTH = 8, 2, 32


class Grouped(nn.Module):
    """One pre-norm block whose keys and values are expanded to the heads of the queries."""

    def __init__(self):
        super().__init__()
        self.norm, shared = nn.RMSNorm(WIDTH), WIDTH * KEYS // HEADS
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, n, bias=False) for n in (WIDTH, shared, shared, WIDTH))

    def forward(self, x):
        y, (batch, length, _) = self.norm(x), x.shape
        q = self.q(y).view(batch, length, HEADS, -1).transpose(1, 2)
        k, v = (f(y).view(batch, length, KEYS, -1).transpose(1, 2) for f in (self.k, self.v))
        k, v = (
            z[:, :, None].expand(batch, KEYS, HEADS // KEYS, length, z.shape[-1]).reshape(batch, HEADS, length, -1)
            for z in (k, v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(mixed.transpose(1, 2).reshape(x.shape))


def test_the_gradient_at_every_projection_is_autograds():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, WIDTH), *[Grouped() for _ in range(4)], nn.Linear(WIDTH, 5)), torch.randn(8, 10, 16)
    graph = from_module(model, (x,))
    trace = probe(graph, (x,), seed=0)
    outputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _, __, y, name=name: (y.retain_grad(), outputs.setdefault(name, y))[0])
    result = model(x)
    result.backward(cotangents([result], 8, torch.Generator().manual_seed(0))[0])
    sites = {n.name: location_of(n).site for n in graph.fx.nodes}
    seen = [w.node for w in trace.weights if sites[w.node] in outputs]
    assert len(seen) == 2 + 4 * 4
    for node in seen:
        signal = trace.signals[node]
        truth = float(outputs[sites[node]].grad.square().sum())
        assert signal.gradient_moment2 * math.prod(signal.shape) == pytest.approx(truth, rel=1e-3)
    # What a stream keeps beside its branches is its own: no block multiplies it.
    assert max(flow_of(graph, trace).gradient.values()) < 20
