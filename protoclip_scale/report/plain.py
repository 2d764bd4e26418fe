"""Figures as text, and the plain lines of a terminal-less run and of log.txt.

Every function takes what it is given: a missing or non-finite figure becomes a dash, never an exception, because a
figure that cannot be drawn must not stop a run.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protoclip_scale.redact import redact_text

DASH = "-"
LOSS = "loss/"
SCALE = "scale/"
KNOWN_STEP_FIGURES = ("step", "total_steps", "loss", "lr", "gradient_norm", "samples_per_second", "samples_per_second_per_rank", "mfu", "data_wait_share", "memory_gb", "eta_seconds")


def as_number(value: Any) -> float | None:
    """A finite number, or None. Takes Python, numpy and one-element torch numbers."""
    if value is None or isinstance(value, str | bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _nonfinite(value: Any) -> str | None:
    """'nan' or 'inf', which are news and are shown; None for everything else."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else None


def number(value: Any, digits: int = 4) -> str:
    """A figure with ``digits`` significant digits: 3.123, 0.0021, 12,345."""
    found = as_number(value)
    if found is None:
        return _nonfinite(value) or DASH
    return f"{found:,.0f}" if abs(found) >= 10**digits else f"{found:.{digits}g}"


def loss(value: Any) -> str:
    """A loss with four decimals."""
    return (_nonfinite(value) or DASH) if as_number(value) is None else f"{as_number(value):.4f}"


def count(value: Any) -> str:
    """A whole number with thousands separated."""
    return DASH if as_number(value) is None else f"{as_number(value):,.0f}"


def percent(value: Any, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return DASH if as_number(value) is None else f"{100 * as_number(value):.{digits}f}%"


def learning_rate(value: Any) -> str:
    return DASH if as_number(value) is None else f"{as_number(value):.2e}"


def duration(seconds: Any) -> str:
    """Seconds as 4.2s, 3m05s, 2h07m or 3d04h."""
    found = as_number(seconds)
    if found is None or found < 0:
        return DASH
    if found < 9.95:
        return f"{found:.1f}s"
    whole = round(found)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def counted(value: Any, noun: str) -> str:
    """'1 rank', '8 ranks'."""
    return f"{count(value)} {noun}" + ("" if as_number(value) == 1 else "s")


def terms(figures: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The figures under a prefix: 'loss/clip' -> 'clip'."""
    return {key[len(prefix) :]: value for key, value in figures.items() if key.startswith(prefix)}


def other_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers an objective reports beside the ones every step has."""
    return {key: value for key, value in figures.items() if key not in KNOWN_STEP_FIGURES and not key.startswith((LOSS, SCALE)) and as_number(value) is not None}


def step_place(figures: Mapping[str, Any]) -> str:
    """'step 1,234/5,000 (24.7%)'."""
    step, total = as_number(figures.get("step")), as_number(figures.get("total_steps"))
    return f"step {count(step)}" + (f"/{count(total)} ({percent((step or 0) / total)})" if total else "")


def per_rank(figures: Mapping[str, Any]) -> str:
    """' (64 each)', where there are several ranks."""
    each = figures.get("samples_per_second_per_rank")
    return "" if each is None or each == figures["samples_per_second"] else f" ({number(each, 3)} each)"


def step_line(figures: Mapping[str, Any], episode: str = "") -> str:
    """One compact line per logged step; figures that are not there leave no gap."""
    parts = [" ".join(part for part in (episode, step_place(figures)) if part)]
    if "loss" in figures:
        loss_terms = ", ".join(f"{name} {loss(value)}" for name, value in terms(figures, LOSS).items())
        parts.append(f"loss {loss(figures['loss'])}" + (f" ({loss_terms})" if loss_terms else ""))
    if scales := terms(figures, SCALE):
        parts.append("scale " + " ".join(f"{name} {number(value)}" for name, value in scales.items()))
    shown = {
        "lr": ("lr {}", learning_rate),
        "gradient_norm": ("grad {}", number),
        "samples_per_second": ("{} samples/s" + per_rank(figures), lambda value: number(value, 3)),
        "mfu": ("MFU {}", percent),
        "data_wait_share": ("wait {}", lambda value: percent(value, 0)),
        "memory_gb": ("mem {} GB", lambda value: number(value, 3)),
    }
    parts += [template.format(write(figures[key])) for key, (template, write) in shown.items() if key in figures]
    parts += [f"{name} {number(value)}" for name, value in other_figures(figures).items()]
    if "eta_seconds" in figures:
        parts.append(f"eta {duration(figures['eta_seconds'])}")
    return " | ".join(parts)


def append_log(path: Path, text: str) -> None:
    """Append to a log, each line with the local date and time, without secrets; a folder that is missing is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with path.open("a", encoding="utf-8", errors="replace") as log:
        log.write("".join(f"{stamp} {line}".rstrip() + "\n" for line in redact_text(text).splitlines() or [""]))
