"""Files of saved code, as containers: a JSON value that may hold bytes, whole or not at all, of a trusted owner.

A file is a line that says what it is, a line with format, length and digest of the rest, and a zip archive with the
value and the bytes in it. A reader checks all of it before it uses any. A writer puts a whole file in the place of the
old one, so that readers see the one or the other, whoever else writes.

What is read here runs later, with all rights of the process. The digest finds damage, not intent, and no check could
tell good code from bad. So a file is only read if nobody but this user, or root, could have written it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Any

MAGIC = b"dispatch_compile saved code\n"
FORMAT = 2
_INDEX = "index.json"


class ArtifactError(ValueError):
    """Raised for a file of saved code that is damaged, that is something else, or that other users could have written.

    :meth:`NativeCache.load` raises it. The folder ``DISPATCH_COMPILE_CACHE_DIR`` does not: there, such a file is
    skipped with a warning, and the code is compiled again.

    >>> with open("notes.txt", "w") as file:
    ...     _ = file.write("no code")
    >>> try:
    ...     cache = dc.NativeCache.load("notes.txt")
    ... except dc.ArtifactError as error:
    ...     print(error)
    ...     cache = dc.NativeCache()  # compile anew
    notes.txt is no file of saved code
    """


def write(path: Path, value: Any) -> None:
    """Put a file with ``value`` at ``path``, whole, in place of what is there. Nobody else may read or write it.

    Raises:
        OSError: it cannot be written; what was there is still there.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "saved code goes into a file, and this is a folder", str(path))
    content = _archive(value)
    header = {"format": FORMAT, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(MAGIC + json.dumps(header).encode() + b"\n" + content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path, *, trust: bool = False) -> Any:
    """Read the value in a file, after checking that the file is whole, and that nobody else could have written it.

    Args:
        path: of the file.
        trust: True skips the check of who could have written it.

    Raises:
        OSError: it cannot be read.
        ArtifactError: it is not a file of saved code, is damaged, has another format, or others could have written it.
    """
    with open(path, "rb") as file:
        if not trust:
            _check_owner(path, os.fstat(file.fileno()))
            folder = path.absolute().parent
            _check_owner(folder, os.stat(folder))
        if file.read(len(MAGIC)) != MAGIC:
            raise ArtifactError(f"{path} is no file of saved code")
        header, content = file.readline(), file.read()
    try:
        fields = json.loads(header)
        version, length, digest = fields["format"], fields["bytes"], fields["sha256"]
    except (ValueError, TypeError, KeyError):
        raise ArtifactError(f"{path} is damaged: its header cannot be read") from None
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version}, but this version of dispatch_compile reads format {FORMAT}")
    if len(content) != length:
        raise ArtifactError(f"{path} is damaged: it holds {len(content)} of {length} bytes")
    if hashlib.sha256(content).hexdigest() != digest:
        raise ArtifactError(f"{path} is damaged: its content is not what was written")
    return _value(content)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise ArtifactError(f"{path} belongs to another user (uid {status.st_uid}), whose code must not run here")
    sticky_folder = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX  # nobody replaces others' files
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky_folder:
        raise ArtifactError(f"{path} can be written by other users, whose code must not run here; chmod go-w {path}")


def _archive(value: Any) -> bytes:
    blobs: dict[str, bytes] = {}

    def reference(blob: bytes) -> dict[str, str]:
        name = hashlib.sha256(blob).hexdigest()
        blobs[name] = blob
        return {"blob": name}

    blobs[_INDEX] = json.dumps(value, default=reference, indent=1).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, blob in blobs.items():
            archive.writestr(name, blob)
    return buffer.getvalue()


def _value(content: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:

        def resolved(item: dict[str, Any]) -> Any:
            return archive.read(item["blob"]) if item.keys() == {"blob"} else item

        return json.loads(archive.read(_INDEX), object_hook=resolved)
