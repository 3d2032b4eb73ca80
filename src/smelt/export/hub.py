"""A checkpoint folder or a GGUF file on the Hugging Face hub, byte for byte."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import OfflineModeIsEnabled

from smelt.checkpoint import shards
from smelt.checkpoint.verify import verify as verify_files
from smelt.errors import CheckpointError, SmeltError

_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class HubError(SmeltError):
    """The hub cannot be reached, or does not take what it is given."""


def push(
    source: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    verify: bool = True,
) -> str:
    """Upload every file of a checkpoint folder, or a GGUF file, in one commit; returns its address.

    The repository is made where there is none. The token is that of `hf auth login` or HF_TOKEN.

    Args:
        repo: user/name.
        private: of a repository that is made.
        verify: hold a folder's files against their checksums first, where they are known.

    Raises:
        CheckpointError: the source is neither, or damaged.
        HubError: no token, or whatever the hub says.
    """
    path = Path(source).expanduser()
    _check_source(path)
    if not _REPO.fullmatch(repo):
        raise HubError(f"{repo}: not the name of a repository. Give user/name.")
    if get_token() is None:
        raise HubError(
            "No token for the hub. Log in with `hf auth login`, or set HF_TOKEN to a token that "
            "may write."
        )
    if verify and path.is_dir():
        verify_files(path)
    api = HfApi()
    title = message or f"Upload {path.name} with smelt"
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if path.is_dir():
            done = api.upload_folder(repo_id=repo, folder_path=path, commit_message=title)
        else:
            done = api.upload_file(
                path_or_fileobj=path, path_in_repo=path.name, repo_id=repo, commit_message=title
            )
    except Exception as error:  # the client raises dozens of types: its own, httpx's, the system's
        raise HubError(_explain(repo, error)) from None
    return str(done.repo_url)


def _check_source(path: Path) -> None:
    if path.is_file() and path.suffix == ".gguf":
        return
    if not path.is_dir():
        raise CheckpointError(f"{path}: neither a checkpoint folder nor a GGUF file.")
    if path.suffix == ".partial":
        raise CheckpointError(f"{path}: unfinished. Run the command that makes it to its end.")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json, so this is not a checkpoint.")
    shards.list_tensors(path)


def _explain(repo: str, error: Exception) -> str:
    """One sentence of what went wrong, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "The hub is switched off here (HF_HUB_OFFLINE). Unset that, and try again."
    if status in (401, 403):
        return (
            f"{repo}: the hub does not let this token write there ({status}). Log in with a token "
            "that may (`hf auth login`), or name a repository of yours."
        )
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{repo}: the hub did not take it ({lines[0] if lines else type(error).__name__})."
