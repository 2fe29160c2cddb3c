"""A training loop of one's own."""

import torch
from torch import nn

import optwatch
from optwatch.optim import AdamW

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(256, 64), nn.Flatten(1), nn.Linear(64 * 16, 256))
optimizer = AdamW(model.parameters(), lr=1e-3, state="int8")
watch = optwatch.watch(optimizer, model=model)  # this line

for step in range(30):
    text = torch.randint(256, (8, 17))
    loss = nn.functional.cross_entropy(model(text[:, :-1]), text[:, -1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.log(loss=loss)
    watch.count(tokens=text.numel(), samples=len(text))
    if step == 20:
        watch.event("evaluation")

watch.close()
print(f"trained to {loss.item():.2f}")
