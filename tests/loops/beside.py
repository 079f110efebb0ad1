"""A frozen network beside the one that trains: teachers, references, perceptual losses, VAEs."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.utils.data import TensorDataset

from .data import digits, generator, loader
from .harness import Loop, Optimizers
from .networks import Block, Classifier, backbone, conv, frozen


class Distillation(Loop):
    """A small student learns from a frozen teacher, which runs under `no_grad` in each step.

    Who: every distillation script.
    Hard: the teacher is a whole network of its own, not the lower part of the one that trains. The
    cache is attached to both networks at once.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(100), 16)

    def build(self) -> Any:
        return nn.ModuleDict(
            {
                "student": nn.Sequential(
                    conv(3, 16), conv(16, 16), nn.Flatten(), nn.Linear(1024, 10)
                ),
                "teacher": frozen(Classifier()),
            }
        )

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(model["student"].parameters(), lr=2e-3, fused=True)

    def caches(self, model: Any) -> tuple[nn.Module, ...]:
        return model["student"], model["teacher"]

    def step(self, model: Any, batch: Any) -> Tensor:
        x, y = batch
        with torch.no_grad():
            target = (model["teacher"](x) / 3).softmax(1)
        logits = model["student"](x)
        soft = F.kl_div((logits / 3).log_softmax(1), target, reduction="batchmean")
        return F.cross_entropy(logits, y) + 9 * soft


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 64)
        self.places = nn.Embedding(24, 64)
        self.blocks = nn.ModuleList([Block(64) for _ in range(3)])
        self.norm, self.out = nn.LayerNorm(64), nn.Linear(64, 60, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, causal=True)
        logits: Tensor = self.out(self.norm(x))
        return logits


class Preferences(Loop):
    """Preference training (DPO): the policy trains beside the frozen model that it began as.

    Who: users of TRL and torchtune. `precompute_ref_log_probs` is the cache made by hand.
    Hard: the reference has the class and, at first, the weights of the policy. Chosen and rejected
    answers are joined to one batch. Of the reference, one number a text is needed.
    Row: a text, chosen or rejected.
    """

    def __init__(self) -> None:
        draw = generator(9)
        question = torch.randint(1, 60, (64, 8), generator=draw)
        chosen = torch.randint(1, 30, (64, 12), generator=draw)
        rejected = torch.randint(20, 60, (64, 12), generator=draw)
        data = TensorDataset(
            torch.cat([question, chosen], 1),
            torch.cat([question, rejected], 1),
        )
        self.loader = loader(data, 8)

    def build(self) -> Any:
        policy = LanguageModel()
        return nn.ModuleDict({"policy": policy, "reference": frozen(copy.deepcopy(policy))})

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(model["policy"].parameters(), lr=5e-4)

    def caches(self, model: Any) -> tuple[nn.Module, ...]:
        return model["policy"], model["reference"]

    @staticmethod
    def _log_probability(model: nn.Module, ids: Tensor) -> Tensor:
        words = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return words[:, 7:].sum(1)

    def step(self, model: Any, batch: Any) -> Tensor:
        ids = torch.cat(batch)
        with torch.no_grad():
            before = self._log_probability(model["reference"], ids)
        gain = self._log_probability(model["policy"], ids) - before
        chosen, rejected = gain.chunk(2)
        return -F.logsigmoid(0.2 * (chosen - rejected)).mean()


class PerceptualGan(Loop):
    """Super-resolution: a generator, a discriminator, and a frozen network for perceptual loss.

    Who: SRGAN and all that came after it.
    Hard: the frozen network runs on real images, whose features come again, and on generated ones,
    whose features never do and which pass gradient to the generator. Two optimizers step.
    Row: a real image.
    """

    EPOCHS = 3

    def __init__(self) -> None:
        self.loader = loader(digits(64), 8)

    def build(self) -> Any:
        return nn.ModuleDict(
            {
                "generator": nn.Sequential(
                    nn.Conv2d(3, 32, 3, 1, 1),
                    nn.ReLU(),
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(32, 3, 3, 1, 1),
                ),
                "discriminator": nn.Sequential(backbone(16, 32), nn.Linear(32, 1)),
                "perceptual": frozen(nn.Sequential(conv(3, 64, 1), conv(64, 64), conv(64, 96))),
            }
        )

    def optimizer(self, model: Any) -> Optimizers:
        return (
            Adam(model["generator"].parameters(), lr=2e-3, betas=(0.5, 0.99)),
            Adam(model["discriminator"].parameters(), lr=1e-3, betas=(0.5, 0.99)),
        )

    def train_batch(self, model: Any, batch: Any, optimizer: Any) -> Tensor:
        of_generator, of_discriminator = optimizer
        real, _ = batch
        made = model["generator"](F.avg_pool2d(real, 2))
        judged = model["discriminator"](torch.cat([real, made.detach()])).squeeze(1)
        is_real = torch.arange(2 * len(real)).lt(len(real)).float()
        of_discriminator.zero_grad()
        F.binary_cross_entropy_with_logits(judged, is_real).backward()
        of_discriminator.step()

        loss: Tensor = F.l1_loss(made, real)
        loss = loss + F.mse_loss(model["perceptual"](made), model["perceptual"](real))
        loss = loss + 0.01 * F.softplus(-model["discriminator"](made)).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        return loss


