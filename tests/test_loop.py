"""The loop of the course stays small and plain: few lines, no files, and nothing of the tracks that build on
it."""
import ast, inspect, json, os, re, signal
from collections import Counter, OrderedDict
from contextlib import nullcontext
from threading import Event
from types import SimpleNamespace
import numpy as np, pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from capnb import train, training
from capnb.build import build_captioner
from capnb.unfreezing import parameter_groups
from capnb.data import CaptionData
from capnb.encoder import EncodedData, encode_data
from capnb.run import entry, training as runs
from capnb.run.checkpoints import best_checkpoint
from capnb.run.epochs import EarlyStopping
from capnb.run.live_training import LiveTraining
from capnb.checkpoint import read_metadata, read_tensors, save_tensors
from capnb.run.resume import SavedRun, _kept, find_state, load_state, read_state, resumed_hyperparameters
from capnb.run.signals import Interrupted, how_to_go_on, stoppable
from capnb.run.trackers import Samples
from capnb.run.training import SharedStep, optimizer_for, run_training
from capnb.settings import OWN_DATA, as_hyperparameters
from capnb.training import Callback, fit, step
from capnb.optimizer import make_optimizer
from capnb.scores import Scores
from capnb.storybook import Storybook
from capnb.validation import validate
from capnb.batches import EpochBatches, epoch_batches

TREE = ast.parse(inspect.getsource(training))
FUNCTIONS = {n.name: n for n in TREE.body if isinstance(n, ast.FunctionDef)}
METHODS = {m.name: m for n in TREE.body if isinstance(n, ast.ClassDef) and n.name in ('Run', 'EpochBatches')
           for m in n.body if isinstance(m, ast.FunctionDef)}
SMALL = dict(prefix_length=2, adapter_width=32, max_caption_length=8, batch_size=8, learning_rate=3e-3)

# --- Its size

# what is no part of a step, with sections of their own
BEFORE_AND_AFTER = ('epoch_batches', 'make_optimizer', 'validate')

def code_lines(function):
    "The numbers of the lines with code: no docstring, no comment, no empty line."
    body = function.body[1:] if ast.get_docstring(function) else function.body
    inside = {line for n in body for line in range(n.lineno, n.end_lineno+1)}
    head = range(function.lineno, function.body[0].lineno)
    text = inspect.getsource(training).splitlines()
    return {i for i in inside | set(head) if text[i-1].strip() and not text[i-1].strip().startswith('#')}

def called(names):
    "These functions and methods of the module, and all that they call or pass on, however deep."
    found, coming = {}, list(names)
    while coming:
        name = coming.pop()
        node = FUNCTIONS.get(name) or METHODS.get(name)
        if node is None or name in found: continue
        found[name] = node
        coming += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        coming += [n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)]
    return found

def test_the_loop_is_short():
    parts = called(['fit', 'train_epoch'])
    loop = {name: n for name,n in parts.items() if name not in BEFORE_AND_AFTER}
    assert {'fit', 'training_loop', 'train_epoch', 'train_step', 'step', 'close_epoch'} <= loop.keys()
    lines = set().union(*map(code_lines, loop.values()))
    assert len(lines) <= 90, sorted((len(code_lines(n)), name) for name,n in loop.items())
    assert max(len(line) for line in inspect.getsource(training).splitlines()[7:]) <= 110

# --- What it stands on

FORBIDDEN = (
    'pathlib',
    'signal',
    'filelock',
    'json',
    'os',
    'accelerate',
    'mlflow',
    'wandb',
    'capnb.run',
    'capnb.fast',
    'capnb.insight',
)

def imported(tree):
    """The modules that a tree imports, inside functions, too; what is imported from a package counts as its
    module."""
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            module = '.'.join(filter(None, ['capnb' if n.level else '', n.module]))
            yield from (f'{module}.{a.name}' for a in n.names)

def offenders(tree):
    return [m for m in imported(tree) if any(m==f or m.startswith(f+'.') for f in FORBIDDEN)]

def test_the_loop_imports_no_files_signals_or_tracks_above():
    assert offenders(TREE) == []

@pytest.mark.parametrize(
    'line',
    [
        'import os',
        'from pathlib import Path',
        'from .run.resume import read_state',
        'def f():\n    from capnb.fast import packing',
        'from accelerate.tracking import x',
    ],
)
def test_the_check_of_imports_sees_them(line):
    assert offenders(ast.parse(line))

