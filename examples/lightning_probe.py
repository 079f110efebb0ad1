"""Lightning: a module with a frozen encoder, fitted and validated by its `Trainer`.

pip install lightning && python examples/lightning_probe.py
"""

import lightning as L
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

import cachefreeze


class Probe(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18(num_classes=64)
        self.head = nn.Linear(64, 10)
        cachefreeze.freeze(self.encoder)

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def validation_step(self, batch: list[torch.Tensor], number: int) -> None:
        x, y = batch
        self.log("accuracy", (self.head(self.encoder(x)).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2)


L.seed_everything(0, verbose=False)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16
data = TensorDataset(images, torch.tensor(digits.target))
train, validate = Subset(data, range(400)), Subset(data, range(400, 500))
model = Probe()
trainer = L.Trainer(
    max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip

cache = cachefreeze.ActivationCache(model)
trainer.fit(model, DataLoader(train, 32, shuffle=True), DataLoader(validate, 50))

print("weights", model.head.weight.detach().double().sum().item())
print(cache)
