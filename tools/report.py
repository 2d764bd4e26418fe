"""Write the report of a run: ``python tools/report.py RUN_DIR [--out FILE]``. One HTML file that needs nothing else; of any run directory, also a crashed run's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protoclip_scale.report.html.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
