"""Make token labels of a data set with a teacher; pack, unpack and check them. docs/data.md describes the files.

    python tools/token_labels.py /data/imagenet /labels/nfnet --teacher dm_nfnet_f6 --img-size 576 -b 32
    python tools/token_labels.py /data/flowers /labels/flowers --teacher-checkpoint output/train/teacher
    SCRIPT=tools/token_labels.py ./distributed_train.sh 8 /data/imagenet /labels/nfnet --teacher dm_nfnet_f6
    python tools/token_labels.py --pack /data/label_top5_train_nfnet /labels/nfnet     # the published files
    python tools/token_labels.py --unpack /labels/nfnet /data/label_top5_train_nfnet
    python tools/token_labels.py --verify /data/imagenet /labels/nfnet                 # or --verify /labels/nfnet

The teacher is any classifier of timm, or a checkpoint. Its classifier is applied at each position of its last feature
map, and the best classes are kept. It sees the whole image, squashed to its input: training takes its crops as shares
of the whole image, so nothing may be cut off. After an interruption the same command continues. Equal images, options
and machines give equal bytes, on any number of processes.

Exit code 1: --verify has found an error.
"""
import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options import groups, parser as parsers
from options.datasets import DATASETS
from options.parser import Parser, parse_options
from options.types import count, image_size, keyword, positive, positive_int
from utils.console import plural, printable
from utils.errors import UserError
from utils.script import run_script

log = logging.getLogger(__name__)

EXIT_FAULTS = 1
# Published labels that are converted or checked in one step.
STEP = 1000
# So many classes are all kept by default.
ALL_UP_TO = 20
# Faults that are printed.
MOST_FAULTS = 20
TASKS = ('pack', 'unpack', 'verify')


def create_parser() -> Parser:
    parser = parsers.create_parser(__doc__, (_options, groups.device_options))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # What opens models and data takes all their options; those of this tool are enough here.
    others = vars(parsers.create_parser('', (groups.data_options, groups.model_options, groups.trained_model_options,
                                             groups.input_options)).parse_args([]))
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in others.items() if name not in known})
    return parser


def _options(parser: Parser) -> None:
    add = parser.add_argument_group('Token labels').add_argument
    add('data', metavar='DATA', help='data set, as of train.py; with --pack and --unpack, the labels')
    add('out', metavar='OUT', nargs='?', help='folder for the labels; with --verify, the labels')
    add('--teacher', dest='model', metavar='MODEL', help='name of any model of timm (default: that of the checkpoint)')
    add('--teacher-checkpoint', dest='eval_checkpoint', metavar='PATH',
        help="the teacher's weights: a file, a run's folder, hf-hub:MODEL or a URL (default: the published ones)")
    add('--use-ema', action=groups.FLAG, help='use the averaged weights of the checkpoint, or the others')
    add('--weights-key', metavar='NAME', help='entry with the weights, in a checkpoint that holds several')
    add('--model-kwargs', type=keyword, nargs='+', metavar='NAME=VALUE', help='further arguments of the teacher')
    add('--img-size', type=image_size, metavar='N', help="input size in pixels, or HxW (default: the teacher's)")
    add('--class-map', metavar='FILE', help="the names of the teacher's classes, one per line; 'imagenet' for its")
    add('-k', '--top-k', type=positive_int, metavar='K',
        help='classes at each position; all others count as a score of 0 (default: 5, and all of up to 20)')
    add('--format', default='packed', choices=['packed', 'published'],
        help='packed: a few large files; published: one small file for each image (default: packed)')
    add('--file-size', type=positive, default=256, metavar='MB', help='size of a packed file (default: 256)')
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N',
        help='images per batch and process (default: 64)')
    add('-j', '--workers', type=count, default=8, metavar='N',
        help='data loader workers per process; processes that convert or check (default: 8)')
    add('--dataset', default='folder', choices=DATASETS, help='kind of data set (default: folder)')
    add('--split', metavar='NAME', help='folder of the images in DATA (default: train, if there is one)')
    add('--max-bad-images', dest='max_bad_val_images', type=count, default=0, metavar='N',
        help='leave out up to N images per process that cannot be decoded (default: 0)')
    add('--pack', action='store_true', help='pack the published labels in DATA into OUT')
    add('--unpack', action='store_true', help='write the packed labels in DATA as published ones into OUT')
    add('--verify', action='store_true', help='check all labels in OUT, and that no image of DATA lacks one')


