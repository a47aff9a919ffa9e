"""What is planned before a run, checked against arithmetic by hand and against the commands from outside;
and the form of the table of results."""
import copy, inspect, json, os, re, shutil, subprocess
from functools import cache
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import huggingface_hub, pytest, torch
from capnb.saving import shipped_checkpoint
from capnb.checkpoint import read_metadata
from capnb.run.entry import train
from capnb.run.commands import train_command
from capnb.settings import OWN_DATA, PRESETS, as_hyperparameters
from capnb.hardware import (
    Hardware, choose_attention, choose_dtype, choose_mixed_precision, default_attention, default_dtype,
    default_mixed_precision, describe_hardware
)
from capnb.run.results import FIELDS, add_row, result_row, results_table, write_row
from capnb.fast.random_models import KNOWN_MODELS, random_init_captioner, count, planned_config
from capnb.run import estimate
from capnb.run.estimate import Plan, download_of, plan_text, run_seconds
from capnb.fast.ceilings import Ceilings, recorded_work, training_work, work_seconds, writing_work
from capnb.fast.cpu import use_onednn
from capnb.fast import cache as feature_cache
from capnb.fast.memory import ENCODED, count_phases, phases
from capnb.fast.parts import is_fast
from capnb.run.commands import results_command
from capnb.storybook import Storybook

ROOT = Path(__file__).resolve().parent.parent
BOTH = ('sdpa', 'flash_attention_2')
slow = pytest.mark.skipif(not os.environ.get('CAPNB_SLOW'), reason='set CAPNB_SLOW=1')

T4 = Hardware('cuda', 'T4', 16, (7,5))

@cache # counting takes seconds, and no test changes a plan
def plan_of(preset):
    "The plan for a preset on a small card."
    return Plan(as_hyperparameters(preset=preset), T4)

# --- Hardware

CARDS = {
    'T4': (16, 7, 5),
    'V100': (32, 7, 0),
    'A100': (80, 8, 0),
    'RTX 3090': (24, 8, 6),
    'H100': (80, 9, 0),
    'GTX 1080': (8, 6, 1),
}
CHOICES = {
    'T4': ('float16', 'fp16', 'sdpa'),
    'V100': ('float16', 'fp16', 'sdpa'),
    'GTX 1080': ('float32', 'no', 'sdpa'),
    **dict.fromkeys(('A100', 'RTX 3090', 'H100'), ('bfloat16', 'bf16', 'flash_attention_2')),
}

@pytest.mark.parametrize('card', CARDS)
def test_choice_for_a_card_that_says_what_it_is(card, monkeypatch):
    "No GPU is asked: `torch.cuda` is made to answer as each card would, with FlashAttention installed."
    memory, major, minor = CARDS[card]
    monkeypatch.setattr(
        torch.cuda,
        'get_device_properties',
        lambda device: SimpleNamespace(name=card, total_memory=memory * 1e9, major=major, minor=minor),
    )
    monkeypatch.setattr(
        torch.cuda, 'is_bf16_supported', lambda including_emulation: including_emulation or major >= 8
    )
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    monkeypatch.setattr('transformers.utils.is_flash_attn_2_available', lambda: True)
    dtype, precision, attention = CHOICES[card]
    assert (default_dtype('cuda'), default_mixed_precision('cuda'), default_attention('cuda')) == (
        getattr(torch, dtype),
        precision,
        attention,
    )

@pytest.mark.parametrize(
    'hardware',
    [
        Hardware('mps', 'M3', 24, None, True, BOTH),
        Hardware('cpu', 'with bfloat16', 64, None, True, BOTH),
        Hardware('cpu', 'plain', 8),
    ],
    ids=lambda h: h.name,
)
def test_no_nvidia_card_means_float32(hardware):
    assert (choose_dtype(hardware), choose_mixed_precision(hardware), choose_attention(hardware)) == (
        'float32',
        'no',
        'sdpa',
    )

def test_attention_is_what_is_installed():
    a100 = dict(device='cuda', name='A100', memory=80, capability=(8,0), bf16=True)
    assert [choose_attention(Hardware(**a100, attention=a)) for a in (BOTH, ('sdpa',), ())] == [
        'flash_attention_2',
        'sdpa',
        'eager',
    ]

