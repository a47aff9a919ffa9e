"Tables of captions as people have them: the right captions, or an error that says what to do."
import csv, io, json, os, re, sys, zipfile
from pathlib import PureWindowsPath
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from capnb.checkpoint import read_metadata
from capnb.settings import Hyperparameters, as_hyperparameters
from capnb.run.sources.folders import read_folder
from capnb.run.sources import names, tables
from capnb.run.sources.archives import _finder
from capnb.run.predictions import read_predictions
from capnb.run.sources.load import load_data
import capnb.files

NAMES = [f'{n:03}.png' for n in range(12)]
SAID = [
    f'a {color} dog runs past a house'
    for color in 'red blue green black white pink brown grey tan gold teal plum'.split()
]
OTHER = [f'machine caption {n}' for n in range(12)]

def album(folder, text, name='captions.csv', encoding='utf-8', files=NAMES):
    "A folder with empty files and one table."
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder/file).parent.mkdir(parents=True, exist_ok=True)
        (folder/file).touch()
    (folder/name).write_text(text, encoding=encoding, newline='')
    return folder

def lines(*columns, header=None, separator=','):
    "A table as Python's csv writes it."
    file = io.StringIO()
    csv.writer(file, delimiter=separator).writerows([header]*bool(header) + list(zip(*columns, strict=True)))
    return file.getvalue()

def captions(folder, **options):
    "The captions of each file of a folder."
    return {
        name: rows.captions[name] for rows in read_folder(folder, **options).tables for name in rows.names
    }

RIGHT = {name: [said] for name,said in zip(NAMES, SAID, strict=True)}

# --- Columns with names

HEADERS = '''filepath,title image_path,caption path,caption img,caption image_id,caption Image,Caption
    image,label file_path,text filename,prompt image,alt_text url,caption image,caption_en image,captions
    image,blip_caption img_path,sentence foto,beschreibung'''.split()

@pytest.mark.parametrize('header', HEADERS)
def test_names_of_columns(tmp_path, header):
    assert captions(album(tmp_path, lines(NAMES, SAID, header=header.split(',')))) == RIGHT

@pytest.mark.parametrize(
    'first', ['file_name,caption_0,caption_1', 'file_name,caption1,caption2', 'id,sentence 1,sentence 2']
)
def test_several_columns_of_captions(tmp_path, first):
    found = captions(album(tmp_path, lines(NAMES, SAID, [*OTHER[:-1], ''], header=first.split(','))))
    assert found == {
        name: [said, *filter(None, [other])]
        for name, said, other in zip(NAMES, SAID, [*OTHER[:-1], ''], strict=True)
    }

JSON = [dict(image=n, caption=c, caption_human=o) for n,c,o in zip(NAMES, SAID, OTHER, strict=True)]
COCO = dict(
    images=[dict(id=i, file_name=n, title='x') for i, n in enumerate(NAMES)],
    annotations=[
        dict(image_id=i, caption=c, caption_human=o) for i, (c, o) in enumerate(zip(SAID, OTHER, strict=True))
    ],
)
FORMS = {
    'captions.csv': lines(NAMES, SAID, OTHER, header=('image', 'caption', 'caption_human')),
    'captions.tsv': lines(NAMES, SAID, OTHER, header=('image', 'caption', 'caption_human'), separator='\t'),
    'captions.json': json.dumps(JSON),
    'captions.jsonl': '\n'.join(map(json.dumps, JSON)),
    'captions_x.json': json.dumps(COCO),
}

@pytest.mark.parametrize('name', FORMS)
def test_columns_that_are_asked_for(tmp_path, name):
    folder = album(tmp_path, FORMS[name], name)
    assert captions(folder) == RIGHT
    assert captions(folder, caption_column='caption_human') == {
        n: [o] for n, o in zip(NAMES, OTHER, strict=True)
    }
    both = captions(folder, caption_column='caption, caption_human')
    assert both == {n: [c, o] for n,c,o in zip(NAMES, SAID, OTHER, strict=True)}
    for column in ('image_column', 'caption_column'):
        with pytest.raises(
            ValueError,
            match=(
                rf"there is no column 'nonsense' \(asked for as {column}\); there is"
                r" .*(caption_human|file_name)"
            ),
        ):
            captions(folder, **{column: 'nonsense'})

PAINTED = Image.fromarray(np.zeros((8,8,3), np.uint8))

@pytest.mark.parametrize('make', [Dataset.from_list, list])
def test_columns_of_data_in_python(make):
    rows = make([dict(photo=PAINTED, caption=c, note=o) for c,o in zip(SAID, OTHER, strict=True)])
    for data in (rows, dict(train=rows, validation=rows)):
        found = load_data(data, image_column='photo', caption_column='note')['validation']
        assert all(row['captions'][0] in OTHER for row in found) and len(found)
        for columns in (
            dict(image_column='photo', caption_column='nonsense'),
            dict(image_column='nonsense', caption_column='note'),
        ):
            with pytest.raises(
                ValueError, match="there is no column 'nonsense'; there is photo, caption, note"
            ):
                load_data(data, **columns)
    with pytest.raises(ValueError, match='the storybook has no columns'):
        load_data('storybook', caption_column='caption')

def test_two_columns_of_equal_right_are_asked_for(tmp_path):
    folder = album(tmp_path, lines(NAMES, SAID, OTHER, header=('file','title','prompt')))
    with pytest.raises(
        ValueError,
        match=(
            r"captions.csv: which column holds the captions\? Name it, as in --caption_column title, .* title"
            r" \('a red dog.*prompt \('machine"
        ),
    ):
        captions(folder)
    assert captions(folder, caption_column='title') == RIGHT

