"""Checkpoints as other programs write them load, or are told apart in one line; nothing in them runs."""
import argparse
import collections
import datetime
import json
import pathlib
import pickle
import re
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from models import load_weights
from tests.conftest import run_script, succeeded
from tests.test_weights import assert_loaded, assert_refused, tiny_model, wrapped
from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(42)
    print('seed 42')


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope='module')
def state() -> dict:
    torch.manual_seed(7)
    return tiny_model().state_dict()


def averaged(state: dict) -> dict:
    """As torch.optim.swa_utils.AveragedModel saves the average of a model."""
    return {'n_averaged': torch.tensor(3), **wrapped(state)}


def counted_by_thop(state: dict) -> dict:
    return {**state, 'total_ops': torch.zeros(1, dtype=torch.float64), 'blocks.0.total_params': torch.zeros(1)}


def lightning(state: dict) -> dict:
    return {'epoch': 1, 'global_step': 12, 'pytorch-lightning_version': '2.6.0', 'state_dict': state, 'loops': {},
            'callbacks': {}, 'optimizer_states': [], 'lr_schedulers': [], 'hyper_parameters': {'lr': 1e-3}}


def optimizer_of(model: nn.Module) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


# Name → (content from a state dict, entry, words of the report).
LOADED = {
    'lightning': (lambda s: lightning(wrapped(s, 'model.')), 'state_dict', 'prefix model. removed'),
    'lightning, compiled': (lambda s: lightning(wrapped(s, 'net._orig_mod.')), 'state_dict', 'prefix net. removed'),
    'lightning with a loss': (lambda s: lightning({**wrapped(s, 'model.'), 'criterion.weight': torch.ones(5)}),
                              'state_dict', 'criterion.weight'),
    'lightning with a metric': (lambda s: lightning({**wrapped(s, 'net.'), 'metric.total': torch.ones(5)}),
                                'state_dict', 'prefix net. removed'),
    'transformers': (lambda s: wrapped(s, 'timm_model.'), None, 'prefix timm_model. removed'),
    'two prefixes': (lambda s: wrapped(s, 'backbone.model.'), None, 'prefix backbone.model. removed'),
    'tutorial': (lambda s: {'epoch': 5, 'model_state_dict': s, 'optimizer_state_dict': optimizer_of(tiny_model()),
                            'loss': .3}, 'model_state_dict', ''),
    'any name': (lambda s: {'my_net': s, 'rng': {'cpu': torch.get_rng_state()}, 'epoch': 3}, 'my_net', ''),
    'a name beside': (lambda s: {'model': 't2t_vit_7', 'weights': s}, 'weights', ''),
    'deepspeed': (lambda s: {'module': s, 'optimizer': None, 'param_shapes': [{'a': torch.Size([1])}],
                             'ds_version': '0.17.1', 'ds_config': {'train_batch_size': 8}}, 'module', ''),
    'swa': (lambda s: {'model': {key: value + 1 for key, value in s.items()}, 'model_ema': averaged(s)}, 'model_ema',
            'n_averaged'),
    'average by itself': (averaged, None, 'n_averaged'),
    'thop': (counted_by_thop, None, 'blocks.0.total_params'),
    'own name of an average': (lambda s: {'net_weights': {key: value + 1 for key, value in s.items()},
                                          'ema_weights': s}, 'ema_weights', ''),
    'numbers in a state dict': (lambda s: {**s, 'version': 2, '_extra_state': None}, None, '_extra_state'),
    'mmengine': (lambda s: {'meta': {'epoch': 1, 'mmengine_version': '0.10.7'}, 'state_dict': s,
                            'message_hub': {'log_scalars': collections.OrderedDict()}}, 'state_dict', ''),
}


@pytest.mark.parametrize('kind', LOADED)
def test_checkpoints_of_other_programs_give_their_weights(kind, state, model, tmp_path):
    content_of, entry, said = LOADED[kind]
    torch.save(content_of(state), tmp_path / 'a.pth')
    report = load_weights(model, tmp_path / 'a.pth')
    assert_loaded(model, state)
    assert report.entry == entry and any(said in line for line in [str(report), *report.lines()])


