"""Distillation: each loss against a hand computation, the teacher's own input, and exact resume beside a teacher."""
import copy
import hashlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.loss import SoftTargetCrossEntropy
from timm.models import save_for_hf
from torch import nn

from data.batch import BatchPreparer, Readjustment
from data.datasets import open_train_val
from data.pipeline import resolve_input
from engine.compile import compile_model
from engine.objective import Distillation, Objective, create_objective
from engine.optimizer import create_optimizer, param_groups
from engine.run import _report_differences, create_state
from engine.step import TrainingStep
from engine.teacher import LogitsAndFeatures, Teacher, create_teacher, projection_groups
from models import TrainedModel, check_teacher, create_model, open_teacher
from options.parser import parse_options
from options.scripts import train_parser
from tests.conftest import assert_same, run_script, succeeded, write_checkpoint
from tests.test_compile import graphs  # noqa: F401, a fixture
from utils.checkpoint_reader import read_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.fingerprint import fingerprint_of
from utils.runtime import Precision

CPU = torch.device('cpu')
ONE = World(rank=0, local_rank=0, size=1, device=CPU)
FLOAT32 = Precision(CPU, enabled=False)
TINY = dict(img_size=32, num_classes=3, embed_dim=32, depth=1, num_heads=2)


def unchanged(images):
    return images


def parse(*words):
    return parse_options(train_parser(), ['--device', 'cpu', *words])


def make(name='t2t_vit_7', seed=0, **changes) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(name, **{**(TINY if name.startswith('t2t') else {'num_classes': 3}), **changes})


def teacher_of(*words, student, model, precision=FLOAT32, world=ONE) -> Teacher:
    opened = TrainedModel(model.eval(), None, None)
    return create_teacher(parse('--teacher', 'it', *words), student, opened, unchanged, precision, world)


