"""Options: published names and defaults, recipes under the command line, and the answers to mistakes."""
import re
from pathlib import Path

import pytest
import yaml

from options.checks import resolve_num_classes, share_global_batch
from options.elsewhere import ELSEWHERE
from options.parser import Options, parse_options
from options.scripts import SCRIPTS
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

# Names and defaults of the authors' main.py, without removed options. num_classes was 1000, but now follows from the
# data set; the learning rate schedule 'plateau' was removed. model_ema_decay was 0.99996, now that of runs long enough
# for it.
PUBLISHED = dict(
    pretrained=False, initial_checkpoint='', resume='', gp=None, img_size=224, crop_pct=None, mean=None, std=None,
    interpolation='', batch_size=64, validation_batch_size_multiplier=1, opt='adamw', opt_eps=None, opt_betas=None,
    momentum=0.9, weight_decay=0.05, clip_grad=None, sched='cosine', lr=5e-4, lr_noise=None, lr_noise_pct=0.67,
    lr_noise_std=1.0, lr_cycle_mul=1.0, lr_cycle_limit=1, warmup_lr=1e-6, min_lr=1e-5, epochs=300, start_epoch=None,
    decay_epochs=30, warmup_epochs=10, cooldown_epochs=10, decay_rate=0.1, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3],
    hflip=0.5, vflip=0.0, color_jitter=0.4, aa='rand-m9-mstd0.5-inc1', aug_splits=0, jsd=False, reprob=0.25,
    remode='pixel', recount=1, resplit=False, mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0,
    mixup_switch_prob=0.5, mixup_mode='batch', mixup_off_epoch=0, smoothing=0.1, train_interpolation='random', drop=0.0,
    drop_path=0.1, drop_block=None, bn_momentum=None, bn_eps=None, sync_bn=False, dist_bn='', model_ema=True,
    model_ema_force_cpu=False, model_ema_decay=None, seed=42, log_interval=50, workers=8, save_images=False,
    amp=False, channels_last=False, eval_metric='top1', model='t2t_vit_14')


def parse(*argv, script='train') -> Options:
    return parse_options(SCRIPTS[script](), list(argv))


def test_published_defaults():
    args = parse('/data')
    assert {name: getattr(args, name) for name in PUBLISHED} == PUBLISHED
    assert args.aug and args.resume_opt and args.data == '/data'
    assert args.pin_mem, 'without it the host waits for every batch that a GPU gets'


@pytest.mark.parametrize('argv', [
    '/data --model t2t_vit_14 -b 64 --lr 5e-4 --weight-decay .05 --amp --img-size 224',
    '/data --model T2t_vit_14 -b 100 -vb 2 -j 4 --no-aug --no-resume-opt --recovery-interval 100 --dr 0.2',
    '/data --local_rank=3 --opt_betas 0.9 0.99 --warmup_lr=1e-5',
])
def test_published_command_lines(argv):
    assert parse(*argv.split()).data == '/data'


def test_transfer_and_validate_command_lines_as_published():
    command = ('--dataset cifar10 --model t2t_vit_19 --lr 0.05 --b 64 --num-classes 10 --img-size 224 '
               '--transfer-learning True --transfer-model path/to/checkpoint')
    args = parse(*command.split(), script='transfer')
    assert (args.batch_size, args.lr, args.transfer_learning, args.weight_decay, args.epochs) == (
        64, 0.05, True, 5e-4, 60)
    assert not parse('--transfer-learning', 'False', script='transfer').transfer_learning
    assert parse('--transfer-learning', script='transfer').transfer_learning
    for spelling in ('--eval_checkpoint', '--eval-checkpoint'):
        assert parse('/data', '-b', '100', spelling, 'x/y_z', script='validate').eval_checkpoint == 'x/y_z'


@pytest.mark.parametrize('script', ['train', 'transfer'])
def test_lengths_that_are_not_given_follow_from_the_epochs(script):
    def lengths(*options):
        args = parse('/data', *options, script=script)
        return args.warmup_epochs, args.cooldown_epochs

    if script == 'transfer':
        assert lengths('--epochs', '300') == (0, 0), 'as published'
        return
    for epochs, length in ((1000, 10), (300, 10), (100, 10), (99, 9), (30, 3), (10, 1), (9, 0), (1, 0)):
        assert lengths('--epochs', str(epochs)) == (length, length)
    assert lengths('--epochs', '1', '--warmup-epochs', '3', '--cooldown-epochs', '2') == (3, 2)
    assert lengths('-c', str(ROOT / 'configs/t2t_vit_14.yaml')) == (10, 10)


