"The server from outside: captions as offline, each limit with its status, nonsense, stops, and the page in a browser."
import base64, http.client, io, json, os, random, re, signal, socket, sys, threading, time, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from queue import Queue
from types import SimpleNamespace
import psutil, pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from capnb.captioner import load_model_from_checkpoint
from capnb.commands import train
from capnb.images import open_image
from capnb.serving import PAGE, Worker, answer_batch, gather, load_report, memory, send_load, serve_command, why
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
    train(training_size_limit=960, num_epochs=1, evaluation_enabled=False, output_dir=str(here/'saved_models'), device='cpu')
    (here/'pages').mkdir()
    for i in range(PAGES): (here/'pages'/f'{i:03}.png').write_bytes(as_png(Storybook('test')[i]['image']))
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
def model(made): return load_model_from_checkpoint(next((made/'saved_models').glob('*.pth')), 'cpu')[0]

@pytest.fixture(scope='module')
def same(model, pages, wanted):
    "Whether a caption is the one that was written offline, or one whose first other token was as good up to rounding."
    def same(i, caption):
        if caption == wanted[i]: return True
        ids = [model.tokenizer(c)['input_ids'] + [model.tokenizer.eos_token_id] for c in (caption, wanted[i])]
        at = next(at for at,(a,b) in enumerate(zip(*ids)) if a != b)
        nats, _ = model.nats(model.encoder.encode([open_image(pages[i])]*2), [caption, wanted[i]])
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
            except OSError: pass
            time.sleep(.05)

    def connect(self): return http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)

    def ask(self, method, path, body=None, **headers):
        "Status, body and headers of an answer."
        connection = self.connect()
        try:
            connection.request(method, path, body, {k.replace('_', '-'): v for k,v in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally: connection.close()

    def caption(self, picture, path='/caption', **headers):
        "Status and parsed answer for a picture that is sent as JSON."
        body = json.dumps(dict(image=base64.b64encode(picture).decode()))
        status, answer, _ = self.ask('POST', path, body, Content_Type='application/json', **headers)
        return status, json.loads(answer)

    @contextmanager
    def half_sent(self, picture, **headers):
        "A request whose body has come by half; gives a function that sends the rest and reads the answer."
        body, connection = json.dumps(dict(image=base64.b64encode(picture).decode())).encode(), self.connect()
        connection.putrequest('POST', '/caption')
        for k,v in dict(Content_Type='application/json', Content_Length=str(len(body)), **headers).items(): connection.putheader(k.replace('_', '-'), v)
        connection.endheaders(body[:50])
        def finish(send=True):
            if send: connection.send(body[50:])
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        time.sleep(.2) # it has arrived
        yield finish
        connection.close()

    def workers(self):
        "The processes that hold a model."
        found = []
        for p in psutil.Process(self.process.pid).children():
            try: found += [p] if 'spawn_main' in ' '.join(p.cmdline()) else []
            except psutil.Error: pass # it has just ended
        return found

@pytest.fixture(scope='module')
def starting(start, made):
    "The two servers of these tests, which load their models while other things are made ready."
    found = dict(wide=Server(start, made), narrow=Server(start, made, '--max_waiting', 2, '--timeout', 2, '--max_upload', .1, CAPNB_API_KEY=KEY))
    try: yield found
    finally:
        for server in found.values():
            family = psutil.Process(server.process.pid).children(recursive=True) if server.process.poll() is None else []
            for p in (server.process, *family): p.kill()

@pytest.fixture(scope='module')
def servers(starting, wanted): return {name: server.wait() for name,server in starting.items()}

@pytest.fixture(scope='module')
def server(servers): return servers['wide']

@pytest.fixture(scope='module')
def narrow(servers): return servers['narrow']

# --- Captions

def test_batched_captions_are_those_of_the_command_line(server, pages, same):
    with ThreadPoolExecutor(16) as pool: found = list(pool.map(server.caption, pages))
    assert [status for status,_ in found] == [200]*PAGES
    assert all(same(i, answer['caption']) for i,(_, answer) in enumerate(found))

def form(picture, name='file', file='page.png', boundary='xyz'):
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"' + (f'; filename="{file}"' if file else '') + '\r\n\r\n'
    return head.encode() + picture + f'\r\n--{boundary}--\r\n'.encode()

def test_a_form_and_a_data_url(server, pages, same):
    status, answer, headers = server.ask('POST', '/caption', form(pages[2]), Content_Type='multipart/form-data; boundary=xyz')
    assert status == 200 and same(2, json.loads(answer)['caption']) and headers['content-type'] == 'application/json'
    url = 'data:image/png;base64,' + base64.b64encode(pages[2]).decode()
    status, answer, _ = server.ask('POST', '/caption', json.dumps(dict(image=url)), Content_Type='application/json; charset=utf-8')
    assert status == 200 and same(2, json.loads(answer)['caption'])

@pytest.mark.parametrize('kind', ['JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'AVIF'])
def test_other_formats(server, pages, model, kind):
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
        if line.startswith(b'data: '): found.append((time.perf_counter(), json.loads(line[6:])))
        else: assert line == b'\n'
    connection.close()
    return found

def check_stream(found, i, same):
    told = [e for _,e in found]
    assert set(told[-1]) == {'caption'} and same(i, told[-1]['caption'])
    texts = [e['text'] for e in told[:-1]]
    assert len(texts) >= 5 and all(b.startswith(a) and len(a) < len(b) for a,b in zip(texts, texts[1:])) and texts[-1] == told[-1]['caption']

def test_words_come_one_by_one(server, pages, same):
    found = events(server, pages[0])
    check_stream(found, 0, same)
    times = [t for t,_ in found]
    assert len({round(t, 3) for t in times}) > 3, 'all words came at once'

def test_streams_and_others_in_one_batch(server, pages, same):
    with ThreadPoolExecutor(12) as pool:
        streams = [pool.submit(events, server, pages[i]) for i in range(6)]
        others = [pool.submit(server.caption, pages[i]) for i in range(6, 12)]
        for i,s in enumerate(streams): check_stream(s.result(), i, same)
        for i,o in enumerate(others, 6): assert same(i, o.result()[1]['caption'])

def test_gather_is_bounded_in_number_and_time():
    queue = Queue()
    for i in range(5): queue.put(i)
    assert gather(queue, 2, 60) == [0, 1]
    start = time.monotonic()
    assert gather(queue, 8, .1) == [2, 3, 4] and .09 < time.monotonic()-start < 5
    assert gather(queue, 8, 0) == [] # it never waits for ever

def test_a_broken_picture_is_nobody_elses_trouble(model, pages):
    said = {}
    answer_batch(model, [('a', pages[0], False), ('cut', pages[1][:200], True), ('b', pages[2], False)], said.__setitem__)
    assert said['cut']['status'] == 415 and 'caption' in said['a'] and 'caption' in said['b']
    answer_batch(model, [('alone', b'', False)], said.__setitem__)
    assert said['alone']['status'] == 415

# --- Why a word was said

EXPLAIN = '/caption?explain=true'

def as_offline(model, picture, answer):
    "Whether an explanation is that of `explain`, up to rounding."
    wanted = why(model, open_image(picture), answer['caption'])['words']
    assert [w['text'] for w in answer['words']] == [w['text'] for w in wanted] and len(wanted) > 4
    for got,own in zip(answer['words'], wanted):
        assert got['probability'] == pytest.approx(own['probability'], abs=.002)
        assert got['patches'] == [pytest.approx(row, abs=.02) for row in own['patches']] and len(got['patches']) == 8
        assert got['alternatives'][0][1] == pytest.approx(own['alternatives'][0][1], abs=.002)
    assert max(max(map(max, w['patches'])) for w in wanted) > 1, 'no word rests on anything'

def test_an_explanation_is_that_of_offline(server, pages, same, model):
    with ThreadPoolExecutor(3) as pool: answers = list(pool.map(lambda i: server.caption(pages[i], EXPLAIN), range(3)))
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
    def ask(name, *args): assert server.caption(*args)[0] == 200; ended[name] = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        jobs = [pool.submit(ask, f'why {i}', pages[i], EXPLAIN) for i in range(8)]
        while len(ended) < 1: time.sleep(.01)
        jobs += [pool.submit(ask, f'caption {i}', pages[i]) for i in range(4)]
        for job in jobs: job.result()
    captions, reasons = ([t for name,t in ended.items() if name.startswith(what)] for what in ('caption', 'why'))
    assert max(captions) < sorted(reasons)[-3]

def test_reasons_have_the_same_limits(narrow, server, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    assert narrow.caption(pages[0], EXPLAIN)[0] == 401
    assert narrow.caption(b'x'*100_000, EXPLAIN, **key)[0] == 413
    assert narrow.caption(pages[0][:100], EXPLAIN, **key)[0] == 415
    assert server.caption(pages[0], '/caption?explain=perhaps')[0] == 422
    with narrow.half_sent(pages[0], **key) as first, narrow.half_sent(pages[0], **key) as second:
        assert narrow.caption(pages[0], EXPLAIN, **key)[0] == 429
        assert first()[0] == second()[0] == 200

class Done(Exception): pass

class Once:
    "A queue that gives what it holds, then ends the loop that asks for more."
    def __init__(self, *requests): self.left = list(requests)
    def get(self, timeout=None):
        if not self.left: raise Done
        return self.left.pop(0)

def test_what_nobody_waits_for_is_left_undone(model, pages):
    "A request whose time is over is neither captioned nor explained; the answer of one in time comes."
    said, worker = [], Worker(None, None, wait=0)
    worker.model = model
    api, transport = SimpleNamespace(max_batch_size=1, request_timeout=60), SimpleNamespace(send=lambda message, consumer_id: said.append((message[0], *message[1][0])))
    now, picture = time.monotonic(), pages[0]
    with pytest.raises(Done): worker(api, 'cpu', 0, Once((0, 'late', now-61, (picture, False, True)), (0, 'in time', now, (picture, False, False))), transport, None, [])
    assert said == [('in time', 'caption')]

def test_a_tokenizer_that_cannot_tell(model, pages):
    class Slow: is_fast, name_or_path = False, 'slow/one'
    spoiled = copy(model)
    spoiled.tokenizer = Slow
    answer = why(spoiled, open_image(pages[0]), 'A cat.')
    assert answer['status'] == 422 and 'slow/one' in answer['detail']

# --- What is refused

AS_JSON, AS_FORM = dict(Content_Type='application/json'), dict(Content_Type='multipart/form-data; boundary=xyz')
BOMB = as_png(Image.new('1', (7000, 7000)))
HEAD = b'IHDR' + bytes.fromhex('7fffffff7fffffff0802000000') # 2,147,483,647 pixels wide and as many high
HUGE = b'\x89PNG\r\n\x1a\n\0\0\0\r' + HEAD + zlib.crc32(HEAD).to_bytes(4) + b'\0\0\0\0IDAT' + zlib.crc32(b'IDAT').to_bytes(4)
REFUSED = { # method, path, body, headers -> status, words
    'an unknown path': ('GET', '/nothing', None, {}, 404, ''),
    'captions are posted': ('GET', '/caption', None, {}, 405, ''),
    'no content type': ('POST', '/caption', b'abc', {}, 415, 'multipart/form-data'),
    'a form of text': ('POST', '/caption', b'file=cat', dict(Content_Type='application/x-www-form-urlencoded'), 415, 'multipart/form-data'),
    'a picture as it is': ('POST', '/caption', BOMB, dict(Content_Type='image/png'), 415, 'image/png'),
    'empty JSON': ('POST', '/caption', b'', AS_JSON, 422, 'not valid JSON'),
    'broken JSON': ('POST', '/caption', b'{"image": ', AS_JSON, 422, 'not valid JSON'),
    'bytes that are no text': ('POST', '/caption', b'\xff\xfe\xfa', AS_JSON, 422, 'not valid JSON'),
    'deep JSON': ('POST', '/caption', b'['*100_000, AS_JSON, 422, 'not valid JSON'),
    'a list': ('POST', '/caption', b'["image"]', AS_JSON, 422, '"image"'),
    'a number': ('POST', '/caption', b'{"image": 5}', AS_JSON, 422, '"image"'),
    'no base64': ('POST', '/caption', b'{"image": "*"}', AS_JSON, 422, 'base64'),
    'other letters': ('POST', '/caption', json.dumps(dict(image='für')), AS_JSON, 422, 'base64'),
    'a data URL without base64': ('POST', '/caption', b'{"image": "data:image/png,abc"}', AS_JSON, 422, 'data:image/png;base64,'),
    'a URL': ('POST', '/caption', b'{"image": "https://example.com/a.png"}', AS_JSON, 422, 'never fetched'),
    'a file URL': ('POST', '/caption', b'{"image": "file:///etc/passwd"}', AS_JSON, 422, 'never fetched'),
    'text as base64': ('POST', '/caption', json.dumps(dict(image=base64.b64encode(b'a cat').decode())), AS_JSON, 415, 'no picture'),
    'PostScript': ('POST', '/caption', form(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'), AS_FORM, 415, 'no picture'),
    'an empty file': ('POST', '/caption', form(b''), AS_FORM, 415, 'no picture'),
    'a form without a boundary': ('POST', '/caption', form(b'x'), dict(Content_Type='multipart/form-data'), 422, 'boundary'),
    'another boundary': ('POST', '/caption', form(b'x'), dict(Content_Type='multipart/form-data; boundary=abc'), 422, 'form'),
    'a field of another name': ('POST', '/caption', form(b'x', 'picture'), AS_FORM, 422, '"file"'),
    'a text as the file': ('POST', '/caption', form(b'x', file=None), AS_FORM, 422, '"file"'),
    'many pixels': ('POST', '/caption', form(BOMB), AS_FORM, 413, '25 million pixels'),
    'very many pixels': ('POST', '/caption', form(HUGE), AS_FORM, 413, '25 million pixels'),
    'many bytes': ('POST', '/caption', b'x'*10_000_001, AS_JSON, 413, '10 MB'),
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
    assert status == 415 and 'not a readable picture' in answer['detail']

def test_no_url_is_fetched(server):
    with socket.socket() as bait:
        bait.bind(('127.0.0.1', 0)); bait.listen(); bait.settimeout(.5)
        for url in (f'http://127.0.0.1:{bait.getsockname()[1]}/a.png', f'//127.0.0.1:{bait.getsockname()[1]}/a.png'):
            status, _, _ = server.ask('POST', '/caption', json.dumps(dict(image=url)), **AS_JSON)
            assert status == 422
        with pytest.raises(TimeoutError): bait.accept()

def test_an_upload_without_an_end_is_cut(server):
    connection = server.connect()
    def endless():
        while True: yield b'x'*2**20
    try:
        connection.request('POST', '/caption', endless(), {'Content-Type': 'application/json'}, encode_chunked=True)
        raise AssertionError('it took everything')
    except OSError: pass # the server has closed the door
    finally: connection.close()
    assert server.ask('GET', '/health')[0] == 200

def test_who_asks_before_sending_is_told_at_once(server):
    with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
        s.sendall(b'POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50000000\r\nExpect: 100-continue\r\n\r\n')
        assert s.recv(100).startswith(b'HTTP/1.1 413')

def test_key(narrow, pages, same):
    for sent in ({}, dict(Authorization='Bearer wrong'), dict(Authorization=f'Basic {KEY}'), dict(Authorization='Bearer'), dict(X_API_Key=KEY), dict(Authorization='Bearer \xe9')):
        status, answer, headers = narrow.ask('POST', '/caption', b'{}', **AS_JSON, **sent)
        assert status == 401 and headers['www-authenticate'] == 'Bearer' and 'Authorization: Bearer' in json.loads(answer)['detail']
    status, answer = narrow.caption(pages[0], Authorization=f'Bearer {KEY}')
    assert status == 200 and same(0, answer['caption'])
    for path in ('/', '/health', '/openapi.json', '/docs'): assert narrow.ask('GET', path)[0] == 200

def test_too_many_are_told_to_come_back(narrow, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    with narrow.half_sent(pages[0], **key) as one, narrow.half_sent(pages[1], **key) as two:
        status, answer, headers = narrow.ask('POST', '/caption', b'{}', **AS_JSON, **key)
        assert status == 429 and 'try again' in json.loads(answer)['detail'] and headers['retry-after'] == '1'
        assert one()[0] == two()[0] == 200
    assert narrow.caption(pages[0], **key)[0] == 200 # the places are free again

def test_time_is_limited(narrow, pages):
    key, start = dict(Authorization=f'Bearer {KEY}'), time.monotonic()
    with narrow.half_sent(pages[0], **key) as request:
        status, answer = request(send=False)
    assert status == 504 and '2 seconds' in answer['detail'] and 1.5 < time.monotonic()-start < 10
    assert narrow.caption(pages[0], **key)[0] == 200

def test_time_is_limited_while_nobody_works(narrow, pages):
    "A worker that hangs: the time ends for those who wait, with and without words, and then it goes on."
    key, worker = dict(Authorization=f'Bearer {KEY}'), narrow.workers()[0]
    worker.suspend()
    try:
        for path in ('/caption', '/caption?stream=true'):
            status, answer = narrow.caption(pages[0], path, **key)
            assert status == 504 and 'try again' in answer['detail']
    finally: worker.resume()
    assert narrow.caption(pages[0], **key)[0] == 200

def test_clients_that_leave_free_their_place(narrow, pages):
    key = dict(Authorization=f'Bearer {KEY}')
    for path in ('/caption', '/caption?stream=true')*4:
        with socket.create_connection(('127.0.0.1', narrow.port)) as s:
            body = form(pages[0])
            s.sendall(f'POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: multipart/form-data; boundary=xyz\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body)
        time.sleep(.3)
    time.sleep(.5)
    with ThreadPoolExecutor(2) as pool: assert {status for status,_ in pool.map(lambda p: narrow.caption(p, **key), pages[:2])} == {200}

# --- Nonsense

PICTURE = as_png(Storybook('test')[0]['image'])

@st.composite
def spoiled(draw):
    "A picture of which some bytes are others, or missing."
    data = bytearray(PICTURE[:draw(st.integers(0, len(PICTURE)))] if draw(st.booleans()) else PICTURE)
    for at,value in draw(st.lists(st.tuples(st.integers(0, len(PICTURE)), st.integers(0, 255)), max_size=8)):
        if at < len(data): data[at] = value
    return bytes(data)

IN_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.sampled_from(['image', 'stream', 'file', '']), x, max_size=3), max_leaves=6)
BODIES = st.one_of(
    st.binary(max_size=400),
    IN_JSON.map(lambda x: json.dumps(x).encode()),
    st.text(max_size=60).map(lambda x: json.dumps(dict(image=x)).encode()),
    st.binary(max_size=300).map(lambda x: json.dumps(dict(image=base64.b64encode(x).decode())).encode()),
    spoiled().map(lambda x: json.dumps(dict(image='data:image/png;base64,' + base64.b64encode(x).decode())).encode()),
    spoiled().map(form),
    st.tuples(spoiled(), st.text(max_size=10), st.text(max_size=10)).map(lambda x: form(*x, boundary='xyz') if x[1].isprintable() and x[2].isprintable() else form(x[0])),
    st.tuples(st.binary(max_size=60), st.integers(0, 200)).map(lambda x: form(PICTURE)[:x[1]] + x[0] + form(PICTURE)[x[1]:]),
    spoiled())
TYPES = st.sampled_from(['application/json', 'multipart/form-data; boundary=xyz', 'multipart/form-data', 'multipart/form-data; boundary="', 'multipart/form-data; boundary=xyz; charset=utf-16', 'multipart/form-data; boundary=xyz; charset=\xff',
                         'application/json; charset=utf-16', 'image/png', '', ';;;']) | st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)
PATHS = st.sampled_from(['/caption', '/caption?explain=1', '/caption?stream=true', '/caption?stream=', '/caption?stream=1&stream=0', '/caption?%ff=%00', '/caption/', '/health', '/%2e%2e/'])
METHODS = st.sampled_from(['POST']*6 + ['PUT', 'GET', 'DELETE', 'HEAD', 'OPTIONS'])
FINE = {200, 307, 400, 404, 405, 413, 415, 422}

def nonsense(server, examples):
    "Send malformed requests; none may be answered as a fault of the server, and none may cost a worker."
    workers, connection, count = [p.pid for p in server.workers()], [server.connect()], [0]
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(METHODS, PATHS, TYPES, BODIES)
    def send(method, path, kind, body):
        try:
            connection[0].request(method, path, body, {'Content-Type': kind.encode('latin-1')})
            answer = connection[0].getresponse()
            text = answer.read()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError): # it may hang up after bytes that are no HTTP
            connection[0].close(); connection[0] = server.connect()
            return
        count[0] += 1
        assert answer.status in FINE, (answer.status, method, path, kind, body, text)
        if path.startswith('/caption') and method == 'POST' and answer.status not in (200, 307) and answer.headers['content-type'] == 'application/json': assert json.loads(text)['detail']
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
            s.sendall((b'', b'POST /caption HTTP/1.1\r\nContent-Length: -5\r\n\r\n', b'POST /caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n')[i%3] + dice.randbytes(200) + b'\r\n\r\n')
            s.shutdown(socket.SHUT_WR)
            assert not re.match(rb'HTTP/1.1 5', s.recv(200))
    assert server.ask('GET', '/health')[0] == 200

@pytest.mark.slow
def test_ten_thousand_times_nonsense(server): nonsense(server, 10_000)

# --- Load

@pytest.mark.slow
def test_load(start, made, server, pages, same):
    "32 clients for a minute: no error, none lost, all captions as offline, memory flat, and batches pay."
    single = Server(start, made, '--batch_size', 1).wait()
    try:
        for s in (server, single): send_load(s.address, pages, seconds=5)
        before = memory(server.process.pid)
        load = send_load(server.address, pages, 32, 60)
        after = memory(server.process.pid)
        alone = send_load(single.address, pages, 32, 20)
    finally: single.process.terminate(); single.process.wait(60)
    together, apart = load_report(load), load_report(alone)
    print(f'\nbatched {together}\nsingly {apart}\n{together["rate"]/apart["rate"]:.1f} times; memory {before:.0f} MB, then {after:.0f} MB')
    assert together['refused'] == apart['refused'] == 0
    assert {answer for answer in {(i, a['caption']) for i,_,a,_ in load['answers'] + alone['answers']} if not same(*answer)} == set()
    assert together['rate'] >= 3*apart['rate'] and after < before + 50

# --- OpenAPI and the page

def test_openapi(server):
    status, found, _ = server.ask('GET', '/openapi.json')
    found = json.loads(found)
    assert status == 200 and set(found['paths']) == {'/caption', '/health'}
    post = found['paths']['/caption']['post']
    assert set(post['requestBody']['content']) == {'multipart/form-data', 'application/json'}
    assert set(post['responses']) == {'200', '400', '401', '413', '415', '422', '429', '503', '504'}
    assert [p['name'] for p in post['parameters']] == ['stream', 'explain']
    assert set(post['responses']['200']['content']['application/json']['schema']['properties']['words']['items']['properties']) == {'text', 'probability', 'alternatives', 'patches'}
    assert 'data: {"caption"' in post['responses']['200']['content']['text/event-stream']['schema']['description']
    assert found['components']['securitySchemes']['HTTPBearer']['scheme'] == 'bearer' and post['security']
    assert server.ask('GET', '/docs')[0] == 200

def test_page_is_whole(server):
    status, page, headers = server.ask('GET', '/')
    assert status == 200 and page.decode() == PAGE and "default-src 'none'" in headers['content-security-policy']
    assert not re.search(r'https?:|//[a-z]|<link|@import|\ssrc="[^"]', PAGE)

WATCH = "() => { window.seen = []; new MutationObserver(() => seen.push(document.getElementById('caption').textContent)).observe(document.getElementById('caption'), {childList: true}) }"
DROP = """data => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer()
  transfer.items.add(new File([bytes], 'page.png', {type: 'image/png'}))
  const drop = document.getElementById('drop')
  for (const kind of ['dragover', 'drop']) drop.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}))
}"""

@contextmanager
def opened(browser, server, **options):
    "The page in a tab of its own; it may ask nobody but this server, and say nothing in the console."
    with browser.new_context(**options) as context:
        tab, said, asked = context.new_page(), [], []
        tab.on('console', lambda m: said.append(m.text)); tab.on('pageerror', lambda e: said.append(str(e))); tab.on('request', lambda r: asked.append(r.url))
        tab.goto(server.address)
        tab.evaluate(WATCH)
        yield tab
        assert [s for s in said if '401' not in s and '415' not in s] == []
        assert all(url.startswith((server.address, f'blob:{server.address}')) for url in asked) and len(asked) > 1

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
            assert same(i, caption) and len(set(seen)) >= 4 and all(caption.startswith(text) for text in seen), seen
            assert tab.get_by_alt_text(caption).is_visible()
        assert tab.locator('#caption').get_attribute('aria-live') == 'polite'

def test_by_keyboard_only(browser, server, made, same):
    with opened(browser, server) as tab:
        tab.keyboard.press('Tab')
        assert tab.evaluate('() => document.activeElement.id') == 'file'
        assert tab.evaluate("() => getComputedStyle(document.getElementById('drop')).outlineStyle") == 'solid', 'the focus cannot be seen'
        with tab.expect_file_chooser() as chooser: tab.keyboard.press('Enter')
        chooser.value.set_files(made/'pages'/'003.png')
        assert same(3, finished(tab))

def test_on_a_phone(browser, server, made, same):
    with opened(browser, server, viewport=dict(width=360, height=640), is_mobile=True, has_touch=True) as tab:
        with tab.expect_file_chooser() as chooser: tab.locator('#drop').tap()
        chooser.value.set_files(made/'pages'/'004.png')
        assert same(4, finished(tab))
        assert tab.evaluate('() => document.documentElement.scrollWidth <= innerWidth && innerWidth == 360')
        box = tab.locator('#caption').bounding_box()
        assert box['y'] + box['height'] <= 640, 'the caption is below the screen'
        assert tab.locator('#drop').bounding_box()['height'] >= 44
        photograph(tab, 'phone')

def photograph(tab, name):
    if folder := os.environ.get('CAPNB_SCREENSHOTS'): tab.screenshot(path=f'{folder}/{name}.png')

def veil(tab): # the opacity of each part of it; None where there is none
    return tab.evaluate("""() => {
      const heat = document.getElementById('heat'), copy = new OffscreenCanvas(heat.width, heat.height).getContext('2d', {willReadFrequently: true})
      copy.drawImage(heat, 0, 0)
      return heat.hidden ? null : Array.from(copy.getImageData(0, 0, heat.width, heat.height).data).filter((_, i) => i % 4 == 3)
    }""")

def test_each_word_shows_its_patches(browser, server, pages, model):
    with opened(browser, server, viewport=dict(width=800, height=640)) as tab:
        tab.evaluate(DROP, base64.b64encode(pages[7]).decode())
        caption = finished(tab)
        words = tab.locator('#words button')
        words.first.wait_for()
        said = why(model, open_image(pages[7]), caption)['words']
        named = [w for w in said if w['text'].isalnum()]
        assert words.all_text_contents() == [w['text'] for w in named] and tab.locator('#words').text_content() == caption
        assert [tab.evaluate('b => +b.style.getPropertyValue("--sure")', b) for b in words.element_handles()] == pytest.approx([w['probability'] for w in named], abs=.002)
        assert veil(tab) is None
        best = max(range(len(named)), key=lambda i: max(map(max, named[i]['patches'])))
        words.nth(best).hover()
        flat = [v for row in named[best]['patches'] for v in row]
        lifted = veil(tab)
        assert len(lifted) == 64 and lifted.index(min(lifted)) == flat.index(max(flat)) and min(lifted) < 5 and max(lifted) > 200
        heat, picture = (tab.locator(i).bounding_box() for i in ('#heat', '#picture'))
        assert heat == picture, 'the veil does not lie on the picture'
        assert named[best]['text'] in tab.locator('#why').text_content() and words.nth(best).get_attribute('aria-pressed') == 'true'
        photograph(tab, 'why')
        tab.mouse.move(2, 2)
        assert veil(tab) is None
        tab.locator('#file').focus()
        for i in range(2): # by keyboard
            tab.keyboard.press('Tab')
            assert tab.evaluate('() => document.activeElement.textContent') == named[i]['text'] and veil(tab) is not None
        assert tab.evaluate('() => getComputedStyle(document.activeElement).outlineStyle') == 'solid', 'the focus cannot be seen'
        tab.evaluate(DROP, base64.b64encode(pages[8]).decode())
        tab.wait_for_timeout(20)
        assert not tab.locator('#words').is_visible() and veil(tab) is None, 'the words of the picture before are still there'
        words.first.wait_for()

def test_words_on_a_phone(browser, server, made):
    with opened(browser, server, viewport=dict(width=360, height=640), is_mobile=True, has_touch=True) as tab:
        tab.locator('#file').set_input_files(made/'pages'/'007.png')
        word = tab.locator('#words button').nth(2)
        word.tap()
        assert veil(tab) is not None and min(word.bounding_box()['height'], tab.locator('#drop').bounding_box()['height']) >= 44
        assert tab.evaluate('() => document.documentElement.scrollWidth <= innerWidth')
        photograph(tab, 'why-phone')

def test_what_the_page_says_when_it_fails(browser, server, pages):
    with opened(browser, server) as tab:
        tab.evaluate(DROP, base64.b64encode(pages[0][:200]).decode())
        assert 'not a readable picture' in finished(tab)
        assert tab.locator('#caption').get_attribute('class') == 'wrong'

def test_the_page_asks_for_the_key(browser, narrow, pages, same):
    with opened(browser, narrow) as tab:
        assert not tab.get_by_label('Key of this server').is_visible()
        tab.evaluate(DROP, base64.b64encode(pages[0]).decode())
        tab.get_by_label('Key of this server').wait_for()
        tab.locator('#caption.wrong').wait_for()
        tab.keyboard.type(KEY); tab.keyboard.press('Enter') # the field has the focus
        tab.locator('#caption:not(.wrong):not([aria-busy]):not(:empty)').wait_for()
        assert same(0, finished(tab))

# --- Begin and end

def test_a_dead_worker_is_replaced(server, pages, same):
    worker = server.workers()[0]
    worker.kill()
    end = time.monotonic() + 60
    while [p.pid for p in server.workers()] in ([], [worker.pid]): assert time.monotonic() < end; time.sleep(.1)
    while server.ask('GET', '/health')[0] != 503: assert time.monotonic() < end
    while server.ask('GET', '/health')[0] != 200: assert time.monotonic() < end; time.sleep(.1)
    status, answer = server.caption(pages[6])
    assert status == 200 and same(6, answer['caption'])

@pytest.mark.slow
def test_stop_before_it_is_ready(start, made):
    server = Server(start, made)
    end = time.monotonic() + 60
    while not server.workers(): assert time.monotonic() < end and server.process.poll() is None; time.sleep(.05)
    family = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=30)
    assert server.process.returncode == 0 and not out, err
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'

@pytest.mark.slow
def test_broken_weights_are_one_line(run, made, tmp_path):
    weights = next((made/'saved_models').glob('*.pth'))
    broken = tmp_path/weights.name
    broken.write_bytes(b'no weights')
    metadata = next((made/'saved_models').glob('training_metadata_*.json'))
    (tmp_path/metadata.name).write_bytes(metadata.read_bytes())
    done = run('capnb_serve', broken, '--port', free_port(), cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, '', 1), done.stderr
    assert done.stderr.startswith(f'serve: {broken} is not a readable checkpoint')

WRONG = {'no checkpoint': (['no.pth'], 'no.pth'), 'no folder': (['--folder', 'nowhere'], 'nowhere'), 'no batch': (['--batch_size', '0'], 'batch_size is 0; allowed'), 'no time': (['--timeout', 'nan'], 'timeout is nan; allowed'),
         'a host that it cannot take': (['--host', '203.0.113.7'], '203.0.113.7'), 'a port below 1024': (['--port', '80'], 'port')}

def one_line(capsys, *args):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as stopped: serve_command(list(args))
    finally: signal.signal(signal.SIGTERM, before[0]); signal.signal(signal.SIGINT, before[1])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and len(said.splitlines()) == 1, said
    return said

@pytest.mark.parametrize('case', WRONG)
def test_wrong_input_is_one_line(made, monkeypatch, capsys, case):
    monkeypatch.chdir(made)
    args, words = WRONG[case]
    assert words in one_line(capsys, *args)

def test_a_port_that_is_taken_is_one_line(made, server, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert f'port {server.port} of 127.0.0.1 cannot be listened at' in one_line(capsys, '--port', str(server.port))

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
    assert server.process.returncode == 0 and 'Traceback' not in out+err, out+err # it has warned of what was no HTTP
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'

def test_ctrl_c(narrow):
    "The last test of that one."
    family = psutil.Process(narrow.process.pid).children(recursive=True)
    narrow.process.send_signal(signal.SIGINT)
    out, err = narrow.process.communicate(timeout=30)
    assert (narrow.process.returncode, out, err) == (130, '', 'stopped\n')
    assert not psutil.wait_procs(family, timeout=10)[1], 'a process outlives the server'
