"""Two processes with gloo: each rank penalises the kernel of its own samples, and gradients are averaged as always."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

import mgs_core as mgs

torch = pytest.importorskip("torch")

from mgs_core.adapters.torch import MGSLoss  # noqa: E402  # after the skip
from torch import nn  # noqa: E402  # after the skip


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch():
    random = torch.Generator().manual_seed(1)
    return torch.randn(8, 5, generator=random, dtype=torch.float64), torch.arange(8) % 3


def criterion():
    return MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("log_determinant", 0.5), weighting="agreement")


def work(rank: int, port: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, (x, y) = nn.parallel.DistributedDataParallel(build()), batch()
    half = slice(4 * rank, 4 * rank + 4)
    criterion()(model(x[half]), y[half]).backward()
    torch.save([value.grad for value in model.parameters()], path)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_each_rank_has_the_mean_of_the_ranks_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [tmp_path / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, "-P", __file__]
    processes = [subprocess.Popen([*command, str(rank), str(port), str(path)]) for rank, path in enumerate(paths)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    model, (x, y) = build(), batch()
    parts = [torch.autograd.grad(criterion()(model(x[i : i + 4]), y[i : i + 4]), list(model.parameters())) for i in (0, 4)]
    for path in paths:
        for found, left, right in zip(torch.load(path), *parts, strict=True):
            torch.testing.assert_close(found, (left + right) / 2)


def test_a_static_graph_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x, y = batch()
        model = nn.parallel.DistributedDataParallel(build(), static_graph=True)
        with pytest.raises(mgs.UnsupportedModelError, match="`static_graph` must be False in DistributedDataParallel"):
            criterion()(model(x), y)
        model = nn.parallel.DistributedDataParallel(build(), find_unused_parameters=True)
        criterion()(model(x), y).backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", ["module", "layer", "first", "flat", "sliced"])
def test_sharded_parameters_are_refused(tmp_path, form):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        (x, y), model, change = batch(), build(), lambda outputs: outputs
        if form == "first":
            with pytest.warns(UserWarning, match="FSDP is switching to use `NO_SHARD`"):  # of one process
                model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            mesh = init_device_mesh("cpu", (1,))
            fully_shard(model[2] if form == "layer" else model, mesh=mesh)
            if form in ("flat", "sliced"):  # the outputs bear no hook
                change = torch.clone
        options = {"model": model} if form == "flat" else {}
        loss = MGSLoss(nn.CrossEntropyLoss(), penalty=mgs.Penalty("trace"), weighting="agreement", **options)
        with pytest.raises(mgs.UnsupportedModelError, match=r"FSDP shards.*Use DistributedDataParallel|fully_shard shards"):
            loss(change(model(x)), y)
        with pytest.raises(mgs.UnsupportedModelError, match="`model` must hold its parameters whole"):
            mgs.kernel(model, x)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trainable", [True, False])
def test_layers_split_over_processes_are_refused(tmp_path, trainable):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        (x, y), model = batch(), build()
        truth = mgs.kernel(model, x, parameters=["0.weight", "0.bias"])
        model[2].requires_grad_(trainable)
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"2": ColwiseParallel(output_layouts=Replicate())})
        if trainable:
            for call in (lambda: mgs.kernel(model, x), lambda: criterion()(model(x), y)):
                with pytest.raises(mgs.UnsupportedModelError, match="a DTensor, of which each process has a part"):
                    call()
        else:
            torch.testing.assert_close(mgs.kernel(model, x), truth)
            with pytest.raises(mgs.UnsupportedModelError, match=r"a layer split over processes \(DTensor"):
                criterion()(model(x), y)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
