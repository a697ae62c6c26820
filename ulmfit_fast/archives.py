"""Published archives: downloaded once, checked, and read without unpacking.

Downloads are kept in $ULMFIT_FAST_CACHE, else $XDG_CACHE_HOME/ulmfit_fast, else ~/.cache/ulmfit_fast.
"""

import fcntl
import gzip
import hashlib
import http.client
import io
import os
import re
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

GZIP_MAGIC = b"\x1f\x8b"
# address -> size in bytes and md5, of fastai's models of WikiText-103, forwards and backwards
PUBLISHED = {
    "https://s3.amazonaws.com/fast-ai-modelzoo/wt103-fwd.tgz": (
        105067061,
        "7d1114cd9684bf9d1ca3c9f6a54da6f9",
    ),
    "https://s3.amazonaws.com/fast-ai-modelzoo/wt103-bwd.tgz": (
        105205312,
        "20b06f5830fd5a891d21044c28d3097f",
    ),
}
MAX_BYTES = 4 << 30  # of a download, and of all that an archive unpacks to
_MAX_RATIO = 100  # of unpacked bytes to packed ones; weights hardly shrink at all
_MAX_MEMBERS = 1000
_CHUNK = 1 << 20
_TIMEOUT_S = 30
_ATTEMPTS = 4  # in a row that bring nothing new, before giving up
_PAUSE_S = 0.3  # before the second of them; then twice, three times as long


def is_address(path: object) -> bool:
    return isinstance(path, str) and re.match(r"(https?|file)://", path) is not None


def file_name(source: str) -> str:
    """The last part of a path, or of an address without its query."""
    return PurePosixPath(urllib.parse.urlsplit(source).path if is_address(source) else source).name


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ULMFIT_FAST_CACHE") or Path(base) / "ulmfit_fast")


def local_copy(address: str) -> Path:
    """The file at an http, https or file address, from the cache if there; `PUBLISHED` ones are checked.

    A download that broke off goes on where it stopped (Range), in this call or in a later one, if the server
    allows it and has the same file still; the name in the cache appears when all of it is there.  OSError: it
    cannot be had; ValueError: it is not the published one.
    """
    if address.startswith("file:"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(address).path))
    name = file_name(address) or "download"
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
    target = cache_directory() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(name + ".part")
    with _locked(target.with_name(name + ".lock")):
        if target.exists():  # another process has just fetched it
            return target
        _download(address, part)
        if address in PUBLISHED:
            _check_published(part, address, *PUBLISHED[address])
        os.replace(part, target)
        _tag(part).unlink(missing_ok=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _tag(part: Path) -> Path:
    """Beside an unfinished download: what the server calls this version of the file."""
    return part.with_name(part.name + ".tag")


def _download(address: str, part: Path) -> None:
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(address, part, before):
                return
            problem = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise OSError(f"{address} cannot be downloaded: {error}") from None
            if error.code == 416:  # what is here is not the beginning of the file there
                part.unlink(missing_ok=True)
            problem = str(error)
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
        after = part.stat().st_size if part.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures == _ATTEMPTS:
            raise OSError(
                f"{address} cannot be downloaded: {problem}; {after:,} bytes are kept for the next attempt"
            )
        time.sleep(_PAUSE_S * failures)


def _fetch_rest(address: str, part: Path, have: int) -> bool:
    """One request for what is missing after `have` bytes; whether the file is whole now."""
    headers = {"User-Agent": "ulmfit_fast"}
    tag = _tag(part).read_text(encoding="utf-8") if have and _tag(part).exists() else ""
    if tag:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        have = have if goes_on else 0
        strong = answer.headers.get("ETag", "")
        new_tag = strong if strong.startswith('"') else answer.headers.get("Last-Modified", "")
        length = answer.headers.get("Content-Length")
        with open(part, "ab" if goes_on else "wb") as file:
            _tag(part).write_text(new_tag, encoding="utf-8")  # after the bytes of another version are gone
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                if have > MAX_BYTES:
                    part.unlink()
                    raise ValueError(f"{address} has more than {MAX_BYTES:,} bytes")
        return length is None or answer.length == 0


def check_published_name(path: Path) -> None:
    """ValueError for a local file that has the name and size of a published archive, but not its bytes."""
    for address, (size, md5) in PUBLISHED.items():
        if address.endswith("/" + path.name) and path.stat().st_size == size:
            _check_published(path, str(path), size, md5)


def _check_published(path: Path, source: str, size: int, md5: str) -> None:
    with open(path, "rb") as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    actual = digest.hexdigest()
    if (path.stat().st_size, actual) != (size, md5):
        found = f"{path.stat().st_size:,} bytes with md5 {actual}"
        if path.suffix == ".part":
            path.unlink()
        raise ValueError(f"{source} is not the published file: {found}, not {size:,} with {md5}")


def read_archive(path: Path) -> dict[str, tuple[str, bytes]]:
    """{"weights": (name, bytes), "tokens": ...}: the first *.pth (or .h5) and *.pkl file of a gzipped tar.

    Nothing is written to disk.  ValueError, naming the file: a truncated or damaged archive (gzip's CRC
    is read to its end), a member that lies outside of it, is a link, a device or sparse, more than a thousand
    members, more than MAX_BYTES or 100 times its own size when unpacked, no weights.
    """
    limit = min(MAX_BYTES, _MAX_RATIO * path.stat().st_size + _CHUNK)
    found: dict[str, tuple[str, bytes]] = {}
    try:
        with open(path, "rb") as packed, gzip.GzipFile(fileobj=packed) as unpacked:
            bounded = _Bounded(unpacked, limit)
            with tarfile.open(fileobj=bounded, mode="r|") as tar:
                for count, member in enumerate(tar, 1):
                    _check_member(member, count, limit)
                    name = PurePosixPath(member.name).name
                    kind = {".pth": "weights", ".h5": "weights", ".pkl": "tokens"}.get(
                        PurePosixPath(name).suffix
                    )
                    if kind and kind not in found and not name.startswith("._"):
                        if content := tar.extractfile(member):  # None for a folder
                            found[kind] = name, content.read()
            while bounded.read(_CHUNK):  # gzip's check sum stands at the end
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not a complete archive that can be read safely: {error}") from error
    if "weights" not in found:
        raise ValueError(f"{path} holds no *.pth file")
    return found


def _check_member(member: tarfile.TarInfo, count: int, limit: int) -> None:
    name = PurePosixPath(member.name)
    if count > _MAX_MEMBERS:
        raise ValueError(f"it has more than {_MAX_MEMBERS} members")
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"its member {member.name!r} lies outside of it")
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise ValueError(f"its member {member.name!r} is neither a plain file nor a folder")
    if not 0 <= member.size <= limit:
        raise ValueError(f"its member {member.name!r} claims {member.size:,} bytes")


class _Bounded(io.RawIOBase):
    """A stream that raises once more than `limit` bytes were read from it."""

    def __init__(self, file: gzip.GzipFile, limit: int) -> None:
        self.file, self.left = file, limit

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("it unpacks to far more than its own size")
        return data
