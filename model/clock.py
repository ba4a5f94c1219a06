"""Milliseconds, measured when the device has done its work and not when it was given the work."""
import time

import torch


def drain(device: torch.device):
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Clock:
    """Milliseconds between laps; each lap waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Milliseconds since the last lap, or since the clock was made."""
        drain(self.device)
        now = time.perf_counter()
        passed = now - self.last
        self.last = now
        return passed * 1000
