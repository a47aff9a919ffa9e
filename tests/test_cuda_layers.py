"""Layers for a GPU, called on a processor: what is compiled or given to cuDNN computes what PyTorch's own
layers do, and where it cannot be, that is said once."""
import copy, logging
from types import SimpleNamespace
import pytest, torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from capnb.build import build_captioner
from capnb.fast import loss
from capnb.fast.cuda import layers
from capnb.fast.cuda.layers import FusedNorm, large_norm, shared_heads_attention
from capnb.fast.loss import Compiled, large_nll
from capnb.fast.packing import takes_positions
from capnb.settings import as_hyperparameters

def as_if_large(monkeypatch, compiled):
    "Let everything that requires gradients count as large and on a GPU; note what is called."
    called = []
    def note(args):
        called.append(compiled.do.__name__)
        return compiled.do(*args)
    monkeypatch.setattr(compiled, 'pays', lambda x: True)
    monkeypatch.setattr(compiled, 'compiled', lambda *args: note(args))
    return called

# --- What is compiled

def test_only_large_tensors_on_a_gpu_are_compiled():
    large = Compiled(torch.sum)
    of = lambda n, is_cuda=True: SimpleNamespace(is_cuda=is_cuda, is_meta=False, numel=lambda: n)
    assert [large.pays(x) for x in (of(2**20), of(2**20-1), of(2**20, False))]==[True, False, False]
    large.refused = True
    assert not large.pays(of(2**20))

class CompilerMissing(RuntimeError):
    "As the compiler raises it."
CompilerMissing.__module__ = 'torch._inductor.exc'

def test_where_nothing_can_be_compiled_it_is_said_once(monkeypatch, caplog):
    def refuse(*args):
        raise CompilerMissing('Failed to find C compiler.\nMore lines')
    monkeypatch.setattr(torch, 'compile', lambda do, **how: refuse)
    def double(x): return 2*x
    doubled = Compiled(double)
    with caplog.at_level(logging.WARNING, 'capnb'):
        assert [doubled(torch.ones(1)).item() for _ in range(2)]==[2, 2] and doubled.refused
    assert [r.getMessage() for r in caplog.records] == [
        '🐢 PyTorch cannot compile double here: Failed to find C compiler.'
    ]

def test_a_python_that_the_compiler_does_not_know_runs_uncompiled(monkeypatch, caplog):
    def refuse(do, **how):
        raise RuntimeError('torch.compile is not supported on Python 3.15+')
    monkeypatch.setattr(torch, 'compile', refuse)
    def double(x): return 2*x
    doubled = Compiled(double)
    with caplog.at_level(logging.WARNING, 'capnb'):
        assert [doubled(torch.ones(1)).item() for _ in range(2)]==[2, 2] and doubled.refused
    assert [r.getMessage() for r in caplog.records] == [
        '🐢 PyTorch cannot compile double here: torch.compile is not supported on Python 3.15+'
    ]

def test_another_error_of_a_compiled_function_is_raised(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch, 'compile', lambda do, **how: fail)
    full = Compiled(torch.sum)
    with pytest.raises(torch.OutOfMemoryError):
        full(torch.ones(1))
    assert not full.refused

def test_a_large_norm_is_the_norm(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    norm = FusedNorm(SimpleNamespace(weight=torch.randn(8), variance_epsilon=1e-6))
    expected = F.rms_norm(x, (8,), norm.weight, 1e-6)
    called = as_if_large(monkeypatch, large_norm)
    torch.testing.assert_close(norm(x), expected)
    assert not called # nothing is learned
    torch.testing.assert_close(norm(x.requires_grad_()), expected)
    assert called==['_norm']

@pytest.mark.parametrize('tokens', [3, 1024, 2500])
def test_a_large_loss_is_the_loss(monkeypatch, tokens):
    torch.manual_seed(0)
    head, labels = torch.nn.Linear(6, 30, bias=False).requires_grad_(False), torch.randint(30, (tokens,))
    found = []
    for large in (False, True):
        states = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        called = as_if_large(monkeypatch, large_nll) if large else []
        nll = loss._HeadNLL.apply(states, head, labels)
        weights = torch.arange(tokens)/tokens # the gradient of each token has its own factor
        found += [nll.detach(), torch.autograd.grad((nll*weights).sum(), states)[0]]
    assert len(called)==-(-tokens//1024)
    plain = F.cross_entropy(head(states), labels, reduction='none')
    expected = [plain.detach(), torch.autograd.grad((plain*weights).sum(), states)[0]]
    for one, other in zip(found, expected*2, strict=True):
        torch.testing.assert_close(one, other)

def test_a_loss_without_gradient_computes_none(monkeypatch):
    called = as_if_large(monkeypatch, large_nll)
    head = torch.nn.Linear(6, 30, bias=False).requires_grad_(False)
    loss._HeadNLL.apply(torch.randn(4, 6), head, torch.arange(4))
    assert not called

@pytest.mark.slow
def test_a_compiler_keeps_the_numbers():
    "With the compiler itself, which wants half a minute."
    x, weight = torch.randn(50, 16, requires_grad=True), torch.randn(16)
    found, expected = large_norm(x, weight, 1e-6), F.rms_norm(x, (16,), weight, 1e-6)
    torch.testing.assert_close(found, expected)
    both = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*both)
    logits, labels = torch.randn(50, 40), torch.arange(50) % 40
    for one, other in zip(large_nll(logits, labels), loss._nll_and_gradient(logits, labels), strict=True):
        torch.testing.assert_close(one, other)
    assert not (large_norm.refused or large_nll.refused)

def test_a_norm_with_a_gate_stays_as_it_is():
    "Mamba's norms have the same names, and a second argument."
    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(4)), 1e-6
        def forward(self, hidden_states, gate=None):
            gated = hidden_states if gate is None else hidden_states*gate
            return F.rms_norm(gated, (4,), self.weight, 1e-6)
    class Plain(Gated):
        def forward(self, hidden_states):
            return super().forward(hidden_states)
    assert layers.fuse_norms(torch.nn.ModuleList([Gated(), Plain()]))==1

