"""What the cells of a notebook cannot see: the package from outside, and rules that hold for all notebooks
together."""
import ast, json, os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
MODULES = sorted(p.stem for p in (ROOT/'capnb').glob('*.py') if p.stem != '__init__')
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)

def cells(path, kind=None):
    "The cells of a notebook, each with its source as one string."
    found = [
        c | dict(source=''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
    ]
    return [c for c in found if kind in (None, c['cell_type'])]

def exported_as(path):
    "The module that a notebook is exported to, or None."
    found = [
        m[1]
        for c in cells(path, 'code')
        if (m := re.search(r'^#\s*\|\s*default_exp\s+([\w.]+)', c['source'], re.M))
    ]
    return found[0] if found else None

def number(path):
    "The place of a chapter among the others, such as (1, 'b') for 30b_images; None where it has no number."
    return (int(m[1]), m[2]) if (m := re.match(r'(\d+)([a-z]?)_', path.stem)) else None

def python(code):
    "Run `code` in a fresh process at the top of the repository."
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)

# allowed inside a function: `capnb_train --dry_run` is the command of a later chapter
UPWARDS = {('commands', 'planning')}

def capnb_imports(source, at_the_top=False):
    """The modules of this package that `source` imports, inside functions too unless it is asked for those
    at the top only."""
    tree = ast.parse(source)
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['capnb' if node.level else '', node.module]))
            names = [f'capnb.{a.name}' for a in node.names] if base == 'capnb' else [base]
        else:
            continue
        yield from (n.split('.')[1] for n in names if n.startswith('capnb.'))

def test_there_is_something_to_test():
    assert NOTEBOOKS and MODULES

@pytest.mark.parametrize('module', MODULES)
def test_module_imports_alone(module):
    done = python(f'import capnb.{module}')
    assert done.returncode == 0, done.stderr

def test_import_is_light():
    done = python('import sys, capnb; print([m for m in ("torch", "transformers") if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr

@each_notebook
def test_notebook_has_its_module(path):
    module = exported_as(path)
    assert module in [None, *MODULES]
    assert bool(module) == any(
        re.match(r'#\s*\|\s*export', c['source']) for c in cells(path, 'code')
    ), 'a notebook has a module if it exports something'
    if module:
        assert module == re.sub(r'^\d+[a-z]?_', '', path.stem)

def test_module_has_its_notebook():
    assert set(MODULES) - {'_modidx'} == {exported_as(p) for p in NOTEBOOKS} - {None}

@each_notebook
def test_no_stored_error(path):
    errors = [o['ename'] for c in cells(path, 'code') for o in c['outputs'] if o['output_type'] == 'error']
    assert not errors

@each_notebook
def test_title_and_subtitle(path):
    first = cells(path, 'markdown')[0]['source']
    assert re.match(r'# \S.*\n+> \S', first), 'the first text must be an H1 title and a `>` subtitle'

@each_notebook
def test_imports_only_from_lower_numbers(path):
    if number(path) is None:
        pytest.skip('it has no number')
    numbers = {exported_as(p): number(p) for p in NOTEBOOKS}
    exported = [c['source'] for c in cells(path, 'code') if re.match(r'#\s*\|\s*export', c['source'])]
    at_the_top = {m for source in exported for m in capnb_imports(source, at_the_top=True)}
    used = at_the_top | {
        m for source in exported for m in capnb_imports(source) if (exported_as(path), m) not in UPWARDS
    }
    upwards = [m for m in sorted(used) if numbers.get(m) is None or numbers[m] >= number(path)]
    assert not upwards, f'{path.stem} imports {upwards}'

@pytest.mark.parametrize('script', CFG['console_scripts'].split())
def test_command_exists(script):
    module, function = script.split('=')[1].split(':')
    tree = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
    assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]

@pytest.mark.parametrize('requirement', [*CFG['requirements'].split(), *CFG['dev_requirements'].split()])
def test_pin_lies_in_the_range(requirement):
    lines = (ROOT/'.ci/constraints.txt').read_text(encoding='utf-8').split()
    pins = {canonicalize_name(name): version for name, version in (line.split('==') for line in lines)}
    wanted = Requirement(requirement)
    assert canonicalize_name(wanted.name) in pins, 'there is no pin'
    assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)], prereleases=True)

def test_a_file_goes_to_one_worker(request):
    """pytest 9.2 with xdist 3.8 loses the groups without a word; each worker then trains what the tests of a
    file share."""
    if 'PYTEST_XDIST_WORKER' in os.environ:
        assert request.node.nodeid.endswith('@test_project.py')

@pytest.mark.slow
def test_every_chapter_is_ready_for_the_site():
    """All that comes before Quarto: nbdev runs what is exported and writes the chapters into _proc, with the
    pictures that they show."""
    done = subprocess.run(
        [sys.executable, ROOT / '.ci' / 'docs.py', '--process'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = [*NOTEBOOKS, *(ROOT/'nbs'/'images').iterdir(), ROOT/'nbs'/'styles.css']
    assert [p for p in wanted if not (ROOT/'_proc'/p.relative_to(ROOT/'nbs')).exists()] == []
