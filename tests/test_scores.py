"Scores that stay right whatever a caption is made of: white space, nothing at all, and every script."
import csv, json, random, string
from types import SimpleNamespace
from unittest.mock import Mock
import numpy as np, pytest, torch
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from capnb.files import write_json
from capnb.data import CaptionData
from capnb.words import one_line, words
from capnb.generation import captions_of
from capnb.encoder import EncodedData
from capnb.evaluation import floors, rouge_l, score, score_parts, text_statistics
from capnb.intervals import compare, mean_parts
from capnb.score_tables import BY_CHARACTER, draw_samples, fonts_for, score_table
from capnb.insight.coco import _coco_words, _meteor_sums, coco_tools
from capnb.insight.facts import Facts, fact_counts, facts_scores
from capnb.insight.report.slices import image_slices
from capnb.run.predictions import read_predictions
from capnb.storybook import Scene, Storybook, facts_of

BREAKS = '\n\r\v\f\x00\x1c\x1d\x1e\x1f\x85\u2028\u2029\t\xa0'
SENTENCES = dict(
    Russian='Красная собака бежит по снегу.',
    Greek='Ένας κόκκινος σκύλος τρέχει.',
    Arabic='كلب أحمر يجري في الثلج.',
    Hindi='लाल कुत्ता बर्फ़ में दौड़ता है।',
    Chinese='红色的狗在雪地里跑。',
    Japanese='赤い犬が雪の中を走る。',
    Korean='빨간 개가 눈 속을 달린다.',
    Thai='สุนัขสีแดงวิ่งในหิมะ',
    Lao='ໝາສີແດງແລ່ນ',
    Khmer='ឆ្កែក្រហមរត់',
    Burmese='ခွေးနီပြေးသည်',
    German='Der rote Hund läuft für uns.',
    Persian='سگ قرمز می‌دود',
    Hebrew='כלב אדום רץ',
)
SPACELESS = {'Chinese', 'Japanese', 'Thai', 'Lao', 'Khmer', 'Burmese'}

# --- White space

def strict(path):
    "Read JSON as other programs do, which know no NaN."
    def refuse(name):
        raise AssertionError(f'{path} holds {name}')
    return json.loads(path.read_text(encoding='utf-8'), parse_constant=refuse)

def test_every_character_stays_on_its_line():
    coco_tools()
    from pycocoevalcap.tokenizer import ptbtokenizer
    odd = [f'red{chr(c)}dog{chr(c)}' for c in range(0x10000) if not 0xD800 <= c < 0xE000]
    texts = [t for o in odd[:0x3100] for t in (o, 'between')] + ['last'] # beyond lie letters and signs only
    assert _coco_words(texts, [[]]*len(texts), ptbtokenizer)[0][len(texts)-1] == ['last']
    assert all(len(one_line(t).splitlines()) == 1 for t in odd)

