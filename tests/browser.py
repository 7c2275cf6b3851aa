"""A real browser for tests of pages: headless Chromium, each module of tests with one of its own and an empty profile.

    CHROMIUM=/usr/bin/chromium T2T_BROWSER=required pytest tests/test_tensorboard.py

Without playwright or Chromium these tests are skipped; with T2T_BROWSER=required they fail.
"""
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

# The flags keep it from what a test has no use for: a sandbox, which root cannot have, a GPU, and calls to its maker.
FLAGS = ('--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync')
MILLISECONDS = 20_000  # the longest that anything on a page may take to appear


@dataclass
class Visit:
    """A page as playwright knows it, the errors of its console, and the addresses that it was refused."""
    page: Any
    errors: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@pytest.fixture(scope='module')
def visit(tmp_path_factory) -> Iterator[Callable[[str], Visit]]:
    """url → Visit. The page gets what is at its own address: of a file nothing but the file, of a server that one."""
    chromium = os.environ.get('CHROMIUM') or shutil.which('chromium') or '/usr/bin/chromium'
    missing = [name for name, is_there in (('playwright', importlib.util.find_spec('playwright')),
                                           (chromium, os.access(chromium, os.X_OK))) if not is_there]
    if missing and os.environ.get('T2T_BROWSER') != 'required':
        pytest.skip(f'no {" and no ".join(missing)}: pip install -r requirements-dev.txt and make browser')
    assert not missing, f'T2T_BROWSER=required, but there is no {" and no ".join(missing)}'

    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp('profile'), executable_path=chromium, headless=True, args=list(FLAGS),
            viewport={'width': 1500, 'height': 1100})
        context.set_default_timeout(MILLISECONDS)
        yield lambda url: _open(context, url)
        context.close()


def _open(context, url: str) -> Visit:
    seen = Visit(context.new_page())
    seen.page.route('**/*', lambda route: _serve(route, url, seen))
    seen.page.on('pageerror', lambda error: seen.errors.append(str(error)))
    seen.page.on('console', lambda said: seen.errors.append(said.text) if said.type == 'error' else None)
    seen.page.goto(url)
    return seen


def _serve(route, url: str, seen: Visit) -> None:
    asked, own = urlsplit(route.request.url), urlsplit(url)
    is_own = asked.path == own.path if own.scheme == 'file' else asked.netloc == own.netloc
    if asked.scheme in ('data', 'blob') or (asked.scheme == own.scheme and is_own):
        return route.continue_()
    seen.refused.append(route.request.url)
    return route.abort()
