"""benchmarks/reliability/scorecard.py: figures are those of the tests' record; what was not shown says so."""
import ast

import pytest

from benchmarks.reliability.scorecard import ROOT, ROWS, measured_by_tests

RESULTS = {
    'test_a[x]': {'outcome': 'passed', 'seconds': 1.0, 'kills': 1200, 'signal': 'SIGTERM'},
    'test_a[y]': {'outcome': 'passed', 'seconds': 2.0, 'kills': 34, 'signal': 'SIGINT'},
    'test_b': {'outcome': 'passed', 'seconds': 1.0, 'signal': 'SIGINT', 'gap': 1.5},
    'test_c': {'outcome': 'failed', 'seconds': 1.0},
}


@pytest.mark.parametrize(('pattern', 'figure', 'shown'), [
    ('test_a|test_b', '{kills} of {test_a}, {signal}, {gap} s', '1,234 of 2, SIGINT, SIGTERM, 1.5 s (3 tests)'),
    ('test_b', '0', '0 (1 test)'),
    ('test_a|test_c', '0', '**not shown**: 1 of 3 tests did not pass'),
    ('test_d', '0', '**not shown**: its tests have not run'),
    ('test_b', '{kills}', "**not shown**: no test recorded 'kills'"),
])
def test_figures_are_recorded_ones(pattern, figure, shown):
    found, command = measured_by_tests(RESULTS, pattern, figure)
    assert found == shown and command.endswith(f'-k "{" or ".join(pattern.split("|"))}"`')


def test_every_row_has_its_tests():
    names = [node.name for path in (ROOT / 'tests/faults').glob('test_*.py')
             for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))) if isinstance(node, ast.FunctionDef)]
    parts = [part for _, _, pattern, _ in ROWS for part in pattern.split('|')]
    assert [part for part in parts if not any(name.startswith(part) for name in names)] == []
