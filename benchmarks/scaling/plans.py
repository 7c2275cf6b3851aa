"""Plan trainings past one machine: throughput, what limits it, hours and cost, on 1 to 1,024 GPUs.

    python -m benchmarks.scaling.plans                           # from the records in benchmarks/results: 15 seconds
    python -m benchmarks.scaling.plans --network-gbit 100 --dollars 2   # other assumptions: each is an option

docs/scaling.md explains the plans and the kinds of their inputs; --page docs/scaling.md renews its tables. The model is
cluster.py. Records in --records replace targets.
"""
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import yaml

from benchmarks.scaling.cluster import Cluster, Link, Work, ideal_rate, plan
from benchmarks.shared.command import parse_command
from benchmarks.shared.records import markdown_table, new_record, read_record, save
from benchmarks.targets import ABSOLUTE
from models import create_model
from options.types import fraction, positive, positive_int, rate
from utils.console import progress_bar
from utils.disk import ROOT, write_whole
from utils.errors import UserError
from utils.pictures import BLUE, GREEN, ORANGE, new_figure
from utils.script import run_script

# Part of a step that the tokens-to-token module takes in the published eager code; its backward pass comes last.
TOKEN_SHARES = {'t2t_vit_7': 0.48, 't2t_vit_14': 0.22, 't2t_vit_19': 0.16, 't2t_vit_24': 0.10, 't2t_vit_t_14': 0.51}
RATES = {(model, task): target or stretch for model, size, task, target, stretch in ABSOLUTE if size == 224}
STATE = 16  # bytes of a checkpoint for each parameter: weights, their average, two moments, in float32
SHARD = 1e9  # bytes of one shard
INDEX = 28 + 26  # bytes of a sample in a shard's index: two offsets, a class, the end of its name; and that name
INPUTS = yaml.safe_load((ROOT / 'benchmarks/scaling/inputs.yaml').read_text(encoding='utf-8'))
TABLE = r'(?:^\|.*\n)+'
SHOWN = (8, 64, 256, 1024)
LINES = ('-', '--', '-.', ':', (0, (6, 2)), (0, (1, 3)))
# Colour and marker of each limit in the picture.
STYLES = {'GPU': (BLUE, 'o'), 'launches': (ORANGE, 's'), 'gradients': ('#CC79A7', 'D'), 'slowest GPU': ('#000000', 'X'),
          'loader cores': (GREEN, '^'), 'disk': ('#E69F00', 'v'), 'store, each node': ('#56B4E9', 'P'),
          'store, in all': ('#F0E442', '*')}


@dataclass(frozen=True)
class Figure:
    """An input of plans: name of its option, value, unit, how it is known, and what it is."""
    name: str
    value: float
    unit: str
    kind: str
    text: str

    @property
    def option(self) -> str:
        return '--' + self.name.replace('_', '-')


FIGURES = tuple(Figure(name, *values) for name, values in INPUTS['figures'].items())
# Inputs that may be zero, and other bounds than positive.
MAY_BE_ZERO = ('fixed_ms', 'launches', 'launch_us', 'jitter', 'node_us', 'network_us', 'memory_gb', 'save_s', 'write_s',
               'restart_s', 'dollars')
BOUNDS = {name: rate for name in MAY_BE_ZERO} | {'token_share': fraction, 'gpus_per_node': positive_int}


@dataclass(frozen=True, kw_only=True)
class Plan(Work):
    """A training on a data set: one table."""
    name: str
    classes: int = 1000
    is_resized: bool = True


PLANS = {name: Plan(**settings) for name, settings in INPUTS['plans'].items()}


def plan_options(parser) -> None:
    add = parser.add_argument_group('What is planned').add_argument
    add('--plans', nargs='+', default=list(PLANS), choices=PLANS, metavar='PLAN', help=f'of {", ".join(PLANS)}')
    add('--model', default='t2t_vit_14', choices=TOKEN_SHARES, metavar='MODEL', help=f'of {", ".join(TOKEN_SHARES)}')
    add('--gpus', nargs='+', type=positive_int, default=[2**power for power in range(11)], metavar='N',
        help='numbers of GPUs in each table')
    add('--local-batch', type=positive_int, default=256, metavar='N', help='images per step and GPU')
    add = parser.add_argument_group('Inputs').add_argument
    for figure in FIGURES:
        add(figure.option, type=BOUNDS.get(figure.name, positive),
            metavar=figure.unit.replace('%', 'PERCENT') or 'N',
            help=f'{figure.text} (default: a record, else {figure.value:g})'.replace('%', '%%'))
    add('--records', default=str(ROOT / 'benchmarks/results'), metavar='DIR', help='folder of the records')
    add('--page', metavar='FILE', help='Markdown page in which tables with the same header are renewed')


