"""The notebooks as a reader has them: a real JupyterLab in a real Chromium, cells run from its menu, widgets
used with the mouse."""
import json, os, re, shutil, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('*.ipynb'))
LEFT_OUT = {'slow', 'notest', 'cuda'} # as in nbdev_test
SETTINGS = { # of JupyterLab: all cells in the page, also those out of sight, and no question about news
    'notebook-extension/tracker': dict(windowingMode='none'),
    'apputils-extension/notification': dict(fetchNews='false', checkForUpdates=False),
    'apputils-extension/themes': dict(theme='JupyterLab Light')}

def flags(cell):
    return {m[1] for m in re.finditer(r'^#\s*\|\s*(\w+)', ''.join(cell['source']), re.M)}

def copied(path, to):
    "Copy a notebook without outputs and without the cells that nbdev_test leaves out."
    nb = json.loads(path.read_text(encoding='utf-8'))
    nb['cells'] = [
        c | (dict(outputs=[], execution_count=None) if c['cell_type'] == 'code' else {})
        for c in nb['cells']
        if not (c['cell_type'] == 'code' and flags(c) & LEFT_OUT)
    ]
    (to/path.name).write_text(json.dumps(nb), encoding='utf-8')

def lab_options(here, port):
    return [
        f'--ServerApp.port={port}',
        '--ServerApp.port_retries=0',
        '--IdentityProvider.token=sesame',
        f'--ServerApp.root_dir={here/"nbs"}',
        '--ServerApp.open_browser=False',
        '--allow-root',
        f'--LabApp.user_settings_dir={here/"settings"}',
        f'--LabApp.workspaces_dir={here/"workspaces"}',
    ]

