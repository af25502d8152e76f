"""Data sets from a local folder or the Hugging Face hub; files that are already here come before the network.

Non-obvious: the hub keeps a snapshot in ``datasets--OWNER--NAME/snapshots/COMMIT``, whose files are links into
``blobs``; a folder named by a commit says nothing to a person, so data cards get ``OWNER/NAME``.
"""

import os
import re
from pathlib import Path

from geomcache.cache_schemas.errors import InputError

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_PREFIX = "datasets--"


def resolve(text: str) -> Path:
    """An existing file or folder as it is; else the local snapshot of the hub data set ``owner/name[@revision]``.

    Raises:
        InputError: neither such a path nor such a data set can be had.
    """
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    found = _HUB_ID.fullmatch(text)
    if found is None:
        raise InputError(
            f"there is no data set {text}",
            expected="a file, a folder, or a data set on the hub: owner/name or owner/name@revision",
            found="no such file or folder",
            fix="correct the path",
        )
    return _snapshot(found["name"], found["revision"])


def location_of(path: Path) -> str:
    """The data set's name without the machine's path: ``owner/name`` of a hub snapshot, else the path's last part.

    A file inside a snapshot is ``owner/name/FILE``.
    """
    found = _snapshot_around(path)
    return "/".join(part for part in (found[0], found[2]) if part) if found else _absolute(path).name


def commit_of(path: Path) -> str | None:
    """The hub's commit whose snapshot ``path`` is, or is in; None if there is none."""
    found = _snapshot_around(path)
    return found[1] if found else None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # links are kept: in a snapshot every file is one, to a blob named by its digest


def _snapshot_around(path: Path) -> tuple[str, str, str] | None:
    """(owner/name, commit, path inside the snapshot)."""
    absolute = _absolute(path)
    for folder in (absolute, *absolute.parents):
        repository = folder.parent.parent.name
        if folder.parent.name == "snapshots" and repository.startswith(_PREFIX):
            inside = str(absolute.relative_to(folder))
            return repository.removeprefix(_PREFIX).replace("--", "/"), folder.name, "" if inside == "." else inside
    return None


def _snapshot(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass  # not downloaded yet, or not all of it
    except HFValidationError as problem:
        raise _not_had(name, revision, problem) from problem
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, OSError) as problem:  # offline and connection errors are OSErrors
        raise _not_had(name, revision, problem) from problem


def _not_had(name: str, revision: str | None, problem: Exception) -> InputError:
    said = next(iter(str(problem).splitlines()), "")
    at = f" --revision {revision}" if revision else ""
    return InputError(
        f"data set {name} cannot be had",
        expected="a file or folder of that name, or a data set on the hub",
        found=f"no such file or folder; hub: {type(problem).__name__}: {said}",
        fix=f"check name and network, or download elsewhere (`hf download --repo-type dataset {name}{at}`)",
    )
