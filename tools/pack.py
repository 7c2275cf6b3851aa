"""Pack images into tar shards, which all scripts read like folders; check shards; unpack ImageNet's archives.

    python tools/pack.py /data/imagenet /shards/imagenet                  # train/ and val/, files as they are
    python tools/pack.py /data/imagenet /shards/small --short-side 256    # training images resized once
    python tools/pack.py --verify /shards/imagenet                        # every byte; with --decode, every image
    python tools/pack.py --index /shards/from_elsewhere                   # a manifest for shards as they are
    python tools/pack.py ILSVRC2012_img_val.tar /shards/imagenet --devkit ILSVRC2012_devkit_t12.tar.gz
    python tools/pack.py /archives /data/imagenet --to folders                       # both archives, as class folders

FOLDER holds class folders, or splits of them (train/, val/), or ImageNet's archives. After an interruption the same
command continues. Equal images and options give equal bytes, whatever -j. Files are copied unchanged.

--short-side decodes larger images and saves them again, once. At 256 and quality 95, ImageNet photographs (mean 472 ×
397) take 37 % of their bytes, at 38 dB PSNR against the resized image; at quality 90, 26 % and 36 dB. Of several splits
only train is resized, because published accuracies are those of unchanged evaluation images.

Exit code 1: --verify has found an error.
"""
import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from options.parser import Parser
from options.paths import check_data
from options.types import count, number, positive, positive_int, seed
from utils.console import printable, say_at_once
from utils.errors import EXIT_CTRL_C, UserError
from utils.exits import report
from utils.script import run_script

EXIT_FAULTS = 1


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('source', metavar='FOLDER', help='class folders, splits of them, an archive of ImageNet, or shards')
    add('out', metavar='OUT', nargs='?', help='folder for the shards; each split gets a folder in it')
    add('--split', metavar='NAME', action='append', help='pack only this split; may be repeated (default: all)')
    add('--to', choices=('shards', 'folders'), default='shards', help='what ImageNet\'s archives become')
    add('--devkit', metavar='FILE', help='ILSVRC2012_devkit_t12.tar.gz, if it is not beside the archives')
    add('--short-side', type=positive_int, metavar='N', help='pixels; larger images are resized to it')
    add('--quality', type=number(int, low=1, high=100), default=95, metavar='N', help='JPEG quality of resized images '
        '(default: 95)')
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--shard-size', type=positive, default=256, metavar='MB',
                      help='approximate size of each shard (default: 256)')
    size.add_argument('--samples', type=positive_int, metavar='N', help='instead: images in each shard')
    add('--seed', type=seed, default=0, metavar='N', help='seed of the order of the images (default: 0)')
    add('-j', '--jobs', type=positive_int, metavar='N', help='processes (default: one per core)')
    add('--decode', action='store_true', help='decode every image, not only its header')
    add('--max-bad-images', type=count, default=0, metavar='N',
        help='leave out up to N bad images; the manifest lists them (default: 0)')
    add('--verify', action='store_true', help='check shards; with OUT, check the archives\' MD5 and what was packed')
    add('--index', action='store_true', help='write a manifest for shards made elsewhere, which stay unchanged')
    add('--class-map', metavar='FILE', help="with --index: names for numbered classes; 'imagenet' for ImageNet's")
    add('--shard-timeout', type=positive, default=300, metavar='S', help='with --verify: seconds without an answer '
        'from a server (default: 300)')
    return parser


# Options that have no effect in each task.
PACKING = ('short_side', 'quality', 'shard_size', 'samples', 'seed', 'max_bad_images')
UNUSED = {'--index': (*PACKING, 'out', 'split', 'to', 'devkit'), '--verify without OUT': (*PACKING, 'to', 'devkit'),
          '--to folders': (*PACKING, 'decode')}


