"""Tests of benchmarks/scaling, and of docs/scaling.md, which has its figures.

    python -m pytest tests/test_scaling.py
"""
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks.scaling import check as scaling_check, plans as scaling
from benchmarks.scaling.cluster import (
    Cluster,
    Link,
    Work,
    best_interval,
    evaluation_seconds,
    fill_buckets,
    goodput,
    input_rates,
    limiter,
    plan,
    reduce_seconds,
    saving_seconds,
    simulate,
    step_parts,
    step_seconds,
    training_parts,
    waiting_factor,
)
from options.parser import create_parser, parse_options
from tests.conftest import ROOT, run_module, succeeded

GRADIENTS = tuple(((index + 1) / 8, 20e6) for index in range(8))
WORK = Work(1e6, 1e8, local_batch=100, gradients=GRADIENTS)
REAL = Cluster(1e-4, 2e-4, 6e-3, node=Link(5e-6, 380e9), network=Link(1e-5, 25e9), jitter=0.02, cores_per_gpu=16,
               loader_rate=800, disk=2e9, store_node=4e9, store=1e11)


def seconds(cluster: Cluster, work: Work = WORK, gpus: int = 16) -> float:
    return step_seconds(cluster, work, gpus)


# --- Closed forms -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('gpus', [1, 8, 64, 1024])
def test_what_waits_for_nothing_is_ideal(gpus):
    row = plan(Cluster(1e-4, 1e-3), WORK, gpus)
    assert row['images_per_second'] == pytest.approx(gpus * 100 / 0.011)
    assert row['efficiency'] == pytest.approx(1) and row['limiter'] == 'GPU'
    assert row['hours'] == pytest.approx(1e8 / row['images_per_second'] / 3600) and row['most'] == 'steps'


def test_launches_are_the_least_that_a_step_takes():
    assert seconds(Cluster(1e-4, 1e-3, 5e-3)) == pytest.approx(0.011)
    assert seconds(Cluster(1e-4, 1e-3, 5e-2)) == pytest.approx(0.05)
    assert limiter(Cluster(1e-4, 1e-3, 5e-2), WORK, 16) == 'launches'


def test_a_network_without_bandwidth_leaves_nothing():
    slow = Cluster(1e-4, network=Link(0, 1.))  # a byte per second
    assert seconds(slow, gpus=8) == pytest.approx(0.01)  # one node does not need it
    bytes_of_a_node = 2 * (1 - 1 / 2) * 160e6
    assert seconds(slow, gpus=16) == pytest.approx(bytes_of_a_node, rel=0.01) and limiter(slow, WORK, 16) == 'gradients'


def ring_all_reduce(count: int) -> tuple[int, np.ndarray]:
    """The rounds of messages in which a ring of so many sums one part for each, and the sums that each then has."""
    parts, rounds = np.random.default_rng(count).integers(0, 100, (count, count)), 0
    expected = parts.sum(0)
    for phase in ('sum', 'pass on'):
        for number in range(count - 1):
            sent = [(rank, (rank - number + (phase == 'pass on')) % count) for rank in range(count)]
            values = [parts[rank, part] for rank, part in sent]
            for (rank, part), value in zip(sent, values, strict=True):
                there = (rank + 1) % count
                parts[there, part] = value + (parts[there, part] if phase == 'sum' else 0)
            rounds += 1
    assert (parts == expected).all()
    return rounds, parts


@pytest.mark.parametrize('gpus', [2, 3, 8])
def test_a_ring_takes_as_long_as_its_messages(gpus):
    rounds, _ = ring_all_reduce(gpus)
    cluster = Cluster(0, node=Link(0.25, 100.))
    assert reduce_seconds(cluster, 1000, gpus) == pytest.approx(rounds * (0.25 + 1000 / gpus / 100))


