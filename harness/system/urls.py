"""URLs as they are written into configs, records and trackers."""

import re

from pydantic_core import PydanticCustomError

# Of http and https whatever stands before the host; elsewhere (sftp://user@host) a user's name alone is no secret.
CREDENTIALS = re.compile(r"https?://[^/?#]*@|://[^/?#@]*:[^/?#]*@", re.IGNORECASE)


CREDENTIALS_ADVICE = (
    """put them into ~/.netrc and set FSSPEC_HTTP='{"client_kwargs": {"trust_env": true}}', or into a file under """
    "~/.config/fsspec"
)


def has_credentials(url: str) -> bool:
    """Return whether a URL holds a user name with a password, or either of them for http."""
    return CREDENTIALS.search(url) is not None


def without_credentials(url: str) -> str:
    """Pass on a URL or path that holds no user name and password: what a config names is on record in every run.

    Raises:
        PydanticCustomError: it holds some. The message does not repeat them.
    """
    if has_credentials(url):
        raise PydanticCustomError(
            "credentials", f"the URL holds credentials, which would be on record in every run; {CREDENTIALS_ADVICE}"
        )
    return url
