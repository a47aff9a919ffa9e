"Decoders of other families: their loss, gradient and text, against what `transformers` computes."
import copy, json
from pathlib import Path
from types import SimpleNamespace
import pytest, torch, transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from capnb.fast import decoder_families
from capnb.fast.decoder_families import (
    agrees, compare_decoder, compare_families, compare_family, tiny_config
)
from capnb.hub import model_config, model_path
from capnb import decoder as readable
from capnb.decoder import begin_ids, text_ids, tokenize_captions
from capnb.any_decoder import _check_reading, _settle_end, decoder_config, load_decoder
from capnb.build import check_pair
from capnb.generation import captions_of, generate_ids, write_ids
from capnb.settings import as_hyperparameters
from capnb.unfreezing import add_lora, parameter_groups
from capnb.fast import loss as fast
from capnb.fast.loss import head_is_plain
from capnb.fast.writing import write_ids as fast_write_ids

ROOT = Path(__file__).resolve().parent.parent
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def table(): return json.loads((ROOT/'nbs'/'decoders.json').read_text(encoding='utf-8'))

@pytest.fixture(scope='module')
def tokenizer(): return AutoTokenizer.from_pretrained(model_path('storybook-qwen3'))

def saved(folder, tokenizer, kind, pad_is_zero=True, **settings):
    "A tiny random model of a family as a folder, whose token 0 is padding and so has a row of zeros."
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.update(settings)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data += .2*torch.randn_like(p)
    if pad_is_zero:
        model.get_input_embeddings().weight.data[0] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_decoder(str(folder), device='cpu')

FAMILIES = {  # with what their makers set and the defaults leave out
    'cohere': dict(logit_scale=0.0625),
    'granite': dict(logits_scaling=8.0),
    'gemma2': dict(final_logit_softcapping=5.0),
    'vaultgemma': dict(final_logit_softcapping=30.0),
    'qwen3': {},
    'llama': {},
    'gpt2': {},
    'opt': {},
    'gemma3_text': {},
    'llama4_text': {},
    'inkling_text': {},
    'bloom': {},
    'mamba': {},
}

@pytest.mark.parametrize('way', [readable, fast], ids=['readable', 'fast'])
@pytest.mark.parametrize('pad_is_zero', [True, False], ids=['zero row', 'no zero row'])
@pytest.mark.parametrize('kind', FAMILIES)
def test_the_loss_is_the_models_own(kind, pad_is_zero, way, tokenizer, tmp_path):
    decoder, tokenizer = saved(tmp_path, tokenizer, kind, pad_is_zero, **FAMILIES[kind])
    ids, mask = tokenize_captions(tokenizer, ['A red cat in the snow.', 'A dog.'])
    prefix = (
        decoder.get_input_embeddings()(torch.randint(590, (2, 3), generator=torch.Generator().manual_seed(1)))
        .detach()
        .requires_grad_()
    )
    joined = torch.cat([prefix, decoder.get_input_embeddings()(ids)], 1)
    seen, labels = torch.cat([mask.new_ones(2, 3), mask], 1), torch.cat(
        [ids.new_full((2, 3), -100), ids.masked_fill(mask == 0, -100)], 1
    )
    own = decoder(inputs_embeds=joined, attention_mask=seen, labels=labels).loss
    ours = way.caption_loss(decoder, prefix, ids, mask)
    assert ours.item() == pytest.approx(own.item(), abs=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, prefix)[0] for loss in (ours, own)), atol=1e-5, rtol=1e-4
    )

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    'kind, settings, plain',
    [
        ('gemma2', dict(final_logit_softcapping=None), True),
        ('gemma2', dict(final_logit_softcapping=30.0), False),
        ('gemma2', dict(final_logit_softcapping=300.0), False),
        ('cohere', dict(logit_scale=1.0), True),
        ('cohere', dict(logit_scale=0.9), False),
        ('granite', dict(logits_scaling=1.0), True),
        ('granite', dict(logits_scaling=1.1), False),
        ('llama', {}, True),
        ('phi', {}, True),
    ],
)  # Phi's head has a bias
def test_a_head_is_plain_where_nothing_is_done_to_its_logits(kind, settings, plain, dtype):
    torch.manual_seed(0)
    config = tiny_config(kind)
    config.update(settings)
    decoder = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    decoder.get_input_embeddings().weight.data[0] = 0
    for p in decoder.parameters():
        p.data += .01*torch.randn_like(p) # small, as a cap hides best behind small logits
    assert head_is_plain(decoder.requires_grad_(False)) == plain

