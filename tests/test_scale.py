"""Captions at scale: a worker is killed, a whole job is killed, and still every image is captioned exactly
once."""
import ipaddress, json, os, shutil, signal, subprocess, sys, tarfile, time
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch
import psutil, pytest, torch
import pyarrow as pa, pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from capnb.checkpoint import metadata_path
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.run.entry import train
from capnb.images import find_images
from capnb.inference import caption_files
from capnb.run.scale import jobs as jobs_module
from capnb.run.scale.command import scale_command
from capnb.run.scale.jobs import caption_images, encode_images
from capnb.run.scale.sources import Source
from capnb.storybook import Storybook

N, SHARD = 200, 10
JOB = ('--workers', 2, '--batch_size', SHARD, '--shard_size', SHARD)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with pages, one of them broken, and a checkpoint; the captions that one process writes."
    here = tmp_path_factory.mktemp('scale')
    checkpoint = train(
        training_size_limit=64,
        num_epochs=1,
        evaluation_enabled=False,
        adapter_width=32,
        prefix_length=2,
        output_dir=str(here / 'saved_models'),
        device='cpu',
    ).checkpoint
    pages = here/'pages'
    pages.mkdir()
    data = Storybook('test')
    for i in range(N):
        data[i]['image'].save(pages/f'{i:03}.png')
    (pages/'100.png').write_bytes((pages/'100.png').read_bytes()[:200])
    # In batches as large as those of the workers: the sums of another size may differ in the last bit.
    wanted = {
        os.path.basename(r['file']): r.get('caption')
        for r in caption_files(
            load_model_from_checkpoint(checkpoint, 'cpu')[0], find_images([pages]), batch_size=SHARD
        )
    }
    assert [name for name,caption in wanted.items() if caption is None] == ['100.png']
    return here, wanted

def rows(out):
    return [row for file in sorted(out.glob('*.parquet')) for row in pq.read_table(file).to_pylist()]

def check_whole(out, wanted):
    "Every image has one row, with the caption that one process writes."
    found = rows(out)
    assert set(Counter(r['id'] for r in found).values()) == {1}
    assert {r['id']: r['caption'] for r in found} == wanted
    assert [(r['id'], 'not a readable image' in r['error']) for r in found if r['error']] == [
        ('100.png', True)
    ]
    assert all(-20 < r['score'] < 0 for r in found if r['caption'] is not None)

def workers(process):
    "The processes of a job that hold a model."
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if 'CaptionWorker' in ' '.join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            pass
    return found

def wait_for(process, ready, seconds=120):
    "Wait until `ready()` holds, while the job is at work."
    end = time.time() + seconds
    while not (found := ready()):
        assert process.poll() is None and time.time() < end, (
            'the job ended too early: ' + process.stderr.read()[-3000:]
        )
        time.sleep(.02)
    return found

def listening(process):
    "The addresses at which a job and its processes listen."
    found = set()
    for p in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in p.net_connections('inet') if c.status == psutil.CONN_LISTEN}
        except psutil.Error:
            pass
    return {getattr(ip, 'ipv4_mapped', None) or ip for ip in map(ipaddress.ip_address, found)}

def kill_worker(process, out):
    "Kill one of the two workers in the middle of a job, and wait for a new one in its place."
    wait_for(process, lambda: list(out.glob('*.parquet')))
    first = workers(process)
    assert len(first) == 2
    listens = listening(process)
    # nobody else can reach what runs whatever it is sent
    assert listens and all(ip.is_loopback for ip in listens), listens
    first[0].send_signal(signal.SIGKILL)
    written = SHARD*len(list(out.glob('*.parquet'))) # at most: one of them may be half written
    assert written < N - 5*SHARD, 'the kill came too late to mean anything'
    wait_for(process, lambda: {w.pid for w in workers(process)} - {w.pid for w in first})

@pytest.mark.slow # Ray starts again
def test_killed_worker_is_replaced(start, made, tmp_path):
    here, wanted = made
    out = tmp_path/'captions'
    with start('capnb_scale', 'pages', out, *JOB, cwd=here, fresh=True) as process:
        try:
            kill_worker(process, out)
            said, errors = process.communicate(timeout=200)
        finally:
            process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert f'{N} images, of which 1 could not be read' in said
    check_whole(out, wanted)

