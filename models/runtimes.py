"""Write a trained model in the formats of other runtimes, and compare what is read back with PyTorch.

    traced = TracedModel(model, describe(model, classes=['ant', 'bee']), img_size=(224, 224))
    write_onnx(traced, 'model.onnx', traced.graph)
    logits = read_onnx('model.onnx')(images)

Each format has a function that writes it and one that reads it. What is read back maps normalised images
[B, 3, height, width], float32 on the CPU, to logits [B, classes]. Every format carries the description of the model:
names of the classes, image size, mean and standard deviation of the pixels. export.py is the command line.
"""
import contextlib
import copy
import functools
import importlib.util
import json
import logging
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import nn

from models.timm_versions import SAVES_ARGUMENTS
from models.tokens_to_token import SoftSplit, SplitLinear
from utils.checkpoint_reader import METADATA, read_checkpoint
from utils.errors import UserError
from utils.weight_sources import recorded_by_config

INPUT, OUTPUT = 'image', 'logits'
AXES = {0: 'batch', 2: 'height', 3: 'width'}
CONFIG = 'config.json'
# The folder in which a format is written until it is compared. Its name is fixed, so the next export removes it.
UNFINISHED = '.unfinished'
TOLERANCE = 1e-4  # of logits, relative to the largest one if that exceeds 1
TIMED, REPEATS = 4, 5  # images in the batch that is timed; times of which the median is taken

Run = Callable[[torch.Tensor], torch.Tensor]


# --- What travels with the weights ------------------------------------------------------------------------------------

def describe(model: nn.Module, *, classes: Sequence[str] | None = None,
             descriptions: Mapping[str, str] | None = None, **images: Any) -> dict:
    """Return the content of timm's config.json: architecture, arguments, names of the classes, input of the model.

    Args:
        classes: names in the order of the logits, if they are known.
        descriptions: words for names such as synsets.
        images: replacements in the model's configuration: input_size, mean, std, crop_pct, interpolation, …

    Raises:
        UserError: the installed timm does not save a model's arguments.
    """
    if not SAVES_ARGUMENTS:
        raise UserError(f"timm {timm.__version__} does not save a model's arguments; pip install 'timm>=1.0.31'")
    labels = {'label_names': list(classes) if classes else None, 'label_descriptions': dict(descriptions or {})}
    with tempfile.TemporaryDirectory() as folder:
        save_config_for_hf(model, f'{folder}/{CONFIG}', data_config=images,
                           model_config={name: value for name, value in labels.items() if value})
        config = json.loads(Path(folder, CONFIG).read_text())
    # It stands above the arguments too, and transformers passes both on.
    config.get('model_args', {}).pop('num_classes', None)
    return config


def pack_safetensors(state: Mapping[str, torch.Tensor], beside: Mapping[str, Any]) -> bytes:
    """Return the content of a safetensors file; `read_checkpoint` returns `beside` together with the state dict.

    The entry 'format' is for transformers, which refuses files without it.
    """
    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    content = safetensors.torch.save(state)
    length = int.from_bytes(content[:8], 'little')
    # Written here, since safetensors writes several entries in random order, which changes the hash.
    header = {'__metadata__': {'format': 'pt', METADATA: json.dumps(beside)}, **json.loads(content[8:8 + length])}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, 'little') + text + content[8 + length:]


# --- The graph --------------------------------------------------------------------------------------------------------

