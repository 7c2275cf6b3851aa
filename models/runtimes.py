"""A trained model in the forms that other runtimes read: one function that writes each form, and one that reads it.

    source = Source(model, describe(model, classes=['ant', 'bee']), img_size=(224, 224))
    write_onnx(source, 'model.onnx', source.graph)
    logits = read_onnx('model.onnx')(images)

What is read back is called with normalised images [B, 3, height, width], float32 on the CPU, and returns logits
[B, classes]. Beside the weights every form carries `describe`'s account of the model and its images: names of the
classes, image size, mean and standard deviation of the pixels. export.py is the command line of all this.
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

INPUT, OUTPUT = 'image', 'logits'
AXES = {0: 'batch', 2: 'height', 3: 'width'}
CONFIG = 'config.json'
TOLERANCE = 1e-4  # of logits up to 1; of larger ones, as a part of the largest
TIMED, REPEATS = 4, 5  # images in the batch whose time is measured; times, of which the median counts

Run = Callable[[torch.Tensor], torch.Tensor]


# --- What travels with the weights ------------------------------------------------------------------------------------

def save_config(model: nn.Module, path: str | os.PathLike, *, classes: Sequence[str] | None = None,
                descriptions: Mapping[str, str] | None = None, **images: Any) -> None:
    """Write timm's config.json: architecture and arguments, names of the classes, what images are to the model.

    Args:
        classes: names in the order of the logits, if they are known.
        descriptions: words for those of the names that need some, such as synsets.
        images: what is not as in the model's own configuration: input_size, mean, std, crop_pct, interpolation, …

    Raises:
        UserError: the installed timm does not save a model's arguments.
    """
    if not SAVES_ARGUMENTS:
        raise UserError(f"timm {timm.__version__} does not save a model's arguments; pip install 'timm>=1.0.31'")
    labels = {'label_names': list(classes) if classes else None, 'label_descriptions': dict(descriptions or {})}
    save_config_for_hf(model, str(path), model_config={name: value for name, value in labels.items() if value},
                       data_config=images)


def describe(model: nn.Module, *, classes: Sequence[str] | None = None,
             descriptions: Mapping[str, str] | None = None, **images: Any) -> dict:
    """What `save_config` writes, as a dict; its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        save_config(model, Path(folder, CONFIG), classes=classes, descriptions=descriptions, **images)
        return json.loads(Path(folder, CONFIG).read_text())


def pack_safetensors(state: Mapping[str, torch.Tensor], beside: Mapping[str, Any]) -> bytes:
    """The content of a safetensors file, with what `read_checkpoint` is to find beside the state dict."""
    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    # One entry: several would be in another order each time, and give another hash.
    return safetensors.torch.save(state, {METADATA: json.dumps(beside)})


# --- The graph --------------------------------------------------------------------------------------------------------

class Source:
    """A model in evaluation mode on the CPU, its description, and its graphs, which several forms share.

    Args:
        config: as `describe` returns it.
        img_size: (height, width) in pixels that the model is made for.
    """

    def __init__(self, model: nn.Module, config: dict, img_size: tuple[int, int]):
        self.model, self.config, self.img_size = model.eval(), config, img_size

    def graphs(self) -> Iterator[torch.export.ExportedProgram]:
        """The graph for images of any size, where there is one, then that for the model's own size."""
        yield self.graph
        if self.fixed_graph is not self.graph:
            yield self.fixed_graph

    @functools.cached_property
    def graph(self) -> torch.export.ExportedProgram:
        """For batches of any length and, of models that can, images of any size."""
        # Below 32 pixels a side has a single token, which to a tracer is unlike all other numbers.
        if self.config['pretrained_cfg'].get('fixed_input_size') or min(self.img_size) < 32:
            return self.fixed_graph
        height, width = self.img_size
        try:
            # Sides that differ: equal numbers could be taken for one number.
            return self._trace((height, width + 32), {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})
        except Exception:  # what a tracer cannot follow ends in errors of all kinds
            return self.fixed_graph

    @functools.cached_property
    def fixed_graph(self) -> torch.export.ExportedProgram:
        """For batches of any length, of images of the model's own size."""
        return self._trace(self.img_size, {})

    def _trace(self, size: tuple[int, int], sides: dict) -> torch.export.ExportedProgram:
        axes = {0: torch.export.Dim('batch', min=1), **sides}
        with torch.no_grad():
            return torch.export.export(self.model, (torch.zeros(2, 3, *size),), dynamic_shapes=(axes,))

    def properties(self) -> dict[str, str]:
        """The description as texts, for forms that can hold nothing else; lists and the whole of it as JSON."""
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
    """Names of the classes in the order of the logits, in words where the description has some; [] if unknown."""
    words = config.get('label_descriptions', {})
    return [words.get(name, name) for name in config.get('label_names', ())]


