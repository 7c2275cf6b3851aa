"""Tests of the ways to a model from Python: a recipe, torch.hub, timm's local folders, the Hugging Face Hub.

    python -m pytest tests/test_hub.py
"""
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch

import hubconf
from models import create_from_config, load_weights, split_head
from models.timm_versions import SAVES_ARGUMENTS
from tests.conftest import ROOT, run_command, succeeded
from utils.errors import UserError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')  # shown by pytest when a test fails


def recipe(folder: Path, *lines: str) -> Path:
    path = folder / 'recipe.yaml'
    path.write_text('\n'.join(lines) + '\n')
    return path


def tiny_model(**kwargs) -> torch.nn.Module:
    """A registered T2T-ViT that is small, and not square."""
    return timm.create_model('t2t_vit_7', **{
        'img_size': (64, 48), 'num_classes': 5, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, **kwargs}).eval()


# --- Recipes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_makes_a_model(path):
    with torch.device('meta'):
        model = create_from_config(path)
    assert model.num_classes == 1000
    assert f'model: {model.pretrained_cfg["architecture"]}' in path.read_text()


def test_what_a_recipe_says_of_the_model_is_taken(tmp_path):
    path = recipe(tmp_path, 'model: t2t_vit_7', 'img_size: 64x48', 'num_classes: 7', 'gp: avg', 'drop_path: 0.2',
                  'lr: 1e-3', 'epochs: 3', 'transfer_learning: true', 'model_kwargs: [depth=2, aux_head=True]')
    model = create_from_config(path)
    assert (model.grid_size, model.num_classes, model.global_pool, len(model.blocks)) == ((4, 3), 7, 'avg', 2)
    assert model.blocks[-1].drop_path.drop_prob == pytest.approx(0.2) and model.aux_head.out_features == 7
    assert create_from_config(path, num_classes=3, img_size=96).head.out_features == 3

    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    loaded = create_from_config(path, initial_checkpoint=str(tmp_path / 'weights.pth'))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(),
                                                 strict=True))


@pytest.mark.parametrize('lines, overrides, message', [
    (['lr: 1e-3'], {}, 'names no model; add a line such as "model: t2t_vit_14"'),
    (['model: t2t_vit14'], {}, "'t2t_vit14' does not exist; did you mean t2t_vit_14"),
    (['model: t2t_vit_7', 'img_size: big'], {}, 'img_size'),
    (['model: t2t_vit_7'], {'classes': 5}, "'classes' is no option of a model"),
    (['model: t2t_vit_7', 'model_kwargs: [dept=3]'], {}, 'takes no argument dept'),
    (['model: t2t_vit_7', 'model_kwargs: [img_size=3]'], {}, '--model-kwargs img_size: use --img-size'),
    (['model: t2t_vit_7', 'model_kwargs: [depth]'], {}, "model_kwargs: 'depth' is no argument: give NAME=VALUE"),
    (['model: t2t_vit_7', 'model_kwargs: depth=3'], {}, "'depth=3' is no list of values"),
])
def test_recipes_without_a_model(lines, overrides, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        create_from_config(recipe(tmp_path, *lines), **overrides)
    assert '\n' not in str(caught.value)
    with pytest.raises(UserError, match='missing.yaml'):
        create_from_config(tmp_path / 'missing.yaml')


@pytest.mark.parametrize('name, options', [('t2t_vit_7', {'img_size': 64}), ('vit_s_16', {'img_size': 64}),
                                           ('resnet18', {}), ('t2t_vit_dense', {'img_size': 64, 'gp': 'avg'})])
def test_backbone_and_head(name, options, tmp_path):
    path = recipe(tmp_path, f'model: {name}', 'num_classes: 5')
    whole = create_from_config(path, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = whole(images)
    backbone, head = split_head(whole)
    features = backbone(images)
    assert features.shape == (2, backbone.num_features) and head.weight.shape == (5, backbone.num_features)
    assert torch.equal(head(features), expected)


def test_two_heads_are_not_split():
    with pytest.raises(UserError, match='a tuple, not a linear layer; use model.forward_features'):
        split_head(tiny_model(aux_head=True))


# --- torch.hub --------------------------------------------------------------------------------------------------------

def test_torch_hub(tmp_path):
    code = f'''
import torch
torch.manual_seed(0)
model = torch.hub.load({str(ROOT)!r}, 't2t_vit_7', source='local', num_classes=10, img_size=64).eval()
print(model(torch.zeros(1, 3, 64, 64)).shape, type(model).__module__)
other = torch.hub.load({str(ROOT)!r}, 'create_from_config', {str(ROOT / 'configs/demo.yaml')!r}, source='local')
print(other.grid_size)
'''
    out = succeeded(run_command([sys.executable, '-c', code], tmp_path))
    assert out.splitlines() == ['torch.Size([1, 10]) models.t2t_vit', '(2, 2)']


def test_torch_hub_has_every_model():
    entry_points = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith('_')}
    assert entry_points == {*timm.list_models(module='t2t_vit'), *timm.list_models(module='ablations'),
                            'create_from_config'}
    assert all(getattr(hubconf, name).__doc__ for name in entry_points)


# --- timm's folders and the Hugging Face Hub --------------------------------------------------------------------------

needs_arguments = pytest.mark.skipif(not SAVES_ARGUMENTS, reason='before timm 1.0.31 no arguments are saved')


def assert_same_model(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 64, 48)
    assert torch.equal(model.eval()(images), expected(images))
    assert model.pos_embed.shape == expected.pos_embed.shape


@needs_arguments
@pytest.mark.parametrize('options', [
    {}, {'in_chans': 3, 'global_pool': 'avg'}, {'tokens_type': 'transformer', 'aux_head': True, 'aux_weight': 0.25}])
def test_a_local_folder(options, tmp_path):
    model = tiny_model(**options)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert {path.name for path in tmp_path.iterdir()} == {'config.json', 'model.safetensors'}
    assert_same_model(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), model)
    # The same file is a checkpoint like any other.
    other = tiny_model(**options)
    load_weights(other, tmp_path / 'model.safetensors')
    assert_same_model(other, model)


@needs_arguments
def test_a_resized_model_is_saved_with_its_size(tmp_path):
    model = tiny_model(img_size=64)
    model.set_input_size((64, 48))
    model.reset_classifier(3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.grid_size == (4, 3)
    assert_same_model(again, model)
    # To another size and number of classes: from the saved grid, which is not square.
    smaller = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, img_size=(32, 48), num_classes=2)
    assert smaller.grid_size == (2, 3) and smaller.head.out_features == 2
    model.set_input_size((32, 48))
    assert torch.equal(smaller.pos_embed, model.pos_embed)


@needs_arguments
def test_push_to_the_hub(tmp_path, monkeypatch):
    """timm's push, into a folder that stands for the repository."""
    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return huggingface_hub.RepoUrl(f'https://huggingface.co/{repo_id}')

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, *, repo_id, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(timm.models._hub, 'HfApi', Api)
    model = tiny_model()
    timm.models.push_to_hf_hub(model, 'someone/t2t', safe_serialization=True)
    folder = tmp_path / 'someone' / 't2t'
    assert {path.name for path in folder.iterdir()} == {'config.json', 'model.safetensors', 'README.md'}
    assert_same_model(timm.create_model(f'local-dir:{folder}', pretrained=True), model)
