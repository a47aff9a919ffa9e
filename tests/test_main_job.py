"""What the README promises of its first command and of the models that ship: figures, and not only that it
runs. They hold for the weights in the package, so new weights must earn them again."""
import re
import pytest, torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel, Qwen3ForCausalLM
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.hub import model_path
from capnb.insight.small_clip import linear_probe, retrieval
from capnb.insight.small_qwen3 import perplexity, retell_f1

@pytest.fixture(scope='module')
def main_job(run, tmp_path_factory):
    "`capnb_train` without a word more: the folder it ran in, its output, the metadata of its last epoch."
    folder = tmp_path_factory.mktemp('main_job')
    done = run('capnb_train', cwd=folder, fresh=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout, read_metadata(newest_checkpoint(folder/'saved_models'))

@pytest.mark.slow # a whole training
def test_captions_are_good(main_job):
    scores, new_pairs = (main_job[2][split] for split in ('test', 'compositional'))
    way = (scores['rouge_l']-scores['rouge_l_floor'])/(scores['rouge_l_ceiling']-scores['rouge_l_floor'])
    assert way >= .8 and scores['image_gain'] >= 1
    f1 = {name: s['f1'] for name,s in scores['facts'].items()}
    assert f1['pairs'] >= .80 and f1['place'] >= .95 and f1['relation'] >= .70
    assert new_pairs['facts']['pairs']['f1'] >= .60

@pytest.mark.slow # a whole training
def test_learning_made_them_so(main_job):
    for split,scores in main_job[2]['untrained'].items():
        assert scores['facts']['pairs']['f1'] < .1 and abs(scores['image_gain']) < 2, split
        assert abs(scores['rouge_l']-scores['rouge_l_floor']) < .1, split

@pytest.mark.slow # a whole training
def test_the_end_shows_it(main_job):
    folder, said, metadata = main_job
    assert 'facts_f1' in metadata and 'rouge_l' in metadata['test']
    for name in ('F1 of colour and kind', 'ROUGE-L'):
        assert re.search(rf'^ *{name} .*\d\.\d{{3}}', said, re.M), name
    assert (
        f"{metadata['test']['facts']['pairs']['f1']:.3f}" in said
        and f"{metadata['compositional']['facts']['pairs']['f1']:.3f}" in said
    )
    assert len(re.findall(r'^  0-test-\d: ', said, re.M)) == 6
    with Image.open(next((folder/'saved_models').glob('samples_*.png'))) as image:
        image.verify()

def test_shipped_encoder():
    path = model_path('storybook-clip')
    clip, tokenizer = CLIPModel.from_pretrained(
        path, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(path)
    probe = linear_probe(clip, 3000)
    assert clip.config.projection_dim == 512
    assert probe['kind']['found'] >= .85 and probe['colour']['found'] >= .95
    found = retrieval(clip, tokenizer)
    assert found['found'] > 100*found['chance']

def test_shipped_decoder():
    path = model_path('storybook-qwen3')
    lm, tokenizer = Qwen3ForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(path)
    assert retell_f1(lm, tokenizer) >= .90
    p = perplexity(lm, tokenizer, 100)
    assert p['retold'] < p['caption'] < p['frequencies']/5
