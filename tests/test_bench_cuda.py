"""The benchmark of a GPU, run in small on the processor, so that what runs on a card is known to work; and a
whole run, clocked."""
import io, json, os, time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
import pytest, torch
from capnb.fast import bench as cpu_bench, gpu_bench, gpu_sides
from capnb.fast.gpu_bench import GOALS, SECTIONS, bench_gpu, find_ratios, gpu_text
from capnb.fast.gpu_sides import (
    Bench, Sizes, compiled_step, real_tokens, rows_seconds, static_step, training_difference
)
from capnb.run.commands import LEFT_OUT, bench_command
from capnb.run.full_run import PhaseClock, full_run, full_run_settings

SMALL = Sizes(
    batches=(4, 8), patches=(2,), each=2, guide=4, padded=64, rows=(2, 4), photographs=8, encoded=4,
    seconds=.02, side=64, gb=.001, compiled=(4,),
)
COMPILE = torch.compile
STORYBOOK = dict(preset='storybook', prefix_length=1)

@pytest.fixture(scope='module')
def bench(): return Bench('cpu', SMALL, STORYBOOK)

@pytest.fixture(scope='module')
def measured(bench, tmp_path_factory):
    "Figures of every section, the file that they are in, and what it held after each section."
    file, held = tmp_path_factory.mktemp('bench')/'bench.json', []
    def tell(line):
        held.append(list(json.loads(file.read_text(encoding='utf-8'))['sections']))
    with pytest.MonkeyPatch().context() as m: # a compiler would take a minute
        m.setattr(torch, 'compile', lambda f, **how: COMPILE(f, backend='eager'))
        return bench_gpu(bench, file, tell=tell), file, held

def test_every_section_runs(measured):
    found, file, _ = measured
    assert found == json.loads(file.read_text(encoding='utf-8'))
    assert (found['failed'], found['skipped']) == ({}, []) and list(found['sections']) == list(SECTIONS)

def test_figures_are_written_after_every_section(measured):
    *_, held = measured
    assert held == [list(SECTIONS)[:n+1] for n in range(len(SECTIONS))]

def test_both_sides_compute_the_same(measured):
    equality = measured[0]['sections']['equality']
    assert equality['training']['loss'] < 1e-5 and equality['training']['learned'] < 1e-3
    assert equality['writing']['same'] == equality['writing']['of'] == 4

def test_a_step_that_learns_otherwise_is_seen(bench, monkeypatch):
    def halved(*args):
        step, *others = static_step(*args)
        return lambda: step()/2, *others
    monkeypatch.setattr('capnb.fast.gpu_sides.static_step', halved)
    assert training_difference(bench, 4)['loss'] == pytest.approx(.5, rel=1e-3)

def test_every_width_and_batch_is_measured(measured):
    sections = measured[0]['sections']
    assert list(sections['training']) == ['4', '8'] and list(sections['writing']) == ['2', '4']
    assert list(sections['patches']) == list(sections['llava']) == ['2 x 2']
    assert set(sections['guide']) == {'float32', 'autocast'}
    for step in (*sections['training'].values(), *sections['patches'].values()):
        for way in ('eager', 'replayed'):
            assert step[way]['captions_s'] > 0 and step[way]['ms'] > 0
        assert 0 <= step['waste'] < 1 and step['tflops'] > 0
        assert step['recorded'] == 0 # on a processor nothing is
    assert all(len(costs['largest']) == 3 for costs in sections['profile'].values())

def test_the_compiled_step_is_a_rung(measured, bench):
    found = measured[0]
    [step] = found['sections']['compiled'].values()
    assert step['captions_s'] > 0 and step['first_step_s'] > 0
    assert found['ratios']['replayed over compiled, batch 4'] > 0
    bench.release() # the weights of the beginning
    assert step['loss'] == pytest.approx(float(static_step(bench, 4)[0]()), rel=1e-5)

@pytest.mark.slow
def test_a_compiler_gives_the_same_loss(bench):
    "With the compiler itself, which wants a minute."
    bench.release()
    loss = compiled_step(bench, 4)()
    bench.release()
    assert loss == pytest.approx(float(static_step(bench, 4)[0]()), rel=1e-5)

