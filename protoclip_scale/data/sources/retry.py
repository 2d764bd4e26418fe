"""Trying again: which errors of reading may pass, how long to wait between attempts, and what the user is told in the end."""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from protoclip_scale.errors import Outage, UserError

Result = TypeVar("Result")

FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between attempts; doubled each time
SAY_SO_AFTER = 10.0  # seconds of retries before a line goes to the log
PASSING_STATUSES = {408, 425, 429}  # besides every 5xx
LASTING = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "GatedRepoError", "OfflineModeIsEnabled"}  # by name: optional packages



class Cancelled(Exception):
    """Leaves a retry that nobody waits for any more."""


_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # ranks and threads fail at the same moment and must not come back at the same moment


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of aiohttp, httpx, requests or botocore, or None."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        status = response if isinstance(response, int) else getattr(response, "status_code", None) or getattr(cause, "status", None)
        if isinstance(status, int) and 400 <= status < 600:
            return status
    return None


def retry_after(error: BaseException) -> float:
    """Seconds that the server asks to wait; 0 if it does not say."""
    for cause in causes(error):
        headers = getattr(cause, "headers", None) or getattr(getattr(cause, "response", None), "headers", None) or {}
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            return max(0.0, float(headers.get("Retry-After")))
    return 0.0


def may_pass(error: Exception, remote: bool) -> bool:
    """Whether waiting may help. Remote: all but a status that stays (4xx, apart from too many requests and timeouts), a file that is not there, missing
    credentials, offline mode. Local: only errors of the operating system other than a missing or protected file; Arrow's own OSErrors carry no number."""
    if not remote:
        return isinstance(error, OSError) and error.errno is not None and not isinstance(error, (FileNotFoundError, PermissionError))
    if any(type(cause).__name__ in LASTING for cause in causes(error)):
        return False
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in PASSING_STATUSES
    last = list(causes(error))[-1]  # fsspec says "not found" for whatever kept it from asking
    return not isinstance(last, (FileNotFoundError, PermissionError, NotImplementedError, ImportError))


def text_of(error: BaseException) -> str:
    """One line: the status if there is one, and the error that says most."""
    status = status_of(error)
    chain = list(causes(error))
    telling = next((cause for cause in reversed(chain) if str(cause)), chain[0])
    line = " ".join(f"{type(telling).__name__}: {telling}".split())[:300]
    return line if status is None or str(status) in line else f"status {status}, {line}"


def retry(
    action: Callable[[], Result], seconds: float, doing: str, place: str, remote: bool, cancelled: threading.Event | None = None
) -> Result:
    """``action()``, tried again with jittered, doubling delays while its errors may pass and ``seconds`` are not over; the last attempt starts at most then.

    Raises UserError (Outage, if it may pass) that names the place, what was done, for how long, and the last error. UserErrors and AssertionErrors of the action pass unchanged.
    Raises Cancelled as soon as ``cancelled`` is set, also in the middle of a wait; an attempt under way is not interrupted.
    """
    started, delay, silent = time.monotonic(), FIRST_DELAY, True
    while True:
        if cancelled is not None and cancelled.is_set():
            raise Cancelled(f"{place}: {doing} was cancelled")
        try:
            return action()
        except (UserError, AssertionError, Cancelled):
            raise
        except Exception as error:
            waited = time.monotonic() - started
            if not may_pass(error, remote):
                what = "the server refuses, or the file is missing" if remote else "the file is missing, unreadable or corrupt"
                raise UserError(f"{place}: {doing} failed; {what}: {text_of(error)}") from error
            if waited >= seconds:
                raise Outage(
                    f"{place}: {doing} failed for {waited:.0f} s (data.retry_seconds {seconds:g}); the last error was {text_of(error)}"
                ) from error
            if silent and waited > SAY_SO_AFTER:
                silent = False
                _log.warning("%s: %s fails, trying again for up to %.0f s (data.retry_seconds): %s", place, doing, seconds, text_of(error))
            pause = time.sleep if cancelled is None else cancelled.wait
            pause(min(seconds - waited, max(delay * _jitter.uniform(0.5, 1.5), retry_after(error))))
            delay = min(delay * 2, LONGEST_DELAY)
