"""Records of measurements: the machine and the command that they name, and how they are written and read."""
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from utils.console import format_seconds
from utils.disk import ROOT, make_folder, write_whole
from utils.errors import UserError
from utils.results import finite
from utils.runtime import Precision, describe_environment

PRECISIONS = {'fp32': 'auto', 'bf16': 'bfloat16', 'fp16': 'float16'}


def precision_of(name: str, device: torch.device) -> Precision:
    """Return the precision that PRECISIONS lists as `name`, with its own scaler."""
    return Precision(device, enabled=name != 'fp32', dtype_name=PRECISIONS[name])


def check_precisions(names: Iterable[str], device: torch.device) -> None:
    """Raise UserError if the device does not compute in one of `names`, which are keys of PRECISIONS."""
    if 'fp16' in names and device.type == 'cpu':
        raise UserError('--precision fp16: a CPU computes in fp32 or bf16; leave it out')


def new_record(module: str, args, device: torch.device, data: str | None = None) -> dict:
    """Return the start of a record: command, machine and options; `data` is the folder of images."""
    words = [_portable(word, data) for word in sys.argv[1:]]
    options = {name: _portable(value, data) if isinstance(value, str) else value
               for name, value in args.as_dict().items()}
    return {'command': shlex.join(['python', '-m', f'benchmarks.{module}', *words]),
            'machine': describe_machine(device), 'options': options}


def origin(record: dict) -> str:
    """Say in a sentence which command wrote a record, on which machine and, if recorded, in what time."""
    machine = ', '.join(f'{name} {value}' for name, value in record['machine'].items() if value is not None)
    seconds = f' in {format_seconds(record["seconds"])}' if 'seconds' in record else ''
    return f'Written by `{record["command"]}`{seconds}; {machine}.'


def describe_machine(device: torch.device) -> dict:
    """Describe the environment, the time, the processor, torch's threads and the precision of float32 products."""
    return {
        'time': datetime.now(UTC).isoformat(timespec='seconds'), **describe_environment(device),
        'processor': _processor(), 'threads': torch.get_num_threads(),
        **({'cuda': torch.version.cuda} if device.type == 'cuda' else {}),
        'float32_matmul_precision': torch.get_float32_matmul_precision()}


def _processor() -> str:
    """Return the name of the CPU from Linux, or else its architecture."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def _portable(word: str, data: str | None) -> str:
    """Return PATH or --option=PATH with paths relative to the repository; `data` and outside paths become DIR."""
    option, equals, path = word.rpartition('=')
    if path and path == data:
        path = 'DIR'
    elif Path(path).is_absolute():
        path = str(Path(path).relative_to(ROOT)) if Path(path).is_relative_to(ROOT) else 'DIR'
    return option + equals + path


def read_record(path: Path):
    """Return the content of a JSON file in the folder --records; raise UserError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'--records: {path} is no JSON file ({error}); remove it') from None


def markdown_table(header: list[str], rows: list[list]) -> str:
    """Return a table in Markdown; all columns but the first are aligned to the right."""
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in line) + ' |' for line in lines)


def write_record(folder: Path, name: str, record: dict, text: str) -> list[Path]:
    """Write the record to NAME.json and the text to NAME.md; return both paths.

    Each file is written completely or not at all. Numbers that are not finite become null.
    """
    make_folder(folder, '--output')
    content = json.dumps(finite(record), indent=1, allow_nan=False) + '\n'
    paths = [folder / f'{name}.json', folder / f'{name}.md']
    for path, whole in zip(paths, (content, text), strict=True):
        try:
            write_whole(path, whole)
        except OSError as error:
            raise UserError(f'--output: {path} cannot be written ({error.strerror}); name another folder') from None
    return paths


def save(args, record: dict, text: str, draw: Callable[[dict, Path], None] | None = None) -> list[Path]:
    """Write the record to --output under --name, with its text and the picture that `draw` makes; return all paths."""
    folder = Path(args.output).expanduser()
    paths = write_record(folder, args.name, record, text)
    if draw:
        picture = folder / f'{args.name}.png'
        draw(record, picture)
        paths += [picture] * picture.exists()
    return paths
