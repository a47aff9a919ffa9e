"""The feature cache from outside: killed passes, two at once, changed images, damaged shards, folders that
cannot be written, and what half precision does to the loss."""
import io, os, subprocess, sys, time
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
import numpy as np, pytest, torch
from PIL import Image
from damage import saved
from forks import fork
from capnb import images
from capnb.fast import cache as enc
from capnb.build import build_captioner
from capnb.files import shown_path
from capnb.hardware import usable_cores
from capnb.settings import Hyperparameters, OWN_DATA, as_hyperparameters
from capnb.data import CaptionData
from capnb.run.entry import prepare
from capnb.run.sources.load import load_data
from capnb.storybook import Storybook
from capnb.image_pool import DecodingPool
from capnb.images import open_image
from capnb.encoder import load_encoder
from capnb.fast.cache import FeatureCache, encode_data, features_folder

def encode_pages(folder, number):
    "In a process of its own: encode the first pages in shards of 32."
    enc.SHARD_ROWS = 32
    data = load_data('storybook', limit=number)['train']
    encode_data(load_encoder('storybook-clip', 'cpu', 64), data, 32, folder=folder)

shards = lambda folder: sorted(Path(folder).glob('*/*.npy'))

@pytest.mark.parametrize('kind', ['cuda', 'mps', 'xpu'])
def test_a_gpu_encodes_many_at_a_time_in_one_thread(kind):
    "Its libraries take memory for each thread that calls them; and starting its work costs the readers time."
    encoder, threads = SimpleNamespace(device=torch.device(kind)), []
    def encode(seen):
        threads.append(get_ident())
        return seen
    found = list(enc._passes(encoder, lambda i: [2*i, 2*i+1], encode, 2*enc.TOGETHER+1, 4))
    assert [len(together) for together in found]==[2*enc.TOGETHER]*2 + [2]
    assert sum(found, []) == list(range(4*enc.TOGETHER+2)) and set(threads)=={get_ident()}

@pytest.fixture(scope='module')
def encoder(): return load_encoder('storybook-clip', 'cpu', 64)

@pytest.fixture(scope='module')
def pages():
    return [dict(row) for row in (load_data('storybook', limit=96)['train'][i] for i in range(96))]

@pytest.fixture(scope='module')
def plain(encoder, pages): return encode_data(encoder, CaptionData(pages)).features

@pytest.fixture
def count(encoder, monkeypatch):
    "How many images were really encoded."
    seen, forward = [], enc.ImageEncoder.forward
    monkeypatch.setattr(
        enc.ImageEncoder, 'forward', lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels)
    )
    return lambda: sum(seen)

def test_there_are_as_many_threads_as_usable_cores(encoder, pages, tmp_path, monkeypatch):
    "In a container or on a cluster these may be a few of many."
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    numbers, ahead = [], enc._ahead
    def noted(do, n, threads, *more):
        numbers.append(threads)
        return ahead(do, n, threads, *more)
    monkeypatch.setattr(enc, '_ahead', noted)
    encode_data(encoder, CaptionData(pages[:4]), folder=tmp_path)
    assert numbers==[3]

@pytest.mark.skipif(sys.platform!='linux', reason='containers are a matter of Linux')
def test_a_quota_of_a_container_limits_the_cores(monkeypatch):
    "As of `docker run --cpus 2.5`: all cores may be used, but not all of the time."
    quota, opened, exists = '/sys/fs/cgroup/cpu.max', open, os.path.exists
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: range(64), raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os.path, 'exists', lambda path: path==quota or exists(path))
    for said, cores in (('250000 100000\n', 3), ('max 100000\n', 64)):
        def read(file, *args, said=said, **how):
            return io.StringIO(said) if file==quota else opened(file, *args, **how)
        monkeypatch.setattr('builtins.open', read)
        assert usable_cores()==cores

