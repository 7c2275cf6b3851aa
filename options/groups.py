"""Titled groups of options for the parsers of scripts.py. Names and defaults are those of the published main.py."""
import argparse

from options.datasets import DATASETS
from options.types import (
    count,
    decay,
    folds,
    fraction,
    frozen_part,
    image_size,
    keyword,
    positive,
    positive_int,
    probability,
    rate,
    real,
    seed,
    share,
)

FLAG = argparse.BooleanOptionalAction


def data_options(parser):
    group = parser.add_argument_group('Data')
    group.add_argument('data', metavar='DIR', nargs='?',
                       help='data set: a folder with class folders or shards in train/ and val/, or wds:ADDRESS of '
                            'shards (https, s3)')
    _add_dataset_options(group.add_argument)


def image_options(parser):
    """Add images as files or as a data set, for scripts that look at single images."""
    group = parser.add_argument_group('Images')
    group.add_argument('images', metavar='IMAGE', nargs='*', help='image files and folders of images')
    group.add_argument('--data', metavar='DIR', help='use the evaluation images of this data set instead')
    _add_dataset_options(group.add_argument)
    group.add_argument('--samples', type=positive_int, metavar='N',
                       help='use only N images of the data set, evenly spaced over it')


def _add_dataset_options(add):
    add('--dataset', default='folder', choices=DATASETS,
        help='kind of data set; digits (embedded) and synthetic (for measuring) need no DIR')
    add('--download', action=FLAG, help='download CIFAR if it is missing (default: only if no DIR is given)')
    add('--val-split', metavar='NAME',
        help='folder of the evaluation images in DIR (default: val, valid, validation or test)')
    add('--val-fraction', type=share, metavar='SHARE',
        help='instead: hold out this share of the images, such as 0.1; the same ones every time')
    add('--k-fold', type=folds, metavar='K',
        help='instead: deal the training images out to K folds, and evaluate with one that was not trained on; '
             'training does so for each of them in turn, in EXPERIMENT/fold-1 …')
    add('--fold', type=positive_int, metavar='N', help='only fold N of --k-fold, from 1 on')
    add('--only-classes', metavar='CLASSES', help="use only these classes: '0-4', or names such as 'cat,dog'")
    add('-j', '--workers', type=count, default=8, metavar='N', help='data loader workers per process')
    add('--pin-mem', action=FLAG, default=True, help='page-locked memory: a GPU copies batches while it computes')
    # A separate option: skipping evaluation images changes what is measured.
    add('--max-bad-val-images', type=count, default=0, metavar='N',
        help='skip up to N evaluation images per process that cannot be decoded; they are counted')
    add('--shard-cache', metavar='DIR', help='folder for remote shards (default: ~/.cache/t2t-vit/shards)')
    add('--shard-cache-size', type=positive, default=100, metavar='GB', help='size of the cache on each machine')
    add('--shard-timeout', type=positive, default=300, metavar='SECONDS',
        help='stop when the server of the shards does not answer for this long')


def training_data_options(parser):
    add = parser.add_argument_group('Training data').add_argument
    add('--train-split', default='train', metavar='NAME', help='folder of the training images in DIR')
    add('--sampler', default='shuffle', choices=['shuffle', 'balanced'],
        help='shuffle: each image once in an epoch; balanced: each class equally often, in epochs of the same length')
    add('--max-bad-images', type=count, default=0, metavar='N',
        help='replace up to N training images per process that cannot be decoded by their neighbours')


def model_options(parser):
    add = parser.add_argument_group('Model and weights').add_argument
    add('--model', default='t2t_vit_14', metavar='MODEL',
        help='name of a T2T-ViT or of any model of timm; hf-hub:MODEL or local-dir:FOLDER')
    add('--pretrained', action=FLAG, default=False, help="start from the model's published weights")
    add('--initial-checkpoint', default='', metavar='PATH',
        help='start from these weights: a file, a folder, hf-hub:MODEL or a URL')
    add('--use-ema', action=FLAG,
        help='use the averaged weights of a checkpoint that holds both, or the others (default: those that did better '
             'in its evaluation, if it says so, else the averaged ones)')
    add('--weights-key', metavar='NAME',
        help='entry or module with the weights, in a checkpoint that holds several: student, state_dict.teacher')
    add('--num-classes', type=positive_int, metavar='N',
        help="size of the classifier (default: the data set's classes, 1000 for ImageNet)")
    add('--gp', metavar='POOL', help="global pooling (default: the model's)")
    add('--img-size', type=image_size, default=224, metavar='N', help='input size in pixels, or HxW')
    add('--model-kwargs', type=keyword, nargs='+', metavar='NAME=VALUE',
        help='further arguments of the model, such as aux_weight=0.25')
    add('--channels-last', action=FLAG, default=False, help='channels-last memory layout, for convolutions')


