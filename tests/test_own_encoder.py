"An image encoder that is passed as a Python object: trained with, saved, loaded, cached and served."
import base64, io, json, random, signal, socket, time, urllib.request
import numpy as np
import pytest, torch
from PIL import Image
from damage import ENTRIES, jpeg, scene, tiff
from forks import ForkedScript
from mean_colours import MeanColours
from torch import nn
from capnb import evaluate, load, train
from capnb.build import build_captioner
from capnb.fast.cache import encode_data, features_key
from capnb.data import CaptionData
from capnb.encoder import load_encoder
from capnb.own_encoder import OwnEncoder, own_encoder
from capnb.run import entry
from capnb.run.commands import caption_command
from capnb.run.llava import as_llava
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook

SMALL = dict(num_epochs=1, training_size_limit=8, max_steps=2, evaluation_enabled=False)

@pytest.fixture(params=[16, None], ids=['patches', 'pooled'], scope='module')
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('own')
    result = train(encoder=MeanColours(request.param), output_dir=str(folder), **SMALL)
    return request.param, result

def image(): return Storybook('test', n=1)[0]['image']

def test_what_was_trained_is_loaded_with_the_encoder(trained):
    patches, result = trained
    h = result.metadata['hyperparameters']
    assert h['encoder_name']=='own:mean-colours'
    assert h['features']==('patch' if patches else 'pooled') and h['image_size']==64
    again = load(result.checkpoint, encoder=MeanColours(patches))
    assert again.caption(image())==result.model.caption(image())

def test_without_the_encoder_the_checkpoint_says_what_it_needs(trained, capsys):
    with pytest.raises(ValueError, match=r"own:mean-colours.*load\(checkpoint, encoder=") as e:
        load(trained[1].checkpoint)
    assert '\n' not in str(e.value)
    with pytest.raises(SystemExit):
        caption_command(['--checkpoint', str(trained[1].checkpoint), 'page.png'])

def test_another_encoder_is_refused(trained):
    patches, result = trained
    other = MeanColours(patches)
    other.name = 'other'
    with pytest.raises(ValueError, match="'own:mean-colours'.*'own:other'"):
        load(result.checkpoint, encoder=other)
    with pytest.raises(ValueError, match='frozen weights'):
        load(result.checkpoint, encoder=MeanColours(patches, seed=1))
    with pytest.raises(ValueError, match='with features'):
        load(result.checkpoint, encoder=MeanColours(None if patches else 16))
    with pytest.raises(ValueError, match='storybook-clip'):
        load('storybook', encoder=MeanColours(patches))

class Darker(MeanColours):
    "The same weights behind another `prepare`."
    def prepare(self, images):
        return super().prepare(images)/2

def test_an_encoder_with_other_features_is_refused(trained):
    patches, result = trained
    with pytest.raises(ValueError, match="own:mean-colours' that gave other features: its prepare"):
        load(result.checkpoint, encoder=Darker(patches))
    with pytest.raises(ValueError, match='gave other features'):
        train(resume=str(result.checkpoint.parent), encoder=Darker(patches), num_epochs=2, max_steps=4)

def test_a_run_goes_on_with_the_encoder_only(tmp_path):
    settings = dict(SMALL, output_dir=str(tmp_path))
    train(encoder=MeanColours(), **settings)
    more = dict(output_dir=str(tmp_path), resume=True, num_epochs=2, max_steps=4)
    with pytest.raises(ValueError, match=r'own:mean-colours.*train\(encoder'):
        train(**more)
    assert train(encoder=MeanColours(), **more).metadata['epoch']==2

@pytest.mark.parametrize('name', ['features', 'image_size', 'encoder_name'])
def test_settings_that_follow_from_the_encoder_are_not_given(name, tmp_path):
    with pytest.raises(ValueError, match=f'{name} follows from the encoder'):
        train(encoder=MeanColours(), output_dir=str(tmp_path), **{name: as_hyperparameters()[name]})

