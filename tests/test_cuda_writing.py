"Writing by steps over a cache of fixed size: the same captions as the other ways, here without a recording."
import copy, gc, pickle, weakref
from collections import Counter
from types import SimpleNamespace
import pytest, torch
from transformers import (
    AutoModelForCausalLM, GenerationConfig, GPT2Config, LlamaConfig, MambaConfig, MistralConfig,
    PreTrainedModel
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from capnb.build import build_captioner
from capnb.generation import generate_captions, generate_rows as by_generate
from capnb.fast import writing as chapter_21
from capnb.fast.cuda import rows as cuda_rows, writing as cuda_writing
from capnb.fast.cuda.layers import use_masked_attention
from capnb.fast.cuda.rows import FixedRows, takes_fixed_cache
from capnb.fast.cuda.training import Recorder, why_not
from capnb.fast.cuda.writing import CudaWriter, write_rows
from capnb.fast.packing import takes_positions
from capnb.fast.parts import is_fast, make_fast
from capnb.options import check_options
from capnb.out_of_memory import release_memory
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

@pytest.fixture(scope='module')
def model():
    return build_captioner(as_hyperparameters(), 'cpu')

@pytest.fixture(scope='module')
def prefixes(model):
    "A function of a length: that many vectors for each of ten texts."
    book, embed = Storybook(n=2), model.decoder.get_input_embeddings()
    lines = [model.tokenizer(c)['input_ids'] for i in range(2) for c in book[i]['captions']]
    return lambda k: torch.stack([embed(torch.tensor((ids*9)[-k:])) for ids in lines])

def plain(rows): return [ids.tolist() for ids in rows]

def both(model, prefix, most=16, writer=None, **options):
    "What `generate` and the writer for GPUs write."
    options, writer = check_options(options), writer or CudaWriter()
    args = model.decoder, model.tokenizer, prefix, options.get('max_new_tokens', most)
    return plain(by_generate(*args, 32, options)), plain(writer.generate_rows(*args, 32, options, asked=8))

# --- Greedy captions

@pytest.mark.parametrize('k', [1, 2, 6, 40]) # 40: more than a step looks at without its prefix
@pytest.mark.parametrize('width', [1, 3, 16])
def test_rows_that_are_refilled_write_the_same(model, prefixes, k, width):
    end, prefix, most = model.tokenizer.eos_token_id, prefixes(k), [8+i for i in range(10)]
    with torch.no_grad():
        expected = chapter_21.greedy_ids(model.decoder, prefix, most, end, 4)
    rows = FixedRows(model.decoder, width, k, k+20)
    assert write_rows(rows, prefix, most, {end}) == expected
    assert write_rows(rows, prefix.flip(0), most[::-1], {end}) == expected[::-1] # what was there does no harm

@pytest.mark.parametrize('features', ['pooled', 'patch'])
def test_captions_and_scores_of_a_captioner_are_the_same(features):
    model = make_fast(build_captioner(as_hyperparameters(features=features), 'cpu'))
    pages = [Storybook('test')[i]['image'] for i in range(5)]
    features, writer = model.encoder.encode(pages), CudaWriter()
    with torch.no_grad():
        found = generate_captions(model.decoder, model.tokenizer, model.prefix(features), 24, scores=True,
                                  write=writer.write_ids)
    cut = model.writer(model, features, max_new_tokens=24, scores=True)
    assert [text for text, _ in found] == [text for text, _ in cut] and writer.held
    assert max(abs(a-b) for (_, a), (_, b) in zip(found, cut, strict=True)) < 5e-5

def test_more_steps_than_the_first_columns(model, prefixes):
    rows, prefix = FixedRows(model.decoder, 4, 1, 81), prefixes(1)[:6]
    with torch.no_grad():
        expected = chapter_21.greedy_ids(model.decoder, prefix, [80]*6, None, 4)
    assert write_rows(rows, prefix, [80]*6) == expected
    assert set(rows.runs) == {32, 64, 96} # 96: there is no more room

def test_a_prefix_that_comes_alone_leaves_other_rows_as_they_are(model, prefixes):
    "Sixteen rows read two prefixes at a time; the last of seventeen comes while fifteen others write."
    prefix = prefixes(5).repeat(2, 1, 1)[:17]
    prefix, most = prefix + .01*torch.randn(prefix.shape), [3] + [14]*16
    with torch.no_grad():
        expected = chapter_21.greedy_ids(model.decoder, prefix, most, None, 4)
    assert write_rows(FixedRows(model.decoder, 16, 5, 19), prefix, most) == expected

def test_a_caption_may_end_with_the_first_token_that_is_not_too_early(model, prefixes):
    end = both(model, prefixes(1))[0][0][5] # a token that the first caption says
    ended, _ = both(model, prefixes(1), eos_token_id=end)
    least = len(ended[0])-1 # tokens before it
    expected, found = both(model, prefixes(1), eos_token_id=end, min_new_tokens=least)
    assert found == expected and found[0] == ended[0] and found[0][-1] == end and least > 0

def test_a_caption_does_not_depend_on_its_neighbours(model, prefixes):
    prefix, end = prefixes(2), {model.tokenizer.eos_token_id}
    together = write_rows(FixedRows(model.decoder, 4, 2, 18), prefix, [16]*10, end)
    rows = FixedRows(model.decoder, 1, 2, 18)
    assert [write_rows(rows, one[None], [16], end)[0] for one in prefix] == together

# --- Options

@pytest.mark.parametrize('k', [1, 5])
@pytest.mark.parametrize('options', [
    {}, dict(max_new_tokens=5), dict(min_new_tokens=12), dict(max_new_tokens=6, min_new_tokens=6),
    dict(eos_token_id=14), dict(eos_token_id=[14, 0], min_new_tokens=4), dict(do_sample=True, top_k=1),
], ids=str)
def test_options_do_what_generate_does(model, prefixes, k, options):
    writer = CudaWriter()
    expected, found = both(model, prefixes(k), writer=writer, **options)
    assert found == expected and writer.held

@pytest.mark.parametrize('options', [dict(num_beams=2), dict(repetition_penalty=1.5),
                                     dict(no_repeat_ngram_size=2)], ids=str)
def test_other_options_go_the_other_way(model, prefixes, options):
    writer = CudaWriter()
    expected, found = both(model, prefixes(1)[:3], writer=writer, **options)
    assert found == expected and not writer.held and not writer.told

@pytest.mark.parametrize('options', [
    dict(), dict(temperature=2., top_k=0), dict(temperature=1.5, top_p=.8), dict(top_k=5, min_p=.1),
], ids=str)
def test_what_happens_to_logits_is_what_generate_does(model, prefixes, options):
    options = check_options(dict(options, do_sample=True))
    prefix = prefixes(2)[:3]
    with torch.no_grad():
        out = model.decoder.generate(
            inputs_embeds=prefix, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0, **options)
    mine = cuda_writing._sampler(options)(None, out.logits[0])
    assert torch.equal(mine, out.scores[0])

def test_samples_are_distributed_as_promised_and_a_seed_repeats_them(model, prefixes):
    options, n = check_options(dict(do_sample=True, temperature=1.5, num_return_sequences=400)), 400
    prefix, writer = prefixes(1)[:1], CudaWriter()
    def draw(seed):
        torch.manual_seed(seed)
        return plain(writer.generate_rows(model.decoder, model.tokenizer, prefix, 2, 32, options))
    first = draw(0)
    assert len(first)==n and draw(0)==first and draw(1)!=first
    with torch.no_grad():
        logits = model.decoder(inputs_embeds=prefix).logits[0,-1]
    p = (logits/1.5).masked_fill(logits < logits.topk(50).values[-1], -torch.inf).softmax(0)
    for token, times in Counter(ids[0] for ids in first).items():
        expected = n*p[token].item()
        assert abs(times-expected) < 5*max(1, expected)**.5

# --- Which decoders can

def tiny(config):
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    lm.generation_config = GenerationConfig()
    return lm

SIZES = dict(vocab_size=596, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, pad_token_id=0)
CAN = dict(llama=LlamaConfig(**SIZES), gpt2=GPT2Config(vocab_size=596, n_embd=32, n_layer=2, n_head=4))

@pytest.mark.parametrize('kind', CAN)
@pytest.mark.parametrize('k', [1, 3])
def test_other_families(kind, k):
    lm = tiny(CAN[kind])
    prefix = lm.get_input_embeddings()(torch.randint(0, 500, (7, k)))
    assert takes_fixed_cache(lm) == 2*2*lm.config.hidden_size*4//(2 if kind=='llama' else 1)
    with torch.no_grad():
        expected = chapter_21.greedy_ids(lm, prefix, [12]*7, 0, 3)
    assert write_rows(FixedRows(lm, 3, k, k+12), prefix, [12]*7, {0}) == expected

@pytest.mark.parametrize('config', [
    MambaConfig(vocab_size=596, hidden_size=32, num_hidden_layers=2, pad_token_id=0),
    MistralConfig(**SIZES, sliding_window=8),
], ids=['recurrent', 'window'])
def test_others_write_as_before_and_say_so_once(model, config, caplog):
    lm, writer, options = tiny(config), CudaWriter(), check_options({})
    prefix = lm.get_input_embeddings()(torch.randint(0, 500, (3, 2)))
    for _ in range(2):
        found = plain(writer.generate_rows(lm, model.tokenizer, prefix, 12, 32, options))
        assert found == plain(by_generate(lm, model.tokenizer, prefix, 12, 32, options))
    assert len([r for r in caplog.records if 'without recorded steps' in r.message]) == 1 and not writer.held

def test_a_decoder_whose_cache_gives_other_logits_is_refused(monkeypatch):
    lm, update = tiny(CAN['llama']), cuda_rows._FixedLayer.update
    def forget(self, keys, values, *args, **how):
        keys, values = update(self, keys, values)
        return keys, values/2
    monkeypatch.setattr(cuda_rows._FixedLayer, 'update', forget)
    assert takes_fixed_cache(lm) == 0

# --- What is kept

def test_rows_are_kept_until_weights_change(model, prefixes):
    writer, lm = CudaWriter(), tiny(CAN['llama'])
    def write(n, k=1):
        options = check_options(dict(max_new_tokens=2))
        prefix = lm.get_input_embeddings()(torch.ones(n, k).long())
        writer.generate_rows(lm, model.tokenizer, prefix, 2, 32, options)
        return dict(writer.held)
    first = write(1)
    assert list(first) == [1] and write(1) == first and list(write(5)) == [1, 8] and write(1)[1] is first[1]
    other = write(1, 3)
    assert list(other)==[1] and other[1] is not first[1] # other prefixes: all recordings go together
    kept = write(1)[1]
    prefix = lm.get_input_embeddings()(torch.ones(1, 1).long())
    [ids] = writer.generate_rows(lm, model.tokenizer, prefix, 40, 32, check_options(dict(eos_token_id=599)))
    assert writer.held[1] is not kept and writer.held[1].room > 40 and len(ids)==40 # longer captions
    kept = writer.held[1]
    lm.lm_head.weight.data = lm.lm_head.weight.data.clone() # as after a move: the same numbers elsewhere
    assert write(1)[1] is not kept and list(writer.held) == [1]
    with torch.inference_mode(): # tensors made in it could not be used outside
        write(2)
    assert list(write(2)) == [1, 8]

def test_memory_goes_with_the_captioner(model, prefixes):
    captioner = copy.copy(model)
    captioner.writer = CudaWriter()
    captioner.writer.generate_rows(model.decoder, model.tokenizer, prefixes(3), 2, 32, {})
    gone = weakref.ref(next(iter(captioner.writer.held.values())).cache.layers[0].keys)
    gc.disable() # nothing may wait for it
    try:
        del captioner
        assert gone() is None
    finally:
        gc.enable()

def test_copies_begin_with_nothing(model, prefixes):
    writer = CudaWriter()
    writer.generate_rows(model.decoder, model.tokenizer, prefixes(1)[:1], 2, 32, {})
    for other in (copy.deepcopy(writer), pickle.loads(pickle.dumps(writer))):
        assert isinstance(other, CudaWriter) and not other.held and writer.held

def test_without_memory_it_writes_as_before_and_says_so_once(model, prefixes, monkeypatch, caplog):
    def step(self, longest):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(FixedRows, 'step', step)
    writer = CudaWriter()
    for _ in range(2):
        expected, found = both(model, prefixes(1), writer=writer)
        assert found == expected and not writer.held
    assert len([r for r in caplog.records if 'no memory for the recording' in r.message]) == 1

def test_the_next_call_tries_again_after_memory_was_short(model, prefixes, monkeypatch, caplog):
    "Another program may have left the card."
    tries, step, writer = [], FixedRows.step, CudaWriter()
    def short_once(self, longest):
        tries.append(longest)
        if len(tries)==1: raise torch.OutOfMemoryError('CUDA out of memory')
        return step(self, longest)
    def write(decoder, tokenizer, prefix, most, **options):
        return plain(writer.generate_rows(model.decoder, model.tokenizer, prefix, most, 32, {}))
    assert takes_fixed_cache(model.decoder) # this makes steps, too, and is asked once
    monkeypatch.setattr(FixedRows, 'step', short_once)
    monkeypatch.setattr(cuda_writing, 'generate_captions', write)
    on_gpu = SimpleNamespace(device=torch.device('cuda'))
    captioner = SimpleNamespace(decoder=on_gpu, tokenizer=None, prefix=prefixes, max_caption_length=8)
    first = writer(captioner, 1)
    assert len(tries)==1 and not writer.held
    assert writer(captioner, 1)==first and len(tries) > 1 and writer.held
    assert sum('no memory for the recording' in r.message for r in caplog.records) == 1

def test_a_recording_that_does_not_fit_is_done_without_and_said_once(model, prefixes, monkeypatch, caplog):
    "Also where CUDA, once memory has run out, says no more than that the recording has failed."
    for error in (torch.OutOfMemoryError('CUDA out of memory'),
                  RuntimeError('CUDA error: operation failed due to a previous error during capture')):
        def record(do, error=error):
            raise error
        writer, rows = CudaWriter(), FixedRows(model.decoder, 8, 1, 32)
        rows.records = True # as on a GPU
        rows.recorder = SimpleNamespace(warm_up=lambda do: do(), record=record)
        monkeypatch.setattr(writer, '_rows', lambda *args, rows=rows: rows)
        caplog.clear()
        for _ in range(2):
            expected, found = both(model, prefixes(1), writer=writer)
            assert found == expected
        assert sum('without recorded steps' in r.message for r in caplog.records) == 1

def test_other_errors_are_not_hidden(model, prefixes, monkeypatch):
    monkeypatch.setattr(FixedRows, 'step', lambda self, longest: 1/0)
    with pytest.raises(ZeroDivisionError):
        both(model, prefixes(1))

def test_few_rows_do_not_wait_for_a_recording(model, prefixes, monkeypatch):
    made = []
    def warm_up(do):
        made.append(do)
        raise RuntimeError('called a synchronizing CUDA operation') # a decoder that cannot be recorded
    prefix = prefixes(1)
    def rows(width):
        found = FixedRows(model.decoder, width, 1, 32)
        found.records, found.recorder = True, SimpleNamespace(warm_up=warm_up) # as on a GPU
        return found
    alone = rows(1)
    write_rows(alone, prefix[:1], [24])
    assert not made
    write_rows(alone, prefix[:1], [24]) # now it has paid
    assert len(made)==1 and not alone.records
    write_rows(rows(4), prefix, [2]*10) # more images than rows
    assert len(made)==2

def test_what_recordings_reserve_is_not_free(model, monkeypatch):
    "Of what PyTorch holds, a new cache can take only what belongs to no recording, and on its own card."
    part = lambda size, used, device=0, pool=(0,0): dict(
        total_size=size, allocated_size=used, device=device, segment_pool_id=pool)
    room = takes_fixed_cache(model.decoder)*32 + 12*model.decoder.config.vocab_size # bytes of a row
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (4*room, 0))
    monkeypatch.setattr(torch.cuda, 'get_allocator_backend', lambda: 'native')
    gpu = SimpleNamespace(device=torch.device('cuda', 0), config=model.decoder.config)
    monkeypatch.setattr(cuda_writing, 'takes_fixed_cache', lambda decoder: takes_fixed_cache(model.decoder))
    fits = lambda: CudaWriter()._fits(gpu, 1, 32)
    held = [part(8*room, 0, 0, (0,1)), part(8*room, 0, 1), part(8*room, 5*room)]
    monkeypatch.setattr(torch.cuda, 'memory_snapshot', lambda: held)
    assert not fits()
    held.append(part(room, 0))
    assert fits()