class TracedModel:
    """A model in evaluation mode on the CPU, its description, and its graphs, which several formats share.

    Args:
        config: as returned by `describe`.
        img_size: (height, width) of the model in pixels.
    """

    def __init__(self, model: nn.Module, config: dict, img_size: tuple[int, int]):
        self.model, self.config, self.img_size = model.eval(), config, img_size

    def graphs(self) -> Iterator[torch.export.ExportedProgram]:
        """Yield the graph for images of any size, if there is one, then the graph for the model's own size."""
        yield self.graph
        if self.fixed_graph is not self.graph:
            yield self.fixed_graph

    @functools.cached_property
    def graph(self) -> torch.export.ExportedProgram:
        """The graph for any number of images, of any size if the model supports it."""
        # Below 32 pixels a side has a single token, which the tracer treats as a constant.
        if self.config['pretrained_cfg'].get('fixed_input_size') or min(self.img_size) < 32:
            return self.fixed_graph
        height, width = self.img_size
        try:
            # The sides differ, since the tracer may identify equal sides.
            return self._trace((height, width + 32), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})
        except Exception:  # a tracer raises errors of all kinds
            return self.fixed_graph

    @functools.cached_property
    def fixed_graph(self) -> torch.export.ExportedProgram:
        """The graph for any number of images of the model's own size."""
        return self._trace(self.img_size, {})

    def _trace(self, size: tuple[int, int], sides: dict) -> torch.export.ExportedProgram:
        axes = {0: torch.export.Dim('batch', min=1), **sides}
        with torch.no_grad():
            return torch.export.export(self.model, (torch.zeros(2, 3, *size),), dynamic_shapes=(axes,))

    def properties(self) -> dict[str, str]:
        """Return the description as texts, for formats that hold nothing else; lists are JSON."""
        images = self.config['pretrained_cfg']
        return {
            'architecture': self.config['architecture'],
            'img_size': '{}x{}'.format(*self.img_size),
            **{name: json.dumps(images[name]) for name in ('mean', 'std', 'crop_pct')},
            'interpolation': images['interpolation'],
            'classes': json.dumps(class_names(self.config)),
            'config': json.dumps(self.config),
        }


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes in the order of the logits, in words if there are any; [] if unknown."""
    words = config.get('label_descriptions', {})
    return [words.get(name, name) for name in config.get('label_names', ())]


def open_axes(graph: torch.export.ExportedProgram) -> dict[str, int]:
    """Return the dynamic axes of the images, with the smallest length that the graph accepts."""
    images = next(node for node in graph.graph.nodes if node.name in graph.graph_signature.user_inputs)
    axes = {}
    for axis, name in AXES.items():
        length = images.meta['val'].shape[axis]
        if isinstance(length, torch.SymInt):
            bounds = graph.range_constraints.get(length.node.expr)
            axes[name] = int(bounds.lower) if bounds else 1
    return axes


# --- safetensors: timm's folder ---------------------------------------------------------------------------------------

def write_safetensors(traced: TracedModel, folder: Path, _) -> None:
    """Write config.json and model.safetensors, for timm.create_model('local-dir:FOLDER', pretrained=True)."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(traced.config, indent=2) + '\n')
    beside = {**recorded_by_config(traced.config), 'img_size': list(traced.img_size)}
    (folder / HF_SAFE_WEIGHTS_NAME).write_bytes(pack_safetensors(traced.model.state_dict(), beside))


def read_safetensors(folder: Path) -> Run:
    """Return the model of such a folder."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


# --- ONNX -------------------------------------------------------------------------------------------------------------

def write_onnx(traced: TracedModel, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Write an ONNX file with input 'image' and output 'logits'; its metadata hold the description."""
    program = torch.onnx.export(graph, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                                dynamic_shapes=({axis: name for axis, name in AXES.items()
                                                 if name in open_axes(graph)},))
    assert program is not None, 'without a file, torch returns the program'
    program.model.metadata_props.update(traced.properties())
    program.save(path, external_data=False)


def read_onnx(path: Path) -> Run:
    """Return the model in onnxruntime, with as many threads as PyTorch uses."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only; the warnings are about omitted optimizations
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def onnx_note(_, path: Path) -> str:
    """Return the version of ONNX's operator set."""
    import onnx
    opsets = onnx.load(path).opset_import
    return 'opset {}'.format(next(opset.version for opset in opsets if opset.domain in ('', 'ai.onnx')))


# --- torch.export and AOTInductor -------------------------------------------------------------------------------------

def write_torch_export(traced: TracedModel, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Write the graph and its weights, for torch.export.load; the extra file config.json holds the description."""
    torch.export.save(graph, path, extra_files={CONFIG: json.dumps(traced.config)})


def read_torch_export(path: Path) -> Run:
    """Return the graph as a module."""
    return torch.export.load(path).module()


def write_aotinductor(traced: TracedModel, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Compile a graph for CPUs like this one, for torch._inductor.aoti_load_package."""
    torch._inductor.aoti_compile_and_package(graph, package_path=str(path), inductor_configs={
        'aot_inductor.metadata': traced.properties(),
        'aot_inductor.precompile_headers': False,  # pays off only from the second compilation on
        'aot_inductor.compile_wrapper_opt_level': 'O0',  # the wrapper only calls the kernels
        'cpp.dynamic_threads': True,  # the number of threads of the machine that runs it
    })


def read_aotinductor(path: Path) -> Run:
    """Return the compiled model, which raises ValueError for images of another size.

    The package itself returns wrong logits for them, unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the environment.
    """
    model = torch._inductor.aoti_load_package(str(path))
    size = tuple(map(int, model.get_metadata()['img_size'].split('x')))

    def run(images: torch.Tensor) -> torch.Tensor:
        if tuple(images.shape[2:]) != size:
            raise ValueError(f'images of {tuple(images.shape[2:])} pixels; this package takes only {size}')
        return model(images.contiguous())

    return run


# --- int8 -------------------------------------------------------------------------------------------------------------

class _SplitThenLinear(nn.Module):
    """A SplitLinear computed from patches, since torch quantizes the weights of linear layers only."""

    def __init__(self, layer: SplitLinear):
        super().__init__()
        self.split = SoftSplit(layer.kernel, layer.stride, layer.padding)
        self.linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.linear.load_state_dict(layer.state_dict())

    def forward(self, x: torch.Tensor, norm_weight: torch.Tensor | None = None, norm_bias: torch.Tensor | None = None,
                norm_eps: float = 1e-5) -> torch.Tensor:
        x = self.split(x)
        if norm_weight is not None:
            x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, norm_eps)
        return self.linear(x)


