"""Draw the figures of one image by their names, and write them to files with names of their own."""
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from figures.attention import attention_figure
from figures.explain import LayerFeatures, layer_features
from figures.features import features_figure
from figures.tokens import tokens_figure
from utils.disk import write_whole
from utils.errors import UserError

DPI = 110  # of the files
NAME_BYTES = 110  # of the image's name, and of the model's, in a file name; file systems allow 255 in all


def draw_figure(name: str, args, model: torch.nn.Module, image: torch.Tensor, picture: np.ndarray,
                classes: list[str], target: int | None, features: Mapping[str, list[LayerFeatures]], index: int,
                title: str) -> Figure:
    """Return one of options.scripts.FIGURES_OF_IMAGES.

    Args:
        args: options of visualize.py, of which `blocks` and `token` are used.
        image: normalised [1, C, height, width]; `picture` is the same for people, uint8 [height, width, 3].
        classes: names of the model's classes; `target` is the number of the one to explain.
        features: as returned by `features_of_models`; `index` is the image's number in that batch.
    """
    if name == 'attention':
        queries = [args.token] if args.token else None
        return attention_figure(model, image, picture, names=classes, target=target, blocks=args.blocks,
                                queries=queries, title=title)
    if name == 'tokens':
        return tokens_figure(model, image, picture, token=args.token, title=title)
    return features_figure(features, index, title=title)


def features_of_models(models: Mapping[str, torch.nn.Module], images: list[torch.Tensor],
                       layers: list[str] | None) -> dict[str, list[LayerFeatures]]:
    """Return the features of each model for its batch of images: of `layers`, if the model has all of them."""
    known = [{name for name, _ in model.named_modules()} for model in models.values()]
    return {title: layer_features(model, batch, layers if layers and names.issuperset(layers) else None)
            for (title, model), batch, names in zip(models.items(), images, known, strict=True)}


def save_figure(figure: Figure, path: Path, source: object) -> Path:
    """Write a figure to a PNG file, as a whole or not at all, and return its path.

    Args:
        path: its name; name-2, name-3, … if it is that of a picture of another source.
        source: all that decides what the figure shows, which JSON can hold. The file has its SHA-256.

    Raises:
        UserError: the file cannot be written.
    """
    digest = hashlib.sha256(json.dumps(source, sort_keys=True, default=str).encode()).hexdigest()
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format='png', metadata={'Source': digest})
    names = (path.with_name(f'{path.stem}-{number}{path.suffix}') for number in itertools.count(2))
    path = next(name for name in itertools.chain([path], names) if not name.is_file() or _source_of(name) == digest)
    try:
        write_whole(path, content.getvalue())
    except OSError as error:
        raise UserError(f'--output-dir: {path} cannot be written ({error.strerror or error})') from None
    return path


def _source_of(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.info.get('Source')
    except OSError:
        return None


def weights_name(model: str, checkpoint: str | None) -> str:
    """Return a name for a model and its weights in file names, such as 't2t_vit_7-demo-model_best'."""
    words = [model]
    if checkpoint:
        path = Path(checkpoint).resolve()
        if (path.parent / 'args.yaml').exists():  # the folder of a run
            words.append(path.parent.name)
        words.append(re.sub(r'\.(tar|pth|pt|bin|ckpt|safetensors|pdparams)(?=\.|$)', '', path.name))
    return _in_file_name('-'.join(words))


def file_names(paths: list[str], in_class_folders: bool = False) -> list[str]:
    """Return unique names for the files of each image: its own name, after its folder's if `in_class_folders`."""
    stems = []
    for path in paths:
        stem = Path(path).stem
        if re.search(r'\[\d+\]$', path):  # an image of a data set without folders
            stem = path
        elif in_class_folders:
            stem = f'{Path(path).parent.name}-{stem}'
        stems.append(_in_file_name(stem) or 'image')
    return unique(stems)


def _in_file_name(text: str) -> str:
    """Return a text with letters and digits that every file system takes, cut at NAME_BYTES."""
    return re.sub(r'[^\w.-]+', '-', text).strip('-').encode()[:NAME_BYTES].decode(errors='ignore')


def unique(names: Iterable[str]) -> list[str]:
    """Return the names, with the first free one of name-2, name-3, … for a name that is taken."""
    taken, result = set(), []
    last: Counter[str] = Counter()
    for name in names:
        free = name
        while free in taken:
            last[name] += 1
            free = f'{name}-{last[name] + 1}'
        taken.add(free)
        result.append(free)
    return result
