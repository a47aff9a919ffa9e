"""Several processes train as one: the same losses, each reads its own rows, one writes, all stop at the same
step."""
import os, shutil, signal, socket, subprocess, sys, time
from types import SimpleNamespace
import pytest, torch
from mean_colours import MeanColours
from capnb.build import build_captioner
from capnb.own_encoder import own_encoder
from capnb.run import processes
from capnb.settings import as_hyperparameters
from capnb.storybook import Storybook
from capnb.run.resume import find_state, read_state
from forks import fork, write_to

# 24 images in batches of 5, of which one process takes three and the other two. The learning rate is a low
# one: the first steps of Adam are of one size
# whatever the gradient, and where it is almost zero a high rate would make much of its rounding.
SMALL = dict(
    batch_size=5,
    num_epochs=2,
    learning_rate=3e-4,
    adapter_width=32,
    lr_scheduler_type='step', # a longer run then has the same rates
    prefix_length=2,
    max_caption_length=16,
    evaluation_enabled=False,
)

# --- Processes, with what a launcher tells each

def place(cwd, rank, n, port):
    """Take the place of process `rank` of `n` in the folder `cwd`, as launchers arrange it, with the output
    in a file `log-<rank>`."""
    os.chdir(cwd)
    write_to(os.open(f'log-{rank}', os.O_WRONLY|os.O_CREAT|os.O_APPEND))
    torch.set_num_threads(1)
    if n > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(n),
            LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
            OMP_NUM_THREADS='1',
        )

def command(cwd, rank, n, port, args, change):
    place(cwd, rank, n, port)
    if change:
        change(rank)
    from capnb.run.commands import train_command
    train_command(args)

def begin(cwd, n, settings, *more, change=None):
    "Start `capnb_train` in `n` processes."
    cwd.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    args = [str(word) for k,v in settings.items() for word in (f'--{k}', v)] + [str(m) for m in more]
    return [fork(command, cwd, rank, n, port, args, change) for rank in range(n)]

def ended(processes, code=0):
    for p in processes:
        p.join(120)
    codes = [p.exitcode for p in processes]
    for p in processes:
        p.kill()
    assert codes==[code]*len(processes), codes

def losses(folder):
    return read_state(find_state(folder/'saved_models'))['position']['losses']

def weights(folder): return read_state(find_state(folder/'saved_models'))['weights']

