"Image files as they come: with damage, of odd kinds, many and large."
import random, warnings
from collections import Counter
import pytest
from PIL import Image
from damage import ENTRIES, ODD, TURNED, damaged, jpeg, saved, scene, tiff
from capnb.images import open_image

def outcome(file):
    "What becomes of a damaged file: 'the same' as without damage, 'turned' or 'other' pixels, or 'refused' by name."
    try: found = open_image(file.data, file.name)
    except ValueError as e:
        assert str(e).startswith(f'{file.name} is not a readable picture: '), e
        return 'refused'
    wanted = open_image(file.whole)
    if found.size == wanted.size and found.tobytes() == wanted.tobytes(): return 'the same'
    turns = [wanted.transpose(t).tobytes() for t in Image.Transpose]
    return 'turned' if found.tobytes() in turns else 'other'

@pytest.mark.parametrize('n', [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_damage_to_metadata_costs_no_pixel(n, capsys):
    counts = Counter()
    with warnings.catch_warnings(action='ignore'):
        for file in damaged(n): counts[file.kind, outcome(file)] += 1
    with capsys.disabled(): print('', *(f'{kind} {what}: {k}' for (kind, what), k in sorted(counts.items())), sep='\n  ')
    for kind in ('icc', 'xmp'): assert counts[kind, 'the same'] == n//4
    assert counts['exif', 'the same'] + counts['exif', 'turned'] == n//4
    assert counts['exif', 'the same'] > n//8 # the orientation survives what is wrong beside it
    assert counts['pixels', 'refused'] and sum(counts.values()) == n

def test_orientation_survives_odd_entries():
    image = scene(random.Random(1))
    wanted = open_image(jpeg(image, tiff(ENTRIES), b'', b''))
    assert wanted.size == (32, 48)
    for entry in ODD: assert open_image(jpeg(image, tiff([TURNED, entry]), b'', b'')).tobytes() == wanted.tobytes(), entry

def test_tiff_with_a_bad_pointer_to_exif():
    image = scene(random.Random(2))
    file = saved(image, 'TIFF', tiffinfo={0x10f: 'maker', 0x112: 6})
    at = file.index(b'\x0f\x01\x02\0') # the tag for the maker becomes a pointer to EXIF data, which is a text
    assert open_image(file[:at] + b'\x69\x87' + file[at+2:]).tobytes() == open_image(file).tobytes()

def test_an_opened_image_opens_again():
    once = open_image(jpeg(scene(random.Random(3)), tiff(ENTRIES), b'', b''))
    assert open_image(once).tobytes() == once.tobytes() and open_image(once).size == once.size

class Unheard(Exception): "What no plugin of Pillow raises yet."

@pytest.mark.parametrize('error', [Unheard('odd'), AssertionError(), KeyError(3), TypeError('x\n'*500), MemoryError(), RecursionError('deep')])
def test_whatever_a_decoder_raises_is_that_images_error(error, monkeypatch):
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(Image, 'open', fail)
    with pytest.raises(ValueError, match='cat.jpg is not a readable picture: ') as e: open_image(b'\xff\xd8\xff', 'cat.jpg')
    assert len(str(e.value)) < 400 and '\n' not in str(e.value)

@pytest.fixture
def holiday(tmp_path):
    "A folder with captions, in which one photograph has a resolution that is no number."
    folder = tmp_path/'holiday'
    folder.mkdir()
    odd = tiff([TURNED, (0x11a, 7, 4, b'abcd')])
    for i in range(12): (folder/f'{i}.jpg').write_bytes(jpeg(scene(random.Random(i)), odd if i == 5 else b'', b'', b''))
    (folder/'captions.csv').write_text('file_name,caption\n' + ''.join(f'{i}.jpg,A flag of colours.\n' for i in range(12)))
    return folder

def test_check_takes_an_odd_photograph(holiday, call):
    done = call('capnb_data', 'check', holiday, cwd=holiday.parent)
    assert done.returncode == 0 and 'train: 10 ' in done.stdout and 'bad' not in done.stdout, done.stdout
    (holiday/'7.jpg').write_bytes((holiday/'7.jpg').read_bytes()[:300])
    done = call('capnb_data', 'check', holiday, cwd=holiday.parent)
    assert done.returncode == 1 and '7.jpg is not a readable picture' in done.stdout and '1 bad' in done.stderr
