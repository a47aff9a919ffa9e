"""Sweeps: what may vary, trials that share models, a study that survives, and a winner whose command line is
true."""
import contextlib, io, json, re, shlex, shutil, signal, sys, time, weakref
import pytest, torch
from PIL import Image
from capnb.run import studies, sweeps, training
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.commands import train_command
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from capnb.run.sweeps import TrialRunner, sweep
from capnb.run.studies import best_settings, command_line, open_study, read_vary, take_trial, trial_folder
from capnb.run.sweep_command import sweep_command

SMALL = dict(num_epochs=1, adapter_width=32, prefix_length=2, max_caption_length=12, batch_size=8)
GRID = ['learning_rate=1e-3,1e-2', 'batch_size=4,8']

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "A folder with 40 images: 32 to learn from, 4 for validation, 4 for testing."
    folder, book = tmp_path_factory.mktemp('album'), Storybook(n=40)
    for i in range(40):
        book[i]['image'].save(folder/f'{i}.png')
    rows = [f'{i}.png,"{caption}"' for i in range(40) for caption in book.captions(i)[:2]]
    (folder/'captions.csv').write_text('file_name,caption\n' + '\n'.join(rows), encoding='utf-8')
    return str(folder)

@pytest.fixture
def settings(album, tmp_path):
    return dict(SMALL, data=album, output_dir=str(tmp_path/'sweep'))

def flags(settings):
    return [str(word) for k,v in settings.items() for word in (f'--{k}', v)]
def states(study): return [t.state.name for t in study.trials]

# --- What may vary

WRONG = {
    'unknown name': (['--vary', 'batchsize=1,2'], "'batchsize' is not known"),
    'no value': (['--vary', 'batch_size='], 'say what it may be'),
    'no equals sign': (['--vary', 'batch_size'], 'say what it may be'),
    'a word for a number': (['--vary', 'batch_size=8,many'], "batch_size is 'many'"),
    'a fraction for a whole number': (['--vary', 'batch_size=1.5,2'], "batch_size is '1.5'"),
    'a value that is not allowed': (['--vary', 'learning_rate=0,1'], 'learning_rate is 0.0'),
    'neither yes nor no': (['--vary', 'learning_rate_scheduler_enabled=true,maybe'], "is 'maybe'"),
    'an unknown choice': (['--vary', 'features=pooled,words'], "features is 'words'"),
    'an empty range': (['--vary', 'learning_rate=1e-2:1e-3', '--sampler', 'tpe'], 'the range is empty'),
    'a range with three ends': (['--vary', 'learning_rate=1:2:3', '--sampler', 'tpe'], 'a range is'),
    'a range in a grid': (['--vary', 'learning_rate=log:1e-3:1e-2'], 'a grid needs values of learning_rate'),
    'twice the same': (['--vary', 'batch_size=4', '--vary', 'batch_size=8'], 'batch_size is there twice'),
    'a place that is no setting': (['--vary', 'output_dir=a,b'], "'output_dir' is not known"),
    'a limit for a grid': (['--trials', '3'], 'leave trials out'),
    'no trial': (['--trials', '-1', '--sampler', 'random'], 'trials is -1'),
    'nothing to go by': (['--evaluation_enabled', 'false'], 'set evaluation_enabled to true'),
    'an unknown preset': (['--preset', 'flickr'], "--preset: invalid choice: 'flickr'"),
    'a tracker nobody knows': (['--report_to', 'paper'], "tracker 'paper' is not known"),
}

@pytest.mark.parametrize('wrong', WRONG)
def test_a_mistake_is_one_line(wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, word = WRONG[wrong]
    with pytest.raises(SystemExit) as stopped:
        sweep_command(args)
    out, err = capsys.readouterr()
    assert (
        stopped.value.code == (2 if 'invalid choice' in word else 1)
        and out == ''
        and len(err.splitlines()) == 1
        and word in err
    )
    assert not list(tmp_path.iterdir()) # and nothing was begun

def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ValueError, match=re.escape("pip install 'capnb[sweep]'")):
        read_vary(['batch_size=4'])

# --- A grid

@pytest.fixture(scope='module')
def whole(album, tmp_path_factory):
    """A grid from the command line, in this process: its folder, what it printed, and how often models were
    loaded."""
    folder, loads, load = tmp_path_factory.mktemp('whole'), [], sweeps.prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sweeps, 'prepare', lambda *a, **k: loads.append(1) or load(*a, **k))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            sweep_command([*flags(dict(SMALL, data=album)), *(w for v in GRID for w in ('--vary', v))])
    return folder, out.getvalue(), len(loads)