def test_no_settings_come_in():
    "Plain arguments only: no `Hyperparameters`, and nothing named `h`."
    names = {n.id for n in ast.walk(TREE) if isinstance(n, ast.Name)} | {
        n.arg for n in ast.walk(TREE) if isinstance(n, ast.arg)
    }
    assert not names & {'h', 'Hyperparameters', 'as_hyperparameters'}

# --- It trains, and leaves nothing

class Toy(torch.nn.Module):
    "A model of plain tensors: says the length of a caption from its features."
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, features, captions):
        wanted = torch.tensor([[float(len(texts[0]))] for texts in captions])
        return (self.layer(features)-wanted).square().mean()

def toy_data(n=40):
    features = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return EncodedData(features, [dict(captions=['x'*(1+i%5)], image_id=str(i)) for i in range(n)])

@pytest.fixture
def files(monkeypatch, tmp_path):
    "What is written or made, wherever; the working directory is an empty one."
    import sys
    monkeypatch.chdir(tmp_path)
    seen, watching = [], [True]
    def audit(event, args):
        if not watching[0]: return
        if event=='open' and isinstance(args[0], str) and args[2] & (os.O_WRONLY|os.O_RDWR|os.O_CREAT):
            seen.append(args[0])
        if event in ('os.mkdir', 'os.rename', 'os.link', 'os.symlink'):
            seen.append(str(args[0]))
    sys.addaudithook(audit)
    yield seen
    watching[0] = False

@pytest.mark.parametrize('wrong', [0, -1])
def test_a_batch_has_an_image(wrong):
    with pytest.raises(ValueError, match=f'batch_size is {wrong}, but it must be 1 or more'):
        fit(Toy(), dict(train=toy_data()), num_epochs=1, batch_size=wrong, learning_rate=.1)

def test_plain_tensors_train_and_leave_no_file(files, tmp_path):
    run = fit(Toy(), dict(train=toy_data()), num_epochs=5, batch_size=8, learning_rate=.1)
    assert len(run.losses)==25 and sum(run.losses[-5:]) < sum(run.losses[:5])/2 and run.done
    assert [f for f in files if not f.startswith('/dev/')] == [] and list(tmp_path.iterdir()) == []

@pytest.fixture(scope='module')
def encoded():
    width = build_captioner(as_hyperparameters(**SMALL), 'cpu').encoder.width
    draw = torch.Generator().manual_seed(0)
    texts = ['A cat.', 'Two red hats.', 'A small blue fox sleeps.']
    rows = [dict(captions=[texts[i%3], texts[(i+1)%3]], image_id=str(i)) for i in range(28)]
    return {
        split: EncodedData(torch.randn(28, width, generator=draw), rows) for split in ('train', 'validation')
    }

def test_a_captioner_trains_and_leaves_no_file(encoded, files, tmp_path):
    run = fit(build_captioner(as_hyperparameters(**SMALL), 'cpu'), encoded, num_epochs=3, learning_rate=3e-3)
    assert (
        len(run.losses) == 12
        and len(run.validation) == 3
        and run.metadata['validation_loss'] == run.validation[-1]
    )
    assert run.validation[-1] < run.validation[0]
    assert [f for f in files if not f.startswith('/dev/')] == [] and list(tmp_path.iterdir()) == []

# --- It is the loop that Run uses

def test_run_training_is_the_same_loop(encoded, tmp_path):
    "The same losses, validation and weights, to the last bit; and only Run leaves files."
    h = as_hyperparameters(**SMALL, num_epochs=2, captions_per_image=2, max_steps=7, output_dir=str(tmp_path))
    saved = run_training(build_captioner(h, 'cpu'), encoded, h)
    model = build_captioner(h, 'cpu')
    plain = fit(model, encoded, 2, 8, captions_per_image=2, max_steps=7,
                optimizer=optimizer_for(model, h, 4))
    assert saved.losses==plain.losses and saved.validation==plain.validation and len(plain.losses)==7
    for (name, a), (_, b) in zip(
        saved.model.adapter.state_dict().items(), plain.model.adapter.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert read_state(find_state(tmp_path))['position']['losses']==plain.losses

# --- The seams

def test_a_stepper_makes_the_gradient(encoded):
    "The loop calls it once a step and takes its loss; that it only wraps the readable one changes nothing."
    calls = []
    def counted(model, features, captions):
        calls.append((len(features), len(captions)))
        return step(model, features, captions)
    h, data = as_hyperparameters(**SMALL), dict(train=encoded['train'])
    run, plain = (fit(build_captioner(h, 'cpu'), data, **how) for how in (dict(stepper=counted), {}))
    assert calls==[(8, 8)]*3+[(4, 4)] and run.losses==plain.losses

def test_the_gradient_is_clipped():
    "However steep the loss: a step of plain descent is no longer than the learning rate."
    model = Toy()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    run = training.Run(model, {}, torch.optim.SGD(model.parameters(), lr=1.), stepper=step)
    training.train_step(run, 1000*torch.ones(4, 3), [['x']]*4)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after-before).norm().item()==pytest.approx(1, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())

