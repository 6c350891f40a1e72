"""Configurations and inputs of models of several modalities."""

from __future__ import annotations

from typing import Any

import torch
from zoo_models import ids, image

_LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**_LAYERS, "vocab_size": 200, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 16,
        "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "projection_dim": 32, "encoder_hidden_size": 64}  # fmt: skip
VISION = {**_LAYERS, "image_size": 32, "patch_size": 8, "projection_dim": 32}
_IMAGE_TOKEN = 199


def made(config_class: type, kind: str) -> tuple[Any, Any]:
    """The configuration and the inputs by name."""
    name = config_class.__name__
    if kind == "vilt":
        config = config_class(**VISION, vocab_size=200, max_position_embeddings=64, num_labels=5)
        return config, {"input_ids": ids(), "pixel_values": image(32)}
    if kind == "clap":
        audio = {"hidden_size": 64, "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 4],
                 "spec_size": 32, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "window_size": 4,
                 "projection_dim": 32, "aff_block_r": 1, "enable_fusion": False}  # fmt: skip
        config = config_class(text_config=TEXT, audio_config=audio, projection_dim=32)
        return config, {"input_ids": ids(), "input_features": torch.randn(8, 1, 64, 8)}
    if kind == "llava":
        from transformers import CLIPVisionConfig, GemmaConfig, LlamaConfig, SiglipVisionConfig

        gemma = name.startswith("PaliGemma")
        text = (GemmaConfig if gemma else LlamaConfig)(**TEXT)
        vision = (SiglipVisionConfig if gemma else CLIPVisionConfig)(**VISION)
        config = config_class(
            text_config=text, vision_config=vision, image_token_index=_IMAGE_TOKEN, image_token_id=_IMAGE_TOKEN
        )
        numbers = ids(32, rows=190)
        numbers[:, :16] = _IMAGE_TOKEN  # one for each of the 4x4 patches
        return config, {"input_ids": numbers, "pixel_values": image(32)}
    vision = {} if name.startswith("Align") else VISION
    if name.startswith("Align"):
        vision = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}
    extra = {"multimodal_config": {**_LAYERS}} if name.startswith("Flava") else {}
    key = "image_config" if name.startswith("Flava") else "vision_config"
    config = config_class(text_config=TEXT, **{key: vision}, projection_dim=32, **extra)
    return config, {"input_ids": ids(), "pixel_values": image(64 if name.startswith("Align") else 32)}
