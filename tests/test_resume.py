"""A long run that is stopped, at whatever moment, goes on to the same weights, bit for bit; and what disk,
neighbours and strangers do to it is told in one line."""
import itertools, json, math, os, random, re, resource, shlex, signal, subprocess, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from capnb.optimizer import make_optimizer
from capnb.saving import load_model_from_checkpoint
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.entry import train
from capnb.run.commands import train_command
from capnb.storybook import Storybook
from capnb.run.resume import _set_schedule, find_state, random_state, read_state, set_random_state
from forks import fork, write_to

slow = pytest.mark.skipif(not os.environ.get('CAPNB_SLOW'), reason='set CAPNB_SLOW=1')
# Three epochs of six steps each, with scores, a training state after every second step, and checkpoints that
# are removed.
SMALL = dict(
    batch_size=4,
    num_epochs=3,
    checkpoint_steps=2,
    keep_checkpoints=2,
    adapter_width=32,
    lr_scheduler_type='step', # a longer run then has the same rates
    prefix_length=2,
    max_caption_length=8,
)

def test_random_numbers_of_another_gpu_are_kept(monkeypatch):
    "A model on the second GPU draws from its generator, not from that of the current one."
    kept, place = {}, torch.device('cuda:1')
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda device='cuda': f'state of {device}')
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, at='cuda': kept.update({at: state}))
    set_random_state(random_state(place), place)
    assert kept=={place: 'state of cuda:1'}

@pytest.mark.parametrize('first, then', [('mps', 'cuda'), ('cuda', 'mps'), ('mps', 'cpu')])
def test_random_numbers_of_another_kind_of_device_are_left(monkeypatch, first, then):
    put = []
    for kind in ('cuda', 'mps'):
        read = lambda *at, kind=kind: f'state of {kind}'
        write = lambda state, *at, kind=kind: put.append((kind, state))
        monkeypatch.setattr(f'torch.{kind}.get_rng_state', read)
        monkeypatch.setattr(f'torch.{kind}.set_rng_state', write)
    state = random_state(torch.device(first))
    drawn = torch.rand(3)
    set_random_state(state, torch.device(then))
    assert put==[] and torch.equal(torch.rand(3), drawn)
    set_random_state(state, torch.device(first))
    assert put==[(first, f'state of {first}')]

def test_a_copy_is_not_the_newest_run(tmp_path):
    (tmp_path/'training_state_20260101_120000.pt').touch()
    (tmp_path/'training_state_backup.pt').touch()
    assert find_state(tmp_path).name=='training_state_20260101_120000.pt'

# --- Processes

def flags(settings):
    return [str(word) for k,v in settings.items() for word in (f'--{k}', v)]

def command(cwd, args, die_at, limit):
    "What a process does: `capnb_train` in the folder `cwd`, with its output in a file `log` there."
    signal.signal(signal.SIGINT, signal.default_int_handler) # a runner in the background has both ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(cwd)
    write_to(os.open('log', os.O_WRONLY|os.O_CREAT|os.O_APPEND))
    if die_at:
        die(*die_at)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train_command(args)

def die(number, when):
    """Have this process killed `when` ('before' or 'after') it puts a file in its place, or removes one, for
    the `number`th time."""
    done = [0]
    def deadly(change):
        def changed(*args, **kwargs):
            done[0] += 1
            if done[0]==number and when=='before':
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                change(*args, **kwargs)
            finally:
                if done[0]==number:
                    os.kill(os.getpid(), signal.SIGKILL)
        return changed
    os.replace, os.unlink = deadly(os.replace), deadly(os.unlink)

def begin(cwd, *args, die_at=None, limit=None):
    cwd.mkdir(exist_ok=True)
    return fork(command, cwd, [str(a) for a in args], die_at, limit)

def ended(process, code=0):
    process.join(300)
    assert process.exitcode==code, process.exitcode

def said(cwd):
    return [line for line in re.split('[\r\n]+', (cwd/'log').read_text(encoding='utf-8')) if line.strip()]

# --- What is compared

