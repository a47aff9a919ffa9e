"""A hub on the loopback address: enough of the API of huggingface.co for the real clients of `datasets`,
`huggingface_hub` and `transformers`."""
import base64, hashlib, json, re, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

ASK = re.compile(
    r'(?:/api/(?P<api>datasets|models)/(?P<name>[^/]+/[^/]+?)(?:/(?P<what>revision|tree|paths-info|auth-check)(?:/(?P<revision>[^/]+))?(?:/(?P<path>.+))?)?'
    r'|/(?P<data>datasets/)?(?P<owner>[^/]+/[^/]+)/resolve/(?P<at>[^/]+)/(?P<file>.+))'
)

WRITE = re.compile(
    r'/api/(?:(?P<what>repos/create|validate-yaml)|models/(?P<name>[^/]+/[^/]+)/(?P<more>preupload|commit)/[^/]+)'
)

class Repo:
    "Files of a data set or a model at its revisions; `gated` asks everybody to accept terms first."
    def __init__(self, files, revisions=('main',), gated=False):
        self.files, self.gated = dict(files), gated
        self.sha = hashlib.sha1(
            b''.join(name.encode() + content for name, content in sorted(self.files.items()))
        ).hexdigest()
        self.revisions = {*revisions, self.sha}

class Hub:
    """The server.

    `sent` counts the bytes of files, `asked` lists the requests; `cut_after` closes the next answers that are
    longer after so many bytes; `status` answers every request with it, `pause` waits before each 16 KB of a
    file (seconds).
    """
    def __init__(self):
        self.repair()
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), dict(hub=self)))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def repair(self):
        self.repos, self.sent, self.asked, self.cut_after, self.cuts, self.status, self.pause = (
            {},
            0,
            [],
            None,
            0,
            None,
            0,
        )
    def add(self, name, files, kind='datasets', **more):
        self.repos[kind, name] = Repo(files, **more)
    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home):
        "What a process needs to use this hub, with its own cache in the folder `home`."
        return {
            'HF_ENDPOINT': self.url,
            'HF_HOME': str(home),
            'HF_HUB_OFFLINE': '0',
            'HF_HUB_DISABLE_TELEMETRY': '1',
            'HF_TOKEN': '',
            'NO_PROXY': '127.0.0.1',
            'no_proxy': '127.0.0.1',
        }