def test_another_allocator_is_not_asked_what_it_holds(model, monkeypatch):
    def refuse():
        raise RuntimeError('Calling snapshot with backend:cudaMallocAsync is not meaningful')
    monkeypatch.setattr(torch.cuda, 'get_allocator_backend', lambda: 'cudaMallocAsync')
    monkeypatch.setattr(torch.cuda, 'memory_snapshot', refuse)
    monkeypatch.setattr(cuda_writing, 'takes_fixed_cache', lambda decoder: takes_fixed_cache(model.decoder))
    gpu = SimpleNamespace(device=torch.device('cuda', 0), config=model.decoder.config)
    for free in (2**40, 8):
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device, free=free: (free, 0))
        assert CudaWriter()._fits(gpu, 1, 32)==(free > 8)

def test_a_writer_can_be_asked_for_memory_again(monkeypatch):
    "It fills its cache in each epoch."
    writer, on_gpu = CudaWriter(), SimpleNamespace(device=torch.device('cuda'))
    captioner = SimpleNamespace(decoder=on_gpu, tokenizer=None, prefix=lambda x: x, max_caption_length=8)
    monkeypatch.setattr(cuda_writing, 'generate_captions', lambda *args, **options: writer.held.update(a=1))
    for _ in range(2):
        writer(captioner, None)
        assert release_memory() and not writer.held and not release_memory()

