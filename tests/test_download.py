"""Checkpoints from an address: cached, resumed after a broken download, checked where a checksum is known."""

import contextlib
import hashlib
import http.server
import threading

import foreign_files as files
import pytest

import ulmfit_fast as uf
from ulmfit_fast import archives


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at every path, closes the connection after `break_after` bytes, notes the requests."""

    body, break_after, ranges_allowed, etag = b"", None, True, '"one"'

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.address = f"http://127.0.0.1:{self.server_address[1]}/model/wt103-fwd.tgz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        if "missing" in self.path:
            return self.send_error(404)
        begin = 0
        if asked and server.ranges_allowed and self.headers.get("If-Range") == server.etag:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(server.body):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(server.body) - 1}/{len(server.body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(server.body) - begin))
        self.send_header("ETag", server.etag)
        self.end_headers()
        end = len(server.body) if server.break_after is None else begin + server.break_after
        self.wfile.write(server.body[begin:end])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULMFIT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(archives, "_PAUSE_S", 0)
    return tmp_path / "cache"


@pytest.fixture
def server(cache, tmp_path):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.body = files.published(tmp_path / "made.tgz", files.language_model()).read_bytes()
        yield server
        server.shutdown()
        thread.join()


def cached(cache):
    return [path for path in cache.iterdir() if path.suffix == ".tgz"]


def test_downloaded_once(server, cache):
    for _ in range(2):
        found = uf.load_checkpoint(server.address)
        assert found.source == server.address and found.tokens == files.WORDS
    assert server.requests == [None]
    assert [path.read_bytes() for path in cached(cache)] == [server.body]
    assert not list(cache.glob("*.part*"))


def test_goes_on_after_the_connection_broke(server, cache):
    server.break_after = len(server.body) // 3
    assert uf.load_checkpoint(server.address).tokens == files.WORDS
    third = server.break_after
    assert server.requests[:3] == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert [path.read_bytes() for path in cached(cache)] == [server.body]


def test_a_later_call_goes_on(server, cache):
    server.break_after = 0
    with pytest.raises(OSError, match="cannot be downloaded: the connection closed early; 0 bytes are kept"):
        uf.load_checkpoint(server.address)
    part = archives.cache_directory() / f"{archives_name(server.address)}.part"
    part.write_bytes(server.body[:100])
    server.break_after = None
    server.requests.clear()
    assert uf.load_checkpoint(server.address).tokens == files.WORDS
    assert server.requests == ["bytes=100-"]


def archives_name(address):
    return f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-wt103-fwd.tgz"


@pytest.mark.parametrize("what", ["another file", "no ranges", "longer than the file"])
def test_starts_anew_where_it_cannot_go_on(server, cache, what):
    server.break_after = 0
    with contextlib.suppress(OSError):
        uf.load_checkpoint(server.address)
    part = cache / f"{archives_name(server.address)}.part"
    part.write_bytes(b"x" * (len(server.body) + 5 if what == "longer than the file" else 50))
    server.etag = '"two"' if what == "another file" else server.etag
    server.ranges_allowed = what != "no ranges"
    server.break_after = None
    assert uf.load_checkpoint(server.address).tokens == files.WORDS
    assert [path.read_bytes() for path in cached(cache)] == [server.body]


def test_published_file_is_verified(server, cache, monkeypatch):
    size, md5 = len(server.body), hashlib.md5(server.body).hexdigest()
    monkeypatch.setitem(archives.PUBLISHED, server.address, (size, md5))
    assert uf.load_checkpoint(server.address).tokens == files.WORDS
    cached(cache)[0].unlink()
    server.body = server.body[:-1] + b"x"
    with pytest.raises(ValueError, match=f"is not the published file: .* not {size:,} with {md5}"):
        uf.load_checkpoint(server.address)
    assert not cached(cache) and not list(cache.glob("*.part"))


def test_unreachable(server, cache):
    with pytest.raises(OSError, match="missing.tgz cannot be downloaded: HTTP Error 404"):
        uf.load_checkpoint(server.address.replace("wt103-fwd", "missing"))
    assert len(server.requests) == 1
    server.server_close()
    with pytest.raises(OSError, match="cannot be downloaded: .*refused"):
        uf.load_checkpoint(server.address)


def test_larger_than_allowed(server, cache, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="has more than 100 bytes"):
        uf.load_checkpoint(server.address)
    assert not list(cache.glob("*.part"))


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("ULMFIT_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert archives.cache_directory() == tmp_path / "ulmfit_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert archives.cache_directory() == tmp_path / "home" / ".cache" / "ulmfit_fast"
