"""Classifiers on frozen networks: what the data set and the loop do with their images."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

from .data import digits, generator, loader
from .harness import Loop
from .networks import Classifier, backbone, correct, frozen, trained


class Head(Loop):
    """Base of the loops of this file: a linear head on a frozen backbone."""

    def build(self) -> Any:
        model = Classifier()
        frozen(model.backbone)
        return model

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.train()
        model.backbone.eval()

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return SGD(model.head.parameters(), lr=0.1, momentum=0.9)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)


class HeadOnResNet(Head):
    """A new last layer on a frozen ResNet, the first exercise of every course.

    Who: everybody who follows a transfer learning tutorial. All parameters are frozen, then `fc` is
    replaced.
    Hard: the batch size does not divide the data set. The three rows of the short batch come from
    other kernels, so their bits may differ from those that the same rows have in a full batch.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(99), 16)
        self.held_back = DataLoader(digits(40, first=100), 20)

    def build(self) -> Any:
        model = ResNet(BasicBlock, [1, 1, 1, 1])
        model.requires_grad_(False)
        model.fc = nn.Linear(512, 10)
        return model

    def on_epoch(self, model: Any, epoch: int) -> None:
        model.eval()

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return SGD(model.fc.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)

    def validate(self, model: Any) -> Tensor:
        with torch.no_grad():
            return torch.stack([correct(model(x), y) for x, y in self.held_back])


class RandomCrops(Head):
    """Random crops and flips in the data set: no image comes a second time.

    Who: everybody who copies the transforms of an ImageNet script into a frozen-backbone loop.
    Hard: a row number comes again with other pixels. Entries are written and never read.
    Row: an image, never the same twice.
    """

    EXPECT = "refuse"

    class Augmented(Dataset[Any]):
        def __init__(self) -> None:
            self.images = digits(96)
            self.transform = v2.Compose(
                [
                    v2.RandomResizedCrop(32, scale=(0.5, 1.0), antialias=True),
                    v2.RandomHorizontalFlip(),
                ]
            )

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            x, y = self.images[row]
            return self.transform(x), y

    def __init__(self) -> None:
        self.loader = loader(self.Augmented(), 16)


class FixedViews(Head):
    """Three fixed views of each image, one after another.

    Who: people who want augmentation and a cache: K variations, epoch e reads number e mod K.
    Hard: an image has three values, all of them right. A cache that knows row numbers alone serves
    the first view for ever. Nothing comes again before the fourth epoch.
    Row: an image and the number of a view.
    """

    EXPECT, EPOCHS = "views", 7

    class Views(Dataset[Any]):
        def __init__(self) -> None:
            self.images, self.epoch = digits(96), 0

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            x, y = self.images[row]
            view = (self.epoch + row) % 3
            return (x, x.roll((2, 1), (1, 2)), x.flip(2) * 0.9)[view], y

    def __init__(self) -> None:
        self.dataset = self.Views()
        self.loader = loader(self.dataset, 16)

    def batches(self, epoch: int) -> Iterable[Any]:
        self.dataset.epoch = epoch
        return self.loader


class Mixup(Head):
    """Normalisation and mixup in the loop, between the loader and the model.

    Who: most recipes of timm and of torchvision's references; kornia users on the device.
    Hard: the loader's rows come again, what the model is given does not. Row numbers, shapes and
    a falling loss look just as they do without mixup.
    Row: a mixture of two images, never the same twice.
    """

    EXPECT, LEARNS = "refuse", False

    def __init__(self) -> None:
        self.loader = loader(digits(96), 16, drop_last=True)
        self.mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        x = (x - self.mean) / 0.8
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        other = torch.randperm(len(x))
        logits = model(torch.lerp(x[other], x, share))
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[other])


class NormalisedInTheLoop(Head):
    """Normalisation in the loop, after the batch was moved to the device. Nothing random.

    Who: people who keep uint8 images in memory and convert them where the model is.
    Hard: what the loader gives is not what the model is given. A cache at the loader keeps values
    that the model never sees.
    Row: an image.
    """

    def __init__(self) -> None:
        images = digits(96)
        x = (images.tensors[0] * 127 + 128).clamp(0, 255).to(torch.uint8)
        self.loader = loader(TensorDataset(x, images.tensors[1]), 16)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        x = x.float().div_(255).sub_(0.4).div_(0.3)
        return F.cross_entropy(model(x), y, label_smoothing=0.1)


class MultiCrop(Loop):
    """Crops of two sizes go through one backbone, joined by size inside the model.

    Who: linear evaluation in the style of SwAV and DINO, with a wrapper that joins crops.
    Hard: the model is given a list. It joins the crops of one size to one batch, calls the backbone
    twice, and joins what comes back. Six rows of the backbone belong to one row of the loader.
    Row: an image and the number of a crop.
    """

    EXPECT = "views"

    class Crops(Dataset[Any]):
        def __init__(self) -> None:
            self.images = digits(64)

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, row: int) -> tuple[list[Tensor], Tensor]:
            x, y = self.images[row]
            corners = [x[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]
            return [x, x.flip(2), *corners], y

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone(64, 128, 192)
            self.head = nn.Sequential(nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10))

        def forward(self, crops: list[Tensor]) -> Tensor:
            sizes = torch.tensor([crop.shape[-1] for crop in crops])
            ends = sizes.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            features = [
                self.backbone(torch.cat(crops[start:end]))
                for start, end in zip(starts, ends, strict=True)
            ]
            logits: Tensor = self.head(torch.cat(features))
            return logits

    def __init__(self) -> None:
        self.loader = loader(self.Crops(), 8)

    def build(self) -> Any:
        model = self.Wrapper()
        frozen(model.backbone)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return AdamW(trained(model), lr=3e-3, fused=True)

    def step(self, model: Any, batch: Any) -> Tensor:
        crops, y = batch
        return F.cross_entropy(model(crops), y.repeat(6))


