"""Saves a run's checkpoints in the background: training waits for a copy in memory, and not for the disk."""
import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import (
    KEEP_AT_LEAST,
    checkpoint_path,
    go_on_from,
    remove_aside,
    remove_leftovers,
    save_checkpoint,
)
from utils.errors import UserError

_logger = logging.getLogger(__name__)


class _Save(NamedTuple):
    content: dict
    global_step: int
    is_best: bool


class CheckpointWriter:
    """Saves a run's checkpoints while training goes on. Rank 0 only; one for a run's folder, under its RunLock.

    Args:
        folder: of the run; what a killed save left in it is removed.
        keep: newest checkpoints to keep, beside the best; at least two.
        resumed: the checkpoint this run went on from: where it is in `folder`, later ones there are set aside.
    """

    def __init__(self, folder: Path, *, keep: int, resumed: Path | None = None):
        self.folder, self.keep = folder, keep
        self._snapshot = _Snapshot()
        # One thread for all saves: a thread that ends while a loader forks can leave the new process in a deadlock.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._running: Future | None = None
        self._pending: _Save | None = None  # the save under way, or the last one if it failed
        self._error: Exception | None = None
        self._saved = 0
        remove_leftovers(folder)
        if resumed and resumed.resolve().parent == folder.resolve():
            go_on_from(resumed, folder)

    def save(self, content: dict, global_step: int, *, is_best: bool = False, must_succeed: bool = False) -> None:
        """Takes a copy of `content` in memory, after which it may change, and writes that copy in the background.

        Waits for the save before. One that fails because of the disk is a warning; what was saved before is still
        there, and the next save tries again.

        Args:
            must_succeed: return only when it is written.
        Raises:
            UserError: must_succeed, and it could not be written.
        """
        self._join()
        if self._pending and self._pending.is_best:
            self._write(self._pending)  # the best so far is in no file yet
        save = self._pending = _Save(self._snapshot.take(content), global_step, is_best)
        self._running = self._executor.submit(self._write, save)
        if must_succeed:
            self.close()

    def wait(self) -> None:
        """Returns when the save under way has ended, well or with a warning."""
        self._join()

    def close(self) -> None:
        """At the end of a run and before an exit: returns when the last save is on the disk.

        Raises:
            UserError: it could not be written, in a second attempt neither.
        """
        self._join()
        if self._pending:
            self._write(self._pending, warn=False)
            self._raise_unexpected()
        if self._pending:
            raise UserError(f'{self._describe(self._pending)}; make room or name another --output, and --resume auto '
                            'goes on from the checkpoint before')

    def _join(self) -> None:
        if self._running:
            self._running.result()
            self._running = None
        self._raise_unexpected()

    def _raise_unexpected(self) -> None:
        """What is not the disk's fault is a fault of the program, and ends it."""
        if self._error and not isinstance(self._error, OSError):
            error, self._error, self._pending = self._error, None, None
            raise error

    def _write(self, save: '_Save', warn: bool = True) -> None:
        try:
            save_checkpoint(save.content, self.folder, global_step=save.global_step, keep=self.keep,
                            is_best=save.is_best)
        except Exception as e:
            self._error = e
            if warn and isinstance(e, OSError):
                _logger.warning('%s; training goes on, and the next save tries again', self._describe(save))
            return
        self._pending = self._error = None
        self._saved += 1
        if self._saved == max(self.keep, KEEP_AT_LEAST):
            remove_aside(self.folder)

    def _describe(self, save: '_Save') -> str:
        path, error = checkpoint_path(self.folder, save.global_step), self._error
        return f'{path} could not be saved ({isinstance(error, OSError) and error.strerror or error})'


class _Snapshot:
    """Copies of nested dicts, lists and tensors, on the CPU; the memory of one copy serves the next."""

    def __init__(self):
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._copied: dict[tuple, torch.Tensor] = {}

    def take(self, content: dict) -> dict:
        """A copy of `content` that shares nothing with it; the one before is no longer valid."""
        before, self._buffers, self._copied = self._buffers, {}, {}
        copied = self._copy(content, (), before)
        self._copied = {}
        return copied

    def _copy(self, value, where: tuple, before: dict):
        if isinstance(value, torch.Tensor):
            # One tensor under two names stays one.
            same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() and same in self._copied:
                return self._copied[same]
            buffer = before.get(where)
            if buffer is None or (buffer.shape, buffer.stride(), buffer.dtype) != same[2:]:
                buffer = torch.empty_like(value, device='cpu', requires_grad=False)
            self._buffers[where] = self._copied[same] = buffer
            return buffer.copy_(value.detach())
        if isinstance(value, dict):
            # A copy of the dict itself keeps what state_dict() notes in its attributes.
            copied = copy.copy(value)
            for key in value:
                copied[key] = self._copy(value[key], (*where, key), before)
            return copied
        if isinstance(value, list | tuple):
            items = [self._copy(item, (*where, index), before) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
        return copy.deepcopy(value)
