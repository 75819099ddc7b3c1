"""The fingerprint that ties a bank to the parts its keys and latents come from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields

import numpy as np

from tinyalign.runtime.manifest import ImageSpec
from tinyalign.training.parts import Parts


def fingerprint_of(parts: Parts) -> str:
    """SHA-256 (hex) over encoder, preprocessing, key recipe and compressor, at fp16 precision.

    The connectors and the LM do not enter: training them leaves every bank valid.
    """
    digest = hashlib.sha256(image_words(parts.image).encode())
    modules = (parts.vision, parts.compressor) if parts.remembers else (parts.vision,)
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().half().numpy().tobytes())
    if parts.keys is not None:
        for item in fields(parts.keys):
            digest.update(np.asarray(getattr(parts.keys, item.name), np.float32).tobytes())
    return digest.hexdigest()


def image_words(spec: ImageSpec) -> str:
    """Preprocessing as JSON. What all channels share is one number, and squashing goes without
    saying, as it did before there was anything else: so banks of that time stay valid."""
    values = asdict(spec)
    for key in ("mean", "scale"):
        if len(set(values[key])) == 1:
            values[key] = values[key][0]
    if spec.fit == "squash":
        del values["fit"], values["resize"]
    return json.dumps(values, sort_keys=True)
