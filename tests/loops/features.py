"""What loops do with the values that a frozen network gives them."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader

from .data import digits, loader
from .harness import Loop, Optimizers
from .networks import Classifier, backbone, frozen, trained


class Features(Loop):
    """Base of the loops of this file: a frozen backbone and a head, called one after the other."""

    def __init__(self) -> None:
        self.loader: DataLoader[Any] = loader(digits(96), 16)

    def build(self) -> Any:
        model = Classifier()
        frozen(model.backbone)
        return model

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(trained(model), lr=1e-2, fused=True)


class ChangedInPlace(Features):
    """The loop centres and scales the features in place.

    Who: people who whiten features, or drop some of them by `features[:, k] = 0`.
    Hard: what is written to is what the cache gave. If that was the kept entry itself, it is wrong
    from then on.
    Row: an image.
    """

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            features = model.backbone(x)
        features.sub_(features.mean(0)).div_(features.std(0) + 1e-3)
        features[:, ::7] = 0
        return F.cross_entropy(model.head(features), y)


class FeatureBank(Features):
    """Features of a whole epoch are gathered in a list, and numpy and sklearn use them afterwards.

    Who: nearest neighbours and linear probes on the side, prototypes, monitoring of features.
    Hard: values live on when their step, and the epoch, are over. numpy takes their memory without
    asking torch. The features are needed in steps in which the loss does not touch them.
    Row: an image.
    """

    def on_epoch(self, model: Any, epoch: int) -> None:
        self.bank: list[Tensor] = []
        self.labels: list[Tensor] = []

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        with torch.inference_mode():
            features = model.backbone(x)
        self.bank.append(features)
        self.labels.append(y)
        return F.cross_entropy(model.head(features.clone()), y)

    def validate(self, model: Any) -> Tensor:
        x = torch.cat(self.bank).numpy()
        y = torch.cat(self.labels).numpy()
        return torch.from_numpy(Ridge(solver="cholesky").fit(x, y).predict(x))


class ReusedBuffer(Features):
    """One input buffer for all batches; the features are used when it holds another batch already.

    Who: code for pinned memory and CUDA graphs, which copies each batch into the same tensor.
    Hard: object and address of the input are the same in each call. A value that is computed later
    than its call must not read what the buffer holds by then.
    Row: an image, or its mirror image.
    """

    def build(self) -> Any:
        self.buffer = torch.zeros(16, 3, 32, 32)
        return super().build()

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        features = []
        for view in (x, x.flip(3)):
            self.buffer.copy_(view)
            features.append(model.backbone(self.buffer))
        self.buffer.zero_()
        one, other = features
        logits = model.head((one + other) / 2)
        return F.cross_entropy(logits, y) + 0.1 * F.mse_loss(model.head(one), model.head(other))


class FastWeights(Features):
    """A step of inner training by `functional_call`: MAML on the head of a frozen backbone.

    Who: meta-learning with `torch.func`.
    Hard: in a second call of the model, tensors that are no parameters stand in for those of the
    head. The gradient goes through the inner step.
    Row: an image.
    """

    def optimizer(self, model: Any) -> Optimizers:
        return Adam(trained(model), lr=1e-2)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        weights = dict(model.head.named_parameters(prefix="head"))
        inner = F.cross_entropy(model(x[:8]), y[:8])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        fast = {
            name: weight - 0.5 * slope
            for (name, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        return F.cross_entropy(functional_call(model, fast, (x[8:],)), y[8:])


class GradientPenalty(Features):
    """The loop asks for the gradient with respect to the features of a frozen network.

    Who: gradient penalties, saliency, virtual adversarial training in feature space.
    Hard: `requires_grad_()` is called on the value that the frozen network gave, and its gradient
    is differentiated once more.
    Row: an image.
    """

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        features = model.backbone(x).requires_grad_()
        loss = F.cross_entropy(model.head(features), y)
        (slope,) = torch.autograd.grad(loss, features, create_graph=True)
        return loss + 10 * slope.square().sum(1).mean()


class SharedBackbone(Loop):
    """Two models with one frozen backbone train in turn, on batches of other sizes.

    Who: ensembles of heads, federated simulations, hyper-parameter sweeps in one process.
    Hard: both models hold the same module object. Each has a cache's root of its own, and entries
    that the other can use.
    Row: an image.
    """

    def __init__(self) -> None:
        self.one, self.other = loader(digits(96), 16), loader(digits(96), 24, seed=2)

    def build(self) -> Any:
        shared = frozen(backbone(64, 128, 192))
        heads = [
            nn.Linear(192, 10),
            nn.Sequential(nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 10)),
        ]
        return nn.ModuleList([nn.Sequential(shared, head) for head in heads])

    def optimizer(self, model: Any) -> Optimizers:
        return SGD(trained(model), lr=0.1, momentum=0.9)

    def caches(self, model: Any) -> tuple[nn.Module, ...]:
        return model[0], model[1]

    def batches(self, epoch: int) -> Iterable[Any]:
        yield from ((0, batch) for batch in self.one)
        yield from ((1, batch) for batch in self.other)

    def step(self, model: Any, batch: Any) -> Tensor:
        number, (x, y) = batch
        return F.cross_entropy(model[number](x), y)


LOOPS: tuple[type[Loop], ...] = (
    ChangedInPlace,
    FeatureBank,
    ReusedBuffer,
    FastWeights,
    GradientPenalty,
    SharedBackbone,
)
