"""Jobs killed at any moment, and a disk that is full: what was answered is on record and not asked again."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.symptoms.fake_endpoint import FakeEndpoint, Reply, answer_to, completion
from tests.symptoms.job import structured_requests
from vipbench.harness.symptoms.llm.cache import ResponseCache
from vipbench.harness.symptoms.llm.record import Response

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "10"))  # over one job; the documentation has the figures of 100


def job(url: str, cache: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.symptoms.job", url, str(cache), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def on_record(path: Path) -> dict[str, Response]:
    with ResponseCache(path) as cache:
        cache.verify()
        return {answer.key: answer.response for answer in cache.answers()}


def test_a_job_killed_at_any_moment_asks_nothing_twice_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A question is asked again only where its answer was on its way when the job was killed, and then once."""
    count, moments = 150 * KILLS, random.Random(7)
    keys = {str(request.body()): request.key("r1", "1.0") for request in structured_requests("fake", count)}
    path = tmp_path / "killed.sqlite"
    recorded: set[str] = set()
    under_way: list[set[str]] = []
    with FakeEndpoint(delay=0.02) as endpoint:
        for _ in range(KILLS):
            begin = len(endpoint.asked)
            process = job(endpoint.url, path, count)
            while len(endpoint.asked) == begin:
                assert process.poll() is None, process.communicate()
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.12))
            process.kill()
            process.communicate()
            time.sleep(0.2)  # until what it sent last has reached the server
            asked = [keys[str(body)] for body in endpoint.asked[begin:]]
            assert len(set(asked)) == len(asked) and not recorded & set(asked)
            recorded = set(on_record(path))
            under_way.append(set(asked) - recorded)
        assert len(recorded) < count  # else the last kills came too late
        assert job(endpoint.url, path, count).wait(600) == 0
        asked = [keys[str(body)] for body in endpoint.asked]
    again = sum(map(len, under_way))
    print(f"{KILLS} kills: {count} questions, {len(asked)} asked, {again} of them under way at a kill")
    assert len(asked) == count + again <= count + 16 * KILLS and again > 0
    assert Counter(asked) == Counter(keys.values()) + Counter(key for keys in under_way for key in keys)
    expected = {keys[str(request.body())]: answer_to(request.body()) for request in structured_requests("fake", count)}
    assert {key: response.text for key, response in on_record(path).items()} == expected


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