# --- Inputs -----------------------------------------------------------------------------------------------------------

def find_figures(args, records: dict[str, dict]) -> dict[str, Figure]:
    """Return FIGURES by name, with the values of options, or else of records, or else their own."""
    figures = {figure.name: figure for figure in FIGURES}

    def found(name: str, value: float, kind: str, source: str) -> None:
        text = figures[name].text + f' ({source})' * bool(source)
        figures[name] = replace(figures[name], value=value, kind=kind, text=text)

    found('token_share', TOKEN_SHARES[args.model], 'assumed', '')
    found('gpu_rate', RATES[args.model, 'train'], 'target', '')
    forward = RATES['t2t_vit_14', 'inference'] / RATES['t2t_vit_14', 'train']
    found('inference_rate', RATES.get((args.model, 'inference'), forward * RATES[args.model, 'train']), 'target', '')
    for row in records.get('traffic', {}).get('rows', ()):
        if (row['model'], row['contender']) == (args.model, 'default'):
            found('launches', row['operators'], 'counted', 'traffic')
    if saving := records.get('saving'):
        share = STATE * sum(p.numel() for p in create_model(args.model).parameters()) / (
            1e6 * saving['checkpoint_megabytes'])
        source = f'saving, for {share:.2f} of its bytes'
        found('save_s', share * max(saving['lost_seconds_per_save']), 'measured', source)
        found('write_s', share * max(saving['written_after_seconds']), 'measured', source)
    measured_steps(args, records, found)
    if 'loader' in records:
        measured_input(records['loader'], found)
    for name in figures:
        if (value := getattr(args, name)) is not None:
            figures[name] = replace(figures[name], value=value, kind='given')
    return figures


def measured_steps(args, records: dict[str, dict], found) -> None:
    """Pass what benchmarks/step.py measured on a GPU, in bf16 at 224 pixels, to found(name, value, kind, source)."""
    for name, record in records.items():
        for table in record.get('tables', ()) if 'cuda' in record.get('machine', {}) else ():
            wanted = {'model': args.model, 'precision': 'bf16', 'img_size': 224, 'batch_size': args.local_batch}
            rows = [row for row in table['rows'] if row['contender'] in ('default', 'compiled') and 'error' not in row]
            if not wanted.items() <= table.items() or not rows:
                continue
            row = max(rows, key=lambda row: row['images_per_second'])
            source = f'{name}: {row["contender"]}, {record["machine"]["device"]}'
            if table['task'] == 'train':
                low, high = row['milliseconds']['quartiles']
                found('gpu_rate', row['images_per_second'], 'measured', source)
                found('jitter', 100 * math.log(high / low) / 1.349, 'measured', source)
                if row.get('launches'):
                    found('launches', row['launches'], 'measured', source)
            else:
                found('inference_rate', row['images_per_second'], 'measured', source)


def measured_input(record: dict, found) -> None:
    """Pass rates of a core and bytes of an image, of benchmarks/loader.py, to found(name, value, kind, source).

    The tables with the most workers that do not exceed the cores count.
    """
    for name, task, contender in (('folder_rate', 'training', 'ours, folders'),
                                  ('shard_rate', 'training', 'ours, shards, resized once'),
                                  ('evaluation_rate', 'evaluation', 'ours, folders')):
        rates = {table['workers']: row['images_per_second_and_core'] for table in record['tables']
                 for row in table['rows'] if (table['task'], row['contender']) == (task, contender)
                 and table['workers'] <= record['cores']}
        if rates:
            found(name, rates[max(rates)], 'measured', f'loader: {record["machine"]["processor"]}')
    for name, key in (('image_kb', 'image_bytes'), ('shard_image_kb', 'resized_bytes')):
        found(name, record[key] / record['images'] / 1000, 'measured', 'loader')


