"""Vision models of timm and torchvision, the smallest of each family, on small images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

from zoo_models import Built, Model, image, options

# family: lines of name, image side, options. Depths and widths are cut where a family has no small member; what repeats stays.
TIMM = {
    "plain": """
        vgg11 64; vgg11_bn 64; repvgg_a0 64; selecsls42b 64; vovnet39a 64; xception41 64; inception_v4 96; legacy_xception 64
        mobileone_s0 64; convmixer_1024_20_ks9_p14 70; starnet_s050 64; hgnetv2_b0 64; cspdarknet53 64
        inception_v3 96""",
    "residual": """
        resnet10t 64; resnet18 64; resnet26d 64; resnetv2_50 64 layers=2,2,2,2; seresnet18 64; skresnet18 64; resnest14d 64
        res2net50_26w_4s 64 layers=1,1,1,1; regnetx_002 64; regnety_002 64; ecaresnet26t 64; resnet50_gn 64 layers=1,1,1,1
        nf_resnet26 64; nfnet_l0 64; test_nfnet 64; gernet_s 64; dla46_c 64; hrnet_w18_small 64; tresnet_m 64
        inception_resnet_v2 96; lambda_resnet26t 128; botnet26t_256 256; wide_resnet50_2 64; resnetv2_50x1_bit 64; dpn48b 64
        test_resnet 64; rexnet_100 64; legacy_seresnet18 64; gcresnet33ts 64""",
    "dense": "densenet121 64; rdnet_tiny 64; ese_vovnet19b_dw 64; cspresnet50 64",
    "mobile": """
        mobilenetv2_035 64; mobilenetv3_small_050 64; mobilenetv4_conv_small_035 64; efficientnet_lite0 64; efficientnet_b0 64
        mnasnet_small 64; tinynet_e 64; fbnetc_100 64; mixnet_s 64; ghostnet_050 64; ghostnetv3_050 64; lcnet_035 64
        hardcorenas_a 64; repghostnet_050 64; repvit_m0_9 64; fasternet_t0 64; edgenext_xx_small 64; mobilevit_xxs 64
        mobilevitv2_050 64; efficientformerv2_s0 224; efficientformer_l1 224; efficientvit_b0 64; efficientvit_m0 224
        swiftformer_xs 64; fastvit_t8 64; shvit_s1 64; test_efficientnet 64; test_efficientnet_gn 64; lowformer_b0 64""",
    "convnext": """
        convnext_atto 64; convnextv2_atto 64; convnext_atto_ols 64; inception_next_atto 64; mambaout_femto 64
        focalnet_tiny_srf 64
        convformer_s18 64; poolformer_s12 64; poolformerv2_s12 64; nextvit_small 64; test_convnext 64; test_convnext2 64""",
    "transformer vision": """
        vit_tiny_patch16_224 64 img_size=64 depth=6; deit_tiny_patch16_224 64 img_size=64 depth=6
        cait_xxs24_224 64 img_size=64
        deit3_small_patch16_224 64 img_size=64 depth=4; beit_base_patch16_224 64 img_size=64 depth=4 embed_dim=192 num_heads=3
        beitv2_base_patch16_224 64 img_size=64 depth=4 embed_dim=192 num_heads=3
        eva02_tiny_patch14_224 56 img_size=56 depth=6
        convit_tiny 64 img_size=64; crossvit_tiny_240 240; davit_tiny 64 depths=1,1,3,1; gcvit_xxtiny 224; hiera_tiny_224 224
        levit_128s 224; maxvit_rmlp_pico_rw_256 256; test_maxvit 64 img_size=64; coatnet_pico_rw_224 224
        test_coatnet 64 img_size=64
        mvitv2_tiny 64 img_size=64; nest_tiny_jx 224; pit_ti_224 224; pvt_v2_b0 64; coat_lite_tiny 64 img_size=64
        swin_tiny_patch4_window7_224 64 img_size=64 window_size=2 depths=2,2,2,2; tiny_vit_5m_224 224
        swinv2_tiny_window8_256 64 img_size=64 window_size=2 depths=2,2,2,2
        swinv2_cr_tiny_ns_224 64 img_size=64 window_size=2
        tnt_s_legacy_patch16_224 64 img_size=64 depth=4; twins_pcpvt_small 64 img_size=64; twins_svt_small 64 img_size=64
        visformer_tiny 64 img_size=64; vit_tiny_r_s16_p8_224 64 img_size=64
        vit_relpos_small_patch16_224 64 img_size=64 depth=4
        vit_small_patch16_rope_224 64 img_size=64 depth=4; vitamin_small_224 64 img_size=64; volo_d1_224 64 img_size=64
        xcit_nano_12_p16_224 64 img_size=64; caformer_s18 64; test_vit 64 img_size=64; test_vit3 64 img_size=64
        test_vit4 64 img_size=64
        vit_srelpos_small_patch16_224 64 img_size=64 depth=4; sequencer2d_s 64 layers=1,1,2,1
        samvit_base_patch16 64 img_size=64 depth=4 embed_dim=192 num_heads=3 global_attn_indexes=1,3
        vit_small_patch16_dinov3 64 img_size=64 depth=4
        vit_base_patch16_clip_224 64 img_size=64 depth=4 embed_dim=192 num_heads=3""",
    "mixer": """
        mixer_s32_224 224; gmixer_12_224 64 img_size=64; resmlp_12_224 64 img_size=64
        gmlp_ti16_224 64 img_size=64""",
}
TORCHVISION = {
    "plain": "alexnet 224; vgg11 64; squeezenet1_1 64; googlenet 224; inception_v3 299",
    "residual": "resnet18 64; resnext50_32x4d 64; wide_resnet50_2 64; regnet_x_400mf 64; regnet_y_400mf 64",
    "dense": "densenet121 64",
    "mobile": """
        mobilenet_v2 64; mobilenet_v3_small 64; shufflenet_v2_x0_5 64; mnasnet0_5 64; efficientnet_b0 64
        efficientnet_v2_s 64""",
    "convnext": "convnext_tiny 64",
    "transformer vision": """
        swin_t 64; swin_v2_t 256; maxvit_t 224; vit_b_32 64 image_size=64""",
    "video": "r3d_18 32; mc3_18 32; r2plus1d_18 32; s3d 224; swin3d_t 32",
    "dense prediction": """
        fcn_resnet50 64; deeplabv3_mobilenet_v3_large 64; lraspp_mobilenet_v3_large 64; raft_small 128""",
}


def models() -> Iterator[Model]:
    """One entry for each line of the tables whose package is installed."""
    for package, table in (("timm", TIMM), ("torchvision", TORCHVISION)):
        if importlib.util.find_spec(package) is None:
            continue
        for family, text in table.items():
            for line in text.replace("\n", ";").split(";"):
                if line.strip():
                    name, size, *rest = line.split()
                    yield Model(f"{package}:{name}", family, _builder(package, name, int(size), " ".join(rest)), package)


def _builder(package: str, name: str, size: int, rest: str) -> Callable[[], Built]:
    def build_timm() -> Built:
        import timm

        return timm.create_model(name, pretrained=False, **options(rest)), (image(size, 8 if size < 128 else 4),)

    def build_torchvision() -> Built:
        import torchvision

        keywords = dict(options(rest))
        if name in ("googlenet", "inception_v3"):
            keywords["init_weights"] = True
        if name.startswith(("fcn", "deeplab", "lraspp")):
            keywords["weights_backbone"] = None
        made = torchvision.models.get_model(name, weights=None, **keywords)
        if name in ("r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t"):
            import torch

            frames = 16 if name == "s3d" else 8
            return made, (torch.randn(4, 3, frames, size, size),)
        x = image(size, 8 if size < 128 else 4)
        return made, (x, x.flip(0)) if name.startswith("raft") else (x,)

    return build_timm if package == "timm" else build_torchvision
