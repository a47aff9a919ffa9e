"A training that is killed, whatever it is writing just then, leaves only whole files under their names."
import json, os, shutil, signal, time
import pytest, torch
from PIL import Image
from capnb.saving import load_model_from_checkpoint
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.entry import train
from capnb.storybook import Storybook
from capnb.run.resume import read_state

# An epoch is one step, and the weights are large enough that writing them takes a while.
ENDLESS = dict(
    training_size_limit=4,
    batch_size=4,
    num_epochs=100_000,
    evaluation_enabled=False,
    adapter_width=2048,
    max_caption_length=8,
)
MOMENTS = { # what is seen in the folder, under its own name or a temporary one, when the kill comes
    'first state': ('training_state_', '.part'),
    'first weights': ('model_state_dict_', '-1.pth'),
    'first metadata': ('training_metadata_', '-1.json'),
    'first curve': ('loss_curve_', '.png'),
    'second weights': ('model_state_dict_', '-2.pth'),
    'third metadata': ('training_metadata_', '-3.json')}

@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
    "The checkpoint of a training that ended well."
    settings = ENDLESS | dict(num_epochs=1, adapter_width=16)
    return train(settings, output_dir=str(tmp_path_factory.mktemp('earlier'))).checkpoint

@pytest.fixture
def folder(earlier, tmp_path):
    "A folder of checkpoints in which a training has ended well long ago."
    for path in (
        earlier,
        earlier.with_name(earlier.name.replace('model_state_dict', 'training_metadata')).with_suffix('.json'),
    ):
        prefix = path.name[:-len('20300101_000000-1') - len(path.suffix)]
        shutil.copy(path, tmp_path/f'{prefix}20200101_000000-1{path.suffix}')
    return tmp_path

def kill_at(process, folder, words):
    """Kill a process as soon as a file that is not from 2020 and whose name holds all `words` is in the
    folder."""
    while not any(all(w in name for w in words) and '_2020' not in name for name in os.listdir(folder)):
        assert process.poll() is None, (
            'the training ended before it could be killed: ' + process.stderr.read()[-3000:]
        )
        time.sleep(.0002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL

def killed(start, folder, moment):
    args = [word for k,v in ENDLESS.items() for word in (f'--{k}', v)]
    with start('capnb_train', *args, '--output_dir', folder, cwd=folder) as process:
        try:
            kill_at(process, folder, MOMENTS[moment])
        finally:
            process.kill()

def check_files(folder):
    "Every file that has its own name, and not a temporary one, is whole."
    for path in folder.glob('model_state_dict_*.pth'):
        assert torch.load(path, weights_only=True), path
    for path in folder.glob('training_metadata_*.json'):
        assert json.loads(path.read_text(encoding='utf-8'))['hyperparameters'], path
    for path in folder.glob('training_state_*.pt'):
        assert read_state(path)['position']['losses'] is not None, path
    for path in folder.glob('loss_curve_*.png'):
        Image.open(path).load()
    others = [
        p.name
        for p in folder.iterdir()
        if not p.name.startswith(
            ('model_state_dict_', 'training_metadata_', 'training_state_', 'loss_curve_', '.')
        )
    ]
    assert not others

def with_metadata(folder):
    return [
        p
        for p in folder.glob('model_state_dict_*.pth')
        if (folder / p.name.replace('model_state_dict', 'training_metadata')).with_suffix('.json').exists()
    ]

@pytest.mark.parametrize('moment', MOMENTS)
def test_kill(start, call, folder, earlier, moment, tmp_path_factory):
    killed(start, folder, moment)
    check_files(folder)
    complete = with_metadata(folder)
    for path in complete:
        load_model_from_checkpoint(path)
    newest = newest_checkpoint(folder)
    assert newest in complete
    # `-2.pth` is only begun when the first epoch is saved, `-3.json` when the second is.
    least = {'second weights': 1, 'third metadata': 2}.get(moment, 0)
    assert read_metadata(newest)['epoch'] >= max(1, least) and len(complete) >= 1 + least
    if moment in ('first weights', 'third metadata'):
        caption_with(call, folder, tmp_path_factory.mktemp('picture'), newest)

def caption_with(call, checkpoints, here, newest):
    "The console command goes on with what is there."
    image = Storybook('test')[0]['image']
    image.save(here/'page.png')
    done = call('capnb_caption', 'page.png', '--folder', checkpoints, cwd=here)
    assert (done.returncode, done.stdout) == (
        0,
        f'page.png: {load_model_from_checkpoint(newest)[0].caption(image)}\n',
    ), done.stderr[-3000:]