def test_what_was_encoded_before_an_error_is_kept(encoder, pages, count, tmp_path):
    rows = [*pages[:39], dict(image=b'no image', captions=['A card.'])]
    with pytest.raises(ValueError, match='row 39'):
        encode_data(encoder, CaptionData(rows), 8, folder=tmp_path, threads=1)
    assert count()==32
    again = encode_data(encoder, CaptionData(pages[:39]), 8, folder=tmp_path)
    assert count()==39 and len(again.features)==39

def test_killed_pass_goes_on(encoder, count, tmp_path):
    process = fork(encode_pages, tmp_path, 1500)
    while len(shards(tmp_path)) < 2:
        assert process.exitcode is None
        time.sleep(.02)
    process.kill()
    process.join()
    kept = len(shards(tmp_path))*32
    assert 64 <= kept < 1500
    data = load_data('storybook', limit=kept+40)['train']
    again = encode_data(encoder, data, folder=tmp_path)
    assert count()==40
    torch.testing.assert_close(again.features[:], encode_data(encoder, data).features, atol=2e-3, rtol=1e-3)

def test_a_part_that_another_process_completes_meanwhile(encoder, tmp_path):
    "A file that is listed, but gone when it is looked at, as a link that leads nowhere is."
    def encoded(number):
        process = fork(encode_pages, tmp_path, number)
        process.join()
        assert process.exitcode == 0
    encoded(32)
    (folder,) = {shard.parent for shard in shards(tmp_path)}
    (folder/'.other.npy.abc.part').symlink_to('nowhere')
    encoded(64)
    assert len(shards(tmp_path))==2

