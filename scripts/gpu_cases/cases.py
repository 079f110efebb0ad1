"""All cases that are measured on a GPU, and what was asked of each."""

import shutil
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cachefreeze.models.densenet import densenet
from cachefreeze.models.wrn import wrn
from gpu_cases.freezeout_case import FreezeOutCase
from gpu_cases.loops import Batches, FromLoader, OnDevice, Resized
from gpu_cases.machine import Machine, read_images
from gpu_cases.networks import (
    bert_last_layers,
    llama_lora,
    mean_loss,
    next_word_loss,
    resnet_head,
    summed_loss,
    vit_head,
    vit_heads,
)
from gpu_cases.split_case import SplitCase, probe_beside

# Shared memory that batches of worker processes need.
_SHARED_MEMORY = 4 << 30


@dataclass
class Case:
    """A case, its title, its share of the time, and what was asked of it.

    Attributes:
        title: Title for the table.
        measured: Loops to measure.
        share: Share of the time, as a multiple of the usual one.
        asked: Least ratio that was asked for: of a later epoch, or of freezing alone. None if
            nothing was asked.
    """

    title: str
    measured: SplitCase | FreezeOutCase
    share: float = 1.0
    asked: float | None = None


def _pixels(machine: Machine, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Returns images of whole numbers from 0 to 255, and labels, on the device."""
    device = machine.device
    random = torch.Generator(device).manual_seed(0)
    y = torch.randint(10, (count,), generator=random, device=device)
    if machine.images is None:
        shape = (count, 3, size, size)
        x = torch.randint(256, shape, generator=random, dtype=torch.uint8, device=device)
    else:
        images = read_images(machine.images).to(device)
        images = F.interpolate(images.float(), size=size, mode="area").byte()
        x = images[torch.arange(count, device=device) % len(images)]
        # The first pixels hold the row's number, so that an image that comes twice is two rows.
        numbers = torch.arange(count, device=device)[:, None]
        x[:, 0, 0, :4] = (numbers >> torch.arange(0, 32, 8, device=device) & 255).byte()
    return x, y


def _pictures(size: int, tiny_size: int) -> "partial[Batches]":
    return partial(_pictures_on_device, size, tiny_size)


def _pictures_on_device(
    size: int, tiny_size: int, machine: Machine, count: int, batch: int
) -> Batches:
    x, y = _pixels(machine, count, tiny_size if machine.tiny else size)
    return OnDevice(x, y, batch)


def _loaded_pictures(machine: Machine, count: int, batch: int) -> Batches:
    if machine.workers and (free := shutil.disk_usage("/dev/shm").free) < _SHARED_MEMORY:
        raise OSError(
            f"/dev/shm has {free >> 20} MB free, and batches of {machine.workers} processes need "
            f"{_SHARED_MEMORY >> 20} MB: give it more, or --workers 0"
        )
    x, y = _pixels(machine, count, 48 if machine.tiny else 256)
    return FromLoader(
        Resized(x, y, 32 if machine.tiny else 224), batch, machine.workers, machine.device
    )


def _words(
    words: int, length: int, labels: bool, machine: Machine, count: int, batch: int
) -> Batches:
    random = torch.Generator().manual_seed(0)
    words, length = (500, 16) if machine.tiny else (words, length)
    x = torch.randint(words, (count, length), generator=random).to(machine.device)
    y = torch.randint(10, (count,), generator=random).to(machine.device) if labels else x
    return OnDevice(x, y, batch)


def _wrn(tiny: bool) -> nn.Sequential:
    return wrn(10, depth=10, width=1) if tiny else wrn(10, depth=40, width=4)


def _densenet(tiny: bool) -> nn.Sequential:
    depth, rate = (10, 12) if tiny else (100, 12)
    return densenet(10, depth=depth, growth_rate=rate)


_ON_DEVICE = _pictures(224, 32)

CASES = {
    "resnet50_head": Case(
        "ResNet-50, head only", SplitCase(resnet_head, _ON_DEVICE, 256, mean_loss), asked=20
    ),
    "vit_b16_head": Case(
        "ViT-B/16, head only", SplitCase(vit_head, _ON_DEVICE, 256, mean_loss), asked=20
    ),
    "bert_last_2": Case(
        "BERT-base-like, last 2 of 12",
        SplitCase(bert_last_layers, partial(_words, 30522, 128, True), 64, mean_loss),
        asked=2.5,
    ),
    "llama_lora": Case(
        "Llama-like, LoRA on last 4 of 24",
        SplitCase(llama_lora, partial(_words, 32000, 512, False), 16, next_word_loss),
    ),
    "vit_s14_heads": Case(
        "ViT-S/14, 52 heads",
        SplitCase(vit_heads, _pictures(224, 28), 128, summed_loss, beside=probe_beside),
        asked=15,
    ),
    "wrn_freezeout": Case("WRN-40-4, FreezeOut", FreezeOutCase(_wrn), share=3, asked=1.3),
    "densenet_freezeout": Case(
        "DenseNet-BC-100, FreezeOut", FreezeOutCase(_densenet), share=3, asked=1.3
    ),
    "resnet50_loader": Case(
        "ResNet-50, head only, loader",
        SplitCase(resnet_head, _loaded_pictures, 256, mean_loss), asked=20,
    ),
    "resnet50_channels_last": Case(
        "ResNet-50, channels_last",
        SplitCase(partial(resnet_head, channels_last=True), _ON_DEVICE, 256, mean_loss),
        share=0.5,
    ),
    "llama_lora_offloaded": Case(
        "Llama-like, LoRA, offloaded",
        SplitCase(
            llama_lora, partial(_words, 32000, 512, False), 16, next_word_loss, offloads=True
        ),
        share=0.5,
    ),
    "resnet50_fp16": Case(
        "ResNet-50, float16, scaled",
        SplitCase(resnet_head, _ON_DEVICE, 256, mean_loss, torch.float16, scaled=True), share=0.5,
    ),
}  # fmt: skip