def test_a_better_name_is_said(tmp_path, capsys):
    "`caption` beside another column of sentences: taken, and said with two captions."
    assert captions(album(tmp_path, lines(NAMES, OTHER, SAID, header=('file','text','caption')))) == RIGHT
    assert (
        f"captions are taken from column caption: '{SAID[0]}' / '{SAID[1]}'; images from column file;"
        in capsys.readouterr().out
    )
    assert captions(album(tmp_path, lines(NAMES, SAID, header=('file','caption')))) == RIGHT
    assert capsys.readouterr().out == ''

# --- Columns without names

SPLITS = ['train']*9 + ['val','val','test']
WITHOUT = {  # columns, and the number of the captions' column
    'caption, split': ((NAMES, SAID, SPLITS), '2'),
    'score': ((NAMES, SAID, [n / 37 for n in range(12)]), '2'),
    'number first': ((NAMES, range(12), SAID), '3'),
    'address': ((NAMES, SAID, [f'http://example.org/{n}.jpg' for n in range(12)]), '2'),
    'sizes': ((NAMES, [80] * 12, [60] * 12, SAID), '4'),
    'licence': ((NAMES, SAID, ['CC-BY'] * 12), '2'),
    'caption first': ((SAID, NAMES), ''),
    'two columns': ((NAMES, SAID), ''),
}

@pytest.mark.parametrize('kind', WITHOUT)
@pytest.mark.parametrize('separator', [',', '\t', ';'])
def test_without_a_header(tmp_path, capsys, kind, separator):
    columns, at = WITHOUT[kind]
    folder = album(tmp_path, lines(*columns, separator=separator))
    assert captions(folder) == RIGHT
    said = capsys.readouterr().out
    assert (
        f"captions are taken from column {at}: '{SAID[0]}' / '{SAID[1]}'; images from column 1" in said
        if at
        else said == ''
    )
    if kind=='caption, split':
        assert {split: len(rows) for split, rows in read_folder(folder).splits.items()} == dict(
            train=9, validation=2, test=1
        )

def test_without_a_header_two_captions_are_asked_for(tmp_path):
    folder = album(tmp_path, lines(NAMES, SAID, OTHER))
    with pytest.raises(
        ValueError,
        match=(
            r"--caption_column 2, or several with commas between. Candidates: 2 \(.*; 3 \(.*All columns: 1,"
            r" 2, 3"
        ),
    ):
        captions(folder)
    assert captions(folder, caption_column='2') == RIGHT
    assert captions(folder, caption_column='2,3')['000.png'] == [SAID[0], OTHER[0]]
    with pytest.raises(ValueError, match="there is no column '4' .*there is 1, 2, 3"):
        captions(folder, caption_column='4')
    assert captions(
        album(tmp_path, lines([n[:-4] for n in NAMES], SAID)), image_column='1', caption_column='2'
    ) == {n[:-4]: [c] for n, c in zip(NAMES, SAID, strict=True)}

def test_a_comma_in_captions_without_quotes_is_never_cut_off(tmp_path):
    with pytest.raises(ValueError, match='which column holds the captions'):
        captions(album(tmp_path, ''.join(f'{n},{c}, and more\n' for n,c in zip(NAMES, SAID, strict=True))))
    with pytest.raises(ValueError, match='line 1 has 3 fields, most lines 2'):
        captions(album(tmp_path, f'{NAMES[0]},first, and second\n' + lines(NAMES[1:], SAID[1:])))

@pytest.mark.parametrize('separator, remedy', [
    (',', 'put the caption into quotes'), (';', 'put the caption into quotes'),
    ('|', 'replace it in the caption'),
])
def test_the_remedy_for_a_separator_in_a_caption_works(tmp_path, separator, remedy):
    spoilt, caption = f'{SAID[0]}{separator}and more', f'{SAID[0]} and more'
    table = lines(NAMES, [spoilt, *SAID[1:]], header=('file', 'caption'), separator=separator)
    table = table.replace('"', '')
    with pytest.raises(ValueError, match=f'line 2 .*if {re.escape(repr(separator))} .*, {remedy}$'):
        captions(album(tmp_path, table))
    mended = f'"{spoilt}"' if 'quotes' in remedy else caption
    found = captions(album(tmp_path, table.replace(spoilt, mended)))
    assert found[NAMES[0]] == [spoilt if 'quotes' in remedy else caption]

@pytest.mark.parametrize('start', ['sep=;\n', '\n \n', '\ufeff'])
def test_what_spreadsheets_write_first(tmp_path, start):
    assert (
        captions(album(tmp_path, start + lines(NAMES, SAID, header=('file', 'caption'), separator=';')))
        == RIGHT
    )
    with pytest.raises(ValueError, match=f"line {14+start.count(chr(10))}: there is no image 'no.png'"):
        captions(
            album(
                tmp_path,
                start
                + lines([*NAMES, 'no.png'], [*SAID, 'x'] * 1, header=('file', 'caption'), separator=';'),
            )
        )

def test_an_index_column(tmp_path):
    assert (
        captions(album(tmp_path, lines(range(12), NAMES, SAID, header=('', 'file_name', 'caption')))) == RIGHT
    )

# --- Cells

TWO = ["a dog's bed", 'a "big" house']

