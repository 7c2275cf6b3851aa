"""The data sets that `--dataset NAME` names. A new one is a line here and a file with its opener.

Openers stand here as text, so that the parsers of options import neither torch nor data/.
"""
from typing import NamedTuple


class Entry(NamedTuple):
    """How a data set is opened, and where it is kept.

    opener: 'module:function', which takes a data.base.Request and returns an ImageDataset. '': data/datasets.py
        opens class folders or shards.
    folder: where the data set is kept if no DIR is given; '' if it needs no folder, None if DIR has to be given. A
        folder with train/ or val/ in it is read as class folders instead.
    """
    opener: str = ''
    folder: str | None = None


DATASETS = {
    'folder': Entry(),
    'imagenet': Entry(),
    'cifar10': Entry('data.arrays:open_cifar', folder='./data_cifar'),
    'cifar100': Entry('data.arrays:open_cifar', folder='./data_cifar'),
    'digits': Entry('data.arrays:open_digits', folder=''),
    'synthetic': Entry('data.arrays:open_synthetic', folder=''),
}