def quantize(model: nn.Module) -> nn.Module:
    """Return a copy of the model with linear layers of 8 bits, one scale for each output, for CPUs only.

    Activations are quantized by the range of each batch (dynamic quantization).
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitLinear):
            model.set_submodule(name, _SplitThenLinear(layer))
    with _quietly():
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def write_int8(traced: TracedModel, path: Path, _) -> None:
    """Write the description and the state dict of the quantized model, for `read_int8`."""
    with _quietly():
        torch.save({'config': traced.config, 'state_dict': quantize(traced.model).state_dict()}, path)


def read_int8(path: str | os.PathLike) -> nn.Module:
    """Return the quantized model of such a file: build it from the description, quantize it, load the weights.

    Raises:
        UserError: as read_checkpoint, or `write_int8` has not written the file.
    """
    with _quietly():
        content = read_checkpoint(path)
        if content.keys() != {'config', 'state_dict'}:
            raise UserError(f'{path} is no int8 export; give a file that export.py --format int8 wrote')
        config = content['config']
        model = timm.create_model(config['architecture'],
                                  **{'num_classes': config['num_classes'], **config.get('model_args', {})})
        model = quantize(model.eval())
        if content['state_dict'].keys() != model.state_dict().keys():
            raise UserError(f'{path} was written by an earlier version; export the model again')
        model.load_state_dict(content['state_dict'])
    return model


def int8_note(traced: TracedModel, _) -> str:
    """Return how many of the linear and convolution layers are quantized."""
    layers = [module for module in traced.model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return f'{sum(type(layer) in (nn.Linear, SplitLinear) for layer in layers)} of {len(layers)} layers in 8 bits'


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress warnings, such as that quantization will move to another package."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


# --- All formats ------------------------------------------------------------------------------------------------------

class RuntimeFormat(NamedTuple):
    """A format of export: its file or folder, its functions, and what it needs."""
    file: str
    write: Callable[[TracedModel, Path, Any], None]  # model, path, one of `graphs`
    read: Callable[[Path], Run]
    graphs: Callable[[TracedModel], Iterable[torch.export.ExportedProgram | None]] = lambda _: (None,)  # best first
    note: Callable[[TracedModel, Path], str] = lambda _, path: ''
    is_exact: bool = True  # whether its logits must equal PyTorch's
    packages: tuple[str, ...] = ()


RUNTIME_FORMATS = {
    'safetensors': RuntimeFormat('timm', write_safetensors, read_safetensors),
    'onnx': RuntimeFormat('model.onnx', write_onnx, read_onnx, TracedModel.graphs, onnx_note,
                          packages=('onnx', 'onnxscript', 'onnxruntime')),
    'torch-export': RuntimeFormat('model.export.pt2', write_torch_export, read_torch_export, TracedModel.graphs),
    # The graph for images of any size would be twice as slow.
    'aotinductor': RuntimeFormat('model.aoti.pt2', write_aotinductor, read_aotinductor,
                                 lambda traced: (traced.fixed_graph,)),
    'int8': RuntimeFormat('model.int8.pth', write_int8, read_int8, note=int8_note, is_exact=False),
}


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def check_overwrites(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if a file of these formats exists in a folder without an earlier export."""
    existing = [folder / RUNTIME_FORMATS[name].file for name in names if (folder / RUNTIME_FORMATS[name].file).exists()]
    if existing and not (folder / 'export.json').exists():
        raise UserError(f'--output-dir: {existing[0]} is there, and no export has written it; name another folder')


