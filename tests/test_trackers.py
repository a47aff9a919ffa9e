"""Trackers, read back from their own stores: what a run told MLflow and Weights & Biases, after a stop and
after a failure, too."""
import json, sqlite3, struct
from pathlib import Path
from types import SimpleNamespace
import mlflow, pytest, torch, wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record
from forks import ForkedScript
from capnb.build import build_captioner
from capnb.encoder import EncodedData
from capnb.run import trackers, training
from capnb.run import entry
from capnb.checkpoint import read_metadata
from capnb.run.entry import train
from capnb.run.commands import train_command
from capnb.run.resume import find_state, read_state
from capnb.run.signals import Interrupted, ask_to_stop
from capnb.run.sweeps import sweep
from capnb.run.training import run_training
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from capnb.training import Callback

SMALL = dict(num_epochs=2, adapter_width=32, prefix_length=2, max_caption_length=12, batch_size=8)
SCORES = ('training_loss', 'validation_loss', 'rouge_l', 'rouge_l_floor', 'image_gain', 'learning_rate')

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "A folder with 40 images: 32 to learn from in 4 steps, 4 for validation, 4 for testing."
    folder, book = tmp_path_factory.mktemp('album'), Storybook(n=40)
    for i in range(40):
        book[i]['image'].save(folder/f'{i}.png')
    (folder / 'captions.csv').write_text(
        'file_name,caption\n' + '\n'.join(f'{i}.png,"{c}"' for i in range(40) for c in book.captions(i)[:2]),
        encoding='utf-8',
    )
    return str(folder)

@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "A folder of one's own for all that trackers write."
    monkeypatch.chdir(tmp_path)
    for name in ('MLFLOW_RUN_ID', 'MLFLOW_EXPERIMENT_NAME', 'WANDB_PROJECT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in dict(
        WANDB_MODE='offline',
        WANDB_SILENT='true',
        WANDB_DATA_DIR=str(tmp_path / 'staged'),
        WANDB_CACHE_DIR=str(tmp_path / 'cache'),
        MLFLOW_ALLOW_FILE_STORE='true',
    ).items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/runs.db')
    yield tmp_path
    mlflow.end_run()
    wandb.teardown() # it would go on in this folder

def only_run(): # of MLflow
    client = mlflow.MlflowClient()
    run, = client.search_runs([client.get_experiment_by_name('capnb').experiment_id])
    return client, run

def history(client, run, key):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]

def records(folder):
    "The records of an offline run of Weights & Biases; its file is a LevelDB log of their protocol buffers."
    wandb.teardown() # only then all of it is on the disk
    path, = Path(folder).glob('*.wandb')
    data, at, part = path.read_bytes(), 7, b''
    assert data[:4] == b':W&B'
    while at+7 <= len(data):
        if 32768-at%32768 < 7:
            at += 32768-at%32768
            continue # no header fits into the rest of a block
        _, size, kind = struct.unpack_from('<IHB', data, at)
        part, at = part+data[at+7:at+7+size], at+7+size
        if kind in (1, 4):
            yield Record.FromString(part)
            part = b'' # whole, or the last part

def rows(folder): # of its history: {key: value} by step
    return {
        r.history.step.num: {
            i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in r.history.item
        }
        for r in records(folder)
        if r.HasField('history')
    }

class Failing(Callback):
    def __init__(self, step, do):
        self.step, self.do = step, do
    def on_step_end(self, run):
        if len(run.losses) == self.step:
            self.do()

def power_cut():
    raise RuntimeError('power cut')

# --- MLflow

def artifacts_of(files):
    "The names of all that is stored of a run of eight steps, with these checkpoints."
    samples = [f'samples/step-{step:06}.{kind}' for step in (4, 8) for kind in ('png', 'json')]
    weights = [f.name for f in files]
    metadata = [w.replace('model_state_dict', 'training_metadata').replace('.pth', '.json') for w in weights]
    return {*samples, *(f'checkpoints/{name}' for name in weights + metadata)}

