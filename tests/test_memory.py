"""Little memory: whatever words a device has for it, encoding, writing and training go on with fewer at a
time."""
import pytest, torch
from accelerate import Accelerator
from capnb.build import build_captioner
from capnb.settings import as_hyperparameters
from capnb.data import CaptionData
from capnb.encoder import EncodedData
from capnb.evaluation import nearest_captions
from capnb.out_of_memory import ADVICE, SHORT, in_slices, may_release, memory_ran_out, with_advice
from capnb.fast.cache import encode_data
from capnb.fast.cuda.writing import CudaWriter
from capnb.storybook import Storybook
from capnb.run.entry import train
from capnb.run.resume import SavedRun
from capnb.run.training import backward

SURE = [
    torch.OutOfMemoryError(
        'CUDA out of memory. Tried to allocate 594.00 MiB. GPU 0 has a total capacity of 7.6 GiB'
    ),
    RuntimeError('CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported'),
    RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`'),
    RuntimeError('HIP out of memory. Tried to allocate 2.00 MiB.'),
    RuntimeError('MPS backend out of memory (MPS allocated: 17.9 GB)'),
    RuntimeError('Invalid buffer size: 30.00 GiB'),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:75] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        " to allocate 368596058460 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError(
        '[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to'
        ' allocate 9437184000 bytes.'
    ),
    RuntimeError('MIOpen error: miopenStatusAllocFailed'),
]
PERHAPS = [
    RuntimeError(f'cuDNN error: CUDNN_STATUS_{name}')
    for name in ('INTERNAL_ERROR', 'NOT_SUPPORTED', 'NOT_INITIALIZED', 'EXECUTION_FAILED')
]
PERHAPS += [
    RuntimeError('CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`'),
    RuntimeError('GET was unable to find an engine to execute this computation'),
    RuntimeError('miopenStatusInternalError'),
]
OTHERS = [
    RuntimeError('CUDA error: an illegal memory access was encountered'),
    RuntimeError('CUDA error: device-side assert triggered'),
    ValueError('out of memory'),
    RuntimeError('mat1 and mat2 shapes cannot be multiplied'),
]

GIVEN = '⚠️ Out of memory: caches and recordings are freed, for another try'

@pytest.fixture(scope='module')
def model():
    return build_captioner(
        as_hyperparameters(prefix_length=2, adapter_width=32, max_caption_length=8), 'cpu'
    ).eval()

def holding(most, error, batch_of):
    "A hook that raises `error` where more than `most` rows come."
    def hook(module, args, kwargs):
        if batch_of(args, kwargs) > most: raise error
    return hook

@pytest.fixture
def narrow(model):
    "Let the encoder's tower, or the decoder, hold only so many rows."
    hooks = []
    def narrow(part, most, error):
        names = ['pixel_values'] if part=='encoder' else ['inputs_embeds', 'input_ids']
        count = lambda args, kwargs: next(len(kwargs[n]) for n in names if kwargs.get(n) is not None)
        module = model.encoder.model if part=='encoder' else model.decoder
        hooks.append(module.register_forward_pre_hook(holding(most, error, count), with_kwargs=True))
        return model
    yield narrow
    for hook in hooks:
        hook.remove()
    model.most = model.encoder.most = None

def test_errors_are_known():
    assert all(memory_ran_out(e, alone) for e in SURE for alone in (False, True))
    assert all(memory_ran_out(e) and not memory_ran_out(e, True) for e in PERHAPS)
    assert not any(memory_ran_out(e) for e in OTHERS)

@pytest.fixture
def card(monkeypatch):
    "Say that there is a GPU with so many bytes free."
    def card(free):
        monkeypatch.setattr('torch.cuda.is_available', lambda: True)
        monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
        monkeypatch.setattr('torch.cuda.memory_reserved', lambda i: i) # the second one is in use
        monkeypatch.setattr('torch.cuda.mem_get_info', lambda i: (int(free) if i else 0, 80_000_000_000))
    return card

@pytest.mark.parametrize('error', PERHAPS, ids=str)
def test_what_may_be_memory_is_memory_where_the_card_is_full(error, card):
    card(1.2e9)
    assert memory_ran_out(error, alone=True)
    assert not any(memory_ran_out(other, alone=True) for other in OTHERS)
    card(SHORT)
    assert not memory_ran_out(error, alone=True) and memory_ran_out(error)