class InPlaceNormalisation(Loop):
    """The model normalises its batch in place, and the loop goes on to use that batch.

    Who: models that came from code for little memory: `x.sub_(mean).div_(std)` opens `forward`.
    Hard: after the call the caller's own tensor holds other values. A cache that skips the call
    leaves it as it was. Here the decoder's target is the normalised batch.
    Row: an image.
    """

    EXPECT = "served or told"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone(64, 128, 192)
            self.decoder = nn.Linear(192, 3 * 8 * 8)

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.2).div_(0.7)
            out: Tensor = self.decoder(self.backbone(x))
            return out.view(-1, 3, 8, 8)

    def __init__(self) -> None:
        self.loader = loader(digits(96), 16)

    def build(self) -> Any:
        model = self.Net()
        frozen(model.backbone)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return Adam(model.decoder.parameters(), lr=3e-3)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, _ = batch
        small = model(x)
        return F.mse_loss(small, F.avg_pool2d(x, 4))


class AdversarialBatch(Head):
    """The batch takes gradient: adversarial training of a head (FGSM).

    Who: people who make the head of a frozen backbone robust.
    Hard: the gradient goes through the frozen backbone to the pixels. The attacked batch depends on
    the head, so it never comes again. A served feature would cut the gradient off.
    Row: an image; the attacked ones never come again.
    """

    EXPECT, EPOCHS = "refuse", 3

    def __init__(self) -> None:
        self.loader = loader(digits(96), 16)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        x.requires_grad_()
        (direction,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        attacked = (x + 0.05 * direction.sign()).detach()
        return F.cross_entropy(model(attacked), y)


class NewRows(Head):
    """Two new images arrive in each epoch.

    Who: active learning, labelling tools, crawlers: the loop trains on what is there.
    Hard: a cache that is bound to a data set of one length starts again, or is refused. Some
    batches hold a known and an unknown row.
    Row: an image.
    """

    EPOCHS = 5

    def __init__(self) -> None:
        self.images = digits(200)

    def batches(self, epoch: int) -> Iterable[Any]:
        return loader(Subset(self.images, range(192 + 2 * epoch)), 16, seed=epoch, drop_last=True)


class TwoLabelSets(Loop):
    """Two data sets share images and have other labels: two heads, trained in turn.

    Who: multi-task learning on annotations that different people made.
    Hard: the same image has another row number and another label in each data set. Labels must
    be in no key, and a row number means nothing without its data set.
    Row: an image, whatever its number and label.
    """

    def __init__(self) -> None:
        images = digits(64)
        x, y = images.tensors
        tasks = torch.zeros(64, dtype=torch.long)
        turned = torch.arange(63, -1, -1)
        self.numbers = TensorDataset(x, y, tasks)
        self.even = TensorDataset(x[turned], y[turned] % 2, tasks + 1)
        self.loader = loader(ConcatDataset([self.numbers, self.even]), 16)

    def build(self) -> Any:
        return nn.ModuleDict(
            {
                "backbone": frozen(backbone(64, 128, 192)),
                "heads": nn.ModuleList([nn.Linear(192, 10), nn.Linear(192, 2)]),
            }
        )

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return SGD(model["heads"].parameters(), lr=0.1)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y, task = batch
        features = model["backbone"](x)
        losses = [
            F.cross_entropy(head(features[task == number]), y[task == number], reduction="sum")
            for number, head in enumerate(model["heads"])
        ]
        return torch.stack(losses).sum() / len(y)


class WeightedSampling(Head):
    """Sampling with replacement: an epoch meets some images twice and others not at all.

    Who: people with rare classes, who use `WeightedRandomSampler`.
    Hard: one batch may hold an image twice, and most batches of the second epoch hold an image that
    was never seen.
    Row: an image.
    """

    EPOCHS = 6

    def __init__(self) -> None:
        images = digits(64)
        weight = 1.0 + (images.tensors[1] == 3)
        sampler = torch.utils.data.WeightedRandomSampler(
            weight.tolist(), 96, generator=generator(4)
        )
        self.loader = DataLoader(images, 16, sampler=sampler)


LOOPS: tuple[type[Loop], ...] = (
    HeadOnResNet,
    RandomCrops,
    FixedViews,
    Mixup,
    NormalisedInTheLoop,
    MultiCrop,
    InPlaceNormalisation,
    AdversarialBatch,
    NewRows,
    TwoLabelSets,
    WeightedSampling,
)
