"""Every way into the library gives a captioner with the fast parts, and they compute what the readable ones
do."""
import queue, signal, types
import pytest, torch
from capnb import captioner as course
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.build import build_captioner
from capnb.encoder import ImageEncoder
from capnb.fast.parts import is_fast, make_fast
from capnb.run import entry, use
from capnb.run.commands import caption_command
from capnb.run.entry import prepare, train
from capnb.run.scoring import score_checkpoint
from capnb.run.sources.load import load_data
from capnb.run.sharing import CapnbForImageCaptioning, share
from capnb.run.sweeps import TrialRunner
from capnb.settings import OWN_DATA, as_hyperparameters
from capnb.storybook import Storybook

SMALL = dict(batch_size=24, num_epochs=2, adapter_width=32, prefix_length=2, max_caption_length=12)

def few_pages():
    return dict(train=Storybook('train', n=48), validation=Storybook('validation', n=12))

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return train(SMALL, data=few_pages(), output_dir=str(tmp_path_factory.mktemp('entry')))

@pytest.fixture(scope='module')
def pages():
    return [Storybook('test')[i]['image'] for i in range(12)]

# --- Each way in

def from_caption_command(trained, folder):
    seen = []
    Storybook('test')[0]['image'].save(folder/'page.png')
    with pytest.MonkeyPatch().context() as m:
        m.setattr('capnb.inference.caption_files', lambda model, *args, **options: seen.append(model) or [])
        caption_command([str(folder/'page.png'), '--checkpoint', str(trained.checkpoint)])
    return seen[0]

def from_eval(trained, folder):
    "Of the captioner that comes with the package, as it knows its data."
    with pytest.MonkeyPatch().context() as m:
        pages = dict(few_pages(), test=Storybook('test', n=2))
        m.setattr('capnb.run.scoring.load_for', lambda h: load_data(pages))
        return score_checkpoint(shipped_checkpoint(), 'test', with_floors=False).model

def from_server(trained, folder):
    from capnb.run.serving.worker import Sight, Worker
    worker = Worker(str(trained.checkpoint), queue.Queue(), types.SimpleNamespace(value=0), Sight(), .01)
    handler = signal.getsignal(signal.SIGINT)
    try:
        worker.setup('cpu')
    finally:
        signal.signal(signal.SIGINT, handler)
    return worker.model

def from_scale(trained, folder):
    jobs = pytest.importorskip('capnb.run.scale.jobs')
    threads = torch.get_num_threads()
    try:
        return jobs.CaptionWorker('cpu', threads, str(trained.checkpoint), {}).model
    finally:
        torch.set_num_threads(threads)

def from_second_trial(trained, folder):
    "It shares the frozen models of the first."
    runner, h = TrialRunner(few_pages()), as_hyperparameters(SMALL, data=OWN_DATA)
    first, second = runner(h), runner(as_hyperparameters(h, learning_rate=1e-3))
    assert is_fast(first) and second.decoder is first.decoder
    return second

def from_shared(trained, folder):
    share(trained.checkpoint, 'cpu').save_pretrained(folder)
    return CapnbForImageCaptioning.from_pretrained(folder, device='cpu').captioner

WAYS = {
    'train': lambda trained, folder: trained.model,
    'prepare': lambda trained, folder: prepare(as_hyperparameters(SMALL, data=OWN_DATA), few_pages())[0],
    'load': lambda trained, folder: use.load(trained.checkpoint),
    'load a folder': lambda trained, folder: use.load(trained.checkpoint.parent),
    'load the best': lambda trained, folder: use.load('best', folder=trained.checkpoint.parent),
    'load the storybook': lambda trained, folder: use.load('storybook'),
    'capnb_caption': from_caption_command,
    'capnb_eval': from_eval,
    'capnb_serve': from_server,
    'capnb_scale': from_scale,
    'capnb_sweep': from_second_trial,
    'share': lambda trained, folder: share(trained.checkpoint, 'cpu').captioner,
    'shared': from_shared,
}

@pytest.mark.parametrize('way', WAYS)
def test_it_has_the_fast_parts(trained, tmp_path, way):
    assert is_fast(WAYS[way](trained, tmp_path))