def test_grid_tries_all_and_loads_once(whole, album):
    folder, _, loads = whole
    assert loads == 1
    study = open_study(folder/'sweep', as_hyperparameters(dict(SMALL, data=album)), read_vary(GRID))
    assert states(study) == ['COMPLETE']*4
    assert {(t.params['learning_rate'], t.params['batch_size']) for t in study.trials} == {
        (r, b) for r in (1e-3, 1e-2) for b in (4, 8)
    }
    for t in study.trials:
        metadata = read_metadata(newest_checkpoint(trial_folder(folder/'sweep', t.number)))
        assert (
            metadata['validation_loss'] == t.value
            and {k: metadata['hyperparameters'][k] for k in t.params} == t.params
        )
        assert list(trial_folder(folder/'sweep', t.number).glob('loss_curve_*.png'))

def test_what_a_sweep_leaves(whole):
    folder, out, _ = whole
    for name in studies.PLOTS:
        with Image.open(folder/'sweep'/f'{name}.png') as image:
            assert min(image.size) > 100 and len(image.convert('L').getcolors()) > 10
    table = [line.split() for line in out.splitlines() if re.match(r'\s+\d', line)]
    losses = [float(row[3]) for row in table]
    assert len(losses) == 4 and losses == sorted(losses)
    best = json.loads((folder/'sweep'/'best.json').read_text())
    assert [best['learning_rate'], best['batch_size']] == [float(table[0][1]), int(table[0][2])]
    assert not list((folder/'sweep').glob('.trial_*')) # no lock is left

def test_the_winner_is_what_its_command_line_trains(whole, monkeypatch):
    folder, out, _ = whole
    monkeypatch.chdir(folder)
    words = shlex.split(next(line for line in out.splitlines() if line.startswith('🏆')).removeprefix('🏆 '))
    assert words[0] == 'capnb_train'
    train_command(words[1:])
    best = min(
        json.loads(f.read_text())['validation_loss']
        for f in folder.glob('sweep/trial_*/training_metadata_*.json')
    )
    assert read_metadata(newest_checkpoint(folder/'saved_models'))['validation_loss'] == best

def test_what_is_finished_is_not_done_again(whole, album, monkeypatch):
    folder = whole[0]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sweeps, 'run_trial', lambda *a: pytest.fail('a trial was done again'))
    sweep_command([*flags(dict(SMALL, data=album)), *(w for v in GRID for w in ('--vary', v))])

def test_other_settings_are_refused(whole, album):
    with pytest.raises(ValueError, match='its adapter_width was 32, not 33'):
        open_study(
            whole[0] / 'sweep', as_hyperparameters(dict(SMALL, data=album, adapter_width=33)), read_vary(GRID)
        )
    with pytest.raises(ValueError, match='its vary was'):
        open_study(whole[0]/'sweep', as_hyperparameters(dict(SMALL, data=album)), read_vary(GRID[:1]))

# --- Trials

def test_a_hopeless_trial_is_stopped(settings):
    study = sweep(dict(settings, num_epochs=2), vary=['learning_rate=2e-2,1e-2,5e-3,1e-9'])
    assert states(study) == ['COMPLETE']*3 + ['PRUNED']
    assert [t.user_attrs['epochs'] for t in study.trials] == [2, 2, 2, 1]
    assert study.trials[3].value == study.trials[3].intermediate_values[1]

def test_a_failure_is_a_result(settings, monkeypatch):
    run_training = sweeps.run_training
    def failing(model, data, h, callbacks):
        if h.learning_rate == 1e-2: raise ValueError('the loss is nan at step 3')
        return run_training(model, data, h, callbacks)
    monkeypatch.setattr(sweeps, 'run_training', failing)
    study = sweep(settings, vary=['learning_rate=1e-3,1e-2,2e-3'])
    assert states(study) == ['COMPLETE', 'FAIL', 'COMPLETE']
    assert 'nan at step 3' in studies.sweep_table(study)
    # and it is not tried again
    assert states(sweep(settings, vary=['learning_rate=1e-3,1e-2,2e-3'])) == states(study)

