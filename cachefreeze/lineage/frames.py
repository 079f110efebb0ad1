"""Reports the Python functions that run in a pass."""

import gc
import sys
import types
from collections.abc import Callable
from typing import Any


class Frames:
    """Context manager that calls a function when a code object runs for the first time.

    If a debugger and a profiler are active already, it reports nothing. Garbage is not collected
    meanwhile: the collector would run finalizers and `gc.callbacks` in the middle of the pass.

    Args:
        first: Function called with the frame, before any line of it has run.

    Attributes:
        ended: Function called when the pass is over. It returns the name of a number that the pass
            reads and has changed, or an empty string.
        codes: Code objects that ran or need no report, by `id`: two functions may have equal code.
    """

    def __init__(self, first: Callable[[types.FrameType], None]) -> None:
        self.codes: dict[int, types.CodeType] = {}
        self.ended: Callable[[], str] = str
        self._first = first
        self._switch: Callable[[Any], None] | None = None
        self._is_on = self._collects = False

    def __enter__(self) -> "Frames":
        """Starts reporting."""
        self._collects = gc.isenabled()
        gc.disable()
        if sys.gettrace() is None:
            self._switch = sys.settrace
        elif sys.getprofile() is None:
            self._switch = sys.setprofile
        self.resume()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops reporting."""
        self.pause()
        self._switch = None
        if self._collects:
            gc.enable()

    def pause(self) -> bool:
        """Pauses reporting, which slows Python down. Returns whether it was active."""
        was_on, self._is_on = self._is_on, False
        if was_on and self._switch is not None:
            self._switch(None)
        return was_on

    def resume(self) -> None:
        """Continues reporting."""
        if self._switch is not None:
            self._is_on = True
            self._switch(self._note)

    def _note(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and id(code) not in self.codes:
            self.codes[id(code)] = code
            self._first(frame)
