"The exercises of each chapter: their answers pass their checks, and no answer at all does not."
import ast, asyncio, builtins, json, os, re, symtable, sys, types
from pathlib import Path
import pytest
from forks import fork, write_to

ROOT = Path(__file__).resolve().parent.parent
# the chapters with a number; what has a letter after it is a further part of a chapter: 37, 37b, ...
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]*_*.ipynb'))
ASKING = [p for p in CHAPTERS if '# exercise ' in p.read_text(encoding='utf-8')]
NUMBERS = sorted({p.name[:2] for p in CHAPTERS} - {'00'}) # 00 is a list of names and teaches nothing
SKIPPED = {'notest', 'slow', 'cuda', 'eval: false'}
each_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)

def cells(path):
    "The cells of a notebook as pairs of kind and source."
    return [
        (c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']
    ]

def directives(source):
    "The directives on top of a cell, such as 'export' or 'eval: false', without `#|`."
    head = re.match(r'(\s*#\s*\|.*(\n|$))*', source)[0]
    return [re.sub(r'^\s*#\s*\|\s*', '', line).strip() for line in head.splitlines()]

def body(source):
    "The Python of a cell, without its directives; lines that a shell runs are left out."
    source = '\n'.join(source.splitlines()[len(directives(source)):])
    return re.sub(r'^( *)!.*$', r'\1pass', source, flags=re.M)

def asked(kind, source):
    "The number of the exercise whose answer belongs in this cell, or None."
    found = kind == 'code' and re.match(r'answer = \.\.\. # exercise (\d+)', body(source))
    return int(found[1]) if found else None

def is_check(kind, source):
    return kind == 'code' and body(source).startswith('if answer is not ...:')

def answers(path):
    "The code of each answer that is folded away under a check, in order."
    text = '\n'.join(source for kind,source in cells(path) if kind == 'markdown')
    folded = re.findall(r'<details><summary>Answer</summary>(.*?)</details>', text, re.S)
    return [
        block[1] if (block := re.search(r'^```python\n(.*?)^```$', fold, re.S | re.M)) else ''
        for fold in folded
    ]

@each_chapter
def test_exercises_are_whole(path):
    """None in a part of a chapter, or up to three, each a question, a cell for the answer, a check, and an
    answer that is folded away, in this order."""
    found, numbers = cells(path), []
    for i,(kind, source) in enumerate(found):
        if (n := asked(kind, source)) is None: continue
        numbers.append(n)
        assert found[i-1][0] == 'markdown' and f'**{n}.**' in found[i-1][1], f'exercise {n} asks nothing'
        assert is_check(*found[i+1]), f'exercise {n} has no check'
        assert found[i + 2][0] == 'markdown' and found[i + 2][1].startswith(
            '<details><summary>Answer</summary>'
        ), f'exercise {n} has no answer'
        for cell in (source, found[i+1][1]):
            assert directives(cell) == ['notest'], f'a cell of exercise {n} is not left out of the tests'
    assert numbers in ([], [1], [1,2], [1,2,3])
    assert len(numbers) == sum(is_check(*c) for c in found) == len(answers(path)) and all(answers(path))

@pytest.mark.parametrize('number', NUMBERS)
def test_a_part_of_each_chapter_asks(number):
    assert any(p.name.startswith(number) for p in ASKING), f'no part of chapter {number} has exercises'

def attempt(n, answer, check):
    """Lines that try the check of exercise `n` first with None, which it must refuse, and then with the
    answer."""
    return f'''
answer = None
try:
{indented(check)}
except Exception: pass
else: raise AssertionError("the check of exercise {n} passes for None")
answer = ...
{answer}
assert answer is not ..., "the answer of exercise {n} sets no answer"
{check}
print("exercise {n} passed")'''

def indented(code): return '\n'.join('    ' + line for line in code.splitlines())

# --- The notebook's own test runs all cells already. Here only those statements are run that the exercises
# need.

QUIET = r'print|test_\w+|(plt|fig|ax|axs|left|middle|right)\..*' # calls after which nothing is different
# statements, by their beginning, that write the files which a check reads: no name leads from one to the
# other
FILES = {
    '35_commands': ('shutil.copytree(', "print(shell('caption', 'page0.png'"),
    '38b_scale_jobs': (
        "print(caption_images(str(pages), str(here / 'captions'), checkpoint, **small))",
    ),
}
SHORTER = { # the number of pages that the answers do not depend on, and what it is here
    '07_evaluation': ("('train', 2000)", "('train', 1000)"),
    '18_reports': ("Storybook('test')", "Storybook('test', n=100)"),
    '35_commands': ('training_size_limit=1600', 'training_size_limit=160'),
    '39_sharing': ('training_size_limit=640', 'training_size_limit=64'),
}

def looked_up(table):
    "The names that a piece of code, or a function in it, looks up in the notebook."
    here = {
        s.get_name()
        for s in table.get_symbols()
        if s.is_referenced() and (s.is_global() or table.get_type() == 'module')
    }
    return here.union(*map(looked_up, table.get_children()))

def changed_by(part):
    """The parts of a statement whose objects `part` may change: it sets something in them, or calls for the
    sake of what that does."""
    if isinstance(part, (ast.Attribute, ast.Subscript)):
        return [part] if isinstance(part.ctx, ast.Store) else []
    if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
        return [] if re.fullmatch(QUIET, ast.unparse(part.value.func)) else [part]
    if isinstance(part, ast.Call) and ast.unparse(part.func) == 'fit':
        # trains this model, whatever becomes of the result
        return [a for a in part.args[:1] if isinstance(a, ast.Name)]
    return [part] if isinstance(part, ast.AugAssign) else []

def traffic(statement):
    """The names that a statement takes from those before it, those that it binds, and those whose objects it
    may change."""
    table, parts = symtable.symtable(ast.unparse(statement), 'cell', 'exec'), list(ast.walk(statement))
    added_to = {n.target.id for n in parts if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    binds = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    takes = (looked_up(table) | added_to & binds) - set(dir(builtins))
    if isinstance(statement, (ast.For, ast.With, ast.If, ast.Try)):
        takes -= binds - added_to # here a name is bound before it is used
    changes = (
        set()
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        else {n.id for p in parts for c in changed_by(p) for n in ast.walk(c) if isinstance(n, ast.Name)}
    )
    return takes, binds, takes & changes

def needed(steps):
    "Of the steps of a script (statement, whether it must stay), those that the ones that must stay need."
    # what a function takes when it is called
    inside = {s.name: traffic(s)[0] for s,_ in steps if isinstance(s, ast.FunctionDef)}
    # calling them changes other things than them
    tools = {
        name
        for s, _ in steps
        if isinstance(s, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        for name in traffic(s)[1]
    }
    wanted, kept = set(), []
    for statement,stays in reversed(steps):
        takes, binds, changes = traffic(statement)
        if not stays and not wanted & (binds | changes - tools): continue
        kept.append(statement)
        wanted = wanted - (binds - changes) | takes
        while more := set().union(*(inside[f] for f in wanted & inside.keys())) - wanted:
            wanted |= more
    return kept[::-1]

def script(path):
    "The exercises with their answers, as one script, after what they need."
    answer, steps, n = iter(answers(path)), [], None
    for kind,source in cells(path):
        if kind != 'code': continue
        n, code, check = asked(kind, source) or n, body(source), is_check(kind, source)
        if not check and SKIPPED & set(directives(source)): continue
        # with CAPNB_SLOW all of them
        always = check or 'export' in directives(source) or bool(os.environ.get('CAPNB_SLOW'))
        for s in ast.parse(attempt(n, next(answer), code) if check else code).body:
            steps.append(
                (
                    s,
                    always
                    or isinstance(s, (ast.Import, ast.ImportFrom))
                    or ast.unparse(s).startswith(('torch.manual_seed(', *FILES.get(path.stem, ()))),
                )
            )
    code, (long, short) = '\n'.join(ast.unparse(s) for s in needed(steps)), SHORTER.get(path.stem, ('', ''))
    assert long in code, f'{path.stem} has no {long!r} to make shorter'
    return code if os.environ.get('CAPNB_SLOW') or not long else code.replace(long, short)

def act(file, said, folder):
    """In a child process: run a script as `__main__`, as in Jupyter, so that what it defines can be sent to
    other processes; what it says goes to a file."""
    with open(said, 'w', encoding='utf-8') as out:
        write_to(out.fileno())
    os.chdir(folder)
    main = sys.modules['__main__'] = types.ModuleType('__main__')
    code = compile(Path(file).read_text(encoding='utf-8'), file, 'exec', flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    awaited = eval(code, main.__dict__)
    if awaited is not None:
        asyncio.run(awaited)

SLOW = (
    '38b_scale_jobs', '36_sweeps', # start other processes, which import everything again
    '09_flickr30k_on_a_gpu', '19_troubleshooting', # train
)

@pytest.mark.parametrize(
    'path', [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in ASKING]
)
def test_answers_pass(path, tmp_path):
    file, said = tmp_path/f'{path.stem}.py', tmp_path/'said'
    file.write_text(script(path), encoding='utf-8')
    child = fork(act, str(file), said, path.parent)
    child.join(900)
    text = said.read_text(encoding='utf-8')
    assert child.exitcode == 0, text[-3000:]
    passed = re.findall(r'^exercise (\d) passed$', text, re.M)
    assert len(passed) == len(answers(path)) and passed
    scored = [source for cell in cells(path) if is_check(*cell) and '✅' in (source := cell[1])]
    reached = re.findall('✅ (?:at least|below) [0-9]', text)
    assert len(reached) == len(scored), 'an answer does not reach its score'
