"""Inspect, convert, average and strip checkpoints, of every format that models/weights/formats.py knows.

    python tools/checkpoint.py inspect 81.5_T2T_ViT_14.pth.tar
    python tools/checkpoint.py inspect last.pth.tar --keys --json
    python tools/checkpoint.py convert T2T_ViT_14.pdparams t2t_vit_14.safetensors --model t2t_vit_14
    python tools/checkpoint.py convert model_best.pth.tar hub/t2t_vit_14/
    python tools/checkpoint.py average checkpoint-*.pth.tar -o average.pth
    python tools/checkpoint.py strip model_best.pth.tar t2t_vit_14.pth --hash

FILE may also be a folder or an address; see docs/weights.md. If OUT is a folder (it ends in / or exists), it gets
timm's form, config.json and model.safetensors. After `import models`, timm.create_model('local-dir:hub/t2t_vit_14',
pretrained=True) returns the model. All that FILE records is copied too: class names, image size, crop, statistics of
the pixels. The logits of the models from FILE and OUT are compared. Nothing is overwritten without --force, and a file
gets its name only when it is complete. (--force replaces the two files of a folder one after the other: an
interruption between them leaves new weights beside an old config.json.)
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

from options.groups import FLAG
from options.parser import Parser
from options.paths import check_checkpoint
from options.types import image_size
from utils.console import printable, say_at_once
from utils.errors import UserError
from utils.script import run_script

# The files of a folder in timm's form.
WEIGHTS, CONFIG = 'model.safetensors', 'config.json'
SUFFIXES = ('.safetensors', '.pth.tar', '.pth')
ENDINGS = f'file that ends in {" or ".join(SUFFIXES)}'
DTYPES = ('float32', 'float16', 'bfloat16')
# The options that describe a training best.
NOTED = ('model', 'data', 'dataset', 'epochs', 'batch_size', 'opt', 'lr', 'weight_decay', 'sched', 'drop_path', 'mixup',
         'cutmix', 'smoothing', 'aa', 'reprob', 'model_ema_decay', 'amp', 'seed')


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    def add_command(name: str, run, help: str):
        command = commands.add_parser(name, help=help)
        command.set_defaults(run=run)
        command.add_argument('--use-ema', action=FLAG, help='use the averaged weights, or the others (default: those '
                             'that the run recorded as the better ones, else the averaged ones)')
        command.add_argument('--weights-key', metavar='NAME', help='entry or module with the weights, in a checkpoint '
                                                                   'that holds several')
        if run is not inspect_checkpoint:
            command.add_argument('--force', action='store_true', help='overwrite existing files')
        if run is not average_checkpoints:
            command.add_argument('file', metavar='FILE', help='checkpoint in any known format, or a folder')
        return command.add_argument

    add = add_command('inspect', inspect_checkpoint, 'show what a checkpoint holds')
    add('--keys', action='store_true', help='list all keys with their shapes')
    add('--json', action='store_true', help='print JSON')

    add = add_command('convert', convert_checkpoint, 'write the weights in another format')
    add('out', metavar='OUT', help=f'{ENDINGS}, or a folder')
    add('--model', metavar='NAME', help='model of the weights, if their shapes do not tell')
    add('--img-size', type=image_size, metavar='N', help='pixels, or HxW, of the training images, if FILE does not say '
                                                         'and they were not square')
    add('--dtype', choices=DTYPES, help='type of the numbers in OUT (default: unchanged)')

    add = add_command('average', average_checkpoints, 'average the weights of several checkpoints')
    add('files', metavar='FILE', nargs='+', help='checkpoints of one architecture')
    add('-o', '--out', metavar='OUT', required=True, help=ENDINGS)

    add = add_command('strip', strip_checkpoint, 'keep only the weights, and print their hash')
    add('out', metavar='OUT', help=ENDINGS)
    add('--hash', action='store_true', help='add the first 8 digits of its SHA-256 to the name of OUT')
    return parser


# --- A checkpoint -----------------------------------------------------------------------------------------------------

class Checkpoint:
    """A checkpoint, its weights, and what these are of."""

    def __init__(self, path: str, use_ema: bool | None, weights_key: str | None = None,
                 img_size: int | tuple[int, int] | None = None):
        from models.weights.formats import extract, recorded_classes, recorded_img_size
        from models.weights.identity import identify
        from models.weights.loading import read_chosen_weights
        from utils.weight_sources import find_weights
        path = str(find_weights(path))
        self.path, self.use_ema, self.content = path, use_ema, read_chosen_weights(path, weights_key, use_ema)
        try:
            self.weights = extract(self.content, use_ema)
        except UserError as error:
            raise UserError(f'{path}: {error}') from error
        if isinstance(img_size, int):
            img_size = (img_size, img_size)
        self.identity = identify(self.weights.state, img_size or recorded_img_size(self.content))
        if img_size and self.identity.img_size != img_size:
            raise UserError(f'{path}: images of {img_size[0]} × {img_size[1]} pixels (--img-size) do not give the '
                            'positions in the weights; give the size of the training images')
        self.classes = recorded_classes(self.content)

    def find_name(self, asked: str | None = None) -> str | None:
        """Return the model: as asked, as the shapes tell, or as recorded; None if that is open."""
        from models import resolve_name
        from models.weights.formats import recorded_arch
        from models.weights.identity import our_models
        names = self.identity.names
        if asked:
            return resolve_name(asked)
        if len(names) == 1:
            return names[0]
        try:
            recorded = resolve_name(recorded_arch(self.content) or '')
        except UserError:
            return None
        is_changed = bool(self.options().get('model_kwargs'))
        is_possible = recorded in names if names else is_changed or recorded not in our_models()
        return recorded if is_possible else None

    def extras(self, name: str | None) -> dict:
        """Return what is written beside the weights: model, classes, image size, crop and statistics of the pixels."""
        from models.weights.formats import recorded_input
        entries = {'arch': name, 'classes': self.classes, 'img_size': self.identity.img_size,
                   'label_descriptions': self.content.get('label_descriptions'),
                   'pretrained_cfg': recorded_input(self.content), 'args': {**self.options(), **self.split()}}
        return {entry: list(value) if isinstance(value, tuple) else value for entry, value in entries.items() if value}

    def options(self) -> dict:
        """Return the options of images and model that the checkpoint records."""
        from models.factory import RECORDED
        from models.weights.formats import recorded_options
        options = recorded_options(self.content)
        return {name: list(value) if isinstance(value, tuple) else value
                for name in RECORDED if (value := options.get(name))}

    def split(self) -> dict:
        """Return what tells held-out images from training images, if --val-fraction or --k-fold split the data."""
        from models.factory import RECORDED_SPLIT
        from models.weights.formats import recorded_options
        options = recorded_options(self.content)
        has_split = options.get('val_fraction') or options.get('k_fold')
        return {name: options.get(name) for name in RECORDED_SPLIT} if has_split else {}

    def in_chans(self, name: str) -> int | None:
        """Return the channels of the images; None for the model's own."""
        from models.weights.loading import count_channels
        return self.identity.in_chans or count_channels(name, self.weights.state)

    def build(self, name: str):
        """Return a model with these weights and their input settings, in evaluation mode."""
        from models import count_classes, create_model, load_weights
        from models.weights.formats import recorded_arch
        from utils.keywords import keywords
        size, options = self.identity.img_size, self.options()
        is_recorded = name == (recorded_arch(self.content) or '').lower()
        model = create_model(name, num_classes=count_classes(name, self.content, self.use_ema, self.path) or 0,
                             img_size=size, in_chans=self.in_chans(name),
                             global_pool=options.get('gp') if is_recorded else None,
                             **keywords(options.get('model_kwargs') if is_recorded else None))
        load_weights(model, self.content, use_ema=self.use_ema, img_size=size, source=self.path)
        model.pretrained_cfg.update(self.images())
        return model.eval()

    def images(self) -> dict:
        """Return the crop, interpolation and statistics of the pixels that are recorded, as timm names them."""
        from models.weights.formats import recorded_input
        options = {name: value for name, value in self.options().items() if name not in ('gp', 'model_kwargs')}
        return {**recorded_input(self.content), **options}

    def input_size(self, name: str, model) -> tuple[int, int, int]:
        channels, *size = model.pretrained_cfg.get('input_size', (3, 224, 224))
        return (self.in_chans(name) or channels, *(self.identity.img_size or size))