@pytest.mark.parametrize(
    'write', [repr, json.dumps, lambda two: str(np.array(two)), lambda two: str(tuple(two))]
)
def test_a_list_in_a_cell_is_several_captions(tmp_path, write):
    assert (
        captions(album(tmp_path, lines(NAMES, [write(TWO)] * 12, header=('image', 'caption'))))[NAMES[3]]
        == TWO
    )
    rows = [dict(image=PAINTED, caption=write(TWO))]*12
    assert (
        load_data(Dataset.from_list(rows))['train'][0]['captions']
        == TWO
        == load_data(rows)['train'][0]['captions']
    )

BAD_CELLS = [
    ("['a', nan]", 'cannot be read as one'),
    ("['a', 'b'", None),
    ('[1, 2]', 'cannot be read as one'),
    ("{'raw': 'a'}", 'cannot be read as one'),
    ('[' + '"a",' * 40_000 + '"a"]', None),
    ('[' * 9000 + ']' * 9000, 'cannot be read'),
    ('nan', "'nan' stands for an empty cell"),
    ('NaN', 'stands for'),
    ('None', 'stands for'),
    ('', ''),
]

@pytest.mark.parametrize('cell,why', BAD_CELLS, ids=range(len(BAD_CELLS)))
def test_a_cell_that_is_no_caption_is_named(tmp_path, cell, why):
    folder = album(tmp_path, lines(NAMES, SAID[:4] + [cell] + SAID[5:], header=('image','caption')))
    if why is None: # a plain text that begins with a bracket, and a field that is too large
        if len(cell) < 99:
            assert captions(folder)[NAMES[4]] == [cell]
        else:
            with pytest.raises(ValueError, match='line 6: field larger than'):
                captions(folder)
        return
    with pytest.raises(ValueError, match=f"captions.csv: line 6: no caption for '004.png'.*{why}"):
        captions(folder)
    assert captions(folder, bad_rows='skip') == {n: c for n,c in RIGHT.items() if n!='004.png'}

def test_half_a_letter_is_named(tmp_path):
    folder = album(
        tmp_path,
        json.dumps(
            [dict(image=n, caption=c) for n, c in zip(NAMES, [*SAID[:-1], '\ud83d dog'], strict=True)]
        ),
        'captions.json',
    )
    with pytest.raises(ValueError, match="object 11: no caption for '011.png': .*half a letter"):
        captions(folder)

# --- JSON by its content

@pytest.mark.parametrize(
    'name,text',
    [
        ('captions.jsonl', json.dumps(JSON, indent=1)),
        ('captions.json', '\n'.join(map(json.dumps, JSON))),
        ('captions.json', json.dumps(dict(version=1, data=JSON))),
    ],
)
def test_json_by_content(tmp_path, name, text):
    assert captions(album(tmp_path, text, name)) == RIGHT

def test_coco_ids_as_texts(tmp_path, capsys):
    mixed = dict(COCO, annotations=[dict(a, image_id=str(a['image_id'])) for a in COCO['annotations']])
    assert captions(album(tmp_path, json.dumps(mixed), 'captions_x.json')) == RIGHT
    assert (
        'annotations with an id that is a text where the image\'s is a number, or the other way round: 12'
        in capsys.readouterr().out
    )

def test_names_of_karpathy_are_the_same_on_every_system(monkeypatch):
    monkeypatch.setattr(tables, 'Path', PureWindowsPath)
    image = dict(filename='COCO_val2014_000000000139.jpg', filepath='val2014', sentences=[dict(raw=SAID[0])])
    assert [name for _,name,*_ in tables.read_document(dict(images=[image]))]==[
        'val2014/COCO_val2014_000000000139.jpg'
    ]

# --- Encodings

LANGUAGES = {  # a caption, and the encodings that spreadsheets and scripts write it in
    'English': ('a dog “runs” – fast…', 'cp1252 mac_roman'),
    'German': ('ein größeres Mädchen läuft', 'cp1252 latin-1 iso8859-15 mac_roman cp850 cp437'),
    'French': ('un garçon à vélo, œuvre', 'cp1252 iso8859-15 mac_roman'),
    'Polish': ('żółty pies biegnie przez łąkę', 'cp1250 iso8859-2'),
    'Czech': ('žlutý kůň', 'cp1250 iso8859-2'),
    'Turkish': ('ışıklı küçük köpek', 'cp1254 iso8859-9'),
    'Russian': ('собака бежит по траве', 'cp1251 koi8-r iso8859-5 mac_cyrillic'),
    'Greek': ('ένας σκύλος τρέχει', 'cp1253 iso8859-7'),
    'Hebrew': ('כלב רץ', 'cp1255'),
    'Arabic': ('كلب يجري', 'cp1256'),
    'Chinese': ('一只红色的狗', 'gbk gb18030 gb2312'),
    'Traditional': ('一隻紅色的狗', 'big5 cp950'),
    'Japanese': ('赤い犬が走る', 'cp932 shift_jis euc_jp iso2022_jp'),
    'Korean': ('빨간 개가 달린다', 'cp949 euc_kr'),
    'Thai': ('หมาวิ่ง', 'cp874'),
    'Vietnamese': ('con chó chạy nhanh', ''),
}
UNMARKED = 'utf-16-le utf-16-be utf-32 utf-32-le utf-32-be utf-7'
PAIRS = [
    (language, encoding)
    for language, (_, usual) in LANGUAGES.items()
    for encoding in f'{usual} {UNMARKED}'.split()
]

