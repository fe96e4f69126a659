"""Shards at a URL: the same samples, from a cache of bounded size that processes share, whatever breaks on the way."""

import functools
import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.drawn_images import source_of
from vipbench.harness.data import reader, remote
from vipbench.harness.data.info import DatasetInfo
from vipbench.harness.data.reader import Dataset
from vipbench.harness.data.remote import ShardCache
from vipbench.harness.data.shards import verify, write_dataset
from vipbench.harness.data.splits import HoldOut
from vipbench.harness.data.views import Loading, Views
from vipbench.harness.errors import UserError
from vipbench.harness.models.backbone import Backbone


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback, counts what is asked for, and can fail on purpose."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.gets: list[str] = []
        self.failures = 0


class Handler(SimpleHTTPRequestHandler):
    """A file server whose next answers may be errors."""

    server: Server

    def do_GET(self) -> None:
        self.server.gets.append(self.path)
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(
        source_of(tmp_path / "source", train=8, test=2),
        tmp_path / "data",
        name="d",
        shard_bytes=4000,
        hold_out=HoldOut(0, 0),
    )
    return tmp_path / "data"


@pytest.fixture
def server(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VIPBENCH_CACHE", str(tmp_path / "cache"))
    reader._open.cache_clear()
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    reader._open.cache_clear()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def shards(server: Server) -> list[str]:
    return [path for path in server.gets if path.endswith(".tar")]


def test_a_dataset_at_a_url_is_the_dataset(folder: Path, server: Server) -> None:
    local, far = Dataset(folder).split("train"), Dataset(url(server)).split("train")
    assert [far.image_bytes(place) for place in range(len(far))] == [
        local.image_bytes(place) for place in range(len(local))
    ]
    assert sorted(set(shards(server))) == sorted(shards(server)), "each shard came once"
    verify(url(server))


def test_file_urls_work(folder: Path, server: Server) -> None:
    samples = Dataset(f"file://{folder}").split("test")
    assert samples.pixels(0).shape == (30, 40, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_read_through_the_cache(
    folder: Path, server: Server, vit_backbone: Backbone, workers: int
) -> None:
    far, local = Dataset(url(server)).split("train"), Dataset(folder).split("train")
    far.image_bytes(0)  # fsspec's thread is running when the loader forks
    batches = [[(0, place)] for place in range(len(far))]
    loaded = [
        torch.cat(
            [
                batch.pixels
                for batch in Views(samples, vit_backbone, None, Loading(1, workers)).load(batches, torch.device("cpu"))
            ]
        )
        for samples in (far, local)
    ]
    assert torch.equal(*loaded)


def test_processes_share_one_download(folder: Path, server: Server, tmp_path: Path) -> None:
    shard = Dataset(folder).info.splits["train"].shards[0]
    fetch = """if True:
        import hashlib, os, sys
        from pathlib import Path
        from vipbench.harness.data.remote import ShardCache
        data = os.read(ShardCache(Path(sys.argv[3]), 2**30).open(*sys.argv[1:3]), 2**30)
        print(hashlib.sha256(data).hexdigest())"""
    command = [sys.executable, "-c", fetch, f"{url(server)}/{shard.file}", shard.sha256, str(tmp_path / "c")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {process.communicate()[0].strip() for process in processes} == {shard.sha256}
    assert len(shards(server)) == 1


def test_what_a_killed_download_left_makes_room(folder: Path, server: Server, tmp_path: Path) -> None:
    shard = Dataset(folder).info.splits["train"].shards[0]
    cache = ShardCache(tmp_path / "c", (folder / shard.file).stat().st_size + 1)
    cache.folder.mkdir()
    (cache.folder / f"{'0' * 64}.part").write_bytes(bytes(cache.bound))
    os.close(cache.open(f"{url(server)}/{shard.file}", shard.sha256))
    assert [path.name for path in cache.folder.glob("*.[tp]ar*")] == [f"{shard.sha256}.tar"]


def test_the_cache_stays_within_its_bound(folder: Path, server: Server, tmp_path: Path) -> None:
    infos = Dataset(folder).info.splits["train"].shards
    sizes = [(folder / info.file).stat().st_size for info in infos]
    cache = ShardCache(tmp_path / "c", max(sizes) + min(sizes) + 1)
    first = cache.open(f"{url(server)}/{infos[0].file}", infos[0].sha256)
    for info in infos:
        os.close(cache.open(f"{url(server)}/{info.file}", info.sha256))
        held = sum(path.stat().st_size for path in cache.folder.glob("*.tar"))
        assert held <= cache.bound
    assert not (cache.folder / f"{infos[0].sha256}.tar").exists(), "the one used longest ago left"
    assert len(os.read(first, 2**30)) == sizes[0], "who has it open still reads it"
    os.close(first)
    with pytest.raises(UserError, match="more than the cache may take"):
        ShardCache(tmp_path / "small", 10).open(f"{url(server)}/{infos[0].file}", infos[0].sha256)


def test_threads_under_a_tight_bound_get_the_right_bytes(folder: Path, server: Server, tmp_path: Path) -> None:
    infos = Dataset(folder).info.splits["train"].shards
    cache = ShardCache(tmp_path / "c", max((folder / info.file).stat().st_size for info in infos) + 1)

    def read(number: int) -> bool:
        info = infos[number % len(infos)]
        descriptor = cache.open(f"{url(server)}/{info.file}", info.sha256)
        data = os.read(descriptor, 2**30)
        os.close(descriptor)
        return hashlib.sha256(data).hexdigest() == info.sha256

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(24)))


def test_errors_that_pass_are_tried_again(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Dataset(url(server)).split("test")
    server.failures = 2
    assert len(samples.image_bytes(0)) > 100
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    reader._open.cache_clear()
    for path in Path(os.environ["VIPBENCH_CACHE"]).glob("*.tar"):
        path.unlink()
    server.failures = 10**6
    with pytest.raises(UserError, match=r"test-000000.tar: cannot be read after 2 attempts: .*503"):
        samples.image_bytes(0)


def test_what_is_not_there_or_not_right_is_told(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = Dataset(url(server)).split("test")
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    shard = folder / "test-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(bytes(np.frombuffer(whole, np.uint8) ^ 1))
    with pytest.raises(UserError, match="what came is not what the dataset lists"):
        samples.image_bytes(0)
    assert list((tmp_path / "cache").glob("*.tar")) == []
    shard.unlink()
    with pytest.raises(UserError, match=r"test-000000.tar: no such file"):
        samples.image_bytes(0)
    with pytest.raises(UserError, match=r"nothing/dataset.json: no such file"):
        Dataset(f"{url(server)}/nothing")
    with pytest.raises(UserError, match="s3fs"):
        Dataset("s3://bucket/data")
    for wrong in ("much", "nan", "inf", "-5", "0", "1e300", ""):
        monkeypatch.setenv("VIPBENCH_CACHE_GIB", wrong)
        with pytest.raises(UserError, match=f"VIPBENCH_CACHE_GIB: '{wrong}' is no number"):
            ShardCache.from_environment()


@pytest.mark.parametrize("sha256", ["../../victim", "/victim", "", "A" * 64, "0" * 64 + "\n", "0" * 63])
def test_a_checksum_that_is_none_never_becomes_a_path(tmp_path: Path, sha256: str) -> None:
    (tmp_path / "victim.tar").write_text("whole")
    with pytest.raises(UserError, match="is no SHA-256"):
        ShardCache(tmp_path / "c" / "d", 2**30).open("http://127.0.0.1:9/x.tar", sha256)
    assert (tmp_path / "victim.tar").read_text() == "whole"
    assert not (tmp_path / "c").exists()


def test_a_download_without_an_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    class Endless:
        """A file system whose file goes on for ever after the size that it states."""

        def info(self, path: str) -> dict[str, int]:
            return {"size": 3 << 20}

        def open(self, path: str, mode: str) -> "Endless":
            return self

        def __enter__(self) -> "Endless":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, size: int) -> bytes:
            return bytes(size)

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Endless(), url))
    with pytest.raises(UserError, match="it goes on after the 3145728 bytes that its server stated"):
        ShardCache(tmp_path / "c", 2**30).open("http://far/x.tar", "0" * 64)
    assert not list((tmp_path / "c").glob("*.[tp]ar*"))
    monkeypatch.setattr(remote, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(remote, "_opened", lambda path: Endless())
    with pytest.raises(UserError, match=r"http://far/dataset.json: it has more than 1000 bytes"):
        remote.read_bytes("http://far/dataset.json")
    (tmp_path / "large").write_bytes(bytes(1001))
    with pytest.raises(UserError, match="large: it has more than 1000 bytes"):
        remote.read_bytes(tmp_path / "large")


def test_reading_goes_on_where_a_connection_broke(
    folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flaky(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            Flaky.reads += 1
            data = super().read(size)  # the place has moved on when it fails
            if Flaky.reads % 3 == 0:
                raise ConnectionResetError("reset")
            return data

    content = (folder / "train-000000.tar").read_bytes()
    monkeypatch.setattr(remote, "_opened", lambda path: Flaky(content))
    with remote.open_binary(f"{url(server)}/train-000000.tar") as file:
        parts = list(iter(lambda: file.read(2000), b""))
    assert b"".join(parts) == content
    assert Flaky.reads > len(parts) + 1, "some failed"
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setattr(Flaky, "reads", 2)
    with remote.open_binary("http://far/x.tar") as file, pytest.raises(UserError, match="after 1 attempts: reset"):
        file.read(500)


def test_a_server_that_cannot_be_reached_is_not_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipbench.harness.data.remote.ATTEMPTS", 2)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=r"dataset\.json: cannot be read after 2 attempts"):
        DatasetInfo.load(f"http://127.0.0.1:{port}/data")
