"""The Hugging Face hub: asked again when it is busy, its faults in one line each.

Cache, tokens, redirects and going on with a broken body are huggingface_hub's. Here is what it (2.4) leaves:

- a busy hub (5xx) fails HfApi.repo_info and the body of a file at once; any Retry-After is slept out
- a connection reset in a body ends the download; a server that ignores Range is asked for ever
- of a file that came, its size is checked, not its SHA-256
- datasets (3.6) retries the errors of requests and aiohttp, which huggingface_hub does not raise any more
"""

import contextlib
import hashlib
import logging
import os
import re
import sys
import threading
import time
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx2
from huggingface_hub import HfApi, constants, get_token, hf_hub_download, set_client_factory
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session, parse_ratelimit_headers

from sae_separation.errors import RunFailed, WrongRequest

ATTEMPTS = 5  # of one request
MOST_SECONDS = 120.0  # waited between the attempts of one request
RESUMES = 20  # of the download of one file
TRANSIENT = (408, 429, 500, 502, 503, 504)
KNOWN_FILE = "EleutherAI/pythia-70m-deduped/resolve/main/config.json"

_scope: ContextVar[str] = ContextVar("scope", default="a file of the hub")  # what is being read, for messages
_attempts: ContextVar[int | None] = ContextVar("attempts", default=None)  # instead of ATTEMPTS
# bytes at which a download began or went on
_begun: ContextVar[list[int] | None] = ContextVar("begun", default=None)


def reachable(timeout: float = 8.0) -> bool:
    """Whether the hub answers within `timeout` seconds, as a hub does and not as a login page does. Never
    raises."""
    if constants.is_offline_mode():
        return False
    deadline, answered = time.monotonic() + timeout, threading.Event()

    def ask():
        with contextlib.suppress(Exception), httpx2.Client(follow_redirects=True, timeout=timeout) as client:
            while time.monotonic() < deadline:
                response = client.head(f"{constants.ENDPOINT}/{KNOWN_FILE}")
                if any(
                    constants.HUGGINGFACE_HEADER_X_REPO_COMMIT in r.headers
                    for r in (*response.history, response)
                ):
                    return answered.set()
                if response.status_code not in TRANSIENT:
                    return
                time.sleep(0.5)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def revision(repo: str, kind: str = "model") -> str:
    """Commit hash of a model's or dataset's main branch; when the hub does not answer, the newest commit in
    the cache, and a line says so.

    Raises WrongRequest for a repo that does not exist or is not open, RunFailed when neither hub nor cache
    has it.
    """
    cached = _newest_cached(repo, kind)
    if cached and constants.is_offline_mode():
        return cached
    before = _attempts.set(1 if cached else None)
    try:
        with plain_errors(repo):
            commit = HfApi().repo_info(repo, repo_type=kind).sha
        if commit is None:
            raise RunFailed(f"{repo}: the hub names no commit of it; run the same command again later")
        return commit
    except RunFailed as failed:
        if cached is None:
            raise
        _say(f"{failed.args[0].partition(';')[0]}; going on with commit {cached[:12]} in the cache")
        return cached
    finally:
        _attempts.reset(before)


def files(repo: str, revision: str, kind: str = "model") -> list[str]:
    """Paths of the files of a commit; where the hub does not answer, of those that are in the cache. Raises
    WrongRequest, RunFailed."""
    try:
        with plain_errors(repo):
            return HfApi().list_repo_files(repo, revision=revision, repo_type=kind)
    except RunFailed:
        name = repo_folder_name(repo_id=repo, repo_type=kind)
        snapshot = Path(constants.HF_HUB_CACHE) / name / "snapshots" / revision
        cached = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        if not cached:
            raise
        return cached


def fetch(repo: str, filenames: list[str], revision: str, kind: str) -> list[Path]:
    """Files of one commit, from the cache or into it, each checked against the SHA-256 that the hub names for
    it (large files only; the hub names none for small ones).

    Raises WrongRequest for what is missing or gated, RunFailed for what the hub or the network does.
    """
    return [_fetch(repo, name, revision, kind) for name in filenames]


