"""The training step of fixed shapes, unrecorded on a processor: the numbers of the readable step, whatever
the layout; nothing of padding; the same run to the last bit after a stop; and a recording is used as it
should be. What needs a GPU is in the chapters' cells flagged `cuda`."""
import gc, logging, pickle, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.machinery import ModuleSpec
from itertools import count
from subprocess import CalledProcessError
from types import ModuleType, SimpleNamespace
from unittest.mock import patch
import pytest, torch
from torch import nn
from capnb.build import build_captioner
from capnb.unfreezing import parameter_groups, unfreeze
from capnb.data import CaptionData
from capnb.encoder import EncodedData, encode_data
from capnb.fast.cuda.batches import Layouts, room, views, waste
from capnb.fast.cuda import layers, training as recording
from capnb.fast.cuda.layers import FusedGate, _fuse_rotation, use_liger
from capnb.fast.cuda.training import StaticStep, refusal, static_loss, why_not
from capnb.fast.packing import Tokens
from capnb.out_of_memory import may_release, release_memory
from capnb.run import training
from capnb.run.resume import find_state, read_state, resumed_hyperparameters
from capnb.run.training import SharedStep, StaticSteps, run_training
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from capnb.training import Callback, Run, step, train_step
from capnb.optimizer import make_optimizer

SMALL = dict(adapter_width=32, max_caption_length=12, batch_size=6, learning_rate=3e-3)
KINDS = {
    'one token': dict(prefix_length=1), 'four tokens': dict(prefix_length=4),
    'patches': dict(features='patch'),
    'lora': dict(prefix_length=2, lora_rank=2), 'unfrozen': dict(unfreeze_layers=1, unfreeze_epoch=1),
}

@pytest.fixture(scope='module', params=KINDS)
def kind(request):
    "Settings, a captioner of the course and some encoded pages; in double precision, to see 1e-6."
    h = as_hyperparameters(**SMALL | KINDS[request.param])
    model = build_captioner(h, 'cpu').train()
    unfreeze(model, h, 1)
    data = encode_data(model.encoder, CaptionData(Storybook(size=h.image_size, n=8)))
    return h, model.double(), EncodedData(data.features.double(), data.rows)

def lay_out(model, features, captions, images=None, total=None, begin=()):
    ids, lengths = Tokens(model.tokenizer, (), model.max_caption_length).find(captions)
    prefix = features.shape[1] if features.dim()==3 else model.adapter.prefix_length
    images = images or len(captions)
    layouts = Layouts(lengths.tolist()*images, images, prefix, begin)
    return layouts.lay_out(features, ids, lengths, total)

def learned(model): return [p for p in model.parameters() if p.requires_grad]

def gradients(model):
    found = [p.grad.clone() for p in learned(model)]
    model.zero_grad()
    return found

def check_same(found, expected, tolerance=1e-6):
    "The same loss and gradients; those relative to the largest of all."
    assert found[0]==pytest.approx(expected[0], rel=tolerance)
    largest = max(g.abs().max().item() for g in expected[1])
    for mine,its in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, its, atol=tolerance*max(1, largest), rtol=10*tolerance)

def in_parts(model, features, captions, sizes, **how):
    "Loss and gradients of the static step, the batch in parts of these sizes."
    fixed = StaticStep(model, make_optimizer(dict(all=dict(model.named_parameters())))[0])
    total = int(Tokens(model.tokenizer, (), model.max_caption_length).find(captions)[1].sum())
    parts, at = [], 0
    for size in sizes:
        some = slice(at, at+size)
        parts.append(lay_out(model, features[some], captions[some], max(sizes), total, **how))
        at += size
    return fixed.gradient(parts).item(), gradients(model)

# --- The numbers of the readable step

@pytest.mark.parametrize(
    'some', [lambda i: 1, lambda i: 3, lambda i: 1 + i % 3], ids=['one caption', 'three', 'one to three']
)
@pytest.mark.parametrize('sizes', [(6,), (3, 3), (4, 2), (1,)*6], ids=str)
def test_loss_and_gradient_are_those_of_the_readable_step(kind, some, sizes):
    h, model, data = kind
    captions = [row['captions'][:some(i)] for i,row in enumerate(data.rows[:6])]
    expected = step(model, data.features[:6], captions), gradients(model)
    check_same(in_parts(model, data.features, captions, sizes), expected)

def test_a_token_that_texts_begin_with(kind, monkeypatch):
    h, model, data = kind
    captions = [row['captions'][:2] for row in data.rows[:6]]
    monkeypatch.setattr('capnb.captioner.begin_ids', lambda tokenizer: [7])
    expected = step(model, data.features[:6], captions), gradients(model)
    check_same(in_parts(model, data.features, captions, (6,), begin=[7]), expected)

def test_padding_weighs_nothing(kind):
    "More images, positions and tokens than there are; and what stands there does not matter."
    h, model, data = kind
    captions = [row['captions'][:1] for row in data.rows[:3]]
    found = []
    for images in (3, 8):
        batch = lay_out(model, data.features[:3], captions, images)
        n = views(batch.shape, batch.numbers)
        n.ids[n.image<0] = 9
        batch.features[3:] = 100.
        loss = static_loss(model, batch.features, n)
        loss.backward()
        found.append((loss.item(), gradients(model)))
    assert batch.shape.images==8 and batch.read < n.ids.numel() and batch.predicted < len(n.label)
    check_same(found[1], found[0])