def test_between_nodes_the_better_of_ring_and_tree():
    far = Cluster(0, network=Link(1., 100.))  # latency counts
    assert reduce_seconds(far, 1, 8 * 128) == pytest.approx(2 * 7 * 1. + 2 * 1 / 100)
    near = Cluster(0, network=Link(0., 100.))
    assert reduce_seconds(near, 1000, 8 * 4) == pytest.approx(2 * 3 * 1000 / 4 / 100)


@pytest.mark.parametrize('each, hidden, expected', [
    (2, 1., 2), (8, 1., 5 + 16 - 10), (2, 0., 4), (8, 0., 16)])
def test_reductions_hide_behind_the_backward_pass(each, hidden, expected):
    """Backward takes 10 s; one of two buckets is there in its middle, the other at its end."""
    work = Work(1, 1, local_batch=15, gradients=((0.5, 30e6), (1., 30e6)))
    cluster = Cluster(1., gpus_per_node=2, node=Link(0, 30e6 / each), hidden=hidden)
    assert step_parts(cluster, work, 2)['gradients'] == pytest.approx(expected)
    assert simulate(cluster, work, 2, steps=20) == pytest.approx(15 + expected)


def test_the_slowest_of_many():
    drawn = np.random.default_rng(0).lognormal(-0.05**2 / 2, 0.05, (4000, 64)).max(1).mean()
    assert waiting_factor(0.05, 64) == pytest.approx(drawn, rel=2e-3)
    assert waiting_factor(0., 64) == waiting_factor(0.05, 1) == 1
    assert 1 < waiting_factor(0.05, 2) < waiting_factor(0.05, 64) < waiting_factor(0.05, 1024)


def test_more_of_anything_is_never_slower():
    rng = np.random.default_rng(1)
    for _ in range(40):
        scale = np.exp(rng.normal(0, 1.5, 8))
        worse = replace(REAL, image_seconds=1e-4 * scale[0], node=Link(5e-6, 1e11 * scale[1]),
                        network=Link(1e-5, 1e10 * scale[2]), jitter=0.02 * scale[3], loader_rate=800 * scale[4],
                        disk=2e9 * scale[5], store_node=4e9 * scale[6], store=1e10 * scale[7])
        work = replace(WORK, image_bytes=5e4, in_store=bool(rng.integers(2)))
        for better in (replace(worse, node=Link(5e-6, 2 * worse.node.bandwidth)),
                       replace(worse, network=Link(5e-6, worse.network.bandwidth)),
                       replace(worse, network=Link(1e-5, 2 * worse.network.bandwidth)),
                       replace(worse, jitter=worse.jitter / 2), replace(worse, loader_rate=2 * worse.loader_rate),
                       replace(worse, disk=2 * worse.disk), replace(worse, store_node=2 * worse.store_node),
                       replace(worse, store=2 * worse.store), replace(worse, memory=1e12),
                       replace(worse, image_seconds=worse.image_seconds / 2), replace(worse, host_seconds=0.)):
            gpus = int(rng.choice([1, 7, 16, 256]))
            assert seconds(better, work, gpus) <= seconds(worse, work, gpus) * (1 + 1e-9)


def test_from_the_gpu_to_the_loader_at_the_computed_number():
    """A GPU takes 10,000 img/s: cores of 500 each suffice from 20 on; a store of 8 GB/s feeds 16 GPUs at 50 kB."""
    for cores, expected in ((19, 'loader cores'), (21, 'GPU')):
        assert limiter(Cluster(1e-4, cores_per_gpu=cores, loader_rate=500), WORK, 16) == expected
    work = replace(WORK, image_bytes=5e4, in_store=True)
    for gpus, expected in ((8, 'GPU'), (15, 'GPU'), (17, 'store, in all'), (64, 'store, in all')):
        row = plan(Cluster(1e-4, store=8e9), work, gpus)
        assert row['limiter'] == expected
        assert row['images_per_second'] == pytest.approx(min(gpus, 16) * 1e4)