class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = 'HTTP/1.1', True
    def log_message(self, *args):
        pass

    def answer(self, status, content=b'', **headers):
        self.send_response(status)
        for name,value in dict({'Content-Length': len(content)}, **headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == 'HEAD': return
        if self.hub.cuts and len(content) > self.hub.cut_after:
            self.hub.cuts -= 1
            content, self.close_connection = content[:self.hub.cut_after], True
        for at in range(0, len(content), 16_384):
            if '/resolve/' in self.path:
                time.sleep(self.hub.pause)
                self.hub.sent += len(content[at:at+16_384])
            try:
                self.wfile.write(content[at:at+16_384])
            except ConnectionError:
                self.close_connection = True
                return # the other side has gone

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), **{'Content-Type': 'application/json'})
    def error(self, status, code):
        self.answer(status, **{'X-Error-Code': code, 'X-Error-Message': code})

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        self.hub.asked.append(f'{self.command} {self.path}')
        if self.hub.status: return self.answer(self.hub.status)
        url = urlsplit(self.path)
        if self.command == 'POST' and (write := WRITE.fullmatch(url.path)):
            return self.write(write['name'], write['what'] or write['more'], body)
        ask = ASK.fullmatch(url.path)
        if not ask: return self.error(404, 'EntryNotFound')
        kind = ask['api'] or ('datasets' if ask['data'] else 'models')
        repo = self.hub.repos.get((kind, ask['name'] or ask['owner']))
        if repo is None: return self.error(404, 'RepoNotFound')
        if unquote(ask['revision'] or ask['at'] or 'main') not in repo.revisions:
            return self.error(404, 'RevisionNotFound')
        if ask['file']: return self.file(repo, unquote(ask['file']))
        if ask['what'] == 'auth-check':
            return self.error(403, 'GatedRepo') if repo.gated else self.json({})
        if ask['what'] == 'tree':
            return self.tree(repo, unquote(ask['path'] or ''), parse_qs(url.query))
        if ask['what'] == 'paths-info':
            return self.json([self.entry(repo, p) for p in self.paths(body) if p in repo.files])
        self.json(
            dict(
                _id=repo.sha[:24],
                id=ask['name'],
                sha=repo.sha,
                private=False,
                gated='manual' if repo.gated else False,
                disabled=False,
                downloads=0,
                likes=0,
                tags=[],
                siblings=[dict(rfilename=name) for name in repo.files],
            )
        )
    do_GET = do_HEAD = do_POST = handle_any

    def write(self, name, what, body):
        """Take in a model: every file comes in the commit itself, as the hub has it for small text files.

        Who is not logged in may not.
        """
        if not self.headers.get('Authorization'): return self.answer(401)
        if what == 'repos/create':
            name = '/'.join(filter(None, (json.loads(body).get('organization'), json.loads(body)['name'])))
            self.hub.repos.setdefault(('models', name), Repo({}))
            return self.json(dict(url=f'{self.hub.url}/{name}', name=name, id=name))
        if what == 'validate-yaml': return self.json(dict(errors=[], warnings=[]))
        if what == 'preupload':
            return self.json(
                dict(
                    files=[
                        dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                        for f in json.loads(body)['files']
                    ]
                )
            )
        lines = [json.loads(line) for line in body.splitlines()]
        self.hub.add(
            name,
            {
                line['value']['path']: base64.b64decode(line['value']['content'])
                for line in lines
                if line['key'] == 'file'
            },
            'models',
        )
        self.json(
            dict(
                success=True,
                commitOid=self.hub.repos['models', name].sha,
                commitUrl=f'{self.hub.url}/{name}/commit/{self.hub.repos["models", name].sha}',
                hookOutput='',
            )
        )

    def paths(self, body):
        return json.loads(body)['paths'] if body[:1] == b'{' else parse_qs(body.decode())['paths']
    def entry(self, repo, path):
        oid = hashlib.sha1(repo.files[path]).hexdigest()
        return dict(
            type='file',
            path=path,
            size=len(repo.files[path]),
            oid=oid,
            lfs=dict(oid=oid, size=len(repo.files[path]), pointerSize=100),
        )

    def tree(self, repo, folder, query):
        inside = [name for name in repo.files if not folder or name.startswith(folder + '/')]
        if not inside: return self.error(404, 'EntryNotFound')
        start, deep = len(folder) + 1 if folder else 0, query.get('recursive', ['False'])[0].lower() in (
            'true',
            '1',
        )
        folders = sorted(
            {name[:start] + name[start:].split('/')[0] for name in inside if '/' in name[start:]}
        )
        files = [name for name in inside if deep or '/' not in name[start:]]
        self.json(
            [
                *(
                    dict(type='directory', path=f, size=0, oid=hashlib.sha1(f.encode()).hexdigest())
                    for f in folders
                    if not deep
                ),
                *(self.entry(repo, f) for f in files),
            ]
        )

    def file(self, repo, name):
        if repo.gated: return self.error(403, 'GatedRepo')
        if name not in repo.files: return self.error(404, 'EntryNotFound')
        content = repo.files[name]
        headers = {
            'X-Repo-Commit': repo.sha,
            'ETag': f'"{hashlib.sha1(content).hexdigest()}"',
            'Accept-Ranges': 'bytes',
            'Content-Type': 'application/octet-stream',
        }
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if not part: return self.answer(200, content, **headers)
        first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
        if first > last:
            return self.answer(416, **{'Content-Range': f'bytes */{len(content)}'})
        self.answer(
            206,
            content[first : last + 1],
            **headers,
            **{'Content-Range': f'bytes {first}-{last}/{len(content)}'},
        )
