"""Find paths that do not exist, before torch is imported, which takes seconds.

Only what is certain is refused here. The modules that open a path know all that it may be, and say the same of it.
"""
import os
import re
from pathlib import Path

from options.datasets import DATASETS
from utils import job
from utils.errors import UserError

# In a folder of runs, this name stands for the run that was written last.
LATEST = 'latest'
# For this one, another checkpoint beside it is taken.
LAST = 'last.pth.tar'
# Addresses that are no paths of this machine: https://…, s3://…, hf-hub:…
ADDRESS = re.compile(r'[A-Za-z][\w+-]*://|(hf[-_]hub|local[-_]dir|wds|pipe):', re.IGNORECASE)


def check_paths(args) -> None:
    """Raise UserError for a folder of data, a checkpoint or an image of the options that does not exist."""
    if (dataset := getattr(args, 'dataset', None)) in DATASETS and not DATASETS[dataset].opener:
        check_data(args.data)
    for name in getattr(args, 'set_folders', None) or ():
        check_data(name.partition('=')[2])
    for name in ('eval_checkpoint', 'initial_checkpoint', 'transfer_model', 'teacher_checkpoint'):
        check_checkpoint(getattr(args, name, None))
    for address in getattr(args, 'further_checkpoints', ()):
        check_checkpoint(address)
    if (labels := getattr(args, 'token_labels', None)) and not _exists(labels):
        raise UserError(f'--token-labels {labels}: no such folder; check the path')
    resume = getattr(args, 'resume', '')
    # A run may have removed, since its first start, what a restarted process reads here.
    if resume not in ('', 'auto') and not job.was_restarted() and not _exists(resume) and Path(resume).name != LAST:
        raise UserError(f"--resume {resume}: no such checkpoint; give a file such as {LAST}, or 'auto'")
    for model in getattr(args, 'beside', ()):
        if (checkpoint := model.partition('=')[2]) != 'pretrained':
            check_checkpoint(checkpoint)
    images = getattr(args, 'images', ())
    for image in images if isinstance(images, list) else ():  # of a benchmark, a number
        if not _is_address(image) and not _exists(image) and not image.endswith('.tar'):
            raise UserError(f'image {os.path.expanduser(image)!r} does not exist; check the path')


def check_data(address: str | None) -> None:
    """Raise UserError if the folder of a data set does not exist, which only patterns of tar files need not."""
    path = (address or '').removeprefix('wds:').removeprefix('file://')
    if not path or _is_address(path) or '{' in path or path.endswith('.tar') or _exists(path):
        return
    path = os.path.expanduser(path)
    raise UserError(f'data folder {path.rstrip("/") or path!r} does not exist; check the path')


def check_checkpoint(address: str | None) -> None:
    """Raise UserError if the file or folder of a checkpoint does not exist."""
    if not address or _is_address(address) or _exists(address):
        return
    path = Path(address).expanduser()
    if path.name == LATEST and path.parent.is_dir():
        return
    raise UserError(f'checkpoint {path} does not exist; check the path')


def _is_address(path: str) -> bool:
    return bool(ADDRESS.match(path))


def _exists(path: str) -> bool:
    return os.path.lexists(os.path.expanduser(path))