def test_without_the_average_the_weights_beside_it_are_taken(state, model):
    other = {key: value + 1 for key, value in state.items()}
    for checkpoint in ({'net_weights': state, 'ema_weights': other},
                       {**wrapped(state, 'a.'), **wrapped(other, 'ema.')}):
        load_weights(model, checkpoint, use_ema=False)
        assert_loaded(model, state)
        load_weights(model, checkpoint)
        assert_loaded(model, other)


def test_several_sets_of_weights_are_named(state, model):
    assert_refused(model, {'student': state, 'teacher': state},
                   'several sets of weights: student, teacher; say which one with --weights-key, such as .* student')
    assert_refused(model, {**wrapped(state, 'a.'), **wrapped(state, 'b.')}, 'several sets of weights: a, b; say')


@pytest.mark.parametrize(('key', 'content_of'), [
    ('teacher', lambda own, other: {'student': other, 'teacher': own, 'epoch': 3}),
    ('teacher', lambda own, other: {'student': other, 'teacher': wrapped(own, 'module.model.')}),
    ('teacher', lambda own, other: {**wrapped(other, 'student.'), **wrapped(own, 'teacher.')}),
    ('net.teacher', lambda own, other: lightning({**wrapped(other, 'net.student.'), **wrapped(own, 'net.teacher.')})),
    ('state_dict.teacher', lambda own, other: lightning({**wrapped(other, 'student.'), **wrapped(own, 'teacher.')})),
    ('dino.teacher', lambda own, other: {'dino': {'student': other, 'teacher': own}}),
    ('v1.1', lambda own, other: {'v1.0': other, 'v1.1': own}),
    ('model', lambda own, other: {'model': own, 'model_ema': other, 'preferred': 'model_ema'}),
    ('fast', lambda own, other: {'fast': own, 'slow': other, 'ema': other})])
def test_a_key_chooses_among_several_sets_of_weights(key, content_of, state, model, tmp_path):
    torch.save(content_of(state, {name: value + 1 for name, value in state.items()}), tmp_path / 'a.pth')
    load_weights(model, tmp_path / 'a.pth', weights_key=key)
    assert_loaded(model, state)


def test_a_key_without_weights_is_refused(state, model):
    both = {'student': state, 'teacher': state, 'epoch': 3}
    assert_refused(model, both, 'weights-key epoch: .* no weights of that name; it has student, teacher$',
                   weights_key='epoch')
    assert_refused(model, wrapped(state, 'a.'), 'it has a$', weights_key='b')
    assert_refused(model, both, '--weights-key student beside --no-use-ema: which weights', weights_key='student',
                   use_ema=False)


def test_scripts_and_tools_take_the_key(image_folder, tmp_path):
    state = tiny_model(num_classes=3, img_size=32).state_dict()
    arguments = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}
    other = {key: value.flip(0) for key, value in state.items()}
    recorded = argparse.Namespace(model='t2t_vit_7', model_kwargs=arguments)
    torch.save({'student': other, 'teacher': state, 'arch': 't2t_vit_7', 'img_size': 32, 'args': recorded,
                'classes': ['ant', 'bee', 'cat']}, tmp_path / 'two.pth')
    succeeded(run_script('tools/checkpoint.py', 'strip', 'two.pth', 'one.pth', '--weights-key', 'teacher',
                         cwd=tmp_path))
    stripped = read_checkpoint(tmp_path / 'one.pth')
    assert stripped['classes'] == ['ant', 'bee', 'cat']
    assert all(torch.equal(stripped['state_dict'][key], value) for key, value in state.items())
    options = (image_folder, '--device', 'cpu', '-j', '0')
    out = succeeded(run_script('validate.py', *options, '--checkpoint', 'two.pth', '--weights-key', 'teacher',
                               cwd=tmp_path))
    assert ', teacher)' in out
    kwargs = ('--model', 't2t_vit_7', '--img-size', '32', '--model-kwargs', *(f'{k}={v}' for k, v in arguments.items()))
    out = succeeded(run_script('train.py', *options, *kwargs, '--initial-checkpoint', 'two.pth', '--weights-key',
                               'student', '--epochs', '1', '--batch-size', '4', '--output', 'output', '--experiment',
                               'a', cwd=tmp_path))
    assert ', student)' in out


