"""The rows of one kind of value on the disk: what the cache reads from and appends to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cachefreeze.store.appending import Appender, Writer
from cachefreeze.store.format import Layout, Row
from cachefreeze.store.found import Found
from cachefreeze.store.locks import Held, refuse
from cachefreeze.store.reading import Files


class Rows:
    """The rows of one set. `Directory.rows` makes it.

    Args:
        folder: Folder of the set.
        row: How a row lies in memory.
        about: What to say about the value, as plain JSON.
        held: Locks on the segments that are read.
        files: Chunk files that are open.
        writer: Thread that writes.
        tell: Function that takes a sentence for the user.
        codec: How new rows are written, one of `CODECS`.
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
    ) -> None:
        self.row = row
        self._folder = folder
        self._tell = tell
        self._found = Found(folder, row, held, files, tell)
        self._appender = Appender(folder, Layout.of(row, codec), about, writer)
        self._wrong = False
        self.refresh()

    def __len__(self) -> int:
        """Returns the number of rows on the disk that are served, each counted once."""
        return len(self._found)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of what rows are found by."""
        return self._found.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place of each row, or -1.

        Args:
            keys: Keys of the rows, of shape (n, 2).
        """
        return self._found.find(keys)

    def read(self, places: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Copies rows, and returns which of them are good.

        The others are damaged or were removed, and are unknown from now on.

        Args:
            places: Places of the rows. Those that are -1 are not good.
            out: Memory that the rows are copied to, uint8 of shape (n, row_bytes).
        """
        return self._found.read(places, out)

    def chunks(self, places: np.ndarray) -> list[int]:
        """Returns the chunks that rows lie in, each once.

        Args:
            places: Places of the rows.
        """
        return self._found.chunks(places)

    def expect(self, places: np.ndarray) -> None:
        """Has the system read rows ahead, so that the disk works while others are read.

        Args:
            places: Places of the rows. Those that are -1 are left out.
        """
        self._found.expect(places)

    def load(self, chunk: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads all rows of a chunk.

        Args:
            chunk: What `chunks` has returned.

        Returns:
            Keys of the rows, of shape (n, 2), and rows, uint8 of shape (n, row_bytes), or None if
            the chunk is damaged or was removed.
        """
        return self._found.load(chunk)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the rows of a chunk, at most."""
        return self._appender.chunk_bytes

    def append(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Keeps rows that are not there yet.

        They are found after the `refresh` that follows the writing of their chunk.

        Args:
            keys: Keys of the rows, of shape (n, 2).
            rows: Rows, uint8 of shape (n, row_bytes).
        """
        self._appender.append(keys, rows)

    def refresh(self) -> None:
        """Takes in the rows that were written since the last time, by whomever."""
        if not self._wrong:
            self._found.refresh()

    def forget(self) -> None:
        """Serves and writes none of these rows any more, for they turned out to be wrong.

        The segment that was written here is removed. The others are marked, so that nobody serves
        them.
        """
        self._wrong = True
        sentence = "Rows of this set were not what the model computes."
        own = self._appender.take_back(sentence)
        others = [folder for folder in self._found.segments if folder != own]
        self._found.drop_all()
        marked = sum(refuse(folder, sentence) for folder in others)
        told = f"the rows in {self._folder} turned out to be wrong and are served no more"
        if marked < len(others):
            told += f"; {len(others) - marked} segments could not be marked: remove the folder"
        self._tell(told)

    def withdraw(self) -> None:
        """Removes what was written here, and writes nothing more: nobody asks for these rows."""
        self._appender.take_back("These rows never came again.")

    def flush(self) -> None:
        """Has the last rows written. Nothing is appended after it."""
        self._appender.flush()

    def close(self) -> None:
        """Gives back the lock on what was written, and reads nothing more."""
        self._appender.close()
        self._found.drop_all()

    def leave_to_the_parent(self) -> None:
        """Reads on without writing, in a forked process."""
        self._appender.leave_to_the_parent()
        self._found.leave_to_the_parent()
