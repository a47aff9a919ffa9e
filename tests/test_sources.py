"Data as people have it: what `capnb_data check` finds in it, and each format read to the letter."
import io, json, os, re, shutil, tarfile, tracemalloc, zipfile
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
import torch
from datasets import (
    Array2D, Array3D, Dataset, DatasetDict, Features, Image as ImageColumn, IterableDataset,
    IterableDatasetDict, List, Value
)
from PIL import Image
from capnb.files import read_text
from capnb.data import CaptionData
from capnb.run.sources import layouts
from capnb.run.sources.check import ScannedImage, check_data, find_warnings
from capnb.run.sources.load import load_data, skip_bad
from capnb.run.sources.rows import dataset_columns, image_columns

NAMES = [f'{1000+n}_a{n}.png' for n in range(20)]

def colour(n): return Image.new('RGB', (16, 16), (n%7*36, n%11*23, n%13*19))

def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for n,name in enumerate(names):
        colour(NAMES.index(name) if name in NAMES else n).save(folder/name)

# --- What the check finds

@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    """Thirty images with two captions each; five have no split, two pairs are the same image, one image has
    no row."""
    folder = tmp_path_factory.mktemp('planted')/'album'
    write_images(folder, [f'{n}.png' for n in range(31)])
    for copy,source in ((7, 3), (21, 4)):
        (folder/f'{copy}.png').write_bytes((folder/f'{source}.png').read_bytes())
    splits = ['train']*20 + ['val']*3 + ['test']*2 + ['']*5
    rows = [
        [f'{n}.png', f'"Page {n}, card {k} is shown"', split] for n, split in enumerate(splits) for k in 'ab'
    ]
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

def test_check_refuses_what_training_refuses(planted, tmp_path):
    shutil.copytree(planted, tmp_path, dirs_exist_ok=True)
    table = tmp_path/'captions.csv'
    table.write_text(re.sub(',(train|val)$', ',test', table.read_text('utf-8'), flags=re.M), 'utf-8')
    with pytest.raises(ValueError, match="no split 'train', only test"):
        check_data(tmp_path)

def test_check_counts_what_is_planted(planted):
    found = check_data(planted)
    assert (found['images'], found['captions'], found['bad']) == (30, 60, [])
    assert {split: (s['images'], s['captions']) for split, s in found['splits'].items()} == dict(
        train=(20, 40), validation=(3, 6), test=(2, 4)
    )
    assert (found['without_split']['images'], found['without_split']['captions']) == (5, 10)
    assert warned(found) == dict(
        images_in_several_splits=1,
        same_images=1,
        captions_twice=1,
        short_captions=2,
        space_before_stop=3,
        no_sentences=2,
        garbled_captions=1,
        images_without_row=1,
    )
    examples = {w['kind']: w['examples'] for w in found['warnings']}
    assert examples['images_in_several_splits'] == ['4.png (train) = 21.png (validation)']
    assert examples['same_images'] == ['3.png (train) = 7.png (train)']
    assert examples['captions_twice'] == ['1.png: Said two times here .']
    assert examples['images_without_row'] == ['30.png']

def test_check_of_a_table_alone(planted):
    assert warned(check_data(planted/'captions.csv'))['images_without_row'] == 1

