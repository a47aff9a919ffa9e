"""Data sets by name against a hub on this machine, folders as they come out of archives, and bad images:
each works, or is named."""
import hashlib, io, json, subprocess, sys, time
from pathlib import Path
import pytest
from datasets import Dataset, Features, Image as ImageColumn, List, Value
from PIL import Image
from forks import ForkedScript
from hub import Hub
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.sources.load import load_data
from capnb.storybook import Storybook

BOOK = Storybook()
FLICKR30K = dict(
    image=ImageColumn(),
    caption=List(Value('string')),
    sentids=List(Value('string')),
    split=Value('string'),
    img_id=Value('string'),
    filename=Value('string'),
)
KARPATHY = ['train','train','val','train','test','train','train','train','val','test'] # lie mixed
ROWS, GROUP = 400, 20

def jpeg(i):
    file = io.BytesIO()
    BOOK[i]['image'].save(file, 'JPEG', quality=90)
    return file.getvalue()

def parquet(rows, features, group=GROUP):
    "A parquet file, with rows in groups, as the bytes of it."
    file = io.BytesIO()
    Dataset.from_list(rows, features=Features(features)).to_parquet(file, batch_size=group)
    return file.getvalue()

def flickr30k(start, stop):
    return [
        dict(
            image=dict(bytes=jpeg(i), path=None),
            caption=BOOK.captions(i)[:5],
            sentids=[str(5 * i + k) for k in range(5)],
            split=KARPATHY[i % 10],
            img_id=str(i),
            filename=f'{1000+i}.jpg',
        )
        for i in range(start, stop)
    ]

