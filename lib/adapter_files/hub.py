"""A run on the Hugging Face Hub: what can be wrong is found before training, and what is uploaded."""

import contextlib
import glob
import os

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from lib.errors import UserError, one_line
from lib.files import written_files

# Names the training images and where things lie on this machine: it stays here.
PRIVATE = ("config.json",)


def odd_token():
    """What is wrong with the hub's token where it holds what no token does, which ends as one error or another of
    the network: a sentence, or None."""
    for token, place in (
        (os.environ.get("HF_TOKEN", "").strip(), "HF_TOKEN"),
        (get_token() or "", "the token for the hub"),
    ):
        for number, letter in enumerate(token, 1):
            if not "!" <= letter <= "~":
                return (
                    f"{place} holds {ascii(letter)} as its letter {number}, which no token has: copy the token again, "
                    "`hf auth login` keeps it"
                )
    return None


def check_push(repository):
    """Raise UserError unless there is a token that may write to `repository` (owner/name) and a way to
    the hub. Nothing is created."""
    try:
        validate_repo_id(repository)
    except HFValidationError as problem:
        raise UserError(f"push_to_hub {repository!r} is no repository: {one_line(problem, 150)}") from None
    if repository.count("/") != 1:
        raise UserError(f"push_to_hub is {repository!r}, but must be owner/name")
    if wrong := odd_token():
        raise UserError(f"push_to_hub: {wrong}")
    instead = "or leave push_to_hub out and upload the folder later"
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise UserError(
            f"push_to_hub: there is no token for the hub; run `hf auth login` or set HF_TOKEN, {instead}"
        ) from None
    except HfHubHTTPError as problem:
        raise UserError(
            f"push_to_hub: the hub does not accept the token ({one_line(problem, 120)}); make another, {instead}"
        ) from None
    except Exception as problem:  # whatever a network can do
        what = f"{type(problem).__name__}: {one_line(problem, 120)}"
        raise UserError(f"push_to_hub: the hub cannot be reached ({what}); connect to the network, {instead}") from None
    owner = repository.split("/")[0]
    owners = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if owner not in owners:
        raise UserError(
            f"push_to_hub: the token is {user['name']}'s, who cannot write for {owner}; "
            f"it can be one of {', '.join(owners)}"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token of {user['name']} can only read; make one that writes, {instead}")
    with contextlib.suppress(Exception):  # there is none yet, or only the upload will tell
        if HfApi().repo_info(repository).private is False:
            print(f"note: {repository} exists and is public: everybody will see the run there, with its captions")


def push(folder, repository):
    """Upload what a run wrote into `folder`, but not config.json, to `repository`, made private if it
    does not exist yet; return its address.

    Raises UserError, with the command that tries again, if that fails: the folder stays as it is.
    """
    files = sorted(written_files(folder, "config.json") - set(PRIVATE))
    patterns = [glob.escape(name) for name in files]  # a bracket in a name is one
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, commit_message=f"Upload {folder.name}"
        )
    except Exception as problem:  # whatever a network can do
        what = f"{type(problem).__name__}: {one_line(problem, 150)}"
        raise UserError(
            f"{folder} is whole, but could not be uploaded to {repository} ({what})",
            f"again: hf upload {repository} {folder} --exclude {' '.join(PRIVATE)}",
        ) from None
    return str(address)
