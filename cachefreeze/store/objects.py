"""Requests to an object store, by obstore. Knows no rows."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from cachefreeze.errors import UserError, first_line

SCHEMES = ("s3", "gs", "az", "memory", "file")
# Seconds after which a request fails, and number of times that it is sent again at once. Whoever
# waits for rows or for the end of a run waits no longer than that.
REQUEST_SECONDS, CONNECT_SECONDS, RETRIES = 30.0, 5.0, 1
# Addresses that hand out credentials inside a cloud. They are asked if the environment has none.
_CREDENTIAL_SERVERS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
# Stores in the memory of this process, by URL.
_in_memory: dict[str, Any] = {}


# Variables with credentials that the users of each object store know.
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


# Whether obstore has threads that this process does not have. A request would never end.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = _forked or "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)


class Unreachable(Exception):  # noqa: N818
    """A request failed. The message is a reason that follows a colon."""


class Denied(Unreachable):
    """A request failed since credentials are missing, wrong or expired."""


class NoBucket(Unreachable):
    """A request failed since there is no such bucket."""


class Entry(NamedTuple):
    """An object in a listing.

    Args:
        path: Path of the object below the URL.
        nbytes: Size of the object in bytes.
        time: Time of its last change, in seconds since 1970.
    """

    path: str
    nbytes: int
    time: float


def is_url(directory: str | os.PathLike[str]) -> bool:
    """Returns whether a directory is meant as a URL, and not as a folder."""
    # `Path("s3://bucket")` has one slash only.
    return re.match(r"\w+:/", os.fspath(directory)) is not None


def set_credentials(url: str) -> str:
    """Returns what to do if credentials are missing."""
    variables = _VARIABLES.get(url.partition("://")[0], "the credentials")
    return f"set {variables} in the environment"


class Objects:
    """Objects below a URL. Several threads may use it.

    Args:
        url: URL such as "s3://bucket/prefix".

    Attributes:
        url: URL without a slash at its end.
        answered: Time of the last answer, by `time.monotonic`.

    Raises:
        UserError: The URL is wrong, obstore is not installed, or there are no credentials.
    """

    def __init__(self, url: str) -> None:
        self.url = _checked(url)
        try:
            import obstore
        except ImportError as error:
            raise UserError(
                f"{self.url} needs the package obstore: pip install 'cachefreeze[objects]'"
            ) from error
        self._obstore = obstore
        self.answered = time.monotonic()
        try:
            self._store = _open(self.url)
        except UserError:
            raise
        except Exception as error:  # whatever a client says about its settings
            reason = re.sub(r"^Generic \w+ error: ", "", first_line(error))
            raise UserError(
                f"{self.url} cannot be opened ({reason}): {set_credentials(self.url)}"
            ) from error

    def read(self, path: str, most: int) -> bytes | None:
        """Returns the content of an object, or None if there is no such object.

        Args:
            path: Path of the object.
            most: Largest number of bytes. Of a larger object, as many bytes and one are returned.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            try:
                found = self._obstore.get(self._store, path)
            except FileNotFoundError:
                return None
            if found.meta["size"] > most:
                part = self._obstore.get_range(self._store, path, start=0, end=most + 1)
                return part.to_bytes()
            return found.bytes().to_bytes()

    def create(self, path: str, content: bytes) -> bool:
        """Writes an object unless it exists. Returns whether it was written.

        A request that is sent again after a lost answer finds its own object.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            try:
                self._obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

    def replace(self, path: str, content: bytes) -> None:
        """Writes an object, whether or not it exists.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            self._obstore.put(self._store, path, content, use_multipart=False)

    def remove(self, paths: Sequence[str]) -> None:
        """Removes objects. Objects that do not exist are left out.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._obstore.delete(self._store, path)

    def entries(self, below: str = "") -> Iterator[Entry]:
        """Yields all objects below a path. Training never calls this.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            for page in self._obstore.list(self._store, below or None):
                for one in page:
                    yield Entry(one["path"], one["size"], one["last_modified"].timestamp())

    def folders(self) -> list[str]:
        """Returns the names of the folders directly below the URL. Training never calls this.

        Raises:
            Unreachable: The request failed.
        """
        with self._request():
            found = self._obstore.list_with_delimiter(self._store)["common_prefixes"]
        return sorted(one.strip("/") for one in found)

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        """Turns errors of obstore into `Unreachable` with a short reason."""
        if _forked:
            raise Unreachable("this process was forked from one that uses obstore: use spawn")
        try:
            yield
            self.answered = time.monotonic()
        except UserError:
            raise
        except FileNotFoundError as error:
            raise NoBucket("there is no such bucket") from error
        except Exception as error:  # obstore, credential providers and their clients have many
            kind, text = type(error).__name__, str(error)
            if any(server in text for server in _CREDENTIAL_SERVERS):
                raise Denied("there are no credentials") from error
            if "ExpiredToken" in text or "token has expired" in text.lower():
                raise Denied("the credentials have expired") from error
            if kind in ("PermissionDeniedError", "UnauthenticatedError"):
                raise Denied("access was denied") from error
            raise Unreachable(_reason(text) or kind) from error


def _checked(url: str) -> str:
    found = re.fullmatch(r"(\w+)://([^?#]*)", url.strip())
    scheme, rest = (found[1], found[2].rstrip("/")) if found else ("", "")
    if scheme not in SCHEMES:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise UserError(
            f"{url} is no URL of an object store: give a string that begins with one of {known}"
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise UserError(f"{url} is no URL of a folder: write file:///and/the/path")
    elif scheme != "memory" and not rest.split("/")[0]:
        raise UserError(f"{url} names no bucket: write {scheme}://bucket/prefix")
    if {".", "..", ""} & set(rest.lstrip("/").split("/")[1:]):
        raise UserError(f"{url} has an empty name, or one of dots, in its path: write it without")
    return f"{scheme}://{rest}"


def _open(url: str) -> Any:
    from obstore.store import LocalStore, MemoryStore, from_url

    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        return _in_memory.setdefault(url, MemoryStore())
    if scheme == "file":
        return LocalStore(Path(rest), mkdir=True)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = _credentials_of_boto3(url)
        if endpoint:
            options["endpoint"] = endpoint
    plain = scheme == "s3" and endpoint.startswith("http://")
    return from_url(
        url,
        client_options={
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            **({"allow_http": True} if plain else {}),
        },
        retry_config={
            "max_retries": RETRIES,
            "retry_timeout": timedelta(seconds=REQUEST_SECONDS),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=1),
                "base": 2,
            },
        },
        **options,
    )


def _credentials_of_boto3(url: str) -> dict[str, Any]:
    """Returns the credentials of a profile or a login, which obstore alone does not read."""
    if {"AWS_ACCESS_KEY_ID", "AWS_SKIP_SIGNATURE"} & set(os.environ):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return {}
    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except ValueError as error:
        raise UserError(
            f"{url} cannot be used (there are no credentials): {set_credentials(url)}"
        ) from error


def _reason(text: str) -> str:
    if status := re.search(r"status code: (\d+)|status: (\d+)|\((\d{3}) ", text):
        return f"the server answered {next(filter(None, status.groups()))}"
    lower = text.lower().replace("retry_timeout", "")
    if "timed out" in lower or "timeout" in lower:
        return "the server did not answer in time"
    if any(word in lower for word in ("dns", "connect", "sending request")):
        return "the server cannot be reached"
    if "body" in lower or "decod" in lower:
        return "the connection broke"
    # An address may hold a signature behind its question mark.
    return re.sub(r"\?\S+", "", text.strip().partition("\n")[0])[:200]