def outcome(folder):
    """All that a run leaves: weights and metadata (but for times and the way to its data) by name, without
    the time of its start; and the names of all its files, halves of files too."""
    name = lambda p: re.sub(r'\d{8}_\d{6}', 'TIME', p.name)
    weights = {name(p): torch.load(p, weights_only=True) for p in folder.glob('*.pth')}
    notes = {
        name(p): {k: v for k,v in json.loads(p.read_text(encoding='utf-8')).items()
                  if k not in ('seconds', 'places')}
        for p in folder.glob('*.json')
    }
    stamp = find_state(folder).name[15:30]
    return (
        weights,
        notes,
        sorted(
            name(p)
            for p in folder.iterdir()
            if not p.name.startswith('.') or stamp in p.name and p.suffix != '.lock'
        ),
    )

def same(a, b):
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys() and a[0]
    for file in a[0]:
        assert a[0][file].keys() == b[0][file].keys()
        for tensor in a[0][file]:
            assert torch.equal(a[0][file][tensor], b[0][file][tensor]), (file, tensor)

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Images with captions: 24 to learn from, three for validation, three for the end."
    folder, book = tmp_path_factory.mktemp('album'), Storybook(n=30)
    for i in range(30):
        book[i]['image'].save(folder/f'{i}.png')
    (folder / 'captions.csv').write_text(
        'file_name,caption\n' + '\n'.join(f'{i}.png,"{c}"' for i in range(30) for c in book.captions(i)[:2]),
        encoding='utf-8',
    )
    return folder

@pytest.fixture(scope='module')
def args(album): return flags(SMALL | dict(data=album))

@pytest.fixture(scope='module')
def through(args, tmp_path_factory):
    "What a run without a stop leaves, and the seconds it takes."
    folder = tmp_path_factory.mktemp('through')
    ended(begin(folder, '--help')) # the server has imported all after this one
    start = time.perf_counter()
    ended(begin(folder, *args))
    return outcome(folder/'saved_models'), time.perf_counter()-start

def again(cwd, args, **how):
    "Go on in the folder `cwd`, or begin if nothing is there to go on with."
    return begin(cwd, *(['--resume'] if list(cwd.glob('saved_models/training_state_*')) else args), **how)

def check_whole(folder):
    "Whatever bears its own name is whole."
    for path in folder.glob('*.pth'):
        assert torch.load(path, weights_only=True)
    for path in folder.glob('*.json'):
        assert json.loads(path.read_text(encoding='utf-8'))['hyperparameters']
    for path in folder.glob('training_state_*'):
        assert read_state(path)

# --- Killed

def has_ended(cwd):
    "Whether the run has saved that it has ended; the kill may have come after that."
    return (
        bool(list(cwd.glob('saved_models/training_state_*')))
        and read_state(find_state(cwd / 'saved_models'))['position']['done']
    )

def killed_at_random(cwd, args, through, kills, chance):
    """Kill so often, at moments drawn by chance from a whole run's time; a run that ended is begun anew
    elsewhere."""
    expected, seconds = through
    folders = (cwd/str(i) for i in itertools.count())
    n, folder = 0, next(folders)
    while n < kills:
        process = again(folder, args)
        process.join(chance.uniform(0, seconds))
        if process.exitcode is None:
            n += 1
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), said(folder)[-1]
        if (folder/'saved_models').exists():
            check_whole(folder/'saved_models')
        if has_ended(folder):
            same(outcome(folder/'saved_models'), expected)
            folder = next(folders)
    if not has_ended(folder):
        ended(again(folder, args))
    same(outcome(folder/'saved_models'), expected)

def test_kill_at_random(args, through, tmp_path):
    killed_at_random(tmp_path, args, through, 3, random.Random(1))

@slow
def test_kill_at_random_often(args, through, tmp_path):
    killed_at_random(tmp_path, args, through, 40, random.Random(2))