@pytest.mark.parametrize('language,encoding', PAIRS)
def test_an_encoding_stops_and_with_the_flag_is_read(tmp_path, language, encoding):
    said = [f'{LANGUAGES[language][0]} {n}' for n in range(12)]
    folder = album(tmp_path, lines(NAMES, said, header=('file_name','caption')), encoding=encoding)
    with pytest.raises(
        ValueError, match=r'captions.csv: line [12], byte \d+ \(0x..\): .*; nothing was read; '
    ) as stopped:
        captions(folder)
    assert '--encoding' in str(stopped.value)
    assert captions(folder, encoding=encoding) == {name: [c] for name,c in zip(NAMES, said, strict=True)}

@pytest.mark.parametrize('language', LANGUAGES)
def test_unicode_is_read_without_a_flag(tmp_path, language):
    said = [f'{LANGUAGES[language][0]} {n}' for n in range(12)]
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16'):
        folder = album(tmp_path, lines(NAMES, said, header=('file_name','caption')), encoding=encoding)
        assert (
            captions(folder) == captions(folder, encoding='cp1252' if encoding != 'utf-8' else None) == {
                name: [c] for name, c in zip(NAMES, said, strict=True)
            }
        )

def test_one_bad_byte_is_named(tmp_path):
    folder = album(tmp_path, lines(NAMES, ['un garçon à vélo']*12, header=('file_name','caption')))
    raw = (folder/'captions.csv').read_bytes()
    at = raw.index(b'005.png,') + 8
    (folder/'captions.csv').write_bytes(raw[:at] + b'\xe9' + raw[at:])
    with pytest.raises(
        ValueError,
        match=(
            rf'captions.csv: line 7, byte {at} \(0xe9\): this is not UTF-8; nothing was read; save the file'
            r' as UTF-8'
        ),
    ):
        captions(folder, bad_rows='skip')

def test_zeros_and_noise_are_no_text(tmp_path):
    for raw, place in (
        (b'file_name,caption\n000.png,a\0b\n', r'line 2, byte 27 \(0x00\): there is a zero'),
        (b'\xff\xfe' + 'a\0b'.encode('utf-16-le'), r'line 1, byte 4 .*a zero'),
    ):
        (album(tmp_path, '')/'captions.csv').write_bytes(raw)
        with pytest.raises(ValueError, match=place):
            captions(tmp_path)
    (tmp_path / 'captions.csv').write_bytes(
        np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    )
    with pytest.raises(ValueError, match='captions.csv: line .*nothing was read'):
        captions(tmp_path)

@pytest.mark.parametrize(
    'text', ['a phone with the number +100 on it', '1 + 1 = 2', 'C++ and a +size dress', 'blood of type AB+']
)
def test_plus_signs_are_no_utf7(tmp_path, text):
    said = [text, *SAID[1:]]
    assert captions(album(tmp_path, lines(NAMES, said, header=('file', 'caption')))) == {
        n: [c] for n, c in zip(NAMES, said, strict=True)
    }