def test_what_the_memory_of_a_node_holds_needs_no_disk():
    work = replace(WORK, image_bytes=5e4)  # 50 GB
    assert input_rates(replace(REAL, memory=4e10), work, 16)['disk'] == 2 * 2e9 / 5e4
    assert 'disk' not in input_rates(replace(REAL, memory=6e10), work, 16)
    assert limiter(replace(REAL, memory=4e10), work, 16) == 'disk'


def test_a_batch_that_may_not_grow_is_shared():
    work = replace(WORK, largest_batch=4096)
    assert [work.batch(gpus) for gpus in (1, 40, 64, 1024)] == [100, 100, 64, 4]
    with pytest.raises(ValueError, match='5000 GPUs share a batch of 4096'):
        work.batch(5000)


@pytest.mark.parametrize('gpus', [1, 8, 24, 512])
@pytest.mark.parametrize('change', [{}, {'loader_rate': 300.}, {'network': Link(1e-4, 2e9)}, {'hidden': 0.}])
def test_simulation_and_closed_form_agree(gpus, change):
    without_chance = replace(REAL, jitter=0., **change)
    assert simulate(without_chance, WORK, gpus, steps=30) == pytest.approx(seconds(without_chance, gpus=gpus))
    cluster = replace(REAL, **change)
    assert simulate(cluster, WORK, gpus, steps=400) == pytest.approx(seconds(cluster, gpus=gpus), rel=0.01)


# --- Failures, buckets, evaluation ------------------------------------------------------------------------------------

def simulate_failures(cluster: Cluster, gpus: int, interval: float, *, segments: int = 10_000, seed: int = 0) -> float:
    """Return the part of the time that is training by drawing failures."""
    random = np.random.default_rng(seed)
    between = cluster.failure_gpu_seconds / gpus
    whole = interval + saving_seconds(cluster, interval)
    time, failure = 0., random.exponential(between)
    for _ in range(segments):
        needed = whole
        while time + needed > failure:
            time, failure = failure, failure + random.exponential(between)
            needed = cluster.restart_seconds + whole
        time += needed
    return segments * interval / time


def test_goodput_is_that_of_drawn_failures():
    cluster = Cluster(1., save_seconds=5, restart_seconds=60, failure_gpu_seconds=8 * 2000)
    for interval in (30, 100, 1000):
        assert goodput(cluster, 8, interval) == pytest.approx(
            simulate_failures(cluster, 8, interval, segments=40_000), rel=0.02)
    assert goodput(Cluster(1., save_seconds=1), 8, 99) == pytest.approx(0.99)  # without failures
    assert goodput(Cluster(1., write_seconds=4), 8, 1) == pytest.approx(1 / 4)  # the next save waits


def test_the_best_interval_is_best():
    cluster = Cluster(1., save_seconds=2, restart_seconds=60, failure_gpu_seconds=64 * 50_000)
    intervals = np.geomspace(10, 10_000, 400)
    best = max(goodput(cluster, 64, interval) for interval in intervals)
    assert goodput(cluster, 64, best_interval(cluster, 64)) == pytest.approx(best, rel=1e-5)
    assert best_interval(cluster, 64) == pytest.approx(math.sqrt(2 * 2 * 50_000))
    # One that holds up nothing is not saved anew before it is written: each would wait for the one before.
    eager, work = replace(cluster, save_seconds=0, write_seconds=5), replace(WORK, images=1e8)
    assert training_parts(eager, work, 64, step=0.01)['checkpoints'] == 0


def test_buckets_are_those_of_ddp():
    counted = json.loads((ROOT / 'benchmarks/results/overlap.json').read_text())['hand_overs']['t2t_vit_14']
    expected = [size for _, size in counted['buckets']]  # which tests/test_overlap.py holds to DDP
    gradients = scaling.list_gradients('t2t_vit_14', 1000, 0.22)
    assert [size for _, size in fill_buckets(gradients)] == expected
    ready = [ready for ready, _ in gradients]
    assert ready == sorted(ready) and ready[0] == 0 and ready[-1] == 1
    blocks = sorted({place for place in ready if 0 < place < 1})
    assert blocks == pytest.approx([0.78 * count / 14 for count in range(1, 15)])
    assert sum(size for _, size in gradients) == 4 * 21_465_806


