"Folders of models that strangers made: no code of theirs runs, and whatever is broken is one line."
import ast, builtins, json, pickle, shutil, struct
from pathlib import Path
import pytest, torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from capnb.fast.decoder_families import tiny_config
from capnb.hub import hub_errors, model_path
from capnb.encoder import load_encoder
from capnb.any_decoder import load_decoder

ROOT = Path(__file__).resolve().parent.parent
READS = {'from_pretrained', 'from_config', '_from_config'}
OURS = ('CapnbConfig', 'CapnbForImageCaptioning') # their folders are read by our own code

def reading_calls(path):
    "Calls in a module that read or build a model of `transformers`, but for those of our own classes."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READS
        ):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id in OURS: continue
        yield node

MODULES = sorted((ROOT/'capnb').rglob('*.py'))

@pytest.mark.parametrize('path', MODULES, ids=lambda p: p.relative_to(ROOT/'capnb').as_posix())
def test_no_call_forgets_to_refuse_code(path):
    for node in reading_calls(path):
        if node.func.attr == '_from_config':
            continue # of a class that is known, not an Auto class
        said = {k.arg: k.value for k in node.keywords}
        assert (
            'trust_remote_code' in said and said['trust_remote_code'].value is False
        ), f'{path.name}, line {node.lineno}'

def test_the_reading_calls_are_found():
    assert sum(1 for path in MODULES for _ in reading_calls(path)) >= 6

def change(path, **more):
    "Change settings of a JSON file."
    path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | more), encoding='utf-8')

class Bomb: # what unpickles it writes a file
    def __init__(self, marker):
        self.marker = marker
    def __reduce__(self): return (Path.touch, (self.marker,))

def plant(folder, marker):
    "Python files of every kind that transformers may run, each of which would write a marker."
    (folder/'custom_generate').mkdir()
    for name in (
        'configuration_evil.py',
        'modeling_evil.py',
        'tokenization_evil.py',
        'processing_evil.py',
        'custom_generate/generate.py',
    ):
        (folder/name).write_text(f'from pathlib import Path\nPath({str(marker)!r}).touch()\n')

def own_code(folder, marker):
    plant(folder, marker)
    change(
        folder / 'config.json',
        model_type='evil',
        auto_map={
            'AutoConfig': 'configuration_evil.C',
            'AutoModel': 'modeling_evil.M',
            'AutoModelForCausalLM': 'modeling_evil.M',
        },
    )

def own_tokenizer(folder, marker):
    plant(folder, marker)
    (folder/'tokenizer.json').unlink()
    change(
        folder / 'tokenizer_config.json',
        tokenizer_class='EvilTokenizer',
        auto_map={'AutoTokenizer': ['tokenization_evil.T', 'tokenization_evil.T']},
    )

def own_processor(folder, marker):
    plant(folder, marker)
    change(
        folder / 'preprocessor_config.json',
        image_processor_type='EvilProcessor',
        auto_map={'AutoImageProcessor': 'processing_evil.P'},
    )

def pickled(folder, marker):
    (folder/'model.safetensors').unlink()
    (folder/'pytorch_model.bin').write_bytes(pickle.dumps({'model.embed_tokens.weight': Bomb(marker)}))

def safetensors(folder, header, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / 'model.safetensors').write_bytes(
        struct.pack('<Q', len(text) if size is None else size) + text + bytes(64)
    )

def lying(**tensor):
    return lambda folder, marker: safetensors(
        folder, {'model.embed_tokens.weight': dict(dtype='F32', shape=[4, 4], data_offsets=[0, 64]) | tensor}
    )
def config(**settings):
    return lambda folder, marker: change(folder/'config.json', **settings)
def written(name, content):
    return lambda folder, marker: (folder/name).write_bytes(content)