def batch(seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.randint(3, (count,), generator=generator)


# --- The losses, in float64 by numpy ----------------------------------------------------------------------------------

def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@pytest.mark.parametrize('is_mixed', [False, True], ids=['classes', 'mixed'])
@pytest.mark.parametrize('kind', ['soft', 'hard', 'feature'])
def test_the_loss_against_a_computation_by_hand(kind, is_mixed):
    student, model = make().eval(), make(seed=1, embed_dim=48)
    teacher = teacher_of('--distill', kind, student=student, model=model)
    images, labels = batch()
    targets = torch.rand(4, 3).softmax(1) if is_mixed else labels
    objective = Distillation(student, SoftTargetCrossEntropy() if is_mixed else nn.CrossEntropyLoss(), teacher,
                             temperature=3., weight=0.3)
    found = objective(images, (targets, teacher(images))).item()

    with torch.no_grad():
        z, t = student(images).double().numpy(), model(images).double().numpy()
        f, g = (one.forward_head(one.forward_features(images), pre_logits=True).double().numpy()
                for one in (student, model))
    p = targets.double().numpy() if is_mixed else np.eye(3)[labels]
    base = -(p * log_softmax(z)).sum(1).mean()
    if kind == 'soft':
        ours, theirs = log_softmax(z / 3), log_softmax(t / 3)
        expected = 0.7 * base + 0.3 * 9 * (np.exp(theirs) * (theirs - ours)).sum(1).mean()
    elif kind == 'hard':
        expected = 0.7 * base - 0.3 * log_softmax(z)[range(4), t.argmax(1)].mean()
    else:
        weight, bias = (value.detach().double().numpy() for value in teacher.projection.parameters())
        assert weight.shape == (48, 32)
        expected = base + 0.3 * ((f @ weight.T + bias - g) ** 2).mean()
    assert found == pytest.approx(expected, rel=1e-5)


def test_features_of_equal_width_have_no_projection_and_the_model_runs_once():
    student = make()
    teacher = teacher_of('--distill', 'feature', student=student, model=make(seed=1))
    assert teacher.projection is None and projection_groups(teacher, 0.05) == []
    calls = []
    student.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    objective = create_objective(parse('--teacher', 'it', '--distill', 'feature'), student, soft_targets=False,
                                 teacher=teacher)
    objective(batch()[0], (batch()[1], teacher(batch()[0]))).backward()
    assert len(calls) == 1
    names = [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    assert len(names) == len(list(student.parameters())), 'and nothing of the teacher'
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_options_choose_the_loss():
    student = make()
    for words, expected in (((), ('soft', 1, 0.5)), (('--distill-temperature', '3'), ('soft', 3, 0.5)),
                            (('--distill', 'hard', '--distill-weight', '0'), ('hard', 1, 0))):
        teacher = teacher_of(*words, student=student, model=make(seed=1))
        made = create_objective(parse('--teacher', 'it', *words), student, soft_targets=False, teacher=teacher)
        assert (made.kind, made.temperature, made.weight) == expected
    assert type(create_objective(parse(), student, soft_targets=False)) is Objective


def test_an_auxiliary_head_learns_too():
    student = make(aux_head=True)
    for kind in ('hard', 'feature'):
        teacher = teacher_of('--distill', kind, student=student, model=make(seed=1, embed_dim=48))
        objective = Distillation(student, nn.CrossEntropyLoss(), teacher, temperature=1., weight=0.5)
        objective(batch()[0], (batch()[1], teacher(batch()[0]))).backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())
        objective.zero_grad(set_to_none=True)


# --- What the teacher sees --------------------------------------------------------------------------------------------

HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def smooth_images(size: int) -> torch.Tensor:
    """uint8 [2, 3, size, size] without edges, where bicubic would overshoot the levels."""
    y, x = np.mgrid[:size, :size] / size
    pixels = np.stack([[120 + 90 * np.sin(3 * x + k + i) * np.cos(2 * y - k) for k in range(3)] for i in range(2)])
    return torch.from_numpy(pixels.round().astype(np.uint8))


def test_a_teacher_of_the_same_input_gets_the_very_images():
    images = BatchPreparer(CPU, **IMAGENET)(smooth_images(32), torch.zeros(2))[0]
    same = Readjustment(CPU, **IMAGENET, other_mean=IMAGENET['mean'], other_std=list(IMAGENET['std']),
                        other_size=(32, 32))
    assert same(images) is images


@pytest.mark.parametrize('size', [(32, 32), (16, 20), (48, 48)])
def test_a_teacher_gets_images_as_its_own_evaluation_prepares_them(size):
    """PIL resizes them in uint8, timm's preparer normalises them."""
    pixels = smooth_images(32)
    images = BatchPreparer(CPU, **IMAGENET)(pixels, torch.zeros(2))[0]
    found = Readjustment(CPU, **IMAGENET, other_mean=HALF['mean'], other_std=HALF['std'], other_size=size)(images)
    resized = np.stack([np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).resize(
        size[::-1], Image.Resampling.BICUBIC)) for one in pixels])
    expected = BatchPreparer(CPU, **HALF)(torch.from_numpy(resized).permute(0, 3, 1, 2), torch.zeros(2))[0]
    rounding = 1e-5 if size == (32, 32) else 1.5 / 255 / 0.5  # PIL rounds twice
    torch.testing.assert_close(found, expected, atol=rounding, rtol=0)


def save_model(path, model, **entries):
    """As a run saves it."""
    write_checkpoint({'version': 2, 'state_dict': model.state_dict(), 'classes': ['ant', 'bee', 'cat'],
                      'arch': 't2t_vit_7', **entries}, path)
    return str(path)


RECORDED = {'img_size': 48, 'mean': [0.5], 'std': [0.5], 'model_kwargs': ['embed_dim=48', 'depth=1', 'num_heads=2']}


