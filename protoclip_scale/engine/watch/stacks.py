"""Where this process's main thread is in the code: a word on it for others, and all threads' stacks for a file."""

import faulthandler
import sys
import threading
import time
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[2])
COLLECTIVES = str(Path(PACKAGE) / "collectives.py")
BACKWARD = ("torch", "autograd", "graph.py")  # where DDP waits for other ranks' gradients


def whereabouts() -> tuple[str, bool]:
    """('training.py:68', or 'any_rank in training.py:68', and whether the main thread is in something that waits for other ranks)."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    inner, waits, collective = frame, False, ""
    while inner is not None:
        path, name = inner.f_code.co_filename, inner.f_code.co_name
        if path == COLLECTIVES:
            waits, collective = True, f"{name} in "  # the outermost one of them
        elif path.startswith(PACKAGE):
            return f"{collective}{Path(path).name}:{inner.f_lineno}", waits
        elif "torch/distributed/" in path or "deepspeed/comm/" in path or Path(path).parts[-3:] == BACKWARD:
            waits = True
        inner = inner.f_back
    return "", waits


def dump(path: Path, title: str) -> None:
    """Append the stacks of all threads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {title}\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
