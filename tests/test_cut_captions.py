"""Captions that are longer than `max_caption_length`: cut without an end, counted, and said; and special
tokens that somebody wrote into a caption."""
import csv, json
import pytest, torch
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, XGLMTokenizer
from capnb.hub import model_path
from capnb.decoder import caption_loss, text_ids, tokenize_captions
from capnb.caption_lengths import count_cut, cut_text
from capnb.any_decoder import load_decoder
from capnb.explanation import _words
from capnb.insight.report.clipscore import ClipScorer
from capnb.storybook import Storybook
from capnb.run.training import token_counts

LONG = 'A young woman in a yellow raincoat is walking two brown dogs across the bridge while traffic waits'

@pytest.fixture(scope='module')
def pair(): return load_decoder('storybook-qwen3', device='cpu')

def test_a_cut_caption_has_no_end(pair):
    tokenizer, end = pair[1], pair[1].eos_token_id
    ids = text_ids(tokenizer, [LONG])[0]
    n = len(ids)
    for most,expected in ((n+5, ids+[end]), (n+1, ids+[end]), (n, ids), (n-1, ids[:-1]), (3, ids[:3])):
        labels, mask = tokenize_captions(tokenizer, [LONG, 'A cat.'], most)
        assert labels[0][mask[0] == 1].tolist() == expected
        assert token_counts(tokenizer, [[LONG, 'A cat.']], most) == [mask.sum().item()]