def test_evaluation_waits_for_its_loader():
    work = replace(WORK, evaluated=100_000)
    assert evaluation_seconds(Cluster(1., inference_rate=1000), work, 10) == 10
    slow = Cluster(1e-4, inference_rate=1000, cores_per_gpu=2, evaluation_rate=50)
    assert evaluation_seconds(slow, work, 10) == 100
    parts = training_parts(slow, work, 10, step=0.01)
    assert parts == pytest.approx({'steps': 1000, 'evaluation': 100 * 100, 'checkpoints': 0, 'failures': 0})
    assert plan(slow, work, 10)['most'] == 'evaluation' and limiter(slow, work, 10) == 'GPU'


def test_checkpoints_of_short_epochs_wait_for_one_another():
    """Epochs of 10 s, of which each is saved in 50 s."""
    often = Cluster(1e-4, write_seconds=50)
    assert training_parts(often, WORK, 10, step=0.01)['checkpoints'] == pytest.approx(100 * 40)
    assert plan(often, WORK, 10)['hours'] == pytest.approx(100 * 50 / 3600)
    assert training_parts(often, replace(WORK, images=1e8), 10, step=0.01)['checkpoints'] == 0  # an epoch of 1000 s


def test_hours_have_all_their_parts():
    cluster = replace(REAL, save_seconds=2, restart_seconds=60, failure_gpu_seconds=64 * 5000, inference_rate=1e4,
                      evaluation_rate=1e3)
    row = plan(cluster, replace(WORK, samples=1e10, evaluated=1000), 64)
    assert row['hours'] == pytest.approx(sum(row['hours_of'].values())) and min(row['hours_of'].values()) > 0
    assert row['hours_of']['steps'] == pytest.approx(1e10 / row['images_per_second'] / 3600)


# --- The command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def planned(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scaling')
    write_records(folder / 'records')
    out = succeeded(run_module(
        'benchmarks.scaling.plans', '--plans', 'shards', 'batch4096', '--gpus', 8, 64, 8192, '--network-gbit', 25,
        '--records', folder / 'records', '--output', folder / 'results', '--name', 'quick', cwd=folder))
    assert sorted(path.name for path in (folder / 'results').iterdir()) == ['quick.json', 'quick.md', 'quick.png']
    return SimpleNamespace(folder=folder / 'results', out=out, text=(folder / 'results/quick.md').read_text(),
                           record=json.loads((folder / 'results/quick.json').read_text()))


def write_records(folder):
    """A step on a GPU, one on a CPU, which does not count, and a verdict of the check."""
    folder.mkdir()

    def table(rate, **wanted):
        return {'model': 't2t_vit_14', 'task': 'train', 'precision': 'bf16', 'img_size': 224, 'batch_size': 256,
                'rows': [{'contender': 'default', 'images_per_second': rate / 2, 'launches': 900,
                          'milliseconds': {'quartiles': [10., 10.]}},
                         {'contender': 'compiled', 'images_per_second': rate, 'launches': 700,
                          'milliseconds': {'quartiles': [10., 10.2]}},
                         {'contender': 'published', 'images_per_second': 3 * rate, 'launches': 1},
                         {'contender': 'default', 'error': 'out of memory'}]} | wanted

    (folder / 'gpu.json').write_text(json.dumps({
        'machine': {'device': 'A GPU', 'cuda': '13'}, 'tables': [table(8000), table(1, batch_size=64)]}))
    (folder / 'other.json').write_text(json.dumps({'machine': {'device': '2 CPU cores'}, 'tables': [table(5)]}))
    (folder / 'loader.json').write_text(json.dumps({
        'machine': {'processor': 'A processor'}, 'cores': 2, 'images': 10, 'image_bytes': 1e6, 'resized_bytes': 4e5,
        'tables': [{'task': task, 'workers': workers, 'rows': [
            {'contender': name, 'images_per_second_and_core': rate * workers} for name, rate in (
                ('timm, folders', 1), ('ours, folders', 200 if task == 'training' else 90),
                ('ours, shards, resized once', 350))]}
            for task in ('training', 'evaluation') for workers in (1, 2, 4)]}))
    (folder / 'scaling_check.json').write_text(json.dumps({'verdict': 'Held.'}))


