"""Several captions of an image belong to that image, best first, everywhere; options are checked by name;
captions are printed as they come."""
import io, json, os, shutil, signal
from types import SimpleNamespace
import numpy as np, pyarrow as pa, pytest, torch
from capnb.captioner import Captioner, read_captions
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.run.commands import caption_command
from capnb.fast.parts import make_fast
from capnb.generation import generate_ids
from capnb.options import check_options
from capnb.encoder import EncodedData
from capnb.evaluation import evaluate, write_captions_for
from capnb.score_tables import draw_samples
from capnb.insight.facts import fact_counts, facts_scores
from capnb.many_images import open_images
from capnb.inference import caption_files
from capnb.explanation import explain
from capnb.insight.report.clipscore import clip_scores
from capnb.run.predictions import write_predictions
from capnb.run.scale.jobs import CaptionWorker
from capnb.run.scale.sources import ROW
from capnb.run.serving.worker import answer_batch
from capnb.storybook import Storybook

BEAMS = dict(num_beams=3, num_return_sequences=2)
DRAWN = dict(do_sample=True, num_return_sequences=3)

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('captions')/'saved_models'
    shutil.copytree(shipped_checkpoint().parent, folder)
    return folder/shipped_checkpoint().name

@pytest.fixture(scope='module')
def model(checkpoint): return load_model_from_checkpoint(checkpoint, 'cpu')[0]

@pytest.fixture(scope='module')
def images(): return [Storybook('test')[i]['image'] for i in range(5)]

@pytest.fixture
def files(images, tmp_path):
    "Image files with a broken one among them."
    paths = [tmp_path/f'{i}.png' for i in range(5)]
    for path,image in zip(paths, images, strict=True):
        image.save(path)
    paths[1].write_bytes(b'no image')
    return paths

def nll(model, image, text):
    "Mean negative log-probability of the tokens of a caption, behind this image."
    with torch.no_grad():
        return model(model.encoder.encode([image]), [text]).item()

# --- Which caption belongs to which image

def test_a_row_that_a_stop_string_ends_has_the_same_score_in_a_batch(model, images):
    "`generate` pads it with the end token, which nobody wrote."
    options = dict(scores=True, stop_strings=['cat', 'house', 'on'], max_new_tokens=20)
    batch = model.caption(images, **options)
    alone = [model.caption(image, **options) for image in images]
    assert len({len(text) for text,_ in alone}) > 1 # some rows wait for others
    assert [text for text,_ in batch]==[text for text,_ in alone]
    assert [score for _,score in batch]==pytest.approx([score for _,score in alone], abs=1e-4)

def test_one_caption_is_a_text(model, images):
    alone = model.caption(images[0])
    assert isinstance(alone, str) and model.caption(images[0], num_return_sequences=1) == alone
    assert model.caption(images[:2], num_beams=3, num_return_sequences=1) == model.caption(
        images[:2], num_beams=3
    )

@pytest.mark.parametrize('batch_size', [2, 32])
def test_beams_belong_to_their_image(model, images, batch_size):
    several = model.caption(images, batch_size=batch_size, **BEAMS)
    assert several == [model.caption(image, **BEAMS) for image in images] and {
        len(of_image) for of_image in several
    } == {2}
    assert [of_image[0] for of_image in several] == model.caption(images, num_beams=3)
    assert all(first != second for first,second in several)

def test_scores_are_those_of_transformers(model, images):
    prefix = model.prefix(model.encoder.encode(images))
    end = model.tokenizer.eos_token_id
    for length_penalty in (1., 2.):
        theirs = model.decoder.generate(
            inputs_embeds=prefix,
            attention_mask=torch.ones(prefix.shape[:2]),
            max_new_tokens=48,
            **BEAMS,
            eos_token_id=end,
            pad_token_id=end,
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True
        )
        ours = model.caption(images, scores=True, length_penalty=length_penalty, **BEAMS)
        assert [score for of_image in ours for _, score in of_image] == pytest.approx(
            theirs.sequences_scores.tolist(), abs=1e-4
        )

def test_drawn_captions_belong_to_their_image_best_first(model, images):
    torch.manual_seed(0)
    several = model.caption(images, scores=True, top_k=5, **DRAWN)
    for image,of_image in zip(images, several, strict=True):
        scores = [score for _,score in of_image]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([-nll(model, image, text) for text,_ in of_image], abs=1e-3)

