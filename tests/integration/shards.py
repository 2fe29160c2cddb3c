"""Steps parameters that are cut into shards in every way, and the same parameters whole, and compares; for torchrun."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from optwatch import optim
from optwatch.codecs import FORMATS

#: Of four ranks each has a multiple of every block of the first two, of the third pieces of 99 rows, which differ.
SHAPES = ((128, 64), (64, 32, 4), (99, 64), (3,))
STEPS = 4
Place = Sequence[Placement]


def meshes() -> dict[str, tuple[DeviceMesh, Place]]:
    """Every way to cut that this number of ranks allows."""
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    ways: dict[str, tuple[DeviceMesh, Place]] = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "replicas": (line, [Replicate()]),
    }
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
        ways |= {
            "copies of rows": (square, [Replicate(), Shard(0)]),
            "rows of rows": (square, [Shard(0), Shard(0)]),
            "rows and columns": (square, [Shard(0), Shard(1)]),
            "rows within tensor parallelism": (square, [_StridedShard(0, split_factor=2), Shard(0)]),
        }
    return ways


def whole_values(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(100 * seed + i))
        for i, shape in enumerate(shapes)
    ]


def cut(values: Sequence[Tensor], mesh: DeviceMesh, places: Place) -> list[Tensor]:
    """As DTensors; what has no such dimension stays whole on every rank."""
    return [
        distributed(value, mesh, places)
        if value.dim() > max((getattr(place, "dim", 0) for place in places), default=0) and value.numel() > 3
        else value.clone()
        for value in values
    ]


def distributed(value: Tensor, mesh: DeviceMesh, places: Place) -> Tensor:
    """As torch's function, which makes no strided shards: those are cut along the second dimension first."""
    if not isinstance(places[0], _StridedShard):
        return distribute_tensor(value, mesh, places)
    piece = value
    for dim in (1, 0):
        piece = piece.chunk(mesh.size(dim))[mesh.get_local_rank(dim)]
    return DTensor.from_local(piece.clone(), mesh, places, shape=value.shape, stride=value.stride())


def gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def run(
    make: Callable[[list[nn.Parameter]], optim.Optimizer], mesh: DeviceMesh | None, places: Place,
    dtype: torch.dtype = torch.float32, bad: int | None = None, shapes: Sequence[tuple[int, ...]] = SHAPES,
) -> tuple[list[nn.Parameter], optim.Optimizer, list[list[float]]]:  # fmt: skip
    """Train; in step ``bad`` one element of the first gradient, which lies on the last rank, is infinite."""
    arrange = (lambda values: cut(values, mesh, places)) if mesh else (lambda values: values)
    params = [nn.Parameter(value) for value in arrange([v.to(dtype) for v in whole_values(0, shapes)])]
    optimizer = make(params)
    heard: list[list[float]] = []
    raised = 0
    optimizer.subscribe(lambda stats: heard.append([] if stats.decision is None else stats.decision.tolist()))
    for step in range(STEPS):
        values = whole_values(step + 1, shapes)
        if step == bad:
            values[0].view(-1)[-1] = math.inf
        for param, grad in zip(params, arrange([v.to(dtype) for v in values]), strict=True):
            param.grad = grad
        try:
            optimizer.step()
        except RuntimeError as error:
            # Every rank raises, also those that hold none of the bad elements.
            if step - 1 != bad or "parameter 0 of group 0" not in str(error):
                raise
            raised += 1
            optimizer.step()
    assert raised == (bad is not None and optimizer.nonfinite == "raise")
    return params, optimizer, heard


def same(found: Sequence[Tensor], wanted: Sequence[Tensor], where: Any, **tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            gathered(one), other, msg=lambda text, where=where: f"{where}: {text}", **tolerance
        )


EXACT = {"rtol": 0.0, "atol": 0.0}
CASES: dict[str, tuple[Callable[[list[nn.Parameter]], optim.Optimizer], int | None]] = {
    "clipping": (lambda p: optim.AdamW(p, max_grad_norm=1.0), None),
    "skip": (lambda p: optim.AdamW(p, nonfinite="skip"), 2),
    "raise": (lambda p: optim.AdamW(p, nonfinite="raise"), 2),
    "zero": (lambda p: optim.AdamW(p, nonfinite="zero", max_grad_norm=1.0), 2),
    "LAMB": (lambda p: optim.LAMB(p, lr=1e-2), None),
    "LAMB on the reference": (lambda p: optim.LAMB(p, lr=1e-2, backend="reference"), None),
    "LAMB, all of it": (lambda p: optim.LAMB(p, lr=1e-2, max_grad_norm=1.0, nonfinite="skip"), 2),
}