class Moments(Callback):
    "Notes each moment with the epoch and the step."
    def __init__(self):
        self.seen = []

for moment in [name for name in vars(Callback) if name.startswith('on_')]:
    setattr(
        Moments, moment, lambda self, run, moment=moment: self.seen.append((moment[3:], run.epoch, run.step))
    )

def test_the_moments(encoded):
    watch = Moments()
    fit(build_captioner(as_hyperparameters(**SMALL), 'cpu'), encoded, 2, 20, callbacks=[watch])
    epoch = lambda e: [
        ('epoch_begin', e, 0),
        ('step_end', e, 1),
        ('step_end', e, 2),
        ('epoch_trained', e + 1, 0),
        ('epoch_end', e + 1, 0),
    ]
    assert watch.seen==[('train_begin', 0, 0), *epoch(0), *epoch(1), ('train_end', 2, 0), ('close', 2, 0)]

def test_closed_after_an_error():
    watch = Moments()
    def broken(model, features, captions):
        raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'):
        fit(Toy(), dict(train=toy_data()), callbacks=[watch], stepper=broken)
    assert [m for m,*_ in watch.seen]==['train_begin', 'epoch_begin', 'close']

def test_a_callback_may_change_the_batches_and_stop():
    class Fewer(Callback):
        def on_epoch_begin(self, run):
            run.batches.rows = [rows[:2] for rows in run.batches.rows]
        def on_epoch_end(self, run):
            run.stop = True
    sizes = []
    def counted(model, features, captions):
        sizes.append(len(features))
        return step(model, features, captions)
    run = fit(Toy(), dict(train=toy_data()), 5, 8, callbacks=[Fewer()], stepper=counted)
    assert sizes==[2]*5 and run.epoch==1 and run.done