DEEP = b'{"a":'*100_000 + b'1' + b'}'*100_000
BROKEN = {  # of a decoder's folder
    'own code': own_code,
    'own tokenizer': own_tokenizer,
    'pickled weights': pickled,
    'a shape that is not there': lying(shape=[2**40, 2**20]),
    'offsets beyond the end': lying(data_offsets=[0, 2**50]),
    'negative offsets': lying(data_offsets=[64, 0]),
    'no such number type': lying(dtype='F7'),
    'another shape': lying(),
    'a header longer than the file': lambda f, m: safetensors(f, {}, 2**60),
    'a header that is no JSON': lambda f, m: safetensors(f, b'\xff' * 64),
    'weights of no content': written('model.safetensors', b''),
    'config: a list': written('config.json', b'[1, 2]'),
    'config: nested': written('config.json', DEEP),
    'config: no text': written('config.json', b'\xff\xfe\x00'),
    'config: empty': written('config.json', b''),
    'config: model type is a number': config(model_type=7),
    'config: model type is a list': config(model_type=['qwen3']),
    'config: size is a text': config(hidden_size='wide'),
    'config: size is a list': config(hidden_size=[64]),
    'config: size is nothing': config(hidden_size=None),
    'config: size is 0': config(hidden_size=0),
    'config: size is negative': config(hidden_size=-64),
    'config: heads are 0': config(num_attention_heads=0),
    'config: a billion layers': config(num_hidden_layers=10**9),
    'config: a billion wide': config(hidden_size=10**9),
    'config: a billion tokens': config(vocab_size=10**9),
    'config: a billion heads': config(num_attention_heads=10**9),
    'config: no such activation': config(hidden_act='nothing'),
    'config: rope is a text': config(rope_parameters='wide'),
    'config: rope of another world': config(rope_parameters=dict(rope_type='other', rope_theta='x')),
    'config: layer types are numbers': config(layer_types=[1, 2]),
    'config: dtype is no type': config(dtype='float7', torch_dtype='float7'),
    'tokenizer: no JSON': written('tokenizer.json', b'\x00\xff' * 50),
    'tokenizer: empty': written('tokenizer.json', b''),
    'tokenizer: a list': written('tokenizer.json', b'[]'),
    'tokenizer: nested': written('tokenizer.json', DEEP),
    'tokenizer: no model': written('tokenizer.json', b'{"version": "1.0"}'),
    'tokenizer: a model of no kind': written(
        'tokenizer.json', b'{"version": "1.0", "model": {"type": "None", "vocab": 3}}'
    ),
    'tokenizer config: a list': written('tokenizer_config.json', b'[]'),
    'tokenizer config: nested': written('tokenizer_config.json', DEEP),
    'tokenizer config: class is a number': lambda f, m: change(
        f / 'tokenizer_config.json', tokenizer_class=3
    ),
    'tokenizer config: end is a list': lambda f, m: change(f / 'tokenizer_config.json', eos_token=[1]),
}

@pytest.fixture
def nobody_is_asked(monkeypatch):
    def ask(*args):
        raise AssertionError('somebody was asked on the terminal')
    monkeypatch.setattr(builtins, 'input', ask)

def copied(name, folder):
    shutil.copytree(model_path(name), folder)
    return folder

def refused(done, marker, *names):
    "One line that names the folder; no code has run."
    assert done.returncode == 1 and not marker.exists()
    assert (
        done.stderr.count('\n') == 1 and len(done.stderr) < 700 and 'Traceback' not in done.stderr
    ), done.stderr[-2000:]
    for name in names:
        assert name in done.stderr

@pytest.mark.parametrize('what', BROKEN)
def test_a_broken_decoder_is_one_line(what, call, tmp_path, nobody_is_asked):
    folder, marker = copied('storybook-qwen3', tmp_path/'broken'), tmp_path/'marker'
    BROKEN[what](folder, marker)
    done = call(
        'capnb_train',
        '--tokenizer_name',
        folder,
        '--max_steps',
        1,
        '--training_size_limit',
        2,
        '--evaluation_enabled',
        'False',
        cwd=tmp_path,
    )
    refused(done, marker, 'broken')

@pytest.mark.parametrize(
    'what, spoil',
    {
        'own code': own_code,
        'own processor': own_processor,
        'pickled weights': pickled,
        'a lying header': lying(shape=[2**40]),
        'config: nested': written('config.json', DEEP),
        'config: vision is a text': config(vision_config='wide'),
        'config: vision is a list': config(vision_config=[1]),
        'config: patches of 0': config(vision_config=dict(patch_size=0, image_size=64)),
        'config: no size': config(vision_config=dict(patch_size=None, image_size=64)),
        'processor: no JSON': written('preprocessor_config.json', b'\xff'),
        'processor: a list': written('preprocessor_config.json', b'[]'),
        'processor: of another kind': lambda f, m: change(
            f / 'preprocessor_config.json', image_processor_type='Nothing'
        ),
    }.items(),
    ids=lambda v: v if isinstance(v, str) else '',
)
def test_a_broken_encoder_is_one_line(what, spoil, call, tmp_path, nobody_is_asked):
    folder, marker = copied('storybook-clip', tmp_path/'broken'), tmp_path/'marker'
    spoil(folder, marker)
    done = call(
        'capnb_train',
        '--encoder_name',
        folder,
        '--max_steps',
        1,
        '--training_size_limit',
        2,
        '--evaluation_enabled',
        'False',
        cwd=tmp_path,
    )
    refused(done, marker, 'broken')