def check_options(args, parser: argparse.ArgumentParser) -> None:
    """Raise UserError for options that would have no effect."""
    if args.out is None and not (args.verify or args.index):
        raise UserError('OUT is missing; give the folder for the shards (or --verify, to check shards)')
    if args.class_map and not args.index:
        raise UserError('--class-map belongs to --index: class folders have names')
    task = ('--index' if args.index else '--verify without OUT' if args.out is None
            else '--to folders' if args.to == 'folders' else 'packing')
    unused = [(name, task) for name in UNUSED.get(task, ())]
    if args.short_side is None:
        unused.append(('quality', 'packing without --short-side'))
    if not args.verify:
        unused.append(('shard_timeout', 'a command without --verify'))
    if args.index and not args.verify:
        unused.append(('decode', '--index without --verify'))
    for name, what in unused:
        if getattr(args, name) != parser.get_default(name):
            option = 'OUT' if name == 'out' else f'--{name.replace("_", "-")}'
            raise UserError(f'{option} {getattr(args, name)}: it has no effect on {what}; leave it out')


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack_all(args) -> list:
    """Pack, or unpack, every split; return their places."""
    from data.places import parse_folder
    from data.shards.packing import pack
    from data.shards.plan import Recipe
    from data.shards.unpacking import unpack
    args.out = _check_out(args.out)
    inputs = _open_inputs(args)
    if args.to == 'folders' and not all(hasattr(images.dataset, 'archive') for images in inputs.values()):
        raise UserError(f'{args.source}: --to folders is for the archives of ImageNet; these are folders already')
    places = []
    for split, images in inputs.items():
        out, started = Path(args.out, split), time.monotonic()
        if args.to == 'folders':
            written, size = unpack(images, out, jobs=args.jobs), int(images.size.sum())
            _say(out, f'{written:,} images of {len(images.dataset.classes)} classes', size, size, started)
            continue
        is_resized = split == 'train' or len(inputs) == 1
        recipe = Recipe(args.short_side if is_resized else None, args.quality, round(args.shard_size * 1e6),
                        args.samples, args.seed, args.decode)
        manifest = pack(images, out, recipe, jobs=args.jobs, max_bad_images=args.max_bad_images)
        _say(out, f'{len(manifest.index):,} images of {len(manifest.classes)} classes in {_shards(manifest)}',
             int(images.size.sum()), sum(shard.bytes for shard in manifest.shards), started)
        if manifest.left_out:
            print(f'  {len(manifest.left_out)} bad images are left out; the manifest names them')
        if (loss := manifest.transcoded) and loss['images']:
            psnr = f'; PSNR {loss["psnr_db"]:.1f} dB (of {loss["psnr_images"]})' if loss['psnr_db'] is not None else ''
            print(f'  {loss["images"]:,} images resized to {loss["short_side"]}, quality {loss["quality"]}: '
                  f'{loss["bytes_before"] / 1e6:,.1f} → {loss["bytes_after"] / 1e6:,.1f} MB{psnr}')
        places.append(parse_folder(str(out)))
    return places


def _say(out: Path, what: str, read: int, written: int, started: float) -> None:
    print(f'{out}: {what}; {read / 1e6:,.1f} MB in, {written / 1e6:,.1f} MB out, {time.monotonic() - started:.1f} s',
          flush=True)


def _shards(manifest) -> str:
    return f'{len(manifest.shards):,} shard' + 's' * (len(manifest.shards) != 1)


def _check_out(out: str) -> str:
    """Return the path of OUT. Raises UserError, before anything is read, if it is remote or cannot be written."""
    from data.places import parse_folder
    from utils.disk import check_writable
    place = parse_folder(out)
    if place.is_remote:
        raise UserError(f'{out}: shards are written to a folder of this machine; give one, and copy it there')
    check_writable(Path(place.path), 'OUT')
    return place.path


def _open_inputs(args) -> dict:
    """Return the images to pack by the names of their splits; '' if FOLDER is a split itself."""
    from data.classes import match_classes
    from data.places import parse_folder
    from data.shards.ilsvrc import ARCHIVES, check_md5, open_archive
    from data.shards.plan import archive_input, folder_input
    place = parse_folder(args.source)
    given = place.path
    archives = [given] if os.path.isfile(given) else [
        os.path.join(given, name) for split, name in ARCHIVES.items()
        if os.path.isfile(os.path.join(given, name)) and split in (args.split or ARCHIVES)]
    if archives:
        opened = [open_archive(path, args.devkit) for path in archives]
        found = [archive.split for archive in opened]
        if missing := [name for name in args.split or () if name not in found]:
            raise UserError(f'--split {missing[0]}: {given} is, or holds, the archive of {" and ".join(found)} alone')
        for archive in opened if args.verify else ():
            check_md5(archive.archive, archive.split)
        return {archive.split: archive_input(archive) for archive in opened}
    if args.devkit:
        raise UserError(f'--devkit {args.devkit}: it belongs to the archives {" and ".join(ARCHIVES.values())}, and '
                        f'{given} holds neither')
    if Path(args.out).resolve().is_relative_to(Path(given).resolve()):
        raise UserError(f'{args.out} lies in {given}, and would be read as a part of it; name another folder')
    folders = {split: place.join(split) if split else place for split in _splits(place, args.split)}
    for folder in folders.values():
        if folder.has_manifest():
            raise UserError(f'{folder} holds shards already; to check them: --verify {folder}')
    inputs = {split: folder_input(folder.path) for split, folder in folders.items()}
    if 'train' in inputs:
        for split, images in inputs.items():
            match_classes(images.dataset, inputs['train'].dataset.classes, where=f'{given}/{split}',
                          map_source=f'{given}/train')
    return inputs