def same(folder, other, exact=False):
    "The same losses and weights, up to rounding or to the last bit."
    assert len(losses(folder))==len(losses(other)) and weights(folder).keys()==weights(other).keys()
    if exact:
        assert losses(folder) == losses(other) and all(
            torch.equal(a, b) for a, b in zip(weights(folder).values(), weights(other).values(), strict=True)
        )
    else:
        assert losses(folder)==pytest.approx(losses(other), rel=1e-5)
        for a,b in zip(weights(folder).values(), weights(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

def said(folder, rank):
    "What a process said, without what PyTorch 2.9 says of its connections."
    lines = (folder/f'log-{rank}').read_text(encoding='utf-8').splitlines(keepends=True)
    return ''.join(line for line in lines if not line.startswith('[Gloo] '))

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "Settings with images: 24 to learn from, three for validation, three for the end."
    folder, book = tmp_path_factory.mktemp('album'), Storybook(n=30)
    for i in range(30):
        book[i]['image'].save(folder/f'{i}.png')
    (folder / 'captions.csv').write_text(
        'file_name,caption\n' + '\n'.join(f'{i}.png,"{c}"' for i in range(30) for c in book.captions(i)[:2]),
        encoding='utf-8',
    )
    return SMALL | dict(data=folder)

@pytest.fixture(scope='module')
def one(small, tmp_path_factory):
    "What one process leaves."
    folder = tmp_path_factory.mktemp('one')
    ended(begin(folder, 1, small))
    return folder

# --- The same as one process

@pytest.mark.parametrize(
    'more',
    [dict(batch_size=23, unfreeze_layers=1, micro_batch_size=2), dict(lora_rank=2, features='patch')],
    ids=str,
)
def test_what_is_shared_out(small, tmp_path, more):
    "A last batch of one image, and a layer that unfreezes in the second epoch; LoRA and patches."
    for n in (1,2):
        ended(begin(tmp_path/str(n), n, small | more))
    same(tmp_path/'2', tmp_path/'1')

def little_memory(rank):
    "The second process has room for one caption at a time."
    from capnb.captioner import Captioner
    forward = Captioner.forward
    def cramped(self, features, captions):
        if rank==1 and len(captions) > 1:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return forward(self, features, captions)
    Captioner.forward = cramped

def test_one_runs_out_of_memory(small, one, tmp_path):
    ended(begin(tmp_path, 2, small, change=little_memory))
    same(tmp_path, one)

# --- Who reads and who writes

def watched(rank):
    "Note which rows are read, and which files are opened for writing, renamed or removed."
    from capnb.batches import EpochBatches
    read, log, written = EpochBatches.read, open(f'rows-{rank}', 'w'), open(f'written-{rank}', 'w')
    def noted(self, rows):
        print(*rows, file=log, flush=True)
        return read(self, rows)
    EpochBatches.read = noted
    def audit(event, args):
        if (
            event == 'open'
            and isinstance(args[0], str)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
            or event in ('os.rename', 'os.remove')
        ):
            if 'saved_models' in os.path.abspath(args[0]):
                print(args[0], file=written, flush=True)
    sys.addaudithook(audit)

def test_each_reads_its_rows_and_one_writes(small, tmp_path):
    ended(
        begin(
            tmp_path,
            2,
            small | dict(num_epochs=1, evaluation_enabled=True, keep_checkpoints=1),
            change=watched,
        )
    )
    rows = [(tmp_path/f'rows-{rank}').read_text().split() for rank in (0,1)]
    assert sorted(map(int, rows[0]+rows[1]))==list(range(24)) and len(rows[1])==2*5-1+1
    first, second = (said(tmp_path, rank) for rank in (0,1))
    assert (
        'model_state_dict' in (tmp_path / 'written-0').read_text()
        and '✅ Model saved successfully!' in first
        and 'ROUGE-L' in first
    )
    assert (tmp_path/'written-1').read_text()=='' and second==''

def test_one_tells_what_was_skipped(small, tmp_path):
    album = tmp_path/'album'
    shutil.copytree(small['data'], album)
    (album/'0.png').write_bytes(b'no image')
    ended(begin(tmp_path, 2, small | dict(num_epochs=1, data=album, bad_rows='skip')))
    assert 'skipped what cannot be read' in said(tmp_path, 0) and said(tmp_path, 1)==''

# --- A decoder that is spread

def spread(rank):
    """Ask for FSDP, as `accelerate launch` does, and note how much of the decoder this process holds when it
    learns."""
    os.environ['ACCELERATE_USE_FSDP'] = 'true'
    from capnb.run import processes, training
    backward, log = training.backward, open(f'held-{rank}', 'w')
    def noted(run, *args):
        print(processes.share_held(run.model), file=log, flush=True)
        return backward(run, *args)
    training.backward = noted

def test_fsdp(small, one, tmp_path):
    "Each holds half of the layers; validation and scores, in which all take part, come to their end."
    ended(begin(tmp_path, 2, small | dict(evaluation_enabled=True), change=spread))
    same(tmp_path, one)
    for rank in (0,1):
        assert set((tmp_path/f'held-{rank}').read_text().split())=={'0.5'}

def not_spread(rank):
    spread(rank)
    from torch.distributed import fsdp
    fsdp.fully_shard = lambda layer, **options: layer

def test_fsdp_that_does_nothing_is_told(small, tmp_path):
    ended(begin(tmp_path/'a', 2, small, change=not_spread), 1)
    ended(begin(tmp_path/'b', 2, small | dict(lora_rank=2), change=spread), 1)
    for rank in (0,1):
        assert "train: FSDP was asked for, but this process holds 100% of the decoder's layers" in said(
            tmp_path / 'a', rank
        )
        assert 'train: FSDP is for a frozen decoder' in said(tmp_path/'b', rank)

# --- Stopped, and gone on with

def test_stopped_by_a_signal_to_one(small, tmp_path, one):
    """A signal that only the second hears stops both after the same step; the run goes on in two processes
    to the last bit, in one up to rounding."""
    endless = small | dict(num_epochs=1000)
    processes = begin(tmp_path, 2, endless, '--checkpoint_steps', 1)
    while not list(tmp_path.glob('saved_models/training_state_*')) or len(losses(tmp_path)) < 2:
        assert all(p.exitcode is None for p in processes), said(tmp_path, 0)
        time.sleep(.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    ended(processes, 143)
    step = len(losses(tmp_path))
    assert f'train: stopped after step {step}; go on with' in said(tmp_path, 0)
    epochs = -(-step//5)+1
    for n in (1,2):
        where = tmp_path/f'in-{n}'
        (where/'saved_models').mkdir(parents=True)
        for file in (tmp_path/'saved_models').iterdir():
            (where/'saved_models'/file.name).write_bytes(file.read_bytes())
        ended(begin(where, n, {}, '--resume', '--num_epochs', epochs))
    ended(begin(tmp_path/'through', 2, small | dict(num_epochs=epochs)))
    same(tmp_path/'in-2', tmp_path/'through', exact=True)
    same(tmp_path/'in-1', tmp_path/'through')

# --- As a user starts it

def launch(how, settings, cwd, env):
    "Start `capnb_train` in two processes with `accelerate launch`."
    script = cwd/'capnb_train'
    script.write_text(
        "import sys\nfrom capnb.run.commands import train_command\nif __name__ == '__main__':"
        " sys.exit(train_command())\n"
    )
    launcher = [
        sys.executable,
        '-m',
        'accelerate.commands.launch',
        how,
        '--num_processes',
        '2',
        '--num_machines',
        '1',
        '--mixed_precision',
        'no',
        '--dynamo_backend',
        'no',
        script,
    ]
    words = [str(word) for k,v in settings.items() for word in (f'--{k}', v)]
    return subprocess.run([*launcher, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)

def test_a_launcher_that_starts_one_process_is_told(small, tmp_path, environment):
    "accelerate's `--cpu` starts one process whatever is asked for, which would train as one without a word."
    done = launch('--cpu', small, tmp_path, environment(OMP_NUM_THREADS='1'))
    assert done.returncode and not (tmp_path/'saved_models').exists()
    assert [
        line
        for line in done.stderr.splitlines()
        if line.startswith('train: several processes were asked for, but')
        and '--multi_gpu --num_processes 2' in line
    ], done.stderr[-3000:]

def test_accelerate_launch(small, one, tmp_path, environment):
    done = launch('--multi_gpu', small, tmp_path, environment(OMP_NUM_THREADS='1'))
    assert done.returncode==0, done.stderr[-3000:]
    assert done.stdout.count('✅ Model saved successfully!')==2 # by one process, after each epoch
    same(tmp_path, one)

# --- Parts, in one process

def test_a_parameter_without_a_gradient():
    "It has no part in the loss, as in layers that share the keys of others."
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    (3*used).sum().backward()
    two = SimpleNamespace(num_processes=2, reduce=lambda t, how: 2*t)
    loss, asked = processes.add_up(two, torch.optim.SGD([used, unused], lr=1.), 1.5, 0)
    assert loss==3 and not asked and unused.grad is None and used.grad.tolist()==[6, 6]

@pytest.fixture
def sharded(monkeypatch):
    "Call `shard_decoder` for a GPU, but in a single process that keeps all layers on its CPU."
    from torch.distributed import device_mesh, fsdp
    monkeypatch.setattr(fsdp, 'fully_shard', lambda layer, **options: layer)
    monkeypatch.setattr(device_mesh, 'init_device_mesh', lambda *args: None)
    monkeypatch.setattr(processes, 'PartialState', lambda: SimpleNamespace(num_processes=1))
    monkeypatch.setattr(processes, 'default_dtype', lambda device: torch.bfloat16)
    return lambda model, h: processes.shard_decoder(model, h, 'cpu').eval()

def test_a_sharded_decoder_has_one_dtype(sharded):
    "On a GPU, embeddings, norms and head are as precise as the layers: scores are computed without autocast."
    h = as_hyperparameters()
    model = sharded(build_captioner(h, 'cpu'), h)
    assert {p.dtype for p in model.decoder.parameters()}=={torch.bfloat16}
    assert model(torch.zeros(2, model.encoder.width), ['A cat.', 'A fox.']).isfinite()

def test_sharding_leaves_the_encoder_as_it_is_in_other_runs(sharded):
    "Of the dtype of the GPU, so that features are found again; the user's own keeps its numbers."
    h = as_hyperparameters()
    model = sharded(build_captioner(h, 'cpu'), h)
    assert {p.dtype for p in model.encoder.parameters()}=={torch.bfloat16}
    images = [Storybook(n=1)[0]['image']]
    assert model.encoder.encode(images).isfinite().all()
    mine = own_encoder(MeanColours(), 'cpu')
    h = as_hyperparameters(**mine.settings)
    before = mine.encode(images)
    model = sharded(build_captioner(h, 'cpu', mine), h)
    assert {p.dtype for p in model.encoder.parameters()}=={torch.float32}
    assert torch.equal(model.encoder.encode(images), before)