def test_records_and_options_take_the_place_of_targets(planned):
    figures = {figure['name']: figure for figure in planned.record['figures']}
    assert (figures['gpu_rate']['value'], figures['gpu_rate']['kind']) == (8000, 'measured')
    assert 'gpu: compiled, A GPU' in figures['gpu_rate']['text'] and figures['launches']['value'] == 700
    assert figures['jitter']['value'] == pytest.approx(100 * math.log(1.02) / 1.349)
    assert (figures['network_gbit']['value'], figures['network_gbit']['kind']) == (25, 'given')
    assert figures['inference_rate']['kind'] == 'target' and figures['node_gbs']['kind'] == 'assumed'
    found = {name: figures[name]['value'] for name in ('folder_rate', 'shard_rate', 'evaluation_rate', 'image_kb',
                                                       'shard_image_kb')}
    # With two workers, as many as there are cores.
    assert found == {'folder_rate': 400, 'shard_rate': 700, 'evaluation_rate': 180, 'image_kb': 100,
                     'shard_image_kb': 40}
    assert figures['shard_rate']['text'].endswith('(loader: A processor)')
    assert planned.record['check'] == 'Held.' and planned.text.endswith('## Held against measurements\n\nHeld.\n')


def test_units_are_those_of_the_model(planned):
    figures = {figure['name']: scaling.Figure(**figure) for figure in planned.record['figures']}
    args = SimpleNamespace(local_batch=256)
    cluster = scaling.build_cluster(figures, args, is_resized=True)
    assert cluster.network == Link(1e-5, 25e9 / 8) and cluster.node == Link(5e-6, 380e9)
    assert (256 * cluster.image_seconds + cluster.fixed_seconds) == pytest.approx(256 / 8000)
    assert cluster.host_seconds == pytest.approx(700 * 5e-6) and cluster.jitter == pytest.approx(math.log(1.02) / 1.349)
    assert (cluster.loader_rate, cluster.disk, cluster.memory) == (700, 3e9, 1e12)
    assert (cluster.store_node, cluster.store, cluster.failure_gpu_seconds) == (2.5e9, 1e11, 50_000 * 3600)
    assert scaling.build_cluster(figures, args, is_resized=False).loader_rate == 400


def test_the_checkpoint_has_the_bytes_of_its_model():
    parser = create_parser('', (scaling.plan_options,))
    args = parse_options(parser, ['--model', 't2t_vit_7'])
    saving = {'checkpoint_megabytes': 16 * 4_255_694 / 1e6 * 10, 'lost_seconds_per_save': [1, 2],
              'written_after_seconds': [10, 5]}
    figures = scaling.find_figures(args, {'saving': saving})
    assert figures['save_s'].value == pytest.approx(0.2) and figures['write_s'].value == pytest.approx(1)


def test_tables_say_what_the_record_says(planned):
    rows = planned.record['plans'][0]['rows']
    assert [row['gpus'] for row in rows] == [8, 64, 8192]
    assert [row['gpus'] for row in planned.record['plans'][1]['rows']] == [8, 64]  # not 8,192 with 4,096 images
    section = re.split('^## ', planned.text, flags=re.M)[3]
    lines = [[cell.strip() for cell in line.strip('| ').split(' | ')] for line in section.splitlines()
             if line.startswith('|')][2:]
    for row, cells in zip(rows, lines, strict=True):
        assert cells[:3] == [str(row['gpus']), str(row['batch']), f'{row["global_batch"]:,}']
        assert float(cells[3].replace(',', '')) == pytest.approx(row['images_per_second'], rel=5e-3)
        assert cells[5] == row['limiter'] and float(cells[7]) == pytest.approx(row['hours'], rel=5e-3)
        assert float(cells[11].replace(',', '')) == pytest.approx(row['gpu_hours'], rel=5e-3)
        assert row['dollars'] == pytest.approx(3 * row['gpu_hours'])
        assert row['images_per_second'] == pytest.approx(row['closed_form'], rel=0.02)
    assert planned.out.startswith(planned.text.strip()) and 'tmp' not in planned.text


