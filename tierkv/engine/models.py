"""Loading a model and its tokenizer: any Hugging Face decoder by directory or name, or the embedded one.

The embedded model is small and random: it says nothing of use, but it is a real checkpoint, written once and
loaded as any other, so that every command works offline on a laptop.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tierkv.errors import ConfigError, UnsupportedModelError

__all__ = ["EMBEDDED", "LoadedModel", "load_model", "load_tokenizer", "split_model"]

EMBEDDED = "embedded"
_EMBEDDED_VERSION = 1
_SEED = 20_260
_SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the name it was asked for."""

    model: Any
    tokenizer: Any
    name: str


def load_model(
    name: str | None, *, cache_dir: Path, device: str | None = None, dtype: str | None = None
) -> LoadedModel:
    """Load a model for inference; None or "embedded" is the embedded one, kept under `cache_dir`.

    device: CUDA where there is one, else the CPU. dtype: bfloat16 on CUDA, the checkpoint's own on a CPU.
    Raises ConfigError, in one line, for an unknown model, device or dtype.
    """
    transformers = _transformers()
    target = _device(device)
    path = _path_of(name, cache_dir)
    options = {"dtype": _dtype(dtype, target)}
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, config=config, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as exc:
        raise ConfigError(f"cannot load the model {name!r}: {_first_line(exc)}") from exc
    return LoadedModel(model.to(target).eval(), tokenizer, name or EMBEDDED)


def load_tokenizer(name: str, *, cache_dir: Path) -> Any | None:
    """Return the tokenizer of a model that is already on this machine, or None if it is not."""
    path = _embedded_path(cache_dir) if name in ("", EMBEDDED) else Path(name)
    if not path.is_dir():
        return None
    try:
        return _transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def split_model(model: Any) -> Any:
    """Split a loaded model over the processes of torch.distributed, in place, by its own tensor-parallel plan.

    Every process calls this with the same weights on its own device and goes on with its slice of them. So the whole
    model must fit a device first: larger ones are loaded in slices, by Transformers' `from_pretrained` with a
    `distributed_config`. Raises ConfigError without a process group or where the model is on another device than this
    process', UnsupportedModelError for a model without a plan.
    """
    transformers = _transformers()
    name = type(model).__name__
    if not (hasattr(model, "prepare_distribute_model") and hasattr(model, "maybe_distribute_model")):
        raise ConfigError(f"Transformers {transformers.__version__} cannot split a loaded {name}", hint="5.17 can")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ConfigError(f"{name} cannot be split: torch.distributed has no process group", hint="run under torchrun")
    if not model.tp_plan:
        raise UnsupportedModelError(f"{name} has no tensor-parallel plan")
    if model.device != (own := _own_device()):
        raise ConfigError(f"{name} is on {model.device}, but this process splits models on {own}")
    size = torch.distributed.get_world_size()
    config = importlib.import_module("transformers.distributed").DistributedConfig(tp_plan="auto", tp_size=size)
    tied = _untie(model)
    try:
        config, _, mesh = model.prepare_distribute_model(config)  # what a mesh is changes with the version
        return model.maybe_distribute_model(model, config, mesh)
    except ValueError as exc:
        raise UnsupportedModelError(f"{name} cannot be split over {size} devices: {_first_line(exc)}") from exc
    finally:
        _tie(model, tied)


def _own_device() -> torch.device:
    """Return where Transformers puts this process' slice: not where the model is, but where torchrun says."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    try:
        return torch.device(accelerator.type, torch.distributed.get_node_local_rank())
    except RuntimeError as exc:
        raise ConfigError("LOCAL_RANK does not say which device is this process'", hint="run under torchrun") from exc


def _untie(model: Any) -> list[tuple[str, str]]:
    """Make each further name of a weight a parameter of its own over the same memory; return it with the first name.

    Transformers splits a model before it ties weights, and 5.23 finds only the first name of one that is tied.
    """
    first_names: dict[int, str] = {}
    tied = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        first_name = first_names.setdefault(id(parameter), name)
        if first_name != name:
            _set_parameter(model, name, torch.nn.Parameter(parameter.detach(), parameter.requires_grad))
            tied.append((name, first_name))
    return tied


def _tie(model: Any, tied: list[tuple[str, str]]) -> None:
    """Undo `_untie`, save for weights whose names were split in different ways."""
    for name, first_name in tied:
        parameter, first = model.get_parameter(name), model.get_parameter(first_name)
        if getattr(parameter, "placements", None) == getattr(first, "placements", None):
            _set_parameter(model, name, first)


def _set_parameter(model: Any, name: str, parameter: torch.nn.Parameter) -> None:
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, parameter)


def write_embedded_model(path: Path) -> None:
    """Write the embedded model's checkpoint into a directory: seeded, so the same on every machine."""
    transformers = _transformers()
    tokenizer = _byte_tokenizer(transformers)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        dtype="float32",
    )
    model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:  # norms keep their ones
                scale = 1.0 if "embed" in parameter_name else parameter.shape[1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _byte_tokenizer(transformers: Any) -> Any:
    """Return a tokenizer of one token a byte, with the special tokens and the template of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def _embedded_path(cache_dir: Path) -> Path:
    return cache_dir / f"embedded-model-{_EMBEDDED_VERSION}"


def _path_of(name: str | None, cache_dir: Path) -> str:
    if name is not None and name != EMBEDDED:
        if not name:
            raise ConfigError("the model has no name")
        path = Path(name).expanduser()
        if path.exists() and not (path / "config.json").is_file():
            raise ConfigError(f"{name} is no model: it has no config.json")
        if path.is_absolute() and not path.exists():
            raise ConfigError(f"there is no model at {name}")
        return str(path) if path.exists() else name
    target = _embedded_path(cache_dir)
    if not (target / "config.json").is_file():
        _write_atomically(target)
    return str(target)


def _write_atomically(target: Path) -> None:
    """Write the embedded model beside its place and rename it there; who comes second uses the first one's."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as exc:
        raise ConfigError(f"cannot write the embedded model to {target.parent}: {exc.strerror}") from exc
    try:
        write_embedded_model(temporary)
        os.rename(temporary, target)
    except OSError as exc:
        if not (target / "config.json").is_file():
            raise ConfigError(f"cannot write the embedded model to {target}: {exc.strerror}") from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("running a model needs transformers", hint="pip install 'tierkv[hf]'")
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as exc:
        raise ConfigError(f"{name!r} is no device: say cpu or cuda") from exc
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"tierkv does not run on {name}: say cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _dtype(name: str | None, device: torch.device) -> Any:
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else "auto"
    dtype = getattr(torch, name, None)
    if name not in ("bfloat16", "float16", "float32", "float64") or not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{name!r} is no dtype for K and V: say bfloat16, float16 or float32")
    return dtype


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__
