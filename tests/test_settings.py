"""Settings from Python: a mapping as the dictionary of old scripts was, numbers and paths of whatever
library, plain data in what is written; and locks, paths and folders of other systems."""
import errno, json, os, pickle, subprocess, sys
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
import numpy as np, pytest, torch
from filelock import FileLock
from huggingface_hub import utils
from capnb.settings import Hyperparameters, PRESETS, as_hyperparameters
from capnb.files import check_writable, free_lock, shell_line, write_json
from capnb.hardware import memory_in_use
from capnb.log import quiet
from capnb.encoder import load_encoder
from capnb.fast.cache import encode_data
from capnb.run.sources.load import load_data
from capnb.run.signals import acquire_run_lock

H = Hyperparameters()
NAMES = [f.name for f in fields(Hyperparameters)]

# --- What scripts for the dictionary do

USES = {
    'item': lambda h: h['batch_size'] == 8,
    'get': lambda h: h.get('batch_size') == 8,
    'get what is not there': lambda h: h.get('batch_sise') is None and h.get('batch_sise', 7) == 7,
    'in': lambda h: 'batch_size' in h and 'batch_sise' not in h and 'items' not in h,
    'dict': lambda h: dict(h) == asdict(h),
    'stars': lambda h: dict(**h) == asdict(h),
    'merge': lambda h: as_hyperparameters({**h, 'batch_size': 4}, None)['batch_size'] == 4,
    'items': lambda h: list(h.items()) == list(asdict(h).items()),
    'keys': lambda h: list(h.keys()) == NAMES,
    'values': lambda h: list(h.values()) == list(asdict(h).values()),
    'len': lambda h: len(h) == len(NAMES),
    'loop': lambda h: [k for k in h] == NAMES,
    'copy': lambda h: type(h.copy()) is dict and h.copy() == asdict(h),
    'JSON': lambda h: json.loads(json.dumps({**h})) == asdict(h),
    'truth': bool,
    'kind': lambda h: isinstance(h, Mapping),
    'equality': (
        lambda h: h == Hyperparameters() and h != replace(h, seed=1) and len({h, Hyperparameters()}) == 1
    ),
    'pickle': lambda h: pickle.loads(pickle.dumps(h)) == h,
    'unpacking in a call': lambda h: (lambda batch_size, **others: batch_size)(**h) == 8,
}

@pytest.mark.parametrize('use', USES)
def test_works_as_a_dictionary(use):
    assert USES[use](H)

def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    "YAML reads it as False."
    (tmp_path/'my.yaml').write_text('mixed_precision: no\n')
    assert as_hyperparameters(tmp_path/'my.yaml').mixed_precision=='no'
    with pytest.raises(ValueError, match='mixed_precision is True'):
        as_hyperparameters(mixed_precision=True)
    with pytest.raises(ValueError, match='features is False'):
        as_hyperparameters(features=False)

def test_a_name_that_is_not_known():
    with pytest.raises(KeyError, match="there is no hyperparameter 'batch_sise'"):
        H['batch_sise']

def assign(h):
    h['batch_size'] = 4
def delete(h):
    del h['batch_size']
def join(h):
    h |= dict(batch_size=4)

@pytest.mark.parametrize(
    'change',
    [
        assign,
        delete,
        join,
        lambda h: h.update(batch_size=4),
        lambda h: h.setdefault('batch_size', 4),
        lambda h: h.pop('batch_size'),
        lambda h: h.clear(),
    ],
)
def test_a_change_says_what_to_do_instead(change):
    with pytest.raises(TypeError, match=r'dataclasses.replace\(h, batch_size=4\).* train\(h, batch_size=4\)'):
        change(H)
    assert H == Hyperparameters()

def test_attributes_do_not_change():
    with pytest.raises(FrozenInstanceError, match=r'train\(h, batch_size=4\)'):
        H.batch_size = 4
    with pytest.raises(FrozenInstanceError, match='do not change'):
        del H.batch_size
    assert H == Hyperparameters()

# --- Numbers and paths of other libraries

PLAIN = {
    'NumPy whole': ('batch_size', np.int64(4), 4),
    'NumPy small': ('batch_size', np.uint8(4), 4),
    'NumPy float': ('learning_rate', np.float32(0.5), 0.5),
    'NumPy float for a whole number': ('batch_size', np.float64(8.0), 8),
    'NumPy bool': ('evaluation_enabled', np.bool_(False), False),
    'NumPy text': ('bad_rows', np.str_('skip'), 'skip'),
    'NumPy array of no axis': ('batch_size', np.array(4), 4),
    'PyTorch': ('batch_size', torch.tensor(4), 4),
    'float for a whole number': ('num_epochs', 8.0, 8),
    'whole number for a float': ('learning_rate', 1, 1),
    'Path': ('data', Path('holiday') / 'album', os.path.join('holiday', 'album')),
    'None': ('max_steps', None, None),
}

