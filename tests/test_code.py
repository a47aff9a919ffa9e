"How the code of notebooks, package and tests is written: what ruff checks, and what it does not."
import ast, json, re, subprocess, sys, tomllib
from pathlib import Path
import pytest
from test_project import (
    COURSE, COURSE_CHAPTERS, FILES, MODULES, NOTEBOOKS, ROOT, cells, number
)

SCRIPTS = [*sorted((ROOT/'tests').glob('*.py')), *sorted((ROOT/'.ci').glob('*.py')), ROOT/'setup.py']
MOST_LINES, MOST_IN_A_FUNCTION, LONGEST_GUARD = 350, 40, 90 # lines of code, lines of code, columns

def ruff(*options):
    "What ruff finds, as (file, rule) pairs."
    done = subprocess.run(
        [sys.executable, '-m', 'ruff', 'check', 'nbs', 'tests', '--output-format', 'json', *options],
        cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode in (0, 1), done.stderr
    return {(Path(d['filename']).relative_to(ROOT).as_posix(), d['code']) for d in json.loads(done.stdout)}

def test_ruff_finds_nothing():
    assert ruff() == set()

def test_ruff_ignores_only_what_is_there():
    "The exceptions for single files in pyproject.toml: one that is no longer needed fails."
    text = (ROOT/'pyproject.toml').read_text(encoding='utf-8')
    ignores = tomllib.loads(text)['tool']['ruff']['lint']['per-file-ignores']
    assert ignores.pop('*.ipynb') == ['F811', 'F403', 'F405', 'E402']
    listed = {(file, rule) for file, rules in ignores.items() for rule in rules}
    found = ruff('--config', 'lint.per-file-ignores={"*.ipynb" = ["F811", "F403", "F405", "E402"]}')
    assert listed - found == set(), 'clean now: take it out of pyproject.toml'

def test_every_noqa_gives_its_reason():
    sources = [c['source'] for p in NOTEBOOKS for c in cells(p, 'code')]
    sources += [p.read_text(encoding='utf-8') for p in SCRIPTS if p != Path(__file__)]
    noqas = [line for s in sources for line in s.splitlines() if '# noqa' in line]
    assert [line for line in noqas if not line.partition('# noqa')[2].partition(' ')[2].strip()] == []

def joined(source):
    """Lines of `source` on which a statement stands behind the head of its block, but for short guards and
    returns."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        for part in ('body', 'orelse', 'finalbody'):
            block = getattr(node, part, None)
            if isinstance(node, ast.Module) or not isinstance(block, list) or not block:
                continue
            first, line = block[0], lines[block[0].lineno-1].encode()
            head = line[:first.col_offset].decode().strip()
            if not head or head.startswith('@') or part == 'orelse' and head == 'el':
                continue # a line of its own, a decorator, `elif`
            guard = isinstance(node, ast.If) and part == 'body' and isinstance(
                first, (ast.Return, ast.Raise, ast.Continue, ast.Break)
            )
            function = (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and isinstance(first, ast.Return)
                and first.value
            )
            alone = len(block) == 1 and node.lineno == first.lineno == first.end_lineno
            if not ((guard or function) and alone and len(line.decode()) <= LONGEST_GUARD):
                yield f'{first.lineno}: {line.decode().strip()}'

def python_only(source):
    "A cell in which the lines that are for IPython do nothing."
    try:
        ast.parse(source)
    except SyntaxError:
        return re.sub(r'^( *)[%!].*', r'\1pass', source, flags=re.M)
    return source

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_one_statement_a_line_in_a_notebook(path):
    assert [line for c in cells(path, 'code') for line in joined(python_only(c['source']))] == []

@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: p.stem)
def test_one_statement_a_line_in_a_script(path):
    assert list(joined(path.read_text(encoding='utf-8'))) == []

@pytest.mark.parametrize(
    'source, bad',
    [
        ('if x: return 1', 0),
        ('if x: raise', 0),
        ('if x: y = 1', 1),
        ('if x: return 1\nelse: y = 2', 1),
        ('for x in y: z(x)', 1),
        ('if x:\n    y = 1\nelif z:\n    y = 2', 0),
        ('if x:\n    y = 1\nelif z: y = 2', 1),
        ('def f(): return 1', 0),
        ('def f(): pass', 1),
        ('try: f()\nfinally: g()', 2),
        ('with f(): g()', 1),
        ('class A: pass', 1),
        ('@property\ndef f(self): return 1', 0),
        ('if x: return ' + 'y' * 80, 1),
        ('if x: return (1,\n    2)', 1),
        ('while x: break', 1),
        ('"ä"; f()\nif "ä": return', 0),
    ],
)
def test_joined_lines_are_found(source, bad):
    assert len(list(joined(source))) == bad

def code_lines(node, source):
    "The lines of a module or function, without those that are empty, a comment or part of a docstring."
    first, last = (1, len(source)) if isinstance(node, ast.Module) else (node.lineno, node.end_lineno)
    texts = {
        line
        for n in ast.walk(node)
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
        for line in range(n.lineno, n.end_lineno + 1)
    }
    lines = ((i, source[i-1].strip()) for i in range(first, last+1))
    return sum(bool(line) and not line.startswith('#') and i not in texts for i, line in lines)

def too_long(module):
    "The name of a module that is too long, and the names of its functions that are."
    text = FILES[module].read_text(encoding='utf-8')
    tree, source = ast.parse(text), text.splitlines()
    if code_lines(tree, source) > MOST_LINES:
        yield module
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and code_lines(node, source) > MOST_IN_A_FUNCTION
        ):
            yield f'{module}.{node.name}'

# What is too long today. This only gets shorter: a name that no longer belongs here fails the test.
NOT_YET_SHORT = set()

@pytest.mark.parametrize('module', [m for m in MODULES if m != '_modidx'])
def test_modules_and_functions_are_short(module):
    listed = {name for name in NOT_YET_SHORT if name == module or name.rpartition('.')[0] == module}
    found = set(too_long(module))
    assert (
        found - listed == set()
    ), f'over {MOST_LINES} lines of code in a module or {MOST_IN_A_FUNCTION} in a function'
    assert listed - found == set(), 'short now: take it out of NOT_YET_SHORT'

def test_what_is_too_long_is_there():
    assert {n for n in NOT_YET_SHORT if n not in FILES and n.rpartition('.')[0] not in FILES} == set()

# --- Hyperparameters are read at public entry points and passed on as plain arguments

def takes_settings(function):
    "The name of the parameter of a function that holds `Hyperparameters`, or None."
    for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        if a.arg == 'h' or a.annotation is not None and 'Hyperparameters' in ast.unparse(a.annotation):
            return a.arg

def hands_on(function):
    "Names of what a function calls with its hyperparameters."
    h = takes_settings(function)
    for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
        values = (
            a.value if isinstance(a, ast.Starred | ast.keyword) else a for a in (*call.args, *call.keywords)
        )
        if any(isinstance(v, ast.Name) and v.id == h for v in values):
            yield ast.unparse(call.func).rpartition('.')[2]

def go_betweens(trees):
    "Functions that are handed hyperparameters by another one of `trees` and hand them on to a third."
    functions = {
        f'{name}.{f.name}': f for name, tree in trees.items() for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef) and takes_settings(f)
    }
    taking = {f.name for f in functions.values()}
    handed = {name for f in functions.values() for name in hands_on(f) if name != f.name}
    return {n for n, f in functions.items() if f.name in handed and taking & set(hands_on(f)) - {f.name}}

# Those of today. This only gets shorter.
NOT_YET_PLAIN = set()

def test_hyperparameters_are_read_at_most_one_call_below_an_entry_point():
    found = go_betweens({m: ast.parse(FILES[m].read_text(encoding='utf-8')) for m in COURSE})
    assert found - NOT_YET_PLAIN == set(), 'read the settings at the entry point and pass plain arguments'
    assert NOT_YET_PLAIN - found == set(), 'clean now: take it out of NOT_YET_PLAIN'

def test_a_go_between_is_found():
    code = 'def top(h): middle(h)\ndef middle(h, x=1): low(x, h=h)\ndef low(x, h:Hyperparameters): h.seed'
    assert go_betweens({'m': ast.parse(code.replace(': ', ':\n    '))}) == {'m.middle'}
    assert go_betweens({'m': ast.parse('def top(h):\n    low(h)\ndef low(h):\n    h.seed')}) == set()

def words_of(path):
    return sum(len(c['source'].split()) for c in cells(path, 'markdown'))

def exported_lines(path):
    "Lines of code, without those that are empty, a comment or part of a docstring."
    found = [c['source'] for c in cells(path, 'code') if re.search(r'^#\s*\|\s*export', c['source'], re.M)]
    return sum(code_lines(ast.parse(source), source.splitlines()) for source in found)

@pytest.mark.parametrize('path', COURSE_CHAPTERS, ids=lambda p: p.stem)
def test_the_course_is_an_afternoon(path):
    "A chapter of the course is short, and shows an image early."
    everything = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert len(everything) <= 40
    assert words_of(path) <= 1200
    assert exported_lines(path) <= 150
    if number(path)[1]: return # a further part of a chapter
    shown = [out.get('data', {}) for c in everything[:5] for out in c.get('outputs', ())]
    assert any(kind.startswith('image/') for data in shown for kind in data), 'no early image'

@pytest.mark.parametrize('module', MODULES)
def test_what_is_public_has_a_docstring(module):
    tree = ast.parse(FILES[module].read_text(encoding='utf-8'))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != '_']
    assert [n.name for n in public if not ast.get_docstring(n)] == []
