"A script that uses every name that capnb offers; `test_types.py` gives it to a type checker, nobody runs it."
from pathlib import Path
from typing import assert_type
import capnb
from capnb import (
    Callback, Captioner, Hyperparameters, TrainingResult, caption, caption_files, evaluate, explain, fit,
    load, load_data, train,
)
from capnb.encoder import encode_data
from capnb.training import Run

class Losses(Callback):
    "Keeps the loss at the end of each epoch."
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_epoch_end(self, run) -> None:
        self.losses.append(run.losses[-1])

h = Hyperparameters(batch_size=4, num_epochs=2)
assert_type(h.batch_size, int)
assert_type(h.output_dir, str)
result = train(h, preset='storybook', callbacks=[Losses()], seed=1)
assert_type(result, TrainingResult)
assert_type(result.checkpoint, Path)
assert_type(result.curve, Path)
assert_type(result.metadata, dict)

captioner = load(result.checkpoint, device='cpu')
assert_type(captioner, Captioner)
print(captioner.caption('page.png', num_beams=3), captioner.device, caption(['page.png'], captioner))
nll, mask = captioner.nll(captioner.encoder.encode(['page.png']), ['A red cat.'])
print((nll.sum()/mask.sum()).item())

splits = load_data('storybook', limit=100)
assert_type(splits, dict)
scores, captions = evaluate(captioner, splits, split='train', progress=True)
text, words = explain(captioner, 'page.png', patches=False)
for row in caption_files(captioner, ['page.png', 'other.png'], batch_size=2, scores=True):
    print(row['file'], row['caption'])

data = {'train': encode_data(captioner.encoder, splits['train'])}
run = fit(captioner, data, num_epochs=1, callbacks=[Losses()])
assert_type(run, Run)
print(capnb.__version__, text, words, scores, captions, run.losses, dict(h))
