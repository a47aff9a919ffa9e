"""Bytes that a child makes, looked up in a table, are what the image processor itself would have given: for
each family, at odd sizes and in all modes."""
import asyncio, random
from dataclasses import asdict
from pathlib import Path
import numpy as np, pyarrow as pa, pytest, torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, Siglip2VisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from damage import saved
from capnb import image_pool, many_images
from capnb.saving import load_model_from_checkpoint, save_checkpoint
from capnb.build import build_captioner
from capnb.data import CaptionData
from capnb.encoder import ImageEncoder, encode_data as encode_in_turn, load_encoder
from capnb.fast.cache import encode_data, features_key
from capnb.image_pool import DecodingPool
from capnb.many_images import open_images
from capnb.images import open_image
from capnb.inference import caption_files
from capnb.pixels import PixelSteps
from capnb.run.scale.jobs import CaptionWorker, FeatureWorker
from capnb.run.scale.sources import ROW
from capnb.run.serving.limits import Limits
from capnb.run.serving.uploads import Opener
from capnb.run.serving.worker import Sight, answer_batch
from capnb.settings import as_hyperparameters

SIDE, PATCH = 24, 4

class Tower(nn.Module):
    "Stands for an image tower; what it says of an image are the numbers that it was given."
    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        if kind=='siglip2':
            self.config = Siglip2VisionConfig(patch_size=PATCH, num_patches=(SIDE//PATCH)**2, **small)
        else:
            shape = dict(image_size=SIDE, patch_size=PATCH, projection_dim=3*SIDE*SIDE)
            self.config = CLIPVisionConfig(**shape, **small)
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.device, self.dtype = self.weight.device, dtype

    def forward(self, pixel_values, **more):
        assert pixel_values.dtype == self.dtype
        return BaseModelOutputWithPooling(pooler_output=pixel_values.flatten(1))

def encoder_of(processor, dtype=torch.float32):
    if hasattr(processor, 'max_num_patches'):
        processor.max_num_patches = (SIDE//PATCH)**2
    kind = 'siglip2' if hasattr(processor, 'max_num_patches') else 'clip'
    return ImageEncoder(Tower(kind, dtype), processor, image_size=SIDE)

square = dict(height=SIDE, width=SIDE)
dice = random.Random(7)
numbers = lambda: [dice.uniform(.2, .6) for _ in range(3)]
FAMILIES = {
    'CLIP': CLIPImageProcessorPil(size=dict(shortest_edge=SIDE), crop_size=square),
    'CLIP, its own colours': CLIPImageProcessorPil(
        size=dict(shortest_edge=SIDE), crop_size=square, image_mean=numbers(), image_std=numbers()
    ),
    'CLIP, made smaller than what is kept': CLIPImageProcessorPil(
        size=dict(shortest_edge=17), crop_size=square
    ),
    'CLIP, a crop of odd sides': CLIPImageProcessorPil(
        size=dict(shortest_edge=37), crop_size=dict(height=23, width=30)
    ),
    'CLIP, not resized': CLIPImageProcessorPil(do_resize=False, crop_size=square),
    'CLIP, by Lanczos': CLIPImageProcessorPil(size=dict(shortest_edge=SIDE), crop_size=square, resample=1),
    'SigLIP': SiglipImageProcessorPil(size=square),
    'SigLIP, nearest and no square': SiglipImageProcessorPil(size=dict(height=31, width=18), resample=0),
    'SigLIP2': Siglip2ImageProcessorPil(patch_size=PATCH),
    'DINOv2': BitImageProcessorPil(size=dict(shortest_edge=SIDE*256//224), crop_size=square),
    'ViT': ViTImageProcessorPil(size=square),
    'ViT, from -1 to 1': ViTImageProcessorPil(size=square, rescale_factor=1/127.5, image_mean=[1.]*3),
    'ViT, not normalised': ViTImageProcessorPil(size=square, do_normalize=False),
    'ViT, not rescaled': ViTImageProcessorPil(size=square, do_rescale=False, image_mean=[120.]*3),
    'DeiT': DeiTImageProcessorPil(size=dict(height=31, width=31), crop_size=square),
}
SIZES = [(1, 1), (1, 90), (90, 1), (3, 2), (24, 24), (23, 25), (25, 24), (40, 61), (97, 33)]
SIZES += [(640, 480), (301, 907)] # made smaller as they are opened

def noise(size, mode='RGB'):
    dice = np.random.default_rng(sum(size))
    channels = dict(RGB=(3,), RGBA=(4,), CMYK=(4,), LA=(2,)).get(mode, ())
    if mode=='I;16':
        return Image.fromarray(dice.integers(0, 65536, size[::-1], np.uint16))
    if mode in ('1', 'P'):
        return noise(size, 'RGB').convert(mode)
    return Image.fromarray(dice.integers(0, 256, (*size[::-1], *channels), np.uint8), mode)

FILES = {f'RGB {w}x{h}': saved(noise((w, h)), 'PNG') for w,h in SIZES}
FILES |= {mode: saved(noise((50, 33), mode), 'PNG') for mode in ('1', 'L', 'LA', 'P', 'RGBA', 'I;16')}
FILES |= {f'JPEG {mode}': saved(noise((61, 83), mode), 'JPEG') for mode in ('RGB', 'L', 'CMYK')}
FILES['transparent palette'] = saved(noise((30, 44), 'RGB').convert('P'), 'PNG', transparency=3)

# not made smaller as they are opened, as the readable `encode_data` makes none smaller
SMALL = [FILES[name] for name in FILES if name not in ('RGB 640x480', 'RGB 301x907')]

@pytest.fixture(scope='module')
def pool():
    with DecodingPool(2) as pool:
        yield pool

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FAMILIES)
def test_bytes_give_the_numbers_of_the_processor(name, pool):
    encoder = encoder_of(FAMILIES[name])
    steps = encoder.steps
    assert isinstance(steps, PixelSteps)
    children = pool.map(FILES.values(), min_side=encoder.min_side, steps=steps)
    for file, child in zip(FILES, children, strict=True):
        image = open_image(FILES[file], min_side=encoder.min_side)
        assert child.dtype == np.uint8 and child.shape == steps.shape == steps(image).shape, file
        assert np.array_equal(child, steps(image)), file
        assert torch.equal(encoder.encode([child]), encoder.encode([image])), file

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_alike(dtype):
    for processor in (FAMILIES['CLIP'], FAMILIES['SigLIP2']):
        encoder = encoder_of(processor, dtype)
        images = [open_image(file, min_side=encoder.min_side) for file in FILES.values()]
        pixels = [encoder.steps(image) for image in images]
        assert torch.equal(encoder.encode(pixels), encoder.encode(images))

class Brighter(CLIPImageProcessorPil):
    "A processor with a step of its own, which no setting tells."
    def rescale(self, image, scale, **more):
        return super().rescale(image, scale, **more)**.8

class Mirrored(CLIPImageProcessorPil):
    def resize(self, image, size, **more):
        return super().resize(image, size, **more)[..., ::-1]

MORE = {
    'a step of its own': Brighter(size=dict(shortest_edge=SIDE), crop_size=square),
    'resized in another way': Mirrored(size=dict(shortest_edge=SIDE), crop_size=square),
    'ConvNeXt': ConvNextImageProcessorPil(size=dict(shortest_edge=SIDE)),
    'ConvNeXt, cropped': ConvNextImageProcessorPil(
        size=dict(shortest_edge=SIDE), do_center_crop=True, crop_size=square
    ),
    'EfficientNet': EfficientNetImageProcessorPil(size=square, rescale_offset=True),
    'bounded on both sides': CLIPImageProcessorPil(
        size=dict(shortest_edge=SIDE, longest_edge=2*SIDE), crop_size=square
    ),
    'padded': SiglipImageProcessorPil(size=dict(height=20, width=20), do_pad=True, pad_size=square),
}

@pytest.mark.parametrize('name', MORE)
def test_what_does_more_takes_the_old_way_and_says_so_once(name, capsys):
    encoder = encoder_of(MORE[name])
    assert encoder.steps is None and encoder.steps is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f'{type(MORE[name]).__name__} does more than resize, crop and normalise' in said[0]
    data = CaptionData([dict(image=file, caption='A rug.') for file in SMALL])
    found, expected = encode_data(encoder, data, batch_size=5), encode_in_turn(encoder, data)
    assert torch.equal(found.features, expected.features.half().float())

def test_a_size_left_open_takes_the_old_way():
    processor = CLIPImageProcessorPil(size=dict(shortest_edge=SIDE), do_center_crop=False)
    assert encoder_of(processor).steps is None

@pytest.fixture(scope='module')
def storybook(): return load_encoder('storybook-clip', 'cpu', 64)

def test_features_kept_by_the_way_before_are_those_of_today(storybook, tmp_path, monkeypatch):
    "Same key, same shards, bit for bit; and what was kept is not encoded again."
    data = CaptionData([dict(image=file, caption='A rug.') for file in FILES.values()])
    key = features_key(storybook)
    with monkeypatch.context() as before:
        before.setitem(vars(storybook), 'steps', None) # every image through the processor
        encode_data(storybook, data, folder=tmp_path/'before')
    encode_data(storybook, data, folder=tmp_path/'now')
    assert features_key(storybook) == key
    read = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*.npy')}
    assert len(read(tmp_path/'before')) == 1 and read(tmp_path/'before') == read(tmp_path/'now')
    monkeypatch.setattr(ImageEncoder, 'forward', lambda *_: pytest.fail('encoded again'))
    again = encode_data(storybook, data, folder=tmp_path/'before')
    assert len(again) == len(FILES)

def test_many_files_never_reach_the_processor(storybook, monkeypatch):
    data = CaptionData([dict(image=file, caption='A rug.') for file in SMALL])
    expected = encode_in_turn(storybook, data).features
    assert storybook.steps
    monkeypatch.setattr(type(storybook.processor), '__call__', lambda *_, **__: pytest.fail('it was asked'))
    assert torch.equal(encode_data(storybook, data).features, expected.half().float())

def test_a_few_images_start_no_process(storybook, monkeypatch):
    monkeypatch.setattr(many_images, 'decoding_pool', lambda: pytest.fail('a pool was asked for'))
    few = list(FILES.values())[:7]
    encode_data(storybook, CaptionData([dict(image=file, caption='A rug.') for file in few]))
    opened = open_images(few, steps=storybook.steps)
    assert all(np.array_equal(a, storybook.steps(open_image(b))) for a,b in zip(opened, few, strict=True))

def test_an_answer_of_another_shape_is_refused(monkeypatch):
    "A child that was taken over gives an error, and is replaced."
    steps, file = PixelSteps((5, 4), 2, None), FILES['RGB 3x2']
    with DecodingPool(1) as pool:
        assert pool.open(file, steps=steps).shape == (5, 4, 3)
        with monkeypatch.context() as taken:
            taken.setattr(image_pool, '_receive', lambda *_: (dict(size=[3, 2]), bytes(18)))
            with pytest.raises(ValueError, match='its decoder died'):
                pool.open(file, steps=steps)
        assert pool.open(file, steps=steps).shape == (5, 4, 3)

# --- Each way to a caption

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    h = as_hyperparameters(prefix_length=2, adapter_width=8, max_caption_length=4)
    about = dict(hyperparameters=asdict(h))
    return save_checkpoint(build_captioner(h, 'cpu'), tmp_path_factory.mktemp('run'), 'x', 1, about)

def by_caption(checkpoint, files):
    return load_model_from_checkpoint(checkpoint, 'cpu')[0].caption([*files, noise((40, 61))])

def by_few(checkpoint, files):
    return load_model_from_checkpoint(checkpoint, 'cpu')[0].caption(files[:2])

def by_files(checkpoint, files):
    model = load_model_from_checkpoint(checkpoint, 'cpu')[0]
    return [row['caption'] for row in caption_files(model, files, batch_size=9)]

def rows_of(files):
    ids = [Path(file).name for file in files]
    return pa.table([ids, [Path(file).read_bytes() for file in files], [None]*len(files)], schema=ROW)

def by_scale(checkpoint, files):
    return CaptionWorker('cpu', 1, str(checkpoint), {})(rows_of(files))['caption'].to_pylist()

def by_scale_features(checkpoint, files):
    worker = FeatureWorker('cpu', 1, dict(name='storybook-clip', image_size=64))
    return worker(rows_of(files))['features'].to_pylist()

def by_server(checkpoint, files):
    "Every third is explained, so its image comes whole."
    model, sight = load_model_from_checkpoint(checkpoint, 'cpu')[0], Sight()
    sight.tell(model.encoder)
    opener, said = Opener(Limits(), sight), {}
    async def opened():
        data = [Path(file).read_bytes() for file in files]
        return [await opener.open(bytes, 'me', whole=i%3==0) for i,bytes in enumerate(data)]
    with opener.pool:
        images = asyncio.run(opened())
    whole = [isinstance(image, Image.Image) for image in images]
    assert whole==[not model.encoder.steps or i%3==0 for i in range(len(files))]
    answer_batch(model, [(i, image, False) for i,image in enumerate(images)], said.__setitem__)
    return list(said.values())

WAYS = [by_caption, by_few, by_files, by_scale, by_scale_features, by_server]

@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_captions_are_written_from_the_same_features(way, checkpoint, tmp_path, monkeypatch):
    "What children make bytes of gives the very features that the processor's numbers gave."
    files = [tmp_path/f'{i}.png' for i,_ in enumerate(FILES)]
    for file,data in zip(files, FILES.values(), strict=True):
        file.write_bytes(data)
    seen, forward = [], ImageEncoder.forward
    def watched(self, values):
        seen.append((values.dtype, forward(self, values)))
        return seen[-1][1]
    monkeypatch.setattr(ImageEncoder, 'forward', watched)
    now, kinds, found = way(checkpoint, files), {kind for kind,_ in seen}, [f for _,f in seen]
    seen.clear()
    monkeypatch.setattr(ImageEncoder, 'steps', None) # every image through the processor
    before = way(checkpoint, files)
    assert now==before and kinds=={torch.uint8}
    assert torch.equal(torch.cat(found), torch.cat([f for _,f in seen]))
