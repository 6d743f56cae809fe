"""Time and memory of the parts of a run.

Flows in: blocks of code by name.  Flows out: seconds, and the most memory that was held meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

EVERY = 0.02
"""Seconds between two looks at the memory of this process."""


class Meter:
    """Takes the time and the peak memory of blocks of code; blocks of the same name add up.

    On a GPU memory is what PyTorch has allocated there, else what this process has resident, looked at every 20 ms;
    that needs psutil, and is not a number without it.

    Attributes:
        seconds: by name, wall-clock time.
        peak_gb: by name, in 10⁹ bytes.

    >>> meter = Meter(torch.device("cpu"))
    >>> with meter("sleep"):
    ...     time.sleep(0.01)
    >>> meter.seconds["sleep"] >= 0.01
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_gb: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        watch = None if on_gpu else _Watch()
        start = time.perf_counter()
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            held = watch.stop() if watch else torch.cuda.max_memory_allocated(self.device)
            self.peak_gb[name] = max(self.peak_gb.get(name, held / 1e9), held / 1e9)


class _Watch(threading.Thread):
    """Looks at the resident memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        try:
            import psutil
        except ImportError:
            self._process, self.peak = None, float("nan")
            return
        self._process = psutil.Process()
        self.peak = float(self._process.memory_info().rss)
        self.start()

    def run(self) -> None:
        """Look."""
        while not self._over.wait(EVERY):
            self._look()

    def _look(self) -> None:
        if self._process is not None:
            self.peak = max(self.peak, float(self._process.memory_info().rss))

    def stop(self) -> float:
        """Return the most bytes that were seen."""
        self._over.set()
        if self._process is not None:
            self.join()
            self._look()
        return self.peak
