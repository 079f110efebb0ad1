"""Checkpoints, written whole or not at all, checked for damage, and loaded without running code.

last.pt      the newest checkpoint
previous.pt  the checkpoint before it
best.pt      the weights of the epoch with the best validation accuracy, for others to start from
damaged.pt   a last.pt that could not be used
"""

import contextlib
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
from cachefreeze.keys.hashing import tensors_sha256
from cachefreeze.store.files import partial_beside, sync_folder, write_partial

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
DAMAGED = "damaged.pt"
CHECKSUM = "sha256"
MAX_DEPTH, MAX_EXPANDED_BYTES = 30, 2**26
TIME_SHARE = 0.01
MOST_LOST_SECONDS = 300.0


def is_due(*, since: float, epoch: float, cost: float, spent: float, wall: float) -> bool:
    """Says whether a checkpoint is due at the end of an epoch.

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
    """Replaces `last.pt` in a folder. The old `last.pt` becomes `previous.pt`.

    If this is cut off at any moment, `last.pt` is the old one or the new one, and `best.pt` is no
    older than it.

    Args:
        folder: Folder of the run.
        state: Content of `last.pt`: tensors, numbers, strings, and lists and dicts of them.
        best: Content of `best.pt`. If None, that file is left alone.

    Raises:
        OSError: A file cannot be written. The old files are untouched.
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
    """Makes `target` a link to `source`, or a copy of it where there are no links."""
    with partial_beside(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        temporary.replace(target)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint. Nothing in the file can run code.

    Args:
        path: Path of the file.
        device: Device that its tensors are loaded to.

    Raises:
        UserError: The file cannot be read, is no checkpoint of cachefreeze, or is damaged.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: name a checkpoint, such as last.pt")
    state = read_saved(path, str(path), "is no checkpoint of cachefreeze", device)
    if not is_checkpoint(state):
        raise UserError(
            f"{path} is no checkpoint of cachefreeze (it has no {CHECKSUM}): name another file"
        )
    return verified(state, path)


def read_saved(path: Path, what: str, otherwise: str, device: torch.device | str = "cpu") -> Any:
    """Reads a file that torch saved. Nothing in it can run code.

    Args:
        path: Path of the file.
        what: Name of the file for error messages.
        otherwise: Predicate of the error message if the content is of another kind.
        device: Device that its tensors are loaded to.

    Raises:
        UserError: The file cannot be read, or its content is of another kind.
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
    """Says whether the content of a file is a checkpoint of `save_checkpoint`."""
    return isinstance(found, dict) and CHECKSUM in found


def verified(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns the content of a checkpoint without its checksum.

    Args:
        found: Content of the file.
        path: Path of the file, for error messages.

    Raises:
        UserError: The content does not match its checksum.
    """
    state = {name: value for name, value in found.items() if name != CHECKSUM}
    # torch does not check what it reads.
    if found[CHECKSUM] != checksum(state):
        raise UserError(
            f"{path} is damaged (its content does not match its checksum): use another checkpoint"
        )
    return state


def load_last_checkpoint(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """Reads `last.pt` of a folder, or `previous.pt` if that cannot be used.

    `last.pt` becomes `damaged.pt` then: the next checkpoint would put it in the place of
    `previous.pt`.

    Args:
        folder: Folder of the run.
        warn: Function called with a sentence if `last.pt` cannot be used.

    Returns:
        Content of the checkpoint, or None if there is neither file.

    Raises:
        UserError: There are checkpoints, and none can be used.
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
            with contextlib.suppress(OSError):
                (folder / LAST).replace(folder / DAMAGED)
        return state
    if failures:
        raise UserError(f"{failures[0]}: there is nothing to go on from; start a new run")
    return None


def refuse_oddities(value: Any, depth: int = 0) -> None:
    """Refuses values that no checkpoint of ours holds, and that would be costly to look at.

    Args:
        value: Content of a file.
        depth: Number of lists and dicts around the value.

    Raises:
        ValueError: Lists or dicts are nested too deep, or a tensor claims more elements than it
            has, or holds none.
    """
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
    """Returns the SHA-256 of nested dicts and lists of tensors and plain values."""
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
