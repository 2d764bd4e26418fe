"""The members of a tar shard, sample by sample, from its headers: with limits, and with an error for what tarfile passes over in silence.

Nothing is ever extracted or written. Members that are links, devices or sparse, or have absolute, climbing or very long names are left out,
and the log says so; hidden files and those without a suffix belong to no sample.
"""

import logging
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from protoclip_scale.data.sources.formats import Place, SourceLimits
from protoclip_scale.data.sources.lines import refuse_compressed
from protoclip_scale.errors import UserError

MAX_NAME = 1000  # characters
MAX_HEADER_BYTES = 1 << 20  # of a member's extended header
MEMBER = re.compile(r"^((?:.*/|)[^./]+)\.([^/]+)$", re.DOTALL)

_log = logging.getLogger(__name__)


@dataclass
class Sample:
    """Members of one sample, by suffix in lower case; a later one takes the place of an earlier one, as when a shard is unpacked."""

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)


class _Headers:
    """The file as tarfile sees it: it reads nothing but headers, so no read is long."""

    def __init__(self, file: BinaryIO):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


class Shard:
    """The samples of one open shard, in order. ``left_out`` counts members that are not used, by reason."""

    def __init__(self, file: BinaryIO, place: Place, limits: SourceLimits):
        self.file = file
        self.place = place
        self.limits = limits
        self.left_out: Counter[str] = Counter()
        self.num_members = 0

    def samples(self) -> Iterator[Sample]:
        """Reads headers only; what lies between is jumped over. 20 microseconds a member. UserError: not a tar file, damaged, cut off, too
        many members."""
        sample = None
        for member in self._members():
            found = MEMBER.match(member.name)
            if not found or posixpath.basename(member.name).startswith("__"):
                continue
            key, suffix = found[1], found[2].lower()
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
            sample.members[suffix] = member
        if sample is not None:
            yield sample
        if self.left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
            _log.warning("%s: members left out: %s", self.place.url, reasons)

    def _members(self) -> Iterator[tarfile.TarInfo]:
        head = self.file.read(512)
        refuse_compressed(head, self.place)
        self.file.seek(0)
        try:
            archive = tarfile.open(fileobj=_Headers(self.file), mode="r:")  # noqa: SIM115 (it owns no file)
        except tarfile.TarError as error:
            raise UserError(f"{self.place.url} is no tar file: {error}") from None
        while True:
            before = archive.offset if self.num_members else -1
            try:
                member = archive.next()
            except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
                raise UserError(f"{self.place.url} is damaged or cut off after {self.num_members} members: {error}") from None
            if member is None:
                break
            archive.members = []  # it would remember all
            if member.size < 0 or archive.offset <= before:
                raise UserError(f"{self.place.url} is damaged after {self.num_members} members: a member of {member.size} bytes")
            self.num_members += 1
            if self.num_members > self.limits.max_members:
                raise UserError(
                    f"{self.place.url} has more than {self.limits.max_members} members (data.max_members); make smaller shards, or raise it"
                )
            reason = _why_not(member)
            if reason:
                self.left_out[reason] += 1
            elif not member.isdir():
                yield member
        self._check_end(archive.offset)

    def _check_end(self, offset: int) -> None:
        """tarfile takes a damaged header for the end of the archive."""
        self.file.seek(offset)
        block = self.file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            what = "the file is cut off" if len(block) < tarfile.BLOCKSIZE else "the header there is damaged"
            raise UserError(f"{self.place.url} cannot be read on after {self.num_members} members, at byte {offset}: {what}")

    def content(self, member: tarfile.TarInfo | None, max_bytes: int) -> bytes | None:
        """The bytes of a member; None if there is none, or it is longer."""
        if member is None or member.size > max_bytes:
            return None
        self.file.seek(member.offset_data)
        data = self.file.read(member.size)
        if len(data) < member.size:
            raise UserError(f"{self.place.url} is cut off inside the member {ascii(member.name)}")
        return data


def _why_not(member: tarfile.TarInfo) -> str | None:
    """Why a member is left out, or None."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "links, devices or sparse files (pack them with --hard-dereference --dereference)"
    if len(member.name) > MAX_NAME:
        return f"names of more than {MAX_NAME} characters"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "absolute names or names with .."
    return None
