"""Requests to stop (Ctrl-C, SIGTERM), noted so that a run can stop between two steps."""

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """A context that notes the first SIGINT or SIGTERM. A second raises KeyboardInterrupt at once.

    It is true once a signal was noted. Outside the main thread, where Python lets nobody handle
    signals, nothing is noted.

    Attributes:
        received: Signal that was noted, or None.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        """Says whether to stop."""
        return self.received is not None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for each in self.SIGNALS:
                # Whoever started this with Ctrl-C switched off (nohup) meant it.
                if signal.getsignal(each) != signal.SIG_IGN:
                    self._before[each] = signal.signal(each, self._handle) or signal.SIG_DFL
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
