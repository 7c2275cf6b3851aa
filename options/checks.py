"""Check options against each other, the data set and the number of processes."""
from options.parser import Options
from utils.errors import UserError


def resolve_num_classes(args, classes) -> int:
    """Return the size of the classifier: --num-classes, or one output for each class of the data set.

    Raises:
        UserError: the data set has more classes than --num-classes.
    """
    if args.num_classes is not None and args.num_classes < len(classes):
        raise UserError(f'--num-classes {args.num_classes}: the data set has {len(classes)} classes; '
                        'give at least as many, or leave the option out')
    return args.num_classes or len(classes)


def share_global_batch(args: Options, processes: int) -> Options:
    """Return the options with the --batch-size and --accum-steps that --global-batch-size needs, if it is given.

    A step has exactly as many images. It has the fewest batches of an even size, because Mixup pairs images, or of any
    size if there are none.

    Raises:
        UserError: the processes cannot share it, or --accum-steps is given too.
    """
    total = args.global_batch_size
    if total is None:
        return args
    if args.batch_size * args.accum_steps * processes == total:  # from the args.yaml of a run
        return args
    if args.accum_steps != 1:
        raise UserError(f'--accum-steps {args.accum_steps} beside --global-batch-size {total}, which computes it; '
                        'leave one of them out, or say --accum-steps 1')
    if total % processes:
        fitting = ', '.join(str(n) for n in range(1, total + 1) if total % n == 0)
        raise UserError(f'--global-batch-size {total}: {processes} processes cannot share it; give '
                        f'{multiples_around(total, processes)}, or start {fitting} of them')
    share = total // processes
    numbers = [n for n in range(-(-share // args.batch_size), share + 1) if share % n == 0]
    accum_steps = next((n for n in numbers if share // n % 2 == 0), numbers[0])
    return args.replacing(batch_size=share // accum_steps, accum_steps=accum_steps)


def has_teacher(args) -> bool:
    """Tell whether the options name a teacher; a checkpoint of ours names its model."""
    return bool(args.teacher or args.teacher_checkpoint)


def check_distillation(args) -> None:
    """Raise UserError for options of distillation without a teacher, or that do not fit one another."""
    if not has_teacher(args):
        for option in ('distill', 'distill_temperature', 'distill_weight', 'teacher_img_size'):
            if getattr(args, option) is not None:
                name = option.replace('_', '-')
                raise UserError(f'--{name} {getattr(args, option)} needs a teacher; give --teacher MODEL')
        return
    if args.distill != 'feature' and (args.distill_weight or 0) > 1:
        raise UserError(f"--distill-weight {args.distill_weight}: the teacher's share of the loss is at most 1; only "
                        '--distill feature takes more')
    if args.distill in ('hard', 'feature') and args.distill_temperature is not None:
        raise UserError(f'--distill-temperature {args.distill_temperature} with --distill {args.distill}, which has '
                        'none; leave it out, or say --distill soft')
    if args.distill == 'feature' and args.freeze == 'backbone':
        raise UserError('--distill feature with --freeze backbone: the features do not learn; leave one of them out')
    if getattr(args, 'token_labels', None):
        raise UserError(f'--token-labels {args.token_labels} beside a teacher: two ways to learn from one; leave '
                        'either out')


def check_fold(args) -> None:
    """Raise UserError for a --fold that --k-fold does not have, or beside another choice of evaluation images."""
    if args.fold and not args.k_fold:
        raise UserError(f'--fold {args.fold}: of how many? add --k-fold, such as --k-fold 5')
    if args.k_fold and args.fold and args.fold > args.k_fold:
        raise UserError(f'--fold {args.fold}: --k-fold {args.k_fold} has folds 1 to {args.k_fold}')
    for name in ('val_fraction', 'val_split'):
        if args.k_fold and (value := getattr(args, name)):
            raise UserError(f'--k-fold {args.k_fold} beside --{name.replace("_", "-")} {value}: both name the '
                            'evaluation images; leave one of them out')


def count_runs(args) -> int | None:
    """Return how many runs the options of a training ask for by --seeds or --k-fold; None for a run by itself."""
    return len(args.seeds) if args.seeds else args.k_fold if not args.fold else None


def check_runs(args) -> None:
    """Raise UserError for folds and seeds of a training that do not go together, or runs that have no name."""
    check_fold(args)
    if not count_runs(args):
        return
    asked = f'--seeds {" ".join(map(str, args.seeds))}' if args.seeds else f'--k-fold {args.k_fold}'
    if args.seeds and args.k_fold:
        raise UserError(f'{asked} beside --k-fold {args.k_fold}: give the folds of one seed (--seed), or the seeds of '
                        'one division of the images')
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise UserError(f'{asked}: a seed twice gives the same run twice; leave one out')
    if not args.experiment:
        raise UserError(f'{asked} makes several runs; name the folder that holds them: --experiment NAME')
    if args.resume not in ('', 'auto'):
        raise UserError(f'--resume {args.resume} beside {asked}: each run has checkpoints of its own; say --resume auto'
                        + (', or add --fold' if args.k_fold else ''))


def multiples_around(number: int, unit: int) -> str:
    """Return the positive multiples of `unit` next to `number`, which is none, as '8 or 16'."""
    below = number - number % unit
    return ' or '.join(str(multiple) for multiple in (below, below + unit) if multiple)


def check_images(args) -> None:
    """Raise UserError unless the options name either files or a data set."""
    has_data_set = bool(args.data) or args.dataset != 'folder'
    if bool(args.images) == has_data_set:
        raise UserError('which images? give files or folders, or a data set (--data DIR, --dataset digits)'
                        + (', not both' if args.images else ''))


def check_trained_model(args) -> None:
    """Raise UserError unless the options name exactly one source of weights."""
    if bool(args.eval_checkpoint) + args.pretrained != 1 or args.initial_checkpoint:
        raise UserError('which weights? give --checkpoint PATH, or --pretrained for the published ones')


def locate_sets(args) -> dict[str, str | None]:
    """Return the evaluation sets that validate.py's options name, in their order, and where each is.

    None stands for the data set of DIR and --dataset. ReaL labels are for the images of val.

    Raises:
        UserError: the place of a set is not given, or an option is for other sets.
    """
    pairs = [text.split('=', 1) for text in args.set_folders or ()]
    folders: dict[str, str | None] = dict(pairs)
    if twice := [name for name in folders if sum(name == other for other, _ in pairs) > 1]:
        raise UserError(f'--data {twice[0]}=… is given twice; leave one of them out')
    if unused := [name for name in folders if name not in args.sets and name != 'val']:
        raise UserError(f'--data {unused[0]}=…: --sets {" ".join(args.sets)} does not name {unused[0]}; add it there')
    if args.data or args.dataset != 'folder':
        if 'val' in folders:
            raise UserError(f'--data val={folders["val"]} beside {args.data or f"--dataset {args.dataset}"}; leave one '
                            'of them out')
        folders['val'] = None
    if 'val' in folders:
        folders.setdefault('real', folders['val'])
    for name in args.sets:
        if name not in folders:
            raise UserError(f'--sets {name}: where is it? give --data {name}=DIR' + (
                ', or DIR before the options' if name in ('val', 'real') else ''))
        if name != 'val' and args.only_classes:
            raise UserError(f'--only-classes {args.only_classes} beside --sets {name}, which has its own classes; '
                            'leave one of them out')
    return {name: folders[name] for name in args.sets}
