"""URLs with credentials do not get into configs, and what is said of them does not repeat them."""

import pytest

from vipbench.harness.errors import UserError
from vipbench.harness.runs.resolve import resolve_config


@pytest.mark.parametrize(
    "url",
    [
        "https://user:geheim@example.org/data",
        "HTTPS://geheim@example.org/data",
        "sftp://user:geheim@example.org/data",
        "simplecache::https://user:geheim@example.org/data",
    ],
)
def test_credentials_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config({"data": {"path": url}, "method": "coop"})
    assert str(caught.value).startswith("config: data.path: the URL holds credentials")
    assert "netrc" in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a@b:c",
        "sftp://user@example.org/data",
        "s3://bucket/a:b@c",
        "data/user:x@y",
        "https://h:80/d",
    ],
)
def test_other_urls_and_paths_stay(url: str) -> None:
    assert resolve_config({"data": {"path": url}, "method": "coop"}).data.path == url
