"""README.md, CONTRIBUTING.md and docs/ are true: links, commands, tables and names of files."""
import importlib
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_options import parse
from tools import options_table
from tools.model_table import table as model_table
from utils.errors import UserError

README = ROOT / 'README.md'
DOCS = sorted((ROOT / 'docs').glob('*.md'))
NOTEBOOKS = sorted((ROOT / 'docs').glob('*.ipynb'))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (README, ROOT / 'CONTRIBUTING.md', *DOCS, *NOTEBOOKS)}
MAX_LINES, MAX_WORDS, MAX_PICTURE_BYTES = 220, 2200, 300_000  # of the README and of each picture
SCRIPTS = ('train.py', 'validate.py', 'transfer.py', 'predict.py', 'visualize.py', 'export.py')
# Programs of other projects, whose options are theirs.
OTHERS = ('tensorboard', 'source')
FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.M | re.S)
FILE_OR_FOLDER = re.compile(r'(?<![\w/.])\w[\w.]*(?:\.(?:py|sh|yaml|sbatch)\b|/(?!\w))')


@cache
def read(path: Path) -> str:
    """Return a page's Markdown, of a notebook that of its cells."""
    text = path.read_text()
    if path.suffix == '.ipynb':
        cells = json.loads(text)['cells']
        text = '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown') + '\n'
    return text


def prose(page: str) -> str:
    """Return a page without its blocks of code."""
    return FENCE.sub('', read(PAGES[page]))


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(read(PAGES[page])) if name == language]


def commands(page: str) -> list[str]:
    """Return the commands in a page's sh blocks, and those that stand in its sentences and tables."""
    lines = re.sub(r' *\\\n *', ' ', '\n'.join(blocks(page, 'sh'))).splitlines()
    inline = [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', prose(page))]
    start = re.compile(r'([A-Z_]+=\S+ )*(\./distributed_train\.sh|python|bash|sbatch|make|pytest|pip) ')
    uncommented = [re.sub(r'(^|\s+)# .*', '', line) for line in lines]
    return [line for line in uncommented if line] + [
        span for span in inline if start.match(span) and '…' not in span]


# --- Limits, tables ---------------------------------------------------------------------------------------------------

def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES and len(text.split()) <= MAX_WORDS


@pytest.mark.parametrize('page', ['README.md', 'docs/look_inside.md'])
def test_pictures_are_small(page):
    pictures = re.findall(r'!\[[^]]+]\(([^)]+)\)', read(PAGES[page]))
    assert pictures and all((PAGES[page].parent / path).stat().st_size < MAX_PICTURE_BYTES for path in pictures)


def test_options_table_is_current():
    assert options_table.PAGE.read_text() == options_table.page(), 'python tools/options_table.py writes it anew'


def test_model_table_is_current():
    assert model_table([]) in README.read_text()


# --- Every page -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('page', [path.relative_to(ROOT).as_posix() for path in DOCS])
def test_a_page_opens_with_its_command(page):
    assert re.match(r'# .+\n\n```sh\n', read(PAGES[page]))


@pytest.mark.parametrize('page', PAGES)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r'^[A-Z_]{6,}$|TODO|FIXME|XXX', read(PAGES[page]), re.M)


@cache
def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r'^#+ +(.+?) *$', FENCE.sub('', read(path)), re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def links(page: str) -> list[str]:
    return [link for link in re.findall(r']\(([^)\s]+)\)', prose(page)) if '://' not in link]


@pytest.mark.parametrize(('page', 'link'), [(page, link) for page in PAGES for link in dict.fromkeys(links(page))])
def test_links_resolve(page, link):
    name, _, anchor = link.partition('#')
    target = (PAGES[page].parent / name).resolve() if name else PAGES[page]
    assert target.exists() and target.is_relative_to(ROOT), f'{page} links to {link}'
    assert not anchor or anchor in anchors(target), f'{page} links to {link}: no such heading'


@pytest.mark.parametrize('page', [path.relative_to(ROOT).as_posix() for path in DOCS])
def test_the_readme_or_a_page_it_links_to_links_to_every_page(page):
    name, first = PAGES[page].name, [PAGES[link.partition('#')[0]].name for link in links('README.md')
                                     if link.partition('#')[0] in PAGES]
    others = [link for near in first if f'docs/{near}' in PAGES for link in links(f'docs/{near}')]
    assert name in first or name in [other.partition('#')[0] for other in others]


def test_python_examples_compile():
    examples = [(page, text) for page in PAGES for text in blocks(page, 'python')]
    assert examples
    for page, text in examples:
        compile(text, page, 'exec')


# --- Files ------------------------------------------------------------------------------------------------------------

def named_in_tree(page: str) -> list[tuple[str, str]]:
    """Return (folder, name) for the files and folders of a page's tree; indented lines belong to the folder above."""
    [tree] = [text for text in blocks(page, '') if 'distributed_train.sh' in text or 'train.py' in text]
    named, top, folder = [], '', ''
    for line in tree.splitlines():
        indent, first = len(line) - len(line.lstrip()), line.split()[0]
        if indent == 0:
            top = folder = first if first.endswith('/') else ''
        elif indent == 2:
            folder = top + first if first.endswith('/') else top
        names = FILE_OR_FOLDER.findall(line)
        if indent <= 2 and first.endswith('/'):
            named.append(('', folder))
            names = names[1:]
        named += [(folder, name) for name in names]
    return named


