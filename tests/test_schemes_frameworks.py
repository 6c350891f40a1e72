"""What frameworks' own initializers draw is in the catalogue, under the name of its law, in whole models as they make them."""

from __future__ import annotations

import math

import pytest
import timm_models
import torch
from torch import nn

from initaudit import audit
from initaudit.config import Config
from initaudit.expect.recognise import recognise
from initaudit.expect.schemes import site_of
from initaudit.measure.observation import observe


def tokens(vocabulary=64, length=12):
    return (torch.randint(0, vocabulary, (2, length)),)


class Logits(nn.Module):
    """A model of transformers without its record of outputs."""

    def __init__(self, model, twice=False):
        super().__init__()
        self.model, self.twice = model, twice

    def forward(self, ids):
        more = {"decoder_input_ids": ids} if self.twice else {}
        return self.model(input_ids=ids, **more, use_cache=False, return_dict=False)[0]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=5, n_head=2)
    return Logits(GPT2LMHeadModel(config)), tokens()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.01)
    return Logits(LlamaForCausalLM(config)), tokens()


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 96, "d_kv": 64, "d_ff": 200, "num_layers": 2, "num_heads": 3}
    return Logits(T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0)), twice=True), tokens()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 48, "state_size": 4, "num_hidden_layers": 3, "conv_kernel": 3}
    return Logits(MambaForCausalLM(MambaConfig(**sizes, rescale_prenorm_residual=True, use_mambapy=False))), tokens()