def killed_at_write(cwd, args, through, number, when):
    process = begin(cwd, *args, die_at=(number, when))
    process.join(300)
    if process.exitcode==0: return False
    assert process.exitcode==-signal.SIGKILL
    if (cwd/'saved_models').exists():
        check_whole(cwd/'saved_models')
    if not has_ended(cwd):
        ended(again(cwd, args))
    same(outcome(cwd/'saved_models'), through[0])
    return True

@pytest.mark.parametrize('number,when', [(6, 'before'), (11, 'after')])
def test_kill_between_two_writes(args, through, tmp_path, number, when):
    assert killed_at_write(tmp_path, args, through, number, when)

@slow
@pytest.mark.parametrize('when', ['before', 'after'])
def test_kill_between_any_two_writes(args, through, tmp_path, when):
    number = 1
    while killed_at_write(tmp_path/str(number), args, through, number, when):
        number += 1
    assert number > 28 # a run of three epochs writes and removes so often

@slow
@pytest.mark.parametrize(
    'more',
    [
        dict(unfreeze_layers=1),
        dict(lora_rank=2),
        dict(features='patch'),
        dict(micro_batch_size=3),
        dict(mixed_precision='bf16', evaluation_enabled=False),
    ],
    ids=str,
)
@pytest.mark.parametrize('number', [5, 12])
def test_what_else_learns(args, tmp_path, more, number):
    "In the first epoch and in the second, in which the last layer unfreezes."
    args = [*args, *flags(more), '--num_epochs', '2']
    ended(begin(tmp_path/'through', *args))
    assert killed_at_write(
        tmp_path / 'killed', args, (outcome(tmp_path / 'through' / 'saved_models'), 0), number, 'after'
    )

# --- Asked to stop

