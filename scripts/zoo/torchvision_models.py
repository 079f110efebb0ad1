"""Models of torchvision: classifiers, segmentation, detectors, videos."""

import importlib
from typing import Any

import torch
from torch import nn

from .entry import Entry, Inputs, Part, normal, positional

CLASSES = 10
# Those whose smallest size is another one are below.
CLASSIFIERS = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "wide_resnet50_2": 32,
}
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
FIRST_FEW = {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 10}
# An untrained detector gives no object a high score.
BY_REGIONS = {**FIRST_FEW, "box_score_thresh": 0.0, "box_detections_per_img": 5}
BY_ANCHORS = {"score_thresh": 0.0, "detections_per_img": 5, "topk_candidates": 50}
DETECTORS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_fpn": BY_REGIONS,
    "fasterrcnn_resnet50_fpn": BY_REGIONS,
    "maskrcnn_resnet50_fpn": BY_REGIONS,
    "keypointrcnn_resnet50_fpn": {**BY_REGIONS, "num_keypoints": 3},
    "retinanet_resnet50_fpn": BY_ANCHORS,
    "fcos_resnet50_fpn": BY_ANCHORS,
    "ssd300_vgg16": BY_ANCHORS,
    "ssdlite320_mobilenet_v3_large": BY_ANCHORS,
}
FIXED_SIZE = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
"""Detectors that stretch all images to the size in their name."""
PAGE = 64
"""The height and width of the detectors' images."""


def entries() -> list[Entry]:
    """All of them."""
    return [*classifiers(), *segmentation(), *detectors(), *videos()]


def entry(name: str, inputs: Inputs, eval_inputs: Inputs | None = None, **settings: Any) -> Entry:
    """The entry of one of torchvision's building functions.

    Args:
        name: of the function, behind its module's and a dot if it is not in `torchvision.models`.
        inputs: see `Entry`.
        eval_inputs: see `Entry`.
        settings: passed to the function.
    """
    module, _, function = f"torchvision.models.{name}".rpartition(".")

    def build() -> nn.Module:
        library: Any = importlib.import_module(module)
        built: nn.Module = getattr(library, function)(**settings)
        return built

    return Entry(f"torchvision: {name}", "torchvision", build, inputs, eval_inputs=eval_inputs)


def classifiers() -> list[Entry]:
    """Models that say what an image shows."""
    named = [
        entry(name, positional(normal("x", 3, size, size)), num_classes=CLASSES)
        for name, size in CLASSIFIERS.items()
    ]
    return [
        *named,
        entry(
            "inception_v3",
            positional(normal("x", 3, 80, 80)),
            num_classes=CLASSES,
            # Its second head takes images of 299 pixels.
            aux_logits=False,
            init_weights=False,
        ),
        entry(
            "MaxVit",
            positional(normal("x", 3, 64, 64)),
            num_classes=CLASSES,
            input_size=(64, 64),
            stem_channels=16,
            partition_size=4,
            block_channels=[16, 32],
            block_layers=[1, 2],
            head_dim=8,
            stochastic_depth_prob=0.2,
        ),
        entry(
            "VisionTransformer",
            positional(normal("x", 3, 32, 32)),
            num_classes=CLASSES,
            image_size=32,
            patch_size=8,
            num_layers=4,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
        ),
    ]


def segmentation() -> list[Entry]:
    """Models that say what each pixel shows."""
    images = positional(normal("x", 3, 64, 64))
    untrained: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": 5}
    second: dict[str, dict[str, Any]] = {"fcn_resnet50": {"aux_loss": True}}
    return [
        entry(f"segmentation.{name}", images, **untrained, **second.get(name, {}))
        for name in SEGMENTATION
    ]


def detectors() -> list[Entry]:
    """Models that find objects: they give losses in training mode, objects in evaluation mode."""
    made = []
    for name, settings in DETECTORS.items():
        size = {} if name in FIXED_SIZE else {"min_size": PAGE, "max_size": PAGE}
        made.append(
            entry(
                f"detection.{name}",
                positional(photos(), objects(keypoints=settings.get("num_keypoints", 0))),
                eval_inputs=positional(photos()),
                weights=None,
                weights_backbone=None,
                num_classes=2 if "keypoint" in name else 5,
                **size,
                **settings,
            )
        )
    return made


def photos() -> Part:
    """A list of images."""

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {"images": list(torch.rand(rows, 3, PAGE, PAGE, generator=generator))}

    return part


def objects(count: int = 2, *, keypoints: int = 0) -> Part:
    """What is to be found in a list of images.

    Args:
        count: of the objects in an image.
        keypoints: of an object. Objects with keypoints are all of one class.
    """

    def part(rows: int, generator: torch.Generator) -> dict[str, Any]:
        return {"targets": [_target(generator, count, keypoints) for _ in range(rows)]}

    return part


def _target(generator: torch.Generator, count: int, keypoints: int) -> dict[str, torch.Tensor]:
    corner = torch.randint(0, PAGE // 2, (count, 2), generator=generator)
    size = torch.randint(PAGE // 8, PAGE // 2, (count, 2), generator=generator)
    boxes = torch.cat([corner, corner + size], dim=1)
    masks = torch.zeros(count, PAGE, PAGE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.randint(1, 2 if keypoints else 5, (count,), generator=generator)
    target = {"boxes": boxes.float(), "labels": labels, "masks": masks}
    if keypoints:
        inside = torch.rand(count, keypoints, 2, generator=generator) * size[:, None]
        points = corner[:, None] + inside
        target["keypoints"] = torch.cat([points, torch.ones(count, keypoints, 1)], dim=2)
    return target


def videos() -> list[Entry]:
    """Models for clips."""
    clip = positional(normal("x", 3, 4, 32, 32))
    larger = positional(normal("x", 3, 4, 64, 64))
    return [
        entry("video.r3d_18", clip, num_classes=CLASSES),
        entry("video.mc3_18", clip, num_classes=CLASSES),
        entry("video.r2plus1d_18", clip, num_classes=CLASSES),
        entry("video.swin3d_t", larger, num_classes=CLASSES),
        Entry("torchvision: video.mvit.MViT", "torchvision", _mvit, larger),
    ]


def _mvit() -> nn.Module:
    """A small MViT. Those with names take clips of 224 pixels."""
    library: Any = importlib.import_module("torchvision.models.video.mvit")
    kernel, single, double = [3, 3, 3], [1, 1, 1], [1, 2, 2]
    blocks = [
        library.MSBlockConfig(1, 16, 32, kernel, kernel, single, [1, 4, 4]),
        library.MSBlockConfig(2, 32, 32, kernel, kernel, double, double),
        library.MSBlockConfig(2, 32, 64, kernel, kernel, single, double),
        library.MSBlockConfig(4, 64, 64, kernel, kernel, double, single),
    ]
    built: nn.Module = library.MViT(
        spatial_size=(64, 64),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=CLASSES,
    )
    return built