@pytest.fixture(scope='session')
def files():
    "What the hub keeps: parquet with real JPEGs in the layout of each known repository."
    whole = {
        f'TEST/test/{n:04}.parquet': parquet(flickr30k(n * ROWS // 2, (n + 1) * ROWS // 2), FLICKR30K)
        for n in range(2)
    }
    bare = {k: v for k,v in FLICKR30K.items() if k!='split'}
    lmms = {
        'data/test-00000-of-00001.parquet': parquet(
            [{k: v for k, v in row.items() if k != 'split'} for row in flickr30k(0, 240)], bare
        )
    }
    eight = dict(image=ImageColumn(), **{f'caption_{k}': Value('string') for k in range(5)})
    rows = [
        dict(image=dict(bytes=jpeg(i), path=None), **{f'caption_{k}': BOOK.captions(i)[k] for k in range(5)})
        for i in range(80)
    ]
    flickr8k = {
        f'data/{split}-00000-of-00001.parquet': parquet(rows[a:b], eight)
        for split, a, b in [('train', 0, 40), ('validation', 40, 60), ('test', 60, 80)]
    }
    return {'nlphuji/flickr30k': whole, 'lmms-lab/flickr30k': lmms, 'jxie/flickr8k': flickr8k}

@pytest.fixture(scope='module')
def shared_hub():
    found = Hub()
    yield found
    found.close()

@pytest.fixture
def hub(shared_hub, files):
    "The hub, with everything as it should be."
    shared_hub.repair()
    for name,content in files.items():
        shared_hub.add(
            name,
            content,
            revisions=('main', 'refs/convert/parquet') if name.startswith('nlphuji') else ('main',),
        )
    return shared_hub

@pytest.fixture(scope='module')
def whole(files):
    "All rows of Flickr30k as they must come: ids, captions, and a fingerprint of the pixels."
    rows = {split: [] for split in ('train','validation','test')}
    for i in range(ROWS):
        image = Image.open(io.BytesIO(jpeg(i))).convert('RGB')
        rows[dict(val='validation').get(KARPATHY[i % 10], KARPATHY[i % 10])].append(
            [
                f'{1000+i}.jpg',
                [' '.join(c.split()) for c in BOOK.captions(i)[:5]],
                hashlib.md5(image.tobytes()).hexdigest(),
            ]
        )
    return rows

LOAD = '''import hashlib, json, sys
from capnb.run.sources.load import load_data
def facts(row):
    return [row['image_id'], row['captions'], hashlib.md5(row['image'].tobytes()).hexdigest()]
try:
    found = load_data(**json.loads(sys.argv[1]))
    found = {split: [facts(row) for row in rows] for split,rows in found.items()}
except (OSError, ValueError) as e:
    found = f'{type(e).__name__}: {e}'
print('\\n' + json.dumps(found), flush=True)'''

@pytest.fixture
def script(hub, environment, tmp_path):
    "Run a text of Python against the hub in a process of its own; gives exit code, output and error output."
    def script(text, *args, home='home', **env):
        (tmp_path/'script.py').write_text(text, encoding='utf-8')
        there = environment(**{**hub.environment(tmp_path/home), **env})
        with ForkedScript(tmp_path/'script.py', args, tmp_path, there) as process:
            out, err = process.communicate(timeout=600)
        return process.returncode, out, err
    return script

@pytest.fixture
def load(hub, script):
    """Load data sets one after the other, each in a process of its own. Gives for each its rows by split
    (image id, captions, fingerprint of the pixels), or the error, and the bytes that were sent."""
    def load(*jobs, **how):
        found = []
        for job in jobs:
            before = hub.sent
            _, out, err = script(LOAD, json.dumps(job), **how)
            line = next((line for line in out.splitlines() if line[:1] in ('{', '"')), '')
            assert line, err
            found.append((json.loads(line), hub.sent-before))
        return found
    return load

def ids(found): return {split: [row[0] for row in rows] for split,rows in found.items()}

@pytest.fixture
def run_on_hub(hub, run, tmp_path):
    "Run a console command against the hub."
    return lambda name, *args: run(name, *args, cwd=tmp_path, env=hub.environment(tmp_path/'home'))

# --- By name

def size(files, name): return sum(map(len, files[name].values()))

def first(rows, limit, held):
    return {split: r[:limit if split=='train' else held] for split,r in rows.items()}

def test_flickr30k_whole(load, whole):
    (found, _), (named, _) = load(
        dict(data='flickr30k'), dict(data='flickr30k', image_column='image', caption_column='filename')
    )
    assert found == whole and {split: len(rows) for split, rows in whole.items()} == dict(
        train=240, validation=80, test=80
    )
    assert named['train'][5][1] == ['1007.jpg']

def test_limit_takes_the_first_rows_and_only_their_bytes(load, files, whole):
    """30 images, once more, then 90. 30 for training need 50 rows, ten for each other split as many: three
    groups of twenty."""
    (part, sent), (again, nothing), (more, rest) = load(
        *(dict(data='flickr30k', limit=n) for n in (30, 30, 90))
    )
    assert part == again == first(whole, 30, 10) and more == first(whole, 90, 10)
    group = size(files, 'nlphuji/flickr30k')*GROUP/ROWS
    index = 65_536 # the end of the file, which tells where the groups are
    assert (
        3 * group < sent < 3.3 * group + index and nothing == 0 and 5 * group < rest < 5.3 * group + index
    ), (group, sent, nothing, rest)

def test_what_is_here_needs_no_network(load, whole):
    load(dict(data='flickr30k', limit=30))
    (offline, sent), (more, _) = load(
        dict(data='flickr30k', limit=30), dict(data='flickr30k', limit=90), HF_HUB_OFFLINE='1'
    )
    assert (offline, sent) == (first(whole, 30, 10), 0) and 'HF_HUB_OFFLINE forbids' in more

def test_flickr8k_and_columns_with_numbers(load):
    (found, _), (part, _) = load(dict(data='flickr8k'), dict(data='flickr8k', limit=15))
    assert {split: len(rows) for split,rows in found.items()} == dict(train=40, validation=20, test=20)
    assert found['validation'][0][1] == [' '.join(c.split()) for c in BOOK.captions(40)[:5]]
    assert part == {split: rows[:15 if split=='train' else 10] for split,rows in found.items()}

def test_a_hub_split_alone_is_cut_by_number(load, files):
    (found, _), (part, sent) = load(
        dict(data='lmms-lab/flickr30k'), dict(data='lmms-lab/flickr30k', limit=20)
    )
    where = {int(row[0][:-4])-1000: split for split,rows in found.items() for row in rows}
    assert (
        set(found) == {'train', 'validation', 'test'}
        and sorted(where) == list(range(240))
        and min(map(len, found.values())) >= 15
    )
    assert part == first(found, 20, 10)
    groups = next(
        g
        for g in range(1, 13)
        if all(
            sum(where[i] == split for i in range(g * GROUP)) >= (20 if split == 'train' else 10)
            for split in found
        )
    )
    group = size(files, 'lmms-lab/flickr30k')*GROUP/240
    assert groups < 11 and groups*group < sent < (groups+.5)*group + 65_536

def test_columns_that_cannot_be_told(hub, load):
    features = dict(photo=ImageColumn(), mask=ImageColumn(), says=Value('string'), licence=Value('string'))
    rows = [
        dict(
            photo=dict(bytes=jpeg(i), path=None),
            mask=dict(bytes=jpeg(0), path=None),
            says=f'image {i}',
            licence='free',
        )
        for i in range(40)
    ]
    hub.add('me/photos', {'data/train-00000-of-00001.parquet': parquet(rows, features)})
    (found, _), (no_caption, _) = load(
        dict(data='me/photos', image_column='photo', caption_column='says'),
        dict(data='me/photos', image_column='photo'),
    )
    assert sorted(row[1] for rows in found.values() for row in rows) == sorted(
        [f'image {i}'] for i in range(40)
    )
    assert 'Name it with caption_column; there are texts in: says, licence' in no_caption
    assert 'Name it with image_column; of type image: photo, mask' in load(dict(data='me/photos'))[0][0]

def test_preset_flickr30k_trains(hub, run_on_hub, tmp_path):
    small = [
        '--encoder_name',
        'storybook-clip',
        '--tokenizer_name',
        'storybook-qwen3',
        '--image_size',
        64,
        '--training_size_limit',
        30,
        '--max_steps',
        2,
        '--max_caption_length',
        12,
    ]
    done = run_on_hub('capnb_train', '--preset', 'flickr30k', *small)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = read_metadata(newest_checkpoint(tmp_path/'saved_models'))
    assert metadata['data'] == dict(name='flickr30k', train=30, validation=10, test=10)
    assert 'Downloading nlphuji/flickr30k' in done.stderr
    before = hub.sent
    # the same images are held back, and nothing more is downloaded
    judged = run_on_hub('capnb_eval', '--json_file', 'scores.json')
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert (
        json.loads((tmp_path / 'scores.json').read_text())['test']['rouge_l']
        == pytest.approx(metadata['test']['rouge_l'], abs=1e-6)
        and hub.sent - before < 20_000
    )

# --- What goes wrong on the way

@pytest.mark.parametrize('limit', [None, 30])
def test_a_cut_connection_goes_on(hub, load, whole, limit):
    hub.cut_after, hub.cuts = 30_000, 2
    (found, _), = load(dict(data='flickr30k', limit=limit))
    assert hub.cuts == 0 and found == first(whole, limit, limit and 10)

@pytest.mark.parametrize('limit', [None, 200])
def test_a_killed_download_goes_on(hub, environment, load, files, whole, tmp_path, limit):
    """Killed in the second of two files: the first is not fetched again, with a limit neither are the groups
    of the second that were complete."""
    total = size(files, 'nlphuji/flickr30k')
    hub.pause = .02 # so that there is time to kill
    process = subprocess.Popen(
        [sys.executable, '-c', LOAD, json.dumps(dict(data='flickr30k', limit=limit))],
        env=environment(**hub.environment(tmp_path / 'home')),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while hub.sent < .75*total:
        time.sleep(.01)
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    hub.pause = 0
    (found, sent), = load(dict(data='flickr30k', limit=limit))
    assert found == first(whole, limit, limit and 20) and sent < (.4 if limit else .55)*total, (sent, total)

TWO = '''---
configs:
- config_name: de
  data_files: de.csv
- config_name: en
  data_files: en.csv
---
'''
FAULTS = {  # what is done to the hub, name of the data set, the error
    'missing': (
        lambda hub: None,
        'nobody/nothing',
        (
            'FileNotFoundError: data set nobody/nothing: there is none of this name on the hub, or it is'
            ' private; check the name, or log in with `hf auth login`'
        ),
    ),
    'revision': (
        lambda hub: hub.repos['datasets', 'nlphuji/flickr30k'].revisions.discard('refs/convert/parquet'),
        'flickr30k',
        'FileNotFoundError: data set nlphuji/flickr30k: it has no such revision',
    ),
    'gated': (
        lambda hub: setattr(hub.repos['datasets', 'nlphuji/flickr30k'], 'gated', True),
        'flickr30k',
        'PermissionError: data set nlphuji/flickr30k: its terms must be accepted first; do so at http',
    ),
    'empty': (
        lambda hub: hub.add('me/nothing', {'notes.txt~': b''}),
        'me/nothing',
        'FileNotFoundError: data set me/nothing: it lacks the files that are needed',
    ),
    'script': (
        lambda hub: hub.add('me/old', {'old.py': b'', 'README.md': b''}),
        'me/old',
        'ValueError: data set me/old is a Python script, and none is run; many have a copy in parquet files:'
        ' try data_revision refs/convert/parquet',
    ),
    'configurations': (
        lambda hub: hub.add('me/two', {'README.md': TWO.encode(), 'de.csv': b'a\n1\n', 'en.csv': b'a\n1\n'}),
        'me/two',
        'ValueError: data set me/two has several configurations; load one in Python and pass it, as in'
        " train(data=load_dataset('me/two', NAME))",
    ),
    'broken': (
        lambda hub: setattr(hub, 'status', 500),
        'flickr30k',
        'ConnectionError: data set nlphuji/flickr30k: the hub answers with error 500; try again later',
    ),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_hub_fault_is_told(hub, load, fault):
    spoil, name, message = FAULTS[fault]
    spoil(hub)
    for told,_ in load(dict(data=name), dict(data=name, limit=30)):
        assert told.startswith(message) and len(told.splitlines()) == 1

# models that need no hub
LOCAL = '--encoder_name storybook-clip --tokenizer_name storybook-qwen3 --image_size 64'.split()

@pytest.mark.parametrize(
    'fault,word', [('gated', 'hf auth login'), ('closed', 'cannot be reached; check the network')]
)
def test_hub_fault_is_one_line_of_the_command(hub, run, tmp_path, fault, word):
    env = hub.environment(tmp_path/'home')
    if fault=='gated':
        hub.repos['datasets','nlphuji/flickr30k'].gated = True
    else:
        env['HF_ENDPOINT'] = 'http://127.0.0.1:9' # where nobody listens
    done = run('capnb_train', '--preset', 'flickr30k', *LOCAL, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, '') and len(done.stderr.splitlines()) == 1, done.stderr[
        -3000:
    ]
    assert done.stderr.startswith('train: data set nlphuji/flickr30k: ') and word in done.stderr

FULL = '''import errno
import capnb.run.sources.hub as hub
from capnb.run.sources.load import load_data
def full(*args, **more): raise OSError(errno.ENOSPC, 'No space left on device')
{where} = full
load_data('flickr30k', limit={limit})'''

@pytest.mark.parametrize(
    'where,limit',
    [
        ('hub.atomic_write', 30),
        ('import huggingface_hub.file_download as d; d.http_get', None),
        ('import datasets.arrow_writer as d; d.ArrowWriter.write_table', None),
    ],
)
def test_a_full_disk_is_told(script, where, limit):
    "At each place that writes: our own parts, the cache of the hub, the cache of `datasets`."
    code, _, err = script(FULL.format(where=where, limit=limit))
    told = err.splitlines()[-1]
    assert (
        code
        and 'OSError: data set nlphuji/flickr30k: no space is left on the disk' in told
        and 'HF_HOME' in told
    )

# --- Folders as they come out of archives

def pictures(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for i,name in enumerate(names):
        (folder/name).write_bytes(jpeg(i))

def flickr_csv(folder, names):
    "Flickr30k's own table, with the row that lacks its separator, and images one folder further down."
    pictures(folder/'flickr30k_images', names)
    rows = [f'{name}| {k}| {BOOK.captions(i)[k]}' for i,name in enumerate(names) for k in range(5)]
    rows[19] = rows[19].replace('| 4|', '| 4  ')
    (folder / 'results.csv').write_text(
        'image_name| comment_number| comment\n' + '\n'.join(rows) + '\n', encoding='utf-8'
    )

def flickr_token(folder, names):
    pictures(folder/'Images', names)
    (folder / 'Flickr8k.token.txt').write_text(
        ''.join(f'{name}#{k}\t{BOOK.captions(i)[k]}\n' for i, name in enumerate(names) for k in range(5)),
        encoding='utf-8',
    )

def karpathy(folder, names):
    pictures(folder/'val2014', names)
    images = [
        dict(
            filename=name,
            filepath='val2014',
            split=('train', 'restval', 'val', 'test')[i % 4],
            sentences=[dict(raw=c, tokens=c.split()) for c in BOOK.captions(i)[:5]],
        )
        for i, name in enumerate(names)
    ]
    (folder/'dataset_coco.json').write_text(json.dumps(dict(dataset='coco', images=images)), encoding='utf-8')

def coco(folder, names):
    for split,part in (('train', names[:28]), ('val', names[28:])):
        pictures(folder/f'{split}2017', part)
        images = [dict(id=100+i, file_name=name, height=64) for i,name in enumerate(part)]
        annotations = [
            dict(id=i, image_id=100 + i // 5, caption=BOOK.captions(i // 5)[i % 5])
            for i in range(5 * len(part))
        ]
        (folder/'annotations').mkdir(exist_ok=True)
        (folder / 'annotations' / f'captions_{split}2017.json').write_text(
            json.dumps(dict(images=images, annotations=annotations)), encoding='utf-8'
        )

def imagefolder(folder, names):
    for split,part in (('train', names[:28]), ('validation', names[28:32]), ('test', names[32:])):
        pictures(folder/split, part)
        (folder / split / 'metadata.jsonl').write_text(
            ''.join(
                json.dumps(dict(file_name=name, text=BOOK.captions(i)[0])) + '\n'
                for i, name in enumerate(part)
            ),
            encoding='utf-8',
        )

LAYOUTS = {  # how it is written, then images in each split and captions of an image
    flickr_csv: (dict(train=32, validation=4, test=4), 5),
    flickr_token: (dict(train=32, validation=4, test=4), 5),
    karpathy: (dict(train=20, validation=10, test=10), 5),
    coco: (dict(train=28, validation=12), 5),
    imagefolder: (dict(train=28, validation=4, test=8), 1),
}

@pytest.mark.parametrize('write', LAYOUTS)
def test_layouts(write, tmp_path):
    names, (sizes, captions) = [f'{2000+i}.jpg' for i in range(40)], LAYOUTS[write]
    write(tmp_path/'set', names)
    if write is flickr_csv:
        with pytest.raises(ValueError, match=r"results.csv: line 21: no caption for '2003.jpg'"):
            load_data(tmp_path/'set')
    found = load_data(tmp_path/'set', bad_rows='skip')
    assert {split: len(rows) for split,rows in found.items()} == sizes
    rows = [row for part in found.values() for row in part]
    assert len({Path(row['image_id']).name for row in rows}) == len(rows) == 40
    assert all(
        len(row['captions']) == captions
        or write is flickr_csv
        and row['image_id'] == '2003.jpg'
        and len(row['captions']) == 4
        for row in rows
    )
    if write in (flickr_csv, flickr_token, karpathy):
        for row in rows:
            assert row['captions'][0] == ' '.join(
                BOOK.captions(int(Path(row['image_id']).stem) - 2000)[0].split()
            )

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Forty images with a comma-separated table, two bad rows in it and two images that cannot be read."
    folder = tmp_path_factory.mktemp('bad')/'album'
    names = [f'{i}.jpg' for i in range(40)]
    pictures(folder, names)
    (folder/'7.jpg').write_bytes(jpeg(7)[:500])
    (folder/'9.jpg').write_bytes(b'<html>')
    rows = [f'{name},"{BOOK.captions(i)[0]}"' for i,name in enumerate(names)] + ['40.jpg,gone', '3.jpg,']
    (folder/'captions.csv').write_text('file_name,caption\n' + '\n'.join(rows) + '\n', encoding='utf-8')
    return folder

def test_check_names_every_bad_row(call, album):
    done = call('capnb_data', 'check', album, '--json_file', 'found.json', cwd=album.parent)
    told = [line for line in done.stdout.splitlines() if line.startswith('bad: ')]
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1]
        == f'data: 4 bad rows in {album}; train with --bad_rows skip to leave them out'
    )
    table = album/'captions.csv'
    for words in (
        f"{table}: line 42: there is no image '40.jpg'",
        f"{table}: line 43: no caption for '3.jpg'",
        f"{table}: line 9: {album/'7.jpg'} is not a readable image",
        f"{table}: line 11: {album/'9.jpg'} is not a readable image",
    ):
        assert sum(words in line for line in told) == 1, (words, told)
    found = json.loads((album.parent/'found.json').read_text(encoding='utf-8'))
    assert len(found['bad']) == len(told) == 4 and sum(s['images'] for s in found['splits'].values()) == 38
    assert found['splits']['train']['smallest'] == found['splits']['train']['largest'] == [64, 64] and found[
        'splits'
    ]['train']['captions_per_image'] == {'1': found['splits']['train']['images']}

def test_check_of_good_data_and_of_the_hub(run, hub, tmp_path):
    done = run(
        'capnb_data',
        'check',
        'flickr30k',
        '--limit',
        30,
        cwd=tmp_path,
        env=hub.environment(tmp_path / 'home'),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        'train: 30 images, 150 captions (30 images with 5); from 64×64 to 64×64 pixels' in done.stdout
        and '1000.jpg: ' in done.stdout
    )

def test_bad_rows_stop_or_are_left_out(call, album, tmp_path):
    small = ['--data', album, '--max_steps', 1, '--num_epochs', 1]
    done = call('capnb_train', *small, cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr.strip()
        == f"train: {album/'captions.csv'}: line 42: there is no image '40.jpg' (the nearest is '4.jpg');"
        " line 43: no caption for '3.jpg'"
    )
    done = call('capnb_train', *small, '--bad_rows', 'skip', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        done.stdout.splitlines()[0]
        == f"⚠️ skipped what cannot be read, 4 in all; the first: {album/'captions.csv'}: line 42: there is"
        " no image '40.jpg' (the nearest is '4.jpg')"
    )
    metadata = read_metadata(newest_checkpoint(tmp_path/'saved_models'))
    assert sum(metadata['data'][split] for split in ('train','validation','test')) == 38
    assert metadata['data']['num_skipped'] == 4

def test_a_bad_picture_of_the_hub_is_named(hub, load):
    rows = flickr30k(0, 40)
    rows[5]['image'] = dict(bytes=jpeg(5)[:500], path=None)
    hub.add('me/flickr', {'data/test-00000-of-00001.parquet': parquet(rows, FLICKR30K)})
    (stopped, _), (skipped, _) = load(dict(data='me/flickr'), dict(data='me/flickr', bad_rows='skip'))
    assert stopped.startswith('ValueError: row 3 (1005.jpg): the image is not a readable image')
    assert ids(skipped)['train'] == [f'{1000+i}.jpg' for i in range(40) if KARPATHY[i%10]=='train' and i!=5]

def test_rows_of_no_split_on_the_hub_are_not_used(hub, load):
    rows = flickr30k(0, 40)
    rows[5]['split'] = rows[6]['split'] = ''
    hub.add('me/some', {'data/test-00000-of-00001.parquet': parquet(rows, FLICKR30K)})
    for found,_ in load(dict(data='me/some'), dict(data='me/some', limit=25)):
        assert set(found) == {'train', 'validation', 'test'} and not {'1005.jpg', '1006.jpg'} & {
            name for names in ids(found).values() for name in names
        }

def test_a_column_split_of_numbers_or_of_nothing(hub, load):
    rows = [dict(row, split=n%2) for n,row in enumerate(flickr30k(0, 40))]
    hub.add('me/folds', {'data/train-00000-of-00001.parquet': parquet(
        rows, dict(FLICKR30K, split=Value('int64')))})
    rows = [dict(row, split='') for row in flickr30k(0, 40)]
    hub.add('me/none', {'data/train-00000-of-00001.parquet': parquet(rows, FLICKR30K)})
    (folds, _), (few, _), (none, _) = load(
        dict(data='me/folds'), dict(data='me/folds', limit=10), dict(data='me/none'))
    assert set(ids(folds)) == set(ids(few)) == {'train', 'validation', 'test'}
    assert none.startswith('ValueError: data set me/none: none of its rows has a split')