def test_running_out_of_memory_fails_one_trial(settings, tmp_path, monkeypatch):
    run_training = sweeps.run_training
    def failing(model, data, h, callbacks):
        if h.learning_rate == 1e-2:
            raise torch.OutOfMemoryError('CUDA out of memory.\nTried 9 GiB')
        return run_training(model, data, h, callbacks)
    monkeypatch.setattr(sweeps, 'run_training', failing)
    study = sweep(settings, vary=['learning_rate=1e-3,1e-2,2e-3'])
    assert states(study) == ['COMPLETE', 'FAIL', 'COMPLETE']
    assert study.trials[1].user_attrs['error'] == 'CUDA out of memory. Tried 9 GiB'
    def faulty(*args):
        raise RuntimeError('a fault')
    monkeypatch.setattr(sweeps, 'run_training', faulty)
    with pytest.raises(RuntimeError, match='a fault'): # another error ends the sweep
        sweep(dict(settings, output_dir=str(tmp_path/'other')), vary=['learning_rate=1e-3'])

def test_a_mistake_in_the_data_is_no_result(album, settings, tmp_path):
    data, vary = tmp_path/'data', ['unfreeze_layers=99,0']
    shutil.copytree(album, data)
    (data/'3.png').rename(tmp_path/'3.png')
    with pytest.raises(ValueError, match='3.png'):
        sweep(dict(settings, data=str(data)), vary=vary)
    (tmp_path/'3.png').rename(data/'3.png')
    study = sweep(dict(settings, data=str(data)), vary=vary)
    assert sorted(states(study)) == ['COMPLETE', 'FAIL', 'FAIL'] # 99 was tried twice, and never fits

@pytest.mark.parametrize('vary', ['learning_rate=1e-3', 'features=pooled'])
def test_data_without_validation_is_no_result(settings, vary):
    data = dict(train=Storybook(n=16))
    with pytest.raises(ValueError, match="needs a split 'validation'"):
        sweep(settings, data=data, vary=[vary])
    study = sweep(settings, data=dict(data, validation=Storybook('validation', n=4)), vary=[vary])
    assert sorted(states(study)) == ['COMPLETE', 'FAIL']

def test_a_checkpoint_to_start_from_that_is_gone_is_told_first(settings, tmp_path):
    with pytest.raises(FileNotFoundError, match='init_from gone.pth does not exist'):
        sweep(settings, vary=['init_from=null,gone.pth'])
    assert not (tmp_path/'sweep').exists()

def test_a_model_that_does_not_exist_is_told_first(settings, tmp_path):
    with pytest.raises(OSError, match='model /no/clip'):
        sweep(settings, vary=['encoder_name=storybook-clip,/no/clip'])
    assert not (tmp_path/'sweep').exists()

@pytest.mark.parametrize('vary, told', [
    (['max_caption_length=8,12'], 'max_caption_length changes which tokens'),
    (['tokenizer_name=storybook-qwen3', 'learning_rate=1e-3'], 'tokenizer_name changes which tokens'),
    (['learning_rate=1e-3,1e-2', 'prompt=A page shows'], None),
])
def test_losses_that_cannot_be_compared_are_told(settings, capsys, vary, told):
    sweeps._settings(settings, None, vary, 'grid', None, {})
    out = capsys.readouterr().out
    assert told in out and 'the losses of these trials cannot be compared' in out if told else out==''

def test_sizes_of_data_on_this_machine_can_be_compared(settings, capsys):
    "Only the hub reads fewer images for validation, too."
    sweeps._settings(settings, None, ['training_size_limit=8,16'], 'grid', None, {})
    assert capsys.readouterr().out==''

def test_a_model_that_no_trial_loads_need_not_exist(settings):
    shared = dict(settings, encoder_name='./gone')
    sweeps._settings(shared, None, ['encoder_name=storybook-clip'], 'grid', None, {})
    with pytest.raises(OSError, match='gone'):
        sweeps._settings(shared, None, ['learning_rate=1e-3,1e-2'], 'grid', None, {})
    with pytest.raises(OSError, match='no-qwen'):
        both = ['tokenizer_name=storybook-qwen3,./no-qwen', 'decoder_name=storybook-qwen3']
        sweeps._settings(settings, None, both, 'grid', None, {})

def test_a_run_at_its_last_step_is_not_pruned(settings):
    study = sweep(dict(settings, num_epochs=9, max_steps=4), vary=['learning_rate=2e-2,1e-2,5e-3,1e-9'])
    assert states(study) == ['COMPLETE']*4

def test_values_that_do_not_fit_fail_alone(settings):
    study = sweep(settings, vary=['unfreeze_layers=0,99'])
    assert states(study) == ['COMPLETE', 'FAIL']
    assert 'unfreeze_layers is 99' in study.trials[1].user_attrs['error']