def test_beams_are_best_first_by_the_score_that_is_shown(model, images):
    "Options that change how beams are ranked leave them in another order."
    options = dict(num_beams=5, num_return_sequences=5, exponential_decay_length_penalty=(5, 1.5))
    several = model.caption(images, scores=True, **options)
    for of_image in several:
        scores = [score for _,score in of_image]
        assert scores == sorted(scores, reverse=True)
    assert model.caption(images, **options) == [[text for text,_ in of_image] for of_image in several]

def test_score_of_a_greedy_caption(model, images):
    text, score = model.caption(images[0], scores=True)
    assert text == model.caption(images[0]) and score == pytest.approx(-nll(model, images[0], text), abs=1e-4)

def test_tokens_of_several(model, images):
    prefix = model.prefix(model.encoder.encode(images))
    ids = generate_ids(model.decoder, model.tokenizer, prefix, 48, **BEAMS)
    texts = [text for of_image in model.caption(images, **BEAMS) for text in of_image]
    assert model.tokenizer.batch_decode(ids, skip_special_tokens=True) == texts

def test_no_image_at_all(model):
    assert model.caption([]) == model.caption([], **BEAMS) == []
    assert generate_ids(model.decoder, model.tokenizer, torch.zeros(0, 2, 128)).shape == (0, 0)

def test_files_have_their_captions(model, images, files):
    rows = list(caption_files(model, files, batch_size=3, scores=True, **BEAMS))
    assert [r['file'] for r in rows] == [str(f) for f in files] and [
        r['file'] for r in rows if 'error' in r
    ] == [str(files[1])]
    for row,image in zip(rows, images, strict=True):
        if 'error' in row: continue
        alone = model.caption(image, scores=True, **BEAMS)
        assert row['caption'] == [text for text, _ in alone] and row['score'] == pytest.approx(
            [score for _, score in alone], abs=1e-4
        )
    one = list(caption_files(model, files[2:], scores=True))
    assert [set(r) for r in one] == [{'file', 'caption', 'score'}] * 3 and [
        r['caption'] for r in one
    ] == model.caption(images[2:])

@pytest.mark.parametrize('options', [{}, BEAMS])
def test_rows_at_scale_have_their_captions(model, checkpoint, images, files, options):
    rows = pa.table(
        [[f.name for f in files], [f.read_bytes() for f in files], [None, None, 'lost', None, None]],
        schema=ROW,
    )
    out = CaptionWorker('cpu', torch.get_num_threads(), str(checkpoint), options)(rows).to_pylist()
    assert [r['id'] for r in out] == [f.name for f in files] and [r['id'] for r in out if r['error']] == [
        '1.png',
        '2.png',
    ]
    for row,image in zip(out, images, strict=True):
        if row['error']:
            assert row['caption'] is row['score'] is None
        else:
            assert row['caption'] == model.caption(image, **options)

def test_where_only_one_fits(model, images):
    data = EncodedData(model.encoder.encode(images), [{}]*5)
    for ask in (
        lambda **o: write_captions_for(model, data, **o),
        lambda **o: explain(model, images[0], patches=False, **o),
    ):
        with pytest.raises(ValueError, match='num_return_sequences is 2; allowed: 1, since'):
            ask(**BEAMS)
        ask(num_beams=3)

def test_requests_have_their_captions(model, images):
    """Of several, the best one stands where one would, and all beside it; none is streamed, as beams weigh
    whole sentences."""
    said = []
    asked = [(f'request {i}', image, i==1) for i,image in enumerate(images)]
    best = answer_batch(model, asked, lambda uid, answer: said.append((uid, answer)), BEAMS)
    several = model.caption(images, scores=True, **BEAMS)
    assert [uid for uid, _ in said] == [uid for uid, _, _ in asked] and list(best.values()) == [
        found[0][0] for found in several
    ]
    for (_, answer),found in zip(said, several, strict=True):
        assert answer['caption'] == found[0][0] and [c['caption'] for c in answer['captions']] == [
            text for text, _ in found
        ]
        assert [c['score'] for c in answer['captions']] == pytest.approx(
            [score for _, score in found], abs=1e-3
        )
    said.clear()
    answer_batch(model, asked, lambda uid, answer: said.append(answer), dict(num_beams=3))
    assert said == [dict(caption=caption) for caption in model.caption(images, num_beams=3)]

