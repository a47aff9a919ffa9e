"The pool of child processes that decode images, and what may go wrong in them."
import atexit, io, os, random, signal, struct, subprocess, sys, threading, time
from contextlib import suppress
from functools import partial
from pathlib import Path
import numpy as np, psutil, pytest
from PIL import Image
from bombs import one_colour, scan_bomb, two_in_one
from damage import damaged, saved, scene
from capnb import image_pool, many_images
from capnb.image_pool import DecodingPool
from capnb.many_images import decoding_pool, open_images
from capnb.pixels import PixelSteps
from capnb.images import ImageFile, TooManyPixels, image_formats, measure_image, open_image

GOOD = [saved(scene(random.Random(i)), 'PNG') for i in range(10)]

@pytest.fixture(scope='module')
def pool():
    with DecodingPool(2) as pool:
        yield pool

def same(image, source):
    return image.size == open_image(source).size and image.tobytes() == open_image(source).tobytes()

def said(do):
    try:
        return do().tobytes()
    except ValueError as e:
        return str(e)

def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(.05)
    return true()

@pytest.mark.filterwarnings('ignore')
def test_a_child_says_what_open_image_says(pool):
    files = list(damaged(60, seed=1))
    answers = [
        a if isinstance(a, ValueError) else a.tobytes()
        for a in pool.map([ImageFile(f.data, f.name) for f in files])
    ]
    assert [str(a) if isinstance(a, ValueError) else a for a in answers] == [
        said(partial(open_image, f.data, f.name)) for f in files
    ]

def test_paths_and_images(pool, tmp_path):
    (tmp_path/'a cat é.png').write_bytes(GOOD[0])
    assert same(pool.open(tmp_path / 'a cat é.png'), GOOD[0]) and same(
        pool.open(str(tmp_path / 'a cat é.png')), GOOD[0]
    )
    assert same(pool.open(Image.open(io.BytesIO(GOOD[1]))), GOOD[1])
    with pytest.raises(ValueError, match='no.png is not a readable image: .*No such file'):
        pool.open(tmp_path/'no.png')
    with pytest.raises(ValueError, match='is not a readable image: it is no file'):
        pool.open(tmp_path)

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='the system has no FIFOs')
def test_a_fifo_is_no_image(pool, tmp_path):
    os.mkfifo(tmp_path/'x.png')
    with pytest.raises(ValueError, match='it is no file'):
        open_image(tmp_path/'x.png')

def test_children_know_nothing_of_torch(pool):
    pool.open(GOOD[0])
    for child in pool.children:
        try:
            maps = [m.path for m in psutil.Process(child.process.pid).memory_maps()]
        except AttributeError:
            pytest.skip('this system does not tell')
        assert any('_imaging' in path for path in maps) and not any('torch' in path for path in maps)