def _fetch(repo: str, name: str, revision: str, kind: str) -> Path:
    before, path = _begun.set([]), None
    try:
        with plain_errors(repo, name):
            while path is None:
                try:
                    path = Path(hf_hub_download(repo, name, revision=revision, repo_type=kind))
                except httpx2.ReadError:  # huggingface_hub goes on after all other faults in a body
                    time.sleep(1)  # and _note_begin ends it
    finally:
        _begun.reset(before)
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with blob.open("rb") as f:
            if hashlib.file_digest(f, "sha256").hexdigest() != blob.name:
                path.unlink()
                blob.unlink()
                raise RunFailed(
                    f"{_named(repo, name)}: its SHA-256 is not the one that the hub names, so it was damaged"
                    " on the way or on this disk; it was taken out of the cache: run the same command again"
                )
    return path


@contextlib.contextmanager
def plain_errors(repo: str, file: str | None = None):
    """Inside, what a hub client raises becomes RunFailed or WrongRequest of one line: repo, file, cause,
    remedy."""
    _be_patient()
    before = _scope.set(_named(repo, file))
    try:
        yield
    except (RunFailed, WrongRequest):
        raise
    except Exception as error:
        plain = _plain(error, repo, file)
        if plain is None:
            raise
        raise plain from error
    finally:
        _scope.reset(before)


@contextlib.contextmanager
def refused_writing(repo: str):
    """Inside `plain_errors`, for what is uploaded: a token that may not write raises WrongRequest, an upload
    that hf_xet breaks off RunFailed."""
    try:
        yield
    except hub_errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403) or isinstance(error, hub_errors.RepositoryNotFoundError):
            raise
        remedy = "log in with one that may (`hf auth login`), or name a repository of your own"
        raise WrongRequest(f"{repo}: the token in use may not write there ({status}); {remedy}") from error
    except RuntimeError as error:  # hf_xet has no class for its errors; an address may hold a signature
        cause = re.sub(r"https?://\S+", "the hub", " ".join(str(error).split()))
        raise RunFailed(f"{repo}: the upload broke off ({cause}); run the same command again") from error


class PatientClient(httpx2.Client):
    """huggingface_hub's client, asking again what may be answered later. Raises RunFailed when that did not
    help, which no hub client takes for a fault to be retried once more."""

    def send(self, request: httpx2.Request, **how) -> httpx2.Response:
        if not isinstance(request.stream, httpx2.ByteStream):  # a file on its way up, which is read once:
            return super().send(request, **how)  # huggingface_hub sends it again itself
        writes = request.method not in ("GET", "HEAD")  # for a commit the hub takes its time
        limit = constants.HF_HUB_DOWNLOAD_TIMEOUT * (6 if writes else 1)
        asked = request.extensions.get("timeout", {})
        timeouts = {k: min(limit, asked.get(k) or limit) for k in ("connect", "read", "write", "pool")}
        request.extensions = {**request.extensions, "timeout": timeouts}
        if how.get("stream"):
            _note_begin(request)
        attempts, attempt, waited = _attempts.get() or ATTEMPTS, 0, 0.0
        while True:
            attempt += 1
            wait = float(2 ** (attempt - 1))
            try:
                response = super().send(request, **how)
            except httpx2.TransportError as error:
                cause = _spoken(error, request)
            else:
                if response.status_code not in TRANSIENT:
                    return response
                response.close()
                cause = f"the hub answers {response.status_code} ({response.reason_phrase})"
                wait = _asked_wait(response) or wait
            if attempt == attempts or waited + wait > MOST_SECONDS:
                break
            _wait(cause, attempt, attempts, wait, request)
            waited += wait
        later = f"in {wait:.0f} s, as the hub asks" if wait > MOST_SECONDS else "later"
        times = f"{attempt} time{'s' * (attempt > 1)}"
        raise RunFailed(
            f"{_asked_for(request)}: {cause}, {times}; run the same command again {later}, or see whether the"
            f" network and {_host()} are up"
        )


