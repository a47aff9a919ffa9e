"""What was written under older names goes on: settings, checkpoints, training states, studies, shared
folders.

`version_before.zip` was written by the commit 50a105f, which had `decoder_rate`, `captions_per_picture` and
`left_out`: two epochs cut at the third step by `max_steps`, the captioner shared, and a sweep of three trials
of which two were done.
"""
import zipfile
from dataclasses import asdict
from pathlib import Path
import pytest
from PIL import Image
from capnb.saving import load_model_from_checkpoint
from capnb.checkpoint import read_metadata
from capnb.run.checkpoints import newest_checkpoint
from capnb.run.command_line import command
from capnb.run.entry import train
from capnb.run.sharing import CapnbForImageCaptioning
from capnb.run.sweeps import sweep
from capnb.settings import Hyperparameters, OLD_NAMES, as_hyperparameters, with_new_names

CAPTION = 'A big black bird sits in the meadow.' # of the first image, by the version before
LOSSES = [16.2831, 16.2014, 16.1403, 16.0789] # of all steps, by the version before

@pytest.fixture
def before(tmp_path, monkeypatch):
    "A folder with what the version before has left, as the working directory."
    with zipfile.ZipFile(Path(__file__).with_name('version_before.zip')) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def has_old_names(values):
    nested = [v for v in values.values() if isinstance(v, dict)]
    return any(OLD_NAMES.keys() & names.keys() for names in (values, *nested))

def test_new_names_are_settings_or_metadata():
    settings = asdict(Hyperparameters())
    assert not OLD_NAMES.keys() & settings.keys()
    elsewhere = {new for new in OLD_NAMES.values() if new not in settings}
    # in metadata, in scores, and in the file of results
    assert elsewhere == {'num_skipped', 'num_images', 'training_images'}
    assert not OLD_NAMES.keys() & set(OLD_NAMES.values())

def test_settings_of_a_script():
    h = as_hyperparameters(dict(decoder_rate=.3), captions_per_picture=5)
    assert (h.decoder_lr_scale, h.captions_per_image) == (.3, 5)
    assert as_hyperparameters(h, decoder_rate=.4).decoder_lr_scale == .4 # what changes is said last

@pytest.mark.parametrize(
    'settings',
    [
        dict(decoder_rate=0.3, decoder_lr_scale=0.3),
        {'hyperparameters': dict(captions_per_picture=1, captions_per_image=2)},
    ],
)
def test_both_names_are_a_contradiction(settings):
    with pytest.raises(ValueError, match='is the old name of .*; give one of them'):
        with_new_names(settings)

def test_flags_of_a_command(capsys):
    given = {}
    @command
    def note_command(**settings):
        "Note the settings."
        given.update((k, v) for k, v in settings.items() if v is not None)
    note_command(['--decoder_rate', '.3', '--captions-per-picture=5'])
    assert given == dict(decoder_lr_scale=.3, captions_per_image=5)
    with pytest.raises(SystemExit) as end:
        note_command(['--decoder_rate', '.3', '--decoder_lr_scale', '.3'])
    assert end.value.code == 1
    said = 'note: decoder_rate is the old name of decoder_lr_scale; give one of them\n'
    assert capsys.readouterr().err == said
    with pytest.raises(SystemExit):
        note_command(['--left_out', '3']) # an old name, but of no flag
    assert capsys.readouterr().err == 'note: unrecognized arguments: --left_out 3; see --help\n'

def test_a_file_of_settings(before):
    h = as_hyperparameters('config.yaml')
    assert (h.decoder_lr_scale, h.captions_per_image, h.lora_rank) == (.2, 2, 1)

def test_a_checkpoint(before):
    path = newest_checkpoint('run')
    metadata = read_metadata(path)
    assert metadata['data'] == dict(name='album', train=8, validation=2, test=2, num_skipped=1)
    assert not has_old_names(metadata)
    model, _, h = load_model_from_checkpoint(path, 'cpu')
    assert (h.decoder_lr_scale, h.captions_per_image) == (.2, 2)
    assert model.caption(Image.open('album/0.png')) == CAPTION

def test_metadata_with_both_names_is_refused(before):
    path = newest_checkpoint('run')
    file = next(Path('run').glob('training_metadata_*.json'))
    text = file.read_text(encoding='utf-8')
    file.write_text(
        text.replace('"decoder_rate"', '"decoder_lr_scale": 0.1, "decoder_rate"'), encoding='utf-8'
    )
    with pytest.raises(ValueError, match=f'{file.name}: decoder_rate is the old name'):
        read_metadata(path)

def test_a_run_goes_on(before):
    "It ends where the version before would have ended, and writes the new names."
    done = train(resume='run', max_steps=4, device='cpu')
    assert done.metadata['losses'] == pytest.approx(LOSSES, abs=2e-4)
    written = read_metadata(newest_checkpoint('run'))
    assert written['hyperparameters']['decoder_lr_scale'] == .2
    text = next(Path('run').glob('training_metadata_*-2.json')).read_text(encoding='utf-8')
    assert not any(f'"{old}"' in text for old in OLD_NAMES)

def test_a_run_goes_on_with_the_old_name_in_a_script(before):
    with pytest.raises(ValueError, match='decoder_lr_scale cannot change when a run goes on'):
        train(resume='run', decoder_rate=.9)

def test_a_shared_folder(before):
    shared = CapnbForImageCaptioning.from_pretrained('shared', device='cpu')
    assert (shared.config.h.decoder_lr_scale, shared.config.h.captions_per_image) == (.2, 2)
    assert not has_old_names(shared.metadata)
    assert shared.captioner.caption(Image.open('album/0.png')) == CAPTION
    shared.save_pretrained('again')
    text = ''.join(p.read_text(encoding='utf-8') for p in Path('again').glob('*.json'))
    assert 'decoder_lr_scale' in text and not any(f'"{old}"' in text for old in OLD_NAMES)

def test_a_study_goes_on(before):
    "Only the trial that was not done yet is trained, and the study remains one of the same settings."
    settings = as_hyperparameters(
        'config.yaml', batch_size=4, num_epochs=1, learning_rate=1e-3, bad_rows='skip', output_dir='sweep',
        learning_rate_decay=.75, learning_rate_decay_step=1, # the schedule that the preset had
    )
    own = {k: v for k,v in asdict(settings).items() if v != as_hyperparameters()[k]}
    study = sweep(own, vary=['decoder_lr_scale=.1,.2,.3', 'captions_per_image=1'])
    assert [t.state.name for t in study.trials] == ['COMPLETE']*3
    assert sorted(next(iter(t.params.values())) for t in study.trials) == [.1, .2, .3]
    assert [p.name for p in Path('sweep').glob('trial_*')] == ['trial_0002']
    assert read_metadata(newest_checkpoint('sweep/trial_0002'))['hyperparameters']['decoder_lr_scale'] == .3
    with pytest.raises(ValueError, match='its adapter_width was 4, not 5'):
        sweep(own, vary=['decoder_lr_scale=.1,.2,.3', 'captions_per_image=1'], adapter_width=5)