def trained_model_options(parser):
    """Add the choice of weights, beside `model_options`, for scripts that use a trained model."""
    _add_trained_model_options(parser)


def trained_models_options(parser):
    """Add the same for scripts that take several: all but the first become `further_checkpoints` (scripts.py)."""
    _add_trained_model_options(parser, nargs='+')
    parser.set_defaults(further_checkpoints=())


def _add_trained_model_options(parser, nargs: str | None = None):
    add = parser.add_argument_group('Trained model').add_argument
    several = '; several are compared, averaged and combined' if nargs else ''
    settings = {'nargs': nargs, 'action': 'extend'} if nargs else {}
    add('--eval-checkpoint', '--checkpoint', metavar='PATH', **settings,
        help="weights: a file, a run's folder, output/train/latest, a folder of timm, hf-hub:MODEL or a URL" + several)
    parser.set_defaults(trained_on={})  # the options that split the data of the training, from the checkpoint
    add('--class-map', metavar='FILE', help='text file with one class folder per line, in the order of the labels')
    add('-b', '--b', '--batch-size', dest='batch_size', type=positive_int, default=64, metavar='N',
        help='images per batch and process')


def input_options(parser):
    add = parser.add_argument_group('Evaluation input').add_argument
    add('-vb', '--validation-batch-size-multiplier', type=positive_int, default=1, metavar='N',
        help='evaluation batch = N x --batch-size')
    add('--crop-pct', type=positive, metavar='PCT', help="centre crop, share of the image (default: the model's)")
    add('--mean', type=real, nargs='+', metavar='MEAN', help="mean of the pixels (default: the model's)")
    add('--std', type=positive, nargs='+', metavar='STD', help="their standard deviation (default: the model's)")
    add('--interpolation', default='', choices=['', 'bilinear', 'bicubic', 'nearest'], metavar='NAME',
        help="interpolation for evaluation images: bilinear, bicubic, nearest (default: the model's)")
    add('--fast-eval', action=FLAG, default=False,
        help='resize evaluation images as tensors: 2.5 times as fast, 1 in 300 pixels differs by 1 of 255')


def optimizer_options(parser):
    add = parser.add_argument_group('Optimizer').add_argument
    add('-b', '--b', '--batch-size', dest='batch_size', type=positive_int, default=64, metavar='N',
        help='images per process and step')
    add('--accum-steps', type=positive_int, default=1, metavar='N', help='batches whose gradients make one step')
    add('--global-batch-size', type=positive_int, metavar='N',
        help='total images per step; --batch-size becomes the per-process limit, --accum-steps is computed')
    add('--opt', default='adamw', metavar='NAME', help='adamw, sgd or any optimizer of timm')
    add('--opt-eps', type=positive, metavar='EPS', help="optimizer's epsilon (default: its own)")
    add('--opt-betas', type=fraction, nargs='+', metavar='BETA', help="optimizer's betas (default: its own)")
    add('--opt-kwargs', type=keyword, nargs='+', metavar='NAME=VALUE',
        help='further settings of the optimizer, such as amsgrad=True')
    add('--momentum', type=rate, default=0.9, metavar='M', help='momentum of SGD')
    add('--weight-decay', '--wd', type=rate, default=0.05, metavar='W',
        help='weight decay; biases, 1-D parameters and cls_token have none')
    add('--clip-grad', type=positive, metavar='NORM', help='clip the gradient to this norm (default: never)')
    add('--max-skipped-steps', type=count, default=20, metavar='N',
        help='stop after more than N consecutive skipped steps (non-finite gradient), checked at log steps')


