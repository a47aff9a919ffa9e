"""What a recipe may ask for beside the classic keys: standardised features, features left out at random, and
a learning rate that rises and falls along a cosine; all of it survives saving, stopping and going on."""
import math
from contextlib import nullcontext
from types import SimpleNamespace
import pytest, torch
from transformers import AutoModelForCausalLM
from capnb.adapter import Standardize
from capnb.saving import load_model_from_checkpoint, save_checkpoint
from capnb.build import build_captioner, measure_features
from capnb.checkpoint import read_weights
from capnb.encoder import EncodedData
from capnb.fast.cuda.training import why_not
from capnb.fast.decoder_families import tiny_config
from capnb.fast.parts import make_fast
from capnb import evaluate, load
from capnb.run import entry, recipe
from capnb.run.entry import train
from capnb.run.llava import as_llava
from capnb.run.resume import find_state, read_state
from capnb.run.training import run_training
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from capnb.training import Callback, fit
from capnb.optimizer import make_optimizer

SMALL = dict(prefix_length=2, adapter_width=32, max_caption_length=8, batch_size=8, learning_rate=3e-3)
FORMS = dict(pooled={}, patch=dict(features='patch'))

def made_data(h, n=28, offset=3.):
    "Features far from mean 0 and deviation 1, each of its own size."
    model = build_captioner(h, 'cpu')
    draw, width = torch.Generator().manual_seed(0), model.encoder.width
    shape = (n, 4, width) if h.features=='patch' else (n, width)
    features = offset + torch.linspace(.1, 5, width)*torch.randn(shape, generator=draw)
    texts = ['A cat.', 'Two red hats.', 'A small blue fox sleeps.']
    rows = [dict(captions=[texts[i%3]], image_id=str(i)) for i in range(n)]
    return dict(train=EncodedData(features, rows), validation=EncodedData(features[:8], rows[:8]))

def settings(tmp_path, **changes):
    return as_hyperparameters(**{**SMALL, 'num_epochs': 2, 'output_dir': str(tmp_path), **changes})

class Rates(Callback):
    "The learning rate that each step was made with."
    def __init__(self):
        self.seen = []
    def on_step_end(self, run):
        self.seen.append(run.rates[0])

# --- Standardised features

@pytest.mark.parametrize('form', FORMS)
def test_features_are_measured_on_the_training_images_and_kept(form, tmp_path):
    h = settings(tmp_path, **FORMS[form], standardize_features=True)
    data = made_data(h)
    run = run_training(build_captioner(h, 'cpu'), data, h)
    flat = data['train'].features.flatten(0, -2)
    standard = run.model.adapter.standardize
    assert torch.allclose(standard.mean, flat.mean(0), atol=1e-4)
    assert torch.allclose(standard.std, flat.std(0, correction=0), rtol=1e-4)
    again, *_ = load_model_from_checkpoint(run.checkpoint, 'cpu')
    for name,t in run.model.adapter.state_dict().items():
        assert torch.equal(t, again.adapter.state_dict()[name]), name
    features = data['validation'].features
    assert torch.equal(again.prefix(features), run.model.eval().prefix(features))

def test_large_images_are_measured_a_few_at_a_time():
    "Each has four million numbers."
    class Large:
        def __len__(self): return 6
        def __getitem__(self, some):
            n = len(range(6)[some])
            read.append(n)
            return torch.full((), 2.).expand(n, 2**12, 2**10)
    read, standard = [], Standardize(2**10)
    standard.measure(Large())
    assert sum(read) >= 6 and max(read) <= 4
    assert (standard.mean==2).all() and (standard.std==1).all() # the same in all: only shifted

def test_without_the_option_nothing_is_measured_and_files_are_as_before(tmp_path):
    h = settings(tmp_path)
    run = run_training(build_captioner(h, 'cpu'), made_data(h), h)
    assert not any('standardize' in name for name in read_weights(run.checkpoint))

def test_a_checkpoint_that_lacks_its_statistics_is_refused(tmp_path):
    h = settings(tmp_path, standardize_features=True)
    model = build_captioner(h, 'cpu')
    path = save_checkpoint(model, tmp_path, '20260101_120000', 1, dict(hyperparameters=dict(h)))
    state = torch.load(path, weights_only=True)
    del state['adapter.standardize.std']
    torch.save(state, path)
    with pytest.raises(ValueError, match='adapter.standardize.std is missing'):
        load_model_from_checkpoint(path, 'cpu')

