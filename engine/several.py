"""Several runs of one command: a fold of --k-fold each, or one of --seeds each; then their mean and deviation.

They run one after the other in the processes of the job, each in a folder of its own, EXPERIMENT/fold-1 or
EXPERIMENT/seed-1. So each is resumed, validated and reported as any other run, and --fold makes one of them alone.
"""
import gc
import logging
import statistics
from collections.abc import Callable
from pathlib import Path

from engine.evaluate import METRICS
from utils.distributed import World, raise_on_all_ranks
from utils.errors import InterruptedRun
from utils.results import write_results
from utils.runtime import seed_everything

_logger = logging.getLogger(__name__)


def run_all(args, run: Callable[..., dict], world: World, *, kind: str) -> None:
    """Call run(args) for each run that the options ask for, and sum several up in EXPERIMENT/folds or seeds.json.

    Args:
        run: (options of one run) → its result, as run_training returns it. It lets go of all that it has used.
        kind: 'train' or 'transfer', the part of --output that holds the runs' folders.
    Raises:
        InterruptedRun: a signal stopped one of them; --resume auto goes on there.
    """
    runs = _runs_of(args)
    if args.fold or '' in runs:
        run(*runs.values())
        return
    results = {}
    for number, (name, options) in enumerate(runs.items(), start=1):
        _logger.info('--- %s, run %d of %d ---', name, number, len(runs))
        seed_everything(options.seed, world.rank)  # as if it were the first of this process
        try:
            results[name] = run(options)
        except InterruptedRun as error:
            raise InterruptedRun(error.number, position=f'{error.position} of {name}', folder='auto') from None
        gc.collect()  # models and their optimizers refer to one another
    with raise_on_all_ranks():
        if world.is_main:
            _write(args, results, Path(args.output).expanduser() / kind / args.experiment)


def _runs_of(args) -> dict:
    """Return the options of each run by its name: 'fold-1' …, 'seed-1' …, or '' for a run like any other."""
    if args.seeds:
        runs = {f'seed-{seed}': args.replacing(seed=seed, seeds=None) for seed in args.seeds}
    elif args.k_fold:
        folds = [args.fold] if args.fold else range(1, args.k_fold + 1)
        runs = {f'fold-{fold}': args.replacing(fold=fold) for fold in folds}
    else:
        return {'': args}
    # The args.yaml of a fold repeats it in the same folder.
    return {name: options if not args.experiment or Path(args.experiment).name == name else
            options.replacing(experiment=f'{args.experiment}/{name}') for name, options in runs.items()}


def summarize(results: dict[str, dict]) -> dict[str, dict[str, float | None]]:
    """Return the 'mean' and the 'deviation' of each of METRICS over the results of runs, by name.

    The deviation is that of a sample, divided by n - 1; a single run has none.
    """
    numbers = {name: [result[name] for result in results.values()] for name in METRICS
               if all(result.get(name) is not None for result in results.values())}
    return {'mean': {name: statistics.fmean(values) for name, values in numbers.items()},
            'deviation': {name: statistics.stdev(values) if len(values) > 1 else None
                          for name, values in numbers.items()}}


def _write(args, results: dict[str, dict], folder: Path) -> None:
    summary = summarize(results)
    columns = ('run', 'best_epoch', 'of', *METRICS, 'evaluated_on')
    rows = [{name: row.get(name) for name in columns} for row in (
        {'run': name, **row} for name, row in (results | summary).items())]
    for row in rows[:len(results)]:
        _logger.info('%s: %s', row['run'], ', '.join(f'{name} {row[name]:.4f}' for name in METRICS
                                                      if row[name] is not None))
    _logger.info('mean ± standard deviation of %d runs: %s', len(results), ', '.join(
        f'{name} {mean:.4f}' + ('' if summary['deviation'][name] is None else f' ± {summary["deviation"][name]:.4f}')
        for name, mean in summary['mean'].items()))
    record = {'options': {'seeds': args.seeds, 'k_fold': args.k_fold}, 'runs': results, **summary}
    write_results(folder / ('seeds' if args.seeds else 'folds'), record, rows, '--output')
