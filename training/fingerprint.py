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
    digest = hashlib.sha256(json.dumps(asdict(ImageSpec()), sort_keys=True).encode())
    for module in (parts.vision, parts.compressor):
        for name, value in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().half().numpy().tobytes())
    assert parts.keys is not None
    for item in fields(parts.keys):
        digest.update(np.asarray(getattr(parts.keys, item.name), np.float32).tobytes())
    return digest.hexdigest()