@pytest.mark.parametrize('change, steps', [(lambda rows: rows*2, 10), (lambda rows: rows[::2], 3)])
def test_a_callback_may_change_the_number_of_batches(change, steps, encoded, tmp_path):
    saved = []
    class Changes(Callback):
        def on_epoch_begin(self, run):
            run.batches.rows = change(run.batches.rows)

        def on_epoch_trained(self, run):
            if isinstance(run, SavedRun):
                saved.append((run.saved, run.cut))
    assert len(fit(Toy(), dict(train=toy_data()), 1, 8, callbacks=[Changes()]).losses)==steps
    h = small(tmp_path, num_epochs=1)
    n = len(change([*range(-(-len(encoded['train'])//h.batch_size))]))
    run = run_training(build_captioner(h, 'cpu'), encoded, h, [Changes()])
    assert len(run.losses)==n and saved==[(n, None)]

def test_groups_learn_at_their_rates(encoded):
    h = as_hyperparameters(**SMALL, lora_rank=2)
    model = build_captioner(h, 'cpu')
    run = fit(model, dict(train=encoded['train']), optimizer=make_optimizer(parameter_groups(model, h), 1e-3))
    assert [(g['name'], g['lr']) for g in run.optimizer.param_groups]==[('adapter', 1e-3), ('decoder', 1e-4)]
    assert training.learning(run).keys()=={n for n,p in model.named_parameters() if p.requires_grad}

def test_batches_between():
    batches = epoch_batches(toy_data(), 8, 0)
    whole, some = list(batches), list(batches.between(1, 3))
    assert len(whole) == 5 and all(
        torch.equal(a, b) and s == t for (a, s), (b, t) in zip(whole[1:3], some, strict=True)
    )

@pytest.mark.parametrize('bad', [0, 1], ids=['right image', 'another image'])
def test_a_loss_that_is_no_number_is_shown(bad):
    class Odd(Toy):
        calls = -1
        def nll(self, features, captions):
            self.calls += 1
            value = float('inf') if self.calls==bad else 2.
            return torch.full((len(captions), 1), value), torch.ones(len(captions), 1)
    model = Odd().train()
    with pytest.raises(ValueError, match='the loss on unseen images is .*inf'):
        validate(model, toy_data(4))
    assert model.training

def test_a_model_in_training_is_so_after_an_error():
    class Broken(Toy):
        def nll(self, features, captions):
            raise RuntimeError('broken')
    model = Broken().train()
    with pytest.raises(RuntimeError, match='broken'):
        validate(model, toy_data(4))
    assert model.training

def test_splits_that_begin_alike_have_columns_of_their_own(capsys):
    model = build_captioner(as_hyperparameters(**SMALL), 'cpu')
    data = encode_data(model.encoder, CaptionData(Storybook(n=8)))
    fit(model, dict(train=data, test_2016=data, test_2017=data), callbacks=[Scores()])
    said = capsys.readouterr().out
    assert 'untrained test_2016' in said and 'untrained test_2017' in said

# --- What building leaves

@pytest.mark.parametrize('settings', [{}, dict(lora_rank=2)], ids=['adapter', 'LoRA'])
def test_building_leaves_the_generators_of_all_devices_alone(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: pytest.fail('it seeds every GPU'))
    before = torch.get_rng_state()
    build_captioner(as_hyperparameters(**settings), 'cpu')
    assert torch.equal(torch.get_rng_state(), before)

def test_pooled_features_take_the_positions_of_the_prefix():
    "The encoder has 64 patches, of which none is read with pooled features."
    fits = as_hyperparameters(max_caption_length=504)
    assert (fits.features, build_captioner(fits, 'cpu').encoder.patches)==('pooled', 64)
    with pytest.raises(ValueError, match='a prefix of 11 and max_caption_length 504 are more than the 512'):
        build_captioner(as_hyperparameters(max_caption_length=504, prompt='A red cat'), 'cpu')

# --- Half precision

def test_gradients_are_unscaled_before_they_are_clipped(encoded, tmp_path):
    "With fp16 the loss is scaled, and so is the gradient; the step is that of the gradient as it is."
    scale = 2.**-10 # a gradient left so small would not be clipped
    h = as_hyperparameters(**SMALL, output_dir=str(tmp_path))
    def after_a_step(accelerator):
        model = build_captioner(h, 'cpu').train()
        run = SavedRun(model, encoded, torch.optim.SGD(model.adapter.parameters(), lr=1.), h=h)
        run.accelerator, run.stepper = accelerator(model), SharedStep(run)
        run.batches = epoch_batches(encoded['train'], 8, 0)
        run.stepper.on_epoch_begin(run)
        training.train_step(run, *next(run.batches.between(0, 1)))
        return run.losses, torch.cat([p.detach().flatten() for p in model.adapter.parameters()])
    def scaling(model):
        def unscale():
            for p in model.adapter.parameters():
                p.grad /= scale
        return SimpleNamespace(
            num_processes=1, process_index=0, autocast=nullcontext,
            backward=lambda loss: (loss*scale).backward(), unscale_gradients=unscale,
        )
    losses, scaled = after_a_step(scaling)
    expected, plain = after_a_step(lambda model: Accelerator(cpu=True))
    assert losses == expected
    torch.testing.assert_close(scaled, plain)

# --- A run in a folder, before and after other runs

def small(tmp_path, **changes):
    "Settings of one epoch of two steps."
    return as_hyperparameters(
        **SMALL | dict(num_epochs=1, evaluation_enabled=False, output_dir=str(tmp_path)) | changes
    )

class PowerCut(Callback):
    "End the run at a moment, perhaps of one step only."
    def __init__(self, moment, step=None):
        def end(run):
            if step in (None, len(run.losses)): raise SystemError('power cut')
        setattr(self, moment, end)

def until_the_cut(encoded, h, *callbacks, state=None):
    with pytest.raises(SystemError):
        run_training(build_captioner(h, 'cpu'), encoded, h, callbacks, state)
    return read_state(find_state(h.output_dir))

class FirstTwo(Callback):
    "Only two images of each batch, and the batches in another order."
    def on_epoch_begin(self, run):
        rows = [rows[:2] for rows in reversed(run.batches.rows)]
        run.batches = EpochBatches(run.batches.data, run.batches.captions, rows)

@pytest.mark.parametrize('static', [False, True], ids=['shared', 'static'])
def test_each_stepper_takes_the_batches_of_a_callback(encoded, tmp_path, monkeypatch, static):
    monkeypatch.setattr(runs, 'on_gpu', lambda model: static) # static steps, here on a CPU
    h = small(tmp_path)
    model = build_captioner(h, 'cpu')
    optimizer, data = optimizer_for(model, h, 4), dict(train=encoded['train'])
    plain = fit(model, data, 1, 8, optimizer=optimizer, callbacks=[FirstTwo()])
    run = run_training(build_captioner(h, 'cpu'), encoded, h, [FirstTwo()])
    assert bool(run.static)==static and run.losses==pytest.approx(plain.losses, rel=1e-4)

def test_a_run_gets_the_device_of_its_own_model(encoded, tmp_path):
    "An earlier run of this process may have been on another device."
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    PartialState._shared_state['device'] = torch.device('cuda') # what a run on a GPU leaves
    try:
        h = small(tmp_path)
        run = run_training(build_captioner(h, 'cpu'), encoded, h)
        assert run.accelerator.device.type=='cpu' and PartialState().device.type=='cpu'
    finally:
        AcceleratorState._reset_state(True)

def test_gradients_of_a_stopped_step_are_cleared(encoded, tmp_path):
    h = small(tmp_path)
    clean, model = run_training(build_captioner(h, 'cpu'), encoded, h), build_captioner(h, 'cpu')
    for p in model.adapter.parameters():
        p.grad = torch.ones_like(p)
    assert run_training(model, encoded, h).losses==clean.losses

def test_a_state_that_is_old_by_now_is_refused(encoded, tmp_path):
    "Another process went on with the run after this one had read its state."
    h = small(tmp_path)
    run_training(build_captioner(h, 'cpu'), encoded, h)
    old = read_state(find_state(tmp_path))
    go_on = lambda state, **changes: run_training(
        build_captioner(h, 'cpu'), encoded, resumed_hyperparameters(state, changes), state=state
    )
    go_on(read_state(find_state(tmp_path)), num_epochs=3)
    before = find_state(tmp_path).read_bytes()
    with pytest.raises(ValueError, match='has changed since it was read'):
        go_on(old, num_epochs=2)
    assert find_state(tmp_path).read_bytes()==before

def test_a_smaller_part_is_remembered(encoded, tmp_path):
    "The process may die again before it saves its first state."
    h = small(tmp_path)
    run_training(build_captioner(h, 'cpu'), encoded, h)
    state = read_state(find_state(tmp_path))
    asked = resumed_hyperparameters(state, dict(num_epochs=2, micro_batch_size=1))
    state = until_the_cut(encoded, asked, PowerCut('on_epoch_begin'), state=state)
    h = resumed_hyperparameters(state, {})
    assert run_training(build_captioner(h, 'cpu'), encoded, h, state=state).micro_batch_size==1

class OneEpoch(Callback):
    def on_epoch_end(self, run):
        run.stop = True

def test_a_run_that_a_callback_ended_does_not_train_on(encoded, tmp_path):
    h = small(tmp_path, num_epochs=3)
    state = until_the_cut(encoded, h, OneEpoch(), PowerCut('on_train_end'))
    run = run_training(build_captioner(h, 'cpu'), encoded, h, state=state)
    assert run.epoch==1 and run.done
    state = read_state(find_state(tmp_path))
    with pytest.raises(ValueError, match='to go on, ask for a larger num_epochs'):
        resumed_hyperparameters(state, {})
    longer = resumed_hyperparameters(state, dict(num_epochs=4))
    assert run_training(build_captioner(h, 'cpu'), encoded, longer, state=state).epoch==4

class Mode(Callback):
    "Notes whether the model is in training mode at the end."
    def __init__(self):
        self.training = []
    def on_train_end(self, run):
        self.training.append(run.model.training)

def test_a_run_that_only_has_to_be_scored_is_not_in_training(encoded, tmp_path):
    "Its last epoch was closed by another process; dropout would change the captions."
    h, mode = small(tmp_path, feature_dropout=.5), Mode()
    state = until_the_cut(encoded, h, mode, PowerCut('on_train_end'))
    run_training(build_captioner(h, 'cpu'), encoded, h, [mode], state)
    assert mode.training==[False, False]

class Best(Callback):
    keeps = ('best',)
    def on_epoch_end(self, run):
        self.best = min(run.losses)

def test_what_a_callback_had_not_noted_yet(encoded, tmp_path):
    h, last = small(tmp_path, checkpoint_steps=1), Best()
    state = until_the_cut(encoded, h, Best(), PowerCut('on_step_end', step=2))
    run = run_training(build_captioner(h, 'cpu'), encoded, h, [last], state)
    assert last.best==min(run.losses)

@pytest.mark.parametrize('first, later, told', [
    ([Best()], [], 'had a callback Best'),
    ([], [Best()], 'had no callback Best'),
], ids=['without', 'with'])
def test_a_run_goes_on_with_the_callbacks_that_it_began_with(encoded, tmp_path, first, later, told):
    "Neither without one that keeps something nor with a new one."
    h = small(tmp_path)
    run_training(build_captioner(h, 'cpu'), encoded, h, first)
    state, before = read_state(find_state(tmp_path)), find_state(tmp_path).read_bytes()
    longer = resumed_hyperparameters(state, dict(num_epochs=2))
    with pytest.raises(ValueError, match=rf'{told}; go on in Python, .*train\(callbacks='):
        run_training(build_captioner(h, 'cpu'), encoded, longer, later, state)
    assert find_state(tmp_path).read_bytes()==before
    assert run_training(build_captioner(h, 'cpu'), encoded, longer, first, state).epoch==2

class Mean(Callback):
    keeps = ('mean',)
    def on_step_end(self, run):
        self.mean = np.mean(run.losses)

def test_what_no_state_can_hold_is_told_before_one_is_written(encoded, tmp_path):
    h = small(tmp_path)
    with pytest.raises(ValueError, match='callback Mean: mean is a float64'):
        run_training(build_captioner(h, 'cpu'), encoded, h, [Mean()])
    assert read_state(find_state(tmp_path))['position']['losses']==[]

NUMPY = [np.float64(1), np.ones(2), [np.float64(1)], {'a': {np.int64(1): 1}}]

@pytest.mark.parametrize('value', NUMPY, ids=str)
def test_numbers_of_numpy_are_no_plain_data(value):
    last = Best()
    last.best = value
    with pytest.raises(ValueError, match='callback Best: best is a .*keep plain data and tensors'):
        _kept([last])

def test_plain_data_and_tensors_are_kept_as_they_are(tmp_path):
    last = Best()
    last.best = {'a': [1, 2.5, None, True], 2: ({'text'}, torch.ones(2)), 'rest': OrderedDict(b=(3,))}
    last.best |= dict(words=Counter('aab'), bytes=b'x', size=torch.Size([1]), kind=torch.float16)
    save_tensors(tmp_path/'kept.pt', _kept([last]))
    kept = read_tensors(tmp_path/'kept.pt')['Best']['best']
    assert {**kept, 2: None}=={**last.best, 2: None}
    assert kept[2][0]=={'text'} and torch.equal(kept[2][1], torch.ones(2))

def test_a_run_from_a_cpu_gets_a_new_scaler(encoded, tmp_path):
    h = small(tmp_path)
    run_training(build_captioner(h, 'cpu'), encoded, h)
    state, model = read_state(find_state(tmp_path)), build_captioner(h, 'cpu')
    run = runs._new_run(model, encoded, h, '20260101_120000', [], state, runs._accelerator(model, h))
    run.scaler = torch.amp.GradScaler('cpu')
    load_state(run, state)
    assert run.scaler.state_dict()==torch.amp.GradScaler('cpu').state_dict()

def test_patience_waits_for_the_epoch_that_has_begun(tmp_path):
    "A run that goes on within an epoch, with a smaller patience than before."
    h = as_hyperparameters(patience=1, output_dir=str(tmp_path))
    run = SavedRun(None, {}, h=h, epoch=2, step=3, validation=[.5, .6])
    EarlyStopping().on_resume(run)
    assert not run.stop
    run.epoch, run.step, run.validation = 3, 0, [.5, .6, .4]
    EarlyStopping().on_epoch_end(run)
    assert not run.stop

def test_an_epoch_that_is_cut_costs_no_checkpoint(encoded, tmp_path, monkeypatch):
    "Trained to its end, the epoch is worse than one before it, which is then the best again."
    losses = iter([1., .9, .8, .95])
    monkeypatch.setattr(training, 'validate', lambda *args: (next(losses), 1.))
    h = small(tmp_path, num_epochs=3, max_steps=10, keep_checkpoints=1, evaluation_enabled=True)
    assert run_training(build_captioner(h, 'cpu'), encoded, h).validation==[1., .9, .8]
    state = read_state(find_state(tmp_path))
    h = resumed_hyperparameters(state, dict(max_steps=12))
    assert run_training(build_captioner(h, 'cpu'), encoded, h, state=state).validation==[1., .9, .95]
    assert best_checkpoint(tmp_path).name.endswith('-2.pth')
    assert sorted(p.stem[-1] for p in tmp_path.glob('model_state_dict_*'))==['2', '3']

def test_no_samples(encoded, tmp_path):
    h, data = small(tmp_path), encoded | dict(test=encoded['validation'])
    assert run_training(build_captioner(h, 'cpu'), data, h, [Samples({}, samples=0)]).done

def test_a_handler_that_is_not_pythons_is_left(monkeypatch, tmp_path):
    "Where a program in C has set it, Python could not put it back."
    changed = []
    monkeypatch.setattr(signal, 'getsignal', lambda number: None)
    monkeypatch.setattr(signal, 'signal', lambda number, handler: changed.append(handler))
    run = SavedRun(None, {}, h=small(tmp_path), stamp='20260101_120000')
    with stoppable(run):
        assert changed==[]
    assert changed==[]

@pytest.fixture
def interrupt():
    "The handler of Ctrl-C is put back after the test."
    old = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, old)

def test_a_signal_that_is_ignored_stays_so(interrupt, tmp_path):
    "A script starts commands in the background so: Ctrl-C is for what is in the foreground."
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGTERM)
    with stoppable(SavedRun(None, {}, h=small(tmp_path), stamp='20260101_120000')):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='this system has no SIGHUP')
def test_a_terminal_that_is_closed_sends_two_signals(tmp_path):
    "The second one is no second Ctrl-C: the step is finished and saved."
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) # `nohup` ignores it
    run = SavedRun(None, {}, h=small(tmp_path), stamp='20260101_120000', busy=True)
    run.accelerator = SimpleNamespace(num_processes=1)
    with stoppable(run):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert run.signal==signal.SIGHUP
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, before)