def build_cluster(figures: dict[str, Figure], args, *, is_resized: bool) -> Cluster:
    """Return the cluster that the figures describe."""
    value = {name: figure.value for name, figure in figures.items()}
    fixed = value['fixed_ms'] / 1000
    step = args.local_batch / value['gpu_rate']
    if step <= fixed:
        raise UserError(f'--gpu-rate {value["gpu_rate"]:g}: a step of {args.local_batch} images would be shorter than '
                        f'--fixed-ms {value["fixed_ms"]:g}; give a lower one')
    return Cluster(
        image_seconds=(step - fixed) / args.local_batch, fixed_seconds=fixed,
        host_seconds=value['launches'] * value['launch_us'] / 1e6, gpus_per_node=int(value['gpus_per_node']),
        node=Link(value['node_us'] / 1e6, value['node_gbs'] * 1e9),
        network=Link(value['network_us'] / 1e6, value['network_gbit'] * 1e9 / 8),
        jitter=value['jitter'] / 100, cores_per_gpu=value['cores'],
        loader_rate=value['shard_rate' if is_resized else 'folder_rate'], evaluation_rate=value['evaluation_rate'],
        inference_rate=value['inference_rate'], disk=value['disk_gbs'] * 1e9, memory=value['memory_gb'] * 1e9,
        store_node=value['store_node_gbs'] * 1e9, store=value['store_gbs'] * 1e9, save_seconds=value['save_s'],
        write_seconds=value['write_s'], restart_seconds=value['restart_s'],
        failure_gpu_seconds=value['failure_gpu_hours'] * 3600)


def build_work(goal: Plan, figures: dict[str, Figure], args) -> Plan:
    """Return the plan with the sizes of its images, batches and gradients."""
    kilobytes = figures['shard_image_kb' if goal.is_resized else 'image_kb'].value
    return replace(goal, image_bytes=1000 * kilobytes, local_batch=args.local_batch,
                   gradients=list_gradients(args.model, goal.classes, figures['token_share'].value))


def list_gradients(model: str, classes: int, token_share: float, **kwargs) -> tuple[tuple[float, float], ...]:
    """Return (part of the backward pass after which it exists, bytes) of each trained parameter, from the head down.

    Blocks take equal parts of what the tokens-to-token module leaves, whose gradients all exist only at the end.
    """
    network = create_model(model, num_classes=classes, **kwargs)
    depth = len(list(network.get_submodule('blocks').children()))
    gradients: list[tuple[float, float]] = []
    for name, parameter in reversed(list(network.named_parameters())):
        if not parameter.requires_grad:
            continue
        room, *rest = name.split('.')
        if room == 'blocks':
            ready = (1 - token_share) * (depth - int(rest[0])) / depth
        else:
            ready = {'head': 0., 'norm': 0., 'tokens_to_token': 1.}.get(room, 1 - token_share)
        gradients.append((max(ready, gradients[-1][0] if gradients else 0.), 4. * parameter.numel()))
    return tuple(gradients)


# --- Plans ------------------------------------------------------------------------------------------------------------

def make_plans(args, figures: dict[str, Figure]) -> list[dict]:
    found = []
    for name in progress_bar(iterable=dict.fromkeys(args.plans), desc='plans'):
        goal = PLANS[name]
        if min(args.gpus) > goal.largest_batch:
            raise UserError(f'--gpus {min(args.gpus)}: the plan {name} has {goal.largest_batch:,} images per step; '
                            'give fewer, or other --plans')
        cluster, work = build_cluster(figures, args, is_resized=goal.is_resized), build_work(goal, figures, args)
        rows = [plan(cluster, work, gpus) for gpus in sorted(set(args.gpus)) if gpus <= goal.largest_batch]
        for row in rows:
            row['dollars'] = row['gpu_hours'] * figures['dollars'].value
        found.append({'plan': name, 'name': goal.name, 'samples': goal.samples, 'images': goal.images,
                      'gradient_bytes': sum(size for _, size in work.gradients), 'rows': rows,
                      'one_gpu': ideal_rate(cluster, work)})
    return found


def make_changes(args, figures: dict[str, Figure]) -> list[dict]:
    """Return a plan with one figure changed at a time, for SHOWN."""
    goal = PLANS['shards' if 'shards' in args.plans else args.plans[0]]
    work, found = build_work(goal, figures, args), []
    for text, factors in INPUTS['changes'].items():
        changed = figures | {name: replace(figures[name], value=figures[name].value * factor)
                             for name, factor in factors.items()}
        cluster = build_cluster(changed, args, is_resized=goal.is_resized)
        found.append({'change': text, 'plan': goal.name, 'rows': [
            plan(cluster, work, gpus) for gpus in SHOWN if gpus in args.gpus and gpus <= goal.largest_batch]})
    return found