def test_a_decoder_that_looks_ahead_is_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match='BertGenerationDecoder.* looks at what comes after a token, too.*is_decoder'
    ):
        saved(tmp_path, tokenizer, 'bert-generation')
    saved(tmp_path/'set', tokenizer, 'bert-generation', is_decoder=True)

@pytest.mark.parametrize('way', [readable, fast], ids=['readable', 'fast'])
def test_a_decoder_whose_positions_are_not_heeded_gets_a_row_for_each_caption(way, tokenizer, tmp_path):
    """It takes position_ids, but counts by itself: two captions in a row would stand at other positions than
    alone."""
    decoder, tokenizer = saved(tmp_path, tokenizer, 'llama')
    rotary = decoder.model.rotary_emb.forward
    decoder.model.rotary_emb.forward = lambda x, position_ids: rotary(
        x, torch.arange(x.shape[1]).expand(len(position_ids), -1)
    )
    ids, mask = tokenize_captions(tokenizer, ['A red cat.', 'A dog in the snow.'])
    prefix = torch.randn(1, 3, 32)
    own = [
        decoder(
            inputs_embeds=torch.cat([prefix, decoder.get_input_embeddings()(i[None])], 1),
            labels=torch.cat([torch.full((1, 3), -100), i[None].masked_fill(m == 0, -100)], 1),
        ).loss
        * m.sum()
        for i, m in zip(ids, mask, strict=True)
    ]
    assert way.caption_loss(decoder, prefix, ids, mask).item() == pytest.approx(
        (sum(own) / mask.sum()).item(), abs=1e-5
    )

@pytest.mark.parametrize('kind', ['git', 'rwkv', 'deepseek_v4', 'gemma3n_text'])
def test_what_cannot_read_vectors_is_refused_in_one_line(kind):
    row = compare_family(kind)
    assert list(row) == ['refused'] and '\n' not in row['refused'] and f"decoder '{kind}'" in row['refused']

def test_no_family_of_the_table_differs():
    assert [
        kind
        for kind, row in table()['families'].items()
        if not (agrees(row) or row.keys() & {'refused', 'not_built'})
    ] == []
    assert sum(map(agrees, table()['families'].values())) > 130

def test_a_family_that_crashes_or_hangs_does_not_stop_the_others(monkeypatch):
    rows = compare_families(['no_such_family', 'gpt2'], processes=1)
    assert 'KeyError' in rows['no_such_family']['failed'] and agrees(rows['gpt2'])
    assert compare_families(['qwen3_next'], seconds=0.01) == {
        'qwen3_next': dict(failed='no answer within 0.01 s')
    }

def test_a_child_that_is_lost_as_it_starts_costs_one_family(monkeypatch):
    lost, start = [], decoder_families._Child.start
    def dies_once(self):
        start(self)
        if not lost:
            lost.append(self)
            raise EOFError
    monkeypatch.setattr(decoder_families._Child, 'start', dies_once)
    rows = compare_families(['llama', 'gpt2'], processes=1)
    assert rows['llama'] == dict(failed='its process was lost') and agrees(rows['gpt2'])

class Spoiled(torch.autograd.Function):
    "A loss that is NaN, or whose gradient is."
    @staticmethod
    def forward(ctx, loss, what): return loss*(torch.nan if what=='loss' else 1)
    @staticmethod
    def backward(ctx, grad): return grad*torch.nan, None