@pytest.mark.parametrize('error', [SURE[0], SURE[2], PERHAPS[0], PERHAPS[4]], ids=str)
def test_encoding_goes_on_with_fewer(model, narrow, error, capsys):
    data = CaptionData(Storybook(n=40))
    expected = encode_data(model.encoder, data, batch_size=16, threads=1).features
    capsys.readouterr()
    narrow('encoder', 3, error)
    found = encode_data(model.encoder, data, batch_size=16, threads=1).features
    assert torch.allclose(found, expected, atol=1e-3)
    # once each: the number is remembered
    assert capsys.readouterr().out.splitlines() == [
        f'⚠️ Out of memory with {n} images at a time: going on with {n//2}' for n in (16, 8, 4)
    ]
    assert model.encoder.most == 2

class Cache:
    "Stands for what a writer on a GPU keeps; while it is there, memory holds three rows less."
    def __init__(self):
        self.held = True
        may_release(self)
    def release(self):
        had, self.held = self.held, False
        return had

def test_before_there_are_fewer_images_the_writer_gives_back(capsys):
    cache, sizes = Cache(), []
    def do(here):
        sizes.append(here.stop-here.start)
        if sizes[-1] > 5-3*cache.held: raise SURE[0]
        return sizes[-1]
    assert sum(in_slices(do, 10, 5))==10 and sizes==[5, 5, 5]
    assert capsys.readouterr().out.splitlines() == [GIVEN]
    cache.held = True # it gives once: two that need memory do not take turns
    assert list(in_slices(do, 5, 5))==[2, 2, 1] and cache.held

def test_a_writer_on_a_gpu_gives_back_what_it_keeps(model, narrow, capsys):
    "In the middle of the work of another part, which then goes on as before."
    writer, images = CudaWriter(), [Storybook()[i]['image'] for i in range(4)]
    expected = model.encoder.encode(images)
    writer.generate_rows(model.decoder, model.tokenizer, model.prefix(expected), 2, 32, {})
    class Full:
        def __call__(self, args, kwargs): return 9*bool(writer.held)
    hook = model.encoder.model.register_forward_pre_hook(holding(8, SURE[0], Full()), with_kwargs=True)
    assert writer.held and torch.equal(model.encoder.encode(images), expected) and not writer.held
    assert capsys.readouterr().out.splitlines() == [GIVEN] and model.encoder.most is None
    hook.remove()

@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_a_call_that_failed_leaves_no_small_slices(model, narrow, part):
    images = [Storybook()[i]['image'] for i in range(4)]
    narrow(part, 0, SURE[0])
    with pytest.raises(ValueError, match='out of memory with a single image'):
        model.caption(images)
    assert model.most is None and model.encoder.most is None

@pytest.mark.parametrize('error', PERHAPS, ids=str)
def test_a_single_image_raises_what_was_raised(model, narrow, error):
    narrow('encoder', 0, error)
    with pytest.raises(RuntimeError) as raised:
        encode_data(model.encoder, CaptionData(Storybook(n=4)), threads=1)
    assert raised.value is error

def test_a_single_image_on_a_full_card_is_told_what_helps(card, capsys):
    "As an H100 with 1.2 GB free did: the library fails with every number of images."
    def fails(here):
        raise PERHAPS[0]
    card(1.2e9)
    with pytest.raises(ValueError, match='out of memory with a single image; what helps: .*batch_size'):
        list(in_slices(fails, 4, 4))
    card(60e9)
    with pytest.raises(RuntimeError) as raised:
        list(in_slices(fails, 4, 4))
    assert raised.value is PERHAPS[0]

def test_a_single_image_too_large_is_told(model, narrow):
    narrow('encoder', 0, SURE[1])
    with pytest.raises(ValueError, match='out of memory with a single image; what helps'):
        model.caption(Storybook()[0]['image'])

def test_another_error_is_raised_at_once(model, narrow, capsys):
    narrow('encoder', 0, OTHERS[0])
    with pytest.raises(RuntimeError, match='illegal memory access'):
        encode_data(model.encoder, CaptionData(Storybook(n=4)), threads=1)
    assert 'Out of memory' not in capsys.readouterr().out

@pytest.mark.parametrize(
    'options', [{}, dict(num_beams=2), dict(num_beams=2, num_return_sequences=2)], ids=str
)
def test_writing_goes_on_with_fewer(model, narrow, options, capsys):
    images = [Storybook()[i]['image'] for i in range(10)]
    expected = model.caption(images, **options)
    narrow('decoder', 2*options.get('num_beams', 1), PERHAPS[0])
    assert model.caption(images, **options) == expected and model.most == 2
    assert capsys.readouterr().out.splitlines() == [
        f'⚠️ Out of memory with {n} images at a time: going on with {n//2}' for n in (10, 5)
    ]