# --- Where it is put in

@pytest.fixture
def flash(monkeypatch):
    "Stands for a GPU where FlashAttention 2 is installed."
    name, adjust = 'flash_attention_2', PreTrainedModel._check_and_adjust_attn_implementation
    def asked(self, wanted, *args, **kwargs):
        return wanted if wanted==name else adjust(self, wanted, *args, **kwargs)
    monkeypatch.setattr(PreTrainedModel, '_check_and_adjust_attn_implementation', asked)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, ALL_ATTENTION_FUNCTIONS['sdpa'])
    monkeypatch.setattr('capnb.hub.default_attention', lambda device: name)
    monkeypatch.setattr('capnb.hub.default_dtype', lambda device: torch.bfloat16)

def test_where_flash_attention_is_installed_another_is_put_in(flash, model, caplog):
    captioner, features = build_captioner(as_hyperparameters(), 'cpu'), torch.randn(3, model.encoder.width)
    decoder = captioner.decoder
    assert decoder.config._attn_implementation=='flash_attention_2'
    assert not takes_positions(decoder, 7) and not takes_fixed_cache(decoder)
    expected = captioner.caption_features(features)
    with caplog.at_level('INFO', 'capnb'):
        make_fast(make_fast(captioner))
    assert decoder.config._attn_implementation=='sdpa'
    assert takes_positions(decoder, 7) and takes_fixed_cache(decoder)
    assert why_not(captioner, torch.optim.AdamW(captioner.adapter.parameters()), 40) is None
    assert captioner.caption_features(features)==expected
    assert sum('FlashAttention' in r.message for r in caplog.records)==1

