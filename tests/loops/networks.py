"""Small networks that several loops share."""

from typing import TypeVar

from torch import Tensor, nn
from torch.nn import Parameter

M = TypeVar("M", bound=nn.Module)


def frozen(module: M) -> M:
    """The module without gradients, in eval mode."""
    return module.requires_grad_(False).eval()


def trained(model: nn.Module) -> list[Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def conv(inputs: int, outputs: int, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def backbone(*widths: int) -> nn.Sequential:
    """Convolutions that halve the image each, then the mean over all places."""
    pairs = zip((3, *widths), widths, strict=False)
    return nn.Sequential(
        *(conv(inputs, outputs) for inputs, outputs in pairs), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Classifier(nn.Module):
    """A backbone and a linear head."""

    def __init__(self, classes: int = 10, widths: tuple[int, ...] = (64, 128, 192)) -> None:
        super().__init__()
        self.backbone = backbone(*widths)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x))
        return logits


class Block(nn.Module):
    """A transformer block with its norms first."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            part.view(rows, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        added: Tensor = x + self.mlp(self.norm2(x))
        return added


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()
