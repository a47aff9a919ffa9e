"""The server from outside: captions as offline, each limit with its status, nonsense, stops, and the page in
a browser."""
import asyncio, base64, http.client, http.server, io, json, os, random, re, shutil, signal, socket
import struct, subprocess, sys, tempfile, threading, time, warnings, zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from queue import Queue
from types import SimpleNamespace
import psutil, pytest, torch, uvicorn
from bombs import one_colour, scan_bomb, two_in_one
from damage import damaged
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from starlette.datastructures import Headers
from capnb.saving import load_model_from_checkpoint, shipped_checkpoint
from capnb.images import image_formats, open_image
from capnb.run.serving import app as app_module
from capnb.run.serving.access import foreign, host_check
from capnb.run.serving.command import serve_command
from capnb.run.serving.desk import Desk, Place
from capnb.run.serving.limits import Limits, client_of, connection_class
from capnb.run.serving.load import load_report, memory, send_load
from capnb.run.serving.page import PAGE
from capnb.run.serving.server import _host_of, _litserve, _lit_server, _server_class
from capnb.run.serving.uploads import _form_image
from capnb.run.serving.worker import Worker, answer_batch, gather, why
from capnb.storybook import Storybook

PAGES = 48
KEY = 'open sesame'

def as_png(image):
    f = io.BytesIO()
    image.save(f, 'png')
    return f.getvalue()

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with a checkpoint and pages."
    here = tmp_path_factory.mktemp('serving')
    shutil.copytree(shipped_checkpoint().parent, here/'saved_models')
    (here/'pages').mkdir()
    for i in range(PAGES):
        (here/'pages'/f'{i:03}.png').write_bytes(as_png(Storybook('test')[i]['image']))
    return here

@pytest.fixture(scope='module')
def pages(made): return [p.read_bytes() for p in sorted((made/'pages').iterdir())]

@pytest.fixture(scope='module')
def wanted(run, made, starting):
    "What the command line writes for the pages."
    done = run('capnb_caption', 'pages', '--json', cwd=made)
    assert done.returncode == 0, done.stderr[-3000:]
    captions = [r['caption'] for r in json.loads(done.stdout)]
    assert len(set(captions)) > PAGES//3
    return captions

@pytest.fixture(scope='module')
def model(made):
    return load_model_from_checkpoint(next((made/'saved_models').glob('*.pth')), 'cpu')[0]

@pytest.fixture(scope='module')
def same(model, pages, wanted):
    """Whether a caption is the one that was written offline, or one whose first other token was as good up
    to rounding."""
    def same(i, caption):
        if caption == wanted[i]: return True
        ids = [model.tokenizer(c)['input_ids'] + [model.tokenizer.eos_token_id] for c in (caption, wanted[i])]
        at = next(at for at,(a,b) in enumerate(zip(*ids, strict=False)) if a != b)
        nats, _ = model.nll(model.encoder.encode([open_image(pages[i])]*2), [caption, wanted[i]])
        return abs(nats[0,at] - nats[1,at]).item() < 1e-4
    return same

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

class Server:
    "A server as a process; the checkpoint is the newest of the folder."
    def __init__(self, start, cwd, *args, **env):
        self.port = free_port()
        self.process = start('capnb_serve', '--port', self.port, *args, cwd=cwd, env=env)
        self.address = f'http://127.0.0.1:{self.port}'

    def wait(self):
        line = self.process.stdout.readline()
        assert line.startswith('serving '), line + self.process.stderr.read()[-3000:]
        while True:
            try:
                if self.ask('GET', '/health')[0] == 200: return self
            except OSError:
                pass
            time.sleep(.05)

    def connect(self):
        return http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)

    def ask(self, method, path, body=None, **headers):
        "Status, body and headers of an answer."
        connection = self.connect()
        try:
            connection.request(method, path, body, {k.replace('_', '-'): v for k,v in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def caption(self, picture, path='/caption', **headers):
        "Status and parsed answer for an image that is sent as JSON."
        body = json.dumps(dict(image=base64.b64encode(picture).decode()))
        status, answer, _ = self.ask('POST', path, body, Content_Type='application/json', **headers)
        return status, json.loads(answer)

    @contextmanager
    def half_sent(self, picture, **headers):
        "A request whose body has come by half; gives a function that sends the rest and reads the answer."
        body, connection = json.dumps(dict(image=base64.b64encode(picture).decode())).encode(), self.connect()
        connection.putrequest('POST', '/caption')
        for k,v in dict(Content_Type='application/json', Content_Length=str(len(body)), **headers).items():
            connection.putheader(k.replace('_', '-'), v)
        connection.endheaders(body[:50])
        def finish(send=True):
            if send:
                connection.send(body[50:])
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        time.sleep(.2) # it has arrived
        yield finish
        connection.close()

    @contextmanager
    def busy(self, picture, number=2, **headers):
        """A server whose worker does nothing, and whose places are taken; gives a list in which their
        answers will be."""
        others, worker = [], self.workers()[0]
        asking = [
            threading.Thread(target=lambda: others.append(self.caption(picture, **headers)))
            for _ in range(number)
        ]
        worker.suspend()
        try:
            for t in asking:
                t.start()
            time.sleep(.4) # they have arrived
            yield others
        finally:
            worker.resume()
        for t in asking:
            t.join()

    def workers(self):
        "The processes that hold a model."
        found = []
        for p in psutil.Process(self.process.pid).children():
            try:
                found += [p] if 'spawn_main' in ' '.join(p.cmdline()) else []
            except psutil.Error:
                pass # it has just ended
        return found

@pytest.fixture(scope='module')
def starting(start, made):
    "The two servers of these tests, which load their models while other things are made ready."
    found = dict(
        wide=Server(start, made),
        narrow=Server(
            start,
            made,
            '--max_waiting',
            2,
            '--max_per_client',
            2,
            '--timeout',
            2,
            '--max_upload',
            0.1,
            CAPNB_API_KEY=KEY,
        ),
    )
    try:
        yield found
    finally:
        for server in found.values():
            family = (
                psutil.Process(server.process.pid).children(recursive=True)
                if server.process.poll() is None
                else []
            )
            for p in (server.process, *family):
                p.kill()

@pytest.fixture(scope='module')
def servers(starting, wanted):
    return {name: server.wait() for name,server in starting.items()}

@pytest.fixture(scope='module')
def server(servers): return servers['wide']

@pytest.fixture(scope='module')
def narrow(servers): return servers['narrow']

class Empty(http.server.BaseHTTPRequestHandler):
    "An empty page."
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Type', 'text/html')
        self.end_headers()
        self.wfile.write(b'<body>')

    def log_message(self, *args):
        pass

# --- Captions

def test_batched_captions_are_those_of_the_command_line(server, pages, same):
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(server.caption, pages))
    assert [status for status,_ in found] == [200]*PAGES
    assert all(same(i, answer['caption']) for i,(_, answer) in enumerate(found))

def form(picture, name='file', file='page.png', boundary='xyz'):
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
        + (f'; filename="{file}"' if file else '')
        + '\r\n\r\n'
    )
    return head.encode() + picture + f'\r\n--{boundary}--\r\n'.encode()

def test_a_form_and_a_data_url(server, pages, same):
    status, answer, headers = server.ask(
        'POST', '/caption', form(pages[2]), Content_Type='multipart/form-data; boundary=xyz'
    )
    assert (
        status == 200
        and same(2, json.loads(answer)['caption'])
        and headers['content-type'] == 'application/json'
    )
    url = 'data:image/png;base64,' + base64.b64encode(pages[2]).decode()
    status, answer, _ = server.ask(
        'POST', '/caption', json.dumps(dict(image=url)), Content_Type='application/json; charset=utf-8'
    )
    assert status == 200 and same(2, json.loads(answer)['caption'])

@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF'])
def test_other_formats(server, pages, model, kind):
    if kind not in image_formats():
        pytest.skip(f'this Pillow has no {kind}')
    f = io.BytesIO()
    open_image(pages[0]).save(f, kind)
    assert server.caption(f.getvalue()) == (200, dict(caption=model.caption(open_image(f.getvalue()))))

def events(server, picture, path='/caption?stream=true'):
    "The events of a streamed answer, each with the time when it came."
    connection = server.connect()
    connection.request('POST', path, form(picture), {'Content-Type': 'multipart/form-data; boundary=xyz'})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.headers['content-type'].startswith('text/event-stream')
    found = []
    for line in answer:
        if line.startswith(b'data: '):
            found.append((time.perf_counter(), json.loads(line[6:])))
        else:
            assert line == b'\n'
    connection.close()
    return found

def check_stream(found, i, same):
    told = [e for _,e in found]
    assert set(told[-1]) == {'caption'} and same(i, told[-1]['caption'])
    texts = [e['text'] for e in told[:-1]]
    assert (
        len(texts) >= 5
        and all(b.startswith(a) and len(a) < len(b) for a, b in zip(texts, texts[1:], strict=False))
        and texts[-1] == told[-1]['caption']
    )

