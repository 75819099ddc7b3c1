"""Language models of other people, with their tokenizer: Hugging Face directories and GGUF files.

What is read is what was trained, or nothing: a setting that this version of transformers would
overlook, a tensor that it would make up, is refused with one line.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tinyalign.runtime.errors import InputError
from tinyalign.training.gguf_reader import open_gguf
from tinyalign.training.gguf_tokenizer import tokenizer_of
from tinyalign.training.lm import build_lm, check_lm, round_embeddings
from tinyalign.training.models.checkpoint import (
    Checkpoint,
    in_one_line,
    open_checkpoint,
    rope_theta,
)
from tinyalign.training.models.supported import FAMILIES, check_exportable

NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Keys of a config for which a default would be a guess."""
COUNTS = (
    "num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "sliding_window",
    "max_position_embeddings",
)  # fmt: skip
"""Keys whose value is a positive whole number, or null."""
NUMBERS = (
    "rms_norm_eps", "layer_norm_eps", "query_pre_attn_scalar", "partial_rotary_factor",
    "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
"""Keys whose value is a positive number; a soft cap may be null."""
UNUSED = ("auto_map", "dtype", "torch_dtype", "quantization_config")
"""Keys that do not matter here: code beside the weights, and how they are kept."""
HARMLESS = "rotary_emb.inv_freq"  # a table that old checkpoints hold and everyone computes anew


def load_language_model(directory: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal language model in float32 and eval mode, and its tokenizer.

    `directory`: one of transformers with config.json, safetensors and tokenizer.json, or a GGUF
    file (see training/lm.py). The types that can be read are those of `supported.FAMILIES`. Token
    embeddings are rounded to float16, as which a model directory ships them.

    Raises InputError with what is wrong, before much is read.
    """
    if directory.is_file():
        return load_gguf(directory)
    checkpoint = open_checkpoint(directory)
    with in_one_line(directory / "config.json"):
        config = read_config(checkpoint)
        check_exportable(config, 1)
    tokenizer = read_tokenizer(directory, config.vocab_size)
    check_memory(memory_needed([math.prod(shape) for shape in tensor_shapes(checkpoint)]))
    with in_one_line(directory):
        model = read_model(checkpoint, config)
    round_embeddings(model)
    return model, tokenizer


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The config of a language model, its rotary settings as whichever version wrote them."""
    family, place = checkpoint.model_type, checkpoint.directory / "config.json"
    settings = {key: value for key, value in checkpoint.config.items() if key not in UNUSED}
    if family not in FAMILIES:
        raise InputError(
            f"{place}: language models of the type {family!r} are not supported, only "
            f"{', '.join(FAMILIES)}"
        )
    check_numbers(settings, place)
    if checkpoint.config.get("quantization_config"):
        raise InputError(
            f"{place}: these weights are quantized (quantization_config): only the original ones "
            "can be exported"
        )
    if family != "opt":
        settings |= rotary_settings(settings)
    config: PretrainedConfig = CONFIG_MAPPING[family].from_dict(settings)
    return config


def check_numbers(settings: dict[str, Any], place: Path) -> None:
    """Raises InputError where a size, or a number that enters the graph, cannot be one."""
    for key in NEEDED:
        if key not in settings:
            raise InputError(f"{place} has no {key}")
    for key in (*NEEDED, *COUNTS):
        value = settings.get(key)
        if (value is not None or key in NEEDED) and (type(value) is not int or value < 1):
            raise InputError(f"{place}: {key} must be a positive whole number, not {value!r}")
    for key in NUMBERS:
        value = settings.get(key, 1)
        if value is None and key.endswith("softcapping"):
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{place}: {key} must be a positive number, not {value!r}")


def rotary_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The rotary keys of transformers 4 from a config that version 4 or 5 has written.

    Version 5 has all of them in `rope_parameters`, which version 4 passes over in silence.
    """
    parameters: dict[str, Any] = settings.get("rope_parameters") or {}
    found: dict[str, Any] = {}
    if local := parameters.get("sliding_attention"):  # Gemma 3: one for each kind of layer
        old = {"rope_theta": settings.get("rope_local_base_freq"), "rope_parameters": local}
        found["rope_local_base_freq"] = rope_theta(old)
        parameters = parameters.get("full_attention") or {}
    found["rope_theta"] = rope_theta({**settings, "rope_parameters": parameters})
    moved = ["partial_rotary_factor"]
    if settings["model_type"] == "phi3":
        moved.append("original_max_position_embeddings")
    found |= {key: parameters[key] for key in moved if key in parameters and key not in settings}
    if "rope_type" in parameters:
        found["rope_scaling"] = rope_scaling(settings, parameters)
    return found


def rope_scaling(settings: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any] | None:
    """How a rotary embedding is stretched, as transformers 4 wants it; None: not at all."""
    new, old = stretch_of(parameters), settings.get("rope_scaling")
    if old and stretch_of(old) != new:
        raise InputError(
            "config.json contradicts itself: rope_scaling and rope_parameters stretch the rotary "
            "embedding differently"
        )
    if old or new == {"rope_type": "default"}:
        return old or None
    if settings["model_type"] == "phi3":  # takes just these three
        factors = {key: new.get(key) for key in ("short_factor", "long_factor")}
        return {"type": new["rope_type"], **factors}
    kept = ("rope_theta", "partial_rotary_factor")
    return {key: value for key, value in parameters.items() if key not in kept}


def stretch_of(settings: dict[str, Any]) -> dict[str, Any]:
    """What tells one way of stretching from another."""
    other = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    kind = settings.get("rope_type", settings.get("type", "default"))
    rest = {k: v for k, v in settings.items() if k not in (*other, "rope_type", "type")}
    return {"rope_type": kind, **rest}


def read_tokenizer(directory: Path, vocab: int) -> Tokenizer:
    """The fast tokenizer of a directory, without cutting or filling up texts."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{directory} has no tokenizer.json: make one with transformers, "
            f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    # Special tokens of pictures may lie beyond a text model's table (Gemma 3).
    last = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if last >= vocab:
        raise InputError(f"{path} has token {last}, but the model only knows {vocab} tokens")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_model(checkpoint: Checkpoint, config: PretrainedConfig) -> PreTrainedModel:
    """The weights of a checkpoint, all of them and nothing else, as float32 model."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        config=config,
        dtype=torch.float32,
        # transformers' fast attention leaves out Gemma 2's soft caps
        attn_implementation="eager" if config.model_type == "gemma2" else "sdpa",
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # else it raises many lines
        output_loading_info=True,
    )
    model, info = loaded
    unexpected = [name for name in info["unexpected_keys"] if not name.endswith(HARMLESS)]
    for names, said in (
        (info["missing_keys"], "a tensor is missing"),
        (info["mismatched_keys"], "a tensor has another shape than config.json says"),
        (unexpected, "a tensor is no part of such a model"),
    ):
        if names:
            raise InputError(
                f"{checkpoint.directory} does not hold a whole {config.model_type}: {said}, "
                f"{sorted(map(str, names))[0]}"
            )
    model.requires_grad_(False).eval()
    assert isinstance(model, PreTrainedModel)
    return model


def tensor_shapes(checkpoint: Checkpoint) -> list[list[int]]:
    """The shapes of all tensors."""
    shapes: list[list[int]] = []
    for path in checkpoint.files:
        with safe_open(path, "pt") as file:
            shapes += [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return shapes


def memory_needed(sizes: list[int]) -> int:
    """Bytes that loading and exporting weights of so many numbers each takes: all of them in
    float32, and what quantizing the largest one needs beside it."""
    return 4 * (sum(sizes) + 4 * max(sizes, default=0))


def check_memory(bytes_needed: int) -> None:
    """Raises InputError when there is less memory; where that is not known, does nothing."""
    free = free_memory()
    if free is not None and free < bytes_needed:
        raise InputError(
            f"not enough memory: about {bytes_needed / 1e9:.1f} GB are needed, "
            f"{free / 1e9:.1f} GB are free"
        )


def free_memory() -> int | None:
    """Bytes that programs can still take, as Linux estimates them; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(found[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


def load_gguf(path: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """The language model of a GGUF file and its tokenizer, where all of the file is understood."""
    file = open_gguf(path)
    with in_one_line(path):
        source, tokenizer = check_lm(file), tokenizer_of(file)
    check_memory(memory_needed([int(tensor.n_elements) for tensor in file.tensors.values()]))
    with in_one_line(path):
        return build_lm(source), tokenizer
