"""Jobs killed at any moment, and a disk that is full: what was answered is on record and not asked again."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, completion
from tests.symptoms.job import structured_requests
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Response

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]


def job(url: str, cache: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.symptoms.job", url, str(cache), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_record(path: Path) -> dict[str, Response]:
    with ResponseCache(path) as cache:
        cache.verify()
        return {answer.key: answer.response for answer in cache.answers()}


def test_a_job_killed_ten_times_asks_nothing_twice_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    count, moments = 1500, random.Random(7)
    keys = {str(request.body()): request.key("r1", "1.0") for request in structured_requests("fake", count)}
    with FakeEndpoint(delay=0.02) as endpoint:
        assert job(endpoint.url, tmp_path / "whole.sqlite", count).wait(60) == 0
        endpoint.asked.clear()
        recorded: list[tuple[int, set[str]]] = []
        for _ in range(10):
            begin = len(endpoint.asked)
            process = job(endpoint.url, tmp_path / "killed.sqlite", count)
            while len(endpoint.asked) == begin:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.12))
            process.kill()
            process.communicate()
            recorded.append((len(endpoint.asked), set(on_record(tmp_path / "killed.sqlite"))))
        assert len(recorded[-1][1]) < count  # else the last kills came too late
        assert job(endpoint.url, tmp_path / "killed.sqlite", count).wait(60) == 0
        asked = [keys[str(body)] for body in endpoint.asked]
    for moment, answered in recorded:
        assert not answered & set(asked[moment:])
    assert len(asked) <= count + 10 * 16  # what was under way at a kill may be asked anew
    whole, killed = on_record(tmp_path / "whole.sqlite"), on_record(tmp_path / "killed.sqlite")
    assert {key: response.text for key, response in whole.items()} == {
        key: response.text for key, response in killed.items()
    }
    assert len(whole) == count


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_in_one_line_and_the_job_goes_on_when_there_is_room(small_disk: Path) -> None:
    async def long(body: dict[str, Any], number: int) -> Reply:
        return 200, completion("x" * 4000)

    path = small_disk / "answers.sqlite"
    with FakeEndpoint() as endpoint:
        endpoint.reply = long
        process = job(endpoint.url, path, 300)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert errors.startswith("error: ") and errors.count("\n") == 1
        assert "full" in errors and "what was answered before is on record" in errors
        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        before = on_record(path)
        assert 10 < len(before) < 300
        endpoint.asked.clear()
        assert job(endpoint.url, path, 300).wait(60) == 0
        assert len(endpoint.asked) == 300 - len(before)
    after = on_record(path)
    assert len(after) == 300 and before.items() <= after.items()
