"Checkpoints and training states that lie: one line each, before memory is taken for what they promise."
import json, shutil
import pytest, torch
from capnb.saving import load_model_from_checkpoint
from capnb.run.resume import read_state

resource = pytest.importorskip('resource') # not on Windows

@pytest.fixture(scope='module')
def trained(call, tmp_path_factory):
    "Folders with a checkpoint and a training state of one step."
    folder = tmp_path_factory.mktemp('trained')
    settings = [
        '--max_steps',
        1,
        '--training_size_limit',
        4,
        '--batch_size',
        2,
        '--evaluation_enabled',
        'False',
    ]
    for name, more in (('plain', []), ('lora', ['--lora_rank', 2]),
                       ('standardized', ['--standardize_features', 'True'])):
        done = call('capnb_train', *settings, *more, '--output_dir', name, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder

@pytest.fixture
def copy(trained, tmp_path):
    def copy(name='plain'):
        shutil.copytree(trained/name, tmp_path/name)
        return tmp_path/name
    return copy

def only(folder, pattern): return next(folder.glob(pattern))

def rewrite(path, change):
    "Change a file of tensors as a stranger could, by pickle."
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path)

def settings(folder, **hyperparameters):
    path = only(folder, 'training_metadata_*.json')
    metadata = json.loads(path.read_text())
    metadata['hyperparameters'] |= hyperparameters
    path.write_text(json.dumps(metadata))

def first(state): return next(iter(state))
def with_first(make):
    return lambda state: state | {first(state): make(state[first(state)])}
WEIGHTS = {
    'integer keys': (lambda state: {**state, 7: state[first(state)]}, '7 is not a plain'),
    'only integer keys': (lambda state: dict(enumerate(state.values())), '0 is not a plain'),
    'meta tensors': (with_first(lambda t: t.to('meta')), 'has a shape, but not its numbers'),
    'one number for a terabyte': (
        with_first(lambda t: torch.zeros(1).expand(2**20, 2**20)),
        'has a shape, but not its numbers',
    ),
    'NaN': (with_first(lambda t: t * float('nan')), 'holds what is no number'),
    'infinity': (with_first(lambda t: t + float('inf')), 'holds what is no number'),
    'no tensors': (lambda state: {}, 'adapter.layers.1.weight is missing'),
    'an adapter without sides': (
        lambda state: state | {'adapter.layers.1.weight': torch.zeros(())},
        'is missing',
    ),
    'whole numbers': (with_first(lambda t: t.long()), 'not a plain floating-point tensor'),
}

def refused(done, text):
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and text in done.stderr, done.stderr[-1500:]

@pytest.mark.parametrize('what', WEIGHTS)
def test_weights_that_lie(what, copy):
    change, text = WEIGHTS[what]
    path = only(copy(), 'model_state_dict_*.pth')
    rewrite(path, change)
    with pytest.raises(ValueError, match=text):
        load_model_from_checkpoint(path, 'cpu')

@pytest.mark.parametrize('what', WEIGHTS)
def test_a_training_state_that_lies(what, copy, call):
    change, text = WEIGHTS[what]
    folder = copy()
    rewrite(only(folder, 'training_state_*.pt'), lambda state: state | dict(weights=change(state['weights'])))
    refused(call('capnb_train', '--resume', folder, '--max_steps', 2, cwd=folder), text)

@pytest.mark.parametrize(
    'name, hyperparameters, text',
    [
        ('plain', dict(adapter_width=10**9), 'adapter_width is 1,000,000,000'),
        ('plain', dict(prefix_length=10**9), 'prefix_length is 1,000,000,000'),
        ('plain', dict(lora_rank=10**6), 'lora_rank is 1,000,000'),
        ('lora', dict(lora_rank=10**6), "lora_rank is 1,000,000, the weights' is 2"),
        ('lora', dict(lora_rank=None), "lora_rank is none, the weights' is 2"),
        ('plain', dict(features='patch'), 'adapter.linear_1.weight is missing'),
    ],
)
def test_hyperparameters_that_lie(name, hyperparameters, text, copy):
    folder = copy(name)
    settings(folder, **hyperparameters)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=text):
        load_model_from_checkpoint(only(folder, 'model_state_dict_*.pth'), 'cpu')
    # kB: no memory for what does not fit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before < 2**18