def open_axes(graph: torch.export.ExportedProgram) -> dict[str, int]:
    """The axes of the images that a graph leaves open, with the smallest length that it takes."""
    images = next(node for node in graph.graph.nodes if node.name in graph.graph_signature.user_inputs)
    axes = {}
    for axis, name in AXES.items():
        length = images.meta['val'].shape[axis]
        if isinstance(length, torch.SymInt):
            bounds = graph.range_constraints.get(length.node.expr)
            axes[name] = int(bounds.lower) if bounds else 1
    return axes


# --- safetensors: timm's folder ---------------------------------------------------------------------------------------

def write_safetensors(source: Source, folder: Path, _) -> None:
    """Write timm's folder: config.json and model.safetensors.

    After `import models`, timm.create_model('local-dir:FOLDER', pretrained=True) is the model.
    """
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(source.config, indent=2) + '\n')
    beside = {'arch': source.config['architecture'], 'img_size': list(source.img_size),
              'classes': source.config.get('label_names')}
    (folder / HF_SAFE_WEIGHTS_NAME).write_bytes(
        pack_safetensors(source.model.state_dict(), {name: value for name, value in beside.items() if value}))


def read_safetensors(folder: Path) -> Run:
    """The model of such a folder."""
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


# --- ONNX -------------------------------------------------------------------------------------------------------------

def write_onnx(source: Source, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Write one ONNX file: input 'image', output 'logits', the description among its metadata."""
    program = torch.onnx.export(graph, dynamo=True, verbose=False, input_names=[INPUT], output_names=[OUTPUT],
                                dynamic_shapes=({axis: name for axis, name in AXES.items()
                                                 if name in open_axes(graph)},))
    assert program is not None, 'torch returns a program wherever it is told of no file'
    program.model.metadata_props.update(source.properties())
    program.save(path, external_data=False)


def read_onnx(path: Path) -> Run:
    """The file in onnxruntime, on as many threads as PyTorch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: its warnings are of optimizations that it left out
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def onnx_note(_, path: Path) -> str:
    """The version of ONNX's operators that the file asks for."""
    import onnx
    model = onnx.load(path)
    return 'opset {}'.format(next(opset.version for opset in model.opset_import if opset.domain in ('', 'ai.onnx')))


# --- torch.export and AOTInductor -------------------------------------------------------------------------------------

def write_torch_export(source: Source, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Write the graph and its weights, for torch.export.load; the description is the extra file 'config.json'."""
    torch.export.save(graph, path, extra_files={CONFIG: json.dumps(source.config)})


def read_torch_export(path: Path) -> Run:
    """The graph, as a module."""
    return torch.export.load(path).module()


def write_aotinductor(source: Source, path: Path, graph: torch.export.ExportedProgram) -> None:
    """Compile a graph for this machine's kind of CPU, for torch._inductor.aoti_load_package.

    FORMS has it compile the graph for the model's own image size: that for any size takes twice as long.
    """
    torch._inductor.aoti_compile_and_package(graph, package_path=str(path), inductor_configs={
        'aot_inductor.metadata': source.properties(),
        'aot_inductor.precompile_headers': False,  # it pays off from the second compilation on
        'aot_inductor.compile_wrapper_opt_level': 'O0',  # it only calls the kernels
        'cpp.dynamic_threads': True,  # as many as there are where it runs, not here
    })


def read_aotinductor(path: Path) -> Run:
    """The compiled model, which refuses images of another size: by itself it would compute something.

    (So it would without this function, but for AOTI_RUNTIME_CHECK_INPUTS=1 in the environment.)
    """
    model = torch._inductor.aoti_load_package(str(path))
    size = tuple(map(int, model.get_metadata()['img_size'].split('x')))

    def run(images: torch.Tensor) -> torch.Tensor:
        if tuple(images.shape[2:]) != size:
            raise ValueError(f'images of {tuple(images.shape[2:])} pixels; this package takes {size} alone')
        return model(images.contiguous())

    return run


# --- int8 -------------------------------------------------------------------------------------------------------------

class _SplitThenLinear(nn.Module):
    """What a SplitLinear computes, patch by patch: torch quantizes the weights of linear layers alone."""

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
    """A copy of the model whose linear layers have weights of 8 bits, one scale for each output.

    Activations are quantized as they come, with the range of each batch (dynamic quantization). CPUs alone.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SplitLinear):
            model.set_submodule(name, _SplitThenLinear(layer))
    with _quietly():
        return quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}, inplace=True)


def write_int8(source: Source, path: Path, _) -> None:
    """Write description and state dict of the quantized model, for `read_int8`."""
    with _quietly():
        torch.save({'config': source.config, 'state_dict': quantize(source.model).state_dict()}, path)