class SwitchedGradients(Loop):
    """pix2pix: the discriminator's `requires_grad` goes off and on again in every step.

    Who: pix2pix, CycleGAN and their copies, with `set_requires_grad(netD, False)`.
    Hard: while the generator steps, the discriminator looks frozen. It moves in between, by a fused
    optimizer that moves no version. Nothing here is frozen for longer than half a step.
    Row: an image with its drawing, with other features in each step.
    """

    EXPECT, EPOCHS, LEARNS = "refuse", 4, False

    def __init__(self) -> None:
        self.loader = loader(digits(64), 8)

    def build(self) -> Any:
        return nn.ModuleDict(
            {
                "generator": nn.Sequential(
                    nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 3, 3, 1, 1)
                ),
                "discriminator": nn.Sequential(
                    nn.Conv2d(6, 48, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(48, 1, 4, 2, 1)
                ),
            }
        )

    def optimizer(self, model: Any) -> Optimizers:
        return (
            Adam(model["generator"].parameters(), lr=1e-3, fused=True),
            Adam(model["discriminator"].parameters(), lr=1e-3, fused=True),
        )

    def train_batch(self, model: Any, batch: Any, optimizer: Any) -> Tensor:
        of_generator, of_discriminator = optimizer
        photo, _ = batch
        drawing = (photo > 0).float()
        judge = model["discriminator"]
        made = model["generator"](drawing)

        judge.requires_grad_(True)
        of_discriminator.zero_grad()
        real = judge(torch.cat([drawing, photo], 1))
        false = judge(torch.cat([drawing, made.detach()], 1))
        (F.softplus(-real).mean() + F.softplus(false).mean()).backward()
        of_discriminator.step()

        judge.requires_grad_(False)
        of_generator.zero_grad()
        with torch.no_grad():
            wanted = judge(torch.cat([drawing, photo], 1))
        false = judge(torch.cat([drawing, made], 1))
        loss = F.softplus(-false).mean() + F.l1_loss(false, wanted) + 10 * F.l1_loss(made, photo)
        loss.backward()
        of_generator.step()
        return loss


@dataclass
class Gaussian:
    """What an encoder gives: a distribution, which draws when it is asked for a sample."""

    mean: Tensor
    log_variance: Tensor

    def sample(self) -> Tensor:
        return self.mean + (0.5 * self.log_variance).exp() * torch.randn_like(self.mean)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(conv(3, 64, 1), conv(64, 96), nn.Conv2d(96, 8, 3, 2, 1))
        self.up = nn.Sequential(nn.ConvTranspose2d(4, 32, 4, 4), nn.Conv2d(32, 3, 1))

    def encode(self, x: Tensor) -> Gaussian:
        mean, log_variance = self.down(x).chunk(2, 1)
        return Gaussian(mean, log_variance.clamp(-20, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.encode(x).sample())
        return out


class LatentDiffusion(Loop):
    """A denoiser trains on latents of a frozen autoencoder, which is called by `encode`.

    Who: fine-tuning of Stable Diffusion, and every latent model since.
    Hard: `forward` of the autoencoder is never called. `encode` gives an object of the author's own
    class. Latents, noise and times are drawn anew in each step, from one random state: a kept
    sample, or a skipped draw, changes the run.
    Row: an image.
    """

    def __init__(self) -> None:
        self.loader = loader(digits(64), 8)

    def build(self) -> Any:
        denoiser = nn.Sequential(nn.Conv2d(5, 64, 3, 1, 1), nn.SiLU(), nn.Conv2d(64, 4, 3, 1, 1))
        return nn.ModuleDict({"autoencoder": frozen(Autoencoder()), "denoiser": denoiser})

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW(model["denoiser"].parameters(), lr=2e-3, weight_decay=1e-2)

    def step(self, model: Any, batch: Any) -> Tensor:
        x, _ = batch
        with torch.no_grad():
            latents = model["autoencoder"].encode(x).sample()
        noise = torch.randn_like(latents)
        time = torch.rand(len(x), 1, 1, 1)
        noisy = torch.cat([latents * (1 - time) + noise * time, time.expand(-1, 1, 8, 8)], 1)
        return F.mse_loss(model["denoiser"](noisy), noise - latents)


class PromptTuning(Loop):
    """Only a prompt trains. It stands before the text, so nothing above it is the same again.

    Who: prompt tuning, prefix tuning, visual prompts.
    Hard: 99 % of the parameters are frozen, and all of their work depends on what trains. Frozen
    blocks must run and pass gradient to the prompt.
    Row: a text; only its embedding is the same each time.
    """

    EXPECT = "served or told"

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = frozen(LanguageModel())
            self.prompt = nn.Parameter(torch.randn(4, 64) * 0.02)

        def forward(self, ids: Tensor) -> Tensor:
            words = self.base.words(ids)
            x = torch.cat([self.prompt.expand(len(ids), -1, -1), words], 1)
            x = x + self.base.places(torch.arange(x.shape[1]))
            for block in self.base.blocks:
                x = block(x, causal=True)
            logits: Tensor = self.base.out(self.base.norm(x[:, 4:]))
            return logits

    def __init__(self) -> None:
        ids = torch.randint(1, 60, (64, 1), generator=generator(2)) + torch.arange(16)
        self.loader = loader(TensorDataset(ids % 60), 8)

    def build(self) -> Any:
        return self.Prompted()

    def optimizer(self, model: Any) -> Optimizers:
        return AdamW([model.prompt], lr=3e-2, fused=True)

    def step(self, model: Any, batch: Any) -> Tensor:
        (ids,) = batch
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


LOOPS: tuple[type[Loop], ...] = (
    Distillation,
    Preferences,
    PerceptualGan,
    SwitchedGradients,
    LatentDiffusion,
    PromptTuning,
)
