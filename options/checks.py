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
    folders: dict[str, str | None] = dict(text.split('=', 1) for text in args.set_folders or ())
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
