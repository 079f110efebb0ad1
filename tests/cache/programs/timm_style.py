"""A loop as timm's `train.py` has it: schedule, moving average, autocast, drop_last, validation."""

import timm
import torch
from sklearn.datasets import load_digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch.utils.data import DataLoader, TensorDataset

import cachefreeze

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images[:250], dtype=torch.float32)[:, None].repeat(1, 3, 4, 4) / 16
data = TensorDataset(images, torch.tensor(digits.target[:250]))
train = DataLoader(torch.utils.data.Subset(data, range(200)), 16, shuffle=True, drop_last=True)
validate = DataLoader(torch.utils.data.Subset(data, range(200, 250)), 32)

model = timm.create_model("resnet10t", num_classes=10, drop_rate=0.1)
timm.utils.freeze(model, ["conv1", "bn1", "layer1", "layer2", "layer3"])
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
schedule = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1)
average = ModelEmaV3(model, decay=0.9)
loss_function = LabelSmoothingCrossEntropy(0.1)

cache = cachefreeze.ActivationCache(model)
for epoch in range(4):
    model.train()
    for x, y in train:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(model)
    model.eval()
    right = AverageMeter()
    with torch.inference_mode():
        for x, y in validate:
            right.update(accuracy(model(x), y)[0].item(), len(x))
            accuracy(average.module(x), y)
    schedule.step(epoch + 1)
    print(f"epoch {epoch}  loss {loss.item():.4f}  right {right.avg:.1f}")

states = [*model.state_dict().values(), *average.module.state_dict().values()]
print("weights", sum(state.double().sum() for state in states).item())
print(cache)
