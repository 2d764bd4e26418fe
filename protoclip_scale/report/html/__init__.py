"""The report of a run: one HTML file made of what its run directory holds, of a run that goes on, ended or crashed.

``python -m protoclip_scale.report.html RUN_DIR`` writes it, and so does the engine, in a process of its own. Nothing here imports torch.
"""

from protoclip_scale.report.html.page import NAME, write_report

__all__ = ["NAME", "write_report"]
