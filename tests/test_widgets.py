"The widgets without a browser: uploads, random numbers, and the pages of the error browser."
import io
from datetime import datetime, timezone
from threading import Thread
import pytest, torch
from capnb.data import CaptionData
from capnb.insight.widgets import captions, errors
from capnb.insight.widgets.captions import CaptionWidget
from capnb.insight.widgets.errors import ErrorBrowser
from capnb.insight.widgets.parts import card
from capnb.saving import load_model_from_checkpoint
from capnb.storybook import Storybook

@pytest.fixture(scope='module')
def model(): return load_model_from_checkpoint('storybook', 'cpu')[0]

@pytest.fixture
def browser():
    "An error browser of six images, three on a page."
    return ErrorBrowser(['A cat.']*6, Storybook('test', n=6))

def test_the_same_file_can_be_uploaded_again(model):
    book, f = Storybook('test'), io.BytesIO()
    book[5]['image'].save(f, 'png')
    content, now = f.getvalue(), datetime(2026, 1, 1, tzinfo=timezone.utc)
    file = dict(name='mine.png', type='image/png', size=len(content), content=content, last_modified=now)
    widget = CaptionWidget(model, [book[3]['image']])
    widget.upload.value = [file]
    mine = widget.caption
    widget.pick(0)
    assert widget.caption != mine
    widget.upload.value = [dict(file)]
    assert widget.caption == mine

def test_a_greedy_caption_leaves_random_numbers_alone(model, monkeypatch):
    real, seen = captions.stream, []
    def meanwhile(*args, **options): # as a training in another thread
        seen.append(torch.rand(1).item())
        return real(*args, **options)
    monkeypatch.setattr(captions, 'stream', meanwhile)
    torch.manual_seed(7)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(7)
    CaptionWidget(model, [Storybook('test')[3]['image']])
    assert [*seen, torch.rand(1).item()] == wanted

def test_words_keep_their_probabilities_while_others_use_the_decoder(model, monkeypatch):
    "Before each word is told, another thread has the same decoder read another image."
    book = Storybook('test')
    prefix = model.prefix(model.encoder.encode([book[5]['image']])).detach()
    def told():
        pieces = []
        captions.stream(model, book[3]['image'], lambda *piece: pieces.append(piece))
        return pieces
    class Meanwhile(captions.CaptionStreamer):
        def put(self, ids):
            other = Thread(target=model.decoder, kwargs=dict(inputs_embeds=prefix))
            other.start()
            other.join()
            super().put(ids)
    alone = told()
    monkeypatch.setattr(captions, 'CaptionStreamer', Meanwhile)
    assert told()==alone and len(alone) > 4

def test_captions_have_the_direction_of_their_script():
    said = 'كلب أحمر يجري في الثلج.'
    assert f' dir="auto">{said}<' in card(Storybook('test')[0]['image'], said, [])
    assert errors.listed([said, 'A dog.']).count('<li dir="auto">')==2

@pytest.mark.parametrize('facts', ['taken in Rome', ['a', 'b'], None, dict(year=1999)])
def test_a_column_that_is_called_facts_is_not_ours(facts):
    image = Storybook('test')[0]['image']
    rows = [dict(captions=['A cat.'], image=image, facts=facts) for _ in range(2)]
    assert list(ErrorBrowser(['A cat.']*2, rows).kind.options) == ['any']

def test_the_error_browser_opens_only_what_it_shows(tmp_path):
    good, bad = tmp_path/'good.png', tmp_path/'bad.png'
    Storybook('test')[0]['image'].save(good)
    bad.write_bytes(b'no image')
    rows = [dict(image=str(path), captions=['A cat.']) for path in (*[good]*3, bad)]
    browser = ErrorBrowser(['A dog.']*3 + ['A cat.'], CaptionData(rows))
    assert browser.where.value == '1 to 3 of 4' and not browser.errors.value
    browser.forth.click() # the best one is the broken one
    assert 'is not a readable image' in browser.errors.value

def test_paging_reads_no_captions(browser, monkeypatch):
    monkeypatch.setattr(errors, '_says', lambda *args: pytest.fail('no word is asked for'))
    browser.forth.click()
    assert browser.where.value == '4 to 6 of 6' and not browser.errors.value

def test_a_second_click_stays_on_the_last_page(browser):
    browser.forth.click()
    browser.forth.click() # from before the button was grey
    assert browser.where.value=='4 to 6 of 6' and browser.forth.disabled
    browser.word.value = 'zebra'
    assert browser.where.value=='no image fits' and not browser.errors.value

def test_back_ends_at_the_first_image(browser):
    browser.show(1)
    browser.back.click()
    assert browser.where.value == '1 to 3 of 6' and browser.back.disabled
