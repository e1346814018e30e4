"""The publisher's files in the folders that a user names: found plain, gzipped, or inside of a zip or tar, and checked."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import os
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mmc_fast.errors import InputError

Progress = Callable[[str, int, "int | None"], None]
"""Called with what is read, how much of it is done, and how much there is (None: not known)."""

_ARCHIVES = (".zip", ".whl", ".tar", ".tar.gz", ".tgz")
_SUMS = "SHA256SUMS.txt"
_UNVERIFIED = "with --unverified it is taken as it is"
Member = tuple[str, Callable[[], IO[bytes]]]  # name without folders, and how to open it


class Originals:
    """Originals of the data set ``name``; every error is one line that names the file and where to get it.

    Args:
        name: the data set, for messages.
        folders: where to look, subfolders included. A file that lies there itself goes before one in an archive.
        where: where to get the files, for messages.
        verify: refuse content that differs from the release (check sums, numbers of rows).
        progress: see :data:`Progress`.
        scratch: folder for intermediate files, on a disk with room.
    """

    def __init__(
        self,
        name: str,
        folders: Sequence[str | Path],
        *,
        where: str = "see docs/guides/data.md",
        verify: bool = True,
        progress: Progress | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        self.name, self.where, self.verify = name, where, verify
        self.progress: Progress = progress or (lambda phase, done, total: None)
        self.scratch = Path(scratch or tempfile.gettempdir())
        self.folders = [Path(folder).expanduser() for folder in folders]
        self.used: dict[str, str] = {}
        self.expected: dict[str, int] = {}
        self._plain: dict[str, list[Path]] = {}
        self._sums: dict[Path, str] = {}
        self._verified: set[Path] = set()
        self._held: list[Iterator[Member]] = []
        for folder in self.folders:
            if not folder.is_dir():
                raise InputError(f"{folder}: no such folder; give the one that holds the files of {name}: {where}")
        for path in sorted({Path(root, file) for f in self.folders for root, _, files in os.walk(f) for file in files}):
            self._plain.setdefault(path.name, []).append(path)
        for path in self._plain.get(_SUMS, []):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, file = line.strip().partition(" ")
                self._sums[path.parent / file.strip(" *")] = digest

    # Finding

    def require(self, *files: str | Sequence[str]) -> None:
        """Refuse, in one line, all that is missing; several names of one file are given as a sequence."""
        missing = [names[0] for names in map(_names, files) if self._locate(names) is None]
        if missing:
            near = [(n, f) for n in missing for f in self._plain if _stem(n) in _stem(f)]
            hints = [f"is {file!r} the file {name!r}? then rename it" for name, file in near]
            raise self.missing(", ".join(missing), hints[0] if hints else "")

    def expect(self, rows: Mapping[str, int]) -> None:
        """Require tables by name, and that :mod:`tables` finds as many rows in each as the release has."""
        self.require(*rows)
        self.expected = dict(rows)

    def missing(self, what: str, hint: str = "") -> InputError:
        """The error for files that are not there."""
        places = ", ".join(map(str, self.folders))
        return InputError(
            f"{self.name}: missing in {places}: {what}; {f'{hint}; ' if hint else ''}get it: {self.where}"
        )

    def has(self, *names: str) -> bool:
        """Whether a file is there under one of its names."""
        return self._locate(_names(names)) is not None

    def _locate(self, names: Sequence[str]) -> Member | None:
        for name in names:
            paths = self._plain.get(name, [])
            if len(paths) > 1:
                raise InputError(
                    f"{self.name}: {name} is there twice, {paths[0]} and {paths[1]}; give the folder of one"
                )
            if paths:
                self._check_sum(paths[0])
                return name, self._opener(name)
        packed = self._packed()
        for member in packed:
            if member[0] in names:
                self._held.append(packed)  # keeps the archive open
                return member
        return None

    def _packed(self) -> Iterator[Member]:
        for path in [p for file, paths in sorted(self._plain.items()) if file.endswith(_ARCHIVES) for p in paths]:
            self._check_sum(path)
            with self.reading(path.name):
                yield from _members(path)

    def _check_sum(self, path: Path) -> None:
        """Compare a file with the publisher's list of check sums beside it, once."""
        if not self.verify or path not in self._sums or path in self._verified:
            return
        digest, size = hashlib.sha256(), path.stat().st_size
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
                self.progress(f"check {path.name}", file.tell(), size)
        if digest.hexdigest() != self._sums[path]:
            raise InputError(f"{path}: differs from its check sum in {_SUMS}; get it again: {self.where}")
        self._verified.add(path)
        self.used[path.name] = digest.hexdigest()

    # Reading

    @contextlib.contextmanager
    def reading(self, label: str) -> Iterator[None]:
        """Turn what damaged files raise into one line."""
        try:
            yield
        except InputError:
            raise
        except (EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{self.name}: {label} is damaged, incomplete or not the publisher's file ({reason}); "
                f"get it again: {self.where}"
            ) from error

    @contextlib.contextmanager
    def open(self, *names: str) -> Iterator[IO[bytes]]:
        """The content of one file, decompressed, as a stream; ``.gz`` is tried after each name."""
        found = self._locate(_names(names))
        if found is None:
            raise self.missing(names[0])
        label, opener = found
        self.used.setdefault(label, "")
        with self.reading(label), opener() as raw:
            if label.endswith(".gz"):
                with gzip.open(raw) as stream:
                    yield stream  # type: ignore[misc]
            else:
                yield raw

    def read(self, *names: str, sha256: str | Sequence[str] = ()) -> bytes:
        """The whole content of one file; ``sha256``: what it may be."""
        with self.open(*names) as stream:
            content = stream.read()
        self.used[names[0]] = self.check(names[0], content, sha256)
        return content

    def check(self, what: str, content: bytes, sha256: str | Sequence[str]) -> str:
        """The digest of the content, which must be an allowed one."""
        digest = hashlib.sha256(content).hexdigest()
        allowed = [one for one in ([sha256] if isinstance(sha256, str) else sha256) if one]
        if self.verify and allowed and digest not in allowed:
            raise InputError(
                f"{self.name}: {what} is not that of the release (sha256 {digest[:12]}…, not {allowed[0][:12]}…); "
                f"get it again: {self.where}; {_UNVERIFIED}"
            )
        return digest

    def rows(self, what: str, found: int, expected: int, unit: str = "rows") -> None:
        """Refuse another number of rows than the release has."""
        if self.verify and found != expected:
            raise InputError(
                f"{self.name}: {what} has {found} {unit}, the release has {expected}; get it again: {self.where}; {_UNVERIFIED}"
            )

    def collect(self, match: Callable[[str], Any], what: str, *, expected: int, sha256: str = "") -> dict[str, bytes]:
        """Content of the files whose name matches, sorted by name; ``sha256``: of names and digests of contents in a row."""
        found: dict[str, bytes] = {}
        for members in (((name, self._opener(name)) for name in self._plain), self._packed()):
            for name, opener in members:
                if match(name) and name not in found:
                    with self.reading(name), opener() as stream:
                        found[name] = stream.read()
                    self.progress(f"read {what}", len(found), expected)
            if len(found) >= expected:
                break
        if not found:
            raise self.missing(what)
        self.rows(what, len(found), expected, "files")
        found = dict(sorted(found.items()))
        joined = b"".join(name.encode() + b"\0" + hashlib.sha256(data).digest() for name, data in found.items())
        self.used[what] = self.check(what, joined, sha256)
        return found

    def _opener(self, name: str) -> Callable[[], IO[bytes]]:
        return functools.partial(_open, self._plain[name][0])


