"""Checkpoint files: where they are, how they come to be whole, and which one is the latest. Knows dicts, never models.

A run's folder holds

    checkpoint-00001234.pth.tar    the newest few, by optimizer step
    last.pth.tar                   the newest of them
    model_best.pth.tar             the one with the best metric

A file appears under its name only when it is whole, and `last.pth.tar` points to it only after that.
"""
import logging
import os
import shutil
from datetime import datetime
from pathlib import Path

import torch

from utils.errors import UserError

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'


def save_atomically(content: dict, path: Path) -> None:
    """Writes `content` so that `path` is, at any moment and after any crash, the old file or the new one, whole."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut only once its folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, target: Path) -> None:
    """Makes `link` another name of the file `target`, atomically; a copy where the file system has no hard links."""
    temporary = link.with_name(f'.{link.name}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        shutil.copyfile(target, temporary)
    os.replace(temporary, link)


def save_checkpoint(content: dict, folder: Path, *, global_step: int, keep: int, is_best: bool) -> Path:
    """Saves the newest checkpoint of a run, advertises it, and removes all but the `keep` newest. Rank 0 only."""
    path = folder / f'checkpoint-{global_step:08d}.pth.tar'
    save_atomically(content, path)
    _point(folder / LAST, path)
    if is_best:
        _point(folder / BEST, path)
    _sync_folder(folder)
    newest_first = sorted(folder.glob('checkpoint-*.pth.tar'), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    for old in newest_first[keep:]:
        old.unlink()
    return path


def resolve_run(*, output: str, kind: str, experiment: str, resume: str, name: str) -> tuple[Path, Path | None]:
    """The folder of this run, and the checkpoint it continues from (None for a new run). Creates nothing.

    With `resume` a path, the run goes on in that checkpoint's folder, unless `experiment` names another. With
    'auto' it goes on from the last checkpoint of output/kind/experiment, or, where no experiment is named, of the
    newest run called `*-name`; where there is none, it starts a new run.

    Raises:
        UserError: the path to resume from is no file, or a new run would overwrite another.
    """
    runs = Path(output).expanduser() / kind
    new = runs / (experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{name}')
    if not resume:
        _refuse_to_overwrite(new)
        return new, None
    if resume == 'auto':
        candidates = [new / LAST] if experiment else runs.glob(f'*-{name}/{LAST}')
        found = sorted((path for path in candidates if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
        if not found:
            _logger.info('--resume auto: no checkpoint in %s, starting a new run', new if experiment else runs)
            return new, None
        return found[-1].parent, found[-1]
    path = Path(resume).expanduser()
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise UserError(f"--resume {resume}: no such checkpoint; give a file such as {LAST}, or 'auto'")
    if not experiment or new.resolve() == path.resolve().parent:
        return path.resolve().parent, path
    _refuse_to_overwrite(new)
    return new, path


def _refuse_to_overwrite(folder: Path) -> None:
    if (folder / LAST).exists():
        raise UserError(f'--experiment {folder.name}: that run exists in {folder.parent}; --resume auto continues it, '
                        'another name starts a new one')