def test_what_torch_fills_in_is_not_missing():
    model, source = (timm.create_model('resnet18', num_classes=4) for _ in range(2))
    state = source.state_dict()
    old = {key: value for key, value in state.items() if not key.endswith('num_batches_tracked')}
    assert len(old) < len(state)
    assert load_weights(model, old).missing == ()
    assert_loaded(model, state)


# --- Names of the models' authors -------------------------------------------------------------------------------------

def as_swin(key: str) -> str:
    key = re.sub(r'layers\.(\d)\.downsample', lambda found: f'layers.{int(found[1]) - 1}.downsample', key)
    return key.replace('head.fc.', 'head.')


def as_convnext(key: str) -> str:
    for pattern, replacement in ((r'^stem\.', 'downsample_layers.0.'), (r'stages\.(\d)\.blocks\.', r'stages.\1.'),
                                 (r'stages\.(\d)\.downsample\.', r'downsample_layers.\1.'), ('conv_dw', 'dwconv'),
                                 (r'mlp\.fc', 'pwconv'), (r'^head\.norm\.', 'norm.'), (r'^head\.fc\.', 'head.')):
        key = re.sub(pattern, replacement, key)
    return key


@pytest.mark.parametrize(('name', 'original'), [
    ('swin_tiny_patch4_window7_224', as_swin), ('convnext_atto', as_convnext)])
def test_weights_with_their_authors_names_are_mapped_by_timm(name, original):
    source, model = (timm.create_model(name, num_classes=4) for _ in range(2))
    state = source.state_dict()
    theirs = {original(key): value for key, value in state.items()}
    assert len(theirs) == len(state) and theirs.keys() != state.keys()
    report = load_weights(model, {'model': theirs})
    assert_loaded(model, state)
    assert 'named and shaped as timm does' in str(report)


def test_a_script_finds_the_classes_of_such_weights(image_folder, tmp_path):
    source = timm.create_model('convnext_atto', num_classes=3)
    torch.save({'model': {as_convnext(key): value for key, value in source.state_dict().items()}}, tmp_path / 'a.pth')
    torch.save(source.state_dict(), tmp_path / 'b.pth')
    results = []
    for name in 'ab':
        succeeded(run_script('validate.py', image_folder, '--model', 'convnext_atto', '--checkpoint', f'{name}.pth',
                             '--img-size', '64', '--device', 'cpu', '-j', '0', '--results-file', name, cwd=tmp_path))
        results.append(json.loads((tmp_path / f'{name}.json').read_text())['loss'])
    assert results[0] == results[1]


# --- What stands beside weights ---------------------------------------------------------------------------------------

BESIDE = {
    'numpy scalar': np.float64(83.2), 'numpy bool': np.bool_(True), 'array': np.arange(3.),
    'array of objects': np.array(['a', 1], dtype=object), 'texts': np.array(['a', 'bc']),
    'dates': np.array(['2026-01-01'], 'M8[D]'), 'records': np.zeros(2, 'i4,f8'),
    'deque': collections.deque([1.], maxlen=3),
    'defaultdict': collections.defaultdict(list, {'a': [1]}), 'path': pathlib.Path('out/run'), 'set': {1},
    'frozenset': frozenset([1]), 'date': datetime.datetime(2026, 1, 1), 'namespace': types.SimpleNamespace(a=1),
    'args': argparse.Namespace(output_dir=pathlib.Path('out')), 'counter': collections.Counter('aab'),
    'version': torch.torch_version.TorchVersion('2.11'), 'range': range(3)}


