"Data as people have it: what `capnb_data check` finds in it, and each format read to the letter."
import json, os, re
import numpy as np
import pytest
import torch
from PIL import Image
from capnb.data import CaptionData
from capnb.sources import check_data, find_warnings, ScannedImage

def colour(n): return Image.new('RGB', (16, 16), (n%7*36, n%11*23, n%13*19))

def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for n,name in enumerate(names): colour(n).save(folder/name)

# --- What the check finds

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "Thirty images with two captions each; five have no split, two pairs are the same image, one image has no row."
    folder = tmp_path_factory.mktemp('planted')/'album'
    write_images(folder, [f'{n}.png' for n in range(31)])
    for copy,source in ((7, 3), (21, 4)): (folder/f'{copy}.png').write_bytes((folder/f'{source}.png').read_bytes())
    splits = ['train']*20 + ['val']*3 + ['test']*2 + ['']*5
    rows = [[f'{n}.png', f'"Page {n}, card {k} is shown"', split] for n,split in enumerate(splits) for k in 'ab']
    rows[2][1] = rows[3][1] = 'Said two times here .'
    rows[20][1] = '"A cat"'
    rows[30][1] = '0.31'
    rows[31][1] = '12 13 14'
    rows[32][1] = 'a garÃ§on in the rain'
    rows[59][1] = 'This has no split .'
    text = '\n'.join(['file_name,caption,split', *map(','.join, rows)])
    (folder/'captions.csv').write_text(text, encoding='utf-8')
    return folder

def warned(found): return {w['kind']: w['count'] for w in found['warnings']}

def test_check_counts_what_is_planted(planted):
    found = check_data(planted)
    assert (found['images'], found['captions'], found['bad']) == (30, 60, [])
    assert {split: (s['images'], s['captions']) for split,s in found['splits'].items()} == dict(train=(20, 40), validation=(3, 6), test=(2, 4))
    assert (found['without_split']['images'], found['without_split']['captions']) == (5, 10)
    assert warned(found) == dict(images_in_several_splits=1, same_images=1, captions_twice=1, short_captions=2, space_before_stop=3,
                                 no_sentences=2, garbled_captions=1, images_without_row=1)
    examples = {w['kind']: w['examples'] for w in found['warnings']}
    assert examples['images_in_several_splits'] == ['4.png (train) = 21.png (validation)']
    assert examples['same_images'] == ['3.png (train) = 7.png (train)']
    assert examples['captions_twice'] == ['1.png: Said two times here .']
    assert examples['images_without_row'] == ['30.png']