@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16], ids=str)
def test_a_fast_captioner_writes_under_autocast(checkpoint, images, half):
    fast = make_fast(load_model_from_checkpoint(checkpoint, 'cpu')[0])
    with torch.autocast('cpu', half):
        assert all(fast.caption(images))

# --- Options

FORM = [
    'return_dict_in_generate',
    'output_scores',
    'output_logits',
    'output_attentions',
    'output_hidden_states',
]
REFUSED = {
    **{name: {name: True} for name in FORM},
    'generation_config': dict(generation_config=object()),
    'assistant_model': dict(assistant_model=object()),
    'prompt_lookup_num_tokens': dict(prompt_lookup_num_tokens=3),
    'pad_token_id': dict(pad_token_id=7),
    'input_ids': dict(input_ids=torch.zeros(1, 1)),
    'max_length': dict(max_length=9),
    'forced_bos_token_id': dict(forced_bos_token_id=7),
    'tokenizer': dict(tokenizer=object()),
    'prefix_allowed_tokens_fn': dict(prefix_allowed_tokens_fn=max),
    'custom_generate': dict(custom_generate='who/ever'),
    'num_beam': dict(num_beam=3),
    'temperature': dict(temperature=0.5),
    'top_p': dict(top_p=0.9, num_beams=3),
    'length_penalty': dict(length_penalty=2.0),
    'num_return_sequences': dict(num_return_sequences=2),
    'num_return_sequences ': dict(num_beams=2, num_return_sequences=3),
    'num_return_sequences  ': dict(do_sample=True, num_beams=2, num_return_sequences=3),
    'streamer': dict(streamer=object(), num_beams=3),
    'streamer ': dict(streamer=object(), do_sample=True, num_return_sequences=2),
}

@pytest.mark.parametrize('name', REFUSED)
def test_option_is_refused_by_name(model, images, name):
    with pytest.raises(ValueError, match=f'^{name.strip()} '):
        model.caption(images[0], **REFUSED[name])

def test_options_are_checked_before_images_are_encoded(model, images, monkeypatch):
    monkeypatch.setattr(type(model.encoder), 'encode', lambda *_: pytest.fail('it is told too late'))
    for wrong in (dict(num_beam=3), dict(max_caption_length=20)):
        with pytest.raises(ValueError, match='is not an option for captions'):
            model.caption(images, **wrong)

@pytest.mark.parametrize('wrong', [None, 7, object(), io.BytesIO(b'a\nb')], ids=type)
def test_what_is_no_image_is_named(model, wrong):
    with pytest.raises(ValueError, match=f'images is a {type(wrong).__name__}; a PIL image'):
        model.caption(wrong)

RANGES = dict(
    num_beams=(0, -1, 1.5, True, '3', float('nan')),
    num_return_sequences=(0, -2),
    max_new_tokens=(0, 2.5),
    min_new_tokens=(-1,),
    batch_size=(0, -3),
    top_k=(-1,),
    temperature=(0, -1.0, float('inf'), '1'),
    top_p=(0, 1.1),
    repetition_penalty=(0,),
    do_sample=(1, 'yes'),
)

@pytest.mark.parametrize('name', RANGES)
def test_number_is_out_of_range(model, images, name):
    more = dict(do_sample=True) if name in ('temperature', 'top_p', 'top_k') else {}
    for value in RANGES[name]:
        with pytest.raises(ValueError, match=f'^{name} is .*; allowed: '):
            model.caption(images[0], **{name: value}, **more)

@pytest.mark.parametrize('wrong', RANGES['batch_size'])
def test_files_are_taken_some_at_a_time(model, files, wrong):
    with pytest.raises(ValueError, match='^batch_size is .*; allowed: '):
        next(caption_files(model, files, batch_size=wrong))

@pytest.mark.parametrize('size', [2., np.int64(2), None])
def test_files_are_taken_some_at_a_time_by_any_number(model, files, size):
    assert list(caption_files(model, files, batch_size=size))==list(caption_files(model, files))

@pytest.mark.parametrize('wrong', RANGES['batch_size'])
def test_images_to_score_are_taken_some_at_a_time(model, images, wrong):
    data = EncodedData(model.encoder.encode(images), [{}]*5)
    with pytest.raises(ValueError, match='^batch_size is .*; allowed: '):
        write_captions_for(model, data, batch_size=wrong)
    assert write_captions_for(model, data, batch_size=2.)==model.caption(images)

def test_no_batch_size_is_the_default(model, images):
    features = model.encoder.encode(images)
    assert model.caption_features(features, batch_size=None)==model.caption_features(features)