@pytest.mark.parametrize('most', [3, 8, 21])
def test_its_loss_is_that_of_transformers(pair, most):
    decoder, tokenizer = pair
    torch.manual_seed(0)
    captions = [LONG, 'A red cat in the snow.', f'{LONG} at night', 'A dog.']
    prefix = (torch.randn(2, 4, decoder.config.hidden_size)*.03).requires_grad_()
    ids, mask = tokenize_captions(tokenizer, captions, most)
    expected, tokens = 0., 0
    for i,(row,own) in enumerate(zip(ids, mask, strict=True)):
        row = row[own == 1]
        joined = torch.cat([prefix[i//2], decoder.get_input_embeddings()(row)])[None]
        labels = torch.cat([torch.full((4,), -100), row])[None]
        expected, tokens = expected + decoder(inputs_embeds=joined, labels=labels).loss * len(
            row
        ), tokens + len(row)
    loss = caption_loss(decoder, prefix, ids, mask)
    assert torch.allclose(loss, expected/tokens, atol=1e-5)
    assert torch.allclose(
        *(torch.autograd.grad(x, prefix)[0] for x in (loss, expected / tokens)), rtol=1e-3, atol=1e-4
    )

def test_counting_is_right_and_said():
    class Letters: # one token per character
        eos_token_id, unk_token_id, all_special_ids = 0, None, [0]
        def __call__(self, texts, **kwargs):
            return dict(input_ids=[list(map(ord, t)) for t in texts])
    rows = [dict(image_id=f'{i}.png', captions=['a'*9, 'b'*(9 if i else 30)]) for i in range(200)]
    assert count_cut(Letters(), rows, 10) == dict(
        captions=400, cut=1, longest=31, image_id='0.png', max_caption_length=10
    )
    assert (
        cut_text(count_cut(Letters(), rows, 31))
        == '✂️ No caption is cut: the longest, of 0.png, has 31 tokens, and max_caption_length is 31'
    )
    assert (
        cut_text(count_cut(Letters(), rows, 30))
        == '✂️ 1 of 400 captions are longer than max_caption_length, 30 tokens, and are cut; the longest, of'
        ' 0.png, has 31 tokens'
    )
    assert cut_text(count_cut(Letters(), rows, 9)).startswith('⚠️ 400 of 400 captions') and cut_text(
        count_cut(Letters(), rows, 9)
    ).endswith('To keep all of them whole: --max_caption_length 31')

@pytest.fixture(scope='module')
def album(tmp_path_factory):
    "Forty images whose captions are all too long for the preset; how long the longest is."
    here, book = tmp_path_factory.mktemp('long'), Storybook(n=40)
    rows = [['file_name', 'caption']] + [[f'{i}.png', f'{LONG} number {i}'] for i in range(40)]
    for i in range(40):
        book[i]['image'].save(here/f'{i}.png')
    with open(here/'captions.csv', 'w', newline='', encoding='utf-8') as f:
        csv.writer(f).writerows(rows)
    return here

def test_training_and_dry_run_say_it_and_the_flag_helps(call, album, tmp_path, pair):
    longest = max(len(ids)+1 for ids in text_ids(pair[1], [f'{LONG} number {i}' for i in range(40)]))
    short = '--max_steps 1 --num_epochs 1 --evaluation_enabled false --adapter_width 32 --prefix_length 2'
    args = ['--data', album, '--features_dir', tmp_path/'features', *short.split()]
    said = call('capnb_train', *args, '--output_dir', 'short', cwd=tmp_path)
    flag = f'--max_caption_length {longest}'
    assert said.returncode == 0 and flag in said.stdout and '⚠️ 32 of 32 captions' in said.stdout
    metadata = json.loads(next((tmp_path/'short').glob('*.json')).read_text(encoding='utf-8'))
    assert (
        metadata['captions']['cut'] == 32
        and metadata['captions']['longest'] == longest
        and metadata['captions']['max_caption_length'] == 48
    )
    assert flag in call('capnb_train', '--dry_run', '--data', album, cwd=tmp_path).stdout
    checked = call('capnb_data', 'check', album, '--json_file', 'found.json', cwd=tmp_path)
    assert (
        flag in checked.stdout
        and json.loads((tmp_path / 'found.json').read_text(encoding='utf-8'))['cut']['cut'] == 40
    )
    assert (
        'No caption is cut' in call(
            'capnb_data',
            'check',
            album,
            '--preset',
            'flickr30k',
            '--tokenizer_name',
            'storybook-qwen3',
            cwd=tmp_path,
        ).stdout
    )
    helped = call('capnb_train', *args, *flag.split(), '--output_dir', 'whole', cwd=tmp_path)
    assert '✂️ No caption is cut' in helped.stdout

# --- Special tokens that are text

def test_a_special_token_in_a_caption_is_text(pair):
    decoder, tokenizer = pair
    odd = f'A red {tokenizer.eos_token} cat.'
    labels, mask = tokenize_captions(tokenizer, [odd], 60)
    assert (labels[mask == 1] == tokenizer.eos_token_id).sum() == 1 and tokenizer.decode(
        labels[0][:-1]
    ) == odd
    words = _words(tokenizer, odd, 99)
    assert (
        words[0][0] == 'A'
        and words[-2][0] == 'cat'
        and ''.join(text for text, _ in words) == odd.replace(' ', '')
    )
    assert sorted(at for _, tokens in words for at in tokens) == list(
        range(len(text_ids(tokenizer, [odd])[0]))
    )

@pytest.mark.parametrize('slow', [False, True])
def test_so_it_is_for_other_tokenizers(slow):
    if slow:
        tokenizer = ByT5Tokenizer()
    else: # as Llama's: a beginning, and an end of its own making
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{model_path('storybook-qwen3')}/tokenizer.json",
            bos_token='<s>',
            eos_token='</s>',
            additional_special_tokens=['<|user|>'],
        )
    text = 'a cat </s> sits <pad> here'
    assert tokenizer.eos_token_id in tokenizer(text, add_special_tokens=False)['input_ids']
    ids = text_ids(tokenizer, [text])[0]
    assert not set(ids) & set(tokenizer.all_special_ids) and tokenizer.decode(ids) == text

def test_clip_reads_past_it():
    scorer = ClipScorer('storybook-clip', 'cpu')
    end = scorer.tokenizer.eos_token
    plain, odd, other = scorer.embed_texts(
        ['A red cat.', f'A red cat. {end} A blue house.', f'A red cat. {end} A green tree.']
    )
    assert not torch.allclose(odd, other, atol=1e-3) and not torch.allclose(plain, odd, atol=1e-3)

# --- Words of every script

def test_words_of_a_caption_in_any_script(pair):
    tokenizer = pair[1]
    texts = lambda caption: [text for text,_ in _words(tokenizer, caption, 999)]
    assert texts('लाल कुत्ता है') == ['लाल', 'कुत्ता', 'है']
    assert texts('красная собака.') == ['красная', 'собака', '.']
    assert texts('红色的狗') == ['红', '色', '的', '狗'] and texts("A man's cat.") == [
        'A',
        'man',
        "'",
        's',
        'cat',
        '.',
    ]

def test_a_special_token_that_is_a_word_of_the_vocabulary_is_text():
    "With Unigram the end is a piece like others, and transformers' own option finds it in the text."
    pieces = ['<s>', '<pad>', '</s>', '<unk>', '▁a', '▁b', '▁', '<', '/', 's', '>']
    tokenizer = XGLMTokenizer(vocab=[(piece, 0. if i < 4 else -float(i)) for i,piece in enumerate(pieces)])
    ids, _ = tokenize_captions(tokenizer, ['a </s> b', 'a b'], 48)
    assert tokenizer.eos_token_id not in ids[0,:-1] and ids[0,-1] == tokenizer.eos_token_id
    assert ''.join(tokenizer.convert_ids_to_tokens(ids[0,:-1])).replace('▁', '') == 'a</s>b'
    assert ids[1].tolist() == [4, 5] + [tokenizer.eos_token_id]*(len(ids[1])-2)