def test_the_teachers_checkpoint_alone_says_what_it_is(tmp_path):
    """Its input, not the student's; and the student draws the same random numbers beside it."""
    path = save_model(tmp_path / 't.pth', make(img_size=48, embed_dim=48), args=RECORDED)
    args = parse('--teacher-checkpoint', path, '--img-size', '32', '--mean', '0.1', '--std', '0.2', '--gp', 'avg',
                 '--model', 't2t_vit_14', '--model-kwargs', 'aux_head=True')
    before = torch.get_rng_state()
    opened = open_teacher(args, ['ant', 'bee', 'cat'], 3, ONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert not opened.model.training and opened.model.global_pool == 'token' and opened.model.aux_head is None
    config = resolve_input(opened.args, opened.model.pretrained_cfg)
    assert (config.img_size, config.mean, config.std) == ((48, 48), (0.5,) * 3, (0.5,) * 3)
    smaller = open_teacher(args.replacing(teacher_img_size=(32, 64)), ['ant', 'bee', 'cat'], 3, ONE)
    assert smaller.args.img_size == (32, 64) and smaller.model.grid_size == (2, 4)
    assert open_teacher(parse(), ['ant'], 1, ONE) is None


def test_weights_without_a_classifier_teach_features(tmp_path):
    path = save_model(tmp_path / 't.pth', make(num_classes=0), classes=[],
                      args={**RECORDED, 'model_kwargs': ['embed_dim=32', 'depth=1', 'num_heads=2'], 'img_size': 32})
    opened = open_teacher(parse('--teacher-checkpoint', path, '--distill', 'feature'), list('abcde'), 5, ONE)
    student = make(num_classes=5)
    teacher = create_teacher(parse('--teacher-checkpoint', path, '--distill', 'feature'), student, opened, unchanged,
                             FLOAT32, ONE)
    assert teacher(batch()[0]).shape == (4, 32)
    with pytest.raises(UserError, match='teacher: .*holds no classifier'):
        open_teacher(parse('--teacher-checkpoint', path), list('abcde'), 5, ONE)


# --- A teacher beside training ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['soft', 'feature'])
def test_a_step_changes_the_student_and_its_projection_and_no_byte_of_the_teacher(kind):
    """Its batch norms and dropout stay those of an evaluation, in the accumulated batches of bfloat16 too."""
    args = parse('--teacher', 'it', '--distill', kind, '--model-ema', '--accum-steps', '2', '--lr', '0.1')
    precision = Precision(CPU, enabled=True)
    student, model = make(), make('test_resnet', drop_rate=0.5)
    opened = TrainedModel(model.eval(), None, None)
    teacher = create_teacher(args, student, opened, unchanged, precision, ONE)
    before, fingerprint = copy.deepcopy(model.state_dict()), teacher.fingerprint
    groups = param_groups(student, args.weight_decay) + projection_groups(teacher, args.weight_decay)
    assert {group['name']: (len(group['params']), group['weight_decay']) for group in groups[2:]} == (
        {'projection, decayed': (1, 0.05), 'projection, not decayed': (1, 0)} if kind == 'feature' else {})
    state = create_state(args, student, create_optimizer(groups, args), precision, ['a', 'b', 'c'], ONE, teacher)
    learned = copy.deepcopy(student.state_dict())
    projection = copy.deepcopy(teacher.projection)
    objective = create_objective(args, student, soft_targets=False, teacher=teacher).train()
    seen = []
    with torch.no_grad(), precision.autocast():
        expected = LogitsAndFeatures(model)(batch()[0])[kind == 'feature'].float()
    objective.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][1]))
    TrainingStep(state, objective, prepare=lambda *both: both, precision=precision, args=args)(iter([batch()] * 2))
    assert len(seen) == 2 and torch.equal(seen[0], expected) and torch.equal(seen[1], expected)
    assert_same(dict(before), dict(model.state_dict()))
    assert fingerprint_of(model.state_dict()) == fingerprint
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = {name for name, parameter in student.named_parameters()}
    assert not [name for name in trained if torch.equal(learned[name], student.state_dict()[name])]
    if kind == 'feature':
        for one, other in zip(projection.parameters(), teacher.projection.parameters(), strict=True):
            assert not torch.equal(one, other)
    saved = state.state_dict()
    sizes = {tuple(value.shape) for value in (saved['projection'] or {}).values()}
    assert saved['teacher'] == fingerprint and sizes == ({(96, 32), (96,)} if kind == 'feature' else set())
    assert saved['state_dict'].keys() == saved['state_dict_ema'].keys() == make().state_dict().keys()