# --- Shared heads

def attend(attention, **changes):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.full((2, 1, 5, 5), -1e9).triu(1)
    layer = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    given = dict(query=query, key=key, value=value, attention_mask=mask, scaling=.3) | changes
    out, _ = attention(layer, **given)
    return [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]

@pytest.fixture
def cudnn(monkeypatch):
    "As if cuDNN were there; gives whether heads were shared, for each call of PyTorch's attention."
    asked, attention = [], F.scaled_dot_product_attention
    def note(*args, enable_gqa=False, **how):
        asked.append(enable_gqa)
        return attention(*args, enable_gqa=enable_gqa, **how)
    monkeypatch.setattr(layers, '_cudnn_can', lambda *args: True)
    monkeypatch.setattr(layers.F, 'scaled_dot_product_attention', note)
    return asked

def test_shared_heads_attend_as_copies_do(cudnn):
    for one, other in zip(attend(shared_heads_attention), attend(sdpa_attention_forward), strict=True):
        torch.testing.assert_close(one, other)
    assert cudnn==[True, False] # transformers copies them

@pytest.mark.parametrize('change', [
    dict(attention_mask=None), dict(position_bias=torch.randn(1, 4, 5, 5)),
], ids=['causal', 'bias'])
def test_what_the_kernel_does_not_know_is_left_to_transformers(cudnn, change):
    found, expected = (attend(a, **change) for a in (shared_heads_attention, sdpa_attention_forward))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert cudnn[0]==cudnn[1] # both by transformers

@pytest.mark.parametrize('card,chosen,shared', [
    ((9, 0), SDPBackend.CUDNN_ATTENTION, True), ((10, 3), SDPBackend.CUDNN_ATTENTION, True),
    ((9, 0), SDPBackend.EFFICIENT_ATTENTION, False), ((9, 0), SDPBackend.MATH, False), # an old cuDNN
    ((8, 0), SDPBackend.CUDNN_ATTENTION, False), ((12, 0), SDPBackend.CUDNN_ATTENTION, False),
], ids=str)
def test_heads_are_shared_only_where_pytorch_takes_cudnn(monkeypatch, card, chosen, shared):
    "Another kernel might copy the heads, and store all scores."
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: card)
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: 92000)
    monkeypatch.setattr(torch, '_fused_sdp_choice', lambda *args, **how: chosen.value)
    x = SimpleNamespace(is_cuda=True, device='cuda')
    assert layers._cudnn_can(x, x, x, None, 0.)==shared

@pytest.mark.parametrize('version,hip,named', [
    (91501, None, True), (91002, None, False), (None, None, False), (91501, '6.4', False),
], ids=['new', 'old', 'none', 'AMD'])
def test_an_attention_is_named_only_where_cudnn_is_new_enough(monkeypatch, version, hip, named):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, 'version', lambda: version)
    monkeypatch.setattr(torch.version, 'hip', hip)
    for name, done in dict(fuse_norms=3, use_liger=False, use_shared_heads=True).items():
        monkeypatch.setattr(layers, name, lambda decoder, done=done: done)
    decoder = SimpleNamespace(device=torch.device('cuda'), dtype=torch.bfloat16)
    fused = layers.use_fused(decoder)
    assert fused.startswith('3 norms (PyTorch)') and ('cuDNN' in fused)==named

def test_pytorch_tells_which_attention_it_takes():
    "On a processor it is none of cuDNN."
    query, shared = torch.randn(2, 4, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    found = torch._fused_sdp_choice(query, shared, shared, torch.zeros(5, 5), 0., enable_gqa=True)
    assert SDPBackend(found) in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)

def test_a_decoder_with_shared_heads_still_packs():
    decoder = build_captioner(as_hyperparameters(), 'cpu').decoder
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = decoder(ids).logits
        assert layers.use_shared_heads(decoder) and not layers.use_shared_heads(decoder) # once is enough
        assert takes_positions(decoder, 40) and torch.equal(decoder(ids).logits, expected)
        copied = copy.deepcopy(decoder)
        assert torch.equal(copied(ids).logits, expected)
    decoder.set_attn_implementation('eager')
    assert not layers.use_shared_heads(decoder)