def test_an_attention_that_stays_is_not_called_new(flash, monkeypatch):
    "Falcon chooses its attention when it is built."
    decoder = build_captioner(as_hyperparameters(), 'cpu').decoder
    monkeypatch.setattr(decoder, 'set_attn_implementation', lambda name: None)
    assert decoder.config._attn_implementation=='flash_attention_2' and use_masked_attention(decoder)==''

def test_it_is_put_in_on_a_gpu_only(model):
    class OnGpu:
        device, dtype = torch.device('cuda'), torch.float32
        text = SimpleNamespace(_attn_implementation='sdpa')
        config = SimpleNamespace(model_type='gpt2', get_text_config=lambda: OnGpu.text)
        def modules(self): return []
    fast, there = make_fast(copy.copy(model)), copy.copy(model)
    assert fast.writer is chapter_21.write_captions and is_fast(fast)
    there._modules = dict(model._modules, decoder=None)
    object.__setattr__(there, 'decoder', OnGpu())
    del there._modules['decoder']
    writer = make_fast(there).writer
    assert isinstance(writer, CudaWriter) and is_fast(there) and make_fast(there).writer is writer

def test_a_captioner_that_left_the_gpu_writes(model):
    moved, pages = copy.copy(model), [Storybook('test')[0]['image']]
    moved.writer = CudaWriter()
    assert moved.caption(pages) == model.caption(pages) and not moved.writer.held