def test_many_images_are_captioned_some_at_a_time(model, monkeypatch):
    "Prefixes of all might not fit into memory, and on a CPU that ends the process."
    features, sizes = torch.zeros(2500, model.encoder.width), []
    features[:,0] = torch.arange(2500)
    def write(model, features, **options):
        sizes.append(len(features))
        return [f'{number:.0f}' for number in features[:,0].tolist()]
    monkeypatch.setattr(model, 'writer', write)
    assert model.caption_features(features)==[*map(str, range(2500))]
    assert max(sizes) <= 1024 and model.caption_features(features[:0])==[]

def test_features_of_many_images_do_not_stay_on_a_gpu(model, images, monkeypatch):
    features = model.encoder.encode(images)
    on_gpu = SimpleNamespace(cpu=lambda: features)
    monkeypatch.setattr(type(model.encoder), 'encode', lambda *_: on_gpu)
    assert model.caption(images)==model.caption_features(features)

def test_an_error_leaves_the_mode(model, images):
    data = EncodedData(model.encoder.encode(images), [dict(captions=['A cat.'])]*5)
    model.train()
    try:
        with pytest.raises(ValueError, match='num_beam is not an option'):
            evaluate(model, data, num_beam=3)
        assert model.training
    finally:
        model.eval()

def test_numbers_of_other_types(model, images):
    assert check_options(dict(num_beams=3., num_return_sequences=np.int64(2), top_k=None)) == BEAMS
    assert type(check_options(dict(num_beams=np.float32(3)))['num_beams']) is int
    assert model.caption(images[0], max_new_tokens=None) == model.caption(images[0])
    assert (
        model.caption(images[0], max_new_tokens=np.int64(3))
        == model.caption(images[0], max_new_tokens=3)
        == ' '.join(model.caption(images[0]).split()[:3])
    )

def test_more_tokens_than_positions(model, images):
    room = (
        model.decoder.config.max_position_embeddings - model.prefix(model.encoder.encode(images[:1])).shape[1]
    )
    with pytest.raises(ValueError, match=f'^max_new_tokens is {room+1}; allowed: .* up to {room}, as'):
        model.caption(images[0], max_new_tokens=room+1)
    assert model.caption(images[0], max_new_tokens=room) == model.caption(images[0])

def test_streamer_of_more_than_a_batch(model, images):
    with pytest.raises(ValueError, match='^streamer follows one batch'):
        model.caption(images, batch_size=2, streamer=object())

# --- The command prints captions as they come

@pytest.fixture(scope='module')
def folder(checkpoint, images):
    "Where the command finds a checkpoint, two images and a broken one."
    here = checkpoint.parent.parent
    for i in range(2):
        images[i].save(here/f'{i}.png')
    (here/'bad.png').write_bytes(b'no image')
    return here

def test_several_captions_from_the_command(call, model, folder, images):
    flags = ('--num_beams', 3, '--num_return_sequences', 2, '--scores')
    done = call('capnb_caption', '0.png', 'bad.png', '1.png', *flags, '--json', cwd=folder)
    rows = json.loads(done.stdout)
    assert (
        done.returncode == 1
        and [r['file'] for r in rows] == ['0.png', 'bad.png', '1.png']
        and set(rows[1]) == {'file', 'error'}
    )
    assert [r['caption'] for r in rows if 'caption' in r] == model.caption(images[:2], **BEAMS)
    lines = call('capnb_caption', '0.png', 'bad.png', '1.png', *flags, cwd=folder).stdout.splitlines()
    assert lines == [
        f"{r['file']}: {text}  ({score:.3f})"
        for r in rows
        if 'caption' in r
        for text, score in zip(r['caption'], r['score'], strict=True)
    ]
    assert call('capnb_caption', '0.png', cwd=folder).stdout == f'0.png: {model.caption(images[0])}\n'

def test_drawn_captions_from_the_command(call, model, folder, images):
    flags = ('--do_sample', '--num_return_sequences', 3, '--temperature', .8, '--top_p', .95, '--seed', 3)
    lines = call('capnb_caption', '0.png', *flags, cwd=folder).stdout.splitlines()
    torch.manual_seed(3)
    assert lines == [
        f'0.png: {text}' for text in model.caption(images[0], temperature=0.8, top_p=0.95, **DRAWN)
    ]

