"""Costs of operations by which all processes with one directory choose what to keep.

Each process measures other seconds. Where two choices cost about the same, processes would choose
differently, and could not use each other's rows.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

from cachefreeze.keys import environment, machine
from cachefreeze.lineage import Trace
from cachefreeze.store.files import open_regular, write_partial

# Largest file that is read. A number takes about 25 bytes.
_MOST_BYTES = 2**20


def agreed_seconds(trace: Trace, folder: Path | None) -> list[float]:
    """Returns the seconds that the first process has measured for each operation of the same pass.

    They decide what is kept, and so the speed, but no value.

    Args:
        trace: Trace of a pass.
        folder: Folder that the processes share. None if there is none.

    Returns:
        Seconds that this process has measured, if it is the first one or the folder fails.
    """
    own = [one.seconds for one in trace.operations]
    if folder is None:
        return own
    path = folder / f"{_name_of(trace)}.json"
    found = _read(path, len(own))
    if found is None:
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with write_partial(path, json.dumps(own).encode()) as written:
                try:
                    os.link(written, path)  # fails if another process was faster
                finally:
                    written.unlink()
        found = _read(path, len(own))
    return own if found is None else found


def _name_of(trace: Trace) -> str:
    operations = [(one.name, one.kind, one.reads, one.makes) for one in trace.operations]
    values = [(one.shape, one.stride, str(one.dtype), one.kind) for one in trace.values]
    devices = sorted({str(one.device) for one in trace.values})
    around = [environment(one.device) for one in trace.values[:1]]
    content = operations, values, trace.inputs, trace.outputs, devices, around, machine()
    return xxhash.xxh3_128_hexdigest(repr(content).encode())


def _read(path: Path, count: int) -> list[float] | None:
    try:
        with open(path, "rb", opener=open_regular) as file:
            found = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return found if _is_right(found, count) else None


def _is_right(found: object, count: int) -> bool:
    return (
        isinstance(found, Sequence)
        and len(found) == count
        and all(type(one) is float and 0 <= one < math.inf for one in found)
    )
