"""URLs as they are written into configs, records and trackers."""

import re

from pydantic_core import PydanticCustomError

# Of http and https whatever stands before the host; elsewhere (sftp://user@host) a user's name alone is no secret.
CREDENTIALS = re.compile(r"https?://[^/?#]*@|://[^/?#@]*:[^/?#]*@", re.IGNORECASE)


def without_credentials(url: str) -> str:
    """Pass on a URL or path that holds no user name and password: what a config names is on record in every run.

    Raises:
        PydanticCustomError: it holds some. The message does not repeat them.
    """
    if CREDENTIALS.search(url):
        raise PydanticCustomError(
            "credentials",
            "the URL holds credentials, which would be on record in every run; put them into ~/.netrc and set "
            'FSSPEC_HTTP=\'{"client_kwargs": {"trust_env": true}}\', or into a file under ~/.config/fsspec',
        )
    return url