# --- On a GPU

@gpu
@pytest.mark.parametrize('k', [1, 5])
def test_replay_equals_the_step_itself(k):
    model = build_captioner(as_hyperparameters(), 'cuda')
    embed, end = model.decoder.get_input_embeddings(), {model.tokenizer.eos_token_id}
    prefix, found = embed(torch.randint(0, 500, (90, k), device='cuda')), []
    for recorded in (False, True):
        rows = FixedRows(model.decoder, 32, k, k+24)
        rows.records = recorded
        found += [write_rows(rows, prefix, [24]*90, end), write_rows(rows, prefix, [24]*90, end)]
        assert bool(rows.graphs) == recorded
    assert found[0] == found[1] == found[2] == found[3]

@gpu
def test_a_captioner_on_a_gpu():
    model = make_fast(build_captioner(as_hyperparameters(), 'cuda'))
    features = model.encoder.encode([Storybook('test')[i]['image'] for i in range(12)])
    options = dict(max_new_tokens=24, scores=True)
    expected = chapter_21.write_captions(model, features, **options)
    for _ in range(3): # from the third on it is recorded
        found = model.caption_features(features, **options)
        assert [text for text, _ in found] == [text for text, _ in expected]
    assert model.writer.held
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(model.caption_features(features, do_sample=True, max_new_tokens=24))
    assert drawn[0] == drawn[1]
    assert make_fast(model.to('cpu')).caption_features(features[:2], max_new_tokens=24)

@gpu
def test_a_step_that_waits_is_not_recorded():
    numbers = torch.arange(3., device='cuda')
    recorder = Recorder('cuda')
    with torch.no_grad(), pytest.raises(RuntimeError, match='synchronizing'):
        recorder.warm_up(lambda: numbers.sum().item())
    with torch.no_grad():
        graph, _ = recorder.record(lambda: numbers.add_(1))
    before = numbers.clone()
    graph.replay()
    assert torch.equal(numbers, before+1)
