"""The console commands from outside, as a person in a shell meets them: train, judge, caption, and be told
what is wrong."""
import ast, importlib, inspect, json, logging, os, re, shutil, subprocess, sys, time
from argparse import ArgumentTypeError
from configparser import ConfigParser
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch
import pytest, torch
from PIL import Image
from capnb.fast.quantized import use_int8
from capnb.saving import load_model_from_checkpoint
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.command_line import _as_flags
from capnb.run.entry import train
from capnb.settings import Hyperparameters, PRESETS
from capnb.images import open_image
from capnb.log import log
from capnb.storybook import SPLITS, Storybook

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini', encoding='utf-8')
CFG = CFG['DEFAULT']
SMALL = dict(
    training_size_limit=48,
    batch_size=24,
    num_epochs=2,
    adapter_width=32,
    prefix_length=2,
    max_caption_length=12,
)
TOP_LEVEL = '''epoch training_loss validation_loss image_gain rouge_l rouge_l_floor rouge_l_ceiling
               facts_f1 learning_rate steps losses hyperparameters encoder decoder data
               device seconds versions'''.split()
HELD_BACK = {'test', 'compositional'}

def flags(settings): return [word for k,v in settings.items() for word in (f'--{k}', v)]

def flat(values, at=()):
    "Nested dictionaries as one, without what is no number."
    if isinstance(values, dict):
        return {k: v for key,value in values.items() for k,v in flat(value, (*at, key)).items()}
    return {at: values} if isinstance(values, (int, float)) else {}

@pytest.fixture(scope='module')
def holiday(tmp_path_factory):
    "A folder of one's own images: 24 to learn from, three for validation, three for the end."
    folder, book = tmp_path_factory.mktemp('holiday'), Storybook(n=30)
    rows = [(f'{i}.png', caption) for i in range(30) for caption in book.captions(i)[:2]]
    for i in range(30):
        book[i]['image'].save(folder/f'{i}.png')
    (folder / 'captions.csv').write_text(
        'file_name,caption\n' + '\n'.join(f'{name},"{caption}"' for name, caption in rows), encoding='utf-8'
    )
    return folder

# --- A training with its scores, of fewer pages than a storybook has

FEW = dict(validation=40, test=60, compositional=40)

def take_few():
    SPLITS.update(FEW)

@pytest.fixture(scope='module', autouse=True)
def few_pages():
    with patch.dict(SPLITS, FEW):
        yield

@pytest.fixture(scope='module')
def trained(run, tmp_path_factory):
    "A small training with evaluation: the folder it ran in, and what it printed."
    folder = tmp_path_factory.mktemp('trained')
    (folder/'one.txt').write_text('a file is no folder')
    done = run('capnb_train', *flags(SMALL), cwd=folder, prepare=take_few)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, done.stderr

@pytest.fixture(scope='module')
def saved(trained): return trained[0]/'saved_models'

@pytest.fixture(scope='module')
def newest(saved): return newest_checkpoint(saved)

def metadata_of(folder, epoch):
    return read_metadata(next(folder.glob(f'model_state_dict_*-{epoch}.pth')))

def test_files_and_their_names(saved):
    names = sorted(p.name for p in saved.iterdir())
    stamp = re.fullmatch(r'loss_curve_(\d{8}_\d{6})\.png', names[0])[1]
    assert names == [
        f'loss_curve_{stamp}.png',
        *[f'model_state_dict_{stamp}-{e}.pth' for e in (1, 2)],
        f'samples_{stamp}.png',
        *[f'training_metadata_{stamp}-{e}.json' for e in (1, 2)],
        f'training_state_{stamp}.pt',
    ]

def test_checkpoint_holds_the_adapter_only(saved):
    for path in saved.glob('*.pth'):
        state = torch.load(path, weights_only=True)
        assert state and all(
            name.startswith('adapter.') and isinstance(t, torch.Tensor) for name, t in state.items()
        )

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
    assert (
        found['data']['name'] == 'storybook'
        and found['data']['train'] == SMALL['training_size_limit']
        and HELD_BACK <= set(found['data'])
    )
    assert {'capnb', 'torch', 'transformers'} <= set(found['versions'])
    for name in (
        'training_loss',
        'validation_loss',
        'image_gain',
        'rouge_l',
        'rouge_l_floor',
        'rouge_l_ceiling',
        'facts_f1',
    ):
        assert isinstance(found[name], float), name
    for name in ('rouge_l', 'rouge_l_floor', 'rouge_l_ceiling', 'facts_f1'):
        assert 0 <= found[name] <= 1, name
    assert found['rouge_l_floor'] < found['rouge_l_ceiling']

def test_held_back_scores_come_at_the_end(saved):
    first, last = metadata_of(saved, 1), metadata_of(saved, 2)
    assert not HELD_BACK & set(first)
    assert HELD_BACK <= set(last) and HELD_BACK == set(last['untrained'])
    assert all(last[split]['num_images'] == last['data'][split] for split in HELD_BACK)
    assert all(last[split]['loss'] != last['untrained'][split]['loss'] for split in HELD_BACK)

@pytest.mark.parametrize('name', ['loss_curve', 'samples'])
def test_pictures_open(saved, name):
    with Image.open(next(saved.glob(f'{name}_*.png'))) as image:
        image.load()
        assert image.format == 'PNG' and min(image.size) > 100 and len(image.convert('L').getcolors()) > 10

