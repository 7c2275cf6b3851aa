"""Images in, batches out: data sets, decoding, transforms, samplers, loaders. Knows nothing of models.

`datasets` opens images and targets. `samplers` choose the samples of each batch. `loader` decodes and augments them in
worker processes (`decode`, `transforms`). `batch` normalises and mixes them on the device when they are used.
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
    'DATASETS', 'BatchPreparer', 'EvalSampler', 'ImageDataset', 'Loader', 'Numbered', 'TrainBatchPreparer',
    'TrainSampler', 'create_eval_transform', 'create_loader', 'create_train_transform', 'evenly_spaced',
    'explain_worker_death', 'open_eval', 'open_train_val', 'read_class_map']
