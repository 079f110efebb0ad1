"""Tries an object store: which requests it honours, and whether training works with it.

    python scripts/try_object_server.py s3://bucket [--rounds 20]

The endpoint and the credentials come from the environment: `AWS_ENDPOINT_URL`,
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`. The bucket must exist. Everything that
is written lies below a new random name, and is removed at the end.
"""

import argparse
import contextlib
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cachefreeze import ActivationCache, freeze
from cachefreeze.errors import UserError
from cachefreeze.store.objects import Objects, Unreachable

WRITERS, ROWS, BATCH, EPOCHS = 8, 512, 32, 3


def conditional_writes(objects: Objects, rounds: int) -> Iterator[tuple[str, str]]:
    """Yields what the server did, for each way to write an object that must not exist yet."""
    yield "put if absent, new object", "written" if objects.create("a", b"one") else "refused"
    written = objects.create("a", b"two")
    kept = objects.read("a", 10) == b"one"
    answer = "refused" if not written else "said to be written"
    yield "put if absent, object exists", f"{answer}, {'old' if kept else 'NEW'} content is there"
    wins, right = Counter[int](), 0
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(rounds):
            path = f"at-once/{number}"
            won = list(pool.map(lambda one, path=path: one_put(objects, path, one), range(WRITERS)))
            wins[won.count(True)] += 1
            found = objects.read(path, 10)
            right += any(won[one] and found == str(one).encode() for one in range(WRITERS))
    counts = ", ".join(f"{won} won in {times}" for won, times in sorted(wins.items()))
    yield f"put if absent, {WRITERS} at once, {rounds} times", counts
    yield "the content is that of one that won", f"{right} of {rounds}"


def one_put(objects: Objects, path: str, writer: int) -> bool | None:
    """Writes an object unless it exists. Returns None if the server gave another answer."""
    try:
        return objects.create(path, str(writer).encode())
    except Unreachable:
        return None


def other_requests(objects: Objects) -> Iterator[tuple[str, str]]:
    """Yields what the server did, for each other kind of request."""
    obstore, store = objects._obstore, objects._store
    content = bytes(range(256)) * 256
    objects.replace("b", content)
    part = obstore.get_range(store, "b", start=1000, length=500).to_bytes()
    yield "read a range", "right" if part == content[1000:1500] else "WRONG"
    parts = obstore.get_ranges(store, "b", starts=[0, 60_000], lengths=[10, 10])
    right = [one.to_bytes() for one in parts] == [content[:10], content[60_000:60_010]]
    yield "read two ranges", "right" if right else "WRONG"
    yield "ETag", "yes" if obstore.head(store, "b").get("e_tag") else "none"
    yield "read a missing object", "missing" if objects.read("none", 10) is None else "FOUND"
    yield "list", f"{len(list(objects.entries('at-once')))} objects"
    objects.remove(["b"])
    yield "remove", "removed" if objects.read("b", 10) is None else "STILL THERE"


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts the requests of this process by their kind. Those that are sent again count once."""
    counts: Counter[str] = Counter()
    plain = {name: getattr(Objects, name) for name in ("read", "create", "replace", "remove")}

    def counting(name: str) -> Any:
        def call(*words: Any, **more: Any) -> Any:
            counts[name] += 1
            return plain[name](*words, **more)

        return call

    for name in plain:
        setattr(Objects, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in plain.items():
            setattr(Objects, name, function)


def train(url: str | None, local: Path | None) -> tuple[torch.Tensor, str]:
    """Trains a head on a frozen network. Returns its weights and what the cache did."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU())
    head = nn.Linear(4096, 10)
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(8), nn.Flatten(), head)
    freeze(body)
    x, y = torch.randn(ROWS, 3, 16, 16), torch.arange(ROWS) % 10
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    cache = ActivationCache(model, directory=url, local=local) if url else None
    began, said = time.perf_counter(), ""
    with counted() as counts:
        for _ in range(EPOCHS):
            for rows in torch.randperm(ROWS).split(BATCH):
                loss = F.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        seconds = time.perf_counter() - began
        if cache is not None:
            report = cache.report()
            found = cache.stats.rows_served + report.rows_compared
            cache.close()
            asked = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
            said = f"{found} of {EPOCHS * ROWS} rows found, {seconds:.1f} s; requests: {asked}"
            said += "".join(f"; says: {one}" for one in cache.messages)
    return head.weight.detach(), said


def show(lines: Iterator[tuple[str, str]]) -> None:
    """Prints rows of a table."""
    for name, answer in lines:
        print(f"| {name} | {answer} |", flush=True)


def main() -> None:
    """Tries the object store that the command line names."""
    parser = argparse.ArgumentParser(description="Tries an object store.")
    parser.add_argument("url", help="URL of a bucket, such as s3://bucket")
    parser.add_argument("--rounds", type=int, default=20, help="number of races of eight writers")
    options = parser.parse_args()
    url = f"{options.url.rstrip('/')}/try-{uuid.uuid4().hex[:12]}"
    try:
        objects = Objects(url)
        print("| request | answer |\n|---|---|")
        show(conditional_writes(objects, options.rounds))
        show(other_requests(objects))
        plain, _ = train(None, None)
        with tempfile.TemporaryDirectory() as folder:
            for name, local in (("first run", "a"), ("second machine", "b"), ("once more", "b")):
                weights, said = train(f"{url}/rows", Path(folder) / local)
                same = (
                    "weights of the plain loop" if torch.equal(weights, plain) else "OTHER weights"
                )
                show(iter([(name, f"{same}; {said}")]))
        objects.remove([entry.path for entry in objects.entries()])
    except (UserError, Unreachable) as error:
        print(f"{options.url} does not work: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
