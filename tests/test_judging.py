"""Judging from outside: a CLIP's opinion against the formulas, files of captions that go out and come in,
and the report in a browser."""
import base64, csv, io, json, re, shutil, time
from contextlib import redirect_stdout
import numpy as np, pytest, torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipImageProcessorPil, SiglipModel
from capnb.run.entry import train
from capnb.checkpoint import metadata_path
from capnb.hub import model_path
from capnb.saving import shipped_checkpoint
from capnb.data import CaptionData
from capnb.run.sources.load import load_data
from capnb.encoder import EncodedData
from capnb.insight.report.clipscore import ClipScorer, clip_parts
from capnb.insight.report.judged import judge
from capnb.insight.report.page import image_uri, report_page, training_charts
from capnb.insight.report.slices import image_slices, slices, worst_first
from capnb.run import scoring
from capnb.run.eval import eval_command
from capnb.evaluation import score, score_parts
from capnb.insight.facts import Facts
from capnb.storybook import Storybook

N = 12
EVIL = '<script>document.title="broken"</script><img src=x onerror="document.title=1"> & "a cat"'

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with images, captions and a split for each, and a checkpoint that was trained on it."
    here = tmp_path_factory.mktemp('judging')
    book, table = Storybook(n=40), ['file_name,caption,split']
    (here/'data').mkdir()
    for i in range(40):
        book[i]['image'].resize((400, 300)).save(here/'data'/f'COCO_val2014_{i:012}.jpg')
        split = 'train' if i < 40-2*N else 'validation' if i < 40-N else 'test'
        table += [f'COCO_val2014_{i:012}.jpg,"{c}",{split}' for c in book.captions(i)[:3]]
    (here/'data'/'captions.csv').write_text('\n'.join(table))
    train(
        data=str(here / 'data'),
        num_epochs=2,
        adapter_width=32,
        prefix_length=2,
        max_caption_length=12,
        output_dir=str(here / 'saved_models'),
        features_dir=str(here / 'features'),
        device='cpu',
    )
    return here

@pytest.fixture(scope='module')
def written(made, tmp_path_factory):
    "What one command writes: everything."
    out = tmp_path_factory.mktemp('written')
    said = evaluated(
        '--folder',
        made / 'saved_models',
        '--json_file',
        out / 'scores.json',
        '--csv',
        out / 'scores.csv',
        '--report',
        out / 'report.html',
        '--coco_results',
        out / 'captions.json',
        '--clipscore',
        'storybook-clip',
    )
    return out, said

def evaluated(*args):
    with redirect_stdout(io.StringIO()) as out:
        eval_command([*map(str, args)])
    return out.getvalue()

def refused(capsys, *args):
    with pytest.raises(SystemExit) as e:
        evaluated(*args)
    assert e.value.code == 1
    return capsys.readouterr().err.strip()

# --- A CLIP's opinion

def as_the_authors(image_feats, text_feats, reference_feats):
    """CLIPScore and RefCLIPScore of one image, as `clipscore.py` of the paper has them, with the 0 of the
    paper for captions that are unlike all references."""
    unit = lambda x: x/np.sqrt(np.sum(x**2, axis=-1, keepdims=True))
    per_image_text = 2.5*np.clip(np.sum(unit(image_feats)*unit(text_feats)), 0, None)
    per_text_text = max(np.max(unit(text_feats).dot(unit(reference_feats).T)), 0)
    return per_image_text, (
        2 * per_image_text * per_text_text / (per_image_text + per_text_text) if per_text_text else 0
    )

def saved(folder, model, processor):
    "A model with random weights, as a folder that has a tokenizer, too."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape)*.02)
    model.save_pretrained(folder)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(f"{model_path('storybook-clip')}/{name}", folder)
    if processor is None:
        shutil.copy(f"{model_path('storybook-clip')}/preprocessor_config.json", folder)
    else:
        processor.save_pretrained(folder)
    return model.eval()

def a_siglip():
    half = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return SiglipModel(
        SiglipConfig(
            text_config=dict(
                half,
                vocab_size=433,
                max_position_embeddings=24,
                projection_size=32,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            ),
            vision_config=dict(half, image_size=32, patch_size=8),
        )
    )

