"Encoders of other families: what they give is found out, and is what `transformers` computes."
import json
from importlib.util import find_spec
from pathlib import Path
import pytest, torch, transformers
from transformers import CONFIG_MAPPING
from capnb import load, train
from capnb.encoder import load_encoder
from capnb.fast import encoder_families
from capnb.fast.encoder_families import (
    image_families, save_random_encoder, tiny_encoder, try_families, try_family, works
)
from capnb.storybook import Storybook
from capnb.towers import _lay_out, look

ROOT = Path(__file__).resolve().parent.parent
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def table():
    return json.loads((ROOT/'nbs'/'encoders.json').read_text(encoding='utf-8'))['families']

def images(n=3): return [row['image'] for row in Storybook(size=64, n=n)]

DOZEN = {  # pooled features, patches, other sizes
    'clip': (True, True, True),
    'siglip': (True, True, True),
    'siglip2': (True, True, True),
    'metaclip_2': (True, True, True),
    'altclip': (True, True, True),
    'chinese_clip': (True, True, True),
    'blip': (True, True, True),
    'aimv2': (True, True, False),
    'dinov2_with_registers': (True, True, True),
    'dinov3_vit': (True, True, True),
    'ijepa': (False, True, True),
    'vit': (True, True, True),
    'yolos': (True, False, True),
    'mobilenet_v2': (True, True, True),
}

@pytest.mark.parametrize('kind', DOZEN)
def test_a_family_gives_what_the_whole_model_gives(kind):
    row = try_family(kind)
    assert works(row), row
    assert ('pooled' in row, 'patch' in row, bool(row['other_size'])) == DOZEN[kind]

@pytest.mark.parametrize(
    'kind, why',
    [
        ('qwen3', 'which reads input_ids'),
        ('wav2vec2', 'which reads input_values'),
        ('videomae', 'which looks at videos'),
        ('t5', 'which has a decoder of its own'),
        ('detr', 'which has a decoder of its own'),
        ('vit_mae', 'it draws random numbers'),
        ('qwen2_5_vl_vision', 'which reads hidden_states'),
        ('encodec', 'an image encoder is needed'),
    ],
)
def test_what_is_no_image_encoder_is_refused_by_name(kind, why):
    with pytest.raises(ValueError, match=f"encoder 'mine' is a '{kind}' model, .*{why}") as e:
        look(CONFIG_MAPPING[kind](), name='mine')
    assert '\n' not in str(e.value)

@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp('vit')
    return folder, save_random_encoder(tiny_encoder('vit'), folder, 96)

def test_at_its_own_size_nothing_is_stretched(vit):
    folder, whole = vit
    encoder = load_encoder(str(folder), 'cpu', 96, 'patch')
    with torch.no_grad():
        plain = whole(pixel_values=encoder.prepare(images())).last_hidden_state[:,1:]
    assert torch.equal(encoder.encode(images()), plain)

@pytest.mark.parametrize('size, patches', [(64, 16), (128, 64), (224, 196)])
def test_at_another_size_positions_are_stretched(vit, size, patches):
    folder, whole = vit
    encoder = load_encoder(str(folder), 'cpu', size, 'patch')
    pixels = encoder.prepare(images())
    assert pixels.shape == (3, 3, size, size) and encoder.patches == patches
    with torch.no_grad():
        plain = whole(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[:,1:]
    assert torch.equal(encoder(pixels), plain) and plain.shape == (3, patches, 32)

def test_a_size_of_broken_patches_is_refused(vit):
    with pytest.raises(ValueError, match='image_size is 100, but .* takes multiples of 16, such as 96'):
        load_encoder(str(vit[0]), 'cpu', 100)

def test_without_a_pooling_layer_the_class_token_is_taken(tmp_path, capsys):
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(tiny_encoder('vit')).eval()
    save_random_encoder(model.config, tmp_path, 96) # for its image processor
    model.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), 'cpu', 96)
    assert 'comes without a pooling layer: its class token' in capsys.readouterr().out
    with torch.no_grad():
        plain = model.vit(pixel_values=encoder.prepare(images())).last_hidden_state[:,0]
    assert torch.equal(encoder.encode(images()), plain)

