"""The options by which the tools are told of a source that no recipe names, or of one that a recipe does."""

import argparse
import glob
import os
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from pydantic import ValidationError

from protoclip_scale.data.sources.filesystems import is_url
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.load import load_recipe

# option -> key of schema.Source
KEYS = {
    "input_format": "format",
    "image_root": "image_root",
    "separator": "separator",
    "header": "header",
    "revision": "revision",
    "config": "config",
    "split": "split",
}


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """--from, --hub or --recipe, and what describes the source of the first two or picks one of the third."""
    where = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    where.add_argument("--from", dest="files", nargs="+", metavar="FILES", help="paths, patterns or URLs (s3://, http(s)://, hf://) of tables, JSON, tar or parquet files, or a folder")
    where.add_argument("--hub", metavar="ORG/NAME", help="a data set on the Hub")
    where.add_argument("--recipe", metavar="FILE", help="take the section data of a recipe")
    source = parser.add_argument_group("about the input (of --from and --hub)")
    source.add_argument("--input-format", choices=[name for name in schema.FORMAT_COLUMNS if name != "hub"], help="layout; by default what the suffix, or the files in the folder, say")
    source.add_argument("--image-column", metavar="COL", help="default: " + _by_format(0))
    source.add_argument("--caption-column", nargs="+", metavar="COL", help="one, or several whose captions are put in one list; default: " + _by_format(1))
    source.add_argument("--extra", nargs="+", default=[], metavar="COL", help="further columns that are read with each row")
    source.add_argument("--image-root", metavar="FOLDER", help="what the image paths of a table are relative to; default: the table's own folder")
    source.add_argument("--separator", metavar="CHAR", help="between the columns of csv and tsv files")
    source.add_argument("--header", nargs="+", metavar="COL", help="column names of csv and tsv files that have no line with them")
    source.add_argument("--revision", help="of the Hub data set: branch, tag or commit")
    source.add_argument("--config", help="of the Hub data set")
    source.add_argument("--split", help="of the Hub data set (default: train)")
    recipe = parser.add_argument_group("about the input (of --recipe)")
    recipe.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key of the recipe")
    recipe.add_argument("--source", metavar="NAME", help="only this one of data.sources")


def check_source_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the command if an option has no effect."""
    unused = [name for name in ("image_column", "caption_column", "extra", *KEYS) if arguments.recipe and getattr(arguments, name)]
    unused += [name for name in ("set", "source") if not arguments.recipe and getattr(arguments, name)]
    if unused:
        parser.error(f"--{unused[0].replace('_', '-')} has no effect {'with' if arguments.recipe else 'without'} --recipe")


def _by_format(part: int) -> str:
    names: dict[str, list[str]] = {}
    for layout, columns in schema.FORMAT_COLUMNS.items():
        names.setdefault(columns[part], []).append(layout)
    return "; ".join(f"{column} ({', '.join(layouts)})" for column, layouts in names.items())


def _folder_format(files: list[str]) -> str | None:
    """The layout of what lies in a folder, if one local folder is named: parquet or tar files, else images; None for anything else."""
    if len(files) != 1 or not Path(files[0]).is_dir():
        return None
    suffixes = {path.suffix for path in Path(files[0]).iterdir() if path.stem != "metadata"}  # metadata.parquet belongs to a folder of images
    return next((schema.SUFFIX_FORMATS[suffix] for suffix in (".parquet", ".tar") if suffix in suffixes), "folder")


def common_root(arguments: argparse.Namespace) -> str:
    """The folder that all local patterns of --from share: relative to it, input that was moved has the same names. Else the working directory."""
    if not arguments.files or any(is_url(file) for file in arguments.files):
        return "."
    folders = [takewhile(lambda part: not glob.has_magic(part) and "{" not in part, Path(file).absolute().parent.parts) for file in arguments.files]
    return os.path.commonpath([os.path.join(*parts) for parts in folders])


def source_of(arguments: argparse.Namespace, root: str = ".") -> schema.Source:
    """The source that --from or --hub describes, its files relative to ``root``. UserError: the options contradict each other."""
    columns = {"image": arguments.image_column, "caption": arguments.caption_column, "extra": arguments.extra}
    if columns["caption"] and len(columns["caption"]) == 1:
        columns["caption"] = columns["caption"][0]
    values = {key: getattr(arguments, name) for name, key in KEYS.items()}
    if values["image_root"] and not is_url(values["image_root"]):
        values["image_root"] = os.path.abspath(values["image_root"])
    if arguments.files:
        files = [file if root == "." or is_url(file) else os.path.relpath(file, root) for file in arguments.files]
        values |= {"files": files, "name": ", ".join(arguments.files), "format": values["format"] or _folder_format(arguments.files)}
    else:
        values["hub"] = arguments.hub
    values["columns"] = {key: value for key, value in columns.items() if value}
    try:
        return schema.Source.model_validate({key: value for key, value in values.items() if value is not None})
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ").replace("data.sources ", f"{'--from' if arguments.files else '--hub'} ")) from None


def resolve(arguments: argparse.Namespace, root: str = ".") -> tuple[schema.Recipe | None, schema.Data]:
    """What is asked for: the recipe, if one is named, and its section data; else one source, its files relative to ``root``, with the defaults."""
    if arguments.recipe:
        recipe = load_recipe(arguments.recipe, arguments.set)
        return recipe, recipe.data
    return None, schema.Data(root=root, sources=[source_of(arguments, root)], plan=schema.Plan(global_batch=8))


def pick(data: schema.Data, label: str | None) -> dict[int, schema.Source]:
    """The sources by their numbers; only that of ``label`` if one is given. UserError: there is none."""
    chosen = {number: source for number, source in enumerate(data.sources) if label in (None, source.label)}
    if not chosen:
        raise UserError(f"--source {label}: data.sources are {', '.join(source.label for source in data.sources)}; name one of them")
    return chosen


def refuse_unused(arguments: argparse.Namespace, names: Sequence[str], needed: str) -> None:
    """UserError if one of these options is given (not None, False or empty), which have no effect without ``needed``."""
    for name in names:
        if getattr(arguments, name) not in (None, False, []):
            raise UserError(f"--{name.replace('_', '-')} has no effect without {needed}; leave it out")