@pytest.mark.parametrize('what', BESIDE)
@pytest.mark.parametrize('is_zip', [True, False])
def test_harmless_data_beside_the_weights_keeps_nothing_out(what, is_zip, state, model, tmp_path):
    torch.save({'state_dict': state, 'beside': BESIDE[what]}, tmp_path / 'a.pth',
               _use_new_zipfile_serialization=is_zip)
    load_weights(model, tmp_path / 'a.pth')
    assert_loaded(model, state)


def test_numbers_and_paths_keep_their_values(tmp_path):
    torch.save({name: BESIDE[name] for name in ('numpy scalar', 'array', 'array of objects', 'texts',
                                                   'dates', 'deque', 'defaultdict', 'path', 'date')},
               tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read['numpy scalar'] == 83.2 and read['array'].tolist() == [0, 1, 2] and read['deque'] == [1.]
    for name in ('array of objects', 'texts', 'dates'):
        assert read[name].tolist() == BESIDE[name].tolist()
    assert read['defaultdict'] == {'a': [1]} and str(read['path']) == 'out/run'
    assert read['date'] == datetime.datetime(2026, 1, 1)


def write_pickle(path, data: bytes) -> None:
    """Write a pickle as the content of a PyTorch file."""
    with zipfile.ZipFile(path, 'w') as archive:
        for entry, content in (('data.pkl', data), ('byteorder', b'little'), ('version', b'3\n')):
            archive.writestr(f'archive/{entry}', content)


def test_objects_of_config_libraries_are_read_as_plain_containers(tmp_path):
    """As yacs, omegaconf and mmengine pickle theirs: {'config': an object with the items or attributes lr = 1}."""
    for name, by_items in (('yacs.config CfgNode', True), ('omegaconf.dictconfig DictConfig', False),
                           ('mmengine.logging.history_buffer HistoryBuffer', False)):
        new = b'c' + name.replace(' ', '\n').encode() + b'\n)\x81'
        fill = b'X\x02\x00\x00\x00lrK\x01s' if by_items else b'}X\x02\x00\x00\x00lrK\x01sb'
        write_pickle(tmp_path / 'a.pth', b'\x80\x02}X\x06\x00\x00\x00config' + new + fill + b's.')
        config = read_checkpoint(tmp_path / 'a.pth')['config']
        assert (config if by_items else vars(config)) == {'lr': 1}


def test_a_stand_in_does_nothing(tmp_path):
    """getattr of a pickle is not Python's, so it reaches no other function."""
    call = b'\x80\x02c__builtin__\ngetattr\ncargparse\nNamespace\nX\x08\x00\x00\x00__init__\x86R.'
    write_pickle(tmp_path / 'a.pth', call)
    with pytest.raises(UserError, match='holds a NoneType'):
        read_checkpoint(tmp_path / 'a.pth')
    assert pickle.loads(call) is argparse.Namespace.__init__


def test_bytes_never_become_addresses_of_objects(tmp_path):
    """numpy takes bytes for addresses if a pickle's dtype says that it holds none; those here are null."""
    dtype = (b'cnumpy\ndtype\nX\x01\x00\x00\x00O\x89\x88\x87R'
             b'(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb')
    no_address = b'c_codecs\nencode\nX\x08\x00\x00\x00' + bytes(8) + b'X\x06\x00\x00\x00latin1\x86R'
    array = (b'cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85X\x01\x00\x00\x00b\x87R'
             b'(K\x01K\x01\x85' + dtype + b'\x89' + no_address + b'tb')
    write_pickle(tmp_path / 'a.pth', b'\x80\x02}X\x01\x00\x00\x00a' + array + b's.')
    assert read_checkpoint(tmp_path / 'a.pth')['a'].size == 0


def test_what_is_called_cannot_take_forever(tmp_path):
    """The text of nested tuples, and the list of an expanded tensor, can be endless."""
    for name in ('torch.torch_version\nTorchVersion', 'collections\ndeque'):
        write_pickle(tmp_path / 'a.pth', b'\x80\x02}X\x01\x00\x00\x00ac' + name.encode() + b'\n}\x85Rs.')
        assert read_checkpoint(tmp_path / 'a.pth')['a'] in ('', [])


# --- Files of other kinds ---------------------------------------------------------------------------------------------

def test_files_of_other_kinds_are_named(tmp_path):
    np.savez(tmp_path / 'jax.npz', a=np.zeros(2))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / 'script.pt')
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / 'program.pt2')
    (tmp_path / 'keras.h5').write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(100))
    (tmp_path / 'packed.gz').write_bytes(b'\x1f\x8b' + bytes(100))
    for name, start in (('flax.msgpack', b'\x81\xa6params'), ('wide.msgpack', b'\xde\0\x14\xd9\x2fbackbone')):
        (tmp_path / name).write_bytes(start + bytes(100))
    (tmp_path / '__0_0.distcp').write_bytes(b'PK\x03\x04' + bytes(100))
    (tmp_path / 'sharded').mkdir()
    (tmp_path / 'sharded/.metadata').write_bytes(b'x')
    for name, said in (('jax.npz', 'numpy arrays'), ('script.pt', 'TorchScript'), ('program.pt2', 'exported program'),
                       ('keras.h5', 'HDF5'), ('packed.gz', 'gzip'), ('flax.msgpack', 'msgpack'),
                       ('wide.msgpack', 'msgpack'), ('__0_0.distcp', 'dcp_to_torch'),
                       ('sharded', 'dcp_to_torch'), ('sharded/.metadata', 'dcp_to_torch')):
        with pytest.raises(UserError, match=said) as caught:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(caught.value) and 'damaged' not in str(caught.value)


