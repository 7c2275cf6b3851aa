"""launch/launcher.py's settings, and the files of launch/: they say what the launcher reads."""
import os
import re
import shlex
import signal
import socket
import subprocess
import sys

import pytest
import yaml

from data.pipeline import check_training_input
from launch import launcher as launch, nodes
from options.checks import share_global_batch
from tests.conftest import ROOT, run_command, run_script
from tests.test_options import parse
from utils.distributed import init_process_group
from utils.errors import UserError

KUBERNETES = ROOT / 'launch/kubernetes.yaml'
SLURM = ROOT / 'launch/slurm.sbatch'
SETTINGS = ('NNODES', 'RDZV_ENDPOINT', 'RDZV_ID', 'RDZV_TIMEOUT', 'NODE_TIMEOUT', 'MAX_RESTARTS', 'GRACE',
            'MASTER_ADDR', 'MASTER_PORT')


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f'PET_{name}', raising=False)


@pytest.mark.parametrize(('text', 'expected'), [('', (1, 1)), ('4', (4, 4)), ('1:4', (1, 4))])
def test_numbers_of_nodes(monkeypatch, text, expected):
    monkeypatch.setenv('NNODES', text)
    assert launch._node_range() == expected


@pytest.mark.parametrize('text', ['0', 'many', '4:1', '1:', '-1', '0:2', '1:2:3'])
def test_wrong_numbers_of_nodes(monkeypatch, text):
    monkeypatch.setenv('NNODES', text)
    with pytest.raises(UserError, match=f'NNODES={text}: give the number of machines'):
        launch._node_range()