def test_encoding_is_a_setting_of_the_commands(call, tmp_path):
    folder = album(tmp_path/'album', '', files=[])
    for n in range(12):
        Image.new('RGB', (64,64), (20*n,0,0)).save(folder/NAMES[n])
    (folder / 'captions.csv').write_text(
        lines(NAMES, [f'un garçon à vélo {n}' for n in range(12)], header=('file_name', 'caption')),
        encoding='cp1252',
    )
    done = call('capnb_data', 'check', folder, cwd=tmp_path)
    assert done.returncode == 1 and 'line 2, byte' in done.stderr and len(done.stderr.splitlines()) == 1
    done = call('capnb_data', 'check', folder, '--encoding', 'cp1252', cwd=tmp_path)
    assert done.returncode == 0 and 'un garçon à vélo 1' in done.stdout
    done = call(
        'capnb_train',
        '--data',
        folder,
        '--encoding',
        'cp1252',
        '--max_steps',
        1,
        '--evaluation_enabled',
        False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'encoding' in call('capnb_train', '--help', cwd=tmp_path).stdout
    (tmp_path/'said.json').write_text(json.dumps([dict(image_id=n, caption='a boy') for n in NAMES]))
    for more,code in (((), 1), (('--encoding', 'cp1252'), 0)):
        done = call('capnb_eval', '--predictions', 'said.json', '--data', folder, *more, cwd=tmp_path)
        assert done.returncode == 1 and ('line 2, byte' in done.stderr) == (code == 1), done.stderr[-3000:]

def test_encodings_that_do_not_exist(tmp_path):
    for name in ('klingon', 'hex', 'rot13', ''):
        with pytest.raises(ValueError, match=f"encoding '{name}' is not known"):
            Hyperparameters(encoding=name)

def test_settings_and_predictions_are_text_too(tmp_path):
    file = tmp_path/'settings.yaml'
    file.write_text('seed: 3 # été', encoding='utf-16')
    assert as_hyperparameters(file).seed == 3
    file.write_text('seed: 3 # été', encoding='cp1252')
    with pytest.raises(ValueError, match='settings.yaml: line 1, byte 10 .* please save the file as UTF-8'):
        as_hyperparameters(file)
    said = tmp_path/'said.json'
    said.write_text(
        json.dumps([dict(image_id='a.png', caption='été')], ensure_ascii=False), encoding='cp1252'
    )
    with pytest.raises(ValueError, match='said.json: line 1, byte'):
        read_predictions(said, ['a.png'])
    for name,read in (('s.json', as_hyperparameters), ('p.json', lambda f: read_predictions(f, ['a.png']))):
        (tmp_path/name).write_text('['*100_000)
        with pytest.raises(ValueError, match=f'{name} is .*nested too deeply'):
            read(tmp_path/name)

# --- Names that almost fit

SPELLINGS = {  # the file, and how the table writes it
    'backslash': ('images/one.png', 'images\\one.png'),
    'drive': ('images/one.png', '.\\IMAGES\\one.png'),
    'capitals': ('one.png', 'One.PNG'),
    'accents': ('caf\u00e9.png', 'cafe\u0301.png'),
    'accents apart': ('cafe\u0301.png', 'caf\u00e9.png'),
    'no suffix': ('one.png', 'one'),
    'no suffix, number': ('0001.jpg', '0001'),
}

@pytest.mark.parametrize('kind', SPELLINGS)
def test_another_spelling_is_taken_and_counted(tmp_path, capsys, kind):
    file, written = SPELLINGS[kind]
    folder = album(
        tmp_path,
        lines([*NAMES, written], [*SAID, 'one more'], header=('file_name', 'caption')),
        files=[*NAMES, file],
    )
    found = read_folder(folder)
    assert found.tables[0].paths[written] == folder/file and len(found.tables[0]) == 13
    assert (
        f"captions.csv: names that are spelt otherwise than their files: 1, such as {written!r} for {file!r}"
        in capsys.readouterr().out
    )

def test_spellings_that_fit_two_files_or_none(tmp_path):
    folder = album(
        tmp_path,
        lines(
            [*NAMES, 'ONE', 'One.png', '0111.png', 'b\\two.png'],
            [*SAID, *'abcd'],
            header=('file_name', 'caption'),
        ),
        files=[*NAMES, 'one.png', 'one.jpg', 'oNe.png', 'a/two.png', 'b/two.png'],
    )
    with pytest.raises(ValueError) as stopped:
        read_folder(folder)
    message = str(stopped.value)
    assert (
        "line 14: image 'ONE' may be " in message
        and "line 15: image 'One.png' may be 'oNe.png' or 'one.png'" in message
    )
    assert (
        "line 16: there is no image '0111.png' (the nearest is '011.png')" in message
        and 'line 17' not in message
    )

def test_rows_of_one_file_by_several_spellings_are_one_image(tmp_path):
    "Or it would be in two splits at once."
    folder = album(
        tmp_path, lines([*NAMES, '000.PNG', './000.png'], [*SAID, 'a', 'b'], header=('file', 'caption'))
    )
    assert captions(folder) == {**RIGHT, '000.png': [SAID[0], 'a', 'b']}
    with pytest.raises(ValueError, match="line 3: '000.png' is in train already, not in test"):
        captions(
            album(
                tmp_path,
                lines(
                    ['000.png', '000.PNG'], ['a', 'b'], ['train', 'test'], header=('file', 'caption', 'split')
                ),
            )
        )

def test_ids_of_predictions(tmp_path, capsys):
    ids = [
        'images/COCO_val2014_000000000139.jpg',
        'images/COCO_val2014_000000000285.jpg',
        'images/COCO_val2014_000000000632.jpg',
    ]
    (tmp_path / 'p.json').write_text(
        json.dumps(
            [
                dict(image_id=i, caption=c)
                for i, c in zip(
                    ('000000000139', 'Images\\COCO_VAL2014_000000000285', 632), 'abc', strict=True
                )
            ]
        )
    )
    assert read_predictions(tmp_path/'p.json', ids) == ['a', 'b', 'c']
    assert 'ids that are spelt otherwise than in the data: 1, such as' in capsys.readouterr().out
    (tmp_path/'p.json').write_text(json.dumps([dict(image_id='COCO_val2014_000000000631.jpg', caption='a')]))
    with pytest.raises(
        ValueError,
        match=(
            "'COCO_val2014_000000000631.jpg' is none of the 3 images, such as"
            " 'images/COCO_val2014_000000000632.jpg'"
        ),
    ):
        read_predictions(tmp_path/'p.json', ids)

# --- What leads out, and what is no file

@pytest.mark.parametrize(
    'written',
    [
        '../secret/private.png',
        '{}/secret/private.png',
        'x/../../secret/private.png',
        '..\\secret\\private.png',
        'link/../private.png',
        'C:\\private.png',
    ],
)
def test_rows_do_not_lead_out(tmp_path, written):
    (tmp_path/'secret'/'in').mkdir(parents=True)
    (tmp_path/'secret'/'private.png').touch()
    written = written.format(tmp_path)
    folder = album(tmp_path/'album', lines([*NAMES, written], [*SAID, 'a secret'], header=('file','caption')))
    (folder/'link').symlink_to(tmp_path/'secret'/'in')
    with pytest.raises(
        ValueError,
        match='line 14: .*'
        + (
            'no image'
            if written[0] == 'l'
            else 'leads out of the folder; `--outside_files`, in Python outside=True, allows that'
        ),
    ):
        read_folder(folder)
    if written[0] in 'lC': return # leads nowhere
    assert (
        read_folder(folder, outside=True)
        .tables[0]
        .paths[written]
        .samefile(tmp_path / 'secret' / 'private.png')
    )

def test_a_row_that_leads_to_another_drive_is_named(tmp_path, monkeypatch):
    def other_drive(paths):
        raise ValueError("Paths don't have the same drive") # as on Windows
    folder = album(tmp_path, lines([*NAMES, '/else/1.png'], [*SAID, 'far away'], header=('file', 'caption')))
    with monkeypatch.context() as windows:
        windows.setattr(os.path, 'commonpath', other_drive)
        with pytest.raises(ValueError, match="line 14: .*'/else/1.png'.* leads out of the folder"):
            read_folder(folder)
        with pytest.raises(ValueError, match="'/else/1.png' leads out of the folder"):
            _finder(folder, False)('/else/1.png')

def test_outside_files_is_a_setting(call, tmp_path):
    (tmp_path/'elsewhere').mkdir()
    for n in range(12):
        Image.new('RGB', (64,64), (20*n,0,0)).save(tmp_path/'elsewhere'/NAMES[n])
    folder = album(
        tmp_path / 'album',
        lines([f'../elsewhere/{n}' for n in NAMES], SAID, header=('file', 'caption')),
        files=['stray.png'],
    )
    assert call('capnb_data', 'check', folder, cwd=tmp_path).returncode == 1
    assert call('capnb_data', 'check', folder, '--outside_files', cwd=tmp_path).returncode == 0
    for flag in (['--outside_files'], ['--outside_files', True]):
        done = call(
            'capnb_train',
            '--data',
            folder,
            *flag,
            '--max_steps',
            1,
            '--evaluation_enabled',
            False,
            cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]

def test_links_in_the_folder_are_followed(tmp_path):
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'far.png').touch()
    folder = album(
        tmp_path / 'album',
        lines(
            [*NAMES, 'link.png', 'out/far.png', 'FAR.png', str(tmp_path / 'album' / '000.png')],
            [*SAID, *'abcd'],
            header=('file', 'caption'),
        ),
    )
    (folder/'link.png').symlink_to(folder/'001.png')
    (folder/'out').symlink_to(tmp_path/'other')
    (folder/'out'/'loop').symlink_to(folder)
    found = captions(folder)
    assert (
        found['link.png'] == ['a']
        and found['out/far.png'] == ['b', 'c']
        and found['000.png'] == [SAID[0], 'd']
    )

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes in folders')
def test_pipes_and_devices_are_no_images_and_no_tables(tmp_path):
    folder = album(
        tmp_path,
        lines(
            [*NAMES, 'pipe.png', 'zero.png', 'sub.png', 'a\0b.png', 'a' * 5000 + '.png'],
            [*SAID, *'abcde'],
            header=('file', 'caption'),
        ).replace('\0', ''),
    )
    os.mkfifo(folder/'pipe.png')
    (folder/'zero.png').symlink_to('/dev/zero')
    (folder/'sub.png').mkdir()
    with pytest.raises(ValueError) as stopped:
        read_folder(folder)
    message = str(stopped.value)
    assert (
        "line 14: 'pipe.png' is no regular file" in message
        and "line 15: 'zero.png' is no regular file" in message
        and 'line 18: ' in message
    )
    (folder/'captions.csv').unlink()
    os.mkfifo(folder/'captions.csv')
    with pytest.raises(ValueError, match='captions.csv: it is no regular file'):
        read_folder(folder)