def check_options(args) -> str:
    """Return the task. Raises UserError for options that do not fit together."""
    tasks = [name for name in TASKS if getattr(args, name)]
    if len(tasks) > 1:
        raise UserError(f'--{tasks[0]} beside --{tasks[1]}; give one of them')
    if args.out is None and not args.verify:
        raise UserError('OUT is missing; give the folder for the labels')
    has_teacher = bool(args.model or args.eval_checkpoint)
    if tasks and has_teacher:
        raise UserError(f'--teacher beside --{tasks[0]}, which makes no labels; leave one of them out')
    if not tasks and not has_teacher:
        raise UserError('which teacher? give --teacher MODEL, --teacher-checkpoint PATH, or both')
    return tasks[0] if tasks else 'make'


# --- Making -----------------------------------------------------------------------------------------------------------

def make(args) -> None:
    """Make the labels of a data set, with all processes of the job."""
    from data.label_store import MAX_CLASSES
    from data.label_writing import LabelWriter
    from data.pipeline import resolve_input
    from models import open_trained_model
    from models.dense import check_dense
    from utils.distributed import destroy_process_group, from_main, gather, raise_on_all_ranks
    from utils.fingerprint import fingerprint_of
    from utils.runtime import move_model, start
    world, precision = start(args)
    model, args, known_classes = open_trained_model(args.replacing(pretrained=not args.eval_checkpoint))
    if model.num_classes > MAX_CLASSES:
        raise UserError(f'the teacher has {model.num_classes:,} classes; the labels hold {MAX_CLASSES:,} at most')
    # The whole image: its crops in training are shares of it.
    config = resolve_input(args, model.pretrained_cfg)._replace(crop_pct=1.0, crop_mode='squash')
    grid = check_dense(model, config.img_size)
    dataset = _open_images(args, known_classes, model.num_classes, world)
    names = name_labels(dataset, is_published=args.format == 'published')
    # Of few classes, the second best has a score below 0, which those that are left out would have.
    best = args.top_k or (5 if model.num_classes > ALL_UP_TO else model.num_classes)
    shape = (2, min(best, model.num_classes), *grid)
    recipe = {
        'images': dataset.fingerprint(), 'teacher': args.model, 'weights': fingerprint_of(model.state_dict()),
        'batch_size': args.batch_size, 'labels': list(shape), 'precision': str(precision), **config._asdict()}
    is_packed = args.format == 'packed'
    fitting = args.file_size * 1e6 / (4 * shape[1] * grid[0] * grid[1]) if is_packed else STEP
    # Whole batches, so that the batches of a file, and its numbers to the last bit, are the same after an interruption.
    per_file = args.batch_size * max(1, int(fitting / args.batch_size))
    writer = LabelWriter(Path(args.out), names, shape, form=args.format, per_file=per_file, recipe=recipe)
    move_model(model, world.device, channels_last=args.channels_last)
    with contextlib.ExitStack() as stack:
        with raise_on_all_ranks():
            if world.is_main:
                stack.enter_context(writer.begin())
        pending = from_main(writer.pending() if world.is_main else None)
        _write_labels(args, model, precision, dataset, config, writer, pending[world.rank::world.size], world)
        gather(None)  # all files are there
        mine = [(number, writer.describe(number)) for number in writer.numbers[world.rank::world.size]]
        written = dict(pair for pairs in gather(mine) for pair in pairs)
        with raise_on_all_ranks():
            if world.is_main:
                has_names = len(dataset.classes) == model.num_classes
                left_out = writer.finish([written[number] for number in writer.numbers],
                                         dataset.classes if has_names else None)
                _say(args.out, len(names) - len(left_out), shape, left_out)
    destroy_process_group()


