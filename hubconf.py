"""Entry points of torch.hub: every model of this project by name.

    torch.hub.load('path/to/clone', 't2t_vit_14', source='local')
    torch.hub.load('path/to/clone', 't2t_vit_14', source='local', pretrained=True, num_classes=10, img_size=384)
    torch.hub.load('path/to/clone', 'create_from_config', 'path/to/clone/configs/t2t_vit_14.yaml', source='local')

They take the arguments of timm.create_model.
"""
import timm as _timm

from models import (
    create_from_config,  # noqa: F401 (an entry point)
    our_models as _our_models,
)

dependencies = ['torch', 'timm', 'safetensors', 'yaml']

globals().update({_name: _timm.model_entrypoint(_name) for _name in _our_models()})
