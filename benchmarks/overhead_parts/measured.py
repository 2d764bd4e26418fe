"""Runs launch/pretrain.py in this process and writes the processor seconds of each phase of the run: ``python measured.py OUT.json ARGUMENTS...``

The run's own clock is given processor time instead of wall time. Nothing else differs from ``python launch/pretrain.py ARGUMENTS...``.
"""

import json
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from protoclip_scale.engine import run_log  # noqa: E402

CLOCKS: list[run_log.PhaseClock] = []


class ProcessorClock(run_log.PhaseClock):
    """A phase clock that counts the processor time of all threads of the process."""

    def __init__(self):
        super().__init__(clock=time.process_time)
        CLOCKS.append(self)


if __name__ == "__main__":
    run_log.PhaseClock = ProcessorClock  # before engine.run imports the name
    from protoclip_scale.engine.command import main

    out, arguments = Path(sys.argv[1]), sys.argv[2:]
    began = time.perf_counter()
    code = main(arguments)
    if code == 0:
        figures = {
            "phases": CLOCKS[-1].seconds,
            "wall_seconds": time.perf_counter() - began,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        out.write_text(json.dumps(figures))
    sys.exit(code)