def position(cwd):
    "Steps that the newest run in `cwd` has saved."
    try:
        return len(read_state(find_state(cwd/'saved_models'))['position']['losses'])
    except FileNotFoundError:
        return -1

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal(args, through, tmp_path, number):
    endless = [*args, '--num_epochs', '1000']
    process = begin(tmp_path, *endless)
    while position(tmp_path) < 3:
        assert process.exitcode is None
        time.sleep(.01)
    os.kill(process.pid, number)
    ended(process, 128+number)
    told = re.fullmatch(
        r'train: stopped after step (\d+); go on with: (capnb_train --resume .*)', said(tmp_path)[-1]
    )
    assert int(told[1]) == position(tmp_path)
    begun = -(-int(told[1])//6)
    if begun > 3:
        pytest.skip('this machine trained on before the signal came')
    ended(begin(tmp_path, *shlex.split(told[2])[1:], '--num_epochs', 3))
    same(outcome(tmp_path/'saved_models'), through[0])

@slow
def test_ctrl_c_in_a_shell(start, args, through, tmp_path):
    "The console command itself, in a process that imports for itself."
    with start('capnb_train', *args, '--num_epochs', 1000, cwd=tmp_path, fresh=True) as process:
        try:
            while position(tmp_path) < 1:
                assert process.poll() is None, process.stderr.read()[-3000:]
                time.sleep(.01)
            process.send_signal(signal.SIGINT)
            err = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode==130
    line = err.splitlines()[-1]
    assert line.startswith('train: stopped after step') and 'Traceback' not in err
    ended(
        begin(
            tmp_path,
            *shlex.split(line.split('go on with: ')[1])[1:],
            '--num_epochs',
            max(3, -(-position(tmp_path) // 6))
        )
    )
    if position(tmp_path)==18:
        same(outcome(tmp_path/'saved_models'), through[0])

# --- What may change

def test_longer(args, through, tmp_path):
    "A run that has ended goes on to what a longer one would have been."
    ended(begin(tmp_path, *args, '--num_epochs', 2))
    ended(begin(tmp_path, '--resume', '--num_epochs', 3))
    found, expected = outcome(tmp_path/'saved_models'), through[0]
    for notes in (found[1], expected[1]):
        assert notes['training_metadata_TIME-3.json']['epoch']==3
    # epoch 2 was an end once, and says so
    last = lambda run: (run[0], {k: v for k,v in run[1].items() if '-3' in k}, run[2])
    same(last(found), last(expected))

def test_a_longer_cosine_is_told(args, tmp_path):
    "It ends later, so its rate at the old end is not zero."
    cosine = [*args, '--lr_scheduler_type', 'cosine']
    ended(begin(tmp_path, *cosine, '--num_epochs', 1))
    # the decay is the one that was saved, but asks for the other schedule
    ended(begin(tmp_path, '--resume', '--num_epochs', 2, '--learning_rate_decay', .9), 1)
    assert 'lr_scheduler_type cannot change when a run goes on' in said(tmp_path)[-1]
    ended(begin(tmp_path, '--resume', '--num_epochs', 2))
    log = (tmp_path/'log').read_text()
    assert 'ℹ️ the cosine of the learning rate now spans 2 epochs instead of 1 epochs' in log
    notes = sorted((tmp_path/'saved_models').glob('training_metadata_*-2.json'))
    last = json.loads(notes[0].read_text())['learning_rate']
    assert last == pytest.approx(3e-3*(.5+.5*math.cos(math.pi*11/12))) # of the twelfth step of twelve

@pytest.mark.parametrize(
    'first,then', [(4, 10), *[pytest.param(*steps, marks=slow) for steps in ((6, 10), (4, 18), (10, 11))]]
)
def test_more_steps(args, through, tmp_path, first, then):
    """A run that max_steps ended, within an epoch of six steps or at its end, goes on to what one with more
    steps would have been."""
    ended(begin(tmp_path/'parts', *args, '--max_steps', first))
    ended(begin(tmp_path/'parts', '--resume'), 1)
    assert (
        f'has ended after {first} steps (max_steps); to go on, ask for a larger max_steps'
        in said(tmp_path / 'parts')[-1]
    )
    ended(begin(tmp_path/'parts', '--resume', '--max_steps', first-1), 1)
    assert f'max_steps is {first-1}, but the run of' in said(tmp_path/'parts')[-1]
    goes_on_like_one_run(args, tmp_path, first, then)

def goes_on_like_one_run(args, tmp_path, first, then):
    ended(begin(tmp_path/'parts', '--resume', '--max_steps', then))
    ended(begin(tmp_path/'whole', *args, '--max_steps', then))
    parts, whole = outcome(tmp_path/'parts'/'saved_models'), outcome(tmp_path/'whole'/'saved_models')
    for run in (parts, whole):
        if first%6==0:
            del run[1][f'training_metadata_TIME-{first//6}.json'] # an epoch that was an end once says so
        for notes in run[1].values():
            del notes['hyperparameters']['max_steps'] # what was asked for when it ended
    same(parts, whole)

def test_more_steps_after_a_kill_at_the_end(args, tmp_path):
    "Between the state of the last step, within an epoch, and the checkpoint that closes the epoch."
    ended(begin(tmp_path/'parts', *args, '--max_steps', 4, die_at=(4, 'before')), -signal.SIGKILL)
    assert position(tmp_path/'parts')==4 and not list(tmp_path.rglob('model_state_dict_*'))
    ended(begin(tmp_path/'parts', '--resume'))
    goes_on_like_one_run(args, tmp_path, 4, 10)

def test_max_steps_of_the_steps_made(args, tmp_path):
    """A run that lost its power within an epoch is closed where it stands, and later trains the rest of the
    epoch."""
    ended(begin(tmp_path/'parts', *args, die_at=(4, 'before')), -signal.SIGKILL)
    assert position(tmp_path/'parts')==4
    ended(begin(tmp_path/'parts', '--resume', '--max_steps', 4))
    goes_on_like_one_run(args, tmp_path, 4, 10)

def test_a_longer_cosine_has_the_rate_of_the_longer_one_at_once():
    weights = torch.nn.Parameter(torch.ones(2))
    groups = dict(adapter=dict(w=weights))
    short, long, whole = (make_optimizer(groups, 3e-3, cosine_steps=n) for n in (3, 8, 8))
    for _ in range(3):
        for optimizer,scheduler in (short, whole):
            optimizer.step()
            scheduler.step()
    assert short[0].param_groups[0]['lr'] == 0
    long[0].load_state_dict(short[0].state_dict())
    _set_schedule(SimpleNamespace(optimizer=long[0], scheduler=long[1]), 3, [0.])
    assert long[0].param_groups[0]['lr'] == whole[0].param_groups[0]['lr'] > 0

def test_more_steps_after_the_last_epoch(args, tmp_path):
    """The message names both settings, where both are needed; and a kill right after the new beginning
    changes nothing."""
    ended(begin(tmp_path, *args, '--num_epochs', 1, '--max_steps', 6))
    ended(begin(tmp_path, '--resume'), 1)
    assert 'to go on, ask for a larger max_steps and num_epochs' in said(tmp_path)[-1]
    ended(begin(tmp_path, '--resume', '--max_steps', 8), 1)
    assert said(tmp_path)[-1].endswith('has ended after 1 epochs; to go on, ask for a larger num_epochs')
    ended(
        begin(tmp_path, '--resume', '--max_steps', 8, '--num_epochs', 2, die_at=(1, 'after')), -signal.SIGKILL
    )
    ended(begin(tmp_path, '--resume'))
    assert position(tmp_path)==8

def test_what_cannot_change_is_named(album, tmp_path):
    folder = str(tmp_path/'saved')
    rows = [dict(image=image, caption='A cat.') for image in (Storybook()[i]['image'] for i in range(16))]
    quick = dict(SMALL, num_epochs=1, evaluation_enabled=False, output_dir=folder)
    train(quick, data=rows)
    again = lambda **asked: train(resume=True, output_dir=folder, **asked)
    for key, value in dict(batch_size=2, seed=5, adapter_width=16, mixed_precision='bf16').items():
        with pytest.raises(ValueError, match=f'^{key} cannot change when a run goes on: it began with'):
            again(num_epochs=2, **{key: value})
    with pytest.raises(ValueError, match='pass it again'):
        again(num_epochs=2)
    for data in (rows[:15], str(album)):
        with pytest.raises(ValueError, match='the data of this run were others'):
            again(num_epochs=2, data=data)
    with pytest.raises(ValueError, match='has ended after 1 epochs'):
        again(data=rows)
    assert again(num_epochs=2, data=rows).metadata['epoch']==2
    with pytest.raises(ValueError, match='num_epochs is 1, but the run of .* has begun its epoch 2'):
        again(num_epochs=1, data=rows)

# --- The disk

def mount(*args):
    "Mount, where this user may."
    if os.geteuid() or subprocess.run(['mount', *map(str, args)], capture_output=True).returncode:
        pytest.skip('mounting is refused here')

@pytest.fixture
def unmount():
    places = []
    yield places.append
    for place in places:
        subprocess.run(['umount', '-l', place], check=True)

def test_full_disk(args, tmp_path, unmount):
    "Of a small disk: what was saved is whole, and with more room the run goes on."
    disk = tmp_path/'disk'
    disk.mkdir()
    mount('-t', 'tmpfs', '-o', 'size=900k', 'tmpfs', disk)
    unmount(disk)
    more = [
        *args,
        '--num_epochs',
        '3',
        '--keep_checkpoints',
        '3',
        '--evaluation_enabled',
        'false',
        '--checkpoint_steps',
        '6',
    ]
    ended(begin(tmp_path, *more, '--output_dir', 'disk'), 1)
    line, state = said(tmp_path)[-1], find_state(disk)
    assert re.fullmatch(
        r"train: \[Errno 28\] No space left on device: 'disk/\S+'; when that is put right, go on with:"
        r" capnb_train --resume disk/training_state_\d{8}_\d{6}\.pt",
        line,
    )
    check_whole(disk)
    assert not list(disk.glob('.*.part')) and load_model_from_checkpoint(newest_checkpoint(disk))
    mount('-o', 'remount,size=40m', disk)
    ended(begin(tmp_path, '--resume', state))
    ended(begin(tmp_path/'roomy', *more, '--output_dir', 'disk'))
    weights, notes, names = outcome(disk)
    for n in notes.values():
        n['hyperparameters']['output_dir'] = 'disk'
    same((weights, notes, names), outcome(tmp_path/'roomy'/'disk'))

def test_file_too_large(args, tmp_path):
    "The same by a limit on the size of files, which needs no rights."
    ended(begin(tmp_path, *args, limit=100_000), 1)
    assert re.fullmatch(
        r"train: \[Errno 27\] File too large: 'saved_models/training_state_\d{8}_\d{6}\.pt'",
        said(tmp_path)[-1],
    )
    assert not list((tmp_path/'saved_models').iterdir())

def test_read_only(args, through, tmp_path, unmount):
    ended(begin(tmp_path, *args, '--num_epochs', 2))
    folder = tmp_path/'saved_models'
    before = outcome(folder)
    if os.geteuid():
        folder.chmod(0o500)
    else:
        mount('--bind', folder, folder)
        unmount(folder)
        mount('-o', 'remount,ro,bind', folder)
    for how in (args, ['--resume', '--num_epochs', 3]):
        ended(begin(tmp_path, *how), 1)
        assert re.fullmatch(
            r"train: \[Errno \d+\] (Read-only file system|Permission denied): 'saved_models'",
            said(tmp_path)[-1],
        )
    if os.geteuid():
        folder.chmod(0o700)
    same(outcome(folder), before)

# --- Neighbours

def test_runs_at_the_same_time(args, through, tmp_path):
    "Three that start in the same second, in one folder."
    for process in [begin(tmp_path, *args, '--output_dir', tmp_path/'saved_models') for _ in range(3)]:
        ended(process)
    stamps = {p.name[15:30] for p in (tmp_path/'saved_models').glob('training_state_*')}
    assert len(stamps)==3
    for stamp in stamps:
        (tmp_path/stamp).mkdir()
        for path in (tmp_path/'saved_models').glob(f'*_{stamp}*'):
            path.rename(tmp_path/stamp/path.name)
        weights, notes, names = outcome(tmp_path/stamp)
        for n in notes.values():
            n['hyperparameters']['output_dir'] = 'saved_models'
        same((weights, notes, names), through[0])

def test_a_run_that_is_going_on(args, tmp_path):
    "Nobody else may go on with it, until it is gone, even by a kill."
    process = begin(tmp_path, *args, '--num_epochs', 1000)
    while position(tmp_path) < 1:
        assert process.exitcode is None
        time.sleep(.01)
    other = tmp_path/'other'
    ended(begin(other, '--resume', tmp_path/'saved_models'), 1)
    assert 'is still going on in another process' in said(other)[-1]
    process.kill()
    process.join()
    n = position(tmp_path)
    ended(begin(other, '--resume', tmp_path/'saved_models', '--num_epochs', n//6+1))
    assert position(tmp_path)==6*(n//6+1)

# --- Strangers

class Hostile:
    "A pickle that makes a file when it is opened."
    def __init__(self, file):
        self.file = file
    def __reduce__(self): return (Path.touch, (self.file,))

def test_state_from_a_stranger(args, tmp_path):
    ended(begin(tmp_path, *args, '--num_epochs', 1))
    path = find_state(tmp_path/'saved_models')
    good, checkpoint = path.read_bytes(), newest_checkpoint(tmp_path/'saved_models').read_bytes()
    for content in (
        dict(read_state(path), path=None, weights=Hostile(tmp_path / 'it-ran')),
        good[:-700],
        good[:300],
        b'',
        b'no state',
        checkpoint,
    ):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        before = path.read_bytes()
        ended(begin(tmp_path, '--resume', '--num_epochs', 2), 1)
        assert re.fullmatch(rf'train: saved_models/{path.name} is not .*', said(tmp_path)[-1])
        assert (
            path.read_bytes() == before
            and newest_checkpoint(tmp_path / 'saved_models').read_bytes() == checkpoint
        )
    assert not (tmp_path/'it-ran').exists()