def test_words_come_one_by_one(server, pages, same):
    found = events(server, pages[0])
    check_stream(found, 0, same)
    times = [t for t,_ in found]
    assert len({round(t, 3) for t in times}) > 3, 'all words came at once'

def test_streams_and_others_in_one_batch(server, pages, same):
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(events, server, pages[i]) for i in range(6)]
        others = [pool.submit(server.caption, pages[i]) for i in range(6, 12)]
        for i,s in enumerate(streams):
            check_stream(s.result(), i, same)
        for i,o in enumerate(others, 6):
            assert same(i, o.result()[1]['caption'])

def test_gather_is_bounded_in_number_and_time():
    queue = Queue()
    for i in range(5):
        queue.put(i)
    assert gather(queue, 2, 60) == [0, 1]
    start = time.monotonic()
    assert gather(queue, 8, .1) == [2, 3, 4] and .09 < time.monotonic()-start < 5
    assert gather(queue, 8, 0) == [] # it never waits for ever

def test_a_model_that_fails_at_one_image_writes_for_the_others(model, pages):
    "What a model raises for a batch is told to nobody but the request that makes it raise alone."
    images, said = [open_image(p) for p in pages[:4]], {}
    def encode(batch):
        if any(image is images[2] for image in batch):
            raise RuntimeError('no memory left')
        return model.encoder.encode(batch)
    failing = copy(model)
    object.__setattr__(failing, 'encoder', SimpleNamespace(encode=encode))
    answer_batch(failing, [(i, image, False) for i,image in enumerate(images)], said.__setitem__)
    assert said[2] == dict(status=500, detail='the model failed at this image: no memory left')
    assert [said[i]['caption'] for i in (0, 1, 3)] == model.caption([images[0], images[1], images[3]])

def with_error(model, error):
    "A captioner whose encoder raises this error."
    def encode(images):
        raise error
    failing = copy(model)
    object.__setattr__(failing, 'encoder', SimpleNamespace(encode=encode))
    return failing

def test_a_device_that_failed_is_no_fault_of_an_image(model, pages, monkeypatch):
    "It does no more work for this process, whatever comes; a lack of memory may pass."
    error, said = torch.AcceleratorError('CUDA error: unspecified launch failure'), {}
    image = open_image(pages[0])
    asked = [(i, image, False) for i in range(2)]
    def explain(*args, **options):
        raise error
    monkeypatch.setattr('capnb.run.serving.worker.explain', explain)
    with pytest.raises(torch.AcceleratorError):
        answer_batch(with_error(model, error), asked, said.__setitem__)
    with pytest.raises(torch.AcceleratorError):
        why(model, image, 'A red cat.')
    assert not said
    full = torch.AcceleratorError('CUDA error: out of memory')
    answer_batch(with_error(model, full), asked, said.__setitem__)
    assert [said[i]['status'] for i in range(2)]==[500, 500]

def test_a_batch_size_among_the_options_is_no_error(model, pages):
    images, said = [open_image(p) for p in pages[:3]], {}
    asked = [(i, image, False) for i,image in enumerate(images)]
    answer_batch(model, asked, said.__setitem__, dict(batch_size=2))
    assert [said[i]['caption'] for i in range(3)] == model.caption(images)

# --- Why a word was said

EXPLAIN = '/caption?explain=true'

def as_offline(model, picture, answer):
    "Whether an explanation is that of `explain`, up to rounding."
    wanted = why(model, open_image(picture), answer['caption'])['words']
    assert [w['text'] for w in answer['words']] == [w['text'] for w in wanted] and len(wanted) > 4
    for got,own in zip(answer['words'], wanted, strict=True):
        assert got['probability'] == pytest.approx(own['probability'], abs=.002)
        assert (
            got['patches'] == [pytest.approx(row, abs=0.02) for row in own['patches']]
            and len(got['patches']) == 8
        )
        assert got['alternatives'][0][1] == pytest.approx(own['alternatives'][0][1], abs=.002)
    assert max(max(map(max, w['patches'])) for w in wanted) > 1, 'no word rests on anything'

def test_an_explanation_is_that_of_offline(server, pages, same, model):
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda i: server.caption(pages[i], EXPLAIN), range(3)))
    for i,(status, answer) in enumerate(answers):
        assert status == 200 and same(i, answer['caption'])
        as_offline(model, pages[i], answer)

def test_a_stream_tells_the_caption_before_the_reasons(server, pages, same, model):
    found = events(server, pages[4], EXPLAIN + '&stream=true')
    check_stream(found[:-1], 4, same)
    assert found[-1][1]['caption'] == found[-2][1]['caption'] and found[-1][0] > found[-2][0] + .01
    as_offline(model, pages[4], found[-1][1])

def test_reasons_are_in_nobodys_way(server, pages):
    "Who wants a caption waits for one explanation at most, however many are asked for."
    ended = {}
    def ask(name, *args):
        assert server.caption(*args)[0] == 200
        ended[name] = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(ask, f'why {i}', pages[i], EXPLAIN) for i in range(8)]
        while len(ended) < 1:
            time.sleep(.01)
        jobs += [pool.submit(ask, f'caption {i}', pages[i]) for i in range(4)]
        for job in jobs:
            job.result()
    captions, reasons = (
        [t for name, t in ended.items() if name.startswith(what)] for what in ('caption', 'why')
    )
    assert max(captions) < sorted(reasons)[-3]