def test_two_at_once(encoder, count, tmp_path):
    both = [fork(encode_pages, tmp_path, 128) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    data = load_data('storybook', limit=128)['train']
    together = encode_data(encoder, data, folder=tmp_path).features[:]
    assert count()==0 and not list(tmp_path.rglob('*.part'))
    torch.testing.assert_close(together, encode_data(encoder, data).features, atol=2e-3, rtol=1e-3)

def test_order_subsets_and_changes(encoder, pages, plain, count, tmp_path):
    encode_data(encoder, CaptionData(pages), folder=tmp_path)
    assert count()==96
    turned = encode_data(
        encoder, CaptionData([dict(p, captions=['other words']) for p in pages[::-1]]), folder=tmp_path
    )
    assert (
        count() == 96
        and torch.equal(turned.features[:], plain.flip(0))
        and turned[3]['captions'] == ['other words']
    )
    pages = list(pages)
    pages[40] = dict(pages[40], image=pages[40]['image'].copy())
    pages[40]['image'].putpixel((0,0), (255,0,0))
    changed = encode_data(encoder, CaptionData(pages), folder=tmp_path).features[:]
    assert count()==97 and (changed!=plain).any(1).nonzero().flatten().tolist()==[40]

def test_a_cached_pass_asks_no_child(encoder, tmp_path, monkeypatch):
    files = [saved(image, 'PNG') for image in (Image.new('RGB', (20, 20), (i, 0, 0)) for i in range(10))]
    data = CaptionData([dict(image=file, captions=['one']) for file in files])
    expected = encode_data(encoder, data, folder=tmp_path).features[:]
    monkeypatch.setattr(DecodingPool, '_ask', lambda *args: pytest.fail('a child was asked'))
    assert torch.equal(encode_data(encoder, data, folder=tmp_path).features[:], expected)

def test_a_large_batch_is_opened_in_messages(encoder, tmp_path, monkeypatch):
    files = [saved(Image.new('RGB', (20, 20), (i, 0, 0)), 'PNG') for i in range(100)]
    sizes, ask = [], DecodingPool._ask
    def noted(self, request, body):
        sizes.append(len(request.get('sizes', [0])))
        return ask(self, request, body)
    monkeypatch.setattr(DecodingPool, '_ask', noted)
    data = CaptionData([dict(image=file, captions=['one']) for file in files])
    encode_data(encoder, data, 100, folder=tmp_path/'many', threads=1)
    assert sizes==[64, 36]
    sizes.clear()
    monkeypatch.setattr(enc, 'MOST_BYTES', sum(map(len, files[:40])))
    encode_data(encoder, data, 100, folder=tmp_path/'large', threads=1)
    assert len(sizes)==3 and min(sizes) > 1 and sum(sizes)==100

def test_large_images_do_not_wait_for_the_end_of_a_batch(encoder, plain, pages, tmp_path, monkeypatch):
    together, make = [], enc.image_opener
    def noting(n):
        def opened(images, **how):
            together.append(len(images))
            return opener(images, **how)
        opener = make(n)
        return opened
    monkeypatch.setattr(enc, 'image_opener', noting)
    monkeypatch.setattr(enc, 'MOST_BYTES', 3*3*64*64) # three pages
    features = encode_data(encoder, CaptionData(pages[:9]), 9, folder=tmp_path, threads=1).features[:]
    torch.testing.assert_close(features, plain[:9])
    assert [n for n in together if n > 1]==[3, 3, 3]

def test_repeated_pictures_are_encoded_once(encoder, pages, plain, count, tmp_path):
    twice = encode_data(encoder, CaptionData(pages[:20]*3), 8, folder=tmp_path).features
    assert count()==20 and torch.equal(twice[40:60], twice[:20])

def test_training_images_in_another_split_are_told(tmp_path, capsys):
    "Whatever they are called: the first four come as other objects, with other captions."
    pages = [{k: page[k] for k in ('image', 'captions')} for page in Storybook(n=12)]
    again = [dict(image=page['image'].copy(), captions=['A page.']) for page in pages[:4]]
    splits = dict(train=pages[:8], validation=[*pages[8:], *again], test=pages[8:])
    prepare(as_hyperparameters(data=OWN_DATA, features_dir=str(tmp_path)), splits, 'cpu')
    told = [line for line in capsys.readouterr().out.splitlines() if "also in 'train'" in line]
    assert len(told)==1 and told[0].startswith("⚠️ 4 images of 'validation' are also in 'train'")

@pytest.mark.parametrize('damage', ['bit', 'cut', 'empty', 'other'])
def test_damaged_shard_is_encoded_again(encoder, pages, plain, count, tmp_path, capsys, damage):
    encode_data(encoder, CaptionData(pages), folder=tmp_path)
    shard, = shards(tmp_path)
    content = bytearray(shard.read_bytes())
    content[len(content)//2] ^= 4
    if damage=='other':
        np.save(shard, np.zeros(3))
    else:
        shard.write_bytes(dict(bit=content, cut=content[:-100], empty=b'')[damage])
    again = encode_data(encoder, CaptionData(pages), folder=tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert count()==192 and torch.equal(again.features[:], plain)
    assert len(said)==1 and f'{shard} is damaged' in said[0]
    encode_data(encoder, CaptionData(pages), folder=tmp_path)
    assert count()==192 and not capsys.readouterr().out and len(shards(tmp_path))==1

@pytest.mark.parametrize('part', [bytes(64), b'(((('], ids=['lost', 'wrong'])
def test_a_damaged_header_is_a_damaged_shard(encoder, pages, plain, count, tmp_path, capsys, part):
    "NumPy parses the header as Python, and its parser raises more than `ValueError`."
    encode_data(encoder, CaptionData(pages[:8]), folder=tmp_path)
    shard, = shards(tmp_path)
    whole = shard.read_bytes()
    at = whole.index(b"'fortran_order'")
    shard.write_bytes(whole[:at] + part + whole[at+len(part):])
    again = encode_data(encoder, CaptionData(pages[:8]), folder=tmp_path)
    assert count()==16 and torch.equal(again.features[:], plain[:8])
    assert f'{shard} is damaged' in capsys.readouterr().out

def test_a_leftover_that_cannot_be_deleted_stops_nothing(encoder, pages, tmp_path, monkeypatch):
    "It may belong to somebody else."
    encode_data(encoder, CaptionData(pages[:2]), folder=tmp_path)
    part = shards(tmp_path)[0].with_name('.other.npy.abc.part')
    part.touch()
    os.utime(part, (0, 0))
    unlink = Path.unlink
    def refused(self, *args, **how):
        if self==part: raise PermissionError(13, 'Permission denied', str(self))
        unlink(self, *args, **how)
    monkeypatch.setattr(Path, 'unlink', refused)
    encode_data(encoder, CaptionData(pages[2:4]), folder=tmp_path)
    assert len(shards(tmp_path))==2 and part.exists()

@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='the system does not list mapped files')
def test_nothing_is_mapped_when_the_temporary_folder_is_deleted(encoder, pages, monkeypatch):
    "Windows cannot delete mapped files."
    mapped = []
    class Noting(enc.TemporaryDirectory):
        def cleanup(self):
            mapped.append(self.name in Path('/proc/self/maps').read_text())
            super().cleanup()
    monkeypatch.setattr(enc, 'TemporaryDirectory', Noting)
    encode_data(encoder, CaptionData(pages[:4]))
    assert mapped==[False]

def test_full_disk(encoder, pages, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(enc.np.lib.format, 'write_array_header_1_0', full)
    with pytest.raises(OSError, match=r'No space left on device; .*features_dir') as e:
        encode_data(encoder, CaptionData(pages), folder=tmp_path)
    assert (
        '.npy' in str(e.value)
        and '\n' not in str(e.value)
        and not list(tmp_path.rglob('*.npy')) + list(tmp_path.rglob('*.part'))
    )

def test_folder_that_cannot_be_written(encoder, pages, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='features_dir') as e:
        encode_data(encoder, CaptionData(pages[:4]), folder=tmp_path/'file')
    assert 'file' in str(e.value) and '\n' not in str(e.value)

def test_patches_wait_in_small_shards(pages, tmp_path, capsys, monkeypatch):
    "Features that were written are let go: never more than a shard waits, whatever the number of images."
    monkeypatch.setattr(enc, 'SHARD_BYTES', 2**17)
    waiting, add = [], FeatureCache.add
    monkeypatch.setattr(
        FeatureCache, 'add', lambda self, *a: (add(self, *a), waiting.append(len(self.waiting)))
    )
    patches = load_encoder('storybook-clip', 'cpu', 64, 'patch')
    seen = encode_data(patches, CaptionData(pages[:40]), 16, 'Encoding', tmp_path)
    assert max(waiting)==7 and len(shards(tmp_path))==5 and seen.features.shape==(40,64,128)
    assert '40 images take 16,384 bytes each, 0.7 MB in all' in capsys.readouterr().out
    torch.testing.assert_close(
        seen.features[[39, 0]], patches.encode([pages[39]['image'], pages[0]['image']]), atol=1e-2, rtol=1e-3
    )

def test_too_large_for_half(encoder, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(enc.ImageEncoder, 'forward', lambda self, pixels: torch.full((len(pixels),512), 1e5))
    with pytest.raises(ValueError, match=r'features of 0-train-0 are not numbers up to 65,504'):
        encode_data(encoder, CaptionData(pages[:4]), folder=tmp_path)
    assert not shards(tmp_path)

def test_half_precision_and_the_loss(pages, plain):
    """The loss of a captioner on features in half precision differs by less than a thousandth of a nat per
    token."""
    torch.manual_seed(0)
    model = build_captioner(as_hyperparameters(), 'cpu').eval()
    images, texts = [p['image'] for p in pages[:32]], [p['captions'][0] for p in pages[:32]]
    with torch.no_grad():
        full, half = model(model.encoder.encode(images), texts).item(), model(plain[:32], texts).item()
    print(f'loss {full:.6f} in full precision, {half:.6f} in half')
    assert 0 < abs(full-half) < 1e-3

def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert features_folder(as_hyperparameters()) is None
    assert features_folder(Hyperparameters())==tmp_path/'capnb'/'features'
    assert features_folder(as_hyperparameters(features_dir='here'))==Path('here')

@pytest.mark.skipif(os.name!='posix', reason='Windows finds a home folder otherwise')
def test_without_a_home_folder(monkeypatch):
    "As in a container with the number of a user that it does not know."
    monkeypatch.delenv('HOME')
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    monkeypatch.setattr('pwd.getpwuid', lambda number: {}[number])
    assert shown_path('a/b')==str(Path('a/b')) and shown_path('/a/b')==str(Path('/a/b'))
    with pytest.raises(ValueError, match='name a folder with features_dir'):
        features_folder(Hyperparameters())

@pytest.mark.skipif(os.name!='posix', reason='Windows finds a home folder otherwise')
def test_scores_without_a_home_folder():
    "The toolkit behind ROUGE-L looks for a folder for its data when it is imported."
    code = 'import pwd; pwd.getpwuid = lambda number: {}[number]; import capnb.evaluation'
    env = {k: v for k,v in os.environ.items() if k not in ('HOME', 'NLTK_DATA')}
    subprocess.run([sys.executable, '-c', code], env=env, check=True, timeout=120)

def photograph(size):
    "The bytes of a JPEG with structure at all scales."
    dice, image = np.random.default_rng(0), np.zeros((size[1], size[0], 3))
    for scale in (2, 8, 32, 128, 512):
        image += (
            np.asarray(
                Image.fromarray(
                    dice.integers(0, 255, (size[1] // scale, size[0] // scale, 3), np.uint8)
                ).resize(size)
            )
            / 5
        )
    return lambda kind, **more: saved(Image.fromarray(image.astype(np.uint8)), kind, **more)

def test_features_of_a_large_image_are_those_of_the_whole(encoder):
    """12 megapixels: what is made smaller as it is opened differs from the whole by less than a 200th, other
    images by a tenth and more."""
    encoded = photograph((4000, 3000))
    for file in (encoded('JPEG', quality=90), encoded('PNG', compress_level=1)):
        small, whole = open_image(file, min_side=encoder.min_side), open_image(file)
        assert min(small.size) < 2*encoder.min_side and min(whole.size) == 3000
        one, other = encoder.encode([small, whole])
        assert (one-other).norm()/other.norm() < 5e-3
        assert torch.equal(
            encode_data(encoder, CaptionData([dict(image=file, caption='A flag.')])).features[0],
            one.half().float(),
        )

def test_an_image_of_no_more_than_twice_what_is_needed_stays_as_it_is(encoder):
    side = 2*encoder.min_side-1
    file = photograph((side+90, side))('JPEG', quality=90)
    assert open_image(file, min_side=encoder.min_side).tobytes() == open_image(file).tobytes()

def test_a_file_that_is_too_large_to_read_whole_is_opened_where_it_lies(encoder, tmp_path, monkeypatch):
    "Such as a film that is named like an image: reading it would fill the memory."
    (tmp_path/'film.png').write_bytes(b'film'*300)
    (tmp_path/'scan.bmp').write_bytes(saved(Image.effect_noise((64, 64), 50).convert('RGB'), 'BMP'))
    expected = encoder.encode([tmp_path/'scan.bmp'])
    for module in (enc, images):
        monkeypatch.setattr(module, 'MOST_FILE', 1000)
    monkeypatch.setattr(Path, 'read_bytes', lambda self: pytest.fail(f'{self} was read'))
    rows = [dict(image=str(tmp_path/name), caption='A card.') for name in ('scan.bmp', 'film.png')]
    assert torch.equal(encode_data(encoder, CaptionData(rows[:1])).features, expected.half().float())
    with pytest.raises(ValueError, match='row 1: .*its content is of no known format'):
        encode_data(encoder, CaptionData(rows))
