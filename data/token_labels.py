"""Stand-in for the reader of token labels."""
import hashlib
from pathlib import Path

import numpy as np
import torch

from data.base import ImageDataset
from utils.errors import UserError


class TokenLabels:
    def __init__(self, paths, num_classes):
        self._paths, self._num_classes = paths, num_classes
        self.missing = np.flatnonzero([not p.exists() for p in paths])
        self.shape = tuple(torch.load(next(p for p in paths if p.exists())).shape)

    def read(self, index):
        if not self._paths[index].exists():
            return None
        label = torch.load(self._paths[index], weights_only=True)
        if label[1].max() >= self._num_classes:
            raise UserError(f'{self._paths[index]}: class {int(label[1].max())}, and the model has {self._num_classes}')
        return label

    def fingerprint(self):
        digest = hashlib.sha256()
        for path in self._paths:
            if path.exists():
                digest.update(path.read_bytes())
        return f'{len(self._paths)} labels with the checksum {digest.hexdigest()[:16]}'


def open_token_labels(folder: str, dataset: ImageDataset, *, num_classes: int, max_missing: int = 0) -> TokenLabels:
    paths = []
    for index in range(len(dataset)):
        parts = Path(dataset.name(index)).parts
        paths.append(Path(folder, parts[-2], parts[-1].split('.')[0] + '.pt'))
    if sum(not p.exists() for p in paths) > max_missing:
        raise UserError(f'{folder} lacks labels')
    labels = TokenLabels(paths, num_classes)
    for i in range(len(paths)):
        labels.read(i)
    return labels
