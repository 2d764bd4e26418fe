"""Peak memory of this process above what it holds at some moment: resident memory on a CPU, allocated memory on a GPU."""

import re
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"


def _resident(key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", STATUS.read_text())[1])


class Peak:
    """Since ``forget``, above what was held when this was made. Linux only on a CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self._before = 0
        self._before = self.now()
        self.forget()

    def forget(self) -> None:
        """Peaks so far do not count."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            CLEAR.write_text(FORGET_PEAK)

    def now(self) -> int:
        """Bytes held at this moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.memory_allocated(self.device) - self._before
        return _resident("VmRSS") - self._before

    def bytes(self) -> int:
        """The peak."""
        most = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return most - self._before
