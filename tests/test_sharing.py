"A captioner given away: over a hub to people with capnb, and as a LLaVA to programs without it."
import json, os, re, shutil, socket, subprocess, sys, tempfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.entry import train
from capnb.hub import model_path
from capnb.images import open_image
from capnb.run import sharing
from capnb.run.share_command import share_command
from capnb.run.sharing import (
    CapnbForImageCaptioning, CapnbProcessor, as_checkpoint, config_of, share, without_paths
)
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from hub import Hub

SHORT = dict(
    training_size_limit=64, num_epochs=1, evaluation_enabled=False, adapter_width=32, prefix_length=2
)

def test_only_paths_lose_their_folders():
    "A prompt and the name of a column may begin with a slash, too."
    h = as_hyperparameters(prompt='/no_think', image_column='/images/x', output_dir='/home/me/runs')
    shared = config_of(dict(hyperparameters=asdict(h))).hyperparameters
    assert [shared[k] for k in ('prompt', 'image_column', 'output_dir')] == ['/no_think', '/images/x', 'runs']

def test_the_metadata_keeps_such_texts_and_comes_back(tmp_path):
    result = train(SHORT, max_steps=1, prompt='/no_think', output_dir=str(tmp_path/'runs'), device='cpu')
    share(result.checkpoint, 'cpu').save_pretrained(tmp_path/'shared')
    back = read_metadata(as_checkpoint(tmp_path/'shared', tmp_path/'back', '20260101_000000'))
    assert [back['hyperparameters'][k] for k in ('prompt', 'output_dir')] == ['/no_think', 'runs']

def test_a_long_text_is_no_path():
    text = 'A very ' + 'long '*100 + 'caption of something black/white'
    assert without_paths(dict(caption=text)) == dict(caption=text)

def test_the_processor_asks_for_the_features_of_the_captioner(monkeypatch):
    asked = []
    def note(name, image_size=None, features='pooled'):
        asked.append(features)
        return None, 64, None
    monkeypatch.setattr(sharing, 'load_image_processor', note)
    CapnbProcessor(config_of(dict(hyperparameters=asdict(as_hyperparameters(features='patch')))))
    assert asked == ['patch']

@pytest.mark.parametrize('more', [dict(push_to_hub=True), dict(variant='fp16'), dict(max_shard_size='1MB')])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, more):
    with pytest.raises(ValueError, match=next(iter(more))):
        share(shipped_checkpoint(), 'cpu').save_pretrained(tmp_path/'out', **more)
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('file, content', [
    ('README.md', '# My project'), ('config.json', '{"model_type": "clip"}'), ('config.json', 'no JSON'),
    ('model.safetensors', '')
])
def test_other_files_are_not_replaced(tmp_path, capsys, file, content):
    (tmp_path/file).write_text(content)
    with pytest.raises(SystemExit):
        share_command([str(tmp_path), '--checkpoint', str(shipped_checkpoint())])
    assert f'holds another {file}' in capsys.readouterr().err and (tmp_path/file).read_text() == content

def test_a_shared_folder_may_be_written_again(tmp_path):
    for _ in range(2):
        share_command([str(tmp_path/'out'), '--checkpoint', str(shipped_checkpoint())])

def test_generation_settings_come_back(tmp_path):
    model, page = share(shipped_checkpoint(), 'cpu'), Storybook('test')[0]['image']
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 3, 5
    model.save_pretrained(tmp_path)
    pixels = CapnbProcessor.from_pretrained(tmp_path)(images=page)['pixel_values']
    back = CapnbForImageCaptioning.from_pretrained(tmp_path, device='cpu')
    assert back.generation_config.num_beams == 3
    assert back.generate(pixels).tolist() == model.generate(pixels).tolist()
    (tmp_path/'generation_config.json').unlink()
    assert CapnbForImageCaptioning.from_pretrained(tmp_path, device='cpu').generation_config.num_beams == 1

def test_ids_are_decoded_as_with_other_models(tmp_path):
    share(shipped_checkpoint(), 'cpu').save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    ids = processor(text=['A red cat.', 'A dog.'])['input_ids']
    assert processor.batch_decode(ids, skip_special_tokens=True) == ['A red cat.', 'A dog.']
    with pytest.raises(ValueError, match='there is only True'):
        processor.batch_decode(ids, skip_special_tokens=False)