@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_a_nan_of_the_fast_way_does_not_agree(what, monkeypatch, tokenizer, tmp_path):
    def spoiled(*args, **how): return Spoiled.apply(fast.caption_loss(*args, **how), what)
    monkeypatch.setattr(decoder_families, 'caption_loss', spoiled)
    assert not agrees(compare_decoder(*saved(tmp_path, tokenizer, 'llama')))

def test_a_text_that_goes_on_after_its_end_is_not_the_same(monkeypatch, tokenizer, tmp_path):
    made, alone = saved(tmp_path, tokenizer, 'llama'), decoder_families._greedy_alone
    assert compare_decoder(*made)['greedy_equal']
    monkeypatch.setattr(decoder_families, '_greedy_alone', lambda *args: [text[:3] for text in alone(*args)])
    assert not compare_decoder(*made)['greedy_equal']

@pytest.mark.slow
def test_every_family_is_in_the_table_and_as_it_says():
    said = table()['families']
    assert [
        kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in said
    ] == [], 'new families: run capnb_decoders'
    what = lambda row: (
        'agrees' if agrees(row) else '/'.join(row.keys() & {'refused', 'not_built', 'failed'}) or 'differs'
    )
    assert {kind: what(row) for kind, row in compare_families().items()} == {
        kind: what(row) for kind, row in said.items()
    }

@pytest.mark.parametrize('way', [readable, fast], ids=['readable', 'fast'])
def test_a_window_over_columns_of_a_row(way, tokenizer, tmp_path):
    """GPT-Neo looks back over so many columns of the row it reads, in which other captions may lie between a
    caption and its image."""
    # longer than what a decoder is tried with
    decoder, tokenizer = saved(tmp_path, tokenizer, 'gpt_neo', window_size=32)
    ids, mask = tokenize_captions(
        tokenizer,
        [f'A {word} cat in the snow and a dog in the meadow at night.' for word in ('red', 'blue', 'green')],
    )
    prefix = decoder.get_input_embeddings()(
        torch.randint(590, (1, 3), generator=torch.Generator().manual_seed(1))
    ).detach()
    alone = torch.cat([way.token_nll(decoder, prefix, ids[i:i+1], mask[i:i+1]) for i in range(3)])
    torch.testing.assert_close(way.token_nll(decoder, prefix, ids, mask), alone, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('ends, expected', [([14, 15], 14), (15, 15), ([10**6, 14], 14)])
def test_a_tokenizer_without_an_end_takes_the_models(ends, expected):
    tokenizer = AutoTokenizer.from_pretrained(model_path('storybook-qwen3'))
    tokenizer.eos_token = None
    _settle_end(tokenizer, SimpleNamespace(eos_token_id=ends))
    assert tokenizer.eos_token_id==expected

def test_the_end_that_a_models_settings_name_is_no_text():
    tokenizer = AutoTokenizer.from_pretrained(model_path('storybook-qwen3'))
    ids = tokenizer('A red cat', add_special_tokens=False)['input_ids']
    tokenizer.eos_token = None
    _settle_end(tokenizer, SimpleNamespace(eos_token_id=5)) # an ordinary token of the vocabulary
    for rows in [ids+[5]], torch.tensor([ids+[5, 5]]):
        assert captions_of(tokenizer, rows)==['A red cat']

def in_front_of(decoder):
    return SimpleNamespace(adapter=torch.nn.Linear(1, 1), decoder=decoder)

@pytest.mark.parametrize('kind', ['blenderbot', 'pegasus'])
def test_layers_of_the_decoder_half_are_counted(kind, tokenizer, tmp_path):
    "The released ones have fewer layers in the encoder, and their `num_hidden_layers` counts those."
    decoder, tokenizer = saved(tmp_path, tokenizer, kind, decoder_layers=3)
    learns = parameter_groups(in_front_of(decoder), as_hyperparameters(unfreeze_layers=1))['decoder']
    assert learns and all('.layers.2.' in name for name in learns)
    config = decoder_config(tmp_path)
    check_pair(as_hyperparameters(unfreeze_layers=3), model_config('storybook-clip', 'encoder'), config)
    with pytest.raises(ValueError, match='unfreeze_layers is 4, but .* has 3 layers'):
        check_pair(as_hyperparameters(unfreeze_layers=4), model_config('storybook-clip', 'encoder'), config)
    prefix = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    slow, quick = (generate_ids(decoder, tokenizer, prefix, 5, write=w) for w in (write_ids, fast_write_ids))
    assert torch.equal(slow, quick)

def test_a_decoder_whose_layers_are_not_found_trains_without_them(tokenizer, tmp_path):
    model = in_front_of(saved(tmp_path, tokenizer, 'hrm_text')[0])
    assert list(parameter_groups(model, as_hyperparameters()))==['adapter']
    with pytest.raises(ValueError, match='the layers of HrmTextForCausalLM are not found'):
        parameter_groups(model, as_hyperparameters(unfreeze_layers=1))

def test_memory_that_runs_out_is_no_fault_of_the_decoder(tokenizer, tmp_path):
    decoder, _ = saved(tmp_path, tokenizer, 'llama')
    def full(**inputs):
        raise RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)')
    decoder.forward = full
    with pytest.raises(RuntimeError, match='^MPS backend out of memory'):
        _check_reading('mine', decoder)