def _write_labels(args, model, precision, dataset, config, writer, numbers: Sequence[int], world) -> None:
    """Write the files `numbers`, which are this process's share."""
    import torch

    from data.base import Numbered, Part
    from data.pipeline import create_eval_loader
    from models.dense import dense_logits
    from utils.console import progress_bar
    from utils.signals import until_stalled
    if not numbers:
        return
    indices = [index for number in numbers for index in writer.members(number)]
    # Every process reads its own files, as if it were alone.
    loader, prepare = create_eval_loader(args, Numbered(Part(dataset, indices)), config,
                                         dataclasses.replace(world, rank=0, size=1))
    last = {number: writer.members(number)[-1] for number in numbers}
    labels: dict[int, torch.Tensor] = {}
    remaining = list(numbers)

    def finish_file() -> None:
        number = remaining.pop(0)
        rows = sorted(row for row in labels if row <= last[number])
        stacked = torch.stack([labels.pop(row) for row in rows]) if rows else torch.empty(
            0, *writer.shape, dtype=torch.float16)
        writer.write(number, [writer.names[row] for row in rows], stacked)

    with progress_bar(total=len(indices), unit='image', desc='labels') as bar, torch.inference_mode():
        for images, positions in until_stalled(loader):
            rows = [indices[position] for position in positions.tolist()]
            while rows[0] > last[remaining[0]]:
                finish_file()
            images, _ = prepare(images, positions)
            with precision.autocast():
                logits = dense_logits(model, images)
            best = torch.stack(logits.float().topk(writer.shape[1], dim=1), dim=1).half().cpu()  # [B, 2, K, H, W]
            if not best.isfinite().all():
                raise UserError(f'{dataset.path(rows[0])} or another image of its batch: the teacher gives logits that '
                                'half precision cannot hold; check its weights, or leave --amp out')
            labels.update(zip(rows, best.unbind(), strict=True))
            bar.update(len(rows))
    while remaining:
        finish_file()


def _open_images(args, classes: list[str] | None, num_classes: int | None, world):
    """Return the images of DATA with the class numbers of the teacher."""
    from data.pipeline import open_evaluation_data
    from data.places import parse_place
    split = args.split or 'train'
    if not args.split and not DATASETS[args.dataset].opener:
        place = parse_place(args.data)
        if place.is_pattern or place.is_class_folders() or place.has_manifest():
            split = '.'
    return open_evaluation_data(args.replacing(val_split=split), classes, num_classes, world)


def name_labels(dataset, *, is_published: bool) -> list[str]:
    """Return the name of each image's label. Raises UserError if two images would have one."""
    from data.shards.manifest import key_of, member_key
    names: list[str] = []
    taken: dict[str, str] = {}
    for index in range(len(dataset)):
        name = dataset.name(index)
        label = key_of(name)[0] if is_published else member_key(name)
        if (other := taken.setdefault(label, name)) != name or len(taken) == index:
            raise UserError(f'images {other!r} and {name!r} would have one label, {label!r}; rename one of them'
                            + (', or make packed labels' if is_published and '.' in key_of(name)[1] else ''))
        names.append(label)
    return names


def _say(out: str, labels: int, shape: Sequence[int], left_out: Sequence[str] = ()) -> None:
    log.info('%s: labels of %s, %d classes on %d × %d positions', out, plural(labels, 'image'), *shape[1:])
    if left_out:
        log.warning('%s: %s without a label; training needs --max-missing-labels %d', out,
                    plural(len(left_out), 'image'), len(left_out))