def lines_of(metadata, weights):
    "What scripts of this kind print after an epoch, to the letter."
    return [
        '✅ Model saved successfully!',
        f'📁 Model state dict: {weights}',
        f"📊 Training loss: {metadata['training_loss']:.4f}",
        f"📈 Validation loss: {metadata['validation_loss']:.4f}",
        f"🎯 ROUGE-L score: {metadata['rouge_l']:.4f}",
    ]

def test_progress_is_told(trained, saved):
    folder, out, err = trained
    lines = out.splitlines()
    for epoch in (1,2):
        metadata, weights = metadata_of(saved, epoch), next(saved.glob(f'*-{epoch}.pth'))
        bar = (
            re.escape(f'Training Epoch {epoch}/2: 100%|')
            + r'[^|]+\| 2/2 \[\d\d:\d\d<00:00, +[\d.]+(s/it|it/s), '
            + rf"Loss=\d+\.\d{{4}}, Avg Loss={metadata['training_loss']:.4f}\]"
        )
        assert re.search(bar, err), err[-3000:]
        at = [i for i,line in enumerate(lines) if line.startswith('✅')][epoch-1]
        assert lines[at:at+5] == lines_of(metadata, weights.relative_to(folder))
        more = [
            f'⏱️ Epoch {epoch}/2: ',
            f"🔍 Image gain: {metadata['image_gain']:.2f} nats per caption",
            f"📏 ROUGE-L floor: {metadata['rouge_l_floor']:.4f}, ceiling: {metadata['rouge_l_ceiling']:.4f}",
        ]
        assert all(
            line.startswith(begin) for line, begin in zip(lines[at + 5 : at + 8], more, strict=True)
        ), lines[at + 5 : at + 8]
    assert sum(line[:1] in '✅📁📊📈🎯' for line in lines if line) == 10
    assert (
        Path([line for line in lines if line.startswith('🖼')][0].split()[-1]).name
        == next(saved.glob('samples_*')).name
    )

