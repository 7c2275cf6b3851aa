"""Files that are either whole or absent, and survive a loss of power; text files of people."""
import codecs
import os
import tempfile
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the folder of this project


def read_text(path: str | os.PathLike) -> str:
    """Return the text of a file that people edit. Raises OSError or UnicodeDecodeError.

    It is UTF-8, with or without a byte order mark, or UTF-16 with one, as PowerShell writes it.
    """
    content = Path(path).read_bytes()
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode('utf-16' if is_utf16 else 'utf-8-sig')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under another name, then rename it. After a failure the previous file is intact.

    Text is written as UTF-8 with its line ends unchanged. Raises OSError.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.unlink(missing_ok=True)  # a link there would lead the content elsewhere
    try:
        with open(temporary, 'xb') as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def require_own(path: Path) -> None:
    """Raise UserError if what a run reads or writes in its folder is a link that leads out of it."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.is_relative_to(os.path.realpath(path.parent)):
        raise UserError(f'{path} is a link that leads out of its folder, to {target}; remove it, or put the file there')


def sync_folder(folder: Path) -> None:
    """Write a folder to the disk; only then do renames in it survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path, option: str) -> None:
    """Create a folder that the user named by `option`, or raise UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{option}: {folder} cannot be written ({error.strerror}); name another folder') from None
    check_writable(folder, option)


def check_writable(folder: Path, option: str) -> None:
    """Raise UserError if `make_folder` could not create the folder or write there; create nothing."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f'{option}: {folder} cannot be written ({error.strerror}); name another folder') from None