def test_each_process_tries_it_on_its_own_device(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass
    def tried(encoder, device):
        raise Stopped(device)
    monkeypatch.setattr(entry, 'join_processes', lambda device: f'{device}:3')
    monkeypatch.setattr(entry, 'own_encoder', tried)
    with pytest.raises(Stopped, match='^cuda:3$'):
        train(encoder=MeanColours(), device='cuda', output_dir=str(tmp_path), **SMALL)

def test_it_is_evaluated(trained):
    patches, result = trained
    data = dict(train=Storybook(n=4), test=Storybook('test', n=4))
    scores, captions = evaluate(load(result.checkpoint, encoder=MeanColours(patches)), data)
    assert len(captions)==4 and scores['loss'] > 0

def test_the_cache_knows_encoders_apart(tmp_path):
    data, key = CaptionData(Storybook(n=4)), lambda e: features_key(OwnEncoder(e, 'cpu'))[0]
    class Darker(MeanColours):
        def prepare(self, images): return super().prepare(images)/2
    class Squared(MeanColours):
        def forward(self, pixels): return super().forward(pixels)**2
    renamed = MeanColours()
    renamed.name = 'other'
    others = [MeanColours(4), MeanColours(seed=1), Darker(), Squared(), renamed]
    assert len({key(e) for e in (MeanColours(), *others)})==6 and key(MeanColours())==key(MeanColours())

    encoder = OwnEncoder(MeanColours(), 'cpu')
    first = encode_data(encoder, data, folder=tmp_path)
    encoder.model.forward = None # a second call would fail
    again = encode_data(encoder, data, folder=tmp_path)
    assert torch.equal(first.features[:], again.features[:]) and first.features.shape==(4, 16, 5)
    plain = OwnEncoder(MeanColours(), 'cpu').encode([row['image'] for row in Storybook(n=4)])
    torch.testing.assert_close(first.features[:], plain, atol=1e-3, rtol=1e-3)

def wait_until_healthy(port):
    for _ in range(600):
        try:
            return urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5)
        except OSError:
            time.sleep(.1)
    raise TimeoutError('no answer of the server')

def test_it_is_served(trained, environment):
    patches, result = trained
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = f"""
if __name__=='__main__':
    from mean_colours import MeanColours
    from capnb.run.serving.server import serve
    serve({str(result.checkpoint)!r}, port={port}, encoder=MeanColours({patches}))
"""
    script = result.checkpoint.parent/'serve.py'
    script.write_text(code, encoding='utf-8')
    server = ForkedScript(script, [], script.parent, environment())
    try:
        assert server.stdout.readline().startswith('serving ')
        png = io.BytesIO()
        image().save(png, 'png')
        body = json.dumps(dict(image=base64.b64encode(png.getvalue()).decode())).encode()
        wait_until_healthy(port)
        asked = urllib.request.Request(
            f'http://127.0.0.1:{port}/caption', body, {'Content-Type': 'application/json'}
        )
        answer = json.load(urllib.request.urlopen(asked, timeout=60))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    assert answer['caption']==result.model.caption(image())

def test_a_module_without_weights_works(tmp_path):
    class Grey(nn.Module):
        name, width, patches, image_size = 'grey', 64, None, 8
        def prepare(self, images):
            return torch.stack([torch.from_numpy(np.array(i.convert('L').resize((8, 8)))) for i in images])
        def forward(self, pixels): return pixels.flatten(1)/255
    result = train(encoder=Grey(), output_dir=str(tmp_path), **SMALL)
    assert load(result.checkpoint, encoder=Grey()).caption(image())==result.model.caption(image())

def test_it_stays_frozen_and_in_evaluation_mode():
    encoder = OwnEncoder(MeanColours(), 'cpu')
    model = build_captioner(as_hyperparameters(**encoder.settings), 'cpu', encoder)
    model.train()
    assert not model.encoder.model.training
    assert all(n.startswith('adapter.') for n,p in model.named_parameters() if p.requires_grad)

@pytest.mark.parametrize(
    'change, message',
    [
        (dict(name='a b'), "name is 'a b'"),
        (dict(width=0), 'width is 0'),
        (dict(patches=2.), 'patches is 2.0'),
        (dict(image_size=None), 'image_size is None'),
        (dict(width=4), r'forward gives \(3, 16, 5\) for 3 images, not \(3, 16, 4\)'),
        (dict(prepare=lambda images: images), r'prepare gives list for 3 images, not \(3, \.\.\.\)'),
        (dict(prepare=lambda images: torch.zeros(1, 3, 64, 64)), r'prepare gives \(1, 3, 64, 64\)'),
        (dict(forward=lambda pixels: pixels.new_full((3, 16, 5), torch.nan)), 'no number'),
        (dict(forward=lambda pixels: (pixels,)), r'forward gives tuple for 3 images, not \(3, 16, 5\)'),
    ],
)
def test_a_wrong_member_is_named(change, message):
    encoder = MeanColours()
    for name,value in change.items():
        setattr(encoder, name, value)
    with pytest.raises(ValueError, match=message) as e:
        OwnEncoder(encoder, 'cpu')
    assert '\n' not in str(e.value)