# --- Packing, unpacking, checking -------------------------------------------------------------------------------------

def convert(args, form: str) -> None:
    """Write labels in the other form."""
    import numpy as np
    import torch

    from data.label_store import MAX_CLASSES, PackedLabels, open_store
    from data.label_writing import LabelWriter
    from data.token_labels import TokenLabels
    from utils.parallel import in_processes
    from utils.runtime import start
    start(args, alone=True)
    torch.set_num_threads(1)  # before processes are forked
    store = open_store(args.data)
    if isinstance(store, PackedLabels) == (form == 'packed'):
        raise UserError(f'{args.data}: its labels are {form} already')
    recipe = {'source': TokenLabels(store, np.arange(len(store)), MAX_CLASSES).fingerprint(),
              'labels': list(store.shape)}
    fitting = args.file_size * 1e6 / (2 * np.prod(store.shape)) if form == 'packed' else STEP
    writer = LabelWriter(Path(args.out), store.names, store.shape, form=form, per_file=max(1, int(fitting)),
                         recipe=recipe)

    def copy(number: int, tick) -> None:
        rows, labels = writer.members(number), []
        for row in rows:
            labels.append(store.read(row))
            tick(1, labels[-1].nbytes)
        writer.write(number, [store.names[row] for row in rows], torch.stack(labels))

    def describe(number: int, tick):
        tick(len(writer.members(number)), 0)
        return number, writer.describe(number)

    with writer.begin():
        pending = writer.pending()
        todo = sum(len(writer.members(number)) for number in pending)
        for _ in in_processes(copy, pending, jobs=args.workers, total=len(store), done=len(store) - todo, desc=form):
            pass
        written = dict(in_processes(describe, writer.numbers, jobs=args.workers, total=len(store), desc='checksums'))
        writer.finish([written[number] for number in writer.numbers], store.classes)
    _say(args.out, len(store), store.shape)


def verify(args) -> None:
    """Check labels and print what is wrong with them; end with EXIT_FAULTS if anything is."""
    import numpy as np
    import torch

    from data.classes import name_some
    from data.label_store import PackedLabels, open_store
    from data.label_writing import verify_part
    from data.token_labels import find_rows
    from utils.parallel import in_processes
    from utils.runtime import start
    world, _ = start(args, alone=True)
    torch.set_num_threads(1)  # before processes are forked
    folder = args.out or args.data
    store = open_store(folder)
    parts = range(len(store.manifest.shards) if isinstance(store, PackedLabels) else -(-len(store) // STEP))

    def check(number: int, tick) -> list:
        found = verify_part(store, number, STEP)
        tick(len(store) // len(parts), 0)
        return found

    faults = sorted(fault for found in in_processes(check, parts, jobs=args.workers, total=len(store), desc='labels')
                    for fault in found)
    if args.out:
        dataset = _open_images(args, store.classes, None, world)
        missing = [dataset.name(index) for index in np.flatnonzero(find_rows(store, dataset) < 0).tolist()]
        if missing:
            faults.append((folder, f'lacks the labels of {len(missing)} of {len(dataset)} images '
                                   f'({name_some(missing, 3)})'))
    what = plural(len(faults), 'fault') if faults else 'all well'
    print(printable(f'{folder}: {plural(len(store), "label")}: {what}'))
    for where, fault in faults[:MOST_FAULTS]:
        print(printable(f'  {where}  {fault}'))
    if len(faults) > MOST_FAULTS:
        print(f'  and {len(faults) - MOST_FAULTS:,} more')
    if faults:
        sys.exit(EXIT_FAULTS)


def main(arguments: list[str] | None = None) -> None:
    args = parse_options(create_parser(), arguments)
    task = check_options(args)
    if task == 'make':
        make(args)
    elif task == 'verify':
        verify(args)
    else:
        convert(args, 'packed' if task == 'pack' else 'published')


if __name__ == '__main__':
    run_script(main)