@pytest.mark.parametrize(
    'hyperparameters, text',
    [
        (dict(adapter_width=10**9), 'adapter_width is 1,000,000,000'),
        (dict(lora_rank=10**6), 'lora_rank is 1,000,000'),
    ],
)
def test_a_training_state_with_such_hyperparameters(hyperparameters, text, copy, call):
    folder = copy()
    rewrite(
        only(folder, 'training_state_*.pt'),
        lambda state: state | dict(hyperparameters=state['hyperparameters'] | hyperparameters),
    )
    refused(call('capnb_train', '--resume', folder, '--max_steps', 2, cwd=folder), text)

@pytest.mark.parametrize(
    'flag, value, text',
    [
        ('--adapter_width', 10**9, 'make an adapter of'),
        ('--prefix_length', 10**6, 'more than the'),
        ('--lora_rank', 10**6, 'the decoder is only'),
    ],
)
def test_a_run_that_no_memory_holds_is_refused_before_it_begins(flag, value, text, call, tmp_path):
    refused(call('capnb_train', flag, value, cwd=tmp_path), text)

def test_metadata_that_never_ends(copy):
    folder = copy()
    path = only(folder, 'training_metadata_*.json')
    with open(path, 'w') as f:
        f.write('{"a": "')
        f.truncate(2**36) # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match='training_metadata.* is not the metadata of a checkpoint'):
        load_model_from_checkpoint(only(folder, 'model_state_dict_*.pth'), 'cpu')
    path.write_text('['*10**6)
    with pytest.raises(ValueError, match='training_metadata.* is not the metadata of a checkpoint'):
        load_model_from_checkpoint(only(folder, 'model_state_dict_*.pth'), 'cpu')

def test_a_whole_checkpoint_still_loads(copy):
    for name in ('plain', 'lora'):
        folder = copy(name)
        load_model_from_checkpoint(only(folder, 'model_state_dict_*.pth'), 'cpu')
        read_state(only(folder, 'training_state_*.pt'))

@pytest.mark.parametrize('name', ['position', 'metadata', 'scheduler', 'random', 'callbacks', 'rates'])
def test_a_cut_epoch_that_lacks_a_part_is_refused(name, copy):
    "What a run goes back to if it gets more steps in an epoch that `max_steps` cut."
    def without(state):
        cut = {k: state[k] for k in ('position', 'metadata', 'scheduler', 'random', 'callbacks')}
        cut['rates'] = []
        return state | dict(cut={k: v for k,v in cut.items() if k!=name})
    path = only(copy(), 'training_state_*.pt')
    rewrite(path, without)
    with pytest.raises(ValueError, match=f'{path.name} is not the state .*: cut: {name} is missing'):
        read_state(path)

@pytest.mark.parametrize('part', ['micro_batch_size', 'buffers'])
def test_a_state_with_a_text_for_a_part(part, copy):
    path = only(copy(), 'training_state_*.pt')
    rewrite(path, lambda state: state | {part: 'two'})
    with pytest.raises(ValueError, match=f'{part} is missing or of another kind'):
        read_state(path)

@pytest.mark.parametrize('wrong', [{}, {7: 1}, {'adapter.mean': torch.ones(2)}], ids=str)
def test_buffers_that_lie(wrong, copy, call):
    folder = copy('standardized')
    rewrite(only(folder, 'training_state_*.pt'), lambda state: state | dict(buffers=wrong))
    done = call('capnb_train', '--resume', folder, '--max_steps', 2, cwd=folder) # after a bar of the encoding
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and 'does not fit this run' in last, done.stderr[-1500:]
