"""Models of timm: one of each of its architectures, the smallest, and a few more."""

import importlib
from typing import Any

from torch import nn

from .entry import Entry, normal, positional

CLASSES = 10
SIZE = 64
NAMES = (
    "caformer_s18",
    "convmixer_768_32",
    "cpubone_nano",
    "cs3darknet_focus_s",
    "crossvit_tiny_240",
    "csatv2",
    "cspnext_tiny",
    "davit_tiny",
    "densenet121",
    "dla46x_c",
    "dpn48b",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim_dw",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gemma4_vit_167m",
    "ghostnet_050",
    "ghostnetv3_050",
    "hardcorenas_b",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lambda_resnet26t",
    "lcnetv2_small",
    "legacy_seresnet18",
    "legacy_xception",
    "lowformer_b0",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "mvitv2_tiny",
    "naflexvit_base_patch16_parfac_gap",
    "nasnetalarge",
    "nextvit_small",
    "pnasnet5large",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m1",
    "res2net50_14w_8s",
    "res2next50",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "sam2_hiera_tiny",
    "samvit_base_patch16_224",
    "selecsls42",
    "sequencer2d_s",
    "seresnext26d_32x4d",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_efficientnet_gn",
    "test_mambaout",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "tf_efficientnetv2_b0",
    "tiny_vit_5m_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "vit_tiny_patch16_dinov3_qkvb",
    "xception41p",
    "xcit_nano_12_p16_224",
)
"""Models that take images of any size."""

SIZED = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "convit_tiny",
    "deit_tiny_patch16_224",
    "eca_botnext26ts_256",
    "efficientformerv2_s0",
    "eva02_tiny_patch14_224",
    "gcvit_xxtiny",
    "gmlp_ti16_224",
    "hiera_tiny_224",
    "levit_128s",
    "mixer_s16_224",
    "nest_tiny",
    "pit_ti_224",
    "resmlp_12_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "test_coatnet",
    "test_maxvit",
    "test_vit3",
    "test_vit_relpos",
    "tnt_s_legacy_patch16_224",
    "visformer_tiny",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
)
"""Models that are built for one size."""

SIZES = {
    "efficientformer_l1": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
}
"""Other sizes than 64: the smallest that a model takes, or one that it takes in time."""


def entries() -> list[Entry]:
    """All of them, but for those that the installed timm does not know."""
    timm: Any = importlib.import_module("timm")
    known = set(timm.list_models())
    return [
        *(entry(name, {}) for name in NAMES if name in known),
        *(entry(name, {"img_size": SIZES.get(name, SIZE)}) for name in SIZED if name in known),
    ]


def entry(name: str, settings: dict[str, Any]) -> Entry:
    """The entry of one of timm's models.

    Args:
        name: in timm.
        settings: passed to `timm.create_model`.
    """

    def build() -> nn.Module:
        timm: Any = importlib.import_module("timm")
        built: nn.Module = timm.create_model(name, num_classes=CLASSES, **settings)
        return built

    size = SIZES.get(name, SIZE)
    return Entry(f"timm: {name}", "timm", build, positional(normal("x", 3, size, size)))
