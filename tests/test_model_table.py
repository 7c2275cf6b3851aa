"""Tests of tools/model_table.py: its counts against counts made by hand, and the tool as a user starts it."""
import pytest

from tests.conftest import run_script, succeeded
from tools.model_table import count


def rows(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in out.splitlines() if line][2:]


def test_counts_of_a_vision_transformer_made_by_hand():
    counts, size = count('deit_tiny_patch16_224', None)
    C, N, depth = 192, 197, 12
    block = 12 * C * C  # qkv 3, projection 1, MLP 8
    layers = 196 * 3 * 256 * C + depth * N * block + C * 1000
    assert counts.layer_macs == layers
    assert counts.macs == layers + depth * 2 * N * N * C  # q kᵀ, and its product with v
    assert counts.activations == 196 * C + depth * N * (3 + 1 + 4 + 1) * C + 1000
    assert counts.parameters == counts.trained == 5_717_416
    assert size == (224, 224)


def test_counts_of_a_residual_network():
    counts, _ = count('resnet18', (224, 224))
    assert counts.parameters == counts.trained == 11_689_512  # running statistics are no parameters
    assert counts.macs == counts.layer_macs == pytest.approx(1.814e9, rel=1e-3)


def test_both_conventions_of_t2t_vit():
    counts, _ = count('t2t_vit_14', None)
    assert (counts.parameters, counts.trained) == (21_545_550, 21_465_806)
    assert round(counts.macs / 1e9, 2) == 4.78
    # The Performer of 3,136 and 784 tokens: two projections of 32 × 64, two products of the same size, two sums of 32.
    performer = (3136 + 784) * (4 * 32 * 64 + 32)
    attention = 14 * 2 * 197 * 197 * 384
    assert counts.macs - counts.layer_macs == performer + attention


def test_the_table(tmp_path):
    out = succeeded(run_script('tools/model_table.py', 't2t_vit_14', 't2t_vit_14.in1k_384', 'resnet[12]8',
                               '-o', 'zoo.md', cwd=tmp_path))
    assert (tmp_path / 'zoo.md').read_text() == out
    (ours, larger, *others) = rows(out)
    assert ours == ['[t2t_vit_14](configs/t2t_vit_14.yaml)', '224', '21,545,550', '21,465,806', '4.78', '4.33', '10.1',
                    '81.5', '95.67']
    assert larger[1:5] == ['384', '21,691,470', '21,465,806', '16.37'] and larger[-2:] == ['83.3', '96.5']
    assert [row[0] for row in others] == ['resnet18'] and others[0][-2:] == ['', '']


def test_another_image_size(tmp_path):
    out = succeeded(run_script('tools/model_table.py', 't2t_vit_14', '--img-size', '192x256', cwd=tmp_path))
    [[_, size, _, trained, macs, *_, top1, top5]] = rows(out)
    assert size == '192 × 256' and trained == '21,465,806' and float(macs) < 4.78
    assert top1 == top5 == ''  # published at 224


@pytest.mark.parametrize('options, message', [
    (['t2t_vit14'], "model 't2t_vit14' does not exist; did you mean t2t_vit_14"),
    (['t2t_vit_7', '--img-size', '8'], 'at least 16'),
    (['t2t_vit_7', '-o', 'nowhere/zoo.md'], '--output nowhere/zoo.md cannot be written'),
])
def test_mistakes(options, message, tmp_path):
    result = run_script('tools/model_table.py', *options, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
