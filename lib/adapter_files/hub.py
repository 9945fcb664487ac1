"""The Hugging Face Hub: checks before training, and the upload of a run."""

import contextlib
import glob
import os

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from lib.errors import UserError, one_line
from lib.files import written_files

# Not uploaded: it names the training images and local folders.
PRIVATE = ("config.json",)


def odd_token():
    """A sentence about a character that no token of the hub contains, or None. Otherwise such a token ends in some
    network error."""
    for token, place in (
        (os.environ.get("HF_TOKEN", "").strip(), "HF_TOKEN"),
        (get_token() or "", "the token for the hub"),
    ):
        for number, character in enumerate(token, 1):
            if not "!" <= character <= "~":
                return (
                    f"{place} has {ascii(character)} as its character {number}, which no token contains; copy the token "
                    "again and store it with `hf auth login`"
                )
    return None


def check_push(repository):
    """UserError unless the hub can be reached with a token that may write to `repository` (owner/name). Creates nothing."""
    try:
        validate_repo_id(repository)
    except HFValidationError as problem:
        raise UserError(f"push_to_hub {repository!r} is not a repository: {one_line(problem, 150)}") from None
    if repository.count("/") != 1:
        raise UserError(f"push_to_hub is {repository!r}, but must be owner/name")
    if wrong := odd_token():
        raise UserError(f"push_to_hub: {wrong}")
    instead = "or omit push_to_hub and upload the folder later"
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"push_to_hub: no token for the hub; run `hf auth login` or set HF_TOKEN, {instead}") from None
    except HfHubHTTPError as problem:
        raise UserError(
            f"push_to_hub: the hub rejects the token ({one_line(problem, 120)}); create another, {instead}"
        ) from None
    except Exception as problem:  # any error of the network
        reason = f"{type(problem).__name__}: {one_line(problem, 120)}"
        raise UserError(
            f"push_to_hub: the hub cannot be reached ({reason}); connect to the network, {instead}"
        ) from None
    owner = repository.split("/")[0]
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"push_to_hub: the token belongs to {user['name']}, who cannot write for {owner}; "
            f"the owner can be {', '.join(owners)}"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token of {user['name']} can only read; create one that writes, {instead}")
    with contextlib.suppress(Exception):  # a repository that does not exist yet, or an error that the upload will meet
        if HfApi().repo_info(repository).private is False:
            print(f"note: {repository} exists and is public: everybody will see the run and its captions")


def push(folder, repository):
    """Upload the files of the run in `folder`, except config.json, to `repository` and return its address.

    A new repository is private. Raises UserError with the command for another attempt if the upload fails. The folder
    is unchanged.
    """
    files = sorted(written_files(folder, "config.json") - set(PRIVATE))
    patterns = [glob.escape(name) for name in files]  # brackets in names are literal
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, commit_message=f"Upload {folder.name}"
        )
    except Exception as problem:  # any error of the network
        reason = f"{type(problem).__name__}: {one_line(problem, 150)}"
        raise UserError(
            f"{folder} is complete, but could not be uploaded to {repository} ({reason})",
            f"try again: hf upload {repository} {folder} --exclude {' '.join(PRIVATE)}",
        ) from None
    return str(address)
