"""Networks that are measured on a GPU, from torch and torchvision alone, with random weights."""

import math
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import cachefreeze


class Split(nn.Module):
    """A frozen part, and a trained part that takes its result.

    Args:
        frozen: Part that is frozen here.
        trained: Part that takes what the frozen part returns.
    """

    def __init__(self, frozen: nn.Module, trained: nn.Module) -> None:
        super().__init__()
        cachefreeze.freeze(frozen)
        self.frozen, self.trained = frozen, trained

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.trained(self.frozen(x))
        return found


class Pictures(nn.Module):
    """Normalizes images of whole numbers from 0 to 255, and runs a backbone on them."""

    def __init__(self, backbone: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.form = torch.channels_last if channels_last else torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.backbone((x.float() / 255 - 0.5).contiguous(memory_format=self.form))
        return found


def resnet_head(tiny: bool, channels_last: bool = False) -> Split:
    """Builds a ResNet-50 whose classifier is trained."""
    make = torchvision.models.resnet18 if tiny else torchvision.models.resnet50
    network = make(num_classes=10 if tiny else 1000)
    head, network.fc = network.fc, nn.Identity()
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    return Split(Pictures(network, channels_last), head)


def _vit(pixels: int, patch: int, layers: int, heads: int, width: int) -> nn.Module:
    """Builds a vision transformer without a classifier."""
    network = torchvision.models.VisionTransformer(pixels, patch, layers, heads, width, 4 * width)
    network.heads = nn.Identity()
    return network


def vit_head(tiny: bool) -> Split:
    """Builds a ViT-B/16 whose classifier is trained."""
    network = _vit(32, 4, 3, 2, 96) if tiny else _vit(224, 16, 12, 12, 768)
    return Split(Pictures(network), nn.Linear(96 if tiny else 768, 1000))


class Heads(nn.Module):
    """Linear heads on the same features. Returns their outputs, (heads, rows, classes)."""

    def __init__(self, count: int, width: int, classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads])


HEADS = 52


def vit_heads(tiny: bool) -> Split:
    """Builds a ViT-S/14 with 52 linear heads on its class token."""
    network = _vit(28, 4, 3, 2, 96) if tiny else _vit(224, 14, 12, 6, 384)
    return Split(Pictures(network), Heads(HEADS, 96 if tiny else 384, 10 if tiny else 1000))


class BertLayer(nn.Module):
    """Self-attention and two linear layers, each with dropout and a layer norm behind it."""

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate)
        x = self.norm1(x + self.dropout(self.out(attended.transpose(1, 2).reshape_as(x))))
        found: Tensor = self.norm2(x + self.dropout(self.down(F.gelu(self.up(x)))))
        return found


class BertEmbeddings(nn.Module):
    """Sums of the embeddings of words and places, normalized."""

    def __init__(self, words: int, length: int, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        found: Tensor = self.dropout(self.norm(self.words(ids) + self.places(places)))
        return found


class FirstToken(nn.Module):
    """Classifies a text by its first token."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.pool(x[:, 0])))
        return found


def bert_last_layers(tiny: bool) -> Split:
    """Builds a network like BERT-base. The last 2 of its 12 layers are trained, and the head."""
    width, heads, layers = (96, 2, 6) if tiny else (768, 12, 12)
    stack = [BertLayer(width, heads) for _ in range(layers)]
    frozen = [BertEmbeddings(500 if tiny else 30522, 512, width), *stack[:-2]]
    return Split(nn.Sequential(*frozen), nn.Sequential(*stack[-2:], FirstToken(width, 10)))


class LlamaLayer(nn.Module):
    """Causal self-attention with rotary embeddings, and SwiGLU, each behind an RMSNorm."""

    cos: Tensor
    sin: Tensor
    q: nn.Module
    v: nn.Module

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads, inner = heads, width * 11 // 4
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        parts = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q, self.k, self.v, self.out = parts
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, -1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, -1))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        length = x.shape[1]
        q, k = (_turned(one, self.cos[:length], self.sin[:length]).to(v.dtype) for one in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x)
        found: Tensor = x + self.down(F.silu(self.gate(normed)) * self.up(normed))
        return found


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return x * cos + torch.cat([-other, one], -1) * sin


class LoRA(nn.Module):
    """A frozen linear layer with a trained product of two narrow ones beside it."""

    def __init__(self, base: nn.Module, width: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.normal_(self.b.weight, std=1 / math.sqrt(rank) / 100)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + 2 * self.b(self.a(x))
        return found


def llama_lora(tiny: bool) -> Split:
    """Builds a network like Llama of 24 layers, with LoRA on queries and values of the last 4."""
    width, heads, layers, words = (96, 2, 7, 500) if tiny else (1024, 16, 24, 32000)
    length = 16 if tiny else 512
    stack = [LlamaLayer(width, heads, length) for _ in range(layers)]
    end = nn.Sequential(*stack[-4:], nn.RMSNorm(width), nn.Linear(width, words, bias=False))
    end.requires_grad_(False)
    for layer in stack[-4:]:
        layer.q, layer.v = LoRA(layer.q, width, 8), LoRA(layer.v, width, 8)
    return Split(nn.Sequential(nn.Embedding(words, width), *stack[:-4]), end)


def mean_loss(output: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy of one classifier."""
    return F.cross_entropy(output, y)


def summed_loss(output: Tensor, y: Tensor) -> Tensor:
    """Returns the sum of the mean losses of several heads."""
    return F.cross_entropy(output.flatten(0, 1), y.repeat(len(output))) * len(output)


def next_word_loss(output: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross-entropy of each next word."""
    return F.cross_entropy(output[:, :-1].flatten(0, 1), y[:, 1:].flatten())


Loss = Callable[[Tensor, Tensor], Tensor]
