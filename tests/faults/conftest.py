"""Keeps what the fault tests measured, for the scorecard: T2T_FIGURES names a JSON file."""
import json
import os
import signal
from pathlib import Path

_results: dict[str, dict] = {}

# Whoever starts the tests in the background has these ignored, which what they start would inherit, and respect.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_runtest_logreport(report) -> None:
    """Notes the outcome of every test, with what it recorded by record_property; the worst of its phases counts."""
    known = _results.setdefault(report.nodeid.split('::', 1)[1], {'outcome': 'passed', 'seconds': 0.0})
    known['seconds'] = round(known['seconds'] + report.duration, 1)
    if report.outcome != 'passed':
        known['outcome'] = report.outcome
    known.update(report.user_properties)


def pytest_sessionfinish() -> None:
    # Where several processes run the tests, the one that started them hears of all.
    if (path := os.environ.get('T2T_FIGURES')) and 'PYTEST_XDIST_WORKER' not in os.environ:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_results, indent=1) + '\n')