def test_only_the_image_half_is_loaded(tmp_path):
    whole = save_random_encoder(tiny_encoder('blip'), tmp_path, 96)
    half = load_encoder(str(tmp_path), 'cpu', 96).model
    names = {name.partition('.')[0] for name in half.state_dict()}
    assert names == {'vision_model', 'visual_projection'} < {n.partition('.')[0] for n in whole.state_dict()}

@pytest.mark.parametrize('kind, features', [('dinov3_vit', 'patch'), ('mobilenet_v2', 'pooled')])
def test_a_captioner_is_trained_with_it(kind, features, tmp_path):
    save_random_encoder(tiny_encoder(kind), tmp_path/'encoder', 64)
    result = train(
        encoder_name=str(tmp_path/'encoder'), image_size=64, features=features, num_epochs=1, max_steps=2,
        training_size_limit=8, evaluation_enabled=False, output_dir=str(tmp_path/'run'),
    )
    image = images(1)[0]
    assert load(result.checkpoint).caption(image) == result.model.caption(image)

def timm_folder(folder, architecture):
    "A model as it lies in timm's repositories."
    import timm
    from safetensors.torch import save_file
    torch.manual_seed(0)
    model = timm.create_model(architecture).eval()
    kept = ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')
    about = {k: model.pretrained_cfg[k] for k in kept}
    about = dict(architecture=architecture, num_classes=1000, pretrained_cfg=about)
    (folder/'config.json').write_text(json.dumps(about))
    weights = {k: v.contiguous() for k,v in model.state_dict().items()}
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    return model

@pytest.mark.skipif(not find_spec('timm'), reason='timm is not installed')
@pytest.mark.parametrize('architecture', ['test_vit', 'test_resnet', 'test_efficientnet', 'test_convnext'])
def test_a_model_of_timm(architecture, tmp_path):
    from timm.data import create_transform, resolve_data_config
    model = timm_folder(tmp_path, architecture)
    pooled, patch = (load_encoder(str(tmp_path), 'cpu', 160, features) for features in ('pooled', 'patch'))
    steps = create_transform(**resolve_data_config({}, model=model))
    pixels = torch.stack([steps(image) for image in images()])
    assert torch.equal(pooled.prepare(images()), pixels)
    with torch.no_grad():
        features = model.forward_features(pixels)
        torch.testing.assert_close(pooled(pixels), model.forward_head(features, pre_logits=True))
    vectors = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:,1:]
    torch.testing.assert_close(patch(pixels), vectors)

@pytest.mark.skipif(find_spec('timm'), reason='timm is installed')
def test_without_timm_the_extra_is_named(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='resnet18', pretrained_cfg={})))
    with pytest.raises(ValueError, match=r"needs the package timm; .* pip install 'capnb\[timm\]'") as e:
        load_encoder(str(tmp_path), 'cpu')
    assert '\n' not in str(e.value)

def test_no_family_of_the_table_failed():
    rows = table()
    assert [kind for kind, row in rows.items() if not (works(row) or 'refused' in row)] == []
    assert sum(map(works, rows.values())) > 70

def test_a_family_that_raises_does_not_stop_the_others(monkeypatch):
    rows = try_families(['no_such_family', 'ijepa'])
    assert 'KeyError' in rows['no_such_family']['failed'] and works(rows['ijepa'])

def test_a_family_that_gives_nan_does_not_work(monkeypatch):
    monkeypatch.setattr(encoder_families, '_difference', lambda *args: float('nan'))
    assert not works(try_family('mobilenet_v2'))

@pytest.mark.slow
def test_every_family_is_in_the_table_and_as_it_says():
    said = table()
    assert [kind for kind in image_families() if kind not in said] == [], 'new families: run capnb_encoders'
    what = lambda row: {k: row.get(k) for k in ('pooled', 'patch', 'patches', 'image_size', 'other_size')}
    here = {kind: row for kind,row in try_families().items() if 'package' not in row.get('refused', '')}
    assert {kind: what(row) for kind,row in here.items()} == {kind: what(said[kind]) for kind in here}

def test_patches_with_a_rest_at_the_edge_are_found():
    "As of SigLIP so400m at 384 in timm, whose configurations name no patch size: 27 patches of 14."
    assert _lay_out((2, 729, 1152), 384, None)==((27, 27), 0, None)
    assert _lay_out((2, 197, 768), 224, None)==((14, 14), 1, None)
    assert _lay_out((2, 137, 32), 96, None) is None and _lay_out((2, 100, 256), 224, None) is None
