"""A model named by a relative folder, and data in one, are found again: from another working directory, and
where they moved with the checkpoint."""
import json, shutil
import pytest
from PIL import Image
from capnb.saving import load_model_from_checkpoint
from capnb.checkpoint import find_models, read_metadata
from capnb.hub import model_path
from capnb.run.checkpoints import model_places
from capnb.run.resume import find_state, read_state
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook

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

# --- Data

SPLITS = ['train']*8 + ['validation']*2 + ['test']*2

@pytest.fixture(scope='module')
def begun(call, tmp_path_factory):
    "The folder of a run that has made one step, and of its images."
    folder, book = tmp_path_factory.mktemp('with_data'), Storybook(n=len(SPLITS))
    (folder/'photos').mkdir()
    rows = ['file_name,caption,split']
    for i,split in enumerate(SPLITS):
        book[i]['image'].save(folder/'photos'/f'{i}.png')
        rows.append(f'{i}.png,"{book.captions(i)[0]}",{split}')
    (folder/'photos/captions.csv').write_text('\n'.join(rows), encoding='utf-8')
    size = ('--batch_size', 2, '--adapter_width', 32, '--prefix_length', 2, '--max_caption_length', 8)
    done = call('capnb_train', '--data', 'photos', '--output_dir', 'run', '--max_steps', 1, *size, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder

@pytest.fixture
def with_data(begun, tmp_path): return shutil.copytree(begun, tmp_path/'with_data')

def test_data_is_found_from_another_working_directory(with_data, begun, call, tmp_path):
    "Other images have the same name there."
    (tmp_path/'photos').mkdir()
    hidden = begun.rename(begun.with_name('elsewhere')) # nothing is left where it was trained
    try:
        done = call('capnb_train', '--resume', with_data/'run', '--max_steps', 2, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert read_state(find_state(with_data/'run'))['hyperparameters']['data'] == str(with_data/'photos')
        done = call('capnb_eval', '--folder', with_data/'run', '--json_file', 'scores.json', cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path/'scores.json').exists()
    finally:
        hidden.rename(begun)

def test_data_may_be_in_another_place(with_data, call):
    go_on = ('capnb_train', '--output_dir', 'run', '--resume', '--max_steps')
    done = call(*go_on, 2, '--data', 'photos/', cwd=with_data)
    assert done.returncode == 0, done.stderr
    (with_data/'photos').rename(with_data/'renamed')
    done = call(*go_on, 3, '--data', 'renamed', cwd=with_data)
    assert done.returncode == 0, done.stderr
    table = with_data/'renamed/captions.csv'
    table.write_text(table.read_text(encoding='utf-8').replace('0.png,"', '0.png,"Again: '), encoding='utf-8')
    done = call(*go_on, 4, '--data', 'renamed', cwd=with_data)
    assert done.returncode == 1 and 'the data of this run were others' in done.stderr
    assert 'start a new run with init_from' in done.stderr

def test_data_that_comes_with_a_name_has_no_place(trained, monkeypatch):
    "A folder of that name is not what was trained on."
    monkeypatch.chdir(trained)
    (trained/'storybook').mkdir()
    try:
        assert 'data' not in model_places(as_hyperparameters(), trained/'runs/first')
    finally:
        (trained/'storybook').rmdir()

def test_a_copied_checkpoint_keeps_the_data_that_is_there(tmp_path):
    "Data has no fingerprint, so a folder that happens to be at the same relative place does not count."
    for name in ('one', 'other'):
        (tmp_path/name/'data').mkdir(parents=True)
        (tmp_path/name/'runs').mkdir()
    h = as_hyperparameters(data=str(tmp_path/'one/data'), output_dir=str(tmp_path/'one/runs'))
    places = model_places(h, h.output_dir)
    assert find_models({**h}, places, tmp_path/'other/runs')['data']==h.data
    (tmp_path/'one').rename(tmp_path/'moved')
    assert find_models({**h}, places, tmp_path/'moved/runs')['data']==str(tmp_path/'moved/data')

def test_checkpoints_within_the_data_have_no_place_for_it(tmp_path):
    h = as_hyperparameters(data=str(tmp_path), output_dir=str(tmp_path/'saved_models'))
    assert model_places(h, h.output_dir)=={}
