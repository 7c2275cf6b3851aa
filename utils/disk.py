"""Files that are whole or not there, and stay through a loss of power."""
import os
from pathlib import Path

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
