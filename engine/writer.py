"""Saves checkpoints in the background: training waits for a copy in memory, not for the disk."""
import copy
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from engine import checkpoint
from utils.errors import UserError

_logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Saves the checkpoints of a run while training goes on. Rank 0 only; one per folder, under its RunLock.

    Args:
        folder: the run's; whatever a killed save left in it is removed.
        keep: newest checkpoints to keep, beside the best; at least two.
        resumed: the checkpoint that this run resumed from. If it lies in `folder`, later ones there are set aside.
    """

    def __init__(self, folder: Path, *, keep: int, resumed: Path | None = None):
        self.folder, self.keep = folder, keep
        self._snapshot = _Snapshot()
        # One thread for all saves: a thread that ends while a loader forks can deadlock the new process.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._running: Future | None = None
        self._pending: dict | None = None  # the last save if it failed, with its error
        self._error: OSError | None = None
        self._saved = 0
        checkpoint.remove_all(folder, checkpoint.TEMPORARY)
        if resumed and resumed.resolve().parent == folder.resolve():
            checkpoint.go_on_from(resumed, folder)

    def save(self, content: dict, global_step: int, *, is_best: bool = False, must_succeed: bool = False) -> None:
        """Copy `content` in memory and write the copy in the background, after the previous save.

        If the disk fails, a warning says so, earlier checkpoints stay, and the next save tries again.

        Args:
            must_succeed: return only when it is written.
        Raises:
            UserError: must_succeed, and it could not be written.
        """
        self.wait()
        if self._pending and self._pending['is_best']:
            self._write(self._pending)  # the best is not in any file yet
        save = {'content': self._snapshot.take(content), 'global_step': global_step, 'is_best': is_best}
        self._running = self._executor.submit(self._write, save)
        if must_succeed:
            self.close()

    def close(self) -> None:
        """Return when the last save is on the disk; for the end of a run and before an exit.

        Raises:
            UserError: it could not be written, even in a second attempt.
        """
        self.wait()
        if self._pending:
            self._write(self._pending, warn=False)
        if self._pending:
            raise UserError(f'{self._describe(self._pending)}; make room or name another --output, then --resume auto '
                            'continues from the previous checkpoint')

    def wait(self) -> None:
        """Return when the current save has ended, with or without a warning; raise its error if it is a bug."""
        running, self._running = self._running, None
        if running:
            running.result()

    def _write(self, save: dict, warn: bool = True) -> None:
        self._pending = self._error = None
        try:
            checkpoint.save_checkpoint(folder=self.folder, keep=self.keep, **save)
        except OSError as error:
            self._pending, self._error = save, error
            if warn:
                _logger.warning('%s; training goes on, and the next save tries again', self._describe(save))
            return
        self._saved += 1
        # The resumed run now has enough checkpoints of its own.
        if self._saved == max(self.keep, checkpoint.KEEP_AT_LEAST):
            checkpoint.remove_all(self.folder, checkpoint.NUMBERED + checkpoint.ASIDE)

    def _describe(self, save: dict) -> str:
        path = checkpoint.checkpoint_path(self.folder, save['global_step'])
        return f'{path} could not be saved ({getattr(self._error, "strerror", None) or self._error})'


class _Snapshot:
    """Copies nested dicts, lists and tensors to the CPU. Each copy reuses the memory of the previous one."""

    def __init__(self):
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._copied: dict[tuple, torch.Tensor] = {}

    def take(self, content: dict) -> dict:
        """Return a copy of `content` that shares nothing with it. The previous copy is no longer valid."""
        before, self._buffers, self._copied = self._buffers, {}, {}
        copied = self._copy(content, (), before)
        self._copied = {}
        return copied

    def _copy(self, value, where: tuple, before: dict):
        if isinstance(value, torch.Tensor):
            # A tensor under two names stays a single tensor.
            same = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
            if value.numel() and same in self._copied:
                return self._copied[same]
            buffer = before.get(where)
            if buffer is None or (buffer.shape, buffer.stride(), buffer.dtype) != same[2:]:
                buffer = torch.empty_like(value, device='cpu', requires_grad=False)
            self._buffers[where] = self._copied[same] = buffer
            return buffer.copy_(value.detach())
        if isinstance(value, dict):
            # Copying the dict keeps the attributes in which state_dict() stores versions.
            copied = copy.copy(value)
            for key in value:
                copied[key] = self._copy(value[key], (*where, key), before)
            return copied
        if isinstance(value, list | tuple):
            items = [self._copy(item, (*where, index), before) for index, item in enumerate(value)]
            return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
        return copy.deepcopy(value)
