"""Architectures of transformers, small and at random: every weight with the activation that its module really calls.

The judge runs forward and follows tensors by identity (see `watched`); what its configuration names is checked besides.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from watched import watching
from zoo import quiet

from initaudit.graph.from_torch import from_module
from initaudit.pair.pair import pair

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
DECODER = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 32}
ENCODER = {**SIZE, "max_position_embeddings": 40, "pad_token_id": 1}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 32}
VISION = {"image_size": 32, "patch_size": 8, **{k: v for k, v in SIZE.items() if k != "vocab_size"}}
CONVS = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ = {**LAYERS, "d_model": 32, "vocab_size": 99, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 1}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 40}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 99}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SPEECH = {**SIZE, **POSITIONS, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
PATCHES = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}

# model: configuration, kind of input, activation of its feed-forward layers
CASES = {
    "GPT2LMHeadModel": (GPT, "ids", "gelu"),
    "OpenAIGPTLMHeadModel": (GPT, "ids", "gelu"),
    "GPTNeoForCausalLM": ({**SIZE, **NEO}, "ids", "gelu"),
    "GPTNeoXForCausalLM": (DECODER, "ids", "gelu"),
    "GPTJForCausalLM": ({**GPT, "rotary_dim": 4}, "ids", "gelu"),
    "BloomForCausalLM": ({"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}, "ids", "gelu"),
    "OPTForCausalLM": ({**ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}, "ids", "relu"),
    "FalconForCausalLM": (SIZE, "ids", "gelu"),
    "CodeGenForCausalLM": ({**GPT, "rotary_dim": 4}, "ids", "gelu"),
    "LlamaForCausalLM": (DECODER, "ids", "silu"),
    "MistralForCausalLM": (DECODER, "ids", "silu"),
    "Qwen2ForCausalLM": (DECODER, "ids", "silu"),
    "Qwen3ForCausalLM": ({**DECODER, "head_dim": 8}, "ids", "silu"),
    "GemmaForCausalLM": ({**DECODER, "head_dim": 8}, "ids", "gelu"),
    "Gemma2ForCausalLM": ({**DECODER, "head_dim": 8}, "ids", "gelu"),
    "PhiForCausalLM": (DECODER, "ids", "gelu"),
    "Phi3ForCausalLM": ({**DECODER, "pad_token_id": 0}, "ids", "silu"),
    "StableLmForCausalLM": (DECODER, "ids", "silu"),
    "CohereForCausalLM": (DECODER, "ids", "silu"),
    "OlmoForCausalLM": (DECODER, "ids", "silu"),
    "PersimmonForCausalLM": (DECODER, "ids", "squared_relu"),
    "NemotronForCausalLM": (DECODER, "ids", "squared_relu"),
    "GraniteForCausalLM": (DECODER, "ids", "silu"),
    "Starcoder2ForCausalLM": (DECODER, "ids", "gelu"),
    "MixtralForCausalLM": ({**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, "ids", "silu"),
    "Qwen2MoeForCausalLM": (
        {**DECODER, **MOE, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}, "ids", "silu",
    ),
    "OlmoeForCausalLM": ({**DECODER, **MOE}, "ids", "silu"),
    "MambaForCausalLM": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4}, "ids", "silu"),
    "BertModel": (ENCODER, "ids", "gelu"),
    "RobertaModel": (ENCODER, "ids", "gelu"),
    "AlbertModel": ({**ENCODER, "embedding_size": 16}, "ids", "gelu"),
    "ElectraModel": ({**ENCODER, "embedding_size": 16}, "ids", "gelu"),
    "DistilBertModel": ({"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99}, "ids", "gelu"),
    "DebertaV2Model": (ENCODER, "ids", "gelu"),
    "MPNetModel": (ENCODER, "ids", "gelu"),
    "ModernBertModel": ({**ENCODER, "global_attn_every_n_layers": 2, "local_attention": 8}, "ids", "gelu"),
    "T5Model": (T5, "pair", "relu"),
    "MT5Model": (T5, "pair", "gelu"),
    "BartModel": (SEQ2SEQ, "pair", "gelu"),
    "PegasusModel": (SEQ2SEQ, "pair", "gelu"),
    "MarianModel": (SEQ2SEQ, "pair", "gelu"),
    "WhisperModel": ({**SEQ2SEQ, **WHISPER}, "mel", "gelu"),
    "ViTModel": (VISION, "image", "gelu"),
    "DeiTModel": (VISION, "image", "gelu"),
    "BeitModel": (VISION, "image", "gelu"),
    "Dinov2Model": ({**VISION, "mlp_ratio": 2}, "image", "gelu"),
    "SiglipVisionModel": (VISION, "image", "gelu"),
    "CLIPVisionModel": (VISION, "image", "quick_gelu"),
    "SwinModel": (SWIN, "image", "gelu"),
    "ConvNextModel": (CONVS, "image", "gelu"),
    "ConvNextV2Model": (CONVS, "image", "gelu"),
    "ResNetModel": ({**CONVS, "embedding_size": 8, "layer_type": "basic"}, "image", "relu"),
    "RegNetModel": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4}, "image", "relu"),
    "MobileNetV1Model": ({"depth_multiplier": 0.25, "image_size": 32}, "image", "relu6"),
    "MobileNetV2Model": ({"depth_multiplier": 0.25, "image_size": 32}, "image", "relu6"),
    "EfficientNetModel": ({"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}, "image", "silu"),
    "SegformerModel": ({**SEGFORMER, **PATCHES}, "image", "gelu"),
    "Wav2Vec2Model": (SPEECH, "wave", "gelu"),
    "HubertModel": (SPEECH, "wave", "gelu"),
    "WavLMModel": (SPEECH, "wave", "gelu"),
}  # fmt: skip


def small(name):
    """The model of that name with the inputs that it is called with."""
    options, kind, _ = CASES[name]
    made = getattr(transformers, name)
    config = made.config_class(**options)
    config.use_cache = False
    torch.manual_seed(0)
    model = made(config).eval()
    ids = torch.randint(2, 99, (2, 8))
    inputs = {
        "ids": ((ids,), {}),
        "pair": ((), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}),
        "image": ((torch.randn(2, 3, 32, 32),), {}),
        "wave": ((torch.randn(2, 400),), {}),
        "mel": ((torch.randn(2, 8, 20),), {"decoder_input_ids": ids[:, :5]}),
    }
    return model, *inputs[kind]


@pytest.mark.parametrize("name", CASES)
def test_weights_are_paired_with_the_activations_that_forward_calls(name):
    with torch.random.fork_rng(devices=[]), quiet():
        model, inputs, keywords = small(name)
        with torch.no_grad(), watching(model) as watch:
            model(*inputs, **keywords)
        graph = from_module(model, inputs, keywords)
    assert graph.notes == ()
    assert CASES[name][2] in {activation for _, activation in watch.found}
    fed: dict[str, set[str]] = {}
    for p in pair(graph):
        for constant in {p.tensor, *p.constants}:
            fed.setdefault(constant, set()).update(f.activation.name for f in p.feeds)
    missing = {(w, a, *fed.get(w, ())) for w, a in watch.found if a not in fed.get(w, ())}
    assert not missing, missing
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
    layers = {id(m.weight) for m in model.modules() if type(m) in kinds}
    names = dict(model.named_parameters(remove_duplicate=False))
    seen = {id(names[n]) for n in fed if n in names}
    lost = [n for n, p in model.named_parameters() if id(p) in layers and id(p) not in seen]
    assert lost == [n for n in lost if n in graph.unused]