def test_captions_with_odd_white_space_score_as_clean_ones(call, tmp_path):
    book, n = Storybook(n=20), 20 # image i+20 is image i again; its caption is the same, with odd white space
    clean = [book.captions(i)[1] if i < n-2 else '' for i in range(n)]
    dirty = [
        (
            f"{c.replace(' ', BREAKS[i % len(BREAKS)], 2)}{BREAKS[-i % len(BREAKS)]}"
            if c
            else ['...', '🐕'][i % 2]
        )
        for i, c in enumerate(clean)
    ]
    rows, album = [['file_name', 'caption', 'split']], tmp_path/'album'
    album.mkdir()
    for i in range(2*n+4):
        book[i % n]['image'].save(album/f'{i}.png')
        rows += [
            [f'{i}.png', c, 'test' if i < 2 * n else 'train' if i % 2 else 'validation']
            for c in book.captions(i % n)
        ]
    with open(album/'captions.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows(rows)
    (tmp_path / 'said.json').write_text(
        json.dumps([dict(image_id=f'{i}.png', caption=c) for i, c in enumerate(dirty + clean)])
    )
    asked = '--predictions said.json --coco --json_file scores.json --csv each.csv --coco_results out.json'
    done = call('capnb_eval', '--data', album, *asked.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path/'each.csv', newline='', encoding='utf-8') as f:
        each = list(csv.DictReader(f))
    scores = [[r[k] for k in ('rouge_l_all', 'bleu_1', 'bleu_4', 'meteor', 'cider')] for r in each]
    assert scores[:n] == scores[n:] and scores[n-1] == ['0.0000']*5
    assert (
        np.mean([float(s[-1]) for s in scores[: n - 2]]) > 1
        and strict(tmp_path / 'scores.json')['test']['coco']['meteor'][0] > 0
    )
    assert [e['caption'] for e in strict(tmp_path/'out.json')] == [one_line(c) for c in dirty+clean]

def test_references_and_written_captions_are_one_line_too(tmp_path):
    image = Storybook()[0]['image']
    for mark in BREAKS:
        assert CaptionData([dict(image=image, caption=f'a red{mark}dog{mark}')])[0]['captions'] == [
            'a red dog'
        ]
    with pytest.raises(ValueError, match='not empty'):
        CaptionData([dict(image=image, caption='\0\x85')])[0]
    class Tokenizer:
        eos_token_id = None
        def batch_decode(self, ids, **kwargs): return [''.join(row) for row in ids]
    assert captions_of(Tokenizer(), [' a red\u2028dog\x85runs\r\nA blue dog.']) == ['a red dog runs']

def test_half_a_character_is_refused(tmp_path):
    (tmp_path/'p.json').write_text('[{"image_id": 1, "caption": "a dog \\ud83d"}]')
    with pytest.raises(ValueError, match='p.json: the caption of entry 0 holds half a character'):
        read_predictions(tmp_path/'p.json', ['1'])

@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_json_holds_no_nan(number, tmp_path):
    with pytest.raises(ValueError, match='scores.json is not written'):
        write_json(tmp_path/'scores.json', dict(test=dict(meteor=number)))
    assert not list(tmp_path.iterdir())

def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    write_json(tmp_path/'scores.json', dict(image_id='caf\udce9.png'))
    assert json.loads((tmp_path/'scores.json').read_text())=={'image_id': 'caf\udce9.png'}

# --- Words

def test_english_scores_are_those_of_rouge_score():
    chance, theirs = random.Random(0), RougeScorer(['rougeL'])
    letters = string.ascii_letters + ' '*20 + string.printable
    for _ in range(500):
        a, b = (''.join(chance.choices(letters, k=chance.randrange(60))) for _ in range(2))
        assert rouge_l([a, a[:30]], b) == theirs.score_multi([a, a[:30]], b)['rougeL'].fmeasure
    book = Storybook('test', n=50)
    for i in range(50):
        refs = book.captions(i)
        assert rouge_l(refs[1:], refs[0]) == theirs.score_multi(refs[1:], refs[0])['rougeL'].fmeasure
    typographic = ['A man’s dog — “Rex” — runs…', 'The dog’s owner – 20° – is here.']
    assert (
        rouge_l(typographic[:1], typographic[1])
        == theirs.score_multi(typographic[:1], typographic[1])['rougeL'].fmeasure
    )

@pytest.mark.parametrize('language', SENTENCES)
def test_rouge_of_every_script(language):
    said = SENTENCES[language]
    assert rouge_l([said], said) == 1
    half = (
        ''.join(words(said)[: len(words(said)) // 2])
        if language in SPACELESS
        else ' '.join(words(said)[: len(words(said)) // 2])
    )
    n = len(words(said))
    assert rouge_l([said], half) == pytest.approx(2*(n//2)/(n//2+n))
    assert n == (len(said.replace('।', '').split()) if language not in SPACELESS else n) and n > 2
    assert text_statistics([said])['words'] == n

def test_letters_are_told_apart():
    assert rouge_l(['für'], 'fär') == 0 and rouge_l(['für'], 'FU\u0308R') == 1
    assert rouge_l(['кот'], 'кит') == 0 and rouge_l(['红色的狗'], '红色的猫') == .75
    assert words('कि') == ['कि'] != words('की')
    assert words('iPhone手机3台') == ['iphone', '手', '机', '3', '台']

def test_the_table_says_what_is_counted_by_character():
    rows = lambda text: EncodedData(None, [dict(captions=[text], image_id=str(i)) for i in range(2)])
    for language,said in SENTENCES.items():
        found = score([said, said], rows(said))
        assert found['rouge_l'] == 1 and found['by_character'] == (language in SPACELESS)
        assert (BY_CHARACTER in score_table(dict(test=found))) == (language in SPACELESS)

def test_coco_words_of_scripts_without_spaces_are_characters():
    said, references = ['红色的狗。', 'für uns'], [['สุนัข red'], ['красная собака']]
    assert _coco_words(said, references, coco_tools()[-1]) == (
        {0: ['红 色 的 狗 。'], 1: ['für uns']},
        {0: ['สุ นั ข red'], 1: ['красная собака']},
    )

@pytest.mark.parametrize('lines', [{0: ['']}, {0: ['a cat', 'a cat'], 1: ['a dog']}])
def test_a_java_that_stops_early_is_told(lines):
    tool = SimpleNamespace(PTBTokenizer=lambda: SimpleNamespace(tokenize=lambda plain: lines))
    with pytest.raises(ValueError, match='stopped before the last caption'):
        _coco_words(['A cat.', 'A dog.'], [['A cat.'], ['A dog.']], tool)

@pytest.mark.parametrize(
    'lines',
    [[''], ['1 '*22], ['1 '*23, ''], ['1 '*23, BrokenPipeError()]],
    ids=['nothing', 'half a line', 'one line', 'a closed pipe'],
)
def test_a_meteor_that_stops_early_is_told(lines):
    said = {i: ['a cat'] for i in range(len(lines))}
    with pytest.raises(ValueError, match='METEOR stopped before the last caption'):
        _meteor_sums(SimpleNamespace(_stat=Mock(side_effect=lines)), said, said)

def test_a_tokenizer_that_may_not_write_is_told_early(monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))
    monkeypatch.setattr('capnb.insight.coco.check_writable', refuse, raising=False)
    monkeypatch.setattr('shutil.which', lambda name: '/usr/bin/java')
    with pytest.raises(ValueError, match='writes into its own folder.*Permission denied'):
        coco_tools()

def test_slices_know_words_of_every_script():
    rows = [
        dict(captions=['красная собака бежит' if i % 2 else 'синий кот сидит на диване'], image_id=str(i))
        for i in range(40)
    ]
    found = image_slices([r['captions'][0] for r in rows], rows)
    assert ('word in the references', 'собака') in found[1] and ('word in the references', 'кот') in found[0]
    assert len({v for each in found for k,v in each if k == 'caption length'}) == 2

def test_an_interval_keeps_its_digits():
    said = ['A red cat.', 'A dog.']
    found = score(said, EncodedData(None, [dict(captions=[text], image_id=text) for text in said]))
    table = score_table(
        dict(test=found | dict(coco=dict(cider=[10.0, 10.0, 10.25]), intervals=dict(rouge_l=[-0.5, 0.5])))
    )
    assert '10.000–10.250' in table and '-.500–.500' in table

def test_one_image_proves_nothing():
    real = lambda *each: compare(dict(x=mean_parts(each)), dict(x=mean_parts([.1]*len(each))))['x']['real']
    assert not real(.5) and real(.5, .6) and not real(.1, .1)

def test_training_images_have_no_nearest_neighbour():
    "Each would be its own, and be captioned with one of its references."
    data, other = (
        EncodedData(torch.eye(4), [dict(captions=[f'a {i}', f'the {i}']) for i in range(4)]) for _ in range(2)
    )
    assert floors(data, data).keys()=={'common'} and floors(data, other).keys()=={'common', 'nearest'}

# --- Drawings

def test_fonts_of_other_scripts_are_taken_where_they_are(monkeypatch):
    here = [SimpleNamespace(name=name) for name in ('Comic Neue', 'Noto Sans Thai', 'Noto Sans CJK SC')]
    monkeypatch.setattr('matplotlib.font_manager.fontManager.ttflist', here)
    assert fonts_for()==['DejaVu Sans', 'Noto Sans CJK SC', 'Noto Sans Thai']
    assert fonts_for('DejaVu Sans Mono')[0]=='DejaVu Sans Mono'

def test_a_drawn_caption_that_is_cut_ends_in_dots(monkeypatch, tmp_path):
    titles, image = [], Storybook('test')[0]['image']
    def note(fig, file, **how):
        titles.extend(ax.title for ax in fig.axes)
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', note)
    captions = [SENTENCES['German'], 'a red dog and '*15, SENTENCES['Chinese']*20]
    draw_samples([image]*3, captions, tmp_path/'samples.png')
    whole, *cut = [title.get_text() for title in titles[:3]]
    assert whole==captions[0] and all(text.endswith('…') for text in cut)
    for text in cut:
        assert len(text.splitlines())==3 and max(map(len, text.splitlines())) <= 30
    assert titles[0].get_fontfamily()==fonts_for()

def test_drawn_captions_lie_over_no_image(tmp_path):
    blue = Image.new('RGB', (64, 64), (0, 0, 255))
    draw_samples([blue]*6, ['a red dog and '*4, 'A cat.', 'a red dog and '*15]*2, tmp_path/'samples.png')
    drawn = np.asarray(Image.open(tmp_path/'samples.png').convert('RGB'))
    images = (drawn == (0, 0, 255)).all(-1)
    assert np.array_equal(images, np.outer(images.any(1), images.any(0))) # whole rectangles
    assert (drawn[0] == 255).all() # the first line of a caption is not cut

# --- Facts

def test_a_scene_without_things():
    facts = [facts_of(Scene('night', ()))]
    assert fact_counts(['A view at night.'], facts)['count'] == [(0, 0, 0)]
    assert fact_counts(['A red cat at night.'], facts)['count'] == [(0, 1, 0)]
    data = EncodedData(None, [dict(captions=['A view.'], facts=facts[0])])
    assert score_parts(['A view at night.'], data, [Facts()])['count'].value == 0

def test_no_captions_have_no_true_claims():
    assert {s['f1'] for s in facts_scores([], []).values()} == {0.}