def embed_texts(model, tokenizer, texts, kind):
    "What the model itself makes of texts, with the words before them that the paper takes."
    padding = dict(
        clip=dict(padding=True), siglip=dict(padding='max_length', max_length=24, truncation=True)
    )
    ids = tokenizer([f'A photo depicts {t}' for t in texts], return_tensors='pt', **padding[kind])
    mask = dict(attention_mask=ids['attention_mask']) if kind == 'clip' else {}
    with torch.no_grad():
        return model.get_text_features(input_ids=ids['input_ids'], **mask).pooler_output.numpy()

@pytest.mark.parametrize('kind', ['clip', 'siglip'])
def test_clipscore_is_that_of_the_paper(kind, tmp_path):
    torch.manual_seed(0)
    model = (
        CLIPModel(CLIPConfig.from_pretrained(model_path('storybook-clip'))).float()
        if kind == 'clip'
        else a_siglip()
    )
    model = saved(
        tmp_path, model, None if kind == 'clip' else SiglipImageProcessorPil(size=dict(height=32, width=32))
    )
    data, scorer = CaptionData(Storybook('test', n=6)), ClipScorer(str(tmp_path), 'cpu')
    captions, references = [data[i]['captions'][0] for i in range(6)], [
        data[i]['captions'][1:] for i in range(6)
    ]
    parts = clip_parts(scorer, scorer.embed_images(data), captions, references)
    embed = lambda texts: embed_texts(model, scorer.tokenizer, texts, kind)
    with torch.no_grad():
        images = model.get_image_features(
            scorer.encoder.prepare([data[i]['image'] for i in range(6)])
        ).pooler_output.numpy()
    for i in range(6):
        seen, both = as_the_authors(images[i], embed(captions)[i], embed(references[i]))
        assert parts['clipscore'].each[i, 0] == pytest.approx(seen, abs=3e-3) and parts['refclipscore'].each[
            i, 0
        ] == pytest.approx(both, abs=3e-3)
        other, _ = as_the_authors(images[(i+1)%6], embed(captions)[i], embed(references[i]))
        assert parts['clipscore_floor'].each[i,0] == pytest.approx(other, abs=3e-3)
        assert parts['clipscore_ceiling'].each[i, 0] == pytest.approx(
            np.mean([as_the_authors(images[i], r, embed(references[i]))[0] for r in embed(references[i])]),
            abs=3e-3,
        )
    assert len(set(parts['clipscore'].each[:,0].round(4))) > 3 # it depends on the image

def test_a_long_caption_is_cut(tmp_path):
    scorer = ClipScorer('storybook-clip', 'cpu')
    long = scorer.embed_texts(['a red cat '*60, 'a red cat '*80])
    assert torch.allclose(long[0], long[1]) and torch.isfinite(long).all()

@pytest.mark.slow
def test_clipscore_at_real_size(tmp_path):
    torch.manual_seed(0)
    config = CLIPConfig() # the default is openai/clip-vit-base-patch32
    assert (
        config.vision_config.patch_size,
        config.projection_dim,
        config.text_config.max_position_embeddings,
    ) == (32, 512, 77)
    with torch.no_grad():
        CLIPModel(config).half().save_pretrained(tmp_path)
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        shutil.copy(f"{model_path('storybook-clip')}/{name}", tmp_path)
    settings = json.loads(open(f"{model_path('storybook-clip')}/preprocessor_config.json").read())
    (tmp_path / 'preprocessor_config.json').write_text(
        json.dumps(settings | dict(size=dict(shortest_edge=224), crop_size=dict(height=224, width=224)))
    )
    data, scorer = CaptionData(Storybook('test', n=3)), ClipScorer(str(tmp_path), 'cpu')
    images = scorer.embed_images(data)
    assert images.shape == scorer.embed_texts(data[0]['captions'][:3]).shape == (3, 512)
    assert (
        0
        <= clip_parts(scorer, images, ['a cat'] * 3, [data[i]['captions'] for i in range(3)])[
            'clipscore'
        ].value
        <= 2.5
    )

def test_a_single_image_has_no_floor():
    data = CaptionData(Storybook('test', n=1))
    rows = EncodedData(None, data.texts())
    found = judge(data, rows, ['A red cat.'], scorer=ClipScorer('storybook-clip', 'cpu'))
    assert {'clipscore', 'clipscore_ceiling', 'refclipscore'} <= found.scores['clip'].keys()
    assert not [name for name in found.scores['clip'] if name.endswith('_floor')]
    assert found.scores['rouge_l_floor'] is None
    assert 'CLIPScore' in report_page('one', {}, dict(test=found))