def test_tables_have_limits(tmp_path, monkeypatch):
    folder = album(tmp_path, lines(NAMES, SAID, header=('file','caption')))
    with open(folder/'captions.csv', 'ab') as f:
        f.truncate(capnb.files.TEXT_LIMIT+1) # holds no blocks
    with pytest.raises(ValueError, match='captions.csv is larger than 1024 MiB; nothing was read'):
        read_folder(folder)
    (folder/'captions.csv').unlink()
    for name in ('captions.json', 'captions.jsonl'):
        album(tmp_path, '['*100_000, name)
        with pytest.raises(ValueError, match=f'{name}: .*nested too deeply'):
            read_folder(folder)
        (folder/name).unlink()

def test_hostile_documents_are_named(tmp_path):
    for text, said in (
        (
            '{"images":[{"id":[1],"file_name":{}}],"annotations":[{"image_id":[1],"caption":3}]}',
            'annotation 0: there is no image',
        ),
        (
            '[{"file_name":["0.png"],"caption":"x"},{"file_name":null,"caption":"x"},'
            '{"file_name":true,"caption":"x","split":[1]}]',
            'object 1: there is no image None',
        ),
    ):
        with pytest.raises(ValueError, match=f'captions.json: .*{said}'):
            read_folder(album(tmp_path, text, 'captions.json'))

def test_notes_of_checkpoints_and_results_have_limits(call, tmp_path):
    weights, notes = (
        tmp_path / 'model_state_dict_20260101_120000-1.pth',
        tmp_path / 'training_metadata_20260101_120000-1.json',
    )
    weights.touch()
    for write in (
        lambda file: file.write_text('[' * 100_000),
        lambda file: file.write_bytes(b'{"epoch": 1, "x": "\xe9"}'),
        lambda file: os.truncate(file, capnb.files.SMALL_TEXT + 1),
    ):
        write(notes)
        with pytest.raises(ValueError, match='training_metadata_.*json is not the metadata of a checkpoint'):
            read_metadata(weights)
        results = tmp_path/'results.json'
        results.touch()
        write(results)
        done = call('capnb_results', weights, '--file', results, cwd=tmp_path)
        assert (
            done.returncode == 1
            and 'results.json is no file of results' in done.stderr
            and len(done.stderr.splitlines()) == 1
        )

