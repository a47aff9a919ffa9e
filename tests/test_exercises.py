"The exercises of each chapter: their answers pass their checks, and no answer at all does not."
import json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
SKIPPED = {'notest', 'slow', 'cuda', 'eval: false'}
each_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)

def cells(path):
    "The cells of a notebook as pairs of kind and source."
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

def directives(source):
    "The directives on top of a cell, such as 'export' or 'eval: false', without `#|`."
    head = re.match(r'(\s*#\s*\|.*(\n|$))*', source)[0]
    return [re.sub(r'^\s*#\s*\|\s*', '', line).strip() for line in head.splitlines()]

def body(source): return '\n'.join(source.splitlines()[len(directives(source)):])

def asked(kind, source):
    "The number of the exercise whose answer belongs in this cell, or None."
    found = kind == 'code' and re.match(r'answer = \.\.\. # exercise (\d+)', body(source))
    return int(found[1]) if found else None

def is_check(kind, source): return kind == 'code' and body(source).startswith('if answer is not ...:')

def answers(path):
    "The code of each answer that is folded away under a check, in order."
    text = '\n'.join(source for kind,source in cells(path) if kind == 'markdown')
    folded = re.findall(r'<details><summary>Answer</summary>(.*?)</details>', text, re.S)
    return [block[1] if (block := re.search(r'^```python\n(.*?)^```$', fold, re.S|re.M)) else '' for fold in folded]

@each_chapter
def test_exercises_are_whole(path):
    "Two or three of them, each a question, a cell for the answer, a check, and an answer that is folded away, in this order."
    found, numbers = cells(path), []
    for i,(kind, source) in enumerate(found):
        if (n := asked(kind, source)) is None: continue
        numbers.append(n)
        assert found[i-1][0] == 'markdown' and f'**{n}.**' in found[i-1][1], f'exercise {n} asks nothing'
        assert is_check(*found[i+1]), f'exercise {n} has no check'
        assert found[i+2][0] == 'markdown' and found[i+2][1].startswith('<details><summary>Answer</summary>'), f'exercise {n} has no answer'
        for cell in (source, found[i+1][1]): assert directives(cell) == ['notest'], f'a cell of exercise {n} is not left out of the tests'
    assert numbers in ([1,2], [1,2,3])
    assert len(numbers) == sum(is_check(*c) for c in found) == len(answers(path)) and all(answers(path))

def attempt(n, answer, check):
    "Lines that try the check of exercise `n` first with None, which it must refuse, and then with the answer."
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

def script(path):
    "The cells that the notebook's own test runs, and the exercises with their answers, as one script."
    answer, lines, n = iter(answers(path)), [], None
    for i,(kind, source) in enumerate(cells(path)):
        if kind != 'code' or 'nbdev_export(' in source: continue
        n = asked(kind, source) or n
        if is_check(kind, source): code = attempt(n, next(answer), body(source))
        elif SKIPPED & set(directives(source)): continue
        else: code = body(source)
        lines += [f'# cell {i}', code]
    return '\n'.join(lines)

@each_chapter
def test_answers_pass(path, environment, tmp_path):
    file = tmp_path/f'{path.stem}.py'
    file.write_text(script(path), encoding='utf-8')
    done = subprocess.run([sys.executable, file], # as `__main__`, as in Jupyter: then what it defines can be sent to other processes
                          cwd=path.parent, env=environment(MPLBACKEND='Agg'), capture_output=True, text=True,
                          encoding='utf-8', timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    passed = re.findall(r'^exercise (\d) passed$', done.stdout, re.M)
    assert len(passed) == len(answers(path)) and passed