@pytest.mark.parametrize('store', ['sqlite:///{}/runs.db', 'file:{}/runs'])
def test_mlflow_has_it_all(album, place, store):
    mlflow.set_tracking_uri(store.format(place))
    train_command(
        ['--data', album, '--report_to', 'mlflow', *(str(w) for k, v in SMALL.items() for w in (f'--{k}', v))]
    )
    files = sorted((place/'saved_models').glob('model_state_dict_*.pth'))
    metadata = [read_metadata(f) for f in files]
    client, run = only_run()
    assert run.info.status == 'FINISHED' and len(metadata) == 2
    loss = history(client, run, 'loss')
    assert [s for s, _ in loss] == list(range(1, 9)) and [v for _, v in loss] == pytest.approx(
        metadata[1]['losses'], abs=1e-4
    )
    for key in SCORES:
        assert history(client, run, key) == [(4, metadata[0][key]), (8, metadata[1][key])], key
    assert history(client, run, 'test/rouge_l') == [(8, metadata[1]['test']['rouge_l'])]
    assert run.data.params == {k: str(v) for k,v in metadata[1]['hyperparameters'].items() if v is not None}
    names = {
        f.path
        for folder in ('samples', 'checkpoints')
        for f in client.list_artifacts(run.info.run_id, folder)
    }
    assert names == artifacts_of(files)
    stored = lambda name: Path(client.download_artifacts(run.info.run_id, name, str(place)))
    for f in files:
        assert stored(f'checkpoints/{f.name}').read_bytes() == f.read_bytes()
    model = entry.prepare(
        entry.as_hyperparameters(metadata[1]['hyperparameters']), only=('train', 'validation')
    )
    shown = json.loads(stored('samples/step-000008.json').read_text(encoding='utf-8'))
    assert [s['references'] for s in shown] == [r['captions'] for r in model[2]['validation'].rows] and all(
        isinstance(s['caption'], str) for s in shown
    )
    assert stored('samples/step-000008.png').read_bytes()[:4] == b'\x89PNG'

def test_mlflow_goes_on_without_doubling(album, place):
    "A run that loses its power in the second step after its last state, and does both again."
    same_rates = dict(SMALL, lr_scheduler_type='step') # in a longer run, too
    with pytest.raises(RuntimeError, match='power cut'):
        cut = [Failing(6, power_cut)]
        train(same_rates, data=album, report_to='mlflow', checkpoint_steps=3, callbacks=cut)
    client, run = only_run()
    # the tracker comes after the callback that fails
    assert run.info.status == 'FAILED' and [s for s,_ in history(client, run, 'loss')] == [1, 2, 3, 4, 5]
    result = train(resume=True, num_epochs=3)
    client, run = only_run()
    assert run.info.status == 'FINISHED'
    assert [s for s,_ in history(client, run, 'loss')] == list(range(1, 13))
    assert [v for _,v in history(client, run, 'loss')] == pytest.approx(result.metadata['losses'], abs=1e-4)
    for key in SCORES:
        assert [s for s,_ in history(client, run, key)] == [4, 8, 12], key

def test_a_failure_of_mlflow_is_loud(album, place, capsys):
    def lose_table():
        with sqlite3.connect(place/'runs.db') as db:
            db.execute('DROP TABLE metrics')
    with pytest.raises(OSError, match=r'tracker mlflow: .*train\(resume='):
        train(SMALL, data=album, report_to='mlflow', callbacks=[Failing(2, lose_table)])
    assert not mlflow.active_run() # the next run of this process is not mixed up with it

# --- Weights & Biases

def test_wandb_has_it_all(album, place):
    result = train(SMALL, data=album, report_to='wandb')
    folder, = (place/'wandb').glob('offline-run-*')
    told, found = rows(folder), list(records(folder))
    assert [told[s]['loss'] for s in range(1, 9)] == pytest.approx(
        result.metadata['losses'], abs=1e-4
    ) and set(told) == set(range(1, 9))
    for key in SCORES:
        assert (
            told[8][key] == pytest.approx(result.metadata[key]) and key in told[4] and key not in told[7]
        ), key
    assert told[8]['test/rouge_l'] == pytest.approx(result.metadata['test']['rouge_l'])
    config = {
        u.key or '/'.join(u.nested_key): json.loads(u.value_json)
        for r in found
        if r.HasField('config')
        for u in r.config.update
    }
    assert {k: config[k] for k in SMALL} == SMALL
    table = json.loads((folder/'files'/told[8]['samples/path']).read_text(encoding='utf-8'))
    assert table['columns'] == ['image_id', 'image', 'caption', 'references'] and len(table['data']) == 4
    artifacts = [r.artifact for r in found if r.HasField('artifact')]
    shown = [e for a in artifacts if a.type == 'run_table' for e in a.manifest.contents]
    assert sum(e.path.endswith('.png') for e in shown) == 8 and all(
        Path(e.local_path).stat().st_size for e in shown
    )
    kept = {
        e.path: Path(e.local_path).read_bytes()
        for a in artifacts
        if a.type == 'checkpoints'
        for e in a.manifest.contents
    }
    assert kept[result.checkpoint.name] == result.checkpoint.read_bytes() and len(kept) == 4
    assert [r.exit.exit_code for r in found if r.HasField('exit')] == [0]