@pytest.mark.parametrize('change, told', [
    ({}, 'capnb_train --resume'),
    (dict(data=OWN_DATA), 'train(resume='),
    (dict(encoder_name='own:mine'), 'train(resume='),
])
def test_the_advice_is_for_the_way_it_was_started(change, told, tmp_path):
    "A command cannot have data or an encoder that were passed in Python."
    h = small(tmp_path, **change)
    assert f'go on with: {told}' in how_to_go_on(SavedRun(None, {}, h=h, stamp='20260101_120000'))

def test_the_advice_names_callbacks_that_a_command_does_not_have(tmp_path):
    run = SavedRun(None, {}, h=small(tmp_path), stamp='20260101_120000')
    run.callbacks = [runs.Begin(), Samples({})]
    assert 'go on with: capnb_train --resume' in how_to_go_on(run)
    run.callbacks.append(OneEpoch())
    assert re.search(r'go on with: train\(resume=.*, and the same .*callbacks as before', how_to_go_on(run))

def test_a_widget_shows_an_epoch_that_is_closed_again_once(encoded, tmp_path):
    "An error after the widget was told of the epoch; `max_steps` ends the second epoch."
    class FullDisk(Callback):
        failed = False
        def on_epoch_end(self, run):
            if not self.failed:
                self.failed = True
                raise LookupError('no space')
    h = small(tmp_path, num_epochs=2, max_steps=5)
    view = LiveTraining(build_captioner(h, 'cpu'), encoded, h, Storybook(n=2))
    view.callbacks.append(FullDisk())
    view.wait() # for nothing
    for text in ('go on', 'done'):
        view.begin()
        view.wait()
        assert view.start.description==text
    assert [epoch for epoch,_ in view.told]==[1, 2] and view.bar.value==view.bar.max==5