def test_the_fingerprint_is_of_every_name_and_number():
    model = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).to(torch.bfloat16)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(bytes(value.flatten().view(torch.uint8).tolist()))
    assert fingerprint_of(model.state_dict()) == digest.hexdigest()
    other = copy.deepcopy(model)
    other[1].num_batches_tracked += 1
    assert fingerprint_of(other.state_dict()) != fingerprint_of(model.state_dict())


class Plain(nn.Module):
    """A model without blocks."""
    num_features = 8

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 3)

    def forward_features(self, images):
        return self.body(images).relu()

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def test_student_and_teacher_are_compiled_as_they_are_called(graphs):  # noqa: F811
    """For features that is another pass than that for logits."""
    losses = []
    for compiled in ('', 'model'):
        words = ('--distill', 'feature', '--compile', compiled)
        torch.manual_seed(0)
        student = Plain()
        teacher = teacher_of(*words, student=student, model=Plain())
        objective = create_objective(parse('--teacher', 'it', *words), student, soft_targets=False, teacher=teacher)
        compile_model(student, compiled, objective.model)
        assert not graphs
        losses.append(objective(batch()[0], (batch()[1], teacher(batch()[0]))).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(graphs) == 2


def test_a_teacher_without_blocks_is_compiled_as_a_whole(monkeypatch):
    compiled = []
    monkeypatch.setattr('engine.compile.check_compiler', lambda: None)
    monkeypatch.setattr(nn.Module, 'compile', lambda module, **_: compiled.append(type(module).__name__))
    for kind, model, expected in (('soft', Plain(), ['Plain']), ('feature', Plain(), ['LogitsAndFeatures']),
                                  ('feature', make(), ['TokensToToken', 'Block'])):
        teacher_of('--compile', 'blocks', '--distill', kind, student=make(), model=model)
        assert compiled == expected
        compiled.clear()


def test_a_student_agrees_more_with_the_teacher_that_it_learns_from():
    """A teacher that was trained on digits, with the targets of half the images wrong in a way that only it knows."""
    train, val = open_train_val('digits', '', only_classes='0-2', image_size=32)

    def tensors(dataset, step):
        pixels = np.stack([np.asarray(dataset.image(index).convert('L')) for index in range(0, len(dataset), step)])
        return (torch.from_numpy(pixels)[:, None] / 255.).expand(-1, 3, -1, -1), torch.from_numpy(
            dataset.targets[::step].copy()).long()

    (images, labels), (held_out, _) = tensors(train, 3), tensors(val, 1)

    def classifier(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 3))

    def fit(model, objective, teacher=None):
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            objective(images, (labels, teacher(images)) if teacher else labels).backward()
            optimizer.step()
        return model.eval()

    model = classifier(0)
    odd = torch.where(images.mean((1, 2, 3)) > images.mean(), (labels + 1) % 3, labels)
    fit(model, lambda x, _: nn.functional.cross_entropy(model(x), odd))
    teacher = Teacher(model, kind='soft', readjust=unchanged, precision=FLOAT32)
    alone, taught = classifier(1), classifier(1)
    fit(alone, Objective(alone, nn.CrossEntropyLoss()))
    fit(taught, Distillation(taught, nn.CrossEntropyLoss(), teacher, temperature=2., weight=0.9), teacher)
    with torch.no_grad():
        answers = [one(held_out).argmax(1) for one in (model, alone, taught)]
    of_alone, of_taught = ((answers[0] == answer).float().mean().item() for answer in answers[1:])
    assert of_taught > of_alone + 0.2 and of_taught > 0.75, (of_alone, of_taught)


