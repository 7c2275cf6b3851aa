"""Write a run as one page of HTML: result, curves, options, environment, mistakes, sample predictions, attention.

    python tools/report output/train/demo
    python tools/report output/train/demo -o demo.html --data /data/moved --samples 5000

The page is one file that needs no network. It says what is missing, if the run is in progress or lost its data or
checkpoints.
"""
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from options.parser import Parser
from options.paths import LATEST, check_data
from options.types import count, positive_int
from utils.console import say_at_once
from utils.errors import UserError
from utils.script import run_script

log = logging.getLogger('__main__')


def main():
    # --- Options ------------------------------------------------------------------------------------------------------
    parser = Parser(description='Write a run as one page of HTML.')
    add = parser.add_argument
    add('run', metavar='RUN', help="the run's folder; output/train/latest is the newest")
    add('-o', '--output', metavar='FILE', help='file to write (default: RUN/report.html)')
    add('--data', metavar='DIR', help='folder of the data (default: the one that the run used)')
    add('--samples', type=positive_int, default=2000, metavar='N',
        help='evaluation images to use, evenly spaced over all')
    add('-b', '--batch-size', type=positive_int, default=64, metavar='N', help='images per batch')
    add('-j', '--workers', type=count, default=2, metavar='N', help='data loader processes')
    add('--device', default='auto', metavar='NAME', help='auto (a GPU if there is one), cuda, cuda:1 or cpu')
    given = parser.parse_args()
    if not (folder := Path(given.run)).is_dir() and folder.name != LATEST:
        raise UserError(f'{folder} is no folder; give that of a run, such as output/train/demo')
    if given.data:
        check_data(given.data)
    say_at_once('report: loading torch …')

    from tools.report import sections
    from tools.report.page import note, page
    from utils.disk import check_writable, make_folder, write_whole
    from utils.runtime import start
    from utils.weight_sources import find_run

    # --- The run ------------------------------------------------------------------------------------------------------
    folder = find_run(Path(given.run))
    output = Path(given.output or folder / 'report.html')
    run = sections.open_run(folder)
    check_writable(output.parent, '--output')
    args = sections.evaluation_options(run, given)
    world, precision = start(args, alone=True)
    log.info('%s: %d epochs, %d log lines', folder, len(run.epochs), len(run.steps))

    # --- Its model on its data ----------------------------------------------------------------------------------------
    model, evaluated, missing = None, None, ''
    try:
        model, args, classes = sections.open_model(args)
        evaluated = sections.evaluate(model.to(world.device), args, classes, given.samples, world, precision)
    except UserError as error:
        missing = f'Not shown, because it could not be computed: {error}.'
        log.warning('no predictions: %s', error)

    # --- The page -----------------------------------------------------------------------------------------------------
    parts = {'Summary': sections.summary(run, model), 'Curves': sections.curves(run), 'Epochs': sections.epochs(run),
             'Options': sections.used_options(run), 'Environment': sections.environment(run)}
    for title, section in (('Mistakes', sections.mistakes), ('Sample predictions', sections.samples),
                           ('Attention', sections.attention)):
        log.info('%s …', title)
        parts[title] = section(evaluated) if evaluated else note(missing)
    make_folder(output.parent, '--output')
    try:
        write_whole(output, page(*sections.headline(run), parts).encode('utf-8', errors='replace'))
    except OSError as error:
        raise UserError(f'--output {output} cannot be written ({error.strerror}); name another file') from None
    log.info('report: %s (%.1f MB)', output, output.stat().st_size / 1e6)


if __name__ == '__main__':
    run_script(main)