def test_what_cannot_be_compiled_says_why_and_stops_nothing(bench, monkeypatch):
    def refuse(f, **how):
        raise torch._inductor.exc.InvalidCxxCompiler()
    monkeypatch.setattr(torch, 'compile', refuse)
    keep = {name: gpu_bench.SECTIONS[name] for name in ('compiled', 'ceilings')}
    monkeypatch.setattr(gpu_bench, 'SECTIONS', keep)
    found = bench_gpu(bench, tell=lambda line: None)
    assert list(found['sections']) == ['compiled', 'ceilings'] and not found['failed']
    why = found['sections']['compiled']['4']['failed']
    assert why.startswith('InvalidCxxCompiler: No working C++ compiler')
    assert '4: failed InvalidCxxCompiler' in gpu_text(found) and not found['ratios']

def test_a_speed_is_captions_over_seconds(bench):
    found = bench.measure(lambda: time.sleep(.001), 6)
    assert found['captions_s']*found['ms'] == pytest.approx(6000)
    assert rows_seconds(bench, 2)[2] == 2*SMALL.refills
    for n, each in (4, 1), (2, 2):
        assert real_tokens(bench, n, each)==mean(b.read for b in static_step(bench, n, each)[2])

def test_the_first_steps_do_not_count_the_making_of_the_model(bench, monkeypatch):
    events, make = [], gpu_sides.random_captioner
    monkeypatch.setattr(gpu_sides, 'random_captioner', lambda *args: events.append('model') or make(*args))
    monkeypatch.setattr(gpu_bench, 'time', SimpleNamespace(perf_counter=lambda: events.append('clock') or 0))
    monkeypatch.setattr(Bench, 'measure', lambda *args: dict(ms=1, captions_s=1))
    bench.release()
    gpu_bench._replayed(bench, 4, 1)
    assert events==['model', 'clock', 'clock']
    bench.release()
    plain = lambda bench, n: bench.captioner() and (lambda: 0)
    monkeypatch.setattr(gpu_bench, 'compiled_step', plain)
    gpu_bench._compiled(bench)
    assert events[3:]==['model', 'clock', 'clock']

def test_equal_captions_are_those_of_the_same_layers(bench, monkeypatch):
    "Fused layers round differently, which is not what is compared here."
    kinds, captioner = [], Bench.captioner
    def noted(self, features='pooled', fast=False):
        kinds.append(fast)
        return captioner(self, features, fast)
    monkeypatch.setattr(Bench, 'captioner', noted)
    found = gpu_sides.same_captions(bench, 2)
    assert set(kinds)=={True} and found['same']==found['of']

def test_every_ratio_is_named(measured):
    text = gpu_text(measured[0])
    assert all(f'  {name} ' in text for name in measured[0]['ratios'])
    about = measured[0]['about']
    assert about['device'] in text and f"torch {version('torch')}" in text

def test_a_ratio_is_one_figure_over_another():
    step = dict(replayed=dict(captions_s=30., ms=1), eager=dict(captions_s=10.), tflops=4.)
    sections = dict(
        ceilings={'product TFLOP/s': 8.}, training={'8': step}, guide=dict(autocast=dict(captions_s=2.)),
        writing={'32': dict(capnb=36., generate=3.)},
    )
    assert find_ratios(sections) == {
        'replayed over eager, batch 8': 3,
        'step over the guide with autocast, batch 8': 15,
        'step over the product ceiling, batch 8': .5,
        'writing over generate, 32 rows': 12,
    }

def test_every_goal_is_a_ratio_of_the_real_sizes():
    sizes, speed = Sizes(), dict(captions_s=2.)
    step = dict(replayed=speed, eager=speed, tflops=4.)
    sections = dict(
        ceilings={'product TFLOP/s': 8.}, guide=dict(float32=speed, autocast=speed),
        training={str(n): step for n in sizes.batches},
        writing={str(n): dict(capnb=2., generate=1.) for n in sizes.rows},
    )
    sections |= {name: {f'{n} x {sizes.each}': figures for n in sizes.patches}
                 for name, figures in (('llava', speed), ('patches', step))}
    ratios = find_ratios(sections)
    assert GOALS.keys() <= ratios.keys()
    about = dict(device='a card', memory_gb=80, cores=16, versions={})
    text = gpu_text(dict(about=about, sections=sections, ratios=ratios, failed={}, skipped=[]))
    assert text.count('reached)') == 1 and text.count('missed)') == len(GOALS)-1 # half of the ceiling