def read_int8(path: str | os.PathLike) -> nn.Module:
    """The quantized model in such a file: built as its description says, quantized, then filled.

    Raises:
        UserError: as read_checkpoint, or the file is none of `write_int8`.
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


def int8_note(source: Source, _) -> str:
    """How many of the layers that have a weight matrix or a kernel are quantized."""
    layers = [module for module in source.model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return f'{sum(type(layer) in (nn.Linear, SplitLinear) for layer in layers)} of {len(layers)} layers in 8 bits'


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings: that quantization is to move into a package of its own, that there is no CUDA, …"""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


# --- All of them ------------------------------------------------------------------------------------------------------

class Form(NamedTuple):
    """A form of export: the name of its file or folder, how it is written and read back, the graphs it can be made of,
    best first, what else there is to say of it, whether its logits are to be PyTorch's, packages it needs."""
    file: str
    write: Callable[[Source, Path, Any], None]  # the last is what `graphs` gives
    read: Callable[[Path], Run]
    graphs: Callable[[Source], Iterable[torch.export.ExportedProgram | None]] = lambda source: (None,)
    note: Callable[[Source, Path], str] = lambda source, path: ''
    is_exact: bool = True
    packages: tuple[str, ...] = ()


FORMS = {
    'safetensors': Form('timm', write_safetensors, read_safetensors),
    'onnx': Form('model.onnx', write_onnx, read_onnx, Source.graphs, onnx_note,
                 packages=('onnx', 'onnxscript', 'onnxruntime')),
    'torch-export': Form('model.export.pt2', write_torch_export, read_torch_export, Source.graphs),
    'aotinductor': Form('model.aoti.pt2', write_aotinductor, read_aotinductor, lambda source: (source.fixed_graph,)),
    'int8': Form('model.int8.pth', write_int8, read_int8, note=int8_note, is_exact=False),
}


def missing(name: str) -> str | None:
    """What this machine lacks for a form, and how to get it; None where there is nothing."""
    packages = [package for package in FORMS[name].packages if importlib.util.find_spec(package) is None]
    if packages:
        return f'{", ".join(packages)} not installed; pip install -r requirements-export.txt'
    compiler = os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++')
    if name == 'aotinductor' and not shutil.which(compiler):
        return f'there is no C++ compiler {compiler}; install one, or name one in the environment variable CXX'
    return None


def export(name: str, source: Source, folder: Path, checks: 'Checks') -> dict:
    """Write one form into a folder, read it back and compare it; it is kept if it is as it should be.

    Returns:
        What there is to say of it; of one that was not kept 'failure', and 'difference' if that is the reason.
    """
    form, kept = FORMS[name], folder / FORMS[name].file
    if lack := missing(name):
        return {'failure': lack}
    shutil.rmtree(kept) if kept.is_dir() else kept.unlink(missing_ok=True)  # it may be of another checkpoint
    began = time.perf_counter()
    try:
        # Where a graph is not exact for images of other sizes, that for the model's own size is next.
        for graph in form.graphs(source):
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                written = Path(temporary, form.file)
                with _quietly():
                    form.write(source, written, graph)
                    seconds = time.perf_counter() - began
                    run = form.read(written)
                axes = open_axes(graph) if graph else {}
                compared = checks.compare(run, axes)
                limit = TOLERANCE * max(1., checks.largest) if form.is_exact else sys.float_info.max
                if compared['difference'] <= limit:  # NaN is not
                    shutil.move(written, kept)
                    said = ', '.join(axis if low == 1 else f'{axis} ≥ {low}' for axis, low in axes.items())
                    return {'file': form.file, 'megabytes': _megabytes(kept), 'axes': said or 'as in PyTorch',
                            **compared, 'ms_per_image': checks.milliseconds(run), 'export_seconds': seconds,
                            'note': form.note(source, kept)}
        return {'difference': compared['difference'],
                'failure': f'its logits differ from those of PyTorch by {compared["difference"]:.2g}, '
                           f'more than {limit:.2g}'}
    except Exception as error:  # exporters raise whatever the libraries below them do
        reason = next(iter(str(error).strip().splitlines()), '')[:200]
        return {'failure': f'{type(error).__name__}: {reason}'}


def _megabytes(path: Path) -> float:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


# --- Comparing --------------------------------------------------------------------------------------------------------

class Checks:
    """Images with the logits that the model in PyTorch gives for them.

    Args:
        model: in evaluation mode, on the CPU.
        img_size: (height, width) in pixels that the model is made for.
        real: normalised images [B, 3, height, width], beside random ones.
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
        """The largest differences of logits, and how many percent of the real images get the same class.

        Args:
            axes: as `open_axes` returns them; where height and width are open, two more sizes are tried: where the
                model is made for 224 pixels, 160 and 256 × 192.
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
        """Time for an image, in a batch of the images `timed`: the median of REPEATS."""
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
    """The largest difference in any pair; NaN where there is one, which Python's max would lose."""
    return torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()
