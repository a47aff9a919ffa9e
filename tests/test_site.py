"The documentation site: it is built without a broken link or anchor, and is used in a real browser."
import http.server, subprocess, sys, threading
from functools import partial
import pytest
from test_project import MODULES, NOTEBOOKS, ROOT

pytestmark = pytest.mark.slow

@pytest.fixture(scope='module')
def site():
    "The site, built and served on this machine: its address."
    done = subprocess.run(
        [sys.executable, ROOT/'.ci/site.py'], capture_output=True, text=True, encoding='utf-8', timeout=600
    )
    assert done.returncode == 0, (done.stdout+done.stderr)[-3000:]
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=ROOT/'_docs/site')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()

def test_each_chapter_and_each_module_has_a_page(site):
    built = ROOT/'_docs/site'
    assert [p.stem for p in NOTEBOOKS if not (built/f'{p.stem}.html').exists()] == []
    pages = [f'capnb.{m}' for m in MODULES if not m.startswith('_')]
    assert [p for p in pages if not (built/f'api/{p}.html').exists()] == []

def test_search_finds_a_chapter(site, browser):
    tab = browser.new_page()
    asked = []
    tab.on('request', lambda request: asked.append(request.url))
    tab.goto(f'{site}/index.html')
    tab.get_by_role('textbox', name='Search').fill('image gain')
    found = tab.locator('.md-search-result__item', has_text='5g. Does it look at the image?').first
    found.wait_for(timeout=20000)
    assert [url for url in asked if not url.startswith((site, 'data:', 'blob:'))] == [], 'it asks others'

@pytest.mark.parametrize('scheme, dark', [('light', False), ('dark', True)])
def test_the_scheme_is_that_of_the_reader(site, browser, scheme, dark):
    tab = browser.new_context(color_scheme=scheme).new_page()
    tab.goto(f'{site}/05_captioner.html')
    body = tab.evaluate('getComputedStyle(document.body).backgroundColor')
    shade = sum(int(part) for part in body[body.index('(')+1:-1].split(',')[:3])
    assert (shade < 300) == dark, body

@pytest.mark.parametrize('page', ['index', '01_data', '09_flickr30k_on_a_gpu', 'api/capnb.captioner'])
def test_a_phone_shows_whole_pages(site, browser, page):
    tab = browser.new_context(viewport=dict(width=390, height=844)).new_page()
    tab.goto(f'{site}/{page}.html')
    assert tab.evaluate('document.documentElement.scrollWidth') == 390
    loaded = tab.evaluate('[...document.images].every(i => i.complete ? i.naturalWidth > 0 : true)')
    assert loaded, 'an image is missing'
