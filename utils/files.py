"""Reading checkpoint files, from wherever they come, without running anything that is in them."""
import argparse
import os
import pickle
import re
from typing import Any

import safetensors.torch
import torch

from utils.errors import UserError

# What people have in place of the file they meant: how it begins, what it is, what to do.
IMPOSTORS = (
    (b'version https://git-lfs', 'a Git LFS pointer', 'fetch the file itself with git lfs pull'),
    (b'/annex/objects/', 'a git-annex pointer', 'fetch the file itself with git annex get'),
    (b'<!doctype html', 'a web page', 'download the file itself'),
    (b'<html', 'a web page', 'download the file itself'),
)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a PyTorch or safetensors file onto the CPU and return the dict it holds.

    Nothing in the file is executed: only tensors, plain containers and `argparse.Namespace` (the options in
    the authors' checkpoints) are allowed, and there is no fallback.

    Raises:
        UserError: the file is missing, is not a checkpoint, is damaged, or holds other objects.
    """
    path = os.fspath(path)
    head = _file_start(path)
    if head[8:9] == b'{':  # a safetensors file: eight bytes of length, then JSON
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(_explain_unpickling(path, error)) from error
    except Exception as error:  # a damaged file makes the reader raise nearly anything: KeyError, EOFError, …
        raise UserError(f'{path} is damaged, incomplete or not a PyTorch checkpoint ({_first_line(error)}); '
                        'compare its size with the original and copy it again') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} holds a {type(checkpoint).__name__}, not a checkpoint; '
                        'save a dict, such as model.state_dict()')
    return checkpoint


def _file_start(path: str) -> bytes:
    """Return the first bytes of a file, or raise UserError where it cannot be a checkpoint of any kind."""
    if not os.path.exists(path):
        raise UserError(f'checkpoint {path} does not exist; check the path')
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; give the path of a checkpoint file in it')
    try:
        with open(path, 'rb') as file:
            head = file.read(256)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); check its permissions') from error
    if not head:
        raise UserError(f'{path} is empty; copy or download it again')
    for start, what, remedy in IMPOSTORS:
        if head.lstrip().lower().startswith(start):
            raise UserError(f'{path} is {what}, not a checkpoint; {remedy}')
    return head


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file, which holds a flat state dict and nothing else."""
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f'{path} is damaged or incomplete ({_first_line(error)}); '
                        'compare its size with the original and copy it again') from error


def _explain_unpickling(path: str, error: pickle.UnpicklingError) -> str:
    """Say in one line why torch refused a pickle: what it would have called, or that it holds no weights."""
    refused = re.search(r'GLOBAL ([\w.$]+)', str(error))
    if refused:
        return (f'{path} was not read because it refers to {refused.group(1)}, which could run code; '
                'if you trust it, save the weights alone: torch.save(model.state_dict(), path)')
    return f'{path} is damaged or not a PyTorch checkpoint; give a file saved by torch.save or safetensors'


def _first_line(error: Exception) -> str:
    """Return an error's name and the first line of its message, shortened."""
    return f'{type(error).__name__}: {error}'.splitlines()[0][:160]
