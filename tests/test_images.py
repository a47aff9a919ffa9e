"Image files as they come: with damage, of odd kinds, many and large."
import io, os, random, subprocess, sys, warnings
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile
import pytest
from PIL import Image, ImageChops, ImageStat
from damage import ENTRIES, ODD, TURNED, damaged, jpeg, saved, scene, tiff
from capnb.image_pool import DecodingPool
from capnb.images import find_images, image_formats, open_image, use_one_thread
from capnb.inference import caption_files
from capnb.run.scale.sources import Source
from capnb.saving import load_model_from_checkpoint
from capnb.storybook import Storybook

def outcome(file):
    """What becomes of a damaged file: 'the same' as without damage, 'turned' or 'other' pixels, or 'refused'
    by name."""
    try:
        found = open_image(file.data, file.name)
    except ValueError as e:
        assert str(e).startswith(f'{file.name} is not a readable image: '), e
        return 'refused'
    wanted = open_image(file.whole)
    if found.size == wanted.size and found.tobytes() == wanted.tobytes():
        return 'the same'
    turns = [wanted.transpose(t).tobytes() for t in Image.Transpose]
    return 'turned' if found.tobytes() in turns else 'other'

@pytest.mark.parametrize('n', [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damage_to_metadata_costs_no_pixel(n, capsys):
    counts = Counter()
    with warnings.catch_warnings(action='ignore'):
        for file in damaged(n):
            counts[file.kind, outcome(file)] += 1
    with capsys.disabled():
        print('', *(f'{kind} {what}: {k}' for (kind, what), k in sorted(counts.items())), sep='\n  ')
    for kind in ('icc', 'xmp'):
        assert counts[kind, 'the same'] == n//4
    assert counts['exif', 'the same'] + counts['exif', 'turned'] == n//4
    assert counts['exif', 'the same'] > n//8 # the orientation survives what is wrong beside it
    assert counts['pixels', 'refused'] and sum(counts.values()) == n

def test_orientation_survives_odd_entries():
    image = scene(random.Random(1))
    wanted = open_image(jpeg(image, tiff(ENTRIES), b'', b''))
    assert wanted.size == (32, 48)
    for entry in ODD:
        assert open_image(jpeg(image, tiff([TURNED, entry]), b'', b'')).tobytes() == wanted.tobytes(), entry

def test_tiff_with_a_bad_pointer_to_exif():
    image = scene(random.Random(2))
    file = saved(image, 'TIFF', tiffinfo={0x10f: 'maker', 0x112: 6})
    at = file.index(b'\x0f\x01\x02\0') # the tag for the maker becomes a pointer to EXIF data, which is a text
    assert open_image(file[:at] + b'\x69\x87' + file[at+2:]).tobytes() == open_image(file).tobytes()

def test_an_opened_image_opens_again():
    once = open_image(jpeg(scene(random.Random(3)), tiff(ENTRIES), b'', b''))
    assert open_image(once).tobytes() == once.tobytes() and open_image(once).size == once.size

class Unheard(Exception):
    "What no plugin of Pillow raises yet."

@pytest.mark.parametrize(
    'error',
    [
        Unheard('odd'),
        AssertionError(),
        KeyError(3),
        TypeError('x\n' * 500),
        MemoryError(),
        RecursionError('deep'),
    ],
)
def test_whatever_a_decoder_raises_is_that_images_error(error, monkeypatch):
    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(ValueError, match='cat.jpg is not a readable image: ') as e:
        open_image(b'\xff\xd8\xff', 'cat.jpg')
    assert len(str(e.value)) < 400 and '\n' not in str(e.value)

@pytest.fixture
def holiday(tmp_path):
    "A folder with captions, in which one photograph has a resolution that is no number."
    folder = tmp_path/'holiday'
    folder.mkdir()
    odd = tiff([TURNED, (0x11a, 7, 4, b'abcd')])
    for i in range(12):
        (folder/f'{i}.jpg').write_bytes(jpeg(scene(random.Random(i)), odd if i == 5 else b'', b'', b''))
    (folder / 'captions.csv').write_text(
        'file_name,caption\n' + ''.join(f'{i}.jpg,A flag of colours.\n' for i in range(12))
    )
    return folder

def test_check_takes_an_odd_photograph(holiday, call):
    done = call('capnb_data', 'check', holiday, cwd=holiday.parent)
    assert done.returncode == 0 and 'train: 10 ' in done.stdout and 'bad' not in done.stdout, done.stdout
    (holiday/'7.jpg').write_bytes((holiday/'7.jpg').read_bytes()[:300])
    done = call('capnb_data', 'check', holiday, cwd=holiday.parent)
    assert (
        done.returncode == 1 and '7.jpg is not a readable image' in done.stdout and '1 bad' in done.stderr
    )

@pytest.fixture
def linked(tmp_path):
    "A folder with a linked one on another disk, which links back, and a link to what is above."
    album, disk = tmp_path/'album', tmp_path/'disk'
    (album/'a').mkdir(parents=True)
    disk.mkdir()
    for path in (album/'a'/'0.png', disk/'1.png'):
        path.write_bytes(saved(scene(random.Random(0)), 'PNG'))
    for link, target in (
        (album / 'b', disk),
        (album / '0', album / 'a'),
        (disk / 'back', album),
        (album / 'up', tmp_path),
        (disk / 'self', disk),
    ):
        link.symlink_to(target, target_is_directory=True)
    return album

def test_linked_folders_are_followed_once(linked):
    assert [p.relative_to(linked).as_posix() for p in find_images([linked])] == ['a/0.png', 'b/1.png']
    assert [p.relative_to(linked).as_posix() for p in find_images([linked / 'b'])] == [
        'b/1.png',
        'b/back/a/0.png',
    ] or sys.platform == 'win32'
    assert {p.name for p in find_images([f'{linked}/**/*.png'])} == {'0.png', '1.png'} and len(
        find_images([f'{linked}/**/*.png'])
    ) == 2

def test_rows_find_images_in_linked_folders(linked, call):
    for i in range(12):
        (linked/'b'/f'p{i}.png').write_bytes(saved(scene(random.Random(i)), 'PNG'))
    (linked / 'captions.csv').write_text(
        'file_name,caption\n' + ''.join(f'p{i}.png,A flag.\n' for i in range(12))
    )
    done = call('capnb_data', 'check', linked, cwd=linked.parent)
    assert 'bad' not in done.stdout and 'train: 10 ' in done.stdout, done.stdout

@pytest.fixture
def phone(tmp_path, monkeypatch):
    "A folder of a phone's images, on a machine without the packages for some of them."
    for name in ('pillow_heif', 'pillow_jxl'):
        monkeypatch.setitem(sys.modules, name, None)
    image_formats.cache_clear()
    folder = tmp_path/'phone'
    folder.mkdir()
    for name in ('a.png', 'b.PNG'):
        (folder/name).write_bytes(saved(scene(random.Random(0)), 'PNG'))
    for i in range(3):
        (folder/f'IMG_{i}.HEIC').write_bytes(b'\0\0\0\x18ftypheic' + bytes(12))
    for name, head in (('x.jxl', b'\xff\x0a'), ('notes.txt', b'a'), ('.DS_Store', b'')):
        (folder/name).write_bytes(head)
    yield folder
    image_formats.cache_clear()

def test_what_is_passed_over_is_told_by_suffix(phone, capsys):
    assert [p.name for p in find_images([phone])] == ['a.png', 'b.PNG']
    wanted = (
        f"{phone}: passed over 3 .heic, 1 .txt, 1 .jxl (pillow-heif and pillow-jxl-plugin would open some:"
        " pip install 'capnb[formats]')\n"
    )
    assert capsys.readouterr().err == wanted

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with names')
def test_what_is_no_file_is_passed_over_and_told(phone, capsys):
    "A pipe would be waited for without end, a link to nothing end the job."
    os.mkfifo(phone/'pipe.png')
    (phone/'gone.png').symlink_to('nowhere.png')
    assert [p.name for p in find_images([phone])] == ['a.png', 'b.PNG']
    assert '1 linked to nothing' in (said := capsys.readouterr().err) and '1 not a regular file' in said
    source = Source(str(phone))
    assert (
        source.kind == 'images'
        and [Path(p).name for p in source.files] == ['a.png', 'b.PNG']
        and all(source.files.values())
    )
    assert '1 linked to nothing' in (said := capsys.readouterr().err) and '1 not a regular file' in said

def test_packages_are_named_where_they_are_missing(phone):
    for name, format, package in (
        ('IMG_0.HEIC', 'HEIF', 'pillow-heif'),
        ('x.jxl', 'JXL', 'pillow-jxl-plugin'),
    ):
        with pytest.raises(
            ValueError,
            match=(
                f"{name} is not a readable image: it is {format}, which needs the package {package};"
                " install it with: pip install 'capnb.formats.'"
            ),
        ):
            open_image(phone/name)
    for name in ('a.png', 'b.PNG'):
        (phone/name).unlink()
    with pytest.raises(
        FileNotFoundError, match='no image at .* or below it; passed over: 3 .heic, .*pillow-heif'
    ):
        find_images([phone])

def test_a_zip_of_images_is_a_folder(tmp_path, capsys):
    "As the finder of a Mac zips a folder: with shadows of the files, which are no images."
    pages = {f'holiday/{i}.png': Storybook('test')[i]['image'] for i in range(2)}
    with ZipFile(tmp_path/'album.zip', 'w') as album:
        for name, image in pages.items():
            f = io.BytesIO()
            image.save(f, 'png')
            album.writestr(name, f.getvalue())
            album.writestr(f"__MACOSX/{name.replace('/', '/._')}", b'shadow')
        album.writestr('holiday/notes.txt', 'no image')
    wanted = [tmp_path/'album.zip'/name for name in pages]
    assert find_images([tmp_path/'album.zip']) == find_images([tmp_path/'album.zip'/'holiday']) == wanted
    assert capsys.readouterr().err.splitlines() == [
        f'{tmp_path}/album.zip: passed over 1 .txt', f'{tmp_path}/album.zip/holiday: passed over 1 .txt'
    ]
    assert find_images([wanted[1]]) == [wanted[1]]
    model = load_model_from_checkpoint('storybook', 'cpu')[0]
    assert [row['caption'] for row in caption_files(model, find_images([tmp_path/'album.zip']))] == [
        model.caption(image) for image in pages.values()
    ]
    for missing in ('album.zip/other', 'album.zip/holiday/2.png'):
        with pytest.raises(FileNotFoundError, match=f'no image at .*{missing}'):
            find_images([tmp_path/missing])

@pytest.mark.parametrize('suffix, package', [('heic', 'pillow_heif'), ('jxl', 'pillow_jxl')])
def test_formats_of_the_extra_are_images_as_others(suffix, package, tmp_path):
    pytest.importorskip(package)
    image_formats()
    image, path = scene(random.Random(5), (64, 48)), tmp_path/f'A.{suffix.upper()}'
    image.save(path, quality=95)
    assert find_images([tmp_path]) == [path]
    with DecodingPool(1) as pool:
        for found in (open_image(path), open_image(path.read_bytes()), pool.open(path)):
            assert found.size == (64, 48) and ImageStat.Stat(ImageChops.difference(found, image)).mean < [8]*3

def test_decoders_of_a_process_that_is_one_of_several_use_one_thread(monkeypatch):
    "As many in each as there are cores would take its memory, and the cores from the others."
    image_formats()
    settings = [ # module, its setting, and the value for one thread
        ('PIL.AvifImagePlugin', 'DEFAULT_MAX_THREADS', 1),
        ('pillow_jxl.JpegXLImagePlugin', 'DECODE_THREADS', 0),
        ('pillow_heif.options', 'DECODE_THREADS', 1),
    ]
    here = [row for row in settings if row[0] in sys.modules]
    for module,setting,_ in here:
        monkeypatch.setattr(sys.modules[module], setting, 7)
    use_one_thread()
    assert here==[(module, setting, getattr(sys.modules[module], setting)) for module,setting,_ in here]

@pytest.mark.parametrize('kind, size', [('pixels', (48, 32)), ('photograph', (32, 48))])
def test_jpeg_xl_is_turned_once(kind, size, tmp_path):
    """The decoder turns pixels of its own as their header says, and EXIF data is only a note of that; a
    photograph that was packed as it was comes as it was, to be turned."""
    pytest.importorskip('pillow_jxl')
    image_formats()
    image, exif, path = scene(random.Random(6)), tiff(ENTRIES), tmp_path/'a.jxl'
    if kind=='pixels':
        image.save(path, exif=exif, lossless=True)
    else:
        (tmp_path/'a.jpg').write_bytes(jpeg(image, exif, b'', b''))
        Image.open(tmp_path/'a.jpg').save(path, lossless_jpeg=True)
    with Image.open(path) as stored:
        assert stored.size==(48, 32) and b'II*' in stored.info['exif']
    found = open_image(path)
    assert found.size==found.info['original_size']==size
    if kind=='pixels':
        assert found.tobytes()==image.tobytes()

def test_many_large_images_are_never_held_whole(tmp_path):
    """Sixteen images of 12 megapixels, 48 MB each once they are decoded, in this process and its children
    together."""
    (tmp_path/'0.jpg').write_bytes(saved(scene(random.Random(0)).resize((4000, 3000)), 'JPEG'))
    files = [tmp_path/f'{i}.jpg' for i in range(16)]
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    code = f"""
import psutil, threading
from pathlib import Path
from capnb.many_images import open_images
me, peak, done = psutil.Process(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(.01): peak = max(peak, sum(p.memory_info().rss for p in [me, *me.children()]))
thread = threading.Thread(target=watch)
thread.start()
files = sorted(Path({str(tmp_path)!r}).glob('*.jpg'))
sizes = [image.size for image in list(open_images(files, 672, ahead=16))]
done.set()
thread.join()
print(len(sizes), *sizes[0], peak/1e6)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    n, width, height, peak = done.stdout.split() or pytest.fail(done.stderr)
    assert (n, width, height) == ('16', '1000', '750') and float(peak) < 400, done.stdout

def test_scale_takes_an_odd_photograph_and_names_a_broken_one(holiday):
    from types import SimpleNamespace
    import pyarrow as pa
    from capnb.run.scale.jobs import _open_rows
    from capnb.run.scale.sources import ROW
    files = [
        (holiday / '5.jpg').read_bytes(),
        (holiday / '6.jpg').read_bytes()[:300],
        (holiday / '7.jpg').read_bytes(),
        None,
    ]
    rows = pa.table([['odd', 'half', 'good', 'gone'], files, [None, None, None, 'gone is empty']], schema=ROW)
    with DecodingPool(1) as pool:
        images, errors = _open_rows(rows, pool, SimpleNamespace(min_side=64, steps=None))
    assert [image.tobytes() for image in images] == [
        open_image(file).tobytes() for file in (files[0], files[2])
    ]
    assert errors[1].startswith('half is not a readable image: ') and errors == [
        None,
        errors[1],
        None,
        'gone is empty',
    ]

def test_scale_follows_links_and_tells_what_it_passes_over(linked, phone, capsys):
    from capnb.run.scale.sources import Source
    source = Source(str(linked))
    assert sorted(source.files) == [f'{linked.as_posix()}/a/0.png', f'{linked.as_posix()}/b/1.png']
    assert [row['id'][0].as_py() for file in sorted(source.files) for row in source.read(file)] == [
        'a/0.png',
        'b/1.png',
    ]
    assert len(Source(str(phone)).files) == 2 and f'{phone}: passed over 3 .heic, ' in capsys.readouterr().err

def test_captions_of_files_name_the_broken_ones(holiday):
    from types import SimpleNamespace
    from capnb.inference import caption_files
    (holiday/'7.jpg').write_bytes((holiday/'7.jpg').read_bytes()[:300])
    model = SimpleNamespace(
        encoder=SimpleNamespace(min_side=64, steps=None, encode=list),
        caption_features=lambda images, scores, **kwargs: [f'{image.size}' for image in images],
    )
    found = list(caption_files(model, find_images([holiday]), batch_size=5))
    assert [f['file'] for f in found] == [str(p) for p in find_images([holiday])] and sum(
        'error' in f for f in found
    ) == 1
    # upright
    assert [f['caption'] for f in found if f['file'].endswith(('5.jpg', '6.jpg'))] == ['(32, 48)', '(48, 32)']
    assert 'is not a readable image' in next(f['error'] for f in found if f['file'].endswith('7.jpg'))

def test_a_large_file_that_is_no_image_is_not_read(tmp_path, monkeypatch):
    (tmp_path/'film.png').write_bytes(b'film'*300)
    monkeypatch.setattr('capnb.images.MOST_FILE', 1000)
    monkeypatch.setattr(Path, 'read_bytes', lambda self: pytest.fail('it was read'))
    with pytest.raises(ValueError, match='film.png is not a readable image: its content is of no known'):
        open_image(tmp_path/'film.png')

def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match='the image is not a readable image: it has no pixels'):
        open_image(Image.new('RGB', (0, 0)))

def test_a_pillow_without_avif_opens_the_others(monkeypatch):
    if find_spec('PIL.AvifImagePlugin'): # Pillow has it since 11.3
        import_module('PIL.AvifImagePlugin') # it is registered from now on
    file = saved(scene(random.Random(3)), 'JPEG2000')
    monkeypatch.delattr('PIL.AvifImagePlugin', raising=False)
    monkeypatch.setitem(sys.modules, 'PIL.AvifImagePlugin', None)
    monkeypatch.delitem(Image.OPEN, 'AVIF', raising=False)
    image_formats.cache_clear()
    try:
        assert open_image(file).size and 'AVIF' not in image_formats()
    finally:
        image_formats.cache_clear()

def test_hidden_folders_do_not_match_a_pattern(tmp_path):
    for name in ('a.png', '.thumbs/b.png', 'in/c.png', 'in/.d/e.png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    wanted = [tmp_path/'a.png', tmp_path/'in'/'c.png']
    assert find_images([f'{tmp_path}/**/*.png'])==wanted and find_images([tmp_path])==wanted
    assert find_images([f'{tmp_path}/.thumbs/**/*.png'])==[tmp_path/'.thumbs'/'b.png']