def test_check_command_tells_warnings_apart_from_bad_rows(call, planted, tmp_path):
    done = call('capnb_data', 'check', planted, '--json_file', tmp_path/'found.json', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f'{planted}: 30 images, 60 captions'
    assert 'without a split, not used: 5 images, 10 captions' in lines
    assert (
        'warning: images that are more than once in their split: 1, such as 3.png (train) = 7.png (train)'
        in lines
    )
    found = json.loads((tmp_path/'found.json').read_text(encoding='utf-8'))
    assert found['bad'] == [] and len(found['warnings']) == 8 == sum(
        line.startswith('warning: ') for line in lines
    )

def test_a_folder_with_images_without_a_split_trains(call, planted, tmp_path):
    done = call('capnb_train', '--data', planted, '--max_steps', 1, '--num_epochs', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'ℹ️ 5 images have no split and are not used' in done.stdout.splitlines()

SENTENCES = [
    'A cat on a mat.',
    'Red, white and blue flags wave.',
    'Un garçon sous la pluie.',
    'Ночь, улица, фонарь, аптека горят.',
    '草の上で寝ている猫。',
    'ÉTÉ À PARIS, SANS FIN',
    'Bus 7 (out of service).',
]
NOT = {
    'no_sentences': [
        '0.31',
        "['a', 'b']",
        '{"caption": "a"}',
        'red,white,blue',
        'cat, dog, tree',
        'dog.jpg',
        'https://a.org/b c'[:15],
        'NaN',
        '12 / 7',
    ],
    'garbled_captions': ['un garÃ§on dort la nuit', 'Ã‰tÃ© Ã\xa0 la mer', 'it\ufffds a lost sign'],
    'short_captions': ['A cat', 'Running'],
    'space_before_stop': ['A cat sits .'],
}

@pytest.mark.parametrize('kind', [None, *NOT])
def test_which_captions_are_told(kind):
    "Sentences of other languages are no warning, neither is a script without spaces a short caption."
    captions = NOT.get(kind, SENTENCES)
    found = find_warnings(
        [ScannedImage(str(n), 'train', bytes([n]), [caption]) for n, caption in enumerate(captions)]
    )
    counts = {w['kind']: w['count'] for w in found}
    assert counts.get(kind, 0) == (len(captions) if kind else 0)
    if kind is None:
        assert counts == {}

def test_one_caption_for_all():
    scanned = [
        ScannedImage(
            str(n), 'train', bytes([n]), ['A nice photo to see.'] if n % 2 else [f'A photo with number {n}.']
        )
        for n in range(40)
    ]
    assert [(w['kind'], w['count'], w['examples']) for w in find_warnings(scanned)] == [
        ('same_caption', 20, ['A nice photo to see.'])
    ]
    assert find_warnings(scanned[:6]) == []

# --- Rows as people have them

SHAPES = {
    'height, width, 3': lambda a: a,
    '3, height, width': lambda a: a.transpose(2, 0, 1),
    'floats': lambda a: (a / 255).astype(np.float32),
    'half floats': lambda a: (a / 255).astype(np.float64),
    'tensor': lambda a: torch.tensor(a).permute(2, 0, 1),
    'tensor of floats': lambda a: torch.tensor(a).permute(2, 0, 1) / 255,
    'tensor with gradient': lambda a: (torch.tensor(a).permute(2, 0, 1) / 255).requires_grad_(),
    'image': Image.fromarray,
}

@pytest.mark.parametrize('shape', SHAPES)
def test_an_image_of_numbers(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    row = CaptionData([dict(image=SHAPES[shape](pixels), caption='A card.')])[0]
    assert np.array_equal(np.asarray(row['image']), pixels)

def test_grey_and_transparent_arrays():
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    for image in (grey, grey[...,None], grey[None], torch.tensor(grey)[None]/255):
        assert np.array_equal(
            np.asarray(CaptionData([dict(image=image, caption='A card.')])[0]['image'])[..., 0], grey
        )
    clear = np.concatenate([np.zeros((12, 20, 3), np.uint8), np.zeros((12, 20, 1), np.uint8)], axis=2)
    assert np.asarray(CaptionData([dict(image=clear, caption='A card.')])[0]['image']).min() == 255

WRONG = {
    'channels first or last': np.zeros((3, 16, 3), np.uint8),
    'shape (2, 3, 16, 16)': torch.zeros(2, 3, 16, 16),
    'shape (16, 16, 2)': np.zeros((16, 16, 2), np.uint8),
    'shape (0, 16, 3)': np.zeros((0, 16, 3), np.uint8),
    'float64 from 0 to 254': np.linspace(0, 254, 300).reshape(10, 10, 3),
    'float32 from -1 to 1': torch.linspace(-1, 1, 300).reshape(3, 10, 10),
    'from nan': np.full((9, 9), np.nan),
    'int64': np.zeros((9, 9, 3), int),
    'uint16': np.zeros((9, 9), np.uint16),
}

@pytest.mark.parametrize('said', WRONG)
def test_numbers_that_may_mean_several_images_are_refused(said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        CaptionData([dict(image=WRONG[said], caption='A card.')])[0]
    assert str(error.value).startswith('row 0: an array of ')

def test_paths_and_bytes(tmp_path):
    write_images(tmp_path, ['a.png'])
    ways = [
        str(tmp_path / 'a.png'),
        tmp_path / 'a.png',
        (tmp_path / 'a.png').read_bytes(),
        dict(bytes=None, path=str(tmp_path / 'a.png')),
        colour(0),
    ]
    rows = CaptionData([dict(image=way, caption='A card.') for way in ways])
    assert {row['image'].tobytes() for row in rows} == {colour(0).tobytes()}
    os.mkfifo(tmp_path/'pipe.png')
    for missing in ('pipe.png', 'b.png'):
        with pytest.raises(ValueError, match='row 0: there is no image'):
            CaptionData([dict(image=str(tmp_path/missing), caption='A card.')])[0]

# --- Formats: the same twenty images, with the same captions

SAID = {name: [f'A card, number {n}, of "{k}" kind.' for k in ('one', 'two')] for n,name in enumerate(NAMES)}
CUT = dict(train=16, validation=2, test=2)

def png(n):
    file = io.BytesIO()
    colour(n).save(file, 'PNG')
    return file.getvalue()

def stored(**more):
    "The twenty as `datasets` keeps them."
    rows = dict(
        image=[dict(bytes=png(n), path=None) for n in range(20)],
        caption=list(SAID.values()),
        filename=NAMES,
        **more
    )
    kinds = Features(
        image=ImageColumn(),
        caption=List(Value('string')),
        filename=Value('string'),
        **{name: Value('string') for name in more}
    )
    return Dataset.from_dict(rows, features=kinds)

def tarred(path, rows, suffixes, folder=''):
    with tarfile.open(path, 'w') as tar:
        for n in rows:
            said = SAID[NAMES[n]]
            texts = dict(
                txt='\n'.join(said),
                caption='\n'.join(said),
                json=json.dumps(dict(caption=said, url='https://a.org/b.png')),
            )
            for suffix,content in [('png', png(n)), *((s, texts[s].encode()) for s in suffixes)]:
                member = tarfile.TarInfo(f'{folder}{NAMES[n][:-4]}.{suffix}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

def write_json(folder, name, found):
    write_images(folder, NAMES)
    (folder/name).write_text(json.dumps(found), encoding='utf-8')

def parquet_file(folder):
    stored().to_parquet(folder/'flickr.parquet')
def parquet_shards(folder):
    (folder/'data').mkdir()
    for split,rows in (('train', range(14)), ('validation', range(14, 17)), ('test', range(17, 20))):
        stored().select(rows).to_parquet(folder/'data'/f'{split}-00000-of-00001.parquet')
def parquet_split_column(folder):
    stored(split=['train']*14+['val']*3+['test']*3).to_parquet(folder/'test.parquet')
def parquet_binary(folder):
    Dataset.from_dict(
        dict(image=[png(n) for n in range(20)], captions=list(SAID.values()), image_id=NAMES)
    ).to_parquet(folder / 'a.parquet')
def parquet_paths(folder):
    write_images(folder/'photos', NAMES)
    Dataset.from_dict(
        dict(image_path=[f'photos/{name}' for name in NAMES], caption=list(SAID.values()), id=NAMES)
    ).to_parquet(folder / 'a.parquet')
def parquet_arrays(folder):
    Dataset.from_dict(
        dict(
            image=[np.asarray(colour(n)).tolist() for n in range(20)], caption=list(SAID.values()), id=NAMES
        ),
        features=Features(
            image=Array3D((16, 16, 3), 'uint8'), caption=List(Value('string')), id=Value('string')
        ),
    ).to_parquet(folder / 'a.parquet')
def saved(folder):
    stored().save_to_disk(folder/'here')
    return folder/'here'
def saved_splits(folder):
    DatasetDict(
        train=stored().select(range(14)),
        validation=stored().select(range(14, 17)),
        test=stored().select(range(17, 20)),
    ).save_to_disk(folder / 'here')
    return folder/'here'
def webdataset(folder):
    for k in range(2):
        tarred(folder/f'{k:05}.tar', range(10*k, 10*k+10), ['txt', 'json'])
def webdataset_caption(folder):
    tarred(folder/'a.tar', range(20), ['caption'], 'deep/er/')
def webdataset_json(folder):
    for split,rows in (('train', range(14)), ('val', range(14, 17)), ('test', range(17, 20))):
        tarred(folder/f'{split}-000.tar', rows, ['json'])
def one_tar(folder):
    tarred(folder/'a.tar', range(20), ['txt'])
    return folder/'a.tar'
def by_name_of_image(folder):
    write_json(folder, 'captions.json', SAID)
def by_name_one_text(folder):
    write_json(
        folder,
        'annotations.json',
        {name: said[0] if n else said for n, (name, said) in enumerate(SAID.items())},
    )
def llava(folder):
    ask = [{'from': 'human', 'value': '<image>\nProvide a caption.'}]
    write_json(
        folder,
        'blip_558k.json',
        [
            dict(id=name[:-4], image=name, conversations=[*ask, {'from': 'gpt', 'value': caption}])
            for name, said in SAID.items()
            for caption in said
        ],
    )
def llava_lines(folder):
    write_images(folder, NAMES)
    turns = lambda caption: [
        dict([('from', 'user'), ('value', 'What is it?')]),
        dict([('from', 'assistant'), ('value', caption)]),
    ]
    (folder / 'chat.jsonl').write_text(
        ''.join(
            json.dumps(dict(image=name, conversations=turns(caption))) + '\n'
            for name, said in SAID.items()
            for caption in said
        ),
        encoding='utf-8',
    )
def beside(folder):
    write_images(folder, NAMES)
    for name,said in SAID.items():
        (folder/name).with_suffix('.txt').write_text('\n'.join(said) + '\n', encoding='utf-8')
def beside_in_splits(folder):
    for split,names in (('train', NAMES[:14]), ('val', NAMES[14:17]), ('test', NAMES[17:])):
        write_images(folder/split, names)
        for name in names:
            (folder/split/name).with_suffix('.caption').write_text('\n'.join(SAID[name]), encoding='utf-8')
def title_table(folder):
    write_images(folder/'images', NAMES)
    (folder / 'cc3m.tsv').write_text(
        'title\tfilepath\n'
        + ''.join(f'{caption}\timages/{name}\n' for name, said in SAID.items() for caption in said),
        encoding='utf-8',
    )
    return folder/'cc3m.tsv'
def title_tables(folder):
    write_images(folder, NAMES)
    for split,names in (('train', NAMES[:14]), ('val', NAMES[14:17]), ('test', NAMES[17:])):
        (folder / f'{split}.tsv').write_text(
            'filepath\ttitle\n' + ''.join(f'{name}\t{caption}\n' for name in names for caption in SAID[name]),
            encoding='utf-8',
        )
def flickr8k(folder):
    """As its two zips unpack, with rows of an image that is not there, words without endings, and what a Mac
    leaves."""
    write_images(folder/'Flicker8k_Dataset', NAMES)
    write_images(folder/'__MACOSX'/'Flicker8k_Dataset', [f'._{name}' for name in NAMES])
    rows = [f'{name}#{k}\t{caption}\n' for name,said in SAID.items() for k,caption in enumerate(said)]
    (folder / 'Flickr8k.token.txt').write_text(
        ''.join(rows) + ''.join(f'2258277193_586949ec62.jpg.1#{k}\tNot here .\n' for k in range(2)),
        encoding='utf-8',
    )
    (folder/'Flickr8k.lemma.token.txt').write_text(''.join(row.lower() for row in rows), encoding='utf-8')
    for file,names in (('trainImages', NAMES[:14]), ('devImages', NAMES[14:17]), ('testImages', NAMES[17:])):
        (folder/f'Flickr_8k.{file}.txt').write_text(''.join(f'{name}\n' for name in names), encoding='utf-8')
    for other in ('CrowdFlowerAnnotations', 'ExpertAnnotations', 'readme'):
        (folder/f'{other}.txt').write_text(f'{NAMES[0]}\t{NAMES[1]}#0\t1\n', encoding='utf-8')
def flickr30k_token(folder):
    write_images(folder/'flickr30k-images', NAMES)
    (folder / 'results_20130124.token').write_text(
        ''.join(f'{name}#{k}\t{caption}\n' for name, said in SAID.items() for k, caption in enumerate(said)),
        encoding='utf-8',
    )

OWN = dict(train=14, validation=3, test=3)
FORMATS = {
    parquet_file: CUT,
    parquet_shards: OWN,
    parquet_split_column: OWN,
    parquet_binary: CUT,
    parquet_paths: CUT,
    parquet_arrays: CUT,
    saved: CUT,
    saved_splits: OWN,
    webdataset: CUT,
    webdataset_caption: CUT,
    webdataset_json: OWN,
    one_tar: CUT,
    by_name_of_image: CUT,
    by_name_one_text: CUT,
    llava: CUT,
    llava_lines: CUT,
    beside: CUT,
    beside_in_splits: OWN,
    title_table: CUT,
    title_tables: OWN,
    flickr8k: OWN,
    flickr30k_token: CUT,
}

@pytest.mark.parametrize('write', FORMATS)
def test_format(write, tmp_path):
    "Exactly the captions of each image, exactly its pixels, and the splits that the format tells."
    found = load_data(write(tmp_path) or tmp_path)
    assert {split: len(rows) for split,rows in found.items()} == FORMATS[write]
    said = {colour(n).tobytes(): SAID[NAMES[n]] for n in range(20)}
    if write is by_name_one_text:
        said = {pixels: texts[:1] if n else texts for n,(pixels,texts) in enumerate(said.items())}
    rows = {split: [row for row in part] for split,part in found.items()}
    assert {row['image'].tobytes(): row['captions'] for part in rows.values() for row in part} == said
    if FORMATS[write] == OWN:
        order = [row['image'].tobytes() for split in OWN for row in rows[split]]
        assert order == list(said)

def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    "The cache of `datasets` must not give what lay there before."
    for words in ('first', 'other'):
        Dataset.from_dict(
            dict(image=[png(n) for n in range(20)], caption=[f'A card of the {words} kind'] * 20)
        ).to_parquet(tmp_path / 'a.parquet')
        assert {c for rows in load_data(tmp_path).values() for row in rows for c in row['captions']} == {
            f'A card of the {words} kind'
        }

def test_objects_of_datasets():
    whole = stored()
    ways = dict(dictionary=DatasetDict(train=whole), alone=whole, test_only=DatasetDict(test=whole))
    for name,way in ways.items():
        assert {split: len(rows) for split,rows in load_data(way).items()} == CUT, name
    for way in (
        DatasetDict(test=stored(split=['train'] * 14 + ['val'] * 3 + ['test'] * 3)),
        stored(split=['train'] * 14 + ['val'] * 3 + ['test'] * 3),
    ):
        assert {split: [row['image_id'] for row in rows] for split, rows in load_data(way).items()} == dict(
            train=NAMES[:14], validation=NAMES[14:17], test=NAMES[17:]
        )
    two = load_data(DatasetDict(train=whole, test=whole.select(range(4))))
    assert {split: len(rows) for split,rows in two.items()} == dict(train=18, validation=2, test=4)

def test_streams(capsys):
    whole = load_data(stored().to_iterable_dataset())
    assert sorted(row['image_id'] for rows in whole.values() for row in rows) == NAMES
    assert {row['image_id']: row['captions'] for rows in whole.values() for row in rows} == SAID
    splits = IterableDatasetDict(
        {split: stored().to_iterable_dataset() for split in ('train', 'validation', 'test')}
    )
    part = load_data(splits, limit=3)
    assert {split: [row['image_id'] for row in rows] for split, rows in part.items()} == dict(
        train=NAMES[:3], validation=NAMES[:10], test=NAMES[:10]
    )
    assert 'Reading the stream' in capsys.readouterr().err
    made = IterableDataset.from_generator(
        lambda: (dict(image=colour(n), caption=SAID[name]) for n, name in enumerate(NAMES))
    )
    assert sum(map(len, load_data(made).values())) == 20
    with pytest.raises(ValueError, match='the stream is empty'):
        load_data(IterableDataset.from_generator(lambda: iter([])))

def test_splits_of_a_stream_have_the_same_columns():
    other = stored().rename_columns({'image': 'img'}).to_iterable_dataset()
    streams = IterableDatasetDict(train=stored().to_iterable_dataset(), validation=other)
    with pytest.raises(ValueError, match="split 'validation' has other columns .*'img'"):
        load_data(streams)

def test_rows_of_no_split_in_a_stream_are_told(capsys):
    rows = stored(split=['train']*14 + ['val']*3 + ['test']*2 + [''])
    for way in (rows.to_iterable_dataset(), rows, DatasetDict(test=rows)):
        assert {split: len(part) for split, part in load_data(way).items()} == dict(
            train=14, validation=3, test=2
        )
        assert 'ℹ️ 1 images have no split and are not used' in capsys.readouterr().out

def test_a_stream_is_read_no_further_than_the_limit_needs():
    read = []
    def rows():
        for n in range(1000):
            read.append(n)
            yield dict(image=png(n%20), caption=f'A card, number {n}.')
    found = load_data(IterableDataset.from_generator(rows), limit=20, image_column='image')
    assert {split: len(part) for split, part in found.items()} == dict(
        train=20, validation=10, test=10
    ) and len(read) < 250

BAD = {
    'a.parquet': (
        lambda path: path.write_bytes(b'PAR1 and no more'),
        r'a\.parquet is no readable parquet file',
    ),
    'train-0.parquet': (
        lambda path: [stored().to_parquet(path), stored().to_parquet(path.with_name('more.parquet'))],
        r'more\.parquet: its name does not tell a split, as others do',
    ),
    'state.json': (
        lambda path: [path.write_text('{}'), path.with_name('dataset_info.json').write_text('{}')],
        'is no complete folder of `save_to_disk`',
    ),
    'cut.tar': (
        lambda path: [tarred(path, range(20), ['txt']), path.write_bytes(path.read_bytes()[:20_000])],
        r'cut\.tar: it cannot be read to its end',
    ),
    'no.tar': (lambda path: tarred(path, range(20), []), r'no\.tar: 1000_a0: there is no caption, only png'),
    'Flickr8k_Dataset.zip': (
        lambda path: [flickr8k(path.parent), shutil.rmtree(path.parent / 'Flicker8k_Dataset'), path.touch()],
        r'Flickr8k_Dataset\.zip is no zip that can be read',
    ),
    'a.tar.gz': (lambda path: path.touch(), 'compressed tars are not read, .* unpack them first: gunzip'),
    'annotations.json': (
        lambda path: write_json(
            path.parent,
            path.name,
            [dict(image=NAMES[0], conversations=[{'from': 'gpt', 'value': 'A card.'}] * 2)],
        ),
        r'annotations\.json: object 0 has a conversation with 2 answers',
    ),
}

@pytest.mark.parametrize('name', BAD)
def test_what_cannot_be_read_is_one_line(name, call, tmp_path):
    spoil, said = BAD[name]
    (tmp_path/'set').mkdir()
    spoil(tmp_path/'set'/name)
    done = call('capnb_train', '--data', tmp_path/'set', cwd=tmp_path)
    assert (
        done.returncode == 1 and re.search(said, done.stderr) and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr[-2000:]

def test_a_pipe_is_no_data_set(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(ValueError, match='pipe is no regular file and no folder'):
        load_data(tmp_path/'pipe')

def test_nothing_leads_out_of_an_archive(tmp_path):
    """A tar with links and names that lead out writes nothing, and shows nothing of what they point to;
    names in parquet are refused."""
    (tmp_path/'set').mkdir()
    write_images(tmp_path, ['secret.png'])
    with tarfile.open(tmp_path/'set'/'a.tar', 'w') as tar:
        for n in range(12):
            for name,content in ((f'../{n}.png', png(n)), (f'../{n}.txt', b'A card of ours.')):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for name, kind in (
            ('link.png', tarfile.SYMTYPE),
            ('hard.png', tarfile.LNKTYPE),
            ('pipe.png', tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path/'secret.png')
            tar.addfile(member)
    before = sorted(tmp_path.rglob('*'))
    rows = [row for part in load_data(tmp_path/'set').values() for row in part]
    assert (
        len(rows) == 12
        and {tuple(row['captions']) for row in rows} == {('A card of ours.',)}
        and sorted(tmp_path.rglob('*')) == before
    )
    (tmp_path/'set'/'a.tar').unlink()
    names = [f'{lead}/{"./"*n}secret.png' for n in range(6) for lead in ('..', tmp_path)]
    Dataset.from_dict(dict(image=names, caption=['A card.']*12)).to_parquet(tmp_path/'set'/'a.parquet')
    with pytest.raises(
        ValueError, match='leads out of the folder; `--outside_files`, in Python outside=True'
    ):
        load_data(tmp_path/'set')['train'][0]
    assert load_data(tmp_path/'set', outside=True)['train'][0]['image'].size == (16, 16)

def test_bad_samples_of_a_tar_are_left_out(call, tmp_path):
    tarred(tmp_path/'a.tar', range(20), ['txt'])
    tarred(tmp_path/'b.tar', range(3), [])
    found = load_data(tmp_path, bad_rows='skip')
    assert sum(map(len, found.values())) == 20 and found['train'].num_skipped == 3
    done = call('capnb_data', 'check', tmp_path, cwd=tmp_path)
    assert (
        done.returncode == 1
        and f'bad: {tmp_path/"b.tar"}: 1000_a0: there is no caption, only png' in done.stdout
    )

def test_images_of_tars_with_one_name_are_told_apart(tmp_path):
    "The usual tools number tars and samples from 0 in each folder."
    ids = lambda: sorted(row['image_id'] for part in load_data(tmp_path).values() for row in part.texts())
    keys = sorted(name[:-4] for name in NAMES)
    for part in ('a', 'b'):
        (tmp_path/part).mkdir()
        tarred(tmp_path/part/'00000.tar', range(20), ['txt'])
    assert ids()==[f'{part}/00000/{key}' for part in ('a', 'b') for key in keys]
    (tmp_path/'b'/'00000.tar').unlink()
    assert ids()==[f'00000/{key}' for key in keys]

def test_flickr8k_says_what_it_leaves(tmp_path, capsys):
    flickr8k(tmp_path)
    (tmp_path / 'Flickr_8k.testImages.txt').write_text(
        ''.join(f'{name}\n' for name in NAMES[18:]), encoding='utf-8'
    )
    found = check_data(tmp_path)
    assert {split: s['images'] for split, s in found['splits'].items()} == dict(
        train=14, validation=3, test=2
    ) and found['without_split']['images'] == 1
    assert found['bad'] == [] and 'images_without_row' not in warned(found)
    assert (
        '2 rows are not used: their images are neither here nor in a list of a split'
        in capsys.readouterr().out
    )

# --- Zips, read where they lie

def zip_up(path, folder, keep=lambda name: True):
    "Move what is in a folder into a zip."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as out:
        for file in sorted(f for f in folder.rglob('*') if f.is_file() and f.suffix != '.zip'):
            name = file.relative_to(folder).as_posix()
            if keep(name):
                out.write(file, name)
                file.unlink()
    for left in sorted((f for f in folder.rglob('*') if f.is_dir()), reverse=True):
        if not any(left.iterdir()):
            left.rmdir()

def is_image(name): return name.endswith('.png')

def two_zips(folder):
    zip_up(folder/'Flickr8k_Dataset.zip', folder, is_image)
    zip_up(folder/'Flickr8k_text.zip', folder)
def images_zip(folder):
    zip_up(folder/'Flickr8k_Dataset.zip', folder, is_image)
def texts_zip(folder):
    zip_up(folder/'Flickr8k_text.zip', folder, lambda name: not is_image(name))
def one_zip(folder):
    zip_up(folder/'archive.zip', folder)
def the_zip_itself(folder):
    one_zip(folder)
    return folder/'archive.zip'
def text_folder(folder):
    (folder/'Flickr8k_text').mkdir()
    for file in folder.glob('*.txt'):
        file.rename(folder/'Flickr8k_text'/file.name)
def table_in_folder(folder):
    text_folder(folder)
    return folder/'Flickr8k_text'/'Flickr8k.token.txt'
def zip_beside_what_was_unpacked(folder):
    with zipfile.ZipFile(folder/'Flickr8k_Dataset.zip', 'w') as out:
        for name in NAMES:
            out.write(folder/'Flicker8k_Dataset'/name, f'Flicker8k_Dataset/{name}')

def all_rows(found):
    return {
        split: [(row['image_id'], row['captions'], row['image'].tobytes()) for row in rows]
        for split, rows in found.items()
    }

@pytest.mark.parametrize(
    'pack',
    [
        two_zips,
        images_zip,
        texts_zip,
        one_zip,
        the_zip_itself,
        text_folder,
        table_in_folder,
        zip_beside_what_was_unpacked,
    ],
)
def test_flickr8k_packed_is_flickr8k_unpacked(pack, tmp_path):
    "The same rows and splits, the same report, and nothing is written."
    flickr8k(tmp_path)
    unpacked, report = all_rows(load_data(tmp_path)), check_data(tmp_path)
    where = pack(tmp_path) or tmp_path
    files = sorted(tmp_path.rglob('*'))
    assert (
        all_rows(load_data(where)) == unpacked
        and {split: len(rows) for split, rows in unpacked.items()} == OWN
    )
    assert check_data(where) == report | dict(data=str(where))
    assert sorted(tmp_path.rglob('*')) == files

def test_kaggles_zip_is_read(tmp_path, call):
    write_images(tmp_path/'set'/'Images', NAMES)
    (tmp_path / 'set' / 'captions.txt').write_text(
        'image,caption\n'
        + ''.join(f'{name},"{c.replace(chr(34), chr(34)*2)}"\n' for name, said in SAID.items() for c in said),
        encoding='utf-8',
    )
    unpacked = all_rows(load_data(tmp_path/'set'))
    zip_up(tmp_path/'archive.zip', tmp_path/'set')
    assert all_rows(load_data(tmp_path/'archive.zip')) == unpacked and sum(map(len, unpacked.values())) == 20
    done = call(
        'capnb_train', '--data', tmp_path / 'archive.zip', '--max_steps', 1, '--num_epochs', 1, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]

def test_images_of_a_zip_are_read_by_threads_and_children(tmp_path):
    "The place in the file of a zip must not be shared by those who read."
    flickr8k(tmp_path)
    two_zips(tmp_path)
    data = load_data(tmp_path)['train']
    alone = [data[i]['image'].tobytes() for i in range(14)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: data[i%14]['image'].tobytes(), range(280))) == alone*20
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=list(range(14)) * 20,
        num_workers=4,
        collate_fn=lambda row: row['image'].tobytes(),
        multiprocessing_context='fork',
    )
    assert list(loader) == alone*20

def spoilt_zip(path, spoil):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_BZIP2 if spoil == 'method' else zipfile.ZIP_STORED) as out:
        out.writestr('captions.csv', 'file_name,caption\n' + ''.join(f'{name},A card.\n' for name in NAMES))
        for name in NAMES:
            out.writestr(f'images/{name}', png(NAMES.index(name)))
        if spoil == 'out':
            out.writestr('../evil.png', png(0))
        if spoil == 'absolute':
            out.writestr(zipfile.ZipInfo('/evil.png'), png(0))
    raw = path.read_bytes()
    if spoil == 'cut':
        raw = raw[:len(raw)//2]
    if spoil == 'encrypted':
        raw = re.sub(rb'(PK\x01\x02.{4})..', lambda found: found[1] + b'\x01\x00', raw, flags=re.S)
    if spoil == 'damaged':
        raw = raw.replace(b'A card.', b'A cord.', 1)
    if spoil == 'empty':
        raw = b''
    path.write_bytes(raw)

SPOILT = dict(
    cut='is no zip that can be read',
    empty='is no zip that can be read',
    out="leads out of it, '../evil.png'",
    absolute="leads out of it, '/evil.png'",
    encrypted='it is encrypted',
    damaged='captions.csv is damaged: Bad CRC-32',
    method='is packed by another method',
)

@pytest.mark.parametrize('spoil', SPOILT)
def test_a_spoilt_zip_is_one_line(spoil, call, tmp_path):
    spoilt_zip(tmp_path/'my.zip', spoil)
    done = call('capnb_train', '--data', tmp_path/'my.zip', cwd=tmp_path)
    assert done.returncode == 1 and SPOILT[spoil] in done.stderr and 'my.zip' in done.stderr, done.stderr[
        -2000:
    ]
    assert len(done.stderr.strip().splitlines()) == 1

@pytest.mark.parametrize('write', [beside, parquet_file, one_tar])
def test_what_is_read_only_unpacked_says_so(write, tmp_path):
    write(tmp_path)
    zip_up(tmp_path/'album.zip', tmp_path)
    with pytest.raises(FileNotFoundError, match='from a zip only a table is read; unpack it'):
        load_data(tmp_path/'album.zip')

def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path/'my.zip', 'w', zipfile.ZIP_DEFLATED) as out:
        out.writestr('captions.csv', 'file_name,caption\n' + ''.join(f'{name},A card.\n' for name in NAMES))
        for name in NAMES:
            out.writestr(f'images/{name}', bytes(2**20))
    monkeypatch.setattr('capnb.images.MOST_FILE', 2**20-1)
    with pytest.raises(ValueError, match=r'my\.zip.*\.png is larger than'):
        load_data(tmp_path/'my.zip')['train'][0]
    with pytest.raises(ValueError, match=r'captions\.csv is larger than 0 MiB'):
        read_text(tmp_path/'my.zip'/'captions.csv', limit=100)

def test_a_zip_that_understates_its_size_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path/'my.zip', 'w', zipfile.ZIP_DEFLATED) as out:
        out.writestr('a.txt', bytes(2**28))
    raw = (tmp_path/'my.zip').read_bytes()
    (tmp_path/'my.zip').write_bytes(raw.replace((2**28).to_bytes(4, 'little'), (100).to_bytes(4, 'little')))
    tracemalloc.start()
    with pytest.raises(ValueError, match='a.txt is damaged'):
        read_text(tmp_path/'my.zip'/'a.txt')
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()

# --- Folders as people have them

def test_a_table_named_in_a_folder_of_its_own(tmp_path):
    "`coco/annotations/captions_train2017.json`, with the images in `coco/train2017`; and VizWiz's one table."
    write_images(tmp_path/'train2017', NAMES)
    (tmp_path/'annotations').mkdir()
    table = tmp_path/'annotations'/'captions_train2017.json'
    table.write_text(
        json.dumps(
            dict(
                images=[dict(id=n, file_name=name) for n, name in enumerate(NAMES)],
                annotations=[dict(image_id=n, caption=c) for n, name in enumerate(NAMES) for c in SAID[name]],
            )
        )
    )
    unpacked = all_rows(load_data(tmp_path))
    assert all_rows(load_data(table)) == unpacked and sum(map(len, unpacked.values())) == 20
    table.rename(tmp_path/'annotations'/'train.json')
    assert all_rows(load_data(tmp_path)) == unpacked

def img2dataset_notes(folder):
    "What img2dataset writes beside its images."
    rows = [
        dict(
            url=f'https://a.org/{name}',
            caption=SAID[name][0],
            key=name[:-4],
            status='success',
            error_message=None,
            width=16,
            height=16,
        )
        for name in NAMES
    ]
    Dataset.from_list(rows).to_parquet(folder/'00000.parquet')
    (folder / '00000_stats.json').write_text(
        json.dumps(dict(count=20, successes=20, status_dict=dict(success=20)))
    )

def img2dataset_tar(folder):
    tarred(folder/'00000.tar', range(20), ['txt', 'json'])
    img2dataset_notes(folder)
def img2dataset_files(folder):
    write_images(folder/'00000', NAMES)
    for name,said in SAID.items():
        (folder/'00000'/name).with_suffix('.txt').write_text('\n'.join(said))
        (folder / '00000' / name).with_suffix('.json').write_text(
            json.dumps(dict(url=f'https://a.org/{name}', caption=said[0], key=name[:-4]))
        )
    img2dataset_notes(folder)
def img2dataset_one_folder(folder):
    img2dataset_files(folder)
    return folder/'00000'

@pytest.mark.parametrize('write', [img2dataset_tar, img2dataset_files, img2dataset_one_folder])
def test_img2dataset(write, tmp_path):
    found = load_data(write(tmp_path) or tmp_path)
    rows = [row for part in found.values() for row in part]
    assert {row['image'].tobytes(): row['captions'] for row in rows} == {
        colour(n).tobytes(): SAID[NAMES[n]] for n in range(20)
    }

@pytest.mark.parametrize('write', [parquet_file, webdataset, flickr8k])
def test_formats_train(write, call, tmp_path):
    (tmp_path/'set').mkdir()
    write(tmp_path/'set')
    done = call('capnb_train', '--data', tmp_path/'set', '--max_steps', 1, '--num_epochs', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

def test_columns_are_named_for_every_form(tmp_path):
    for form in ('tar', 'beside', 'parquet', 'saved'):
        (tmp_path/form).mkdir()
    tarred(tmp_path/'tar'/'a.tar', range(20), ['txt', 'caption', 'json'])
    assert load_data(tmp_path/'tar', caption_column='url')['train'][0]['captions'] == ['https://a.org/b.png']
    with pytest.raises(ValueError, match='a.tar: 1000_a0: there is no image, only png, txt'):
        load_data(tmp_path/'tar', image_column='jpg')
    with pytest.raises(ValueError, match='its .json names no caption'):
        load_data(tmp_path/'tar', caption_column='says')
    beside(tmp_path/'beside')
    with pytest.raises(ValueError, match='have no columns; leave image_column and caption_column out'):
        load_data(tmp_path/'beside', caption_column='txt')
    parquet_file(tmp_path/'parquet')
    for path in (tmp_path/'parquet', saved(tmp_path/'saved')):
        assert load_data(path, caption_column='filename')['train'][0]['captions'][0].endswith('.png')
        with pytest.raises(ValueError, match="there is no column 'photo'"):
            load_data(path, image_column='photo')

def test_texts_in_other_encodings_stop(tmp_path):
    beside(tmp_path)
    (tmp_path/NAMES[3]).with_suffix('.txt').write_bytes('un garçon sous la pluie'.encode('cp1252'))
    with pytest.raises(ValueError, match='1003_a3.txt: line 1, byte 6'):
        load_data(tmp_path)
    assert 'un garçon sous la pluie' in {
        c for rows in load_data(tmp_path, encoding='cp1252').values() for row in rows for c in row['captions']
    }

@pytest.mark.parametrize('kind', ['numpy', 'torch', None])
def test_formats_and_paths_of_datasets(kind, tmp_path):
    write_images(tmp_path, NAMES)
    named = Dataset.from_dict(
        dict(image=[str(tmp_path / name) for name in NAMES], caption=list(SAID.values()), image_id=NAMES)
    )
    for rows in (named, stored()):
        found = load_data(rows.with_format(kind) if kind else rows)
        assert {
            row['image_id']: (row['captions'], row['image'].tobytes())
            for part in found.values()
            for row in part
        } == {name: (SAID[name], colour(n).tobytes()) for n, name in enumerate(NAMES)}

# --- What is no caption, and no list of rows

@pytest.mark.parametrize(
    'said,kind',
    [
        ({'en': 'a dog runs'}, 'dictionary'),
        ({'a dog runs'}, 'set'),
        (frozenset(['a dog']), 'set'),
        ([{'raw': 'a dog'}], 'dictionary'),
    ],
)
def test_a_dictionary_is_no_caption(said, kind):
    from capnb.caption_cells import caption_texts
    with pytest.raises(ValueError, match=f'a {kind} is not a caption: '):
        caption_texts(said)
    rows = [dict(image=Image.new('RGB', (64,64)), caption=said) for _ in range(12)]
    for options in ({}, dict(caption_column='caption')):
        with pytest.raises(ValueError, match=f'a {kind} is not a caption: '):
            load_data(rows, **options)['train'][0]
    for several in (['a', 'b'], ('a', 'b'), np.array(['a', 'b']), np.array(['a', 'b'], object)):
        assert caption_texts(several) == ['a', 'b']
        rows = [dict(image=Image.new('RGB', (64,64)), caption=several) for _ in range(12)]
        assert load_data(rows, caption_column='caption')['train'][0]['captions'] == ['a', 'b']

def test_a_dictionary_in_a_data_set_is_no_caption():
    from datasets import Dataset
    rows = Dataset.from_list(
        [dict(image=Image.new('RGB', (64, 64)), caption={'en': 'a dog runs'}) for _ in range(12)]
    )
    with pytest.raises(ValueError, match='a dictionary is not a caption'):
        load_data(rows, caption_column='caption')['train'][0]

def test_a_table_of_pandas_is_refused_at_once():
    pandas = pytest.importorskip('pandas')
    df = pandas.DataFrame(dict(image=[Image.new('RGB', (64,64))]*12, caption=['a dog runs']*12))
    for data in (df, dict(train=df, validation=df)):
        for options in ({}, dict(caption_column='caption')):
            with pytest.raises(
                ValueError, match=r"a table of pandas is no list of rows; give df.to_dict\('records'\)"
            ):
                load_data(data, **options)
    assert load_data(df.to_dict('records'))['train'][0]['captions'] == ['a dog runs']

# --- Which file is meant

def test_errors_of_columns_name_the_parquet_file(tmp_path):
    file = tmp_path/'train.parquet'
    Dataset.from_dict(dict(url=['a']*12, note=['b']*12)).to_parquet(file)
    for data in (tmp_path, file):
        with pytest.raises(ValueError, match=f'^{re.escape(str(file))}: which column holds the image'):
            load_data(data)
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(file))}: there is no column 'x'; there is url, note"
        ):
            load_data(data, caption_column='x')

@pytest.mark.parametrize(
    'name,told',
    [
        ('Captions.xlsx', 'is a spreadsheet; save it as CSV'),
        ('captions.csv.gz', 'is compressed; unpack it first, as with gunzip'),
        ('captions.jsonl.gz', 'is compressed'),
        ('list.ods', 'is a spreadsheet'),
    ],
)
def test_tables_that_are_not_read_are_named(tmp_path, name, told):
    write_images(tmp_path, NAMES)
    (tmp_path/name).write_bytes(b'PK\x03\x04')
    for data in (tmp_path, tmp_path/name):
        with pytest.raises((ValueError, OSError), match=f'{re.escape(str(tmp_path))}.*{name} {told}'):
            load_data(data)

# --- Data in memory, splits, and work that grows with the square

def test_two_names_of_one_split_are_joined():
    rows = lambda name: [dict(image=colour(n), caption='A card.', image_id=f'{name} {n}') for n in range(3)]
    found = load_data({name: rows(name) for name in ('train', 'restval', 'val', 'validation')})
    ids = {split: [row['image_id'] for row in part] for split,part in found.items()}
    assert ids['train'] == [f'{name} {n}' for name in ('train', 'restval') for n in range(3)]
    assert ids['validation'] == [f'{name} {n}' for name in ('val', 'validation') for n in range(3)]

def test_a_split_without_rows_is_named():
    rows = [dict(image=colour(n), caption='A card.') for n in range(3)]
    for empty in ({'validation': []}, {'val': [], 'validation': []}):
        with pytest.raises(ValueError, match="split 'validation' has no rows; pass the data without it"):
            load_data(dict(train=rows, **empty, test=rows))

class OpensItself:
    "Rows that are opened when they are asked for, as in most data sets of torch; one has no image."
    def __init__(self, bad):
        self.bad = bad
    def __len__(self): return 12
    def __getitem__(self, i):
        image = self.bad if i==3 else io.BytesIO(png(i))
        return dict(image=Image.open(image), caption='A card.', image_id=str(i))

@pytest.mark.parametrize('bad', [lambda: io.BytesIO(b'no image'), lambda: 'gone.png'], ids=['other', 'gone'])
def test_a_row_that_opens_its_own_image_may_be_bad(bad):
    rows = OpensItself(bad())
    found = load_data(dict(train=rows), bad_rows='skip')['train']
    assert found.num_skipped==1 and [row['image_id'] for row in found]==[str(n) for n in range(12) if n!=3]
    with pytest.raises(ValueError, match='^row 3: .*(cannot identify|No such file)'):
        CaptionData(rows)[3]
    problem, = check_data(dict(train=OpensItself(bad())))['bad']
    assert problem.startswith('train: row 3: ')

def test_a_network_that_fails_is_no_bad_row():
    def reset():
        raise ConnectionError('reset')
    class Fetched(OpensItself):
        def __getitem__(self, i):
            return reset() if i==3 else super().__getitem__(i)
    with pytest.raises(ConnectionError, match='reset'):
        load_data(dict(train=Fetched(None)), bad_rows='skip')

def test_rows_in_memory_are_not_printed():
    class Rows(list):
        def __repr__(self):
            raise AssertionError('all rows as one text')
    assert load_data(Rows(dict(image=png(n), caption='A card.') for n in range(20)))

@pytest.mark.parametrize('kind', [pa.string(), pa.large_string()], ids=str)
def test_the_split_of_a_parquet_file_holds_for_both_kinds_of_text(tmp_path, kind):
    rows = dict(
        image=[dict(bytes=png(n), path=None) for n in range(20)],
        caption=pa.array(['A card.']*20, kind),
        split=pa.array(['train']*14+['val']*3+['test']*3, kind),
    )
    pq.write_table(pa.table(rows), tmp_path/'a.parquet')
    assert {split: len(rows) for split,rows in load_data(tmp_path).items()} == dict(
        train=14, validation=3, test=3)

def test_numbers_in_the_column_split_of_a_stream_are_no_splits():
    stream = stored().add_column('split', [n%2 for n in range(20)]).to_iterable_dataset()
    assert set(load_data(stream)) <= set(CUT) # as without this column

@pytest.mark.parametrize('bad_rows', ['Skip', 'ignore', None])
def test_bad_rows_is_stop_or_skip(tmp_path, bad_rows):
    beside(tmp_path)
    with pytest.raises(ValueError, match='bad_rows .* is not known; there is stop, skip'):
        load_data(tmp_path, bad_rows=bad_rows)

def test_a_text_that_is_too_long_for_a_file_name_is_a_bad_row():
    rows = [dict(image=png(n), caption='A card.') for n in range(3)]
    data = CaptionData([*rows, dict(image='iVBOR'*2000, caption='A card.')])
    bad, = skip_bad(data)
    assert bad.startswith("row 3: [Errno 36] File name too long: 'iVBOR") and len(bad) < 400
    assert len(data)==3

def test_folders_of_a_data_set_are_compared_once_with_each_name(tmp_path, monkeypatch):
    for n in range(50):
        (tmp_path/f's{n}').mkdir()
    made = []
    class Counted(set):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(len(self))
    monkeypatch.setattr(layouts, 'set', Counted, raising=False)
    assert layouts.tables_in(tmp_path)==[] and len(made) < 5

def test_groups_of_equal_images_are_not_compared_with_each_other():
    """Half of them in two splits, the others twice in one."""
    compared = []
    class Told(str):
        def __eq__(self, other):
            compared.append(self)
            return str(self)==str(other)
        __hash__ = str.__hash__
    scanned = [ScannedImage(Told(f'{n} {k}'), 'test' if k and n%2 else 'train', b'%d' % n, ['A red card.'])
               for n in range(100) for k in (0, 1)]
    found = {w['kind']: w['count'] for w in find_warnings(scanned)}
    assert found['images_in_several_splits']==found['same_images']==50 and len(compared) < 1000

def test_rare_separators_split_no_caption_of_a_tar(tmp_path):
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        for n in range(20):
            for suffix,content in (('png', png(n)), ('txt', 'A cat.\u2028A tree.\r\nB.'.encode())):
                member = tarfile.TarInfo(f'{n:02}.{suffix}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert {len(row['captions']) for rows in load_data(tmp_path).values() for row in rows} == {2}

def test_many_zips_stay_open(tmp_path, monkeypatch):
    names = [tmp_path/f'{n}.zip' for n in range(20)]
    for name in names:
        with zipfile.ZipFile(name, 'w') as archive:
            archive.writestr('a.txt', b'a')
    opened, whole = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, 'ZipFile', lambda file: opened.append(file) or whole(file))
    for name in names*2:
        assert read_text(name/'a.txt')=='a'
    assert len(opened)==20

# --- Several rows of one image

def five_each(folder):
    "Five rows for each image, with one caption in each."
    write_images(folder, NAMES)
    return [dict(image=str(folder/name), caption=f'Card {k} of {name}.') for name in NAMES for k in range(5)]

def told_by_name(rows):
    "The captions of each image by the name of its file; no image may occur twice."
    parts = [rows.parts(i) for i in range(len(rows))]
    found = {os.path.basename(image): row['captions'] for image,row,_ in parts}
    assert len(found)==len(rows)
    return found

def five_of(names):
    return {name: [f'Card {k} of {name}.' for k in range(5)] for name in names}

def in_parquet(rows, folder):
    Dataset.from_list(rows).to_parquet(folder/'train.parquet')
    return folder

TOGETHER = {
    'list': lambda rows, folder: rows,
    'list of paths': lambda rows, folder: [dict(row, image=folder/row['image']) for row in rows],
    'other columns': lambda rows, folder: [dict(photo=row['image'], says=row['caption']) for row in rows],
    'data set': lambda rows, folder: Dataset.from_list(rows),
    'data set of images': lambda rows, folder: Dataset.from_list(
        [dict(row, image=str(folder/row['image'])) for row in rows]
    ).cast_column('image', ImageColumn()),
    'data set of arrays': lambda rows, folder: Dataset.from_list(rows).with_format('numpy'),
    'dictionary of one split': lambda rows, folder: DatasetDict(train=Dataset.from_list(rows)),
    'parquet': in_parquet,
}

@pytest.mark.parametrize('form', TOGETHER)
def test_rows_of_one_image_stay_in_one_split(tmp_path, form):
    columns = dict(image_column='photo', caption_column='says') if form=='other columns' else {}
    found = load_data(TOGETHER[form](five_each(tmp_path), tmp_path), **columns)
    told = {split: told_by_name(rows) for split,rows in found.items()}
    assert {split: len(rows) for split,rows in told.items()}==CUT
    assert {name: said for rows in told.values() for name,said in rows.items()}==five_of(NAMES)

def test_the_limit_counts_images_not_rows(tmp_path):
    found = load_data(five_each(tmp_path), limit=3)
    assert [len(row['captions']) for row in found['train'].texts()]==[5]*3
    assert len(found['validation'])==len(found['test'])==2

def test_rows_of_one_image_are_joined_in_each_split_of_a_dictionary(tmp_path):
    rows = five_each(tmp_path)
    found = load_data(dict(train=rows[:40], restval=rows[40:70], test=Dataset.from_list(rows[70:])))
    assert told_by_name(found['train'])==five_of(NAMES[:14])
    assert told_by_name(found['test'])==five_of(NAMES[14:])

def test_a_list_of_rows_is_divided_by_its_split(tmp_path, capsys):
    "Where pandas had no split there is NaN."
    splits = ['train']*14 + ['val']*3 + ['test']*2 + [float('nan')]
    rows = [dict(row, split=splits[n//5]) for n,row in enumerate(five_each(tmp_path))]
    told = {split: told_by_name(part) for split,part in load_data(rows).items()}
    assert told==dict(
        train=five_of(NAMES[:14]), validation=five_of(NAMES[14:17]), test=five_of(NAMES[17:19]))
    assert 'ℹ️ 1 images have no split and are not used' in capsys.readouterr().out

def test_numbers_in_a_list_of_rows_are_no_splits(tmp_path):
    rows = [dict(row, split=n%2) for n,row in enumerate(five_each(tmp_path))]
    assert {split: len(part) for split,part in load_data(rows).items()}==CUT

def test_an_image_whose_rows_have_several_splits_is_joined_in_each(tmp_path):
    rows = [dict(row, split='test' if n%5==4 else 'train') for n,row in enumerate(five_each(tmp_path))]
    counts = {
        split: [len(row['captions']) for row in part.texts()]
        for split,part in load_data([*rows, dict(rows[0], split='val')]).items()
    }
    assert counts==dict(train=[4]*20, validation=[1], test=[1]*20)
    assert len(load_data(dict(train=rows))['train'])==20 # a dictionary tells the splits itself

def test_rows_without_the_name_of_an_image_are_not_joined(tmp_path):
    "Neither are an image that is no file and rows that are no dictionary."
    rows = five_each(tmp_path)[:50]
    for n,missing in enumerate((float('nan'), float('nan'), None, None, '', '')):
        rows[5*n] = dict(rows[5*n], image=missing)
    found = load_data(dict(train=rows, test=rows[-5:]), bad_rows='skip')
    assert len(found['train'])==10 and found['train'].num_skipped==6
    assert [len(row['captions']) for row in found['train'].texts()]==[4]*6 + [5]*4
    image, raw = colour(0), png(0)
    for same in (image, raw):
        assert len(load_data(dict(train=[dict(image=same, caption='A card.')]*12))['train'])==12
    with pytest.raises(ValueError, match='^row 1 is a str; a dictionary'):
        load_data(dict(train=[rows[-1], 'a card', rows[-1]]))['train'][1]

def test_an_image_that_is_gone_is_one_bad_row(tmp_path):
    rows = five_each(tmp_path)
    (tmp_path/NAMES[3]).unlink()
    found = load_data(dict(train=rows), bad_rows='skip')['train']
    assert found.num_skipped==1 and told_by_name(found)==five_of(NAMES[:3] + NAMES[4:])
    report = check_data(dict(train=rows))
    assert (report['images'], report['captions'], len(report['bad']))==(19, 95, 1)
    assert report['bad'][0].startswith('train: row 3: there is no image')

def test_a_name_in_parquet_that_leads_out_is_named_with_its_row(tmp_path):
    rows = five_each(tmp_path)
    rows[40:45] = [dict(row, image='../secret.png') for row in rows[40:45]]
    problem, = check_data(in_parquet(rows, tmp_path))['bad']
    assert "row 40: '../secret.png' leads out of the folder" in problem

@pytest.mark.parametrize('missing', ['', ' ', None, float('nan')], ids=repr)
def test_one_of_several_columns_of_captions_may_be_empty(missing):
    rows = [dict(image=png(n), a='A red card.', b=missing) for n in range(20)]
    for way in (rows, Dataset.from_list(rows), dict(train=rows)):
        assert load_data(way, caption_column='a,b')['train'][0]['captions']==['A red card.']
        with pytest.raises(ValueError, match='texts that are not empty, not .*: it is empty'):
            load_data(way, caption_column='b')['train'][0]

# --- Which column is the image

def features_of(**columns): return Dataset.from_dict(columns).features

BOXES = [[.1, .2, .3, .4], [.2, .2, .5, .6]]

def test_boxes_are_no_image():
    named = dict(file_name=['a.png'], caption=['A card.'])
    assert image_columns(features_of(boxes=[BOXES], **named))==['file_name']
    assert image_columns(features_of(boxes=[BOXES], image=[[[0., 1.]]], **named))==['image']
    assert image_columns(features_of(pixels=[[[0., 1.]]], caption=['A card.']))==['pixels']
    pixels = Features(pixels=Array3D((16, 16, 3), 'uint8'), boxes=List(List(Value('float32'))),
                      file_name=Value('string'))
    assert image_columns(pixels)==['pixels']

def test_the_bytes_of_an_image_go_before_its_name():
    names = dict(filename=['a.png'], path=['b.png'], caption=['A card.'])
    assert dataset_columns(features_of(image=[b'x'], **names))==('image', ['caption'])
    assert dataset_columns(features_of(img=[b'x'], **names))==('img', ['caption'])
    assert dataset_columns(features_of(**names))==('filename', ['caption'])

@pytest.mark.parametrize('column', ['boxes', 'image'])
def test_parquet_with_names_and_more_is_read(tmp_path, column):
    if column=='boxes':
        write_images(tmp_path, NAMES)
    more = dict(boxes=[BOXES]*20, image=[png(n) for n in range(20)])[column]
    rows = dict(filename=NAMES, caption=list(SAID.values()))
    Dataset.from_dict(rows | {column: more}).to_parquet(tmp_path/'train.parquet')
    found = [row for part in load_data(tmp_path).values() for row in part]
    assert {row['image'].tobytes(): row['captions'] for row in found}=={
        colour(n).tobytes(): said for n,said in enumerate(SAID.values())
    }

# --- Folders and files beside the data

def in_split_folders(folder, more=''):
    "One table for images in folders of their splits; `more` are further rows."
    files = [f'train/{name}' for name in NAMES[:14]] + [f'Test/{name}' for name in NAMES[14:]]
    write_images(folder/'train', NAMES[:14])
    write_images(folder/'Test', NAMES[14:])
    lines = ''.join(f'{file},A card.\n' for file in files)
    (folder/'captions.csv').write_text(f'file_name,caption\n{lines}{more}')
    return files

def ids_of(found):
    return {split: sorted(row['image_id'] for row in rows.texts()) for split,rows in found.items()}

def test_folders_of_splits_hold_for_one_table(tmp_path):
    files = in_split_folders(tmp_path)
    zip_up(tmp_path/'all.zip', tmp_path)
    for place in (tmp_path, tmp_path/'all.zip'):
        ids = ids_of(load_data(place))
        assert ids['test']==files[14:] and len(ids['validation'])==1
        assert sorted(ids['train'] + ids['validation'])==files[:14]

def test_a_column_of_splits_goes_before_folders(tmp_path):
    files = in_split_folders(tmp_path)
    rows = ''.join(f'{file},A card.,{"test" if n<5 else "train"}\n' for n,file in enumerate(files))
    (tmp_path/'captions.csv').write_text(f'file_name,caption,split\n{rows}')
    assert ids_of(load_data(tmp_path))['test']==files[:5]

def test_folders_tell_no_split_if_an_image_is_elsewhere(tmp_path):
    write_images(tmp_path, ['a.png'])
    in_split_folders(tmp_path, 'a.png,A card.\n')
    assert {split: len(rows) for split,rows in load_data(tmp_path).items()}==dict(
        train=17, validation=2, test=2)

@pytest.mark.parametrize('name', ['dataset_infos.json', 'dataset_info.json', 'dataset_config.json'])
@pytest.mark.parametrize('write', [parquet_shards, beside])
def test_notes_on_a_data_set_are_no_table(tmp_path, write, name):
    write(tmp_path)
    (tmp_path/name).write_text('{"default": {}}')
    assert {split: len(rows) for split,rows in load_data(tmp_path).items()}==FORMATS[write]

@pytest.mark.parametrize('name,text', [
    ('classes.json', '["cat", "dog"]'),
    ('labels.csv', 'file,label\na.png,cat\n'),
])
def test_another_file_does_not_hide_texts_beside_images(tmp_path, name, text):
    beside(tmp_path)
    (tmp_path/name).write_text(text)
    told = lambda: {row['image_id']: row['captions'] for part in load_data(tmp_path).values() for row in part}
    assert told()==SAID
    # a table with a usual name goes first
    (tmp_path/'captions.csv').write_text('file_name,caption\n' + ''.join(f'{n},A card.\n' for n in NAMES))
    assert told()=={name: ['A card.'] for name in NAMES}

def test_another_table_in_a_split_does_not_hide_the_usual_one(tmp_path):
    files = in_split_folders(tmp_path)
    (tmp_path/'Test'/'labels.csv').write_text('file,label\na.png,cat\n')
    assert ids_of(load_data(tmp_path))['test']==files[14:]

@pytest.mark.parametrize('kind', ['array', 'tensor'])
def test_a_list_of_rows_may_hold_arrays(kind):
    make = dict(array=np.asarray, tensor=lambda image: torch.tensor(np.asarray(image)))[kind]
    rows = [dict(image=make(colour(n)), caption='A card.') for n in range(20)]
    for data in (rows, dict(train=rows, validation=rows, test=rows)):
        found = [row for part in load_data(data).values() for row in part]
        assert {row['image'].tobytes() for row in found}=={colour(n).tobytes() for n in range(20)}

def test_rows_with_features_of_their_own_are_no_data_set_of_datasets():
    class Rows(list):
        features = np.zeros((20, 4))
    rows = Rows(dict(image=png(n), caption='A card.') for n in range(20))
    assert len(load_data(dict(train=rows))['train'])==20

def test_a_transform_opens_no_image_before_it_is_asked_for(tmp_path):
    opened = []
    def transform(batch):
        opened.extend(batch['image'])
        return dict(image=[Image.open(name) for name in batch['image']], caption=batch['caption'])
    found = load_data(Dataset.from_list(five_each(tmp_path)).with_transform(transform))
    assert {split: len(rows) for split,rows in found.items()}==CUT and not opened
    assert len(found['train'][0]['captions'])==5 and len(opened)==5

@pytest.mark.parametrize('missing', ['', None, float('nan')], ids=repr)
@pytest.mark.parametrize('column', [None, 'caption'])
def test_an_image_keeps_its_captions_if_a_row_has_none(tmp_path, missing, column):
    rows = five_each(tmp_path)
    rows[2]['caption'] = missing
    found = load_data(dict(train=rows), bad_rows='skip', caption_column=column)['train']
    assert [len(row['captions']) for row in found.texts()]==[4] + [5]*19

def test_rows_of_one_image_without_captions_are_named_like_others(tmp_path):
    rows = [dict(image=row['image'], words=row['caption']) for row in five_each(tmp_path)]
    with pytest.raises(ValueError, match="row 0 has neither 'captions' nor 'caption', only image, words"):
        load_data(rows)['train'][0]
    both = [dict(row, captions=None) for row in five_each(tmp_path)]
    assert len(load_data(both)['train'][0]['captions'])==5

def test_no_rows_are_too_few():
    for data in ([], Dataset.from_dict(dict(image=[], caption=[]))):
        with pytest.raises(ValueError, match='0 rows are too few'):
            load_data(data, image_column='image', caption_column='caption')

def test_a_tuple_of_rows_is_a_list_of_rows(tmp_path):
    assert {split: len(rows) for split,rows in load_data(tuple(five_each(tmp_path))).items()}==CUT

def test_two_names_of_one_split_are_one_split_in_a_column(tmp_path):
    rows = [dict(row, split=('val', 'validation')[n%2] if n<50 else 'train')
            for n,row in enumerate(five_each(tmp_path))]
    assert told_by_name(load_data(rows)['validation'])=={
        name: [f'Card {k} of {name}.' for k in range(5)] for name in NAMES[:10]}

def test_masks_and_names_go_after_images():
    mask = Features(image=Value('binary'), mask=List(List(Value('uint8'))), caption=Value('string'))
    assert image_columns(mask)==['image']
    assert image_columns(features_of(pixel_values=[[[0., 1.]]], file_name=['a.png']))==['pixel_values']

def test_a_bad_row_elsewhere_does_not_change_the_splits_of_folders(tmp_path):
    write_images(tmp_path, ['a.png'])
    files = in_split_folders(tmp_path, 'a.png,\n')
    assert ids_of(load_data(tmp_path, bad_rows='skip'))['test']==files[14:]

def test_a_table_of_any_name_may_be_meant(tmp_path, capsys):
    "A text beside one image does not hide it; nor do all texts if a column is named."
    title_table(tmp_path)
    (tmp_path/'cc3m.tsv').rename(tmp_path/'images'/'cc3m.tsv')
    folder = tmp_path/'images'
    text = (folder/'cc3m.tsv').read_text(encoding='utf-8').replace('images/', '')
    (folder/'cc3m.tsv').write_text(text, encoding='utf-8')
    def told(**columns):
        return [row['captions'] for part in load_data(folder, **columns).values() for row in part]
    (folder/NAMES[0]).with_suffix('.txt').write_text('0 .5 .5 .2 .2')
    assert sorted(told())==sorted(SAID.values())
    for name in NAMES:
        (folder/name).with_suffix('.txt').write_text('0 .5 .5 .2 .2')
    assert sorted(told(caption_column='title'))==sorted(SAID.values())
    assert told()==[['0 .5 .5 .2 .2']]*20
    assert 'the texts beside the images; to read cc3m.tsv instead' in capsys.readouterr().out

def test_a_mask_is_no_image():
    features = Features(image=Value('string'), mask=Array2D((8, 8), 'uint8'), caption=Value('string'))
    assert image_columns(features)==['image']

@pytest.mark.parametrize('place', ['{split}/texts.csv', 'annotations/texts.csv'])
@pytest.mark.parametrize('column', [None, 'caption'])
def test_labels_beside_images_do_not_hide_a_table_below(place, column, tmp_path):
    for split,n in (('train', 20), ('test', 3)):
        (tmp_path/split).mkdir()
        for i in range(n):
            (tmp_path/split/f'{split}{i}.png').write_bytes(png(i))
            (tmp_path/split/f'{split}{i}.txt').write_text('0 0.5 0.5 0.2 0.2')
    for split,n in (('train', 20), ('test', 3)):
        file = tmp_path/place.format(split=split)
        file.parent.mkdir(exist_ok=True)
        before = file.read_text() if file.exists() else 'file_name,caption\n'
        inside = '' if '{split}' in place else f'{split}/'
        file.write_text(before + ''.join(f'{inside}{split}{i}.png,A card.\n' for i in range(n)))
    assert load_data(tmp_path, caption_column=column)['train'][0]['captions']==['A card.']