@pytest.mark.parametrize('error', PERHAPS[:2], ids=str)
def test_training_raises_what_a_single_caption_raised(model, error):
    class Small:
        tokenizer, decoder, max_caption_length, room = model.tokenizer, model.decoder, 8, 0
        def __call__(self, features, captions):
            if len(captions) > self.room: raise error
            return model(features, captions)
    optimizer = torch.optim.SGD(model.adapter.parameters())
    run = SavedRun(Small(), {}, h=as_hyperparameters())
    with pytest.raises(RuntimeError) as raised:
        backward(run, Accelerator(cpu=True), optimizer, torch.zeros(4, model.encoder.width), ['a cat']*4)
    assert raised.value is error and run.micro_batch_size == 1

@pytest.mark.parametrize(
    'part, name', [('load_encoder', 'storybook-clip'), ('load_decoder', 'storybook-qwen3')]
)
def test_a_card_too_full_for_the_models_is_told(monkeypatch, part, name):
    def full(*args, **kwargs):
        raise SURE[0]
    monkeypatch.setattr(f'capnb.build.{part}', full)
    with pytest.raises(ValueError, match=f"out of memory while '{name}' was loaded; what helps: a smaller"):
        build_captioner(as_hyperparameters(), 'cpu')

@pytest.mark.parametrize('error', [PERHAPS[0], OTHERS[0]], ids=str)
def test_another_error_of_loading_is_raised_as_it_is(monkeypatch, error):
    def fails(*args, **kwargs):
        raise error
    monkeypatch.setattr('capnb.build.load_decoder', fails)
    with pytest.raises(RuntimeError) as raised:
        build_captioner(as_hyperparameters(), 'cpu')
    assert raised.value is error

def test_with_fsdp_no_process_takes_fewer_alone(monkeypatch):
    "The others would wait for its layers, or get those of another one."
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('ACCELERATE_USE_FSDP', 'true')
    sizes = []
    def full(here):
        sizes.append(here.stop-here.start)
        raise SURE[0]
    with pytest.raises(ValueError) as told:
        list(in_slices(full, 8, 4))
    assert 'with FSDP a process cannot take fewer alone' in str(told.value) and ADVICE in str(told.value)
    assert sizes==[4]

def test_training_asks_the_writer_before_it_halves(model, capsys):
    class Cramped:
        tokenizer, decoder, max_caption_length = model.tokenizer, model.decoder, 8
        def __call__(self, features, captions):
            if len(captions) > 4-2*cache.held: raise SURE[0]
            return model(features, captions)
    cache, optimizer = Cache(), torch.optim.SGD(model.adapter.parameters())
    run, features = SavedRun(Cramped(), {}, h=as_hyperparameters()), torch.zeros(4, model.encoder.width)
    backward(run, Accelerator(cpu=True), optimizer, features, ['a cat']*4)
    assert run.micro_batch_size is None and capsys.readouterr().out.splitlines() == [GIVEN]

def test_a_card_too_full_for_an_update_is_told(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SURE[0]
    monkeypatch.setattr(torch.optim.AdamW, 'step', full)
    settings = dict(num_epochs=1, training_size_limit=4, evaluation_enabled=False, output_dir=str(tmp_path))
    with pytest.raises(ValueError) as e:
        train(device='cpu', **settings)
    assert str(e.value)==f'out of memory; what helps: {ADVICE}'
    with pytest.raises(ValueError) as e:
        train(device='cpu', **settings, unfreeze_layers=1, unfreeze_epoch=1)
    told = 'fewer unfreeze_layers, a smaller lora_rank'
    assert str(e.value)==f'out of memory; what helps: {told}, {ADVICE}'

@pytest.mark.parametrize('error', [PERHAPS[0], OTHERS[0], OTHERS[2]], ids=str)
def test_another_error_has_no_advice(error):
    with pytest.raises(type(error)) as raised:
        with with_advice('less'):
            raise error
    assert raised.value is error

def test_a_writer_that_fills_its_cache_in_each_attempt_gives_back_once_for_each_size(capsys):
    "And not for ever: what is freed may be taken again before memory runs out again."
    cache, sizes = Cache(), []
    def do(here):
        may_release(cache)
        cache.held = True
        sizes.append(here.stop-here.start)
        assert len(sizes) < 20
        if sizes[-1] > 1: raise SURE[0]
        return sizes[-1]
    assert list(in_slices(do, 4, 4))==[1]*4 and sizes==[4, 4, 2, 2, 1, 1, 1, 1]

def test_nearest_captions_read_features_in_parts():
    sizes, kept = [], torch.rand(2500, 3, 8)
    class Stored: # as features in the cache of a disk
        def __getitem__(self, here):
            sizes.append(len(kept[here]))
            return kept[here]
    rows = [dict(captions=[str(i)]) for i in range(len(kept))]
    train, data = EncodedData(kept.flip(0), rows[::-1]), EncodedData(Stored(), rows)
    assert nearest_captions(train, data) == [str(i) for i in range(len(kept))]
    assert sum(sizes) == len(kept) and max(sizes) <= 1000