def stopped(start, here, out):
    "Begin a job and kill it in the middle."
    with start('capnb_scale', 'pages', out, *JOB, cwd=here, fresh=True) as process:
        try:
            wait_for(process, lambda: len(list(out.glob('*.parquet'))) >= 3)
            at_work, family = workers(process), psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(at_work, timeout=30)
    assert len(at_work) == 2 and not alive, 'the workers outlive the job'
    for p in family: # Ray's own helpers take longer to notice
        if p.is_running():
            p.kill()

@pytest.mark.slow # it waits for Ray to start, twice
def test_stopped_job_goes_on(start, run, made, tmp_path):
    "What was finished is neither written again nor changed; a half-written file of before is gone."
    here, wanted = made
    out = tmp_path/'captions'
    stopped(start, here, out)
    notes = out.with_name('captions.progress')
    finished = {
        r['id']
        for note in notes.glob('*.parquet')
        if '.pending' not in note.name
        for r in pq.read_table(note).to_pylist()
    }
    assert 3*SHARD <= len(finished) + SHARD and len(finished) < N - 5*SHARD
    before = {f: f.stat().st_mtime_ns for f in out.glob('*.parquet')}
    # What a death between the two halves of a write leaves: a file whose note is not valid yet.
    file = max(before)
    note = notes/file.name.replace('-0.parquet', '.parquet')
    if note.exists():
        note.rename(note.with_name(note.stem + '.pending.parquet'))
    undone = {r['id'] for r in pq.read_table(file).to_pylist()}
    done = run('capnb_scale', 'pages', out, *JOB, cwd=here, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    check_whole(out, wanted)
    assert not file.exists()
    kept = {f: t for f,t in before.items() if f.exists()}
    assert all(f.stat().st_mtime_ns == t for f,t in kept.items())
    anew = {r['id'] for f in out.glob('*.parquet') if f not in before for r in pq.read_table(f).to_pylist()}
    assert anew == set(wanted) - (finished - undone)

@pytest.mark.slow # it waits for Ray to start
def test_several_captions_belong_to_their_image(run, made, tmp_path):
    here, _ = made
    model = load_model_from_checkpoint(next((here/'saved_models').glob('*.pth')), 'cpu')[0]
    wanted = {
        os.path.basename(r['file']): r.get('caption')
        for r in caption_files(
            model, find_images([here / 'pages']), batch_size=SHARD, num_beams=3, num_return_sequences=2
        )
    }
    done = run(
        'capnb_scale',
        'pages',
        tmp_path / 'out',
        *JOB,
        '--num_beams',
        3,
        '--num_return_sequences',
        2,
        cwd=here,
        fresh=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {r['id']: r for r in rows(tmp_path/'out')}
    assert {name: r['caption'] for name,r in found.items()} == wanted and len(wanted) == N
    assert all(
        len(r['score']) == 2 and r['score'][0] >= r['score'][1] for r in found.values() if r['caption']
    )

WRONG = {
    'no images': (['nothing'], 'there are no images'),
    'no checkpoint': (['pages', '--checkpoint', 'no.pth'], 'no.pth'),
    'no GPU': (['pages', '--gpus', '1'], 'and there are 0; ask for fewer workers, or for none on a GPU'),
    'features have no beams': (['pages', '--encode', '--num_beams', '3'], 'without --num_beams'),
    'no workers': (['pages', '--workers', '0'], 'workers is 0; allowed: a whole number of 1 or more'),
    'no package for that storage': (['s3://bucket/pages'], 's3fs'),
}

def test_columns_of_parquet_files(tmp_path):
    "Another type is refused at once; a first file without rows is no reason to stop."
    def write(name, **columns):
        pq.write_table(pa.table(columns), tmp_path/f'{name}.parquet')
    write('b', image=[b'x'], number=[1], words=[['a']], place=[dict(path='a.png')])
    for column,kind in (('number', 'int64'), ('words', 'list'), ('place', 'struct')):
        with pytest.raises(ValueError, match=f"column '{column}' has the type {kind}"):
            Source(str(tmp_path), column)
    pq.write_table(pa.table(dict(image=pa.array([], pa.binary()))), tmp_path/'a.parquet')
    source = Source(str(tmp_path))
    assert [row['image'][0].as_py() for file in source.files for row in source.read(file)] == [b'x']

@pytest.mark.parametrize('kind', ['tar archives', 'images'])
def test_tables_of_img2dataset_are_no_images(tmp_path, kind):
    "Each shard has a table of its name next to it."
    for n in range(2):
        table = tmp_path/f'{n:05}.parquet'
        pq.write_table(pa.table(dict(url=['https://a.org/0.png'], caption=['A card.'], key=['0'])), table)
        shard = table.with_suffix('.tar' if kind=='tar archives' else '')
        if kind=='tar archives':
            tarfile.open(shard, 'w').close()
        else:
            shard.mkdir()
            Storybook('test')[0]['image'].save(shard/'0.png')
        table.with_name(f'{table.stem}_stats.json').write_text('{}')
    source = Source(tmp_path)
    assert source.kind==kind and len(source.files)==2
    table.rename(tmp_path/'more.parquet')
    with pytest.raises(ValueError, match=f"holds {'.*'.join(sorted([kind, 'parquet files']))}"):
        Source(tmp_path)

def names_of(place):
    "The name and the error of each image of a source."
    source = Source(str(place))
    return {r['id']: r['error'] for f in source.files for row in source.read(f) for r in row.to_pylist()}

@pytest.mark.parametrize('way', ['pages/.', './pages', '///pages'])
def test_a_roundabout_path_does_not_change_names(tmp_path, way):
    (tmp_path/'pages').mkdir()
    for name in ('017.png', '117.png'):
        Storybook('test')[0]['image'].save(tmp_path/'pages'/name)
    assert list(names_of(f'{tmp_path}/{way}')) == ['017.png', '117.png']

def test_one_file_of_a_storage_that_tells_no_size(monkeypatch):
    "Such as http, which lists a folder with sizes and a file without."
    monkeypatch.setattr(MemoryFileSystem, 'find', lambda fs, path, **how: {path: {}})
    assert Source('memory://pages/0.tar').files=={'/pages/0.tar': 0}

def test_a_hub_that_cannot_be_reached_is_one_line(run, tmp_path):
    nowhere = dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HUB_OFFLINE='0', HF_HOME=str(tmp_path/'home'))
    place, weights = 'hf://datasets/owner/photos', shipped_checkpoint()
    done = run('capnb_scale', place, 'out', '--checkpoint', weights, cwd=tmp_path,
               env=dict(nowhere, HF_TOKEN='', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1'))
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr[-3000:]
    assert done.stderr.startswith(f'scale: data set {place}: ') and 'cannot be reached' in done.stderr

def test_links_in_an_archive_have_a_row_and_hidden_files_have_none(tmp_path):
    for folder in ('pages', 'pages/.ipynb_checkpoints', 'pages/__MACOSX', 'packed'):
        (tmp_path/folder).mkdir()
    pages = tmp_path/'pages'
    Storybook('test')[0]['image'].save(pages/'a.png')
    os.link(pages/'a.png', pages/'b.png')
    for name in ('._a.png', '.ipynb_checkpoints/a-checkpoint.png', '__MACOSX/._a.png'):
        (pages/name).write_bytes(b'x')
    with tarfile.open(tmp_path/'packed'/'0.tar', 'w') as archive:
        archive.add(pages, '.')
    assert names_of(pages) == {'a.png': None, 'b.png': None}
    found = names_of(tmp_path/'packed')
    assert set(found) == {'0.tar#./a.png', '0.tar#./b.png'}
    assert sum('a link' in (error or '') for error in found.values()) == 1

def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path/'closed').mkdir()
    Storybook('test')[0]['image'].save(tmp_path/'a.png')
    scan = os.scandir
    def refuse(path):
        if 'closed' in str(path):
            raise PermissionError(13, 'Permission denied', str(path))
        return scan(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    assert len(Source(str(tmp_path)).files) == 1
    assert f"{tmp_path/'closed'} cannot be read: Permission denied" in capsys.readouterr().err

def test_a_damaged_parquet_file_gives_a_row_with_the_reason(tmp_path):
    file = tmp_path/'a.parquet'
    pq.write_table(pa.table(dict(image=[os.urandom(2000) for _ in range(500)])), file, row_group_size=100)
    column = pq.ParquetFile(file).metadata.row_group(2).column(0)
    at = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(file.read_bytes())
    data[at:at+400] = bytes(400)
    file.write_bytes(data)
    *good, last = names_of(tmp_path).items()
    assert len(good) >= 128 and not any(error for _,error in good)
    assert last[0] == 'a.parquet' and 'a.parquet cannot be read' in last[1]

@pytest.mark.parametrize('error', [ConnectionError('reset'), OSError(5, 'Input/output error')])
def test_an_error_of_the_network_is_no_bad_file(tmp_path, monkeypatch, error):
    pq.write_table(pa.table(dict(image=[b'x'])), tmp_path/'a.parquet')
    source = Source(str(tmp_path))
    def fail(*args):
        raise error
    monkeypatch.setattr(source.fs, 'open', fail)
    with pytest.raises(type(error)):
        list(source.read('a.parquet'))

def test_an_output_without_its_rows_or_its_record_is_refused(tmp_path):
    fs, out, progress, job = LocalFileSystem(), tmp_path/'out', tmp_path/'out.progress', dict(work='captions')
    jobs_module._same_job(fs, str(out), job)
    progress.mkdir()
    rows = pa.table(dict(id=['a.png']))
    pq.write_table(rows, progress/'1.pending.parquet')
    jobs_module._same_job(fs, str(out), job) # it was killed in its first shard
    pq.write_table(rows, out/'1-0.parquet')
    (progress/'1.pending.parquet').rename(progress/'1.parquet')
    jobs_module._same_job(fs, str(out), job)
    (progress/'1.parquet').rename(tmp_path/'kept')
    with pytest.raises(ValueError, match='out.progress is gone'):
        jobs_module._same_job(fs, str(out), job)
    (tmp_path/'kept').rename(progress/'1.parquet')
    for deleted in ('1-0.parquet', '_job.json'):
        (out/deleted).unlink()
        with pytest.raises(ValueError, match='out.progress records rows'):
            jobs_module._same_job(fs, str(out), job)

def test_a_job_that_wrote_nothing_binds_nobody(tmp_path):
    fs, out = LocalFileSystem(), tmp_path/'out'
    for checkpoint in ('broken', 'whole'):
        jobs_module._same_job(fs, str(out), dict(checkpoint=checkpoint))
    pq.write_table(pa.table(dict(id=['a.png'])), out/'1.parquet')
    with pytest.raises(ValueError, match="its checkpoint was 'whole', now it is 'other'"):
        jobs_module._same_job(fs, str(out), dict(checkpoint='other'))

@pytest.fixture
def jobs(monkeypatch):
    "The descriptions of the jobs that would have run."
    found = []
    note = lambda source, out, worker, arguments, job, **more: found.append(job)
    monkeypatch.setattr(jobs_module, 'run_job', note)
    return found

def test_options_are_the_same_after_json(tmp_path, jobs):
    "And those that have no effect make no other job."
    Storybook('test')[0]['image'].save(tmp_path/'a.png')
    fs, out = LocalFileSystem(), tmp_path/'out'
    options = dict(bad_words_ids=[(1, 2)]), dict(bad_words_ids=[[1, 2]], num_beams=1, do_sample=False)
    for each in options:
        caption_images(str(tmp_path), str(out), shipped_checkpoint(), options=each)
    out.mkdir()
    before = dict(jobs[0], options=options[1]) # as an earlier version has written it
    (out/'_job.json').write_text(json.dumps(before), encoding='utf-8')
    for folder in (out, tmp_path/'out.progress'):
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(dict(id=['a.png'])), folder/'1.parquet')
    for job in jobs:
        jobs_module._same_job(fs, str(out), job)
    with pytest.raises(ValueError, match='another job: its options was'):
        jobs_module._same_job(fs, str(out), dict(jobs[0], options=dict(num_beams=3)))

def test_options_that_are_no_plain_data_are_refused_at_once(tmp_path, jobs):
    Storybook('test')[0]['image'].save(tmp_path/'a.png')
    options = dict(logits_processor=[object()])
    with pytest.raises(ValueError, match='they must be plain data'):
        caption_images(str(tmp_path), str(tmp_path/'out'), shipped_checkpoint(), options=options)
    assert not jobs

@pytest.fixture
def pages(tmp_path, monkeypatch):
    "A folder with an image. The settings with which a cluster would have been started are in `asked`."
    asked = []
    def begin(*settings):
        asked.append(settings)
        raise ValueError('a cluster would start')
    monkeypatch.setattr(jobs_module, 'cluster', begin)
    (tmp_path/'pages').mkdir()
    Storybook('test')[0]['image'].save(tmp_path/'pages'/'a.png')
    return SimpleNamespace(folder=tmp_path/'pages', asked=asked)

def test_two_jobs_do_not_share_an_output(pages, tmp_path):
    job = str(pages.folder), str(tmp_path/'new'/'out'), shipped_checkpoint()
    with jobs_module._alone(LocalFileSystem(), job[1]), pytest.raises(ValueError, match='another job writes'):
        caption_images(*job)
    with pytest.raises(ValueError, match='a cluster would start'):
        caption_images(*job)
    assert len(pages.asked) == 1 and not list((tmp_path/'new').iterdir()) # no lock is left

def test_an_output_inside_its_source_is_refused(pages):
    for out in (pages.folder, pages.folder/'captions', pages.folder/'a'/'b'):
        with pytest.raises(ValueError, match='is inside the source'):
            caption_images(str(pages.folder), str(out), shipped_checkpoint())
    with pytest.raises(ValueError, match='a cluster would start'):
        caption_images(str(pages.folder), f'{pages.folder}-captions', shipped_checkpoint())

def test_an_output_beside_the_folder_of_a_shell_is_not_inside(pages, monkeypatch):
    monkeypatch.chdir(pages.folder)
    for source, out, said in (
        ('.', '../captions', 'a cluster would start'),
        (pages.folder, f'{pages.folder.parent}/./pages/captions', 'is inside the source'),
        ('../pages', 'captions', 'is inside the source'),
    ):
        with pytest.raises(ValueError, match=said):
            caption_images(str(source), out, shipped_checkpoint())

@pytest.mark.parametrize('settings, threads', [
    (dict(), 1), (dict(gpus=1), 8), (dict(gpus=1, workers=64), 1), (dict(gpus=1, threads=2), 2),
    (dict(gpus=1, address='auto'), 1),
])
def test_a_worker_on_a_gpu_decodes_with_several_children(pages, tmp_path, monkeypatch, settings, threads):
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(64), raising=False)
    with pytest.raises(ValueError, match='a cluster would start'):
        caption_images(str(pages.folder), str(tmp_path/'out'), shipped_checkpoint(), **settings)
    assert [asked[1] for asked in pages.asked] == [threads]

def test_a_read_task_does_not_carry_all_names(pages, monkeypatch):
    import ray.data
    monkeypatch.setattr(ray.data, 'read_datasource', lambda images, **more: images)
    sizes = []
    for n in (10, 1000):
        source = Source(str(pages.folder))
        source.files |= {f'{pages.folder}/{i:040}.png': 1 for i in range(1, n)}
        task = jobs_module._rows(ray, source).get_read_tasks(n)[0]
        assert [row['id'][0].as_py() for row in task()] == ['a.png']
        sizes.append(len(ray.cloudpickle.dumps(task)))
    assert sizes[1] < 2*sizes[0]

def test_features_that_do_not_fit_are_told(monkeypatch):
    monkeypatch.setattr(torch, 'set_num_threads', lambda n: None)
    worker = jobs_module.FeatureWorker('cpu', 1, dict(name='storybook-clip'))
    encoded = torch.tensor([[1., 2.], [1e5, 1.], [65504., -3.]])
    monkeypatch.setattr(worker.encoder, 'encode', lambda images: encoded)
    errors = [None, None, 'it cannot be read', None]
    image = Storybook('test')[0]['image']
    monkeypatch.setattr(jobs_module, '_open_rows', lambda *args: ([image]*3, errors))
    found = worker(pa.table(dict(id=list('abcd')))).to_pydict()
    worker.pool.close()
    assert found['features'] == [[1, 2], None, None, [65504, -3]]
    assert found['error'] == [None, 'its features do not fit half precision', 'it cannot be read', None]

def test_another_column_is_another_job(tmp_path, jobs):
    pq.write_table(pa.table(dict(left=[b'x'], right=[b'y'])), tmp_path/'p.parquet')
    for column in ('left', 'right'):
        caption_images(str(tmp_path), str(tmp_path/'out'), shipped_checkpoint(), column)
        encode_images(str(tmp_path), str(tmp_path/'out'), 'storybook-clip', image_column=column)
    assert jobs[0] != jobs[2] and jobs[1] != jobs[3]

def test_the_same_name_elsewhere_is_another_job(tmp_path, monkeypatch, jobs):
    for name in 'ab':
        pages = tmp_path/name/'pages'
        pages.mkdir(parents=True)
        Storybook('test')[0]['image'].save(pages/'0.png')
        monkeypatch.chdir(tmp_path/name)
        caption_images('pages', str(tmp_path/'out'), shipped_checkpoint())
        encode_images('pages', str(tmp_path/'out'), 'storybook-clip')
        caption_images(str(pages), str(tmp_path/'out'), shipped_checkpoint())
    assert jobs[0] != jobs[3] and jobs[1] != jobs[4] and jobs[0] == jobs[2] and jobs[3] == jobs[5]

@pytest.fixture
def encoder_of(tmp_path, monkeypatch):
    "The encoder that `--encode` takes from a checkpoint with these metadata."
    weights = shutil.copytree(shipped_checkpoint().parent, tmp_path/'saved_models')/shipped_checkpoint().name
    before = json.loads(metadata_path(weights).read_text(encoding='utf-8'))
    monkeypatch.chdir(tmp_path)
    def encoder_of(name, **more):
        settings = before['hyperparameters'] | dict(encoder_name=name)
        metadata = before | dict(hyperparameters=settings) | more
        metadata_path(weights).write_text(json.dumps(metadata), encoding='utf-8')
        with patch('capnb.run.scale.jobs.encode_images', return_value=dict(images=1, errors=0)) as encode:
            scale_command(['pages', 'out', '--checkpoint', str(weights), '--encode'])
        return encode.call_args.args[2]
    return encoder_of

@pytest.mark.parametrize('name, revisions, encoder', [
    ('owner/clip', dict(encoder='abc'), 'owner/clip@abc'),
    ('owner/clip@main', dict(encoder='abc'), 'owner/clip@main'),
    ('owner/clip', {}, 'owner/clip'),
    ('storybook-clip', dict(encoder=None), 'storybook-clip'),
])
def test_features_are_those_of_the_revision_that_was_trained_with(encoder_of, name, revisions, encoder):
    assert encoder_of(name, revisions=revisions)==encoder

def test_an_encoder_in_a_folder_is_the_same_from_anywhere(encoder_of, tmp_path, monkeypatch):
    (tmp_path/'models'/'clip').mkdir(parents=True)
    found = []
    for here in (tmp_path, tmp_path/'models', tmp_path/'saved_models'):
        monkeypatch.chdir(here)
        found.append(encoder_of('models/clip', places=dict(encoder_name='../models/clip')))
    assert {os.path.realpath(name) for name in found}=={os.path.realpath(tmp_path/'models'/'clip')}
    assert len(set(found))==1

def one_line(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        scale_command(list(args))
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and len(said.splitlines()) == 1, said
    return said

@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_is_one_line(made, tmp_path, monkeypatch, capsys, case):
    args, words = WRONG[case]
    monkeypatch.chdir(made[0])
    assert words in one_line(capsys, args[0], str(tmp_path/'out'), *args[1:])
    assert not (tmp_path/'out').exists()

def test_without_ray_is_one_line(made, monkeypatch, capsys):
    monkeypatch.chdir(made[0])
    monkeypatch.setitem(sys.modules, 'ray', None)
    assert "pip install 'capnb[scale]'" in one_line(capsys, 'pages', 'out')

@pytest.mark.parametrize('more, drawn', [([], True), (['--quiet'], False)])
def test_bars_are_drawn_on_a_terminal_unless_quiet(made, tmp_path, monkeypatch, more, drawn):
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr('capnb.run.scale.command.sys', terminal)
    words = [str(made[0]/'pages'), str(tmp_path/'out'), '--checkpoint', str(shipped_checkpoint()), *more]
    with patch('capnb.run.scale.jobs.run_job', return_value=dict(images=1, errors=0)) as run_job:
        scale_command(words)
    assert run_job.call_args.kwargs['progress'] is drawn

@pytest.mark.skipif(not os.environ.get('CAPNB_SLOW'), reason='set CAPNB_SLOW=1')
def test_picture_that_kills_each_worker_ends_the_job(start, made, tmp_path, monkeypatch):
    "It is tried again a few times, not for ever; what the others have done stays."
    here, _ = made
    weights = str(next((here/'saved_models').glob('*.pth')))
    code = f"""
import os, sys
from capnb.run.scale.jobs import *
from capnb.run.scale.sources import Source
class Deadly(CaptionWorker):
    def __call__(self, rows):
        if '100.png' in rows['id'].to_pylist():
            os._exit(1)
        return super().__call__(rows)
try:
    run_job(
        Source('pages'), {str(tmp_path/'out')!r}, Deadly, ({weights!r}, {{}}), dict(work='deadly'),
        batch_size={SHARD}, shard_size={SHARD},
    )
except ValueError as e:
    print('ENDED', e)
"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )
    assert 'ENDED a worker failed' in done.stdout, done.stderr[-3000:]
    assert rows(tmp_path/'out') and '100.png' not in [r['id'] for r in rows(tmp_path/'out')]
