"""A terminal of any width for what runs in this process, and what is to be seen on it."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])")


@dataclass
class Screen:
    """What was written to a terminal."""

    columns: int
    written: bytearray = field(default_factory=bytearray)

    @property
    def text(self) -> str:
        return self.written.decode()

    @property
    def frames(self) -> list[str]:
        """Whatever was written between two moves of the cursor, without what only wipes."""
        parts = re.split(r"[\r\n]|\x1b\[A", self.text)
        return [part.rstrip() for part in parts if part.strip()]

    @property
    def lines(self) -> list[str]:
        """What stands there in the end, as if it were endlessly high and wide."""
        lines: list[list[str]] = [[]]
        row = column = 0
        for token in re.findall(r"\x1b\[\d*[A-Za-z]|.", self.text, re.DOTALL):
            move = CONTROL.fullmatch(token)
            if token == "\r":
                column = 0
            elif token == "\n":
                row += 1
                lines += [[]] * (row == len(lines))
                lines[row] = lines[row] or []
            elif move is not None:
                assert move[2] == "A", f"a terminal that this is not would be needed for {token!r}"
                row = max(row - int(move[1] or 1), 0)
            else:
                lines[row] += [" "] * (column + 1 - len(lines[row]))
                lines[row][column] = token
                column += 1
        return ["".join(line).rstrip() for line in lines]


@contextmanager
def terminal(columns: int) -> Iterator[Screen]:
    """Standard output and errors go to a real terminal inside; complete when it is left."""
    screen = Screen(columns)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end was closed
                return
            if not data:
                return
            screen.written += data

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            os.fdopen(os.dup(theirs), "w", encoding="utf-8") as file,
        ):
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            yield screen
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
