"The console commands from outside, as a person in a shell meets them: train, judge, caption, and be told what is wrong."
import ast, json, os, re, shutil
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
import pytest, torch
from PIL import Image
from capnb.decoder import use_int8
from capnb.captioner import load_model_from_checkpoint, newest_checkpoint, read_metadata
from capnb.commands import train
from capnb.core import Hyperparameters
from capnb.images import open_image
from capnb.storybook import Storybook

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
SMALL = dict(training_size_limit=48, batch_size=24, num_epochs=2, adapter_width=32, prefix_length=2, max_caption_length=12)
TOP_LEVEL = '''epoch training_loss validation_loss image_gain rouge_l rouge_l_floor rouge_l_ceiling facts_f1 learning_rate steps losses
               hyperparameters encoder decoder data device seconds versions'''.split()
HELD_BACK = {'test', 'compositional'}

def flags(settings): return [word for k,v in settings.items() for word in (f'--{k}', v)]

def flat(values, at=()):
    "Nested dictionaries as one, without what is no number."
    if isinstance(values, dict): return {k: v for key,value in values.items() for k,v in flat(value, (*at, key)).items()}
    return {at: values} if isinstance(values, (int, float)) else {}

# --- A training with its scores

@pytest.fixture(scope='module')
def trained(run, tmp_path_factory):
    "A small training with evaluation: the folder it ran in, and what it printed."
    folder = tmp_path_factory.mktemp('trained')
    done = run('capnb_train', *flags(SMALL), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, done.stderr

@pytest.fixture(scope='module')
def saved(trained): return trained[0]/'saved_models'

@pytest.fixture(scope='module')
def newest(saved): return newest_checkpoint(saved)

def metadata_of(folder, epoch): return read_metadata(next(folder.glob(f'model_state_dict_*-{epoch}.pth')))

def test_files_and_their_names(saved):
    names = sorted(p.name for p in saved.iterdir())
    stamp = re.fullmatch(r'loss_curve_(\d{8}_\d{6})\.png', names[0])[1]
    assert names == [f'loss_curve_{stamp}.png', *[f'model_state_dict_{stamp}-{e}.pth' for e in (1,2)], f'samples_{stamp}.png',
                     *[f'training_metadata_{stamp}-{e}.json' for e in (1,2)], f'training_state_{stamp}.pt']

def test_checkpoint_holds_the_adapter_only(saved):
    for path in saved.glob('*.pth'):
        state = torch.load(path, weights_only=True)
        assert state and all(name.startswith('adapter.') and isinstance(t, torch.Tensor) for name,t in state.items())

def test_learning_changed_the_adapter(saved):
    one, two = (torch.load(p, weights_only=True) for p in sorted(saved.glob('*.pth')))
    assert all(not torch.equal(one[name], two[name]) for name in one)

@pytest.mark.parametrize('epoch', [1, 2])
def test_metadata(saved, epoch):
    found = metadata_of(saved, epoch)
    assert set(TOP_LEVEL) <= set(found)
    assert found['epoch'] == epoch and found['steps'] == len(found['losses']) == 2*epoch
    assert found['hyperparameters'] | SMALL == found['hyperparameters']
    assert set(found['hyperparameters']) == {f.name for f in fields(Hyperparameters)}
    assert (found['encoder'], found['decoder']) == ('storybook-clip', 'storybook-qwen3')
    assert found['data']['name'] == 'storybook' and found['data']['train'] == SMALL['training_size_limit'] and HELD_BACK <= set(found['data'])
    assert {'capnb', 'torch', 'transformers'} <= set(found['versions'])
    for name in ('training_loss', 'validation_loss', 'image_gain', 'rouge_l', 'rouge_l_floor', 'rouge_l_ceiling', 'facts_f1'):
        assert isinstance(found[name], float), name
    for name in ('rouge_l', 'rouge_l_floor', 'rouge_l_ceiling', 'facts_f1'): assert 0 <= found[name] <= 1, name
    assert found['rouge_l_floor'] < found['rouge_l_ceiling']

def test_held_back_scores_come_at_the_end(saved):
    first, last = metadata_of(saved, 1), metadata_of(saved, 2)
    assert not HELD_BACK & set(first)
    assert HELD_BACK <= set(last) and HELD_BACK == set(last['untrained'])
    assert all(last[split]['pictures'] == last['data'][split] for split in HELD_BACK)
    assert all(last[split]['loss'] != last['untrained'][split]['loss'] for split in HELD_BACK)

@pytest.mark.parametrize('name', ['loss_curve', 'samples'])
def test_pictures_open(saved, name):
    with Image.open(next(saved.glob(f'{name}_*.png'))) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 100 and len(image.convert('L').getcolors()) > 10

def lines_of(metadata, weights):
    "What scripts of this kind print after an epoch, to the letter."
    return ['✅ Model saved successfully!', f'📁 Model state dict: {weights}', f"📊 Training loss: {metadata['training_loss']:.4f}",
            f"📈 Validation loss: {metadata['validation_loss']:.4f}", f"🎯 ROUGE-L score: {metadata['rouge_l']:.4f}"]

def test_progress_is_told(trained, saved):
    folder, out, err = trained
    lines = out.splitlines()
    for epoch in (1,2):
        metadata, weights = metadata_of(saved, epoch), next(saved.glob(f'*-{epoch}.pth'))
        bar = re.escape(f'Training Epoch {epoch}/2: 100%|') + r'[^|]+\| 2/2 \[\d\d:\d\d<00:00, +[\d.]+(s/it|it/s), ' + rf"Loss=\d+\.\d{{4}}, Avg Loss={metadata['training_loss']:.4f}\]"
        assert re.search(bar, err), err[-3000:]
        at = [i for i,line in enumerate(lines) if line.startswith('✅')][epoch-1]
        assert lines[at:at+5] == lines_of(metadata, weights.relative_to(folder))
        more = [f'⏱️ Epoch {epoch}/2: ', f"🔍 Image gain: {metadata['image_gain']:.2f} nats per caption", f"📏 ROUGE-L floor: {metadata['rouge_l_floor']:.4f}, ceiling: {metadata['rouge_l_ceiling']:.4f}"]
        assert all(line.startswith(begin) for line,begin in zip(lines[at+5:at+8], more, strict=True)), lines[at+5:at+8]
    assert sum(line[:1] in '✅📁📊📈🎯' for line in lines if line) == 10
    assert Path([line for line in lines if line.startswith('🖼')][0].split()[-1]).name == next(saved.glob('samples_*')).name

def test_progress_without_evaluation(call, tmp_path):
    done = call('capnb_train', *flags(SMALL | dict(max_steps=1, evaluation_enabled='false')), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.partition('✅')[2].splitlines()
    assert lines[3:5] == ['📈 Validation loss: N/A', '🎯 ROUGE-L score: N/A'] and lines[5].startswith('⏱️ Epoch 1/2: ') and len(lines) == 6

def test_eval_agrees_with_training(run, trained, newest):
    done = run('capnb_eval', '--json_file', 'scores.json', cwd=trained[0])
    assert done.returncode == 0, done.stderr[-3000:]
    scores, metadata = json.loads((trained[0]/'scores.json').read_text(encoding='utf-8')), read_metadata(newest)
    assert set(scores) == HELD_BACK
    for split in HELD_BACK:
        assert len(scores[split]['captions']) == scores[split]['pictures']
        assert flat(scores[split]) == pytest.approx(flat(metadata[split]), abs=1e-6)
        assert f"{metadata[split]['rouge_l']:.3f}" in done.stdout

def test_eval_against_another_checkpoint(call, trained, saved, newest):
    first = next(saved.glob('model_state_dict_*-1.pth'))
    done = call('capnb_eval', '--split', 'test', '--against', first, '--json_file', 'against.json', cwd=trained[0])
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((trained[0]/'against.json').read_text(encoding='utf-8'))['test']
    row = said['against']['rouge_l']
    assert row['value'] == said['rouge_l'] and row['difference'] == pytest.approx(row['value']-row['other']) and row['other'] != row['value']
    assert row['interval'][0] <= row['difference'] <= row['interval'][1] and f"{row['difference']:+.3f}" in done.stdout
    itself = call('capnb_eval', '--split', 'test', '--against', newest, cwd=trained[0]).stdout
    assert 'may be chance' in itself and ' real' not in itself

@pytest.mark.skipif(not shutil.which('java'), reason='METEOR and the tokenizer of the COCO challenge need Java')
def test_eval_as_the_coco_challenge(call, trained):
    done = call('capnb_eval', '--split', 'test', '--coco', '--json_file', 'coco.json', cwd=trained[0])
    assert done.returncode == 0, done.stderr[-3000:]
    coco = json.loads((trained[0]/'coco.json').read_text(encoding='utf-8'))['test']['coco']
    assert set(coco) == {'bleu_1','bleu_2','bleu_3','bleu_4','meteor','cider'}
    assert all(low <= value <= high for value,low,high in coco.values()) and coco['bleu_1'][0] > coco['bleu_4'][0]
    assert f"{coco['meteor'][0]:.3f}" in done.stdout

def test_eval_without_java(call, trained, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    done = call('capnb_eval', '--split', 'test', '--coco', cwd=trained[0])
    assert done.returncode == 1 and "there is no program 'java'" in done.stderr and 'captioned' not in done.stdout and len(done.stderr.splitlines()) == 1

# --- Captions for files

@pytest.fixture(scope='module')
def album(trained):
    "Pictures beside the folder of checkpoints: a file, and a folder with another folder in it."
    book, names = Storybook('test'), ['one.png', 'album/two.jpg', 'album/deep/three.PNG', 'album/notes.txt']
    (trained[0]/'album'/'deep').mkdir(parents=True)
    for i,name in enumerate(names[:3]): book[i]['image'].save(trained[0]/name)
    (trained[0]/names[3]).write_text('no picture')
    return trained[0]

def test_eight_bits(run, album, newest):
    done = run('capnb_caption', 'one.png', '--int8', cwd=album)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    model = load_model_from_checkpoint(newest, 'cpu')[0]
    use_int8(model.decoder)
    assert done.stdout == f"one.png: {model.caption(album/'one.png')}\n"

def test_caption_file_folder_and_pattern(call, album, newest):
    done = call('capnb_caption', 'one.png', 'album', 'album/**/*.PNG', '--json', cwd=album)
    assert done.returncode == 0, done.stderr[-3000:]
    found, files = json.loads(done.stdout), ['one.png', 'album/deep/three.PNG', 'album/two.jpg', 'album/deep/three.PNG']
    assert [r['file'] for r in found] == files and all(set(r) == {'file', 'caption'} for r in found)
    model = load_model_from_checkpoint(newest)[0]
    assert [r['caption'] for r in found] == model.caption([open_image(album/f) for f in files])

def test_caption_prints_a_line(run, album, newest):
    done = run('capnb_caption', 'one.png', '--checkpoint', newest, cwd=album)
    caption = load_model_from_checkpoint(newest)[0].caption(open_image(album/'one.png'))
    assert (done.returncode, done.stdout) == (0, f'one.png: {caption}\n'), done.stderr[-3000:]

def test_caption_takes_the_newest(call, album, newest, tmp_path):
    "By time, then by epoch as a number; whatever the file system says, and none that has no metadata. The wrong ones cannot be loaded."
    metadata = newest.with_name(newest.name.replace('model_state_dict', 'training_metadata')).with_suffix('.json')
    for name in ('20300101_000000-10', '20300101_000000-9', '20200101_000000-99', '20310101_000000-1'):
        weights = tmp_path/f'model_state_dict_{name}.pth'
        if name == '20300101_000000-10': shutil.copy(newest, weights)
        else: weights.write_bytes(b'not to be loaded')
        if name != '20310101_000000-1': shutil.copy(metadata, tmp_path/f'training_metadata_{name}.json')
    os.utime(tmp_path/'model_state_dict_20300101_000000-10.pth', (0, 0))
    done = call('capnb_caption', 'one.png', '--folder', tmp_path, cwd=album)
    assert done.returncode == 0 and done.stdout.startswith('one.png: '), done.stderr[-3000:]

# --- Settings from files

SETTINGS = dict(training_size_limit=8, batch_size=8, num_epochs=1, evaluation_enabled=False, adapter_width=16, learning_rate=2e-05,
                max_steps=1, max_caption_length=9, seed=3, decoder_name=None)

def as_yaml(settings):
    return '# by hand\n' + '\n'.join(f'{k}: {json.dumps(v)}' for k,v in settings.items())

def test_settings_from_json_yaml_and_python(call, tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(SETTINGS, indent=2))
    (tmp_path/'b.yaml').write_text(as_yaml(SETTINGS))
    found = [train(SETTINGS, output_dir=str(tmp_path/'c')).metadata]
    for name,file in [('a','a.json'), ('b','b.yaml')]:
        done = call('capnb_train', '--config', file, '--output_dir', name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(read_metadata(newest_checkpoint(tmp_path/name)))
    used = [{k: v for k,v in m['hyperparameters'].items() if k != 'output_dir'} for m in found]
    assert used[0] == used[1] == used[2] and used[0] | SETTINGS == used[0]
    assert found[0]['losses'] == found[1]['losses'] == found[2]['losses']

# --- What goes wrong

BAD_FILES = {'broken.png': b'no picture', 'cut.png': None, 'wrong.pth': b'no weights', 'unknown.json': b'{"batchsize": 4}', 'type.yaml': b'batch_size: many',
             'broken.yaml': b'batch_size: [4', 'bytes.yaml': b'\xff\xfe\xfa\x00', 'list.json': b'[1, 2]', 'empty.yaml': b'# nothing yet, but a comment'}

# name: command, arguments, a word that the message must hold
FAULTS = {
    'picture is missing': ('capnb_caption', ['gone.png'], 'gone.png'),
    'pattern without a picture': ('capnb_caption', ['gone*.png'], 'gone*.png'),
    'folder without a picture': ('capnb_caption', ['empty'], 'empty'),
    'picture is no picture': ('capnb_caption', ['broken.png', '--folder', 'saved_models'], 'broken.png'),
    'picture is cut off': ('capnb_caption', ['cut.png', '--folder', 'saved_models'], 'cut.png'),
    'checkpoint is a picture': ('capnb_caption', ['one.png', '--checkpoint', 'one.png'], 'one.png'),
    'checkpoint is cut off': ('capnb_caption', ['one.png', '--checkpoint', 'saved_models/model_state_dict_cut.pth'], 'cut.pth'),
    'checkpoint is missing': ('capnb_caption', ['one.png', '--checkpoint', 'gone.pth'], 'gone.pth'),
    'checkpoint is a folder': ('capnb_caption', ['one.png', '--checkpoint', 'saved_models'], 'saved_models'),
    'checkpoint has no metadata': ('capnb_eval', ['alone/model_state_dict_20300101_000000-1.pth'], 'metadata'),
    'checkpoint has broken metadata': ('capnb_eval', ['alone/model_state_dict_20300101_000000-2.pth'], 'metadata'),
    'checkpoint of another shape': ('capnb_eval', ['alone/model_state_dict_20300101_000000-3.pth'], 'shape'),
    'no checkpoint yet': ('capnb_eval', ['--folder', 'empty'], 'empty'),
    'split is not known': ('capnb_eval', ['--split', 'exam'], 'exam'),
    'preset is not known': ('capnb_train', ['--preset', 'quick'], 'quick'),
    'preset without its models': ('capnb_train', ['--preset', 'flickr30k'], 'openai/clip-vit-base-patch32'),
    'model of a size that never was': ('capnb_train', ['--tokenizer_name', 'Qwen/Qwen3-1.5B'], 'Qwen/Qwen3-1.7B'),
    'encoder as a decoder': ('capnb_train', ['--tokenizer_name', 'storybook-clip'], 'cannot write text'),
    'decoder as an encoder': ('capnb_train', ['--encoder_name', 'storybook-qwen3'], 'an image encoder is needed'),
    'checkpoint to begin with is missing': ('capnb_train', ['--init_from', 'gone.pth', '--training_size_limit', '8'], 'gone.pth'),
    'data is not known': ('capnb_train', ['--data', 'photos'], 'photos'),
    'value is too low': ('capnb_train', ['--batch_size', '0'], 'batch_size'),
    'value is no number': ('capnb_train', ['--batch_size', 'many'], 'batch_size'),
    'value is not yes or no': ('capnb_train', ['--evaluation_enabled', 'perhaps'], 'evaluation_enabled'),
    'flag is not known': ('capnb_train', ['--batchsize', '4'], 'batchsize'),
    'flag of another command': ('capnb_caption', ['one.png', '--split', 'test'], 'split'),
    'no picture is named': ('capnb_caption', [], 'images'),
    'image size does not fit': ('capnb_train', ['--image_size', '32'], 'image_size'),
    'config is missing': ('capnb_train', ['--config', 'gone.yaml'], 'gone.yaml'),
    'config has an unknown key': ('capnb_train', ['--config', 'unknown.json'], 'batchsize'),
    'config has a wrong type': ('capnb_train', ['--config', 'type.yaml'], 'batch_size'),
    'config is not YAML': ('capnb_train', ['--config', 'broken.yaml'], 'broken.yaml'),
    'config is not text': ('capnb_train', ['--config', 'bytes.yaml'], 'bytes.yaml'),
    'config is a list': ('capnb_train', ['--config', 'list.json'], 'list.json'),
    'config is empty': ('capnb_train', ['--config', 'empty.yaml'], 'empty.yaml'),
}
OUTSIDE = ('picture is no picture', 'checkpoint has broken metadata', 'flag is not known') # in a process of its own: what libraries say at its start or end is seen too

def lay_out_faults(folder, newest):
    "Write the files that `FAULTS` speaks of."
    picture = (folder/'one.png').read_bytes()
    half = picture[:len(picture)//2]
    for name,content in BAD_FILES.items(): (folder/name).write_bytes(half if content is None else content)
    (folder/'saved_models'/'model_state_dict_cut.pth').write_bytes(newest.read_bytes()[:-900])
    (folder/'empty').mkdir()
    (folder/'alone').mkdir()
    for n in (1,2,3): shutil.copy(newest, folder/'alone'/f'model_state_dict_20300101_000000-{n}.pth')
    metadata = read_metadata(newest)
    metadata['hyperparameters']['prefix_length'] += 1
    (folder/'alone'/'training_metadata_20300101_000000-2.json').write_text('{"epoch": 1')
    (folder/'alone'/'training_metadata_20300101_000000-3.json').write_text(json.dumps(metadata))

@pytest.fixture(scope='module')
def faults(album, newest, tmp_path_factory):
    "A folder with what `FAULTS` speaks of."
    folder = tmp_path_factory.mktemp('faults')/'here'
    shutil.copytree(album, folder)
    lay_out_faults(folder, newest)
    return folder

@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_one_line(run, call, faults, fault):
    command, args, word = FAULTS[fault]
    done = (run if fault in OUTSIDE else call)(command, *args, cwd=faults)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and word in lines[0], done.stderr[-3000:]

def test_good_pictures_are_captioned_beside_a_bad_one(call, album):
    done = call('capnb_caption', 'one.png', 'album/notes.txt', '--json', cwd=album)
    assert done.returncode != 0 and 'notes.txt' in done.stderr and len(done.stderr.splitlines()) == 1
    assert [r['file'] for r in json.loads(done.stdout)] == ['one.png']

# --- Help

def first_words(module, function):
    "What the docstring of a function says, read from its file."
    tree = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
    return next(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_help_says_what_it_does(call, script, tmp_path):
    name, module, function = re.split('[=:]', script)
    done = call(name, '--help', cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    words = lambda text: ''.join(text.split()) # however the lines are broken
    assert words(first_words(module, function)) in words(done.stdout)
    if name == 'capnb_train': assert all(f'--{f.name} ' in done.stdout and words(f.metadata['help']) in words(done.stdout) for f in fields(Hyperparameters))

# --- A folder of one's own pictures

def test_folder_from_pictures_to_scores(call, tmp_path):
    book, folder = Storybook(n=30), tmp_path/'holiday'
    folder.mkdir()
    rows = [(f'{i}.png', caption) for i in range(30) for caption in book.captions(i)[:2]]
    for i in range(30): book[i]['image'].save(folder/f'{i}.png')
    (folder/'captions.csv').write_text('file_name,caption\n' + '\n'.join(f'{name},"{caption}"' for name,caption in rows), encoding='utf-8')
    done = call('capnb_train', '--data', folder, '--num_epochs', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = read_metadata(newest_checkpoint(tmp_path/'saved_models'))
    assert metadata['data'] == dict(name=str(folder), train=24, validation=3, test=3) and metadata['facts_f1'] is None
    judged = call('capnb_eval', '--json_file', 'scores.json', cwd=tmp_path) # the same pictures are held back
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert json.loads((tmp_path/'scores.json').read_text(encoding='utf-8'))['test']['rouge_l'] == pytest.approx(metadata['test']['rouge_l'], abs=1e-6)

def test_folder_with_a_bad_row_is_told_before_training(call, tmp_path):
    (tmp_path/'captions.csv').write_text('file_name,caption\nnowhere.png,A cat.\n', encoding='utf-8')
    done = call('capnb_train', '--data', tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.strip() == f"train: {tmp_path/'captions.csv'}: line 2: there is no picture 'nowhere.png'"