def loss_options(parser):
    add = parser.add_argument_group('Loss').add_argument
    add('--loss', default='ce', choices=['ce', 'bce', 'focal'],
        help='loss of training: cross-entropy, binary cross-entropy of each class, or focal; evaluation uses ce')
    add('--focal-gamma', type=rate, metavar='G', help='exponent of the focal loss (default: 2)')
    add('--bce-target-thresh', type=fraction, metavar='T',
        help='bce: targets above T, which Mixup makes soft, are 1, others 0 (default: as they are)')
    add('--class-weights', choices=['balanced'],
        help='balanced: an image counts in inverse proportion to the training images of its class')


def fine_tuning_options(parser):
    add = parser.add_argument_group('Fine-tuning').add_argument
    add('--freeze', type=frozen_part, metavar='PART',
        help='do not train the backbone (all but the classifier), or the stem and the first N blocks: backbone or N')
    add('--layer-decay', type=decay, metavar='D',
        help='learning rate of each layer, as a share of that of the next one: 0.65 to 0.9 (default: equal rates)')
    add('--grad-checkpointing', action=FLAG, default=False,
        help='recompute activations in the backward pass: less memory, a third more time, the same numbers')


def schedule_options(parser):
    add = parser.add_argument_group('Learning rate schedule').add_argument
    add('--sched', default='cosine', choices=['cosine', 'tanh', 'step', 'poly'], help='shape after the warm-up')
    add('--lr', type=rate, default=5e-4, metavar='LR', help='highest learning rate of the schedule')
    add('--lr-noise', type=rate, nargs='+', metavar='PCT', help='noise on the rate between these shares of the epochs')
    add('--lr-noise-pct', type=rate, default=0.67, metavar='PCT', help='limit of that noise')
    add('--lr-noise-std', type=rate, default=1.0, metavar='STD', help='standard deviation of that noise')
    add('--lr-cycle-mul', type=positive, default=1.0, metavar='MULT', help='growth of the cycles, as a factor')
    add('--lr-cycle-limit', type=positive_int, default=1, metavar='N', help='number of cosine cycles')
    add('--warmup-lr', type=rate, default=1e-6, metavar='LR', help='learning rate of the first warm-up epoch')
    add('--min-lr', type=rate, default=1e-5, metavar='LR', help='learning rate at the end of the schedule')
    add('--epochs', type=positive_int, default=300, metavar='N', help='epochs of the schedule')
    add('--start-epoch', type=count, metavar='N', help='start behind the first N epochs')
    add('--decay-epochs', type=positive, default=30, metavar='N', help='epochs between steps (step schedule)')
    add('--warmup-epochs', type=count, metavar='N',
        help='epochs of linear warm-up, the first of --epochs (default: 10, at most a tenth of --epochs)')
    add('--cooldown-epochs', type=count, metavar='N',
        help='further epochs at --min-lr after the schedule (default: 10, at most a tenth of --epochs)')
    add('--sched-on-updates', action=FLAG, default=False, help='change the rate after every step, not every epoch')
    add('--decay-rate', '--dr', type=positive, default=0.1, metavar='RATE', help='factor of each step (step schedule)')


