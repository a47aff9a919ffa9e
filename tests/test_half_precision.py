"""fp16 with a scaler of the loss, for GPUs that have no bfloat16, as far as a CPU can show it: `accelerate`
makes a scaler on GPUs only, so a run gets PyTorch's scaler for CPUs in its place.
And models that are saved in float16."""
import pytest, torch
from accelerate import Accelerator
from capnb.build import build_captioner
from capnb.encoder import EncodedData
from capnb.insight.pretraining import save_pretrained
from capnb.insight.small_qwen3 import Log, small_qwen3, train_tokenizer
from capnb.run.entry import train
from capnb.run.resume import find_state, read_state, resumed_hyperparameters
from capnb.run.training import run_training
from capnb.settings import as_hyperparameters
from capnb.training import Callback

# four steps an epoch
SMALL = dict(
    prefix_length=2,
    adapter_width=32,
    max_caption_length=8,
    batch_size=8,
    num_epochs=2,
    learning_rate=3e-3,
    learning_rate_decay=0.5,
    learning_rate_decay_step=1,
    evaluation_enabled=False,
    mixed_precision='fp16',
)
# the gradient of the first step does not fit into float16, those of the others do
FIRST_OVERFLOWS = dict(init_scale=2.**40, backoff_factor=2.**-30, growth_interval=3)

@pytest.fixture(scope='module')
def data():
    width = build_captioner(as_hyperparameters(**SMALL), 'cpu').encoder.width
    texts = ['A cat.', 'Two red hats.', 'A small blue fox sleeps.']
    rows = [dict(captions=[texts[i%3]], image_id=str(i)) for i in range(28)]
    return dict(train=EncodedData(torch.randn(28, width, generator=torch.Generator().manual_seed(0)), rows))

@pytest.fixture
def scaled(monkeypatch):
    "A function that lets runs have such a scaler from now on."
    def begin(**options):
        class Scaled(Accelerator):
            def __init__(self, **more):
                super().__init__(**more)
                assert self.mixed_precision=='fp16'
                self.native_amp, self.scaler = True, torch.amp.GradScaler('cpu', **options)
        monkeypatch.setattr('capnb.run.training.Accelerator', Scaled)
        monkeypatch.setattr('capnb.run.training.check_precision', lambda h, device: None)
    return begin

class Steps(Callback):
    "Notes what each step leaves: weights, steps of the optimizer that were made, scale, learning rate."
    def __init__(self):
        self.weights, self.made, self.scales, self.rates = [], [], [], []

    def on_step_end(self, run):
        self.weights.append(torch.cat([p.detach().flatten() for p in run.model.adapter.parameters()]))
        counts = [int(s['step']) for s in run.optimizer.state_dict()['state'].values()]
        self.made.append(max(counts, default=0))
        self.scales.append(run.scaler and run.scaler.get_scale())
        self.rates.append(run.rates[0])

def trained(data, folder, steps=(), **settings):
    h = as_hyperparameters(**SMALL | settings, output_dir=str(folder))
    return run_training(build_captioner(h, 'cpu'), data, h, steps)

def test_the_scale_grows_and_changes_nothing(data, scaled, tmp_path):
    plain, half = Steps(), Steps()
    expected = trained(data, tmp_path/'plain', [plain], mixed_precision='no')
    scaled(init_scale=2.**10, growth_interval=3)
    run = trained(data, tmp_path/'half', [half])
    assert half.scales == [2.**10]*2 + [2.**11]*3 + [2.**12]*3 and plain.scales == [None]*8
    assert half.made == plain.made == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run.losses == pytest.approx(expected.losses, rel=2e-3) and run.losses != expected.losses
    moved = (plain.weights[-1] - plain.weights[0]).norm()
    assert (half.weights[-1] - plain.weights[-1]).norm() < .1*moved

def test_a_step_that_overflows_is_left_out(data, scaled, tmp_path):
    "Neither weights nor averages move, the loss is known all the same, and rates decay once an epoch."
    scaled(**FIRST_OVERFLOWS)
    steps = Steps()
    h = as_hyperparameters(**SMALL)
    start = torch.cat([p.detach().flatten() for p in build_captioner(h, 'cpu').adapter.parameters()])
    run = trained(data, tmp_path, [steps])
    assert torch.equal(steps.weights[0], start) and not torch.equal(steps.weights[1], start)
    assert steps.made == [0, 1, 2, 3, 4, 5, 6, 7]
    assert steps.scales == [2.**10]*3 + [2.**11]*3 + [2.**12]*2
    assert steps.rates == [3e-3]*4 + [1.5e-3]*4
    assert len(run.losses)==8 and run.done and torch.isfinite(steps.weights[-1]).all()

@pytest.mark.parametrize('stop', [1, 3, 5]) # after the step that was left out, and while the scale is to grow
def test_a_run_that_goes_on_has_its_scale(data, scaled, tmp_path, stop):
    scaled(**FIRST_OVERFLOWS)
    through = trained(data, tmp_path/'through')
    trained(data, tmp_path/'cut', max_steps=stop)
    state = read_state(find_state(tmp_path/'cut'))
    assert state['scaler']['scale'] == 2.**10*2**((stop-1)//3)
    h = resumed_hyperparameters(state, dict(max_steps=None))
    again = run_training(build_captioner(h, 'cpu'), data, h, state=state)
    assert again.losses==through.losses
    assert again.scaler.state_dict()==through.scaler.state_dict()
    for (name, a), (_, b) in zip(
        again.model.adapter.state_dict().items(), through.model.adapter.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name

def test_fp16_on_a_cpu_is_refused(data, tmp_path, monkeypatch):
    "accelerate would train in float32 without a word; bf16 it computes with."
    with pytest.raises(ValueError, match='mixed_precision is fp16, and a CPU does not train in it'):
        trained(data, tmp_path/'fp16')
    monkeypatch.setattr('capnb.run.entry.load_for', lambda h, data: pytest.fail('it is told too late'))
    with pytest.raises(ValueError, match='mixed_precision is fp16'):
        train(device='cpu', mixed_precision='fp16', output_dir=str(tmp_path/'train'))
    plain, half = (trained(data, tmp_path/kind, mixed_precision=kind, max_steps=3) for kind in ('no', 'bf16'))
    assert half.losses != plain.losses and half.losses == pytest.approx(plain.losses, rel=.02)

@pytest.mark.parametrize('asked', ['no', 'bf16', None])
def test_a_decoder_in_float16_gets_a_scaled_loss(data, scaled, tmp_path, asked):
    "Whatever is asked: its small gradients would become zero."
    scaled(init_scale=2.**10, growth_interval=3)
    steps, settings = Steps(), SMALL | dict(mixed_precision=asked, max_steps=3)
    h = as_hyperparameters(**settings, output_dir=str(tmp_path))
    model = build_captioner(h, 'cpu')
    model.decoder.half()
    run = run_training(model, data, h, [steps])
    assert steps.scales==[2.**10, 2.**10, 2.**11] and run.metadata['mixed_precision']=='fp16'

def test_saving_leaves_the_model_as_it_is(tmp_path):
    tokenizer = train_tokenizer(['A red cat.'])
    lm = small_qwen3(tokenizer)
    save_pretrained(tmp_path, lm, [tokenizer], Log())
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    stored = type(lm).from_pretrained(tmp_path, dtype='auto')
    assert {p.dtype for p in stored.parameters()} == {torch.float16}
