"""The rows of a set in the layouts that their authors publish. Nothing is unpickled: CIFAR is read from its binary version."""

import functools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protoclip_scale.data.sources.image_files import IMAGE_SUFFIXES, read_local, within
from protoclip_scale.errors import UserError
from protoclip_scale.preparation.held_out.pixels import png
from protoclip_scale.preparation.held_out.schema import Preparation

MAX_LIST_BYTES = 1 << 30


class Row(NamedTuple):
    """key: where the row is, unique in its set. read: its encoded image, None if it is missing or too long. label: as the source has it, "" for captions."""

    key: str
    read: Callable[[int], bytes | None]
    label: str = ""
    captions: tuple[str, ...] = ()


def rows_of(preparation: Preparation, root: Path) -> list[Row]:
    """All rows, in an order that depends on the files alone. UserError for what is missing or of another form."""
    return list(LAYOUTS[preparation.layout](preparation, root))


def _folders(preparation: Preparation, root: Path) -> Iterator[Row]:
    """CLASS/**/image; with ``folder`` below the root, or with the classes right in it."""
    base = root / preparation.folder if (root / preparation.folder).is_dir() else root
    classes = sorted(entry.name for entry in os.scandir(_existing(base)) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{base} holds no folders; there must be one with images for each class")
    for name in classes:
        for path in sorted(base.joinpath(name).rglob("*")):
            if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file() and within(str(base), str(path)):
                yield Row(str(path.relative_to(base)), functools.partial(read_local, str(path)), name)


def _list(preparation: Preparation, root: Path) -> Iterator[Row]:
    """The lines of a text file that ``line`` matches, in their order."""
    pattern = re.compile(preparation.line)
    for line in _text(_find(root, preparation.list)).splitlines():
        if found := pattern.fullmatch(line.strip()):
            name = preparation.image.format(**found.groupdict())
            yield Row(name, _image(root, name), found["class"])


def _coco(preparation: Preparation, root: Path) -> Iterator[Row]:
    """COCO's annotations: images in the order of their ids, captions in that of theirs."""
    tree = _json(_find(root, preparation.list))
    captions: dict[int, list[tuple[int, str]]] = {}
    for annotation in tree["annotations"]:
        captions.setdefault(annotation["image_id"], []).append((annotation["id"], annotation["caption"]))
    for image in sorted(tree["images"], key=lambda image: image["id"]):
        name = preparation.image.format(image=image["file_name"])
        yield Row(name, _image(root, name), captions=_first(preparation, [text for _, text in sorted(captions.get(image["id"], []))]))


def _karpathy(preparation: Preparation, root: Path) -> Iterator[Row]:
    """The test images of one of Karpathy's split files, in its order."""
    for image in _json(_find(root, preparation.list))["images"]:
        if image["split"] == "test":
            name = preparation.image.format(image=image["filename"], folder=image.get("filepath", ""))
            yield Row(name, _image(root, name), captions=_first(preparation, [sentence["raw"] for sentence in image["sentences"]]))


def _cifar(preparation: Preparation, root: Path) -> Iterator[Row]:
    """Records of labels, then 32 x 32 red, green and blue bytes."""
    names = _names(preparation, root)
    width = preparation.label_bytes + 3 * 32 * 32
    for file in preparation.files:
        records = _records(_find(root, file), width)
        for number, record in enumerate(records):
            pixels = record[preparation.label_bytes :].reshape(3, 32, 32).transpose(1, 2, 0)
            yield Row(f"{file}:{number}", functools.partial(png, pixels), _name(names, int(record[preparation.label_bytes - 1]), file))


def _stl10(preparation: Preparation, root: Path) -> Iterator[Row]:
    """96 x 96 images, colour by colour and column by column; labels from 1 on in a file of their own."""
    names = _names(preparation, root)
    file, labels_file = preparation.files
    records, labels = _records(_find(root, file), 3 * 96 * 96), np.fromfile(_find(root, labels_file), np.uint8)
    _same_number(records, labels, file)
    for number, (record, label) in enumerate(zip(records, labels, strict=True)):
        yield Row(f"{file}:{number}", functools.partial(png, record.reshape(3, 96, 96).transpose(2, 1, 0)), _name(names, int(label) - 1, file))


def _idx(preparation: Preparation, root: Path) -> Iterator[Row]:
    """MNIST's files: a magic number, sizes, and bytes. The labels are the class names."""
    file, labels_file = preparation.files
    images, labels = _find(root, file), _find(root, labels_file)
    head = np.fromfile(images, ">i4", 4)
    if len(head) < 4 or head[0] != 2051 or images.stat().st_size != 16 + int(np.prod(head[1:], dtype=np.int64)):
        raise UserError(f"{images} is no file of images in MNIST's format, or is cut off; get it again")
    pixels = np.fromfile(images, np.uint8, offset=16).reshape(head[1:])
    numbers = np.fromfile(labels, np.uint8, offset=8)
    _same_number(pixels, numbers, file)
    for number, (image, label) in enumerate(zip(pixels, numbers, strict=True)):
        yield Row(f"{file}:{number}", functools.partial(png, image), str(label))


LAYOUTS = {"folders": _folders, "list": _list, "cifar": _cifar, "stl10": _stl10, "idx": _idx, "coco": _coco, "karpathy": _karpathy}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; see what the set needs, and give its folder with --source")
    return path


def _find(root: Path, name: str) -> Path:
    """A file under the root by its published path, or by its bare name right in the root."""
    return root / name if (root / name).exists() else _existing(root / name) if not (root / Path(name).name).exists() else root / Path(name).name


def _image(root: Path, name: str) -> Callable[[int], bytes | None]:
    path = str(root / name)
    return lambda max_bytes: read_local(path, max_bytes) if within(str(root), path) else None


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_LIST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than a list of images can need ({MAX_LIST_BYTES:,})")
    return path.read_text(encoding="utf-8", errors="replace")


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); get it again") from error


def _first(preparation: Preparation, captions: list[str]) -> tuple[str, ...]:
    return tuple(captions[: preparation.captions_per_image])


def _records(path: Path, width: int) -> np.ndarray:
    """uint8 [records, width], mapped into memory."""
    size = path.stat().st_size
    if not size or size % width:
        raise UserError(f"{path} has {size:,} bytes, no whole number of records of {width}; it is cut off or another version: get the binary version again")
    return np.memmap(path, np.uint8, "r").reshape(-1, width)


def _names(preparation: Preparation, root: Path) -> list[str]:
    return [line.strip() for line in _text(_find(root, preparation.label_names)).splitlines() if line.strip()]


def _name(names: list[str], label: int, file: str) -> str:
    if not 0 <= label < len(names):
        raise UserError(f"{file}: label {label} has no name among the {len(names)} there are; the file is damaged, get it again")
    return names[label]


def _same_number(images: np.ndarray, labels: np.ndarray, file: str) -> None:
    if len(images) != len(labels):
        raise UserError(f"{file}: {len(images)} images but {len(labels)} labels; get both files again")