def test_a_folder_may_be_a_path(tokenizer, tmp_path):
    saved(tmp_path, tokenizer, 'llama')
    assert load_decoder(tmp_path, device='cpu')[0].config.model_type=='llama'

def test_a_special_token_beyond_the_table_does_no_harm(tokenizer, tmp_path):
    "Small Gemma 3 models have the tokenizer of the larger ones, with one for images, and no row for it."
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens(dict(additional_special_tokens=['<image_soft_token>']))
    decoder, larger = saved(tmp_path, larger, 'gemma3_text')
    rows = decoder.get_input_embeddings().num_embeddings
    assert len(larger)==rows+1 and max(text_ids(larger, ['A cat <image_soft_token>'])[0]) < rows

@pytest.mark.parametrize('part', ['a word', 'the end', 'the begin'])
def test_a_token_of_captions_beyond_the_table_is_told(part, tokenizer, tmp_path):
    larger = copy.deepcopy(tokenizer)
    if part=='a word':
        larger.add_tokens(['zebra'])
    elif part=='the end':
        larger.add_special_tokens(dict(eos_token='<end>'))
    else:
        larger.add_special_tokens(dict(bos_token='<begin>'))
        larger._tokenizer.post_processor = TemplateProcessing(
            single='<begin> $A', special_tokens=[('<begin>', larger.bos_token_id)]
        )
        assert begin_ids(larger)==[len(tokenizer)]
    with pytest.raises(ValueError, match='has 597 tokens, decoder .* knows 596'):
        saved(tmp_path, larger, 'llama')

def test_a_decoder_too_large_for_float16_is_told(tokenizer, tmp_path):
    decoder, _ = saved(tmp_path, tokenizer, 'qwen3')
    decoder.model.layers[0].mlp.down_proj.weight.data *= 3e5
    decoder.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        load_decoder(tmp_path, device='cpu', dtype=dtype)
    with pytest.raises(ValueError, match='65,504, which float16 does not hold.* take another decoder'):
        load_decoder(tmp_path, device='cpu', dtype=torch.float16)

@pytest.mark.parametrize('kind', ['mamba', 'mamba2', 'falcon_mamba'])
def test_mamba_takes_lora(kind):
    torch.manual_seed(0)
    decoder, ids = AutoModelForCausalLM.from_config(tiny_config(kind)).eval(), torch.arange(10)[None]
    before = decoder(ids).logits
    add_lora(decoder, as_hyperparameters(lora_rank=2))
    added = {n.split('.lora_')[0].split('.')[-1] for n,_ in decoder.named_parameters() if '.lora_' in n}
    assert 'in_proj' in added and not added & {'out_proj', 'conv1d', 'dt_proj', 'x_proj'}
    torch.testing.assert_close(decoder(ids).logits, before)
    decoder(ids).logits.sum().backward() # each matrix learns
    assert all(p.grad is not None for n,p in decoder.named_parameters() if '.lora_' in n)
