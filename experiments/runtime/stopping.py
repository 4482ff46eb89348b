"""Ctrl-C and SIGTERM as a request to stop after the current chunk."""

import os
import signal
import sys
import threading
from types import TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """A context in which the first signal only sets `received`, and the second ends the process.

    Python runs a signal handler after the current call into XLA, which may take minutes. A thread
    therefore reads the signals from the file descriptor that the C handler writes to.

    Attributes:
      received: Number of the first signal; None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_write = signal.set_wakeup_fd(self._write)
        self._old_handlers = {each: signal.signal(each, lambda *_: None) for each in _SIGNALS}
        self._thread = threading.Thread(target=self._watch, args=(read,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, handler in self._old_handlers.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(self._old_write)
        os.close(self._write)  # ends the thread
        self._thread.join()

    def _watch(self, read: int) -> None:
        while byte := os.read(read, 1):
            if byte[0] not in _SIGNALS:
                continue
            if self.received is not None:
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
                os._exit(128 + byte[0])
            self.received = byte[0]
            os.write(2, b"\nstopping after this chunk; once more stops at once\n")
        os.close(read)