def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys, capnb.image_pool; print([m for m in ('torch', 'transformers', 'datasets', 'matplotlib')"
        " if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

def test_a_child_that_hangs_costs_one_image():
    with DecodingPool(2, seconds=1.) as pool:
        found = list(
            pool.map(
                [
                    ImageFile(*file)
                    for file in zip(
                        [GOOD[0], scan_bomb(), *GOOD[1:], scan_bomb()], 'abcdefghijkl', strict=True
                    )
                ]
            )
        )
        assert [str(e) for e in found if isinstance(e, ValueError)] == [
            f'{name} is not a readable image: decoding it took longer than 1 seconds' for name in 'bl'
        ]
        assert all(same(image, source) for image, source in zip([found[0], *found[2:11]], GOOD, strict=True))
        assert len(pool.children) <= 2

def test_a_child_that_dies_costs_one_image():
    with DecodingPool(1) as pool:
        bomb = pool.submit(scan_bomb(), 'bomb')
        assert until(lambda: pool.children and next(iter(pool.children)).deadline)
        next(iter(pool.children)).process.kill()
        with pytest.raises(ValueError, match='bomb is not a readable image: its decoder died'):
            bomb.result()
        assert same(pool.open(GOOD[0]), GOOD[0])
        idle = next(iter(pool.children)).process
        idle.kill()
        idle.wait()
        assert same(pool.open(GOOD[1]), GOOD[1]) # nobody notices

@pytest.mark.skipif(sys.platform != 'linux', reason='the system does not limit memory as Linux does')
def test_a_child_has_a_limit_of_memory():
    with DecodingPool(1, memory=2**28) as pool:
        with pytest.raises(
            ValueError, match='big is not a readable image: it needs more memory than there is'
        ):
            pool.open(one_colour(9000), 'big')
        assert same(pool.open(GOOD[0]), GOOD[0])

def test_large_images_come_one_after_the_other(monkeypatch):
    monkeypatch.setattr(image_pool, '_FREE', 1000)
    with DecodingPool(2) as pool:
        with pool.large:
            waits = pool.submit(GOOD[0])
            assert same(
                pool.open(saved(scene(random.Random(0), (20, 20)), 'PNG')),
                saved(scene(random.Random(0), (20, 20)), 'PNG'),
            )
            assert not waits.done()
        assert same(waits.result(), GOOD[0])

def test_limits_of_pixels(pool):
    with pytest.raises(TooManyPixels, match='9.0 million pixels, and 1 million are allowed'):
        pool.open(one_colour(3000), pixels=1e6)
    with pytest.raises(TooManyPixels):
        pool.open(one_colour(20_000, '1'))
    small = pool.open(one_colour(3000), min_side=100)
    assert (small.size, small.info['original_size']) == ((188, 188), (3000, 3000)) # a 16th of it

def test_a_file_of_two_kinds_is_one_kind_to_all(pool):
    file = two_in_one()
    # to who does not say what may come
    assert Image.open(io.BytesIO(file), formats=['FLI', 'TIFF']).size == (13_000, 13_000)
    assert measure_image(file) == pool.open(file).size == open_image(file).size == (8, 8)

def test_a_child_cannot_send_what_is_no_answer():
    with DecodingPool(1) as lied:
        for answer in (
            b'',
            b'\xff' * 12,
            b'\0\0\0\2' + bytes(8) + b'[]',
            b'\0\0\0\x17' + bytes(8) + b'{"size": [9999, 9999]} ',
        ):
            lied.open(GOOD[0])
            child = next(iter(lied.children))
            child.process.stdout.close()
            child.process.stdout = io.BufferedReader(io.BytesIO(answer))
            with pytest.raises(ValueError, match='its decoder died'):
                lied.open(GOOD[0])
            assert same(lied.open(GOOD[1]), GOOD[1])

STEPS = PixelSteps(32, int(Image.Resampling.BICUBIC), (32, 32))

@pytest.fixture
def asked(monkeypatch):
    "How many files each message to a child had."
    sizes, ask = [], image_pool._Decoder.ask
    def note(self, request, *others):
        sizes.append(len(request.get('sizes', [0])))
        return ask(self, request, *others)
    monkeypatch.setattr(image_pool._Decoder, 'ask', note)
    return sizes

def as_bytes(files): return [ImageFile(file, f'file {i}') for i, file in enumerate(files)]

def check_each(found, files):
    for array, file in zip(found, files, strict=True):
        np.testing.assert_array_equal(array, STEPS(open_image(file)))

def test_many_files_are_one_message(pool, asked):
    check_each(pool.open_many(as_bytes(GOOD), steps=STEPS), GOOD)
    assert asked==[10]
    assert pool.open_many([], steps=STEPS)==[] and asked==[10]
    assert all(same(image, file) for image, file in zip(pool.open_many(GOOD), GOOD, strict=True))
    assert asked[-10:]==[1]*10 # whole images come one by one

@pytest.mark.parametrize('most', [dict(MOST_BYTES=sum(map(len, GOOD))-1), dict(MOST_FILES=9)], ids=list)
def test_files_that_are_too_many_come_one_by_one(pool, asked, monkeypatch, most):
    for name, number in most.items():
        monkeypatch.setattr(image_pool, name, number)
    check_each(pool.open_many(as_bytes(GOOD), steps=STEPS), GOOD)
    assert asked==[1]*10

def test_a_bad_one_among_many_is_named(pool):
    files = [*GOOD[:3], b'no image', *GOOD[3:5]]
    with pytest.raises(ValueError, match='file 3 is not a readable image: its content is of no known format'):
        pool.open_many(as_bytes(files), steps=STEPS)

def test_a_large_one_among_many_waits_for_its_turn(asked, monkeypatch):
    monkeypatch.setattr(image_pool, '_FREE', 1000)
    small = saved(scene(random.Random(0), (20, 20)), 'PNG')
    with DecodingPool(1) as pool:
        check_each(pool.open_many(as_bytes([small, GOOD[0], small]), steps=STEPS), [small, GOOD[0], small])
    assert asked==[3, 1]

def test_one_among_many_that_hangs_costs_one_image(asked):
    files = [GOOD[0], scan_bomb(), GOOD[1]]
    with DecodingPool(1, seconds=1.) as pool:
        with pytest.raises(ValueError, match='file 1 is not a readable .*: decoding it took longer than 1'):
            pool.open_many(as_bytes(files), steps=STEPS)
        check_each(pool.open_many(as_bytes(GOOD), steps=STEPS), GOOD)
    assert asked==[3, 1, 1, 10]

@pytest.mark.parametrize('head', [
    b'{"size": [32, 32]}', b'{"has": [true]}', b'{"has": [true, true]}', b'{"has": 3}', b'{"error": "no"}',
], ids=bytes.decode)
def test_a_child_cannot_send_other_pixels_for_many(head):
    with DecodingPool(1) as lied:
        lied.open(GOOD[0])
        child = next(iter(lied.children))
        child.process.stdout.close()
        answer = struct.pack('>IQ', len(head), 3072) + head + bytes(3072)
        child.process.stdout = io.BufferedReader(io.BytesIO(answer))
        check_each(lied.open_many(as_bytes(GOOD[:2]), steps=STEPS), GOOD[:2])

def test_what_waits_can_be_cancelled():
    with DecodingPool(1, seconds=2.) as pool:
        first, second = pool.submit(scan_bomb()), pool.submit(GOOD[0])
        assert until(first.running) and second.cancel()
        assert same(pool.open(GOOD[1]), GOOD[1])
        assert first.exception() and second.cancelled()

def test_a_pool_has_a_child_for_each_usable_core(monkeypatch):
    "In a container or on a cluster these may be a few of many."
    monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    with DecodingPool() as pool:
        assert pool.workers==2

@pytest.mark.skipif(sys.platform != 'linux', reason='the system does not limit memory as Linux does')
def test_jpeg_xl_is_decoded_on_a_machine_with_many_cores(monkeypatch):
    pytest.importorskip('pillow_jxl')
    image_formats()
    file = saved(scene(random.Random(0)), 'JXL', lossless=True)
    many = 'import pillow_jxl.JpegXLImagePlugin as plugin; plugin.DECODE_THREADS = 400; '
    monkeypatch.setattr(image_pool, '_CHILD', many+image_pool._CHILD)
    with DecodingPool(1) as pool:
        assert same(pool.open(file), file)

def test_a_closed_pool_has_no_children():
    with DecodingPool(3) as pool:
        assert list(pool.map(GOOD)) and until(lambda: len(pool.children)==3 or not list(pool.map(GOOD)))
        children = [c.process for c in pool.children]
    for ask in (pool.open, pool.submit, lambda file: pool.open_many([file], steps=STEPS)):
        with pytest.raises(RuntimeError, match='closed'):
            ask(GOOD[0])
    assert [process.returncode for process in children] == [-signal.SIGKILL]*3 # waited for, no zombies
    assert all(process.stdin.closed and process.stdout.closed for process in children)

SCRIPT = """
print('main', flush=True)
import random, sys, threading, time
sys.path[:0] = [{tests!r}]
from bombs import scan_bomb
from damage import saved, scene
from capnb.many_images import decoding_pool, open_images
files = [saved(scene(random.Random(i)), 'PNG') for i in range(20)]
print(sum(not isinstance(image, ValueError) for image in open_images(files)), flush=True)
if len(sys.argv) > 1:
    bomb = decoding_pool().submit(scan_bomb())
    print(*[child.process.pid for child in decoding_pool().children], flush=True)
    time.sleep(60)
"""

@pytest.fixture
def script(tmp_path, environment):
    "A script without a guard, in a folder with modules that are named like others."
    (tmp_path/'work.py').write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    for name in ('json', 'PIL', 'capnb'):
        (tmp_path/f'{name}.py').write_text('raise SystemExit("this is another one")')
    def start(*args):
        return subprocess.Popen(
            [sys.executable, '-P', tmp_path / 'work.py', *args],
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=tmp_path,
        )
    return start

def test_a_script_needs_no_guard(script):
    out, _ = script().communicate(timeout=60)
    assert out.split() == ['main', '20']

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='the system has no SIGKILL')
def test_children_end_with_a_parent_that_was_killed(script):
    process = script('bomb')
    lines = [process.stdout.readline().split() for _ in range(3)]
    children = [psutil.Process(int(pid)) for pid in lines[2]]
    assert children and all(c.is_running() for c in children)
    process.kill()
    process.wait()
    assert until(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))