@pytest.mark.parametrize('case', PLAIN)
def test_is_kept_as_plain_data(case):
    name, given, kept = PLAIN[case]
    found = Hyperparameters(**{name: given})[name]
    assert (type(found), found) == (type(kept), kept)
    assert json.loads(json.dumps(asdict(Hyperparameters(**{name: given}))))[name] == kept

WRONG = {
    'half a number': ('batch_size', 8.5),
    'no number': ('batch_size', np.float64('nan')),
    'NumPy bool for a number': ('batch_size', np.bool_(True)),
    'bool for a number': ('batch_size', True),
    'too small': ('batch_size', np.int64(0)),
    'several': ('batch_size', np.array([4])),
    'Path for a number': ('batch_size', Path('4')),
    'text for a number': ('learning_rate', '1e-4'),
    'infinite': ('learning_rate', np.float64('inf')),
    'bytes for a path': ('data', b'holiday'),
    'a number for a bool': ('evaluation_enabled', np.int64(1)),
    'a seed too large for NumPy': ('seed', 2**32),
    'a date and a time as a seed': ('seed', 20261127135500),
    'no text for a path': ('output_dir', ''),
    'no text for a path that may be left out': ('init_from', ''),
    'no text for a model': ('decoder_name', ''),
}

def test_the_largest_seed_is_one_of_numpy():
    np.random.RandomState(Hyperparameters(seed=2**32-1).seed)
    with pytest.raises(ValueError, match='seed is 4294967296; allowed: .* and up to 4294967295$'):
        Hyperparameters(seed=2**32)

@pytest.mark.parametrize('case', WRONG)
def test_what_is_not_allowed(case):
    name, given = WRONG[case]
    with pytest.raises(ValueError, match=f'^{name} is .*; allowed: '):
        Hyperparameters(**{name: given})

def test_an_empty_path_is_told_as_a_text_that_is_empty():
    with pytest.raises(ValueError, match='allowed: a text that is not empty$'):
        Hyperparameters(output_dir='')
    with pytest.raises(ValueError, match='allowed: a text or null$'):
        Hyperparameters(encoding=3)

def test_paths_in_settings_files(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'mine.yaml').write_text('batch_size: 4.0\noutput_dir: ~/runs\nlearning_rate: 1e-3\n')
    h = as_hyperparameters('~/mine.yaml')
    assert (h.batch_size, type(h.batch_size), h.output_dir, h.learning_rate) == (
        4,
        int,
        str(tmp_path / 'runs'),
        0.001,
    )
    assert as_hyperparameters(Path('~')/'mine.yaml') == h

def test_texts_that_look_like_numbers_stay_texts(tmp_path):
    (tmp_path/'mine.yaml').write_text('data_revision: "12e4567"\nlearning_rate: 2e-3\n')
    h = as_hyperparameters(tmp_path/'mine.yaml')
    assert (h.data_revision, h.learning_rate) == ('12e4567', .002)
    (tmp_path/'mine.json').write_text('{"learning_rate": "2e-3"}')
    with pytest.raises(ValueError, match="learning_rate is '2e-3'; allowed: a number above 0"):
        as_hyperparameters(tmp_path/'mine.json')

def test_presets_are_plain():
    for name in PRESETS:
        assert asdict(as_hyperparameters(preset=name)) | PRESETS[name] == asdict(
            as_hyperparameters(preset=name)
        )

# --- Where nothing can be written

def test_nothing_is_left_where_it_was_tried(tmp_path):
    check_writable(tmp_path/'a'/'b')
    check_writable(tmp_path/'a'/'b.json', file=True)
    assert not list(tmp_path.iterdir())

def refused(tmp_path):
    """Places at which nothing can be written: within a file, over a folder, and in a folder of the system
    that takes no files."""
    (tmp_path/'file').write_text('no folder')
    (tmp_path/'folder').mkdir()
    return [
        (tmp_path / 'file', False),
        (tmp_path / 'file' / 'deeper' / 'still', False),
        (tmp_path / 'file' / 'x.json', True),
        (tmp_path / 'folder', True),
    ] + [(Path('/proc/capnb'), False)] * Path('/proc').exists()

def test_it_is_named(tmp_path):
    for path,file in refused(tmp_path):
        with pytest.raises(OSError, match=str(path)) as told:
            check_writable(path, file)
        assert told.value.errno in (
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENOENT,
            errno.EACCES,
            errno.EROFS,
            errno.EPERM,
            errno.EEXIST,
        ), path
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'folder']

def test_features_that_cannot_be_kept_are_told_before_an_image_is_encoded(tmp_path, monkeypatch):
    "A folder that has all of them already need not be writable."
    encoder, data = load_encoder('storybook-clip', 'cpu'), load_data('storybook', limit=8)['train']
    encode_data(encoder, data, folder=tmp_path/'features')
    def stop(*args):
        raise AssertionError('encoded')
    monkeypatch.setattr(type(encoder), 'forward', stop)
    (tmp_path/'file').write_text('no folder')
    with pytest.raises(OSError, match='file'):
        encode_data(encoder, data, folder=tmp_path/'file')
    monkeypatch.setattr('capnb.fast.cache.check_writable', stop)
    assert len(encode_data(encoder, data, folder=tmp_path/'features')) == 8

