"""Files that a command writes into a user's folder. It replaces only those that nobody changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


class Written:
    """What a command has written below ``root``. The file ``name`` there lists it with its digests.

    Everything else below ``root`` belongs to the user: other files, files changed since, links. None of them is
    replaced, deleted or followed. ``root`` itself may be reached through links.
    """

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        if root.exists() and not root.is_dir():
            raise ValueError(f"{root} must be a folder, got a file")
        self.digests = self._read()

    def _read(self) -> dict[str, str]:
        self._refuse_links(self.name)
        file = self.root / self.name
        if not file.exists():
            return {}
        try:
            digests = json.loads(file.read_text())
            ours = isinstance(digests, dict) and all(
                isinstance(x, str) and _is_below(name) for name, x in digests.items()
            )
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(
                f"{file} must be the list of an earlier run's files, got other contents: use another folder"
            )
        return digests

    def check(self, names: Iterable[str]) -> None:
        """ValueError unless each of these names is free to be written: absent, or as it was written before."""
        for name in names:
            self._refuse_links(name)
            file = self.root / name
            if not file.exists():
                continue
            if name not in self.digests:
                raise ValueError(
                    f"{file} must not exist, got a file of another origin: move it away or use another folder"
                )
            if not file.is_file() or _digest(file.read_bytes()) != self.digests[name]:
                raise ValueError(
                    f"{file} must be as it was written, got one changed since: move it away or use another folder"
                )

    def write(self, files: dict[str, bytes], replace: bool = False) -> None:
        """Write all of ``files``, or none if one is not free. ``replace``: delete what else was written before."""
        stale = [name for name in self.digests if replace and name not in files]
        self.check([*files, *stale])
        for name in (*files, *stale):
            (self.root / name).unlink(missing_ok=True)  # not written through: another name may be linked to the file
            self.digests.pop(name, None)
        for name, data in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            with open(self.root / name, "xb") as file:
                file.write(data)
            self.digests[name] = _digest(data)
        listing = self.root / self.name
        listing.unlink(missing_ok=True)
        listing.write_text(json.dumps(self.digests, indent=1) + "\n")

    def _refuse_links(self, name: str) -> None:
        for part in (self.root / name, *list((self.root / name).parents)[: len(PurePosixPath(name).parts) - 1]):
            if part.is_symlink():
                raise ValueError(
                    f"{part} must not be a link, got one to {part.readlink()}: nothing is written through it"
                )
            if part != self.root / name and part.exists() and not part.is_dir():
                raise ValueError(f"{part} must be a folder, got a file")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