def augmentation_options(parser):
    add = parser.add_argument_group('Augmentation and regularization').add_argument
    add('--aug', action=FLAG, default=True, help='--no-aug: centre crops without random erasing; Mixup stays on')
    add('--train-crop-mode', default='rrc', choices=['rrc', 'pad'],
        help='rrc: random resized crop; pad: resize, then random crop of the image padded by 1/8')
    add('--aug-repeats', type=positive_int, default=1, metavar='N',
        help='each image N times in a row, augmented N times; an epoch has as many samples as before')
    add('--scale', type=positive, nargs=2, default=[0.08, 1.0], metavar=('MIN', 'MAX'),
        help='area of a random resized crop, as a share of the image')
    add('--ratio', type=positive, nargs=2, default=[3 / 4, 4 / 3], metavar=('MIN', 'MAX'), help='its aspect ratio')
    add('--hflip', type=probability, default=0.5, metavar='P', help='probability of a horizontal flip')
    add('--vflip', type=probability, default=0.0, metavar='P', help='probability of a vertical flip')
    add('--color-jitter', type=rate, default=0.4, metavar='PCT', help='colour jitter; ignored if --aa is given')
    add('--aa', default='rand-m9-mstd0.5-inc1', metavar='POLICY', help="AutoAugment or RandAugment policy; '' for none")
    add('--aug-splits', type=count, default=0, metavar='N', help='AugMix splits: 0, or at least 2')
    add('--jsd', action=FLAG, default=False, help='Jensen-Shannon divergence over the splits')
    add('--resplit', action=FLAG, default=False, help='no random erasing in the first, clean split')
    add('--reprob', type=probability, default=0.25, metavar='P', help='probability of random erasing')
    add('--remode', default='pixel', choices=['pixel', 'rand', 'const'], help='content of an erased region')
    add('--recount', type=positive_int, default=1, metavar='N', help='erased regions per image')
    add('--mixup', type=rate, metavar='ALPHA', help='Mixup alpha; 0 for none (default: 0.8, with token labels 0)')
    add('--cutmix', type=rate, metavar='ALPHA', help='CutMix alpha; 0 for none (default: 1.0, with token labels 0)')
    add('--cutmix-minmax', type=probability, nargs=2, metavar=('MIN', 'MAX'), help='range of CutMix region sizes')
    add('--mixup-prob', type=probability, default=1.0, metavar='P', help='probability of mixing a batch')
    add('--mixup-switch-prob', type=probability, default=0.5, metavar='P', help='share of these that use CutMix')
    add('--mixup-mode', default='batch', choices=['batch', 'pair', 'elem'], help='mix once per batch, pair or image')
    add('--mixup-off-epoch', type=count, default=0, metavar='N', help='stop mixing after N epochs; 0: never')
    add('--smoothing', type=fraction, default=0.1, metavar='S', help='label smoothing')
    add('--train-interpolation', default='random', choices=['random', 'bilinear', 'bicubic'],
        help='interpolation for training images')
    add('--fast-transform', action=FLAG, default=True,
        help='faster augmentation on tensors: same random choices, pixels within rounding')
    add('--drop', type=fraction, default=0.0, metavar='P', help='dropout')
    add('--drop-path', type=fraction, default=0.1, metavar='P', help='stochastic depth rate of the last block')
    add('--drop-block', type=fraction, metavar='P', help='DropBlock rate, for models that have it')


def token_label_options(parser):
    add = parser.add_argument_group('Token labels').add_argument
    add('--token-labels', metavar='DIR',
        help="train each token on a teacher's classes at its place: the folder of these, published or packed")
    add('--token-label-crop', default='straight', choices=['straight', 'published'],
        help='straight: the labels of what a token sees; published: cropped with rows and columns exchanged, as the '
             'released model was trained')
    add('--dense-weight', type=rate, default=1.0, metavar='W', help='weight of the loss of the tokens')
    add('--cls-weight', type=rate, default=1.0, metavar='W', help='weight of the loss of the image')
    add('--ground-truth', action=FLAG, default=False, help="add a share of the true class to an image's target")
    add('--max-missing-labels', type=count, default=0, metavar='N',
        help='tolerate N training images without labels; their true class is the label of each token')


def distillation_options(parser):
    add = parser.add_argument_group('Distillation').add_argument
    add('--teacher', metavar='MODEL',
        help='learn from this model too: any of timm, with its published weights unless --teacher-checkpoint is given')
    add('--teacher-checkpoint', metavar='PATH',
        help="the teacher's weights, of a run of ours or of --teacher: a file, a folder, hf-hub:MODEL or a URL")
    add('--teacher-img-size', type=image_size, metavar='N',
        help='input size of the teacher, to which images are resized (default: that of its training)')
    add('--distill', choices=['soft', 'hard', 'feature'],
        help="what is learned: soft, the teacher's probabilities; hard, its most probable class; feature, its pooled "
             'features (default: soft)')
    add('--distill-temperature', type=positive, metavar='T',
        help='soft: soften both distributions by this temperature (default: 1)')
    add('--distill-weight', type=rate, metavar='A',
        help="soft, hard: the teacher's share of the loss; feature: weight of its term beside the loss (default: 0.5)")


