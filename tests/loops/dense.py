"""Pictures in, pictures or boxes out: segmentation and detection."""

from importlib import import_module
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import MultiScaleRoIAlign

from .data import digits, generator, loader
from .harness import Expect, Loop, Optimizers
from .networks import conv, frozen, trained


def masks(count: int, size: int) -> TensorDataset:
    """Digits, and which pixels belong to one."""
    x, _ = digits(count, size).tensors
    return TensorDataset(x, (x.mean(1) > 0.1).long())


class UNet(nn.Module):
    """A frozen encoder of three stages, and a decoder that takes the output of each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = frozen(nn.ModuleList([conv(3, 48, 1), conv(48, 64), conv(64, 96)]))
        self.decoder = nn.ModuleList([conv(96 + 64, 32, 1), conv(32 + 48, 16, 1)])
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for stage in self.encoder:
            x = stage(x)
            seen.append(x)
        x = seen.pop()
        for stage in self.decoder:
            x = stage(torch.cat([F.interpolate(x, scale_factor=2.0), seen.pop()], 1))
        logits: Tensor = self.out(x)
        return logits


class Segmentation(Loop):
    """A decoder with skip connections trains on a frozen encoder.

    Who: medical imaging above all, where encoders come from elsewhere.
    Hard: three values of other sizes leave the frozen part. Together they are larger than the
    image. The decoder's batch norms train.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(masks(56, 32), 8)

    def build(self) -> Any:
        return UNet()

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=2e-3)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        model.encoder.eval()

    def step(self, model: Any, batch: Any) -> Tensor:
        x, mask = batch
        return F.cross_entropy(model(x), mask)


class SegmentationModels(Segmentation):
    """The same with `segmentation_models_pytorch`, whose encoder gives a list of values.

    Who: users of that library, who write `model.encoder.requires_grad_(False)`.
    Hard: the first of the encoder's values is the image itself. Three others leave it as well.
    Row: an image.
    """

    NEEDS = ("segmentation_models_pytorch",)

    def __init__(self) -> None:
        self.loader = loader(masks(48, 32), 8)

    def build(self) -> Any:
        smp = import_module("segmentation_models_pytorch")
        model = smp.Unet(
            "resnet18",
            encoder_depth=3,
            encoder_weights=None,
            decoder_channels=(16, 16, 8),
            classes=2,
        )
        model.encoder.requires_grad_(False)
        return model


class Scenes(Dataset[Any]):
    """Pictures of several sizes with one to three digits in them, and boxes around these."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        x, y = digits(120, 16).tensors
        draw = generator(5)
        self.scenes = []
        for row in range(32):
            height, width = sizes[row % len(sizes)]
            picture = 0.3 * torch.rand(3, height, width, generator=draw)
            boxes, labels = [], []
            for digit in range(row, row + 1 + row % 3):
                top = int(torch.randint(height - 16, (), generator=draw))
                left = int(torch.randint(width - 16, (), generator=draw))
                picture[:, top : top + 16, left : left + 16] = (x[digit] + 1) / 2
                boxes.append([left, top, left + 16, top + 16])
                labels.append(1 + int(y[digit] > 4))
            target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}
            self.scenes.append((picture, target))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.scenes[row]


def _lists(samples: list[Any]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    pictures, targets = zip(*samples, strict=True)
    return list(pictures), list(targets)


class Trunk(nn.Module):
    """A frozen backbone as torchvision's detectors want it."""

    out_channels = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 48, 1), conv(48, 64), conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


class Detection(Loop):
    """Faster R-CNN on a frozen backbone, with pictures of several sizes.

    Who: users of torchvision's detection reference.
    Hard: the model is given a list of pictures. It resizes each and pads all to the largest of the
    batch, so a picture's features depend on its mates. Proposals are sampled at random.
    Row: a picture, in a batch of one padded size.
    """

    EXPECT: ClassVar[Expect] = "served or told"

    SIZES: ClassVar[tuple[tuple[int, int], ...]] = ((48, 64), (64, 48), (64, 64), (56, 64))

    def __init__(self) -> None:
        self.loader: DataLoader[Any] = loader(Scenes(list(self.SIZES)), 4, collate=_lists)

    def build(self) -> Any:
        return FasterRCNN(
            frozen(Trunk()),
            min_size=64,
            max_size=96,
            rpn_anchor_generator=AnchorGenerator(((12, 16, 24),), ((1.0,),)),
            box_roi_pool=MultiScaleRoIAlign(["0"], 5, 2),
            box_head=nn.Sequential(nn.Flatten(), nn.Linear(64 * 25, 64), nn.ReLU()),
            box_predictor=_Predictor(),
            rpn_pre_nms_top_n_train=100,
            rpn_post_nms_top_n_train=50,
            box_batch_size_per_image=32,
        )

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(trained(model), lr=0.02, momentum=0.9, weight_decay=1e-4)

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        model.backbone.eval()

    def step(self, model: Any, batch: Any) -> Tensor:
        losses = model(*batch)
        return torch.stack(list(losses.values())).sum()


class _Predictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes, self.boxes = nn.Linear(64, 3), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.classes(x), self.boxes(x)


class DetectionOfOneSize(Detection):
    """FCOS on a frozen backbone; all pictures have one size.

    Who: people with one camera.
    Hard: the model is given a list, checks its targets in python, and counts anchors by size.
    Row: a picture.
    """

    EXPECT = "exact"
    SIZES = ((64, 64),)

    def build(self) -> Any:
        return FCOS(
            frozen(Trunk()),
            num_classes=3,
            min_size=64,
            max_size=64,
            anchor_generator=AnchorGenerator(((16,),), ((1.0,),)),
            head=FCOSHead(64, 1, 3, num_convs=1),
        )

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=1e-3, fused=True)


LOOPS: tuple[type[Loop], ...] = (
    Segmentation,
    SegmentationModels,
    Detection,
    DetectionOfOneSize,
)
