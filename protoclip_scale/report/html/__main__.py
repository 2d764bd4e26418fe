"""``python -m protoclip_scale.report.html RUN_DIR [--out FILE]``, also as tools/report.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from protoclip_scale.errors import UserError
from protoclip_scale.redact import redact_errors
from protoclip_scale.report.html.page import NAME, write_report


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 written, 1 the user's error (one line)."""
    parser = argparse.ArgumentParser(prog="tools/report.py", description="Write the report of a run: one HTML file that needs nothing else, of a run that goes on, ended or crashed.")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"where to write (default: {NAME} in the run directory)")
    options = parser.parse_args(arguments)
    redact_errors()
    try:
        path = write_report(options.run_dir, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
