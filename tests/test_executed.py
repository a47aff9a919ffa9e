"The one way in which outputs of notebooks are made: what runs, what is kept, what is recorded."
import importlib.util, sys
import nbformat, pytest
from nbclient.exceptions import CellExecutionError
from test_project import ROOT

@pytest.fixture(scope='module')
def executed():
    sys.path.insert(0, str(ROOT/'.ci'))
    try:
        spec = importlib.util.spec_from_file_location('executed', ROOT/'.ci'/'executed.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT/'.ci'))

def output(text): return nbformat.v4.new_output('stream', name='stdout', text=text)

@pytest.fixture
def chapter(tmp_path):
    "A chapter with a cell of each flag, each with an old output."
    sources = ('x = 1\nprint(x)', '#| slow\nprint(x+1)', '#| cuda\nprint(x+2)', '#| notest\nprint(x+3)')
    old = [output('old\n')]
    cells = [nbformat.v4.new_code_cell(s, outputs=old, id=f'cell{i}') for i,s in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'77_made.ipynb')
    return tmp_path/'77_made.ipynb'

def outputs(path):
    return [''.join(o['text'] for o in c.outputs) for c in nbformat.read(path, as_version=4).cells]

def test_slow_cells_are_executed_and_flagged_ones_keep_their_outputs(executed, chapter):
    card = dict(date='2026-01-01', device='a card')
    record = executed.execute(chapter, dict(cuda=dict(cell2=card)))
    assert outputs(chapter) == ['1\n', '2\n', 'old\n', 'old\n']
    assert record['cuda'] == dict(cell2=card) and record['package'] == executed.package_hash()
    assert list(executed.not_run_here({'77_made': record})) == [
        'not run here: 77_made cell2: 2026-01-01, a card'
    ]
    assert 'ran with the code they have, 0 with' in executed.check({'77_made': record}, [chapter])
    chapter.write_text(chapter.read_text().replace('x = 1', 'x = 2'))
    with pytest.raises(SystemExit, match='Executed with other code, or not at all: 77_made'):
        executed.check({'77_made': record}, [chapter])

def test_a_card_stores_its_own_cells_only(executed, chapter):
    record = executed.execute_cuda(chapter, dict(code='before'))
    assert outputs(chapter) == ['old\n', 'old\n', '3\n', 'old\n']
    assert record['code'] == 'before' and record['cuda']['cell2']['device'] == executed.machine()

def test_a_cell_on_photographs_runs_where_there_are_some(executed, chapter, monkeypatch):
    source = chapter.read_text().replace('print(x+2)', "import os\\nprint(os.environ['CAPNB_PHOTOS'])")
    chapter.write_text(source)
    monkeypatch.delenv('CAPNB_PHOTOS', raising=False)
    assert executed.wanted(chapter, {}, True) is False
    assert executed.execute_cuda(chapter, {}) == dict(cuda={}) and outputs(chapter)[2] == 'old\n'
    monkeypatch.setenv('CAPNB_PHOTOS', '/photographs')
    assert executed.wanted(chapter, {}, True) is True
    record = executed.execute_cuda(chapter, {})
    assert outputs(chapter)[2] == '/photographs\n' and record['cuda']['cell2']['device'] == executed.machine()

def test_an_error_stores_nothing(executed, chapter):
    chapter.write_text(chapter.read_text().replace('print(x+1)', 'print(y)'))
    with pytest.raises(CellExecutionError, match="name 'y' is not defined"):
        executed.execute(chapter, {})
    assert outputs(chapter) == ['old\n']*4
