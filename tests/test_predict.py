"""predict.py and what it is made of: every image gets its own classes, whatever else is wrong with the others."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import predict as script
from data import Numbered
from data.folders import ImageFiles
from data.pipeline import create_eval_loader, name_classes, open_images, resolve_input
from data.transforms import create_eval_transform
from engine.predict import predict
from models import create_model
from tests.conftest import run_script, succeeded, write_checkpoint, write_images
from tests.test_options import parse
from utils.distributed import World
from utils.errors import UserError
from utils.results import results_stem, write_results
from utils.runtime import Precision

CPU = torch.device('cpu')
ONE = World(rank=0, local_rank=0, size=1, device=CPU)
CLASSES = ['ant', 'bee', 'cat', '<dog>, "&"']


def predict_args(*argv):
    args = parse(*argv, '--pretrained', script='predict')
    return args.replacing(model='t2t_vit_7', img_size=32, workers=0, max_bad_val_images=5)


@pytest.fixture(scope='module')
def model():
    """A model that says different things of different images, which a new one does not."""
    torch.manual_seed(0)
    model = create_model('t2t_vit_7', num_classes=len(CLASSES), img_size=32).eval()
    with torch.no_grad():
        logits = model(torch.randn(32, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3))
        model.head.weight /= logits.std(0)[:, None] / 2
        model.head.bias -= 2 * logits.mean(0) / logits.std(0)
    return model


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Four images in a folder and one below, a damaged one, and what is no image of it."""
    root = tmp_path_factory.mktemp('photos')
    rng = np.random.default_rng(0)
    (root / 'below').mkdir()
    (root / '.thumbnails').mkdir()
    for name in ('b.jpg', 'a.png', 'ü,"\n.jpg', 'below/c.jpg', '.thumbnails/a.png', '.hidden.jpg'):
        blocks = np.kron(rng.integers(0, 255, (4, 4, 3)), np.ones((*rng.integers(8, 15, 2), 1)))
        Image.fromarray(blocks.astype(np.uint8)).save(root / name)
    (root / 'damaged.jpg').write_bytes((root / 'b.jpg').read_bytes()[:200])
    (root / 'notes.txt').write_text('no image')
    return root


def expected(model, path):
    """The probabilities of one image, the short way: no loader, no batch."""
    with Image.open(path) as image:
        pixels = create_eval_transform((32, 32), crop_pct=0.9, interpolation='bicubic')(image.convert('RGB'))
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std'))
    with torch.no_grad():
        return model(((pixels / 255 - mean) / std)[None])[0].softmax(0)


@pytest.fixture(scope='module')
def predicted(model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp('predicted')
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'classes': CLASSES,
                      'args': {'img_size': 32}}, folder / 'model.pth.tar')
    out = succeeded(run_script(
        'predict.py', photos, photos / 'b.jpg', '--checkpoint', folder / 'model.pth.tar', '-k', 9, '-b', 2, '-o',
        folder / 'said.csv', '--device', 'cpu', cwd=folder))
    with open(folder / 'said.csv', newline='', encoding='utf-8') as file:
        return out, json.loads((folder / 'said.json').read_text()), list(csv.DictReader(file))


def test_script_says_of_every_image_what_the_model_says(predicted, model, photos):
    _, record, rows = predicted
    assert record['data'] is None, 'images were given, and no data set'
    names = ['a.png', 'b.jpg', 'below/c.jpg', 'damaged.jpg', 'ü,"\n.jpg', 'b.jpg']
    assert [row['path'] for row in rows] == [entry['path'] for entry in record['images']]
    assert [row['path'] for row in rows] == [str(photos / name) for name in names]
    for entry, row in zip(record['images'], rows, strict=True):
        if 'damaged' in entry['path']:
            continue
        probabilities = expected(model, entry['path'])
        order = probabilities.argsort(descending=True).tolist()
        assert [guess['number'] for guess in entry['classes']] == order
        assert [guess['class'] for guess in entry['classes']] == [CLASSES[number] for number in order]
        for place, guess in enumerate(entry['classes'], start=1):
            assert guess['probability'] == pytest.approx(probabilities[guess['number']].item(), abs=2e-5)
            assert row[f'class_{place}'] == guess['class']
            assert float(row[f'probability_{place}']) == guess['probability']
    tops = {entry['classes'][0]['class'] for entry in record['images'] if 'classes' in entry}
    assert len(tops) > 1, 'a model that says the same of all images shows no mistake'