def test_own_encoder_flatters(written, made, tmp_path):
    assert '⚠️ storybook-clip is the captioner\'s own encoder, so its CLIPScore flatters' in written[1]
    assert json.loads((written[0]/'scores.json').read_text())['test']['clip']['own'] is True
    shutil.copytree(model_path('storybook-clip'), tmp_path/'renamed')
    # another name, the same weights
    assert 'flatters' in evaluated('--folder', made/'saved_models', '--clipscore', tmp_path/'renamed')

# --- Files

def test_a_row_per_picture(written):
    scores = json.loads((written[0]/'scores.json').read_text())['test']
    with open(written[0]/'scores.csv', newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    assert (
        len(rows) == N
        and [r['caption'] for r in rows] == scores['captions']
        and {r['split'] for r in rows} == {'test'}
    )
    assert all(
        len(r['references'].split(' | ')) == 3 and r['image_id'].startswith('COCO_val2014_') for r in rows
    )
    for name,value in (('rouge_l', scores['rouge_l']), ('clipscore', scores['clip']['clipscore'][0])):
        assert np.mean([float(r[name]) for r in rows]) == pytest.approx(value, abs=1e-4)

def test_facts_of_a_picture_that_has_none():
    from capnb.insight.report.judged import each_score
    facts = Storybook('test')[3]['facts']
    assert len(facts['things']) == 1
    data = EncodedData(None, [dict(image_id='a', captions=['A cat.', 'A dog.'], facts=facts)]*2)
    found = each_score(judge(None, data, ['A view.', 'A red cat beside a blue house.']))
    # nothing to say and nothing said is no score; something false is 0
    assert found['relation'] == [None, 0.] and found['pairs'] == [0., 0.]

@pytest.mark.parametrize('facts', ['taken in Rome', ['a', 'b'], None, dict(year=1999)])
def test_a_column_that_is_called_facts_is_not_ours(facts):
    rows = [dict(captions=['A cat.'], image_id=str(i), facts=facts) for i in range(12)]
    said = ['A cat.']*12
    assert score(said, EncodedData(None, rows), [Facts()])['facts'] is None
    assert {kind for pairs in image_slices(said, rows) for kind,_ in pairs} == {'caption length'}

def test_predictions_go_out_and_come_in(written, made, tmp_path):
    entries = json.loads((written[0]/'captions.json').read_text())
    assert [e['image_id'] for e in entries] == list(range(40-N, 40)) # as COCO has them
    (tmp_path/'other.json').write_text(json.dumps(entries[::-1])) # the order is another tool's
    evaluated(
        '--predictions',
        tmp_path / 'other.json',
        '--data',
        made / 'data',
        '--split',
        'test',
        '--json_file',
        tmp_path / 'again.json',
        '--report',
        tmp_path / 'report.html',
    )
    first, again = (
        json.loads(f.read_text())['test'] for f in (written[0] / 'scores.json', tmp_path / 'again.json')
    )
    for name in ('captions', 'rouge_l', 'rouge_l_floor', 'intervals', 'text'):
        assert first[name] == again[name], name
    assert (
        'image_gain' not in again
        and set(again['floors']) == {'common'}
        and set(first['floors']) == {'common', 'nearest'}
    )
    assert (
        first['floors']['common'] == again['floors']['common']
        and 'id="training"' not in (tmp_path / 'report.html').read_text()
    )

@pytest.mark.parametrize(
    'change,said',
    [
        (lambda e: e[1:], f"1 of {N} images have no caption, the first is 'COCO_val2014_{40-N:012}.jpg'"),
        (lambda e: e + e[:1], f"image_id '{40-N}' has two captions"),
        (
            lambda e: e + [dict(e[0], image_id=f'COCO_val2014_{40-N:012}.jpg')],
            f"image_id 'COCO_val2014_{40-N:012}.jpg' has two captions",
        ),
        (lambda e: e + [dict(e[0], image_id=3)], "image_id '3' is none of the 12 images"),
        (
            lambda e: e[:-1] + [dict(image_id=39)],
            'entry 11 needs an image_id (a whole number or a text) and a caption (a text)',
        ),
        (lambda e: e[:-1] + [dict(image_id=True, caption='a')], 'entry 11 needs an image_id'),
        (lambda e: dict(e[0]), 'must hold a list of objects'),
    ],
)
def test_predictions_that_do_not_fit(change, said, written, made, tmp_path, capsys):
    entries = json.loads((written[0]/'captions.json').read_text())
    (tmp_path/'p.json').write_text(json.dumps(change(entries)))
    told = refused(capsys, '--predictions', tmp_path/'p.json', '--data', made/'data')
    assert told.startswith(f"eval: {tmp_path/'p.json'}") and said in told and '\n' not in told

def test_predictions_of_data_with_a_bad_row(written, made, tmp_path, capsys):
    "In its training split, which gives the floor."
    data = tmp_path/'data'
    shutil.copytree(made/'data', data)
    with open(data/'captions.csv', 'a') as f:
        f.write('\ngone.jpg,"A cat.",train')
    how = '--predictions', written[0]/'captions.json', '--data', data, '--split', 'test'
    assert 'gone.jpg' in refused(capsys, *how)
    assert 'ROUGE-L' in evaluated(*how, '--bad_rows', 'skip')
    told = refused(capsys, '--folder', made/'saved_models', '--bad_rows', 'skip')
    assert '--bad_rows say what --predictions are of' in told

def test_a_checkpoint_of_a_machine_with_another_folder_for_features(made, tmp_path, capsys):
    checkpoint = next((made/'saved_models').glob('*-2.pth'))
    path = tmp_path/checkpoint.name
    shutil.copy(checkpoint, path)
    metadata = json.loads(metadata_path(checkpoint).read_text(encoding='utf-8'))
    metadata['hyperparameters']['features_dir'] = str(path/'features') # in a file, where none can be
    metadata_path(path).write_text(json.dumps(metadata), encoding='utf-8')
    assert 'name another folder with features_dir' in refused(capsys, path, '--split', 'test')
    folder = tmp_path/'features'
    assert 'ROUGE-L' in evaluated(path, '--split', 'test', '--features_dir', folder) and any(folder.iterdir())

def test_what_predictions_are_of_must_be_said(written, made, capsys):
    file = written[0]/'captions.json'
    assert 'with --data or --preset' in refused(capsys, '--predictions', file)
    assert 'give one of them' in refused(
        capsys, 'model_state_dict_x.pth', '--predictions', file, '--data', 'storybook'
    )
    assert 'give one of them' in refused(capsys, '--best', '--predictions', file, '--data', 'storybook')
    assert 'a checkpoint knows its data' in refused(
        capsys, '--folder', made / 'saved_models', '--data', 'storybook'
    )
    assert "no split 'exam'" in refused(
        capsys, '--predictions', file, '--data', made / 'data', '--split', 'exam'
    )

def test_predictions_against_a_checkpoint(written, made):
    said = evaluated(
        '--predictions',
        written[0] / 'captions.json',
        '--data',
        made / 'data',
        '--against',
        next((made / 'saved_models').glob('*-2.pth')),
    )
    assert 'may be chance' in said and ' real' not in said # they are its own captions

def test_another_checkpoint_is_looked_at_before_captions_are_written(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('capnb.run.scoring.judge_captions', lambda *args: pytest.fail('it was scored'))
    said = refused(capsys, '--folder', made/'saved_models', '--against', tmp_path/'gone.pth')
    assert 'gone.pth has no metadata' in said
    said = refused(capsys, '--folder', made/'saved_models', '--against', shipped_checkpoint())
    assert 'was trained on storybook, not on' in said

@pytest.fixture
def trained_on(tmp_path, monkeypatch):
    "Make a checkpoint of data by name, without its weights."
    monkeypatch.chdir(tmp_path)
    def trained_on(data):
        metadata = json.loads(metadata_path(shipped_checkpoint()).read_text(encoding='utf-8'))
        metadata['hyperparameters']['data'] = data
        path = tmp_path/shipped_checkpoint().name
        metadata_path(path).write_text(json.dumps(metadata), encoding='utf-8')
        return path
    return trained_on

@pytest.mark.parametrize('data', ['photos', 'photos/', './photos', '{here}/photos'])
def test_a_folder_has_several_spellings(data, trained_on, tmp_path):
    scoring.check_comparable(trained_on('photos'), data.format(here=tmp_path))
    with pytest.raises(ValueError, match='was trained on flickr30k'):
        scoring.check_comparable(trained_on('flickr30k'), data.format(here=tmp_path))

def test_a_rival_that_fails_costs_no_captions(made, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise ValueError('other images')
    monkeypatch.setattr(scoring.Judgement, 'against', fail)
    files = {f'--{name}': tmp_path/name for name in ('csv', 'json_file', 'coco_results')}
    checkpoint = next((made/'saved_models').glob('*-2.pth'))
    said = refused(capsys, checkpoint, '--against', checkpoint, *(w for pair in files.items() for w in pair))
    assert 'other images' in said
    assert len(json.loads(files['--coco_results'].read_text())) == N
    assert len(json.loads(files['--json_file'].read_text())['test']['captions']) == N
    assert len(files['--csv'].read_text().splitlines()) == N+1

@pytest.mark.parametrize('changed', [None, 'test', 'train'])
def test_floors_of_other_images_are_not_taken(changed, made, tmp_path):
    checkpoint = next((made/'saved_models').glob('*-2.pth'))
    path = tmp_path/checkpoint.name
    shutil.copy(checkpoint, path)
    metadata = json.loads(metadata_path(checkpoint).read_text(encoding='utf-8'))
    known = metadata['test']['floors']
    metadata['test']['floors'] = 'known'
    if changed == 'test':
        metadata['test']['num_images'] -= 1
    if changed == 'train':
        metadata['data']['train'] -= 1
    metadata_path(path).write_text(json.dumps(metadata), encoding='utf-8')
    found = scoring.score_checkpoint(path, 'test').splits['test'][3]['floors']
    assert json.loads(json.dumps(found)) == (known if changed else 'known')

def test_both_sides_are_compared_alike(made, monkeypatch, tmp_path):
    from capnb.run import scoring
    first, second = sorted((made/'saved_models').glob('*.pth'))
    asked, plain = [], scoring.score_checkpoint
    def noted(path, split=None, int8=False, with_floors=True, features_dir=None):
        asked.append((split, int8, features_dir))
        return plain(path, split, False, with_floors, features_dir)
    monkeypatch.setattr(scoring, 'score_checkpoint', noted)
    folder = str(tmp_path/'features')
    found = scoring.judge_captions(first, split='validation', int8=True, features_dir=folder)
    assert set(found.against(second))=={'validation'} and asked==[('validation', True, folder)]*2
    for row in found.judged['validation'].data.rows:
        row['captions'] = row['captions'][::-1]
    with pytest.raises(ValueError, match="other images or captions: its split 'validation' differs"):
        found.against(second)

# --- Slices

def test_slices_hold_what_they_say():
    data = EncodedData(
        None, [{k: v for k, v in Storybook('test')[i].items() if k != 'image'} for i in range(60)]
    )
    captions = [r['captions'][0] if i%2 else 'A view.' for i,r in enumerate(data.rows)]
    parts = score_parts(captions, data, [Facts()])
    found = {(s['slice'], s['value']): s for s in slices(captions, data.rows, parts, least=5)}
    cats = [i for i,r in enumerate(data.rows) if any(t['kind']=='cat' for t in r['facts']['things'])]
    assert (
        found['kind', 'cat']['num_images'] == len(cats)
        and found['kind', 'cat']['worst'] == [i for i in worst_first(parts) if i in cats][:3]
    )
    assert {
        'kind',
        'colour',
        'size',
        'place',
        'number of things',
        'caption length',
        'word in the references',
    } == {kind for kind, _ in found}
    assert (
        found['caption length', 'up to 2 words']['below']
        and found['caption length', 'up to 2 words']['pairs'][0] == 0
    )
    assert worst_first(parts)[0]%2 == 0 and worst_first(parts)[-1]%2 == 1
    # without facts and common words, only the length
    assert {
        len(p) for p in image_slices(captions, [dict(captions=r['captions']) for r in data.rows], least=99)
    } == {1}

def test_lengths_of_one_number_of_words_are_told_as_one():
    captions = ['a b c']*4 + ['a b c d']*4 + ['a b c d e f']*4
    found = image_slices(captions, [dict(captions=['a'])]*12, least=99)
    assert [value for labels in found[::4] for _, value in labels] == [
        'up to 3 words', '4 words', '5 words or more'
    ]

# --- The report

def test_report_is_one_file(written):
    page = (written[0]/'report.html').read_text(encoding='utf-8')
    assert '<strong dir="auto">' in page and '<li dir="auto">' in page
    assert len(page) < 4e6 and not re.search(r'(src|href)="(?!data:|#)|<script|<link|@import|url\(', page)
    scores = json.loads((written[0]/'scores.json').read_text())['test']
    for value in (
        scores['rouge_l'],
        scores['rouge_l_floor'],
        scores['rouge_l_ceiling'],
        *scores['intervals']['rouge_l'],
        scores['floors']['nearest']['rouge_l'][0],
        scores['clip']['clipscore'][0],
    ):
        assert f'{value:.3f}' in page
    assert 'Validation loss' in page and 'nearest neighbour' in page and 'flatter' in page

@pytest.mark.parametrize('name', ['captioner-0', 'captioner-007', 'captioner-500000'])
def test_the_curve_of_a_renamed_checkpoint(name, tmp_path):
    shutil.copy(shipped_checkpoint(), tmp_path/f'{name}.pth')
    shutil.copy(metadata_path(shipped_checkpoint()), tmp_path/f'{name}.json')
    (tmp_path/'captioner-1.pth').touch() # without metadata
    start = time.perf_counter()
    assert training_charts(tmp_path/f'{name}.pth')[0]['title'].startswith('Training loss')
    assert time.perf_counter()-start < 1

@pytest.mark.parametrize('mode', ['RGBA', 'P', 'LA', 'L'])
def test_an_image_of_any_mode_becomes_a_uri(mode):
    page = Storybook('test')[0]['image'].resize((60, 40)).convert(mode)
    page.getexif()[0x0112] = 6 # the camera was held upright
    back = Image.open(io.BytesIO(base64.b64decode(image_uri(page, 60).partition(',')[2])))
    assert (back.mode, back.size) == ('RGB', (40, 60))

@pytest.mark.parametrize(
    'width,scheme,javascript', [(1200, 'light', True), (390, 'dark', False), (320, 'light', True)]
)
def test_report_in_a_browser(browser, written, width, scheme, javascript):
    with browser.new_context(
        viewport=dict(width=width, height=800), color_scheme=scheme, offline=True
    ) as context:
        tab, said, asked = context.new_page(), [], []
        tab.on('console', lambda m: said.append(m.text))
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.on('request', lambda r: asked.append(r.url))
        tab.goto((written[0]/'report.html').as_uri())
        assert tab.locator('h1').text_content().startswith('model_state_dict_')
        assert tab.evaluate('document.documentElement.scrollWidth') <= width # nothing sticks out
        light = sum(
            map(int, re.findall(r'\d+', tab.evaluate('getComputedStyle(document.body).backgroundColor'))[:3])
        )
        assert (light < 200) == (scheme == 'dark')
        tab.locator('details.slice > summary').first.click() # opens without any script
        assert tab.locator('details.slice[open] figure').first.is_visible()
        tab.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        tab.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert tab.evaluate('document.images.length') > N
        assert not said and all(url.startswith(('file:', 'data:')) for url in asked)

def test_captions_are_text(browser, tmp_path):
    data = load_data(dict(train=Storybook('test', n=24)))['train']
    rows = EncodedData(
        None,
        [
            dict({k: v for k, v in data[i].items() if k != 'image'}, captions=[EVIL, EVIL], image_id=EVIL)
            for i in range(24)
        ],
    )
    (tmp_path / 'evil.html').write_text(
        report_page(EVIL, {EVIL: EVIL}, {'test': judge(data, rows, [EVIL] * 24)}), encoding='utf-8'
    )
    with browser.new_context() as context:
        tab = context.new_page()
        tab.goto((tmp_path/'evil.html').as_uri())
        assert (
            tab.title() == EVIL
            and tab.locator('script').count() == 0
            and tab.locator('[onerror]').count() == 0
        )
        assert tab.locator('figcaption strong').first.text_content() == EVIL