def test_what_is_given_to_transfer_says_what_is_meant(tmp_path):
    def meant(*options):
        args = parse(*map(str, options), script='transfer')
        return args.dataset, args.transfer_learning

    assert meant() == ('cifar10', False) and meant('/data/flowers') == ('folder', False)
    assert meant('/data/flowers', '--transfer-model', 'a.pth') == ('folder', True)
    assert meant('--transfer-model', 'a.pth', '--transfer-learning', 'False') == ('cifar10', False)
    assert meant('--pretrained') == ('cifar10', False) and meant('--transfer-learning') == ('cifar10', True)
    (tmp_path / 'cifar-10-batches-py').mkdir()
    assert meant(tmp_path) == ('cifar10', False) and meant(tmp_path, '--dataset', 'cifar100') == ('cifar100', False)
    assert meant('/data', '-c', ROOT / 'configs/cifar100_t2t_vit_14.yaml') == ('cifar100', True)


def test_options_are_read_only_and_plain():
    args = parse('/data', '--img-size', '192x256')
    with pytest.raises(AttributeError, match='read-only'):
        args.lr = 1.0
    assert args.img_size == (192, 256)
    assert args.as_dict()['img_size'] == '192x256'
    assert list(args.as_dict()) == sorted(args.as_dict())


def test_resolved_options_are_a_recipe_that_repeats_the_run(tmp_path):
    args = parse('/data', '-c', str(ROOT / 'configs/demo.yaml'), '--img-size', '32x64', '--opt-betas', '0.9', '0.99')
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args.as_dict()))
    assert parse('-c', str(tmp_path / 'args.yaml')).as_dict() == args.as_dict()


def test_a_run_with_a_global_batch_leaves_a_recipe_that_repeats_it(tmp_path):
    args = share_global_batch(parse('/data', '-b', '16', '--global-batch-size', '64'), 2)
    assert (args.batch_size, args.accum_steps) == (16, 2)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args.as_dict()))
    assert share_global_batch(parse('-c', str(tmp_path / 'args.yaml')), 2).as_dict() == args.as_dict()


def test_recipe_under_command_line(tmp_path):
    recipe = tmp_path / 'r.yaml'
    recipe.write_text('lr: 5e-4\nweight-decay: 1\nscale: [0.2, 1]\namp: true\nimg_size: 192x256\nclip_grad: null\n')
    args = parse('-c', str(recipe), '--lr', '1e-3', '/data')
    assert (args.lr, args.weight_decay, args.scale, args.amp, args.img_size) == (
        1e-3, 1.0, [0.2, 1.0], True, (192, 256))
    assert parse('-c', str(recipe), '--no-amp').amp is False


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.yaml')), ids=lambda p: p.stem)
def test_every_recipe_is_read_and_opens_with_its_command(path):
    lines = path.read_text().splitlines()
    head = '\n'.join(line for line in lines if line.startswith('#'))
    command = next(line for line in lines if f'configs/{path.name}' in line)
    assert 'distributed_train.sh' in command or 'transfer.py' in command
    assert 'Hardware:' in head and 'Expected:' in head
    script = 'transfer' if 'transfer.py' in command else 'train'
    args = parse('-c', str(path), script=script)
    assert args.model.startswith('t2t_vit')


@pytest.mark.parametrize(('text', 'said'), [
    ('learning_rate: 1', r"'learning_rate' is no option"),
    ('weigth_decay: 1', r'did you mean weight_decay\?'),
    ('gradient_accumulation_steps: 4', r"'gradient_accumulation_steps' is no option; here it is --accum-steps N"),
    ('lr: fast', r"lr: 'fast' is not a number"),
    ('epochs: 1.5', r'epochs: 1.5 is not an integer'),
    ('epochs: true', r'epochs: True is not an integer'),
    ('epochs: 0', r'epochs: 0 is too small: at least 1'),
    ('lr: .nan', r'lr: nan is too small'),
    ('amp: 1', r'amp: 1 is neither true nor false'),
    ('model: 14', r'model: 14 is not a string'),
    ('model: [a]', r"model: \['a'\] is not a string"),
    ('sched: cosin', r"'cosin' is not one of .*did you mean cosine\?"),
    ('scale: 0.5', r'scale: 0.5 is no list of two'),
    ('scale: [0.1, 0.5, 1]', r'no list of two'),
    ('scale: [a, b]', r"scale: 'a' is not a number"),
    ('img_size: 224x', r'is not an image size'),
    ('lr: 1\nlr: 2', r'line 2: .*twice'),
    ('lr: !!python/object:os.system x', r'not a recipe'),
    ('{', r'not a recipe'),
    ('- lr', r'a recipe is lines of'),
    ('apex_amp: true', r'apex_amp is gone: mixed precision is --amp'),
    ('tta: 3', r'tta is gone'),
    ('eval-checkpoint: x', r'eval-checkpoint is gone: .*validate.py'),
    ('help: true', r"'help' is no option"),
    ('config: other.yaml', r"'config' is no option"),
    ('lr: null', r'lr: None is not a number'),
    ('\x00', r'not a recipe'),
])
def test_bad_recipes(tmp_path, text, said):
    recipe = tmp_path / 'bad.yaml'
    recipe.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        parse('-c', str(recipe), '/data')
    assert str(recipe) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(('argv', 'said'), [
    ('/data --modle x', r'--modle: no such option; did you mean --model\?'),
    ('/data --learning_rate 1e-3', r'--learning-rate: no such option; here it is --lr LR'),
    ('/data --fp16', r'--fp16: no such option; here it is --amp --amp-dtype float16'),
    ('/data --per_device_train_batch_size=8', r'no such option; here it is --batch-size N'),
    ('/data --freeze-backbone', r'--freeze-backbone: no such option; here it is --freeze backbone'),
    ('/data --freeze head', r"--freeze: 'head' is no part of a model: give backbone, or a number of blocks"),
    ('/data --layer-decay 1.5', r'1.5 is too large: at most 1'),
    ('/data --wandb', r'--wandb: no such option; .*TensorBoard'),
    ('/data --transfer-model x', r'--transfer-model: no such option; it is one of transfer.py \('),
    ('/data --class-map x', r'--class-map: no such option; it is one of validate.py, predict.py'),
    ('/data --max_epochs 5', r'--max-epochs: no such option; here it is --epochs N'),
    ('/data --lr', r'--lr: expected one argument'),
    ('/data --lr fast', r"--lr: 'fast' is not a number"),
    ('/data --epochs 0', r'0 is too small: at least 1'),
    ('/data --drop-path 2', r'2 is too large: it must be less than 1'),
    ('/data --img-size big', r'is not an image size'),
    ('/data extra', r"'extra': no option takes this value"),
    ('/data --sched cosin', r"invalid choice: 'cosin'"),
    ('/data --apex-amp', r'--apex-amp is gone: mixed precision is --amp'),
    ('/data --num-gpu 4', r'--num-gpu is gone: .*distributed_train.sh'),
    ('/data --split-bn', r'--split-bn is gone'),
    ('/data --eval_checkpoint x', r'--eval-checkpoint is gone: .*validate.py'),
    ('-c nowhere.yaml', r'-c nowhere.yaml: No such file'),
])
def test_bad_command_lines(argv, said):
    with pytest.raises(UserError, match=said) as error:
        parse(*argv.split())
    assert '\n' not in str(error.value)


