"What `import capnb` gives: the names that people need, without waiting for what they import."
import ast, importlib, subprocess, sys, time
from pathlib import Path
from statistics import median
import capnb

ROOT = Path(__file__).resolve().parent.parent

def python(code, check=True):
    "What a fresh process at the top of the repository prints."
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr
    return done.stdout

def seconds(code):
    start = time.perf_counter()
    python(code)
    return time.perf_counter() - start

def test_import_costs_little():
    both = [(seconds('pass'), seconds('import capnb')) for _ in range(5)]
    bare, ours = (median(times) for times in zip(*both, strict=True))
    assert ours-bare < .2, f'import capnb takes {ours-bare:.2f} s'

def test_import_leaves_torch_out():
    code = (
        'import sys, capnb; dir(capnb); print([m for m in ("torch", "transformers", "numpy") if m in'
        ' sys.modules])'
    )
    assert python(code).strip() == '[]'

def test_star_gives_the_names():
    given = {}
    exec('from capnb import *', given)
    assert sorted(name for name in given if not name.startswith('_')) == sorted(capnb.__all__)

def test_each_name_is_what_its_module_defines():
    for name, home in capnb._HOMES.items():
        module = importlib.import_module(f'capnb.{home}')
        assert getattr(capnb, name) is getattr(module, name)
        assert getattr(module, name).__module__ == module.__name__, f'{name} is defined elsewhere'

def test_the_three_lists_agree():
    tree = ast.parse((ROOT/'capnb/__init__.py').read_text(encoding='utf-8'))
    checked = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == 'TYPE_CHECKING')
    typed = {a.name: node.module.removeprefix('capnb.') for node in checked.body for a in node.names}
    assert typed == capnb._HOMES
    assert sorted(capnb.__all__) == capnb.__all__ == sorted(capnb._HOMES)

def test_names_are_listed():
    assert set(capnb.__all__) <= set(dir(capnb))

def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(capnb, 'trian')
    assert python('from capnb import trian', check=False) == ''

def test_help_shows_the_names():
    shown = python('import capnb; help(capnb)')
    assert capnb.__doc__.splitlines()[0] in shown
    head = [line.strip() for line in shown.splitlines()]
    for name in capnb.__all__:
        assert any(
            line.startswith((f'{name}(', f'class {name}(')) for line in head
        ), f'help(capnb) does not show {name}'

def test_version_is_that_of_the_settings():
    assert f'version = {capnb.__version__}\n' in (ROOT/'settings.ini').read_text(encoding='utf-8')
