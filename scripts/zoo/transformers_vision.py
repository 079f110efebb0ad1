"""Models of transformers for images and videos."""

from typing import Any

from .entry import Entry, keywords, normal, uniform
from .transformers_models import WIDTH, model

CLASSIFY, SEGMENT = "ForImageClassification", "ForSemanticSegmentation"
DETECT, DEPTH, VIDEO = "ForObjectDetection", "ForDepthEstimation", "ForVideoClassification"
SMALL = keywords(normal("pixel_values", 3, 32, 32))
LARGE = keywords(normal("pixel_values", 3, 64, 64))
CLIP = keywords(normal("pixel_values", 4, 3, 32, 32))

LOUD = {"initializer_range": 0.5}
"""For models whose untrained output would be the same for all images, but for rounding."""

VIT: dict[str, Any] = {**WIDTH, "image_size": 32, "patch_size": 8}
DINO: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
FRAMES: dict[str, Any] = {**VIT, "num_frames": 4}
RESNET: dict[str, Any] = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
STAGES: dict[str, Any] = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
SEGFORMER: dict[str, Any] = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
}
SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 64,
    "patch_size": 4,
}
DETR: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "num_queries": 10,
}


def backbone(model_type: str, stages: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model whose stages another one reads."""
    return {"model_type": model_type, "out_features": stages, **settings}


RESNET_BACKBONE = backbone("resnet", ["stage4"], RESNET)
RESNET_PYRAMID = backbone("resnet", ["stage1", "stage2", "stage3", "stage4"], RESNET)
SWIN_PYRAMID = backbone(
    "swin",
    ["stage1", "stage2", "stage3", "stage4"],
    {**SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 4, 4]},
)


def entries() -> list[Entry]:
    """All of them."""
    return [*transformers(), *convolutions(), *dense(), *detectors(), *videos()]


def transformers() -> list[Entry]:
    """Classifiers and encoders with attention."""
    return [
        model("ViT", CLASSIFY, SMALL, VIT),
        model("DeiT", CLASSIFY, SMALL, VIT),
        model("Dinov2", CLASSIFY, SMALL, {**DINO, "mlp_ratio": 2}),
        model("DINOv3ViT", "Model", SMALL, {**VIT, "num_register_tokens": 2}),
        model("Beit", CLASSIFY, SMALL, VIT),
        model("Data2VecVision", CLASSIFY, SMALL, VIT),
        model("CLIPVision", "Model", SMALL, VIT),
        model("SiglipVision", "Model", SMALL, VIT),
        # Without noise it would draw its own, to choose the patches that it hides.
        model(
            "ViTMAE",
            "Model",
            keywords(normal("pixel_values", 3, 32, 32), uniform("noise", 16)),
            VIT,
        ),
        model("Swin", CLASSIFY, LARGE, SWIN),
        model("Swinv2", CLASSIFY, LARGE, SWIN),
        model(
            "Levit",
            CLASSIFY,
            LARGE,
            {
                "image_size": 64,
                "hidden_sizes": [32, 48, 64],
                "num_attention_heads": [2, 3, 4],
                "depths": [1, 1, 1],
                "key_dim": [8, 8, 8],
                **LOUD,
                "down_ops": [["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 6, 2, 2, 2]],
            },
        ),
        model(
            "MobileViT",
            CLASSIFY,
            LARGE,
            {
                "image_size": 64,
                "hidden_sizes": [32, 48, 64],
                "neck_hidden_sizes": [8, 8, 16, 24, 32, 48, 64],
                **LOUD,
            },
        ),
        model(
            "Pvt",
            CLASSIFY,
            LARGE,
            {
                "image_size": 64,
                "hidden_sizes": [16, 32, 40, 64],
                "depths": [1, 1, 1, 1],
                "num_labels": 10,
            },
        ),
        model(
            "PvtV2",
            CLASSIFY,
            LARGE,
            {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1]},
        ),
        model(
            "Cvt",
            CLASSIFY,
            LARGE,
            {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        ),
        model(
            "Hiera",
            CLASSIFY,
            keywords(normal("pixel_values", 3, 128, 128)),
            {
                "image_size": [128, 128],
                "embed_dim": 16,
                "depths": [1, 1, 2, 1],
                "num_heads": [1, 2, 4, 8],
            },
        ),
        model(
            "SamVision",
            "Model",
            LARGE,
            {
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "output_channels": 32,
                "image_size": 64,
                "patch_size": 8,
                "window_size": 3,
                "global_attn_indexes": [1, 3],
                "mlp_dim": 128,
                "initializer_range": 0.02,
            },
        ),
    ]


def convolutions() -> list[Entry]:
    """Classifiers without attention."""
    return [
        model("ConvNext", CLASSIFY, LARGE, {**STAGES, "image_size": 64}),
        model("ConvNextV2", CLASSIFY, LARGE, {**STAGES, "image_size": 64}),
        model("DINOv3ConvNext", "Model", LARGE, {**STAGES, "image_size": 64}),
        model("ResNet", CLASSIFY, LARGE, RESNET),
        model(
            "RegNet",
            CLASSIFY,
            LARGE,
            {**STAGES, "embedding_size": 16, "groups_width": 8},
        ),
        model(
            "Bit",
            CLASSIFY,
            LARGE,
            {**STAGES, "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128], "num_groups": 8},
        ),
        model("MobileNetV1", CLASSIFY, LARGE, {"image_size": 64, "depth_multiplier": 0.25}),
        model("MobileNetV2", CLASSIFY, LARGE, {"image_size": 64, "depth_multiplier": 0.35}),
        model(
            "EfficientNet",
            CLASSIFY,
            LARGE,
            {
                "image_size": 64,
                "width_coefficient": 0.25,
                "depth_coefficient": 0.5,
                "hidden_dim": 320,
                **LOUD,
            },
        ),
        model(
            "PoolFormer",
            CLASSIFY,
            LARGE,
            {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1], "num_encoder_blocks": 4},
        ),
        model("FocalNet", CLASSIFY, LARGE, {"image_size": 64, "embed_dim": 16, "depths": [1, 1]}),
    ]


def dense() -> list[Entry]:
    """Models with an output for each pixel."""
    return [
        model("Segformer", SEGMENT, LARGE, SEGFORMER),
        model(
            "UperNet",
            SEGMENT,
            LARGE,
            {
                "backbone_config": RESNET_PYRAMID,
                "hidden_size": 32,
                "pool_scales": [1, 2],
                "use_auxiliary_head": False,
                "num_labels": 5,
            },
        ),
        model("MobileNetV2", SEGMENT, LARGE, {"image_size": 64, "depth_multiplier": 0.35}),
        model(
            "Beit",
            SEGMENT,
            LARGE,
            {**VIT, "image_size": 64, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False},
        ),
        model(
            "DPT",
            DEPTH,
            LARGE,
            {
                **VIT,
                "image_size": 64,
                "backbone_out_indices": [0, 1, 2, 3],
                "neck_hidden_sizes": [16, 16, 32, 32],
                "fusion_hidden_size": 16,
                **LOUD,
            },
        ),
        model("GLPN", DEPTH, LARGE, SEGFORMER),
        model(
            "DepthAnything",
            DEPTH,
            SMALL,
            {
                "backbone_config": backbone(
                    "dinov2",
                    ["stage1", "stage2", "stage3", "stage4"],
                    {**DINO, "mlp_ratio": 2, "reshape_hidden_states": False},
                ),
                "patch_size": 8,
                "reassemble_hidden_size": 64,
                "neck_hidden_sizes": [16, 16, 32, 32],
                "fusion_hidden_size": 16,
                "head_hidden_size": 8,
            },
        ),
        model(
            "MaskFormer",
            "ForInstanceSegmentation",
            LARGE,
            {
                "backbone_config": SWIN_PYRAMID,
                "decoder_config": {"model_type": "detr", **DETR},
                "fpn_feature_size": 32,
                "mask_feature_size": 32,
            },
        ),
        model(
            "Mask2Former",
            "ForUniversalSegmentation",
            LARGE,
            {
                "backbone_config": SWIN_PYRAMID,
                "feature_size": 32,
                "mask_feature_size": 32,
                "hidden_dim": 32,
                "encoder_feedforward_dim": 64,
                "encoder_layers": 2,
                "decoder_layers": 3,
                "dim_feedforward": 64,
                "num_attention_heads": 4,
                "num_queries": 10,
            },
        ),
        model(
            "Swin2SR",
            "ForImageSuperResolution",
            SMALL,
            {
                "image_size": 32,
                "embed_dim": 16,
                "depths": [2, 2],
                "num_heads": [2, 2],
                "window_size": 4,
            },
        ),
    ]


def detectors() -> list[Entry]:
    """Models that find objects."""
    return [
        model("Detr", DETECT, LARGE, {**DETR, "backbone_config": RESNET_BACKBONE}),
        model("ConditionalDetr", DETECT, LARGE, {**DETR, "backbone_config": RESNET_BACKBONE}),
        model(
            "DeformableDetr",
            DETECT,
            LARGE,
            {
                **DETR,
                "backbone_config": backbone("resnet", ["stage2", "stage3", "stage4"], RESNET),
                "num_feature_levels": 3,
            },
        ),
        model("Yolos", DETECT, LARGE, {**VIT, "image_size": [64, 64], "num_detection_tokens": 10}),
    ]


def videos() -> list[Entry]:
    """Models for clips."""
    return [
        model("VideoMAE", VIDEO, CLIP, FRAMES),
        model("Timesformer", VIDEO, CLIP, FRAMES),
        model(
            "Vivit",
            VIDEO,
            CLIP,
            {**WIDTH, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        ),
    ]
