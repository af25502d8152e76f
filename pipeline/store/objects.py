"""Caches beyond the local disk: bytes behind a URL, by range requests through obstore, anything else through fsspec.

The same few methods as ``LocalFiles``, so that a reader need not know where the bytes lie.

Non-obvious:
- obstore (0.12.1) runs on one tokio runtime per process, which does not survive a fork: the first read in a child
  waits for ever and no timeout ends it, also with a new store. A child of a process that has read is therefore refused
  by name; if only another library used obstore before the fork, nothing here can know.
- ``obstore.get_ranges`` joins ranges without a limit, touching ones even with ``coalesce=0``: a pass over a shard would
  be one request of 256 MiB. And it panics when a server sends less than it announced. So ranges are joined here.
- A server may announce a range and send fewer bytes, and ranges that begin inside an object may end beyond it: neither
  is an error to obstore, so every length is compared.
- ``python -m http.server`` ignores Range. Azure has no "last n bytes": there a tail takes two requests.
- http(s) always means a plain web server. ``obstore.store.from_url`` would take some hosts for S3 or Azure and then ask
  for credentials that a public download does not need.
- obstore takes credentials from environment variables, not from ``~/.aws``; it does not send the user and password of
  an http URL, and its messages repeat the whole URL.
- S3 answers 403, not 404, for a missing object when the bucket may not be listed.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from geomcache.cache_schemas.base import MAX_JSON_BYTES
from geomcache.cache_schemas.errors import CacheDamaged, GeomcacheError, InputError, MissingDependency

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import ClientConfig, RetryConfig
    from obstore.store import ObjectStore as CloudStore

T = TypeVar("T")
R = TypeVar("R")

# A request's first byte takes an object store some 20 ms, in which an open connection carries a MiB or more.
GAP_BYTES = 1 << 20
# Longer runs become several requests: connections are slow one by one, and a lost one costs no more than this.
REQUEST_BYTES = 8 << 20
REQUESTS_AT_ONCE = 32  # with REQUEST_BYTES it bounds the memory that a call takes

_COPY = "copy the cache there again; geomcache cache verify tells whether the original is whole"
_S3 = (
    "export AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (aws configure export-credentials --format env "
    "prints them), or AWS_SKIP_SIGNATURE=true for a public bucket; AWS_ENDPOINT_URL for a server of your own"
)
_GOOGLE = "export GOOGLE_APPLICATION_CREDENTIALS=KEY.json, or GOOGLE_SKIP_SIGNATURE=true for a public bucket"
_AZURE = (
    "export AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
    "AZURE_SKIP_SIGNATURE=true for a public container"
)
_HTTP = "try the URL with curl -I; storage that asks for a cloud's credentials is written s3://, gs:// or az://"
_FIXES = {  # scheme -> what to do when it fails; these go through obstore
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), _AZURE),
    **dict.fromkeys(("http", "https"), _HTTP),
}
_METADATA_SERVICE = re.compile("latest/api/token|latest/meta-data|computeMetadata|metadata/identity")
_runtime_process: int | None = None  # the process in which obstore's runtime was started


class ObjectStore(Protocol):
    """Bytes behind a URL, read only, from any number of threads; pickled as its URL and opened again.

    Whatever goes wrong in the network or with permissions is an ``InputError`` that names the URL.
    """

    location: str  # as the user wrote it, without credentials

    def read(self, path: str) -> bytes: ...  # a whole small object; raises FileNotFoundError

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]: ...  # side by side; None = not there

    def tail(self, path: str, length: int) -> tuple[bytes, int]: ...  # last bytes, the size; raises FileNotFoundError

    def read_ranges(
        self, path: str, offsets: Sequence[int], out: Sequence[memoryview]
    ) -> None: ...  # fills every buffer or raises CacheDamaged


def is_remote(location: str | Path) -> bool:
    """Whether ``location`` is a URL for ``open_objects``; paths and file:// URLs are local.

    A URL must never become a ``Path`` on its way here: that turns s3://bucket into s3:/bucket.
    """
    return isinstance(location, str) and bool(re.match(r"(?!file://)[a-z][a-z0-9+.-]*(://|::.*://)", location, re.I))


def open_objects(location: str, *, timeout: float = 30.0) -> ObjectStore:
    """The store behind a URL; nothing is read yet.

    Args:
        location: ``s3://bucket/folder``, ``gs://…``, ``az://…``, ``https://…``, or any URL that fsspec opens.
        timeout: seconds without a byte after which a request is tried again; it is given up for good after about three
            times as long. fsspec's file systems have their own.

    Raises:
        InputError: no such scheme, or the URL or the environment's settings cannot be used.
        MissingDependency: the package for this scheme is not installed.
    """
    scheme = location.partition("://")[0].lower()
    return CloudObjects(location, timeout) if scheme in _FIXES else FsspecObjects(location, timeout)


@dataclass
class Request:
    """One range to ask for, and the buffers that it fills."""

    start: int
    stop: int
    parts: list[tuple[int, memoryview]] = field(default_factory=list)


def join_ranges(offsets: Sequence[int], out: Sequence[memoryview]) -> list[Request]:
    """The fewest requests without reading through large gaps; the same bytes asked for twice are asked for once."""
    requests: list[Request] = []
    for offset, view in sorted(zip(offsets, out, strict=True), key=lambda pair: pair[0]):
        stop = offset + view.nbytes
        last = requests[-1] if requests else None
        if last is None or offset - last.stop >= GAP_BYTES or max(stop, last.stop) - last.start > REQUEST_BYTES:
            requests.append(last := Request(offset, stop))
        last.stop = max(stop, last.stop)
        last.parts.append((offset, view))
    return requests


class _Objects:
    """What both kinds share: they add how to get a whole object, a range and the last bytes, with their own errors."""

    _at_once = 1  # of one call
    _fix = "check the URL, the network and the credentials"
    _install = "pip install 'geomcache[remote]'"

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self.location = _without_secrets(url).rstrip("/")

    def __reduce__(self) -> tuple[type["_Objects"], tuple[str, float]]:
        return type(self), (self._url, self._timeout)

    def read(self, path: str) -> bytes:
        with self._named(path):
            return self._whole(path)

    def read_many(self, paths: Sequence[str]) -> list[bytes | None]:
        return self._each(self._read_if_there, paths)

    def tail(self, path: str, length: int) -> tuple[bytes, int]:
        with self._named(path):
            data, size = self._last(path, length)
        if len(data) != min(length, size):
            raise self._cut_short(path, min(length, size), len(data))
        return data, size

    def read_ranges(self, path: str, offsets: Sequence[int], out: Sequence[memoryview]) -> None:
        def fill(request: Request) -> None:
            with self._named(path):
                data = memoryview(self._range(path, request.start, request.stop))
            if len(data) != request.stop - request.start:
                raise self._cut_short(path, request.stop - request.start, len(data))
            for offset, view in request.parts:
                start = offset - request.start
                view[:] = data[start : start + view.nbytes]

        try:
            self._each(fill, join_ranges(offsets, out))
        except FileNotFoundError as problem:
            raise CacheDamaged(
                f"{self.location}/{path} is missing", expected="a committed shard", found="no object", fix=_COPY
            ) from problem

    def _whole(self, path: str) -> bytes:
        raise NotImplementedError

    def _range(self, path: str, start: int, stop: int) -> "bytes | Bytes":
        raise NotImplementedError

    def _last(self, path: str, length: int) -> tuple[bytes, int]:
        raise NotImplementedError

    def _read_if_there(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except FileNotFoundError:
            return None

    def _each(self, do: Callable[[T], R], items: Sequence[T]) -> list[R]:
        if self._at_once == 1 or len(items) <= 1:
            return [do(item) for item in items]
        # The block waits for every thread, so nobody writes into the caller's buffers after an error has left.
        with ThreadPoolExecutor(min(self._at_once, len(items)), "read-objects") as pool:
            return list(pool.map(do, items))

    @contextmanager
    def _named(self, path: str = "") -> Iterator[None]:
        """Turn a library's errors into ours, without its text as the cause: that may hold a signature or password."""
        where = f"{self.location}/{path}" if path else self.location
        try:
            yield
        except GeomcacheError:
            raise
        except FileNotFoundError:
            raise FileNotFoundError(where) from None
        except ImportError as problem:
            raise MissingDependency(
                f"{where} cannot be read without another package", found=str(problem), fix=self._install
            ) from None
        except Exception as problem:  # noqa: BLE001 - every file system has errors of its own, with nothing in common
            ranges_ignored = type(problem).__name__ == "NotSupportedError" or "non-partial" in str(problem)
            raise InputError(
                f"{where} cannot be read",
                expected="a server that answers range requests" if ranges_ignored else "a readable object",
                found=_reason(problem, self._timeout),
                fix="serve it with nginx, caddy or an object store: python -m http.server has no ranges"
                if ranges_ignored
                else self._fix,
            ) from None

    def _cut_short(self, path: str, expected: int, found: int) -> CacheDamaged:
        return CacheDamaged(
            f"{self.location}/{path} ends too early", expected=f"{expected} bytes", found=f"{found}", fix=_COPY
        )

    def _require_small(self, path: str, size: int) -> None:
        if size > MAX_JSON_BYTES:
            raise CacheDamaged(
                f"{self.location}/{path} is too large to be a record of geomcache",
                expected=f"at most {MAX_JSON_BYTES >> 20} MiB",
                found=f"{size:,} bytes or more",
                fix=_COPY,
            )