def missing(name: str) -> str | None:
    """Return what this machine lacks for a format and how to get it, or None."""
    packages = [package for package in RUNTIME_FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if packages:
        return f'{", ".join(packages)} not installed; pip install -r requirements-export.txt'
    compiler = os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++')
    if name == 'aotinductor' and not shutil.which(compiler):
        return f'there is no C++ compiler {compiler}; install one, or name one in the environment variable CXX'
    return None


def write_format(name: str, traced: TracedModel, folder: Path, checks: 'Checks') -> dict:
    """Write a format into a folder, read it back, compare it, and keep it if its logits are right.

    Returns:
        A row of results; 'failure' if it was not kept, with 'difference' if its logits are wrong.
    """
    form = RUNTIME_FORMATS[name]
    kept = folder / form.file
    if lack := missing(name):
        return {'failure': lack}
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)  # perhaps of another checkpoint
    began = time.perf_counter()
    try:
        # If a graph is not exact for images of other sizes, the next one is for the model's own size.
        for graph in form.graphs(traced):
            with _temporary_folder(folder / UNFINISHED) as temporary:
                written = temporary / form.file
                with _quietly():
                    form.write(traced, written, graph)
                    seconds = time.perf_counter() - began
                    run = form.read(written)
                axes = open_axes(graph) if graph else {}
                compared = checks.compare(run, axes)
                limit = TOLERANCE * max(1., checks.largest) if form.is_exact else sys.float_info.max
                if compared['difference'] <= limit:  # false for NaN
                    shutil.move(written, kept)
                    files = kept.iterdir() if kept.is_dir() else [kept]
                    listed = ', '.join(axis if low == 1 else f'{axis} ≥ {low}' for axis, low in axes.items())
                    return {'file': form.file, 'megabytes': sum(file.stat().st_size for file in files) / 1e6,
                            'axes': listed or 'as in PyTorch', **compared, 'ms_per_image': checks.milliseconds(run),
                            'export_seconds': seconds, 'note': form.note(traced, kept)}
        return {'difference': compared['difference'],
                'failure': f'its logits differ from those of PyTorch by {compared["difference"]:.2g}, '
                           f'more than {limit:.2g}'}
    except Exception as error:  # the libraries below raise errors of all kinds
        reason = next(iter(str(error).strip().splitlines()), '')[:200]
        return {'failure': f'{type(error).__name__}: {reason}'}


# --- Comparison -------------------------------------------------------------------------------------------------------

class Checks:
    """Images, and the logits of the model in PyTorch for them.

    Args:
        model: in evaluation mode, on the CPU.
        img_size: (height, width) of the model in pixels.
        real: normalised images [B, 3, height, width], used besides random ones.

    Raises:
        UserError: the model's own logits are not finite.
    """

    def __init__(self, model: nn.Module, img_size: tuple[int, int], real: torch.Tensor | None = None):
        self._model, self._img_size = model, img_size
        self._random = [self._with_logits(_random_images(count, *img_size)) for count in (1, 3)]
        self._real = None if real is None else self._with_logits(real)
        self.largest = max(logits.abs().max().item() for _, logits in self._random + [self._real or self._random[0]])
        if not math.isfinite(self.largest):
            raise UserError('the logits of the model itself are not finite; export another checkpoint')
        self.num_real = 0 if real is None else len(real)
        self.timed = self._random[-1][0] if real is None else real[:TIMED]

    def compare(self, run: Run, axes: Mapping[str, int]) -> dict[str, float]:
        """Return the largest differences of logits, and the share of real images with the same class, in percent.

        Args:
            axes: as returned by `open_axes`; if height and width are open, two other sizes are compared too (160 and
                256 × 192 for a model of 224 pixels).
        """
        height, width = self._img_size
        sizes = ((height * 5 // 7, width * 5 // 7), (height * 8 // 7, width * 6 // 7)) if 'height' in axes else ()
        others = [self._with_logits(_random_images(2, max(axes['height'], h), max(axes['width'], w)))
                  for h, w in sizes]
        with torch.no_grad():
            row = {'difference_random': _difference(
                [(run(images), logits) for images, logits in self._random + others])}
            if self._real:
                images, logits = self._real
                theirs = run(images)
                row['difference_real'] = _difference([(theirs, logits)])
                row['same_top1'] = 100 * (theirs.argmax(1) == logits.argmax(1)).float().mean().item()
        largest = torch.tensor([row['difference_random'], row.get('difference_real', 0.)]).max().item()
        return {'difference': largest, **row}

    def milliseconds(self, run: Run) -> float:
        """Return the time for an image in a batch of the images `timed`: the median of REPEATS."""
        times = []
        with torch.no_grad():
            run(self.timed)
            for _ in range(REPEATS):
                began = time.perf_counter()
                run(self.timed)
                times.append(time.perf_counter() - began)
        return 1000 * statistics.median(times) / len(self.timed)

    def _with_logits(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return images, self._model(images)


def _random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def _difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the largest difference in any pair; NaN if there is one, which Python's max may lose."""
    return torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()