def test_number_of_classes_follows_the_data():
    assert resolve_num_classes(parse('/data'), ['a', 'b']) == 2
    assert resolve_num_classes(parse('/data', '--num-classes', '1000'), ['a', 'b']) == 1000
    with pytest.raises(UserError, match='--num-classes 1: the data set has 2 classes'):
        resolve_num_classes(parse('/data', '--num-classes', '1'), ['a', 'b'])


@pytest.mark.parametrize(('processes', 'batch_size', 'accum_steps'),
                         [(1, 64, 16), (8, 64, 2), (16, 64, 1), (32, 32, 1)])
def test_a_global_batch_is_shared_by_however_many_processes(processes, batch_size, accum_steps):
    args = share_global_batch(parse('/data', '-b', '64', '--global-batch-size', '1024'), processes)
    assert (args.batch_size, args.accum_steps) == (batch_size, accum_steps)
    assert args.batch_size * args.accum_steps * processes == args.global_batch_size


def test_a_global_batch_that_cannot_be_shared_is_an_error_with_numbers_that_fit():
    # The most that fit below -b 64 and divide 96.
    args = share_global_batch(parse('/data', '-b', '64', '--global-batch-size', '96'), 1)
    assert (args.batch_size, args.accum_steps) == (48, 2)
    # Two batches of 15 would be fewer; Mixup pairs images.
    args = share_global_batch(parse('/data', '-b', '16', '--global-batch-size', '30'), 1)
    assert (args.batch_size, args.accum_steps) == (10, 3)
    with pytest.raises(UserError, match='size 1024: 24 processes cannot share it; give 1008 or 1032, or start 1, 2, 4'):
        share_global_batch(parse('/data', '--global-batch-size', '1024'), 24)
    with pytest.raises(UserError, match='size 4: 8 processes cannot share it; give 8, or start 1, 2, 4 of them'):
        share_global_batch(parse('/data', '--global-batch-size', '4'), 8)
    with pytest.raises(UserError, match='--accum-steps 2 beside --global-batch-size 64'):
        share_global_batch(parse('/data', '--global-batch-size', '64', '--accum-steps', '2'), 1)
    args = parse('/data', '--accum-steps', '2')
    assert share_global_batch(args, 7) is args


def test_images_may_stand_on_both_sides_of_an_option():
    assert parse('a.png', '--checkpoint', 'c.pth', 'b.png', script='predict').images == ['a.png', 'b.png']


def test_every_option_that_stands_for_one_of_another_program_exists():
    known = {script: set(parser()._option_string_actions) for script, parser in SCRIPTS.items()}
    everywhere = set().union(*known.values())
    for theirs, text in ELSEWHERE.items():
        assert theirs not in known['train'], f'{theirs} is an option here'
        ours = set(re.findall(r'--[a-z][a-z-]*', text))
        assert ours <= everywhere, (theirs, ours - everywhere)
