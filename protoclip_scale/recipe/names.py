"""Objectives are found by name: one module each in ``protoclip_scale.objectives``, so that adding one needs no list to change."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType

_PACKAGE = "protoclip_scale.objectives"
_OTHERS = ("base", "compared")  # modules of the package that are no objectives; what objectives share lies in a folder below


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: ', did you mean X?' or '; one of: X, Y'."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f", did you mean {close[0]}?" if close else f"; one of: {', '.join(names)}"


def objective_names() -> list[str]:
    """The objectives that exist."""
    package = importlib.import_module(_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg and module.name not in _OTHERS)


def objective_module(name: str) -> ModuleType:
    """The module of an objective, with its ``Settings`` and ``build``. ValueError names the nearest one."""
    if name not in objective_names():
        raise ValueError(f"objectives.{name} is not an objective{nearest(name, objective_names())}")
    return importlib.import_module(f"{_PACKAGE}.{name}")