# --- Folders in names

def folders(path, names, files, table='captions.csv'):
    "The path of each name below the folder, or the error."
    said = SAID[:len(names)]
    text = lines(names, said, header=('file_name','caption'))
    if table.endswith('json'):
        text = json.dumps(dict(images=[dict(id=n, file_name=name) for n,name in enumerate(names)],
                               annotations=[dict(image_id=n, caption=c) for n,c in enumerate(said)]))
    from capnb.run.sources.folders import ImageFolder
    album(path, text, table, files=files)
    return {
        name: file.relative_to(path).as_posix()
        for name, file in ImageFolder(path, path / table).paths.items()
    }

CONTRARY = {
    'another split': (['val/3.jpg'], ['train/3.jpg', 'val/4.jpg']),
    'another folder': (['images/3.jpg'], ['photos/3.jpg']),
    'not in the folder that is there': (['val/3.jpg'], ['3.jpg', 'val/4.jpg']),
    'absolute': (['/album/val/3.jpg'], ['3.jpg', 'val/4.jpg']),
    'several': (['c/3.jpg'], ['a/3.jpg', 'b/3.jpg']),
}

@pytest.mark.parametrize('kind', CONTRARY)
def test_another_folder_is_another_image(tmp_path, kind):
    names, files = CONTRARY[kind]
    if kind=='absolute':
        names = [str(tmp_path/'val'/'3.jpg')]
    with pytest.raises(
        ValueError, match=r"line 2: there is no image '.*3.jpg' \(the nearest is '.*3.jpg'\)"
    ):
        folders(tmp_path, names, files)

FITTING = {
    'flat': ('images/3.jpg', '3.jpg'),
    'flat, drive': ('.\\Images\\3.JPG', '3.jpg'),
    'below': ('3.jpg', 'images/3.jpg'),
    'more': ('data/images/3.jpg', 'images/3.jpg'),
    'less': ('images/3.jpg', 'data/images/3.jpg'),
    'address': ('http://example.org/a/3.jpg', '3.jpg'),
}

@pytest.mark.parametrize('kind', FITTING)
def test_more_or_fewer_folders_are_no_contradiction(tmp_path, capsys, kind):
    name, file = FITTING[kind]
    assert folders(tmp_path, [name], [file, 'other/4.jpg']) == {name: file}
    options = dict(image_column='file_name') if kind=='address' else {}
    album(tmp_path, lines([name, *NAMES], [*SAID, 'x'], header=('file_name','caption')), files=NAMES)
    read_folder(tmp_path, **options)
    assert ('names that are spelt otherwise' in capsys.readouterr().out) == (kind not in ('below', 'less'))

@pytest.mark.parametrize(
    'names',
    [
        ['x/002.jpg', 'y/002.jpg'],
        ['002.jpg', 'y/002.jpg'],
        ['y/002.jpg', '002.jpg'],
        ['http://a.org/002.jpg', 'http://b.org/002.jpg'],
    ],
)
def test_two_folders_are_two_images(tmp_path, names):
    with pytest.raises(ValueError, match=rf"line 3: '{names[1]}' and '{names[0]}' would both be '002.jpg'"):
        folders(tmp_path, names, ['002.jpg'])
    again = tmp_path/'again'
    assert set(folders(again, ['x/002.jpg', 'X\\002.jpg'], ['002.jpg'])) == {'x/002.jpg'}

def test_coco_looks_in_the_folder_of_its_split(tmp_path):
    table = 'captions_val2017.json'
    both = ['train2017/3.jpg', 'val2017/3.jpg', 'val2017/4.jpg', 'train2017/5.jpg', '6.jpg']
    assert folders(tmp_path, ['3.jpg', '4.JPG'], both, table) == {
        '3.jpg': 'val2017/3.jpg',
        '4.JPG': 'val2017/4.jpg',
    }
    for name in ('5.jpg', '6.jpg'):
        with pytest.raises(ValueError, match=f"annotation 0: there is no image '{name}'"):
            folders(tmp_path, [name], both, table)
    for name in ('val2017/3.jpg', 'val2017\\3.jpg', 'coco/val2017/3.JPG'):
        assert folders(tmp_path, [name], both, table) == {name: 'val2017/3.jpg'}
    below = tmp_path/'below'
    assert folders(below, ['3.jpg'], ['images/train2017/3.jpg', 'images/val2017/3.jpg'], table) == {
        '3.jpg': 'images/val2017/3.jpg'
    }
    assert folders(tmp_path/'flat', ['3.jpg'], ['3.jpg'], table) == {'3.jpg': '3.jpg'}

def test_ids_of_predictions_in_another_folder(tmp_path):
    said = lambda i: (tmp_path / 'p.json').write_text(
        json.dumps([dict(image_id=i, caption='a')])
    ) and read_predictions(tmp_path / 'p.json', ['train/a.jpg'])
    with pytest.raises(
        ValueError, match="image_id 'val/a.jpg' is none of the 1 images, such as 'train/a.jpg'"
    ):
        said('val/a.jpg')
    assert said('a.jpg') == said('data/train/a.jpg') == ['a']

# --- The likeliest encoding comes first

