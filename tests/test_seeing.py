"""Explanations for every kind of encoder, at any size of image, and for captions that are hard to take
apart."""
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from transformers import (
    CLIPImageProcessor, Dinov2Config, Dinov2Model, Siglip2ImageProcessor, Siglip2VisionConfig,
    Siglip2VisionModel, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel
)
from capnb.captioner import Captioner
from capnb.build import build_captioner, new_adapter
from capnb.settings import as_hyperparameters
from capnb.encoder import ImageEncoder
from capnb.explanation import Word, _covered, _others, _words
from capnb.explanation import explain
from capnb.insight.attribution import draw_explanation
from capnb.storybook import Storybook

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
SIZE = dict(height=32, width=32)
TOWERS = dict(
    siglip=lambda: (
        SiglipVisionModel(SiglipVisionConfig(**SMALL, image_size=32)),
        SiglipImageProcessor(size=SIZE),
    ),
    siglip2=lambda: (
        Siglip2VisionModel(Siglip2VisionConfig(**SMALL, num_patches=16)),
        Siglip2ImageProcessor(patch_size=8, max_num_patches=16),
    ),
    dinov2=lambda: (
        Dinov2Model(Dinov2Config(**SMALL, image_size=32)),
        CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=SIZE),
    ),
)

@pytest.fixture(scope='module')
def plain(): return build_captioner(as_hyperparameters(), 'cpu').eval()

@pytest.fixture(scope='module')
def picture(): return Storybook('test')[7]['image']

@pytest.mark.parametrize('features', ['pooled', 'patch'])
@pytest.mark.parametrize('kind', TOWERS)
def test_every_encoder(plain, picture, kind, features):
    torch.manual_seed(0)
    tower, processor = TOWERS[kind]()
    encoder = ImageEncoder(tower, processor, features, 32)
    adapter = new_adapter(
        as_hyperparameters(features=features), encoder, plain.decoder.config.hidden_size, 1.0
    )
    caption, words = explain(
        Captioner(encoder, adapter, plain.decoder, plain.tokenizer, 48).eval(), picture, 'A red cat.'
    )
    assert [w.text for w in words] == ['A', 'red', 'cat', '.']
    maps = np.stack([w.patches for w in words])
    assert (
        maps.shape == (4, 8, 8) and np.isfinite(maps).all() and all(m.std() > 0 for m in maps)
    ), 'covering makes no difference'

@pytest.mark.parametrize('size', [(1, 1), (3, 200), (640, 480), (2000, 1500)])
def test_any_size(plain, picture, size):
    maps = [w.patches for w in explain(plain, picture.resize(size), 'A cat.')[1]]
    assert all(m.shape == (8, 8) and np.isfinite(m).all() for m in maps)

def test_what_the_encoder_does_not_see_is_no_reason(plain, picture):
    "CLIP cuts a wide image to the square in its middle."
    wide = Image.new('RGB', (192, 64))
    wide.paste(picture, (64, 0))
    maps = np.stack([w.patches for w in explain(plain, wide, 'A red cat.')[1]])
    assert np.abs(maps[:,:,3:5]).max() > 100*np.abs(maps[:,:,[0,7]]).max()

def test_other_modes_and_paths(plain, picture, tmp_path):
    picture.convert('P').save(tmp_path/'page.gif')
    assert len(explain(plain, tmp_path/'page.gif', 'A cat.', patches=False)[1]) == 3
    with pytest.raises(ValueError, match='nothing.png'):
        (tmp_path/'nothing.png').write_bytes(b'')
        explain(plain, tmp_path/'nothing.png')

def test_the_drawing_shows_what_was_explained(picture):
    words = [Word('cat', .9, [], np.ones((8, 8)))]
    def drawn(image):
        figure = draw_explanation('cat', words, image)
        return np.asarray(figure.subfigs[1].axes[0].images[0].get_array())
    page = picture.resize((60, 40))
    assert drawn(page.convert('L')).shape == (40, 60, 3)
    page.getexif()[0x0112] = 6 # the camera was held upright
    assert drawn(page).shape == (60, 40, 3)

def test_the_drawing_has_fonts_of_other_scripts(picture, monkeypatch):
    fonts = lambda first='DejaVu Sans': [first, 'Noto Sans CJK SC']
    monkeypatch.setattr('capnb.insight.attribution.fonts_for', fonts)
    figure = draw_explanation('猫', [Word('猫', .9, [('犬', .1)], np.ones((8, 8)))], picture)
    strip, word = figure.subfigs[0].axes[0], figure.subfigs[1].axes[1]
    assert [text.get_fontfamily() for text in strip.texts]==[fonts('DejaVu Sans Mono')]
    assert [text.get_fontfamily() for text in (word.title, *word.texts)]==[fonts()]*2

def test_white_space_that_might_have_been_is_shown():
    "Only the end of the text is called so."
    texts = ['<end>', '\n', ' ', ' cat', '\t ']
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids: texts[ids[0]])
    scores = torch.tensor([.1, .4, .3, .15, .05]).log()
    found = _others(SimpleNamespace(tokenizer=tokenizer), scores, 3, 4)
    assert [text for text,_ in found]==['\\n', '␣', '(end)', '\\t␣']

def test_windows_lie_around_their_cells(picture):
    "Each copy differs from the image in its window and nowhere else; at the edges the window ends there."
    pixels = np.asarray(picture).astype(int)
    copies = [np.asarray(c).astype(int) for c in _covered(picture, 8, 3)]
    assert len(copies) == 64
    for cell,copy in enumerate(copies):
        top, left = 8*(cell//8)-8, 8*(cell%8)-8
        rows, columns = np.nonzero((copy != pixels).any(-1))
        assert (
            max(0, top) <= rows.min()
            and rows.max() < min(64, top + 24)
            and max(0, left) <= columns.min()
            and columns.max() < min(64, left + 24)
        )
        inside = copy[max(0, top):top+24, max(0, left):left+24].reshape(-1, 3)
        assert (inside == inside[0]).all() and np.abs(inside[0]-pixels.mean((0, 1))).max() <= 1

@pytest.mark.parametrize(
    'caption',
    ['A red cat.', "It's 3.5 cafés – naïve, isn't it?", '🙂🙂 x', 'a  b', '“Grüße”\u00a0an 猫', '...', ''],
)
def test_words_are_the_caption(plain, caption):
    "No token is lost or taken twice, and the words, without what is between them, are the caption."
    words = _words(plain.tokenizer, caption, 99)
    assert [i for _, tokens in words for i in tokens] == list(
        range(len(plain.tokenizer(caption)['input_ids']))
    )
    assert ''.join(text for text,_ in words) == ''.join(caption.split())

def test_a_long_caption_is_cut_as_the_model_cuts_it(plain, picture):
    _, words = explain(plain, picture, 'a red cat and '*40, patches=False)
    assert 40 < len(words) <= plain.max_caption_length and all(0 <= w.probability <= 1 for w in words)

def test_others_come_in_between(plain, picture):
    "The work has parts between which something else can be done, or which end it."
    calls = []
    explain(plain, picture, 'A cat.', between=lambda: calls.append(0))
    assert len(calls) >= 8
    def stop():
        raise TimeoutError
    with pytest.raises(TimeoutError):
        explain(plain, picture, 'A cat.', between=stop)