def test_a_wrapped_encoder_goes_to_the_device():
    encoder = OwnEncoder(MeanColours(), 'cpu')
    assert own_encoder(encoder) is encoder and encoder.device.type=='cpu'
    assert own_encoder(encoder, 'meta') is encoder and encoder.device.type=='meta'
    assert next(encoder.model.parameters()).device.type=='meta'

@pytest.mark.parametrize('own', [False, True], ids=['named', 'own'])
def test_a_file_is_encoded_as_it_is_captioned(own, tmp_path):
    "A transparent image is white, as people see it; its colours are hidden."
    encoder = OwnEncoder(MeanColours(), 'cpu') if own else load_encoder('storybook-clip', 'cpu')
    clear = Image.new('RGBA', (64, 64), (255, 0, 0, 0))
    clear.save(tmp_path/'clear.png')
    white = encoder.encode([Image.new('RGB', (64, 64), 'white')])
    for same in (clear, tmp_path/'clear.png', str(tmp_path/'clear.png')):
        assert torch.equal(encoder.encode([same]), white)

@pytest.mark.parametrize('own', [False, True], ids=['named', 'own'])
def test_an_opened_image_is_encoded_as_its_file(own, tmp_path):
    "What a file says of its pixels holds: which side is up, and which colour is transparent."
    encoder = OwnEncoder(MeanColours(), 'cpu') if own else load_encoder('storybook-clip', 'cpu')
    image = scene(random.Random(4), (96, 64))
    (tmp_path/'turned.jpg').write_bytes(jpeg(image, tiff(ENTRIES), b'', b''))
    image.paste((255, 0, 0), (0, 0, 48, 64))
    image.save(tmp_path/'clear.png', transparency=(255, 0, 0))
    for name in ('turned.jpg', 'clear.png'):
        plain = Image.open(tmp_path/name)
        assert plain.mode=='RGB'
        assert torch.equal(encoder.encode([plain]), encoder.encode([tmp_path/name]))

def test_it_has_no_form_as_a_llava(trained):
    with pytest.raises(ValueError, match='a module that was passed in Python'):
        as_llava(trained[1].model)

class Noted(MeanColours):
    "It keeps more than tensors with its weights, as quantised layers do."
    def get_extra_state(self): return dict(version=1)
    def set_extra_state(self, state): return None

def test_an_encoder_may_keep_more_than_tensors():
    key, again = (features_key(OwnEncoder(Noted(), 'cpu'))[0] for _ in range(2))
    assert key==again!=features_key(OwnEncoder(MeanColours(), 'cpu'))[0]

class Hooked(MeanColours):
    "Gives what a hook of an inner layer has seen, as is usual for a layer of somebody else's network."
    def __init__(self):
        super().__init__(None)
        self.mix.register_forward_hook(self.note)

    def note(self, layer, given, features):
        self.seen = features

    def forward(self, pixels):
        super().forward(pixels)
        time.sleep(.02) # in which another thread overwrites it
        return self.seen[:,0]

def test_an_encoder_with_hooks_stays_in_one_thread():
    encoder, pages = OwnEncoder(Hooked(), 'cpu'), CaptionData(Storybook(n=16))
    found = encode_data(encoder, pages, batch_size=2, threads=4).features[:]
    alone = torch.cat([encoder.encode([pages[i]['image']]) for i in range(16)])
    torch.testing.assert_close(torch.as_tensor(found).float(), alone, atol=1e-3, rtol=1e-3)
    assert not OwnEncoder(MeanColours(), 'cpu').one_thread

@pytest.mark.parametrize('change', ['dropout', 'mean of the batch', 'number of images'])
def test_an_image_has_the_same_features_alone_and_among_others(change):
    class Changed(MeanColours):
        def prepare(self, images):
            pixels = super().prepare(images)
            return pixels*len(images) if change=='number of images' else pixels

        def forward(self, pixels):
            features = super().forward(pixels)
            if change=='dropout':
                return nn.functional.dropout(features, .3)
            return features-features.mean(0) if change=='mean of the batch' else features
    with pytest.raises(ValueError, match="'mean-colours': an image alone has other features"):
        OwnEncoder(Changed(), 'cpu')

def test_few_whole_images_are_open_at_a_time_and_none_is_copied(trained, monkeypatch):
    model, sizes, seen, page = trained[1].model, [], [], image()
    prepare = model.encoder.model.prepare
    def noted(images):
        sizes.append(len(images))
        seen.extend(images)
        return prepare(images)
    monkeypatch.setattr(model.encoder.model, 'prepare', noted)
    captions = model.caption([page]*20)
    assert sizes==[16, 4] and captions==[captions[0]]*20
    seen.clear()
    model.encoder.prepare([page])
    assert seen[0] is page