# --- inspect ----------------------------------------------------------------------------------------------------------

def inspect_checkpoint(args) -> None:
    """Print what the checkpoint says and what its shapes tell, as a table or as JSON."""
    facts = collect_facts(Checkpoint(args.file, args.use_ema, args.weights_key))
    keys = facts.pop('keys')
    if args.json:
        if args.keys:
            facts['keys'] = keys
        print(json.dumps(_plain(facts), indent=2, default=str, allow_nan=False))
        return
    print(printable('\n'.join(f'{name:<15}{value}' for name, value in _rows(facts).items() if value not in (None, ''))))
    if args.keys:
        width = max(map(len, keys))
        print(printable('\n'.join(['', *(f'{key:<{width}}  {shape}' for key, shape in keys.items())])))


def _plain(value: object) -> object:
    """Return what JSON can hold: keys are strings, and so are numbers that are not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def collect_facts(source: Checkpoint) -> dict:
    """Return all facts for `inspect`; None for what the checkpoint does not tell."""
    from models import count_classes
    from models.weights.formats import has_ema, has_plain, recorded_arch, recorded_options
    from utils.weight_sources import files_of
    content, weights, identity, name = source.content, source.weights, source.identity, source.find_name()
    options, tensors = recorded_options(content), weights.state.values()
    metric = next((content[name] for name in ('metric', 'acc') if content.get(name) is not None), None)
    return {
        'file': str(source.path),
        'bytes': sum(map(os.path.getsize, files_of(Path(source.path)))),
        'format': weights.format,
        'entry': weights.entry,
        'models': list(identity.names),
        'description': identity.description,
        'recorded_model': recorded_arch(content),
        'img_size': identity.img_size,
        'grid': identity.grid,
        'in_chans': source.in_chans(name) if name else identity.in_chans,
        'num_classes': count_classes(name, content, source.use_ema) if name else identity.num_classes,
        'classes': source.classes,
        'parameters': sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()),
        'tensors': len(weights.state),
        'dtypes': sorted({str(tensor.dtype).removeprefix('torch.') for tensor in tensors}),
        'ema': has_ema(content),
        'ema_only': has_ema(content) and not has_plain(content),
        'epoch': content.get('epoch') if weights.entry else None,
        'metric': metric if weights.entry else None,
        'options': {name: options[name] for name in NOTED if options.get(name) not in (None, '')},
        'keys': {key: list(tensor.shape) for key, tensor in weights.state.items()},
    }


def _rows(facts: dict) -> dict[str, object]:
    """Return the facts in words."""
    size, grid = (' × '.join(map(str, facts[name] or ())) for name in ('img_size', 'grid'))
    classes = facts['classes'] or ()
    names = ': ' * bool(classes) + ', '.join(classes[:8]) + ', …' * (len(classes) > 8)
    return {
        'file': f'{facts["file"]} ({facts["bytes"] / 1e6:,.1f} MB)',
        'format': facts['format'] + (f', weights in {facts["entry"]}' if facts['entry'] else ''),
        'model': facts['description'],
        'recorded model': facts['recorded_model'] if [facts['recorded_model']] != facts['models'] else None,
        'image size': (size or 'unknown') + (f' (grid {grid})' if grid else ''),
        'channels': facts['in_chans'],
        'classes': f'{facts["num_classes"] or "no classifier known"}{names}',
        'parameters': f'{facts["parameters"]:,} in {facts["tensors"]} tensors',
        'dtype': ', '.join(facts['dtypes']),
        'average (EMA)': 'only' if facts['ema_only'] else 'yes' if facts['ema'] else 'no',
        'epoch': facts['epoch'],
        'metric': facts['metric'],
        'options': ', '.join(f'{name} {value}' for name, value in facts['options'].items()),
    }


# --- convert ----------------------------------------------------------------------------------------------------------

def convert_checkpoint(args) -> None:
    """Write the weights to OUT, if the models of FILE and OUT give the same logits."""
    out = Output(args.out, args.force, is_folder=args.out.endswith(('/', os.sep)) or os.path.isdir(args.out))
    source = Checkpoint(args.file, args.use_ema, args.weights_key, args.img_size)
    identity, unchecked = source.identity, ''
    name = source.find_name(args.model)
    if name:
        try:
            source.build(name)
        except UserError as error:
            if args.model or name in identity.names:
                raise
            name, unchecked = None, str(error)  # the file's own record is wrong
    elif not identity.names:
        unchecked = f'{identity.description} is not a registered model (--model NAME says which)'
    if out.is_folder and name is None:
        raise UserError(f'{args.file}: the weights are of {identity.description}; a folder in the form of timm needs '
                        f'a registered model: --model {" or --model ".join(identity.names or ("NAME",))}')
    with out.temporary() as temporary:
        if out.is_folder:
            temporary.mkdir()
            save_config(source, name, temporary / CONFIG)
        out.write(source.weights.state, source.extras(name), args.dtype)
        if not unchecked:
            model = name or identity.names[0]  # names that share all shapes give the same logits
            difference = compare(source, model, temporary, out.is_folder)
            # Equal weights give equal logits, up to what a library does at another address in memory.
            if not args.dtype and not difference <= 1e-4:
                raise UserError(f'{out.path} was not written: its logits and those of {args.file} differ by '
                                f'{difference}; check the weights for values that are not finite')
        out.publish()
    print('; '.join([f'{out.path}: {len(source.weights.state)} tensors, {name or identity.description}',
                     *source.weights.adapted]))
    print(f'parity was not checked: {unchecked}' if unchecked else
          f'parity: logits of the two differ by at most {difference:.3g} (as {model})')


def save_config(source: Checkpoint, name, path: Path) -> None:
    """Write what timm needs to know beside the weights."""
    from models.runtimes import describe
    model = source.build(name)
    description = describe(model, classes=source.classes, descriptions=source.content.get('label_descriptions'),
                           input_size=source.input_size(name, model), **source.images())
    with open(path, 'w') as file:
        json.dump(description, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def compare(source: Checkpoint, name: str, written: Path, is_folder: bool) -> float:
    """Return the largest difference between the logits that FILE and the written file give.

    For two random inputs, and for a picture that each of the two crops and normalises as it records.
    """
    import timm
    import torch
    ours = source.build(name)
    theirs = timm.create_model(f'local-dir:{written}', pretrained=True).eval() if is_folder else (
        Checkpoint(str(written), use_ema=True).build(name))
    size = source.input_size(name, ours)
    inputs = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    pairs = [(inputs, inputs)]
    if size[0] == len(ours.pretrained_cfg['mean']) in (1, 3):
        pairs.append((as_input(ours, size), as_input(theirs, size)))
    with torch.inference_mode():
        return max((ours(own) - theirs(other)).abs().max().item() for own, other in pairs)


def as_input(model, size: tuple[int, int, int]):
    """Return a picture of coarse and fine structure as the evaluation of `model` sees it, [1, channels, H, W]."""
    import numpy as np
    from PIL import Image
    from timm.data import create_transform, resolve_data_config
    config = resolve_data_config({'input_size': size}, pretrained_cfg=model.pretrained_cfg)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    noise = rng.integers(-20, 21, (360, 480, 3))
    pixels = np.asarray(coarse.resize((480, 360)), dtype=int) + noise
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return create_transform(**config)(picture.convert('L' if size[0] == 1 else 'RGB')).unsqueeze(0)


# --- average, strip ---------------------------------------------------------------------------------------------------

def average_checkpoints(args) -> None:
    """Write the mean of the weights, computed in float64 and rounded once. Integers are those of the last file."""
    out = Output(args.out, args.force)
    if len(args.files) < 2:
        raise UserError('one file is its own average; give two checkpoints or more')
    from models.weights.averaging import MeanOfWeights

    first: dict = {}
    extras: dict = {}
    average = MeanOfWeights()
    for path in args.files:
        source = Checkpoint(path, args.use_ema, args.weights_key)
        state, own = source.weights.state, source.extras(source.find_name())
        first = first or state
        _check_same(path, args.files[0], (state, own), (first, extras))
        extras = {**own, **extras}
        average.add(state)
    mean = average.mean()
    with out.temporary():
        out.write(mean, extras)
        out.publish()
    print(f'{out.path}: average of {len(args.files)} checkpoints, {len(mean) - len(average.same)} of {len(mean)} '
          'tensors differed')


def _check_same(path: str, first_path: str, given: tuple[dict, dict], first: tuple[dict, dict]) -> None:
    """Raise UserError at the first key in which two checkpoints differ."""
    from models.weights.averaging import difference_of

    (state, extras), (first_state, first_extras) = given, first
    differences = list(filter(None, [difference_of(state, first_state)]))
    differences += [f'{entry}: {extras[entry]} and {first_extras[entry]}'[:200]
                    for entry in extras.keys() & first_extras.keys() if extras[entry] != first_extras[entry]]
    if differences:
        raise UserError(f'{path} and {first_path} differ in {differences[0]}; average checkpoints of one model')


def strip_checkpoint(args) -> None:
    """Write only the weights, and print the hash by which timm checks downloads."""
    out = Output(args.out, args.force or args.hash)
    source = Checkpoint(args.file, args.use_ema, args.weights_key)
    with out.temporary() as temporary:
        out.write(source.weights.state, source.extras(source.find_name()))
        with open(temporary, 'rb') as file:
            digest = hashlib.file_digest(file, 'sha256').hexdigest()
        if args.hash:
            out.path = out.path.with_name(f'{out.path.name.removesuffix(out.suffix)}-{digest[:8]}{out.suffix}')
        out.force = args.force
        out.publish()
    print(f'{out.path}: {len(source.weights.state)} tensors from {source.weights.entry or "the state dict"}, '
          f'{out.path.stat().st_size / 1e6:,.1f} MB\nsha256 {digest}\nhash   {digest[:8]}')


# --- Files ------------------------------------------------------------------------------------------------------------

class Output:
    """OUT, a file or folder that gets its name only when it is complete.

    Raises:
        UserError: before any work, if it cannot or must not be written.
    """

    def __init__(self, path: str, force: bool, is_folder: bool = False):
        self.path, self.force, self.is_folder = Path(path), force, is_folder
        self.suffix = next((end for end in SUFFIXES if self.path.name.endswith(end) and self.path.name != end), '')
        self.check()

    def check(self) -> None:
        if not self.path.absolute().name:
            raise UserError(f'OUT is {str(self.path)!r}, the root of the disk; give a file or folder in it')
        if not self.is_folder and (not self.suffix or self.path.is_dir()):
            raise UserError(f'OUT is {str(self.path)!r}; give a {ENDINGS}')
        for path in self.targets():
            if path.exists() and not self.force:
                raise UserError(f'{path} exists; give another name, or --force to overwrite it')

    def targets(self) -> list[Path]:
        return [self.path / WEIGHTS, self.path / CONFIG] if self.is_folder else [self.path]

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """Yield a path beside OUT, on the same disk, for a file or folder that is removed in the end."""
        self._temporary = path = self.path.absolute().with_name(f'.{self.path.name}.{os.getpid()}.tmp')
        try:
            with self._explained():
                path.parent.mkdir(parents=True, exist_ok=True)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what writers raise if a disk is full or a folder is read-only into a UserError."""
        import safetensors
        try:
            yield
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            reason = f'{type(error).__name__}: {error}'.splitlines()[0][:160]
            raise UserError(f'{self.path} cannot be written ({reason}); check the space and the permissions') from error

    def write(self, state: dict, extras: dict, dtype: str | None = None) -> None:
        """Write weights and extras to the temporary path, in the format of OUT's name."""
        import torch

        from models.runtimes import pack_safetensors
        state = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        if dtype:
            state = {key: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
                     for key, tensor in state.items()}
        path = self._temporary / WEIGHTS if self.is_folder else self._temporary
        with self._explained(), open(path, 'wb') as file:
            if self.is_folder or self.suffix == '.safetensors':
                file.write(pack_safetensors(state, extras))
            else:
                torch.save({'state_dict': state, **extras}, file)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give what was written its name."""
        self.check()
        with self._explained():
            if self.is_folder:
                self.path.mkdir(exist_ok=True)
            for target in self.targets():
                os.replace(self._temporary / target.name if self.is_folder else self._temporary, target)


def main(arguments: list[str] | None = None) -> None:
    args = create_parser().parse_args(arguments)
    for file in getattr(args, 'files', None) or [args.file]:
        check_checkpoint(file)
    say_at_once('checkpoint.py: loading torch …')
    args.run(args)


if __name__ == '__main__':
    logging.getLogger('timm').setLevel(logging.ERROR)  # it notes that one channel has no mean of its own
    run_script(main)
