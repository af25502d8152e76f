"""Writing files so that a reader never sees half of one: temporary name, fsync, rename, fsync of the folder."""

import errno
import fcntl
import os
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import yaml

from geomcache.cache_schemas.base import Schema
from geomcache.cache_schemas.errors import InputError

CONFIG_NAME = "config.yaml"
TEMPORARY_SUFFIX = ".partial"
_ABANDONED_AFTER_SECONDS = 3600.0
_STORAGE_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.ENOENT: "there is no such file or folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many open files for this process (raise `ulimit -n`)",
    errno.EIO: "the disk reports an error",
    errno.EFBIG: "a file became larger than the file system or the process limit allows",
}


def storage_fault(problem: OSError) -> str | None:
    """What to tell a user whose disk, quota or permissions caused ``problem``; None when it is something else."""
    fault = _STORAGE_FAULTS.get(problem.errno or 0)
    advice = "what was written before stays valid; make room or choose another folder, then run the same command again"
    return None if fault is None else f"{fault}: {problem.filename or problem}\n  {advice}"


def temporary_name(path: Path) -> Path:
    """A name in the same folder that no other host, process or thread uses."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; it appears whole when the block ends, or not at all."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_all(handle: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write buffers one after the other, with few system calls; at most 1,024 buffers."""
    waiting = [memoryview(part) for part in parts]
    while waiting:
        written = os.writev(handle, waiting)
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if waiting:  # the system took less than all: 2 GiB a call, or the disk is nearly full
            waiting[0] = waiting[0][written:]


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole small file atomically."""
    with atomic_writer(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_config(folder: Path, config: Schema) -> None:
    """Write a command's resolved settings as ``folder/config.yaml``, so that a result says how it was asked for."""
    write_atomic(folder / CONFIG_NAME, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def holds_config_of(folder: Path, cls: type[Schema]) -> bool:
    """Whether ``folder/config.yaml`` is of the command whose settings are ``cls``."""
    try:
        values = yaml.safe_load((folder / CONFIG_NAME).read_bytes())
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(values, dict) and bool(values) and set(values) <= set(cls.model_fields)


def require_config_slot(folder: Path, cls: type[Schema]) -> None:
    """Refuse a folder whose config.yaml belongs to another command; ``InputError``."""
    if (folder / CONFIG_NAME).exists() and not holds_config_of(folder, cls):
        raise InputError(
            f"{folder} holds the results of another command",
            expected="a folder of its own for every command's results",
            found=f"another command's {CONFIG_NAME}",
            fix="choose another --out",
        )


def allow_many_open_files() -> None:
    """Raise this process's soft limit of open files to the hard one: readers keep shard files open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_folder(folder: Path) -> None:
    """``mkdir -p`` that also makes each new folder durable."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename inside it survives a power loss."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """fsync a file that another library wrote."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked_folder(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Make ``folder`` this process's to write into, for the length of a block.

    The lock is on the folder itself, so no file is left and a killed process holds nothing. A file system that cannot
    lock is written without.

    Args:
        folder: made if missing.
        patience: seconds to wait for the lock: forked children of a killed process hold it until they notice.

    Raises:
        InputError: another process is writing there.
    """
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + patience
    try:
        try:
            while not _try_lock(handle, last=time.monotonic() >= deadline):
                time.sleep(0.2)
        except BlockingIOError as problem:
            raise InputError(
                f"another process is writing into {folder}",
                expected="one at a time",
                found="its lock",
                fix="wait until it has finished, or choose another --out",
            ) from problem
        except OSError as problem:
            if problem.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL):
                raise
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int, *, last: bool) -> bool:
    """Whether the lock is had; ``BlockingIOError`` when it is not and this was the last try."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if last:
            raise
        return False
    return True


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files and folders that killed writers left; returns how many.

    Those of a process that still runs on this host, or written within the last hour on another, are left alone.
    """
    leftovers = [path for path in folder.rglob(f".*{TEMPORARY_SUFFIX}") if _is_abandoned(path)]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _is_abandoned(path: Path) -> bool:
    try:
        *_, host, process, _, _ = path.name.split(".")
        if host == _host():
            return not Path(f"/proc/{int(process)}").exists() or int(process) == os.getpid()
        return time.time() - path.stat().st_mtime > _ABANDONED_AFTER_SECONDS
    except (ValueError, FileNotFoundError):  # not one of our names, or gone meanwhile
        return False


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def require_own_folder(folder: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to write into a folder that holds something else.

    Raises:
        InputError: ``folder`` is a file, or is not empty and ``is_ours(folder)`` is false.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", expected=f"a folder for {what}", fix="choose another --out")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    names = [name for name in names if not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))]
    if names and not is_ours(folder):
        raise InputError(
            f"the output folder {folder} already holds something else",
            expected=f"an empty or new folder, or {what}",
            found=", ".join(names[:4]),
            fix="choose another --out, or move these files away",
        )