def test_large_images_are_reduced_for_wandb(monkeypatch):
    "It writes each as a PNG, after every epoch."
    sent, tracker = [], SimpleNamespace(name='wandb', log_table=lambda *args, **how: None)
    monkeypatch.setattr(wandb, 'Image', sent.append)
    images = [Image.new('RGB', size) for size in ((4000, 3000), (300, 4000), (64, 64))]
    shown = [dict(image_id=str(i), captions=['A cat.']) for i in range(3)]
    trackers._captioned(tracker, shown, images, ['A cat.']*3, 4)
    assert [image.size for image in sent]==[(512, 384), (38, 512), (64, 64)]

def test_wandb_goes_on_under_its_id(album, place):
    with pytest.raises(RuntimeError, match='power cut'):
        train(SMALL, data=album, report_to='wandb', checkpoint_steps=3, callbacks=[Failing(6, power_cut)])
    first, = (place/'wandb').glob('offline-run-*')
    train(resume=True)
    second, = set((place/'wandb').glob('offline-run-*')) - {first}
    assert first.name.rsplit('-', 1)[1] == second.name.rsplit('-', 1)[1] # the same id
    # the last state was that of step 4
    assert sorted(rows(first)) == [1, 2, 3, 4, 5] and sorted(rows(second)) == [5, 6, 7, 8]
    assert [r.exit.exit_code for r in records(first) if r.HasField('exit')] == [1]
    assert rows(first)[5]['loss'] == rows(second)[5]['loss']

LOSE_SERVICE = """
import psutil, sys
from capnb.run.entry import train
from capnb.training import Callback
class Lose(Callback):
    def on_step_end(self, run):
        for p in psutil.Process().children(recursive=True)*(len(run.losses)==2):
            if 'wandb-core' in p.name(): p.kill()
try:
    train(
        num_epochs=2, adapter_width=32, batch_size=8, max_caption_length=12, data=sys.argv[1],
        report_to='wandb', callbacks=[Lose()],
    )
except OSError as e:
    print('told:', e)
"""

def test_a_failure_of_wandb_is_loud(album, place, environment):
    "Its own process is gone in the middle of a run."
    (place/'lose.py').write_text(LOSE_SERVICE, encoding='utf-8')
    with ForkedScript(place/'lose.py', [album], place, environment()) as process:
        out, err = process.communicate(timeout=120)
    assert 'told: tracker wandb: ' in out and 'train(resume=' in out, err[-2000:]

# --- Before anything begins

@pytest.mark.parametrize(
    'report_to, available, word',
    [
        ('paper', ['mlflow'], "tracker 'paper' is not known"),
        ('mlflow', [], "pip install 'capnb[mlflow]'"),
        ('mlflow,wandb', ['mlflow'], "pip install 'capnb[wandb]'"),
    ],
)
def test_a_tracker_that_is_not_there(monkeypatch, album, report_to, available, word):
    monkeypatch.setattr(trackers, 'get_available_trackers', lambda: available)
    monkeypatch.setattr(entry, 'prepare', lambda *a: pytest.fail('data was loaded'))
    with pytest.raises(ValueError) as error:
        train(SMALL, data=album, report_to=report_to)
    assert word in str(error.value)

def test_nothing_is_told_to_nobody(album, place):
    train(SMALL, data=album)
    assert {p.name for p in place.iterdir()} <= {'saved_models', 'runs.db'}

def test_mlflow_is_asked_once_what_it_knows(album, place, monkeypatch):
    "And not at each step: its answer is as long as the run."
    asked, was = [], trackers._told
    monkeypatch.setattr(trackers, '_told', lambda tracker, key: asked.append(key) or was(tracker, key))
    train(SMALL, data=album, report_to='mlflow')
    assert 'loss' in asked and len(asked)==len(set(asked))

def test_trials_of_a_sweep_are_runs_of_a_tracker(album, place):
    settings = dict(SMALL, num_epochs=1, report_to='mlflow', output_dir='sweep')
    study = sweep(settings, vary=['learning_rate=1e-3,1e-2'], data=album)
    assert [trial.state.name for trial in study.trials]==['COMPLETE']*2
    client = mlflow.MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name('capnb').experiment_id])
    assert {float(run.data.params['learning_rate']) for run in runs}=={1e-3, 1e-2}
    assert all(len(history(client, run, 'loss'))==4 for run in runs)

