"""The `prepare:` part of a task's file: where a set comes from and how its files are laid out."""

from typing import Any, Literal

from pydantic import Field, ValidationError

from protoclip_scale.evaluation.tasks import read_task
from protoclip_scale.recipe.schema import Section


class Download(Section):
    """A file on the web; archives are unpacked."""

    url: str = Field(pattern=r"^https?://", description="Address.")
    md5: str | None = Field(None, pattern=r"^[0-9a-f]{32}$", description="MD5 of the file as its authors or torchvision give it.")


class HubColumns(Section):
    """What a dataset of the Hub calls things."""

    split: str = Field("test", description="Split.")
    image: str = Field("image", description="Image column.")
    label: str = Field("label", description="Class column: names, or numbers with names (ClassLabel).")


class Preparation(Section):
    """How rows are found in a folder."""

    downloads: tuple[Download, ...] = Field((), description="What is fetched; without any, the folder must be given.")
    manual: str | None = Field(None, description="Where to get what cannot be fetched, and what to make of it.")
    also: str | None = Field(None, description="What must be added by hand to the downloads.")
    layout: Literal["folders", "list", "cifar", "stl10", "idx", "coco", "karpathy"] = Field(description="folders: one folder of images for each class. list: lines of a text file. cifar, stl10, idx: binary files of these sets. coco, karpathy: JSON with captions.")
    folder: str = Field("", description="Where the folders of the classes lie.")
    files: tuple[str, ...] = Field((), description="The binary files: of images, then of labels where these are apart.")
    label_names: str | None = Field(None, description="Text file with the name of each label number, one a line.")
    label_bytes: int = Field(1, ge=1, le=2, description="Bytes of labels before each image of a cifar file; the last one counts.")
    list: str | None = Field(None, description="The text or JSON file that lists the images.")
    line: str | None = Field(None, description="Regular expression of a line, with groups `image` and `class`; lines that it does not match are skipped.")
    image: str | None = Field(None, description="Path of an image, from the line's groups or the JSON's {image} and {folder}.")
    match: Literal["names", "order"] = Field("names", description="names: folders or labels are called like the classes, but for case and punctuation. order: the n-th in (natural) order is the n-th class.")
    skip_other_folders: bool = Field(False, description="Folders that are no class are left out; else they are an error.")
    crop_border: int = Field(0, ge=0, description="Pixels cut off at each side.")
    captions_per_image: int | None = Field(None, ge=1, description="At most so many captions of an image, the first ones.")
    hub: HubColumns = Field(HubColumns(), description="Names in a dataset of the Hub that is given as source.")


def preparation_of(task: str) -> Preparation:
    """The checked `prepare:` part of a task."""
    facts: dict[str, Any] = read_task(task)["prepare"]
    try:
        return Preparation.model_validate(facts)
    except ValidationError as error:
        raise AssertionError(f"task {task}: {error}") from error