# --- Other systems

class Watched(FileLock):
    "A lock that notes whether its file is there when it is released."
    def release(self, *args, **kwargs):
        if self.is_locked:
            self.file_was_there = Path(self.lock_file).exists()
        super().release(*args, **kwargs)

@pytest.mark.parametrize('system,there', [('linux', False), ('darwin', False), ('win32', True)])
def test_lock_is_released_before_windows_removes_its_file(tmp_path, monkeypatch, system, there):
    """And elsewhere removed while it is held, or another process could take the lock of a file that is about
    to go."""
    lock = Watched(tmp_path/'.lock')
    lock.acquire()
    monkeypatch.setattr(sys, 'platform', system)
    free_lock(lock)
    assert lock.file_was_there == there and not lock.is_locked

def test_all_locks_are_freed_that_way():
    "No other place removes the file of a lock."
    for path in (Path(__file__).resolve().parent.parent/'capnb').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        assert text.count('lock_file') == (path.name == 'files.py'), path

def test_a_run_that_ended_can_be_claimed_again(tmp_path):
    with acquire_run_lock(tmp_path) as stamp:
        pass
    with acquire_run_lock(tmp_path, stamp) as again:
        assert again == stamp
    assert not list(tmp_path.iterdir())

def test_a_command_for_the_shell(monkeypatch):
    words = ['capnb_train', '--resume', r'C:\my models\state.pt']
    assert shell_line(words) == r"capnb_train --resume 'C:\my models\state.pt'"
    monkeypatch.setattr(sys, 'platform', 'win32')
    assert shell_line(words) == r'capnb_train --resume "C:\my models\state.pt"'

def test_nothing_that_one_system_has_only():
    """Where `/proc`, timers, `fork` and `fcntl` are used, the code looks first whether they are there; these
    it does not use at all."""
    for path in (Path(__file__).resolve().parent.parent/'capnb').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        for word in ("'/tmp", 'os.fork(', 'SIGKILL', 'os.getuid', '\nimport fcntl'):
            assert word not in text, (path.name, word)

# --- What no file may replace

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with names')
def test_a_device_a_pipe_and_a_link_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path/'pipe.json')
    for place in (tmp_path/'pipe.json', Path('/dev/null')):
        with pytest.raises(OSError, match=place.name):
            check_writable(place, file=True)
    with pytest.raises(OSError, match='pipe.json'):
        write_json(tmp_path/'pipe.json', 1)
    assert (tmp_path/'pipe.json').is_fifo()
    (tmp_path/'other').mkdir()
    (tmp_path/'link.json').symlink_to('other/real.json')
    check_writable(tmp_path/'link.json', file=True)
    for _ in range(2):
        write_json(tmp_path/'link.json', 1)
        assert (tmp_path/'link.json').is_symlink() and (tmp_path/'other'/'real.json').read_text()=='1\n'

@pytest.mark.skipif(os.name!='posix', reason='this system has no umask')
@pytest.mark.parametrize('mask, rights', [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_holds(tmp_path, mask, rights):
    before = os.umask(mask)
    try:
        write_json(tmp_path/'a.json', 1)
    finally:
        os.umask(before)
    assert (tmp_path/'a.json').stat().st_mode & 0o777 == rights

@pytest.mark.parametrize('text', ['1: 2', 'on: true', '2020-01-01: 3'])
def test_a_key_that_is_no_text_is_named(tmp_path, text):
    (tmp_path/'s.yaml').write_text(text)
    with pytest.raises(ValueError, match='hyperparameter .* is not known; there is batch_size'):
        as_hyperparameters(tmp_path/'s.yaml')

def test_the_memory_of_the_best_device():
    assert memory_in_use(None) > 0

@pytest.fixture
def hub_bars():
    "The hub draws its bars, whatever was said before."
    hidden = utils.are_progress_bars_disabled()
    utils.enable_progress_bars()
    yield
    if hidden:
        utils.disable_progress_bars()

def test_quiet_hides_the_bars_of_a_hub_that_is_imported(hub_bars):
    with quiet():
        assert utils.are_progress_bars_disabled()
    assert not utils.are_progress_bars_disabled()

def test_the_environment_decides_on_bars_unless_they_are_turned_off(environment):
    code = (
        'from capnb.log import progress_bar, quiet\n'
        'bar = lambda **how: progress_bar(range(3), **how).disable\n'
        'with quiet(): off = bar()\n'
        'print(bar(), bar(disable=True), off)'
    )
    for there in ({}, dict(TQDM_DISABLE='1')):
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, env=environment(**there), capture_output=True, text=True)
        assert done.stdout.split()==[str(bool(there)), 'True', 'True'], done.stderr
