"""Two processes under DistributedDataParallel, on gloo."""

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.body.requires_grad_(False).eval()

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def seen_after(model, output):
    model.zero_grad()
    output.square().sum().backward()
    held = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [output.detach().clone(), *held, *(b.clone() for b in model.buffers())]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def work(rank, port):
    from cachefreeze import lineage

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Model(), broadcast_buffers=True)
    torch.manual_seed(rank + 1)
    x, other = torch.randn(4, 6), torch.randn(4, 6)
    with torch.no_grad():
        model.module.body[1].running_mean.add_(rank)  # the broadcast makes them equal again
    start = seen_after(model, model(x))
    expected = seen_after(model, model(x))
    assert same(start, expected)
    output, trace = lineage.trace(model, x)
    assert same(expected, seen_after(model, output))
    plan = lineage.Plan(trace, lineage.crossing_cut(trace))
    for batch in (x, other):
        wanted = seen_after(model, model(batch))
        output, kept, report = lineage.capture(plan, model, batch)
        assert kept is not None, report.left
        assert same(wanted, seen_after(model, output))
        for leave_at in (None, *range(len(plan.replayed))):
            own = {number: tensor.clone() for number, tensor in kept.items()}
            output, report = lineage.replay(plan, own, model, batch, leave_at=leave_at)
            assert same(wanted, seen_after(model, output)), leave_at
            if leave_at is None:
                assert not report.left, report.left
                assert report.skipped
    # One process replays while the other one computes.
    own = {number: tensor.clone() for number, tensor in kept.items()}
    output = model(other) if rank else lineage.replay(plan, own, model, other)[0]
    assert same(wanted, seen_after(model, output))
    with model.no_sync():
        output, report = lineage.replay(plan, kept, model, other)
        output.sum().backward()
    dist.barrier()
    del model
    dist.destroy_process_group()


def test_two_processes_train_as_without_replay():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(port)],
            cwd=root, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-3000:]


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # threads of gloo may still run, and then Python's own exit is an abort
