"""Find the weights that a user names: a file, a folder, a model of the Hugging Face Hub, or a URL.

    find_weights('output/train/latest')                 # …/20260131-120000-t2t_vit_14-224/model_best.pth.tar
    read_weights('hf-hub:timm/resnet18.a1_in1k')        # the weights, with what config.json says of them
"""
import contextlib
import hashlib
import http.client
import json
import logging
import os
import re
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.checkpoint_reader import read_checkpoint
from utils.errors import UserError

_logger = logging.getLogger(__name__)

# The checkpoints of a run's folder, in the order in which their weights are taken.
BEST = 'model_best.pth.tar'
LAST = 'last.pth.tar'
NUMBERED = 'checkpoint-*.pth.tar'
# In a folder of runs, this name stands for the run that was written last.
LATEST = 'latest'
# Weights in a folder of timm, transformers or accelerate, and what they are of. An index lists the files of the parts.
INDEX = '.index.json'
CONFIG = 'config.json'
WEIGHTS = ('model.safetensors', f'model.safetensors{INDEX}', 'pytorch_model.bin', f'pytorch_model.bin{INDEX}',
           'model.pth', 'pytorch_model.pth')
# Files of weights under other names; a folder with one of them needs no choice.
SUFFIXES = ('.safetensors', '.pth', '.pth.tar', '.pt', '.bin', '.ckpt', '.pdparams')
# The weights in a folder of DeepSpeed, by the rank of tensor parallelism; with ZeRO-3, of one process.
DEEPSPEED = '*mp_rank_*_model_states.pt'
# Seconds without an answer from a server.
PATIENCE = 60


# --- Where they are ---------------------------------------------------------------------------------------------------

def kind_of_address(name: str) -> str | None:
    """Return 'hf-hub', 'local-dir' or 'url' for an address of this kind, or None for a path or a model's name."""
    kind, colon, _ = name.partition(':')
    kind = kind.lower().replace('_', '-')
    if not colon:
        return None
    return 'url' if kind in ('http', 'https') else kind if kind in ('hf-hub', 'local-dir') else None


def find_weights(address: str | os.PathLike) -> Path:
    """Return the file of the weights that `address` names, on this machine; for weights in parts, their index.

    Args:
        address: a file; a run's folder, whose best checkpoint is taken, else its last; 'latest' beside runs; a folder
            of timm, transformers, accelerate or DeepSpeed, or with a single file of weights, also as
            local-dir:FOLDER; hf-hub:MODEL; https://….

    Raises:
        UserError: something could not be fetched, or a folder holds no weights.
    """
    name = os.fspath(address)
    kind = kind_of_address(name)
    if kind == 'hf-hub':
        return _fetch_from_hub(name)
    if kind == 'url':
        return _download(name)
    path = Path(name.partition(':')[2] if kind else name).expanduser()
    path = find_run(path)
    if path.is_dir():
        return _in_folder(path)
    if path.name == LATEST and path.is_file():  # DeepSpeed's, which names a folder beside it
        return _in_folder(path.parent)
    part = re.fullmatch(r'(.+)-\d{5}-of-(\d{5})(\.\w+)', path.name)
    if part and path.with_name(part[1] + part[3] + INDEX).is_file():
        raise UserError(f'{path} is one of {int(part[2])} parts of the weights; give their folder, {path.parent}')
    return path


def find_run(path: Path) -> Path:
    """Return `path` or, for 'latest' in a folder of runs, the run whose checkpoint was written last.

    Raises:
        UserError: no run there has a checkpoint.
    """
    if path.name != LATEST or path.exists():
        return path
    times: dict[Path, int] = {}
    for file in (*path.parent.glob(f'*/{LAST}'), *path.parent.glob(f'*/{BEST}')):
        with contextlib.suppress(FileNotFoundError):  # a running process may have replaced it
            times[file.parent] = max(times.get(file.parent, 0), file.stat().st_mtime_ns)
    if not times:
        raise UserError(f'{path}: no run in {path.parent} has a checkpoint; check the path')
    return max(times, key=times.__getitem__)


