"""Several ranks: ``torchrun --nproc-per-node 2 examples/distributed.py [--fsdp]``."""

import gc
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import optwatch
from optwatch.optim import AdamW

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
model = fully_shard(model) if "--fsdp" in sys.argv else DistributedDataParallel(model)
optimizer = AdamW(model.parameters(), lr=1e-3, state="int8")
watch = optwatch.watch(optimizer, model=model)  # this line

for _ in range(10):
    loss = model(torch.randn(8, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    watch.log(loss=loss)
    watch.count(samples=8)

watch.close()
print(f"rank {dist.get_rank()} of {dist.get_world_size()} trained")
# A model that lives on keeps threads of the group, which may end the exit with SIGABRT.
del model, optimizer, watch, loss
gc.collect()
dist.destroy_process_group()
