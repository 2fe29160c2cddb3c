"""Trains the same model as one process, as DDP and as FSDP2 would, and compares; for torchrun.

Every rank gets the same data, so the mean of the gradients over ranks is, bit by bit, the gradient of one process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import optwatch
from optwatch.board import BoardReader, fold_to_groups
from optwatch.metrics.fields import maximum_columns
from optwatch.optim import AdamW

STEPS = 4


def model() -> nn.Module:
    """Rows that four ranks cannot share evenly, and one tensor whose shards alone would be too small to quantise."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 99), nn.Tanh(), nn.Linear(99, 64))


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    gen = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        net(torch.randn(8, 64, generator=gen)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sums(directory: Path, ranks: range) -> np.ndarray:
    """The rows of the last step merged over tensors and ranks; sums divided by the replicas that the rows carry."""
    merged: list[np.ndarray] = []
    for rank in ranks:
        reader = BoardReader(directory / f"run-{rank}.board")
        (table,) = reader.schema.tables
        rows = next(
            r.tables[0]
            for r in reversed(reader.poll().records)
            if r.tables[0] is not None and r.step == STEPS
        )
        merged.append(fold_to_groups(table).apply(rows))
        replicas, maxima = table.replicas, maximum_columns(len(table.slots))
        reader.close()
    return np.where(maxima, np.max(merged, axis=0), np.sum(merged, axis=0) / replicas)


def watched(net: nn.Module, kind: str, state: str, root: Path) -> tuple[torch.optim.Optimizer, Path]:
    """Train, watched; the directory holds the boards of all ranks."""
    directory = root / f"{kind}-{state}"
    directory.mkdir(mode=0o700, exist_ok=True)
    dist.barrier()
    optimizer = AdamW(net.parameters(), lr=1e-2, state=state)
    with optwatch.watch(optimizer, net, run_id="run", every=1, directory=directory, agent=False):
        train(net, optimizer)
    assert optimizer.state_bytes() == optimizer.expected_state_bytes()
    dist.barrier()
    return optimizer, directory


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(state: str, root: Path) -> None:
    """Weights and sums of every way to distribute against those of one process."""
    world = dist.get_world_size()
    alone = model()
    os.environ["RANK"], rank = f"{100 + dist.get_rank()}", os.environ["RANK"]  # a board of its own
    _, directory = watched(alone, "alone", state, root)
    os.environ["RANK"] = rank
    expected = sums(directory, range(100, 101))
    kinds = {"ddp": DistributedDataParallel(model()), "fsdp": fully_shard(model())}
    if world == 4:
        kinds["hsdp"] = fully_shard(
            model(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
        )
    for kind, net in kinds.items():
        optimizer, directory = watched(net, kind, state, root)
        tolerance = 2e-6 if state == "fp32" else 5e-2  # shards round stochastically by numbers of their own
        found = sums(directory, range(world))
        close = np.isclose(found, expected, rtol=tolerance, atol=1e-9) | (expected == 0)
        assert close[:, [0, 1, 2, 4]].all(), (kind, state, found, expected)
        if state == "fp32":
            assert close.all(), (kind, found, expected)
            for got, wanted in zip(net.parameters(), alone.parameters(), strict=True):
                assert torch.equal(whole(got), wanted), kind
        else:
            dtypes = {
                t.dtype
                for s in optimizer.state.values()
                for k, t in s.items()
                if k == "exp_avg" and t.numel() >= 4096
            }
            assert dtypes == {torch.int8}, dtypes  # by the whole tensor, not by the shard
        resume(net, optimizer)
        silent(net, directory)


class Collectives(TorchDispatchMode):
    """Counts what ranks do together."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **(kwargs or {}))


def silent(net: nn.Module, root: Path) -> None:
    """Watching asks no other rank for anything, in usual and in sampled steps, of ours and of others' optimizers."""
    for make in (AdamW, torch.optim.AdamW):
        counts = {}
        for every in (None, 1, 10**6):
            optimizer = make(net.parameters(), lr=0.0)
            with contextlib.ExitStack() as stack:
                if every is not None:
                    options = {"run_id": f"silent-{every}", "every": every, "directory": root, "agent": False}
                    stack.enter_context(optwatch.watch(optimizer, net, **options))
                train(net, optimizer)  # the first steps are always sampled ones
                with Collectives() as spoken:
                    train(net, optimizer)
            counts[every] = spoken.count
        assert len(set(counts.values())) == 1, (make, counts)
        assert counts[None] > 0, "the gradients of a backward pass are reduced"


def resume(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A sharded checkpoint through torch.distributed's own functions: loading it changes nothing, and steps go on."""
    if isinstance(net, DistributedDataParallel):
        return
    import torch.distributed.checkpoint as dcp

    saved = get_optimizer_state_dict(net, optimizer, options=StateDictOptions())
    place = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(place)
    dcp.save(saved, checkpoint_id=place[0])
    before = {k: {n: whole(t).clone() for n, t in s.items()} for k, s in enumerate(optimizer.state.values())}
    train(net, optimizer)
    target = get_optimizer_state_dict(net, optimizer, options=StateDictOptions())
    dcp.load(target, checkpoint_id=place[0])
    set_optimizer_state_dict(net, optimizer, target, options=StateDictOptions())
    for old, new in zip(before.values(), optimizer.state.values(), strict=True):
        assert old.keys() == new.keys()
        for name, value in old.items():
            assert torch.equal(value, whole(new[name])), name
    train(net, optimizer)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for asked in ("fp32", "int8"):
        compare(asked, Path(sys.argv[1]))
    if dist.get_rank() == 0:
        print("equal")
    gc.collect()  # models that live on keep threads of the group, which may end an exit with SIGABRT
    dist.destroy_process_group()