# --- Parameters and memory

def by_hand_vit(width, layers, patch, size, mlp, out):
    linear = lambda a, b: a*b + b
    return (
        3 * patch * patch * width
        + width
        + ((size // patch) ** 2 + 1) * width
        + layers * (4 * linear(width, width) + linear(width, mlp) + linear(mlp, width) + 4 * width)
        + 4 * width
        + width * out
    )

def by_hand_qwen(width, layers, heads, mlp, tied, kv=8, head=128, words=151936):
    return (
        words * width * (1 if tied else 2)
        + layers * (2 * width * heads * head + 2 * width * kv * head + 2 * head + 3 * width * mlp + 2 * width)
        + width
    )

@pytest.mark.parametrize(
    'name, expected',
    [
        ('openai/clip-vit-base-patch32', by_hand_vit(768, 12, 32, 224, 3072, 512)),
        ('openai/clip-vit-large-patch14', by_hand_vit(1024, 24, 14, 224, 4096, 768)),
    ],
)
def test_image_half_by_hand(name, expected):
    assert (
        count(random_init_captioner(as_hyperparameters(preset='flickr30k', encoder_name=name)).encoder)
        == expected
    )

@pytest.mark.parametrize(
    'size, expected',
    [
        ('0.6B', by_hand_qwen(1024, 28, 16, 3072, True)),
        ('1.7B', by_hand_qwen(2048, 28, 16, 6144, True)),
        ('4B', by_hand_qwen(2560, 36, 32, 9728, True)),
        ('8B', by_hand_qwen(4096, 36, 32, 12288, False)),
    ],
)
def test_decoder_by_hand(size, expected):
    assert (
        count(
            random_init_captioner(
                as_hyperparameters(preset='flickr30k', tokenizer_name=f'Qwen/Qwen3-{size}-Base')
            ).decoder
        )
        == expected
    )

@pytest.mark.parametrize('preset', PRESETS)
def test_every_preset_can_be_planned_without_network(preset):
    plan = plan_of(preset)
    h = plan.h
    text = plan_text(plan)
    assert (
        h.encoder_name in text
        and f'{plan.steps} steps of {h.batch_size} images' in text
        and f"{plan.images['train']} train" in text
    )
    assert plan.parameters['adapter'] == count(random_init_captioner(h).adapter)
    assert (
        15 > plan.memory_needed > plan.memory['weights'] > 0
        and ('write' in plan.memory) == h.evaluation_enabled
    )
    assert (plan.downloads[h.encoder_name][0] == 0) == (preset=='storybook')

def test_attention_is_counted_as_devices_do_it():
    """The matrices of attention weights of 256 images of 729 patches, in one layer, are 16 heads * 729^2 *
    256 numbers, before and after the softmax. No device holds them both."""
    h = as_hyperparameters(encoder_name='google/siglip2-so400m-patch14-384', image_size=384)
    encode = count_phases(h)['encode']
    # but the output of the widest layer is there
    assert 256*729*4304*4 < encode['bytes'] < 1.5*256*16*729**2*4
    assert encode['flops'] == pytest.approx(256*2*729*27*(4*1152**2 + 2*1152*4304 + 2*729*1152), rel=.03)

@pytest.mark.parametrize(
    'changes',
    [
        dict(features='patch'),
        dict(lora_rank=4),
        dict(num_epochs=2, unfreeze_layers=2),
        dict(encoder_name='facebook/dinov2-base', features='patch'),
    ],
)
def test_other_ways_to_learn_are_planned(changes, monkeypatch):
    monkeypatch.setitem(
        KNOWN_MODELS, 'facebook/dinov2-base', dict(model_type='dinov2', image_size=518, patch_size=14)
    )
    plain, other = plan_of('flickr30k'), Plan(as_hyperparameters(preset='flickr30k', **changes), T4)
    more = {
        'features': 0,
        'lora_rank': 28 * 4 * (2048 + 1024 + 2 * (1024 + 1024) + 2048 + 1024 + 3 * (1024 + 3072)),
        'unfreeze_layers': 2 * (by_hand_qwen(1024, 1, 16, 3072, True) - 151936 * 1024 - 1024),
    }
    adapter = {'features': (768+1)*1024 + (1024+1)*1024}.get(list(changes)[-1], plain.parameters['adapter'])
    assert other.trained == adapter + more[list(changes)[-1]]
    assert other.memory['step'] > plain.memory['step'] and other.memory['AdamW'] == 8*other.trained/1e9

def test_half_the_bytes_on_a_gpu():
    h = as_hyperparameters()
    laptop, t4 = Plan(h, Hardware('cpu', 'a laptop', 16)), plan_of('storybook')
    assert t4.memory['weights'] - 4 * t4.parameters['adapter'] / 1e9 == pytest.approx(
        (laptop.memory['weights'] - 4 * t4.parameters['adapter'] / 1e9) / 2
    )
    assert t4.memory['AdamW'] == laptop.memory['AdamW'] == 8*t4.parameters['adapter']/1e9
    assert (
        t4.memory['step'] < laptop.memory['step']
        and t4.counts['step']['flops'] == laptop.counts['step']['flops']
    )

def test_a_larger_batch_needs_more():
    step = [count_phases(as_hyperparameters(batch_size=b))['step']['bytes'] for b in (32, 64, 128)]
    assert (step[2]-step[1])/(step[1]-step[0]) == pytest.approx(2, rel=.05) # a straight line

def test_a_step_in_parts_needs_less_memory():
    h = as_hyperparameters(batch_size=100)
    whole, parts = (count_phases(some)['step'] for some in (h, as_hyperparameters(h, micro_batch_size=16)))
    assert parts['bytes'] < .5*whole['bytes'] and parts['flops'] == pytest.approx(whole['flops'], rel=.1)

def test_as_many_images_are_planned_as_a_gpu_encodes():
    batch = inspect.signature(feature_cache.encode_data).parameters['batch_size'].default
    assert ENCODED == feature_cache.TOGETHER*batch

@pytest.mark.parametrize('cores, images', [(2, 64), (16, 512), (64, 800)])
def test_as_many_images_are_planned_as_the_cores_encode(cores, images, monkeypatch):
    "A batch of 32 in each, but no more than there are."
    monkeypatch.setattr(estimate, 'usable_cores', lambda: cores)
    plan = Plan(as_hyperparameters(training_size_limit=100), Hardware('cpu', 'a server', 64))
    assert sum(plan.images.values())==800
    assert plan.memory['encode']==pytest.approx(plan.counts['encode']['bytes']/1e9*images/ENCODED)

@pytest.mark.parametrize(
    'changes, message',
    [({}, "evaluation needs a split 'validation'"), (dict(patience=2), 'patience needs a validation loss')],
)
def test_no_plan_is_made_of_a_run_that_cannot_be_made(changes, message, monkeypatch):
    monkeypatch.setattr(estimate, 'planned_data', lambda h: dict(train=range(5), test=range(5)))
    h = as_hyperparameters(evaluation_enabled=not changes, **changes)
    with pytest.raises(ValueError, match=message):
        Plan(h, T4)
    assert Plan(replace(h, evaluation_enabled=False, patience=None), T4).images==dict(train=5)

# of the memory in use, half a gigabyte is cached files
@pytest.mark.parametrize('limit, free', [('3000000000', 2.5), ('max', 7.), ('90000000000', 7.), (None, 7.)])
def test_a_container_has_less_memory_than_its_host(limit, free, tmp_path, monkeypatch):
    monkeypatch.setattr('psutil.virtual_memory', lambda: SimpleNamespace(available=7_000_000_000))
    monkeypatch.setattr(estimate, 'CGROUP', tmp_path)
    if limit:
        (tmp_path/'memory.max').write_text(limit+'\n')
        (tmp_path/'memory.current').write_text('1000000000\n')
        (tmp_path/'memory.stat').write_text('file 600000000\ninactive_file 500000000\n')
    assert estimate.free_memory('cpu')==free

def test_what_a_run_writes_is_planned(tmp_path):
    h = as_hyperparameters(
        training_size_limit=64, num_epochs=3, features='patch', evaluation_enabled=False,
        output_dir=str(tmp_path/'runs'), features_dir=str(tmp_path/'features'),
    )
    plan = Plan(h)
    train(h)
    gb = lambda folder, *kinds: sum(f.stat().st_size for k in kinds for f in (tmp_path/folder).rglob(k))/1e9
    assert gb('runs', '*.pth', '*.pt')==pytest.approx(plan.checkpoints, rel=.05)
    assert gb('features', '*.npy')==pytest.approx(plan.features, rel=.05)
    kept = Plan(replace(h, keep_checkpoints=1)).checkpoints
    assert kept==pytest.approx(plan.checkpoints*5/6) # the last one, the best one, and a training state
    assert f"MB of features in {tmp_path/'features'}" in plan_text(plan)

def test_time_is_multiplied_out():
    plan = plan_of('experiment') # 100 images, 25 steps, no evaluation
    assert run_seconds(plan, dict(prepare=.25, encode=.5, step=2, token=9)) == dict(encoding=75, training=50)
    # 200 validation, 300 test and 200 compositional images, written 32 at a time
    scored = Plan(as_hyperparameters(training_size_limit=64, num_epochs=3))
    slower = [run_seconds(scored, dict(prepare=0, encode=0, step=0, token=t)) for t in (1, 2)]
    assert slower[0]['training'] == 0 and slower[0]['validation'] == 3*7*32
    assert slower[1]['test'] == 2*slower[0]['test'] == 2*(10+7)*(32+48)

# --- Time

H100 = Ceilings('NVIDIA H100 80GB HBM3', 694.2e12, 3.01e12, 17.7e-6, 3e-6)
BEFORE = json.loads((ROOT/'nbs/h100_before.json').read_text(encoding='utf-8'))
REAL = dict(preset='flickr30k', prefix_length=1)

def test_a_rehearsal_uses_the_layers_of_a_run(monkeypatch):
    "What is timed has the fast reader and writer, and oneDNN's layers where they pay, as a run has them."
    timed = []
    def noted(model, *args):
        timed.append(model)
        return phases(model, *args)
    monkeypatch.setattr(estimate, 'phases', noted)
    seconds = estimate.time_phases(as_hyperparameters(batch_size=2), describe_hardware('cpu'), 2)
    assert is_fast(timed[0]) and all(s > 0 for s in seconds.values())
    assert set(seconds) == {'prepare', 'encode', 'step', 'token'}
    use_onednn(again := copy.deepcopy(timed[0].decoder))
    kinds = [[type(m) for m in decoder.modules()] for decoder in (timed[0].decoder, again)]
    assert kinds[0] == kinds[1]

@pytest.mark.parametrize(
    'changes, milliseconds',
    [
        *((dict(batch_size=n), BEFORE['training'][f'capnb, batch {n}']['ms']) for n in (8, 32, 128, 512)),
        *(
            (dict(batch_size=n, captions_per_image=5, features='patch'), row['ms'])
            for n in (8, 32) for row in [BEFORE['patches'][f'capnb, {n} x 5']]
        ),
    ],
)
def test_a_step_is_predicted_from_the_ceilings(changes, milliseconds):
    "A step that Python starts, within a factor of 1.5 of what an H100 took."
    work = training_work(as_hyperparameters(**REAL, **changes))
    assert 1/1.5 < 1e3*work_seconds(work, H100)/milliseconds < 1.5

@pytest.mark.parametrize('work', [training_work, recorded_work])
def test_the_work_of_a_step_heeds_the_settings(work):
    "Short captions are less of it, and parts of a batch as much."
    h = as_hyperparameters(**REAL, batch_size=128)
    flops = lambda **changes: sum(f for f,_ in work(as_hyperparameters(h, **changes)))
    whole = flops()
    assert flops(max_caption_length=4) < .5*whole and flops(max_caption_length=42) == whole
    assert flops(micro_batch_size=32) == pytest.approx(whole, rel=.1)
    assert len(work(as_hyperparameters(h, micro_batch_size=32))) > 3.5*len(work(h))

@pytest.mark.parametrize('batch, limit', [(8, .8), (128, 128/18.8)])
def test_a_replayed_step_is_between_its_limit_and_an_eager_one(batch, limit):
    work = training_work(as_hyperparameters(**REAL, batch_size=batch))
    replayed, eager = (1e3*work_seconds(work, H100, r) for r in (True, False))
    assert limit < replayed < eager/1.5

def test_all_of_a_run_is_predicted():
    """A step and a token take less than the prototypes that were replayed, whose norms were eight kernels;
    the encoder is near what it does alone."""
    h = as_hyperparameters(**REAL, batch_size=8)
    found, prototypes = estimate.predict_phases(h, H100, .001), BEFORE['prototypes']
    plain = 1e3*work_seconds(writing_work(h, 256), H100, True)
    assert 1/1.5 < plain/prototypes['writing']['256 rows']['ms'] < 1.5
    assert 1/3 < 1e3*found['step']/prototypes['training']['batch 8']['ms'] < .7
    assert 1/2 < 1e3*found['token']/prototypes['writing']['256 rows']['ms'] < .8
    assert 1/1.5 < 1/found['encode']/BEFORE['encoding']['ViT-B/32, batch 256'] < 1.5
    plan = Plan(as_hyperparameters(preset='flickr30k-full', batch_size=8), GPU)
    parts = run_seconds(plan, found)
    assert parts['training'] == plan.steps*found['step']
    assert 0 < parts['validation'] < parts['training'] and 0 < parts['test']

def test_the_step_that_would_run_is_predicted(monkeypatch):
    "Recorded, also where layers unfreeze; started by Python where it cannot be; norms are one kernel each."
    h = as_hyperparameters(**REAL, batch_size=8)
    seconds = lambda h: estimate.predict_phases(h, H100, .001)['step']
    recorded = seconds(h)
    assert recorded==work_seconds(recorded_work(h), H100, True) < .02
    assert seconds(as_hyperparameters(h, unfreeze_layers=1, unfreeze_epoch=1)) < .02
    layers = planned_config(h.tokenizer_name, 'decoder').num_hidden_layers
    assert len(training_work(h))-len(recorded_work(h)) > 20*4*layers
    assert seconds(as_hyperparameters(h, prompt='A photo of')) > 4*recorded
    monkeypatch.setattr(estimate, 'why_not', lambda *args: 'captions cannot share rows in this decoder')
    assert 4*recorded < seconds(h) < .7*work_seconds(training_work(h), H100)

GPU = Hardware('cuda', 'NVIDIA H100', 80, (9,0), True)

def test_dry_run_on_a_gpu_measures_ceilings_and_no_step(monkeypatch, capsys):
    monkeypatch.setattr(estimate, 'describe_hardware', lambda: GPU)
    monkeypatch.setattr(estimate, 'measure_ceilings', lambda device: H100)
    monkeypatch.setattr(estimate, 'prepare_seconds', lambda h, device: 1/1400)
    monkeypatch.setattr(estimate, 'time_phases', lambda *args: pytest.fail('a step was rehearsed'))
    estimate.dry_run(as_hyperparameters(preset='flickr30k-full'), free=80)
    said = capsys.readouterr().out
    assert '694 TFLOP/s, 3.01 TB/s, 17.7 µs per launch, 3.0 µs per replayed operation' in said
    assert re.search(r'time .* expected: encoding \d+ s, .*; 0\.0\d\d s per step', said)

@pytest.mark.parametrize('capability, runs', [
    ((6, 0), False), ((7, 0), False), ((7, 5), True), ((8, 6), True), ((9, 0), True), ((12, 1), True),
])
def test_a_gpu_without_kernels_is_refused(capability, runs, monkeypatch):
    major, minor = capability
    gpu = SimpleNamespace(name='Tesla', total_memory=16e9, major=major, minor=minor)
    for name, stand_in in dict(
        get_device_properties=lambda device: gpu, device=lambda device: nullcontext(),
        get_arch_list=lambda: ['sm_75', 'sm_80', 'sm_90a', 'compute_120'],
        is_bf16_supported=lambda **how: True,
    ).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    if runs:
        assert describe_hardware('cuda').name=='Tesla'
        return
    with pytest.raises(ValueError, match='no kernels for Tesla, of .* 6.0;|no kernels for Tesla, of .* 7.0;'):
        describe_hardware('cuda')

def test_a_dry_run_that_runs_out_of_memory_says_so(monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(estimate, 'describe_hardware', lambda: GPU)
    monkeypatch.setattr(estimate, 'measure_ceilings', full)
    with pytest.raises(ValueError, match='^out of memory; what helps: no other program on the device'):
        estimate.dry_run(as_hyperparameters(preset='flickr30k-full'), free=80)

# --- Downloads

def files(cached, *names):
    return [SimpleNamespace(filename=n, file_size=size, will_download=not cached) for n,size in names]

@pytest.mark.parametrize(
    'cached, names, gb',
    [
        (False, [('model.safetensors', 10**9), ('pytorch_model.bin', 10**9), ('config.json', 10**6)], 1.001),
        (False, [('pytorch_model.bin', 2 * 10**9)], 2),
        (True, [('model.safetensors', 10**9)], 0),
    ],
)
def test_the_hub_says_how_large(monkeypatch, cached, names, gb):
    monkeypatch.setattr(
        huggingface_hub,
        'snapshot_download',
        lambda name, dry_run, **kwargs: (
            files(cached, *names) if dry_run else pytest.fail('this would download')
        ),
    )
    size, how = download_of('Qwen/Qwen3-0.6B-Base')
    assert size == pytest.approx(gb) and how == ('is in the cache' if cached else 'says the hub')

def test_without_the_hub_it_is_an_estimate(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError('no network')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', unreachable)
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda *args, **kwargs: None)
    size, how = download_of('openai/clip-vit-base-patch32')
    assert size == pytest.approx(.605, abs=.001) and 'estimated' in how # 605 MB is what the file has

@pytest.mark.parametrize('name, where, revision, weights', [
    ('a/b@3d74acf', 'a/b', '3d74acf', '*.safetensors'), ('a/b/c.gguf', 'a/b', None, 'c.gguf'),
])
def test_a_revision_and_a_gguf_file_are_part_of_a_name(monkeypatch, name, where, revision, weights):
    def asked(path, revision, dry_run, allow_patterns, ignore_patterns):
        asked.found = path, revision, weights in allow_patterns
        return []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', asked)
    assert download_of(name) == (0, 'is in the cache') and asked.found == (where, revision, True)

# --- The commands

def test_dry_run_begins_nothing(call, tmp_path):
    done = call('capnb_train', '--dry_run', '--num_epochs', 2, '--training_size_limit', 320, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        '320 train' in done.stdout
        and '20 steps of 32 images in 2 epochs' in done.stdout
        and re.search(r'[\d.]+ s per step', done.stdout)
    )
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize(
    'flags, message',
    [
        (['--encoder_name', 'nobody/nothing'], 'train: model nobody/nothing: '),
        (['--image_size', 60], "train: image_size is 60, but encoder 'storybook-clip' takes multiples of 8"),
        (['--data', 'coco'], "train: how many images the data set 'coco' has is not known beforehand"),
        (['--batch_size', 0], 'train: batch_size is 0'),
        (
            ['--unfreeze_layers', '9'],
            "train: unfreeze_layers is 9, but decoder 'storybook-qwen3' has 4 layers",
        ),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        train_command(['--dry_run', *map(str, flags)])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err.startswith(message) and len(err.splitlines()) == 1 and not out

@slow
def test_dry_run_at_real_size(run, tmp_path):
    done = run('capnb_train', '--dry_run', '--preset', 'flickr30k', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'decoder 596.0' in done.stdout and ('s per step' in done.stdout or 'not measured' in done.stdout)
    assert not list(tmp_path.iterdir())

@slow
def test_real_sizes_in_the_chapter():
    """The cells flagged slow: memory of a real-size step, and a step, an evaluation, a checkpoint and a
    caption with ViT-B/32 and Qwen3-0.6B. Wants npm, for the tokenizer."""
    done = subprocess.run(
        ['nbdev_test', '--flags', 'slow', '--path', 'nbs/34_planning.ipynb'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

# --- The table of results

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('results')
    book = [{k: Storybook()[i][k] for k in ('image', 'captions')} for i in range(24)]
    data = dict(train=book[:16], validation=book[16:20], test=book[20:])
    return train(data=data, num_epochs=2, max_caption_length=24, output_dir=str(folder)).checkpoint

def test_one_command_checks_figures(tmp_path, capsys):
    file, page = tmp_path/'nbs/results.json', tmp_path/'README.md'
    file.parent.mkdir()
    scores = dict(bleu_1=[.612, .6, .62], **{f'rouge_l{k}': [.4]*3 for k in ('', '_common', '_nearest')})
    row = dict.fromkeys(FIELDS) | dict(
        experiment='grid', seed=0, split='test', encoder='e', decoder='d', data='x', epochs=1., seconds=60.,
        device='cpu', date='2026-01-01', scores=scores,
    )
    write_row(row, file)
    page.write_text('BLEU-1 **61.2<!-- results: grid 0 test bleu_1 -->**')
    results_command(['--check', '--file', str(file)])
    assert '1 figures and rows of tables agree' in capsys.readouterr().out
    page.write_text('BLEU-1 **62.2<!-- results: grid 0 test bleu_1 -->**')
    for arguments, error in (
        (['--check', '--file', str(file)], 'README.md: 62.2 stands for grid 0 test bleu_1, which is 0.612'),
        ([], 'name a checkpoint, or ask for --check'),
        (['some.pth', '--check'], 'name a checkpoint, or ask for --check'),
    ):
        with pytest.raises(SystemExit):
            results_command(arguments)
        assert error in capsys.readouterr().err

def test_one_command_fills_the_table(call, tmp_path, checkpoint):
    file = str(tmp_path/'results.json')
    for hardware in ('T4', 'T4'):
        results_command([str(checkpoint), '--hardware', hardware, '--file', file])
    done = call('capnb_results', checkpoint, '--hardware', 'A100', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, metadata = json.loads((tmp_path / 'results.json').read_text(encoding='utf-8')), read_metadata(
        checkpoint
    )
    assert [r['device'] for r in rows] == ['T4', 'A100'] # the second time replaced the first
    assert (
        rows[0]['rouge_l'] == metadata['test']['rouge_l']
        and rows[0]['last_loss'] == metadata['training_loss']
    )
    first_epoch = read_metadata(checkpoint.with_name(checkpoint.name.replace('-2.pth', '-1.pth')))
    assert rows[0]['seconds'] == pytest.approx(first_epoch['seconds']+metadata['seconds'])
    assert rows[0]['settings'] == 'storybook (num_epochs 2, max_caption_length 24)'
    assert (
        (tmp_path / 'results.md').read_text(encoding='utf-8').strip()
        == results_table(rows)
        == done.stdout.strip()
    )

def test_a_run_of_which_some_checkpoints_were_kept_has_a_row(tmp_path, checkpoint):
    "Its other epochs count as long as those that are there."
    for file in checkpoint.parent.glob('*-2.*'):
        shutil.copy(file, tmp_path)
    row, whole = result_row(tmp_path/checkpoint.name), result_row(checkpoint)
    assert row['seconds'] == pytest.approx(2*read_metadata(checkpoint)['seconds'])
    assert {k: v for k,v in row.items() if k != 'seconds'} == {k: whole[k] for k in FIELDS if k != 'seconds'}

def test_each_seed_has_a_row(checkpoint):
    "A row replaces that of its seed, and one that was planned without a seed."
    row = result_row(checkpoint)
    other = dict(row, seed=row['seed']+1)
    rows = add_row(add_row([], row), other)
    assert [r['seed'] for r in rows]==[0, 1] and add_row(rows, row)==rows
    assert add_row([dict(row, seed=None, date=None)], other)==[other]
    first, second = results_table(rows).splitlines()[2:]
    assert ', seed 1 |' in second and 'seed' not in first

def test_rows_of_other_data_with_the_same_name_are_kept(checkpoint):
    row = dict(result_row(checkpoint), data=OWN_DATA)
    larger = dict(row, training_images=row['training_images']+1)
    assert add_row([row], larger)==[row, larger] and add_row([row, larger], row)==[row, larger]

def test_a_row_of_an_earlier_version_has_the_seed_of_then(checkpoint):
    old = dict(result_row(checkpoint), seed=None)
    assert add_row([old], dict(old, seed=0))==[dict(old, seed=0)]
    assert len(add_row([old], dict(old, seed=1)))==2

@pytest.mark.parametrize('end', ['best', '9'])
def test_a_renamed_checkpoint_is_told(end, tmp_path, checkpoint):
    for file in checkpoint.parent.glob('*-2.*'):
        shutil.copy(file, tmp_path/file.name.replace('-2.', f'-{end}.'))
    with pytest.raises(ValueError, match='was renamed'):
        result_row(tmp_path/checkpoint.name.replace('-2.', f'-{end}.'))

def test_the_captioner_that_ships_has_a_row(tmp_path):
    file = tmp_path/'results.json'
    results_command(['storybook', '--file', str(file)])
    [row] = json.loads(file.read_text(encoding='utf-8'))
    assert row['rouge_l'] > .7 and row['seconds'] > read_metadata(shipped_checkpoint())['seconds']

def test_a_table_from_before_goes_on(tmp_path, checkpoint):
    "The column was named otherwise."
    file = tmp_path/'results.json'
    row = dict(dict.fromkeys(FIELDS), settings='best', encoder='a', decoder='b', data='c')
    old = {'training_pictures' if k == 'training_images' else k: v for k,v in row.items()}
    file.write_text(json.dumps([old]))
    results_command([str(checkpoint), '--file', str(file)])
    assert json.loads(file.read_text(encoding='utf-8'))[0] == row

@pytest.mark.parametrize(
    'args, message',
    [
        (['nothing.pth'], 'results: nothing.pth has no metadata beside it'),
        (['CHECKPOINT', '--file', 'table.md'], 'results: table.md must end in .json'),
        (['CHECKPOINT', '--file', 'broken.json'], 'results: broken.json is no file of results'),
    ],
)
def test_what_is_no_result_is_told_in_one_line(capsys, monkeypatch, tmp_path, checkpoint, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'broken.json').write_text('[{"settings": "flickr30k"}]')
    with pytest.raises(SystemExit) as end:
        results_command([str(checkpoint) if a=='CHECKPOINT' else a for a in args])
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.startswith(message) and len(err.splitlines()) == 1
    assert (tmp_path/'broken.json').read_text() == '[{"settings": "flickr30k"}]'

def test_form_of_the_committed_table():
    rows = json.loads((ROOT/'nbs/results.json').read_text(encoding='utf-8'))
    assert (ROOT/'nbs/results.md').read_text(encoding='utf-8').strip() == results_table(rows)
    texts, numbers = {'settings', 'encoder', 'decoder', 'data', 'split', 'device', 'date'}, {
        'training_images',
        'first_loss',
        'last_loss',
        'rouge_l',
        'rouge_l_floor',
        'rouge_l_ceiling',
        'seconds',
    }
    assert rows and {r['settings'] for r in rows} >= {'flickr30k', 'flickr30k-full'}
    for row in rows:
        assert tuple(row) == FIELDS
        if row['date'] is None: # not run: no number may be there
            assert all(
                v is None for k, v in row.items() if k not in ('settings', 'encoder', 'decoder', 'data')
            )
            continue
        assert all(isinstance(row[k], str) and row[k] for k in texts) and all(
            isinstance(row[k], (int, float)) for k in numbers
        )
        assert (
            0 <= row['rouge_l'] <= 1
            and 0 <= row['rouge_l_floor'] < row['rouge_l_ceiling'] <= 1
            and row['seconds'] > 0
        )
        # an experiment's encoder may be a module of one's own
        own = bool(row['experiment'])
        assert own or row['encoder'] in KNOWN_MODELS or planned_config(row['encoder'], 'encoder')

# --- The notebook for a GPU

def test_one_switch():
    "As committed it runs the storybook, and what wants a GPU does nothing then."
    cells = [
        ''.join(c['source'])
        for c in json.loads((ROOT / 'nbs/09_flickr30k_on_a_gpu.ipynb').read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code'
    ]
    assert cells[0].startswith('storybook = True')
    for_gpu = [c for c in cells if c.startswith('#| cuda')]
    assert len(for_gpu) >= 4 and all(c.splitlines()[1].startswith('if not storybook:') for c in for_gpu)
    # commands of ours run anywhere, what installs or shows does not
    assert not any(re.search(r'^\s*(%|!(?!capnb_))', c, re.M) for c in cells if c not in for_gpu)
    assert sum('storybook = ' in c for c in cells) == 1
