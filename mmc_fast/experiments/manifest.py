"""``manifest.json``: what a folder is, and the hash, size and origin of every file in it. Nothing is read unchecked.

A file is written first and listed afterwards. A kill in between leaves a file that is not listed, and such a file does not
count as written: whoever goes on writes it anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from typing_extensions import TypedDict

from mmc_fast import __version__
from mmc_fast._util.atomic import SaveFailed, save_errors, write_json
from mmc_fast._util.documents import read_json
from mmc_fast._util.files import check_regular, check_tree, command_line, open_regular
from mmc_fast._util.lock import FolderLock
from mmc_fast.errors import InputError

MANIFEST = "manifest.json"
_LOCK = ".manifest.lock"
_WAIT = 60.0  # seconds for other writers of a shared folder

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Origin(TypedDict):
    mmc_fast: str
    command: str


class Entry(TypedDict):
    sha256: Digest
    size: Annotated[int, Field(ge=0)]
    by: Origin


class Document(TypedDict):
    schema_version: Literal[1]
    kind: str
    identity: dict[str, Any]
    files: dict[str, Entry]
    sha256: Digest


class Manifest:
    """The manifest of ``folder``, which is a ``kind`` ("run", "comparison", ...).

    ``identity``: what makes it this one and no other; :attr:`id` is its hash. ``advice``: what to do about a file that
    does not fit. ``shared``: several processes write into the folder at once.
    """

    def __init__(self, folder: Path, kind: str, identity: dict[str, Any], *, advice: str, shared: bool = False) -> None:
        self.folder, self.kind, self.identity, self.advice, self.shared = folder, kind, identity, advice, shared
        self.files: dict[str, Entry] = {}
        self._place: tuple[int, int] | None = None

    @property
    def id(self) -> str:
        """SHA-256 of the identity."""
        return _digest_of(self.identity)

    @classmethod
    def begin(cls, folder: Path, kind: str, identity: dict[str, Any], *, advice: str, shared: bool = False) -> Manifest:
        """Write the manifest of a folder that holds no file yet."""
        made = cls(folder, kind, identity, advice=advice, shared=shared)
        made._write()
        return made

    @classmethod
    def read(cls, folder: Path, kind: str | None = None, *, advice: str, shared: bool = False) -> Manifest:
        """The manifest in ``folder``. Raises InputError where it is damaged, changed, or of another kind."""
        path = folder / MANIFEST
        found: Document = read_json(path, Document, advice)
        if found["sha256"] != _digest_of({k: v for k, v in found.items() if k != "sha256"}):
            raise InputError(f"{path} was changed after it was written (its checksum does not match); {advice}")
        if kind is not None and found["kind"] != kind:
            raise InputError(f"{folder} holds a {found['kind']}, not a {kind}; name another folder")
        made = cls(folder, found["kind"], found["identity"], advice=advice, shared=shared)
        made.files = found["files"]
        made._stay()
        return made

    @classmethod
    def above(cls, path: Path, *, advice: str) -> Manifest | None:
        """The manifest of the nearest folder above a file or folder (or of that folder itself); None where there is none."""
        for folder in (path, *path.parents):
            if os.path.lexists(folder / MANIFEST):
                return cls.read(folder, advice=advice, shared=True)
        return None

    def __contains__(self, path: str | Path) -> bool:
        return self._name(path) in self.files

    def below(self, part: str) -> list[Path]:
        """Listed files whose name begins with ``part/``, in order of their names."""
        return [self.folder / name for name in sorted(self.files) if name.startswith(f"{part}/")]

    def add(self, paths: Iterable[Path], *, drop: Iterable[Path] = ()) -> None:
        """List files that have been written, and forget others, which may be removed afterwards."""
        origin: Origin = {"mmc_fast": __version__, "command": command_line()}
        entries: dict[str, Entry] = {}
        for path in paths:
            digest, size = _hash(path)
            entries[self._name(path)] = {"sha256": digest, "size": size, "by": origin}
        with self._alone():
            if self.shared:
                self.files = Manifest.read(self.folder, self.kind, advice=self.advice).files
            for path in drop:
                self.files.pop(self._name(path), None)
            self.files |= entries
            self._write()

    def check(self, path: Path) -> Path:
        """``path`` if its content is what was listed.

        Raises InputError, one line, for a file that is missing, exchanged, changed, not listed or no regular file.
        """
        entry = self.files.get(self._name(path))
        if entry is None:
            raise InputError(f"{path} is not listed in {MANIFEST}, so no {self.kind} wrote it; {self.advice}")
        try:
            check_regular(path, follow=False)
            found = _hash(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing and {MANIFEST} lists it; {self.advice}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror or error}); {self.advice}") from None
        if found != (entry["sha256"], entry["size"]):
            raise InputError(
                f"{path} was changed or exchanged after it was written (its SHA-256 is not that in {MANIFEST}); "
                f"{self.advice}"
            )
        return path

    def content(self, path: Path) -> bytes:
        """The content of a file; what is checked is what is returned. Errors as in :meth:`check`."""
        self.check(path)
        with open_regular(path, follow=False) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != self.files[self._name(path)]["sha256"]:
            raise InputError(f"{path} was changed while it was read; {self.advice}")
        return content

    def alive(self) -> None:
        """Raise SaveFailed where the folder is gone, or another one stands in its place."""
        try:
            found = os.stat(self.folder)
        except OSError:
            found = None
        if self._place is not None and (found is None or (found.st_dev, found.st_ino) != self._place):
            raise SaveFailed(
                f"the folder {self.folder} was removed or exchanged while this {self.kind} was writing into it; what was in "
                "it is lost, start again"
            )

    def refuse_special_files(self) -> None:
        """Raise InputError where the folder holds anything but folders and regular files."""
        check_tree(self.folder)

    def _name(self, path: str | Path) -> str:
        return (Path(path).relative_to(self.folder) if isinstance(path, Path) else Path(path)).as_posix()

    def _stay(self) -> None:
        found = os.stat(self.folder)
        self._place = (found.st_dev, found.st_ino)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.shared:
            yield
            return
        with FolderLock(self.folder / _LOCK, f"{self.folder / MANIFEST}", wait=_WAIT):
            yield

    def _write(self) -> None:
        self.alive()
        document: dict[str, Any] = {"schema_version": 1, "kind": self.kind, "identity": self.identity}
        document["files"] = {name: self.files[name] for name in sorted(self.files)}
        with save_errors(self.folder / MANIFEST, lambda: "the files that it lists are still there"):
            write_json(self.folder / MANIFEST, document | {"sha256": _digest_of(document)})
        self._stay()


def _digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open_regular(path, follow=False) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size
