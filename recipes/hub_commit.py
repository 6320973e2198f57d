"""One commit on the Hub, or none: large files first, then all at once, tried again when the network fails.

Nothing of an upload can be seen before its commit. Contents that a failed or killed attempt sent stay on the Hub, and
the next attempt does not send them again.
"""

import hashlib
import importlib
import json
import re
import time

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from recipes.hub_files import is_replaced

# Of the library that huggingface_hub talks with: httpx up to its version 1, httpx2 from 2 on.
HTTPError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
TransportError = importlib.import_module(HTTPError.__module__.partition(".")[0]).TransportError

CARD_START = "<!-- Written by hub_upload.py from the run's files"
CARD_MARK = CARD_START + "; edited, it is kept. sha256 of the rest: {} -->"
WAITS = (1, 4, 16, 60)  # seconds before the second, third, ... attempt


class UploadError(ValueError):
    """An upload that was refused or has failed, with the way out."""


def _causes(error):
    while error is not None:
        yield error
        error = error.__cause__


def is_transient(error):
    """Whether a later attempt may succeed: lost connections, timeouts, an overloaded server."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return cause.response is not None and cause.response.status_code in (408, 429, 500, 502, 503, 504)
        if isinstance(cause, (TransportError, ConnectionError, TimeoutError)):
            return not isinstance(cause, OfflineModeIsEnabled)
    return False


def no_rights(repo_id):
    return (
        f"the access token may not write to {repo_id} (403): make one with write access to it at "
        "https://huggingface.co/settings/tokens, or choose a name of your own"
    )


def explain(error, repo_id):
    """An error of the Hub as UploadError: what happened, what to do. Never shows the token."""
    status = next((e.response.status_code for e in _causes(error) if isinstance(e, HfHubHTTPError) and
                   e.response is not None), None)  # fmt: skip
    if any(isinstance(e, OfflineModeIsEnabled) for e in _causes(error)):
        return UploadError("HF_HUB_OFFLINE is set: nothing can be uploaded; unset it, or check with --dry_run")
    if isinstance(error, LocalTokenNotFoundError) or (status == 401 and get_token() is None):
        return UploadError("no access token: run `hf auth login`, or set HF_TOKEN to one that may write")
    if status == 401:
        return UploadError("the Hub does not accept the access token (401): `hf auth login` with a new one")
    if status == 403:
        return UploadError(no_rights(repo_id))
    if status == 412:
        return UploadError(f"somebody else has pushed to {repo_id} in the meantime (412); look at it, then try again")
    if is_transient(error):
        return UploadError(
            f"the Hub cannot be reached, after {len(WAITS) + 1} attempts ({type(error).__name__}); {repo_id} is as it "
            "was. Try again later: what was sent is not sent again"
        )
    return UploadError(f"the Hub refused the upload to {repo_id}: {type(error).__name__}: {error}")


def with_retries(function, repo_id, waits=None, say=print):
    """What `function(attempt)` returns; tried again after the `waits` (seconds) where the network is at fault."""
    waits = WAITS if waits is None else waits
    for attempt in range(len(waits) + 1):
        try:
            return function(attempt)
        except UploadError:
            raise
        except (HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
            if attempt == len(waits) or not is_transient(error):
                raise explain(error, repo_id) from None
            say(f"the connection to the Hub failed ({type(error).__name__}); again in {waits[attempt]} s")
            time.sleep(waits[attempt])


def account(api, repo_id, **retrying):
    """Name of the token's account: the first thing to ask, since all else takes longer. A read-only one is refused."""
    found = with_retries(lambda _: api.whoami(), repo_id, **retrying)
    if found.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UploadError(no_rights(repo_id))
    return found["name"]


# ---------------------------------------------------------------- what is there already


def _remote_json(api, repo_id, name, revision):
    try:
        path = api.hf_hub_download(repo_id, name, revision=revision)
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (EntryNotFoundError, ValueError):
        return None


def existing_files(api, repo_id, revision="main"):
    """{path: RepoFile} of a branch; {} if the repository is not there or empty; `main`'s for a new branch."""
    try:
        found = api.list_repo_tree(repo_id, revision=revision, recursive=True)
        return {file.path: file for file in found if hasattr(file, "blob_id")}
    except RevisionNotFoundError:
        return {} if revision == "main" else existing_files(api, repo_id)
    except (RepositoryNotFoundError, EntryNotFoundError):
        return {}


def _kind(config, adapter_config):
    if config is not None:
        return f"a {config.get('model_type')} model ({', '.join(config.get('architectures') or ['?'])})"
    return None if adapter_config is None else f"an adapter ({adapter_config.get('peft_type')})"