def test_another_caption_changes_only_its_own_loss(kind):
    "Who shares a row does not see the others."
    h, model, data = kind
    captions = [row['captions'][:1] for row in data.rows[:3]]
    of_two = lambda texts: static_loss(
        model, *((b := lay_out(model, data.features[:3], texts, total=1)).features, views(b.shape, b.numbers))
    ).item()
    alone = lambda i, text: static_loss(
        model, *((b := lay_out(model, data.features[i:i+1], [[text]], total=1)).features,
                 views(b.shape, b.numbers))
    ).item()
    other = [captions[0], ['A very large blue cat sleeps.'], captions[2]]
    change = alone(1, other[1][0]) - alone(1, captions[1][0])
    assert of_two(other)-of_two(captions)==pytest.approx(change, abs=1e-3) and abs(change) > .1

# --- Shapes

def test_room_grows_by_an_eighth_at_most():
    rooms = [room(n) for n in range(1, 5000)]
    assert all(r >= n for n,r in enumerate(rooms, 1)) and rooms==sorted(rooms)
    assert max(b/a for a,b in zip(rooms, rooms[1:], strict=False) if a >= 64) <= 1.125
    assert len(set(rooms)) < 60

@pytest.mark.parametrize('batch,prefix,each', [(8, 1, 1), (32, 1, 1), (128, 1, 1), (8, 49, 5)], ids=str)
def test_few_shapes_and_little_waste(batch, prefix, each):
    chance = torch.Generator().manual_seed(0)
    lengths = (torch.randn(2048, each, generator=chance)*5+15).round().int().clamp(6, 40)
    layouts, found = Layouts(lengths.tolist(), batch, prefix), []
    for some in lengths.split(batch)[:60]:
        ids = torch.ones(some.numel(), int(some.max()), dtype=torch.long)
        found.append(layouts.lay_out(torch.zeros(len(some), 1), ids, some))
    assert len({b.shape for b in found}) < 16 and waste(found) < (.1 if batch*each >= 32 else .13)
    assert {(b.shape.images, b.shape.rows) for b in found}=={(batch, layouts.rows)}

def test_rows_are_as_long_as_what_they_hold():
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 30, (32, 2), generator=chance)
    layouts = Layouts(lengths.tolist(), 32, 1)
    batch = layouts.lay_out(torch.zeros(32, 1), torch.ones(64, int(lengths.max()), dtype=torch.long), lengths)
    used = views(batch.shape, batch.numbers).image>=0
    assert torch.equal(used, used.sum(1, keepdim=True) > torch.arange(batch.shape.positions)) # no gaps
    assert batch.shape.positions==room(int(used.sum(1).max())) and batch.read==32+int((lengths-1).sum())
    assert int((views(batch.shape, batch.numbers).label>=0).sum())==batch.predicted==int(lengths.sum())

# --- The correction

def optimizer_of(model, h):
    return make_optimizer(parameter_groups(model, h), h.learning_rate)[0]

@pytest.mark.parametrize('scaler', [None, 2.**10], ids=['plain', 'scaled'])
def test_steps_are_those_of_the_loop(kind, scaler):
    "Clipping, AdamW and the cleared gradient; with a scaler, too."
    h, _, data = kind
    found = []
    for static in (False, True):
        model = build_captioner(h, 'cpu').train()
        unfreeze(model, h, 1)
        optimizer = optimizer_of(model, h)
        run = Run(model, {}, optimizer, stepper=step)
        if static:
            scale = torch.amp.GradScaler('cpu', init_scale=scaler) if scaler else None
            fixed = StaticStep(model, optimizer, scale)
        for i in range(5):
            features = data.features[i:i+3].float()
            captions = [row['captions'][:1] for row in data.rows[i:i+3]]
            if static:
                run.losses.append(fixed([lay_out(model, features, captions)]))
                assert all(not p.grad.any() for p in learned(model))
            else:
                train_step(run, features, captions)
        run.fetch()
        found.append((run.losses, [p.detach().clone() for p in learned(model)]))
    assert found[1][0]==pytest.approx(found[0][0], abs=1e-4)
    for a,b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)

# --- In a run

@pytest.fixture
def static(monkeypatch):
    "Runs make static steps, here on a processor."
    monkeypatch.setattr(training, 'on_gpu', lambda model: True)

def settings(tmp_path, **change):
    return as_hyperparameters(
        **SMALL | dict(prefix_length=2, num_epochs=2, captions_per_image=2, checkpoint_steps=2,
                       output_dir=str(tmp_path)) | change
    )

def encoded(h, n=28):
    model = build_captioner(h, 'cpu')
    data = encode_data(model.encoder, CaptionData(Storybook(size=h.image_size, n=n)))
    return {split: EncodedData(data.features, data.rows) for split in ('train', 'validation')}

def with_dropout(h):
    "The state of the random generators matters, too."
    model = build_captioner(h, 'cpu')
    model.adapter.layers.append(nn.Dropout(.1))
    return model