def test_one_share_of_the_weights_is_no_model(state, model, tmp_path):
    """A DTensor claims the shape of the whole, and holds one process's part."""
    from torch.distributed.tensor import DTensor  # noqa: F401, so that torch reads such tensors

    class Share:
        placements = ('Shard(dim=0)',)
        shape, dtype, ndim = torch.Size([10, 2]), torch.float32, 2

        def to_local(self):
            return torch.zeros(5, 2)

    from models.weights.formats import _checked
    with pytest.raises(UserError, match="one process's share of the weights.*full_state_dict=True"):
        _checked('head.weight', Share())
    # Where torch has not imported that class.
    write_pickle(tmp_path / 'a.pth', b'\x80\x02}X\x01\x00\x00\x00actorch.distributed._shard.sharded_tensor.api\n'
                                     b'ShardedTensor\n)\x81s.')
    with pytest.raises(UserError, match='ShardedTensor, of FSDP'):
        read_checkpoint(tmp_path / 'a.pth')
    empty = {key: torch.empty(0) for key in state}
    assert_refused(model, {'module': empty}, 'is empty, as in .* ZeRO-3; .*: python zero_to_fp32.py')


def save_zero(folder, state: dict, stage: int) -> None:
    """Write the files that DeepSpeed writes for two processes, with its names and entries."""
    step = folder / 'global_step1'
    step.mkdir(parents=True)
    (folder / 'latest').write_text(step.name)
    module = state if stage < 3 else {key: torch.empty(0) for key in state}
    common = {'ds_config': {'train_batch_size': 4}, 'ds_version': '0.19.8'}
    for rank in range(2 if stage == 3 else 1):
        name = f'zero_pp_rank_{rank}_mp_rank_00_model_states.pt' if stage == 3 else 'mp_rank_00_model_states.pt'
        torch.save({'module': module, 'optimizer': None, 'buffer_names': [], 'param_shapes': [{}], **common},
                   step / name)
    # {'optimizer_state_dict': {'loss_scaler': an object, 'zero_stage': an enum, 'base_optimizer_state': {},
    #                           'param_slice_mappings': a named tuple}, 'ds_version': '0.19.8'}
    text = lambda word: b'X' + len(word).to_bytes(4, 'little') + word  # noqa: E731
    write_pickle(step / 'zero_pp_rank_0_mp_rank_00_optim_states.pt', (
        b'\x80\x02}(' + text(b'optimizer_state_dict') + b'}(' + text(b'loss_scaler')
        + b'cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}' + text(b'cur_scale') + b'K\x01sb'
        + text(b'zero_stage') + b'cdeepspeed.runtime.zero.config\nZeroStageEnum\nK\x02\x85R'
        + text(b'base_optimizer_state') + b'}' + text(b'param_slice_mappings')
        + b'cdeepspeed.utils.tensor_fragment\nfragment_address\nK\x01K\x02\x86\x81u'
        + text(b'ds_version') + text(b'0.19.8') + b'u.'))