# --- Mistakes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('words', 'message'), [
    ('--distill hard', '--distill hard needs a teacher; give --teacher MODEL'),
    ('--teacher-img-size 32', '--teacher-img-size 32 needs a teacher'),
    ('--distill-weight 0', '--distill-weight 0.0 needs a teacher'),
    ('--teacher resnet18 --distill-weight 1.5', '--distill-weight 1.5: the teacher.s share of the loss is at most 1'),
    ('--teacher resnet18 --distill hard --distill-temperature 3', '--distill-temperature 3.0 with --distill hard'),
    ('--teacher resnet81', "teacher: model 'resnet81' does not exist; did you mean"),
    ('--teacher t2t_vit_t_7x', "teacher: model 't2t_vit_t_7x' does not exist"),
    ('--teacher vit_s_16', '--teacher vit_s_16: no weights of it were published; give --teacher-checkpoint PATH'),
])
def test_what_cannot_teach_is_said_before_data_is_read(words, message):
    with pytest.raises(UserError, match=message):
        check_teacher(parse(*words.split()))


def test_token_labels_beside_a_teacher_are_refused():
    with pytest.raises(UserError, match='--token-labels dir beside a teacher'):
        check_teacher(parse('--teacher', 'resnet18').replacing(token_labels='dir'))


@pytest.mark.parametrize(('classes', 'num_classes', 'message'), [
    (['ant', 'bee'], 2, 'it has 3 classes, the model 2; give a teacher of these classes, or learn from its features'),
    (['ant', 'bee', 'cow'], 3, "class 2 is 'cat', in the data set it is 'cow'"),
    (['ant', 'bee'], 3, 'names 3 classes, the data set 2'),
])
def test_a_teacher_of_other_classes_is_refused_but_for_its_features(classes, num_classes, message, tmp_path):
    path = save_model(tmp_path / 't.pth', make(img_size=48, embed_dim=48), args=RECORDED)
    with pytest.raises(UserError, match=f'^teacher {path}: {message}'):
        open_teacher(parse('--teacher-checkpoint', path), classes, num_classes, ONE)
    assert open_teacher(parse('--teacher-checkpoint', path, '--distill', 'feature'), classes, num_classes, ONE)


def test_a_folder_of_timm_teaches_and_its_classes_without_names_must_be_all(tmp_path):
    save_for_hf(timm.create_model('resnet10t', num_classes=3), str(tmp_path), safe_serialization=True)
    args = parse('--teacher', f'local-dir:{tmp_path}')
    check_teacher(args)
    assert open_teacher(args, ['ant', 'bee', 'cat'], 3, ONE).model.num_classes == 3
    with pytest.raises(UserError, match='its 3 classes have no names, and the data set has 2'):
        open_teacher(args, ['ant', 'bee'], 3, ONE)


def test_features_that_do_not_learn_are_not_distilled():
    with pytest.raises(UserError, match='--distill feature with --freeze backbone'):
        check_teacher(parse('--teacher', 'resnet18', '--distill', 'feature', '--freeze', 'backbone'))


def test_another_model_than_that_of_the_weights_is_blamed_on_the_teacher(tmp_path):
    path = save_model(tmp_path / 't.pth', make(img_size=48, embed_dim=48), args=RECORDED)
    with pytest.raises(UserError, match='^teacher: .*do not fit t2t_vit_10.*; use --teacher '):
        open_teacher(parse('--teacher', 't2t_vit_10', '--teacher-checkpoint', path), ['ant', 'bee', 'cat'], 3, ONE)


# --- Whole runs -------------------------------------------------------------------------------------------------------

RUN = ('--model', 't2t_vit_7', '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2', '--img-size', '32',
       '--device', 'cpu', '-b', '6', '-j', '0', '--epochs', '2', '--warmup-epochs', '0', '--cooldown-epochs', '0',
       '--lr', '1e-3', '--no-tensorboard', '--checkpoint-steps', '2', '--checkpoint-hist', '9', '--output', 'runs',
       '--distill', 'feature', '--teacher-checkpoint', 't.pth', '--experiment')