@pytest.mark.parametrize(
    'change', [{}, dict(micro_batch_size=4), dict(lora_rank=2), dict(unfreeze_layers=1, unfreeze_epoch=2)],
    ids=str,
)
def test_a_run_is_the_readable_one(monkeypatch, tmp_path, change):
    found = []
    for name,on_gpu in (('plain', False), ('static', True)):
        h = settings(tmp_path/name, **change)
        monkeypatch.setattr(training, 'on_gpu', lambda model, on_gpu=on_gpu: on_gpu)
        found.append(run_training(build_captioner(h, 'cpu'), encoded(h), h))
        assert type(found[-1].stepper) is (StaticSteps if on_gpu else SharedStep)
    plain, run = found
    assert run.losses==pytest.approx(plain.losses, abs=1e-3) and all(type(l) is float for l in run.losses)
    assert run.validation==pytest.approx(plain.validation, abs=1e-3)
    assert run.metadata['training_loss']==pytest.approx(plain.metadata['training_loss'], abs=1e-3)

class Changed(Callback):
    "Changes the batches of each epoch by a function."
    def __init__(self, change):
        self.change = change
    def on_epoch_begin(self, run):
        self.change(run.batches)

def unchanged(batches):
    pass

def other_captions(batches):
    batches.captions = [['A large blue cat sleeps.']]*len(batches.captions)

def other_features(batches):
    read = batches.read
    def turned(rows):
        features, captions = read(rows)
        return features.flip(-1), captions
    batches.read = turned

@pytest.mark.parametrize('change', [other_captions, other_features])
def test_a_run_reads_what_a_callback_has_changed(monkeypatch, tmp_path, change):
    "In parts of four of the six images of a batch."
    found = []
    for on_gpu, do in ((True, unchanged), (False, change), (True, change)):
        h = settings(tmp_path/str(len(found)), num_epochs=1, micro_batch_size=4, evaluation_enabled=False)
        monkeypatch.setattr(training, 'on_gpu', lambda model, on_gpu=on_gpu: on_gpu)
        found.append(run_training(build_captioner(h, 'cpu'), encoded(h), h, [Changed(do)]).losses)
    without, plain, static = found
    assert static==pytest.approx(plain, abs=1e-3) and static!=pytest.approx(without, abs=1e-2)

def test_weights_in_other_memory_are_recorded_anew(static, tmp_path):
    "Else the step would go on with memory that PyTorch has freed, and the captioner would not change."
    seen = []
    class Moves(Callback):
        def on_epoch_end(self, run):
            seen.append((run.static, [p.detach().clone() for p in run.model.adapter.parameters()]))
            for p in run.model.adapter.parameters():
                p.data = p.data.clone()
    h = settings(tmp_path, num_epochs=2, evaluation_enabled=False)
    run_training(build_captioner(h, 'cpu'), encoded(h), h, [Moves()])
    (first, before), (second, after) = seen
    assert first is not second and not all(map(torch.equal, before, after))

class PowerCut(Callback):
    def __init__(self, step):
        self.step = step
    def on_step_end(self, run):
        if len(run.losses)==self.step: raise SystemError('power cut')

@pytest.mark.parametrize('cut', range(1, 6))
def test_resumed_at_any_step_it_is_the_same_run(static, tmp_path, cut):
    h = settings(tmp_path/'through')
    data, runs = encoded(h, 16), []
    runs.append(run_training(with_dropout(h), data, h))
    h = settings(tmp_path/'cut')
    with pytest.raises(SystemError, match='power cut'):
        run_training(with_dropout(h), data, h, [PowerCut(cut)])
    state = read_state(find_state(h.output_dir))
    assert all(type(l) is float for l in state['position']['losses'])
    runs.append(run_training(with_dropout(h), data, resumed_hyperparameters(state, {}), state=state))
    assert runs[0].losses==runs[1].losses and runs[0].validation==runs[1].validation
    assert runs[0].metadata['training_loss']==runs[1].metadata['training_loss']
    weights = [run.model.adapter.state_dict() for run in runs]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name

def when_laid_out(monkeypatch, do):
    "Have `do(run)` called each time the stepper has laid out an epoch."
    class Told(StaticSteps):
        def on_epoch_begin(self, run):
            super().on_epoch_begin(run)
            do(run)
    monkeypatch.setattr(training, 'StaticSteps', Told)

def leave_losses(run):
    run.fetch_every = 1e9

def test_a_loss_that_is_no_number_names_its_step(static, tmp_path, monkeypatch):
    "Also where it is looked at many steps later."
    h = settings(tmp_path, evaluation_enabled=False, batch_size=2, checkpoint_steps=None)
    data, made = encoded(h), []
    gradient = StaticStep.gradient
    def broken(self, parts):
        made.append(gradient(self, parts))
        return made[-1]*float('nan') if len(made)==3 else made[-1]
    monkeypatch.setattr(StaticStep, 'gradient', broken)
    when_laid_out(monkeypatch, leave_losses)
    with pytest.raises(ValueError, match='the loss is nan at step 3: lower the learning rate'):
        run_training(build_captioner(h, 'cpu'), data, h)
    assert len(made) > 3