def test_a_run_that_is_stopped_keeps_what_it_measured(bench, tmp_path, monkeypatch):
    def stop(bench):
        raise KeyboardInterrupt
    sections = dict(one=lambda bench: dict(a=1.), two=stop, three=stop)
    monkeypatch.setattr(gpu_bench, 'SECTIONS', sections)
    with pytest.raises(KeyboardInterrupt):
        bench_gpu(bench, tmp_path/'bench.json', tell=lambda line: None)
    assert json.loads((tmp_path/'bench.json').read_text())['sections'] == dict(one=dict(a=1.))

def test_what_a_card_refuses_is_noted_and_the_next_section_begins(bench, tmp_path, monkeypatch):
    def refuse(bench):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GB')
    monkeypatch.setattr(gpu_bench, 'SECTIONS', dict(one=refuse, two=lambda bench: dict(a=1.)))
    found = bench_gpu(bench, tmp_path/'bench.json', tell=lambda line: None)
    assert found['failed']['one'].startswith('OutOfMemoryError: CUDA out of memory')
    assert found['sections'] == dict(two=dict(a=1.))
    assert json.loads((tmp_path/'bench.json').read_text()) == found
    assert 'one failed: OutOfMemoryError' in gpu_text(found)

@pytest.mark.parametrize('name, section, kept', [
    ('_eager', 'training', 'replayed over eager, batch 4'),
    ('_replayed', 'training', 'replayed over eager, batch 4'),
    ('rows_seconds', 'writing', 'writing over generate, 4 rows'),
    ('llava_step', 'llava', None),
])
def test_a_size_that_does_not_fit_costs_its_own_figures(bench, monkeypatch, name, section, kept):
    measure = getattr(gpu_bench, name)
    def cramped(bench, n, *args):
        if n in (2, 8): raise torch.OutOfMemoryError('CUDA out of memory')
        return measure(bench, n, *args)
    monkeypatch.setattr(gpu_bench, name, cramped)
    monkeypatch.setattr(gpu_bench, 'SECTIONS', {section: SECTIONS[section]})
    found = bench_gpu(bench, tell=lambda line: None)
    assert list(found['ratios']) == ([kept] if kept else []) and not found['failed']
    assert 'failed OutOfMemoryError: CUDA out of memory' in gpu_text(found).replace('failed:', 'failed')

def test_no_section_begins_after_the_time(bench, tmp_path):
    found = bench_gpu(bench, tmp_path/'bench.json', most=-1)
    assert found['skipped'] == list(SECTIONS) and 'ceilings skipped: the time was used up' in gpu_text(found)

def test_a_benchmark_takes_the_real_sizes_by_default():
    sizes = Bench('cuda').sizes
    assert (sizes.batches, sizes.patches, sizes.each) == ((8, 32, 128, 512), (8, 32), 5)
    assert sizes.rows == (32, 128, 256, 512) and (sizes.guide, sizes.padded) == (8, 128)
    assert Bench('cuda').changes == {}

def test_a_system_may_not_know_the_peak(monkeypatch, tmp_path):
    file = tmp_path/'status'
    monkeypatch.setattr(cpu_bench, 'Path', lambda name: file)
    assert cpu_bench._peak_gb() is None
    file.write_text('VmSize:\t 10 kB\nVmRSS:\t 5 kB\n')
    assert cpu_bench._peak_gb() is None
    file.write_text('VmSize:\t 10 kB\nVmHWM:\t 1000000 kB\n')
    assert cpu_bench._peak_gb() == 1.024

# --- A whole run

@pytest.fixture(scope='module')
def run_clocked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    h = full_run_settings(
        num_epochs=2, encoder_name='storybook-clip', tokenizer_name='storybook-qwen3', image_size=64
    )
    return full_run(h, folder, 'cpu', 24, 8, PhaseClock(folder/'phases.json')), folder

def test_a_whole_run_names_the_seconds_of_every_phase(run_clocked):
    found, folder = run_clocked
    each = ['epoch', 'checkpoint', 'validation', 'scoring']
    assert list(found['seconds']) == [
        'imports', 'images', 'models', 'encoding', 'tokenising and checks',
        *(f'{name} {n}' for n in (1, 2) for name in each), 'end',
    ]
    assert all(s >= 0 for s in found['seconds'].values()) and found['total'] == sum(found['seconds'].values())
    assert json.loads((folder/'phases.json').read_text())['seconds'] == found['seconds']

def test_a_whole_run_trains_scores_and_saves(run_clocked):
    found, folder = run_clocked
    assert found['steps'] == 6 and found['loss'] > 0 and 0 <= found['rouge_l'] <= 1
    assert found['recording'] == 0 # nothing is recorded on a processor
    assert len(list((folder/'saved_models').glob('model_state_dict_*.pth'))) == 2
    assert len(list((folder/'train').glob('*.jpg'))) == 24

