"""Files that are whole or not there at all."""

import contextlib
import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a crash at any moment leaves the old file or the new one.

    Raises:
        OSError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename is on the disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def nearest_folder(path: Path) -> Path:
    """The path itself, or the first of its parents that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def why_not_writable(folder: Path) -> str | None:
    """Why a folder cannot be made or written to, as far as can be told without trying."""
    try:
        nearest = nearest_folder(folder)
    except OSError as error:  # a parent that may not be searched, a name that is too long
        return error.strerror or str(error)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    effective = os.access in os.supports_effective_ids
    if not os.access(nearest, os.W_OK | os.X_OK, effective_ids=effective):
        return f"no permission to write to {nearest}"
    return None


def size_of_tree(folder: Path) -> int:
    """Bytes of all files below `folder`; what vanishes while it counts is not counted."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


def human_bytes(count: float) -> str:
    """A size in decimal units, three digits: `118 MB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.3g} {unit}"