def test_losses_stay_on_the_device_until_somebody_looks(static, tmp_path, monkeypatch):
    kinds = []
    when_laid_out(monkeypatch, leave_losses)
    class Watch(Callback):
        def on_step_end(self, run):
            kinds.append(type(run.losses[-1]))
    h = settings(tmp_path, num_epochs=1, checkpoint_steps=None, evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), encoded(h), h, [Watch()])
    assert kinds==[torch.Tensor]*5 and [type(l) for l in run.losses]==[float]*5

@pytest.mark.parametrize('room_for', [1, 3])
def test_out_of_memory_goes_on_in_halves(static, tmp_path, monkeypatch, caplog, room_for):
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data = encoded(h)
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    backward = StaticStep._backward
    def cramped(self, shape):
        if shape.images > room_for:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    h = settings(tmp_path/'parts', evaluation_enabled=False)
    parts = run_training(build_captioner(h, 'cpu'), data, h)
    assert parts.micro_batch_size==room_for
    assert parts.losses==pytest.approx(whole.losses, abs=1e-3)
    monkeypatch.setattr(StaticStep, '_backward', lambda self, shape: cramped_out())
    def cramped_out():
        raise torch.OutOfMemoryError('CUDA out of memory')
    with pytest.raises(ValueError, match='out of memory with a single image'):
        run_training(build_captioner(h, 'cpu'), data, settings(tmp_path/'none'))

def test_a_small_last_batch_is_halved_as_it_is_laid_out(static, tmp_path, monkeypatch):
    "Its one row is laid out for six images; there is memory for three."
    h = settings(tmp_path, num_epochs=1, captions_per_image=1, evaluation_enabled=False)
    made, backward = [], StaticStep._backward
    def cramped(self, shape):
        made.append(shape)
        if len(made) > 1 and shape.images > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    run = run_training(build_captioner(h, 'cpu'), encoded(h, 7), h)
    assert run.micro_batch_size==3 and len(run.losses)==2

def test_the_gradient_of_parts_before_memory_ran_out_is_cleared(static, tmp_path, monkeypatch):
    "The second part of the first batch does not fit; the whole batch is made anew."
    h = settings(tmp_path/'all', evaluation_enabled=False, micro_batch_size=3)
    data, made = encoded(h), []
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    backward = StaticStep._backward
    def cramped(self, shape):
        made.append(shape)
        if len(made)==2:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    h = settings(tmp_path/'again', evaluation_enabled=False, micro_batch_size=3)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size==1 and run.losses==pytest.approx(whole.losses, abs=1e-4)

def test_out_of_memory_asks_the_writer_first(static, tmp_path, monkeypatch):
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data, kept = encoded(h), SimpleNamespace(held=True)
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    backward = StaticStep._backward
    def cramped(self, shape):
        if kept.held:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    def release():
        had, kept.held = kept.held, False
        return had
    monkeypatch.setattr(training, 'release_memory', release)
    h = settings(tmp_path/'given', evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size is None and run.losses==whole.losses

# --- Recordings

class Played:
    "Stands for a recording: a replay does the work, and writes its result where it was."
    def __init__(self, work):
        self.work, self.result, self.times = work, torch.zeros(()), 0
    def replay(self):
        self.times += 1
        if (found := self.work()) is not None:
            self.result.copy_(found)

class Recorder:
    "Stands for the one of a GPU; `fails` is raised when so many recordings were made."
    def __init__(self, fails=None, after=0):
        self.fails, self.after, self.made, self.graphs = fails, after, [], []
    def warm_up(self, work):
        work()
        work()
    def forget(self):
        self.graphs = []
    def record(self, work):
        self.graphs.append(work)
        if self.fails and len(self.made)>=self.after:
            with (patch('torch._amp_foreach_non_finite_check_and_unscale_'), # a recording does no work,
                  patch('torch.nn.utils.clip_grad_norm_', side_effect=self.fails)): # and here it breaks off
                work()
            raise self.fails
        self.made.append(Played(work))
        return self.made[-1], self.made[-1].result

def trained(model, h, batches, recorder, scaler=None):
    optimizer = optimizer_of(model, h)
    fixed = StaticStep(model, optimizer, scaler)
    fixed.recorder = recorder
    torch.manual_seed(0)
    losses = [float(fixed(parts)) for parts in batches]
    return losses, torch.cat([p.detach().flatten() for p in learned(model)]), fixed

@pytest.fixture(scope='module')
def batches():
    "Settings, and steps of one or two parts, of three shapes."
    h = as_hyperparameters(**SMALL, prefix_length=2)
    model = build_captioner(h, 'cpu')
    data = encode_data(model.encoder, CaptionData(Storybook(size=h.image_size, n=8)))
    captions = [row['captions'] for row in data.rows]
    one = [lay_out(model, data.features[:3], captions[:3], 4)]
    two = [lay_out(model, data.features[i:i+1], [captions[i][:1]], 4, 20) for i in (3, 4)]
    six = [lay_out(model, data.features[2:8], [c[:2] for c in captions[2:]], 6)]
    steps = [one, two, one, six, two, one]
    assert len({part.shape for parts in steps for part in parts})==3
    return h, steps

def test_each_shape_is_recorded_once_and_replayed(batches):
    h, steps = batches
    expected = trained(build_captioner(h, 'cpu').train(), h, steps, None)
    recorder = Recorder()
    found = trained(build_captioner(h, 'cpu').train(), h, steps, recorder)
    assert found[0]==expected[0] and torch.equal(found[1], expected[1])
    assert len(recorder.made)==4 and sorted(p.times for p in recorder.made)==[1, 3, 4, 5]

def try_twice(monkeypatch):
    "Repeat a step after a lack of memory, as the stepper of a run does; the errors are in the list."
    errors, gradient = [], StaticStep.gradient
    def twice(self, parts):
        try:
            return gradient(self, parts)
        except torch.OutOfMemoryError as e:
            errors.append(e)
        return gradient(self, parts)
    monkeypatch.setattr(StaticStep, 'gradient', twice)
    return errors

@pytest.mark.parametrize('after', [0, 1, 2])
@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
    RuntimeError('called a synchronizing CUDA operation'),
    RuntimeError('CUDA error: operation failed due to a previous error during capture\nSearch for'),
], ids=['memory', 'waits', 'capture'])
def test_what_cannot_be_recorded_runs_and_is_said_once(batches, monkeypatch, caplog, error, after):
    h, steps = batches
    try_twice(monkeypatch)
    expected = trained(build_captioner(h, 'cpu').train(), h, steps, None)
    with caplog.at_level(logging.WARNING, 'capnb'):
        found = trained(build_captioner(h, 'cpu').train(), h, steps, Recorder(error, after))
    assert found[0]==expected[0] and torch.equal(found[1], expected[1])
    assert sum('launched one by one' in r.message for r in caplog.records)==1