def test_losses_that_arrive_together_are_sent_together(place, monkeypatch):
    "MLflow takes a thousand at once; those that it has are not sent again."
    mlflow.set_tracking_uri(f'file:{place}/runs')
    mlflow.set_experiment('capnb')
    sent, send = [], mlflow.MlflowClient.log_batch
    def noted(client, run_id, metrics=(), *args, **kwargs):
        sent.append(len(metrics))
        return send(client, run_id, metrics, *args, **kwargs)
    monkeypatch.setattr(mlflow.MlflowClient, 'log_batch', noted)
    tracker = SimpleNamespace(name='mlflow', tracker=mlflow.start_run(), log=mlflow.log_metrics)
    losses = [1/step for step in range(1, 1511)]
    run = SimpleNamespace(accelerator=SimpleNamespace(trackers=[tracker]), losses=losses, fetched=1500)
    teller = trackers.Tracker({})
    teller.told = 0
    teller.on_step_end(run)
    teller.on_step_end(run) # nothing is new
    assert sent==[1000, 500]
    again = trackers.Tracker({}) # of a run that goes on from an earlier state
    again.told, run.fetched = 1490, 1510
    again.on_step_end(run)
    assert sent==[1000, 500, 10] and history(*only_run(), 'loss')==list(enumerate(losses, 1))

# --- What is told again, and what is not

class Noted(trackers.Tracker):
    "Note the steps whose losses would be logged."
    steps = []
    def _open(self, run, settings=None):
        self.opened = dict(self.ids)
        self.ids = dict(mlflow=run.stamp)

    def _each(self, run, tell):
        tell(SimpleNamespace(name='notes', log=lambda values, step: self.steps.append(step)))

    def on_epoch_end(self, run):
        "Nothing more."

    def on_close(self, run):
        "Nothing to close."

def noted(folder, images, callbacks, state=None):
    "Train for one epoch."
    h = as_hyperparameters(SMALL, num_epochs=1, evaluation_enabled=False, output_dir=str(folder))
    model = build_captioner(h, 'cpu')
    rows = [dict(captions=['A cat.'], image_id=str(i)) for i in range(images)]
    data = dict(train=EncodedData(torch.ones(images, model.encoder.width), rows))
    run_training(model, data, h, callbacks, state)

class LateStop(Callback):
    "Ask to stop after the third step; losses after the first stay on the device until then, as on a GPU."
    def on_step_end(self, run):
        run.fetch_every = 1e9
        if len(run.losses)==3:
            ask_to_stop(run)

def test_no_step_is_missing_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'on_gpu', lambda model: True) # static steps, here on a CPU
    monkeypatch.setattr(Noted, 'steps', [])
    with pytest.raises(Interrupted):
        noted(tmp_path, 40, [Noted({}), LateStop()])
    noted(tmp_path, 40, [Noted({})], read_state(find_state(tmp_path)))
    assert Noted.steps==[1, 2, 3, 4, 5]

def test_a_tracker_of_an_earlier_run_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(Noted, 'steps', [])
    tracker = Noted({})
    for name in ('a', 'b'):
        noted(tmp_path/name, 16, [tracker])
        assert tracker.opened=={}
    assert Noted.steps==[1, 2, 1, 2]

def test_a_run_of_the_user_is_left_alone(album, place):
    "MLflow refuses a second run in the process; the first one goes on."
    mlflow.set_experiment('mine')
    mine = mlflow.start_run()
    with pytest.raises(Exception, match='already active'):
        train(SMALL, data=album, report_to='mlflow')
    assert mlflow.active_run().info.run_id==mine.info.run_id

def test_each_run_has_its_folder_in_tensorboard(tmp_path):
    "TensorBoard draws all that is in one folder as one curve."
    seen = []
    for stamp in ('20260101_120000', '20260101_120001'):
        place = SimpleNamespace(logging_dir=str(tmp_path))
        accelerator = SimpleNamespace(log_with=['tensorboard'], trackers=[], project_configuration=place)
        accelerator.init_trackers = lambda *args, place=place: seen.append(place.logging_dir)
        h = as_hyperparameters(output_dir=str(tmp_path))
        trackers.Tracker({})._open(SimpleNamespace(accelerator=accelerator, h=h, stamp=stamp))
    assert len(set(seen))==2