def test_reasons_have_the_same_limits(narrow, server, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    assert narrow.caption(pages[0], EXPLAIN)[0] == 401
    assert narrow.caption(b'x'*100_000, EXPLAIN, **key)[0] == 413
    assert narrow.caption(pages[0][:100], EXPLAIN, **key)[0] == 415
    assert server.caption(pages[0], '/caption?explain=perhaps')[0] == 422
    with narrow.busy(pages[0], **key) as others:
        assert narrow.caption(pages[0], EXPLAIN, **key)[0] == 429
    assert [status for status,_ in others] == [200, 200]

class Done(Exception):
    pass

class Told:
    "What a worker says, and how it ends: when it asks its empty queue again after having said enough."
    def __init__(self, model, *requests, then=()):
        self.said, self.queue, self.then = [], Queue(), list(then)
        for r in requests:
            self.queue.put(r)
        worker = Worker(None, None, None, None, wait=0)
        worker.model = model
        api, transport = SimpleNamespace(max_batch_size=1), SimpleNamespace(send=self.send)
        with pytest.raises(Done):
            worker(api, 'cpu', 0, self, transport, None, [])

    def send(self, message, consumer_id):
        self.said.append((message[0], *message[1][0]))

    def get(self, timeout=None):
        if self.queue.empty() and self.then and self.said:
            self.queue.put(self.then.pop(0))
        if self.queue.empty() and timeout: raise Done # there is nothing to do
        return self.queue.get_nowait()

def test_what_nobody_waits_for_is_left_undone(model, pages):
    """A request whose time is over is neither captioned nor explained, nor one whose client has left; each
    is confirmed. The answer of one in time comes."""
    end, image = time.monotonic()+60, open_image(pages[0])
    told = Told(
        model,
        (0, 'late', end - 61, (image, False, True)),
        (0, 'left', end, (image, False, True)),
        (0, 'in time', end, (image, False, False)),
        (0, 'left', None, None),
    )
    assert sorted(told.said) == [('in time', 'caption'), ('late', 'dropped'), ('left', 'dropped')]

def test_a_worker_whose_device_failed_ends(model, pages, capsys, monkeypatch):
    failing = with_error(model, torch.AcceleratorError('CUDA error: unknown error\nCompile with ...'))
    told, said_to = [], Told.send
    def send(self, message, consumer_id):
        told.append(message[1][0])
        said_to(self, message, consumer_id)
    monkeypatch.setattr(Told, 'send', send)
    with pytest.raises(SystemExit) as end:
        Told(failing, (0, 'asked', time.monotonic()+60, (open_image(pages[0]), False, False)))
    assert told==[dict(status=503, detail='the device failed; try again in a minute')]
    said = capsys.readouterr().err
    assert end.value.code==1 and len(said.splitlines())==1 and 'CUDA error: unknown error' in said

def test_a_worker_gets_the_note_that_another_one_has_read(monkeypatch):
    "All workers read one queue; a note is for the one that has the request of a client who has left."
    queue, place, end = Queue(), Place('a client', True, 0), time.monotonic()+60
    place.uid = 'left'
    def send(uid, answer):
        place.response_queue.append((answer, None))
        place.event.set()
    workers = [Worker(None, None, None, None, wait=0) for _ in range(2)]
    for worker in workers:
        worker.requests, worker.send, worker.most = queue, send, 1
        worker.captioning, worker.explaining = {}, {}
    workers[1].explaining['left'] = end, None, 'A red cat.'
    turns = [*workers]*2
    async def read(waiting, seconds):
        waiting.close()
        turns.pop(0).take_in(0)
        if not place.event.is_set(): raise TimeoutError
    monkeypatch.setattr('capnb.run.serving.desk.asyncio.wait_for', read)
    server = SimpleNamespace(litapi_request_queues={'/caption': queue}, response_buffer={})
    desk = Desk(server, Limits(), None, SimpleNamespace(value=2), None)
    async def hold():
        place.opening = asyncio.ensure_future(asyncio.sleep(0))
        await desk.hold(place, 2)
    asyncio.run(hold())
    assert place.over and not workers[1].explaining and queue.empty()

def test_an_explanation_ends_when_its_client_leaves(model, pages):
    image, end = open_image(pages[0]), time.monotonic()+60
    told = Told(
        model,
        (0, 'left', end, (image, False, True)),
        (0, 'stays', end, (image, False, True)),
        then=[(0, 'left', None, None)],
    )
    assert [s for s in told.said if s[0] == 'left'] == [('left', 'caption'), ('left', 'dropped')]
    assert [s for s in told.said if s[0] == 'stays'] == [('stays', 'caption'), ('stays', 'caption', 'words')]

def test_an_explanation_does_not_replace_the_other_captions(monkeypatch):
    several = [dict(caption='A', score=-.1), dict(caption='B', score=-.2)]
    async def answers(*args):
        yield dict(caption='A', captions=several)
        yield dict(caption='A', words=[])
    monkeypatch.setattr(app_module, 'answers', answers)
    desk, state = SimpleNamespace(notice=None), SimpleNamespace(value=app_module.SERVING)
    client = TestClient(app_module.make_app(desk, None, state, None)) # its lifespan is not started
    assert client.post(EXPLAIN).json() == dict(caption='A', captions=several, words=[])

def test_a_tokenizer_that_cannot_tell(model, pages):
    class Slow:
        is_fast, name_or_path = False, 'slow/one'
    spoiled = copy(model)
    spoiled.tokenizer = Slow
    answer = why(spoiled, open_image(pages[0]), 'A cat.')
    assert answer['status'] == 422 and 'slow/one' in answer['detail']

# --- What is refused

AS_JSON, AS_FORM = dict(Content_Type='application/json'), dict(
    Content_Type='multipart/form-data; boundary=xyz'
)
BOMB = as_png(Image.new('1', (7000, 7000)))
HEAD = b'IHDR' + bytes.fromhex('7fffffff7fffffff0802000000') # 2,147,483,647 pixels wide and as many high
HUGE = (
    b'\x89PNG\r\n\x1a\n\0\0\0\r'
    + HEAD
    + zlib.crc32(HEAD).to_bytes(4)
    + b'\0\0\0\0IDAT'
    + zlib.crc32(b'IDAT').to_bytes(4)
)
REFUSED = {  # method, path, body, headers -> status, words
    'an unknown path': ('GET', '/nothing', None, {}, 404, ''),
    'captions are posted': ('GET', '/caption', None, {}, 405, ''),
    'no content type': ('POST', '/caption', b'abc', {}, 415, 'multipart/form-data'),
    'a form of text': (
        'POST',
        '/caption',
        b'file=cat',
        dict(Content_Type='application/x-www-form-urlencoded'),
        415,
        'multipart/form-data',
    ),
    'an image as it is': ('POST', '/caption', BOMB, dict(Content_Type='image/png'), 415, 'image/png'),
    'empty JSON': ('POST', '/caption', b'', AS_JSON, 422, 'not valid JSON'),
    'broken JSON': ('POST', '/caption', b'{"image": ', AS_JSON, 422, 'not valid JSON'),
    'bytes that are no text': ('POST', '/caption', b'\xff\xfe\xfa', AS_JSON, 422, 'not valid JSON'),
    'deep JSON': ('POST', '/caption', b'[' * 100_000, AS_JSON, 422, 'not valid JSON'),
    'a list': ('POST', '/caption', b'["image"]', AS_JSON, 422, '"image"'),
    'a number': ('POST', '/caption', b'{"image": 5}', AS_JSON, 422, '"image"'),
    'no base64': ('POST', '/caption', b'{"image": "*"}', AS_JSON, 422, 'base64'),
    'other letters': ('POST', '/caption', json.dumps(dict(image='für')), AS_JSON, 422, 'base64'),
    'a data URL without base64': (
        'POST',
        '/caption',
        b'{"image": "data:image/png,abc"}',
        AS_JSON,
        422,
        'data:image/png;base64,',
    ),
    'a URL': ('POST', '/caption', b'{"image": "https://example.com/a.png"}', AS_JSON, 422, 'never fetched'),
    'a file URL': ('POST', '/caption', b'{"image": "file:///etc/passwd"}', AS_JSON, 422, 'never fetched'),
    'text as base64': (
        'POST',
        '/caption',
        json.dumps(dict(image=base64.b64encode(b'a cat').decode())),
        AS_JSON,
        415,
        'not a readable image',
    ),
    'PostScript': (
        'POST',
        '/caption',
        form(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'),
        AS_FORM,
        415,
        'not a readable image',
    ),
    'an empty file': ('POST', '/caption', form(b''), AS_FORM, 415, 'not a readable image'),
    'a form without a boundary': (
        'POST',
        '/caption',
        form(b'x'),
        dict(Content_Type='multipart/form-data'),
        422,
        'boundary',
    ),
    'another boundary': (
        'POST',
        '/caption',
        form(b'x'),
        dict(Content_Type='multipart/form-data; boundary=abc'),
        422,
        'form',
    ),
    'a field of another name': ('POST', '/caption', form(b'x', 'picture'), AS_FORM, 422, '"file"'),
    'a text as the file': ('POST', '/caption', form(b'x', file=None), AS_FORM, 422, '"file"'),
    'many pixels': ('POST', '/caption', form(BOMB), AS_FORM, 413, '25 million pixels'),
    'very many pixels': ('POST', '/caption', form(HUGE), AS_FORM, 413, '25 million pixels'),
    'many bytes': ('POST', '/caption', b'x' * 10_000_001, AS_JSON, 413, '10 MB'),
    'stream that is neither': ('POST', '/caption?stream=perhaps', b'{}', AS_JSON, 422, 'stream'),
}

@pytest.mark.parametrize('case', REFUSED)
def test_refused(server, case):
    method, path, body, headers, wanted, words = REFUSED[case]
    status, answer, sent = server.ask(method, path, body, **headers)
    assert (status, sent['content-type']) == (wanted, 'application/json')
    assert words in json.loads(answer)['detail']

def test_broken_picture_in_a_stream_has_its_status(server, pages):
    status, answer = server.caption(pages[0][:300], '/caption?stream=true')
    assert status == 415 and 'not a readable image' in answer['detail']

def test_an_uploaded_form_stays_in_memory(monkeypatch):
    on_disk = lambda self: pytest.fail('it is written to the disk')
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, 'rollover', on_disk)
    large = bytes(3_000_000)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    headers = Headers({'content-type': 'multipart/form-data; boundary=x'})
    assert asyncio.run(_form_image(headers, head + large + b'\r\n--x--\r\n')) == large

def test_the_report_of_a_load_times_captions_only():
    answers = [(0, 200, None, 2.)]*3 + [(0, 429, None, .001)]*90
    report = load_report(dict(answers=answers, seconds=6.))
    assert report == dict(requests=93, refused=90, rate=.5, p50=2., p99=2.)
    assert load_report(dict(answers=answers[3:], seconds=6.))['p50'] is None

def test_a_load_on_no_server_is_an_error():
    with pytest.raises(OSError):
        send_load(f'http://127.0.0.1:{free_port()}', [b'x'], clients=2, seconds=.5)

def test_no_url_is_fetched(server):
    with socket.socket() as bait:
        bait.bind(('127.0.0.1', 0))
        bait.listen()
        bait.settimeout(.5)
        for url in (
            f'http://127.0.0.1:{bait.getsockname()[1]}/a.png',
            f'//127.0.0.1:{bait.getsockname()[1]}/a.png',
        ):
            status, _, _ = server.ask('POST', '/caption', json.dumps(dict(image=url)), **AS_JSON)
            assert status == 422
        with pytest.raises(TimeoutError):
            bait.accept()

def test_an_upload_without_an_end_is_cut(server):
    connection = server.connect()
    def endless():
        while True:
            yield b'x'*2**20
    try:
        connection.request(
            'POST', '/caption', endless(), {'Content-Type': 'application/json'}, encode_chunked=True
        )
        raise AssertionError('it took everything')
    except OSError:
        pass # the server has closed the door
    finally:
        connection.close()
    assert server.ask('GET', '/health')[0] == 200

def test_who_asks_before_sending_is_told_at_once(server):
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
        s.sendall(
            b'POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:'
            b' 50000000\r\nExpect: 100-continue\r\n\r\n'
        )
        assert s.recv(100).startswith(b'HTTP/1.1 413')

def test_who_lacks_the_key_may_send_to_the_end(narrow):
    "Many programs listen only after their last byte: an answer before it, and they see a broken pipe."
    with socket.create_connection(('127.0.0.1', narrow.port), timeout=20) as s:
        s.sendall(
            b'POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\nConnection: close\r\n\r\n'
        )
        s.settimeout(.5)
        with pytest.raises(TimeoutError):
            s.recv(1)
        s.settimeout(20)
        s.sendall(b'{"a": 1}')
        assert s.recv(100).startswith(b'HTTP/1.1 401')

def test_key(narrow, pages, same):
    for sent in (
        {},
        dict(Authorization='Bearer wrong'),
        dict(Authorization=f'Basic {KEY}'),
        dict(Authorization='Bearer'),
        dict(X_API_Key=KEY),
        dict(Authorization='Bearer \xe9'),
    ):
        status, answer, headers = narrow.ask('POST', '/caption', b'{}', **AS_JSON, **sent)
        assert (
            status == 401
            and headers['www-authenticate'] == 'Bearer'
            and 'Authorization: Bearer' in json.loads(answer)['detail']
        )
    status, answer = narrow.caption(pages[0], Authorization=f'Bearer {KEY}')
    assert status == 200 and same(0, answer['caption'])
    for path in ('/', '/health', '/openapi.json', '/docs'):
        assert narrow.ask('GET', path)[0] == 200
    assert narrow.ask('GET', '/redoc')[0] == 404

def test_too_many_are_told_to_come_back(narrow, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    with narrow.busy(pages[0], **key) as others:
        status, answer, headers = narrow.ask('POST', '/caption', b'{}', **AS_JSON, **key)
        assert status == 429 and 'try again' in json.loads(answer)['detail'] and headers['retry-after'] == '1'
        status, answer, _ = narrow.ask('GET', '/health')
        assert (status, json.loads(answer)) == (503, dict(status='overloaded'))
    assert [status for status,_ in others] == [200, 200]
    assert narrow.caption(pages[0], **key)[0] == 200 # the places are free again
    assert narrow.ask('GET', '/health')[0] == 200

def test_time_is_limited(narrow, pages):
    key, start = dict(Authorization=f'Bearer {KEY}'), time.monotonic()
    with narrow.half_sent(pages[0], **key) as request:
        status, answer = request(send=False)
    assert status == 408 and '2 seconds' in answer['detail'] and 1.5 < time.monotonic()-start < 10
    assert narrow.caption(pages[0], **key)[0] == 200

def test_time_is_limited_while_nobody_works(narrow, pages):
    "A worker that hangs: the time ends for those who wait, with and without words, and then it goes on."
    key, worker = dict(Authorization=f'Bearer {KEY}'), narrow.workers()[0]
    worker.suspend()
    try:
        for path in ('/caption', '/caption?stream=true'):
            status, answer = narrow.caption(pages[0], path, **key)
            assert status == 504 and 'try again' in answer['detail']
        assert json.loads(narrow.ask('GET', '/health')[1]) == dict(status='overloaded')
    finally:
        worker.resume()
    while narrow.ask('GET', '/health')[0] != 200:
        time.sleep(.05) # their places are kept until the worker has let them go
    assert narrow.caption(pages[0], **key)[0] == 200

def test_clients_that_leave_free_their_place(narrow, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    for path in ('/caption', '/caption?stream=true')*4:
        with socket.create_connection(('127.0.0.1', narrow.port)) as s:
            body = form(pages[0])
            s.sendall(
                f'POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Type:'
                f' multipart/form-data; boundary=xyz\r\nContent-Length: {len(body)}\r\n\r\n'.encode()
                + body
            )
        time.sleep(.3)
    time.sleep(.5)
    with ThreadPoolExecutor(2) as pool:
        assert {status for status,_ in pool.map(lambda p: narrow.caption(p, **key), pages[:2])} == {200}

def slow_connections(server, number, head, part, seconds):
    """Open connections that send a little each; gives a list of them, and a function that sends a bit more
    on each and tells what was answered."""
    made = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(number)]
    for s in made:
        s.sendall(head)
    def go_on():
        found = []
        for s in made:
            try:
                s.sendall(part)
                s.setblocking(False)
                found.append(s.recv(4000)[:12] or b'closed')
            except BlockingIOError:
                found.append(None) # it is still open
            except OSError:
                found.append(b'closed') # while we were sending
            s.setblocking(True)
        return found
    return made, go_on

SLOW = {
    'heads': (b'POST /caption HTTP/1.1\r\nHost: localhost\r\n', b'X-A: b\r\n'),
    'bodies': (
        (
            b'POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:'
            b' 1000\r\n\r\n'
        ),
        b'x',
    ),
    'chunks': (
        (
            b'POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type:'
            b' application/json\r\nTransfer-Encoding: chunked\r\n\r\n'
        ),
        b'1\r\nx\r\n',
    ),
}

@pytest.mark.parametrize('loop', ['asyncio', 'auto'])
def test_connections_that_are_reset_leave_nothing(loop):
    "As of a port scan, or of a load balancer that only looks whether the port is open."
    async def app(scope, receive, send):
        pass
    made = connection_class(Limits())
    config = uvicorn.Config(app, http=made, ws='none', lifespan='off', log_level='critical', loop=loop)
    server = uvicorn.Server(config)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        thread = threading.Thread(target=server.run, args=([s],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(.01)
        for _ in range(100):
            with socket.create_connection(s.getsockname()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        end = time.monotonic()+5
        while server.server_state.connections and time.monotonic() < end:
            time.sleep(.05)
        assert not server.server_state.connections
        server.should_exit = True
        thread.join(20)

@pytest.mark.parametrize('kind', SLOW)
def test_slow_clients_are_in_nobodys_way(server, pages, kind):
    "More connections of a byte now and then than there are places; they take none."
    made, go_on = slow_connections(server, 100, *SLOW[kind], 1)
    try:
        for _ in range(2):
            assert go_on() == [None]*100
            assert server.caption(pages[0])[0] == 200 and server.ask('GET', '/health')[0] == 200
    finally:
        for s in made:
            s.close()

@pytest.mark.parametrize('kind', SLOW)
def test_slow_clients_are_told_to_go(narrow, kind):
    "A head, and a body, have their time, however often a byte comes."
    head, part = SLOW[kind]
    made, go_on = slow_connections(
        narrow, 3, head.replace(b'localhost', f'localhost\r\nAuthorization: Bearer {KEY}'.encode()), part, 1
    )
    end, told = time.monotonic()+10, [None]
    while None in told and time.monotonic() < end:
        time.sleep(.2)
        told = [new or old for new,old in zip(go_on(), told*3, strict=False)]
    for s in made:
        s.close()
    assert b'HTTP/1.1 408' in told and set(told) <= {b'HTTP/1.1 408', b'closed'}, told

def test_a_silent_connection_is_closed(narrow):
    with socket.create_connection(('127.0.0.1', narrow.port), timeout=10) as s:
        assert s.recv(100) == b''

def test_an_endless_head_is_cut(server):
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
        s.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ')
        try:
            for _ in range(1000):
                s.sendall(b'a'*10_000)
            raise AssertionError('it took everything')
        except OSError:
            pass # the server has closed the door

def test_the_oldest_of_very_many_goes(server, pages):
    """A client that begins more requests than it may have loses the first ones; whoever comes later gets
    through."""
    head, part = SLOW['bodies']
    made, go_on = slow_connections(server, 150, head, part, 1)
    try:
        end, told = time.monotonic()+20, go_on()
        while told.count(None) > 128 and time.monotonic() < end: # until all have arrived
            time.sleep(.1)
            told = [new or old for new,old in zip(go_on(), told, strict=True)]
        assert 120 <= told.count(None) <= 128 and told[-100:] == [None] * 100, told
        # the answer of a closed connection is lost where its client was still sending
        assert any(told[:10]) and set(told) <= {None, b'HTTP/1.1 408', b'closed'}, told
        assert server.caption(pages[0])[0] == 200
    finally:
        for s in made:
            s.close()

def test_one_client_leaves_places_for_others(server, pages):
    "Half of the 64 places is the most that a client gets; another one is served meanwhile."
    with server.busy(pages[0], 32) as others:
        status, answer = server.caption(pages[0])
        assert status == 429 and 'of yours' in answer['detail'] and server.ask('GET', '/health')[0] == 200
        other = http.client.HTTPConnection(
            '127.0.0.1', server.port, timeout=60, source_address=('127.0.0.2', 0)
        )
        other.request('POST', '/caption', form(pages[1]), {'Content-Type': AS_FORM['Content_Type']})
    assert other.getresponse().status == 200 and [status for status,_ in others] == [200]*32

def test_clients_by_address():
    assert client_of('192.0.2.7') == client_of('::ffff:192.0.2.7') != client_of('192.0.2.8')
    assert client_of('2001:db8::1') == client_of('2001:db8::2') != client_of('2001:db8:0:1::1')

# --- Images made to harm

def test_a_slow_image_is_refused_and_in_nobodys_way(narrow, pages):
    """A JPEG that goes over its pixels 6,000 times is given up; the image of somebody else is captioned
    meanwhile."""
    key, found = dict(Authorization=f'Bearer {KEY}'), []
    with_bomb = threading.Thread(
        target=lambda: found.append(
            narrow.ask('POST', '/caption', form(scan_bomb(scans=6000)), **AS_FORM, **key)
        )
    )
    with_bomb.start()
    time.sleep(.2)
    assert narrow.caption(pages[0], **key)[0] == 200
    with_bomb.join()
    status, answer, _ = found[0]
    assert status == 415 and 'longer than 1 seconds' in json.loads(answer)['detail']

def test_a_file_of_two_formats_is_one_image(server, model):
    """What is measured is what is decoded: the file is a small TIFF, and as an FLI, which is not taken, it
    would be 13,000 pixels wide."""
    data = two_in_one()
    assert server.caption(data) == (200, dict(caption=model.caption(open_image(data))))

def test_no_image_is_opened_where_the_model_is(server, pages):
    "The processes that open images are children of the one for HTTP, and know nothing of PyTorch."
    assert server.caption(pages[0])[0] == 200
    family = psutil.Process(server.process.pid).children(recursive=True)
    openers = [p for p in family if 'decode_requests' in ' '.join(p.cmdline())]
    assert len(openers) >= 2 and not any('torch' in m.path for p in openers for m in p.memory_maps())

@pytest.mark.parametrize('path', ['/caption?explain=true&stream=true', '/caption'])
def test_clients_that_leave_leave_nothing(server, pages, path):
    """More requests than there are places, each left when its answer begins: the next one is served, and the
    places are free."""
    body = form(pages[0])
    for _ in range(70):
        with socket.create_connection(('127.0.0.1', server.port)) as s:
            s.sendall(
                f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type:'
                f' {AS_FORM["Content_Type"]}\r\nContent-Length: {len(body)}\r\n\r\n'.encode()
                + body
            )
            if 'stream' in path:
                assert s.recv(12) in (b'HTTP/1.1 200', b'HTTP/1.1 429')
    end = time.monotonic()+20
    while server.ask('GET', '/health')[0] != 200:
        assert time.monotonic() < end
        time.sleep(.05)
    with ThreadPoolExecutor(30) as pool:
        assert {status for status,_ in pool.map(server.caption, pages[:30])} == {200}

def processes(server):
    "The memory of all processes of a server, in MB."
    return memory(server.process.pid)

def fuzz(server, same, pages, model, number, capsys):
    """Send damaged images among whole ones; each is answered as `open_image` answers, and no whole one
    suffers."""
    with ThreadPoolExecutor(8) as pool:
        before = list(pool.map(server.caption, pages[:8]))
    assert [status for status,_ in before] == [200]*8
    counts, first = Counter(), processes(server)
    def bad(file):
        status, answer = server.caption(file.data)
        try:
            open_image(file.data)
        except ValueError:
            assert status == 415 and answer['detail'], (file.name, status, answer)
        else:
            assert status == 200 or file.kind == 'pixels', (file.name, status, answer)
        counts[file.kind, status] += 1
        assert status in (200, 413, 415), (file.name, status, answer)
    def good(i):
        status, answer = server.caption(pages[i%8])
        counts['whole', status] += 1
        assert status == 200 and (answer == before[i%8][1] or same(i%8, answer['caption'])), (status, answer)
    files = list(damaged(number))
    with ThreadPoolExecutor(16) as pool, warnings.catch_warnings(action='ignore'):
        jobs = [
            pool.submit(*job)
            for i, file in enumerate(files)
            for job in [(bad, file)] + ([(good, i // 4)] if i % 4 == 0 else [])
        ]
        for job in jobs:
            job.result()
    last = processes(server)
    told = [f'{kind} {status}: {n}' for (kind, status), n in sorted(counts.items())]
    with capsys.disabled():
        print('', *told, f'memory of all processes {first:.0f} MB, then {last:.0f} MB', sep='\n  ')
    assert (
        counts['whole', 200] == -(-number // 4)
        and sum(n for (kind, _), n in counts.items() if kind != 'whole') == number
    )
    assert counts['pixels', 415] and [server.caption(p) for p in pages[:8]] and last < first + 300

def test_damaged_images_are_nobody_elses_trouble(server, same, pages, model, capsys):
    fuzz(server, same, pages, model, 200, capsys)

@pytest.mark.slow
def test_three_thousand_damaged_images(server, same, pages, model, capsys):
    fuzz(server, same, pages, model, 3000, capsys)

class Peak:
    "The most memory that a server and all its processes have had, in MB, while this is open."
    def __init__(self, server):
        self.server, self.over = server, threading.Event()
    def __enter__(self):
        self.first = self.most = processes(self.server)
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(.1):
            try:
                self.most = max(self.most, processes(self.server))
            except psutil.Error:
                pass # one of them has just ended

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()

def leave_explanations(server, image, number):
    "Ask for explanations of an image, and be gone when they begin."
    body = form(image)
    for _ in range(number):
        with socket.create_connection(('127.0.0.1', server.port), timeout=60) as s:
            s.sendall(
                b'POST /caption?stream=true&explain=true HTTP/1.1\r\nHost: localhost\r\nContent-Type:'
                b' multipart/form-data; boundary=xyz\r\n'
                + f'Content-Length: {len(body)}\r\n\r\n'.encode()
                + body
            )
            s.recv(100)

@pytest.mark.slow
def test_memory_under_attack(start, made, pages, capsys):
    """Many large images in small files at once, explanations that are left, slow images: memory stays within
    bounds, and others are served."""
    server = Server(start, made).wait()
    large, bomb = one_colour(5000), scan_bomb()
    def many(data, n, path='/caption'):
        with ThreadPoolExecutor(n) as pool:
            return Counter(status for status,_ in pool.map(lambda _: server.caption(data, path), range(n)))
    said = []
    try:
        for name, attack, most in (
            ('32 of 25 million pixels', lambda: many(large, 32), 1000),
            ('25 explanations left', lambda: leave_explanations(server, large, 25), 1000),
            ('6 slow images', lambda: many(bomb, 6), 1000),
        ):
            with Peak(server) as peak:
                found = attack()
            said.append(
                f'{name}: {dict(found or {})}; memory {peak.first:.0f} MB before, {peak.most:.0f} MB at most'
            )
            end = time.monotonic()+60
            while server.ask('GET', '/health')[0] != 200:
                assert time.monotonic() < end
                time.sleep(.1)
            assert server.caption(pages[0])[0] == 200 and peak.most < peak.first+most, said
    finally:
        server.process.terminate()
        server.process.communicate(timeout=60)
        with capsys.disabled():
            print('', *said, sep='\n  ')

# --- Nonsense

PICTURE = as_png(Storybook('test')[0]['image'])

@st.composite
def spoiled(draw):
    "An image of which some bytes are others, or missing."
    data = bytearray(PICTURE[:draw(st.integers(0, len(PICTURE)))] if draw(st.booleans()) else PICTURE)
    for at,value in draw(st.lists(st.tuples(st.integers(0, len(PICTURE)), st.integers(0, 255)), max_size=8)):
        if at < len(data):
            data[at] = value
    return bytes(data)

IN_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda x: st.lists(x, max_size=3)
    | st.dictionaries(st.sampled_from(['image', 'stream', 'file', '']), x, max_size=3),
    max_leaves=6,
)
BODIES = st.one_of(
    st.binary(max_size=400),
    IN_JSON.map(lambda x: json.dumps(x).encode()),
    st.text(max_size=60).map(lambda x: json.dumps(dict(image=x)).encode()),
    st.binary(max_size=300).map(lambda x: json.dumps(dict(image=base64.b64encode(x).decode())).encode()),
    spoiled().map(
        lambda x: json.dumps(dict(image='data:image/png;base64,' + base64.b64encode(x).decode())).encode()
    ),
    spoiled().map(form),
    st.tuples(spoiled(), st.text(max_size=10), st.text(max_size=10)).map(
        lambda x: form(*x, boundary='xyz') if x[1].isprintable() and x[2].isprintable() else form(x[0])
    ),
    st.tuples(st.binary(max_size=60), st.integers(0, 200)).map(
        lambda x: form(PICTURE)[: x[1]] + x[0] + form(PICTURE)[x[1] :]
    ),
    spoiled(),
)
TYPES = st.sampled_from(
    [
        'application/json',
        'multipart/form-data; boundary=xyz',
        'multipart/form-data',
        'multipart/form-data; boundary="',
        'multipart/form-data; boundary=xyz; charset=utf-16',
        'multipart/form-data; boundary=xyz; charset=\xff',
        'application/json; charset=utf-16',
        'image/png',
        '',
        ';;;',
    ]
) | st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)
PATHS = st.sampled_from(
    [
        '/caption',
        '/caption?explain=1',
        '/caption?stream=true',
        '/caption?stream=',
        '/caption?stream=1&stream=0',
        '/caption?%ff=%00',
        '/caption/',
        '/health',
        '/%2e%2e/',
    ]
)
METHODS = st.sampled_from(['POST']*6 + ['PUT', 'GET', 'DELETE', 'HEAD', 'OPTIONS'])
FINE = {200, 307, 400, 404, 405, 413, 415, 422}

def nonsense(server, examples):
    "Send malformed requests; none may be answered as a fault of the server, and none may cost a worker."
    workers, connection, count = [p.pid for p in server.workers()], [server.connect()], [0]
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(METHODS, PATHS, TYPES, BODIES)
    def send(method, path, kind, body):
        try:
            connection[0].request(method, path, body, {'Content-Type': kind.encode('latin-1')})
            answer = connection[0].getresponse()
            text = answer.read()
        # it may hang up after bytes that are no HTTP
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            connection[0].close()
            connection[0] = server.connect()
            return
        count[0] += 1
        assert answer.status in FINE, (answer.status, method, path, kind, body, text)
        if (
            path.startswith('/caption')
            and method == 'POST'
            and answer.status not in (200, 307)
            and answer.headers['content-type'] == 'application/json'
        ):
            assert json.loads(text)['detail']
    send()
    assert count[0] > .95*examples, 'most were not answered'
    assert server.ask('GET', '/health')[0] == 200 and [p.pid for p in server.workers()] == workers

def test_nonsense(server, pages, same):
    nonsense(server, 300)
    status, answer = server.caption(pages[1])
    assert status == 200 and same(1, answer['caption'])

def test_what_is_no_http(server):
    dice = random.Random(0)
    for i in range(50):
        with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
            s.sendall(
                (
                    b'',
                    b'POST /caption HTTP/1.1\r\nContent-Length: -5\r\n\r\n',
                    b'POST /caption HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n',
                )[i % 3]
                + dice.randbytes(200)
                + b'\r\n\r\n'
            )
            s.shutdown(socket.SHUT_WR)
            assert not re.match(rb'HTTP/1.1 5', s.recv(200))
    assert server.ask('GET', '/health')[0] == 200

@pytest.mark.slow
def test_ten_thousand_times_nonsense(server):
    nonsense(server, 10_000)

# --- Load

@pytest.mark.slow
def test_load(start, made, server, pages, same):
    "32 clients for a minute: no error, none lost, all captions as offline, memory flat, and batches pay."
    single = Server(start, made, '--batch_size', 1).wait()
    try:
        for s in (server, single):
            send_load(s.address, pages, seconds=5)
        before = memory(server.process.pid)
        load = send_load(server.address, pages, 32, 60)
        after = memory(server.process.pid)
        alone = send_load(single.address, pages, 32, 20)
    finally:
        single.process.terminate()
        single.process.wait(60)
    together, apart = load_report(load), load_report(alone)
    print(
        f'\nbatched {together}\nsingly {apart}\n{together["rate"]/apart["rate"]:.1f} times; memory'
        f' {before:.0f} MB, then {after:.0f} MB'
    )
    assert together['refused'] == apart['refused'] == 0
    assert {
        answer
        for answer in {(i, a['caption']) for i, _, a, _ in load['answers'] + alone['answers']}
        if not same(*answer)
    } == set()
    assert together['rate'] >= 3*apart['rate'] and after < before + 50

# --- OpenAPI and the page

def test_openapi(server, narrow):
    status, found, _ = server.ask('GET', '/openapi.json')
    found = json.loads(found)
    assert status == 200 and set(found['paths']) == {'/caption', '/health'}
    post = found['paths']['/caption']['post']
    statuses = set('200 400 403 408 413 415 422 429 500 503 504'.split())
    assert set(post['requestBody']['content']) == {'multipart/form-data', 'application/json'}
    assert set(post['responses']) == statuses and all(
        post['responses'][s]['content']['application/json']['schema']['properties']
        == dict(detail=dict(type='string'))
        for s in statuses - {'200'}
    )
    assert [p['name'] for p in post['parameters']] == ['stream', 'explain']
    assert set(post['responses']['200']['content']) == {'application/json', 'text/event-stream'}
    assert set(
        post['responses']['200']['content']['application/json']['schema']['properties']['words']['items'][
            'properties'
        ]
    ) == {'text', 'probability', 'alternatives', 'patches'}
    events = post['responses']['200']['content']['text/event-stream']
    assert (
        events['schema']['type'] == 'string'
        and [json.loads(e.removeprefix('data: ')) for e in events['example'].split('\n\n') if e][-1][
            'caption'
        ]
    )
    assert 'security' not in post and 'securitySchemes' not in found.get('components', {}), 'there is no key'
    assert set(found['paths']['/health']['get']['responses']) == {'200', '503'}
    with_key = json.loads(narrow.ask('GET', '/openapi.json')[1])
    assert with_key['components']['securitySchemes']['HTTPBearer']['scheme'] == 'bearer'
    assert (
        with_key['paths']['/caption']['post']['security'] == [{'HTTPBearer': []}]
        and '401' in with_key['paths']['/caption']['post']['responses']
    )

def test_docs_load_nothing(server):
    status, page, headers = server.ask('GET', '/docs')
    assert status == 200 and "default-src 'none'" in headers['content-security-policy']
    assert not re.search(rb'https?:|<script|<link|<style|<img|\ssrc=', page)
    assert b'POST /caption' in page and b'429' in page and b'text/event-stream' in page

# --- Who may ask

ELSEWHERE = {  # headers of a request that is not taken
    'another host': dict(Host='evil.example'),
    'another host that begins like ours': dict(Host='localhost.evil.example'),
    'a name before an at sign': dict(Host='localhost@evil.example'),
    'no host': dict(Host=''),
    'an address that is not ours': dict(Host='192.0.2.1'),
    'another origin': dict(Origin='http://evil.example'),
    'no origin that can be named': dict(Origin='null'),
    'another port': dict(Origin='http://localhost:1'),
    'a request of another site': dict(Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='no-cors'),
    'a frame of another site': dict(
        Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate', Sec_Fetch_Dest='iframe'
    ),
}

@pytest.mark.parametrize('case', ELSEWHERE)
def test_requests_from_elsewhere_are_refused(server, pages, case):
    for method,path in (('POST', '/caption'), ('GET', '/'), ('GET', '/health'), ('OPTIONS', '/caption')):
        status, answer, headers = server.ask(method, path, form(pages[0]), **AS_FORM, **ELSEWHERE[case])
        assert status == 403 and len(json.loads(answer)['detail'].splitlines()) == 1
        assert not [h for h in headers if h.lower().startswith('access-control')]

@pytest.mark.parametrize('name, host', [
    ('captions.example.com', 'captions.example.com'),
    ('Captions.example.com:8443', 'captions.example.com'),
    ('https://captions.example.com/', 'captions.example.com'),
    ('https://captions.example.com:8443', 'captions.example.com'),
    ('2001:db8::1', '[2001:db8::1]'),
    ('http://[2001:db8::1]:8000/', '[2001:db8::1]'),
])
def test_a_name_of_the_server_may_have_scheme_and_port(name, host):
    names = (_host_of(name),)
    asked = Headers({'host': f'{host}:8443', 'origin': f'https://{host}:8443'})
    assert foreign(asked, host_check('127.0.0.1', None, names), names) is None

def test_requests_from_here_are_taken(server, pages):
    here = f'localhost:{server.port}'
    for sent in (
        dict(Host=here),
        dict(Host=f'[::1]:{server.port}'),
        dict(Host=here, Origin=f'http://{here}', Sec_Fetch_Site='same-origin'),
        dict(Sec_Fetch_Site='none'),
    ):
        assert server.caption(pages[0], **sent)[0] == 200
    # a link on another page
    followed = dict(Sec_Fetch_Site='cross-site', Sec_Fetch_Mode='navigate', Sec_Fetch_Dest='document')
    assert server.ask('GET', '/', **followed)[0] == 200

def test_all_answers_have_the_headers_of_safety(server):
    for method, path, more in (
        ('GET', '/', {}),
        ('GET', '/health', {}),
        ('GET', '/nothing', {}),
        ('POST', '/caption', {}),
        ('GET', '/', dict(Host='evil.example')),
    ):
        headers = server.ask(method, path, **more)[2]
        assert (
            headers['x-content-type-options'] == 'nosniff'
            and headers['cross-origin-resource-policy'] == 'same-origin'
        )
        assert (
            "frame-ancestors 'none'" in headers['content-security-policy']
            and "default-src 'none'" in headers['content-security-policy']
        )

EVIL = """async ([address, data, mode]) => {
  const form = new FormData()
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0))
  form.append('file', new Blob([bytes], {type: 'image/png'}), 'a.png')
  try {
    const answer = await fetch(address + '/caption', {method: 'POST', body: form, mode})
    return [answer.type, answer.status, await answer.text()]
  }
  catch (error) { return String(error) }
}"""

def test_another_web_page_gets_nothing(server, pages, browser_with):
    """A page of another site in a real browser: posts, reads by DNS rebinding, and puts the page of the
    server in a frame."""
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Empty) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        browser, png = (
            browser_with('--host-resolver-rules=MAP evil.example 127.0.0.1'),
            base64.b64encode(pages[0]).decode(),
        )
        tab, answered = browser.new_page(), []
        tab.on('response', lambda r: answered.append((r.url, r.status)))
        tab.goto(f'http://evil.example:{other.server_port}/')
        for mode in ('no-cors', 'cors'):
            # not even an opaque answer
            assert 'TypeError' in str(tab.evaluate(EVIL, [server.address, png, mode]))
        tab.evaluate(
            "() => new Promise(done => { const f = document.createElement('iframe'); f.src ="
            f" '{server.address}/'; f.onload = done; document.body.append(f) }})"
        )
        assert not any(server.address in frame.url for frame in tab.frames)
        assert not [a for a in answered if a[0].startswith(server.address) and a[1] != 403]
        rebound = browser.new_page() # the name of the other page is now that of this machine
        assert rebound.goto(f'http://evil.example:{server.port}/').status == 403
        assert '"caption":' not in str(rebound.evaluate(EVIL, ['', png, 'same-origin']))
        other.shutdown()

def test_page_is_whole(server):
    status, page, headers = server.ask('GET', '/')
    assert status == 200 and page.decode() == PAGE
    assert not re.search(r'https?:|//[a-z]|<link|@import|\ssrc="[^"]', PAGE)

WATCH = (
    "() => { window.seen = []; new MutationObserver(() =>"
    " seen.push(document.getElementById('caption').textContent)).observe(document.getElementById('caption'),"
    " {childList: true}) }"
)
DROP = """data => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer()
  transfer.items.add(new File([bytes], 'page.png', {type: 'image/png'}))
  const drop = document.getElementById('drop')
  for (const kind of ['dragover', 'drop']) {
    drop.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}))
  }
}"""

@contextmanager
def opened(browser, server, **options):
    "The page in a tab of its own; it may ask nobody but this server, and say nothing in the console."
    with browser.new_context(**options) as context:
        tab, said, asked = context.new_page(), [], []
        tab.on('console', lambda m: said.append(m.text))
        tab.on('pageerror', lambda e: said.append(str(e)))
        tab.on('request', lambda r: asked.append(r.url))
        # Chromium passes file choosers on from now, or one that a key opens at once would be missed.
        tab.on('filechooser', lambda chooser: None)
        tab.goto(server.address)
        tab.evaluate(WATCH)
        yield tab
        assert [s for s in said if '401' not in s and '415' not in s] == []
        assert (
            all(url.startswith((server.address, f'blob:{server.address}')) for url in asked)
            and len(asked) > 1
        )

def finished(tab):
    "What the page says, when that is whole."
    tab.locator('#caption:not([aria-busy]):not(:empty)').wait_for(timeout=20_000)
    return tab.locator('#caption').text_content()

def test_drop_a_picture(browser, server, pages, same):
    with opened(browser, server, viewport=dict(width=800, height=600)) as tab:
        for i in (0, 1): # and another one after it
            tab.evaluate('() => { seen.length = 0 }')
            tab.evaluate(DROP, base64.b64encode(pages[i]).decode())
            tab.wait_for_timeout(50)
            caption = finished(tab)
            seen = [text for text in tab.evaluate('() => seen') if text != '…']
            assert (
                same(i, caption) and len(set(seen)) >= 4 and all(caption.startswith(text) for text in seen)
            ), seen
            assert tab.get_by_alt_text(caption).is_visible()
        assert tab.locator('#caption').get_attribute('aria-live') == 'polite'

def test_by_keyboard_only(browser, server, made, same):
    with opened(browser, server) as tab:
        tab.keyboard.press('Tab')
        assert tab.evaluate('() => document.activeElement.id') == 'file'
        assert (
            tab.evaluate("() => getComputedStyle(document.getElementById('drop')).outlineStyle") == 'solid'
        ), 'the focus cannot be seen'
        with tab.expect_file_chooser() as chooser:
            tab.keyboard.press('Enter')
        chooser.value.set_files(made/'pages'/'003.png')
        assert same(3, finished(tab))

def test_on_a_phone(browser, server, made, same):
    with opened(browser, server, viewport=dict(width=360, height=640), is_mobile=True, has_touch=True) as tab:
        with tab.expect_file_chooser() as chooser:
            tab.locator('#drop').tap()
        chooser.value.set_files(made/'pages'/'004.png')
        assert same(4, finished(tab))
        assert tab.evaluate('() => document.documentElement.scrollWidth <= innerWidth && innerWidth == 360')
        box = tab.locator('#caption').bounding_box()
        assert box['y'] + box['height'] <= 640, 'the caption is below the screen'
        assert tab.locator('#drop').bounding_box()['height'] >= 44
        photograph(tab, 'phone')

def photograph(tab, name):
    if folder := os.environ.get('CAPNB_SCREENSHOTS'):
        tab.screenshot(path=f'{folder}/{name}.png')

def veil(tab): # the opacity of each part of it; None where there is none
    return tab.evaluate("""() => {
      const heat = document.getElementById('heat'), canvas = new OffscreenCanvas(heat.width, heat.height)
      const copy = canvas.getContext('2d', {willReadFrequently: true})
      copy.drawImage(heat, 0, 0)
      const values = Array.from(copy.getImageData(0, 0, heat.width, heat.height).data)
      return heat.hidden ? null : values.filter((_, i) => i % 4 == 3)
    }""")

def check_the_keyboard(tab, named):
    "The keys reach the words, each shows its veil, and the focus can be seen."
    tab.mouse.move(2, 2)
    assert veil(tab) is None
    tab.locator('#file').focus()
    for i in range(2):
        tab.keyboard.press('Tab')
        assert tab.evaluate('() => document.activeElement.textContent') == named[i]['text']
        assert veil(tab) is not None
    outline = tab.evaluate('() => getComputedStyle(document.activeElement).outlineStyle')
    assert outline == 'solid', 'the focus cannot be seen'

def test_each_word_shows_its_patches(browser, server, pages, model):
    with opened(browser, server, viewport=dict(width=800, height=640)) as tab:
        tab.evaluate(DROP, base64.b64encode(pages[7]).decode())
        caption = finished(tab)
        words = tab.locator('#words button')
        words.first.wait_for()
        said = why(model, open_image(pages[7]), caption)['words']
        named = [w for w in said if w['text'].isalnum()]
        assert (
            words.all_text_contents() == [w['text'] for w in named]
            and tab.locator('#words').text_content() == caption
        )
        assert [
            tab.evaluate('b => +b.style.getPropertyValue("--sure")', b) for b in words.element_handles()
        ] == pytest.approx([w['probability'] for w in named], abs=0.002)
        assert veil(tab) is None
        best = max(range(len(named)), key=lambda i: max(map(max, named[i]['patches'])))
        words.nth(best).hover()
        flat = [v for row in named[best]['patches'] for v in row]
        lifted = veil(tab)
        assert (
            len(lifted) == 64
            and lifted.index(min(lifted)) == flat.index(max(flat))
            and min(lifted) < 5
            and max(lifted) > 200
        )
        heat, picture = (tab.locator(i).bounding_box() for i in ('#heat', '#picture'))
        assert heat == picture, 'the veil does not lie on the image'
        assert (
            named[best]['text'] in tab.locator('#why').text_content()
            and words.nth(best).get_attribute('aria-pressed') == 'true'
        )
        photograph(tab, 'why')
        check_the_keyboard(tab, named)
        tab.evaluate(DROP, base64.b64encode(pages[8]).decode())
        tab.wait_for_timeout(20)
        assert (
            not tab.locator('#words').is_visible() and veil(tab) is None
        ), 'the words of the image before are still there'
        words.first.wait_for()

def test_words_on_a_phone(browser, server, made):
    with opened(browser, server, viewport=dict(width=360, height=640), is_mobile=True, has_touch=True) as tab:
        tab.locator('#file').set_input_files(made/'pages'/'007.png')
        word = tab.locator('#words button').nth(2)
        word.tap()
        assert (
            veil(tab) is not None
            and min(word.bounding_box()['height'], tab.locator('#drop').bounding_box()['height']) >= 44
        )
        assert tab.evaluate('() => document.documentElement.scrollWidth <= innerWidth')
        photograph(tab, 'why-phone')

def test_what_the_page_says_when_it_fails(browser, server, pages):
    with opened(browser, server) as tab:
        tab.evaluate(DROP, base64.b64encode(pages[0][:200]).decode())
        assert 'not a readable image' in finished(tab)
        assert tab.locator('#caption').get_attribute('class') == 'wrong'

def test_the_page_asks_for_the_key(browser, narrow, pages, same):
    with opened(browser, narrow) as tab:
        assert not tab.get_by_label('Key of this server').is_visible()
        tab.evaluate(DROP, base64.b64encode(pages[0]).decode())
        tab.get_by_label('Key of this server').wait_for()
        tab.locator('#caption.wrong').wait_for()
        tab.keyboard.type(KEY)
        tab.keyboard.press('Enter') # the field has the focus
        tab.locator('#caption:not(.wrong):not([aria-busy]):not(:empty)').wait_for()
        assert same(0, finished(tab))

# --- Begin and end

def replace_worker(server):
    "Kill a worker and wait until another one is ready."
    worker = server.workers()[0]
    worker.kill()
    end = time.monotonic() + 60
    while [p.pid for p in server.workers()] in ([], [worker.pid]):
        assert time.monotonic() < end
        time.sleep(.1)
    while server.ask('GET', '/health')[0] != 503:
        assert time.monotonic() < end
    while server.ask('GET', '/health')[0] != 200:
        assert time.monotonic() < end
        time.sleep(.1)

def test_a_dead_worker_is_replaced(server, pages, same):
    replace_worker(server)
    status, answer = server.caption(pages[6])
    assert status == 200 and same(6, answer['caption'])

def test_a_worker_that_is_killed_while_it_loads_is_noticed():
    dead = SimpleNamespace(is_alive=lambda: False)
    server = SimpleNamespace(workers_setup_status={'caption_0': 'starting'}, inference_workers=[dead])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(_server_class().verify_worker_status, server)
        try:
            with pytest.raises(RuntimeError, match='no worker'):
                waiting.result(timeout=5)
        finally:
            server.workers_setup_status['caption_0'] = 'error' # ends LitServe's own loop, too

@pytest.mark.parametrize('device, drivers, devices', [
    ('cpu', 1, ['cpu']), ('cuda', 0, [['cuda:0'], ['cuda:1']]), ('mps', 1, [['mps:0']])
])
def test_the_server_takes_the_device_of_pytorch(monkeypatch, device, drivers, devices):
    "Whatever nvidia-smi counts: it knows neither this PyTorch nor the GPUs of other makers."
    litserve = _litserve()
    monkeypatch.setattr('litserve.connector.check_cuda_with_nvidia_smi', lambda: drivers)
    monkeypatch.setattr('torch.cuda.is_available', lambda: device == 'cuda')
    monkeypatch.setattr('torch.backends.mps.is_available', lambda: device == 'mps')
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    server = _lit_server(litserve, Worker('none.pth', Queue(), None, None), 4, Limits())
    assert server.devices == devices

def test_a_worker_that_cannot_load_again_says_so(monkeypatch, capfd):
    monkeypatch.setattr('capnb.run.serving.worker.signal.signal', lambda *args: None)
    told = Queue()
    for started in (0, 1):
        worker = Worker('none.pth', told, SimpleNamespace(value=started), None)
        with pytest.raises(OSError):
            worker.setup('cpu')
    assert told.qsize() == 1 and capfd.readouterr().err.count('none.pth') == 1

def test_a_place_has_what_litserve_reads_of_it():
    "Its monitor of workers goes through the places where HTTP is a thread, and skips those without a worker."
    place = Place('a client', False, 0)
    assert place.worker_id is None and not place.event.is_set() and not place.response_queue

@pytest.mark.slow
def test_stop_before_it_is_ready(start, made):
    server = Server(start, made)
    end = time.monotonic() + 60
    while not server.workers():
        assert time.monotonic() < end and server.process.poll() is None
        time.sleep(.05)
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0 and not out, err
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'

THREADED = """
import functools, litserve
litserve.LitServer.run = functools.partialmethod(litserve.LitServer.run, api_server_worker_type='thread')
from capnb.run.serving.command import serve_command
if __name__ == '__main__': serve_command()
"""

@pytest.mark.slow
def test_stop_where_http_is_a_thread(environment, made, pages, tmp_path):
    "As on Windows, which has no fork: a caption, a worker that dies, and an end."
    (tmp_path/'serve.py').write_text(THREADED)
    def start(name, *args, cwd, env):
        return subprocess.Popen(
            [sys.executable, tmp_path / 'serve.py', *map(str, args)],
            cwd=cwd,
            env=environment(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    server = Server(start, made, '--timeout', 5).wait()
    family = psutil.Process(server.process.pid).children(recursive=True)
    try:
        assert server.caption(pages[0])[0] == 200
        server.workers()[0].suspend()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.caption, pages[0])
            time.sleep(.5) # it has arrived
            replace_worker(server)
        assert asked.result()[0] == 504 and server.caption(pages[0])[0] == 200
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        out, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0 and 'Traceback' not in out+err, out+err
        assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'
    finally:
        for p in (server.process, *(p for p in family if p.is_running())):
            p.kill()

@pytest.mark.slow
def test_broken_weights_are_one_line(run, made, tmp_path):
    weights = next((made/'saved_models').glob('*.pth'))
    broken = tmp_path/weights.name
    broken.write_bytes(b'no weights')
    metadata = next((made/'saved_models').glob('training_metadata_*.json'))
    (tmp_path/metadata.name).write_bytes(metadata.read_bytes())
    done = run('capnb_serve', broken, '--port', free_port(), cwd=tmp_path, fresh=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, '', 1), done.stderr
    assert done.stderr.startswith(f'serve: {broken} is not a readable checkpoint')

WRONG = {
    'no checkpoint': (['no.pth'], 'no.pth'),
    'no folder': (['--folder', 'nowhere'], 'nowhere'),
    'a checkpoint and a folder': (['weights.pth', '--folder', 'saved_models'], 'not both'),
    'no batch': (['--batch_size', '0'], 'batch_size is 0; allowed'),
    'no time': (['--timeout', 'nan'], 'timeout is nan; allowed'),
    'a host that it cannot take': (['--host', '203.0.113.7', '--without_key'], '203.0.113.7'),
    'others, and no key': (['--host', '0.0.0.0'], '--without_key'),
    'an empty key': (['--api_key', ''], 'the key is empty'),
    'a key that no header can carry': (['--api_key', 'schlüssel'], 'ASCII'),
    'a key of two lines': (['--api_key', 'a\nb'], 'ASCII'),
    'a key and none': (['--api_key', 'a', '--without_key'], 'one of the two'),
    'a port below 1024': (['--port', '80'], 'port'),
    'a host with a blank': (['--allowed_hosts', 'a.org, my server'], "'my server' is no host name"),
}

def one_line(capsys, *args):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped:
            serve_command(list(args))
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and len(said.splitlines()) == 1, said
    return said

@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_is_one_line(made, monkeypatch, capsys, case):
    monkeypatch.chdir(made)
    args, words = WRONG[case]
    assert words in one_line(capsys, *args)

def test_an_empty_key_in_the_environment_is_one_line(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    monkeypatch.setenv('CAPNB_API_KEY', '')
    assert 'CAPNB_API_KEY' in one_line(capsys)

def test_a_port_that_is_taken_is_one_line(made, server, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert f'port {server.port} of 127.0.0.1 cannot be listened at' in one_line(
        capsys, '--port', str(server.port)
    )

def test_without_litserve_is_one_line(made, monkeypatch, capsys):
    monkeypatch.chdir(made)
    monkeypatch.setitem(sys.modules, 'litserve', None)
    assert "pip install 'capnb[serve]'" in one_line(capsys)

def test_stop_finishes_what_is_at_work(server, pages, same):
    "The last test of this server."
    family = psutil.Process(server.process.pid).children(recursive=True)
    with server.half_sent(pages[5]) as request:
        server.process.send_signal(signal.SIGTERM)
        time.sleep(.3)
        status, answer = server.caption(pages[0])
        assert status == 503 and 'stopping' in answer['detail']
        assert server.ask('GET', '/health')[0] == 503
        status, answer = request()
        assert status == 200 and same(5, answer['caption'])
    out, err = server.process.communicate(timeout=30)
    # it has warned of what was no HTTP
    assert server.process.returncode == 0 and 'Traceback' not in out+err, out+err
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'

def test_ctrl_c(narrow):
    "The last test of that one."
    family = psutil.Process(narrow.process.pid).children(recursive=True)
    narrow.process.send_signal(signal.SIGINT)
    out, err = narrow.process.communicate(timeout=30)
    assert (narrow.process.returncode, out, err) == (130, '', 'stopped\n')
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'

# --- Several captions of an image

@pytest.mark.slow # it waits for a server of its own
def test_server_that_writes_several_captions(start, made, model, pages):
    several = Server(start, made, '--num_beams', 3, '--num_return_sequences', 2)
    try:
        several.wait()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(several.caption, pages[:8]))
        for page,(status, answer) in zip(pages[:8], found, strict=True):
            wanted = model.caption(open_image(page), num_beams=3, num_return_sequences=2)
            assert (status, answer['caption'], [c['caption'] for c in answer['captions']]) == (
                200,
                wanted[0],
                wanted,
            )
        status, answer = several.caption(pages[0], EXPLAIN)
        assert status == 200 and answer['words'] and {**answer, 'words': 0} == {**found[0][1], 'words': 0}
        shape = json.loads(several.ask('GET', '/openapi.json')[1])['paths']['/caption']['post']['responses'][
            '200'
        ]
        assert set(shape['content']['application/json']['schema']['properties']) == {
            'caption',
            'captions',
            'notice',
            'words',
        }
    finally:
        for p in (*psutil.Process(several.process.pid).children(recursive=True), several.process):
            p.kill()