def test_a_run_that_begins_with_a_checkpoint_keeps_its_statistics(tmp_path):
    "What the weights learned with belongs to them; other data does not change it."
    pages = dict(train=Storybook(n=16))
    quick = dict(SMALL, num_epochs=1, evaluation_enabled=False, standardize_features=True)
    first = train(quick, data=pages, output_dir=str(tmp_path/'first'), device='cpu')
    other = dict(train=Storybook(n=40))
    second = train(quick, data=other, init_from=str(first.checkpoint), output_dir=str(tmp_path/'second'),
                   device='cpu')
    a, b = (read_weights(r.checkpoint)['adapter.standardize.mean'] for r in (first, second))
    assert torch.equal(a, b) and a.abs().sum() > 0
    with pytest.raises(ValueError, match='adapter.standardize.mean'):
        train(dict(quick, standardize_features=False), data=other, init_from=str(first.checkpoint),
              output_dir=str(tmp_path/'third'), device='cpu')

def test_measuring_is_asked_for_by_the_form_of_the_adapter(tmp_path):
    h = settings(tmp_path)
    model, data = build_captioner(h, 'cpu'), made_data(h)
    before = {n: t.clone() for n,t in model.adapter.state_dict().items()}
    measure_features(model, data['train'].features)
    assert all(torch.equal(t, before[n]) for n,t in model.adapter.state_dict().items())

def test_a_llava_has_the_standardisation_in_its_projector(tmp_path):
    h = settings(tmp_path, features='patch', standardize_features=True)
    model, features = build_captioner(h, 'cpu').eval(), made_data(h)['train'].features
    measure_features(model, features)
    llava, _ = as_llava(model)
    expected = model.adapter(features)
    assert torch.allclose(llava.model.multi_modal_projector(features), expected, atol=1e-4)

SCALED = {
    'granite': dict(logits_scaling=8.),
    'cohere': dict(logit_scale=.0625),
    'gemma2': dict(final_logit_softcapping=5.),
    'falcon_h1': dict(lm_head_multiplier=.5),
}

@pytest.mark.parametrize('kind', SCALED)
def test_a_decoder_that_changes_its_logits_has_no_form_as_a_llava(kind, tmp_path):
    model, config = build_captioner(settings(tmp_path, features='patch'), 'cpu'), tiny_config(kind)
    config.update(SCALED[kind])
    model.decoder = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match='does not change its logits'):
        as_llava(model)

# --- Features left out at random

@pytest.mark.parametrize('form', FORMS)
def test_features_are_left_out_in_training_only(form, tmp_path):
    h = settings(tmp_path, **FORMS[form], feature_dropout=.5)
    model, features = build_captioner(h, 'cpu'), made_data(h)['validation'].features
    model.train()
    assert not torch.equal(model.adapter(features), model.adapter(features))
    model.eval()
    assert torch.equal(model.adapter(features), model.adapter(features))

# --- A text between image and caption

def test_a_prompt_stands_before_the_caption(tmp_path):
    "The loss is that of the same tokens in a row; the fast way agrees; a checkpoint knows its prompt."
    h = settings(tmp_path, prompt='A photo of', max_caption_length=20)
    model, features = build_captioner(h, 'cpu').eval(), made_data(h)['train'].features[:3]
    captions = ['a cat.', 'two red hats.', 'a small fox.']
    ids = model.tokenizer('A photo of', add_special_tokens=False)['input_ids']
    prefix = model.prefix(features)
    assert prefix.shape[1]==2+len(ids) and len(ids) > 1
    words = model.decoder.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(prefix[:,:2], model.adapter(features)) and torch.equal(prefix[1,2:], words)
    slow = model(features, captions).item()
    path = save_checkpoint(model, tmp_path, '20260101_120000', 1, dict(hyperparameters=dict(h)))
    again = make_fast(load_model_from_checkpoint(path, 'cpu')[0])
    assert again.prompt=='A photo of' and again(features, captions).item()==pytest.approx(slow, rel=1e-4)
    assert again.caption_features(features)==model.caption_features(features)
    plain = build_captioner(settings(tmp_path), 'cpu').eval()
    assert torch.equal(plain.prefix(features), plain.adapter(features))

def test_what_cannot_have_a_prompt_says_so(tmp_path):
    model = build_captioner(settings(tmp_path, prompt='A photo of', features='patch'), 'cpu')
    assert 'a prompt' in why_not(model, torch.optim.AdamW(model.adapter.parameters()), 20)
    with pytest.raises(ValueError, match='a captioner with a prompt has no form as a LLaVA'):
        as_llava(model)

# --- The schedule

def test_the_rate_follows_a_cosine_after_its_warm_up(tmp_path):
    h = settings(tmp_path, lr_scheduler_type='cosine', warmup_ratio=.25, num_epochs=3, weight_decay=.1)
    rates = Rates()
    run = run_training(build_captioner(h, 'cpu'), made_data(h), h, [rates]) # 12 steps, 3 to warm up
    rising, falling = [step/3 for step in range(3)], [.5+.5*math.cos(math.pi*step/9) for step in range(9)]
    assert rates.seen == pytest.approx([3e-3*share for share in rising+falling])
    assert run.optimizer.param_groups[0]['weight_decay']==.1