@pytest.fixture(scope='module')
def hub():
    hub = Hub()
    yield hub
    hub.close()

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.fixture(scope='module')
def trained(run, hub, tmp_path_factory):
    """A captioner whose frozen parts came from the hub, by name: the folder it was trained in, and the
    environment."""
    here = tmp_path_factory.mktemp('sharing')
    for name in ('storybook-clip', 'storybook-qwen3'):
        hub.add(f'makers/{name}', files(here.__class__(model_path(name))), 'models')
    env = hub.environment(here/'home')
    settings = dict(SHORT, encoder_name='makers/storybook-clip', tokenizer_name='makers/storybook-qwen3')
    done = run('capnb_train', *(w for k,v in settings.items() for w in (f'--{k}', v)), cwd=here, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    Storybook('test')[0]['image'].save(here/'page.png')
    return here, env

def captioned(where, env, folder, code='model.captioner.caption(Image.open("page.png"))'):
    "What a fresh process says that loads a shared captioner from `where`."
    script = (
        'from PIL import Image\nfrom capnb.run.sharing import CapnbForImageCaptioning\nmodel ='
        f' CapnbForImageCaptioning.from_pretrained({where!r})\nprint({code})'
    )
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, cwd=folder, env={**os.environ, **env}
    )
    return done.stdout.strip(), done.stderr

def test_models_by_name_from_a_hub(trained, hub):
    metadata = read_metadata(newest_checkpoint(trained[0]/'saved_models'))
    assert metadata['revisions'] == {
        part: hub.repos['models', f'makers/storybook-{name}'].sha
        for part, name in (('encoder', 'clip'), ('decoder', 'qwen3'), ('tokenizer', 'qwen3'))
    }

def test_push_and_load_again(run, trained, hub):
    """What is uploaded is small, names the frozen parts with their revisions, and captions as the checkpoint
    does, even when `main` has moved on."""
    here, env = trained
    done = run('capnb_share', '--push', 'someone/captioner', cwd=here, env={**env, 'HF_TOKEN': 'hf_made_up'})
    assert done.returncode == 0, done.stderr[-3000:]
    pushed = hub.repos['models', 'someone/captioner'].files
    assert set(pushed) == {
        'README.md',
        'config.json',
        'generation_config.json',
        'model.safetensors',
        'training_metadata.json',
    }
    config, sha = json.loads(pushed['config.json']), hub.repos['models', 'makers/storybook-clip'].sha
    assert config['hyperparameters']['encoder_name'] == f'makers/storybook-clip@{sha}'
    assert b"from_pretrained('someone/captioner')" in pushed['README.md']
    wanted = run('capnb_caption', 'page.png', cwd=here, env=env).stdout.split(': ', 1)[1].strip()
    hub.repos['models', 'makers/storybook-clip'].revisions = {sha} # `main` is another commit now
    env = {**env, 'HF_HOME': str(here/'other_home')}
    said, errors = captioned('someone/captioner', env, here)
    hub.repos['models', 'makers/storybook-clip'].revisions = {sha, 'main'}
    assert said == wanted, errors[-3000:]

def test_pushing_without_the_right_is_one_line(run, trained, hub):
    here, env = trained
    done = run('capnb_share', '--push', 'someone/else', cwd=here, env=env)
    assert (
        done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'hf auth login' in done.stderr
    ), done.stderr[-3000:]
    assert ('models', 'someone/else') not in hub.repos

WRONG = {
    'encoder': ('--encoder_name', 'makers/nothing'),
    'decoder': ('--tokenizer_name', 'makers/nothing'),
    'gated': ('--tokenizer_name', 'makers/gated'),
}

@pytest.mark.parametrize('part', WRONG)
def test_model_that_is_not_there_is_one_line(run, trained, hub, part):
    "And nothing large was fetched before it was told."
    here, env = trained
    hub.add('makers/gated', {'config.json': b'{}'}, 'models', gated=True)
    hub.asked.clear()
    done = run('capnb_train', *WRONG[part], cwd=here, env=env)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and WRONG[part][1] in done.stderr
    assert 'hf auth login' in done.stderr and hub.asked and not any('safetensors' in a for a in hub.asked)