def _in_folder(folder: Path) -> Path:
    """Return the weights in a folder, or the folder itself, which `read_checkpoint` then explains."""
    folder = _step_of_deepspeed(folder)
    numbered = sorted(folder.glob(NUMBERED), reverse=True)
    try:
        others = [path for path in folder.iterdir() if path.name.endswith(SUFFIXES) and not path.name.startswith('.')]
    except OSError as error:
        raise UserError(f'{folder} cannot be read ({error.strerror}); check its permissions') from error
    single = others if len(others) == 1 else []
    shares = sorted(folder.glob(DEEPSPEED))
    known = (folder / BEST, folder / LAST, *numbered, *(folder / name for name in WEIGHTS), *single, *shares[:1])
    found = next((path for path in known if path.is_file()), None)
    if found:
        _logger.info('%s: taking %s', folder, found.name)
        return found
    runs = sorted(path.parent.name for path in folder.glob(f'*/{LAST}'))
    if runs:
        raise UserError(f'{folder} holds {len(runs)} runs; give one of them, such as {folder / runs[-1]}, or '
                        f'{folder / LATEST}')
    return folder


def _step_of_deepspeed(folder: Path) -> Path:
    """Return the folder of the step that DeepSpeed's file `latest` names, else the folder itself.

    Raises:
        UserError: it holds the shares of tensor-parallel processes.
    """
    try:
        with open(folder / LATEST) as file:
            step = folder / file.read(200).strip()
    except (OSError, ValueError):
        step = folder
    folder = step if step.parent == folder and step.is_dir() else folder
    if any(folder.glob('mp_rank_01_model_states.pt')):
        raise UserError(f'{folder} holds shares of the weights of several tensor-parallel processes of DeepSpeed; save '
                        'them whole: engine.save_16bit_model(folder)')
    return folder


def _fetch_from_hub(address: str, names: tuple[str, ...] = WEIGHTS) -> Path:
    """Return the first of these files of hf-hub:MODEL in the Hugging Face Hub's cache, fetched if it is missing there.

    Its config.json and, for an index, its parts come too.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from timm.models._hub import download_from_hf
    model = address.partition(':')[2]
    reason: Exception | None = None
    _logger.info('%s: looking at the Hugging Face Hub', address)

    def fetch(name: str) -> Path | None:
        nonlocal reason
        try:
            with quiet_hub():
                return Path(download_from_hf(model, name))
        except Exception as error:  # its libraries raise errors of all kinds
            reason = error
            return None

    # Without a network, only the first request waits for it.
    is_reached = fetch(CONFIG) is not None or (
        isinstance(reason, EntryNotFoundError) and not isinstance(reason, LocalEntryNotFoundError))
    found = next((path for name in names if (path := fetch(name))), None) if is_reached else None
    if found and found.name.endswith(INDEX):
        found = found if all(fetch(name) for name in sorted(set(_weight_map(found).values()))) else None
    if found is None:
        raise UserError(f'{address} could not be fetched ({_said(reason)}); check the name and the network, or '
                        'download its folder elsewhere and give local-dir:FOLDER')
    return found


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the Hugging Face Hub's lines about every attempt from the console; the error after the last one tells."""
    logger = logging.getLogger('huggingface_hub')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _download(url: str) -> Path:
    """Return the file of a URL in torch's cache, fetched if it is missing there."""
    shown = urllib.parse.urlsplit(url)._replace(query='', fragment='').geturl()  # a query may hold a password
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or 'weights'
    folder = Path(torch.hub.get_dir(), 'checkpoints')
    # Files of equal names at different addresses stay apart.
    path = folder / f'{hashlib.sha256(url.encode()).hexdigest()[:10]}-{name}'
    if path.is_file():
        _logger.info('%s was fetched before: taking %s', shown, path)
        return path
    _logger.info('fetching %s to %s', shown, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={'User-Agent': 't2t-vit'})
        with (urllib.request.urlopen(request, timeout=PATIENCE) as answer,
              tempfile.TemporaryDirectory(dir=folder) as temporary):
            written = Path(temporary, name)
            with open(written, 'wb') as file:
                while piece := answer.read(2 ** 20):
                    file.write(piece)
                size = file.tell()
            if answer.length:  # what the server announced and did not send
                raise ConnectionError(f'it broke off after {size} bytes')
            read_checkpoint(written)  # a page of errors, for example, must not stay in the cache
            os.replace(written, path)
    except UserError as error:
        raise UserError(f'{shown}: {str(error).replace(str(written), name)}') from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f'{shown} could not be fetched ({_said(error)}); check the address and the network, or '
                        'download the file elsewhere and give its path') from error
    return path


def _said(error: BaseException | None) -> str:
    """Return an error's name and the first sentence of its message."""
    sentence = ' '.join(str(error).split()).partition('. ')[0]
    return f'{type(error).__name__}: {sentence}'[:200]


# --- What they hold ---------------------------------------------------------------------------------------------------

