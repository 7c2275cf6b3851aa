"""Check a long run before it starts: data, speed, memory, time, cost, disk, processes and recipe, on one page.

    python tools/doctor /data/imagenet -c configs/t2t_vit_14.yaml --processes 8 --price 2.50
    python tools/doctor -c configs/demo.yaml --quick

It takes the options of train.py: put the command of the run behind it. Each line of the page has a mark: ok; look,
something is wasted or may be meant otherwise; stop, the run would end early or its result be wrong; fail, the check
itself crashed, and its traceback is on standard error. It takes about a minute, and writes nothing into the data. Exit
code: 0, 1 if a line says stop or fail, 2 for a mistake in the options.
"""
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from options.checks import share_global_batch
from options.parser import parse_options
from options.scripts import QUICK_SAMPLES, SAMPLES, doctor_parser
from tools.doctor.case import Case, Rates, Splits
from utils.console import plural
from utils.script import run_script

log = logging.getLogger('__main__')

SECONDS, QUICK_SECONDS = 10.0, 1.0


def main():
    args = parse_options(doctor_parser())

    import torch

    from data.pipeline import check_training_input
    from engine.checks import check_run_options
    from models import check_teacher, resolve_model
    from tools.doctor import findings as page
    from tools.doctor.data import look_at_data, open_splits
    from tools.doctor.disk import look_at_disk
    from tools.doctor.images import look_at_images
    from tools.doctor.memory import look_at_memory
    from tools.doctor.processes import look_at_processes
    from tools.doctor.recipe import look_at_recipe
    from tools.doctor.schedule import look_at_schedule
    from tools.doctor.speed import look_at_rates
    from utils.console import ROOMS, progress_bar
    from utils.results import results_stem, write_results
    from utils.runtime import describe_environment, start

    # --- Mistakes in the options, before anything is measured ---------------------------------------------------------
    world, precision = start(args, alone=True)
    for room in (*ROOMS, 'py.warnings'):
        logging.getLogger(room).setLevel(logging.ERROR)  # the page has the rest
    gpus = torch.cuda.device_count() if world.device.type == 'cuda' else 0
    processes = args.processes or gpus or 1
    args = share_global_batch(args, processes)
    args, _ = resolve_model(args)
    check_teacher(args)
    check_training_input(args)
    with tempfile.TemporaryDirectory() as folder:  # the section on the disk checks the run's own folder
        check_run_options(args.replacing(output=folder), world, kind='train')
    stem = args.results_file and results_stem(args, args.results_file, '--results-file', 'doctor')
    case = Case(args, world, precision, processes, together=args.processes or gpus or 2,
                samples=QUICK_SAMPLES if args.quick else SAMPLES, seconds=QUICK_SECONDS if args.quick else SECONDS)

    # --- The page, section by section ---------------------------------------------------------------------------------
    log.info('a run of %s at %s pixels: %s of %s, %s a step', args.model, args.img_size,
             plural(processes, 'process', 'processes'), plural(args.batch_size, 'image'),
             plural(processes * args.batch_size * args.accum_steps, 'image'))
    sections = [page.Section('Data', look_at_data),
                page.Section('Images', look_at_images),
                page.Section('Images per second', look_at_rates),
                page.Section('Memory', look_at_memory),
                page.Section('Time and cost', look_at_schedule),
                page.Section('Disk', look_at_disk),
                page.Section('Processes', look_at_processes),
                page.Section('Recipe', look_at_recipe)]
    known: dict[type, Any] = {Case: case, Splits: open_splits(case)}
    found = {}
    with progress_bar(total=len(sections), desc='doctor', unit='section') as bar:
        for number, section in enumerate(sections, 1):
            bar.set_postfix_str(section.title)
            found[section.title] = page.examine(section, known, sections)
            log.info(page.section_text(number, section.title, found[section.title]))
            bar.update()
    everything = [finding for findings in found.values() for finding in findings]
    summary = page.summary(everything, known[Rates].starving if Rates in known else
                           'Not known: loader and training step could not both be measured.')
    log.info(page.summary_text(summary))

    # --- For programs -------------------------------------------------------------------------------------------------
    if stem:
        details = [{'section': title, **finding._asdict()} for title, findings in found.items() for finding in findings]
        rows = [{name: row[name] for name in ('section', 'mark', 'title', 'figure', 'remedy')} for row in details]
        write_results(stem, {'options': args.as_dict(), 'environment': describe_environment(world.device),
                             'findings': details, 'summary': summary}, rows, '--results-file')
    for finding in everything:
        if 'traceback' in finding.numbers:
            print(f'\n{finding.title}: {finding.numbers["traceback"]}', end='', file=sys.stderr)
    if any(finding.mark in (page.STOP, page.FAIL) for finding in everything):
        raise SystemExit(1)


if __name__ == '__main__':
    run_script(main)
