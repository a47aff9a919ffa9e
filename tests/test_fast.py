"The fast parts of a captioner against the readable ones: the same numbers, and nothing else changes."
import copy, random
from types import SimpleNamespace
import pytest, torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import QuickGELUActivation
from capnb.captioner import read_captions, write_captions
from capnb.build import build_captioner
from capnb.unfreezing import parameter_groups, unfreeze
from capnb.data import CaptionData
from capnb.encoder import encode_data
from capnb.fast import cache
from capnb.fast.bench import products_seconds
from capnb.fast.cpu import FrozenLinear, LeanQuickGELU, use_onednn
from capnb.fast.loss import caption_loss, head_is_plain
from capnb.fast.packing import cache_name, reads_rows, share_out, takes_positions
from capnb.fast.parts import is_fast, make_fast
from capnb.fast.quantized import _choose_engine, use_int8
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook

KINDS = {
    'pooled': {}, 'patch': dict(features='patch'), 'lora': dict(lora_rank=4),
    'unfrozen': dict(unfreeze_layers=1, unfreeze_epoch=1)
}

@pytest.fixture(scope='module', params=KINDS)
def pair(request):
    "The same captioner twice, readable and fast, and some encoded pages."
    h = as_hyperparameters(**KINDS[request.param])
    readable, fast = build_captioner(h, 'cpu'), make_fast(build_captioner(h, 'cpu'))
    for model in (readable, fast):
        unfreeze(model, h, 1)
    return readable, fast, encode_data(readable.encoder, CaptionData(Storybook(n=6))), h

def test_a_new_captioner_is_readable_and_a_fast_one_says_so(pair):
    readable, fast, _, _ = pair
    assert (readable.reader, readable.writer) == (read_captions, write_captions)
    assert (is_fast(readable), is_fast(fast), is_fast(make_fast(fast))) == (False, True, True)
    assert readable.state_dict().keys() == fast.state_dict().keys()
    # else it would fall back to rows of their own, and to all logits
    assert takes_positions(fast.decoder, 64) and head_is_plain(fast.decoder)

@pytest.mark.parametrize(
    'some', [lambda i: 1, lambda i: 5, lambda i: 1 + i % 5], ids=['one', 'five', 'one to five']
)
def test_loss_and_gradients_are_the_same(pair, some):
    *models, data, h = pair
    captions, found = [row['captions'][:some(i)] for i,row in enumerate(data.rows)], []
    for model in models:
        parameters = [p for group in parameter_groups(model, h).values() for p in group.values()]
        loss = model(data.features, captions)
        found.append((loss, torch.autograd.grad(loss, parameters)))
    (loss, gradients), (fast_loss, fast_gradients) = found
    torch.testing.assert_close(fast_loss, loss, atol=1e-5, rtol=1e-5)
    largest = max(g.abs().max() for g in gradients)
    for mine, its in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-4*largest.item(), rtol=1e-4)

@pytest.mark.parametrize(
    'options',
    [dict(batch_size=4), dict(max_new_tokens=6, num_beams=2, num_return_sequences=2)],
    ids=str,
)
def test_captions_and_scores_are_the_same(pair, options):
    readable, fast, data, _ = pair
    found = [
        model.eval().caption_features(data.features, scores=True, **options) for model in (readable, fast)
    ]
    flat = [[one for said in some for one in (said if isinstance(said, list) else [said])] for some in found]
    assert [text for text,_ in flat[0]] == [text for text,_ in flat[1]]
    torch.testing.assert_close(
        *(torch.tensor([score for _,score in some]) for some in flat), atol=1e-4, rtol=1e-4
    )
    assert fast.caption_features(data.features, **options) == readable.caption_features(
        data.features, **options
    )

def test_encoding_is_the_same_to_half_precision(pair, tmp_path):
    readable, _, data, _ = pair
    for folder in (None, tmp_path):
        found = cache.encode_data(readable.encoder, CaptionData(Storybook(n=6)), folder=folder)
        assert found.rows == data.rows
        torch.testing.assert_close(found.features[:], data.features, atol=2e-3, rtol=1e-3)

def test_a_fast_encoder_gives_the_same_bits_and_is_found_in_the_same_cache(pair):
    "With an activation that holds one tensor; what learns through it would get its gradient, too."
    readable, fast, *_ = pair
    kinds = [{type(m) for m in model.encoder.modules()} for model in (readable, fast)]
    assert QuickGELUActivation in kinds[0] and QuickGELUActivation not in kinds[1]
    assert LeanQuickGELU in kinds[1]
    images = [Storybook()[i]['image'] for i in range(5)]
    assert torch.equal(*(model.encoder.encode(images) for model in (readable, fast)))
    assert cache.features_key(readable.encoder)==cache.features_key(fast.encoder)
    x = torch.randn(9, requires_grad=True)
    mine, its = (torch.autograd.grad(f(x).sum(), x)[0] for f in (LeanQuickGELU(), QuickGELUActivation()))
    assert torch.equal(mine, its)