def test_progress_without_evaluation(call, tmp_path):
    done = call('capnb_train', *flags(SMALL | dict(max_steps=1, evaluation_enabled='false')), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.partition('✅')[2].splitlines()
    assert (
        lines[3:5] == ['📈 Validation loss: N/A', '🎯 ROUGE-L score: N/A']
        and lines[5].startswith('⏱️ Epoch 1/2: ')
        and len(lines) == 6
    )

def test_eval_agrees_with_training(run, trained, newest):
    done = run('capnb_eval', '--json_file', 'scores.json', cwd=trained[0], prepare=take_few)
    assert done.returncode == 0, done.stderr[-3000:]
    scores, metadata = json.loads((trained[0] / 'scores.json').read_text(encoding='utf-8')), read_metadata(
        newest
    )
    assert set(scores) == HELD_BACK
    for split in HELD_BACK:
        assert len(scores[split]['captions']) == scores[split]['num_images']
        assert flat(scores[split]) == pytest.approx(flat(metadata[split]), abs=1e-6)
        assert f"{metadata[split]['rouge_l']:.3f}" in done.stdout

def test_eval_against_another_checkpoint(call, trained, saved, newest):
    first = next(saved.glob('model_state_dict_*-1.pth'))
    done = call(
        'capnb_eval', '--split', 'test', '--against', first, '--json_file', 'against.json', cwd=trained[0]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads((trained[0]/'against.json').read_text(encoding='utf-8'))['test']
    row = said['against']['rouge_l']
    assert (
        row['value'] == said['rouge_l']
        and row['difference'] == pytest.approx(row['value'] - row['other'])
        and row['other'] != row['value']
    )
    assert (
        row['interval'][0] <= row['difference'] <= row['interval'][1]
        and f"{row['difference']:+.3f}" in done.stdout
    )
    itself = call('capnb_eval', '--split', 'test', '--against', newest, cwd=trained[0]).stdout
    assert 'may be chance' in itself and ' real' not in itself

@pytest.mark.skipif(
    not shutil.which('java'), reason='METEOR and the tokenizer of the COCO challenge need Java'
)
def test_eval_as_the_coco_challenge(call, trained):
    done = call('capnb_eval', '--split', 'test', '--coco', '--json_file', 'coco.json', cwd=trained[0])
    assert done.returncode == 0, done.stderr[-3000:]
    coco = json.loads((trained[0]/'coco.json').read_text(encoding='utf-8'))['test']['coco']
    assert set(coco) == {'bleu_1','bleu_2','bleu_3','bleu_4','meteor','cider'}
    assert (
        all(low <= value <= high for value, low, high in coco.values())
        and coco['bleu_1'][0] > coco['bleu_4'][0]
    )
    assert f"{coco['meteor'][0]:.3f}" in done.stdout

def test_eval_without_java(call, trained, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    done = call('capnb_eval', '--split', 'test', '--coco', cwd=trained[0])
    assert (
        done.returncode == 1
        and "there is no program 'java'" in done.stderr
        and 'captioned' not in done.stdout
        and len(done.stderr.splitlines()) == 1
    )

# --- Captions for files

@pytest.fixture(scope='module')
def album(trained):
    "Images beside the folder of checkpoints: a file, and a folder with another folder in it."
    book, names = Storybook('test'), ['one.png', 'album/two.jpg', 'album/deep/three.PNG', 'album/notes.txt']
    (trained[0]/'album'/'deep').mkdir(parents=True)
    for i,name in enumerate(names[:3]):
        book[i]['image'].save(trained[0]/name)
    (trained[0]/names[3]).write_text('no image')
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
    found, files = json.loads(done.stdout), [
        'one.png',
        'album/deep/three.PNG',
        'album/two.jpg',
        'album/deep/three.PNG',
    ]
    assert [r['file'] for r in found] == files and all(set(r) == {'file', 'caption'} for r in found)
    model = load_model_from_checkpoint(newest)[0]
    assert [r['caption'] for r in found] == model.caption([open_image(album/f) for f in files])

def test_caption_prints_a_line(run, album, newest):
    done = run('capnb_caption', 'one.png', '--checkpoint', newest, cwd=album)
    caption = load_model_from_checkpoint(newest)[0].caption(open_image(album/'one.png'))
    assert (done.returncode, done.stdout) == (0, f'one.png: {caption}\n'), done.stderr[-3000:]

def test_caption_takes_the_newest(call, album, newest, tmp_path):
    """By time, then by epoch as a number; whatever the file system says, and none that has no metadata.

    The wrong ones cannot be loaded.
    """
    metadata = newest.with_name(newest.name.replace('model_state_dict', 'training_metadata')).with_suffix(
        '.json'
    )
    for name in ('20300101_000000-10', '20300101_000000-9', '20200101_000000-99', '20310101_000000-1'):
        weights = tmp_path/f'model_state_dict_{name}.pth'
        if name == '20300101_000000-10':
            shutil.copy(newest, weights)
        else:
            weights.write_bytes(b'not to be loaded')
        if name != '20310101_000000-1':
            shutil.copy(metadata, tmp_path/f'training_metadata_{name}.json')
    os.utime(tmp_path/'model_state_dict_20300101_000000-10.pth', (0, 0))
    done = call('capnb_caption', 'one.png', '--folder', tmp_path, cwd=album)
    assert done.returncode == 0 and done.stdout.startswith('one.png: '), done.stderr[-3000:]

# --- The best checkpoint

def best_of(folder):
    losses = {path: read_metadata(path)['validation_loss'] for path in folder.glob('*.pth')}
    return min(losses, key=losses.get)

def test_last_line_names_the_best(trained, saved):
    best = best_of(saved)
    metadata = read_metadata(best)
    line = (
        f"🏆 Best by validation loss: epoch {metadata['epoch']}, {metadata['validation_loss']:.4f},"
        f" {best.relative_to(trained[0])}; other commands take it with --best"
    )
    assert trained[1].splitlines()[-1] == line

@pytest.fixture(scope='module')
def overtrained(album, saved, tmp_path_factory):
    "A folder in which the first epoch is the best, and an older run that was better still."
    folder = tmp_path_factory.mktemp('overtrained')
    shutil.copytree(saved, folder/'saved_models')
    shutil.copy(album/'one.png', folder)
    change = lambda path, loss: path.write_text(
        json.dumps(json.loads(path.read_text(encoding='utf-8')) | dict(validation_loss=loss)),
        encoding='utf-8',
    )
    first, second = sorted((folder/'saved_models').glob('*.json'))
    change(first, .25)
    change(second, .5)
    for path in first, next((folder/'saved_models').glob('*-1.pth')):
        shutil.copy(path, re.sub(r'\d{8}_\d{6}', '20200101_000000', str(path)))
    change(folder/'saved_models'/'training_metadata_20200101_000000-1.json', .1)
    return folder

def test_best_is_taken(call, overtrained, monkeypatch):
    "By every command that takes a checkpoint; the newest run's, of however many."
    old, first, second = sorted((overtrained/'saved_models').glob('*.pth'))
    caption = lambda path: load_model_from_checkpoint(path)[0].caption(overtrained/'one.png')
    said = [call('capnb_caption', 'one.png', *words, cwd=overtrained).stdout for words in (['--best'], [])]
    assert said == [f'one.png: {caption(first)}\n', f'one.png: {caption(second)}\n']
    taken = []
    def take(checkpoint, *args, **kwargs):
        taken.append(Path(checkpoint).name)
        raise ValueError('that is enough')
    for name in (
        'capnb.run.scoring.load_model_from_checkpoint',
        'capnb.run.sharing.share',
        'capnb.run.serving.server.serve',
        'capnb.run.scale.jobs.read_metadata',
        'capnb.checkpoint.read_metadata',
    ):
        monkeypatch.setattr(name, take)
    commands = (
        ['capnb_eval'],
        ['capnb_share', 'shared'],
        ['capnb_serve'],
        ['capnb_scale', 'one.png', 'out'],
        ['capnb_scale', 'one.png', 'out', '--encode'],
    )
    for words in commands:
        for more in (['--best'], []):
            assert call(*words, *more, cwd=overtrained).stderr.endswith('that is enough\n')
    assert taken == [first.name, second.name]*len(commands)

def test_best_is_not_known(call, overtrained, tmp_path):
    for path in (overtrained/'saved_models').glob('*-1.*'):
        if '_2020' not in path.name:
            shutil.copy(path, tmp_path)
    done = call('capnb_caption', overtrained/'one.png', '--best', '--checkpoint', 'x.pth', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        'caption: name a checkpoint or ask for the best one of a run with --best, not both\n',
    )
    notes = next(tmp_path.glob('*.json'))
    notes.write_text(
        json.dumps(json.loads(notes.read_text(encoding='utf-8')) | dict(validation_loss=None)),
        encoding='utf-8',
    )
    done = call('capnb_caption', overtrained/'one.png', '--best', '--folder', '.', cwd=tmp_path)
    assert (
        done.returncode == 1
        and 'knows its validation loss' in done.stderr
        and len(done.stderr.splitlines()) == 1
    )

# --- Settings from files

SETTINGS = dict(
    training_size_limit=8,
    batch_size=8,
    num_epochs=1,
    evaluation_enabled=False,
    adapter_width=16,
    learning_rate=2e-05,
    max_steps=1,
    max_caption_length=9,
    seed=3,
    decoder_name=None,
)

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

BAD_FILES = {
    'broken.png': b'no picture',
    'cut.png': None,
    'wrong.pth': b'no weights',
    'unknown.json': b'{"batchsize": 4}',
    'type.yaml': b'batch_size: many',
    'broken.yaml': b'batch_size: [4',
    'bytes.yaml': b'\xff\xfe\xfa\x00',
    'list.json': b'[1, 2]',
    'empty.yaml': b'# nothing yet, but a comment',
}

# name: command, arguments, a word that the message must hold
FAULTS = {
    'image is missing': ('capnb_caption', ['gone.png'], 'gone.png'),
    'pattern without an image': ('capnb_caption', ['gone*.png'], 'gone*.png'),
    'folder without an image': ('capnb_caption', ['empty'], 'empty'),
    'image is no image': ('capnb_caption', ['broken.png', '--folder', 'saved_models'], 'broken.png'),
    'image is cut off': ('capnb_caption', ['cut.png', '--folder', 'saved_models'], 'cut.png'),
    'checkpoint is an image': ('capnb_caption', ['one.png', '--checkpoint', 'one.png'], 'one.png'),
    'checkpoint is cut off': (
        'capnb_caption',
        ['one.png', '--checkpoint', 'saved_models/model_state_dict_cut.pth'],
        'cut.pth',
    ),
    'checkpoint is missing': ('capnb_caption', ['one.png', '--checkpoint', 'gone.pth'], 'gone.pth'),
    'checkpoint is a folder': ('capnb_caption', ['one.png', '--checkpoint', 'saved_models'], 'saved_models'),
    'checkpoint has no metadata': (
        'capnb_eval',
        ['alone/model_state_dict_20300101_000000-1.pth'],
        'metadata',
    ),
    'checkpoint has broken metadata': (
        'capnb_eval',
        ['alone/model_state_dict_20300101_000000-2.pth'],
        'metadata',
    ),
    'checkpoint of another shape': (
        'capnb_eval',
        ['alone/model_state_dict_20300101_000000-3.pth'],
        'prefix_length is 3',
    ),
    'no checkpoint yet': ('capnb_eval', ['--folder', 'empty'], 'empty'),
    'split is not known': ('capnb_eval', ['--split', 'exam'], 'exam'),
    'preset is not known': ('capnb_train', ['--preset', 'quick'], 'quick'),
    'preset without its models': ('capnb_train', ['--preset', 'flickr30k'], 'openai/clip-vit-base-patch32'),
    'model of a size that never was': (
        'capnb_train',
        ['--tokenizer_name', 'Qwen/Qwen3-1.5B'],
        'Qwen/Qwen3-1.7B',
    ),
    'encoder as a decoder': ('capnb_train', ['--tokenizer_name', 'storybook-clip'], 'cannot write text'),
    'decoder as an encoder': (
        'capnb_train',
        ['--encoder_name', 'storybook-qwen3'],
        'an image encoder is needed',
    ),
    'checkpoint to begin with is missing': (
        'capnb_train',
        ['--init_from', 'gone.pth', '--training_size_limit', '8'],
        'gone.pth',
    ),
    'data is not known': ('capnb_train', ['--data', 'photos'], 'photos'),
    'value is too low': ('capnb_train', ['--batch_size', '0'], 'batch_size'),
    'value is no number': ('capnb_train', ['--batch_size', 'many'], 'batch_size'),
    'value is not yes or no': ('capnb_train', ['--evaluation_enabled', 'perhaps'], 'evaluation_enabled'),
    'flag is not known': ('capnb_train', ['--batchsize', '4'], 'batchsize'),
    'flag of another command': ('capnb_caption', ['one.png', '--split', 'test'], 'split'),
    'no image is named': ('capnb_caption', [], 'images'),
    'image size does not fit': ('capnb_train', ['--image_size', '30'], 'image_size'),
    'config is missing': ('capnb_train', ['--config', 'gone.yaml'], 'gone.yaml'),
    'config has an unknown key': ('capnb_train', ['--config', 'unknown.json'], 'batchsize'),
    'config has a wrong type': ('capnb_train', ['--config', 'type.yaml'], 'batch_size'),
    'config is not YAML': ('capnb_train', ['--config', 'broken.yaml'], 'broken.yaml'),
    'config is not text': ('capnb_train', ['--config', 'bytes.yaml'], 'bytes.yaml'),
    'config is a list': ('capnb_train', ['--config', 'list.json'], 'list.json'),
    'config is empty': ('capnb_train', ['--config', 'empty.yaml'], 'empty.yaml'),
}
# in a process of its own: what libraries say at its start or end is seen too
OUTSIDE = ('image is no image', 'flag is not known')

def lay_out_faults(folder, newest):
    "Write the files that `FAULTS` speaks of."
    picture = (folder/'one.png').read_bytes()
    half = picture[:len(picture)//2]
    for name,content in BAD_FILES.items():
        (folder/name).write_bytes(half if content is None else content)
    (folder/'saved_models'/'model_state_dict_cut.pth').write_bytes(newest.read_bytes()[:-900])
    (folder/'empty').mkdir()
    (folder/'alone').mkdir()
    for n in (1,2,3):
        shutil.copy(newest, folder/'alone'/f'model_state_dict_20300101_000000-{n}.pth')
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
    if fault in OUTSIDE:
        done = run(command, *args, cwd=faults, fresh=True)
    else:
        done = call(command, *args, cwd=faults)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and word in lines[0], done.stderr[-3000:]

def test_good_pictures_are_captioned_beside_a_bad_one(call, album):
    done = call('capnb_caption', 'one.png', 'album/notes.txt', '--json', cwd=album)
    assert done.returncode != 0 and 'notes.txt' in done.stderr and len(done.stderr.splitlines()) == 1
    good, bad = json.loads(done.stdout)
    assert (
        set(good) == {'file', 'caption'}
        and set(bad) == {'file', 'error'}
        and (good['file'], bad['file']) == ('one.png', 'album/notes.txt')
    )

def test_json_is_all_that_is_printed(call, tmp_path, monkeypatch):
    "What the library says meanwhile goes to the error output."
    def fused(decoder):
        log.warning('a warning')
        return 'RMSNorm'
    monkeypatch.setattr('capnb.fast.parts.use_fused', fused)
    Storybook('test')[0]['image'].save(tmp_path/'one.png')
    done = call('capnb_caption', 'one.png', '--model', 'storybook', '--json', cwd=tmp_path)
    assert done.returncode == 0 and [row['file'] for row in json.loads(done.stdout)] == ['one.png']
    assert 'a warning' in done.stderr and 'Computed by fused kernels: RMSNorm' in done.stderr

# --- A checkpoint or a folder of them

@pytest.mark.parametrize(
    'words', [['some.pth'], ['--predictions', 'some.json', '--data', 'album']], ids=' '.join
)
def test_eval_takes_a_file_or_a_folder(call, tmp_path, words):
    done = call('capnb_eval', *words, '--folder', 'other', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.startswith('eval: name one: a checkpoint, predictions, or the folder')

@pytest.mark.parametrize(
    'words', [['capnb_eval'], ['capnb_caption', 'one.png', '--checkpoint']], ids=' '.join
)
def test_a_folder_in_place_of_a_checkpoint_is_told(call, tmp_path, words):
    Storybook('test')[0]['image'].save(tmp_path/'one.png')
    (tmp_path/'models').mkdir()
    done = call(*words, 'models', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert 'models is a folder; name a file model_state_dict_....pth in it' in done.stderr

# --- Help

def first_words(module, function):
    "What the docstring of a function says, read from its file."
    tree = ast.parse((ROOT/(module.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
    return next(
        ast.get_docstring(node)
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_help_says_what_it_does(call, script, tmp_path):
    name, module, function = re.split('[=:]', script)
    done = call(name, '--help', cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    words = lambda text: ''.join(text.split()) # however the lines are broken
    assert words(first_words(module, function)) in words(done.stdout)
    if name == 'capnb_train':
        assert all(
            f'--{f.name} ' in done.stdout and words(f.metadata['help']) in words(done.stdout)
            for f in fields(Hyperparameters)
        )

def flags_of(call, name, cwd):
    "What `--help` says of each flag, in one line each."
    text = call(name, '--help', cwd=cwd).stdout.partition('options:')[2]
    found = [' '.join(part.split()) for part in re.split(r'\n  (?=-)', text)[1:]]
    return {re.search(r'--(\w+)', part)[1]: part for part in found}

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_help_says_defaults_and_choices(call, script, tmp_path):
    "Of every flag; twice, since a parser lives as long as its process."
    name, module, function = re.split('[=:]', script)
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    for _ in range(2):
        said = flags_of(call, name, tmp_path)
    assert 'version' in said
    for flag,p in parameters.items():
        if not p.annotation.opt: continue
        settings = {f.name: f for f in fields(Hyperparameters)}
        if flag in settings and p.kind is p.KEYWORD_ONLY:
            default = settings[flag].default
            shown = (
                'not set'
                if default is None
                else str(default).lower() if isinstance(default, bool) else default
            )
            text = said[flag].replace('- ', '-') # a line may end within a name with a hyphen
            assert f'(default: {shown}' in text, said[flag]
            if flag in PRESETS['storybook'] and PRESETS['storybook'][flag] != default:
                assert f"in the storybook {PRESETS['storybook'][flag]})" in text
        elif p.default not in (None, inspect.Parameter.empty):
            assert said[flag].count(f'(default: {p.default})') == 1, said[flag]
        for choice in p.annotation.choices or ():
            assert str(choice) in said[flag]

HELP = """
import contextlib, importlib, io, json, re, sys
found, before = {}, set()
for script in sys.argv[1:]:
    _, module, function = re.split('[=:]', script)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = getattr(importlib.import_module(module), function)(['--help'])
        except SystemExit as e:
            code = e.code
    heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & sys.modules.keys() - before
    found[script] = out.getvalue(), code, sorted(heavy)
    before |= heavy
print(json.dumps(found))
"""

@pytest.fixture(scope='module')
def helped(environment, tmp_path_factory):
    """What a fresh process says that asks every command for help: the output of each, its exit code, and the
    heavy modules that are there since."""
    done = subprocess.run(
        [sys.executable, '-c', HELP, *CFG['console_scripts'].split()],
        cwd=tmp_path_factory.mktemp('helped'),
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (done.returncode, done.stderr) == (0, ''), done.stderr
    return json.loads(done.stdout)

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_help_imports_nothing_heavy(helped, script):
    said, code, heavy = helped[script]
    assert code == 0 and '--quiet' in said and heavy == []

def test_help_is_there_within_a_second(start, environment, tmp_path):
    "Beyond what Python itself takes; the middle of five each."
    def seconds(begin):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            with begin() as process:
                process.communicate()
            times.append(time.perf_counter()-began)
        return sorted(times)[2]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    bare = seconds(lambda: subprocess.Popen([sys.executable, '-c', 'pass'], **quiet))
    assert seconds(lambda: start('capnb_train', '--help', cwd=tmp_path, fresh=True)) - bare < 1

def test_quiet_says_results_only(run, call, trained, holiday, tmp_path):
    small = SMALL | dict(num_epochs=1, max_steps=1, data=holiday)
    done = run('capnb_train', '--quiet', *flags(small), cwd=tmp_path, fresh=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert all(line.startswith('⚠') for line in done.stdout.splitlines()), done.stdout
    assert list((tmp_path/'saved_models').glob('model_state_dict_*.pth'))
    done = call('capnb_eval', '--quiet', '--split', 'test', cwd=trained[0])
    assert done.stderr == '' and done.stdout.lstrip().startswith('test\nROUGE-L')
    assert logging.getLogger('capnb').level == logging.INFO # as before

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_version(call, script, tmp_path):
    assert call(script.split('=')[0], '--version', cwd=tmp_path).stdout == f"capnb {CFG['version']}\n"

# command, what comes before the flag: flag, value, what is allowed
NUMBERS = [
    (['capnb_train'], 'batch_size', '0', 'a whole number of 1 or more'),
    (['capnb_train'], 'learning_rate', 'nan', 'a number above 0'),
    (['capnb_train'], 'batch_size', '2.5', 'a whole number of 1 or more'),
    (['capnb_train'], 'batch_size', 'many', 'a whole number of 1 or more'),
    (['capnb_train'], 'seed', '-1', 'a whole number of 0 or more and up to 4294967295'),
    (['capnb_train'], 'seed', '20261127135500', 'a whole number of 0 or more and up to 4294967295'),
    (['capnb_caption', 'x.png'], 'seed', '4294967296', 'a whole number of 0 or more and up to 4294967295'),
    (
        ['capnb_experiment', 'grid', 'photographs'],
        'seed',
        '4294967296',
        'a whole number of 0 or more and up to 4294967295',
    ),
    (['capnb_train'], 'evaluation_enabled', 'perhaps', 'true or false'),
    (['capnb_sweep'], 'trials', '0', 'a whole number of 1 or more'),
    (['capnb_sweep'], 'num_epochs', '-3', 'a whole number of 1 or more'),
    (['capnb_caption', 'x.png'], 'num_beams', '0', 'a whole number of 1 or more'),
    (['capnb_caption', 'x.png'], 'num_beams', '-2', 'a whole number of 1 or more'),
    (['capnb_scale', 'in', 'out'], 'num_beams', '0', 'a whole number of 1 or more'),
    (['capnb_scale', 'in', 'out'], 'gpus', '-1', 'a number of 0 or more'),
    (['capnb_scale', 'in', 'out'], 'workers', 'two', 'a whole number of 1 or more'),
    (['capnb_serve'], 'port', '80', 'a whole number of 1024 or more and up to 65535'),
    (['capnb_serve'], 'timeout', '0', 'a number above 0'),
    (['capnb_serve'], 'max_upload', 'inf', 'a number above 0'),
    (['capnb_data', 'check', 'x'], 'limit', '0', 'a whole number of 1 or more'),
    (['capnb_pretrain'], 'scale', '0', 'a number above 0'),
]

@pytest.mark.parametrize(
    'command,flag,value,allowed', NUMBERS, ids=lambda x: x[0] if isinstance(x, list) else str(x)[:12]
)
def test_numbers_are_checked_the_same_way(call, tmp_path, command, flag, value, allowed):
    done = call(*command, f'--{flag}', value, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '') and not list(tmp_path.iterdir())
    wrong = value if re.fullmatch(r'-?[\d.]+|nan|inf', value) else repr(value)
    assert done.stderr == f"{command[0].removeprefix('capnb_')}: {flag} is {wrong}; allowed: {allowed}\n"

def test_dashes_in_flags(call, tmp_path):
    said = [
        call('capnb_train', *words, cwd=tmp_path).stderr
        for words in (('--batch-size', '0'), ('--batch-size=0',), ('--batch_size', '0'))
    ]
    assert len(set(said)) == 1 and said[0].startswith('train: batch_size is 0')

def test_home_folder(call, album, newest, tmp_path, monkeypatch):
    "`~` is the home folder in every flag that takes a path, and in settings."
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path/'models').mkdir()
    for path in (
        newest,
        newest.with_name(newest.name.replace('model_state_dict', 'training_metadata')).with_suffix('.json'),
    ):
        shutil.copy(path, tmp_path/'models')
    shutil.copy(album/'one.png', tmp_path/'one.png')
    for words in (
        ['~/one.png', '--folder', '~/models'],
        ['~/o*.png', f'--checkpoint=~/models/{newest.name}'],
    ):
        done = call('capnb_caption', *words, cwd=album)
        assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path/'one.png'}: "), done.stderr
    (tmp_path/'my.yaml').write_text('output_dir: ~/runs\nmax_steps: 1\n')
    done = call(
        'capnb_train',
        '--config',
        '~/my.yaml',
        *flags(SMALL | dict(evaluation_enabled='false')),
        cwd=tmp_path / 'models'
    )
    assert done.returncode == 0, done.stderr
    assert read_metadata(newest_checkpoint(tmp_path / 'runs'))['hyperparameters']['output_dir'] == str(
        tmp_path / 'runs'
    )
    paths = 'data encoder_name decoder_name tokenizer_name init_from features_dir output_dir'
    names = {name: f'~/{name}' for name in paths.split()}
    h = Hyperparameters(**names)
    assert {name: h[name] for name in names} == {name: str(tmp_path/name) for name in names}

# flags that take a text which is no path
TEXTS = {
    'name',
    'prompt',
    'lr_scheduler_type',
    'preset',
    'action',
    'split',
    'only',
    'vary',
    'sampler',
    'push',
    'hardware',
    'device',
    'address',
    'host',
    'api_key',
    'image_column',
    'caption_column',
    'data_revision',
    'encoding',
    'features',
    'mixed_precision',
    'bad_rows',
    'report_to',
    'allowed_hosts',
    'model',
}

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_every_path_flag_knows_the_home_folder(script, monkeypatch):
    name, module, function = re.split('[=:]', script)
    monkeypatch.setenv('HOME', '/home/me')
    for flag,p in inspect.signature(getattr(importlib.import_module(module), function)).parameters.items():
        is_path = p.annotation.type and p.annotation.type('~/x') == '/home/me/x'
        assert is_path or p.annotation.type is not str or flag in TEXTS, flag
        assert p.annotation.type not in (int, float), f'{flag} is no Number'

@pytest.mark.parametrize('script', CFG['console_scripts'].split(), ids=lambda script: script.split('=')[0])
def test_no_path_flag_takes_an_empty_text(script, monkeypatch):
    "As of a shell variable that is not set: it would count as a flag that is not given."
    name, module, function = re.split('[=:]', script)
    monkeypatch.setenv('HOME', '/home/me')
    for flag,p in inspect.signature(getattr(importlib.import_module(module), function)).parameters.items():
        if p.annotation.type and p.annotation.type('~/x')=='/home/me/x':
            with pytest.raises(ArgumentTypeError, match='the path is empty'):
                p.annotation.type('')
                pytest.fail(flag)

EMPTY = [
    ['capnb_train', '--resume'],
    ['capnb_train', '--init_from'],
    ['capnb_train', '--config'],
    ['capnb_caption', 'x.png', '--checkpoint'],
    ['capnb_caption', '--model', 'storybook', 'images'],
    ['capnb_eval', '--json_file'],
    ['capnb_eval', 'checkpoint'],
]

@pytest.mark.parametrize('words', EMPTY, ids=' '.join)
def test_an_empty_path_is_told(call, tmp_path, words):
    "Of a flag, or of an argument without one."
    *words, name = words
    done = call(*words, *[name]*name.startswith('--'), '', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, '') and not list(tmp_path.iterdir())
    said = f'argument {name}: the path is empty; see --help\n'
    assert done.stderr == f"{words[0].removeprefix('capnb_')}: {said}"

def test_an_empty_path_is_no_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match='no run to go on with'):
        train(resume='')

# --- Where a command writes

# what a command is told to write, and where it cannot: in a folder that is a file, over a folder
UNWRITABLE = [
    ['capnb_train', '--output_dir'],
    ['capnb_sweep', '--output_dir'],
    ['capnb_eval', '--report'],
    ['capnb_eval', '--json_file'],
    ['capnb_eval', '--csv'],
    ['capnb_eval', '--coco_results'],
    ['capnb_data', 'check', 'album', '--json_file'],
    ['capnb_bench', '--json'],
    ['capnb_share'],
    ['capnb_scale', 'album'],
    ['capnb_pretrain', '--folder'],
    ['capnb_results', 'none.pth', '--file'],
]

LONG_WORK = [
    'capnb.run.entry.prepare',
    'capnb.saving.load_model_from_checkpoint',
    'capnb.run.scoring.load_for',
    'capnb.run.sources.check.check_data',
    'capnb.fast.bench.bench',
    'capnb.run.scale.jobs.run_job',
    'capnb.insight.pretraining.pretrain',
    'capnb.run.sharing.share',
    'capnb.run.scoring.score_checkpoint',
    'capnb.run.results.result_row',
]

@pytest.mark.parametrize('command', UNWRITABLE, ids=' '.join)
def test_what_cannot_be_written_is_told_first(call, trained, command):
    "Before images are read, models loaded or processes started."
    def stop(*args, **kwargs):
        raise AssertionError('too late')
    for name in LONG_WORK: # a module that is first imported while another is replaced would keep the stand-in
        importlib.import_module(name.rpartition('.')[0])
    with pytest.MonkeyPatch.context() as m:
        for name in LONG_WORK:
            m.setattr(name, stop)
        done = call(*command, 'one.txt/below.json', cwd=trained[0])
    assert (
        done.returncode == 1
        and not done.stdout
        and re.fullmatch(r"\w+: \[Errno \d+\] Not a directory: 'one.txt/below.json'\n", done.stderr)
    ), done.stderr

# --- A folder of one's own images

def test_folder_from_pictures_to_scores(call, holiday, tmp_path):
    done = call('capnb_train', '--data', holiday, '--num_epochs', 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = read_metadata(newest_checkpoint(tmp_path/'saved_models'))
    assert (
        metadata['data'] == dict(name=str(holiday), train=24, validation=3, test=3)
        and metadata['facts_f1'] is None
    )
    judged = call('capnb_eval', '--json_file', 'scores.json', cwd=tmp_path) # the same images are held back
    assert judged.returncode == 0, judged.stderr[-3000:]
    assert json.loads((tmp_path / 'scores.json').read_text(encoding='utf-8'))['test'][
        'rouge_l'
    ] == pytest.approx(metadata['test']['rouge_l'], abs=1e-6)

def test_folder_with_a_bad_row_is_told_before_training(call, tmp_path):
    (tmp_path/'captions.csv').write_text('file_name,caption\nnowhere.png,A cat.\n', encoding='utf-8')
    done = call('capnb_train', '--data', tmp_path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, '')
    assert (
        done.stderr.strip() == f"train: {tmp_path/'captions.csv'}: line 2: there is no image 'nowhere.png'"
    )

# --- Output that has no letters for what is said

NARROW = dict(PYTHONUTF8='0', PYTHONIOENCODING='cp1252', LC_ALL='C')

def into_file(words, cwd, environment, encoding):
    "Run Python with its output in a file, on a system whose encoding is `encoding`."
    with open(cwd/'out.txt', 'wb') as out:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=cwd,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment(**NARROW | dict(PYTHONIOENCODING=encoding)),
        )
    return (
        done.returncode,
        (cwd / 'out.txt').read_bytes().decode(encoding),
        done.stderr.decode(encoding, 'replace'),
    )

LIBRARY = """
from capnb.run.entry import train
from capnb.storybook import Storybook
rows = [dict(image=Storybook()[i]['image'], caption='\\u4e00\\u53ea\\u732b \\U0001f408') for i in range(24)]
result = train(
    training_size_limit=16, batch_size=8, num_epochs=1, adapter_width=16, max_caption_length=9, data=rows,
    output_dir='runs',
)
assert result.checkpoint.exists()
"""

@pytest.mark.parametrize('encoding', ['cp1252', pytest.param('ascii', marks=pytest.mark.slow)])
def test_message_never_stops_a_run(environment, tmp_path, encoding):
    "Neither training in a script of one's own, nor a command."
    code, out, err = into_file(['-c', LIBRARY], tmp_path, environment, encoding)
    assert code == 0, err[-3000:]
    assert '? Model saved successfully!' in out and '? ROUGE-L score: ' in out
    assert list((tmp_path/'runs').glob('samples_*.png'))

def test_command_writes_to_a_narrow_file(environment, album, tmp_path):
    "What is a caption or a file name is not lost either: it is escaped."
    shutil.copytree(album/'saved_models', tmp_path/'saved_models')
    shutil.copy(album/'one.png', tmp_path/'\u732b.png')
    code, out, err = into_file(
        ['-c', 'from capnb.run.commands import caption_command; caption_command()', '\u732b.png'],
        tmp_path,
        environment,
        'cp1252',
    )
    assert code == 0 and re.fullmatch(r'(\\u\w{4})+\.png: .+\r?\n', out), (out, err[-3000:])

JSON = """
from capnb.run.command_line import _lenient_output
from capnb.run.commands import _json_array
_lenient_output()
with _json_array() as add:
    add(dict(file='caf\\xe9 \\U0001f408'))
"""

@pytest.mark.parametrize('encoding', ['cp1251', 'ascii', 'utf-8'])
def test_json_in_a_narrow_file_has_its_own_escapes(environment, tmp_path, encoding):
    code, out, err = into_file(['-c', JSON], tmp_path, environment, encoding)
    assert code == 0 and json.loads(out) == [dict(file='caf\xe9 \U0001f408')], (out, err[-3000:])
    assert ('caf\xe9' in out) == (encoding == 'utf-8')

def test_library_prints_in_one_place():
    "Nothing but `say` prints, or a message might stop a run again."
    found = [
        (path.name, node.lineno)
        for path in (ROOT / 'capnb').rglob('*.py')
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == 'print'
        and 'file' not in {k.arg for k in node.keywords}
    ]
    assert {name for name, _ in found} <= {'files.py', 'commands.py', 'bench.py'} and len(
        [f for f in found if f[0] == 'files.py']
    ) == 1, found

def test_words_after_two_dashes_are_no_flags():
    words = ['--batch-size=4', '--', '--my-page.png', '--learning-rate']
    assert _as_flags(words, {}) == ['--batch_size=4', *words[1:]]
