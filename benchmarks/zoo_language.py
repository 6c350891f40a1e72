"""Models of transformers: text, speech, vision, several of these together; small configurations, random weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from zoo_models import Built, Model, ids, image, options

_SIZE = "hidden_size=64 intermediate_size=128 num_hidden_layers=3 num_attention_heads=4 vocab_size=200 pad_token_id=1"
_DECODER = f"{_SIZE} num_key_value_heads=2 max_position_embeddings=64 head_dim=16"
_ENCODER = f"{_SIZE} max_position_embeddings=64"
_GPT = "n_embd=64 n_layer=3 n_head=4 vocab_size=200 n_positions=64"
_SEQ2SEQ = """d_model=64 vocab_size=200 encoder_layers=2 decoder_layers=2 encoder_attention_heads=4 decoder_attention_heads=4
 encoder_ffn_dim=128 decoder_ffn_dim=128 max_position_embeddings=64 pad_token_id=1 decoder_start_token_id=2"""
_T5 = "d_model=64 d_ff=128 d_kv=16 num_heads=4 num_layers=2 num_decoder_layers=2 vocab_size=200 decoder_start_token_id=2"
_MOE = "num_experts=4 num_experts_per_tok=2 moe_intermediate_size=32 num_local_experts=4"
_SPEECH = f"{_SIZE} num_conv_pos_embeddings=16 num_conv_pos_embedding_groups=4 conv_dim=32,32 conv_kernel=10,3 conv_stride=5,2"
_WHISPER = "num_mel_bins=16 max_source_positions=24 max_target_positions=64"
_SSM = "hidden_size=64 num_hidden_layers=3 vocab_size=200 state_size=8"
_VIT = "image_size=64 patch_size=16 hidden_size=64 intermediate_size=128 num_hidden_layers=3 num_attention_heads=4"
_CONVS = "hidden_sizes=16,32,64 depths=2,2,2 num_stages=3"
_DETR = "d_model=256 encoder_layers=2 decoder_layers=2 encoder_attention_heads=4 decoder_attention_heads=4 num_queries=10"

# family: lines of class, kind of input, configuration.
TABLE: Mapping[str, str] = {
    "decoder": f"""
        GPT2LMHeadModel ids {_GPT}; OpenAIGPTLMHeadModel ids {_GPT}; GPTNeoXForCausalLM ids {_ENCODER}
        GPTNeoForCausalLM ids hidden_size=64 num_layers=24 num_heads=4 vocab_size=200 window_size=8
        GPTJForCausalLM ids {_GPT} rotary_dim=8; CodeGenForCausalLM ids {_GPT} rotary_dim=8; GPTBigCodeForCausalLM ids {_GPT}
        BloomForCausalLM ids hidden_size=64 n_layer=3 n_head=4 vocab_size=200; FalconForCausalLM ids {_SIZE}
        OPTForCausalLM ids {_ENCODER} ffn_dim=128 word_embed_proj_dim=64; LlamaForCausalLM ids {_DECODER}
        MistralForCausalLM ids {_DECODER}; Qwen2ForCausalLM ids {_DECODER}; Qwen3ForCausalLM ids {_DECODER}
        GemmaForCausalLM ids {_DECODER}; Gemma2ForCausalLM ids {_DECODER}; Gemma3ForCausalLM ids {_DECODER}
        PhiForCausalLM ids {_DECODER}; Phi3ForCausalLM ids {_DECODER}; StableLmForCausalLM ids {_DECODER}
        CohereForCausalLM ids {_DECODER}; OlmoForCausalLM ids {_DECODER}; Olmo2ForCausalLM ids {_DECODER}
        PersimmonForCausalLM ids {_DECODER}; NemotronForCausalLM ids {_DECODER}; GraniteForCausalLM ids {_DECODER}
        Starcoder2ForCausalLM ids {_DECODER}; SmolLM3ForCausalLM ids {_DECODER}; GlmForCausalLM ids {_DECODER}
        BioGptForCausalLM ids {_ENCODER}; XGLMForCausalLM ids d_model=64 ffn_dim=128 num_layers=3
        attention_heads=4 vocab_size=200
        CTRLLMHeadModel ids {_GPT} dff=128; Exaone4ForCausalLM ids {_DECODER}; SeedOssForCausalLM ids {_DECODER}
        HeliumForCausalLM ids {_DECODER}; Lfm2ForCausalLM ids {_DECODER}; MptForCausalLM ids d_model=64 n_heads=4
        n_layers=3 vocab_size=200
        DeepseekV3ForCausalLM ids {_SIZE} num_key_value_heads=4 q_lora_rank=32 kv_lora_rank=16
        qk_rope_head_dim=8 qk_nope_head_dim=8 v_head_dim=16 n_routed_experts=4 num_experts_per_tok=2 n_group=1
        topk_group=1 moe_intermediate_size=32 first_k_dense_replace=1""",
    "encoder": f"""
        BertForMaskedLM ids {_ENCODER}; BertForSequenceClassification ids {_ENCODER}; RobertaForMaskedLM ids {_ENCODER}
        AlbertForMaskedLM ids {_ENCODER} embedding_size=32; ElectraForMaskedLM ids {_ENCODER} embedding_size=32
        DistilBertForMaskedLM ids dim=64 n_layers=3 n_heads=4 hidden_dim=128 vocab_size=200 max_position_embeddings=64
        DebertaV2ForMaskedLM ids {_ENCODER}; MPNetForMaskedLM ids {_ENCODER}; CamembertForMaskedLM ids {_ENCODER}
        ModernBertForMaskedLM ids {_ENCODER} global_attn_every_n_layers=2 local_attention=8; XLMRobertaForMaskedLM ids
        {_ENCODER}
        ConvBertForMaskedLM ids {_ENCODER} embedding_size=64; FNetForMaskedLM ids {_ENCODER}; RoFormerForMaskedLM ids
        {_ENCODER}
        SqueezeBertForMaskedLM ids {_ENCODER} embedding_size=64 q_groups=1 k_groups=1 v_groups=1
        MobileBertForMaskedLM ids {_ENCODER} embedding_size=32 intra_bottleneck_size=64 true_hidden_size=64
        LayoutLMForMaskedLM ids {_ENCODER}; EsmForMaskedLM ids {_ENCODER} mask_token_id=4; NystromformerForMaskedLM ids
        {_ENCODER} segment_means_seq_len=16 num_landmarks=4""",
    "encoder-decoder": f"""
        T5ForConditionalGeneration pair {_T5}; MT5ForConditionalGeneration pair {_T5}; BartForConditionalGeneration pair
        {_SEQ2SEQ}
        PegasusForConditionalGeneration pair {_SEQ2SEQ}; MarianMTModel pair {_SEQ2SEQ}; MBartForConditionalGeneration pair
        {_SEQ2SEQ}
        M2M100ForConditionalGeneration pair {_SEQ2SEQ}; BlenderbotForConditionalGeneration pair {_SEQ2SEQ}
        ProphetNetForConditionalGeneration pair hidden_size=64 vocab_size=200 num_encoder_layers=2
        num_decoder_layers=2 num_encoder_attention_heads=4 num_decoder_attention_heads=4
        encoder_ffn_dim=128 decoder_ffn_dim=128 pad_token_id=1
        LEDForConditionalGeneration pair {_SEQ2SEQ} attention_window=8
        max_encoder_position_embeddings=64 max_decoder_position_embeddings=64""",
    "mixture of experts": f"""
        MixtralForCausalLM ids {_DECODER} {_MOE}; Qwen2MoeForCausalLM ids {_DECODER} {_MOE} shared_expert_intermediate_size=32
        OlmoeForCausalLM ids {_DECODER} {_MOE}; Qwen3MoeForCausalLM ids {_DECODER} {_MOE}; GraniteMoeForCausalLM ids
        {_DECODER} {_MOE}
        SwitchTransformersForConditionalGeneration pair {_T5} num_experts=4
        num_sparse_encoder_layers=1 num_sparse_decoder_layers=1
        GptOssForCausalLM ids {_DECODER} {_MOE}; PhimoeForCausalLM ids {_DECODER} {_MOE}; JetMoeForCausalLM ids {_DECODER}
        {_MOE} kv_channels=16""",
    "state-space": f"""
        MambaForCausalLM ids {_SSM}; Mamba2ForCausalLM ids {_SSM} num_heads=4 head_dim=32 n_groups=1
        FalconMambaForCausalLM ids {_SSM}; RwkvForCausalLM ids hidden_size=64 num_hidden_layers=3
        vocab_size=200 attention_hidden_size=64
        RecurrentGemmaForCausalLM ids {_SIZE} num_key_value_heads=1 lru_width=64 attention_window_size=8
        Qwen3NextForCausalLM ids {_DECODER} {_MOE} shared_expert_intermediate_size=32
        linear_num_value_heads=4 linear_num_key_heads=2 linear_key_head_dim=16 linear_value_head_dim=16
        BambaForCausalLM ids {_DECODER} mamba_n_heads=4 mamba_d_head=32 mamba_n_groups=1 mamba_d_state=8 attn_layer_indices=1,
        xLSTMForCausalLM ids hidden_size=64 num_hidden_layers=2 num_blocks=2 vocab_size=200 num_heads=4""",
    "speech": f"""
        Wav2Vec2ForCTC wave {_SPEECH}; HubertForCTC wave {_SPEECH}; WavLMForCTC wave {_SPEECH}; UniSpeechForCTC wave {_SPEECH}
        SEWForCTC wave {_SPEECH} squeeze_factor=2; Data2VecAudioForCTC wave {_SPEECH}; Wav2Vec2BertForCTC features
        {_SIZE} feature_projection_input_dim=32
        WhisperForConditionalGeneration mel {_SEQ2SEQ} {_WHISPER}
        Speech2TextForConditionalGeneration mels {_SEQ2SEQ} input_feat_per_channel=16
        max_source_positions=64 max_target_positions=64 conv_channels=32
        ASTForAudioClassification spectrogram {_SIZE} num_mel_bins=32 max_length=32; EncodecModel sound
        audio_channels=1 num_filters=8 hidden_size=32 codebook_size=32""",
    "transformer vision": f"""
        ViTForImageClassification image {_VIT}; BeitForImageClassification image
        {_VIT}; Dinov2ForImageClassification image {_VIT}
        SiglipVisionModel image {_VIT}; CLIPVisionModel image {_VIT}; ViTMAEForPreTraining image {_VIT}
        decoder_hidden_size=32 decoder_intermediate_size=64 decoder_num_hidden_layers=2
        SwinForImageClassification image image_size=64 patch_size=4 embed_dim=32 depths=2,2,2 num_heads=2,4,8 window_size=4
        PvtV2ForImageClassification image image_size=64 hidden_sizes=16,32,80,128 depths=1,1,1,1""",
    "convnext": f"""
        ConvNextForImageClassification image {_CONVS}; ConvNextV2ForImageClassification image {_CONVS}
        PoolFormerForImageClassification image hidden_sizes=16,32,64,64 depths=2,2,2,2
        FocalNetForImageClassification image image_size=64 embed_dim=32 depths=2,2,2 hidden_sizes=32,64,128
        focal_levels=2,2,2 focal_windows=3,3,3""",
    "dense prediction": f"""
        SegformerForSemanticSegmentation image num_encoder_blocks=4 depths=2,2,2,2
        hidden_sizes=16,32,64,64 num_attention_heads=1,2,4,4 decoder_hidden_size=64
        YolosForObjectDetection image {_VIT} num_detection_tokens=10
        DetrForObjectDetection image {_DETR} use_timm_backbone=False use_pretrained_backbone=False
        GLPNForDepthEstimation image num_encoder_blocks=4 depths=1,1,1,1 hidden_sizes=16,32,64,64
        num_attention_heads=1,2,4,4 decoder_hidden_size=32
        Swin2SRForImageSuperResolution image32 image_size=32 patch_size=1 embed_dim=32 depths=2,2 num_heads=2,2
        window_size=8 num_channels=3
        DPTForDepthEstimation image {_VIT} num_hidden_layers=4 backbone_out_indices=0,1,2,3
        neck_hidden_sizes=96,192,384,768 fusion_hidden_size=256 is_hybrid=False""",
    "multimodal": """
        CLIPModel image+ids text vision; SiglipModel image+ids text vision; BlipForImageTextRetrieval image+ids text vision
        LlavaForConditionalGeneration llava -; ViltForQuestionAnswering vilt -; FlavaModel image+ids text vision
        AltCLIPModel image+ids text vision; ClapModel clap -; PaliGemmaForConditionalGeneration llava -
        AlignModel image+ids text -""",
    "time series": """
        PatchTSTForPrediction series num_input_channels=4 context_length=64 patch_length=8 patch_stride=8
        d_model=64 num_hidden_layers=2 num_attention_heads=4 ffn_dim=128 prediction_length=8
        PatchTSMixerForPrediction series num_input_channels=4 context_length=64 patch_length=8 patch_stride=8
        d_model=32 num_layers=3 prediction_length=8""",
    "reinforcement": """
        DecisionTransformerModel decision state_dim=8 act_dim=3 hidden_size=64 n_layer=2 n_head=4 max_ep_len=64""",
}


def models() -> Iterator[Model]:
    """One entry for each line of the table; none where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return
    for family, text in TABLE.items():
        for line in _lines(text):
            name, kind, *rest = line.split()
            yield Model(f"transformers:{name}", family, _builder(name, kind, " ".join(rest)), "transformers")