class CloudObjects(_Objects):
    """S3, Google, Azure and web servers, through obstore."""

    _at_once = REQUESTS_AT_ONCE

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, timeout)
        self._scheme = url.partition("://")[0].lower()
        self._fix = _FIXES[self._scheme]
        client: ClientConfig = {
            "allow_http": True,
            "connect_timeout": timedelta(seconds=min(timeout, 10.0)),
            "read_timeout": timedelta(seconds=timeout),
            "timeout": timedelta(seconds=10 * timeout),  # of a request that drips
        }
        retry: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(seconds=2 * timeout)}
        with self._named():
            from obstore import store
        if self._scheme not in ("http", "https") and re.search("[?#]", url):
            raise InputError(
                f"{self.location} was given with a query",
                expected=f"{self._scheme}://BUCKET/FOLDER; settings and signatures would be ignored in it",
                fix=self._fix,
            )
        with self._named():
            if self._scheme in ("http", "https"):
                bare, client["default_headers"] = _authorization(url)
                self._store: CloudStore = store.HTTPStore.from_url(bare, client_options=client, retry_config=retry)
            else:
                known = re.sub("^gcs:", "gs:", url, flags=re.I)
                self._store = store.from_url(known, client_options=client, retry_config=retry)

    def _whole(self, path: str) -> bytes:
        import obstore

        found = obstore.get(self._usable_store(), path)
        self._require_small(path, found.meta["size"])
        return bytes(found.bytes())

    def _range(self, path: str, start: int, stop: int) -> "bytes | Bytes":
        import obstore

        try:
            return obstore.get_range(self._usable_store(), path, start=start, end=stop)
        except obstore.exceptions.GenericError as problem:
            if _is_beyond_the_end(problem):
                return b""
            raise

    def _last(self, path: str, length: int) -> tuple[bytes, int]:
        import obstore

        store = self._usable_store()
        if _FIXES[self._scheme] is _AZURE:
            size = obstore.head(store, path)["size"]
            start = max(0, size - length)
            return (bytes(self._range(path, start, size)) if size else b""), size
        try:
            found = obstore.get(store, path, options={"range": {"suffix": length}})
            return bytes(found.bytes()), found.meta["size"]
        except obstore.exceptions.GenericError as problem:
            if _is_beyond_the_end(problem):  # only an empty object has no last bytes
                return b"", 0
            raise

    def _usable_store(self) -> "CloudStore":
        global _runtime_process
        if _runtime_process is None:
            _runtime_process = os.getpid()
        if _runtime_process != os.getpid():
            raise InputError(
                f"{self.location} cannot be read in this process",
                expected="a process that was started by spawn, or forked before anything was read from a URL",
                found="a fork of a process that had read; obstore would wait for ever here",
                fix="start workers with multiprocessing.get_context('spawn'), or read in the process that read first",
            )
        return self._store