def test_few_images_start_no_process(monkeypatch):
    monkeypatch.setattr(many_images, 'decoding_pool', lambda: pytest.fail('a pool was asked for'))
    assert all(same(image, source) for image, source in zip(open_images(GOOD[:7]), GOOD[:7], strict=True))
    opened = open_images([open_image(b) for b in GOOD])
    assert all(same(image, source) for image, source in zip(opened, GOOD, strict=True))

@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='the system stops no processes')
def test_a_child_that_is_stopped_is_replaced():
    "Its own timer cannot end it: the pool's watch does."
    with DecodingPool(1, seconds=1.) as pool:
        bomb = pool.submit(scan_bomb(), 'bomb')
        assert until(lambda: pool.children and next(iter(pool.children)).deadline)
        os.kill(next(iter(pool.children)).process.pid, signal.SIGSTOP)
        with pytest.raises(ValueError, match='bomb is not a readable image: decoding it took longer'):
            bomb.result(timeout=20)
        assert same(pool.open(GOOD[0]), GOOD[0])

STOPPED = """
import random, sys, time
sys.path[:0] = [{tests!r}]
from damage import saved, scene
from capnb import image_pool
slow = 'import time, capnb.image_pool as p; a = p._answer; p._answer = lambda *x: time.sleep(.5) or a(*x); '
image_pool._CHILD = image_pool._CHILD.replace('decode_requests(m', slow+'decode_requests(m')
with image_pool.DecodingPool(1, seconds=1.5) as pool:
    found = pool.map([saved(scene(random.Random(i)), 'PNG') for i in range(6)])
    next(found)
    time.sleep(.1)
    print('at work', flush=True)
    print(*(image for image in found if isinstance(image, ValueError)))
"""