def read_weights(address: str | os.PathLike) -> dict[str, Any]:
    """Return the checkpoint at `address`, as `read_checkpoint` does, with what a config.json beside it says.

    That is 'arch', 'img_size', 'classes' (names in the order of the logits), 'label_descriptions' (words for them),
    'pretrained_cfg' (timm's input settings) and 'args' (options of the model). Entries of the file itself come first.

    Raises:
        UserError: as find_weights and read_checkpoint, or a part of the weights is missing.
    """
    path = find_weights(address)
    checkpoint = _read_parts(path) if path.name.endswith(INDEX) else read_checkpoint(path)
    recorded = _read_config(path.with_name(CONFIG)) if path.name in WEIGHTS else {}
    if not recorded:
        return checkpoint
    is_flat = any(isinstance(value, torch.Tensor | np.ndarray) for value in checkpoint.values())
    return {**recorded, **({'state_dict': checkpoint} if is_flat else checkpoint)}


def read_model_config(address: str) -> dict[str, Any]:
    """Return what the config.json of hf-hub:MODEL or local-dir:FOLDER says, as `read_weights` does without weights.

    Raises:
        UserError: it could not be fetched, or names no architecture of timm.
    """
    kind = kind_of_address(address)
    if kind == 'url':
        raise UserError(f'--model {address}: a URL is the address of weights; give it as a checkpoint, and the '
                        "model's name as --model")
    name = address.partition(':')[2]
    path = _fetch_from_hub(address, (CONFIG,)) if kind == 'hf-hub' else Path(name).expanduser() / CONFIG
    recorded = _read_config(path)
    if not recorded:
        raise UserError(f"--model {address}: {path} names no architecture of timm; give the model's name, and its "
                        'weights as a checkpoint')
    return recorded


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file of each key in an index of parts."""
    try:
        parts = json.loads(index.read_bytes())['weight_map']
        if not all(isinstance(name, str) and Path(name).name == name for name in parts.values()):
            raise ValueError('a part is not a file beside it')
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f'{index} is no index of weights ({_said(error)}); copy the folder again') from error
    return parts


def files_of(path: Path) -> list[Path]:
    """Return the files of weights that `find_weights` found: one, or all parts."""
    if not path.name.endswith(INDEX):
        return [path]
    return [path.with_name(name) for name in sorted(set(_weight_map(path).values()))]


def _read_parts(index: Path) -> dict[str, Any]:
    """Return the state dict whose parts an index lists."""
    state: dict[str, Any] = {}
    for path in files_of(index):
        state.update(read_checkpoint(path))
    keys = _weight_map(index).keys()
    if missing := keys - state.keys():
        raise UserError(f'{index.parent}: {len(missing)} of {len(keys)} weights are missing, such as {min(missing)}; '
                        'copy all parts again')
    return state


def _read_config(path: Path) -> dict[str, Any]:
    """Return what a config.json says, as `recorded_by_config`; {} if there is none or it cannot be read."""
    try:
        config = json.loads(path.read_bytes())  # of any UTF, with a byte order mark or without
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _logger.warning('%s is not used: it cannot be read (%s)', path, _said(error))
        return {}
    return recorded_by_config(config)


def recorded_by_config(config: Any) -> dict[str, Any]:
    """Return what the content of timm's config.json says, in the entries of a checkpoint; {} for other content."""
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        return {}
    given = config.get('pretrained_cfg', config)  # older files have one level
    settings = given if isinstance(given, dict) else {}
    model_args = dict(_mapping(config.get('model_args')))
    names = config.get('label_names') or settings.get('label_names') or settings.get('labels')
    if isinstance(names, dict):  # by number
        names = [names.get(str(number)) for number in range(len(names))]
    if isinstance(names, list) and len(names) != config.get('num_classes', len(names)):
        names = None  # of another classifier
    input_size = settings.get('input_size')
    img_size = model_args.pop('img_size', None) or (input_size[1:] if isinstance(input_size, list) else None)
    entries = {
        'arch': config['architecture'], 'img_size': img_size, 'classes': names,
        'label_descriptions': dict(_mapping(config.get('label_descriptions'))), 'pretrained_cfg': settings,
        'args': {'gp': model_args.pop('global_pool', None),
                 # The weights tell their classes and channels.
                 'model_kwargs': [f'{name}={value!r}' for name, value in model_args.items()
                                  if name not in ('num_classes', 'in_chans')]}}
    return {name: value for name, value in entries.items() if value}


def _mapping(value: Any) -> Mapping:
    return value if isinstance(value, dict) else {}
