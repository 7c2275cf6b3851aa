"""Looks a long run over before it is started: data, speed, memory, time, cost, disk, processes, recipe, on one page.

    python tools/doctor /data/imagenet -c configs/t2t_vit_14.yaml --processes 8 --price 2.50
    python tools/doctor -c configs/demo.yaml --quick

It takes the options of train.py: put the command of the run behind it. Each line of the page is marked ok; look, where
something is wasted or may be meant otherwise; stop, where the run would end early or its result be wrong; or fail,
where a check itself crashed, whose traceback then goes to standard error. It takes about a minute, and writes nothing
into the data. Exit code: 0, 1 where something says stop or fail, 2 for a mistake in the options.
"""
import logging
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from options.checks import share_global_batch
from options.parser import Options, parse_options
from options.scripts import QUICK_SAMPLES, SAMPLES, doctor_parser
from utils.errors import UserError
from utils.script import run_script

if TYPE_CHECKING:
    import torch

    from data.base import ImageDataset
    from data.pipeline import TrainingInput
    from engine.state import TrainState
    from utils.distributed import World
    from utils.runtime import Precision

log = logging.getLogger('__main__')

SECONDS, QUICK_SECONDS = 10.0, 1.0


@dataclass
class Case:
    """The run that is looked at, and what each section has found out for those behind it.

    processes: of the run. together: that are started to exchange a gradient. samples: images to decode.
    seconds: for the loader. problem: what train.py would say to the data set, if anything.
    input, state: what train.py would make. steps: (seconds, bytes) by images of a step.
    Rates are images per second: of the loader with the workers of one process (loader_rate) and of all (supply), of the
        model in one process (step_rate, forward_rate), of the run (total_rate).
    """
    args: Options
    world: 'World'
    precision: 'Precision'
    processes: int
    together: int
    samples: int
    seconds: float
    train: 'ImageDataset' = field(init=False)
    val: 'ImageDataset | None' = None
    problem: UserError | None = None
    input: 'TrainingInput' = field(init=False)
    state: 'TrainState' = field(init=False)
    batch: 'tuple[torch.Tensor, torch.Tensor]' = field(init=False)
    eval_batch: 'tuple[torch.Tensor, torch.Tensor] | None' = None
    gradient_bytes: int = 0
    loader_rate: float = 0.0
    eval_loader_rate: float = 0.0
    rate_per_core: float = 0.0
    supply: float = 0.0
    steps: dict[int, tuple[float, int]] = field(default_factory=dict)
    too_large: int | None = None
    step_seconds: float = 0.0
    step_rate: float = 0.0
    forward_rate: float = 0.0
    total_rate: float = 0.0
    total_steps: int = 0
    saved: dict | None = None
    starving: str = 'Not known: loader and training step could not both be measured.'


def main():
    args = parse_options(doctor_parser())

    import torch

    from data.pipeline import check_training_input
    from engine.checks import check_run_options
    from models import resolve_name
    from tools.doctor import data as doctor_data, findings as doctor_page, schedule as doctor_run, speed as doctor_speed
    from utils.console import progress_bar
    from utils.results import results_stem, write_results
    from utils.runtime import describe_environment, start

    # --- What is wrong with the options, before anything is looked at -------------------------------------------------
    world, precision = start(args, alone=True)
    for room in ('data', 'models', 'engine', 'utils', 'py.warnings'):
        logging.getLogger(room).setLevel(logging.ERROR)  # what they would say is on the page
    gpus = torch.cuda.device_count() if world.device.type == 'cuda' else 0
    processes = args.processes or gpus or 1
    args = share_global_batch(args, processes)
    resolve_name(args.model)
    check_training_input(args)
    with tempfile.TemporaryDirectory() as folder:  # the run's own is for the page to speak of
        check_run_options(args.replacing(output=folder), world, kind='train')
    stem = args.results_file and results_stem(args, args.results_file, '--results-file', 'doctor')
    case = Case(args, world, precision, processes, together=args.processes or gpus or 2,
                samples=QUICK_SAMPLES if args.quick else SAMPLES, seconds=QUICK_SECONDS if args.quick else SECONDS)

    # --- The page, a section at a time --------------------------------------------------------------------------------
    log.info('a run of %s at %s pixels: %s of %s, %s a step', args.model, args.img_size,
             doctor_page.plural(processes, 'process', 'processes'), doctor_page.plural(args.batch_size, 'image'),
             doctor_page.plural(processes * args.batch_size * args.accum_steps, 'image'))
    doctor_data.open_splits(case)
    sections = {'Data': doctor_data.look_at_data, 'Images': doctor_data.look_at_images,
                doctor_speed.RATES: doctor_speed.look_at_rates, 'Memory': doctor_speed.look_at_memory,
                'Time and cost': doctor_run.look_at_schedule, 'Disk': doctor_run.look_at_disk,
                'Processes': doctor_run.look_at_processes, 'Recipe': doctor_run.look_at_recipe}
    found = {}
    with progress_bar(total=len(sections), desc='doctor', unit='section') as bar:
        for number, (title, look) in enumerate(sections.items(), 1):
            bar.set_postfix_str(title)
            found[title] = doctor_page.examine(title, look, case)
            log.info(doctor_page.section_text(number, title, found[title]))
            bar.update()
    everything = [finding for findings in found.values() for finding in findings]
    summary = doctor_page.summary(everything, case.starving)
    log.info(doctor_page.summary_text(summary))

    # --- For programs -------------------------------------------------------------------------------------------------
    if stem:
        rows = [{'section': title, 'mark': finding.mark, 'title': finding.title, 'figure': finding.figure,
                 'remedy': finding.remedy} for title, findings in found.items() for finding in findings]
        details = [{**row, 'details': list(finding.details), 'numbers': finding.numbers}
                   for row, finding in zip(rows, everything, strict=True)]
        write_results(stem, {'options': args.as_dict(), 'environment': describe_environment(world.device),
                             'findings': details, 'summary': summary}, rows, '--results-file')
    for finding in everything:
        if 'traceback' in finding.numbers:
            print(f'\n{finding.title}: {finding.numbers["traceback"]}', end='', file=sys.stderr)
    if any(finding.mark in (doctor_page.STOP, doctor_page.FAIL) for finding in everything):
        raise SystemExit(1)


if __name__ == '__main__':
    run_script(main)