def test_a_combination_that_no_run_can_have_fails_alone(settings):
    "A warm-up needs the cosine; the first trial has none."
    vary = ['lr_scheduler_type=step,cosine', 'warmup_ratio=0.1,0']
    study = sweep(settings, max_steps=1, vary=vary)
    assert sorted(states(study)) == ['COMPLETE']*3 + ['FAIL']
    failed = next(t for t in study.trials if t.state.name=='FAIL')
    assert failed.params == dict(lr_scheduler_type='step', warmup_ratio=.1)
    assert "warmup_ratio is 0.1; it needs lr_scheduler_type 'cosine'" in studies.sweep_table(study)
    assert states(sweep(settings, max_steps=1, vary=vary)) == states(study)

def test_a_full_disk_names_the_sweep(settings, tmp_path, monkeypatch):
    "The run of a trial would go on outside of the study."
    def full(*args):
        raise OSError(28, 'No space left on device', 'x')
    monkeypatch.setattr(training, 'save_checkpoint', full)
    with pytest.raises(OSError, match='No space left') as e:
        sweep(settings, max_steps=1, vary=['learning_rate=1e-3'])
    assert list((tmp_path/'sweep').glob('trial_0000/training_state_*.pt'))
    assert str(e.value).endswith('start the same sweep again') and '--resume' not in str(e.value)

def test_the_classic_grid_has_the_own_learning_rate():
    rates, _ = studies.classic_grid(as_hyperparameters(learning_rate=.00125))
    assert rates == 'learning_rate=0.00042,0.00125,0.0037'

def test_the_command_of_a_cosine_keeps_it():
    h = as_hyperparameters(lr_scheduler_type='cosine', learning_rate_decay=.75, learning_rate_decay_step=1)
    words = shlex.split(command_line(h))[1:]
    given = {name.removeprefix('--'): value for name,value in zip(words[::2], words[1::2], strict=True)}
    assert as_hyperparameters(**{name: type(h[name])(value) for name,value in given.items()}) == h

def test_other_models_are_loaded_only_for_what_needs_them(settings):
    lab = TrialRunner()
    first = lab(as_hyperparameters(settings))
    data, second = lab.data, lab(as_hyperparameters(settings, prefix_length=3, seed=5))
    assert second.decoder is first.decoder and lab.data is data
    unfrozen = lab(as_hyperparameters(settings, num_epochs=2, unfreeze_layers=1))
    # the last trial may have changed a decoder that learns
    assert unfrozen.decoder is not first.decoder and lab.data is data
    assert lab(as_hyperparameters(settings)).decoder is first.decoder
    lab(as_hyperparameters(settings, features='patch'))
    assert lab.data is not data and lab.data['train'].features[:1].ndim == 3

def test_a_decoder_that_learned_is_gone_before_the_next_is_loaded(settings, monkeypatch):
    decoders, alive, train, build = [], [], sweeps.run_training, sweeps.build_captioner
    def training_seen(model, *args):
        decoders.append(weakref.ref(model.decoder))
        return train(model, *args)
    def building_seen(h):
        alive.append(sum(decoder() is not None for decoder in decoders))
        return build(h)
    monkeypatch.setattr(sweeps, 'run_training', training_seen)
    monkeypatch.setattr(sweeps, 'build_captioner', building_seen)
    sweep(settings, max_steps=1, unfreeze_layers=1, unfreeze_epoch=1, vary=['seed=0,1,2'])
    assert len(decoders)==3 and alive==[0, 0]

@pytest.mark.parametrize('sampler', ['tpe', 'random'])
def test_no_two_processes_draw_the_same(settings, tmp_path, sampler):
    "Each has a sampler of its own with the same seed, and so has one that begins again."
    space, h, taken = read_vary(['learning_rate=1e-4:1e-2']), as_hyperparameters(settings), []
    for _ in range(4):
        taken.append(take_trial(open_study(tmp_path/'s', h, space, sampler), tmp_path/'s', space, sampler, 9))
    assert len({t.params['learning_rate'] for t,_ in taken}) == 4

def test_a_trial_that_runs_is_left_alone(settings, tmp_path):
    space, h = read_vary(['learning_rate=1e-3,1e-2']), as_hyperparameters(settings)
    study = open_study(tmp_path/'s', h, space)
    taken = [take_trial(study, tmp_path/'s', space) for _ in range(2)]
    assert take_trial(study, tmp_path/'s', space) is None and states(study) == ['RUNNING']*2
    taken[0][1].release() # its process has died
    trial, lock = take_trial(study, tmp_path/'s', space)
    assert trial.params == taken[0][0].params and states(study) == ['FAIL', 'RUNNING', 'RUNNING']

