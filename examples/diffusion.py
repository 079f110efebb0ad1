"""Latent diffusion: a UNet is trained behind a frozen VAE, whose latents are kept.

pip install diffusers && python examples/diffusion.py
"""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader

import cachefreeze

torch.manual_seed(0)
digits = torch.tensor(load_digits().images[:64], dtype=torch.float32) / 8 - 1
loader = DataLoader(digits[:, None].repeat(1, 3, 4, 4), 16, shuffle=True)

vae = AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
                    up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
vae.requires_grad_(False).eval()
unet = UNet2DModel(
    sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
    block_out_channels=(16, 32), down_block_types=("DownBlock2D",) * 2,
    up_block_types=("UpBlock2D",) * 2,
)  # fmt: skip
noising = DDPMScheduler()
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)

cache = cachefreeze.ActivationCache(vae)
for epoch in range(4):
    for x in loader:
        with torch.no_grad():
            latents = vae.encode(x).latent_dist.sample() * vae.config.scaling_factor
        noise, steps = torch.randn_like(latents), torch.randint(0, 1000, (len(x),))
        said = unet(noising.add_noise(latents, noise, steps), steps).sample
        loss = F.mse_loss(said, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}  loss {loss.item():.4f}")

print("weights", sum(p.detach().double().sum() for p in unet.parameters()).item())
print(cache)
