"""Architectures and their weights. Importing this package registers them with timm and does nothing else."""
from models import timm_versions  # noqa: F401, first, for it says so where timm is too old
from models.ablations import T2TViTDense
from models.factory import (
    TrainedModel,
    create_from_config,
    create_model,
    create_model_from_options,
    model_of_checkpoint,
    open_trained_model,
    resolve_name,
    split_head,
)
from models.t2t_vit import T2TViT
from models.weights.formats import recorded_classes
from models.weights.identity import Architecture, identify, our_models
from models.weights.loading import (
    LoadReport,
    count_classes,
    fit_to_model,
    load_for_transfer_learning,
    load_weights,
    state_dict_of,
)
from utils.checkpoint_reader import read_checkpoint

__all__ = [
    'Architecture',
    'LoadReport',
    'T2TViT',
    'T2TViTDense',
    'TrainedModel',
    'count_classes',
    'create_from_config',
    'create_model',
    'create_model_from_options',
    'fit_to_model',
    'identify',
    'load_for_transfer_learning',
    'load_weights',
    'model_of_checkpoint',
    'open_trained_model',
    'our_models',
    'read_checkpoint',
    'recorded_classes',
    'resolve_name',
    'split_head',
    'state_dict_of',
]
