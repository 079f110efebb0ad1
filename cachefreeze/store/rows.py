"""The rows of one set on disk: found, read and appended."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.store.appending import Appender, Writer
from cachefreeze.store.format import Layout, Row
from cachefreeze.store.found import Found
from cachefreeze.store.locks import Held, refuse
from cachefreeze.store.mirror import Mirror
from cachefreeze.store.reading import Files


class Rows(Found):
    """The rows of one set. `Directory.rows` makes this object.

    Args:
        folder: Folder of the set.
        row: Sizes and type of one row.
        about: Description of the value for people, as plain JSON.
        held: Locks on the segments that are read.
        files: Open chunk files.
        writer: Thread that writes.
        tell: Function called with each message for the user.
        codec: Codec for new rows, one of `CODECS`.
        mirror: Copier between the directory and an object store. None if there is none.
    """

    def __init__(
        self,
        folder: Path,
        row: Row,
        about: Mapping[str, Any],
        held: Held,
        files: Files,
        writer: Writer,
        tell: Callable[[str], None],
        codec: str = "raw",
        mirror: Mirror | None = None,
    ) -> None:
        super().__init__(folder, row, held, files, tell)
        self._appender = Appender(folder, Layout.of(row, codec), about, writer)
        self._wrong = False
        self._mirror = mirror
        self.refresh()

    @property
    def chunk_bytes(self) -> int:
        """Largest disk space of a chunk, in bytes."""
        return self._appender.chunk_bytes

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Writes rows that are not there yet, in the background.

        They are found after their chunk is written and `refresh` is called.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, uint8 of shape (n, row_bytes).
        """
        self._appender.append(keys, rows)

    def refresh(self) -> None:
        """Adds the rows of the chunks that were completed since the last call, by any run."""
        if self._wrong:
            return
        if self._mirror is not None:
            self._mirror.look(self._folder.name)
        super().refresh()

    def forget(self) -> None:
        """Stops reading and writing these rows, since they were found to be wrong.

        The segments that this object has written are removed. All others are marked, so that no
        process reads them.
        """
        self._wrong = True
        sentence = "Rows of this set were not what the model computes."
        own = self._appender.take_back(sentence)
        others = [folder for folder in self.segments if folder not in own]
        self.drop_all()
        self._remove_elsewhere(own, own=True)
        self._remove_elsewhere(others, own=False)
        marked = sum(refuse(folder, sentence) for folder in others)
        told = f"the rows in {self._folder} turned out to be wrong and are not used any more"
        if marked < len(others):
            told += f"; {len(others) - marked} segments could not be marked: remove the folder"
        self._tell(told)

    def withdraw(self) -> None:
        """Removes the segments that this object has written, since their rows never came again."""
        self._remove_elsewhere(self._appender.take_back("These rows never came again."), own=True)

    def _remove_elsewhere(self, folders: Sequence[Path], own: bool) -> None:
        if self._mirror is not None:
            self._mirror.remove(self._folder.name, [folder.name for folder in folders], own)

    def publish(self) -> None:
        """Writes the rows that do not fill a chunk yet, in the background."""
        self._appender.publish()

    def flush(self) -> None:
        """Queues the last rows for writing. No rows are appended afterwards."""
        self._appender.flush()

    def close(self) -> None:
        """Stops reading and releases all locks. Called after all chunks are written."""
        self._appender.close()
        self.drop_all()

    def after_fork(self) -> None:
        """Goes on reading, but not writing, in a forked process."""
        super().after_fork()
        self._appender.after_fork()