def test_script_leaves_out_a_damaged_image_and_says_so(predicted):
    out, record, rows = predicted
    assert 'warning: image' in out and 'damaged.jpg: ' in out and '5 images predicted, 1 left out' in out
    assert 'classes' not in record['images'][3] and 'restore or remove it' in record['images'][3]['error']
    assert rows[3]['class_1'] == '' and rows[3]['error'] == record['images'][3]['error']
    assert record['model'] == 't2t_vit_7' and record['img_size'] == [32, 32]


def test_script_fails_where_nothing_can_be_read_or_several_processes_are_started(photos, tmp_path, model, monkeypatch):
    write_checkpoint({'arch': 't2t_vit_7', 'state_dict': model.state_dict(), 'args': {'img_size': 32}}, tmp_path / 'm')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('utils.runtime.setup_logging', lambda **_: None)
    workers = []
    monkeypatch.setattr('data.pipeline.create_eval_loader',
                        lambda args, *rest: workers.append(args.workers) or create_eval_loader(args, *rest))
    command = ['predict.py', str(photos / 'damaged.jpg'), '--checkpoint', 'm', '--device', 'cpu']
    for argv, message in ((command, 'none of 1 images could be predicted'), (['predict.py'], 'which images?'),
                          ([*command, '--dataset', 'digits'], 'not both'), (command[:2], 'which weights?')):
        monkeypatch.setattr('sys.argv', argv)
        with pytest.raises(UserError, match=message):
            script.main()
    assert len(list((tmp_path / 'output/predict').glob('*-t2t_vit_7-32.json'))) == 1
    assert workers == [0], 'no processes are started for a single image'
    # A console that cannot show a name loses nothing of what was computed.
    monkeypatch.setattr('sys.argv', [*command, str(photos / 'b.jpg'), '-o', 'kept'])
    monkeypatch.setattr(script, 'print_table', lambda entries: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.main()
    assert len(json.loads((tmp_path / 'kept.json').read_text())['images']) == 2
    monkeypatch.setattr('sys.argv', command)
    monkeypatch.setattr('utils.runtime.init_process_group', lambda *_: World(rank=0, local_rank=0, size=2, device=CPU))
    with pytest.raises(UserError, match='predict.py is one process, and 2 were started'):
        script.main()


def test_of_a_data_set_the_true_class_is_told(model, tmp_path):
    root = write_images(tmp_path, {'val': 3})
    args = predict_args('--data', str(root), '--samples', '4')
    dataset = open_images(args, CLASSES, 4, ONE)
    assert [dataset.path(i).split('/')[-1] for i in range(4)] == ['ant_0.jpg', 'ant_2.jpg', 'bee_1.jpg', 'cat_0.jpg']
    predictions = run_predict(model, args, dataset)
    entries = script.describe_images(dataset, predictions, CLASSES, {})
    assert [entry['true_class'] for entry in entries] == ['ant', 'ant', 'bee', 'cat']
    assert list(script.as_row(entries[0], 4))[:3] == ['path', 'true_class', 'class_1']
    judged = [script.judge(entry) for entry in entries]
    assert [text == '  right' for text in judged] == (predictions.classes[:, 0] == dataset.targets).tolist()
    # The same number of classes may be the same classes; another one needs a class map, or a checkpoint that tells.
    with pytest.raises(UserError, match='the model has 5 classes, the data set 3, and nothing says which is which'):
        open_images(args, None, 5, ONE)
    assert len(open_images(args, None, 3, ONE)) == 4


def run_predict(model, args, dataset, **kwargs):
    loader, prepare = create_eval_loader(args, Numbered(dataset), resolve_input(args, model.pretrained_cfg), ONE)
    predictions = predict(model, loader, prepare, precision=Precision(CPU, enabled=False), **kwargs)
    loader.close()
    return predictions


@pytest.mark.parametrize('workers', [0, 2])
def test_predictions_are_numbered_without_the_bad_ones(model, photos, workers):
    args = predict_args(str(photos), '-b', '2').replacing(workers=workers)
    dataset = ImageFiles([photos])
    assert (dataset.targets == -1).all()
    model.train()
    predictions = run_predict(model, args, dataset, k=2)
    assert model.training and not model.eval().training
    assert predictions.indices.tolist() == [0, 1, 2, 4] and predictions.classes.shape == (4, 2)
    for row, index in enumerate(predictions.indices):
        values, classes = expected(model, dataset.path(index)).topk(2)
        assert predictions.classes[row].tolist() == classes.tolist()
        np.testing.assert_allclose(predictions.probabilities[row], values, atol=2e-5)
    nothing = run_predict(model, args, ImageFiles([photos / 'damaged.jpg']), k=2)
    assert nothing.classes.shape == nothing.probabilities.shape == (0, 2) and len(nothing.indices) == 0


def test_numbers_that_are_not_finite_are_an_error_of_the_image(model, photos):
    dataset = ImageFiles([photos / 'a.png', photos / 'b.jpg'])
    predictions = run_predict(model, predict_args('x'), dataset, k=2)
    predictions.probabilities[0] = np.nan
    entries = script.describe_images(dataset, predictions, CLASSES, {})
    assert 'not finite' in entries[0]['error'] and 'classes' not in entries[0] and 'classes' in entries[1]


def test_files_that_are_not_there_and_folders_without_images(tmp_path):
    (tmp_path / 'empty').mkdir()
    for path, message in (('none.jpg', 'does not exist'), ('empty', 'holds no images')):
        with pytest.raises(UserError, match=message):
            ImageFiles([tmp_path / path])


def test_results_are_strict_json_and_plain_csv(tmp_path):
    path = os.fsdecode(b'caf\xe9.jpg')  # Latin-1, as of old disks
    write_results(tmp_path / 'new' / 'r', {'loss': float('nan'), 'images': [{'p': float('inf')}]},
                  [{'path': path, 'p': float('nan')}], '-o')
    assert json.loads((tmp_path / 'new/r.json').read_text()) == {'loss': None, 'images': [{'p': None}]}
    assert (tmp_path / 'new/r.csv').read_bytes() == b'path,p\r\ncaf\xe9.jpg,\r\n'


def test_results_go_into_a_folder_that_is_given(tmp_path):
    args = predict_args('x')
    (tmp_path / 'there').mkdir()
    for given in (f'{tmp_path}/there', f'{tmp_path}/there/', f'{tmp_path}/new/'):
        stem = results_stem(args, given, '-o', 'predict')
        assert str(stem.parent) == given.rstrip('/') and stem.name.endswith('-t2t_vit_7-32')
    for given in ('new', 'new.json', 'new.csv'):
        assert results_stem(args, f'{tmp_path}/{given}', '-o', 'predict') == tmp_path / 'new'


def test_table_says_names_that_are_no_text_and_one_image_in_singular(capsys):
    cafe = os.fsdecode(b'caf\xe9')  # Latin-1, as of old disks
    entries = [{'path': f'{cafe}\n/{i}', 'true_class': 'x\ny', 'classes': [
        {'class': cafe, 'number': 0, 'probability': 0.5}]} for i in range(21)]
    script.print_table(entries)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'caf? /0   caf? 50.0%  wrong: is x y' and lines[20] == '… and 1 more image'
    assert lines[21] == 'Most probable: caf? (21)'
    script.print_table(entries[:1])
    assert capsys.readouterr().out.splitlines()[1] == '1 image predicted, 0 of 1 right (0.0%)'


def test_many_images_are_summed_up(capsys):
    entries = [{'path': f'{i}.jpg', 'true_class': 'cat', 'classes': [
        {'class': 'cat' if i % 3 else 'dog', 'number': 0, 'probability': 0.5}]} for i in range(30)]
    script.print_table(entries)
    out = capsys.readouterr().out
    assert '19.jpg' in out and '20.jpg' not in out and '… and 10 more images' in out
    assert 'cat (20), dog (10)' in out and '20 of 30 right (66.7%)' in out


def test_names_of_classes(tmp_path):
    args = predict_args('x')
    names = name_classes(args, None, 1000)
    synsets = ImageNetInfo().label_names()
    assert names[:2] == ['tench', 'goldfish'] and len(set(names)) == 1000
    assert names[synsets.index('n02012849')] == 'crane (n02012849)'
    assert name_classes(args, synsets[5:7], 3) == [*names[5:7], 'class 2']
    assert name_classes(args, ['a, b', 'c'], 2) == ['a, b', 'c']
    assert name_classes(args, None, 2) == name_classes(args, ['a', 'b', 'c'], 2) == ['class 0', 'class 1']
    (tmp_path / 'map.txt').write_text('x\ny\n')
    mapped = args.replacing(class_map=str(tmp_path / 'map.txt'))
    assert name_classes(mapped, ['a', 'b'], 2) == ['x', 'y']
    with pytest.raises(UserError, match='names 2 classes, the model has 3'):
        name_classes(mapped, None, 3)