def _splits(place, asked: list[str] | None) -> list[str]:
    """Return the names of the splits in a folder, or [''] if it is a split itself."""
    from data.folders import require_folder
    from data.places import EVAL_SPLITS
    require_folder(place.path)
    if missing := [name for name in asked or () if not place.join(name).is_folder()]:
        raise UserError(f'--split {missing[0]}: no such folder in {place}')
    return list(dict.fromkeys(asked or ())) or [
        name for name in ('train', *EVAL_SPLITS) if place.join(name).is_folder()] or ['']


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def verify_all(splits: list, args) -> bool:
    """Check splits and print what is wrong with them; return whether all is well."""
    import numpy as np

    from data.shards.verifying import verify_shards
    is_well = True
    for split in splits:
        manifest, faults = verify_shards(split, jobs=args.jobs, decode=args.decode, patience=args.shard_timeout)
        what = 'all well'
        if faults:
            what = f'{len(faults)} faults' if len(faults) > 1 else 'a fault'
            is_well = False
        if manifest:
            counts = np.bincount(manifest.index.target, minlength=len(manifest.classes))
            size = sum(shard.bytes for shard in manifest.shards)
            what = (f'{len(manifest.index):,} images of {len(manifest.classes)} classes, {counts.min()} to '
                    f'{counts.max()} of each, in {_shards(manifest)} of {size / 1e6:,.1f} MB: {what}')
        print(printable(f'{split}: {what}'))
        width = max((len(file) for file, _ in faults), default=0)
        for file, fault in faults:
            print(printable(f'  {file:<{width}}  {fault}'))
    return is_well


def _packed_splits(args) -> list:
    """Return the place of FOLDER itself, or of the splits in it that have a manifest."""
    from data.folders import require_folder
    from data.places import EVAL_SPLITS, parse_folder
    from data.shards.manifest import MANIFEST
    from data.shards.verifying import has_split
    place = parse_folder(args.source)
    names = ['train', *EVAL_SPLITS]
    if not place.is_remote:
        require_folder(place.path)
        names = sorted(path.parent.name for path in Path(place.path).glob(f'*/{MANIFEST}'))
    if args.split:
        return [place.join(name) for name in args.split]
    if has_split(place, args.shard_timeout):
        return [place]
    return [split for split in map(place.join, names) if has_split(split, args.shard_timeout)] or [place]


def index(args) -> list:
    """Write the manifest of shards that were made elsewhere."""
    from data.classes import read_class_map
    from data.folders import require_folder
    from data.places import parse_folder
    from data.shards.verifying import index_folder
    folder = parse_folder(args.source)
    require_folder(folder.path)
    manifest = index_folder(folder, jobs=args.jobs, classes=args.class_map and read_class_map(args.class_map))
    print(f'{folder}: {len(manifest.index):,} images of {len(manifest.classes)} classes in {_shards(manifest)}')
    return [folder]


def main(arguments: list[str] | None = None) -> None:
    parser = create_parser()
    args = parser.parse_args(arguments)
    check_options(args, parser)
    if args.out is not None:
        check_data(args.source)
    say_at_once('pack.py: loading torch …')
    try:
        from utils.console import setup_logging
        from utils.parallel import available_cores
        setup_logging(is_main=True)
        args.jobs = args.jobs or available_cores()
        splits = index(args) if args.index else pack_all(args) if args.out is not None else _packed_splits(args)
        if args.verify and not verify_all(splits, args):
            sys.exit(EXIT_FAULTS)
    except KeyboardInterrupt:
        goes_on = '; the same command goes on' if args.out is not None else ''
        report(f'pack.py: interrupted{goes_on}', EXIT_CTRL_C)


if __name__ == '__main__':
    run_script(main)