def test_files_of_deepspeed_load_or_say_how(state, model, tmp_path):
    for stage in (2, 3):
        save_zero(tmp_path / f'zero{stage}', state, stage)
    for name in ('zero2', 'zero2/latest', 'zero2/global_step1', 'zero2/global_step1/mp_rank_00_model_states.pt'):
        load_weights(model, tmp_path / name)
        assert_loaded(model, state)
    optimizer = tmp_path / 'zero2/global_step1/zero_pp_rank_0_mp_rank_00_optim_states.pt'
    optimizer.rename(tmp_path / 'renamed.pt')
    for name, said in (('renamed.pt', "share of DeepSpeed's optimizer, and no model.*mp_rank_00_model_states.pt"),
                       ('zero3', 'is empty.*ZeRO-3.*: python zero_to_fp32.py . weights')):
        with pytest.raises(UserError, match=said) as caught:
            load_weights(model, tmp_path / name)
        assert '\n' not in str(caught.value)
    (tmp_path / 'zero2/global_step1/mp_rank_01_model_states.pt').write_bytes(b'')
    with pytest.raises(UserError, match='several tensor-parallel processes .*save_16bit_model'):
        load_weights(model, tmp_path / 'zero2')


def test_safetensors_of_paddlepaddle_are_transposed(state, model, tmp_path):
    """PaddlePaddle 3.3 writes its [in, out] matrices into safetensors; the square ones would load silently."""
    theirs = {f'backbone.{key}'.replace('backbone.head.', 'head.fc_cls.'):
              (value.T if value.ndim == 2 and key.endswith('.weight') else value).contiguous()
              for key, value in state.items()}
    safetensors.torch.save_file(theirs, tmp_path / 'a.safetensors')
    report = load_weights(model, tmp_path / 'a.safetensors')
    assert_loaded(model, state)
    assert report.format == 'PASSL' and 'blocks.0.attn.proj.weight' in report.transposed


def test_any_part_of_a_model_tells_how_paddlepaddle_stores_it(state):
    from models.weights.formats import extract
    for part in ('tokens_to_token.', 'blocks.0.mlp.', 'blocks.0.attn.', 'head.'):
        own = {key: value for key, value in state.items() if key.startswith((part, 'cls_token'))}
        theirs = {key: value.T if value.ndim == 2 and key.endswith('.weight') else value for key, value in own.items()}
        assert extract(own).transposed == ()
        given = extract(theirs)
        assert given.format == 'PaddlePaddle' and all(torch.equal(given.state[key], own[key]) for key in own), part


# --- Options of other programs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('args', [
    {'model_kwargs': {'img_size': 32}}, {'input_size': [3, 32, 32]}, {'input_size': 32, 'interpolation': 'lanczos'}])
def test_options_that_another_program_recorded_keep_nothing_out(args, image_folder, tmp_path):
    state = timm.create_model('t2t_vit_7', num_classes=3, img_size=32).state_dict()
    torch.save(state, tmp_path / 'plain.pth')
    recorded = {'model': 't2t_vit_7', 'img_size': None, 'interpolation': '', **args}
    torch.save({'epoch': 3, 'arch': 't2t_vit_7', 'state_dict': state, 'args': argparse.Namespace(**recorded)},
               tmp_path / 'timm.pth')
    losses = []
    for name in ('plain', 'timm'):
        out = succeeded(run_script('validate.py', image_folder, '--checkpoint', f'{name}.pth', '--device', 'cpu', '-j',
                                   '0', '--results-file', name, cwd=tmp_path))
        losses.append(json.loads((tmp_path / f'{name}.json').read_text())['loss'])
    assert losses[0] == losses[1]
    assert ('lanczos' in out) == ('interpolation' in args)