class Waiting(Callback):
    "Waits in the first step until it may go on."
    def __init__(self):
        self.reached, self.free = Event(), Event()
    def on_step_end(self, run):
        self.reached.set()
        self.free.wait(60)

@pytest.fixture
def waiting(encoded, tmp_path):
    "A training in a widget, and the callback for which it waits in its first step."
    h = small(tmp_path, mixed_precision='bf16')
    view, step = LiveTraining(build_captioner(h, 'cpu'), encoded, h, Storybook(n=2)), Waiting()
    view.callbacks.append(step)
    view.start.click()
    try:
        assert step.reached.wait(60), view.errors.value
        yield view, step
    finally:
        step.free.set()
        view.wait()

def test_a_second_click_does_nothing(waiting, monkeypatch):
    "Clicks that come before a button is grey are handled, too."
    (view, step), asked = waiting, []
    monkeypatch.setattr('capnb.run.live_training.ask_to_stop', asked.append)
    first = view.thread
    for _ in range(2):
        view.start.click()
        view.stop.click()
    assert view.thread is first and asked==[view.run]
    step.free.set()
    view.wait()
    view.start.click()
    assert view.thread is first and view.start.description=='done', view.errors.value

def test_one_run_at_a_time(waiting, encoded, tmp_path):
    "The precision is that of the whole process."
    view, step = waiting
    h = small(tmp_path/'other', mixed_precision='no')
    with pytest.raises(ValueError, match='another training is going on in this process'):
        run_training(build_captioner(h, 'cpu'), encoded, h)
    step.free.set()
    view.wait()
    assert view.run.done and view.run.metadata['mixed_precision']=='bf16'
    assert run_training(build_captioner(h, 'cpu'), encoded, h).metadata['mixed_precision']=='no'