def test_recording_draws_no_random_numbers(batches):
    "A run that was stopped and resumed records again; it must draw the numbers of the first."
    h, steps = batches
    expected, found = (trained(with_dropout(h).train(), h, steps, r) for r in (None, Recorder()))
    assert found[0]==expected[0] and torch.equal(found[1], expected[1])

def test_recordings_give_way_to_a_step(batches, monkeypatch, caplog):
    """A shape that does not fit beside the recordings of others, not even in a second try, runs in its full
    size, without them."""
    h, steps = batches
    expected = trained(build_captioner(h, 'cpu').train(), h, steps, None)
    backward, errors = StaticStep._backward, try_twice(monkeypatch)
    def cramped(self, shape):
        if self.recorded and shape not in self.recorded:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    with caplog.at_level(logging.WARNING, 'capnb'):
        found = trained(build_captioner(h, 'cpu').train(), h, steps, Recorder())
    assert found[0]==expected[0] and torch.equal(found[1], expected[1]) and not found[2].recorded
    assert len(errors)==1
    assert sum('no memory for the recording' in r.message for r in caplog.records)==1

def test_recordings_are_freed_when_memory_is_needed_elsewhere(batches, caplog):
    h, steps = batches
    recorder = Recorder()
    _, _, fixed = trained(build_captioner(h, 'cpu').train(), h, steps, recorder)
    assert fixed.recorded and release_memory() and not fixed.recorded and not release_memory()
    fixed(steps[0])
    assert set(fixed.recorded)=={steps[0][0].shape, 'update'} and release_memory()

def test_another_thread_does_not_take_the_gradient_of_a_step(batches):
    "Memory runs out in a notebook while a run trains in its own thread."
    h, steps = batches
    _, _, fixed = trained(build_captioner(h, 'cpu').train(), h, steps, Recorder())
    fixed.gradient(steps[0])
    before = [p.grad.clone() for p in fixed.parameters]
    with ThreadPoolExecutor(1) as other:
        other.submit(release_memory).result()
    assert fixed.recorded and all(map(torch.equal, before, (p.grad for p in fixed.parameters)))
    assert release_memory() and not fixed.recorded

def test_a_run_that_is_over_holds_no_recordings(static, tmp_path, monkeypatch):
    seen = []
    class Recorded(StaticStep):
        def __init__(self, *args):
            super().__init__(*args)
            self.recorder = Recorder()
    class Watch(Callback):
        def on_train_end(self, run):
            seen.append(len(run.static.recorded))
    monkeypatch.setattr(training, 'StaticStep', Recorded)
    h = settings(tmp_path, num_epochs=1, evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), encoded(h), h, [Watch()])
    assert seen[0] > 1 and not run.static.recorded and not run.static.places

def test_an_update_that_cannot_be_recorded_leaves_the_scaler_as_it_was(batches):
    h, steps = batches
    scaler = lambda: torch.amp.GradScaler('cpu', init_scale=2.**10)
    error = torch.OutOfMemoryError('CUDA out of memory')
    expected = trained(build_captioner(h, 'cpu').train(), h, steps[:1]*4, None, scaler())
    found = trained(build_captioner(h, 'cpu').train(), h, steps[:1]*4, Recorder(error, 1), scaler())
    assert found[2].refused and found[0]==expected[0] and torch.equal(found[1], expected[1])

