"""visualize.py from the command line: each image gets its pictures, and what cannot be shown is said in a line."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visualize as script
from figures import files
from models import create_model
from tests.conftest import run_script, succeeded, write_checkpoint
from utils.errors import UserError

KWARGS = {'embed_dim': 32, 'depth': 2, 'num_heads': 2}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A small model's checkpoint, and images of which two have the same name and one is a wide one."""
    root = tmp_path_factory.mktemp('visualize')
    torch.manual_seed(0)
    model = create_model('t2t_vit_7', num_classes=2, img_size=32, **KWARGS)
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'classes': ['ant', 'bee'],
                      'args': {'model_kwargs': [f'{name}={value}' for name, value in KWARGS.items()], 'img_size': 32}},
                     root / 'small.pth.tar')
    rng = np.random.default_rng(0)
    for name, size in (('one/cat.png', (40, 40)), ('two/cat.png', (40, 40)), ('wide/dog $1.png', (24, 64))):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)
    return root


@pytest.fixture(scope='module')
def run(folder):
    torch.manual_seed(0)
    write_checkpoint({'arch': 'resnet18', 'state_dict': create_model('resnet18', num_classes=2).state_dict()},
                     folder / 'resnet.pth.tar')
    return run_script('visualize.py', folder / 'one' / 'cat.png', '--checkpoint', folder / 'small.pth.tar', '--beside',
                      f'resnet18={folder / "resnet.pth.tar"}', f't2t_vit_7={folder / "small.pth.tar"}', '-j', '0',
                      cwd=folder)


def test_an_image_gets_every_picture(run, folder):
    out = succeeded(run)
    written = sorted((folder / 'output' / 'visualize').iterdir())
    assert [file.name for file in written] == [
        f'cat-t2t_vit_7-small-{name}.png' for name in ('attention', 'features', 'tokens')]
    for file in written:
        assert f'output/visualize/{file.name}\n' in out
        with Image.open(file) as picture:
            assert min(picture.size) > 400 and len(np.unique(np.asarray(picture.convert('L')))) > 50


def test_shares_of_all_models_are_printed(run):
    out = succeeded(run)
    assert 'Dead and saturated channels, judged by 1 image:' in out
    for title, layer, channels in (('t2t_vit_7 ', 'blocks.1', 32), ('resnet18 (resnet.pth.tar)', 'layer4', 512),
                                   ('t2t_vit_7 (small.pth.tar)', 'tokens_to_token.attention1', 64)):
        line, = (line for line in out.splitlines() if line.startswith(f'  {title}') and f' {layer} ' in line
                 and ('(' in title or '(' not in line))
        assert line.endswith(f'saturated of {channels} channels') and '% dead' in line


@pytest.fixture(scope='module')
def call(folder):
    """The script within this process, which saves the seconds that torch takes to start."""
    def call(*options, images=(folder / 'one' / 'cat.png',), checkpoint=folder / 'small.pth.tar'):
        with pytest.MonkeyPatch.context() as patch:
            argv = ['visualize.py', *images, '-j', '0', '--device', 'cpu', '-o', folder / 'called',
                    *options, '--checkpoint', checkpoint]
            patch.setattr('sys.argv', [str(word) for word in argv])
            patch.setattr('utils.runtime.setup_logging', lambda **_: None)
            script.main()
        return sorted(file.name for file in (folder / 'called').iterdir())
    return call


def test_images_of_the_same_name_have_pictures_of_their_own(call, folder):
    written = call('--figures', 'tokens', images=(folder / 'one' / 'cat.png', folder / 'two'))
    names = [f'{stem}-t2t_vit_7-small-tokens.png' for stem in ('cat', 'cat-2')]
    assert set(names) <= set(written)
    one, two = ((folder / 'called' / name).read_bytes() for name in names)
    assert one != two


def test_models_have_pictures_of_their_own(call, folder, tmp_path):
    run = tmp_path / 'mine'
    run.mkdir()
    (run / 'args.yaml').touch()
    (run / 'model_best.pth.tar').write_bytes((folder / 'small.pth.tar').read_bytes())
    written = call('--figures', 'tokens', checkpoint=run / 'model_best.pth.tar')
    assert 'cat-t2t_vit_7-mine-model_best-tokens.png' in written
    assert files.weights_name('vit_s_16', None) == 'vit_s_16'
    assert files.weights_name('t2t_vit_14', '/x/81.5_T2T_ViT_14.pth.tar') == 't2t_vit_14-81.5_T2T_ViT_14'


