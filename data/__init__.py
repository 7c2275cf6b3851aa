"""Images in, batches out: decoding, datasets, transforms, samplers, loaders. Knows nothing of models.

The way of a batch: `datasets` opens images and targets, `samplers` say which of them make up which batch,
`loader` decodes (`decode`) and augments (`transforms`) them in worker processes, and `batch` normalises and
mixes them on the device at the moment they are used.
"""

from data.base import ImageDataset, Numbered, evenly_spaced
from data.batch import BatchPreparer, TrainBatchPreparer
from data.classes import read_class_map
from data.datasets import open_eval, open_train_val
from data.loader import Loader, create_loader, explain_worker_death
from data.samplers import EvalSampler, TrainSampler
from data.transforms import create_eval_transform, create_train_transform
from options.datasets import DATASETS

__all__ = [
    'DATASETS',
    'BatchPreparer',
    'EvalSampler',
    'ImageDataset',
    'Loader',
    'Numbered',
    'TrainBatchPreparer',
    'TrainSampler',
    'create_eval_transform',
    'create_loader',
    'create_train_transform',
    'explain_worker_death',
    'open_eval',
    'open_train_val',
    'read_class_map',
    'evenly_spaced',
]