@pytest.mark.skipif(
    not os.environ.get('CAPNB_VLLM_PYTHON'), reason='set CAPNB_VLLM_PYTHON to a Python that has vLLM'
)
def test_vllm_says_the_same(run, tmp_path):
    result = train(
        training_size_limit=640,
        num_epochs=1,
        evaluation_enabled=False,
        features='patch',
        output_dir=str(tmp_path / 'saved_models'),
        device='cpu',
    )
    done = run('capnb_share', 'llava', '--llava', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = [Storybook('test')[i]['image'] for i in range(4)]
    for i,page in enumerate(pages):
        page.save(tmp_path/f'{i}.png')
    (tmp_path/'serve.py').write_text("""
from PIL import Image
from vllm import LLM, SamplingParams
if __name__ == '__main__':
    llm = LLM(model='llava', dtype='float32', max_model_len=256, enforce_eager=True)
    asked = [dict(prompt='<image>', multi_modal_data=dict(image=Image.open(f'{i}.png'))) for i in range(4)]
    for answer in llm.generate(asked, SamplingParams(temperature=0, max_tokens=48)):
        print('CAPTION', answer.outputs[0].text)
""")
    done = subprocess.run(
        [os.environ['CAPNB_VLLM_PYTHON'], 'serve.py'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=600,
        env={
            **{k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
            'VLLM_CPU_KVCACHE_SPACE': '1',
            'HF_HUB_OFFLINE': '1',
        },
    )
    assert [
        line.removeprefix('CAPTION ') for line in done.stdout.splitlines() if line.startswith('CAPTION')
    ] == result.model.caption(pages), done.stderr[-3000:]

# --- Nothing of the machine

@pytest.fixture(scope='module', params=['pooled', 'patch'])
def own(request, tmp_path_factory):
    "A checkpoint whose data, models, features and outputs all lie in the home of somebody."
    home = tmp_path_factory.mktemp('homes')/'ada.lovelace'
    album, book = home/'pictures'/'holiday', Storybook(n=30)
    album.mkdir(parents=True)
    for i in range(30):
        book[i]['image'].save(album/f'{i}.png')
    (album / 'captions.csv').write_text(
        'file_name,caption\n' + '\n'.join(f'{i}.png,"{book.captions(i)[0]}"' for i in range(30)),
        encoding='utf-8',
    )
    for name in ('storybook-clip', 'storybook-qwen3'):
        shutil.copytree(model_path(name), home/'models'/name.replace('storybook', 'my'))
    places = dict(
        data=album,
        encoder_name=home / 'models' / 'my-clip',
        tokenizer_name=home / 'models' / 'my-qwen3',
        features_dir=home / 'features',
        output_dir=home / 'runs',
    )
    first = train(SHORT, **places | dict(max_steps=1, features=request.param))
    return home, train(
        SHORT,
        **places
        | dict(max_steps=1, features=request.param, init_from=first.checkpoint, evaluation_enabled=True)
    )

def check_nothing_of(home, folder):
    "No file holds the home, the working folder, the name of the user or of the machine."
    known = [
        str(home),
        str(home.parent),
        home.name,
        os.getcwd(),
        str(Path.home()),
        tempfile.gettempdir() + '/',
        'host-of-ada',
    ]
    for name,content in files(folder).items():
        for told in known:
            assert told.encode() not in content, (name, told)

def test_nothing_of_the_machine_is_shared(own, call, tmp_path, monkeypatch):
    home, result = own
    monkeypatch.setenv('HOME', str(home))
    monkeypatch.setenv('USER', home.name)
    monkeypatch.setenv('LOGNAME', home.name)
    monkeypatch.setattr(socket, 'gethostname', lambda: 'host-of-ada')
    done = call('capnb_share', tmp_path/'shared', '--checkpoint', result.checkpoint, cwd=home)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith('⚠️')] == [
        'my-clip',
        'my-qwen3',
    ]
    check_nothing_of(home, tmp_path/'shared')
    config = json.loads((tmp_path/'shared'/'config.json').read_text(encoding='utf-8'))['hyperparameters']
    assert [config[k] for k in ('data', 'encoder_name', 'tokenizer_name', 'features_dir', 'output_dir')] == [
        'holiday',
        'my-clip',
        'my-qwen3',
        'features',
        'runs',
    ]
    assert config['init_from'].startswith('model_state_dict_')
    metadata = json.loads((tmp_path/'shared'/'training_metadata.json').read_text(encoding='utf-8'))
    assert metadata['data']['name'] == 'holiday' and metadata['losses'] == result.metadata['losses']
    card = (tmp_path/'shared'/'README.md').read_text(encoding='utf-8')
    assert 'images of holiday' in card and re.search(rf'steps of {config["batch_size"]} images', card)

def add_models(home, folder):
    "Put the frozen models of the captioner into its shared folder."
    for name in ('my-clip', 'my-qwen3'):
        shutil.copytree(home/'models'/name, folder/name)

def test_models_put_into_the_shared_folder_are_found(own, tmp_path):
    "Also by the processor, and what is shared on is as free of paths."
    home, result = own
    share(result.checkpoint, 'cpu').save_pretrained(tmp_path/'shared')
    add_models(home, tmp_path/'shared')
    (tmp_path/'shared').rename(tmp_path/'moved')
    model = CapnbForImageCaptioning.from_pretrained(tmp_path/'moved', device='cpu')
    page = Storybook('test')[0]['image']
    assert model.captioner.caption(page) == result.model.caption(page)
    assert CapnbProcessor.from_pretrained(tmp_path/'moved')(images=page)['pixel_values'].shape[-1] == 64
    model.save_pretrained(tmp_path/'again')
    check_nothing_of(home, tmp_path/'again')
    assert str(tmp_path).encode() not in b''.join(files(tmp_path/'again').values())

def test_models_put_into_the_repository_are_found(own, hub, tmp_path):
    home, result = own
    share(result.checkpoint, 'cpu').save_pretrained(tmp_path/'shared')
    add_models(home, tmp_path/'shared')
    hub.add('someone/own', files(tmp_path/'shared'), 'models')
    Storybook('test')[0]['image'].save(tmp_path/'page.png')
    said, errors = captioned('someone/own', hub.environment(tmp_path/'home'), tmp_path)
    assert said == result.model.caption(Storybook('test')[0]['image']), errors[-3000:]

def test_back_to_a_checkpoint_with_models_of_the_folder(own, tmp_path, monkeypatch):
    home, result = own
    share(result.checkpoint, 'cpu').save_pretrained(tmp_path/'shared')
    add_models(home, tmp_path/'shared')
    monkeypatch.chdir(tmp_path)
    weights = as_checkpoint('shared', tmp_path/'runs', '20260101_000000')
    monkeypatch.chdir(home)
    page = Storybook('test')[0]['image']
    assert load_model_from_checkpoint(weights, 'cpu')[0].caption(page) == result.model.caption(page)

def test_back_to_a_checkpoint_that_names_revisions(trained, hub, monkeypatch):
    "Also without an epoch in the metadata, which may be missing."
    here, _ = trained
    metadata = read_metadata(newest_checkpoint(here/'saved_models'))
    told = {k: v for k,v in metadata.items() if k!='epoch'}
    saved = []
    monkeypatch.setattr(sharing, 'save_checkpoint', lambda *args: saved.append(args))
    model = SimpleNamespace(captioner=None, metadata=told, config=config_of(metadata))
    monkeypatch.setattr(CapnbForImageCaptioning, 'from_pretrained', lambda name: model)
    as_checkpoint(str(here), here/'back', '20260101_000000')
    sha = hub.repos['models', 'makers/storybook-clip'].sha
    assert saved[0][3] == metadata['epoch']
    assert saved[0][4]['hyperparameters']['encoder_name'] == f'makers/storybook-clip@{sha}'

def test_the_processor_sees_images_as_people_do(own, tmp_path):
    home, result = own
    share(result.checkpoint, 'cpu').save_pretrained(tmp_path)
    add_models(home, tmp_path)
    page, exif = Storybook('test')[0]['image'], Image.Exif()
    exif[0x0112] = 6
    page.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'lying.jpg', exif=exif)
    processor = CapnbProcessor.from_pretrained(tmp_path)
    for image in (Image.open(tmp_path/'lying.jpg'), Image.new('RGBA', page.size, (0, 0, 0, 0))):
        wanted = result.model.encoder.prepare([open_image(image)])
        assert torch.equal(processor(images=image)['pixel_values'], wanted)

def test_nothing_of_the_machine_in_a_llava(own, call, tmp_path):
    home, result = own
    if result.metadata['hyperparameters']['features']=='pooled':
        pytest.skip('a LLaVA has patch features')
    done = call('capnb_share', tmp_path/'llava', '--llava', '--checkpoint', result.checkpoint, cwd=home)
    assert done.returncode == 0, done.stderr
    check_nothing_of(home, tmp_path/'llava')

def _rewrite(file, change):
    "Change the tensors of a safetensors file."
    state = load_file(file)
    change(state)
    save_file(state, file)

def _cut_off(file):
    file.write_bytes(file.read_bytes()[:-10])
def _no_numbers(file):
    _rewrite(file, lambda state: next(iter(state.values())).fill_(float('nan')))
def _other_rank(file):
    _rewrite(file, lambda state: state.update({'decoder.x.lora_A.default.weight': torch.zeros(4, 2)}))
def _other_width(file):
    _rewrite(file, lambda state: [state.update({k: v[:-2].clone()}) for k,v in list(state.items()) if v.ndim])

BROKEN_WEIGHTS = {
    _cut_off: 'model.safetensors cannot be read',
    _no_numbers: 'holds what is no number',
    _other_rank: 'lora_rank is none, the weights\' is 4',
    _other_width: '(adapter_width is 32, the weights\' is 30|the model needs)',
}

@pytest.mark.parametrize('damage', BROKEN_WEIGHTS)
def test_broken_shared_weights_are_one_line(own, tmp_path, damage):
    home, result = own
    share(result.checkpoint, device='cpu').save_pretrained(tmp_path)
    add_models(home, tmp_path)
    damage(tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=BROKEN_WEIGHTS[damage]) as e:
        CapnbForImageCaptioning.from_pretrained(str(tmp_path), device='cpu')
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)