def test_the_cosine_ends_where_max_steps_ends_the_run(tmp_path):
    h = settings(tmp_path, warmup_ratio=0., num_epochs=3, max_steps=6)
    rates = Rates()
    run_training(build_captioner(h, 'cpu'), made_data(h), h, [rates])
    assert rates.seen == pytest.approx([3e-3*(.5+.5*math.cos(math.pi*step/6)) for step in range(6)])

@pytest.mark.parametrize('decay_step, factors', [(1, (1, .75, .75**2)), (2, (1, 1, .75))])
def test_the_classic_rate_falls_between_epochs(decay_step, factors, tmp_path):
    h = settings(tmp_path, num_epochs=3, learning_rate_decay=.75, learning_rate_decay_step=decay_step)
    rates, told = Rates(), []
    class Told(Callback):
        def on_epoch_end(self, run):
            told.append(run.metadata['learning_rate'])
            assert run.metadata['optimizer_groups'][0]['learning_rate']==told[-1]
    run_training(build_captioner(h, 'cpu'), made_data(h), h, [rates, Told()])
    assert rates.seen == pytest.approx([3e-3*f for f in factors for _ in range(4)])
    assert told == pytest.approx([3e-3*f for f in factors]) # of the epoch that has ended

@pytest.mark.parametrize('recipe', [
    dict(lr_scheduler_type='cosine', warmup_ratio=.2),
    dict(learning_rate_decay=.5, learning_rate_decay_step=1),
])
@pytest.mark.parametrize('stop', [3, 4, 6])
def test_a_run_that_goes_on_has_the_rates_of_one_that_was_not_stopped(recipe, stop, tmp_path, monkeypatch):
    recipe = dict(recipe, standardize_features=True, feature_dropout=.2)
    class Stop(Callback):
        def on_step_end(self, run):
            if len(run.losses)==stop+1: raise KeyError('stopped')
    def run(folder, callbacks, state=None):
        h = settings(folder, checkpoint_steps=1, **recipe)
        return run_training(build_captioner(h, 'cpu'), made_data(h), h, callbacks, state)
    whole, before, after = Rates(), Rates(), Rates()
    expected = run(tmp_path/'whole', [whole])
    with pytest.raises(KeyError, match='stopped'):
        run(tmp_path/'cut', [before, Stop()])
    found = run(tmp_path/'cut', [after], read_state(find_state(tmp_path/'cut')))
    assert after.seen == pytest.approx(whole.seen[stop:]) and found.losses==expected.losses
    for name,t in expected.model.adapter.state_dict().items():
        assert torch.equal(t, found.model.adapter.state_dict()[name]), name

@pytest.mark.parametrize('closed', [True, False], ids=['after an epoch', 'before it was closed'])
def test_a_state_of_a_schedule_that_counted_epochs_goes_on(closed, tmp_path):
    "Training states of before: no rates of the last step; those of the optimizer fall as an epoch closes."
    class Stop(Callback):
        def on_epoch_trained(self, run):
            if not closed: raise KeyError('stopped')
    decayed = dict(num_epochs=3, learning_rate_decay=.5, learning_rate_decay_step=1, checkpoint_steps=1)
    whole, after = Rates(), Rates()
    h = settings(tmp_path/'whole', **decayed)
    expected = run_training(build_captioner(h, 'cpu'), made_data(h), h, [whole])
    cut = settings(tmp_path/'cut', **{**decayed, 'num_epochs': 1})
    with nullcontext() if closed else pytest.raises(KeyError, match='stopped'):
        run_training(build_captioner(cut, 'cpu'), made_data(cut), cut, [Stop()])
    state = read_state(find_state(tmp_path/'cut'))
    del state['rates']
    state['scheduler'] |= dict(step_size=1, last_epoch=int(closed))
    if not closed:
        for group in state['optimizer']['param_groups']:
            group['lr'] = 3e-3
    h = settings(tmp_path/'cut', **decayed)
    found = run_training(build_captioner(h, 'cpu'), made_data(h), h, [after], state)
    assert after.seen == pytest.approx(whole.seen[4:]) and found.losses == pytest.approx(expected.losses)

def test_fit_takes_a_cosine():
    model = torch.nn.Linear(2, 1)
    def loss(model, features, captions):
        value = model(features).mean()
        value.backward()
        return value.item()
    data = EncodedData(torch.randn(8, 2), [dict(captions=['a'])]*8)
    rates = Rates()
    fit(model, dict(train=data), 2, 4, stepper=loss, callbacks=[rates],
        optimizer=make_optimizer(dict(model=dict(model.named_parameters())), 1., cosine_steps=4))
    assert rates.seen == pytest.approx([.5+.5*math.cos(math.pi*step/4) for step in range(4)])