def storage(figures: dict[str, Figure]) -> list[dict]:
    """Return the sizes of the data sets, from the bytes of an image."""
    sets = (('ImageNet', PLANS['shards'].images), ('ImageNet-21k', PLANS['imagenet21k'].images),
            ('400 M images', PLANS['laion400m'].images), ('2 G images', PLANS['laion2b'].images))
    return [{'data': name, 'images': images, 'bytes': images * 1000 * figures['image_kb'].value,
             'resized_bytes': (resized := images * 1000 * figures['shard_image_kb'].value),
             'shards': math.ceil(resized / SHARD), 'index_bytes': images * INDEX, 'order_bytes': images * 8}
            for name, images in sets]


# --- Tables and picture -----------------------------------------------------------------------------------------------

def figures_table(figures: dict[str, Figure]) -> str:
    return markdown_table(['option', 'value', 'unit', 'kind', 'what it is'], [
        [f'`{figure.option}`', f'{figure.value:,.4g}' if figure.value < 1000 else f'{figure.value:,.0f}', figure.unit,
         figure.kind, figure.text] for figure in figures.values()])


def three(value: float) -> str:
    """Format a number with three significant digits."""
    return f'{float(f"{value:.3g}"):,.{max(0, 2 - math.floor(math.log10(value)))}f}' if value > 0 else '0'


def plan_table(found: dict) -> str:
    rows = [[row['gpus'], f'{row["batch"]:g}', f'{row["global_batch"]:,}', three(row['images_per_second']),
             f'{100 * row["efficiency"]:.0f} %', row['limiter'], three(row['read_bytes_per_second'] / 1e9),
             three(row['hours']), *(f'{100 * row["hours_of"][part] / row["hours"]:.0f} %' for part in
                                    ('evaluation', 'checkpoints', 'failures')),
             three(row['gpu_hours']), three(row['dollars'])] for row in found['rows']]
    return markdown_table(
        ['GPUs', 'images on each', 'images per step', 'img/s', 'efficiency', 'limited by', 'GB/s read', 'hours',
         'of these: evaluation', 'checkpoints', 'failures', 'GPU-hours', '$'], rows)


def summary_table(plans: list[dict]) -> str:
    """Return a table of images per second, their limit and hours of each plan, for SHOWN."""
    counts = [gpus for gpus in SHOWN if any(row['gpus'] == gpus for found in plans for row in found['rows'])]
    lines = []
    for found in plans:
        rows = {row['gpus']: row for row in found['rows']}
        lines.append([found['name'], *(
            '{} ({}), {} h'.format(three(rows[gpus]['images_per_second']), rows[gpus]['limiter'],
                                   three(rows[gpus]['hours']))
            + f' (mostly {rows[gpus]["most"]})' * (rows[gpus]['most'] != 'steps')
            if gpus in rows else '–' for gpus in counts)])
    return markdown_table(['img/s (what limits them), hours', *(f'{gpus} GPUs' for gpus in counts)], lines)


def changes_table(found: list[dict]) -> str:
    counts = [row['gpus'] for row in found[0]['rows']]
    return markdown_table(['one figure changed', *(f'{gpus} GPUs, img/s' for gpus in counts),
                           *(f'{gpus}, GPU-hours' for gpus in counts)],
                          [[line['change'], *(f'{three(row["images_per_second"])} ({row["limiter"]})'
                                              for row in line['rows']),
                            *(three(row['gpu_hours']) for row in line['rows'])] for line in found])


def storage_table(found: list[dict]) -> str:
    return markdown_table(
        ['data', 'images', 'as published, TB', 'short side 256, TB', 'shards of 1 GB', 'their index, GB',
         'order of an epoch, GB'],
        [[row['data'], f'{row["images"]:,}', three(row['bytes'] / 1e12), three(row['resized_bytes'] / 1e12),
          f'{row["shards"]:,}', three(row['index_bytes'] / 1e9), three(row['order_bytes'] / 1e9)] for row in found])


def as_text(record: dict, figures: dict[str, Figure]) -> str:
    """Return the whole record in Markdown."""
    apart = max(abs(row['images_per_second'] / row['closed_form'] - 1) for found in record['plans']
                for row in found['rows'])
    texts = ['# Past one machine',
             f'Written by `{record["command"]}`: {record["options"]["model"]}, 224 pixels, '
             f'at most {record["options"]["local_batch"]} images on each GPU. These figures are planned, not measured: '
             'they are as good as their inputs.',
             '## In short', summary_table(record['plans']), '## Inputs', figures_table(figures)]
    for found in record['plans']:
        texts += [f'## {found["name"]}', plan_table(found)]
    alone = three(record['plans'][0]['one_gpu'])
    texts += [f'Efficiency compares with GPUs that wait for nothing, at {alone} img/s each. The limit of steps is what '
              'would shorten them most if it were removed. Rates are simulated; the closed form differs by at most '
              f'{100 * apart:.1f} %.',
              f'## One figure changed: {record["changes"][0]["plan"]}', changes_table(record['changes']),
              '## Storage', storage_table(record['storage'])]
    if record['check']:
        texts += ['## Held against measurements', record['check']]
    return '\n\n'.join(texts) + '\n'