def test_what_captions_and_scores_in_python_has_them_too(trained, pages, monkeypatch):
    monkeypatch.chdir(trained.checkpoint.parent.parent)
    seen, score = [], use.evaluate_encoded
    monkeypatch.setattr(use, 'evaluate_encoded', lambda model, *a: seen.append(model) or score(model, *a))
    use.evaluate(trained.checkpoint, dict(few_pages(), test=Storybook('test', n=4)))
    monkeypatch.setattr(use.Captioner, 'caption', lambda self, images, **options: seen.append(self) or '')
    use.caption(pages[0], trained.checkpoint)
    assert [is_fast(model) for model in seen] == [True, True]

def album_in(folder, column='caption'):
    "Six images, two for each split."
    folder.mkdir()
    rows = [f'file_name,{column},split']
    for i in range(6):
        Storybook(n=6)[i]['image'].save(folder/f'{i}.png')
        split = ('train', 'validation', 'test')[i//2]
        rows += [f'{i}.png,"{text}",{split}' for text in Storybook(n=6).captions(i)[:2]]
    (folder/'captions.csv').write_text('\n'.join(rows))

def test_other_data_is_not_read_with_the_settings_of_the_training_data(tmp_path, capsys):
    album_in(tmp_path/'mine', 'sentence')
    album_in(tmp_path/'other')
    told = dict(SMALL, caption_column='sentence', evaluation_enabled=False, output_dir=str(tmp_path/'out'))
    done = train(told, data=str(tmp_path/'mine'))
    scores = use.evaluate(done.checkpoint)[0]
    assert scores==use.evaluate(done.checkpoint, str(tmp_path/'other'))[0] and scores['num_images']==2

def test_images_of_the_training_data_are_not_encoded_again(tmp_path, capsys, monkeypatch):
    album_in(tmp_path/'mine')
    told = dict(SMALL, output_dir=str(tmp_path/'out'), features_dir=str(tmp_path/'features'))
    done = train(told, data=str(tmp_path/'mine'))
    def forward(*args):
        raise LookupError('encoded')
    monkeypatch.setattr(ImageEncoder, 'forward', forward)
    assert use.evaluate(done.checkpoint)[0]['num_images']==2
    with pytest.raises(LookupError, match='encoded'):
        use.evaluate(done.checkpoint, dict(few_pages(), test=Storybook('test', n=2)))

def test_images_in_memory_leave_nothing_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    use.evaluate('storybook', dict(few_pages(), test=Storybook('test', n=2)))
    assert not (tmp_path/'cache').exists()

# --- Both ways give the same numbers

def test_the_course_alone_is_the_readable_way(trained):
    model = load_model_from_checkpoint(trained.checkpoint, 'cpu')[0]
    assert not is_fast(model) and not is_fast(build_captioner(as_hyperparameters(SMALL), 'cpu'))
    assert (model.reader, model.writer) == (course.read_captions, course.write_captions)

def test_both_ways_read_and_write_the_same(trained, pages):
    plain, fast = (load_model_from_checkpoint(trained.checkpoint, 'cpu')[0] for _ in range(2))
    make_fast(fast)
    features = plain.encoder.encode(pages)
    captions = [Storybook('test')[i]['captions'][:2] for i in range(len(pages))]
    losses, gradients = [], []
    for model in (plain, fast):
        loss = model(features, captions)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.adapter.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (gradients[0]-gradients[1]).norm() < 1e-4*gradients[0].norm()
    (nll, mask), (others, real) = plain.nll(features, captions), fast.nll(features, captions)
    assert torch.equal(mask, real)
    torch.testing.assert_close(nll*mask, others*real, rtol=1e-4, atol=1e-4)
    assert plain.caption_features(features) == fast.caption_features(features)

def test_both_ways_train_the_same(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(entry, 'make_fast', lambda captioner: captioner)
    plain = train(SMALL, data=few_pages(), output_dir=str(tmp_path))
    assert not is_fast(plain.model)
    for name in ('training_loss', 'validation_loss', 'rouge_l', 'image_gain'):
        assert plain.metadata[name] == pytest.approx(trained.metadata[name], abs=1e-4), name
    assert plain.metadata['losses'] == pytest.approx(trained.metadata['losses'], rel=1e-4)
    for p,q in zip(plain.model.adapter.parameters(), trained.model.adapter.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