class FsspecObjects(_Objects):
    """Any other URL (memory, sftp, zip, hf, …), through fsspec."""

    _install = "install the package that is named above"

    def __init__(self, url: str, timeout: float) -> None:
        super().__init__(url, timeout)
        with self._named():
            try:
                self._system()
            except ValueError as problem:
                if not str(problem).startswith("Protocol not known"):
                    raise
                raise InputError(
                    f"{self.location}: this kind of URL is not known",
                    expected=f"one of {', '.join(_FIXES)}, or a protocol of fsspec",
                    found=str(problem),
                    fix="check the spelling",
                ) from None
            except FileNotFoundError as problem:  # an archive or folder that the URL is inside of
                raise InputError(f"{self.location} cannot be opened", found=str(problem), fix=self._fix) from None

    def _whole(self, path: str) -> bytes:
        system, root = self._system()
        data: bytes = system.cat_file(f"{root}{path}", 0, MAX_JSON_BYTES + 1)
        self._require_small(path, len(data))
        return data

    def _range(self, path: str, start: int, stop: int) -> bytes:
        system, root = self._system()
        data: bytes = system.cat_file(f"{root}{path}", start, stop)
        return data

    def _last(self, path: str, length: int) -> tuple[bytes, int]:
        system, root = self._system()
        size: int = system.size(f"{root}{path}")
        return self._range(path, max(0, size - length), size), size

    def _system(self) -> tuple[Any, str]:
        """fsspec keeps instances itself: one per process, and per thread where threads may not share one."""
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        system, root = url_to_fs(self._url)
        return system, f"{root.rstrip('/')}/" if root else ""


