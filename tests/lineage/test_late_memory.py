"""Code that reaches into a late value's memory. It may crash, so each piece has a process."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from .late_values import Pair


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


PIECES = {
    "share_memory_": "a = late.share_memory_(); b = plain.share_memory_(); check(a, b)",
    "is_shared": "assert late.is_shared() == plain.is_shared()",
    "set_": "late.set_(torch.ones(3)); plain.set_(torch.ones(3)); check(late, plain)",
    "set_ of another": "a = torch.empty(0).set_(late); check(a, plain)",
    "resize_": "late.resize_(2, 2); plain.resize_(2, 2); check(late, plain)",
    "storage": "assert list(late.storage()) == list(plain.storage())",
    "untyped_storage": "assert bytes(late.untyped_storage()) == bytes(plain.untyped_storage())",
    "data_ptr": "assert ctypes.string_at(late.data_ptr(), 64) == plain.numpy().tobytes()",
    "memoryview": "assert bytes(memoryview(late.numpy())) == plain.numpy().tobytes()",
    "stack": "check(torch.stack([late, plain]), torch.stack([plain, plain]))",
    "foreach": "torch._foreach_mul_([late], 2.0); check(late, plain * 2)",
    "script": "check(torch.jit.script(scaled)(late), scaled(plain))",
    "flatten": "check(torch._utils._flatten_dense_tensors([late]), plain.flatten())",
    "nested": "check(torch.nested.nested_tensor([late, plain])[0], plain)",
    "vmap": "check(torch.vmap(torch.sum)(late), torch.vmap(torch.sum)(plain))",
    "sparse": "check(late.to_sparse().to_dense(), plain)",
    "collate": "check(torch.utils.data.default_collate([late])[0], plain)",
    "pin": "assert late.is_pinned() == plain.is_pinned()",
    "a dlpack capsule": "check(from_dlpack(to_dlpack(late)), plain)",
    "a tensor's data": "a = torch.zeros(4, 4); a.data = late; check(a, plain)",
    "a parameter's data": "a = torch.nn.Linear(4, 4); a.weight.data = late; check(a.weight, plain)",
    "a parameter's gradient": "a = torch.nn.Linear(4, 4); a.weight.grad = late; late + 1; "
    "torch.optim.SGD(a.parameters(), 1.0).step()",
    "parameters to a vector": "check(torch.nn.utils.parameters_to_vector([late]), plain.flatten())",
    "broadcast": "check(torch.broadcast_tensors(late, torch.ones(4, 1))[0], plain)",
    "saved and left": "w = torch.ones(4, 4, requires_grad=True); o = late @ w; late + 1; "
    "del late; o.sum().backward(); check(w.grad, plain.sum(0)[:, None].expand(4, 4))",
    "a queue": "q = torch.multiprocessing.SimpleQueue(); q.put(late); check(q.get(), plain)",
    "another process": "q = torch.multiprocessing.SimpleQueue(); q.put(late); del late; "
    "p = torch.multiprocessing.get_context('fork').Process(target=lambda: check(q.get(), plain)); "
    "p.start(); p.join(); assert not p.exitcode",
}
UNASKED = "torch's setter of `data` asks neither functions nor kernels of what it is given"
NOT_SEEN = dict.fromkeys(("a tensor's data", "a parameter's data"), UNASKED)


def run(code):
    """Runs a piece of code in a process of its own, and returns what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _run_here(code)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}"[:2000].encode())
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return said or (f"ended by status {status}" if status else "")


def _run_here(code):
    import ctypes

    def check(one, other):
        assert torch.equal(one, other), (one, other)

    warnings.simplefilter("ignore")
    pair = Pair()
    held = {
        "check": check,
        "ctypes": ctypes,
        "from_dlpack": torch.utils.dlpack.from_dlpack,
        "to_dlpack": torch.utils.dlpack.to_dlpack,
        "scaled": scaled,
        "torch": torch,
        "late": pair.late(),
        "plain": pair.plain(),
    }
    exec(code, held)


@pytest.fixture(scope="module")
def found():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=100, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=NOT_SEEN[name]))
        if name in NOT_SEEN
        else name
        for name in PIECES
    ],
)
def test_what_reaches_into_memory_finds_the_values(name, found):
    assert found[name] == ""


if __name__ == "__main__":
    print(json.dumps({name: run(code) for name, code in PIECES.items()}))
