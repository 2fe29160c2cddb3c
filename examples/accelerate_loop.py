"""A loop with Accelerate."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optwatch

torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
model, optimizer, data = accelerator.prepare(
    model, torch.optim.AdamW(model.parameters()), DataLoader(TensorDataset(torch.randn(64, 64)), batch_size=8)
)
watch = optwatch.watch(optimizer, model=model)  # this line

for (x,) in data:
    loss = nn.functional.mse_loss(model(x), x)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()

watch.close()
print(f"trained to {loss.item():.2f}")