def test_a_picture_that_shows_something_else_is_kept(call, folder, tmp_path):
    """The same model and image with another class or size, and another model of the same name, have their own files."""
    def drawn(*options, checkpoint=folder / 'small.pth.tar'):
        call('--figures', 'attention', '-o', tmp_path, *options, checkpoint=checkpoint)
        return sorted(file.name for file in tmp_path.glob('*.png'))

    def content(number):
        return (tmp_path / f'cat-t2t_vit_7-small-attention{number}.png').read_bytes()

    drawn('--target-class', 'ant')
    first = content('')
    drawn('--target-class', 'bee')
    assert content('') == first != content('-2')
    assert len(drawn('--target-class', 'ant', '-b', '4')) == 2 and content('') == first  # the same again
    call('--figures', 'attention', '-o', tmp_path, '--target-class', 'ant',
         images=(folder / 'one' / 'cat.png', folder / 'wide'))
    assert len(list(tmp_path.glob('cat*.png'))) == 2 and content('') == first  # other images beside it
    (tmp_path / 'dog-1-t2t_vit_7-small-attention.png').unlink()
    assert len(drawn('--img-size', '48')) == 3 and content('') == first
    other = tmp_path / 'other' / 'small.pth.tar'
    other.parent.mkdir()
    other.write_bytes((folder / 'small.pth.tar').read_bytes())
    assert len(drawn('--target-class', 'ant', checkpoint=other)) == 4 and content('') == first


def test_the_class_to_explain_is_a_name_or_a_number():
    for text, number in (('ant', 0), ('bee', 1), ('1', 1), ('n02', 1), (None, None)):
        assert script.find_target(text, ['ant', 'bee'], ['n01', 'n02']) == number


def test_a_full_disk_leaves_the_earlier_picture(call, folder, tmp_path, monkeypatch):
    call('--figures', 'tokens', '-o', tmp_path)
    file, = tmp_path.iterdir()
    before = file.read_bytes()
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(UserError, match='cannot be written .No space'):
        call('--figures', 'tokens', '-o', tmp_path)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == before


@pytest.mark.parametrize('options, message', [
    (('--blocks', '3'), 'block 3 does not exist; the model has blocks 1 to 2'),
    (('--token', '0', '2'), r'token 0 2 does not exist; the last grid has rows 0 to 1 and columns 0 to 1'),
    (('--layers', 'block.1'), r"layer 'block.1' does not exist in model t2t_vit_7; did you mean blocks\.1\?"),
    (('--beside', 'resnet81=pretrained'), "model 'resnet81' does not exist; did you mean resnet1"),
    (('--beside', 'resnet18'), r'--beside resnet18: which weights\? .*give resnet18=CHECKPOINT or resnet18=pretrained'),
    (('--target-class', 'be'), r"--target-class be: the model has no such class; did you mean bee\?; give .*'ant'"),
    (('--target-class', '2'), r'--target-class 2: the model has no such class.* or a number from 0 to 1'),
    (('--figures', 'tokens', '--target-class', 'ant'), '--target-class is for the figure attention'),
    (('--beside', 't2t_vit_7=nowhere.pth'), 'nowhere.pth'),
    (('--figures', 'atention'), "invalid choice: 'atention'"),
    (('--dataset', 'digits'), 'which images'),
    (('--output-dir', '/dev/null/x'), '--output-dir: /dev/null/x cannot be written'),
    (('--figures', 'tokens', '--layers', 'blocks.1'), '--layers is for the figure features, which is not among'),
    (('--figures', 'tokens', '--beside', 'resnet18=pretrained'), '--beside is for the figure features'),
    (('--figures', 'features', '--blocks', '1'), '--blocks is for the figure attention'),
    (('--figures', 'features', '--token', '0', '0'), '--token is for the figure attention or tokens'),
    (('--beside', 'vit_s_16=pretrained'), 'no weights of vit_s_16 were published'),
])
def test_mistakes_of_a_user_are_named(call, options, message):
    with pytest.raises(UserError, match=message):
        call(*options)


