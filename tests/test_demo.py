"The captioner that comes with the package: its files, where it is used, and where never."
import http.client, json, socket, subprocess, sys, time
from pathlib import Path
import pytest, torch
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.checkpoint import read_metadata, read_tensors
from capnb.hub import model_path
from capnb.insight.facts import facts_scores
from capnb.insight.widgets.captions import CaptionWidget
from capnb.run.entry import NO_CHECKPOINT, find_captioner
from capnb.run.pretrain import make_adapter
from capnb.run.sharing import CapnbForImageCaptioning, share
from capnb.storybook import Storybook

ROOT = Path(__file__).resolve().parent.parent
NOTICE = 'no checkpoint found: using the storybook demo, which knows drawn pages only'
FOLDER = Path(model_path('storybook-adapter'))

@pytest.fixture
def page(tmp_path):
    "A folder with a page, in which nothing was trained."
    Storybook('test')[3]['image'].save(tmp_path/'page.png')
    return tmp_path

@pytest.fixture(scope='module')
def model(): return load_model_from_checkpoint('storybook', 'cpu')[0]

@pytest.fixture(scope='module')
def wanted(model): return model.caption(Storybook('test')[3]['image'])

# --- Its files

def test_small_and_in_half_precision():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4_000_000
    assert {t.dtype for t in read_tensors(shipped_checkpoint()).values()} == {torch.float16}

def test_card_says_how_it_was_made():
    card, metadata = (FOLDER/'README.md').read_text(encoding='utf-8'), read_metadata(shipped_checkpoint())
    assert card.startswith('---\nlicense: apache-2.0\n') and 'capnb_pretrain --only storybook-adapter' in card
    assert f"{metadata['steps']} steps" in card and f"seed {metadata['hyperparameters']['seed']}," in card
    assert f"| test | {metadata['test']['rouge_l']:.3f} |" in card and 'drawn pages' in card

def test_it_goes_with_the_package():
    "`setup.py` names each of its files as data of the package."
    code = (
        'import setuptools; setuptools.setup = lambda **how: print(how["package_data"]["capnb"])\n'
        f'import runpy; runpy.run_path({str(ROOT / "setup.py")!r})'
    )
    said = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True).stdout
    packed = {path for pattern in eval(said) for path in (ROOT/'capnb').glob(pattern)}
    assert set(FOLDER.iterdir()) <= packed and len(list(FOLDER.iterdir())) == 3

def test_it_is_a_checkpoint_like_any_other(model, wanted, tmp_path):
    "By its path, and as a shared folder."
    image = Storybook('test')[3]['image']
    assert load_model_from_checkpoint(shipped_checkpoint(), 'cpu')[0].caption(image) == wanted
    share(shipped_checkpoint(), 'cpu').save_pretrained(tmp_path)
    again = CapnbForImageCaptioning.from_pretrained(tmp_path, device='cpu')
    assert again.captioner.caption(image) == wanted

def test_it_writes_well(model):
    "Half precision costs nothing that one sees: the colours and kinds of most pages are right."
    rows = [Storybook('test')[i] for i in range(100)]
    scores = facts_scores(model.caption([row['image'] for row in rows]), [row['facts'] for row in rows])
    assert scores['pairs']['f1'] > .93, scores

def test_the_same_seed_makes_the_same_file(tmp_path):
    short = dict(training_size_limit=64, max_steps=2, evaluation_enabled=False)
    first, second = (make_adapter(tmp_path/name, **short) for name in ('first', 'second'))
    assert first.read_bytes() == second.read_bytes() and first.name == shipped_checkpoint().name[:-5]+'1.pth'

# --- Where it is used

def test_caption_by_its_name(call, page, wanted):
    done = call('capnb_caption', 'page.png', '--model', 'storybook', cwd=page)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'page.png: {wanted}\n', '')
    told = call('capnb_caption', 'page.png', '--model', 'storybook', '--json', cwd=page)
    assert json.loads(told.stdout) == [dict(file='page.png', caption=wanted)]