@pytest.fixture(scope='module')
def lab(tmp_path_factory, environment):
    "A JupyterLab over a copy of the notebooks: its `folder` and its `address`."
    here = tmp_path_factory.mktemp('lab')
    shutil.copytree(ROOT/'nbs', here/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', '*.ipynb'))
    for path in CHAPTERS:
        copied(path, here/'nbs')
    for name,settings in SETTINGS.items():
        file = here/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    folders = {f'JUPYTER_{kind}_DIR': str(here / kind) for kind in ('CONFIG', 'DATA', 'RUNTIME')} | dict(
        IPYTHONDIR=str(here / 'ipython')
    )
    with open(here/'log', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', *lab_options(here, port)],
            cwd=here,
            env=environment(**folders),
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(
            lambda: answers(f'http://127.0.0.1:{port}/api?token=sesame'),
            60,
            lambda: (here / 'log').read_text(),
        )
        yield SimpleNamespace(folder=here/'nbs', address=f'http://127.0.0.1:{port}/lab')
    finally:
        process.terminate() # it ends its kernels
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()

def answers(address):
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False

def wait_for(done, seconds, why):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, why()
        time.sleep(.2)

def end_kernels(lab):
    api = lab.address.removesuffix('/lab') + '/api/kernels'
    def ask(method, path=''):
        return urllib.request.urlopen(
            urllib.request.Request(api + path, method=method, headers={'Authorization': 'token sesame'}),
            timeout=60,
        ).read()
    for kernel in json.loads(ask('GET')):
        ask('DELETE', f"/{kernel['id']}")

@contextmanager
def opened(browser, lab, name):
    "A notebook in a tab of its own; JavaScript may report no error."
    with browser.new_context(
        viewport=dict(width=1250, height=1400),
        device_scale_factor=1.5 if os.environ.get('CAPNB_SCREENSHOTS') else 1,
    ) as context:
        tab, said = context.new_page(), []
        tab.on('console', lambda m: said.append(m.text) if m.type=='error' else None)
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.goto(f'{lab.address}/tree/{name}?token=sesame&reset')
        # the kernel listens: before that, running is passed over
        tab.locator('#jp-main-statusbar').get_by_text('| Idle').wait_for(timeout=60_000)
        yield tab
        end_kernels(lab) # or those of all chapters fill the memory
        assert said == []

def run_all(tab, seconds):
    "Run the whole notebook from the menu; none of its cells may end in an error."
    tab.get_by_role('menuitem', name='Run', exact=True).click()
    tab.get_by_text('Run All Cells', exact=True).click()
    prompts, errors = tab.locator('.jp-CodeCell .jp-InputPrompt'), tab.locator(
        '.jp-OutputArea-output[data-mime-type$=".stderr"]'
    ).filter(has_text='Traceback (most recent call last)')
    def done():
        texts = prompts.all_text_contents()
        return (
            errors.count()
            or texts
            and all(re.fullmatch(r'\[\d+\]:', t) for t in texts if t != '[ ]:')
            and re.search(r'\d', texts[-1])
        )
    wait_for(done, seconds, lambda: f'still at {prompts.all_text_contents()}')
    assert errors.all_text_contents() == []

def picture(part, name):
    "Keep how it looks, in the folder that CAPNB_SCREENSHOTS names."
    if folder := os.environ.get('CAPNB_SCREENSHOTS'):
        part.screenshot(path=f'{folder}/{name}.png')

# --- The widgets, used

def caption_of(widget):
    "The caption, as the image's alternative text has it, once it is whole; else None."
    caption, words = (
        widget.get_by_role('img').first.get_attribute('alt'),
        widget.locator('button.word').all_text_contents(),
    )
    return (
        caption
        if words and ''.join(caption.split()).startswith(''.join(w.split('\n')[0] for w in words))
        else None
    )

def next_caption(widget, do):
    "Do something, wait until the caption is another one, and give it."
    def whole(*others):
        "Wait for a caption that is all there and none of the others."
        found = []
        wait_for(
            lambda: found.append(caption_of(widget)) or found[-1] not in (None, *others),
            30,
            lambda: f'it stayed {others}, {found[-1]!r}',
        )
        return found[-1]
    before = whole() # words still on their way are no other caption
    do()
    return whole(before)

def use_captions(tab, widget):
    widget.locator('button.word').last.wait_for()
    widget.get_by_role('button', name='greedy').click() # whatever the cells have set
    said = {next_caption(widget, widget.locator('button.page').nth(i).click) for i in (1, 4)}
    assert len(said) == 2
    widget.locator('button.word').nth(2).click()
    widget.get_by_text('it might have been').wait_for()
    assert 'is lifted' in widget.locator('img').nth(1).get_attribute('alt')
    picture(widget, 'caption')
    greedy = caption_of(widget)
    widget.get_by_role('button', name='sampling').click()
    temperature = widget.locator('.widget-slider', has_text='temperature').locator('.noUi-handle')
    for key in ('End', 'Home', 'End'):
        temperature.press(key)
    draw = widget.locator('.widget-slider', has_text='draw').locator('.noUi-handle')
    drawn = {next_caption(widget, lambda: draw.press('PageUp')) for _ in range(2)}
    assert drawn - {greedy}
    picture(widget, 'caption_sampling')
    return greedy

def use_upload(tab, widget, folder):
    "An image of one's own, and a file that is none."
    from capnb.storybook import Storybook
    Storybook('test')[33]['image'].save(folder/'mine.png')
    (folder/'none.png').write_bytes(b'no picture')
    def choose(file):
        with tab.expect_file_chooser() as chooser:
            widget.get_by_role('button', name='your image').click()
        chooser.value.set_files(file)
    choose(folder/'none.png')
    widget.locator('.wrong', has_text='none.png is not a readable image').wait_for()
    next_caption(widget, lambda: choose(folder/'mine.png'))
    assert not widget.locator('.wrong').count()

def use_errors(tab, widget):
    picture(widget, 'errors')
    first = widget.locator('figcaption').first.text_content()
    widget.get_by_role('button', name='next').click()
    wait_for(lambda: widget.locator('figcaption').first.text_content() != first, 10, lambda: 'no next page')
    widget.get_by_placeholder('in caption or reference').fill('boat')
    widget.get_by_placeholder('in caption or reference').press('Enter')
    wait_for(
        lambda: all('boat' in text for text in widget.locator('figcaption').all_text_contents()),
        10,
        lambda: 'the word does not matter',
    )
    widget.locator('select').last.select_option('place left out')
    wait_for(
        lambda: all('place left out' in text for text in widget.locator('figcaption').all_text_contents()),
        10,
        lambda: 'the kind does not matter',
    )

def use_training(tab, widget, captions):
    "Start it, use another widget meanwhile, stop, go on, stop again."
    steps, stop = widget.get_by_text(re.compile(r'step \d+ of')), widget.get_by_role('button', name='stop')
    widget.get_by_role('button', name='start').click()
    steps.wait_for()
    next_caption(captions, captions.locator('button.page').first.click)
    for again in (True, False):
        steps.wait_for()
        stop.click()
        widget.get_by_text('go on with: train(resume=').wait_for(timeout=60_000)
        if again:
            widget.get_by_role('button', name='go on').click()
    assert not widget.locator('.wrong').count() and 'Curve of the loss' in widget.get_by_role(
        'img'
    ).first.get_attribute('alt')

def widget_of(tab, made):
    "The widget under the cell that makes it."
    cell = (
        tab.locator('.jp-CodeCell')
        .filter(has=tab.locator('.jp-InputArea').filter(has_text=f' = {made}('))
        .filter(has=tab.locator('.capnb'))
    )
    return cell.first.locator('.capnb').first

# --- The tests

# what the widgets show matters less than that they work
SMALL = {
    'n=160': 'n=96',
    "'validation', n=32": "'validation', n=8",
    "'test', n=60": "'test', n=36",
    'num_epochs=3': 'num_epochs=99',
}  # it goes on until the button stops it
MADE = ('here = ', 'model, ', 'asking = ', 'browser = ', 'data = dict(')
WIDGETS = ('17c_caption_widget', '17d_error_browser', '33d_live_training')

def wanted(cell):
    "Whether a cell makes a widget, or something that one needs."
    source = ''.join(cell['source'])
    needed = flags(cell) & {'export', 'hide'}
    return cell['cell_type'] == 'code' and (needed or source.startswith(MADE))

def small(to):
    "The cells of the chapters on widgets that make the widgets, with less to learn from, as one notebook."
    chapters = [json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8')) for name in WIDGETS]
    cells = [c | dict(outputs=[], execution_count=None) for nb in chapters for c in nb['cells'] if wanted(c)]
    text = json.dumps(chapters[0] | dict(cells=cells))
    for long,short in SMALL.items():
        assert long in text, f'there is no {long!r} to make smaller'
        text = text.replace(long, short)
    to.write_text(text, encoding='utf-8')

def test_widgets(browser, lab, tmp_path):
    small(lab.folder/'small.ipynb')
    with opened(browser, lab, 'small.ipynb') as tab:
        run_all(tab, 120)
        use_captions(tab, widget_of(tab, 'CaptionWidget'))
        use_upload(tab, widget_of(tab, 'CaptionWidget'), tmp_path)
        use_errors(tab, widget_of(tab, 'ErrorBrowser'))
        use_training(tab, widget_of(tab, 'LiveTraining'), widget_of(tab, 'CaptionWidget'))

@pytest.mark.slow
@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
def test_chapter(browser, lab, path):
    with opened(browser, lab, path.name) as tab:
        run_all(tab, 1800)
        picture(tab, path.stem)
        if path.stem == '17c_caption_widget':
            use_captions(tab, widget_of(tab, 'CaptionWidget'))
        if path.stem == '17d_error_browser':
            use_errors(tab, widget_of(tab, 'ErrorBrowser'))
        if path.stem == '33d_live_training':
            picture(widget_of(tab, 'LiveTraining'), 'training')