@pytest.fixture
def wide():
    "A decoder whose layers are large enough for oneDNN, its head tied to its embeddings."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)

def test_layers_are_replaced_and_weights_are_the_very_same(wide):
    before, ids = dict(wide.named_parameters()), torch.randint(600, (2, 9))
    expected = wide(ids).logits
    use_onednn(wide)
    layers = [m for m in wide.modules() if isinstance(m, nn.Linear)]
    assert layers and {type(layer) for layer in layers} == {FrozenLinear}
    after = dict(wide.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is p for name,p in before.items())
    assert wide.lm_head.weight is wide.get_input_embeddings().weight
    torch.testing.assert_close(wide(ids).logits, expected, atol=1e-4, rtol=1e-4)

def test_what_is_unfrozen_later_learns(wide):
    use_onednn(wide)
    layer = wide.model.layers[-1].mlp.down_proj
    layer.requires_grad_(True)
    caption_loss(
        wide, torch.randn(2, 3, 512), torch.randint(600, (2, 5)), torch.ones(2, 5, dtype=int)
    ).backward()
    assert layer.weight.grad.abs().sum() > 0

@pytest.mark.parametrize('onednn_first', [True, False], ids=['oneDNN, then LoRA', 'LoRA, then oneDNN'])
def test_lora_learns_over_such_layers(wide, onednn_first):
    from peft import LoraConfig, inject_adapter_in_model
    if onednn_first:
        use_onednn(wide)
    inject_adapter_in_model(LoraConfig(r=2, target_modules='all-linear'), wide)
    if not onednn_first:
        use_onednn(wide)
    assert sum(type(m) is FrozenLinear for m in wide.modules()) > 7
    prefix, ids, mask = torch.randn(2, 3, 512), torch.randint(600, (2, 5)), torch.ones(2, 5, dtype=int)
    caption_loss(wide, prefix, ids, mask).backward()
    learned = {name: p.grad for name,p in wide.named_parameters() if p.requires_grad}
    assert learned and all('.lora_' in name and grad is not None for name,grad in learned.items())

def test_small_integers_after_onednn(wide):
    exact = copy.deepcopy(wide)
    use_onednn(wide)
    assert head_is_plain(wide) # it is remembered, and must be forgotten
    use_int8(wide)
    assert not any(type(m) in (FrozenLinear, nn.Linear) for m in wide.modules())
    assert reads_rows(wide) and not head_is_plain(wide)
    inputs = torch.randn(2, 3, 512)*.02, torch.randint(600, (2, 5)), torch.ones(2, 5, dtype=int)
    assert 0 < abs(caption_loss(wide, *inputs)/caption_loss(exact, *inputs)-1) < .05

@pytest.mark.parametrize('known', [['qnnpack', 'none'], ['none']])
def test_small_integers_choose_an_engine_where_there_is_none(wide, monkeypatch, known):
    quantized = SimpleNamespace(engine='none', supported_engines=known)
    monkeypatch.setattr('torch.backends.quantized', quantized)
    if known==['none']:
        with pytest.raises(ValueError, match='no engine for 8-bit integers'):
            use_int8(wide)
    else:
        _choose_engine()
        assert quantized.engine=='qnnpack'

def test_the_bound_of_the_speed_where_there_is_no_onednn(wide, monkeypatch):
    monkeypatch.setattr('capnb.fast.cpu._product', None)
    use_onednn(wide)
    seconds, operations = products_seconds(wide, 8)
    assert seconds > 0 and operations > 0

def test_the_cache_has_the_name_that_the_decoder_gives_it():
    "Since transformers 5.24 it is `cache`."
    new, old = (SimpleNamespace(forward=do) for do in (lambda cache=None: 0, lambda past_key_values=None: 0))
    assert (cache_name(new), cache_name(old))==('cache', 'past_key_values')

def test_a_bias_that_learns_alone_gets_its_gradient():
    layer = nn.Linear(512, 512)
    layer.weight.requires_grad_(False)
    model = nn.Sequential(layer)
    use_onednn(model)
    model(torch.randn(2, 512, requires_grad=True)).sum().backward()
    assert type(model[0]) is FrozenLinear and torch.equal(model[0].bias.grad, torch.full((512,), 2.))

def test_images_go_to_the_shortest_row_and_of_these_to_the_first():
    dice = random.Random(0)
    for _ in range(50):
        sizes, rows = [dice.randint(1, 9) for _ in range(dice.randint(1, 40))], dice.randint(1, 9)
        places, longest = share_out(sizes, rows)
        taken = [0]*rows
        for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            row = taken.index(min(taken))
            assert places[i] == (row, taken[row])
            taken[row] += sizes[i]
        assert longest == max(taken)
