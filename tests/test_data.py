"Data sets by name against a hub on this machine, folders as they come out of archives, and bad pictures: each works, or is named."
import hashlib, io, json, subprocess, sys, time
import numpy as np, pytest
from datasets import Dataset, Features, Image as ImageColumn, List, Value
from PIL import Image
from hub import Hub
from capnb.captioner import newest_checkpoint, read_metadata
from capnb.storybook import Storybook

BOOK = Storybook()
FLICKR30K = dict(image=ImageColumn(), caption=List(Value('string')), sentids=List(Value('string')), split=Value('string'), img_id=Value('string'), filename=Value('string'))
KARPATHY = ['train','train','val','train','test','train','train','train','val','test'] # lie mixed
ROWS, GROUP = 400, 20

def jpeg(i):
    file = io.BytesIO(); BOOK[i]['image'].save(file, 'JPEG', quality=90)
    return file.getvalue()

def parquet(rows, features, group=GROUP):
    "A parquet file, with rows in groups, as the bytes of it."
    file = io.BytesIO()
    Dataset.from_list(rows, features=Features(features)).to_parquet(file, batch_size=group)
    return file.getvalue()

def flickr30k(start, stop):
    return [dict(image=dict(bytes=jpeg(i), path=None), caption=BOOK.captions(i)[:5], sentids=[str(5*i+k) for k in range(5)], split=KARPATHY[i%10], img_id=str(i), filename=f'{1000+i}.jpg') for i in range(start, stop)]