def test_a_trial_that_ends_meanwhile_is_not_tried_again(settings, tmp_path, monkeypatch):
    space, h = read_vary(['learning_rate=1e-3,1e-2']), as_hyperparameters(settings)
    study, other = (open_study(tmp_path/'s', h, space) for _ in range(2))
    trial, lock = take_trial(study, tmp_path/'s', space)
    take = studies._lock
    def ends_first(folder, number):
        if number == trial.number and lock.is_locked:
            other.tell(number, 1.)
            lock.release()
        return take(folder, number)
    monkeypatch.setattr(studies, '_lock', ends_first)
    take_trial(study, tmp_path/'s', space)
    assert states(study) == ['COMPLETE', 'RUNNING']

def test_trials_that_run_have_begun(settings, tmp_path):
    space, h = read_vary(['learning_rate=1e-3']), as_hyperparameters(settings)
    study = open_study(tmp_path/'s', h, space)
    _, lock = take_trial(study, tmp_path/'s', space)
    with pytest.raises(ValueError, match='1 still running in other processes'):
        best_settings(study, h)

def test_a_grid_is_queued_without_reading_all_trials_for_each(settings, tmp_path, monkeypatch):
    import optuna
    reads, get_trials = [], optuna.Study.get_trials
    monkeypatch.setattr(optuna.Study, 'get_trials', lambda *a, **k: reads.append(1) or get_trials(*a, **k))
    space = read_vary(['seed=0,1,2,3', 'batch_size=2,4,8', 'lora_rank=null,4'])
    for _ in range(2): # the second time, all are there
        study = open_study(tmp_path/'s', as_hyperparameters(settings), space)
    assert len(reads) <= 4 and len(study.trials) == 24

@pytest.mark.parametrize('name', ['a?b', 'a%20b', 'a{b}'])
def test_a_study_is_in_its_folder_whatever_its_name(name, settings, tmp_path):
    space, h = read_vary(['batch_size=4,8']), as_hyperparameters(settings)
    for _ in range(2):
        study = open_study(tmp_path/name, h, space)
    assert (tmp_path/name/'sweep.db').exists() and [p.name for p in tmp_path.iterdir()] == [name]
    assert len(study.trials) == 2

# --- Processes

@pytest.mark.slow
def test_killed_and_taken_up_by_two(album, start, tmp_path):
    args = [
        *flags(dict(SMALL, data=album, num_epochs=2)),
        '--vary',
        'learning_rate=1e-3,2e-3,5e-3,1e-2',
        '--vary',
        'seed=0,1',
    ]
    victim = start('capnb_sweep', *args, cwd=tmp_path)
    deadline = time.monotonic()+120
    while (
        not list(tmp_path.glob('sweep/trial_0002/model_state_dict_*'))
        and victim.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(.005)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    before = {f: f.read_bytes() for n in (0, 1) for f in trial_folder(tmp_path/'sweep', n).iterdir()}
    both = [start('capnb_sweep', *args, cwd=tmp_path) for _ in range(2)]
    outs = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert {f: f.read_bytes() for f in before} == before # what was finished is as it was
    vary = read_vary(args[args.index('--vary')+1::2])
    study = open_study(tmp_path/'sweep', as_hyperparameters(dict(SMALL, data=album, num_epochs=2)), vary)
    ended = [tuple(t.params.values()) for t in study.trials if t.state.name in ('COMPLETE', 'PRUNED')]
    assert len(ended) == len(set(ended)) == 8 # every corner once
    assert [t.number for t in study.trials if t.state.name == 'FAIL'] == [2]
    assert sum('Trial 2 was left' in out for out,_ in outs) == 1
    numbers = [{int(n) for n in re.findall(r'[✅✂]\S* Trial (\d+):', out)} for out,_ in outs]
    assert not numbers[0] & numbers[1] and numbers[0] | numbers[1] == set(range(3, 9))

def test_asked_to_stop(album, start, tmp_path):
    args = flags(dict(SMALL, data=album, num_epochs=500))
    process = start('capnb_sweep', *args, cwd=tmp_path)
    while not list(tmp_path.glob('sweep/trial_0000/model_state_dict_*')) and process.poll() is None:
        time.sleep(.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip().splitlines()[-1]) == (
        143,
        'sweep: stopped in trial 0; the same command goes on',
    )