@pytest.mark.parametrize('command', [('capnb_caption', '0.png'), ('capnb_scale', '.', 'out')])
@pytest.mark.parametrize(
    'flags',
    [('--num_beams', 0), ('--num_beams', -5), ('--num_return_sequences', 0), ('--num_return_sequences', 2)],
    ids=str,
)
def test_number_that_is_not_allowed_is_one_line(call, folder, command, flags):
    done = call(*command, *flags, cwd=folder)
    assert done.returncode != 0 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert f'{flags[0][2:]} is {flags[1]}; allowed: ' in done.stderr and not (folder/'out').exists()

@pytest.mark.parametrize('flags', [(), ('--json',)])
def test_error_does_not_lose_the_captions_before_it(model, folder, monkeypatch, capsys, flags):
    first = model.caption_features
    def fail_later(self, features, *args, **kwargs):
        monkeypatch.setattr(Captioner, 'caption_features', fail)
        return first(features, *args, **kwargs)
    def fail(self, *args, **kwargs):
        raise RuntimeError('out of memory')
    monkeypatch.setattr(Captioner, 'caption_features', fail_later)
    monkeypatch.chdir(folder)
    with pytest.raises(RuntimeError):
        caption_command(['0.png']*40 + [*flags])
    out = capsys.readouterr().out
    assert len(json.loads(out) if flags else out.splitlines()) == 32

@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_interrupt_leaves_whole_json(start, folder):
    with start('capnb_caption', *['0.png', 'bad.png']*4000, '--json', cwd=folder) as process:
        try:
            begun = process.stdout.readline() + process.stdout.readline() # while it is at work
            process.send_signal(signal.SIGINT)
            rows, err = json.loads(begun + process.stdout.read()), process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == 130 and err.splitlines()[-1] == 'stopped', err[-3000:]
    assert 1 <= len(rows) < 8000 and [r['file'] for r in rows] == ['0.png', 'bad.png'] * (len(rows) // 2) + [
        '0.png'
    ] * (len(rows) % 2)

# --- Lists that do not belong together are an error, not cut to the shorter one

FACTS = [Storybook('test')[i]['facts'] for i in range(3)]
UNEQUAL = {
    'facts': lambda images, file: fact_counts(['A red cat.'] * 2, FACTS),
    'mistakes': lambda images, file: facts_scores(['A red cat.'] * 4, FACTS),
    'predictions': lambda images, file: write_predictions(file, ['1', '2', '3'], ['A red cat.'] * 2),
    'drawing': lambda images, file: draw_samples(images[:3], ['A red cat.'] * 2, file),
    'CLIPScore': lambda images, file: clip_scores(torch.ones(1, 4), torch.ones(1, 4), [torch.ones(2, 4)] * 3),
}

@pytest.mark.parametrize('what', UNEQUAL)
def test_unequal_lists_are_refused(images, tmp_path, what):
    with pytest.raises(ValueError, match='zip|belong'):
        UNEQUAL[what](images, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_sources_of_images_may_come_one_by_one(images):
    assert len(list(open_images(iter(images)))) == 5

def test_a_missing_caption_weighs_nothing(model, images):
    "Three captions of one image and two of another: the loss is the mean over the tokens of those five."
    features = model.encoder.encode(images[:2])
    texts = [['A red cat.', 'A cat in the snow.', 'A dog.'], ['A blue boat by the sea.', 'Two boats.']]
    with torch.no_grad():
        nll, mask = read_captions(model, features, texts)
        each = [model.nll(features[i:i+1], [t]) for i,ts in enumerate(texts) for t in ts]
    assert mask.sum(1).tolist()[-1] == 0 and nll[-1].abs().sum() == 0
    total, tokens = sum(n.sum() for n,_ in each), sum(m.sum() for _,m in each)
    torch.testing.assert_close(nll.sum()/mask.sum(), total/tokens)

@pytest.mark.parametrize('captions', ['A red cat.', ['a'], ['a', 'b', 'c', 'd'], []])
def test_there_is_an_entry_for_each_image(model, images, captions):
    features = model.encoder.encode(images[:2])
    n = 1 if isinstance(captions, str) else len(captions)
    with pytest.raises(ValueError, match=f'captions are {n} for 2 images; give a list'):
        model.nll(features, captions)
    with pytest.raises(ValueError, match='for 2 images'):
        model(features, captions)
    assert model.nll(features, [['a', 'b'], ['c']])[0].shape[0]==4
