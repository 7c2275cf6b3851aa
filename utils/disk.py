"""Files that are whole or not there, and stay through a loss of power."""
import os
import tempfile
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the folder of this project


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file under another name and renames it: if there is no room for it, or on the way, the one before stays.

    Text is written as UTF-8, its line ends as they are. Raises OSError.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """A rename survives a loss of power only once its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder that the user named by `option`, or raises UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f'{option}: {folder} cannot be written ({e.strerror}); name another folder') from None


def check_writable(folder: Path, option: str) -> None:
    """Raises the UserError of `make_folder` if that folder could not be made or written, but makes nothing."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as e:
        raise UserError(f'{option}: {folder} cannot be written ({e.strerror}); name another folder') from None
