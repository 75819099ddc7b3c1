"""A GGUF file opened, and what its metadata says of the model, in the words of transformers.

Every number under the architecture's name must be known here: one that is not could change what
the model computes, so the file is refused with its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinyalign.bank.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ELSEWHERE = "use the model's Hugging Face directory"
COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
"""Sizes that every file has: key after the architecture's name -> key of a transformers config."""
HEAD_DIMS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
"""Sizes that a file may have, which must all be the width of a head (hd)."""
READ = frozenset(
    (*COUNTS, *HEAD_DIMS, "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.type")
)
HARMLESS = frozenset(("vocab_size", "tensor_data_layout"))  # said twice; where it comes from
DIVISORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTORS = (8.0, 32.0)
"""How the rotary embeddings of Llama 3.1 and 3.3 (8) and 3.2 (32) are stretched."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose metadata and tensors can be read; the tensors stay on the disk."""

    path: Path
    reader: GGUFReader
    tensors: dict[str, ReaderTensor]

    def get(self, key: str) -> Any:
        """One value of the metadata, None when it is not there."""
        value = self.reader.get_field(key)
        return None if value is None else value.contents()

    def field(self, key: str) -> Any:
        """The same; InputError when it is not there."""
        value = self.get(key)
        if value is None:
            raise InputError(f"{self.path}: GGUF metadata {key!r} is missing")
        return value

    def count(self, key: str) -> int:
        """A positive whole number of the metadata; InputError when it is none."""
        value = self.field(key)
        if type(value) is not int or value < 1:
            raise InputError(f"{self.path}: {key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str) -> np.float32:
        """A positive number of the metadata; InputError when it is none."""
        value = self.field(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise InputError(f"{self.path}: {key} must be a positive number, not {value!r}")
        return np.float32(value)

    def weight(self, name: str) -> NDArray[np.float32]:
        """One tensor in float32, copied; InputError when its quantization is not known."""
        tensor = self.tensors[name]
        try:
            return np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            raise InputError(
                f"{self.path}: the quantization {tensor.tensor_type.name} of {name} is not read"
            ) from None


def open_gguf(path: Path | str) -> GgufFile:
    """Map a GGUF file; InputError with its path when it is missing, foreign or cut short."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a readable GGUF file ({error})") from error
    return GgufFile(Path(path), reader, {tensor.name: tensor for tensor in reader.tensors})


def config_settings(file: GgufFile, family: str) -> dict[str, Any]:
    """The keyword arguments of a transformers config for a file of that architecture.

    Raises InputError for a setting that is missing, makes no sense or is not known.
    """
    check_known(file, family)
    sizes = {name: file.count(f"{family}.{key}") for key, name in COUNTS.items()}
    head_dim = read_head_dim(file, family, sizes["hidden_size"] // sizes["num_attention_heads"])
    return {
        **sizes,
        **rotary_settings(file, float(file.number(f"{family}.rope.freq_base")), head_dim),
        "head_dim": head_dim,
        "vocab_size": len(file.field("tokenizer.ggml.tokens")),
        # the shortest decimal of the file's float32: 1e-05, not 9.999999747378752e-06
        "rms_norm_eps": float(str(file.number(f"{family}.attention.layer_norm_rms_epsilon"))),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def check_known(file: GgufFile, family: str) -> None:
    """Raises InputError for a setting of the architecture that is not read."""
    for key in file.reader.fields:
        name = key.removeprefix(f"{family}.")
        if name == "rope.scaling.type" and file.get(key) == "none":
            continue
        if key != name and name.startswith("rope.scaling."):
            raise InputError(
                f"{file.path}: a stretched rotary embedding ({key}) is not read from GGUF files: "
                f"{ELSEWHERE}"
            )
        if key != name and name not in READ | HARMLESS:
            raise InputError(f"{file.path}: the setting {key} is not known: {ELSEWHERE}")


def read_head_dim(file: GgufFile, family: str, usual: int) -> int:
    """The width of a head, where keys, values and the turned part all have it."""
    said = [key for key in HEAD_DIMS if file.get(f"{family}.{key}") is not None]
    widths = {key: file.count(f"{family}.{key}") for key in said}
    head_dim = widths.get("attention.key_length", usual)
    for key, width in widths.items():
        if width != head_dim:
            raise InputError(
                f"{file.path}: {family}.{key} is {width}, but a head is {head_dim} wide"
            )
    return head_dim


def rotary_settings(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The rotary keys of a config, in which transformers 4 and 5 look at different places.

    A stretched embedding of Llama 3 is in the file only as what divides each frequency [hd / 2];
    transformers computes these from four settings. InputError unless published ones yield the same.
    """
    plain = {"rope_type": "default", "rope_theta": theta}
    if DIVISORS not in file.tensors:
        return {"rope_theta": theta, "rope_parameters": plain}
    divisors = file.weight(DIVISORS)
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # [hd / 2]
    for factor in LLAMA3_FACTORS:
        scaling = {"rope_type": "llama3", "factor": factor, **LLAMA3}
        found = llama3_frequencies(theta, head_dim, scaling)
        if divisors.shape == found.shape and np.allclose(
            found * divisors, frequencies, rtol=1e-6, atol=0
        ):
            return {
                "rope_theta": theta,
                "rope_scaling": scaling,
                "rope_parameters": {**scaling, "rope_theta": theta},
            }
    raise InputError(
        f"{file.path}: its {DIVISORS} are not those of Llama 3.1, 3.2 or 3.3: {ELSEWHERE}"
    )


def llama3_frequencies(theta: float, head_dim: int, scaling: dict[str, Any]) -> NDArray[np.float32]:
    """By what angles transformers turns from one position to the next, [hd / 2]."""
    config = LlamaConfig(
        rope_theta=theta, head_dim=head_dim, rope_scaling=scaling, max_position_embeddings=131072
    )
    frequencies, scale = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    assert scale == 1
    found: NDArray[np.float32] = frequencies.numpy()
    return found