@pytest.fixture(scope='session')
def files():
    "What the hub keeps: parquet with real JPEGs in the layout of each known repository."
    whole = {f'TEST/test/{n:04}.parquet': parquet(flickr30k(n*ROWS//2, (n+1)*ROWS//2), FLICKR30K) for n in range(2)}
    bare = {k: v for k,v in FLICKR30K.items() if k!='split'}
    lmms = {'data/test-00000-of-00001.parquet': parquet([{k: v for k,v in row.items() if k!='split'} for row in flickr30k(0, 80)], bare)}
    eight = dict(image=ImageColumn(), **{f'caption_{k}': Value('string') for k in range(5)})
    rows = [dict(image=dict(bytes=jpeg(i), path=None), **{f'caption_{k}': BOOK.captions(i)[k] for k in range(5)}) for i in range(80)]
    flickr8k = {f'data/{split}-00000-of-00001.parquet': parquet(rows[a:b], eight) for split,a,b in [('train',0,40),('validation',40,60),('test',60,80)]}
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
    for name,content in files.items(): shared_hub.add(name, content, revisions=('main','refs/convert/parquet') if name.startswith('nlphuji') else ('main',))
    return shared_hub

@pytest.fixture(scope='module')
def whole(files):
    "All rows of Flickr30k as they must come: ids, captions, and a fingerprint of the pixels."
    rows = {split: [] for split in ('train','validation','test')}
    for i in range(ROWS):
        image = Image.open(io.BytesIO(jpeg(i))).convert('RGB')
        rows[dict(val='validation').get(KARPATHY[i%10], KARPATHY[i%10])].append([f'{1000+i}.jpg', [' '.join(c.split()) for c in BOOK.captions(i)[:5]], hashlib.md5(image.tobytes()).hexdigest()])
    return rows

LOAD = '''import hashlib, json, sys
from capnb.data import load_data
for job in json.loads(sys.argv[1]):
    sys.stdin.readline() # until the next one is wanted
    try: splits = load_data(**job)
    except (OSError, ValueError) as e: print(json.dumps(f'{type(e).__name__}: {e}'), flush=True); continue
    print(json.dumps({split: [[row['image_id'], row['captions'], hashlib.md5(row['image'].tobytes()).hexdigest()] for row in rows] for split,rows in splits.items()}), flush=True)'''

@pytest.fixture
def load(hub, environment, tmp_path):
    "Load data sets one after the other in a fresh process, because the clients of the hub read the environment on import. Gives for each its rows by split (image id, captions, fingerprint of the pixels), or the error, and the bytes that were sent."
    def load(*jobs, home='home', **env):
        env, found = environment(**{**hub.environment(tmp_path/home), **env}), []
        with subprocess.Popen([sys.executable, '-c', LOAD, json.dumps(jobs)], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for job in jobs:
                before = hub.sent
                process.stdin.write('\n'); process.stdin.flush()
                line = process.stdout.readline()
                assert line, process.stderr.read()
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

def first(rows, limit, held): return {split: r[:limit if split=='train' else held] for split,r in rows.items()}

def test_flickr30k_whole(load, whole):
    (found, _), (named, _) = load(dict(data='flickr30k'), dict(data='flickr30k', image_column='image', caption_column='filename'))
    assert found == whole and {split: len(rows) for split,rows in whole.items()} == dict(train=240, validation=80, test=80)
    assert named['train'][5][1] == ['1007.jpg']

def test_limit_takes_the_first_rows_and_only_their_bytes(load, files, whole):
    "30 pictures, once more, then 90. 30 for training need 50 rows, ten for each other split as many: three groups of twenty."
    (part, sent), (again, nothing), (more, rest) = load(*(dict(data='flickr30k', limit=n) for n in (30, 30, 90)))
    assert part == again == first(whole, 30, 10) and more == first(whole, 90, 10)
    group = size(files, 'nlphuji/flickr30k')*GROUP/ROWS
    index = 65_536 # the end of the file, which tells where the groups are
    assert 3*group < sent < 3.3*group+index and nothing == 0 and 5*group < rest < 5.3*group+index, (group, sent, nothing, rest)

def test_what_is_here_needs_no_network(load, whole):
    load(dict(data='flickr30k', limit=30))
    (offline, sent), (more, _) = load(dict(data='flickr30k', limit=30), dict(data='flickr30k', limit=90), HF_HUB_OFFLINE='1')
    assert (offline, sent) == (first(whole, 30, 10), 0) and 'HF_HUB_OFFLINE forbids' in more

def test_flickr8k_and_columns_with_numbers(load):
    (found, _), (part, _) = load(dict(data='flickr8k'), dict(data='flickr8k', limit=15))
    assert {split: len(rows) for split,rows in found.items()} == dict(train=40, validation=20, test=20)
    assert found['validation'][0][1] == [' '.join(c.split()) for c in BOOK.captions(40)[:5]]
    assert part == {split: rows[:15 if split=='train' else 10] for split,rows in found.items()}

def test_a_hub_split_alone_is_cut_by_number(load):
    (found, _), (part, _) = load(dict(data='lmms-lab/flickr30k'), dict(data='lmms-lab/flickr30k', limit=20))
    assert set(found) == {'train','validation','test'} and sorted(sum(ids(found).values(), [])) == [f'{1000+i}.jpg' for i in range(80)] and min(map(len, found.values())) > 2
    assert part == {split: rows[:20 if split=='train' else 10] for split,rows in found.items()}

def test_columns_that_cannot_be_told(hub, load):
    features = dict(photo=ImageColumn(), mask=ImageColumn(), says=Value('string'), licence=Value('string'))
    rows = [dict(photo=dict(bytes=jpeg(i), path=None), mask=dict(bytes=jpeg(0), path=None), says=f'picture {i}', licence='free') for i in range(40)]
    hub.add('me/photos', {'data/train-00000-of-00001.parquet': parquet(rows, features)})
    (found, _), (no_caption, _) = load(dict(data='me/photos', image_column='photo', caption_column='says'), dict(data='me/photos', image_column='photo'))
    assert sorted(row[1] for rows in found.values() for row in rows) == sorted([f'picture {i}'] for i in range(40))
    assert 'Name it with caption_column; there are texts in: says, licence' in no_caption
    assert 'Name it with image_column; of type image: photo, mask' in load(dict(data='me/photos'))[0][0]

def test_preset_flickr30k_trains(hub, run_on_hub, tmp_path):
    small = ['--encoder_name', 'storybook-clip', '--tokenizer_name', 'storybook-qwen3', '--image_size', 64, '--training_size_limit', 30, '--max_steps', 2, '--max_caption_length', 12]
    done = run_on_hub('capnb_train', '--preset', 'flickr30k', *small)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = read_metadata(newest_checkpoint(tmp_path/'saved_models'))
    assert metadata['data'] == dict(name='flickr30k', train=30, validation=10, test=10)
    assert 'Downloading nlphuji/flickr30k' in done.stderr
    before = hub.sent
    judged = run_on_hub('capnb_eval', '--json_file', 'scores.json') # the same pictures are held back, and nothing more is downloaded
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert json.loads((tmp_path/'scores.json').read_text())['test']['rouge_l'] == pytest.approx(metadata['test']['rouge_l'], abs=1e-6) and hub.sent-before < 20_000

# --- What goes wrong on the way

@pytest.mark.parametrize('limit', [None, 30])
def test_a_cut_connection_goes_on(hub, load, whole, limit):
    hub.cut_after, hub.cuts = 30_000, 2
    (found, _), = load(dict(data='flickr30k', limit=limit))
    assert hub.cuts == 0 and found == first(whole, limit, limit and 10)

@pytest.mark.parametrize('limit', [None, 200])
def test_a_killed_download_goes_on_where_it_was(hub, environment, load, files, whole, tmp_path, limit):
    total = size(files, 'nlphuji/flickr30k')
    hub.pause = .02 # so that there is time to kill
    small = 'import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 16_384\n' # 10 MB in truth: more than all of this file
    process = subprocess.Popen([sys.executable, '-c', small+LOAD, json.dumps([dict(data='flickr30k', limit=limit)])], env=environment(**hub.environment(tmp_path/'home')), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while hub.sent < .75*total: time.sleep(.01); assert process.poll() is None, process.communicate()
    process.kill(); process.communicate()
    hub.pause = 0
    (found, sent), = load(dict(data='flickr30k', limit=limit))
    assert found == first(whole, limit, limit and 20) and sent < .4*total, (sent, total)

FAULTS = { # what is done to the hub, name of the data set, the error
    'missing': (lambda hub: None, 'nobody/nothing', 'FileNotFoundError: data set nobody/nothing: there is none of this name on the hub, or it is private; check the name, or log in with `hf auth login`'),
    'revision': (lambda hub: hub.repos['datasets','nlphuji/flickr30k'].revisions.discard('refs/convert/parquet'), 'flickr30k', 'FileNotFoundError: data set nlphuji/flickr30k: it has no such revision'),
    'gated': (lambda hub: setattr(hub.repos['datasets','nlphuji/flickr30k'], 'gated', True), 'flickr30k', 'PermissionError: data set nlphuji/flickr30k: its terms must be accepted first; do so at http'),
    'empty': (lambda hub: hub.add('me/nothing', {'notes.txt~': b''}), 'me/nothing', 'FileNotFoundError: data set me/nothing: it has not the files that are needed'),
    'broken': (lambda hub: setattr(hub, 'status', 500), 'flickr30k', 'ConnectionError: data set nlphuji/flickr30k: the hub answers with error 500; try again later'),
}

@pytest.mark.parametrize('fault', FAULTS)
def test_hub_fault_is_told(hub, load, fault):
    spoil, name, message = FAULTS[fault]
    spoil(hub)
    for told,_ in load(dict(data=name), dict(data=name, limit=30)): assert told.startswith(message) and len(told.splitlines()) == 1

@pytest.mark.parametrize('fault,word', [('gated', 'hf auth login'), ('closed', 'cannot be reached; check the network')])
def test_hub_fault_is_one_line_of_the_command(hub, run, tmp_path, fault, word):
    env = hub.environment(tmp_path/'home')
    if fault=='gated': hub.repos['datasets','nlphuji/flickr30k'].gated = True
    else: env['HF_ENDPOINT'] = 'http://127.0.0.1:9' # where nobody listens
    done = run('capnb_train', '--preset', 'flickr30k', cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, '') and len(done.stderr.splitlines()) == 1, done.stderr[-3000:]
    assert done.stderr.startswith('train: data set nlphuji/flickr30k: ') and word in done.stderr

FULL = '''import errno
import capnb.data as data
def full(*args, **more): raise OSError(errno.ENOSPC, 'No space left on device')
{where} = full
data.load_data('flickr30k', limit={limit})'''

@pytest.mark.parametrize('where,limit', [('data.atomic_write', 30), ('import huggingface_hub.file_download as d; d.http_get', None), ('import datasets.arrow_writer as d; d.ArrowWriter.write_table', None)])
def test_a_full_disk_is_told(hub, environment, tmp_path, where, limit):
    "At each place that writes: our own parts, the cache of the hub, the cache of `datasets`."
    done = subprocess.run([sys.executable, '-c', FULL.format(where=where, limit=limit)], env=environment(**hub.environment(tmp_path/'home')), capture_output=True, text=True)
    told = done.stderr.splitlines()[-1]
    assert done.returncode and 'OSError: data set nlphuji/flickr30k: no space is left on the disk' in told and 'HF_HOME' in told
