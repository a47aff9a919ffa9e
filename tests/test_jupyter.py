"The notebooks as a reader has them: a real JupyterLab in a real Chromium, cells run from its menu, widgets used with the mouse."
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from shutil import which
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('*.ipynb'))
LEFT_OUT = {'slow', 'notest', 'cuda'} # as in nbdev_test
SETTINGS = { # of JupyterLab: all cells in the page, also those out of sight, and no question about news
    'notebook-extension/tracker': dict(windowingMode='none'),
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'apputils-extension/themes': dict(theme='JupyterLab Light')}
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'

def flags(cell): return {m[1] for m in re.finditer(r'^#\s*\|\s*(\w+)', ''.join(cell['source']), re.M)}

def copied(path, to):
    "Copy a notebook without outputs and without the cells that nbdev_test leaves out."
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'] = [c | (dict(outputs=[], execution_count=None) if c['cell_type']=='code' else {}) for c in nb['cells']
                   if not (c['cell_type']=='code' and (flags(c) & LEFT_OUT or 'nbdev_export()' in ''.join(c['source'])))]
    (to/path.name).write_text(json.dumps(nb), encoding='utf-8')

@pytest.fixture(scope='module')
def lab(tmp_path_factory, environment):
    "A JupyterLab over a copy of the notebooks; gives a function from a path in it to its address."
    here = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', here/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '*.ipynb'))
    for path in CHAPTERS: copied(path, here/'nbs')
    for name,settings in SETTINGS.items():
        file = here/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    options = [f'--ServerApp.port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=sesame', f'--ServerApp.root_dir={here/"nbs"}', '--ServerApp.open_browser=False', '--allow-root',
               f'--LabApp.user_settings_dir={here/"settings"}', f'--LabApp.workspaces_dir={here/"workspaces"}']
    folders = {f'JUPYTER_{kind}_DIR': str(here/kind) for kind in ('CONFIG', 'DATA', 'RUNTIME')} | dict(IPYTHONDIR=str(here/'ipython'))
    with open(here/'log', 'w') as log:
        process = subprocess.Popen([sys.executable, '-m', 'jupyterlab', *options], cwd=here, env=environment(**folders), stdout=log, stderr=log)
    try:
        wait_for(lambda: answers(f'http://127.0.0.1:{port}/api?token=sesame'), 60, lambda: (here/'log').read_text())
        yield lambda name: f'http://127.0.0.1:{port}/lab/tree/{name}?token=sesame&reset'
    finally:
        process.terminate() # it ends its kernels
        try: process.wait(30)
        except subprocess.TimeoutExpired: process.kill()

def answers(address):
    try: return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError: return False

def wait_for(done, seconds, why):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, why()
        time.sleep(.1)

@pytest.fixture(scope='module')
def browser():
    path = which('chromium') or which('chromium-browser') or which('google-chrome')
    if not path: pytest.skip('there is no Chromium on this machine')
    playwright = pytest.importorskip('playwright.sync_api')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield browser
        browser.close()

@contextmanager
def opened(browser, lab, name):
    "A notebook in a tab of its own; JavaScript may report no error."
    with browser.new_context(viewport=dict(width=1250, height=950), device_scale_factor=1.5 if os.environ.get('CAPNB_SCREENSHOTS') else 1) as context:
        tab, said = context.new_page(), []
        tab.on('console', lambda m: said.append(m.text) if m.type=='error' else None); tab.on('pageerror', lambda e: said.append(str(e)))
        tab.goto(lab(name))
        tab.locator('.jp-Notebook .jp-Cell').first.wait_for(timeout=60_000)
        yield tab
        assert said == []

def run_all(tab, seconds):
    "Run the whole notebook from the menu; none of its cells may end in an error."
    tab.get_by_role('menuitem', name='Run', exact=True).click()
    tab.get_by_text('Run All Cells', exact=True).click()
    prompts, errors = tab.locator('.jp-CodeCell .jp-InputPrompt'), tab.locator(ERROR)
    def done():
        texts = prompts.all_text_contents()
        return errors.count() or texts and all(re.fullmatch(r'\[\d+\]:', t) for t in texts if t != '[ ]:') and re.search(r'\d', texts[-1])
    wait_for(done, seconds, lambda: f'still at {prompts.all_text_contents()}')
    assert errors.all_text_contents() == []

def picture(part, name):
    "Keep how it looks, in the folder that CAPNB_SCREENSHOTS names."
    if folder := os.environ.get('CAPNB_SCREENSHOTS'): part.screenshot(path=f'{folder}/{name}.png')

# --- The widgets, used

def captioned(widget): return ' '.join(t.split('\n')[0] for t in widget.locator('button.word').all_text_contents())

def change_of(widget, do):
    "Do something and wait until the caption is another one, and whole."
    before = captioned(widget)
    do()
    wait_for(lambda: captioned(widget) not in (before, '') and 'settled', 20, lambda: f'it stayed {before!r}')

def use_captions(widget):
    words = widget.locator('button.word')
    words.first.wait_for()
    change_of(widget, lambda: widget.locator('button.page').nth(1).click())
    words.nth(1).click()
    widget.get_by_text('it might have been').wait_for()
    assert 'glowing' in widget.locator('img').nth(1).get_attribute('alt')
    picture(widget, 'caption')
    change_of(widget, lambda: drag_to_three(widget))
    widget.get_by_role('button', name='sampling').click()
    widget.get_by_text('temperature').wait_for()