@pytest.mark.parametrize(
    'content',
    [b'', b'GGUF', b'GGUF\x03\x00\x00\x00' + b'\xff' * 64, b'no GGUF at all' * 10],
    ids=['empty', 'a name only', 'a lying header', 'something else'],
)
def test_a_broken_gguf_is_one_line(content, call, tmp_path):
    pytest.importorskip('gguf')
    (tmp_path/'broken.gguf').write_bytes(content)
    done = call(
        'capnb_train',
        '--tokenizer_name',
        tmp_path / 'broken.gguf',
        '--max_steps',
        1,
        '--training_size_limit',
        2,
        cwd=tmp_path,
    )
    refused(done, tmp_path/'marker', 'broken.gguf')

def test_code_beside_a_model_that_needs_none_is_left_alone(tmp_path, nobody_is_asked):
    "The families are known: what a folder brings for them is not run, and not needed."
    marker = tmp_path/'marker'
    clip, qwen = copied('storybook-clip', tmp_path/'clip'), copied('storybook-qwen3', tmp_path/'qwen')
    for folder in (clip, qwen):
        plant(folder, marker)
        change(
            folder / 'config.json',
            auto_map={
                'AutoConfig': 'configuration_evil.C',
                'AutoModelForCausalLM': 'modeling_evil.M',
                'AutoModel': 'modeling_evil.M',
            },
        )
    change(qwen/'tokenizer_config.json', auto_map={'AutoTokenizer': [None, 'tokenization_evil.T']})
    change(clip/'preprocessor_config.json', auto_map={'AutoImageProcessor': 'processing_evil.P'})
    load_encoder(str(clip), 'cpu'), load_decoder(str(qwen), device='cpu')
    assert not marker.exists()

@pytest.fixture
def fp8_decoder(tmp_path):
    "A tiny decoder whose matrices lie in a file in 8 bits, with a scale for each."
    config = tiny_config('qwen3')
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_path('storybook-qwen3')).save_pretrained(tmp_path)
    stored = {}
    for name,weight in load_file(tmp_path/'model.safetensors').items():
        if name.endswith('proj.weight'):
            scale = weight.abs().max()/448
            stored[name+'_scale_inv'] = scale.reshape(1, 1)
            weight = (weight/scale).to(torch.float8_e4m3fn)
        stored[name] = weight
    save_file(stored, tmp_path/'model.safetensors', metadata=dict(format='pt'))
    how = dict(quant_method='fp8', weight_block_size=[128, 128], activation_scheme='dynamic')
    change(tmp_path/'config.json', quantization_config=how)
    return tmp_path

def test_weights_of_8_bits_are_computed_in_more(fp8_decoder):
    decoder, _ = load_decoder(fp8_decoder, device='cpu')
    assert {p.dtype for p in decoder.parameters()}=={torch.float32}

def test_weights_that_stay_in_8_bits_are_refused(fp8_decoder, monkeypatch):
    "As they do on a GPU that computes with them: there `transformers` does not unpack them."
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, 'validate_environment', lambda *args, **how: None)
    with pytest.raises(ValueError, match='stored in numbers of 8 bits.*before it was quantized'):
        load_decoder(fp8_decoder, device='cpu', dtype=torch.bfloat16)

def test_a_model_that_is_tried_next_has_its_own_error(monkeypatch):
    "The error that led to it is not its cause."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', False)
    with pytest.raises(OSError, match='^model /data/second: it has no file config.json$'):
        try:
            with hub_errors('model', 'first/model'):
                raise LocalEntryNotFoundError('it is not here')
        except ConnectionError:
            with hub_errors('model', '/data/second'):
                raise OSError('it has no file config.json') from None
