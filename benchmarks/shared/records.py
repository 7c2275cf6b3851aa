"""What every measurement has in common: where its record goes, what that says of the machine, how it is written."""
import json
import platform
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from utils.console import format_seconds
from utils.disk import ROOT, check_writable, make_folder, write_whole
from utils.errors import UserError
from utils.results import finite
from utils.runtime import Precision, describe_environment

PRECISIONS = {'fp32': 'auto', 'bf16': 'bfloat16', 'fp16': 'float16'}


def record_options(parser, name: str) -> None:
    """--output and --name, of which the default is the benchmark's own."""
    add = parser.add_argument_group('Record').add_argument
    add('--output', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder of the files')
    add('--name', default=name, metavar='NAME', help='of the files')


def check_record_options(args) -> Path:
    """The folder that --output names; raises UserError where --output or --name cannot be written to."""
    if Path(args.name).name != args.name:
        raise UserError(f'--name {args.name}: give a name without a folder; the folder is --output')
    folder = Path(args.output).expanduser()
    check_writable(folder, '--output')
    return folder


def precision_of(name: str, device: torch.device) -> Precision:
    """The precision of PRECISIONS that a table calls `name`, with a scaler of its own."""
    return Precision(device, enabled=name != 'fp32', dtype_name=PRECISIONS[name])


def check_precisions(names: Iterable[str], device: torch.device) -> None:
    """Raises UserError where one of `names`, of PRECISIONS, is none that the device computes in."""
    if 'fp16' in names and device.type == 'cpu':
        raise UserError('--precision fp16: a CPU computes in fp32 or bf16; leave it out')


def new_record(module: str, args, device: torch.device, data: str | None = None) -> dict:
    """What every record begins with: the command, the machine and the options; `data` is the folder of images."""
    return {'command': describe_command(module, data), 'machine': describe_machine(device),
            'options': describe_options(args)}


def origin(record: dict) -> str:
    """Where a record comes from, in a sentence; in how many seconds, where it says that too."""
    machine = ', '.join(f'{name} {value}' for name, value in record['machine'].items() if value is not None)
    seconds = f' in {format_seconds(record["seconds"])}' if 'seconds' in record else ''
    return f'Written by `{record["command"]}`{seconds}; {machine}.'


def describe_machine(device: torch.device) -> dict:
    """`describe_environment`, with the time, the processor, the threads that torch uses and its float32 products."""
    return {
        'time': datetime.now(UTC).isoformat(timespec='seconds'), **describe_environment(device),
        'processor': _processor(), 'threads': torch.get_num_threads(),
        **({'cuda': torch.version.cuda} if device.type == 'cuda' else {}),
        'float32_matmul_precision': torch.get_float32_matmul_precision()}


def _processor() -> str:
    """The name of the CPU, as Linux tells it, else its kind."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe_command(module: str, data: str | None = None) -> str:
    """The command that measures, with `_portable` words; `data` is its folder of images."""
    return shlex.join(['python', '-m', f'benchmarks.{module}', *(_portable(word, data) for word in sys.argv[1:])])


def describe_options(args) -> dict:
    """The options of a measurement by name, with `_portable` values."""
    asked = args.as_dict()
    return {name: _portable(value, asked.get('data')) if isinstance(value, str) else value
            for name, value in asked.items()}


def _portable(word: str, data: str | None) -> str:
    """PATH or --option=PATH: in the repository as seen from its root; the images, and what is elsewhere, as DIR."""
    option, equals, path = word.rpartition('=')
    if path and path == data:
        path = 'DIR'
    elif Path(path).is_absolute():
        path = str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else 'DIR'
    return option + equals + path


def read_record(path: Path):
    """What a JSON file in the folder --records holds, a record or not.

    Raises:
        UserError: it is no JSON file.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'--records: {path} is no JSON file ({error}); remove it') from None


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns, but for the first, are numbers."""
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(cell.replace('|', '\\|') for cell in line) + ' |' for line in lines)


def write_record(folder: Path, name: str, record: dict, text: str) -> tuple[Path, Path]:
    """Writes NAME.json, the record, and NAME.md, the text, each whole or not at all; returns their paths.

    Numbers that are not finite become null.

    Raises:
        UserError: they cannot be written.
    """
    make_folder(folder, '--output')
    content = json.dumps(finite(record), indent=1, allow_nan=False) + '\n'
    paths = folder / f'{name}.json', folder / f'{name}.md'
    for path, whole in zip(paths, (content, text), strict=True):
        try:
            write_whole(path, whole)
        except OSError as error:
            raise UserError(f'--output: {path} cannot be written ({error.strerror}); name another folder') from None
    return paths
