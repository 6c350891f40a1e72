"""Faults beside what looks like one: each is found in the network of which the look-alike is left alone."""

from __future__ import annotations

import lookalikes as look
import pytest
import torch
from test_lookalikes import alarms
from torch import nn


def of(model, kind):
    return [m for m in model.modules() if isinstance(m, kind)]


def both_adapters_zero(model):
    for adapter in of(model, look.Adapted):
        adapter.a.weight.zero_()


def scale_and_branch_zero(model):
    block = of(model, look.Residual)[1]
    block.scale.zero_()
    for p in of(block, nn.Linear)[-1].parameters():
        p.zero_()


def branch_behind_a_zero_alpha(model):
    for block in of(model, look.Residual):
        for p in of(block, nn.Linear)[-1].parameters():
            p.zero_()


def both_gammas_zero(model):
    for norm in of(model, nn.BatchNorm2d)[1:]:
        norm.weight.zero_()


def key_head_twice(model):
    """With the queries that it serves and the columns that read it; keys and values alone part at the first step."""
    attention = of(model, look.Attention)[1]
    for layer in attention.into:
        top, bottom = layer.weight.chunk(2)
        bottom.copy_(top)
    left, right = attention.out.weight.chunk(2, 1)
    right.copy_(left)


def query_head_twice(model):
    attention = of(model, look.Attention)[0]
    n = attention.size
    attention.into.weight[n : 2 * n] = attention.into.weight[:n].clone()
    attention.out.weight[:, n : 2 * n] = attention.out.weight[:, :n].clone()


def cloned_block(model):
    first, second, *_ = of(model, look.Attention)
    second.load_state_dict(first.state_dict())


def table_of_bytes(model):
    table = next(p for p in model.parameters() if p.shape == (31, 4))
    table.copy_(torch.randint(-(2**31), 2**31, (31, 4)).to(torch.int32).view(torch.float32))


def scales_of_nothing(model):
    for norm in of(model, look.FromZero):
        norm.weight.fill_(-1)


def hidden_layers_like_the_first(model):
    """Without the division by w0."""
    for layer in of(model, nn.Linear)[1:]:
        layer.weight.mul_(30)


def frequency_twice(model):
    for layer in of(model, nn.Linear)[1:]:
        layer.weight.div_(30)


def scale_left_to_the_scores(model):
    """T5's queries without 1/sqrt(dk), at eight times the width."""
    for attention in of(model, look.Attention):
        attention.into[0].weight.mul_(64)


def one_value(model):
    of(model, nn.Linear)[0].weight.fill_(0.02)


def large_table(model):
    model.table.weight.mul_(100)


def empty_cell(model):
    for p in model.cell.parameters():
        p.zero_()


def equal_kernels(model):
    for conv in of(model, nn.Conv2d):
        conv.weight.fill_(0.1)


def no_taps(model):
    for conv in of(model, nn.Conv2d):
        if conv.groups > 1:
            conv.weight.zero_()


FAULTS = (
    (look.adapters, both_adapters_zero, {"IA207"}),
    (look.layer_scale, scale_and_branch_zero, {"IA207"}),
    (look.rezero, branch_behind_a_zero_alpha, {"IA207"}),
    (look.zero_gammas, both_gammas_zero, {"IA207"}),
    (look.grouped_queries, key_head_twice, {"IA202"}),
    (look.one_key_head, query_head_twice, {"IA202"}),
    (look.tied_head, cloned_block, {"IA203"}),
    (look.tied_head, large_table, {"IA310"}),
    (look.relative_positions, table_of_bytes, {"IA206"}),
    (look.zero_centred_norms, scales_of_nothing, {"IA311"}),
    (look.siren, hidden_layers_like_the_first, {"IA304", "IA102", "IA308"}),
    (look.siren, frequency_twice, {"IA101"}),
    (look.bucketed_positions, scale_left_to_the_scores, {"IA302", "IA309"}),
    (look.tied_autoencoder, one_value, {"IA201"}),
    (look.recurrent, empty_cell, {"IA207", "IA201"}),
    (look.small_convolutions, equal_kernels, {"IA201"}),
    (look.depthwise, no_taps, {"IA207", "IA201"}),
)


@pytest.mark.parametrize(("build", "fault", "codes"), FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_fault_beside_it_is_found(build, fault, codes):
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        fault(model)
    assert codes & {code for code, _, _ in alarms(model, (inputs,))}