@pytest.mark.parametrize(('environment', 'expected'), [
    ({'RDZV_ENDPOINT': 'node1'}, ('node1', 29500)),
    ({'RDZV_ENDPOINT': 'node1:1234'}, ('node1', 1234)),
    ({'RDZV_ENDPOINT': '[fd00::1]:1234'}, ('fd00::1', 1234)),
    ({'RDZV_ENDPOINT': 'fd00::1'}, ('fd00::1', 29500)),
    ({'MASTER_ADDR': '10.0.0.1', 'MASTER_PORT': '77'}, ('10.0.0.1', 77)),
    ({'PET_RDZV_ENDPOINT': 't2t-worker-0:23456', 'MASTER_ADDR': 'no'}, ('t2t-worker-0', 23456)),
    ({'RDZV_ENDPOINT': 'a:1', 'PET_RDZV_ENDPOINT': 'b:2'}, ('a', 1)),
])
def test_meeting_places(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch._meeting_place() == expected


@pytest.mark.parametrize(('endpoint', 'said'), [('', 'RDZV_ENDPOINT is not set'), ('node1:http', "port 'http' is none"),
                                                ('node1:70000', "port '70000' is none")])
def test_wrong_meeting_places(monkeypatch, endpoint, said):
    monkeypatch.setenv('NNODES', '2')
    monkeypatch.setenv('RDZV_ENDPOINT', endpoint)
    with pytest.raises(UserError, match=said):
        launch._meeting_place()


def test_machines_may_only_go_and_come_where_all_numbers_of_them_can_share_a_step(monkeypatch, tmp_path):
    monkeypatch.setenv('NNODES', '1:4')
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('lr: 5e-4\nglobal-batch-size: 512\n')
    wrong = '512, which 24 processes cannot share in even parts; say 384 or 576, a multiple of 192'
    odd = '480, which 32 processes cannot share in even parts'  # Mixup would refuse 15 images
    for options, said in ((['--global_batch_size=512'], wrong), (['-c', str(recipe)], wrong),
                          (['--global-batch-size', '480'], odd), ([], 'not given; say 192, a multiple of 192')):
        with pytest.raises(UserError, match=said):
            launch._check_global_batch(8, 'train.py', options)
    launch._check_global_batch(8, 'train.py', ['/data', '-c', str(recipe), '--global-batch-size', '576'])
    launch._check_global_batch(8, 'train.py', ['--global-batch-size', 'many'])  # which train.py says
    launch._check_global_batch(8, 'validate.py', [])  # has no steps
    monkeypatch.setenv('NNODES', '3')
    launch._check_global_batch(8, 'train.py', [])


def test_the_address_of_this_machine_is_one_that_leads_there():
    assert nodes._own_address('127.0.0.1', 29500, 1) == '127.0.0.1'
    assert nodes._interface_of('127.0.0.1') == 'lo'
    with pytest.raises(UserError, match='RDZV_ENDPOINT no.such.host.invalid:1: .*give an address'):
        nodes._own_address('no.such.host.invalid', 1, 0)


def test_the_slurm_script_says_what_the_launcher_reads():
    subprocess.run(['bash', '-n', SLURM], check=True)
    text = SLURM.read_text()
    exported = set(re.findall(r'^export (\w+)=', text, re.M))
    assert exported <= set(SETTINGS) and {'NNODES', 'RDZV_ENDPOINT'} <= exported
    warning = int(re.search(r'--signal=B:USR1@(\d+)', text)[1])
    assert warning > int(re.search(r'GRACE:-(\d+)', text)[1]) == 120
    for command in re.findall(r'^# +sbatch (.*)', text, re.M):
        words = shlex.split(command)
        words = words[words.index('launch/slurm.sbatch') + 1:]
        assert (ROOT / parse(*words).as_dict()['data'].removeprefix('wds:')).is_absolute()


def test_the_kubernetes_job_says_what_the_operator_and_the_launcher_read(monkeypatch):
    """The operator finds container and port by their names, and tells each pod where the others are."""
    job = yaml.safe_load(KUBERNETES.read_text())
    assert (job['apiVersion'], job['kind']) == ('kubeflow.org/v1', 'PyTorchJob')
    elastic, [(role, replica)] = job['spec']['elasticPolicy'], job['spec']['pytorchReplicaSpecs'].items()
    assert role == 'Worker' and elastic['minReplicas'] <= replica['replicas'] <= elastic['maxReplicas']
    assert replica['restartPolicy'] == 'OnFailure'  # after 75, too
    pod = replica['template']['spec']
    [container] = pod['containers']
    [port] = container['ports']
    assert (container['name'], port['name']) == ('pytorch', 'pytorchjob-port')
    environment = {entry['name']: entry['value'] for entry in container['env']}
    assert set(environment) <= set(SETTINGS)
    assert pod['terminationGracePeriodSeconds'] > int(environment['GRACE'])
    [program], [number, *options] = container['command'], container['args']
    assert (ROOT / program).is_file() and int(number) == container['resources']['limits']['nvidia.com/gpu']
    args = parse(*options)
    volumes = {mount['mountPath']: mount['name'] for mount in container['volumeMounts']}
    assert set(volumes.values()) == {volume['name'] for volume in pod['volumes']}
    assert args.output in volumes and args.resume == 'auto' and args.experiment
    [shm] = (volume for volume in pod['volumes'] if volume['name'] == volumes['/dev/shm'])
    assert shm['emptyDir']['medium'] == 'Memory'
    # What the operator makes of it, as it does for worker 0.
    told = {'NNODES': f'{elastic["minReplicas"]}:{elastic["maxReplicas"]}', 'RDZV_ID': elastic['rdzvId'],
            'RDZV_ENDPOINT': f'{job["metadata"]["name"]}-worker-0:{port["containerPort"]}',
            'MAX_RESTARTS': str(elastic['maxRestarts'])}
    for name, value in told.items():
        monkeypatch.setenv(f'PET_{name}', value)
        assert launch._setting(name) == value
    assert launch._node_range() == (elastic['minReplicas'], elastic['maxReplicas'])
    assert launch._meeting_place() == (f'{job["metadata"]["name"]}-worker-0', port['containerPort'])
    launch._check_global_batch(int(number), 'train.py', options)
    for pods in range(elastic['minReplicas'], elastic['maxReplicas'] + 1):
        check_training_input(share_global_batch(args, pods * int(number)))


def test_the_page_names_every_setting():
    page = (ROOT / 'docs/many_machines.md').read_text()
    assert [name for name in SETTINGS if name not in page] == []
    for path in re.findall(r'\]\((\.\./[^)]+)\)', page):
        assert (ROOT / 'docs' / path).is_file(), path
    for command in re.findall(r'^NNODES.*distributed_train.sh ((?:.*\\\n)*.*)$', page, re.M):
        num_proc, *words = shlex.split(command.replace('\\\n', ' '))
        args = parse(*words)
        assert num_proc == '8' and (args.global_batch_size or args.batch_size * 32 == 512)


# --- Variables that other programs set --------------------------------------------------------------------------------

QUICK = ('--dataset', 'digits', '--only-classes', '0-2', '--model', 't2t_vit_7', '--img-size', '32', '--device', 'cpu',
         '--model-kwargs', 'embed_dim=32', 'depth=1', 'num_heads=2', '-b', '16', '--epochs', '1', '-j', '0',
         '--warmup-epochs', '0', '--cooldown-epochs', '0', '--no-tensorboard')
STARTERS = ['SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'MV2_COMM_WORLD_SIZE', 'PMI_SIZE', 'JSM_NAMESPACE_SIZE',
            'FLUX_JOB_SIZE']


@pytest.mark.parametrize('name', STARTERS)
def test_tasks_that_would_train_separately_are_refused(name, tmp_path):
    refused = run_script('train.py', *QUICK, cwd=tmp_path, **{name: '2'})
    assert refused.returncode == 2 and 'has started 2 tasks' in refused.stderr and name in refused.stderr
    assert refused.stderr.count('\n') == 1 and not (tmp_path / 'output/train').exists()


def test_launchers_that_would_be_separate_are_refused(monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
    with pytest.raises(UserError, match='srun has started 4 tasks .* set NNODES and RDZV_ENDPOINT'):
        launch._find_nodes()
    monkeypatch.setenv('NNODES', '1')
    assert '--rdzv-endpoint=127.0.0.1:0' in launch._find_nodes()[0]


@pytest.mark.parametrize('environment', [
    {'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '4', 'PMI_SIZE': ''},  # a batch script's own step
    {'SLURM_STEP_NUM_TASKS': '4', 'WORLD_SIZE': '1'}, {'RANK': '', 'WORLD_SIZE': '', 'LOCAL_RANK': ''}])
def test_one_process_is_one(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert init_process_group('cpu').size == 1


@pytest.mark.parametrize(('environment', 'said'), [
    ({'WORLD_SIZE': '2'}, 'WORLD_SIZE=2, but RANK and MASTER_ADDR and MASTER_PORT not set'),
    ({'WORLD_SIZE': '2', 'RANK': '0'}, 'MASTER_ADDR and MASTER_PORT not set'),
    ({'LOCAL_RANK': 'x'}, 'LOCAL_RANK=x is not a number'), ({'RANK': '1'}, 'RANK=1, but WORLD_SIZE=(not set)'),
    ({'WORLD_SIZE': '-2'}, 'WORLD_SIZE=-2 is not a number'), ({'WORLD_SIZE': '0'}, 'RANK=0, but WORLD_SIZE=0')])
def test_variables_that_a_scheduler_leaves_behind_are_one_line(monkeypatch, environment, said):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        init_process_group('cpu')
    assert said in str(caught.value) and '\n' not in str(caught.value)


WAIT = '''
from utils.distributed import init_process_group
from utils.script import run_script
run_script(lambda: init_process_group('cpu'))
'''


@pytest.mark.parametrize(('number', 'exit_code'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_wait_for_other_processes(number, exit_code):
    """A store that accepts connections and never answers, as that of a job whose other processes never come."""
    with socket.create_server(('127.0.0.1', 0)) as silent:
        environment = {**os.environ, 'WORLD_SIZE': '2', 'RANK': '1', 'MASTER_ADDR': '127.0.0.1',
                       'MASTER_PORT': str(silent.getsockname()[1])}
        process = subprocess.Popen([sys.executable, '-c', WAIT], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
                                   preexec_fn=heed_signals)
        silent.settimeout(60)
        silent.accept()
        process.send_signal(number)
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == exit_code


def heed_signals() -> None:
    """A test run that was started in the background ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- The end ----------------------------------------------------------------------------------------------------------

BUSY = '''
import sys
from datetime import timedelta
import torch.distributed as dist
from launch import launcher, nodes
from utils import distributed
from utils.script import run_script

def in_the_store(*_):
    """Most of its time a thread is here, as one that looks into a slow store is."""
    try:
        dist.HashStore().wait(['never'], timedelta(milliseconds=20))
    except dist.DistStoreError:
        pass
'''
ENDS = {
    'launcher': '''
class Nodes(nodes.Nodes):
    def _look(self):
        while True:
            in_the_store()
            self._looks += 1
    def look(self):
        pass

nodes.Nodes = Nodes
run_script(launcher.main)
''',
    'process': '''
class Store:
    set = in_the_store

distributed.BEAT = 0
distributed._progress.start(Store(), 0, 1, timedelta(minutes=1))
run_script(distributed.destroy_process_group)
'''}


@pytest.mark.parametrize('who', ENDS)
def test_a_thread_in_the_store_does_not_abort_what_ends_well(who, tmp_path):
    (tmp_path / 'script.py').write_text('print("done")\n')
    ended = run_command([sys.executable, '-c', BUSY + ENDS[who], '1', tmp_path / 'script.py', '--device', 'cpu'], ROOT)
    assert (ended.returncode, ended.stderr) == (0, '')
