"""Inspects, converts, averages and strips checkpoints, of every kind that models/weights/formats.py knows.

    python tools/checkpoint.py inspect 81.5_T2T_ViT_14.pth.tar
    python tools/checkpoint.py inspect last.pth.tar --keys --json
    python tools/checkpoint.py convert T2T_ViT_14.pdparams t2t_vit_14.safetensors --model t2t_vit_14
    python tools/checkpoint.py convert model_best.pth.tar hub/t2t_vit_14/
    python tools/checkpoint.py average checkpoint-*.pth.tar -o average.pth
    python tools/checkpoint.py strip model_best.pth.tar t2t_vit_14.pth --hash

A folder as OUT (it ends in / or exists) gets timm's form, config.json and model.safetensors: after `import models`,
timm.create_model('local-dir:hub/t2t_vit_14', pretrained=True) gives the model. Names of classes and the image size
travel along, and the logits of the model from FILE are compared with those of the model from OUT. Nothing is
overwritten without --force, and a file appears under its name only when it is whole. (With --force the two files of a
folder are replaced one after the other: who is interrupted between them has new weights beside an old config.json.)
"""
import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options.parser import Parser
from options.types import image_size
from utils.errors import UserError
from utils.script import run_script

WEIGHTS = 'model.safetensors'  # in a folder of timm's form
SUFFIXES = ('.safetensors', '.pth.tar', '.pth')
DTYPES = ('float32', 'float16', 'bfloat16')
# Options of a training that say most about it.
NOTED = ('model', 'data', 'dataset', 'epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'drop_path', 'mixup',
         'cutmix', 'smoothing', 'aa', 'reprob', 'model_ema_decay', 'amp', 'seed')


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    inspect = commands.add_parser('inspect', help='say what a checkpoint holds')
    inspect.set_defaults(run=inspect_checkpoint)
    inspect.add_argument('file', metavar='FILE', help='checkpoint of any known kind')
    inspect.add_argument('--keys', action='store_true', help='list all keys with their shapes')
    inspect.add_argument('--json', action='store_true', help='print JSON')

    convert = commands.add_parser('convert', help='write the weights in another form')
    convert.set_defaults(run=convert_checkpoint)
    convert.add_argument('file', metavar='FILE', help='checkpoint of any known kind')
    convert.add_argument('out', metavar='OUT', help=f'file that ends in {" or ".join(SUFFIXES)}, or a folder')
    convert.add_argument('--model', metavar='NAME', help='model the weights are of, where their shapes do not tell')
    convert.add_argument('--img-size', type=image_size, metavar='N',
                         help='pixels, or HxW, that the weights were trained at, where FILE does not say and images '
                              'were not square')
    convert.add_argument('--dtype', choices=DTYPES, help='of the numbers written (default: as they are)')

    average = commands.add_parser('average', help='average the weights of several checkpoints')
    average.set_defaults(run=average_checkpoints)
    average.add_argument('files', metavar='FILE', nargs='+', help='checkpoints of one architecture')
    average.add_argument('-o', '--out', metavar='OUT', required=True, help=f'file that ends in {" or ".join(SUFFIXES)}')

    strip = commands.add_parser('strip', help='keep the weights and nothing else, and print their hash')
    strip.set_defaults(run=strip_checkpoint)
    strip.add_argument('file', metavar='FILE', help='checkpoint of any known kind')
    strip.add_argument('out', metavar='OUT', help=f'file that ends in {" or ".join(SUFFIXES)}')
    strip.add_argument('--hash', action='store_true', help='add the first 8 digits of its SHA-256 to the name of OUT')

    for command in (inspect, convert, average, strip):
        command.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True,
                             help='take the averaged weights, where there are any')
        if command is not inspect:
            command.add_argument('--force', action='store_true', help='overwrite what exists')
    return parser


# --------------------------------------------------------------------------------------------------
# inspect

