"""Settings of every test process; they must stand before torch is imported."""

import atexit
import multiprocessing.forkserver
import os
import shutil
import sys
import tempfile

import pytest

cache = tempfile.mkdtemp(prefix="protoclip-cache-")  # scans of files are not taken from the user's, nor put there
atexit.register(shutil.rmtree, cache, ignore_errors=True)
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PROTOCLIP_CACHE=cache)


def pytest_collection_finish(session) -> None:
    """Start the server that tests fork processes from, if any of them does: loaders ask for one with less in it, and the first to ask decides."""
    if "tests.support" in sys.modules and not session.config.option.collectonly:
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="session")
def local_run(tmp_path_factory):
    """A run that those over remote data must equal."""
    from tests import remote_cases

    return remote_cases.local_run(tmp_path_factory.mktemp("local"))
