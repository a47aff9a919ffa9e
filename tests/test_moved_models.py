"""A model named by a relative folder is found again: from another working directory, and where it moved with
the checkpoint."""
import json, shutil
import pytest
from PIL import Image
from capnb.saving import load_model_from_checkpoint
from capnb.checkpoint import read_metadata
from capnb.hub import model_path
from capnb.run.resume import read_state

SETTINGS = [
    '--encoder_name',
    'models/clip',
    '--tokenizer_name',
    'models/qwen',
    '--max_steps',
    1,
    '--training_size_limit',
    4,
    '--batch_size',
    2,
    '--evaluation_enabled',
    'False',
]

@pytest.fixture(scope='module')
def trained(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp('project')
    shutil.copytree(model_path('storybook-clip'), folder/'models/clip')
    shutil.copytree(model_path('storybook-qwen3'), folder/'models/qwen')
    done = call('capnb_train', *SETTINGS, '--output_dir', 'runs/first', cwd=folder)
    assert done.returncode == 0, done.stderr
    Image.new('RGB', (64, 64), 'red').save(folder/'red.png')
    return folder

@pytest.fixture
def project(trained, tmp_path): return shutil.copytree(trained, tmp_path/'moved')

def weights(folder): return next((folder/'runs/first').glob('model_state_dict_*.pth'))

def test_from_another_working_directory(trained, call, tmp_path):
    done = call('capnb_caption', trained/'red.png', '--checkpoint', weights(trained), cwd=tmp_path)
    assert done.returncode == 0 and 'red.png: ' in done.stdout, done.stderr

def test_moved_together(project, trained, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hidden = trained.rename(trained.with_name('elsewhere')) # nothing is left where it was trained
    try:
        _, metadata, h = load_model_from_checkpoint(weights(project), 'cpu')
        assert (h.encoder_name, h.tokenizer_name) == (str(project/'models/clip'), str(project/'models/qwen'))
        done = call('capnb_train', '--resume', project/'runs/first', '--max_steps', 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        hidden.rename(trained)

def test_where_it_was_trained_the_name_stays_as_it_was_given(trained, monkeypatch):
    monkeypatch.chdir(trained)
    assert read_metadata(weights(trained))['hyperparameters']['encoder_name'] == 'models/clip'
    assert (
        read_state(next((trained / 'runs/first').glob('training_state_*.pt')))['hyperparameters'][
            'tokenizer_name'
        ]
        == 'models/qwen'
    )

def test_the_run_goes_on_from_another_working_directory(project, call, tmp_path):
    done = call('capnb_train', '--resume', project/'runs/first', '--max_steps', 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

def test_another_model_in_its_place_is_refused(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from safetensors.torch import load_file, save_file
    file = project/'models/qwen/model.safetensors'
    save_file({name: t+1 for name, t in load_file(file).items()}, file, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='trained with other frozen weights'):
        load_model_from_checkpoint(weights(project), 'cpu')

def test_no_path_of_this_machine_is_written_or_shared(trained, call, tmp_path):
    text = next((trained/'runs/first').glob('training_metadata_*.json')).read_text()
    assert (
        json.loads(text)['places']
        == dict(encoder_name='../../models/clip', tokenizer_name='../../models/qwen')
        and str(trained) not in text
    )
    done = call('capnb_share', tmp_path/'shared', '--checkpoint', weights(trained), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ('config.json', 'training_metadata.json', 'README.md'):
        shared = (tmp_path/'shared'/name).read_text()
        assert str(trained) not in shared and '../' not in shared and 'places' not in shared

@pytest.mark.parametrize(
    'places', [7, [], dict(encoder_name=7), dict(encoder_name='nowhere'), dict(encoder_name='\x00')]
)
def test_places_that_are_none(places, project, monkeypatch):
    monkeypatch.chdir(project)
    path = next((project/'runs/first').glob('training_metadata_*.json'))
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(places=places)))
    assert read_metadata(weights(project))['hyperparameters']['encoder_name'] == 'models/clip'
