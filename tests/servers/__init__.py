"""Real servers for tests, each in a process of its own on a free loopback port, with faults that come by the number of the request.

``http_server``: files with ranges and directory listings. ``s3_server``: an S3 API. ``hub_server``: the datasets part of the Hugging Face Hub.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parent.parent.parent
CONTROL = "/-control"


class Server:
    """``python -m tests.servers.<module> <arguments>``; a context manager. ``url`` has no slash at its end and stays the same over ``kill`` and ``start``."""

    def __init__(self, module: str, *arguments: str | Path):
        self.module = module
        self.arguments = [str(argument) for argument in arguments]
        self.port = 0  # a free one at the first start
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, or start again after ``kill``, without faults and with an empty log; returns when it answers. Some tenths of a second, S3 a second."""
        command = [sys.executable, "-m", f"tests.servers.{self.module}", "--port", str(self.port), *self.arguments]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self._process.stdout.readline()
        assert line, f"{' '.join(command)} did not start"
        self.port = int(line)

    def kill(self) -> None:
        """From now on connections are refused."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()

    def faults(self, **settings: Any) -> None:
        """Misbehave like this from now on (``faults.Faults``; nothing given: behave); counts requests from 1 again and empties the log."""
        self._control(json.dumps(settings).encode())

    def requests(self) -> list[dict]:
        """What was asked since ``faults`` was called last: {method, path, range, answer}; answer is a status, or half, hang or refused."""
        return json.loads(self._control())

    def _control(self, data: bytes | None = None) -> bytes:
        with urllib.request.urlopen(self.url + CONTROL, data=data, timeout=10) as answer:
            return answer.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