def renew_page(page: str, text: str, quotation: str | None) -> str:
    """Return the page with its tables replaced by those in `text` with the same headers, and with the quotation."""
    tables = {table.partition('\n')[0]: table for table in re.findall(TABLE, text, flags=re.M)}
    page = re.sub(TABLE, lambda found: tables.get(found[0].partition('\n')[0], found[0]), page, flags=re.M)
    return re.sub(r'^> .*$', lambda _: f'> {quotation}', page, flags=re.M) if quotation else page


def draw(record: dict, path: Path) -> None:
    """Draw throughput and efficiency of each plan over GPUs, with points that show the limit; equal curves once."""
    curves: dict[tuple[float, ...], dict] = {}
    for found in record['plans']:
        curves.setdefault(tuple(row['images_per_second'] for row in found['rows']), found)
    counts = sorted({row['gpus'] for found in curves.values() for row in found['rows']})
    alone, color = record['plans'][0]['one_gpu'], '0.6'
    figure = new_figure(14, 7)
    left, right = figure.subplots(1, 2)
    left.plot(counts, [alone * gpus for gpus in counts], color=color, linewidth=1, label='GPUs that wait for nothing')
    right.axhline(100, color=color, linewidth=1)
    for found, style in zip(curves.values(), LINES, strict=False):
        rows = found['rows']
        for panel, values, label in ((left, [row['images_per_second'] for row in rows], found['name']),
                                     (right, [100 * row['efficiency'] for row in rows], None)):
            panel.plot([row['gpus'] for row in rows], values, linestyle=style, color='0.25', zorder=1, label=label)
            for row, value in zip(rows, values, strict=True):
                draw_limit(panel, row['limiter'], row['gpus'], value)
    limits = {row['limiter'] for found in curves.values() for row in found['rows']}
    for limit in (name for name in STYLES if name in limits):
        draw_limit(left, limit, [], [], label=f'limited by: {limit}')
    left.set(yscale='log', ylabel='images per second', title='Throughput')
    right.set(ylim=(0, 108), ylabel='% of GPUs that wait for nothing', title='Efficiency')
    left.yaxis.set_major_formatter('{x:,.0f}')
    for panel in (left, right):
        panel.set(xscale='log', xlabel='GPUs')
        panel.set_xticks(counts, [f'{gpus:,}' for gpus in counts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.suptitle(f'{record["options"]["model"]}: planned from the inputs in the table, not measured')
    figure.legend(loc='outside lower center', ncols=2, fontsize=9)
    figure.savefig(path, dpi=100)


def draw_limit(panel, limit: str, x, y, **settings) -> None:
    color, marker = STYLES[limit]
    panel.plot(x, y, marker, color=color, markeredgecolor='black', markeredgewidth=0.5, markersize=8, **settings)


def main() -> None:
    args = parse_command('Plan trainings past one machine.', 'scaling', plan_options)
    records = Path(args.records).expanduser()
    if not records.is_dir():
        raise UserError(f'--records {records}: no such folder; name one with records of benchmarks/')
    page = Path(args.page) if args.page else None
    if page and not page.is_file():
        raise UserError(f'--page {page}: no such file; name docs/scaling.md')
    known = {path.stem: record for path in sorted(records.glob('*.json'))
             if isinstance(record := read_record(path), dict)}
    figures = find_figures(args, known)
    record = {**new_record('scaling.plans', args, torch.device('cpu')),
              'figures': [asdict(figure) for figure in figures.values()],
              'plans': make_plans(args, figures), 'changes': make_changes(args, figures), 'storage': storage(figures),
              'check': known.get('scaling_check', {}).get('verdict')}
    text = as_text(record, figures)
    paths = save(args, record, text, draw)
    if page:
        write_whole(page, renew_page(page.read_text(encoding='utf-8'), text, record['check']))
    print(text, *paths, sep='\n')


if __name__ == '__main__':
    run_script(main)