@pytest.mark.skipif(not hasattr(signal, 'SIGSTOP'), reason='the system stops no processes')
def test_the_time_for_which_all_are_stopped_does_not_count(tmp_path, environment):
    "As by Ctrl-Z, or by a cluster that suspends a job: pool and children stand still, and go on later."
    (tmp_path/'work.py').write_text(STOPPED.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, tmp_path/'work.py'],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline()=='at work\n'
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(4) # longer than the pool's limit and a child's own
            os.killpg(process.pid, signal.SIGCONT)
            assert process.communicate(timeout=60)[0].strip()==''
        finally:
            with suppress(ProcessLookupError): # it has ended
                os.killpg(process.pid, signal.SIGKILL)

def test_two_threads_get_one_pool(monkeypatch):
    "Both ask before there is one."
    both_wait, closed = threading.Barrier(2), []
    class Slow:
        def __init__(self):
            both_wait.wait(10)
        def close(self):
            closed.append(self)
    monkeypatch.setattr(many_images, 'DecodingPool', Slow)
    monkeypatch.setattr(many_images, '_pools', {})
    found = []
    threads = [threading.Thread(target=lambda: found.append(decoding_pool())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(found)==2 and found[0] is found[1]
    assert len(closed)==1 and closed[0] is not found[0]
    atexit.unregister(found[0].close)

def test_a_large_damaged_image_leaves_the_next_one_alone(monkeypatch):
    "It is decoded twice, the second time without metadata; the child waits for room once."
    monkeypatch.setattr(image_pool, '_FREE', 1000)
    whole = saved(scene(random.Random(11)), 'PNG')
    half = whole[:len(whole)//2]
    with DecodingPool(1) as pool:
        for _ in range(2):
            with pytest.raises(ValueError, match='the image is not a readable image'):
                pool.open(half)
            assert same(pool.open(GOOD[0]), GOOD[0])

# --- What is asked of a pool

def test_a_pool_of_another_process_is_refused_not_waited_for(pool, monkeypatch):
    "As in a fork, which has the pool, but not its threads."
    monkeypatch.setattr(pool, 'pid', -1)
    for ask in (pool.open, pool.submit, lambda file: next(pool.map([file]))):
        with pytest.raises(RuntimeError, match='another process'):
            ask(GOOD[0])

@pytest.mark.parametrize('wrong', [None, np.zeros((4, 4, 3), np.uint8), bytearray(GOOD[0])], ids=type)
def test_what_is_no_image_is_a_value_error(pool, wrong):
    with pytest.raises(ValueError, match='the image is not a readable image'):
        pool.open(wrong)
    bad, good = pool.map([wrong, GOOD[0]])
    assert isinstance(bad, ValueError) and same(good, GOOD[0])

def test_a_path_in_sys_path_does_no_harm(monkeypatch):
    monkeypatch.setattr(sys, 'path', [*sys.path, Path('folder')])
    with DecodingPool(1) as pool:
        assert same(pool.open(GOOD[0]), GOOD[0])

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='the system has no FIFOs')
def test_a_pipe_is_not_measured(tmp_path):
    os.mkfifo(tmp_path/'pipe.png')
    writer = os.open(tmp_path/'pipe.png', os.O_RDWR) # or opening it would wait for a writer
    os.write(writer, b'x'*20)
    try:
        with pytest.raises(ValueError, match='pipe.png is not a readable image: it is no file'):
            measure_image(tmp_path/'pipe.png')
    finally:
        os.close(writer)
    assert measure_image(ImageFile(GOOD[0]))==open_image(GOOD[0]).size