def test_check_command_tells_warnings_apart_from_bad_rows(call, planted, tmp_path):
    done = call('capnb_data', 'check', planted, '--json_file', tmp_path/'found.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f'{planted}: 30 images, 60 captions'
    assert 'without a split, not used: 5 images, 10 captions' in lines
    assert 'warning: images that are more than once in their split: 1, such as 3.png (train) = 7.png (train)' in lines
    found = json.loads((tmp_path/'found.json').read_text(encoding='utf-8'))
    assert found['bad'] == [] and len(found['warnings']) == 8 == sum(line.startswith('warning: ') for line in lines)

def test_a_folder_with_images_without_a_split_trains(call, planted, tmp_path):
    done = call('capnb_train', '--data', planted, '--max_steps', 1, '--num_epochs', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'ℹ️ 5 images have no split and are not used' in done.stdout.splitlines()

SENTENCES = ['A cat on a mat.', 'Red, white and blue flags wave.', 'Un garçon sous la pluie.', 'Ночь, улица, фонарь, аптека горят.', '草の上で寝ている猫。', 'ÉTÉ À PARIS, SANS FIN', 'Bus 7 (out of service).']
NOT = {'no_sentences': ['0.31', "['a', 'b']", '{"caption": "a"}', 'red,white,blue', 'cat, dog, tree', 'dog.jpg', 'https://a.org/b c'[:15], 'NaN', '12 / 7'],
       'garbled_captions': ['un garÃ§on dort la nuit', 'Ã‰tÃ© Ã\xa0 la mer', 'it\ufffds a lost sign'], 'short_captions': ['A cat', 'Running'], 'space_before_stop': ['A cat sits .']}

@pytest.mark.parametrize('kind', [None, *NOT])
def test_which_captions_are_told(kind):
    "Sentences of other languages are no warning, neither is a script without spaces a short caption."
    captions = NOT.get(kind, SENTENCES)
    found = find_warnings([ScannedImage(str(n), 'train', bytes([n]), [caption]) for n,caption in enumerate(captions)])
    counts = {w['kind']: w['count'] for w in found}
    assert counts.get(kind, 0) == (len(captions) if kind else 0)
    if kind is None: assert counts == {}

def test_one_caption_for_all():
    scanned = [ScannedImage(str(n), 'train', bytes([n]), ['A nice photo to see.'] if n%2 else [f'A photo with number {n}.']) for n in range(40)]
    assert [(w['kind'], w['count'], w['examples']) for w in find_warnings(scanned)] == [('same_caption', 20, ['A nice photo to see.'])]
    assert find_warnings(scanned[:6]) == []

# --- Rows as people have them

SHAPES = {'height, width, 3': lambda a: a, '3, height, width': lambda a: a.transpose(2, 0, 1), 'floats': lambda a: (a/255).astype(np.float32), 'half floats': lambda a: (a/255).astype(np.float64),
          'tensor': lambda a: torch.tensor(a).permute(2, 0, 1), 'tensor of floats': lambda a: torch.tensor(a).permute(2, 0, 1)/255,
          'tensor with gradient': lambda a: (torch.tensor(a).permute(2, 0, 1)/255).requires_grad_(), 'image': Image.fromarray}

@pytest.mark.parametrize('shape', SHAPES)
def test_an_image_of_numbers(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    row = CaptionData([dict(image=SHAPES[shape](pixels), caption='A card.')])[0]
    assert np.array_equal(np.asarray(row['image']), pixels)

def test_grey_and_transparent_arrays():
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    for image in (grey, grey[...,None], grey[None], torch.tensor(grey)[None]/255):
        assert np.array_equal(np.asarray(CaptionData([dict(image=image, caption='A card.')])[0]['image'])[...,0], grey)
    clear = np.concatenate([np.zeros((12, 20, 3), np.uint8), np.zeros((12, 20, 1), np.uint8)], axis=2)
    assert np.asarray(CaptionData([dict(image=clear, caption='A card.')])[0]['image']).min() == 255

WRONG = {'channels first or last': np.zeros((3, 16, 3), np.uint8), 'shape (2, 3, 16, 16)': torch.zeros(2, 3, 16, 16), 'shape (16, 16, 2)': np.zeros((16, 16, 2), np.uint8), 'shape (0, 16, 3)': np.zeros((0, 16, 3), np.uint8),
         'float64 from 0 to 254': np.linspace(0, 254, 300).reshape(10, 10, 3), 'float32 from -1 to 1': torch.linspace(-1, 1, 300).reshape(3, 10, 10), 'from nan': np.full((9, 9), np.nan),
         'int64': np.zeros((9, 9, 3), int), 'uint16': np.zeros((9, 9), np.uint16)}

@pytest.mark.parametrize('said', WRONG)
def test_numbers_that_may_mean_several_images_are_refused(said):
    with pytest.raises(ValueError, match=re.escape(said)) as error: CaptionData([dict(image=WRONG[said], caption='A card.')])[0]
    assert str(error.value).startswith('row 0: an array of ')

def test_paths_and_bytes(tmp_path):
    write_images(tmp_path, ['a.png'])
    ways = [str(tmp_path/'a.png'), tmp_path/'a.png', (tmp_path/'a.png').read_bytes(), dict(bytes=None, path=str(tmp_path/'a.png')), colour(0)]
    rows = CaptionData([dict(image=way, caption='A card.') for way in ways])
    assert {row['image'].tobytes() for row in rows} == {colour(0).tobytes()}
    os.mkfifo(tmp_path/'pipe.png')
    for missing in ('pipe.png', 'b.png'):
        with pytest.raises(ValueError, match='row 0: there is no image'): CaptionData([dict(image=str(tmp_path/missing), caption='A card.')])[0]