def decides_and_measures_as_one_process() -> None:
    """Norms are those of whole tensors: weights and decisions of a run that is not cut."""
    for case, (make, bad) in CASES.items():
        wanted, _, decisions = run(make, None, (), bad=bad)
        for way, (mesh, places) in meshes().items():
            found, _, heard = run(make, mesh, places, bad=bad)
            same(found, wanted, (case, way), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(torch.tensor(heard), torch.tensor(decisions), rtol=1e-6, atol=0)


def random_numbers_do_not_depend_on_the_number_of_ranks() -> None:
    """Bit by bit one process, in every format, where the rows of a piece fill blocks."""
    ways = [way for way in ("rows", "copies of rows", "rows of rows", "replicas") if way in meshes()]
    for state in FORMATS:
        for dtype, weights in ((torch.float32, "native"), (torch.bfloat16, "stochastic")):

            def make(
                params: list[nn.Parameter], state: str = state, weights: str = weights
            ) -> optim.Optimizer:
                return optim.AdamW(params, lr=1e-2, state=state, weights=weights)

            wanted, one, _ = run(make, None, (), dtype, shapes=SHAPES[:2])
            for way in ways:
                mesh, places = meshes()[way]
                found, optimizer, _ = run(make, mesh, places, dtype, shapes=SHAPES[:2])
                same(found, wanted, (state, way), **EXACT)
                for param, other in zip(found, wanted, strict=True):
                    for name, exact in one.dequantized_state(other).items():
                        same([optimizer.dequantized_state(param)[name]], [exact], (state, way, name), **EXACT)


def pieces_draw_numbers_of_their_own() -> None:
    """Where a piece is no run of the whole: equal pieces round otherwise, on every rank that has one."""
    for way, (mesh, places) in meshes().items():
        param = nn.Parameter(distributed(torch.zeros(128, 128), mesh, places))
        optimizer = optim.AdamW([param], state="int8")
        gen = torch.Generator().manual_seed(0)
        row = torch.rand(param.to_local().shape, generator=gen) + 0.5
        param.grad = param.detach().clone()
        param.grad.to_local().copy_(row)
        optimizer.step()
        codes = [torch.empty_like(row, dtype=torch.uint8) for _ in range(dist.get_world_size())]
        dist.all_gather(codes, optimizer.state[param]["exp_avg_sq"].to_local().contiguous())
        different = len({bytes(piece.numpy().tobytes()) for piece in codes})
        pieces = math.prod(mesh.size(i) for i, place in enumerate(places) if not place.is_replicate())
        assert different == pieces, (way, different)


def a_gradient_that_is_placed_otherwise_is_brought_into_place() -> None:
    """As terms of a sum, or cut along other dimensions."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    value, grad = torch.randn(64, 80), torch.randn(64, 80)
    dist.broadcast(value, 0), dist.broadcast(grad, 0)
    twin = nn.Parameter(value.clone())
    twin.grad = grad.clone()
    optim.AdamW([twin]).step()
    terms = distribute_tensor(grad / world, mesh, [Replicate()]).to_local()
    for places, given in (
        ([Replicate()], DTensor.from_local(terms, mesh, [Partial()])),
        ([Shard(0)], distribute_tensor(grad, mesh, [Shard(1)])),
    ):
        param = nn.Parameter(distribute_tensor(value.clone(), mesh, places))
        torch.Tensor.grad.__set__(param, given)
        optim.AdamW([param]).step()
        same([param], [twin.detach()], places, rtol=1e-6, atol=1e-7)
    partial = nn.Parameter(DTensor.from_local(terms, mesh, [Partial()]))
    try:
        optim.AdamW([("w", partial)])
    except ValueError as error:
        assert "parameter 'w' is a sum whose terms are on several ranks" in str(error)  # noqa: PT017 - no test of pytest's
    else:
        raise AssertionError("a sum of terms was taken for a parameter")


def a_loss_scaler() -> None:
    """Finds an infinity of any rank, and the step is skipped on all; it takes no mixture with whole tensors itself."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ended = []
    for sharded in (False, True):
        arrange = (lambda values: cut(values, mesh, [Shard(0)])) if sharded else (lambda values: values)
        params = [nn.Parameter(value) for value in arrange(whole_values(0, SHAPES[:3]))]
        optimizer = optim.AdamW(params, max_grad_norm=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(STEPS):
            scaler.scale(torch.zeros(()))
            values = [value * scaler.get_scale() for value in whole_values(step + 1, SHAPES[:3])]
            if step == 2:
                values[0].view(-1)[-1] = math.inf
            for param, grad in zip(params, arrange(values), strict=True):
                param.grad = grad
            scaler.step(optimizer)
            scaler.update()
        ended.append([param.detach() for param in params])
    same(ended[1], ended[0], "scaler", rtol=1e-6, atol=1e-7)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    decides_and_measures_as_one_process()
    random_numbers_do_not_depend_on_the_number_of_ranks()
    pieces_draw_numbers_of_their_own()
    a_gradient_that_is_placed_otherwise_is_brought_into_place()
    a_loss_scaler()
    if dist.get_rank() == 0:
        print("equal")
    gc.collect()  # models that live on keep threads of the group, which may end an exit with SIGABRT
    dist.destroy_process_group()