@pytest.fixture(scope='module')
def taught(image_folder, tmp_path_factory):
    """A folder with a teacher of other input, and a run that learned its features, with Mixup and everything random."""
    folder = tmp_path_factory.mktemp('taught')
    save_model(folder / 't.pth', make(img_size=48, embed_dim=48), args=RECORDED)
    out = succeeded(run_script('train.py', image_folder, *RUN, 'whole', cwd=folder))
    assert "a projection learns to map the model's 32 features to the teacher's 48" in out
    return folder


def test_a_run_resumes_with_its_projection_in_the_same_bytes(taught, image_folder):
    whole = taught / 'runs/train/whole'
    middle = whole / 'checkpoint-00000004.pth.tar'
    content = read_checkpoint(middle)
    assert content['step'] == 4 and content['teacher'] == fingerprint_of(make(img_size=48, embed_dim=48).state_dict())
    succeeded(run_script('train.py', image_folder, *RUN, 'again', '--resume', middle, cwd=taught))
    ends = (read_checkpoint(run / 'last.pth.tar') for run in (whole, taught / 'runs/train/again'))
    first, second = ({name: value for name, value in end.items() if name != 'args'} for end in ends)
    assert_same(first, second)
    assert not torch.equal(first['projection']['weight'], content['projection']['weight'])
    assert {tuple(value.shape) for value in first['projection'].values()} == {(48, 32), (48,)}


def test_another_teacher_is_refused_within_an_epoch_and_said_at_its_end(taught, image_folder):
    save_model(taught / 'other.pth', make(seed=1, img_size=48, embed_dim=48), args=RECORDED)
    save_model(taught / 'wide.pth', make(img_size=48, embed_dim=64),
               args={**RECORDED, 'model_kwargs': ['embed_dim=64', 'depth=1', 'num_heads=2']})
    whole = taught / 'runs/train/whole'

    def resume(step, *words):
        return run_script('train.py', image_folder, *RUN, f'with{len(words)}{words[-1][:4]}', *words, '--resume',
                          whole / f'checkpoint-{step:08d}.pth.tar', cwd=taught)

    refused = resume(4, '--teacher-checkpoint', 'other.pth')
    assert refused.returncode == 2 and refused.stderr.count('\n') == 1
    assert 'stands in the middle of an epoch with a teacher whose weights have the checksum' in refused.stderr
    refused = resume(6, '--teacher-checkpoint', 'wide.pth')
    assert refused.returncode == 2 and 'holds no projection to features of this --teacher' in refused.stderr
    out = succeeded(resume(6, '--teacher-checkpoint', 'other.pth'))
    assert 'warning: the run goes on with a teacher whose weights have the checksum' in out


def test_validation_knows_nothing_of_the_teacher(taught, image_folder):
    out = succeeded(run_script('validate.py', image_folder, '--checkpoint', 'runs/train/whole', '--device', 'cpu',
                               '-j', '0', cwd=taught))
    assert 'Top-1 accuracy of the model is' in out


def test_mistakes_end_a_command_with_one_line(image_folder, tmp_path):
    save_model(tmp_path / 't.pth', make(num_classes=4), classes=list('abcd'),
               args={**RECORDED, 'img_size': 32, 'model_kwargs': ['embed_dim=32', 'depth=1', 'num_heads=2']})
    for script, words, message in (
            ('train.py', ('--teacher-checkpoint', 'missing.pth'), 'checkpoint missing.pth does not exist'),
            ('transfer.py', ('--teacher-checkpoint', 't.pth'), 'it has 4 classes, the model 3')):
        result = run_script(script, image_folder, *RUN[:-5], *words, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
        assert 'Traceback' not in result.stderr


def test_a_checkpoint_of_an_earlier_version_knows_no_distillation(caplog):
    now = train_parser().parse_args([]).__dict__
    before = {name: value for name, value in now.items() if 'teacher' not in name and 'distill' not in name}
    _report_differences(before, now)
    assert not caplog.messages
    _report_differences(before, now | {'teacher': 'resnet18', 'distill_weight': 0.7})
    assert "distill_weight None → 0.7, teacher None → 'resnet18'" in caplog.messages[0]
