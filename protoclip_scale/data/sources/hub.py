"""Datasets of the Hugging Face Hub: an id, a revision, a configuration and a split become files of one commit. No code of theirs is run."""

from collections.abc import Callable
from typing import Any

from protoclip_scale.data.sources import streaming
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.schema import SUFFIX_FORMATS

LAYOUTS = {"parquet": "parquet", "webdataset": "tar", "csv": "csv", "json": "json"}  # of the modules of `datasets`


def resolve(source: schema.Source, retry: Callable[[Callable[[], Any], str, str], Any]) -> tuple[tuple[str, ...], str, str, str]:
    """(hf:// URLs of the split's files, their root, their format, the commit that they are pinned to), without reading a file of them.

    Some requests. UserError: offline, no such dataset, revision, configuration or split, no access, or files of another kind.
    """
    place = f"hf://datasets/{source.hub}"
    commit = retry(lambda: _commit(source), "asking for its commit", place)
    module, splits = retry(lambda: streaming.hub_files(source.hub, commit, source.config), "asking for its files", place)
    if source.split not in splits:
        raise UserError(f"{place} has no split {source.split!r} (data.sources split); it has {', '.join(splits)}")
    files = splits[source.split]
    layout = LAYOUTS.get(module)
    if layout is None:
        raise UserError(
            f"{place} holds its rows as {module}, which is not read from the Hub; supported are {', '.join(LAYOUTS)}. Download it and run tools/prepare_data.py"
        )
    outside = next((file for file in files if not file.startswith(f"{place}@{commit}/") or ".." in file.split("/")), None)
    if outside is not None:
        raise UserError(
            f"{place}: its card names a file outside of the dataset ({outside[:200]}), which is not read; use another config, or download the files"
        )
    if layout != "tar":  # one module reads several of our formats
        suffix = "." + files[0].rpartition(".")[2]
        layout = SUFFIX_FORMATS.get(suffix, layout)
    return tuple(files), f"{place}@{commit}", layout, commit


def _commit(source: schema.Source) -> str:
    """The commit that the revision names now."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"hf://datasets/{source.hub}"
    try:
        return huggingface_hub.HfApi().dataset_info(source.hub, revision=source.revision, timeout=30).sha
    except OfflineModeIsEnabled as error:
        raise UserError(f"{place} cannot be read: HF_HUB_OFFLINE is set; unset it, or download the dataset and name its files instead of hub") from error
    except GatedRepoError as error:
        raise UserError(f"{place} is gated: ask for access on its page and log in with `hf auth login`, or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{place} has no revision {source.revision!r} (data.sources revision)") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{place}: there is no such dataset on the Hub, or it is private: check the id, or set HF_TOKEN") from error
