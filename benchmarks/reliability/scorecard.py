"""Write the scorecard of reliability, benchmarks/results/reliability.md, from measured results.

    make test-faults                                             # leaves output/faults.json
    python -m benchmarks.reliability.saving
    python -m benchmarks.reliability.soak --faults 50 --seed 1   # also writes the scorecard
    python -m benchmarks.reliability.scorecard                   # writes it again

A row says if its tests did not all pass, or if it was not measured.
"""
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from options.parser import Parser
from utils.disk import ROOT
from utils.errors import UserError
from utils.script import run_script

RESULTS, RECORD = ROOT / 'benchmarks/results', ROOT / 'output/faults.json'
FAULTS = 'pytest tests/faults'

# What is shown, its goal, the tests that show it (a pattern of their names), and the figure when they pass. A figure of
# 0 is what the tests assert. Braces hold what tests recorded, or the number of tests for one part of the pattern.
ROWS = (
    ('differing bytes after SIGKILL and resume, same world size (weights, EMA, optimizer, RNG)', '0',
     'test_a_killed_process_costs_no_byte|test_a_crash_of_a_process', '0'),
    ('kill to next training step', '≤ 15 s', 'test_a_killed_process_costs_no_byte',
     '{seconds from kill to next training step} s'),
    ('steps lost: SIGTERM / SIGKILL', '0 / at most the save interval',
     'test_a_signal_loses_no_step|test_processes_save_and_end_with_a_launcher_that_dies|test_a_killed_process',
     '0 / those since the last save'),
    ('loadable checkpoint after a kill at every point of a save', '200 of 200', 'test_two_hundred_kills',
     '{kills} of {kills}'),
    ('corruptions detected', '200 of 200', 'test_two_hundred_damaged_files', '{damaged files} of {damaged files}'),
    ('orphans after 8 kinds of signal', '0',
     'test_a_signal_loses_no_step|test_processes_save_and_end|test_a_crash_of_a_process|test_a_pause|'
     'test_a_launcher_that_is_killed', '0 after {signal}'),
    ('non-finite checkpoints written', '0', 'test_one_bad_step|test_nan_that_stays|test_a_bad_step', '0'),
    ('kinds of bad or odd image handled and counted', '12 of 12', 'test_every_kind_is_handled',
     '{test_every_kind_is_handled} of {test_every_kind_is_handled}'),
    ('error in the count of evaluated images', '0', 'test_evaluation_is_exact',
     '0 for {images} images on {processes} processes'),
    ('tracebacks on user errors', '0', 'test_a_mistake_is_one_line|test_a_mistake_that_the_data_tells', '0'),
    ('canaries executed, 30 pickles', '0', 'test_no_pickle_is_executed|test_there_are_thirty_pickles|'
     'test_damaged_pickles', '0 of {pickles} in all containers, and of {damaged pickles} damaged ones'),
    ('writes out of place and pickles executed, 15 hostile tar shards', '0',
     'test_hostile_shards_are_refused|test_a_hostile_shard_ends_training',
     '0 of {test_hostile_shards_are_refused}, all refused by name'),
    ('bad YAML accepted, 25', '0', 'test_a_bad_recipe|test_damaged_recipes',
     '0 of {test_a_bad_recipe}; {damaged recipes} damaged ones read or refused in one line'),
    ('loss gap from 1 to 2 processes, 100 steps', '≤ 1e-5', 'test_one_and_two_processes',
     '{loss gap from 1 to 2 processes}'),
    ('samples repeated or skipped over shards: a kill, connections that drop, a server that is away for 20 s', '0',
     'test_a_kill_within_an_epoch_over_shards|test_connections_that_drop|test_a_server_that_is_away',
     '0: every tensor and log line is equal'),
    ('differing bytes of shards after 200 kills of what packs them', '0', 'test_killed_at_200_random_moments',
     '0 over {kills} kills'),
    ('steps lost with one of two machines', '0', 'test_a_lost_node', '0'),
)