def test_a_batch_is_laid_out_by_one_plan(static, tmp_path, monkeypatch):
    "The reading thread is in the middle of a batch when the main thread halves it."
    def replan(run):
        read, steps = run.stepper.batches.read, run.stepper
        def read_and_plan(rows):
            if not run.micro_batch_size:
                run.micro_batch_size = 2
                steps.plan()
            return read(rows)
        monkeypatch.setattr(steps.batches, 'read', read_and_plan)
    found = []
    for do in (lambda run: None, replan):
        when_laid_out(monkeypatch, do)
        h = settings(tmp_path/str(len(found)), num_epochs=1, evaluation_enabled=False)
        found.append(run_training(build_captioner(h, 'cpu'), encoded(h), h))
    assert found[1].micro_batch_size==2 and found[1].losses==pytest.approx(found[0].losses, abs=1e-3)

def test_the_stream_is_waited_for_after_an_error(monkeypatch):
    "Else work that follows could read a gradient while the failed work still writes it."
    waits = []
    def stream(name):
        return SimpleNamespace(wait_stream=lambda other: waits.append((name, other.name)), name=name)
    recorder = object.__new__(recording.Recorder)
    recorder.stream, recorder.device = stream('aside'), 'cuda'
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: stream('main'))
    monkeypatch.setattr(torch.cuda, 'stream', lambda other: nullcontext())
    with pytest.raises(ZeroDivisionError):
        recorder.warm_up(lambda: 1/0)
    assert waits==[('aside', 'main'), ('main', 'aside')]

def test_recordings_are_deleted_all_at_once(monkeypatch):
    "PyTorch frees the workspace of a stream with each recording made on it; the others would lose it."
    class Graph:
        def __del__(self):
            gone.append(self)
    class Full(nullcontext):
        def __exit__(self, *args):
            raise torch.OutOfMemoryError('CUDA out of memory')
    gone, recorder = [], object.__new__(recording.Recorder)
    recorder.stream = None
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: nullcontext())
    recorder.forget()
    monkeypatch.setattr(torch.cuda, 'graph', lambda *args, **how: nullcontext())
    assert recorder.record(lambda: 5)[1]==5 and not gone # the caller drops it
    monkeypatch.setattr(torch.cuda, 'graph', lambda *args, **how: Full())
    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(lambda: 5)
    gc.collect()
    assert not gone
    recorder.forget()
    assert len(gone)==2

def test_no_two_recorders_share_a_stream(monkeypatch):
    "PyTorch gives out 32 in turn; one that deletes its recordings takes the workspace of its stream with it."
    streams = count()
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: next(streams) % 32)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: None)
    kept = recording.Recorder('cuda')
    assert all(recording.Recorder('cuda').stream!=kept.stream for _ in range(40)) # each is gone at once
    many = [kept, *(recording.Recorder('cuda') for _ in range(31))]
    assert len({recorder.stream for recorder in many})==32
    assert recording.Recorder('cuda').stream in range(32) # there are no more

class Cramped(Recorder):
    "No memory is left to replay more than three images."
    def __init__(self):
        super().__init__()
        self.tries = 0
    def record(self, work):
        found = super().record(work)
        if isinstance(work, partial) and work.args[0].images > 3:
            found[0].replay = self.refuse
        return found
    def refuse(self):
        self.tries += 1
        if self.tries > 4:
            pytest.fail('it tries again and again')
        raise torch.OutOfMemoryError('CUDA out of memory')

