"""Sees which python functions run in a pass, each once."""

import sys
import types
from collections.abc import Callable
from typing import Any


class Frames:
    """Calls a function when a code runs for the first time. It is entered for a pass.

    Where a debugger and a profiler are both at work already, nothing is seen.

    Args:
        first: Function that is called with the frame, before anything in it has run.

    Attributes:
        ended: Function that is called when the pass is over. It says whether the pass has changed a
            number that it reads.
        codes: Codes that ran or that need not be told, by their identity: equal codes of two
            functions are two things.
    """

    def __init__(self, first: Callable[[types.FrameType], None]) -> None:
        self.codes: dict[int, types.CodeType] = {}
        self.ended: Callable[[], bool] = bool
        self._first = first
        self._switch: Callable[[Any], None] | None = None
        self._is_on = False

    def __enter__(self) -> "Frames":
        """Begins to look."""
        if sys.gettrace() is None:
            self._switch = sys.settrace
        elif sys.getprofile() is None:
            self._switch = sys.setprofile
        self.resume()
        return self

    def __exit__(self, *error: object) -> None:
        """Ends looking."""
        self.pause()
        self._switch = None

    def pause(self) -> bool:
        """Looks away, for looking takes time. Says whether it looked before."""
        was_on, self._is_on = self._is_on, False
        if was_on and self._switch is not None:
            self._switch(None)
        return was_on

    def resume(self) -> None:
        """Looks again."""
        if self._switch is not None:
            self._is_on = True
            self._switch(self._note)

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and id(code) not in self.codes:
            self.codes[id(code)] = code
            self._first(frame)