@pytest.mark.parametrize('wrong, told', [
    (dict(lr_scheduler_type='step', warmup_ratio=.1), "is 0.1; it needs lr_scheduler_type 'cosine'"),
    (dict(lr_scheduler_type='cosine', learning_rate_scheduler_enabled=False), 'is false, but'),
    (dict(lr_scheduler_type='linear'), 'allowed: step or cosine'),
    (dict(feature_dropout=1.), 'feature_dropout is 1.0; allowed'),
    (dict(weight_decay=-1.), 'weight_decay is -1.0; allowed'),
])
def test_a_recipe_that_makes_no_sense_is_told(wrong, told):
    with pytest.raises(ValueError, match=told):
        as_hyperparameters(**wrong)

# --- What a run that goes on needs

def without_scores(tmp_path, **changes):
    once = dict(SMALL, num_epochs=1, evaluation_enabled=False, device='cpu')
    return dict(once, output_dir=str(tmp_path), **changes)

def test_a_run_goes_on_without_the_checkpoint_it_began_with(tmp_path):
    pages, other = dict(train=Storybook(n=16)), dict(train=Storybook(n=40))
    first = train(data=pages, **without_scores(tmp_path/'first', standardize_features=True))
    mean = read_weights(first.checkpoint)['adapter.standardize.mean']
    train(data=other, **without_scores(
        tmp_path/'second', standardize_features=True, init_from=str(first.checkpoint)
    ))
    first.checkpoint.unlink()
    last = train(data=other, resume=tmp_path/'second', num_epochs=2, device='cpu')
    assert torch.equal(read_weights(last.checkpoint)['adapter.standardize.mean'], mean)

class PowerCut(Callback):
    def on_step_end(self, run):
        if len(run.losses)==5: raise SystemError('power cut')

def test_running_means_go_on(tmp_path):
    "Of an adapter with BatchNorm, of which an integer is a part."
    def with_norm(h):
        model = build_captioner(h, 'cpu')
        model.adapter.layers.append(torch.nn.BatchNorm1d(model.adapter.layers[3].out_features))
        return model
    h = settings(tmp_path/'whole')
    data = made_data(h)
    whole = run_training(with_norm(h), data, h)
    h = settings(tmp_path/'cut', checkpoint_steps=1)
    with pytest.raises(SystemError):
        run_training(with_norm(h), data, h, [PowerCut()])
    run = run_training(with_norm(h), data, h, state=read_state(find_state(tmp_path/'cut')))
    assert run.losses==whole.losses and run.validation==whole.validation
    for name,t in whole.model.adapter.state_dict().items():
        assert torch.equal(t, run.model.adapter.state_dict()[name]), name

@pytest.mark.parametrize('change, told', [
    (dict(evaluation_enabled=True), "needs a split 'validation', there is only train"),
    (dict(patience=1), 'patience needs a validation loss'),
])
def test_what_is_missing_is_told_before_images_are_encoded(change, told, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, 'encode_data', lambda *args, **how: pytest.fail('images were encoded'))
    with pytest.raises(ValueError, match=told):
        train(data=dict(train=Storybook(n=16)), **without_scores(tmp_path) | change)

def test_checkpoints_in_the_home_folder(tmp_path, monkeypatch):
    for name in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(name, str(tmp_path))
    done = train(data=dict(train=Storybook(n=8)), **without_scores('~/runs'))
    assert done.checkpoint.parent==tmp_path/'runs'
    for how in (dict(folder='~/runs'), dict(checkpoint='~/runs'),
                dict(checkpoint=f'~/runs/{done.checkpoint.name}')):
        assert not load(**how, device='cpu').training

def test_evaluate_asks_for_data_that_was_passed_in_python(tmp_path):
    done = train(data=dict(train=Storybook(n=8)), **without_scores(tmp_path))
    with pytest.raises(ValueError, match='passed in Python; pass data'):
        evaluate(done.checkpoint)

def test_a_trial_is_no_row_of_the_recipe(tmp_path, monkeypatch):
    scores = dict(rouge_l=.5, image_gain=1., facts=dict(pairs=dict(f1=.5)))
    metadata = dict(validation_loss=1., test=scores, compositional=scores)
    monkeypatch.setattr(recipe, 'train', lambda *args, **how: SimpleNamespace(metadata=metadata))
    file = tmp_path/'recipe.json'
    recipe.run_recipe(['cosine'], (0,), file, max_steps=5)
    assert len(recipe.run_recipe(['cosine'], (0, 1), file, max_steps=5))==2 # the trial goes on
    with pytest.raises(ValueError, match='recipe.json has rows of other settings'):
        recipe.run_recipe(['cosine'], (0,), file)