@pytest.mark.parametrize(('page', 'least'), [('README.md', 15), ('docs/architecture.md', 100)])
def test_files_of_the_tree_exist(page, least):
    named = named_in_tree(page)
    assert len(named) > least
    missing = [folder + name for folder, name in named
               if not (ROOT / folder / name).exists() and not (ROOT / name).exists()]
    assert missing == []


# --- Commands ---------------------------------------------------------------------------------------------------------

@cache
def known_options() -> set[str]:
    """Return every option that tools and benchmarks have, alone or from the shared groups.

    Every figure of benchmarks/scaling/inputs.yaml is an option, too.
    """
    sources = '\n'.join(path.read_text() for folder in ('options', 'tools', 'benchmarks', 'utils')
                        for path in (ROOT / folder).rglob('*.py'))
    figures = yaml.safe_load((ROOT / 'benchmarks/scaling/inputs.yaml').read_text())['figures']
    return {*re.findall(r"'(--[a-z][\w-]*)'", sources), *('--' + name.replace('_', '-') for name in figures)}


def check_options_exist(words: list[str]) -> None:
    for name in (word.split('=')[0] for word in words if word.startswith('--')):
        assert {name, name.replace('--no-', '--', 1)} & known_options(), f'{name}: no such option'


def check_tool(words: list[str]) -> None:
    """Check `tools/NAME.py OPTIONS…`, or of a folder `tools/NAME OPTIONS…`."""
    path = ROOT / words[0]
    assert path.is_file() if path.suffix else (path / '__main__.py').is_file(), f'{words[0]} cannot be run'
    parser = path.suffix and getattr(importlib.import_module(f'tools.{path.stem}'), 'create_parser', None)
    if parser:
        parser().parse_args(words[1:])
    else:
        check_options_exist(words[1:])


def check_module(words: list[str]) -> None:
    """Check `MODULE OPTIONS…` as python -m takes it."""
    if words[0] == 'pytest':
        check_tests(words[1:])
    elif words[0] != 'tensorboard.main':
        assert words[0].startswith('benchmarks.') and (ROOT / (words[0].replace('.', '/') + '.py')).is_file(), words[0]
        check_options_exist(words[1:])


def check_tests(words: list[str]) -> None:
    """Check the paths and the -k expression of pytest."""
    expression = words[words.index('-k') + 1] if '-k' in words else ''
    paths = [ROOT / word for word in words if not word.startswith('-') and word != expression]
    assert paths and all(path.exists() for path in paths)
    files = [file for path in paths for file in (path.rglob('*.py') if path.is_dir() else [path])]
    tests = [name for file in files for name in re.findall(r'^def (test_\w+)', file.read_text(), re.M)]
    assert any(expression in name for name in tests), f'-k {expression} selects no test'


def check_script(script: str, words: list[str]) -> None:
    assert script in SCRIPTS and (ROOT / script).is_file()
    if '--help' not in words:
        parse(*words, script=script.removesuffix('.py'))


def check(command: str) -> None:
    """Raise AssertionError or UserError if a command names what is not there, or options that do not parse."""
    words = shlex.split(re.sub(r'\$\([^)]*\)', 'X', command), comments=True)
    environment = dict(word.split('=', 1) for word in words if re.match('[A-Z_]+=', word))
    program, *words = [word for word in words if not re.match('[A-Z_]+=', word)]
    if program == './distributed_train.sh':
        assert words[0].isdecimal()
        script = environment.get('SCRIPT', 'train.py')
        if script.startswith('tools/'):
            check_tool([script, *words[1:]])
        else:
            check_script(script, words[1:])
    elif program == 'sbatch':
        assert (ROOT / words[0]).is_file()
        check_script('train.py', words[1:])
    elif program in ('python', '.venv/bin/python') and words[0] == '-m':
        check_module(words[1:])
    elif program == 'python':
        check_tool(words) if words[0].startswith('tools/') else check_script(words[0], words[1:])
    elif program == 'pytest':
        check_tests(words)
    elif program == 'make':
        targets = re.findall(r'^(\w[\w-]*):', (ROOT / 'Makefile').read_text(), re.M)
        assert words and set(words) <= set(targets)
    elif program == 'pip':
        assert words[0] == 'install' and all((ROOT / word).is_file() for word in words if word.endswith('.txt'))
    elif program == 'kubectl':
        assert (ROOT / words[words.index('-f') + 1]).is_file()
    elif program == 'bash':
        assert (ROOT / words[0]).is_file()
    else:
        assert program in OTHERS, f'unknown program: {command}'


@pytest.mark.parametrize(('page', 'command'), [
    (page, command) for page in PAGES for command in dict.fromkeys(commands(page))
    if page != 'docs/extending.md'])  # test_extending.py runs those, with the options that the page adds
def test_commands_parse(page, command):
    check(command)


@pytest.mark.parametrize('command', [
    'python train.py /data --no-such-option', 'python tools/nothing.py', 'python tools/nothing',
    'python -m benchmarks.nothing', 'python -m benchmarks.step --no-such-option', 'make nothing', 'nothing',
    'bash benchmarks/nothing.sh', 'pytest tests/test_nothing.py', 'python tools/pack.py --no-such-option',
    'pytest tests/test_readme.py -k rglob', './distributed_train.sh /data', 'python nothing.py',
    'pip install -r requirements-nothing.txt'])
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, UserError)):
        check(command)
