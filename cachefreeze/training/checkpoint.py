"""Checkpoints that are whole or not there, say if they were damaged, and load without running code.

last.pt      of the last moment that was saved
previous.pt  the one before
best.pt      of the epoch with the best validation accuracy: its weights, to start others from
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachefreeze.errors import UserError
from cachefreeze.files import partial_beside, sync_folder, write_partial
from cachefreeze.hashing import tensors_sha256

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
CHECKSUM = "sha256"
MAX_DEPTH, MAX_EXPANDED_BYTES = 30, 2**26
TIME_SHARE = 0.01
MOST_LOST_SECONDS = 300.0


def is_due(*, since: float, epoch: float, cost: float, spent: float, wall: float) -> bool:
    """Says whether a checkpoint is saved at the end of an epoch.

    Checkpoints take at most a hundredth of the time. But a run that is killed never loses more than
    five minutes or one epoch, whichever is longer.

    Args:
        since: Seconds since the last checkpoint, or since the process began.
        epoch: Seconds that the coming epoch takes.
        cost: Seconds that a checkpoint takes.
        spent: Seconds that checkpoints have taken so far.
        wall: Seconds of the run so far.
    """
    if since + epoch > max(MOST_LOST_SECONDS, epoch):
        return True
    return spent + cost <= TIME_SHARE * wall


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], best: Mapping[str, Any] | None = None
) -> None:
    """Replaces `last.pt` in a folder. What was `last.pt` becomes `previous.pt`.

    Whenever this is cut off, `last.pt` is the old one or the new one, and `best.pt` is no older
    than it.

    Args:
        folder: Folder of the run.
        state: Tensors, numbers, strings, and lists and dicts of them.
        best: What replaces `best.pt` as well. If None, that is left alone.

    Raises:
        OSError: It cannot be written. The old files are untouched.
    """
    last = folder / LAST
    if best is not None:
        with write_partial(folder / BEST, _content(best)) as written:
            written.replace(folder / BEST)
    with write_partial(last, _content(state)) as written:
        if last.exists():
            _share(last, folder / PREVIOUS)
        written.replace(last)
    sync_folder(folder)


def _content(state: Mapping[str, Any]) -> bytes:
    # Through memory: on a full disk torch.save raises a RuntimeError that names no reason. And
    # through a copy: an error with a view of the buffer in its traceback crashed Python 3.12.1.
    buffer = io.BytesIO()
    torch.save({**state, CHECKSUM: checksum(state)}, buffer)
    return buffer.getvalue()


def _share(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`; files are replaced here, never written into."""
    with partial_beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        temporary.replace(target)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `save_checkpoint` saved. Nothing in the file can run code.

    Raises:
        UserError: it cannot be read, is none of ours, or was damaged since.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file")
    state = read_saved(path, str(path), "is no checkpoint of cachefreeze", device)
    if not is_checkpoint(state):
        raise UserError(f"{path} is no checkpoint of cachefreeze: it has no {CHECKSUM}")
    return verified(state, path)


def read_saved(path: Path, what: str, otherwise: str, device: torch.device | str = "cpu") -> Any:
    """What torch saved in a file. Nothing in it can run code.

    Args:
        path: of the file.
        what, otherwise: what it is in words, and what to say of it if it is none such.
        device: that tensors are to be on.

    Raises:
        UserError: it cannot be read, or is none such.
    """
    try:
        found = torch.load(path, map_location=device, weights_only=True)
        refuse_oddities(found)
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever a file with any content at all may lead to
        raise UserError(
            f"{what} {otherwise}, or was damaged ({type(error).__name__}): nothing in it was run"
        ) from error
    return found


def is_checkpoint(found: Any) -> bool:
    """Whether what was read is what `save_checkpoint` saved."""
    return isinstance(found, dict) and CHECKSUM in found


def verified(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of a checkpoint that was read from `path`.

    Raises:
        UserError: it was damaged since.
    """
    state = {name: value for name, value in found.items() if name != CHECKSUM}
    # torch does not check what it reads.
    if found[CHECKSUM] != checksum(state):
        raise UserError(f"{path} was damaged: its content does not have the checksum that it names")
    return state


def load_last_checkpoint(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """`last.pt` of a folder, or `previous.pt` where that cannot be used; None if there is neither.

    `warn` is told if it is not the last.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """
    failures = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path)
        except UserError as error:
            failures.append(str(error))
            continue
        if failures:
            warn(f"{failures[0]}: going on from {path.name}")
        return state
    if failures:
        raise UserError(f"{failures[0]}: there is nothing to go on from; start a new run")
    return None


def refuse_oddities(value: Any, depth: int = 0) -> None:
    """Raises ValueError for what we do not save and what would be hard to look at: lists in lists
    without end, tensors that claim more elements than they have, or hold none at all."""
    if depth > MAX_DEPTH:
        raise ValueError("too deep")
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError("an odd tensor")
        size = value.numel() * value.element_size()
        if size > max(value.untyped_storage().nbytes(), MAX_EXPANDED_BYTES):
            raise ValueError("an expanded tensor")
    elif isinstance(value, Mapping):
        for item in value.values():
            refuse_oddities(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_oddities(item, depth + 1)


def checksum(value: Any) -> str:
    """SHA-256 of nested dicts and lists of tensors and plain values, by types and bits."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {tensors_sha256([('', value)])}\n".encode())
        elif isinstance(value, Mapping):
            digest.update(f"dict {len(value)}\n".encode())
            for key, item in value.items():
                digest.update(f"{key!r}\n".encode())
                add(item)
        elif isinstance(value, list | tuple):
            digest.update(f"list {len(value)}\n".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{type(value).__name__} {value!r}\n".encode())

    add(value)
    return digest.hexdigest()