def test_recordings_are_given_up_once_for_a_batch(static, tmp_path, monkeypatch):
    class Recorded(StaticStep):
        def __init__(self, *args):
            super().__init__(*args)
            self.recorder = Cramped()
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data = encoded(h)
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    monkeypatch.setattr(training, 'StaticStep', Recorded)
    h = settings(tmp_path/'parts', evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size==3 and run.losses==pytest.approx(whole.losses, abs=1e-3)

def record_with(monkeypatch, recorder):
    "Let runs record with a stand-in."
    class Recorded(StaticStep):
        def __init__(self, *args):
            super().__init__(*args)
            self.recorder = recorder
    monkeypatch.setattr(training, 'StaticStep', Recorded)

class Keeper:
    "Holds memory, like the cache of a writer, until it is asked for it."
    def __init__(self):
        self.held = True
    def release(self):
        had, self.held = self.held, False
        return had

def test_memory_of_others_is_asked_for_before_recordings_are_given_up(static, tmp_path, monkeypatch):
    "After a validation, a new shape does not fit beside the recordings and what the writer holds."
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data, keeper, recorder, backward = encoded(h), Keeper(), Recorder(), StaticStep._backward
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    def cramped(self, shape):
        if keeper.held and self.recorded and shape not in self.recorded:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    record_with(monkeypatch, recorder)
    may_release(keeper)
    h = settings(tmp_path/'again', evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert not keeper.held and run.static.refused is None and recorder.made[-1].times
    assert run.micro_batch_size is None and run.losses==whole.losses

class NoWarmUp(Recorder):
    "There is memory for a step, but not for a second one on another stream."
    def warm_up(self, work):
        raise torch.OutOfMemoryError('CUDA out of memory')

@pytest.mark.parametrize('size', [None, 1])
def test_a_step_that_cannot_be_warmed_up_runs_in_its_size(static, tmp_path, monkeypatch, caplog, size):
    h = settings(tmp_path/'all', evaluation_enabled=False, micro_batch_size=size)
    data = encoded(h)
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    record_with(monkeypatch, NoWarmUp())
    release_memory() # what other tests have left could be freed instead
    h = settings(tmp_path/'again', evaluation_enabled=False, micro_batch_size=size)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size==size and run.losses==whole.losses
    assert sum('no memory for the recording' in r.message for r in caplog.records)==1

def test_a_failed_recording_is_freed_before_a_batch_is_halved(static, tmp_path, monkeypatch, caplog):
    "The first of a run: what it has reserved stays until it is deleted, and then the step fits."
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data, backward = encoded(h), StaticStep._backward
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    def cramped(self, shape):
        if self.recorder.graphs:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    record_with(monkeypatch, Recorder(torch.OutOfMemoryError('CUDA out of memory')))
    release_memory() # what other tests have left could be freed instead
    h = settings(tmp_path/'again', evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size is None and run.losses==whole.losses
    assert sum('no memory for the recording' in r.message for r in caplog.records)==1

class Small(Recorder):
    "There is memory to record three images at a time."
    def record(self, work):
        if isinstance(work, partial) and work.args[0].images > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return super().record(work)

def test_smaller_parts_are_recorded_although_whole_batches_were_not(static, tmp_path, monkeypatch):
    h = settings(tmp_path/'all', evaluation_enabled=False)
    data, recorder, backward = encoded(h), Small(), StaticStep._backward
    whole = run_training(build_captioner(h, 'cpu'), data, h)
    def cramped(self, shape):
        if self.refused and shape.images > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return backward(self, shape)
    monkeypatch.setattr(StaticStep, '_backward', cramped)
    record_with(monkeypatch, recorder)
    h = settings(tmp_path/'parts', evaluation_enabled=False)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    assert run.micro_batch_size==3 and run.losses==pytest.approx(whole.losses, abs=1e-3)
    assert run.static.refused is None and any(isinstance(played.work, partial) for played in recorder.made)

def test_each_epoch_has_the_same_shapes_to_choose_from(static, tmp_path, monkeypatch):
    "Else a GPU would record all steps again in each epoch, since each draws other captions."
    seen = []
    class Watched(Layouts):
        def __init__(self, lengths, *args):
            seen.append(lengths)
            super().__init__(lengths, *args)
    monkeypatch.setattr(training, 'Layouts', Watched)
    h = settings(tmp_path, num_epochs=3, captions_per_image=1, evaluation_enabled=False)
    run_training(build_captioner(h, 'cpu'), encoded(h), h)
    assert len(seen)==3 and seen[0]==seen[1]==seen[2] and len({len(l) for l in seen[0]})==1

def test_shapes_share_the_place_of_the_features(batches):
    h, steps = batches
    _, _, fixed = trained(build_captioner(h, 'cpu').train(), h, steps, None)
    assert sum(place.is_floating_point() for place in fixed.places.values())==2 # for 4 and for 6 images

def test_seconds_of_recording_include_the_warm_up(batches):
    class Slow(Recorder):
        def warm_up(self, work):
            super().warm_up(work)
            time.sleep(.05)
    h, steps = batches
    _, _, fixed = trained(build_captioner(h, 'cpu').train(), h, steps, Slow())
    assert fixed.seconds > .15 # three shapes

def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    devices = []
    @contextmanager
    def device(which):
        devices.append(which)
        yield
        devices.append(None)
    monkeypatch.setattr(torch.cuda, 'device', device)
    on_second = SimpleNamespace(is_cuda=True, device='cuda:1')
    kernel = lambda *args: devices.append('kernel')
    for name, module in liger(kernel).items():
        monkeypatch.setitem(sys.modules, f'liger_kernel{name}', module)
    module = SimpleNamespace(apply_rotary_pos_emb=None)
    _fuse_rotation(module)
    module.apply_rotary_pos_emb(on_second, on_second)
    FusedGate(nn.Module())(on_second)
    assert devices==['cuda:1', 'kernel', None]*2

def test_watching_for_waits_is_no_warning(monkeypatch):
    modes = ['default']
    def set_mode(mode):
        warnings.warn('Synchronization debug mode is a prototype feature', UserWarning, stacklevel=2)
        modes.append(mode)
    monkeypatch.setattr(torch.cuda, 'get_sync_debug_mode', lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, 'set_sync_debug_mode', set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(KeyError), recording.no_waiting():
            raise KeyError
    assert modes==['default', 'error', 'default']

def stand_in_cuda(monkeypatch):
    "Replace what `Recorder` uses of PyTorch's CUDA; gives the modes that it sets."
    class Stream:
        def wait_stream(self, other):
            pass
    modes, stream = ['default'], Stream()
    nothing = lambda *args, **how: nullcontext()
    for name, stand_in in dict(
        get_sync_debug_mode=lambda: modes[-1], set_sync_debug_mode=modes.append,
        Stream=lambda device: stream, current_stream=lambda device: stream, stream=nothing,
        CUDAGraph=nothing, graph=nothing, graph_pool_handle=lambda: None,
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return modes

def test_a_recorder_looks_for_waits_once(monkeypatch):
    "What it sets holds for all threads, and would end a training beside it."
    modes = stand_in_cuda(monkeypatch)
    runs = []
    for n in (1, 2):
        recorder = recording.Recorder('cuda')
        for _ in range(3):
            recorder.warm_up(lambda: runs.append(1))
        assert len(runs)==6*n and modes.count('error')==n and modes[-1]=='default'

@pytest.mark.parametrize('method', ['warm_up', 'record'])
def test_threads_record_one_after_the_other(monkeypatch, method):
    "Else each could restore the mode of the other: then every later wait for the GPU is an error."
    modes, inside, seen = stand_in_cuda(monkeypatch), [], []
    def work():
        inside.append(1)
        time.sleep(.02)
        seen.append(len(inside))
        inside.pop()
    recorders = [recording.Recorder('cuda') for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda recorder: getattr(recorder, method)(work), recorders))
    assert set(seen)=={1} and modes[-1]=='default'

def liger(kernel):
    "The parts of Liger Kernel that are used; each calls `kernel`."
    package = ModuleType('liger_kernel')
    package.__spec__ = ModuleSpec('liger_kernel', None)
    return {'': package, '.transformers': ModuleType('transformers'),
            '.transformers.rope': SimpleNamespace(liger_rotary_pos_emb=kernel),
            '.transformers.swiglu': SimpleNamespace(LigerSwiGLUMLP=SimpleNamespace(forward=kernel))}

@pytest.mark.parametrize('error', [
    RuntimeError('Failed to find C compiler'), CalledProcessError(1, ['gcc', '-o', 'cuda_utils.so']),
])
def test_without_a_compiler_liger_is_not_used(error, monkeypatch, caplog):
    def fail():
        raise error
    runtime = ModuleType('triton.runtime')
    runtime.driver = SimpleNamespace(active=SimpleNamespace(get_current_device=fail))
    found = {'triton': ModuleType('triton'), 'triton.runtime': runtime}
    found |= {f'liger_kernel{name}': module for name, module in liger(fail).items()}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(layers, '_triton_lacks', layers._triton_lacks.__wrapped__)
    decoder = SimpleNamespace(config=SimpleNamespace(model_type='qwen3'), device=torch.device('cuda'))
    with caplog.at_level(logging.WARNING, 'capnb'):
        assert not use_liger(decoder)
    assert 'Liger Kernel is not used' in caplog.text and 'gcc' in caplog.text and 'python3-dev' in caplog.text

def test_a_decoder_that_left_the_gpu_needs_no_liger(monkeypatch):
    "On a CPU it computes as before, and its pickle can be read where Liger Kernel is not installed."
    def refuse(*args, **kwargs):
        raise AssertionError('Triton does not run on a CPU')
    from transformers.models.qwen3 import modeling_qwen3
    monkeypatch.setattr(modeling_qwen3, 'apply_rotary_pos_emb', modeling_qwen3.apply_rotary_pos_emb)
    decoder = build_captioner(as_hyperparameters(), 'cpu').decoder
    ids, names = torch.arange(40).view(2, 20), list(decoder.state_dict())
    with torch.no_grad():
        expected = decoder(ids).logits
    with monkeypatch.context() as there:
        for name, module in liger(refuse).items():
            there.setitem(sys.modules, f'liger_kernel{name}', module)
        assert use_liger(decoder)
        rotate = modeling_qwen3.apply_rotary_pos_emb
        assert use_liger(decoder) and modeling_qwen3.apply_rotary_pos_emb is rotate # once is enough
    gates = [m for m in decoder.modules() if type(m) is FusedGate]
    assert len(gates)==decoder.config.num_hidden_layers and list(decoder.state_dict())==names
    for found in (decoder, pickle.loads(pickle.dumps(decoder))):
        with torch.no_grad():
            assert torch.equal(found(ids).logits, expected)

def test_another_error_is_one(batches):
    h, steps = batches
    with pytest.raises(RuntimeError, match='shapes do not match'):
        trained(build_captioner(h, 'cpu').train(), h, steps, Recorder(RuntimeError('shapes do not match')))
    assert refusal(RuntimeError('shapes do not match')) is None

def test_other_optimizers_and_decoders_keep_their_way(batches, tmp_path, static, monkeypatch, caplog):
    h, _ = batches
    model = build_captioner(h, 'cpu')
    adamw = optimizer_of(model, h)
    assert why_not(model, adamw, 40) is None
    assert why_not(model, torch.optim.SGD(learned(model), .1), 40)=='the optimizer is SGD, not AdamW'
    model.decoder._shares_rows = False
    assert why_not(model, adamw, 40)=='captions cannot share rows in this decoder'
    h = settings(tmp_path, evaluation_enabled=False)
    with caplog.at_level(logging.INFO, 'capnb'):
        run = run_training(model, encoded(h), h)
    assert type(run.stepper) is SharedStep
    assert sum('captions cannot share rows' in r.message for r in caplog.records)==1