def test_a_whole_run_is_that_of_the_guide():
    h = full_run_settings()
    assert (h.batch_size, h.num_epochs, h.prefix_length, h.training_size_limit) == (8, 5, 1, None)
    assert (h.encoder_name, h.tokenizer_name) == ('openai/clip-vit-base-patch32', 'Qwen/Qwen3-0.6B-Base')

# --- The command

@pytest.mark.parametrize(
    'words, message',
    [
        (['--device', 'cuda'], 'device is cuda, but PyTorch finds no GPU here'),
        (['--full-run'], 'a full run takes a GPU: add --device cuda'),
    ],
)
def test_what_takes_a_gpu_is_told_in_one_line(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit) as end:
        bench_command(words)
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err == f'bench: {message}\n' and not out

@pytest.mark.parametrize('more', [[], ['--full-run']], ids=str)
def test_a_quick_round_is_for_a_processor(more, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for name in ('_bench_gpu', '_full_run'):
        monkeypatch.setattr(f'capnb.run.commands.{name}', lambda *args: pytest.fail('it runs in full'))
    with pytest.raises(SystemExit):
        bench_command(['--device', 'cuda', '--quick', *more])
    assert '--quick is for the processor' in capsys.readouterr().err

def test_a_whole_run_ends_with_its_total_where_files_stay(capsys, monkeypatch, tmp_path):
    "Windows deletes no file that is mapped into memory."
    made, unlink = [], os.unlink
    def run(h, folder, device, clock):
        made.append(Path(folder)/'features.bin')
        made[0].write_bytes(b'1')
        return dict(total=1.)
    def refuse(path, **how):
        if Path(path).name=='features.bin':
            raise PermissionError(13, 'the file is in use', str(path))
        unlink(path, **how)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr('capnb.run.full_run.full_run', run)
    monkeypatch.setattr(gpu_bench, 'about_machine', lambda device: dict(gpu='a card'))
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    with monkeypatch.context() as there:
        there.setattr(os, 'unlink', refuse)
        bench_command(['--device', 'cuda', '--full-run', '--json', str(tmp_path/'run.json')])
    assert made[0].exists() and capsys.readouterr().out.split()==['all', '1.0', 's']
    assert json.loads((tmp_path/'run.json').read_text())==dict(total=1., about=dict(gpu='a card'))

@pytest.mark.parametrize('code, short', [(-9, True), (137, True), (1, False)])
def test_a_side_that_ends_is_told_in_one_line(code, short, capsys, monkeypatch):
    def ended(command, **how):
        return SimpleNamespace(stdout=io.StringIO(), wait=lambda: code, kill=lambda: None)
    monkeypatch.setattr(cpu_bench.subprocess, 'Popen', ended)
    with pytest.raises(SystemExit) as end:
        bench_command(['--quick'])
    out, err = capsys.readouterr()
    assert end.value.code==1 and not out and len(err.splitlines())==1
    assert err.startswith(f"bench: the side 'train guide' ended with exit code {code}")
    assert ('lack of memory' in err)==short

def test_on_a_processor_it_says_what_is_left_out(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('capnb.fast.bench.bench', lambda rounds: dict(rounds=rounds))
    monkeypatch.setattr('capnb.fast.bench.bench_text', str)
    bench_command(['--quick', '--json', str(tmp_path/'bench.json')])
    assert capsys.readouterr().out == f"{{'rounds': 1}}\n\n{LEFT_OUT}\n"
    assert json.loads((tmp_path/'bench.json').read_text()) == dict(rounds=1)

def test_on_a_gpu_the_command_measures_it(capsys, monkeypatch, tmp_path, measured):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    found = []
    def noted(bench, file):
        found.append((bench.device, str(file)))
        return measured[0] | dict(failed=dict(llava='OutOfMemoryError: none left'))
    monkeypatch.setattr(gpu_bench, 'bench_gpu', noted)
    with pytest.raises(SystemExit) as end:
        bench_command(['--device', 'cuda', '--json', str(tmp_path/'bench.json')])
    out, err = capsys.readouterr()
    assert found == [('cuda', str(tmp_path/'bench.json'))] and out.startswith(gpu_text(measured[0])[:80])
    assert end.value.code == 1 and err == 'bench: sections that failed: llava; the others are measured\n'