def batch_norm_options(parser):
    add = parser.add_argument_group('Batch norm (models that have it)').add_argument
    add('--bn-momentum', type=rate, metavar='M', help='momentum of the running statistics')
    add('--bn-eps', type=positive, metavar='EPS', help='epsilon')
    add('--sync-bn', action=FLAG, default=False, help='compute the statistics over all processes')
    add('--dist-bn', default='', choices=['', 'reduce', 'broadcast'], help='share running statistics after each epoch')


def ema_options(parser):
    add = parser.add_argument_group('Moving average of the weights').add_argument
    add('--model-ema', action=FLAG, default=True, help='keep averaged weights, and evaluate them too')
    add('--model-ema-force-cpu', action=FLAG, default=False, help='keep them in CPU memory, and do not evaluate them')
    add('--model-ema-decay', type=probability, metavar='D',
        help='constant decay of the average, per step (default: 0.99996, as published; it warms up in runs of less '
             'than 115,127 steps)')


def device_options(parser):
    add = parser.add_argument_group('Device and precision').add_argument
    add('--device', default='auto', metavar='NAME', help='auto (a GPU if there is one), cuda, cuda:1 or cpu')
    add('--amp', '--native-amp', action=FLAG, default=False, help='mixed precision')
    add('--amp-dtype', default='auto', choices=['auto', 'bfloat16', 'float16'],
        help='auto: bfloat16 if the device has it, else float16 with loss scaling')
    add('--deterministic', action=FLAG, default=False, help='use only kernels that repeat to the bit (GPU)')
    add('--timeout', type=positive, default=1800, metavar='SECONDS',
        help='stop when a process does not respond for this long, and name it')
    add('--seed', type=seed, default=42, metavar='S', help='seed of all random numbers')
    add('--log-interval', type=positive_int, default=50, metavar='N', help='steps between log lines')


def compile_options(parser):
    add = parser.add_argument_group('Compilation').add_argument
    add('--compile', default='', choices=['', 'blocks', 'model', 'graphs', 'autotune'],
        help='torch.compile: blocks (each by itself: ready in a minute), model (as a whole: takes minutes, runs '
             'faster), graphs (adds CUDA graphs), autotune (also tries kernels); results differ by rounding')


def selection_options(parser):
    add = parser.add_argument_group('Choosing the model').add_argument
    add('--eval-metric', default='top1', choices=['top1', 'top5', 'loss', 'balanced_accuracy', 'macro_f1'],
        help='metric of the best checkpoint')
    add('--val-interval', type=positive_int, default=1, metavar='N', help='evaluate every N epochs, and after the last')
    add('--early-stop', type=positive_int, metavar='N',
        help='end the run when --eval-metric has not improved in N evaluations (default: never)')
    add('--select-fraction', type=share, metavar='SHARE',
        help='choose the best epoch on this share of the training images, which are not trained on; the evaluation '
             'images are used once, at the end (default: choose on the evaluation images)')
    add('--seeds', type=seed, nargs='+', metavar='S',
        help='one run with each of these seeds, in EXPERIMENT/seed-1 …, with their mean and deviation')


def run_options(parser):
    add = parser.add_argument_group('Run, checkpoints, resume').add_argument
    add('--output', default='./output', metavar='DIR', help='write runs to DIR/train/EXPERIMENT')
    add('--experiment', default='', metavar='NAME', help='name of the run (default: date-model-size)')
    add('--resume', default='', metavar='PATH', help="continue from this checkpoint; 'auto': this run's newest")
    add('--resume-opt', action=FLAG, default=True, help='--no-resume-opt: resume weights, reset the optimizer')
    add('--checkpoint-steps', '--recovery-interval', type=count, default=0, metavar='N',
        help='also save every N steps; 0: only after epochs')
    add('--checkpoint-hist', '--keep', type=positive_int, default=2, metavar='N',
        help='newest checkpoints to keep, beside the best')
    add('--save-images', action=FLAG, default=False, help='write the augmented batch as a picture at every log step')
    add('--tensorboard', action=FLAG, default=True, help='write TensorBoard events')