def check_private(api, repo_id, private):
    """Raises UploadError if `private` is wanted and the repository is there for everybody to see."""
    try:
        if not private or api.repo_info(repo_id).private:
            return
    except RepositoryNotFoundError:
        return
    raise UploadError(
        f"{repo_id} is public already, so what is pushed would be too: choose another name, make it private at "
        f"{api.endpoint}/{repo_id}/settings, or leave out --private (hub_private_repo)"
    )


def check_destination(api, repo_id, revision, files, kind, card=None):
    """Raises UploadError if the branch holds another model, or files in our places that are not ours.

    Args:
        files: names that will be written.
        card: text of the folder's README.md, if there is one.
        kind: {"config": dict or None, "adapter_config": dict or None} of the folder.
    """
    there = existing_files(api, repo_id, revision)
    others = sorted(set(there) - {".gitattributes"})
    if not others:
        return
    base = revision if revision_exists(api, repo_id, revision) else "main"
    names = {"config": "config.json", "adapter_config": "adapter_config.json"}
    remote = {key: _remote_json(api, repo_id, name, base) if name in there else None for key, name in names.items()}
    way_out = "choose another name, another --revision, or replace what is there with --overwrite"
    if _kind(**remote) not in (None, _kind(**kind)):
        raise UploadError(f"{repo_id} holds {_kind(**remote)}, the folder {_kind(**kind)}; {way_out}")
    in_our_places = [name for name in others if name in files]
    if _kind(**remote) is None and in_our_places:
        raise UploadError(f"{repo_id} has files that would be overwritten: {', '.join(in_our_places[:5])}; {way_out}")
    if "README.md" in files and holds_a_card_by_hand(api, repo_id, revision, card):
        raise UploadError(
            f"{repo_id} has a README.md that somebody wrote or edited: copy it into the folder to keep it, or replace "
            "it with --overwrite"
        )


def holds_a_card_by_hand(api, repo_id, revision, card=None):
    """Whether the branch has a README.md that is neither generated nor the text `card`."""
    if "README.md" not in existing_files(api, repo_id, revision):
        return False
    base = revision if revision_exists(api, repo_id, revision) else "main"
    with open(api.hf_hub_download(repo_id, "README.md", revision=base), encoding="utf-8", errors="replace") as file:
        text = file.read()
    return text != card and not is_generated_card(text)


def mark_card(text):
    """A card, with {mark} where its mark goes, as it is written: the mark names the sha256 of all the rest."""
    return text.replace("{mark}", CARD_MARK.format(hashlib.sha256(text.encode()).hexdigest()), 1)


def is_generated_card(text):
    """Whether a model card is as this code wrote it, or PEFT's form with nothing filled in."""
    if found := re.search(re.escape(CARD_MARK).replace(re.escape("{}"), "([0-9a-f]{64})"), text):
        rest = text[: found.start()] + "{mark}" + text[found.end() :]
        return hashlib.sha256(rest.encode()).hexdigest() == found[1]
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    empty = {"### Framework versions", *ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = {line for line in body.splitlines() if not re.fullmatch("- PEFT [0-9a-z.]+", line)}
    return "[More Information Needed]" in body and lines <= empty


def revision_exists(api, repo_id, revision):
    return any(branch.name == revision for branch in api.list_repo_refs(repo_id).branches)


# ---------------------------------------------------------------- the commit


def _stale(there, files):
    """What an earlier upload left and this one does not have: weights, tokenizer, results of another model."""
    return [name for name in there if name not in files and is_replaced(name)]


def commit_files(api, repo_id, files, message, *, revision="main", private=None, check=None, say=print):
    """Makes the branch hold `files` ({path in the repository: Path or bytes}) by one commit; returns its CommitInfo.

    The repository and the branch are created where they are missing. Unchanged files make no commit.

    Args:
        check: called as `check(api)` before anything is created or sent, to refuse the destination.
    Raises:
        UploadError: with the way out; then the branch is as it was.
    """
    if check is not None:
        with_retries(lambda _: check(api), repo_id, say=say)
    hashed = {}

    def attempt(number):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        check_private(api, repo_id, private)
        head = api.repo_info(repo_id, revision=revision).sha
        hashed.setdefault("parent", head)
        additions = [CommitOperationAdd(name, str(path) if not isinstance(path, bytes) else path)
                     for name, path in files.items()]  # fmt: skip
        for addition in additions:  # hashing large files takes long: once is enough
            addition.upload_info = hashed.setdefault(addition.path_in_repo, addition.upload_info)
        api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
        stale = _stale(existing_files(api, repo_id, revision), files)
        operations = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in stale)]
        # If the answer to an earlier attempt's commit was lost, nothing differs now and no second one is made.
        return api.create_commit(
            repo_id, operations, commit_message=message, revision=revision, parent_commit=hashed["parent"]
        )

    return with_retries(attempt, repo_id, say=say)


def hub_api(token=None):
    """The Hub as `HF_ENDPOINT` says, with the token from the usual places."""
    return HfApi(token=token, library_name="deepseek-r1-open")