def _be_patient():
    """Let huggingface_hub use PatientClient from now on (its connections stay open between uses, so this is
    not undone)."""
    if isinstance(get_session(), PatientClient):
        return
    hooks = get_session().event_hooks  # huggingface_hub's own: they keep offline mode offline
    set_client_factory(partial(PatientClient, event_hooks=hooks, follow_redirects=True, timeout=None))
    # it would name each resumption once more, with the whole URL
    logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds that a busy hub asks to wait."""
    limits = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limits is not None and limits.remaining == 0:
        return float(limits.reset_in_seconds)
    after = response.headers.get("Retry-After", "")
    return float(after) if after.isdigit() else None


def _note_begin(request: httpx2.Request):
    """Print a line where a body is asked for again. Raises RunFailed for a download that was broken off too
    often."""
    at = int((re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) or (0, 0))[1])
    begun = _begun.get()
    again = at > 0 if begun is None else len(begun) > 0
    if begun is not None:
        begun.append(at)
        if len(begun) > RESUMES + 1:
            raise RunFailed(
                f"{_asked_for(request)}: broken off {len(begun) - 1} times; run the same command again later,"
                " or from another network"
            )
    if again:
        _say(f"{_asked_for(request)}: broken off; going on at byte {at:,}")


def _wait(cause: str, attempt: int, attempts: int, seconds: float, request: httpx2.Request):
    _say(f"{_asked_for(request)}: {cause}; attempt {attempt + 1} of {attempts} in {seconds:g} s")
    time.sleep(seconds)


def _say(line: str):
    print(f"hub: {line}", file=sys.stderr, flush=True)


def _plain(error: BaseException | None, repo: str, file: str | None) -> Exception | None:
    """RunFailed or WrongRequest for an error of a hub client or one that it was raised from; None for other
    errors."""
    if isinstance(error, RunFailed | WrongRequest):
        return type(error)(*error.args)
    if error is None:
        return None
    response = getattr(error, "response", None)
    if response is not None and file is None:
        file = _repo_and_file(response.request)[1]
    where = _named(repo, file)
    status = None if response is None else response.status_code
    asked = "" if response is None else str(response.request.url)
    if refused := _no_access(error, repo, where, status, asked):
        return refused
    if isinstance(error, hub_errors.LocalEntryNotFoundError | hub_errors.OfflineModeIsEnabled):
        if constants.is_offline_mode():
            return RunFailed(
                f"{where}: not in the cache, and HF_HUB_OFFLINE forbids to ask the hub; unset it once, or"
                " give local files"
            )
        return _plain(error.__cause__, repo, file) or RunFailed(
            f"{where}: not in the cache, and {_host()} does not give it; see whether it is up"
        )
    if found := _wrong_answer(error, repo, where, status) or _broken_transfer(error, where):
        return found
    plain = _plain(error.__cause__, repo, file)
    if plain is None and isinstance(error, ConnectionError):  # datasets drops the cause
        return RunFailed(
            f"{where}: the hub cannot be asked; see whether the network and {_host()} are up, unset"
            " HF_HUB_OFFLINE, or give local files"
        )
    return plain


def _no_access(
    error: BaseException, repo: str, where: str, status: int | None, asked: str
) -> WrongRequest | None:
    """For a repository or revision that is gated, private or not there; `asked` is the URL."""
    kind = type(error).__name__
    if isinstance(error, hub_errors.GatedRepoError) or (
        kind == "DatasetNotFoundError" and "gated" in str(error)
    ):
        return _gated(where, repo, "DatasetNotFound" in kind or "/datasets/" in asked)
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return WrongRequest(
            f"{where}: there is no such revision; take one that https://huggingface.co/{repo} lists"
        )
    if (
        isinstance(error, hub_errors.RepositoryNotFoundError)
        or kind == "DatasetNotFoundError"
        or (status == 401 and get_token() is None)
    ):
        return WrongRequest(
            f"{where}: not on the hub, or private; check the name, or log in with an account that may read it"
            " (`hf auth login`)"
        )
    return None


def _wrong_answer(
    error: BaseException, repo: str, where: str, status: int | None
) -> RunFailed | WrongRequest | None:
    """For a file that is not there, a name or token that the hub does not take, and for other HTTP errors."""
    if isinstance(error, hub_errors.EntryNotFoundError):
        return WrongRequest(
            f"{where}: there is no such file; take one that https://huggingface.co/{repo} lists"
        )
    if isinstance(error, hub_errors.HFValidationError):
        return WrongRequest(
            f"{where}: neither a folder here nor a name that the hub can have; give owner/name or an existing"
            " folder"
        )
    if isinstance(error, hub_errors.FileMetadataError):
        return RunFailed(
            f"{where}: what answers at {_host()} is no hub; check HF_ENDPOINT, proxy and firewall"
        )
    if status in (401, 403):
        return WrongRequest(
            f"{where}: the hub does not accept the token in use ({status}); log in again (`hf auth login`),"
            " or unset HF_TOKEN"
        )
    if isinstance(error, hub_errors.HfHubHTTPError):
        return RunFailed(f"{where}: the hub answers {status}; run the same command again later")
    return None


def _broken_transfer(error: BaseException, where: str) -> RunFailed | WrongRequest | None:
    """For a connection that broke, and for bytes that came and cannot be used."""
    kind = type(error).__name__
    if isinstance(error, httpx2.TransportError):
        return RunFailed(
            f"{where}: {_spoken(error)}; run the same command again, or see whether the network and {_host()}"
            " are up"
        )
    # huggingface_hub's wrong size has no class of its own
    if isinstance(error, OSError) and str(error).startswith("Consistency check failed"):
        return RunFailed(f"{where}: its size is not the one that the hub names; run the same command again")
    if kind in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return WrongRequest(
            f"{where}: there is no data in it that can be read (.parquet, .jsonl, .txt, ...); take another,"
            " or download it and give files"
        )
    if type(error).__module__.partition(".")[0] in ("pyarrow", "zstandard", "zstd", "json") or isinstance(
        error, UnicodeDecodeError
    ):
        return RunFailed(
            f"{where}: what came cannot be read ({kind}), so it was damaged on the way or there; run the same"
            " command again, or take another"
        )
    return None


def _gated(where: str, repo: str, dataset: bool) -> WrongRequest:
    state = "no token is set" if get_token() is None else "the account of the token in use has none"
    page = f"https://huggingface.co/{'datasets/' * dataset}{repo}"
    other = "--forget_text takes another text" if dataset else "--lm takes another LM"
    return WrongRequest(
        f"{where}: only with access, and {state}; ask for it at {page} and log in (`hf auth login`, or"
        f" HF_TOKEN), or go without: {other}"
    )


def _spoken(error: httpx2.TransportError, request: httpx2.Request | None = None) -> str:
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return f"no connection to {_host()}"
    if isinstance(error, httpx2.TimeoutException):
        limit = f"within {request.extensions['timeout']['read']:g} s" if request else "in time"
        return f"no answer {limit}"
    return "the connection was broken off"


def _named(repo: str, file: str | None) -> str:
    return f"{repo}, file {file}" if file else repo


def _repo_and_file(request: httpx2.Request) -> tuple[str | None, str | None]:
    """What a request to the hub asks for; (None, None) for one to the hub's storage, whose addresses do not
    tell."""
    url = str(request.url)
    if not url.startswith(f"{constants.ENDPOINT}/"):
        return None, None
    path = unquote(urlsplit(url.removeprefix(constants.ENDPOINT)).path)
    parts = re.match(r"/(?:api/)?(?:(?:models|datasets|spaces)/)?([^/]+/[^/]+)(?:/resolve/[^/]+/(.+))?", path)
    return (parts[1], parts[2]) if parts else (None, None)


def _asked_for(request: httpx2.Request) -> str:
    repo, file = _repo_and_file(request)
    return _named(repo, file) if repo else _scope.get()


def _host() -> str:
    return urlsplit(constants.ENDPOINT).hostname or "the hub"


def _newest_cached(repo: str, kind: str) -> str | None:
    """Commit hash of the snapshot in the cache that was written to last. (huggingface_hub keeps no name of
    what was asked for by its commit.)"""
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    snapshots = (folder / "snapshots").glob("*")
    return max(((s.stat().st_mtime, s.name) for s in snapshots), default=(0, None))[1]