def test_the_picture_is_one(planned):
    pixels = np.asarray(Image.open(planned.folder / 'quick.png').convert('RGB'))
    assert pixels.shape == (700, 1400, 3) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_every_figure_has_its_option(tmp_path):
    said = succeeded(run_module('benchmarks.scaling.plans', '--help', cwd=tmp_path))
    assert all(f'  {figure.option} ' in said for figure in scaling.FIGURES)
    assert "a GPU's time for a step (default: a record, else 1)" in ' '.join(said.split())


@pytest.mark.parametrize('words, message', [
    (['--plans', 'imagenet'], "argument --plans: invalid choice: 'imagenet'"),
    (['--gpu-rate', '2000000'], '--gpu-rate 2e+06: a step of 256 images would be shorter than --fixed-ms 0.2'),
    (['--gpu-rate', '0'], 'argument --gpu-rate: 0 is too small'),
    (['--plans', 'batch4096', '--gpus', '5000'], '--gpus 5000: the plan batch4096 has 4,096 images per step'),
    (['--records', 'nowhere'], '--records nowhere: no such folder')])
def test_a_mistake_is_one_line(tmp_path, words, message):
    result = run_module('benchmarks.scaling.plans', *words, '--output', tmp_path / 'results', cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count('\n') == 1
    assert not (tmp_path / 'results').exists()


# --- The check --------------------------------------------------------------------------------------------------------

def test_the_check_predicts_what_the_model_made():
    """Two processes that are as the model has them are predicted exactly."""
    args = SimpleNamespace(model='t2t_vit_7', img_size=64, batch_sizes=[4, 8, 16])
    gradients = scaling.list_gradients('t2t_vit_7', 1000, 0.48, img_size=64)
    link = Link(1e-4, 1e9)
    cluster = Cluster(1e-2, 3e-2, gpus_per_node=2, node=link, hidden=0.)
    steps = []
    for batch in args.batch_sizes:
        work = Work(1, 1, local_batch=batch, gradients=gradients)
        for kind, factor, ranks in (('alone', 0.9, 1), ('apart', 1., 1), ('DDP', 1., 2)):
            taken = 1000 * factor * sum(step_parts(cluster, work, ranks).values())
            steps.append({'batch_size': batch, 'kind': kind, 'milliseconds': [[taken] * 5]})
    messages = [{'bytes': size, 'milliseconds': [1000 * (2e-4 + size / 1e9)]} for size in scaling_check.MESSAGES]
    found = scaling_check.predict({'steps': steps, 'messages': messages}, args)
    assert found['bytes_per_second'] == pytest.approx(1e9) and found['latency_milliseconds'] == pytest.approx(0.2)
    assert found['compute_apart'] == pytest.approx({'fixed_milliseconds': 30, 'milliseconds_per_image': 10})
    for row in found['rows']:
        assert abs(row['error_from_apart']) < 1e-6 and abs(row['error_one_from_alone']) < 1e-6
        assert row['error_from_alone'] < -5
    assert 'Target, 15 %: met' in scaling_check.verdict(found, args)


def test_a_line_never_falls_below_zero():
    assert scaling_check.fit_line([1, 2, 4], [3, 5, 9]) == pytest.approx((1, 2))
    assert scaling_check.fit_line([1, 2], [1, 4])[0] == 0
    assert scaling_check.fit_line([1, 2], [4, 1])[1] == 0


@pytest.mark.slow
def test_two_processes_are_measured(tmp_path):
    out = succeeded(run_module('benchmarks.scaling.check', '--img-size', 32, '--batch-sizes', 1, 2, '--rounds', 2,
                               '--steps', 1, '--output', tmp_path, cwd=tmp_path))
    record = json.loads((tmp_path / 'scaling_check.json').read_text())
    assert {(point['batch_size'], point['kind']): np.shape(point['milliseconds'])
            for point in record['measured']['steps']} == {
        (batch, kind): (2 if kind == 'apart' else 1, 2) for batch in (1, 2) for kind in ('alone', 'apart', 'DDP')}
    assert all(point['milliseconds'] and min(point['milliseconds']) > 0 for point in record['measured']['messages'])
    assert record['found']['gradient_bytes'] == 4 * 4_255_694
    assert record['verdict'] in out and 'steps of both together are predicted within' in record['verdict']


# --- The page ---------------------------------------------------------------------------------------------------------

PAGE = ROOT / 'docs/scaling.md'


def test_the_page_has_the_tables_of_the_record():
    printed = (ROOT / 'benchmarks/results/scaling.md').read_text()
    tables = re.findall(r'(?:^\|.*\n)+', PAGE.read_text(), flags=re.M)
    assert len(tables) >= 4
    for table in tables:
        assert table in printed
    verdict = json.loads((ROOT / 'benchmarks/results/scaling_check.json').read_text())['verdict']
    assert verdict in printed and verdict in ' '.join(PAGE.read_text().split())


def test_tables_of_a_page_are_renewed_by_their_headers():
    page = 'Text\n\n| a | b |\n| --- | ---: |\n| old | 1 |\n\n| c |\n| --- |\n| kept |\n\n> before\n\nEnd\n'
    text = '| x |\n| --- |\n\n| a | b |\n| --- | ---: |\n| new | 2 |\n| more | 3 |\n'
    assert scaling.renew_page(page, text, 'after') == page.replace('| old | 1 |', '| new | 2 |\n| more | 3 |').replace(
        '> before', '> after')
    assert '> before' in scaling.renew_page(page, text, None)


def test_the_record_is_what_the_command_makes_now():
    """Of two plans, for the numbers of GPUs on the page."""
    record = json.loads((ROOT / 'benchmarks/results/scaling.json').read_text())
    assert record['command'].removesuffix(' --page docs/scaling.md') == 'python -m benchmarks.scaling.plans'
    args = parse_options(create_parser('', (scaling.plan_options,)), [
        '--plans', 'batch4096', 'laion400m', '--gpus', *map(str, scaling.SHOWN)])
    figures = {figure['name']: scaling.Figure(**figure) for figure in record['figures']}
    assert figures.keys() == {figure.name for figure in scaling.FIGURES}
    recorded = {found['plan']: {row['gpus']: row for row in found['rows']} for found in record['plans']}
    for found in scaling.make_plans(args, figures):
        for row in found['rows']:
            then = recorded[found['plan']][row['gpus']]
            assert (row['limiter'], row['most']) == (then['limiter'], then['most'])
            assert row['hours'] == pytest.approx(then['hours'], rel=2e-3)
            assert row['images_per_second'] == pytest.approx(then['images_per_second'], rel=2e-3)


def test_the_page_names_what_is_there():
    text = PAGE.read_text()
    for command in re.findall(r'python -m (benchmarks[\w.]+)\b', text):
        assert (ROOT / f'{command.replace(".", "/")}.py').exists()
    known = {figure.option for figure in scaling.FIGURES} | {
        '--plans', '--gpus', '--model', '--local-batch', '--page'}
    elsewhere = {'--compile', '--checkpoint-steps', '--opt', '--batch-size', '--precision'}  # train.py and step.py
    assert set(re.findall(r'`?(--[a-z][a-z-]+)', text)) <= known | elsewhere
    for path in re.findall(r'\]\(([^)#:]+)\)', text):
        assert (PAGE.parent / path).exists(), path
