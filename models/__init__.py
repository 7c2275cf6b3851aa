"""Architectures and their weights; importing this package registers the architectures with timm.

    layers → tokens_to_token → t2t_vit → ablations   parts, tokens-to-token module, T2T-ViT, the paper's ablations
    weights/formats → identity → loading             checkpoint → state dict → its model → weights in the model
    token_labels                                     what token labels need of a model
    factory                                          model from a name, options, a recipe or a checkpoint
    teacher                                          the trained model that another one learns from
    several                                          checkpoints side by side, and the average of their weights
    runtimes                                         trained model → files for other runtimes, compared with PyTorch
    timm_versions                                    what newer versions of timm add
"""
from models import timm_versions  # noqa: F401, first, since it checks the version of timm
from models.ablations import T2TViTDense
from models.factory import (
    TrainedModel,
    create_from_config,
    create_model,
    create_model_from_options,
    open_trained_model,
    resolve_model,
    resolve_name,
    split_head,
)
from models.several import average_weights, open_trained_models
from models.t2t_vit import T2TViT
from models.teacher import check_teacher, open_teacher
from models.token_labels import token_layout
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
    'Architecture', 'LoadReport', 'T2TViT', 'T2TViTDense', 'TrainedModel', 'average_weights', 'check_teacher',
    'count_classes', 'create_from_config', 'create_model', 'create_model_from_options', 'fit_to_model', 'identify',
    'load_for_transfer_learning', 'load_weights', 'open_teacher', 'open_trained_model', 'open_trained_models',
    'our_models', 'read_checkpoint', 'recorded_classes', 'resolve_model', 'resolve_name', 'split_head',
    'state_dict_of', 'token_layout',
]