class Adds(Callback):
    "Adds a value to the metadata, and notes the mean loss at each moment."
    def __init__(self, value):
        self.value, self.means = value, []

    def on_train_begin(self, run):
        self.means.append(run.mean_loss)

    def on_epoch_trained(self, run):
        self.means.append(run.mean_loss)

    def on_epoch_end(self, run):
        self.means.append(run.mean_loss)
        run.metadata['mine'] = self.value

@pytest.mark.parametrize('value', [np.float32(.5), torch.tensor(.5), .5])
def test_a_callback_adds_any_number(value, encoded, tmp_path):
    h = as_hyperparameters(**SMALL, num_epochs=1, max_steps=2, output_dir=str(tmp_path))
    run = run_training(build_captioner(h, 'cpu'), encoded, h, [Adds(value)])
    assert read_metadata(run.checkpoint)['mine']==.5
    assert json.loads(read_state(find_state(tmp_path))['metadata'])['mine']==.5

def test_what_is_no_plain_data_is_told_with_the_file(encoded, tmp_path):
    h = as_hyperparameters(**SMALL, num_epochs=1, max_steps=2, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r'training_metadata_.*is not written: .* is a object'):
        run_training(build_captioner(h, 'cpu'), encoded, h, [Adds(object())])

def test_the_mean_loss_is_there_between_epochs(encoded, tmp_path):
    h, mine = as_hyperparameters(**SMALL, num_epochs=2, output_dir=str(tmp_path)), Adds(1)
    run_training(build_captioner(h, 'cpu'), encoded, h, [mine])
    plain = Adds(1)
    fit(build_captioner(h, 'cpu'), encoded, 2, 8, callbacks=[plain])
    for means in (mine.means, plain.means):
        first, *rest = means
        assert first is None and len(rest)==4
        assert rest[0]==rest[1]!=rest[2]==rest[3]

