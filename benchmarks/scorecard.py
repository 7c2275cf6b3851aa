"""Writes the scorecard of reliability, benchmarks/results/reliability.md, from what was measured.

    make test-faults                                 # leaves output/faults.json
    python benchmarks/saving.py --output benchmarks/results/saving.json
    python benchmarks/soak.py --faults 50 --seed 1   # leaves benchmarks/results/soak.json, and writes the scorecard
    python benchmarks/scorecard.py                   # writes it again

A row whose tests did not all pass, or that was not measured, says so.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks/results'
FAULTS = 'pytest tests/faults'

# What is to be shown, its goal, the tests that show it (a pattern of their names), the figure they hold when they pass.
ROWS = (
    ('differing bytes after SIGKILL and resume, same world size (weights, EMA, optimizer, RNG)', '0',
     'test_a_killed_process_costs_no_byte|test_a_crash_of_a_process', '0'),
    ('kill to next training step', '≤ 15 s', 'test_a_killed_process_costs_no_byte',
     '{seconds from kill to next training step} s'),
    ('steps lost: SIGTERM / SIGKILL', '0 / at most the save interval',
     'test_a_signal_loses_no_step|test_processes_save_and_end_with_a_launcher_that_dies|test_a_killed_process',
     '0 / those since the last save'),
    ('loadable checkpoint after a kill at every point of a save', '200 of 200', 'test_two_hundred_kills', '200 of 200'),
    ('corruptions detected', '200 of 200', 'test_two_hundred_damaged_files', '200 of 200'),
    ('orphans after 8 kinds of signal', '0',
     'test_a_signal_loses_no_step|test_processes_save_and_end|test_a_crash_of_a_process|test_a_pause|'
     'test_a_launcher_that_is_killed', '0 after 9 kinds'),
    ('non-finite checkpoints written', '0', 'test_one_bad_step|test_nan_that_stays|test_a_bad_step', '0'),
    ('kinds of bad image handled and counted', '12 of 12', 'test_every_kind_is_handled|test_there_are_twelve_kinds',
     '27 of 27 (16 bad, 11 odd)'),
    ('error in the count of evaluated images', '0', 'test_evaluation_is_exact',
     '0 for 1 … 33 images on 1 and 2 processes'),
    ('tracebacks on user errors', '0', 'test_a_mistake_is_one_line|test_a_mistake_that_the_data_tells', '0'),
    ('canaries executed, 30 pickles', '0', 'test_no_pickle_is_executed|test_there_are_thirty_pickles|'
     'test_damaged_pickles', '0 (in 3 containers each, and 15,000 damaged ones)'),
    ('bad YAML accepted, 25', '0', 'test_a_bad_recipe|test_damaged_recipes', '0 of 47 (and 3,000 damaged ones)'),
    ('loss gap from 1 to 2 processes, 100 steps', '≤ 1e-5', 'test_one_and_two_processes',
     '{loss gap from 1 to 2 processes}'),
)


def measured_by_tests(results: dict, pattern: str, figure: str) -> tuple[str, str]:
    """The figure of a row, and the command that shows it; or how many of its tests did not pass."""
    tests = {name: result for name, result in results.items() if re.match(pattern, name)}
    command = f'`{FAULTS} -k "{" or ".join(pattern.split("|"))}"`'
    failed = [name for name, result in tests.items() if result['outcome'] != 'passed']
    if not tests or failed:
        return f'**not shown**: {len(failed)} of {len(tests)} tests did not pass', command
    recorded = {name: value for result in tests.values() for name, value in result.items()}
    return figure.format(**recorded) + f' ({len(tests)} tests)', command


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def rows() -> list[tuple[str, str, str, str]]:
    """What, goal, figure, command."""
    results = read(ROOT / 'output/faults.json')
    table = [(what, goal, *measured_by_tests(results, pattern, figure)) for what, goal, pattern, figure in ROWS]

    saving = read(RESULTS / 'saving.json')
    figure = '**not measured**'
    if saving:
        figure = f'{saving["lost_percent"]:.2f} %, one save per {saving["interval_seconds"]:g} s'
    table.append(('training time lost to saving, batches of 0.2 s, 64 M parameters', '≤ 1 %', figure,
                  '`python benchmarks/saving.py`'))

    soak = read(RESULTS / 'soak.json')
    command = f'`{soak["command"]}`' if soak else '`python benchmarks/soak.py`'
    same = soak and not soak['tensors_that_differ'] and not soak['log_lines_that_differ']
    killed = sum('kill' in fault['plan'] for fault in soak['faults']) if soak else 0
    table += [
        ('differences in the loss log over 20 random kills', '0',
         f'{soak["log_lines_that_differ"]} of {soak["log_lines"]} lines over {killed} kills' if soak else
         '**not measured**', command),
        ('samples repeated or skipped over 20 kills', '0',
         f'0 in folders: every tensor and log line is equal over {killed} kills. There are no shards yet' if same else
         '**not shown**', command),
        (f'{soak.get("epochs", 310)}-epoch run of a tiny model with {len(soak.get("faults", ()))} random faults',
         'same final state', 'same final state' if same else '**another final state, or not measured**', command),
    ]
    return table


def write_scorecard(path: Path = RESULTS / 'reliability.md') -> str:
    """Writes the scorecard and returns it."""
    soak = read(RESULTS / 'soak.json')
    machine = ', '.join(f'{name} {soak[name]}' for name in ('device', 'python', 'torch', 'timm') if name in soak)
    lines = ['# Reliability', '', f'Written by `python benchmarks/scorecard.py`; {machine}.', '',
             '| what | goal | measured | command |', '|---|---|---|---|']
    lines += ['| ' + ' | '.join(cell.replace('|', '\\|') for cell in row) + ' |' for row in rows()]
    text = '\n'.join(lines) + '\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return text


if __name__ == '__main__':
    text = write_scorecard()
    print(text, end='')
    sys.exit('**' in text)
