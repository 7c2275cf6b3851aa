"""Worker processes that get stuck where they are forked."""
import os

from tests.conftest import run_command, succeeded, warm

# The first, the third and the fourth that are forked never get as far as their own work.
STUCK = '''
import os, signal, sys
import numpy as np
import torch
from PIL import Image
from data.arrays import ArrayImages
from data.loader import create_loader
from data.samplers import EvalSampler
from data.transforms import create_eval_transform
from data import forking

def fork():
    with open(sys.argv[1], 'a') as forks:
        forks.write(f'{os.getpid()} ')
    if len(open(sys.argv[1]).read().split()) in (1, 3, 4):
        signal.pause()

forking.PATIENCE = 0.5
os.register_at_fork(after_in_child=fork)
print('seed 3')
images = np.random.default_rng(3).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
dataset = ArrayImages('made', images, ['a', 'b'], np.arange(20) % 2)
loader = create_loader(dataset, create_eval_transform((8, 8), crop_pct=1.0), EvalSampler(20, 5), seed=0, workers=2)
for _ in range(2):
    assert torch.cat([targets for _, targets in loader]).tolist() == dataset.targets.tolist()
loader.close()
'''


def test_workers_that_get_stuck_are_replaced(tmp_path):
    succeeded(run_command([warm().python, '-c', STUCK, tmp_path / 'forks'], cwd=os.getcwd()))
    forks = list(map(int, (tmp_path / 'forks').read_text().split()))
    assert len(forks) == 5
    assert not any(os.path.exists(f'/proc/{pid}') for pid in forks)