@pytest.mark.parametrize('callbacks', [Adds, [Adds], [print], 3])
def test_what_is_no_callback_is_told_before_images_are_encoded(callbacks, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('too late')
    monkeypatch.setattr(entry, 'prepare', fail)
    with pytest.raises(ValueError, match='^callbacks: '):
        train(callbacks=callbacks)

def test_weights_to_begin_with_are_read_before_the_data(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('too late')
    monkeypatch.setattr(entry, 'load_for', fail)
    with pytest.raises(ValueError, match='is a folder; name a file'):
        train(init_from=str(tmp_path), output_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match='gone.pth'):
        train(init_from=str(tmp_path/'gone.pth'), output_dir=str(tmp_path))

def test_the_tracker_comes_after_the_callbacks(monkeypatch, tmp_path):
    logged = []
    class Noting(Callback):
        def __init__(self, splits):
            pass

        def on_epoch_end(self, run):
            logged.append(run.metadata['mine'])
    monkeypatch.setattr(entry, 'Tracker', Noting)
    monkeypatch.setattr(entry, 'tracker_names', lambda h: ['noting'])
    few = dict(num_epochs=1, training_size_limit=8, max_steps=1, evaluation_enabled=False)
    train(callbacks=Adds(.5), output_dir=str(tmp_path), **few) # a single one needs no list
    assert logged==[.5]

class Fails(Callback):
    "Fails in the second step as a GPU does that was suspended."
    def on_step_end(self, run):
        if run.step==2:
            raise torch.AcceleratorError('CUDA error: unspecified launch failure\nCompile with TORCH_USE')

def test_a_gpu_that_fails_says_how_to_go_on(encoded, tmp_path):
    h = small(tmp_path, checkpoint_steps=1)
    with pytest.raises(OSError, match=r'launch failure; .*restart the kernel\), go on with: ') as e:
        run_training(build_captioner(h, 'cpu'), encoded, h, [Fails()])
    assert 'Compile with' not in str(e.value)

class TooLate(Callback):
    "Waits in vain, for an error without a word."
    def on_step_end(self, run):
        if run.step==2:
            raise TimeoutError

def test_an_error_without_a_message_says_how_to_go_on(encoded, tmp_path):
    h = small(tmp_path, checkpoint_steps=1)
    with pytest.raises(OSError, match='^TimeoutError; when that is put right, go on with: '):
        run_training(build_captioner(h, 'cpu'), encoded, h, [TooLate()])
