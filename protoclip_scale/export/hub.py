"""An export to the Hugging Face Hub: what its manifest lists, file by file, then one commit that makes all of it visible."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from protoclip_scale.errors import UserError
from protoclip_scale.export.manifest import NAME, check_files, sha256_of
from protoclip_scale.redact import redact_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def push(folder: Path, repo: str, private: bool, dry_run: bool) -> Iterator[str]:
    """Upload an export; yields lines that say what is done. Only what the manifest lists is sent, so no cache or hidden file is.

    An interrupted push goes on when it is called again: contents that the Hub has are not sent a second time, and nothing is visible before the last step, one
    commit of all files. A repository that exists keeps its visibility. Raises UserError, one line without secrets, for a name that cannot be one, an export that differs
    from its manifest, no token, no network, and what the Hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise UserError(f"--push {repo}: that is no ORG/NAME of a repository; write for instance my-name/my-model")
    manifest = check_files(folder)
    files = {name: (about["bytes"], about["sha256"]) for name, about in manifest["files"].items()}
    files[NAME] = ((folder / NAME).stat().st_size, sha256_of(folder / NAME))
    total = f"{len(files)} files, {sum(size for size, _ in files.values()):,} bytes"
    if dry_run:
        yield from (f"{size:>14,}  {digest}  {name}" for name, (size, digest) in files.items())
        yield f"{total} would go to {repo}, {'private' if private else 'public'} if it is new; nothing was sent"
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the lines here are the progress; read when the library is imported
    from huggingface_hub import HfApi, get_token

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_secrets)
    token = get_token()
    if not token:
        raise UserError("--push: no token for the Hugging Face Hub; make one with write access at https://huggingface.co/settings/tokens, then set HF_TOKEN or run `hf auth login`, and give the same command again")
    yield f"pushing {total} to {repo}"
    yield from _sent(HfApi(token=token), folder, repo, list(files), private)


def _sent(api: "HfApi", folder: Path, repo: str, names: list[str], private: bool) -> Iterator[str]:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = "give the same command again to go on"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        for number, operation in enumerate(operations, start=1):
            api.preupload_lfs_files(repo, [operation], free_memory=False)  # one by one; small files are sent with the commit
            yield f"{number} of {len(names)}: {operation.path_in_repo}"
        commit = api.create_commit(repo, operations, commit_message="Export of protoclip-scale")
        yield f"done: {redact_text(commit.commit_url)}"
    except OfflineModeIsEnabled as error:
        raise UserError("--push: HF_HUB_OFFLINE is set; unset it and give the same command again") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        fix = "the token has no right to write there: make one with write access, or name your own organisation" if status in (401, 403) else again
        raise UserError(f"--push {repo}: the Hub answered {status} ({_one_line(error)}); {fix}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--push {repo}: interrupted ({_one_line(error) or type(error).__name__}); {again}") from error


def _without_secrets(record: logging.LogRecord) -> bool:
    """Retries are told with the address they go to, which may be signed."""
    record.msg, record.args = redact_text(record.getMessage()), ()
    return True


def _one_line(error: Exception) -> str:
    """With its cause, in which the status stands."""
    told = (" ".join(str(each).split()) for each in (error, error.__cause__) if each is not None)
    return redact_text(": ".join(filter(None, told)))[:300]