GUESSED = [
    ('ein größeres Mädchen läuft', 'cp1252'),
    ('der Hund läuft über die Straße', 'cp1252'),
    ('a dog “runs” – fast…', 'cp1252'),
    ('it’s a dog', 'cp1252'),
    ('un garçon à vélo, œuvre', 'cp1252'),
    ('un niño pequeño está aquí', 'cp1252'),
    ('en hund springer på gräset', 'cp1252'),
    ('um cão não está', 'cp1252'),
    ('żółty pies biegnie przez łąkę', 'cp1250'),
    ('žlutý kůň, pes běží', 'cp1250'),
    ('žuti pas trči kroz šumu', 'cp1250'),
    ('собака бежит по траве', 'cp1251'),
]

@pytest.mark.parametrize('said,encoding', GUESSED)
def test_the_likeliest_encoding_is_offered_first(said, encoding):
    text = 'file_name,caption\n' + ''.join(f'{n}.jpg,{said} {n}\n' for n in range(40))
    assert capnb.files.guess_encodings(text.encode(encoding))[0] == encoding

# --- What messages advise

def test_a_foreign_path_names_the_file_that_fits(tmp_path):
    folder = album(
        tmp_path,
        lines(
            ['/home/me/Album/ONE.png', 'D:\\album\\001.png', '/home/me/none.png'],
            SAID[:3],
            header=('file', 'caption'),
        ),
        files=[*NAMES, 'photos/one.png'],
    )
    with pytest.raises(ValueError) as stopped:
        read_folder(folder)
    first, second, third = str(stopped.value).split('; line ')
    assert first.endswith(
        "line 2: '/home/me/Album/ONE.png' leads out of the folder; `--outside_files`, in Python outside=True,"
        " allows that; in the folder there is 'photos/one.png': write that"
    )
    assert second.endswith("in the folder there is '001.png': write that") and third.endswith('allows that')

def test_the_check_lists_all_rows_when_none_is_good(call, tmp_path):
    folder = album(
        tmp_path / 'album',
        lines([f'../elsewhere/{n}' for n in NAMES], SAID, header=('file', 'caption')),
        files=['stray.png'],
    )
    done = call('capnb_data', 'check', folder, cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stdout.count('bad: ') == 12
        and 'capnb_data check' not in done.stdout + done.stderr
    )
    assert f'{folder}: all 12 rows of a table are bad; the first: ' in done.stderr
    done = call('capnb_train', '--data', folder, '--max_steps', 1, cwd=tmp_path)
    assert (
        done.returncode == 1
        and "and 7 more: `capnb_data check` lists them, bad_rows 'skip' leaves them out" in done.stderr
    )

# --- Columns of one name, records that are bad, and names in many folders

@pytest.mark.parametrize('asked', [{}, dict(caption_column='sentence'), dict(caption_column='Sentence')])
def test_columns_with_the_same_name_are_all_read(tmp_path, asked):
    folder = album(tmp_path, lines(NAMES, SAID, OTHER, header=('file_name', 'sentence', 'sentence')))
    assert captions(folder, **asked) == {n: [c, o] for n,c,o in zip(NAMES, SAID, OTHER, strict=True)}

def test_columns_by_their_numbers(tmp_path):
    folder = album(tmp_path, lines(NAMES, SAID, OTHER))
    assert captions(folder, image_column=1, caption_column=2) == RIGHT

def test_a_file_in_a_zip_is_found_beside_one_of_its_name_elsewhere(tmp_path):
    names = [f'train/{name}' for name in NAMES[:-1]] + ['val/003.png']
    album(tmp_path, lines(names, SAID, header=('file_name', 'caption')), files=names[-1:])
    with zipfile.ZipFile(tmp_path/'train.zip', 'w') as archive:
        for name in names[:-1]:
            archive.writestr(name, b'')
    assert captions(tmp_path) == {n: [c] for n,c in zip(names, SAID, strict=True)}

def test_many_files_of_one_name_are_found_by_their_folders(monkeypatch):
    split, counts = names._parts, []
    monkeypatch.setattr(names, '_parts', lambda name: counts.append(name) or split(name))
    index = names.NameIndex([f's{n}/rgb.png' for n in range(200)])
    assert all(index.find(f'data\\S{n}\\rgb.png')==f's{n}/rgb.png' for n in range(200))
    assert len(counts) < 200*20 # and not 200 for each of them

def test_records_after_a_thousand_bad_ones_and_empty_ones(tmp_path):
    said = lambda caption: [{'from': 'gpt', 'value': caption}]
    bad = dict(image='000.png', conversations=said('x')*2)
    good = [dict(image=name, conversations=said(c)) for name,(c,) in RIGHT.items()]
    folder = album(tmp_path, json.dumps([bad]*1000+good), 'captions.json')
    assert captions(folder, bad_rows='skip') == RIGHT
    for text in ('[{}]', '{}\n{}\n'):
        (folder/'captions.json').write_text(text)
        with pytest.raises(ValueError, match='captions.json: .* is an empty JSON object'):
            read_folder(folder)

@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16', 'utf-32'])
def test_a_zero_at_the_end_is_named(tmp_path, encoding):
    "Also without the mark that these encodings write."
    little = sys.byteorder=='little'
    plain = 'utf-8' if encoding=='utf-8-sig' else f"{encoding}-{'le' if little else 'be'}"
    (tmp_path/'a.csv').write_bytes('ab\n\0'.encode(plain))
    at = len('ab\n'.encode(plain))
    with pytest.raises(ValueError, match=rf'a.csv: line 2, byte {at} \(0x00\): there is a zero'):
        capnb.files.read_text(tmp_path/'a.csv', encoding)