def inspect_checkpoint(args) -> None:
    """Prints what the checkpoint says and what its shapes tell, as a table or as JSON."""
    facts = collect_facts(args.file, args.use_ema)
    keys = facts.pop('keys')
    if args.json:
        if args.keys:
            facts['keys'] = keys
        print(json.dumps(_plain(facts), indent=2, default=str, allow_nan=False))
        return
    print('\n'.join(f'{name:<15}{value}' for name, value in _rows(facts) if value not in (None, '')))
    if args.keys:
        width = max(map(len, keys))
        print('\n'.join(['', *(f'{key:<{width}}  {shape}' for key, shape in keys.items())]))


def _plain(value: object) -> object:
    """What JSON can hold: keys as strings, and numbers that are not finite too, which it has no form for."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def collect_facts(path: str, use_ema: bool) -> dict:
    """Everything that `inspect` can say; None for what the checkpoint does not tell."""
    from models import count_classes
    from models.weights.formats import has_ema, has_plain, recorded_arch, recorded_classes, recorded_options
    from models.weights.loading import count_channels
    checkpoint, weights, identity = _read(path, use_ema)
    name = _resolve_model(None, checkpoint, identity)
    options = recorded_options(checkpoint)
    tensors = weights.state.values()
    metric = next((checkpoint[name] for name in ('metric', 'acc') if checkpoint.get(name) is not None), None)
    return {
        'file': str(path),
        'bytes': os.path.getsize(path),
        'format': weights.format,
        'entry': weights.entry,
        'models': list(identity.names),
        'description': identity.description,
        'recorded_model': recorded_arch(checkpoint),
        'img_size': identity.img_size,
        'grid': identity.grid,
        'in_chans': identity.in_chans or (count_channels(name, weights.state) if name else None),
        'num_classes': count_classes(name, checkpoint, use_ema) if name else identity.num_classes,
        'classes': recorded_classes(checkpoint),
        'parameters': sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        'tensors': len(weights.state),
        'dtypes': sorted({str(tensor.dtype).removeprefix('torch.') for tensor in tensors}),
        'ema': has_ema(checkpoint),
        'ema_only': has_ema(checkpoint) and not has_plain(checkpoint),
        'epoch': checkpoint.get('epoch') if weights.entry else None,
        'metric': metric if weights.entry else None,
        'options': {name: options[name] for name in NOTED if options.get(name) not in (None, '')},
        'keys': {key: list(tensor.shape) for key, tensor in weights.state.items()},
    }


def _rows(facts: dict) -> list[tuple[str, object]]:
    """The facts in words."""
    def by(sides):
        return ' × '.join(map(str, sides)) if sides else None

    size, grid, classes = by(facts['img_size']), by(facts['grid']), facts['classes']
    names = '' if not classes else ': ' + ', '.join(classes[:8]) + (', …' if len(classes) > 8 else '')
    recorded = facts['recorded_model'] if [facts['recorded_model']] != facts['models'] else None
    return [
        ('file', f'{facts["file"]} ({facts["bytes"] / 1e6:,.1f} MB)'),
        ('format', facts['format'] + (f', weights in {facts["entry"]}' if facts['entry'] else '')),
        ('model', facts['description']),
        ('recorded model', recorded),
        ('image size', f'{size or "unknown"}' + (f' (grid {grid})' if grid else '')),
        ('channels', facts['in_chans']),
        ('classes', f'{facts["num_classes"] or "no classifier known"}{names}'),
        ('parameters', f'{facts["parameters"]:,} in {facts["tensors"]} tensors'),
        ('dtype', ', '.join(facts['dtypes'])),
        ('average (EMA)', 'only' if facts['ema_only'] else 'yes' if facts['ema'] else 'no'),
        ('epoch', facts['epoch']),
        ('metric', facts['metric']),
        ('options', ', '.join(f'{name} {value}' for name, value in facts['options'].items())),
    ]


# --------------------------------------------------------------------------------------------------
# convert

def convert_checkpoint(args) -> None:
    """Writes the weights to OUT, once the model of FILE and that of OUT are seen to give the same logits."""
    out, is_folder = Path(args.out), args.out.endswith(('/', os.sep)) or os.path.isdir(args.out)
    _check_out(out, args.force, is_folder)
    checkpoint, weights, identity = _read(args.file, args.use_ema, args.img_size)
    builder = _Builder(args.file, checkpoint, args.use_ema, identity)
    name, unchecked = _resolve_model(args.model, checkpoint, identity), None
    if name is None and identity.names:
        builder.name = identity.names[0]  # equal shapes: any of them can tell whether the weights are the same
    elif name is None:
        unchecked = f'{identity.description} is not a registered model (--model NAME says which)'
    else:
        builder.name = name
        try:
            builder.build()
        except UserError as error:
            if args.model or name in identity.names:
                raise
            name, unchecked = None, str(error)  # the file's own account of what it is of
    if is_folder and name is None:
        raise UserError(f'{args.file}: the weights are of {identity.description}; a folder in the form of timm needs '
                        f'a registered model: --model {" or --model ".join(identity.names or ("NAME",))}')
    with _temporary(out) as temporary:
        if is_folder:
            temporary.mkdir()
            builder.save_config(temporary / 'config.json')
        _write(temporary / WEIGHTS if is_folder else temporary, out, weights.state,
               _beside(checkpoint, identity, name), args.dtype)
        if not unchecked:
            difference = builder.compare(temporary, is_folder)
            # Equal weights give equal logits, up to what a library does with another address in memory.
            if not args.dtype and not difference <= 1e-4:
                raise UserError(f'{out} was not written: its logits and those of {args.file} differ by {difference}; '
                                'check the weights for values that are not finite')
        _publish(temporary, out, args.force, is_folder)
    print(f'{out}: {len(weights.state)} tensors, {name or identity.description}')
    if unchecked:
        print(f'parity was not checked: {unchecked}')
    else:
        print(f'parity: logits of the two differ by at most {difference:.3g} (as {builder.name})')


def _resolve_model(asked: str | None, checkpoint, identity) -> str | None:
    """The model the weights are of: as asked, as their shapes tell, or as they record; None where that is open."""
    from models import resolve_name
    from models.weights.formats import recorded_arch
    from models.weights.identity import our_models
    if asked:
        return resolve_name(asked)
    if len(identity.names) == 1:
        return identity.names[0]
    try:
        recorded = resolve_name(recorded_arch(checkpoint) or '')
    except UserError:
        return None
    is_possible = recorded in identity.names if identity.names else recorded not in our_models()
    return recorded if is_possible else None


class _Builder:
    """Builds models with the weights of a checkpoint: FILE's, or those of a file made from it."""

    def __init__(self, source: str, checkpoint, use_ema: bool, identity):
        self.source, self.checkpoint, self.use_ema, self.identity = source, checkpoint, use_ema, identity
        self.name = ''  # of a registered model

    def _in_chans(self) -> int | None:
        """The channels of the images; None for the model's own."""
        from models.weights.formats import extract
        from models.weights.loading import count_channels
        return self.identity.in_chans or count_channels(self.name, extract(self.checkpoint, self.use_ema).state)

    def build(self, written: Path | None = None):
        """The model with the weights of FILE, or of what was written, in evaluation mode."""
        from models import count_classes, create_model, load_weights
        from utils.checkpoint_reader import read_checkpoint
        checkpoint, use_ema, source = self.checkpoint, self.use_ema, self.source
        if written:
            checkpoint, use_ema, source = read_checkpoint(written), True, str(written)
        model = create_model(
            self.name, num_classes=count_classes(self.name, checkpoint, use_ema, source) or 0,
            img_size=self.identity.img_size, in_chans=self._in_chans())
        load_weights(model, checkpoint, use_ema=use_ema, img_size=self.identity.img_size, source=source)
        return model.eval()

    def save_config(self, path: Path) -> None:
        """Writes what timm needs to know beside the weights."""
        from models.runtimes import describe
        from models.weights.formats import recorded_classes
        model = self.build()
        config = describe(model, classes=recorded_classes(self.checkpoint), input_size=self._input_size(model))
        with open(path, 'w') as file:
            json.dump(config, file, indent=2)
            file.flush()
            os.fsync(file.fileno())

    def compare(self, written: Path, is_folder: bool) -> float:
        """The largest difference between the logits that FILE and the written file give for two images."""
        import timm
        import torch
        ours = self.build()
        theirs = timm.create_model(f'local-dir:{written}', pretrained=True).eval() if is_folder else self.build(written)
        images = torch.randn(2, *self._input_size(ours), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            return (ours(images) - theirs(images)).abs().max().item()

    def _input_size(self, model) -> tuple[int, int, int]:
        channels, *size = model.pretrained_cfg.get('input_size', (3, 224, 224))
        return (self._in_chans() or channels, *(self.identity.img_size or size))


# --------------------------------------------------------------------------------------------------
# average, strip

def average_checkpoints(args) -> None:
    """Writes the mean of the weights, computed in float64 and rounded once; integers are those of the last file."""
    out = Path(args.out)
    _check_out(out, args.force)
    if len(args.files) < 2:
        raise UserError('one file is its own average; give two checkpoints or more')
    import torch

    first: dict = {}
    sums: dict = {}
    beside: dict = {}
    same: set = set()
    for path in args.files:
        checkpoint, weights, identity = _read(path, args.use_ema)
        state, said = weights.state, _beside(checkpoint, identity, _resolve_model(None, checkpoint, identity))
        first = first or state
        _check_same(path, args.files[0], (state, said), (first, beside))
        beside = {**said, **beside}
        same = {key for key in (same if sums else state) if torch.equal(state[key], first[key])}
        sums = {key: sums.get(key, 0) + tensor.double() if tensor.is_floating_point() else tensor
                for key, tensor in state.items()}
    for key, tensor in first.items():
        if key in same:  # to the bit, which a sum divided by its number is not always
            sums[key] = tensor
        elif tensor.is_floating_point():
            sums[key] = (sums[key] / len(args.files)).to(tensor.dtype)
    with _temporary(out) as temporary:
        _write(temporary, out, sums, beside)
        _publish(temporary, out, args.force)
    print(f'{out}: average of {len(args.files)} checkpoints, {len(sums) - len(same)} of {len(sums)} tensors differed')


def _check_same(path: str, first_path: str, given: tuple[dict, dict], first: tuple[dict, dict]) -> None:
    """Raises UserError at the first key in which two checkpoints differ."""
    (state, beside), (first_state, first_beside) = given, first

    def described(state: dict, key: str) -> str:
        return f'{state[key].dtype} {list(state[key].shape)}'.removeprefix('torch.') if key in state else 'no such key'

    for key in [*first_state, *state]:
        if described(state, key) != described(first_state, key):
            raise UserError(f'{path} and {first_path} differ in {key}: {described(state, key)} and '
                            f'{described(first_state, key)}; average checkpoints of one model')
    for entry in beside.keys() & first_beside.keys():
        if beside[entry] != first_beside[entry]:
            raise UserError(f'{path} and {first_path} differ in {entry}; average checkpoints of one model')


def strip_checkpoint(args) -> None:
    """Writes the weights alone, and prints the hash by which timm's downloads are checked."""
    out = Path(args.out)
    _check_out(out, args.force or args.hash)
    checkpoint, weights, identity = _read(args.file, args.use_ema)
    with _temporary(out) as temporary:
        _write(temporary, out, weights.state,
               _beside(checkpoint, identity, _resolve_model(None, checkpoint, identity)))
        with open(temporary, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        if args.hash:
            suffix = _suffix(out) or ''
            out = out.with_name(f'{out.name.removesuffix(suffix)}-{digest[:8]}{suffix}')
        _publish(temporary, out, args.force)
    print(f'{out}: {len(weights.state)} tensors from {weights.entry or "the state dict"}, '
          f'{out.stat().st_size / 1e6:,.1f} MB\nsha256 {digest}\nhash   {digest[:8]}')


# --------------------------------------------------------------------------------------------------
# Files

def _read(path: str, use_ema: bool, img_size: int | tuple[int, int] | None = None):
    """A checkpoint, the weights in it and what they are of."""
    from models.weights.formats import extract, recorded_img_size
    from models.weights.identity import identify
    from utils.checkpoint_reader import read_checkpoint
    checkpoint = read_checkpoint(path)
    try:
        weights = extract(checkpoint, use_ema)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    identity = identify(weights.state, img_size or recorded_img_size(checkpoint))
    if img_size and identity.img_size != img_size:
        raise UserError(f'{path}: images of {img_size[0]} × {img_size[1]} pixels (--img-size) do not give the '
                        'positions in the weights; give the size that they were trained at')
    return checkpoint, weights, identity


def _beside(checkpoint, identity, name: str | None) -> dict:
    """What travels with the weights: the name of the model, those of the classes, the image size."""
    from models.weights.formats import recorded_classes
    entries = {'arch': name, 'classes': recorded_classes(checkpoint), 'img_size': identity.img_size}
    return {entry: list(value) if isinstance(value, tuple) else value for entry, value in entries.items() if value}


def _suffix(out: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if out.name.endswith(suffix) and out.name != suffix), None)


def _check_out(out: Path, force: bool, is_folder: bool = False) -> None:
    """Raises UserError, before any work, where OUT cannot or must not be written."""
    if not out.absolute().name:
        raise UserError(f'OUT is {str(out)!r}, the root of the disk; give a file or folder in it')
    if not is_folder and (_suffix(out) is None or out.is_dir()):
        raise UserError(f'OUT is {str(out)!r}; give a file that ends in {" or ".join(SUFFIXES)}')
    for path in _targets(out, is_folder):
        if path.exists() and not force:
            raise UserError(f'{path} exists; give another name, or --force to overwrite it')


def _targets(out: Path, is_folder: bool) -> list[Path]:
    return [out / WEIGHTS, out / 'config.json'] if is_folder else [out]


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A path beside OUT, on the same disk, for a file or folder that is gone in the end."""
    path = out.absolute().with_name(f'.{out.name}.{os.getpid()}.tmp')
    try:
        with _explained(out):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns what the writers raise where a disk is full or a folder is read-only into a UserError."""
    import safetensors
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:160]
        raise UserError(f'{path} cannot be written ({reason}); check the space and the permissions') from error


def _write(path: Path, out: Path, state: dict, beside: dict, dtype: str | None = None) -> None:
    """Writes weights and what travels with them to `path`, in the form that the name of `out` asks for."""
    import torch

    from models.runtimes import pack_safetensors
    state = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    if dtype:
        state = {key: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                 for key, tensor in state.items()}
    with _explained(out), open(path, 'wb') as file:
        if _suffix(out) in ('.safetensors', None):  # None for a folder
            file.write(pack_safetensors(state, beside))
        else:
            torch.save({'state_dict': state, **beside}, file)
        file.flush()
        os.fsync(file.fileno())


def _publish(temporary: Path, out: Path, force: bool, is_folder: bool = False) -> None:
    """Gives what was written its name."""
    _check_out(out, force, is_folder)
    with _explained(out):
        if is_folder:
            out.mkdir(exist_ok=True)
        for target in _targets(out, is_folder):
            os.replace(temporary / target.name if is_folder else temporary, target)


def main(arguments: list[str] | None = None) -> None:
    args = create_parser().parse_args(arguments)
    args.run(args)


if __name__ == '__main__':
    logging.getLogger('timm').setLevel(logging.ERROR)  # it notes that one channel has no mean of its own
    run_script(main)