def measured_by_tests(results: dict, pattern: str, figure: str) -> tuple[str, str]:
    """Return the figure of a row, or how many of its tests failed, and the command that shows it."""
    tests = {name: result for name, result in results.items() if re.match(pattern, name)}
    parts = pattern.split('|')
    command = f'`{FAULTS} -k "{" or ".join(parts)}"`'
    failed = [name for name, result in tests.items() if result['outcome'] != 'passed']
    if not tests:
        return '**not shown**: its tests have not run', command
    if failed:
        return f'**not shown**: {len(failed)} of {len(tests)} tests did not pass', command
    counts = {part: sum(name.startswith(part) for name in tests) for part in parts}
    count = f' ({len(tests)} {"test" if len(tests) == 1 else "tests"})'
    try:
        return figure.format(**counts, **recorded_by(tests.values())) + count, command
    except KeyError as missing:
        return f'**not shown**: no test recorded {missing}', command


def recorded_by(results: Iterable[dict]) -> dict:
    """Return by name what tests recorded: the sum of whole numbers, or a list of other values."""
    found: dict[str, list] = {}
    for name, value in (item for result in results for item in result.items()):
        found.setdefault(name, []).append(value)
    return {name: f'{sum(values):,}' if all(isinstance(value, int) for value in values) else
            ', '.join(sorted(set(map(str, values)))) for name, values in found.items()}


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def rows() -> list[tuple[str, str, str, str]]:
    """Return (what, goal, figure, command) of each row."""
    results = read(RECORD)
    table = [(what, goal, *measured_by_tests(results, pattern, figure)) for what, goal, pattern, figure in ROWS]

    saving = read(RESULTS / 'saving.json')
    figure = '**not measured**'
    if saving:
        figure = f'{saving["lost_percent"]:.2f} %, one save per {saving["interval_seconds"]:g} s'
    table.append(('training time lost to saving, batches of 0.2 s, 64 M parameters', '≤ 1 %', figure,
                  '`python -m benchmarks.reliability.saving`'))

    soak = read(RESULTS / 'soak.json')
    command = f'`{soak["command"]}`' if soak else '`python -m benchmarks.reliability.soak`'
    same = soak and not soak['tensors_that_differ'] and not soak['log_lines_that_differ']
    killed = sum('kill' in fault['plan'] for fault in soak['faults']) if soak else 0
    table += [
        ('differences in the loss log over 20 random kills', '0',
         f'{soak["log_lines_that_differ"]} of {soak["log_lines"]} lines over {killed} kills' if soak else
         '**not measured**', command),
        ('samples repeated or skipped over 20 kills', '0',
         f'0: every tensor and log line is equal over {killed} kills' if same else '**not shown**', command),
        (f'{soak.get("epochs", 310)}-epoch run of a tiny model with {len(soak.get("faults", ()))} random faults',
         'same final state', 'same final state' if same else '**another final state, or not measured**', command),
    ]
    return table


def write_scorecard(path: Path = RESULTS / 'reliability.md') -> str:
    """Write the scorecard and return it. Raises UserError if the fault tests have left no record."""
    if not RECORD.exists():
        raise UserError(f'{RECORD.relative_to(ROOT)} is missing; run make test-faults first, which writes it')
    soak = read(RESULTS / 'soak.json')
    machine = ', '.join(f'{name} {soak[name]}' for name in ('device', 'python', 'torch', 'timm') if name in soak)
    lines = ['# Reliability', '', f'Written by `python -m benchmarks.reliability.scorecard`; {machine}.', '',
             '| what | goal | measured | command |', '|---|---|---|---|']
    lines += ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows()]
    text = '\n'.join(lines) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return text


def main() -> None:
    Parser(description='Write the scorecard of reliability from what was measured.').parse_args()
    text = write_scorecard()
    print(text, end='')
    sys.exit('**' in text)


if __name__ == '__main__':
    run_script(main)
