"The docstrings of what `capnb` offers by name: NumPy style, complete, with examples that run."
import ast, doctest, inspect, re, shutil, textwrap
import pytest
import capnb
from capnb.saving import shipped_checkpoint
from capnb.log import quiet
from capnb.storybook import Storybook

NAMES = [*capnb.__all__, 'Captioner.caption', 'Captioner.nll']

def named(name):
    found = capnb
    for part in name.split('.'):
        found = getattr(found, part)
    return found

def sections(doc):
    "The parts of a NumPy docstring by their title; '' for what stands before the first."
    pieces = re.split(r'^(\w[\w ]*)\n-{3,}\n', inspect.cleandoc(doc), flags=re.M)
    return {'': pieces[0].strip()} | dict(zip(pieces[1::2], pieces[2::2], strict=True))

def entries(text):
    "The entries of a section: name, type, description."
    found = re.findall(r'^(\S[^\n]*)\n((?:[ \t]+[^\n]*\n?|\n)*)', text.strip()+'\n', flags=re.M)
    return [(*head.partition(' : ')[::2], textwrap.dedent(body).strip()) for head, body in found]

def parameters(thing):
    "Name and `inspect.Parameter` of what a function or a class takes."
    signature = inspect.signature(thing)
    stars = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}
    return {stars.get(p.kind, '')+n: p for n, p in signature.parameters.items() if n != 'self'}

def complaints(thing, doc):
    "What is missing or wrong in the docstring of a function or a class."
    parts, takes = sections(doc), parameters(thing)
    if not re.match(r'[A-Z][^\n]*\.(\n\n|$)', parts['']):
        yield 'it begins with a sentence on a line of its own'
    told = entries(parts.get('Parameters', '') or parts.get('Attributes', ''))
    if [name for name, *_ in told] != list(takes) and (takes or not inspect.isclass(thing)):
        yield f'it describes {[name for name, *_ in told]}, the signature has {list(takes)}'
    for name, kind, text in told:
        default = getattr(takes.get(name), 'default', inspect.Parameter.empty)
        if not name.startswith('*') and not kind:
            yield f'{name} has no type'
        if not text:
            yield f'{name} is not described'
        if re.search('Tensor|ndarray', kind) and not re.search(r'\(\w[\w ,]*\)', kind+text):
            yield f'{name} has no shape'
        if default is None and ', optional' not in kind:
            yield f'{name} may be left out, and its type does not say "optional"'
        if default is None and not re.search('[Dd]efault', text):
            yield f'it is not said what {name} is where it is left out'
        if isinstance(default, str | int | float) and f', default {default!r}' not in kind:
            yield f'the default of {name} is {default!r}'
        if default is inspect.Parameter.empty and re.search('optional|default', kind):
            yield f'{name} has no default'
    returns = re.search(r'^[ \t]+(return [^\n]|yield )', inspect.getsource(thing), re.M)
    if not inspect.isclass(thing) and returns and not parts.keys() & {'Returns', 'Yields'}:
        yield 'it does not say what it returns'
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    raised = {
        ast.unparse(n.exc.func)
        for n in ast.walk(tree)
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)
    }
    if not inspect.isclass(thing) and raised - {name for name, *_ in entries(parts.get('Raises', ''))}:
        yield f'it raises {raised}'
    if not doctest.DocTestParser().get_examples(parts.get('Examples', '')):
        yield 'it has no example'

@pytest.mark.parametrize('name', NAMES)
def test_docstring_is_complete(name):
    assert list(complaints(named(name), named(name).__doc__)) == []

@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder with a checkpoint in saved_models and with a page."
    (tmp_path/'saved_models').mkdir()
    for file in shipped_checkpoint().parent.glob('*_20*'):
        shutil.copy(file, tmp_path/'saved_models')
    Storybook('test')[0]['image'].save(tmp_path/'page.png')
    monkeypatch.chdir(tmp_path)

@pytest.mark.parametrize('name', NAMES)
def test_examples_run(name, desk, capsys):
    assert '+SKIP' not in named(name).__doc__
    test = doctest.DocTestParser().get_doctest(inspect.cleandoc(named(name).__doc__), {}, name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with quiet():
        runner.run(test, out=lambda text: pytest.fail(text, pytrace=False))
    assert runner.summarize(verbose=False).attempted

GOOD = '''Do it.

    Parameters
    ----------
    x : torch.Tensor
        Features, shape (batch, width).
    n : int, default 3
        How often.

    Returns
    -------
    int
        What came of it.

    Raises
    ------
    ValueError
        If it cannot be done.

    Examples
    --------
    >>> 1
    1
    '''

def sample(x, n=3):
    if n < 0:
        raise ValueError(n)
    return n

@pytest.mark.parametrize(
    'old, new, said',
    [
        ('', '', None),
        ('Do it.\n', 'do it\n', 'sentence'),
        ('n : int, default 3', 'n', "n has no type"),
        ('n : int, default 3', 'm : int, default 3', 'the signature has'),
        ('default 3', 'default 4', 'the default of n is 3'),
        ('        How often.\n', '', 'n is not described'),
        (', shape (batch, width)', '', 'x has no shape'),
        ('Returns\n    -------\n', '', 'returns'),
        ('ValueError', 'OSError', 'raises'),
        ('>>> 1', '1', 'no example'),
        ('x : torch.Tensor', 'x : torch.Tensor, optional', 'x has no default'),
    ],
)
def test_complaints_are_made(old, new, said):
    found = list(complaints(sample, GOOD.replace(old, new)))
    assert any(said in c for c in found) if said else found == []