def test_caption_where_nothing_was_trained(call, page, wanted):
    assert NO_CHECKPOINT == NOTICE
    done = call('capnb_caption', 'page.png', cwd=page)
    assert (done.returncode, done.stdout, done.stderr) == (0, f'page.png: {wanted}\n', f'{NOTICE}\n')
    (page/'broken.png').write_bytes(b'no picture')
    told = call('capnb_caption', 'page.png', 'broken.png', '--json', cwd=page)
    rows = json.loads(told.stdout)
    assert rows[0] == dict(file='page.png', caption=wanted, notice=NOTICE)
    assert set(rows[1]) == {'file', 'error', 'notice'} and told.stderr.startswith(f'{NOTICE}\n')

@pytest.mark.parametrize('words', [['--folder', 'none'], ['--best'], ['--checkpoint', 'none.pth']])
def test_what_is_asked_for_is_not_replaced(call, page, words):
    done = call('capnb_caption', 'page.png', *words, cwd=page)
    assert done.returncode == 1 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert 'storybook' not in done.stderr
    both = call('capnb_caption', 'page.png', *words, '--model', 'storybook', cwd=page)
    assert both.returncode == 1 and 'not both' in both.stderr

def test_other_names_are_refused(call, page):
    done = call('capnb_caption', 'page.png', '--model', 'photos', cwd=page)
    assert done.returncode == 2 and "invalid choice: 'photos'" in done.stderr

def test_own_checkpoint_comes_first(page):
    newest = page/'saved_models'/'model_state_dict_20260101_000000-6.pth'
    newest.parent.mkdir()
    for path in FOLDER.glob('*_20260101_*'):
        (newest.parent/path.name).write_bytes(path.read_bytes())
    assert find_captioner(folder=page/'saved_models') == (newest, None)

def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    connection.request(
        method, path, body, {'Content-Type': 'multipart/form-data; boundary=x'} if body else {}
    )
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found

def is_ready(port):
    try:
        return ask(port, 'GET', '/health')[0] == 200
    except ConnectionRefusedError: # it says that it serves a moment before it listens
        return False

def form(image):
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="page.png"\r\n\r\n'
    return head + image + b'\r\n--x--\r\n'

def test_server_where_nothing_was_trained(start, page, wanted):
    "Says so when it starts, in every answer, and on its page."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    process = start('capnb_serve', '--port', port, cwd=page, fresh=True)
    try:
        assert process.stderr.readline() == f'{NOTICE}\n'
        assert process.stdout.readline().startswith('serving ')
        while not is_ready(port):
            time.sleep(.05)
        assert json.loads(ask(port, 'GET', '/health')[1]) == dict(status='ready', notice=NOTICE)
        assert f'<p id="notice">{NOTICE}</p>' in ask(port, 'GET', '/')[1]
        status, answer = ask(port, 'POST', '/caption', form((page/'page.png').read_bytes()))
        assert (status, json.loads(answer)) == (200, dict(caption=wanted, notice=NOTICE))
        status, told = ask(port, 'POST', '/caption?stream=true', form((page/'page.png').read_bytes()))
        assert json.loads(told.strip().splitlines()[-1].removeprefix('data: ')) == json.loads(answer)
    finally:
        process.terminate()
        process.communicate()

def test_server_by_its_name(call, page, monkeypatch):
    taken = []
    monkeypatch.setattr('capnb.run.serving.server.serve', lambda *what: taken.append((what[0], what[-1])))
    for words in (['--model', 'storybook'], []):
        assert call('capnb_serve', *words, cwd=page).returncode == 0
    assert taken == [(shipped_checkpoint(), None), (shipped_checkpoint(), NOTICE)]

def test_widget(wanted):
    image = Storybook('test')[3]['image']
    named = CaptionWidget('storybook', [image])
    assert (named.caption, named.notice.value) == (wanted, '')
    assert NOTICE in CaptionWidget('storybook', [image], notice=NOTICE).notice.value

# --- Where never

NEVER = {
    'judged': ['capnb_eval'],
    'judged by its name': ['capnb_eval', 'storybook'],
    'gone on with': ['capnb_train', '--resume'],
    'gone on with by its name': ['capnb_train', '--resume', 'storybook'],
    'given away': ['capnb_share', 'shared'],
    'run over millions': ['capnb_scale', 'page.png', 'out'],
}

@pytest.mark.parametrize('words', NEVER.values(), ids=NEVER)
def test_never(call, page, words):
    done = call(*words, cwd=page)
    assert done.returncode == 1 and NOTICE not in done.stderr and len(done.stderr.splitlines()) == 1
    assert 'there is no' in done.stderr or 'does not exist' in done.stderr or 'has no' in done.stderr