def torchtitan():
    """The residual matrices of layer l have 0.02/sqrt(2 (l + 1)): depth_init of its Llama 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4)
    model = LlamaForCausalLM(config)
    for place, layer in enumerate(model.model.layers):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.trunc_normal_(linear.weight, 0.0, 0.02 / math.sqrt(2 * (place + 1)))
    return Logits(model), tokens()


def olmo():
    """Mitchell: every matrix cut at three standard deviations, those that return to the stream smaller with depth."""
    model, inputs = torchtitan()
    for place, layer in enumerate(model.model.model.layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                writes = 2 * (place + 1) if name.endswith(("o_proj", "down_proj")) else 1
                std = 1 / math.sqrt(linear.in_features * writes)
                nn.init.trunc_normal_(linear.weight, 0.0, std, -3 * std, 3 * std)
    return model, inputs


def lora():
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential(nn.Linear(300, 128), nn.GELU(), nn.Linear(128, 10))
    wrapped = get_peft_model(base, LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian"))
    return wrapped, (torch.randn(16, 300),)


MODELS = {
    "GPT-2": (gpt2, {"c_attn.weight": "normal(0.02)", "c_proj.weight": "normal(0.02/sqrt(2*5))", "wpe.weight": "normal(0.02)"}),
    "Llama": (llama, {"q_proj.weight": "normal(0.01)", "k_proj.weight": "normal(0.01)", "down_proj.weight": "normal(0.01)"}),
    "T5": (
        t5,
        {
            "encoder.embed_tokens.weight": "pytorch_default",
            "Attention.q.weight": "normal(1/sqrt(d*64))",
            "Attention.k.weight": "normal(1/sqrt(d))",
            "Attention.o.weight": "lecun_normal",
            "wi.weight": "lecun_normal",
            "wo.weight": "lecun_normal",
        },
    ),
    "Mamba": (mamba, {"out_proj.weight": "pytorch_default(3^-1/2)", "in_proj.weight": "normal(0.1)"}),
    "torchtitan": (torchtitan, {"layers.2.mlp.down_proj.weight": "normal(0.02/sqrt(2*3))"}),
    "OLMo": (
        olmo,
        {
            "layers.3.mlp.down_proj.weight": "trunc_normal(1/sqrt(2*d*4), 3 std)",
            "layers.1.self_attn.q_proj.weight": "trunc_normal(1/sqrt(d), 3 std)",
        },
    ),
    "LoRA": (lora, {"lora_A.default.weight": "normal(1/fan_out)", "lora_B.default.weight": "zeros"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_library_draws_has_its_name(name):
    torch.manual_seed(1)
    build, expected = MODELS[name]
    if name == "LoRA":
        pytest.importorskip("peft")
    found = audit(*build(), config=Config(probe=False))
    for end, scheme in expected.items():
        rows = [x for x in found.layers if x.tensor.endswith(end)]
        assert rows, end
        for row in rows:
            assert scheme in {s["name"] for s in row.schemes}, (row.tensor, row.schemes)


def timm_draws():
    """(name, kernel or matrix, its site, what it has to be called) of timm's own initializers."""
    from timm.layers import lecun_normal_, trunc_normal_tf_
    from timm.models._efficientnet_builder import _init_weight_goog
    from timm.models.vision_transformer import init_weights_vit_jax, init_weights_vit_moco

    linear, kernel = ("o", "i"), ("o", "i", "k", "k")
    made = nn.Linear(96, 288)
    init_weights_vit_moco(made, "blocks.0.attn.qkv")
    yield "MoCo's packed projection", made.weight, site_of((288, 96), linear, packed=3), "xavier_uniform(split)"
    made = nn.Linear(96, 200)
    init_weights_vit_jax(made, "blocks.0.mlp.fc1")
    yield "JAX's linear", made.weight, site_of((200, 96), linear), "xavier_uniform"
    yield "JAX's bias", made.bias, site_of((200,), ("o",), fans=(96, 200)), "normal(1e-06)"
    patches = nn.Conv2d(3, 96, 8)
    init_weights_vit_jax(patches, "patch_embed.proj")
    yield "JAX's patches", patches.weight, site_of((96, 3, 8, 8), kernel), "lecun_normal(truncated)"
    lecun, cut = torch.empty(200, 96), torch.empty(200, 96)
    lecun_normal_(lecun)
    yield "lecun_normal_", lecun, site_of((200, 96), linear), "lecun_normal(truncated)"
    trunc_normal_tf_(cut, std=0.02)
    yield "trunc_normal_tf_", cut, site_of((200, 96), linear), "trunc_normal(0.02, 2 std)"
    for groups in (1, 64):
        conv = nn.Conv2d(64, 128, 5, groups=groups)
        _init_weight_goog(conv)
        word = "kaiming_normal(true fan_out, relu)" if groups > 1 else "kaiming_normal(fan_out, relu)"
        yield (
            f"EfficientNet's convolution in {groups} groups",
            conv.weight,
            site_of(conv.weight.shape, kernel, groups=groups),
            word,
        )
    head = nn.Linear(128, 100)
    _init_weight_goog(head)
    yield "EfficientNet's head", head.weight, site_of((100, 128), linear), "uniform(1/sqrt(fan_out))"


@pytest.mark.skipif(timm_models.import_timm() is None, reason="timm is not installed")
def test_what_timm_draws_has_its_name():
    torch.manual_seed(0)
    for name, weight, site, scheme in timm_draws():
        found = recognise(observe(weight.detach().numpy()), site)
        assert scheme in {fit.name for fit in found.schemes}, (name, found)


def test_zero_in_powers_of_two_is_orthogonal():
    """Zhao et al. 2021, ZerO: a Hadamard matrix between partial identities, where the width is a power of two."""
    hadamard = torch.ones(1, 1)
    for _ in range(6):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    weight = (hadamard[:, :32] / 8).numpy()
    assert recognise(observe(weight), site_of((64, 32), ("o", "i"))).schemes[0].name == "orthogonal(1)"
    assert recognise(observe(torch.eye(32, 64).numpy()), site_of((32, 64), ("o", "i"))).schemes[0].name == "identity"


def test_lsuv_is_orthogonal_of_any_gain():
    """Mishkin & Matas 2015: orthonormal, then divided by the standard deviation of what comes out."""
    torch.manual_seed(0)
    weight = nn.init.orthogonal_(torch.empty(64, 80))
    weight /= (torch.randn(128, 80) @ weight.T).std() * 0.7
    name = recognise(observe(weight.numpy()), site_of((64, 80), ("o", "i"))).schemes[0].name
    assert name.startswith("orthogonal(1.4")