def _names(names: str | Sequence[str]) -> list[str]:
    given = [names] if isinstance(names, str) else list(names)
    return [*given, *(f"{name}.gz" for name in given)]


def _stem(name: str) -> str:
    return name.partition(".")[0].lower()


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _members(source: Path | IO[bytes]) -> Iterator[Member]:
    """Files of an archive, those of archives in it included."""
    name = source.name if isinstance(source, Path) else ""
    with _open(source) if isinstance(source, Path) else source as where:
        if name.endswith((".zip", ".whl")) or (not name and zipfile.is_zipfile(where)):
            with zipfile.ZipFile(where) as archive:
                for info in archive.infolist():
                    yield from _unpack(info.filename, lambda i=info: archive.open(i))  # type: ignore[misc]
        else:
            where.seek(0)
            with tarfile.open(fileobj=where) as tar:
                for member in tar:
                    if member.isfile():
                        yield from _unpack(member.name, lambda m=member: tar.extractfile(m))  # type: ignore


def _unpack(name: str, opener: Callable[[], IO[bytes]]) -> Iterator[Member]:
    if name.endswith(_ARCHIVES):
        with opener() as stream:
            yield from _members(io.BytesIO(stream.read()))
    elif not name.endswith("/"):
        yield name.rpartition("/")[2], opener