def _authorization(url: str) -> tuple[str, dict[str, str]]:
    """A web URL without its user and password, and the header that carries them."""
    user, found, _ = urlsplit(url).netloc.rpartition("@")
    if not found:
        return url, {}
    token = base64.b64encode(unquote(user).encode()).decode()
    return url.replace(f"{user}@", "", 1), {"Authorization": f"Basic {token}"}


def _without_secrets(text: str) -> str:
    """Text that may hold URLs, without their passwords, tokens and signed queries."""
    text = re.sub(r"(?<=//)[^/@\s]*:[^/@\s]*@", "", text)
    text = re.sub(r"(https?://)[^/@\s]*@", r"\1", text, flags=re.I)
    return re.sub(r"(\w://[^\s?]*)\?\S*", r"\1", text)


def _is_beyond_the_end(problem: Exception) -> bool:
    return "status code: 416" in str(problem)


def _reason(problem: Exception, timeout: float) -> str:
    """One line of what a library said."""
    text = str(problem)
    if _METADATA_SERVICE.search(text):
        return "no credentials in the environment, and no service of this machine's cloud that hands them out"
    if "kind: Timeout" in text or "TimedOut" in text:
        return f"no answer within {timeout:g} seconds, tried more than once"
    said = text.split("\n\nDebug source")[0]
    said = said.rpartition(" - ")[2] if "Error performing" in said else said
    inner = re.findall(r'(?:message|error): "([^"]*)"', text)  # why a connection failed
    line = " ".join([*said.split(), *[f"({why})" for why in inner]])
    return f"{type(problem).__name__}: {_without_secrets(line)[:300]}"