def test_a_model_without_attention_still_has_features(call, folder, caplog):
    torch.manual_seed(0)
    model = create_model('resnet18', num_classes=2)
    write_checkpoint({'arch': 'resnet18', 'state_dict': model.state_dict()}, folder / 'resnet.pth.tar')
    written = call(checkpoint=folder / 'resnet.pth.tar', images=(folder / 'wide' / 'dog $1.png',))
    assert [name for name in written if 'resnet18' in name] == ['dog-1-resnet18-resnet-features.png']
    lines = [record.getMessage() for record in caplog.records if 'no picture of' in record.getMessage()]
    assert lines[0].startswith('no picture of attention: model resnet18 has no attention')
    assert lines[1].startswith('no picture of tokens: model resnet18 has no tokens-to-token module')
    with pytest.raises(UserError, match='model resnet18 can show none of these: attention'):
        call('--figures', 'attention', checkpoint=folder / 'resnet.pth.tar')


def test_a_few_images_of_a_data_set_at_another_size(call, tmp_path):
    classes = tmp_path / 'classes.txt'
    classes.write_text('0\n1\n')
    written = call('--dataset', 'digits', '--img-size', '36x52', '--figures', 'tokens', '--only-classes', '0-1',
                   '--samples', '2', '--class-map', classes, images=())
    digits = [name for name in written if name.startswith('digits')]
    assert digits == [f'digits-val-{number}-t2t_vit_7-small-tokens.png' for number in (175, 6)]


def test_an_image_that_cannot_be_decoded_is_left_out(call, folder, capsys):
    broken = folder / 'broken.png'
    broken.write_bytes(b'no image')
    written = call('--figures', 'tokens', images=(broken, folder / 'wide', broken))
    assert 'dog-1-t2t_vit_7-small-tokens.png' in written and not any('broken' in name for name in written)
    assert capsys.readouterr().out.endswith('dog-1-t2t_vit_7-small-tokens.png\n2 of 3 images left out\n')
    with pytest.raises(UserError, match='none of 1 images could be read; the first: .*broken.png'):
        call('--figures', 'tokens', images=(broken,))
    with pytest.raises(UserError, match='broken.png'):
        call('--figures', 'tokens', '--max-bad-val-images', '0', images=(broken, folder / 'wide'))


def test_a_picture_that_cannot_be_written_is_named(call, folder):
    (folder / 'called/cat-t2t_vit_7-small-features.png').mkdir(parents=True)
    with pytest.raises(UserError, match=r'--output-dir: .*cat-t2t_vit_7-small-features.png cannot be written \(Is a'):
        call('--figures', 'features')


def test_layers_that_give_no_maps_leave_the_other_pictures(call, folder, monkeypatch, caplog):
    monkeypatch.setattr('figures.explain.default_layers', lambda model: ['head'])
    Image.new('RGB', (40, 40)).save(folder / 'grey.png')
    written = call('--figures', 'features', 'tokens', images=(folder / 'grey.png',))
    assert [name for name in written if name.startswith('grey')] == ['grey-t2t_vit_7-small-tokens.png']
    lines = [record.getMessage() for record in caplog.records if 'no picture of' in record.getMessage()]
    assert lines == ["no picture of features: layer 'head' of model t2t_vit_7 gives no map of the image but [1, 2]; "
                     'name other layers (--layers)']


def test_images_in_class_folders_are_named_with_their_class(call, folder, tmp_path):
    for name in ('ant', 'bee'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (40, 40)).save(tmp_path / 'val' / name / '1.png')
    written = call('--data', tmp_path, '--figures', 'tokens', images=())
    assert {f'{name}-1-t2t_vit_7-small-tokens.png' for name in ('ant', 'bee')} <= set(written)


def test_names_of_files():
    assert files.file_names([
        '/a/cat.jpg', 'b/cat.png', 'cat-2.jpg', 'digits val[7]', '/x/ü /é$.jpg', '###.jpg', 'a[1]/dog.jpg', 'c/cat.png',
    ]) == ['cat', 'cat-2', 'cat-2-2', 'digits-val-7', 'é', 'image', 'dog', 'cat-3']
    assert files.file_names(['val/ant/1.png', 'val/bee/1.png', 'cifar10 test[2]'], in_class_folders=True) == [
        'ant-1', 'bee-1', 'cifar10-test-2']
    long, same = files.file_names([f'{"a" * 80}{"é" * 60}.jpg'] * 2)
    assert long == 'a' * 80 + 'é' * 15 and same == f'{long}-2'