def _lines(text: str) -> list[str]:
    """Entries: a new one begins after a semicolon or where a line's first word is no option."""
    found: list[str] = []
    for line in text.replace(";", "\n").splitlines():
        if "=" in line.split(" ")[0].strip() or (line.strip() and "=" in line.split()[0]):
            found[-1] += " " + line
        elif line.strip():
            found.append(line)
    return found


def _builder(name: str, kind: str, rest: str) -> Callable[[], Built]:
    def build() -> Built:
        import transformers

        made = getattr(transformers, name)
        if kind in ("image+ids", "llava", "vilt", "clap"):
            import zoo_multimodal

            config, inputs = zoo_multimodal.made(made.config_class, kind)
        else:
            keywords = {k: list(v) if isinstance(v, tuple) else v for k, v in options(rest).items()}
            config, inputs = made.config_class(**keywords), _inputs(kind)
        for part in (config, *vars(config).values()):
            if hasattr(part, "use_cache"):
                part.use_cache = False
        return made(config), inputs

    return build


def _inputs(kind: str) -> Any:
    if kind in ("image", "image32"):
        return (image(64 if kind == "image" else 32),)
    made: dict[str, Callable[[], Any]] = {
        "ids": lambda: (ids(),),
        "pair": lambda: {"input_ids": ids(), "decoder_input_ids": ids(8)},
        "wave": lambda: (torch.randn(8, 400),),
        "features": lambda: (torch.randn(8, 16, 32),),
        "mel": lambda: {"input_features": torch.randn(8, 16, 48), "decoder_input_ids": ids(8)},
        "mels": lambda: {"input_features": torch.randn(8, 48, 16), "decoder_input_ids": ids(8)},
        "spectrogram": lambda: (torch.randn(8, 32, 32),),
        "sound": lambda: (torch.randn(8, 1, 3200),),
        "series": lambda: (torch.randn(8, 64, 4),),
        "decision": lambda: {
            "states": torch.randn(8, 6, 8), "actions": torch.randn(8, 6, 3), "rewards": torch.randn(8, 6, 1),
            "returns_to_go": torch.randn(8, 6, 1), "timesteps": torch.arange(6).repeat(8, 1),
        },
    }  # fmt: skip
    return made[kind]()
